//! Pseudo-labels: the network's own confident predictions as labels (Lee 2013), for any method.

use crate::error::{Error, Result};
use crate::exec::Session;
use crate::ops::Mode;
use crate::ops::loss::IGNORED;
use crate::tensor::{Dims, Tensor};
use crate::train::data::Batch;
use crate::train::method::{At, Learned, Method};
use crate::train::step::{Recipe, Shapes};

use super::Adaptation;
use super::scores::{Scorer, Scores, largest};

/// Learns by another method from the network's own confident predictions, made in evaluation mode right before.
pub struct Pseudo<M> {
    /// Predictions of at least this probability count.
    confidence: f64,
    scorer: Scorer,
    step: M,
}

impl<M: Method> Pseudo<M> {
    pub fn new(confidence: f64, step: M) -> Self {
        Pseudo { confidence, scorer: Scorer::new(Mode::EVAL), step }
    }

    /// Labels (N), or (N, places) of dense scores; `None` when there is no confident prediction.
    fn labels(&self, scores: &Scores, shape: &[usize]) -> Result<Option<Tensor>> {
        let mut labels = Vec::with_capacity(scores.samples * scores.places);
        scores.each(|_, p| {
            let best = largest(p);
            labels.push(if p[best] >= self.confidence { best as i64 } else { IGNORED });
        });
        if labels.iter().all(|l| *l == IGNORED) {
            return Ok(None);
        }
        let t = Tensor::from_slice(shape, &labels);
        t.map(Some).map_err(|source| Error::Op { node: "pseudo-labels".into(), source })
    }
}

impl<M: Method> Adaptation for Pseudo<M> {
    fn prepare(&mut self, _: &mut Session, _: &Recipe, _: &Shapes) -> Result<()> {
        // The shape of the labels is that of the scores, which the first batch tells.
        Ok(())
    }

    fn learn(
        &mut self,
        session: &mut Session,
        recipe: &Recipe,
        batch: &mut Batch,
        at: &At,
    ) -> Result<Option<Learned>> {
        let scores = self.scorer.run(session, batch)?;
        let mut shape = Dims::from_slice(&[scores.samples]);
        shape.extend_from_slice(&scores.inner);
        let Some(labels) = self.labels(&scores, &shape)? else { return Ok(None) };
        let weights = batch.target.replace(labels);
        let learned = self.step.learn(session, recipe, batch, at);
        batch.target = weights;
        learned.map(Some)
    }
}
