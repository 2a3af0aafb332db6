//! The weight gradient of pairs by matrix registers ([`matrix`](crate::kernels::matrix)): the product of dY, turned so that an output
//! channel's positions are a row, and X with zeros around it, whose rows are positions in pairs of images. The taps of a kernel's row
//! and their channels lie next to each other in X: they are columns together.
//!
//! With a stride of one the positions of an image are one run: X's lines follow one another, and dY has zeros where they are
//! padded.
#![allow(unsafe_code, clippy::needless_range_loop)]

use std::ops::Range;

use super::add;
use super::order::taps_last;
use super::plan::{SUMS, TASKS};
use crate::kernels::conv::paired::PadImages;
use crate::kernels::conv::{Geometry, in_slots, slots, volume};
use crate::kernels::half::Elements;
use crate::kernels::matrix::{
    Ahead, BLOCK, Block, Place, Registers, Runs, SIDE, SQUARES, Sums, by_blocks, square,
};
use crate::kernels::pairs::{PairKernel, Pairs, across, both};
use crate::kernels::par::{self, Shared};
use crate::kernels::simd::{Kernel, Simd, Vectors, load_up_to, store_up_to};
use crate::kernels::tile::{Form, Pieces};

/// Pairs of X and dY that a task should have near at a time; more of them where there is one sum for all positions, which is large
/// and should be written once.
const CHUNK: usize = 1 << 17;
const LARGE_CHUNK: usize = 1 << 18;
/// Multiply-adds worth a task of their own.
const WORK: usize = 1 << 22;
/// Runs that need no memory of their own.
const RUNS: usize = 31;
/// Pairs after a row of dY that may be written, and after X's that may be read.
const BEYOND: usize = 2 * SIDE;

/// Is the gradient computed this way?
pub(super) fn applies<T: Vectors>(g: &Geometry) -> bool {
    g.pairs && g.groups == 1 && g.axis > 0 && g.dilation[2] == 1 && by_blocks::<T>()
}

struct Plan<'a> {
    g: &'a Geometry,
    /// Pairs of images.
    pairs: usize,
    /// Kernel rows, and columns of one: its taps' channels.
    lines: usize,
    columns: usize,
    /// Positions from a line of X to the next, and whether all lines of an image are one run.
    pitch: usize,
    flat: bool,
    /// Pairs of images of a chunk, or rows of one.
    images: usize,
    rows: usize,
    slabs: usize,
    /// The output channels, in pieces of whole blocks.
    pieces: Pieces,
}

/// Rows of results of some pairs of images.
#[derive(Clone, Copy)]
struct Chunk {
    image: usize,
    images: usize,
    row: usize,
    rows: usize,
}

