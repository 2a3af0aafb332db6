//! Normalisation of each sample by groups of its channels: `InstanceNormalization`, of which every channel is one, and
//! `GroupNormalization`.

use std::sync::Arc;

use super::{epsilon, reshaped, second, statistics};
use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::layout::Layout;
use crate::kernels::norm::{Channels, GroupNorm as Kernel};
use crate::ops::batch_norm::{ChannelSum, room, room_bytes};
use crate::ops::half::{computed, elements, widened};
use crate::ops::layout::rank_of;
use crate::ops::{ChannelsLast, Cx, Grads, Op, Spec, get, need, out};
use crate::tensor::{DType, Meta, View, ViewMut};

/// ONNX `InstanceNormalization` (opset 7) and `GroupNormalization` (18). Inputs x (N, C, …), scale and, where there is one,
/// shift; outputs y (N, C, …) and, one a group (N, groups), the mean and the inverse standard deviation.
#[derive(Debug, Clone)]
pub struct GroupNorm {
    /// `None`: every channel is one.
    groups: Option<usize>,
    /// Scale and shift are of groups, as before opset 21, not of channels.
    per_group: bool,
    pub(crate) epsilon: f64,
    layout: Layout,
}

/// Are these dimensions those of one number a channel, as they broadcast to (N, C, …) of `rank` dimensions?
pub(crate) fn per_channel(dims: &[usize], c: usize, rank: usize) -> bool {
    let lead = rank.wrapping_sub(dims.len());
    lead <= 1 && dims.iter().enumerate().all(|(i, d)| *d == if i + lead == 1 { c } else { 1 })
}

impl GroupNorm {
    /// Of groups of channels, with scale and shift of channels: (C), or as they broadcast to x.
    pub fn of(groups: usize, epsilon: f64) -> Self {
        GroupNorm { groups: Some(groups), per_group: false, epsilon, layout: Layout::First }
    }

    /// Is every channel a group?
    pub fn is_of_channels(&self) -> bool {
        self.groups.is_none()
    }

    pub(super) fn instance(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
        Ok(Arc::new(GroupNorm { groups: None, ..GroupNorm::of(1, epsilon(spec)?) }))
    }

    pub(super) fn parse(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let groups = spec.attrs.int("num_groups")?.unwrap_or(0);
        let groups = usize::try_from(groups)
            .ok()
            .filter(|&g| g > 0)
            .ok_or_else(|| OpError::Attribute(format!("'num_groups' is {groups}")))?;
        let op = GroupNorm::of(groups, epsilon(spec)?);
        Ok(Arc::new(GroupNorm { per_group: spec.opset < 21, ..op }))
    }

    fn kernel(&self, x: &[usize], scale: &[usize]) -> Result<Kernel, OpError> {
        let bad = || OpError::Shape(format!("scale of shape {scale:?} for x of shape {x:?}"));
        let [n, c, rest @ ..] = &self.layout.ordinary(x)[..] else { return Err(bad()) };
        let groups = self.groups.unwrap_or(*c);
        let scales = if self.per_group { groups } else { *c };
        if !c.is_multiple_of(groups) || !(scale == [scales] || per_channel(scale, scales, x.len())) {
            return Err(bad());
        }
        let (n, c, s) = (*n, *c, rest.iter().product());
        Ok(Kernel { n, c, s, groups, scales, epsilon: self.epsilon, layout: self.layout })
    }
}

impl Op for GroupNorm {
    fn name(&self) -> &'static str {
        if self.is_of_channels() { "InstanceNormalization" } else { "GroupNormalization" }
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (x, scale) = (need(inputs, 0)?, need(inputs, 1)?);
        let kernel = self.kernel(&x.dims, &scale.dims)?;
        super::alike(x, scale, get(inputs, 2))?;
        let stats = Meta::new(x.dtype, &[kernel.n, kernel.groups]);
        Ok(vec![Meta::new(x.dtype, &x.dims), stats.clone(), stats])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let scale = need(x, 1)?;
        let [Some(y), stats @ ..] = y else { return Err(OpError::Internal("no output".into())) };
        let kernel = self.kernel(y.dims, scale.dims)?;
        let count = kernel.n * kernel.groups;
        float_dispatch!(y.dtype, T => {
            let input = get(x, 0).map(|x| x.get::<T>()).transpose()?;
            let shift = get(x, 2).map(|x| x.get::<T>()).transpose()?;
            let (partials, rest) = room::<T>(cx, kernel.partials(), kernel.room() + 2 * count)?;
            let (near, own) = rest.split_at_mut(kernel.room());
            let statistics = statistics(stats, own)?;
            kernel.forward(input, scale.get::<T>()?, shift, y.get::<T>()?, statistics, partials, near);
            Ok(())
        })
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // shifts = Σ dy,  scales = Σ dy·x̂  of each channel of each sample, x̂ = (x − mean)·inv        (N, C)
        // dshift = Σ shifts,  dscale = Σ scales  over the samples, and the channels of a scale         (C)
        // dx = inv·(scale·dy − mean(scale·dy) − x̂·mean(scale·dy·x̂)), means over each group             (N, C, …)
        if g.dy(1).is_some() || g.dy(2).is_some() {
            return Err(OpError::NotDifferentiable("gradient through a mean or deviation".into()));
        }
        let (x, scale, dy) = (g.x(0)?, g.x(1)?, g.dy0()?);
        let scale_dims = g.meta(scale)?.dims.clone();
        let kernel = self.kernel(&g.meta(x)?.dims, &scale_dims)?;
        let Kernel { n, c, s, scales, .. } = kernel;
        let of_scales = |s: usize| Channels { n, c: scales, s: c / scales.max(1) * s };
        let mut grads = Grads::from_elem(None, 3);
        if g.wants(0) || g.wants(1) {
            let (mean, inv) = (g.y(1)?, g.y(2)?);
            let sums = g.emit_all(GroupNormSums { kernel }, &[x, dy, mean, inv].map(Some), 2)?;
            if g.wants(0) {
                let op = GroupNormInputGrad { kernel };
                grads[0] = Some(g.emit(op, &[x, dy, scale, mean, inv, sums[0], sums[1]])?);
            }
            for i in [1, 2] {
                if g.wants(i) {
                    let sum = g.emit(ChannelSum { channels: of_scales(1) }, &[sums[i - 1]])?;
                    grads[i] = Some(reshaped(g, sum, &scale_dims)?);
                }
            }
        } else if g.wants(2) {
            let sum = g.emit(ChannelSum { channels: of_scales(s) }, &[dy])?;
            grads[2] = Some(reshaped(g, sum, &scale_dims)?);
        }
        Ok(grads)
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(0, 0)]
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        rank_of(inputs, 0).filter(|_| self.layout == Layout::First)?;
        Some(ChannelsLast::by(GroupNorm { layout: Layout::Last, ..self.clone() }, &[true], &[true]))
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let (Some(x), Some(scale)) = (get(inputs, 0), get(inputs, 1)) else { return 0 };
        self.kernel(&x.dims, &scale.dims).map_or(0, |kernel| {
            room_bytes(kernel.partials(), kernel.room() + 2 * kernel.n * kernel.groups, x.dtype)
        })
    }
}

