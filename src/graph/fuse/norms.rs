//! Batch normalisation and the convolutions around it: statistics by the convolution in front, and normalised
//! activations that need not be kept for the backward pass.

use std::sync::Arc;

use crate::graph::{Graph, Node, Source, ValueId};
use crate::ops::Op;
use crate::ops::batch_norm::BatchNormalization;
use crate::ops::conv::{Conv, ConvStatistics, ConvWeightGrad};
use crate::tensor::Meta;

/// Lets weight gradients of a differentiated graph that can do so normalise once more what a batch normalisation
/// read, which its own gradient needs too, rather than keep its result from the forward pass.
pub fn normalise_again(graph: &mut Graph) {
    let mut readers = vec![Vec::new(); graph.values.len()];
    for (i, node) in graph.nodes.iter().enumerate() {
        node.inputs.iter().flatten().for_each(|v| readers[v.index()].push(i));
    }
    for i in 0..graph.nodes.len() {
        if let Some(node) = again(graph, &readers, i) {
            graph.nodes[i] = node;
        }
    }
}

/// What takes the place of node `i`, if it is such a gradient.
fn again(graph: &Graph, readers: &[Vec<usize>], i: usize) -> Option<Node> {
    let node = &graph.nodes[i];
    let op = node.op.as_a::<ConvWeightGrad>().filter(|op| op.norm.is_none())?;
    let &[Some(dy), Some(y)] = &node.inputs[..] else { return None };
    let Source::Node(id, 0) = graph.value(y).source else { return None };
    let from = graph.node(id);
    let norm = from.op.as_a::<BatchNormalization>().filter(|n| n.training())?;
    norm.channel_epsilon()?;
    let &[Some(x), Some(scale), Some(shift), _, _] = &from.inputs[..] else { return None };
    let &[_, _, _, Some(mean), Some(inv)] = &from.outputs[..] else { return None };
    let forward = |r: &usize| *r == i || graph.nodes[*r].op.as_a::<Conv>().is_some();
    let kept = |x: ValueId| readers[x.index()].len() > 1;
    let able = graph.value(y).meta.as_ref().is_some_and(|m| op.can_normalise(&m.dims));
    (able && kept(x) && readers[y.index()].iter().all(forward)).then_some(())?;
    let op = ConvWeightGrad { conv: op.conv.clone(), w: op.w.clone(), norm: Some(norm.clamp()) };
    let inputs = [dy, x, mean, inv, scale, shift].map(Some).to_vec();
    Some(Node { op: Arc::new(op), inputs, ..node.clone() })
}

/// Lets convolutions gather the statistics that a normalisation after them needs, while their results are near.
pub fn gather_statistics(graph: &mut Graph) {
    for i in 0..graph.nodes.len() {
        let norm = &graph.nodes[i];
        let Some(op) = norm.op.as_a::<BatchNormalization>().and_then(BatchNormalization::given) else {
            continue;
        };
        let Some(&Some(x)) = norm.inputs.first() else { continue };
        let Source::Node(id, 0) = graph.value(x).source else { continue };
        let Some(conv) = graph.node(id).op.as_a::<Conv>() else { continue };
        let conv: Arc<dyn Op> = Arc::new(ConvStatistics { conv: conv.clone() });
        let metas: Vec<Option<&Meta>> =
            graph.node(id).inputs.iter().map(|v| v.and_then(|v| graph.value(v).meta.as_ref())).collect();
        let Ok(metas) = conv.infer(&metas) else { continue };
        let made: Vec<Option<ValueId>> = metas
            .into_iter()
            .enumerate()
            .skip(1)
            .map(|(output, meta)| {
                let name = format!("{}/statistics.{output}", graph.value(x).name);
                let v = graph.add_value(name, Source::Node(id, output));
                graph.value_mut(v).meta = Some(meta);
                Some(v)
            })
            .collect();
        graph.nodes[i].op = Arc::new(op);
        graph.nodes[i].inputs.splice(5..5, made.clone());
        let node = &mut graph.nodes[id.index()];
        node.op = conv;
        node.outputs.extend(made);
    }
}
