//! Pairs by the instruction of Arm's BF16 extension.
#![allow(unsafe_code)]

use std::arch::aarch64::*;
use std::arch::asm;

use super::{Pairs, Terms, across_plainly, beside_plainly};
use crate::kernels::simd::arm::Neon;

/// Arm's BF16 extension.
#[derive(Clone, Copy)]
pub struct Instruction;

// SAFETY: instructions of Arm's BF16 extension, which the caller has.
unsafe impl Terms for Instruction {
    type S = Neon;
    type Term = u32;
    type Row = uint32x4_t;
    const ROWS: &'static [usize] = <Neon as crate::kernels::simd::Simd>::ROWS;

    #[inline(always)]
    unsafe fn row(p: *const u32) -> uint32x4_t {
        // SAFETY: the caller's promise, here and below.
        unsafe { vld1q_u32(p) }
    }

    #[inline(always)]
    unsafe fn row_part(p: *const u32, n: usize) -> uint32x4_t {
        let mut row = [0; 4];
        unsafe {
            for (i, row) in row.iter_mut().enumerate().take(n) {
                *row = *p.add(i);
            }
            vld1q_u32(row.as_ptr())
        }
    }

    #[inline(always)]
    unsafe fn broadcast(p: *const u32) -> uint32x4_t {
        unsafe { vdupq_n_u32(p.read_unaligned()) }
    }

    #[inline(always)]
    unsafe fn multiply(x: uint32x4_t, row: uint32x4_t, mut sum: float32x4_t) -> float32x4_t {
        unsafe {
            asm!(
                ".arch_extension bf16",
                "bfdot {sum:v}.4s, {row:v}.8h, {x:v}.8h",
                sum = inout(vreg) sum,
                row = in(vreg) row,
                x = in(vreg) x,
                options(pure, nomem, nostack, preserves_flags)
            );
        }
        sum
    }

    #[inline(always)]
    unsafe fn put_beside(v: float32x4_t, to: *mut u32) {
        unsafe { beside_plainly::<Neon>(v, to) }
    }

    #[inline(always)]
    unsafe fn put_across(nth: usize, v: float32x4_t, to: *mut u32) {
        unsafe { across_plainly::<Neon>(nth, v, to) }
    }
}

// SAFETY: as above.
unsafe impl Pairs for Instruction {}
