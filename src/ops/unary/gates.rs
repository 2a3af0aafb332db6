//! `Sigmoid`, `Tanh`, and units that weigh their operand by such a function of it. Of many elements they are computed in stages
//! ([`Math::m_sigmoids`]).
// (A function that is handed over as it is would not be inlined, and so be compiled without the instruction set.)
#![allow(clippy::redundant_closure)]

use std::sync::Arc;

use super::{Kind, Reads, Unary, c};
use crate::error::OpError;
use crate::kernels::math::Math;
use crate::ops::{Op, Spec};

/// ONNX `Sigmoid` (opsets 6, 13).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sigmoid {}

impl Sigmoid {
    pub(super) fn row(_: &Spec) -> Result<Arc<dyn Op>, OpError> {
        Ok(Arc::new(Unary(Sigmoid {})))
    }
}

impl Kind for Sigmoid {
    const NAME: &'static str = "Sigmoid";
    const GRAD: &'static str = "SigmoidGrad";
    const INT: Option<fn(i128) -> i128> = None;

    fn reads(self) -> Reads {
        Reads::Y
    }

    #[inline(always)]
    fn f<T: Math>(self, x: T) -> T {
        x.m_sigmoid()
    }

    #[inline(always)]
    fn vjp<T: Math>(self, y: T, dy: T) -> T {
        dy * y * (T::one() - y)
    }

    #[inline(always)]
    fn f_all<T: Math>(self, y: &mut [T], x: &[T]) {
        T::m_sigmoids(
            y,
            [x, x],
            #[inline(always)]
            |x| x,
            #[inline(always)]
            |_, _, s| s,
        );
    }
}

/// ONNX `Tanh` (opsets 6, 13).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tanh {}

impl Tanh {
    pub(super) fn row(_: &Spec) -> Result<Arc<dyn Op>, OpError> {
        Ok(Arc::new(Unary(Tanh {})))
    }
}

impl Kind for Tanh {
    const NAME: &'static str = "Tanh";
    const GRAD: &'static str = "TanhGrad";
    const INT: Option<fn(i128) -> i128> = None;

    fn reads(self) -> Reads {
        Reads::Y
    }

    #[inline(always)]
    fn f<T: Math>(self, x: T) -> T {
        x.m_tanh()
    }

    #[inline(always)]
    fn vjp<T: Math>(self, y: T, dy: T) -> T {
        dy * (T::one() - y * y)
    }

    #[inline(always)]
    fn f_all<T: Math>(self, y: &mut [T], x: &[T]) {
        T::m_tanhs(
            y,
            [x, x],
            #[inline(always)]
            |x| x,
            #[inline(always)]
            |_, _, t| t,
        );
    }
}

/// ONNX `Swish` (opset 24): `x σ(alpha·x)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Swish {
    pub alpha: f32,
}

impl Swish {
    pub(super) fn row(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
        Ok(Arc::new(Unary(Swish { alpha: spec.attrs.float_or("alpha", 1.0)? })))
    }

    #[inline(always)]
    fn alpha<T: Math>(self) -> T {
        T::of(f64::from(self.alpha))
    }

    /// dX, `s` being `σ(alpha·x)`.
    #[inline(always)]
    fn slope<T: Math>(alpha: T, x: T, dy: T, s: T) -> T {
        dy * (s + alpha * x * s * (T::one() - s))
    }
}

impl Kind for Swish {
    const NAME: &'static str = "Swish";
    const GRAD: &'static str = "SwishGrad";
    const INT: Option<fn(i128) -> i128> = None;

    fn reads(self) -> Reads {
        Reads::X
    }

    #[inline(always)]
    fn f<T: Math>(self, x: T) -> T {
        x * (self.alpha::<T>() * x).m_sigmoid()
    }

    #[inline(always)]
    fn vjp<T: Math>(self, x: T, dy: T) -> T {
        let alpha = self.alpha::<T>();
        Self::slope(alpha, x, dy, (alpha * x).m_sigmoid())
    }

    #[inline(always)]
    fn f_all<T: Math>(self, y: &mut [T], x: &[T]) {
        let alpha = self.alpha::<T>();
        T::m_sigmoids(
            y,
            [x, x],
            #[inline(always)]
            |x| alpha * x,
            #[inline(always)]
            |x, _, s| x * s,
        );
    }

