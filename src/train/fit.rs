//! The training loop: epochs, steps, checkpoints.

use std::path::PathBuf;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::exec::Session;
use crate::tensor::Tensor;
use crate::train::checkpoint::{Checkpoints, Position};
use crate::train::data::{Augment, Batch, Dataset, epoch_order};
use crate::train::loss::Loss;
use crate::train::method::{At, Method};
use crate::train::metrics::{Confusion, Meter, Metrics, labels_of, predicted};
use crate::train::schedule::Schedule;
use crate::train::step::{self, Apply, Evaluation, Recipe, Shapes, feeds};

/// Scores of a batch up to which training steps count what was classified right.
const MOST_COUNTED: usize = 1 << 20;

/// How long and in what order to train.
#[derive(Debug, Clone)]
pub struct Run {
    pub epochs: usize,
    pub batch: usize,
    pub lr: f64,
    pub schedule: Schedule,
    pub shuffle: bool,
    pub seed: u64,
    pub checkpoint: Option<CheckpointOptions>,
    /// Samples without a label: a batch takes as many of them as of the labelled ones, in an order of their own.
    pub companions: Vec<usize>,
}

#[derive(Debug, Clone)]
pub struct CheckpointOptions {
    pub folder: PathBuf,
    /// Steps between checkpoints.
    pub every: usize,
    /// Continue from what the folder holds, if anything.
    pub resume: bool,
    /// Hash of everything that decides the result: a checkpoint of another run is refused.
    pub fingerprint: String,
}

/// One optimizer step, as reported while training.
#[derive(Debug, Clone)]
pub struct Progress {
    pub step: usize,
    pub steps: usize,
    pub epoch: usize,
    pub epochs: usize,
    pub loss: f64,
    pub features: Option<f64>,
    /// On the epoch's batches so far; absent without labels.
    pub accuracy: Option<f64>,
    pub lr: f64,
    pub skipped: bool,
    /// Samples seen per second since the run began (or was resumed).
    pub samples_per_second: f64,
}

/// Means over one epoch.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Epoch {
    pub loss: f64,
    pub features: Option<f64>,
    pub accuracy: Option<f64>,
}

/// What a run did.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Fitted {
    pub steps: usize,
    /// Steps whose loss or gradient was not finite: nothing was changed by them.
    pub skipped_steps: usize,
    pub epochs: Vec<Epoch>,
}

/// Sums over the epoch under way, kept in checkpoints so that a resumed run reports the same.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Running {
    loss: f64,
    features: f64,
    taught: usize,
    batches: usize,
    hits: usize,
    labelled: usize,
}

impl Running {
    fn epoch(&self) -> Epoch {
        let mean = |sum: f64, n: usize| (n > 0).then(|| sum / n as f64);
        Epoch {
            loss: mean(self.loss, self.batches).unwrap_or(0.0),
            features: mean(self.features, self.taught),
            accuracy: mean(self.hits as f64, self.labelled),
        }
    }
}

