//! Depthwise convolution of what a pointwise one puts out.

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::conv::{self as kernel, Expansion, Geometry};
use crate::ops::conv::{Conv, floats};
use crate::ops::{Cx, Grads, Op, get, need, out};
use crate::tensor::{DType, Dims, Meta, View, ViewMut};

/// Y = `conv`(`before`(X)), the latter pointwise, the former depthwise, and both with their channels last: what is between them does
/// not lie in memory. Inputs are X (N, spatial…, C), the pointwise convolution's weights (M, C, 1…) and perhaps bias (M), and the
/// depthwise one's weights (M, 1, kernel…) and perhaps bias (M).
#[derive(Debug, Clone)]
pub struct ConvExpanded {
    pub before: Conv,
    pub conv: Conv,
}

impl ConvExpanded {
    /// Of `conv` that alone reads what `before` puts out, with the operands that each has: can they be one?
    pub fn of(before: (&Conv, &[Option<&Meta>]), conv: (&Conv, &[Option<&Meta>])) -> Option<ConvExpanded> {
        let plain = |(conv, inputs): (&Conv, &[Option<&Meta>])| {
            conv.normalises.is_none() && !conv.pairs && inputs.len() <= 3
        };
        let (x, w, v) = (get(before.1, 0)?, get(before.1, 1)?, get(conv.1, 1)?);
        let (g, middle) = before.0.geometry(&x.dims, &w.dims).ok()?;
        let op = ConvExpanded { before: before.0.clone(), conv: conv.0.clone() };
        let (next, _) = conv.0.geometry(&middle, &v.dims).ok()?;
        let fits = match x.dtype {
            DType::F64 => kernel::expands::<f64>(&next, g.c),
            _ => kernel::expands::<f32>(&next, g.c),
        };
        let alike = before.0.layout == conv.0.layout;
        (plain(before) && plain(conv) && alike && g.pointwise() && fits).then_some(op)
    }

    /// Both sizes, and the result's dimensions.
    fn geometries(
        &self,
        x: &[usize],
        w: &[usize],
        v: &[usize],
    ) -> Result<(Geometry, Geometry, Dims), OpError> {
        let (g, middle) = self.before.geometry(x, w)?;
        let (next, y) = self.conv.geometry(&middle, v)?;
        Ok((g, next, y))
    }
}

impl Op for ConvExpanded {
    fn name(&self) -> &'static str {
        "ConvExpanded"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let [Some(x), Some(w), bias, Some(v), rest @ ..] = inputs else {
            return Err(OpError::Shape(format!("ConvExpanded with {} inputs", inputs.len())));
        };
        let middle = self.before.infer(&[Some(*x), Some(*w), *bias])?;
        let made = self.conv.infer(&[middle.first(), Some(*v), get(rest, 0)])?;
        let (g, next, _) = self.geometries(&x.dims, &w.dims, &v.dims)?;
        match g.pointwise() && next.depthwise() {
            true => Ok(made),
            false => Err(OpError::Shape("not a depthwise convolution of a pointwise one".into())),
        }
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (input, w, v) = (need(x, 0)?, need(x, 1)?, need(x, 3)?);
        let (g, next, _) = self.geometries(input.dims, w.dims, v.dims)?;
        float_dispatch!(input.dtype, T => {
            // Each convolution's operands lie in order, the first's bias in the place of the second's X.
            let epilogue = self.before.epilogue::<T>(&x[..3])?;
            let from = Expansion { x: input.get::<T>()?, c: g.c, w: w.get::<T>()?, epilogue };
            let epilogue = self.conv.epilogue::<T>(&x[2..])?;
            let (y, scratch) = (out(y, 0)?.get::<T>()?, floats(cx.scratch)?);
            kernel::forward_expanded(&next, from, v.get::<T>()?, epilogue, y, scratch);
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let (Some(x), Some(w), Some(v)) = (get(inputs, 0), get(inputs, 1), get(inputs, 3)) else { return 0 };
        self.geometries(&x.dims, &w.dims, &v.dims).map_or(0, |(g, next, _)| match x.dtype {
            DType::F64 => kernel::forward_expanded_scratch::<f64>(&next, g.c) * size_of::<f64>(),
            _ => kernel::forward_expanded_scratch::<f32>(&next, g.c) * size_of::<f32>(),
        })
    }

    fn multiply_adds(&self, inputs: &[Option<&Meta>]) -> usize {
        let (Some(x), Some(w), Some(v)) = (get(inputs, 0), get(inputs, 1), get(inputs, 3)) else { return 0 };
        let both = self.geometries(&x.dims, &w.dims, &v.dims);
        both.map_or(0, |(g, next, _)| g.multiply_adds() + next.multiply_adds())
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("two convolutions in one".into()))
    }
}
