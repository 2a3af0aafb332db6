//! To and from half precision, for values that are kept for later: see `graph::precision`. No file names these;
//! ONNX's `Cast` gives a half type's values in `f32`.

use crate::error::OpError;
use crate::graph::GradBuilder;
use crate::kernels::half::{Elements, Half};
use crate::kernels::norm::Results;
use crate::ops::{Cx, Grads, Op, Piece, need, out, piece};
use crate::tensor::{DType, Dims, Float, Meta, View, ViewMut};

/// X (f32) rounded to nearest, ties to even, in half precision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Narrow {
    /// `BF16` or `F16`.
    pub to: DType,
}

/// X (of half precision) in f32, under dimensions of equal product.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Widen {
    pub dims: Dims,
}

fn half(dtype: DType) -> Result<Half, OpError> {
    Half::of(dtype).ok_or_else(|| OpError::Type(format!("{dtype} is not of half precision")))
}

fn no_gradient<T>() -> Result<T, OpError> {
    Err(OpError::NotDifferentiable("a conversion that is placed after the gradients".into()))
}

impl Op for Narrow {
    fn name(&self) -> &'static str {
        "Narrow"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        half(self.to)?;
        match x.dtype {
            DType::F32 => Ok(vec![Meta::new(self.to, &x.dims)]),
            other => Err(OpError::Type(format!("{other} where float32 is rounded"))),
        }
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let y = out(y, 0)?;
        half(self.to)?.round_all(need(x, 0)?.get::<f32>()?, half_bits_mut(y)?);
        Ok(())
    }

    fn in_pieces(&self, _: &[Option<&Meta>], _: usize) -> Option<Piece> {
        Piece::elementwise(self.clone())
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        no_gradient()
    }

    fn cheap(&self) -> bool {
        true
    }
}

impl Op for Widen {
    fn name(&self) -> &'static str {
        "Widen"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        half(x.dtype)?;
        match x.len() == self.dims.iter().product::<usize>() {
            true => Ok(vec![Meta::new(DType::F32, &self.dims)]),
            false => Err(OpError::Shape(format!("{:?} under {:?}", x.dims.as_slice(), self.dims.as_slice()))),
        }
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let x = need(x, 0)?;
        half(x.dtype)?.widen_all(half_bits(x)?, out(y, 0)?.get()?);
        Ok(())
    }

    fn in_pieces(&self, _: &[Option<&Meta>], count: usize) -> Option<Piece> {
        Piece::elementwise(Widen { dims: piece::cut(&self.dims, count)? })
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        no_gradient()
    }

    fn cheap(&self) -> bool {
        true
    }
}

/// The bits of a tensor of half precision.
pub(super) fn half_bits<'a>(x: View<'a>) -> Result<&'a [u16], OpError> {
    half(x.dtype)?;
    bytemuck::try_cast_slice(x.bytes).map_err(|e| OpError::Internal(format!("view of {}: {e}", x.dtype)))
}

/// An operand that may come in half precision, see [`Op::reads_half`].
pub(super) fn elements<'a, T: Float>(x: View<'a>) -> Result<Elements<'a, T>, OpError> {
    match Half::of(x.dtype) {
        Some(half) => Ok(Elements::Half(half, half_bits(x)?)),
        None => Ok(Elements::Whole(x.get::<T>()?)),
    }
}

/// The type that such an operand is computed in.
pub(super) fn computed(x: &Meta) -> DType {
    if Half::of(x.dtype).is_some() { DType::F32 } else { x.dtype }
}

/// Such an operand as it is computed with.
pub(super) fn widened(x: &Meta) -> Meta {
    Meta::new(computed(x), &x.dims)
}

/// Where an output is to be rounded to.
pub(super) fn rounded<'a>(y: &'a mut ViewMut) -> Result<(Half, &'a mut [u16]), OpError> {
    let half = half(y.dtype)?;
    Ok((half, half_bits_mut(y)?))
}

/// What an operator puts out of its output 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PutOut {
    /// It as it is.
    #[default]
    Whole,
    /// That, and once more, as the last output, in a type of half precision: see [`Op::rounding`].
    Both(DType),
    /// It in that type alone: see [`Op::halved`].
    Half(DType),
}

impl PutOut {
    /// What is put out where all outputs were whole.
    pub(super) fn of(self, mut made: Vec<Meta>) -> Vec<Meta> {
        match self {
            PutOut::Whole => {}
            PutOut::Both(to) => made.push(Meta::new(to, &made[0].dims)),
            PutOut::Half(to) => made[0].dtype = to,
        }
        made
    }

    pub(super) fn is_half(self) -> bool {
        matches!(self, PutOut::Half(_))
    }
}

/// An output that may be rounded, see [`Op::halved`].
pub(super) fn results<'a, T: Float>(y: &'a mut ViewMut) -> Result<Results<'a, T>, OpError> {
    match Half::of(y.dtype) {
        Some(half) => Ok(Results::Half(half, half_bits_mut(y)?)),
        None => Ok(Results::Whole(y.get::<T>()?)),
    }
}

pub(super) fn half_bits_mut<'a>(y: &'a mut ViewMut) -> Result<&'a mut [u16], OpError> {
    half(y.dtype)?;
    let dtype = y.dtype;
    bytemuck::try_cast_slice_mut(y.bytes).map_err(|e| OpError::Internal(format!("view of {dtype}: {e}")))
}

#[cfg(test)]
pub(in crate::ops) mod tests;
