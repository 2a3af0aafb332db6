//! `BatchNormalization`: training and inference form, and the gradients of both.

use std::sync::Arc;

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::norm::{self, Channels, Stat};
use crate::ops::{Cx, Grads, Mode, Op, Row, Spec, get, need, out};
use crate::tensor::{DType, Float, Meta, View, ViewMut};

/// What old exporters wrote as momentum when they meant nothing by it; training takes 0.9 instead.
const NO_MOMENTUM: f32 = 1.0;

/// ONNX `BatchNormalization`, opset 7 and newer.
///
/// Inputs x (N, C, …), scale (C), shift (C), running mean (C), running variance (C). Outputs: y, next running
/// mean, next running variance, and for the gradient the mean (C) and inverse standard deviation (C) that were
/// used. (Opsets before 14 name outputs 3 and 4 "saved mean" and "saved variance"; as with cuDNN the latter is
/// the inverse standard deviation here.)
#[derive(Debug, Clone)]
pub struct BatchNormalization {
    epsilon: f64,
    /// As in the file: `running = running·momentum + batch·(1 − momentum)`.
    momentum: f32,
    /// `false`: statistics per element of a sample rather than per channel (before opset 9).
    spatial: bool,
    training: bool,
    unbiased: bool,
    /// The running statistics really follow the batches (the file's 1.0 taken as 0.9).
    follow: bool,
}

impl BatchNormalization {
    fn parse(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let training = if spec.opset >= 14 { spec.attrs.flag("training_mode")? } else { spec.outputs > 1 };
        Ok(Arc::new(BatchNormalization {
            epsilon: spec.attrs.float_or("epsilon", 1e-5)? as f64,
            momentum: spec.attrs.float_or("momentum", 0.9)?,
            spatial: spec.opset >= 9 || spec.attrs.int_or("spatial", 1)? != 0,
            training,
            unbiased: false,
            follow: false,
        }))
    }

    /// The momentum that applies: in training, 1.0 of the file means 0.9.
    pub fn momentum(&self) -> f32 {
        if self.follow && self.momentum == NO_MOMENTUM { 0.9 } else { self.momentum }
    }

    fn channels(&self, dims: &[usize]) -> Channels {
        match (self.spatial, dims) {
            (_, []) => Channels { n: 1, c: 1, s: 1 },
            (_, [n]) => Channels { n: *n, c: 1, s: 1 },
            (true, [n, c, rest @ ..]) => Channels { n: *n, c: *c, s: rest.iter().product() },
            (false, [n, rest @ ..]) => Channels { n: *n, c: rest.iter().product(), s: 1 },
        }
    }

    fn run<T: Float>(
        &self,
        cx: &mut Cx,
        x: &[Option<View>],
        y: &mut [Option<ViewMut>],
    ) -> Result<(), OpError> {
        let [y0, y1, y2, mut y3, mut y4] = outputs(y)?;
        let y0 = y0.ok_or_else(|| OpError::Internal("output 0 has no buffer".into()))?;
        let d = self.channels(y0.dims);
        let (scale, shift) = (need(x, 1)?.get::<T>()?, need(x, 2)?.get::<T>()?);
        let input = get(x, 0).map(|x| x.get::<T>()).transpose()?;
        let scratch: &mut [T] = cx.room(if self.training { 3 * d.c } else { d.c })?;
        let (factor, rest) = scratch.split_at_mut_checked(d.c).ok_or_else(short)?;
        if !self.training {
            let (mean, var) = (need(x, 3)?.get::<T>()?, need(x, 4)?.get::<T>()?);
            for ((f, &scale), &var) in factor.iter_mut().zip(scale).zip(var) {
                *f = T::of(scale.to64() / (var.to64() + self.epsilon).sqrt());
            }
            norm::channel_affine(input, y0.get::<T>()?, d, mean, factor, shift);
            for (y, from) in [(y1, mean), (y2, var), (y3.take(), mean)] {
                if let Some(y) = y {
                    y.get::<T>()?.copy_from_slice(from);
                }
            }
            if let Some(y) = y4.take() {
                for (y, var) in y.get::<T>()?.iter_mut().zip(var) {
                    *y = T::of(1.0 / (var.to64() + self.epsilon).sqrt());
                }
            }
            return Ok(());
        }
        let (spare_mean, rest) = rest.split_at_mut_checked(d.c).ok_or_else(short)?;
        let spare_inv = rest.get_mut(..d.c).ok_or_else(short)?;
        let mean = y3.as_mut().map_or(Ok(spare_mean), |y| y.get::<T>())?;
        // The variance, until the running one has been updated from it.
        let inv = y4.as_mut().map_or(Ok(spare_inv), |y| y.get::<T>())?;
        norm::channel_stats(input.unwrap_or(y0.get::<T>()?), d, mean, inv);
        let count = d.count() as f64;
        let unbias = if self.unbiased && count > 1.0 { count / (count - 1.0) } else { 1.0 };
        let keep = count == 0.0 || !mean.iter().chain(inv.iter()).all(|s| s.is_finite());
        for (y, old, batch, factor) in [(y1, get(x, 3), &*mean, 1.0), (y2, get(x, 4), &*inv, unbias)] {
            let Some(y) = y else { continue };
            let y = y.get::<T>()?;
            if let Some(old) = old {
                y.copy_from_slice(old.get::<T>()?);
            }
            if !keep {
                let momentum = self.momentum() as f64;
                for (y, b) in y.iter_mut().zip(batch) {
                    *y = T::of(y.to64() * momentum + b.to64() * factor * (1.0 - momentum));
                }
            }
        }
        for ((f, inv), &scale) in factor.iter_mut().zip(inv.iter_mut()).zip(scale) {
            let r = 1.0 / (inv.to64() + self.epsilon).sqrt();
            *inv = T::of(r);
            *f = T::of(scale.to64() * r);
        }
        norm::channel_affine(input, y0.get::<T>()?, d, mean, factor, shift);
        Ok(())
    }
}

