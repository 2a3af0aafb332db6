//! Depthwise convolution (one input and one output channel a group) and its gradients, channels last.
//!
//! Vectors run over channels. All three stream: a row of results is computed from the few rows it needs, several
//! positions at a time where no tap falls outside. Bound by memory, not by arithmetic.
#![allow(unsafe_code, clippy::needless_range_loop)]

use rayon::prelude::*;
use smallvec::SmallVec;

use crate::kernels::conv::{Epilogue, Geometry, Residual, split};
use crate::kernels::par::Shared;
use crate::kernels::simd::{Kernel, Simd, Vectors};

/// Multiply-adds worth a task of their own.
const WORK: usize = 1 << 18;
/// Positions computed at a time.
const POSITIONS: usize = 4;
/// Elements from what is read or written to what is fetched meanwhile: rows of a position's channels are short runs,
/// which do not look like a stream to the processor.
const AHEAD: usize = 1 << 10;
/// Sums of the weight gradient, each over a share of the rows.
const SLABS: usize = 8;
/// Positions of a row over which the weight gradient is summed in registers.
const STRETCH: usize = 16;

/// Weights (C, 1, k…) as (k…, C).
fn by_tap<T: Vectors>(c: usize, taps: usize, w: &[T], out: &mut [T]) {
    for channel in 0..c {
        for t in 0..taps {
            out[t * c + channel] = w[channel * taps + t];
        }
    }
}

/// Which positions of the source the positions of the target sum over: `x` and `y` of a convolution, or, for the
/// gradient, `dy` and `dx`.
#[derive(Clone, Copy)]
struct Direction<'a> {
    g: &'a Geometry,
    source: [usize; 3],
    target: [usize; 3],
    gradient: bool,
}

impl Direction<'_> {
    /// Target positions a source position apart sum over source positions `step` apart, in each of `residues` classes.
    fn step(&self, d: usize) -> usize {
        if self.gradient { 1 } else { self.g.stride[d] }
    }

    fn residues(&self, d: usize) -> usize {
        if self.gradient { self.g.stride[d] } else { 1 }
    }

    /// The source position, perhaps outside, of tap `t` for the target position `q·residues + r`, less `q·step`.
    fn offset(&self, d: usize, r: usize, t: usize) -> Option<isize> {
        let (g, t) = (self.g, (t * self.g.dilation[d]) as isize);
        if !self.gradient {
            return Some(t - g.pad[d] as isize);
        }
        let (at, s) = ((r + g.pad[d]) as isize - t, g.stride[d] as isize);
        (at.rem_euclid(s) == 0).then(|| at.div_euclid(s))
    }

    /// The source position of tap `t` for target position `i`, if it lies inside.
    fn inside(&self, d: usize, i: usize, t: usize) -> Option<usize> {
        let n = self.residues(d);
        let at = (i / n * self.step(d)) as isize + self.offset(d, i % n, t)?;
        (at >= 0 && at < self.source[d] as isize).then_some(at as usize)
    }
}

/// One tap for a row of the target: elements from the row's first to the tap's source and weights.
#[derive(Clone, Copy)]
struct Tap {
    /// Of the first source position of the tap's row.
    x: usize,
    /// Along the row, in positions.
    offset: isize,
    w: usize,
}

/// Some rows of a target, all images' rows counted.
struct Rows<'a, T> {
    way: Direction<'a>,
    x: &'a [T],
    /// (k…, C)
    w: &'a [T],
    epilogue: Epilogue<'a, T>,
    y: *mut T,
    rows: std::ops::Range<usize>,
}

