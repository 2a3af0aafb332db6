//! `dX = Wᵀ * dY`.

#![allow(unsafe_code)]

use super::forward::Shifted;
use super::{CACHE, Geometry, by_tap, depthwise, in_slots, slots, volume};
use crate::kernels::gemm::{Product, Shared, many};
use crate::kernels::isa::vectorize;
use crate::tensor::Float;

/// The input gradient of a convolution of stride 1 as a convolution of the output gradient.
fn transposed(g: &Geometry) -> Option<Geometry> {
    let reach: [usize; 3] = std::array::from_fn(|d| (g.k[d] - 1) * g.dilation[d]);
    let fits = g.unit_stride() && g.og() >= 16 && (0..3).all(|d| g.pad[d] <= reach[d]);
    fits.then(|| Geometry {
        c: g.oc,
        oc: g.c,
        x: g.y,
        y: g.x,
        pad: std::array::from_fn(|d| reach[d] - g.pad[d]),
        ..g.clone()
    })
}

/// How patch gradients are computed and scattered: some channels at a time, so that tasks do not meet.
struct Scatter {
    channels: usize,
    blocks: usize,
    rows: usize,
    slot: usize,
}

impl Scatter {
    fn of(g: &Geometry) -> Self {
        let (cg, taps) = (g.cg(), g.taps());
        // Enough tasks for several threads even with one image.
        let wanted = 16usize.div_ceil(g.n * g.groups).clamp(1, cg.div_ceil(8));
        let channels = cg.div_ceil(wanted).min((CACHE / taps / g.row().min(POSITIONS_MIN)).max(1));
        let rows = g.block_rows(channels * taps * g.row(), g.row());
        let slot = channels * taps * rows * g.row();
        Scatter { channels, blocks: cg.div_ceil(channels), rows, slot }
    }

    fn tasks(&self, g: &Geometry) -> usize {
        g.n * g.groups * self.blocks
    }
}

/// Positions for which patch gradients of all channels should fit the cache.
const POSITIONS_MIN: usize = 256;

/// Elements of scratch that [`input_grad`] needs.
pub fn input_grad_scratch(g: &Geometry) -> usize {
    if g.is_empty() {
        0
    } else if g.depthwise() {
        depthwise::input_grad_scratch(g)
    } else if g.pointwise() {
        0
    } else if let Some(t) = transposed(g) {
        Shifted::of(&t).scratch(&t)
    } else {
        let s = Scatter::of(g);
        slots(s.tasks(g), s.slot)
    }
}

/// `dy` (N, OC, Y…), `w` (OC, C/groups, K…), `dx` (N, C, X…).
pub fn input_grad<T: Float>(g: &Geometry, dy: &[T], w: &[T], dx: &mut [T], scratch: &mut [T]) {
    let (cg, og, taps) = (g.cg(), g.og(), g.taps());
    if g.is_empty() {
        dx.fill(T::zero());
    } else if g.depthwise() {
        depthwise::input_grad(g, dy, w, dx, scratch);
    } else if g.pointwise() {
        let px = volume(g.x);
        let p = Product::dense(true, false, cg, px, og);
        let at = |i: usize| [i % g.groups * og * cg, i * og * px];
        many(&p, g.n * g.groups, at, w, dy, dx, cg * px);
    } else if let Some(t) = transposed(g) {
        let s = Shifted::of(&t);
        let (by, slots) = scratch.split_at_mut(g.oc * cg * taps);
        by_tap(g, w, by);
        let by = &*by;
        let flipped = |group: usize, t: usize| &by[(group * taps + taps - 1 - t) * og * cg..][..og * cg];
        s.run(&t, dy, flipped, true, None, dx, slots);
    } else {
        scatter(g, dy, w, dx, scratch);
    }
}

fn scatter<T: Float>(g: &Geometry, dy: &[T], w: &[T], dx: &mut [T], scratch: &mut [T]) {
    let plan = Scatter::of(g);
    let (cg, og, taps, px, py) = (g.cg(), g.og(), g.taps(), volume(g.x), volume(g.y));
    let dx = Shared::new(dx);
    in_slots(plan.tasks(g), plan.slot, scratch, |task, columns| {
        let (image, rest) = (task / (g.groups * plan.blocks), task % (g.groups * plan.blocks));
        let (group, c) = (rest / plan.blocks, rest % plan.blocks * plan.channels);
        let channels = plan.channels.min(cg - c);
        // SAFETY: tasks differ in image, group or channels.
        let dx = unsafe { dx.part((image * g.c + group * cg + c) * px, channels * px) };
        dx.fill(T::zero());
        let dy = &dy[(image * g.oc + group * og) * py..][..og * py];
        let w = &w[group * og * cg * taps + c * taps..];
        for first in (0..g.y[g.axis]).step_by(plan.rows) {
            let rows = plan.rows.min(g.y[g.axis] - first);
            let n = rows * g.row();
            let p =
                Product { lda: cg * taps, ldb: py, ..Product::dense(true, false, channels * taps, n, og) };
            p.serial(w, &dy[first * g.row()..], columns);
            let mut y_dims = g.y;
            y_dims[g.axis] = rows;
            vectorize(
                #[inline(always)]
                || {
                    for (i, column) in columns.chunks_exact(n).take(channels * taps).enumerate() {
                        add_column(g, column, i % taps, first, y_dims, &mut dx[i / taps * px..][..px]);
                    }
                },
            );
        }
    });
}

/// Adds the gradient of what one kernel tap read for the output rows from `first` on.
#[inline(always)]
fn add_column<T: Float>(g: &Geometry, column: &[T], t: usize, first: usize, y: [usize; 3], plane: &mut [T]) {
    let [_, k1, k2] = g.k;
    let tap = [t / (k1 * k2), t / k2 % k1, t % k2];
    let mut origin = g.origin(first);
    for d in 0..3 {
        origin[d] += (tap[d] * g.dilation[d]) as isize;
    }
    let s = g.stride[2];
    let from = ((-origin[2]).max(0) as usize).div_ceil(s).min(y[2]);
    let to = (g.x[2] as isize - origin[2]).max(0) as usize;
    let to = to.div_ceil(s).clamp(from, y[2]);
    for (i, column) in column.chunks_exact(y[2]).enumerate() {
        let a = origin[0] + (i / y[1] * g.stride[0]) as isize;
        let b = origin[1] + (i % y[1] * g.stride[1]) as isize;
        if a < 0 || b < 0 || a >= g.x[0] as isize || b >= g.x[1] as isize || from == to {
            continue;
        }
        let row = &mut plane[(a as usize * g.x[1] + b as usize) * g.x[2]..][..g.x[2]];
        let row = &mut row[(origin[2] + (from * s) as isize) as usize..];
        if s == 1 {
            row.iter_mut().zip(&column[from..to]).for_each(|(x, d)| *x += *d);
        } else {
            row.iter_mut().step_by(s).zip(&column[from..to]).for_each(|(x, d)| *x += *d);
        }
    }
}
