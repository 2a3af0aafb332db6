//! One training step as programs: the network in some mode, a loss, gradients, updates.

use std::collections::HashMap;

use crate::error::{Error, Result};
use crate::exec::{Program, Purpose, Session, infer};
use crate::graph::{self, Graph, Source, StateId, ValueId, WeightId};
use crate::ops::gather::RowSums;
use crate::ops::update::{Accumulate, ClipScale, SumSquares};
use crate::ops::variadic::Variadic;
use crate::ops::{Mode, Op};
use crate::plan::{Kind, Request};
use crate::tensor::{Meta, Tensor, View};
use crate::train::data::Batch;
pub use crate::train::loss::Attached;
use crate::train::loss::Loss;
use crate::train::loss_scale;
use crate::train::method::{At, Learned};
use crate::train::optimizer::{Optimizer, Step, hyper_meta};

/// How normalisation layers behave while training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Norm {
    /// By the batch's statistics; the running ones follow.
    Batch,
    /// By the running statistics of the file, which stay as they are.
    Frozen,
}

/// What the steps of a run have in common.
#[derive(Debug, Clone)]
pub struct Recipe {
    pub loss: Loss,
    pub optimizer: Optimizer,
    /// Bound on the gradient's global L2 norm.
    pub clip: Option<f64>,
    /// What is trained.
    pub params: Vec<WeightId>,
    pub norm: Norm,
    /// Batches whose gradients are averaged into one update.
    pub accumulate: usize,
}

impl Recipe {
    /// The mode of the forward passes that the weights learn from.
    pub fn mode(&self) -> Mode {
        Mode { batch_statistics: self.norm == Norm::Batch, ..Mode::TRAIN }
    }

    /// Makes what the run changes mutable: the parameters, and the running statistics where they follow.
    pub fn prepare(&self, session: &mut Session) -> Result<()> {
        let mut changing: Vec<WeightId> =
            self.params.iter().filter(|w| !session.is_in_parts(**w)).copied().collect();
        if self.norm == Norm::Batch {
            changing.extend(session.model().running_statistics());
        }
        session.make_mutable(&changing)
    }
}

/// The shapes of a batch: inputs by name, and the target.
#[derive(Debug, Clone)]
pub struct Shapes {
    pub inputs: Vec<(String, Meta)>,
    pub target: Meta,
}

impl PartialEq for Shapes {
    fn eq(&self, other: &Self) -> bool {
        let same = |a: &(String, Meta), b: &(String, Meta)| a.0 == b.0 && a.1.same_shape(&b.1);
        self.target.same_shape(&other.target)
            && self.inputs.len() == other.inputs.len()
            && self.inputs.iter().zip(&other.inputs).all(|(a, b)| same(a, b))
    }
}

impl Shapes {
    /// The shapes of a batch, which must have a target.
    pub fn of(batch: &Batch) -> Result<Shapes> {
        let inputs = batch.inputs.iter().map(|(name, t)| (name.clone(), t.meta())).collect();
        Ok(Shapes { inputs, target: target(batch)?.meta() })
    }
}

fn target(batch: &Batch) -> Result<&Tensor> {
    batch.target.as_ref().ok_or_else(|| Error::Data("the data have no target ('y')".into()))
}

/// The network's graph in one mode with all shapes known.
pub struct Network {
    pub graph: Graph,
    /// In the order of `Shapes::inputs`.
    pub inputs: Vec<ValueId>,
    /// Next running statistics: to be computed for their effect.
    pub statistics: Vec<ValueId>,
}

