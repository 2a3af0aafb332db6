//! Results of activations that are kept for nothing but where they clamped: a mask is kept in their place, of one bit an
//! element.

use std::sync::Arc;

use crate::error::{Error, OpError, Result};
use crate::graph::{Graph, Node, NodeId, Source, ValueId};
use crate::kernels::elementwise::Clamp;
use crate::ops::Op;
use crate::ops::clip::ClipGrad;
use crate::ops::mask::{Mask, MaskGrad};
use crate::plan::Request;
use crate::tensor::Meta;

/// How many nodes a result must be kept for the mask's sake alone, for a mask to be worth it.
const NEAR: usize = 8;

/// A gradient that reads where its activation clamped.
struct Reader {
    node: usize,
    y: ValueId,
    clamp: Clamp<f64>,
}

/// Lets gradients of clamping activations read a mask, where nobody else still needs the activation's result.
pub fn keep_masks(graph: &mut Graph, request: &Request) -> Result<()> {
    let kept = request.outputs.iter().chain(&request.effects).chain(request.pins.keys());
    let kept: std::collections::HashSet<ValueId> = kept.copied().collect();
    let mut last = vec![0; graph.values.len()];
    let mut found: Vec<Reader> = Vec::new();
    for (i, node) in graph.nodes.iter().enumerate() {
        let clamp = node.op.as_a::<ClipGrad>().and_then(ClipGrad::clamp);
        match (clamp, &node.inputs[..]) {
            (Some(clamp), &[Some(y), Some(dy)]) if y != dy => {
                found.push(Reader { node: i, y, clamp });
                last[dy.index()] = i;
            }
            _ => node.inputs.iter().flatten().for_each(|v| last[v.index()] = i),
        }
    }
    // A view is the same memory: it keeps what it views.
    for (x, y) in graph.nodes.iter().rev().filter_map(Node::view) {
        let later = if kept.contains(&y) { usize::MAX } else { last[y.index()] };
        last[x.index()] = last[x.index()].max(later);
    }
    found.retain(|r| {
        let made = match graph.value(r.y).source {
            Source::Node(n, _) => n.index(),
            _ => return false,
        };
        let view = graph.nodes[made].op.is_view();
        !kept.contains(&r.y) && !view && last[r.y.index()].saturating_add(NEAR) < r.node
    });
    if found.is_empty() {
        return Ok(());
    }
    let mut after: Vec<Vec<Node>> = vec![Vec::new(); graph.nodes.len()];
    for r in found {
        let Source::Node(n, _) = graph.value(r.y).source else { continue };
        let op = Mask { clamp: r.clamp };
        let made = mask_of(graph, &op, r.y)
            .map_err(|source| Error::Op { node: graph.describe(NodeId(r.node as u32)), source })?;
        let (inputs, outputs) = (vec![Some(r.y)], vec![Some(made)]);
        after[n.index()].push(Node { name: String::new(), op: Arc::new(op), inputs, outputs });
        let node = &mut graph.nodes[r.node];
        (node.op, node.inputs[0]) = (Arc::new(MaskGrad), Some(made));
    }
    for (node, after) in std::mem::take(&mut graph.nodes).into_iter().zip(after) {
        graph.nodes.push(node);
        graph.nodes.extend(after);
    }
    graph.renumber();
    Ok(())
}

fn mask_of(graph: &mut Graph, op: &Mask, y: ValueId) -> std::result::Result<ValueId, OpError> {
    let meta: Option<Meta> = graph.value(y).meta.clone();
    let made = op.infer(&[meta.as_ref()])?.swap_remove(0);
    let v = graph.add_value(format!("{}#mask", graph.value(y).name), Source::Node(NodeId(0), 0));
    graph.value_mut(v).meta = Some(made);
    Ok(v)
}
