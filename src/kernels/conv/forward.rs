//! `Y = W * X + b`.

#![allow(unsafe_code)]

use super::{Geometry, SLACK, by_tap, depthwise, gather_window, in_slots, slots, volume};
use crate::kernels::gemm::{Product, Shared, many};
use crate::kernels::isa::vectorize;
use crate::kernels::par;
use crate::tensor::Float;

/// How a dense convolution of stride 1 is cut: shared with the input gradient, which is one too.
pub(super) struct Shifted {
    rows: usize,
    blocks: usize,
    /// Elements a channel of the window, and of the product; both with slack.
    window: usize,
    grid: usize,
}

impl Shifted {
    pub(super) fn of(g: &Geometry) -> Self {
        let w = g.window(1);
        let row: usize = w[g.axis + 1..].iter().product();
        let rows = g.block_rows((g.cg() + g.og()) * row, row);
        let (_, grid) = g.grid(rows);
        let grid = grid.next_multiple_of(SLACK);
        let window = volume(g.window(rows)) + SLACK;
        Shifted { rows, blocks: g.y[g.axis].div_ceil(rows), window, grid }
    }

    pub(super) fn tasks(&self, g: &Geometry) -> usize {
        g.n * g.groups * self.blocks
    }

    pub(super) fn slot(&self, g: &Geometry) -> usize {
        g.cg() * self.window + g.og() * self.grid
    }

    /// Scratch in elements: the weights by tap, and the slots.
    pub(super) fn scratch(&self, g: &Geometry) -> usize {
        g.oc * g.cg() * g.taps() + slots(self.tasks(g), self.slot(g))
    }

    /// `weights(group, tap)` is the matrix that takes that tap's input channels to output channels:
    /// dense of (OG, CG), or of (CG, OG) when `trans`.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn run<'w, T: Float>(
        &self,
        g: &Geometry,
        x: &[T],
        weights: impl Fn(usize, usize) -> &'w [T] + Sync,
        trans: bool,
        bias: Option<&[T]>,
        y: &mut [T],
        scratch: &mut [T],
    ) {
        let (cg, og) = (g.cg(), g.og());
        let (px, py) = (volume(g.x), volume(g.y));
        let y = Shared::new(y);
        in_slots(self.tasks(g), self.slot(g), scratch, |task, slot| {
            let (image, rest) = (task / (g.groups * self.blocks), task % (g.groups * self.blocks));
            let (group, first) = (rest / self.blocks, rest % self.blocks * self.rows);
            let rows = self.rows.min(g.y[g.axis] - first);
            let window = g.window(rows);
            let (y_dims, _) = g.grid(rows);
            let (padded, product) = slot.split_at_mut(cg * self.window);
            vectorize(
                #[inline(always)]
                || {
                    for (c, out) in padded.chunks_exact_mut(self.window).enumerate() {
                        let plane = &x[(image * g.c + group * cg + c) * px..][..px];
                        let (out, slack) = out.split_at_mut(volume(window));
                        gather_window(plane, g.x, g.origin(first), window, out);
                        slack.fill(T::zero());
                    }
                },
            );
            let n = g.grid(rows).1.next_multiple_of(SLACK);
            for t in 0..g.taps() {
                let beta = if t == 0 { T::zero() } else { T::one() };
                let p = Product { ldb: self.window, beta, ..Product::dense(trans, false, og, n, cg) };
                p.serial(weights(group, t), &padded[g.tap(t, window)..], product);
            }
            vectorize(
                #[inline(always)]
                || {
                    for (o, product) in product.chunks_exact(n).take(og).enumerate() {
                        let o = group * og + o;
                        let from = (image * g.oc + o) * py + first * g.row();
                        // SAFETY: tasks differ in image, group or rows.
                        let y = unsafe { y.part(from, rows * g.row()) };
                        let add = bias.map_or(T::zero(), |b| b[o]);
                        for (i, y) in y.chunks_exact_mut(y_dims[2]).enumerate() {
                            let at = (i / y_dims[1] * window[1] + i % y_dims[1]) * window[2];
                            for (y, p) in y.iter_mut().zip(&product[at..at + y_dims[2]]) {
                                *y = *p + add;
                            }
                        }
                    }
                },
            );
        });
    }
}

/// How patches are gathered: one column an output position.
struct Patches {
    rows: usize,
    blocks: usize,
    slot: usize,
}

impl Patches {
    fn of(g: &Geometry) -> Self {
        let depth = g.cg() * g.taps();
        let rows = g.block_rows(depth * g.row(), g.row());
        Patches { rows, blocks: g.y[g.axis].div_ceil(rows), slot: depth * rows * g.row() }
    }

    fn tasks(&self, g: &Geometry) -> usize {
        g.n * g.groups * self.blocks
    }
}

/// Are products a tap worth it: long enough sums in each.
fn shifted(g: &Geometry) -> bool {
    g.unit_stride() && g.cg() >= 16
}

/// Elements of scratch that [`forward`] needs.
pub fn forward_scratch(g: &Geometry) -> usize {
    if g.is_empty() {
        0
    } else if g.depthwise() {
        depthwise::forward_scratch(g)
    } else if g.pointwise() {
        0
    } else if shifted(g) {
        Shifted::of(g).scratch(g)
    } else {
        let p = Patches::of(g);
        slots(p.tasks(g), p.slot)
    }
}

