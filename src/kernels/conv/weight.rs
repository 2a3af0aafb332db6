//! The weight gradient of dense and grouped convolutions, channels last.
//!
//! `dW[t][c][o] = Σ_positions X[position + t][c]·dY[position][o]`: register tiles of a few input channels by a few
//! vectors of output channels, summed over all positions for which the tap lies inside the input. With few input
//! channels (first layers) the taps of a kernel row are taken as channels of a zero-padded copy instead.
//!
//! The positions are divided into slabs with a sum each, by the sizes alone; the sums are added in order.
#![allow(unsafe_code, clippy::needless_range_loop)]

mod blocks;
mod order;
mod pairs;
mod plan;

use std::ops::Range;

use rayon::prelude::*;

use crate::kernels::ahead::Ahead;
use crate::kernels::conv::grids::Lines;
use crate::kernels::conv::{Geometry, in_slots, pointwise, slots, split, strides, volume};
use crate::kernels::gemm::{self, Product};
use crate::kernels::half::Elements;
use crate::kernels::par::{self, Shared};
use crate::kernels::simd::{Kernel, Level, Simd, Vectors};
use crate::kernels::tile::{Form, Pieces, Positions, TermKernel, Terms, along_columns, put};
use crate::tile_sizes;

use plan::{Division, LARGE, Plan};

pub(super) use order::{Outputs, in_order};

/// X or dY: some channels of each position, in strips of neighbours.
#[derive(Clone, Copy)]
struct Side<'a, E> {
    data: &'a [E],
    /// Elements from a position to the next.
    step: usize,
    /// Each strip has its positions next to one another, so many elements after those of the strip before; which strip is the first.
    packed: Option<(usize, usize)>,
}

impl<'a, E> Side<'a, E> {
    /// As it lies.
    fn plain(data: &'a [E], step: usize) -> Self {
        Side { data, step, packed: None }
    }

    /// Strip `i`, which begins at `channel`, of the position `at`.
    #[inline(always)]
    fn at(&self, i: usize, channel: usize, at: usize) -> *const E {
        let strip = match self.packed {
            Some((size, first)) => (i - first) * size,
            None => channel,
        };
        self.data.as_ptr().wrapping_add(strip + at * self.step)
    }
}

/// Elements of a strip that are widened at a time.
const STRIP: usize = 1024;

/// Copies `positions` of `c` channels so that strips of at most `width` channels lie each by itself, `width`
/// elements a position.
fn pack<'a, T: Vectors>(
    x: Elements<T>,
    positions: usize,
    c: usize,
    strips: Pieces,
    width: usize,
    out: &'a mut [T],
) -> Side<'a, T> {
    let size = positions * width;
    out.par_chunks_exact_mut(size).enumerate().for_each(|(i, out)| {
        let (start, len) = (strips.start(i), strips.len(i));
        match x {
            Elements::Whole(x) => {
                for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(c)) {
                    out[..len].copy_from_slice(&x[start..start + len]);
                    out[len..].fill(T::zero());
                }
            }
            Elements::Half(half, x) => {
                let (mut near, block) = ([0; STRIP], STRIP / width);
                for (out, x) in out.chunks_mut(block * width).zip(x.chunks(block * c)) {
                    let near = &mut near[..out.len()];
                    for (near, x) in near.chunks_exact_mut(width).zip(x.chunks_exact(c)) {
                        near[..len].copy_from_slice(&x[start..start + len]);
                    }
                    half.widen_near(near, out);
                }
            }
        }
    });
    Side { data: out, step: width, packed: Some((size, 0)) }
}

/// What a task adds up.
struct Task<'a, T> {
    plan: &'a Plan,
    /// (images, rows along the axis) of each chunk, in order.
    chunks: Range<usize>,
    division: &'a Division,
    taps: Range<usize>,
    panels: Range<usize>,
    /// To what the sum holds.
    add: bool,
    /// (panels, taps, rows, panel); this task's elements of it are written.
    sum: *mut T,
    /// What is fetched meanwhile, where there is one chunk of one tap.
    ahead: Ahead,
}

/// Both sides of a chunk, and the positions that are first in them.
struct Chunk<'a, E> {
    image: usize,
    images: usize,
    first_row: usize,
    x: Side<'a, E>,
    dy: Side<'a, E>,
    origins: [usize; 2],
}

