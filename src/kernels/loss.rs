//! Losses: sums in `f64` over a tree that depends on the problem alone.

use crate::kernels::isa::vectorize;
use crate::kernels::math::Math;
use crate::kernels::norm::{sum, sum2};
use crate::kernels::par::{GRAIN, reduce, rows};
use crate::kernels::softmax::{WIDTH, log_sum, log_sum_columns};
use crate::tensor::Float;

/// Scores of `c` classes for `n` × `s` items, laid out (n, c, s).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Classes {
    pub n: usize,
    pub c: usize,
    pub s: usize,
}

/// Class labels as the file gives them.
#[derive(Debug, Clone, Copy)]
pub enum Labels<'a> {
    I32(&'a [i32]),
    I64(&'a [i64]),
}

impl Labels<'_> {
    pub fn len(&self) -> usize {
        match self {
            Labels::I32(t) => t.len(),
            Labels::I64(t) => t.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    #[inline(always)]
    pub fn at(&self, i: usize) -> i64 {
        match self {
            Labels::I32(t) => t[i] as i64,
            Labels::I64(t) => t[i],
        }
    }
}

/// Cross-entropy with integer labels, checked by [`Hard::bad`] before use.
#[derive(Debug, Clone, Copy)]
pub struct Hard<'a, T> {
    pub labels: Labels<'a>,
    /// One a class.
    pub weights: Option<&'a [T]>,
    pub ignore: Option<i64>,
    pub smoothing: f64,
    /// The scores are logarithms of probabilities already.
    pub logged: bool,
}

/// What [`each_item`] hands over of one sample: its scores, its items `start..start + width`, and for each the
/// largest score and the sum of exponentials.
struct Items<'a, T> {
    start: usize,
    width: usize,
    top: &'a [T; WIDTH],
    total: &'a [f64; WIDTH],
}

#[inline(always)]
fn each_item<T: Math>(x: &[T], d: Classes, logged: bool, mut f: impl FnMut(Items<T>)) {
    for start in (0..d.s).step_by(WIDTH) {
        let width = WIDTH.min(d.s - start);
        let (mut top, mut total) = ([T::zero(); WIDTH], [1.0; WIDTH]);
        if !logged && d.s == 1 {
            (top[0], total[0]) = log_sum(x);
        } else if !logged {
            (top, total) = log_sum_columns(&x[start..], d.c, d.s, width);
        }
        f(Items { start, width, top: &top, total: &total });
    }
}

