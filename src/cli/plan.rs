//! `retune plan`: what a run takes, before it runs.

use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;

use crate::exec::{Options, Session, Usage};
use crate::finetune::{MethodName, input_specs};
use crate::icp::NO_FLOATS;
use crate::import::Model;
use crate::plan::Peak;
use crate::tensor::Meta;
use crate::train::loss::default_target;
use crate::train::step::{Evaluation, Network, Recipe, Shapes};

use super::config::{Overrides, Switches, resolve};
use super::human_bytes;

#[derive(clap::Args)]
pub struct Args {
    model: PathBuf,
    /// Sizes that the file leaves open, by input: NAME=8x3x224x224 (the batch included)
    #[arg(long, value_name = "NAME=DIMS")]
    shape: Vec<String>,
    #[command(flatten)]
    overrides: Overrides,
    #[command(flatten)]
    switches: Switches,
    #[arg(long)]
    json: bool,
}

/// Memory of one program.
#[derive(Serialize)]
struct ProgramReport {
    program: String,
    kernels: usize,
    peak: Peak,
}

/// Memory of one way of using the model.
#[derive(Serialize)]
struct ModeReport {
    mode: String,
    memory: Usage,
    peak_bytes: usize,
    programs: Vec<ProgramReport>,
}

#[derive(Serialize)]
struct Report {
    batch: usize,
    optimizer: String,
    modes: Vec<ModeReport>,
    /// Of what the model cannot be used for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    notes: Vec<String>,
}

pub fn main(args: &Args) -> anyhow::Result<u8> {
    let config = resolve(&args.overrides, &args.switches)?;
    let model = super::data::load(&args.model, &config.set)?;
    let inputs = input_shapes(&model, config.batch, &args.shape)?;
    let mut modes = vec![forward(&model, &inputs, &config.loss()?)?];
    let mut notes = Vec::new();
    for (name, method) in [("supervised", MethodName::Supervised), ("icp", MethodName::Icp)] {
        if method == MethodName::Icp && !inputs.iter().any(|(_, meta)| meta.dtype.is_float()) {
            notes.push(format!("icp: {NO_FLOATS}"));
            continue;
        }
        let own = crate::finetune::Config { method, ..config.clone() };
        match training(&model, &inputs, name, &own, &mut notes) {
            Ok(mode) => modes.push(mode),
            // A budget that one method keeps may be too small for the other.
            Err(e) if method != config.method && config.train.contains("sparse:") => {
                notes.push(format!("{name}: {e}"))
            }
            Err(e) => return Err(e),
        }
    }
    let optimizer = format!("{:?}", config.optimizer).to_lowercase();
    let report = Report { batch: config.batch, optimizer, modes, notes };
    match args.json {
        true => super::print_json(&report)?,
        false => print(&report),
    }
    Ok(0)
}

fn training(
    model: &Arc<Model>,
    inputs: &[(String, Meta)],
    name: &str,
    config: &crate::finetune::Config,
    notes: &mut Vec<String>,
) -> anyhow::Result<ModeReport> {
    let mut session = Session::new(model.clone(), Options { threads: 1, ..Options::default() })?;
    let loss = config.loss()?;
    let shapes = with_target(&session, inputs, &loss)?;
    let ask = config.ask(&loss, &shapes);
    let chosen = crate::train::preset::choose(&mut session, &ask)?;
    notes.extend(chosen.notes.iter().map(|note| format!("{name}: {note}")));
    let recipe = Recipe { params: chosen.params, ..ask.recipe.clone() };
    recipe.prepare(&mut session)?;
    let mut method = config.method()?;
    method.prepare(&mut session, &recipe, &shapes, config.epochs)?;
    Ok(mode(name, &session, &method.programs()))
}

