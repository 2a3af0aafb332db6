//! Depthwise convolution (one input and one output channel a group) and its gradients, channels last.
//!
//! Vectors run over channels. All three stream: a row of outputs is computed from the few rows of inputs it needs,
//! several positions at a time where no tap falls outside. Bound by memory, not by arithmetic.
#![allow(unsafe_code, clippy::needless_range_loop)]

use rayon::prelude::*;

use crate::kernels::conv::{Epilogue, Geometry, Residual, volume};
use crate::kernels::gemm::Shared;
use crate::kernels::simd::{Kernel, Simd, Vectors};

/// Multiply-adds worth a task of their own.
const WORK: usize = 1 << 17;
/// Positions computed at a time.
const POSITIONS: usize = 4;
/// Sums of the weight gradient, each over a share of the rows.
const SLABS: usize = 8;
/// Positions of a row over which the weight gradient is summed in registers.
const STRETCH: usize = 16;

fn split(t: usize, k: [usize; 3]) -> [usize; 3] {
    [t / (k[1] * k[2]), t / k[2] % k[1], t % k[2]]
}

/// Rows of outputs, along the last dimension, of all images.
fn rows(n: usize, y: [usize; 3]) -> usize {
    n * y[0] * y[1]
}

/// Rows a task: enough work, and not so many that few tasks remain.
fn rows_each(total: usize, work_a_row: usize) -> usize {
    WORK.div_ceil(work_a_row.max(1)).clamp(1, total.max(1))
}

/// Weights (C, 1, k…) as (k…, C), perhaps with the taps in reverse.
fn by_tap<T: Vectors>(c: usize, taps: usize, reverse: bool, w: &[T], out: &mut [T]) {
    for (t, out) in out.chunks_exact_mut(c).enumerate().take(taps) {
        let t = if reverse { taps - 1 - t } else { t };
        for (out, w) in out.iter_mut().zip(w[t..].iter().step_by(taps)) {
            *out = *w;
        }
    }
}

/// The values along one dimension that a tap may have for the position `at`: taps `t` with
/// `0 ≤ at·stride + t·dilation − pad < extent`.
#[inline(always)]
fn inside(at: usize, stride: usize, dilation: usize, pad: usize, k: usize, extent: usize) -> (usize, usize) {
    let start = at * stride;
    let from = pad.saturating_sub(start).div_ceil(dilation).min(k);
    let to = (extent + pad).saturating_sub(start).div_ceil(dilation).clamp(from, k);
    (from, to)
}

struct Forward<'a, T> {
    g: &'a Geometry,
    x: &'a [T],
    /// (k…, C)
    w: &'a [T],
    epilogue: Epilogue<'a, T>,
    y: *mut T,
    rows: std::ops::Range<usize>,
}

impl<T: Vectors> Kernel<T> for Forward<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(self) {
        let g = self.g;
        let c = g.c;
        let [_, _, k2] = g.k;
        let (s, d, pad) = (g.stride[2], g.dilation[2], g.pad[2]);
        // Positions of a row for which no tap falls outside.
        let first = pad.div_ceil(s).min(g.y[2]);
        let last = match (g.x[2] + pad).checked_sub((k2 - 1) * d + 1) {
            Some(room) => (room / s + 1).clamp(first, g.y[2]),
            None => first,
        };
        for row in self.rows.clone() {
            let [image, o0, o1] = split(row, [g.n, g.y[0], g.y[1]]);
            let (a0, b0) = inside(o0, g.stride[0], g.dilation[0], g.pad[0], g.k[0], g.x[0]);
            let (a1, b1) = inside(o1, g.stride[1], g.dilation[1], g.pad[1], g.k[1], g.x[1]);
            let line = Line {
                g,
                x: self.x,
                w: self.w,
                epilogue: &self.epilogue,
                y: self.y,
                y_row: row * g.y[2] * c,
                image,
                origin: [o0 * g.stride[0], o1 * g.stride[1]],
                taps: [(a0, b0), (a1, b1)],
            };
            // SAFETY: the taps given lie inside the input; the row's outputs are this task's.
            unsafe {
                for o in 0..first {
                    line.edge::<S>(o);
                }
                let mut o = first;
                while o + POSITIONS <= last {
                    line.positions::<S, POSITIONS>(o, 0, k2);
                    o += POSITIONS;
                }
                while o < last {
                    line.positions::<S, 1>(o, 0, k2);
                    o += 1;
                }
                for o in last..g.y[2] {
                    line.edge::<S>(o);
                }
            }
        }
    }
}

