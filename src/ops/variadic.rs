//! Elementwise operators of any number of operands: `Sum`, `Mean`, `Max`, `Min`.

use std::sync::Arc;

use crate::error::OpError;
use crate::graph::{GradBuilder, ValueId};
use crate::kernels::elementwise::{Walk, apply1, apply2, same};
use crate::kernels::isa::Wide;
use crate::kernels::math::Math;
use crate::ops::binary::{Binary, BinaryGrad, EITHER, Mul, apply};
use crate::ops::{ChannelsLast, Cx, Grads, Op, Row, Spec, get, need, out};
use crate::tensor::{DType, Dims, Meta, View, ViewMut, broadcast};
use crate::{float_dispatch, int_dispatch};

/// ONNX `Sum`, `Mean`, `Max`, `Min` (opset 8 on: broadcast) of one operand or more, folded from the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variadic {
    Sum,
    Mean,
    Max,
    Min,
}

impl Op for Variadic {
    fn name(&self) -> &'static str {
        match self {
            Variadic::Sum => "Sum",
            Variadic::Mean => "Mean",
            Variadic::Max => "Max",
            Variadic::Min => "Min",
        }
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let first = need(inputs, 0)?;
        let mut dims: Dims = first.dims.clone();
        for i in 1..inputs.len() {
            let x = need(inputs, i)?;
            if x.dtype != first.dtype {
                return Err(OpError::Type(format!("operands of types {} and {}", first.dtype, x.dtype)));
            }
            dims = broadcast(&dims, &x.dims)?;
        }
        let float_only = matches!(self, Variadic::Sum | Variadic::Mean);
        if first.dtype == DType::Bool || (float_only && !first.dtype.is_float()) {
            return Err(OpError::Type(format!("{} of {}", self.name(), first.dtype)));
        }
        Ok(vec![Meta::new(first.dtype, &dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let y = out(y, 0)?;
        if y.dtype.is_float() {
            float_dispatch!(y.dtype, T => self.floats::<T>(x, y))
        } else {
            int_dispatch!(y.dtype, T => {
                let f: fn(T, T) -> T = if *self == Variadic::Max { Ord::max } else { Ord::min };
                fold::<T>(x, y, f)
            })
        }
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], outputs: &[Option<&Meta>]) -> Option<ChannelsLast> {
        ChannelsLast::elementwise(inputs, outputs)
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        let (n, dy) = (g.inputs(), g.dy0()?);
        match self {
            // dXᵢ = dY
            Variadic::Sum => Ok((0..n).map(|_| Some(dy)).collect()),
            // dXᵢ = dY/n
            Variadic::Mean => {
                let dtype = g.meta(dy)?.dtype;
                let scale = g.scalar(1.0 / n as f64, dtype);
                let d = g.emit(Mul, &[dy, scale])?;
                Ok((0..n).map(|_| Some(d)).collect())
            }
            Variadic::Max => extreme(g, Binary::Max, BinaryGrad::Greater, BinaryGrad::Less),
            Variadic::Min => extreme(g, Binary::Min, BinaryGrad::Less, BinaryGrad::Greater),
        }
    }

    fn in_place(&self) -> &[(usize, usize)] {
        EITHER
    }

    fn cheap(&self) -> bool {
        true
    }
}

/// mᵢ = max(mᵢ₋₁, xᵢ) backwards: dXᵢ = dMᵢ where xᵢ > mᵢ₋₁ (half where equal), dMᵢ₋₁ the rest.
/// The partial maxima are computed again; there are none for two operands.
fn extreme(g: &mut GradBuilder, op: Binary, first: BinaryGrad, second: BinaryGrad) -> Result<Grads, OpError> {
    let n = g.inputs();
    let mut partial: Vec<ValueId> = vec![g.x(0)?];
    for i in 1..n.saturating_sub(1) {
        let (m, x) = (partial[i - 1], g.x(i)?);
        partial.push(g.emit(op, &[m, x])?);
    }
    let mut grads = Grads::from_elem(None, n);
    let mut dm = g.dy0()?;
    for i in (1..n).rev() {
        let (m, x) = (partial[i - 1], g.x(i)?);
        if g.wants(i) {
            grads[i] = Some(g.emit(second, &[dm, m, x])?);
        }
        // Kept at the result's full shape: the driver sums out what was broadcast.
        if (0..i).any(|k| g.wants(k)) {
            dm = g.emit(first, &[dm, m, x])?;
        }
    }
    if g.wants(0) {
        grads[0] = Some(dm);
    }
    Ok(grads)
}

impl Variadic {
    fn floats<T: Math>(self, x: &[Option<View>], y: &mut ViewMut) -> Result<(), OpError> {
        match self {
            Variadic::Sum => fold::<T>(x, y, |a, b| a + b),
            Variadic::Mean => {
                fold::<T>(x, y, |a, b| a + b)?;
                let scale = T::one() / T::of(x.len() as f64);
                let y = y.get::<T>()?;
                let walk = same(y.len());
                apply1(y, None, &walk, |v: T| v * scale);
                Ok(())
            }
            Variadic::Max => fold::<T>(x, y, |a, b| if a > b || a.is_nan() { a } else { b }),
            Variadic::Min => fold::<T>(x, y, |a, b| if a < b || a.is_nan() { a } else { b }),
        }
    }
}

/// Folds the operands into `y`, which may hold the first or the second.
fn fold<T: crate::tensor::Elem + Wide>(
    x: &[Option<View>],
    y: &mut ViewMut,
    f: impl Fn(T, T) -> T + Sync,
) -> Result<(), OpError> {
    let dims = y.dims;
    if x.len() == 1 {
        if let Some(a) = get(x, 0) {
            apply1(y.get::<T>()?, Some(a.get::<T>()?), &Walk::new(dims, [a.dims]), |a| a);
        }
        return Ok(());
    }
    apply::<T>(x, y, &f)?;
    for i in 2..x.len() {
        let a = need(x, i)?;
        apply2(y.get::<T>()?, None, Some(a.get::<T>()?), &Walk::new(dims, [dims, a.dims]), &f);
    }
    Ok(())
}

pub(super) const ROWS: &[Row] = &[
    Row::new("Max", 6, |_: &Spec| Ok(Arc::new(Variadic::Max))),
    Row::new("Mean", 6, |_: &Spec| Ok(Arc::new(Variadic::Mean))),
    Row::new("Min", 6, |_: &Spec| Ok(Arc::new(Variadic::Min))),
    Row::new("Sum", 6, |_: &Spec| Ok(Arc::new(Variadic::Sum))),
];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    let mut cases = Vec::new();
    for op in ["Sum", "Mean", "Max", "Min"] {
        cases.push(Case::new(op, 8).named("one").input(&[2, 3]));
        cases.push(Case::new(op, 13).named("two").input(&[2, 3]).input(&[3]));
        cases.push(Case::new(op, 13).named("three").input(&[3, 1]).input(&[2, 1, 1]).input(&[4]));
        cases.push(Case::new(op, 13).named("four").input(&[5]).input(&[5]).input(&[]).input(&[1]));
    }
    cases
}
