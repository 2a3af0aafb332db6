//! `retune demo`: the main job on what the repository ships.
//!
//! A network that was trained on clean images of clothes is deployed behind a camera that wears: it dims,
//! blurs, and gets noisy. A few hundred labelled images of the worn camera repair the network.

use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::exec::{Options, Session};
use crate::finetune::{Config, EVAL_BATCH, Finished, MethodName, OptimizerName, finetune};
use crate::icp::{Icp, Settings};
use crate::tensor::Tensor;
use crate::train::data::{Dataset, ImageOptions, Worn, degrade, split};
use crate::train::fit::{Evaluated, evaluate};
use crate::train::loss::Loss;

use super::eval::describe;
use super::page::{self, Strip};
use super::progress::Reporter;

#[derive(clap::Args)]
pub struct Args {
    /// Where the shipped models and images are
    #[arg(long, value_name = "DIR")]
    models: Option<PathBuf>,
    /// Which of them: resnet20 or dsnet
    #[arg(long, default_value = "resnet20")]
    model: String,
    /// Folder for the new network and the page
    #[arg(long, default_value = "target/demo", value_name = "DIR")]
    output: PathBuf,
    /// supervised or icp
    #[arg(long, default_value = "icp")]
    method: String,
    #[arg(long, default_value_t = 8)]
    epochs: usize,
    /// Labelled images of the worn camera to learn from
    #[arg(long, default_value_t = 500)]
    images: usize,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Threads to compute with [default: one per core]
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    threads: usize,
    #[arg(long)]
    json: bool,
}

/// The classes of Fashion-MNIST.
const CLASSES: [&str; 10] =
    ["T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"];

/// What the demo shows, as `--json` prints it.
#[derive(serde::Serialize)]
struct Report<'a> {
    clean: &'a crate::train::metrics::Metrics,
    degraded_before: &'a crate::train::metrics::Metrics,
    degraded_after: &'a crate::train::metrics::Metrics,
    /// Share of the accuracy lost to the worn camera that came back.
    recovered: f64,
    page: &'a Path,
    summary: &'a crate::finetune::Summary,
}

pub fn main(args: &Args) -> anyhow::Result<u8> {
    let folder = models_folder(args.models.as_deref())?;
    let path = folder.join(format!("{}.onnx", args.model));
    let model = super::data::load(&path, &[])?;
    let clean =
        super::data::bound(&model, &folder.join("fashion-images-idx3-ubyte.gz"), &ImageOptions::default())?;
    let worn = degrade(&clean, &Worn { seed: args.seed, ..Worn::default() })?;
    anyhow::ensure!(args.images > 0 && args.images < clean.len(), "--images: from 1 to {}", clean.len() - 1);
    let share = 1.0 - args.images as f64 / clean.len() as f64;
    let parts = split(clean.len(), share, args.seed, clean.labels())?;
    std::fs::create_dir_all(&args.output).with_context(|| args.output.display().to_string())?;

    let loss = Loss::CrossEntropy { label_smoothing: 0.0 };
    let mut session = Session::new(model.clone(), Options { threads: args.threads, ..Options::default() })?;
    let on_clean = evaluate(&mut session, &loss, &clean, &parts.held, EVAL_BATCH)?;
    eprintln!("{}: {} held-out images", path.display(), parts.held.len());
    eprintln!("clean camera:          {}", describe(&on_clean.metrics));

    let method = match args.method.as_str() {
        "icp" => MethodName::Icp,
        "supervised" => MethodName::Supervised,
        other => anyhow::bail!("--method {other}: takes icp or supervised"),
    };
    let config = Config {
        method,
        epochs: args.epochs,
        lr: 1e-3,
        optimizer: OptimizerName::Adamw,
        seed: args.seed,
        threads: args.threads,
        ..Config::default()
    };
    let output = args.output.join(format!("{}-repaired.onnx", args.model));
    let (train, held) = (worn.subset(&parts.train)?, worn.subset(&parts.held)?);
    let mut reporter = Reporter::new();
    let mut done = finetune(model, train.clone(), Some(held), &config, &output, &mut |p| reporter.step(p))?;
    let (Some(before), Some(after)) = (done.before.clone(), done.after.clone()) else {
        anyhow::bail!("nothing was held out");
    };
    eprintln!("worn camera, deployed: {}", describe(&before.metrics));
    eprintln!("worn camera, repaired: {}", describe(&after.metrics));
    let recovered = recovered(&on_clean, &before, &after);
    eprintln!("recovered {:.0}% of the accuracy that the worn camera cost", 100.0 * recovered);

    let strips = strips(&clean.subset(&parts.train)?, &train, &mut done)?;
    let page = args.output.join("index.html");
    page::demo(&page, &path, &on_clean, &done, &CLASSES, &strips)?;
    eprintln!("wrote {} (tract: {})", done.summary.output.display(), done.summary.verified);
    eprintln!("page  {}", page.display());
    if args.json {
        super::print_json(&Report {
            clean: &on_clean.metrics,
            degraded_before: &before.metrics,
            degraded_after: &after.metrics,
            recovered,
            page: &page,
            summary: &done.summary,
        })?;
    }
    Ok(if done.summary.kept { 0 } else { super::NOT_MET })
}

