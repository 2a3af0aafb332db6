//! `retune plan`: what a run takes, before it runs.

mod svg;
mod table;

use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;

use crate::exec::{Options, Precision, Session, Usage};
use crate::finetune::budget::{Fitted, Job, with_batch};
use crate::finetune::{Config, MethodName, input_specs};
use crate::icp::NO_FLOATS;
use crate::import::Model;
use crate::plan::Peak;
use crate::tensor::Meta;
use crate::train::loss::default_target;
use crate::train::method::Method;
use crate::train::step::{Evaluation, Network, Recipe, Shapes};

use super::config::{Overrides, Switches, resolve};
use crate::size::human;
use table::{Asked, Row, Speed};

#[derive(clap::Args)]
pub struct Args {
    model: PathBuf,
    /// Sizes that the file leaves open, by input: NAME=8x3x224x224 (the batch included)
    #[arg(long, value_name = "NAME=DIMS")]
    shape: Vec<String>,
    /// Batches to compare [default: 1, 8, 32 and --batch]
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    batches: Vec<usize>,
    /// What trains, to compare [default: all, last:4, norm, bias, head and --train]
    #[arg(long, value_name = "PRESET,…", value_delimiter = ',')]
    presets: Vec<String>,
    /// Memory that there is, as 256MiB: says what fits
    #[arg(long, value_name = "SIZE")]
    device_memory: Option<String>,
    /// Draw memory over a step of --method into a file
    #[arg(long, value_name = "FILE.svg")]
    svg: Option<PathBuf>,
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
    /// Estimated milliseconds of a step (of the pass, forward).
    step_ms: f64,
    /// How it keeps to --memory-budget.
    #[serde(skip_serializing_if = "Option::is_none")]
    budget: Option<Fitted>,
    programs: Vec<ProgramReport>,
}

/// A way to train with its programs.
struct Planned {
    report: ModeReport,
    method: Box<dyn Method>,
    /// Of what was chosen.
    notes: Vec<String>,
}

#[derive(Serialize)]
struct Report {
    batch: usize,
    optimizer: String,
    precision: Precision,
    modes: Vec<ModeReport>,
    /// Batches, presets, precisions and methods side by side.
    table: Vec<Row>,
    /// Of what the model cannot be used for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    notes: Vec<String>,
}

pub fn main(args: &Args) -> anyhow::Result<u8> {
    let config = resolve(&args.overrides, &args.switches)?;
    let model = super::data::load(&args.model, &config.set)?;
    let inputs = input_shapes(&model, config.batch, &args.shape)?;
    let single =
        Config { precision: Precision::F32, master_free: false, memory_budget: None, ..config.clone() };
    let speed = Speed::measured(config.threads)?;
    let mut modes = vec![forward(&model, &inputs, &config.loss()?, &speed)?];
    let (mut notes, mut drawn, mut refused) = (Vec::new(), None, None);
    for (name, method) in [("supervised", MethodName::Supervised), ("icp", MethodName::Icp)] {
        let own = Config { method, ..config.clone() };
        let planned = match training(&model, &inputs, name, &own, &speed) {
            Ok(planned) => planned,
            Err(e) if e.to_string() == NO_FLOATS => {
                notes.push(format!("{name}: {e}"));
                continue;
            }
            // A budget that one method keeps to may be too small for the other.
            Err(e) if config.memory_budget.is_some() || config.train.contains("sparse:") => {
                notes.push(format!("{name}: {e}"));
                if method == config.method || refused.is_none() {
                    refused = Some(e);
                }
                continue;
            }
            Err(e) => return Err(e),
        };
        notes.extend(planned.notes.iter().map(|n| format!("{name}: {n}")));
        notes.extend(planned.report.budget.iter().flat_map(|b| b.describe()).map(|n| format!("{name}: {n}")));
        let wanted = method == config.method || drawn.is_none();
        if wanted && let Some(path) = &args.svg {
            let title = title(&args.model, &config, &planned.report);
            let limit = config.memory_budget()?;
            svg::draw(path, &title, &planned.method.programs(), &planned.report.memory, limit)?;
            drawn = Some(path);
        }
        if config.precision != Precision::F32 {
            let whole = training(&model, &inputs, name, &Config { method, ..single.clone() }, &speed)?;
            notes.push(saved(&planned.report, &whole.report));
        }
        modes.push(planned.report);
    }
    let kept = modes.iter().map(|m| m.memory.samples).max().unwrap_or(0);
    if kept > 0 {
        let each = human(kept / config.batch);
        notes.push(format!("icp: --icp-reuse keeps {each} a training sample, here of {}", config.batch));
    }
    if let Some(e) = refused.filter(|_| modes.len() == 1) {
        return Err(e);
    }
    let size = |text: &Option<String>| {
        text.as_deref()
            .map(|t| crate::size::parse(t).map_err(|e| anyhow::anyhow!("--device-memory {e}")))
            .transpose()
    };
    let device = size(&args.device_memory)?.or(config.memory_budget()?);
    let asked = Asked { batches: &args.batches, presets: &args.presets, device, shape: &args.shape };
    let own = Config { memory_budget: None, ..config.clone() };
    let table = table::rows(&model, &own, &asked, &speed)?;
    let optimizer = format!("{:?}", config.optimizer).to_lowercase();
    let report = Report { batch: config.batch, optimizer, precision: config.precision, modes, table, notes };
    match args.json {
        true => super::print_json(&report)?,
        false => print(&report, device),
    }
    Ok(0)
}

