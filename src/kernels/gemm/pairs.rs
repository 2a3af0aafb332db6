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
use crate::kernels::half::{Elements, Half};
use crate::kernels::pairs::{PairKernel, Pairs, across, both, in_strips, neighbours};
use crate::kernels::par::Shared;
use crate::kernels::simd::{Level, Simd, Vectors};
use crate::kernels::tile::Pieces;
use crate::tile_sizes;

/// Multiply-adds that pay for packing.
const LEAST: usize = 1 << 18;
/// Pairs that are added up in registers before they are added to C.
const STEPS: usize = 512;
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

    /// Are rows of an A of this type rows of pairs as they lie?
    fn lies_in_pairs(&self, a: Option<Half>) -> bool {
        let even = self.k.is_multiple_of(2) && self.lda.is_multiple_of(2);
        !self.trans_a && even && a == Some(Half::Bf16) && cfg!(target_endian = "little")
    }

    /// Numbers of 32 bits that A is packed in.
    fn a_pairs(&self, a: Option<Half>) -> usize {
        match self.trans_a {
            _ if self.lies_in_pairs(a) => 0,
            true => self.strips().count * self.strip_of_pairs(),
            false => self.m * self.steps(),
        }
    }
}

/// Elements of B, packed by [`pack_pairs`].
pub(super) fn packed_pairs<T: Vectors>(p: &Product<T>) -> usize {
    p.in_panels(p.panels(), p.steps())
}

/// Elements of scratch that [`gemm_pairs`] needs; `a`: which type of half precision A is of.
pub fn room_pairs<T: Vectors>(p: &Product<T>, a: Option<Half>) -> usize {
    p.a_pairs(a) + packed_pairs(p)
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
    let (packed, rest) = scratch.split_at_mut(packed_pairs(p));
    pack_pairs(p, b, bytemuck::cast_slice_mut(packed));
    multiply_pairs(p, a, bytemuck::cast_slice(packed), plus, &Shared::new(c), rest);
}

/// By a packed B; the callers have checked the other extents.
pub(super) fn multiply_pairs<T: Vectors>(
    p: &Product<T>,
    a: Elements<T>,
    b: &[u32],
    plus: Plus<T>,
    c: &Shared<T>,
    scratch: &mut [T],
) {
    assert!(b.len() >= packed_pairs(p), "operands of a product");
    let (a, lda) = match p.lies_in_pairs(a.half()) {
        true => (a.address(0).cast::<u32>(), p.lda / 2),
        false => {
            let scratch: &mut [u32] = bytemuck::cast_slice_mut(scratch);
            let out = &mut scratch[..p.a_pairs(None)];
            pack_a(p, a, out);
            (out.as_ptr(), p.steps())
        }
    };
    let a = Rows { a, lda };
    let (rows, cols) = Product { trans_a: false, ..*p }.pieces();
    let share = |i: usize, of: usize, total: usize| total * i / of..total * (i + 1) / of;
    tasks::<T>(rows * cols, 0, &mut [], |task, _| {
        let strips = share(task / cols, rows, p.strips().count);
        let panels = share(task % cols, cols, p.panels());
        let part = Part { p, a: &a, b, plus, c: c.ptr(), strips, panels };
        // SAFETY: the extents were checked; no two tasks share elements of C.
        unsafe { T::dispatch_pairs(part) }
    });
}

/// Tasks that pack, by several threads or by this one.
fn each<T>(p: &Product<T>, count: usize, run: impl Fn(usize) + Send + Sync) {
    match p.alone {
        true => (0..count).for_each(run),
        false => (0..count).into_par_iter().for_each(run),
    }
}

/// Packs B: a panel of op(B) is, for each step, its columns' pairs in whole vectors. In pieces such that B is read in
/// order.
pub(super) fn pack_pairs<T: Vectors>(p: &Product<T>, b: Elements<T>, out: &mut [u32]) {
    assert!(b.len() >= p.extents()[1] && out.len() >= packed_pairs(p), "operands of a product");
    let out = Shared::new(out);
    let blocks = if p.trans_b { p.panels() } else { p.steps().div_ceil(BLOCK) };
    each(p, blocks, |i| {
        let (panels, steps) = match p.trans_b {
            true => (i..i + 1, 0..p.steps()),
            false => (0..p.panels(), i * BLOCK..p.steps().min((i + 1) * BLOCK)),
        };
        // SAFETY: lengths were checked; each task writes its own panels or steps.
        unsafe { T::dispatch_pairs(Panels { p, b, panels, steps, out: out.ptr() }) }
    });
}

