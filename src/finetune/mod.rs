//! The main job: a deployed network and data in, the same file with better weights out, never a worse one.

mod config;
mod inputs;
mod methods;
mod norms;
mod require;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::exec::{Options, Session, Usage};
use crate::export::{self, Verification};
use crate::graph::{Dim, WeightId};
use crate::import::{Model, NewHead, replace_head};
use crate::tensor::{DType, Tensor};
use crate::train::data::{Dataset, InputSpec, split};
use crate::train::fit::{CheckpointOptions, Evaluated, Fitted, Progress, Run, evaluate, fit};
use crate::train::guard::{self, Verdict};
use crate::train::loss::{Loss, class_axis};
use crate::train::metrics::Metrics;
use crate::train::select::Select;
use crate::train::step::{Recipe, Shapes};

pub use config::{
    ClassWeights, Config, HeadSize, MethodName, NumberOr, OptimizerName, PerturberName, ScheduleName,
    parse_loss,
};
pub use inputs::set_inputs;
pub use require::Require;

/// A quantised network's outputs may differ by this much of the largest from tract's: what lies between two levels may
/// round to either, and onnxruntime with and without its optimiser differ by as much.
const ROUNDED: f64 = 5e-2;
/// Samples on which the export is compared with tract.
const VERIFIED_SAMPLES: usize = 4;
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
    pub output: PathBuf,
    pub steps: usize,
    pub skipped_steps: usize,
    pub seconds: f64,
    /// What the session held at its peak: arena, weights, gradients, optimizer, step state.
    pub peak_bytes: usize,
    pub memory: Usage,
    /// `agrees`, or `unavailable: …` with the reason.
    pub verified: String,
    pub verdict: Option<Verdict>,
    /// Conditions of `--require` that were not met.
    pub unmet: Vec<String>,
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

/// The parameters chosen by `select` that the loss depends on. With `all`, others are left out and noted;
/// chosen by name, they are an error.
fn choose(
    session: &Session,
    select: &str,
    loss: &Loss,
    shapes: &Shapes,
    notes: &mut Vec<String>,
) -> Result<Vec<WeightId>> {
    let model = session.model();
    let select: Select = select.parse().map_err(|e| Error::Config(format!("--train {e}")))?;
    let mut chosen = select.resolve(model)?;
    let reached = crate::train::step::reached(session, loss, shapes)?;
    let (kept, lost): (Vec<_>, Vec<_>) = chosen.drain(..).partition(|w| reached[w.index()]);
    if !lost.is_empty() {
        let names: Vec<&str> = lost.iter().map(|w| model.weight(*w).name.as_str()).collect();
        let what = format!("the loss does not depend on {}", names.join(", "));
        match select {
            Select::Globs(_) => return Err(Error::Config(format!("--train: {what}"))),
            _ => notes.push(format!("not trained: {what}")),
        }
    }
    if kept.is_empty() {
        return Err(Error::Config("the loss depends on none of the chosen parameters".into()));
    }
    Ok(kept)
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
        Loss::Bce | Loss::Graph(_) => Ok(data),
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
/// `held` are held-out data of their own; without them the configured share of `data` is held out.
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
    let options = Options { threads: config.threads, seed: config.seed, ..Options::default() };
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
        true => Some(norms::reinsert(&mut session, &data, &train)?),
        false => None,
    };
    if let Some(r) = &reinserted {
        session = Session::new(r.model.clone(), session_options)?;
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
    if held_indices.is_empty() && requirement.is_some() {
        return Err(Error::Config("--require needs held-out data: --holdout must not be 0".into()));
    }

    let beside = if unlabelled.is_empty() { 1 } else { 2 };
    let shapes = Shapes::of(&data.new_batch(beside * config.batch.min(train.len())))?;
    let params = choose(&session, &config.train, &loss, &shapes, &mut notes)?;
    let recipe = Recipe {
        loss: loss.clone(),
        optimizer: config.optimizer(),
        clip: config.clip_norm(),
        params,
        norm: config.norm,
        accumulate: config.accumulate,
    };
    let measure = |session: &mut Session| -> Result<Option<Evaluated>> {
        match held_indices.is_empty() {
            true => Ok(None),
            false => evaluate(session, &plain, held_data, &held_indices, EVAL_BATCH).map(Some),
        }
    };
    let before = measure(&mut session)?;
    recipe.prepare(&mut session)?;
    let mut method = config.training_method(!unlabelled.is_empty())?;
    let taps = method.tap_names(&session, &shapes)?;
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
        batch: config.batch,
        lr: config.lr,
        schedule: config.schedule(),
        shuffle: config.shuffle,
        seed: config.seed,
        checkpoint,
        companions: unlabelled,
    };
    let fitted: Fitted = fit(&mut session, &recipe, method.as_mut(), &data, &train, &run, observe)?;
    if fitted.skipped_steps > 0 {
        notes.push(format!("{} step(s) were skipped: loss or gradient not finite", fitted.skipped_steps));
    }
    let after = measure(&mut session)?;
    if let Some(left_out) = after.as_ref().and_then(|a| a.left_out.as_ref()) {
        notes.push(format!("{left_out} was left out of the loss, which works on its input"));
    }
    let verdict = before.as_ref().zip(after.as_ref()).map(|(b, a)| guard::compare(b, a));
    let unmet = match (&requirement, &before, &after) {
        (Some(r), Some(b), Some(a)) => r.unmet(&b.metrics, &a.metrics)?,
        _ => Vec::new(),
    };
    let kept = unmet.is_empty() && (!config.guard || verdict.is_none_or(|v| v.better));
    let (usage, mut verified) = (session.usage(), "original kept".to_string());
    if kept {
        verified = write(&mut session, reinserted.as_ref(), held_data, config, output)?;
    } else {
        export::write(&original, &[], output, export::Options { rename_data: config.rename_data })?;
    }
    let summary = Summary {
        before: before.as_ref().map(|e| e.metrics.clone()),
        after: after.as_ref().map(|e| e.metrics.clone()),
        kept,
        output: output.to_path_buf(),
        steps: fitted.steps,
        skipped_steps: fitted.skipped_steps,
        seconds: started.elapsed().as_secs_f64(),
        peak_bytes: usage.total(),
        memory: usage,
        verified,
        verdict,
        unmet,
        trained_parameters: recipe.params.iter().map(|w| model.weight(*w).len()).sum(),
        training_samples: train.len(),
        heldout_samples: held_indices.len(),
        taps,
        notes,
        curve: Curve { epochs: fitted.epochs },
    };
    Ok(Finished { summary, before, after, class_names: data.class_names().to_vec(), session, recipe })
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
        require: None,
        guard: true,
        rename_data: false,
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

