//! Quantised tensors: `QuantizeLinear`, `DequantizeLinear`, the pair of both that training passes straight through,
//! and the operators that compute with integers.

mod fake;
mod integer;

use std::sync::Arc;

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::quant::{Levels, Spread};
use crate::ops::binary::{Mul, Sub};
use crate::ops::cast::CastTo;
use crate::ops::reduce::{Kind, Reduce};
use crate::ops::view::reshape;
use crate::ops::{Attrs, Cx, Grads, Op, Row, Spec, get, need, out};
use crate::tensor::{Conversion, DType, Dims, Float, Meta, View, ViewMut, axis};

pub use fake::FakeQuantize;

/// How scales and zero points lie over a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    pub axis: i64,
    /// 0: one scale for the tensor or for each position on the axis.
    pub block: usize,
}

impl Layout {
    /// From a node's attributes.
    pub fn of(attrs: &Attrs) -> Result<Layout, OpError> {
        let block = attrs.int_or("block_size", 0)?;
        let block =
            usize::try_from(block).map_err(|_| OpError::Attribute(format!("'block_size' is {block}")))?;
        Ok(Layout { axis: attrs.int_or("axis", 1)?, block })
    }

    pub fn spread(&self, x: &[usize], scale: &[usize]) -> Result<Spread, OpError> {
        let misfit = || {
            OpError::Shape(format!(
                "scales of shape {scale:?} for {x:?}, axis {}, blocks of {}",
                self.axis, self.block
            ))
        };
        if self.block == 0 && scale.iter().product::<usize>() == 1 && scale.len() <= 1 {
            return Ok(Spread::Tensor);
        }
        let a = axis(self.axis, x.len())?;
        let (n, inner) = (x[a], x[a + 1..].iter().product());
        if self.block == 0 {
            return if scale == [n] { Ok(Spread::Axis { n, inner }) } else { Err(misfit()) };
        }
        let fits = scale.len() == x.len()
            && (0..x.len()).all(|i| scale[i] == if i == a { n.div_ceil(self.block) } else { x[i] });
        if fits { Ok(Spread::Blocks { n, inner, block: self.block }) } else { Err(misfit()) }
    }
}

/// A narrow float: levels that are not integers.
fn is_narrow_float(dtype: DType) -> bool {
    dtype.is_narrow() && range(dtype).is_err()
}

/// Smallest and largest level of an integer type.
pub fn range(dtype: DType) -> Result<(f64, f64), OpError> {
    Ok(match dtype {
        DType::U8 => (0.0, u8::MAX as f64),
        DType::I8 => (i8::MIN as f64, i8::MAX as f64),
        DType::U16 => (0.0, u16::MAX as f64),
        DType::I16 => (i16::MIN as f64, i16::MAX as f64),
        DType::I32 => (i32::MIN as f64, i32::MAX as f64),
        DType::U4 => (0.0, 15.0),
        DType::I4 => (-8.0, 7.0),
        DType::U2 => (0.0, 3.0),
        DType::I2 => (-2.0, 1.0),
        other => return Err(OpError::Type(format!("levels of type {other}"))),
    })
}

/// Runs `$body` with `$t` bound to the integer type of quantised values.
macro_rules! level_dispatch {
    ($dtype:expr, $t:ident => $body:expr) => {
        $crate::dispatch!(
            $dtype, $t => $body,
            [U8 | U4 | U2: u8, I8 | I4 | I2: i8, U16: u16, I16: i16, I32: i32],
            other => Err($crate::error::OpError::Type(format!("levels of type {other}")))
        )
    };
}
use level_dispatch;

/// ONNX `QuantizeLinear` (opset 10; per axis from 13, blocked from 21): X, scale and zero point to levels.
#[derive(Debug, Clone, Copy)]
pub struct QuantizeLinear {
    pub layout: Layout,
    /// Without a zero point.
    pub dtype: DType,
    /// To narrow floats.
    pub saturate: bool,
}

impl QuantizeLinear {
    fn make(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let code = spec.attrs.int_or("output_dtype", 0)?;
        let dtype = match code {
            0 => Some(DType::U8),
            code => i32::try_from(code).ok().and_then(DType::from_onnx),
        };
        let unsupported = || OpError::Unsupported(format!("levels of ONNX element type {code}"));
        let dtype = dtype.ok_or_else(unsupported)?;
        if !is_narrow_float(dtype) {
            range(dtype).map_err(|_| unsupported())?;
        }
        let saturate = spec.attrs.flag_or("saturate", true)?;
        Ok(Arc::new(QuantizeLinear { layout: Layout::of(spec.attrs)?, dtype, saturate }))
    }

    /// The type of the levels.
    pub fn levels(&self, inputs: &[Option<&Meta>]) -> DType {
        get(inputs, 2).map_or(self.dtype, |z| z.dtype)
    }
}

