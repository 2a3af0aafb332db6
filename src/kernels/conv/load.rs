//! Operands that are computed while they are read: what a batch normalisation makes of its input, and the gradient
//! that it passes on. Neither then lies in memory, which these layers would otherwise wait for.
#![allow(unsafe_code, clippy::needless_range_loop)]

use std::ops::Range;

use smallvec::{SmallVec, smallvec};

use super::pointwise::Panel;
use crate::kernels::ahead::Ahead;
use crate::kernels::elementwise::Clamp;
use crate::kernels::half::{Elements, Half};
use crate::kernels::par;
use crate::kernels::simd::{Kernel, Simd, Stored, Vectors, WIDEST, load_up_to, store_up_to};

/// Elements of float16 that are widened at a time, and channels of them of a position.
const NEAR: usize = 2048;
const STRIP: usize = 512;
/// Elements from what is read to what is fetched meanwhile.
const AHEAD: usize = 1 << 10;

/// How the elements of an operand are made of those in memory; coefficients are one a channel.
#[derive(Debug, Clone, Copy)]
pub enum Load<'a, T> {
    Plain,
    /// `clamp((x − mean)·factor + shift)`
    Norm(Norm<'a, T>),
    /// `factor·(dz − k1 − (x − mean)·k2)`, `dz` being the element in memory, or, where that is the gradient of what a
    /// clamp let pass, 0 elsewhere.
    NormGrad(NormGrad<'a, T>),
}

/// Coefficients of a normalisation.
#[derive(Debug, Clone, Copy)]
pub struct Norm<'a, T> {
    pub mean: &'a [T],
    pub factor: &'a [T],
    pub shift: &'a [T],
    pub clamp: Clamp<T>,
}

impl<T: Vectors> Norm<'_, T> {
    /// Those of a vector of channels, or of its first `n` lanes.
    ///
    /// # Safety
    /// There must be such channels, and the processor have `S`'s instructions.
    #[inline(always)]
    pub unsafe fn lanes<S: Simd<Elem = T>>(&self, channel: usize, n: usize) -> NormLanes<S> {
        // SAFETY: the caller's promise.
        unsafe {
            NormLanes {
                mean: load_up_to::<S>(self.mean.as_ptr().add(channel), n),
                factor: load_up_to::<S>(self.factor.as_ptr().add(channel), n),
                shift: load_up_to::<S>(self.shift.as_ptr().add(channel), n),
                low: S::splat(self.clamp.low),
                high: S::splat(self.clamp.high),
            }
        }
    }
}

/// Coefficients of a vector of channels.
pub struct NormLanes<S: Simd> {
    pub mean: S::V,
    factor: S::V,
    shift: S::V,
    pub low: S::V,
    pub high: S::V,
}

impl<S: Simd> NormLanes<S> {
    /// # Safety
    /// The processor must have `S`'s instructions.
    #[inline(always)]
    pub unsafe fn of(&self, x: S::V) -> S::V {
        // SAFETY: the caller's promise.
        unsafe {
            let y = S::add(S::mul(S::sub(x, self.mean), self.factor), self.shift);
            S::min(self.high, S::max(self.low, y))
        }
    }
}

/// Coefficients of a normalisation's gradient.
#[derive(Debug, Clone, Copy)]
pub struct NormGrad<'a, T> {
    /// What was normalised, of the operand's size.
    pub x: Elements<'a, T>,
    pub mean: &'a [T],
    pub factor: &'a [T],
    pub k1: &'a [T],
    pub k2: &'a [T],
    /// The shift, and the clamp that let the gradient pass.
    pub passed: Option<(&'a [T], Clamp<T>)>,
}

/// Runs a loop for the forms in which an operand and a normalisation's input lie; float16 is widened beforehand.
macro_rules! of_forms {
    ($operand:expr, $d:ident, $x:ident => $run:expr) => {{
        match $operand.are_bf16() {
            [false, false] => of_forms!(Whole, $d, Whole, $x, $run),
            [false, true] => of_forms!(Whole, $d, Bf16, $x, $run),
            [true, false] => of_forms!(Bf16, $d, Whole, $x, $run),
            [true, true] => of_forms!(Bf16, $d, Bf16, $x, $run),
        }
    }};
    ($data:ident, $d:ident, $behind:ident, $x:ident, $run:expr) => {{
        type $d = $crate::kernels::simd::$data;
        type $x = $crate::kernels::simd::$behind;
        $run
    }};
}

pub(super) use of_forms;

