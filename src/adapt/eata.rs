//! EATA: Niu et al., *Efficient Test-Time Model Adaptation without Forgetting*, ICML 2022.

use crate::error::Result;
use crate::exec::Session;
use crate::ops::Mode;
use crate::train::data::Batch;
use crate::train::method::{At, Learned, Method, Plain};
use crate::train::step::{Recipe, Shapes};

use super::Adaptation;
use super::scores::{Scorer, Scores, weigh};

/// Learns from samples that are predicted surely (entropy below E₀) and unlike the mean prediction so far (cosine below
/// d), each weighted by `exp(E₀ − H)`.
pub struct Eata {
    step: Plain,
    scorer: Scorer,
    filter: Filter,
}

/// Which samples are learned from, and how much.
#[derive(Debug, Clone)]
struct Filter {
    /// E₀ as a share of ln(classes).
    margin: f64,
    /// d; `None`: 1.3/√classes, which is the paper's 0.4 for 10 classes and 0.04 for 1000.
    redundancy: Option<f64>,
    /// Mean prediction of the samples learned from, a moving one.
    mean: Option<Vec<f64>>,
}

/// What stays of the mean prediction when a batch comes to it (the paper's 0.9).
const KEPT: f64 = 0.9;

impl Eata {
    /// `margin`: E₀ as a share of ln(classes).
    pub fn new(mode: Mode, margin: f64, redundancy: Option<f64>) -> Self {
        Eata {
            step: Plain::default(),
            scorer: Scorer::new(mode),
            filter: Filter { margin, redundancy, mean: None },
        }
    }
}

impl Filter {
    /// The weight of each sample; `None` when there is none to learn from.
    fn weights(&mut self, scores: &Scores) -> Option<Vec<f64>> {
        let classes = scores.classes as f64;
        let (limit, alike) = (self.margin * classes.ln(), self.redundancy.unwrap_or(1.3 / classes.sqrt()));
        let mut means = vec![vec![0.0; scores.classes]; scores.samples];
        scores.each(|sample, p| {
            means[sample].iter_mut().zip(p).for_each(|(m, p)| *m += p / scores.places as f64);
        });
        let mut weights = vec![0.0; scores.samples];
        let (mut chosen, mut mean) = (0usize, vec![0.0; scores.classes]);
        for (i, h) in scores.entropies().into_iter().enumerate() {
            let new = self.mean.as_ref().is_none_or(|m| cosine(m, &means[i]).abs() < alike);
            if h.is_finite() && h < limit && new {
                weights[i] = (limit - h).exp();
                chosen += 1;
                mean.iter_mut().zip(&means[i]).for_each(|(m, p)| *m += p);
            }
        }
        if chosen == 0 {
            return None;
        }
        mean.iter_mut().for_each(|m| *m /= chosen as f64);
        weights.iter_mut().for_each(|w| *w /= chosen as f64);
        self.mean = Some(match self.mean.take() {
            None => mean,
            Some(old) => old.iter().zip(&mean).map(|(o, n)| KEPT * o + (1.0 - KEPT) * n).collect(),
        });
        Some(weights)
    }
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt().max(1e-12)
}

impl Adaptation for Eata {
    fn prepare(&mut self, session: &mut Session, recipe: &Recipe, shapes: &Shapes) -> Result<()> {
        self.step.prepare(session, recipe, shapes, 1)
    }

    fn learn(
        &mut self,
        session: &mut Session,
        recipe: &Recipe,
        batch: &mut Batch,
        at: &At,
    ) -> Result<Option<Learned>> {
        let scores = self.scorer.run(session, batch)?;
        let Some(weights) = self.filter.weights(&scores) else { return Ok(None) };
        let dtype = Shapes::of(batch)?.target.dtype;
        weigh(batch, dtype, |i| weights[i])?;
        self.step.learn(session, recipe, batch, at).map(Some)
    }

    fn reset(&mut self) {
        self.filter.mean = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Tensor;

    fn scores(rows: &[[f64; 3]]) -> Scores {
        let flat: Vec<f64> = rows.iter().flatten().copied().collect();
        Scores::of(&Tensor::from_slice(&[rows.len(), 3], &flat).unwrap())
    }

    #[test]
    fn unsure_and_redundant_samples_are_left_out() {
        let mut f = Filter { margin: 0.4, redundancy: Some(0.5), mean: None };
        // Sure of class 0, unsure, sure of class 1.
        let w = f.weights(&scores(&[[9.0, 0.0, 0.0], [0.1, 0.0, 0.0], [0.0, 9.0, 0.0]])).unwrap();
        assert!(w[1] == 0.0 && w[0] > 0.5 && (w[0] - w[2]).abs() < 1e-9, "{w:?}");
        // Now 0 and 1 have been seen, and 2 is new.
        let w = f.weights(&scores(&[[9.0, 0.0, 0.0], [0.0, 0.0, 9.0]])).unwrap();
        assert!(w[0] == 0.0 && w[1] > 1.0, "{w:?}");
        assert!(f.weights(&scores(&[[0.0; 3]])).is_none());
    }
}
