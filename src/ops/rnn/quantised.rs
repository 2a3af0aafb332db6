//! onnxruntime's `DynamicQuantizeLSTM`: an LSTM of integer weights whose operands are rounded to levels as they come.

use std::sync::Arc;

use crate::error::OpError;
use crate::graph::GradBuilder;
use crate::kernels::quant::{dynamic, turned};
use crate::kernels::rnn::{Cell, Inputs, Outputs, Sequence, forward, forward_scratch};
use crate::ops::rnn::{Kind, Recurrent, in_order, lengths, optional};
use crate::ops::{Cx, Grads, Op, Spec, get, need};
use crate::tensor::{DType, Meta, View, ViewMut};

/// com.microsoft `DynamicQuantizeLSTM`: X, W (D, input, 4 · H) and R (D, H, 4 · H) of 8 bits, B, sequence_lens, initial_h,
/// initial_c, P, then W's scale and zero point and R's, of each direction (D) or of each of its columns (D, 4 · H).
///
/// X as a whole, and at each step the states of the sequences that go on (or have just ended), are rounded to the 256 levels that span their
/// elements and 0. The reverse direction begins every sequence at its own end in the same step. Forward only.
#[derive(Debug)]
pub struct DynamicQuantizeLstm {
    layer: Recurrent,
}

/// Slots of the weights, with those of their scale and zero point.
const WEIGHTS: [[usize; 3]; 2] = [[1, 8, 9], [2, 10, 11]];

impl DynamicQuantizeLstm {
    pub(super) fn make(s: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let layer = Recurrent::of(s, Kind::Lstm { coupled: s.attrs.flag("input_forget")? })?;
        if layer.batch_first {
            return Err(OpError::Attribute("'layout' is none of DynamicQuantizeLSTM's".into()));
        }
        Ok(Arc::new(DynamicQuantizeLstm { layer }))
    }

    fn sequence(&self, x: &[usize], w: &[usize], r: &[usize]) -> Result<Sequence, OpError> {
        let turned = |d: &[usize]| match *d {
            [a, b, c] => Ok([a, c, b]),
            _ => Err(OpError::Shape(format!("weights of {d:?} for DynamicQuantizeLSTM"))),
        };
        self.layer.sequence(x, &turned(w)?, &turned(r)?)
    }

    /// As operands of a floating-point LSTM, with those that are checked here.
    fn check(&self, inputs: &[Option<&Meta>]) -> Result<Sequence, OpError> {
        let x = need(inputs, 0)?;
        if x.dtype != DType::F32 {
            return Err(OpError::Type(format!("DynamicQuantizeLSTM of {}", x.dtype)));
        }
        let s = self.sequence(&x.dims, &need(inputs, 1)?.dims, &need(inputs, 2)?.dims)?;
        for [slot, scale, zero] in WEIGHTS {
            let (w, scale, zero) = (need(inputs, slot)?, need(inputs, scale)?, get(inputs, zero));
            if !matches!(w.dtype, DType::I8 | DType::U8) || scale.dtype != DType::F32 {
                return Err(OpError::Type(format!("weights of {} with scales of {}", w.dtype, scale.dtype)));
            }
            let fits =
                scale.dims.as_slice() == [s.directions] || scale.dims.as_slice() == [s.directions, s.width()];
            if !fits || zero.is_some_and(|z| z.dims != scale.dims || z.dtype != w.dtype) {
                return Err(OpError::Shape(format!(
                    "scales of {:?} for DynamicQuantizeLSTM of {} directions and {} units, and zero points of the weights' \
                     type and the scales' shape, or none",
                    scale.dims.as_slice(),
                    s.directions,
                    s.hidden
                )));
            }
        }
        let w = Meta::new(DType::F32, &[s.directions, s.width(), s.input]);
        let r = Meta::new(DType::F32, &[s.directions, s.width(), s.hidden]);
        let mut floats: Vec<Option<&Meta>> = inputs.iter().copied().take(8).collect();
        (floats[1], floats[2]) = (Some(&w), Some(&r));
        self.layer.check(&floats)?;
        Ok(s)
    }
}

/// One step of one direction.
fn step(s: &Sequence) -> Sequence {
    Sequence { steps: 1, directions: 1, reverse: [false; 2], ..*s }
}

/// Elements of scratch: W and R as floats, X rounded, a step's rows of it, the state rounded, the states before and after
/// a step.
fn parts(s: &Sequence) -> [usize; 9] {
    let state = s.batch * s.hidden;
    let weights = s.directions * s.width();
    let kernel = forward_scratch::<f32>(&step(s));
    let x = s.batch * s.input;
    [weights * s.input, weights * s.hidden, s.rows() * s.input, x, state, state, state, state, state + kernel]
}

/// The weights of a slot as floats (D, 4 · H, n).
fn floats(
    x: &[Option<View>],
    [slot, scale, zero]: [usize; 3],
    s: &Sequence,
    n: usize,
    to: &mut [f32],
) -> Result<(), OpError> {
    let (w, scale) = (need(x, slot)?, need(x, scale)?.get::<f32>()?);
    let each = s.width() * n;
    let one = scale.len() == s.directions;
    for d in 0..s.directions {
        let at = if one { d..d + 1 } else { d * s.width()..(d + 1) * s.width() };
        let to = &mut to[d * each..][..each];
        let zero = get(x, zero);
        match w.dtype {
            DType::I8 => {
                let zero = zero.map(|z| z.get::<i8>()).transpose()?.map(|z| &z[at.clone()]);
                turned(&w.get::<i8>()?[d * each..][..each], &scale[at], zero, n, to);
            }
            _ => {
                let zero = zero.map(|z| z.get::<u8>()).transpose()?.map(|z| &z[at.clone()]);
                turned(&w.get::<u8>()?[d * each..][..each], &scale[at], zero, n, to);
            }
        }
    }
    Ok(())
}

