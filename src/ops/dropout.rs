//! `Dropout`.

use std::sync::Arc;

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::random::{Stream, apply_mask};
use crate::ops::{ChannelsLast, Cx, Grads, Mode, Op, Row, Spec, get, need, out};
use crate::tensor::{DType, Float, Meta, View, ViewMut};

/// When elements are dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    /// As input 2 of the node says.
    Told,
    Never,
    Always,
}

/// ONNX `Dropout`, opset 7 and newer. Outputs y and the mask of what was kept (bool; of x's type before opset 10).
///
/// Inputs x and, from opset 12, the ratio and the training mode (scalars). In evaluation y = x.
#[derive(Debug, Clone)]
pub struct Dropout {
    /// Of the attribute; from opset 12 an input, and 0.5 without one.
    ratio: f64,
    seed: Option<i64>,
    mask: Option<DType>,
    outputs: usize,
    when: When,
}

impl Dropout {
    fn parse(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
        Ok(Arc::new(Dropout {
            ratio: spec.attrs.float_or("ratio", 0.5)? as f64,
            seed: spec.attrs.int("seed")?,
            mask: (spec.opset >= 10).then_some(DType::Bool),
            outputs: spec.outputs,
            when: if spec.opset >= 12 && spec.inputs > 2 { When::Told } else { When::Never },
        }))
    }

    fn ratio(&self, x: &[Option<View>]) -> Result<f64, OpError> {
        let ratio = match get(x, 1) {
            Some(r) => scalar(r)?,
            None => self.ratio,
        };
        match (0.0..=1.0).contains(&ratio) {
            true => Ok(ratio),
            false => Err(OpError::Shape(format!("a ratio of {ratio}"))),
        }
    }
}

/// The one element of a float or bool tensor.
fn scalar(x: View) -> Result<f64, OpError> {
    let first = match x.dtype {
        DType::F32 => x.get::<f32>()?.first().map(|&x| x as f64),
        DType::F64 => x.get::<f64>()?.first().copied(),
        DType::F16 => x.get::<half::f16>()?.first().map(|x| x.to_f64()),
        DType::BF16 => x.get::<half::bf16>()?.first().map(|x| x.to_f64()),
        DType::Bool => x.get::<u8>()?.first().map(|&x| (x != 0) as u8 as f64),
        other => return Err(OpError::Type(format!("a scalar of type {other}"))),
    };
    first.ok_or_else(|| OpError::Shape("an empty scalar".into()))
}

/// What the kept elements are multiplied with.
fn factor(ratio: f64) -> f64 {
    if ratio < 1.0 { 1.0 / (1.0 - ratio) } else { 0.0 }
}

impl Op for Dropout {
    fn name(&self) -> &'static str {
        "Dropout"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        Ok(vec![Meta::new(x.dtype, &x.dims), Meta::new(self.mask.unwrap_or(x.dtype), &x.dims)])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let drop = match self.when {
            When::Never => false,
            When::Always => true,
            When::Told => get(x, 2).map(scalar).transpose()?.is_some_and(|m| m != 0.0),
        };
        let ratio = if drop { self.ratio(x)? } else { 0.0 };
        let [y, mask @ ..] = y else { return Err(OpError::Internal("no output".into())) };
        let mask = mask.first_mut().and_then(Option::as_mut);
        let y = y.as_mut().ok_or_else(|| OpError::Internal("output 0 has no buffer".into()))?;
        if !drop || ratio == 0.0 {
            if let Some(x) = get(x, 0) {
                y.bytes.copy_from_slice(x.bytes);
            }
            if let Some(mask) = mask {
                match mask.dtype {
                    DType::Bool => mask.get::<u8>()?.fill(1),
                    DType::F64 => mask.get::<f64>()?.fill(1.0),
                    _ => mask.get::<f32>()?.fill(1.0),
                }
            }
            return Ok(());
        }
        let stream = Stream::new(cx.seed ^ (self.seed.unwrap_or(0) as u64).rotate_left(32));
        let len = y.len();
        float_dispatch!(y.dtype, T => {
            let input = get(x, 0).map(|x| x.get::<T>()).transpose()?;
            match mask {
                Some(m) if m.dtype == DType::Bool => {
                    let m = m.get::<u8>()?;
                    stream.mask(1.0 - ratio, m);
                    apply_mask(input, m, factor(ratio), y.get::<T>()?);
                }
                other => {
                    let m: &mut [u8] = cx.room(len)?;
                    stream.mask(1.0 - ratio, m);
                    apply_mask(input, m, factor(ratio), y.get::<T>()?);
                    if let Some(floats) = other {
                        floats.get::<T>()?.iter_mut().zip(m).for_each(|(f, &mut m)| *f = T::of(m as f64));
                    }
                }
            }
            Ok(())
        })
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], outputs: &[Option<&Meta>]) -> Option<ChannelsLast> {
        ChannelsLast::elementwise(inputs, outputs)
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // dx = dy·mask/(1 − ratio)
        let dy = g.dy0()?;
        let drops = match (self.when, g.x_opt(2)) {
            (When::Never, _) | (When::Told, None) => false,
            (When::Always, _) => true,
            (When::Told, Some(mode)) => match &g.meta(mode)?.value {
                Some(value) => value.to_ints()?.first() == Some(&1),
                None => {
                    return Err(OpError::NotDifferentiable(
                        "training mode is not known before the run".into(),
                    ));
                }
            },
        };
        if !drops {
            // The ratio does nothing.
            let ratio = match g.wants(1) {
                true => Some(g.zeros_like(g.x(1)?)?),
                false => None,
            };
            return Ok(Grads::from_slice(&[Some(dy), ratio, None]));
        }
        if g.wants(1) {
            return Err(OpError::NotDifferentiable("the ratio of Dropout".into()));
        }
        let inputs = [Some(dy), Some(g.y(1)?), g.x_opt(1)];
        let dx = g.emit_all(DropoutGrad { ratio: self.ratio }, &inputs, 1)?[0];
        Ok(Grads::from_slice(&[Some(dx), None, None]))
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(0, 0)]
    }

    fn is_view(&self) -> bool {
        self.when == When::Never && self.outputs <= 1
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let x = inputs.first().copied().flatten().map_or(0, Meta::len);
        if self.when == When::Never { 0 } else { x }
    }

    fn in_mode(&self, mode: Mode) -> Option<Arc<dyn Op>> {
        let when = if mode.training { When::Always } else { When::Never };
        // Before opset 10 the mask has x's type; where the file does not name it, the gradient's is bool.
        let mask = if mode.training && self.outputs <= 1 { Some(DType::Bool) } else { self.mask };
        Some(Arc::new(Dropout { when, mask, ..self.clone() }))
    }

    fn is_pure(&self) -> bool {
        self.when == When::Never
    }
}

