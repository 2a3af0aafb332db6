//! Elementwise operators of one operand: each is one entry below, its function beside its derivative.

mod gates;
mod grad;
mod halved;

use std::fmt::Debug;
use std::sync::Arc;

pub use self::gates::{Gelu, GeluTanh, Sigmoid, Swish, Tanh};
pub use self::grad::UnaryGrad;
use crate::error::OpError;
use crate::graph::GradBuilder;
use crate::kernels::elementwise::{apply1, apply1_all, same};
use crate::kernels::half::Half;
use crate::kernels::integer::Integer;
use crate::kernels::math::Math;
use crate::ops::binary::slice;
use crate::ops::{ChannelsLast, Cx, Grads, Op, Piece, Row, Spec, get, need, out};
use crate::tensor::{DType, Elem, Meta, View, ViewMut};
use crate::{float_dispatch, int_dispatch};

/// What its vector-Jacobian product needs beside dY.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reads {
    X,
    Y,
    /// Nothing: the function is linear, and its own transpose.
    Linear,
    /// The derivative is zero wherever it exists: not trained through.
    Never,
}

/// One elementwise function.
pub trait Kind: Copy + Debug + Send + Sync + 'static {
    const NAME: &'static str;
    /// The gradient's name.
    const GRAD: &'static str;
    /// On integers, where ONNX has it.
    const INT: Option<fn(i128) -> i128>;

    fn reads(self) -> Reads;
    fn f<T: Math>(self, x: T) -> T;
    /// dX, given dY and what `reads` says.
    fn vjp<T: Math>(self, v: T, dy: T) -> T;

    /// `f` of each.
    #[inline(always)]
    fn f_all<T: Math>(self, y: &mut [T], x: &[T]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = self.f(*x);
        }
    }
    /// `vjp` of each.
    #[inline(always)]
    fn vjp_all<T: Math>(self, dx: &mut [T], v: &[T], dy: &[T]) {
        for ((dx, v), dy) in dx.iter_mut().zip(v).zip(dy) {
            *dx = self.vjp(*v, *dy);
        }
    }
}

/// An elementwise operator.
#[derive(Debug, Clone, Copy)]
pub struct Unary<K>(pub K);

impl<K: Kind> Op for Unary<K> {
    fn name(&self) -> &'static str {
        K::NAME
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        Ok(vec![Meta::new(x.dtype, &x.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (x, y, k) = (get(x, 0), out(y, 0)?, self.0);
        match K::INT {
            Some(f) if !y.dtype.is_float() => integers(x, y, f),
            _ => float_dispatch!(y.dtype, T => {
                sweep(k, slice::<T>(x)?, y.get()?);
                Ok(())
            }),
        }
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], outputs: &[Option<&Meta>]) -> Option<ChannelsLast> {
        ChannelsLast::elementwise(inputs, outputs)
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // dX = dY·f'(X), the derivative written from Y where it can be, so that X need not be kept
        let dy = g.dy0()?;
        let v = match self.0.reads() {
            Reads::X => g.x(0)?,
            Reads::Y => g.y(0)?,
            Reads::Linear => return Ok(Grads::from_slice(&[Some(g.emit(*self, &[dy])?)])),
            Reads::Never => {
                let why = "it is constant between its steps, so its gradient is zero everywhere";
                return Err(OpError::NotDifferentiable(why.into()));
            }
        };
        Ok(Grads::from_slice(&[Some(g.emit(UnaryGrad(self.0), &[v, dy])?)]))
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(0, 0)]
    }

    fn cheap(&self) -> bool {
        true
    }

    fn in_pieces(&self, _: &[Option<&Meta>], _: usize) -> Option<Piece> {
        Piece::elementwise(*self)
    }

    fn halved(&self, _: usize, to: DType) -> Option<Arc<dyn Op>> {
        Some(Arc::new(halved::Halved { of: self.0, to: Half::of(to)? }))
    }
}

// Compiled once, not once a function.
fn integers(x: Option<View>, y: &mut ViewMut, f: fn(i128) -> i128) -> Result<(), OpError> {
    int_dispatch!(y.dtype, T => {
        let y = y.get::<T>()?;
        let walk = same(y.len());
        apply1(y, slice(x)?, &walk, |x: T| T::narrow(f(x.wide())));
        Ok(())
    })
}

