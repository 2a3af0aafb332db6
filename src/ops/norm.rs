//! Normalisation of each sample by itself: of rows (`LayerNormalization` and `RMSNormalization`), of groups of channels
//! (`InstanceNormalization` and `GroupNormalization`), and across neighbouring channels (`LRN`).

mod groups;

use std::sync::Arc;

pub use groups::GroupNorm;
pub(crate) use groups::per_channel;
#[cfg(test)]
pub(super) use groups::{GroupNormInputGrad, GroupNormSums};

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::{GradBuilder, ValueId};
use crate::kernels::layout::Layout;
use crate::kernels::lrn::{Lrn as Across, lrn, lrn_grad};
use crate::kernels::norm::{RowNorm as Kernel, Stat};
use crate::ops::batch_norm::{ChannelParamGrad, ChannelSum};
use crate::ops::half::{elements, widened};
use crate::ops::layout::rank_of;
use crate::ops::view::ReshapeTo;
use crate::ops::{ChannelsLast, Cx, Grads, Op, Row, Spec, get, need, out};
use crate::tensor::{Dims, Float, Meta, View, ViewMut, axis};

/// ONNX `LayerNormalization` (opset 17) and `RMSNormalization` (23) of the dimensions from `axis` on. Inputs x, scale, which
/// broadcasts to x, and, where there is one, shift; outputs y and, one a row, the mean and the inverse standard deviation
/// (`LayerNormalization` has them in ONNX too).
#[derive(Debug)]
pub struct RowNorm {
    axis: i64,
    epsilon: f64,
    /// `false`: RMS, without subtracting the mean and without a shift.
    center: bool,
}

/// The attribute, of nodes that compute in f32.
fn epsilon(spec: &Spec) -> Result<f64, OpError> {
    match spec.attrs.int_or("stash_type", 1)? {
        1 => Ok(spec.attrs.float_or("epsilon", 1e-5)?.into()),
        _ => Err(OpError::Unsupported("a stash_type other than float32".into())),
    }
}

/// Where means and inverse deviations go, an output each or, where it is not there, half of what is `near`.
fn statistics<'a, T: Float>(
    outputs: &'a mut [Option<ViewMut>],
    near: &'a mut [T],
) -> Result<(&'a mut [T], &'a mut [T]), OpError> {
    let (mean, inv) = near.split_at_mut(near.len() / 2);
    let (first, rest) = outputs.split_at_mut(outputs.len().min(1));
    let or = |y: &'a mut [Option<ViewMut>], near| match y {
        [Some(y), ..] => y.get::<T>(),
        _ => Ok(near),
    };
    Ok((or(first, mean)?, or(rest, inv)?))
}

/// Fails where scale and shift are not of x's type and of the same shape.
fn alike(x: &Meta, scale: &Meta, shift: Option<&Meta>) -> Result<(), OpError> {
    for (i, m) in [Some(scale), shift].into_iter().enumerate() {
        let Some(m) = m else { continue };
        if m.dtype != x.dtype {
            return Err(OpError::Type(format!("input {} is {}, input 0 is {}", i + 1, m.dtype, x.dtype)));
        }
        if m.dims != scale.dims {
            return Err(OpError::Unsupported(format!(
                "shift of shape {:?} beside scale of shape {:?}",
                m.dims.as_slice(),
                scale.dims.as_slice()
            )));
        }
    }
    Ok(())
}

/// The gradient of a scale or shift of such dimensions, from one of as many elements in a row.
fn reshaped(g: &mut GradBuilder, v: ValueId, dims: &Dims) -> Result<ValueId, OpError> {
    if dims.len() == 1 { Ok(v) } else { g.emit(ReshapeTo { dims: dims.clone() }, &[v]) }
}

impl RowNorm {
    fn parse(spec: &Spec, center: bool) -> Result<Arc<dyn Op>, OpError> {
        let axis = spec.attrs.int_or("axis", -1)?;
        Ok(Arc::new(RowNorm { axis, epsilon: epsilon(spec)?, center }))
    }

    /// Layer normalisation of the dimensions from `axis` on.
    pub fn layer(axis: i64, epsilon: f32) -> Self {
        RowNorm { axis, epsilon: epsilon.into(), center: true }
    }