/// Gradient of dropout. Inputs: dy, the mask (bool, or 0 and 1 in dy's type), the ratio (if it is an input).
#[derive(Debug)]
pub struct DropoutGrad {
    pub ratio: f64,
}

impl Op for DropoutGrad {
    fn name(&self) -> &'static str {
        "DropoutGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let dy = need(inputs, 0)?;
        Ok(vec![Meta::new(dy.dtype, &dy.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let dx = out(y, 0)?;
        let ratio = get(x, 2).map_or(Ok(self.ratio), scalar)?;
        float_dispatch!(dx.dtype, T => {
            let dy = get(x, 0).map(|x| x.get::<T>()).transpose()?;
            let (mask, dx) = (need(x, 1)?, dx.get::<T>()?);
            if mask.dtype == DType::Bool {
                apply_mask(dy, mask.get::<u8>()?, factor(ratio), dx);
                return Ok(());
            }
            if let Some(dy) = dy {
                dx.copy_from_slice(dy);
            }
            let kept = T::of(factor(ratio));
            // Selected rather than multiplied: what was dropped has no gradient, whatever dy is.
            for (dx, m) in dx.iter_mut().zip(mask.get::<T>()?) {
                *dx = if *m != T::of(0.0) { *dx * kept } else { T::of(0.0) };
            }
            Ok(())
        })
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(0, 0)]
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], outputs: &[Option<&Meta>]) -> Option<ChannelsLast> {
        ChannelsLast::elementwise(inputs, outputs)
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("second derivatives are not supported".into()))
    }
}

pub(super) const ROWS: &[Row] = &[Row::new("Dropout", 7, Dropout::parse)];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    use crate::tensor::Tensor;
    let ratio = || Tensor::scalar(0.25f64);
    let told = |on: f64| Tensor::scalar(on).cast(DType::Bool);
    let case = |opset| Case::new("Dropout", opset).input(&[3, 40]);
    vec![
        case(7).float("ratio", 0.3),
        case(7).named("in training").float("ratio", 0.3).mode(Mode::TRAIN),
        case(7).named("two outputs").outputs(2).forward_only(),
        case(7).named("a mask of floats, in training").outputs(2).mode(Mode::TRAIN).forward_only(),
        case(10).named("in training").mode(Mode::TRAIN),
        case(13).named("told to").fixed(ratio()).fixed(told(1.0)).outputs(2),
        case(13).named("told not to").fixed(ratio()).fixed(told(0.0)),
        case(22).named("evaluated").fixed(ratio()).fixed(told(1.0)).mode(Mode::EVAL),
        case(22).named("in training").fixed(ratio()).mode(Mode::TRAIN),
    ]
}
