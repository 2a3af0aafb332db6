//! Matrix products on row-major slices.
//!
//! B is packed in panels of two vectors' columns (unless rows of it can be read as they lie); register tiles of a few
//! rows by one panel do the rest (`tile`). Work is divided by the extents alone and every element of C is summed in one
//! order, so the bits of a result do not depend on the number of threads.

#![allow(unsafe_code, clippy::needless_range_loop)]

mod pack;
mod vector;

use std::ops::Range;

use rayon::prelude::*;

use crate::kernels::par::Shared;
use crate::kernels::simd::{Kernel, Simd, Vectors, load_up_to, store_up_to};
use crate::kernels::tile::{Pieces, Positions, along_columns, along_rows};
use crate::tensor::Float;
use crate::tile_sizes;

/// Multiply-adds worth a task of their own.
const WORK: usize = 1 << 19;
/// Multiply-adds of a product that is divided itself where there are several.
const LARGE: usize = 1 << 23;
/// Tasks that keep the threads of a small machine equally busy.
const TASKS: usize = 16;
/// Elements of A that stay in the second-level cache while B passes by.
const BLOCK: usize = 1 << 17;
/// Steps of the summed dimension that are added up in registers before they are added to C: of few, sums are more
/// accurate and B's panel stays in the cache. Fewer when A is read across its rows as they lie.
const STEPS: usize = 512;
const STEPS_ACROSS: usize = 128;
/// Tasks that pack a B of their own at a time.
const SLOTS: usize = 8;

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
}

impl<T: Vectors> Product<T> {
    /// Elements of B in panels.
    fn packed(&self) -> usize {
        self.n.next_multiple_of(T::panel()) * self.k
    }

    fn work(&self) -> usize {
        self.m * self.n * self.k
    }

    fn is_vector(&self) -> bool {
        self.m == 1 || self.n == 1
    }

    /// Rows of B can be read where they lie.
    fn direct(&self) -> bool {
        self.trans_a && !self.trans_b
    }

    fn packs_b(&self) -> bool {
        !self.direct() || self.packed_a() > 0
    }

    /// Rows of C in tiles' strips.
    fn strips(&self) -> Pieces {
        Pieces::of(self.m, T::rows())
    }

    /// Elements of A in strips, for products that read it across its rows so often that it is packed.
    fn packed_a(&self) -> usize {
        if self.trans_a && self.work() >= LARGE { self.strips().count * T::rows() * self.k } else { 0 }
    }

    /// How many pieces the strips and the panels of C are divided into.
    fn pieces(&self) -> (usize, usize) {
        let tasks = (self.work() / WORK).clamp(1, TASKS);
        let (rows, cols) = (self.strips().count, self.n.div_ceil(T::panel()));
        if self.trans_a {
            // Either operand is read by a few tasks only.
            let m = tasks.isqrt().min(rows);
            (m, tasks.div_ceil(m).min(cols))
        } else if self.m >= self.n {
            let m = tasks.min(rows);
            (m, tasks.div_ceil(m).min(cols))
        } else {
            // B is the larger operand: each task then reads its own part of it.
            let n = tasks.min(cols);
            (tasks.div_ceil(n).min(rows), n)
        }
    }
}

/// What is added to products besides.
#[derive(Debug, Clone, Copy)]
pub struct Plus<'a, T> {
    /// To each row: N elements.
    pub row: Option<&'a [T]>,
    /// Elements that lie as those of C.
    pub all: Option<&'a [T]>,
}

impl<T> Plus<'_, T> {
    pub const NOTHING: Self = Plus { row: None, all: None };
}

/// `C = alpha · op(A) · op(B) + beta · C`; see [`Product`]. `scratch` has [`room`]`(p, 1)` elements.
pub fn gemm<T: Vectors>(p: &Product<T>, a: &[T], b: &[T], c: &mut [T], scratch: &mut [T]) {
    many(p, 1, |_| [0, 0], a, b, Plus::NOTHING, c, 0, scratch);
}

