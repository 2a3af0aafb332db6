//! The Gaussian error linear unit, as exporters before opset 20 spell it: `x · ½ · (1 + erf(x / √2))`.

use std::f64::consts::{FRAC_1_SQRT_2, SQRT_2};
use std::sync::Arc;

use smallvec::SmallVec;

use super::{Chains, Tail, operands, other, scalar, source};
use crate::graph::{Graph, Node, NodeId, ValueId};
use crate::kernels::elementwise::Clamp;
use crate::ops::binary::Binary;
use crate::ops::unary::{Erf, Gelu, Unary};

fn is_about(x: Option<f64>, y: f64) -> bool {
    x.is_some_and(|x| (x - y).abs() < 1e-6)
}

impl Chains {
    /// The nodes around an error function that make up the unit, and what it is applied to.
    fn gelu(&self, graph: &Graph, erf: NodeId) -> Option<(Tail, ValueId)> {
        let out = |id: NodeId| graph.node(id).outputs.first().copied().flatten();
        let scaled = (*graph.node(erf).inputs.first()?)?;
        let scale = source(graph, scaled).filter(|_| self.passing(scaled))?;
        let x = match operands(graph, scale, Binary::Div) {
            Some((x, by)) if is_about(scalar(graph, by), SQRT_2) => x,
            _ => {
                let (a, b) = operands(graph, scale, Binary::Mul)?;
                let by = |v: ValueId| is_about(scalar(graph, v), FRAC_1_SQRT_2);
                if by(b) { a } else { Some(b).filter(|_| by(a))? }
            }
        };
        let next = |v: ValueId| self.next(graph, v);
        let one = next(out(erf)?)?;
        let added = other(graph, one, Binary::Add, out(erf)?)?;
        let sum = out(one).filter(|_| is_about(scalar(graph, added), 1.0))?;
        // Two factors follow, x and a half, one after the other or multiplied with each other before.
        let is_half = |v: ValueId| is_about(scalar(graph, v), 0.5);
        let first = next(sum)?;
        let factor = other(graph, first, Binary::Mul, sum)?;
        let mut absorbed: SmallVec<[NodeId; 4]> = SmallVec::from_slice(&[scale, erf, one, first]);
        let mut inner: SmallVec<[ValueId; 4]> = SmallVec::from_slice(&[scaled, out(erf)?, sum]);
        if factor == x || is_half(factor) {
            let product = out(first)?;
            let second = next(product)?;
            let rest = other(graph, second, Binary::Mul, product)?;
            (if factor == x { is_half(rest) } else { rest == x }).then_some(())?;
            inner.push(product);
            absorbed.push(second);
        } else {
            let before = source(graph, factor).filter(|_| self.passing(factor))?;
            other(graph, before, Binary::Mul, x).filter(|v| is_half(*v))?;
            inner.push(factor);
            absorbed.insert(0, before);
        }
        let last = *absorbed.last()?;
        let whole = graph.node(last).outputs.len() == 1 && super::same_shape(graph, x, out(last)?);
        let tail = Tail { absorbed, inner, out: out(last)?, residual: None, clamp: Clamp::NONE };
        whole.then_some((tail, x))
    }

    /// Replaces the unit around an error function, if there is one.
    pub(super) fn fuse_gelu(&mut self, graph: &mut Graph, erf: NodeId) {
        if graph.node(erf).op.as_a::<Unary<Erf>>().is_none() {
            return;
        }
        if let Some((tail, x)) = self.gelu(graph, erf) {
            let name = tail.absorbed.last().map_or(String::new(), |id| graph.node(*id).name.clone());
            let node = Node {
                name,
                op: Arc::new(Unary(Gelu {})),
                inputs: vec![Some(x)],
                outputs: vec![Some(tail.out)],
            };
            self.replace(graph, &tail, SmallVec::from_iter([node]));
        }
    }
}
