//! The weight gradient in pairs of bfloat16: its operands are put near in pairs of images, a chunk at a time, so that every
//! tap finds its pairs in one copy.
#![allow(unsafe_code, clippy::needless_range_loop)]

use std::ops::Range;

use rayon::prelude::*;

use super::plan::{Division, Plan};
use super::{Chunk, Side, Task, in_slabs};
use crate::kernels::ahead::Steps;
use crate::kernels::conv::grids::{self, Lines};
use crate::kernels::conv::paired::{PadImages, Strips};
use crate::kernels::conv::{Geometry, volume};
use crate::kernels::half::Elements;
use crate::kernels::pairs::{PairKernel, Pairs, both};
use crate::kernels::simd::{Level, Simd, Vectors};
use crate::kernels::tile::{Form, Pieces, Positions, Terms, WINDOW, along_columns, put};
use crate::tile_sizes;

impl Plan {
    /// The positions of dY of some rows along the axis, or all of several images.
    fn put(&self, image: usize, images: usize, first: usize, rows: usize) -> Range<usize> {
        grids::reads(self.y, self.axis, [0, 1, 0], image..image + images, first..first + rows)
    }

    /// Are the taps of a kernel's row summed up together? Each element of X is then loaded once for all of them, where with one vector
    /// of outputs loads take longer than multiplications. dY has zeros beside each of its rows for it.
    fn slides<T: Vectors>(&self, d: &Division) -> bool {
        let level = T::level();
        self.pairs
            && self.groups == 1
            && !self.merged
            && self.axis == 1
            && [self.k[2], self.dilation[2], self.stride[2]] == [WINDOW, 1, 1]
            && self.pad[2] < WINDOW
            && self.y[2] <= self.x[2] + self.pad[2]
            && self.og <= level.lanes
            && d.pieces == 1
            && level.has_rows(WINDOW * level.lanes, level.rows(level.lanes))
    }

    /// Positions of a row of dY with its zeros, where taps slide.
    fn wide(&self) -> usize {
        self.x[2] + WINDOW - 1
    }

    /// Pairs of dY and X that a chunk has near.
    pub(super) fn near_room<T: Vectors>(&self, d: &Division, panel: usize) -> usize {
        let row = if self.slides::<T>(d) { self.wide() } else { volume(self.y) / self.y[self.axis] };
        let in_y = d.panels * panel * d.images * d.rows * row;
        let height = T::level().rows(panel);
        let in_x = self.reach_room(d) / self.c * self.m.div_ceil(height) * height;
        in_y + if self.merged { 0 } else { in_x }
    }
}

/// A task whose operands are put near in pairs of images, a chunk at a time, unless X is so already (its taps merged).
struct Paired<'a, T> {
    task: Task<'a, T>,
    x: Result<Side<'a, u32>, Strips<'a, T>>,
    dy: Strips<'a, T>,
    near: &'a mut [u32],
}

impl<T: Vectors> PairKernel<T> for Paired<'_, T> {
    #[inline(always)]
    unsafe fn run<D: Pairs<S: Simd<Elem = T>>>(self) {
        let Paired { task, x, dy, near } = self;
        let (p, d) = (task.plan, task.division);
        let slides = p.slides::<T>(d);
        for (nth, chunk) in task.chunks.clone().enumerate() {
            let [image, images, first_row] = p.chunk(d, chunk);
            let put = p.put(image, images, first_row, d.rows);
            let lines = put.len() / p.y[2];
            let in_y = if slides { lines * p.wide() } else { put.len() } * dy.width;
            let (to, rest) = near.split_at_mut(task.panels.len() * in_y);
            for line in 0..if slides { lines } else { 0 } {
                let start = put.start + line * p.y[2];
                let to = &mut to[line * p.wide() * dy.width..][..p.wide() * dy.width];
                let (before, to) = to.split_at_mut((WINDOW - 1 - p.pad[2]) * dy.width);
                let (to, after) = to.split_at_mut(p.y[2] * dy.width);
                before.fill(0);
                // SAFETY: there is room for the line; the caller's promise.
                unsafe { dy.write::<D>(start..start + p.y[2], 0..1, to.as_mut_ptr()) }
                after.fill(0);
            }
            if !slides {
                // SAFETY: there is room for the chunk's positions; the caller's promise.
                unsafe { dy.write::<D>(put.clone(), task.panels.clone(), to.as_mut_ptr()) }
            }
            let dy = Side { data: &*to, step: dy.width, packed: Some((in_y, task.panels.start)) };
            let (x, origin) = match &x {
                Ok(x) => (*x, 0),
                Err(x) => {
                    let reach = p.reach(image, images, first_row, d.rows);
                    let in_x = reach.len() * x.width;
                    let to = &mut rest[..x.strips.count * in_x];
                    // SAFETY: as above.
                    unsafe { x.write::<D>(reach.clone(), 0..x.strips.count, to.as_mut_ptr()) }
                    (Side { data: &*to, step: x.width, packed: Some((in_x, 0)) }, reach.start)
                }
            };
            let chunk = Chunk { image, images, first_row, x, dy, origins: [origin, put.start] };
            // SAFETY: the caller's promise.
            unsafe {
                match slides {
                    true => task.slide::<D>(&chunk, nth > 0),
                    false => task.add_up::<D>(&chunk, nth > 0),
                }
            }
        }
    }
}