fn mode(name: &str, session: &Session, programs: &[(&str, &crate::exec::Program)]) -> ModeReport {
    let memory = session.usage();
    ModeReport {
        mode: name.into(),
        memory,
        peak_bytes: memory.total(),
        programs: programs
            .iter()
            .map(|(what, p)| ProgramReport {
                program: what.to_string(),
                kernels: p.plan.steps.len(),
                peak: p.plan.peak,
            })
            .collect(),
    }
}

fn forward(
    model: &Arc<Model>,
    inputs: &[(String, Meta)],
    loss: &crate::train::loss::Loss,
) -> anyhow::Result<ModeReport> {
    let mut session = Session::new(model.clone(), Options { threads: 1, ..Options::default() })?;
    let shapes = with_target(&session, inputs, loss)?;
    let evaluation = Evaluation::new(&mut session, loss, &shapes)?;
    Ok(mode("forward", &session, &[("forward", &evaluation.program)]))
}

/// The shapes of a batch: as the file declares them, with `batch` first, and as `given` on the command line.
pub fn input_shapes(model: &Model, batch: usize, given: &[String]) -> anyhow::Result<Vec<(String, Meta)>> {
    let mut shapes = Vec::new();
    for spec in input_specs(model) {
        let wanted = given.iter().find_map(|g| g.strip_prefix(&format!("{}=", spec.name)));
        let dims: Vec<usize> = match wanted {
            Some(text) => text
                .split('x')
                .map(|d| d.parse().map_err(|_| anyhow::anyhow!("--shape {}={text}: not DIMxDIM…", spec.name)))
                .collect::<Result<_, _>>()?,
            None => {
                let mut dims = spec.dims.clone();
                if let Some(first) = dims.first_mut() {
                    *first = Some(batch);
                }
                let open = || {
                    anyhow::anyhow!(
                        "input '{}' has open dimensions: give them as --shape {}=DIMxDIM…",
                        spec.name,
                        spec.name
                    )
                };
                dims.into_iter().collect::<Option<_>>().ok_or_else(open)?
            }
        };
        shapes.push((spec.name.clone(), Meta::new(spec.dtype, &dims)));
    }
    Ok(shapes)
}

/// Completes input shapes with the target that the loss takes.
pub fn with_target(
    session: &Session,
    inputs: &[(String, Meta)],
    loss: &crate::train::loss::Loss,
) -> anyhow::Result<Shapes> {
    let mut shapes = Shapes { inputs: inputs.to_vec(), target: Meta::new(crate::tensor::DType::I64, &[1]) };
    let net = Network::new(session, crate::ops::Mode::EVAL, &shapes, &Default::default())?;
    shapes.target = default_target(loss, &net.graph)?;
    Ok(shapes)
}

fn print(r: &Report) {
    outln!("batch {}, {}", r.batch, r.optimizer);
    outln!(
        "{:12} {:>10} {:>10} {:>10} {:>10} {:>12} {:>10} {:>10}",
        "",
        "peak",
        "weights",
        "optimizer",
        "step",
        "activations",
        "gradients",
        "scratch"
    );
    for m in &r.modes {
        let worst = m.programs.iter().map(|p| p.peak).max_by_key(|p| p.arena).unwrap_or_default();
        outln!(
            "{:12} {:>10} {:>10} {:>10} {:>10} {:>12} {:>10} {:>10}",
            m.mode,
            human_bytes(m.peak_bytes),
            human_bytes(m.memory.weights + m.memory.statistics + m.memory.frozen),
            human_bytes(m.memory.optimizer),
            human_bytes(m.memory.step),
            human_bytes(worst.activations + worst.fragmentation),
            human_bytes(worst.gradients),
            human_bytes(worst.scratch),
        );
        for p in m.programs.iter().filter(|_| m.programs.len() > 1) {
            outln!("  {:10} {:>10} arena, {} kernels", p.program, human_bytes(p.peak.arena), p.kernels);
        }
    }
    for note in &r.notes {
        outln!("{note}");
    }
}
