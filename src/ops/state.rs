//! Operators that carry state from call to call through their operands: TensorScatter, CausalConvWithState,
//! LinearAttention.

use std::sync::Arc;

use crate::error::OpError;
use crate::graph::{Lowering, ValueId};
use crate::ops::binary::{Binary, Sub};
use crate::ops::composite::{Made, Recipe, composite, defined};
use crate::ops::expand::Expand;
use crate::ops::matmul::MatMul;
use crate::ops::unary::{Exp, Swish, Unary};
use crate::ops::{Attr, Attrs, Op, Row, Spec};
use crate::tensor::{Dims, Tensor, axis};

/// ONNX `TensorScatter` (opset 24): a cache with an update written along `axis`, for each sample from its own index
/// on; `circular`: beyond the end it goes on at the start.
fn tensor_scatter(a: &Attrs, l: &mut Lowering) -> Made {
    let (cache, update) = (l.x(0)?, l.x(1)?);
    let (dims, new) = (l.dims(cache)?, l.dims(update)?);
    let at = axis(a.int_or("axis", -2)?, dims.len())?;
    if at == 0 || new.len() != dims.len() {
        return Err(OpError::Shape(format!("an update {:?} of {:?} along axis {at}", &new[..], &dims[..])));
    }
    let mut shape = vec![1; dims.len()];
    shape[at] = new[at];
    let steps: Vec<i64> = (0..new[at] as i64).collect();
    let mut index = l.constant(Tensor::from_slice(&shape, &steps)?);
    if let Some(start) = l.x_opt(2) {
        shape[at] = 1;
        shape[0] = l.meta(start)?.len();
        let start = l.reshape(start, &shape)?;
        index = l.add(index, start)?;
    }
    match a.string("mode")?.as_deref() {
        None | Some("linear") => {}
        Some("circular") => {
            let size = l.constant(Tensor::scalar(dims[at] as i64));
            index = l.emit(Binary::Mod { fmod: false }, &[index, size])?;
        }
        Some(other) => return Err(OpError::Attribute(format!("'mode' is '{other}'"))),
    }
    let index = l.emit(Expand { to: Some(Dims::from_slice(&new)) }, &[index])?;
    let attrs = Attrs([("axis".to_string(), Attr::Int(at as i64))].into());
    let y = l.standard("ScatterElements", 18, &attrs, &[Some(cache), Some(index), Some(update)])?;
    Ok(vec![Some(y)])
}

/// ONNX `CausalConvWithState` (opset 27): a depthwise convolution over X (N, C, L) that sees the past alone, `past`
/// (N, C, k − 1) before it (zeros if absent); Y and the last k − 1 positions.
fn causal_conv(a: &Attrs, l: &mut Lowering) -> Made {
    let (x, w) = (l.x(0)?, l.x(1)?);
    let (&[n, c, _], &[_, _, k]) = (&*l.dims(x)?, &*l.dims(w)?) else {
        return Err(OpError::Shape("CausalConvWithState takes (N, C, L) and weights (C, 1, k)".into()));
    };
    let before = k.checked_sub(1).ok_or_else(|| OpError::Shape("a kernel of 0".into()))?;
    let padded = match l.x_opt(3) {
        Some(past) => l.concat(&[past, x], 2)?,
        None if before == 0 => x,
        None => {
            let zeros = Tensor::zeros(l.dtype(x)?, &[n, c, before]);
            let zeros = l.constant(zeros);
            l.concat(&[zeros, x], 2)?
        }
    };
    let attrs = Attrs([("group".to_string(), Attr::Int(c as i64))].into());
    let mut y = l.standard("Conv", 11, &attrs, &[Some(padded), Some(w), l.x_opt(2)])?;
    match a.string("activation")?.as_deref() {
        None | Some("none") => {}
        Some("silu" | "swish") => y = l.emit(Unary(Swish { alpha: 1.0 }), &[y])?,
        Some(other) => return Err(OpError::Attribute(format!("'activation' is '{other}'"))),
    }
    let len = l.dims(padded)?[2];
    let state = l.crop(padded, 2, len - before, before)?;
    Ok(vec![Some(y), Some(state)])
}

/// Positions that a recurrence is unrolled over.
const LONGEST: usize = 2048;

/// ONNX `LinearAttention` (opset 27): a recurrence over positions of a state (N, H', Dk, Dv) that keys and values are
/// added to, with a decay and a correction as `update_rule` says, and that queries read.
#[derive(Debug)]
struct LinearAttention {
    decays: bool,
    corrects: bool,
    heads: [usize; 2],
    scale: f32,
}

impl LinearAttention {
    fn make(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let a = spec.attrs;
        let heads = |name: &str| {
            let n = a.int(name)?.and_then(|n| usize::try_from(n).ok()).filter(|&n| n > 0);
            n.ok_or_else(|| OpError::Attribute(format!("'{name}' is missing or not positive")))
        };
        let (decays, corrects) = match a.string("update_rule")?.as_deref() {
            Some("linear") => (false, false),
            Some("gated") => (true, false),
            Some("delta") => (false, true),
            None | Some("gated_delta") => (true, true),
            Some(other) => return Err(OpError::Attribute(format!("'update_rule' is '{other}'"))),
        };
        let heads = [heads("q_num_heads")?, heads("kv_num_heads")?];
        if heads[0] % heads[1] != 0 {
            return Err(OpError::Attribute(format!(
                "{} heads of queries for {} of keys",
                heads[0], heads[1]
            )));
        }
        composite(LinearAttention { decays, corrects, heads, scale: a.float_or("scale", 0.0)? })
    }
}

