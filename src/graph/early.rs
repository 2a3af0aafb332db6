//! Updates that do not wait for one another.

use crate::graph::{Graph, NodeId, Source, ValueId};
use crate::ops::update::{Checked, ClipScale, SumSquares};
use crate::ops::variadic::Variadic;

/// Lets each weight follow its gradient as soon as that is there, so that gradients need not be kept: every update waits for
/// the sum of the squares of all gradients, which without a bound on it only tells whether all are finite. Now each waits
/// for those that come before its own in the backward pass.
///
/// Weights are the same to the last bit, but for a step with a gradient that is not finite: what was updated before it came
/// up stays so. Where the norm is bounded nothing is changed. Returns whether anything was.
pub fn update_early(graph: &mut Graph) -> bool {
    let made_by = |graph: &Graph, v: Option<ValueId>| match v.map(|v| &graph.value(v).source) {
        Some(Source::Node(n, _)) => Some(*n),
        _ => None,
    };
    let clip =
        graph.nodes.iter().position(|n| n.op.as_a::<ClipScale>().is_some_and(|c| c.max_norm.is_none()));
    let Some(clip) = clip.map(|i| graph.nodes[i].clone()) else { return false };
    let (&[loss, sum], &[Some(scale), ..]) = (&clip.inputs[..], &clip.outputs[..]) else { return false };
    let mut sums: Vec<NodeId> = Vec::new();
    let mut terms = vec![sum];
    while let Some(term) = terms.pop() {
        let Some(n) = made_by(graph, term) else { return false };
        let node = graph.node(n);
        match (node.op.as_a::<Variadic>(), node.op.as_a::<SumSquares>()) {
            (Some(Variadic::Sum), _) => terms.extend(&node.inputs),
            (_, Some(SumSquares)) => sums.push(n),
            _ => return false,
        }
    }
    sums.sort();
    // Gradients as they come in the backward pass; one that is no result of a node is there from the start.
    let mut gradients: Vec<ValueId> = sums.iter().filter_map(|n| graph.node(*n).inputs[0]).collect();
    gradients.sort_by_key(|g| made_by(graph, Some(*g)));
    if gradients.len() != sums.len() || gradients.len() < 2 {
        return false;
    }
    let mut before = None;
    let mut factors = Vec::with_capacity(sums.len());
    for (n, g) in sums.iter().zip(&gradients) {
        let node = &mut graph.nodes[n.index()];
        node.op = std::sync::Arc::new(Checked);
        node.inputs = vec![Some(*g), before, loss];
        let Ok(factor) = graph.output_of(*n, 1) else { return false };
        before = graph.node(*n).outputs[0];
        factors.push((*g, factor));
    }
    for node in &mut graph.nodes {
        if node.op.as_a::<ClipScale>().is_some() && node.output() == Some(scale) {
            node.inputs[1] = before;
        } else if let Some(slot) = node.inputs.iter().position(|v| *v == Some(scale))
            && let Some((_, factor)) = factors.iter().find(|(g, _)| node.inputs.get(1) == Some(&Some(*g)))
        {
            node.inputs[slot] = Some(*factor);
        }
    }
    true
}
