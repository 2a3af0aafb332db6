//! The ICP step: perturb, teach, learn.

use std::collections::HashMap;
use std::f64::consts::PI;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Error, OpError, Result};
use crate::exec::{Program, Purpose, Session};
use crate::graph::{self, Graph, StateId, ValueId};
use crate::icp::taps::{Taps, find};
use crate::ops::binary::Binary;
use crate::ops::loss::Mse;
use crate::ops::{Mode, Op};
use crate::plan::Request;
use crate::tensor::{Meta, Tensor};
use crate::train::data::Batch;
use crate::train::loss_scale;
use crate::train::method::{At, Learned, Method, Programs};
use crate::train::optimizer::{Optimizer, Step};
use crate::train::step::{
    Attached, Network, Recipe, Shapes, Supervised, Updates, feeds, hyper_state, set_hyper, update,
};

/// Why a network of token indices is refused.
pub const NO_FLOATS: &str =
    "ICP perturbs floating-point inputs and the model has none: finetune it with --method supervised";

/// The weight α of the task loss; the feature loss has 1 − α.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Alpha {
    /// `cos(π·(e−W) / (2·(E−W)))` at epoch e of E after W warm-up epochs.
    Schedule,
    /// The same over steps instead of epochs.
    PerStep,
    Fixed(f64),
}

/// How layers weigh in the feature loss, from the first tap to the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Weights {
    Uniform,
    /// `cos(i/(L−1)·π/4)`: 1 at the first tap, √½ at the last.
    Cosine,
    /// The same in inverse order.
    InverseCosine,
}

impl Weights {
    /// The weights of `n` taps.
    pub fn of(self, n: usize) -> Vec<f64> {
        let cosine = |i: usize| if n < 2 { 1.0 } else { (i as f64 / (n - 1) as f64 * PI / 4.0).cos() };
        match self {
            Weights::Uniform => vec![1.0; n],
            Weights::Cosine => (0..n).map(cosine).collect(),
            Weights::InverseCosine => (0..n).rev().map(cosine).collect(),
        }
    }
}

/// The method's options.
#[derive(Debug, Clone)]
pub struct Settings {
    pub perturber: Optimizer,
    /// K: perturbation steps.
    pub steps: usize,
    /// ε: step size of the perturber, in units of the input.
    pub epsilon: f64,
    /// Share of the epochs that train plainly first.
    pub warmup: f64,
    pub alpha: Alpha,
    pub weights: Weights,
    pub taps: Taps,
}

impl Default for Settings {
    /// Adam, K = 5, ε = 0.002, no warm-up, α by epochs, cosine weights, the network's stages.
    fn default() -> Self {
        Settings {
            perturber: Optimizer::adam(0.0, false),
            steps: 5,
            epsilon: 0.002,
            warmup: 0.0,
            alpha: Alpha::Schedule,
            weights: Weights::Cosine,
            taps: Taps::Auto,
        }
    }
}

/// ICP as a training method.
#[derive(Default)]
pub struct Icp {
    settings: Settings,
    plans: Vec<(Shapes, Plans)>,
    plain: Vec<(Shapes, Supervised)>,
}

/// What became of a batch's inputs.
#[derive(Debug, Clone)]
pub struct Perturbed {
    /// After K steps, by name.
    pub inputs: Vec<(String, Tensor)>,
    /// The task loss before each of the K steps.
    pub losses: Vec<f64>,
}

/// The three plans for batches of one shape.
struct Plans {
    perturb: Perturb,
    teacher: Program,
    student: Student,
}

struct Perturb {
    program: Program,
    target: ValueId,
    loss: ValueId,
    /// Perturbed inputs by name, and the perturber's own memory.
    inputs: Vec<(String, StateId)>,
    moments: Vec<StateId>,
    /// Integer inputs, which are fed as they are.
    fed: Vec<(usize, ValueId)>,
}

struct Student {
    program: Program,
    inputs: Vec<ValueId>,
    attached: Attached,
    total: ValueId,
    features: ValueId,
    updates: Updates,
}

const HYPER: &str = "icp.hyper";
const ALPHA: &str = "icp.alpha";

fn at_icp<T>(r: std::result::Result<T, OpError>) -> Result<T> {
    r.map_err(|source| Error::Op { node: "ICP".into(), source })
}

impl Icp {
    pub fn new(settings: Settings) -> Self {
        Icp { settings, ..Icp::default() }
    }

    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Warm-up epochs W of `epochs`.
    pub fn warmup_epochs(&self, epochs: usize) -> usize {
        (self.settings.warmup * epochs as f64).floor() as usize
    }

