//! Pooling and its gradients.

use std::sync::Arc;

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::layout::Layout;
use crate::kernels::pool::{self as kernel, Geometry, NOWHERE, Ordered, last};
use crate::kernels::reduce::{Plan, SumOf, reduce};
use crate::ops::layout::rank_of;
use crate::ops::window::{Resolved, Window};
use crate::ops::{ChannelsLast, Cx, Grads, Op, Row, Spec, get, need, out};
use crate::tensor::{DType, Dims, Float, Meta, View, ViewMut};

fn geometry(r: &Resolved) -> Geometry {
    let Resolved { x, y, k, stride, dilation, pad, pad_end, .. } = *r;
    Geometry { x, y, k, stride, dilation, pad, pad_end }
}

/// The sizes for an input of (N, C, spatial…) in the given layout, and the output's dimensions.
fn resolve(window: &Window, layout: Layout, x: &[usize]) -> Result<(Geometry, Dims), OpError> {
    let x = &layout.ordinary(x);
    if x.len() < 3 {
        return Err(OpError::Shape(format!("pooling of {x:?}: no spatial dimensions")));
    }
    let r = window.resolve(&x[2..], &[])?;
    Ok((geometry(&r), layout.of(&r.output([x[0], x[1]]))))
}

/// A window over the whole of each plane.
fn whole(layout: Layout, x: &[usize]) -> Result<(Geometry, Dims), OpError> {
    let x = &layout.ordinary(x);
    if x.len() < 2 {
        return Err(OpError::Shape(format!("global pooling of {x:?}")));
    }
    let (extent, one) = ([1, 1, x[2..].iter().product()], [1; 3]);
    let g =
        Geometry { x: extent, y: one, k: extent, stride: one, dilation: one, pad: [0; 3], pad_end: [0; 3] };
    let dims: Dims = (0..x.len()).map(|d| if d < 2 { x[d] } else { 1 }).collect();
    Ok((g, layout.of(&dims)))
}

/// Channels of a tensor of (N, spatial…, C).
fn channels(x: &[usize]) -> usize {
    x.last().copied().unwrap_or(0)
}

fn second(of: &str) -> OpError {
    OpError::NotDifferentiable(format!("second derivatives of {of}"))
}

/// ONNX `MaxPool` (opset 1): Y, Indices (int64, over the whole tensor) and, for the gradient, where in its plane
/// each maximum lies (uint32). The first of equal elements is the maximum.
#[derive(Debug, Clone)]
pub struct MaxPool {
    pub window: Window,
    /// Indices count the spatial dimensions with the first one fastest.
    pub column_major: bool,
    /// Of X and all outputs. What Indices and places count does not depend on it.
    pub layout: Layout,
}

impl MaxPool {
    fn make(s: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let column_major = s.attrs.flag("storage_order")?;
        Ok(Arc::new(MaxPool { window: Window::of(s.attrs)?, column_major, layout: Layout::First }))
    }
}

impl Op for MaxPool {
    fn name(&self) -> &'static str {
        "MaxPool"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        let (_, y) = resolve(&self.window, self.layout, &x.dims)?;
        max_metas(x, &y)
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let x = need(x, 0)?;
        let (g, _) = resolve(&self.window, self.layout, x.dims)?;
        max_forward(&g, self.layout, self.column_major, cx, x, y)
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let y = get(inputs, 0).and_then(|x| resolve(&self.window, self.layout, &x.dims).ok());
        y.map_or(0, |(_, y)| y.iter().product::<usize>() * size_of::<u32>())
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        rank_of(inputs, 0)?;
        let op = MaxPool { layout: Layout::Last, ..self.clone() };
        Some(ChannelsLast::by(op, &[true], &[true; 3]))
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        max_vjp(g, Some(&self.window))
    }
}

/// ONNX `GlobalMaxPool` (opset 1): the maximum of each plane; further outputs as of [`MaxPool`].
#[derive(Debug)]
pub struct GlobalMaxPool {
    pub layout: Layout,
}

