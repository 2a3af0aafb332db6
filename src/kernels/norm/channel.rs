//! Batch normalisation: sums per channel.
//!
//! Channels lie either in runs of `s` elements or, `s` being 1, side by side in each row. In the latter case few
//! channels make short rows: their sums are then repeated over several rows, so that loops are long and additions
//! do not wait on one another. Sums run over short blocks in the element type and are carried in `f64`.

use std::ops::Range;

use rayon::prelude::*;

use super::fold::{Centred, Fold, Given, NEAR, Passed, Sums, Term, Written};
use super::sweep::pass;
use super::{Moments, cut, sum, sum2};
use crate::kernels::elementwise::Clamp;
use crate::kernels::half::Elements;
use crate::kernels::isa::vectorize_sweep;
use crate::kernels::par::{self, GRAIN};
use crate::kernels::simd::Vectors;
use crate::tensor::Float;

/// Elements that are summed side by side.
pub(super) const WIDTH: usize = 512;
/// Elements that are added up in the element type before the sum is carried in `f64`.
const DEPTH: usize = 64;
/// Groups of rows from which the first guess of a mean is made.
const FEW: usize = 8;
/// Elements a task of a reduction has at least, and tasks at most.
const TASK: usize = 1 << 16;
const TASKS: usize = 32;

/// A tensor as `n` × `c` channels × `s` contiguous elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Channels {
    pub n: usize,
    pub c: usize,
    pub s: usize,
}

impl Channels {
    /// The same channels where they lie last: a channel's elements are one `c` apart.
    pub fn last(self) -> Channels {
        Channels { n: self.n * self.s, c: self.c, s: 1 }
    }

    /// Elements of one channel.
    pub fn count(self) -> usize {
        self.n * self.s
    }

    fn start(self, n: usize, channel: usize) -> usize {
        (n * self.c + channel) * self.s
    }

    /// Channels that one piece of work covers.
    fn per_piece(self) -> usize {
        (GRAIN / self.count().max(1)).max(1)
    }

    /// Rows of `c` that one task of a reduction covers, where `s` is 1.
    pub(super) fn per_task(self) -> usize {
        let tasks = (self.n * self.c).div_ceil(TASK).clamp(1, TASKS);
        self.n.div_ceil(tasks).max(1)
    }

    /// Elements of `f64` scratch that reductions need.
    pub fn partials(self) -> usize {
        if self.s == 1 { self.n.div_ceil(self.per_task()) * 2 * self.c } else { 0 }
    }

    /// Calls `f(first row, partial sums)` for each task of a reduction, where `s` is 1, with `2·c` zeros to add to.
    fn tasks(self, partials: &mut [f64], f: impl Fn(usize, &mut [f64], &mut [f64]) + Sync) {
        let partials = &mut partials[..self.partials()];
        par::chunks(partials, (2 * self.c).max(1), |i, part| {
            part.fill(0.0);
            let (a, b) = part.split_at_mut(self.c);
            vectorize_sweep(
                #[inline(always)]
                || f(i * self.per_task(), a, b),
            );
        });
    }

    /// The elements of the rows from `first` on that a task covers.
    pub(super) fn rows_of(self, first: usize) -> Range<usize> {
        first * self.c..(first + self.per_task()).min(self.n) * self.c
    }
}

/// Some columns of consecutive rows of `c`. Where they are few, whole rows side by side.
#[derive(Clone, Copy)]
pub(super) struct Strip {
    /// First column, and how many.
    pub(super) first: usize,
    pub(super) columns: usize,
    /// Elements swept side by side, a multiple of `columns`, and from one such group to the next.
    pub(super) width: usize,
    pub(super) step: usize,
}

impl Strip {
    pub(super) fn all(c: usize) -> impl Iterator<Item = Strip> {
        let few = 2 * c <= WIDTH;
        (0..c).step_by(if few { c.max(1) } else { WIDTH }).map(move |first| {
            let columns = (c - first).min(WIDTH);
            match few {
                true => Strip { first, columns, width: WIDTH / c * c, step: WIDTH / c * c },
                false => Strip { first, columns, width: columns, step: c },
            }
        })
    }

