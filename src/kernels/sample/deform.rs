//! Deformable convolution: each tap of each position reads where an offset says, and is weighted by a mask. Columns of
//! what is read, image by image, are multiplied by the weights.

use crate::kernels::gemm::{Plus, Product, many, room};
use crate::kernels::par;
use crate::kernels::sample::around;
use crate::kernels::simd::Vectors;
use crate::tensor::Float;

/// Sizes: X (n, c, image), W (oc, c/groups, k), offsets (n, parts · k · 2, y), mask (n, parts · k, y), Y (n, oc, y).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    pub n: usize,
    pub c: usize,
    pub oc: usize,
    pub groups: usize,
    /// Groups of input channels that share offsets.
    pub parts: usize,
    pub image: [usize; 2],
    pub k: [usize; 2],
    pub y: [usize; 2],
    pub stride: [usize; 2],
    pub dilation: [usize; 2],
    pub pad: [usize; 2],
}

/// What is read where.
#[derive(Debug, Clone, Copy)]
pub struct Operands<'a, T> {
    pub x: &'a [T],
    pub w: &'a [T],
    pub offset: &'a [T],
    pub mask: Option<&'a [T]>,
}

impl Geometry {
    fn taps(&self) -> usize {
        self.k[0] * self.k[1]
    }

    fn points(&self) -> usize {
        self.y[0] * self.y[1]
    }

    fn plane(&self) -> usize {
        self.image[0] * self.image[1]
    }

    /// Elements of an image's columns: (c, taps, points).
    fn columns(&self) -> usize {
        self.c * self.taps() * self.points()
    }

    /// Rows of a group's columns, and its output channels.
    fn group(&self) -> [usize; 2] {
        [self.c / self.groups * self.taps(), self.oc / self.groups]
    }

    pub fn multiply_adds(&self) -> usize {
        self.n * self.oc * self.group()[0] * self.points()
    }

    /// Where a tap of a position reads, and its weight: the mask's.
    fn place<T: Float>(&self, o: &Operands<T>, n: usize, part: usize, tap: usize, p: usize) -> (T, T, T) {
        let row = (n * self.parts + part) * self.taps() + tap;
        let at = |d: usize, point: usize, tap: usize| {
            let base = (point * self.stride[d] + tap * self.dilation[d]) as f64 - self.pad[d] as f64;
            T::of(base) + o.offset[(row * 2 + d) * self.points() + p]
        };
        let y = at(0, p / self.y[1], tap / self.k[1]);
        let x = at(1, p % self.y[1], tap % self.k[1]);
        (y, x, o.mask.map_or(T::one(), |m| m[row * self.points() + p]))
    }

    /// Channels that share offsets.
    fn together(&self) -> usize {
        self.c / self.parts
    }

    fn product<T: Vectors>(&self) -> Product<T> {
        let [rows, channels] = self.group();
        Product::dense(false, false, channels, self.points(), rows)
    }

    fn product_back<T: Vectors>(&self) -> Product<T> {
        let [rows, channels] = self.group();
        Product::dense(true, false, rows, self.points(), channels)
    }

    fn product_weights<T: Vectors>(&self, beta: T) -> Product<T> {
        let [rows, channels] = self.group();
        Product { beta, ..Product::dense(false, true, channels, rows, self.points()) }
    }
}

/// The columns of image `n`.
fn columns<T: Float>(g: &Geometry, o: &Operands<T>, n: usize, columns: &mut [T]) {
    let (points, taps) = (g.points(), g.taps());
    par::rows(columns, points, par::GRAIN / 8, |first, columns| {
        for (i, row) in columns.chunks_exact_mut(points).enumerate() {
            let (c, tap) = ((first + i) / taps, (first + i) % taps);
            let x = &o.x[(n * g.c + c) * g.plane()..][..g.plane()];
            for (p, out) in row.iter_mut().enumerate() {
                let (py, px, mask) = g.place(o, n, c / g.together(), tap, p);
                let mut sum = T::zero();
                around(py, px, g.image, |at, w, _| sum += w * x[at]);
                *out = sum * mask;
            }
        }
    });
}

/// Gradients of the columns of image `n`.
fn columns_grad<T: Vectors>(g: &Geometry, w: &[T], dy: &[T], n: usize, columns: &mut [T], scratch: &mut [T]) {
    let [rows, channels] = g.group();
    let dy = &dy[n * g.oc * g.points()..];
    let at = |i: usize| [i * channels * rows, i * channels * g.points()];
    let step = rows * g.points();
    many(&g.product_back(), g.groups, at, w, dy, Plus::NOTHING, columns, step, scratch);
}

/// Elements of scratch of the forward pass and of each gradient.
pub fn scratch<T: Vectors>(g: &Geometry) -> usize {
    let products = [
        room(&g.product::<T>(), g.groups),
        room(&g.product_back::<T>(), g.groups),
        room(&g.product_weights::<T>(T::one()), g.groups),
    ];
    g.columns() + products.into_iter().max().unwrap_or(0)
}

