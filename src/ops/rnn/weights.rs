//! Gradients of weights, biases and inputs of recurrent layers from those of the gates' arguments.

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::{GradBuilder, ValueId};
use crate::kernels::norm::Channels;
use crate::kernels::rnn::{self as kernel, Saved, Sequence};
use crate::ops::batch_norm::ChannelSum;
use crate::ops::join::Concat;
use crate::ops::matmul::Gemm;
use crate::ops::rnn::{lengths, optional, room};
use crate::ops::view::ReshapeTo;
use crate::ops::{Cx, Grads, Op, get, need, out};
use crate::tensor::{Dims, Meta, View, ViewMut};

/// Gradients of X, W, R and B at a recurrent node, where they are wanted, from those of the gates' arguments, `dz`
/// (rows, D · gates · H), or those of their recurrent part, `dr`, where they differ. `reset`: the gates' values, where
/// the last gate read a reset state.
pub(super) fn gradients(
    g: &mut GradBuilder,
    s: &Sequence,
    dz: ValueId,
    dr: Option<ValueId>,
    reset: Option<ValueId>,
) -> Result<Grads, OpError> {
    let mut grads = Grads::from_elem(None, g.inputs());
    let (x, w) = (g.x(0)?, g.x(1)?);
    let (x_dims, w_dims) = (g.meta(x)?.dims.clone(), g.meta(w)?.dims.clone());
    let (rows, columns) = (s.rows(), s.directions * s.width());
    let reshape = |g: &mut GradBuilder, v: ValueId, dims: &[usize]| {
        g.emit(ReshapeTo { dims: Dims::from_slice(dims) }, &[v])
    };
    let product = |trans_a| Gemm { alpha: 1.0, beta: 0.0, trans_a, trans_b: false, pairs: false };
    if g.wants(0) {
        // dX = dZ·W   (rows, input)
        let w = reshape(g, w, &[columns, s.input])?;
        let dx = g.emit(product(false), &[dz, w])?;
        grads[0] = Some(reshape(g, dx, &x_dims)?);
    }
    if g.wants(1) {
        // dW = dZᵀ·X   (D · gates · H, input)
        let x = reshape(g, x, &[rows, s.input])?;
        let dw = g.emit(product(true), &[dz, x])?;
        grads[1] = Some(reshape(g, dw, &w_dims)?);
    }
    let recurrent = dr.unwrap_or(dz);
    if g.wants(2) {
        // dR = Σ_t dZ_tᵀ·h_{t−1}   (D, gates · H, H)
        let y = g.y(0)?;
        let op = RecurrentWeightGrad { sequence: *s, reset: reset.is_some() };
        let inputs = [Some(recurrent), Some(y), g.x_opt(4), g.x_opt(5), reset];
        grads[2] = Some(g.emit_all(op, &inputs, 1)?[0]);
    }
    if g.wants(3) {
        // dB = Σ dZ over rows, of the input's and of the recurrent part   (D, 2 · gates · H)
        let channels = Channels { n: rows, c: columns, s: 1 };
        let sum = |g: &mut GradBuilder, of: ValueId| {
            let sum = g.emit(ChannelSum { channels }, &[of])?;
            reshape(g, sum, &[s.directions, s.width()])
        };
        let input = sum(g, dz)?;
        let other = if recurrent == dz { input } else { sum(g, recurrent)? };
        grads[3] = Some(g.emit(Concat { axis: 1 }, &[input, other])?);
    }
    Ok(grads)
}

/// `dR` (D, gates · H, H) from dZ, Y, sequence lengths, the initial state and, with `reset`, the gates' values: all but
/// the first two are optional.
#[derive(Debug)]
pub struct RecurrentWeightGrad {
    pub sequence: Sequence,
    pub reset: bool,
}

impl Op for RecurrentWeightGrad {
    fn name(&self) -> &'static str {
        "RecurrentWeightGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let s = &self.sequence;
        Ok(vec![Meta::new(need(inputs, 0)?.dtype, &[s.directions, s.width(), s.hidden])])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let s = &self.sequence;
        let dz = need(x, 0)?;
        float_dispatch!(dz.dtype, T => {
            let saved = Saved {
                lengths: lengths(s, get(x, 2))?,
                h0: optional(x, 3)?,
                y: optional(x, 1)?,
                z: optional(x, 4)?,
                ..Saved::default()
            };
            let dr = out(y, 0)?.get::<T>()?;
            let scratch = cx.room(kernel::recurrent_weights_scratch::<T>(s))?;
            kernel::recurrent_weights(s, &saved, dz.get::<T>()?, self.reset, dr, scratch);
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let s = &self.sequence;
        let of = [kernel::recurrent_weights_scratch::<f32>(s), kernel::recurrent_weights_scratch::<f64>(s)];
        room(get(inputs, 0), of)
    }

    fn multiply_adds(&self, _: &[Option<&Meta>]) -> usize {
        let s = &self.sequence;
        s.rows() * s.directions * s.width() * s.hidden
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("second derivatives of recurrent layers".into()))
    }
}