    /// The strip's values of each column, repeated over the width.
    pub(super) fn spread<T: Copy>(self, values: &[T], lanes: &mut [T; WIDTH]) {
        let lanes = &mut lanes[..self.width];
        lanes[..self.columns].copy_from_slice(&values[self.first..][..self.columns]);
        // Twice as many each time: of few columns there are many copies.
        let mut done = self.columns;
        while done < lanes.len() {
            let more = done.min(lanes.len() - done);
            lanes.copy_within(..more, done);
            done += more;
        }
    }

    /// Adds up what was swept side by side.
    #[inline(always)]
    fn gather<T: Float>(self, lanes: &[T; WIDTH], sums: &mut [f64]) {
        for lanes in lanes[..self.width].chunks_exact(self.columns) {
            for (s, x) in sums.iter_mut().zip(lanes) {
                *s += x.to64();
            }
        }
    }

    /// Elements after which sums are carried over to `f64`.
    fn block(self) -> usize {
        DEPTH * self.step
    }

    /// `plain = Σ dz` and, with `PRODUCTS`, `products = Σ dz·(x − at)` of the strip's columns, `less` being `−at`,
    /// over whole rows: some elements of `x` and of the term's matrices.
    fn fold<T: Vectors, F: Term<T>, const PRODUCTS: bool>(
        self,
        elements: Range<usize>,
        x: Elements<T>,
        less: &[T; WIDTH],
        term: &mut F,
        sums: &mut Sums<T>,
    ) {
        let (columns, step, start) = (self.width, self.step, elements.start + self.first);
        sums.products[..columns].fill(T::zero());
        sums.plain[..columns].fill(T::zero());
        let len = elements.end.saturating_sub(start);
        let rows = if len < columns { 0 } else { (len - columns) / step + 1 };
        Fold::<_, _, PRODUCTS> { start, rows, columns, step, x, less, term, sums }.sum();
        // Rows that make no whole group.
        let (start, columns) = (start + rows * step, len.saturating_sub(rows * step));
        Fold::<_, _, PRODUCTS> { start, rows: 1, columns, step, x, less, term, sums }.sum();
    }
}

/// Consecutive pieces of so many elements that make up `len`.
fn blocks(len: usize, block: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(block.max(1)).map(move |i| i..len.min(i + block))
}

/// Merges the moments of `count` further rows into means and squared distances of `before` rows.
#[inline(always)]
fn merge(mean: &mut [f64], m2: &mut [f64], before: f64, other: (&[f64], &[f64]), count: f64) {
    let total = before + count;
    let (share, weight) = (count / total, before * count / total);
    for (((mean, m2), &other), &own) in mean.iter_mut().zip(m2).zip(other.0).zip(other.1) {
        let delta = other - *mean;
        *mean += delta * share;
        *m2 += own + delta * delta * weight;
    }
}

/// Mean and population variance of each channel. `partials`: [`Channels::partials`] elements.
pub fn channel_stats<T: Vectors>(
    x: &[T],
    d: Channels,
    mean: &mut [T],
    variance: &mut [T],
    partials: &mut [f64],
) {
    channel_stats_and(x, d, mean, variance, partials, &|_, _| {});
}

/// As [`channel_stats`]; `near` is told of pieces of `x`, the number of their first element and they, once each, while
/// they are near.
pub fn channel_stats_and<T: Vectors>(
    x: &[T],
    d: Channels,
    mean: &mut [T],
    variance: &mut [T],
    partials: &mut [f64],
    near: &(dyn Fn(usize, &[T]) + Sync),
) {
    if d.s != 1 {
        let per = d.per_piece();
        mean.par_chunks_mut(per).zip(variance.par_chunks_mut(per)).enumerate().for_each(
            |(i, (mean, var))| {
                vectorize_sweep(
                    #[inline(always)]
                    || {
                        for (k, (mean, var)) in mean.iter_mut().zip(var).enumerate() {
                            let mut m = Moments::default();
                            for n in 0..d.n {
                                let start = d.start(n, i * per + k);
                                let x = &x[start..][..d.s];
                                near(start, x);
                                m = m.merge(Moments::of(x));
                            }
                            (*mean, *var) = (T::of(m.mean), T::of(m.variance()));
                        }
                    },
                )
            },
        );
        return;
    }
    d.tasks(
        partials,
        #[inline(always)]
        |first, means, squares| {
            let rows = d.rows_of(first);
            row_moments(&x[rows.clone()], d.c, means, squares);
            near(rows.start, &x[rows]);
        },
    );
    let parts = partials[..d.partials()].chunks_exact_mut((2 * d.c).max(1)).enumerate();
    let per = d.per_task();
    merged(parts.map(|(i, part)| (per.min(d.n - i * per), part)), mean, variance);
}

