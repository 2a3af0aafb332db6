//! The options of an adaptation, as a TOML file and the command line spell them.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::finetune::{OptimizerName, ScheduleName};
use crate::icp::{Alpha, Icp, Settings, Taps};
use crate::train::data::ImageOptions;
use crate::train::loss::Loss;
use crate::train::optimizer::Optimizer;
use crate::train::schedule::{Schedule, Shape};
use crate::train::step::Norm;

/// How a network adapts to data without labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MethodName {
    /// Running statistics of normalisations only; nothing is trained.
    Stats,
    /// Entropy over every sample.
    Tent,
    /// Entropy over samples that are sure and not redundant.
    Eata,
    /// Entropy, sharpness-aware, over samples that are sure.
    Sar,
    /// Entropy, and the entropy of the mean prediction the other way.
    Infomax,
    /// Confident predictions as labels.
    Pseudo,
    /// ICP on the entropy.
    Icp,
    /// ICP on confident predictions as labels.
    #[serde(rename = "icp-pseudo")]
    IcpPseudo,
}

impl MethodName {
    pub const ALL: [&str; 8] = ["stats", "tent", "eata", "sar", "infomax", "pseudo", "icp", "icp-pseudo"];
}

/// What becomes of running statistics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StatisticsName {
    /// Measured on all samples there are.
    Exact,
    /// Each batch moves them towards its own.
    Moving,
    /// As in the file.
    Source,
}

/// Every option of `retune adapt` with its default; keys of the TOML file are the long flags' names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Config {
    pub method: MethodName,
    /// Inputs of the model that are the same for every sample, each as `NAME=VALUE`.
    pub set: Vec<String>,
    pub statistics: StatisticsName,
    /// The source's statistics weigh as much as so many samples.
    pub source_weight: f64,
    /// Of `statistics = "moving"`: how far a batch moves them, 0 to 1.
    pub momentum: f64,
    /// One pass, batch by batch, in the data's order.
    pub stream: bool,
    /// Passes over a fixed set.
    pub epochs: usize,
    /// Updates a batch.
    pub steps: usize,
    pub batch: usize,
    /// Absent: the method's.
    pub lr: Option<f64>,
    /// Absent: adam, for sar sgd.
    pub optimizer: Option<OptimizerName>,
    /// Of sgd.
    pub sgd_momentum: f64,
    /// Absent: cosine over passes of a fixed set, constant in a stream.
    pub schedule: Option<ScheduleName>,
    /// Absent: what the method's paper trains.
    pub train: Option<String>,
    /// Normalisation in the steps that learn: by the batch's statistics, or by the running ones.
    pub norm: Norm,
    /// Samples of a stream that are kept.
    pub memory: usize,
    /// E₀ of eata and sar as a share of ln(classes).
    pub entropy_margin: f64,
    /// d of eata; absent: 1.3/√classes.
    pub redundancy: Option<f64>,
    /// ρ of sar.
    pub sar_rho: f64,
    /// Average entropy, in nats, below which sar starts again.
    pub sar_recovery: f64,
    /// The diversity term's factor in infomax.
    pub diversity: f64,
    /// Of pseudo-labels: the probability from which a prediction counts.
    pub confidence: f64,
    pub icp_steps: usize,
    pub icp_epsilon: f64,
    /// The entropy's (or pseudo-labels') share of ICP's loss; the feature term has the rest.
    pub icp_entropy: f64,
    /// `auto`, or value names joined by commas.
    pub icp_taps: String,
    /// Collapse is watched for, and the network reset.
    pub guard: bool,
    /// Steps between the guard's looks.
    pub check_every: usize,
    /// What predictions that changed may lose of the probability that re-estimated statistics alone gave them, on average
    /// over all, as a multiple of the square of the share that those expect to be wrong, 1 − mean confidence. Halved with
    /// each reset.
    pub drift: f64,
    /// Share of the spread of predictions over classes that may be lost.
    pub balance: f64,
    /// Mean entropy, as a share of what it was, below which predictions have collapsed.
    pub entropy_floor: f64,
    /// Mean entropy, as a multiple of what it was, above which they have.
    pub entropy_ceiling: f64,
    /// Resets after which learning ends.
    pub resets: usize,
    /// Conditions on the result, such as `accuracy>=0.9`: for data with labels.
    pub require: Option<String>,
    /// Where to write the guard's and the conditions' outcomes as JUnit test cases.
    pub junit: Option<PathBuf>,
    pub seed: u64,
    /// 0: one per core.
    pub threads: usize,
    /// External data files get new names where they would overwrite the source's.
    pub rename_data: bool,
    pub images: ImageOptions,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            method: MethodName::Infomax,
            set: Vec::new(),
            statistics: StatisticsName::Exact,
            source_weight: 16.0,
            momentum: 0.1,
            stream: false,
            epochs: 3,
            steps: 1,
            batch: 64,
            lr: None,
            optimizer: None,
            sgd_momentum: 0.9,
            schedule: None,
            train: None,
            norm: Norm::Batch,
            memory: 512,
            entropy_margin: 0.4,
            redundancy: None,
            sar_rho: 0.05,
            sar_recovery: 0.02,
            diversity: 1.0,
            confidence: 0.9,
            icp_steps: 5,
            icp_epsilon: 0.002,
            icp_entropy: 0.0,
            icp_taps: "auto".into(),
            guard: true,
            check_every: 16,
            drift: 2.4,
            balance: 0.25,
            entropy_floor: 0.02,
            entropy_ceiling: 2.0,
            resets: 3,
            require: None,
            junit: None,
            seed: 0,
            threads: 0,
            rename_data: false,
            images: ImageOptions::default(),
        }
    }
}

