//! Gradients of a scaled loss, for training in float16: what is kept of them in half precision would vanish otherwise.
//! The scale is a state of the session, and so of its checkpoints; other precisions have none.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::exec::{Precision, Purpose, Session};
use crate::graph::{Graph, ValueId};
use crate::ops::Op;
use crate::ops::update::{ClipScale, NextLossScale, ScaleLoss};
use crate::tensor::{DType, Meta};
use crate::train::step::sum_squares;

const SCALE: &str = "step.loss-scale";
/// Before the first step.
pub const FIRST: f64 = 65536.0;

/// The loss scale (float64 [2]: the scale, and the steps since it changed) as a value of the graph; `None` where the
/// session needs none.
pub fn of(session: &mut Session, graph: &mut Graph) -> Option<ValueId> {
    if session.options().precision != Precision::F16 {
        return None;
    }
    let meta = Meta::new(DType::F64, &[2]);
    let store = session.store_mut();
    let state = store.find(SCALE).unwrap_or_else(|| {
        let state = store.add(SCALE, meta.clone(), Purpose::Optimizer);
        store.set(state, bytemuck::cast_slice(&[FIRST, 0.0]));
        state
    });
    Some(graph.find(SCALE).unwrap_or_else(|| graph.add_state(SCALE, state, meta)))
}

/// The present scale, if there is one.
pub fn present(session: &Session) -> Option<f64> {
    session.store().find(SCALE).map(|s| session.store().tensor(s).to_f64()[0])
}

/// What gradients are taken of: the loss, times the scale.
pub fn scaled(session: &mut Session, graph: &mut Graph, loss: ValueId) -> Result<ValueId> {
    match of(session, graph) {
        None => Ok(loss),
        Some(scale) => emit(graph, ScaleLoss, &[Some(loss), Some(scale)]),
    }
}

/// The factor (float64) that takes the scale out of gradients again, not finite where they are not; `None`: none is
/// needed.
pub fn undone(
    session: &mut Session,
    graph: &mut Graph,
    loss: ValueId,
    grads: &[ValueId],
) -> Result<Option<ValueId>> {
    let Some(scale) = of(session, graph) else { return Ok(None) };
    let sum = sum_squares(graph, grads.iter().copied())?;
    emit(graph, ClipScale { max_norm: None }, &[Some(loss), Some(sum), Some(scale)]).map(Some)
}

/// The scale's next content after a step with this factor on its gradient; to be computed for its effect.
pub fn next(session: &mut Session, graph: &mut Graph, factor: ValueId) -> Result<Option<ValueId>> {
    match of(session, graph) {
        None => Ok(None),
        Some(scale) => emit(graph, NextLossScale, &[Some(scale), Some(factor)]).map(Some),
    }
}

fn emit(graph: &mut Graph, op: impl Op + 'static, inputs: &[Option<ValueId>]) -> Result<ValueId> {
    let made = graph.emit("loss-scale", Arc::new(op), inputs, 1);
    Ok(made.map_err(|source| Error::Op { node: "loss scale".into(), source })?[0])
}
