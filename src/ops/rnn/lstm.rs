//! `LSTM` and its gradient.

use std::sync::Arc;

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::rnn::lstm::{self as kernel, Lstm as Cell};
use crate::kernels::rnn::{Inputs, Outputs, Saved, Sequence, forward_scratch};
use crate::kernels::simd::Vectors;
use crate::ops::rnn::weights::gradients;
use crate::ops::rnn::{Config, lengths, optional, output_dims, room, sequence_at, state_dims};
use crate::ops::{Cx, Grads, Op, Spec, get, need, out};
use crate::tensor::{DType, Dims, Meta, View, ViewMut};

const GATES: usize = 4;

/// ONNX `LSTM` (opset 7; `layout` since 14): X, W, R, B, sequence_lens, initial_h, initial_c, P.
///
/// Outputs Y, Y_h, Y_c and, for the gradient, the gates' values (T · N, D · 4 · H) and the cell states (T · N, D · H).
#[derive(Debug, Clone)]
pub struct Lstm {
    pub config: Config<3>,
    /// `input_forget`: the forget gate is what the input gate leaves.
    pub coupled: bool,
}

impl Lstm {
    pub(super) fn make(s: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let config = Config::of(s, "LSTM", ["Sigmoid", "Tanh", "Tanh"])?;
        Ok(Arc::new(Lstm { config, coupled: s.attrs.flag("input_forget")? }))
    }

    fn cell<'a, T: Vectors>(&'a self, r: &'a [T], peepholes: Option<&'a [T]>) -> Cell<'a, T> {
        Cell {
            activations: &self.config.activations,
            clip: self.config.clip.map(|c| T::of(f64::from(c))),
            coupled: self.coupled,
            peepholes,
            r,
        }
    }
}

impl Op for Lstm {
    fn name(&self) -> &'static str {
        "LSTM"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let s = self.config.check(GATES, 2, inputs)?;
        let dtype = need(inputs, 0)?.dtype;
        if let Some(p) = get(inputs, 7)
            && (p.dims.as_slice() != [s.directions, 3 * s.hidden] || p.dtype != dtype)
        {
            return Err(OpError::Shape(format!("P of {:?} for an LSTM of {} units", p.dims, s.hidden)));
        }
        let state = Meta::new(dtype, &state_dims(&s));
        let kept = |width: usize| Meta::new(dtype, &[s.rows(), s.directions * width]);
        Ok(vec![Meta::new(dtype, &output_dims(&s)), state.clone(), state, kept(s.width()), kept(s.hidden)])
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
                c0: optional(x, 6)?,
            };
            let cell = self.cell(inputs.r, optional(x, 7)?);
            let mut outputs = y.iter_mut().map(|y| y.as_mut().map(|y| y.get::<T>()).transpose());
            let mut next = || outputs.next().transpose().map(Option::flatten);
            let outputs = Outputs { y: next()?, h: next()?, c: next()?, z: next()?, kept: next()? };
            kernel::forward(&s, &cell, &inputs, outputs, cx.room(forward_scratch::<T>(&s))?);
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let Ok(s) = self.config.check(GATES, 2, inputs) else { return 0 };
        let dtype = get(inputs, 0).map_or(DType::F32, |m| m.dtype);
        room(&s, dtype, [forward_scratch::<f32>, forward_scratch::<f64>])
    }

    fn multiply_adds(&self, inputs: &[Option<&Meta>]) -> usize {
        let s = self.config.check(GATES, 2, inputs);
        s.map_or(0, |s| s.rows() * s.directions * s.width() * (s.input + s.hidden))
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        self.config.differentiable()?;
        let s = sequence_at(&self.config, GATES, g)?;
        let (gates, cells) = (g.y(3)?, g.y(4)?);
        let outputs = if g.wants(5) || g.wants(6) { 3 } else { 1 };
        // Back through time: dZ   (T · N, D · 4 · H), dh₀, dc₀
        let inputs = [
            Some(g.x(2)?),
            g.x_opt(7),
            g.x_opt(4),
            g.x_opt(6),
            Some(gates),
            Some(cells),
            g.dy(0),
            g.dy(1),
            g.dy(2),
        ];
        let made = g.emit_all(LstmGrad { lstm: self.clone(), sequence: s }, &inputs, outputs)?;
        let mut grads = gradients(g, &s, made[0], None, None)?;
        for (i, dx) in made.iter().skip(1).enumerate() {
            if g.wants(5 + i) {
                grads[5 + i] = Some(*dx);
            }
        }
        if g.wants(7) {
            // dP = Σ_t dZ_t ⊙ the cell state that the gate looked at   (D, 3 · H)
            let inputs = [Some(made[0]), Some(cells), g.x_opt(4), g.x_opt(6)];
            grads[7] = Some(g.emit_all(PeepholeGrad { sequence: s }, &inputs, 1)?[0]);
        }
        Ok(grads)
    }
}

