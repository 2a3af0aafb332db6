//! Pooling over one to three spatial dimensions: rows of outputs at a time, one tap after the other.

pub mod last;

use rayon::prelude::*;

use crate::kernels::isa::vectorize;
use crate::kernels::math::Math;
use crate::kernels::par;
use crate::tensor::{Elem, Float};

/// Sizes of a pooling; fewer than three spatial dimensions are preceded by ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Input, output and kernel extents.
    pub x: [usize; 3],
    pub y: [usize; 3],
    pub k: [usize; 3],
    pub stride: [usize; 3],
    pub dilation: [usize; 3],
    pub pad: [usize; 3],
    pub pad_end: [usize; 3],
}

/// One tap of one row of outputs: elements `from..to` of the output row `y` read the input's `x`, `x + step`, ….
struct Tap {
    y: usize,
    from: usize,
    to: usize,
    x: usize,
}

impl Geometry {
    fn planes(&self) -> [usize; 2] {
        [self.x.iter().product(), self.y.iter().product()]
    }

    fn taps(&self) -> usize {
        self.k.iter().product()
    }

    /// The input coordinate that tap `k` of output `y` reads in dimension `d`.
    #[inline(always)]
    fn at(&self, d: usize, y: usize, k: usize) -> Option<usize> {
        let at = (y * self.stride[d] + k * self.dilation[d]).wrapping_sub(self.pad[d]);
        (at < self.x[d]).then_some(at)
    }

    /// Calls `f` for all taps of all rows that lie inside the input, row by row, taps in row-major order.
    #[inline(always)]
    fn each(&self, mut f: impl FnMut(Tap)) {
        let (s, w) = (self.stride[2], self.y[2]);
        for (a, b) in (0..self.y[0]).flat_map(|a| (0..self.y[1]).map(move |b| (a, b))) {
            for i in 0..self.k[0] {
                let Some(xa) = self.at(0, a, i) else { continue };
                for j in 0..self.k[1] {
                    let Some(xb) = self.at(1, b, j) else { continue };
                    for l in 0..self.k[2] {
                        let offset = (l * self.dilation[2]) as isize - self.pad[2] as isize;
                        let from = ((-offset).max(0) as usize).div_ceil(s).min(w);
                        let to = ((self.x[2] as isize - offset).max(0) as usize).div_ceil(s).clamp(from, w);
                        if from < to {
                            let x =
                                (xa * self.x[1] + xb) * self.x[2] + ((from * s) as isize + offset) as usize;
                            f(Tap { y: (a * self.y[1] + b) * w, from, to, x });
                        }
                    }
                }
            }
        }
    }

    /// How many taps of output `y` count in dimension `d`: those inside the input, or the padded input.
    fn count(&self, d: usize, y: usize, include_pad: bool) -> usize {
        (0..self.k[d])
            .filter(|&k| match include_pad {
                true => y * self.stride[d] + k * self.dilation[d] < self.x[d] + self.pad[d] + self.pad_end[d],
                false => self.at(d, y, k).is_some(),
            })
            .count()
    }

    /// Multiplies rows of outputs by the reciprocal of the elements that entered each.
    fn divide<T: Float>(&self, include_pad: bool, y: &mut [T]) {
        let w = self.y[2];
        for (i, row) in y.chunks_exact_mut(w).enumerate() {
            let outer = self.count(0, i / self.y[1], include_pad) * self.count(1, i % self.y[1], include_pad);
            for (c, y) in row.iter_mut().enumerate() {
                let count = outer * self.count(2, c, include_pad);
                *y /= T::of(count.max(1) as f64);
            }
        }
    }
}

/// Planes a task.
fn grain(plane: usize, taps: usize) -> usize {
    (par::GRAIN / (plane * taps.div_ceil(4)).max(1)).max(1) * plane
}

/// An element that a maximum can be taken of.
pub trait Ordered: Elem {
    const LOWEST: Self;
}
macro_rules! ordered {
    ($($t:ty: $low:expr),*) => { $(impl Ordered for $t { const LOWEST: Self = $low; })* };
}
ordered!(f32: f32::NEG_INFINITY, f64: f64::NEG_INFINITY, i8: i8::MIN, u8: 0);

/// What stands for "no element": a window that lies in the padding.
pub const NOWHERE: u32 = u32::MAX;

