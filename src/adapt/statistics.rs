//! Running statistics of BatchNormalization, re-estimated on data of the place where the network runs: Nado et al.,
//! *Evaluating Prediction-Time Batch Normalization for Robustness under Covariate Shift*, arXiv 2006.10963 (2020);
//! Schneider et al., *Improving robustness against common corruptions by covariate shift adaptation*, NeurIPS 2020.

use std::collections::HashMap;

use crate::error::{Error, Result};
use crate::exec::{Program, Purpose, Session};
use crate::graph::{Source, StateId, ValueId, WeightId};
use crate::ops::Mode;
use crate::ops::batch_norm::BatchNormalization;
use crate::plan::Request;
use crate::tensor::Tensor;
use crate::train::data::{Batch, Samples};
use crate::train::step::{Network, Shapes};

/// A layer that normalises by running statistics.
#[derive(Debug, Clone)]
struct Layer {
    mean: StateId,
    var: StateId,
    /// Elements of a channel in one sample.
    per_sample: f64,
}

/// Mean and variance of each channel of a layer's input over so many elements.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    pub count: f64,
    pub mean: Vec<f64>,
    /// Of the population: divided by `count`.
    pub var: Vec<f64>,
}

impl Moments {
    /// Both together (Chan, Golub and LeVeque 1983).
    fn add(&mut self, other: &Moments) {
        let count = self.count + other.count;
        if count == 0.0 {
            return;
        }
        let share = other.count / count;
        for c in 0..self.mean.len() {
            let apart = other.mean[c] - self.mean[c];
            self.mean[c] += share * apart;
            self.var[c] += share * (other.var[c] - self.var[c]) + share * (1.0 - share) * apart * apart;
        }
        self.count = count;
    }
}

/// The moments of every layer, in the graph's order.
pub type AllMoments = Vec<Moments>;

/// The layers of a network with running statistics, and the programs that measure batches.
pub struct Statistics {
    layers: Vec<Layer>,
    plans: Vec<(Shapes, Program, Vec<ValueId>)>,
}

/// Normalises by the batch, and leaves the batch's own statistics behind in the place of the running ones.
const MEASURE: Mode = Mode { unbiased_variance: false, fresh_statistics: true, ..Mode::TRAIN };

impl Statistics {
    /// Makes running statistics mutable and finds the layers that have them.
    pub fn new(session: &mut Session, shapes: &Shapes) -> Result<Statistics> {
        let running: Vec<WeightId> = session.model().running_statistics().collect();
        session.make_mutable(&running)?;
        let net = Network::new(session, Mode::EVAL, shapes, &HashMap::new())?;
        let samples = shapes.target.dims.first().copied().unwrap_or(1).max(1) as f64;
        let state = |v: Option<Option<ValueId>>| match v.flatten().map(|v| &net.graph.value(v).source) {
            Some(Source::State(s)) if session.store().purpose(*s) == Purpose::Statistic => Some(*s),
            _ => None,
        };
        let mut layers: Vec<Layer> = Vec::new();
        for node in &net.graph.nodes {
            if node.op.as_a::<BatchNormalization>().is_none() {
                continue;
            }
            let operand = |i: usize| node.inputs.get(i).copied();
            let (Some(mean), Some(var)) = (state(operand(3)), state(operand(4))) else { continue };
            if layers.iter().any(|l| l.mean == mean || l.var == var) {
                return Err(Error::value(
                    session.store().name(mean),
                    "holds the statistics of several layers",
                ));
            }
            let channels = session.store().meta(mean).len().max(1) as f64;
            let input = operand(0).flatten().map(|v| net.graph.meta(v)).transpose()?;
            let elements = input.map_or(0, |m| m.len()) as f64;
            layers.push(Layer { mean, var, per_sample: elements / channels / samples });
        }
        Ok(Statistics { layers, plans: Vec::new() })
    }

    /// Of a network that keeps those of its file.
    pub fn none() -> Statistics {
        Statistics { layers: Vec::new(), plans: Vec::new() }
    }