    /// α at a point of the run; `None` while warming up.
    pub fn alpha_at(&self, at: &At) -> Option<f64> {
        let warm = self.warmup_epochs(at.epochs);
        if at.epoch < warm {
            return None;
        }
        let curve = |done: f64, of: f64| (PI * done / (2.0 * of.max(1.0))).cos();
        Some(match self.settings.alpha {
            Alpha::Fixed(a) => a,
            Alpha::Schedule => curve((at.epoch - warm) as f64, (at.epochs - warm) as f64),
            Alpha::PerStep => {
                let first = at.steps * warm / at.epochs.max(1);
                curve((at.step - first) as f64, (at.steps - first) as f64)
            }
        })
    }

    fn plans(&mut self, session: &mut Session, recipe: &Recipe, shapes: &Shapes) -> Result<usize> {
        if let Some(i) = self.plans.iter().position(|p| p.0 == *shapes) {
            return Ok(i);
        }
        let perturb = self.perturb(session, recipe, shapes)?;
        let taught: HashMap<String, StateId> = perturb.inputs.iter().cloned().collect();
        let mode = recipe.mode();
        let mut net = Network::new(session, mode, shapes, &taught)?;
        let (logits, _) = graph::logits(&net.graph, first_output(&net.graph)?);
        let taps = find(&net.graph, &self.settings.taps, logits)?;
        net.fuse(&taps, false)?;
        let mut pins = HashMap::new();
        for v in &taps {
            let meta = net.graph.meta(*v)?.clone();
            let name = format!("icp.teacher.{}.{}", net.graph.value(*v).name, batch_of(shapes));
            let store = session.store_mut();
            let state = store.find(&name).unwrap_or_else(|| store.add(name, meta, Purpose::Step));
            pins.insert(*v, state);
        }
        let request = Request { effects: net.statistics.clone(), pins: pins.clone(), ..Request::default() };
        let teacher = session.compile(net.graph, request)?;
        let student = self.student(session, recipe, shapes, &taps, &pins)?;
        self.plans.push((shapes.clone(), Plans { perturb, teacher, student }));
        Ok(self.plans.len() - 1)
    }

    /// One perturbation step: x ← x − step(∂ℓ/∂x), in evaluation mode, for every floating-point input.
    fn perturb(&self, session: &mut Session, recipe: &Recipe, shapes: &Shapes) -> Result<Perturb> {
        let mut inputs = Vec::new();
        for (name, meta) in shapes.inputs.iter().filter(|i| i.1.dtype.is_float()) {
            let full = format!("icp.x.{name}.{}", batch_of(shapes));
            let store = session.store_mut();
            let state = store.find(&full).unwrap_or_else(|| store.add(full, meta.clone(), Purpose::Step));
            inputs.push((name.clone(), state));
        }
        if inputs.is_empty() {
            return Err(Error::Config(NO_FLOATS.into()));
        }
        let states: HashMap<String, StateId> = inputs.iter().cloned().collect();
        let mut net = Network::new(session, Mode::EVAL, shapes, &states)?;
        net.fuse(&[], false)?;
        let attached = recipe.loss.attach(&mut net.graph, shapes.target.clone())?;
        let perturbed: Vec<ValueId> = net
            .inputs
            .iter()
            .zip(&shapes.inputs)
            .filter(|(_, (name, _))| states.contains_key(name))
            .map(|(v, _)| *v)
            .collect();
        let scaled = loss_scale::scaled(session, &mut net.graph, attached.loss)?;
        let grads = graph::grad(&mut net.graph, scaled, &perturbed)?;
        let taken: Vec<ValueId> = perturbed.iter().filter_map(|v| grads.get(v).copied()).collect();
        let scale = loss_scale::undone(session, &mut net.graph, attached.loss, &taken)?;
        let hyper = hyper_state(session, HYPER);
        let hyper = net.graph.add_state(HYPER, hyper, crate::train::optimizer::hyper_meta());
        let (mut effects, mut moments) = (Vec::new(), Vec::new());
        for (v, (name, _)) in perturbed.iter().zip(&inputs) {
            let Some(g) = grads.get(v) else {
                return Err(Error::value(name, "the loss does not depend on this input"));
            };
            let meta = net.graph.meta(*v)?.clone();
            let full = format!("icp.x.{name}.{}", batch_of(shapes));
            let own = self.settings.perturber.states_for(session.store_mut(), &full, &meta, Purpose::Step);
            let step = Step { hyper, scale };
            effects.push(at_icp(self.settings.perturber.emit(&mut net.graph, *v, *g, step, &own))?);
            moments.extend(own);
        }
        let fed = net.inputs.iter().copied().enumerate();
        let fed = fed.filter(|(i, _)| !shapes.inputs[*i].1.dtype.is_float()).collect();
        let (target, loss) = (attached.target, attached.loss);
        let request = Request { outputs: vec![loss], effects, ..Request::default() };
        let program = session.compile(net.graph, request)?;
        Ok(Perturb { program, target, loss, inputs, moments, fed })
    }