impl<T: Vectors> Kernel<T> for Rows<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(self) {
        let (way, g) = (self.way, self.way.g);
        let (extent, step) = (way.source[2], way.step(2));
        for row in self.rows.clone() {
            let [image, i0, i1] = split(row, [g.n, way.target[0], way.target[1]]);
            for r in 0..way.residues(2).min(way.target[2]) {
                let mut taps: SmallVec<[Tap; 64]> = SmallVec::new();
                for t in 0..g.taps() {
                    let [t0, t1, t2] = split(t, g.k);
                    // Ascending in the source.
                    let t2 = if way.gradient { g.k[2] - 1 - t2 } else { t2 };
                    let t = t / g.k[2] * g.k[2] + t2;
                    let (a, b) = (way.inside(0, i0, t0), way.inside(1, i1, t1));
                    if let (Some(a), Some(b), Some(offset)) = (a, b, way.offset(2, r, t2)) {
                        let x = ((image * way.source[0] + a) * way.source[1] + b) * extent * g.c;
                        taps.push(Tap { x, offset, w: t * g.c });
                    }
                }
                // Positions for which no tap falls outside.
                let least = taps.iter().map(|t| t.offset).min().unwrap_or(0);
                let most = taps.iter().map(|t| t.offset).max().unwrap_or(0);
                let count = (way.target[2] - r).div_ceil(way.residues(2));
                let first = ((-least).max(0) as usize).div_ceil(step).min(count);
                let last = match extent as isize - 1 - most {
                    room if room < 0 => first,
                    room => (room as usize / step + 1).clamp(first, count),
                };
                let last_row = taps.iter().map(|t| t.x).max().unwrap_or(0);
                let fresh = way.step(1).min(last_row / (extent * g.c) + 1);
                let line = Line {
                    taps: &taps,
                    triples: g.k[2] == 3 && g.dilation[2] == 1 && way.residues(2) == 1,
                    x: self.x.as_ptr(),
                    w: self.w.as_ptr(),
                    c: g.c,
                    extent: extent as isize,
                    step,
                    fresh: [last_row - (fresh - 1) * extent * g.c, extent * g.c, fresh],
                    ahead: AHEAD.div_ceil(g.c),
                    epilogue: &self.epilogue,
                    y: self.y,
                    y_row: (row * way.target[2] + r) * g.c,
                    y_step: way.residues(2) * g.c,
                };
                // SAFETY: taps that fall outside are left out; the row's results are this task's.
                unsafe {
                    for q in 0..first {
                        line.positions::<S, 1, false>(q);
                    }
                    let mut q = first;
                    while q + 2 * POSITIONS <= last {
                        line.positions::<S, { 2 * POSITIONS }, true>(q);
                        q += 2 * POSITIONS;
                    }
                    if q + POSITIONS <= last {
                        line.positions::<S, POSITIONS, true>(q);
                        q += POSITIONS;
                    }
                    while q < last {
                        line.positions::<S, 1, true>(q);
                        q += 1;
                    }
                    for q in last..count {
                        line.positions::<S, 1, false>(q);
                    }
                }
            }
        }
    }
}

/// The results of one row (and residue).
struct Line<'a, T> {
    taps: &'a [Tap],
    /// Each three of them are neighbours along a row.
    triples: bool,
    x: *const T,
    w: *const T,
    c: usize,
    extent: isize,
    step: usize,
    /// The first of the source's rows that no row before has read, the next one's distance, and how many.
    fresh: [usize; 3],
    /// Positions from a vector to what is fetched for later ones.
    ahead: usize,
    epilogue: &'a Epilogue<'a, T>,
    y: *mut T,
    y_row: usize,
    y_step: usize,
}

