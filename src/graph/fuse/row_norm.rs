//! Normalisation of rows, where it is spelled as means, a root and a quotient: layer normalisation, as exporters write it for
//! opsets before 17, and division by the root mean square.

use super::{Chains, Tail, operands, same_shape, scalar};
use crate::graph::{Graph, NodeId, ValueId};
use crate::ops::binary::Binary;
use crate::ops::norm::RowNorm;
use crate::ops::reduce::{Kind, Reduce};
use crate::ops::unary::{Reciprocal, Sqrt, Unary};
use crate::tensor::DType;

/// What a node is the mean of, and the first of the last axes that it goes over, which stay as ones.
fn mean(graph: &Graph, id: NodeId) -> Option<(ValueId, usize)> {
    let node = graph.node(id);
    let (x, y) = ((*node.inputs.first()?)?, node.output()?);
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

/// What is normalised, from which axis on, and how.
struct Rows {
    x: ValueId,
    axis: usize,
    epsilon: f64,
    /// Is the mean subtracted?
    centred: bool,
}

impl Chains {
    /// The nodes around a root that normalise rows.
    fn rows(&self, graph: &Graph, root: NodeId) -> Option<(Tail, Rows)> {
        let node = graph.node(root);
        let (sum, deviation) = ((*node.inputs.first()?)?, node.output()?);
        let mut tail = Tail::of(root, deviation);
        // Of the mean of squares and a little more.
        let add = self.take(graph, &mut tail, sum, 1)?;
        let (a, b) = operands(graph, add, Binary::Add)?;
        let (variance, epsilon) = match (scalar(graph, a), scalar(graph, b)) {
            (_, Some(epsilon)) => (a, epsilon),
            (Some(epsilon), _) => (b, epsilon),
            _ => return None,
        };
        let reduce = self.take(graph, &mut tail, variance, 1)?;
        let (squares, axis) = mean(graph, reduce)?;
        let of = self.take(graph, &mut tail, squares, 1)?;
        let (x, reads) = square(graph, of)?;
        // Divided by the root, or multiplied by its inverse.
        let next = self.next(graph, deviation)?;
        self.extend(graph, &mut tail, next).then_some(())?;
        let quotient = operands(graph, next, Binary::Div);
        if quotient != Some((x, deviation)) {
            let inverse = match quotient {
                Some((one, by)) => by == deviation && scalar(graph, one) == Some(1.0),
                None => graph.node(next).op.as_a::<Unary<Reciprocal>>().is_some(),
            };
            let factor = self.follow(graph, &mut tail, Binary::Mul).filter(|_| inverse)?;
            (factor == x).then_some(())?;
        }
        // Of what is left without its mean, or of all there is.
        let mut longer = tail.clone();
        let whole = self.take(graph, &mut longer, x, reads + 1).and_then(|id| {
            let (whole, by) = operands(graph, id, Binary::Sub)?;
            let of = self.take(graph, &mut longer, by, 1)?;
            (mean(graph, of)? == (whole, axis)).then_some(whole)
        });
        Some(match whole {
            Some(x) => (longer, Rows { x, axis, epsilon, centred: true }),
            None => (tail, Rows { x, axis, epsilon, centred: false }),
        })
    }

    /// Replaces the normalisation around a root, if there is one.
    pub(super) fn fuse_row_norm(&mut self, graph: &mut Graph, root: NodeId) -> Option<()> {
        graph.node(root).op.as_a::<Unary<Sqrt>>()?;
        let (mut tail, Rows { x, axis, epsilon, centred }) = self.rows(graph, root)?;
        let meta = graph.value(x).meta.clone()?;
        if !matches!(meta.dtype, DType::F32 | DType::F64) || !same_shape(graph, x, tail.out) {
            return None;
        }
        // Perhaps a scale and a shift along the rows.
        let row = &meta.dims[axis..];
        let along = |d: &[usize]| !d.is_empty() && row.ends_with(d);
        let found = self.scale_and_shift(graph, &mut tail, centred, along);
        let (scale, shift) = found.unwrap_or_else(|| (self.ones(graph, meta.dtype, row), None));
        let op = match centred {
            true => RowNorm::layer(axis as i64, epsilon as f32),
            false => RowNorm::rms(axis as i64, epsilon as f32),
        };
        self.replace_by(graph, tail, op, [x, scale].into_iter().chain(shift).map(Some).collect());
        Some(())
    }
}
