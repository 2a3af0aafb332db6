//! Operands of products of pairs, in the order in which they are multiplied: see [`Order`].
#![allow(unsafe_code, clippy::needless_range_loop)]

use std::ops::Range;

use rayon::prelude::*;

use super::{Order, Product};
use crate::kernels::half::Elements;
use crate::kernels::pairs::{PairKernel, Pairs, across, both, in_strips, neighbours};
use crate::kernels::par::Shared;
use crate::kernels::simd::{Simd, Vectors};

/// Rows of A that are packed by a task.
const ROWS: usize = 64;
/// Steps that are packed by a task: some squares of them.
const STEPS_AT_ONCE: usize = 32;
/// Elements that rows which are turned are fetched ahead: there are too many of them for the processor to see streams.
const AHEAD: usize = 64;
/// Pairs of as many rows as the widest vectors have lanes.
type Square = [u32; 16 * 16];

/// Tasks that pack, by several threads or by this one.
fn each<T>(p: &Product<T>, count: usize, run: impl Fn(usize) + Send + Sync) {
    match p.alone {
        true => (0..count).for_each(run),
        false => (0..count).into_par_iter().for_each(run),
    }
}

/// Packs B: a panel of op(B) is, for each step, its columns' pairs in whole vectors. In pieces such that B is read in
/// order.
pub(in super::super) fn columns<T: Vectors>(p: &Product<T>, order: &Order, b: Elements<T>, out: &mut [u32]) {
    assert!(b.len() >= p.extents()[1] && out.len() >= order.b_pairs(p), "operands of a product");
    let (out, count) = (Shared::new(out), order.panels(p));
    let blocks = if p.trans_b { count } else { order.packed.div_ceil(STEPS_AT_ONCE) };
    each(p, blocks, |i| {
        let (panels, steps) = match p.trans_b {
            true => (i..i + 1, 0..order.packed),
            false => (0..count, i * STEPS_AT_ONCE..order.packed.min((i + 1) * STEPS_AT_ONCE)),
        };
        // SAFETY: lengths were checked; each task writes its own panels or steps.
        unsafe { T::dispatch_pairs(Panels { p, order, b, panels, steps, out: out.ptr() }) }
    });
}

/// A for tiles: its rows as rows of pairs, or, where it is read across them, strips as B's panels.
pub(super) fn rows_or_strips<T: Vectors>(p: &Product<T>, order: &Order, a: Elements<T>, out: &mut [u32]) {
    assert!(a.len() >= p.extents()[0] && out.len() >= order.a_pairs(p), "operands of a product");
    let shared = Shared::new(out);
    match order.in_strips(p) {
        true => each(p, order.steps.div_ceil(STEPS_AT_ONCE), |block| {
            let steps = block * STEPS_AT_ONCE..order.steps.min((block + 1) * STEPS_AT_ONCE);
            // SAFETY: lengths were checked; each task writes its own steps.
            unsafe { T::dispatch_pairs(Strips { p, order, a, steps, out: shared.ptr() }) }
        }),
        false => each(p, p.m.div_ceil(ROWS), |block| {
            let rows = block * ROWS..p.m.min((block + 1) * ROWS);
            let out = shared.ptr().wrapping_add(rows.start * order.steps);
            // SAFETY: lengths were checked; each task writes its own rows.
            unsafe { T::dispatch_pairs(Rows { p, order, a, rows, out }) }
        }),
    }
}

struct Rows<'a, T> {
    p: &'a Product<T>,
    order: &'a Order,
    a: Elements<'a, T>,
    rows: Range<usize>,
    /// Of these rows.
    out: *mut u32,
}

impl<T: Vectors> PairKernel<T> for Rows<'_, T> {
    #[inline(always)]
    unsafe fn run<D: Pairs<S: Simd<Elem = T>>>(self) {
        let Rows { p, order, a, rows, out } = self;
        // SAFETY: the caller's promise.
        unsafe { beside::<D>(p, a, rows, 0..order.steps, (out, order.steps)) }
    }
}

