//! What a perturbation does to a batch, step by step: for people to look at.

use crate::error::Result;
use crate::exec::Session;
use crate::icp::Icp;
use crate::tensor::Tensor;
use crate::train::data::Batch;
use crate::train::metrics::labels_of;
use crate::train::step::{Evaluation, Recipe, Shapes, feeds};

/// A batch along its perturbation: K + 1 points, the clean one first.
#[derive(Debug, Clone)]
pub struct Trace {
    /// What is perturbed, by name, at each point.
    pub path: Vec<Vec<(String, Tensor)>>,
    /// The task loss at each point. Of values within the network the last one is not known.
    pub losses: Vec<f64>,
    /// Where the network classifies and inputs are perturbed: at each point, of each sample, its cross-entropy and the
    /// probability of its label.
    pub samples: Vec<Vec<(f64, f64)>>,
}

/// Perturbs a batch as `icp` would, without any training, and evaluates the network on what each step gives.
pub fn trace(session: &mut Session, recipe: &Recipe, icp: &mut Icp, batch: &Batch) -> Result<Trace> {
    let perturbed = icp.perturbed(session, recipe, batch)?;
    let of_inputs = |point: &[(String, Tensor)]| {
        point.iter().all(|(name, _)| batch.inputs.iter().any(|input| input.0 == *name))
    };
    let Some(_) = perturbed.path.first().filter(|p| of_inputs(p)) else {
        return Ok(Trace { path: perturbed.path, losses: perturbed.losses, samples: Vec::new() });
    };
    let plan = Evaluation::new(session, &recipe.loss, &Shapes::of(batch)?)?;
    let labels = batch.target.as_ref().filter(|_| recipe.loss.wants_labels()).and_then(labels_of);
    let mut at = batch.clone();
    let (mut losses, mut samples) = (Vec::new(), Vec::new());
    for point in &perturbed.path {
        for (name, t) in point {
            if let Some(input) = at.inputs.iter_mut().find(|input| input.0 == *name) {
                input.1 = t.clone();
            }
        }
        session.run(&plan.program, &feeds(&plan.inputs, plan.attached.target, &at)?, 0)?;
        losses.push(session.scalar(&plan.program, plan.attached.loss)?);
        let logits = session.output(&plan.program, plan.attached.logits)?.to_tensor();
        if let (Some(labels), [n, classes]) = (&labels, logits.dims())
            && labels.len() == *n
        {
            let scores = logits.to_f64();
            samples
                .push(scores.chunks(*classes).zip(labels).map(|(row, label)| scored(row, *label)).collect());
        }
    }
    Ok(Trace { path: perturbed.path, losses, samples })
}

/// Cross-entropy and the label's probability; NaN for a label that is no class.
fn scored(scores: &[f64], label: i64) -> (f64, f64) {
    let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log_sum = top + scores.iter().map(|x| (x - top).exp()).sum::<f64>().ln();
    match usize::try_from(label).ok().and_then(|l| scores.get(l)) {
        Some(x) => (log_sum - x, (x - log_sum).exp()),
        None => (f64::NAN, f64::NAN),
    }
}

#[cfg(test)]
mod tests {
    use super::scored;

    #[test]
    fn a_samples_loss_and_probability() {
        let (loss, p) = scored(&[0.0, 3f64.ln()], 1);
        assert!((p - 0.75).abs() < 1e-12 && (loss + 0.75f64.ln()).abs() < 1e-12);
        assert!(scored(&[0.0, 1.0], -1).0.is_nan());
    }
}
