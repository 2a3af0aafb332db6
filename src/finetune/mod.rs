//! The main job: a deployed network and data in, the same file with better weights out, never a worse one.

pub mod budget;
mod config;
mod folds;
mod inputs;
mod methods;
mod norms;
mod require;
mod write;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::delta::{DeltaType, Described};
use crate::error::{Error, Result};
use crate::exec::{Session, Usage};
use crate::export;
use crate::graph::Dim;
use crate::import::{Model, NewHead, replace_head};
use crate::tensor::DType;
use crate::train::data::{Batch, Dataset, InputSpec, epoch_order, split};
use crate::train::fit::{CheckpointOptions, Evaluated, Fitted, Progress, Run, evaluate, fit};
use crate::train::guard::{self, Verdict};
use crate::train::loss::{Loss, class_axis};
use crate::train::metrics::Metrics;
use crate::train::preset;
use crate::train::step::{Recipe, Shapes};

pub use config::{
    ClassWeights, Config, HeadSize, MethodName, NumberOr, OptimizerName, PerturberName, ScheduleName,
    parse_loss,
};
pub use inputs::set_inputs;
pub use require::{Judged, Require, unmet};
pub(crate) use write::{verified_batch, write_verified};

/// Samples per evaluation batch.
pub const EVAL_BATCH: usize = 64;

/// What a finetune did.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// On the held-out slice; `null` without one.
    pub before: Option<Metrics>,
    pub after: Option<Metrics>,
    /// Is the output the new network?
    pub kept: bool,
    /// Empty where only a delta was to be written, and the original is kept.
    pub output: PathBuf,
    pub steps: usize,
    pub skipped_steps: usize,
    pub seconds: f64,
    /// What the session held at its peak: arena, weights, gradients, optimizer, step state.
    pub peak_bytes: usize,
    pub memory: Usage,
    /// How the run kept to `--memory-budget`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub budget: Option<budget::Fitted>,
    /// `agrees`, or `unavailable: …` with the reason.
    pub verified: String,
    /// What `--delta` wrote.
    pub delta: Option<Described>,
    pub verdict: Option<Verdict>,
    /// Conditions of `--require` that were not met.
    pub unmet: Vec<String>,
    /// All of them.
    pub requirements: Vec<Judged>,
    pub trained_parameters: usize,
    pub training_samples: usize,
    pub heldout_samples: usize,
    pub taps: Vec<String>,
    pub notes: Vec<String>,
    #[serde(flatten)]
    pub curve: Curve,
}

/// Means per epoch.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Curve {
    pub epochs: Vec<crate::train::fit::Epoch>,
}

/// What a caller may want beside the summary, for a report.
pub struct Finished {
    pub summary: Summary,
    pub before: Option<Evaluated>,
    pub after: Option<Evaluated>,
    /// Of the data's folders; empty where classes are only numbered.
    pub class_names: Vec<String>,
    /// With the new weights, whether they were kept or not.
    pub session: Session,
    pub recipe: Recipe,
}

/// What the model declares of its inputs, in the types it is computed in.
pub fn input_specs(model: &Model) -> Vec<InputSpec> {
    let specs = model.graph.inputs.iter().map(|v| {
        let value = model.graph.value(*v);
        let (dtype, dims) = match &value.declared {
            Some(d) => (d.dtype.working(), d.dims.clone().unwrap_or_default()),
            None => (DType::F32, Vec::new()),
        };
        let dims: Vec<Option<usize>> = dims
            .iter()
            .map(|d| match d {
                Dim::Fixed(n) => Some(*n),
                _ => None,
            })
            .collect();
        InputSpec::new(value.name.clone(), dtype, &dims)
    });
    specs.collect()
}

/// Checks that data fit a loss: labels within the outputs' classes, or a target of the right shape.
pub fn check_target(session: &Session, loss: &Loss, data: Dataset) -> Result<Dataset> {
    data.require_target()?;
    let shapes = shapes_of(&data, 1)?;
    let net = crate::train::step::Network::new(
        session,
        crate::ops::Mode::EVAL,
        &shapes,
        &std::collections::HashMap::new(),
    )?;
    let Some(&output) = net.graph.outputs.first() else {
        return Err(Error::Config("the model has no output".into()));
    };
    let scores = match loss.wants_labels() {
        true => crate::graph::logits(&net.graph, output).0,
        false => output,
    };
    let dims = net.graph.meta(scores)?.dims.clone();
    let axis = class_axis(&net.graph, scores, Some(&shapes.target))?;
    match loss {
        Loss::CrossEntropy { .. } | Loss::ClassWeighted { .. } => match dims.get(axis) {
            Some(&classes) => {
                data.check_labels(classes)?;
                data.check_probabilities(classes)?;
                Ok(data)
            }
            None => Err(Error::Config(format!(
                "cross-entropy needs an output [N, classes], '{}' has shape {:?}",
                net.graph.value(output).name,
                dims.as_slice()
            ))),
        },
        Loss::Mse => data.float_target(&dims[1..]),
        Loss::Bce | Loss::Graph(_) | Loss::Entropy { .. } | Loss::Informed { .. } => Ok(data),
    }
}