fn short() -> OpError {
    OpError::Internal("too little scratch memory".into())
}

/// The five output slots, absent ones made up.
fn outputs<'a, 'b>(y: &'a mut [Option<ViewMut<'b>>]) -> Result<[Option<&'a mut ViewMut<'b>>; 5], OpError> {
    let mut slots = [const { None }; 5];
    if y.len() > slots.len() {
        return Err(OpError::Internal(format!("{} outputs", y.len())));
    }
    for (slot, y) in slots.iter_mut().zip(y) {
        *slot = y.as_mut();
    }
    Ok(slots)
}

impl Op for BatchNormalization {
    fn name(&self) -> &'static str {
        "BatchNormalization"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        let c = self.channels(&x.dims).c;
        for i in 1..5 {
            let m = need(inputs, i)?;
            if m.len() != c {
                return Err(OpError::Shape(format!(
                    "input {i} has {} elements for {c} channels of {:?}",
                    m.len(),
                    x.dims.as_slice()
                )));
            }
            if m.dtype != x.dtype {
                return Err(OpError::Type(format!("input {i} is {}, input 0 is {}", m.dtype, x.dtype)));
            }
        }
        let of = |i: usize| need(inputs, i).map(|m: &Meta| Meta::new(m.dtype, &m.dims));
        let channel = Meta::new(x.dtype, &[c]);
        Ok(vec![Meta::new(x.dtype, &x.dims), of(3)?, of(4)?, channel.clone(), channel])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        float_dispatch!(out(y, 0)?.dtype, T => self.run::<T>(cx, x, y))
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        if (1..5).any(|i| g.dy(i).is_some()) {
            return Err(OpError::NotDifferentiable("gradient through the running statistics".into()));
        }
        if g.wants(3) || g.wants(4) {
            return Err(OpError::NotDifferentiable("running mean and variance are not trained".into()));
        }
        let (x, scale, dy) = (g.x(0)?, g.x(1)?, g.dy0()?);
        let channels = self.channels(&g.meta(x)?.dims);
        let mut grads = Grads::from_elem(None, 5);
        // dshift = Σ dy,  dscale = Σ dy·x̂,  x̂ = (x − mean)·inv                                     (C)
        // inference: dx = dy·scale·inv
        // training:  dx = scale·inv·(dy − dshift/M − x̂·dscale/M), M elements a channel             (N, C, …)
        let params = g.wants(1) || g.wants(2) && self.training || g.wants(0) && self.training;
        let (mean, spread, epsilon) = match self.training {
            true if params => (g.y(3)?, g.y(4)?, None),
            _ => (g.x(3)?, g.x(4)?, Some(self.epsilon)),
        };
        if params {
            let op = ChannelParamGrad { channels, stat: Stat::Channel, epsilon };
            let made = g.emit_all(op, &[Some(x), Some(dy), Some(mean), Some(spread)], 2)?;
            (grads[1], grads[2]) = (Some(made[0]), Some(made[1]));
        } else if g.wants(2) {
            grads[2] = Some(g.emit(ChannelSum { channels }, &[dy])?);
        }
        if g.wants(0) {
            grads[0] = match (self.training, grads[1], grads[2]) {
                (true, Some(dscale), Some(dshift)) => Some(
                    g.emit(BatchNormInputGrad { channels }, &[x, scale, mean, spread, dy, dscale, dshift])?,
                ),
                _ => Some(g.emit(
                    BatchNormEvalInputGrad { channels, epsilon: self.epsilon },
                    &[dy, scale, spread],
                )?),
            };
        }
        Ok(grads)
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(0, 0)]
    }

    fn updates(&self) -> &[(usize, usize)] {
        if self.training { &[(3, 1), (4, 2)] } else { &[] }
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let c = inputs.get(1).copied().flatten().map_or(0, Meta::bytes);
        if self.training { 3 * c } else { c }
    }

    fn in_mode(&self, mode: Mode) -> Option<Arc<dyn Op>> {
        let training = mode.training && mode.batch_statistics;
        let unbiased = mode.unbiased_variance;
        Some(Arc::new(BatchNormalization { training, unbiased, follow: training, ..self.clone() }))
    }

    fn remark(&self) -> Option<String> {
        (self.follow && self.momentum == NO_MOMENTUM)
            .then(|| "momentum 1 in the file would never update the running statistics: 0.9 is used".into())
    }
}