    /// Division by the root mean square of the dimensions from `axis` on.
    pub fn rms(axis: i64, epsilon: f32) -> Self {
        RowNorm { axis, epsilon: epsilon.into(), center: false }
    }

    /// The rows of x, and the shape of their statistics.
    fn rows(&self, x: &[usize], scale: &[usize]) -> Result<(Kernel, Dims), OpError> {
        let bad = || OpError::Shape(format!("scale of shape {scale:?} for x of shape {x:?}"));
        let (outer, inner) = x.split_at(axis(self.axis, x.len())?);
        let stats = outer.iter().copied().chain(inner.iter().map(|_| 1)).collect();
        let first = scale.iter().position(|&d| d != 1).unwrap_or(scale.len());
        let last = scale.iter().rposition(|&d| d != 1).map_or(first, |i| i + 1);
        let (core, below) = (&scale[first..last], scale.len() - last);
        if below > inner.len() || core.len() > inner.len() - below {
            return Err(bad());
        }
        let (rest, spanned) = inner.split_at(inner.len() - below);
        if !rest.ends_with(core) {
            return Err(bad());
        }
        let len = inner.iter().product();
        let period: usize = core.iter().product();
        // One scale for all is a run as long as the row.
        let span = if core.is_empty() { len } else { spanned.iter().product() };
        Ok((Kernel { len, period, span, center: self.center, epsilon: self.epsilon }, stats))
    }
}

impl Op for RowNorm {
    fn name(&self) -> &'static str {
        if self.center { "LayerNormalization" } else { "RMSNormalization" }
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (x, scale) = (need(inputs, 0)?, need(inputs, 1)?);
        let (_, stats) = self.rows(&x.dims, &scale.dims)?;
        alike(x, scale, get(inputs, 2))?;
        let stats = Meta::new(x.dtype, &stats);
        Ok(vec![Meta::new(x.dtype, &x.dims), stats.clone(), stats])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let scale = need(x, 1)?;
        let [y, stats @ ..] = y else { return Err(OpError::Internal("no output".into())) };
        let y = y.as_mut().ok_or_else(|| OpError::Internal("output 0 has no buffer".into()))?;
        let (rows, dims) = self.rows(y.dims, scale.dims)?;
        let count: usize = dims.iter().product();
        float_dispatch!(y.dtype, T => {
            let input = get(x, 0).map(|x| x.get::<T>()).transpose()?;
            let shift = get(x, 2).map(|x| x.get::<T>()).transpose()?;
            let (mean, inv) = statistics(stats, cx.room::<T>(2 * count)?)?;
            rows.forward(input, Some(scale.get::<T>()?), shift, y.get::<T>()?, mean, inv);
            Ok(())
        })
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // g = dy·scale, x̂ = (x − mean)·inv:  dx = inv·(g − mean(g) − x̂·mean(g·x̂)) over each row
        // dscale = Σ dy·x̂,  dshift = Σ dy  over what the scale was broadcast to. (RMS: mean = 0, no mean(g).)
        if g.dy(1).is_some() || g.dy(2).is_some() {
            return Err(OpError::NotDifferentiable("gradient through a mean or deviation".into()));
        }
        let (x, scale, dy) = (g.x(0)?, g.x(1)?, g.dy0()?);
        let (dims, scale_dims) = (g.meta(x)?.dims.clone(), g.meta(scale)?.dims.clone());
        let (rows, _) = self.rows(&dims, &scale_dims)?;
        let channels = rows.channels(dims.iter().product());
        let mut grads = Grads::from_elem(None, 3);
        if g.wants(0) || g.wants(1) {
            let mean = if rows.center { Some(g.y(1)?) } else { None };
            let inv = g.y(2)?;
            if g.wants(0) {
                let inputs = [Some(x), Some(dy), Some(scale), mean, Some(inv)];
                grads[0] = Some(g.emit_all(RowNormInputGrad { rows }, &inputs, 1)?[0]);
            }
            if g.wants(1) {
                let op = ChannelParamGrad { channels, stat: Stat::Row(rows.len), epsilon: None };
                let made = g.emit_all(op, &[Some(x), Some(dy), mean, Some(inv)], 2)?;
                grads[1] = Some(reshaped(g, made[0], &scale_dims)?);
                grads[2] = Some(reshaped(g, made[1], &scale_dims)?);
            }
        }
        if g.wants(2) && grads[2].is_none() && self.center {
            let sum = g.emit(ChannelSum { channels }, &[dy])?;
            grads[2] = Some(reshaped(g, sum, &scale_dims)?);
        }
        Ok(grads)
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(0, 0)]
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        match (get(inputs, 0), get(inputs, 1)) {
            (Some(x), Some(scale)) => {
                let stats = self.rows(&x.dims, &scale.dims).map_or(0, |(_, d)| d.iter().product());
                2 * stats * x.dtype.size()
            }
            _ => 0,
        }
    }
}

