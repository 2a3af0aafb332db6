//! `BatchNormalization`: training and inference form, with what follows it fused in.

mod again;
mod gated;
mod grad;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::{GradBuilder, Node};
use crate::kernels::elementwise::Clamp;
use crate::kernels::layout::Layout;
use crate::kernels::norm::{self, Channels, Residual, Results, Stat};
use crate::kernels::simd::Vectors;
use crate::ops::clip::passed;
use crate::ops::half::{PutOut, computed, elements, results, rounded, widened};
use crate::ops::layout::rank_of;
use crate::ops::{ChannelsLast, Cx, Grads, Mode, Op, Rerun, Row, Spec, get, need};
use crate::tensor::{DType, Float, Meta, View, ViewMut};

use again::Normalise;
pub use gated::Gated;
use grad::BatchNormEvalInputGrad;
pub use grad::{BatchNormInputGrad, BatchNormParamGrad, ChannelParamGrad, ChannelSum};
#[cfg(test)]
pub(super) use tests::cases;

/// What old exporters wrote as momentum when they meant nothing by it; training takes 0.9 instead.
const NO_MOMENTUM: f32 = 1.0;

/// ONNX `BatchNormalization`, opset 6 and newer.
///
/// Inputs x (N, C, …), scale (C), shift (C), running mean (C), running variance (C). Outputs: y, next running
/// mean, next running variance, and for the gradient the mean (C) and inverse standard deviation (C) that were
/// used. (Opsets before 14 name outputs 3 and 4 "saved mean" and "saved variance"; as with cuDNN the latter is
/// the inverse standard deviation here.)
///
/// Output 0 may be absent: whoever reads it then normalises x by itself.
///
/// Fused: y = clamp(normalised x + residual), the residual (N, C, …) being input 5. Where the batch's statistics are
/// `given`, inputs 5 and 6 are its mean and variance (C), and the residual is input 7. Where y is put out
/// both whole and in half precision, output 5 is the latter.
#[derive(Debug, Clone)]
pub struct BatchNormalization {
    epsilon: f64,
    /// As in the file: `running = running·momentum + batch·(1 − momentum)`.
    momentum: f32,
    /// `false`: statistics per element of a sample rather than per channel (before opset 9).
    spatial: bool,
    layout: Layout,
    training: bool,
    unbiased: bool,
    /// The running statistics really follow the batches (the file's 1.0 taken as 0.9).
    follow: bool,
    /// What is done to the result last.
    clamp: Clamp<f64>,
    given: bool,
    puts_out: PutOut,
}

impl BatchNormalization {
    fn parse(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let training = match spec.opset {
            14.. => spec.attrs.flag("training_mode")?,
            7.. => spec.outputs > 1,
            _ => !spec.attrs.flag("is_test")?,
        };
        Ok(Arc::new(BatchNormalization {
            epsilon: spec.attrs.float_or("epsilon", 1e-5)? as f64,
            momentum: spec.attrs.float_or("momentum", 0.9)?,
            spatial: spec.opset >= 9 || spec.attrs.flag_or("spatial", true)?,
            layout: Layout::First,
            training,
            unbiased: false,
            follow: false,
            clamp: Clamp::NONE,
            given: false,
            puts_out: PutOut::Whole,
        }))
    }

    /// The momentum that applies: in training, 1.0 of the file means 0.9.
    pub fn momentum(&self) -> f32 {
        if self.follow && self.momentum == NO_MOMENTUM { 0.9 } else { self.momentum }
    }

    /// Normalises by the batch's own statistics.
    pub fn training(&self) -> bool {
        self.training
    }

    /// What is added to the variance, if statistics are per channel.
    pub fn channel_epsilon(&self) -> Option<f64> {
        self.spatial.then_some(self.epsilon)
    }

    /// What is done to the result last.
    pub fn clamp(&self) -> Clamp<f64> {
        self.clamp
    }

    /// The same with the batch's statistics given, those of the training form not known already.
    pub fn given(&self) -> Option<Self> {
        (self.training && self.spatial && !self.given)
            .then(|| BatchNormalization { given: true, ..self.clone() })
    }

    /// Nothing but x, scaled, shifted and clamped, goes into the result of so many inputs.
    pub fn is_plain(&self, inputs: usize) -> bool {
        inputs <= self.residual()
    }

