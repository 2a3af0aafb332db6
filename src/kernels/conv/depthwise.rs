//! Convolutions of one input channel a group.
//!
//! Each plane is copied once, zero-padded and with its positions sorted by their residue modulo the stride, so that
//! every kernel tap reads one contiguous run for the whole plane: positions of the output are laid out with the
//! copy's row length, and what falls between rows is computed and dropped.

#![allow(unsafe_code)]

use super::{Geometry, copy, every, in_slots, slots, volume};
use crate::kernels::gemm::{Shared, dot};
use crate::kernels::isa::vectorize;
use crate::kernels::par;
use crate::tensor::Float;

/// Outputs computed at a time.
const LANES: usize = 32;
/// Taps whose offsets are kept at hand.
const TAPS: usize = 64;

/// The copy of a plane.
struct Sorted {
    /// Extents of the plane and the distance of its elements in the copy (more than 1: zeros between them).
    x: [usize; 3],
    up: [usize; 3],
    /// The copy's first coordinate.
    origin: [isize; 3],
    stride: [usize; 3],
    dilation: [usize; 3],
    k: [usize; 3],
    /// Outputs, and the extents of the positions of one residue.
    y: [usize; 3],
    q: [usize; 3],
}

impl Sorted {
    fn forward(g: &Geometry) -> Self {
        let window = g.window(g.y[g.axis]);
        Sorted {
            x: g.x,
            up: [1; 3],
            origin: g.origin(0),
            stride: g.stride,
            dilation: g.dilation,
            k: g.k,
            y: g.y,
            q: std::array::from_fn(|d| window[d].div_ceil(g.stride[d])),
        }
    }

    /// Of an output gradient, for the input gradient: a convolution of stride 1 of the gradient with zeros between.
    fn backward(g: &Geometry) -> Self {
        let reach: [usize; 3] = std::array::from_fn(|d| (g.k[d] - 1) * g.dilation[d]);
        let window = std::array::from_fn(|d| g.x[d] + reach[d]);
        Sorted {
            x: g.y,
            up: g.stride,
            origin: std::array::from_fn(|d| g.pad[d] as isize - reach[d] as isize),
            stride: [1; 3],
            dilation: g.dilation,
            k: g.k,
            y: g.x,
            q: window,
        }
    }

    /// Elements of the copy, and of the positions of the output.
    fn sizes(&self) -> [usize; 2] {
        let positions = self.last().next_multiple_of(LANES);
        [volume(self.stride) * volume(self.q) + LANES, positions]
    }

    fn last(&self) -> usize {
        ((self.y[0] - 1) * self.q[1] + self.y[1] - 1) * self.q[2] + self.y[2]
    }

    /// Where tap `t` of output position 0 lies in the copy.
    fn tap(&self, t: usize) -> usize {
        let [_, k1, k2] = self.k;
        let tap = [t / (k1 * k2), t / k2 % k1, t % k2];
        let at: [usize; 3] = std::array::from_fn(|d| tap[d] * self.dilation[d]);
        let (s, q) = (self.stride, self.q);
        let residue = ((at[0] % s[0]) * s[1] + at[1] % s[1]) * s[2] + at[2] % s[2];
        residue * volume(q) + ((at[0] / s[0]) * q[1] + at[1] / s[1]) * q[2] + at[2] / s[2]
    }

    /// The plane's coordinate at `i` of the copy.
    fn source(&self, d: usize, i: usize) -> Option<usize> {
        let at = self.origin[d] + i as isize;
        let at = usize::try_from(at).ok().filter(|at| at % self.up[d] == 0)? / self.up[d];
        (at < self.x[d]).then_some(at)
    }

