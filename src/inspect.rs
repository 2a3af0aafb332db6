//! What a model is, what of it can be trained, and what stands in the way: all of it at once.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;

use serde::Serialize;

use crate::error::{Blocker, Error, OpError, Result};
use crate::exec::{Options, Session};
use crate::finetune::input_specs;
use crate::graph::{Graph, NodeId, ValueId, logits};
use crate::icp::{Taps, find};
use crate::import::{Model, Role};
use crate::ops::Mode;
use crate::tensor::{DType, Meta};
use crate::train::step::{Network, Shapes};

/// Dimensions that the file leaves open are tried at the first of these sizes that works: tables of positions bound them from
/// above, windows of convolutions from below.
const OPEN: [usize; 4] = [64, 16, 512, 8];
/// Samples of the trial.
const BATCH: usize = 2;

/// An input or output as the file declares it.
#[derive(Debug, Serialize)]
pub struct Port {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<String>,
}

/// A float constant.
#[derive(Debug, Serialize)]
pub struct Parameter {
    pub name: String,
    pub shape: Vec<usize>,
    pub dtype: String,
    pub role: String,
    /// By default; a name chooses others too.
    pub trainable: bool,
    pub why: String,
}

/// A constant that more than one place reads.
#[derive(Debug, Serialize)]
pub struct Shared {
    pub name: String,
    pub nodes: Vec<String>,
    /// What becomes of it in training.
    pub how: String,
}

/// A layer whose normalisation the exporter seems to have folded into it.
#[derive(Debug, Serialize)]
pub struct Folded {
    pub node: String,
    pub why: String,
}

/// The whole report.
#[derive(Debug, Serialize)]
pub struct Report {
    pub inputs: Vec<Port>,
    pub outputs: Vec<Port>,
    pub ir_version: i64,
    pub opset: i64,
    pub producer: String,
    pub ops: BTreeMap<String, usize>,
    pub parameters: Vec<Parameter>,
    /// Elements of all parameters, and of those that train by default.
    pub total_parameters: usize,
    pub trainable_parameters: usize,
    /// Of matrix products and convolutions, for one sample; absent where shapes are not known.
    pub multiply_adds: Option<usize>,
    /// The value a cross-entropy loss works on.
    pub logits: Option<String>,
    /// What stands between the logits and the first output, and is left out of the loss.
    pub left_out: Option<String>,
    pub taps: Vec<String>,
    pub shared: Vec<Shared>,
    pub folded_norms: Vec<Folded>,
    /// What cannot be run, or cannot be trained through, node by node.
    pub blockers: Vec<Blocker>,
    pub notes: Vec<String>,
    /// Whether shapes were known well enough to try a gradient.
    pub tried: bool,
}

/// Reports on a model; nothing is trained or run.
pub fn inspect(model: &Arc<Model>) -> Report {
    let parameters: Vec<Parameter> = model
        .weights
        .iter()
        .map(|w| Parameter {
            name: w.name.clone(),
            shape: w.dims.to_vec(),
            dtype: w.dtype.to_string(),
            role: w.role.as_str().into(),
            trainable: w.trainable,
            why: w.why.clone(),
        })
        .collect();
    let elements =
        |all: bool| -> usize { model.weights.iter().filter(|w| all || w.trainable).map(|w| w.len()).sum() };
    let mut report = Report {
        inputs: ports(&model.graph, &model.graph.inputs),
        outputs: ports(&model.graph, &model.graph.outputs),
        ir_version: model.ir_version,
        opset: model.opset(),
        producer: format!("{} {}", model.producer.0, model.producer.1).trim().to_string(),
        ops: model.ops.clone(),
        parameters,
        total_parameters: elements(true),
        trainable_parameters: elements(false),
        multiply_adds: None,
        logits: None,
        left_out: None,
        taps: Vec::new(),
        shared: shared(model),
        folded_norms: folded(model),
        blockers: model.blockers.clone(),
        notes: remarks(&model.graph),
        tried: true,
    };
    let set = model.graph.fixed.iter().map(|(v, _)| format!("input '{}' is set", model.graph.value(*v).name));
    report.notes.extend(set);
    let integers = model.integer_layers();
    if report.blockers.is_empty() {
        match trial(model, &mut report) {
            Ok(()) => {}
            // A node that turns out not to run with these shapes.
            Err(Error::Op { node, source: source @ OpError::Unsupported(_) }) => {
                let op_type = node.split(' ').next().unwrap_or_default().to_string();
                report.blockers.push(Blocker { node, op_type, why: source.to_string() });
            }
            Err(e) => {
                report.tried = false;
                report.notes.push(format!("taps, multiply-adds and what blocks training are not known: {e}"));
            }
        }
    }
    // Where nothing else trains they are what stands in the way; else their neighbours may train all the same.
    if report.trainable_parameters == 0 {
        report.tried |= !integers.is_empty();
        report.blockers.extend(integers);
    } else {
        report.notes.extend(integers.into_iter().map(|b| format!("{}: {}", b.node, b.why)));
    }
    report
}

