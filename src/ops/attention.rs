//! Attention as nodes of matrix products and a softmax, and as one operator; rotary position embedding.

mod fused;
mod rotary;

use std::sync::Arc;

use crate::error::OpError;
use crate::graph::{Lowering, ValueId};
use crate::ops::cast::CastTo;
use crate::ops::composite::{Made, Recipe, composite};
use crate::ops::logic::{Logic, Where};
use crate::ops::matmul::MatMul;
use crate::ops::reduce::{Kind, Reduce};
use crate::ops::softmax::Softmax;
use crate::ops::unary::{Tanh, Unary};
use crate::ops::{Op, Row, Spec};
use crate::tensor::{DType, Tensor};

pub use fused::FusedAttention;
#[cfg(test)]
pub(super) use fused::FusedAttentionGrad;

/// ONNX `Attention` (opsets 23 to 25): `softmax(scale·Q·Kᵀ + bias)·V` for each head.
///
/// Inputs: Q (B, H, Sq, D), K (B, H', Sk, D), V (B, H', Sk, Dv), each with its heads in the last axis where it has
/// rank 3; a mask that broadcasts to (B, H, Sq, T), bool or added; past keys and values (B, H', P, D); the number of
/// keys that count, (B). H' divides H, T = P + Sk. Outputs: Y, present keys and values, and the scores of a stage.
#[derive(Debug, Clone)]
pub struct Attention {
    causal: bool,
    scale: Option<f32>,
    softcap: f32,
    /// Of queries, and of keys and values: for operands of rank 3.
    heads: [Option<i64>; 2],
    /// Which scores output 3 holds: products, after the cap, with the bias, or probabilities.
    stage: i64,
    /// Keys to the left and right of a query that count.
    window: [Option<i64>; 2],
    double: bool,
}

impl Attention {
    fn make(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let a = spec.attrs;
        let side = |name: &str| match a.int_or(name, -1)? {
            -1 => Ok(None),
            n if n >= 0 => Ok(Some(n)),
            n => Err(OpError::Attribute(format!("'{name}' is {n}"))),
        };
        let stage = a.int_or("qk_matmul_output_mode", 0)?;
        if !(0..=3).contains(&stage) {
            return Err(OpError::Attribute(format!("'qk_matmul_output_mode' is {stage}")));
        }
        composite(Attention {
            causal: a.flag("is_causal")?,
            scale: a.float("scale")?,
            softcap: a.float_or("softcap", 0.0)?,
            heads: [a.int("q_num_heads")?, a.int("kv_num_heads")?],
            stage,
            window: [side("left_window_size")?, side("right_window_size")?],
            double: a.int("softmax_precision")? == Some(DType::F64.to_onnx() as i64),
        })
    }

    /// An operand as (B, heads, S, D).
    fn split(&self, l: &mut Lowering, v: ValueId, heads: Option<i64>) -> Result<ValueId, OpError> {
        match *l.dims(v)? {
            [_, _, _, _] => Ok(v),
            [b, s, width] => {
                let heads = heads.and_then(|h| usize::try_from(h).ok()).filter(|&h| h > 0 && width % h == 0);
                let h = heads.ok_or_else(|| {
                    OpError::Attribute(format!("the number of heads for a width of {width}"))
                })?;
                let v = l.reshape(v, &[b, s, h, width / h])?;
                l.transpose(v, &[0, 2, 1, 3])
            }
            ref other => Err(OpError::Shape(format!("an operand of shape {other:?}: rank 3 or 4 is needed"))),
        }
    }

    /// May query `i` see key `j`, `i` counted from the first key?
    fn sees(&self, i: i64, j: i64) -> bool {
        (!self.causal || j <= i)
            && self.window[0].is_none_or(|left| i - j <= left)
            && self.window[1].is_none_or(|right| j - i <= right)
    }

    /// Which keys count, as a bool that broadcasts to (B, H, Sq, T); `None`: all.
    fn allowed(
        &self,
        l: &mut Lowering,
        queries: usize,
        past: usize,
        total: usize,
    ) -> Result<Option<ValueId>, OpError> {
        let positional = self.causal || self.window.iter().any(Option::is_some);
        let distance = |f: &dyn Fn(i64, i64) -> i64| -> Vec<i64> {
            (0..queries as i64)
                .flat_map(|i| (0..total as i64).map(move |j| (i, j)))
                .map(|(i, j)| f(i, j))
                .collect()
        };
        let Some(valid) = l.x_opt(6) else {
            if !positional {
                return Ok(None);
            }
            let offset = past as i64;
            let mask: Vec<u8> =
                distance(&|i, j| self.sees(i + offset, j) as i64).iter().map(|&m| m as u8).collect();
            return Ok(Some(l.constant(Tensor::from_bytes(DType::Bool, &[queries, total], &mask)?)));
        };
        let batch = l.meta(valid)?.len();
        let valid = l.reshape(valid, &[batch, 1, 1, 1])?;
        let keys: Vec<i64> = (0..total as i64).collect();
        let keys = l.constant(Tensor::from_slice(&[1, total], &keys)?);
        let mut all = l.emit(Logic::Less, &[keys, valid])?;
        if positional {
            // i + valid − Sq − j, of each sample
            let n = queries as i64;
            let apart = l.constant(Tensor::from_slice(&[queries, total], &distance(&|i, j| i - n - j))?);
            let apart = l.add(apart, valid)?;
            let bounds = [
                self.causal.then_some((Logic::GreaterOrEqual, 0)),
                self.window[0].map(|left| (Logic::LessOrEqual, left)),
                self.window[1].map(|right| (Logic::GreaterOrEqual, -right)),
            ];
            for (compare, bound) in bounds.into_iter().flatten() {
                let bound = l.constant(Tensor::scalar(bound));
                let seen = l.emit(compare, &[apart, bound])?;
                all = l.emit(Logic::And, &[all, seen])?;
            }
        }
        Ok(Some(all))
    }

