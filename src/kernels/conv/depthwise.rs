//! Convolutions of one input channel a group: loops over rows, bound by memory.

use rayon::prelude::*;

use super::{Geometry, volume};
use crate::kernels::gemm::dot;
use crate::kernels::isa::vectorize;
use crate::kernels::par;
use crate::tensor::Float;

/// The output columns `from..to` for which tap `k` of the last dimension reads inside the row, and where it
/// reads for column `from`.
#[inline(always)]
fn columns(g: &Geometry, k: usize) -> (usize, usize, usize) {
    let (s, offset) = (g.stride[2], (k * g.dilation[2]) as isize - g.pad[2] as isize);
    let from = ((-offset).max(0) as usize).div_ceil(s).min(g.y[2]);
    let to = ((g.x[2] as isize - offset).max(0) as usize).div_ceil(s).clamp(from, g.y[2]);
    (from, to, ((from * s) as isize + offset).max(0) as usize)
}

/// Calls `f` with (output row, input row, first tap of the kernel row) for all that meet inside the input.
#[inline(always)]
fn row_pairs(g: &Geometry, mut f: impl FnMut(usize, usize, usize)) {
    let inside = |d: usize, y: usize, k: usize| {
        let at = (y * g.stride[d] + k * g.dilation[d]).wrapping_sub(g.pad[d]);
        (at < g.x[d]).then_some(at)
    };
    for a in 0..g.y[0] {
        for b in 0..g.y[1] {
            for i in 0..g.k[0] {
                let Some(xa) = inside(0, a, i) else { continue };
                for j in 0..g.k[1] {
                    let Some(xb) = inside(1, b, j) else { continue };
                    f(a * g.y[1] + b, xa * g.x[1] + xb, (i * g.k[1] + j) * g.k[2]);
                }
            }
        }
    }
}

/// Planes a task: the work of about `GRAIN` elements.
fn grain(plane: usize, taps: usize) -> usize {
    (par::GRAIN / (plane * taps.div_ceil(4)).max(1)).max(1) * plane
}

pub(super) fn forward<T: Float>(g: &Geometry, x: &[T], w: &[T], bias: Option<&[T]>, y: &mut [T]) {
    let (og, taps, px, py) = (g.og(), g.taps(), volume(g.x), volume(g.y));
    let task = grain(py, taps);
    y.par_chunks_mut(task).enumerate().for_each(|(i, y)| {
        vectorize(
            #[inline(always)]
            || {
                for (j, y) in y.chunks_exact_mut(py).enumerate() {
                    let (image, o) = ((i * task / py + j) / g.oc, (i * task / py + j) % g.oc);
                    let x = &x[(image * g.c + o / og) * px..][..px];
                    let w = &w[o * taps..][..taps];
                    y.fill(bias.map_or(T::zero(), |b| b[o]));
                    match (g.k[2], g.stride[2], g.dilation[2]) {
                        (3, 1, 1) => plane::<T, 3, 1>(g, x, w, y),
                        (3, 2, 1) => plane::<T, 3, 2>(g, x, w, y),
                        (5, 1, 1) => plane::<T, 5, 1>(g, x, w, y),
                        (5, 2, 1) => plane::<T, 5, 2>(g, x, w, y),
                        (7, 1, 1) => plane::<T, 7, 1>(g, x, w, y),
                        _ => any_plane(g, x, w, y),
                    }
                }
            },
        )
    });
}

/// All `K` taps of a kernel row at once, of stride `S`.
#[inline(always)]
fn plane<T: Float, const K: usize, const S: usize>(g: &Geometry, x: &[T], w: &[T], y: &mut [T]) {
    let taps: [(usize, usize, usize); K] = std::array::from_fn(|k| columns(g, k));
    // Where every tap reads inside the row.
    let from = taps.iter().map(|t| t.0).max().unwrap_or(0);
    let to = taps.iter().map(|t| t.1).min().unwrap_or(0).max(from);
    row_pairs(g, |row, x_row, t| {
        let (y, x) = (&mut y[row * g.y[2]..][..g.y[2]], &x[x_row * g.x[2]..][..g.x[2]]);
        let mut tap = [T::zero(); K];
        tap.copy_from_slice(&w[t..t + K]);
        if from < to {
            let inner = &mut y[from..to];
            let n = inner.len();
            let start = from * S - g.pad[2];
            let x = &x[start..][..(n - 1) * S + K];
            for (i, y) in inner.iter_mut().enumerate() {
                let mut sum = *y;
                for k in 0..K {
                    sum += tap[k] * x[i * S + k];
                }
                *y = sum;
            }
        }
        for k in 0..K {
            let (lo, hi, at) = taps[k];
            for i in (lo..hi.min(from)).chain(to.max(lo)..hi) {
                y[i] += tap[k] * x[at + (i - lo) * S];
            }
        }
    });
}

#[inline(always)]
fn any_plane<T: Float>(g: &Geometry, x: &[T], w: &[T], y: &mut [T]) {
    let s = g.stride[2];
    row_pairs(g, |row, x_row, t| {
        let (y, x) = (&mut y[row * g.y[2]..][..g.y[2]], &x[x_row * g.x[2]..][..g.x[2]]);
        for k in 0..g.k[2] {
            let (from, to, at) = columns(g, k);
            let w = w[t + k];
            y[from..to]
                .iter_mut()
                .zip(x[at.min(x.len())..].iter().step_by(s))
                .for_each(|(y, x)| *y += w * *x);
        }
    });
}

