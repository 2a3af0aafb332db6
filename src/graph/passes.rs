//! Rewrites of a graph before it is differentiated and planned.

use crate::error::{Error, Result};
use crate::graph::{Graph, NodeId, Source, ValueId};
use crate::ops::Mode;

/// Puts every operator that behaves differently in training (normalisation, dropout) into `mode`.
///
/// Returns the values that are the next running statistics: outputs that update a state and that the
/// plan must compute although nobody reads them.
pub fn set_mode(graph: &mut Graph, mode: Mode) -> Result<Vec<ValueId>> {
    let mut updates = Vec::new();
    for i in 0..graph.nodes.len() {
        let id = NodeId(i as u32);
        let Some(op) = graph.node(id).op.in_mode(mode) else { continue };
        graph.nodes[i].op = op.clone();
        for &(input, output) in op.updates() {
            let state = graph.node(id).inputs.get(input).copied().flatten();
            if state.is_some_and(|v| matches!(graph.value(v).source, Source::State(_))) {
                let made = graph.output_of(id, output);
                updates.push(made.map_err(|source| Error::Op { node: graph.describe(id), source })?);
            }
        }
    }
    Ok(updates)
}
