//! Arithmetic of two operands with multidirectional broadcasting, and its gradients.

use std::sync::Arc;

use num_traits::AsPrimitive;

use crate::error::OpError;
use crate::graph::{GradBuilder, Lowering};
use crate::kernels::elementwise::{Walk, apply_at, apply1, apply2, apply3, same};
use crate::kernels::integer::Integer;
use crate::kernels::isa::Wide;
use crate::kernels::math::Math;
use crate::ops::cast::CastTo;
use crate::ops::composite::{Made, Recipe, composite, one};
use crate::ops::unary::{Neg, Unary};
use crate::ops::{ChannelsLast, Cx, Grads, Op, Row, Spec, get, need, out};
use crate::tensor::{DType, Elem, Meta, View, ViewMut, axis, broadcast};
use crate::{dtype_dispatch, float_dispatch, int_dispatch};

/// ONNX's arithmetic of two operands, `f32`, `f64` and integers, from opset 6.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Binary {
    Add,
    Sub,
    Mul,
    Div,
    /// The result has the base's type; the exponent may be of another.
    Pow,
    /// NaN where either operand is.
    Min,
    Max,
    /// `fmod`: the result has the dividend's sign (C), else the divisor's (Python; of floats from opset 28).
    Mod {
        fmod: bool,
    },
    /// `x` where `x ≥ 0`, else `slope · x`.
    PRelu,
}

pub use Binary::{Add, Div, Max, Min, Mul, PRelu, Pow, Sub};

/// The in-place pairs of what is computed element by element from two operands of one type.
pub(super) const EITHER: &[(usize, usize)] = &[(0, 0), (1, 0)];

/// `y = f(a, b)`, one of which may lie in `y`.
pub(super) fn apply<T: Elem + Wide>(
    x: &[Option<View>],
    y: &mut ViewMut,
    f: impl Fn(T, T) -> T + Sync + Copy,
) -> Result<(), OpError> {
    let (a, b) = (get(x, 0), get(x, 1));
    if a.is_none() && b.is_none() {
        return Err(OpError::Shape("both operands are missing".into()));
    }
    let dims = y.dims;
    let walk = Walk::new(dims, [a.map_or(dims, |a| a.dims), b.map_or(dims, |b| b.dims)]);
    apply2(y.get::<T>()?, slice(a)?, slice(b)?, &walk, f);
    Ok(())
}

/// The elements of an operand that may be absent.
pub(super) fn slice<'a, T: Elem>(x: Option<View<'a>>) -> Result<Option<&'a [T]>, OpError> {
    x.map(|x| x.get::<T>()).transpose()
}