fn ports(graph: &Graph, ids: &[ValueId]) -> Vec<Port> {
    let port = |v: &ValueId| {
        let value = graph.value(*v);
        let (dtype, dims) = match &value.declared {
            Some(d) => (d.dtype.to_string(), d.dims.clone().unwrap_or_default()),
            None => ("unknown".into(), Vec::new()),
        };
        Port { name: value.name.clone(), dtype, shape: dims.iter().map(|d| d.to_string()).collect() }
    };
    ids.iter().map(port).collect()
}

/// What a person should know about how operators were taken, each with its nodes.
fn remarks(graph: &Graph) -> Vec<String> {
    let mut found: Vec<(String, Vec<String>)> = Vec::new();
    for (i, n) in graph.nodes.iter().enumerate() {
        let Some(remark) = n.op.remark() else { continue };
        let node = graph.describe(NodeId(i as u32));
        match found.iter_mut().find(|(r, _)| *r == remark) {
            Some((_, nodes)) => nodes.push(node),
            None => found.push((remark, vec![node])),
        }
    }
    found.into_iter().map(|(remark, nodes)| format!("{}: {remark}", nodes.join(", "))).collect()
}

fn shared(model: &Model) -> Vec<Shared> {
    let nodes = |w: &crate::import::Weight| {
        let mut nodes: Vec<NodeId> = w.uses.iter().map(|u| u.node).collect();
        nodes.dedup();
        nodes.iter().map(|n| model.graph.describe(*n)).collect::<Vec<_>>()
    };
    let mut out = Vec::new();
    for w in &model.weights {
        if let Some(split) = &w.split {
            let source = &model.weight(split.source).name;
            let how =
                format!("equal to '{source}' in the file, trains apart: the exporter merged equal tensors");
            out.push(Shared { name: w.name.clone(), nodes: nodes(w), how });
        } else if w.trainable && nodes(w).len() > 1 {
            let how = match w.merged {
                true => "several layers have it as their own, and it cannot be split: they train tied",
                false => "tied: one gradient for all of them",
            };
            out.push(Shared { name: w.name.clone(), nodes: nodes(w), how: how.into() });
        }
    }
    out
}

/// Convolutions with a bias in a network that normalises nothing: as exporters leave them that fold normalisations.
pub(crate) fn folded(model: &Model) -> Vec<Folded> {
    let norms = model.weights.iter().any(|w| matches!(w.role, Role::Scale | Role::RunningMean));
    let mut out = Vec::new();
    for (i, n) in model.graph.nodes.iter().enumerate() {
        let id = NodeId(i as u32);
        let at = |slot: usize, role: Role| {
            model
                .weights
                .iter()
                .find(|w| w.uses.iter().any(|u| u.node == id && u.slot == slot && u.role == role))
        };
        let (Some(weight), Some(bias)) = (at(1, Role::Weight), at(2, Role::Bias)) else { continue };
        if n.op.name() != "Conv" {
            continue;
        }
        // PyTorch's exporter numbers the tensors that it makes itself, and names all others after the module.
        let made = |name: &str| name.rsplit_once("::Conv_").is_some_and(|(_, n)| n.parse::<u32>().is_ok());
        let why = match made(&weight.name) && made(&bias.name) {
            true => {
                "its weight and bias were made by the exporter, which does so when it folds a normalisation"
            }
            false if !norms => "a convolution with a bias in a network without normalisations",
            false => continue,
        };
        out.push(Folded { node: model.graph.describe(id), why: why.into() });
    }
    // One or two such layers are ordinary ones.
    if out.len() < 3 && !out.iter().any(|f| f.why.contains("exporter")) {
        out.clear();
    }
    out
}

