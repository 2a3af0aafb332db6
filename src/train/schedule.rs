//! The learning rate over the steps of a run.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

/// How the learning rate moves after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shape {
    Constant,
    /// Half a cosine, from 1 at the first step towards 0 after the last.
    Cosine,
    /// Multiplied by `gamma` after every `every` steps.
    Step {
        every: usize,
        gamma: f64,
    },
    /// Up from 1/25 over the first 30% and down to 1/250,000, both along cosines
    /// (Smith and Topin, 2018; the numbers are PyTorch's).
    OneCycle,
}

/// A learning-rate schedule with linear warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    pub shape: Shape,
    /// Steps over which the rate rises linearly; the shape runs over the rest.
    pub warmup: usize,
}

impl Schedule {
    /// The factor on the learning rate at `step` (from 0) of `total`.
    pub fn factor(&self, step: usize, total: usize) -> f64 {
        if step < self.warmup {
            return (step + 1) as f64 / self.warmup as f64;
        }
        let (step, total) = (step - self.warmup, total.saturating_sub(self.warmup).max(1));
        let cosine = |from: f64, to: f64, t: f64| to + (from - to) * (1.0 + (PI * t).cos()) / 2.0;
        match self.shape {
            Shape::Constant => 1.0,
            Shape::Cosine => cosine(1.0, 0.0, step as f64 / total as f64),
            Shape::Step { every, gamma } => gamma.powi((step / every.max(1)) as i32),
            Shape::OneCycle => {
                let peak = (0.3 * total as f64 - 1.0).max(1e-9);
                let last = (total - 1).max(1) as f64;
                match step as f64 {
                    s if s <= peak => cosine(1.0 / 25.0, 1.0, s / peak),
                    s => cosine(1.0, 1.0 / 250_000.0, (s - peak) / (last - peak).max(1e-9)),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cosine_ends_near_zero_and_warms_up() {
        let s = Schedule { shape: Shape::Cosine, warmup: 0 };
        assert_eq!(s.factor(0, 10), 1.0);
        assert!((s.factor(5, 10) - 0.5).abs() < 1e-12);
        assert!(s.factor(9, 10) < 0.03);
        let w = Schedule { shape: Shape::Constant, warmup: 4 };
        assert_eq!(w.factor(0, 10), 0.25);
        assert_eq!(w.factor(3, 10), 1.0);
        assert_eq!(w.factor(4, 10), 1.0);
    }

    #[test]
    fn step_decays_and_one_cycle_peaks() {
        let s = Schedule { shape: Shape::Step { every: 3, gamma: 0.1 }, warmup: 0 };
        assert_eq!(s.factor(2, 10), 1.0);
        assert!((s.factor(3, 10) - 0.1).abs() < 1e-15);
        let o = Schedule { shape: Shape::OneCycle, warmup: 0 };
        let peak = (0..100).map(|i| o.factor(i, 100)).fold(0.0, f64::max);
        assert!((peak - 1.0).abs() < 1e-9 && o.factor(0, 100) < 0.05 && o.factor(99, 100) < 1e-5);
    }
}