/// Some rows of A, of some packed steps, whole squares of them, in rows of pairs `to.1` pairs apart.
///
/// # Safety
/// A must have the product's extents, `to` be writable for the rows with all the steps, and `D`'s instructions be there.
#[inline(always)]
pub(in super::super) unsafe fn rows<D: Pairs<S: Simd<Elem: Vectors>>>(
    p: &Product<<D::S as Simd>::Elem>,
    order: &Order,
    a: Elements<<D::S as Simd>::Elem>,
    rows: Range<usize>,
    steps: Range<usize>,
    to: (*mut u32, usize),
) {
    // SAFETY: the caller's promise.
    unsafe {
        match p.trans_a {
            false => beside::<D>(p, a, rows, steps, to),
            true => turned::<D>(p, order, a, rows, steps, to),
        }
    }
}

/// Of an A whose rows lie as such.
///
/// # Safety
/// As of [`rows`].
#[inline(always)]
unsafe fn beside<D: Pairs<S: Simd<Elem: Vectors>>>(
    p: &Product<<D::S as Simd>::Elem>,
    a: Elements<<D::S as Simd>::Elem>,
    rows: Range<usize>,
    steps: Range<usize>,
    (out, out_row): (*mut u32, usize),
) {
    let elements = (2 * steps.len()).min(p.k - 2 * steps.start);
    for i in rows.clone() {
        // SAFETY: a row's elements, which A has, and its pairs.
        unsafe {
            let to = out.add((i - rows.start) * out_row);
            neighbours::<D>(a, i * p.lda + 2 * steps.start, elements, to);
            let filled = elements.div_ceil(2);
            std::slice::from_raw_parts_mut(to.add(filled), steps.len() - filled).fill(0);
        }
    }
}

/// Of an A that lies across its rows: squares of pairs are transposed in registers.
///
/// # Safety
/// As of [`rows`].
#[inline(always)]
unsafe fn turned<D: Pairs<S: Simd<Elem: Vectors>>>(
    p: &Product<<D::S as Simd>::Elem>,
    order: &Order,
    a: Elements<<D::S as Simd>::Elem>,
    rows: Range<usize>,
    steps: Range<usize>,
    (out, out_row): (*mut u32, usize),
) {
    let lanes = D::S::LANES;
    let mut square: Square = [0; _];
    for first in steps.clone().step_by(lanes) {
        for row in rows.clone().step_by(lanes) {
            let count = lanes.min(rows.end - row);
            // SAFETY: pairs of rows of A, which A has, and the rows' place for them.
            unsafe {
                for k in 0..lanes {
                    let to = square.as_mut_ptr().add(k * lanes);
                    if first + k >= order.steps {
                        std::slice::from_raw_parts_mut(to, lanes).fill(0);
                        continue;
                    }
                    let starts = both(first + k, p.k, row, p.lda);
                    for start in starts.into_iter().flatten() {
                        D::S::prefetch(a.address(start + AHEAD));
                    }
                    across::<D>(a, starts, count, to);
                }
                let to = out.add((row - rows.start) * out_row + first - steps.start);
                transpose::<D>(&square, [count, lanes], to, out_row);
            }
        }
    }
}

struct Panels<'a, T> {
    p: &'a Product<T>,
    order: &'a Order,
    b: Elements<'a, T>,
    panels: Range<usize>,
    steps: Range<usize>,
    /// Of all panels, with all steps.
    out: *mut u32,
}

