//! Back through the steps of a recurrent layer.

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::rnn::{self as kernel, Gradients, Kind, Saved, Sequence};
use crate::ops::rnn::weights::gradients;
use crate::ops::rnn::{Recurrent, in_order, lengths, optional, room, state_dims};
use crate::ops::{Cx, Grads, Op, get, need, out};
use crate::tensor::{Dims, Meta, View, ViewMut};

pub(super) fn vjp(layer: &Recurrent, g: &mut GradBuilder) -> Result<Grads, OpError> {
    layer.differentiable()?;
    let dims = |i: usize| -> Result<Dims, OpError> { Ok(g.meta(g.x(i)?)?.dims.clone()) };
    let s = layer.sequence(&dims(0)?, &dims(1)?, &dims(2)?)?;
    let kind = layer.kind;
    let (r, lengths, states) = (Some(g.x(2)?), g.x_opt(4), [g.x_opt(5), g.x_opt(6)]);
    let [y, gates, kept, peepholes] = match kind {
        Kind::Plain => [Some(g.y(0)?), None, None, None],
        Kind::Gru { reset_after: false } => [Some(g.y(0)?), Some(g.y(2)?), None, None],
        Kind::Gru { reset_after: true } => [Some(g.y(0)?), Some(g.y(2)?), Some(g.y(3)?), None],
        Kind::Lstm { .. } => [None, Some(g.y(3)?), Some(g.y(4)?), g.x_opt(7)],
    };
    let h0 = if matches!(kind, Kind::Gru { .. }) { states[0] } else { None };
    let dc = if kind.states() == 2 { g.dy(2) } else { None };
    let inputs = [r, peepholes, lengths, h0, states[1], y, gates, kept, g.dy(0), g.dy(1), dc];
    let first_state = 1 + usize::from(kind.splits_gradient());
    let wanted = (5..5 + kind.states()).any(|i| g.wants(i));
    let outputs = first_state + if wanted { kind.states() } else { 0 };
    // Back through time: dZ and, where it differs, that of the recurrent part   (T · N, D · gates · H), dh₀, dc₀
    let made = g.emit_all(RecurrentGrad { layer: layer.clone(), sequence: s }, &inputs, outputs)?;
    let (dr, reset) = match kind {
        Kind::Gru { reset_after: true } => (Some(made[1]), None),
        Kind::Gru { reset_after: false } => (None, gates),
        _ => (None, None),
    };
    let mut grads = gradients(g, &s, made[0], dr, reset)?;
    for (i, dx) in (5..).zip(&made[first_state..]) {
        if g.wants(i) {
            grads[i] = Some(*dx);
        }
    }
    if peepholes.is_some() && g.wants(7) {
        // dP = Σ_t dZ_t ⊙ the cell state that the gate looked at   (D, 3 · H)
        let inputs = [Some(made[0]), kept, lengths, states[1]];
        grads[7] = Some(g.emit_all(PeepholeGrad { sequence: s }, &inputs, 1)?[0]);
    }
    Ok(grads)
}

/// Back through the steps: dZ (T · N, D · gates · H), of a GRU that resets after the product also that of the recurrent
/// part, dh₀, of an LSTM also dc₀.
///
/// Inputs R, P, sequence_lens, initial_h, initial_c, Y, the gates' values, what else is kept of each step, dY, dY_h, dY_c:
/// those that the kind of cell has and reads.
#[derive(Debug)]
pub struct RecurrentGrad {
    pub layer: Recurrent,
    pub sequence: Sequence,
}

impl Op for RecurrentGrad {
    fn name(&self) -> &'static str {
        match self.layer.kind {
            Kind::Plain => "RNNGrad",
            Kind::Gru { .. } => "GRUGrad",
            Kind::Lstm { .. } => "LSTMGrad",
        }
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (s, kind, dtype) = (&self.sequence, self.layer.kind, need(inputs, 0)?.dtype);
        let dz = Meta::new(dtype, &[s.rows(), s.directions * s.width()]);
        let mut made = vec![dz; 1 + usize::from(kind.splits_gradient())];
        made.resize(made.len() + kind.states(), Meta::new(dtype, &state_dims(s)));
        Ok(made)
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (s, kind, r) = (&self.sequence, self.layer.kind, need(x, 0)?);
        float_dispatch!(r.dtype, T => {
            let saved = Saved {
                lengths: lengths(s, get(x, 2))?,
                h0: optional(x, 3)?,
                c0: optional(x, 4)?,
                y: optional(x, 5)?,
                z: optional(x, 6)?,
                kept: optional(x, 7)?,
                dy: optional(x, 8)?,
                dh: optional(x, 9)?,
                dc: optional(x, 10)?,
            };
            let cell = self.layer.cell(r.get::<T>()?, None, optional(x, 1)?);
            let mut next = in_order(y);
            let missing = || OpError::Internal("an output has no buffer".into());
            let dz = next(true)?.ok_or_else(missing)?;
            let dr = match kind.splits_gradient() {
                true => Some(next(true)?.ok_or_else(missing)?),
                false => None,
            };
            let gradients = Gradients { dz, dr, dh0: next(true)?, dc0: next(true)? };
            kernel::backward(s, &cell, &saved, gradients, cx.room(kernel::backward_scratch::<T>(s, kind))?);
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let (s, kind) = (&self.sequence, self.layer.kind);
        let of = [kernel::backward_scratch::<f32>(s, kind), kernel::backward_scratch::<f64>(s, kind)];
        room(get(inputs, 0), of)
    }

    fn multiply_adds(&self, _: &[Option<&Meta>]) -> usize {
        let s = &self.sequence;
        s.rows() * s.directions * s.width() * s.hidden
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable(format!("second derivatives of {}", self.layer.name())))
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
                ..Saved::default()
            };
            kernel::peephole_grad(s, &saved, dz.get::<T>()?, out(y, 0)?.get()?);
            Ok(())
        })
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("second derivatives of LSTM".into()))
    }
}
