//! `retune inspect`: what a model is and what of it can be trained.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;

use crate::error::Blocker;
use crate::exec::{Options, Session};
use crate::finetune::input_specs;
use crate::graph::{Graph, ValueId, logits};
use crate::icp::{Taps, find};
use crate::import::Model;
use crate::ops::Mode;
use crate::tensor::{DType, Meta};
use crate::train::step::{Network, Shapes};

#[derive(clap::Args)]
pub struct Args {
    model: PathBuf,
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Port {
    name: String,
    dtype: String,
    shape: Vec<String>,
}

#[derive(Serialize)]
struct Parameter {
    name: String,
    shape: Vec<usize>,
    dtype: String,
    role: String,
    trainable: bool,
    why: String,
}

#[derive(Serialize)]
struct Report {
    inputs: Vec<Port>,
    outputs: Vec<Port>,
    ir_version: i64,
    opset: i64,
    producer: String,
    ops: BTreeMap<String, usize>,
    parameters: Vec<Parameter>,
    trainable_parameters: usize,
    /// The value a cross-entropy loss works on.
    logits: Option<String>,
    taps: Vec<String>,
    blockers: Vec<Blocker>,
    notes: Vec<String>,
}

pub fn main(args: &Args) -> anyhow::Result<u8> {
    let model = super::data::load(&args.model)?;
    let report = report(&model)?;
    if args.json {
        super::print_json(&report)?;
    } else {
        print(&args.model, &report);
    }
    Ok(0)
}

fn ports(graph: &Graph, ids: &[ValueId]) -> Vec<Port> {
    ids.iter()
        .map(|v| {
            let value = graph.value(*v);
            let (dtype, shape) = match &value.declared {
                Some(d) => (
                    d.dtype.to_string(),
                    d.dims
                        .as_ref()
                        .map(|dims| dims.iter().map(|d| d.to_string()).collect())
                        .unwrap_or_default(),
                ),
                None => ("unknown".into(), Vec::new()),
            };
            Port { name: value.name.clone(), dtype, shape }
        })
        .collect()
}

fn report(model: &Arc<Model>) -> anyhow::Result<Report> {
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
    let trainable_parameters = model.weights.iter().filter(|w| w.trainable).map(|w| w.len()).sum();
    let mut report = Report {
        inputs: ports(&model.graph, &model.graph.inputs),
        outputs: ports(&model.graph, &model.graph.outputs),
        ir_version: model.ir_version,
        opset: model.opset(),
        producer: format!("{} {}", model.producer.0, model.producer.1).trim().to_string(),
        ops: model.ops.clone(),
        parameters,
        trainable_parameters,
        logits: None,
        taps: Vec::new(),
        blockers: model.blockers.clone(),
        notes: Vec::new(),
    };
    if report.blockers.is_empty() {
        match trial(model) {
            Ok((logits, taps, blockers)) => {
                report.logits = Some(logits);
                report.taps = taps;
                report.blockers = blockers;
            }
            Err(e) => report.notes.push(format!("taps and blockers are not known: {e:#}")),
        }
    }
    Ok(report)
}

/// Infers shapes for a batch of two and differentiates the first output: its logits, the taps, what blocks.
fn trial(model: &Arc<Model>) -> anyhow::Result<(String, Vec<String>, Vec<Blocker>)> {
    let session = Session::new(model.clone(), Options { threads: 1, ..Options::default() })?;
    // Dimensions that the file leaves open are tried at a common size.
    const OPEN: usize = 64;
    let inputs = input_specs(model)
        .into_iter()
        .map(|s| {
            let mut dims: Vec<usize> = s.dims.iter().map(|d| d.unwrap_or(OPEN)).collect();
            if let Some(batch) = dims.first_mut() {
                *batch = 2;
            }
            (s.name, Meta::new(s.dtype, &dims))
        })
        .collect();
    let shapes = Shapes { inputs, target: Meta::new(DType::I64, &[2]) };
    let mut net = Network::new(&session, Mode::TRAIN, &shapes, &Default::default())?;
    let Some(&output) = net.graph.outputs.first() else { anyhow::bail!("the model has no output") };
    let (at, _) = logits(&net.graph, output);
    let taps = find(&net.graph, &Taps::Auto, at).unwrap_or_default();
    let name = |v: &ValueId| net.graph.value(*v).name.clone();
    let (logits, taps) = (name(&at), taps.iter().map(name).collect());
    let trainable = model.weights.iter().filter(|w| w.trainable).map(|w| w.value).collect::<Vec<_>>();
    let loss = crate::train::step::sum_of(&mut net.graph, at)?;
    let blockers = match crate::graph::grad(&mut net.graph, loss, &trainable) {
        Err(crate::Error::Blocked(blockers)) => blockers,
        Err(e) => return Err(e.into()),
        Ok(_) => Vec::new(),
    };
    Ok((logits, taps, blockers))
}

fn print(path: &std::path::Path, r: &Report) {
    println!("{}: IR {}, opset {}, {}", path.display(), r.ir_version, r.opset, r.producer);
    for (what, ports) in [("input ", &r.inputs), ("output", &r.outputs)] {
        for p in ports {
            println!("{what} {}: {} [{}]", p.name, p.dtype, p.shape.join(", "));
        }
    }
    let ops: Vec<String> = r.ops.iter().map(|(op, n)| format!("{op} {n}")).collect();
    println!("ops    {}", ops.join(", "));
    let wide = r.parameters.iter().map(|p| p.name.chars().count()).max().unwrap_or(0).min(48);
    println!("\n{} parameters, {} trainable elements", r.parameters.len(), r.trainable_parameters);
    for p in &r.parameters {
        let mark = if p.trainable { "trains" } else { "-" };
        println!("  {:wide$}  {:12} {:7} {:?} {}  ({})", p.name, p.role, mark, p.shape, p.dtype, p.why);
    }
    if let Some(logits) = &r.logits {
        println!("\nlogits {logits}\ntaps   {}", r.taps.join(", "));
    }
    match r.blockers.len() {
        0 => println!("nothing blocks training"),
        n => println!("{n} node(s) block training:"),
    }
    for b in &r.blockers {
        println!("  {}: {}", b.node, b.why);
    }
    for n in &r.notes {
        println!("note: {n}");
    }
}
