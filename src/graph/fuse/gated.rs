//! Units that weigh a value by a function of it, as exporters spell them: `x · σ(αx)` (Swish, or SiLU),
//! `x · clip(x + 3, 0, 6) / 6` (HardSwish; or by a HardSigmoid) and `x · tanh(softplus(x))` (Mish).
//!
//! In one operator nothing but `x` is kept for the gradient.

use super::{Chains, Tail, activation, is_about, multiplied, operands, other, same_shape, scalar};
use crate::graph::{Graph, NodeId, ValueId};
use crate::ops::binary::Binary;
use crate::ops::unary::{HardSigmoid, HardSwish, Mish, Sigmoid, Softplus, Swish, Tanh, Unary};

impl Chains {
    /// Replaces the unit around the first node of its weight, if there is one.
    pub(super) fn fuse_gated(&mut self, graph: &mut Graph, gate: NodeId) {
        let fits = |tail: &Tail, x: ValueId| same_shape(graph, x, tail.out);
        if let Some((tail, x, alpha)) = self.swish(graph, gate).filter(|(tail, x, _)| fits(tail, *x)) {
            self.replace_by(graph, tail, Unary(Swish { alpha }), vec![Some(x)]);
        } else if let Some((tail, x)) = self.hard_swish(graph, gate).filter(|(tail, x)| fits(tail, *x)) {
            self.replace_by(graph, tail, Unary(HardSwish {}), vec![Some(x)]);
        } else if let Some((tail, x)) = self.mish(graph, gate).filter(|(tail, x)| fits(tail, *x)) {
            self.replace_by(graph, tail, Unary(Mish {}), vec![Some(x)]);
        }
    }

    /// From a sigmoid, perhaps of a multiple, on.
    fn swish(&self, graph: &Graph, sigmoid: NodeId) -> Option<(Tail, ValueId, f32)> {
        let node = graph.node(sigmoid);
        node.op.as_a::<Unary<Sigmoid>>()?;
        let (of, mut tail) = ((*node.inputs.first()?)?, Tail::of(sigmoid, node.output()?));
        let x = self.follow(graph, &mut tail, Binary::Mul)?;
        if x == of {
            return Some((tail, x, 1.0));
        }
        let scale = self.take(graph, &mut tail, of, 1)?;
        let (scaled, alpha) = multiplied(graph, scale)?;
        (scaled == x).then_some((tail, x, alpha as f32))
    }

    /// From a clip of x + 3, or from a HardSigmoid, on.
    fn hard_swish(&self, graph: &Graph, gate: NodeId) -> Option<(Tail, ValueId)> {
        let node = graph.node(gate);
        let (of, mut tail) = ((*node.inputs.first()?)?, Tail::of(gate, node.output()?));
        if let Some(Unary(HardSigmoid { alpha, beta })) = node.op.as_a() {
            let sixth = is_about(Some(f64::from(*alpha)), 1.0 / 6.0);
            let x = self.follow(graph, &mut tail, Binary::Mul)?;
            return (sixth && *beta == 0.5 && x == of).then_some((tail, x));
        }
        activation(graph, gate).filter(|clip| clip.low == 0.0 && clip.high == 6.0)?;
        let add = self.take(graph, &mut tail, of, 1)?;
        let (a, b) = operands(graph, add, Binary::Add)?;
        let is_three = |v: ValueId| scalar(graph, v) == Some(3.0);
        let x = if is_three(b) { a } else { Some(b).filter(|_| is_three(a))? };
        // Two factors follow, x and a sixth.
        let mut factors = [false; 2];
        for _ in 0..2 {
            let id = self.next(graph, tail.out)?;
            let by = multiplied(graph, id).filter(|(v, _)| *v == tail.out).map(|(_, by)| by);
            match is_about(by, 1.0 / 6.0) {
                true => factors[0] = true,
                false => factors[1] = other(graph, id, Binary::Mul, tail.out) == Some(x),
            }
            self.extend(graph, &mut tail, id).then_some(())?;
        }
        (factors == [true; 2]).then_some((tail, x))
    }

    /// From a softplus on.
    fn mish(&self, graph: &Graph, softplus: NodeId) -> Option<(Tail, ValueId)> {
        let node = graph.node(softplus);
        node.op.as_a::<Unary<Softplus>>()?;
        let (of, mut tail) = ((*node.inputs.first()?)?, Tail::of(softplus, node.output()?));
        let tanh = self.next(graph, tail.out)?;
        graph.node(tanh).op.as_a::<Unary<Tanh>>()?;
        self.extend(graph, &mut tail, tanh).then_some(())?;
        let x = self.follow(graph, &mut tail, Binary::Mul)?;
        (x == of).then_some((tail, x))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::fuse::tests::Spelled;
    use crate::ops::clip::Clip;

    impl Spelled {
        fn clipped(&mut self, more: f64) -> ValueId {
            let shifted = self.by(Binary::Add, self.x, more);
            self.emit(Clip { low: Some(0.0), high: Some(6.0) }, &[shifted])
        }

        fn spell(&mut self, spelling: &str) -> ValueId {
            let (x, other) = (self.x, self.other);
            let hard = |beta: f32| Unary(HardSigmoid { alpha: 1.0 / 6.0, beta });
            let gate = match spelling {
                "silu" | "silu, turned" | "gate read twice" => self.emit(Unary(Sigmoid {}), &[x]),
                "quick gelu" => {
                    let scaled = self.by(Binary::Mul, x, 1.702);
                    self.emit(Unary(Sigmoid {}), &[scaled])
                }
                "sigmoid of another" => self.emit(Unary(Sigmoid {}), &[other]),
                "hard sigmoid" => self.emit(hard(0.5), &[x]),
                "hard sigmoid, shifted" => self.emit(hard(0.4), &[x]),
                "clip, sixth, times" => {
                    let clipped = self.clipped(3.0);
                    self.by(Binary::Mul, clipped, 1.0 / 6.0)
                }
                "clip of x + 2" => self.clipped(2.0),
                "mish" => {
                    let softplus = self.emit(Unary(Softplus {}), &[x]);
                    self.emit(Unary(Tanh {}), &[softplus])
                }
                _ => self.clipped(3.0),
            };
            let turned = spelling.ends_with("turned");
            let weighed = self.emit(Binary::Mul, &if turned { [gate, x] } else { [x, gate] });
            match spelling {
                "clip, times, sixth" | "clip of x + 2" => self.by(Binary::Div, weighed, 6.0),
                "clip, times, seventh" => self.by(Binary::Div, weighed, 7.0),
                "gate read twice" => self.emit(Binary::Add, &[weighed, gate]),
                _ => weighed,
            }
        }
    }

    /// What exporters write becomes one operator; what only looks like it stays.
    #[test]
    fn spelled_out_units_become_one_operator() {
        let spellings = [
            ("silu", Some("Swish")),
            ("silu, turned", Some("Swish")),
            ("quick gelu", Some("Swish")),
            ("sigmoid of another", None),
            ("gate read twice", None),
            ("hard sigmoid", Some("HardSwish")),
            ("hard sigmoid, shifted", None),
            ("clip, times, sixth", Some("HardSwish")),
            ("clip, sixth, times", Some("HardSwish")),
            ("clip, times, seventh", None),
            ("clip of x + 2", None),
            ("mish", Some("Mish")),
        ];
        for (spelling, becomes) in spellings {
            Spelled::check(spelling, becomes, |s| s.spell(spelling));
        }
    }
}
