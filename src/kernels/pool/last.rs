//! Pooling of (N, spatial…, C), all channels of a position at a time. Gradients are gathered: each input position
//! adds up the windows it lies in, so that every task writes memory of its own.

use rayon::prelude::*;
use smallvec::SmallVec;

use super::{Geometry, NOWHERE, Ordered, beats};
use crate::kernels::isa::vectorize;
use crate::kernels::par::{self, GRAIN};
use crate::tensor::Float;

/// Splits a plane's position into its coordinates.
#[inline(always)]
fn coordinates(position: usize, extents: [usize; 3]) -> [usize; 3] {
    let [_, h, w] = extents;
    [position / (h * w), position / w % h, position % w]
}

/// Calls `f` for the input positions in the window of output `o`, in row-major order.
#[inline(always)]
fn taps(g: &Geometry, o: [usize; 3], mut f: impl FnMut(usize)) {
    for i in 0..g.k[0] {
        let Some(a) = g.at(0, o[0], i) else { continue };
        for j in 0..g.k[1] {
            let Some(b) = g.at(1, o[1], j) else { continue };
            for l in 0..g.k[2] {
                let Some(c) = g.at(2, o[2], l) else { continue };
                f((a * g.x[1] + b) * g.x[2] + c);
            }
        }
    }
}

/// The outputs in dimension `d` whose windows hold input coordinate `i`.
#[inline(always)]
fn holders(g: &Geometry, d: usize, i: usize) -> impl Iterator<Item = usize> + use<> {
    let (s, dilation) = (g.stride[d], g.dilation[d]);
    let at = i + g.pad[d];
    let from = (at + 1).saturating_sub((g.k[d] - 1) * dilation + 1).div_ceil(s);
    let to = (at / s + 1).min(g.y[d]);
    (from..to).filter(move |o| dilation == 1 || (at - o * s).is_multiple_of(dilation))
}

/// Elements a task, where each costs some `taps`.
fn grain(taps: usize) -> usize {
    GRAIN / taps.div_ceil(4).max(1)
}

/// `f(image, position, row)` for the rows of `c` channels of a tensor of planes of `extents`.
fn each_row<T: Send>(
    y: &mut [T],
    c: usize,
    extents: [usize; 3],
    taps: usize,
    f: impl Fn(usize, [usize; 3], &mut [T]) + Sync + Send,
) {
    let plane: usize = extents.iter().product();
    par::rows(y, c, grain(taps), |first, piece| {
        for (r, row) in piece.chunks_exact_mut(c.max(1)).enumerate() {
            let at = first + r;
            f(at / plane, coordinates(at % plane, extents), row);
        }
    });
}

/// Channels whose maxima stay in registers while a window passes by.
const TOGETHER: usize = 8;

/// The maxima of `N` channels of a plane from channel `first` on, at some of its positions, and where they first occur.
#[inline(always)]
fn largest<T: Ordered, const N: usize>(
    x: &[T],
    c: usize,
    first: usize,
    window: &[usize],
) -> ([T; N], [u32; N]) {
    let (mut most, mut at) = ([T::LOWEST; N], [NOWHERE; N]);
    if let Some((&p, rest)) = window.split_first() {
        // A window of nothing but the lowest value has a maximum too: its first element.
        most.copy_from_slice(&x[p * c + first..][..N]);
        at.fill(p as u32);
        for &p in rest {
            let x = &x[p * c + first..][..N];
            for i in 0..N {
                let take = beats(x[i], most[i]);
                most[i] = if take { x[i] } else { most[i] };
                at[i] = if take { p as u32 } else { at[i] };
            }
        }
    }
    (most, at)
}

/// [`largest`] of all channels of a position's window.
#[inline(always)]
fn largest_of_all<T: Ordered>(x: &[T], window: &[usize], y: &mut [T], mut argmax: Option<&mut [u32]>) {
    let c = y.len();
    let mut first = 0;
    while first + TOGETHER <= c {
        let (most, at) = largest::<T, TOGETHER>(x, c, first, window);
        y[first..first + TOGETHER].copy_from_slice(&most);
        if let Some(argmax) = &mut argmax {
            argmax[first..first + TOGETHER].copy_from_slice(&at);
        }
        first += TOGETHER;
    }
    for first in first..c {
        let ([most], [at]) = largest::<T, 1>(x, c, first, window);
        y[first] = most;
        if let Some(argmax) = &mut argmax {
            argmax[first] = at;
        }
    }
}