fn same(meta: &Meta) -> Meta {
    Meta::new(meta.dtype, &meta.dims)
}

pub(super) fn second<T>() -> Result<T, OpError> {
    Err(OpError::NotDifferentiable("second derivatives are not supported".into()))
}

/// Gradient of a normalisation's scale and shift, outputs dscale (C) and dshift (C).
/// Inputs x, dy, mean (absent: 0), and the inverse standard deviation, or the variance where `epsilon` is given.
#[derive(Debug)]
pub struct ChannelParamGrad {
    pub channels: Channels,
    pub stat: Stat,
    pub epsilon: Option<f64>,
}

impl Op for ChannelParamGrad {
    fn name(&self) -> &'static str {
        "NormParamGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let channel = Meta::new(need(inputs, 0)?.dtype, &[self.channels.c]);
        Ok(vec![channel.clone(), channel])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        float_dispatch!(need(x, 0)?.dtype, T => {
            let (input, dy) = (need(x, 0)?.get::<T>()?, need(x, 1)?.get::<T>()?);
            let mean = get(x, 2).map(|m| m.get::<T>()).transpose()?;
            let mut inv = need(x, 3)?.get::<T>()?;
            let c = self.channels.c;
            let scratch: &mut [T] = cx.room(3 * c)?;
            let (own, spare) = scratch.split_at_mut_checked(c).ok_or_else(short)?;
            if let Some(epsilon) = self.epsilon {
                for (o, var) in own.iter_mut().zip(inv) {
                    *o = T::of(1.0 / (var.to64() + epsilon).sqrt());
                }
                inv = own;
            }
            let [dscale, dshift] = y else { return Err(OpError::Internal("two outputs are needed".into())) };
            let (spare0, spare1) = spare.split_at_mut_checked(c).ok_or_else(short)?;
            let dscale = dscale.as_mut().map_or(Ok(spare0), |y| y.get::<T>())?;
            let spare1 = spare1.get_mut(..c).ok_or_else(short)?;
            let dshift = dshift.as_mut().map_or(Ok(spare1), |y| y.get::<T>())?;
            norm::param_grad(input, dy, self.channels, self.stat, (mean, inv), dscale, dshift);
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        3 * self.channels.c * inputs.first().copied().flatten().map_or(DType::F64, |m| m.dtype).size()
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        second()
    }
}

/// `Σ dy` over each channel (C).
#[derive(Debug)]
pub struct ChannelSum {
    pub channels: Channels,
}

impl Op for ChannelSum {
    fn name(&self) -> &'static str {
        "ChannelSum"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        Ok(vec![Meta::new(need(inputs, 0)?.dtype, &[self.channels.c])])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        float_dispatch!(need(x, 0)?.dtype, T => {
            norm::channel_sum(need(x, 0)?.get::<T>()?, self.channels, out(y, 0)?.get::<T>()?);
            Ok(())
        })
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        second()
    }
}

