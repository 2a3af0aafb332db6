//! AVX-512 and AVX2.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::Simd;

vectors!(
    /// AVX-512: 16 lanes, masked tails.
    Avx512, __m512, 16, [8, 8, 8, 6],
    _mm512_set1_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_add_ps, _mm512_sub_ps, _mm512_mul_ps, _mm512_max_ps, _mm512_min_ps,
    fma: |a, b, c| _mm512_fmadd_ps(a, b, c),
    pass: |y, low, high, x| {
        let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(y, low);
        _mm512_maskz_mov_ps(_mm512_mask_cmp_ps_mask::<_CMP_LT_OQ>(above, y, high), x)
    },
    inside: |y, low, high| {
        let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(y, low);
        u32::from(_mm512_mask_cmp_ps_mask::<_CMP_LT_OQ>(above, y, high))
    },
    keep: |bits, x| _mm512_maskz_mov_ps(bits as u16, x),
    widen: |p| {
        let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
    },
    round: |p, v| {
        let bits = _mm512_castps_si512(v);
        let high = _mm512_srli_epi32::<16>(bits);
        let odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
        let up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
        let none = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
        let near = _mm512_mask_or_epi32(_mm512_srli_epi32::<16>(up), none, high, _mm512_set1_epi32(0x40));
        _mm256_storeu_si256(p.cast(), _mm512_cvtepi32_epi16(near))
    },
    prefetch: |p| _mm_prefetch::<_MM_HINT_T1>(p.cast()),
    near: 16, __m512i, |from| _mm512_loadu_si512(from.cast()),
    pick: |v, places| _mm512_permutexvar_ps(places, v),
    load_part: |p, n| _mm512_maskz_loadu_ps((1u32 << n) as u16 - 1, p),
    store_part: |p, v, n| _mm512_mask_storeu_ps(p, (1u32 << n) as u16 - 1, v),
    transpose: transpose16
);

/// Four columns at a time: of rows 4i to 4i + 3, lane blocks of 4×4 are transposed, then blocks change places.
#[inline(always)]
unsafe fn transpose16(p: *const f32, ld: usize, to: *mut f32, ld_to: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        // `t[4g + c]`: in lane block b, column 4b + c of rows 4g to 4g + 3.
        let mut t = [_mm512_setzero_ps(); 16];
        for g in 0..4 {
            let at = p.add(4 * g * ld);
            let r0 = _mm512_loadu_ps(at);
            let r1 = _mm512_loadu_ps(at.add(ld));
            let r2 = _mm512_loadu_ps(at.add(2 * ld));
            let r3 = _mm512_loadu_ps(at.add(3 * ld));
            let (a, b) = (_mm512_unpacklo_ps(r0, r1), _mm512_unpackhi_ps(r0, r1));
            let (c, d) = (_mm512_unpacklo_ps(r2, r3), _mm512_unpackhi_ps(r2, r3));
            t[4 * g] = _mm512_shuffle_ps::<0x44>(a, c);
            t[4 * g + 1] = _mm512_shuffle_ps::<0xee>(a, c);
            t[4 * g + 2] = _mm512_shuffle_ps::<0x44>(b, d);
            t[4 * g + 3] = _mm512_shuffle_ps::<0xee>(b, d);
        }
        for c in 0..4 {
            let a = _mm512_shuffle_f32x4::<0x88>(t[c], t[4 + c]);
            let b = _mm512_shuffle_f32x4::<0xdd>(t[c], t[4 + c]);
            let d = _mm512_shuffle_f32x4::<0x88>(t[8 + c], t[12 + c]);
            let e = _mm512_shuffle_f32x4::<0xdd>(t[8 + c], t[12 + c]);
            _mm512_storeu_ps(to.add(c * ld_to), _mm512_shuffle_f32x4::<0x88>(a, d));
            _mm512_storeu_ps(to.add((4 + c) * ld_to), _mm512_shuffle_f32x4::<0x88>(b, e));
            _mm512_storeu_ps(to.add((8 + c) * ld_to), _mm512_shuffle_f32x4::<0xdd>(a, d));
            _mm512_storeu_ps(to.add((12 + c) * ld_to), _mm512_shuffle_f32x4::<0xdd>(b, e));
        }
    }
}

