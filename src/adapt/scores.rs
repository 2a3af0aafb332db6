//! What a network says of samples: the scores of its classes, how sure they are, and how they spread.

use std::collections::HashMap;

use serde::Serialize;

use crate::error::{Error, Result};
use crate::exec::{Program, Session};
use crate::graph::ValueId;
use crate::ops::Mode;
use crate::plan::Request;
use crate::tensor::{DType, Tensor};
use crate::train::data::{Batch, Samples};
use crate::train::loss::Loss;
use crate::train::step::{Network, Shapes};

use super::statistics::even;

/// Batches by size, with one weight a sample as target: all alike until a method sets others.
#[derive(Debug)]
pub struct Batches {
    dtype: DType,
    kept: Vec<Batch>,
}

impl Batches {
    /// `dtype` is the scores'.
    pub fn new(dtype: DType) -> Self {
        Batches { dtype, kept: Vec::new() }
    }

    /// The samples at `picks`.
    pub fn of(&mut self, samples: &dyn Samples, picks: &[usize]) -> Result<&mut Batch> {
        let at = match self.kept.iter().position(|b| b.len() == picks.len()) {
            Some(at) => at,
            None => {
                self.kept.push(Batch::default());
                self.kept.len() - 1
            }
        };
        samples.fill(picks, &mut self.kept[at])?;
        let batch = &mut self.kept[at];
        weigh(batch, self.dtype, |_| 1.0 / picks.len() as f64)?;
        Ok(batch)
    }
}

/// Makes one weight a sample the batch's target.
pub fn weigh(batch: &mut Batch, dtype: DType, weight: impl Fn(usize) -> f64) -> Result<()> {
    let weights: Vec<f64> = (0..batch.len()).map(weight).collect();
    let t = Tensor::from_slice(&[weights.len()], &weights)
        .map_err(|source| Error::Op { node: "the weights of samples".into(), source })?;
    batch.target = Some(t.cast(dtype));
    Ok(())
}

/// Scores of batches, with the network in one mode and nothing learned.
pub struct Scorer {
    mode: Mode,
    plans: Vec<(Shapes, Plan)>,
}

struct Plan {
    program: Program,
    inputs: Vec<ValueId>,
    logits: ValueId,
}

impl Scorer {
    pub fn new(mode: Mode) -> Self {
        Scorer { mode, plans: Vec::new() }
    }

    /// The logits of a batch, classes on axis 1. Fails where the first output is not that of a classifier.
    pub fn run(&mut self, session: &mut Session, batch: &Batch) -> Result<Scores> {
        let mut shapes = Shapes::of(batch)?;
        // The target, whatever it is, has no part in this.
        shapes.target.dims.truncate(1);
        let i = match self.plans.iter().position(|p| p.0 == shapes) {
            Some(i) => i,
            None => {
                let mut net = Network::new(session, self.mode, &shapes, &HashMap::new())?;
                net.fuse(&[], false)?;
                let attached = (Loss::Entropy { diversity: 0.0 })
                    .attach(&mut net.graph, weights_meta(session, &shapes)?)?;
                let request = Request { outputs: vec![attached.logits], ..Request::default() };
                let program = session.compile(net.graph, request)?;
                self.plans.push((shapes, Plan { program, inputs: net.inputs, logits: attached.logits }));
                self.plans.len() - 1
            }
        };
        let plan = &self.plans[i].1;
        let feeds: Vec<_> = plan.inputs.iter().zip(&batch.inputs).map(|(v, (_, t))| (*v, t.view())).collect();
        session.run(&plan.program, &feeds, 0)?;
        Ok(Scores::of(&session.output(&plan.program, plan.logits)?.to_tensor()))
    }

    /// What the network says of the samples `indices`.
    pub fn over(
        &mut self,
        session: &mut Session,
        samples: &dyn Samples,
        indices: &[usize],
        batch_size: usize,
        batches: &mut Batches,
    ) -> Result<Opinion> {
        let mut all = Opinion::default();
        for picks in even(indices, batch_size) {
            let batch = batches.of(samples, picks)?;
            all.add(&self.run(session, batch)?);
        }
        Ok(all)
    }
}

