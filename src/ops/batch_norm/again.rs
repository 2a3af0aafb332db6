//! Normalisation by statistics that are known already.

use super::{BatchNormalization, room, room_bytes};
use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::layout::Layout;
use crate::kernels::norm::{self, Residual, Results};
use crate::ops::half::{computed, elements, widened};
use crate::ops::{Cx, Grads, Op, get, need, out};
use crate::tensor::{Float, Meta, View, ViewMut};

/// What a batch normalisation by the batch's statistics made of x, once more and to the same bits. Inputs x (N, C, …), scale,
/// shift, mean and inverse standard deviation (C) as the first time gave them out, and the residual, if there was one.
#[derive(Debug)]
pub(super) struct Normalise {
    pub of: BatchNormalization,
}

impl Op for Normalise {
    fn name(&self) -> &'static str {
        "Normalise"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        Ok(vec![widened(need(inputs, 0)?)])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let y = out(y, 0)?;
        let d = self.of.channels(y.dims);
        float_dispatch!(y.dtype, T => {
            let of = |i: usize| need(x, i)?.get::<T>();
            let (scale, shift, mean, inv) = (of(1)?, of(2)?, of(3)?, of(4)?);
            let input = get(x, 0).map(elements::<T>).transpose()?;
            let residual = match x.get(5) {
                Some(Some(r)) => Residual::Given(r.get::<T>()?),
                Some(None) => Residual::InResult,
                None => Residual::None,
            };
            let (_, factor) = room::<T>(cx, 0, d.c)?;
            for ((f, scale), inv) in factor.iter_mut().zip(scale).zip(inv) {
                *f = T::of(scale.to64() * inv.to64());
            }
            let y = Results::Whole(y.get::<T>()?);
            norm::channel_affine(input, y, d, mean, factor, shift, residual, self.of.clamp.to());
            Ok(())
        })
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(0, 0), (5, 0)]
    }

    fn reads_half(&self, _: &[Option<&Meta>], input: usize) -> bool {
        input == 0 && self.of.layout == Layout::Last
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        get(inputs, 0).map_or(0, |x: &Meta| room_bytes(0, self.of.channels(&x.dims).c, computed(x)))
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("what is computed again".into()))
    }
}