    /// `L = α·L_task + (1−α)·Σ wᵢ·MSE(Fᵢ, F'ᵢ)` and the updates from its gradient.
    fn student(
        &self,
        session: &mut Session,
        recipe: &Recipe,
        shapes: &Shapes,
        taps: &[ValueId],
        pins: &HashMap<ValueId, StateId>,
    ) -> Result<Student> {
        let mut net = Network::new(session, recipe.mode(), shapes, &HashMap::new())?;
        net.fuse(taps, true)?;
        let g = &mut net.graph;
        let attached = recipe.loss.attach(g, shapes.target.clone())?;
        let dtype = g.meta(attached.loss)?.dtype;
        let mut features = None;
        for (v, w) in taps.iter().zip(self.settings.weights.of(taps.len())) {
            let teacher = session.store().name(pins[v]).to_string();
            let meta = g.meta(*v)?.clone();
            let teacher = g.add_state(teacher, pins[v], meta);
            let mse = emit(g, Mse, &[*v, teacher])?;
            let w = g.add_constant("icp.weight", Tensor::scalar(w).cast(dtype));
            let weighted = emit(g, Binary::Mul, &[mse, w])?;
            features = Some(match features {
                Some(sum) => emit(g, Binary::Add, &[sum, weighted])?,
                None => weighted,
            });
        }
        let Some(features) = features else {
            return Err(Error::Config("ICP needs at least one tap".into()));
        };
        let store = session.store_mut();
        let meta = Meta::new(dtype, &[]);
        let state = store.find(ALPHA).unwrap_or_else(|| store.add(ALPHA, meta.clone(), Purpose::Step));
        let alpha = g.add_state(ALPHA, state, meta);
        let one = g.add_constant("one", Tensor::scalar(1.0).cast(dtype));
        let rest = emit(g, Binary::Sub, &[one, alpha])?;
        let task = emit(g, Binary::Mul, &[attached.loss, alpha])?;
        let taught = emit(g, Binary::Mul, &[features, rest])?;
        let total = emit(g, Binary::Add, &[task, taught])?;
        let mut updates = update(session, g, recipe, total)?;
        let outputs = [
            Some(attached.loss),
            Some(attached.logits),
            Some(total),
            Some(features),
            updates.scale,
            updates.norm,
        ];
        let request = Request {
            outputs: outputs.into_iter().flatten().collect(),
            effects: std::mem::take(&mut updates.effects).into_iter().chain(net.statistics).collect(),
            kinds: std::mem::take(&mut updates.kinds),
            ..Request::default()
        };
        let program = session.compile(net.graph, request)?;
        Ok(Student { program, inputs: net.inputs, attached, total, features, updates })
    }

    /// Perturbs a batch K times; the result is in the states of `Perturb::inputs`. Returns the loss before
    /// each step.
    fn run_perturbation(
        &self,
        session: &mut Session,
        p: &Perturb,
        batch: &Batch,
        seed: u64,
    ) -> Result<Vec<f64>> {
        for (name, state) in &p.inputs {
            let Some((_, t)) = batch.inputs.iter().find(|i| i.0 == *name) else {
                return Err(Error::value(name, "this input is not fed"));
            };
            session.store_mut().set(*state, t.bytes());
        }
        for m in &p.moments {
            session.store_mut().zero(*m);
        }
        let hyper = hyper_state(session, HYPER);
        let mut losses = Vec::with_capacity(self.settings.steps);
        for k in 0..self.settings.steps {
            set_hyper(session, hyper, self.settings.epsilon, k + 1);
            let mut fed = feeds(&[], p.target, batch)?;
            fed.extend(p.fed.iter().map(|(i, v)| (*v, batch.inputs[*i].1.view())));
            session.run(&p.program, &fed, seed ^ (k as u64) << 48)?;
            losses.push(session.scalar(&p.program, p.loss)?);
        }
        Ok(losses)
    }

    /// Perturbs a batch without any training.
    pub fn perturbed(&mut self, session: &mut Session, recipe: &Recipe, batch: &Batch) -> Result<Perturbed> {
        let shapes = Shapes::of(batch)?;
        let p = self.perturb(session, recipe, &shapes)?;
        let losses = self.run_perturbation(session, &p, batch, 0)?;
        let x = p.inputs.iter().map(|(name, s)| (name.clone(), session.store().tensor(*s))).collect();
        Ok(Perturbed { inputs: x, losses })
    }

    /// Names of the values that features are compared at, for batches of the given shapes.
    pub fn tap_names(&self, session: &Session, shapes: &Shapes) -> Result<Vec<String>> {
        let net = Network::new(session, Mode::EVAL, shapes, &HashMap::new())?;
        let (logits, _) = graph::logits(&net.graph, first_output(&net.graph)?);
        let taps = find(&net.graph, &self.settings.taps, logits)?;
        Ok(taps.iter().map(|v| net.graph.value(*v).name.clone()).collect())
    }
}