fn second<T>() -> Result<T, OpError> {
    Err(OpError::NotDifferentiable("second derivatives are not supported".into()))
}

/// Gradient of [`RowNorm`]'s input. Inputs: x, dy, scale, mean (absent: 0), inverse deviation.
#[derive(Debug)]
pub(super) struct RowNormInputGrad {
    pub rows: Kernel,
}

impl Op for RowNormInputGrad {
    fn name(&self) -> &'static str {
        "RowNormInputGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        Ok(vec![widened(need(inputs, 0)?)])
    }

    fn reads_half(&self, _: &[Option<&Meta>], input: usize) -> bool {
        input == 0 && self.rows.widens()
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let dx = out(y, 0)?;
        float_dispatch!(dx.dtype, T => {
            let operand = |i: usize| get(x, i).map(|x| x.get::<T>()).transpose();
            let stats = (operand(3)?, need(x, 4)?.get::<T>()?);
            let input = get(x, 0).map(elements).transpose()?;
            self.rows.input_grad(input, operand(1)?, operand(2)?, stats, dx.get::<T>()?);
            Ok(())
        })
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(1, 0), (0, 0)]
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        second()
    }
}

/// ONNX `LRN`: `y = x·(bias + alpha/size·Σ x²)^−beta`, the sum over `size` neighbouring channels.
#[derive(Debug)]
pub struct Lrn {
    kernel: Across,
    layout: Layout,
}

impl Lrn {
    fn parse(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let size = spec.attrs.int("size")?.unwrap_or(0);
        let size = usize::try_from(size)
            .ok()
            .filter(|&s| s > 0)
            .ok_or_else(|| OpError::Attribute(format!("'size' is {size}")))?;
        Ok(Arc::new(Lrn {
            kernel: Across {
                size,
                alpha: spec.attrs.float_or("alpha", 1e-4)? as f64,
                beta: spec.attrs.float_or("beta", 0.75)? as f64,
                bias: spec.attrs.float_or("bias", 1.0)? as f64,
            },
            layout: Layout::First,
        }))
    }
}

/// (channels, elements of a channel)
fn planes(dims: &[usize], layout: Layout) -> Result<(usize, usize), OpError> {
    match dims {
        [_, .., c] if layout == Layout::Last => Ok((*c, 1)),
        [_, c, rest @ ..] => Ok((*c, rest.iter().product())),
        _ => Err(OpError::Shape(format!("x of shape {dims:?}: (N, C, …) is needed"))),
    }
}