/// A tensor (positions, channels).
#[derive(Debug, Clone, Copy)]
pub struct Operand<'a, T> {
    pub data: Elements<'a, T>,
    pub channels: usize,
    pub load: Load<'a, T>,
}

impl<'a, T: Vectors> Operand<'a, T> {
    pub fn plain(data: &'a [T], channels: usize) -> Self {
        Operand { data: Elements::Whole(data), channels, load: Load::Plain }
    }

    /// May it be read where it lies?
    pub fn is_plain(&self) -> bool {
        matches!(self.load, Load::Plain) && self.data.is_whole()
    }

    /// Some positions: where they lie, or computed to `room`.
    pub fn near<'b>(&self, first: usize, positions: usize, room: &'b mut [T]) -> &'b [T]
    where
        'a: 'b,
    {
        let c = self.channels;
        if self.is_plain() {
            return &self.data.whole()[first * c..(first + positions) * c];
        }
        self.check();
        let out = &mut room[..positions * c];
        // SAFETY: checked.
        unsafe { T::dispatch(Fill { operand: *self, first, out }) }
        out
    }

    /// What is read of some positions.
    pub fn ahead(&self, positions: Range<usize>) -> Ahead {
        let range = positions.start * self.channels..positions.end * self.channels;
        let x = match &self.load {
            Load::NormGrad(n) => n.x.bytes(range.clone()),
            _ => (std::ptr::null(), 0),
        };
        Ahead::new([self.data.bytes(range), x])
    }

    /// All positions, computed to `out`.
    pub fn write(&self, out: &mut [T]) {
        self.check();
        assert!(out.len() == self.data.len(), "an operand's copy");
        par::rows(out, self.channels, par::GRAIN, |first, out| {
            // SAFETY: checked.
            unsafe { T::dispatch(Fill { operand: *self, first, out }) }
        });
    }

    /// The kernels rely on it: whole positions, and as many coefficients as channels.
    pub fn check(&self) {
        let c = self.channels;
        let fits = match &self.load {
            Load::Plain => true,
            Load::Norm(n) => [n.mean, n.factor, n.shift].iter().all(|v| v.len() == c),
            Load::NormGrad(n) => {
                n.x.len() == self.data.len()
                    && [n.mean, n.factor, n.k1, n.k2].iter().all(|v| v.len() == c)
                    && n.passed.is_none_or(|(shift, _)| shift.len() == c)
            }
        };
        assert!(fits && self.data.len().is_multiple_of(c.max(1)), "coefficients of an operand");
    }

    /// Elements of some positions, as they are computed.
    ///
    /// # Safety
    /// The processor must have `S`'s instructions, and [`check`](Self::check) must hold.
    #[inline(always)]
    pub unsafe fn fill<S: Simd<Elem = T>>(&self, first: usize, out: &mut [T]) {
        let c = self.channels;
        let start = first * c;
        assert!(start + out.len() <= self.data.len());
        if matches!(self.load, Load::Plain) {
            return self.data.copy(start, out);
        }
        // SAFETY: the caller's promise; the forms are those of the operand.
        unsafe { of_forms!(self, D, X => self.positions::<S, D, X>(start, out)) }
    }

    /// Are the elements, and a normalisation's input?
    pub(super) fn are_bf16(&self) -> [bool; 2] {
        [self.data, self.behind()].map(|x| x.half() == Some(Half::Bf16))
    }

    /// What else is read with an element: a normalisation's input.
    pub(super) fn behind(&self) -> Elements<'a, T> {
        match self.load {
            Load::NormGrad(n) => n.x,
            _ => self.data,
        }
    }

    /// Some positions from element `start` on: of data that lies in the form `D`, and a normalisation's input in `X`.
    #[inline(always)]
    unsafe fn positions<S: Simd<Elem = T>, D: Stored<T>, X: Stored<T>>(&self, start: usize, out: &mut [T]) {
        let c = self.channels;
        let positions = out.len() / c.max(1);
        // Float16 is widened a few positions at a time: an operand to where the result will be, the input of a
        // normalisation to a buffer.
        let float16 = |x: &Elements<T>| x.half() == Some(Half::F16);
        let x = self.behind();
        let widens_x = float16(&x) && matches!(self.load, Load::NormGrad(_));
        let mut room;
        let near: &mut [T] = match widens_x {
            true => {
                room = [T::zero(); NEAR];
                &mut room
            }
            false => &mut [],
        };
        let (block, strip) = match widens_x || float16(&self.data) {
            true => (NEAR / c.clamp(1, STRIP), c.clamp(1, STRIP)),
            false => (positions.max(1), c.max(1)),
        };
        for p in (0..positions).step_by(block) {
            let (at, count) = (start + p * c, block.min(positions - p));
            let out = &mut out[p * c..(p + count) * c];
            if float16(&self.data) {
                self.data.copy(at, out);
            }
            let out = out.as_mut_ptr();
            let from: *const D::Bits = match float16(&self.data) {
                true => out.cast_const().cast(),
                false => self.data.address(at).cast(),
            };
            for channel in (0..c).step_by(strip) {
                let channels = channel..c.min(channel + strip);
                let (x, x_step): (*const X::Bits, usize) = match widens_x {
                    true => {
                        let rows = near.chunks_exact_mut(channels.len()).take(count).enumerate();
                        rows.for_each(|(i, near)| x.copy(at + i * c + channel, near));
                        (near.as_ptr().wrapping_sub(channel).cast(), channels.len())
                    }
                    false => (x.address(at).cast(), c),
                };
                // In the order in which they lie, which memory is read fastest in.
                for p in 0..count {
                    // SAFETY: the positions lie inside; the caller's promise.
                    unsafe {
                        let x = x.wrapping_add(p * x_step);
                        self.position::<S, D, X>(channels.clone(), from.add(p * c), x, out.add(p * c));
                    }
                }
            }
        }
    }

    /// Some channels of a position, which lies at `from`, and the normalisation's input at `x`. What is written may lie
    /// where it is read from.
    #[inline(always)]
    unsafe fn position<S: Simd<Elem = T>, D: Stored<T>, X: Stored<T>>(
        &self,
        channels: Range<usize>,
        from: *const D::Bits,
        x: *const X::Bits,
        out: *mut T,
    ) {
        let mut channel = channels.start;
        // SAFETY: the caller's promise; vectors end at the last channel.
        unsafe {
            while channel + S::LANES <= channels.end {
                S::store(out.add(channel), self.vector::<S, D, X>(channel, S::LANES, from, x));
                channel += S::LANES;
            }
            if channel < channels.end {
                let n = channels.end - channel;
                S::store_part(out.add(channel), self.vector::<S, D, X>(channel, n, from, x), n);
            }
        }
    }

    /// A vector of channels of a position, or its first `n` lanes, as it is computed.
    ///
    /// # Safety
    /// `from` and `x` must be the position's first elements, in the forms `D` and `X`; as of [`fill`](Self::fill).
    #[inline(always)]
    pub(super) unsafe fn vector<S: Simd<Elem = T>, D: Stored<T>, X: Stored<T>>(
        &self,
        channel: usize,
        n: usize,
        from: *const D::Bits,
        x: *const X::Bits,
    ) -> S::V {
        // SAFETY: the caller's promise.
        unsafe {
            let (from, x) = (from.add(channel), x.wrapping_add(channel));
            S::prefetch(from.wrapping_add(AHEAD).cast());
            match &self.load {
                Load::Plain => D::load::<S>(from, n),
                Load::Norm(f) => f.lanes::<S>(channel, n).of(D::load::<S>(from, n)),
                Load::NormGrad(f) => {
                    S::prefetch(x.wrapping_add(AHEAD).cast());
                    let mean = load_up_to::<S>(f.mean.as_ptr().add(channel), n);
                    let factor = load_up_to::<S>(f.factor.as_ptr().add(channel), n);
                    let k1 = load_up_to::<S>(f.k1.as_ptr().add(channel), n);
                    let k2 = load_up_to::<S>(f.k2.as_ptr().add(channel), n);
                    let x = S::sub(X::load::<S>(x, n), mean);
                    let mut dz = D::load::<S>(from, n);
                    if let Some((shift, clamp)) = f.passed {
                        let shift = load_up_to::<S>(shift.as_ptr().add(channel), n);
                        let y = S::add(S::mul(x, factor), shift);
                        dz = S::pass(y, S::splat(clamp.low), S::splat(clamp.high), dz);
                    }
                    S::mul(factor, S::sub(S::sub(dz, k1), S::mul(x, k2)))
                }
            }
        }
    }
}

