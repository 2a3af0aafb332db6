//! `If`, `Loop` and `Scan`: their subgraphs as graphs of their own.

use std::collections::HashMap;
use std::sync::Arc;

use super::attrs::attrs;
use super::external::Files;
use super::flat::Opsets;
use super::order::order;
use super::proto::{GraphProto, NodeProto};
use crate::error::{Blocker, OpError};
use crate::graph::{Graph, NodeId, Source, ValueId};
use crate::ops::control::{Body, Control, Kind, Scan};
use crate::ops::{Attrs, Foreign, Op, Spec, create, stand_in};

/// Whether a node is one of the three.
pub(super) fn is_control(n: &NodeProto) -> bool {
    matches!(n.domain.as_str(), "" | "ai.onnx") && matches!(n.op_type.as_str(), "If" | "Loop" | "Scan")
}

/// The operator of a control-flow node, and the names that its bodies read from around it: further operands.
pub(super) fn control(
    files: &mut Files,
    n: &NodeProto,
    attrs: &Attrs,
    opsets: &Opsets,
) -> Result<(Control, Vec<String>), String> {
    let wanted: &[&str] = if n.op_type == "If" { &["then_branch", "else_branch"] } else { &["body"] };
    let mut captured = Vec::new();
    let mut bodies = Vec::new();
    for name in wanted {
        let graph = n.attribute.iter().find(|a| a.name == *name).and_then(|a| a.g.as_deref());
        let graph = graph.ok_or_else(|| format!("{} without its {name}", n.op_type))?;
        bodies.push(Arc::new(body(files, graph, opsets, n.input.len(), &mut captured)?));
    }
    let (formal, results) = (bodies[0].formal, bodies[0].graph.outputs.len());
    let kind = match n.op_type.as_str() {
        "If" if bodies.iter().any(|b| b.formal != 0) => return Err("a branch of If with inputs".into()),
        "If" if bodies[1].graph.outputs.len() != results => {
            return Err("branches of If with different numbers of outputs".into());
        }
        "If" => Kind::If,
        "Loop" if formal < 2 || n.input.len() != formal || results < formal - 1 => {
            return Err(format!(
                "Loop of {} operands with a body of {formal} inputs and {results} outputs",
                n.input.len()
            ));
        }
        "Loop" => Kind::Loop,
        _ => {
            let spec = Spec {
                domain: "",
                op_type: &n.op_type,
                opset: opsets.get("").copied().unwrap_or(1),
                attrs,
                inputs: n.input.len(),
                outputs: n.output.len(),
            };
            Kind::Scan(Scan::new(&spec, formal, results).map_err(plain)?)
        }
    };
    Ok((Control { kind, bodies, own: n.input.len() }, captured))
}

fn plain(e: OpError) -> String {
    match e {
        OpError::Unsupported(what) => what,
        e => e.to_string(),
    }
}

fn body(
    files: &mut Files,
    g: &GraphProto,
    opsets: &Opsets,
    own: usize,
    captured: &mut Vec<String>,
) -> Result<Body, String> {
    let mut b = Names { graph: Graph::default(), names: HashMap::new(), captured, own, slots: Vec::new() };
    for i in &g.input {
        let v = b.graph.add_value(&i.name, Source::Input);
        b.graph.inputs.push(v);
        b.names.insert(i.name.clone(), v);
    }
    for i in order(&g.node)? {
        let n = &g.node[i];
        let mut inputs: Vec<Option<ValueId>> =
            n.input.iter().map(|x| (!x.is_empty()).then(|| b.find(x))).collect();
        let op = operator(files, n, opsets, &mut |name| inputs.push(Some(b.find(name))));
        let outputs: Vec<Option<&str>> =
            n.output.iter().map(|o| (!o.is_empty()).then_some(o.as_str())).collect();
        let made = b.graph.add_node(&n.name, op, inputs, &outputs);
        for (v, o) in made.into_iter().zip(&n.output) {
            if let Some(v) = v {
                b.names.insert(o.clone(), v);
            }
        }
    }
    for o in &g.output {
        let v = b.find(&o.name);
        b.graph.outputs.push(v);
    }
    Ok(Body { graph: b.graph, formal: g.input.len(), captured: b.slots })
}

/// The operator of a node in a body; `capture` is told what its own bodies read from around it.
fn operator(files: &mut Files, n: &NodeProto, opsets: &Opsets, capture: &mut dyn FnMut(&str)) -> Arc<dyn Op> {
    let made = attrs(files, n).and_then(|attrs| -> Result<Arc<dyn Op>, String> {
        if is_control(n) {
            let (control, captured) = control(files, n, &attrs, opsets)?;
            captured.iter().for_each(|name| capture(name));
            return Ok(Arc::new(control));
        }
        let domain = if n.domain == "ai.onnx" { "" } else { n.domain.as_str() };
        let Some(&opset) = opsets.get(domain) else {
            return Err(format!("operator {}: the model imports no opset of domain '{domain}'", n.op_type));
        };
        let (inputs, outputs) = (n.input.len(), n.output.len());
        create(&Spec { domain, op_type: &n.op_type, opset, attrs: &attrs, inputs, outputs }).map_err(plain)
    });
    made.unwrap_or_else(|why| {
        let domain = if n.domain == "ai.onnx" { "" } else { n.domain.as_str() };
        stand_in(n, opsets.get(domain).copied(), why)
    })
}

/// Values of a body by name.
struct Names<'a> {
    graph: Graph,
    names: HashMap<String, ValueId>,
    /// Of all bodies of the node.
    captured: &'a mut Vec<String>,
    own: usize,
    slots: Vec<usize>,
}

impl Names<'_> {
    /// A value of the body; what it does not compute is captured.
    fn find(&mut self, name: &str) -> ValueId {
        if let Some(v) = self.names.get(name) {
            return *v;
        }
        let at = self.captured.iter().position(|c| c == name).unwrap_or_else(|| {
            self.captured.push(name.to_string());
            self.captured.len() - 1
        });
        let v = self.graph.add_value(name, Source::Input);
        self.graph.inputs.push(v);
        self.slots.push(self.own + at);
        self.names.insert(name.to_string(), v);
        v
    }
}

/// What cannot be executed in the bodies of a node.
pub(super) fn blockers(op: &dyn Op, of: &str, found: &mut Vec<Blocker>) {
    let Some(control) = op.as_a::<Control>() else { return };
    for body in &control.bodies {
        for (i, n) in body.graph.nodes.iter().enumerate() {
            let node = format!("{}, in a body of {of}", body.graph.describe(NodeId(i as u32)));
            if let Some(foreign) = n.op.as_a::<Foreign>() {
                let op_type = foreign.foreign_type().unwrap_or_default();
                found.push(Blocker {
                    node,
                    op_type,
                    why: OpError::Unsupported(foreign.why.clone()).to_string(),
                });
            } else {
                blockers(n.op.as_ref(), &node, found);
            }
        }
    }
}