/// The share of errors that a network expects of itself from which the rate is whole.
const UNSURE: f64 = 0.2;

fn config<T>(what: impl Into<String>) -> Result<T> {
    Err(Error::Config(what.into()))
}

impl Config {
    /// Refuses what makes no sense, naming the option.
    pub fn check(&self) -> Result<()> {
        let counts = [
            ("epochs", self.epochs),
            ("steps", self.steps),
            ("batch", self.batch),
            ("memory", self.memory),
            ("check-every", self.check_every),
        ];
        if let Some((name, _)) = counts.iter().find(|c| c.1 == 0) {
            return config(format!("--{name} must be at least 1"));
        }
        let numbers = [
            ("lr", self.lr.unwrap_or(0.0)),
            ("source-weight", self.source_weight),
            ("sgd-momentum", self.sgd_momentum),
            ("entropy-margin", self.entropy_margin),
            ("redundancy", self.redundancy.unwrap_or(0.0)),
            ("sar-rho", self.sar_rho),
            ("sar-recovery", self.sar_recovery),
            ("diversity", self.diversity),
            ("icp-epsilon", self.icp_epsilon),
            ("drift", self.drift),
            ("entropy-floor", self.entropy_floor),
            ("entropy-ceiling", self.entropy_ceiling),
        ];
        if let Some((name, x)) = numbers.iter().find(|n| !n.1.is_finite() || n.1 < 0.0) {
            return config(format!("--{name} {x}: must be a number from 0"));
        }
        let shares = [
            ("momentum", self.momentum),
            ("confidence", self.confidence),
            ("icp-entropy", self.icp_entropy),
            ("balance", self.balance),
        ];
        if let Some((name, x)) = shares.iter().find(|s| !(0.0..=1.0).contains(&s.1)) {
            return config(format!("--{name} {x}: must be from 0 to 1"));
        }
        if self.schedule == Some(ScheduleName::Step) {
            return config("--schedule step: adapt takes cosine, constant or one-cycle");
        }
        if self.stream && self.schedule.is_some_and(|s| s != ScheduleName::Constant) {
            return config("--schedule: the end of a stream is not known, so its rate is constant");
        }
        if self.statistics == StatisticsName::Moving && !self.stream {
            return config("--statistics moving belongs to --stream: over a fixed set they are exact");
        }
        if self.statistics == StatisticsName::Source && self.method == MethodName::Stats {
            return config("--method stats with --statistics source changes nothing");
        }
        Ok(())
    }

