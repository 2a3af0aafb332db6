//! An adaptation under way: statistics, steps, looks, resets.

use std::time::Instant;

use crate::error::{Error, Result};
use crate::exec::{Options, Session};
use crate::graph::WeightId;
use crate::import::Model;
use crate::ops::Mode;
use crate::train::data::{Dataset, Memory, Samples, epoch_order};
use crate::train::fit::Progress;
use crate::train::loss::Loss;
use crate::train::method::{At, Plain};
use crate::train::select::Select;
use crate::train::step::{self, Norm, Recipe, Shapes};

use super::config::{Config, MethodName, StatisticsName};
use super::scores::{Batches, Opinion, Scorer, weights_meta};
use super::shift;
use super::statistics::{self, AllMoments, Statistics, blended, unrest};
use super::watch::{Look, Snapshot, collapsed};
use super::{Adaptation, Stream, eata, entropy, pseudo, sar};

/// Samples that a look at a fixed set is on, and those a batch that statistics are measured or predictions made on.
const LOOKED_AT: usize = 500;
const MEASURED: usize = 200;

/// What the network is compared with: on the same samples, its re-estimated statistics alone.
struct Base {
    opinion: Opinion,
    snapshot: Snapshot,
    /// Share of the new statistics in the running ones; 0 where they are the source's.
    share: f64,
}

/// A small set that drift is measured on.
struct Reference {
    data: Dataset,
    before: Opinion,
}

/// What an adaptation did.
#[derive(Debug, Default)]
pub(super) struct Log {
    /// The learning rate, before its schedule and resets.
    pub lr: f64,
    pub steps: usize,
    pub skipped: usize,
    /// Batches without a sample that was worth learning from.
    pub passed_over: usize,
    pub resets: usize,
    pub looks: Vec<Look>,
    pub notes: Vec<String>,
    pub samples: usize,
    /// Of the samples of a stream with labels, right when they came.
    pub hits: usize,
    pub labelled: usize,
}

/// Which network an adaptation ends with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Adapted,
    /// Weights as they were, statistics re-estimated.
    Statistics,
    Original,
}

pub(super) struct Run<'a> {
    config: &'a Config,
    pub session: Session,
    pub recipe: Recipe,
    method: Option<Box<dyn Adaptation>>,
    statistics: Statistics,
    source: Vec<(Vec<f64>, Vec<f64>)>,
    scorer: Scorer,
    batches: Batches,
    original: Snapshot,
    good: Option<Snapshot>,
    reference: Option<Reference>,
    /// Updates since the optimizer's memory was zero.
    updates: usize,
    /// Factor on the learning rate: halved at each reset.
    rate: f64,
    pub log: Log,
    started: Instant,
}

