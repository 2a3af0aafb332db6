//! Operands of a product in the order in which its tiles read them.

use std::ops::Range;

use rayon::prelude::*;

use super::{GAP, Product};
use crate::kernels::half::Elements;
use crate::kernels::par::{GRAIN, Shared};
use crate::kernels::simd::{Kernel, Level, Simd, Vectors, WIDEST};
use crate::kernels::tile::Pieces;

/// Steps of the summed dimension that are packed at a time.
const STEPS: usize = 64;
/// Strips that are written at a time: more would push each other out of the cache.
const GROUP: usize = 32;
/// Steps that rows are fetched ahead: neighbours in a panel are far apart in B.
const AHEAD: usize = 12;

/// op(B) in panels, by several tasks or by this one: in pieces such that B is read in order.
pub(super) fn columns<T: Vectors>(p: &Product<T>, b: Elements<T>, out: &mut [T]) {
    assert!(b.len() >= p.extents()[1] && out.len() >= p.in_panels(p.panels(), p.k), "operands of a product");
    let several = !p.alone && out.len() >= GRAIN;
    let out = Shared::new(out);
    let one = |i: usize| {
        let (panels, steps) = match p.trans_b {
            true => (i..i + 1, 0..p.k),
            false => (0..p.panels(), i * STEPS..p.k.min((i + 1) * STEPS)),
        };
        // SAFETY: lengths were checked; each task writes its own panels or steps.
        unsafe { T::dispatch(Panels { p, b, panels, steps, out: out.ptr() }) }
    };
    let tasks = 0..if p.trans_b { p.panels() } else { p.k.div_ceil(STEPS) };
    match several {
        true => tasks.into_par_iter().for_each(one),
        false => tasks.for_each(one),
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

struct Panels<'a, T> {
    p: &'a Product<T>,
    b: Elements<'a, T>,
    panels: Range<usize>,
    steps: Range<usize>,
    /// Of all panels, with all steps.
    out: *mut T,
}

impl<T: Vectors> Kernel<T> for Panels<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(self) {
        let Panels { p, b, panels, steps, out } = self;
        let out = out.wrapping_add(p.in_panels(panels.start, p.k));
        let place = Place { out, room: p.k, before: steps.start };
        // SAFETY: the caller's promise.
        unsafe { self::panels::<S>(p, b, panels, steps, place) }
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

/// Where panels go.
#[derive(Clone, Copy)]
pub(super) struct Place<T> {
    /// The first panel.
    pub out: *mut T,
    /// Steps that a panel has room for, and those that lie before what is packed.
    pub room: usize,
    pub before: usize,
}

/// Some steps of some panels of op(B): for each step of the summed dimension one row of columns in whole vectors, zeros
/// beyond the last.
///
/// # Safety
/// B must have the product's extents, the panels room for the steps, and `S`'s instructions be there.
#[inline(always)]
pub(super) unsafe fn panels<S: Simd>(
    p: &Product<S::Elem>,
    b: Elements<S::Elem>,
    some: Range<usize>,
    steps: Range<usize>,
    place: Place<S::Elem>,
) {
    let panel = Level::of::<S>().near_panel(p.n);
    let of = |q: usize| {
        let row = p.row(panel, q, S::LANES);
        let to = place.out.wrapping_add((q - some.start) * place.room * panel + place.before * row);
        (q * panel, panel.min(p.n - q * panel), row, to)
    };
    // SAFETY: rows and columns of op(B), all of which B has; the panels have room for the steps.
    unsafe {
        if p.trans_b {
            for q in some.clone() {
                let (first, cols, width, to) = of(q);
                if cols < width {
                    std::slice::from_raw_parts_mut(to, steps.len() * width).fill(num_traits::zero());
                }
                across::<S>(b, first * p.ldb + steps.start, p.ldb, cols, steps.len(), to, width);
            }
            return;
        }
        // Rows of all panels at a time, as they lie.
        for k in 0..steps.len() {
            for q in some.clone() {
                let (first, cols, width, to) = of(q);
                let (at, to) = ((steps.start + k) * p.ldb + first, to.add(k * width));
                if !b.is_whole() {
                    b.copy(at, std::slice::from_raw_parts_mut(to, cols));
                    std::slice::from_raw_parts_mut(to.add(cols), width - cols).fill(num_traits::zero());
                    continue;
                }
                let from = b.address(at);
                let mut j = 0;
                while j + S::LANES <= cols {
                    S::prefetch(from.wrapping_add(AHEAD * p.ldb + j));
                    S::store(to.add(j), S::load(from.add(j)));
                    j += S::LANES;
                }
                if j < cols {
                    S::store(to.add(j), S::load_part(from.add(j), cols - j));
                }
            }
        }
    }
}

/// Some steps of a panel of a transposed B, whose columns lie `ldb` apart from element `start` on.
///
/// # Safety
/// As of [`panels`].
#[inline(always)]
unsafe fn across<S: Simd>(
    b: Elements<S::Elem>,
    start: usize,
    ldb: usize,
    cols: usize,
    steps: usize,
    out: *mut S::Elem,
    width: usize,
) {
    // Some steps at a time: whole cache lines of B are used.
    for from in (0..steps).step_by(STEPS) {
        let count = STEPS.min(steps - from);
        for j in (0..cols).step_by(S::LANES) {
            let (at, lanes) = (start + j * ldb + from, S::LANES.min(cols - j));
            let out = out.wrapping_add(from * width + j);
            // SAFETY: so many columns' steps lie there, whether they are B's or widened; the panel has room for them.
            unsafe {
                match b {
                    Elements::Whole(b) => turn::<S>(b.as_ptr().add(at), ldb, [lanes, count], out, width),
                    half => {
                        let mut near = [num_traits::zero(); WIDEST * STEPS];
                        for (i, near) in near.chunks_exact_mut(STEPS).take(lanes).enumerate() {
                            half.copy(at + i * ldb, &mut near[..count]);
                        }
                        turn::<S>(near.as_ptr(), STEPS, [lanes, count], out, width);
                    }
                }
            }
        }
    }
}

/// Some steps of as many columns as a vector has elements, or of fewer.
///
/// # Safety
/// The columns' steps must lie there, `out` have room for them, and `S`'s instructions be there.
#[inline(always)]
unsafe fn turn<S: Simd>(
    columns: *const S::Elem,
    ld: usize,
    [lanes, count]: [usize; 2],
    out: *mut S::Elem,
    width: usize,
) {
    let whole = if lanes == S::LANES { count / S::LANES * S::LANES } else { 0 };
    // SAFETY: the caller's promise.
    unsafe {
        for k in (0..whole).step_by(S::LANES) {
            S::transpose(columns.add(k), ld, out.add(k * width), width);
        }
        for k in whole..count {
            for i in 0..lanes {
                *out.add(k * width + i) = *columns.add(i * ld + k);
            }
        }
    }
}

/// Rows of a strip.
#[inline(always)]
fn height<S: Simd>(p: &Product<S::Elem>) -> usize {
    let level = Level::of::<S>();
    level.rows(level.near_panel(p.n))
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
