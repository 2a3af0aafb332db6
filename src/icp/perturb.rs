//! The perturbation of a batch: K steps along the gradient of what is perturbed.

use std::collections::HashMap;

use crate::error::{Error, Result};
use crate::exec::{Program, Purpose, Session};
use crate::graph::{self, Graph, StateId, ValueId};
use crate::icp::features::{at_icp, by_rms, emit, masked, pseudo_labels};
use crate::icp::kept::Kept;
use crate::icp::place::{self, Spot, read_from};
use crate::icp::settings::{Direction, Reuse, Settings, Unit};
use crate::ops::Mode;
use crate::ops::distill::{NoiseAlike, Project};
use crate::ops::unary::{Sign, Unary};
use crate::plan::Request;
use crate::tensor::{Meta, View};
use crate::train::data::Batch;
use crate::train::loss::{Attached, Loss};
use crate::train::loss_scale;
use crate::train::optimizer::{Step, hyper_meta};
use crate::train::step::{Network, Recipe, Shapes, feeds, hyper_state, set_hyper};

/// One perturbed value and its memory.
pub(super) struct Moved {
    pub spot: Spot,
    /// The perturbed elements, which the teacher reads.
    pub x: StateId,
    /// Where they began, for whoever compares.
    clean: Option<StateId>,
    /// The perturber's own memory.
    moments: Vec<StateId>,
    hyper: StateId,
    /// What the samples of the training data keep, and with [`Reuse::Free`] this batch's gradient.
    kept: Option<Kept>,
    pub gradient: Option<StateId>,
}

/// A network's program, and what it is fed with beside the perturbed values.
pub(super) struct Fed {
    pub program: Program,
    pub inputs: Vec<ValueId>,
    pub attached: Option<Attached>,
}

impl Fed {
    pub fn run(&self, session: &mut Session, batch: &Batch, seed: u64) -> Result<()> {
        let fed: Vec<(ValueId, View)> = match &self.attached {
            Some(a) => feeds(&self.inputs, a.target, batch)?,
            None => self.inputs.iter().zip(&batch.inputs).map(|(v, (_, t))| (*v, t.view())).collect(),
        };
        session.run(&self.program, &fed, seed)
    }
}

/// What perturbs batches of one shape.
pub(super) struct Perturb {
    pub moved: Vec<Moved>,
    /// Computes the perturbed values that are no inputs.
    stem: Option<Fed>,
    /// One step, by the gradient of the loss.
    pub step: Option<Fed>,
    /// One step, by a gradient that is there.
    follow: Option<Program>,
    /// Back into the ball and the range.
    bound: Option<Program>,
    noise: Option<Program>,
}

const HYPER: &str = "icp.hyper";

/// Tells states of different batch shapes apart.
pub(super) fn batch_of(shapes: &Shapes) -> String {
    let dims =
        shapes.inputs.iter().map(|(_, m)| m.dims.iter().map(|d| d.to_string()).collect::<Vec<_>>().join("x"));
    dims.collect::<Vec<_>>().join("+")
}

/// A state for one step, found again by name.
pub(super) fn step_state(session: &mut Session, name: String, meta: &Meta) -> StateId {
    let store = session.store_mut();
    store.find(&name).unwrap_or_else(|| store.add(name, meta.clone(), Purpose::Step))
}

/// The network with the perturbed values read from their states.
pub(super) fn network(session: &Session, mode: Mode, shapes: &Shapes, moved: &[Moved]) -> Result<Network> {
    let of_input = |m: &&Moved| m.spot.input.is_some();
    let states: HashMap<String, StateId> =
        moved.iter().filter(of_input).map(|m| (m.spot.name.clone(), m.x)).collect();
    let mut net = Network::new(session, mode, shapes, &states)?;
    for m in moved.iter().filter(|m| m.spot.input.is_none()) {
        read_from(&mut net.graph, m.spot.value, m.x);
    }
    Ok(net)
}

