//! Depthwise convolution (one input and one output channel a group) and its gradients, channels last; and convolution of groups so
//! narrow that a vector has several of them ([`inputs`]).
//!
//! Vectors run over channels. All three stream: a row of results is computed from the few rows it needs, several
//! positions at a time where no tap falls outside. Bound by memory, not by arithmetic: hence operands that are computed
//! as they are read, and both gradients in one pass ([`both`]).
#![allow(unsafe_code, clippy::needless_range_loop)]

mod both;
mod expanded;
mod inputs;
mod line;
mod weight;

use std::ops::Range;

use smallvec::SmallVec;

use crate::kernels::conv::load::{Operand, Rows};
use crate::kernels::conv::{Done, Epilogue, Geometry, slots, split};
use crate::kernels::par::{LINE, Shared, in_prepared_slots};
use crate::kernels::simd::{Kernel, Simd, Vectors};
use inputs::{Inputs, with_inputs};
use line::{AHEAD, Line, Soon, Tap, Taps};

pub use both::{grads, grads_scratch, grads_slabs};
pub use expanded::{Expansion, expands, forward_expanded, forward_expanded_scratch};
pub use inputs::applies;
pub use weight::{weight_grad, weight_grad_scratch};

/// Multiply-adds worth a task of their own, elements of its results that stay near, and tasks that are enough.
const WORK: usize = 1 << 18;
const NEAR: usize = 1 << 16;
const TASKS: usize = 16;

