//! Pairs of bfloat16, multiplied and summed in `f32` by the instruction that multiplies two pairs a lane and adds both products
//! (AVX512-BF16's `vdpbf16ps`, Arm's `bfdot`).
//!
//! A pair is two consecutive terms of a sum in 32 bits, the first in the lower half: of a matrix product two steps of the summed
//! dimension, of a convolution two input channels, of its weight gradient the same position of two images. Operands are rounded and
//! paired where they are put into the order in which tiles read them; tiles are those of `f32` ([`tile`](crate::kernels::tile)).
//! Where the processor has no such instruction nothing asks for pairs, but tests, for which the same sums are computed in plain
//! arithmetic: as code, that would be as large again as what is used, three times.
#![allow(unsafe_code, clippy::needless_range_loop)]

#[cfg(target_arch = "aarch64")]
mod arm;
#[cfg(test)]
pub mod plain;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::mem::MaybeUninit;
use std::ops::Range;

use crate::kernels::half::{Elements, Half, to_bf16};
use crate::kernels::isa::has_pair_products;
use crate::kernels::simd::{Simd, Vectors};
use crate::kernels::tile::{Form, Pieces, TermKernel, Terms};
use crate::tensor::Float;

/// Elements that are widened or rounded at a time where there is no shorter way.
const RUN: usize = 64;

/// Vectors that multiply pairs.
///
/// # Safety
/// As of [`Simd`].
#[allow(clippy::missing_safety_doc)] // The trait's own section holds for every method.
pub unsafe trait Pairs: Terms<Term = u32> {
    /// Writes `LANES` pairs of neighbours, from `x` on.
    #[inline(always)]
    unsafe fn neighbours(x: *const <Self::S as Simd>::Elem, to: *mut u32) {
        for i in 0..Self::S::LANES {
            // SAFETY: the caller's promise, here and below.
            unsafe { *to.add(i) = pair([*x.add(2 * i), *x.add(2 * i + 1)]) }
        }
    }

    /// Writes `n` pairs, at most `LANES`, of one element each of two rows.
    #[inline(always)]
    unsafe fn across(x: [*const <Self::S as Simd>::Elem; 2], n: usize, to: *mut u32) {
        for i in 0..n {
            unsafe { *to.add(i) = pair([*x[0].add(i), *x[1].add(i)]) }
        }
    }

    /// The same of elements that are rounded already.
    #[inline(always)]
    unsafe fn across_rounded(x: [*const u16; 2], n: usize, to: *mut u32) {
        for i in 0..n {
            unsafe { *to.add(i) = u32::from(*x[0].add(i)) | u32::from(*x[1].add(i)) << 16 }
        }
    }
}

/// A loop nest over pairs. Write `run` as `#[inline(always)]`.
pub trait PairKernel<T> {
    /// # Safety
    /// The processor must have `D`'s instructions, and the kernel's own promises must hold.
    unsafe fn run<D: Pairs<S: Simd<Elem = T>>>(self);
}

impl<T: Vectors> Form<T> for u32 {
    const EACH: usize = 2;

    fn room(scratch: &mut [T]) -> &mut [u32] {
        bytemuck::cast_slice_mut(scratch)
    }

    unsafe fn dispatch_terms<K: TermKernel<u32, T>>(kernel: K) {
        // SAFETY: the caller's promise.
        unsafe { T::dispatch_pairs(OfPairs(kernel)) }
    }
}

struct OfPairs<K>(K);

impl<T: Vectors, K: TermKernel<u32, T>> PairKernel<T> for OfPairs<K> {
    #[inline(always)]
    unsafe fn run<D: Pairs<S: Simd<Elem = T>>>(self) {
        // SAFETY: the caller's promise.
        unsafe { self.0.run::<D>() }
    }
}

