//! The Gaussian error linear unit, as exporters before opset 20 spell it: `x · ½ · (1 + erf(x / √2))`.

use std::f64::consts::{FRAC_1_SQRT_2, SQRT_2};

use super::{Chains, Tail, is_about, operands, other, same_shape, scalar};
use crate::graph::{Graph, NodeId, ValueId};
use crate::ops::binary::Binary;
use crate::ops::unary::{Erf, Gelu, Unary};

impl Chains {
    /// The nodes around an error function that make up the unit, and what it is applied to.
    fn gelu(&self, graph: &Graph, erf: NodeId) -> Option<(Tail, ValueId)> {
        let node = graph.node(erf);
        let (scaled, mut tail) = ((*node.inputs.first()?)?, Tail::of(erf, node.output()?));
        let scale = self.take(graph, &mut tail, scaled, 1)?;
        let x = match operands(graph, scale, Binary::Div) {
            Some((x, by)) if is_about(scalar(graph, by), SQRT_2) => x,
            _ => {
                let (a, b) = operands(graph, scale, Binary::Mul)?;
                let by = |v: ValueId| is_about(scalar(graph, v), FRAC_1_SQRT_2);
                if by(b) { a } else { Some(b).filter(|_| by(a))? }
            }
        };
        let added = self.follow(graph, &mut tail, Binary::Add)?;
        is_about(scalar(graph, added), 1.0).then_some(())?;
        // Two factors follow, x and a half, one after the other or multiplied with each other before.
        let is_half = |v: ValueId| is_about(scalar(graph, v), 0.5);
        let factor = self.follow(graph, &mut tail, Binary::Mul)?;
        let fits = if factor == x || is_half(factor) {
            let rest = self.follow(graph, &mut tail, Binary::Mul)?;
            if factor == x { is_half(rest) } else { rest == x }
        } else {
            let before = self.take(graph, &mut tail, factor, 1)?;
            other(graph, before, Binary::Mul, x).is_some_and(is_half)
        };
        (fits && same_shape(graph, x, tail.out)).then_some((tail, x))
    }

    /// Replaces the unit around an error function, if there is one.
    pub(super) fn fuse_gelu(&mut self, graph: &mut Graph, erf: NodeId) {
        if graph.node(erf).op.as_a::<Unary<Erf>>().is_some()
            && let Some((tail, x)) = self.gelu(graph, erf)
        {
            self.replace_by(graph, tail, Unary(Gelu {}), vec![Some(x)]);
        }
    }
}
