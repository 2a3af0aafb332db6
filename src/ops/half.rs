//! To and from half precision, for values that are kept for later: see `graph::precision`. No file names these;
//! ONNX's `Cast` gives a half type's values in `f32`.

use crate::error::OpError;
use crate::graph::GradBuilder;
use crate::kernels::half::Half;
use crate::ops::{Cx, Grads, Op, need, out};
use crate::tensor::{DType, Dims, Meta, View, ViewMut};

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
        half(self.to)?.round_all(need(x, 0)?.get()?, half_bits_mut(y)?);
        Ok(())
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

pub(super) fn half_bits_mut<'a>(y: &'a mut ViewMut) -> Result<&'a mut [u16], OpError> {
    half(y.dtype)?;
    let dtype = y.dtype;
    bytemuck::try_cast_slice_mut(y.bytes).map_err(|e| OpError::Internal(format!("view of {dtype}: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::eval;
    use crate::tensor::Tensor;

    #[test]
    fn there_and_back() {
        let x: Vec<f32> = (0..70_000).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
        let x = Tensor::from_slice(&[70, 1000], &x).unwrap();
        for to in [DType::BF16, DType::F16] {
            let narrow = eval(&Narrow { to }, &[Some(&x)]).unwrap().remove(0);
            assert_eq!((narrow.dtype(), narrow.bytes().len()), (to, 2 * x.len()));
            assert_eq!(narrow.bytes(), x.cast(to).bytes());
            let dims = Dims::from_slice(&[1000, 70]);
            let wide = eval(&Widen { dims }, &[Some(&narrow)]).unwrap().remove(0);
            assert_eq!(wide.dims(), [1000, 70]);
            assert_eq!(wide.bytes(), x.cast(to).cast(DType::F32).bytes());
            assert!(eval(&Narrow { to }, &[Some(&narrow)]).is_err());
            assert!(eval(&Widen { dims: Dims::new() }, &[Some(&narrow)]).is_err());
        }
        assert!(eval(&Narrow { to: DType::F32 }, &[Some(&x)]).is_err());
        assert!(eval(&Widen { dims: Dims::from_slice(&[70, 1000]) }, &[Some(&x)]).is_err());
    }
}
