//! Recurrent layers: `LSTM`, `GRU`, `RNN`, forward and through time.
//!
//! A gradient is several nodes: one goes back through the steps and gives the gradients of the gates' arguments, dZ of
//! (rows, D · gates · H); those of X, W, R and B are products and sums of dZ, made only where they are wanted.

mod gru;
mod lstm;
mod quantised;
mod simple;
#[cfg(test)]
mod tests;
mod weights;

use crate::error::OpError;
use crate::graph::GradBuilder;
use crate::kernels::rnn::{Activation, Sequence};
use crate::kernels::simd::Vectors;
use crate::ops::{Row, Spec, get, need};
use crate::tensor::{DType, Dims, Meta, View};

pub use gru::{Gru, GruGrad};
pub use lstm::{Lstm, LstmGrad, PeepholeGrad};
pub use quantised::DynamicQuantizeLstm;
pub use simple::{Rnn, RnnGrad};
pub use weights::RecurrentWeightGrad;

/// What all recurrent layers are configured by; `A` activations a direction.
#[derive(Debug, Clone)]
pub struct Config<const A: usize> {
    /// Which directions go backwards; one entry a direction.
    reverse: &'static [bool],
    hidden: Option<usize>,
    clip: Option<f32>,
    activations: [[Activation; A]; 2],
    batch_first: bool,
    op_type: &'static str,
}

impl<const A: usize> Config<A> {
    fn of(s: &Spec, op_type: &'static str, default: [&str; A]) -> Result<Self, OpError> {
        let reverse: &'static [bool] = match s.attrs.string("direction")?.as_deref() {
            None | Some("forward") => &[false],
            Some("reverse") => &[true],
            Some("bidirectional") => &[false, true],
            Some(other) => return Err(OpError::Attribute(format!("'direction' is {other}"))),
        };
        let hidden = match s.attrs.int("hidden_size")? {
            None => None,
            Some(h) if (1..=i64::from(i32::MAX)).contains(&h) => Some(h as usize),
            Some(h) => return Err(OpError::Attribute(format!("'hidden_size' is {h}"))),
        };
        let clip = match s.attrs.float("clip")? {
            Some(c) if c.is_nan() || c < 0.0 => return Err(OpError::Attribute(format!("'clip' is {c}"))),
            // 0 is what some exporters write for none.
            c => c.filter(|c| *c > 0.0),
        };
        let layout = s.attrs.int_or("layout", 0)?;
        if !(0..=1).contains(&layout) {
            return Err(OpError::Attribute(format!("'layout' is {layout}")));
        }
        let count = A * reverse.len();
        let names = s.attrs.strings("activations")?.filter(|names| !names.is_empty());
        let names = names.unwrap_or_else(|| (0..count).map(|i| default[i % A].to_string()).collect());
        if names.len() != count {
            return Err(OpError::Attribute(format!("'activations' are {names:?}, where {count} are needed")));
        }
        let mut alphas = s.attrs.floats("activation_alpha")?.unwrap_or_default().into_iter();
        let mut betas = s.attrs.floats("activation_beta")?.unwrap_or_default().into_iter();
        let mut activations = [[Activation::Tanh; A]; 2];
        for (i, name) in names.iter().enumerate() {
            activations[i / A][i % A] = activation(name, &mut alphas, &mut betas)?;
        }
        Ok(Config { reverse, hidden, clip, activations, batch_first: layout == 1, op_type })
    }

    fn differentiable(&self) -> Result<(), OpError> {
        let used = self.activations[..self.reverse.len()].iter().flatten();
        match used.copied().find(|a| !a.is_invertible()) {
            None => Ok(()),
            Some(a) => Err(OpError::NotDifferentiable(format!(
                "{} with the activation {a:?}: a derivative is computed from the value, which with such an alpha does \
                 not tell it",
                self.op_type
            ))),
        }
    }

    /// The sizes for X, W and R of the given dimensions and a cell of so many gates.
    fn sequence(&self, gates: usize, x: &[usize], w: &[usize], r: &[usize]) -> Result<Sequence, OpError> {
        let bad = || OpError::Shape(format!("{} of {x:?} with W of {w:?}, R of {r:?}", self.op_type));
        let (&[first, second, input], &[_, _, hidden]) = (x, r) else { return Err(bad()) };
        let d = self.reverse.len();
        if hidden == 0
            || self.hidden.is_some_and(|h| h != hidden)
            || w != [d, gates * hidden, input]
            || r != [d, gates * hidden, hidden]
        {
            return Err(bad());
        }
        let (steps, batch) = if self.batch_first { (second, first) } else { (first, second) };
        Ok(Sequence {
            steps,
            batch,
            input,
            hidden,
            gates,
            directions: d,
            reverse: [self.reverse[0], self.reverse[d - 1]],
            batch_first: self.batch_first,
        })
    }

    /// As [`Config::sequence`], for operands X, W, R, B, sequence lengths, and initial states from input 5 on, which are
    /// checked.
    fn check(&self, gates: usize, states: usize, inputs: &[Option<&Meta>]) -> Result<Sequence, OpError> {
        let (x, w, r) = (need(inputs, 0)?, need(inputs, 1)?, need(inputs, 2)?);
        let s = self.sequence(gates, &x.dims, &w.dims, &r.dims)?;
        let expect = |i: usize, what: &str, dims: &[usize], dtype: DType| match get(inputs, i) {
            Some(m) if m.dims.as_slice() != dims || m.dtype != dtype => Err(OpError::Shape(format!(
                "{} of {} {:?} for {}, where {dtype} {dims:?} is needed",
                what,
                m.dtype,
                m.dims.as_slice(),
                self.op_type
            ))),
            _ => Ok(()),
        };
        expect(1, "W", &w.dims, x.dtype)?;
        expect(2, "R", &r.dims, x.dtype)?;
        expect(3, "B", &[s.directions, 2 * s.width()], x.dtype)?;
        expect(4, "sequence_lens", &[s.batch], DType::I32)?;
        // A file made for a batch of one holds states for one row; they are then every row's.
        let one = state_dims(&Sequence { batch: 1, ..s });
        for i in
            (5..5 + states).filter(|i| get(inputs, *i).is_some_and(|m| m.dims != one || m.dtype != x.dtype))
        {
            expect(i, "an initial state", &state_dims(&s), x.dtype)?;
        }
        Ok(s)
    }
}

