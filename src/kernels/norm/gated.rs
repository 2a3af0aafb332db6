//! A function of what a batch normalisation makes, computed in the same sweep; and both of their gradients in one.
//!
//! Rows are of channels. The function is of many elements at a time ([`Math::m_sigmoids`](crate::kernels::math::Math::m_sigmoids)).
#![allow(unsafe_code)]

use super::channel::{column_products, finish};
use super::fold::{Rows, Term};
use super::strips::{Channels, Strip, WIDTH};
use super::{cut, rows};
use crate::kernels::half::Elements;
use crate::kernels::par::GRAIN;
use crate::kernels::simd::{Simd, Vectors, load_up_to};
use crate::tensor::Float;

/// Mean, factor and shift of each channel, and of the columns of a strip.
struct Normalising<'a, T> {
    of: [&'a [T]; 3],
    spread: [[T; WIDTH]; 3],
}

impl<'a, T: Float> Normalising<'a, T> {
    fn new(of: [&'a [T]; 3]) -> Self {
        Normalising { of, spread: [[T::zero(); WIDTH]; 3] }
    }

    fn turn_to(&mut self, strip: Strip) {
        for (values, spread) in self.of.iter().zip(&mut self.spread) {
            strip.spread(values, spread);
        }
    }

    /// `z = (x − mean)·factor + shift`
    #[inline(always)]
    fn put(&self, x: &[T], z: &mut [T]) {
        let [mean, factor, shift] = &self.spread;
        for ((((z, x), mean), factor), shift) in z.iter_mut().zip(x).zip(mean).zip(factor).zip(shift) {
            *z = (*x - *mean) * *factor + *shift;
        }
    }
}

/// `y = f((x − mean)·factor + shift)` of rows of `d.c`, `of` being mean, factor and shift; `x` absent, it lies in `y`. Write `f` as
/// `#[inline(always)]`.
pub fn gated<T: Vectors>(
    x: Option<&[T]>,
    y: &mut [T],
    d: Channels,
    of: [&[T]; 3],
    f: impl Fn(&mut [T], &[T]) + Send + Sync,
) {
    assert!(d.s == 1 && y.len() == d.n * d.c && x.is_none_or(|x| x.len() == y.len()), "rows of channels");
    rows(
        y,
        d.c,
        GRAIN,
        #[inline(always)]
        |first, y| {
            let x = cut(x, first * d.c, y.len());
            let (mut norm, mut room) = (Normalising::new(of), [T::zero(); WIDTH]);
            for strip in Strip::all(d.c) {
                norm.turn_to(strip);
                for start in (strip.first..y.len()).step_by(strip.step) {
                    let n = strip.width.min(y.len() - start);
                    let (y, z) = (&mut y[start..start + n], &mut room[..n]);
                    norm.put(x.map_or(&*y, |x| &x[start..start + n]), z);
                    f(y, z);
                }
            }
        },
    );
}

/// Writes `dz`, the function's gradient at what the normalisation makes of `x`, as rows are summed up.
struct Gate<'a, T, F> {
    x: &'a [T],
    /// Absent, it lies in `dz`.
    dy: Option<&'a [T]>,
    dz: &'a mut [T],
    norm: Normalising<'a, T>,
    f: &'a F,
}

// SAFETY: reads and writes elements that there are.
unsafe impl<T: Float, F: Fn(&mut [T], &[T], &[T])> Term<T> for Gate<'_, T, F> {
    fn holds(&self, elements: usize) -> bool {
        elements <= self.x.len() && elements <= self.dz.len() && self.dy.is_none_or(|dy| elements <= dy.len())
    }
    fn is_whole(&self) -> bool {
        true
    }
    fn turn_to(&mut self, strip: Strip) {
        self.norm.turn_to(strip);
    }
    #[inline(always)]
    fn prepare(&mut self, rows: Rows) {
        let [mut z, mut near] = [[T::zero(); WIDTH]; 2];
        for row in 0..rows.rows {
            let start = rows.start + row * rows.step;
            let at = start..start + rows.columns;
            let (z, dz) = (&mut z[..at.len()], &mut self.dz[at.clone()]);
            self.norm.put(&self.x[at.clone()], z);
            let dy = match self.dy {
                Some(dy) => &dy[at],
                None => {
                    let near = &mut near[..dz.len()];
                    near.copy_from_slice(dz);
                    near
                }
            };
            (self.f)(dz, z, dy);
        }
    }
    #[inline(always)]
    unsafe fn of<S: Simd<Elem = T>, const WHOLE: bool>(
        &mut self,
        [i, ..]: [usize; 3],
        n: usize,
        _: S::V,
    ) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { load_up_to::<S>(self.dz.as_ptr().add(i), n) }
    }
    #[inline(always)]
    unsafe fn fetch<S: Simd<Elem = T>, const WHOLE: bool>(&self, _: usize) {}
}

/// The gradients of [`gated`], `f(dz, z, dy)` being that of its function: `dz` (which holds `dy` where that is `None`), and
/// `dscale = inv·Σ dz·(x − mean)` and `dshift = Σ dz`. `partials`: [`Channels::partials`] elements. Write `f` as `#[inline(always)]`.
#[allow(clippy::too_many_arguments)]
pub fn gated_grad<T: Vectors>(
    x: &[T],
    dy: Option<&[T]>,
    dz: &mut [T],
    d: Channels,
    of: [&[T]; 3],
    inv: &[T],
    f: impl Fn(&mut [T], &[T], &[T]) + Send + Sync,
    (dscale, dshift): (&mut [T], &mut [T]),
    partials: &mut [f64],
) {
    assert!(d.s == 1 && dz.len() == d.n * d.c && x.len() == dz.len(), "rows of channels");
    d.tasks_with(
        partials,
        dz,
        #[inline(always)]
        |at, dz, scales, shifts| {
            let x = &x[at.clone()];
            let gate = Gate { x, dy: cut(dy, at.start, at.len()), dz, norm: Normalising::new(of), f: &f };
            column_products(Elements::Whole(x), d.c, Some(of[0]), gate, scales, shifts);
        },
    );
    finish(&partials[..d.partials()], Some(inv), dscale, dshift);
}
