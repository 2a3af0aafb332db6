//! Operators on the bits of integers: BitShift, BitwiseAnd, BitwiseOr, BitwiseXor, BitwiseNot, BitCast.

use std::sync::Arc;

use crate::error::OpError;
use crate::graph::GradBuilder;
use crate::int_dispatch;
use crate::kernels::elementwise::{Walk, apply1, apply2, same};
use crate::kernels::integer::Integer;
use crate::ops::bytes::same_type;
use crate::ops::{Cx, Grads, Op, Row, Spec, need, out};
use crate::tensor::{DType, Meta, View, ViewMut, broadcast};

fn no_gradient() -> Result<Grads, OpError> {
    Err(OpError::NotDifferentiable("the result is not a floating-point number".into()))
}

/// ONNX `BitShift` (opset 11, 28; bits that leave are lost) and `BitwiseAnd`, `BitwiseOr`, `BitwiseXor` (opset 18), broadcast.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bits {
    ShiftLeft,
    ShiftRight,
    And,
    Or,
    Xor,
}

impl Bits {
    fn shift(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
        match spec.attrs.string("direction")?.as_deref() {
            Some("LEFT") => Ok(Arc::new(Bits::ShiftLeft)),
            Some("RIGHT") => Ok(Arc::new(Bits::ShiftRight)),
            other => Err(OpError::Attribute(format!("'direction' is {other:?}"))),
        }
    }

    fn of<T: Integer>(self) -> fn(T, T) -> T {
        // Through i128, whose low bits are the operands' own.
        match self {
            Bits::ShiftLeft => |a, b| match u32::try_from(b.wide()) {
                Ok(n) if (n as usize) < 8 * size_of::<T>() => T::narrow(a.wide() << n),
                _ => T::default(),
            },
            Bits::ShiftRight => |a, b| match u32::try_from(b.wide()) {
                Ok(n) if (n as usize) < 8 * size_of::<T>() => T::narrow(a.wide() >> n),
                _ => T::narrow(a.wide() >> 127),
            },
            Bits::And => |a, b| T::narrow(a.wide() & b.wide()),
            Bits::Or => |a, b| T::narrow(a.wide() | b.wide()),
            Bits::Xor => |a, b| T::narrow(a.wide() ^ b.wide()),
        }
    }
}

