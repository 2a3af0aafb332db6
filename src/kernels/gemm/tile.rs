//! A tile of a product: its sums in registers, and where they go.

use super::{Plus, Product};
use crate::kernels::ahead::Steps;
use crate::kernels::simd::{Simd, load_lanes, store_lanes};
use crate::kernels::tile::{Acc, Positions, ROUND, Terms, along_columns, along_rows};
use crate::tensor::Float;

/// Of terms `E`, which are summed up in `T`.
pub(super) struct Tile<'a, E, T> {
    /// A's elements of one step are neighbours.
    pub across: bool,
    pub a: *const E,
    pub lda: usize,
    pub b: *const E,
    /// From one of B's rows to the next, where they are read as they lie.
    pub ldb: Option<usize>,
    pub steps: usize,
    pub to: Target<'a, T>,
}

/// # Safety
/// `a` must be valid for `M` rows of `steps`, `b` for as many rows of `N` vectors (if packed) or of `to.lanes`
/// elements, and the target for `M` rows.
#[inline(always)]
pub(super) unsafe fn tile_run<D: Terms, const M: usize, const N: usize>(
    t: &Tile<D::Term, <D::S as Simd>::Elem>,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let lanes = D::S::LANES;
        t.to.fetch::<D::S, M, N>();
        let acc = if t.across {
            let positions = Positions {
                blocks: 1,
                rows: 1,
                steps: t.steps,
                a_block: 0,
                a_row: 0,
                a_step: t.lda,
                b_block: 0,
                b_row: 0,
                b_step: N * lanes,
                ahead: Steps::NOTHING,
            };
            match t.ldb {
                None => along_columns::<D, M, N, ROUND>(&positions, t.a, t.b, lanes),
                Some(b_step) => {
                    let tail = t.to.lanes - (N - 1) * lanes;
                    along_columns::<D, M, N, 1>(&Positions { b_step, ..positions }, t.a, t.b, tail)
                }
            }
        } else {
            let mut rows = [t.a; M];
            for i in 0..M {
                rows[i] = t.a.wrapping_add(i * t.lda);
            }
            along_rows::<D, M, N>(&[(0, t.steps)], rows, t.b, N * lanes)
        };
        t.to.write::<D::S, M, N>(&acc);
    }
}

/// Where a tile's sums go, and what is added to them.
pub(super) struct Target<'a, T> {
    p: &'a Product<T>,
    beta: T,
    /// What is added: `lanes` elements, and rows of them as C's.
    row: Option<*const T>,
    all: Option<*const T>,
    c: *mut T,
    pub lanes: usize,
}

impl<'a, T: Float> Target<'a, T> {
    /// Of the tile at `row` and column `first` of C.
    #[inline(always)]
    pub fn of(
        p: &'a Product<T>,
        plus: Plus<T>,
        c: *mut T,
        row: usize,
        first: usize,
        panel: usize,
        beta: T,
    ) -> Self {
        let at = row * p.ldc + first;
        Target {
            p,
            beta,
            row: plus.row.map(|r| r.as_ptr().wrapping_add(first)),
            all: plus.all.map(|x| x.as_ptr().wrapping_add(at)),
            c: c.wrapping_add(at),
            lanes: panel.min(p.n - first),
        }
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
                unsafe { S::prefetch(self.c.wrapping_add(i * self.p.ldc + j * S::LANES)) }
            }
        }
    }

    /// # Safety
    /// `row` must be valid for `lanes` elements, `all` and `c` for `M` rows of as many.
    #[inline(always)]
    pub unsafe fn write<S: Simd<Elem = T>, const M: usize, const N: usize>(&self, acc: &Acc<S, M, N>) {
        for j in 0..N {
            let mut column = [acc[0][j]; M];
            for i in 0..M {
                column[i] = acc[i][j];
            }
            let part = (self.lanes - j * S::LANES).min(S::LANES);
            // SAFETY: the caller's promise.
            unsafe {
                match part == S::LANES {
                    true => self.column::<S, M, true>(column, j * S::LANES, part),
                    false => self.column::<S, M, false>(column, j * S::LANES, part),
                }
            }
        }
    }

    /// A column of vectors, or of their first `part` lanes, from column `j` of the tile on.
    ///
    /// # Safety
    /// As of [`write`](Self::write).
    #[inline(always)]
    unsafe fn column<S: Simd<Elem = T>, const M: usize, const WHOLE: bool>(
        &self,
        mut column: [S::V; M],
        j: usize,
        part: usize,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let alpha = S::splat(self.p.alpha);
            for i in 0..M {
                column[i] = S::mul(column[i], alpha);
            }
            if let Some(r) = self.row {
                let row = load_lanes::<S, WHOLE>(r.add(j), part);
                for i in 0..M {
                    column[i] = S::add(column[i], row);
                }
            }
            if let Some(all) = self.all {
                for i in 0..M {
                    column[i] = S::add(column[i], load_lanes::<S, WHOLE>(all.add(i * self.p.ldc + j), part));
                }
            }
            if self.beta != num_traits::zero() {
                let beta = S::splat(self.beta);
                for i in 0..M {
                    let c = load_lanes::<S, WHOLE>(self.c.add(i * self.p.ldc + j), part);
                    column[i] = S::fma(c, beta, column[i]);
                }
            }
            for i in 0..M {
                store_lanes::<S, WHOLE>(self.c.add(i * self.p.ldc + j), column[i], part);
            }
        }
    }
}
