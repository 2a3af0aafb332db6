//! Low-rank additions computed beside their layer: `y = x·W + s·(x·L)·R` instead of `x·(W + s·L·R)`.
//!
//! The sum of the weights is one small product whatever the batch, and runs everywhere; but its gradient comes from the
//! gradient of the whole weight, a product as large as the layer's own, and holds two more tensors of the weight's size.
//! Beside the layer, nothing of that size is computed or kept: the gradient's two products have `rank` rows or columns.
//! So where the weights learn, a layer is rewritten if that takes fewer multiply-adds; where they do not (evaluation, the
//! perturbation of inputs), the merged weight is as good, and the layer stays what it was to all other passes.

use std::sync::Arc;

use crate::error::{Error, OpError, Result};
use crate::graph::{Graph, Node, NodeId, Source, ValueId};
use crate::ops::Op;
use crate::ops::binary::Binary;
use crate::ops::conv::Conv;
use crate::ops::matmul::{Gemm, MatMul};
use crate::ops::part::LowRank;
use crate::tensor::{DType, Tensor};

/// Rewrites the layers of a graph whose shapes are inferred.
pub(super) fn beside(graph: &mut Graph) -> Result<()> {
    let found: Vec<Option<Layer>> =
        (0..graph.nodes.len()).map(|i| Layer::of(graph, NodeId(i as u32))).collect();
    if found.iter().all(Option::is_none) {
        return Ok(());
    }
    for (node, layer) in std::mem::take(&mut graph.nodes).into_iter().zip(found) {
        let Some(layer) = layer else {
            graph.nodes.push(node);
            continue;
        };
        let name = graph.value(layer.y).name.clone();
        let done = layer.rewrite(graph, node);
        done.map_err(|source| Error::Op { node: format!("low-rank addition of '{name}'"), source })?;
    }
    graph.renumber();
    Ok(())
}

/// A layer whose weight is a sum, with that sum's operands.
struct Layer {
    kind: Kind,
    scale: f32,
    frozen: ValueId,
    /// The factor that the input meets first, and the other.
    first: ValueId,
    second: ValueId,
    y: ValueId,
}

enum Kind {
    MatMul(MatMul),
    Gemm(Gemm),
    Conv(Conv),
}

/// Multiply-adds of learning by a sum of weights (its forward and the gradients of sum, whole weight and factors), and
/// beside the layer, of one that takes `k` features of `rows` places to `n`.
fn costs(rows: usize, k: usize, n: usize, rank: usize) -> [usize; 2] {
    [rows * k * n + 3 * k * n * rank, 3 * rows * rank * (k + n)]
}

impl Layer {
    fn of(graph: &Graph, id: NodeId) -> Option<Layer> {
        let node = graph.node(id);
        let &[Some(x), Some(w), ..] = &node.inputs[..] else { return None };
        let Source::Node(sum, 0) = graph.value(w).source else { return None };
        let low = graph.node(sum).op.as_a::<LowRank>()?;
        let &[Some(frozen), Some(left), Some(right)] = &graph.node(sum).inputs[..] else { return None };
        let y = node.output()?;
        let (x, made) = (graph.value(x).meta.as_ref()?, graph.value(y).meta.as_ref()?);
        // Does the weight's first axis go with the input?
        let (kind, input_first) = if let Some(product) = node.op.as_a::<MatMul>() {
            let plain = product.alpha == 1.0 && node.inputs.len() == 2 && x.rank() >= 2;
            plain.then_some((Kind::MatMul(*product), !product.trans_b))?
        } else if let Some(gemm) = node.op.as_a::<Gemm>() {
            (!gemm.trans_a).then(|| (Kind::Gemm(gemm.clone()), !gemm.trans_b))?
        } else {
            let conv = node.op.as_a::<Conv>()?;
            let plain = conv.groups == 1 && conv.is_plain() && node.inputs.len() <= 3;
            plain.then(|| (Kind::Conv(conv.clone()), false))?
        };
        let (k, n) = if input_first { (low.rows, low.columns) } else { (low.columns, low.rows) };
        let [merged, beside] = costs(made.len() / n.max(1), k, n, low.rank);
        if beside >= merged {
            return None;
        }
        let (first, second) = if input_first { (left, right) } else { (right, left) };
        Some(Layer { kind, scale: low.scale, frozen, first, second, y })
    }

