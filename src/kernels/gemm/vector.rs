//! Products with a vector: a matrix is read once, in its order.

use rayon::prelude::*;

use crate::kernels::gemm::{Plus, Product};
use crate::kernels::isa::vectorize;
use crate::kernels::par;
use crate::tensor::Float;

/// Products with one row or one column: bound by memory, so each matrix is read once, in its order.
pub(super) fn vector<T: Float>(p: &Product<T>, a: &[T], b: &[T], plus: Plus<T>, c: &mut [T]) {
    if plus.row.is_some() || plus.all.is_some() {
        // What is added is put there first.
        for (i, c) in c.chunks_mut(p.ldc.max(1)).enumerate().take(p.m) {
            for (j, c) in c.iter_mut().enumerate().take(p.n) {
                let row = plus.row.map_or(T::zero(), |r| r[j]);
                let all = plus.all.map_or(T::zero(), |x| x[i * p.ldc + j]);
                let before = if p.beta == T::zero() { T::zero() } else { p.beta * *c };
                *c = before + row + all;
            }
        }
        return vector(&Product { beta: T::one(), ..*p }, a, b, Plus::NOTHING, c);
    }
    // y = alpha · M·v + beta · y, with M's element (j, k) at j·ld + k, or at k·ld + j when `across`.
    let row = p.m == 1;
    let (matrix, ld, across) = if row { (b, p.ldb, !p.trans_b) } else { (a, p.lda, p.trans_a) };
    let (v, v_step) = match (row, if row { p.trans_a } else { !p.trans_b }) {
        (true, strided) => (a, if strided { p.lda } else { 1 }),
        (false, strided) => (b, if strided { p.ldb } else { 1 }),
    };
    let (len, step) = if row { (p.n, 1) } else { (p.m, p.ldc) };
    let put = |y: &mut T, sum: T| {
        *y = if p.beta == T::zero() { p.alpha * sum } else { p.alpha * sum + p.beta * *y };
    };
    let piece = |j: usize, y: &mut [T]| {
        let n = y.len().div_ceil(step);
        vectorize(
            #[inline(always)]
            || {
                if across {
                    const W: usize = 128;
                    for j0 in (0..n).step_by(W) {
                        let w = W.min(n - j0);
                        let mut sums = [T::zero(); W];
                        for k in 0..p.k {
                            let from = k * ld + j + j0;
                            let x = v[k * v_step];
                            for (s, m) in sums[..w].iter_mut().zip(&matrix[from..from + w]) {
                                *s += x * *m;
                            }
                        }
                        for (i, s) in sums[..w].iter().enumerate() {
                            put(&mut y[(j0 + i) * step], *s);
                        }
                    }
                } else {
                    for i in 0..n {
                        let from = (j + i) * ld;
                        let m = &matrix[from..from + p.k];
                        let sum = match v_step {
                            1 => dot(m, &v[..p.k]),
                            _ => m.iter().enumerate().map(|(k, m)| *m * v[k * v_step]).sum(),
                        };
                        put(&mut y[i * step], sum);
                    }
                }
            },
        )
    };
    let y = &mut c[..(len - 1) * step + 1];
    let grain = (4 * par::GRAIN / p.k.max(1)).max(128) * step;
    if p.k * len < 4 * par::GRAIN {
        piece(0, y);
    } else {
        y.par_chunks_mut(grain).enumerate().for_each(|(i, y)| piece(i * grain / step, y));
    }
}

/// `Σ aᵢ·bᵢ` in 64 lanes and a fixed tree.
#[inline(always)]
fn dot<T: Float>(a: &[T], b: &[T]) -> T {
    const LANES: usize = 64;
    let mut sums = [T::zero(); LANES];
    let whole = a.len() / LANES * LANES;
    for (a, b) in a[..whole].chunks_exact(LANES).zip(b[..whole].chunks_exact(LANES)) {
        for i in 0..LANES {
            sums[i] += a[i] * b[i];
        }
    }
    for (i, (a, b)) in a[whole..].iter().zip(&b[whole..]).enumerate() {
        sums[i] += *a * *b;
    }
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
        half /= 2;
    }
    sums[0]
}