/// Infers shapes for a small batch and differentiates the first output: its logits, the taps, what blocks.
fn trial(model: &Arc<Model>, report: &mut Report) -> Result<()> {
    let session = Session::new(model.clone(), Options { threads: 1, ..Options::default() })?;
    let specs = input_specs(model);
    let open = specs.iter().any(|s| s.dims.iter().skip(1).any(Option::is_none));
    // The first dimensions that the file fixes as a batch of ours, or, where that does not do (states of recurrent
    // layers have another order), as they are.
    let network = |fixed: bool, size: usize| {
        let mut batch = BATCH;
        let mut inputs = Vec::new();
        for s in &specs {
            let mut dims: Vec<usize> = s.dims.iter().map(|d| d.unwrap_or(size)).collect();
            if let Some(first) = dims.first_mut() {
                let kept = s.dims[0].filter(|_| fixed);
                *first = kept.unwrap_or(BATCH);
                batch = if inputs.is_empty() { *first } else { batch };
            }
            inputs.push((s.name.clone(), Meta::new(s.dtype, &dims)));
        }
        let shapes = Shapes { inputs, target: Meta::new(DType::I64, &[batch]) };
        Ok((Network::new(&session, Mode::TRAIN, &shapes, &Default::default())?, batch))
    };
    let (mut found, mut failed) = (None, None);
    for size in OPEN.into_iter().take(if open { OPEN.len() } else { 1 }) {
        match network(false, size).or_else(|e: Error| network(true, size).map_err(|_| e)) {
            Ok(made) => {
                found = Some((size, made));
                break;
            }
            Err(e) => failed = failed.or(Some(e)),
        }
    }
    let Some((size, (mut net, batch))) = found else {
        return Err(failed.unwrap_or_else(|| Error::Config("no shapes were tried".into())));
    };
    report.multiply_adds = Some(multiply_adds(&net.graph) / batch.max(1));
    if open {
        report.notes.push(format!("dimensions that the file leaves open were tried at {size}"));
    }
    let Some(&output) = net.graph.outputs.first() else {
        return Err(Error::Config("the model has no output".into()));
    };
    let (at, left_out) = logits(&net.graph, output);
    report.left_out = net.graph.left_out.clone().or(left_out.map(|n| net.graph.describe(n)));
    let name = |v: &ValueId| net.graph.value(*v).name.clone();
    let arranged = ["Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze"];
    let end = crate::graph::ending(&net.graph, at, &["Softmax", "LogSoftmax", "Sigmoid"], &arranged);
    report.logits = Some(name(&end.filter(|_| net.graph.left_out.is_some()).map_or(at, |e| e.input)));
    if !net.graph.meta(at)?.dtype.is_float() {
        report.logits = None;
        report.notes.push(format!(
            "the first output, '{}', is {}: a loss on it has no gradient",
            name(&at),
            net.graph.meta(at)?.dtype
        ));
        return Ok(());
    }
    report.taps = find(model, &net.graph, &Taps::Auto, at).unwrap_or_default().iter().map(name).collect();
    let trainable = model.weights.iter().filter(|w| w.trainable).map(|w| w.value).collect::<Vec<_>>();
    let loss = crate::train::step::sum_of(&mut net.graph, at)?;
    match crate::graph::grad(&mut net.graph, loss, &trainable) {
        Err(Error::Blocked(blockers)) => report.blockers = blockers,
        Err(e) => return Err(e),
        Ok(found) => {
            let lost: Vec<&str> = model
                .weights
                .iter()
                .filter(|w| w.trainable && !found.contains_key(&w.value))
                .map(|w| w.name.as_str())
                .collect();
            if !lost.is_empty() {
                report.notes.push(format!("the first output does not depend on {}", lost.join(", ")));
            }
        }
    }
    Ok(())
}

fn multiply_adds(graph: &Graph) -> usize {
    let of = |n: &crate::graph::Node| {
        let metas = graph.metas(&n.inputs);
        n.op.multiply_adds(&metas)
    };
    graph.nodes.iter().map(of).sum()
}

/// `12.3 M`, for people.
fn count(n: usize) -> String {
    let x = n as f64;
    match n {
        0..10_000 => n.to_string(),
        10_000..1_000_000 => format!("{:.1} k", x / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} M", x / 1e6),
        _ => format!("{:.2} G", x / 1e9),
    }
}