/// Means and population variances of all rows from those of blocks of them: `(rows, means and squared distances)`.
fn merged<'p, T: Float>(
    mut parts: impl Iterator<Item = (usize, &'p mut [f64])>,
    mean: &mut [T],
    variance: &mut [T],
) {
    mean.fill(T::zero());
    variance.fill(T::zero());
    let Some((mut rows, first)) = parts.next() else { return };
    let (means, squares) = first.split_at_mut(mean.len());
    for (count, part) in parts {
        merge(means, squares, rows as f64, part.split_at(mean.len()), count as f64);
        rows += count;
    }
    for (mean, m) in mean.iter_mut().zip(means) {
        *mean = T::of(*m);
    }
    for (variance, m2) in variance.iter_mut().zip(squares) {
        *variance = T::of(*m2 / rows.max(1) as f64);
    }
}

/// Elements of `f64` that [`block_moments`] needs for `c` channels.
pub fn block_room(c: usize) -> usize {
    1 + 2 * c
}

/// What [`merge_blocks`] wants to know of some rows of `c` channels.
pub fn block_moments<T: Vectors>(x: &[T], c: usize, part: &mut [f64]) {
    part.fill(0.0);
    let (rows, part) = part.split_at_mut(1);
    let (means, squares) = part.split_at_mut(c);
    rows[0] = (x.len() / c.max(1)) as f64;
    vectorize_sweep(
        #[inline(always)]
        || row_moments(x, c, means, squares),
    );
}

/// Mean and population variance of each channel from blocks of rows, in order.
pub fn merge_blocks<T: Float>(parts: &mut [f64], mean: &mut [T], variance: &mut [T]) {
    let parts = parts.chunks_exact_mut(block_room(mean.len()));
    let counted = parts.filter_map(|part| part.split_first_mut().map(|(rows, part)| (*rows as usize, part)));
    merged(counted, mean, variance);
}

/// Means and summed squared distances from them of the columns of `x`, rows of `c`.
#[inline(always)]
fn row_moments<T: Vectors>(x: &[T], c: usize, means: &mut [f64], squares: &mut [f64]) {
    let mut lanes = Sums::zero();
    let [mut less, mut about] = [[T::zero(); WIDTH]; 2];
    let [mut sums, mut own] = [[0.0; WIDTH]; 2];
    for strip in Strip::all(c) {
        let columns = strip.columns;
        let (means, squares) = (&mut means[strip.first..][..columns], &mut squares[strip.first..][..columns]);
        let (sums, own, about) = (&mut sums[..columns], &mut own[..columns], &mut about[..columns]);
        // Distances are from about the mean: at first that of a few rows, then that of all rows so far. How far it
        // is off adds to the variance of all rows as much as it takes from a block's digits.
        let few = x.len().min(FEW * strip.step);
        let all = Elements::Whole(x);
        strip.fold::<_, _, false>(0..few, all, &[T::zero(); WIDTH], &mut Given::near(all), &mut lanes);
        sums.fill(0.0);
        strip.gather(&lanes.plain, sums);
        means.iter_mut().zip(&*sums).for_each(|(m, s)| *m = s / (few / c) as f64);
        let mut before = 0.0;
        for range in blocks(x.len(), strip.block()) {
            let count = (range.len() / c) as f64;
            about.iter_mut().zip(&*means).for_each(|(a, m)| *a = -T::of(*m));
            Strip { first: 0, ..strip }.spread(about, &mut less);
            strip.fold::<_, _, true>(range, all, &less, &mut Centred, &mut lanes);
            sums.fill(0.0);
            own.fill(0.0);
            strip.gather(&lanes.plain, sums);
            strip.gather(&lanes.products, own);
            for ((own, mean), a) in own.iter_mut().zip(&mut *sums).zip(&*about) {
                let off = *mean / count;
                *own -= *mean * off;
                *own = own.max(*own * 0.0);
                *mean = off - a.to64();
            }
            merge(means, squares, before, (sums, own), count);
            before += count;
        }
    }
}

