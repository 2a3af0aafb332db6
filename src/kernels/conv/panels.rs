//! Weights of dense convolutions in the order in which tiles read them: in panels of output channels.
#![allow(unsafe_code)]

use std::ops::Range;

use rayon::prelude::*;

use crate::kernels::conv::grids::Plan;
use crate::kernels::par::Shared;
use crate::kernels::simd::{Kernel, Simd, Vectors, WIDEST, load_up_to, store_up_to};
use crate::kernels::tile::Pieces;

/// Elements of packed weights that are worth a task of their own.
const LARGE: usize = 1 << 14;
/// Elements from the weights that are put in order to those that are fetched meanwhile: what lies next in each of several
/// rows does not look like a stream to the processor.
const AHEAD: usize = 64;
/// Taps of kernels for which the places of taps are looked up in a table.
const PLACES: usize = 32;

/// Weights of (M, C/groups, taps), read forwards or for the input's gradient, and how many outputs a panel of them has.
#[derive(Clone, Copy)]
pub(super) struct Unpacked<'a, T> {
    pub(super) plan: &'a Plan,
    pub(super) forward: bool,
    pub(super) panel: usize,
    pub(super) w: &'a [T],
}

impl<T: Vectors> Unpacked<'_, T> {
    /// All panels, one after the other: see [`pack_inputs`](Self::pack_inputs).
    pub(super) fn pack(&self, out: &mut [T]) {
        let Unpacked { plan, forward, panel, w } = *self;
        if !forward && plan.taps == 1 {
            return pack_rows(plan, panel, w, out);
        }
        let one = |(p, out): (usize, &mut [T])| self.pack_panel(p, out);
        let size = plan.steps() * panel;
        if out.len() < LARGE {
            out.chunks_mut(size.max(1)).enumerate().for_each(one);
        } else {
            out.par_chunks_mut(size.max(1)).enumerate().for_each(one);
        }
    }

    /// Panel `p` of them.
    pub(super) fn pack_panel(&self, p: usize, out: &mut [T]) {
        let row = self.plan.row(self.panel, p, T::level().lanes);
        self.pack_inputs(p, 0..self.plan.inputs, row, out);
    }

    /// Panel `p` of the output channels, all groups' counted: for each of the plan's taps, in its order, and each of some
    /// input channels a row of `row` elements, zeros beyond the last of the panel's outputs.
    pub(super) fn pack_inputs(&self, p: usize, inputs: Range<usize>, row: usize, out: &mut [T]) {
        let Unpacked { plan, forward, panel, w } = *self;
        let (ci, co, taps) = (plan.inputs, plan.co, plan.taps);
        let (group, first) = (p / plan.panels(panel), p % plan.panels(panel) * panel);
        let start = match forward {
            true => (first * ci + inputs.start) * taps,
            false => (inputs.start * co + first) * taps,
        };
        let (lanes, inputs) = (panel.min(co - first), inputs.len());
        assert!(out.len() >= plan.order.len() * inputs * row, "packed weights");
        let w = &w[group * ci * co * taps + start..];
        // SAFETY: the panel has its rows.
        unsafe { T::dispatch(PackPanel { plan, forward, row, lanes, inputs, w, out }) }
    }
}

/// The same where W's rows are the panels' in one: of an input gradient without taps. They are read in the order in which they
/// lie.
fn pack_rows<T: Vectors>(plan: &Plan, panel: usize, w: &[T], out: &mut [T]) {
    let (co, rows) = (plan.co, if plan.order.is_empty() { 0 } else { plan.groups * plan.inputs });
    assert!(w.len() >= rows * co && out.len() >= plan.packed(panel), "packed weights");
    let out = Shared::new(out);
    let some = |rows: Range<usize>| {
        // SAFETY: each row of W has its own place in the panels.
        unsafe { T::dispatch(PackRows { plan, panel, rows, w, out: out.ptr() }) }
    };
    match Pieces::of(rows, LARGE.div_ceil(co.max(1))) {
        pieces if pieces.count <= 1 => some(0..rows),
        pieces => (0..pieces.count).into_par_iter().for_each(|i| {
            let first = pieces.start(i);
            some(first..first + pieces.len(i));
        }),
    }
}

struct PackRows<'a, T> {
    plan: &'a Plan,
    panel: usize,
    /// Of W, all groups' counted.
    rows: Range<usize>,
    w: &'a [T],
    out: *mut T,
}