/// A task of one chunk, whose operands are read as they lie.
struct OneChunk<'a, E, T> {
    task: Task<'a, T>,
    x: Side<'a, E>,
    dy: Side<'a, E>,
}

impl<E: Copy, T: Vectors> TermKernel<E, T> for OneChunk<'_, E, T> {
    #[inline(always)]
    unsafe fn run<D: Terms<Term = E, S: Simd<Elem = T>>>(self) {
        let chunk = Chunk { image: 0, images: 1, first_row: 0, x: self.x, dy: self.dy, origins: [0; 2] };
        // SAFETY: the caller's promise.
        unsafe { self.task.add_up::<D>(&chunk, false) }
    }
}

/// A task whose operands are read as they are, X widened where it is of half precision.
struct Direct<'a, T> {
    task: Task<'a, T>,
    x: Side<'a, T>,
    /// X, and room for what a chunk reads of it, widened.
    widens: Option<(Elements<'a, T>, &'a mut [T])>,
    dy: Side<'a, T>,
}

impl<T: Vectors> Kernel<T> for Direct<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(mut self) {
        let (p, d) = (self.task.plan, self.task.division);
        for (nth, chunk) in self.task.chunks.clone().enumerate() {
            let [image, images, first_row] = p.chunk(d, chunk);
            let mut x = self.x;
            let mut origin = 0;
            if let Some((all, near)) = &mut self.widens {
                let reach = p.reach(image, images, first_row, d.rows);
                let near = &mut near[..reach.len() * p.c];
                all.copy(reach.start * p.c, near);
                (x.data, origin) = (&*near, reach.start);
            }
            let chunk = Chunk { image, images, first_row, x, dy: self.dy, origins: [origin, 0] };
            // SAFETY: the caller's promise.
            unsafe { self.task.add_up::<S>(&chunk, nth > 0) }
        }
    }
}

/// Taps whose positions are found before they are added up.
const AT_ONCE: usize = 32;

/// A tap's positions in a chunk, or in a plane of it: where they begin in X and dY.
#[derive(Clone, Copy, Default)]
struct Part {
    tap: usize,
    x: usize,
    y: usize,
    blocks: usize,
    rows: usize,
    steps: usize,
    add: bool,
}

