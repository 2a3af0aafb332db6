//! SAR: Niu et al., *Towards Stable Test-Time Adaptation in Dynamic Wild World*, ICLR 2023.

use std::collections::HashMap;

use crate::error::{Error, Result};
use crate::exec::{Program, Session};
use crate::graph::{StateId, ValueId};
use crate::ops::Mode;
use crate::plan::Request;
use crate::tensor::Tensor;
use crate::train::data::Batch;
use crate::train::method::{At, Learned};
use crate::train::step::{self, Apply, Attached, Network, Recipe, Shapes, feeds};

use super::Adaptation;
use super::scores::{Scorer, weigh};

/// Sharpness-aware entropy minimisation: the gradient is taken where the weights are after a step of length ρ up the
/// entropy, over samples whose entropy is below E₀ both times. When the entropy's moving average falls below `recovery`,
/// the network starts again.
pub struct Sar {
    margin: f64,
    rho: f64,
    recovery: f64,
    scorer: Scorer,
    gathers: Vec<(Shapes, Gather)>,
    apply: Option<Apply>,
    average: Option<f64>,
}

/// Forward, entropy and its gradient, which is left in the session.
struct Gather {
    program: Program,
    inputs: Vec<ValueId>,
    attached: Attached,
}

/// What stays of the average entropy when a batch comes to it.
const KEPT: f64 = 0.9;

impl Sar {
    /// `margin`: E₀ as a share of ln(classes).
    pub fn new(mode: Mode, margin: f64, rho: f64, recovery: f64) -> Self {
        Sar {
            margin,
            rho,
            recovery,
            scorer: Scorer::new(mode),
            gathers: Vec::new(),
            apply: None,
            average: None,
        }
    }

    fn gather(&mut self, session: &mut Session, recipe: &Recipe, shapes: &Shapes) -> Result<usize> {
        if let Some(i) = self.gathers.iter().position(|g| g.0 == *shapes) {
            return Ok(i);
        }
        // Gradients that are accumulated outlive the run.
        let recipe = Recipe { accumulate: 2, ..recipe.clone() };
        let mut net = Network::new(session, recipe.mode(), shapes, &HashMap::new())?;
        net.fuse(&[], true)?;
        let attached = recipe.loss.attach(&mut net.graph, shapes.target.clone())?;
        let updates = step::update(session, &mut net.graph, &recipe, attached.loss)?;
        let request = Request {
            outputs: vec![attached.loss, attached.logits],
            effects: updates.effects,
            kinds: updates.kinds,
            ..Request::default()
        };
        let program = session.compile(net.graph, request)?;
        if self.apply.is_none() {
            self.apply = Some(step::apply(session, &recipe)?);
        }
        self.gathers.push((shapes.clone(), Gather { program, inputs: net.inputs, attached }));
        Ok(self.gathers.len() - 1)
    }

    /// The samples of `among` that the network is sure of.
    fn sure(&mut self, session: &mut Session, batch: &Batch, among: &[bool]) -> Result<(Vec<bool>, f64)> {
        let scores = self.scorer.run(session, batch)?;
        let limit = self.margin * (scores.classes as f64).ln();
        let entropies = scores.entropies();
        let of: Vec<f64> = entropies.iter().zip(among).filter(|(_, a)| **a).map(|(h, _)| *h).collect();
        let mean = of.iter().sum::<f64>() / of.len().max(1) as f64;
        Ok((entropies.iter().zip(among).map(|(h, a)| *a && *h < limit).collect(), mean))
    }

    /// The gradient of the mean entropy of the chosen samples, in the session.
    fn run(
        &self,
        session: &mut Session,
        plan: usize,
        batch: &mut Batch,
        chosen: &[bool],
        seed: u64,
    ) -> Result<f64> {
        let n = chosen.iter().filter(|c| **c).count().max(1) as f64;
        let dtype = Shapes::of(batch)?.target.dtype;
        weigh(batch, dtype, |i| if chosen[i] { 1.0 / n } else { 0.0 })?;
        step::set_share(session, 1.0, true);
        let g = &self.gathers[plan].1;
        session.run(&g.program, &feeds(&g.inputs, g.attached.target, batch)?, seed)?;
        session.scalar(&g.program, g.attached.loss)
    }
}

/// A parameter's state and that of its gradient.
fn states(session: &Session, recipe: &Recipe) -> Result<Vec<(StateId, StateId)>> {
    let model = session.model();
    let find = |w: &crate::graph::WeightId| {
        let name = &model.graph.value(model.weight(*w).value).name;
        let own = session.state_of(*w).zip(session.store().find(&step::sum_name(name)));
        own.ok_or_else(|| Error::value(name, "has no gradient"))
    };
    recipe.params.iter().map(find).collect()
}

/// Moves the parameters by ρ along their gradient; returns what they were before.
fn climb(session: &mut Session, states: &[(StateId, StateId)], rho: f64) -> Result<Vec<Tensor>> {
    let gradients: Vec<Vec<f64>> = states.iter().map(|s| session.store().tensor(s.1).to_f64()).collect();
    let norm = gradients.iter().flatten().map(|g| g * g).sum::<f64>().sqrt();
    let mut before = Vec::with_capacity(states.len());
    for ((param, _), g) in states.iter().zip(&gradients) {
        let old = session.store().tensor(*param);
        let moved: Vec<f64> = old.to_f64().iter().zip(g).map(|(w, g)| w + rho * g / (norm + 1e-12)).collect();
        let moved = Tensor::from_slice(old.dims(), &moved)
            .map_err(|source| Error::Op { node: "SAR".into(), source })?;
        session.store_mut().set(*param, moved.cast(old.dtype()).bytes());
        before.push(old);
    }
    Ok(before)
}

impl Adaptation for Sar {
    fn prepare(&mut self, session: &mut Session, recipe: &Recipe, shapes: &Shapes) -> Result<()> {
        self.gather(session, recipe, shapes).map(|_| ())
    }

    fn learn(
        &mut self,
        session: &mut Session,
        recipe: &Recipe,
        batch: &mut Batch,
        at: &At,
    ) -> Result<Option<Learned>> {
        let plan = self.gather(session, recipe, &Shapes::of(batch)?)?;
        let (first, _) = self.sure(session, batch, &vec![true; batch.len()])?;
        if !first.contains(&true) {
            return Ok(None);
        }
        self.run(session, plan, batch, &first, at.seed)?;
        let states = states(session, recipe)?;
        let before = climb(session, &states, self.rho)?;
        let (second, entropy) = self.sure(session, batch, &first)?;
        let loss = match second.contains(&true) {
            true => Some(self.run(session, plan, batch, &second, at.seed)?),
            false => None,
        };
        for ((param, _), old) in states.iter().zip(&before) {
            session.store_mut().set(*param, old.bytes());
        }
        let (Some(loss), Some(apply)) = (loss, &self.apply) else { return Ok(None) };
        session.run(&apply.program, &[], 0)?;
        let (scale, norm) =
            (session.scalar(&apply.program, apply.scale)?, session.scalar(&apply.program, apply.norm)?);
        if entropy.is_finite() {
            self.average = Some(self.average.map_or(entropy, |a| KEPT * a + (1.0 - KEPT) * entropy));
        }
        Ok(Some(Learned {
            loss,
            task: loss,
            features: None,
            logits: Tensor::zeros(crate::tensor::DType::F32, &[0, 0]),
            scale: Some(scale),
            norm: Some(norm),
        }))
    }

    fn collapsed(&self) -> bool {
        self.average.is_some_and(|a| a < self.recovery)
    }

    fn reset(&mut self) {
        self.average = None;
    }
}