/// Weights (C, width, k…) as (k…, width, C): of each tap those of all channels for one channel of their groups, then for the next.
fn in_tap_order<T: Vectors>(way: &Direction, w: &[T], out: &mut [T]) {
    let (c, width, taps) = (way.g.c, way.g.cg(), way.g.taps());
    for channel in 0..c {
        let (first, number) = (channel - channel % width, channel % width);
        for other in 0..width {
            let from = &w[(channel * width + other) * taps..][..taps];
            let [number, lane] = if way.gradient { [number, first + other] } else { [other, channel] };
            for (t, w) in from.iter().enumerate() {
                out[(t * width + number) * c + lane] = *w;
            }
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

impl<'a> Direction<'a> {
    fn forward(g: &'a Geometry) -> Self {
        Direction { g, source: g.x, target: g.y, gradient: false }
    }

    fn back(g: &'a Geometry) -> Self {
        Direction { g, source: g.y, target: g.x, gradient: true }
    }

    /// Planes and rows of the source within which all of those lie that a row of the target is computed from, or, of a
    /// gradient, as many rows as the stride.
    fn window(&self) -> [usize; 2] {
        let g = self.g;
        std::array::from_fn(|d| {
            let reach = (g.k[d] - 1) * g.dilation[d];
            let n = if self.gradient { reach.div_ceil(g.stride[d]) + 2 } else { reach + 1 };
            n.min(self.source[d])
        })
    }

    /// Positions before and after a row of the source that taps reach.
    fn around(&self) -> [usize; 2] {
        let mut around = [0; 2];
        for r in 0..self.residues(2).min(self.target[2]) {
            let last = ((self.target[2] - r).div_ceil(self.residues(2)) - 1) * self.step(2);
            for offset in (0..self.g.k[2]).filter_map(|t| self.offset(2, r, t)) {
                let after = last as isize + offset + 1 - self.source[2] as isize;
                around = [around[0].max((-offset).max(0) as usize), around[1].max(after.max(0) as usize)];
            }
        }
        around
    }

    /// Elements of the ring that a task keeps rows of the source in. (A group's sums take longer than a copy.)
    fn ring(&self, plain: bool) -> usize {
        let (window, around, c) = (self.window(), self.around(), self.g.c);
        match self.g.depthwise() {
            true if plain => 0,
            true => Rows::<f32>::room(self.source, window, around, c),
            false => Rows::<f32>::strips_room(self.source, window, around, c),
        }
    }

    /// The rows of the source, in a ring if there is one.
    fn rows<'b, T: Vectors>(&self, source: Operand<'b, T>, ring: &'b mut [T]) -> Rows<'b, T> {
        match self.g.depthwise() {
            true => Rows::new(source, self.source, self.window(), self.around(), ring),
            false => Rows::in_strips(source, self.source, self.window(), self.around(), ring),
        }
    }

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

    /// Rows of the source that a row of the target is computed from, each with the number of its first weight.
    ///
    /// # Safety
    /// As of [`Rows::at`].
    #[inline(always)]
    unsafe fn read<T: Vectors>(
        &self,
        source: &mut Rows<T>,
        [image, i0, i1]: [usize; 3],
    ) -> SmallVec<[(*const T, usize); 16]> {
        let k = self.g.k;
        let mut rows = SmallVec::new();
        for t0 in 0..k[0] {
            for t1 in 0..k[1] {
                if let (Some(a), Some(b)) = (self.inside(0, i0, t0), self.inside(1, i1, t1)) {
                    // SAFETY: the caller's promise.
                    rows.push((unsafe { source.at(image, a, b) }, (t0 * k[1] + t1) * k[2]));
                }
            }
        }
        rows
    }

    /// The taps of a class of positions, those of a row ascending in the source.
    fn taps<T>(&self, rows: &[(*const T, usize)], r: usize) -> SmallVec<[Tap<T>; 64]> {
        let (k, c) = (self.g.k[2], self.g.cg() * self.g.c);
        let of_row = |&(x, first): &(*const T, usize)| {
            let ascending = (0..k).map(move |t| if self.gradient { k - 1 - t } else { t });
            ascending.filter_map(move |t| Some(Tap { x, offset: self.offset(2, r, t)?, w: (first + t) * c }))
        };
        rows.iter().flat_map(of_row).collect()
    }

    /// Positions, counted within their class, of which no tap falls outside of the row and the zeros around it.
    fn within<T>(&self, taps: &[Tap<T>], around: [usize; 2], count: usize) -> Range<usize> {
        let [before, after] = around.map(|zeros| zeros as isize);
        let least = taps.iter().map(|t| t.offset).min().unwrap_or(0) + before;
        let most = taps.iter().map(|t| t.offset).max().unwrap_or(0) - after;
        let step = self.step(2);
        let first = ((-least).max(0) as usize).div_ceil(step).min(count);
        first..match self.source[2] as isize - 1 - most {
            room if room < 0 => first,
            room => (room as usize / step + 1).clamp(first, count),
        }
    }

    /// Of a gradient of stride two and three taps, those results that can be computed in pairs.
    fn pairs(&self, around: [usize; 2]) -> Option<Pairs> {
        let g = self.g;
        if !self.gradient || g.stride[2] != 2 || g.k[2] != 3 || g.dilation[2] != 1 {
            return None;
        }
        // The tap in the middle belongs to every other position, from this one on.
        let first = 1 - g.pad[2] % 2;
        let source = (first + g.pad[2] - 1) / 2;
        let results = self.target[2].saturating_sub(first) / 2;
        Some(Pairs {
            first,
            source,
            count: results.min((self.source[2] + around[1]).saturating_sub(source + 1)),
        })
    }

    /// The source position of tap `t` for target position `i`, if it lies inside.
    fn inside(&self, d: usize, i: usize, t: usize) -> Option<usize> {
        let n = self.residues(d);
        let at = (i / n * self.step(d)) as isize + self.offset(d, i % n, t)?;
        (at >= 0 && at < self.source[d] as isize).then_some(at as usize)
    }
}

/// Pairs of neighbouring results, from position `first` on, that read a position of the source and the next, from `source` on.
struct Pairs {
    first: usize,
    source: usize,
    count: usize,
}

impl Pairs {
    /// Their positions in the class of residue `r`.
    fn of(&self, r: usize) -> Range<usize> {
        let first = usize::from(r < self.first);
        first..first + self.count
    }
}

/// A row of the target (all images' rows counted), computed from the rows of the source that it needs: of all channels, or
/// of those of the source.
#[derive(Clone, Copy)]
struct Sweep<'a, T, I> {
    way: Direction<'a>,
    inputs: I,
    /// (k…, width, C), from the source's first channel on, as all that follows.
    w: &'a [T],
    epilogue: Epilogue<'a, T>,
    y: *mut T,
}

impl<T: Vectors, I: Inputs> Sweep<'_, T, I> {
    /// # Safety
    /// The row must lie inside, its results be the caller's, and the processor have `S`'s instructions.
    #[inline(always)]
    unsafe fn row<S: Simd<Elem = T>>(&self, source: &mut Rows<T>, row: usize) {
        let (way, g) = (self.way, self.way.g);
        let [image, i0, i1] = split(row, [g.n, way.target[0], way.target[1]]);
        // SAFETY: the caller's promise.
        let rows = unsafe { way.read(source, [image, i0, i1]) };
        let triples = g.k[2] == 3 && g.dilation[2] == 1;
        let lie = match way.step(2) {
            _ if !triples || way.residues(2) > 1 => Taps::Apart,
            step if Line::<T, I>::slides::<S>(rows.len(), step) => Taps::Slides,
            1 | 2 => Taps::Triples,
            _ => Taps::Apart,
        };
        let next = (0..g.k[1]).filter_map(|t| way.inside(1, i1, t)).max().map_or(0, |last| last + 1);
        let soon = self.soon(source, image, next, lie);
        let y_row = row * way.target[2] * g.c;
        let line = Line {
            taps: &[],
            lie,
            inputs: self.inputs,
            width: g.cg(),
            w: self.w.as_ptr(),
            w_step: g.c,
            c: source.channels(),
            steps: source.steps(),
            extent: way.source[2] as isize,
            step: way.step(2),
            soon,
            epilogue: &self.epilogue,
            y: self.y,
            y_row,
            y_step: g.c,
        };
        let around = source.around();
        let pairs = way.pairs(around);
        if let Some(pairs) = &pairs {
            let taps: SmallVec<[Tap<T>; 64]> = rows
                .iter()
                .flat_map(|&(x, first)| [2, 1, 0].map(|t| (x, first + t)))
                .map(|(x, w)| Tap { x, offset: pairs.source as isize, w: w * g.cg() * g.c })
                .collect();
            let first = pairs.first * g.c;
            let line = Line {
                taps: &taps,
                lie: Taps::Spread,
                soon: soon.of(first, 1),
                y_row: y_row + first,
                ..line
            };
            // SAFETY: no tap of a pair falls outside; the row's results are the caller's.
            unsafe { line.inside::<S>(0..2 * pairs.count) }
        }
        for r in 0..way.residues(2).min(way.target[2]) {
            let taps = way.taps(&rows, r);
            let residues = way.residues(2);
            let (soon, y_row) = (soon.of(r * g.c, residues), y_row + r * g.c);
            let line = Line { taps: &taps, soon, y_row, y_step: residues * g.c, ..line };
            let count = (way.target[2] - r).div_ceil(residues);
            let inside = match &pairs {
                Some(pairs) => pairs.of(r),
                None => way.within(&taps, around, count),
            };
            // SAFETY: taps that fall outside are left out; the row's results are the caller's.
            unsafe {
                line.edges::<S>(inside.clone(), count);
                if pairs.is_none() {
                    line.inside::<S>(inside);
                }
            }
        }
    }

    /// What to fetch of the source meanwhile: rows that are read for the first time, or, where all of a row is read before the next,
    /// will be for the next row, from `next` on. Rows that are computed are fetched then.
    fn soon(&self, source: &Rows<T>, image: usize, next: usize, lie: Taps) -> Soon<T> {
        let (way, c) = (self.way, self.way.g.c);
        let rows = way.step(1);
        let (first, ahead) = match lie {
            Taps::Slides => (next, 0),
            _ => (next.saturating_sub(rows), AHEAD.next_multiple_of(c)),
        };
        let (from, rows) = match source.raw(image, 0, first) {
            Some(from) if source.in_place() || lie == Taps::Slides => (from.wrapping_add(ahead), rows),
            // (Something that is near.)
            _ => (self.w.as_ptr(), 0),
        };
        Soon { from, rows, row: way.source[2] * c, step: c.div_ceil(way.residues(2)), each: way.step(2) }
    }
}

/// Some rows of a target.
struct Task<'a, T, I> {
    sweep: Sweep<'a, T, I>,
    source: Rows<'a, T>,
    rows: Range<usize>,
}

