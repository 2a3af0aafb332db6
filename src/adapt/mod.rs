//! Adaptation without labels: running statistics re-estimated where the network runs, then, if asked, weights that learn
//! from the network's own predictions, under a guard that goes back when they collapse.
//!
//! ```text
//! data ─→ statistics ─→ steps (entropy, filtered, sharpness-aware, pseudo-labels, ICP) ⇄ looks ─→ export
//!             │                                                                            │
//!             └── refused where the samples are of few classes              reset to the last sound state
//! ```
//!
//! Every method starts from re-estimated statistics and ends with them, or with the original, where the guard finds its
//! result collapsed.

mod config;
mod eata;
mod entropy;
mod pseudo;
mod run;
mod sar;
mod scores;
mod shift;
mod statistics;
mod watch;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;

use crate::error::{Error, Result};
use crate::exec::{Session, Usage};
use crate::export;
use crate::finetune::{EVAL_BATCH, Judged, Require, check_target, unmet, write_verified};
use crate::import::Model;
use crate::tensor::Tensor;
use crate::train::data::{Batch, Dataset, Samples};
use crate::train::fit::{Evaluated, Progress, evaluate};
use crate::train::guard::{self, Verdict};
use crate::train::loss::Loss;
use crate::train::method::{At, Learned};
use crate::train::metrics::Metrics;
use crate::train::step::{Recipe, Shapes};

pub use config::{Config, MethodName, StatisticsName};
pub use scores::{Batches, Health, Opinion, Scorer, Scores, weigh};
pub use statistics::{Moments, Statistics, blended, pool};
pub use watch::Look;

use run::{End, Run};

/// A way to learn from a batch whose target is one weight a sample.
pub trait Adaptation {
    /// Compiles what batches of these shapes need.
    fn prepare(&mut self, session: &mut Session, recipe: &Recipe, shapes: &Shapes) -> Result<()>;

    /// Learns from a batch; `None` when no sample of it was worth learning from. May change the batch's target.
    fn learn(
        &mut self,
        session: &mut Session,
        recipe: &Recipe,
        batch: &mut Batch,
        at: &At,
    ) -> Result<Option<Learned>>;

    /// Does the method itself find that it has collapsed?
    fn collapsed(&self) -> bool {
        false
    }

    /// Forgets what it knows of the batches so far: the network went back to an earlier state.
    fn reset(&mut self) {}
}

/// Samples that come one batch after the other.
pub trait Stream {
    /// The next batch, bound to the model's inputs; `None` at the end.
    fn next(&mut self) -> Result<Option<Dataset>>;
}

/// What is adapted to.
pub enum Input {
    /// All samples at once. Labels, where there are any, are only reported on.
    Set(Dataset),
    Stream(Box<dyn Stream>),
}

/// Data in memory, batch by batch in their order.
struct Rows {
    data: Dataset,
    at: usize,
    batch: usize,
}

impl Stream for Rows {
    fn next(&mut self) -> Result<Option<Dataset>> {
        let end = (self.at + self.batch).min(self.data.len());
        if self.at == end {
            return Ok(None);
        }
        let rows: Vec<usize> = (self.at..end).collect();
        self.at = end;
        self.data.subset(&rows).map(Some)
    }
}

/// What an adaptation did.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// On the data's labels; `null` without any. No part of it is learned from.
    pub before: Option<Metrics>,
    pub after: Option<Metrics>,
    /// Is the output another network than the one that came in?
    pub kept: bool,
    /// `adapted`, `statistics` (weights as they were) or `original`.
    pub ended: &'static str,
    pub output: PathBuf,
    pub method: MethodName,
    pub samples: usize,
    /// The learning rate, before its schedule and resets; 0 when nothing was learned.
    pub lr: f64,
    pub steps: usize,
    /// Updates whose loss or gradient was not finite.
    pub skipped_steps: usize,
    /// Batches without a sample that the method would learn from.
    pub passed_over: usize,
    pub resets: usize,
    pub seconds: f64,
    pub peak_bytes: usize,
    pub memory: Usage,
    /// `agrees`, or `unavailable: …` with the reason.
    pub verified: String,
    /// Of the labels, before against after; decides nothing but `--require`.
    pub verdict: Option<Verdict>,
    /// Conditions of `--require` that were not met.
    pub unmet: Vec<String>,
    /// All of them.
    pub requirements: Vec<Judged>,
    /// Of a stream with labels: the share predicted right when they came, by the network as it then was.
    pub online_accuracy: Option<f64>,
    /// The guard's looks, in order.
    pub looks: Vec<Look>,
    pub trained_parameters: usize,
    pub notes: Vec<String>,
}

