//! Products of bfloat16 pairs ([`pairs`](crate::kernels::pairs)): `C = alpha · op(A) · op(B) + beta · C` of operands rounded to
//! bfloat16, summed in `f32`.
//!
//! Two consecutive steps of the summed dimension are a pair. op(B) is packed in panels of a row of pairs a step; A in rows of
//! pairs, or, where it is read across its rows, in strips; register tiles as of `gemm` do the rest.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use rayon::prelude::*;

use super::tile::{Target, Tile, tile_run};
use super::{Plus, Product, tasks};
use crate::kernels::half::Elements;
use crate::kernels::pairs::{PairKernel, Pairs, across, both, in_strips, neighbours};
use crate::kernels::par::Shared;
use crate::kernels::simd::{Level, Simd, Vectors};
use crate::kernels::tile::Pieces;
use crate::tile_sizes;

/// Multiply-adds that pay for packing.
const LEAST: usize = 1 << 18;
/// Pairs that are added up in registers before they are added to C.
const STEPS: usize = 256;
/// Rows of A that are packed by a task.
const ROWS: usize = 64;
/// Steps of strips that are packed by a task.
const BLOCK: usize = 32;
/// Lanes of the widest vectors.
const SQUARE: usize = 16;

impl<T: Vectors> Product<T> {
    /// Is the product large enough for [`gemm_pairs`]?
    pub fn suits_pairs(&self) -> bool {
        !self.is_vector() && self.work() >= LEAST && self.k > 1
    }

    /// Pairs of the summed dimension.
    fn steps(&self) -> usize {
        self.k.div_ceil(2)
    }

    /// From one strip of A to the next.
    fn strip_of_pairs(&self) -> usize {
        self.in_strip(self.steps())
    }

    /// Numbers of 32 bits that A and B are packed in.
    fn pairs(&self) -> [usize; 2] {
        let a = match self.trans_a {
            true => self.strips().count * self.strip_of_pairs(),
            false => self.m * self.steps(),
        };
        [a, self.in_panels(self.panels(), self.steps())]
    }
}

/// Elements of scratch that [`gemm_pairs`] needs.
pub fn room_pairs<T: Vectors>(p: &Product<T>) -> usize {
    p.pairs().iter().sum()
}

/// As [`gemm`](super::gemm), of operands rounded to bfloat16, with something added.
pub fn gemm_pairs<T: Vectors>(
    p: &Product<T>,
    a: Elements<T>,
    b: Elements<T>,
    plus: Plus<T>,
    c: &mut [T],
    scratch: &mut [T],
) {
    p.check([a.len(), b.len(), c.len()], &plus);
    if p.m * p.n == 0 {
        return;
    }
    let [in_a, in_b] = p.pairs();
    let scratch: &mut [u32] = bytemuck::cast_slice_mut(scratch);
    let (a_pairs, b_pairs) = scratch[..in_a + in_b].split_at_mut(in_a);
    pack_b(p, b, b_pairs);
    pack_a(p, a, a_pairs);
    let (a, b, c) = (&*a_pairs, &*b_pairs, Shared::new(c));
    let (rows, cols) = Product { trans_a: false, ..*p }.pieces();
    let share = |i: usize, of: usize, total: usize| total * i / of..total * (i + 1) / of;
    tasks::<T>(rows * cols, 0, &mut [], |task, _| {
        let strips = share(task / cols, rows, p.strips().count);
        let panels = share(task % cols, cols, p.panels());
        let part = Part { p, a, b, plus, c: c.ptr(), strips, panels };
        // SAFETY: the extents were checked above; no two tasks share elements of C.
        unsafe { T::dispatch_pairs(part) }
    });
}

/// A panel of op(B) is, for each step, its columns' pairs in whole vectors.
fn pack_b<T: Vectors>(p: &Product<T>, b: Elements<T>, out: &mut [u32]) {
    assert!(b.len() >= p.extents()[1], "operands of a product");
    out.par_chunks_exact_mut(p.in_panels(1, p.steps())).enumerate().for_each(|(q, out)| {
        // SAFETY: B's length was checked; a panel has its size.
        unsafe { T::dispatch_pairs(Panel { p, b, q, out }) }
    });
}

/// A's rows as rows of pairs; of an A that is read across its rows, strips as B's panels.
fn pack_a<T: Vectors>(p: &Product<T>, a: Elements<T>, out: &mut [u32]) {
    assert!(a.len() >= p.extents()[0], "operands of a product");
    if p.trans_a {
        let out = Shared::new(out);
        return (0..p.steps().div_ceil(BLOCK)).into_par_iter().for_each(|block| {
            let steps = block * BLOCK..p.steps().min((block + 1) * BLOCK);
            // SAFETY: A's length was checked; each task writes its own steps.
            unsafe { T::dispatch_pairs(Strips { p, a, steps, out: out.ptr() }) }
        });
    }
    out.par_chunks_mut(ROWS * p.steps()).enumerate().for_each(|(i, out)| {
        // SAFETY: A's length was checked; the rows are whole.
        unsafe { T::dispatch_pairs(Rows { p, a, first: i * ROWS, out }) }
    });
}

struct Panel<'a, T> {
    p: &'a Product<T>,
    b: Elements<'a, T>,
    q: usize,
    out: &'a mut [u32],
}