impl<T: Vectors> Task<'_, T> {
    /// Adds a chunk's positions to the sum, or, unless `more`, writes their sum.
    ///
    /// # Safety
    /// The sides must have the chunk's positions, and the processor `D`'s instructions.
    #[inline(always)]
    unsafe fn add_up<D: Terms<S: Simd<Elem = T>>>(&self, chunk: &Chunk<D::Term>, more: bool) {
        let p = self.plan;
        // One block an image, unless there are three dimensions: then one a plane of one image.
        let planes = if p.axis == 0 { chunk.images * self.division.rows } else { 1 };
        for plane in 0..planes {
            for first in self.taps.clone().step_by(AT_ONCE) {
                let (mut parts, mut count) = ([Part::default(); AT_ONCE], 0);
                for tap in first..self.taps.end.min(first + AT_ONCE) {
                    if let Some(part) = self.part(chunk, tap, plane, more) {
                        parts[count] = part;
                        count += 1;
                    }
                }
                // SAFETY: the caller's promise.
                unsafe { self.add_parts::<D>(chunk, &parts[..count]) }
            }
        }
    }

    /// The positions of a plane for which a tap lies inside. Without any, a sum that is not there yet is of nothing.
    #[inline(always)]
    fn part<E>(&self, chunk: &Chunk<E>, t: usize, plane: usize, more: bool) -> Option<Part> {
        let (p, d) = (self.plan, self.division);
        let (xs, ys) = (strides(p.x, 1), strides(p.y, 1));
        let &Chunk { image, images, first_row, origins, .. } = chunk;
        let tap = split(t, p.k);
        let (mut lo, mut hi) = ([0usize; 3], p.y);
        lo[p.axis] = first_row;
        hi[p.axis] = (first_row + d.rows).min(p.y[p.axis]);
        let mut x_at = [0usize; 3];
        for i in 0..3 {
            let o = tap[i] * p.dilation[i];
            lo[i] = lo[i].max(p.pad[i].saturating_sub(o).div_ceil(p.stride[i]));
            hi[i] = hi[i].min((p.x[i] + p.pad[i]).saturating_sub(o).div_ceil(p.stride[i])).max(lo[i]);
            x_at[i] = (lo[i] * p.stride[i] + o).saturating_sub(p.pad[i]);
        }
        let count = [hi[0] - lo[0], hi[1] - lo[1], hi[2] - lo[2]];
        let empty = volume(count) == 0;
        if empty {
            let none = Part { tap: t, ..Part::default() };
            return (plane == 0 && !more && !self.add).then_some(none);
        }
        let (im, depth) = match p.axis {
            0 if plane >= images * count[0] => return None,
            0 => (image + plane / count[0], plane % count[0]),
            _ => (image, 0),
        };
        let x = im * volume(p.x) + dot(x_at, xs) + depth * p.stride[0] * xs[0];
        let y = im * volume(p.y) + dot(lo, ys) + depth * ys[0];
        Some(Part {
            tap: t,
            x: x - origins[0],
            y: y - origins[1],
            blocks: if p.axis == 0 { 1 } else { images },
            rows: count[1],
            steps: count[2],
            add: self.add || more || plane > 0,
        })
    }

    /// All parts of a tile before the next tile: what they read of X and dY, most of which they share, stays near.
    ///
    /// # Safety
    /// As of [`add_up`](Self::add_up).
    #[inline(always)]
    unsafe fn add_parts<D: Terms<S: Simd<Elem = T>>>(&self, chunk: &Chunk<D::Term>, parts: &[Part]) {
        let p = self.plan;
        let (lanes, level) = (D::S::LANES, Level::of::<D::S>());
        let panel = level.panel(p.og);
        let per_group = p.og.div_ceil(panel);
        let (xs, ys) = (strides(p.x, 1), strides(p.y, 1));
        let (x, dy) = (chunk.x, chunk.dy);
        let pieces = Pieces::of(p.m, level.rows(panel));
        let rows: usize = parts.iter().map(|part| part.rows).sum();
        let ahead = self.ahead.in_steps(self.panels.len() * pieces.count * rows);
        for q in self.panels.clone() {
            let (group, col) = (q / per_group, q % per_group * panel);
            let columns = panel.min(p.og - col);
            let n = columns.div_ceil(lanes);
            // Packed rows are whole.
            let tail = if dy.packed.is_some() { lanes } else { columns - (n - 1) * lanes };
            for i in 0..pieces.count {
                let (row, m) = (pieces.start(i), pieces.len(i));
                let mut ahead = ahead.after(((q - self.panels.start) * pieces.count + i) * rows);
                for part in parts {
                    let positions = Positions {
                        blocks: part.blocks,
                        rows: part.rows,
                        steps: part.steps,
                        a_block: volume(p.x) * x.step,
                        a_row: xs[1] * p.stride[1] * x.step,
                        a_step: p.stride[2] * x.step,
                        b_block: volume(p.y) * dy.step,
                        b_row: ys[1] * dy.step,
                        b_step: dy.step,
                        ahead,
                    };
                    ahead = ahead.after(part.rows);
                    let a = x.at(i, group * p.m + row, part.x);
                    let b = dy.at(q, group * p.og + col, part.y);
                    let c = self.sum.wrapping_add(((q * p.taps() + part.tap) * p.m + row) * panel);
                    // SAFETY: positions whose operands lie inside; the sum's elements are this task's.
                    unsafe { tile_sizes!(m, n, D, tile_run(&positions, a, b, c, panel, tail, part.add)) }
                }
            }
        }
    }
}

/// # Safety
/// `a` and `b` must be valid at all positions, `c` for `M` rows of `N` vectors, `c_row` apart.
#[inline(always)]
unsafe fn tile_run<D: Terms, const M: usize, const N: usize>(
    p: &Positions,
    a: *const D::Term,
    b: *const D::Term,
    c: *mut <D::S as Simd>::Elem,
    c_row: usize,
    tail: usize,
    add: bool,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let acc = along_columns::<D, M, N, 1>(p, a, b, tail);
        put::<D::S, M, N>(&acc, c, [c_row as isize, D::S::LANES as isize], add);
    }
}

