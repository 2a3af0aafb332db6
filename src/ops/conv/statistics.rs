//! Convolution with the statistics of its results.

use std::sync::Arc;

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::conv::{self as kernel, Geometry, Statistics};
use crate::kernels::half::Half;
use crate::kernels::layout::Layout;
use crate::ops::conv::{Conv, floats, short};
use crate::ops::half::{PutOut, rounded};
use crate::ops::{ChannelsLast, Cx, Grads, Op, get, need};
use crate::tensor::{DType, Meta, View, ViewMut};

/// A [`Conv`] whose outputs 1 and 2 are mean and population variance (M) of each channel of Y, gathered while Y is
/// near. Made of convolutions that a training normalisation follows, in graphs that are differentiated already.
#[derive(Debug)]
pub struct ConvStatistics {
    pub conv: Conv,
    /// Of Y; output 3 is its half form beside it.
    pub puts_out: PutOut,
}

impl ConvStatistics {
    pub fn of(conv: Conv) -> Self {
        ConvStatistics { conv, puts_out: PutOut::Whole }
    }

    /// Bytes of scratch in front of the convolution's own.
    fn room(&self, x: &[usize], w: &[usize], dtype: DType) -> usize {
        let room = match dtype {
            DType::F64 => kernel::statistics_room::<f64>,
            _ => kernel::statistics_room::<f32>,
        };
        self.conv.geometry(x, w).map_or(0, |(g, _)| room(&g) * size_of::<f64>())
    }
}

impl Op for ConvStatistics {
    fn name(&self) -> &'static str {
        "ConvStatistics"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let mut made = self.conv.infer(inputs)?;
        let channel = Meta::new(made[0].dtype, &need(inputs, 1)?.dims[..1]);
        made.extend([channel.clone(), channel]);
        Ok(self.puts_out.of(made))
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (input, w) = (need(x, 0)?, need(x, 1)?);
        let (g, _) = self.conv.geometry(input.dims, w.dims)?;
        let bytes = self.room(input.dims, w.dims, w.dtype);
        let (room, scratch) = cx.scratch.split_at_mut_checked(bytes).ok_or_else(short)?;
        let [Some(y), Some(mean), Some(variance), more @ ..] = y else {
            return Err(OpError::Internal("three outputs are needed".into()));
        };
        let (y, rounded) = match more {
            [Some(to), ..] => (Some(y), Some(rounded(to)?)),
            _ if self.puts_out.is_half() => (None, Some(rounded(y)?)),
            _ => (Some(y), None),
        };
        float_dispatch!(w.dtype, T => {
            let (epilogue, y) = (self.conv.epilogue(x)?, y.map(|y| y.get::<T>()).transpose()?);
            let (mean, variance) = (mean.get::<T>()?, variance.get::<T>()?);
            let statistics = Statistics { mean, variance, room: floats(room)?, rounded };
            let (x, scratch) = self.conv.input::<T>(x, g.c, scratch)?;
            kernel::forward_statistics(&g, x, w.get::<T>()?, epilogue, y, statistics, scratch);
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let (Some(x), Some(w)) = (get(inputs, 0), get(inputs, 1)) else { return 0 };
        let (kept, half) = (!self.puts_out.is_half(), Half::of(x.dtype).is_some());
        let single =
            |g: &Geometry, computed: bool| kernel::statistics_scratch::<f32>(g, !computed && !half, kept);
        let double = |g: &Geometry, computed: bool| kernel::statistics_scratch::<f64>(g, !computed, kept);
        self.room(&x.dims, &w.dims, w.dtype) + self.conv.room(x, &w.dims, [&single, &double])
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], outputs: &[Option<&Meta>]) -> Option<ChannelsLast> {
        let flags = self.conv.channels_last(inputs, outputs)?;
        let op = ConvStatistics { conv: self.conv.last(), ..*self };
        Some(ChannelsLast::by(op, &flags.inputs, &[true, false, false]).wanted())
    }

    fn is_kept_rounded(&self) -> bool {
        // As the normalisations read it.
        self.conv.layout == Layout::Last
    }

    fn halved(&self, output: usize, to: DType) -> Option<Arc<dyn Op>> {
        // (Results that are rounded from the registers are so to bfloat16.)
        (output == 0 && (to == DType::BF16 || !self.conv.pairs)).then_some(())?;
        Some(Arc::new(ConvStatistics { conv: self.conv.clone(), puts_out: PutOut::Half(to) }))
    }

    fn rounding(&self, to: DType) -> Option<Arc<dyn Op>> {
        Some(Arc::new(ConvStatistics { conv: self.conv.clone(), puts_out: PutOut::Both(to) }))
    }

    fn by_pairs(&self) -> Option<Arc<dyn Op>> {
        Some(Arc::new(ConvStatistics { conv: self.conv.paired()?, ..*self }))
    }

    fn in_place(&self) -> &[(usize, usize)] {
        if self.puts_out.is_half() { &[] } else { self.conv.in_place() }
    }

    fn reads_half(&self, inputs: &[Option<&Meta>], input: usize) -> bool {
        self.conv.reads_half(inputs, input)
    }

    fn rounds(&self, inputs: &[Option<&Meta>], input: usize) -> bool {
        self.conv.rounds(inputs, input)
    }

    fn multiply_adds(&self, inputs: &[Option<&Meta>]) -> usize {
        self.conv.multiply_adds(inputs)
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("a convolution with statistics".into()))
    }
}
