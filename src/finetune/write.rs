//! The result in its place: verified first, never half written.

use std::path::Path;

use crate::delta::{Delta, Described};
use crate::error::{Error, Result};
use crate::exec::Session;
use crate::export::{self, Learned, Source, Staged, Verification};
use crate::finetune::{Config, budget, norms};
use crate::graph::{Dim, WeightId};
use crate::import::Model;
use crate::tensor::Tensor;
use crate::train::data::Dataset;

/// A quantised network's outputs may differ by this much of the largest from tract's: what lies between two levels may
/// round to either, and onnxruntime with and without its optimiser differ by as much.
const ROUNDED: f64 = 5e-2;
/// Samples on which the export is compared with tract.
const VERIFIED_SAMPLES: usize = 4;

/// Writes the file with the session's weights, and the delta to it, after tract agreed (where it can be asked).
pub(super) fn write(
    session: &mut Session,
    reinserted: Option<&norms::Reinserted>,
    data: &Dataset,
    config: &Config,
    output: &Path,
    budget: Option<&budget::Fitted>,
) -> Result<(String, Option<Described>)> {
    let model = reinserted.map_or(session.model(), |r| &r.base).clone();
    let options = export::Options { rename_data: config.rename_data };
    // Where the delta is all that is wanted, the file is made to be verified, and left.
    let aside = match config.delta.as_deref() == Some(output) {
        true => Some(tempfile::tempdir().map_err(|e| Error::io(output, e))?),
        false => None,
    };
    let target = aside.as_ref().map_or(output.to_path_buf(), |dir| dir.path().join("new.onnx"));
    let staged = export::stage_from(&model, &*learned(session, reinserted), &target, options)?;
    let verified = match budget.is_some_and(|b| b.budget < b.to_verify(&model, &session.usage())) {
        true => "unavailable: tract would take more than the memory budget".to_string(),
        false => {
            let n = verified_batch(&model, data.len());
            let mut batch = data.new_batch(n);
            data.batch(&(0..n).collect::<Vec<_>>(), None, &mut batch)?;
            verify(session, &model, &batch.inputs, &staged, output)?
        }
    };
    let delta = match &config.delta {
        Some(path) => {
            let source = learned(session, reinserted);
            Some(Delta::from_source(&model, &*source, config.delta_type)?.write(path)?)
        }
        None => None,
    };
    if aside.is_none() {
        staged.commit()?;
    }
    Ok((verified, delta))
}

/// What the file will have of the session's weights.
fn learned<'a>(session: &'a Session, reinserted: Option<&'a norms::Reinserted>) -> Box<dyn Source + 'a> {
    match reinserted {
        Some(of) => Box::new(norms::Folded { of, session }),
        None => Box::new(Learned(session)),
    }
}

/// Writes `model` with `changes`, after tract agreed (where it can be asked) with what the session computes of `inputs`.
pub(crate) fn write_verified(
    session: &mut Session,
    model: &Model,
    changes: &[(WeightId, Tensor)],
    inputs: &[(String, Tensor)],
    options: export::Options,
    output: &Path,
) -> Result<String> {
    let changes: Vec<(WeightId, &Tensor)> = changes.iter().map(|(w, t)| (*w, t)).collect();
    let staged = export::stage(model, &changes, output, options)?;
    let verified = verify(session, model, inputs, &staged, output)?;
    staged.commit()?;
    Ok(verified)
}

/// Whether tract's outputs agree with the session's, on a file that is not in place yet. Fails where they do not.
fn verify(
    session: &mut Session,
    model: &Model,
    inputs: &[(String, Tensor)],
    staged: &Staged,
    output: &Path,
) -> Result<String> {
    // As the file computes elsewhere, whatever the training's precision.
    session.set_exact(true);
    let expected = session.forward(inputs);
    session.set_exact(false);
    // Nothing runs any more, and tract takes much.
    session.release();
    let (expected, feeds) = (expected?, model.with_fixed(inputs)?);
    let verification = match draws(model) {
        true => Verification::Unavailable("the network draws random numbers, and each engine its own".into()),
        false => export::verify(&staged.path(), &feeds, &expected),
    };
    match verification {
        Verification::Agrees { .. } => Ok("agrees".to_string()),
        Verification::Disagrees { max_relative, .. } if rounds(model) && max_relative <= ROUNDED => {
            Ok("agrees".to_string())
        }
        Verification::Disagrees { output: name, max_relative } => {
            let what = format!(
                "not written: tract disagrees with the new network on '{name}', by {max_relative:.1e} of its largest"
            );
            Err(Error::file(output, what))
        }
        Verification::Unavailable(why) => Ok(format!("unavailable: {why}")),
    }
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
pub(crate) fn verified_batch(model: &Model, samples: usize) -> usize {
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
    use std::sync::Arc;

    use super::*;
    use crate::finetune::{MethodName, NumberOr, finetune, input_specs};
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