fn dot(at: [usize; 3], steps: [usize; 3]) -> usize {
    at[0] * steps[0] + at[1] * steps[1] + at[2] * steps[2]
}

/// dW = dYᵀ·X as one product, where its positions need not be divided to keep threads busy.
fn product<T: Vectors>(g: &Geometry) -> Option<Product<T>> {
    let positions = g.n * volume(g.x);
    (pointwise::applies(g) && g.c * g.oc >= LARGE).then(|| Product::dense(true, false, g.oc, g.c, positions))
}

/// Elements of scratch that [`weight_grad`] needs; `half`: is X of half precision?
pub fn weight_grad_scratch<T: Vectors>(g: &Geometry, half: bool) -> usize {
    if let Some(product) = product::<T>(g) {
        return match g.pairs {
            true => gemm::room_pairs(&product, None),
            false => gemm::room_halves(&product, [false, half]),
        };
    }
    if blocks::applies::<T>(g) {
        return blocks::scratch(g);
    }
    let p = Plan::new(g);
    let panel = p.panel::<T>();
    let packed = if p.packs(panel) { p.strips::<T>().iter().map(|s| s.1).sum() } else { 0 };
    let (d, widens) = (p.division(panel), half && packed == 0 && !p.merged);
    let each = match () {
        _ if p.pairs => p.near_room::<T>(&d, panel),
        _ if widens => p.reach_room(&d),
        _ => 0,
    };
    p.copy() + packed + d.slabs * p.size(panel) + slots(p.tasks(&d, panel), each)
}

/// dW (M, C/groups, k…) from dY (N, spatial…, M) and X (N, spatial…, C).
pub fn weight_grad<T: Vectors>(
    g: &Geometry,
    dy: Elements<T>,
    x: Elements<T>,
    dw: &mut [T],
    scratch: &mut [T],
) {
    g.check_sizes(x.len(), dy.len());
    if let Some(product) = product(g) {
        return match g.pairs {
            true => gemm::gemm_pairs(&product, dy, x, gemm::Plus::NOTHING, dw, scratch),
            false => gemm::gemm_halves(&product, dy, x, gemm::Plus::NOTHING, dw, scratch),
        };
    }
    if blocks::applies::<T>(g) {
        return blocks::weight_grad(g, dy, x, dw, scratch);
    }
    let p = Plan::new(g);
    match p.pairs {
        true => pairs::by_pairs(g, &p, dy, x, dw, scratch),
        false => directly(g, &p, dy.whole(), x, dw, scratch),
    }
}

fn directly<T: Vectors>(g: &Geometry, p: &Plan, dy: &[T], x: Elements<T>, dw: &mut [T], scratch: &mut [T]) {
    let panel = p.panel::<T>();
    let d = p.division(panel);
    let (copy, sums) = scratch.split_at_mut(p.copy());
    let x = if p.merged {
        pad(g, p, x, copy);
        Elements::Whole(&*copy)
    } else {
        x
    };
    let mut widens = None;
    let (x, dy, sums) = if p.packs(panel) {
        let [(rows, a), (columns, b)] = p.strips::<T>();
        let (pa, rest) = sums.split_at_mut(a);
        let (pb, sums) = rest.split_at_mut(b);
        let x = pack(x, p.n * volume(p.x), p.c, rows, T::level().rows(panel), pa);
        (x, pack(Elements::Whole(dy), p.n * volume(p.y), p.og, columns, panel, pb), sums)
    } else {
        match x {
            Elements::Whole(x) => (Side::plain(x, p.c), Side::plain(dy, g.oc), sums),
            half => {
                widens = Some(half);
                (Side::plain(&[], p.c), Side::plain(dy, g.oc), sums)
            }
        }
    };
    let room = if widens.is_some() { p.reach_room(&d) } else { 0 };
    in_slabs(g, p, &d, room, dw, sums, |task, near| {
        let direct = Direct { task, x, widens: widens.map(|x| (x, near)), dy };
        // SAFETY: the operands have the geometry's extents; tasks write different elements of the sums.
        unsafe { T::dispatch(direct) }
    });
}

