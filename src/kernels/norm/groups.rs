//! Normalisation of each sample by groups of its channels, which lie first or last.
//!
//! Where channels lie last, a sample is swept as a batch of its own: sums are per channel, and become those of groups.

use rayon::prelude::*;

use super::channel::{Mask, Stat, channel_stats, param_grad};
use super::strips::Channels;
use super::sweep::{Residual, Results, channel_affine, channel_spread};
use super::{RowNorm, cut};
use crate::kernels::elementwise::Clamp;
use crate::kernels::half::Elements;
use crate::kernels::layout::Layout;
use crate::kernels::simd::Vectors;

/// `n` samples of `c` channels of `s` places.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GroupNorm {
    pub n: usize,
    pub c: usize,
    pub s: usize,
    /// Of neighbouring channels: a divisor of `c`.
    pub groups: usize,
    /// Scales and shifts: one a channel or one a group.
    pub scales: usize,
    pub epsilon: f64,
    pub layout: Layout,
}

impl GroupNorm {
    /// Do channels lie last? (Of one place, they lie both ways.)
    fn last(self) -> bool {
        self.layout == Layout::Last || self.s == 1
    }

    /// A sample whose channels lie last.
    fn sample(self) -> Channels {
        Channels { n: self.s, c: self.c, s: 1 }
    }

    /// Elements of a sample, at least 1.
    fn size(self) -> usize {
        (self.c * self.s).max(1)
    }

    /// Channels of a group.
    fn width(self) -> usize {
        self.c / self.groups.max(1)
    }

    /// Where a channel's scale is.
    fn scale(self, channel: usize) -> usize {
        channel / (self.c / self.scales).max(1)
    }

    fn rows(self) -> RowNorm {
        let span = self.c / self.scales.max(1) * self.s;
        let len = self.width() * self.s;
        RowNorm { len, period: self.scales, span, center: true, epsilon: self.epsilon }
    }

    /// Elements of `f64` that [`forward`](Self::forward) and [`sums`](Self::sums) need.
    pub fn partials(self) -> usize {
        if self.last() { self.n * self.sample().partials() } else { 0 }
    }

    /// Elements that [`forward`](Self::forward) and [`sums`](Self::sums) need.
    pub fn room(self) -> usize {
        if self.last() { 3 * self.n * self.c } else { 0 }
    }

    /// Elements that [`input_grad`](Self::input_grad) needs.
    pub fn grad_room(self) -> usize {
        4 * self.n * self.c
    }

    /// `y = (x − mean)·inv·scale + shift`, `x` lying in `y` where it is `None`; writes each group's mean and inverse
    /// deviation (n × groups) too.
    #[allow(clippy::too_many_arguments)]
    pub fn forward<T: Vectors>(
        self,
        x: Option<&[T]>,
        scale: &[T],
        shift: Option<&[T]>,
        y: &mut [T],
        (mean, inv): (&mut [T], &mut [T]),
        partials: &mut [f64],
        room: &mut [T],
    ) {
        if !self.last() {
            return self.rows().forward(x, Some(scale), shift, y, mean, inv);
        }
        let (d, width) = (self.sample(), self.width().max(1));
        let groups = self.groups.max(1);
        let statistics = mean.par_chunks_mut(groups).zip(inv.par_chunks_mut(groups));
        let near = partials.par_chunks_mut(d.partials().max(1)).zip(room.par_chunks_mut((3 * self.c).max(1)));
        let samples = y.par_chunks_mut(self.size()).zip(statistics).zip(near);
        samples.enumerate().for_each(|(i, ((y, (mean, inv)), (partials, room)))| {
            let x = cut(x, i * self.size(), y.len());
            let (at, rest) = room.split_at_mut(self.c);
            let (factor, rest) = rest.split_at_mut(self.c);
            channel_stats(x.unwrap_or(y), d, at, factor, partials);
            let of_channels = at.chunks(width).zip(factor.chunks(width));
            for ((mean, inv), (means, variances)) in mean.iter_mut().zip(&mut *inv).zip(of_channels) {
                let m = means.iter().map(|m| m.to64()).sum::<f64>() / width as f64;
                let about = means.iter().zip(variances).map(|(c, v)| v.to64() + (c.to64() - m).powi(2));
                let variance = about.sum::<f64>() / width as f64;
                (*mean, *inv) = (T::of(m), T::of(1.0 / (variance + self.epsilon).sqrt()));
            }
            for c in 0..self.c {
                let own = self.scale(c);
                at[c] = mean[c / width];
                factor[c] = T::of(scale[own].to64() * inv[c / width].to64());
                rest[c] = shift.map_or(T::zero(), |shift| shift[own]);
            }
            let (x, y) = (x.map(Elements::Whole), Results::Whole(y));
            channel_affine(x, y, d, at, factor, &rest[..self.c], Residual::None, Clamp::NONE.to());
        });
    }

