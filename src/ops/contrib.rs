//! Operators of onnxruntime's own domain, com.microsoft, that its optimiser writes into models.

use crate::error::OpError;
use crate::graph::{Lowering, ValueId};
use crate::ops::composite::{Made, defined, one};
use crate::ops::matmul::MatMul;
use crate::ops::norm::RowNorm;
use crate::ops::unary::{Gelu, GeluTanh, Swish, Unary};
use crate::ops::{Attrs, Row, Spec};
use std::sync::Arc;

/// `FusedMatMul`: `alpha · A'·B'`, the last two axes of either transposed.
fn fused_matmul(a: &Attrs, l: &mut Lowering) -> Made {
    if a.flag("transBatchA")? || a.flag("transBatchB")? {
        return Err(OpError::Unsupported("FusedMatMul with transposed stacks".into()));
    }
    let mut operand = |slot: usize, name: &str| -> Result<ValueId, OpError> {
        let x = l.x(slot)?;
        let rank = l.meta(x)?.rank();
        if !a.flag(name)? || rank < 2 {
            return Ok(x);
        }
        let mut perm: Vec<usize> = (0..rank).collect();
        perm.swap(rank - 2, rank - 1);
        l.transpose(x, &perm)
    };
    let (x, y) = (operand(0, "transA")?, operand(1, "transB")?);
    one(l.emit(MatMul::scaled(a.float_or("alpha", 1.0)?), &[x, y]))
}

/// `BiasGelu`: the GELU of a sum.
fn bias_gelu(_: &Attrs, l: &mut Lowering) -> Made {
    let sum = l.add(l.x(0)?, l.x(1)?)?;
    one(l.emit(Unary(Gelu {}), &[sum]))
}

/// `FastGelu`: GELU by tanh of X, or of X plus a bias.
fn fast_gelu(_: &Attrs, l: &mut Lowering) -> Made {
    let x = match l.x_opt(1) {
        Some(bias) => l.add(l.x(0)?, bias)?,
        None => l.x(0)?,
    };
    one(l.emit(Unary(GeluTanh {}), &[x]))
}

/// The sum of operands 0 and 1 and, where it is there, the bias.
fn skip(l: &mut Lowering, bias: usize) -> Result<ValueId, OpError> {
    let sum = l.add(l.x(0)?, l.x(1)?)?;
    match l.x_opt(bias) {
        Some(b) => l.add(sum, b),
        None => Ok(sum),
    }
}

/// `SkipLayerNormalization`: X, skip, scale, shift and bias to the normalised sum, mean, inverse deviation and the sum.
fn skip_layer_norm(a: &Attrs, l: &mut Lowering) -> Made {
    let sum = skip(l, 4)?;
    let op = Arc::new(RowNorm::layer(-1, a.float_or("epsilon", 1e-12)?));
    let inputs = [Some(sum), Some(l.x(2)?), l.x_opt(3)];
    let made = l.emit_all(op, &inputs, 3)?;
    Ok(vec![Some(made[0]), Some(made[1]), Some(made[2]), Some(sum)])
}

/// `SkipSimplifiedLayerNormalization`: as above without mean and shift.
fn skip_rms_norm(a: &Attrs, l: &mut Lowering) -> Made {
    let sum = skip(l, 3)?;
    let op = Arc::new(RowNorm::rms(-1, a.float_or("epsilon", 1e-12)?));
    let inputs = [Some(sum), Some(l.x(2)?)];
    let made = l.emit_all(op, &inputs, 3)?;
    Ok(vec![Some(made[0]), Some(made[1]), Some(made[2]), Some(sum)])
}

/// `SimplifiedLayerNormalization`: X and scale to X over its root mean square, and the inverse of that.
fn rms_norm(a: &Attrs, l: &mut Lowering) -> Made {
    let op = Arc::new(RowNorm::rms(a.int_or("axis", -1)?, a.float_or("epsilon", 1e-5)?));
    let inputs = [Some(l.x(0)?), Some(l.x(1)?)];
    let made = l.emit_all(op, &inputs, 3)?;
    Ok(vec![Some(made[0]), Some(made[2])])
}

fn simplified(s: &Spec) -> Result<Arc<dyn crate::ops::Op>, OpError> {
    defined(s, "SimplifiedLayerNormalization", 2, rms_norm)
}

pub(super) const ROWS: &[Row] = &[
    Row::contrib("FusedMatMul", |s| defined(s, "FusedMatMul", 1, fused_matmul)),
    Row::contrib("BiasGelu", |s| defined(s, "BiasGelu", 1, bias_gelu)),
    Row::contrib("FastGelu", |s| defined(s, "FastGelu", 1, fast_gelu)),
    Row::contrib("Gelu", |_| Ok(Arc::new(Unary(Gelu {})))),
    Row::contrib("QuickGelu", |s| Ok(Arc::new(Unary(Swish { alpha: s.attrs.float_or("alpha", 1.702)? })))),
    Row::contrib("SkipLayerNormalization", |s| defined(s, "SkipLayerNormalization", 4, skip_layer_norm)),
    Row::contrib("SkipSimplifiedLayerNormalization", |s| {
        defined(s, "SkipSimplifiedLayerNormalization", 4, skip_rms_norm)
    }),
    // onnxruntime writes it under the standard's name too.
    Row::new("SimplifiedLayerNormalization", 1, simplified),
    Row::contrib("SimplifiedLayerNormalization", simplified),
];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    let line: Vec<f64> = (0..12).map(|i| -2.87 + 0.51 * i as f64).collect();
    vec![
        Case::contrib("FusedMatMul").float("alpha", 0.5).int("transB", 1).input(&[2, 3, 4]).input(&[5, 4]),
        Case::contrib("FusedMatMul").named("A transposed").int("transA", 1).input(&[4, 3]).input(&[4, 5]),
        Case::contrib("BiasGelu").input(&[3, 4]).input(&[4]),
        Case::contrib("FastGelu").given(&[3, 4], &line),
        Case::contrib("FastGelu").named("bias").input(&[3, 4]).input(&[4]),
        Case::contrib("Gelu").given(&[3, 4], &line),
        Case::contrib("QuickGelu").given(&[3, 4], &line),
        Case::contrib("SkipLayerNormalization")
            .input(&[2, 3, 8])
            .input(&[2, 3, 8])
            .within(&[8], 0.5, 1.5)
            .input(&[8])
            .input(&[8]),
        Case::contrib("SkipLayerNormalization").named("no shift").input(&[2, 3, 8]).input(&[2, 3, 8]).within(
            &[8],
            0.5,
            1.5,
        ),
        Case::contrib("SkipSimplifiedLayerNormalization")
            .input(&[2, 3, 8])
            .input(&[2, 3, 8])
            .within(&[8], 0.5, 1.5)
            .input(&[8]),
        Case::contrib("SimplifiedLayerNormalization").input(&[2, 8]).within(&[8], 0.5, 1.5),
        Case::new("SimplifiedLayerNormalization", 17).input(&[2, 8]).within(&[8], 0.5, 1.5),
    ]
}