/// Attaches the loss; samples without a label count with what the network takes them for.
fn attach(loss: &Loss, graph: &mut Graph, target: Meta, settings: &Settings) -> Result<Attached> {
    let labels = loss.wants_labels() && !target.dtype.is_float() && target.dims.len() == 1;
    if !settings.unlabelled || !labels {
        return loss.attach(graph, target);
    }
    let output = graph.outputs.first().copied();
    let output = output.ok_or_else(|| Error::Config("the model has no output".into()))?;
    let (scores, _) = graph::logits(graph, output);
    let given = graph.add_input("labels", target.clone());
    let labels = pseudo_labels(graph, scores, given)?;
    let attached = loss.attach(graph, target)?;
    for node in &mut graph.nodes {
        for v in node.inputs.iter_mut().flatten().filter(|v| **v == attached.target) {
            *v = labels;
        }
    }
    graph.inputs.retain(|v| *v != attached.target);
    Ok(Attached { target: given, ..attached })
}

impl Perturb {
    /// `samples`: of the training data, where something is kept of each.
    pub fn new(
        session: &mut Session,
        recipe: &Recipe,
        shapes: &Shapes,
        settings: &Settings,
        samples: usize,
    ) -> Result<Perturb> {
        let plain = Network::new(session, Mode::EVAL, shapes, &HashMap::new())?;
        let output = plain.graph.outputs.first().copied();
        let output = output.ok_or_else(|| Error::Config("the model has no output".into()))?;
        let (logits, _) = graph::logits(&plain.graph, output);
        let spots = place::find(session, recipe, shapes, &plain, logits, &settings.place)?;
        let perturbs = settings.perturbs();
        let reuse = if perturbs { settings.reuse } else { Reuse::Fresh };
        let compared = perturbs
            && (settings.ball.is_some() || settings.direction == Direction::Noise || reuse == Reuse::Warm);
        let mut moved = Vec::new();
        for spot in spots {
            let full = format!("icp.x.{}.{}", spot.name, batch_of(shapes));
            let x = step_state(session, full.clone(), &spot.meta);
            let clean = compared.then(|| step_state(session, format!("{full}.clean"), &spot.meta));
            let gradient =
                (reuse == Reuse::Free).then(|| step_state(session, format!("{full}.gradient"), &spot.meta));
            let kept = match reuse {
                Reuse::Fresh => None,
                _ => Some(Kept::new(session, &spot.name, &spot.meta, samples)?),
            };
            let hyper = hyper_state(session, &format!("{HYPER}.{}", spot.name));
            let moments = match perturbs {
                true => settings.perturber.states_for(session.store_mut(), &full, &spot.meta, Purpose::Step),
                false => Vec::new(),
            };
            moved.push(Moved { spot, x, clean, moments, hyper, kept, gradient });
        }
        let mut p = Perturb { moved, stem: None, step: None, follow: None, bound: None, noise: None };
        p.stem = p.plan_stem(session, recipe, shapes)?;
        if !perturbs {
            return Ok(p);
        }
        match reuse {
            Reuse::Free => p.follow = Some(p.plan_follow(session, settings)?),
            _ => p.step = Some(p.plan_step(session, recipe, shapes, settings)?),
        }
        if settings.ball.is_some() || settings.range.is_some() {
            let op = Project { ball: settings.ball, range: settings.range };
            p.bound = Some(p.each(session, |g, x, clean| {
                let inputs: Vec<ValueId> = [x].into_iter().chain(clean).collect();
                emit(g, op.clone(), &inputs)
            })?);
        }
        if settings.direction == Direction::Noise {
            p.noise = Some(p.each(session, |g, x, clean| {
                let inputs: Vec<ValueId> = [x].into_iter().chain(clean).collect();
                emit(g, NoiseAlike, &inputs)
            })?);
        }
        Ok(p)
    }

    /// The layers below, in the mode that the weights learn in: teacher and student then differ by the perturbation alone.
    fn plan_stem(&self, session: &mut Session, recipe: &Recipe, shapes: &Shapes) -> Result<Option<Fed>> {
        let hidden: Vec<&Moved> = self.moved.iter().filter(|m| m.spot.input.is_none()).collect();
        if hidden.is_empty() {
            return Ok(None);
        }
        let mut net = Network::new(session, recipe.mode(), shapes, &HashMap::new())?;
        let values: Vec<ValueId> = hidden.iter().map(|m| m.spot.value).collect();
        net.fuse(&values, false)?;
        // Asked for, they keep their order of axes: the perturber works on them as they are.
        let pins = hidden.iter().map(|m| (m.spot.value, m.x)).collect();
        let request = Request { outputs: values, pins, ..Request::default() };
        let program = session.compile(net.graph, request)?;
        Ok(Some(Fed { program, inputs: net.inputs, attached: None }))
    }