/// Elements of scratch that [`many`] needs for a batch of products.
pub fn room<T: Vectors>(p: &Product<T>, batch: usize) -> usize {
    match () {
        _ if p.is_vector() => 0,
        _ if batch == 1 || p.work() >= LARGE => p.packed_a() + if p.packs_b() { p.packed() } else { 0 },
        _ if p.direct() => 0,
        _ => p.packed() * batch.min(SLOTS),
    }
}

/// `batch` products of equal extents, plus something: the `i`th reads A and B from the offsets `at(i)` and writes C at
/// `i · c_stride`.
#[allow(clippy::too_many_arguments)]
pub fn many<T: Vectors>(
    p: &Product<T>,
    batch: usize,
    at: impl Fn(usize) -> [usize; 2] + Sync,
    a: &[T],
    b: &[T],
    plus: Plus<T>,
    c: &mut [T],
    c_stride: usize,
    scratch: &mut [T],
) {
    let need = p.extents();
    if batch == 0 || need[2] == 0 {
        return;
    }
    assert!(p.m <= 1 || p.ldc >= p.n, "rows of a product overlap");
    assert!(batch == 1 || c_stride >= need[2], "products overlap");
    assert!(c.len() >= (batch - 1) * c_stride + need[2], "operands of a product");
    assert!(plus.row.is_none_or(|r| r.len() >= p.n), "operands of a product");
    assert!(plus.all.is_none_or(|x| x.len() >= (batch - 1) * c_stride + need[2]), "operands of a product");
    let added = |i: usize| Plus { all: plus.all.map(|x| &x[i * c_stride..]), ..plus };
    let operands = |i: usize| {
        let [i, j] = at(i);
        assert!(a.len() >= i + need[0] && b.len() >= j + need[1], "operands of a product");
        (&a[i..], &b[j..])
    };
    if p.is_vector() {
        for i in 0..batch {
            let (a, b) = operands(i);
            vector::vector(p, a, b, added(i), &mut c[i * c_stride..]);
        }
    } else if batch == 1 || p.work() >= LARGE {
        for i in 0..batch {
            let (a, b) = operands(i);
            divided(p, a, b, added(i), &mut c[i * c_stride..], scratch);
        }
    } else {
        let shared = Shared::new(c);
        let one = |i: usize, packed: &mut [T]| {
            let (a, b) = operands(i);
            let b = match p.direct() {
                true => Columns { b, packed: false },
                false => {
                    pack::columns_here(p, b, packed);
                    Columns { b: packed, packed: true }
                }
            };
            let c = shared.ptr().wrapping_add(i * c_stride);
            let panels = 0..p.n.div_ceil(T::panel());
            let a = Rows { a, packed: false };
            // SAFETY: the extents were checked above; no two products share elements of C.
            unsafe { T::dispatch(Part { p, a, b, plus: added(i), c, strips: 0..p.strips().count, panels }) }
        };
        if p.direct() || p.k == 0 {
            (0..batch).into_par_iter().for_each(|i| one(i, &mut []));
        } else {
            let slots = batch.min(SLOTS);
            let each = scratch.par_chunks_exact_mut(p.packed()).take(slots).enumerate();
            each.for_each(|(s, slot)| {
                (batch * s / slots..batch * (s + 1) / slots).for_each(|i| one(i, slot));
            });
        }
    }
}

