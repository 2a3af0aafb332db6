//! Pairs by the instruction of AVX512-BF16.
#![allow(unsafe_code, clippy::needless_range_loop)]

use std::arch::x86_64::*;

use super::{Pairs, Terms};
use crate::kernels::half::to_bf16;
use crate::kernels::simd::x86::Avx512;

/// AVX512-BF16.
#[derive(Clone, Copy)]
pub struct Instruction;

/// A mask of the first `n` lanes.
#[inline(always)]
fn first(n: usize) -> __mmask16 {
    ((1u32 << n) - 1) as u16
}

/// Writes the first `n` lanes. (What was written by a mask, even all of it, is not passed on to who reads it next.)
#[inline(always)]
unsafe fn put(to: *mut u32, v: __m512i, n: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        match n {
            16 => _mm512_storeu_si512(to.cast(), v),
            _ => _mm512_mask_storeu_epi32(to.cast(), first(n), v),
        }
    }
}

/// The elements of two vectors of 16, those of equal number beside each other.
const BESIDE: [u16; 32] = {
    let mut at = [0; 32];
    let mut i = 0;
    while i < 32 {
        at[i] = (i / 2 + i % 2 * 16) as u16;
        i += 1;
    }
    at
};

// SAFETY: instructions of AVX512-BF16, which the caller has.
unsafe impl Terms for Instruction {
    type S = Avx512;
    type Term = u32;
    type Row = __m512i;
    const ROWS: &'static [usize] = <Avx512 as crate::kernels::simd::Simd>::ROWS;

    #[inline(always)]
    unsafe fn row(p: *const u32) -> __m512i {
        // SAFETY: the caller's promise, here and below.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }

    #[inline(always)]
    unsafe fn row_part(p: *const u32, n: usize) -> __m512i {
        unsafe { _mm512_maskz_loadu_epi32(first(n), p.cast()) }
    }

    #[inline(always)]
    unsafe fn broadcast(p: *const u32) -> __m512i {
        unsafe { _mm512_set1_epi32(p.read_unaligned().cast_signed()) }
    }

    #[inline(always)]
    unsafe fn multiply(x: __m512i, row: __m512i, sum: __m512) -> __m512 {
        // SAFETY: all are 512 bits.
        unsafe {
            let x = std::mem::transmute::<__m512i, __m512bh>(x);
            let row = std::mem::transmute::<__m512i, __m512bh>(row);
            _mm512_dpbf16_ps(sum, x, row)
        }
    }

    #[inline(always)]
    unsafe fn put_rounded(p: *mut u16, v: __m512) {
        unsafe { _mm256_storeu_si256(p.cast(), rounded(v)) }
    }

    #[inline(always)]
    unsafe fn put_beside(v: __m512, to: *mut u32) {
        unsafe { _mm256_storeu_si256(to.cast(), rounded(v)) }
    }

    #[inline(always)]
    unsafe fn put_across(nth: usize, v: __m512, to: *mut u32) {
        unsafe {
            let mut terms = _mm512_cvtepu16_epi32(rounded(v));
            if nth > 0 {
                terms = _mm512_or_si512(Self::row(to), _mm512_slli_epi32::<16>(terms));
            }
            _mm512_storeu_si512(to.cast(), terms);
        }
    }

    #[inline(always)]
    unsafe fn put_both(vectors: [__m512; 2], to: *mut u32) {
        unsafe { _mm512_storeu_si512(to.cast(), beside(vectors)) }
    }
}

#[inline(always)]
unsafe fn rounded(v: __m512) -> __m256i {
    // SAFETY: the caller's promise; both are 256 bits.
    unsafe { std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(v)) }
}

/// The elements of equal number of two vectors, rounded.
#[inline(always)]
unsafe fn beside([a, b]: [__m512; 2]) -> __m512i {
    // SAFETY: the caller's promise; both are 512 bits.
    unsafe {
        let both = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(b, a));
        _mm512_permutexvar_epi16(_mm512_loadu_si512(BESIDE.as_ptr().cast()), both)
    }
}

// SAFETY: as above.
unsafe impl Pairs for Instruction {
    #[inline(always)]
    unsafe fn neighbours(x: *const f32, to: *mut u32) {
        unsafe {
            let (a, b) = (_mm512_loadu_ps(x), _mm512_loadu_ps(x.add(16)));
            let both = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(b, a));
            _mm512_storeu_si512(to.cast(), both);
        }
    }

    #[inline(always)]
    unsafe fn across(x: [*const f32; 2], n: usize, to: *mut u32) {
        unsafe {
            let some = first(n);
            put(to, beside([_mm512_maskz_loadu_ps(some, x[0]), _mm512_maskz_loadu_ps(some, x[1])]), n);
        }
    }

    #[inline(always)]
    unsafe fn across_rounded(x: [*const u16; 2], n: usize, to: *mut u32) {
        unsafe {
            let some = first(n);
            let a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, x[0].cast()));
            let b = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, x[1].cast()));
            put(to, _mm512_or_si512(a, _mm512_slli_epi32::<16>(b)), n);
        }
    }
}

/// Elements from those that [`round`] writes to those whose place it fetches.
const AHEAD: usize = 1 << 10;
/// Elements that [`round`] tests together.
const ROUND: usize = 32;

/// `y = x` in bfloat16, to nearest, ties to even.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub fn round(x: &[f32], y: &mut [u16]) {
    let y = &mut y[..x.len()];
    let mut i = 0;
    while i + ROUND <= x.len() {
        // SAFETY: so many elements are left of both.
        unsafe {
            let (a, b) = (_mm512_loadu_ps(x.as_ptr().add(i)), _mm512_loadu_ps(x.as_ptr().add(i + 16)));
            _mm_prefetch::<_MM_HINT_T1>(y.as_ptr().wrapping_add(i + AHEAD).cast());
            // The instruction takes numbers below the least normal one for zeros.
            const SUBNORMAL: i32 = 0x20;
            if _mm512_fpclass_ps_mask::<SUBNORMAL>(a) | _mm512_fpclass_ps_mask::<SUBNORMAL>(b) != 0 {
                for j in i..i + ROUND {
                    y[j] = to_bf16(x[j]);
                }
            } else {
                let both = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(b, a));
                _mm512_storeu_si512(y.as_mut_ptr().add(i).cast(), both);
            }
        }
        i += ROUND;
    }
    for j in i..x.len() {
        y[j] = to_bf16(x[j]);
    }
}