impl Plan<'_> {
    fn new(g: &Geometry) -> Plan<'_> {
        let (x, y, k, stride) = (g.x, g.y, g.k, g.stride);
        let pitch = (x[2] + g.pad[2]).max((y[2] - 1) * stride[2] + k[2]);
        let (pairs, flat) = (g.n.div_ceil(2), stride[1..] == [1; 2]);
        let size = g.oc * g.taps() * g.c;
        let tasks = (g.multiply_adds() / WORK).clamp(1, TASKS);
        let slabs = (SUMS / size.max(1)).clamp(1, tasks).min(pairs * y[1]);
        let blocks = g.oc.div_ceil(BLOCK);
        let each = blocks.div_ceil(tasks.div_ceil(slabs).min(blocks)) * BLOCK;
        let pieces = Pieces::by(g.oc, each);
        let per_row = pitch * (stride[1] * g.c + pieces.len(0));
        let chunk = if slabs == 1 { LARGE_CHUNK } else { CHUNK };
        let whole = chunk / (per_row * y[1]).max(1);
        let most = if flat { RUNS } else { RUNS / y[1] };
        let (images, rows) = match whole.min(most) {
            0 => (1, (chunk / per_row).clamp(1, if flat { y[1] } else { y[1].min(RUNS) })),
            images => (images.min(pairs.div_ceil(slabs)), y[1]),
        };
        let rows = if slabs > pairs { rows.min(y[1].div_ceil(slabs.div_ceil(pairs))) } else { rows };
        Plan { g, pairs, lines: k[1], columns: k[2] * g.c, pitch, flat, images, rows, slabs, pieces }
    }

    fn chunks(&self) -> usize {
        self.pairs.div_ceil(self.images) * self.g.y[1].div_ceil(self.rows)
    }

    fn chunk(&self, i: usize) -> Chunk {
        let blocks = self.g.y[1].div_ceil(self.rows);
        let (image, row) = (i / blocks * self.images, i % blocks * self.rows);
        let (images, rows) = (self.images.min(self.pairs - image), self.rows.min(self.g.y[1] - row));
        Chunk { image, images, row, rows }
    }

    fn largest(&self) -> Chunk {
        Chunk { image: 0, images: self.images, row: 0, rows: self.rows }
    }

    /// Lines of X that some rows of results are computed from, those in zeros counted.
    fn x_lines(&self, rows: usize) -> usize {
        (rows - 1) * self.g.stride[1] + (self.lines - 1) * self.g.dilation[1] + 1
    }

    /// Runs of a chunk, their instructions and the steps of each.
    fn runs(&self, chunk: Chunk) -> [usize; 3] {
        let width = self.g.y[2];
        match self.flat {
            true => [chunk.images, ((chunk.rows - 1) * self.pitch + width).div_ceil(SIDE), SIDE],
            false => {
                let instructions = width.div_ceil(SIDE);
                [chunk.images * chunk.rows, instructions, width.div_ceil(instructions)]
            }
        }
    }

    /// Pairs from a row of dY to the next.
    fn dy_row(&self, chunk: Chunk) -> usize {
        let row = self.runs(chunk).iter().product::<usize>() + BEYOND;
        // (Rows that are a power of two apart would share the same few lines of the cache.)
        row.next_multiple_of(SIDE) | SIDE
    }

    fn x_pairs(&self, chunk: Chunk) -> usize {
        chunk.images * self.x_lines(chunk.rows) * self.pitch * self.g.c
    }

    /// Pairs that a task has near: what is read beyond X's positions, and its columns, counted.
    fn near(&self) -> [usize; 2] {
        let beyond = SIDE * self.g.stride[2] * self.g.c + self.columns + BEYOND;
        [self.pieces.len(0) * self.dy_row(self.largest()), self.x_pairs(self.largest()) + beyond]
    }

    /// Elements of an output's sums.
    fn row(&self) -> usize {
        self.lines * self.columns
    }

    /// Where sums are kept until all positions are added up.
    fn kept(&self) -> Kept {
        match () {
            _ if self.slabs > 1 => Kept::Apart,
            _ if self.g.taps() == 1 => Kept::InWeights,
            _ if self.chunks() == 1 => Kept::Near,
            _ => Kept::Apart,
        }
    }

    /// Elements of sums for all tasks, and of a task's own.
    fn sums(&self) -> [usize; 2] {
        match self.kept() {
            Kept::InWeights => [0, 0],
            Kept::Near => [0, BLOCK.min(self.g.oc) * self.row()],
            Kept::Apart => [self.slabs * self.g.oc * self.row(), 0],
        }
    }

    fn tasks(&self) -> usize {
        self.slabs * self.pieces.count
    }
}

/// Where sums are.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kept {
    /// Where the weights are: they are in the same order.
    InWeights,
    /// A block's rows at a time, which are put in order before the next.
    Near,
    /// In memory of their own, (slabs, M, kernel rows, columns).
    Apart,
}

