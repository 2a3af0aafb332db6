//! Depthwise convolutions that compute what they read: the results of a pointwise convolution in front, which nobody else reads.

use std::sync::Arc;

use super::uses::Uses;
use crate::graph::{Graph, Node, Source};
use crate::ops::conv::{Conv, ConvExpanded};
use crate::plan::Request;

/// Joins depthwise convolutions of a planned graph with the pointwise ones in front, where both have their channels last.
pub fn join_expansions(graph: &mut Graph, request: &Request) {
    let mut uses = Uses::of(graph, request);
    for i in 0..graph.nodes.len() {
        expand(&mut uses, graph, i);
    }
}

/// If node `i` is such a convolution, it becomes both.
fn expand(uses: &mut Uses, graph: &mut Graph, i: usize) -> Option<()> {
    let node = &graph.nodes[i];
    let conv = node.op.as_a::<Conv>()?;
    let middle = node.inputs[0]?;
    let Source::Node(id, 0) = graph.value(middle).source else { return None };
    let from = graph.node(id);
    let before = from.op.as_a::<Conv>()?;
    if !uses.only_in(middle, i) {
        return None;
    }
    let operands = [&from.inputs, &node.inputs].map(|inputs| graph.metas(inputs));
    let op = ConvExpanded::of((before, &operands[0]), (conv, &operands[1]))?;
    let mut inputs = from.inputs.clone();
    inputs.resize(3, None);
    inputs.extend_from_slice(&node.inputs[1..]);
    let made = Node { op: Arc::new(op), inputs, ..node.clone() };
    uses.remove(graph, id.index());
    uses.put(graph, i, made);
    Some(())
}