    /// Does the network have none?
    pub fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }

    /// The moments of one batch, each layer's input being what the layers before it make of the batch when they
    /// normalise by it. The running statistics are left as they are.
    pub fn measure(&mut self, session: &mut Session, batch: &Batch) -> Result<AllMoments> {
        let shapes = Shapes::of(batch)?;
        let i = match self.plans.iter().position(|p| p.0 == shapes) {
            Some(i) => i,
            None => {
                let mut net = Network::new(session, MEASURE, &shapes, &HashMap::new())?;
                net.fuse(&[], false)?;
                let request = Request { effects: net.statistics, ..Request::default() };
                let program = session.compile(net.graph, request)?;
                self.plans.push((shapes, program, net.inputs));
                self.plans.len() - 1
            }
        };
        let running = self.values(session);
        let (_, program, inputs) = &self.plans[i];
        let feeds: Vec<_> = inputs.iter().zip(&batch.inputs).map(|(v, (_, t))| (*v, t.view())).collect();
        session.run(program, &feeds, 0)?;
        let measured = self.values(session);
        self.put(session, &running)?;
        let n = batch.len() as f64;
        Ok(self
            .layers
            .iter()
            .zip(measured)
            .map(|(l, (mean, var))| Moments { count: n * l.per_sample, mean, var })
            .collect())
    }

    /// The moments over the samples `indices`, measured batch by batch and pooled exactly.
    pub fn over(
        &mut self,
        session: &mut Session,
        samples: &dyn Samples,
        indices: &[usize],
        batch_size: usize,
        batches: &mut super::Batches,
    ) -> Result<AllMoments> {
        let mut all: Option<AllMoments> = None;
        for picks in even(indices, batch_size) {
            let batch = batches.of(samples, picks)?;
            let measured = self.measure(session, batch)?;
            match &mut all {
                None => all = Some(measured),
                Some(all) => pool(all, &measured),
            }
        }
        all.ok_or_else(|| Error::Data("statistics of no samples".into()))
    }

    /// The running statistics as they are: mean and variance by layer.
    pub fn values(&self, session: &Session) -> Vec<(Vec<f64>, Vec<f64>)> {
        let of = |s: StateId| session.store().tensor(s).to_f64();
        self.layers.iter().map(|l| (of(l.mean), of(l.var))).collect()
    }

    /// Overwrites the running statistics.
    pub fn put(&self, session: &mut Session, values: &[(Vec<f64>, Vec<f64>)]) -> Result<()> {
        for (l, (mean, var)) in self.layers.iter().zip(values) {
            for (state, values) in [(l.mean, mean), (l.var, var)] {
                let meta = session.store().meta(state).clone();
                let t = Tensor::from_slice(&meta.dims, values)
                    .map_err(|source| Error::Op { node: "running statistics".into(), source })?;
                session.store_mut().set(state, t.cast(meta.dtype).bytes());
            }
        }
        Ok(())
    }
}

/// Adds a batch's moments.
pub fn pool(all: &mut AllMoments, batch: &AllMoments) {
    for (all, batch) in all.iter_mut().zip(batch) {
        all.add(batch);
    }
}

/// What running statistics are for these moments (the variance unbiased, PyTorch's rule), mixed with others: `share` of
/// them, 0 to 1, is the new ones.
pub fn blended(
    moments: &AllMoments,
    before: &[(Vec<f64>, Vec<f64>)],
    share: f64,
) -> Vec<(Vec<f64>, Vec<f64>)> {
    let mix = |new: &[f64], old: &[f64], factor: f64| -> Vec<f64> {
        new.iter().zip(old).map(|(n, o)| o + share * (n * factor - o)).collect()
    };
    let one = |(m, (mean, var)): (&Moments, &(Vec<f64>, Vec<f64>))| {
        let unbias = if m.count > 1.0 { m.count / (m.count - 1.0) } else { 1.0 };
        let finite = m.mean.iter().chain(&m.var).all(|x| x.is_finite());
        match finite {
            true => (mix(&m.mean, mean, 1.0), mix(&m.var, var, unbias)),
            false => (mean.clone(), var.clone()),
        }
    };
    moments.iter().zip(before).map(one).collect()
}