impl<T: Math> Hard<'_, T> {
    /// The first label that is no class and not ignored.
    pub fn bad(&self, classes: usize) -> Option<usize> {
        (0..self.labels.len()).find(|&i| {
            let t = self.labels.at(i);
            Some(t) != self.ignore && !(0..classes as i64).contains(&t)
        })
    }

    /// The weight of item `i`; 0 where it is ignored.
    #[inline(always)]
    fn weight(&self, i: usize) -> f64 {
        match self.labels.at(i) {
            t if Some(t) == self.ignore => 0.0,
            t => self.weights.map_or(1.0, |w| w[t as usize].to64()),
        }
    }

    /// `Σ weight` over all items.
    pub fn total_weight(&self) -> f64 {
        match (self.weights, self.ignore) {
            (None, None) => self.labels.len() as f64,
            _ => (0..self.labels.len()).map(|i| self.weight(i)).sum(),
        }
    }

    /// Loss of each item of sample `n`: `weight·(ln Σ exp x − Σ q·x)`, q the smoothed label.
    #[inline(always)]
    fn sample(&self, x: &[T], d: Classes, n: usize, mut f: impl FnMut(usize, f64)) {
        let x = &x[n * d.c * d.s..][..d.c * d.s];
        each_item(
            x,
            d,
            self.logged,
            #[inline(always)]
            |items| {
                for j in 0..items.width {
                    let at = items.start + j;
                    let i = n * d.s + at;
                    let weight = self.weight(i);
                    if weight == 0.0 {
                        f(at, 0.0);
                        continue;
                    }
                    let label = self.labels.at(i) as usize;
                    let mut aim = x[label * d.s + at].to64();
                    if self.smoothing > 0.0 {
                        let mean = match d.s {
                            1 => sum(x, |x| x),
                            _ => (0..d.c).map(|c| x[c * d.s + at].to64()).sum::<f64>(),
                        } / d.c as f64;
                        aim += self.smoothing * (mean - aim);
                    }
                    f(at, weight * (items.top[j].to64() - aim + items.total[j].m_ln()));
                }
            },
        );
    }

    /// Sum of all items' losses.
    pub fn loss(&self, x: &[T], d: Classes) -> f64 {
        let leaf = |r: std::ops::Range<usize>| {
            vectorize(
                #[inline(always)]
                || {
                    let mut total = 0.0;
                    for n in r {
                        self.sample(x, d, n, |_, loss| total += loss);
                    }
                    total
                },
            )
        };
        reduce(0..d.n, GRAIN / (d.c * d.s).max(1), &leaf, &|a, b| a + b)
    }

    /// Each item's loss (n, s).
    pub fn losses(&self, x: &[T], d: Classes, y: &mut [T]) {
        rows(y, d.s, GRAIN / d.c.max(1), |first, piece| {
            for (k, y) in piece.chunks_mut(d.s.max(1)).enumerate() {
                self.sample(x, d, first + k, |at, loss| y[at] = T::of(loss));
            }
        });
    }

    /// `dx = weight·(softmax − q)·factor(item)`; `dx` holds the scores where `x` is `None`.
    pub fn grad(&self, x: Option<&[T]>, d: Classes, dx: &mut [T], factor: impl Fn(usize) -> f64 + Sync) {
        let block = d.c * d.s;
        let (spread, peak) = (self.smoothing / d.c.max(1) as f64, 1.0 - self.smoothing);
        rows(dx, block, GRAIN, |first, piece| {
            vectorize(
                #[inline(always)]
                || {
                    for (k, dx) in piece.chunks_mut(block.max(1)).enumerate() {
                        let n = first + k;
                        if let Some(x) = x {
                            dx.copy_from_slice(&x[n * block..][..block]);
                        }
                        for start in (0..d.s).step_by(WIDTH) {
                            let width = WIDTH.min(d.s - start);
                            let (mut top, mut total) = ([T::zero(); WIDTH], [1.0; WIDTH]);
                            if !self.logged && d.s == 1 {
                                (top[0], total[0]) = log_sum(dx);
                            } else if !self.logged {
                                (top, total) = log_sum_columns(&dx[start..], d.c, d.s, width);
                            }
                            let (mut a, mut b, mut hit) =
                                ([T::zero(); WIDTH], [T::zero(); WIDTH], [0.0; WIDTH]);
                            for j in 0..width {
                                let i = n * d.s + start + j;
                                let weight = self.weight(i);
                                // An ignored item's factor may be 0/0 and must not matter.
                                let scale = if weight == 0.0 { 0.0 } else { weight * factor(i) };
                                a[j] = if self.logged { T::zero() } else { T::of(scale / total[j]) };
                                b[j] = T::of(-scale * spread);
                                hit[j] = scale * peak;
                            }
                            if d.s == 1 {
                                let (a, b, m) = (a[0], b[0], top[0]);
                                probabilities(dx, self.logged, |x| a * (x - m).m_weight() + b);
                            } else {
                                for c in 0..d.c {
                                    let row = &mut dx[c * d.s + start..][..width];
                                    for (j, x) in row.iter_mut().enumerate() {
                                        let p =
                                            if self.logged { T::zero() } else { (*x - top[j]).m_weight() };
                                        *x = a[j] * p + b[j];
                                    }
                                }
                            }
                            for (j, hit) in hit.iter().take(width).enumerate() {
                                let i = n * d.s + start + j;
                                if self.weight(i) == 0.0 {
                                    (0..d.c).for_each(|c| dx[c * d.s + start + j] = T::zero());
                                } else {
                                    let at = self.labels.at(i) as usize * d.s + start + j;
                                    dx[at] -= T::of(*hit);
                                }
                            }
                        }
                    }
                },
            )
        });
    }
}

#[inline(always)]
fn probabilities<T: Float>(x: &mut [T], logged: bool, f: impl Fn(T) -> T) {
    match logged {
        true => x.fill(T::zero()),
        false => x.iter_mut().for_each(|x| *x = f(*x)),
    }
}

/// Cross-entropy against probabilities `q` of the scores' shape, summed over items: `Σ q'·(ln Σ exp x − x)`,
/// `q' = (1 − ε)·q + ε/c`.
pub fn soft_loss<T: Math>(x: &[T], q: &[T], d: Classes, smoothing: f64) -> f64 {
    let block = d.c * d.s;
    let leaf = |r: std::ops::Range<usize>| {
        vectorize(
            #[inline(always)]
            || {
                let mut loss = 0.0;
                for n in r {
                    let (x, q) = (&x[n * block..][..block], &q[n * block..][..block]);
                    each_item(
                        x,
                        d,
                        false,
                        #[inline(always)]
                        |items| {
                            for j in 0..items.width {
                                let at = items.start + j;
                                // Distances from the top keep the products small.
                                let m = items.top[j];
                                let (mut mass, mut aim, mut mean) = (0.0, 0.0, 0.0);
                                if d.s == 1 {
                                    mass = sum(q, |q| q);
                                    aim = sum2(q, x, |q, x| q * (x - m));
                                    mean = sum(x, |x| x - m);
                                } else {
                                    for c in 0..d.c {
                                        let (x, q) = (x[c * d.s + at] - m, q[c * d.s + at].to64());
                                        (mass, aim, mean) = (mass + q, aim + q * x.to64(), mean + x.to64());
                                    }
                                }
                                mass += smoothing * (1.0 - mass);
                                aim = (1.0 - smoothing) * aim + smoothing * mean / d.c as f64;
                                loss += mass * items.total[j].m_ln() - aim;
                            }
                        },
                    );
                }
                loss
            },
        )
    };
    reduce(0..d.n, GRAIN / block.max(1), &leaf, &|a, b| a + b)
}

