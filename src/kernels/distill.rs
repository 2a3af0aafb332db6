//! What self-distillation does to perturbed samples, each a row of elements.

use std::f64::consts::PI;

use crate::kernels::math::Math;
use crate::kernels::par::{GRAIN, rows};
use crate::kernels::random::Stream;
use crate::tensor::Float;

/// `x = clean + clamp(x − clean, ±radius)`.
pub fn to_box<T: Float>(x: &mut [T], clean: &[T], radius: f64) {
    let radius = T::of(radius);
    rows(x, 1, GRAIN, |start, x| {
        for (x, c) in x.iter_mut().zip(&clean[start..]) {
            let d = *x - *c;
            *x = *c + d.max(-radius).min(radius);
        }
    });
}

/// `x = clean + (x − clean)·min(1, radius/‖x − clean‖)`, row by row.
pub fn to_ball<T: Float>(x: &mut [T], clean: &[T], row: usize, radius: f64) {
    rows(x, row, GRAIN, |first, piece| {
        for (k, x) in piece.chunks_mut(row).enumerate() {
            let clean = &clean[(first + k) * row..][..row];
            let norm = distance(x, clean);
            if norm > radius {
                let factor = T::of(radius / norm);
                x.iter_mut().zip(clean).for_each(|(x, c)| *x = *c + (*x - *c) * factor);
            }
        }
    });
}

pub fn clamp<T: Float>(x: &mut [T], low: f64, high: f64) {
    let (low, high) = (T::of(low), T::of(high));
    rows(x, 1, GRAIN, |_, x| x.iter_mut().for_each(|x| *x = x.max(low).min(high)));
}

/// `‖x − y‖`, summed in one order.
fn distance<T: Float>(x: &[T], y: &[T]) -> f64 {
    x.iter().zip(y).map(|(x, y)| (x.to64() - y.to64()).powi(2)).sum::<f64>().sqrt()
}

/// Replaces what `x` differs from `clean` by in each row by Gaussian noise of the same Euclidean norm. `angles` has
/// room for as many elements as `x`, `norms` for one a row.
pub fn noise<T: Math>(
    x: &mut [T],
    clean: &[T],
    row: usize,
    streams: [Stream; 2],
    angles: &mut [T],
    norms: &mut [T],
) {
    let moved = &*x;
    rows(norms, 1, (GRAIN / row.max(1)).max(1), |first, norms| {
        for (k, norm) in norms.iter_mut().enumerate() {
            let at = (first + k) * row;
            *norm = T::of(distance(&moved[at..at + row], &clean[at..at + row]));
        }
    });
    streams[0].uniform(x);
    streams[1].uniform(angles);
    rows(x, row, GRAIN, |first, piece| {
        for (k, x) in piece.chunks_mut(row).enumerate() {
            let at = (first + k) * row;
            // Box and Muller's transform; 1 − u is in (0, 1].
            for (z, a) in x.iter_mut().zip(&angles[at..]) {
                let radius = (-2.0 * (1.0 - z.to64()).m_ln()).sqrt();
                *z = T::of(radius * (2.0 * PI * a.to64()).m_cos());
            }
            let drawn = x.iter().map(|z| z.to64().powi(2)).sum::<f64>().sqrt();
            let factor = if drawn > 0.0 { T::of(norms[first + k].to64() / drawn) } else { T::zero() };
            x.iter_mut().zip(&clean[at..]).for_each(|(z, c)| *z = *c + *z * factor);
        }
    });
}
