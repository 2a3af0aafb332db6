//! `GRU` and its gradient.

use std::sync::Arc;

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::rnn::gru::{self as kernel, Gru as Cell};
use crate::kernels::rnn::{Inputs, Outputs, Saved, Sequence, forward_scratch};
use crate::kernels::simd::Vectors;
use crate::ops::rnn::weights::gradients;
use crate::ops::rnn::{Config, lengths, optional, output_dims, room, sequence_at, state_dims};
use crate::ops::{Cx, Grads, Op, Spec, get, need};
use crate::tensor::{DType, Meta, View, ViewMut};

const GATES: usize = 3;

/// ONNX `GRU` (opset 7; `layout` since 14): X, W, R, B, sequence_lens, initial_h.
///
/// Outputs Y, Y_h and, for the gradient, the gates' values (T · N, D · 3 · H) and, with `reset_after`, what the reset gate
/// multiplied (T · N, D · H).
#[derive(Debug, Clone)]
pub struct Gru {
    pub config: Config<2>,
    /// `linear_before_reset`: the reset gate multiplies the product of the state, not the state.
    pub reset_after: bool,
}

impl Gru {
    pub(super) fn make(s: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let config = Config::of(s, "GRU", ["Sigmoid", "Tanh"])?;
        Ok(Arc::new(Gru { config, reset_after: s.attrs.flag("linear_before_reset")? }))
    }

    fn cell<'a, T: Vectors>(&'a self, r: &'a [T], b: Option<&'a [T]>) -> Cell<'a, T> {
        Cell {
            activations: &self.config.activations,
            clip: self.config.clip.map(|c| T::of(f64::from(c))),
            reset_after: self.reset_after,
            r,
            b,
        }
    }
}

impl Op for Gru {
    fn name(&self) -> &'static str {
        "GRU"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let s = self.config.check(GATES, 1, inputs)?;
        let dtype = need(inputs, 0)?.dtype;
        let kept = |width: usize| Meta::new(dtype, &[s.rows(), s.directions * width]);
        Ok(vec![
            Meta::new(dtype, &output_dims(&s)),
            Meta::new(dtype, &state_dims(&s)),
            kept(s.width()),
            kept(s.hidden),
        ])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (input, w, r) = (need(x, 0)?, need(x, 1)?, need(x, 2)?);
        let s = self.config.sequence(GATES, input.dims, w.dims, r.dims)?;
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
            let cell = self.cell(inputs.r, inputs.b);
            let mut outputs = y.iter_mut().map(|y| y.as_mut().map(|y| y.get::<T>()).transpose());
            let mut next = || outputs.next().transpose().map(Option::flatten);
            let outputs = Outputs { y: next()?, h: next()?, c: None, z: next()?, kept: next()? };
            kernel::forward(&s, &cell, &inputs, outputs, cx.room(forward_scratch::<T>(&s))?);
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let Ok(s) = self.config.check(GATES, 1, inputs) else { return 0 };
        let dtype = get(inputs, 0).map_or(DType::F32, |m| m.dtype);
        room(&s, dtype, [forward_scratch::<f32>, forward_scratch::<f64>])
    }

    fn multiply_adds(&self, inputs: &[Option<&Meta>]) -> usize {
        let s = self.config.check(GATES, 1, inputs);
        s.map_or(0, |s| s.rows() * s.directions * s.width() * (s.input + s.hidden))
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        self.config.differentiable()?;
        let s = sequence_at(&self.config, GATES, g)?;
        let (y, gates) = (g.y(0)?, g.y(2)?);
        let product = if self.reset_after { Some(g.y(3)?) } else { None };
        // Back through time: dZ, with `reset_after` that of the recurrent part   (T · N, D · 3 · H), dh₀
        let inputs = [Some(g.x(2)?), g.x_opt(4), g.x_opt(5), Some(y), Some(gates), product, g.dy(0), g.dy(1)];
        let outputs = 1 + usize::from(self.reset_after) + usize::from(g.wants(5));
        let made = g.emit_all(GruGrad { gru: self.clone(), sequence: s }, &inputs, outputs)?;
        let (dr, reset) = match self.reset_after {
            true => (Some(made[1]), None),
            false => (None, Some(gates)),
        };
        let mut grads = gradients(g, &s, made[0], dr, reset)?;
        if g.wants(5) {
            grads[5] = made.last().copied();
        }
        Ok(grads)
    }
}

/// Back through the steps of a GRU: dZ (T · N, D · 3 · H), with `reset_after` also that of the recurrent part, dh₀.
///
/// Inputs R, sequence_lens, initial_h, Y, the gates' values, what the reset gate multiplied, dY, dY_h; of those only R, Y
/// and gates are always there.
#[derive(Debug)]
pub struct GruGrad {
    pub gru: Gru,
    pub sequence: Sequence,
}

impl Op for GruGrad {
    fn name(&self) -> &'static str {
        "GRUGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (s, dtype) = (&self.sequence, need(inputs, 0)?.dtype);
        let dz = Meta::new(dtype, &[s.rows(), s.directions * s.width()]);
        let mut made = vec![dz; 1 + usize::from(self.gru.reset_after)];
        made.push(Meta::new(dtype, &state_dims(s)));
        Ok(made)
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (s, r) = (&self.sequence, need(x, 0)?);
        float_dispatch!(r.dtype, T => {
            let r = r.get::<T>()?;
            let saved = Saved {
                lengths: lengths(s, get(x, 1))?,
                h0: optional(x, 2)?,
                y: optional(x, 3)?,
                z: optional(x, 4)?,
                kept: optional(x, 5)?,
                dy: optional(x, 6)?,
                dh: optional(x, 7)?,
                ..Saved::nothing(r)
            };
            let cell = self.gru.cell(r, None);
            let mut outputs = y.iter_mut().map(|y| y.as_mut().map(|y| y.get::<T>()).transpose());
            let mut next = || outputs.next().transpose().map(Option::flatten);
            let missing = || OpError::Internal("an output has no buffer".into());
            let dz = next()?.ok_or_else(missing)?;
            let dr = if self.gru.reset_after { Some(next()?.ok_or_else(missing)?) } else { None };
            let dh0 = next()?;
            kernel::backward(s, &cell, &saved, dz, dr, dh0, cx.room(kernel::backward_scratch::<T>(s))?);
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
        Err(OpError::NotDifferentiable("second derivatives of GRU".into()))
    }
}
