//! Convolution and its two gradients, over one to three spatial dimensions.
//!
//! Dense convolutions are matrix products: with stride 1 on shifted views of a zero-padded copy, one product a
//! kernel tap; otherwise on gathered patches. Depthwise ones are loops over rows. Work is divided into tasks by
//! the problem alone; tasks that need scratch share a fixed number of slots.

mod depthwise;
mod forward;
mod input;
pub mod last;
mod weight;

use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use crate::kernels::elementwise::Clamp;
use crate::kernels::isa::vectorize;
use crate::kernels::par;
use crate::tensor::Float;

pub use forward::forward_scratch;
pub use input::input_grad_scratch;
pub use weight::{weight_grad, weight_grad_scratch};

/// Sizes of a convolution. Fewer than three spatial dimensions are preceded by ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Geometry {
    /// Images.
    pub n: usize,
    /// Input and output channels, all groups together.
    pub c: usize,
    pub oc: usize,
    pub groups: usize,
    /// The first spatial dimension that is used (0 for three).
    pub axis: usize,
    /// Input, output and kernel extents.
    pub x: [usize; 3],
    pub y: [usize; 3],
    pub k: [usize; 3],
    pub stride: [usize; 3],
    pub dilation: [usize; 3],
    /// Zeros before the input.
    pub pad: [usize; 3],
}

/// What becomes of a convolution's sums: `clamp(sum + bias + residual)`.
#[derive(Clone, Copy)]
pub struct Epilogue<'a, T> {
    /// One a channel.
    pub bias: Option<&'a [T]>,
    /// Of the output's shape.
    pub residual: Option<&'a [T]>,
    pub clamp: Clamp<T>,
}

/// `x` (N, C, X…), `w` (OC, C/groups, K…), `y` (N, OC, Y…).
pub fn forward<T: Float>(g: &Geometry, x: &[T], w: &[T], last: Epilogue<T>, y: &mut [T], scratch: &mut [T]) {
    forward::forward(g, x, w, last.bias, y, scratch);
    finish(last, y);
}

/// The epilogue but for the bias.
fn finish<T: Float>(last: Epilogue<T>, y: &mut [T]) {
    let clamp = last.clamp;
    match last.residual {
        Some(r) => each(y, r, |y, r| clamp.of(y + r)),
        None if clamp.is_none() => {}
        None => par::pieces(y, |_, y| {
            vectorize(
                #[inline(always)]
                || y.iter_mut().for_each(|y| *y = clamp.of(*y)),
            )
        }),
    }
}

/// `dy` (N, OC, Y…), `w` (OC, C/groups, K…), `dx` (N, C, X…): the input's gradient, plus `addend`.
pub fn input_grad<T: Float>(
    g: &Geometry,
    dy: &[T],
    w: &[T],
    addend: Option<&[T]>,
    dx: &mut [T],
    scratch: &mut [T],
) {
    input::input_grad(g, dy, w, dx, scratch);
    if let Some(addend) = addend {
        each(dx, addend, |dx, a| a + dx);
    }
}

/// `y = f(y, a)` element by element.
fn each<T: Float>(y: &mut [T], a: &[T], f: impl Fn(T, T) -> T + Sync) {
    par::pieces(y, |start, y| {
        vectorize(
            #[inline(always)]
            || y.iter_mut().zip(&a[start..]).for_each(|(y, &a)| *y = f(*y, a)),
        )
    });
}

/// Elements of a task's working set that should stay in the second-level cache.
const CACHE: usize = 1 << 17;
/// Tasks that have scratch of their own at a time.
const SLOTS: usize = 8;
/// Positions of a row block that are enough for the products to run at full speed.
const POSITIONS: usize = 480;
/// Slack at the end of rows, so that products may run over whole vectors.
const SLACK: usize = 16;

fn volume(d: [usize; 3]) -> usize {
    d.iter().product()
}

impl Geometry {
    /// Input and output channels of a group.
    fn cg(&self) -> usize {
        self.c / self.groups
    }

    fn og(&self) -> usize {
        self.oc / self.groups
    }

    fn taps(&self) -> usize {
        volume(self.k)
    }

    fn is_empty(&self) -> bool {
        self.n * self.oc * volume(self.y) == 0 || self.c * volume(self.x) * self.taps() == 0
    }

    fn depthwise(&self) -> bool {
        self.cg() == 1 && self.groups > 1
    }

    fn unit_stride(&self) -> bool {
        self.stride == [1; 3]
    }

    /// The output is a product of the weights and the input as it lies.
    fn pointwise(&self) -> bool {
        self.k == [1; 3] && self.unit_stride() && self.x == self.y
    }

    /// Input extents that `rows` rows of output (along `axis`) read.
    fn window(&self, rows: usize) -> [usize; 3] {
        let mut y = self.y;
        y[self.axis] = rows;
        std::array::from_fn(|d| (y[d] - 1) * self.stride[d] + (self.k[d] - 1) * self.dilation[d] + 1)
    }

    /// Output positions of one row along `axis`.
    fn row(&self) -> usize {
        self.y[self.axis + 1..].iter().product()
    }

    /// Offset of a kernel tap within a window of the given extents.
    fn tap(&self, t: usize, window: [usize; 3]) -> usize {
        let [_, k1, k2] = self.k;
        let [i, j, l] = [t / (k1 * k2), t / k2 % k1, t % k2];
        let d = self.dilation;
        (i * d[0] * window[1] + j * d[1]) * window[2] + l * d[2]
    }

