//! The options of a finetune, as a TOML file and the command line spell them.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::delta::DeltaType;
use crate::error::{Error, Result};
use crate::exec::{OptimizerState, Options, Precision};
use crate::icp::{Direction, Features, Reuse, Settings, Unit, Weights};
use crate::train::data::ImageOptions;
use crate::train::loss::Loss;
use crate::train::optimizer::Optimizer;
use crate::train::preset::Ask;
use crate::train::schedule::{Schedule, Shape};
use crate::train::select::Select;
use crate::train::step::{Norm, Recipe, Shapes};

/// How the weights learn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MethodName {
    Supervised,
    Icp,
    /// Auxiliary heads: the rival of ICP.
    Byot,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerName {
    Sgd,
    Adam,
    Adamw,
    Ademamix,
}

/// How ICP steps along the input's gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PerturberName {
    Sgd,
    Adam,
    Ademamix,
    /// By ε along the gradient's sign.
    Sign,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScheduleName {
    Constant,
    Cosine,
    Step,
    OneCycle,
}

/// A number, or a word that stands for a rule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum NumberOr {
    Number(f64),
    Word(String),
}

/// Weights of classes in the loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ClassWeights {
    List(Vec<f64>),
    /// `balanced`: in inverse proportion to how often a class occurs; or numbers joined by commas.
    Word(String),
}

impl ClassWeights {
    /// One weight a class, for these labels of the training data.
    pub fn resolve(&self, labels: Option<&[i64]>, classes: usize) -> Result<Vec<f64>> {
        let list = match self {
            ClassWeights::List(list) => list.clone(),
            ClassWeights::Word(w) if w == "balanced" => {
                let Some(labels) = labels else {
                    return config("--class-weights balanced needs one label a sample");
                };
                let mut counts = vec![0usize; classes];
                labels.iter().filter_map(|l| usize::try_from(*l).ok()).for_each(|l| {
                    if let Some(n) = counts.get_mut(l) {
                        *n += 1;
                    }
                });
                let seen = counts.iter().filter(|n| **n > 0).count().max(1);
                let weight = |n: &usize| match n {
                    0 => 1.0,
                    n => labels.len() as f64 / (seen * n) as f64,
                };
                return Ok(counts.iter().map(weight).collect());
            }
            ClassWeights::Word(w) => match w.split(',').map(|x| x.trim().parse()).collect() {
                Ok(list) => list,
                Err(_) => {
                    return config(format!(
                        "--class-weights {w}: takes `balanced`, or numbers joined by commas"
                    ));
                }
            },
        };
        if list.len() != classes {
            return config(format!("--class-weights: {} weights for {classes} classes", list.len()));
        }
        if list.iter().any(|w: &f64| !w.is_finite() || *w < 0.0) || list.iter().sum::<f64>() <= 0.0 {
            return config("--class-weights: weights are numbers from 0, not all of them 0");
        }
        Ok(list)
    }
}

/// How many fresh outputs a head has.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum HeadSize {
    Number(usize),
    /// `N`, or `+N`: beside those that the layer has.
    Word(String),
}

impl HeadSize {
    /// The number, and whether the outputs that are there stay.
    pub fn parse(&self) -> Result<(usize, bool)> {
        let (n, add) = match self {
            HeadSize::Number(n) => (Some(*n), false),
            HeadSize::Word(w) => (w.strip_prefix('+').unwrap_or(w).parse().ok(), w.starts_with('+')),
        };
        match n {
            Some(n) if n > 0 => Ok((n, add)),
            _ => config("--head takes a number of outputs from 1, or +N to add N to those there are"),
        }
    }
}