impl Op for GlobalMaxPool {
    fn name(&self) -> &'static str {
        "GlobalMaxPool"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        let (_, y) = whole(self.layout, &x.dims)?;
        max_metas(x, &y)
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let x = need(x, 0)?;
        let (g, _) = whole(self.layout, x.dims)?;
        max_forward(&g, self.layout, false, cx, x, y)
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let y = get(inputs, 0).and_then(|x| whole(self.layout, &x.dims).ok());
        y.map_or(0, |(_, y)| y.iter().product::<usize>() * size_of::<u32>())
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        rank_of(inputs, 0)?;
        let op = GlobalMaxPool { layout: Layout::Last };
        Some(ChannelsLast::by(op, &[true], &[true; 3]))
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        max_vjp(g, None)
    }
}

fn max_metas(x: &Meta, y: &[usize]) -> Result<Vec<Meta>, OpError> {
    if x.dims[2..].iter().product::<usize>() >= NOWHERE as usize {
        return Err(OpError::Unsupported("pooling of planes of more than 2^32 elements".into()));
    }
    Ok(vec![Meta::new(x.dtype, y), Meta::new(DType::I64, y), Meta::new(DType::U32, y)])
}

fn max_vjp(g: &mut GradBuilder, window: Option<&Window>) -> Result<Grads, OpError> {
    // dX[argmax(i)] += dY[i]   (N, C, spatial…)
    let (dy, argmax) = (g.dy0()?, g.y(2)?);
    let x = g.x(0)?;
    let x = g.meta(x)?.dims.clone();
    let op = MaxPoolGrad { window: window.cloned(), x, layout: Layout::First };
    Ok(Grads::from_elem(Some(g.emit(op, &[dy, argmax])?), 1))
}

fn max_forward(
    g: &Geometry,
    layout: Layout,
    column_major: bool,
    cx: &mut Cx,
    x: View,
    y: &mut [Option<ViewMut>],
) -> Result<(), OpError> {
    match x.dtype {
        DType::F32 => max_typed::<f32>(g, layout, column_major, cx, x, y),
        DType::F64 => max_typed::<f64>(g, layout, column_major, cx, x, y),
        DType::I8 => max_typed::<i8>(g, layout, column_major, cx, x, y),
        DType::U8 => max_typed::<u8>(g, layout, column_major, cx, x, y),
        other => Err(OpError::Type(format!("maximum pooling of {other}"))),
    }
}

fn max_typed<T: Ordered>(
    g: &Geometry,
    layout: Layout,
    column_major: bool,
    cx: &mut Cx,
    x: View,
    y: &mut [Option<ViewMut>],
) -> Result<(), OpError> {
    let c = channels(x.dims);
    let x = x.get::<T>()?;
    let [y, rest @ ..] = y else { return Err(OpError::Internal("no output".into())) };
    let y = y.as_mut().ok_or_else(|| OpError::Internal("output 0 has no buffer".into()))?.get::<T>()?;
    let (indices, argmax) = match rest {
        [] => (None, None),
        [indices] => (indices.as_mut(), None),
        [indices, argmax, ..] => (indices.as_mut(), argmax.as_mut()),
    };
    let argmax = match argmax {
        Some(a) => Some(a.get::<u32>()?),
        None if indices.is_some() => {
            let whole = y.len() * size_of::<u32>();
            let scratch = cx.scratch.get_mut(..whole);
            let scratch = scratch.and_then(|s| bytemuck::try_cast_slice_mut::<u8, u32>(s).ok());
            Some(scratch.ok_or_else(|| OpError::Internal("scratch is too small".into()))?)
        }
        None => None,
    };
    let mut max = |argmax: Option<&mut [u32]>| match layout {
        Layout::First => kernel::max(g, x, y, argmax),
        Layout::Last => last::max(g, c, x, y, argmax),
    };
    let Some(argmax) = argmax else {
        max(None);
        return Ok(());
    };
    max(Some(argmax));
    let Some(indices) = indices else { return Ok(()) };
    let (px, py) = (g.x.iter().product::<usize>(), g.y.iter().product::<usize>().max(1));
    for (i, (index, &at)) in indices.get::<i64>()?.iter_mut().zip(&*argmax).enumerate() {
        let at = at as usize;
        let spatial = match column_major {
            true => {
                let [_, h, w] = g.x;
                let (a, b, c) = (at / (h * w), at / w % h, at % w);
                a + g.x[0] * (b + h * c)
            }
            false => at,
        };
        let plane = match layout {
            Layout::First => i / py,
            Layout::Last => i / (py * c) * c + i % c,
        };
        *index = if at == NOWHERE as usize { -1 } else { (plane * px + spatial) as i64 };
    }
    Ok(())
}