impl Network {
    /// The network in `mode`; inputs listed in `states` are read from there instead of being fed.
    pub fn new(
        session: &Session,
        mode: Mode,
        shapes: &Shapes,
        states: &HashMap<String, StateId>,
    ) -> Result<Network> {
        let mut graph = session.graph()?;
        let mut inputs = Vec::new();
        let mut metas = Vec::new();
        for (name, meta) in &shapes.inputs {
            let v = graph
                .inputs
                .iter()
                .copied()
                .find(|v| graph.value(*v).name == *name)
                .ok_or_else(|| Error::value(name, "the model has no such input"))?;
            if let Some(s) = states.get(name) {
                graph.value_mut(v).source = Source::State(*s);
                graph.value_mut(v).meta = Some(meta.clone());
            }
            metas.push((v, meta.clone()));
            inputs.push(v);
        }
        let mut graph = match infer(graph.clone(), &metas, &[]) {
            Ok(graph) => graph,
            // A detector chooses boxes at its end, by values: it is trained by what it chooses from.
            Err(e) => {
                let mut cut = match graph.without_selections() {
                    Some(cut) => infer(cut, &metas, &[]).map_err(|_| e)?,
                    None => return Err(e),
                };
                let float = |v: &ValueId| cut.value(*v).meta.as_ref().is_some_and(|m| m.dtype.is_float());
                let (mut outputs, rest): (Vec<_>, Vec<_>) = cut.outputs.iter().copied().partition(float);
                outputs.extend(rest);
                cut.outputs = outputs;
                cut
            }
        };
        graph.inputs.retain(|v| matches!(graph.values[v.index()].source, Source::Input));
        let statistics = graph::set_mode(&mut graph, mode)?;
        Ok(Network { graph, inputs, statistics })
    }

    /// Lets only some of the running statistics follow the batch.
    pub fn keep_statistics(&mut self, keep: impl Fn(ValueId) -> bool) {
        let (kept, left): (Vec<_>, Vec<_>) = self.statistics.iter().partition(|v| keep(**v));
        self.statistics = kept;
        // A node updates the states of all outputs that it has.
        for v in self.graph.nodes.iter_mut().flat_map(|n| &mut n.outputs) {
            *v = v.filter(|v| !left.contains(v));
        }
    }

    /// Joins operators, before a loss is attached; `taps` and the outputs are still computed. `weights_learn`: the
    /// graph will be differentiated with respect to weights.
    pub fn fuse(&mut self, taps: &[ValueId], weights_learn: bool) -> Result<()> {
        graph::fuse(&mut self.graph, taps, weights_learn)
    }
}

/// The state that passes the learning rate and the step's number to the updates.
pub fn hyper_state(session: &mut Session, name: &str) -> StateId {
    let store = session.store_mut();
    store.find(name).unwrap_or_else(|| store.add(name, hyper_meta(), Purpose::Step))
}

/// Sets a hyper state to (learning rate, step from 1).
pub fn set_hyper(session: &mut Session, state: StateId, lr: f64, t: usize) {
    session.store_mut().set(state, bytemuck::cast_slice(&[lr, t as f64]));
}

const HYPER: &str = "step.hyper";

/// What updating the weights adds to a program.
#[derive(Debug, Default)]
pub struct Updates {
    pub effects: Vec<ValueId>,
    pub kinds: HashMap<ValueId, Kind>,
    /// float64 scalars: factor on the gradient (not finite: step skipped), and its norm before clipping.
    pub scale: Option<ValueId>,
    pub norm: Option<ValueId>,
}

fn at_loss<T>(r: std::result::Result<T, crate::error::OpError>) -> Result<T> {
    r.map_err(|source| Error::Op { node: "optimizer step".into(), source })
}

/// The values that learn, of the weights themselves or of their parts, in every graph of the session.
pub fn param_values(session: &Session, params: &[WeightId]) -> Vec<ValueId> {
    params.iter().flat_map(|w| session.trained_values(*w)).collect()
}

/// Appends gradients of `loss` and, from them, the updates (or, when accumulating, the sums that
/// [`apply`] will read).
pub fn update(session: &mut Session, graph: &mut Graph, recipe: &Recipe, loss: ValueId) -> Result<Updates> {
    update_and(session, graph, recipe, loss, &[]).map(|u| u.0)
}