    /// The learning rate: the one given, or the method's own, on samples that the network is sure of as given by
    /// `confidence`, the mean probability of its predictions.
    ///
    /// Adam's steps are as long where gradients are next to nothing: where all weights move, the rate is the smaller the
    /// less there is to correct.
    pub fn rate(&self, confidence: f64) -> f64 {
        let own = match self.method {
            MethodName::Tent | MethodName::Eata | MethodName::Sar => 1e-3,
            _ => 1e-4 * ((1.0 - confidence) / UNSURE).clamp(0.0, 1.0),
        };
        self.lr.unwrap_or(own)
    }

    /// Which parameters train, as `train::select` spells it.
    pub fn trained(&self) -> &str {
        match (&self.train, self.method) {
            (Some(train), _) => train,
            (None, MethodName::Tent | MethodName::Eata | MethodName::Sar) => "norm",
            (None, _) => "all",
        }
    }

    pub fn optimizer(&self) -> Optimizer {
        let name = self.optimizer.unwrap_or(match self.method {
            MethodName::Sar => OptimizerName::Sgd,
            _ => OptimizerName::Adam,
        });
        match name {
            OptimizerName::Sgd => {
                Optimizer::Sgd { momentum: self.sgd_momentum, nesterov: false, weight_decay: 0.0 }
            }
            OptimizerName::Adam => Optimizer::adam(0.0, false),
            OptimizerName::Adamw => Optimizer::adam(0.0, true),
            OptimizerName::Ademamix => Optimizer::ademamix(0.0),
        }
    }

    pub fn schedule(&self) -> Schedule {
        let shape = match self.schedule {
            Some(ScheduleName::Cosine) => Shape::Cosine,
            Some(ScheduleName::OneCycle) => Shape::OneCycle,
            None if !self.stream => Shape::Cosine,
            _ => Shape::Constant,
        };
        Schedule { shape, warmup: 0 }
    }

    /// What is minimised.
    pub fn loss(&self) -> Loss {
        match self.method {
            MethodName::Pseudo | MethodName::IcpPseudo => Loss::CrossEntropy { label_smoothing: 0.0 },
            MethodName::Infomax => Loss::Entropy { diversity: self.diversity },
            _ => Loss::Entropy { diversity: 0.0 },
        }
    }

    /// ICP with these options.
    pub fn icp(&self) -> Icp {
        let names = || self.icp_taps.split(',').map(|n| n.trim().to_string()).collect();
        Icp::new(Settings {
            steps: self.icp_steps,
            epsilon: self.icp_epsilon,
            alpha: Alpha::Fixed(self.icp_entropy),
            taps: if self.icp_taps == "auto" { Taps::Auto } else { Taps::Names(names()) },
            ..Settings::paper()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_makes_no_sense() {
        let bad = |f: fn(&mut Config)| {
            let mut c = Config::default();
            f(&mut c);
            c.check().unwrap_err().to_string()
        };
        assert!(bad(|c| c.batch = 0).contains("--batch"));
        assert!(bad(|c| c.lr = Some(f64::NAN)).contains("--lr"));
        assert!(bad(|c| c.drift = -1.5).contains("--drift"));
        assert!(
            bad(|c| (c.method, c.statistics) = (MethodName::Stats, StatisticsName::Source))
                .contains("nothing")
        );
        Config::default().check().unwrap();
    }

    #[test]
    fn a_file_of_defaults_reads_as_defaults() {
        let text = serde_json::to_string(&Config::default()).unwrap();
        assert_eq!(serde_json::from_str::<Config>(&text).unwrap(), Config::default());
        assert!(serde_json::from_str::<Config>(r#"{"metod": "tent"}"#).is_err());
    }
}