impl Op for Lrn {
    fn name(&self) -> &'static str {
        "LRN"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        planes(&x.dims, self.layout)?;
        Ok(vec![Meta::new(x.dtype, &x.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let y = out(y, 0)?;
        let (c, s) = planes(y.dims, self.layout)?;
        float_dispatch!(y.dtype, T => {
            lrn(self.kernel, need(x, 0)?.get::<T>()?, y.get::<T>()?, c, s);
            Ok(())
        })
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        rank_of(inputs, 0)?;
        let op = Lrn { kernel: self.kernel, layout: Layout::Last };
        Some(ChannelsLast::by(op, &[true], &[true]))
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // d = bias + alpha/size·Σ x²:  dx = dy·d^−beta − 2·alpha·beta/size · x · Σ dy·x·d^(−beta−1)
        let (x, dy) = (g.x(0)?, g.dy0()?);
        Ok(Grads::from_slice(&[Some(
            g.emit(LrnGrad { kernel: self.kernel, layout: self.layout }, &[x, dy])?,
        )]))
    }
}

/// Gradient of `LRN`. Inputs: x, dy.
#[derive(Debug)]
struct LrnGrad {
    kernel: Across,
    layout: Layout,
}

impl Op for LrnGrad {
    fn name(&self) -> &'static str {
        "LrnGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        Ok(vec![Meta::new(x.dtype, &x.dims)])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let dx = out(y, 0)?;
        let (c, s) = planes(dx.dims, self.layout)?;
        float_dispatch!(dx.dtype, T => {
            let (x, dy) = (need(x, 0)?.get::<T>()?, need(x, 1)?.get::<T>()?);
            let (d, terms) = cx.room::<T>(2 * x.len())?.split_at_mut(x.len());
            lrn_grad(self.kernel, x, dy, dx.get::<T>()?, d, terms, c, s);
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        2 * get(inputs, 0).map_or(0, Meta::bytes)
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        rank_of(inputs, 0)?;
        let op = LrnGrad { kernel: self.kernel, layout: Layout::Last };
        Some(ChannelsLast::by(op, &[true, true], &[true]))
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        second()
    }
}

pub(super) const ROWS: &[Row] = &[
    Row::new("InstanceNormalization", 6, GroupNorm::instance),
    // onnxruntime wrote it into models before the standard had it.
    Row::new("LayerNormalization", 1, |s| RowNorm::parse(s, true)),
    Row::new("RMSNormalization", 23, |s| RowNorm::parse(s, false)),
    Row::new("GroupNormalization", 18, GroupNorm::parse),
    Row::new("LRN", 7, Lrn::parse),
];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    let case = |op: &str, opset: i64, x: &[usize], scale: &[usize]| {
        let case = Case::new(op, opset).within(x, 1.0, 3.0).within(scale, 0.5, 1.5);
        if op == "RMSNormalization" { case } else { case.input(scale) }
    };
    let (instance, layer, rms) = ("InstanceNormalization", "LayerNormalization", "RMSNormalization");
    let group =
        |opset, scale: &[usize]| case("GroupNormalization", opset, &[2, 6, 3, 5], scale).int("num_groups", 3);
    vec![
        case(instance, 7, &[2, 3, 4, 5], &[3]),
        case(instance, 22, &[2, 3, 37], &[3]).named("1-D").float("epsilon", 1e-2),
        case(layer, 17, &[2, 5, 70], &[70]),
        case(layer, 17, &[2, 3, 4, 5], &[3, 4, 5]).named("axis 1").int("axis", 1),
        case(layer, 17, &[2, 3, 4], &[4]).named("scale of fewer dimensions").int("axis", 1),
        case(layer, 17, &[2, 3, 4], &[3, 1]).named("scale broadcast below").int("axis", 1),
        case(layer, 17, &[2, 6], &[1]).named("one scale"),
        case(layer, 17, &[300, 100], &[100]).named("many").tolerance(1e-5),
        case(layer, 17, &[2, 0], &[0]).named("empty").forward_only(),
        case(layer, 17, &[2, 6], &[6]).named("statistics").outputs(3).forward_only(),
        Case::new(layer, 17).named("no shift").input(&[3, 6]).within(&[6], 0.5, 1.5),
        case(rms, 23, &[2, 5, 19], &[19]),
        case(rms, 24, &[2, 3, 4], &[3, 4]).named("axis 1").int("axis", 1),
        group(21, &[6]),
        group(18, &[3]).named("scale a group"),
        group(21, &[6, 1, 1]).named("scale as it broadcasts"),
        case("GroupNormalization", 21, &[3, 8, 1, 1], &[8]).named("one place").int("num_groups", 2),
        // More than one task sums up, of a sample whose channels lie last.
        case("GroupNormalization", 21, &[2, 40, 60, 40], &[40]).named("many places").int("num_groups", 4),
        Case::new("LRN", 13).input(&[2, 7, 3, 2]).int("size", 3).float("alpha", 0.5).float("bias", 2.0),
        Case::new("LRN", 7).named("even").input(&[1, 5, 40]).int("size", 4).float("alpha", 0.9),
        Case::new("LRN", 7).named("wide").input(&[2, 3, 2, 2]).int("size", 9).float("beta", 0.5),
    ]
}
