//! NEON.
#![allow(unsafe_code)]

use std::arch::aarch64::*;

use super::Simd;

vectors!(
    /// NEON: 4 lanes.
    Neon, float32x4_t, 4, [8, 8, 8, 6],
    vdupq_n_f32, vld1q_f32, vst1q_f32, vaddq_f32, vsubq_f32, vmulq_f32, vmaxq_f32, vminq_f32,
    fma: |a, b, c| vfmaq_f32(c, a, b),
    pass: |y, low, high, x| {
        let inside = vandq_u32(vcgtq_f32(y, low), vcltq_f32(y, high));
        vreinterpretq_f32_u32(vandq_u32(inside, vreinterpretq_u32_f32(x)))
    },
    inside: |y, low, high| {
        let inside = vandq_u32(vcgtq_f32(y, low), vcltq_f32(y, high));
        vaddvq_u32(vandq_u32(inside, vld1q_u32([1, 2, 4, 8].as_ptr())))
    },
    keep: |bits, x| {
        let set = vtstq_u32(vdupq_n_u32(bits), vld1q_u32([1, 2, 4, 8].as_ptr()));
        vreinterpretq_f32_u32(vandq_u32(set, vreinterpretq_u32_f32(x)))
    },
    widen: |p| vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p))),
    round: |p, v| {
        let bits = vreinterpretq_u32_f32(v);
        let high = vshrq_n_u32::<16>(bits);
        let odd = vandq_u32(high, vdupq_n_u32(1));
        let up = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7FFF)), odd);
        let quiet = vorrq_u32(high, vdupq_n_u32(0x40));
        vst1_u16(p, vmovn_u32(vbslq_u32(vceqq_f32(v, v), vshrq_n_u32::<16>(up), quiet)))
    },
    prefetch: |p| {
        std::arch::asm!("prfm pldl2keep, [{p}]", p = in(reg) p, options(nostack, preserves_flags, readonly))
    },
    near: 4, uint8x16_t, |from| {
        // Of each element's four bytes.
        let places = vld1q_u32(from.cast());
        vreinterpretq_u8_u32(vmlaq_n_u32(vdupq_n_u32(0x0302_0100), places, 0x0404_0404))
    },
    pick: |v, places| vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(v), places)),
    load_part: |p, n| {
        let mut all = [0.0f32; 4];
        std::ptr::copy_nonoverlapping(p, all.as_mut_ptr(), n);
        vld1q_f32(all.as_ptr())
    },
    store_part: |p, v, n| {
        let mut all = [0.0f32; 4];
        vst1q_f32(all.as_mut_ptr(), v);
        std::ptr::copy_nonoverlapping(all.as_ptr(), p, n);
    }
);