/// The gradient of a maximum pooling of an input of dimensions `x`: from dY and each maximum's place in its plane.
#[derive(Debug, Clone)]
pub struct MaxPoolGrad {
    /// `None`: the whole plane.
    pub window: Option<Window>,
    pub x: Dims,
    pub layout: Layout,
}

impl MaxPoolGrad {
    fn resolve(&self) -> Result<(Geometry, Dims), OpError> {
        match &self.window {
            Some(window) => resolve(window, self.layout, &self.x),
            None => whole(self.layout, &self.x),
        }
    }
}

impl Op for MaxPoolGrad {
    fn name(&self) -> &'static str {
        "MaxPoolGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (dy, argmax) = (need(inputs, 0)?, need(inputs, 1)?);
        if dy.dims != argmax.dims || dy.dims != self.resolve()?.1 {
            return Err(OpError::Shape(format!("{self:?} of {:?} and {:?}", dy.dims, argmax.dims)));
        }
        Ok(vec![Meta::new(dy.dtype, &self.x)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (dy, argmax) = (need(x, 0)?, need(x, 1)?.get::<u32>()?);
        let (g, _) = self.resolve()?;
        float_dispatch!(dy.dtype, T => {
            let (dy, dx) = (dy.get::<T>()?, out(y, 0)?.get::<T>()?);
            match self.layout {
                Layout::First => kernel::max_grad(&g, dy, argmax, dx),
                Layout::Last => last::max_grad(&g, channels(&self.x), dy, argmax, dx),
            }
            Ok(())
        })
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        rank_of(inputs, 0)?;
        let op =
            MaxPoolGrad { window: self.window.clone(), x: Layout::Last.of(&self.x), layout: Layout::Last };
        Some(ChannelsLast::by(op, &[true; 2], &[true]))
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(second("MaxPool"))
    }
}

/// ONNX `AveragePool` (opset 1; dilations since 19).
#[derive(Debug, Clone)]
pub struct AveragePool {
    pub window: Window,
    /// `count_include_pad`: zeros of the padding enter the mean.
    pub include_pad: bool,
    pub layout: Layout,
}

impl AveragePool {
    fn make(s: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let include_pad = s.attrs.flag("count_include_pad")?;
        Ok(Arc::new(AveragePool { window: Window::of(s.attrs)?, include_pad, layout: Layout::First }))
    }
}

impl Op for AveragePool {
    fn name(&self) -> &'static str {
        "AveragePool"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        Ok(vec![Meta::new(x.dtype, &resolve(&self.window, self.layout, &x.dims)?.1)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let x = need(x, 0)?;
        let (g, _) = resolve(&self.window, self.layout, x.dims)?;
        float_dispatch!(x.dtype, T => {
            let c = channels(x.dims);
            let (x, y) = (x.get::<T>()?, out(y, 0)?.get::<T>()?);
            match self.layout {
                Layout::First => kernel::average(&g, self.include_pad, x, y),
                Layout::Last => last::average(&g, c, self.include_pad, x, y),
            }
            Ok(())
        })
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        rank_of(inputs, 0)?;
        let op = AveragePool { layout: Layout::Last, ..self.clone() };
        Some(ChannelsLast::by(op, &[true], &[true]))
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // dX[j] = Σ over windows i that hold j of dY[i] / count(i)   (N, C, spatial…)
        let (x, dy) = (g.x(0)?, g.dy0()?);
        let x = g.meta(x)?.dims.clone();
        Ok(Grads::from_elem(Some(g.emit(AveragePoolGrad { pool: self.clone(), x }, &[dy])?), 1))
    }
}

/// The gradient of `AveragePool` with respect to its input, of dimensions `x`: from dY.
#[derive(Debug)]
pub struct AveragePoolGrad {
    pub pool: AveragePool,
    pub x: Dims,
}

impl Op for AveragePoolGrad {
    fn name(&self) -> &'static str {
        "AveragePoolGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let dy = need(inputs, 0)?;
        let (_, y) = resolve(&self.pool.window, self.pool.layout, &self.x)?;
        if dy.dims != y {
            return Err(OpError::Shape(format!("{self:?} of {:?}", dy.dims)));
        }
        Ok(vec![Meta::new(dy.dtype, &self.x)])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let dy = need(x, 0)?;
        let (g, _) = resolve(&self.pool.window, self.pool.layout, &self.x)?;
        float_dispatch!(dy.dtype, T => {
            let scratch = &mut cx.scratch[..dy.bytes.len()];
            let scratch = bytemuck::try_cast_slice_mut(scratch)
                .map_err(|e| OpError::Internal(format!("scratch: {e}")))?;
            let (dy, dx, pads) = (dy.get::<T>()?, out(y, 0)?.get::<T>()?, self.pool.include_pad);
            match self.pool.layout {
                Layout::First => kernel::average_grad(&g, pads, dy, dx, scratch),
                Layout::Last => last::average_grad(&g, channels(&self.x), pads, dy, dx, scratch),
            }
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        get(inputs, 0).map_or(0, Meta::bytes)
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        rank_of(inputs, 0)?;
        let pool = AveragePool { layout: Layout::Last, ..self.pool.clone() };
        let op = AveragePoolGrad { pool, x: Layout::Last.of(&self.x) };
        Some(ChannelsLast::by(op, &[true], &[true]))
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(second("AveragePool"))
    }
}

/// ONNX `GlobalAveragePool` (opset 1): the mean of each plane, (N, C, 1…).
#[derive(Debug)]
pub struct GlobalAveragePool {
    pub layout: Layout,
}

impl Op for GlobalAveragePool {
    fn name(&self) -> &'static str {
        "GlobalAveragePool"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        Ok(vec![Meta::new(x.dtype, &whole(self.layout, &x.dims)?.1)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let x = need(x, 0)?;
        let (g, _) = whole(self.layout, x.dims)?;
        let (n, plane, c) = (x.dims[0], g.x[2], channels(x.dims));
        float_dispatch!(x.dtype, T => {
            let (x, y) = (x.get::<T>()?, out(y, 0)?.get::<T>()?);
            match self.layout {
                Layout::First => kernel::mean_of_planes(plane, x, y),
                Layout::Last => {
                    let mean = SumOf { f: |x: T| x, finish: |sum| sum / plane as f64 };
                    reduce(y, x, &Plan::new(&[n, plane, c], |d| d == 1), &mean);
                }
            }
            Ok(())
        })
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        rank_of(inputs, 0)?;
        let op = GlobalAveragePool { layout: Layout::Last };
        Some(ChannelsLast::by(op, &[true], &[true]))
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // dX = dY / plane, over each plane   (N, C, spatial…)
        let (x, dy) = (g.x(0)?, g.dy0()?);
        let x = g.meta(x)?.dims.clone();
        Ok(Grads::from_elem(Some(g.emit(SpreadMean { x, layout: Layout::First }, &[dy])?), 1))
    }
}

/// Each element over its plane of a tensor of dimensions `x`, divided by the plane's size.
#[derive(Debug)]
pub struct SpreadMean {
    pub x: Dims,
    pub layout: Layout,
}

impl Op for SpreadMean {
    fn name(&self) -> &'static str {
        "SpreadMean"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let dy = need(inputs, 0)?;
        if dy.dims != whole(self.layout, &self.x)?.1 {
            return Err(OpError::Shape(format!("{self:?} of {:?}", dy.dims)));
        }
        Ok(vec![Meta::new(dy.dtype, &self.x)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let dy = need(x, 0)?;
        let plane = whole(self.layout, &self.x)?.0.x[2];
        float_dispatch!(dy.dtype, T => {
            let (dy, dx, scale) = (dy.get::<T>()?, out(y, 0)?.get::<T>()?, T::of(1.0 / plane as f64));
            match self.layout {
                Layout::First => kernel::spread(plane, scale, dy, dx),
                Layout::Last => last::spread(plane, channels(&self.x), scale, dy, dx),
            }
            Ok(())
        })
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        rank_of(inputs, 0)?;
        let op = SpreadMean { x: Layout::Last.of(&self.x), layout: Layout::Last };
        Some(ChannelsLast::by(op, &[true], &[true]))
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(second("GlobalAveragePool"))
    }
}

/// ONNX `LpPool` (opset 2; dilations and ceil_mode since 18) and `GlobalLpPool` (opset 2).
#[derive(Debug, Clone)]
pub struct LpPool {
    /// `None`: the whole plane.
    pub window: Option<Window>,
    pub p: i32,
}

impl LpPool {
    fn of(s: &Spec, window: Option<Window>) -> Result<Arc<dyn Op>, OpError> {
        let p = s.attrs.int_or("p", 2)?;
        match i32::try_from(p) {
            Ok(p) if p >= 1 => Ok(Arc::new(LpPool { window, p })),
            _ => Err(OpError::Attribute(format!("'p' is {p}"))),
        }
    }