/// Has each task add up its part of dW, with `room` elements of its own.
fn in_slabs<T: Vectors>(
    g: &Geometry,
    p: &Plan,
    d: &Division,
    room: usize,
    dw: &mut [T],
    scratch: &mut [T],
    run: impl Fn(Task<T>, &mut [T]) + Sync,
) {
    let panel = p.panel::<T>();
    let size = p.size(panel);
    let (sums, near) = scratch.split_at_mut(d.slabs * size);
    let chunks = p.n.div_ceil(d.images) * p.y[p.axis].div_ceil(d.rows);
    let panels = p.panels(panel);
    let per_slab = panels.div_ceil(d.panels) * d.pieces;
    let shared = Shared::new(sums);
    in_slots(p.tasks(d, panel), room, near, |task, near| {
        let (slab, rest) = (task / per_slab, task % per_slab);
        let (piece, q) = (rest % d.pieces, rest / d.pieces);
        let share = |i: usize, of: usize, total: usize| total * i / of..total * (i + 1) / of;
        let task = Task {
            plan: p,
            chunks: share(slab, d.slabs, chunks),
            division: d,
            taps: share(piece, d.pieces, p.taps()),
            panels: q * d.panels..panels.min((q + 1) * d.panels),
            add: false,
            sum: shared.ptr().wrapping_add(slab * size),
            ahead: Ahead::NOTHING,
        };
        run(task, near);
    });
    finish(g, sums, dw);
}

/// Elements of one sum, as [`add_positions`] adds to it.
pub(super) fn sum_size<T: Vectors>(g: &Geometry) -> usize {
    let p = Plan::new(g);
    p.size(p.panel::<T>())
}

/// The contribution of one image's positions, or of pairs of them, to a sum, written or, with `add`, added to it; `ahead` is fetched
/// meanwhile.
pub(super) fn add_positions<E: Form<T>, T: Vectors>(
    g: &Geometry,
    x: &[E],
    dy: &[E],
    add: bool,
    sum: &mut [T],
    ahead: Ahead,
) {
    g.check_sizes(x.len(), dy.len());
    let plan = Plan::new(g);
    let panel = plan.panel::<T>();
    assert!(g.n == 1 && !plan.pairs && !plan.merged && sum.len() == plan.size(panel), "positions");
    let panels = plan.panels(panel);
    let division = Division { slabs: 1, images: 1, rows: plan.y[plan.axis], pieces: 1, panels };
    let task = Task {
        plan: &plan,
        chunks: 0..1,
        division: &division,
        taps: 0..plan.taps(),
        panels: 0..panels,
        add,
        sum: sum.as_mut_ptr(),
        ahead,
    };
    let chunk = OneChunk { task, x: Side::plain(x, g.c), dy: Side::plain(dy, g.oc) };
    // SAFETY: the operands have the geometry's extents, and the sum is the caller's.
    unsafe { E::dispatch_terms(chunk) }
}

/// Adds the slabs' sums in order, for dW (M, C/groups, k…).
pub(super) fn finish<T: Vectors>(g: &Geometry, sums: &mut [T], dw: &mut [T]) {
    let size = sum_size::<T>(g);
    add(sums, size);
    in_order(g, T::level().panel(g.og()), &sums[..size], dw);
}

/// X with zeros around it.
fn pad<T: Vectors>(g: &Geometry, p: &Plan, x: Elements<T>, out: &mut [T]) {
    let line = p.x[2] * g.c;
    out.par_chunks_mut(volume(p.x) * g.c).enumerate().for_each(|(image, out)| {
        let lines = Lines::new(g.x, g.pad, image..image + 1, [0; 3], p.x);
        for (i, out) in out.chunks_mut(line).enumerate() {
            let [position, at, n] = lines.line(i).map(|positions| positions * g.c);
            out[..at].fill(T::zero());
            x.copy(position, &mut out[at..at + n]);
            out[at + n..].fill(T::zero());
        }
    });
}

/// Adds the slabs' sums to the first.
fn add<T: Vectors>(sums: &mut [T], size: usize) {
    let (first, rest) = sums.split_at_mut(size);
    par::pieces(first, |start, piece| {
        for more in rest.chunks_exact(size) {
            let more = &more[start..][..piece.len()];
            piece.iter_mut().zip(more).for_each(|(a, b)| *a += *b);
        }
    });
}