/// The maximum of each window and, if wanted, where in the plane it first occurs. NaN wins.
pub fn max<T: Ordered>(g: &Geometry, x: &[T], y: &mut [T], argmax: Option<&mut [u32]>) {
    let [px, py] = g.planes();
    if y.is_empty() {
        return;
    }
    let task = grain(py, g.taps());
    let Some(argmax) = argmax else {
        par::chunks(y, task, |i, y| {
            vectorize(
                #[inline(always)]
                || {
                    for (j, y) in y.chunks_exact_mut(py).enumerate() {
                        max_plane(g, &x[(i * task / py + j) * px..][..px], y);
                    }
                },
            )
        });
        return;
    };
    y.par_chunks_mut(task).zip(argmax.par_chunks_mut(task)).enumerate().for_each(|(i, (y, arg))| {
        vectorize(
            #[inline(always)]
            || {
                for (j, (y, arg)) in y.chunks_exact_mut(py).zip(arg.chunks_exact_mut(py)).enumerate() {
                    argmax_plane(g, &x[(i * task / py + j) * px..][..px], y, arg);
                }
            },
        )
    });
}

/// `f(output, input)` along a tap.
#[inline(always)]
fn along<T: Copy, Y>(s: usize, x: &[T], y: &mut [Y], f: impl Fn(&mut Y, T)) {
    match s {
        1 => y.iter_mut().zip(x).for_each(|(y, x)| f(y, *x)),
        2 => y.iter_mut().zip(x.iter().step_by(2)).for_each(|(y, x)| f(y, *x)),
        _ => y.iter_mut().zip(x.iter().step_by(s)).for_each(|(y, x)| f(y, *x)),
    }
}

#[inline(always)]
#[allow(clippy::eq_op)]
fn beats<T: PartialOrd + Copy>(x: T, y: T) -> bool {
    // (Both compared, so that loops over it are of vectors.)
    (x > y) | (x != x)
}

#[inline(always)]
fn max_plane<T: Ordered>(g: &Geometry, x: &[T], y: &mut [T]) {
    y.fill(T::LOWEST);
    g.each(|t| {
        let y = &mut y[t.y + t.from..t.y + t.to];
        along(g.stride[2], &x[t.x..], y, |y, x| *y = if beats(x, *y) { x } else { *y });
    });
}

#[inline(always)]
fn argmax_plane<T: Ordered>(g: &Geometry, x: &[T], y: &mut [T], arg: &mut [u32]) {
    y.fill(T::LOWEST);
    arg.fill(NOWHERE);
    let s = g.stride[2];
    g.each(|t| {
        let (y, arg) = (&mut y[t.y + t.from..t.y + t.to], &mut arg[t.y + t.from..t.y + t.to]);
        let x = &x[t.x..];
        for (i, (y, arg)) in y.iter_mut().zip(arg).enumerate() {
            let x = x[i * s];
            // A window of nothing but the lowest value has a maximum too: its first element.
            let take = beats(x, *y) || *arg == NOWHERE;
            *y = if take { x } else { *y };
            *arg = if take { (t.x + i * s) as u32 } else { *arg };
        }
    });
}

/// `dx[argmax[i]] += dy[i]`, plane by plane.
pub fn max_grad<T: Float>(g: &Geometry, dy: &[T], argmax: &[u32], dx: &mut [T]) {
    let [px, py] = g.planes();
    if px == 0 {
        return;
    }
    let task = grain(px, 1);
    par::chunks(dx, task, |i, dx| {
        dx.fill(T::zero());
        for (j, dx) in dx.chunks_exact_mut(px).enumerate() {
            let from = (i * task / px + j) * py;
            for (d, at) in dy[from..from + py].iter().zip(&argmax[from..from + py]) {
                if let Some(dx) = dx.get_mut(*at as usize) {
                    *dx += *d;
                }
            }
        }
    });
}

/// The mean of each window, over the elements inside the input or also its padding.
pub fn average<T: Float>(g: &Geometry, include_pad: bool, x: &[T], y: &mut [T]) {
    let [px, py] = g.planes();
    if y.is_empty() {
        return;
    }
    let task = grain(py, g.taps());
    par::chunks(y, task, |i, y| {
        y.fill(T::zero());
        vectorize(
            #[inline(always)]
            || {
                for (j, y) in y.chunks_exact_mut(py).enumerate() {
                    let x = &x[(i * task / py + j) * px..][..px];
                    g.each(|t| {
                        along(g.stride[2], &x[t.x..], &mut y[t.y + t.from..t.y + t.to], |y, x| *y += x)
                    });
                }
            },
        );
        y.chunks_exact_mut(py).for_each(|y| g.divide(include_pad, y));
    });
}

/// The gradient of [`average`]. `scratch`: as large as one plane of `dy` for each plane.
pub fn average_grad<T: Float>(g: &Geometry, include_pad: bool, dy: &[T], dx: &mut [T], scratch: &mut [T]) {
    let [px, py] = g.planes();
    if dx.is_empty() {
        return;
    }
    let planes = dx.len() / px;
    let task = grain(px, g.taps()) / px;
    let scratch = &mut scratch[..planes * py];
    dx.par_chunks_mut(task * px).zip(scratch.par_chunks_mut((task * py).max(1))).enumerate().for_each(
        |(i, (dx, shares))| {
            dx.fill(T::zero());
            shares.copy_from_slice(&dy[i * task * py..][..shares.len()]);
            shares.chunks_exact_mut(py).for_each(|d| g.divide(include_pad, d));
            vectorize(
                #[inline(always)]
                || {
                    for (dx, dy) in dx.chunks_exact_mut(px).zip(shares.chunks_exact(py)) {
                        g.each(|t| add_along(g.stride[2], &mut dx[t.x..], &dy[t.y + t.from..t.y + t.to]));
                    }
                },
            );
        },
    );
}

