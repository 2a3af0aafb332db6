//! Sums of products.

use std::sync::Arc;

use super::uses::Uses;
use crate::graph::{Graph, Node, Source};
use crate::ops::binary::Binary;
use crate::ops::reduce::{SumProduct, SumTo};
use crate::plan::Request;

/// Where nobody else reads the products that a sum over rows of channels is of, it multiplies by itself: as the gradient of a factor for
/// each channel, such as a squeeze-and-excitation block's.
pub fn join_products(graph: &mut Graph, request: &Request) {
    let mut uses = Uses::of(graph, request);
    for i in 0..graph.nodes.len() {
        uses.product(graph, i);
    }
}

impl Uses {
    fn product(&mut self, graph: &mut Graph, i: usize) -> Option<()> {
        let node = &graph.nodes[i];
        let sum = node.op.as_a::<SumTo>()?;
        let products = (*node.inputs.first()?)?;
        let Source::Node(id, 0) = graph.value(products).source else { return None };
        let from = graph.node(id);
        from.op.as_a::<Binary>().filter(|op| **op == Binary::Mul)?;
        let meta = graph.value(products).meta.as_ref().filter(|m| m.dtype.is_float())?;
        let whole = |v: &Option<_>| {
            v.is_some_and(|v| graph.value(v).meta.as_ref().is_some_and(|m| m.same_shape(meta)))
        };
        if !self.only_in(products, i) || !from.inputs.iter().all(whole) {
            return None;
        }
        let op = Arc::new(SumProduct::of(sum, &meta.dims)?);
        let made = Node { op, inputs: from.inputs.clone(), ..node.clone() };
        self.remove(graph, id.index());
        self.put(graph, i, made);
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::exec::reference::interpret;
    use crate::ops::cases::close;
    use crate::tensor::{Dims, Tensor};

    /// Which sums of products are joined, and that they are what they were.
    #[test]
    fn sums_multiply_by_themselves() {
        let cases: [(&[usize], &[usize], bool); 9] = [
            (&[2, 3, 4, 5], &[2, 1, 1, 5], true),
            (&[2, 3, 4, 5], &[5], true),
            (&[2, 3, 4, 5], &[1, 1, 5], true),
            (&[3, 300, 130], &[3, 1, 130], true),
            (&[1, 9, 700], &[1, 1, 700], true),
            (&[2, 0, 5], &[2, 1, 5], true),
            (&[2, 3, 4, 5], &[2, 3, 1, 1], false),
            (&[2, 3, 4, 5], &[3, 1, 5], false),
            (&[2, 3, 4, 5], &[], false),
        ];
        for ((dims, to, joins), kept) in cases.iter().flat_map(|case| [(case, false), (case, true)]) {
            let of = |step: f64| {
                let x: Vec<f64> =
                    (0..dims.iter().product()).map(|i: usize| (i as f64 * step).sin()).collect();
                Tensor::from_slice(dims, &x).unwrap()
            };
            let (a, b) = (of(0.7), of(0.3));
            let mut graph = Graph::default();
            let inputs = ["a", "b"].map(|name| graph.add_input(name, a.meta()));
            let mut emit = |op: Arc<dyn crate::ops::Op>, inputs: &[_]| {
                let inputs: Vec<_> = inputs.iter().copied().map(Some).collect();
                graph.emit("", op, &inputs, 1).unwrap()[0]
            };
            let products = emit(Arc::new(Binary::Mul), &inputs);
            let sum = emit(Arc::new(SumTo { dims: Dims::from_slice(to) }), &[products]);
            graph.outputs = vec![sum];
            graph.outputs.extend(kept.then_some(products));
            let feeds = HashMap::from([(inputs[0], a), (inputs[1], b)]);
            let outputs = graph.outputs.clone();
            let expected = interpret(&graph, &feeds, &outputs).unwrap();
            join_products(&mut graph, &Request { outputs: outputs.clone(), ..Request::default() });
            let joined = graph.nodes.iter().any(|n| n.op.name() == "SumProduct");
            assert_eq!(joined, *joins && !kept, "{dims:?} to {to:?}");
            graph.nodes.retain(|n| !n.outputs.is_empty());
            graph.renumber();
            let got = interpret(&graph, &feeds, &outputs).unwrap();
            for (got, expected) in got.iter().zip(&expected) {
                close("sum", &format!("{dims:?} to {to:?}"), &expected.to_f64(), &got.to_f64(), 1e-12);
            }
        }
    }
}
