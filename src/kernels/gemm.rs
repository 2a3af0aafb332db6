//! Matrix products on row-major slices.
//!
//! The `gemm` crate computes single-threaded inside tiles that depend on the problem alone, and over blocks of
//! `KC` in order, so that the bits of a result do not depend on the number of threads. (It takes up to 512
//! steps of K in one pass on every machine; longer ones it divides by the size of the cache.)

#![allow(unsafe_code)]

use std::marker::PhantomData;

use rayon::prelude::*;

use crate::kernels::isa::vectorize;
use crate::kernels::par;
use crate::tensor::Float;

/// Steps of the summed dimension that are accumulated in registers before they are added to `C`.
pub const KC: usize = 512;
/// Multiply-adds worth a task of their own.
const TASK: usize = 1 << 20;
/// Tiles that a large product is divided into at least.
const TILES: usize = 32;

/// `C = alpha · op(A) · op(B) + beta · C` with `op(A)` of M×K, `op(B)` of K×N, row-major; `ld*` is the distance
/// of rows as stored. With `beta` 0, `C` is not read.
#[derive(Debug, Clone, Copy)]
pub struct Product<T> {
    pub trans_a: bool,
    pub trans_b: bool,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub alpha: T,
    pub lda: usize,
    pub ldb: usize,
    pub beta: T,
    pub ldc: usize,
}

impl<T: Float> Product<T> {
    /// `C = op(A) · op(B)` of dense matrices.
    pub fn dense(trans_a: bool, trans_b: bool, m: usize, n: usize, k: usize) -> Self {
        let (lda, ldb) = (if trans_a { m } else { k }, if trans_b { k } else { n });
        Product { trans_a, trans_b, m, n, k, alpha: T::one(), lda, ldb, beta: T::zero(), ldc: n }
    }

    /// The part of rows `i..i+m` and columns `j..j+n`, and where it begins in A, B and C.
    fn part(&self, i: usize, m: usize, j: usize, n: usize) -> (Self, [usize; 3]) {
        let a = if self.trans_a { i } else { i * self.lda };
        let b = if self.trans_b { j * self.ldb } else { j };
        (Product { m, n, ..*self }, [a, b, i * self.ldc + j])
    }

    /// Elements that A, B and C must at least have.
    fn extents(&self) -> [usize; 3] {
        let extent = |rows: usize, cols: usize, ld: usize| match rows * cols {
            0 => 0,
            _ => (rows - 1) * ld + cols,
        };
        let (m, n, k) = (self.m, self.n, self.k);
        let a = if self.trans_a { extent(k, m, self.lda) } else { extent(m, k, self.lda) };
        let b = if self.trans_b { extent(n, k, self.ldb) } else { extent(k, n, self.ldb) };
        [a, b, extent(m, n, self.ldc)]
    }

    /// On the calling thread.
    pub fn serial(&self, a: &[T], b: &[T], c: &mut [T]) {
        let need = self.extents();
        assert!(a.len() >= need[0] && b.len() >= need[1] && c.len() >= need[2], "operands of a product");
        assert!(self.m <= 1 || self.ldc >= self.n, "rows of a product overlap");
        // SAFETY: the slices hold all that the strides reach, and `c` is borrowed exclusively.
        unsafe { self.raw(a.as_ptr(), b.as_ptr(), c.as_mut_ptr()) }
    }

    /// # Safety
    /// The pointers must be valid for `extents()` elements, `c` for writing and without other users of the
    /// elements of this product.
    pub(crate) unsafe fn raw(&self, a: *const T, b: *const T, c: *mut T) {
        let (lda, ldb, ldc) = (self.lda as isize, self.ldb as isize, self.ldc as isize);
        let (a_rs, a_cs) = if self.trans_a { (1, lda) } else { (lda, 1) };
        let (b_rs, b_cs) = if self.trans_b { (1, ldb) } else { (ldb, 1) };
        let mut done = 0;
        while done < self.k || done == 0 {
            let k = KC.min(self.k - done);
            let keep = if done == 0 { self.beta } else { T::one() };
            // SAFETY: the caller's promise. `conj_dst` means nothing for real numbers; it keeps the crate from its
            // matrix-vector routines, whose results depend on how the operands happen to be aligned.
            unsafe {
                gemm::gemm(
                    self.m,
                    self.n,
                    k,
                    c,
                    1,
                    ldc,
                    keep != T::zero(),
                    a.offset(done as isize * a_cs),
                    a_cs,
                    a_rs,
                    b.offset(done as isize * b_rs),
                    b_cs,
                    b_rs,
                    keep,
                    self.alpha,
                    true,
                    false,
                    false,
                    gemm::Parallelism::None,
                );
            }
            done += KC;
        }
    }

