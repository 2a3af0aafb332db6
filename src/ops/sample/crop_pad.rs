//! `CenterCropPad`.

use std::sync::Arc;

use crate::error::OpError;
use crate::graph::GradBuilder;
use crate::kernels::strided::{Extents, Placement, Strides};
use crate::ops::slice::SliceGrad;
use crate::ops::{Cx, Grads, Op, Spec, need};
use crate::tensor::{Dims, Meta, View, ViewMut, axis};

/// ONNX `CenterCropPad` (opset 18): X and the extents of some axes, known before the run. An odd element is cropped, or
/// added, at the end.
#[derive(Debug, Clone)]
pub struct CenterCropPad {
    axes: Option<Vec<i64>>,
}

/// The middle of a tensor of `from` in the middle of one of `to`.
fn placement(from: &[usize], to: &[usize]) -> Placement {
    let excess = |a: &[usize], b: &[usize]| -> Extents {
        a.iter().zip(b).map(|(a, b)| a.saturating_sub(*b) / 2).collect()
    };
    Placement {
        source: Extents::from_slice(from),
        target: Extents::from_slice(to),
        from: excess(from, to),
        to: excess(to, from),
        step: Strides::from_elem(1, from.len()),
        count: from.iter().zip(to).map(|(a, b)| *a.min(b)).collect(),
    }
}

impl CenterCropPad {
    pub(super) fn make(s: &Spec) -> Result<Arc<dyn Op>, OpError> {
        Ok(Arc::new(CenterCropPad { axes: s.attrs.ints("axes")? }))
    }

    fn dims(&self, x: &[usize], shape: &[i64]) -> Result<Dims, OpError> {
        let rank = x.len();
        let all: Vec<i64> = (0..rank as i64).collect();
        let axes = self.axes.as_ref().unwrap_or(&all);
        let fits = |v: &i64| (0..=i64::from(i32::MAX)).contains(v);
        if axes.len() != shape.len() || !shape.iter().all(fits) {
            return Err(OpError::Shape(format!("{self:?} of {x:?} to {shape:?}")));
        }
        let mut dims = Dims::from_slice(x);
        for (a, n) in axes.iter().zip(shape) {
            dims[axis(*a, rank)?] = *n as usize;
        }
        Ok(dims)
    }
}

impl Op for CenterCropPad {
    fn name(&self) -> &'static str {
        "CenterCropPad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        let dims = self.dims(&x.dims, &need(inputs, 1)?.ints(1)?)?;
        Ok(vec![Meta::new(x.dtype, &dims)])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let input = need(x, 0)?;
        let to = y.first().and_then(Option::as_ref).map(|y| Dims::from_slice(y.dims)).unwrap_or_default();
        SliceGrad { placement: placement(input.dims, &to) }.forward(cx, &x[..1], y)
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // dX = the middle of dY in the middle of zeros   (as X)
        let dy = g.dy0()?;
        let (from, to) = (g.meta(dy)?.dims.clone(), g.meta(g.x(0)?)?.dims.clone());
        let dx = g.emit(SliceGrad { placement: placement(&from, &to) }, &[dy])?;
        Ok(Grads::from_slice(&[Some(dx)]))
    }
}
