//! The weight gradient of depthwise convolution.
#![allow(unsafe_code, clippy::needless_range_loop)]

use rayon::prelude::*;
use smallvec::{SmallVec, smallvec};

use super::{WORK, load};
use crate::kernels::conv::{Geometry, Load, split};
use crate::kernels::simd::{Kernel, Simd, Vectors, load_up_to, store_up_to};

/// Sums, each over a share of the rows.
const SLABS: usize = 8;
/// Positions of a row over which is summed in registers.
const STRETCH: usize = 16;

struct WeightGrad<'a, T> {
    g: &'a Geometry,
    dy: &'a [T],
    x: &'a [T],
    load: Option<Load<'a, T>>,
    /// Rows of X as they are loaded: those that a row of dY needs.
    ring: &'a mut [T],
    /// (k…, C)
    sum: &'a mut [T],
    rows: std::ops::Range<usize>,
}

impl<T: Vectors> Kernel<T> for WeightGrad<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(self) {
        let g = self.g;
        self.sum.fill(T::zero());
        let (line, [planes, lines]) = (g.x[2] * g.c, window(g));
        let mut held: SmallVec<[usize; 16]> = match self.load {
            Some(_) => smallvec![usize::MAX; planes * lines],
            None => SmallVec::new(),
        };
        for row in self.rows.clone() {
            for k0 in 0..g.k[0] {
                for k1 in 0..g.k[1] {
                    let [image, o0, o1] = split(row, [g.n, g.y[0], g.y[1]]);
                    let at = |d: usize, o: usize, k: usize| {
                        let i = (o * g.stride[d] + k * g.dilation[d]).checked_sub(g.pad[d])?;
                        (i < g.x[d]).then_some(i)
                    };
                    let (Some(i0), Some(i1)) = (at(0, o0, k0), at(1, o1, k1)) else { continue };
                    let x_row = (image * g.x[0] + i0) * g.x[1] + i1;
                    let x = match self.load {
                        None => self.x[x_row * line..].as_ptr(),
                        Some(load) => {
                            let slot = i0 % planes * lines + i1 % lines;
                            let row = &mut self.ring[slot * line..][..line];
                            if held[slot] != x_row {
                                held[slot] = x_row;
                                // SAFETY: this is inside a kernel of the level.
                                unsafe { fill::<S>(&load, &self.x[x_row * line..][..line], row) }
                            }
                            row.as_ptr()
                        }
                    };
                    let line = Correlation {
                        g,
                        dy: self.dy[row * g.y[2] * g.c..].as_ptr(),
                        x,
                        sum: self.sum[(k0 * g.k[1] + k1) * g.k[2] * g.c..].as_mut_ptr(),
                    };
                    let mut tap = 0;
                    // SAFETY: the rows lie inside their slices.
                    unsafe {
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
    }
}

/// Planes, and rows of each, among which those of X lie that a row of dY needs.
fn window(g: &Geometry) -> [usize; 2] {
    [(g.k[0] - 1) * g.dilation[0] + 1, (g.k[1] - 1) * g.dilation[1] + 1]
}

/// A row of X as it is loaded.
///
/// # Safety
/// The processor must have `S`'s instructions.
#[inline(always)]
unsafe fn fill<S: Simd>(load: &Load<S::Elem>, x: &[S::Elem], out: &mut [S::Elem]) {
    let c = load.mean.len();
    let (low, high) = (load.clamp.low, load.clamp.high);
    assert!(load.factor.len() == c && load.shift.len() == c && x.len() == out.len());
    for position in 0..x.len() / c.max(1) {
        let mut channel = 0;
        while channel < c {
            let (at, n) = (position * c + channel, S::LANES.min(c - channel));
            // SAFETY: `n` elements of a position and of each coefficient follow.
            unsafe {
                let mean = load_up_to::<S>(load.mean.as_ptr().add(channel), n);
                let factor = load_up_to::<S>(load.factor.as_ptr().add(channel), n);
                let shift = load_up_to::<S>(load.shift.as_ptr().add(channel), n);
                let x = load_up_to::<S>(x.as_ptr().add(at), n);
                let x = S::add(S::mul(S::sub(x, mean), factor), shift);
                let x = S::min(S::splat(high), S::max(S::splat(low), x));
                store_up_to::<S>(out.as_mut_ptr().add(at), x, n);
            }
            channel += n;
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

/// Elements of scratch that [`weight_grad`] needs.
pub fn weight_grad_scratch(g: &Geometry) -> usize {
    SLABS * g.taps() * g.c
}

/// And those of a [`Load`] besides.
pub fn load_scratch(g: &Geometry) -> usize {
    SLABS * ring(g)
}

/// Elements of a slab's rows of X.
fn ring(g: &Geometry) -> usize {
    window(g).iter().product::<usize>() * g.x[2] * g.c
}

/// dW (C, 1, k…) from dY and X, both (N, spatial…, C).
pub fn weight_grad<T: Vectors>(
    g: &Geometry,
    dy: &[T],
    x: &[T],
    load: Option<Load<T>>,
    dw: &mut [T],
    scratch: &mut [T],
) {
    g.check(x, dy);
    let (total, size) = (g.n * g.y[0] * g.y[1], g.taps() * g.c);
    let slabs = (total * g.y[2] * size / WORK).clamp(1, SLABS.min(total));
    let (scratch, rings) = scratch.split_at_mut(SLABS * size);
    let rows = if load.is_some() { ring(g) } else { 0 };
    let one = |slab: usize, sum: &mut [T], ring: &mut [T]| {
        let rows = total * slab / slabs..total * (slab + 1) / slabs;
        // SAFETY: the extents were checked.
        unsafe { T::dispatch(WeightGrad { g, dy, x, load, ring, sum, rows }) }
    };
    let sums = &mut scratch[..slabs * size];
    match (slabs, rows) {
        (1, _) => one(0, sums, &mut rings[..rows]),
        (_, 0) => sums.par_chunks_exact_mut(size).enumerate().for_each(|(i, sum)| one(i, sum, &mut [])),
        _ => {
            let both = sums.par_chunks_exact_mut(size).zip(rings.par_chunks_exact_mut(rows));
            both.enumerate().for_each(|(i, (sum, ring))| one(i, sum, ring));
        }
    }
    for s in 1..slabs {
        let (first, more) = scratch.split_at_mut(s * size);
        first[..size].iter_mut().zip(&more[..size]).for_each(|(a, b)| *a += *b);
    }
    for (channel, dw) in dw.chunks_exact_mut(g.taps()).enumerate() {
        for (t, dw) in dw.iter_mut().enumerate() {
            *dw = scratch[t * g.c + channel];
        }
    }
}