/// What half precision takes of what f32 would.
fn saved(half: &ModeReport, single: &ModeReport) -> String {
    let activations = |m: &ModeReport| m.programs.iter().map(|p| p.peak.activations).max().unwrap_or(0);
    let share = |a: usize, b: usize| 100.0 * a as f64 / b.max(1) as f64;
    format!(
        "{}: in f32 {} at the peak, of which this is {:.0}%; of the activations {:.0}%",
        half.mode,
        human(single.peak_bytes),
        share(half.peak_bytes, single.peak_bytes),
        share(activations(half), activations(single)),
    )
}

fn title(model: &std::path::Path, config: &Config, mode: &ModeReport) -> String {
    format!(
        "{}, batch {}, {}, --train {}: {}",
        model.file_name().unwrap_or_default().to_string_lossy(),
        config.batch,
        mode.mode,
        config.train,
        human(mode.peak_bytes)
    )
}

fn training(
    model: &Arc<Model>,
    inputs: &[(String, Meta)],
    name: &str,
    config: &Config,
    speed: &Speed,
) -> anyhow::Result<Planned> {
    let bound = config.memory_budget()?;
    // Scratch memory depends on the threads.
    let threads = if bound.is_some() { config.threads } else { 1 };
    let mut session = Session::new(model.clone(), Options { threads, dry: true, ..config.session() })?;
    let loss = config.loss()?;
    let whole = with_target(&session, inputs, &loss)?;
    let ask = config.ask(&loss, &whole);
    let chosen = crate::train::preset::choose(&mut session, &ask)?;
    let mut recipe = Recipe { params: chosen.params, ..ask.recipe.clone() };
    let (mut budget, mut shapes) = (None, whole.clone());
    if let Some(bytes) = bound {
        let job = Job {
            session: &session,
            recipe: &recipe,
            method: &|| config.training_method(false),
            allow_half: config.allow_half,
            shapes: &shapes,
            epochs: config.epochs,
            samples: 0,
            held: 0,
            data: 0,
            train: &config.train,
            copies: 0,
            folded: false,
            edited: false,
        };
        let fitted = job.fit(bytes)?;
        session = session.alike(fitted.options(session.options()))?;
        recipe.accumulate *= fitted.parts;
        shapes = with_batch(&shapes, fitted.micro);
        budget = Some(fitted);
    }
    recipe.prepare(&mut session)?;
    let mut method = config.training_method(false)?;
    method.begin(config.batch);
    method.prepare(&mut session, &recipe, &shapes, config.epochs)?;
    let parts = budget.as_ref().map_or(1, |b| b.parts);
    let programs = method.programs();
    let step_ms = programs.iter().map(|(what, p)| {
        let times = if *what == "perturb" { config.icp_steps } else { 1 };
        (parts * times) as f64 * speed.estimate(p)
    });
    let step_ms = step_ms.sum();
    let report = ModeReport { step_ms, budget, ..mode(name, &session, &programs) };
    drop(programs);
    Ok(Planned { report, method, notes: chosen.notes })
}

fn mode(name: &str, session: &Session, programs: &[(&str, &crate::exec::Program)]) -> ModeReport {
    let memory = session.usage();
    ModeReport {
        mode: name.into(),
        memory,
        peak_bytes: memory.total(),
        step_ms: 0.0,
        budget: None,
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
    speed: &Speed,
) -> anyhow::Result<ModeReport> {
    let options = Options { threads: 1, dry: true, ..Options::default() };
    let mut session = Session::new(model.clone(), options)?;
    let shapes = with_target(&session, inputs, loss)?;
    let evaluation = Evaluation::new(&mut session, loss, &shapes)?;
    let step_ms = speed.estimate(&evaluation.program);
    Ok(ModeReport { step_ms, ..mode("forward", &session, &[("forward", &evaluation.program)]) })
}

/// The shapes of a batch: as the file declares them, with `batch` first, and as `given` on the command line.
pub fn input_shapes(model: &Model, batch: usize, given: &[String]) -> anyhow::Result<Vec<(String, Meta)>> {
    let specs = input_specs(model);
    for given in given {
        let is_input = |(name, _): &(&str, &str)| specs.iter().any(|spec| spec.name == *name);
        if given.split_once('=').filter(is_input).is_none() {
            let names: Vec<&str> = specs.iter().map(|spec| &*spec.name).collect();
            anyhow::bail!("--shape {given}: not NAME=DIMxDIM… of an input: {}", names.join(", "));
        }
    }
    let mut shapes = Vec::new();
    for spec in specs {
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

fn print(r: &Report, device: Option<usize>) {
    outln!("batch {}, {}, {}", r.batch, r.optimizer, r.precision);
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
            human(m.peak_bytes),
            human(m.memory.weights + m.memory.statistics + m.memory.frozen),
            human(m.memory.optimizer),
            human(m.memory.step),
            human(worst.activations + worst.fragmentation),
            human(worst.gradients),
            human(worst.scratch),
        );
        for p in m.programs.iter().filter(|_| m.programs.len() > 1) {
            outln!("  {:10} {:>10} arena, {} kernels", p.program, human(p.peak.arena), p.kernels);
        }
    }
    table::print(&r.table, device);
    for note in &r.notes {
        outln!("{note}");
    }
}
