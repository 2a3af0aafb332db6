//! The ICP step: perturb, teach, learn.

use std::collections::HashMap;

use crate::error::{Error, Result};
use crate::exec::Session;
use crate::graph::{self, Graph, StateId, ValueId};
use crate::icp::average::Averages;
use crate::icp::features::{distance, emit, scalar};
use crate::icp::perturb::{Fed, Perturb, batch_of, network, step_state, student_gradients};
use crate::icp::place::above;
use crate::icp::settings::{Reuse, Settings};
use crate::icp::taps::{Taps, find};
use crate::ops::Mode;
use crate::ops::binary::Binary;
use crate::plan::Request;
use crate::tensor::{Meta, Tensor};
use crate::train::data::Batch;
use crate::train::method::{At, Learned, Method, Programs};
use crate::train::step::{Attached, Network, Recipe, Shapes, Supervised, Updates, update_and};

/// ICP as a training method.
#[derive(Default)]
pub struct Icp {
    settings: Settings,
    /// Samples of the training data.
    samples: usize,
    plans: Vec<(Shapes, Plans)>,
    plain: Vec<(Shapes, Supervised)>,
    averages: Option<Averages>,
}

/// What became of a batch's inputs.
#[derive(Debug, Clone)]
pub struct Perturbed {
    /// After K steps, by name: of what is perturbed, the inputs or values within the network.
    pub inputs: Vec<(String, Tensor)>,
    /// The task loss before each of the K steps, where a step computes it.
    pub losses: Vec<f64>,
    /// The same values before each step and after the last, K + 1 times.
    pub path: Vec<Vec<(String, Tensor)>>,
}

/// The plans for batches of one shape; without a feature term the student's alone.
struct Plans {
    taps: Vec<ValueId>,
    teaching: Option<(Perturb, Fed)>,
    student: Student,
}

struct Student {
    fed: Fed,
    attached: Attached,
    total: ValueId,
    features: Option<ValueId>,
    updates: Updates,
}

const ALPHA: &str = "icp.alpha";

impl Icp {
    pub fn new(settings: Settings) -> Self {
        Icp { settings, ..Icp::default() }
    }

    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Warm-up epochs W of `epochs`.
    pub fn warmup_epochs(&self, epochs: usize) -> usize {
        self.settings.warmup_epochs(epochs)
    }

    /// α at a point of the run; `None` while warming up.
    pub fn alpha_at(&self, at: &At) -> Option<f64> {
        self.settings.alpha_at(at)
    }

    fn plans(&mut self, session: &mut Session, recipe: &Recipe, shapes: &Shapes) -> Result<usize> {
        if let Some(i) = self.plans.iter().position(|p| p.0 == *shapes) {
            return Ok(i);
        }
        let settings = &self.settings;
        if !settings.teaches() {
            let student = self.student(session, recipe, shapes, &[], None, &HashMap::new())?;
            self.plans.push((shapes.clone(), Plans { taps: Vec::new(), teaching: None, student }));
            return Ok(self.plans.len() - 1);
        }
        let perturb = Perturb::new(session, recipe, shapes, settings, self.samples)?;
        let taps = self.taps(session, recipe.mode(), shapes)?;
        let mut net = network(session, recipe.mode(), shapes, &perturb.moved)?;
        if let (Some(decay), None) = (settings.ema, &self.averages) {
            self.averages = Some(Averages::new(session, &recipe.params, &net.graph, decay)?);
        }
        if let Some(averages) = &self.averages {
            averages.put_into(&mut net.graph);
        }
        // Layers below what is perturbed are the student's to run; an average's statistics are not the network's.
        let from: Vec<ValueId> = perturb.moved.iter().map(|m| m.spot.value).collect();
        let depends = above(&net.graph, &from);
        let (taps, before): (Vec<ValueId>, Vec<ValueId>) =
            taps.iter().partition(|v| depends[v.index()] && !from.contains(v));
        match before.first() {
            Some(v) if taps.is_empty() || matches!(settings.taps, Taps::Names(_)) => {
                let what = "this tap does not lie behind what is perturbed: name deeper ones with --icp-taps";
                return Err(Error::value(&net.graph.value(*v).name, what));
            }
            _ => {}
        }
        net.keep_statistics(|v| settings.ema.is_none() && depends[v.index()]);
        net.fuse(&taps, false)?;
        let mut pins = HashMap::new();
        for v in &taps {
            let meta = net.graph.meta(*v)?.clone();
            let name = format!("icp.teacher.{}.{}", net.graph.value(*v).name, batch_of(shapes));
            pins.insert(*v, step_state(session, name, &meta));
        }
        let request = Request { effects: net.statistics, pins: pins.clone(), ..Request::default() };
        let program = session.compile(net.graph, request)?;
        let teacher = Fed { program, inputs: net.inputs, attached: None };
        let student = self.student(session, recipe, shapes, &taps, Some(&perturb), &pins)?;
        self.plans.push((shapes.clone(), Plans { taps, teaching: Some((perturb, teacher)), student }));
        Ok(self.plans.len() - 1)
    }

