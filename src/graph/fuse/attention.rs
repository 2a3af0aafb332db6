//! Attention, where it is spelled as a product, a softmax and a product: one operator that keeps no matrix of scores.

use std::sync::Arc;

use super::{Chains, Tail, operands, same_shape, source};
use crate::graph::{Graph, NodeId, ValueId};
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
    /// Lets a softmax that only a product reads, as in attention that is not fused, do without what vanishes in it.
    pub(super) fn weigh(&self, graph: &mut Graph, softmax: NodeId) -> Option<()> {
        let node = graph.node(softmax);
        let op = node.op.as_a::<Softmax>()?.weighing().filter(|_| !self.dead[softmax.index()])?;
        graph.node(self.next(graph, node.output()?)?).op.as_a::<MatMul>()?;
        graph.nodes[softmax.index()].op = Arc::new(op);
        Some(())
    }

    /// Replaces the attention around a softmax, if there is one.
    pub(super) fn fuse_attention(&mut self, graph: &mut Graph, softmax: NodeId) -> Option<()> {
        let node = graph.node(softmax);
        let (scores, p) = ((*node.inputs.first()?)?, node.output()?);
        let meta = graph.value(scores).meta.as_ref()?;
        let rank = meta.dims.len();
        let float = matches!(meta.dtype, DType::F32 | DType::F64);
        if !(node.op.as_a::<Softmax>()?.over_rows(rank) && float && (3..=4).contains(&rank)) {
            return None;
        }
        let mut tail = Tail::of(softmax, p);
        // The scores: a product, perhaps with a mask added.
        let first = self.take(graph, &mut tail, scores, 1)?;
        let (q, kt, scale, mask) = match product(graph, first) {
            Some(of) => of,
            None => {
                let (a, b) = operands(graph, first, Binary::Add)?;
                let of = |v: ValueId| {
                    let id = source(graph, v).filter(|_| same_shape(graph, v, scores))?;
                    product(graph, id).filter(|of| of.3.is_none() && self.passing(v)).map(|of| (v, of))
                };
                let ((inside, (q, kt, scale, _)), mask) = match of(a) {
                    Some(found) => (found, b),
                    None => (of(b)?, a),
                };
                self.take(graph, &mut tail, inside, 1)?;
                (q, kt, scale, Some(mask))
            }
        };
        let last = self.next(graph, p)?;
        let (a, v, alpha, added) = product(graph, last)?;
        if a != p || alpha != 1.0 || added.is_some() || !self.extend(graph, &mut tail, last) {
            return None;
        }
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
        let mut y_axes = plain;
        // A transposition of the result only says where it is written.
        if let Some(id) = self.next(graph, tail.out)
            && let Some(perm) = graph.node(id).op.as_a::<Transpose>().and_then(|t| t.perm.as_ref())
            && perm.last() == Some(&(rank - 1))
            && self.extend(graph, &mut tail, id)
        {
            perm.iter().enumerate().for_each(|(to, &from)| y_axes[from] = to);
        }
        let op = FusedAttention { scale, axes: [q_axes, k_axes, v_axes, y_axes], pairs: false };
        let mut inputs = vec![Some(q), Some(k), Some(v)];
        inputs.extend(mask.map(Some));
        self.replace_by(graph, tail, op, inputs);
        Some(())
    }
}
