//! `Col2Im` and its gradient.

use std::sync::Arc;

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::sample::patches::{Extents, Patches, gather, spread};
use crate::ops::sample::second;
use crate::ops::window::Window;
use crate::ops::{Cx, Grads, Op, Spec, need, out};
use crate::tensor::{Dims, Meta, View, ViewMut};

/// ONNX `Col2Im` (opset 18): X (N, C · taps, columns), the image's extents and the block's, to (N, C, image…), where patches
/// that overlap are added. Both must be known before the run.
#[derive(Debug, Clone)]
pub struct Col2Im {
    window: Window,
}

impl Col2Im {
    pub(super) fn make(s: &Spec) -> Result<Arc<dyn Op>, OpError> {
        Ok(Arc::new(Col2Im { window: Window::of(s.attrs)? }))
    }

    /// The patches, and C.
    fn patches(&self, x: &[usize], image: &[i64], block: &[i64]) -> Result<(Patches, usize), OpError> {
        let bad =
            || OpError::Shape(format!("{self:?} of {x:?} to images of {image:?} by blocks of {block:?}"));
        let rank = image.len();
        let extents = |v: &[i64]| -> Option<Extents> {
            v.iter().map(|v| usize::try_from(*v).ok().filter(|v| (1..1 << 31).contains(v))).collect()
        };
        let (Some(image), Some(block)) = (extents(image), extents(block)) else { return Err(bad()) };
        let list = |v: &[usize], default: usize, n: usize| -> Option<Extents> {
            match v.len() {
                0 => Some(Extents::from_elem(default, n)),
                len => (len == n).then(|| Extents::from_slice(v)),
            }
        };
        let w = &self.window;
        let (Some(stride), Some(dilation), Some(pads)) =
            (list(&w.strides, 1, rank), list(&w.dilations, 1, rank), list(&w.pads, 0, 2 * rank))
        else {
            return Err(bad());
        };
        if rank == 0 || block.len() != rank {
            return Err(bad());
        }
        let count: Option<Extents> = (0..rank)
            .map(|d| {
                let room = image[d] + pads[d] + pads[rank + d];
                Some(room.checked_sub(dilation[d] * (block[d] - 1) + 1)? / stride[d] + 1)
            })
            .collect();
        let count = count.ok_or_else(bad)?;
        let p = Patches { image, block, stride, dilation, pad: pads[..rank].into(), count };
        match *x {
            [_, rows, columns] if rows.is_multiple_of(p.taps()) && columns == p.columns() => {
                let c = rows / p.taps();
                Ok((p, c))
            }
            _ => Err(bad()),
        }
    }
}

impl Op for Col2Im {
    fn name(&self) -> &'static str {
        "Col2Im"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        let (image, block) = (need(inputs, 1)?.ints(1)?, need(inputs, 2)?.ints(2)?);
        let (p, c) = self.patches(&x.dims, &image, &block)?;
        let mut dims = Dims::from_slice(&[x.dims[0], c]);
        dims.extend_from_slice(&p.image);
        Ok(vec![Meta::new(x.dtype, &dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (input, image, block) = (need(x, 0)?, need(x, 1)?, need(x, 2)?);
        let (p, _) = self.patches(input.dims, image.get::<i64>()?, block.get::<i64>()?)?;
        float_dispatch!(input.dtype, T => {
            gather(&p, input.get::<T>()?, out(y, 0)?.get()?);
            Ok(())
        })
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        let dy = g.dy0()?;
        let (image, block) = (g.meta(g.x(1)?)?.ints(1)?, g.meta(g.x(2)?)?.ints(2)?);
        let x = g.meta(g.x(0)?)?.dims.clone();
        // dX = the patches of dY   (N, C · taps, columns)
        let (patches, _) = self.patches(&x, &image, &block)?;
        Ok(Grads::from_slice(&[Some(g.emit(Im2Col { patches, dims: x }, &[dy])?)]))
    }
}

/// Patches of images in columns of the given dimensions: the gradient of `Col2Im`.
#[derive(Debug)]
pub struct Im2Col {
    pub patches: Patches,
    pub dims: Dims,
}

impl Op for Im2Col {
    fn name(&self) -> &'static str {
        "Im2Col"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        Ok(vec![Meta::new(need(inputs, 0)?.dtype, &self.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let image = need(x, 0)?;
        float_dispatch!(image.dtype, T => {
            spread(&self.patches, image.get::<T>()?, out(y, 0)?.get()?);
            Ok(())
        })
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(second("Col2Im"))
    }
}