/// Seed of one batch's random numbers: a function of its place in the run alone.
fn seed_of(seed: u64, step: usize, part: usize) -> u64 {
    let x = seed ^ ((step as u64) << 20 | part as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (x ^ (x >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9) << 2
}

/// Trains on the samples `indices` of `data`.
///
/// The result is a function of the session's weights, the data and the options: not of the number of
/// threads, and not of how often the run was interrupted and resumed.
pub fn fit(
    session: &mut Session,
    recipe: &Recipe,
    method: &mut dyn Method,
    data: &Dataset,
    indices: &[usize],
    run: &Run,
    observe: &mut dyn FnMut(&Progress),
) -> Result<Fitted> {
    if indices.is_empty() || run.batch == 0 || run.epochs == 0 {
        return Err(Error::Config("training needs samples, a batch size and epochs of at least 1".into()));
    }
    let micro = run.batch.min(indices.len());
    let parts = recipe.accumulate.max(1);
    let per_step = (micro * parts).min(indices.len());
    let per_epoch = indices.len().div_ceil(per_step);
    let steps = per_epoch * run.epochs;
    let mut batch = data.new_batch(micro);
    method.begin(data.len());
    let mut companions =
        Companions { all: &run.companions, seed: run.seed, shuffle: run.shuffle, order: None };
    // Everything is compiled before the first step, so that memory is known and errors come early.
    for n in batch_sizes(indices.len(), micro) {
        let sample = data.new_batch(n + companions.beside(n));
        method.prepare(session, recipe, &Shapes::of(&sample)?, run.epochs)?;
    }
    let apply = if parts > 1 { Some(step::apply(session, recipe)?) } else { None };

    let mut position = Position::default();
    let mut checkpoints = match &run.checkpoint {
        Some(options) => Some(Checkpoints::open(options, session, &mut position)?),
        None => None,
    };
    let started = Instant::now();
    let mut samples = 0;
    let mut order = (usize::MAX, Vec::new());
    while position.fitted.steps < steps {
        let at_step = position.fitted.steps;
        let (epoch, within) = (at_step / per_epoch, at_step % per_epoch);
        if order.0 != epoch {
            order = (epoch, epoch_order(indices.len(), run.seed, epoch as u64, run.shuffle));
        }
        let chosen = &order.1[within * per_step..((within + 1) * per_step).min(indices.len())];
        let lr = run.lr * run.schedule.factor(at_step, steps);
        step::set_step(session, lr, at_step + 1 - position.fitted.skipped_steps);
        let mut outcome = Outcome::default();
        for (part, picks) in chosen.chunks(micro).enumerate() {
            let labelled = picks.len();
            let mut picks: Vec<usize> = picks.iter().map(|i| indices[*i]).collect();
            companions.join(&mut picks, at_step * per_step + part * micro);
            if batch.len() != picks.len() {
                batch = data.new_batch(picks.len());
            }
            data.batch(&picks, Some(Augment { seed: run.seed, epoch: epoch as u64 }), &mut batch)?;
            step::set_share(session, labelled as f64 / chosen.len() as f64, part == 0);
            let at = At {
                epoch,
                epochs: run.epochs,
                step: at_step,
                steps,
                seed: seed_of(run.seed, at_step, part),
            };
            let learned = method.learn(session, recipe, &batch, &at)?;
            outcome.add(&learned, labelled, chosen.len());
            position.running.add(&learned, &batch, &recipe.loss);
        }
        samples += chosen.len();
        if let Some(apply) = &apply {
            outcome.scale = Some(run_apply(session, apply)?);
        }
        let skipped = outcome.scale.is_some_and(|s| !s.is_finite());
        let accuracy = position.running.epoch().accuracy;
        position.fitted.steps += 1;
        position.fitted.skipped_steps += usize::from(skipped);
        if within + 1 == per_epoch {
            position.fitted.epochs.push(position.running.epoch());
            position.running = Running::default();
        }
        observe(&Progress {
            step: position.fitted.steps,
            steps,
            epoch,
            epochs: run.epochs,
            loss: outcome.loss,
            features: outcome.features,
            accuracy,
            lr,
            skipped,
            samples_per_second: samples as f64 / started.elapsed().as_secs_f64().max(1e-9),
        });
        if let Some(c) = &mut checkpoints
            && (position.fitted.steps % c.every() == 0 || position.fitted.steps == steps)
        {
            c.save(session, &position)?;
        }
    }
    Ok(position.fitted)
}

/// The unlabelled samples beside the labelled ones of a step: a function of its place in the run alone.
struct Companions<'a> {
    all: &'a [usize],
    seed: u64,
    shuffle: bool,
    /// The order in which a pass over them goes, and which pass.
    order: Option<(usize, Vec<usize>)>,
}

impl Companions<'_> {
    /// How many join `n` labelled samples.
    fn beside(&self, n: usize) -> usize {
        if self.all.is_empty() { 0 } else { n }
    }

    /// Appends as many as `picks` holds; `from` counts the labelled samples before it.
    fn join(&mut self, picks: &mut Vec<usize>, from: usize) {
        let n = self.all.len();
        for k in from..from + self.beside(picks.len()) {
            let pass = k / n;
            if self.order.as_ref().is_none_or(|o| o.0 != pass) {
                // Of another seed than the labelled samples' order.
                let seed = self.seed ^ 0x756e_6c61_6265_6c6c;
                self.order = Some((pass, epoch_order(n, seed, pass as u64, self.shuffle)));
            }
            picks.extend(self.order.as_ref().map(|(_, order)| self.all[order[k % n]]));
        }
    }
}

