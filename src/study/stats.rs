//! Means over seeds, and what can be said of their differences.

use serde::{Deserialize, Serialize};
use statrs::distribution::{ContinuousCDF, StudentsT};

/// A mean with the half-width of its 95% interval (Student's t); `None` of fewer than two numbers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Mean {
    pub mean: f64,
    pub interval: Option<f64>,
    pub n: usize,
}

/// A mean difference of pairs, and how likely one as large is where there is none (two-sided paired t-test).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    #[serde(flatten)]
    pub mean: Mean,
    pub p: Option<f64>,
}

fn student(freedom: f64) -> Option<StudentsT> {
    StudentsT::new(0.0, 1.0, freedom).ok()
}

/// Mean, and the standard error of it.
fn moments(x: &[f64]) -> (f64, Option<f64>) {
    let n = x.len() as f64;
    let mean = x.iter().sum::<f64>() / n.max(1.0);
    let error =
        (x.len() > 1).then(|| (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0) / n).sqrt());
    (mean, error)
}

/// The mean of some numbers.
pub fn mean(x: &[f64]) -> Mean {
    let (mean, error) = moments(x);
    let interval = error.zip(student(x.len() as f64 - 1.0)).map(|(e, t)| e * t.inverse_cdf(0.975));
    Mean { mean, interval, n: x.len() }
}

/// The mean of the differences of some pairs.
pub fn paired(differences: &[f64]) -> Difference {
    let (centre, error) = moments(differences);
    let p = error.zip(student(differences.len() as f64 - 1.0)).map(|(e, t)| match e > 0.0 {
        true => 2.0 * (1.0 - t.cdf((centre / e).abs())),
        false => f64::from(u8::from(centre == 0.0)),
    });
    Difference { mean: mean(differences), p }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against tables of t, and the closed form on two degrees of freedom: p = 1 − t/√(t² + 2).
    #[test]
    fn intervals_and_tests_are_students() {
        let m = mean(&[1.0, 2.0, 4.0, 5.0]);
        assert!((m.mean - 3.0).abs() < 1e-12);
        // t(0.975, 3) = 3.182446305, s/√n = 0.912870929
        assert!((m.interval.unwrap() - 3.182_446_305 * 0.912_870_929).abs() < 1e-6);
        let d = paired(&[0.1, 0.3, 0.2]);
        // t = 3.464101615 on 2 degrees of freedom
        assert!((d.p.unwrap() - 0.074_179_9).abs() < 1e-6, "{:?}", d.p);
        assert_eq!(mean(&[7.0]).interval, None);
        assert_eq!(paired(&[0.5]).p, None);
        assert_eq!(paired(&[0.0, 0.0]).p, Some(1.0));
        assert_eq!(paired(&[0.5, 0.5]).p, Some(0.0));
    }
}
