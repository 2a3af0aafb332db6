//! A convolution's weights with the normalisation that follows folded in.

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::par;
use crate::ops::{Cx, Grads, Op, get, need, out};
use crate::tensor::{Float, Meta, View, ViewMut};

/// Folds `BatchNormalization` with given statistics into the convolution before it. Inputs: weights w (M, …), bias
/// b (M) or none, scale, shift, mean and variance (M). Outputs, with f = scale/√(variance + ε): w·f per output
/// channel (M, …), and shift + (b − mean)·f (M).
#[derive(Debug)]
pub struct FoldNorm {
    pub epsilon: f64,
}

impl Op for FoldNorm {
    fn name(&self) -> &'static str {
        "FoldNorm"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let w = need(inputs, 0)?;
        let channels = w.dims.first().copied().unwrap_or(0);
        for i in 1..6 {
            let Some(m) = get(inputs, i) else {
                if i == 1 { continue } else { return Err(OpError::Shape(format!("input {i} is missing"))) }
            };
            if m.len() != channels || m.dtype != w.dtype {
                let what =
                    format!("input {i} is {} {:?} for {channels} channels of {}", m.dtype, m.dims, w.dtype);
                return Err(OpError::Shape(what));
            }
        }
        Ok(vec![Meta::new(w.dtype, &w.dims), Meta::new(w.dtype, &[channels])])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let dtype = need(x, 0)?.dtype;
        float_dispatch!(dtype, T => {
            let of = |i: usize| need(x, i)?.get::<T>();
            let (w, scale, shift, mean, var) = (of(0)?, of(2)?, of(3)?, of(4)?, of(5)?);
            let bias = get(x, 1).map(|b| b.get::<T>()).transpose()?;
            let factor = |m: usize| scale[m].to64() / (var[m].to64() + self.epsilon).sqrt();
            let row = w.len() / scale.len().max(1);
            par::rows(out(y, 0)?.get::<T>()?, row, par::GRAIN, |first, piece| {
                for (k, y) in piece.chunks_mut(row.max(1)).enumerate() {
                    let f = T::of(factor(first + k));
                    y.iter_mut().zip(&w[(first + k) * row..]).for_each(|(y, w)| *y = w * f);
                }
            });
            for (m, y) in out(y, 1)?.get::<T>()?.iter_mut().enumerate() {
                let b = bias.map_or(0.0, |b| b[m].to64());
                *y = T::of(shift[m].to64() + (b - mean[m].to64()) * factor(m));
            }
            Ok(())
        })
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("folded weights are not trained".into()))
    }
}