/// Every option of `retune finetune` with its default; keys of the TOML file are the long flags' names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Config {
    pub method: MethodName,
    /// Inputs of the model that are the same for every sample, each as `NAME=VALUE`: [`super::set_inputs`] gives them to the model.
    pub set: Vec<String>,
    /// `cross-entropy`, `bce`, `mse`, or the path of an ONNX graph.
    pub loss: String,
    pub label_smoothing: f64,
    /// Of cross-entropy, in training.
    pub class_weights: Option<ClassWeights>,
    pub epochs: usize,
    pub batch: usize,
    /// Batches whose gradients make one update.
    pub accumulate: usize,
    pub lr: f64,
    pub optimizer: OptimizerName,
    pub momentum: f64,
    pub nesterov: bool,
    pub weight_decay: f64,
    pub schedule: ScheduleName,
    /// Steps over which the learning rate rises first.
    pub lr_warmup: usize,
    /// For `schedule = "step"`: multiply by `lr-gamma` every `lr-every` steps.
    pub lr_every: usize,
    pub lr_gamma: f64,
    /// Bound on the gradient's norm; 0: off; absent: off for supervised, 5 for ICP.
    pub clip: Option<f64>,
    /// `all`, `head`, `last:N`, `bias`, `norm`, `lora:R[@globs]`, `sparse:BUDGET`, or globs over parameter names; several joined by `+`.
    pub train: String,
    /// α of low-rank additions, whose factor is α over the rank; absent: the rank.
    pub lora_alpha: Option<f64>,
    /// Outputs of a fresh head: of the last dense layer, or of one put on the value `at`.
    pub head: Option<HeadSize>,
    pub at: Option<String>,
    pub norm: Norm,
    /// Normalisations that the exporter folded into convolutions are put back for the training.
    pub reinsert_norms: bool,
    /// Share of the data that is held out, or the path of held-out data; 0: none.
    pub holdout: NumberOr,
    /// Instead of a held-out slice: cross-validation over so many folds decides, and all samples train; 0: off.
    pub folds: usize,
    /// Data whose samples, without their labels, take part in ICP's feature term, or in `unlabelled_entropy`.
    pub unlabelled: Option<PathBuf>,
    /// Weight of information maximisation over samples that have no label; 0: none.
    #[serde(skip_serializing_if = "is_zero")]
    pub unlabelled_entropy: f64,
    pub guard: bool,
    pub shuffle: bool,
    pub seed: u64,
    /// 0: one per core.
    pub threads: usize,
    pub precision: Precision,
    pub master_free: bool,
    pub optimizer_state: OptimizerState,
    /// What a run may hold at most, as `64MiB`.
    pub memory_budget: Option<String>,
    /// To keep to it, half precision may be used where nothing else is enough.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub allow_half: bool,
    pub checkpoint: Option<PathBuf>,
    pub checkpoint_every: usize,
    pub resume: bool,
    pub icp_perturber: PerturberName,
    pub icp_direction: Direction,
    pub icp_steps: usize,
    pub icp_epsilon: f64,
    pub icp_unit: Unit,
    /// `none`, `linf:RADIUS` or `l2:RADIUS`.
    pub icp_ball: String,
    /// `none` or `LOW:HIGH`.
    pub icp_range: String,
    /// `all`, `wrong`, or `uncertain:P`.
    pub icp_which: String,
    pub icp_reuse: Reuse,
    /// `auto`, `first`, or value names joined by commas.
    pub icp_at: String,
    /// Share of the epochs that train plainly first.
    pub icp_warmup: f64,
    /// `schedule`, `per-step`, or a number.
    pub icp_alpha: NumberOr,
    /// Below which the schedule of α does not fall.
    pub icp_alpha_floor: f64,
    pub icp_features: Features,
    pub icp_weights: Weights,
    /// `auto`, `first:N`, `last:N`, or value names joined by commas.
    pub icp_taps: String,
    /// Decay of the teacher's averaged weights; 0: the teacher is the network itself.
    pub icp_ema: f64,
    /// Part of the output's own distribution in what auxiliary heads learn (`method = "byot"`).
    pub byot_alpha: f64,
    pub byot_temperature: f64,
    /// Conditions on the result, such as `accuracy>=0.9`.
    pub require: Option<String>,
    /// Where to write the report page.
    pub report: Option<PathBuf>,
    /// Where to write the guard's and the conditions' outcomes as JUnit test cases.
    pub junit: Option<PathBuf>,
    /// External data files get new names where they would overwrite the source's.
    pub rename_data: bool,
    /// Where to write what changed; where that is the run's output, nothing else is written.
    pub delta: Option<PathBuf>,
    pub delta_type: DeltaType,
    pub images: ImageOptions,
}