    fn plan_step(
        &self,
        session: &mut Session,
        recipe: &Recipe,
        shapes: &Shapes,
        settings: &Settings,
    ) -> Result<Fed> {
        let mut net = network(session, Mode::EVAL, shapes, &self.moved)?;
        net.fuse(&[], false)?;
        let g = &mut net.graph;
        let attached = attach(&recipe.loss, g, shapes.target.clone(), settings)?;
        let values: Vec<ValueId> = self.moved.iter().map(|m| m.spot.value).collect();
        let scaled = loss_scale::scaled(session, g, attached.loss)?;
        let grads = graph::grad(g, scaled, &values)?;
        let taken: Vec<ValueId> = values.iter().filter_map(|v| grads.get(v).copied()).collect();
        let scale = loss_scale::undone(session, g, attached.loss, &taken)?;
        let mut effects = Vec::new();
        for m in &self.moved {
            let Some(gradient) = grads.get(&m.spot.value) else {
                return Err(Error::value(&m.spot.name, "the loss does not depend on this value"));
            };
            let gradient = masked(g, settings.which, *gradient, attached.logits, attached.target)?;
            effects.push(m.update(g, m.spot.value, gradient, scale, settings)?);
        }
        let request = Request { outputs: vec![attached.loss], effects, ..Request::default() };
        let program = session.compile(net.graph, request)?;
        Ok(Fed { program, inputs: net.inputs, attached: Some(attached) })
    }

    fn plan_follow(&self, session: &mut Session, settings: &Settings) -> Result<Program> {
        let mut g = Graph::default();
        let mut effects = Vec::new();
        for m in &self.moved {
            let gradient = m.gradient.ok_or_else(|| Error::value(&m.spot.name, "keeps no gradient"))?;
            let meta = &m.spot.meta;
            let x = g.add_state(&m.spot.name, m.x, meta.clone());
            let gradient = g.add_state(format!("{}.gradient", m.spot.name), gradient, meta.clone());
            effects.push(m.update(&mut g, x, gradient, None, settings)?);
        }
        session.compile(g, Request { effects, ..Request::default() })
    }

    /// A program that changes each perturbed value by itself.
    fn each(
        &self,
        session: &mut Session,
        op: impl Fn(&mut Graph, ValueId, Option<ValueId>) -> Result<ValueId>,
    ) -> Result<Program> {
        let mut g = Graph::default();
        let mut effects = Vec::new();
        for m in &self.moved {
            let x = g.add_state(&m.spot.name, m.x, m.spot.meta.clone());
            let clean =
                m.clean.map(|s| g.add_state(format!("{}.clean", m.spot.name), s, m.spot.meta.clone()));
            effects.push(op(&mut g, x, clean)?);
        }
        session.compile(g, Request { effects, ..Request::default() })
    }

    /// Perturbs a batch; the result is in the states `Moved::x`. Returns the loss before each of the K steps that
    /// computed one. `watch` is called before each step and after the last.
    pub fn run(
        &self,
        session: &mut Session,
        settings: &Settings,
        batch: &Batch,
        seed: u64,
        watch: &mut dyn FnMut(&Session, &[Moved]),
    ) -> Result<Vec<f64>> {
        for m in &self.moved {
            if let Some(i) = m.spot.input {
                let Some((_, t)) = batch.inputs.get(i) else {
                    return Err(Error::value(&m.spot.name, "this input is not fed"));
                };
                session.store_mut().set(m.x, t.bytes());
            }
        }
        if let Some(stem) = &self.stem {
            stem.run(session, batch, seed ^ 0x5)?;
        }
        let mut losses = Vec::new();
        if self.step.is_none() && self.follow.is_none() {
            watch(session, &self.moved);
            return Ok(losses);
        }
        let mut rates = Vec::with_capacity(self.moved.len());
        for m in &self.moved {
            rates.push(settings.rate() * m.unit(session, settings));
            m.begin(session, settings, batch)?;
        }
        for k in 0..settings.steps {
            watch(session, &self.moved);
            for (m, rate) in self.moved.iter().zip(&rates) {
                set_hyper(session, m.hyper, *rate, k + 1);
            }
            if let Some(step) = &self.step {
                step.run(session, batch, seed ^ (k as u64) << 48)?;
                if let Some(a) = &step.attached {
                    losses.push(session.scalar(&step.program, a.loss)?);
                }
            }
            for program in [&self.follow, &self.bound].into_iter().flatten() {
                session.run(program, &[], 0)?;
            }
        }
        if settings.reuse == Reuse::Warm {
            for m in &self.moved {
                if let (Some(kept), Some(clean)) = (&m.kept, m.clean) {
                    kept.save_difference(session, batch.samples(), m.x, clean)?;
                }
            }
        }
        if let Some(noise) = &self.noise {
            session.run(noise, &[], seed ^ 0x7)?;
        }
        watch(session, &self.moved);
        Ok(losses)
    }