pub(super) fn input_grad<T: Float>(g: &Geometry, dy: &[T], w: &[T], dx: &mut [T]) {
    let (og, taps, px, py) = (g.og(), g.taps(), volume(g.x), volume(g.y));
    // With stride 1 the gradient is a convolution with the kernel mirrored.
    let reach: [usize; 3] = std::array::from_fn(|d| (g.k[d] - 1) * g.dilation[d]);
    let mirrored = g.unit_stride() && taps <= 64 && (0..3).all(|d| g.pad[d] <= reach[d]);
    let t = Geometry {
        x: g.y,
        y: g.x,
        pad: std::array::from_fn(|d| reach[d].saturating_sub(g.pad[d])),
        ..g.clone()
    };
    let task = grain(px, taps);
    dx.par_chunks_mut(task).enumerate().for_each(|(i, dx)| {
        vectorize(
            #[inline(always)]
            || {
                for (j, dx) in dx.chunks_exact_mut(px).enumerate() {
                    let (image, c) = ((i * task / px + j) / g.c, (i * task / px + j) % g.c);
                    dx.fill(T::zero());
                    for o in c * og..(c + 1) * og {
                        let dy = &dy[(image * g.oc + o) * py..][..py];
                        let w = &w[o * taps..][..taps];
                        if mirrored {
                            let mut flipped = [T::zero(); 64];
                            flipped.iter_mut().zip(w.iter().rev()).for_each(|(f, w)| *f = *w);
                            let w = &flipped[..taps];
                            match (g.k[2], g.dilation[2]) {
                                (3, 1) => plane::<T, 3, 1>(&t, dy, w, dx),
                                (5, 1) => plane::<T, 5, 1>(&t, dy, w, dx),
                                (7, 1) => plane::<T, 7, 1>(&t, dy, w, dx),
                                _ => any_plane(&t, dy, w, dx),
                            }
                        } else {
                            scatter_plane(g, dy, w, dx);
                        }
                    }
                }
            },
        )
    });
}

#[inline(always)]
fn scatter_plane<T: Float>(g: &Geometry, dy: &[T], w: &[T], dx: &mut [T]) {
    let s = g.stride[2];
    row_pairs(g, |row, x_row, t| {
        let (dy, dx) = (&dy[row * g.y[2]..][..g.y[2]], &mut dx[x_row * g.x[2]..][..g.x[2]]);
        for k in 0..g.k[2] {
            let (from, to, at) = columns(g, k);
            let (w, at) = (w[t + k], at.min(dx.len()));
            dx[at..].iter_mut().step_by(s).zip(&dy[from..to]).for_each(|(x, d)| *x += w * *d);
        }
    });
}

/// Images a partial sum; their number must not depend on the threads.
fn chunks(g: &Geometry) -> usize {
    g.n.min(8)
}

pub(super) fn weight_grad_scratch(g: &Geometry) -> usize {
    chunks(g) * g.oc * g.taps()
}

pub(super) fn weight_grad<T: Float>(g: &Geometry, dy: &[T], x: &[T], dw: &mut [T], scratch: &mut [T]) {
    let (og, taps, px, py) = (g.og(), g.taps(), volume(g.x), volume(g.y));
    let chunks = chunks(g);
    let size = g.oc * taps;
    let partial = &mut scratch[..chunks * size];
    let task = grain(py * g.n.div_ceil(chunks), taps) / (py * g.n.div_ceil(chunks)) * taps;
    partial.par_chunks_mut(size).enumerate().for_each(|(chunk, sums)| {
        let (first, last) = (chunk * g.n / chunks, (chunk + 1) * g.n / chunks);
        sums.par_chunks_mut(task).enumerate().for_each(|(i, sums)| {
            vectorize(
                #[inline(always)]
                || {
                    sums.fill(T::zero());
                    for (j, sums) in sums.chunks_exact_mut(taps).enumerate() {
                        let o = i * task / taps + j;
                        for image in first..last {
                            let dy = &dy[(image * g.oc + o) * py..][..py];
                            let x = &x[(image * g.c + o / og) * px..][..px];
                            sum_plane(g, dy, x, sums);
                        }
                    }
                },
            )
        });
    });
    for (i, dw) in dw.iter_mut().enumerate() {
        *dw = (0..chunks).map(|c| partial[c * size + i]).sum();
    }
}

#[inline(always)]
fn sum_plane<T: Float>(g: &Geometry, dy: &[T], x: &[T], sums: &mut [T]) {
    let s = g.stride[2];
    row_pairs(g, |row, x_row, t| {
        let (dy, x) = (&dy[row * g.y[2]..][..g.y[2]], &x[x_row * g.x[2]..][..g.x[2]]);
        for k in 0..g.k[2] {
            let (from, to, at) = columns(g, k);
            let (dy, x) = (&dy[from..to], &x[at.min(x.len())..]);
            sums[t + k] += match s {
                1 => dot(dy, &x[..dy.len()]),
                _ => dy.iter().zip(x.iter().step_by(s)).map(|(d, x)| *d * *x).sum(),
            };
        }
    });
}