/// `dx = (softmax·Σq' − q')·factor`; `dx` holds the scores where `x` is `None`.
pub fn soft_grad<T: Math>(x: Option<&[T]>, q: &[T], d: Classes, smoothing: f64, dx: &mut [T], factor: f64) {
    let block = d.c * d.s;
    let spread = T::of(smoothing / d.c.max(1) as f64 * factor);
    let keep = T::of((1.0 - smoothing) * factor);
    rows(dx, block, GRAIN, |first, piece| {
        for (k, dx) in piece.chunks_mut(block.max(1)).enumerate() {
            let n = first + k;
            let q = &q[n * block..][..block];
            if let Some(x) = x {
                dx.copy_from_slice(&x[n * block..][..block]);
            }
            for start in (0..d.s).step_by(WIDTH) {
                let width = WIDTH.min(d.s - start);
                let (top, total) = log_sum_columns(&dx[start..], d.c, d.s, width);
                let mut mass = [0.0; WIDTH];
                for c in 0..d.c {
                    let row = &q[c * d.s + start..][..width];
                    mass.iter_mut().zip(row).for_each(|(m, q)| *m += q.to64());
                }
                for c in 0..d.c {
                    let at = c * d.s + start;
                    for j in 0..width {
                        let mass = mass[j] + smoothing * (1.0 - mass[j]);
                        let a = T::of(mass * factor / total[j]);
                        dx[at + j] = a * (dx[at + j] - top[j]).m_weight() - keep * q[at + j] - spread;
                    }
                }
            }
        }
    });
}

/// `Σ max(x, 0) − x·t + ln(1 + exp(−|x|))`, `t(i)` the target of element `i`.
pub fn bce<T: Math>(x: &[T], t: impl Fn(usize) -> T + Sync) -> f64 {
    let leaf = |r: std::ops::Range<usize>| {
        vectorize(
            #[inline(always)]
            || {
                let mut acc = [0.0f64; 16];
                for (k, &x) in x[r.clone()].iter().enumerate() {
                    let t = t(r.start + k);
                    let positive = if x < T::zero() { T::zero() } else { x };
                    acc[k % 16] += (positive - x * t + (-x.abs()).m_exp().m_ln1p()).to64();
                }
                acc.iter().sum::<f64>()
            },
        )
    };
    reduce(0..x.len(), GRAIN, &leaf, &|a, b| a + b)
}

/// `dx = (sigmoid(x) − t)·factor`; `dx` holds `x` where that is `None`.
pub fn bce_grad<T: Math>(x: Option<&[T]>, t: impl Fn(usize) -> T + Sync, factor: f64, dx: &mut [T]) {
    let factor = T::of(factor);
    rows(dx, 1, GRAIN, |start, dx| {
        vectorize(
            #[inline(always)]
            || {
                if let Some(x) = x {
                    dx.copy_from_slice(&x[start..][..dx.len()]);
                }
                for (k, x) in dx.iter_mut().enumerate() {
                    *x = (x.m_sigmoid() - t(start + k)) * factor;
                }
            },
        )
    });
}

/// `Σ (a − b)²`.
pub fn squared_error<T: Float>(a: &[T], b: &[T]) -> f64 {
    let leaf = |r: std::ops::Range<usize>| {
        vectorize(
            #[inline(always)]
            || {
                let (a, b) = (&a[r.clone()], &b[r]);
                let mut acc = [0.0f64; 16];
                let ((ac, at), (bc, bt)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
                for (a, b) in ac.iter().zip(bc) {
                    for ((s, &a), &b) in acc.iter_mut().zip(a).zip(b) {
                        let d = (a - b).to64();
                        *s += d * d;
                    }
                }
                for ((s, &a), &b) in acc.iter_mut().zip(at).zip(bt) {
                    let d = (a - b).to64();
                    *s += d * d;
                }
                acc.iter().sum::<f64>()
            },
        )
    };
    reduce(0..a.len(), GRAIN, &leaf, &|a, b| a + b)
}

/// `da = (a − b)·factor`; the one of `a`, `b` that is `None` lies in `da`.
pub fn squared_error_grad<T: Float>(a: Option<&[T]>, b: Option<&[T]>, factor: f64, da: &mut [T]) {
    let f = T::of(factor);
    rows(da, 1, GRAIN, |start, da| {
        let (a, b) = (a.map(|a| &a[start..][..da.len()]), b.map(|b| &b[start..][..da.len()]));
        vectorize(
            #[inline(always)]
            || match (a, b) {
                (Some(a), Some(b)) => {
                    da.iter_mut().zip(a).zip(b).for_each(|((d, &a), &b)| *d = (a - b) * f);
                }
                (None, Some(b)) => da.iter_mut().zip(b).for_each(|(d, &b)| *d = (*d - b) * f),
                (Some(a), None) => da.iter_mut().zip(a).for_each(|(d, &a)| *d = (a - *d) * f),
                (None, None) => {}
            },
        )
    });
}
