//! Normalisation of rows, where it is spelled as means, a root and a quotient: layer normalisation, as exporters write it for
//! opsets before 17, and division by the root mean square.

use std::sync::Arc;

use smallvec::SmallVec;

use super::{Chains, Tail, operands, other, same_shape, scalar, source};
use crate::graph::{Graph, Node, NodeId, ValueId};
use crate::kernels::elementwise::Clamp;
use crate::ops::binary::Binary;
use crate::ops::norm::SampleNorm;
use crate::ops::reduce::{Kind, Reduce};
use crate::ops::unary::{Reciprocal, Sqrt, Unary};
use crate::tensor::{DType, Tensor};

/// What a node is the mean of, and the first of the last axes that it goes over, which stay as ones.
fn mean(graph: &Graph, id: NodeId) -> Option<(ValueId, usize)> {
    let node = graph.node(id);
    let (x, y) = ((*node.inputs.first()?)?, (*node.outputs.first()?)?);
    let dims = |v: ValueId| graph.value(v).meta.as_ref().map(|m| &m.dims);
    let (from, to) = (dims(x)?, dims(y)?);
    let axis = to.iter().rposition(|d| *d != 1).map_or(0, |last| last + 1);
    let over_rows = from.len() == to.len() && axis < from.len() && from[..axis] == to[..axis];
    (node.op.as_a::<Reduce>()?.kind == Kind::Mean && over_rows).then_some((x, axis))
}

/// What a node is the square of, and how often it reads that.
fn square(graph: &Graph, id: NodeId) -> Option<(ValueId, usize)> {
    if let Some((x, power)) = operands(graph, id, Binary::Pow) {
        return (scalar(graph, power) == Some(2.0)).then_some((x, 1));
    }
    let (x, same) = operands(graph, id, Binary::Mul)?;
    (x == same).then_some((x, 2))
}

/// The nodes that a search has found to become one, and the values that vanish.
#[derive(Default)]
struct Found {
    nodes: SmallVec<[NodeId; 4]>,
    inner: SmallVec<[ValueId; 4]>,
}

impl Chains {
    /// The node that makes a value which is read so often and will vanish.
    fn take(&self, graph: &Graph, found: &mut Found, v: ValueId, reads: usize) -> Option<NodeId> {
        let id = source(graph, v).filter(|id| !self.dead[id.index()] && self.reads[v.index()].0 == reads)?;
        found.nodes.push(id);
        found.inner.push(v);
        Some(id)
    }

    /// The normalisation around a root.
    fn row_norm(&self, graph: &mut Graph, root: NodeId) -> Option<(Tail, Node)> {
        let out = |graph: &Graph, id: NodeId| graph.node(id).outputs.first().copied().flatten();
        let mut found = Found::default();
        // Of the mean of squares and a little more.
        let sum = graph.node(root).inputs.first().copied().flatten()?;
        let add = self.take(graph, &mut found, sum, 1)?;
        let (a, b) = operands(graph, add, Binary::Add)?;
        let (variance, epsilon) = match (scalar(graph, a), scalar(graph, b)) {
            (_, Some(epsilon)) => (a, epsilon),
            (Some(epsilon), _) => (b, epsilon),
            _ => return None,
        };
        let reduce = self.take(graph, &mut found, variance, 1)?;
        let (squares, axis) = mean(graph, reduce)?;
        let of = source(graph, squares)?;
        let (centred, reads) = square(graph, of)?;
        self.take(graph, &mut found, squares, 1)?;
        // Divided by the root, or multiplied by its inverse.
        let deviation = out(graph, root)?;
        let mut last = self.next(graph, deviation)?;
        found.nodes.push(root);
        found.inner.push(deviation);
        let inverse = match operands(graph, last, Binary::Div) {
            Some((one, by)) if by == deviation => scalar(graph, one) == Some(1.0),
            Some(_) => return None,
            None => graph.node(last).op.as_a::<Unary<Reciprocal>>().is_some(),
        };
        if inverse {
            let inverse = out(graph, last)?;
            found.nodes.push(last);
            found.inner.push(inverse);
            last = self.next(graph, inverse)?;
            (other(graph, last, Binary::Mul, inverse)? == centred).then_some(())?;
        } else {
            (operands(graph, last, Binary::Div)? == (centred, deviation)).then_some(())?;
        }
        // Of what is left without its mean, or of all there is.
        let mut x = centred;
        let mut layer = false;
        if let Some((whole, by)) = source(graph, centred).and_then(|id| operands(graph, id, Binary::Sub))
            && let Some(found_mean) = source(graph, by).and_then(|id| mean(graph, id))
            && found_mean == (whole, axis)
        {
            let mut both = Found::default();
            if self.take(graph, &mut both, centred, reads + 1).is_some()
                && self.take(graph, &mut both, by, 1).is_some()
            {
                found.nodes.extend(both.nodes);
                found.inner.extend(both.inner);
                (x, layer) = (whole, true);
            }
        }
        let (meta, mut y) = (graph.value(x).meta.clone()?, out(graph, last)?);
        if !matches!(meta.dtype, DType::F32 | DType::F64) || !same_shape(graph, x, y) {
            return None;
        }
        // Perhaps a scale and a shift along the rows.
        let along = |graph: &Graph, v: ValueId| {
            let m = graph.value(v).meta.as_ref()?;
            let fits = m.rank() > 0 && m.rank() <= meta.rank() - axis && meta.dims.ends_with(&m.dims);
            fits.then(|| m.dims.clone())
        };
        let follows = |graph: &Graph, y: ValueId, kind: Binary| {
            let id = self.next(graph, y)?;
            let v = other(graph, id, kind, y)?;
            Some((id, v, along(graph, v)?, out(graph, id)?))
        };
        let mut shift = None;
        let scale = match follows(graph, y, Binary::Mul) {
            Some((id, scale, dims, scaled)) => {
                found.nodes.push(last);
                found.inner.push(y);
                (last, y) = (id, scaled);
                if layer
                    && let Some((id, v, same, shifted)) = follows(graph, y, Binary::Add)
                    && same == dims
                {
                    found.nodes.push(last);
                    found.inner.push(y);
                    (last, y, shift) = (id, shifted, Some(v));
                }
                scale
            }
            None => {
                let dims = &meta.dims[axis..];
                let ones = Tensor::from_slice(dims, &vec![1f64; dims.iter().product()]).ok()?;
                graph.add_constant("ones", ones.cast(meta.dtype))
            }
        };
        let op = match layer {
            true => SampleNorm::layer(axis as i64, epsilon as f32),
            false => SampleNorm::rms(axis as i64, epsilon as f32),
        };
        found.nodes.push(last);
        let inputs = [x, scale].into_iter().chain(shift).map(Some).collect();
        let name = graph.node(last).name.clone();
        let tail =
            Tail { absorbed: found.nodes, inner: found.inner, out: y, residual: None, clamp: Clamp::NONE };
        Some((tail, Node { name, op: Arc::new(op), inputs, outputs: vec![Some(y)] }))
    }

    /// Replaces the normalisation around a root, if there is one.
    pub(super) fn fuse_row_norm(&mut self, graph: &mut Graph, root: NodeId) {
        if graph.node(root).op.as_a::<Unary<Sqrt>>().is_some()
            && let Some((tail, node)) = self.row_norm(graph, root)
        {
            self.replace(graph, &tail, SmallVec::from_iter([node]));
        }
    }
}
