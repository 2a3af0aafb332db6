//! `--memory-budget`: a run that keeps to so many bytes, or is refused before its first step.
//!
//! What counts is all that a run holds at its fullest moment: weights that change, statistics, optimizer state, gradients, what
//! lives for a step, the arena of the largest plan, frozen weights that had to be copied, data and batches, and what the process
//! itself takes. The file's mapping is not among it: the system drops its pages and reads them again as it likes.
//!
//! From the cheapest on, until it fits: the usual plan; frozen weights left in the file and updates at once; values computed
//! again rather than kept (the same weights to the last bit); the largest values made and read in pieces; the batch cut into
//! parts whose gradients add up; and, where that is allowed, what is kept in fewer bits ([`Kept`]).

mod fitted;

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::exec::{Options, Session, Usage};
use crate::graph::WeightId;
use crate::import::{Model, Role};
use crate::ops::batch_norm::BatchNormalization;
use crate::plan::Again;
use crate::size::human;
use crate::tensor::Meta;
use crate::train::method::Method;
use crate::train::select::Select;
use crate::train::step::{self, Evaluation, Network, Norm, Recipe, Shapes};

pub use fitted::{Fitted, Kept};

/// Of [`process`]: threads, the model's graph, and what planning leaves behind. Measured for five networks of 280 to 1,000 kernel
/// calls (1.5 to 4 MiB in all), with a little more to be safe.
const PROCESS: usize = 7 << 18;
/// The same for each kernel call.
const PER_KERNEL: usize = 4 << 10;
/// A model's graph, for each node: of a file that was edited there are two. Measured with an encoder's 354 (0.5 MiB beyond
/// what was counted) and a Swin transformer's 4,000 (14 MiB), with a little more to be safe.
const PER_NODE: usize = 4 << 10;
/// Kernel calls that computing again adds, about.
const MORE_KERNELS: usize = 24;
/// Copies of a weight while it is made and written; of one that is widened.
const AT_ONCE: usize = 6;
const WIDENED: usize = 2;
/// Threads that every plan has room for.
const THREADS: usize = 4;
/// The share of additional work above which fewer bits are tried, where they are allowed.
const MUCH: f64 = 0.2;
/// Samples of a channel that the statistics of a part of a batch must at least be over.
const LEAST_SAMPLES: usize = 16;

/// Bytes that a process takes beside what a session holds, for plans of so many kernel calls in all. Files of many nodes, most of
/// which compute shapes, take more to read, and their graphs to hold, than there are calls.
pub fn process(model: &Model, kernels: usize) -> usize {
    PROCESS + (PER_KERNEL * kernels).max(PER_NODE * model.graph.nodes.len())
}

/// The shapes of `n` samples. An input that is fed whole with every batch keeps its own.
pub fn with_batch(shapes: &Shapes, n: usize) -> Shapes {
    let batch = batch_of(shapes);
    let cut = |m: &Meta| {
        let mut m = m.clone();
        if let Some(first) = m.dims.first_mut().filter(|d| **d == batch) {
            *first = n;
        }
        m
    };
    Shapes {
        inputs: shapes.inputs.iter().map(|(name, m)| (name.clone(), cut(m))).collect(),
        target: cut(&shapes.target),
    }
}

/// The number of samples.
pub fn batch_of(shapes: &Shapes) -> usize {
    let whole = shapes.target.dims.first().or(shapes.inputs.first().and_then(|(_, m)| m.dims.first()));
    whole.copied().unwrap_or(1)
}

/// A run to be planned.
pub struct Job<'a> {
    /// With the parts of weights that learn.
    pub session: &'a Session,
    pub recipe: &'a Recipe,
    pub method: &'a dyn Fn() -> Result<Box<dyn Method>>,
    /// What is kept may be so in fewer bits than the session's options say.
    pub allow_half: bool,
    /// Of batches of the full size.
    pub shapes: &'a Shapes,
    pub epochs: usize,
    /// Samples of an epoch, whose last batch may be a smaller one; 0: all batches are whole.
    pub samples: usize,
    /// Samples that are evaluated before and after; 0: none.
    pub held: usize,
    /// Bytes of data.
    pub data: usize,
    /// As it was asked for, for advice.
    pub train: &'a str,
    /// Of all weights that change: made while the result is written.
    pub copies: usize,
    /// Weights are changed once more as they are written.
    pub folded: bool,
    /// The file was edited, and the model that it was of is held as well.
    pub edited: bool,
}

