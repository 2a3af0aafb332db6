//! The entropy of a classifier's predictions: what is minimised where there are no labels (Wang et al., *Tent: Fully
//! Test-Time Adaptation by Entropy Minimization*, ICLR 2021), and with the diversity term what Liang et al. call
//! information maximisation (*Do We Really Need to Access the Source Data?*, ICML 2020).

use std::sync::Arc;

use crate::error::{Error, OpError, Result};
use crate::graph::{Graph, ValueId};
use crate::ops::binary::Binary;
use crate::ops::cast::CastTo;
use crate::ops::logic::Logic;
use crate::ops::loss::IGNORED;
use crate::ops::reduce::{Kind, Reduce, SumTo};
use crate::ops::view::ReshapeTo;
use crate::ops::{Attr, Attrs, Op, Spec, create};
use crate::tensor::{Dims, Tensor};

/// Added to a mean probability before its logarithm is taken.
const LEAST: f64 = 1e-12;

/// Appends `Σ wₙ·H(pₙ) − diversity·H(Σ wₙ·pₙ)`, a scalar, with `p` the softmax of scores (N, C, …) over axis 1, H the
/// entropy in nats (its mean over the places of dense scores) and weights `w` (N), which sum to 1 where the second term
/// is to be the entropy of a mean.
pub(super) fn emit(graph: &mut Graph, scores: ValueId, weights: ValueId, diversity: f64) -> Result<ValueId> {
    build(graph, scores, weights, diversity)
        .map_err(|source| Error::Op { node: format!("entropy of '{}'", graph.value(scores).name), source })
}

/// Appends `loss + weight·(mean H(pₙ) − H(mean pₙ))`, the means over the samples whose label (N) is
/// [`IGNORED`]; where all have one, `loss` it stays.
pub(super) fn beside(
    graph: &mut Graph,
    loss: ValueId,
    scores: ValueId,
    labels: ValueId,
    weight: f64,
) -> Result<ValueId> {
    let (of_labels, dtype) = (graph.meta(labels)?.clone(), graph.meta(scores)?.dtype);
    if of_labels.rank() != 1 || of_labels.dtype.is_float() {
        let what = "samples without a label go beside ones that have a single class label each";
        return Err(Error::Config(what.into()));
    }
    let mut append = || {
        let g = &mut *graph;
        let ignored = g.add_constant("unlabelled.label", Tensor::scalar(IGNORED).cast(of_labels.dtype));
        let one = g.add_constant("unlabelled.one", Tensor::scalar(1.0).cast(dtype));
        let factor = g.add_constant("unlabelled.weight", Tensor::scalar(weight).cast(dtype));
        let without = emit_one(g, Arc::new(Logic::Equal), &[labels, ignored])?;
        let without = emit_one(g, Arc::new(CastTo::new(dtype)), &[without])?;
        let count = emit_one(g, Arc::new(SumTo { dims: Dims::new() }), &[without])?;
        let count = emit_one(g, Arc::new(Binary::Max), &[count, one])?;
        let shares = emit_one(g, Arc::new(Binary::Div), &[without, count])?;
        let lacking = build(g, scores, shares, 1.0)?;
        let weighted = emit_one(g, Arc::new(Binary::Mul), &[lacking, factor])?;
        emit_one(g, Arc::new(Binary::Add), &[loss, weighted])
    };
    append().map_err(|source| Error::Op { node: "the loss of samples without a label".into(), source })
}

fn build(
    g: &mut Graph,
    scores: ValueId,
    weights: ValueId,
    diversity: f64,
) -> std::result::Result<ValueId, OpError> {
    let meta = g.value(scores).meta.clone();
    let meta = meta.ok_or_else(|| OpError::Internal("scores of unknown shape".into()))?;
    let [n, classes, inner @ ..] = meta.dims.as_slice() else {
        return Err(OpError::Shape(format!("scores of shape {:?}: (N, C, …) is needed", meta.dims)));
    };
    if *classes < 2 {
        return Err(OpError::Shape(format!(
            "{classes} class(es): the entropy of a choice among several is needed"
        )));
    }
    let places = inner.iter().product::<usize>().max(1) as f64;
    let rank = meta.dims.len() as i64;
    let constant =
        |g: &mut Graph, x: f64| g.add_constant("entropy.factor", Tensor::scalar(x).cast(meta.dtype));
    let sum = |g: &mut Graph, x: ValueId, axes: Vec<i64>| {
        let op = Reduce { kind: Kind::Sum, axes: Some(axes), keepdims: false, noop: false };
        emit_one(g, Arc::new(op), &[x])
    };
    let total = |g: &mut Graph, x: ValueId| emit_one(g, Arc::new(SumTo { dims: Dims::new() }), &[x]);
    let times = |g: &mut Graph, a: ValueId, b: ValueId| emit_one(g, Arc::new(Binary::Mul), &[a, b]);

    // −H(pₙ) = Σ p·ln p                                                                                      (N)
    let mut axis = Attrs::default();
    axis.0.insert("axis".into(), Attr::Int(1));
    let log = emit_one(g, op("LogSoftmax", &axis)?, &[scores])?;
    let p = emit_one(g, op("Exp", &Attrs::default())?, &[log])?;
    let p_log = times(g, p, log)?;
    let per_sample = sum(g, p_log, (1..rank).collect())?;
    let weighted = times(g, per_sample, weights)?;
    let weighted = total(g, weighted)?;
    let factor = constant(g, -1.0 / places);
    let entropy = times(g, weighted, factor)?;
    if diversity == 0.0 {
        return Ok(entropy);
    }
    // −H(p̄) = Σ p̄·ln p̄,  p̄ = Σ wₙ·pₙ                                                                        (C)
    let mut column = Dims::from_slice(&[*n]);
    column.resize(meta.dims.len(), 1);
    let column = emit_one(g, Arc::new(ReshapeTo { dims: column }), &[weights])?;
    let shares = times(g, p, column)?;
    let mean = sum(g, shares, (0..rank).filter(|a| *a != 1).collect())?;
    let factor = constant(g, 1.0 / places);
    let mean = times(g, mean, factor)?;
    let least = constant(g, LEAST);
    let safe = emit_one(g, Arc::new(Binary::Add), &[mean, least])?;
    let log = emit_one(g, op("Log", &Attrs::default())?, &[safe])?;
    let mean_log = times(g, mean, log)?;
    let negative = total(g, mean_log)?;
    let factor = constant(g, diversity);
    let spread = times(g, negative, factor)?;
    emit_one(g, Arc::new(Binary::Add), &[entropy, spread])
}

fn op(op_type: &str, attrs: &Attrs) -> std::result::Result<Arc<dyn Op>, OpError> {
    create(&Spec { domain: "", op_type, opset: 17, attrs, inputs: 1, outputs: 1 })
}

fn emit_one(g: &mut Graph, op: Arc<dyn Op>, inputs: &[ValueId]) -> std::result::Result<ValueId, OpError> {
    let inputs: Vec<Option<ValueId>> = inputs.iter().map(|v| Some(*v)).collect();
    Ok(g.emit("entropy", op, &inputs, 1)?[0])
}
