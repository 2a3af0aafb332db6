//! How a teacher's features are compared with a student's, and what else the graphs of the method are made of.

use std::sync::Arc;

use crate::error::{Error, OpError, Result};
use crate::graph::{Graph, ValueId};
use crate::icp::settings::{Features, Which};
use crate::ops::Op;
use crate::ops::binary::Binary;
use crate::ops::cast::CastTo;
use crate::ops::logic::{Logic, Not, Where};
use crate::ops::loss::Mse;
use crate::ops::reduce::{Arg, Kind, Reduce};
use crate::ops::softmax::Softmax;
use crate::ops::unary::{Abs, Sqrt, Unary};
use crate::ops::view::ReshapeTo;
use crate::tensor::{DType, Dims, Tensor};

/// Keeps divisions by a deviation or a norm sound: a part of features of size 1 that float32 still tells from 0.
const TINY: f64 = 1e-6;

pub(super) fn at_icp<T>(r: std::result::Result<T, OpError>) -> Result<T> {
    r.map_err(|source| Error::Op { node: "ICP".into(), source })
}

/// Appends a node of one output.
pub(super) fn emit(graph: &mut Graph, op: impl Op + 'static, inputs: &[ValueId]) -> Result<ValueId> {
    let inputs: Vec<Option<ValueId>> = inputs.iter().map(|v| Some(*v)).collect();
    Ok(at_icp(graph.emit("icp", Arc::new(op), &inputs, 1))?[0])
}

pub(super) fn scalar(graph: &mut Graph, x: f64, dtype: DType) -> ValueId {
    graph.add_constant("icp.scalar", Tensor::scalar(x).cast(dtype))
}

/// A reduction over all axes of `v` but those `kept`, which stay as dimensions of 1.
fn over(graph: &mut Graph, kind: Kind, v: ValueId, kept: &[usize]) -> Result<ValueId> {
    let rank = graph.meta(v)?.rank();
    let axes = (0..rank).filter(|a| !kept.contains(a)).map(|a| a as i64).collect();
    emit(graph, Reduce { kind, axes: Some(axes), keepdims: true, noop: true }, &[v])
}

/// The distance of the student's features from the teacher's, through which no gradient reaches the teacher: `teacher`
/// is a state.
pub(super) fn distance(
    graph: &mut Graph,
    kind: Features,
    student: ValueId,
    teacher: ValueId,
) -> Result<ValueId> {
    let meta = graph.meta(student)?.clone();
    match kind {
        Features::Mse | Features::None => emit(graph, Mse, &[student, teacher]),
        Features::Channel => {
            // mean_c (mean (F − F')² / (var_c F' + δ)): both by the same factor for each channel, 1/√(var_c F' + δ)
            if meta.rank() < 2 {
                return emit(graph, Mse, &[student, teacher]);
            }
            let mean = over(graph, Kind::Mean, teacher, &[1])?;
            let off = emit(graph, Binary::Sub, &[teacher, mean])?;
            let square = emit(graph, Binary::Mul, &[off, off])?;
            let variance = over(graph, Kind::Mean, square, &[1])?;
            let deviation = root(graph, variance, meta.dtype)?;
            let a = emit(graph, Binary::Div, &[student, deviation])?;
            let b = emit(graph, Binary::Div, &[teacher, deviation])?;
            emit(graph, Mse, &[a, b])
        }
        Features::Cosine => {
            // 1 − cos = ½‖F/‖F‖ − F'/‖F'‖‖², so the mean over samples is ½·(elements of one)·MSE
            let a = unit(graph, student)?;
            let b = unit(graph, teacher)?;
            let mse = emit(graph, Mse, &[a, b])?;
            let half = meta.dims.iter().skip(1).product::<usize>() as f64 / 2.0;
            let half = scalar(graph, half, meta.dtype);
            emit(graph, Binary::Mul, &[mse, half])
        }
    }
}

/// `√(v + δ)`.
fn root(graph: &mut Graph, v: ValueId, dtype: DType) -> Result<ValueId> {
    let tiny = scalar(graph, TINY, dtype);
    let sum = emit(graph, Binary::Add, &[v, tiny])?;
    emit(graph, Unary(Sqrt {}), &[sum])
}

