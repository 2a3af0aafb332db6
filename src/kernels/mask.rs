//! Where an activation that clamps let pass, packed in bits: of each byte the lowest bit is the first element's.
#![allow(unsafe_code)]

use crate::kernels::elementwise::Clamp;
use crate::kernels::par;
use crate::kernels::simd::{Kernel, Simd, Vectors};

/// Elements of a byte.
pub const BITS: usize = 8;
/// Elements of a block, whole vectors of every instruction set.
const BLOCK: usize = 16;

/// The bits of `y`, one an element: is it inside `clamp`? Bits beyond the end are 0.
///
/// # Panics
/// If `bits` is not of ⌈n/8⌉ bytes.
pub fn pack<T: Vectors>(y: &[T], clamp: Clamp<T>, bits: &mut [u8]) {
    assert_eq!(bits.len(), y.len().div_ceil(BITS), "bytes of a mask");
    par::rows(bits, BLOCK / BITS, par::GRAIN / BITS, |first, bits| {
        let y = &y[first * BLOCK..];
        let y = &y[..y.len().min(bits.len() * BITS)];
        // SAFETY: the kernel reads and writes within its slices.
        unsafe { T::dispatch(Pack { y, clamp, bits }) }
    });
}

/// `dx` where its bit is set, else 0. What is kept is read from `dy`, or from `dx` itself.
///
/// # Panics
/// If `bits` is not of ⌈n/8⌉ bytes, or `dy` not of n elements.
pub fn apply<T: Vectors>(bits: &[u8], dy: Option<&[T]>, dx: &mut [T]) {
    assert_eq!(bits.len(), dx.len().div_ceil(BITS), "bytes of a mask");
    assert!(dy.is_none_or(|dy| dy.len() == dx.len()), "operands of a mask");
    par::rows(dx, BLOCK, par::GRAIN, |first, dx| {
        let dy = dy.map(|dy| &dy[first * BLOCK..][..dx.len()]);
        let bits = &bits[first * (BLOCK / BITS)..][..dx.len().div_ceil(BITS)];
        // SAFETY: the kernel reads and writes within its slices.
        unsafe { T::dispatch(Apply { bits, dy, dx }) }
    });
}

struct Pack<'a, T> {
    y: &'a [T],
    clamp: Clamp<T>,
    bits: &'a mut [u8],
}

impl<T: Vectors> Kernel<T> for Pack<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(self) {
        // SAFETY: the instruction set is there; each vector lies within a block of BLOCK elements of `y`.
        unsafe {
            let (low, high) = (S::splat(self.clamp.low), S::splat(self.clamp.high));
            let (bytes, rest) = self.bits.as_chunks_mut::<{ BLOCK / BITS }>();
            let (blocks, tail) = self.y.as_chunks::<BLOCK>();
            for (bytes, block) in bytes.iter_mut().zip(blocks) {
                let mut word = 0;
                for at in (0..BLOCK).step_by(S::LANES) {
                    word |= S::inside(S::load(block.as_ptr().add(at)), low, high) << at;
                }
                *bytes = (word as u16).to_le_bytes();
            }
            let rest = bytes[blocks.len()..].as_flattened_mut().iter_mut().chain(rest);
            for (byte, y) in rest.zip(tail.chunks(BITS)) {
                *byte = y.iter().enumerate().fold(0, |b, (i, y)| b | u8::from(self.clamp.inside(*y)) << i);
            }
        }
    }
}

struct Apply<'a, T> {
    bits: &'a [u8],
    dy: Option<&'a [T]>,
    dx: &'a mut [T],
}

impl<T: Vectors> Kernel<T> for Apply<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(self) {
        let to = self.dx.as_mut_ptr();
        let from = self.dy.map_or(to.cast_const(), <[T]>::as_ptr);
        let whole = self.dx.len() / BLOCK;
        for b in 0..whole {
            let word = u32::from(u16::from_le_bytes([self.bits[2 * b], self.bits[2 * b + 1]]));
            for lane in (0..BLOCK).step_by(S::LANES) {
                let at = b * BLOCK + lane;
                // SAFETY: the instruction set is there; the vector lies within block `b`; `from` may be `to`.
                unsafe { S::store(to.add(at), S::keep(word >> lane, S::load(from.add(at)))) }
            }
        }
        for i in whole * BLOCK..self.dx.len() {
            let kept = self.bits[i / BITS] >> (i % BITS) & 1 == 1;
            // SAFETY: both have so many elements.
            unsafe { *to.add(i) = if kept { *from.add(i) } else { T::zero() } }
        }
    }
}
