//! A row of a depthwise convolution's results.

use std::ops::Range;

use smallvec::SmallVec;

use super::inputs::{Inputs, Member};
use crate::kernels::conv::Epilogue;
use crate::kernels::simd::{Level, Simd, Vectors, WIDEST, load_lanes, store_lanes};
use crate::kernels::tile::Pieces;

/// Positions computed at a time, at most.
const POSITIONS: usize = 8;
/// Elements from what is read or written to what is fetched meanwhile: rows of a position's channels are short runs,
/// which do not look like a stream to the processor.
pub(super) const AHEAD: usize = 1 << 10;

/// One tap for a row of the target.
#[derive(Clone, Copy)]
pub(super) struct Tap<T> {
    /// The tap's row of the source, from its first position on.
    pub x: *const T,
    /// Along the row, in positions.
    pub offset: isize,
    /// Elements to the tap's weights.
    pub w: usize,
}

/// What to fetch while a row is computed: `each` vectors a position, `step` elements apart, of some rows.
#[derive(Clone, Copy)]
pub(super) struct Soon<T> {
    pub from: *const T,
    pub rows: usize,
    /// Elements from row to row.
    pub row: usize,
    pub step: usize,
    pub each: usize,
}

impl<T> Soon<T> {
    /// What belongs to positions `step` apart, from element `first` on.
    pub fn of(self, first: usize, step: usize) -> Self {
        Soon { from: self.from.wrapping_add(first), step: step * self.step, ..self }
    }
}

/// How the taps lie.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Taps {
    Apart,
    /// Each three of them are neighbours along a row.
    Triples,
    /// So few of those that they are added while the row slides by.
    Slides,
    /// Triples of a gradient of stride two: of two neighbouring results, the first is of the tap in the middle, the second of the one
    /// before, and of the one behind for the next position.
    Spread,
}

/// Three neighbouring taps.
struct Triple<T> {
    /// The first one's source for the row's first position.
    x: *const T,
    w: [*const T; 3],
}

impl<T> Triple<T> {
    /// Those of a vector of channels, from the first tap's of the group's number on.
    ///
    /// # Safety
    /// There must be such weights, and the processor have `S`'s instructions.
    #[inline(always)]
    unsafe fn weights<S: Simd<Elem = T>, const WHOLE: bool>(&self, first: usize, lanes: usize) -> [S::V; 3] {
        // SAFETY: the caller's promise.
        unsafe {
            let mut w = [load_lanes::<S, WHOLE>(self.w[0].add(first), lanes); 3];
            for k in 1..3 {
                w[k] = load_lanes::<S, WHOLE>(self.w[k].add(first), lanes);
            }
            w
        }
    }
}

/// The results of one row (and residue).
#[derive(Clone, Copy)]
pub(super) struct Line<'a, T, I> {
    pub taps: &'a [Tap<T>],
    pub lie: Taps,
    pub inputs: I,
    /// Channels of a group.
    pub width: usize,
    pub w: *const T,
    /// Elements from a tap's weights for one channel of each group to those for the next.
    pub w_step: usize,
    pub c: usize,
    /// See [`Rows::steps`](crate::kernels::conv::load::Rows::steps).
    pub steps: [usize; 2],
    pub extent: isize,
    pub step: usize,
    pub soon: Soon<T>,
    pub epilogue: &'a Epilogue<'a, T>,
    pub y: *mut T,
    pub y_row: usize,
    pub y_step: usize,
}

