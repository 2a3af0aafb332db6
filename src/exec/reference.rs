//! The plainest executor: every value in a buffer of its own, nothing shared, nothing reused. Other
//! memory modes must agree with it bit for bit.

use std::collections::HashMap;

use crate::error::{Error, Result};
use crate::graph::{Graph, NodeId, Source, ValueId};
use crate::ops::eval;
use crate::tensor::Tensor;

/// Runs the whole graph on `feeds` (inputs, weights and states) and returns the `wanted` values.
pub fn interpret(graph: &Graph, feeds: &HashMap<ValueId, Tensor>, wanted: &[ValueId]) -> Result<Vec<Tensor>> {
    let mut values: HashMap<ValueId, Tensor> = feeds.clone();
    for (i, v) in graph.values.iter().enumerate() {
        if let Source::Constant(t) = &v.source {
            values.insert(ValueId(i as u32), t.as_ref().clone());
        }
    }
    for (i, node) in graph.nodes.iter().enumerate() {
        let id = NodeId(i as u32);
        let mut inputs = Vec::with_capacity(node.inputs.len());
        for v in &node.inputs {
            inputs.push(match v {
                Some(v) => Some(values.get(v).ok_or_else(|| {
                    Error::value(&graph.value(*v).name, format!("not computed before {}", graph.describe(id)))
                })?),
                None => None,
            });
        }
        let outputs = eval(node.op.as_ref(), &inputs)
            .map_err(|source| Error::Op { node: graph.describe(id), source })?;
        for (v, t) in node.outputs.iter().zip(outputs) {
            if let Some(v) = v {
                values.insert(*v, t);
            }
        }
    }
    wanted
        .iter()
        .map(|v| values.get(v).cloned().ok_or_else(|| Error::value(&graph.value(*v).name, "not computed")))
        .collect()
}
