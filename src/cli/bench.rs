//! `retune bench`: how long a pass or a step takes.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use rand::{RngExt, SeedableRng};
use serde::Serialize;

use crate::exec::{Options, Program, Session, Usage};
use crate::finetune::Config;
use crate::graph::WeightId;
use crate::tensor::{DType, Tensor};
use crate::train::data::{Batch, Dataset};
use crate::train::loss::Loss;
use crate::train::method::{At, Method, Plain};
use crate::train::step::{self, Evaluation, Norm, Recipe, Shapes, feeds};

#[derive(clap::Args)]
pub struct Args {
    model: PathBuf,
    #[arg(long, default_value_t = 32)]
    batch: usize,
    #[arg(long, value_enum, default_value = "train")]
    mode: ModeName,
    /// [default: one per core]
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    threads: usize,
    /// Only f32 so far
    #[arg(long, default_value = "f32")]
    precision: String,
    /// Perturbation steps of the icp mode
    #[arg(long, default_value_t = 5)]
    icp_steps: usize,
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
    precision: String,
    runs: usize,
    median_ms: f64,
    min_ms: f64,
    max_ms: f64,
    samples_per_second: f64,
    peak_bytes: usize,
    memory: Usage,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    profile: Vec<KernelTime>,
}

/// Time of all kernel calls of one operator in one program, a run.
#[derive(Serialize)]
struct KernelTime {
    program: String,
    op: String,
    node: String,
    ms: f64,
}

pub fn main(args: &Args) -> anyhow::Result<u8> {
    anyhow::ensure!(args.precision == "f32", "--precision {}: only f32 is supported so far", args.precision);
    anyhow::ensure!(args.runs > 0 && args.batch > 0, "--runs and --batch must be at least 1");
    let model = super::data::load(&args.model)?;
    let inputs = super::plan::input_shapes(&model, args.batch, &args.shape)?;
    let mut session = Session::new(model.clone(), Options { threads: args.threads, ..Options::default() })?;
    let loss = Loss::CrossEntropy { label_smoothing: 0.0 };
    let shapes = super::plan::with_target(&session, &inputs, &loss)?;
    let batch = synthetic(&shapes)?;
    let mut times = Vec::with_capacity(args.runs);
    let mut profile = Vec::new();
    match args.mode {
        ModeName::Forward => {
            let plan = Evaluation::new(&mut session, &loss, &shapes)?;
            let fed = feeds(&plan.inputs, plan.attached.target, &batch)?;
            session.set_profiling(args.profile);
            time(args.runs, &mut times, || Ok(session.run(&plan.program, &fed, 0)?))?;
            gather(&session, "forward", &plan.program, &mut profile);
        }
        ModeName::Train | ModeName::Icp => {
            let reached = step::reached(&session, &loss, &shapes)?;
            let params = (0..model.weights.len())
                .filter(|i| model.weights[*i].trainable && reached[*i])
                .map(|i| WeightId(i as u32))
                .collect();
            let config = Config { icp_steps: args.icp_steps, ..Config::default() };
            let recipe = Recipe {
                loss,
                optimizer: config.optimizer(),
                clip: None,
                params,
                norm: Norm::Batch,
                accumulate: 1,
            };
            recipe.prepare(&mut session)?;
            let mut method: Box<dyn Method> = match args.mode {
                ModeName::Icp => Box::new(config.icp()?),
                _ => Box::new(Plain::default()),
            };
            method.prepare(&mut session, &recipe, &shapes, 2)?;
            session.set_profiling(args.profile);
            let at = At { epoch: 1, epochs: 2, step: 1, steps: 2, seed: 0 };
            // A learning rate of nothing keeps the weights, and so the work, the same.
            step::set_step(&mut session, 1e-9, 1);
            time(args.runs, &mut times, || {
                method.learn(&mut session, &recipe, &batch, &at)?;
                Ok(())
            })?;
            for (name, program) in method.programs() {
                gather(&session, name, program, &mut profile);
            }
        }
    }
    times.sort();
    let ms = |d: Duration| d.as_secs_f64() * 1e3;
    let median = ms(times[times.len() / 2]);
    let report = Report {
        mode: args.mode,
        batch: args.batch,
        threads: session.threads(),
        precision: args.precision.clone(),
        runs: args.runs,
        median_ms: median,
        min_ms: ms(times[0]),
        max_ms: ms(times[times.len() - 1]),
        samples_per_second: args.batch as f64 / median * 1e3,
        peak_bytes: session.usage().total(),
        memory: session.usage(),
        profile,
    };
    if args.json {
        super::print_json(&report)?;
    } else {
        println!(
            "median {:.2} ms (min {:.2}, max {:.2}) over {} runs, {:.0} samples/s, {} threads, peak memory {}",
            report.median_ms,
            report.min_ms,
            report.max_ms,
            report.runs,
            report.samples_per_second,
            report.threads,
            super::human_bytes(report.peak_bytes)
        );
        for k in &report.profile {
            println!("{:9.3} ms  {:8} {:22} {}", k.ms, k.program, k.op, k.node);
        }
    }
    Ok(0)
}

/// Two runs to warm up, then the timed ones.
fn time(
    runs: usize,
    times: &mut Vec<Duration>,
    mut run: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    for i in 0..runs + 2 {
        let start = Instant::now();
        run()?;
        if i >= 2 {
            times.push(start.elapsed());
        }
    }
    Ok(())
}

/// A batch of normal-looking inputs and labels.
fn synthetic(shapes: &Shapes) -> anyhow::Result<Batch> {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(0);
    let mut arrays = Vec::new();
    for (name, meta) in &shapes.inputs {
        let data: Vec<f64> = (0..meta.len())
            .map(|_| match meta.dtype.is_float() {
                true => rng.random_range(-1.7..1.7),
                false => f64::from(rng.random_range(0u8..2)),
            })
            .collect();
        arrays.push((name.clone(), Tensor::from_slice(&meta.dims, &data)?.cast(meta.dtype)));
    }
    let target = match shapes.target.dtype {
        DType::I64 => {
            let labels: Vec<i64> = (0..shapes.target.len() as i64).map(|i| i % 2).collect();
            Tensor::from_slice(&shapes.target.dims, &labels)?
        }
        dtype => Tensor::zeros(dtype, &shapes.target.dims),
    };
    let data = Dataset::from_arrays(arrays, Some(target))?;
    let mut batch = data.new_batch(data.len());
    data.batch(&(0..data.len()).collect::<Vec<_>>(), None, &mut batch)?;
    Ok(batch)
}

fn gather(session: &Session, name: &str, program: &Program, out: &mut Vec<KernelTime>) {
    let Some(profile) = session.profile(program) else { return };
    for (step, time) in program.plan.steps.iter().zip(&profile.steps) {
        out.push(KernelTime {
            program: name.into(),
            op: step.op.name().into(),
            node: program.graph.describe(step.node),
            ms: time.as_secs_f64() * 1e3 / profile.runs.max(1) as f64,
        });
    }
}
