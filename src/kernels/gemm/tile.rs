//! A tile of a product: its sums in registers, and where they go.

use super::{Plus, Product};
use crate::kernels::ahead::Steps;
use crate::kernels::simd::{Simd, load_nth, store_nth};
use crate::kernels::tile::{Acc, Positions, ROUND, Terms, along_columns, along_rows};
use crate::tensor::Float;

/// Tiles below each other, of terms `E` that are summed up in `T`.
pub(super) struct Tiles<E, T> {
    pub count: usize,
    /// A's elements of one step are neighbours.
    pub across: bool,
    /// A of the first one, and from one to the next.
    pub a: *const E,
    pub a_tile: usize,
    pub lda: usize,
    pub b: *const E,
    /// From one of B's rows to the next, where they are read as they lie.
    pub ldb: Option<usize>,
    pub steps: usize,
    /// Of the first one.
    pub to: Target<T>,
}

/// Tiles of `M` rows by `N` vectors. (What is decided or known for all of them would take a tenth of a short sum's time if it were
/// for each.)
///
/// # Safety
/// `a` must be valid for each tile's `M` rows of `steps`, `b` for as many rows of `N` vectors (if packed) or of `to.lanes`
/// elements, and the target for all rows.
#[inline(always)]
pub(super) unsafe fn tiles_run<D: Terms, const M: usize, const N: usize>(
    t: &Tiles<D::Term, <D::S as Simd>::Elem>,
) {
    let (lanes, mut a, mut to) = (D::S::LANES, t.a, t.to);
    let (b, steps, lda) = (t.b, t.steps, t.lda);
    for _ in 0..t.count {
        // SAFETY: the caller's promise.
        unsafe {
            to.fetch::<D::S, M, N>();
            let acc = if t.across {
                let positions = Positions {
                    blocks: 1,
                    rows: 1,
                    steps,
                    a_block: 0,
                    a_row: 0,
                    a_step: lda,
                    b_block: 0,
                    b_row: 0,
                    b_step: N * lanes,
                    ahead: Steps::NOTHING,
                };
                match t.ldb {
                    None => along_columns::<D, M, N, ROUND>(&positions, a, b, lanes),
                    Some(b_step) => {
                        let tail = to.lanes - (N - 1) * lanes;
                        along_columns::<D, M, N, 1>(&Positions { b_step, ..positions }, a, b, tail)
                    }
                }
            } else {
                let mut rows = [a; M];
                for i in 0..M {
                    rows[i] = a.wrapping_add(i * lda);
                }
                along_rows::<D, M, N>(&[(0, steps)], rows, b, N * lanes)
            };
            to.write::<D::S, M, N>(&acc);
        }
        a = a.wrapping_add(t.a_tile);
        to.advance(M);
    }
}

/// Where a tile's sums go, and what is added to them.
#[derive(Clone, Copy)]
pub(super) struct Target<T> {
    alpha: T,
    beta: T,
    ldc: usize,
    /// What is added: `lanes` elements, and rows of them as C's.
    row: Option<*const T>,
    all: Option<*const T>,
    c: *mut T,
    pub lanes: usize,
}

impl<T: Float> Target<T> {
    /// Of the tile at `row` and column `first` of C.
    #[inline(always)]
    pub fn of(
        p: &Product<T>,
        plus: Plus<T>,
        c: *mut T,
        row: usize,
        first: usize,
        panel: usize,
        beta: T,
    ) -> Self {
        let at = row * p.ldc + first;
        Target {
            alpha: p.alpha,
            beta,
            ldc: p.ldc,
            row: plus.row.map(|r| r.as_ptr().wrapping_add(first)),
            all: plus.all.map(|x| x.as_ptr().wrapping_add(at)),
            c: c.wrapping_add(at),
            lanes: panel.min(p.n - first),
        }
    }

    /// To the rows that follow so many.
    #[inline(always)]
    fn advance(&mut self, rows: usize) {
        let step = rows * self.ldc;
        self.all = self.all.map(|x| x.wrapping_add(step));
        self.c = self.c.wrapping_add(step);
    }

    /// Brings C near, while sums are added up.
    ///
    /// # Safety
    /// The processor must have `S`'s instructions.
    #[inline(always)]
    pub unsafe fn fetch<S: Simd<Elem = T>, const M: usize, const N: usize>(&self) {
        for i in 0..M {
            for j in 0..N {
                // SAFETY: the caller's promise.
                unsafe { S::prefetch(self.c.wrapping_add(i * self.ldc + j * S::LANES)) }
            }
        }
    }

    /// # Safety
    /// `row` must be valid for `lanes` elements, `all` and `c` for `M` rows of as many.
    #[inline(always)]
    pub unsafe fn write<S: Simd<Elem = T>, const M: usize, const N: usize>(&self, acc: &Acc<S, M, N>) {
        let whole = self.lanes == N * S::LANES;
        // SAFETY: the caller's promise.
        unsafe { if whole { self.put::<S, M, N, true>(*acc) } else { self.put::<S, M, N, false>(*acc) } }
    }

    /// Short loops, which are unrolled, so that sums stay in registers.
    ///
    /// # Safety
    /// As of [`write`](Self::write); are all vectors `WHOLE`?
    #[inline(always)]
    unsafe fn put<S: Simd<Elem = T>, const M: usize, const N: usize, const WHOLE: bool>(
        &self,
        mut acc: Acc<S, M, N>,
    ) {
        let (ldc, lanes, tail) = (self.ldc, S::LANES, self.lanes - (N - 1) * S::LANES);
        // SAFETY: the caller's promise.
        unsafe {
            let alpha = S::splat(self.alpha);
            for i in 0..M {
                for j in 0..N {
                    acc[i][j] = S::mul(acc[i][j], alpha);
                }
            }
            if let Some(row) = self.row {
                for j in 0..N {
                    let v = load_nth::<S, N, WHOLE>(row.add(j * lanes), j, tail);
                    for i in 0..M {
                        acc[i][j] = S::add(acc[i][j], v);
                    }
                }
            }
            if let Some(all) = self.all {
                for i in 0..M {
                    for j in 0..N {
                        let v = load_nth::<S, N, WHOLE>(all.add(i * ldc + j * lanes), j, tail);
                        acc[i][j] = S::add(acc[i][j], v);
                    }
                }
            }
            if self.beta != num_traits::zero() {
                let beta = S::splat(self.beta);
                for i in 0..M {
                    for j in 0..N {
                        let c = load_nth::<S, N, WHOLE>(self.c.add(i * ldc + j * lanes), j, tail);
                        acc[i][j] = S::fma(c, beta, acc[i][j]);
                    }
                }
            }
            for i in 0..M {
                for j in 0..N {
                    store_nth::<S, N, WHOLE>(self.c.add(i * ldc + j * lanes), j, acc[i][j], tail);
                }
            }
        }
    }
}