/// Where the statistics of an element are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stat {
    /// One pair a channel (batch normalisation).
    Channel,
    /// One pair a row of so many elements.
    Row(usize),
}

/// Which output gradients pass the activation that follows a normalisation.
#[derive(Clone, Copy)]
pub enum Mask<'a, T> {
    All,
    /// Those whose result, recomputed as `(x − mean)·factor + shift` per channel, is inside.
    Inside {
        factor: &'a [T],
        shift: &'a [T],
        clamp: Clamp<T>,
    },
}

/// `dscale = Σ dz·(x − mean)·inv` and `dshift = Σ dz` of each channel, `dz` being `dy` where the mask lets it pass.
/// A channel's run of `s` elements lies within one row; masks are of batch normalisation only. `x` may be of half
/// precision, and `dy` of bfloat16, where `s` is 1.
#[allow(clippy::too_many_arguments)]
pub fn param_grad<T: Vectors>(
    x: Elements<T>,
    dy: Elements<T>,
    d: Channels,
    stat: Stat,
    (mean, inv): (Option<&[T]>, &[T]),
    mask: Mask<T>,
    (dscale, dshift): (&mut [T], &mut [T]),
    partials: &mut [f64],
) {
    if d.s == 1 {
        d.tasks(
            partials,
            #[inline(always)]
            |first, scales, shifts| {
                let rows = d.rows_of(first);
                let (x, dy) = (x.part(rows.clone()), dy.part(rows));
                match stat {
                    Stat::Channel => match mask {
                        Mask::All => column_products(x, d.c, mean, Given::near(dy), scales, shifts),
                        Mask::Inside { factor, shift, clamp } => {
                            let term = Passed::new(dy, factor, shift, clamp);
                            column_products(x, d.c, mean, term, scales, shifts);
                        }
                    },
                    Stat::Row(len) => {
                        let at = |row: usize| {
                            let i = (first + row) * d.c / len;
                            (mean.map_or(T::zero(), |m| m[i]), inv[i])
                        };
                        row_products((x, dy.whole()), d.c, at, scales, shifts);
                    }
                }
            },
        );
        let inv = matches!(stat, Stat::Channel).then_some(inv);
        return finish(&partials[..d.partials()], inv, dscale, dshift);
    }
    let (x, dy, per) = (x.whole(), dy.whole(), d.per_piece());
    let at = |i: usize, channel: usize| match stat {
        Stat::Channel => channel,
        Stat::Row(len) => i / len,
    };
    let pieces = dscale.par_chunks_mut(per).zip(dshift.par_chunks_mut(per));
    pieces.enumerate().for_each(|(i, (dscale, dshift))| {
        vectorize_sweep(
            #[inline(always)]
            || {
                for (k, (dscale, dshift)) in dscale.iter_mut().zip(dshift).enumerate() {
                    let channel = i * per + k;
                    let (mut scale, mut shift) = (0.0, 0.0);
                    for n in 0..d.n {
                        let start = d.start(n, channel);
                        let (x, dy) = (&x[start..][..d.s], &dy[start..][..d.s]);
                        let i = at(start, channel);
                        let m = mean.map_or(T::zero(), |m| m[i]);
                        let (of_scale, of_shift) = match mask {
                            Mask::All => (sum2(dy, x, |dy, x| dy * (x - m)), sum(dy, |dy| dy)),
                            Mask::Inside { factor, shift, clamp } => {
                                let (a, b) = (factor[channel], shift[channel]);
                                let z = |dy: T, x: T| clamp.pass((x - m) * a + b, dy);
                                (sum2(dy, x, |dy, x| z(dy, x) * (x - m)), sum2(dy, x, z))
                            }
                        };
                        scale += of_scale * inv[i].to64();
                        shift += of_shift;
                    }
                    *dscale = T::of(scale);
                    *dshift = T::of(shift);
                }
            },
        )
    });
}