impl<T: Vectors, I: Inputs> Kernel<T> for Task<'_, T, I> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(mut self) {
        for row in self.rows.clone() {
            // SAFETY: the rows are this task's.
            unsafe { self.sweep.row::<S>(&mut self.source, row) }
        }
    }
}

/// Elements of scratch that [`forward`] needs, more of it where X is not plain, and where results are not `kept`.
pub fn forward_scratch(g: &Geometry, plain: bool, kept: bool) -> usize {
    scratch(&Direction::forward(g), plain, kept)
}

/// Elements of scratch that [`input_grad`] needs.
pub fn input_grad_scratch(g: &Geometry) -> usize {
    scratch(&Direction::back(g), true, true)
}

/// Elements of a slot: of weights, of results without a place, of the ring of rows of the source.
fn slot(way: &Direction, plain: bool, kept: bool) -> [usize; 3] {
    let results = if kept { 0 } else { near(way) };
    [way.g.taps() * way.g.cg() * way.g.c, results, way.ring(plain)]
        .map(|elements| elements.next_multiple_of(LINE))
}

fn scratch(way: &Direction, plain: bool, kept: bool) -> usize {
    let (total, each) = division(way);
    slots(total.div_ceil(each), slot(way, plain, kept).iter().sum())
}

/// Elements of the results of a task.
fn near(way: &Direction) -> usize {
    division(way).1 * way.target[2] * way.g.c
}