impl<'a> Run<'a> {
    pub fn new(
        model: std::sync::Arc<Model>,
        shapes: &Shapes,
        reference: Option<Dataset>,
        config: &'a Config,
    ) -> Result<Self> {
        let options = Options { threads: config.threads, seed: config.seed, ..Options::default() };
        let mut session = Session::new(model, options)?;
        let weights = weights_meta(&session, shapes)?;
        let mut shapes = shapes.clone();
        shapes.target = weights.clone();
        let mut statistics = Statistics::new(&mut session, &shapes)?;
        let mut log = Log::default();
        if config.method == MethodName::Stats && statistics.is_empty() {
            return Err(Error::Config(nothing_to_estimate(session.model())));
        }
        if config.statistics == StatisticsName::Source {
            statistics = Statistics::none();
        } else if statistics.is_empty() {
            log.notes.push(nothing_to_estimate(session.model()));
        }
        // Without statistics that follow, a batch's own are no better than the file's.
        let norm = if statistics.is_empty() { Norm::Frozen } else { config.norm };
        let params = match config.method {
            MethodName::Stats => Vec::new(),
            _ => chosen(&session, config, &shapes)?,
        };
        let recipe = Recipe {
            loss: config.loss(),
            optimizer: config.optimizer(),
            clip: None,
            params,
            norm,
            accumulate: 1,
        };
        session.make_mutable(&recipe.params)?;
        let mode = Mode { batch_statistics: norm == Norm::Batch, ..Mode::TRAIN };
        let method: Option<Box<dyn Adaptation>> = match config.method {
            MethodName::Stats => None,
            MethodName::Tent | MethodName::Infomax => Some(Box::new(entropy::Every::<Plain>::default())),
            MethodName::Eata => {
                Some(Box::new(eata::Eata::new(mode, config.entropy_margin, config.redundancy)))
            }
            MethodName::Sar => Some(Box::new(sar::Sar::new(
                mode,
                config.entropy_margin,
                config.sar_rho,
                config.sar_recovery,
            ))),
            MethodName::Pseudo => Some(Box::new(pseudo::Pseudo::new(config.confidence, Plain::default()))),
            MethodName::Icp => Some(Box::new(entropy::Every::new(config.icp()))),
            MethodName::IcpPseudo => Some(Box::new(pseudo::Pseudo::new(config.confidence, config.icp()))),
        };
        let original = Snapshot::take(&session);
        let source = statistics.values(&session);
        let mut run = Run {
            config,
            recipe,
            method,
            statistics,
            source,
            scorer: Scorer::new(Mode::EVAL),
            batches: Batches::new(weights.dtype),
            original,
            good: None,
            reference: None,
            updates: 0,
            rate: 1.0,
            log,
            started: Instant::now(),
            session,
        };
        if let Some(data) = reference {
            let (data, _) = data.without_target();
            let all: Vec<usize> = (0..data.len()).collect();
            let before = run.opinion(&data, &all)?;
            run.reference = Some(Reference { data, before });
        }
        Ok(run)
    }

    fn opinion(&mut self, samples: &dyn Samples, picks: &[usize]) -> Result<Opinion> {
        self.scorer.over(&mut self.session, samples, picks, MEASURED, &mut self.batches)
    }

    /// Measures statistics with the present weights and makes them the running ones, mixed with the source's.
    fn estimate(&mut self, samples: &dyn Samples, picks: &[usize], share: f64) -> Result<()> {
        if share == 0.0 || self.statistics.is_empty() {
            return Ok(());
        }
        let size = MEASURED;
        let moments = self.statistics.over(&mut self.session, samples, picks, size, &mut self.batches)?;
        let values = blended(&moments, &self.source, share);
        self.statistics.put(&mut self.session, &values)
    }

    /// The share that the statistics of so many samples have beside the source's.
    fn share_of(&self, samples: usize) -> f64 {
        samples as f64 / (samples as f64 + self.config.source_weight).max(1.0)
    }

    /// What adaptation on these samples is compared with. Leaves the session as it was.
    fn base(&mut self, samples: &dyn Samples, looked: &[usize], measured: &[usize]) -> Result<Base> {
        let present = Snapshot::take(&self.session);
        self.original.restore_values(&mut self.session);
        let original = self.opinion(samples, looked)?;
        let mut share = if self.statistics.is_empty() { 0.0 } else { self.share_of(measured.len()) };
        let mut opinion = original.clone();
        if share > 0.0 {
            self.estimate(samples, measured, share)?;
            opinion = self.opinion(samples, looked)?;
            if let Some(why) = self.config.guard.then(|| shift::labels(&original, &opinion)).flatten() {
                self.note(format!("statistics stay the source's: {why}"));
                self.original.restore_values(&mut self.session);
                (share, opinion) = (0.0, original.clone());
            }
        }
        let snapshot = Snapshot::take(&self.session);
        present.restore_values(&mut self.session);
        Ok(Base { opinion, snapshot, share })
    }

    fn note(&mut self, what: String) {
        if !self.log.notes.contains(&what) {
            self.log.notes.push(what);
        }
    }

    /// Looks at the network as it would be exported: with statistics of its own weights.
    fn look(
        &mut self,
        samples: &dyn Samples,
        looked: &[usize],
        measured: &[usize],
        base: &Base,
    ) -> Result<Look> {
        if self.config.statistics == StatisticsName::Exact {
            self.estimate(samples, measured, base.share)?;
        }
        let now = self.opinion(samples, looked)?;
        let reference = self.lost_on_reference()?;
        let look = Look {
            step: self.log.steps,
            health: now.health(),
            agreement: now.agreement(&base.opinion),
            lost: base.opinion.lost_by(&now),
            reference: reference.map(|r| r.0),
            collapsed: collapsed(self.config, self.rate, &base.opinion, &now, reference),
        };
        self.log.looks.push(look.clone());
        Ok(look)
    }

