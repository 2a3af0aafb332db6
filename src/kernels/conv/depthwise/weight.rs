//! The weight gradient of depthwise convolution, and of narrow groups.
#![allow(unsafe_code, clippy::needless_range_loop)]

use std::ops::Range;

use super::inputs::{Inputs, Member, with_inputs};
use super::line::strip_at;
use super::{Direction, WORK};
use crate::kernels::conv::load::{Operand, Rows};
use crate::kernels::conv::{Geometry, in_slots, split};
use crate::kernels::par::Shared;
use crate::kernels::simd::{Kernel, Level, Simd, Vectors, load_lanes, store_lanes};

/// Sums, each over a share of the rows.
const SLABS: usize = 8;
/// Positions of a row over which is summed in registers.
const STRETCH: usize = 64;

/// Some rows of dY, all images' counted.
struct WeightGrad<'a, T, I> {
    g: &'a Geometry,
    inputs: I,
    dy: &'a [T],
    x: Rows<'a, T>,
    /// (k…, width, C)
    sum: &'a mut [T],
    rows: std::ops::Range<usize>,
}

impl<T: Vectors, I: Inputs> Kernel<T> for WeightGrad<'_, T, I> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(mut self) {
        let line = self.g.y[2] * self.g.c;
        self.sum.fill(T::zero());
        for row in self.rows.clone() {
            let dy = self.dy[row * line..][..line].as_ptr();
            let next = dy.wrapping_add(line);
            // SAFETY: a row of dY.
            unsafe { add_row::<S, I>(self.g, self.inputs, row, dy, next, &mut self.x, self.sum) }
        }
    }
}

/// Adds what row `row` of dY contributes to the sum (k…, width, C). `soon`: a row like that one that will be read soon.
///
/// # Safety
/// `dy` must be that row, and the processor have `S`'s instructions.
#[inline(always)]
unsafe fn add_row<S: Simd, I: Inputs>(
    g: &Geometry,
    inputs: I,
    row: usize,
    dy: *const S::Elem,
    soon: *const S::Elem,
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
    let (row_sum, around, steps) = (g.k[2] * g.cg() * g.c, x.around(), x.steps());
    for k0 in 0..g.k[0] {
        let Some(i0) = at(0, o0, k0) else { continue };
        let mut k1 = 0;
        while k1 < g.k[1] {
            let rows: [Option<usize>; 3] =
                std::array::from_fn(|r| if k1 + r < g.k[1] { at(1, o1, k1 + r) } else { None });
            let sum = sum[(k0 * g.k[1] + k1) * row_sum..].as_mut_ptr();
            // SAFETY: the caller's promise; the rows lie inside.
            unsafe {
                match rows {
                    // Three rows at a time, so that no sum waits for its last addition.
                    [Some(a), Some(b), Some(c)] => {
                        let x = [x.at(image, i0, a), x.at(image, i0, b), x.at(image, i0, c)];
                        Correlation { g, inputs, dy, soon, x, steps, around, sum }.row::<S>();
                        k1 += 3;
                    }
                    [Some(a), ..] => {
                        let x = [x.at(image, i0, a)];
                        Correlation { g, inputs, dy, soon, x, steps, around, sum }.row::<S>();
                        k1 += 1;
                    }
                    _ => k1 += 1,
                }
            }
        }
    }
}

/// One row of dY with `R` rows of X.
struct Correlation<'a, T, I, const R: usize> {
    g: &'a Geometry,
    inputs: I,
    dy: *const T,
    /// Is fetched meanwhile.
    soon: *const T,
    x: [*const T; R],
    /// Of the rows of X.
    steps: [usize; 2],
    /// Zeros that may be read before and after a row of X, in positions.
    around: [usize; 2],
    /// (R, k, width, C)
    sum: *mut T,
}

