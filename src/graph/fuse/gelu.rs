//! The Gaussian error linear unit, as exporters before opset 20 spell it: `x · ½ · (1 + erf(x / √2))`, or by a hyperbolic tangent.

use std::f64::consts::FRAC_1_SQRT_2;

use super::{Chains, Tail, is_about, operands, same_shape, scalar};
use crate::graph::{Graph, NodeId, ValueId};
use crate::ops::binary::Binary;
use crate::ops::unary::{Erf, Gelu, GeluTanh, Tanh, Unary};

/// Coefficients of 1, x, x² and x³.
type Cubic = [f64; 4];

/// That a unit is spelled by, at most.
const NODES: usize = 16;
/// What the unit's function is applied to.
const OF_ERF: Cubic = [0.0, FRAC_1_SQRT_2, 0.0, 0.0];
const OF_TANH: Cubic = [0.0, GeluTanh::SCALE, 0.0, GeluTanh::SCALE * GeluTanh::CUBE];

impl Chains {
    /// The nodes around its function that make up a unit, whose argument is such a polynomial, and what the unit is applied to.
    fn gelu(&self, graph: &Graph, function: NodeId, of: Cubic) -> Option<(Tail, ValueId)> {
        let node = graph.node(function);
        let (argument, mut tail) = ((*node.inputs.first()?)?, Tail::of(function, node.output()?));
        let added = self.follow(graph, &mut tail, Binary::Add)?;
        is_about(scalar(graph, added), 1.0).then_some(())?;
        // Two factors follow, x and a half, one after the other or multiplied with each other before.
        let is_half = |v: ValueId| is_about(scalar(graph, v), 0.5);
        let halved = |id: NodeId| {
            let (a, b) = operands(graph, id, Binary::Mul)?;
            if is_half(b) { Some(a) } else { Some(b).filter(|_| is_half(a)) }
        };
        let factor = self.follow(graph, &mut tail, Binary::Mul)?;
        let mut longer = tail.clone();
        let x = if is_half(factor) {
            self.follow(graph, &mut tail, Binary::Mul)?
        } else if let Some(x) = self.take(graph, &mut longer, factor, 1).and_then(halved) {
            tail = longer;
            x
        } else {
            let half = self.follow(graph, &mut tail, Binary::Mul)?;
            is_half(half).then_some(factor)?
        };
        let argument = self.cubic(graph, &mut tail, argument, x)?;
        let alike = argument.iter().zip(of).all(|(a, b)| is_about(Some(*a), b));
        (alike && same_shape(graph, x, tail.out)).then_some((tail, x))
    }

    /// `v` as a polynomial in `x`, whose nodes are taken into the tail.
    fn cubic(&self, graph: &Graph, tail: &mut Tail, v: ValueId, x: ValueId) -> Option<Cubic> {
        if v == x {
            return Some([0.0, 1.0, 0.0, 0.0]);
        }
        if let Some(number) = scalar(graph, v) {
            return Some([number, 0.0, 0.0, 0.0]);
        }
        let id = self.take(graph, tail, v, 1).filter(|_| tail.absorbed.len() <= NODES)?;
        let op = graph.node(id).op.as_a::<Binary>()?;
        let (a, b) = operands(graph, id, *op)?;
        let base = self.cubic(graph, tail, a, x)?;
        if let (Binary::Pow, Some(exponent)) = (op, scalar(graph, b)) {
            return match exponent {
                2.0 => product(base, base),
                3.0 => product(base, product(base, base)?),
                _ => None,
            };
        }
        let with = self.cubic(graph, tail, b, x)?;
        match op {
            Binary::Add => Some(std::array::from_fn(|i| base[i] + with[i])),
            Binary::Mul => product(base, with),
            Binary::Div if with[1..] == [0.0; 3] => Some(base.map(|c| c / with[0])),
            _ => None,
        }
    }

    /// Replaces the unit around its function, if there is one.
    pub(super) fn fuse_gelu(&mut self, graph: &mut Graph, function: NodeId) {
        let op = &graph.node(function).op;
        if op.as_a::<Unary<Erf>>().is_some() {
            if let Some((tail, x)) = self.gelu(graph, function, OF_ERF) {
                self.replace_by(graph, tail, Unary(Gelu {}), vec![Some(x)]);
            }
        } else if op.as_a::<Unary<Tanh>>().is_some()
            && let Some((tail, x)) = self.gelu(graph, function, OF_TANH)
        {
            self.replace_by(graph, tail, Unary(GeluTanh {}), vec![Some(x)]);
        }
    }
}