/// Elements of scratch that [`weight_grad`] needs.
pub(super) fn scratch(g: &Geometry) -> usize {
    let p = Plan::new(g);
    let [sums, own] = p.sums();
    sums + slots(p.tasks(), own + p.near().iter().sum::<usize>())
}

/// dW (M, C, k…) from dY (N, spatial…, M) and X (N, spatial…, C).
pub(super) fn weight_grad<T: Vectors>(
    g: &Geometry,
    dy: Elements<T>,
    x: Elements<T>,
    dw: &mut [T],
    scratch: &mut [T],
) {
    let p = &Plan::new(g);
    let (row, chunks, kept, [all, own]) = (p.row(), p.chunks(), p.kept(), p.sums());
    let (sums, slot) = scratch.split_at_mut(all);
    let (shared, weights) = (Shared::new(sums), Shared::new(dw));
    in_slots(p.tasks(), own + p.near().iter().sum::<usize>(), slot, |task, slot| {
        let (slab, piece) = (task / p.pieces.count, task % p.pieces.count);
        let first = p.pieces.start(piece);
        let outputs = first..first + p.pieces.len(piece);
        let chunks = chunks * slab / p.slabs..chunks * (slab + 1) / p.slabs;
        let (own, near) = slot.split_at_mut(own);
        let to = weights.ptr().wrapping_add(first * row);
        let sum = match kept {
            Kept::InWeights => to,
            Kept::Near => own.as_mut_ptr(),
            Kept::Apart => shared.ptr().wrapping_add((slab * g.oc + first) * row),
        };
        let task = Task { p, x, dy, chunks, outputs, kept, sum, to, near: Form::room(near) };
        // SAFETY: the operands have the geometry's extents (the caller has checked them); tasks write different sums.
        unsafe { T::dispatch_pairs(task) }
    });
    if kept == Kept::Apart {
        add(sums, g.oc * row);
        let sums: &[T] = &sums[..g.oc * row];
        par::rows(dw, row, par::GRAIN, |first, dw| {
            for (i, dw) in dw.chunks_exact_mut(row).enumerate() {
                let sizes = [g.taps(), g.c];
                // SAFETY: the kernel has no promise of its own.
                unsafe { T::dispatch(Turned { sizes, sum: &sums[(first + i) * row..][..row], dw }) }
            }
        });
    }
}

/// An output's weights.
struct Turned<'a, T> {
    /// Taps and channels.
    sizes: [usize; 2],
    sum: &'a [T],
    dw: &'a mut [T],
}

impl<T: Vectors> Kernel<T> for Turned<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(self) {
        assert!(self.sum.len() == self.dw.len() && self.dw.len() == self.sizes[0] * self.sizes[1]);
        // SAFETY: the lengths are as many elements.
        unsafe { taps_last::<S>(self.sizes, self.sum.as_ptr(), self.dw.as_mut_ptr()) }
    }
}

struct Task<'a, T> {
    p: &'a Plan<'a>,
    x: Elements<'a, T>,
    dy: Elements<'a, T>,
    chunks: Range<usize>,
    outputs: Range<usize>,
    kept: Kept,
    /// (M, kernel rows, columns), from the first output on, or as many as a block has.
    sum: *mut T,
    /// The weights, from the first output's on.
    to: *mut T,
    near: &'a mut [u32],
}