    /// What predictions on the reference set lose, with these weights and the source's statistics, beside the original's, and
    /// the original's mean confidence there.
    fn lost_on_reference(&mut self) -> Result<Option<(f64, f64)>> {
        let Some(reference) = self.reference.take() else { return Ok(None) };
        let running = self.statistics.values(&self.session);
        self.statistics.put(&mut self.session, &self.source)?;
        let all: Vec<usize> = (0..reference.data.len()).collect();
        let now = self.opinion(&reference.data, &all);
        self.statistics.put(&mut self.session, &running)?;
        let found = (reference.before.lost_by(&now?), reference.before.health().confidence);
        self.reference = Some(reference);
        Ok(Some(found))
    }

    /// Back to the last good state.
    fn reset(&mut self, to: &Snapshot, why: &str) {
        self.note(format!("reset at step {}: {why}", self.log.steps));
        to.restore(&mut self.session);
        self.log.resets += 1;
        self.updates = 0;
        self.rate *= 0.5;
        if let Some(m) = &mut self.method {
            m.reset();
        }
    }

    /// Are the samples such that something can be learned from them? Where their statistics mislead, so do they.
    fn trusts(&self, base: &Base) -> bool {
        self.statistics.is_empty() || base.share > 0.0 || !self.config.guard
    }

    /// Has learning ended because of too many resets?
    fn given_up(&self) -> bool {
        self.config.guard && self.log.resets > self.config.resets
    }

    /// One update on the samples `picks`. Running statistics stay as they are.
    fn learn(&mut self, samples: &dyn Samples, picks: &[usize], lr: f64, at: &At) -> Result<f64> {
        let Some(method) = &mut self.method else { return Ok(0.0) };
        let running = self.statistics.values(&self.session);
        step::set_step(&mut self.session, lr * self.rate, self.updates + 1);
        let batch = self.batches.of(samples, picks)?;
        let learned = method.learn(&mut self.session, &self.recipe, batch, at)?;
        self.statistics.put(&mut self.session, &running)?;
        self.log.steps += 1;
        match learned {
            None => self.log.passed_over += 1,
            Some(l) if l.scale.is_some_and(|s| !s.is_finite()) => self.log.skipped += 1,
            Some(l) => {
                self.updates += 1;
                return Ok(l.loss);
            }
        }
        Ok(f64::NAN)
    }

    /// Several passes over a fixed set.
    pub fn episodes(&mut self, data: &Dataset, observe: &mut dyn FnMut(&Progress)) -> Result<End> {
        let n = data.len();
        let order = epoch_order(n, self.config.seed, u64::MAX, true);
        let looked: Vec<usize> = order[..n.min(LOOKED_AT)].to_vec();
        self.log.samples = n;
        let base = self.base(data, &looked, &order)?;
        base.snapshot.restore(&mut self.session);
        if self.method.is_some() && self.trusts(&base) {
            self.passes(data, &looked, &order, &base, observe)?;
        }
        self.end(data, &looked, &order, &base)
    }