/// Checks scale and zero point against x.
fn check(layout: Layout, x: &Meta, scale: &Meta, zero: Option<&Meta>) -> Result<(), OpError> {
    layout.spread(&x.dims, &scale.dims)?;
    match zero {
        Some(z) if z.len() != scale.len() => {
            Err(OpError::Shape(format!("zero points {:?} for scales {:?}", &z.dims[..], &scale.dims[..])))
        }
        _ => Ok(()),
    }
}

impl Op for QuantizeLinear {
    fn name(&self) -> &'static str {
        "QuantizeLinear"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (x, scale) = (need(inputs, 0)?, need(inputs, 1)?);
        check(self.layout, x, scale, get(inputs, 2))?;
        if x.dtype != scale.dtype || !x.dtype.is_float() {
            return Err(OpError::Type(format!("{} with scales of {}", x.dtype, scale.dtype)));
        }
        let levels = self.levels(inputs);
        if !is_narrow_float(levels) {
            range(levels)?;
        }
        Ok(vec![Meta::new(levels, &x.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (data, scale, zero, y) = (need(x, 0)?, need(x, 1)?, get(x, 2), out(y, 0)?);
        let spread = self.layout.spread(data.dims, scale.dims)?;
        if is_narrow_float(y.dtype) {
            let (to, how) = (y.dtype, Conversion { saturate: self.saturate, ..Conversion::default() });
            return float_dispatch!(data.dtype, T => {
                let (x, scale) = (data.get::<T>()?, scale.get::<T>()?);
                let zero = |k: usize| zero.map_or(0.0, |z| to.decode(z.bytes[k]));
                spread.each(y.bytes, |y, at, k, step| {
                    for (i, (y, x)) in y.iter_mut().zip(&x[at..]).enumerate() {
                        let k = k + i * step;
                        *y = to.encode((*x / scale[k]).to64() + zero(k), how);
                    }
                });
                Ok(())
            });
        }
        let range = range(y.dtype)?;
        float_dispatch!(data.dtype, T => level_dispatch!(y.dtype, Q => {
            let zero = zero.map(|z| z.get::<Q>()).transpose()?;
            let levels = Levels::<T, Q> { spread, scale: scale.get()?, zero, range };
            levels.quantize(data.get()?, y.get()?);
            Ok(())
        }))
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        let why = "levels are integers; a gradient passes straight through where DequantizeLinear follows";
        Err(OpError::NotDifferentiable(why.into()))
    }
}

/// ONNX `DequantizeLinear` (opset 10; per axis from 13, blocked from 21): levels, scale and zero point to floats of the
/// scale's type.
#[derive(Debug, Clone, Copy)]
pub struct DequantizeLinear {
    pub layout: Layout,
}

impl DequantizeLinear {
    fn make(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let code = spec.attrs.int_or("output_dtype", 0)?;
        let dtype = i32::try_from(code).ok().and_then(DType::from_onnx);
        if code != 0 && dtype.is_none_or(|d| d.working() != DType::F32) {
            return Err(OpError::Unsupported(format!("floats of ONNX element type {code}")));
        }
        Ok(Arc::new(DequantizeLinear { layout: Layout::of(spec.attrs)? }))
    }
}

impl Op for DequantizeLinear {
    fn name(&self) -> &'static str {
        "DequantizeLinear"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (x, scale) = (need(inputs, 0)?, need(inputs, 1)?);
        check(self.layout, x, scale, get(inputs, 2))?;
        if !is_narrow_float(x.dtype) {
            range(x.dtype)?;
        }
        if get(inputs, 2).is_some_and(|z| z.dtype != x.dtype) || !scale.dtype.is_float() {
            return Err(OpError::Type(format!("levels of {} with other zero points or scales", x.dtype)));
        }
        Ok(vec![Meta::new(scale.dtype, &x.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (data, scale, zero, y) = (need(x, 0)?, need(x, 1)?, get(x, 2), out(y, 0)?);
        let spread = self.layout.spread(data.dims, scale.dims)?;
        if is_narrow_float(data.dtype) {
            let (from, x) = (data.dtype, data.bytes);
            return float_dispatch!(y.dtype, T => {
                let scale = scale.get::<T>()?;
                let zero = |k: usize| zero.map_or(0.0, |z| from.decode(z.bytes[k]));
                spread.each(y.get::<T>()?, |y, at, k, step| {
                    for (i, (y, x)) in y.iter_mut().zip(&x[at..]).enumerate() {
                        let k = k + i * step;
                        *y = (from.decode(*x) - zero(k)) as T * scale[k];
                    }
                });
                Ok(())
            });
        }
        let range = range(data.dtype)?;
        float_dispatch!(y.dtype, T => level_dispatch!(data.dtype, Q => {
            let zero = zero.map(|z| z.get::<Q>()).transpose()?;
            let levels = Levels::<T, Q> { spread, scale: scale.get()?, zero, range };
            levels.dequantize(data.get()?, y.get()?);
            Ok(())
        }))
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // The levels are given; dscale = Σ dY·(X − zero) over what shares a scale
        let (x, scale, dy) = (g.x(0)?, g.x(1)?, g.dy0()?);
        let (dims, scale_dims) = (g.meta(x)?.dims.clone(), g.meta(scale)?.dims.clone());
        let spread = self.layout.spread(&dims, &scale_dims)?;
        if matches!(spread, Spread::Blocks { .. }) {
            return Err(OpError::NotDifferentiable("scales of blocks".into()));
        }
        let a = if spread == Spread::Tensor { 0 } else { axis(self.layout.axis, dims.len())? };
        let dtype = g.meta(dy)?.dtype;
        let mut levels = g.emit(CastTo::new(dtype), &[x])?;
        if let Some(zero) = g.x_opt(2) {
            let zero = g.emit(CastTo::new(dtype), &[zero])?;
            let zero = reshape(g, zero, along(&dims, a, spread))?;
            levels = g.emit(Sub, &[levels, zero])?;
        }
        let terms = g.emit(Mul, &[dy, levels])?;
        let ds = sum_to_scales(g, terms, a, spread, scale_dims)?;
        Ok(Grads::from_slice(&[None, Some(ds), None]))
    }
}

/// The shape under which scales broadcast to a tensor of `dims`.
fn along(dims: &[usize], a: usize, spread: Spread) -> Dims {
    let one = |i: usize| spread == Spread::Tensor || i != a;
    dims.iter().enumerate().map(|(i, d)| if one(i) { 1 } else { *d }).collect()
}

/// Terms of each element, summed over what shares a scale.
fn sum_to_scales(
    g: &mut GradBuilder,
    terms: crate::graph::ValueId,
    a: usize,
    spread: Spread,
    scale: Dims,
) -> Result<crate::graph::ValueId, OpError> {
    let rank = g.meta(terms)?.rank();
    let axes = (0..rank).filter(|i| spread == Spread::Tensor || *i != a).map(|i| i as i64).collect();
    let sum = g.emit(Reduce { kind: Kind::Sum, axes: Some(axes), keepdims: false, noop: true }, &[terms])?;
    reshape(g, sum, scale)
}

pub(super) const ROWS: &[Row] = &[
    Row::new("QuantizeLinear", 10, QuantizeLinear::make),
    Row::new("DequantizeLinear", 10, DequantizeLinear::make),
    Row::new("DynamicQuantizeLinear", 11, integer::dynamic),
    Row::new("MatMulInteger", 10, integer::matmul),
    Row::new("QLinearMatMul", 10, integer::qlinear_matmul),
    Row::new("ConvInteger", 10, integer::conv),
    Row::new("QLinearConv", 10, integer::qlinear_conv),
];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    use crate::tensor::Tensor;
    let levels = |dims: &[usize], t: DType| {
        let n: usize = dims.iter().product();
        let v: Vec<i64> = (0..n as i64).map(|i| i * 7 % 23 - if t == DType::I8 { 9 } else { 0 }).collect();
        Tensor::from_slice(dims, &v).unwrap().cast(t)
    };
    let scales = |v: &[f64]| Tensor::from_slice(&[v.len()], v).unwrap();
    let q = |name: &str| Case::new("QuantizeLinear", 21).named(name).input(&[2, 4, 3]).forward_only();
    let dq = |name: &str, t| Case::new("DequantizeLinear", 21).named(name).fixed(levels(&[2, 4, 3], t));
    let mut cases = vec![
        q("tensor").fixed(Tensor::scalar(0.01)).fixed(Tensor::scalar(128u8)),
        q("axis").int("axis", -2).fixed(scales(&[0.1, 0.2, 0.02, 0.01])).fixed(levels(&[4], DType::I8)),
        q("16 bits").int("output_dtype", 4).fixed(Tensor::scalar(0.001)),
        dq("tensor", DType::U8).within(&[], 0.1, 1.0).fixed(Tensor::scalar(3u8)),
        dq("axis", DType::I8).within(&[4], 0.1, 1.0).fixed(levels(&[4], DType::I8)),
        dq("last axis", DType::I32).int("axis", 2).within(&[3], 0.1, 1.0),
        dq("blocks", DType::I8)
            .int("block_size", 2)
            .fixed(
                Tensor::from_slice(&[2, 2, 3], &(1..13).map(|i| i as f64 / 8.0).collect::<Vec<_>>()).unwrap(),
            )
            .forward_only(),
    ];
    cases.extend(integer::cases());
    cases.extend(fake::cases());
    cases
}