impl Default for Config {
    fn default() -> Self {
        let icp = Settings::default();
        Config {
            method: MethodName::Icp,
            set: Vec::new(),
            loss: "cross-entropy".into(),
            label_smoothing: 0.0,
            class_weights: None,
            epochs: 10,
            batch: 32,
            accumulate: 1,
            lr: 3e-4,
            optimizer: OptimizerName::Adamw,
            momentum: 0.0,
            nesterov: false,
            weight_decay: 0.0,
            schedule: ScheduleName::Cosine,
            lr_warmup: 0,
            lr_every: 100,
            lr_gamma: 0.1,
            clip: None,
            train: "all".into(),
            lora_alpha: None,
            head: None,
            at: None,
            norm: Norm::Batch,
            reinsert_norms: false,
            holdout: NumberOr::Number(0.2),
            folds: 0,
            unlabelled: None,
            unlabelled_entropy: 0.0,
            guard: true,
            shuffle: true,
            seed: 0,
            threads: 0,
            precision: Precision::F32,
            master_free: false,
            optimizer_state: OptimizerState::F32,
            memory_budget: None,
            allow_half: false,
            checkpoint: None,
            checkpoint_every: 20,
            resume: false,
            icp_perturber: PerturberName::Adam,
            icp_direction: Direction::Constructive,
            icp_steps: icp.steps,
            icp_epsilon: icp.epsilon,
            icp_unit: Unit::Input,
            icp_ball: "none".into(),
            icp_range: "none".into(),
            icp_which: "all".into(),
            icp_reuse: Reuse::Fresh,
            icp_at: "auto".into(),
            icp_warmup: 0.0,
            icp_alpha: NumberOr::Word("schedule".into()),
            icp_alpha_floor: 0.0,
            icp_features: Features::Mse,
            icp_weights: Weights::Cosine,
            icp_taps: "auto".into(),
            icp_ema: icp.ema.unwrap_or(0.0),
            byot_alpha: 0.3,
            byot_temperature: 3.0,
            require: None,
            report: None,
            junit: None,
            rename_data: false,
            delta: None,
            delta_type: DeltaType::Full,
            images: ImageOptions::default(),
        }
    }
}

pub(super) fn config<T>(what: impl Into<String>) -> Result<T> {
    Err(Error::Config(what.into()))
}

impl Config {
    /// Refuses what makes no sense, naming the option.
    pub fn check(&self) -> Result<()> {
        let positive = [("epochs", self.epochs), ("batch", self.batch), ("accumulate", self.accumulate)];
        if let Some((name, _)) = positive.iter().find(|p| p.1 == 0) {
            return config(format!("--{name} must be at least 1"));
        }
        let numbers = [
            ("lr", self.lr),
            ("momentum", self.momentum),
            ("weight-decay", self.weight_decay),
            ("clip", self.clip.unwrap_or(0.0)),
            ("icp-epsilon", self.icp_epsilon),
            ("unlabelled-entropy", self.unlabelled_entropy),
        ];
        if let Some((name, x)) = numbers.iter().find(|p| !p.1.is_finite() || p.1 < 0.0) {
            return config(format!("--{name} {x}: must be a number from 0"));
        }
        if !(0.0..1.0).contains(&self.label_smoothing) {
            return config(format!("--label-smoothing {}: must be from 0 to below 1", self.label_smoothing));
        }
        if self.unlabelled_entropy > 0.0 && self.loss != "cross-entropy" {
            return config("--unlabelled-entropy belongs to --loss cross-entropy");
        }
        if self.class_weights.is_some() && self.loss != "cross-entropy" {
            return config("--class-weights belong to --loss cross-entropy");
        }
        self.images.augmentation().check()?;
        if self.nesterov && self.momentum == 0.0 {
            return config("--nesterov needs --momentum above 0");
        }
        self.head.as_ref().map(HeadSize::parse).transpose()?;
        if self.at.is_some() && self.head.is_none() {
            return config("--at needs --head N");
        }
        if self.master_free && self.precision == Precision::F32 {
            return config(
                "--master-free needs --precision bf16 or f16: it keeps no f32 copy of the weights",
            );
        }
        if self.memory_budget()?.is_none() && self.allow_half {
            return config(
                "--allow-half is for --memory-budget; --precision bf16 takes half precision in any case",
            );
        }
        if self.resume && self.checkpoint.is_none() {
            return config("--resume needs --checkpoint DIR");
        }
        if self.delta.is_some() && self.head.is_some() {
            return config(
                "--delta cannot hold a new head, whose nodes the base file lacks: send the --output instead",
            );
        }
        if let Some(a) = self.lora_alpha.filter(|a| !a.is_finite() || *a <= 0.0) {
            return config(format!("--lora-alpha {a}: must be a number above 0"));
        }
        self.train.parse::<Select>().map_err(|e| Error::Config(format!("--train {e}")))?;
        if self.folds == 1 {
            return config("--folds 1: from 2, or 0 for a held-out slice");
        }
        if self.folds > 0 && self.holdout_fraction()?.is_none() {
            return config("--folds holds out each sample once: it takes no --holdout DATA");
        }
        self.check_methods()?;
        self.holdout_fraction()?;
        Ok(())
    }