    /// What is added to the scores (B, H, Sq, T), and whether a row of it may forbid every key.
    fn bias(
        &self,
        l: &mut Lowering,
        dtype: DType,
        queries: usize,
        past: usize,
        total: usize,
    ) -> Result<Option<(ValueId, bool)>, OpError> {
        let mut allowed = self.allowed(l, queries, past, total)?;
        let offset = past as i64;
        let empty_row = |i: i64| (0..total as i64).all(|j| !self.sees(i + offset, j));
        let mut guard = l.x_opt(6).is_some() || (0..queries as i64).any(empty_row);
        let mut bias = None;
        if let Some(mask) = l.x_opt(3) {
            guard = true;
            let (kind, mut dims) = (l.dtype(mask)?, l.dims(mask)?);
            let mut mask = mask;
            if let Some(last) = dims.last_mut()
                && *last < total
                && *last != 1
            {
                let axis = l.dims(mask)?.len() - 1;
                *last = total - *last;
                let rest = match kind {
                    DType::Bool => Tensor::zeros(kind, &dims),
                    _ => {
                        let n = dims.iter().product();
                        Tensor::from_slice(&dims, &vec![f64::NEG_INFINITY; n])?.cast(kind)
                    }
                };
                let rest = l.constant(rest);
                mask = l.concat(&[mask, rest], axis)?;
            }
            if kind == DType::Bool {
                allowed = Some(match allowed {
                    Some(a) => l.emit(Logic::And, &[a, mask])?,
                    None => mask,
                });
            } else {
                bias = Some(mask);
            }
        }
        if let Some(allowed) = allowed {
            let (zero, none) = (l.scalar(0.0, dtype), l.scalar(f64::NEG_INFINITY, dtype));
            let forbidding = l.emit(Where, &[allowed, zero, none])?;
            bias = Some(match bias {
                Some(b) => l.add(b, forbidding)?,
                None => forbidding,
            });
        }
        Ok(bias.map(|b| (b, guard)))
    }
}

/// The two operands a cache makes of one: what came before, and both.
fn cached(l: &mut Lowering, past: usize, new: ValueId) -> Result<(usize, ValueId), OpError> {
    match l.x_opt(past) {
        None => Ok((0, new)),
        Some(p) => {
            let before = l.dims(p)?.get(2).copied().unwrap_or(0);
            Ok((before, l.concat(&[p, new], 2)?))
        }
    }
}