/// `y = f(x)`, `x` in `y` when absent. Not inlined, so that it is compiled once.
#[inline(never)]
fn sweep<K: Kind, T: Math + Elem>(k: K, x: Option<&[T]>, y: &mut [T]) {
    let walk = same(y.len());
    apply1_all(
        y,
        x,
        &walk,
        #[inline(always)]
        |y, x| k.f_all(y, x),
    );
}

/// Defines a [`Kind`]: its attributes with their defaults, the function of x, and what `dx` is of x or y.
macro_rules! unary {
    ($(#[$doc:meta])* $name:ident, $onnx:literal $(($($p:ident = $default:expr),+))?;
     $x:ident => $f:expr; $(int $int:expr;)? $(from $reads:expr;)? ($v:ident, $dy:ident) => $d:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq)]
        pub struct $name { $($(pub $p: f32),+)? }

        impl $name {
            #[allow(dead_code)]
            fn row(_spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
                Ok(Arc::new(Unary($name { $($($p: _spec.attrs.float_or(stringify!($p), $default)?),+)? })))
            }
        }

        impl Kind for $name {
            const NAME: &'static str = $onnx;
            const GRAD: &'static str = concat!($onnx, "Grad");
            const INT: Option<fn(i128) -> i128> = unary!(@int $($int)?);

            fn reads(self) -> Reads {
                $($(let $p = self.$p; let _ = $p;)+)?
                unary!(@reads $($reads)?)
            }

            #[inline(always)]
            fn f<T: Math>(self, $x: T) -> T {
                $($(let $p = T::of(self.$p as f64);)+)?
                $f
            }

            #[inline(always)]
            fn vjp<T: Math>(self, $v: T, $dy: T) -> T {
                $($(let $p = T::of(self.$p as f64); let _ = $p;)+)?
                $d
            }
        }
    };
    (@int) => { None };
    (@int $f:expr) => { Some($f) };
    (@reads) => { Reads::X };
    (@reads $e:expr) => { $e };
}

use Reads::{Linear, Never, X, Y};

/// A constant of the computing type.
#[inline(always)]
fn c<T: Math>(x: f64) -> T {
    T::of(x)
}

#[inline(always)]
fn positive<T: Math>(x: T) -> bool {
    x > T::zero()
}

unary!(
    /// ONNX `Relu` (opsets 6, 13, 14).
    Relu, "Relu";
    x => if x < c(0.0) { c(0.0) } else { x };
    int |x| x.max(0);
    from Y; (y, dy) => if positive(y) { dy } else { c(0.0) });
unary!(
    /// ONNX `LeakyRelu` (opsets 6, 16).
    LeakyRelu, "LeakyRelu" (alpha = 0.01);
    x => if x < c(0.0) { alpha * x } else { x };
    // Y has X's sign unless alpha turns or loses it.
    from if alpha > 0.0 { Y } else { X }; (v, dy) => if v < c(0.0) { alpha * dy } else { dy });
unary!(
    /// ONNX `ThresholdedRelu` (opset 10).
    ThresholdedRelu, "ThresholdedRelu" (alpha = 1.0);
    x => if x > alpha { x } else { c(0.0) };
    (x, dy) => if x > alpha { dy } else { c(0.0) });
unary!(
/// ONNX `Elu` (opsets 6, 22).
Elu, "Elu" (alpha = 1.0);
x => if x < c(0.0) { alpha * x.m_expm1() } else { x };
// For negative X the slope is alpha·eˣ = y + alpha, if Y still shows the sign.
from if alpha > 0.0 { Y } else { X };
(v, dy) => {
    let slope = if positive(alpha) { v + alpha } else { alpha * v.m_exp() };
    if v < c(0.0) { slope * dy } else { dy }
});
unary!(
    /// ONNX `Selu` (opsets 6, 22).
    Selu, "Selu" (alpha = 1.673_263_2, gamma = 1.050_701);
    x => gamma * if x > c(0.0) { x } else { alpha * x.m_expm1() };
    (x, dy) => gamma * dy * if x > c(0.0) { c(1.0) } else { alpha * x.m_exp() });