/// None of a higher degree.
fn product(a: Cubic, b: Cubic) -> Option<Cubic> {
    let mut c = [0.0; 4];
    for (i, a) in a.iter().enumerate().filter(|(_, a)| **a != 0.0) {
        for (j, b) in b.iter().enumerate().filter(|(_, b)| **b != 0.0) {
            *c.get_mut(i + j)? += a * b;
        }
    }
    Some(c)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::fuse::tests::Spelled;

    impl Spelled {
        /// The function's argument.
        fn argument(&mut self, spelling: &str) -> ValueId {
            let x = self.x;
            match spelling {
                "quotient" => self.by(Binary::Div, x, 2f64.sqrt()),
                "product" => self.by(Binary::Mul, x, FRAC_1_SQRT_2),
                "half the root" => self.by(Binary::Mul, x, 0.5),
                "factored" => {
                    let cube = self.by(Binary::Mul, x, GeluTanh::CUBE);
                    let square = self.emit(Binary::Mul, &[cube, x]);
                    let sum = self.by(Binary::Add, square, 1.0);
                    let scaled = self.by(Binary::Mul, x, GeluTanh::SCALE);
                    self.emit(Binary::Mul, &[scaled, sum])
                }
                _ => {
                    let cube = match spelling {
                        "cube" => self.by(Binary::Pow, x, 3.0),
                        "square" => self.by(Binary::Pow, x, 2.0),
                        "fourth power" => self.by(Binary::Pow, x, 4.0),
                        _ => {
                            let square = self.emit(Binary::Mul, &[x, x]);
                            let by = if spelling == "of another" { self.other } else { x };
                            self.emit(Binary::Mul, &[by, square])
                        }
                    };
                    let scaled = self.by(Binary::Mul, cube, GeluTanh::CUBE);
                    let sum = self.emit(Binary::Add, &[x, scaled]);
                    let argument = self.by(Binary::Mul, sum, GeluTanh::SCALE);
                    if spelling == "read twice" {
                        self.other = sum;
                    }
                    argument
                }
            }
        }

        /// Half of x by 1 + `of`.
        fn weighed(&mut self, of: ValueId, order: &str, half: f64) -> ValueId {
            let (x, one) = (self.x, self.number(1.0));
            let sum = self.emit(Binary::Add, &[one, of]);
            match order {
                "before" => {
                    let before = self.by(Binary::Mul, x, half);
                    self.emit(Binary::Mul, &[before, sum])
                }
                "x last" => {
                    let first = self.by(Binary::Mul, sum, half);
                    self.emit(Binary::Mul, &[first, x])
                }
                _ => {
                    let first = self.emit(Binary::Mul, &[x, sum]);
                    self.by(Binary::Mul, first, half)
                }
            }
        }
    }

    /// The unit in the spellings of exporters, factors in any order; and what only looks like it.
    #[test]
    fn a_spelled_out_gelu_becomes_one_operator() {
        for order in ["before", "x last", "half last"] {
            for (argument, is) in
                [("quotient", true), ("product", true), ("half the root", false), ("cubes", false)]
            {
                for half in [0.5, 0.6] {
                    let becomes = (is && half == 0.5).then_some("Gelu");
                    Spelled::check(&format!("erf, {argument}, {order}, {half}"), becomes, |s| {
                        let of = s.argument(argument);
                        let erf = s.emit(Unary(Erf {}), &[of]);
                        s.weighed(erf, order, half)
                    });
                }
            }
            let tanh = [
                ("cube", true),
                ("cubes", true),
                ("factored", true),
                ("square", false),
                ("fourth power", false),
                ("of another", false),
                ("quotient", false),
                ("read twice", false),
            ];
            for (argument, is) in tanh {
                let becomes = is.then_some("Gelu");
                Spelled::check(&format!("tanh, {argument}, {order}"), becomes, |s| {
                    let of = s.argument(argument);
                    let tanh = s.emit(Unary(Tanh {}), &[of]);
                    let out = s.weighed(tanh, order, 0.5);
                    match argument {
                        "read twice" => s.emit(Binary::Max, &[out, s.other]),
                        _ => out,
                    }
                });
            }
        }
    }
}