impl Op for Binary {
    fn name(&self) -> &'static str {
        match self {
            Add => "Add",
            Sub => "Sub",
            Mul => "Mul",
            Div => "Div",
            Pow => "Pow",
            Min => "Min",
            Max => "Max",
            Binary::Mod { .. } => "Mod",
            PRelu => "PRelu",
        }
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (a, b) = (need(inputs, 0)?, need(inputs, 1)?);
        if a.dtype != b.dtype && *self != Pow {
            return Err(OpError::Type(format!("operands of types {} and {}", a.dtype, b.dtype)));
        }
        if [a.dtype, b.dtype].contains(&DType::Bool) {
            return Err(OpError::Type("bool where numbers are computed".into()));
        }
        match self {
            PRelu if broadcast(&a.dims, &b.dims)? != a.dims => {
                let what = format!("slope {:?} does not broadcast to {:?}", &b.dims[..], &a.dims[..]);
                return Err(OpError::Shape(what));
            }
            _ => {}
        }
        Ok(vec![Meta::new(a.dtype, &broadcast(&a.dims, &b.dims)?)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let y = out(y, 0)?;
        if *self == Pow
            && let (Some(a), Some(b)) = (x[0], x[1])
            && a.dtype != b.dtype
        {
            return mixed_pow(a, b, y);
        }
        if y.dtype.is_float() {
            float_dispatch!(y.dtype, T => self.floats::<T>(x, y))
        } else {
            int_dispatch!(y.dtype, T => self.integers::<T>(x, y))
        }
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], outputs: &[Option<&Meta>]) -> Option<ChannelsLast> {
        ChannelsLast::elementwise(inputs, outputs)
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        let (a, b, dy) = (g.x(0)?, g.x(1)?, g.dy0()?);
        let (mut da, mut db) = (None, None);
        // Whatever was broadcast is summed out by the driver.
        match self {
            // dA = dY, dB = dY
            Add => (da, db) = (Some(dy), Some(dy)),
            // dA = dY, dB = −dY
            Sub => {
                da = Some(dy);
                if g.wants(1) {
                    db = Some(g.emit(Unary(Neg {}), &[dy])?);
                }
            }
            // dA = dY·B, dB = dY·A
            Mul => {
                if g.wants(0) {
                    da = Some(g.emit(Mul, &[dy, b])?);
                }
                if g.wants(1) {
                    db = Some(g.emit(Mul, &[dy, a])?);
                }
            }
            // dA = dY/B, dB = −dY·Y/B
            Div => {
                if g.wants(0) {
                    da = Some(g.emit(Div, &[dy, b])?);
                }
                if g.wants(1) {
                    let y = g.y(0)?;
                    db = Some(g.emit(BinaryGrad::DivB, &[dy, y, b])?);
                }
            }
            // dA = dY·B·A^(B−1), dB = dY·Y·ln A
            Pow => {
                if g.wants(0) {
                    let dtype = g.meta(a)?.dtype;
                    let b = if g.meta(b)?.dtype == dtype { b } else { g.emit(CastTo::new(dtype), &[b])? };
                    da = Some(g.emit(BinaryGrad::PowA, &[dy, a, b])?);
                }
                if g.wants(1) {
                    let (base, power) = (g.meta(a)?.dtype, g.meta(b)?.dtype);
                    if base != power {
                        let why = format!("the exponent, {power}, of a base of type {base}");
                        return Err(OpError::NotDifferentiable(why));
                    }
                    let y = g.y(0)?;
                    db = Some(g.emit(BinaryGrad::PowB, &[dy, y, a])?);
                }
            }
            // dA = dY where A < B (Max: A > B), half of it where they are equal; dB the rest
            Min | Max => {
                let (first, second) = match self {
                    Min => (BinaryGrad::Less, BinaryGrad::Greater),
                    _ => (BinaryGrad::Greater, BinaryGrad::Less),
                };
                if g.wants(0) {
                    da = Some(g.emit(first, &[dy, a, b])?);
                }
                if g.wants(1) {
                    db = Some(g.emit(second, &[dy, a, b])?);
                }
            }
            // dA = dY; by B it is piecewise linear, and rarely meant
            Binary::Mod { .. } => {
                if g.wants(1) {
                    return Err(OpError::NotDifferentiable("Mod by its divisor".into()));
                }
                da = Some(dy);
            }
            // dX = dY·(X ≥ 0 ? 1 : slope), dSlope = dY·X where X < 0
            PRelu => {
                if g.wants(0) {
                    da = Some(g.emit(BinaryGrad::PReluX, &[dy, a, b])?);
                }
                if g.wants(1) {
                    db = Some(g.emit(BinaryGrad::PReluSlope, &[dy, a, b])?);
                }
            }
        }
        Ok(Grads::from_slice(&[da, db]))
    }

    fn in_place(&self) -> &[(usize, usize)] {
        // A power's exponent may be of another type, of the same size.
        if *self == Pow { &[] } else { EITHER }
    }

    fn cheap(&self) -> bool {
        *self != Pow
    }
}

