//! Recurrent layers: `LSTM`, `GRU`, `RNN`, forward and through time.
//!
//! A gradient is several nodes: one goes back through the steps and gives the gradients of the gates' arguments, dZ of
//! (rows, D · gates · H); those of X, W, R and B are products and sums of dZ, made only where they are wanted.

mod grad;
mod quantised;
#[cfg(test)]
mod tests;
mod weights;

use std::sync::Arc;

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::rnn::{self as kernel, Activation, Cell, Inputs, Kind, Outputs, Sequence};
use crate::kernels::simd::Vectors;
use crate::ops::{Cx, Grads, Op, Row, Spec, get, need};
use crate::tensor::{DType, Dims, Elem, Meta, View, ViewMut};

pub use grad::{PeepholeGrad, RecurrentGrad};
pub use quantised::DynamicQuantizeLstm;
pub use weights::RecurrentWeightGrad;

/// ONNX `LSTM`, `GRU` and `RNN` (opset 7; `layout` since 14): X, W, R, B, sequence_lens, initial_h, of an LSTM also
/// initial_c and P.
///
/// Outputs Y, Y_h, of an LSTM also Y_c; then, for the gradient of an LSTM and a GRU, the gates' values
/// (T · N, D · gates · H) and (T · N, D · H) the cell states, or what a GRU's reset gate multiplied.
#[derive(Debug, Clone)]
pub struct Recurrent {
    pub kind: Kind,
    /// Which directions go backwards; one entry a direction.
    reverse: &'static [bool],
    hidden: Option<usize>,
    clip: Option<f32>,
    /// Of each direction; a kind has the first ones.
    activations: [[Activation; 3]; 2],
    batch_first: bool,
}

impl Recurrent {
    fn make(s: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let kind = match s.op_type {
            "LSTM" => Kind::Lstm { coupled: s.attrs.flag("input_forget")? },
            "GRU" => Kind::Gru { reset_after: s.attrs.flag("linear_before_reset")? },
            _ => Kind::Plain,
        };
        Ok(Arc::new(Recurrent::of(s, kind)?))
    }

    /// A layer of a kind of cell, by the attributes that all have.
    fn of(s: &Spec, kind: Kind) -> Result<Recurrent, OpError> {
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
        let default: &[&str] = match kind {
            Kind::Plain => &["Tanh"],
            Kind::Gru { .. } => &["Sigmoid", "Tanh"],
            Kind::Lstm { .. } => &["Sigmoid", "Tanh", "Tanh"],
        };
        let (each, count) = (default.len(), default.len() * reverse.len());
        let names = s.attrs.strings("activations")?.filter(|names| !names.is_empty());
        let names = names.unwrap_or_else(|| (0..count).map(|i| default[i % each].to_string()).collect());
        if names.len() != count {
            return Err(OpError::Attribute(format!("'activations' are {names:?}, where {count} are needed")));
        }
        let mut alphas = s.attrs.floats("activation_alpha")?.unwrap_or_default().into_iter();
        let mut betas = s.attrs.floats("activation_beta")?.unwrap_or_default().into_iter();
        let mut activations = [[Activation::Tanh; 3]; 2];
        for (i, name) in names.iter().enumerate() {
            activations[i / each][i % each] = activation(name, &mut alphas, &mut betas)?;
        }
        Ok(Recurrent { kind, reverse, hidden, clip, activations, batch_first: layout == 1 })
    }

    fn differentiable(&self) -> Result<(), OpError> {
        let used = self.activations[..self.reverse.len()].iter().flatten();
        match used.copied().find(|a| !a.is_invertible()) {
            None => Ok(()),
            Some(a) => Err(OpError::NotDifferentiable(format!(
                "{} with the activation {a:?}: a derivative is computed from the value, which with such an alpha does \
                 not tell it",
                self.name()
            ))),
        }
    }