    /// Extents of the tiles the product is divided into, by its size and the number of such products alone.
    pub fn tiles(&self, batch: usize) -> (usize, usize) {
        let (mut tm, mut tn) = (self.m.clamp(1, 128), self.n.clamp(1, 480));
        loop {
            let tiles = self.m.div_ceil(tm) * self.n.div_ceil(tn) * batch;
            if tiles >= TILES || tm * tn * self.k < 2 * TASK {
                return (tm, tn);
            }
            // Whole register tiles: 48 columns and 8 rows suit AVX-512, AVX2 and NEON.
            if tn > 96 && tn >= tm {
                tn = (tn / 2).next_multiple_of(48);
            } else if tm > 16 {
                tm = (tm / 2).next_multiple_of(8);
            } else {
                return (tm, tn);
            }
        }
    }
}

/// `C = alpha · op(A) · op(B) + beta · C`; see [`Product`].
#[allow(clippy::too_many_arguments)]
pub fn gemm<T: Float>(
    trans_a: bool,
    trans_b: bool,
    m: usize,
    n: usize,
    k: usize,
    alpha: T,
    a: &[T],
    lda: usize,
    b: &[T],
    ldb: usize,
    beta: T,
    c: &mut [T],
    ldc: usize,
) {
    let p = Product { trans_a, trans_b, m, n, k, alpha, lda, ldb, beta, ldc };
    many(&p, 1, |_| [0, 0], a, b, c, 0);
}

/// `batch` products of equal extents: the `i`th reads A and B from the offsets `at(i)` and writes C at
/// `i · c_stride`.
pub fn many<T: Float>(
    p: &Product<T>,
    batch: usize,
    at: impl Fn(usize) -> [usize; 2] + Sync,
    a: &[T],
    b: &[T],
    c: &mut [T],
    c_stride: usize,
) {
    let need = p.extents();
    if batch == 0 || need[2] == 0 {
        return;
    }
    assert!(p.m <= 1 || p.ldc >= p.n, "rows of a product overlap");
    assert!(batch == 1 || c_stride >= need[2], "products overlap");
    assert!(c.len() >= (batch - 1) * c_stride + need[2], "operands of a product");
    let check = |[i, j]: [usize; 2]| {
        assert!(a.len() >= i + need[0] && b.len() >= j + need[1], "operands of a product");
    };
    if p.m == 1 || p.n == 1 {
        for i in 0..batch {
            let o = at(i);
            check(o);
            vector(p, &a[o[0]..], &b[o[1]..], &mut c[i * c_stride..]);
        }
        return;
    }
    let (tm, tn) = p.tiles(batch);
    let (rows, cols) = (p.m.div_ceil(tm), p.n.div_ceil(tn));
    let shared = Shared::new(c);
    let tile = |t: usize| {
        let (i, t) = (t / (rows * cols), t % (rows * cols));
        let (row, col) = (t / cols * tm, t % cols * tn);
        let (part, o) = p.part(row, tm.min(p.m - row), col, tn.min(p.n - col));
        let offsets = at(i);
        check(offsets);
        // SAFETY: operands were checked above; no two tiles share an element of C.
        unsafe {
            part.raw(
                a.as_ptr().add(offsets[0] + o[0]),
                b.as_ptr().add(offsets[1] + o[1]),
                shared.ptr().add(i * c_stride + o[2]),
            )
        }
    };
    let tiles = batch * rows * cols;
    if tiles == 1 || p.m * p.n * p.k * batch < 2 * TASK / 8 {
        (0..tiles).for_each(tile);
    } else {
        (0..tiles).into_par_iter().for_each(tile);
    }
}

