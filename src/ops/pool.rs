//! Pooling and its gradients.

use std::sync::Arc;

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::pool::{self as kernel, Geometry, NOWHERE, Ordered};
use crate::ops::window::{Resolved, Window};
use crate::ops::{Cx, Grads, Op, Row, Spec, get, need, out};
use crate::tensor::{DType, Dims, Float, Meta, View, ViewMut};

fn geometry(r: &Resolved) -> Geometry {
    let Resolved { x, y, k, stride, dilation, pad, pad_end, .. } = *r;
    Geometry { x, y, k, stride, dilation, pad, pad_end }
}

/// The sizes for an input of (N, C, spatial…), and the output's dimensions.
fn resolve(window: &Window, x: &[usize]) -> Result<(Geometry, Dims), OpError> {
    if x.len() < 3 {
        return Err(OpError::Shape(format!("pooling of {x:?}: no spatial dimensions")));
    }
    let r = window.resolve(&x[2..], &[])?;
    Ok((geometry(&r), Dims::from_vec(r.output([x[0], x[1]]))))
}

/// A window over the whole of each plane.
fn whole(x: &[usize]) -> Result<(Geometry, Dims), OpError> {
    if x.len() < 2 {
        return Err(OpError::Shape(format!("global pooling of {x:?}")));
    }
    let (extent, one) = ([1, 1, x[2..].iter().product()], [1; 3]);
    let g =
        Geometry { x: extent, y: one, k: extent, stride: one, dilation: one, pad: [0; 3], pad_end: [0; 3] };
    let dims = (0..x.len()).map(|d| if d < 2 { x[d] } else { 1 }).collect();
    Ok((g, dims))
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
}

impl MaxPool {
    fn make(s: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let column_major = s.attrs.flag("storage_order")?;
        Ok(Arc::new(MaxPool { window: Window::of(s.attrs)?, column_major }))
    }
}

impl Op for MaxPool {
    fn name(&self) -> &'static str {
        "MaxPool"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        let (_, y) = resolve(&self.window, &x.dims)?;
        max_metas(x, &y)
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let x = need(x, 0)?;
        let (g, _) = resolve(&self.window, x.dims)?;
        max_forward(&g, self.column_major, cx, x, y)
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let y = get(inputs, 0).and_then(|x| resolve(&self.window, &x.dims).ok());
        y.map_or(0, |(_, y)| y.iter().product::<usize>() * size_of::<u32>())
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        max_vjp(g)
    }
}

/// ONNX `GlobalMaxPool` (opset 1): the maximum of each plane; further outputs as of [`MaxPool`].
#[derive(Debug)]
pub struct GlobalMaxPool;

impl Op for GlobalMaxPool {
    fn name(&self) -> &'static str {
        "GlobalMaxPool"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        let (_, y) = whole(&x.dims)?;
        max_metas(x, &y)
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let x = need(x, 0)?;
        let (g, _) = whole(x.dims)?;
        max_forward(&g, false, cx, x, y)
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let y = get(inputs, 0).and_then(|x| whole(&x.dims).ok());
        y.map_or(0, |(_, y)| y.iter().product::<usize>() * size_of::<u32>())
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        max_vjp(g)
    }
}

fn max_metas(x: &Meta, y: &[usize]) -> Result<Vec<Meta>, OpError> {
    if x.dims[2..].iter().product::<usize>() >= NOWHERE as usize {
        return Err(OpError::Unsupported("pooling of planes of more than 2^32 elements".into()));
    }
    Ok(vec![Meta::new(x.dtype, y), Meta::new(DType::I64, y), Meta::new(DType::U32, y)])
}

fn max_vjp(g: &mut GradBuilder) -> Result<Grads, OpError> {
    // dX[argmax(i)] += dY[i]   (N, C, spatial…)
    let (dy, argmax) = (g.dy0()?, g.y(2)?);
    let x = g.x(0)?;
    let x = g.meta(x)?.dims.clone();
    Ok(Grads::from_elem(Some(g.emit(MaxPoolGrad { x }, &[dy, argmax])?), 1))
}

