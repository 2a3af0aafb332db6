//! The input gradient of convolutions with few input channels (a network's first layer, which ICP goes back through).
//!
//! Three channels would leave most lanes of a vector empty. So the channels of all taps are columns of one matrix
//! product, `Z[position][tap, channel] = dY[position]·W`, and rows of Z are then added where their taps lie in dX.
#![allow(unsafe_code, clippy::needless_range_loop)]

use std::ops::Range;

use crate::kernels::conv::{Epilogue, Geometry, in_slots, slots};
use crate::kernels::par::Shared;
use crate::kernels::simd::{Kernel, Simd, Vectors, load_up_to, store_up_to};
use crate::kernels::tile::{Pieces, multiply};
use crate::tile_sizes;

/// Input channels up to which it pays.
pub(super) const CHANNELS: usize = 4;
/// Tasks that keep the threads of a small machine equally busy, and rows of dX that each should at least have.
const TASKS: usize = 16;
const ROWS: usize = 8;
/// Positions of a register tile.
const POSITIONS: usize = 8;

pub(super) fn applies(g: &Geometry) -> bool {
    g.groups == 1 && g.axis > 0 && g.c <= CHANNELS && g.dilation[2] == 1 && g.c * g.k[2] > 1
}

struct Plan<'a> {
    g: &'a Geometry,
    /// Columns of Z: of one row of taps, and of all.
    run: usize,
    columns: usize,
    panels: usize,
    /// Elements of a row of dX with zeros around.
    width: usize,
    /// Rows of dX of a task.
    rows: usize,
}

impl<'a> Plan<'a> {
    fn new(g: &'a Geometry, panel: usize) -> Self {
        let run = g.k[2] * g.c;
        let columns = g.k[1] * run;
        let reach = ((g.y[2] - 1) * g.stride[2] + g.k[2]).max(g.x[2] + g.pad[2]);
        let rows = g.x[1].div_ceil(TASKS.div_ceil(g.n)).max(ROWS).min(g.x[1]);
        Plan { g, run, columns, panels: columns.div_ceil(panel), width: reach * g.c, rows }
    }

    /// Elements of the packed weights: (panels, M, panel).
    fn packed(&self, panel: usize) -> usize {
        self.panels * self.g.oc * panel
    }

    /// Elements of a task's rows of dX and of Z's rows of one register tile.
    fn slot(&self, panel: usize) -> usize {
        self.rows * self.width + POSITIONS * self.panels * panel
    }

    fn tasks(&self) -> usize {
        self.g.n * self.g.x[1].div_ceil(self.rows)
    }
}

/// W (M, C, k, k) as (panels, M, panel) with columns (tap, channel).
fn pack<T: Vectors>(p: &Plan, panel: usize, w: &[T], out: &mut [T]) {
    let (c, oc, taps) = (p.g.c, p.g.oc, p.g.taps());
    out.fill(T::zero());
    for (o, w) in w.chunks_exact(c * taps).enumerate() {
        for (i, w) in w.iter().enumerate() {
            let column = i % taps * c + i / taps;
            out[(column / panel * oc + o) * panel + column % panel] = *w;
        }
    }
}

struct Task<'a, T> {
    plan: &'a Plan<'a>,
    dy: &'a [T],
    weights: &'a [T],
    bias: Option<&'a [T]>,
    residual: Option<*const T>,
    image: usize,
    /// Of dX.
    rows: Range<usize>,
    sums: &'a mut [T],
    z: &'a mut [T],
    dx: *mut T,
}