    /// The output of `rows` rows as positions of their window (stride 1): extents, and one more than the last.
    fn grid(&self, rows: usize) -> ([usize; 3], usize) {
        let w = self.window(rows);
        let mut y = self.y;
        y[self.axis] = rows;
        (y, ((y[0] - 1) * w[1] + y[1] - 1) * w[2] + y[2])
    }

    /// Rows a block along `axis`: `per_row` elements of working set a row, `positions` a row.
    fn block_rows(&self, per_row: usize, positions: usize) -> usize {
        let by_cache = CACHE / per_row.max(1);
        let enough = POSITIONS.div_ceil(positions.max(1));
        let rows = enough.min(by_cache).clamp(1, self.y[self.axis]);
        // Blocks of about equal size.
        self.y[self.axis].div_ceil(self.y[self.axis].div_ceil(rows))
    }

    /// First input coordinate (perhaps in the padding) read by the output rows from `row` on.
    fn origin(&self, row: usize) -> [isize; 3] {
        let mut o = self.pad.map(|p| -(p as isize));
        o[self.axis] += (row * self.stride[self.axis]) as isize;
        o
    }
}

/// Calls `f` for the rows of a window at `origin` of a plane of extents `x`: window row, then the columns
/// `from..to` that lie inside the plane and the plane's element at `from` (`from == to`: none).
#[inline(always)]
fn window_rows(
    x: [usize; 3],
    origin: [isize; 3],
    window: [usize; 3],
    mut f: impl FnMut(usize, usize, usize, usize),
) {
    let from = (-origin[2]).clamp(0, window[2] as isize) as usize;
    let to = (x[2] as isize - origin[2]).clamp(from as isize, window[2] as isize) as usize;
    for i in 0..window[0] {
        for j in 0..window[1] {
            let (a, b) = (origin[0] + i as isize, origin[1] + j as isize);
            let row = i * window[1] + j;
            if a < 0 || b < 0 || a >= x[0] as isize || b >= x[1] as isize || from == to {
                f(row, 0, 0, 0);
            } else {
                let at = (a as usize * x[1] + b as usize) * x[2] + (origin[2] + from as isize) as usize;
                f(row, from, to, at);
            }
        }
    }
}

/// A window of a plane, zeros where it lies outside.
#[inline(always)]
fn gather_window<T: Float>(
    plane: &[T],
    x: [usize; 3],
    origin: [isize; 3],
    window: [usize; 3],
    out: &mut [T],
) {
    window_rows(x, origin, window, |row, from, to, at| {
        let out = &mut out[row * window[2]..][..window[2]];
        out[..from].fill(T::zero());
        copy(&plane[at..at + to - from], &mut out[from..to]);
        out[to..].fill(T::zero());
    });
}

/// Short copies without a call.
#[inline(always)]
fn copy<T: Copy>(from: &[T], to: &mut [T]) {
    for (t, f) in to.iter_mut().zip(from) {
        *t = *f;
    }
}

/// Every `step`th element of a row.
#[inline(always)]
fn every<T: Copy>(step: usize, row: &[T], out: &mut [T]) {
    match step {
        1 => copy(row, out),
        2 => every_of::<T, 2>(row, out),
        _ => out.iter_mut().zip(row.iter().step_by(step)).for_each(|(o, x)| *o = *x),
    }
}

/// With whole groups of `S` the loop becomes loads and shuffles.
#[inline(always)]
fn every_of<T: Copy, const S: usize>(row: &[T], out: &mut [T]) {
    let whole = out.len().min(row.len() / S);
    for (o, x) in out[..whole].iter_mut().zip(row.chunks_exact(S)) {
        *o = x[0];
    }
    for (i, o) in out.iter_mut().enumerate().skip(whole) {
        *o = row[i * S];
    }
}

/// The weights of (OC, C/groups, taps) as one matrix of (OC/groups, C/groups) a group and tap.
fn by_tap<T: Float>(g: &Geometry, w: &[T], out: &mut [T]) {
    let (cg, og, taps) = (g.cg(), g.og(), g.taps());
    out.par_chunks_mut(og * cg).enumerate().for_each(|(i, out)| {
        let (group, t) = (i / taps, i % taps);
        let w = &w[group * og * cg * taps..][..og * cg * taps];
        for (o, w) in out.iter_mut().zip(w[t..].iter().step_by(taps)) {
            *o = *w;
        }
    });
}

/// Runs tasks `0..tasks`, each with a slot of `size` elements of `scratch`. Which slot a task gets is left to
/// chance; what it computes may not depend on the slot's content.
fn in_slots<T: Send>(tasks: usize, size: usize, scratch: &mut [T], f: impl Fn(usize, &mut [T]) + Sync) {
    let next = AtomicUsize::new(0);
    let take = |slot: &mut [T]| {
        loop {
            let task = next.fetch_add(1, Ordering::Relaxed);
            if task >= tasks {
                return;
            }
            f(task, slot);
        }
    };
    let slots = tasks.min(SLOTS);
    if slots == 1 {
        return take(&mut scratch[..size]);
    }
    scratch[..slots * size].par_chunks_exact_mut(size).for_each(take);
}

/// Elements of scratch that `in_slots` needs.
fn slots(tasks: usize, size: usize) -> usize {
    tasks.min(SLOTS) * size
}
