//! The options of `finetune` on the command line: each is also a key of the TOML file.

use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Serialize;

use crate::exec::{OptimizerState, Precision};
use crate::finetune::Config;

use super::icp_flags::IcpFlags;

/// Every option is optional here: what is not given comes from the file, else from the defaults.
#[derive(clap::Args, Debug, Clone, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Overrides {
    /// supervised, icp or byot (auxiliary heads) [default: icp]
    #[arg(long)]
    method: Option<String>,
    /// An input that is the same for every sample: a number, numbers joined by commas, or an .npz
    #[arg(long, value_name = "NAME=VALUE")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    set: Vec<String>,
    /// cross-entropy, bce, mse, or an ONNX graph of the loss [default: cross-entropy]
    #[arg(long)]
    loss: Option<String>,
    /// Share of the target spread over all classes [default: 0]
    #[arg(long)]
    label_smoothing: Option<f64>,
    /// Weights of the classes in the loss: balanced, or one number a class [default: all alike]
    #[arg(long, value_name = "balanced|W,…")]
    class_weights: Option<String>,
    /// [default: 10]
    #[arg(long)]
    epochs: Option<usize>,
    /// Samples a batch; the last, partial one is kept [default: 32]
    #[arg(long)]
    batch: Option<usize>,
    /// Batches whose gradients make one update [default: 1]
    #[arg(long)]
    accumulate: Option<usize>,
    /// Learning rate [default: 3e-4]
    #[arg(long)]
    lr: Option<f64>,
    /// adamw, sgd, adam or ademamix [default: adamw]
    #[arg(long)]
    optimizer: Option<String>,
    /// Of sgd [default: 0]
    #[arg(long)]
    momentum: Option<f64>,
    /// Nesterov's form of momentum
    #[arg(long, num_args = 0, default_missing_value = "true")]
    nesterov: Option<bool>,
    /// [default: 0]
    #[arg(long)]
    weight_decay: Option<f64>,
    /// cosine (per step, to 0), constant, step or one-cycle [default: cosine]
    #[arg(long)]
    schedule: Option<String>,
    /// Steps over which the learning rate rises first [default: 0]
    #[arg(long)]
    lr_warmup: Option<usize>,
    /// Steps between falls of the step schedule [default: 100]
    #[arg(long)]
    lr_every: Option<usize>,
    /// Factor of the step schedule [default: 0.1]
    #[arg(long)]
    lr_gamma: Option<f64>,
    /// Bound on the gradient's norm, 0 for none [default: 5 for icp, none for supervised]
    #[arg(long)]
    clip: Option<f64>,
    /// all, head, last:N, bias, norm, lora:R, lora:R@GLOB,…, sparse:512KiB, sparse:25% (of full training's extra memory),
    /// or globs over parameter names; joined by + they add up [default: all]
    #[arg(long)]
    train: Option<String>,
    /// α of lora:R: its additions are multiplied by α/R [default: R]
    #[arg(long)]
    lora_alpha: Option<f64>,
    /// Fresh outputs for the last dense layer (or for a new one, see --at), so that the network learns new classes; +N:
    /// beside those it has
    #[arg(long, value_name = "N|+N")]
    head: Option<String>,
    /// The value to put the new head on, for a network without one; its output becomes the first
    #[arg(long, value_name = "VALUE")]
    at: Option<String>,
    /// Normalisation by the batch's statistics, or frozen [default: batch]
    #[arg(long)]
    norm: Option<String>,
    /// Put normalisations back that the exporter folded into convolutions, and fold them again in the export
    #[arg(long, num_args = 0, default_missing_value = "true")]
    reinsert_norms: Option<bool>,
    /// Held-out share of the data, or a path of held-out data; 0 for none [default: 0.2]
    #[arg(long, value_name = "FRACTION|DATA")]
    holdout: Option<String>,
    /// Decide by cross-validation over K folds instead, and train on all samples in the end: K + 1 runs [default: 0, off]
    #[arg(long, value_name = "K")]
    folds: Option<usize>,
    /// Data whose samples, without their labels, take part in ICP's feature term beside the labelled ones
    #[arg(long, value_name = "DATA")]
    unlabelled: Option<PathBuf>,
    /// Weight of information maximisation over samples without a label: their predictions are to be sure, and of all
    /// classes [default: 0]
    #[arg(long, value_name = "WEIGHT")]
    unlabelled_entropy: Option<f64>,
    /// Keep the new network even if it is not better
    #[arg(skip)]
    guard: Option<bool>,
    #[arg(skip)]
    shuffle: Option<bool>,
    /// [default: 0]
    #[arg(long)]
    seed: Option<u64>,
    /// [default: one per core]
    #[arg(long)]
    threads: Option<usize>,
    /// What is kept for the gradient is in f32, bf16 or f16 [default: f32]
    #[arg(long)]
    precision: Option<Precision>,
    /// Keep the trained weights in that half precision too, without an f32 copy; updates are rounded at random
    #[arg(long, num_args = 0, default_missing_value = "true")]
    master_free: Option<bool>,
    /// What the optimizer's moments are kept in: f32, bf16 or 8bit [default: f32]
    #[arg(long)]
    optimizer_state: Option<OptimizerState>,
    /// What the run may hold at most, as 64MiB: values are computed again rather than kept, batches are cut into parts
    #[arg(long, value_name = "SIZE")]
    memory_budget: Option<String>,
    /// Where --memory-budget cannot be kept otherwise, half precision may be used: bf16 for what gradients need, the
    /// optimizer's moments in 8 bits, weights without an f32 copy
    #[arg(long, num_args = 0, default_missing_value = "true")]
    allow_half: Option<bool>,
    /// Folder to keep checkpoints in
    #[arg(long, value_name = "DIR")]
    checkpoint: Option<PathBuf>,
    /// Steps between checkpoints [default: 20]
    #[arg(long)]
    checkpoint_every: Option<usize>,
    /// Continue from the checkpoint folder, if it holds anything
    #[arg(long, num_args = 0, default_missing_value = "true")]
    resume: Option<bool>,
    #[command(flatten)]
    #[serde(skip)]
    icp: IcpFlags,
    /// Condition on the result, such as "accuracy>=0.9", "gain.low>0" or "recall.3>=0.8"; exit code 3 when it does not hold
    #[arg(long, value_name = "EXPR")]
    require: Option<String>,
    /// Write a page with curves and confusion matrices
    #[arg(long, value_name = "PAGE.html")]
    report: Option<PathBuf>,
    /// Write the guard's and the conditions' outcomes as JUnit test cases
    #[arg(long, value_name = "FILE.xml")]
    junit: Option<PathBuf>,
    /// Give external data files new names where they would overwrite the source's
    #[arg(long, num_args = 0, default_missing_value = "true")]
    rename_data: Option<bool>,
    /// Write what changed, for `retune apply`: beside --output, or without it alone
    #[arg(long, value_name = "OUT.safetensors")]
    delta: Option<PathBuf>,
    /// full or sparse (exact), f16 or bf16 (differences, to 2⁻¹¹ or 2⁻⁸ of themselves) [default: full]
    #[arg(long)]
    delta_type: Option<String>,
}

