//! The rival method: *Be Your Own Teacher* (Zhang et al., ICCV 2019, arXiv 1905.08094), auxiliary heads that learn from
//! the labels and from the network's own output, in its simplest form: a head is the mean over places and a dense layer.
//!
//! The heads live in the training graph alone; nothing of them is exported.

use std::collections::HashMap;

use crate::error::{Error, Result};
use crate::exec::{Purpose, Session};
use crate::graph::{self, Graph, StateId, ValueId};
use crate::icp::features::{at_icp, emit, scalar};
use crate::icp::taps::{Path, Taps, find};
use crate::kernels::random::Stream;
use crate::ops::binary::Binary;
use crate::ops::distill::Detach;
use crate::ops::loss::CrossEntropy;
use crate::ops::matmul::Gemm;
use crate::ops::reduce::{Kind, Reduce};
use crate::ops::softmax::Softmax;
use crate::plan::Request;
use crate::tensor::{Meta, Tensor};
use crate::train::data::Batch;
use crate::train::loss::Attached;
use crate::train::method::{At, Learned, Method, Programs};
use crate::train::step::{Network, Recipe, Shapes, Supervised, shared_step, update_and};

/// The method's options.
#[derive(Debug, Clone)]
pub struct ByotSettings {
    /// a: a head's loss is `(1 − a)·CE(head, label) + a·T²·CE(head/T, softmax(output/T))`; the second term is, but for a
    /// constant, the paper's divergence.
    pub alpha: f64,
    /// T.
    pub temperature: f64,
    /// Where the heads are; the deepest, in front of the network's own, has none.
    pub taps: Taps,
    /// Of the heads' first weights.
    pub seed: u64,
}

impl Default for ByotSettings {
    /// a = 0.3 and T = 3, as the paper's code has them, at the network's stages.
    fn default() -> Self {
        ByotSettings { alpha: 0.3, temperature: 3.0, taps: Taps::Auto, seed: 0 }
    }
}

/// Auxiliary heads as a training method.
#[derive(Default)]
pub struct Byot {
    settings: ByotSettings,
    plans: Vec<(Shapes, Plan)>,
}

/// The step for batches of one shape, and what is minimised.
struct Plan {
    step: Supervised,
    total: ValueId,
}

impl Byot {
    pub fn new(settings: ByotSettings) -> Self {
        Byot { settings, plans: Vec::new() }
    }

    /// The tapped values, and for each the axis of its channels.
    fn taps(&self, session: &Session, graph: &Graph) -> Result<Vec<(ValueId, usize)>> {
        let output = graph.outputs.first().copied();
        let output = output.ok_or_else(|| Error::Config("the model has no output".into()))?;
        let (logits, _) = graph::logits(graph, output);
        let mut taps = find(session.model(), graph, &self.settings.taps, logits)?;
        if taps.len() > 1 {
            taps.pop();
        }
        let path = Path::new(graph, logits)?;
        taps.into_iter()
            .map(|v| {
                let axis = match graph.meta(v)?.rank() {
                    0 | 1 => {
                        return Err(Error::value(
                            &graph.value(v).name,
                            "an auxiliary head needs (N, channels, …)",
                        ));
                    }
                    3 if !path.convolutional(v) => 2,
                    _ => 1,
                };
                Ok((v, axis))
            })
            .collect()
    }

    fn plan(&self, session: &mut Session, recipe: &Recipe, shapes: &Shapes) -> Result<Plan> {
        if recipe.accumulate > 1 {
            return Err(Error::Config("--method byot does not accumulate: leave out --accumulate".into()));
        }
        let mut net = Network::new(session, recipe.mode(), shapes, &HashMap::new())?;
        let taps = self.taps(session, &net.graph)?;
        let values: Vec<ValueId> = taps.iter().map(|t| t.0).collect();
        net.fuse(&values, true)?;
        let g = &mut net.graph;
        let attached = recipe.loss.attach(g, shapes.target.clone())?;
        let scores = g.meta(attached.logits)?.clone();
        if !recipe.loss.wants_labels() || scores.rank() != 2 {
            return Err(Error::Config(
                "--method byot needs a classifier: cross-entropy on scores (N, classes)".into(),
            ));
        }
        let mut total = attached.loss;
        let mut heads: Vec<(ValueId, StateId)> = Vec::new();
        let taught = self.softened(g, attached.logits, true)?;
        let taught = emit(g, Softmax::along(1), &[taught])?;
        for (i, (v, axis)) in taps.iter().enumerate() {
            let (own, params) = self.head(session, g, (*v, *axis), i, &scores)?;
            heads.extend(params);
            let hard = emit(g, CrossEntropy { label_smoothing: 0.0 }, &[own, attached.target])?;
            let own = self.softened(g, own, false)?;
            let soft = emit(g, CrossEntropy { label_smoothing: 0.0 }, &[own, taught])?;
            let (a, t) = (self.settings.alpha, self.settings.temperature);
            for (term, weight) in [(hard, 1.0 - a), (soft, a * t * t)] {
                let weight = scalar(g, weight, scores.dtype);
                let weighted = emit(g, Binary::Mul, &[term, weight])?;
                total = emit(g, Binary::Add, &[total, weighted])?;
            }
        }
        let params: Vec<ValueId> = heads.iter().map(|h| h.0).collect();
        let (mut updates, grads) = update_and(session, g, recipe, total, &params)?;
        let step = shared_step(session, g, &updates);
        for ((param, _), grad) in heads.iter().zip(grads) {
            let Some(grad) = grad else { continue };
            let (name, meta) = (g.value(*param).name.clone(), g.meta(*param)?.clone());
            let states = recipe.optimizer.states_for(session.store_mut(), &name, &meta, Purpose::Optimizer);
            updates.effects.push(at_icp(recipe.optimizer.emit(g, *param, grad, step, &states))?);
        }
        let outputs = [Some(attached.loss), Some(attached.logits), Some(total), updates.scale, updates.norm];
        let request = Request {
            outputs: outputs.into_iter().flatten().collect(),
            effects: updates.effects.into_iter().chain(net.statistics).collect(),
            kinds: updates.kinds,
            ..Request::default()
        };
        let program = session.compile(net.graph, request)?;
        let (scale, norm) = (updates.scale, updates.norm);
        let attached: Attached = attached;
        Ok(Plan { step: Supervised { program, inputs: net.inputs, attached, scale, norm }, total })
    }