/// Runs a kernel with vectors of pairs of the level in use.
///
/// # Safety
/// The kernel's own promises.
pub unsafe fn dispatch<K: PairKernel<f32>>(kernel: K) {
    #[cfg(target_arch = "x86_64")]
    if has_pair_products() {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
        unsafe fn by_instruction<K: PairKernel<f32>>(kernel: K) {
            // SAFETY: the caller's promise.
            unsafe { kernel.run::<x86::Instruction>() }
        }
        // SAFETY: the processor has the instruction; else the caller's promise.
        return unsafe { by_instruction(kernel) };
    }
    #[cfg(target_arch = "aarch64")]
    if has_pair_products() {
        // SAFETY: as above.
        return unsafe { kernel.run::<arm::Instruction>() };
    }
    #[cfg(test)]
    // SAFETY: the caller's promise.
    unsafe {
        f32::dispatch(plain::OnAnyVectors(kernel))
    }
    #[cfg(not(test))]
    unreachable!("pairs of bfloat16 on a processor that does not multiply them")
}

/// `y = x` in bfloat16, to nearest, ties to even, if the processor has an instruction for it.
pub fn round(x: &[f32], y: &mut [u16]) -> bool {
    #[cfg(target_arch = "x86_64")]
    if has_pair_products() {
        // SAFETY: the processor has the instruction.
        unsafe { x86::round(x, y) }
        return true;
    }
    let _ = (x, y);
    false
}

/// Two elements, rounded.
#[inline(always)]
pub fn pair<T: Float>([a, b]: [T; 2]) -> u32 {
    u32::from(to_bf16(a.to64() as f32)) | u32::from(to_bf16(b.to64() as f32)) << 16
}

/// Where both terms of a pair begin of which the first of all begins at `first` and the next ones `step` apart: the last of an
/// odd number stands alone.
#[inline(always)]
pub fn both(pair: usize, terms: usize, first: usize, step: usize) -> [Option<usize>; 2] {
    let at = first + 2 * pair * step;
    [Some(at), if 2 * pair + 1 < terms { Some(at + step) } else { None }]
}

/// Pairs of `n` neighbours from element `start` on; an odd one is beside a zero.
///
/// # Safety
/// `to` must be writable for `n.div_ceil(2)` pairs, and `D`'s instructions be there.
#[inline(always)]
pub unsafe fn neighbours<D: Pairs<S: Simd<Elem: Vectors>>>(
    x: Elements<<D::S as Simd>::Elem>,
    start: usize,
    n: usize,
    to: *mut u32,
) {
    // SAFETY: the slices have the elements; the caller's promise.
    unsafe {
        match x {
            Elements::Whole(x) => {
                let x = x[start..start + n].as_ptr();
                let mut i = 0;
                while i + 2 * D::S::LANES <= n {
                    D::neighbours(x.add(i), to.add(i / 2));
                    i += 2 * D::S::LANES;
                }
                while i < n {
                    let second = if i + 1 < n { *x.add(i + 1) } else { num_traits::zero() };
                    *to.add(i / 2) = pair([*x.add(i), second]);
                    i += 2;
                }
            }
            Elements::Half(Half::Bf16, x) => {
                let x = x[start..start + n].as_ptr();
                for i in 0..n / 2 {
                    *to.add(i) = u32::from(*x.add(2 * i)) | u32::from(*x.add(2 * i + 1)) << 16;
                }
                if n % 2 == 1 {
                    *to.add(n / 2) = u32::from(*x.add(n - 1));
                }
            }
            half => {
                let mut near = [num_traits::zero(); RUN];
                let mut i = 0;
                while i < n {
                    let count = RUN.min(n - i);
                    half.copy(start + i, &mut near[..count]);
                    near[count..].fill(num_traits::zero());
                    for j in 0..count.div_ceil(2) {
                        *to.add(i / 2 + j) = pair([near[2 * j], near[2 * j + 1]]);
                    }
                    i += count;
                }
            }
        }
    }
}