impl Op for DynamicQuantizeLstm {
    fn name(&self) -> &'static str {
        "DynamicQuantizeLSTM"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let s = self.check(inputs)?;
        let state = Meta::new(DType::F32, &super::state_dims(&s));
        Ok(vec![Meta::new(DType::F32, &super::output_dims(&s)), state.clone(), state])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let input = need(x, 0)?;
        let s = self.sequence(input.dims, need(x, 1)?.dims, need(x, 2)?.dims)?;
        let (input, b, lengths) = (input.get::<f32>()?, optional::<f32>(x, 3)?, lengths(&s, get(x, 4))?);
        let (h0, c0, p) = (optional::<f32>(x, 5)?, optional::<f32>(x, 6)?, optional::<f32>(x, 7)?);
        let sizes = parts(&s);
        let mut rest = cx.room::<f32>(sizes.iter().sum())?;
        let [w, r, levels, now, h, c, rounded, h_next, c_next] = sizes.map(|n| {
            let (part, after) = std::mem::take(&mut rest).split_at_mut(n);
            rest = after;
            part
        });
        let (c_next, room) = c_next.split_at_mut(s.batch * s.hidden);
        floats(x, WEIGHTS[0], &s, s.input, w)?;
        floats(x, WEIGHTS[1], &s, s.hidden, r)?;
        dynamic(input, levels);
        let mut next = in_order::<f32>(y);
        let [mut all, mut last_h, mut last_c] = [next(true)?, next(true)?, next(true)?];
        let (one, state, width) = (step(&s), s.batch * s.hidden, s.width());
        // A state for one row is every row's.
        let begin = |from: Option<&[f32]>, d: usize, to: &mut [f32]| match from {
            None => to.fill(0.0),
            Some(from) if from.len() == s.directions * state => {
                to.copy_from_slice(&from[d * state..][..state])
            }
            Some(from) => {
                let row = &from[d * s.hidden..][..s.hidden];
                to.chunks_exact_mut(s.hidden).for_each(|to| to.copy_from_slice(row));
            }
        };
        if let Some(y) = &mut all {
            y.fill(0.0);
        }
        for d in 0..s.directions {
            begin(h0, d, h);
            begin(c0, d, c);
            for (last, from) in [(&mut last_h, &*h), (&mut last_c, &*c)] {
                if let Some(last) = last {
                    last[d * state..][..state].copy_from_slice(from);
                }
            }
            let activations = [self.layer.activations[d]; 2];
            let cell = Cell {
                kind: self.layer.kind,
                activations: &activations,
                clip: self.layer.clip,
                peepholes: p.map(|p| &p[d * 3 * s.hidden..][..3 * s.hidden]),
                r: &r[d * width * s.hidden..][..width * s.hidden],
                b: b.map(|b| &b[d * 2 * width..][..2 * width]),
            };
            let length = |n: usize| lengths.map_or(s.steps, |l| l[n] as usize);
            for i in 0..s.steps {
                // Where each sequence is in this step.
                let place = |n: usize| if s.reverse[d] { length(n) - 1 - i } else { i };
                for n in 0..s.batch {
                    let row = &mut now[n * s.input..(n + 1) * s.input];
                    match i < length(n) {
                        true => row.copy_from_slice(&levels[(place(n) * s.batch + n) * s.input..][..s.input]),
                        false => row.fill(0.0),
                    }
                }
                dynamic(h, rounded);
                let inputs = Inputs {
                    x: &*now,
                    w: &w[d * width * s.input..][..width * s.input],
                    lengths: None,
                    h0: Some(&*rounded),
                    c0: Some(&*c),
                };
                let outputs =
                    Outputs { y: None, h: Some(&mut *h_next), c: Some(&mut *c_next), z: None, kept: None };
                forward(&one, &cell, &inputs, outputs, room);
                h.copy_from_slice(h_next);
                c.copy_from_slice(c_next);
                for n in 0..s.batch {
                    let row = n * s.hidden..(n + 1) * s.hidden;
                    if i >= length(n) {
                        // Its last state has counted once more, as there.
                        h[row].fill(0.0);
                        continue;
                    }
                    if let Some(y) = &mut all {
                        let at = ((place(n) * s.directions + d) * s.batch + n) * s.hidden;
                        y[at..at + s.hidden].copy_from_slice(&h[row.clone()]);
                    }
                    for (last, from) in [(&mut last_h, &*h), (&mut last_c, &*c)] {
                        if let Some(last) = last {
                            last[d * state..][row.clone()].copy_from_slice(&from[row.clone()]);
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        self.check(inputs).map_or(0, |s| parts(&s).iter().sum::<usize>() * size_of::<f32>())
    }

    fn multiply_adds(&self, inputs: &[Option<&Meta>]) -> usize {
        self.check(inputs).map_or(0, |s| s.rows() * s.directions * s.width() * (s.input + s.hidden))
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable(
            "its weights are integers, and its operands are rounded by ranges that each run measures: quantise after \
             training, or with QuantizeLinear and DequantizeLinear"
                .into(),
        ))
    }

    fn remark(&self) -> Option<String> {
        Some("weights are integers: it runs forward, and no gradient passes".into())
    }
}