/// One product, divided into tasks.
fn divided<T: Vectors>(p: &Product<T>, a: &[T], b: &[T], plus: Plus<T>, c: &mut [T], scratch: &mut [T]) {
    let (packed_a, rest) = scratch.split_at_mut(p.packed_a());
    let strips = p.strips();
    let a = match packed_a.is_empty() {
        true => Rows { a, packed: false },
        false => {
            pack::rows(p, a, packed_a);
            Rows { a: packed_a, packed: true }
        }
    };
    let b = if p.packs_b() {
        let packed = &mut rest[..p.packed()];
        pack::columns(p, b, packed);
        Columns { b: packed, packed: true }
    } else {
        Columns { b, packed: false }
    };
    let (rows, cols) = p.pieces();
    let panels = p.n.div_ceil(T::panel());
    let c = Shared::new(c);
    let share = |i: usize, of: usize, total: usize| total * i / of..total * (i + 1) / of;
    let run = |task: usize| {
        let (i, j) = (task / cols, task % cols);
        let part = Part {
            p,
            a,
            b,
            plus,
            c: c.ptr(),
            strips: share(i, rows, strips.count),
            panels: share(j, cols, panels),
        };
        // SAFETY: the callers checked the extents; no two tasks share elements of C.
        unsafe { T::dispatch(part) }
    };
    match rows * cols {
        1 => run(0),
        tasks => (0..tasks).into_par_iter().for_each(run),
    }
}

/// op(A) as tiles read it.
#[derive(Clone, Copy)]
struct Rows<'a, T> {
    a: &'a [T],
    /// In strips, rather than as the product says.
    packed: bool,
}

/// op(B) as tiles read it.
#[derive(Clone, Copy)]
struct Columns<'a, T> {
    b: &'a [T],
    /// In panels, rather than row-major with the product's distance of rows.
    packed: bool,
}

/// Some strips and panels of one product.
struct Part<'a, T> {
    p: &'a Product<T>,
    a: Rows<'a, T>,
    b: Columns<'a, T>,
    plus: Plus<'a, T>,
    c: *mut T,
    strips: Range<usize>,
    panels: Range<usize>,
}

impl<T: Vectors> Kernel<T> for Part<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(self) {
        let p = self.p;
        let panel = 2 * S::LANES;
        let strips = p.strips();
        // Across rows of A: few steps at a time, whatever the number of rows.
        let (steps, block) = match (p.trans_a, self.a.packed) {
            (true, false) => (STEPS_ACROSS, self.strips.len().max(1)),
            (true, true) => (STEPS, self.strips.len().max(1)),
            _ => (STEPS, (BLOCK / p.k.clamp(1, STEPS)).div_ceil(S::ROWS)),
        };
        let mut k = 0;
        while k < p.k || k == 0 {
            let count = steps.min(p.k - k);
            let (beta, plus) = if k == 0 { (p.beta, self.plus) } else { (T::one(), Plus::NOTHING) };
            let mut from = self.strips.start;
            while from < self.strips.end {
                let to = (from + block).min(self.strips.end);
                for q in self.panels.clone() {
                    let lanes = panel.min(p.n - q * panel);
                    let n = if lanes > S::LANES { 2 } else { 1 };
                    let (b, b_step) = match self.b.packed {
                        true => (self.b.b.as_ptr().wrapping_add((q * p.k + k) * panel), panel),
                        false => (self.b.b.as_ptr().wrapping_add(k * p.ldb + q * panel), p.ldb),
                    };
                    for i in from..to {
                        let (row, m) = (strips.start(i), strips.len(i));
                        let (at, lda) = match (p.trans_a, self.a.packed) {
                            (true, true) => ((i * p.k + k) * S::ROWS, S::ROWS),
                            (true, false) => (k * p.lda + row, p.lda),
                            _ => (row * p.lda + k, p.lda),
                        };
                        let to = row * p.ldc + q * panel;
                        let tile = Tile {
                            across: p.trans_a,
                            packed: self.b.packed,
                            a: self.a.a.as_ptr().wrapping_add(at),
                            lda,
                            b,
                            b_step,
                            steps: count,
                            alpha: p.alpha,
                            beta,
                            row: plus.row.map(|r| r.as_ptr().wrapping_add(q * panel)),
                            all: plus.all.map(|x| x.as_ptr().wrapping_add(to)),
                            c: self.c.wrapping_add(to),
                            ldc: p.ldc,
                            lanes,
                        };
                        // SAFETY: the part lies inside the product, whose operands have its extents.
                        unsafe { tile_sizes!(m, n, S, tile_run(&tile)) }
                    }
                }
                from = to;
            }
            k += steps;
        }
    }
}