/// The meta of one weight a sample, in the type of the scores.
pub fn weights_meta(session: &Session, shapes: &Shapes) -> Result<crate::tensor::Meta> {
    let net = Network::new(session, Mode::EVAL, shapes, &HashMap::new())?;
    let output = net.graph.outputs.first().copied();
    let output = output.ok_or_else(|| Error::Config("the model has no output".into()))?;
    let (scores, _) = crate::graph::logits(&net.graph, output);
    let meta = net.graph.meta(scores)?;
    if !meta.dtype.is_float() || meta.dims.len() < 2 {
        return Err(Error::Config(format!(
            "adapt works on the scores of classes [N, classes, …]; output '{}' is {} {:?}",
            net.graph.value(output).name,
            meta.dtype,
            meta.dims.as_slice()
        )));
    }
    Ok(crate::tensor::Meta::new(meta.dtype, shapes.target.dims.get(..1).unwrap_or(&[])))
}

/// Logits of a batch on the host: samples, classes, places of dense scores.
#[derive(Debug, Clone, Default)]
pub struct Scores {
    pub samples: usize,
    pub classes: usize,
    pub places: usize,
    /// The dimensions that the places are of.
    pub inner: Vec<usize>,
    logits: Vec<f64>,
}

impl Scores {
    /// Of logits [N, C, …].
    pub fn of(logits: &Tensor) -> Scores {
        let (samples, classes, inner) = match logits.dims() {
            [n, c, rest @ ..] => (*n, *c, rest.to_vec()),
            _ => (0, 0, Vec::new()),
        };
        Scores { samples, classes, places: inner.iter().product(), inner, logits: logits.to_f64() }
    }

    /// The probabilities at one place of a sample, into `p`.
    pub fn probabilities(&self, sample: usize, place: usize, p: &mut Vec<f64>) {
        p.clear();
        let at = |c: usize| self.logits[(sample * self.classes + c) * self.places + place];
        let max = (0..self.classes).map(at).fold(f64::NEG_INFINITY, f64::max);
        p.extend((0..self.classes).map(|c| (at(c) - max).exp()));
        let sum: f64 = p.iter().sum();
        p.iter_mut().for_each(|x| *x /= sum);
    }

    /// Calls `f` with each place's sample and probabilities.
    pub fn each(&self, mut f: impl FnMut(usize, &[f64])) {
        let mut p = Vec::with_capacity(self.classes);
        for sample in 0..self.samples {
            for place in 0..self.places {
                self.probabilities(sample, place, &mut p);
                f(sample, &p);
            }
        }
    }

    /// The entropy of each sample's prediction in nats, the mean over its places.
    pub fn entropies(&self) -> Vec<f64> {
        let mut all = vec![0.0; self.samples];
        self.each(|sample, p| all[sample] += entropy(p) / self.places as f64);
        all
    }

    /// The class of each sample; of dense scores the one with most places.
    pub fn classes(&self) -> Vec<usize> {
        let mut counts = vec![0usize; self.classes];
        let mut out = Vec::with_capacity(self.samples);
        let mut p = Vec::new();
        for sample in 0..self.samples {
            counts.fill(0);
            for place in 0..self.places {
                self.probabilities(sample, place, &mut p);
                counts[largest(&p)] += 1;
            }
            out.push((0..self.classes).fold(0, |best, c| if counts[c] > counts[best] { c } else { best }));
        }
        out
    }
}

/// Entropy of a distribution in nats.
pub fn entropy(p: &[f64]) -> f64 {
    -p.iter().filter(|x| **x > 0.0).map(|x| x * x.ln()).sum::<f64>()
}

/// The first of the largest.
pub fn largest(p: &[f64]) -> usize {
    (1..p.len()).fold(0, |best, c| if p[c] > p[best] { c } else { best })
}

/// The largest few, in order; of equal ones the first comes first.
fn likeliest(p: &[f64]) -> [(u32, f32); KEPT] {
    let mut found = [(u32::MAX, 0.0f32); KEPT];
    let mut from = f64::INFINITY;
    let mut count = 0;
    while count < KEPT.min(p.len()) {
        let next = p.iter().copied().filter(|x| *x < from).fold(f64::NEG_INFINITY, f64::max);
        if next == f64::NEG_INFINITY {
            break;
        }
        for (c, x) in p.iter().enumerate().filter(|(_, x)| **x == next) {
            if count < KEPT {
                found[count] = (c as u32, *x as f32);
                count += 1;
            }
        }
        from = next;
    }
    found
}

/// What a network says of a set of samples, gathered over batches.
#[derive(Debug, Clone, Default)]
pub struct Opinion {
    entropy: f64,
    /// Sum of the probabilities of the predicted classes.
    confidence: f64,
    mean: Vec<f64>,
    places: usize,
    /// At each place the likeliest classes, with their probabilities.
    likeliest: Vec<[(u32, f32); KEPT]>,
}

