//! Elementwise operators of two operands.

use crate::error::OpError;
use crate::graph::GradBuilder;
use std::sync::Arc;

use crate::ops::{Cx, Grads, Op, Row, need, out};
use crate::tensor::{Meta, View, ViewMut, broadcast};

/// ONNX `Add`.
#[derive(Debug)]
pub struct Add;

impl Op for Add {
    fn name(&self) -> &'static str {
        "Add"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (a, b) = (need(inputs, 0)?, need(inputs, 1)?);
        Ok(vec![Meta::new(a.dtype, &broadcast(&a.dims, &b.dims)?)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (a, b) = (need(x, 0)?.array::<f32>()?, need(x, 1)?.array::<f32>()?);
        let mut y = out(y, 0)?.array::<f32>()?;
        y.assign(&(&a + &b));
        Ok(())
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // dA = dY, dB = dY, each summed over what was broadcast by the driver.
        let dy = g.dy0()?;
        Ok(Grads::from_slice(&[Some(dy), Some(dy)]))
    }
}

pub(super) const ROWS: &[Row] = &[Row::new("Add", 7, |_| Ok(Arc::new(Add)))];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    vec![
        Case::new("Add", 13).input(&[2, 3]).input(&[2, 3]),
        Case::new("Add", 13).named("broadcast").input(&[2, 3, 4]).input(&[3, 1]),
    ]
}