/// Adapts `model` to unlabelled samples and writes `output`.
///
/// `reference` is a small set that drift is measured on. Data with labels are learned from as if they had none.
pub fn adapt(
    model: Arc<Model>,
    input: Input,
    reference: Option<Dataset>,
    config: &Config,
    output: &Path,
    observe: &mut dyn FnMut(&Progress),
) -> Result<Summary> {
    config.check()?;
    let started = Instant::now();
    let requirement = config.require.as_deref().map(Require::parse).transpose()?;
    let mut labelled = None;
    let mut notes = Vec::new();
    let (input, shapes) = match input {
        Input::Set(data) => {
            notes.extend(data.notes().iter().filter(|n| !n.starts_with("no ")).cloned());
            let shapes = unlabelled_shapes(&data)?;
            if data.labels().is_some() {
                labelled = Some(data.clone());
            }
            let input = match config.stream {
                true => Input::Stream(Box::new(Rows { data, at: 0, batch: config.batch })),
                false => Input::Set(data.without_target().0),
            };
            (input, shapes)
        }
        Input::Stream(stream) => {
            let mut stream = Peeked { first: None, rest: stream };
            stream.first = stream.rest.next()?;
            let first = stream.first.as_ref();
            let first = first.ok_or_else(|| Error::Data("the stream holds no samples".into()))?;
            let shapes = unlabelled_shapes(first)?;
            (Input::Stream(Box::new(stream)), shapes)
        }
    };
    if requirement.is_some() && labelled.is_none() {
        return Err(Error::Config(
            "--require needs data with labels: they are only judged by, not learned from".into(),
        ));
    }
    let mut run = Run::new(model.clone(), &shapes, reference, config)?;
    let loss = Loss::CrossEntropy { label_smoothing: 0.0 };
    let labelled = labelled.map(|d| check_target(&run.session, &loss, d)).transpose()?;
    let measure = |session: &mut Session| -> Result<Option<Evaluated>> {
        let Some(data) = &labelled else { return Ok(None) };
        let all: Vec<usize> = (0..data.len()).collect();
        evaluate(session, &loss, data, &all, EVAL_BATCH).map(Some)
    };
    let before = measure(&mut run.session)?;
    let (end, inputs) = match input {
        Input::Set(data) => {
            let end = run.episodes(&data, observe)?;
            (end, some_inputs(&model, &data)?)
        }
        Input::Stream(mut stream) => {
            let (end, memory) = run.follow(stream.as_mut(), observe)?;
            (end, some_inputs(&model, &memory)?)
        }
    };
    let after = measure(&mut run.session)?;
    let verdict = before.as_ref().zip(after.as_ref()).map(|(b, a)| guard::compare(b, a));
    let requirements = match (&requirement, &before, &after, &verdict) {
        (Some(r), Some(b), Some(a), Some(v)) => {
            r.judge(b, a, v, labelled.as_ref().map_or(&[], |d| d.class_names()))?
        }
        _ => Vec::new(),
    };
    let unmet = unmet(&requirements);
    let kept = end != End::Original && unmet.is_empty();
    let usage = run.session.usage();
    let options = export::Options { rename_data: config.rename_data };
    let verified = match kept {
        true => {
            let changes = run.session.changes()?;
            let m = run.session.model().clone();
            write_verified(&mut run.session, &m, &changes, &inputs, options, output)?
        }
        false => {
            export::write(&model, &[], output, options)?;
            "original kept".to_string()
        }
    };
    let log = run.log;
    notes.extend(log.notes);
    Ok(Summary {
        before: before.map(|e| e.metrics),
        after: after.map(|e| e.metrics),
        kept,
        ended: match end {
            _ if !kept => "original",
            End::Adapted => "adapted",
            End::Statistics => "statistics",
            End::Original => "original",
        },
        output: output.to_path_buf(),
        method: config.method,
        samples: log.samples,
        lr: log.lr,
        steps: log.steps,
        skipped_steps: log.skipped,
        passed_over: log.passed_over,
        resets: log.resets,
        seconds: started.elapsed().as_secs_f64(),
        peak_bytes: usage.total(),
        memory: usage,
        verified,
        verdict,
        unmet,
        requirements,
        online_accuracy: (log.labelled > 0).then(|| log.hits as f64 / log.labelled as f64),
        looks: log.looks,
        trained_parameters: run.recipe.params.iter().map(|w| model.weight(*w).len()).sum(),
        notes,
    })
}

/// A stream whose first batch was looked at.
struct Peeked {
    first: Option<Dataset>,
    rest: Box<dyn Stream>,
}

impl Stream for Peeked {
    fn next(&mut self) -> Result<Option<Dataset>> {
        match self.first.take() {
            Some(first) => Ok(Some(first)),
            None => self.rest.next(),
        }
    }
}

/// The shapes of one sample; the target, one weight.
fn unlabelled_shapes(data: &Dataset) -> Result<Shapes> {
    let mut batch = data.new_batch(1);
    batch.target = Some(Tensor::zeros(crate::tensor::DType::F32, &[1]));
    Shapes::of(&batch)
}

/// Inputs of a few samples, to compare the export on.
fn some_inputs(model: &Model, samples: &dyn Samples) -> Result<Vec<(String, Tensor)>> {
    let n = crate::finetune::verified_batch(model, samples.len());
    let mut batch = Batch::default();
    samples.fill(&(0..n).collect::<Vec<_>>(), &mut batch)?;
    Ok(batch.inputs)
}