impl<T: Vectors> Task<'_, T> {
    /// As [`add_up`](Self::add_up), of all taps of a kernel's row together: see [`Plan::slides`].
    ///
    /// # Safety
    /// As of `add_up`; the rows of dY have their zeros.
    #[inline(always)]
    unsafe fn slide<D: Terms<S: Simd<Elem = T>>>(&self, chunk: &Chunk<D::Term>, more: bool) {
        let (p, d) = (self.plan, self.division);
        let panel = D::S::LANES;
        let pieces = Pieces::of(p.m, Level::of::<D::S>().rows(panel));
        let &Chunk { image, images, first_row, x, dy, origins } = chunk;
        for line in 0..p.k[1] {
            let o = line * p.dilation[1];
            let low = first_row.max(p.pad[1].saturating_sub(o).div_ceil(p.stride[1]));
            let high = (first_row + d.rows).min(p.y[1]);
            let high = high.min((p.x[1] + p.pad[1]).saturating_sub(o).div_ceil(p.stride[1])).max(low);
            if high == low && (more || self.add) {
                continue;
            }
            let positions = Positions {
                blocks: images,
                rows: high - low,
                steps: p.x[2],
                a_block: volume(p.x) * x.step,
                a_row: p.x[2] * p.stride[1] * x.step,
                a_step: x.step,
                b_block: p.y[1] * p.wide() * dy.step,
                b_row: p.wide() * dy.step,
                b_step: dy.step,
                ahead: Steps::NOTHING,
            };
            let row = (low * p.stride[1] + o).saturating_sub(p.pad[1]);
            let x0 = (image * volume(p.x) + row * p.x[2]).saturating_sub(origins[0]);
            let y0 = (image * p.y[1] + low).saturating_sub(origins[1] / p.y[2]) * p.wide();
            for i in 0..pieces.count {
                let (row, m) = (pieces.start(i), pieces.len(i));
                let (a, b) = (x.at(i, row, x0), dy.at(0, 0, y0));
                // The first vector of dY belongs to the last tap of the row.
                let last = self.sum.wrapping_add(((line + 1) * WINDOW - 1) * p.m * panel + row * panel);
                let add = self.add || more;
                // SAFETY: the rows' operands lie inside; the sum's elements are this task's.
                unsafe { tile_sizes!(rows m, 3, D, slide_run(&positions, a, b, last, p.m * panel, add)) }
            }
        }
    }
}

/// # Safety
/// `a` and `b` must be valid at all positions; `last` for `M` rows of a vector, as must be those of the `N - 1` taps before it,
/// `tap` elements each.
#[inline(always)]
unsafe fn slide_run<D: Terms, const M: usize, const N: usize>(
    p: &Positions,
    a: *const D::Term,
    b: *const D::Term,
    last: *mut <D::S as Simd>::Elem,
    tap: usize,
    add: bool,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let acc = along_columns::<D, M, N, 1>(p, a, b, D::S::LANES);
        put::<D::S, M, N>(&acc, last, [D::S::LANES as isize, -(tap as isize)], add);
    }
}

/// dW, as of what is done directly.
pub(super) fn by_pairs<T: Vectors>(
    g: &Geometry,
    p: &Plan,
    dy: Elements<T>,
    x: Elements<T>,
    dw: &mut [T],
    scratch: &mut [T],
) {
    let panel = p.panel::<T>();
    let d = p.division(panel);
    let height = T::level().rows(panel);
    let (copy, sums) = scratch.split_at_mut(p.copy());
    let copy = &mut <u32 as Form<T>>::room(copy)[..p.copy()];
    let x = match p.merged {
        true => {
            pad(g, p, x, copy);
            Ok(Side::plain(&*copy, p.c))
        }
        false => {
            let strips = Pieces::of(p.m, height);
            Err(Strips { x, n: g.n, positions: volume(g.x), channels: g.c, strips, width: height })
        }
    };
    let strips = Pieces::by(p.og, panel);
    let dy = Strips { x: dy, n: g.n, positions: volume(g.y), channels: g.oc, strips, width: panel };
    in_slabs(g, p, &d, p.near_room::<T>(&d, panel), dw, sums, |task, near| {
        // SAFETY: as of what is done directly.
        unsafe { T::dispatch_pairs(Paired { task, x, dy, near: Form::<T>::room(near) }) }
    });
}

/// X with zeros around it, in pairs of images.
fn pad<T: Vectors>(g: &Geometry, p: &Plan, x: Elements<T>, out: &mut [u32]) {
    let (line, image) = (p.x[2] * g.c, volume(g.x) * g.c);
    out.par_chunks_mut(volume(p.x) * g.c).enumerate().for_each(|(pair, out)| {
        let lines = Lines::new(g.x, g.pad, 2 * pair..2 * pair + 1, [0; 3], p.x);
        for (i, out) in out.chunks_mut(line).enumerate() {
            let [first, at, len] = lines.line(i).map(|positions| positions * g.c);
            let starts = match len {
                0 => [None; 2],
                _ => both(pair, g.n, first - 2 * pair * image, image),
            };
            // SAFETY: the kernel has no promise of its own.
            unsafe { T::dispatch_pairs(PadImages { x, starts, at, len, out }) }
        }
    });
}
