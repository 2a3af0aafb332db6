//! Operands of convolutions of one group rounded to bfloat16, in pairs: of input channels, or, for weight gradients, of images.
#![allow(unsafe_code)]

use std::ops::Range;

use crate::kernels::conv::grids::{Lines, Plan};
use crate::kernels::conv::panels::Unpacked;
use crate::kernels::conv::{in_slots, slots};
use crate::kernels::half::Elements;
use crate::kernels::pairs::{PairKernel, Pairs, STRIP, across, both, in_strips, neighbours};
use crate::kernels::par::Shared;
use crate::kernels::simd::{Simd, Vectors};
use crate::kernels::tile::Pieces;

/// Input channels whose weights are put in order at a time.
const BLOCK: usize = 16;
/// Pairs of several positions that are put in order at a time, where each has few.
const NEAR: usize = 512;

/// Elements of scratch that [`pack_panel`] needs.
pub(super) fn near(plan: &Plan, panel: usize) -> usize {
    plan.order.len() * BLOCK * panel
}

/// Elements of scratch that [`pack`] needs.
pub(super) fn pack_scratch(plan: &Plan, panel: usize) -> usize {
    slots(plan.panels(panel), near(plan, panel))
}

/// Weights in panels, as of [`Unpacked::pack`], a row for each pair of input channels.
pub(super) fn pack<T: Vectors>(of: &Unpacked<T>, out: &mut [u32], scratch: &mut [T]) {
    let Unpacked { plan, panel, .. } = *of;
    let (panels, size) = (plan.panels(panel), plan.steps() * panel);
    let out = Shared::new(&mut out[..panels * size]);
    in_slots(panels, near(plan, panel), scratch, |p, near| {
        // SAFETY: the panel's own.
        let out = unsafe { std::slice::from_raw_parts_mut(out.ptr().add(p * size), size) };
        pack_panel(of, p, out, near);
    });
}

/// Panel `p` of them.
pub(super) fn pack_panel<T: Vectors>(of: &Unpacked<T>, p: usize, out: &mut [u32], near: &mut [T]) {
    let Unpacked { plan, panel, .. } = *of;
    let (row, taps) = (plan.row(panel, p, T::level().lanes), plan.order.len());
    assert!(out.len() >= plan.steps() * row, "packed weights");
    for first in (0..plan.inputs).step_by(BLOCK) {
        let inputs = first..plan.inputs.min(first + BLOCK);
        of.pack_inputs(p, inputs.clone(), row, near);
        let out = out[first / 2 * row..].as_mut_ptr();
        // SAFETY: the panel has its rows.
        unsafe { T::dispatch_pairs(PairRows { near, taps, rows: inputs.len(), step: plan.ci, row, out }) }
    }
}

/// Pairs of neighbouring rows of some input channels, for each tap.
struct PairRows<'a, T> {
    near: &'a [T],
    taps: usize,
    rows: usize,
    /// Rows of pairs from a tap to the next, and elements of each.
    step: usize,
    row: usize,
    out: *mut u32,
}

impl<T: Vectors> PairKernel<T> for PairRows<'_, T> {
    #[inline(always)]
    unsafe fn run<D: Pairs<S: Simd<Elem = T>>>(self) {
        let PairRows { near, taps, rows, step, row, out } = self;
        for tap in 0..taps {
            for i in (0..rows).step_by(2) {
                let starts = both(i / 2, rows, tap * rows * row, row);
                // SAFETY: the caller's promise.
                unsafe {
                    let to = out.add((tap * step + i / 2) * row);
                    across::<D>(Elements::Whole(near), starts, row, to);
                }
            }
        }
    }
}

/// As [`grids::pad`](super::grids::pad): some rows of the input with zeros around, in pairs of channels.
pub(super) struct Pad<'a, T> {
    pub(super) plan: &'a Plan,
    pub(super) x: Elements<'a, T>,
    pub(super) images: Range<usize>,
    pub(super) row: usize,
    pub(super) window: [usize; 3],
    pub(super) out: &'a mut [u32],
}

impl<T: Vectors> PairKernel<T> for Pad<'_, T> {
    #[inline(always)]
    unsafe fn run<D: Pairs<S: Simd<Elem = T>>>(self) {
        let Pad { plan, x, images, row, window, out } = self;
        let c = plan.ci;
        let line = window[2] * c;
        let lines = Lines::of(plan, images, row, window);
        for nth in 0..lines.count() {
            let [position, at, n] = lines.line(nth);
            let out = &mut out[nth * line..][..line];
            out[..at * c].fill(0);
            // SAFETY: the caller's promise.
            unsafe { pair_positions::<D>(plan, x, position, n, &mut out[at * c..(at + n) * c]) };
            out[(at + n) * c..].fill(0);
        }
    }
}

