//! Elements of half precision: bfloat16 and IEEE float16. They are widened where they are read, rounded where they are
//! written, and never computed with.
//!
//! A kernel that reads [`Elements`] has the same loops for all of them: those of half precision are widened to a buffer
//! in the first- or second-level cache just before, a few hundred or thousand at a time.
//!
//! Loops are written with indices: what an iterator hides in a function of its own is compiled without the instruction set.
#![allow(clippy::needless_range_loop)]

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::kernels::isa::vectorize;
use crate::kernels::{pairs, par};
use crate::tensor::{DType, Float};

/// A type of half precision; elements are its bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Half {
    Bf16,
    F16,
}

/// Elements that are made before they are rounded.
const NEAR: usize = 2048;

impl Half {
    pub fn dtype(self) -> DType {
        match self {
            Half::Bf16 => DType::BF16,
            Half::F16 => DType::F16,
        }
    }

    /// The half type that a dtype is.
    pub fn of(dtype: DType) -> Option<Half> {
        match dtype {
            DType::BF16 => Some(Half::Bf16),
            DType::F16 => Some(Half::F16),
            _ => None,
        }
    }

    /// `y = x`, rounded to nearest, ties to even; what overflows becomes infinite.
    #[inline(always)]
    pub fn round(self, x: &[f32], y: &mut [u16]) {
        let y = &mut y[..x.len()];
        match self {
            Half::Bf16 => {
                for i in 0..x.len() {
                    y[i] = to_bf16(x[i]);
                }
            }
            Half::F16 => bits(y).convert_from_f32_slice(x),
        }
    }

    /// `y = x`, rounded up or down at random such that the expected result is x; `first`: the number of the first
    /// element. The random numbers are a function of `seed` and an element's number alone.
    #[inline(always)]
    pub fn round_at_random(self, x: &[f32], y: &mut [u16], seed: u64, first: usize) {
        let y = &mut y[..x.len()];
        match self {
            Half::Bf16 => {
                for i in 0..x.len() {
                    y[i] = random_bf16(x[i], noise(seed, first + i));
                }
            }
            Half::F16 => {
                for i in 0..x.len() {
                    y[i] = random_f16(x[i], noise(seed, first + i));
                }
            }
        }
    }

    /// `y = x`, exactly.
    #[inline(always)]
    pub fn widen(self, x: &[u16], y: &mut [f32]) {
        let y = &mut y[..x.len()];
        match self {
            Half::Bf16 => {
                for i in 0..x.len() {
                    y[i] = wide_bf16(x[i]);
                }
            }
            Half::F16 => {
                let x: &[f16] = bytemuck::cast_slice(x);
                x.convert_to_f32_slice(y);
            }
        }
    }

    /// [`round`](Self::round) of a whole tensor.
    pub fn round_all<T: Float>(self, x: &[T], y: &mut [u16]) {
        par::pieces(y, |start, y| self.round_near(&x[start..start + y.len()], y));
    }

    /// [`round`](Self::round) of what `make` makes, a piece at a time: some elements, from a given one on.
    pub fn round_made(self, y: &mut [u16], make: impl Fn(usize, &mut [f32]) + Send + Sync) {
        par::pieces(y, |start, y| {
            let mut near = [0.0; NEAR];
            for (i, y) in y.chunks_mut(NEAR).enumerate() {
                let made = &mut near[..y.len()];
                make(start + i * NEAR, made);
                self.round_some(made, y);
            }
        });
    }

    /// [`widen`](Self::widen) of a whole tensor.
    pub fn widen_all(self, x: &[u16], y: &mut [f32]) {
        par::pieces(y, |start, y| self.widen_some(&x[start..start + y.len()], y));
    }

    /// [`round`](Self::round), compiled for the processor at hand.
    #[inline(never)]
    fn round_some(self, x: &[f32], y: &mut [u16]) {
        if self == Half::Bf16 && pairs::round(x, y) {
            return;
        }
        vectorize(
            #[inline(always)]
            || self.round(x, y),
        );
    }

    /// [`widen`](Self::widen), compiled for the processor at hand.
    #[inline(never)]
    fn widen_some(self, x: &[u16], y: &mut [f32]) {
        vectorize(
            #[inline(always)]
            || self.widen(x, y),
        );
    }

    /// Rounds some elements of `f32`, the type that there are halves of; others through it.
    pub fn round_near<T: Float>(self, x: &[T], y: &mut [u16]) {
        match bytemuck::try_cast_slice(x) {
            Ok(x) if size_of::<T>() == size_of::<f32>() => self.round_some(x, y),
            _ => x.iter().zip(y).for_each(|(x, y)| self.round(&[x.to64() as f32], std::slice::from_mut(y))),
        }
    }