    /// Logits by the temperature, `fixed`: without gradient.
    fn softened(&self, g: &mut Graph, logits: ValueId, fixed: bool) -> Result<ValueId> {
        let dtype = g.meta(logits)?.dtype;
        let logits = if fixed { emit(g, Detach, &[logits])? } else { logits };
        let t = scalar(g, self.settings.temperature, dtype);
        emit(g, Binary::Div, &[logits, t])
    }

    /// A head's scores (N, classes), and its parameters.
    fn head(
        &self,
        session: &mut Session,
        g: &mut Graph,
        (tap, axis): (ValueId, usize),
        index: usize,
        scores: &Meta,
    ) -> Result<(ValueId, Vec<(ValueId, StateId)>)> {
        let meta = g.meta(tap)?.clone();
        let (channels, classes) = (meta.dims[axis], scores.dims[1]);
        let axes: Vec<i64> = (1..meta.rank()).filter(|a| *a != axis).map(|a| a as i64).collect();
        let pooled = match axes.is_empty() {
            true => tap,
            false => {
                let mean = Reduce { kind: Kind::Mean, axes: Some(axes), keepdims: false, noop: false };
                emit(g, mean, &[tap])?
            }
        };
        let name = format!("byot.{}", g.value(tap).name);
        let mut params = Vec::new();
        for (what, dims) in [("weight", &[channels, classes][..]), ("bias", &[classes])] {
            let (full, meta) = (format!("{name}.{what}"), Meta::new(scores.dtype, dims));
            let store = session.store_mut();
            let state = store.find(&full).unwrap_or_else(|| {
                let state = store.add(&full, meta.clone(), Purpose::Optimizer);
                let seed = self.settings.seed ^ ((index as u64) << 32) ^ what.len() as u64;
                // Uniform in ±1/√channels, as PyTorch has it.
                let bound = 1.0 / (channels.max(1) as f64).sqrt();
                let mut drawn = Tensor::zeros(meta.dtype, dims);
                if let Ok(w) = drawn.get_mut::<f32>() {
                    Stream::new(seed).uniform(w);
                    w.iter_mut().for_each(|w| *w = (bound * (2.0 * f64::from(*w) - 1.0)) as f32);
                } else if let Ok(w) = drawn.get_mut::<f64>() {
                    Stream::new(seed).uniform(w);
                    w.iter_mut().for_each(|w| *w = bound * (2.0 * *w - 1.0));
                }
                store.set(state, drawn.bytes());
                state
            });
            params.push((g.add_state(full, state, meta), state));
        }
        let dense = Gemm { alpha: 1.0, beta: 1.0, trans_a: false, trans_b: false, pairs: false };
        Ok((emit(g, dense, &[pooled, params[0].0, params[1].0])?, params))
    }

    fn cached(&mut self, session: &mut Session, recipe: &Recipe, shapes: &Shapes) -> Result<usize> {
        if let Some(i) = self.plans.iter().position(|p| p.0 == *shapes) {
            return Ok(i);
        }
        self.plans.push((shapes.clone(), self.plan(session, recipe, shapes)?));
        Ok(self.plans.len() - 1)
    }
}

impl Method for Byot {
    fn accumulates(&self) -> bool {
        false
    }

    fn prepare(&mut self, session: &mut Session, recipe: &Recipe, shapes: &Shapes, _: usize) -> Result<()> {
        self.cached(session, recipe, shapes).map(|_| ())
    }

    fn learn(&mut self, session: &mut Session, recipe: &Recipe, batch: &Batch, at: &At) -> Result<Learned> {
        let i = self.cached(session, recipe, &Shapes::of(batch)?)?;
        let plan = &self.plans[i].1;
        let learned = plan.step.learn(session, batch, at)?;
        Ok(Learned { loss: session.scalar(&plan.step.program, plan.total)?, ..learned })
    }

    fn programs(&self) -> Programs<'_> {
        self.plans.iter().map(|p| ("step", &p.1.step.program)).collect()
    }

    fn tap_names(&self, session: &Session, shapes: &Shapes) -> Result<Vec<String>> {
        let net = Network::new(session, crate::ops::Mode::EVAL, shapes, &HashMap::new())?;
        let taps = self.taps(session, &net.graph)?;
        Ok(taps.iter().map(|v| net.graph.value(v.0).name.clone()).collect())
    }
}
