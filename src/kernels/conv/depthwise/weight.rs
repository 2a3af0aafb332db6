//! The weight gradient of depthwise convolution.
#![allow(unsafe_code, clippy::needless_range_loop)]

use super::{WORK, load};
use crate::kernels::conv::load::{Operand, Rows};
use crate::kernels::conv::{Geometry, in_slots, split};
use crate::kernels::par::Shared;
use crate::kernels::simd::{Kernel, Simd, Vectors};

/// Sums, each over a share of the rows.
const SLABS: usize = 8;
/// Positions of a row over which is summed in registers.
const STRETCH: usize = 16;

/// Some rows of dY, all images' counted.
struct WeightGrad<'a, T> {
    g: &'a Geometry,
    dy: &'a [T],
    x: Rows<'a, T>,
    /// (k…, C)
    sum: &'a mut [T],
    rows: std::ops::Range<usize>,
}

impl<T: Vectors> Kernel<T> for WeightGrad<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(mut self) {
        let line = self.g.y[2] * self.g.c;
        self.sum.fill(T::zero());
        for row in self.rows.clone() {
            let dy = self.dy[row * line..][..line].as_ptr();
            // SAFETY: a row of dY.
            unsafe { add_row::<S>(self.g, row, dy, &mut self.x, self.sum) }
        }
    }
}

/// Planes and rows of X among which those lie that a row of dY needs.
pub(super) fn window(g: &Geometry) -> [usize; 2] {
    std::array::from_fn(|d| ((g.k[d] - 1) * g.dilation[d] + 1).min(g.x[d]))
}

/// Adds what row `row` of dY contributes to the sum (k…, C).
///
/// # Safety
/// `dy` must be that row, and the processor have `S`'s instructions.
#[inline(always)]
pub(super) unsafe fn add_row<S: Simd>(
    g: &Geometry,
    row: usize,
    dy: *const S::Elem,
    x: &mut Rows<S::Elem>,
    sum: &mut [S::Elem],
) where
    S::Elem: Vectors,
{
    let [image, o0, o1] = split(row, [g.n, g.y[0], g.y[1]]);
    let at = |d: usize, o: usize, k: usize| {
        let i = (o * g.stride[d] + k * g.dilation[d]).checked_sub(g.pad[d])?;
        (i < g.x[d]).then_some(i)
    };
    for k0 in 0..g.k[0] {
        for k1 in 0..g.k[1] {
            let (Some(i0), Some(i1)) = (at(0, o0, k0), at(1, o1, k1)) else { continue };
            let sum = sum[(k0 * g.k[1] + k1) * g.k[2] * g.c..][..g.k[2] * g.c].as_mut_ptr();
            // SAFETY: the caller's promise; the rows lie inside.
            unsafe {
                let line = Correlation { g, dy, x: x.at::<S>(image, i0, i1), sum };
                let mut tap = 0;
                while tap < g.k[2] {
                    let taps = (g.k[2] - tap).min(3);
                    match taps {
                        3 => line.taps::<S, 3>(tap),
                        2 => line.taps::<S, 2>(tap),
                        _ => line.taps::<S, 1>(tap),
                    }
                    tap += taps;
                }
            }
        }
    }
}

/// One row of dY with one row of X.
struct Correlation<'a, T> {
    g: &'a Geometry,
    dy: *const T,
    x: *const T,
    sum: *mut T,
}

