//! Pairs in plain arithmetic, on any vectors: for tests on processors without an instruction for them.
#![allow(unsafe_code, clippy::needless_range_loop)]

use super::{PairKernel, Pairs, across_plainly, beside_plainly};
use crate::kernels::simd::{Kernel, Plain, Simd, WIDEST};
use crate::kernels::tile::Terms;
use crate::tensor::Float;

pub struct OnAnyVectors<K>(pub K);

impl<K: PairKernel<f32>> Kernel<f32> for OnAnyVectors<K> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = f32>>(self) {
        // SAFETY: the caller's promise.
        unsafe { self.0.run::<Plainly<S>>() }
    }
}

/// As [`dispatch`](super::dispatch), of pairs that are summed in `f64`: so that nothing but where operands lie can be wrong.
///
/// # Safety
/// The kernel's own promises.
pub unsafe fn dispatch_double<K: PairKernel<f64>>(kernel: K) {
    // SAFETY: plain arithmetic runs everywhere; else the caller's promise.
    unsafe { kernel.run::<Plainly<Plain<f64>>>() }
}

/// The first element of a pair.
#[inline(always)]
fn low<T: Float>(pair: u32) -> T {
    T::of(f64::from(f32::from_bits(pair << 16)))
}

/// The second element of a pair.
#[inline(always)]
fn high<T: Float>(pair: u32) -> T {
    T::of(f64::from(f32::from_bits(pair & 0xFFFF_0000)))
}

#[derive(Clone, Copy)]
struct Plainly<S>(std::marker::PhantomData<fn() -> S>);

// SAFETY: vectors are written to arrays of as many elements, and read from them.
unsafe impl<S: Simd> Terms for Plainly<S> {
    type S = S;
    type Term = u32;
    type Row = [u32; WIDEST];
    const ROWS: &'static [usize] = S::ROWS;

    #[inline(always)]
    unsafe fn row(p: *const u32) -> [u32; WIDEST] {
        // SAFETY: the caller's promise, here and below.
        unsafe { Self::row_part(p, S::LANES) }
    }

    #[inline(always)]
    unsafe fn row_part(p: *const u32, n: usize) -> [u32; WIDEST] {
        let mut row = [0; WIDEST];
        for (i, row) in row.iter_mut().enumerate().take(n) {
            *row = unsafe { *p.add(i) };
        }
        row
    }

    #[inline(always)]
    unsafe fn broadcast(p: *const u32) -> [u32; WIDEST] {
        unsafe { [p.read_unaligned(); WIDEST] }
    }

    #[inline(always)]
    unsafe fn multiply(x: [u32; WIDEST], row: [u32; WIDEST], sum: S::V) -> S::V {
        let mut all = [num_traits::zero(); WIDEST];
        unsafe {
            S::store(all.as_mut_ptr(), sum);
            for i in 0..S::LANES {
                all[i] += low::<S::Elem>(x[i]) * low(row[i]) + high::<S::Elem>(x[i]) * high(row[i]);
            }
            S::load(all.as_ptr())
        }
    }

    #[inline(always)]
    unsafe fn put_beside(v: S::V, to: *mut u32) {
        unsafe { beside_plainly::<S>(v, to) }
    }

    #[inline(always)]
    unsafe fn put_across(nth: usize, v: S::V, to: *mut u32) {
        unsafe { across_plainly::<S>(nth, v, to) }
    }
}

// SAFETY: as above.
unsafe impl<S: Simd> Pairs for Plainly<S> {}
