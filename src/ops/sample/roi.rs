//! `RoiAlign`, `MaxRoiPool` and their gradients.

use std::sync::Arc;

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::pool::NOWHERE;
use crate::kernels::sample::roi::{self as kernel, Align, Geometry};
use crate::ops::sample::{expect, second};
use crate::ops::{Attrs, Cx, Grads, Op, Spec, need, out};
use crate::tensor::{DType, Dims, Meta, View, ViewMut};

fn geometry(x: &[usize], regions: usize, bins: [usize; 2]) -> Result<Geometry, OpError> {
    match *x {
        [n, c, h, w] if h > 0 && w > 0 && c > 0 => Ok(Geometry { n, c, image: [h, w], regions, bins }),
        _ => Err(OpError::Shape(format!("regions of images of {x:?}"))),
    }
}

fn positive(attrs: &Attrs, name: &str, default: i64) -> Result<usize, OpError> {
    match attrs.int_or(name, default)? {
        v if (1..=i64::from(i32::MAX)).contains(&v) => Ok(v as usize),
        v => Err(OpError::Attribute(format!("'{name}' is {v}"))),
    }
}

/// ONNX `RoiAlign` (opset 10; `coordinate_transformation_mode` since 16): X (N, C, H, W), regions (R, 4) and the image of
/// each (R, int64), to (R, C, bins). Not differentiable with respect to the regions.
#[derive(Debug, Clone)]
pub struct RoiAlign {
    pub align: Align,
    pub bins: [usize; 2],
}

impl RoiAlign {
    pub(super) fn make(s: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let a = s.attrs;
        let max = match a.string("mode")?.as_deref() {
            None | Some("avg") => false,
            Some("max") => true,
            Some(other) => return Err(OpError::Attribute(format!("'mode' is {other}"))),
        };
        let half_pixel = match a.string("coordinate_transformation_mode")?.as_deref() {
            _ if s.opset < 16 => false,
            None | Some("half_pixel") => true,
            Some("output_half_pixel") => false,
            Some(other) => {
                return Err(OpError::Attribute(format!("'coordinate_transformation_mode' is {other}")));
            }
        };
        let ratio = a.int_or("sampling_ratio", 0)?;
        if !(0..=4096).contains(&ratio) {
            return Err(OpError::Attribute(format!("'sampling_ratio' is {ratio}")));
        }
        let scale = f64::from(a.float_or("spatial_scale", 1.0)?);
        let bins = [positive(a, "output_height", 1)?, positive(a, "output_width", 1)?];
        Ok(Arc::new(RoiAlign { align: Align { scale, ratio: ratio as usize, half_pixel, max }, bins }))
    }
}

impl Op for RoiAlign {
    fn name(&self) -> &'static str {
        "RoiAlign"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (x, regions, images) = (need(inputs, 0)?, need(inputs, 1)?, need(inputs, 2)?);
        let count = images.len();
        geometry(&x.dims, count, self.bins)?;
        expect("regions", regions, x, &[count, 4])?;
        expect("the regions' images", images, &Meta::new(DType::I64, &[]), &[count])?;
        Ok(vec![Meta::new(x.dtype, &[count, x.dims[1], self.bins[0], self.bins[1]])])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (x, regions, images) = (need(x, 0)?, need(x, 1)?, need(x, 2)?.get::<i64>()?);
        let g = geometry(x.dims, images.len(), self.bins)?;
        float_dispatch!(x.dtype, T => {
            let (x, regions) = (x.get::<T>()?, regions.get()?);
            kernel::align(&g, &self.align, x, regions, images, out(y, 0)?.get()?);
            Ok(())
        })
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        if g.wants(1) {
            return Err(OpError::NotDifferentiable("the regions of RoiAlign".into()));
        }
        // dX[element] += weight · dY[bin] / samples   (N, C, H, W)
        let (dy, x, regions, images) = (g.dy0()?, g.x(0)?, g.x(1)?, g.x(2)?);
        let dx = g.emit(RoiAlignGrad { op: self.clone() }, &[dy, x, regions, images])?;
        Ok(Grads::from_slice(&[Some(dx)]))
    }
}

/// The gradient of `RoiAlign` with respect to X: from dY, X, the regions and their images.
#[derive(Debug)]
pub struct RoiAlignGrad {
    pub op: RoiAlign,
}