impl<T: Vectors, I: Inputs, const R: usize> Correlation<'_, T, I, R> {
    /// All taps of a row, three at a time.
    #[inline(always)]
    unsafe fn row<S: Simd<Elem = T>>(&self) {
        let mut tap = 0;
        // SAFETY: the caller's promise.
        unsafe {
            while tap < self.g.k[2] {
                let taps = (self.g.k[2] - tap).min(3);
                match taps {
                    3 => self.taps::<S, 3>(tap),
                    2 => self.taps::<S, 2>(tap),
                    _ => self.taps::<S, 1>(tap),
                }
                tap += taps;
            }
        }
    }

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
        let reach = (g.y[2].max(1) - 1) * s + (g.k[2] - 1) * d + 1;
        let zeros = pad <= self.around[0] && reach <= pad + g.x[2] + self.around[1];
        // SAFETY: the caller's promise; positions outside `from..to` are taken tap by tap, unless there are zeros.
        unsafe {
            let mut o = from;
            while o + STRETCH < to {
                self.stretches::<S, K>(first, [o..o + STRETCH, 0..0, 0..0]);
                o += STRETCH;
            }
            let edges = if zeros { [0..from, to..g.y[2]] } else { [0..0, 0..0] };
            let [before, after] = edges;
            self.stretches::<S, K>(first, [o..to, before, after]);
            if zeros {
                return;
            }
            for t in first..first + K {
                let (a, b) = range(t);
                self.stretches::<S, 1>(t, [a..from.min(b), to.max(a)..b, 0..0]);
            }
        }
    }

    /// Some taps of positions in this order.
    #[inline(always)]
    unsafe fn stretches<S: Simd<Elem = T>, const K: usize>(&self, tap: usize, stretches: [Range<usize>; 3]) {
        // Where a position's taps are its neighbours', each element of X is loaded once, if there are registers for that.
        let slides = K == 3 && Level::of::<S>().is_roomy() && self.g.stride[2] == self.g.dilation[2];
        // SAFETY: the caller's promise.
        unsafe {
            match slides {
                true => self.channels::<S, K, true>(tap, &stretches),
                false => self.channels::<S, K, false>(tap, &stretches),
            }
        }
    }

    #[inline(always)]
    unsafe fn channels<S: Simd<Elem = T>, const K: usize, const SLIDES: bool>(
        &self,
        tap: usize,
        stretches: &[Range<usize>; 3],
    ) {
        let (c, width) = (self.g.c, self.g.cg());
        for channel in (0..c).step_by(S::LANES) {
            let lanes = S::LANES.min(c - channel);
            for number in 0..if I::ALONE { 1 } else { width } {
                // SAFETY: the caller's promise; vectors end at the last channel.
                unsafe {
                    let member = Member::new(width, number);
                    match lanes == S::LANES {
                        true => self.vector::<S, K, true, SLIDES>(
                            tap,
                            stretches,
                            [channel, number],
                            lanes,
                            &member,
                        ),
                        false => self.vector::<S, K, false, SLIDES>(
                            tap,
                            stretches,
                            [channel, number],
                            lanes,
                            &member,
                        ),
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn vector<S: Simd<Elem = T>, const K: usize, const WHOLE: bool, const SLIDES: bool>(
        &self,
        tap: usize,
        stretches: &[Range<usize>; 3],
        [channel, number]: [usize; 2],
        lanes: usize,
        member: &Member<S>,
    ) {
        let (c, width) = (self.g.c, self.g.cg());
        let (tap_sums, first) = (width * c, number * c + channel);
        let (sums, row) = (self.sum.wrapping_add(tap * tap_sums + first), self.g.k[2] * tap_sums);
        // SAFETY: the caller's promise.
        unsafe {
            let mut acc = [[S::splat(T::zero()); K]; R];
            for r in 0..R {
                for k in 0..K {
                    acc[r][k] = load_lanes::<S, WHOLE>(sums.wrapping_add(r * row + k * tap_sums), lanes);
                }
            }
            for stretch in stretches {
                if !stretch.is_empty() {
                    acc = self.add::<S, K, WHOLE, SLIDES>(tap, stretch.clone(), channel, lanes, member, acc);
                }
            }
            for r in 0..R {
                for k in 0..K {
                    store_lanes::<S, WHOLE>(sums.wrapping_add(r * row + k * tap_sums), acc[r][k], lanes);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn add<S: Simd<Elem = T>, const K: usize, const WHOLE: bool, const SLIDES: bool>(
        &self,
        tap: usize,
        positions: Range<usize>,
        channel: usize,
        lanes: usize,
        member: &Member<S>,
        mut acc: [[S::V; K]; R],
    ) -> [[S::V; K]; R] {
        let g = self.g;
        let (c, o, count) = (g.c, positions.start, positions.len());
        let i = (o * g.stride[2] + tap * g.dilation[2]).wrapping_sub(g.pad[2]);
        let (step, at) = match I::ALONE {
            true => (c, channel),
            false => (self.steps[0], strip_at(self.steps, channel)),
        };
        let first = i.wrapping_mul(step).wrapping_add(at);
        let (x_step, dilation) = (g.stride[2] * step, g.dilation[2] * step);
        // SAFETY: the caller's promise.
        unsafe {
            let mut x = self.x;
            for r in 0..R {
                x[r] = x[r].wrapping_add(first);
            }
            let mut dy = self.dy.add(o * c + channel);
            // (Fetched in the order in which it lies, not in that in which it is read, and a line by one of its vectors.)
            let fetches = S::begins_line(channel);
            let soon = (o * c).wrapping_add(channel * count);
            let mut soon = self.soon.wrapping_add(soon);
            let mut near = [[S::splat(T::zero()); K]; R];
            if SLIDES {
                for r in 0..R {
                    for k in 1..K {
                        near[r][k] =
                            self.inputs.of::<S, WHOLE>(x[r].wrapping_add((k - 1) * dilation), lanes, member);
                    }
                    x[r] = x[r].wrapping_add((K - 1) * dilation);
                }
            }
            for _ in 0..count {
                let v = load_lanes::<S, WHOLE>(dy, lanes);
                dy = dy.wrapping_add(c);
                if fetches {
                    S::prefetch(soon);
                    soon = soon.wrapping_add(S::LINE);
                }
                for r in 0..R {
                    for k in 0..K {
                        near[r][k] = match SLIDES {
                            true if k + 1 < K => near[r][k + 1],
                            true => self.inputs.of::<S, WHOLE>(x[r], lanes, member),
                            false => {
                                self.inputs.of::<S, WHOLE>(x[r].wrapping_add(k * dilation), lanes, member)
                            }
                        };
                        acc[r][k] = S::fma(near[r][k], v, acc[r][k]);
                    }
                    x[r] = x[r].wrapping_add(x_step);
                }
            }
            acc
        }
    }
}

/// Elements of scratch that [`weight_grad`] needs, and more of it where X is not plain.
pub fn weight_grad_scratch(g: &Geometry, plain: bool) -> usize {
    SLABS * (g.taps() * g.cg() * g.c + Direction::forward(g).ring(plain))
}

/// dW (C, width, k…) from dY and X, both (N, spatial…, C).
pub fn weight_grad<T: Vectors>(g: &Geometry, dy: &[T], x: Operand<T>, dw: &mut [T], scratch: &mut [T]) {
    g.check_sizes(x.data.len(), dy.len());
    x.check();
    let (total, size) = (g.n * g.y[0] * g.y[1], g.taps() * g.cg() * g.c);
    let slabs = (total * g.y[2] * size / WORK).clamp(1, SLABS.min(total));
    let (sums, rings) = scratch.split_at_mut(SLABS * size);
    let sums = &mut sums[..slabs * size];
    let shared = Shared::new(sums);
    let way = Direction::forward(g);
    in_slots(slabs, way.ring(x.is_plain()), rings, |slab, ring| {
        let rows = total * slab / slabs..total * (slab + 1) / slabs;
        // SAFETY: the slab's own sum.
        let sum = unsafe { std::slice::from_raw_parts_mut(shared.ptr().add(slab * size), size) };
        let x = way.rows(x, ring);
        with_inputs!(g, inputs => {
            // SAFETY: the extents were checked.
            unsafe { T::dispatch(WeightGrad { g, inputs, dy, x, sum, rows }) }
        });
    });
    finish(g, sums, dw);
}

/// Adds the slabs' sums (k…, width, C) in order, for dW (C, width, k…).
pub(super) fn finish<T: Vectors>(g: &Geometry, sums: &mut [T], dw: &mut [T]) {
    let (taps, each) = (g.taps(), g.cg() * g.c);
    let (first, more) = sums.split_at_mut(taps * each);
    for sum in more.chunks_exact(taps * each) {
        first.iter_mut().zip(sum).for_each(|(a, b)| *a += *b);
    }
    for (i, dw) in dw.chunks_exact_mut(taps).enumerate() {
        let at = i % g.cg() * g.c + i / g.cg();
        for (t, dw) in dw.iter_mut().enumerate() {
            *dw = first[t * each + at];
        }
    }
}
