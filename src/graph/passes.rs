//! Rewrites of a graph before it is differentiated and planned.

use std::collections::HashMap;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::graph::{Graph, Node, NodeId, Source, ValueId};
use crate::ops::Mode;
use crate::tensor::{DType, Meta};

/// Puts every operator that behaves differently in training (normalisation, dropout) into `mode`.
///
/// Returns the values that are the next running statistics: outputs that update a state and that the
/// plan must compute although nobody reads them.
pub fn set_mode(graph: &mut Graph, mode: Mode) -> Result<Vec<ValueId>> {
    let mut updates = Vec::new();
    for i in 0..graph.nodes.len() {
        let id = NodeId(i as u32);
        let Some(op) = graph.node(id).op.in_mode(mode) else { continue };
        graph.nodes[i].op = op.clone();
        for &(input, output) in op.updates() {
            let state = graph.node(id).inputs.get(input).copied().flatten();
            if state.is_some_and(|v| matches!(graph.value(v).source, Source::State(_))) {
                let made = graph.output_of(id, output);
                updates.push(made.map_err(|source| Error::Op { node: graph.describe(id), source })?);
            }
        }
    }
    Ok(updates)
}

impl Graph {
    /// Takes every float constant as float64, and what operators make themselves.
    pub fn widen(&mut self) {
        for value in &mut self.values {
            if let Source::Constant(t) = &value.source
                && t.dtype().is_float()
            {
                let wide = Arc::new(t.cast(DType::F64));
                value.meta = Some(Meta { value: Some(wide.clone()), ..wide.meta() });
                value.source = Source::Constant(wide);
            }
        }
        for node in &mut self.nodes {
            if let Some(op) = node.op.in_float64() {
                node.op = op;
            }
        }
    }
}

/// Copies the nodes of `other`, whose weights must be constants, into `graph`: `bound` pairs its inputs with
/// values here. Returns its outputs as values of `graph`, with shapes inferred.
pub fn inline(graph: &mut Graph, other: &Graph, bound: &[(ValueId, ValueId)]) -> Result<Vec<ValueId>> {
    let mut map: HashMap<ValueId, ValueId> = bound.iter().copied().collect();
    for (i, v) in other.values.iter().enumerate() {
        let id = ValueId(i as u32);
        match &v.source {
            Source::Constant(t) => {
                let copy = graph.add_value(v.name.clone(), Source::Constant(t.clone()));
                map.insert(id, copy);
            }
            Source::Input if !map.contains_key(&id) && other.inputs.contains(&id) => {
                return Err(Error::value(
                    &v.name,
                    "this input of the loss is neither a model output nor 'target'",
                ));
            }
            _ => {}
        }
    }
    for (i, node) in other.nodes.iter().enumerate() {
        let known = |v: &ValueId| matches!(other.value(*v).source, Source::Constant(_));
        if node.outputs.iter().flatten().all(known) {
            continue;
        }
        let inputs: Vec<Option<ValueId>> =
            node.inputs.iter().map(|v| v.and_then(|v| map.get(&v).copied())).collect();
        let outputs = node.outputs.len();
        let made = graph
            .emit(&node.name, node.op.clone(), &inputs, outputs)
            .map_err(|source| Error::Op { node: other.describe(NodeId(i as u32)), source })?;
        for (theirs, ours) in node.outputs.iter().zip(made) {
            if let Some(theirs) = theirs {
                graph.value_mut(ours).name = other.value(*theirs).name.clone();
                map.insert(*theirs, ours);
            }
        }
    }
    let missing = |v: &ValueId| Error::value(&other.value(*v).name, "is not computed by the graph");
    other.outputs.iter().map(|v| map.get(v).copied().ok_or_else(|| missing(v))).collect()
}

/// What `v` repeats or arranges, perhaps bounded by a constant: as exporters bring a sum or a maximum over an axis back to
/// the shape that it was taken of.
fn spread(graph: &Graph, mut v: ValueId) -> ValueId {
    while let Source::Node(id, 0) = graph.value(v).source {
        let node = graph.node(id);
        let mut computed = node
            .inputs
            .iter()
            .flatten()
            .filter(|v| matches!(graph.value(**v).source, Source::Node(..) | Source::Input));
        let next = match (node.op.name(), node.inputs.first()) {
            ("Identity" | "Reshape" | "Expand" | "Squeeze" | "Unsqueeze", Some(Some(x))) => Some(*x),
            ("Max", _) => computed.next().copied().filter(|_| computed.next().is_none()),
            _ => None,
        };
        match next {
            Some(x) => v = x,
            None => break,
        }
    }
    v
}

