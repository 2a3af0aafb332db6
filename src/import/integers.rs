//! Layers whose weights are integers that nothing here trains.

use crate::error::{Blocker, Error, Result};
use crate::graph::{NodeId, Source};
use crate::import::Model;

/// Operators with integer weights, and the operands that these are.
const LAYERS: &[(&str, &[usize])] = &[
    ("MatMulInteger", &[0, 1]),
    ("ConvInteger", &[1]),
    ("QLinearMatMul", &[0, 3]),
    ("QLinearConv", &[3]),
    ("DynamicQuantizeLSTM", &[1, 2]),
    ("DequantizeLinear", &[0]),
];

impl Model {
    /// The layers whose weights are integers that are run and not trained, each with why.
    pub fn integer_layers(&self) -> Vec<Blocker> {
        let mut found = Vec::new();
        for (i, n) in self.graph.nodes.iter().enumerate() {
            let Some((_, slots)) = LAYERS.iter().find(|l| l.0 == n.op.name()) else { continue };
            let weights = slots.iter().filter_map(|s| {
                let value = self.graph.value(n.inputs.get(*s).copied().flatten()?);
                let integers = matches!(&value.source, Source::Constant(t) if !t.dtype().is_float());
                integers.then(|| format!("'{}'", value.name))
            });
            let weights: Vec<String> = weights.collect();
            if weights.is_empty() {
                continue;
            }
            found.push(Blocker {
                node: self.graph.describe(NodeId(i as u32)),
                op_type: crate::graph::op_type(n.op.as_ref()),
                why: format!(
                    "its weights are integers ({}), which are run and not trained; of quantised networks those train \
                     whose 8-, 16- or 32-bit weights one DequantizeLinear reads",
                    weights.join(", ")
                ),
            });
        }
        found
    }

    /// Fails for a model in which nothing can be trained, with all that is the reason.
    pub fn require_trainable(&self) -> Result<()> {
        if self.weights.iter().any(|w| w.trainable) {
            return Ok(());
        }
        let layers = self.integer_layers();
        if layers.is_empty() { Ok(()) } else { Err(Error::Blocked(layers)) }
    }
}
