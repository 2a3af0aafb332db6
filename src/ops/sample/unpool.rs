//! `MaxUnpool` and its gradient.

use std::sync::Arc;

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::ops::sample::{expect, second};
use crate::ops::window::Window;
use crate::ops::{Cx, Grads, Op, Spec, get, need, out};
use crate::tensor::{DType, Dims, Meta, View, ViewMut};

/// ONNX `MaxUnpool` (opset 9): X (N, C, spatial…), where each element belongs in the unpooled tensor (int64, over the whole
/// of it), and perhaps a larger shape, known before the run, to which zeros are added at the end of each dimension.
#[derive(Debug, Clone)]
pub struct MaxUnpool {
    window: Window,
}

impl MaxUnpool {
    pub(super) fn make(s: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let window = Window::of(s.attrs)?;
        match window.kernel.is_empty() {
            true => Err(OpError::Attribute("'kernel_shape' is missing".into())),
            false => Ok(Arc::new(MaxUnpool { window })),
        }
    }

    /// The dimensions that the places count.
    fn unpooled(&self, x: &[usize]) -> Result<Dims, OpError> {
        let Window { kernel, strides, pads, .. } = &self.window;
        let rank = kernel.len();
        let bad = || OpError::Shape(format!("{self:?} of {x:?}"));
        let fits = |v: &[usize], n: usize| v.is_empty() || v.len() == n;
        if x.len() != rank + 2 || !fits(strides, rank) || !fits(pads, 2 * rank) {
            return Err(bad());
        }
        let mut dims = Dims::from_slice(&x[..2]);
        for d in 0..rank {
            let stride = strides.get(d).copied().unwrap_or(1);
            let pad = |i: usize| pads.get(i).copied().unwrap_or(0);
            let whole = x[2 + d].checked_sub(1).map(|n| n * stride + kernel[d]);
            dims.push(whole.and_then(|n| n.checked_sub(pad(d) + pad(rank + d))).ok_or_else(bad)?);
        }
        Ok(dims)
    }
}

/// Calls `f(element of X, element of Y)`: places count `unpooled`, which is the first part of each dimension of `y`.
fn each(
    unpooled: &[usize],
    y: &[usize],
    places: &[i64],
    mut f: impl FnMut(usize, usize),
) -> Result<(), OpError> {
    let total: usize = unpooled.iter().product();
    for (i, &place) in places.iter().enumerate() {
        let mut rest = usize::try_from(place).ok().filter(|p| *p < total).ok_or_else(|| {
            OpError::Shape(format!("MaxUnpool puts an element at {place} of a tensor of {total}"))
        })?;
        let (mut at, mut step) = (0, 1);
        for (n, m) in unpooled.iter().zip(y).rev() {
            at += rest % n * step;
            rest /= n;
            step *= m;
        }
        f(i, at);
    }
    Ok(())
}

impl Op for MaxUnpool {
    fn name(&self) -> &'static str {
        "MaxUnpool"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (x, places) = (need(inputs, 0)?, need(inputs, 1)?);
        expect("places", places, &Meta::new(DType::I64, &[]), &x.dims)?;
        let unpooled = self.unpooled(&x.dims)?;
        let dims = match get(inputs, 2) {
            None => unpooled,
            Some(shape) => {
                let shape = shape.ints(2)?;
                let dims: Option<Dims> = shape.iter().map(|d| usize::try_from(*d).ok()).collect();
                let larger =
                    |d: &Dims| d.len() == unpooled.len() && d.iter().zip(&unpooled).all(|(a, b)| a >= b);
                dims.filter(larger).ok_or_else(|| {
                    OpError::Shape(format!("an output shape of {shape:?} for {:?}", unpooled.as_slice()))
                })?
            }
        };
        Ok(vec![Meta::new(x.dtype, &dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (x, places, y) = (need(x, 0)?, need(x, 1)?.get::<i64>()?, out(y, 0)?);
        let (unpooled, dims) = (self.unpooled(x.dims)?, Dims::from_slice(y.dims));
        float_dispatch!(x.dtype, T => {
            let (x, y) = (x.get::<T>()?, y.get::<T>()?);
            y.fill(T::default());
            each(&unpooled, &dims, places, |from, to| y[to] = x[from])
        })
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // dX[i] = dY[place(i)]   (N, C, spatial…)
        let (dy, places) = (g.dy0()?, g.x(1)?);
        let unpooled = self.unpooled(&g.meta(g.x(0)?)?.dims)?;
        Ok(Grads::from_slice(&[Some(g.emit(MaxUnpoolGrad { unpooled }, &[dy, places])?)]))
    }
}

/// The gradient of `MaxUnpool` with respect to X from dY and the places.
#[derive(Debug)]
pub struct MaxUnpoolGrad {
    /// The dimensions that the places count.
    pub unpooled: Dims,
}

impl Op for MaxUnpoolGrad {
    fn name(&self) -> &'static str {
        "MaxUnpoolGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        Ok(vec![Meta::new(need(inputs, 0)?.dtype, &need(inputs, 1)?.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (dy, places) = (need(x, 0)?, need(x, 1)?.get::<i64>()?);
        float_dispatch!(dy.dtype, T => {
            let (from, dx) = (dy.get::<T>()?, out(y, 0)?.get::<T>()?);
            each(&self.unpooled, dy.dims, places, |to, at| dx[to] = from[at])
        })
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(second("MaxUnpool"))
    }
}