    fn taps(&self, session: &Session, mode: Mode, shapes: &Shapes) -> Result<Vec<ValueId>> {
        let net = Network::new(session, mode, shapes, &HashMap::new())?;
        let (logits, _) = graph::logits(&net.graph, first_output(&net.graph)?);
        find(session.model(), &net.graph, &self.settings.taps, logits)
    }

    /// `L = α·L_task + (1−α)·Σ wᵢ·D(Fᵢ, F'ᵢ)`, or without features `L = α·L_task`, and the updates from its gradient.
    fn student(
        &self,
        session: &mut Session,
        recipe: &Recipe,
        shapes: &Shapes,
        taps: &[ValueId],
        perturb: Option<&Perturb>,
        pins: &HashMap<ValueId, StateId>,
    ) -> Result<Student> {
        let settings = &self.settings;
        let mut net = Network::new(session, recipe.mode(), shapes, &HashMap::new())?;
        let moved = perturb.map_or(&[][..], |p| &p.moved);
        let free = settings.perturbs() && settings.reuse == Reuse::Free;
        let wanted: Vec<ValueId> = moved.iter().filter(|_| free).map(|m| m.spot.value).collect();
        let hidden = moved.iter().filter(|m| free && m.spot.input.is_none()).map(|m| m.spot.value);
        let whole: Vec<ValueId> = taps.iter().copied().chain(hidden).collect();
        net.fuse(&whole, true)?;
        let g = &mut net.graph;
        let attached = recipe.loss.attach(g, shapes.target.clone())?;
        let dtype = g.meta(attached.loss)?.dtype;
        let mut features = None;
        for (v, w) in taps.iter().zip(settings.weights.of(taps.len())) {
            let teacher = session.store().name(pins[v]).to_string();
            let meta = g.meta(*v)?.clone();
            let teacher = g.add_state(teacher, pins[v], meta);
            let d = distance(g, settings.features, *v, teacher)?;
            let w = scalar(g, w, dtype);
            let weighted = emit(g, Binary::Mul, &[d, w])?;
            features = Some(match features {
                Some(sum) => emit(g, Binary::Add, &[sum, weighted])?,
                None => weighted,
            });
        }
        if settings.teaches() && features.is_none() {
            return Err(Error::Config("ICP needs at least one tap".into()));
        }
        let meta = Meta::new(dtype, &[]);
        let alpha = step_state(session, ALPHA.into(), &meta);
        let alpha = g.add_state(ALPHA, alpha, meta);
        let mut total = emit(g, Binary::Mul, &[attached.loss, alpha])?;
        if let Some(features) = features {
            let one = scalar(g, 1.0, dtype);
            let rest = emit(g, Binary::Sub, &[one, alpha])?;
            let taught = emit(g, Binary::Mul, &[features, rest])?;
            total = emit(g, Binary::Add, &[total, taught])?;
        }
        let (mut updates, grads) = update_and(session, g, recipe, total, &wanted)?;
        let mut outputs: Vec<ValueId> =
            [Some(attached.loss), Some(attached.logits), Some(total), features, updates.scale, updates.norm]
                .into_iter()
                .flatten()
                .collect();
        let kept = match free {
            true => student_gradients(g, settings, &attached, moved, &grads)?,
            false => Vec::new(),
        };
        // Asked for, they keep their order of axes: they are cut into rows as they are.
        outputs.extend(kept.iter().map(|k| k.0));
        let request = Request {
            outputs,
            effects: std::mem::take(&mut updates.effects).into_iter().chain(net.statistics).collect(),
            kinds: std::mem::take(&mut updates.kinds),
            pins: kept.into_iter().collect(),
            ..Request::default()
        };
        let program = session.compile(net.graph, request)?;
        let fed = Fed { program, inputs: net.inputs, attached: Some(attached.clone()) };
        Ok(Student { fed, attached, total, features, updates })
    }

