//! Vectors in plain arithmetic, of any element type.
#![allow(unsafe_code)]

use super::Simd;
use crate::kernels::half::{to_bf16, wide_bf16};
use crate::tensor::Float;

/// Four elements in plain arithmetic, which compilers turn into the baseline's vectors.
#[derive(Clone, Copy)]
pub struct Plain<T>(std::marker::PhantomData<fn() -> T>);

#[inline(always)]
fn each<T: Copy>(f: impl Fn(usize) -> T) -> [T; 4] {
    [f(0), f(1), f(2), f(3)]
}

// SAFETY: no instruction beyond the baseline is used.
unsafe impl<T: Float> Simd for Plain<T> {
    type Elem = T;
    type V = [T; 4];
    const LANES: usize = 4;
    const ROWS: &'static [usize] = &[4, 4];

    #[inline(always)]
    unsafe fn splat(x: T) -> [T; 4] {
        [x; 4]
    }
    #[inline(always)]
    unsafe fn load(p: *const T) -> [T; 4] {
        // SAFETY: the caller's promise; arrays of elements have the elements' alignment.
        unsafe { p.cast::<[T; 4]>().read() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut T, v: [T; 4]) {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[T; 4]>().write(v) }
    }
    #[inline(always)]
    unsafe fn load_part(p: *const T, n: usize) -> [T; 4] {
        // SAFETY: only the first `n` elements are read.
        each(|i| if i < n { unsafe { *p.add(i) } } else { T::zero() })
    }
    #[inline(always)]
    unsafe fn store_part(p: *mut T, v: [T; 4], n: usize) {
        for (i, x) in v.iter().enumerate().take(n) {
            // SAFETY: only the first `n` elements are written.
            unsafe { *p.add(i) = *x }
        }
    }
    #[inline(always)]
    unsafe fn fma(a: [T; 4], b: [T; 4], c: [T; 4]) -> [T; 4] {
        each(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn add(a: [T; 4], b: [T; 4]) -> [T; 4] {
        each(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(a: [T; 4], b: [T; 4]) -> [T; 4] {
        each(|i| a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: [T; 4], b: [T; 4]) -> [T; 4] {
        each(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn max(a: [T; 4], b: [T; 4]) -> [T; 4] {
        each(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn min(a: [T; 4], b: [T; 4]) -> [T; 4] {
        each(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn pass(y: [T; 4], low: [T; 4], high: [T; 4], x: [T; 4]) -> [T; 4] {
        each(|i| std::hint::select_unpredictable((y[i] > low[i]) & (y[i] < high[i]), x[i], T::zero()))
    }
    #[inline(always)]
    unsafe fn inside(y: [T; 4], low: [T; 4], high: [T; 4]) -> u32 {
        (0..4).fold(0, |bits, i| bits | u32::from((y[i] > low[i]) & (y[i] < high[i])) << i)
    }
    #[inline(always)]
    unsafe fn keep(bits: u32, x: [T; 4]) -> [T; 4] {
        each(|i| std::hint::select_unpredictable(bits >> i & 1 == 1, x[i], T::zero()))
    }
    #[inline(always)]
    unsafe fn widen(p: *const u16) -> [T; 4] {
        // SAFETY: the caller's promise.
        each(|i| T::of(f64::from(wide_bf16(unsafe { *p.add(i) }))))
    }
    #[inline(always)]
    unsafe fn round(p: *mut u16, v: [T; 4]) {
        for (i, x) in v.iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { *p.add(i) = to_bf16(x.to64() as f32) }
        }
    }
    #[inline(always)]
    unsafe fn prefetch(_: *const T) {}
    type Places = [i32; 4];
    const NEAR: usize = 4;
    #[inline(always)]
    unsafe fn places(from: *const i32) -> [i32; 4] {
        // SAFETY: the caller's promise.
        each(|i| unsafe { *from.add(i) })
    }
    #[inline(always)]
    unsafe fn pick(v: [T; 4], places: [i32; 4]) -> [T; 4] {
        each(|i| v[places[i] as usize % 4])
    }
}