/// A's rows as rows of pairs; of an A that is read across its rows, strips as B's panels.
fn pack_a<T: Vectors>(p: &Product<T>, a: Elements<T>, out: &mut [u32]) {
    assert!(a.len() >= p.extents()[0], "operands of a product");
    let shared = Shared::new(out);
    if p.trans_a {
        return each(p, p.steps().div_ceil(BLOCK), |block| {
            let steps = block * BLOCK..p.steps().min((block + 1) * BLOCK);
            // SAFETY: A's length was checked; each task writes its own steps.
            unsafe { T::dispatch_pairs(Strips { p, a, steps, out: shared.ptr() }) }
        });
    }
    each(p, p.m.div_ceil(ROWS), |block| {
        let rows = block * ROWS..p.m.min((block + 1) * ROWS);
        // SAFETY: A's length was checked; each task writes its own rows.
        unsafe { T::dispatch_pairs(PackRows { p, a, rows, out: shared.ptr() }) }
    });
}

struct Panels<'a, T> {
    p: &'a Product<T>,
    b: Elements<'a, T>,
    panels: Range<usize>,
    steps: Range<usize>,
    /// Of all panels, with all steps.
    out: *mut u32,
}

impl<T: Vectors> PairKernel<T> for Panels<'_, T> {
    #[inline(always)]
    unsafe fn run<D: Pairs<S: Simd<Elem = T>>>(self) {
        let Panels { p, b, panels, steps, out } = self;
        let lanes = D::S::LANES;
        let panel = Level::of::<D::S>().panel(p.n);
        let of = |q: usize| {
            let row = p.row(panel, q, lanes);
            (q * panel, panel.min(p.n - q * panel), row, out.wrapping_add(q * p.steps() * panel))
        };
        // SAFETY: rows and columns of op(B), all of which B has; a panel has as many rows as there are steps.
        unsafe {
            if p.trans_b {
                for q in panels {
                    let (first, cols, row, out) = of(q);
                    transposed::<D>(p, b, first, cols, row, out);
                }
                return;
            }
            for step in steps {
                for q in panels.clone() {
                    let (first, cols, row, out) = of(q);
                    let to = out.add(step * row);
                    across::<D>(b, both(step, p.k, first, p.ldb), cols, to);
                    std::slice::from_raw_parts_mut(to.add(cols), row - cols).fill(0);
                }
            }
        }
    }
}

/// A panel of a transposed B, from column `first` on: squares of pairs are transposed in registers.
///
/// # Safety
/// B must have the columns, `out` room for a row of `row` pairs a step, and `D`'s instructions be there.
#[inline(always)]
unsafe fn transposed<D: Pairs<S: Simd<Elem: Vectors>>>(
    p: &Product<<D::S as Simd>::Elem>,
    b: Elements<<D::S as Simd>::Elem>,
    first: usize,
    cols: usize,
    row: usize,
    out: *mut u32,
) {
    let lanes = D::S::LANES;
    let mut square = [0u32; SQUARE * SQUARE];
    // SAFETY: the caller's promise.
    unsafe {
        if cols < row {
            std::slice::from_raw_parts_mut(out, p.steps() * row).fill(0);
        }
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

struct PackRows<'a, T> {
    p: &'a Product<T>,
    a: Elements<'a, T>,
    rows: Range<usize>,
    /// Of all rows.
    out: *mut u32,
}

impl<T: Vectors> PairKernel<T> for PackRows<'_, T> {
    #[inline(always)]
    unsafe fn run<D: Pairs<S: Simd<Elem = T>>>(self) {
        let p = self.p;
        for i in self.rows {
            // SAFETY: a row's elements, which A has, and its pairs.
            unsafe { neighbours::<D>(self.a, i * p.lda, p.k, self.out.add(i * p.steps())) }
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

/// A's rows of pairs, at any address, or its strips.
struct Rows {
    a: *const u32,
    lda: usize,
}

// SAFETY: the pairs are only read.
unsafe impl Send for Rows {}
// SAFETY: as above.
unsafe impl Sync for Rows {}

/// Some strips and panels of one product whose operands are packed.
struct Part<'a, T> {
    p: &'a Product<T>,
    a: &'a Rows,
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
                        false => (row * self.a.lda + k, self.a.lda),
                    };
                    let tile = Tile {
                        across: p.trans_a,
                        a: self.a.a.wrapping_add(a),
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