/// The maximum of each window and, if wanted, where in the plane it first occurs. NaN wins.
pub fn max<T: Ordered>(g: &Geometry, c: usize, x: &[T], y: &mut [T], argmax: Option<&mut [u32]>) {
    let [px, py] = g.planes();
    if y.is_empty() {
        return;
    }
    // Of output `at`, counted through all images: its plane, and the positions of its window.
    let plane = |at: usize| &x[at / py * px * c..][..px * c];
    let window = |at: usize, window: &mut SmallVec<[usize; 64]>| {
        window.clear();
        taps(g, coordinates(at % py, g.y), |p| window.push(p));
    };
    let task = (grain(g.taps()) / c).max(1);
    let Some(argmax) = argmax else {
        return par::rows(y, c, grain(g.taps()), |first, y| {
            vectorize(
                #[inline(always)]
                || {
                    let mut positions = SmallVec::new();
                    for (r, y) in y.chunks_exact_mut(c).enumerate() {
                        window(first + r, &mut positions);
                        largest_of_all(plane(first + r), &positions, y, None);
                    }
                },
            )
        });
    };
    let pieces = y.par_chunks_mut(task * c).zip(argmax.par_chunks_mut(task * c));
    pieces.enumerate().for_each(|(i, (y, argmax))| {
        vectorize(
            #[inline(always)]
            || {
                let mut positions = SmallVec::new();
                for (r, (y, argmax)) in y.chunks_exact_mut(c).zip(argmax.chunks_exact_mut(c)).enumerate() {
                    let at = i * task + r;
                    window(at, &mut positions);
                    largest_of_all(plane(at), &positions, y, Some(argmax));
                }
            },
        )
    });
}

/// For each row `dx` of `c` channels of an input position, first zeros, calls `add(dx, output, position)` for the outputs whose
/// windows hold it, in row-major order; outputs are counted through all images, positions within a plane.
fn gather<T: Float>(
    g: &Geometry,
    c: usize,
    dx: &mut [T],
    add: impl Fn(&mut [T], usize, usize) + Sync + Send,
) {
    let [px, py] = g.planes();
    let [_, h, w] = g.x;
    par::rows(dx, c, grain(g.taps()), |first, piece| {
        vectorize(
            #[inline(always)]
            || {
                // Where the rows of outputs begin whose windows hold the input row at hand.
                let mut lines: SmallVec<[usize; 16]> = SmallVec::new();
                for (r, dx) in piece.chunks_exact_mut(c.max(1)).enumerate() {
                    let (n, position) = ((first + r) / px, (first + r) % px);
                    if r == 0 || position % w == 0 {
                        lines.clear();
                        for a in holders(g, 0, position / w / h) {
                            let row = |b| n * py + (a * g.y[1] + b) * g.y[2];
                            lines.extend(holders(g, 1, position / w % h).map(row));
                        }
                    }
                    dx.fill(T::zero());
                    for line in &lines {
                        for o in holders(g, 2, position % w) {
                            add(dx, line + o, position);
                        }
                    }
                }
            },
        )
    });
}

/// `dx[argmax[i]] += dy[i]`.
pub fn max_grad<T: Float>(g: &Geometry, c: usize, dy: &[T], argmax: &[u32], dx: &mut [T]) {
    gather(
        g,
        c,
        dx,
        #[inline(always)]
        |dx, output, position| {
            let (dy, argmax) = (&dy[output * c..][..c], &argmax[output * c..][..c]);
            for ((dx, &dy), &arg) in dx.iter_mut().zip(dy).zip(argmax) {
                *dx += if arg == position as u32 { dy } else { T::zero() };
            }
        },
    );
}

/// What a window's sum is divided by.
#[inline(always)]
fn count<T: Float>(g: &Geometry, include_pad: bool, o: [usize; 3]) -> T {
    let count: usize = (0..3).map(|d| g.count(d, o[d], include_pad)).product();
    T::of(count.max(1) as f64)
}

/// The mean of each window, over the elements inside the input or also its padding.
pub fn average<T: Float>(g: &Geometry, c: usize, include_pad: bool, x: &[T], y: &mut [T]) {
    let [px, _] = g.planes();
    each_row(y, c, g.y, g.taps(), |n, o, y| {
        let count = count::<T>(g, include_pad, o);
        vectorize(
            #[inline(always)]
            || {
                y.fill(T::zero());
                taps(g, o, |p| {
                    let x = &x[(n * px + p) * c..][..c];
                    y.iter_mut().zip(x).for_each(|(y, &x)| *y += x);
                });
                y.iter_mut().for_each(|y| *y /= count);
            },
        )
    });
}

/// The gradient of [`average`]. `scratch`: as large as `dy`.
pub fn average_grad<T: Float>(
    g: &Geometry,
    c: usize,
    include_pad: bool,
    dy: &[T],
    dx: &mut [T],
    scratch: &mut [T],
) {
    let [_, py] = g.planes();
    let shares = &mut scratch[..dy.len()];
    each_row(shares, c, g.y, 1, |n, o, share| {
        let count = count::<T>(g, include_pad, o);
        let at = n * py + (o[0] * g.y[1] + o[1]) * g.y[2] + o[2];
        share.iter_mut().zip(&dy[at * c..]).for_each(|(s, &d)| *s = d / count);
    });
    let shares = &*shares;
    gather(
        g,
        c,
        dx,
        #[inline(always)]
        |dx, output, _| dx.iter_mut().zip(&shares[output * c..]).for_each(|(dx, &s)| *dx += s),
    );
}

/// Each row of `c` elements of `dy`, times `scale`, to every position of its plane.
pub fn spread<T: Float>(plane: usize, c: usize, scale: T, dy: &[T], dx: &mut [T]) {
    par::rows(dx, c, GRAIN, |first, dx| {
        for (r, dx) in dx.chunks_exact_mut(c.max(1)).enumerate() {
            let dy = &dy[(first + r) / plane * c..][..c];
            dx.iter_mut().zip(dy).for_each(|(dx, &d)| *dx = d * scale);
        }
    });
}