impl<T: Vectors> PairKernel<T> for Panel<'_, T> {
    #[inline(always)]
    unsafe fn run<D: Pairs<S: Simd<Elem = T>>>(self) {
        let Panel { p, b, q, out } = self;
        let lanes = D::S::LANES;
        let panel = Level::of::<D::S>().panel(p.n);
        let first = q * panel;
        let cols = panel.min(p.n - first);
        let row = p.row(panel, q, lanes);
        if cols < row {
            out.fill(0);
        }
        let out = out.as_mut_ptr();
        // SAFETY: rows and columns of op(B), all of which B has; the panel has as many rows as there are steps.
        unsafe {
            if !p.trans_b {
                for step in 0..p.steps() {
                    across::<D>(b, both(step, p.k, first, p.ldb), cols, out.add(step * row));
                }
                return;
            }
            // Squares of pairs are transposed in registers.
            let mut square = [0u32; SQUARE * SQUARE];
            for step in (0..p.steps()).step_by(lanes) {
                let steps = lanes.min(p.steps() - step);
                let elements = (2 * steps).min(p.k - 2 * step);
                for col in (0..cols).step_by(lanes) {
                    let count = lanes.min(cols - col);
                    for i in 0..count {
                        let at = (first + col + i) * p.ldb + 2 * step;
                        neighbours::<D>(b, at, elements, square.as_mut_ptr().add(i * lanes));
                    }
                    let to = out.add(step * row + col);
                    if steps == lanes && count == lanes {
                        D::S::transpose(square.as_ptr().cast(), lanes, to.cast(), row);
                        continue;
                    }
                    for k in 0..steps {
                        for i in 0..count {
                            *to.add(k * row + i) = square[i * lanes + k];
                        }
                    }
                }
            }
        }
    }
}

struct Rows<'a, T> {
    p: &'a Product<T>,
    a: Elements<'a, T>,
    first: usize,
    out: &'a mut [u32],
}

impl<T: Vectors> PairKernel<T> for Rows<'_, T> {
    #[inline(always)]
    unsafe fn run<D: Pairs<S: Simd<Elem = T>>>(self) {
        let p = self.p;
        for (i, row) in self.out.chunks_exact_mut(p.steps()).enumerate() {
            // SAFETY: a row's elements, which A has, and its pairs.
            unsafe { neighbours::<D>(self.a, (self.first + i) * p.lda, p.k, row.as_mut_ptr()) }
        }
    }
}

struct Strips<'a, T> {
    p: &'a Product<T>,
    a: Elements<'a, T>,
    steps: Range<usize>,
    /// Of all strips, with all steps.
    out: *mut u32,
}

impl<T: Vectors> PairKernel<T> for Strips<'_, T> {
    #[inline(always)]
    unsafe fn run<D: Pairs<S: Simd<Elem = T>>>(self) {
        let p = self.p;
        let level = Level::of::<D::S>();
        let height = level.rows(level.panel(p.n));
        let (strips, size) = (Pieces::of(p.m, height), p.strip_of_pairs());
        for step in self.steps.clone() {
            let exact = step + 1 == self.steps.end;
            // SAFETY: the step's rows of A, which A has, and the strips' place for them.
            unsafe {
                let to = self.out.add(step * height);
                in_strips::<D>(self.a, both(step, p.k, 0, p.lda), &strips, 0..strips.count, size, exact, to);
            }
        }
    }
}

/// Some strips and panels of one product whose operands are packed.
struct Part<'a, T> {
    p: &'a Product<T>,
    a: &'a [u32],
    b: &'a [u32],
    plus: Plus<'a, T>,
    c: *mut T,
    strips: Range<usize>,
    panels: Range<usize>,
}

impl<T: Vectors> PairKernel<T> for Part<'_, T> {
    #[inline(always)]
    unsafe fn run<D: Pairs<S: Simd<Elem = T>>>(self) {
        let (p, steps) = (self.p, self.p.steps());
        let panel = Level::of::<D::S>().panel(p.n);
        let height = Level::of::<D::S>().rows(panel);
        let (strips, strip) = (Pieces::of(p.m, height), p.strip_of_pairs());
        let mut k = 0;
        while k < steps {
            let count = STEPS.min(steps - k);
            let (beta, plus) = if k == 0 { (p.beta, self.plus) } else { (T::one(), Plus::NOTHING) };
            for q in self.panels.clone() {
                let first = q * panel;
                let width = p.row(panel, q, D::S::LANES);
                let b = self.b.as_ptr().wrapping_add(q * steps * panel + k * width);
                for i in self.strips.clone() {
                    let row = strips.start(i);
                    let (a, lda) = match p.trans_a {
                        true => (i * strip + k * height, height),
                        false => (row * steps + k, steps),
                    };
                    let tile = Tile {
                        across: p.trans_a,
                        a: self.a.as_ptr().wrapping_add(a),
                        lda,
                        b,
                        ldb: None,
                        steps: count,
                        to: Target::of(p, plus, self.c, row, first, panel, beta),
                    };
                    // SAFETY: the part lies inside the product; its operands are packed.
                    unsafe { tile_sizes!(strips.len(i), width / D::S::LANES, D, tile_run(&tile)) }
                }
            }
            k += STEPS;
        }
    }
}