    /// The sizes for X, W and R of the given dimensions.
    fn sequence(&self, x: &[usize], w: &[usize], r: &[usize]) -> Result<Sequence, OpError> {
        let bad = || OpError::Shape(format!("{} of {x:?} with W of {w:?}, R of {r:?}", self.name()));
        let (&[first, second, input], &[_, _, hidden]) = (x, r) else { return Err(bad()) };
        let (d, gates) = (self.reverse.len(), self.kind.gates());
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

    /// As [`Recurrent::sequence`], of all operands, which are checked.
    fn check(&self, inputs: &[Option<&Meta>]) -> Result<Sequence, OpError> {
        let (x, w, r) = (need(inputs, 0)?, need(inputs, 1)?, need(inputs, 2)?);
        let s = self.sequence(&x.dims, &w.dims, &r.dims)?;
        let expect = |i: usize, what: &str, dims: &[usize], dtype: DType| match get(inputs, i) {
            Some(m) if m.dims.as_slice() != dims || m.dtype != dtype => Err(OpError::Shape(format!(
                "{what} of {} {:?} for {}, where {dtype} {dims:?} is needed",
                m.dtype,
                m.dims.as_slice(),
                self.name()
            ))),
            _ => Ok(()),
        };
        expect(1, "W", &w.dims, x.dtype)?;
        expect(2, "R", &r.dims, x.dtype)?;
        expect(3, "B", &[s.directions, 2 * s.width()], x.dtype)?;
        expect(4, "sequence_lens", &[s.batch], DType::I32)?;
        let states = self.kind.states();
        // A file made for a batch of one holds states for one row; they are then every row's.
        let one = state_dims(&Sequence { batch: 1, ..s });
        for i in
            (5..5 + states).filter(|i| get(inputs, *i).is_some_and(|m| m.dims != one || m.dtype != x.dtype))
        {
            expect(i, "an initial state", &state_dims(&s), x.dtype)?;
        }
        let operands = match self.kind {
            Kind::Lstm { .. } => 8,
            _ => 6,
        };
        if operands == 8 {
            expect(7, "P", &[s.directions, 3 * s.hidden], x.dtype)?;
        }
        match inputs.iter().skip(operands).flatten().next() {
            None => Ok(s),
            Some(_) => Err(OpError::Shape(format!("{} with {} operands", self.name(), inputs.len()))),
        }
    }

    fn cell<'a, T: Vectors>(
        &'a self,
        r: &'a [T],
        b: Option<&'a [T]>,
        peepholes: Option<&'a [T]>,
    ) -> Cell<'a, T> {
        let clip = self.clip.map(|c| T::of(f64::from(c)));
        Cell { kind: self.kind, activations: &self.activations, clip, r, b, peepholes }
    }
}

impl Op for Recurrent {
    fn name(&self) -> &'static str {
        match self.kind {
            Kind::Plain => "RNN",
            Kind::Gru { .. } => "GRU",
            Kind::Lstm { .. } => "LSTM",
        }
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let s = self.check(inputs)?;
        let dtype = need(inputs, 0)?.dtype;
        let mut made = vec![Meta::new(dtype, &output_dims(&s))];
        made.resize(1 + self.kind.states(), Meta::new(dtype, &state_dims(&s)));
        if self.kind != Kind::Plain {
            made.extend([s.width(), s.hidden].map(|w| Meta::new(dtype, &[s.rows(), s.directions * w])));
        }
        Ok(made)
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (input, w, r) = (need(x, 0)?, need(x, 1)?, need(x, 2)?);
        let s = self.sequence(input.dims, w.dims, r.dims)?;
        float_dispatch!(input.dtype, T => {
            let inputs = Inputs {
                x: input.get::<T>()?,
                w: w.get()?,
                lengths: lengths(&s, get(x, 4))?,
                h0: optional(x, 5)?,
                c0: optional(x, 6)?,
            };
            let cell = self.cell(r.get()?, optional(x, 3)?, optional(x, 7)?);
            let mut next = in_order(y);
            let outputs = Outputs {
                y: next(true)?,
                h: next(true)?,
                c: next(self.kind.states() == 2)?,
                z: next(true)?,
                kept: next(true)?,
            };
            kernel::forward(&s, &cell, &inputs, outputs, cx.room(kernel::forward_scratch::<T>(&s))?);
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let Ok(s) = self.check(inputs) else { return 0 };
        let of = [kernel::forward_scratch::<f32>(&s), kernel::forward_scratch::<f64>(&s)];
        room(get(inputs, 0), of)
    }

    fn multiply_adds(&self, inputs: &[Option<&Meta>]) -> usize {
        let s = self.check(inputs);
        s.map_or(0, |s| s.rows() * s.directions * s.width() * (s.input + s.hidden))
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        grad::vjp(self, g)
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
fn optional<'a, T: Elem>(x: &[Option<View<'a>>], i: usize) -> Result<Option<&'a [T]>, OpError> {
    get(x, i).map(|v| v.get::<T>()).transpose()
}

/// The elements of one output after the other, `None` where it is not wanted; `false`: there is none of this kind.
fn in_order<'a, T: Elem>(
    y: &'a mut [Option<ViewMut>],
) -> impl FnMut(bool) -> Result<Option<&'a mut [T]>, OpError> {
    let mut outputs = y.iter_mut();
    move |exists| match exists.then(|| outputs.next()) {
        Some(Some(Some(y))) => y.get::<T>().map(Some),
        _ => Ok(None),
    }
}

/// Bytes of scratch for an operand of either element type, given elements.
fn room(operand: Option<&Meta>, [single, double]: [usize; 2]) -> usize {
    match operand.map(|m| m.dtype) {
        Some(DType::F64) => double * size_of::<f64>(),
        _ => single * size_of::<f32>(),
    }
}

pub(super) const ROWS: &[Row] = &[
    Row::new("LSTM", 7, Recurrent::make),
    Row::new("GRU", 7, Recurrent::make),
    Row::new("RNN", 7, Recurrent::make),
    Row::contrib("DynamicQuantizeLSTM", DynamicQuantizeLstm::make),
];

#[cfg(test)]
pub(super) use tests::cases;