/// The sizes of batches that an epoch of `n` samples has.
fn batch_sizes(n: usize, micro: usize) -> Vec<usize> {
    let last = n % micro;
    if last == 0 { vec![micro] } else { vec![micro, last] }
}

fn run_apply(session: &mut Session, apply: &Apply) -> Result<f64> {
    session.run(&apply.program, &[], 0)?;
    session.scalar(&apply.program, apply.scale)
}

/// What the parts of one step add up to.
#[derive(Default)]
struct Outcome {
    loss: f64,
    features: Option<f64>,
    scale: Option<f64>,
}

impl Outcome {
    fn add(&mut self, l: &crate::train::method::Learned, n: usize, of: usize) {
        let share = n as f64 / of as f64;
        self.loss += l.loss * share;
        if let Some(f) = l.features {
            *self.features.get_or_insert(0.0) += f * share;
        }
        self.scale = l.scale.or(self.scale);
    }
}

impl Running {
    fn add(&mut self, l: &crate::train::method::Learned, batch: &Batch, loss: &Loss) {
        if l.task.is_finite() {
            self.loss += l.task;
            self.batches += 1;
        }
        if let Some(f) = l.features.filter(|f| f.is_finite()) {
            self.features += f;
            self.taught += 1;
        }
        let labels = batch.target.as_ref().filter(|_| loss.wants_labels()).and_then(labels_of);
        let Some(labels) = labels.filter(|_| l.logits.len() <= MOST_COUNTED) else { return };
        for item in items(&l.logits.to_f64(), l.logits.dims()) {
            if let Some(label) = labels.get(item.index).filter(|l| **l >= 0) {
                self.hits += usize::from(predicted(item.classes, |c| item.at(c)) as i64 == *label);
                self.labelled += 1;
            }
        }
    }
}

/// One labelled place of a batch: a sample, or a pixel or word of one.
struct Item<'a> {
    sample: usize,
    /// Among all of the batch.
    index: usize,
    classes: usize,
    logits: &'a [f64],
    stride: usize,
}

impl Item<'_> {
    fn at(&self, class: usize) -> f64 {
        self.logits[class * self.stride]
    }
}

/// The items of logits [N, C, …].
fn items<'a>(logits: &'a [f64], dims: &[usize]) -> impl Iterator<Item = Item<'a>> {
    let (n, classes, stride) = match dims {
        [n, classes, inner @ ..] => (*n, *classes, inner.iter().product::<usize>()),
        _ => (0, 0, 0),
    };
    (0..n * stride).map(move |index| {
        let (sample, place) = (index / stride, index % stride);
        Item { sample, index, classes, logits: &logits[sample * classes * stride + place..], stride }
    })
}

/// Loss and metrics over samples, and what the guard needs of each of them.
#[derive(Debug, Clone, Default)]
pub struct Evaluated {
    pub metrics: Metrics,
    pub confusion: Confusion,
    /// Per sample, where the loss is a sum over samples: its loss, and the share of its items that were classified right.
    pub losses: Vec<f64>,
    pub hits: Vec<f64>,
    pub left_out: Option<String>,
}