    #[inline(always)]
    fn vjp_all<T: Math>(self, dx: &mut [T], x: &[T], dy: &[T]) {
        let alpha = self.alpha::<T>();
        T::m_sigmoids(
            dx,
            [x, dy],
            #[inline(always)]
            |x| alpha * x,
            #[inline(always)]
            |x, dy, s| Self::slope(alpha, x, dy, s),
        );
    }
}

/// ONNX `Gelu` (opset 20), `approximate` none: `x Φ(x)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gelu {}

impl Gelu {
    /// Either form.
    pub(super) fn row(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
        match spec.attrs.string("approximate")?.as_deref() {
            None | Some("none") => Ok(Arc::new(Unary(Gelu {}))),
            Some("tanh") => Ok(Arc::new(Unary(GeluTanh {}))),
            Some(other) => Err(OpError::Attribute(format!("'approximate' is '{other}'"))),
        }
    }

    /// dX, given `Φ(x)` and `e^(−x²/2)`.
    #[inline(always)]
    fn slope<T: Math>(x: T, dy: T, (cdf, gauss): (T, T)) -> T {
        const DENSITY: f64 = 0.398_942_280_401_432_7; // 1/√(2π)
        dy * (cdf + c::<T>(DENSITY) * x * gauss)
    }
}

impl Kind for Gelu {
    const NAME: &'static str = "Gelu";
    const GRAD: &'static str = "GeluGrad";
    const INT: Option<fn(i128) -> i128> = None;

    fn reads(self) -> Reads {
        Reads::X
    }

    #[inline(always)]
    fn f<T: Math>(self, x: T) -> T {
        x * x.m_gauss().0
    }

    #[inline(always)]
    fn vjp<T: Math>(self, x: T, dy: T) -> T {
        Self::slope(x, dy, x.m_gauss())
    }

    #[inline(always)]
    fn f_all<T: Math>(self, y: &mut [T], x: &[T]) {
        T::m_gausses(
            y,
            [x, x],
            #[inline(always)]
            |x, _, (cdf, _)| x * cdf,
        );
    }

    #[inline(always)]
    fn vjp_all<T: Math>(self, dx: &mut [T], x: &[T], dy: &[T]) {
        T::m_gausses(
            dx,
            [x, dy],
            #[inline(always)]
            |x, dy, gauss| Self::slope(x, dy, gauss),
        );
    }
}

/// ONNX `Gelu` (opset 20), `approximate` tanh: `½ x (1 + tanh(SCALE·(x + CUBE·x³)))`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GeluTanh {}

impl GeluTanh {
    pub const SCALE: f64 = 0.797_884_560_802_865_4; // √(2/π)
    pub const CUBE: f64 = 0.044_715;

    /// What the hyperbolic tangent is of.
    #[inline(always)]
    fn inner<T: Math>(x: T) -> T {
        c::<T>(Self::SCALE) * (x + c::<T>(Self::CUBE) * x * x * x)
    }

    #[inline(always)]
    fn of<T: Math>(x: T, t: T) -> T {
        c::<T>(0.5) * x * (T::one() + t)
    }

    /// dX, given the tangent.
    #[inline(always)]
    fn slope<T: Math>(x: T, dy: T, t: T) -> T {
        let inner = c::<T>(Self::SCALE) * (T::one() + c::<T>(3.0 * Self::CUBE) * x * x);
        dy * c(0.5) * (T::one() + t + x * (T::one() - t * t) * inner)
    }
}

impl Kind for GeluTanh {
    const NAME: &'static str = "Gelu";
    const GRAD: &'static str = "GeluGrad";
    const INT: Option<fn(i128) -> i128> = None;

    fn reads(self) -> Reads {
        Reads::X
    }

    #[inline(always)]
    fn f<T: Math>(self, x: T) -> T {
        Self::of(x, Self::inner(x).m_tanh())
    }

    #[inline(always)]
    fn vjp<T: Math>(self, x: T, dy: T) -> T {
        Self::slope(x, dy, Self::inner(x).m_tanh())
    }

    #[inline(always)]
    fn f_all<T: Math>(self, y: &mut [T], x: &[T]) {
        T::m_tanhs(
            y,
            [x, x],
            #[inline(always)]
            |x| Self::inner(x),
            #[inline(always)]
            |x, _, t| Self::of(x, t),
        );
    }

    #[inline(always)]
    fn vjp_all<T: Math>(self, dx: &mut [T], x: &[T], dy: &[T]) {
        T::m_tanhs(
            dx,
            [x, dy],
            #[inline(always)]
            |x| Self::inner(x),
            #[inline(always)]
            |x, dy, t| Self::slope(x, dy, t),
        );
    }
}
