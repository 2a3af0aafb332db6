//! Against the sums that products stand for.

use super::*;
use crate::kernels::half::Half;
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

/// Element (i, j) of `alpha · op(A) · op(B) + beta · C`.
fn element(p: &Product<f32>, a: &[f32], b: &[f32], c: &[f32], i: usize, j: usize) -> f64 {
    let term = |k: usize| {
        let a = if p.trans_a { a[k * p.lda + i] } else { a[i * p.lda + k] };
        let b = if p.trans_b { b[j * p.ldb + k] } else { b[k * p.ldb + j] };
        f64::from(a) * f64::from(b)
    };
    let sum: f64 = (0..p.k).map(term).sum();
    f64::from(p.alpha) * sum + f64::from(p.beta) * f64::from(c[i * p.ldc + j])
}

fn keeps_what_lies_between_rows(p: &Product<f32>, before: &[f32], after: &[f32]) {
    for i in 0..p.m.saturating_sub(1) {
        let between = i * p.ldc + p.n..(i + 1) * p.ldc;
        assert_eq!(before[between.clone()], after[between], "{p:?} wrote between rows");
    }
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
                alone: p.alone,
            };
            run(q, &wide(&a), &wide(&b), &wide(&c))
        });
        for i in 0..p.m {
            for j in 0..p.n {
                let (at, want) = (i * p.ldc + j, element(&p, &a, &b, &c, i, j));
                let scale = (p.k as f64).sqrt().max(1.0);
                assert!((want - wide[at]).abs() < 1e-13 * scale, "{p:?} {want} {}", wide[at]);
                assert!((want - narrow[at] as f64).abs() < 2e-6 * scale, "{p:?} {want} {}", narrow[at]);
            }
        }
        keeps_what_lies_between_rows(&p, &c, &narrow);
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

/// The bits of rounded elements, and what they are worth.
fn rounded(half: Half, x: &[f32]) -> (Vec<u16>, Vec<f32>) {
    let (mut bits, mut near) = (vec![0; x.len()], vec![0.0; x.len()]);
    half.round_all(x, &mut bits);
    half.widen_all(&bits, &mut near);
    (bits, near)
}

/// Wherever they are widened: as they are packed, some rows at a time, or beforehand.
#[test]
fn operands_of_half_precision_are_widened() {
    each(|p| {
        let [a, b, c] = operands(&p);
        for half in [Half::Bf16, Half::F16] {
            let ((a_bits, a), (b_bits, b)) = (rounded(half, &a), rounded(half, &b));
            let want = run(p, &a, &b, &c);
            let of = |whole, bits, is_half| if is_half { Elements::Half(half, bits) } else { whole };
            for halves @ [a_half, b_half] in [[true, false], [false, true], [true, true]] {
                let a = of(Elements::Whole(&a), &a_bits, a_half);
                let b = of(Elements::Whole(&b), &b_bits, b_half);
                let (mut y, mut scratch) = (c.clone(), vec![f32::NAN; room_halves(&p, halves)]);
                gemm_halves(&p, a, b, Plus::NOTHING, &mut y, &mut scratch);
                assert!(y == want, "{p:?} of {half:?}: {halves:?}");
            }
        }
    });
}

/// By the processor's instruction where it has one, else in plain arithmetic.
#[test]
fn pairs_are_products_of_rounded_operands() {
    each(|p| {
        if p.is_vector() || p.k < 2 {
            return;
        }
        let [a, b, c] = operands(&p);
        let ((a_bits, a_near), (b_bits, b_near)) = (rounded(Half::Bf16, &a), rounded(Half::Bf16, &b));
        let (row, all) = (random(p.n, 4), random(c.len(), 5));
        let run = |a: Elements<f32>, b: Elements<f32>| {
            let mut y = c.clone();
            let plus = Plus { row: Some(&row), all: Some(&all) };
            gemm_pairs(&p, a, b, plus, &mut y, &mut vec![f32::NAN; room_pairs(&p, a.half())]);
            y
        };
        let y = run(Elements::Whole(&a), Elements::Whole(&b));
        assert!(y == run(Elements::Half(Half::Bf16, &a_bits), Elements::Whole(&b)), "{p:?}: A in half");
        assert!(y == run(Elements::Whole(&a), Elements::Half(Half::Bf16, &b_bits)), "{p:?}: B in half");
        let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        assert!(y == one.install(|| run(Elements::Whole(&a), Elements::Whole(&b))), "{p:?}: one thread");
        for i in 0..p.m {
            for j in 0..p.n {
                let at = i * p.ldc + j;
                let want = element(&p, &a_near, &b_near, &c, i, j) + f64::from(row[j]) + f64::from(all[at]);
                let scale = (p.k as f64).sqrt().max(1.0);
                assert!((want - f64::from(y[at])).abs() < 4e-6 * scale, "{p:?} {want} {}", y[at]);
            }
        }
        keeps_what_lies_between_rows(&p, &c, &y);
    });
}

/// Nothing is added, so that sums may be written where they belong as soon as they are there: in several rounds, by tasks of which one
/// ends with rows that another's last square reaches back to.
#[test]
fn pairs_alone_are_products_of_rounded_operands() {
    let round = |x: Vec<f32>| x.iter().map(|x| half::bf16::from_f32(*x).to_f32()).collect::<Vec<_>>();
    // (Of few rows, B is packed some columns at a time.)
    for ([m, n, k], trans_a, trans_b) in [
        ([40, 32, 7000], false, false),
        ([64, 64, 2100], false, false),
        ([23, 50, 1700], false, false),
        ([30, 333, 1400], false, true),
        ([50, 300, 1400], true, false),
    ] {
        let p = Product::dense(trans_a, trans_b, m, n, k);
        let (a, b, mut y) = (round(random(m * k, 1)), round(random(k * n, 2)), vec![f32::NAN; m * n]);
        let (left, right) = (Elements::Whole(&a[..]), Elements::Whole(&b[..]));
        gemm_pairs(&p, left, right, Plus::NOTHING, &mut y, &mut vec![f32::NAN; room_pairs(&p, None)]);
        let zeros = vec![0.0; m * n];
        for (at, y) in y.iter().enumerate() {
            let want = element(&p, &a, &b, &zeros, at / n, at % n);
            assert!(
                (want - f64::from(*y)).abs() < 4e-6 * (k as f64).sqrt(),
                "{p:?} at {at}: {y}, not {want}"
            );
        }
    }
}