impl<T: Vectors, I: Inputs> Line<'_, T, I> {
    /// Can so many rows of three taps slide by, by so many positions? Taps, elements and sums stay in registers then, if there are
    /// enough.
    pub fn slides<S: Simd>(rows: usize, step: usize) -> bool {
        I::ALONE && Level::of::<S>().is_roomy() && (1..=3).contains(&rows) && (1..=2).contains(&step)
    }

    /// Those of `count` positions that are not `inside`, where taps may fall outside.
    ///
    /// # Safety
    /// The line must be as [`Sweep::row`](super::Sweep::row) makes it, and the processor have `S`'s instructions.
    #[inline(always)]
    pub unsafe fn edges<S: Simd<Elem = T>>(&self, inside: Range<usize>, count: usize) {
        for q in (0..inside.start).chain(inside.end..count) {
            // SAFETY: the caller's promise.
            unsafe { self.positions::<S, 1, false>(q, &[]) }
        }
    }

    /// Positions of which no tap falls outside.
    ///
    /// # Safety
    /// As of [`edges`](Self::edges).
    #[inline(always)]
    pub unsafe fn inside<S: Simd<Elem = T>>(&self, inside: Range<usize>) {
        if inside.is_empty() {
            return;
        }
        // SAFETY: the caller's promise.
        unsafe {
            if I::ALONE && self.lie == Taps::Slides {
                return match (self.taps.len() / 3, self.step) {
                    (1, 1) => self.sliding::<S, 1, 1>(inside),
                    (2, 1) => self.sliding::<S, 2, 1>(inside),
                    (_, 1) => self.sliding::<S, 3, 1>(inside),
                    (1, _) => self.sliding::<S, 1, 2>(inside),
                    (2, _) => self.sliding::<S, 2, 2>(inside),
                    _ => self.sliding::<S, 3, 2>(inside),
                };
            }
            let triples: SmallVec<[Triple<T>; 9]> = match self.lie {
                Taps::Apart => SmallVec::new(),
                _ => self.taps.chunks_exact(3).map(|taps| self.triple(taps)).collect(),
            };
            // Tiles of about equal size, and of whole pairs of spread results.
            let unit = if self.lie == Taps::Spread { 2 } else { 1 };
            let tiles = Pieces::of(inside.len() / unit, POSITIONS / unit);
            let mut q = inside.start;
            for tile in 0..tiles.count {
                let size = tiles.len(tile) * unit;
                match size {
                    8 => self.positions::<S, 8, true>(q, &triples),
                    7 => self.positions::<S, 7, true>(q, &triples),
                    6 => self.positions::<S, 6, true>(q, &triples),
                    5 => self.positions::<S, 5, true>(q, &triples),
                    4 => self.positions::<S, 4, true>(q, &triples),
                    3 => self.positions::<S, 3, true>(q, &triples),
                    2 => self.positions::<S, 2, true>(q, &triples),
                    _ => self.positions::<S, 1, true>(q, &triples),
                }
                q += size;
            }
        }
    }

    /// Three neighbouring taps.
    fn triple(&self, taps: &[Tap<T>]) -> Triple<T> {
        let w = |k: usize| self.w.wrapping_add(taps[k].w);
        Triple {
            x: taps[0].x.wrapping_offset(taps[0].offset * self.x_step() as isize),
            w: [w(0), w(1), w(2)],
        }
    }

    /// Elements of the source from a position to the next.
    #[inline(always)]
    fn x_step(&self) -> usize {
        if I::ALONE { self.c } else { self.steps[0] }
    }

    /// Those to a vector of channels of a position.
    #[inline(always)]
    fn x_at(&self, channel: usize) -> usize {
        if I::ALONE { channel } else { strip_at(self.steps, channel) }
    }

    /// Vectors of channels: their first, and how many they hold.
    #[inline(always)]
    fn vectors<S: Simd<Elem = T>>(&self) -> impl Iterator<Item = (usize, usize)> {
        let c = self.c;
        (0..c).step_by(S::LANES).map(move |channel| (channel, S::LANES.min(c - channel)))
    }

    /// Some positions of `R` rows of three taps, all of which lie inside: a vector of channels after the other, all along the row.
    #[inline(always)]
    unsafe fn sliding<S: Simd<Elem = T>, const R: usize, const STEP: usize>(&self, inside: Range<usize>) {
        for (channel, lanes) in self.vectors::<S>() {
            // SAFETY: the caller's promise: vectors end at the last channel.
            unsafe {
                match lanes == S::LANES {
                    true => self.slide::<S, R, STEP, true>(inside.clone(), channel, lanes),
                    false => self.slide::<S, R, STEP, false>(inside.clone(), channel, lanes),
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn slide<S: Simd<Elem = T>, const R: usize, const STEP: usize, const WHOLE: bool>(
        &self,
        inside: Range<usize>,
        channel: usize,
        lanes: usize,
    ) {
        let c = self.c;
        // SAFETY: the caller's promise.
        unsafe {
            let zero = S::splat(T::zero());
            let (mut w, mut x, mut near) = ([[zero; 3]; R], [self.w; R], [[zero; 3]; R]);
            for r in 0..R {
                let taps = &self.taps[3 * r..][..3];
                let at = (inside.start * STEP) as isize + taps[0].offset;
                x[r] = taps[0].x.offset(at * c as isize + channel as isize);
                for k in 0..3 {
                    w[r][k] = load_lanes::<S, WHOLE>(self.w.add(taps[k].w + channel), lanes);
                }
                for k in 0..3 - STEP {
                    near[r][k] = load_lanes::<S, WHOLE>(x[r], lanes);
                    x[r] = x[r].wrapping_add(c);
                }
            }
            let bias = match self.epilogue.bias {
                Some(b) => load_lanes::<S, WHOLE>(b.as_ptr().add(channel), lanes),
                None => zero,
            };
            // (Copied, for what is written might lie where they do.)
            let (finish, y_step, row) = (self.finish::<S>(), self.y_step, self.soon.row);
            // In the order in which it lies, not in that in which it is read.
            let before = channel / S::LANES * inside.len() * S::LANES;
            let mut soon = self.soon.from.wrapping_add(before * STEP);
            let mut at = self.y_row + inside.start * y_step + channel;
            let mut left = inside.len();
            while left > 0 {
                // Elements stay in the registers to which they are loaded, and taps go around.
                for u in 0..3 {
                    if u >= left {
                        break;
                    }
                    for i in 0..STEP {
                        S::prefetch(soon);
                        if STEP > 1 {
                            S::prefetch(soon.wrapping_add(row));
                        }
                        soon = soon.wrapping_add(S::LANES);
                        let k = 3 - STEP + i;
                        for r in 0..R {
                            near[r][(k + u * STEP) % 3] = load_lanes::<S, WHOLE>(x[r], lanes);
                            x[r] = x[r].wrapping_add(c);
                        }
                    }
                    S::prefetch(finish.y.wrapping_add(at + POSITIONS * y_step));
                    let mut sum = bias;
                    for r in 0..R {
                        for k in 0..3 {
                            sum = S::fma(near[r][(k + u * STEP) % 3], w[r][k], sum);
                        }
                    }
                    finish.put::<WHOLE>(sum, at, lanes);
                    at += y_step;
                }
                left = left.saturating_sub(3);
            }
        }
    }

    #[inline(always)]
    unsafe fn finish<S: Simd<Elem = T>>(&self) -> Finish<S> {
        let clamp = &self.epilogue.clamp;
        let residual = self.epilogue.residual.address(|| self.y);
        // SAFETY: the caller's promise.
        unsafe { Finish { y: self.y, residual, low: S::splat(clamp.low), high: S::splat(clamp.high) } }
    }

    /// `P` positions from `q` on; not all of their taps need lie inside unless `INSIDE`.
    #[inline(always)]
    unsafe fn positions<S: Simd<Elem = T>, const P: usize, const INSIDE: bool>(
        &self,
        q: usize,
        triples: &[Triple<T>],
    ) {
        for (channel, lanes) in self.vectors::<S>() {
            // SAFETY: the caller's promise: vectors end at the last channel.
            unsafe {
                match lanes == S::LANES {
                    true => self.tile::<S, P, INSIDE, true>(q, triples, channel, lanes),
                    false => self.tile::<S, P, INSIDE, false>(q, triples, channel, lanes),
                }
            }
        }
    }

    /// Adds the taps one by one.
    #[inline(always)]
    unsafe fn each<S: Simd<Elem = T>, const P: usize, const INSIDE: bool, const WHOLE: bool>(
        &self,
        q: usize,
        [channel, w]: [usize; 2],
        lanes: usize,
        member: &Member<S>,
        acc: &mut [S::V; P],
    ) {
        let (first, x_step) = ((q * self.step) as isize, self.x_step());
        let step = self.step * x_step;
        for tap in self.taps {
            let at = first + tap.offset;
            if !INSIDE && (at < 0 || at >= self.extent) {
                continue;
            }
            // SAFETY: the caller's promise.
            unsafe {
                let x = tap.x.offset(at * x_step as isize + self.x_at(channel) as isize);
                let w = load_lanes::<S, WHOLE>(self.w.add(tap.w + w), lanes);
                for i in 0..P {
                    acc[i] = S::fma(self.inputs.of::<S, WHOLE>(x.add(i * step), lanes, member), w, acc[i]);
                }
            }
        }
    }

    /// Adds three neighbouring taps to positions that begin `STEP` positions of the source apart, at `x`.
    #[inline(always)]
    unsafe fn triple_to<S: Simd<Elem = T>, const P: usize, const STEP: usize, const WHOLE: bool>(
        &self,
        mut x: *const T,
        w: [S::V; 3],
        lanes: usize,
        member: &Member<S>,
        acc: &mut [S::V; P],
    ) {
        let c = self.x_step();
        // SAFETY: the caller's promise.
        unsafe {
            // What neighbouring positions share is loaded once.
            let mut first = self.inputs.of::<S, WHOLE>(x, lanes, member);
            let mut second = first;
            if STEP == 1 {
                second = self.inputs.of::<S, WHOLE>(x.wrapping_add(c), lanes, member);
            }
            for i in 0..P {
                if STEP > 1 {
                    second = self.inputs.of::<S, WHOLE>(x.wrapping_add(c), lanes, member);
                }
                let third = self.inputs.of::<S, WHOLE>(x.wrapping_add(2 * c), lanes, member);
                x = x.wrapping_add(STEP * c);
                acc[i] = S::fma(third, w[2], S::fma(second, w[1], S::fma(first, w[0], acc[i])));
                (first, second) = if STEP == 1 { (second, third) } else { (third, third) };
            }
        }
    }

    /// Adds three neighbouring taps to pairs of spread results.
    #[inline(always)]
    unsafe fn triple_to_pairs<S: Simd<Elem = T>, const P: usize, const WHOLE: bool>(
        &self,
        mut x: *const T,
        w: [S::V; 3],
        lanes: usize,
        member: &Member<S>,
        acc: &mut [S::V; P],
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut near = self.inputs.of::<S, WHOLE>(x, lanes, member);
            for i in 0..P / 2 {
                x = x.wrapping_add(self.x_step());
                let next = self.inputs.of::<S, WHOLE>(x, lanes, member);
                acc[2 * i] = S::fma(near, w[1], acc[2 * i]);
                acc[2 * i + 1] = S::fma(next, w[2], S::fma(near, w[0], acc[2 * i + 1]));
                near = next;
            }
        }
    }

    #[inline(always)]
    unsafe fn tile<S: Simd<Elem = T>, const P: usize, const INSIDE: bool, const WHOLE: bool>(
        &self,
        q: usize,
        triples: &[Triple<T>],
        channel: usize,
        lanes: usize,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut acc = [match self.epilogue.bias {
                Some(b) => load_lanes::<S, WHOLE>(b.as_ptr().add(channel), lanes),
                None => S::splat(T::zero()),
            }; P];
            if INSIDE && P > 1 && S::begins_line(channel) {
                self.fetch::<S, P>(q, channel);
            }
            for number in 0..if I::ALONE { 1 } else { self.width } {
                let (w, member) = (channel + number * self.w_step, Member::new(self.width, number));
                match self.lie {
                    Taps::Triples if INSIDE => {
                        let first = q * self.step * self.x_step() + self.x_at(channel);
                        for triple in triples {
                            let x = triple.x.wrapping_add(first);
                            let w = triple.weights::<S, WHOLE>(w, lanes);
                            match self.step {
                                1 => self.triple_to::<S, P, 1, WHOLE>(x, w, lanes, &member, &mut acc),
                                _ => self.triple_to::<S, P, 2, WHOLE>(x, w, lanes, &member, &mut acc),
                            }
                        }
                    }
                    Taps::Spread if INSIDE => {
                        for triple in triples {
                            let x = triple.x.wrapping_add(q / 2 * self.x_step() + self.x_at(channel));
                            let w = triple.weights::<S, WHOLE>(w, lanes);
                            self.triple_to_pairs::<S, P, WHOLE>(x, w, lanes, &member, &mut acc);
                        }
                    }
                    _ => self.each::<S, P, INSIDE, WHOLE>(q, [channel, w], lanes, &member, &mut acc),
                }
            }
            let finish = self.finish::<S>();
            let at = self.y_row + q * self.y_step + channel;
            for i in 0..P {
                finish.put::<WHOLE>(acc[i], at + i * self.y_step, lanes);
            }
        }
    }

    /// Fetches what belongs to a tile.
    #[inline(always)]
    unsafe fn fetch<S: Simd<Elem = T>, const P: usize>(&self, q: usize, channel: usize) {
        let (soon, y_step) = (self.soon, self.y_step);
        // SAFETY: the caller's promise; only fetched.
        unsafe {
            let mut from = soon.from.wrapping_add(q * soon.each * soon.step + channel);
            for _ in 0..soon.rows {
                let mut at = from;
                for _ in 0..P * soon.each {
                    S::prefetch(at);
                    at = at.wrapping_add(soon.step);
                }
                from = from.wrapping_add(soon.row);
            }
            let mut y = self.y.wrapping_add(self.y_row + q * y_step + AHEAD + channel);
            for _ in 0..P {
                S::prefetch(y);
                y = y.wrapping_add(y_step);
            }
        }
    }
}

/// Elements to a vector of channels in a row of such [`steps`](crate::kernels::conv::load::Rows::steps).
#[inline(always)]
pub(super) fn strip_at(steps: [usize; 2], channel: usize) -> usize {
    channel / WIDEST * steps[1] + channel % WIDEST
}

/// Where sums go, and what is done with them before they are written.
struct Finish<S: Simd> {
    y: *mut S::Elem,
    /// What is added to the results, as they lie.
    residual: Option<*const S::Elem>,
    low: S::V,
    high: S::V,
}

impl<S: Simd> Finish<S> {
    /// The results from element `at` on. (`y` itself may lie before the block of results that it points into.)
    ///
    /// # Safety
    /// `lanes` elements of the results must be the caller's, what is added be as large, and the processor have `S`'s instructions.
    #[inline(always)]
    unsafe fn put<const WHOLE: bool>(&self, mut sum: S::V, at: usize, lanes: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            if let Some(residual) = self.residual {
                sum = S::add(sum, load_lanes::<S, WHOLE>(residual.wrapping_add(at), lanes));
            }
            store_lanes::<S, WHOLE>(self.y.wrapping_add(at), S::min(self.high, S::max(self.low, sum)), lanes);
        }
    }
}