/// One row of outputs.
struct Line<'a, T> {
    g: &'a Geometry,
    x: &'a [T],
    w: &'a [T],
    epilogue: &'a Epilogue<'a, T>,
    y: *mut T,
    y_row: usize,
    image: usize,
    origin: [usize; 2],
    /// Of the first two dimensions, from and to.
    taps: [(usize, usize); 2],
}

impl<T: Vectors> Line<'_, T> {
    #[inline(always)]
    unsafe fn edge<S: Simd<Elem = T>>(&self, o: usize) {
        let g = self.g;
        let (a, b) = inside(o, g.stride[2], g.dilation[2], g.pad[2], g.k[2], g.x[2]);
        // SAFETY: the caller's promise.
        unsafe { self.positions::<S, 1>(o, a, b) }
    }

    /// `P` positions from `o`, taps `from..to` of the last dimension.
    #[inline(always)]
    unsafe fn positions<S: Simd<Elem = T>, const P: usize>(&self, o: usize, from: usize, to: usize) {
        let c = self.g.c;
        let mut at = 0;
        // SAFETY: the caller's promise: vectors end at the last channel.
        unsafe {
            while at + S::LANES <= c {
                self.vectors::<S, P, true>(o, from, to, at, S::LANES);
                at += S::LANES;
            }
            if at < c {
                self.vectors::<S, P, false>(o, from, to, at, c - at);
            }
        }
    }

    #[inline(always)]
    unsafe fn vectors<S: Simd<Elem = T>, const P: usize, const WHOLE: bool>(
        &self,
        o: usize,
        from: usize,
        to: usize,
        channel: usize,
        lanes: usize,
    ) {
        let g = self.g;
        let c = g.c;
        // SAFETY: the caller's promise.
        unsafe {
            let mut acc = [match self.epilogue.bias {
                Some(b) => load::<S, WHOLE>(b.as_ptr().add(channel), lanes),
                None => S::splat(T::zero()),
            }; P];
            let (s, d) = (g.stride[2], g.dilation[2]);
            for k0 in self.taps[0].0..self.taps[0].1 {
                for k1 in self.taps[1].0..self.taps[1].1 {
                    let i0 = self.origin[0] + k0 * g.dilation[0] - g.pad[0];
                    let i1 = self.origin[1] + k1 * g.dilation[1] - g.pad[1];
                    let line = ((self.image * g.x[0] + i0) * g.x[1] + i1) * g.x[2];
                    let x = self.x.as_ptr().wrapping_add(
                        (line + o * s).wrapping_sub(g.pad[2]).wrapping_mul(c).wrapping_add(channel),
                    );
                    let w = self.w.as_ptr().add((k0 * g.k[1] + k1) * g.k[2] * c + channel);
                    for k2 in from..to {
                        let w = load::<S, WHOLE>(w.add(k2 * c), lanes);
                        for i in 0..P {
                            let x = load::<S, WHOLE>(x.wrapping_add((i * s + k2 * d) * c), lanes);
                            acc[i] = S::fma(x, w, acc[i]);
                        }
                    }
                }
            }
            let (low, high) = (S::splat(self.epilogue.clamp.low), S::splat(self.epilogue.clamp.high));
            for i in 0..P {
                let at = self.y_row + (o + i) * c + channel;
                let y = self.y.add(at);
                let mut v = acc[i];
                match self.epilogue.residual {
                    Residual::None => {}
                    Residual::Of(r) => v = S::add(v, load::<S, WHOLE>(r.as_ptr().add(at), lanes)),
                    Residual::InOutput => v = S::add(v, load::<S, WHOLE>(y, lanes)),
                }
                v = S::min(high, S::max(low, v));
                if WHOLE { S::store(y, v) } else { S::store_part(y, v, lanes) }
            }
        }
    }
}

/// # Safety
/// `p` must be valid for a vector, or for its first `n` lanes.
#[inline(always)]
unsafe fn load<S: Simd, const WHOLE: bool>(p: *const S::Elem, n: usize) -> S::V {
    // SAFETY: the caller's promise.
    unsafe { if WHOLE { S::load(p) } else { S::load_part(p, n) } }
}