    /// Perturbs a batch without any training. What only training brings about is left out: nothing is kept from before.
    pub fn perturbed(&mut self, session: &mut Session, recipe: &Recipe, batch: &Batch) -> Result<Perturbed> {
        let shapes = Shapes::of(batch)?;
        let settings = Settings { reuse: Reuse::Fresh, ..self.settings.clone() };
        if !settings.perturbs() {
            return Err(Error::Config(
                "nothing is perturbed with --icp-features none or --icp-direction none".into(),
            ));
        }
        let p = Perturb::new(session, recipe, &shapes, &settings, 0)?;
        let mut path: Vec<Vec<(String, Tensor)>> = Vec::new();
        let losses = p.run(session, &settings, batch, 0, &mut |session, moved| {
            path.push(moved.iter().map(|m| (m.spot.name.clone(), session.store().tensor(m.x))).collect());
        })?;
        Ok(Perturbed { inputs: path.last().cloned().unwrap_or_default(), losses, path })
    }
}

fn first_output(graph: &Graph) -> Result<ValueId> {
    graph.outputs.first().copied().ok_or_else(|| Error::Config("the model has no output".into()))
}

impl Method for Icp {
    fn begin(&mut self, samples: usize) {
        self.samples = samples;
    }

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
        if let Some(averages) = &mut self.averages {
            averages.follow(session, at.step)?;
        }
        let Some(alpha) = self.alpha_at(at) else {
            let i = Supervised::cached(&mut self.plain, session, recipe, &shapes)?;
            return self.plain[i].1.learn(session, batch, at);
        };
        let i = self.plans(session, recipe, &shapes)?;
        let Plans { teaching, student, .. } = &self.plans[i].1;
        if let Some((perturb, teacher)) = teaching {
            perturb.run(session, &self.settings, batch, at.seed ^ 0x1, &mut |_, _| {})?;
            teacher.run(session, batch, at.seed ^ 0x2)?;
        }
        let state = session.store().find(ALPHA).ok_or_else(|| Error::value(ALPHA, "has no memory"))?;
        let alpha = Tensor::scalar(alpha).cast(session.store().meta(state).dtype);
        session.store_mut().set(state, alpha.bytes());
        student.fed.run(session, batch, at.seed ^ 0x3)?;
        let program = &student.fed.program;
        let read = |v: Option<ValueId>| v.map(|v| session.scalar(program, v)).transpose();
        let learned = Learned {
            loss: session.scalar(program, student.total)?,
            task: session.scalar(program, student.attached.loss)?,
            features: read(student.features)?,
            logits: session.output(program, student.attached.logits)?.to_tensor(),
            scale: read(student.updates.scale)?,
            norm: read(student.updates.norm)?,
        };
        if let (Some((perturb, _)), Reuse::Free) = (teaching, self.settings.reuse) {
            perturb.keep_gradients(session, batch)?;
        }
        Ok(learned)
    }

    fn programs(&self) -> Programs<'_> {
        let mut all: Programs = self.plain.iter().map(|p| ("plain", &p.1.program)).collect();
        for (_, p) in &self.plans {
            if let Some((perturb, teacher)) = &p.teaching {
                all.extend(perturb.programs());
                all.push(("teacher", &teacher.program));
            }
            all.push(("student", &p.student.fed.program));
        }
        all.extend(self.averages.iter().map(|a| ("average", a.program())));
        all
    }

    fn tap_names(&self, session: &Session, shapes: &Shapes) -> Result<Vec<String>> {
        if !self.settings.teaches() {
            return Ok(Vec::new());
        }
        let taps = match self.plans.first() {
            Some((_, plans)) => plans.taps.clone(),
            None => self.taps(session, Mode::EVAL, shapes)?,
        };
        Ok(taps.iter().map(|v| session.model().graph.value(*v).name.clone()).collect())
    }
}
