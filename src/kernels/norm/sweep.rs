//! Batch normalisation: sweeps whose coefficients are per channel.
#![allow(unsafe_code)]

use super::channel::{Channels, Strip, WIDTH};
use super::{cut, rows};
use crate::kernels::elementwise::Clamp;
use crate::kernels::half::{Elements, Half};
use crate::kernels::par::{GRAIN, Shared};
use crate::tensor::Float;

/// What is added to a normalised value.
#[derive(Clone, Copy)]
pub enum Residual<'a, T> {
    None,
    Given(&'a [T]),
    /// It lies in the result's buffer.
    InResult,
}

/// `y[j] = f(j, a[j], b[j])`; what is `None` of `a`, `b` lies in `y`.
#[inline(always)]
pub(super) fn zip_each<T: Float>(
    a: Option<&[T]>,
    b: Option<&[T]>,
    y: &mut [T],
    f: impl Fn(usize, T, T) -> T,
) {
    let n = y.len();
    match (a.map(|a| &a[..n]), b.map(|b| &b[..n])) {
        (Some(a), Some(b)) => (0..n).for_each(|j| y[j] = f(j, a[j], b[j])),
        (Some(a), None) => (0..n).for_each(|j| y[j] = f(j, a[j], y[j])),
        (None, Some(b)) => (0..n).for_each(|j| y[j] = f(j, y[j], b[j])),
        (None, None) => (0..n).for_each(|j| y[j] = f(j, y[j], y[j])),
    }
}

/// [`zip_each`] with elements of `a`, from `start` on, which may be of half precision where there are no more of `y` than
/// have room in `near`.
#[inline(always)]
fn zip_near<T: Float>(
    a: Option<Elements<T>>,
    start: usize,
    near: &mut [T; WIDTH],
    b: Option<&[T]>,
    y: &mut [T],
    f: impl Fn(usize, T, T) -> T,
) {
    let a = a.map(|a| a.near(start, y.len(), near));
    zip_each(a, b, y, f);
}

/// Calls `f(element, piece of y, coefficients, room)` for pieces of `y` in parallel; the coefficients are those of the
/// piece's elements where channels lie side by side, else (`Err`) of the one channel it belongs to. In the former case
/// a piece has at most as many elements as the room.
#[inline(always)]
pub(super) fn sweep<T: Float, const K: usize>(
    y: &mut [T],
    d: Channels,
    coefficients: [&[T]; K],
    f: impl Fn(usize, &mut [T], Result<[&[T]; K], [T; K]>, &mut [T; WIDTH]) + Send + Sync,
) {
    if d.s != 1 {
        return rows(
            y,
            d.s,
            GRAIN,
            #[inline(always)]
            |row, piece| {
                let mut near = [T::zero(); WIDTH];
                for (k, y) in piece.chunks_mut(d.s.max(1)).enumerate() {
                    f((row + k) * d.s, y, Err(coefficients.map(|v| v[(row + k) % d.c])), &mut near);
                }
            },
        );
    }
    rows(
        y,
        d.c,
        GRAIN,
        #[inline(always)]
        |row, piece| {
            let (mut lanes, mut near) = ([[T::zero(); WIDTH]; K], [T::zero(); WIDTH]);
            let mut all = Strip::all(d.c);
            let (mut width, mut coefficients) = (d.c.max(1), coefficients);
            if let (Some(strip), None) = (all.next(), all.next())
                && strip.width > strip.columns
            {
                lanes.iter_mut().zip(coefficients).for_each(|(lanes, values)| strip.spread(values, lanes));
                for (c, lanes) in coefficients.iter_mut().zip(&lanes) {
                    *c = lanes;
                }
                width = strip.width;
            }
            for (k, y) in piece.chunks_mut(width).enumerate() {
                let start = row * d.c + k * width;
                for (i, y) in y.chunks_mut(WIDTH).enumerate() {
                    let of = coefficients.map(|v| &v[i * WIDTH..][..y.len()]);
                    f(start + i * WIDTH, y, Ok(of), &mut near);
                }
            }
        },
    );
}