    fn resolve(&self, x: &[usize]) -> Result<(Geometry, Dims), OpError> {
        match &self.window {
            Some(window) => resolve(window, Layout::First, x),
            None => whole(Layout::First, x),
        }
    }
}

impl Op for LpPool {
    fn name(&self) -> &'static str {
        if self.window.is_some() { "LpPool" } else { "GlobalLpPool" }
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        Ok(vec![Meta::new(x.dtype, &self.resolve(&x.dims)?.1)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let x = need(x, 0)?;
        let (g, _) = self.resolve(x.dims)?;
        float_dispatch!(x.dtype, T => {
            kernel::lp(&g, self.p, x.get::<T>()?, out(y, 0)?.get::<T>()?);
            Ok(())
        })
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // dX = sign(X) (|X| / Y)^(p−1) · dY, summed over the windows
        let (x, y, dy) = (g.x(0)?, g.y(0)?, g.dy0()?);
        Ok(Grads::from_elem(Some(g.emit(LpPoolGrad { pool: self.clone() }, &[dy, x, y])?), 1))
    }
}

/// The gradient of `LpPool` with respect to its input: from dY, X and Y.
#[derive(Debug)]
pub struct LpPoolGrad {
    pub pool: LpPool,
}

impl Op for LpPoolGrad {
    fn name(&self) -> &'static str {
        "LpPoolGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (dy, x, y) = (need(inputs, 0)?, need(inputs, 1)?, need(inputs, 2)?);
        if dy.dims != y.dims || self.pool.resolve(&x.dims)?.1 != y.dims {
            return Err(OpError::Shape(format!("{self:?} of {:?} and {:?}", dy.dims, x.dims)));
        }
        Ok(vec![Meta::new(dy.dtype, &x.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (dy, x, yf) = (need(x, 0)?, need(x, 1)?, need(x, 2)?);
        let (g, _) = self.pool.resolve(x.dims)?;
        float_dispatch!(dy.dtype, T => {
            let dx = out(y, 0)?.get::<T>()?;
            kernel::lp_grad(&g, self.pool.p, dy.get::<T>()?, x.get::<T>()?, yf.get::<T>()?, dx);
            Ok(())
        })
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(second("LpPool"))
    }
}

pub(super) const ROWS: &[Row] = &[
    Row::new("AveragePool", 1, AveragePool::make),
    Row::new("GlobalAveragePool", 1, |_| Ok(Arc::new(GlobalAveragePool { layout: Layout::First }))),
    Row::new("GlobalLpPool", 2, |s| LpPool::of(s, None)),
    Row::new("GlobalMaxPool", 1, |_| Ok(Arc::new(GlobalMaxPool { layout: Layout::First }))),
    Row::new("LpPool", 2, |s| LpPool::of(s, Some(Window::of(s.attrs)?))),
    Row::new("MaxPool", 1, MaxPool::make),
];

#[cfg(test)]
mod cases;
#[cfg(test)]
pub(super) use cases::cases;