    /// Widens some elements to `f32`, or, through it, to another type.
    pub fn widen_near<T: Float>(self, x: &[u16], y: &mut [T]) {
        assert!(x.len() == y.len(), "elements to widen");
        if size_of::<T>() == size_of::<f32>()
            && let Ok(y) = bytemuck::try_cast_slice_mut(y)
        {
            return self.widen_some(x, y);
        }
        for (x, y) in x.iter().zip(y) {
            let mut wide = [0.0];
            self.widen(std::slice::from_ref(x), &mut wide);
            *y = T::of(f64::from(wide[0]));
        }
    }
}

/// A tensor's elements in memory.
#[derive(Debug, Clone, Copy)]
pub enum Elements<'a, T> {
    Whole(&'a [T]),
    Half(Half, &'a [u16]),
}

impl<'a, T: Float> Elements<'a, T> {
    pub fn len(&self) -> usize {
        match self {
            Elements::Whole(x) => x.len(),
            Elements::Half(_, x) => x.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Their type, where it is one of half precision.
    pub fn half(&self) -> Option<Half> {
        match self {
            Elements::Whole(_) => None,
            Elements::Half(half, _) => Some(*half),
        }
    }

    pub fn is_whole(&self) -> bool {
        matches!(self, Elements::Whole(_))
    }

    /// As many as `out` has from element `start` on.
    pub fn copy(&self, start: usize, out: &mut [T]) {
        match self {
            Elements::Whole(x) => out.copy_from_slice(&x[start..start + out.len()]),
            Elements::Half(half, x) => half.widen_near(&x[start..start + out.len()], out),
        }
    }

    /// `n` of them from element `start` on: where they lie, or widened to `room`.
    pub fn near<'b>(&self, start: usize, n: usize, room: &'b mut [T]) -> &'b [T]
    where
        'a: 'b,
    {
        if let Elements::Whole(x) = self {
            return &x[start..start + n];
        }
        let room = &mut room[..n];
        self.copy(start, room);
        room
    }

    /// All of them, where they are whole.
    pub fn whole(&self) -> &'a [T] {
        match self {
            Elements::Whole(x) => x,
            Elements::Half(..) => panic!("this kernel reads no half precision"),
        }
    }

    /// Those from element `start` on.
    pub fn from(&self, start: usize) -> Self {
        self.part(start..self.len())
    }

    pub fn part(&self, range: std::ops::Range<usize>) -> Self {
        match self {
            Elements::Whole(x) => Elements::Whole(&x[range]),
            Elements::Half(half, x) => Elements::Half(*half, &x[range]),
        }
    }

    /// Where some elements lie, and their bytes: for fetching.
    pub fn bytes(&self, range: std::ops::Range<usize>) -> (*const u8, usize) {
        let size = if self.is_whole() { size_of::<T>() } else { 2 };
        (self.address(range.start).cast(), range.len() * size)
    }

    /// Where an element, perhaps none of these, lies: for fetching.
    #[inline(always)]
    pub fn address(&self, i: usize) -> *const T {
        match self {
            Elements::Whole(x) => x.as_ptr().wrapping_add(i),
            Elements::Half(_, x) => x.as_ptr().wrapping_add(i).cast(),
        }
    }
}

/// Where results go: to memory of their own type, or, rounded, to bfloat16.
#[derive(Debug)]
pub enum ElementsMut<'a, T> {
    Whole(&'a mut [T]),
    Bf16(&'a mut [u16]),
}

impl<'a, T> ElementsMut<'a, T> {
    pub fn len(&self) -> usize {
        match self {
            ElementsMut::Whole(y) => y.len(),
            ElementsMut::Bf16(y) => y.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All of them, where they are whole.
    pub fn whole(self) -> &'a mut [T] {
        match self {
            ElementsMut::Whole(y) => y,
            ElementsMut::Bf16(_) => panic!("this kernel does not round its results"),
        }
    }
}

#[inline(always)]
fn bits(y: &mut [u16]) -> &mut [f16] {
    bytemuck::cast_slice_mut(y)
}

/// The number that bits of bfloat16 are.
#[inline(always)]
pub fn wide_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Bits of bfloat16, rounded to nearest, ties to even.
#[inline(always)]
pub fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let nearest = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
    let quiet = bits >> 16 | 0x40;
    (if x.is_nan() { quiet } else { nearest }) as u16
}

/// A random number for an element (the finaliser of MurmurHash3): cheap in vectors of 32 bits.
#[inline(always)]
fn noise(seed: u64, element: usize) -> u32 {
    let mut h = (element as u32).wrapping_mul(0x9e37_79b9) ^ seed as u32;
    h ^= h >> 16;
    h = h.wrapping_mul(0x85eb_ca6b).wrapping_add((seed >> 32) as u32 ^ (element >> 32) as u32);
    h ^= h >> 13;
    h = h.wrapping_mul(0xc2b2_ae35);
    h ^ h >> 16
}

#[inline(always)]
fn random_bf16(x: f32, noise: u32) -> u16 {
    let bits = x.to_bits();
    let up = bits.wrapping_add(noise & 0xFFFF) >> 16;
    // What is finite stays so, and what is not stays what it is.
    let whole = if up & 0x7F80 == 0x7F80 { bits >> 16 } else { up };
    (if x.is_nan() { bits >> 16 | 0x40 } else { whole }) as u16
}

#[inline(always)]
fn random_f16(x: f32, noise: u32) -> u16 {
    let sign = (x.to_bits() >> 16) as u16 & 0x8000;
    let size = x.abs();
    if size.is_nan() || size >= 65504.0 {
        return f16::from_f32(x).to_bits();
    }
    if size < 6.103_515_6e-5 {
        // Below 2⁻¹⁴ numbers are multiples of 2⁻²⁴.
        let steps = size * 16_777_216.0 + (noise >> 8) as f32 / 16_777_216.0;
        return sign | steps as u16;
    }
    let up = (size.to_bits() + (noise & 0x1FFF)) >> 13;
    // Exponents are biased by 127, and by 15.
    sign | (up - (112 << 10)) as u16
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    /// All sorts of numbers: of every exponent, special ones, ties.
    fn numbers() -> Vec<f32> {
        let mut all = vec![0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN_POSITIVE, 65504.0];
        all.extend([65519.9, 65520.0, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, 5.9e-8, 2.9e-8, 6.1e-5]);
        all.extend((0..20_000u32).map(|i| f32::from_bits(i.wrapping_mul(0x0003_4567).wrapping_add(i << 20))));
        all.retain(|x| !x.is_nan());
        all
    }

    #[test]
    fn rounding_is_that_of_the_standard_types() {
        let x = numbers();
        let mut y = vec![0; x.len()];
        let mut back = vec![0.0; x.len()];
        Half::Bf16.round_all(&x, &mut y);
        assert!(x.iter().zip(&y).all(|(x, y)| bf16::from_f32(*x).to_bits() == *y));
        Half::Bf16.widen_all(&y, &mut back);
        assert!(back.iter().zip(&y).all(|(b, y)| b.to_bits() == bf16::from_bits(*y).to_f32().to_bits()));
        Half::F16.round_all(&x, &mut y);
        assert!(x.iter().zip(&y).all(|(x, y)| f16::from_f32_const(*x).to_bits() == *y));
        Half::F16.widen_all(&y, &mut back);
        assert!(back.iter().zip(&y).all(|(b, y)| b.to_bits() == f16::from_bits(*y).to_f32_const().to_bits()));
        for half in [Half::Bf16, Half::F16] {
            half.round_all(&[f32::NAN], &mut y[..1]);
            half.widen_all(&y[..1], &mut back[..1]);
            assert!(back[0].is_nan(), "{half:?}");
        }
    }

    #[test]
    fn random_rounding_takes_a_neighbour_and_is_right_on_average() {
        for half in [Half::Bf16, Half::F16] {
            for x in numbers().into_iter().chain([f32::NAN]) {
                let (mut y, mut wide) = ([0; 64], [0.0; 64]);
                half.round_at_random(&[x; 64], &mut y, 7, 1000);
                half.widen(&y, &mut wide);
                if x.is_nan() {
                    assert!(wide.iter().all(|w| w.is_nan()));
                    continue;
                }
                let nearest = match half {
                    Half::Bf16 => bf16::from_f32(x).to_f32(),
                    Half::F16 => f16::from_f32(x).to_f32(),
                };
                // A unit in the last place; of float16 below 2⁻¹⁴ it is 2⁻²⁴.
                let unit = if half == Half::Bf16 { x.abs() / 128.0 } else { x.abs() / 1024.0 };
                for w in wide {
                    // What overflows becomes infinite, or, being below the next power of two, stays the largest.
                    let overflows = nearest.is_infinite() || w.is_infinite();
                    let beside = (w - x).abs() < unit.max(6e-8) || unit < 1e-37;
                    assert!(
                        w == nearest || (nearest != x && (beside || overflows)),
                        "{half:?}: {x} becomes {w}"
                    );
                }
            }
            for x in [1.003f32, -0.3, 3e-6, 2e-5] {
                let n = 1 << 16;
                let (mut y, mut wide) = (vec![0; n], vec![0.0; n]);
                half.round_at_random(&vec![x; n], &mut y, 3, 0);
                half.widen(&y, &mut wide);
                let mean = wide.iter().map(|w| f64::from(*w)).sum::<f64>() / n as f64;
                let step = wide.iter().fold(0.0, |m: f32, w| m.max((w - x).abs()));
                let off = (mean - f64::from(x)).abs();
                assert!(off <= 0.02 * f64::from(step), "{half:?}: {x} is {mean} on average");
            }
        }
    }
}
