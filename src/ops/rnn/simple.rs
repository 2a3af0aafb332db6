//! `RNN` and its gradient.

use std::sync::Arc;

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::rnn::simple::{self as kernel, Simple as Cell};
use crate::kernels::rnn::{Inputs, Outputs, Saved, Sequence, forward_scratch};
use crate::kernels::simd::Vectors;
use crate::ops::rnn::weights::gradients;
use crate::ops::rnn::{Config, lengths, optional, output_dims, room, sequence_at, state_dims};
use crate::ops::{Cx, Grads, Op, Spec, get, need};
use crate::tensor::{DType, Meta, View, ViewMut};

/// ONNX `RNN` (opset 7; `layout` since 14): X, W, R, B, sequence_lens, initial_h; outputs Y, Y_h.
#[derive(Debug, Clone)]
pub struct Rnn {
    pub config: Config<1>,
}

impl Rnn {
    pub(super) fn make(s: &Spec) -> Result<Arc<dyn Op>, OpError> {
        Ok(Arc::new(Rnn { config: Config::of(s, "RNN", ["Tanh"])? }))
    }

    fn cell<'a, T: Vectors>(&'a self, r: &'a [T]) -> Cell<'a, T> {
        let clip = self.config.clip.map(|c| T::of(f64::from(c)));
        Cell { activations: &self.config.activations, clip, r }
    }
}

impl Op for Rnn {
    fn name(&self) -> &'static str {
        "RNN"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let s = self.config.check(1, 1, inputs)?;
        let dtype = need(inputs, 0)?.dtype;
        Ok(vec![Meta::new(dtype, &output_dims(&s)), Meta::new(dtype, &state_dims(&s))])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (input, w, r) = (need(x, 0)?, need(x, 1)?, need(x, 2)?);
        let s = self.config.sequence(1, input.dims, w.dims, r.dims)?;
        float_dispatch!(input.dtype, T => {
            let inputs = Inputs {
                x: input.get::<T>()?,
                w: w.get()?,
                r: r.get()?,
                b: optional(x, 3)?,
                lengths: lengths(&s, get(x, 4))?,
                h0: optional(x, 5)?,
                c0: None,
            };
            let mut outputs = y.iter_mut().map(|y| y.as_mut().map(|y| y.get::<T>()).transpose());
            let mut next = || outputs.next().transpose().map(Option::flatten);
            let outputs = Outputs { y: next()?, h: next()?, c: None, z: None, kept: None };
            let scratch = cx.room(forward_scratch::<T>(&s))?;
            kernel::forward(&s, &self.cell(inputs.r), &inputs, outputs, scratch);
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let Ok(s) = self.config.check(1, 1, inputs) else { return 0 };
        let dtype = get(inputs, 0).map_or(DType::F32, |m| m.dtype);
        room(&s, dtype, [forward_scratch::<f32>, forward_scratch::<f64>])
    }

    fn multiply_adds(&self, inputs: &[Option<&Meta>]) -> usize {
        let s = self.config.check(1, 1, inputs);
        s.map_or(0, |s| s.rows() * s.directions * s.width() * (s.input + s.hidden))
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        self.config.differentiable()?;
        let s = sequence_at(&self.config, 1, g)?;
        // Back through time: dZ   (T · N, D · H), dh₀
        let inputs = [Some(g.x(2)?), g.x_opt(4), Some(g.y(0)?), g.dy(0), g.dy(1)];
        let outputs = 1 + usize::from(g.wants(5));
        let made = g.emit_all(RnnGrad { rnn: self.clone(), sequence: s }, &inputs, outputs)?;
        let mut grads = gradients(g, &s, made[0], None, None)?;
        if g.wants(5) {
            grads[5] = made.last().copied();
        }
        Ok(grads)
    }
}

/// Back through the steps of an RNN: dZ (T · N, D · H) and dh₀. Inputs R, sequence_lens, Y, dY, dY_h, of which R and Y are
/// always there.
#[derive(Debug)]
pub struct RnnGrad {
    pub rnn: Rnn,
    pub sequence: Sequence,
}

impl Op for RnnGrad {
    fn name(&self) -> &'static str {
        "RNNGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (s, dtype) = (&self.sequence, need(inputs, 0)?.dtype);
        Ok(vec![Meta::new(dtype, &[s.rows(), s.directions * s.width()]), Meta::new(dtype, &state_dims(s))])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (s, r) = (&self.sequence, need(x, 0)?);
        float_dispatch!(r.dtype, T => {
            let r = r.get::<T>()?;
            let saved = Saved {
                lengths: lengths(s, get(x, 1))?,
                y: optional(x, 2)?,
                dy: optional(x, 3)?,
                dh: optional(x, 4)?,
                ..Saved::nothing(r)
            };
            let mut outputs = y.iter_mut().map(|y| y.as_mut().map(|y| y.get::<T>()).transpose());
            let mut next = || outputs.next().transpose().map(Option::flatten);
            let dz = next()?.ok_or_else(|| OpError::Internal("output 0 has no buffer".into()))?;
            let dh0 = next()?;
            let scratch = cx.room(kernel::backward_scratch::<T>(s))?;
            kernel::backward(s, &self.rnn.cell(r), &saved, dz, dh0, scratch);
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let dtype = get(inputs, 0).map_or(DType::F32, |m| m.dtype);
        room(&self.sequence, dtype, [kernel::backward_scratch::<f32>, kernel::backward_scratch::<f64>])
    }

    fn multiply_adds(&self, _: &[Option<&Meta>]) -> usize {
        let s = &self.sequence;
        s.rows() * s.directions * s.width() * s.hidden
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("second derivatives of RNN".into()))
    }
}