/// How much more the means of batches differ than those of batches of samples in random order can: the mean over layers
/// and channels of `B·(m_b − m)²/v`, `B` samples a batch, `m` and `v` of all batches together. In random order its
/// expectation is the share of a channel's variance that lies between samples, at most 1; in runs of one class it is
/// several times that.
pub fn unrest(batches: &[(usize, AllMoments)]) -> f64 {
    let Some((_, first)) = batches.first() else { return 0.0 };
    let mut all = first.clone();
    batches[1..].iter().for_each(|(_, b)| pool(&mut all, b));
    let (mut sum, mut terms) = (0.0, 0.0);
    for (n, b) in batches {
        for (own, all) in b.iter().zip(&all) {
            for c in 0..all.mean.len() {
                if all.var[c] > 0.0 {
                    sum += *n as f64 * (own.mean[c] - all.mean[c]).powi(2) / all.var[c];
                    terms += 1.0;
                }
            }
        }
    }
    let degrees = (batches.len() as f64 - 1.0) / batches.len() as f64;
    if terms > 0.0 && degrees > 0.0 { sum / terms / degrees } else { 0.0 }
}

/// Runs of about `size`, none much shorter than the others: a batch of few samples has poor statistics.
pub fn even(indices: &[usize], size: usize) -> impl Iterator<Item = &[usize]> {
    let runs = (indices.len() as f64 / size.max(1) as f64).round().max(1.0) as usize;
    indices.chunks(indices.len().div_ceil(runs).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(x: &[f64]) -> Moments {
        let n = x.len() as f64;
        let mean = x.iter().sum::<f64>() / n;
        let var = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
        Moments { count: n, mean: vec![mean], var: vec![var] }
    }

    #[test]
    fn pooled_batches_are_the_whole() {
        let x: Vec<f64> = (0..17).map(|i| (i * i % 7) as f64 + 0.25 * i as f64).collect();
        let mut all = vec![of(&x[..5])];
        pool(&mut all, &vec![of(&x[5..6])]);
        pool(&mut all, &vec![of(&x[6..])]);
        let whole = of(&x);
        assert_eq!(all[0].count, 17.0);
        assert!((all[0].mean[0] - whole.mean[0]).abs() < 1e-12);
        assert!((all[0].var[0] - whole.var[0]).abs() < 1e-12);
        let before = vec![(vec![1.0], vec![2.0])];
        let quarter = blended(&all, &before, 0.25);
        assert!((quarter[0].0[0] - (0.75 + 0.25 * whole.mean[0])).abs() < 1e-12);
        assert!((quarter[0].1[0] - (1.5 + 0.25 * whole.var[0] * 17.0 / 16.0)).abs() < 1e-12);
        let bad = vec![Moments { count: 3.0, mean: vec![f64::NAN], var: vec![1.0] }];
        assert_eq!(blended(&bad, &before, 1.0), before);
    }

    #[test]
    fn runs_of_one_class_are_restless() {
        let batch = |offset: f64| (8, vec![of(&(0..8).map(|i| offset + i as f64).collect::<Vec<_>>())]);
        assert_eq!(unrest(&[batch(0.0), batch(0.0)]), 0.0);
        assert!(unrest(&[batch(0.0), batch(9.0)]) > 4.0);
        assert_eq!(unrest(&[]), 0.0);
    }

    #[test]
    fn runs_are_even() {
        let all: Vec<usize> = (0..130).collect();
        let sizes: Vec<usize> = even(&all, 64).map(<[usize]>::len).collect();
        assert_eq!(sizes, [65, 65]);
        assert_eq!(even(&all[..3], 64).count(), 1);
    }
}