impl Binary {
    fn floats<T: Math>(self, x: &[Option<View>], y: &mut ViewMut) -> Result<(), OpError> {
        let zero = T::zero();
        match self {
            Add => apply::<T>(x, y, |a, b| a + b),
            Sub => apply::<T>(x, y, |a, b| a - b),
            Mul => apply::<T>(x, y, |a, b| a * b),
            Div => apply::<T>(x, y, |a, b| a / b),
            Min => apply::<T>(x, y, |a, b| if a < b || a.is_nan() { a } else { b }),
            Max => apply::<T>(x, y, |a, b| if a > b || a.is_nan() { a } else { b }),
            PRelu => apply::<T>(x, y, |a, slope| if a < zero { slope * a } else { a }),
            Binary::Mod { fmod: true } => apply::<T>(x, y, (|a, b| a % b) as fn(T, T) -> T),
            Binary::Mod { fmod: false } => {
                let modulo = |a: T, b: T| {
                    let r = a % b;
                    if r != T::zero() && (r < T::zero()) != (b < T::zero()) { r + b } else { r }
                };
                apply::<T>(x, y, modulo as fn(T, T) -> T)
            }
            Pow => match single(get(x, 1))? {
                Some(b) => power::<T>(get(x, 0), y, b),
                None => apply::<T>(
                    x,
                    y,
                    #[inline(always)]
                    |a, b| a.m_pow(b),
                ),
            },
        }
    }

    fn integers<T: Integer + Wide>(self, x: &[Option<View>], y: &mut ViewMut) -> Result<(), OpError> {
        let f: fn(T, T) -> T = match self {
            Add => T::add,
            Sub => T::sub,
            Mul => T::mul,
            Div => T::div,
            Pow => T::power,
            Min => Ord::min,
            Max => Ord::max,
            Binary::Mod { fmod: true } => T::rem,
            Binary::Mod { fmod: false } => T::modulo,
            PRelu => |a, slope| if a < T::default() { slope.mul(a) } else { a },
        };
        apply::<T>(x, y, f)
    }
}

/// `y = a^b` for a single exponent; a base that is absent lies in `y`.
fn power<T: Math>(a: Option<View>, y: &mut ViewMut, b: f64) -> Result<(), OpError> {
    let (a, y) = (slice::<T>(a)?, y.get::<T>()?);
    let walk = same(y.len());
    let half_power = |a: T| {
        // Where a square root differs from a power: −∞ and −0.
        if a == T::neg_infinity() { T::infinity() } else { a.m_sqrt() + T::zero() }
    };
    match b {
        2.0 => apply1(y, a, &walk, |a: T| a * a),
        3.0 => apply1(y, a, &walk, |a: T| a * a * a),
        -1.0 => apply1(y, a, &walk, |a: T| T::one() / a),
        0.5 => apply1(y, a, &walk, half_power),
        _ => {
            let b = T::of(b);
            apply1(
                y,
                a,
                &walk,
                #[inline(always)]
                |a: T| a.m_pow(b),
            );
        }
    }
    Ok(())
}

/// The number that an operand of one element is.
fn single(x: Option<View>) -> Result<Option<f64>, OpError> {
    x.filter(|x| x.len() == 1).map(|x| number(x, 0)).transpose()
}

/// Element `i` of an operand.
fn number(x: View, i: usize) -> Result<f64, OpError> {
    dtype_dispatch!(x.dtype, T => Ok(x.get::<T>()?[i].as_()))
}

/// A base and an exponent of different types, in f64.
fn mixed_pow(a: View, b: View, y: &mut ViewMut) -> Result<(), OpError> {
    let walk = Walk::new(y.dims, [a.dims, b.dims]);
    let exponent = |i: usize| number(b, i).unwrap_or(f64::NAN);
    match y.dtype.is_float() {
        true if b.len() == 1 => float_dispatch!(y.dtype, T => power::<T>(Some(a), y, exponent(0))),
        true => float_dispatch!(y.dtype, T => {
            let (a, y) = (a.get::<T>()?, y.get::<T>()?);
            apply_at(y, &walk, &|i, j| a[i].m_pow(exponent(j) as T));
            Ok(())
        }),
        false => int_dispatch!(y.dtype, T => {
            let (a, y) = (a.get::<T>()?, y.get::<T>()?);
            apply_at(y, &walk, &|i, j| (a[i] as f64).powf(exponent(j)) as T);
            Ok(())
        }),
    }
}