    /// The input that may be a residual.
    fn residual(&self) -> usize {
        if self.given { 7 } else { 5 }
    }

    /// The same with an activation (and, where there is an input 5, a residual) fused in.
    pub fn then(&self, clamp: Clamp<f64>) -> Self {
        BatchNormalization { clamp, ..self.clone() }
    }

    fn channels(&self, dims: &[usize]) -> Channels {
        let dims = &self.layout.ordinary(dims)[..];
        let channels = match (self.spatial, dims) {
            (_, []) => Channels { n: 1, c: 1, s: 1 },
            (_, [n]) => Channels { n: *n, c: 1, s: 1 },
            (true, [n, c, rest @ ..]) => Channels { n: *n, c: *c, s: rest.iter().product() },
            (false, [n, rest @ ..]) => Channels { n: *n, c: rest.iter().product(), s: 1 },
        };
        match self.layout {
            Layout::First => channels,
            Layout::Last => channels.last(),
        }
    }

    /// The vector-Jacobian product of the training form with an activation.
    fn fused_vjp(&self, g: &mut GradBuilder, channels: Channels, mut grads: Grads) -> Result<Grads, OpError> {
        let [x, scale, shift] = [g.x(0)?, g.x(1)?, g.x(2)?];
        let [dy, mean, inv] = [g.dy0()?, g.y(3)?, g.y(4)?];
        let residual = g.inputs() > 5;
        let op = BatchNormParamGrad { channels, clamp: self.clamp };
        let (dz, clamp) = if residual {
            // What passed shows in y; dz is the residual's gradient too, so it is written.
            let y = g.y(0)?;
            let made = g.emit_all(op, &[x, dy, mean, inv, scale, shift, y].map(Some), 3)?;
            (grads[1], grads[2], grads[5]) = (Some(made[0]), Some(made[1]), Some(made[2]));
            (made[2], Clamp::NONE)
        } else {
            // What passed is computed again from x, which is read anyway.
            let made = g.emit_all(op, &[x, dy, mean, inv, scale, shift].map(Some), 2)?;
            (grads[1], grads[2]) = (Some(made[0]), Some(made[1]));
            (dy, self.clamp)
        };
        if let (true, Some(dscale), Some(dshift)) = (g.wants(0), grads[1], grads[2]) {
            let mut inputs = vec![x, scale, mean, inv, dz, dscale, dshift];
            inputs.extend((!residual).then_some(shift));
            grads[0] = Some(g.emit(BatchNormInputGrad::of(channels, clamp), &inputs)?);
        }
        Ok(grads)
    }

    fn run<T: Vectors>(
        &self,
        cx: &mut Cx,
        x: &[Option<View>],
        y: &mut [Option<ViewMut>],
    ) -> Result<(), OpError> {
        let [y0, y1, y2, mut y3, mut y4, y5] = outputs(y)?;
        let dims = y0.as_ref().map(|y| y.dims).or(get(x, 0).map(|x| x.dims));
        let d = self.channels(dims.ok_or_else(|| OpError::Internal("nothing to normalise".into()))?);
        let y0 = match (y0, y5) {
            (Some(y0), Some(y5)) => {
                let (half, to) = rounded(y5)?;
                Some(Results::Both(y0.get::<T>()?, half, to))
            }
            (y0, _) => y0.map(results::<T>).transpose()?,
        };
        let (scale, shift) = (need(x, 1)?.get::<T>()?, need(x, 2)?.get::<T>()?);
        let input = get(x, 0).map(elements::<T>).transpose()?;
        let residual = match x.get(self.residual()) {
            Some(Some(r)) => Residual::Given(r.get::<T>()?),
            Some(None) => Residual::InResult,
            None => Residual::None,
        };
        let clamp = self.clamp.to::<T>();
        let partials = if self.training && !self.given { d.partials() } else { 0 };
        let (partials, scratch) = room::<T>(cx, partials, if self.training { 3 * d.c } else { d.c })?;
        let (factor, rest) = scratch.split_at_mut_checked(d.c).ok_or_else(short)?;
        if !self.training {
            let (mean, var) = (need(x, 3)?.get::<T>()?, need(x, 4)?.get::<T>()?);
            for ((f, &scale), &var) in factor.iter_mut().zip(scale).zip(var) {
                *f = T::of(scale.to64() / (var.to64() + self.epsilon).sqrt());
            }
            if let Some(y0) = y0 {
                norm::channel_affine(input, y0, d, mean, factor, shift, residual, clamp);
            }
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
        if self.given {
            mean.copy_from_slice(need(x, 5)?.get::<T>()?);
            inv.copy_from_slice(need(x, 6)?.get::<T>()?);
        } else {
            let in_place = match &y0 {
                Some(Results::Whole(y) | Results::Both(y, ..)) => &**y,
                _ => &[],
            };
            let input = input.map_or(in_place, |x| x.whole());
            norm::channel_stats(input, d, mean, inv, partials);
        }
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
            *inv = T::of(1.0 / (inv.to64() + self.epsilon).sqrt());
            // As the gradient will compute it again.
            *f = T::of(scale.to64() * inv.to64());
        }
        if let Some(y0) = y0 {
            norm::channel_affine(input, y0, d, mean, factor, shift, residual, clamp);
        }
        Ok(())
    }
}