unary!(
    /// ONNX `Celu` (opset 12).
    Celu, "Celu" (alpha = 1.0);
    x => if x < c(0.0) { alpha * (x / alpha).m_expm1() } else { x };
    (x, dy) => if x < c(0.0) { dy * (x / alpha).m_exp() } else { dy });
unary!(
    /// ONNX `HardSigmoid` (opsets 6, 22).
    HardSigmoid, "HardSigmoid" (alpha = 0.2, beta = 0.5);
    x => {
        let y = alpha * x + beta;
        let y = if y < c(0.0) { c(0.0) } else { y };
        if y > c(1.0) { c(1.0) } else { y }
    };
    from Y; (y, dy) => if y > c(0.0) && y < c(1.0) { alpha * dy } else { c(0.0) });
unary!(
/// ONNX `HardSwish` (opsets 14, 22).
HardSwish, "HardSwish";
x => {
    let s = x * c(1.0 / 6.0) + c(0.5);
    let s = if s < c(0.0) { c(0.0) } else { s };
    x * if s > c(1.0) { c(1.0) } else { s }
};
(x, dy) => {
    let inside = dy * (x * c(1.0 / 3.0) + c(0.5));
    let inside = if x < c(-3.0) { c(0.0) } else { inside };
    if x > c(3.0) { dy } else { inside }
});
unary!(
    /// ONNX `Softplus` (opsets 1, 22).
    Softplus, "Softplus";
    x => (-x.abs()).m_exp().m_ln1p() + if x < c(0.0) { c(0.0) } else { x };
    (x, dy) => dy * x.m_sigmoid());
unary!(
/// ONNX `Softsign` (opsets 1, 22).
Softsign, "Softsign";
x => x / (T::one() + x.abs());
(x, dy) => {
    let d = T::one() + x.abs();
    dy / (d * d)
});
unary!(
/// ONNX `Mish` (opsets 18, 22): `x · tanh(softplus(x))`.
Mish, "Mish";
x => x * softplus_tanh(x);
(x, dy) => {
    let t = softplus_tanh(x);
    dy * (t + x * x.m_sigmoid() * (T::one() - t * t))
});
unary!(
    /// ONNX `Shrink` (opset 9).
    Shrink, "Shrink" (lambd = 0.5, bias = 0.0);
    x => if x < -lambd { x + bias } else if x > lambd { x - bias } else { c(0.0) };
    (x, dy) => if x < -lambd || x > lambd { dy } else { c(0.0) });
unary!(
    /// ONNX `Erf` (opsets 9, 13).
    Erf, "Erf";
    x => x.m_erf();
    (x, dy) => dy * c(std::f64::consts::FRAC_2_SQRT_PI) * (-(x * x)).m_exp());
unary!(
    /// ONNX `Exp` (opsets 6, 13).
    Exp, "Exp";
    x => x.m_exp();
    from Y; (y, dy) => dy * y);
unary!(
    /// ONNX `Log` (opsets 6, 13).
    Log, "Log";
    x => x.m_ln();
    (x, dy) => dy / x);
unary!(
    /// ONNX `Sqrt` (opsets 6, 13).
    Sqrt, "Sqrt";
    x => x.m_sqrt();
    from Y; (y, dy) => dy * c(0.5) / y);
unary!(
    /// ONNX `Reciprocal` (opsets 6, 13).
    Reciprocal, "Reciprocal";
    x => T::one() / x;
    from Y; (y, dy) => -dy * y * y);
unary!(
    /// ONNX `Abs` (opsets 6, 13).
    Abs, "Abs";
    x => x.abs();
    int |x| x.abs();
    (x, dy) => if positive(x) { dy } else if x < c(0.0) { -dy } else { c(0.0) });
unary!(
    /// ONNX `Neg` (opsets 6, 13).
    Neg, "Neg";
    x => -x;
    int |x| -x;
    from Linear; (_x, dy) => -dy);
unary!(
    /// ONNX `Sign` (opsets 9, 13).
    Sign, "Sign";
    x => if positive(x) { c(1.0) } else if x < c(0.0) { c(-1.0) } else { x * c(0.0) };
    int |x| x.signum();
    from Never; (_x, _dy) => c(0.0));
