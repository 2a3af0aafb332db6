//! Linear quantisation: integers for floats, `q = round(x / scale) + zero`, halves to even, kept within a range.

use num_traits::AsPrimitive;

use crate::kernels::par::{GRAIN, rows};
use crate::tensor::{Elem, Float};

/// Which scale belongs to an element of a tensor (outer, n, inner).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spread {
    /// One for all.
    Tensor,
    /// One for each of the n positions.
    Axis { n: usize, inner: usize },
    /// One for each `block` positions of each (outer, inner).
    Blocks { n: usize, inner: usize, block: usize },
}

impl Spread {
    /// Elements that lie together and whose scales do: a row, and how far its first scale is from the start and the next.
    fn row(&self, len: usize) -> usize {
        match *self {
            Spread::Tensor => len.clamp(1, GRAIN),
            Spread::Axis { inner, .. } | Spread::Blocks { inner, .. } => inner.max(1),
        }
    }

    fn scales(&self, row: usize) -> (usize, usize) {
        match *self {
            Spread::Tensor => (0, 0),
            Spread::Axis { n, .. } => (row % n.max(1), 0),
            Spread::Blocks { n, inner, block } => {
                let (outer, i) = (row / n.max(1), row % n.max(1));
                ((outer * n.div_ceil(block) + i / block) * inner, 1)
            }
        }
    }

    /// `f(piece of y, where it starts, its first scale, the step to the next)` for every row.
    pub fn each<T: Send>(&self, y: &mut [T], f: impl Fn(&mut [T], usize, usize, usize) + Send + Sync) {
        let row = self.row(y.len());
        rows(y, row, GRAIN, |first, piece| {
            for (k, y) in piece.chunks_mut(row).enumerate() {
                let (scale, step) = self.scales(first + k);
                f(y, (first + k) * row, scale, step);
            }
        });
    }
}

/// An integer type of quantised values.
pub trait Level: Elem + AsPrimitive<f64> {}
impl<T: Elem + AsPrimitive<f64>> Level for T {}

/// Scales and zero points (absent: 0), and how they lie over the tensor.
#[derive(Debug, Clone, Copy)]
pub struct Levels<'a, T, Q> {
    pub spread: Spread,
    pub scale: &'a [T],
    pub zero: Option<&'a [Q]>,
    pub range: (f64, f64),
}

impl<T: Float, Q: Level> Levels<'_, T, Q> {
    fn zero(&self, k: usize) -> f64 {
        self.zero.map_or(0.0, |z| z[k].as_())
    }

    /// The level of `x` before it is kept within the range.
    #[inline]
    fn level(&self, x: T, k: usize) -> f64 {
        (x / self.scale[k]).to64().round_ties_even() + self.zero(k)
    }

    #[inline]
    fn kept(&self, level: f64) -> f64 {
        level.clamp(self.range.0, self.range.1)
    }

    pub fn quantize(&self, x: &[T], y: &mut [Q])
    where
        f64: AsPrimitive<Q>,
    {
        self.spread.each(y, |y, at, k, step| {
            for (i, (y, x)) in y.iter_mut().zip(&x[at..]).enumerate() {
                *y = self.kept(self.level(*x, k + i * step)).as_();
            }
        });
    }

    pub fn dequantize(&self, x: &[Q], y: &mut [T]) {
        self.spread.each(y, |y, at, k, step| {
            for (i, (y, x)) in y.iter_mut().zip(&x[at..]).enumerate() {
                let k = k + i * step;
                *y = T::of(x.as_() - self.zero(k)) * self.scale[k];
            }
        });
    }

    /// There and back.
    pub fn round(&self, x: &[T], y: &mut [T]) {
        self.spread.each(y, |y, at, k, step| {
            for (i, (y, x)) in y.iter_mut().zip(&x[at..]).enumerate() {
                let k = k + i * step;
                *y = T::of(self.kept(self.level(*x, k)) - self.zero(k)) * self.scale[k];
            }
        });
    }

    /// `dx = dy` where the level is within the range, else 0.
    pub fn pass(&self, x: &[T], dy: &[T], dx: &mut [T]) {
        self.spread.each(dx, |dx, at, k, step| {
            for (i, ((dx, x), dy)) in dx.iter_mut().zip(&x[at..]).zip(&dy[at..]).enumerate() {
                let level = self.level(*x, k + i * step);
                *dx = if self.kept(level) == level { *dy } else { T::zero() };
            }
        });
    }

    /// What each element adds to its scale's gradient: `dy · (q − zero − x / scale)` within the range, else
    /// `dy · (q − zero)`, with q the level that is kept.
    pub fn scale_terms(&self, x: &[T], dy: &[T], ds: &mut [T]) {
        self.spread.each(ds, |ds, at, k, step| {
            for (i, ((ds, x), dy)) in ds.iter_mut().zip(&x[at..]).zip(&dy[at..]).enumerate() {
                let k = k + i * step;
                let level = self.level(*x, k);
                let kept = self.kept(level);
                let inside = if kept == level { (*x / self.scale[k]).to64() } else { 0.0 };
                *ds = *dy * T::of(kept - self.zero(k) - inside);
            }
        });
    }
}

/// X rounded to the 256 levels of uint8 that span its elements and 0, and back: what `DynamicQuantizeLinear` and a
/// dequantisation after it make of it.
pub fn dynamic(x: &[f32], y: &mut [f32]) {
    let (low, high) = x.iter().fold((0.0f32, 0.0f32), |(low, high), x| (low.min(*x), high.max(*x)));
    let scale = if high > low { (high - low) / 255.0 } else { 1.0 };
    let zero = (-low / scale).round_ties_even().clamp(0.0, 255.0);
    for (y, x) in y.iter_mut().zip(x) {
        let level = ((x / scale).round_ties_even() + zero).clamp(0.0, 255.0);
        *y = (level - zero) * scale;
    }
}

/// Levels (n, columns) as floats (columns, n); one scale and zero point, or one a column.
pub fn turned<Q: Level>(levels: &[Q], scale: &[f32], zero: Option<&[Q]>, n: usize, y: &mut [f32]) {
    let columns = levels.len() / n.max(1);
    let pick = |i: usize, of: usize| if of == 1 { 0 } else { i };
    for (i, row) in y.chunks_exact_mut(n.max(1)).enumerate() {
        let zero = zero.map_or(0.0, |z| z[pick(i, z.len())].as_());
        let scale = scale[pick(i, scale.len())];
        for (k, y) in row.iter_mut().enumerate() {
            let level: f64 = levels[k * columns + i].as_();
            *y = (level - zero) as f32 * scale;
        }
    }
}