/// How many classes the first output tells apart.
fn classes(session: &Session, data: &Dataset) -> Result<usize> {
    let shapes = shapes_of(data, 1)?;
    let none = std::collections::HashMap::new();
    let net = crate::train::step::Network::new(session, crate::ops::Mode::EVAL, &shapes, &none)?;
    let output = net.graph.outputs.first().copied();
    let output = output.ok_or_else(|| Error::Config("the model has no output".into()))?;
    let (scores, _) = crate::graph::logits(&net.graph, output);
    let axis = class_axis(&net.graph, scores, Some(&shapes.target))?;
    Ok(net.graph.meta(scores)?.dims.get(axis).copied().unwrap_or(1))
}

/// The shapes of a batch of the first `n` samples.
pub fn shapes_of(data: &Dataset, n: usize) -> Result<Shapes> {
    Shapes::of(&data.new_batch(n.clamp(1, data.len().max(1))))
}

/// Finetunes `model` on `data` (bound to the model's inputs, see [`input_specs`]) and writes `output`.
///
/// `held` are held-out data of their own; without them the configured share of `data` is held out. Where `output` is the
/// configured `delta`, that alone is written, and nothing where the guard keeps the original.
pub fn finetune(
    model: Arc<Model>,
    data: Dataset,
    held: Option<Dataset>,
    config: &Config,
    output: &Path,
    observe: &mut dyn FnMut(&Progress),
) -> Result<Finished> {
    config.check()?;
    if config.train == "all" && config.head.is_none() {
        model.require_trainable()?;
    }
    let started = Instant::now();
    let loss = config.loss()?;
    let requirement = config.require.as_deref().map(Require::parse).transpose()?;
    let original = model;
    let (model, headed) = with_head(&original, &data, config)?;
    let options = config.session();
    let session_options = options.clone();
    let mut session = Session::new(model, options)?;
    let (data, unlabelled) = data.withheld()?;
    let data = check_target(&session, &loss, data)?;
    let held = held.map(|h| check_target(&session, &loss, h)).transpose()?;
    let mut notes: Vec<String> = data.notes().to_vec();
    notes.extend(headed);

    let labelled = without(data.len(), &unlabelled);
    if !unlabelled.is_empty() {
        notes.push(format!("{} samples have no label", unlabelled.len()));
    }
    let (train, held_indices) = match (&held, config.holdout_fraction()?) {
        _ if config.folds > 0 => (labelled, Vec::new()),
        (Some(h), _) => (labelled, (0..h.len()).collect()),
        (None, Some(0.0)) => (labelled, Vec::new()),
        (None, Some(fraction)) => {
            let labels = data.labels().map(|l| labelled.iter().map(|i| l[*i]).collect::<Vec<i64>>());
            let s = split(labelled.len(), fraction, config.seed, labels.as_deref())?;
            let of = |places: &[usize]| places.iter().map(|p| labelled[*p]).collect::<Vec<usize>>();
            (of(&s.train), of(&s.held))
        }
        (None, None) => return Err(Error::Config("held-out data were named and not opened".into())),
    };
    let reinserted = match config.reinsert_norms {
        true => {
            session.set_exact(true);
            Some(norms::reinsert(&mut session, &data, &train)?)
        }
        false => None,
    };
    if let Some(r) = &reinserted {
        session = Session::new(r.model.clone(), session_options.clone())?;
        notes.push(format!(
            "{} folded normalisations were put back for the training, and folded again",
            r.len()
        ));
    }
    let model = session.model().clone();
    let held_data = held.as_ref().unwrap_or(&data);
    let plain = loss;
    let loss = match &config.class_weights {
        None => plain.clone(),
        Some(weights) => {
            let labels: Option<Vec<i64>> =
                data.labels().map(|all| train.iter().map(|i: &usize| all[*i]).collect());
            let weights = weights.resolve(labels.as_deref(), classes(&session, &data)?)?;
            Loss::ClassWeighted { label_smoothing: config.label_smoothing, weights: Arc::new(weights) }
        }
    };
    let loss = match (config.unlabelled_entropy, unlabelled.is_empty()) {
        (0.0, _) => loss,
        (_, true) => {
            let what = "--unlabelled-entropy needs samples without a label: give --unlabelled DATA, or label some -1";
            return Err(Error::Config(what.into()));
        }
        (weight, false) => Loss::Informed { labelled: Box::new(loss), weight },
    };
    if held_indices.is_empty() && config.folds == 0 && requirement.is_some() {
        return Err(Error::Config("--require needs held-out data: --holdout must not be 0".into()));
    }

    let beside = if unlabelled.is_empty() { 1 } else { 2 };
    if beside > 1 && (config.folds > 0 || config.memory_budget.is_some()) {
        return Err(Error::Config(
            "samples without a label do not go with --folds or --memory-budget".into(),
        ));
    }
    let shapes = Shapes::of(&data.new_batch(beside * config.batch.min(train.len())))?;
    let mut ask = config.ask(&loss, &shapes);
    if config.train.contains("sparse:") {
        ask.batches = some_batches(&data, &train, config)?;
    }
    let chosen = preset::choose(&mut session, &ask)?;
    notes.extend(chosen.notes);
    let mut recipe = Recipe { params: chosen.params, ..ask.recipe.clone() };
    let job = budget::Job {
        session: &session,
        recipe: &recipe,
        method: &|| config.training_method(false),
        allow_half: config.allow_half,
        shapes: &shapes,
        epochs: config.epochs,
        samples: train.len(),
        held: held_indices.len(),
        data: data.bytes() + held.as_ref().map_or(0, Dataset::bytes),
        train: &config.train,
        copies: if config.delta.is_some() { 2 } else { 0 },
        folded: reinserted.is_some(),
        edited: config.head.is_some() || reinserted.is_some(),
    };
    let budget = config.memory_budget()?.map(|b| job.fit(b)).transpose()?;
    let (mut batch, mut evaluated) = (config.batch, EVAL_BATCH);
    if let Some(b) = &budget {
        session = session.alike(b.options(session.options()))?;
        recipe.accumulate *= b.parts;
        batch = if b.parts > 1 { b.micro } else { batch };
        evaluated = b.evaluated.max(1);
        notes.extend(b.describe());
    }
    let measure = |session: &mut Session| -> Result<Option<Evaluated>> {
        match held_indices.is_empty() {
            true => Ok(None),
            false => measured(session, &plain, held_data, &held_indices, evaluated).map(Some),
        }
    };
    let mut before = measure(&mut session)?;
    let mut method = config.training_method(!unlabelled.is_empty())?;
    let checkpoint = match &config.checkpoint {
        Some(folder) => Some(CheckpointOptions {
            folder: folder.clone(),
            every: config.checkpoint_every,
            resume: config.resume,
            fingerprint: fingerprint(&model, &data, config)?,
        }),
        None => None,
    };
    let run = Run {
        epochs: config.epochs,
        batch,
        lr: config.lr,
        schedule: config.schedule(),
        shuffle: config.shuffle,
        seed: config.seed,
        checkpoint,
        companions: unlabelled,
    };
    let crossed = match config.folds {
        0 => None,
        k => {
            notes.push(format!(
                "{k} folds: before and after are of all {} samples, each held out once; {} runs instead of one",
                data.len(),
                k + 1
            ));
            let job = folds::Job {
                session: &session,
                data: &data,
                recipe: &recipe,
                run: &run,
                loss: &plain,
                config,
                evaluated,
            };
            Some(folds::cross_validate(&job, observe)?)
        }
    };
    recipe.prepare(&mut session)?;
    let fitted: Fitted = fit(&mut session, &recipe, method.as_mut(), &data, &train, &run, observe)?;
    // Those that were compared: behind what is perturbed.
    let taps = method.tap_names(&session, &shapes)?;
    if fitted.skipped_steps > 0 {
        notes.push(format!("{} step(s) were skipped: loss or gradient not finite", fitted.skipped_steps));
    }
    let mut after = measure(&mut session)?;
    let crossed_samples = crossed.as_ref().map_or(0, |_| data.len());
    if let Some((b, a)) = crossed {
        (before, after) = (Some(b), Some(a));
    }
    if let Some(left_out) = after.as_ref().and_then(|a| a.left_out.as_ref()) {
        notes.push(format!("{left_out} was left out of the loss, which works on its input"));
    }
    let verdict = before.as_ref().zip(after.as_ref()).map(|(b, a)| guard::compare(b, a));
    let requirements = match (&requirement, &before, &after, &verdict) {
        (Some(r), Some(b), Some(a), Some(v)) => r.judge(b, a, v, data.class_names())?,
        _ => Vec::new(),
    };
    let unmet = unmet(&requirements);
    let kept = unmet.is_empty() && (!config.guard || verdict.is_none_or(|v| v.better));
    let (usage, mut verified, mut delta) = (session.usage(), "original kept".to_string(), None);
    drop(method);
    if budget.is_some() {
        session.release();
    }
    if kept {
        (verified, delta) =
            write::write(&mut session, reinserted.as_ref(), held_data, config, output, budget.as_ref())?;
    } else if config.delta.as_deref() != Some(output) {
        export::write(&original, &[], output, export::Options { rename_data: config.rename_data })?;
    }
    let summary = Summary {
        before: before.as_ref().map(|e| e.metrics.clone()),
        after: after.as_ref().map(|e| e.metrics.clone()),
        kept,
        output: if kept || config.delta.as_deref() != Some(output) {
            output.to_path_buf()
        } else {
            PathBuf::new()
        },
        steps: fitted.steps,
        skipped_steps: fitted.skipped_steps,
        seconds: started.elapsed().as_secs_f64(),
        peak_bytes: usage.total(),
        memory: usage,
        budget,
        verified,
        delta,
        verdict,
        unmet,
        requirements,
        trained_parameters: recipe.params.iter().map(|w| session.trained_len(*w)).sum(),
        training_samples: train.len(),
        heldout_samples: held_indices.len() + crossed_samples,
        taps,
        notes,
        curve: Curve { epochs: fitted.epochs },
    };
    Ok(Finished { summary, before, after, class_names: data.class_names().to_vec(), session, recipe })
}