/// Classes of a place whose probabilities an opinion keeps.
const KEPT: usize = 4;

/// How sure and how spread the predictions on a set are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Health {
    /// Mean entropy of a prediction, in nats.
    pub entropy: f64,
    /// Mean probability of the predicted class: the accuracy that the network itself expects.
    pub confidence: f64,
    /// Entropy of the mean prediction, in nats: ln(classes) when all classes are predicted alike.
    pub marginal: f64,
    /// The number of classes that this is the entropy of, were they alike: its exponential.
    pub classes: f64,
}

impl Opinion {
    pub fn add(&mut self, scores: &Scores) {
        self.mean.resize(scores.classes, 0.0);
        scores.each(|_, p| {
            self.entropy += entropy(p);
            self.mean.iter_mut().zip(p).for_each(|(m, p)| *m += p);
            let best = likeliest(p);
            self.confidence += p.get(best[0].0 as usize).copied().unwrap_or(f64::NAN);
            self.likeliest.push(best);
            self.places += 1;
        });
    }

    pub fn health(&self) -> Health {
        let n = self.places.max(1) as f64;
        let mean: Vec<f64> = self.mean.iter().map(|m| m / n).collect();
        let marginal = entropy(&mean);
        Health {
            entropy: self.entropy / n,
            confidence: self.confidence / n,
            marginal,
            classes: marginal.exp(),
        }
    }

    /// The share of each class among the predictions.
    pub fn shares(&self) -> Vec<f64> {
        let n = self.places.max(1) as f64;
        self.mean.iter().map(|m| m / n).collect()
    }

    /// The share of places where both predict the same class.
    pub fn agreement(&self, other: &Opinion) -> f64 {
        let same = self.likeliest.iter().zip(&other.likeliest).filter(|(a, b)| a[0].0 == b[0].0).count();
        same as f64 / self.places.max(1) as f64
    }

    /// The accuracy that, as this opinion sees it, is lost by another's predictions: how much less probable they are than
    /// its own, on average. What it did not keep it takes for impossible.
    pub fn lost_by(&self, other: &Opinion) -> f64 {
        let lost = self.likeliest.iter().zip(&other.likeliest).map(|(own, other)| {
            let kept = own.iter().find(|k| k.0 == other[0].0).map_or(0.0, |k| k.1);
            f64::from(own[0].1 - kept)
        });
        lost.sum::<f64>() / self.places.max(1) as f64
    }

    /// Is every number of it finite?
    pub fn is_finite(&self) -> bool {
        self.entropy.is_finite() && self.mean.iter().all(|m| m.is_finite())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sure_and_spread() {
        let logits = Tensor::from_slice(&[2, 3], &[9.0, 0.0, 0.0, 0.0, 0.0, 9.0f64]).unwrap();
        let scores = Scores::of(&logits);
        assert_eq!(scores.classes(), [0, 2]);
        assert!(scores.entropies().iter().all(|h| *h < 0.01));
        let mut o = Opinion::default();
        o.add(&scores);
        let h = o.health();
        assert!(h.entropy < 0.01 && (h.classes - 2.0).abs() < 0.01, "{h:?}");
        assert_eq!((o.agreement(&o), o.lost_by(&o)), (1.0, 0.0));
        let mut other = Opinion::default();
        other.add(&Scores::of(&Tensor::from_slice(&[2, 3], &[9.0, 0.0, 0.0, 1.0, 0.0, 0.0f64]).unwrap()));
        assert_eq!(o.agreement(&other), 0.5);
        let p = 9f64.exp() / (9f64.exp() + 2.0);
        assert!((o.lost_by(&other) - 0.5 * (p - p / 9f64.exp())).abs() < 1e-6);
        assert_eq!(likeliest(&[0.2, 0.4, 0.2, 0.1, 0.1]), [(1, 0.4), (0, 0.2), (2, 0.2), (3, 0.1)]);
        assert_eq!(likeliest(&[f64::NAN, f64::NAN])[0].0, u32::MAX);
        let uniform = Scores::of(&Tensor::zeros(DType::F32, &[1, 4, 3]));
        assert!((uniform.entropies()[0] - 4f64.ln()).abs() < 1e-12);
        assert_eq!(uniform.places, 3);
    }
}
