//! Elementary functions of many elements, in stages.
//!
//! A function of one element is a chain of some forty operations that wait for each other, and a processor looks ahead no further
//! than a few elements. A stage of fewer operations over a block, which stays in the first-level cache, leaves it more to begin
//! meanwhile. Each element goes through the operations of the function of one, in their order: results are the same bits.
// (A function that is handed over as it is would not be inlined, and so be compiled without the instruction set.)
#![allow(clippy::redundant_closure)]

use super::*;

/// Elements of a block.
const BLOCK: usize = 256;

/// `x = n ln 2 + r` of each: r in its place, and n as rounding leaves it.
#[inline(always)]
fn reduce_all(x: &mut [f32], n: &mut [f32], power: impl Fn(f32) -> f32) {
    for (x, n) in x.iter_mut().zip(n) {
        (*n, *x) = reduce(power(*x));
    }
}

/// In place of each r, what its exponential becomes.
#[inline(always)]
fn finish_all(x: &mut [f32], n: &[f32], scaled: impl Fn(i32, f32) -> f32) {
    for (x, n) in x.iter_mut().zip(n) {
        *x = scaled(exponent(*n), expm1_near(*x));
    }
}

#[inline(always)]
pub(super) fn exps(x: &mut [f32], less: f32) {
    let mut n = [0.0; BLOCK];
    for x in x.chunks_mut(BLOCK) {
        reduce_all(
            x,
            &mut n,
            #[inline(always)]
            |x| exp_range(x - less),
        );
        finish_all(
            x,
            &n,
            #[inline(always)]
            |n, p| scaled(n, p),
        );
    }
}

#[inline(always)]
pub(super) fn weights(x: &mut [f32], less: f32) {
    let mut n = [0.0; BLOCK];
    for x in x.chunks_mut(BLOCK) {
        reduce_all(
            x,
            &mut n,
            #[inline(always)]
            |x| weight_range(x - less),
        );
        finish_all(
            x,
            &n,
            #[inline(always)]
            |n, p| weight_of(n, p),
        );
    }
}
