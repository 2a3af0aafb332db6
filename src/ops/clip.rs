//! ONNX `Clip`.

use std::sync::Arc;

use crate::error::OpError;
use crate::graph::{GradBuilder, ValueId};
use crate::kernels::elementwise::{Clamp, apply1, apply2, same};
use crate::kernels::isa::Wide;
use crate::ops::binary::slice;
use crate::ops::{ChannelsLast, Cx, Grads, Op, Row, Spec, get, need, out};
use crate::tensor::{DType, Elem, Meta, View, ViewMut};
use crate::{float_dispatch, int_dispatch};

/// `min(max(x, low), high)`; NaN stays NaN. The bounds are attributes before opset 11, then optional inputs
/// 1 and 2 (scalars).
#[derive(Debug, Clone, Copy)]
pub struct Clip {
    pub low: Option<f32>,
    pub high: Option<f32>,
}

/// dX of [`Clip`] from (Y, dY) and the bounds as inputs 2 and 3, if they are.
#[derive(Debug, Clone, Copy)]
pub struct ClipGrad {
    low: Option<f64>,
    high: Option<f64>,
}

impl ClipGrad {
    /// The bounds, where no operand gives them.
    pub fn clamp(&self) -> Option<Clamp<f64>> {
        Some(Clamp { low: self.low?, high: self.high? })
    }
}

/// Where the output of the node being differentiated is clamped: dY where the clamp let pass, else 0.
pub fn passed(g: &mut GradBuilder, clamp: Clamp<f64>) -> Result<ValueId, OpError> {
    let dy = g.dy0()?;
    if clamp.is_none() {
        return Ok(dy);
    }
    let y = g.y(0)?;
    g.emit(ClipGrad { low: Some(clamp.low), high: Some(clamp.high) }, &[y, dy])
}

/// A bound: the operand's value, else the attribute's.
fn bound<T: Elem, A>(
    operand: Option<View>,
    attr: Option<A>,
    of: impl Fn(A) -> T,
) -> Result<Option<T>, OpError> {
    match operand {
        Some(v) => Ok(v.get::<T>()?.first().copied()),
        None => Ok(attr.map(of)),
    }
}

impl Clip {
    /// The bounds that a float clip has, where they are known.
    pub fn clamp(&self, inputs: &[Option<&Meta>]) -> Option<Clamp<f64>> {
        let bound = |i: usize, attr: Option<f32>, none: f64| match get(inputs, i) {
            Some(m) => m.value.as_ref()?.to_f64().first().copied(),
            None => Some(attr.map_or(none, f64::from)),
        };
        let low = bound(1, self.low, f64::NEG_INFINITY)?;
        let clamp = Clamp { low, high: bound(2, self.high, f64::INFINITY)? };
        need(inputs, 0).ok()?.dtype.is_float().then_some(clamp)
    }
}

fn check_bounds(x: &Meta, bounds: [Option<&Meta>; 2]) -> Result<(), OpError> {
    for b in bounds.into_iter().flatten() {
        if b.len() != 1 || b.dtype != x.dtype {
            let what = format!("a bound of {} {:?} where one {} is needed", b.dtype, &b.dims[..], x.dtype);
            return Err(OpError::Shape(what));
        }
    }
    Ok(())
}

fn clip<T: Elem + Wide>(
    x: Option<View>,
    y: &mut ViewMut,
    low: Option<T>,
    high: Option<T>,
) -> Result<(), OpError> {
    let y = y.get::<T>()?;
    let walk = same(y.len());
    let x = slice::<T>(x)?;
    let (Some(low), Some(high)) = (low, high) else {
        let f = move |v: T| match (low, high) {
            (Some(low), _) if v < low => low,
            (_, Some(high)) if v > high => high,
            _ => v,
        };
        apply1(y, x, &walk, f);
        return Ok(());
    };
    apply1(y, x, &walk, move |v: T| {
        let v = if v < low { low } else { v };
        if v > high { high } else { v }
    });
    Ok(())
}