/// Roles with the number of parameters and elements that train, and that do not.
fn by_role(r: &Report) -> Vec<(String, bool, usize, usize)> {
    let mut rows: Vec<(String, bool, usize, usize)> = Vec::new();
    for p in &r.parameters {
        let elements: usize = p.shape.iter().product();
        match rows.iter_mut().find(|row| row.0 == p.role && row.1 == p.trainable) {
            Some(row) => (row.2, row.3) = (row.2 + 1, row.3 + elements),
            None => rows.push((p.role.clone(), p.trainable, 1, elements)),
        }
    }
    rows.sort_by_key(|row| (!row.1, std::cmp::Reverse(row.3)));
    rows
}

impl Report {
    /// One sentence on whether it trains.
    fn verdict(&self) -> String {
        match (self.blockers.len(), self.trainable_parameters) {
            _ if !self.tried => "whether it trains is not known".into(),
            (0, 0) => "nothing in it trains by default".into(),
            (0, n) => format!(
                "{} of {} parameters train; nothing blocks training",
                count(n),
                count(self.total_parameters)
            ),
            (n, _) => format!("{n} node(s) block training"),
        }
    }

    /// For a terminal.
    pub fn text(&self, title: &str) -> String {
        let mut s = String::new();
        let _ = writeln!(s, "{title}: IR {}, opset {}, {}", self.ir_version, self.opset, self.producer);
        for (what, ports) in [("input ", &self.inputs), ("output", &self.outputs)] {
            for p in ports {
                let _ = writeln!(s, "{what} {}: {} [{}]", p.name, p.dtype, p.shape.join(", "));
            }
        }
        let ops: Vec<String> = self.ops.iter().map(|(op, n)| format!("{op} {n}")).collect();
        let _ = writeln!(s, "ops    {}", ops.join(", "));
        if let Some(n) = self.multiply_adds {
            let _ = writeln!(s, "cost   {} multiply-adds a sample", count(n));
        }
        let wide = self.parameters.iter().map(|p| p.name.chars().count()).max().unwrap_or(0).min(48);
        let _ = writeln!(
            s,
            "\n{} parameters, {} trainable elements",
            self.parameters.len(),
            self.trainable_parameters
        );
        for p in &self.parameters {
            let mark = if p.trainable { "trains" } else { "-" };
            let _ = writeln!(
                s,
                "  {:wide$}  {:12} {:7} {:?} {}  ({})",
                p.name, p.role, mark, p.shape, p.dtype, p.why
            );
        }
        if let Some(logits) = &self.logits {
            let after =
                self.left_out.as_ref().map_or(String::new(), |n| format!(" ({n} is left out of the loss)"));
            let _ = writeln!(s, "\nlogits {logits}{after}\ntaps   {}", self.taps.join(", "));
        }
        for w in &self.shared {
            let _ = writeln!(s, "shared {}: {}; {}", w.name, w.how, w.nodes.join(", "));
        }
        for f in &self.folded_norms {
            let _ = writeln!(s, "folded {}: {}", f.node, f.why);
        }
        let _ = writeln!(s, "{}", self.verdict());
        for b in &self.blockers {
            let _ = writeln!(s, "  {}: {}", b.node, b.why);
        }
        for n in &self.notes {
            let _ = writeln!(s, "note: {n}");
        }
        s
    }

