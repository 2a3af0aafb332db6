//! Gradients of weights of which only a slice learns: computed as that slice, from the channels of the layer's input that
//! it multiplies, which are cut out where that input is made (Lin et al. 2022, "On-Device Training Under 256KB Memory",
//! section 3.2). The rest of the input need not outlive the forward pass for the weight's sake.

use std::sync::Arc;

use smallvec::SmallVec;

use crate::error::{Error, OpError, Result};
use crate::graph::{Graph, Node, NodeId, Source, ValueId};
use crate::ops::Op;
use crate::ops::conv::ConvWeightGrad;
use crate::ops::matmul::{Gemm, MatMulAs};
use crate::ops::part::Inset;
use crate::ops::slice::Crop;
use crate::tensor::{Dims, Meta};

/// A slice of an operand.
struct Piece {
    operand: usize,
    of: ValueId,
    inset: Inset,
}

/// A gradient and the slice of it that alone is read.
struct Narrowed {
    /// The node that is no longer needed.
    whole: NodeId,
    op: Arc<dyn Op>,
    pieces: SmallVec<[Piece; 2]>,
}

/// Rewrites the gradients that only a [`Crop`] reads, of a differentiated graph whose gradient begins at node `from`.
pub fn narrow(graph: &mut Graph, from: usize) -> Result<()> {
    let readers = graph.consumers();
    let of = |i: usize| if i < from { None } else { narrowed(graph, &readers, NodeId(i as u32)) };
    let found: Vec<Option<Narrowed>> = (0..graph.nodes.len()).map(of).collect();
    if found.iter().all(Option::is_none) {
        return Ok(());
    }
    let mut gone = vec![false; graph.nodes.len()];
    let mut after: Vec<Vec<Node>> = vec![Vec::new(); graph.nodes.len() + 1];
    for (i, narrowed) in found.into_iter().enumerate() {
        let Some(Narrowed { whole, op, pieces }) = narrowed else { continue };
        let mut inputs = graph.node(whole).inputs.clone();
        for piece in pieces {
            let made = cut(graph, &mut after, &piece)
                .map_err(|source| Error::Op { node: graph.describe(NodeId(i as u32)), source })?;
            inputs[piece.operand] = Some(made);
        }
        gone[whole.index()] = true;
        let node = &mut graph.nodes[i];
        (node.op, node.inputs) = (op, inputs);
    }
    let nodes = std::mem::take(&mut graph.nodes);
    let mut after = after.into_iter();
    graph.nodes.extend(after.next().into_iter().flatten());
    for ((node, gone), after) in nodes.into_iter().zip(gone).zip(after) {
        if !gone {
            graph.nodes.push(node);
        }
        graph.nodes.extend(after);
    }
    graph.renumber();
    Ok(())
}

/// Makes the slice right after what it is a slice of; `after[n + 1]` is what follows node n.
fn cut(graph: &mut Graph, after: &mut [Vec<Node>], piece: &Piece) -> std::result::Result<ValueId, OpError> {
    let at = match graph.value(piece.of).source {
        Source::Node(n, _) => n.index() + 1,
        _ => 0,
    };
    let meta = graph.value(piece.of).meta.clone();
    let meta = meta.ok_or_else(|| OpError::Internal("a slice of unknown shape".into()))?;
    let op = Crop { cut: piece.inset.cut(&meta.dims) };
    let made = op.infer(&[Some(&meta)])?.swap_remove(0);
    let name = format!("{}#channels", graph.value(piece.of).name);
    let v = graph.add_value(name, Source::Node(NodeId(0), 0));
    graph.value_mut(v).meta = Some(made);
    let (inputs, outputs) = (vec![Some(piece.of)], vec![Some(v)]);
    after[at].push(Node { name: String::new(), op: Arc::new(op), inputs, outputs });
    Ok(v)
}

fn dims(graph: &Graph, v: ValueId) -> Option<&[usize]> {
    graph.value(v).meta.as_ref().map(|m: &Meta| m.dims.as_slice())
}

/// The axis, begin and length of a crop that is smaller along one axis.
fn inset_of(crop: &Crop, whole: &[usize]) -> Option<Inset> {
    let mut smaller = (0..whole.len()).filter(|&a| crop.cut.count.get(a) != Some(&whole[a]));
    let (axis, None) = (smaller.next()?, smaller.next()) else { return None };
    let plain = crop.cut.step.iter().all(|s| *s == 1);
    plain.then(|| Inset { axis, from: crop.cut.start[axis], count: crop.cut.count[axis] })
}

fn narrowed(graph: &Graph, readers: &[Vec<NodeId>], id: NodeId) -> Option<Narrowed> {
    let node = graph.node(id);
    let crop = node.op.as_a::<Crop>()?;
    let &[Some(g)] = &node.inputs[..] else { return None };
    let Source::Node(whole, 0) = graph.value(g).source else { return None };
    let inset = inset_of(crop, dims(graph, g)?)?;
    if readers[g.index()].len() != 1 {
        return None;
    }
    let made = graph.node(whole);
    let &[Some(a), Some(b)] = &made.inputs[..] else { return None };
    let along = |operand: usize, of: ValueId, axis: usize| Piece {
        operand,
        of,
        inset: Inset { axis, ..inset.clone() },
    };
    let (op, pieces): (Arc<dyn Op>, _) = if let Some(grad) = made.op.as_a::<ConvWeightGrad>() {
        // Of dY (a) and X (b).
        let mut small = grad.clone();
        *small.w.get_mut(inset.axis)? = inset.count;
        let channels = dims(graph, b)?.get(1).copied()?;
        let pieces = match (inset.axis, grad.conv.groups) {
            (1, 1) => SmallVec::from_iter([along(1, b, 1)]),
            // Each channel by itself.
            (0, groups) if groups == channels && grad.w.first() == Some(&groups) => {
                small.conv.groups = inset.count;
                SmallVec::from_iter([along(0, a, 1), along(1, b, 1)])
            }
            _ => return None,
        };
        (Arc::new(small), pieces)
    } else if let Some(grad) = made.op.as_a::<MatMulAs>() {
        // Of X (a) and dY: rows of the weight are features of X.
        let rows = grad.trans_a && !grad.trans_b && grad.a.len() == 2 && grad.y.len() == 2;
        let last = dims(graph, a)?.len().checked_sub(1)?;
        if !rows || inset.axis != 0 || dims(graph, a)?[last] != grad.a[1] {
            return None;
        }
        let small = MatMulAs {
            a: Dims::from_slice(&[grad.a[0], inset.count]),
            b: grad.b.clone(),
            y: Dims::from_slice(&[inset.count, grad.y[1]]),
            ..*grad
        };
        (Arc::new(small), SmallVec::from_iter([along(0, a, last)]))
    } else {
        let grad = made.op.as_a::<Gemm>()?;
        let pieces = match (inset.axis, grad.trans_a, grad.trans_b) {
            // Xᵀ·dY
            (0, true, false) => SmallVec::from_iter([along(0, a, 1)]),
            // dYᵀ·X
            (1, true, false) => SmallVec::from_iter([along(1, b, 1)]),
            _ => return None,
        };
        (Arc::new(grad.clone()), pieces)
    };
    Some(Narrowed { whole, op, pieces })
}