#[inline(always)]
fn add_along<T: Float>(s: usize, x: &mut [T], y: &[T]) {
    match s {
        1 => x.iter_mut().zip(y).for_each(|(x, y)| *x += *y),
        _ => x.iter_mut().step_by(s).zip(y).for_each(|(x, y)| *x += *y),
    }
}

/// `|x|^p`.
#[inline(always)]
fn power<T: Float + Math>(x: T, p: i32) -> T {
    match p {
        0 => T::one(),
        1 => x.abs(),
        2 => x * x,
        3 => x.abs() * x * x,
        _ => x.abs().m_pow(T::of(p as f64)),
    }
}

/// `(Σ |x|^p)^(1/p)` of each window.
pub fn lp<T: Float + Math>(g: &Geometry, p: i32, x: &[T], y: &mut [T]) {
    let [px, py] = g.planes();
    if y.is_empty() {
        return;
    }
    let task = grain(py, g.taps());
    par::chunks(y, task, |i, y| {
        y.fill(T::zero());
        for (j, y) in y.chunks_exact_mut(py).enumerate() {
            let x = &x[(i * task / py + j) * px..][..px];
            g.each(|t| {
                let y = &mut y[t.y + t.from..t.y + t.to];
                along(g.stride[2], &x[t.x..], y, |y, x| *y += power(x, p));
            });
            y.iter_mut().for_each(|y| {
                *y = match p {
                    1 => *y,
                    2 => y.sqrt(),
                    _ => y.m_pow(T::of(1.0 / p as f64)),
                }
            });
        }
    });
}

/// The gradient of [`lp`]: `dx += sign(x) (|x| / y)^(p-1) dy`, 0 where `y` is 0.
pub fn lp_grad<T: Float + Math>(g: &Geometry, p: i32, dy: &[T], x: &[T], y: &[T], dx: &mut [T]) {
    let [px, py] = g.planes();
    if dx.is_empty() {
        return;
    }
    let (task, s) = (grain(px, g.taps()), g.stride[2]);
    par::chunks(dx, task, |i, dx| {
        dx.fill(T::zero());
        for (j, dx) in dx.chunks_exact_mut(px).enumerate() {
            let plane = i * task / px + j;
            let (x, y, dy) = (&x[plane * px..][..px], &y[plane * py..][..py], &dy[plane * py..][..py]);
            g.each(|t| {
                for i in t.from..t.to {
                    let (at, y, dy) = (t.x + (i - t.from) * s, y[t.y + i], dy[t.y + i]);
                    if y != T::zero() && x[at] != T::zero() {
                        dx[at] += x[at].signum() * power(x[at] / y, p - 1) * dy;
                    }
                }
            });
        }
    });
}

/// The mean of each run of `plane` elements, summed in f64.
pub fn mean_of_planes<T: Float>(plane: usize, x: &[T], y: &mut [T]) {
    let task = (par::GRAIN / plane.max(1)).max(1);
    par::chunks(y, task, |i, y| {
        vectorize(
            #[inline(always)]
            || {
                for (j, y) in y.iter_mut().enumerate() {
                    let x = &x[(i * task + j) * plane..][..plane];
                    *y = T::of(sum(x) / plane as f64);
                }
            },
        )
    });
}

/// In lanes of the element type, which are added up in f64 every 64 rounds.
#[inline(always)]
pub fn sum<T: Float>(x: &[T]) -> f64 {
    const LANES: usize = 16;
    let mut total = 0.0;
    for x in x.chunks(64 * LANES) {
        let mut lanes = [T::zero(); LANES];
        let rounds = x.chunks_exact(LANES);
        for (l, x) in lanes.iter_mut().zip(rounds.remainder()) {
            *l += *x;
        }
        for x in rounds {
            for (l, x) in lanes.iter_mut().zip(x) {
                *l += *x;
            }
        }
        total += lanes.iter().map(|l| l.to64()).sum::<f64>();
    }
    total
}

/// Each element of `dy`, times `scale`, over its plane.
pub fn spread<T: Float>(plane: usize, scale: T, dy: &[T], dx: &mut [T]) {
    par::rows(dx, plane, par::GRAIN, |first, dx| {
        for (dx, d) in dx.chunks_exact_mut(plane.max(1)).zip(&dy[first..]) {
            dx.fill(*d * scale);
        }
    });
}