struct Fill<'a, 'b, T> {
    operand: Operand<'a, T>,
    first: usize,
    out: &'b mut [T],
}

impl<T: Vectors> Kernel<T> for Fill<'_, '_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(self) {
        // SAFETY: the caller's promise.
        unsafe { self.operand.fill::<S>(self.first, self.out) }
    }
}

/// What rows are read from.
#[derive(Clone, Copy)]
enum Source<'a, T> {
    Operand(Operand<'a, T>),
    /// A panel of a pointwise convolution's outputs.
    Panel(&'a Panel<'a, T>),
}

/// The rows of an operand with some planes of rows an image: those that are computed as they are read are held in a
/// ring for as long as neighbouring rows of a kernel's window need them.
pub(super) struct Rows<'a, T> {
    source: Source<'a, T>,
    channels: usize,
    /// Planes, rows and positions an image.
    extents: [usize; 3],
    /// Rows that are computed together, and planes and bands of such rows that are needed at a time.
    band: usize,
    window: [usize; 2],
    /// Positions before and after each row of the ring, which are zero.
    around: [usize; 2],
    ring: &'a mut [T],
    held: SmallVec<[usize; 16]>,
    lie: Lie,
}

/// Where rows are read.
#[derive(Clone, Copy, PartialEq)]
enum Lie {
    /// Where the operand lies.
    Outside,
    /// In the ring, position by position.
    Copied,
    /// In the ring, in strips of `WIDEST` channels of all positions: positions of many channels would compete for the same cache lines.
    Strips,
}