/// The input of a Softmax that is written out and ends in `id`: `e/Σe` with `e = exp(x)` or `e = exp(x − max x)`.
fn written_softmax(graph: &Graph, id: NodeId) -> Option<ValueId> {
    let made_by = |v: ValueId, op: &str| match graph.value(v).source {
        Source::Node(n, 0) if graph.node(n).op.name() == op => Some(graph.node(n)),
        _ => None,
    };
    let operand = |n: &Node, slot: usize| n.inputs.get(slot).copied().flatten();
    let (e, sum) = (operand(graph.node(id), 0)?, operand(graph.node(id), 1)?);
    if operand(made_by(spread(graph, sum), "ReduceSum")?, 0)? != e {
        return None;
    }
    // Over one axis, which stays.
    if let (Some(a), Some(b)) = (&graph.value(e).meta, &graph.value(sum).meta) {
        let changed = a.dims.iter().zip(&b.dims).filter(|(a, b)| a != b).count();
        if a.dims.len() != b.dims.len() || changed > 1 {
            return None;
        }
    }
    let x = operand(made_by(e, "Exp")?, 0)?;
    let shifted = made_by(x, "Sub").and_then(|sub| {
        let (x, top) = (operand(sub, 0)?, operand(sub, 1)?);
        (operand(made_by(spread(graph, top), "ReduceMax")?, 0)? == x).then_some(x)
    });
    Some(shifted.unwrap_or(x))
}

/// The value that a classifier's output is a softmax of, or the largest place of, and the outermost node that stands
/// between; `(output, None)` where the output is neither. Looks through Identity, and through what only casts or
/// reshapes class indices.
pub fn logits(graph: &Graph, output: ValueId) -> (ValueId, Option<NodeId>) {
    let (mut v, mut outer) = (output, None);
    while let Source::Node(id, at) = graph.value(v).source {
        let node = graph.node(id);
        let Some(Some(input)) = node.inputs.first() else { break };
        let index = graph.value(v).meta.as_ref().is_some_and(|m| !m.dtype.is_float());
        match (node.op.name(), at) {
            ("Identity", 0) => v = *input,
            ("Softmax" | "LogSoftmax", 0) => return (*input, outer.or(Some(id))),
            ("Div", 0) => match written_softmax(graph, id) {
                Some(x) => return (x, outer.or(Some(id))),
                None => break,
            },
            ("ArgMax", 0) | ("TopK", _) => {
                outer = outer.or(Some(id));
                v = *input;
            }
            ("Cast" | "Squeeze" | "Unsqueeze" | "Reshape" | "Flatten", 0) if index => {
                outer = outer.or(Some(id));
                v = *input;
            }
            _ => break,
        }
    }
    let float = graph.value(v).meta.as_ref().is_none_or(|m| m.dtype.is_float());
    match outer {
        Some(_) if float => (v, outer),
        _ => (output, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::import::make::{import, ints, model, node, ramp};

    /// `h` = x·w, then `tail`, which ends in `y`.
    fn found(tail: Vec<crate::import::proto::NodeProto>) -> (String, bool) {
        let mut nodes = vec![node("MatMul", &["x", "w"], &["h"])];
        nodes.extend(tail);
        let m = import(&model(
            nodes,
            vec![ramp("w", &[3, 4]), ints("axis", &[-1]), ints("column", &[-1, 1]), ramp("least", &[1])],
            "y",
        ))
        .unwrap();
        let (v, left_out) = logits(&m.graph, m.graph.outputs[0]);
        (m.graph.value(v).name.clone(), left_out.is_some())
    }

    #[test]
    fn logits_before_a_softmax_that_is_written_out() {
        let plain = || {
            vec![
                node("Exp", &["h"], &["e"]),
                node("ReduceSum", &["e", "axis"], &["s"]),
                node("Div", &["e", "s"], &["y"]),
            ]
        };
        assert_eq!(found(plain()), ("h".into(), true));
        let shifted = vec![
            node("ReduceMax", &["h"], &["m"]),
            node("Sub", &["h", "m"], &["d"]),
            node("Exp", &["d"], &["e"]),
            node("ReduceSum", &["e", "axis"], &["s"]),
            node("Div", &["e", "s"], &["p"]),
            node("Identity", &["p"], &["y"]),
        ];
        assert_eq!(found(shifted), ("h".into(), true));
        // As JAX has it.
        let arranged = vec![
            node("ReduceMax", &["h"], &["m"]),
            node("Max", &["least", "m"], &["n"]),
            node("Reshape", &["n", "column"], &["t"]),
            node("Sub", &["h", "t"], &["d"]),
            node("Exp", &["d"], &["e"]),
            node("ReduceSum", &["e", "axis"], &["s"]),
            node("Reshape", &["s", "column"], &["r"]),
            node("Div", &["e", "r"], &["y"]),
        ];
        assert_eq!(found(arranged), ("h".into(), true));
        let mut other = plain();
        other[1] = node("ReduceSum", &["h", "axis"], &["s"]);
        assert_eq!(found(other), ("y".into(), false));
    }
}
