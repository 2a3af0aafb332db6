//! The transforms of Winograd's F(4×4, 3×3) and of its gradient, a vector of channels at a time.
//!
//! By Toom and Cook, four results of a correlation with three taps are `Aᵀ[(G·g) ⊙ (Bᵀ·d)]` with six products. The
//! rows of the matrices belong to the points 0, ±a, ±b and ∞ at which polynomials are evaluated; a tile has the
//! transform along both of its sides. The points are those for which rounding errors are least while a product of
//! two of them stays simple (a² = 1/2, b² = 2, a·b = 1). Lavin and Gray, "Fast algorithms for convolutional neural
//! networks", 2015; Winograd, "Arithmetic complexity of computations", 1980.
#![allow(unsafe_code, clippy::needless_range_loop)]

use num_traits::zero;

use crate::kernels::simd::{Simd, Stored, Vectors};
use crate::kernels::tile::Terms;
use crate::tensor::Float;

/// Results and inputs of a tile's side, and products of a tile.
pub(super) const OUT: usize = 4;
pub(super) const IN: usize = 6;
pub(super) const PRODUCTS: usize = IN * IN;

const A: f64 = std::f64::consts::FRAC_1_SQRT_2;
const B: f64 = std::f64::consts::SQRT_2;
const A2: f64 = 0.5;
const B2: f64 = 2.0;
/// What the rows of G are divided by: for each point the product of its distances from the others.
const AT_0: f64 = A2 * B2;
const AT_A: f64 = 2.0 * A2 * (A2 - B2);
const AT_B: f64 = 2.0 * B2 * (B2 - A2);

#[inline(always)]
pub(super) unsafe fn constant<S: Simd>(x: f64) -> S::V {
    // SAFETY: the caller's promise.
    unsafe { S::splat(S::Elem::of(x)) }
}

#[inline(always)]
unsafe fn sub<S: Simd>(a: S::V, b: S::V) -> S::V {
    // SAFETY: the caller's promise.
    unsafe { S::fma(constant::<S>(-1.0), b, a) }
}

/// `e + p·o` and `e − p·o`: a point and its opposite.
#[inline(always)]
unsafe fn pair<S: Simd>(p: f64, e: S::V, o: S::V) -> [S::V; 2] {
    // SAFETY: the caller's promise.
    unsafe { [S::fma(constant::<S>(p), o, e), S::fma(constant::<S>(-p), o, e)] }
}

/// The first and the last of `Bᵀ·d`.
#[inline(always)]
unsafe fn input_ends<S: Simd>(d: [S::V; IN]) -> [S::V; 2] {
    // SAFETY: the caller's promise, here and below.
    unsafe {
        // The product of a² and b² is one.
        let both = constant::<S>(-(A2 + B2));
        [S::fma(both, d[2], S::add(d[0], d[4])), S::fma(both, d[3], S::add(d[1], d[5]))]
    }
}

/// Those between, of all but the first and last of `d`.
#[inline(always)]
unsafe fn input_between<S: Simd>(d: [S::V; IN - 2]) -> [S::V; IN - 2] {
    unsafe {
        let (a2, b2) = (constant::<S>(-A2), constant::<S>(-B2));
        let [p, q] = pair::<S>(A, S::fma(b2, d[1], d[3]), S::fma(b2, d[0], d[2]));
        let [r, s] = pair::<S>(B, S::fma(a2, d[1], d[3]), S::fma(a2, d[0], d[2]));
        [p, q, r, s]
    }
}

/// `Bᵀ·d`
#[inline(always)]
unsafe fn input<S: Simd>(d: [S::V; IN]) -> [S::V; IN] {
    unsafe {
        let ([first, last], [p, q, r, s]) =
            (input_ends::<S>(d), input_between::<S>([d[1], d[2], d[3], d[4]]));
        [first, p, q, r, s, last]
    }
}

/// `G·g`
#[inline(always)]
unsafe fn weight<S: Simd>(g: [S::V; 3]) -> [S::V; IN] {
    unsafe {
        let (ea, eb) = (S::fma(constant::<S>(A2), g[2], g[0]), S::fma(constant::<S>(B2), g[2], g[0]));
        let [p, q] = pair::<S>(A / AT_A, S::mul(constant::<S>(1.0 / AT_A), ea), g[1]);
        let [r, s] = pair::<S>(B / AT_B, S::mul(constant::<S>(1.0 / AT_B), eb), g[1]);
        [S::mul(constant::<S>(1.0 / AT_0), g[0]), p, q, r, s, g[2]]
    }
}