/// Elements of scratch that [`forward`] and [`input_grad`] need.
pub fn scratch(g: &Geometry) -> usize {
    g.taps() * g.c
}

/// `y = clamp(conv(x, w) + bias + residual)`, all (N, spatial…, C).
pub fn forward<T: Vectors>(
    g: &Geometry,
    x: &[T],
    w: &[T],
    epilogue: Epilogue<T>,
    y: &mut [T],
    scratch: &mut [T],
) {
    by_tap(g.c, g.taps(), false, w, scratch);
    sweep(g, x, scratch, epilogue, y);
}

fn sweep<T: Vectors>(g: &Geometry, x: &[T], w: &[T], epilogue: Epilogue<T>, y: &mut [T]) {
    assert!(
        x.len() == g.n * g.c * volume(g.x) && y.len() == g.n * g.c * volume(g.y),
        "operands of a convolution"
    );
    let total = rows(g.n, g.y);
    let each = rows_each(total, g.y[2] * g.c * g.taps());
    let y = Shared::new(y);
    tasks(total, each, |rows| {
        // SAFETY: tasks write different rows of `y`; the extents were checked.
        unsafe { T::dispatch(Forward { g, x, w, epilogue, y: y.ptr(), rows }) }
    });
}

fn tasks(total: usize, each: usize, f: impl Fn(std::ops::Range<usize>) + Sync) {
    let range = |i: usize| i * each..total.min((i + 1) * each);
    match total.div_ceil(each) {
        1 => f(0..total),
        n => (0..n).into_par_iter().for_each(|i| f(range(i))),
    }
}

struct InputGrad<'a, T> {
    g: &'a Geometry,
    dy: &'a [T],
    w: &'a [T],
    epilogue: Epilogue<'a, T>,
    dx: *mut T,
    rows: std::ops::Range<usize>,
}

/// The output position that tap `t` of dimension `d` reads input position `i` for, if there is one.
#[inline(always)]
fn output(g: &Geometry, d: usize, i: usize, t: usize) -> Option<usize> {
    let at = (i + g.pad[d]).checked_sub(t * g.dilation[d])?;
    let o = at / g.stride[d];
    (o * g.stride[d] == at && o < g.y[d]).then_some(o)
}

impl<T: Vectors> Kernel<T> for InputGrad<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(self) {
        let g = self.g;
        for row in self.rows.clone() {
            let [image, i0, i1] = split(row, [g.n, g.x[0], g.x[1]]);
            for i2 in 0..g.x[2] {
                let at = (row * g.x[2] + i2) * g.c;
                let mut channel = 0;
                // SAFETY: vectors end at the last channel.
                unsafe {
                    while channel + S::LANES <= g.c {
                        self.vector::<S, true>(image, [i0, i1, i2], at, channel, S::LANES);
                        channel += S::LANES;
                    }
                    if channel < g.c {
                        self.vector::<S, false>(image, [i0, i1, i2], at, channel, g.c - channel);
                    }
                }
            }
        }
    }
}

impl<T: Vectors> InputGrad<'_, T> {
    /// One position's channels from `channel` on.
    #[inline(always)]
    unsafe fn vector<S: Simd<Elem = T>, const WHOLE: bool>(
        &self,
        image: usize,
        i: [usize; 3],
        at: usize,
        channel: usize,
        lanes: usize,
    ) {
        let g = self.g;
        // SAFETY: the caller's promise; taps without an output position are left out.
        unsafe {
            let mut acc = S::splat(T::zero());
            for t0 in 0..g.k[0] {
                let Some(o0) = output(g, 0, i[0], t0) else { continue };
                for t1 in 0..g.k[1] {
                    let Some(o1) = output(g, 1, i[1], t1) else { continue };
                    for t2 in 0..g.k[2] {
                        let Some(o2) = output(g, 2, i[2], t2) else { continue };
                        let o = ((image * g.y[0] + o0) * g.y[1] + o1) * g.y[2] + o2;
                        let t = (t0 * g.k[1] + t1) * g.k[2] + t2;
                        let dy = load::<S, WHOLE>(self.dy.as_ptr().add(o * g.c + channel), lanes);
                        let w = load::<S, WHOLE>(self.w.as_ptr().add(t * g.c + channel), lanes);
                        acc = S::fma(dy, w, acc);
                    }
                }
            }
            let dx = self.dx.add(at + channel);
            match self.epilogue.residual {
                Residual::None => {}
                Residual::Of(r) => acc = S::add(acc, load::<S, WHOLE>(r.as_ptr().add(at + channel), lanes)),
                Residual::InOutput => acc = S::add(acc, load::<S, WHOLE>(dx, lanes)),
            }
            if WHOLE { S::store(dx, acc) } else { S::store_part(dx, acc, lanes) }
        }
    }
}

