//! Gradients of normalisation per channel.

use std::sync::Arc;

use super::{room, room_bytes, short};
use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::elementwise::Clamp;
use crate::kernels::half::Elements;
use crate::kernels::norm::{self, Channels, Mask, Residual, Results, Stat};
use crate::ops::half::{computed, elements, results, widened};
use crate::ops::layout::rank_of;
use crate::ops::{ChannelsLast, Cx, Grads, Made, Op, Piece, get, need, out, piece};
use crate::tensor::{DType, Float, Meta, View, ViewMut};

fn same(meta: &Meta) -> Meta {
    Meta::new(meta.dtype, &meta.dims)
}

fn second<T>() -> Result<T, OpError> {
    Err(OpError::NotDifferentiable("second derivatives are not supported".into()))
}

/// That axis 1 of the first operand is what `channels` counts (it is not where statistics are per element, or channels
/// are last already).
fn per_channel(inputs: &[Option<&Meta>], channels: Channels) -> Option<usize> {
    rank_of(inputs, 0).filter(|_| get(inputs, 0).is_some_and(|x| x.dims[..2] == [channels.n, channels.c]))
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
        let channel = Meta::new(need(inputs, 1)?.dtype, &[self.channels.c]);
        Ok(vec![channel.clone(), channel])
    }

    fn reads_half(&self, _: &[Option<&Meta>], input: usize) -> bool {
        input == 0 && self.channels.s == 1
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        float_dispatch!(need(x, 1)?.dtype, T => {
            let (input, dy) = (elements(need(x, 0)?)?, Elements::Whole(need(x, 1)?.get::<T>()?));
            let mean = get(x, 2).map(|m| m.get::<T>()).transpose()?;
            let mut inv = need(x, 3)?.get::<T>()?;
            let c = self.channels.c;
            let (partials, scratch) = room::<T>(cx, self.channels.partials(), 3 * c)?;
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
            let sums = (dscale, dshift);
            norm::param_grad(input, dy, self.channels, self.stat, (mean, inv), Mask::All, sums, partials);
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let dtype = get(inputs, 0).map_or(DType::F64, computed);
        room_bytes(self.channels.partials(), 3 * self.channels.c, dtype)
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        per_channel(inputs, self.channels).filter(|_| self.stat == Stat::Channel)?;
        let op = ChannelParamGrad { channels: self.channels.last(), ..*self };
        Some(ChannelsLast::by(op, &[true, true], &[]))
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
        Ok(vec![Meta::new(computed(need(inputs, 0)?), &[self.channels.c])])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let y = out(y, 0)?;
        float_dispatch!(y.dtype, T => {
            let partials = cx.room(self.channels.partials())?;
            norm::channel_sum(elements(need(x, 0)?)?, self.channels, y.get::<T>()?, partials);
            Ok(())
        })
    }

    fn reads_half(&self, _: &[Option<&Meta>], _: usize) -> bool {
        self.channels.s == 1
    }

    fn takes_rounded(&self, _: &[Option<&Meta>], _: usize) -> bool {
        self.channels.s == 1
    }

    fn scratch(&self, _: &[Option<&Meta>]) -> usize {
        room_bytes(self.channels.partials(), 0, DType::F64)
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        per_channel(inputs, self.channels)?;
        Some(ChannelsLast::by(ChannelSum { channels: self.channels.last() }, &[true], &[]))
    }

    fn in_pieces(&self, inputs: &[Option<&Meta>], count: usize) -> Option<Piece> {
        piece::cut(&get(inputs, 0)?.dims, count)?;
        let n = Some(self.channels.n / count).filter(|_| self.channels.n.is_multiple_of(count))?;
        let channels = Channels { n, ..self.channels };
        Piece::made(ChannelSum { channels }, &[true], Made::Sum { onto: None })
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        second()
    }
}

/// Gradients of the training form with an activation: outputs dscale (C) and dshift (C), and, where a residual was
/// added, dz (N, C, …): dy where the activation let pass, else 0.
/// Inputs x, dy, mean, inverse deviation, scale, shift, and, where a residual was added, y.
#[derive(Debug)]
pub struct BatchNormParamGrad {
    pub channels: Channels,
    pub clamp: Clamp<f64>,
}

impl Op for BatchNormParamGrad {
    fn name(&self) -> &'static str {
        "BatchNormParamGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = widened(need(inputs, 0)?);
        let channel = Meta::new(x.dtype, &[self.channels.c]);
        Ok(vec![channel.clone(), channel, x])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let [Some(dscale), Some(dshift), rest @ ..] = y else {
            return Err(OpError::Internal("two outputs are needed".into()));
        };
        float_dispatch!(dscale.dtype, T => {
            let of = |i: usize| need(x, i)?.get::<T>();
            let (input, mean, inv) = (elements(need(x, 0)?)?, of(2)?, of(3)?);
            let sums = (dscale.get::<T>()?, dshift.get::<T>()?);
            let (d, clamp) = (self.channels, self.clamp.to::<T>());
            let (partials, factor) = room::<T>(cx, d.partials(), d.c)?;
            if let Some(y) = get(x, 6) {
                let dy = get(x, 1).map(|dy| dy.get::<T>()).transpose()?;
                let dz = out(rest, 0)?.get::<T>()?;
                norm::masked_param_grad(
                    input, elements(y)?, dy, dz, clamp, d, (mean, inv), sums, partials,
                );
                return Ok(());
            }
            for ((f, inv), scale) in factor.iter_mut().zip(inv).zip(of(4)?) {
                *f = T::of(scale.to64() * inv.to64());
            }
            let mask = Mask::Inside { factor, shift: of(5)?, clamp };
            let dy = elements(need(x, 1)?)?;
            norm::param_grad(input, dy, d, Stat::Channel, (Some(mean), inv), mask, sums, partials);
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let dtype = get(inputs, 0).map_or(DType::F64, computed);
        room_bytes(self.channels.partials(), self.channels.c, dtype)
    }

    fn reads_half(&self, _: &[Option<&Meta>], input: usize) -> bool {
        matches!(input, 0 | 6) && self.channels.s == 1
    }

    fn takes_rounded(&self, inputs: &[Option<&Meta>], input: usize) -> bool {
        input == 1 && inputs.len() == 6 && self.channels.s == 1
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(1, 2)]
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        per_channel(inputs, self.channels)?;
        let op = BatchNormParamGrad { channels: self.channels.last(), clamp: self.clamp };
        let flags = [true, true, false, false, false, false, true];
        Some(ChannelsLast::by(op, &flags, &[false, false, true]))
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        second()
    }
}

/// Gradient of the training form's input. Inputs x, scale, mean, inverse deviation, dy, dscale, dshift, and, where
/// dy is to pass the activation first, shift.
#[derive(Debug)]
pub struct BatchNormInputGrad {
    pub channels: Channels,
    pub clamp: Clamp<f64>,
    /// Output 0 is in this type of half precision.
    pub rounds: Option<DType>,
}

impl BatchNormInputGrad {
    pub fn of(channels: Channels, clamp: Clamp<f64>) -> Self {
        BatchNormInputGrad { channels, clamp, rounds: None }
    }
}

impl Op for BatchNormInputGrad {
    fn name(&self) -> &'static str {
        "BatchNormInputGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = widened(need(inputs, 0)?);
        Ok(vec![Meta::new(self.rounds.unwrap_or(x.dtype), &x.dims)])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let y = out(y, 0)?;
        float_dispatch!(need(x, 1)?.dtype, T => {
            let (input, dy) = (get(x, 0).map(elements).transpose()?, get(x, 4).map(elements).transpose()?);
            let get = |i: usize| get(x, i).map(|x| x.get::<T>()).transpose();
            let need = |i: usize| need(x, i)?.get::<T>();
            let g = norm::ChannelGrad {
                scale: need(1)?,
                mean: need(2)?,
                inv: need(3)?,
                dscale: need(5)?,
                dshift: need(6)?,
                passed: get(7)?.map(|shift| (shift, self.clamp.to())),
            };
            let room = cx.room(3 * self.channels.c)?;
            norm::channel_input_grad(input, dy, results(y)?, self.channels, g, room);
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let dtype = get(inputs, 1).map_or(DType::F64, |m: &Meta| m.dtype);
        room_bytes(0, 3 * self.channels.c, dtype)
    }

    fn in_place(&self) -> &[(usize, usize)] {
        if self.rounds.is_some() { &[] } else { &[(4, 0), (0, 0)] }
    }

    fn reads_half(&self, _: &[Option<&Meta>], input: usize) -> bool {
        input == 0 && self.channels.s == 1
    }

    fn takes_rounded(&self, _: &[Option<&Meta>], input: usize) -> bool {
        input == 4 && self.channels.s == 1
    }

    fn halved(&self, output: usize, to: DType) -> Option<Arc<dyn Op>> {
        let can = output == 0 && self.channels.s == 1;
        can.then(|| Arc::new(BatchNormInputGrad { rounds: Some(to), ..*self }) as Arc<dyn Op>)
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        per_channel(inputs, self.channels)?;
        let op = BatchNormInputGrad { channels: self.channels.last(), ..*self };
        Some(ChannelsLast::by(op, &[true, false, false, false, true], &[true]))
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
            let clamp = Clamp::NONE.to();
            let (dy, y) = (dy.map(Elements::Whole), Results::Whole(y.get::<T>()?));
            norm::channel_affine(dy, y, self.channels, zero, factor, zero, Residual::None, clamp);
            Ok(())
        })
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(0, 0)]
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        2 * inputs.get(1).copied().flatten().map_or(0, Meta::bytes)
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        per_channel(inputs, self.channels)?;
        let op = BatchNormEvalInputGrad { channels: self.channels.last(), ..*self };
        Some(ChannelsLast::by(op, &[true], &[true]))
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        second()
    }
}
