//! Products by the transpose of a matrix, which exporters write for dense layers, read the matrix as it lies.

use std::sync::Arc;

use super::source;
use crate::graph::{Graph, ValueId};
use crate::ops::matmul::MatMul;
use crate::ops::transpose::Transpose;

/// The matrix that a value is the transpose of.
fn untransposed(graph: &Graph, v: ValueId) -> Option<ValueId> {
    let node = graph.node(source(graph, v)?);
    let turned = node.op.as_a::<Transpose>()?.perm.as_ref().is_none_or(|perm| perm[..] == [1, 0]);
    let x = node.inputs.first().copied().flatten()?;
    let meta = graph.value(x).meta.as_ref()?;
    (turned && meta.rank() == 2 && meta.dtype.is_float()).then_some(x)
}

/// Lets products do without transposes, which nobody may need then.
pub(super) fn read_as_they_lie(graph: &mut Graph) {
    for i in 0..graph.nodes.len() {
        let node = &graph.nodes[i];
        if let Some(op) = node.op.as_a::<MatMul>().filter(|m| !m.trans_b)
            && let Some(matrix) = node.inputs.get(1).copied().flatten().and_then(|b| untransposed(graph, b))
        {
            let op = MatMul { trans_b: true, ..*op };
            let node = &mut graph.nodes[i];
            (node.op, node.inputs[1]) = (Arc::new(op), Some(matrix));
        }
    }
}
