//! `retune bench`: how long a pass or a step takes.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use rand::{RngExt, SeedableRng};
use serde::Serialize;

use crate::exec::{OptimizerState, Precision, Program, Session, Usage};
use crate::finetune::budget::{Fitted, Job, batch_of, with_batch};
use crate::finetune::{Config, MethodName};
use crate::kernels::peak;
use crate::tensor::{DType, Tensor};
use crate::train::data::{Batch, Dataset};
use crate::train::method::At;
use crate::train::preset;
use crate::train::step::{self, Evaluation, Recipe, Shapes, feeds};

#[derive(clap::Args)]
pub struct Args {
    model: PathBuf,
    #[command(flatten)]
    fixed: super::data::SetArgs,
    #[arg(long, default_value_t = 32)]
    batch: usize,
    #[arg(long, value_enum, default_value = "train")]
    mode: ModeName,
    /// [default: one per core]
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    threads: usize,
    /// What is kept for the gradient is in f32, bf16 or f16
    #[arg(long, default_value = "f32")]
    precision: Precision,
    /// Keep the trained weights in that half precision too, without an f32 copy
    #[arg(long)]
    master_free: bool,
    /// What the optimizer's moments are kept in: f32, bf16 or 8bit
    #[arg(long, default_value = "f32")]
    optimizer_state: OptimizerState,
    /// What trains: all, head, last:N, bias, norm, or globs over parameter names
    #[arg(long, default_value = "all")]
    train: String,
    /// What a step may hold at most, as 64MiB
    #[arg(long, value_name = "SIZE")]
    memory_budget: Option<String>,
    /// Where it cannot be kept otherwise, half precision may be used
    #[arg(long)]
    allow_half: bool,
    /// cross-entropy, bce, mse, or an ONNX graph of the loss
    #[arg(long, default_value = "cross-entropy")]
    loss: String,
    #[command(flatten)]
    icp: super::icp_flags::IcpFlags,
    /// Timed runs, after two that are not
    #[arg(long, default_value_t = 20)]
    runs: usize,
    /// Sizes that the file leaves open, by input: NAME=8x3x224x224 (the batch included)
    #[arg(long, value_name = "NAME=DIMS")]
    shape: Vec<String>,
    /// Print the time of each kernel call
    #[arg(long)]
    profile: bool,
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum ModeName {
    Forward,
    Train,
    Icp,
}

#[derive(Serialize)]
struct Report {
    mode: ModeName,
    batch: usize,
    threads: usize,
    precision: Precision,
    runs: usize,
    median_ms: f64,
    min_ms: f64,
    max_ms: f64,
    samples_per_second: f64,
    /// From the start of the process to the end of the first run.
    cold_start_ms: f64,
    /// Of matrix products and convolutions, in billions of operations a second, and as a share of what the
    /// processor's multiply-adds reach on registers.
    gflops: f64,
    percent_of_peak: f64,
    peak_gflops: f64,
    /// Of a sweep over arrays beyond the caches.
    #[serde(skip_serializing_if = "Option::is_none")]
    peak_gigabytes: Option<f64>,
    peak_bytes: usize,
    memory: Usage,
    #[serde(skip_serializing_if = "Option::is_none")]
    budget: Option<Fitted>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    profile: Vec<KernelTime>,
}

/// Time of one kernel call in one program, a run.
#[derive(Serialize)]
struct KernelTime {
    program: String,
    op: String,
    node: String,
    /// Dimensions of the operands that are read and written.
    operands: String,
    ms: f64,
    /// Of matrix products and convolutions.
    #[serde(skip_serializing_if = "Option::is_none")]
    gflops: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    percent_of_peak: Option<f64>,
    /// Bytes of all operands by the time.
    gigabytes_per_second: f64,
}

pub fn main(args: &Args, start: Instant) -> anyhow::Result<u8> {
    anyhow::ensure!(args.runs > 0 && args.batch > 0, "--runs and --batch must be at least 1");
    let model = super::data::load(&args.model, &args.fixed.set)?;
    let inputs = super::plan::input_shapes(&model, args.batch, &args.shape)?;
    let config = Config {
        threads: args.threads,
        precision: args.precision,
        master_free: args.master_free,
        optimizer_state: args.optimizer_state,
        method: if matches!(args.mode, ModeName::Icp) { MethodName::Icp } else { MethodName::Supervised },
        train: args.train.clone(),
        loss: args.loss.clone(),
        memory_budget: args.memory_budget.clone(),
        allow_half: args.allow_half,
        ..args.icp.config()?
    };
    config.check()?;
    let options = config.session();
    let mut session = Session::new(model.clone(), options.clone())?;
    let loss = config.loss()?;
    let shapes = super::plan::with_target(&session, &inputs, &loss)?;
    let batch_size = batch_of(&shapes);
    let mut fitted = None;
    let mut runs = Runs { start, wanted: args.runs, cold: None, times: Vec::with_capacity(args.runs) };
    let mut profile = Vec::new();
    let work;
    match args.mode {
        ModeName::Forward => {
            anyhow::ensure!(
                args.memory_budget.is_none(),
                "--memory-budget bounds training: --mode train or icp"
            );
            let batch = synthetic(&shapes)?;
            let plan = Evaluation::new(&mut session, &loss, &shapes)?;
            let fed = feeds(&plan.inputs, plan.attached.target, &batch)?;
            session.set_profiling(args.profile);
            runs.time(|| Ok(session.run(&plan.program, &fed, 0)?))?;
            work = multiply_adds(&plan.program);
            gather(&session, "forward", &plan.program, &mut profile);
        }
        ModeName::Train | ModeName::Icp => {
            let ask = config.ask(&loss, &shapes);
            let chosen = preset::choose(&mut session, &ask)?;
            chosen.notes.iter().for_each(|note| eprintln!("note: {note}"));
            let mut recipe = Recipe { params: chosen.params, clip: None, ..ask.recipe.clone() };
            if let Some(budget) = config.memory_budget()? {
                let job = Job {
                    session: &session,
                    recipe: &recipe,
                    method: &|| config.training_method(false),
                    allow_half: args.allow_half,
                    shapes: &shapes,
                    epochs: 2,
                    samples: 0,
                    held: 0,
                    data: 0,
                    train: &args.train,
                    copies: 0,
                    folded: false,
                    edited: false,
                };
                let found = job.fit(budget)?;
                found.describe().iter().for_each(|note| eprintln!("note: {note}"));
                session = session.alike(found.options(session.options()))?;
                recipe.accumulate = found.parts;
                fitted = Some(found);
            }
            let parts = recipe.accumulate;
            let shapes = with_batch(&shapes, batch_size / parts);
            let batch = synthetic(&shapes)?;
            recipe.prepare(&mut session)?;
            let mut method = config.training_method(false)?;
            method.begin(batch_size);
            method.prepare(&mut session, &recipe, &shapes, 2)?;
            let apply = if parts > 1 { Some(step::apply(&mut session, &recipe)?) } else { None };
            session.set_profiling(args.profile);
            let at = At { epoch: 1, epochs: 2, step: 1, steps: 2, seed: 0 };
            // A learning rate of nothing keeps the weights, and so the work, the same.
            step::set_step(&mut session, 1e-9, 1);
            runs.time(|| {
                for part in 0..parts {
                    if parts > 1 {
                        step::set_share(&mut session, 1.0 / parts as f64, part == 0);
                    }
                    method.learn(&mut session, &recipe, &batch, &at)?;
                }
                if let Some(apply) = &apply {
                    session.run(&apply.program, &[], 0)?;
                }
                Ok(())
            })?;
            let times = |name: &str| parts * if name == "perturb" { config.icp_steps } else { 1 };
            work = method.programs().iter().map(|(name, p)| times(name) * multiply_adds(p)).sum();
            for (name, program) in method.programs() {
                gather(&session, name, program, &mut profile);
            }
        }
    }
    let times = &mut runs.times;
    times.sort();
    let ms = |d: Duration| d.as_secs_f64() * 1e3;
    let median = ms(times[times.len() / 2]);
    let peak_gflops = session.install(peak::gflops);
    for k in &mut profile {
        k.percent_of_peak = k.gflops.map(|g| g / peak_gflops * 100.0);
    }
    let gflops = 2.0 * work as f64 / median * 1e-6;
    let report = Report {
        mode: args.mode,
        batch: batch_size,
        threads: session.threads(),
        precision: session.options().precision,
        runs: args.runs,
        median_ms: median,
        min_ms: ms(times[0]),
        max_ms: ms(times[times.len() - 1]),
        samples_per_second: batch_size as f64 / median * 1e3,
        cold_start_ms: ms(runs.cold.unwrap_or_default()),
        gflops,
        percent_of_peak: gflops / peak_gflops * 100.0,
        peak_gflops,
        peak_gigabytes: args.profile.then(|| session.install(peak::gigabytes)),
        peak_bytes: session.usage().total(),
        memory: session.usage(),
        budget: fitted,
        profile,
    };
    if args.json {
        super::print_json(&report)?;
    } else {
        outln!(
            "median {:.2} ms (min {:.2}, max {:.2}) over {} runs, {:.0} samples/s, {} threads, peak memory {}",
            report.median_ms,
            report.min_ms,
            report.max_ms,
            report.runs,
            report.samples_per_second,
            report.threads,
            crate::size::human(report.peak_bytes)
        );
        outln!(
            "{:.1} GFLOP/s of {:.1} ({:.0}%); first run finished {:.1} ms after the start",
            report.gflops,
            report.peak_gflops,
            report.percent_of_peak,
            report.cold_start_ms
        );
        if let Some(peak) = report.peak_gigabytes {
            outln!("memory {peak:.1} GB/s; by kernel call, a run: ms, % of peak, GB/s of operands");
        }
        for k in &report.profile {
            let percent = k.percent_of_peak.map_or(String::from("   "), |p| format!("{p:3.0}%"));
            outln!(
                "{:9.3} {percent:4} {:6.1}  {:8} {:22} {}  {}",
                k.ms,
                k.gigabytes_per_second,
                k.program,
                k.op,
                k.node,
                k.operands
            );
        }
    }
    Ok(0)
}

/// Two runs to warm up, then the timed ones.
struct Runs {
    start: Instant,
    wanted: usize,
    cold: Option<Duration>,
    times: Vec<Duration>,
}

impl Runs {
    fn time(&mut self, mut run: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<()> {
        for i in 0..self.wanted + 2 {
            let start = Instant::now();
            run()?;
            if i >= 2 {
                self.times.push(start.elapsed());
            }
            self.cold.get_or_insert_with(|| self.start.elapsed());
        }
        Ok(())
    }
}

fn multiply_adds(program: &Program) -> usize {
    program.plan.steps.iter().map(|step| work_of(program, step)).sum()
}

fn work_of(program: &Program, step: &crate::plan::Step) -> usize {
    let node = program.graph.node(step.node);
    let metas: Vec<_> =
        node.inputs.iter().map(|v| v.and_then(|v| program.graph.value(v).meta.as_ref())).collect();
    step.op.multiply_adds(&metas)
}

/// A batch of normal-looking inputs, and targets of zeros, which any loss takes.
fn synthetic(shapes: &Shapes) -> anyhow::Result<Batch> {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(0);
    let mut arrays = Vec::new();
    for (name, meta) in &shapes.inputs {
        let mut draw = || match meta.dtype.is_float() {
            true => rng.random_range(-1.7..1.7),
            false => f64::from(rng.random_range(0u8..2)),
        };
        let what = format!("input '{name}' of shape {:?}", meta.dims.as_slice());
        let drawn = match meta.dtype {
            DType::F32 => {
                let mut t = Tensor::try_zeros(DType::F32, &meta.dims, &what)?;
                t.get_mut::<f32>()?.iter_mut().for_each(|x| *x = draw() as f32);
                t
            }
            dtype => {
                let mut t = Tensor::try_zeros(DType::F64, &meta.dims, &what)?;
                t.get_mut::<f64>()?.iter_mut().for_each(|x| *x = draw());
                t.cast(dtype)
            }
        };
        arrays.push((name.clone(), drawn));
    }
    let target = Tensor::try_zeros(shapes.target.dtype, &shapes.target.dims, "targets")?;
    let data = Dataset::from_arrays(arrays, Some(target))?;
    let mut batch = data.new_batch(data.len());
    data.batch(&(0..data.len()).collect::<Vec<_>>(), None, &mut batch)?;
    Ok(batch)
}

fn gather(session: &Session, name: &str, program: &Program, out: &mut Vec<KernelTime>) {
    let Some(profile) = session.profile(program) else { return };
    for (step, time) in program.plan.steps.iter().zip(profile.medians()) {
        let seconds = time.as_secs_f64();
        let work = work_of(program, step);
        let operands = || step.x.iter().chain(&step.y).filter(|o| !o.dims.is_empty());
        let bytes: usize = operands().map(|o| o.dims.iter().product::<usize>() * o.dtype.size()).sum();
        let dims = operands().map(|o| format!("{:?}", o.dims.as_slice())).collect::<Vec<_>>();
        out.push(KernelTime {
            program: name.into(),
            op: step.op.name().into(),
            node: program.graph.describe(step.node),
            operands: dims.join(" "),
            ms: seconds * 1e3,
            gflops: (work > 0).then(|| 2.0 * work as f64 / seconds * 1e-9),
            percent_of_peak: None,
            gigabytes_per_second: bytes as f64 / seconds * 1e-9,
        });
    }
}