impl Op for Bits {
    fn name(&self) -> &'static str {
        match self {
            Bits::ShiftLeft | Bits::ShiftRight => "BitShift",
            Bits::And => "BitwiseAnd",
            Bits::Or => "BitwiseOr",
            Bits::Xor => "BitwiseXor",
        }
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (a, b) = (need(inputs, 0)?, need(inputs, 1)?);
        same_type(a.dtype, b.dtype)?;
        if a.dtype.is_float() || a.dtype == DType::Bool {
            return Err(OpError::Type(format!("{} of {}", self.name(), a.dtype)));
        }
        Ok(vec![Meta::new(a.dtype, &broadcast(&a.dims, &b.dims)?)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (a, b, y) = (need(x, 0)?, need(x, 1)?, out(y, 0)?);
        let walk = Walk::new(y.dims, [a.dims, b.dims]);
        int_dispatch!(y.dtype, T => {
            apply2(y.get::<T>()?, Some(a.get::<T>()?), Some(b.get::<T>()?), &walk, self.of::<T>());
            Ok(())
        })
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        no_gradient()
    }
}

/// ONNX `BitwiseNot` (opset 18).
#[derive(Debug)]
pub struct BitwiseNot;

impl Op for BitwiseNot {
    fn name(&self) -> &'static str {
        "BitwiseNot"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        if x.dtype.is_float() || x.dtype == DType::Bool {
            return Err(OpError::Type(format!("BitwiseNot of {}", x.dtype)));
        }
        Ok(vec![Meta::new(x.dtype, &x.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (x, y) = (need(x, 0)?, out(y, 0)?);
        int_dispatch!(y.dtype, T => {
            let y = y.get::<T>()?;
            let walk = same(y.len());
            apply1(y, Some(x.get::<T>()?), &walk, |x: T| T::narrow(!x.wide()));
            Ok(())
        })
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        no_gradient()
    }
}

/// ONNX `BitCast` (opset 26): the same bytes as another element type of equal size. Half types are refused: they are
/// held as float32.
#[derive(Debug)]
pub struct BitCast {
    to: DType,
}

impl BitCast {
    fn make(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let code = spec.attrs.int("to")?.ok_or_else(|| OpError::Attribute("'to' is missing".into()))?;
        let to = i32::try_from(code).ok().and_then(DType::from_onnx);
        match to {
            Some(to) if to.working() == to => Ok(Arc::new(BitCast { to })),
            _ => Err(OpError::Unsupported(format!("the bits of ONNX element type {code}"))),
        }
    }
}

impl Op for BitCast {
    fn name(&self) -> &'static str {
        "BitCast"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        if x.dtype.size() != self.to.size() {
            return Err(OpError::Type(format!("{} and {} differ in size", x.dtype, self.to)));
        }
        Ok(vec![Meta::new(self.to, &x.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        out(y, 0)?.bytes.copy_from_slice(need(x, 0)?.bytes);
        Ok(())
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("the bits of a number".into()))
    }
}

pub(super) const ROWS: &[Row] = &[
    Row::new("BitShift", 11, Bits::shift),
    Row::new("BitwiseAnd", 18, |_| Ok(Arc::new(Bits::And))),
    Row::new("BitwiseOr", 18, |_| Ok(Arc::new(Bits::Or))),
    Row::new("BitwiseXor", 18, |_| Ok(Arc::new(Bits::Xor))),
    Row::new("BitwiseNot", 18, |_| Ok(Arc::new(BitwiseNot))),
    Row::new("BitCast", 26, BitCast::make),
];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    use crate::tensor::Tensor;
    let ints = |v: &[i64], t: DType| Tensor::ints(v).cast(t);
    let two =
        |case: Case, t| case.fixed(ints(&[12, 7, 255, 0], t)).fixed(ints(&[1, 200, 3, 9], t)).forward_only();
    vec![
        two(Case::new("BitShift", 11).string("direction", "LEFT"), DType::U8),
        two(Case::new("BitShift", 28).named("right").string("direction", "RIGHT"), DType::I64),
        two(Case::new("BitwiseAnd", 18), DType::I32),
        two(Case::new("BitwiseOr", 18), DType::U64),
        two(Case::new("BitwiseXor", 18), DType::I64),
        Case::new("BitwiseNot", 18).fixed(ints(&[0, 5, -1], DType::I8)).forward_only(),
        Case::new("BitCast", 26).int("to", 6).fixed(Tensor::scalar(1.5f32)).forward_only(),
    ]
}

#[cfg(test)]
#[test]
fn bits_as_numpy_has_them() {
    use crate::tensor::Tensor;
    let run = |op: Bits, t: DType, a: &[i64], b: &[i64]| {
        let (a, b) = (Tensor::ints(a).cast(t), Tensor::ints(b).cast(t));
        crate::ops::eval(&op, &[Some(&a), Some(&b)]).unwrap()[0].to_ints().unwrap()
    };
    assert_eq!(run(Bits::ShiftLeft, DType::U8, &[255, 1, 3], &[1, 8, 7]), [254, 0, 128]);
    assert_eq!(run(Bits::ShiftRight, DType::U8, &[255, 1, 3], &[1, 8, 0]), [127, 0, 3]);
    assert_eq!(run(Bits::ShiftRight, DType::I8, &[-8, -8], &[1, 9]), [-4, -1]);
    assert_eq!(run(Bits::And, DType::I32, &[-1, 12], &[7, 10]), [7, 8]);
    let not = crate::ops::eval(&BitwiseNot, &[Some(&Tensor::ints(&[0, 5]).cast(DType::U8))]).unwrap();
    assert_eq!(not[0].to_ints().unwrap(), [255, 250]);
}