    fn passes(
        &mut self,
        data: &Dataset,
        looked: &[usize],
        all: &[usize],
        base: &Base,
        observe: &mut dyn FnMut(&Progress),
    ) -> Result<()> {
        let config = self.config;
        let n = data.len();
        let per_epoch = statistics::even(all, config.batch).count();
        let steps = per_epoch * config.epochs * config.steps;
        let (schedule, rate) = (config.schedule(), config.rate(base.opinion.health().confidence));
        self.log.lr = rate;
        let mut since = 0;
        for epoch in 0..config.epochs {
            let order = epoch_order(n, config.seed, epoch as u64, true);
            for picks in statistics::even(&order, config.batch) {
                for _ in 0..config.steps {
                    let step = self.log.steps;
                    let lr = rate * schedule.factor(step, steps);
                    let at =
                        At { epoch, epochs: config.epochs, step, steps, seed: seed_of(config.seed, step) };
                    let loss = self.learn(data, picks, lr, &at)?;
                    self.report(loss, lr, &at, picks.len(), observe);
                }
                since += 1;
                let last = self.log.steps == steps;
                if config.guard && (since >= config.check_every || last) {
                    since = 0;
                    self.check(data, looked, looked, base)?;
                    if self.given_up() {
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }

    /// Keeps the state if it is sound, else goes back to the last one that was.
    fn check(
        &mut self,
        samples: &dyn Samples,
        looked: &[usize],
        measured: &[usize],
        base: &Base,
    ) -> Result<()> {
        let mut look = self.look(samples, looked, measured, base)?;
        if look.collapsed.is_none() && self.method.as_ref().is_some_and(|m| m.collapsed()) {
            look.collapsed = Some("the average entropy fell below --sar-recovery".into());
        }
        match look.collapsed {
            None => self.good = Some(Snapshot::take(&self.session)),
            Some(why) => {
                let to = self.good.clone().unwrap_or_else(|| base.snapshot.clone());
                self.reset(&to, &why);
            }
        }
        Ok(())
    }

    fn report(&self, loss: f64, lr: f64, at: &At, samples: usize, observe: &mut dyn FnMut(&Progress)) {
        let seen = (samples * self.log.steps) as f64;
        observe(&Progress {
            step: at.step + 1,
            steps: at.steps,
            epoch: at.epoch,
            epochs: at.epochs,
            loss,
            features: None,
            accuracy: None,
            lr,
            skipped: loss.is_nan(),
            samples_per_second: seen / self.started.elapsed().as_secs_f64().max(1e-9),
        });
    }

    /// One pass, batch by batch. The samples kept are returned.
    pub fn follow(
        &mut self,
        stream: &mut dyn Stream,
        observe: &mut dyn FnMut(&Progress),
    ) -> Result<(End, Memory)> {
        let config = self.config;
        let mut memory = Memory::new(config.memory, config.seed);
        let mut recent: Vec<(usize, AllMoments)> = Vec::new();
        let (mut base, mut since): (Option<Base>, usize) = (None, 0);
        while let Some(data) = stream.next()? {
            let (data, labels) = data.without_target();
            let all: Vec<usize> = (0..data.len()).collect();
            let batch = self.batches.of(&data, &all)?;
            let scores = self.scorer.run(&mut self.session, batch)?;
            let classes = scores.classes();
            if let Some(labels) = labels.and_then(|l| l.get::<i64>().ok().map(<[i64]>::to_vec)) {
                let right = labels.iter().zip(&classes).filter(|(l, c)| **l == **c as i64).count();
                self.log.hits += right;
                self.log.labelled += labels.len().min(classes.len());
            }
            let batch = self.batches.of(&data, &all)?;
            memory.offer(batch, &classes)?;
            self.log.samples += all.len();
            if !self.statistics.is_empty() && all.len() > 1 {
                let batch = self.batches.of(&data, &all)?;
                let moments = self.statistics.measure(&mut self.session, batch)?;
                if config.statistics == StatisticsName::Moving {
                    let running = self.statistics.values(&self.session);
                    let values = blended(&moments, &running, config.momentum);
                    self.statistics.put(&mut self.session, &values)?;
                }
                recent.push((all.len(), moments));
                if recent.len() > RECENT {
                    recent.remove(0);
                }
            }
            let trusted = base.as_ref().filter(|b| self.trusts(b)).map(|b| b.opinion.health().confidence);
            if let Some(confidence) = trusted.filter(|_| self.method.is_some() && !self.given_up()) {
                let rate = config.rate(confidence);
                self.log.lr = rate;
                for _ in 0..config.steps {
                    let step = self.log.steps;
                    let at =
                        At { epoch: 0, epochs: 1, step, steps: step + 1, seed: seed_of(config.seed, step) };
                    let picks = memory.draw(all.len().max(1), step as u64);
                    let loss = self.learn(&memory, &picks, rate, &at)?;
                    self.report(loss, rate, &at, picks.len(), observe);
                }
            }
            since += 1;
            let due = if base.is_none() { config.check_every.min(FIRST_LOOK) } else { config.check_every };
            if since >= due {
                since = 0;
                base = Some(self.renew(&memory, base.is_none(), unrest(&recent))?);
            }
        }
        if memory.is_empty() {
            return Err(Error::Data("the stream held no samples".into()));
        }
        let all: Vec<usize> = (0..memory.len()).collect();
        let base = match base {
            Some(base) if since == 0 => base,
            known => self.renew(&memory, known.is_none(), unrest(&recent))?,
        };
        let end = self.end(&memory, &all, &all, &base)?;
        Ok((end, memory))
    }

    /// A look at a stream: what it is compared with follows the samples that are kept.
    fn renew(&mut self, memory: &Memory, first: bool, unrest: f64) -> Result<Base> {
        let all: Vec<usize> = (0..memory.len()).collect();
        if unrest > RESTLESS {
            self.note(format!(
                "the stream comes in runs of alike samples (batches differ {unrest:.1} times as much as in random order): \
                 what is learned from is drawn from {} samples kept of all predicted classes",
                memory.len()
            ));
        }
        let base = self.base(memory, &all, &all)?;
        match first {
            true if self.config.statistics == StatisticsName::Moving => {}
            true => base.snapshot.restore(&mut self.session),
            false if self.config.guard => self.check(memory, &all, &all, &base)?,
            false => {}
        }
        Ok(base)
    }

    /// Settles which network it is: the adapted one where it is sound, else the last that was, else re-estimated
    /// statistics alone, else the original.
    fn end(
        &mut self,
        samples: &dyn Samples,
        looked: &[usize],
        measured: &[usize],
        base: &Base,
    ) -> Result<End> {
        if !self.trusts(base) {
            self.original.restore(&mut self.session);
            return Ok(End::Original);
        }
        let moving = self.config.statistics == StatisticsName::Moving;
        let mut candidates = Vec::new();
        if self.updates > 0 || self.good.is_some() || moving {
            candidates.push(Snapshot::take(&self.session));
            candidates.extend(self.good.clone());
        }
        for candidate in candidates {
            candidate.restore(&mut self.session);
            match self.look(samples, looked, measured, base)?.collapsed.filter(|_| self.config.guard) {
                None => return Ok(self.ended()),
                Some(why) => self.note(format!("not kept: {why}")),
            }
        }
        base.snapshot.restore(&mut self.session);
        Ok(self.ended())
    }

    /// What the present network is, beside the original.
    fn ended(&self) -> End {
        match Snapshot::take(&self.session).changed(&self.original, &self.session) {
            (true, _) => End::Adapted,
            (false, true) => End::Statistics,
            (false, false) => End::Original,
        }
    }
}

/// Batches of a stream that its restlessness is measured over, and how much of it is too much.
const RECENT: usize = 16;
/// Batches of a stream before anything is estimated.
const FIRST_LOOK: usize = 4;
const RESTLESS: f64 = 3.0;

/// Seed of one step's random numbers.
fn seed_of(seed: u64, step: usize) -> u64 {
    let x = seed ^ (step as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (x ^ (x >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9) << 2
}

fn nothing_to_estimate(model: &Model) -> String {
    let folded = crate::inspect::folded(model).len();
    let why = match folded {
        0 => "the network has no BatchNormalization with running statistics (LayerNormalization and the like take theirs \
              from each sample)"
            .to_string(),
        n => format!("{n} normalisation(s) were folded into convolutions by the exporter"),
    };
    format!("there are no running statistics to re-estimate: {why}")
}

/// The parameters that train, of those that the scores depend on.
fn chosen(session: &Session, config: &Config, shapes: &Shapes) -> Result<Vec<WeightId>> {
    let select: Select = config.trained().parse().map_err(|e| Error::Config(format!("--train {e}")))?;
    let reached = step::reached(session, &Loss::Entropy { diversity: 0.0 }, shapes)?;
    let chosen = select.resolve(session.model()).map_err(|e| match config.train {
        Some(_) => e,
        None => {
            Error::Config(format!("--method {:?} trains the scales of normalisations: {e}", config.method))
        }
    })?;
    let chosen: Vec<WeightId> = chosen.into_iter().filter(|w| reached[w.index()]).collect();
    match chosen.is_empty() {
        true => Err(Error::Config("the scores depend on none of the chosen parameters".into())),
        false => Ok(chosen),
    }
}