/// Some positions, one after the other.
pub(super) struct Positions<'a, T> {
    pub(super) plan: &'a Plan,
    pub(super) x: &'a [T],
    pub(super) out: &'a mut [u32],
}

impl<T: Vectors> PairKernel<T> for Positions<'_, T> {
    #[inline(always)]
    unsafe fn run<D: Pairs<S: Simd<Elem = T>>>(self) {
        let positions = self.x.len() / self.plan.inputs;
        // SAFETY: the caller's promise.
        unsafe { pair_positions::<D>(self.plan, Elements::Whole(self.x), 0, positions, self.out) }
    }
}

/// Positions from the `first` on in pairs of channels.
///
/// # Safety
/// `D`'s instructions must be there.
#[inline(always)]
unsafe fn pair_positions<D: Pairs<S: Simd<Elem: Vectors>>>(
    plan: &Plan,
    x: Elements<<D::S as Simd>::Elem>,
    first: usize,
    n: usize,
    out: &mut [u32],
) {
    let (c, pairs, out) = (plan.inputs, plan.ci, &mut out[..n * plan.ci]);
    // SAFETY: as many pairs as there is room for; the caller's promise.
    unsafe {
        if c.is_multiple_of(2) {
            return neighbours::<D>(x, first * c, n * c, out.as_mut_ptr());
        }
        for i in 0..n {
            neighbours::<D>(x, (first + i) * c, c, out.as_mut_ptr().add(i * pairs));
        }
    }
}

/// Images in pairs, their channels in strips that lie each by itself, `width` pairs a position. The second image of an odd number's
/// last pair is zeros.
#[derive(Clone, Copy)]
pub(super) struct Strips<'a, T> {
    pub(super) x: Elements<'a, T>,
    /// Images, and positions and channels of each.
    pub(super) n: usize,
    pub(super) positions: usize,
    pub(super) channels: usize,
    pub(super) strips: Pieces,
    pub(super) width: usize,
}

impl<T: Vectors> Strips<'_, T> {
    /// Writes some positions, counted through the pairs of images, of some strips, one strip after the other.
    ///
    /// # Safety
    /// `to` must be writable for them, and `D`'s instructions be there.
    #[inline(always)]
    pub(super) unsafe fn write<D: Pairs<S: Simd<Elem = T>>>(
        &self,
        positions: Range<usize>,
        strips: Range<usize>,
        to: *mut u32,
    ) {
        let (size, image) = (positions.len() * self.width, self.positions * self.channels);
        // Few channels: of several positions at a time.
        let all = strips.len() == self.strips.count;
        let most = match all && (self.width <= STRIP || self.width == self.channels) {
            true => (NEAR / self.channels).max(1),
            false => 1,
        };
        let mut done = 0;
        while done < positions.len() {
            let (pair, position) =
                ((positions.start + done) / self.positions, (positions.start + done) % self.positions);
            let n = most.min(positions.len() - done).min(self.positions - position);
            let starts = both(pair, self.n, position * self.channels, image);
            // SAFETY: the caller's promise.
            unsafe {
                let to = to.add(done * self.width);
                if self.width <= STRIP {
                    let last = done + n == positions.len();
                    in_strips::<D>(
                        self.x,
                        starts,
                        &self.strips,
                        strips.clone(),
                        size,
                        [n, self.width],
                        last,
                        to,
                    );
                } else if self.width == self.channels {
                    across::<D>(self.x, starts, n * self.channels, to);
                } else {
                    for strip in strips.clone() {
                        let at = self.strips.start(strip);
                        let starts = starts.map(|start| start.map(|start| start + at));
                        let to = to.add((strip - strips.start) * size);
                        across::<D>(self.x, starts, self.strips.len(strip), to);
                    }
                }
            }
            done += n;
        }
    }
}

/// Lines of images in pairs, those that lie outside of the images and what is beside them being zeros.
pub(super) struct PadImages<'a, T> {
    pub(super) x: Elements<'a, T>,
    /// Where each line of either image begins, if there is one, and where its elements go.
    pub(super) starts: [Option<usize>; 2],
    pub(super) at: usize,
    pub(super) len: usize,
    pub(super) out: &'a mut [u32],
}

impl<T: Vectors> PairKernel<T> for PadImages<'_, T> {
    #[inline(always)]
    unsafe fn run<D: Pairs<S: Simd<Elem = T>>>(self) {
        let PadImages { x, starts, at, len, out } = self;
        let (before, rest) = out.split_at_mut(at);
        let (line, after) = rest.split_at_mut(len);
        before.fill(0);
        // SAFETY: the line has its elements.
        unsafe { across::<D>(x, starts, len, line.as_mut_ptr()) }
        after.fill(0);
    }
}
