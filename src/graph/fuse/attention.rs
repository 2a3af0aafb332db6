//! Attention, where it is spelled as a product, a softmax and a product: one operator that keeps no matrix of scores.

use std::sync::Arc;

use smallvec::SmallVec;

use super::{Chains, Tail, same_shape, source};
use crate::graph::{Graph, Node, NodeId, ValueId};
use crate::kernels::elementwise::Clamp;
use crate::ops::attention::FusedAttention;
use crate::ops::binary::Binary;
use crate::ops::matmul::MatMul;
use crate::ops::softmax::Softmax;
use crate::ops::transpose::Transpose;
use crate::tensor::{DType, Dims};

/// A tensor, and where the axes that are meant lie in it.
type Seen = (ValueId, Dims);

fn dims(graph: &Graph, v: ValueId) -> Option<&[usize]> {
    graph.value(v).meta.as_ref().map(|m| &m.dims[..])
}

/// A product of two operands, its factor and what is added to it, if that has the result's shape.
fn product(graph: &Graph, id: NodeId) -> Option<(ValueId, ValueId, f32, Option<ValueId>)> {
    let node = graph.node(id);
    let alpha = node.op.as_a::<MatMul>()?.alpha;
    match node.inputs[..] {
        [Some(a), Some(b)] | [Some(a), Some(b), None] => Some((a, b, alpha, None)),
        [Some(a), Some(b), None, added] => Some((a, b, alpha, added)),
        _ => None,
    }
}

/// The operand as a tensor whose last axis is the last in memory, seen through the transpositions that made it.
fn rows(graph: &Graph, v: ValueId, axes: Dims) -> Option<Seen> {
    let last = axes.len() - 1;
    let deeper = source(graph, v).and_then(|id| {
        let node = graph.node(id);
        let perm = node.op.as_a::<Transpose>()?.perm.as_ref()?;
        rows(graph, node.inputs[0]?, axes.iter().map(|&a| perm[a]).collect())
    });
    deeper.or((axes[last] == last).then_some((v, axes)))
}

impl Chains {
    /// Replaces the attention around a softmax, if there is one.
    pub(super) fn fuse_attention(&mut self, graph: &mut Graph, softmax: NodeId) {
        if let Some((tail, node)) = self.attention(graph, softmax) {
            self.replace(graph, &tail, SmallVec::from_iter([node]));
        }
    }

    fn attention(&self, graph: &Graph, softmax: NodeId) -> Option<(Tail, Node)> {
        let node = graph.node(softmax);
        let out = |id: NodeId| graph.node(id).outputs.first().copied().flatten();
        let (scores, p) = (node.inputs.first().copied().flatten()?, out(softmax)?);
        let meta = graph.value(scores).meta.as_ref()?;
        let rank = meta.dims.len();
        let float = matches!(meta.dtype, DType::F32 | DType::F64);
        let over_rows = node.op.as_a::<Softmax>()?.over_rows(rank);
        if !(over_rows && float && (3..=4).contains(&rank) && self.passing(scores) && self.passing(p)) {
            return None;
        }
        let mut absorbed = SmallVec::new();
        let mut inner = SmallVec::from_slice(&[scores, p]);
        // The scores: a product, perhaps with a mask added.
        let first = source(graph, scores)?;
        let (q, kt, scale, mask) = match product(graph, first) {
            Some(of) => {
                absorbed.push(first);
                of
            }
            None => {
                let (Binary::Add, &[Some(a), Some(b)]) =
                    (graph.node(first).op.as_a::<Binary>()?, &graph.node(first).inputs[..])
                else {
                    return None;
                };
                let of = |v: ValueId| {
                    let id = source(graph, v).filter(|_| self.passing(v) && same_shape(graph, v, scores))?;
                    product(graph, id).filter(|of| of.3.is_none()).map(|of| (id, v, of))
                };
                let ((id, inside, (q, kt, scale, _)), mask) = match of(a) {
                    Some(found) => (found, b),
                    None => (of(b)?, a),
                };
                absorbed.extend([id, first]);
                inner.push(inside);
                (q, kt, scale, Some(mask))
            }
        };
        absorbed.push(softmax);
        let last = self.next(graph, p)?;
        let (a, v, alpha, added) = product(graph, last)?;
        if a != p || alpha != 1.0 || added.is_some() {
            return None;
        }
        absorbed.push(last);
        let plain: Dims = (0..rank).collect();
        let mut across = plain.clone();
        across.swap(rank - 2, rank - 1);
        let same =
            |v: ValueId, like: ValueId| Some(dims(graph, v)?[..rank - 2] == dims(graph, like)?[..rank - 2]);
        let stacks = [q, kt, v].iter().all(|&x| dims(graph, x).is_some_and(|d| d.len() == rank));
        if !(stacks && same(q, kt)? && same(q, v)?) {
            return None;
        }
        let (q, q_axes) = rows(graph, q, plain.clone())?;
        let (k, k_axes) = rows(graph, kt, across)?;
        let (v, v_axes) = rows(graph, v, plain.clone())?;
        let (mut y, mut y_axes) = (out(last)?, plain);
        // A transposition of the result only says where it is written.
        if let Some(id) = self.next(graph, y)
            && let Some(perm) = graph.node(id).op.as_a::<Transpose>().and_then(|t| t.perm.as_ref())
            && perm.last() == Some(&(rank - 1))
            && let Some(turned) = out(id)
        {
            inner.push(y);
            absorbed.push(id);
            y = turned;
            perm.iter().enumerate().for_each(|(to, &from)| y_axes[from] = to);
        }
        let name = graph.node(*absorbed.last()?).name.clone();
        let op = FusedAttention { scale, axes: [q_axes, k_axes, v_axes, y_axes], pairs: false };
        let mut inputs = vec![Some(q), Some(k), Some(v)];
        inputs.extend(mask.map(Some));
        let tail = Tail { absorbed, inner, out: y, residual: None, clamp: Clamp::NONE };
        Some((tail, Node { name, op: Arc::new(op), inputs, outputs: vec![Some(y)] }))
    }
}
