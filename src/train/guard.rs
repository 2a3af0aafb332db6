//! Never worse: is a finetuned network better on held-out samples, by more than noise?

use serde::Serialize;

use crate::train::fit::Evaluated;

/// The guard's comparison on the same held-out samples.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Verdict {
    pub better: bool,
    /// Mean gain in accuracy (0 without labels) and mean fall of the loss, each with its standard error over
    /// samples.
    pub accuracy_gain: f64,
    pub accuracy_error: f64,
    pub loss_fall: f64,
    pub loss_error: f64,
}

/// Mean and standard error of paired differences.
fn paired(differences: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let n = differences.clone().count() as f64;
    if n == 0.0 {
        return (0.0, 0.0);
    }
    let mean = differences.clone().sum::<f64>() / n;
    let var = differences.map(|d: f64| (d - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    (mean, (var / n).sqrt())
}

/// Better means: accuracy (without labels, the loss) improved by more than one standard error; or accuracy
/// did not fall, and the loss improved by more than one standard error.
pub fn compare(before: &Evaluated, after: &Evaluated) -> Verdict {
    let hits = before.hits.iter().zip(&after.hits);
    let (accuracy_gain, accuracy_error) = paired(hits.map(|(b, a)| a - b));
    let losses = before.losses.iter().zip(&after.losses);
    let (loss_fall, loss_error) = paired(losses.map(|(b, a)| b - a));
    let sound = after.metrics.loss.is_finite();
    let accuracy_better = accuracy_gain > accuracy_error;
    let loss_better = loss_fall > loss_error && accuracy_gain >= 0.0;
    Verdict {
        better: sound && (accuracy_better || loss_better),
        accuracy_gain,
        accuracy_error,
        loss_fall,
        loss_error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::metrics::Metrics;

    fn evaluated(hits: &[u8], losses: &[f64]) -> Evaluated {
        Evaluated {
            hits: hits.iter().map(|h| f64::from(*h)).collect(),
            losses: losses.to_vec(),
            metrics: Metrics { loss: losses.iter().sum(), ..Metrics::default() },
            ..Evaluated::default()
        }
    }

    #[test]
    fn one_lucky_sample_is_noise_and_many_are_not() {
        let l = [1.0; 8];
        let before = evaluated(&[0, 0, 0, 0, 1, 1, 1, 1], &l);
        assert!(!compare(&before, &evaluated(&[1, 0, 0, 0, 1, 1, 1, 1], &l)).better);
        assert!(compare(&before, &evaluated(&[1, 1, 1, 0, 1, 1, 1, 1], &l)).better);
        assert!(!compare(&before, &before).better);
    }

    #[test]
    fn a_lower_loss_counts_unless_accuracy_falls_or_it_is_not_a_number() {
        let before = evaluated(&[1, 1, 1, 1], &[1.0, 1.1, 0.9, 1.0]);
        assert!(compare(&before, &evaluated(&[1, 1, 1, 1], &[0.5, 0.5, 0.5, 0.5])).better);
        assert!(!compare(&before, &evaluated(&[1, 1, 1, 0], &[0.5, 0.5, 0.5, 0.5])).better);
        assert!(!compare(&before, &evaluated(&[1, 1, 1, 1], &[f64::NAN; 4])).better);
    }
}