    /// `scales = Σ dy·(x − mean)·inv` and `shifts = Σ dy` of each channel of each sample (n × c). `x` may be of half precision where
    /// channels lie last.
    #[allow(clippy::too_many_arguments)]
    pub fn sums<T: Vectors>(
        self,
        x: Elements<T>,
        dy: &[T],
        (mean, inv): (&[T], &[T]),
        (scales, shifts): (&mut [T], &mut [T]),
        partials: &mut [f64],
        room: &mut [T],
    ) {
        if !self.last() {
            let d = Channels { n: 1, c: self.n * self.c, s: self.s };
            let rows = Stat::Row((self.width() * self.s).max(1));
            let (dy, statistics) = (Elements::Whole(dy), (Some(mean), inv));
            return param_grad(x, dy, d, rows, statistics, Mask::All, (scales, shifts), partials);
        }
        let (d, c, size) = (self.sample(), self.c.max(1), self.size());
        let near = partials.par_chunks_mut(d.partials().max(1)).zip(room.par_chunks_mut(2 * c));
        let samples = scales.par_chunks_mut(c).zip(shifts.par_chunks_mut(c)).zip(near);
        samples.enumerate().for_each(|(i, (sums, (partials, room)))| {
            let (at, factor) = room.split_at_mut(c);
            for k in 0..self.c {
                let group = i * self.groups + k / self.width();
                (at[k], factor[k]) = (mean[group], inv[group]);
            }
            let part = i * size..(i + 1) * size;
            let (x, dy) = (x.part(part.clone()), Elements::Whole(&dy[part]));
            param_grad(x, dy, d, Stat::Channel, (Some(at), factor), Mask::All, sums, partials);
        });
    }

    /// `dx = inv·(scale·dy − G − x̂·H)` with `x̂ = (x − mean)·inv`, G and H being the means over a group of `scale·dy` and
    /// `scale·dy·x̂`, from the [`sums`](Self::sums). At most one of `x`, `dy` is `None`: it lies in `dx`; `x` may be of half
    /// precision where channels lie last.
    #[allow(clippy::too_many_arguments)]
    pub fn input_grad<T: Vectors>(
        self,
        x: Option<Elements<T>>,
        dy: Option<&[T]>,
        scale: &[T],
        (mean, inv): (&[T], &[T]),
        (scales, shifts): (&[T], &[T]),
        dx: &mut [T],
        room: &mut [T],
    ) {
        let (c, width, size) = (self.c.max(1), self.width(), self.size());
        let mut rest = room;
        let [at, factor, k1, k2] = [(); 4].map(|()| {
            let (own, others) = std::mem::take(&mut rest).split_at_mut(self.n * self.c);
            rest = others;
            own
        });
        let count = (width * self.s).max(1) as f64;
        for group in 0..self.n * self.groups {
            let channels = group * width..(group + 1) * width;
            let weighted = |sums: &[T]| {
                let terms = channels.clone().map(|i| scale[self.scale(i % c)].to64() * sums[i].to64());
                terms.sum::<f64>() / count
            };
            let (g, h, r) = (weighted(shifts), weighted(scales), inv[group].to64());
            for i in channels.clone() {
                at[i] = mean[group];
                factor[i] = T::of(r * scale[self.scale(i % c)].to64());
                (k1[i], k2[i]) = (T::of(r * g), T::of(r * r * h));
            }
        }
        let coefficients = [&*at, factor, k1, k2];
        if !self.last() {
            let d = Channels { n: 1, c: self.n * self.c, s: self.s };
            return channel_spread(x, dy, dx, d, coefficients);
        }
        dx.par_chunks_mut(size).enumerate().for_each(|(i, dx)| {
            let x = x.map(|x| x.part(i * size..(i + 1) * size));
            let own = coefficients.map(|of| &of[i * c..][..c]);
            channel_spread(x, cut(dy, i * size, size), dx, self.sample(), own);
        });
    }
}
