//! Operands of a product in the order in which its tiles read them.

use std::ops::Range;

use rayon::prelude::*;

use super::{GAP, Product};
use crate::kernels::half::Elements;
use crate::kernels::par::Shared;
use crate::kernels::simd::{Kernel, Level, Simd, Vectors, load_up_to, store_up_to};
use crate::kernels::tile::Pieces;

/// Steps of the summed dimension that are packed at a time.
const STEPS: usize = 64;
/// Strips that are written at a time: more would push each other out of the cache.
const GROUP: usize = 32;
/// Steps that rows are fetched ahead: neighbours in a panel are far apart in B.
const AHEAD: usize = 12;

/// op(B) in panels, by several tasks or by this one.
pub(super) fn columns<T: Vectors>(p: &Product<T>, b: Elements<T>, out: &mut [T], several: bool) {
    assert!(b.len() >= p.extents()[1], "operands of a product");
    let size = p.in_panels(1, p.k).max(1);
    // SAFETY: B's length was checked; a panel has `size` elements.
    let one = |(q, out): (usize, &mut [T])| unsafe { T::dispatch(Panel { p, b, q, out }) };
    match several {
        true => out.par_chunks_exact_mut(size).enumerate().for_each(one),
        false => out.chunks_exact_mut(size).enumerate().for_each(one),
    }
}

/// A, stored K×M, in strips.
pub(super) fn rows<T: Vectors>(p: &Product<T>, a: Elements<T>, out: &mut [T]) {
    let strips = p.strips().count;
    assert!(a.len() >= p.extents()[0] && out.len() >= strips * p.in_strip(p.k), "operands of a product");
    let out = Shared::new(out);
    (0..p.k.div_ceil(STEPS)).into_par_iter().for_each(|block| {
        let steps = block * STEPS..p.k.min((block + 1) * STEPS);
        // SAFETY: lengths were checked; each task writes its own steps.
        unsafe { T::dispatch(Strips { p, a, steps, out: out.ptr() }) }
    });
}

struct Panel<'a, T> {
    p: &'a Product<T>,
    b: Elements<'a, T>,
    q: usize,
    out: &'a mut [T],
}

impl<T: Vectors> Kernel<T> for Panel<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(self) {
        // SAFETY: the caller's promise.
        unsafe { panel::<S>(self.p, self.b, self.q, 0..self.p.k, self.out.as_mut_ptr()) }
    }
}

struct Strips<'a, T> {
    p: &'a Product<T>,
    a: Elements<'a, T>,
    steps: Range<usize>,
    /// Of all strips, with all steps.
    out: *mut T,
}

impl<T: Vectors> Kernel<T> for Strips<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(self) {
        let height = height::<S>(self.p);
        let all = 0..self.p.strips().count;
        let out = self.out.wrapping_add(self.steps.start * height);
        // SAFETY: the caller's promise.
        unsafe { strips::<S>(self.p, self.a, all, self.steps, out, self.p.k) }
    }
}