impl Op for Clip {
    fn name(&self) -> &'static str {
        "Clip"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        check_bounds(x, [get(inputs, 1), get(inputs, 2)])?;
        if x.dtype == DType::Bool {
            return Err(OpError::Type("bool where numbers are computed".into()));
        }
        Ok(vec![Meta::new(x.dtype, &x.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let y = out(y, 0)?;
        if y.dtype.is_float() {
            float_dispatch!(y.dtype, T => {
                let low = bound(get(x, 1), self.low, |b| b as T)?;
                let high = bound(get(x, 2), self.high, |b| b as T)?;
                clip::<T>(get(x, 0), y, low, high)
            })
        } else {
            int_dispatch!(y.dtype, T => {
                let low = bound(get(x, 1), self.low, |b| b as T)?;
                let high = bound(get(x, 2), self.high, |b| b as T)?;
                clip::<T>(get(x, 0), y, low, high)
            })
        }
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], outputs: &[Option<&Meta>]) -> Option<ChannelsLast> {
        ChannelsLast::elementwise(inputs, outputs)
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // dX = dY where low < Y < high. On a bound itself, where the derivative does not exist, it is 0 as in
        // PyTorch's ReLU6; so Y, which the next layer keeps anyway, is enough and X is not kept.
        if g.wants(1) || g.wants(2) {
            return Err(OpError::NotDifferentiable("Clip by its bounds".into()));
        }
        let (y, dy) = (g.y(0)?, g.dy0()?);
        let op = ClipGrad { low: self.low.map(f64::from), high: self.high.map(f64::from) };
        let inputs = [Some(y), Some(dy), g.x_opt(1), g.x_opt(2)];
        let dx = g.emit_all(op, &inputs, 1)?[0];
        Ok(Grads::from_slice(&[Some(dx), None, None]))
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(0, 0)]
    }

    fn cheap(&self) -> bool {
        true
    }
}

impl Op for ClipGrad {
    fn name(&self) -> &'static str {
        "ClipGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let dy = need(inputs, 1)?;
        check_bounds(dy, [get(inputs, 2), get(inputs, 3)])?;
        Ok(vec![Meta::new(dy.dtype, &dy.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let dx = out(y, 0)?;
        float_dispatch!(dx.dtype, T => {
            // NaN compares as outside.
            let low = bound(get(x, 2), self.low, |b| b as T)?.unwrap_or(T::NEG_INFINITY);
            let high = bound(get(x, 3), self.high, |b| b as T)?.unwrap_or(T::INFINITY);
            let clamp = Clamp { low, high };
            let f = move |y: T, dy: T| clamp.pass(y, dy);
            let dx = dx.get::<T>()?;
            let walk = same(dx.len());
            apply2(dx, slice::<T>(get(x, 0))?, slice::<T>(get(x, 1))?, &walk, f);
            Ok(())
        })
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], outputs: &[Option<&Meta>]) -> Option<ChannelsLast> {
        ChannelsLast::elementwise(inputs, outputs)
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("second derivatives (Clip)".into()))
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(1, 0), (0, 0)]
    }
}

fn make(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
    // From opset 11 the bounds are inputs.
    let attr = |name| if spec.opset < 11 { spec.attrs.float(name) } else { Ok(None) };
    Ok(Arc::new(Clip { low: attr("min")?, high: attr("max")? }))
}

pub(super) const ROWS: &[Row] = &[Row::new("Clip", 6, make)];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    use crate::tensor::Tensor;
    let x: Vec<f64> = (0..12).map(|i| i as f64 * 0.77 - 3.1).collect();
    let case = |opset| Case::new("Clip", opset).given(&[3, 4], &x);
    let low = || Tensor::scalar(-1.0);
    vec![
        case(6).named("attributes").float("min", -1.0).float("max", 2.0),
        case(10).named("min").float("min", 0.0),
        case(13).named("inputs").fixed(low()).fixed(Tensor::scalar(2.0)),
        case(13).named("max").absent().fixed(Tensor::scalar(2.0)),
        case(13).named("neither"),
        Case::new("Clip", 13).named("images").within(&[2, 3, 4, 5], -0.9, 0.9).fixed(low()),
        Case::new("Clip", 12)
            .named("int64")
            .fixed(Tensor::ints(&[-5, 0, 9]))
            .fixed(Tensor::scalar(-1i64))
            .fixed(Tensor::scalar(3i64))
            .forward_only(),
        Case::new("Clip", 13).named("parallel").within(&[40_000], -0.9, 0.9).fixed(low()),
    ]
}