/// Back through the steps of an LSTM: dZ (T · N, D · 4 · H), dh₀ and dc₀.
///
/// Inputs R, P, sequence_lens, initial_c, the gates' values, the cell states, dY, dY_h, dY_c; of those only R, gates and
/// states are always there.
#[derive(Debug)]
pub struct LstmGrad {
    pub lstm: Lstm,
    pub sequence: Sequence,
}

impl Op for LstmGrad {
    fn name(&self) -> &'static str {
        "LSTMGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (s, dtype) = (&self.sequence, need(inputs, 0)?.dtype);
        let state = Meta::new(dtype, &state_dims(s));
        Ok(vec![Meta::new(dtype, &[s.rows(), s.directions * s.width()]), state.clone(), state])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (s, r) = (&self.sequence, need(x, 0)?);
        float_dispatch!(r.dtype, T => {
            let r = r.get::<T>()?;
            let saved = Saved {
                lengths: lengths(s, get(x, 2))?,
                c0: optional(x, 3)?,
                z: optional(x, 4)?,
                kept: optional(x, 5)?,
                dy: optional(x, 6)?,
                dh: optional(x, 7)?,
                dc: optional(x, 8)?,
                ..Saved::nothing(r)
            };
            let cell = self.lstm.cell(r, optional(x, 1)?);
            let mut outputs = y.iter_mut().map(|y| y.as_mut().map(|y| y.get::<T>()).transpose());
            let mut next = || outputs.next().transpose().map(Option::flatten);
            let dz = next()?.ok_or_else(|| OpError::Internal("output 0 has no buffer".into()))?;
            let (dh0, dc0) = (next()?, next()?);
            kernel::backward(s, &cell, &saved, dz, dh0, dc0, cx.room(kernel::backward_scratch::<T>(s))?);
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
        Err(OpError::NotDifferentiable("second derivatives of LSTM".into()))
    }
}

/// The gradient of an LSTM's peepholes (D, 3 · H) from dZ, the cell states, sequence lengths and the initial cell state.
#[derive(Debug)]
pub struct PeepholeGrad {
    pub sequence: Sequence,
}

impl Op for PeepholeGrad {
    fn name(&self) -> &'static str {
        "PeepholeGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let dims = Dims::from_slice(&[self.sequence.directions, 3 * self.sequence.hidden]);
        Ok(vec![Meta::new(need(inputs, 0)?.dtype, &dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (s, dz) = (&self.sequence, need(x, 0)?);
        float_dispatch!(dz.dtype, T => {
            let saved = Saved {
                kept: optional(x, 1)?,
                lengths: lengths(s, get(x, 2))?,
                c0: optional(x, 3)?,
                ..Saved::nothing(&[])
            };
            kernel::peephole_grad(s, &saved, dz.get::<T>()?, out(y, 0)?.get()?);
            Ok(())
        })
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("second derivatives of LSTM".into()))
    }
}