/// Pairs of one element each of two rows of `n`, which begin at these elements; where there is no second, of zeros.
///
/// # Safety
/// `to` must be writable for `n` pairs, and `D`'s instructions be there.
#[inline(always)]
pub unsafe fn across<D: Pairs<S: Simd<Elem: Vectors>>>(
    x: Elements<<D::S as Simd>::Elem>,
    [first, second]: [Option<usize>; 2],
    n: usize,
    to: *mut u32,
) {
    // SAFETY: the slices have the elements; the caller's promise.
    unsafe {
        match (x, first, second) {
            (Elements::Whole(x), Some(first), Some(second)) => {
                let x = [x[first..first + n].as_ptr(), x[second..second + n].as_ptr()];
                let mut i = 0;
                while i < n {
                    D::across([x[0].add(i), x[1].add(i)], D::S::LANES.min(n - i), to.add(i));
                    i += D::S::LANES;
                }
            }
            (Elements::Half(Half::Bf16, x), Some(first), Some(second)) => {
                let x = [x[first..first + n].as_ptr(), x[second..second + n].as_ptr()];
                let mut i = 0;
                while i < n {
                    D::across_rounded([x[0].add(i), x[1].add(i)], D::S::LANES.min(n - i), to.add(i));
                    i += D::S::LANES;
                }
            }
            (half, first, second) => {
                let mut near = [[num_traits::zero(); RUN]; 2];
                let mut i = 0;
                while i < n {
                    let count = RUN.min(n - i);
                    for (near, start) in near.iter_mut().zip([first, second]) {
                        match start {
                            Some(start) => half.copy(start + i, &mut near[..count]),
                            None => near[..count].fill(num_traits::zero()),
                        }
                    }
                    for j in 0..count {
                        *to.add(i + j) = pair([near[0][j], near[1][j]]);
                    }
                    i += count;
                }
            }
        }
    }
}

/// Columns of the widest strips that [`in_strips`] writes.
pub const STRIP: usize = 8;
/// Pairs that are near while they are divided into strips.
const GROUP: usize = 512;

/// As [`across`], of some strips of the columns, which lie `size` pairs apart, from the first of `some` on; of all strips perhaps
/// several rows that follow one another, as many as `GROUP` has room for, whose strips are so far apart. Unless they are the `last`,
/// `STRIP` pairs are written for each: what is too much belongs to what is written next.
///
/// # Safety
/// `to` must be writable for the strips, whose columns the rows have, and `D`'s instructions be there.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub unsafe fn in_strips<D: Pairs<S: Simd<Elem: Vectors>>>(
    x: Elements<<D::S as Simd>::Elem>,
    [first, second]: [Option<usize>; 2],
    strips: &Pieces,
    some: Range<usize>,
    size: usize,
    [rows, apart]: [usize; 2],
    last: bool,
    to: *mut u32,
) {
    debug_assert!(rows == 1 || some.len() <= GROUP / STRIP, "rows of more strips than are near");
    let mut near = MaybeUninit::<[u32; GROUP + STRIP]>::uninit();
    let near = near.as_mut_ptr().cast::<u32>();
    let mut group = some.start;
    while group < some.end {
        let end = some.end.min(group + GROUP / STRIP);
        let start = strips.start(group);
        let columns = strips.start(end - 1) + strips.len(end - 1) - start;
        let first = first.map(|at| at + start);
        let second = second.map(|at| at + start);
        // SAFETY: there is room for as many columns of all rows, and for a whole strip after the last.
        unsafe {
            across::<D>(x, [first, second], rows * columns, near);
            for i in group..end {
                let mut from = near.add(strips.start(i) - start);
                let mut to = to.add((i - some.start) * size);
                // (Whatever lies behind the columns.)
                for _ in 0..if last { rows - 1 } else { rows } {
                    std::ptr::copy_nonoverlapping(from, to, STRIP);
                    (from, to) = (from.add(columns), to.add(apart));
                }
                for j in 0..if last { strips.len(i) } else { 0 } {
                    *to.add(j) = *from.add(j);
                }
            }
        }
        group = end;
    }
}

/// See [`Terms::put_beside`]: in plain arithmetic.
///
/// # Safety
/// As of the method.
#[cfg(any(test, target_arch = "aarch64"))]
#[inline(always)]
unsafe fn beside_plainly<S: Simd>(v: S::V, to: *mut u32) {
    let mut all = [num_traits::zero(); crate::kernels::simd::WIDEST];
    // SAFETY: the caller's promise.
    unsafe {
        S::store(all.as_mut_ptr(), v);
        for i in 0..S::LANES / 2 {
            *to.add(i) = pair([all[2 * i], all[2 * i + 1]]);
        }
    }
}