/// Writes the file with the session's weights, after tract agreed (where it can be asked).
fn write(
    session: &mut Session,
    reinserted: Option<&norms::Reinserted>,
    data: &Dataset,
    config: &Config,
    output: &Path,
) -> Result<String> {
    let (model, changes) = match reinserted {
        Some(r) => r.folded(session)?,
        None => (session.model().clone(), session.changes()),
    };
    let changes: Vec<(WeightId, &Tensor)> = changes.iter().map(|(w, t)| (*w, t)).collect();
    let options = export::Options { rename_data: config.rename_data };
    let staged = export::stage(&model, &changes, output, options)?;
    let n = verified_batch(&model, data.len());
    let mut batch = data.new_batch(n);
    data.batch(&(0..n).collect::<Vec<_>>(), None, &mut batch)?;
    let expected = session.forward(&batch.inputs)?;
    let feeds = model.with_fixed(&batch.inputs)?;
    let verification = match draws(&model) {
        true => Verification::Unavailable("the network draws random numbers, and each engine its own".into()),
        false => export::verify(&staged.path(), &feeds, &expected),
    };
    let verified = match verification {
        Verification::Agrees { .. } => "agrees".to_string(),
        Verification::Disagrees { max_relative, .. } if rounds(&model) && max_relative <= ROUNDED => {
            "agrees".to_string()
        }
        Verification::Disagrees { output: name, max_relative } => {
            let what = format!(
                "not written: tract disagrees with the new network on '{name}', by {max_relative:.1e} of its largest"
            );
            return Err(Error::file(output, what));
        }
        Verification::Unavailable(why) => format!("unavailable: {why}"),
    };
    staged.commit()?;
    Ok(verified)
}

/// Does the network draw random numbers also where it is not trained?
fn draws(model: &Model) -> bool {
    let random = [
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "Bernoulli",
        "Multinomial",
    ];
    model.graph.nodes.iter().any(|n| random.contains(&n.op.name()))
}

/// Are activations rounded to levels within the network?
fn rounds(model: &Model) -> bool {
    let quantise = ["QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul"];
    model.graph.nodes.iter().any(|n| quantise.contains(&n.op.name()))
}

/// How many samples a file's declared batch allows to compare on.
fn verified_batch(model: &Model, samples: usize) -> usize {
    let fixed = model.graph.inputs.iter().find_map(|v| {
        let declared = model.graph.value(*v).declared.as_ref()?;
        match declared.dims.as_ref()?.first()? {
            Dim::Fixed(n) => Some(*n),
            _ => None,
        }
    });
    fixed.unwrap_or(VERIFIED_SAMPLES).clamp(1, samples.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::import::make::{import, model, node, ramp};

    /// A network with noise of its own gives other numbers in every engine: that is no reason to refuse its export.
    #[test]
    fn a_network_that_draws_is_exported_unverified() {
        let nodes = vec![
            node("MatMul", &["x", "w"], &["h"]),
            node("RandomNormalLike", &["h"], &["noise"]),
            node("Add", &["h", "noise"], &["y"]),
        ];
        let m = Arc::new(import(&model(nodes, vec![ramp("w", &[3, 2])], "y")).unwrap());
        let x = Tensor::from_slice(&[8, 3], &[0.25f32; 24]).unwrap();
        let y = Tensor::from_slice(&[8, 2], &[0.5f32; 16]).unwrap();
        let data =
            Dataset::from_arrays(vec![("x".into(), x)], Some(y)).unwrap().bind(&input_specs(&m)).unwrap();
        let config = Config {
            method: MethodName::Supervised,
            loss: "mse".into(),
            epochs: 1,
            holdout: NumberOr::Number(0.0),
            ..Config::default()
        };
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("new.onnx");
        let done = finetune(m, data, None, &config, &out, &mut |_| {}).unwrap();
        assert!(done.summary.verified.contains("random"), "{}", done.summary.verified);
        assert!(done.summary.kept && out.exists());
    }
}