struct Tile<T> {
    /// A's elements of one step are neighbours.
    across: bool,
    packed: bool,
    a: *const T,
    lda: usize,
    b: *const T,
    b_step: usize,
    steps: usize,
    alpha: T,
    beta: T,
    /// What is added: `lanes` elements, and rows of them as C's.
    row: Option<*const T>,
    all: Option<*const T>,
    c: *mut T,
    ldc: usize,
    lanes: usize,
}

/// # Safety
/// `a` must be valid for `M` rows of `steps`, `b` for as many rows of `N` vectors (if packed) or of `lanes`
/// elements, `row` for `lanes` elements, `all` and `c` for `M` rows of as many.
#[inline(always)]
unsafe fn tile_run<S: Simd, const M: usize, const N: usize>(t: &Tile<S::Elem>) {
    // SAFETY: the caller's promise.
    unsafe {
        // Where the sums will go, while they are added up.
        for i in 0..M {
            for j in 0..N {
                S::prefetch(t.c.wrapping_add(i * t.ldc + j * S::LANES));
            }
        }
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
                b_step: t.b_step,
            };
            let tail = if t.packed { S::LANES } else { t.lanes - (N - 1) * S::LANES };
            along_columns::<S, M, N>(&positions, t.a, t.b, tail)
        } else {
            let mut rows = [t.a; M];
            for i in 0..M {
                rows[i] = t.a.wrapping_add(i * t.lda);
            }
            along_rows::<S, M, N>(&[(0, t.steps)], rows, t.b, t.b_step)
        };
        let (alpha, beta) = (S::splat(t.alpha), S::splat(t.beta));
        let keep = t.beta != num_traits::zero();
        for j in 0..N {
            let part = (t.lanes - j * S::LANES).min(S::LANES);
            let mut row = S::splat(num_traits::zero());
            if let Some(r) = t.row {
                row = load_up_to::<S>(r.add(j * S::LANES), part);
            }
            for i in 0..M {
                let at = i * t.ldc + j * S::LANES;
                let c = t.c.add(at);
                let mut v = S::mul(acc[i][j], alpha);
                if t.row.is_some() {
                    v = S::add(v, row);
                }
                if let Some(all) = t.all {
                    v = S::add(v, load_up_to::<S>(all.add(at), part));
                }
                if keep {
                    v = S::fma(load_up_to::<S>(c, part), beta, v);
                }
                store_up_to::<S>(c, v, part);
            }
        }
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

    fn run<T: Vectors>(p: Product<T>, a: &[T], b: &[T], c: &[T]) -> Vec<T> {
        let mut c = c.to_vec();
        gemm(&p, a, b, &mut c, &mut vec![T::nan(); room(&p, 1)]);
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
    fn what_is_added_is_added_once() {
        each(|p| {
            let [a, b, c] = operands(&p);
            let (row, all) = (random(p.n, 4), random(c.len(), 5));
            let (mut y, plain) = (c.clone(), run(p, &a, &b, &c));
            let plus = Plus { row: Some(&row), all: Some(&all) };
            many(&p, 1, |_| [0, 0], &a, &b, plus, &mut y, 0, &mut vec![f32::NAN; room(&p, 1)]);
            for at in 0..c.len() {
                let inside = p.m == 1 || at % p.ldc < p.n;
                let want = if inside { plain[at] + row[at % p.ldc] + all[at] } else { c[at] };
                assert!((y[at] - want).abs() < 1e-4, "{p:?} at {at}: {}, not {want}", y[at]);
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