/// Evaluates as the file computes elsewhere, whatever the training's precision.
fn measured(
    session: &mut Session,
    loss: &Loss,
    data: &Dataset,
    indices: &[usize],
    batch: usize,
) -> Result<Evaluated> {
    session.set_exact(true);
    let measured = evaluate(session, loss, data, indices, batch);
    session.set_exact(false);
    measured
}

/// Batches of training samples, as a preset measures on; all of one size.
fn some_batches(data: &Dataset, train: &[usize], config: &Config) -> Result<Vec<Batch>> {
    let n = config.batch.min(train.len()).max(1);
    let order = epoch_order(train.len(), config.seed, 0, true);
    let batches = order.chunks_exact(n).take(preset::MEASURED_BATCHES).map(|picks| {
        let mut batch = data.new_batch(n);
        data.batch(&picks.iter().map(|i| train[*i]).collect::<Vec<_>>(), None, &mut batch)?;
        Ok(batch)
    });
    batches.collect()
}

/// `0..n` without those of `some`, which are in order.
fn without(n: usize, some: &[usize]) -> Vec<usize> {
    (0..n).filter(|i| some.binary_search(i).is_err()).collect()
}

/// The model with the new head that was asked for, and a note of it.
fn with_head(model: &Arc<Model>, data: &Dataset, config: &Config) -> Result<(Arc<Model>, Option<String>)> {
    let Some(size) = &config.head else { return Ok((model.clone(), None)) };
    let (outputs, add) = size.parse()?;
    let head = NewHead { outputs, add, at: config.at.clone(), seed: config.seed };
    let mut batch = data.new_batch(1);
    data.batch(&[0], None, &mut batch)?;
    let inputs: Vec<_> = batch.inputs.iter().map(|(name, t)| (name.clone(), t.meta())).collect();
    let (new, what) = replace_head(model, &head, &inputs)?;
    let note = format!(
        "new head: {what} has {outputs} fresh outputs; `before` is measured with them untrained, and the guard compares \
         with that"
    );
    Ok((Arc::new(new), Some(note)))
}

/// Everything that decides a run's result, in one hash.
fn fingerprint(model: &Model, data: &Dataset, config: &Config) -> Result<String> {
    let mut hash = Sha256::new();
    for f in &model.files {
        hash.update(&f.bytes);
    }
    // What has no influence on the weights may change between a run and its continuation.
    let decisive = Config {
        threads: 0,
        checkpoint: None,
        checkpoint_every: 0,
        resume: false,
        report: None,
        junit: None,
        require: None,
        guard: true,
        rename_data: false,
        delta: None,
        delta_type: DeltaType::Full,
        unlabelled: None,
        ..config.clone()
    };
    let text = serde_json::to_string(&decisive).map_err(|e| Error::Config(e.to_string()))?;
    hash.update(text.as_bytes());
    for (v, value) in &model.graph.fixed {
        hash.update(v.0.to_le_bytes());
        hash.update(value.bytes());
    }
    let mut batch = data.new_batch(1);
    hash.update((data.len() as u64).to_le_bytes());
    for i in 0..data.len() {
        data.batch(&[i], None, &mut batch)?;
        batch.inputs.iter().for_each(|(_, t)| hash.update(t.bytes()));
        if let Some(t) = &batch.target {
            hash.update(t.bytes());
        }
    }
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}
