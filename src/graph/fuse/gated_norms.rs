//! Batch normalisations with an activation that follows and does more than to clamp, and the gradients of both.

use super::uses::Uses;
use crate::graph::{Graph, Node, ValueId};
use crate::ops::batch_norm::{BatchNormalization, ChannelParamGrad, Gated};
use crate::ops::unary::{LeakyRelu, Unary, UnaryGrad};
use crate::plan::Request;

/// In a differentiated graph: an activation such as Swish computes its operand from what the normalisation in front reads, forward and
/// for the gradient, where channels lie last and nobody else reads that operand.
pub fn join_gated_norms(graph: &mut Graph, request: &Request) {
    let mut uses = Uses::of(graph, request);
    for i in 0..graph.nodes.len() {
        uses.gate(graph, i);
    }
}

impl Uses {
    /// If node `i` is such a normalisation, it makes nothing but its statistics.
    fn gate(&mut self, graph: &mut Graph, i: usize) -> Option<()> {
        let from = &graph.nodes[i];
        let norm = from.op.as_a::<BatchNormalization>()?;
        let (&[Some(x), scale @ Some(_), shift @ Some(_), ..], true) =
            (&from.inputs[..], norm.is_plain(from.inputs.len()))
        else {
            return None;
        };
        let &[Some(z), _, _, mean @ Some(_), inv @ Some(_)] = &from.outputs[..] else { return None };
        let gated = Gated::behind(norm, graph.value(x).meta.as_ref()?)?;
        let readers = self.all_of(z)?;
        let mut reads: Vec<(usize, ValueId)> = readers.iter().map(|r| (*r, z)).collect();
        for r in readers {
            let node = &graph.nodes[*r];
            if node.op.as_a::<Unary<LeakyRelu>>().is_some_and(|leaky| leaky.0.alpha > 0.0)
                && let Some(y) = node.output()
            {
                // The gradient asks for the sign, and reads it from the result.
                let gradient = |r: &&usize| graph.nodes[**r].op.as_a::<UnaryGrad<LeakyRelu>>().is_some();
                reads.extend(self.readers[y.index()].iter().filter(gradient).map(|r| (*r, y)));
            }
        }
        let made = reads.iter().map(|(at, read)| {
            let node = &graph.nodes[*at];
            let op = match node.inputs[..] {
                [Some(v)] if v == *read => gated.forward(node.op.as_ref())?,
                [Some(v), Some(dy)] if v == *read && dy != v => gated.backward(node.op.as_ref())?,
                _ => return None,
            };
            let mut inputs = node.inputs.clone();
            inputs[0] = Some(x);
            inputs.extend([scale, shift, mean, inv]);
            Some(Node { op, inputs, ..node.clone() })
        });
        let made: Vec<Node> = made.collect::<Option<_>>()?;
        for ((at, _), mut node) in reads.into_iter().zip(made) {
            if let (6, &[Some(dz)]) = (node.inputs.len(), &node.outputs[..]) {
                let sums = self.sums_of(graph, &gated, [Some(x), Some(dz), mean, inv]);
                node.outputs.extend(sums.unwrap_or([None; 2]));
            }
            self.put(graph, at, node);
        }
        graph.nodes[i].outputs[0] = None;
        Some(())
    }

    /// The gradients of scale and shift, which their node no longer computes.
    fn sums_of(
        &mut self,
        graph: &mut Graph,
        gated: &Gated,
        of: [Option<ValueId>; 4],
    ) -> Option<[Option<ValueId>; 2]> {
        let dz = of[1]?;
        let is_sums = |r: &usize| {
            let node = &graph.nodes[*r];
            node.inputs[..] == of && node.op.as_a::<ChannelParamGrad>().is_some_and(|s| gated.has_sums(s))
        };
        let found = *self.readers[dz.index()].iter().find(|r| is_sums(r))?;
        let &[dscale, dshift] = &graph.nodes[found].outputs[..] else { return None };
        self.remove(graph, found);
        Some([dscale, dshift])
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use crate::exec::Options;
    use crate::graph::Graph;
    use crate::graph::fuse::tests::{Fused, agree, count, step_of};
    use crate::ops::Mode;
    use crate::ops::unary::{HardSwish, Kind, LeakyRelu, Mish, Swish, Tanh, Unary};

    /// Both networks with this activation instead of theirs, and how many normalisations are joined with it.
    fn check<K: Kind>(gate: K, joins: bool) {
        for network in ["dsnet", "resnet20"] {
            let run = |channels_first: bool, tap: &str, fused: Fused| {
                let options = Options { threads: 1, channels_first, ..Options::default() };
                let (_, graph, values) = step_of(network, Mode::TRAIN, tap, fused, options, |graph| {
                    for node in &mut graph.nodes {
                        if ["Relu", "Clip"].contains(&node.op.name()) {
                            node.op = Arc::new(Unary(gate));
                            node.inputs.truncate(1);
                        }
                    }
                });
                (graph, values)
            };
            let what = format!("{network} {gate:?}");
            let (plain, expected) = run(true, "", Fused::No);
            let (joined, values) = run(false, "", Fused::WeightsLearn);
            let gated = ["GatedNorm", "GatedNormGrad"].map(|op| count(&joined, op));
            assert_eq!(count(&plain, "GatedNorm"), 0);
            assert!(gated[0] == gated[1] && (gated[0] > 8) == joins, "{what}: {gated:?}");
            // Sums over what a gate passes back are its own: others stay apart. (What is replaced has no outputs.)
            let sums = |graph: &Graph| {
                let left =
                    graph.nodes.iter().filter(|n| n.op.name() == "NormParamGrad" && !n.outputs.is_empty());
                left.count()
            };
            assert_eq!(sums(&joined) + gated[1], sums(&plain), "{what}");
            agree(&values, &expected, &what);
            if !joins {
                continue;
            }
            // What is asked for is there.
            let norm = plain.nodes.iter().find(|n| n.op.name() == "BatchNormalization").unwrap();
            let tap = &plain.value(norm.outputs[0].unwrap()).name;
            let (kept, values) = run(false, tap, Fused::WeightsLearn);
            assert_eq!(count(&kept, "GatedNorm"), gated[0] - 1, "{what}");
            agree(&values, &run(true, tap, Fused::No).1, &what);
        }
    }

    #[test]
    fn a_normalisation_is_joined_with_an_activation() {
        check(Swish { alpha: 1.0 }, true);
        check(HardSwish {}, true);
        check(Mish {}, true);
        check(LeakyRelu { alpha: 0.1 }, true);
        check(LeakyRelu { alpha: -0.1 }, true);
        check(Tanh {}, false);
    }
}