/// Flags that switch something off.
#[derive(clap::Args, Debug, Clone, Default)]
pub struct Switches {
    /// Keep the new network even if it is not better
    #[arg(long)]
    no_guard: bool,
    /// Samples in the data's order, every epoch
    #[arg(long)]
    no_shuffle: bool,
    /// TOML file of options; flags go before it
    #[arg(long, value_name = "FILE.toml")]
    config: Option<PathBuf>,
}

/// The file's options with the flags over them and the defaults under them.
pub fn resolve(overrides: &Overrides, switches: &Switches) -> anyhow::Result<Config> {
    let mut table = match &switches.config {
        Some(path) => read(path)?,
        None => toml::Table::new(),
    };
    let mut overrides = overrides.clone();
    overrides.guard = switches.no_guard.then_some(false);
    overrides.shuffle = switches.no_shuffle.then_some(false);
    let flags = toml::Table::try_from(&overrides).context("options")?;
    table.extend(flags);
    table.extend(overrides.icp.table()?);
    from_table(table)
}

/// The options that a table of the file's keys says, over the defaults.
pub fn from_table(table: toml::Table) -> anyhow::Result<Config> {
    let config: Config =
        table.try_into().map_err(|e: toml::de::Error| anyhow::anyhow!("options: {}", e.message()))?;
    config.check()?;
    Ok(config)
}

pub(super) fn read(path: &Path) -> anyhow::Result<toml::Table> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    text.parse::<toml::Table>().with_context(|| path.display().to_string())
}
