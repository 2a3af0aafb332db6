//! Constants that only bodies of control flow read: what they are to the network there.

use super::{single_axis, strength};
use crate::graph::{Graph, Node, Source, ValueId};
use crate::import::weights::Role;
use crate::ops::control::Control;

/// The role of a constant that the bodies of a control-flow node read as operand `slot`: the strongest that one of its
/// uses there gives.
pub(super) fn inside(control: &Control, slot: usize, dims: Option<&[usize]>, len: usize) -> Role {
    let mut role = Role::Constant;
    for body in &control.bodies {
        let own = body.captured.iter().position(|c| *c == slot);
        let Some(&v) = own.and_then(|k| body.graph.inputs.get(body.formal + k)) else { continue };
        for n in &body.graph.nodes {
            for (s, _) in n.inputs.iter().enumerate().filter(|(_, x)| **x == Some(v)) {
                let here = match n.op.as_a::<Control>() {
                    Some(inner) => inside(inner, s, dims, len),
                    None => in_body(&body.graph, n, s, dims, len),
                };
                if strength(here) < strength(role) {
                    role = here;
                }
            }
        }
    }
    role
}

/// What a slot of a node in a body makes of a constant: only what the operator alone tells.
fn in_body(graph: &Graph, n: &Node, slot: usize, dims: Option<&[usize]>, len: usize) -> Role {
    let linear = |v: &ValueId| match graph.value(*v).source {
        Source::Node(p, 0) => matches!(graph.node(p).op.name(), "MatMul" | "Gemm" | "Conv"),
        _ => false,
    };
    let vector = len > 1 && dims.is_some_and(|d| single_axis(d).is_some());
    match (n.op.name(), slot) {
        ("Conv" | "ConvTranspose", 1) | ("Gemm", 0 | 1) | ("LSTM" | "GRU" | "RNN", 1 | 2) => Role::Weight,
        ("MatMul", _) if dims.is_none_or(|d| d.len() == 2) => Role::Weight,
        ("Conv" | "ConvTranspose" | "Gemm", 2) | ("LSTM" | "GRU" | "RNN", 3) => Role::Bias,
        ("BatchNormalization" | "LayerNormalization" | "InstanceNormalization" | "GroupNormalization", 1) => {
            Role::Scale
        }
        ("BatchNormalization" | "LayerNormalization" | "InstanceNormalization" | "GroupNormalization", 2) => {
            Role::Shift
        }
        ("Gather", 0) if dims.is_some_and(|d| d.len() == 2) => Role::Embedding,
        ("Add", _) if vector && n.inputs.iter().flatten().any(linear) => Role::Bias,
        _ => Role::Constant,
    }
}