/// `Aᵀ·m`
#[inline(always)]
unsafe fn output<S: Simd>(m: [S::V; IN]) -> [S::V; OUT] {
    unsafe {
        let (ea, oa) = (S::add(m[1], m[2]), sub::<S>(m[1], m[2]));
        let (eb, ob) = (S::add(m[3], m[4]), sub::<S>(m[3], m[4]));
        [
            S::add(m[0], S::add(ea, eb)),
            S::fma(constant::<S>(A), oa, S::mul(constant::<S>(B), ob)),
            S::fma(constant::<S>(A2), ea, S::mul(constant::<S>(B2), eb)),
            S::fma(constant::<S>(A * A2), oa, S::fma(constant::<S>(B * B2), ob, m[5])),
        ]
    }
}

/// `A·y`, the transpose of [`output`].
#[inline(always)]
unsafe fn output_grad<S: Simd>(y: [S::V; OUT]) -> [S::V; IN] {
    unsafe {
        let (a2, b2) = (constant::<S>(A2), constant::<S>(B2));
        let [p, q] = pair::<S>(A, S::fma(a2, y[2], y[0]), S::fma(a2, y[3], y[1]));
        let [r, s] = pair::<S>(B, S::fma(b2, y[2], y[0]), S::fma(b2, y[3], y[1]));
        [y[0], p, q, r, s, y[3]]
    }
}

/// `Gᵀ·m`, the transpose of [`weight`].
#[inline(always)]
unsafe fn weight_grad<S: Simd>(m: [S::V; IN]) -> [S::V; 3] {
    unsafe {
        let (ea, oa) = (S::add(m[1], m[2]), sub::<S>(m[1], m[2]));
        let (eb, ob) = (S::add(m[3], m[4]), sub::<S>(m[3], m[4]));
        let first = S::fma(constant::<S>(1.0 / AT_B), eb, S::mul(constant::<S>(1.0 / AT_0), m[0]));
        let last = S::fma(constant::<S>(B2 / AT_B), eb, m[5]);
        [
            S::fma(constant::<S>(1.0 / AT_A), ea, first),
            S::fma(constant::<S>(A / AT_A), oa, S::mul(constant::<S>(B / AT_B), ob)),
            S::fma(constant::<S>(A2 / AT_A), ea, last),
        ]
    }
}

/// A transform along both sides: of each column, then of each row, which `$put` is given with its number.
macro_rules! both_sides {
    ($load:expr, $transform:ident, $from:ident, $to:ident, $put:expr) => {{
        #[allow(unused_mut)]
        let (load, mut put) = ($load, $put);
        let mut half = [[S::splat(zero()); $from]; $to];
        for j in 0..$from {
            let mut column = [S::splat(zero()); $from];
            for i in 0..$from {
                column[i] = load(i, j);
            }
            let column = $transform::<S>(column);
            for i in 0..$to {
                half[i][j] = column[i];
            }
        }
        for i in 0..$to {
            put(i, $transform::<S>(half[i]));
        }
    }};
}

/// A row of a transformed tile: a vector of channels of each product.
pub(super) type Row<S> = [<S as Simd>::V; IN];

/// Writes row `i` of a transformed tile as terms of neighbouring channels, `step` terms from a product's to the next's.
///
/// # Safety
/// `to` must be writable for a vector's terms at each product, and `D`'s instructions be there.
#[inline(always)]
pub(super) unsafe fn put_beside<D: Terms>(i: usize, row: &Row<D::S>, to: *mut D::Term, step: usize) {
    for j in 0..IN {
        // SAFETY: the caller's promise.
        unsafe { D::put_beside(row[j], to.add((i * IN + j) * step)) }
    }
}

/// Writes it as the elements number `nth` of terms of several tiles, or rows of weights, with the same channels.
///
/// # Safety
/// As of [`put_beside`]; see [`Terms::put_across`].
#[inline(always)]
pub(super) unsafe fn put_across<D: Terms>(
    nth: usize,
    i: usize,
    row: &Row<D::S>,
    to: *mut D::Term,
    step: usize,
) {
    for j in 0..IN {
        // SAFETY: the caller's promise.
        unsafe { D::put_across(nth, row[j], to.add((i * IN + j) * step)) }
    }
}

/// The same of both rows of pairs at once.
///
/// # Safety
/// As of [`put_across`].
#[inline(always)]
pub(super) unsafe fn put_both<D: Terms>(i: usize, rows: [&Row<D::S>; 2], to: *mut D::Term, step: usize) {
    for j in 0..IN {
        // SAFETY: the caller's promise.
        unsafe { D::put_both([rows[0][j], rows[1][j]], to.add((i * IN + j) * step)) }
    }
}