/// Each sample by its Euclidean norm.
fn unit(graph: &mut Graph, v: ValueId) -> Result<ValueId> {
    let dtype = graph.meta(v)?.dtype;
    let square = emit(graph, Binary::Mul, &[v, v])?;
    let sum = over(graph, Kind::Sum, square, &[0])?;
    let norm = root(graph, sum, dtype)?;
    emit(graph, Binary::Div, &[v, norm])
}

/// Each sample's gradient by its root mean square; one of nothing but zeros stays so.
pub(super) fn by_rms(graph: &mut Graph, g: ValueId) -> Result<ValueId> {
    let dtype = graph.meta(g)?.dtype;
    // Gradients of single inputs are small: largest first, so that squares do not vanish.
    let size = emit(graph, Unary(Abs {}), &[g])?;
    let top = over(graph, Kind::Max, size, &[0])?;
    let tiny = scalar(graph, f64::from(f32::MIN_POSITIVE), dtype);
    let top = emit(graph, Binary::Max, &[top, tiny])?;
    let scaled = emit(graph, Binary::Div, &[g, top])?;
    let square = emit(graph, Binary::Mul, &[scaled, scaled])?;
    let mean = over(graph, Kind::Mean, square, &[0])?;
    let rms = root(graph, mean, dtype)?;
    emit(graph, Binary::Div, &[scaled, rms])
}

/// `g` where its sample is to be moved, else zeros, for logits (N, C) and one target a sample.
pub(super) fn masked(
    graph: &mut Graph,
    which: Which,
    g: ValueId,
    logits: ValueId,
    target: ValueId,
) -> Result<ValueId> {
    if which == Which::All {
        return Ok(g);
    }
    let (scores, labels, meta) =
        (graph.meta(logits)?.clone(), graph.meta(target)?.clone(), graph.meta(g)?.clone());
    let one_label = scores.rank() == 2 && (labels.rank() == 1 || labels.dims == scores.dims);
    if !one_label || meta.dims.first() != scores.dims.first() {
        return Err(Error::Config(
            "--icp-which needs a classifier with one label a sample, and samples along the first dimension of what \
             is perturbed"
                .into(),
        ));
    }
    let moves = match which {
        Which::Wrong => {
            let best = |graph: &mut Graph, v| {
                emit(graph, Arg { max: true, axis: 1, keepdims: false, last: false }, &[v])
            };
            let label = match labels.rank() {
                1 => target,
                _ => best(graph, target)?,
            };
            let label = emit(graph, CastTo::new(DType::I64), &[label])?;
            let predicted = best(graph, logits)?;
            let right = emit(graph, Logic::Equal, &[predicted, label])?;
            emit(graph, Not, &[right])?
        }
        Which::Uncertain(p) => {
            let probabilities = emit(graph, Softmax::along(1), &[logits])?;
            let top = Reduce { kind: Kind::Max, axes: Some(vec![1]), keepdims: false, noop: false };
            let top = emit(graph, top, &[probabilities])?;
            let bound = scalar(graph, p, scores.dtype);
            emit(graph, Logic::Less, &[top, bound])?
        }
        Which::All => return Ok(g),
    };
    let mut dims = Dims::from_elem(1, meta.rank());
    dims[0] = meta.dims[0];
    let mask = emit(graph, CastTo::new(meta.dtype), &[moves])?;
    let mask = emit(graph, ReshapeTo { dims }, &[mask])?;
    emit(graph, Binary::Mul, &[g, mask])
}

/// Labels (N), those below 0 replaced by the class with the largest of the logits (N, C).
pub(super) fn pseudo_labels(graph: &mut Graph, logits: ValueId, labels: ValueId) -> Result<ValueId> {
    let zero = graph.add_constant("icp.zero", Tensor::scalar(0i64));
    let none = emit(graph, Logic::Less, &[labels, zero])?;
    let best = emit(graph, Arg { max: true, axis: 1, keepdims: false, last: false }, &[logits])?;
    emit(graph, Where, &[none, best, labels])
}
