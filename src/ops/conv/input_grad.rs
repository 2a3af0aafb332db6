//! The gradient with respect to a convolution's input.

use std::sync::Arc;

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::conv::{self as kernel, Geometry};
use crate::kernels::half::{ElementsMut, Half};
use crate::kernels::layout::Layout;
use crate::ops::conv::{Conv, expect, floats, residual, same_type};
use crate::ops::half::{elements, rounded, widened};
use crate::ops::{ChannelsLast, Cx, Grads, Op, get, need, out};
use crate::tensor::{DType, Dims, Meta, View, ViewMut};

/// The gradient of `Conv` with respect to its input, of dimensions `x`: from dY and W; an addend, input 2, is added.
#[derive(Debug)]
pub struct ConvInputGrad {
    pub conv: Conv,
    pub x: Dims,
    /// Output 0 is in bfloat16.
    pub rounds: bool,
}

impl ConvInputGrad {
    pub fn of(conv: Conv, x: Dims) -> Self {
        ConvInputGrad { conv, x, rounds: false }
    }
}

impl Op for ConvInputGrad {
    fn name(&self) -> &'static str {
        "ConvInputGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (dy, w) = (&widened(need(inputs, 0)?), need(inputs, 1)?);
        same_type(dy, w)?;
        let (_, y) = self.conv.geometry(&self.x, &w.dims)?;
        expect(&dy.dims, &y)?;
        if let Some(a) = get(inputs, 2) {
            same_type(dy, a)?;
            expect(&a.dims, &self.x)?;
        }
        Ok(vec![Meta::new(if self.rounds { DType::BF16 } else { dy.dtype }, &self.x)])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (dy, w) = (need(x, 0)?, need(x, 1)?);
        let (g, _) = self.conv.geometry(&self.x, w.dims)?;
        float_dispatch!(w.dtype, T => {
            let (dy, dx) = (elements::<T>(dy)?, out(y, 0)?);
            let dx = match self.rounds {
                true => ElementsMut::Bf16(rounded(dx)?.1),
                false => ElementsMut::Whole(dx.get::<T>()?),
            };
            kernel::input_grad(&g, dy, w.get::<T>()?, residual(x, 2)?, dx, floats(cx.scratch)?);
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let (Some(dy), Some(w)) = (get(inputs, 0), get(inputs, 1)) else { return 0 };
        self.conv.geometry(&self.x, &w.dims).map_or(0, |(g, _)| input_grad_room(&g, dy))
    }

    fn channels_last(&self, _: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        let op = ConvInputGrad::of(self.conv.last(), Layout::Last.of(&self.x));
        Some(ChannelsLast::by(op, &[true, false, true], &[true]).wanted())
    }

    fn by_pairs(&self) -> Option<Arc<dyn Op>> {
        Some(Arc::new(ConvInputGrad::of(self.conv.paired()?, self.x.clone())))
    }

    fn rounds(&self, inputs: &[Option<&Meta>], input: usize) -> bool {
        let Some(w) = get(inputs, 1) else { return false };
        let g = self.conv.geometry(&self.x, &w.dims);
        input == 0 && g.is_ok_and(|(g, _)| kernel::input_grad_rounds(&g))
    }

    fn in_place(&self) -> &[(usize, usize)] {
        if self.rounds { &[] } else { &[(2, 0)] }
    }

    fn halved(&self, output: usize, to: DType) -> Option<Arc<dyn Op>> {
        let by_pairs = self.conv.pairs && self.conv.layout == Layout::Last;
        let rounds = self.x.last().is_some_and(|channels| kernel::input_grad_is_rounded(*channels));
        let can = output == 0 && to == DType::BF16 && by_pairs && rounds;
        can.then(|| {
            Arc::new(ConvInputGrad { conv: self.conv.clone(), x: self.x.clone(), rounds: true })
                as Arc<dyn Op>
        })
    }

    fn multiply_adds(&self, inputs: &[Option<&Meta>]) -> usize {
        let Some(w) = get(inputs, 1) else { return 0 };
        self.conv.geometry(&self.x, &w.dims).map_or(0, |(g, _)| g.multiply_adds())
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("second derivatives of Conv".into()))
    }
}

/// Bytes of scratch that an input gradient needs.
pub(super) fn input_grad_room(g: &Geometry, dy: &Meta) -> usize {
    match dy.dtype {
        DType::F64 => kernel::input_grad_scratch::<f64>(g, false) * size_of::<f64>(),
        dtype => kernel::input_grad_scratch::<f32>(g, Half::of(dtype).is_some()) * size_of::<f32>(),
    }
}