impl<T: Vectors> PairKernel<T> for Task<'_, T> {
    #[inline(always)]
    unsafe fn run<D: Pairs<S: Simd<Elem = T>>>(mut self) {
        let (p, g) = (self.p, self.p.g);
        let mut sums = Sums::default();
        let m = self.outputs.len();
        for (nth, chunk) in self.chunks.clone().enumerate() {
            let chunk = p.chunk(chunk);
            // SAFETY: the caller's promise.
            unsafe {
                self.turn_outputs::<D>(chunk);
                self.pad_inputs(chunk);
            }
            let (dy, x) = self.near.split_at(p.near()[0]);
            let dy_row = p.dy_row(chunk);
            let ([count, instructions, steps], b_row) = (p.runs(chunk), g.stride[2] * g.c);
            let (line, x_lines) = (p.pitch * g.c, p.x_lines(chunk.rows));
            let runs = Runs::apart(count, [instructions, steps], b_row, |i| match p.flat {
                true => i * x_lines * line,
                false => (i / chunk.rows * x_lines + i % chunk.rows * g.stride[1]) * line,
            });
            let registers = Registers::new(m.min(SIDE), &runs);
            for row in (0..m).step_by(BLOCK) {
                let squares = [square(row / SIDE, m), square(row / SIDE + 1, m)];
                let high = (m - row).div_ceil(SIDE).min(2);
                let squares = &squares[..high];
                let last = high - 1;
                // What is there is added first; what two squares share, once.
                let adds = nth == 0 || squares.iter().all(|square| square.1 == 0);
                let wide = SQUARES / high * SIDE;
                let before = if self.kept == Kept::Near { squares[0].0 * p.row() } else { 0 };
                let sum = self.sum.wrapping_sub(before);
                for tap in 0..p.lines {
                    for column in (0..p.columns).step_by(wide) {
                        let width = wide.min(p.columns - column);
                        let columns = width.div_ceil(SIDE);
                        let at = |row: usize| (row * p.lines + tap) * p.columns + column;
                        let own = adds && width.is_multiple_of(SIDE);
                        let mut place = sums.place(columns);
                        if own {
                            let to = |i: usize| sum.wrapping_add(at(squares[i.min(last)].0)).cast();
                            place = Place { to: std::array::from_fn(to), row: p.row(), add: nth > 0 };
                        }
                        let a = |i: usize| dy.as_ptr().wrapping_add(squares[i.min(last)].0 * dy_row);
                        let block = Block {
                            a: std::array::from_fn(a),
                            a_row: dy_row,
                            b: x.as_ptr().wrapping_add(tap * g.dilation[1] * line + column),
                            b_row,
                            rows: high,
                            columns,
                            place,
                            ahead: Ahead::nothing(x.as_ptr()),
                        };
                        // SAFETY: dY's rows and X's lines are near, with what is read beyond them; the sums are this task's.
                        unsafe {
                            registers.multiply(&block);
                            for (r, &(start, skip)) in squares.iter().enumerate().filter(|_| !own) {
                                for i in skip..SIDE.min(m - start) {
                                    let from = (r * SIDE + i) * columns * SIDE;
                                    let from = sums.0.as_ptr().add(from).cast::<T>();
                                    let to = sum.wrapping_add(at(start + i));
                                    add_row::<D::S>(from, to, width, nth > 0);
                                }
                            }
                        }
                    }
                }
                if self.kept == Kept::Near {
                    for i in squares[0].0..(squares[last].0 + SIDE).min(m) {
                        let (sum, to) = (sum.wrapping_add(i * p.row()), self.to.wrapping_add(i * p.row()));
                        // SAFETY: the block's sums; the weights are this task's.
                        unsafe { taps_last::<D::S>([g.taps(), g.c], sum, to) }
                    }
                }
            }
        }
        if self.chunks.is_empty() {
            // SAFETY: the sums are this task's.
            unsafe { std::slice::from_raw_parts_mut(self.sum, m * p.row()).fill(T::zero()) }
        }
    }
}

/// Writes `n` elements, or, with `add`, adds them to what is there.
///
/// # Safety
/// `from` must be valid for whole vectors, `to` for `n` elements, and `S`'s instructions be there.
#[inline(always)]
unsafe fn add_row<S: Simd<Elem: Vectors>>(from: *const S::Elem, to: *mut S::Elem, n: usize, add: bool) {
    for j in (0..n).step_by(S::LANES) {
        let part = S::LANES.min(n - j);
        // SAFETY: the caller's promise.
        unsafe {
            let (mut v, to) = (S::load(from.add(j)), to.add(j));
            if add {
                v = S::add(load_up_to::<S>(to, part), v);
            }
            store_up_to::<S>(to, v, part);
        }
    }
}