/// What a plan is tried with.
#[derive(Clone, Copy)]
struct Way<'a> {
    recipe: &'a Recipe,
    kept: Kept,
}

/// What a session would hold.
struct Probe {
    usage: Usage,
    again: Again,
    /// Of batches, and of results that are read.
    beside: usize,
    /// While the result is written.
    export: usize,
    evaluated: usize,
}

impl Probe {
    fn fixed(&self) -> usize {
        self.usage.total() - self.usage.arena + self.beside
    }

    fn total(&self) -> usize {
        (self.usage.total() + self.beside).max(self.export)
    }

    /// What takes how much, for people.
    fn holdings(&self) -> String {
        let summed = match self.usage.gradients {
            0 => String::new(),
            bytes => format!("{} of gradients that are summed, ", human(bytes)),
        };
        let written = match self.export == self.total() {
            true => format!("; most, {}, while the result is written", human(self.export)),
            false => String::new(),
        };
        format!(
            "{} of weights that train, {} of optimizer state, {summed}{} of arena, {} of data, batches and the process{written}",
            human(self.usage.weights + self.usage.statistics),
            human(self.usage.optimizer),
            human(self.usage.arena),
            human(self.beside + self.usage.step)
        )
    }
}

impl Job<'_> {
    fn model(&self) -> &Arc<Model> {
        self.session.model()
    }

    fn batch(&self) -> usize {
        batch_of(self.shapes)
    }

    /// Of sessions that only plan. Kernels take scratch memory for each thread: planned for [`THREADS`] at least, so that what
    /// is decided, and with it the result, is the same on fewer.
    fn dry(&self, kept: Kept, arena: Option<usize>) -> Result<Session> {
        let threads = self.session.threads().max(THREADS);
        self.session.alike(Options { dry: true, arena, threads, ..kept.options(self.session.options()) })
    }

    /// As it was asked for.
    fn asked(&self) -> Kept {
        Kept::of(self.session.options())
    }

    /// Plans a run in parts of `micro` samples, in `arena` bytes.
    fn probe(&self, way: Way, micro: usize, arena: Option<usize>) -> Result<Probe> {
        let parts = self.batch() / micro.max(1);
        let recipe = Recipe { accumulate: way.recipe.accumulate * parts.max(1), ..way.recipe.clone() };
        let way = Way { recipe: &recipe, ..way };
        let mut session = self.dry(way.kept, arena)?;
        recipe.prepare(&mut session)?;
        let shapes = with_batch(self.shapes, micro);
        let mut method = (self.method)()?;
        method.begin(self.samples + self.held);
        method.prepare(&mut session, &recipe, &shapes, self.epochs)?;
        if !self.samples.is_multiple_of(micro) {
            let last = with_batch(self.shapes, self.samples % micro);
            method.prepare(&mut session, &recipe, &last, self.epochs)?;
        }
        if recipe.accumulate > 1 {
            step::apply(&mut session, &recipe)?;
        }
        let (mut again, mut kernels, mut read) = (Again::default(), 0, 0);
        for (_, p) in method.programs() {
            kernels += p.plan.steps.len();
            read = read.max(p.plan.outputs.values().map(|(m, _)| m.bytes()).sum());
            again.kernels += p.plan.again.kernels;
            again.chains += p.plan.again.chains;
            again.work = again.work.max(p.plan.again.work);
        }
        drop(method);
        let bytes = |s: &Shapes| s.inputs.iter().map(|i| i.1.bytes()).sum::<usize>() + s.target.bytes();
        // A batch, and what was allocated to make it.
        let mut beside = bytes(&shapes) * 3 / 2 + 3 * read;
        let mut usage = session.usage();
        let mut evaluated = 0;
        if self.held > 0 {
            let limit = arena.filter(|a| *a > 0).unwrap_or(usage.arena).min(usage.arena.max(1 << 24));
            let (n, taken) = self.evaluation(way, arena, limit)?;
            evaluated = n;
            usage.arena = usage.arena.max(taken);
            beside = beside.max(bytes(&with_batch(self.shapes, n)));
        }
        let nodes = if self.edited { session.model().graph.nodes.len() } else { 0 };
        let process = process(session.model(), kernels) + PER_NODE * nodes;
        let changing = session.changing();
        let copies = self.copies * changing.iter().map(|w| self.bytes_of(*w)).sum::<usize>();
        // Those that are not held as the file stores them are written one after the other: what the value is put together
        // of, the value, its bytes, and what the allocator keeps of those before.
        let all = (0..session.model().weights.len() as u32).map(WeightId);
        let written: Vec<WeightId> = if self.folded { all.collect() } else { changing };
        let made =
            written.into_iter().map(|w| match (self.folded, session.held_as_stored(w), session.widened(w)) {
                (false, Some(_), _) => 0,
                (false, _, Some(_)) if self.lies_in_one_piece(w) => 0,
                (false, _, Some(_)) => WIDENED * self.bytes_of(w),
                _ => AT_ONCE * self.bytes_of(w),
            });
        let written = copies + made.max().unwrap_or(0);
        Ok(Probe {
            usage,
            again,
            beside: beside + process + self.data,
            export: usage.weights
                + usage.statistics
                + usage.step
                + usage.frozen
                + written
                + process
                + self.data,
            evaluated,
        })
    }

    /// The largest evaluation batch whose plan takes no more than `limit` bytes of arena, or one sample; and what it takes.
    fn evaluation(&self, way: Way, arena: Option<usize>, limit: usize) -> Result<(usize, usize)> {
        let mut session = self.dry(way.kept, arena.map(|_| limit))?;
        way.recipe.prepare(&mut session)?;
        let loss = way.recipe.loss.unweighted();
        let mut n = super::EVAL_BATCH.min(self.held);
        loop {
            let taken =
                Evaluation::new(&mut session, &loss, &with_batch(self.shapes, n))?.program.plan.arena_bytes;
            if taken <= limit || n == 1 {
                return Ok((n, taken));
            }
            n = n.div_ceil(2);
        }
    }

    /// Do normalisations take their statistics from the batch, so that parts of it have others?
    fn normalises(&self) -> bool {
        let training = |n: &crate::graph::Node| n.op.as_a::<BatchNormalization>().is_some();
        self.recipe.norm == Norm::Batch && self.model().graph.nodes.iter().any(training)
    }

    /// The numbers of samples that parts of a batch may have, from the whole on.
    fn micros(&self) -> Result<Vec<usize>> {
        let batch = self.batch();
        let whole = self.shapes.inputs.iter().all(|(_, m)| m.dims.first() == Some(&batch));
        let mut micros: Vec<usize> = (1..=batch).rev().filter(|m| batch.is_multiple_of(*m)).collect();
        if !whole || self.shapes.target.dims.first() != Some(&batch) || !(self.method)()?.accumulates() {
            micros.truncate(1);
        } else if self.normalises() {
            let per_sample = self.least_places()?;
            micros.retain(|m| *m == batch || m * per_sample >= LEAST_SAMPLES);
        }
        Ok(micros)
    }

    /// Of the normalisations by batch: the fewest places a sample that one takes its statistics over.
    fn least_places(&self) -> Result<usize> {
        let session = self.dry(self.asked(), None)?;
        let net = Network::new(
            &session,
            crate::ops::Mode::TRAIN,
            &with_batch(self.shapes, 1),
            &Default::default(),
        )?;
        let mut least = usize::MAX;
        for n in net.graph.nodes.iter().filter(|n| n.op.as_a::<BatchNormalization>().is_some()) {
            let Some(Some(x)) = n.inputs.first() else { continue };
            let dims = &net.graph.meta(*x)?.dims;
            least = least.min(dims.iter().skip(2).product());
        }
        Ok(least)
    }

    /// The cheapest way that keeps to the budget. Fails, with what would help, where there is none.
    pub fn fit(&self, budget: usize) -> Result<Fitted> {
        // All that plan run on the same threads: what each new one allocates would stay.
        let session = &self.dry(self.asked(), None)?;
        Job { session, ..*self }.search(budget)
    }

    fn search(&self, budget: usize) -> Result<Fitted> {
        let (batch, asked) = (self.batch(), self.asked());
        let way = |kept: Kept| Way { recipe: self.recipe, kept };
        let usual = self.probe(way(asked), batch, None)?;
        let unconstrained = usual.total();
        let fitted = |kept: Kept, micro: usize, arena: Option<usize>, p: &Probe| Fitted {
            budget,
            kept,
            asked,
            bytes: p.total(),
            unconstrained,
            arena,
            micro,
            parts: batch / micro,
            ghost_norm: micro < batch && self.normalises(),
            again: p.again,
            smallest: 0,
            evaluated: p.evaluated,
        };
        let micros = self.micros()?;
        let all = match self.allow_half {
            true => asked.and_less(),
            false => vec![asked],
        };
        // Statistics of parts differ from the batch's by more than what is rounded.
        let whole = if self.normalises() { 1 } else { micros.len() };
        let (first, later) = micros.split_at(whole.min(micros.len()));
        let mut found = (unconstrained <= budget).then(|| fitted(asked, batch, None, &usual));
        for micros in [first, later] {
            let tried = all.iter().flat_map(|kept| micros.iter().map(move |micro| (*kept, *micro)));
            for (kept, micro) in tried {
                let much = found.as_ref().is_some_and(|f| f.again.work > MUCH && all.len() > 1);
                if found.is_some() && !much {
                    break;
                }
                let Some((arena, p)) = self.within(way(kept), micro, budget)? else { continue };
                if !much || p.again.work <= MUCH {
                    found = Some(fitted(kept, micro, Some(arena), &p));
                }
            }
            if found.is_some() {
                break;
            }
        }
        // Of what was asked for, and of what takes the fewest bits (those in between where it matters).
        let mut least: Option<(Kept, usize, Probe)> = None;
        for (i, kept) in all.iter().enumerate() {
            if found.is_none() || i == 0 || i + 1 == all.len() {
                let (micro, p) = self.smallest(way(*kept), &micros)?;
                if least.as_ref().is_none_or(|l| p.total() < l.2.total()) {
                    least = Some((*kept, micro, p));
                }
            }
        }
        let Some((kept, micro, least)) = least else { return Err(Error::Config("nothing to plan".into())) };
        let smallest = least.total();
        if found.is_none() && smallest <= budget {
            found = Some(fitted(kept, micro, Some(0), &least));
        }
        match found {
            Some(f) => Ok(Fitted { smallest: smallest.min(f.bytes), ..f }),
            None => Err(self.refuse(budget, kept, &least, &micros)?),
        }
    }

    /// A plan for parts of `micro` samples that keeps to the budget, and its arena's bound.
    fn within(&self, way: Way, micro: usize, budget: usize) -> Result<Option<(usize, Probe)>> {
        let loose = self.probe(way, micro, Some(usize::MAX))?;
        if loose.total() <= budget {
            return Ok(Some((loose.usage.arena, loose)));
        }
        let Some(arena) = budget.checked_sub(loose.fixed()).filter(|a| *a > 0 && loose.export <= budget)
        else {
            return Ok(None);
        };
        // More kernel calls take a little memory too.
        let mut arena = arena.saturating_sub(MORE_KERNELS * PER_KERNEL).max(1);
        for _ in 0..4 {
            let tight = self.probe(way, micro, Some(arena))?;
            if tight.total() <= budget {
                return Ok(Some((arena, tight)));
            }
            if tight.usage.arena > arena {
                return Ok(None);
            }
            let excess = tight.total() - budget + MORE_KERNELS * PER_KERNEL / 2;
            // (Of what it took: any bound that is not below that finds the same plan.)
            let Some(less) = arena.min(tight.usage.arena).checked_sub(excess).filter(|a| *a > 0) else {
                break;
            };
            arena = less;
        }
        Ok(None)
    }

    /// Of the whole batch and of its smallest parts, the samples of what takes least, and what that is.
    fn smallest(&self, way: Way, micros: &[usize]) -> Result<(usize, Probe)> {
        let whole = (self.batch(), self.probe(way, self.batch(), Some(0))?);
        match micros.last().filter(|m| **m < whole.0) {
            Some(&micro) => {
                let parts = (micro, self.probe(way, micro, Some(0))?);
                Ok(if parts.1.total() < whole.1.total() { parts } else { whole })
            }
            None => Ok(whole),
        }
    }

    /// The error that says what would fit.
    fn refuse(&self, budget: usize, kept: Kept, least: &Probe, micros: &[usize]) -> Result<Error> {
        let mut text = format!(
            "--memory-budget {}: the run takes at least {}; {}",
            human(budget),
            human(least.total()),
            least.holdings()
        );
        // Of whole weights.
        let options = self.session.options().clone();
        let whole = Session::new(self.model().clone(), options)?;
        let fits = Job { session: &whole, ..*self }.fitting(budget, kept, micros)?;
        match fits.is_empty() {
            true => text.push_str("; nothing that freezes weights fits either"),
            false => text.push_str(&format!("; what would fit: {}", fits.join(", or "))),
        }
        let less = self.asked().and_less();
        if let (false, Some(kept), true) = (self.allow_half, less.last(), less.len() > 1) {
            let (_, p) = self.smallest(Way { recipe: self.recipe, kept: *kept }, micros)?;
            if p.total() < least.total() {
                text.push_str(&format!("; with --allow-half {} would do", human(p.total())));
            }
        }
        if self.recipe.clip.is_some() {
            let gradients: usize = self.recipe.params.iter().map(|w| self.bytes_of(*w)).sum();
            text.push_str(&format!(
                "; the bound on the gradient's norm keeps all gradients ({}) until it is known, --clip 0 does not",
                human(gradients)
            ));
        }
        Ok(Error::Config(text))
    }

    fn lies_in_one_piece(&self, w: WeightId) -> bool {
        let model = self.model();
        model.weight(w).bytes_stored(&model.files).is_some()
    }

    fn bytes_of(&self, w: WeightId) -> usize {
        let weight = self.model().weight(w);
        weight.len() * weight.working().size()
    }

    /// The parameters that `select` chooses of those that the loss depends on.
    fn select(&self, select: &str) -> Option<Recipe> {
        let select: Select = select.parse().ok()?;
        let session = self.dry(self.asked(), None).ok()?;
        let reached = step::reached(&session, &self.recipe.loss, self.shapes).ok()?;
        let mut params = select.resolve(self.model()).ok()?;
        params.retain(|w| reached[w.index()]);
        (!params.is_empty()).then(|| Recipe { params, ..self.recipe.clone() })
    }

    fn fits(&self, select: &str, budget: usize, kept: Kept, micros: &[usize]) -> Result<bool> {
        let Some(recipe) = self.select(select) else { return Ok(false) };
        for micro in micros.iter().take(1).chain(micros.iter().skip(1).last()) {
            // Whether anything has to be computed again does not matter here.
            if self.within(Way { recipe: &recipe, kept }, *micro, budget)?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// What may be frozen so that the rest fits: the shortest list of large tensors, as many of the last layers as may train,
    /// and the smaller presets.
    fn fitting(&self, budget: usize, kept: Kept, micros: &[usize]) -> Result<Vec<String>> {
        let mut found = Vec::new();
        let mut largest = self.recipe.params.clone();
        largest.sort_by_key(|w| (std::cmp::Reverse(self.bytes_of(*w)), w.index()));
        if self.train == "all" {
            for n in [1, 2, 3, 5] {
                let names = largest.iter().take(n).map(|w| format!("!{}", self.model().weight(*w).name));
                let select = names.collect::<Vec<_>>().join(",");
                if n < largest.len() && self.fits(&select, budget, kept, micros)? {
                    found.push(format!("--train '{select}' (all but {n})"));
                    break;
                }
            }
        }
        let layers = |w: &&WeightId| matches!(self.model().weight(**w).role, Role::Weight | Role::Embedding);
        let (mut low, mut high) = (0, self.recipe.params.iter().filter(layers).count());
        while low + 1 < high {
            let middle = (low + high) / 2;
            match self.fits(&format!("last:{middle}"), budget, kept, micros)? {
                true => low = middle,
                false => high = middle,
            }
        }
        if low > 0 {
            found.push(format!("--train last:{low}"));
        }
        for preset in ["norm", "bias", "head"] {
            if self.train != preset && self.fits(preset, budget, kept, micros)? {
                found.push(format!("--train {preset}"));
                break;
            }
        }
        Ok(found)
    }
}
