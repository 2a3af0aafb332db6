//! Pooling of regions of images.

use crate::kernels::par;
use crate::kernels::pool::NOWHERE;
use crate::kernels::sample::around;
use crate::tensor::Float;

/// Sizes: X (n, c, h, w), regions, each pooled to `bins`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    pub n: usize,
    pub c: usize,
    pub image: [usize; 2],
    pub regions: usize,
    pub bins: [usize; 2],
}

impl Geometry {
    fn plane(&self) -> usize {
        self.image[0] * self.image[1]
    }

    fn outputs(&self) -> usize {
        self.bins[0] * self.bins[1]
    }
}

/// How regions (x₁, y₁, x₂, y₂) are aligned and sampled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Align {
    pub scale: f64,
    /// Samples a bin and dimension; 0: as many as it has elements.
    pub ratio: usize,
    /// Coordinates name corners of elements rather than their centres.
    pub half_pixel: bool,
    /// The largest of the weighted elements, else the samples' mean.
    pub max: bool,
}

/// A region's first corner, the extents of its bins, and the samples of a bin.
struct Region<T> {
    start: [T; 2],
    bin: [T; 2],
    samples: [usize; 2],
}

/// Elements around a sample. One that is not there counts as 0 for the maximum, as in other implementations.
const AROUND: usize = 4;
/// Samples of a bin along a dimension, at most.
const SAMPLES: f64 = 4096.0;

impl Align {
    fn region<T: Float>(&self, g: &Geometry, corners: &[T]) -> Region<T> {
        let offset = T::of(if self.half_pixel { 0.5 } else { 0.0 });
        let at = |i: usize| corners[i] * T::of(self.scale) - offset;
        let start = [at(1), at(0)];
        let mut extent = [at(3) - start[0], at(2) - start[1]];
        if !self.half_pixel {
            extent = extent.map(|e| e.max(T::one()));
        }
        let bin: [T; 2] = std::array::from_fn(|d| extent[d] / T::of(g.bins[d] as f64));
        let samples = bin.map(|b| match self.ratio {
            0 => b.to64().ceil().clamp(0.0, SAMPLES) as usize,
            ratio => ratio,
        });
        Region { start, bin, samples }
    }

    /// Calls `sample` for the samples (y, x) of a bin; `None`: neither in the image nor next to it. The border is repeated.
    fn each<T: Float>(
        &self,
        g: &Geometry,
        r: &Region<T>,
        bin: usize,
        mut sample: impl FnMut(Option<[T; 2]>),
    ) {
        let [h, w] = g.image;
        let place = [bin / g.bins[1], bin % g.bins[1]];
        let along = |d: usize, i: usize| {
            let part = (i as f64 + 0.5) / r.samples[d] as f64;
            r.start[d] + T::of(place[d] as f64) * r.bin[d] + T::of(part) * r.bin[d]
        };
        let near = |v: T, n: usize| v >= -T::one() && v <= T::of(n as f64);
        for i in 0..r.samples[0] {
            for j in 0..r.samples[1] {
                let (y, x) = (along(0, i), along(1, j));
                let inside = |v: T, n: usize| v.max(T::zero()).min(T::of(n as f64 - 1.0));
                sample((near(y, h) && near(x, w)).then(|| [inside(y, h), inside(x, w)]));
            }
        }
    }
}

/// Which image a region is of; `None`: one that is not there.
fn image_of(g: &Geometry, images: &[i64], region: usize) -> Option<usize> {
    usize::try_from(images[region]).ok().filter(|n| *n < g.n)
}

/// Pools each region: (regions, c, bins).
pub fn align<T: Float>(g: &Geometry, a: &Align, x: &[T], regions: &[T], images: &[i64], y: &mut [T]) {
    let (plane, bins) = (g.plane(), g.outputs());
    if y.is_empty() {
        return;
    }
    par::chunks(y, g.c * bins, |r, y| {
        y.fill(T::zero());
        let Some(n) = image_of(g, images, r) else { return };
        let region = a.region(g, &regions[r * 4..][..4]);
        let count = T::of((region.samples[0] * region.samples[1]).max(1) as f64);
        let x = &x[n * g.c * plane..];
        for bin in 0..bins {
            let mut first = true;
            a.each(g, &region, bin, |place| {
                for c in 0..g.c {
                    let x = &x[c * plane..][..plane];
                    let y = &mut y[c * bins + bin];
                    let (mut none, mut found) = (first, 0);
                    let mut most = |y: &mut T, v: T| {
                        *y = if none || v > *y { v } else { *y };
                        none = false;
                    };
                    if let Some([py, px]) = place {
                        around(py, px, g.image, |at, w, _| {
                            found += 1;
                            match a.max {
                                false => *y += w * x[at],
                                true => most(y, w * x[at]),
                            }
                        });
                    }
                    if a.max && found < AROUND {
                        most(y, T::zero());
                    }
                }
                first = false;
            });
            if !a.max {
                (0..g.c).for_each(|c| y[c * bins + bin] /= count);
            }
        }
    });
}