/// Gradients of [`Binary`] that need more than `Binary` itself: of (dY, p, q), all broadcast to dY's shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BinaryGrad {
    /// (dY, Y, B): −dY·Y/B
    DivB,
    /// (dY, A, B): dY·B·A^(B−1)
    PowA,
    /// (dY, Y, A): dY·Y·ln A
    PowB,
    /// (dY, A, B): dY where A < B, the half where A = B
    Less,
    /// (dY, A, B): dY where A > B, the half where A = B
    Greater,
    /// (dY, X, slope): dY·(X ≥ 0 ? 1 : slope)
    PReluX,
    /// (dY, X, slope): dY·X where X < 0
    PReluSlope,
}

impl Op for BinaryGrad {
    fn name(&self) -> &'static str {
        match self {
            BinaryGrad::DivB => "DivGrad",
            BinaryGrad::PowA | BinaryGrad::PowB => "PowGrad",
            BinaryGrad::Less | BinaryGrad::Greater => "MinMaxGrad",
            BinaryGrad::PReluX | BinaryGrad::PReluSlope => "PReluGrad",
        }
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (dy, p, q) = (need(inputs, 0)?, need(inputs, 1)?, need(inputs, 2)?);
        if broadcast(&broadcast(&p.dims, &q.dims)?, &dy.dims)? != dy.dims {
            return Err(OpError::Internal("operands that do not broadcast to the gradient".into()));
        }
        Ok(vec![Meta::new(dy.dtype, &dy.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let y = out(y, 0)?;
        float_dispatch!(y.dtype, T => self.floats::<T>(x, y))
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], outputs: &[Option<&Meta>]) -> Option<ChannelsLast> {
        ChannelsLast::elementwise(inputs, outputs)
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable(format!("second derivatives ({})", self.name())))
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(0, 0)]
    }
}

impl BinaryGrad {
    fn floats<T: Math>(self, x: &[Option<View>], y: &mut ViewMut) -> Result<(), OpError> {
        let (zero, one, half) = (T::zero(), T::one(), T::of(0.5));
        match self {
            BinaryGrad::DivB => ternary::<T>(x, y, |dy, y, b| -dy * y / b),
            BinaryGrad::PowA => match single(get(x, 2))? {
                Some(2.0) => ternary::<T>(x, y, |dy, a, _| dy * (a + a)),
                Some(3.0) => ternary::<T>(x, y, |dy, a, _| dy * T::of(3.0) * a * a),
                Some(0.5) => ternary::<T>(x, y, |dy, a, _| dy * half / a.m_sqrt()),
                _ => ternary::<T>(
                    x,
                    y,
                    #[inline(always)]
                    |dy, a, b| {
                        // A constant power of a zero base would otherwise be 0·∞.
                        if b == zero { zero } else { dy * b * a.m_pow(b - one) }
                    },
                ),
            },
            // 0 where A = 0: Y vanishes faster than the logarithm grows.
            BinaryGrad::PowB => ternary::<T>(
                x,
                y,
                #[inline(always)]
                |dy, y, a| if a == zero { zero } else { dy * y * a.m_ln() },
            ),
            BinaryGrad::Less => ternary::<T>(x, y, |dy, a, b| {
                if a < b {
                    dy
                } else if a == b {
                    dy * half
                } else {
                    zero
                }
            }),
            BinaryGrad::Greater => ternary::<T>(x, y, |dy, a, b| {
                if a > b {
                    dy
                } else if a == b {
                    dy * half
                } else {
                    zero
                }
            }),
            BinaryGrad::PReluX => ternary::<T>(x, y, |dy, x, slope| if x < zero { dy * slope } else { dy }),
            BinaryGrad::PReluSlope => ternary::<T>(x, y, |dy, x, _| if x < zero { dy * x } else { zero }),
        }
    }
}

/// `y = f(x₀, x₁, x₂)`, the first of which may lie in `y`.
fn ternary<T: Elem + Wide>(
    x: &[Option<View>],
    y: &mut ViewMut,
    f: impl Fn(T, T, T) -> T + Sync + Copy,
) -> Result<(), OpError> {
    let (d, p, q) = (get(x, 0), need(x, 1)?, need(x, 2)?);
    let walk = Walk::new(y.dims, [y.dims, p.dims, q.dims]);
    let operands = (slice(d)?, Some(p.get::<T>()?), Some(q.get::<T>()?));
    apply3(y.get::<T>()?, operands, &walk, f);
    Ok(())
}

