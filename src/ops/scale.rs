//! Normalisations and gates that are a few nodes of other operators: LpNormalization, MeanVarianceNormalization,
//! SwiGLU.

use crate::error::OpError;
use crate::graph::{Lowering, ValueId};
use crate::ops::binary::{Div, Sub};
use crate::ops::composite::{Made, defined, one};
use crate::ops::logic::{Logic, Where};
use crate::ops::reduce::{Kind, Reduce};
use crate::ops::unary::{Sqrt, Swish, Unary};
use crate::ops::{Attrs, Row};

fn reduce(l: &mut Lowering, kind: Kind, axes: &[i64], x: ValueId) -> Result<ValueId, OpError> {
    l.emit(Reduce { kind, axes: Some(axes.to_vec()), keepdims: true, noop: true }, &[x])
}

/// ONNX `LpNormalization` (opsets 1, 22): X over its norm of order `p` (1 or 2) along `axis`; 0 where that is 0.
fn lp(a: &Attrs, l: &mut Lowering) -> Made {
    let kind = match a.int_or("p", 2)? {
        1 => Kind::L1,
        2 => Kind::L2,
        p => return Err(OpError::Attribute(format!("'p' is {p}"))),
    };
    let x = l.x(0)?;
    let norm = reduce(l, kind, &[a.int_or("axis", -1)?], x)?;
    let dtype = l.dtype(x)?;
    let (zero, one_) = (l.scalar(0.0, dtype), l.scalar(1.0, dtype));
    let none = l.emit(Logic::Equal, &[norm, zero])?;
    let divisor = l.emit(Where, &[none, one_, norm])?;
    one(l.emit(Div, &[x, divisor]))
}

/// ONNX `MeanVarianceNormalization` (opsets 9, 13): (X − mean) over (deviation + 10⁻⁹), over `axes`.
fn mean_variance(a: &Attrs, l: &mut Lowering) -> Made {
    let axes = a.ints("axes")?.unwrap_or_else(|| vec![0, 2, 3]);
    let x = l.x(0)?;
    let mean = reduce(l, Kind::Mean, &axes, x)?;
    let centred = l.emit(Sub, &[x, mean])?;
    let square = l.mul(centred, centred)?;
    let variance = reduce(l, Kind::Mean, &axes, square)?;
    let deviation = l.emit(Unary(Sqrt {}), &[variance])?;
    let epsilon = l.scalar(1e-9, l.dtype(x)?);
    let divisor = l.add(deviation, epsilon)?;
    one(l.emit(Div, &[centred, divisor]))
}

/// ONNX `SwiGLU` (opset 28): Swish of the first operand, times the second.
fn swiglu(a: &Attrs, l: &mut Lowering) -> Made {
    let (gate, x) = (l.x(0)?, l.x(1)?);
    if l.dims(gate)? != l.dims(x)? {
        return Err(OpError::Shape("the operands of SwiGLU differ in shape".into()));
    }
    let gate = l.emit(Unary(Swish { alpha: a.float_or("alpha", 1.0)? }), &[gate])?;
    one(l.mul(gate, x))
}

pub(super) const ROWS: &[Row] = &[
    Row::new("LpNormalization", 1, |s| defined(s, "LpNormalization", 1, lp)),
    Row::new("MeanVarianceNormalization", 9, |s| defined(s, "MeanVarianceNormalization", 1, mean_variance)),
    Row::new("SwiGLU", 28, |s| defined(s, "SwiGLU", 1, swiglu)),
];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    vec![
        Case::new("LpNormalization", 22).within(&[2, 3, 4], 0.2, 1.0),
        Case::new("LpNormalization", 1).named("of 1").int("p", 1).int("axis", 1).within(&[2, 3, 4], 0.2, 1.0),
        Case::new("LpNormalization", 22).named("zeros").given(&[2, 2], &[0.0, 0.0, 1.0, 2.0]).forward_only(),
        Case::new("MeanVarianceNormalization", 13).input(&[2, 3, 4, 5]),
        Case::new("MeanVarianceNormalization", 9).named("axes").ints("axes", &[-1]).input(&[2, 3, 6]),
        Case::new("SwiGLU", 28).float("alpha", 1.3).input(&[2, 5]).input(&[2, 5]),
    ]
}