/// Lanes below `n` as AVX2's masks want them.
#[inline(always)]
unsafe fn below(n: usize) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe { _mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)) }
}

vectors!(
    /// AVX2 with FMA: 8 lanes, masked tails.
    Avx2, __m256, 8, [6, 6],
    _mm256_set1_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_add_ps, _mm256_sub_ps, _mm256_mul_ps, _mm256_max_ps, _mm256_min_ps,
    fma: |a, b, c| _mm256_fmadd_ps(a, b, c),
    pass: |y, low, high, x| {
        let inside = _mm256_and_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(y, low), _mm256_cmp_ps::<_CMP_LT_OQ>(y, high));
        _mm256_and_ps(inside, x)
    },
    inside: |y, low, high| {
        let inside = _mm256_and_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(y, low), _mm256_cmp_ps::<_CMP_LT_OQ>(y, high));
        _mm256_movemask_ps(inside) as u32
    },
    keep: |bits, x| {
        let lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        let set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits as i32), lanes), lanes);
        _mm256_and_ps(_mm256_castsi256_ps(set), x)
    },
    widen: |p| {
        let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
    },
    round: |p, v| {
        let bits = _mm256_castps_si256(v);
        let high = _mm256_srli_epi32::<16>(bits);
        let odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
        let up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
        let none = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
        let quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
        let near = _mm256_blendv_epi8(_mm256_srli_epi32::<16>(up), quiet, none);
        let beside = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(near, near));
        _mm_storeu_si128(p.cast(), _mm256_castsi256_si128(beside))
    },
    prefetch: |p| _mm_prefetch::<_MM_HINT_T1>(p.cast()),
    near: 4, __m256i, |from| _mm256_loadu_si256(from.cast()),
    pick: |v, places| _mm256_permutevar_ps(v, places),
    load_part: |p, n| _mm256_maskload_ps(p, below(n)),
    store_part: |p, v, n| _mm256_maskstore_ps(p, below(n), v),
    transpose: transpose8
);

/// As [`transpose16`], with two lane blocks.
#[inline(always)]
unsafe fn transpose8(p: *const f32, ld: usize, to: *mut f32, ld_to: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut t = [_mm256_setzero_ps(); 8];
        for g in 0..2 {
            let at = p.add(4 * g * ld);
            let r0 = _mm256_loadu_ps(at);
            let r1 = _mm256_loadu_ps(at.add(ld));
            let r2 = _mm256_loadu_ps(at.add(2 * ld));
            let r3 = _mm256_loadu_ps(at.add(3 * ld));
            let (a, b) = (_mm256_unpacklo_ps(r0, r1), _mm256_unpackhi_ps(r0, r1));
            let (c, d) = (_mm256_unpacklo_ps(r2, r3), _mm256_unpackhi_ps(r2, r3));
            t[4 * g] = _mm256_shuffle_ps::<0x44>(a, c);
            t[4 * g + 1] = _mm256_shuffle_ps::<0xee>(a, c);
            t[4 * g + 2] = _mm256_shuffle_ps::<0x44>(b, d);
            t[4 * g + 3] = _mm256_shuffle_ps::<0xee>(b, d);
        }
        for c in 0..4 {
            _mm256_storeu_ps(to.add(c * ld_to), _mm256_permute2f128_ps::<0x20>(t[c], t[4 + c]));
            _mm256_storeu_ps(to.add((4 + c) * ld_to), _mm256_permute2f128_ps::<0x31>(t[c], t[4 + c]));
        }
    }
}