/// `Y = W · columns + b`
pub fn forward<T: Vectors>(g: &Geometry, o: &Operands<T>, b: Option<&[T]>, y: &mut [T], scratch: &mut [T]) {
    let [rows, channels] = g.group();
    let points = g.points();
    if y.is_empty() {
        return;
    }
    let (cols, room) = scratch.split_at_mut(g.columns());
    for (n, y) in y.chunks_exact_mut(g.oc * points).enumerate() {
        columns(g, o, n, cols);
        let at = |i: usize| [i * channels * rows, i * rows * points];
        many(&g.product(), g.groups, at, o.w, cols, Plus::NOTHING, y, channels * points, room);
        if let Some(b) = b {
            for (y, b) in y.chunks_exact_mut(points).zip(b) {
                y.iter_mut().for_each(|y| *y += *b);
            }
        }
    }
}

/// `dW = Σ_n dY · columnsᵀ`
pub fn weight_grad<T: Vectors>(g: &Geometry, o: &Operands<T>, dy: &[T], dw: &mut [T], scratch: &mut [T]) {
    let [rows, channels] = g.group();
    let points = g.points();
    let (cols, room) = scratch.split_at_mut(g.columns());
    dw.fill(T::zero());
    if points == 0 {
        return;
    }
    for n in 0..g.n {
        columns(g, o, n, cols);
        let dy = &dy[n * g.oc * points..];
        let at = |i: usize| [i * channels * points, i * rows * points];
        let product = g.product_weights(T::one());
        many(&product, g.groups, at, dy, cols, Plus::NOTHING, dw, channels * rows, room);
    }
}

/// `dX[element] += weight · mask · dcolumns`
pub fn input_grad<T: Vectors>(g: &Geometry, o: &Operands<T>, dy: &[T], dx: &mut [T], scratch: &mut [T]) {
    let (points, taps, plane) = (g.points(), g.taps(), g.plane());
    dx.fill(T::zero());
    if points == 0 || plane == 0 {
        return;
    }
    let (cols, room) = scratch.split_at_mut(g.columns());
    for (n, dx) in dx.chunks_exact_mut(g.c * plane).enumerate() {
        columns_grad(g, o.w, dy, n, cols, room);
        let cols = &*cols;
        par::rows(dx, plane, par::GRAIN / 8, |first, dx| {
            for (i, dx) in dx.chunks_exact_mut(plane).enumerate() {
                let c = first + i;
                for tap in 0..taps {
                    let d = &cols[(c * taps + tap) * points..][..points];
                    for (p, d) in d.iter().enumerate() {
                        let (py, px, mask) = g.place(o, n, c / g.together(), tap, p);
                        around(py, px, g.image, |at, w, _| dx[at] += w * mask * *d);
                    }
                }
            }
        });
    }
}

/// The gradient of the offsets: `Σ_c dcolumns · mask · Σ weight' · X`, along y and x.
pub fn offset_grad<T: Vectors>(g: &Geometry, o: &Operands<T>, dy: &[T], out: &mut [T], scratch: &mut [T]) {
    let points = g.points();
    each_tap(g, o, dy, 2 * points, out, scratch, |out, p, mask, d, slopes, _| {
        out[p] += d * mask * slopes[0];
        out[points + p] += d * mask * slopes[1];
    });
}

/// The gradient of the mask: `Σ_c dcolumns · Σ weight · X`.
pub fn mask_grad<T: Vectors>(g: &Geometry, o: &Operands<T>, dy: &[T], out: &mut [T], scratch: &mut [T]) {
    each_tap(g, o, dy, g.points(), out, scratch, |out, p, _, d, _, value| out[p] += d * value);
}

/// For each tap of each group of channels, its row of `out`; `f(row, point, mask, dcolumns, slopes, value)` for each of
/// its channels.
fn each_tap<T: Vectors>(
    g: &Geometry,
    o: &Operands<T>,
    dy: &[T],
    row: usize,
    out: &mut [T],
    scratch: &mut [T],
    f: impl Fn(&mut [T], usize, T, T, [T; 2], T) + Sync,
) {
    let (points, taps, plane) = (g.points(), g.taps(), g.plane());
    if points == 0 {
        return;
    }
    let (cols, room) = scratch.split_at_mut(g.columns());
    for (n, out) in out.chunks_exact_mut(g.parts * taps * row).enumerate() {
        columns_grad(g, o.w, dy, n, cols, room);
        let cols = &*cols;
        par::rows(out, row, par::GRAIN / 8, |first, out| {
            for (i, out) in out.chunks_exact_mut(row).enumerate() {
                let (part, tap) = ((first + i) / taps, (first + i) % taps);
                out.fill(T::zero());
                for p in 0..points {
                    let (py, px, mask) = g.place(o, n, part, tap, p);
                    for c in part * g.together()..(part + 1) * g.together() {
                        let x = &o.x[(n * g.c + c) * plane..][..plane];
                        let (mut value, mut slopes) = (T::zero(), [T::zero(); 2]);
                        around(py, px, g.image, |at, w, by| {
                            value += w * x[at];
                            slopes[0] += by[0] * x[at];
                            slopes[1] += by[1] * x[at];
                        });
                        f(out, p, mask, cols[(c * taps + tap) * points + p], slopes, value);
                    }
                }
            }
        });
    }
}
