//! Sums of products, without the products.

use super::SumTo;
use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::norm::{Channels, channel_products};
use crate::ops::{Cx, Grads, Op, need, out};
use crate::tensor::{DType, Dims, Meta, View, ViewMut};

/// `Σ a·b` over all axes but the last, or over all but that and the first: what a factor for each channel, or for those of each
/// sample, gets of a gradient. Inputs A and B (N, …, C).
#[derive(Debug)]
pub struct SumProduct {
    dims: Dims,
    channels: Channels,
}

impl SumProduct {
    /// What such a sum is of products of the dimensions `of`, if it is over those axes.
    pub fn of(sum: &SumTo, of: &[usize]) -> Option<SumProduct> {
        let (&c, rest) = of.split_last()?;
        let (&last, kept) = sum.dims.split_last()?;
        let groups: usize = kept.iter().product();
        let of_samples =
            kept.len() == rest.len() && kept.first() == rest.first() && kept.first() == Some(&groups);
        (last == c && c > 0 && groups > 0 && (groups == 1 || of_samples)).then(|| {
            let n = rest.iter().product::<usize>() / groups;
            SumProduct { dims: sum.dims.clone(), channels: Channels { n, c, s: 1 } }
        })
    }
}

impl Op for SumProduct {
    fn name(&self) -> &'static str {
        "SumProduct"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (a, b) = (need(inputs, 0)?, need(inputs, 1)?);
        if !a.same_shape(b) {
            return Err(OpError::Internal(format!("products of {:?} and {:?}", a.dims, b.dims)));
        }
        Ok(vec![Meta::new(a.dtype, &self.dims)])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (a, b, y) = (need(x, 0)?, need(x, 1)?, out(y, 0)?);
        float_dispatch!(y.dtype, T => {
            let y = y.get::<T>()?;
            let partials = cx.room(self.channels.partials() * (y.len() / self.channels.c))?;
            channel_products(a.get::<T>()?, b.get::<T>()?, self.channels, y, partials);
            Ok(())
        })
    }

    fn scratch(&self, _: &[Option<&Meta>]) -> usize {
        let groups = self.dims.iter().product::<usize>() / self.channels.c;
        groups * self.channels.partials() * DType::F64.size()
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("what is joined after the gradients".into()))
    }
}
