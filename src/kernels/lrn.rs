//! Local response normalisation across channels.

use crate::kernels::isa::vectorize;
use crate::kernels::math::Math;
use crate::kernels::par::{GRAIN, rows};

/// `y = x·d^−beta` with `d = bias + alpha/size·Σ x²` over the window of channels around x's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lrn {
    pub size: usize,
    pub alpha: f64,
    pub beta: f64,
    pub bias: f64,
}

impl Lrn {
    /// The channels whose squares enter channel `c`: ⌊(size−1)/2⌋ before it, ⌈(size−1)/2⌉ after.
    fn window(self, c: usize, channels: usize) -> std::ops::Range<usize> {
        let before = (self.size - 1) / 2;
        c.saturating_sub(before)..(c + self.size - before).min(channels)
    }

    /// The channels whose windows hold channel `c`.
    fn seen_by(self, c: usize, channels: usize) -> std::ops::Range<usize> {
        let before = (self.size - 1) / 2;
        (c + 1 + before).saturating_sub(self.size)..(c + before + 1).min(channels)
    }

    /// `d` of one sample.
    #[inline(always)]
    fn divisors<T: Math>(self, x: &[T], d: &mut [T], c: usize, s: usize) {
        let (bias, factor) = (T::of(self.bias), T::of(self.alpha / self.size as f64));
        for (k, d) in d.chunks_mut(s.max(1)).enumerate() {
            d.fill(T::zero());
            for j in self.window(k, c) {
                d.iter_mut().zip(&x[j * s..][..s]).for_each(|(d, &x)| *d += x * x);
            }
            d.iter_mut().for_each(|d| *d = bias + factor * *d);
        }
    }
}

/// x of shape (N, c, s).
pub fn lrn<T: Math>(p: Lrn, x: &[T], y: &mut [T], c: usize, s: usize) {
    let beta = T::of(-p.beta);
    rows(y, c * s, GRAIN, |first, piece| {
        vectorize(
            #[inline(always)]
            || {
                for (k, y) in piece.chunks_mut((c * s).max(1)).enumerate() {
                    let x = &x[(first + k) * c * s..][..c * s];
                    p.divisors(x, y, c, s);
                    for (y, &x) in y.iter_mut().zip(x) {
                        *y = x * y.m_pow(beta);
                    }
                }
            },
        )
    });
}

/// `dx = dy·d^−beta − 2·alpha·beta/size·x·Σ dy·x·d^(−beta−1)`, the sum over the channels that see x; `d` and
/// `terms` are scratch of x's size.
#[allow(clippy::too_many_arguments)]
pub fn lrn_grad<T: Math>(
    p: Lrn,
    x: &[T],
    dy: &[T],
    dx: &mut [T],
    d: &mut [T],
    terms: &mut [T],
    c: usize,
    s: usize,
) {
    let (beta, factor) = (T::of(-p.beta), T::of(2.0 * p.alpha * p.beta / p.size as f64));
    let block = c * s;
    rows(d, block, GRAIN, |first, piece| {
        vectorize(
            #[inline(always)]
            || {
                for (k, d) in piece.chunks_mut(block.max(1)).enumerate() {
                    p.divisors(&x[(first + k) * block..][..block], d, c, s);
                }
            },
        )
    });
    // dx carries d^−beta until the last sweep.
    let d = &*d;
    rows(dx, 1, GRAIN, |start, dx| {
        vectorize(
            #[inline(always)]
            || {
                for (y, &d) in dx.iter_mut().zip(&d[start..]) {
                    *y = d.m_pow(beta);
                }
            },
        )
    });
    let power = &*dx;
    rows(terms, 1, GRAIN, |start, terms| {
        vectorize(
            #[inline(always)]
            || {
                for (k, t) in terms.iter_mut().enumerate() {
                    let i = start + k;
                    *t = dy[i] * x[i] * power[i] / d[i];
                }
            },
        )
    });
    let terms = &*terms;
    rows(dx, s, GRAIN, |first, piece| {
        vectorize(
            #[inline(always)]
            || {
                for (k, dx) in piece.chunks_mut(s.max(1)).enumerate() {
                    let row = first + k;
                    let (n, channel, at) = (row / c, row % c, row * s);
                    dx.iter_mut().zip(&dy[at..]).for_each(|(d, &dy)| *d *= dy);
                    for j in p.seen_by(channel, c) {
                        let terms = &terms[(n * c + j) * s..][..s];
                        for ((d, &x), &t) in dx.iter_mut().zip(&x[at..]).zip(terms) {
                            *d -= factor * x * t;
                        }
                    }
                }
            },
        )
    });
}
