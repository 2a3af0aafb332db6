//! Softmax and its logarithm over the middle of a tensor seen as outer × `len` × `inner`, with their gradients.
//!
//! Sums are carried in `f64`; the largest element is subtracted first, so nothing overflows.

use crate::kernels::isa::vectorize;
use crate::kernels::math::Math;
use crate::kernels::norm::{sum, sum2};
use crate::kernels::par::{GRAIN, rows};
use crate::tensor::Float;

/// Neighbours along `inner` that are swept together.
pub const WIDTH: usize = 32;

/// What is made of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Probabilities,
    /// Probabilities that only weigh the terms of a sum: see [`Math::m_weight`].
    Weights,
    Log,
}

/// The largest element; NaN is passed over.
#[inline(always)]
pub fn largest<T: Float>(x: &[T]) -> T {
    let mut acc = [T::neg_infinity(); 16];
    let (head, tail) = x.as_chunks::<16>();
    for chunk in head {
        for (a, &x) in acc.iter_mut().zip(chunk) {
            *a = if x > *a { x } else { *a };
        }
    }
    for (a, &x) in acc.iter_mut().zip(tail) {
        *a = if x > *a { x } else { *a };
    }
    acc.into_iter().fold(T::neg_infinity(), |m, x| if x > m { x } else { m })
}

/// Largest element and `Σ exp(x − largest)` of a contiguous row.
#[inline(always)]
pub fn log_sum<T: Math>(x: &[T]) -> (T, f64) {
    let m = largest(x);
    (m, sum(x, |x| (x - m).m_exp()))
}

/// As [`log_sum`] for `width` columns of a block: row `k` of `len` starts at `x[k·inner]`.
#[inline(always)]
pub fn log_sum_columns<T: Math>(
    x: &[T],
    len: usize,
    inner: usize,
    width: usize,
) -> ([T; WIDTH], [f64; WIDTH]) {
    let mut top = [T::neg_infinity(); WIDTH];
    for k in 0..len {
        for (m, &x) in top.iter_mut().zip(&x[k * inner..][..width]) {
            *m = if x > *m { x } else { *m };
        }
    }
    let mut total = [0.0; WIDTH];
    for k in 0..len {
        for ((t, &m), &x) in total.iter_mut().zip(&top).zip(&x[k * inner..][..width]) {
            *t += (x - m).m_exp().to64();
        }
    }
    (top, total)
}

/// Softmax or its logarithm; `y` holds `x` where that is `None`.
pub fn softmax<T: Math>(x: Option<&[T]>, y: &mut [T], len: usize, inner: usize, form: Form) {
    let block = len * inner;
    rows(y, block, GRAIN, |first, piece| {
        vectorize(
            #[inline(always)]
            || {
                for (k, y) in piece.chunks_mut(block.max(1)).enumerate() {
                    if let Some(x) = x {
                        y.copy_from_slice(&x[(first + k) * block..][..block]);
                    }
                    if inner == 1 {
                        row(y, form);
                    } else {
                        columns(y, len, inner, form);
                    }
                }
            },
        )
    });
}

#[inline(always)]
fn row<T: Math>(y: &mut [T], form: Form) {
    let m = largest(y);
    match form {
        Form::Log => {
            let shift = T::of(sum(y, |y| (y - m).m_exp()).m_ln());
            return y.iter_mut().for_each(|y| *y = (*y - m) - shift);
        }
        Form::Probabilities => T::m_exps(y, m),
        Form::Weights => T::m_weights(y, m),
    }
    let factor = T::of(1.0 / sum(y, |y| y));
    y.iter_mut().for_each(|y| *y *= factor);
}

#[inline(always)]
fn columns<T: Math>(y: &mut [T], len: usize, inner: usize, form: Form) {
    for start in (0..inner).step_by(WIDTH) {
        let width = WIDTH.min(inner - start);
        let (top, total) = log_sum_columns(&y[start..], len, inner, width);
        let shift = total.map(|t| T::of(t.m_ln()));
        let factor = total.map(|t| T::of(1.0 / t));
        for k in 0..len {
            let row = &mut y[start + k * inner..][..width];
            let scaled = row.iter_mut().zip(top).zip(factor);
            match form {
                Form::Log => row.iter_mut().zip(top).zip(shift).for_each(|((y, m), s)| *y = (*y - m) - s),
                Form::Probabilities => scaled.for_each(|((y, m), f)| *y = (*y - m).m_exp() * f),
                Form::Weights => scaled.for_each(|((y, m), f)| *y = (*y - m).m_weight() * f),
            }
        }
    }
}

/// Gradient from the output `y`: `dx = y·(dy − Σ dy·y)`, or of the logarithm `dx = dy − exp(y)·Σ dy`.
/// `dx` holds `dy` where that is `None`.
pub fn softmax_grad<T: Math>(y: &[T], dy: Option<&[T]>, dx: &mut [T], len: usize, inner: usize, log: bool) {
    let block = len * inner;
    rows(dx, block, GRAIN, |first, piece| {
        vectorize(
            #[inline(always)]
            || {
                for (k, dx) in piece.chunks_mut(block.max(1)).enumerate() {
                    let at = (first + k) * block;
                    let y = &y[at..at + block];
                    if let Some(dy) = dy {
                        dx.copy_from_slice(&dy[at..at + block]);
                    }
                    if inner == 1 {
                        let dot = T::of(if log { sum(dx, |d| d) } else { sum2(dx, y, |d, y| d * y) });
                        finish(y, dx, |_| dot, log);
                        continue;
                    }
                    for start in (0..inner).step_by(WIDTH) {
                        let width = WIDTH.min(inner - start);
                        let mut dots = [0.0f64; WIDTH];
                        for k in 0..len {
                            let at = start + k * inner;
                            let pairs = dx[at..at + width].iter().zip(&y[at..at + width]);
                            for (dot, (&d, &y)) in dots.iter_mut().zip(pairs) {
                                *dot += if log { d.to64() } else { (d * y).to64() };
                            }
                        }
                        let dots = dots.map(T::of);
                        for k in 0..len {
                            let at = start + k * inner;
                            finish(&y[at..at + width], &mut dx[at..at + width], |j| dots[j], log);
                        }
                    }
                }
            },
        )
    });
}

#[inline(always)]
fn finish<T: Math>(y: &[T], dx: &mut [T], dot: impl Fn(usize) -> T, log: bool) {
    let pairs = dx.iter_mut().zip(y).enumerate();
    match log {
        true => pairs.for_each(|(j, (d, &y))| *d -= y.m_exp() * dot(j)),
        false => pairs.for_each(|(j, (d, &y))| *d = y * (*d - dot(j))),
    }
}

/// 1 at the first largest element, 0 elsewhere.
pub fn hardmax<T: Float>(x: &[T], y: &mut [T], len: usize, inner: usize) {
    let block = len * inner;
    y.fill(T::zero());
    for (x, y) in x.chunks(block.max(1)).zip(y.chunks_mut(block.max(1))) {
        for j in 0..inner {
            let mut best = j;
            for k in 1..len {
                if x[k * inner + j] > x[best] {
                    best = k * inner + j;
                }
            }
            y[best] = T::one();
        }
    }
}