fn max_forward(
    g: &Geometry,
    column_major: bool,
    cx: &mut Cx,
    x: View,
    y: &mut [Option<ViewMut>],
) -> Result<(), OpError> {
    match x.dtype {
        DType::F32 => max_typed::<f32>(g, column_major, cx, x, y),
        DType::F64 => max_typed::<f64>(g, column_major, cx, x, y),
        DType::I8 => max_typed::<i8>(g, column_major, cx, x, y),
        DType::U8 => max_typed::<u8>(g, column_major, cx, x, y),
        other => Err(OpError::Type(format!("maximum pooling of {other}"))),
    }
}

fn max_typed<T: Ordered>(
    g: &Geometry,
    column_major: bool,
    cx: &mut Cx,
    x: View,
    y: &mut [Option<ViewMut>],
) -> Result<(), OpError> {
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
    let Some(argmax) = argmax else {
        kernel::max(g, x, y, None);
        return Ok(());
    };
    kernel::max(g, x, y, Some(argmax));
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
        *index = if at == NOWHERE as usize { -1 } else { (i / py * px + spatial) as i64 };
    }
    Ok(())
}

/// The gradient of a maximum pooling of an input of dimensions `x`: from dY and each maximum's place in its plane.
#[derive(Debug)]
pub struct MaxPoolGrad {
    pub x: Dims,
}