impl<T: Vectors> Correlation<'_, T> {
    /// `K` taps from `first`, all channels.
    #[inline(always)]
    unsafe fn taps<S: Simd<Elem = T>, const K: usize>(&self, first: usize) {
        let g = self.g;
        let (s, d, pad) = (g.stride[2], g.dilation[2], g.pad[2]);
        // Positions for which all of the taps lie inside, and around them those for which some do.
        let range = |t: usize| {
            let from = pad.saturating_sub(t * d).div_ceil(s).min(g.y[2]);
            (from, (g.x[2] + pad).saturating_sub(t * d).div_ceil(s).clamp(from, g.y[2]))
        };
        let from = range(first).0;
        let to = range(first + K - 1).1.max(from);
        // SAFETY: the caller's promise; positions outside `from..to` are taken tap by tap.
        unsafe {
            for o in (from..to).step_by(STRETCH) {
                self.stretch::<S, K>(first, o, STRETCH.min(to - o));
            }
            for t in first..first + K {
                let (a, b) = range(t);
                if a < from.min(b) {
                    self.stretch::<S, 1>(t, a, from.min(b) - a);
                }
                if to.max(a) < b {
                    self.stretch::<S, 1>(t, to.max(a), b - to.max(a));
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn stretch<S: Simd<Elem = T>, const K: usize>(&self, tap: usize, o: usize, count: usize) {
        let c = self.g.c;
        let mut channel = 0;
        // SAFETY: the caller's promise; vectors end at the last channel.
        unsafe {
            while channel + S::LANES <= c {
                self.vector::<S, K, true>(tap, o, count, channel, S::LANES);
                channel += S::LANES;
            }
            if channel < c {
                self.vector::<S, K, false>(tap, o, count, channel, c - channel);
            }
        }
    }

    #[inline(always)]
    unsafe fn vector<S: Simd<Elem = T>, const K: usize, const WHOLE: bool>(
        &self,
        tap: usize,
        o: usize,
        count: usize,
        channel: usize,
        lanes: usize,
    ) {
        let g = self.g;
        let c = g.c;
        let i = (o * g.stride[2] + tap * g.dilation[2]).wrapping_sub(g.pad[2]);
        // SAFETY: the caller's promise.
        unsafe {
            let mut x = self.x.wrapping_add(i.wrapping_mul(c).wrapping_add(channel));
            let mut dy = self.dy.wrapping_add(o * c + channel);
            let sum = self.sum.add(tap * c + channel);
            let mut acc = [S::splat(T::zero()); K];
            for k in 0..K {
                acc[k] = load::<S, WHOLE>(sum.add(k * c), lanes);
            }
            for _ in 0..count {
                let v = load::<S, WHOLE>(dy, lanes);
                for k in 0..K {
                    acc[k] =
                        S::fma(load::<S, WHOLE>(x.wrapping_add(k * g.dilation[2] * c), lanes), v, acc[k]);
                }
                x = x.wrapping_add(g.stride[2] * c);
                dy = dy.wrapping_add(c);
            }
            for k in 0..K {
                match WHOLE {
                    true => S::store(sum.add(k * c), acc[k]),
                    false => S::store_part(sum.add(k * c), acc[k], lanes),
                }
            }
        }
    }
}

/// Elements of scratch that [`weight_grad`] needs, and more of it where X is not plain.
pub fn weight_grad_scratch(g: &Geometry, plain: bool) -> usize {
    SLABS * (g.taps() * g.c + ring(g, plain))
}

/// Elements of a slab's rows of X.
fn ring(g: &Geometry, plain: bool) -> usize {
    if plain { 0 } else { Rows::<f32>::room(g.x, window(g), g.c) }
}

/// dW (C, 1, k…) from dY and X, both (N, spatial…, C).
pub fn weight_grad<T: Vectors>(g: &Geometry, dy: &[T], x: Operand<T>, dw: &mut [T], scratch: &mut [T]) {
    g.check(x.data, dy);
    x.check();
    let (total, size) = (g.n * g.y[0] * g.y[1], g.taps() * g.c);
    let slabs = (total * g.y[2] * size / WORK).clamp(1, SLABS.min(total));
    let (sums, rings) = scratch.split_at_mut(SLABS * size);
    let sums = &mut sums[..slabs * size];
    let shared = Shared::new(sums);
    in_slots(slabs, ring(g, x.is_plain()), rings, |slab, ring| {
        let rows = total * slab / slabs..total * (slab + 1) / slabs;
        // SAFETY: the slab's own sum.
        let sum = unsafe { std::slice::from_raw_parts_mut(shared.ptr().add(slab * size), size) };
        let x = Rows::new(x, g.x, window(g), ring);
        // SAFETY: the extents were checked.
        unsafe { T::dispatch(WeightGrad { g, dy, x, sum, rows }) }
    });
    finish(g, sums, dw);
}

/// Adds the slabs' sums (k…, C) in order, for dW (C, 1, k…).
pub(super) fn finish<T: Vectors>(g: &Geometry, sums: &mut [T], dw: &mut [T]) {
    let size = g.taps() * g.c;
    let (first, more) = sums.split_at_mut(size);
    for sum in more.chunks_exact(size) {
        first.iter_mut().zip(sum).for_each(|(a, b)| *a += *b);
    }
    for (channel, dw) in dw.chunks_exact_mut(g.taps()).enumerate() {
        for (t, dw) in dw.iter_mut().enumerate() {
            *dw = first[t * g.c + channel];
        }
    }
}