unary!(
    /// ONNX `Floor` (opsets 6, 13).
    Floor, "Floor";
    x => x.floor();
    from Never; (_x, _dy) => c(0.0));
unary!(
    /// ONNX `Ceil` (opsets 6, 13).
    Ceil, "Ceil";
    x => x.ceil();
    from Never; (_x, _dy) => c(0.0));
unary!(
    /// ONNX `Round` (opsets 11, 22): halves to even.
    Round, "Round";
    x => x.m_round();
    from Never; (_x, _dy) => c(0.0));
unary!(
    /// ONNX `Sin` (opsets 7, 22).
    Sin, "Sin";
    x => x.m_sin();
    (x, dy) => dy * x.m_cos());
unary!(
    /// ONNX `Cos` (opsets 7, 22).
    Cos, "Cos";
    x => x.m_cos();
    (x, dy) => -dy * x.m_sin());
unary!(
    /// ONNX `Tan` (opsets 7, 22).
    Tan, "Tan";
    x => x.m_tan();
    from Y; (y, dy) => dy * (T::one() + y * y));
unary!(
    /// ONNX `Asin` (opsets 7, 22).
    Asin, "Asin";
    x => x.m_asin();
    (x, dy) => dy / (T::one() - x * x).m_sqrt());
unary!(
    /// ONNX `Acos` (opsets 7, 22).
    Acos, "Acos";
    x => x.m_acos();
    (x, dy) => -dy / (T::one() - x * x).m_sqrt());
unary!(
    /// ONNX `Atan` (opsets 7, 22).
    Atan, "Atan";
    x => x.m_atan();
    (x, dy) => dy / (T::one() + x * x));
unary!(
    /// ONNX `Sinh` (opsets 9, 22).
    Sinh, "Sinh";
    x => x.m_sinh();
    (x, dy) => dy * x.m_cosh());
unary!(
    /// ONNX `Cosh` (opsets 9, 22).
    Cosh, "Cosh";
    x => x.m_cosh();
    (x, dy) => dy * x.m_sinh());
unary!(
    /// ONNX `Asinh` (opsets 9, 22).
    Asinh, "Asinh";
    x => x.m_asinh();
    (x, dy) => dy / (T::one() + x * x).m_sqrt());
unary!(
    /// ONNX `Acosh` (opsets 9, 22).
    Acosh, "Acosh";
    x => x.m_acosh();
    (x, dy) => dy / (x * x - T::one()).m_sqrt());
unary!(
    /// ONNX `Atanh` (opsets 9, 22).
    Atanh, "Atanh";
    x => x.m_atanh();
    (x, dy) => dy / (T::one() - x * x));

/// `tanh(ln(1 + eˣ))` = n / (n + 2) with n = e²ˣ + 2eˣ.
#[inline(always)]
fn softplus_tanh<T: Math>(x: T) -> T {
    let e = (if x > c(20.0) { c(20.0) } else { x }).m_exp();
    let n = e * (e + c(2.0));
    n / (n + c(2.0))
}