impl<T: Vectors> PairKernel<T> for Panels<'_, T> {
    #[inline(always)]
    unsafe fn run<D: Pairs<S: Simd<Elem = T>>>(self) {
        let Panels { p, order, b, panels, steps, out } = self;
        let panel = order.panel;
        let of = |q: usize| {
            let cols = panel.min(p.n - q * panel);
            (q * panel, cols, order.row(p, q), out.wrapping_add(q * order.packed * panel))
        };
        // SAFETY: rows and columns of op(B), all of which B has; a panel has as many rows as there are steps.
        unsafe {
            if p.trans_b {
                for q in panels {
                    let (first, cols, row, out) = of(q);
                    transposed::<D>(p, order, b, first, cols, row, out);
                }
                return;
            }
            for step in steps {
                for q in panels.clone() {
                    let (first, cols, row, out) = of(q);
                    let (to, cols) = (out.add(step * row), if step < order.steps { cols } else { 0 });
                    if cols > 0 {
                        across::<D>(b, both(step, p.k, first, p.ldb), cols, to);
                    }
                    std::slice::from_raw_parts_mut(to.add(cols), row - cols).fill(0);
                }
            }
        }
    }
}

/// Writes `rows` rows of `columns` of a transposed square of pairs, `row` pairs apart, in registers where it is a whole one.
///
/// # Safety
/// `to` must have them, and `D`'s instructions be there.
#[inline(always)]
unsafe fn transpose<D: Pairs>(square: &Square, [rows, columns]: [usize; 2], to: *mut u32, row: usize) {
    let lanes = D::S::LANES;
    // SAFETY: the caller's promise.
    unsafe {
        if [rows, columns] == [lanes; 2] {
            return D::S::transpose(square.as_ptr().cast(), lanes, to.cast(), row);
        }
        for i in 0..rows {
            for j in 0..columns {
                *to.add(i * row + j) = square[j * lanes + i];
            }
        }
    }
}

/// A panel of a transposed B, from column `first` on.
///
/// # Safety
/// B must have the columns, `out` room for a row of `row` pairs a packed step, and `D`'s instructions be there.
#[inline(always)]
unsafe fn transposed<D: Pairs<S: Simd<Elem: Vectors>>>(
    p: &Product<<D::S as Simd>::Elem>,
    order: &Order,
    b: Elements<<D::S as Simd>::Elem>,
    first: usize,
    cols: usize,
    row: usize,
    out: *mut u32,
) {
    let lanes = D::S::LANES;
    let mut square: Square = [0; _];
    // SAFETY: the caller's promise.
    unsafe {
        let zeros = if cols < row { 0 } else { order.steps };
        std::slice::from_raw_parts_mut(out.add(zeros * row), (order.packed - zeros) * row).fill(0);
        for step in (0..order.steps).step_by(lanes) {
            let steps = lanes.min(order.steps - step);
            let elements = (2 * steps).min(p.k - 2 * step);
            for col in (0..cols).step_by(lanes) {
                let count = lanes.min(cols - col);
                for i in 0..count {
                    let at = (first + col + i) * p.ldb + 2 * step;
                    neighbours::<D>(b, at, elements, square.as_mut_ptr().add(i * lanes));
                }
                transpose::<D>(&square, [steps, count], out.add(step * row + col), row);
            }
        }
    }
}

struct Strips<'a, T> {
    p: &'a Product<T>,
    order: &'a Order,
    a: Elements<'a, T>,
    steps: Range<usize>,
    /// Of all strips, with all steps.
    out: *mut u32,
}

impl<T: Vectors> PairKernel<T> for Strips<'_, T> {
    #[inline(always)]
    unsafe fn run<D: Pairs<S: Simd<Elem = T>>>(self) {
        let Strips { p, order, a, steps, out } = self;
        let strips = order.strips(p);
        for step in steps.clone() {
            let exact = step + 1 == steps.end;
            // SAFETY: the step's rows of A, which A has, and the strips' place for them.
            unsafe {
                let to = out.add(step * order.height);
                let rows = both(step, p.k, 0, p.lda);
                in_strips::<D>(a, rows, &strips, 0..strips.count, order.strip(), exact, to);
            }
        }
    }
}
