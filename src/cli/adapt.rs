//! `retune adapt`: a model and data without labels in, the same model adapted to them out.

use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Serialize;

use crate::adapt::{Config, Input, Summary, adapt};

use super::eval::describe;
use super::junit;
use super::progress::Reporter;

#[derive(clap::Args)]
pub struct Args {
    model: PathBuf,
    /// .npz, folder of images (of class folders, or images alone), IDX images file, or - for a stream on standard input
    #[arg(long)]
    data: PathBuf,
    /// The ONNX file to write
    #[arg(long, value_name = "NEW.onnx")]
    output: PathBuf,
    #[command(flatten)]
    overrides: Overrides,
    /// One pass, batch by batch in the data's order, with a bounded number of samples kept
    #[arg(long)]
    stream: bool,
    /// Of --data -: raw little-endian float32 samples of this shape, --batch of them at a time, instead of .npy arrays
    #[arg(long, value_name = "C,H,W", value_delimiter = ',')]
    shape: Vec<usize>,
    /// A small set, of the source for instance, on which drift is measured
    #[arg(long, value_name = "DATA")]
    reference: Option<PathBuf>,
    /// Keep what came out, collapsed or not
    #[arg(long)]
    no_guard: bool,
    /// TOML file of options; flags go before it
    #[arg(long, value_name = "FILE.toml")]
    config: Option<PathBuf>,
    #[command(flatten)]
    images: super::data::ImageArgs,
    #[arg(long)]
    json: bool,
}

/// Every option is optional here: what is not given comes from the file, else from the defaults.
#[derive(clap::Args, Debug, Clone, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Overrides {
    /// stats, tent, eata, sar, infomax, pseudo, icp or icp-pseudo [default: infomax]
    #[arg(long)]
    method: Option<String>,
    /// An input that is the same for every sample: a number, numbers joined by commas, or an .npz
    #[arg(long, value_name = "NAME=VALUE")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    set: Vec<String>,
    /// Running statistics: exact over the samples there are, moving with each batch of a stream, or the source's
    /// [default: exact]
    #[arg(long)]
    statistics: Option<String>,
    /// The source's statistics weigh as much as so many samples [default: 16]
    #[arg(long, value_name = "SAMPLES")]
    source_weight: Option<f64>,
    /// How far a batch moves them with --statistics moving [default: 0.1]
    #[arg(long)]
    momentum: Option<f64>,
    /// Passes over the samples [default: 3]
    #[arg(long)]
    epochs: Option<usize>,
    /// Updates a batch [default: 1]
    #[arg(long)]
    steps: Option<usize>,
    /// Samples a batch [default: 64]
    #[arg(long)]
    batch: Option<usize>,
    /// Learning rate [default: the method's]
    #[arg(long)]
    lr: Option<f64>,
    /// adam, adamw, sgd or ademamix [default: adam, for sar sgd]
    #[arg(long)]
    optimizer: Option<String>,
    /// Of sgd [default: 0.9]
    #[arg(long)]
    sgd_momentum: Option<f64>,
    /// cosine, constant or one-cycle [default: cosine, in a stream constant]
    #[arg(long)]
    schedule: Option<String>,
    /// all, head, last:N, bias, norm, or globs over parameter names [default: norm for tent, eata and sar, else all]
    #[arg(long)]
    train: Option<String>,
    /// Normalisation in the steps that learn: by the batch's statistics, or by frozen running ones [default: batch]
    #[arg(long)]
    norm: Option<String>,
    /// Samples of a stream that are kept, as many of each predicted class [default: 512]
    #[arg(long, value_name = "SAMPLES")]
    memory: Option<usize>,
    /// eata, sar: entropy below which a sample is learned from, as a share of ln(classes) [default: 0.4]
    #[arg(long, value_name = "SHARE")]
    entropy_margin: Option<f64>,
    /// eata: similarity to the mean prediction from which a sample is redundant [default: 1.3/√classes]
    #[arg(long, value_name = "COSINE")]
    redundancy: Option<f64>,
    /// sar: length of the step up the entropy [default: 0.05]
    #[arg(long)]
    sar_rho: Option<f64>,
    /// sar: average entropy (nats) below which it starts again [default: 0.02]
    #[arg(long)]
    sar_recovery: Option<f64>,
    /// infomax: factor of the entropy of the mean prediction [default: 1]
    #[arg(long)]
    diversity: Option<f64>,
    /// pseudo, icp-pseudo: probability from which a prediction is a label [default: 0.9]
    #[arg(long)]
    confidence: Option<f64>,
    /// Perturbation steps K [default: 5]
    #[arg(long)]
    icp_steps: Option<usize>,
    /// Size of a perturbation step [default: 0.002]
    #[arg(long)]
    icp_epsilon: Option<f64>,
    /// Share of the entropy (or of the pseudo-labels) in ICP's loss; the feature term has the rest [default: 0]
    #[arg(long, value_name = "SHARE")]
    icp_entropy: Option<f64>,
    /// auto, or names of values to compare features at [default: auto]
    #[arg(long, value_name = "auto|NAME,…")]
    icp_taps: Option<String>,
    /// Batches between the guard's looks [default: 16]
    #[arg(long, value_name = "BATCHES")]
    check_every: Option<usize>,
    /// Guard: what predictions that changed may cost, by the probabilities that re-estimated statistics alone gave them, as
    /// a multiple of the squared share that the network expects to be wrong [default: 2.4]
    #[arg(long, value_name = "FACTOR")]
    drift: Option<f64>,
    /// Guard: share of the predictions' spread over classes that may be lost [default: 0.25]
    #[arg(long, value_name = "SHARE")]
    balance: Option<f64>,
    /// Guard: least mean entropy, as a share of what it was [default: 0.02]
    #[arg(long, value_name = "FACTOR")]
    entropy_floor: Option<f64>,
    /// Guard: largest mean entropy, as a multiple of what it was [default: 2]
    #[arg(long, value_name = "FACTOR")]
    entropy_ceiling: Option<f64>,
    /// Resets after which learning ends [default: 3]
    #[arg(long)]
    resets: Option<usize>,
    /// Condition on the result, such as "accuracy>=0.9" or "gain>0", for data with labels; exit code 3 when it does not hold
    #[arg(long, value_name = "EXPR")]
    require: Option<String>,
    /// Write the guard's and the conditions' outcomes as JUnit test cases
    #[arg(long, value_name = "FILE.xml")]
    junit: Option<PathBuf>,
    /// [default: 0]
    #[arg(long)]
    seed: Option<u64>,
    /// [default: one per core]
    #[arg(long)]
    threads: Option<usize>,
    /// Give external data files new names where they would overwrite the source's
    #[arg(long, num_args = 0, default_missing_value = "true")]
    rename_data: Option<bool>,
    #[arg(skip)]
    guard: Option<bool>,
    #[arg(skip)]
    stream: Option<bool>,
}