/// As before opset 7: the second operand's first axis lies under a given one of the first operand.
#[derive(Debug)]
struct Aligned {
    op: Binary,
    axis: i64,
}

impl Recipe for Aligned {
    fn name(&self) -> &'static str {
        self.op.name()
    }

    fn lower(&self, l: &mut Lowering) -> Made {
        let (a, b) = (l.x(0)?, l.x(1)?);
        let (rank, mut dims) = (l.meta(a)?.rank(), l.dims(b)?);
        let at = axis(self.axis, rank.max(1))?;
        if l.meta(b)?.len() != 1 {
            let below = rank.checked_sub(at + dims.len()).ok_or_else(|| {
                OpError::Shape(format!("{:?} under axis {at} of a tensor of rank {rank}", &dims[..]))
            })?;
            dims.extend(std::iter::repeat_n(1, below));
        }
        let b = l.reshape(b, &dims)?;
        one(l.emit(self.op, &[a, b]))
    }
}

/// Arithmetic of any opset: before 7 with `broadcast` and `axis`.
fn arithmetic(spec: &Spec, op: Binary) -> Result<Arc<dyn Op>, OpError> {
    match spec.attrs.int("axis")? {
        Some(axis) if spec.opset < 7 && spec.attrs.flag("broadcast")? => composite(Aligned { op, axis }),
        _ => Ok(Arc::new(op)),
    }
}

/// Before opset 7 the slopes are the channels'.
fn prelu(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
    if spec.opset < 7 { composite(Aligned { op: PRelu, axis: 1 }) } else { Ok(Arc::new(PRelu)) }
}

fn modulo(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
    Ok(Arc::new(Binary::Mod { fmod: spec.attrs.flag("fmod")? }))
}

