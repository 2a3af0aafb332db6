//! Comparisons, boolean operators and `Where`.

use std::sync::Arc;

use crate::error::OpError;
use crate::graph::GradBuilder;
use crate::kernels::elementwise::{Walk, apply1, apply2, apply3, same};
use crate::kernels::isa::Wide;
use crate::ops::binary::slice;
use crate::ops::bytes::{by_size, units, units_mut};
use crate::ops::{ChannelsLast, Cx, Grads, Op, Row, Spec, get, need, out};
use crate::tensor::{DType, Elem, Meta, View, ViewMut, broadcast};
use crate::{dtype_dispatch, float_dispatch};

/// ONNX comparisons (opset 7 on) and boolean operators of two operands, broadcast; the result is bool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logic {
    Equal,
    Greater,
    GreaterOrEqual,
    Less,
    LessOrEqual,
    And,
    Or,
    Xor,
}

fn no_gradient() -> Result<Grads, OpError> {
    Err(OpError::NotDifferentiable("the result is not a floating-point number".into()))
}

impl Op for Logic {
    fn name(&self) -> &'static str {
        match self {
            Logic::Equal => "Equal",
            Logic::Greater => "Greater",
            Logic::GreaterOrEqual => "GreaterOrEqual",
            Logic::Less => "Less",
            Logic::LessOrEqual => "LessOrEqual",
            Logic::And => "And",
            Logic::Or => "Or",
            Logic::Xor => "Xor",
        }
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (a, b) = (need(inputs, 0)?, need(inputs, 1)?);
        let boolean = matches!(self, Logic::And | Logic::Or | Logic::Xor);
        if a.dtype != b.dtype || (boolean && a.dtype != DType::Bool) {
            return Err(OpError::Type(format!("operands of types {} and {}", a.dtype, b.dtype)));
        }
        Ok(vec![Meta::new(DType::Bool, &broadcast(&a.dims, &b.dims)?)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (a, b, y) = (need(x, 0)?, need(x, 1)?, out(y, 0)?);
        dtype_dispatch!(a.dtype, T => {
            let f: fn(T, T) -> u8 = match self {
                Logic::Equal => |a, b| (a == b) as u8,
                Logic::Greater => |a, b| (a > b) as u8,
                Logic::GreaterOrEqual => |a, b| (a >= b) as u8,
                Logic::Less => |a, b| (a < b) as u8,
                Logic::LessOrEqual => |a, b| (a <= b) as u8,
                Logic::And => |a, b| (a != T::default() && b != T::default()) as u8,
                Logic::Or => |a, b| (a != T::default() || b != T::default()) as u8,
                Logic::Xor => |a, b| ((a != T::default()) != (b != T::default())) as u8,
            };
            let walk = Walk::new(y.dims, [a.dims, b.dims]);
            apply2(y.get::<u8>()?, Some(a.get::<T>()?), Some(b.get::<T>()?), &walk, f);
            Ok(())
        })
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], outputs: &[Option<&Meta>]) -> Option<ChannelsLast> {
        ChannelsLast::elementwise(inputs, outputs)
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        no_gradient()
    }

    fn cheap(&self) -> bool {
        true
    }
}

/// ONNX `Not` (opset 1).
#[derive(Debug, Clone, Copy)]
pub struct Not;

impl Op for Not {
    fn name(&self) -> &'static str {
        "Not"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        if x.dtype != DType::Bool {
            return Err(OpError::Type(format!("{} where bool is needed", x.dtype)));
        }
        Ok(vec![Meta::new(x.dtype, &x.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let y = out(y, 0)?.get::<u8>()?;
        let walk = same(y.len());
        apply1(y, slice::<u8>(get(x, 0))?, &walk, |x: u8| (x == 0) as u8);
        Ok(())
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], outputs: &[Option<&Meta>]) -> Option<ChannelsLast> {
        ChannelsLast::elementwise(inputs, outputs)
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        no_gradient()
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(0, 0)]
    }

    fn cheap(&self) -> bool {
        true
    }
}

