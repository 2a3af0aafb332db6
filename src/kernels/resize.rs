//! Resizing axis by axis: each place of a result is a weighted sum of a few of the axis' elements, which a table names.
//! The gradient reads the same table the other way.

use crate::kernels::isa::Wide;
use crate::kernels::par;
use crate::tensor::{Elem, Float};

/// How a place of the result is mapped to a coordinate of the input (ONNX's `coordinate_transformation_mode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coordinates {
    HalfPixel,
    HalfPixelSymmetric,
    PytorchHalfPixel,
    AlignCorners,
    Asymmetric,
    TfHalfPixelForNn,
    TfCropAndResize,
}

/// Which element is the nearest one (ONNX's `nearest_mode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounding {
    PreferFloor,
    PreferCeil,
    Floor,
    Ceil,
    /// As resizing did before opset 11: up where the result is smaller, else down.
    Simple,
}

/// How elements near a coordinate are weighted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Filter {
    Nearest(Rounding),
    Linear,
    /// With the coefficient `a` (ONNX's `cubic_coeff_a`).
    Cubic(f64),
}

/// How a tensor is resampled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    pub coordinates: Coordinates,
    pub filter: Filter,
    /// Elements outside have no weight; else the border's are repeated.
    pub exclude_outside: bool,
    /// The filter is as wide as the result's elements are where the result is smaller.
    pub antialias: bool,
}

/// An axis that is resized.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Axis {
    pub input: usize,
    pub output: usize,
    pub scale: f64,
    /// Of `TfCropAndResize`: where the result begins and ends, 0 to 1 being the whole.
    pub roi: [f64; 2],
}

impl Axis {
    /// The coordinate of place `i`. In single precision, a scale such as 0.6 gives the coordinates that were meant.
    fn coordinate<T: Float>(&self, coordinates: Coordinates, i: usize) -> T {
        let of = |x: f64| T::of(x);
        let (i, input, scale) = (of(i as f64), of(self.input as f64), of(self.scale));
        let (half, one) = (of(0.5), T::one());
        let length = scale * input;
        match coordinates {
            Coordinates::HalfPixel => (i + half) / scale - half,
            Coordinates::HalfPixelSymmetric => {
                input * half * (one - of(self.output as f64) / length) + (i + half) / scale - half
            }
            Coordinates::PytorchHalfPixel if self.output <= 1 => T::zero(),
            Coordinates::PytorchHalfPixel => (i + half) / scale - half,
            Coordinates::AlignCorners if length == one => T::zero(),
            Coordinates::AlignCorners => i * (input - one) / (length - one),
            Coordinates::Asymmetric => i / scale,
            Coordinates::TfHalfPixelForNn => (i + half) / scale,
            Coordinates::TfCropAndResize => {
                let [start, end] = self.roi.map(of);
                let within = if self.output <= 1 { half } else { i / (length - one) };
                (start + within * (end - start)) * (input - one)
            }
        }
    }
}

impl Sampling {
    /// Does the axis stay as it is?
    pub fn keeps(&self, axis: &Axis) -> bool {
        axis.input == axis.output && axis.scale == 1.0 && self.coordinates != Coordinates::TfCropAndResize
    }

    /// Elements that a place is summed from.
    pub fn taps(&self, axis: &Axis) -> usize {
        let wide = |reach: f64| 2 * self.reach(axis, reach);
        match self.filter {
            Filter::Nearest(_) => 1,
            Filter::Linear => wide(1.0),
            Filter::Cubic(_) => wide(2.0),
        }
    }

    /// Elements on either side of a coordinate.
    fn reach(&self, axis: &Axis, reach: f64) -> usize {
        let most = 2.0 * axis.input as f64 + 2.0;
        (reach / self.density(axis)).ceil().min(most) as usize
    }

    /// Places of the result an element, at most 1.
    fn density(&self, axis: &Axis) -> f64 {
        if self.antialias { axis.scale.min(1.0) } else { 1.0 }
    }

    /// Fills the table of an axis: for each place as many indices and weights as there are taps. Weights are 0 where a
    /// crop reaches outside: see [`Sampling::outside`].
    pub fn table<T: Float>(&self, axis: &Axis, index: &mut [u32], weight: &mut [T]) {
        let taps = self.taps(axis);
        let last = axis.input as i64 - 1;
        for i in 0..axis.output {
            let (index, weight) = (&mut index[i * taps..][..taps], &mut weight[i * taps..][..taps]);
            if self.outside(axis, i) {
                index.fill(0);
                weight.fill(T::zero());
                continue;
            }
            if let Filter::Nearest(rounding) = self.filter {
                let x: f32 = axis.coordinate(self.coordinates, i);
                let at = match rounding {
                    Rounding::PreferFloor => (x - 0.5).ceil(),
                    Rounding::PreferCeil => (x + 0.5).floor(),
                    Rounding::Floor => x.floor(),
                    Rounding::Ceil => x.ceil(),
                    Rounding::Simple if axis.scale < 1.0 => x.ceil(),
                    Rounding::Simple => x.floor(),
                };
                (index[0], weight[0]) = ((at as i64).clamp(0, last) as u32, T::one());
                continue;
            }
            let x: f64 = axis.coordinate(self.coordinates, i);
            let first = x.floor() as i64 - taps as i64 / 2 + 1;
            let density = self.density(axis);
            let of = |k: usize| match first + k as i64 {
                at if self.exclude_outside && !(0..=last).contains(&at) => 0.0,
                at => self.filter.at((at as f64 - x) * density),
            };
            let sum: f64 = (0..taps).map(of).sum();
            for (k, (index, weight)) in index.iter_mut().zip(weight).enumerate() {
                *index = (first + k as i64).clamp(0, last) as u32;
                *weight = T::of(if sum == 0.0 { 0.0 } else { of(k) / sum });
            }
        }
    }

