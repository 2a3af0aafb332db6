//! Which nodes run, and in what order.

use std::collections::HashMap;

use crate::error::{Error, OpError, Result};
use crate::graph::{Graph, Node, NodeId, Source, StateId, ValueId};
use crate::plan::Request;

/// The nodes that the request needs, in the graph's own order, which is one in which they can run: forward as in the
/// file, then the gradient, and the updates as soon as all is there that they read.
pub fn order(graph: &Graph, request: &Request) -> Result<Vec<NodeId>> {
    Ok(eager(graph, &needed(graph, request)?))
}

fn needed(graph: &Graph, request: &Request) -> Result<Vec<NodeId>> {
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

/// Bytes of a result that is no memory to speak of.
const SMALL: usize = 64;

/// The nodes in another order: those that leave nothing in the arena but a few numbers, as sums of squares and updates,
/// run as soon as they can, so that what they read need not be kept.
fn eager(graph: &Graph, order: &[NodeId]) -> Vec<NodeId> {
    // Per node: the place, among those that stay, after which it runs.
    let mut places = vec![0; graph.nodes.len()];
    let mut read: HashMap<StateId, usize> = HashMap::new();
    let mut keyed: Vec<(usize, bool, NodeId)> = Vec::with_capacity(order.len());
    for (position, id) in order.iter().enumerate() {
        let node = graph.node(*id);
        let small = leaves_little(graph, node);
        let mut place = if small { 0 } else { position };
        for (i, v) in node.inputs.iter().enumerate() {
            let Some(v) = v else { continue };
            place = place.max(match graph.value(*v).source {
                Source::Node(n, _) => places[n.index()],
                // An update waits for everybody else who reads the state.
                Source::State(s) if small && node.op.updates().iter().any(|u| u.0 == i) => {
                    read.get(&s).copied().unwrap_or(0)
                }
                _ => 0,
            });
        }
        for v in node.inputs.iter().flatten() {
            if let Some(s) = graph.state_of(*v) {
                let last = read.entry(s).or_default();
                *last = place.max(*last);
            }
        }
        places[id.index()] = place;
        keyed.push((place, small, *id));
    }
    keyed.sort_by_key(|k| (k.0, k.1));
    keyed.into_iter().map(|k| k.2).collect()
}

/// Are all of a node's results small, or the next content of states?
fn leaves_little(graph: &Graph, node: &Node) -> bool {
    let stored = |o: usize| {
        let input =
            node.op.updates().iter().find(|u| u.1 == o).map(|u| node.inputs.get(u.0).copied().flatten());
        input.flatten().is_some_and(|v| matches!(graph.value(v).source, Source::State(_)))
    };
    let little = |v: ValueId| graph.value(v).meta.as_ref().is_some_and(|m| m.bytes() <= SMALL);
    !node.op.is_view()
        && node.outputs.iter().enumerate().all(|(o, v)| v.is_none_or(|v| little(v) || stored(o)))
}

/// A state may not be read after it was updated, not by way of a view either: whoever reads it means the value before the
/// step.
pub(super) fn check_updates(graph: &Graph, order: &[NodeId]) -> Result<()> {
    let mut updated = std::collections::HashSet::new();
    for id in order {
        let node = graph.node(*id);
        let state = |i: usize| graph.state_of(node.inputs.get(i).copied().flatten()?);
        for i in 0..node.inputs.len() {
            let Some(s) = state(i) else { continue };
            let updates = node.op.updates().iter().any(|u| u.0 == i);
            if updated.contains(&s) && !updates {
                let source = OpError::Internal("reads a state after its update".into());
                return Err(Error::Op { node: graph.describe(*id), source });
            }
        }
        for &(i, o) in node.op.updates() {
            let made = node.outputs.get(o).copied().flatten().is_some();
            if let (true, Some(s)) = (made, state(i)) {
                updated.insert(s);
            }
        }
    }
    Ok(())
}