/// See [`Terms::put_across`]: in plain arithmetic.
///
/// # Safety
/// As of the method.
#[cfg(any(test, target_arch = "aarch64"))]
#[inline(always)]
unsafe fn across_plainly<S: Simd>(nth: usize, v: S::V, to: *mut u32) {
    let mut all = [num_traits::zero(); crate::kernels::simd::WIDEST];
    // SAFETY: the caller's promise.
    unsafe {
        S::store(all.as_mut_ptr(), v);
        for i in 0..S::LANES {
            let rounded = pair([all[i], num_traits::zero()]);
            *to.add(i) = if nth == 0 { rounded } else { *to.add(i) | rounded << 16 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both ways of pairing, of some elements.
    struct Both<'a, T> {
        x: Elements<'a, T>,
        start: usize,
        n: usize,
        out: [&'a mut [u32]; 3],
    }

    impl<T: Vectors> PairKernel<T> for Both<'_, T> {
        #[inline(always)]
        unsafe fn run<D: Pairs<S: Simd<Elem = T>>>(self) {
            let Both { x, start, n, out: [beside, rows, alone] } = self;
            // SAFETY: the test's slices are long enough.
            unsafe {
                neighbours::<D>(x, start, n, beside.as_mut_ptr());
                across::<D>(x, [Some(start), Some(start + n)], n, rows.as_mut_ptr());
                across::<D>(x, [Some(start), None], n, alone.as_mut_ptr());
            }
        }
    }

    #[test]
    fn pairs_are_rounded_elements() {
        let x: Vec<f32> = (0..300).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
        let wide: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
        let bits: Vec<u16> = x.iter().map(|x| to_bf16(*x)).collect();
        let mut small = vec![0; x.len()];
        Half::F16.round_all(&x, &mut small);
        let mut of_small = vec![0.0; x.len()];
        Half::F16.widen_all(&small, &mut of_small);
        for n in [1usize, 2, 7, 16, 31, 32, 33, 64, 65, 130] {
            let start = 3;
            let check = |what: &str, bits: &dyn Fn(usize) -> u16, got: [Vec<u32>; 3]| {
                let pair = |a: u16, b: u16| u32::from(a) | u32::from(b) << 16;
                for i in 0..n.div_ceil(2) {
                    let second = if 2 * i + 1 < n { bits(start + 2 * i + 1) } else { 0 };
                    assert_eq!(got[0][i], pair(bits(start + 2 * i), second), "{what}, {i} of {n}");
                }
                for i in 0..n {
                    assert_eq!(got[1][i], pair(bits(start + i), bits(start + n + i)), "{what}, {i} of {n}");
                    assert_eq!(got[2][i], pair(bits(start + i), 0), "{what}, {i} of {n}");
                }
                assert!(got.iter().all(|all| all[n..].iter().all(|x| *x == 7)), "{what}: {n}");
            };
            let mut made = [vec![7; 140], vec![7; 140], vec![7; 140]];
            let mut run = |x: Elements<f32>| {
                let out = made.each_mut().map(|v| &mut v[..]);
                // SAFETY: there is room.
                unsafe { f32::dispatch_pairs(Both { x, start, n, out }) }
                made.clone()
            };
            check("f32", &|i| bits[i], run(Elements::Whole(&x)));
            check("bf16", &|i| bits[i], run(Elements::Half(Half::Bf16, &bits)));
            check("f16", &|i| to_bf16(of_small[i]), run(Elements::Half(Half::F16, &small)));
            let out = made.each_mut().map(|v| &mut v[..]);
            // SAFETY: as above.
            unsafe { f64::dispatch_pairs(Both { x: Elements::Whole(&wide), start, n, out }) }
            check("f64", &|i| bits[i], made);
        }
    }
}
