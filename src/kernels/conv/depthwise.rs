//! Depthwise convolution (one input and one output channel a group) and its gradients, channels last.
//!
//! Vectors run over channels. All three stream: a row of results is computed from the few rows it needs, several
//! positions at a time where no tap falls outside. Bound by memory, not by arithmetic.
#![allow(unsafe_code, clippy::needless_range_loop)]

mod weight;

use rayon::prelude::*;
use smallvec::SmallVec;

use crate::kernels::conv::{Done, Epilogue, Geometry, Residual, split};
use crate::kernels::par::Shared;
use crate::kernels::simd::{Kernel, Simd, Vectors};

pub use weight::{load_scratch, weight_grad, weight_grad_scratch};

/// Multiply-adds worth a task of their own.
const WORK: usize = 1 << 18;
/// Positions computed at a time.
const POSITIONS: usize = 4;
/// Elements from what is read or written to what is fetched meanwhile: rows of a position's channels are short runs,
/// which do not look like a stream to the processor.
const AHEAD: usize = 1 << 10;

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
    done: Option<&Done<T>>,
) {
    let way = Direction { g, source: g.x, target: g.y, gradient: false };
    sweep(way, x, w, epilogue, y, scratch, done);
}

/// `dx = clamp(the gradient + bias + residual)`.
pub fn input_grad<T: Vectors>(
    g: &Geometry,
    dy: &[T],
    w: &[T],
    epilogue: Epilogue<T>,
    dx: &mut [T],
    scratch: &mut [T],
) {
    let way = Direction { g, source: g.y, target: g.x, gradient: true };
    sweep(way, dy, w, epilogue, dx, scratch, None);
}

/// Rows of the target, all images' counted, and how many a task computes.
fn division(way: &Direction) -> (usize, usize) {
    let g = way.g;
    let total = g.n * way.target[0] * way.target[1];
    let work = way.target[2] * g.c * g.taps();
    (total, WORK.div_ceil(work.max(1)).clamp(1, total))
}

/// Blocks of whole positions in which [`forward`] computes.
pub fn forward_blocks(g: &Geometry) -> usize {
    let (total, each) = division(&Direction { g, source: g.x, target: g.y, gradient: false });
    total.div_ceil(each)
}

fn sweep<T: Vectors>(
    way: Direction,
    x: &[T],
    w: &[T],
    epilogue: Epilogue<T>,
    y: &mut [T],
    scratch: &mut [T],
    done: Option<&Done<T>>,
) {
    let g = way.g;
    if way.gradient {
        g.check(y, x)
    } else {
        g.check(x, y)
    }
    by_tap(g.c, g.taps(), w, scratch);
    let w: &[T] = scratch;
    let (total, each) = division(&way);
    let line = way.target[2] * g.c;
    let y = Shared::new(y);
    let one = |i: usize| {
        let rows = i * each..total.min((i + 1) * each);
        let (first, count) = (rows.start * line, rows.len() * line);
        // SAFETY: tasks write different rows of `y`; the extents were checked.
        unsafe { T::dispatch(Rows { way, x, w, epilogue, y: y.ptr(), rows }) }
        if let Some(done) = done {
            // SAFETY: rows that this task alone has written.
            done(i, unsafe { std::slice::from_raw_parts(y.ptr().add(first), count) });
        }
    };
    match total.div_ceil(each) {
        1 => one(0),
        tasks => (0..tasks).into_par_iter().for_each(one),
    }
}