    /// Does place `i` of a crop lie outside the input?
    pub fn outside(&self, axis: &Axis, i: usize) -> bool {
        let x: f64 = axis.coordinate(self.coordinates, i);
        self.coordinates == Coordinates::TfCropAndResize && !(0.0..=axis.input as f64 - 1.0).contains(&x)
    }
}

impl Filter {
    /// The weight at a distance.
    fn at(self, x: f64) -> f64 {
        let x = x.abs();
        match self {
            Filter::Cubic(a) if x <= 1.0 => ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0,
            Filter::Cubic(a) if x < 2.0 => ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a,
            Filter::Cubic(_) => 0.0,
            _ => (1.0 - x).max(0.0),
        }
    }
}

/// An axis within a tensor: elements outside and inside of it, its table.
#[derive(Debug, Clone, Copy)]
pub struct Pass<'a, T> {
    pub outer: usize,
    pub inner: usize,
    pub input: usize,
    pub output: usize,
    pub taps: usize,
    pub index: &'a [u32],
    pub weight: &'a [T],
}

/// `y = Σ_k weight·x[index]` along the axis.
pub fn resample<T: Float + Wide>(p: &Pass<T>, x: &[T], y: &mut [T]) {
    let grain = par::GRAIN / p.taps.max(1);
    if p.inner == 1 {
        return par::rows(y, p.output, grain, |first, y| {
            for (i, y) in y.chunks_exact_mut(p.output.max(1)).enumerate() {
                let x = &x[(first + i) * p.input..][..p.input];
                let taps = p.index.chunks_exact(p.taps).zip(p.weight.chunks_exact(p.taps));
                for (y, (index, weight)) in y.iter_mut().zip(taps) {
                    *y = index.iter().zip(weight).fold(T::zero(), |sum, (i, w)| sum + *w * x[*i as usize]);
                }
            }
        });
    }
    par::rows(y, p.inner, grain, |first, y| {
        T::wide(
            #[inline(always)]
            || {
                for (i, y) in y.chunks_exact_mut(p.inner).enumerate() {
                    let (outer, place) = ((first + i) / p.output, (first + i) % p.output);
                    let row = |i: u32| &x[(outer * p.input + i as usize) * p.inner..][..p.inner];
                    let index = &p.index[place * p.taps..][..p.taps];
                    let weight = &p.weight[place * p.taps..][..p.taps];
                    let (w, x) = (weight[0], row(index[0]));
                    y.iter_mut().zip(x).for_each(|(y, x)| *y = w * *x);
                    for (i, w) in index.iter().zip(weight).skip(1) {
                        y.iter_mut().zip(row(*i)).for_each(|(y, x)| *y += *w * *x);
                    }
                }
            },
        );
    });
}

/// The gradient of [`resample`]: `dx[index] += weight·dy`.
pub fn resample_grad<T: Float + Wide>(p: &Pass<T>, dy: &[T], dx: &mut [T]) {
    let (row, y_row) = (p.input * p.inner, p.output * p.inner);
    if row == 0 {
        return;
    }
    let per = (par::GRAIN / (y_row * p.taps).max(1)).max(1);
    par::chunks(dx, per * row, |i, dx| {
        T::wide(
            #[inline(always)]
            || {
                for (j, dx) in dx.chunks_exact_mut(row).enumerate() {
                    dx.fill(T::zero());
                    let dy = &dy[(i * per + j) * y_row..][..y_row];
                    let taps = p.index.chunks_exact(p.taps).zip(p.weight.chunks_exact(p.taps));
                    if p.inner == 1 {
                        for (dy, (index, weight)) in dy.iter().zip(taps) {
                            for (i, w) in index.iter().zip(weight) {
                                dx[*i as usize] += *w * *dy;
                            }
                        }
                        continue;
                    }
                    for (dy, (index, weight)) in dy.chunks_exact(p.inner).zip(taps) {
                        for (i, w) in index.iter().zip(weight) {
                            let dx = &mut dx[*i as usize * p.inner..][..p.inner];
                            dx.iter_mut().zip(dy).for_each(|(dx, dy)| *dx += *w * *dy);
                        }
                    }
                }
            },
        );
    });
}

/// The elements that a table of one tap names, of any type.
pub fn pick<T: Elem>(p: &Pass<f32>, x: &[T], y: &mut [T]) {
    if p.inner == 1 {
        return par::rows(y, p.output, par::GRAIN, |first, y| {
            for (i, y) in y.chunks_exact_mut(p.output.max(1)).enumerate() {
                let x = &x[(first + i) * p.input..][..p.input];
                y.iter_mut().zip(p.index).for_each(|(y, i)| *y = x[*i as usize]);
            }
        });
    }
    par::rows(y, p.inner, par::GRAIN, |first, y| {
        for (i, y) in y.chunks_exact_mut(p.inner).enumerate() {
            let (outer, place) = ((first + i) / p.output, (first + i) % p.output);
            let from = (outer * p.input + p.index[place] as usize) * p.inner;
            y.copy_from_slice(&x[from..][..p.inner]);
        }
    });
}

/// Writes `value` wherever along an axis a crop reaches outside.
pub fn fill_outside<T: Elem>(outer: usize, inner: usize, axis: &Axis, s: &Sampling, value: T, y: &mut [T]) {
    for place in (0..axis.output).filter(|i| s.outside(axis, *i)) {
        for o in 0..outer {
            y[(o * axis.output + place) * inner..][..inner].fill(value);
        }
    }
}