/// `dx = addend + the gradient`; of the epilogue only the residual counts.
pub fn input_grad<T: Vectors>(
    g: &Geometry,
    dy: &[T],
    w: &[T],
    epilogue: Epilogue<T>,
    dx: &mut [T],
    scratch: &mut [T],
) {
    // With unit stride it is a convolution with the taps in reverse.
    let pad: [Option<usize>; 3] =
        std::array::from_fn(|d| ((g.k[d] - 1) * g.dilation[d]).checked_sub(g.pad[d]));
    if let ([1, 1, 1], [Some(a), Some(b), Some(c)]) = (g.stride, pad) {
        by_tap(g.c, g.taps(), true, w, scratch);
        return sweep(&Geometry { x: g.y, y: g.x, pad: [a, b, c], ..g.clone() }, dy, scratch, epilogue, dx);
    }
    assert!(
        dx.len() == g.n * g.c * volume(g.x) && dy.len() == g.n * g.c * volume(g.y),
        "operands of a convolution"
    );
    by_tap(g.c, g.taps(), false, w, scratch);
    let w: &[T] = scratch;
    let total = rows(g.n, g.x);
    let each = rows_each(total, g.x[2] * g.c * g.taps());
    let dx = Shared::new(dx);
    tasks(total, each, |rows| {
        // SAFETY: tasks write different rows of `dx`; the extents were checked.
        unsafe { T::dispatch(InputGrad { g, dy, w, epilogue, dx: dx.ptr(), rows }) }
    });
}

struct WeightGrad<'a, T> {
    g: &'a Geometry,
    dy: &'a [T],
    x: &'a [T],
    /// (k…, C)
    sum: &'a mut [T],
    rows: std::ops::Range<usize>,
}

impl<T: Vectors> Kernel<T> for WeightGrad<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(self) {
        let g = self.g;
        self.sum.fill(T::zero());
        for row in self.rows.clone() {
            for k0 in 0..g.k[0] {
                for k1 in 0..g.k[1] {
                    let [image, o0, o1] = split(row, [g.n, g.y[0], g.y[1]]);
                    let at = |d: usize, o: usize, k: usize| {
                        let i = (o * g.stride[d] + k * g.dilation[d]).checked_sub(g.pad[d])?;
                        (i < g.x[d]).then_some(i)
                    };
                    let (Some(i0), Some(i1)) = (at(0, o0, k0), at(1, o1, k1)) else { continue };
                    let line = Correlation {
                        g,
                        dy: self.dy[row * g.y[2] * g.c..].as_ptr(),
                        x: self.x[((image * g.x[0] + i0) * g.x[1] + i1) * g.x[2] * g.c..].as_ptr(),
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

/// dW (C, 1, k…) from dY and X, both (N, spatial…, C).
pub fn weight_grad<T: Vectors>(g: &Geometry, dy: &[T], x: &[T], dw: &mut [T], scratch: &mut [T]) {
    assert!(
        x.len() == g.n * g.c * volume(g.x) && dy.len() == g.n * g.c * volume(g.y),
        "operands of a convolution"
    );
    let (total, size) = (rows(g.n, g.y), g.taps() * g.c);
    let slabs = (total * g.y[2] * size / WORK).clamp(1, SLABS.min(total));
    let sums = &mut scratch[..slabs * size];
    let one = |(slab, sum): (usize, &mut [T])| {
        let rows = total * slab / slabs..total * (slab + 1) / slabs;
        // SAFETY: the extents were checked.
        unsafe { T::dispatch(WeightGrad { g, dy, x, sum, rows }) }
    };
    match slabs {
        1 => one((0, sums)),
        _ => sums.par_chunks_exact_mut(size).enumerate().for_each(one),
    }
    let taps = g.taps();
    for (i, dw) in dw.iter_mut().enumerate() {
        let at = i % taps * g.c + i / taps;
        *dw = (1..slabs).fold(scratch[at], |sum, s| sum + scratch[s * size + at]);
    }
}