    /// Appends the layer with its frozen weight, and what is added to its result.
    fn rewrite(self, graph: &mut Graph, mut node: Node) -> std::result::Result<(), OpError> {
        let Layer { kind, scale, frozen, first, second, y } = self;
        let x = node.inputs[0];
        node.inputs[1] = Some(frozen);
        let name = graph.value(y).name.clone();
        let meta = graph.value(y).meta.clone();
        let dtype = meta.as_ref().map_or(DType::F32, |m| m.dtype);
        let plain = graph.add_value(format!("{name}#frozen"), Source::Node(NodeId(0), 0));
        graph.value_mut(plain).meta = meta;
        node.outputs[0] = Some(plain);
        graph.nodes.push(node);
        let plain = Some(plain);
        let (first, second) = (Some(first), Some(second));
        // t = x·A, and y = s·t·B + x·W
        match kind {
            Kind::MatMul(product) => {
                let t = emit(graph, &name, product, &[x, first])?;
                let op = MatMul { alpha: scale, ..product };
                append(graph, Arc::new(op), &[t, second, None, plain], y)
            }
            Kind::Gemm(gemm) => {
                let product = Gemm { alpha: 1.0, beta: 1.0, ..gemm.clone() };
                let t = emit(graph, &name, product.clone(), &[x, first])?;
                let op = Gemm { alpha: scale * gemm.alpha, ..product };
                append(graph, Arc::new(op), &[t, second, plain], y)
            }
            Kind::Conv(conv) => {
                let back = conv.pointwise();
                let mut t = emit(graph, &name, conv, &[x, first])?;
                if scale != 1.0 {
                    let scale = graph.add_constant("low-rank scale", Tensor::scalar(scale).cast(dtype));
                    t = emit(graph, &name, Binary::Mul, &[t, Some(scale)])?;
                }
                let added = emit(graph, &name, back, &[t, second])?;
                append(graph, Arc::new(Binary::Add), &[plain, added], y)
            }
        }
    }
}

fn emit(
    graph: &mut Graph,
    name: &str,
    op: impl Op + 'static,
    inputs: &[Option<ValueId>],
) -> std::result::Result<Option<ValueId>, OpError> {
    Ok(graph.emit(&format!("{name}/low-rank"), Arc::new(op), inputs, 1)?.first().copied())
}

/// Appends a node that computes `y`, which has its shape already.
fn append(
    graph: &mut Graph,
    op: Arc<dyn Op>,
    inputs: &[Option<ValueId>],
    y: ValueId,
) -> std::result::Result<(), OpError> {
    let metas = graph.metas(inputs);
    let made = op.infer(&metas)?;
    let same = graph.value(y).meta.as_ref().zip(made.first()).is_some_and(|(a, b)| a.same_shape(b));
    if !same {
        return Err(OpError::Internal(format!("{op:?} gives {made:?}")));
    }
    graph.nodes.push(Node { name: String::new(), op, inputs: inputs.to_vec(), outputs: vec![Some(y)] });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_places_are_learned_by_the_sum_and_many_beside_it() {
        let beside = |rows, k, n, rank| {
            let [merged, beside] = costs(rows, k, n, rank);
            beside < merged
        };
        // A transformer's projection of 2048 tokens, and of one.
        assert!(beside(2048, 384, 384, 8) && beside(1, 384, 384, 8));
        // A rank near the layer's sides: the whole gradient costs less.
        assert!(!beside(2048, 16, 16, 8));
        assert!(beside(1, 16, 16, 8));
    }
}