impl<T: Vectors> Line<'_, T> {
    /// `P` positions from `q` on; not all of their taps need lie inside unless `INSIDE`.
    #[inline(always)]
    unsafe fn positions<S: Simd<Elem = T>, const P: usize, const INSIDE: bool>(&self, q: usize) {
        let mut channel = 0;
        // SAFETY: the caller's promise: vectors end at the last channel.
        unsafe {
            while channel + S::LANES <= self.c {
                self.vectors::<S, P, INSIDE, true>(q, channel, S::LANES);
                channel += S::LANES;
            }
            if channel < self.c {
                self.vectors::<S, P, INSIDE, false>(q, channel, self.c - channel);
            }
        }
    }

    /// Adds the taps one by one.
    #[inline(always)]
    unsafe fn each<S: Simd<Elem = T>, const P: usize, const INSIDE: bool, const WHOLE: bool>(
        &self,
        q: usize,
        channel: usize,
        lanes: usize,
        mut acc: [S::V; P],
    ) -> [S::V; P] {
        let (first, step) = ((q * self.step) as isize, self.step * self.c);
        for tap in self.taps {
            let at = first + tap.offset;
            if !INSIDE && (at < 0 || at >= self.extent) {
                continue;
            }
            // SAFETY: the caller's promise.
            unsafe {
                let x = self.x.add(tap.x + at as usize * self.c + channel);
                let w = load::<S, WHOLE>(self.w.add(tap.w + channel), lanes);
                for i in 0..P {
                    acc[i] = S::fma(load::<S, WHOLE>(x.add(i * step), lanes), w, acc[i]);
                }
            }
        }
        acc
    }

    /// Adds three neighbouring taps at a time, so that positions share what is loaded.
    #[inline(always)]
    unsafe fn triples<S: Simd<Elem = T>, const P: usize, const STEP: usize, const WHOLE: bool>(
        &self,
        q: usize,
        channel: usize,
        lanes: usize,
        mut acc: [S::V; P],
    ) -> [S::V; P] {
        for t in (0..self.taps.len()).step_by(3) {
            let taps = &self.taps[t..t + 3];
            let at = (q * STEP) as isize + taps[0].offset;
            // SAFETY: the caller's promise.
            unsafe {
                let x = self.x.add(taps[0].x + at as usize * self.c + channel);
                let mut w = [S::splat(T::zero()); 3];
                for k in 0..3 {
                    w[k] = load::<S, WHOLE>(self.w.add(taps[k].w + channel), lanes);
                }
                for i in 0..P {
                    for k in 0..3 {
                        let x = load::<S, WHOLE>(x.add((i * STEP + k) * self.c), lanes);
                        acc[i] = S::fma(x, w[k], acc[i]);
                    }
                }
            }
        }
        acc
    }

    #[inline(always)]
    unsafe fn vectors<S: Simd<Elem = T>, const P: usize, const INSIDE: bool, const WHOLE: bool>(
        &self,
        q: usize,
        channel: usize,
        lanes: usize,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut acc = [match self.epilogue.bias {
                Some(b) => load::<S, WHOLE>(b.as_ptr().add(channel), lanes),
                None => S::splat(T::zero()),
            }; P];
            if INSIDE && P > 1 {
                let [row, next, rows] = self.fresh;
                let x = self.x.wrapping_add(row + (q * self.step + self.ahead) * self.c + channel);
                for r in 0..rows {
                    for i in 0..P * self.step {
                        S::prefetch(x.wrapping_add(r * next + i * self.c));
                    }
                }
                let y = self.y.wrapping_add(self.y_row + q * self.y_step + self.ahead * self.c + channel);
                for i in 0..P {
                    S::prefetch_write(y.wrapping_add(i * self.y_step));
                }
            }
            acc = match self.step {
                1 if INSIDE && P > 1 && self.triples => {
                    self.triples::<S, P, 1, WHOLE>(q, channel, lanes, acc)
                }
                2 if INSIDE && P > 1 && self.triples => {
                    self.triples::<S, P, 2, WHOLE>(q, channel, lanes, acc)
                }
                _ => self.each::<S, P, INSIDE, WHOLE>(q, channel, lanes, acc),
            };
            let (low, high) = (S::splat(self.epilogue.clamp.low), S::splat(self.epilogue.clamp.high));
            for i in 0..P {
                let at = self.y_row + (q + i) * self.y_step + channel;
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
    let way = Direction { g, source: g.x, target: g.y, gradient: false };
    sweep(way, x, w, epilogue, y, scratch);
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
    let way = Direction { g, source: g.y, target: g.x, gradient: true };
    sweep(way, dy, w, epilogue, dx, scratch);
}

fn sweep<T: Vectors>(
    way: Direction,
    x: &[T],
    w: &[T],
    epilogue: Epilogue<T>,
    y: &mut [T],
    scratch: &mut [T],
) {
    let g = way.g;
    if way.gradient {
        g.check(y, x)
    } else {
        g.check(x, y)
    }
    by_tap(g.c, g.taps(), w, scratch);
    let w: &[T] = scratch;
    let total = g.n * way.target[0] * way.target[1];
    let work = way.target[2] * g.c * g.taps();
    let each = WORK.div_ceil(work.max(1)).clamp(1, total);
    let y = Shared::new(y);
    let one = |i: usize| {
        let rows = i * each..total.min((i + 1) * each);
        // SAFETY: tasks write different rows of `y`; the extents were checked.
        unsafe { T::dispatch(Rows { way, x, w, epilogue, y: y.ptr(), rows }) }
    };
    match total.div_ceil(each) {
        1 => one(0),
        tasks => (0..tasks).into_par_iter().for_each(one),
    }
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
    g.check(x, dy);
    let (total, size) = (g.n * g.y[0] * g.y[1], g.taps() * g.c);
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