/// `y = clamp((x − mean)·factor + shift + residual)` per channel; `y` holds `x` where that is `None`; `x` may be of half precision
/// where `s` is 1. All of `y` is also put in `rounded`, if that is there.
#[allow(clippy::too_many_arguments)]
pub fn channel_affine<T: Float>(
    x: Option<Elements<T>>,
    y: &mut [T],
    d: Channels,
    mean: &[T],
    factor: &[T],
    shift: &[T],
    residual: Residual<T>,
    clamp: Clamp<T>,
    rounded: Option<(Half, &mut [u16])>,
) {
    assert!(rounded.as_ref().is_none_or(|r| r.1.len() == y.len()), "rounded results");
    assert!(d.s == 1 || x.is_none_or(|x| x.is_whole()), "half precision with channels first");
    let rounded = rounded.map(|(half, to)| (half, Shared::new(to)));
    sweep(
        y,
        d,
        [mean, factor, shift],
        #[inline(always)]
        |start, y, c, near| {
            let x = x.map(|x| x.near(start, y.len(), near));
            let (r, add) = match residual {
                Residual::None => (None, false),
                Residual::Given(r) => (Some(&r[start..start + y.len()]), true),
                Residual::InResult => (None, true),
            };
            match (c, add) {
                (Ok([m, a, b]), true) => {
                    zip_each(x, r, y, |j, x, r| clamp.of((x - m[j]) * a[j] + b[j] + r));
                }
                (Ok([m, a, b]), false) => {
                    zip_each(x, None, y, |j, x, _| clamp.of((x - m[j]) * a[j] + b[j]));
                }
                (Err([m, a, b]), true) => zip_each(x, r, y, |_, x, r| clamp.of((x - m) * a + b + r)),
                (Err([m, a, b]), false) => zip_each(x, None, y, |_, x, _| clamp.of((x - m) * a + b)),
            }
            if let Some((half, to)) = &rounded {
                // SAFETY: as many elements as `y` has, and those of no two pieces are the same.
                half.round_near(y, unsafe { std::slice::from_raw_parts_mut(to.ptr().add(start), y.len()) });
            }
        },
    );
}

/// What the gradient of batch normalisation reads of each channel.
#[derive(Clone, Copy)]
pub struct ChannelGrad<'a, T> {
    pub scale: &'a [T],
    pub mean: &'a [T],
    pub inv: &'a [T],
    pub dscale: &'a [T],
    pub dshift: &'a [T],
    /// The shift, and the activation that let `dy` pass where the result is inside.
    pub passed: Option<(&'a [T], Clamp<T>)>,
}

impl<T: Float> ChannelGrad<'_, T> {
    /// `scale·inv`, `dshift/M` and `inv·dscale/M` of each channel, M elements a channel.
    pub fn coefficients(&self, count: usize, factor: &mut [T], k1: &mut [T], k2: &mut [T]) {
        let count = count.max(1) as f64;
        for c in 0..factor.len() {
            let inv = self.inv[c].to64();
            factor[c] = T::of(self.scale[c].to64() * inv);
            k1[c] = T::of(self.dshift[c].to64() / count);
            k2[c] = T::of(inv * self.dscale[c].to64() / count);
        }
    }
}

/// `dx = scale·inv·(dz − dshift/M − x̂·dscale/M)` with `x̂ = (x − mean)·inv`, M elements a channel.
/// At most one of `x`, `dy` is `None`: it lies in `dx`; `x` may be of half precision where `s` is 1. `room`: `3·c`
/// elements.
pub fn channel_input_grad<T: Float>(
    x: Option<Elements<T>>,
    dy: Option<&[T]>,
    dx: &mut [T],
    d: Channels,
    g: ChannelGrad<T>,
    room: &mut [T],
) {
    let (factor, rest) = room.split_at_mut(d.c);
    let (k1, k2) = rest.split_at_mut(d.c);
    g.coefficients(d.count(), factor, k1, &mut k2[..d.c]);
    let (m, a, k1, k2) = (g.mean, &*factor, &*k1, &k2[..d.c]);
    assert!(d.s == 1 || x.is_none_or(|x| x.is_whole()), "half precision with channels first");
    let Some((shift, clamp)) = g.passed else {
        return sweep(
            dx,
            d,
            [m, a, k1, k2],
            #[inline(always)]
            |start, dx, c, near| {
                let dy = cut(dy, start, dx.len());
                match c {
                    Ok([m, a, k1, k2]) => {
                        zip_near(x, start, near, dy, dx, |j, x, dy| a[j] * (dy - k1[j] - (x - m[j]) * k2[j]));
                    }
                    Err([m, a, k1, k2]) => {
                        zip_near(x, start, near, dy, dx, |_, x, dy| a * (dy - k1 - (x - m) * k2));
                    }
                }
            },
        );
    };
    sweep(
        dx,
        d,
        [m, a, shift, k1, k2],
        #[inline(always)]
        |start, dx, c, near| {
            let dy = cut(dy, start, dx.len());
            match c {
                Ok([m, a, b, k1, k2]) => zip_near(x, start, near, dy, dx, |j, x, dy| {
                    each(clamp, x, dy, [m[j], a[j], b[j], k1[j], k2[j]])
                }),
                Err(c) => zip_near(x, start, near, dy, dx, |_, x, dy| each(clamp, x, dy, c)),
            }
        },
    );
}

/// `dx` of one element whose result was `(x − m)·a + b`.
#[inline(always)]
fn each<T: Float>(clamp: Clamp<T>, x: T, dy: T, [m, a, b, k1, k2]: [T; 5]) -> T {
    let x = x - m;
    a * (clamp.pass(x * a + b, dy) - k1 - x * k2)
}