/// The file's options with the flags over them and the defaults under them.
fn resolve(args: &Args) -> anyhow::Result<Config> {
    let mut table = match &args.config {
        Some(path) => super::config::read(path)?,
        None => toml::Table::new(),
    };
    let mut overrides = args.overrides.clone();
    overrides.guard = args.no_guard.then_some(false);
    overrides.stream = (args.stream || args.data == Path::new("-")).then_some(true);
    table.extend(toml::Table::try_from(&overrides).context("options")?);
    let mut config: Config =
        table.try_into().map_err(|e: toml::de::Error| anyhow::anyhow!("options: {}", e.message()))?;
    config.images = args.images.over(config.images.clone());
    config.check()?;
    Ok(config)
}

pub fn main(args: &Args) -> anyhow::Result<u8> {
    let config = resolve(args)?;
    let model = super::data::load(&args.model, &config.set)?;
    let input = match args.data == Path::new("-") {
        true => Input::Stream(Box::new(super::stdin::Arrays::new(&model, &args.shape, config.batch)?)),
        false => {
            anyhow::ensure!(args.shape.is_empty(), "--shape belongs to --data -");
            Input::Set(super::data::bound(&model, &args.data, &config.images)?)
        }
    };
    let reference = args.reference.as_ref();
    let reference = reference.map(|path| super::data::bound(&model, path, &config.images)).transpose()?;
    let mut reporter = Reporter::new();
    let started = std::time::Instant::now();
    let done = adapt(model, input, reference, &config, &args.output, &mut |p| reporter.step(p));
    if let Some(path) = &config.junit {
        let cases = match &done {
            Ok(summary) => cases(summary),
            Err(e) => vec![("adapt".to_string(), junit::Outcome::Broken(e.to_string()))],
        };
        junit::write(path, "retune adapt", started.elapsed().as_secs_f64(), &cases)?;
    }
    let summary = done?;
    report(&summary);
    if args.json {
        super::print_json(&summary)?;
    }
    Ok(if summary.kept { 0 } else { super::NOT_MET })
}

fn cases(s: &Summary) -> Vec<junit::Case> {
    let ended = format!("ended with {}, {} resets", s.ended, s.resets);
    let outcome = match s.ended {
        // A condition that does not hold is a case of its own.
        "original" if s.unmet.is_empty() => junit::Outcome::Failed(ended),
        _ => junit::Outcome::Passed(ended),
    };
    let mut cases = vec![("guard: no collapse".to_string(), outcome)];
    cases.extend(junit::requirements(&s.requirements));
    cases.push(junit::verified(&s.verified));
    cases
}

/// The summary for people, on stderr.
fn report(s: &Summary) {
    for note in &s.notes {
        eprintln!("note: {note}");
    }
    if let (Some(before), Some(after)) = (&s.before, &s.after) {
        eprintln!("before: {}", describe(before));
        eprintln!("after:  {}", describe(after));
    }
    eprintln!(
        "{} steps in {:.1} s on {} samples, {} resets, {} parameters trained, peak memory {}",
        s.steps,
        s.seconds,
        s.samples,
        s.resets,
        s.trained_parameters,
        crate::size::human(s.peak_bytes)
    );
    for unmet in &s.unmet {
        eprintln!("not met: {unmet}");
    }
    match s.kept {
        true => eprintln!("wrote {} ({}; tract: {})", s.output.display(), s.ended, s.verified),
        false => eprintln!(
            "nothing sound came of it, or a condition is not met: {} is the original",
            s.output.display()
        ),
    }
}