/// The gradient of [`align`] with respect to X.
pub fn align_grad<T: Float>(
    g: &Geometry,
    a: &Align,
    [dy, x, regions]: [&[T]; 3],
    images: &[i64],
    dx: &mut [T],
) {
    let (plane, bins) = (g.plane(), g.outputs());
    if dx.is_empty() {
        return;
    }
    // Channels of a task.
    let together = 8;
    par::chunks(dx, g.c * plane, |n, dx| {
        par::chunks(dx, together * plane, |i, dx| {
            dx.fill(T::zero());
            for r in (0..g.regions).filter(|r| image_of(g, images, *r) == Some(n)) {
                let region = a.region(g, &regions[r * 4..][..4]);
                let count = T::of((region.samples[0] * region.samples[1]).max(1) as f64);
                for bin in 0..bins {
                    for (c, dx) in dx.chunks_exact_mut(plane).enumerate() {
                        let channel = i * together + c;
                        let d = dy[(r * g.c + channel) * bins + bin];
                        let x = &x[(n * g.c + channel) * plane..][..plane];
                        let mut best: Option<(T, Option<(usize, T)>)> = None;
                        let mut most = |v: T, tap| {
                            if best.is_none_or(|(most, _)| v > most) {
                                best = Some((v, tap));
                            }
                        };
                        a.each(g, &region, bin, |place| {
                            let mut found = 0;
                            if let Some([py, px]) = place {
                                around(py, px, g.image, |at, w, _| {
                                    found += 1;
                                    match a.max {
                                        false => dx[at] += w * d / count,
                                        true => most(w * x[at], Some((at, w))),
                                    }
                                });
                            }
                            if a.max && found < AROUND {
                                most(T::zero(), None);
                            }
                        });
                        if let Some((_, Some((at, w)))) = best {
                            dx[at] += w * d;
                        }
                    }
                }
            }
        });
    });
}

/// The maximum of each bin of regions (image, x₁, y₁, x₂, y₂), and where in its plane it lies: [`NOWHERE`] of a bin
/// without elements, whose maximum is 0.
pub fn max_pool<T: Float>(
    g: &Geometry,
    scale: f64,
    x: &[T],
    regions: &[T],
    y: &mut [T],
    mut argmax: Option<&mut [u32]>,
) {
    let (plane, bins, [h, w]) = (g.plane(), g.outputs(), g.image);
    for (i, y) in y.iter_mut().enumerate() {
        let (r, c, bin) = (i / (g.c * bins), i / bins % g.c, i % bins);
        let region = &regions[r * 5..][..5];
        let place = [bin / g.bins[1], bin % g.bins[1]];
        let corner = |k: usize| (region[k].to64() * scale).round();
        let range = |d: usize, n: usize| {
            let (start, end) = (corner(2 - d), corner(4 - d));
            let size = (end - start + 1.0).max(1.0) / g.bins[d] as f64;
            let at = |v: f64| (v + start).clamp(0.0, n as f64) as usize;
            at((place[d] as f64 * size).floor())..at(((place[d] + 1) as f64 * size).ceil())
        };
        let mut best = (T::zero(), NOWHERE);
        let image = region[0].to64();
        if image >= 0.0 && image < g.n as f64 {
            let x = &x[(image as usize * g.c + c) * plane..][..plane];
            for a in range(0, h) {
                for b in range(1, w) {
                    let v = x[a * w + b];
                    if best.1 == NOWHERE || v > best.0 {
                        best = (v, (a * w + b) as u32);
                    }
                }
            }
        }
        *y = best.0;
        if let Some(argmax) = &mut argmax {
            argmax[i] = best.1;
        }
    }
}

/// The gradient of [`max_pool`] with respect to X.
pub fn max_pool_grad<T: Float>(g: &Geometry, dy: &[T], regions: &[T], argmax: &[u32], dx: &mut [T]) {
    let (plane, bins) = (g.plane(), g.outputs());
    par::rows(dx, plane, par::GRAIN, |first, dx| {
        for (i, dx) in dx.chunks_exact_mut(plane.max(1)).enumerate() {
            dx.fill(T::zero());
            let (n, c) = ((first + i) / g.c, (first + i) % g.c);
            for r in (0..g.regions).filter(|r| regions[r * 5].to64() == n as f64) {
                let from = (r * g.c + c) * bins;
                for (d, at) in dy[from..from + bins].iter().zip(&argmax[from..]) {
                    if let Some(dx) = dx.get_mut(*at as usize) {
                        *dx += *d;
                    }
                }
            }
        }
    });
}
