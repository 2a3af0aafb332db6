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
    /// What is compared first, the gain in accuracy or, without labels, the fall of the loss, with its 95% interval.
    pub gain: Interval,
    pub loss_interval: Interval,
}

/// A mean over samples and the 95% interval around it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Interval {
    pub value: f64,
    pub low: f64,
    pub high: f64,
}

/// The 97.5% quantile of the standard normal distribution.
const Z: f64 = 1.959_963_984_540_054;

impl Interval {
    /// Of the difference of two shares on the same samples, each difference from −1 to 1: Agresti and Min, *Simple improved
    /// confidence intervals for comparing matched proportions*, Statistics in Medicine 24 (2005). Half a sample is added
    /// to each of the four cells, so that few samples that all agree do not make an interval of no width.
    fn of_shares(differences: impl Iterator<Item = f64>) -> Interval {
        let (n, sum, squares) = differences.fold((0.0, 0.0, 0.0), |(n, s, q), d| (n + 1.0, s + d, q + d * d));
        let value = if n > 0.0 { sum / n } else { 0.0 };
        let (more, centre) = (n + 2.0, sum / (n + 2.0));
        let spread = (((squares + 1.0) / more - centre * centre).max(0.0) / more).sqrt();
        Interval { value, low: (centre - Z * spread).max(-1.0), high: (centre + Z * spread).min(1.0) }
    }

    /// Of the mean of paired differences: Student's t.
    fn of_mean(mean: f64, error: f64, n: usize) -> Interval {
        let reach = quantile(n.saturating_sub(1)) * error;
        Interval { value: mean, low: mean - reach, high: mean + reach }
    }
}

/// The 97.5% quantile of Student's t with so many degrees of freedom, by its expansion in their inverse (Abramowitz and
/// Stegun 26.7.5); infinite for none.
fn quantile(degrees: usize) -> f64 {
    // The expansion is poor for the first two.
    let exact = [f64::INFINITY, 12.706_204_736, 4.302_652_730];
    if let Some(t) = exact.get(degrees) {
        return *t;
    }
    let (z, v) = (Z, degrees as f64);
    z + (z.powi(3) + z) / (4.0 * v)
        + (5.0 * z.powi(5) + 16.0 * z.powi(3) + 3.0 * z) / (96.0 * v * v)
        + (3.0 * z.powi(7) + 19.0 * z.powi(5) + 17.0 * z.powi(3) - 15.0 * z) / (384.0 * v.powi(3))
        + (79.0 * z.powi(9) + 776.0 * z.powi(7) + 1482.0 * z.powi(5) - 1920.0 * z.powi(3) - 945.0 * z)
            / (92160.0 * v.powi(4))
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
    let (accuracy_gain, accuracy_error) = paired(hits.clone().map(|(b, a)| a - b));
    let losses = before.losses.iter().zip(&after.losses);
    let (loss_fall, loss_error) = paired(losses.clone().map(|(b, a)| b - a));
    let loss_interval = Interval::of_mean(loss_fall, loss_error, losses.len());
    let gain = match hits.len() {
        0 => loss_interval,
        _ => Interval::of_shares(hits.map(|(b, a)| a - b)),
    };
    let sound = after.metrics.loss.is_finite();
    let accuracy_better = accuracy_gain > accuracy_error;
    let loss_better = loss_fall > loss_error && accuracy_gain >= 0.0;
    Verdict {
        better: sound && (accuracy_better || loss_better),
        accuracy_gain,
        accuracy_error,
        loss_fall,
        loss_error,
        gain,
        loss_interval,
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
    fn intervals_are_those_of_the_sources() {
        for (degrees, t) in [(1, 12.7062), (2, 4.3027), (3, 3.1824), (5, 2.5706), (10, 2.2281), (30, 2.0423)]
        {
            assert!((quantile(degrees) - t).abs() < 6e-3, "{degrees}: {}", quantile(degrees));
        }
        // 20 gained, 10 lost, 70 as they were: (20.5 − 10.5)/102 ± 1.96·√(31 − 10²/102)/102.
        let d = (0..100).map(|i| {
            if i < 20 {
                1.0
            } else if i < 30 {
                -1.0
            } else {
                0.0
            }
        });
        let i = Interval::of_shares(d);
        let reach = Z * (31.0 - 100.0 / 102.0f64).sqrt() / 102.0;
        assert!((i.value - 0.1).abs() < 1e-12);
        assert!(
            (i.low - (10.0 / 102.0 - reach)).abs() < 1e-12 && (i.high - (10.0 / 102.0 + reach)).abs() < 1e-12
        );
        // All alike, and still not certain.
        let none = Interval::of_shares([0.0; 10].into_iter());
        assert!(none.low < -0.1 && none.high > 0.1, "{none:?}");
        let before = evaluated(&[0, 0, 1, 1], &[1.0, 1.1, 0.9, 1.0]);
        let v = compare(&before, &evaluated(&[1, 1, 1, 1], &[0.5, 0.5, 0.5, 0.5]));
        assert_eq!((v.gain.value, v.loss_interval.value), (v.accuracy_gain, v.loss_fall));
        assert!(v.loss_interval.low < v.loss_fall && v.loss_interval.low > 0.0);
    }

    #[test]
    fn a_lower_loss_counts_unless_accuracy_falls_or_it_is_not_a_number() {
        let before = evaluated(&[1, 1, 1, 1], &[1.0, 1.1, 0.9, 1.0]);
        assert!(compare(&before, &evaluated(&[1, 1, 1, 1], &[0.5, 0.5, 0.5, 0.5])).better);
        assert!(!compare(&before, &evaluated(&[1, 1, 1, 0], &[0.5, 0.5, 0.5, 0.5])).better);
        assert!(!compare(&before, &evaluated(&[1, 1, 1, 1], &[f64::NAN; 4])).better);
    }
}
