//! Constants that only bodies of control flow read: what they are to the network there.

use std::collections::HashSet;

use super::moves::moves_only;
use super::{DEPTH, single_axis, strength};
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
        let outside = &body.graph.inputs[body.formal.min(body.graph.inputs.len())..];
        let (mut todo, mut seen) = (vec![(v, dims)], HashSet::from([v]));
        while let Some((v, dims)) = todo.pop() {
            for n in &body.graph.nodes {
                for (s, _) in n.inputs.iter().enumerate().filter(|(_, x)| **x == Some(v)) {
                    if passes(&body.graph, outside, n, s) {
                        let next = n.outputs.iter().flatten().filter(|y| seen.insert(**y));
                        // Its dimensions there are not followed.
                        todo.extend(next.map(|y| (*y, None)));
                        continue;
                    }
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
    }
    role
}

/// Does `n` put out the elements of operand `slot`, or a part of them, beside other constants at most?
fn passes(graph: &Graph, outside: &[ValueId], n: &Node, slot: usize) -> bool {
    match n.op.name() {
        "Concat" => n.inputs.iter().flatten().all(|v| parametric(graph, outside, *v, DEPTH)),
        op => slot == 0 && (moves_only(op) || matches!(op, "Slice" | "Split")),
    }
}

fn parametric(graph: &Graph, outside: &[ValueId], v: ValueId, depth: usize) -> bool {
    match graph.value(v).source {
        Source::Input => outside.contains(&v),
        Source::Node(id, _) if depth > 0 => {
            let n = graph.node(id);
            let inputs = match n.op.name() {
                "Concat" => n.inputs.len(),
                op if moves_only(op) || matches!(op, "Slice" | "Split") => 1,
                _ => return false,
            };
            n.inputs.iter().take(inputs).flatten().all(|v| parametric(graph, outside, *v, depth - 1))
        }
        Source::Node(..) => false,
        _ => true,
    }
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
