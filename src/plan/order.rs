//! Which nodes run, and in what order.

use crate::error::{Error, OpError, Result};
use crate::graph::{Graph, NodeId, Source, ValueId};
use crate::plan::Request;

/// The nodes that the request needs, in the graph's own order, which is one in which they can run:
/// forward as in the file, then the gradient, then the updates.
pub fn order(graph: &Graph, request: &Request) -> Result<Vec<NodeId>> {
    let mut needed = vec![false; graph.nodes.len()];
    let mut stack: Vec<ValueId> =
        request.outputs.iter().chain(&request.effects).chain(request.pins.keys()).copied().collect();
    while let Some(v) = stack.pop() {
        if let Source::Node(n, _) = graph.value(v).source
            && !std::mem::replace(&mut needed[n.index()], true)
        {
            stack.extend(graph.node(n).inputs.iter().flatten());
        }
    }
    let order: Vec<NodeId> =
        (0..graph.nodes.len()).filter(|&i| needed[i]).map(|i| NodeId(i as u32)).collect();
    check_updates(graph, &order)?;
    Ok(order)
}

/// A state may not be read after it was updated: whoever reads it means the value before the step.
fn check_updates(graph: &Graph, order: &[NodeId]) -> Result<()> {
    let mut updated = std::collections::HashSet::new();
    for id in order {
        let node = graph.node(*id);
        let state = |v: &ValueId| match graph.value(*v).source {
            Source::State(s) => Some(s),
            _ => None,
        };
        for (i, v) in node.inputs.iter().enumerate() {
            let Some(s) = v.as_ref().and_then(state) else { continue };
            let updates = node.op.updates().iter().any(|u| u.0 == i);
            if updated.contains(&s) && !updates {
                let source = OpError::Internal("reads a state after its update".into());
                return Err(Error::Op { node: graph.describe(*id), source });
            }
        }
        for &(i, o) in node.op.updates() {
            let made = node.outputs.get(o).copied().flatten().is_some();
            if let (true, Some(s)) = (made, node.inputs.get(i).and_then(|v| v.as_ref()).and_then(state)) {
                updated.insert(s);
            }
        }
    }
    Ok(())
}
