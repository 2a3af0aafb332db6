//! Normalisation: statistics per channel (batch) or per row (layer, instance, group), and their gradients.
//!
//! Sums run in lanes over short blocks and are then carried in `f64`; variances are of distances from the block's
//! mean, or about it, and merged exactly, so a large mean does not cost digits.

mod channel;
mod fold;
mod gated;
mod groups;
mod products;
mod strips;
mod sweep;

use rayon::prelude::*;

use crate::kernels::half::Elements;
use crate::kernels::isa::{vectorize, vectorize_sweep};
use crate::kernels::par::{self, GRAIN};
use crate::tensor::Float;

pub use channel::{Mask, Stat, block_moments, block_room, merge_blocks};
pub use channel::{add_param_grad, merge_param_grad};
pub use channel::{channel_stats, channel_stats_and, channel_sum, masked_param_grad, param_grad};
pub use gated::{gated, gated_grad};
pub use groups::GroupNorm;
pub use products::channel_products;
pub use strips::Channels;
pub use sweep::{ChannelGrad, Residual, Results, channel_affine, channel_input_grad};

const LANES: usize = 32;
const BLOCK: usize = 1024;
/// Elements of a row that is widened.
const NEAR: usize = 4096;

/// As [`par::rows`], each piece compiled for the processor at hand; `f` must be `#[inline(always)]`.
#[inline(always)]
fn rows<T: Send>(y: &mut [T], row: usize, grain: usize, f: impl Fn(usize, &mut [T]) + Send + Sync) {
    par::rows(y, row, grain, |first, piece| {
        vectorize_sweep(
            #[inline(always)]
            || f(first, piece),
        )
    });
}

/// `Σ f(x)`.
#[inline(always)]
pub fn sum<T: Float>(x: &[T], f: impl Fn(T) -> T) -> f64 {
    let mut total = 0.0;
    for block in x.chunks(BLOCK) {
        let mut acc = [T::zero(); LANES];
        let (head, tail) = block.as_chunks::<LANES>();
        for chunk in head {
            for (a, &x) in acc.iter_mut().zip(chunk) {
                *a += f(x);
            }
        }
        let mut last = [T::zero(); LANES];
        for (a, &x) in last.iter_mut().zip(tail) {
            *a = f(x);
        }
        total += lanes(acc, last);
    }
    total
}