    /// Keeps the gradients that the student's backward pass left in `Moved::gradient`.
    pub fn keep_gradients(&self, session: &mut Session, batch: &Batch) -> Result<()> {
        for m in &self.moved {
            if let (Some(kept), Some(gradient)) = (&m.kept, m.gradient) {
                kept.save(session, batch.samples(), gradient)?;
            }
        }
        Ok(())
    }

    pub fn programs(&self) -> Vec<(&'static str, &Program)> {
        let fed = [("stem", &self.stem), ("perturb", &self.step)];
        let fed = fed.into_iter().filter_map(|(n, p)| p.as_ref().map(|p| (n, &p.program)));
        let own = [("follow", &self.follow), ("bound", &self.bound), ("noise", &self.noise)];
        fed.chain(own.into_iter().filter_map(|(n, p)| p.as_ref().map(|p| (n, p)))).collect()
    }
}

impl Moved {
    /// The perturber's step on `x` along `gradient` times `scale`.
    fn update(
        &self,
        g: &mut Graph,
        x: ValueId,
        gradient: ValueId,
        scale: Option<ValueId>,
        settings: &Settings,
    ) -> Result<ValueId> {
        let mut gradient = gradient;
        if settings.unit == Unit::Gradient {
            gradient = by_rms(g, gradient)?;
        }
        if settings.sign {
            gradient = emit(g, Unary(Sign {}), &[gradient])?;
        }
        let hyper = g.add_state(HYPER, self.hyper, hyper_meta());
        // A direction has no scale.
        let scale = scale.filter(|_| !settings.sign && settings.unit != Unit::Gradient);
        let step = Step { hyper, scale };
        at_icp(settings.perturber.emit(g, x, gradient, step, &self.moments))
    }

    /// What ε counts in, for the batch in `x`.
    fn unit(&self, session: &Session, settings: &Settings) -> f64 {
        if settings.unit != Unit::Std {
            return 1.0;
        }
        let x = session.store().tensor(self.x).to_f64();
        let n = x.len().max(1) as f64;
        let mean = x.iter().sum::<f64>() / n;
        (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n).sqrt()
    }

    /// Makes ready for the first step: `x` holds the clean elements.
    fn begin(&self, session: &mut Session, settings: &Settings, batch: &Batch) -> Result<()> {
        if let Some(clean) = self.clean {
            session.store_mut().copy(self.x, clean);
        }
        match (&self.kept, settings.reuse, self.gradient) {
            (Some(kept), Reuse::Warm, _) => kept.add(session, batch.samples(), self.x)?,
            (Some(kept), Reuse::Free, Some(g)) => kept.load(session, batch.samples(), g)?,
            _ => {}
        }
        for m in &self.moments {
            session.store_mut().zero(*m);
        }
        Ok(())
    }
}

/// For the student's program: its gradients of the perturbed values, each masked as a step would have it.
pub(super) fn student_gradients(
    graph: &mut Graph,
    settings: &Settings,
    attached: &Attached,
    moved: &[Moved],
    grads: &[Option<ValueId>],
) -> Result<Vec<(ValueId, StateId)>> {
    let mut kept = Vec::new();
    for (m, g) in moved.iter().zip(grads) {
        let (Some(g), Some(state)) = (g, m.gradient) else {
            return Err(Error::value(&m.spot.name, "the loss does not depend on this value"));
        };
        let g = masked(graph, settings.which, *g, attached.logits, attached.target)?;
        kept.push((g, state));
    }
    Ok(kept)
}