/// What rows of channels contribute to the sums of [`param_grad`], `Σ dz·(x − mean)` and `Σ dz` (2·c), is added to them.
pub fn add_param_grad<T: Vectors>(
    x: Elements<T>,
    dy: &[T],
    mean: &[T],
    (factor, shift, clamp): (&[T], &[T], Clamp<T>),
    part: &mut [f64],
) {
    let (scales, shifts) = part.split_at_mut(mean.len());
    let term = Passed::new(Elements::Whole(dy), factor, shift, clamp);
    vectorize_sweep(
        #[inline(always)]
        || column_products(x, mean.len(), Some(mean), term, scales, shifts),
    );
}

/// dscale and dshift of all rows, from the sums over blocks of them, in order.
pub fn merge_param_grad<T: Float>(parts: &[f64], inv: &[T], dscale: &mut [T], dshift: &mut [T]) {
    finish(parts, Some(inv), dscale, dshift);
}

/// Adds up the tasks' sums; those of the scale are multiplied by `inv`.
pub(super) fn finish<T: Float>(partials: &[f64], inv: Option<&[T]>, dscale: &mut [T], dshift: &mut [T]) {
    let channels = dscale.len();
    let parts = || partials.chunks_exact((2 * channels).max(1));
    for (c, (dscale, dshift)) in dscale.iter_mut().zip(dshift).enumerate() {
        let (scale, shift) = parts().fold((0.0, 0.0), |(a, b), p| (a + p[c], b + p[channels + c]));
        *dscale = T::of(scale * inv.map_or(1.0, |inv| inv[c].to64()));
        *dshift = T::of(shift);
    }
}

/// `scales += Σ dz·(x − mean)`, `shifts += Σ dz` over rows of `c`, `dz` being the term's.
#[inline(always)]
pub(super) fn column_products<T: Vectors, F: Term<T>>(
    x: Elements<T>,
    c: usize,
    mean: Option<&[T]>,
    mut term: F,
    scales: &mut [f64],
    shifts: &mut [f64],
) {
    let mut less = [T::zero(); WIDTH];
    let mut sums = Sums::zero();
    for strip in Strip::all(c) {
        let columns = strip.first..strip.first + strip.columns;
        if let Some(mean) = mean {
            strip.spread(mean, &mut less);
            less.iter_mut().for_each(|m| *m = -*m);
        }
        term.turn_to(strip);
        for range in blocks(x.len(), strip.block()) {
            strip.fold::<_, _, true>(range, x, &less, &mut term, &mut sums);
            strip.gather(&sums.products, &mut scales[columns.clone()]);
            strip.gather(&sums.plain, &mut shifts[columns.clone()]);
        }
    }
}

/// `scales += Σ dy·(x − mean)·inv`, `shifts += Σ dy` over rows of `c`, each of which has its own `(mean, inv)`.
#[inline(always)]
fn row_products<T: Float>(
    (x, dy): (Elements<T>, &[T]),
    c: usize,
    at: impl Fn(usize) -> (T, T),
    scales: &mut [f64],
    shifts: &mut [f64],
) {
    let [mut lanes, mut plain, mut near] = [[T::zero(); WIDTH]; 3];
    for first in (0..c).step_by(WIDTH) {
        let n = WIDTH.min(c - first);
        let (lanes, plain) = (&mut lanes[..n], &mut plain[..n]);
        let (scales, shifts) = (&mut scales[first..][..n], &mut shifts[first..][..n]);
        for (block, dy) in dy.chunks(DEPTH * c).enumerate() {
            lanes.fill(T::zero());
            plain.fill(T::zero());
            for (k, dy) in dy.chunks_exact(c).enumerate() {
                let row = block * DEPTH + k;
                let (m, r) = at(row);
                let (x, dy) = (x.near(row * c + first, n, &mut near), &dy[first..][..n]);
                for j in 0..n {
                    lanes[j] += dy[j] * ((x[j] - m) * r);
                    plain[j] += dy[j];
                }
            }
            scales.iter_mut().zip(&*lanes).for_each(|(s, x)| *s += x.to64());
            shifts.iter_mut().zip(&*plain).for_each(|(s, x)| *s += x.to64());
        }
    }
}