/// (N, T, H·D) as (N, H, T, D).
fn heads_first(l: &mut Lowering, v: ValueId, heads: usize) -> Result<ValueId, OpError> {
    match *l.dims(v)? {
        [n, t, width] if width % heads == 0 => {
            let v = l.reshape(v, &[n, t, heads, width / heads])?;
            l.transpose(v, &[0, 2, 1, 3])
        }
        ref other => Err(OpError::Shape(format!("{other:?} for {heads} heads"))),
    }
}

impl Recipe for LinearAttention {
    fn name(&self) -> &'static str {
        "LinearAttention"
    }

    fn outputs(&self) -> usize {
        2
    }

    fn lower(&self, l: &mut Lowering) -> Made {
        let [hq, hk] = self.heads;
        let (q, k, v) = (l.x(0)?, l.x(1)?, l.x(2)?);
        let (q, k, v) = (heads_first(l, q, hq)?, heads_first(l, k, hk)?, heads_first(l, v, hk)?);
        let (&[n, _, t, dk], &[.., dv]) = (&*l.dims(q)?, &*l.dims(v)?) else {
            return Err(OpError::Shape("queries of rank 3 are needed".into()));
        };
        if t > LONGEST {
            return Err(OpError::Unsupported(format!("a recurrence over {t} positions ({LONGEST} at most)")));
        }
        if l.x_opt(4).is_some() != self.decays || l.x_opt(5).is_some() != self.corrects {
            return Err(OpError::Shape("decay and beta do not fit the update rule".into()));
        }
        // (N, H' or 1, T, 1 or Dk)
        let decay = match l.x_opt(4) {
            Some(g) => {
                let g = heads_first(l, g, hk)?;
                Some(l.emit(Unary(Exp {}), &[g])?)
            }
            None => None,
        };
        let beta = match l.x_opt(5) {
            Some(b) => {
                let width = l.dims(b)?.last().copied().unwrap_or(0);
                Some(heads_first(l, b, if width == 1 { 1 } else { hk })?)
            }
            None => None,
        };
        let mut state = match l.x_opt(3) {
            Some(s) => s,
            None => {
                let zeros = Tensor::zeros(l.dtype(q)?, &[n, hk, dk, dv]);
                l.constant(zeros)
            }
        };
        let scale = if self.scale == 0.0 { 1.0 / (dk as f32).sqrt() } else { self.scale };
        let mut outputs = Vec::with_capacity(t);
        for i in 0..t {
            let (key, mut value) = (l.crop(k, 2, i, 1)?, l.crop(v, 2, i, 1)?);
            if let Some(decay) = decay {
                // (N, H', 1, Dk or 1) as (N, H', Dk or 1, 1)
                let now = l.crop(decay, 2, i, 1)?;
                let now = l.transpose(now, &[0, 1, 3, 2])?;
                state = l.mul(state, now)?;
            }
            if let Some(beta) = beta {
                // β (v − kᵀS)
                let known = l.emit(MatMul::default(), &[key, state])?;
                let rest = l.emit(Sub, &[value, known])?;
                let now = l.crop(beta, 2, i, 1)?;
                value = l.mul(rest, now)?;
            }
            let column = l.transpose(key, &[0, 1, 3, 2])?;
            let new = l.mul(column, value)?;
            state = l.add(state, new)?;
            let query = l.crop(q, 2, i, 1)?;
            let query = l.reshape(query, &[n, hk, hq / hk, dk])?;
            let read = l.emit(MatMul::scaled(scale), &[query, state])?;
            outputs.push(l.reshape(read, &[n, 1, hq * dv])?);
        }
        let y = match outputs.is_empty() {
            true => {
                let none = Tensor::zeros(l.dtype(q)?, &[n, 0, hq * dv]);
                l.constant(none)
            }
            false => l.concat(&outputs, 1)?,
        };
        Ok(vec![Some(y), Some(state)])
    }
}

pub(super) const ROWS: &[Row] = &[
    Row::new("CausalConvWithState", 27, |s| defined(s, "CausalConvWithState", 2, causal_conv)),
    Row::new("LinearAttention", 27, LinearAttention::make),
    Row::new("TensorScatter", 24, |s| defined(s, "TensorScatter", 1, tensor_scatter)),
];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    let scatter = |mode: &str| {
        Case::new("TensorScatter", 24)
            .named(mode)
            .string("mode", mode)
            .input(&[2, 3, 4, 2])
            .input(&[2, 3, 2, 2])
            .fixed(Tensor::ints(&[1, if mode == "linear" { 2 } else { 3 }]))
    };
    let attention = |rule: &str| {
        Case::new("LinearAttention", 27)
            .named(rule)
            .string("update_rule", rule)
            .int("q_num_heads", 4)
            .int("kv_num_heads", 2)
            .input(&[2, 3, 12])
            .input(&[2, 3, 6])
            .input(&[2, 3, 4])
            .outputs(2)
    };
    vec![
        scatter("linear"),
        scatter("circular"),
        Case::new("TensorScatter", 24).named("from the start").input(&[2, 4, 3]).input(&[2, 2, 3]),
        Case::new("CausalConvWithState", 27).input(&[2, 3, 5]).input(&[3, 1, 4]).outputs(2),
        Case::new("CausalConvWithState", 27)
            .named("everything")
            .string("activation", "silu")
            .input(&[2, 3, 5])
            .input(&[3, 1, 3])
            .input(&[3])
            .input(&[2, 3, 2])
            .outputs(2),
        attention("linear").input(&[2, 2, 3, 2]),
        attention("gated").absent().input(&[2, 3, 2]),
        attention("delta").absent().absent().input(&[2, 3, 1]),
        attention("gated_delta").input(&[2, 2, 3, 2]).input(&[2, 3, 6]).input(&[2, 3, 2]),
    ]
}