/// ONNX `IsNaN` (opset 9 on) and `IsInf` (opset 10 on).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Classify {
    Nan,
    Inf { negative: bool, positive: bool },
}

impl Op for Classify {
    fn name(&self) -> &'static str {
        match self {
            Classify::Nan => "IsNaN",
            Classify::Inf { .. } => "IsInf",
        }
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        if !x.dtype.is_float() {
            return Err(OpError::Type(format!("{} where a floating-point type is needed", x.dtype)));
        }
        Ok(vec![Meta::new(DType::Bool, &x.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (x, y) = (need(x, 0)?, out(y, 0)?.get::<u8>()?);
        float_dispatch!(x.dtype, T => {
            let (walk, x) = (same(y.len()), Some(x.get::<T>()?));
            match *self {
                Classify::Nan => apply1(y, x, &walk, |v: T| v.is_nan() as u8),
                Classify::Inf { negative, positive } => apply1(y, x, &walk, |v: T| {
                    ((v == T::INFINITY && positive) || (v == T::NEG_INFINITY && negative)) as u8
                }),
            }
            Ok(())
        })
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], outputs: &[Option<&Meta>]) -> Option<ChannelsLast> {
        ChannelsLast::elementwise(inputs, outputs)
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        no_gradient()
    }

    fn cheap(&self) -> bool {
        true
    }
}

/// ONNX `Where` (opset 9 on): `condition ? x : y`, all broadcast, of any type.
#[derive(Debug, Clone, Copy)]
pub struct Where;

impl Op for Where {
    fn name(&self) -> &'static str {
        "Where"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (c, a, b) = (need(inputs, 0)?, need(inputs, 1)?, need(inputs, 2)?);
        if c.dtype != DType::Bool || a.dtype != b.dtype {
            return Err(OpError::Type(format!("operands of types {}, {} and {}", c.dtype, a.dtype, b.dtype)));
        }
        Ok(vec![Meta::new(a.dtype, &broadcast(&c.dims, &broadcast(&a.dims, &b.dims)?)?)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let y = out(y, 0)?;
        match y.dtype {
            DType::F32 => choose::<f32>(x, y),
            dtype => by_size!(dtype, T => choose::<T>(x, y)),
        }
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], outputs: &[Option<&Meta>]) -> Option<ChannelsLast> {
        ChannelsLast::elementwise(inputs, outputs)
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // dX = condition ? dY : 0, dY' = condition ? 0 : dY
        let (c, dy) = (g.x(0)?, g.dy0()?);
        let dtype = g.meta(dy)?.dtype;
        let (mut da, mut db) = (None, None);
        if g.wants(1) {
            let zero = g.scalar(0.0, dtype);
            da = Some(g.emit(Where, &[c, dy, zero])?);
        }
        if g.wants(2) {
            let zero = g.scalar(0.0, dtype);
            db = Some(g.emit(Where, &[c, zero, dy])?);
        }
        Ok(Grads::from_slice(&[None, da, db]))
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(1, 0), (2, 0)]
    }

    fn cheap(&self) -> bool {
        true
    }
}

fn choose<T: Elem + Wide>(x: &[Option<View>], y: &mut ViewMut) -> Result<(), OpError> {
    let (c, a, b) = (need(x, 0)?, get(x, 1), get(x, 2));
    if a.is_none() && b.is_none() {
        return Err(OpError::Shape("both operands are missing".into()));
    }
    let dims = y.dims;
    let walk = Walk::new(dims, [c.dims, a.map_or(dims, |a| a.dims), b.map_or(dims, |b| b.dims)]);
    let (a, b) = (a.map(|a| units::<T>(a.bytes)).transpose()?, b.map(|b| units::<T>(b.bytes)).transpose()?);
    let operands = (Some(c.get::<u8>()?), a, b);
    apply3(units_mut::<T>(y.bytes)?, operands, &walk, |c, a, b| if c != 0 { a } else { b });
    Ok(())
}

fn is_inf(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
    let negative = spec.attrs.flag_or("detect_negative", true)?;
    let positive = spec.attrs.flag_or("detect_positive", true)?;
    Ok(Arc::new(Classify::Inf { negative, positive }))
}