impl<'a, T: Vectors> Rows<'a, T> {
    /// `around`: positions that are read before and after a row. `ring`: [`Rows::room`] elements, or, if the operand is plain, none.
    pub(super) fn new(
        operand: Operand<'a, T>,
        extents: [usize; 3],
        window: [usize; 2],
        around: [usize; 2],
        ring: &'a mut [T],
    ) -> Self {
        let (source, channels) = (Source::Operand(operand), operand.channels);
        match operand.is_plain() && ring.is_empty() {
            true => {
                let (held, around) = (SmallVec::new(), [0; 2]);
                let lie = Lie::Outside;
                Rows { source, channels, extents, band: 1, window, around, ring, held, lie }
            }
            false => Rows::computed(source, channels, extents, 1, window, around, ring),
        }
    }

    /// Copies of rows, in strips; `ring`: [`Rows::strips_room`] elements.
    pub(super) fn in_strips(
        operand: Operand<'a, T>,
        extents: [usize; 3],
        window: [usize; 2],
        around: [usize; 2],
        ring: &'a mut [T],
    ) -> Self {
        let (source, channels) = (Source::Operand(operand), operand.channels);
        // Lanes beyond the last channel are not read.
        let [before, after] = around.map(|positions| positions * WIDEST);
        for strip in ring.chunks_exact_mut((before + extents[2] * WIDEST + after).max(1)) {
            strip[..before].fill(T::zero());
            strip[before + extents[2] * WIDEST..].fill(T::zero());
        }
        let held = smallvec![usize::MAX; window[0] * window[1]];
        Rows { source, channels, extents, band: 1, window, around, ring, held, lie: Lie::Strips }
    }

    /// The ring's, and a row's before it is put in strips.
    pub(super) fn strips_room(
        extents: [usize; 3],
        window: [usize; 2],
        around: [usize; 2],
        channels: usize,
    ) -> usize {
        Self::room(extents, window, around, channels.next_multiple_of(WIDEST)) + extents[2] * channels
    }

    /// Rows of images of one plane, whose `window` is in bands: see [`Panel`].
    pub(super) fn of_panel(
        panel: &'a Panel<'a, T>,
        extents: [usize; 3],
        window: usize,
        around: [usize; 2],
        ring: &'a mut [T],
    ) -> Self {
        let (source, channels) = (Source::Panel(panel), panel.channels());
        Rows::computed(source, channels, extents, panel.band(), [1, window], around, ring)
    }

    fn computed(
        source: Source<'a, T>,
        channels: usize,
        extents: [usize; 3],
        band: usize,
        window: [usize; 2],
        around: [usize; 2],
        ring: &'a mut [T],
    ) -> Self {
        for row in ring.chunks_exact_mut(((around[0] + extents[2] + around[1]) * channels).max(1)) {
            row[..around[0] * channels].fill(T::zero());
            row[(around[0] + extents[2]) * channels..].fill(T::zero());
        }
        let held = smallvec![usize::MAX; window[0] * window[1]];
        Rows { source, channels, extents, band, window, around, ring, held, lie: Lie::Copied }
    }

    pub(super) fn room(
        extents: [usize; 3],
        window: [usize; 2],
        around: [usize; 2],
        channels: usize,
    ) -> usize {
        window[0] * window[1] * (around[0] + extents[2] + around[1]) * channels
    }

    pub(super) fn channels(&self) -> usize {
        self.channels
    }