/// `Σ f(x, y)`.
#[inline(always)]
pub fn sum2<T: Float>(x: &[T], y: &[T], f: impl Fn(T, T) -> T) -> f64 {
    let mut total = 0.0;
    for (x, y) in x.chunks(BLOCK).zip(y.chunks(BLOCK)) {
        let mut acc = [T::zero(); LANES];
        let ((x, x_tail), (y, y_tail)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
        for (x, y) in x.iter().zip(y) {
            for ((a, &x), &y) in acc.iter_mut().zip(x).zip(y) {
                *a += f(x, y);
            }
        }
        let mut last = [T::zero(); LANES];
        for ((a, &x), &y) in last.iter_mut().zip(x_tail).zip(y_tail) {
            *a = f(x, y);
        }
        total += lanes(acc, last);
    }
    total
}

/// The sum of lanes, and of what is left for some of them, in a tree. (Of a loop over its levels, of `map`, or of lanes that a
/// loop of unknown length added to, scalar code would be made.)
#[inline(always)]
fn lanes<T: Float>(mut acc: [T; LANES], last: [T; LANES]) -> f64 {
    for i in 0..LANES {
        acc[i] += last[i];
    }
    let mut s = [0.0; LANES / 2];
    for i in 0..LANES / 2 {
        s[i] = acc[i].to64() + acc[i + LANES / 2].to64();
    }
    for i in 0..8 {
        s[i] += s[i + 8];
    }
    for i in 0..4 {
        s[i] += s[i + 4];
    }
    (s[0] + s[2]) + (s[1] + s[3])
}

/// Number, mean and sum of squared distances from the mean.
#[derive(Debug, Clone, Copy, Default)]
pub struct Moments {
    pub count: f64,
    pub mean: f64,
    pub m2: f64,
}

impl Moments {
    #[inline(always)]
    pub fn of<T: Float>(x: &[T]) -> Moments {
        // (Of `map` and `fold`, a function would be made that is compiled for the baseline.)
        let mut all = Moments::default();
        for block in x.chunks(BLOCK) {
            all = all.merge(Moments::block(block));
        }
        all
    }

    #[inline(always)]
    fn block<T: Float>(x: &[T]) -> Moments {
        let count = x.len() as f64;
        let mean = sum(x, |x| x) / count;
        let m = T::of(mean);
        let off = mean - m.to64();
        let m2 = sum(x, |x| (x - m) * (x - m)) - count * off * off;
        Moments { count, mean, m2: m2.max(m2 * 0.0) }
    }

    /// Of both sets together (Chan, Golub and LeVeque 1979).
    #[inline(always)]
    pub fn merge(self, other: Moments) -> Moments {
        if self.count == 0.0 {
            return other;
        }
        let count = self.count + other.count;
        let delta = other.mean - self.mean;
        let mean = self.mean + delta * (other.count / count);
        let m2 = self.m2 + other.m2 + delta * delta * (self.count * other.count / count);
        Moments { count, mean, m2 }
    }

    /// The population's variance; 0 of nothing.
    pub fn variance(self) -> f64 {
        self.m2 / self.count.max(1.0)
    }
}

/// `y = f(x)` element by element, `y` holding `x` where that is `None`.
#[inline(always)]
fn map<T: Float>(x: Option<&[T]>, y: &mut [T], f: impl Fn(T) -> T) {
    match x {
        Some(x) => y.iter_mut().zip(x).for_each(|(y, &x)| *y = f(x)),
        None => y.iter_mut().for_each(|y| *y = f(*y)),
    }
}

fn cut<T>(x: Option<&[T]>, start: usize, len: usize) -> Option<&[T]> {
    x.map(|x| &x[start..start + len])
}

/// `y = f(a, b)`; the one of `a`, `b` that is `None` lies in `y`.
#[inline(always)]
fn zip_map<T: Float>(a: Option<&[T]>, b: Option<&[T]>, y: &mut [T], f: impl Fn(T, T) -> T) {
    match (a, b) {
        (Some(a), Some(b)) => y.iter_mut().zip(a).zip(b).for_each(|((y, &a), &b)| *y = f(a, b)),
        (Some(a), None) => y.iter_mut().zip(a).for_each(|(y, &a)| *y = f(a, *y)),
        (None, Some(b)) => y.iter_mut().zip(b).for_each(|(y, &b)| *y = f(*y, b)),
        (None, None) => y.iter_mut().for_each(|y| *y = f(*y, *y)),
    }
}

/// Rows of `len` elements that are normalised each by itself, then scaled and shifted: element `i` by
/// channel `(i / span) % period`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowNorm {
    pub len: usize,
    pub period: usize,
    pub span: usize,
    /// Subtract the mean (`false`: divide by the root of the mean square only).
    pub center: bool,
    pub epsilon: f64,
}

/// Scale of the elements of one run: one each, or one for all.
#[derive(Clone, Copy)]
enum Factor<'a, T> {
    Each(&'a [T]),
    All(T),
}

impl RowNorm {
    /// The runs of a row starting at element `start` as (offset in the row, length, first channel).
    fn runs(self, start: usize) -> impl Iterator<Item = (usize, usize, usize)> {
        let run = if self.span == 1 { self.period.min(self.len) } else { self.span.min(self.len) }.max(1);
        let channel = move |o: usize| ((start + o) / self.span.max(1)) % self.period.max(1);
        (0..self.len).step_by(run).map(move |o| (o, run.min(self.len - o), channel(o)))
    }

