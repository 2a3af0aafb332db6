//! The options of ICP and its rivals on the command line, for every command that trains or perturbs.

use anyhow::Context;
use serde::Serialize;

use crate::finetune::Config;

/// What is not given comes from the file, else from the defaults.
#[derive(clap::Args, Debug, Clone, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct IcpFlags {
    /// adam, sgd, ademamix, or sign: by the gradient's sign alone [default: adam]
    #[arg(long)]
    icp_perturber: Option<String>,
    /// constructive (down the loss), adversarial (up), noise (as much as constructive, at random) or none [default:
    /// constructive]
    #[arg(long)]
    icp_direction: Option<String>,
    /// Perturbation steps K [default: 1]
    #[arg(long)]
    icp_steps: Option<usize>,
    /// Size of a perturbation step [default: 0.01]
    #[arg(long)]
    icp_epsilon: Option<f64>,
    /// What it counts in: input, gradient (each sample's by its root mean square) or std (of the batch) [default: input]
    #[arg(long)]
    icp_unit: Option<String>,
    /// How far a perturbed sample may lie from the clean one: none, linf:RADIUS or l2:RADIUS [default: none]
    #[arg(long, value_name = "none|linf:R|l2:R")]
    icp_ball: Option<String>,
    /// Least and largest value that data can have, such as 0:1 [default: none]
    #[arg(long, value_name = "none|LOW:HIGH", allow_hyphen_values = true)]
    icp_range: Option<String>,
    /// Which samples move: all, wrong (misclassified ones) or uncertain:P (the largest probability is below P) [default:
    /// all]
    #[arg(long, value_name = "all|wrong|uncertain:P")]
    icp_which: Option<String>,
    /// fresh (K gradients a batch), warm (from the sample's last perturbation on) or free (by the gradient that the sample's
    /// last training step gave) [default: fresh]
    #[arg(long)]
    icp_reuse: Option<String>,
    /// What is perturbed: auto (the float inputs, or an embedding), first (the first trained layer's input) or values by
    /// name [default: auto]
    #[arg(long, value_name = "auto|first|NAME,…")]
    icp_at: Option<String>,
    /// Share of the epochs that train plainly first [default: 0]
    #[arg(long)]
    icp_warmup: Option<f64>,
    /// Weight of the task loss: schedule, per-step, or a number [default: schedule]
    #[arg(long)]
    icp_alpha: Option<String>,
    /// What the schedule of that weight does not fall below [default: 0]
    #[arg(long)]
    icp_alpha_floor: Option<f64>,
    /// How features are compared: mse, channel (by the teacher's deviation), cosine, or none: the weight's schedule alone
    /// [default: mse]
    #[arg(long)]
    icp_features: Option<String>,
    /// cosine, inverse-cosine or uniform [default: cosine]
    #[arg(long)]
    icp_weights: Option<String>,
    /// auto, the first:N or last:N of those, or names of values to compare features at [default: auto]
    #[arg(long, value_name = "auto|first:N|last:N|NAME,…")]
    icp_taps: Option<String>,
    /// Decay of the teacher's averaged weights, 0 for the network's own [default: 0.95]
    #[arg(long, value_name = "DECAY")]
    icp_ema: Option<f64>,
    /// Part of the network's own output in what auxiliary heads learn [default: 0.3]
    #[arg(long)]
    byot_alpha: Option<f64>,
    /// [default: 3]
    #[arg(long)]
    byot_temperature: Option<f64>,
}

impl IcpFlags {
    /// As keys of the TOML file.
    pub fn table(&self) -> anyhow::Result<toml::Table> {
        toml::Table::try_from(self).context("options")
    }

    /// These over the defaults.
    pub fn config(&self) -> anyhow::Result<Config> {
        super::config::from_table(self.table()?)
    }
}