    /// For a ticket.
    pub fn markdown(&self, title: &str) -> String {
        let cell = |text: &str| text.replace('|', "\\|").replace('\n', " ");
        let mut s = String::new();
        let _ = writeln!(s, "## {}: {}\n", cell(title), self.verdict());
        let _ = writeln!(s, "IR {}, opset {}, {}", self.ir_version, self.opset, cell(&self.producer));
        if let Some(n) = self.multiply_adds {
            let _ = writeln!(s, "; {} multiply-adds a sample", count(n));
        }
        let _ = writeln!(s, "\n| port | name | type | shape |\n|--|--|--|--|");
        for (what, ports) in [("input", &self.inputs), ("output", &self.outputs)] {
            for p in ports {
                let _ = writeln!(
                    s,
                    "| {what} | `{}` | {} | [{}] |",
                    cell(&p.name),
                    p.dtype,
                    cell(&p.shape.join(", "))
                );
            }
        }
        let _ = writeln!(s, "\n| role | trains | parameters | elements |\n|--|--|--:|--:|");
        for (role, trains, n, elements) in by_role(self) {
            let _ = writeln!(s, "| {role} | {} | {n} | {elements} |", if trains { "yes" } else { "no" });
        }
        if !self.blockers.is_empty() {
            let _ = writeln!(s, "\n### What blocks training\n\n| node | why |\n|--|--|");
            for b in &self.blockers {
                let _ = writeln!(s, "| {} | {} |", cell(&b.node), cell(&b.why));
            }
        }
        if let Some(logits) = &self.logits {
            let left = self
                .left_out
                .as_ref()
                .map_or(String::new(), |n| format!("; {} is left out of the loss", cell(n)));
            let _ = writeln!(s, "\nLogits: `{}`{left}", cell(logits));
            if !self.taps.is_empty() {
                let taps: Vec<String> = self.taps.iter().map(|t| format!("`{}`", cell(t))).collect();
                let _ = writeln!(s, "\nICP taps: {}", taps.join(", "));
            }
        }
        if !self.shared.is_empty() {
            let _ =
                writeln!(s, "\n### Shared constants\n\n| name | what becomes of it | nodes |\n|--|--|--|");
            for w in &self.shared {
                let _ =
                    writeln!(s, "| `{}` | {} | {} |", cell(&w.name), cell(&w.how), cell(&w.nodes.join("; ")));
            }
        }
        if !self.folded_norms.is_empty() {
            let _ = writeln!(s, "\n### Folded normalisations\n");
            for f in &self.folded_norms {
                let _ = writeln!(s, "- {}: {}", cell(&f.node), f.why);
            }
        }
        let odd: Vec<&Parameter> = self.parameters.iter().filter(|p| !p.trainable).collect();
        if !odd.is_empty() {
            let _ = writeln!(s, "\n<details><summary>{} constants that do not train</summary>\n", odd.len());
            let _ = writeln!(s, "| name | shape | role | why |\n|--|--|--|--|");
            for p in odd {
                let _ =
                    writeln!(s, "| `{}` | {:?} | {} | {} |", cell(&p.name), p.shape, p.role, cell(&p.why));
            }
            let _ = writeln!(s, "\n</details>");
        }
        for n in &self.notes {
            let _ = writeln!(s, "\n> {}", cell(n));
        }
        s
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::import::make::*;

    #[test]
    fn a_shipped_network_is_reported_whole() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/models/resnet20.onnx");
        let r = inspect(&Arc::new(crate::import::load(path).unwrap()));
        assert_eq!(r.logits.as_deref(), Some("logits"));
        assert!(r.blockers.is_empty() && r.folded_norms.is_empty() && !r.taps.is_empty());
        // Convolutions of a ResNet-20 on 28×28: 31 M multiply-adds.
        let cost = r.multiply_adds.unwrap();
        assert!((25_000_000..40_000_000).contains(&cost), "{cost}");
        let page = r.markdown("resnet20.onnx");
        assert!(page.contains("nothing blocks training") && page.contains("| weight | yes | 22 |"), "{page}");
        assert!(r.text("x").contains("logits logits"));
    }

    #[test]
    fn shared_and_folded_are_told() {
        let conv = |x: &str, w: &str, b: &str, y: &str| node("Conv", &[x, w, b], &[y]);
        let nodes = vec![
            node("Unsqueeze", &["x", "axes"], &["i"]),
            conv("i", "w1", "b1", "a"),
            conv("a", "w2", "b2", "b"),
            conv("b", "w2", "b2", "c"),
            conv("c", "w3", "b3", "d"),
            node("Softmax", &["d"], &["y"]),
        ];
        let mut init: Vec<_> = ["w1", "w2", "w3"].iter().map(|n| ramp(n, &[3, 3, 1])).collect();
        init.extend(["b1", "b2", "b3"].iter().map(|n| ramp(n, &[3])));
        init.push(ints("axes", &[2]));
        let r = inspect(&Arc::new(import(&model(nodes, init, "y")).unwrap()));
        assert_eq!(r.folded_norms.len(), 4);
        assert_eq!(r.shared.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), ["w2", "b2"]);
        assert!(r.left_out.as_ref().is_some_and(|n| n.starts_with("Softmax")), "{:?}", r.notes);
        assert_eq!(r.multiply_adds, Some(36));
    }
}
