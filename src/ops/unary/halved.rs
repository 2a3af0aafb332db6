//! Elementwise operators whose results are read in half precision alone.

use super::{Kind, grad, sweep};
use crate::error::OpError;
use crate::graph::GradBuilder;
use crate::kernels::half::Half;
use crate::ops::half::{elements, half_bits_mut};
use crate::ops::{Cx, Grads, Op, Piece, need, out};
use crate::tensor::{DType, Meta, View, ViewMut};

/// What is like `x`, rounded.
fn rounded(x: &Meta, to: Half) -> Result<Vec<Meta>, OpError> {
    match x.dtype {
        DType::F32 => Ok(vec![Meta::new(to.dtype(), &x.dims)]),
        other => Err(OpError::Type(format!("{other} where float32 is rounded"))),
    }
}

/// An elementwise operator of f32 whose results are rounded to half precision.
#[derive(Debug, Clone, Copy)]
pub(super) struct Halved<K> {
    pub of: K,
    pub to: Half,
}

impl<K: Kind> Op for Halved<K> {
    fn name(&self) -> &'static str {
        K::NAME
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        rounded(need(inputs, 0)?, self.to)
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (x, k) = (need(x, 0)?.get::<f32>()?, self.of);
        let y = half_bits_mut(out(y, 0)?)?;
        self.to.round_made(y, |at, made| sweep(k, Some(&x[at..at + made.len()]), made));
        Ok(())
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("results that are rounded, after the gradients".into()))
    }

    fn cheap(&self) -> bool {
        true
    }

    fn in_pieces(&self, _: &[Option<&Meta>], _: usize) -> Option<Piece> {
        Piece::elementwise(*self)
    }
}

/// The gradient of an elementwise operator, [`UnaryGrad`](super::grad::UnaryGrad), rounded to half precision.
#[derive(Debug, Clone, Copy)]
pub(super) struct HalvedGrad<K> {
    pub of: K,
    pub to: Half,
}

impl<K: Kind> Op for HalvedGrad<K> {
    fn name(&self) -> &'static str {
        K::GRAD
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        rounded(need(inputs, 1)?, self.to)
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (v, dy, k) = (elements::<f32>(need(x, 0)?)?, need(x, 1)?.get::<f32>()?, self.of);
        let y = half_bits_mut(out(y, 0)?)?;
        self.to.round_made(y, |at, made| {
            for (i, made) in made.chunks_mut(grad::NEAR).enumerate() {
                let (at, n, mut near) = (at + i * grad::NEAR, made.len(), [0.0; grad::NEAR]);
                grad::of(k, Some(v.near(at, n, &mut near)), Some(&dy[at..at + n]), made);
            }
        });
        Ok(())
    }

    fn reads_half(&self, _: &[Option<&Meta>], input: usize) -> bool {
        input == 0
    }

    fn in_pieces(&self, _: &[Option<&Meta>], _: usize) -> Option<Piece> {
        Piece::elementwise(*self)
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("results that are rounded, after the gradients".into()))
    }
}