/// The same with, from the same backward pass, the gradients of other values (`None`: the loss does not depend on it).
pub fn update_and(
    session: &mut Session,
    graph: &mut Graph,
    recipe: &Recipe,
    loss: ValueId,
    others: &[ValueId],
) -> Result<(Updates, Vec<Option<ValueId>>)> {
    let params = param_values(session, &recipe.params);
    let all: Vec<ValueId> = params.iter().chain(others).copied().collect();
    let forward = graph.nodes.len();
    let scaled = loss_scale::scaled(session, graph, loss)?;
    let grads = graph::grad(graph, scaled, &all)?;
    graph::narrow(graph, forward)?;
    let missing: Vec<&str> =
        params.iter().filter(|v| !grads.contains_key(v)).map(|v| graph.value(*v).name.as_str()).collect();
    if !missing.is_empty() {
        return Err(Error::Config(format!(
            "the loss does not depend on {}: leave it out of --train",
            missing.join(", ")
        )));
    }
    let of_others = others.iter().map(|v| grads.get(v).copied()).collect();
    let grads: Vec<(ValueId, ValueId)> = params.iter().map(|v| (*v, grads[v])).collect();
    let mut updates = Updates::default();
    match recipe.accumulate {
        0 | 1 => emit_updates(session, graph, recipe, loss, &grads, &mut updates)?,
        _ => emit_accumulation(session, graph, loss, &grads, &mut updates)?,
    }
    Ok((updates, of_others))
}

fn emit_updates(
    session: &mut Session,
    graph: &mut Graph,
    recipe: &Recipe,
    loss: ValueId,
    grads: &[(ValueId, ValueId)],
    updates: &mut Updates,
) -> Result<()> {
    let mut of = Vec::with_capacity(grads.len());
    for (_, g) in grads {
        of.push(match at_loss(RowSums::instead(graph, *g))? {
            Some((sums, at)) => (sums, Some(at)),
            None => (*g, None),
        });
    }
    updates.kinds.extend(of.iter().map(|(g, _)| (*g, Kind::Gradient)));
    let mut inputs = vec![Some(loss), Some(sum_squares(graph, of.iter().map(|(g, _)| *g))?)];
    inputs.extend(loss_scale::of(session, graph).map(Some));
    let clip = emit(graph, "norm", ClipScale { max_norm: recipe.clip }, &inputs, 2)?;
    (updates.scale, updates.norm) = (Some(clip[0]), Some(clip[1]));
    let step = shared_step(session, graph, updates);
    for ((param, _), g) in grads.iter().zip(of) {
        let name = graph.value(*param).name.clone();
        let meta = graph.meta(*param)?.clone();
        let (kept, seed) = (session.options().optimizer_state, session.options().seed);
        let (optimizer, store) = (&recipe.optimizer, session.store_mut());
        let states = optimizer.states_as(store, &name, &meta, Purpose::Optimizer, kept);
        updates.effects.push(at_loss(optimizer.emit_as(graph, *param, g, step, &states, kept, seed))?);
    }
    updates.effects.extend(loss_scale::next(session, graph, clip[0])?);
    Ok(())
}

/// `Σ g²` of all gradients (float64): of each as soon as it is there, while it is near, then together in their order.
pub fn sum_squares(graph: &mut Graph, grads: impl Iterator<Item = ValueId>) -> Result<ValueId> {
    /// As many as a kernel call has without memory of its own.
    const TOGETHER: usize = 15;
    let mut sums = Vec::new();
    for g in grads {
        sums.push(emit(graph, "norm", SumSquares, &[Some(g)], 1)?[0]);
    }
    let mut total = None;
    for part in sums.chunks(TOGETHER) {
        let terms: Vec<_> = total.into_iter().chain(part.iter().copied()).map(Some).collect();
        total = Some(emit(graph, "norm", Variadic::Sum, &terms, 1)?[0]);
    }
    total.ok_or_else(|| Error::Config("nothing is trained".into()))
}

/// What updates of further tensors share with the parameters' in `updates`: learning rate, step number, factor.
pub fn shared_step(session: &mut Session, graph: &mut Graph, updates: &Updates) -> Step {
    let hyper = hyper_state(session, HYPER);
    Step { hyper: graph.add_state(HYPER, hyper, hyper_meta()), scale: updates.scale }
}

fn emit(
    graph: &mut Graph,
    hint: &str,
    op: impl Op + 'static,
    inputs: &[Option<ValueId>],
    outputs: usize,
) -> Result<Vec<ValueId>> {
    at_loss(graph.emit(hint, std::sync::Arc::new(op), inputs, outputs))
}