impl Op for RoiAlignGrad {
    fn name(&self) -> &'static str {
        "RoiAlignGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 1)?;
        Ok(vec![Meta::new(x.dtype, &x.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (dy, x, regions, images) = (need(x, 0)?, need(x, 1)?, need(x, 2)?, need(x, 3)?.get::<i64>()?);
        let g = geometry(x.dims, images.len(), self.op.bins)?;
        float_dispatch!(x.dtype, T => {
            let operands = [dy.get::<T>()?, x.get()?, regions.get()?];
            kernel::align_grad(&g, &self.op.align, operands, images, out(y, 0)?.get()?);
            Ok(())
        })
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(second("RoiAlign"))
    }
}

/// ONNX `MaxRoiPool` (opset 1): X (N, C, H, W), regions (R, 5): image, x₁, y₁, x₂, y₂, to (R, C, bins). For the gradient,
/// output 1 says where in its plane each maximum lies (uint32).
#[derive(Debug, Clone)]
pub struct MaxRoiPool {
    pub scale: f64,
    pub bins: [usize; 2],
}

impl MaxRoiPool {
    pub(super) fn make(s: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let bins = match s.attrs.ints("pooled_shape")?.as_deref() {
            Some(&[h, w]) if (1..1 << 20).contains(&h) && (1..1 << 20).contains(&w) => {
                [h as usize, w as usize]
            }
            other => return Err(OpError::Attribute(format!("'pooled_shape' is {other:?}"))),
        };
        Ok(Arc::new(MaxRoiPool { scale: f64::from(s.attrs.float_or("spatial_scale", 1.0)?), bins }))
    }
}

impl Op for MaxRoiPool {
    fn name(&self) -> &'static str {
        "MaxRoiPool"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (x, regions) = (need(inputs, 0)?, need(inputs, 1)?);
        let count = regions.dims.first().copied().unwrap_or(0);
        geometry(&x.dims, count, self.bins)?;
        expect("regions", regions, x, &[count, 5])?;
        if x.dims[2] * x.dims[3] >= NOWHERE as usize {
            return Err(OpError::Unsupported("pooling of planes of more than 2^32 elements".into()));
        }
        let dims = [count, x.dims[1], self.bins[0], self.bins[1]];
        Ok(vec![Meta::new(x.dtype, &dims), Meta::new(DType::U32, &dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (x, regions) = (need(x, 0)?, need(x, 1)?);
        let g = geometry(x.dims, regions.dims[0], self.bins)?;
        let (y, rest) = y.split_first_mut().ok_or_else(|| OpError::Internal("no output".into()))?;
        let y = y.as_mut().ok_or_else(|| OpError::Internal("output 0 has no buffer".into()))?;
        let argmax = rest.first_mut().and_then(Option::as_mut).map(|a| a.get::<u32>()).transpose()?;
        float_dispatch!(x.dtype, T => {
            kernel::max_pool(&g, self.scale, x.get::<T>()?, regions.get()?, y.get()?, argmax);
            Ok(())
        })
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        if g.wants(1) {
            return Err(OpError::NotDifferentiable("the regions of MaxRoiPool".into()));
        }
        // dX[argmax(bin)] += dY[bin]   (N, C, H, W)
        let (dy, x, regions, argmax) = (g.dy0()?, g.x(0)?, g.x(1)?, g.y(1)?);
        let op = MaxRoiPoolGrad { bins: self.bins, x: g.meta(x)?.dims.clone() };
        Ok(Grads::from_slice(&[Some(g.emit(op, &[dy, regions, argmax])?)]))
    }
}

/// The gradient of `MaxRoiPool` with respect to X, of dimensions `x`: from dY, the regions, each maximum's place.
#[derive(Debug)]
pub struct MaxRoiPoolGrad {
    pub bins: [usize; 2],
    pub x: Dims,
}

impl Op for MaxRoiPoolGrad {
    fn name(&self) -> &'static str {
        "MaxRoiPoolGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        Ok(vec![Meta::new(need(inputs, 0)?.dtype, &self.x)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (dy, regions, argmax) = (need(x, 0)?, need(x, 1)?, need(x, 2)?.get::<u32>()?);
        let g = geometry(&self.x, regions.dims[0], self.bins)?;
        float_dispatch!(dy.dtype, T => {
            kernel::max_pool_grad(&g, dy.get::<T>()?, regions.get()?, argmax, out(y, 0)?.get()?);
            Ok(())
        })
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(second("MaxRoiPool"))
    }
}