    /// Elements of a row.
    fn line(&self) -> usize {
        self.extents[2] * self.channels
    }

    pub(super) fn in_place(&self) -> bool {
        self.lie == Lie::Outside
    }

    /// Elements from a position to the next, and from the first strip to the next.
    pub(super) fn steps(&self) -> [usize; 2] {
        match self.lie {
            Lie::Strips => [WIDEST, WIDEST * (self.around[0] + self.extents[2] + self.around[1])],
            _ => [self.channels, WIDEST],
        }
    }

    /// Zeros that may be read before and after a row, in positions.
    pub(super) fn around(&self) -> [usize; 2] {
        self.around
    }

    /// Where a row, perhaps beyond the last, lies before it is computed, for fetching; what panels are made of is small, and
    /// near.
    pub(super) fn raw(&self, image: usize, plane: usize, row: usize) -> Option<*const T> {
        let Source::Operand(operand) = &self.source else { return None };
        let nth = (image * self.extents[0] + plane) * self.extents[1] + row;
        Some(operand.data.address(nth * self.line()))
    }

    /// A row of an image, good until a row that is not in the window with it is asked for.
    ///
    /// # Safety
    /// [`Operand::check`] must hold.
    #[inline(always)]
    pub(super) unsafe fn at(&mut self, image: usize, plane: usize, row: usize) -> *const T {
        let line = self.line();
        let nth = (image * self.extents[0] + plane) * self.extents[1] + row;
        if let Source::Operand(operand) = &self.source {
            match self.lie {
                Lie::Outside => return operand.data.whole()[nth * line..][..line].as_ptr(),
                // SAFETY: the caller's promise.
                Lie::Strips => return unsafe { self.strips_at(*operand, nth, [plane, row]) },
                Lie::Copied => {}
            }
        }
        let (slot, in_band) = (row / self.band % self.window[1], row % self.band);
        let slot = plane % self.window[0] * self.window[1] + slot;
        let [before, after] = self.around.map(|positions| positions * self.channels);
        let step = before + line + after;
        let rows = self.band.min(self.extents[1] - (row - in_band));
        let out = &mut self.ring[slot * self.band * step + before..][..(rows - 1) * step + line];
        if self.held[slot] != nth - in_band {
            self.held[slot] = nth - in_band;
            let first = (nth - in_band) * self.extents[2];
            match &self.source {
                // SAFETY: the caller's promise. (A loop of its own: within larger ones there are too few registers for it.)
                Source::Operand(operand) => unsafe {
                    T::dispatch(Fill { operand: *operand, first, out });
                },
                Source::Panel(panel) => panel.write(first, rows, out),
            }
        }
        out[in_band * step..].as_ptr()
    }

    /// As [`at`](Self::at), the `nth` row of all.
    ///
    /// # Safety
    /// As of `at`.
    unsafe fn strips_at(&mut self, operand: Operand<T>, nth: usize, [plane, row]: [usize; 2]) -> *const T {
        let (step, c) = (self.steps()[1], self.channels);
        let slot = plane % self.window[0] * self.window[1] + row % self.window[1];
        let size = step * c.div_ceil(WIDEST);
        let (rows, near) = self.ring.split_at_mut(self.held.len() * size);
        let out = &mut rows[slot * size..][..size];
        let first = self.around[0] * WIDEST;
        if self.held[slot] != nth {
            self.held[slot] = nth;
            let x = operand.near(nth * self.extents[2], self.extents[2], near);
            // SAFETY: a strip has its positions after the zeros before them.
            unsafe { T::dispatch(ToStrips { x, c, step, out: out[first..].as_mut_ptr() }) }
        }
        out[first..].as_ptr()
    }
}

/// Positions of `c` channels, in strips `step` apart.
struct ToStrips<'a, T> {
    x: &'a [T],
    c: usize,
    step: usize,
    out: *mut T,
}

impl<T: Vectors> Kernel<T> for ToStrips<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(self) {
        let ToStrips { x, c, step, out } = self;
        for position in 0..x.len() / c {
            let (from, to) = (x[position * c..].as_ptr(), out.wrapping_add(position * WIDEST));
            for channel in (0..c).step_by(S::LANES) {
                let n = S::LANES.min(c - channel);
                // SAFETY: the strips have these positions.
                unsafe {
                    S::prefetch(from.wrapping_add(channel + AHEAD));
                    let v = load_up_to::<S>(from.add(channel), n);
                    store_up_to::<S>(to.add(channel / WIDEST * step + channel % WIDEST), v, n);
                }
            }
        }
    }
}