/// Gradient of the training form's input. Inputs x, scale, mean, inverse deviation, dy, dscale, dshift.
#[derive(Debug)]
pub struct BatchNormInputGrad {
    pub channels: Channels,
}

impl Op for BatchNormInputGrad {
    fn name(&self) -> &'static str {
        "BatchNormInputGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        Ok(vec![same(need(inputs, 0)?)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let y = out(y, 0)?;
        float_dispatch!(y.dtype, T => {
            let get = |i: usize| get(x, i).map(|x| x.get::<T>()).transpose();
            let need = |i: usize| need(x, i)?.get::<T>();
            let g = norm::ChannelGrad {
                scale: need(1)?,
                mean: need(2)?,
                inv: need(3)?,
                dscale: need(5)?,
                dshift: need(6)?,
            };
            norm::channel_input_grad(get(0)?, get(4)?, y.get::<T>()?, self.channels, g);
            Ok(())
        })
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(4, 0), (0, 0)]
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        second()
    }
}

/// Gradient of the inference form's input, `dy·scale/√(var + ε)`. Inputs dy, scale, variance.
#[derive(Debug)]
pub struct BatchNormEvalInputGrad {
    pub channels: Channels,
    pub epsilon: f64,
}

impl Op for BatchNormEvalInputGrad {
    fn name(&self) -> &'static str {
        "BatchNormEvalInputGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        Ok(vec![same(need(inputs, 0)?)])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let y = out(y, 0)?;
        float_dispatch!(y.dtype, T => {
            let dy = get(x, 0).map(|x| x.get::<T>()).transpose()?;
            let (scale, var) = (need(x, 1)?.get::<T>()?, need(x, 2)?.get::<T>()?);
            let scratch: &mut [T] = cx.room(2 * self.channels.c)?;
            let (factor, zero) = scratch.split_at_mut_checked(self.channels.c).ok_or_else(short)?;
            let zero = zero.get_mut(..self.channels.c).ok_or_else(short)?;
            zero.fill(T::of(0.0));
            for ((f, scale), var) in factor.iter_mut().zip(scale).zip(var) {
                *f = T::of(scale.to64() / (var.to64() + self.epsilon).sqrt());
            }
            norm::channel_affine(dy, y.get::<T>()?, self.channels, zero, factor, zero);
            Ok(())
        })
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(0, 0)]
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        2 * inputs.get(1).copied().flatten().map_or(0, Meta::bytes)
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        second()
    }
}