fn activation(
    name: &str,
    alphas: &mut impl Iterator<Item = f32>,
    betas: &mut impl Iterator<Item = f32>,
) -> Result<Activation, OpError> {
    let mut alpha = |default: f32| alphas.next().unwrap_or(default);
    let mut beta = |default: f32| betas.next().unwrap_or(default);
    Ok(match name.to_ascii_lowercase().as_str() {
        "relu" => Activation::Relu,
        "tanh" => Activation::Tanh,
        "sigmoid" => Activation::Sigmoid,
        "softsign" => Activation::Softsign,
        "softplus" => Activation::Softplus,
        "affine" => Activation::Affine { alpha: alpha(1.0), beta: beta(0.0) },
        "leakyrelu" => Activation::LeakyRelu { alpha: alpha(0.01) },
        "thresholdedrelu" => Activation::ThresholdedRelu { alpha: alpha(1.0) },
        "scaledtanh" => Activation::ScaledTanh { alpha: alpha(1.0), beta: beta(1.0) },
        "hardsigmoid" => Activation::HardSigmoid { alpha: alpha(0.2), beta: beta(0.5) },
        "elu" => Activation::Elu { alpha: alpha(1.0) },
        _ => {
            return Err(OpError::Attribute(format!(
                "'activations' names {name} (known: Affine, Elu, HardSigmoid, LeakyRelu, Relu, ScaledTanh, Sigmoid, \
                 Softplus, Softsign, Tanh, ThresholdedRelu)"
            )));
        }
    })
}

/// Of an initial or last state.
fn state_dims(s: &Sequence) -> Dims {
    match s.batch_first {
        true => Dims::from_slice(&[s.batch, s.directions, s.hidden]),
        false => Dims::from_slice(&[s.directions, s.batch, s.hidden]),
    }
}

/// Of Y.
fn output_dims(s: &Sequence) -> Dims {
    match s.batch_first {
        true => Dims::from_slice(&[s.batch, s.steps, s.directions, s.hidden]),
        false => Dims::from_slice(&[s.steps, s.directions, s.batch, s.hidden]),
    }
}

/// The lengths of the sequences, each within the number of steps.
fn lengths<'a>(s: &Sequence, operand: Option<View<'a>>) -> Result<Option<&'a [i32]>, OpError> {
    let Some(operand) = operand else { return Ok(None) };
    let lengths = operand.get::<i32>()?;
    match lengths.iter().find(|l| usize::try_from(**l).map_or(true, |l| l > s.steps)) {
        None => Ok(Some(lengths)),
        Some(l) => Err(OpError::Shape(format!("a sequence length of {l} among {} steps", s.steps))),
    }
}

/// The elements of an optional operand.
fn optional<'a, T: Vectors>(x: &[Option<View<'a>>], i: usize) -> Result<Option<&'a [T]>, OpError> {
    get(x, i).map(|v| v.get::<T>()).transpose()
}

/// Bytes of scratch, by a kernel's function for either element type.
fn room(s: &Sequence, dtype: DType, [single, double]: [fn(&Sequence) -> usize; 2]) -> usize {
    match dtype {
        DType::F64 => double(s) * size_of::<f64>(),
        _ => single(s) * size_of::<f32>(),
    }
}

/// The sizes at a node that is differentiated.
fn sequence_at<const A: usize>(
    config: &Config<A>,
    gates: usize,
    g: &GradBuilder,
) -> Result<Sequence, OpError> {
    let dims = |i: usize| -> Result<Dims, OpError> { Ok(g.meta(g.x(i)?)?.dims.clone()) };
    config.sequence(gates, &dims(0)?, &dims(1)?, &dims(2)?)
}

pub(super) const ROWS: &[Row] = &[
    Row::new("LSTM", 7, Lstm::make),
    Row::new("GRU", 7, Gru::make),
    Row::new("RNN", 7, Rnn::make),
    Row::contrib("DynamicQuantizeLSTM", DynamicQuantizeLstm::make),
];

#[cfg(test)]
pub(super) use tests::cases;