pub(super) const ROWS: &[Row] = &[
    Row::new("Add", 6, |s| arithmetic(s, Add)),
    Row::new("Sub", 6, |s| arithmetic(s, Sub)),
    Row::new("Mul", 6, |s| arithmetic(s, Mul)),
    Row::new("Div", 6, |s| arithmetic(s, Div)),
    Row::new("Pow", 1, |s| arithmetic(s, Pow)),
    Row::new("Mod", 10, modulo),
    Row::new("PRelu", 6, prelu),
];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    use crate::tensor::Tensor;
    let mut cases = Vec::new();
    for op in ["Add", "Sub", "Mul", "Div", "Pow"] {
        let (low, high) = (0.5, 1.5);
        let two = |name: &str, a: &[usize], b: &[usize]| {
            Case::new(op, 13).named(name).within(a, low, high).within(b, low, high)
        };
        cases.extend([
            two("same shape", &[2, 3], &[2, 3]),
            two("column", &[2, 3, 4], &[3, 1]),
            two("row", &[2, 3, 4], &[4]),
            two("channel", &[2, 3, 4, 5], &[1, 3, 1, 1]),
            two("scalar", &[2, 3], &[]),
            two("scalar first", &[], &[2, 3]),
            two("both ways", &[3, 1, 4], &[5, 1]),
            two("alternating", &[2, 1, 3, 1, 2, 1], &[1, 2, 1, 3, 1, 2]),
            two("empty", &[0, 3], &[1, 3]),
            two("parallel", &[3, 1, 9001], &[1, 2, 9001]),
        ]);
        let ints = |t: &[i64]| Tensor::ints(t);
        cases.push(
            Case::new(op, 13).named("int64").fixed(ints(&[7, -7, 3])).fixed(ints(&[2, 2, 0])).forward_only(),
        );
    }
    for power in [2.0, 3.0, 0.5, -1.0, 1.5, 0.0] {
        let scalar = Tensor::scalar(power);
        cases.push(Case::new("Pow", 7).named(&format!("to {power}")).within(&[3, 4], 0.5, 2.0).fixed(scalar));
    }
    cases.push(
        Case::new("Pow", 13).named("int exponent").within(&[3], -2.0, -1.0).fixed(Tensor::ints(&[3, 2, -1])),
    );
    cases.push(
        Case::new("Pow", 13)
            .named("int base")
            .fixed(Tensor::ints(&[3, -2]))
            .fixed(Tensor::scalar(2.0))
            .forward_only(),
    );
    for fmod in [0, 1] {
        let (a, b) = (Tensor::ints(&[-4, 7, 5, 4, -7, 8]), Tensor::ints(&[2, -3, 8, -2, 3, 0]));
        cases.push(Case::new("Mod", 13).named("int").int("fmod", fmod).fixed(a).fixed(b).forward_only());
    }
    let old = |op: &str| Case::new(op, 6).named("opset 6");
    let under = |axis| old("Add").int("broadcast", 1).int("axis", axis).input(&[2, 3, 4]);
    cases.extend([under(0).input(&[2, 3]), under(1).input(&[3]), under(-1).input(&[4]), under(0).input(&[])]);
    cases.push(old("PRelu").given(&[1, 2, 3], &[-0.5, 0.7, 0.3, -0.2, 0.9, -1.2]).input(&[2]));
    let divisor = Tensor::scalar(0.75);
    cases.push(Case::new("Mod", 10).int("fmod", 1).given(&[3], &[-4.3, 7.2, 5.0]).fixed(divisor));
    let divisor = Tensor::scalar(-0.75);
    cases
        .push(Case::new("Mod", 28).named("the divisor's sign").given(&[3], &[-4.3, 7.2, 5.0]).fixed(divisor));
    let signs = [-0.5, 0.7, 0.3, -0.2, 0.9, -1.2];
    cases.push(Case::new("PRelu", 7).given(&[1, 2, 3], &signs).input(&[2, 1]));
    cases.push(Case::new("PRelu", 16).named("same shape").given(&[2, 3], &signs).input(&[2, 3]));
    cases
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::eval;
    use crate::tensor::Tensor;

    #[test]
    fn in_place_gives_the_same_bits() {
        let n = 40_000;
        let data = |k: usize| -> Vec<f32> { (0..n).map(|i| ((i * k) % 1013) as f32 - 300.5).collect() };
        let full = Tensor::from_slice(&[4, n / 4], &data(7)).unwrap();
        let row = Tensor::from_slice(&[n / 4], &data(11)[..n / 4]).unwrap();
        for op in [Add, Sub, Mul, Div, Min, Max, PRelu] {
            for (a, b, pair) in [(&full, &row, 0), (&full, &full, 1), (&row, &full, 1)] {
                let Ok(want) = eval(&op, &[Some(a), Some(b)]) else { continue };
                let mut got = if pair == 0 { a.clone() } else { b.clone() };
                let mut x = [Some(a.view()), Some(b.view())];
                x[pair] = None;
                let cx = &mut Cx { scratch: &mut [], seed: 0 };
                op.forward(cx, &x, &mut [Some(got.view_mut())]).unwrap();
                assert!(got.bytes() == want[0].bytes(), "{op:?} in the buffer of operand {pair}");
            }
        }
    }

    #[test]
    fn integers_as_numpy_has_them() {
        let run = |op: Binary, a: &[i64], b: &[i64]| {
            let y = eval(&op, &[Some(&Tensor::ints(a)), Some(&Tensor::ints(b))]).unwrap();
            y[0].to_ints().unwrap()
        };
        let (a, b) = ([-4, 7, 5, 4, -7, 8], [2, -3, 8, -2, 3, 5]);
        assert_eq!(run(Binary::Mod { fmod: false }, &a, &b), [0, -2, 5, 0, 2, 3]);
        assert_eq!(run(Binary::Mod { fmod: true }, &a, &b), [0, 1, 5, 0, -1, 3]);
        assert_eq!(run(Div, &[7, -7, 1, i64::MIN], &[2, 2, 0, -1]), [3, -3, 0, i64::MIN]);
        assert_eq!(run(Pow, &[2, -3, -1, 2], &[10, 3, -3, -1]), [1024, -27, -1, 0]);
    }
}