impl<T: Vectors> Task<'_, T> {
    /// Puts the task's outputs of dY near, a row each.
    ///
    /// # Safety
    /// `D`'s instructions must be there.
    #[inline(always)]
    unsafe fn turn_outputs<D: Pairs<S: Simd<Elem = T>>>(&mut self, chunk: Chunk) {
        let (p, g, lanes) = (self.p, self.p.g, D::S::LANES);
        let (width, dy_row) = (g.y[2], p.dy_row(chunk));
        let [count, instructions, steps] = p.runs(chunk);
        let per_run = instructions * steps;
        assert!(self.outputs.len() * dy_row <= self.near.len() && count * per_run + BEYOND <= dy_row);
        let near = self.near.as_mut_ptr();
        let mut square = [0u32; SIDE * SIDE];
        for line in 0..chunk.images * chunk.rows {
            let (pair, row) = (line / chunk.rows, line % chunk.rows);
            // Up to the next line, whose beginning is written after this one's zeros.
            let (at, len) = match p.flat {
                true if row + 1 < chunk.rows => (pair * per_run + row * p.pitch, p.pitch),
                true => (pair * per_run + row * p.pitch, per_run - row * p.pitch),
                false => (line * per_run, per_run),
            };
            let position = (chunk.row + row) * width;
            for first in (self.outputs.start..self.outputs.end).step_by(lanes) {
                let outputs = lanes.min(self.outputs.end - first);
                for k in (0..len).step_by(lanes) {
                    // SAFETY: positions of dY, and room for the line and the vector that ends after it.
                    unsafe {
                        for i in 0..lanes {
                            let to = square.as_mut_ptr().add(i * lanes);
                            if k + i >= width {
                                std::slice::from_raw_parts_mut(to, lanes).fill(0);
                                continue;
                            }
                            let at = (position + k + i) * g.oc + first;
                            let starts = both(chunk.image + pair, g.n, at, volume(g.y) * g.oc);
                            across::<D>(self.dy, starts, outputs, to);
                        }
                        let to = near.add((first - self.outputs.start) * dy_row + at + k);
                        if outputs == lanes {
                            D::S::transpose(square.as_ptr().cast(), lanes, to.cast(), dy_row);
                            continue;
                        }
                        for o in 0..outputs {
                            for i in 0..lanes {
                                *to.add(o * dy_row + i) = square[i * lanes + o];
                            }
                        }
                    }
                }
            }
        }
    }

    /// Puts the lines of X near that the chunk reads.
    fn pad_inputs(&mut self, chunk: Chunk) {
        let (p, g) = (self.p, self.p.g);
        let (line, lines) = (p.pitch * g.c, p.x_lines(chunk.rows));
        let image = volume(g.x) * g.c;
        let (near, after) = self.near[p.near()[0]..].split_at_mut(p.x_pairs(chunk));
        for (nth, out) in near.chunks_exact_mut(line).enumerate() {
            let pair = chunk.image + nth / lines;
            let row = (chunk.row * g.stride[1] + nth % lines).wrapping_sub(g.pad[1]);
            let inside = row < g.x[1];
            let starts = if inside { both(pair, g.n, row * g.x[2] * g.c, image) } else { [None; 2] };
            let at = g.pad[2].min(p.pitch);
            let len = if inside { g.x[2].min(p.pitch - at) * g.c } else { 0 };
            // SAFETY: the kernel has no promise of its own.
            unsafe { T::dispatch_pairs(PadImages { x: self.x, starts, at: at * g.c, len, out }) }
        }
        let beyond = (p.near()[1] - p.x_pairs(p.largest())).min(after.len());
        after[..beyond].fill(0);
    }
}