/// The operator for channels that lie last, where x is not so yet.
fn last(inputs: &[Option<&Meta>], kernel: Kernel) -> Option<Kernel> {
    rank_of(inputs, 0).filter(|_| kernel.layout == Layout::First)?;
    Some(Kernel { layout: Layout::Last, ..kernel })
}

/// `Σ dy·x̂` and `Σ dy` of each channel of each sample (N, C). Inputs x, dy, mean, inverse deviation.
#[derive(Debug)]
pub(in crate::ops) struct GroupNormSums {
    pub kernel: Kernel,
}

impl Op for GroupNormSums {
    fn name(&self) -> &'static str {
        "GroupNormSums"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let sums = Meta::new(need(inputs, 1)?.dtype, &[self.kernel.n, self.kernel.c]);
        Ok(vec![sums.clone(), sums])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let [Some(scales), Some(shifts)] = y else {
            return Err(OpError::Internal("two outputs are needed".into()));
        };
        float_dispatch!(scales.dtype, T => {
            let of = |i: usize| need(x, i)?.get::<T>();
            let (partials, near) = room::<T>(cx, self.kernel.partials(), self.kernel.room())?;
            let sums = (scales.get::<T>()?, shifts.get::<T>()?);
            self.kernel.sums(elements(need(x, 0)?)?, of(1)?, (of(2)?, of(3)?), sums, partials, near);
            Ok(())
        })
    }

    fn reads_half(&self, _: &[Option<&Meta>], input: usize) -> bool {
        input == 0 && self.kernel.layout == Layout::Last
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        let kernel = last(inputs, self.kernel)?;
        Some(ChannelsLast::by(GroupNormSums { kernel }, &[true, true], &[]))
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let dtype = get(inputs, 0).map_or(DType::F64, computed);
        room_bytes(self.kernel.partials(), self.kernel.room(), dtype)
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        second()
    }
}

/// Gradient of [`GroupNorm`]'s input. Inputs x, dy, scale, mean, inverse deviation, and the two [`GroupNormSums`].
#[derive(Debug)]
pub(in crate::ops) struct GroupNormInputGrad {
    pub kernel: Kernel,
}

impl Op for GroupNormInputGrad {
    fn name(&self) -> &'static str {
        "GroupNormInputGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        Ok(vec![widened(need(inputs, 0)?)])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let dx = out(y, 0)?;
        float_dispatch!(dx.dtype, T => {
            let of = |i: usize| need(x, i)?.get::<T>();
            let (input, dy) = (get(x, 0).map(elements).transpose()?, get(x, 1).map(|dy| dy.get::<T>()).transpose()?);
            let (stats, sums) = ((of(3)?, of(4)?), (of(5)?, of(6)?));
            let near = cx.room(self.kernel.grad_room())?;
            self.kernel.input_grad(input, dy, of(2)?, stats, sums, dx.get::<T>()?, near);
            Ok(())
        })
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(1, 0), (0, 0)]
    }

    fn reads_half(&self, _: &[Option<&Meta>], input: usize) -> bool {
        input == 0 && self.kernel.layout == Layout::Last
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        let kernel = last(inputs, self.kernel)?;
        Some(ChannelsLast::by(GroupNormInputGrad { kernel }, &[true, true], &[true]))
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let dtype = get(inputs, 0).map_or(DType::F64, computed);
        room_bytes(0, self.kernel.grad_room(), dtype)
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        second()
    }
}