pub(super) const ROWS: &[Row] = &[
    Row::new("And", 7, |_| Ok(Arc::new(Logic::And))),
    Row::new("Equal", 7, |_| Ok(Arc::new(Logic::Equal))),
    Row::new("Greater", 7, |_| Ok(Arc::new(Logic::Greater))),
    Row::new("GreaterOrEqual", 12, |_| Ok(Arc::new(Logic::GreaterOrEqual))),
    Row::new("IsInf", 10, is_inf),
    Row::new("IsNaN", 9, |_| Ok(Arc::new(Classify::Nan))),
    Row::new("Less", 7, |_| Ok(Arc::new(Logic::Less))),
    Row::new("LessOrEqual", 12, |_| Ok(Arc::new(Logic::LessOrEqual))),
    Row::new("Not", 1, |_| Ok(Arc::new(Not))),
    Row::new("Or", 7, |_| Ok(Arc::new(Logic::Or))),
    Row::new("Where", 9, |_| Ok(Arc::new(Where))),
    Row::new("Xor", 7, |_| Ok(Arc::new(Logic::Xor))),
];

#[cfg(test)]
use crate::tensor::Tensor;

#[cfg(test)]
fn bools(dims: &[usize], data: &[u8]) -> Tensor {
    Tensor::from_slice(dims, data).unwrap().cast(DType::Bool)
}

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    let mut cases = Vec::new();
    for op in ["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"] {
        cases.push(Case::new(op, 13).input(&[2, 3]).input(&[3]).forward_only());
        cases.push(Case::new(op, 13).named("images").input(&[2, 3, 4]).input(&[3, 1]).forward_only());
        let ints = (Tensor::ints(&[1, 2, 3]), Tensor::ints(&[2, 2, 2]));
        cases.push(Case::new(op, 13).named("int64").fixed(ints.0).fixed(ints.1).forward_only());
    }
    let (a, b) = (bools(&[2, 2], &[0, 1, 0, 1]), bools(&[2, 1], &[0, 1]));
    for op in ["And", "Or", "Xor"] {
        cases.push(Case::new(op, 7).fixed(a.clone()).fixed(b.clone()).forward_only());
    }
    cases.push(Case::new("Not", 1).fixed(a.clone()).forward_only());
    for op in ["IsNaN", "IsInf"] {
        let x = [1.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY];
        cases.push(Case::new(op, 20).given(&[4], &x).forward_only());
    }
    cases.push(Case::new("Where", 9).fixed(a.clone()).input(&[2, 2]).input(&[2, 2]));
    cases.push(Case::new("Where", 16).named("broadcast").fixed(b).input(&[3, 1, 2]).input(&[]));
    cases
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::eval;

    #[test]
    fn truth_tables() {
        let (a, b) = (bools(&[4], &[0, 0, 1, 1]), bools(&[4], &[0, 1, 0, 1]));
        let run = |op: Logic| eval(&op, &[Some(&a), Some(&b)]).unwrap()[0].to_ints().unwrap();
        assert_eq!(run(Logic::And), [0, 0, 0, 1]);
        assert_eq!(run(Logic::Or), [0, 1, 1, 1]);
        assert_eq!(run(Logic::Xor), [0, 1, 1, 0]);
        assert_eq!(run(Logic::Equal), [1, 0, 0, 1]);
    }

    #[test]
    fn where_in_place() {
        let c = bools(&[2, 1], &[1, 0]);
        let a = Tensor::from_slice(&[2, 2], &[1i64, 2, 3, 4]).unwrap();
        let b = Tensor::from_slice(&[2, 2], &[5i64, 6, 7, 8]).unwrap();
        for pair in 1..3 {
            let mut y = if pair == 1 { a.clone() } else { b.clone() };
            let mut x = [Some(c.view()), Some(a.view()), Some(b.view())];
            x[pair] = None;
            Where.forward(&mut Cx { scratch: &mut [], seed: 0 }, &x, &mut [Some(y.view_mut())]).unwrap();
            assert_eq!(y.to_ints().unwrap(), [1, 2, 7, 8]);
        }
    }
}