/// The first parts of the scratch memory: so many `f64` and then `T`.
pub(super) fn room<'a, T: Float>(
    cx: &'a mut Cx,
    partials: usize,
    n: usize,
) -> Result<(&'a mut [f64], &'a mut [T]), OpError> {
    let (first, rest) = cx.scratch.split_at_mut_checked(partials * size_of::<f64>()).ok_or_else(short)?;
    let rest = rest.get_mut(..n * size_of::<T>()).ok_or_else(short)?;
    match (bytemuck::try_cast_slice_mut(first), bytemuck::try_cast_slice_mut(rest)) {
        (Ok(first), Ok(rest)) => Ok((first, rest)),
        _ => Err(OpError::Internal("scratch memory is not aligned".into())),
    }
}

/// Bytes of scratch memory that [`room`] takes.
pub(super) fn room_bytes(partials: usize, n: usize, dtype: DType) -> usize {
    partials * size_of::<f64>() + n * dtype.size()
}

fn short() -> OpError {
    OpError::Internal("too little scratch memory".into())
}

/// The six output slots, absent ones made up.
fn outputs<'a, 'b>(y: &'a mut [Option<ViewMut<'b>>]) -> Result<[Option<&'a mut ViewMut<'b>>; 6], OpError> {
    let mut slots = [const { None }; 6];
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
        let x = &widened(need(inputs, 0)?);
        let c = self.channels(&x.dims).c;
        let last = self.residual();
        for i in 1..last {
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
        if inputs.len() > last && !need(inputs, last)?.same_shape(x) {
            let dims = &need(inputs, last)?.dims;
            return Err(OpError::Shape(format!("a residual of {dims:?} beside {:?}", x.dims)));
        }
        let of = |i: usize| need(inputs, i).map(|m: &Meta| Meta::new(m.dtype, &m.dims));
        let channel = Meta::new(x.dtype, &[c]);
        let made = vec![Meta::new(x.dtype, &x.dims), of(3)?, of(4)?, channel.clone(), channel];
        Ok(self.puts_out.of(made))
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        float_dispatch!(need(x, 1)?.dtype, T => self.run::<T>(cx, x, y))
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        rank_of(inputs, 0).filter(|_| self.spatial)?;
        let op = BatchNormalization { layout: Layout::Last, ..self.clone() };
        let flags = [true, false, false, false, false, !self.given, false, self.given];
        Some(ChannelsLast::by(op, &flags, &[true]))
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        if self.given {
            return Err(OpError::NotDifferentiable("a normalisation by given statistics".into()));
        }
        if (1..5).any(|i| g.dy(i).is_some()) {
            return Err(OpError::NotDifferentiable("gradient through the running statistics".into()));
        }
        if g.wants(3) || g.wants(4) {
            return Err(OpError::NotDifferentiable("running mean and variance are not trained".into()));
        }
        let (x, scale) = (g.x(0)?, g.x(1)?);
        let channels = self.channels(&g.meta(x)?.dims);
        let mut grads = Grads::from_elem(None, g.inputs());
        // dz = dy where the activation let pass                                                     (N, C, …)
        // dshift = Σ dz,  dscale = Σ dz·x̂,  x̂ = (x − mean)·inv                                     (C)
        // inference: dx = dz·scale·inv
        // training:  dx = scale·inv·(dz − dshift/M − x̂·dscale/M), M elements a channel             (N, C, …)
        let params = g.wants(1) || g.wants(2) && self.training || g.wants(0) && self.training;
        if self.training && params && !self.clamp.is_none() {
            return self.fused_vjp(g, channels, grads);
        }
        let dz = passed(g, self.clamp)?;
        if g.inputs() > 5 {
            grads[5] = Some(dz);
        }
        let (mean, spread, epsilon) = match self.training {
            true if params => (g.y(3)?, g.y(4)?, None),
            _ => (g.x(3)?, g.x(4)?, Some(self.epsilon)),
        };
        if params {
            let op = ChannelParamGrad { channels, stat: Stat::Channel, epsilon };
            let made = g.emit_all(op, &[Some(x), Some(dz), Some(mean), Some(spread)], 2)?;
            (grads[1], grads[2]) = (Some(made[0]), Some(made[1]));
        } else if g.wants(2) {
            grads[2] = Some(g.emit(ChannelSum { channels }, &[dz])?);
        }
        if g.wants(0) {
            grads[0] = match (self.training, grads[1], grads[2]) {
                (true, Some(dscale), Some(dshift)) => {
                    let op = BatchNormInputGrad::of(channels, Clamp::NONE);
                    Some(g.emit(op, &[x, scale, mean, spread, dz, dscale, dshift])?)
                }
                _ => Some(g.emit(
                    BatchNormEvalInputGrad { channels, epsilon: self.epsilon },
                    &[dz, scale, spread],
                )?),
            };
        }
        Ok(grads)
    }

    fn in_place(&self) -> &[(usize, usize)] {
        match () {
            _ if self.puts_out.is_half() => &[],
            _ if self.given => &[(0, 0), (7, 0)],
            _ => &[(0, 0), (5, 0)],
        }
    }

    fn reads_half(&self, _: &[Option<&Meta>], input: usize) -> bool {
        input == 0 && self.given && self.layout == Layout::Last
    }

    fn halved(&self, output: usize, to: DType) -> Option<Arc<dyn Op>> {
        let can = output == 0 && self.layout == Layout::Last;
        can.then(|| {
            Arc::new(BatchNormalization { puts_out: PutOut::Half(to), ..self.clone() }) as Arc<dyn Op>
        })
    }

    fn rounding(&self, to: DType) -> Option<Arc<dyn Op>> {
        let can = self.layout == Layout::Last;
        can.then(|| {
            Arc::new(BatchNormalization { puts_out: PutOut::Both(to), ..self.clone() }) as Arc<dyn Op>
        })
    }

    fn updates(&self) -> &[(usize, usize)] {
        if self.training { &[(3, 1), (4, 2)] } else { &[] }
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let Some(x) = get(inputs, 0) else { return 0 };
        let (d, dtype) = (self.channels(&x.dims), computed(x));
        match self.training {
            true if self.given => room_bytes(0, 3 * d.c, dtype),
            true => room_bytes(d.partials(), 3 * d.c, dtype),
            false => room_bytes(0, d.c, dtype),
        }
    }

    fn again(&self, node: &Node) -> Option<Rerun> {
        let &[_, _, _, mean @ Some(_), inv @ Some(_), ..] = &node.outputs[..] else { return None };
        let mut inputs = vec![node.inputs[0], node.inputs[1], node.inputs[2], mean, inv];
        inputs.extend(node.inputs.get(self.residual()).copied());
        let op = Normalise { of: self.clone() };
        self.training.then(|| (Arc::new(op) as Arc<dyn Op>, inputs))
    }

    fn in_mode(&self, mode: Mode) -> Option<Arc<dyn Op>> {
        let training = mode.training && mode.batch_statistics;
        let unbiased = mode.unbiased_variance;
        let momentum = if mode.fresh_statistics { 0.0 } else { self.momentum };
        Some(Arc::new(BatchNormalization { training, unbiased, momentum, follow: training, ..self.clone() }))
    }

    fn remark(&self) -> Option<String> {
        (self.follow && self.momentum == NO_MOMENTUM)
            .then(|| "momentum 1 in the file would never update the running statistics: 0.9 is used".into())
    }
}

pub(super) const ROWS: &[Row] = &[Row::new("BatchNormalization", 6, BatchNormalization::parse)];
