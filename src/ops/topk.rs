//! `TopK`.

use std::sync::Arc;

use crate::error::OpError;
use crate::graph::GradBuilder;
use crate::kernels::topk::TopK as Kernel;
use crate::ops::bytes::numeric;
use crate::ops::gather::GatherElementsGrad;
use crate::ops::{Cx, Grads, Op, Row, Spec, get, need};
use crate::tensor::{DType, Meta, View, ViewMut, axis};

/// ONNX `TopK` (opset 1; k as input 1 from opset 10, which must be known at plan time): the k largest (or smallest)
/// elements of X along `axis` in order, and their positions (int64).
#[derive(Debug)]
pub struct TopK {
    axis: i64,
    largest: bool,
    k: Option<i64>,
}

impl TopK {
    fn make(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let a = spec.attrs;
        Ok(Arc::new(TopK {
            axis: a.int_or("axis", -1)?,
            largest: a.flag_or("largest", true)?,
            k: if spec.opset < 10 { a.int("k")? } else { None },
        }))
    }

    fn kernel(&self, x: &[usize], k: usize) -> Result<Kernel, OpError> {
        let a = axis(self.axis, x.len())?;
        Ok(Kernel { n: x[a], inner: x[a + 1..].iter().product(), k, largest: self.largest })
    }
}

impl Op for TopK {
    fn name(&self) -> &'static str {
        "TopK"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        let k = match self.k {
            Some(k) => vec![k],
            None => need(inputs, 1)?.ints(1)?,
        };
        let a = axis(self.axis, x.rank())?;
        let n = x.dims[a];
        let mut dims = x.dims.clone();
        dims[a] = match k.as_slice() {
            [k] => usize::try_from(*k).ok().filter(|&k| k <= n),
            _ => None,
        }
        .ok_or_else(|| OpError::Shape(format!("the first {k:?} of {n}")))?;
        Ok(vec![Meta::new(x.dtype, &dims), Meta::new(DType::I64, &dims)])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let x = need(x, 0)?;
        let dims = y.iter().flatten().next().map_or(x.dims, |y| y.dims);
        let kernel = self.kernel(x.dims, dims[axis(self.axis, x.dims.len())?])?;
        let room = cx.room::<u32>(x.len())?;
        let mut y = y.iter_mut();
        let (values, positions) = (y.next().and_then(Option::as_mut), y.next().and_then(Option::as_mut));
        let positions = positions.map(|p| p.get()).transpose()?;
        numeric!(x.dtype, T => {
            kernel.select::<T>(x.get()?, values.map(|v| v.get()).transpose()?, positions, room);
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        get(inputs, 0).map_or(0, |x| x.len() * size_of::<u32>())
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // dX = dY where the elements came from, 0 elsewhere.
        let (x, dy) = (g.x(0)?, g.dy0()?);
        let dims = g.meta(x)?.dims.clone();
        let positions = g.y(1)?;
        let dx = g.emit(GatherElementsGrad { axis: axis(self.axis, dims.len())?, dims }, &[dy, positions])?;
        Ok(Grads::from_slice(&[Some(dx), None]))
    }
}

pub(super) const ROWS: &[Row] = &[Row::new("TopK", 1, TopK::make)];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    use crate::tensor::Tensor;
    let case = |name: &str, opset| Case::new("TopK", opset).named(name);
    vec![
        case("last", 24).input(&[3, 5]).fixed(Tensor::ints(&[2])).outputs(2),
        case("smallest, axis 1", 11)
            .int("largest", 0)
            .int("axis", 1)
            .input(&[2, 6, 3])
            .fixed(Tensor::ints(&[4]))
            .outputs(2),
        case("all", 10).input(&[2, 3]).fixed(Tensor::ints(&[3])).outputs(2),
        case("attribute", 1).int("k", 1).input(&[4]).outputs(2),
        case("ties", 11)
            .fixed(Tensor::ints(&[1, 2, 2, 1, 2]))
            .fixed(Tensor::ints(&[4]))
            .outputs(2)
            .forward_only(),
        case("of none", 11).input(&[2, 3]).fixed(Tensor::ints(&[0])).outputs(2),
    ]
}
