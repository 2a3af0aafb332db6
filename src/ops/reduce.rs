//! Reductions over axes.

use crate::error::OpError;
use crate::graph::GradBuilder;
use crate::ops::{Cx, Grads, Op, need};
use crate::tensor::{Dims, Meta, View, ViewMut};

/// Sums a tensor down to `dims`, of which it is a broadcast: the gradient of broadcasting.
#[derive(Debug)]
pub struct SumTo {
    pub dims: Dims,
}

impl Op for SumTo {
    fn name(&self) -> &'static str {
        "SumTo"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        Ok(vec![Meta::new(need(inputs, 0)?.dtype, &self.dims)])
    }

    fn forward(&self, _: &mut Cx, _: &[Option<View>], _: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        Err(OpError::Unsupported("SumTo".into()))
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("second derivatives are not supported".into()))
    }
}