    #[inline(always)]
    fn fill<T: Float>(&self, plane: &[T], out: &mut [T]) {
        let (s, q, o) = (self.stride, self.q, self.origin[2]);
        for (a, b) in (0..q[0] * s[0]).flat_map(|a| (0..q[1] * s[1]).map(move |b| (a, b))) {
            let row = match (self.source(0, a), self.source(1, b)) {
                (Some(a), Some(b)) => Some(&plane[(a * self.x[1] + b) * self.x[2]..][..self.x[2]]),
                _ => None,
            };
            let residue = ((a % s[0]) * s[1] + b % s[1]) * s[2];
            let at = ((a / s[0]) * q[1] + b / s[1]) * q[2];
            for p in 0..s[2] {
                let out = &mut out[(residue + p) * volume(q) + at..][..q[2]];
                let Some(row) = row else {
                    out.fill(T::zero());
                    continue;
                };
                if self.up[2] > 1 {
                    out.fill(T::zero());
                    let (u, skip) = (self.up[2], o.max(0) as usize);
                    let first = skip.div_ceil(u).min(row.len());
                    let to = ((first * u) as isize - o) as usize;
                    if to < out.len() {
                        out[to..].iter_mut().step_by(u).zip(&row[first..]).for_each(|(o, x)| *o = *x);
                    }
                    continue;
                }
                let start = o + p as isize;
                let from = ((-start).max(0) as usize).div_ceil(s[2]).min(q[2]);
                let to = ((row.len() as isize - start).max(0) as usize).div_ceil(s[2]).clamp(from, q[2]);
                out[..from].fill(T::zero());
                out[to..].fill(T::zero());
                if from < to {
                    let row = &row[(start + (from * s[2]) as isize) as usize..];
                    every(s[2], row, &mut out[from..to]);
                }
            }
        }
        out[volume(s) * volume(q)..].fill(T::zero());
    }

    /// `out (+)= start + Σ_t w(t) · tap t`.
    #[inline(always)]
    fn convolve<T: Float>(&self, copy: &[T], w: impl Fn(usize) -> T, start: Option<T>, out: &mut [T]) {
        let taps = volume(self.k);
        let mut first = 0;
        while first < taps {
            let n = TAPS.min(taps - first);
            let (mut at, mut by) = ([0; TAPS], [T::zero(); TAPS]);
            for t in 0..n {
                (at[t], by[t]) = (self.tap(first + t), w(first + t));
            }
            let start = start.filter(|_| first == 0);
            for (i, out) in out.chunks_exact_mut(LANES).enumerate() {
                let mut sums = [T::zero(); LANES];
                match start {
                    Some(s) => sums.fill(s),
                    None => sums.copy_from_slice(out),
                }
                for (at, w) in at[..n].iter().zip(&by[..n]) {
                    let x = &copy[at + i * LANES..][..LANES];
                    for l in 0..LANES {
                        sums[l] += *w * x[l];
                    }
                }
                out.copy_from_slice(&sums);
            }
            first += n;
        }
    }

    /// Calls `f` with (start in the positions, start in the plane) of each row of `y[2]` outputs.
    #[inline(always)]
    fn rows(&self, mut f: impl FnMut(usize, usize)) {
        for row in 0..self.y[0] * self.y[1] {
            let at = (row / self.y[1] * self.q[1] + row % self.y[1]) * self.q[2];
            f(at, row * self.y[2]);
        }
    }
}

/// Planes a task.
fn grain(plane: usize) -> usize {
    (par::GRAIN / plane).max(1)
}

/// Elements of scratch that `forward` and `input_grad` need.
pub(super) fn forward_scratch(g: &Geometry) -> usize {
    plane_scratch(&Sorted::forward(g), g.n * g.oc)
}

pub(super) fn input_grad_scratch(g: &Geometry) -> usize {
    plane_scratch(&Sorted::backward(g), g.n * g.c)
}

fn plane_scratch(s: &Sorted, planes: usize) -> usize {
    slots(planes.div_ceil(grain(volume(s.y))), s.sizes().iter().sum())
}

/// Calls `f` with each output plane's number, the plane, and memory for the copy and the positions.
fn each_plane<T: Float>(
    s: &Sorted,
    planes: usize,
    y: &mut [T],
    scratch: &mut [T],
    f: impl Fn(usize, &mut [T], &mut [T], &mut [T]) + Sync,
) {
    let (size, per) = (volume(s.y), grain(volume(s.y)));
    let [copied, positions] = s.sizes();
    let y = Shared::new(y);
    in_slots(planes.div_ceil(per), copied + positions, scratch, |task, slot| {
        let (copied, positions) = slot.split_at_mut(copied);
        for plane in task * per..planes.min((task + 1) * per) {
            // SAFETY: each plane belongs to one task.
            f(plane, unsafe { y.part(plane * size, size) }, copied, positions);
        }
    });
}