    /// The held-out share, or `None` where held-out data are given by path.
    pub fn holdout_fraction(&self) -> Result<Option<f64>> {
        let fraction = match &self.holdout {
            NumberOr::Number(x) => *x,
            NumberOr::Word(w) => match w.parse() {
                Ok(x) => x,
                Err(_) => return Ok(None),
            },
        };
        match (0.0..1.0).contains(&fraction) {
            true => Ok(Some(fraction)),
            false => config(format!("--holdout {fraction}: must be from 0 to below 1, or the path of data")),
        }
    }

    /// What a run may hold at most, in bytes.
    pub fn memory_budget(&self) -> Result<Option<usize>> {
        let parse = |text: &String| {
            crate::size::parse(text).map_err(|e| Error::Config(format!("--memory-budget {e}")))
        };
        self.memory_budget.as_ref().map(parse).transpose()
    }

    fn optimizer_named(&self, name: OptimizerName, weight_decay: f64) -> Optimizer {
        match name {
            OptimizerName::Sgd => {
                Optimizer::Sgd { momentum: self.momentum, nesterov: self.nesterov, weight_decay }
            }
            OptimizerName::Adam => Optimizer::adam(weight_decay, false),
            OptimizerName::Adamw => Optimizer::adam(weight_decay, true),
            OptimizerName::Ademamix => Optimizer::ademamix(weight_decay),
        }
    }

    /// The optimizer of the weights.
    pub fn optimizer(&self) -> Optimizer {
        self.optimizer_named(self.optimizer, self.weight_decay)
    }

    pub fn schedule(&self) -> Schedule {
        let shape = match self.schedule {
            ScheduleName::Constant => Shape::Constant,
            ScheduleName::Cosine => Shape::Cosine,
            ScheduleName::Step => Shape::Step { every: self.lr_every, gamma: self.lr_gamma },
            ScheduleName::OneCycle => Shape::OneCycle,
        };
        Schedule { shape, warmup: self.lr_warmup }
    }

    /// The bound on the gradient's norm, with the method's default.
    pub fn clip_norm(&self) -> Option<f64> {
        let default = match self.method {
            MethodName::Icp => 5.0,
            MethodName::Supervised | MethodName::Byot => 0.0,
        };
        Some(self.clip.unwrap_or(default)).filter(|c| *c > 0.0)
    }

    /// How a session of this run computes.
    pub fn session(&self) -> Options {
        Options {
            threads: self.threads,
            seed: self.seed,
            precision: self.precision,
            master_free: self.master_free,
            optimizer_state: self.optimizer_state,
            ..Options::default()
        }
    }