impl<T: Vectors> Kernel<T> for PackRows<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(self) {
        let PackRows { plan, panel, rows, w, out } = self;
        let (per_group, size) = (plan.panels(panel), plan.steps() * panel);
        for i in rows {
            let (group, input) = (i / plan.inputs, i % plan.inputs);
            let from = w[i * plan.co..][..plan.co].as_ptr();
            for p in 0..per_group {
                let first = p * panel;
                let (lanes, row) = (panel.min(plan.co - first), plan.row(panel, p, S::LANES));
                // SAFETY: the panel has the row, whole vectors of it.
                unsafe {
                    let to = out.add((group * per_group + p) * size + input * row);
                    for lane in (0..lanes).step_by(S::LANES) {
                        let n = S::LANES.min(lanes - lane);
                        S::store(to.add(lane), load_up_to::<S>(from.add(first + lane), n));
                    }
                }
            }
        }
    }
}

struct PackPanel<'a, T> {
    plan: &'a Plan,
    forward: bool,
    /// Elements of a packed row.
    row: usize,
    /// Columns of the panel that are outputs.
    lanes: usize,
    inputs: usize,
    /// From the panel's first weight on.
    w: &'a [T],
    out: &'a mut [T],
}

impl<T: Vectors> Kernel<T> for PackPanel<'_, T> {
    /// Squares of W are transposed in registers. A row is an output's: forward it has all inputs with their taps, for the
    /// gradient the taps of one input.
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(self) {
        let PackPanel { plan, forward, row, lanes, inputs, w, out } = self;
        let taps = plan.taps;
        let (o_step, i_step) = if forward { (plan.inputs * taps, taps) } else { (taps, plan.co * taps) };
        let (blocks, columns) = if forward { (1, inputs * taps) } else { (inputs, taps) };
        if lanes < row {
            out.fill(T::zero());
        }
        if o_step == 1 {
            // In order already.
            for input in 0..if plan.order.is_empty() { 0 } else { inputs } {
                out[input * row..][..lanes].copy_from_slice(&w[input * i_step..][..lanes]);
            }
            return;
        }
        let mut places = [None; PLACES];
        for (t, tap) in plan.order.iter().enumerate() {
            if let Some(place) = places.get_mut(*tap as usize) {
                *place = Some(t);
            }
        }
        // Without taps, neighbouring inputs are neighbouring rows.
        let straight = forward && taps == 1 && plan.order.len() == 1;
        let mut square = [T::zero(); WIDEST * WIDEST];
        for block in 0..blocks {
            for lane in (0..lanes).step_by(S::LANES) {
                let height = S::LANES.min(lanes - lane);
                let (mut input, mut tap) = (block, 0);
                for column in (0..columns).step_by(S::LANES) {
                    let width = S::LANES.min(columns - column);
                    let from = block * i_step + lane * o_step + column;
                    // What is read beyond the columns must be there, too.
                    let whole = height == S::LANES && from + (S::LANES - 1) * o_step + S::LANES <= w.len();
                    if forward {
                        for i in 0..height {
                            // SAFETY: fetching is allowed anywhere.
                            unsafe { S::prefetch(w.as_ptr().wrapping_add(from + i * o_step + AHEAD)) }
                        }
                    }
                    if straight && whole && width == S::LANES {
                        let to = &mut out[column * row + lane..][..(S::LANES - 1) * row + S::LANES];
                        // SAFETY: both have a square.
                        unsafe { S::transpose(w.as_ptr().add(from), o_step, to.as_mut_ptr(), row) }
                        input += width;
                        continue;
                    }
                    if whole {
                        // SAFETY: as was just said.
                        unsafe { S::transpose(w.as_ptr().add(from), o_step, square.as_mut_ptr(), S::LANES) }
                    } else {
                        for i in 0..height {
                            for j in 0..width {
                                square[j * S::LANES + i] = w[from + i * o_step + j];
                            }
                        }
                    }
                    for j in 0..width {
                        let place = match places.get(tap) {
                            Some(place) => *place,
                            None => plan.order.iter().position(|o| *o as usize == tap),
                        };
                        if let Some(t) = place {
                            let to = &mut out[(t * inputs + input) * row + lane..][..height];
                            // SAFETY: both have `height` elements.
                            unsafe {
                                let v = S::load(square.as_ptr().add(j * S::LANES));
                                store_up_to::<S>(to.as_mut_ptr(), v, height);
                            }
                        }
                        tap += 1;
                        if tap == taps {
                            (input, tap) = (input + 1, 0);
                        }
                    }
                }
            }
        }
    }
}