impl Op for MaxPoolGrad {
    fn name(&self) -> &'static str {
        "MaxPoolGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (dy, argmax) = (need(inputs, 0)?, need(inputs, 1)?);
        if dy.dims != argmax.dims || dy.dims.get(..2) != self.x.get(..2) {
            return Err(OpError::Shape(format!("{self:?} of {:?} and {:?}", dy.dims, argmax.dims)));
        }
        Ok(vec![Meta::new(dy.dtype, &self.x)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (dy, argmax) = (need(x, 0)?, need(x, 1)?.get::<u32>()?);
        let plane = |d: &[usize]| d[2..].iter().product::<usize>();
        let (px, py) = (plane(&self.x), plane(dy.dims));
        float_dispatch!(dy.dtype, T => {
            kernel::max_grad(px, py, dy.get::<T>()?, argmax, out(y, 0)?.get::<T>()?);
            Ok(())
        })
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(second("MaxPool"))
    }
}

/// ONNX `AveragePool` (opset 7; dilations since 19).
#[derive(Debug, Clone)]
pub struct AveragePool {
    pub window: Window,
    /// `count_include_pad`: zeros of the padding enter the mean.
    pub include_pad: bool,
}

impl AveragePool {
    fn make(s: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let include_pad = s.attrs.flag("count_include_pad")?;
        Ok(Arc::new(AveragePool { window: Window::of(s.attrs)?, include_pad }))
    }
}

impl Op for AveragePool {
    fn name(&self) -> &'static str {
        "AveragePool"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        Ok(vec![Meta::new(x.dtype, &resolve(&self.window, &x.dims)?.1)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let x = need(x, 0)?;
        let (g, _) = resolve(&self.window, x.dims)?;
        float_dispatch!(x.dtype, T => {
            kernel::average(&g, self.include_pad, x.get::<T>()?, out(y, 0)?.get::<T>()?);
            Ok(())
        })
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
        let (_, y) = resolve(&self.pool.window, &self.x)?;
        if dy.dims != y {
            return Err(OpError::Shape(format!("{self:?} of {:?}", dy.dims)));
        }
        Ok(vec![Meta::new(dy.dtype, &self.x)])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let dy = need(x, 0)?;
        let (g, _) = resolve(&self.pool.window, &self.x)?;
        float_dispatch!(dy.dtype, T => {
            let scratch = &mut cx.scratch[..dy.bytes.len()];
            let scratch = bytemuck::try_cast_slice_mut(scratch)
                .map_err(|e| OpError::Internal(format!("scratch: {e}")))?;
            kernel::average_grad(&g, self.pool.include_pad, dy.get::<T>()?, out(y, 0)?.get::<T>()?, scratch);
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        get(inputs, 0).map_or(0, Meta::bytes)
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(second("AveragePool"))
    }
}

/// ONNX `GlobalAveragePool` (opset 1): the mean of each plane, (N, C, 1…).
#[derive(Debug)]
pub struct GlobalAveragePool;

impl Op for GlobalAveragePool {
    fn name(&self) -> &'static str {
        "GlobalAveragePool"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        Ok(vec![Meta::new(x.dtype, &whole(&x.dims)?.1)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let x = need(x, 0)?;
        let plane = x.dims[2..].iter().product();
        float_dispatch!(x.dtype, T => {
            kernel::mean_of_planes(plane, x.get::<T>()?, out(y, 0)?.get::<T>()?);
            Ok(())
        })
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // dX = dY / plane, over each plane   (N, C, spatial…)
        let (x, dy) = (g.x(0)?, g.dy0()?);
        let x = g.meta(x)?.dims.clone();
        Ok(Grads::from_elem(Some(g.emit(SpreadMean { x }, &[dy])?), 1))
    }
}

/// Each element over its plane of a tensor of dimensions `x`, divided by the plane's size.
#[derive(Debug)]
pub struct SpreadMean {
    pub x: Dims,
}

impl Op for SpreadMean {
    fn name(&self) -> &'static str {
        "SpreadMean"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let dy = need(inputs, 0)?;
        if dy.dims != whole(&self.x)?.1 {
            return Err(OpError::Shape(format!("{self:?} of {:?}", dy.dims)));
        }
        Ok(vec![Meta::new(dy.dtype, &self.x)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let dy = need(x, 0)?;
        let plane: usize = self.x[2..].iter().product();
        float_dispatch!(dy.dtype, T => {
            kernel::spread(plane, T::of(1.0 / plane as f64), dy.get::<T>()?, out(y, 0)?.get::<T>()?);
            Ok(())
        })
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
            Some(window) => resolve(window, x),
            None => whole(x),
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
    Row::new("AveragePool", 7, AveragePool::make),
    Row::new("GlobalAveragePool", 1, |_| Ok(Arc::new(GlobalAveragePool))),
    Row::new("GlobalLpPool", 2, |s| LpPool::of(s, None)),
    Row::new("GlobalMaxPool", 1, |_| Ok(Arc::new(GlobalMaxPool))),
    Row::new("LpPool", 2, |s| LpPool::of(s, Some(Window::of(s.attrs)?))),
    Row::new("MaxPool", 1, MaxPool::make),
];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    use crate::tensor::Tensor;
    /// Name, input, kernel, then attributes.
    type Shape<'a> = (&'a str, &'a [usize], &'a [i64], &'a [(&'a str, &'a [i64])]);
    let shapes: [Shape; 10] = [
        ("2-D", &[2, 3, 5, 6], &[2, 3], &[]),
        ("stride 2", &[2, 3, 6, 6], &[2, 2], &[("strides", &[2, 2])]),
        ("3×3 stride 2", &[2, 2, 7, 40], &[3, 3], &[("strides", &[2, 2]), ("pads", &[1, 1, 1, 1])]),
        ("asymmetric pads", &[1, 2, 5, 6], &[3, 3], &[("pads", &[0, 2, 1, 0])]),
        ("stride 3", &[1, 2, 8, 9], &[2, 2], &[("strides", &[3, 3])]),
        ("dilation", &[1, 2, 8, 9], &[2, 3], &[("dilations", &[2, 3]), ("pads", &[1, 2, 1, 2])]),
        ("1-D", &[2, 3, 9], &[3], &[("strides", &[2]), ("pads", &[1, 1])]),
        ("3-D", &[1, 2, 4, 5, 6], &[2, 2, 3], &[("strides", &[1, 2, 2]), ("pads", &[1, 0, 1, 0, 1, 1])]),
        ("no images", &[0, 2, 4, 4], &[2, 2], &[]),
        ("larger", &[3, 9, 20, 20], &[3, 3], &[("pads", &[1, 1, 1, 1])]),
    ];
    let mut cases = Vec::new();
    for op in ["MaxPool", "AveragePool", "LpPool"] {
        for (name, x, kernel, attrs) in &shapes {
            for variant in ["", " ceil", " SAME_UPPER", " SAME_LOWER", " counting pads"] {
                let mut case =
                    Case::new(op, 19).named(&format!("{name}{variant}")).ints("kernel_shape", kernel);
                for (key, value) in *attrs {
                    if !(*key == "pads" && variant.starts_with(" SAME")) {
                        case = case.ints(key, value);
                    }
                }
                case = match variant {
                    " ceil" => case.int("ceil_mode", 1),
                    " counting pads" if op == "AveragePool" => {
                        case.int("ceil_mode", 1).int("count_include_pad", 1)
                    }
                    " SAME_UPPER" | " SAME_LOWER" => case.string("auto_pad", variant.trim()),
                    "" => case,
                    _ => continue,
                };
                // Away from the kinks at zero.
                cases.push(if op == "LpPool" { case.within(x, 0.2, 1.0) } else { case.input(x) });
            }
        }
    }
    for op in ["GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"] {
        for x in
            [&[2, 3, 4, 5][..], &[2, 3, 7], &[1, 2, 3, 4, 5], &[2, 3, 1, 1], &[0, 3, 2, 2], &[2, 40, 30, 30]]
        {
            cases.push(Case::new(op, 13).named(&format!("{x:?}")).within(x, 0.2, 1.0));
        }
    }
    for p in [1, 3, 4] {
        let case =
            Case::new("LpPool", 11).named(&format!("p = {p}")).int("p", p).ints("kernel_shape", &[2, 2]);
        cases.push(case.within(&[1, 2, 5, 5], 0.2, 1.0));
    }
    cases.push(
        Case::new("MaxPool", 12)
            .named("integers")
            .ints("kernel_shape", &[2, 2])
            .fixed(Tensor::from_slice(&[1, 1, 2, 2], &[1u8, 7, 3, 2]).unwrap())
            .forward_only(),
    );
    cases.push(
        Case::new("MaxPool", 12)
            .named("with Indices")
            .outputs(2)
            .ints("kernel_shape", &[2, 2])
            .input(&[1, 2, 4, 5]),
    );
    cases
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{Attr, Attrs, eval};
    use crate::tensor::Tensor;

    #[test]
    fn pool_cases() {
        cases().iter().for_each(crate::ops::cases::check);
    }

    fn window(attrs: &[(&str, &[i64])]) -> Window {
        let mut a = Attrs::default();
        for (name, value) in attrs {
            a.0.insert(name.to_string(), Attr::Ints(value.to_vec()));
        }
        Window::of(&a).unwrap()
    }

    #[test]
    fn the_first_of_equal_maxima_and_column_major_indices() {
        let x =
            Tensor::from_slice(&[1, 2, 2, 3], &[1f32, 4., 4., 4., 0., 0., 2., 2., 3., 3., 9., 1.]).unwrap();
        let mut op = MaxPool { window: window(&[("kernel_shape", &[2, 2])]), column_major: false };
        let out = eval(&op, &[Some(&x)]).unwrap();
        assert_eq!(out[0].to_f64(), [4., 4., 9., 9.]);
        assert_eq!(out[1].to_ints().unwrap(), [1, 1, 10, 10]);
        assert_eq!(out[2].to_ints().unwrap(), [1, 1, 4, 4]);
        op.column_major = true;
        let out = eval(&op, &[Some(&x)]).unwrap();
        assert_eq!(out[1].to_ints().unwrap(), [2, 2, 9, 9]);
    }

    #[test]
    fn nan_wins_and_padding_never_does() {
        let x = Tensor::from_slice(&[1, 1, 3], &[-1f32, f32::NAN, -3.]).unwrap();
        let op =
            MaxPool { window: window(&[("kernel_shape", &[2]), ("pads", &[1, 1])]), column_major: false };
        let y = eval(&op, &[Some(&x)]).unwrap()[0].to_f64();
        assert!(y[0] == -1.0 && y[1].is_nan() && y[2].is_nan() && y[3] == -3.0, "{y:?}");
    }

    #[test]
    fn ceil_mode_leaves_out_windows_that_begin_in_the_end_padding() {
        // PyTorch: max_pool1d of 3 elements, kernel 1, stride 2, padding 0, ceil: 2 outputs; of 4 elements, kernel
        // 2, stride 3, padding 1, ceil: 2.
        let mut w = window(&[("kernel_shape", &[1]), ("strides", &[2])]);
        w.ceil = true;
        assert_eq!(w.resolve(&[3], &[]).unwrap().y, [1, 1, 2]);
        let mut w = window(&[("kernel_shape", &[2]), ("strides", &[3]), ("pads", &[1, 1])]);
        w.ceil = true;
        assert_eq!(w.resolve(&[4], &[]).unwrap().y, [1, 1, 2]);
        assert_eq!(w.resolve(&[2], &[]).unwrap().y, [1, 1, 1]);
    }
}