impl Recipe for Attention {
    fn name(&self) -> &'static str {
        "Attention"
    }

    fn outputs(&self) -> usize {
        4
    }

    fn lower(&self, l: &mut Lowering) -> Made {
        let (q, k, v) = (l.x(0)?, l.x(1)?, l.x(2)?);
        if l.x_opt(4).is_some() != l.x_opt(5).is_some() || (l.x_opt(4).is_some() && l.x_opt(6).is_some()) {
            return Err(OpError::Shape(
                "past keys and values come together, and without a number of keys".into(),
            ));
        }
        let flat = l.meta(q)?.rank() == 3;
        let q = self.split(l, q, self.heads[0])?;
        let k = self.split(l, k, self.heads[1])?;
        let v = self.split(l, v, self.heads[1])?;
        let (past, k) = cached(l, 4, k)?;
        let (_, v) = cached(l, 5, v)?;
        let (&[b, h, sq, d], &[_, hk, total, _], &[_, _, _, dv]) = (&*l.dims(q)?, &*l.dims(k)?, &*l.dims(v)?)
        else {
            return Err(OpError::Shape("queries, keys and values of one rank, 3 or 4, are needed".into()));
        };
        if hk == 0 || h % hk != 0 {
            return Err(OpError::Shape(format!("{h} heads of queries for {hk} of keys")));
        }
        // Queries that share keys are rows of one matrix.
        let rows = h / hk * sq;
        let scale = self.scale.map_or(1.0 / (d as f64).sqrt(), f64::from);
        let shared = l.reshape(q, &[b, hk, rows, d])?;
        let keys = l.transpose(k, &[0, 1, 3, 2])?;
        let scores = l.emit(MatMul::scaled(scale as f32), &[shared, keys])?;
        let mut scores = l.reshape(scores, &[b, h, sq, total])?;
        let mut kept = scores;
        if self.softcap > 0.0 {
            // cap · tanh(scores / cap)
            let cap = self.softcap as f64;
            let small = l.times(scores, 1.0 / cap)?;
            let bent = l.emit(Unary(Tanh {}), &[small])?;
            scores = l.times(bent, cap)?;
            if self.stage >= 1 {
                kept = scores;
            }
        }
        let dtype = l.dtype(scores)?;
        let mut masked_rows = None;
        if let Some((bias, guard)) = self.bias(l, dtype, sq, past, total)? {
            if self.stage == 2 {
                kept = l.add(scores, bias)?;
            }
            let mut bias = bias;
            if guard {
                // A query that may see no key gets zeros, and no NaN in between.
                let none = l.scalar(f64::NEG_INFINITY, dtype);
                let op = Reduce { kind: Kind::Max, axes: Some(vec![-1]), keepdims: true, noop: true };
                let most = l.emit(op, &[bias])?;
                let empty = l.emit(Logic::Equal, &[most, none])?;
                let zero = l.scalar(0.0, dtype);
                bias = l.emit(Where, &[empty, zero, bias])?;
                masked_rows = Some((empty, zero));
            }
            scores = l.add(scores, bias)?;
        } else if self.stage == 2 {
            kept = scores;
        }
        if self.double && dtype != DType::F64 {
            scores = l.emit(CastTo::new(DType::F64), &[scores])?;
        }
        let mut weights = l.emit(Softmax::along(-1), &[scores])?;
        if l.dtype(weights)? != dtype {
            weights = l.emit(CastTo::new(dtype), &[weights])?;
        }
        if let Some((empty, zero)) = masked_rows {
            weights = l.emit(Where, &[empty, zero, weights])?;
        }
        if self.stage == 3 {
            kept = weights;
        }
        let shared = l.reshape(weights, &[b, hk, rows, total])?;
        let y = l.emit(MatMul::default(), &[shared, v])?;
        let mut y = l.reshape(y, &[b, h, sq, dv])?;
        if flat {
            y = l.transpose(y, &[0, 2, 1, 3])?;
            y = l.reshape(y, &[b, sq, h * dv])?;
        }
        Ok(vec![Some(y), Some(k), Some(v), Some(kept)])
    }
}

pub(super) const ROWS: &[Row] = &[
    Row::new("Attention", 23, Attention::make),
    Row::new("RotaryEmbedding", 23, rotary::Rotary::standard),
    Row::contrib("RotaryEmbedding", rotary::Rotary::contrib),
];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    let case = |name: &str, opset| Case::new("Attention", opset).named(name).tolerance(1e-5);
    let bools = |dims: &[usize], m: &[u8]| Tensor::from_bytes(DType::Bool, dims, m).unwrap();
    let (q, k, v) = ([2, 4, 3, 5], [2, 2, 4, 5], [2, 2, 4, 6]);
    let mut cases = vec![
        case("4-D", 23).input(&[2, 3, 4, 5]).input(&[2, 3, 6, 5]).input(&[2, 3, 6, 2]),
        case("grouped queries", 23).input(&q).input(&k).input(&v),
        case("causal", 23).int("is_causal", 1).input(&q).input(&k).input(&v),
        case("window", 25)
            .int("left_window_size", 1)
            .int("right_window_size", 0)
            .input(&q)
            .input(&k)
            .input(&v),
        case("3-D and softcap", 24)
            .int("q_num_heads", 4)
            .int("kv_num_heads", 2)
            .float("softcap", 0.7)
            .float("scale", 0.9)
            .input(&[2, 3, 8])
            .input(&[2, 4, 4])
            .input(&[2, 4, 6]),
        case("a mask that is added", 23).input(&q).input(&k).input(&v).input(&[3, 4]),
        case("a short mask", 24).input(&q).input(&k).input(&v).input(&[2, 1, 3, 3]),
        case("a mask with an empty row", 23)
            .input(&q)
            .input(&k)
            .input(&v)
            .fixed(bools(&[3, 4], &[1, 0, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0])),
        case("a cache", 23)
            .int("is_causal", 1)
            .input(&q)
            .input(&k)
            .input(&v)
            .absent()
            .input(&[2, 2, 2, 5])
            .input(&[2, 2, 2, 6])
            .outputs(3),
        case("keys that count", 24)
            .int("is_causal", 1)
            .input(&q)
            .input(&k)
            .input(&v)
            .absent()
            .absent()
            .absent()
            .fixed(Tensor::ints(&[4, 2])),
    ];
    for stage in 0..4 {
        cases.push(
            case(&format!("scores of stage {stage}"), 24)
                .int("qk_matmul_output_mode", stage)
                .float("softcap", 1.5)
                .input(&q)
                .input(&k)
                .input(&v)
                .input(&[3, 4])
                .outputs(4),
        );
    }
    cases.extend(rotary::cases());
    cases
}