/// `x` (N, C, X…), `w` (OC, C/groups, K…), `bias` (OC), `y` (N, OC, Y…).
pub fn forward<T: Float>(g: &Geometry, x: &[T], w: &[T], bias: Option<&[T]>, y: &mut [T], scratch: &mut [T]) {
    let py = volume(g.y);
    if g.is_empty() {
        // Nothing to sum: the bias alone.
        y.chunks_exact_mut(py.max(1))
            .enumerate()
            .for_each(|(i, y)| y.fill(bias.map_or(T::zero(), |b| b[i % g.oc])));
    } else if g.depthwise() {
        depthwise::forward(g, x, w, bias, y, scratch);
    } else if g.pointwise() {
        let (cg, og) = (g.cg(), g.og());
        let mut p = Product::dense(false, false, og, py, cg);
        if let Some(b) = bias {
            p.beta = T::one();
            par::rows(y, py, par::GRAIN, |first, y| {
                y.chunks_exact_mut(py).enumerate().for_each(|(i, y)| y.fill(b[(first + i) % g.oc]));
            });
        }
        let at = |i: usize| [i % g.groups * og * cg, i * cg * py];
        many(&p, g.n * g.groups, at, w, x, y, og * py);
    } else if shifted(g) {
        let s = Shifted::of(g);
        let (cg, og, taps) = (g.cg(), g.og(), g.taps());
        let (by, slots) = scratch.split_at_mut(g.oc * cg * taps);
        by_tap(g, w, by);
        let by = &*by;
        s.run(g, x, |group, t| &by[(group * taps + t) * og * cg..][..og * cg], false, bias, y, slots);
    } else {
        patches(g, x, w, bias, y, scratch);
    }
}

fn patches<T: Float>(g: &Geometry, x: &[T], w: &[T], bias: Option<&[T]>, y: &mut [T], scratch: &mut [T]) {
    let plan = Patches::of(g);
    let (cg, og, taps, px, py) = (g.cg(), g.og(), g.taps(), volume(g.x), volume(g.y));
    let y = Shared::new(y);
    in_slots(plan.tasks(g), plan.slot, scratch, |task, columns| {
        let (image, rest) = (task / (g.groups * plan.blocks), task % (g.groups * plan.blocks));
        let (group, first) = (rest / plan.blocks, rest % plan.blocks * plan.rows);
        let rows = plan.rows.min(g.y[g.axis] - first);
        let n = rows * g.row();
        let mut y_dims = g.y;
        y_dims[g.axis] = rows;
        vectorize(
            #[inline(always)]
            || {
                for (i, out) in columns.chunks_exact_mut(n).take(cg * taps).enumerate() {
                    let plane = &x[(image * g.c + group * cg + i / taps) * px..][..px];
                    tap_column(g, plane, i % taps, first, y_dims, out);
                }
            },
        );
        let w = &w[group * og * cg * taps..][..og * cg * taps];
        let from = (image * g.oc + group * og) * py + first * g.row();
        let p = Product { ldc: py, ..Product::dense(false, false, og, n, cg * taps) };
        // SAFETY: `w` and `columns` are dense matrices of og·depth and depth·n elements; the rows of this product
        // are `n` elements at `py`, within `y`, and tasks differ in image, group or rows.
        unsafe { p.raw(w.as_ptr(), columns.as_ptr(), y.at(from, (og - 1) * py + n)) };
        if let Some(b) = bias {
            for o in 0..og {
                // SAFETY: as above.
                let y = unsafe { y.part(from + o * py, n) };
                y.iter_mut().for_each(|y| *y += b[group * og + o]);
            }
        }
    });
}

/// What one kernel tap reads for the output rows of extents `y`, from row `first` on.
#[inline(always)]
fn tap_column<T: Float>(g: &Geometry, plane: &[T], t: usize, first: usize, y: [usize; 3], out: &mut [T]) {
    let [_, k1, k2] = g.k;
    let tap = [t / (k1 * k2), t / k2 % k1, t % k2];
    let mut origin = g.origin(first);
    for d in 0..3 {
        origin[d] += (tap[d] * g.dilation[d]) as isize;
    }
    if g.unit_stride() {
        return gather_window(plane, g.x, origin, y, out);
    }
    let s = g.stride[2];
    // Columns whose input lies inside the row.
    let from = ((-origin[2]).max(0) as usize).div_ceil(s).min(y[2]);
    let to = (g.x[2] as isize - origin[2]).max(0) as usize;
    let to = to.div_ceil(s).clamp(from, y[2]);
    for (i, out) in out.chunks_exact_mut(y[2]).enumerate() {
        let a = origin[0] + (i / y[1] * g.stride[0]) as isize;
        let b = origin[1] + (i % y[1] * g.stride[1]) as isize;
        if a < 0 || b < 0 || a >= g.x[0] as isize || b >= g.x[1] as isize || from == to {
            out.fill(T::zero());
            continue;
        }
        let row = &plane[(a as usize * g.x[1] + b as usize) * g.x[2]..][..g.x[2]];
        let row = &row[(origin[2] + (from * s) as isize) as usize..];
        out[..from].fill(T::zero());
        out[to..].fill(T::zero());
        let out = &mut out[from..to];
        super::every(s, row, out);
    }
}
