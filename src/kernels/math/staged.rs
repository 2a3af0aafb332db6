//! Elementary functions of many elements, in stages.
//!
//! A function of one element is a chain of some forty operations that wait for each other, and a processor looks ahead no further
//! than a few elements. A stage of fewer operations over a block, which stays in the first-level cache, leaves it more to begin
//! meanwhile. Each element goes through the operations of the function of one, in their order: results are the same bits.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;

use super::*;

/// Elements of a block.
const BLOCK: usize = 256;

/// In place of each x, what `finish` makes of n and `eʳ − 1`, where `power(x) = n ln 2 + r`.
#[inline(always)]
pub(super) fn exponentials(x: &mut [f32], power: impl Fn(f32) -> f32, finish: impl Fn(i32, f32) -> f32) {
    // (Zeros would take a tenth of the time of a short row.)
    let mut n = [MaybeUninit::uninit(); BLOCK];
    for x in x.chunks_mut(BLOCK) {
        for (x, n) in x.iter_mut().zip(&mut n) {
            let (rounded, r) = reduce(power(*x));
            *x = r;
            n.write(rounded);
        }
        for (x, n) in x.iter_mut().zip(&n) {
            // SAFETY: as many as there are of x were written above.
            let n = unsafe { n.assume_init() };
            *x = finish(exponent(n), expm1_near(*x));
        }
    }
}

/// See [`Math::m_gausses`].
#[inline(always)]
pub(super) fn gausses(y: &mut [f32], [x, v]: [&[f32]; 2], f: impl Fn(f32, f32, (f32, f32)) -> f32) {
    let mut shares = [0.0; BLOCK];
    for ((y, x), v) in y.chunks_mut(BLOCK).zip(x.chunks(BLOCK)).zip(v.chunks(BLOCK)) {
        for ((y, x), share) in y.iter_mut().zip(x).zip(&mut shares) {
            *y = gauss_power(*x);
            *share = gauss_share(*x);
        }
        exponentials(
            y,
            #[inline(always)]
            |power| power,
            #[inline(always)]
            |n, p| whole_scaled(n, p),
        );
        for (((y, x), v), share) in y.iter_mut().zip(x).zip(v).zip(&shares) {
            *y = f(*x, *v, (gauss_cdf(*x, *y, *share), *y));
        }
    }
}

/// `y = f(x, v, e)` of each, where `finish` makes e of n and `eʳ − 1` and `power(x) = n ln 2 + r`.
#[inline(always)]
pub(super) fn of_exponentials(
    y: &mut [f32],
    [x, v]: [&[f32]; 2],
    power: impl Fn(f32) -> f32,
    finish: impl Fn(i32, f32) -> f32,
    f: impl Fn(f32, f32, f32) -> f32,
) {
    for ((y, x), v) in y.chunks_mut(BLOCK).zip(x.chunks(BLOCK)).zip(v.chunks(BLOCK)) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = power(*x);
        }
        exponentials(
            y,
            #[inline(always)]
            |power| power,
            #[inline(always)]
            |n, p| finish(n, p),
        );
        for ((y, x), v) in y.iter_mut().zip(x).zip(v) {
            *y = f(*x, *v, *y);
        }
    }
}