/// Tiles of `N`×`N` positions that are transformed.
pub(super) trait Tile<const N: usize> {
    /// The rows, by number, of the transformed tile whose positions are at `d`, `n` channels of it.
    ///
    /// # Safety
    /// `d` must be readable for so many elements each, and `S`'s instructions be there.
    unsafe fn rows<S: Simd<Elem: Vectors>, B: Stored<S::Elem>>(
        d: &[[*const B::Bits; N]; N],
        channel: usize,
        n: usize,
        put: impl FnMut(usize, Row<S>),
    );
}

/// `Bᵀ·d·B` of inputs.
pub(super) struct Inputs;

impl Tile<IN> for Inputs {
    /// In an order in which what is transformed along one side only stays in registers.
    #[inline(always)]
    unsafe fn rows<S: Simd<Elem: Vectors>, B: Stored<S::Elem>>(
        d: &[[*const B::Bits; IN]; IN],
        channel: usize,
        n: usize,
        mut put: impl FnMut(usize, Row<S>),
    ) {
        unsafe {
            let zero = S::splat(zero());
            let mut ends = [[zero; IN]; 2];
            for j in 0..IN {
                let mut column = [zero; IN];
                for i in 0..IN {
                    column[i] = B::load::<S>(d[i][j].add(channel), n);
                }
                [ends[0][j], ends[1][j]] = input_ends::<S>(column);
            }
            put(0, input::<S>(ends[0]));
            put(IN - 1, input::<S>(ends[1]));
            let mut between = [[zero; IN]; IN - 2];
            for j in 0..IN {
                let mut column = [zero; IN - 2];
                for i in 0..IN - 2 {
                    column[i] = B::load::<S>(d[i + 1][j].add(channel), n);
                }
                let column = input_between::<S>(column);
                for i in 0..IN - 2 {
                    between[i][j] = column[i];
                }
            }
            for i in 0..IN - 2 {
                put(i + 1, input::<S>(between[i]));
            }
        }
    }
}

/// `A·d·Aᵀ` of the gradients of results.
pub(super) struct Gradients;

impl Tile<OUT> for Gradients {
    #[inline(always)]
    unsafe fn rows<S: Simd<Elem: Vectors>, B: Stored<S::Elem>>(
        d: &[[*const B::Bits; OUT]; OUT],
        channel: usize,
        n: usize,
        put: impl FnMut(usize, Row<S>),
    ) {
        unsafe {
            both_sides!(
                #[inline(always)]
                |i: usize, j: usize| B::load::<S>(d[i][j].add(channel), n),
                output_grad,
                OUT,
                IN,
                put
            );
        }
    }
}

/// `Aᵀ·m·A` of the products at `m`, `step` elements apart.
///
/// # Safety
/// `m` must be readable for a vector at each product.
#[inline(always)]
pub(super) unsafe fn output_tile<S: Simd>(m: *const S::Elem, step: usize) -> [[S::V; OUT]; OUT] {
    unsafe {
        let mut tile = [[S::splat(zero()); OUT]; OUT];
        both_sides!(
            #[inline(always)]
            |i: usize, j: usize| S::load(m.add((i * IN + j) * step)),
            output,
            IN,
            OUT,
            #[inline(always)]
            |i: usize, row| tile[i] = row
        );
        tile
    }
}

/// Taps of a kernel's side.
const TAPS: usize = 3;

/// `G·g·Gᵀ` of the nine taps at `g`, `step` elements apart: its rows.
///
/// # Safety
/// `g` must be readable for a vector at each tap.
#[inline(always)]
pub(super) unsafe fn weight_tile<S: Simd>(g: *const S::Elem, step: usize, put: impl FnMut(usize, Row<S>)) {
    unsafe {
        both_sides!(
            #[inline(always)]
            |i: usize, j: usize| S::load(g.add((i * TAPS + j) * step)),
            weight,
            TAPS,
            IN,
            put
        );
    }
}

/// `Gᵀ·m·G` of the sums at `m`, of so many slabs so far apart, each with its products so far apart, to nine taps
/// that are `step` elements apart.
///
/// # Safety
/// `m` must be readable for a vector at each product of each slab, `to` writable for one at each tap.
#[inline(always)]
pub(super) unsafe fn weight_grad_tile<S: Simd>(
    m: *const S::Elem,
    [slabs, slab, product]: [usize; 3],
    to: *mut S::Elem,
    step: usize,
) {
    unsafe {
        both_sides!(
            #[inline(always)]
            |i: usize, j: usize| {
                let mut sum = S::splat(zero());
                for s in 0..slabs {
                    sum = S::add(sum, S::load(m.add(s * slab + (i * IN + j) * product)));
                }
                sum
            },
            weight_grad,
            IN,
            TAPS,
            #[inline(always)]
            |i: usize, row: [S::V; TAPS]| {
                for j in 0..TAPS {
                    S::store(to.add((i * TAPS + j) * step), row[j]);
                }
            }
        );
    }
}
