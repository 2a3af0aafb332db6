//! Batch normalisation: sums per channel.
//!
//! Channels lie either in runs of `s` elements or, `s` being 1, side by side in each row. In the latter case few
//! channels make short rows: their sums are then repeated over several rows, so that loops are long and additions
//! do not wait on one another. Sums run over short blocks in the element type and are carried in `f64`.

use rayon::prelude::*;

use super::fold::{Centred, Given, NEAR, Passed, Sums, Term, Written};
use super::strips::{Channels, DEPTH, Strip, WIDTH, blocks};
use super::sweep::pass;
use super::{Moments, cut, sum, sum2};
use crate::kernels::elementwise::Clamp;
use crate::kernels::half::Elements;
use crate::kernels::isa::vectorize_sweep;
use crate::kernels::par;
use crate::kernels::simd::Vectors;
use crate::tensor::Float;

/// Groups of rows from which the first guess of a mean is made.
const FEW: usize = 8;

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
    d.tasks_with(
        partials,
        dz,
        #[inline(always)]
        |at, dz, scales, shifts| {
            let y = y.part(at.clone());
            let mut room;
            let near: &mut [T] = match y.is_whole() {
                true => &mut [],
                false => {
                    room = [T::zero(); NEAR];
                    &mut room
                }
            };
            let term = Written { y, dy: cut(dy, at.start, at.len()), dz, clamp, near };
            column_products(x.part(at), d.c, Some(mean), term, scales, shifts);
        },
    );
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