/// float64 [2]: weight of the batch, and 1 at the first batch of a step.
const SHARE: &str = "step.share";
/// The name of what holds a parameter's summed gradient.
pub fn sum_name(param: &str) -> String {
    format!("{param}.grad")
}
const LOSS_SUM: &str = "step.loss";

fn emit_accumulation(
    session: &mut Session,
    graph: &mut Graph,
    loss: ValueId,
    grads: &[(ValueId, ValueId)],
    updates: &mut Updates,
) -> Result<()> {
    updates.kinds.extend(grads.iter().map(|(_, g)| (*g, Kind::Gradient)));
    let share = hyper_state(session, SHARE);
    let share = graph.add_state(SHARE, share, hyper_meta());
    let mut sums = vec![(LOSS_SUM.to_string(), loss)];
    sums.extend(grads.iter().map(|(p, g)| (sum_name(&graph.value(*p).name), *g)));
    for (name, g) in sums {
        let meta = graph.meta(g)?.clone();
        let meta = Meta { value: None, ..meta };
        let store = session.store_mut();
        let state = store.find(&name).unwrap_or_else(|| store.add(&name, meta.clone(), Purpose::Gradient));
        let acc = graph.add_state(&name, state, meta);
        updates.effects.push(emit(graph, &name, Accumulate, &[Some(acc), Some(g), Some(share)], 1)?[0]);
    }
    Ok(())
}

/// Sets the share of the next batch in the step's gradient.
pub fn set_share(session: &mut Session, weight: f64, first: bool) {
    let state = hyper_state(session, SHARE);
    session.store_mut().set(state, bytemuck::cast_slice(&[weight, f64::from(u8::from(first))]));
}

/// Sets learning rate and step number for the coming update.
pub fn set_step(session: &mut Session, lr: f64, t: usize) {
    let state = hyper_state(session, HYPER);
    set_hyper(session, state, lr, t);
}

/// A program without a network: updates the weights from accumulated gradients.
pub struct Apply {
    pub program: Program,
    pub loss: ValueId,
    pub scale: ValueId,
    pub norm: ValueId,
}

/// Plans the update from the sums that programs made by [`update`] left behind.
pub fn apply(session: &mut Session, recipe: &Recipe) -> Result<Apply> {
    let mut graph = session.graph()?;
    let params = param_values(session, &recipe.params);
    let find = |graph: &mut Graph, session: &Session, name: &str| -> Result<ValueId> {
        let state = session.store().find(name).ok_or_else(|| Error::value(name, "was never accumulated"))?;
        Ok(graph.add_state(name, state, session.store().meta(state).clone()))
    };
    let loss = find(&mut graph, session, LOSS_SUM)?;
    let mut grads = Vec::new();
    for p in params {
        let name = sum_name(&graph.value(p).name);
        grads.push((p, find(&mut graph, session, &name)?));
    }
    let mut updates = Updates::default();
    emit_updates(session, &mut graph, recipe, loss, &grads, &mut updates)?;
    let (Some(scale), Some(norm)) = (updates.scale, updates.norm) else {
        return Err(Error::Config("nothing to update".into()));
    };
    let request =
        Request { outputs: vec![loss, scale, norm], effects: updates.effects, ..Request::default() };
    let program = session.compile(graph, request)?;
    Ok(Apply { program, loss, scale, norm })
}

/// Forward, loss, gradients and updates of one batch of fixed shapes.
pub struct Supervised {
    pub program: Program,
    pub inputs: Vec<ValueId>,
    pub attached: Attached,
    /// With accumulation, absent: [`Apply`] has them.
    pub scale: Option<ValueId>,
    pub norm: Option<ValueId>,
}

