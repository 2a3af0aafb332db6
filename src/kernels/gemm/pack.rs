//! Operands of a product in the order in which its tiles read them.

use rayon::prelude::*;

use super::Product;
use crate::kernels::par::{self, Shared};
use crate::kernels::simd::{Kernel, Simd, Vectors, load_up_to, store_up_to};

/// Steps of the summed dimension that are packed at a time.
const STEPS: usize = 64;
/// Strips that are written at a time.
const GROUP: usize = 4;
/// Steps that rows are fetched ahead: neighbours in a panel are far apart in B.
const AHEAD: usize = 12;

/// op(B) in panels, by several tasks where it is large.
pub(super) fn columns<T: Vectors>(p: &Product<T>, b: &[T], out: &mut [T]) {
    let size = (p.k * T::panel()).max(1);
    // SAFETY: the callers checked the extents of B; a panel has `size` elements.
    let one = |(q, out): (usize, &mut [T])| unsafe { T::dispatch(Panel { p, b, q, out }) };
    match out.len() < par::GRAIN {
        true => out.chunks_mut(size).enumerate().for_each(one),
        false => out.par_chunks_mut(size).enumerate().for_each(one),
    }
}

/// op(B) in panels, by this task.
pub(super) fn columns_here<T: Vectors>(p: &Product<T>, b: &[T], out: &mut [T]) {
    let size = (p.k * T::panel()).max(1);
    for (q, out) in out.chunks_mut(size).enumerate() {
        // SAFETY: as above.
        unsafe { T::dispatch(Panel { p, b, q, out }) }
    }
}

/// A, stored K×M, in strips: for each step of the summed dimension the strip's rows of op(A). Some steps at a time
/// for all strips, so that A is read in order.
pub(super) fn rows<T: Vectors>(p: &Product<T>, a: &[T], out: &mut [T]) {
    assert!(a.len() >= p.extents()[0] && out.len() >= p.packed_a(), "operands of a product");
    let out = Shared::new(out);
    (0..p.k.div_ceil(STEPS)).into_par_iter().for_each(|block| {
        // SAFETY: lengths were checked; each task writes its own steps.
        unsafe { T::dispatch(Strips { p, a, from: block * STEPS, out: out.ptr() }) }
    });
}

/// Panel `q` of op(B): for each step of the summed dimension one row of columns, zeros beyond the last.
struct Panel<'a, T> {
    p: &'a Product<T>,
    b: &'a [T],
    q: usize,
    out: &'a mut [T],
}

impl<T: Vectors> Kernel<T> for Panel<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(self) {
        let Panel { p, b, q, out } = self;
        let panel = 2 * S::LANES;
        let first = q * panel;
        let cols = panel.min(p.n - first);
        if cols < panel {
            out.fill(T::zero());
        }
        let (b, out) = (b.as_ptr(), out.as_mut_ptr());
        // SAFETY: rows and columns of op(B), all of which B has; the panel has `k` rows.
        unsafe {
            if !p.trans_b {
                let b = b.add(first);
                for k in 0..p.k {
                    S::prefetch(b.wrapping_add((k + AHEAD) * p.ldb));
                    S::prefetch(b.wrapping_add((k + AHEAD) * p.ldb + S::LANES));
                    let (from, to) = (b.add(k * p.ldb), out.add(k * panel));
                    let mut j = 0;
                    while j < cols {
                        let part = S::LANES.min(cols - j);
                        store_up_to::<S>(to.add(j), load_up_to::<S>(from.add(j), part), part);
                        j += S::LANES;
                    }
                }
                return;
            }
            // Some steps at a time: whole cache lines of B are used.
            let mut from = 0;
            while from < p.k {
                let to = p.k.min(from + STEPS);
                let mut j = 0;
                while j + S::LANES <= cols {
                    let rows = b.add((first + j) * p.ldb);
                    let mut k = from;
                    while k + S::LANES <= to {
                        S::transpose(rows.add(k), p.ldb, out.add(k * panel + j), panel);
                        k += S::LANES;
                    }
                    for k in k..to {
                        for i in 0..S::LANES {
                            *out.add(k * panel + j + i) = *rows.add(i * p.ldb + k);
                        }
                    }
                    j += S::LANES;
                }
                for j in j..cols {
                    for k in from..to {
                        *out.add(k * panel + j) = *b.add((first + j) * p.ldb + k);
                    }
                }
                from = to;
            }
        }
    }
}

/// The steps of all strips from `from` on.
struct Strips<'a, T> {
    p: &'a Product<T>,
    a: &'a [T],
    from: usize,
    out: *mut T,
}

impl<T: Vectors> Kernel<T> for Strips<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(self) {
        let Strips { p, a, from, out } = self;
        let strips = p.strips();
        let a = a.as_ptr();
        let to = p.k.min(from + STEPS);
        // A few strips at a time: more places to write to than that push each other out of the cache.
        let mut group = 0;
        while group < strips.count {
            let end = strips.count.min(group + GROUP);
            for k in from..to {
                for i in group..end {
                    let (start, len) = (strips.start(i), strips.len(i));
                    // SAFETY: the step's rows of A, and the strip's place for them.
                    unsafe {
                        let from = a.add(k * p.lda + start);
                        let to = out.add((i * p.k + k) * S::ROWS);
                        if len < S::ROWS {
                            for r in 0..S::ROWS {
                                *to.add(r) = if r < len { *from.add(r) } else { num_traits::zero() };
                            }
                            continue;
                        }
                        let mut r = 0;
                        while r < S::ROWS {
                            let part = S::LANES.min(S::ROWS - r);
                            store_up_to::<S>(to.add(r), load_up_to::<S>(from.add(r), part), part);
                            r += S::LANES;
                        }
                    }
                }
            }
            group = end;
        }
    }
}