fn models_folder(given: Option<&Path>) -> anyhow::Result<PathBuf> {
    let candidates = match given {
        Some(folder) => vec![folder.to_path_buf()],
        None => vec![PathBuf::from("models"), Path::new(env!("CARGO_MANIFEST_DIR")).join("models")],
    };
    let found = candidates.iter().find(|f| f.join("fashion-images-idx3-ubyte.gz").exists());
    found.cloned().with_context(|| {
        format!("no models in {}: run in the repository, or name them with --models", candidates[0].display())
    })
}

/// The share of the lost accuracy that came back.
fn recovered(clean: &Evaluated, before: &Evaluated, after: &Evaluated) -> f64 {
    let accuracy = |e: &Evaluated| e.metrics.accuracy.unwrap_or(0.0);
    (accuracy(after) - accuracy(before)) / (accuracy(clean) - accuracy(before)).max(1e-9)
}

/// A few training images: clean, as the worn camera sees them, perturbed by ICP, and the difference.
fn strips(clean: &Dataset, worn: &Dataset, done: &mut Finished) -> anyhow::Result<Vec<Strip>> {
    const SHOWN: usize = 10;
    let picks: Vec<usize> = (0..SHOWN.min(worn.len())).collect();
    let mut batch = worn.new_batch(picks.len());
    clean.batch(&picks, None, &mut batch)?;
    let original = batch.inputs[0].1.clone();
    worn.batch(&picks, None, &mut batch)?;
    let seen = batch.inputs[0].1.clone();
    let settings = Settings::paper();
    let epsilon = settings.epsilon;
    let perturbed = Icp::new(settings).perturbed(&mut done.session, &done.recipe, &batch)?;
    let (moved, losses) = (&perturbed.inputs[0].1, &perturbed.losses);
    let difference: Vec<f32> =
        moved.get::<f32>()?.iter().zip(seen.get::<f32>()?).map(|(a, b)| a - b).collect();
    let largest = difference.iter().fold(1e-9f32, |m, d| m.max(d.abs()));
    let amplified: Vec<f32> = difference.iter().map(|d| 0.5 + 0.5 * d / largest).collect();
    let amplified = Tensor::from_slice(seen.dims(), &amplified)?;
    let falls = format!(
        "perturbed by ICP, {} steps of {epsilon}: loss {:.3} at the first, {:.3} at the last",
        losses.len(),
        losses.first().copied().unwrap_or(f64::NAN),
        losses.last().copied().unwrap_or(f64::NAN)
    );
    Ok(vec![
        Strip { caption: "clean camera".into(), images: original },
        Strip { caption: "worn camera".into(), images: seen },
        Strip { caption: falls, images: moved.clone() },
        Strip { caption: format!("difference, ×{:.0}", 0.5 / largest), images: amplified },
    ])
}
