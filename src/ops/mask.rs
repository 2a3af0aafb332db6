//! Where an activation that clamps let pass, in one bit an element: all that its gradient needs of its result.

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::elementwise::Clamp;
use crate::kernels::mask::{self, BITS};
use crate::ops::bytes::second_derivative;
use crate::ops::{Cx, Grads, Op, get, need, out};
use crate::tensor::{DType, Meta, View, ViewMut};

/// One bit an element of Y, in order: is it strictly within the bounds? uint8 [⌈n/8⌉]; bits beyond the end are 0.
#[derive(Debug, Clone)]
pub struct Mask {
    pub clamp: Clamp<f64>,
}

/// dX of an activation that clamps, from its [`Mask`] and dY.
#[derive(Debug, Clone)]
pub struct MaskGrad;

impl Op for Mask {
    fn name(&self) -> &'static str {
        "Mask"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let y = need(inputs, 0)?;
        if !y.dtype.is_float() {
            return Err(OpError::Type(format!("a mask of {}", y.dtype)));
        }
        Ok(vec![Meta::new(DType::U8, &[y.len().div_ceil(BITS)])])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let x = need(x, 0)?;
        float_dispatch!(x.dtype, T => {
            mask::pack(x.get::<T>()?, self.clamp.to(), out(y, 0)?.get::<u8>()?);
            Ok(())
        })
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        second_derivative()
    }
}

impl Op for MaskGrad {
    fn name(&self) -> &'static str {
        "MaskGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (mask, dy) = (need(inputs, 0)?, need(inputs, 1)?);
        if mask.dtype != DType::U8 || mask.len() != dy.len().div_ceil(BITS) {
            let what = format!("a mask of {} {:?} for {:?}", mask.dtype, mask.dims, dy.dims);
            return Err(OpError::Shape(what));
        }
        Ok(vec![Meta::new(dy.dtype, &dy.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let bits = need(x, 0)?.get::<u8>()?;
        let y = out(y, 0)?;
        float_dispatch!(y.dtype, T => {
            let dy = get(x, 1).map(|v| v.get::<T>()).transpose()?;
            mask::apply(bits, dy, y.get::<T>()?);
            Ok(())
        })
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(1, 0)]
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        second_derivative()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::eval;
    use crate::tensor::Tensor;

    #[test]
    fn masks_pass_what_the_clamp_passed() {
        let n = 100_003;
        let values = |k: f32| (0..n).map(|i| (i as f32 * k).sin() * 2.0).collect::<Vec<f32>>();
        let mut y: Vec<f32> = values(0.7).iter().map(|v| v.clamp(-0.5, 1.0)).collect();
        (y[0], y[n - 1]) = (f32::NAN, 0.25);
        let dy = values(0.3);
        let of = |x: &[f32]| Tensor::from_slice(&[n], x).unwrap();
        let clamp = Clamp { low: -0.5, high: 1.0 };
        let mask = eval(&Mask { clamp }, &[Some(&of(&y))]).unwrap().remove(0);
        let dx = eval(&MaskGrad, &[Some(&mask), Some(&of(&dy))]).unwrap().remove(0);
        let expected: Vec<f32> = y.iter().zip(&dy).map(|(y, dy)| clamp.to::<f32>().pass(*y, *dy)).collect();
        assert_eq!(dx.get::<f32>().unwrap(), expected);
        assert!(expected.iter().any(|x| *x != 0.0));
    }
}