/// As [`param_grad`] of batch normalisation with a residual, whose activation let pass where the result `y` is
/// inside; `dz` is written too, and holds `dy` where that is `None`. `x` and `y` may be of half precision where `s` is 1.
#[allow(clippy::too_many_arguments)]
pub fn masked_param_grad<T: Vectors>(
    x: Elements<T>,
    y: Elements<T>,
    dy: Option<&[T]>,
    dz: &mut [T],
    clamp: Clamp<T>,
    d: Channels,
    (mean, inv): (&[T], &[T]),
    (dscale, dshift): (&mut [T], &mut [T]),
    partials: &mut [f64],
) {
    if d.s != 1 {
        pass(y.whole(), dy, dz, clamp);
        let stat = Stat::Channel;
        let dz = Elements::Whole(&*dz);
        return param_grad(x, dz, d, stat, (Some(mean), inv), Mask::All, (dscale, dshift), partials);
    }
    let per = d.per_task() * d.c;
    let parts = partials[..d.partials()].par_chunks_mut((2 * d.c).max(1));
    parts.zip(dz.par_chunks_mut(per.max(1))).enumerate().for_each(|(i, (part, dz))| {
        part.fill(0.0);
        let (scales, shifts) = part.split_at_mut(d.c);
        let (start, n) = (i * per, dz.len());
        let y = y.part(start..start + n);
        let mut room;
        let near: &mut [T] = match y.is_whole() {
            true => &mut [],
            false => {
                room = [T::zero(); NEAR];
                &mut room
            }
        };
        let term = Written { y, dy: cut(dy, start, n), dz, clamp, near };
        vectorize_sweep(
            #[inline(always)]
            || column_products(x.part(start..start + n), d.c, Some(mean), term, scales, shifts),
        );
    });
    finish(&partials[..d.partials()], Some(inv), dscale, dshift);
}

/// `Σ dy` of each channel. `partials`: [`Channels::partials`] elements.
pub fn channel_sum<T: Vectors>(dy: Elements<T>, d: Channels, out: &mut [T], partials: &mut [f64]) {
    if d.s == 1 {
        d.tasks(
            partials,
            #[inline(always)]
            |first, sums, _| {
                let (less, mut lanes) = ([T::zero(); WIDTH], Sums::zero());
                let (dy, mut near) = (dy.part(d.rows_of(first)), [T::zero(); NEAR]);
                for strip in Strip::all(d.c) {
                    for range in blocks(dy.len(), strip.block()) {
                        let none = Elements::Whole(&[]);
                        let mut given = Given { dy, near: &mut near };
                        strip.fold::<_, _, false>(range, none, &less, &mut given, &mut lanes);
                        strip.gather(&lanes.plain, &mut sums[strip.first..][..strip.columns]);
                    }
                }
            },
        );
        let parts = || partials[..d.partials()].chunks_exact((2 * d.c).max(1));
        for (c, out) in out.iter_mut().enumerate() {
            *out = T::of(parts().map(|p| p[c]).sum());
        }
        return;
    }
    let (per, dy) = (d.per_piece(), dy.whole());
    par::chunks(out, per, |i, out| {
        vectorize_sweep(
            #[inline(always)]
            || {
                for (k, out) in out.iter_mut().enumerate() {
                    let rows = (0..d.n).map(|n| sum(&dy[d.start(n, i * per + k)..][..d.s], |x| x));
                    *out = T::of(rows.sum());
                }
            },
        )
    });
}