impl Supervised {
    pub fn new(session: &mut Session, recipe: &Recipe, shapes: &Shapes) -> Result<Self> {
        let mut net = Network::new(session, recipe.mode(), shapes, &HashMap::new())?;
        net.fuse(&[], true)?;
        let attached = recipe.loss.attach(&mut net.graph, shapes.target.clone())?;
        let updates = update(session, &mut net.graph, recipe, attached.loss)?;
        let outputs = [Some(attached.loss), Some(attached.logits), updates.scale, updates.norm];
        let request = Request {
            outputs: outputs.into_iter().flatten().collect(),
            effects: updates.effects.into_iter().chain(net.statistics).collect(),
            kinds: updates.kinds,
            ..Request::default()
        };
        let program = session.compile(net.graph, request)?;
        Ok(Supervised { program, inputs: net.inputs, attached, scale: updates.scale, norm: updates.norm })
    }

    /// The index in `plans` of the one for `shapes`, compiled at its first use.
    pub fn cached(
        plans: &mut Vec<(Shapes, Supervised)>,
        session: &mut Session,
        recipe: &Recipe,
        shapes: &Shapes,
    ) -> Result<usize> {
        if let Some(i) = plans.iter().position(|p| p.0 == *shapes) {
            return Ok(i);
        }
        plans.push((shapes.clone(), Supervised::new(session, recipe, shapes)?));
        Ok(plans.len() - 1)
    }

    /// Runs the step on a batch.
    pub fn learn(&self, session: &mut Session, batch: &Batch, at: &At) -> Result<Learned> {
        session.run(&self.program, &feeds(&self.inputs, self.attached.target, batch)?, at.seed)?;
        let read = |v: Option<ValueId>| v.map(|v| session.scalar(&self.program, v)).transpose();
        let loss = session.scalar(&self.program, self.attached.loss)?;
        Ok(Learned {
            loss,
            task: loss,
            features: None,
            logits: session.output(&self.program, self.attached.logits)?.to_tensor(),
            scale: read(self.scale)?,
            norm: read(self.norm)?,
        })
    }
}

/// The network and its loss, forward only.
pub struct Evaluation {
    pub program: Program,
    pub inputs: Vec<ValueId>,
    pub attached: Attached,
}

impl Evaluation {
    pub fn new(session: &mut Session, loss: &Loss, shapes: &Shapes) -> Result<Self> {
        let mut net = Network::new(session, Mode::EVAL, shapes, &HashMap::new())?;
        net.fuse(&[], false)?;
        let attached = loss.attach(&mut net.graph, shapes.target.clone())?;
        let request = Request { outputs: vec![attached.loss, attached.logits], ..Request::default() };
        let program = session.compile(net.graph, request)?;
        Ok(Evaluation { program, inputs: net.inputs, attached })
    }
}

/// Pairs a program's inputs and target with a batch's tensors.
pub fn feeds<'a>(
    inputs: &[ValueId],
    target_value: ValueId,
    batch: &'a Batch,
) -> Result<Vec<(ValueId, View<'a>)>> {
    let mut feeds: Vec<(ValueId, View)> =
        inputs.iter().zip(&batch.inputs).map(|(v, (_, t))| (*v, t.view())).collect();
    feeds.push((target_value, target(batch)?.view()));
    Ok(feeds)
}

/// Per weight: does the loss depend on it?
pub fn reached(session: &Session, loss: &Loss, shapes: &Shapes) -> Result<Vec<bool>> {
    let mut net = Network::new(session, Mode::EVAL, shapes, &HashMap::new())?;
    let attached = loss.attach(&mut net.graph, shapes.target.clone())?;
    let graph = &net.graph;
    let mut seen = vec![false; graph.values.len()];
    let mut stack = vec![attached.loss];
    while let Some(v) = stack.pop() {
        if !std::mem::replace(&mut seen[v.index()], true)
            && let Source::Node(n, _) = graph.value(v).source
        {
            stack.extend(graph.node(n).inputs.iter().flatten());
        }
    }
    Ok(session.model().weights.iter().map(|w| seen[w.value.index()]).collect())
}

/// Appends the sum of all elements of a value: a stand-in for a loss where only reachability matters.
pub fn sum_of(graph: &mut Graph, v: ValueId) -> Result<ValueId> {
    let sum = crate::ops::reduce::SumTo { dims: crate::tensor::Dims::new() };
    Ok(emit(graph, "sum", sum, &[Some(v)], 1)?[0])
}

#[cfg(test)]
pub(crate) mod by_squares;