/// `y = clamp(conv(x, w) + bias + residual)`, all (N, spatial…, C); see [`Done`] for results without a place.
pub fn forward<T: Vectors>(
    g: &Geometry,
    x: Operand<T>,
    w: &[T],
    epilogue: Epilogue<T>,
    y: Option<&mut [T]>,
    scratch: &mut [T],
    done: Option<&Done<T>>,
) {
    g.check_sizes(x.data.len(), y.as_ref().map_or(g.outputs(), |y| y.len()));
    sweep(Direction::forward(g), x, w, epilogue, y, scratch, done);
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
    g.check(dx, dy);
    sweep(Direction::back(g), Operand::plain(dy, g.oc), w, epilogue, Some(dx), scratch, None);
}

/// Rows of the target, all images' counted, and how many a task computes.
fn division(way: &Direction) -> (usize, usize) {
    let g = way.g;
    let total = g.n * way.target[0] * way.target[1];
    // Few enough for the second-level cache, where the results' statistics are gathered; the more, the fewer rows of
    // the source are read by two tasks.
    let near = NEAR / (way.target[2] * g.c).max(1);
    let work = WORK.div_ceil((way.target[2] * g.c * g.cg() * g.taps()).max(1));
    (total, near.min(total.div_ceil(TASKS)).max(work).clamp(1, total))
}

/// Blocks of whole positions in which [`forward`] computes.
pub fn forward_blocks(g: &Geometry) -> usize {
    let (total, each) = division(&Direction::forward(g));
    total.div_ceil(each)
}

fn sweep<T: Vectors>(
    way: Direction,
    source: Operand<T>,
    w: &[T],
    epilogue: Epilogue<T>,
    y: Option<&mut [T]>,
    scratch: &mut [T],
    done: Option<&Done<T>>,
) {
    let g = way.g;
    let (total, each) = division(&way);
    let line = way.target[2] * g.c;
    let [weights, own, ring] = slot(&way, source.is_plain(), y.is_some());
    let y = y.map(Shared::new);
    let size = weights + own + ring;
    let prepare = |slot: &mut [T]| in_tap_order(&way, w, slot);
    in_prepared_slots(total.div_ceil(each), size, scratch, prepare, |i, slot| {
        let (w, rest) = slot.split_at_mut(weights);
        let (own, ring) = rest.split_at_mut(own);
        let rows = i * each..total.min((i + 1) * each);
        let (first, count) = (rows.start * line, rows.len() * line);
        let source = way.rows(source, ring);
        let y = y.as_ref().map_or(own.as_mut_ptr().wrapping_sub(first), Shared::ptr);
        with_inputs!(g, inputs => {
            let sweep = Sweep { way, inputs, w, epilogue, y };
            // SAFETY: tasks write different rows of `y`, or rows of their own; the extents were checked.
            unsafe { T::dispatch(Task { sweep, source, rows }) }
        });
        if let Some(done) = done {
            // SAFETY: rows that this task alone has written.
            done(i, first, unsafe { std::slice::from_raw_parts(y.wrapping_add(first), count) });
        }
    });
}