/// Some steps of panel `q` of op(B): for each step of the summed dimension one row of columns in whole vectors, zeros beyond
/// the last. A transposed B is whole.
///
/// # Safety
/// B must have the product's extents, `out` room for the steps, and `S`'s instructions be there.
#[inline(always)]
pub(super) unsafe fn panel<S: Simd>(
    p: &Product<S::Elem>,
    b: Elements<S::Elem>,
    q: usize,
    steps: Range<usize>,
    out: *mut S::Elem,
) {
    let panel = Level::of::<S>().panel(p.n);
    let first = q * panel;
    let (cols, width) = (panel.min(p.n - first), p.row(panel, q, S::LANES));
    // SAFETY: rows and columns of op(B), all of which B has; the panel has as many rows as there are steps.
    unsafe {
        if cols < width {
            std::slice::from_raw_parts_mut(out, steps.len() * width).fill(num_traits::zero());
        }
        if !p.trans_b && !b.is_whole() {
            for k in 0..steps.len() {
                let row = std::slice::from_raw_parts_mut(out.add(k * width), cols);
                b.copy((steps.start + k) * p.ldb + first, row);
            }
            return;
        }
        if !p.trans_b {
            let b = b.address(steps.start * p.ldb + first);
            for k in 0..steps.len() {
                let (from, to) = (b.add(k * p.ldb), out.add(k * width));
                let mut j = 0;
                while j < cols {
                    S::prefetch(from.wrapping_add(AHEAD * p.ldb + j));
                    let part = S::LANES.min(cols - j);
                    store_up_to::<S>(to.add(j), load_up_to::<S>(from.add(j), part), part);
                    j += S::LANES;
                }
            }
            return;
        }
        let b = b.address(first * p.ldb + steps.start);
        // Some steps at a time: whole cache lines of B are used.
        let mut from = 0;
        while from < steps.len() {
            let to = steps.len().min(from + STEPS);
            let mut j = 0;
            while j + S::LANES <= cols {
                let rows = b.add(j * p.ldb);
                let mut k = from;
                while k + S::LANES <= to {
                    S::transpose(rows.add(k), p.ldb, out.add(k * width + j), width);
                    k += S::LANES;
                }
                for k in k..to {
                    for i in 0..S::LANES {
                        *out.add(k * width + j + i) = *rows.add(i * p.ldb + k);
                    }
                }
                j += S::LANES;
            }
            for j in j..cols {
                for k in from..to {
                    *out.add(k * width + j) = *b.add(j * p.ldb + k);
                }
            }
            from = to;
        }
    }
}

/// Rows of a strip.
#[inline(always)]
fn height<S: Simd>(p: &Product<S::Elem>) -> usize {
    let level = Level::of::<S>();
    level.rows(level.panel(p.n))
}

/// Some steps of some strips of A, stored K×M: for each step of the summed dimension the strip's rows of op(A), strips
/// of room for `room` steps each. Few steps at a time for all strips, so that A is read in order. What follows the rows of a
/// shorter strip is left as it comes: tiles do not read it.
///
/// # Safety
/// A must have the product's extents, `out` room for the strips, and `S`'s instructions be there.
#[inline(always)]
pub(super) unsafe fn strips<S: Simd>(
    p: &Product<S::Elem>,
    a: Elements<S::Elem>,
    some: Range<usize>,
    steps: Range<usize>,
    out: *mut S::Elem,
    room: usize,
) {
    let height = height::<S>(p);
    let size = room * height + GAP;
    let vectors = height.div_ceil(S::LANES);
    let strips = Pieces::of(p.m, height);
    // Whole vectors are copied where they stay inside A and inside the strip: what is too much is written over by the
    // next steps, or never read.
    let whole = steps.end.saturating_sub((vectors * S::LANES).div_ceil(height) - 1);
    // A step's rows of a group of strips, of half precision, widened; and room for the last whole vector.
    let mut near = [num_traits::zero(); GROUP * 8 + GAP];
    let mut first = steps.start;
    while first < steps.end {
        let last = steps.end.min(first + STEPS);
        let mut group = some.start;
        while group < some.end {
            let count = GROUP.min(some.end - group);
            let mut starts = [0; GROUP];
            for g in 0..count {
                starts[g] = strips.start(group + g);
            }
            let through = starts[count - 1] - starts[0];
            for k in first..last {
                let row = k * p.lda + starts[0];
                let (from, there) = match a {
                    Elements::Whole(a) => (a.as_ptr().wrapping_add(row), a.len() - row),
                    half => {
                        half.copy(row, &mut near[..through + strips.len(group + count - 1)]);
                        (near.as_ptr(), near.len())
                    }
                };
                let inside = k < whole && through + vectors * S::LANES <= there;
                let to = out.wrapping_add((group - some.start) * size + (k - steps.start) * height);
                for g in 0..count {
                    // SAFETY: the step's rows of A, and the strip's place for them; whole vectors were checked above.
                    unsafe {
                        let (from, to) = (from.add(starts[g] - starts[0]), to.add(g * size));
                        S::prefetch(from.wrapping_add(AHEAD * p.lda));
                        match inside {
                            true => {
                                for v in 0..vectors {
                                    S::store(to.add(v * S::LANES), S::load(from.add(v * S::LANES)));
                                }
                            }
                            false => std::ptr::copy_nonoverlapping(from, to, strips.len(group + g)),
                        }
                    }
                }
            }
            group += count;
        }
        first = last;
    }
}