fn first_output(graph: &Graph) -> Result<ValueId> {
    graph.outputs.first().copied().ok_or_else(|| Error::Config("the model has no output".into()))
}

fn emit(graph: &mut Graph, op: impl Op + 'static, inputs: &[ValueId]) -> Result<ValueId> {
    let inputs: Vec<Option<ValueId>> = inputs.iter().map(|v| Some(*v)).collect();
    Ok(at_icp(graph.emit("icp", Arc::new(op), &inputs, 1))?[0])
}

/// Tells states of different batch shapes apart.
fn batch_of(shapes: &Shapes) -> String {
    let dims =
        shapes.inputs.iter().map(|(_, m)| m.dims.iter().map(|d| d.to_string()).collect::<Vec<_>>().join("x"));
    dims.collect::<Vec<_>>().join("+")
}

impl Method for Icp {
    fn prepare(
        &mut self,
        session: &mut Session,
        recipe: &Recipe,
        shapes: &Shapes,
        epochs: usize,
    ) -> Result<()> {
        let warm = self.warmup_epochs(epochs);
        if warm > 0 {
            Supervised::cached(&mut self.plain, session, recipe, shapes)?;
        }
        if warm < epochs {
            self.plans(session, recipe, shapes)?;
        }
        Ok(())
    }

    fn learn(&mut self, session: &mut Session, recipe: &Recipe, batch: &Batch, at: &At) -> Result<Learned> {
        let shapes = Shapes::of(batch)?;
        let Some(alpha) = self.alpha_at(at) else {
            let i = Supervised::cached(&mut self.plain, session, recipe, &shapes)?;
            return self.plain[i].1.learn(session, batch, at);
        };
        let i = self.plans(session, recipe, &shapes)?;
        let plans = &self.plans[i].1;
        self.run_perturbation(session, &plans.perturb, batch, at.seed ^ 0x1)?;
        let fed: Vec<_> = plans.perturb.fed.iter().map(|(i, v)| (*v, batch.inputs[*i].1.view())).collect();
        session.run(&plans.teacher, &fed, at.seed ^ 0x2)?;
        let student = &plans.student;
        let state = session.store().find(ALPHA).ok_or_else(|| Error::value(ALPHA, "has no memory"))?;
        let alpha = Tensor::scalar(alpha).cast(session.store().meta(state).dtype);
        session.store_mut().set(state, alpha.bytes());
        session.run(
            &student.program,
            &feeds(&student.inputs, student.attached.target, batch)?,
            at.seed ^ 0x3,
        )?;
        let read = |v: Option<ValueId>| v.map(|v| session.scalar(&student.program, v)).transpose();
        Ok(Learned {
            loss: session.scalar(&student.program, student.total)?,
            task: session.scalar(&student.program, student.attached.loss)?,
            features: Some(session.scalar(&student.program, student.features)?),
            logits: session.output(&student.program, student.attached.logits)?.to_tensor(),
            scale: read(student.updates.scale)?,
            norm: read(student.updates.norm)?,
        })
    }

    fn programs(&self) -> Programs<'_> {
        let mut all: Programs = self.plain.iter().map(|p| ("plain", &p.1.program)).collect();
        for (_, p) in &self.plans {
            all.push(("perturb", &p.perturb.program));
            all.push(("teacher", &p.teacher));
            all.push(("student", &p.student.program));
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(epoch: usize, epochs: usize) -> At {
        At { epoch, epochs, step: epoch * 10, steps: epochs * 10, seed: 0 }
    }

    #[test]
    fn alpha_falls_from_one_after_the_warm_up() {
        let icp = Icp::new(Settings { warmup: 0.25, ..Settings::default() });
        assert_eq!(icp.alpha_at(&at(0, 8)), None);
        assert_eq!(icp.alpha_at(&at(1, 8)), None);
        assert_eq!(icp.alpha_at(&at(2, 8)), Some(1.0));
        let half = icp.alpha_at(&at(5, 8)).unwrap();
        assert!((half - (PI / 4.0).cos()).abs() < 1e-12);
        let fixed = Icp::new(Settings { alpha: Alpha::Fixed(0.3), ..Settings::default() });
        assert_eq!(fixed.alpha_at(&at(0, 8)), Some(0.3));
    }

    #[test]
    fn cosine_weights_fall_to_root_half() {
        let w = Weights::Cosine.of(4);
        assert_eq!(w[0], 1.0);
        assert!((w[3] - 0.5f64.sqrt()).abs() < 1e-12);
        assert_eq!(Weights::Cosine.of(1), [1.0]);
        assert_eq!(Weights::InverseCosine.of(2)[1], 1.0);
    }
}