pub(super) const ROWS: &[Row] = &[
    Row::new("Abs", 6, Abs::row),
    Row::new("Acos", 7, Acos::row),
    Row::new("Acosh", 9, Acosh::row),
    Row::new("Asin", 7, Asin::row),
    Row::new("Asinh", 9, Asinh::row),
    Row::new("Atan", 7, Atan::row),
    Row::new("Atanh", 9, Atanh::row),
    Row::new("Ceil", 6, Ceil::row),
    Row::new("Celu", 12, Celu::row),
    Row::new("Cos", 7, Cos::row),
    Row::new("Cosh", 9, Cosh::row),
    Row::new("Elu", 6, Elu::row),
    Row::new("Erf", 9, Erf::row),
    Row::new("Exp", 6, Exp::row),
    Row::new("Floor", 6, Floor::row),
    Row::new("Gelu", 20, Gelu::row),
    Row::new("HardSigmoid", 6, HardSigmoid::row),
    Row::new("HardSwish", 14, HardSwish::row),
    Row::new("LeakyRelu", 6, LeakyRelu::row),
    Row::new("Log", 6, Log::row),
    Row::new("Mish", 18, Mish::row),
    Row::new("Neg", 6, Neg::row),
    Row::new("Reciprocal", 6, Reciprocal::row),
    Row::new("Relu", 6, Relu::row),
    Row::new("Round", 11, Round::row),
    Row::new("Selu", 6, Selu::row),
    Row::new("Shrink", 9, Shrink::row),
    Row::new("Sigmoid", 6, Sigmoid::row),
    Row::new("Sign", 9, Sign::row),
    Row::new("Sin", 7, Sin::row),
    Row::new("Sinh", 9, Sinh::row),
    Row::new("Softplus", 1, Softplus::row),
    Row::new("Softsign", 1, Softsign::row),
    Row::new("Sqrt", 6, Sqrt::row),
    Row::new("Swish", 24, Swish::row),
    Row::new("Tan", 7, Tan::row),
    Row::new("Tanh", 6, Tanh::row),
    Row::new("ThresholdedRelu", 10, ThresholdedRelu::row),
];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    let mut cases = Vec::new();
    // Over most of the line, at points away from every kink (0, ±0.5, ±1, ±3).
    let line: Vec<f64> = (0..24).map(|i| -5.87 + 0.51 * i as f64).collect();
    for op in [
        "Abs",
        "Atan",
        "Celu",
        "Cos",
        "Cosh",
        "Elu",
        "Erf",
        "Exp",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "LeakyRelu",
        "Mish",
        "Neg",
        "Relu",
        "Selu",
        "Shrink",
        "Sigmoid",
        "Sin",
        "Sinh",
        "Softplus",
        "Softsign",
        "Swish",
        "Tanh",
        "ThresholdedRelu",
        "Asinh",
    ] {
        cases.push(Case::new(op, 25).given(&[2, 3, 4], &line));
        cases.push(Case::new(op, 25).named("scalar").given(&[], &[0.3]));
        cases.push(Case::new(op, 25).named("empty").given(&[0, 2], &[]));
    }
    for op in ["Ceil", "Floor", "Round", "Sign"] {
        cases.push(Case::new(op, 25).given(&[2, 3, 4], &line).forward_only());
    }
    for op in ["Log", "Sqrt", "Reciprocal"] {
        cases.push(Case::new(op, 13).within(&[3, 5], 0.1, 4.0));
    }
    for op in ["Acos", "Asin", "Atanh", "Tan"] {
        cases.push(Case::new(op, 7.max(if op == "Atanh" { 9 } else { 7 })).within(&[3, 5], -0.9, 0.9));
    }
    cases.push(Case::new("Acosh", 9).within(&[7], 1.1, 4.0));
    cases.push(Case::new("Gelu", 20).named("tanh").string("approximate", "tanh").given(&[24], &line));
    for (op, opset) in
        [("Elu", 6), ("LeakyRelu", 6), ("Celu", 12), ("ThresholdedRelu", 10), ("HardSigmoid", 6)]
    {
        cases.push(Case::new(op, opset).named("alpha").float("alpha", 0.3).given(&[4, 6], &line));
    }
    for op in ["Elu", "LeakyRelu"] {
        cases.push(Case::new(op, 16).named("negative alpha").float("alpha", -0.3).given(&[4, 6], &line));
    }
    cases
        .push(Case::new("Selu", 6).named("both").float("alpha", 1.5).float("gamma", 2.0).given(&[24], &line));
    cases.push(
        Case::new("Shrink", 9).named("both").float("lambd", 1.2).float("bias", 0.7).given(&[24], &line),
    );
    cases.push(Case::new("Swish", 24).named("alpha").float("alpha", 1.7).given(&[24], &line));
    cases.push(Case::new("Tanh", 13).named("parallel").input(&[3, 9001]));
    for op in ["Abs", "Neg", "Sign", "Relu"] {
        let ints = crate::tensor::Tensor::ints(&[-3, 0, 5]);
        cases.push(Case::new(op, 14).named("int64").fixed(ints).forward_only());
    }
    cases
}

#[cfg(test)]
mod tests;