    /// What of the model is to learn, by the loss for batches of these shapes.
    pub fn ask<'a>(&'a self, loss: &'a Loss, shapes: &'a Shapes) -> Ask<'a> {
        let recipe = Recipe {
            loss: loss.clone(),
            optimizer: self.optimizer(),
            clip: self.clip_norm(),
            params: Vec::new(),
            norm: self.norm,
            accumulate: self.accumulate,
        };
        Ask {
            select: &self.train,
            lora_alpha: self.lora_alpha,
            seed: self.seed,
            loss,
            shapes,
            recipe,
            method: Box::new(|| self.training_method(false)),
            epochs: self.epochs,
            batches: Vec::new(),
            // One that is written wrongly is said where the run is planned.
            memory: self.memory_budget().ok().flatten(),
        }
    }

    /// The loss of labelled samples; an ONNX graph is loaded.
    pub fn loss(&self) -> Result<Loss> {
        parse_loss(&self.loss, self.label_smoothing)
    }
}

/// Left out where it is: what is hashed or recorded of runs does not change with every new option.
fn is_zero(x: &f64) -> bool {
    *x == 0.0
}

/// A loss by its name on the command line.
pub fn parse_loss(name: &str, label_smoothing: f64) -> Result<Loss> {
    Ok(match name {
        "cross-entropy" => Loss::CrossEntropy { label_smoothing },
        "bce" => Loss::Bce,
        "mse" => Loss::Mse,
        path if path.ends_with(".onnx") => Loss::Graph(std::sync::Arc::new(crate::import::load(path)?)),
        other => return config(format!("--loss {other}: takes cross-entropy, bce, mse or FILE.onnx")),
    })
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
        assert!(bad(|c| c.epochs = 0).contains("--epochs"));
        assert!(bad(|c| c.lr = f64::NAN).contains("--lr"));
        assert!(bad(|c| c.holdout = NumberOr::Number(1.0)).contains("--holdout"));
        assert!(bad(|c| c.icp_alpha = NumberOr::Word("half".into())).contains("--icp-alpha"));
        assert!(bad(|c| c.head = Some(HeadSize::Number(0))).contains("--head"));
        assert!(bad(|c| c.head = Some(HeadSize::Word("+x".into()))).contains("--head"));
        assert_eq!(HeadSize::Word("+5".into()).parse().unwrap(), (5, true));
        assert!(bad(|c| c.at = Some("x".into())).contains("--head"));
        assert!(bad(|c| c.nesterov = true).contains("--momentum"));
        assert!(bad(|c| c.master_free = true).contains("--precision"));
        assert!(bad(|c| c.allow_half = true).contains("--memory-budget"));
        assert!(bad(|c| c.memory_budget = Some("64 apples".into())).contains("--memory-budget"));
        assert!(bad(|c| c.train = "lora:0".into()).contains("--train"));
        assert!(bad(|c| c.lora_alpha = Some(0.0)).contains("--lora-alpha"));
        Config::default().check().unwrap();
    }

    #[test]
    fn class_weights_balance_or_are_given() {
        let word = |w: &str| ClassWeights::Word(w.into());
        // Classes 0, 0, 0, 2: 4/(2·3) and 4/(2·1); one that does not occur stays at 1.
        let w = word("balanced").resolve(Some(&[0, 0, 0, 2]), 3).unwrap();
        assert!((w[0] - 2.0 / 3.0).abs() < 1e-12 && w[1] == 1.0 && w[2] == 2.0);
        assert_eq!(word("1, 2.5").resolve(None, 2).unwrap(), [1.0, 2.5]);
        assert_eq!(ClassWeights::List(vec![1.0]).resolve(None, 1).unwrap(), [1.0]);
        for bad in ["1", "1,x", "0,0", "1,-1"] {
            assert!(word(bad).resolve(None, 2).is_err(), "{bad}");
        }
        assert!(word("balanced").resolve(None, 2).is_err());
    }

    #[test]
    fn clipping_depends_on_the_method() {
        let mut c = Config::default();
        assert_eq!(c.clip_norm(), Some(5.0));
        c.method = MethodName::Supervised;
        assert_eq!(c.clip_norm(), None);
        c.clip = Some(1.0);
        assert_eq!(c.clip_norm(), Some(1.0));
        c.clip = Some(0.0);
        assert_eq!(c.clip_norm(), None);
    }
}