/// Products with one row or one column: bound by memory, so each matrix is read once, in its order.
fn vector<T: Float>(p: &Product<T>, a: &[T], b: &[T], c: &mut [T]) {
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
pub fn dot<T: Float>(a: &[T], b: &[T]) -> T {
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

/// A slice that several tasks write, each its own elements.
pub(crate) struct Shared<'a, T>(*mut T, PhantomData<&'a mut [T]>);

// SAFETY: access goes through `part`, whose callers promise disjointness, and `T` may move between threads.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(crate) fn new(all: &'a mut [T]) -> Self {
        Shared(all.as_mut_ptr(), PhantomData)
    }

    pub(crate) fn ptr(&self) -> *mut T {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn random(n: usize, seed: u64) -> Vec<f32> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
    }

    const SIZES: [(usize, usize, usize); 16] = [
        (1, 1, 1),
        (1, 300, 700),
        (300, 1, 700),
        (1, 5000, 130),
        (5000, 1, 3),
        (2, 3, 1),
        (3, 2, 2),
        (17, 5, 3),
        (64, 64, 64),
        (129, 131, 257),
        (16, 1000, 144),
        (16, 144, 5000),
        (300, 301, 1030),
        (512, 500, 20),
        (7, 2000, 513),
        (4, 4, 0),
    ];

    fn each(mut f: impl FnMut(Product<f32>)) {
        for (m, n, k) in SIZES {
            for t in 0..4 {
                let p = Product::dense(t & 1 == 1, t & 2 == 2, m, n, k);
                f(p);
                f(Product { alpha: 0.5, beta: -1.5, lda: p.lda + 3, ldb: p.ldb + 1, ldc: n + 2, ..p });
            }
        }
    }

    fn run<T: Float>(p: Product<T>, a: &[T], b: &[T], c: &[T]) -> Vec<T> {
        let mut c = c.to_vec();
        gemm(p.trans_a, p.trans_b, p.m, p.n, p.k, p.alpha, a, p.lda, b, p.ldb, p.beta, &mut c, p.ldc);
        c
    }

    fn operands(p: &Product<f32>) -> [Vec<f32>; 3] {
        let [a, b, c] = p.extents();
        [random(a, 1), random(b, 2), random(c, 3)]
    }

    #[test]
    fn equals_the_sum_it_stands_for() {
        each(|p| {
            let [a, b, c] = operands(&p);
            let (narrow, wide) = (run(p, &a, &b, &c), {
                let wide = |x: &[f32]| x.iter().map(|&x| x as f64).collect::<Vec<f64>>();
                let q = Product::<f64> {
                    trans_a: p.trans_a,
                    trans_b: p.trans_b,
                    m: p.m,
                    n: p.n,
                    k: p.k,
                    alpha: p.alpha as f64,
                    lda: p.lda,
                    ldb: p.ldb,
                    beta: p.beta as f64,
                    ldc: p.ldc,
                };
                run(q, &wide(&a), &wide(&b), &wide(&c))
            });
            for i in 0..p.m {
                for j in 0..p.n {
                    let sum: f64 = (0..p.k)
                        .map(|k| {
                            let a = if p.trans_a { a[k * p.lda + i] } else { a[i * p.lda + k] };
                            let b = if p.trans_b { b[j * p.ldb + k] } else { b[k * p.ldb + j] };
                            a as f64 * b as f64
                        })
                        .sum();
                    let at = i * p.ldc + j;
                    let want = p.alpha as f64 * sum + p.beta as f64 * c[at] as f64;
                    let scale = (p.k as f64).sqrt().max(1.0);
                    assert!((want - wide[at]).abs() < 1e-13 * scale, "{p:?} {want} {}", wide[at]);
                    assert!((want - narrow[at] as f64).abs() < 2e-6 * scale, "{p:?} {want} {}", narrow[at]);
                }
            }
            for i in 0..p.m.saturating_sub(1) {
                for j in p.n..p.ldc {
                    assert_eq!(narrow[i * p.ldc + j], c[i * p.ldc + j], "{p:?} wrote between rows");
                }
            }
        });
    }

    #[test]
    fn without_beta_c_is_not_read() {
        each(|p| {
            let [a, b, c] = operands(&p);
            let p = Product { beta: 0.0, ..p };
            let y = run(p, &a, &b, &vec![f32::NAN; c.len()]);
            assert!((0..p.m).all(|i| (0..p.n).all(|j| y[i * p.ldc + j].is_finite())), "{p:?}");
        });
    }

    #[test]
    fn bits_do_not_depend_on_threads_or_alignment() {
        let pools: Vec<_> =
            (1..5).map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap()).collect();
        each(|p| {
            let [a, b, c] = operands(&p);
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            let first = bits(&run(p, &a, &b, &c));
            for (n, pool) in pools.iter().enumerate() {
                assert!(first == bits(&pool.install(|| run(p, &a, &b, &c))), "{p:?} on {} threads", n + 1);
            }
            for shift in [1, 5] {
                let moved = |x: &[f32]| [&vec![0.0; shift][..], x].concat();
                let (a, b) = (moved(&a), moved(&b));
                assert!(first == bits(&run(p, &a[shift..], &b[shift..], &c)), "{p:?} moved by {shift}");
            }
        });
    }
}