    fn factor<'a, T: Float>(self, values: Option<&'a [T]>, channel: usize, run: usize) -> Factor<'a, T> {
        match values {
            None => Factor::All(T::one()),
            Some(v) if self.span == 1 => Factor::Each(&v[channel..][..run]),
            Some(v) => Factor::All(v[channel]),
        }
    }

    /// The channels as `param_grad` sweeps them, of a tensor of `total` elements.
    pub fn channels(self, total: usize) -> Channels {
        let block = (self.period * self.span).max(1);
        Channels { n: total / block, c: self.period, s: self.span }
    }

    /// `y = (x − mean)·inv·scale + shift`; writes each row's mean and inverse deviation too.
    pub fn forward<T: Float>(
        self,
        x: Option<&[T]>,
        scale: Option<&[T]>,
        shift: Option<&[T]>,
        y: &mut [T],
        mean: &mut [T],
        inv: &mut [T],
    ) {
        let len = self.len.max(1);
        let per = (GRAIN / len).max(1);
        let pieces = y.par_chunks_mut(per * len).zip(mean.par_chunks_mut(per)).zip(inv.par_chunks_mut(per));
        pieces.enumerate().for_each(|(p, ((y, mean), inv))| {
            vectorize(
                #[inline(always)]
                || {
                    for (k, ((y, mean), inv)) in y.chunks_mut(len).zip(mean).zip(inv).enumerate() {
                        let start = (p * per + k) * len;
                        let x = cut(x, start, len);
                        let row = x.unwrap_or(y);
                        let (m, variance) = if self.center {
                            let m = Moments::of(row);
                            (m.mean, m.variance())
                        } else {
                            (0.0, sum(row, |x| x * x) / len as f64)
                        };
                        (*mean, *inv) = (T::of(m), T::of(1.0 / (variance + self.epsilon).sqrt()));
                        let (m, r) = (*mean, *inv);
                        for (o, run, channel) in self.runs(start) {
                            let (x, y) = (cut(x, o, run), &mut y[o..o + run]);
                            let shift = shift.map(|_| self.factor(shift, channel, run));
                            match (self.factor(scale, channel, run), shift.unwrap_or(Factor::All(T::zero())))
                            {
                                (Factor::All(a), Factor::All(b)) => map(x, y, |x| (x - m) * r * a + b),
                                (Factor::Each(a), Factor::Each(b)) => {
                                    map(x, y, |x| (x - m) * r);
                                    y.iter_mut().zip(a).zip(b).for_each(|((y, &a), &b)| *y = *y * a + b);
                                }
                                (Factor::Each(a), Factor::All(b)) => {
                                    map(x, y, |x| (x - m) * r);
                                    y.iter_mut().zip(a).for_each(|(y, &a)| *y = *y * a + b);
                                }
                                (Factor::All(a), Factor::Each(b)) => {
                                    map(x, y, |x| (x - m) * r * a);
                                    y.iter_mut().zip(b).for_each(|(y, &b)| *y += b);
                                }
                            }
                        }
                    }
                },
            )
        });
    }

    /// Are rows of half precision widened as they are read?
    pub fn widens(self) -> bool {
        self.len <= NEAR
    }

    /// `dx = inv·(g − mean(g) − x̂·mean(g·x̂))` with `g = dy·scale` and `x̂ = (x − mean)·inv`; without the
    /// middle term when the mean is not subtracted. At most one of `x`, `dy` is `None`: it lies in `dx`. `x` may be of half
    /// precision where [`widens`](Self::widens).
    pub fn input_grad<T: Float>(
        self,
        x: Option<Elements<T>>,
        dy: Option<&[T]>,
        scale: Option<&[T]>,
        (mean, inv): (Option<&[T]>, &[T]),
        dx: &mut [T],
    ) {
        let len = self.len.max(1);
        rows(
            dx,
            len,
            GRAIN,
            #[inline(always)]
            |first, piece| {
                let mut room;
                let near: &mut [T] = match x.is_none_or(|x| x.is_whole()) {
                    true => &mut [],
                    false => {
                        room = [T::zero(); NEAR];
                        &mut room
                    }
                };
                for (k, dx) in piece.chunks_mut(len).enumerate() {
                    let (row, start) = (first + k, (first + k) * len);
                    let (x, dy) = (x.map(|x| x.near(start, len, &mut *near)), cut(dy, start, len));
                    let (m, r) = (mean.map_or(T::zero(), |m| m[row]), inv[row]);
                    let (mut s1, mut s2) = (0.0, 0.0);
                    {
                        let (x, dy) = (x.unwrap_or(dx), dy.unwrap_or(dx));
                        for (o, run, channel) in self.runs(start) {
                            let (x, dy) = (&x[o..o + run], &dy[o..o + run]);
                            match self.factor(scale, channel, run) {
                                Factor::All(a) => {
                                    s1 += a.to64() * sum(dy, |dy| dy);
                                    s2 += a.to64() * sum2(dy, x, |dy, x| dy * (x - m));
                                }
                                Factor::Each(a) => {
                                    s1 += sum2(dy, a, |dy, a| dy * a);
                                    for ((dy, x), a) in
                                        dy.chunks(BLOCK).zip(x.chunks(BLOCK)).zip(a.chunks(BLOCK))
                                    {
                                        s2 += sum3(dy, x, a, |dy, x, a| dy * a * (x - m));
                                    }
                                }
                            }
                        }
                    }
                    let r64 = r.to64();
                    let k1 = if self.center { T::of(s1 / len as f64) } else { T::zero() };
                    let k2 = T::of(s2 * r64 * r64 / len as f64);
                    let back = |x: T, dy: T, a: T| r * (dy * a - k1 - (x - m) * k2);
                    for (o, run, channel) in self.runs(start) {
                        let (x, dy, dx) = (cut(x, o, run), cut(dy, o, run), &mut dx[o..o + run]);
                        match self.factor(scale, channel, run) {
                            Factor::All(a) => zip_map(x, dy, dx, |x, dy| back(x, dy, a)),
                            Factor::Each(a) => {
                                // A loop for each case: one with the cases in it is not vectorised.
                                let dx = dx.iter_mut().zip(a);
                                match (x, dy) {
                                    (Some(x), Some(dy)) => dx
                                        .zip(x)
                                        .zip(dy)
                                        .for_each(|(((dx, &a), &x), &dy)| *dx = back(x, dy, a)),
                                    (Some(x), None) => {
                                        dx.zip(x).for_each(|((dx, &a), &x)| *dx = back(x, *dx, a))
                                    }
                                    (None, Some(dy)) => {
                                        dx.zip(dy).for_each(|((dx, &a), &dy)| *dx = back(*dx, dy, a))
                                    }
                                    (None, None) => dx.for_each(|(dx, &a)| *dx = back(*dx, *dx, a)),
                                }
                            }
                        }
                    }
                }
            },
        );
    }
}

/// `Σ f(x, y, z)` over at most a block.
#[inline(always)]
fn sum3<T: Float>(x: &[T], y: &[T], z: &[T], f: impl Fn(T, T, T) -> T) -> f64 {
    let mut acc = [T::zero(); LANES];
    let (xc, yc, zc) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>(), z.as_chunks::<LANES>());
    for ((x, y), z) in xc.0.iter().zip(yc.0).zip(zc.0) {
        for (((a, &x), &y), &z) in acc.iter_mut().zip(x).zip(y).zip(z) {
            *a += f(x, y, z);
        }
    }
    let mut last = [T::zero(); LANES];
    for (((a, &x), &y), &z) in last.iter_mut().zip(xc.1).zip(yc.1).zip(zc.1) {
        *a = f(x, y, z);
    }
    lanes(acc, last)
}