pub(super) fn forward<T: Float>(
    g: &Geometry,
    x: &[T],
    w: &[T],
    bias: Option<&[T]>,
    y: &mut [T],
    scratch: &mut [T],
) {
    let (s, og, taps, px) = (Sorted::forward(g), g.og(), g.taps(), volume(g.x));
    each_plane(&s, g.n * g.oc, y, scratch, |plane, y, copied, positions| {
        let (image, o) = (plane / g.oc, plane % g.oc);
        let (x, w) = (&x[(image * g.c + o / og) * px..][..px], &w[o * taps..][..taps]);
        vectorize(
            #[inline(always)]
            || {
                s.fill(x, copied);
                s.convolve(copied, |t| w[t], Some(bias.map_or(T::zero(), |b| b[o])), positions);
                s.rows(|at, to| copy(&positions[at..], &mut y[to..to + s.y[2]]));
            },
        );
    });
}

pub(super) fn input_grad<T: Float>(g: &Geometry, dy: &[T], w: &[T], dx: &mut [T], scratch: &mut [T]) {
    let (s, og, taps, py) = (Sorted::backward(g), g.og(), g.taps(), volume(g.y));
    each_plane(&s, g.n * g.c, dx, scratch, |plane, dx, copied, positions| {
        let (image, c) = (plane / g.c, plane % g.c);
        vectorize(
            #[inline(always)]
            || {
                for o in c * og..(c + 1) * og {
                    let (dy, w) = (&dy[(image * g.oc + o) * py..][..py], &w[o * taps..][..taps]);
                    s.fill(dy, copied);
                    let start = if o == c * og { Some(T::zero()) } else { None };
                    s.convolve(copied, |t| w[taps - 1 - t], start, positions);
                }
                s.rows(|at, to| copy(&positions[at..], &mut dx[to..to + s.y[2]]));
            },
        );
    });
}

/// Images are summed in as many chunks, whose sums are added up in order.
fn chunks(g: &Geometry) -> usize {
    g.n.min(8)
}

/// Channels of one chunk that make a task.
fn channels(g: &Geometry) -> usize {
    grain(volume(g.y) * g.n.div_ceil(chunks(g))).min(g.oc)
}

pub(super) fn weight_grad_scratch(g: &Geometry) -> usize {
    let tasks = chunks(g) * g.oc.div_ceil(channels(g));
    chunks(g) * g.oc * g.taps() + slots(tasks, Sorted::forward(g).sizes().iter().sum())
}

pub(super) fn weight_grad<T: Float>(g: &Geometry, dy: &[T], x: &[T], dw: &mut [T], scratch: &mut [T]) {
    let (s, og, taps, px, py) = (Sorted::forward(g), g.og(), g.taps(), volume(g.x), volume(g.y));
    let (chunks, per) = (chunks(g), channels(g));
    let (blocks, weights) = (g.oc.div_ceil(per), g.oc * taps);
    let [copied, positions] = s.sizes();
    let (partial, scratch) = scratch.split_at_mut(chunks * weights);
    {
        let partial = Shared::new(partial);
        in_slots(chunks * blocks, copied + positions, scratch, |task, slot| {
            let (chunk, first) = (task / blocks, task % blocks * per);
            let (copied, positions) = slot.split_at_mut(copied);
            for o in first..g.oc.min(first + per) {
                // SAFETY: tasks differ in chunk or channels.
                let sums = unsafe { partial.part(chunk * weights + o * taps, taps) };
                sums.fill(T::zero());
                for image in chunk * g.n / chunks..(chunk + 1) * g.n / chunks {
                    let dy = &dy[(image * g.oc + o) * py..][..py];
                    let x = &x[(image * g.c + o / og) * px..][..px];
                    vectorize(
                        #[inline(always)]
                        || {
                            s.fill(x, copied);
                            positions.fill(T::zero());
                            s.rows(|at, from| copy(&dy[from..from + s.y[2]], &mut positions[at..]));
                            for (t, sum) in sums.iter_mut().enumerate() {
                                *sum += dot(positions, &copied[s.tap(t)..][..positions.len()]);
                            }
                        },
                    );
                }
            }
        });
    }
    for (i, dw) in dw.iter_mut().enumerate() {
        *dw = (0..chunks).map(|c| partial[c * weights + i]).sum();
    }
}