pub(super) const ROWS: &[Row] = &[Row::new("BatchNormalization", 7, BatchNormalization::parse)];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    use crate::tensor::Tensor;
    let running = |case: Case, c: usize| {
        let mean: Vec<f64> = (0..c).map(|i| 0.3 * i as f64 - 0.2).collect();
        let var: Vec<f64> = (0..c).map(|i| 0.5 + 0.25 * i as f64).collect();
        case.fixed(Tensor::from_slice(&[c], &mean).unwrap()).fixed(Tensor::from_slice(&[c], &var).unwrap())
    };
    let case = |opset: i64, dims: &[usize], c: usize| {
        running(Case::new("BatchNormalization", opset).input(dims).within(&[c], 0.5, 1.5).input(&[c]), c)
    };
    vec![
        case(15, &[2, 3, 5, 4], 3),
        case(15, &[3, 2, 23, 29], 2).named("long channels"),
        case(7, &[4, 3], 3).named("dense").float("epsilon", 1e-3),
        case(9, &[5], 1).named("rank 1"),
        case(7, &[3, 2, 2], 4).named("not spatial").int("spatial", 0),
        case(15, &[3, 2, 4, 5], 2).named("training").mode(Mode::TRAIN),
        case(15, &[3, 2, 23, 29], 2).named("training, long channels").mode(Mode::TRAIN),
        case(9, &[6, 70], 70).named("training, dense").mode(Mode::TRAIN),
        case(7, &[4, 2, 2], 4).named("training, not spatial").int("spatial", 0).mode(Mode::TRAIN),
        case(14, &[3, 2, 4], 2).named("training form evaluated").int("training_mode", 1).mode(Mode::EVAL),
        case(14, &[3, 2, 4], 2).named("of the file").int("training_mode", 1).outputs(3).forward_only(),
        case(7, &[3, 2, 4], 2).named("five outputs").outputs(5).forward_only(),
        case(15, &[0, 2, 4], 2).named("empty").forward_only(),
        case(15, &[0, 2, 4], 2).named("empty, training").mode(Mode::TRAIN).forward_only(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{Attr, Attrs, eval};
    use crate::tensor::Tensor;

    fn op(momentum: f32, mode: Option<Mode>) -> Arc<dyn Op> {
        let mut attrs = Attrs::default();
        attrs.0.insert("momentum".into(), Attr::Float(momentum));
        attrs.0.insert("training_mode".into(), Attr::Int(1));
        let spec = Spec {
            domain: "",
            op_type: "BatchNormalization",
            opset: 15,
            attrs: &attrs,
            inputs: 5,
            outputs: 3,
        };
        let op = BatchNormalization::parse(&spec).unwrap();
        mode.and_then(|m| op.in_mode(m)).unwrap_or(op)
    }

    fn inputs() -> Vec<Tensor> {
        let t = |dims: &[usize], x: &[f32]| Tensor::from_slice(dims, x).unwrap();
        vec![t(&[4, 1], &[1., 2., 3., 6.]), t(&[1], &[1.]), t(&[1], &[0.]), t(&[1], &[1.]), t(&[1], &[2.])]
    }

    #[test]
    fn running_statistics_follow_the_batch() {
        let x = inputs();
        let refs: Vec<Option<&Tensor>> = x.iter().map(Some).collect();
        // Batch mean 3, population variance 3.5, unbiased 14/3.
        let y = eval(op(0.75, None).as_ref(), &refs).unwrap();
        assert_eq!((y[1].to_f64()[0], y[2].to_f64()[0]), (1.5, 2.375));
        let y = eval(op(0.75, Some(Mode::TRAIN)).as_ref(), &refs).unwrap();
        assert!((y[2].to_f64()[0] - (1.5 + 14.0 / 12.0)).abs() < 1e-6);
        let y = eval(op(0.75, Some(Mode::EVAL)).as_ref(), &refs).unwrap();
        assert_eq!((y[1].to_f64()[0], y[2].to_f64()[0]), (1.0, 2.0));
        let odd = op(1.0, Some(Mode::TRAIN));
        let y = eval(odd.as_ref(), &refs).unwrap();
        assert!((y[1].to_f64()[0] - 1.2).abs() < 1e-6 && odd.remark().is_some());
    }

    #[test]
    fn state_is_updated_in_its_buffer_and_kept_when_not_finite() {
        let mut x = inputs();
        let op = op(0.75, Some(Mode::TRAIN));
        for (first, expected) in [(1.0f32, (1.5, 1.5 + 14.0 / 12.0)), (f32::NAN, (1.0, 2.0))] {
            x[0].get_mut::<f32>().unwrap()[0] = first;
            let (mut y, mut mean, mut var) = (x[0].clone(), x[3].clone(), x[4].clone());
            let mut scratch = crate::tensor::Buffer::zeroed(64);
            let views = [None, Some(x[1].view()), Some(x[2].view()), None, None];
            let mut outs = [Some(y.view_mut()), Some(mean.view_mut()), Some(var.view_mut())];
            op.forward(&mut Cx { scratch: scratch.bytes_mut(), seed: 0 }, &views, &mut outs).unwrap();
            assert!((mean.to_f64()[0] - expected.0).abs() < 1e-6, "{first}");
            assert!((var.to_f64()[0] - expected.1).abs() < 1e-6, "{first}");
        }
    }

    #[test]
    fn a_large_mean_costs_no_digits() {
        let data: Vec<f32> = (0..4096).map(|i| 10_000.0 + (i % 2) as f32).collect();
        let d = Channels { n: 2, c: 2, s: 1024 };
        let (mut mean, mut var) = ([0f32; 2], [0f32; 2]);
        norm::channel_stats(&data, d, &mut mean, &mut var);
        assert_eq!((mean, var), ([10_000.5; 2], [0.25; 2]));
    }
}