impl<T: Vectors> Kernel<T> for Task<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(self) {
        let (p, g, panel) = (self.plan, self.plan.g, 2 * S::LANES);
        let z_row = p.panels * panel;
        let runs = [(0isize, g.oc)];
        match self.bias {
            Some(bias) => self.sums.chunks_exact_mut(g.c).for_each(|s| s.copy_from_slice(bias)),
            None => self.sums.fill(T::zero()),
        }
        let pieces = Pieces::of(g.y[2], S::ROWS[1]);
        for row in 0..g.y[1] {
            // The rows of taps that reach this task's rows.
            let mut taps = g.k[1]..0;
            for k in 0..g.k[1] {
                let at = (row * g.stride[1] + k * g.dilation[1]).wrapping_sub(g.pad[1]);
                if self.rows.contains(&at) {
                    taps = taps.start.min(k)..k + 1;
                }
            }
            if taps.is_empty() {
                continue;
            }
            let panels = taps.start * p.run / panel..(taps.end * p.run).div_ceil(panel);
            for i in 0..pieces.count {
                let (first, m) = (pieces.start(i), pieces.len(i));
                let dy = self.dy[((self.image * g.y[1] + row) * g.y[2] + first) * g.oc..].as_ptr();
                // SAFETY: dY has the positions, the packed weights and `z` the panels, the sums the rows.
                unsafe {
                    for q in panels.clone() {
                        let n = if p.columns - q * panel > S::LANES { 2 } else { 1 };
                        let b = self.weights.as_ptr().add(q * g.oc * panel);
                        let z = self.z.as_mut_ptr().add(q * panel);
                        tile_sizes!(m, n, S, multiply(1, &runs, dy, g.oc, b, z, z_row, false));
                    }
                    for j in 0..m {
                        for k in taps.clone() {
                            let at = (row * g.stride[1] + k * g.dilation[1]).wrapping_sub(g.pad[1]);
                            if !self.rows.contains(&at) {
                                continue;
                            }
                            let z = self.z.as_ptr().add(j * z_row + k * p.run);
                            let to = (at - self.rows.start) * p.width + (first + j) * g.stride[2] * g.c;
                            add::<S>(self.sums.as_mut_ptr().add(to), z, p.run);
                        }
                    }
                }
            }
        }
        let (from, len) = (g.pad[2] * g.c, g.x[2] * g.c);
        for (i, row) in self.rows.clone().enumerate() {
            let start = (self.image * g.x[1] + row) * len;
            let sums = self.sums[i * p.width + from..][..len].as_ptr();
            let mut at = 0;
            while at < len {
                let n = (len - at).min(S::LANES);
                // SAFETY: the rows lie in dX, and in the residual, which has its size.
                unsafe {
                    let mut v = load_up_to::<S>(sums.add(at), n);
                    if let Some(r) = self.residual {
                        v = S::add(v, load_up_to::<S>(r.add(start + at), n));
                    }
                    store_up_to::<S>(self.dx.add(start + at), v, n);
                }
                at += S::LANES;
            }
        }
    }
}

/// `to += x`, `n` elements.
///
/// # Safety
/// Both must be valid for them.
#[inline(always)]
unsafe fn add<S: Simd>(to: *mut S::Elem, x: *const S::Elem, n: usize) {
    let mut at = 0;
    while at < n {
        let part = (n - at).min(S::LANES);
        // SAFETY: the caller's promise.
        unsafe {
            let v = S::add(load_up_to::<S>(to.add(at), part), load_up_to::<S>(x.add(at), part));
            store_up_to::<S>(to.add(at), v, part);
        }
        at += S::LANES;
    }
}

/// Elements of scratch that [`input_grad`] needs.
pub(super) fn scratch<T: Vectors>(g: &Geometry) -> usize {
    let (panel, p) = (T::level().pair(), Plan::new(g, T::level().pair()));
    p.packed(panel) + slots(p.tasks(), p.slot(panel))
}

/// `dx = bias + residual + Σ_t W[t]ᵀ·dy[…]`; the epilogue's clamp does not count.
pub(super) fn input_grad<T: Vectors>(
    g: &Geometry,
    dy: &[T],
    w: &[T],
    epilogue: Epilogue<T>,
    dx: &mut [T],
    scratch: &mut [T],
) {
    g.check(dx, dy);
    let panel = T::level().pair();
    let p = Plan::new(g, panel);
    let (weights, slots) = scratch.split_at_mut(p.packed(panel));
    pack(&p, panel, w, weights);
    let weights: &[T] = weights;
    let blocks = g.x[1].div_ceil(p.rows);
    let dx = Shared::new(dx);
    in_slots(p.tasks(), p.slot(panel), slots, |task, slot| {
        let (image, first) = (task / blocks, task % blocks * p.rows);
        let rows = first..g.x[1].min(first + p.rows);
        let (sums, z) = slot.split_at_mut(p.rows * p.width);
        let (bias, dx) = (epilogue.bias, dx.ptr());
        let residual = epilogue.residual.address(|| dx);
        // SAFETY: the slices have the geometry's extents; no two tasks write the same rows.
        unsafe {
            T::dispatch(Task { plan: &p, dy, weights, bias, residual, image, rows, sums, z, dx });
        }
    });
}