/// Evaluates the present weights on the samples `indices`, in evaluation mode.
pub fn evaluate(
    session: &mut Session,
    loss: &Loss,
    data: &Dataset,
    indices: &[usize],
    batch_size: usize,
) -> Result<Evaluated> {
    let mut meter = Meter::default();
    let mut out = Evaluated::default();
    let mut plans: Vec<(usize, Evaluation)> = Vec::new();
    let mut batch = data.new_batch(batch_size.min(indices.len()).max(1));
    for picks in indices.chunks(batch_size.max(1)) {
        if batch.len() != picks.len() {
            batch = data.new_batch(picks.len());
        }
        data.batch(picks, None, &mut batch)?;
        if !plans.iter().any(|p| p.0 == picks.len()) {
            plans.push((picks.len(), Evaluation::new(session, loss, &Shapes::of(&batch)?)?));
        }
        let Some((_, plan)) = plans.iter().find(|p| p.0 == picks.len()) else { continue };
        session.run(&plan.program, &feeds(&plan.inputs, plan.attached.target, &batch)?, 0)?;
        let value = session.scalar(&plan.program, plan.attached.loss)?;
        let logits = session.output(&plan.program, plan.attached.logits)?.to_tensor();
        let target = batch.target.as_ref().filter(|_| loss.wants_labels());
        match target.and_then(|t| Some((t, labels_of(t)?))) {
            Some((target, labels)) => {
                let values = logits.to_f64();
                meter.add(value, picks.len(), Some((&values, logits.dims(), &labels)));
                out.per_sample(&values, logits.dims(), &labels, target);
            }
            None => {
                meter.add(value, picks.len(), None);
                out.losses.extend(std::iter::repeat_n(value, picks.len()));
            }
        }
        out.left_out.clone_from(&plan.attached.left_out);
    }
    out.metrics = meter.metrics();
    out.confusion = meter.confusion().clone();
    Ok(out)
}

impl Evaluated {
    /// Adds what was found of other samples.
    pub fn pool(&mut self, other: &Evaluated) {
        self.confusion.add(&other.confusion);
        let samples = self.metrics.samples + other.metrics.samples;
        let sum = |m: &Metrics| m.loss * m.samples as f64;
        let loss = (sum(&self.metrics) + sum(&other.metrics)) / samples.max(1) as f64;
        let labelled = self.metrics.accuracy.is_some() || other.metrics.accuracy.is_some();
        self.metrics = Metrics::of(loss, samples, labelled.then_some(&self.confusion));
        self.losses.extend(&other.losses);
        self.hits.extend(&other.hits);
        self.left_out.clone_from(&other.left_out);
    }

    /// Cross-entropy and hits of each sample of `[N, C, …]` logits, means over its items that count; `target` has the
    /// labels, or probabilities.
    fn per_sample(&mut self, logits: &[f64], dims: &[usize], labels: &[i64], target: &Tensor) {
        let soft = target.get::<f32>().ok();
        let mut sums = vec![(0.0, 0.0, 0usize); dims.first().copied().unwrap_or(0)];
        for item in items(logits, dims) {
            let Some(&label) = labels.get(item.index).filter(|l| **l >= 0) else { continue };
            let all = || (0..item.classes).map(|c| item.at(c));
            let max = all().fold(f64::NEG_INFINITY, f64::max);
            let log_sum = max + all().map(|x| (x - max).exp()).sum::<f64>().ln();
            let soft = soft.and_then(|q| q.get(item.index * item.classes..(item.index + 1) * item.classes));
            let score = match soft {
                Some(q) => all().zip(q).map(|(x, q)| x * f64::from(*q)).sum::<f64>(),
                None if (label as usize) < item.classes => item.at(label as usize),
                None => f64::NAN,
            };
            let sum = &mut sums[item.sample];
            sum.0 += log_sum - score;
            sum.1 += f64::from(u8::from(predicted(item.classes, |c| item.at(c)) as i64 == label));
            sum.2 += 1;
        }
        for (loss, hits, counted) in sums.into_iter().filter(|s| s.2 > 0) {
            self.losses.push(loss / counted as f64);
            self.hits.push(hits / counted as f64);
        }
    }
}
