//! A model being run and trained: its weights, its persistent state, one arena for all plans.

mod weights;

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;

use crate::error::{Error, Result};
use crate::exec::awake::awake;
use crate::exec::parts::{self, Held};
use crate::exec::pieces;
use crate::exec::precision::{OptimizerState, Precision};
use crate::exec::run::{self, Memory, Profile};
use crate::exec::store::{Purpose, Store};
use crate::graph::{self, Conversions, Graph, NodeId, PinnedLayouts, Source, StateId, ValueId, WeightId};
use crate::import::{Model, Role};
use crate::kernels::isa::multiplies_pairs;
use crate::ops::eval;
use crate::ops::fold::FoldNorm;
use crate::plan::{self, Constant, Location, Plan, Request};
use crate::tensor::{ALIGN, Buffer, DType, Meta, Tensor, View};

/// Frozen constants of at most this many elements take part in constant folding.
const FOLDED_WEIGHT: usize = 4096;

/// How a session computes.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Threads to compute with; 0: one per core. Results do not depend on it.
    pub threads: usize,
    /// Of every random number.
    pub seed: u64,
    /// Every value in memory of its own (for tests; results do not depend on it). The environment variable
    /// `RETUNE_MEMORY=separate` asks for the same.
    pub no_reuse: bool,
    /// Every tensor in ONNX's own order (for tests; results differ by rounding). The environment variable
    /// `RETUNE_LAYOUT=first` asks for the same.
    pub channels_first: bool,
    /// Half precision is converted to and from by operators of their own rather than by those that read and make it
    /// (for tests; results do not depend on it). The environment variable `RETUNE_HALF=apart` asks for the same.
    pub conversions_apart: bool,
    /// What is kept of a forward pass for its gradient; frozen weights of the file that are of that type are read as
    /// they are.
    ///
    /// With bf16, products and convolutions multiply pairs of it where the processor has an instruction for that, and is faster by it; the
    /// environment variable `RETUNE_PRODUCTS=pairs` asks for it where it is not (results differ by rounding).
    pub precision: Precision,
    /// Parameters are kept in the half type that `precision` is, without a copy in `f32`, but for those of fewer than
    /// [`SMALL_PARAMETER`] elements.
    pub master_free: bool,
    pub optimizer_state: OptimizerState,
    /// Bytes of arena to keep to: values are computed again rather than kept where a plan would take more, weights follow
    /// their gradients at once ([`graph::update_early`]), and frozen weights stay in the file, of which each is loaded where
    /// it is read. A program that still takes more is compiled all the same: [`Session::usage`] tells.
    pub arena: Option<usize>,
    /// For plans alone: states and the arena take no memory, and nothing can be run.
    pub dry: bool,
}

/// Elements from which a parameter may be kept in half precision.
pub const SMALL_PARAMETER: usize = 1024;

/// The bytes of a constant operand.
#[derive(Debug, Clone)]
pub(super) enum Frozen {
    Owned(Arc<Tensor>),
    /// A frozen weight where it lies in the mapped file.
    Mapped(Bytes),
}

impl Frozen {
    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Frozen::Owned(t) => t.bytes(),
            Frozen::Mapped(b) => b,
        }
    }
}

/// A graph that was planned: what a session runs.
#[derive(Debug)]
pub struct Program {
    id: usize,
    pub graph: Graph,
    pub plan: Plan,
    constants: Vec<Frozen>,
}

impl Program {
    /// Multiply-adds of matrix products and convolutions, a run.
    pub fn multiply_adds(&self) -> usize {
        let metas = |node: &graph::Node| -> Vec<Option<Meta>> {
            node.inputs.iter().map(|v| v.and_then(|v| self.graph.value(v).meta.clone())).collect()
        };
        let work = |step: &plan::Step| {
            let metas = metas(self.graph.node(step.node));
            step.op.multiply_adds(&metas.iter().map(Option::as_ref).collect::<Vec<_>>())
        };
        self.plan.steps.iter().map(work).sum()
    }
}

/// The inputs of a `FoldNorm`, and the bits of its ε.
type Fold = (Vec<Option<ValueId>>, u64);

/// Memory a session holds or maps, in bytes.
#[derive(Debug, Clone, Copy, Default, serde::Serialize)]
pub struct Usage {
    pub weights: usize,
    pub statistics: usize,
    pub optimizer: usize,
    pub gradients: usize,
    pub step: usize,
    /// Kept per training sample.
    pub samples: usize,
    pub arena: usize,
    /// Frozen weights copied to the heap because they are unaligned, of another type, or folded.
    pub frozen: usize,
}

impl Usage {
    pub fn total(&self) -> usize {
        self.weights
            + self.statistics
            + self.optimizer
            + self.gradients
            + self.step
            + self.samples
            + self.arena
            + self.frozen
    }
}

/// A model with the memory to run and train it.
pub struct Session {
    model: Arc<Model>,
    options: Options,
    pool: Arc<rayon::ThreadPool>,
    store: Store,
    states: Vec<Option<StateId>>,
    /// The weights of which only a part learns; they have no state of their own.
    parts: Vec<Held>,
    frozen: HashMap<WeightId, Frozen>,
    /// What `FoldNorm` makes of weights that do not change.
    folded: HashMap<Fold, Vec<Arc<Tensor>>>,
    pinned: PinnedLayouts,
    arena: Buffer,
    /// Bytes that the largest program's arena takes.
    arena_bytes: usize,
    programs: usize,
    /// What the next programs keep of a forward pass is in `f32`, whatever the session's precision.
    exact: bool,
    profile: bool,
    profiles: HashMap<usize, Profile>,
}

impl Session {
    /// A session in which every weight is frozen.
    pub fn new(model: Arc<Model>, options: Options) -> Result<Self> {
        let threads = match options.threads {
            0 => std::thread::available_parallelism().map_or(1, |n| n.get()),
            n => n,
        };
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("retune-{i}"))
            .build()
            .map_err(|e| Error::Config(format!("{threads} threads cannot be started: {e}")))?;
        Ok(Session::on(Arc::new(pool), model, options))
    }

    fn on(pool: Arc<rayon::ThreadPool>, model: Arc<Model>, options: Options) -> Session {
        Session {
            states: vec![None; model.weights.len()],
            store: if options.dry { Store::dry() } else { Store::default() },
            model,
            options,
            pool,
            parts: Vec::new(),
            frozen: HashMap::new(),
            folded: HashMap::new(),
            pinned: PinnedLayouts::new(),
            arena: Buffer::default(),
            arena_bytes: 0,
            programs: 0,
            exact: false,
            profile: false,
            profiles: HashMap::new(),
        }
    }

    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Runs something on the session's threads.
    pub fn install<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        self.pool.install(f)
    }

    pub fn store(&self) -> &Store {
        &self.store
    }

    pub fn store_mut(&mut self) -> &mut Store {
        &mut self.store
    }

    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Whether programs compiled from now on compute as the exported file does, in `f32` throughout.
    pub fn set_exact(&mut self, exact: bool) {
        self.exact = exact;
    }

    /// What programs compiled now keep of a forward pass.
    pub fn precision(&self) -> Precision {
        if self.exact { Precision::F32 } else { self.options.precision }
    }

    /// A session like this one, with the same parts, and the weights of the file.
    pub fn another(&self) -> Result<Session> {
        self.alike(self.options.clone())
    }

    /// A session of the same model and parts, with other options; on the same threads, where it is to have as many.
    pub fn alike(&self, options: Options) -> Result<Session> {
        let model = self.model.clone();
        let as_many = options.threads == self.options.threads || options.threads == self.threads();
        let mut session = match as_many {
            true => Session::on(self.pool.clone(), model, options),
            false => Session::new(model, options)?,
        };
        for p in &self.parts {
            session.make_part(p.weight, &p.part, p.seed)?;
        }
        Ok(session)
    }

    /// The type in which a state, or a weight that is read as the file has it, is kept.
    fn stored(&self, source: &Source) -> Option<DType> {
        match source {
            Source::State(s) => Some(self.store.meta(*s).dtype),
            Source::Weight(w) => {
                let weight = self.model.weight(*w);
                let half = self.options.precision.half().filter(|half| *half == weight.dtype)?;
                weight.view_stored(&self.model.files).map(|_| half)
            }
            _ => None,
        }
    }

    /// The model's graph, with weights bound to their states (or frozen).
    pub fn graph(&self) -> Result<Graph> {
        let mut graph = self.model.graph.clone();
        for (i, w) in self.model.weights.iter().enumerate() {
            let meta = Meta::new(w.working(), &w.dims);
            let value = graph.value_mut(w.value);
            if let Some(s) = self.states[i] {
                value.source = Source::State(s);
                value.meta = Some(meta);
            } else if w.role == Role::Constant && w.len() <= FOLDED_WEIGHT {
                let t = Arc::new(w.load(&self.model.files)?);
                value.meta = Some(Meta { value: Some(t.clone()), ..meta });
                value.source = Source::Constant(t);
            } else {
                value.source = Source::Weight(WeightId(i as u32));
                value.meta = Some(meta);
            }
        }
        parts::put_together(&mut graph, &self.model, &self.parts, &self.store);
        Ok(graph)
    }

    /// Plans a graph whose shapes are inferred, and makes room for it.
    pub fn compile(&mut self, mut graph: Graph, mut request: Request) -> Result<Program> {
        graph::fuse_sums(&mut graph, &request);
        graph::gather_statistics(&mut graph);
        match self.options.arena {
            None => self.fold_frozen(&mut graph)?,
            Some(_) => _ = graph::update_early(&mut graph),
        }
        let asked = |name: &str, mode: &str| std::env::var(name).is_ok_and(|m| m == mode);
        request.no_reuse |= self.options.no_reuse || asked("RETUNE_MEMORY", "separate");
        if !self.options.channels_first && !asked("RETUNE_LAYOUT", "first") {
            graph::layout(&mut graph, &mut request, &mut self.pinned)?;
        }
        graph::join_normalisations(&mut graph, &request);
        if self.precision().half().is_none() {
            graph::join_expansions(&mut graph, &request);
            graph::join_products(&mut graph, &request);
            // (Within a budget, parts of batches take turns, and what is cheap is computed again.)
            if self.options.arena.is_none() {
                graph::join_gated_norms(&mut graph, &request);
            }
        }
        graph::keep_masks(&mut graph, &request)?;
        let conversions = match () {
            _ if self.options.conversions_apart || asked("RETUNE_HALF", "apart") => Conversions::Apart,
            _ if self.options.arena.is_some() => Conversions::Reads,
            _ => Conversions::Kernels,
        };
        if self.precision() == Precision::Bf16 && multiplies_pairs() {
            graph::multiply_pairs(&mut graph);
        }
        let to = self.precision().half();
        let half = graph::halve(&mut graph, &request, to, conversions, &|s| self.stored(s))?;
        if self.options.arena.is_some() {
            super::frozen::load_where_read(&self.model, &mut graph, &half)?;
        }
        graph.values.shrink_to_fit();
        graph.nodes.shrink_to_fit();
        let plan = match self.options.arena {
            None => plan::plan(&graph, &request, &self.scratch(&graph), None)?,
            Some(limit) => self.plan_within(&mut graph, &request, limit)?,
        };
        let mut constants = Vec::with_capacity(plan.constants.len());
        for c in &plan.constants {
            constants.push(match c {
                Constant::Tensor(t) => Frozen::Owned(t.clone()),
                Constant::Weight(w) if half.contains(w) => {
                    let weight = self.model.weight(*w);
                    let view = weight.view_stored(&self.model.files).ok_or_else(|| {
                        Error::value(&weight.name, "cannot be read where it lies in the file")
                    })?;
                    Frozen::Mapped(self.model.files[weight.location.file].bytes.slice_ref(view.bytes))
                }
                Constant::Weight(w) => self.frozen(*w)?,
            });
        }
        self.arena_bytes = self.arena_bytes.max(plan.arena_bytes);
        self.programs += 1;
        Ok(Program { id: self.programs, graph, plan, constants })
    }

    /// Scratch memory depends on the number of the session's threads. (All else is planned on this one: what another has freed, the
    /// system does not get back.)
    fn scratch(&self, graph: &Graph) -> Vec<usize> {
        self.pool.install(|| plan::scratch(graph))
    }

    /// A plan in an arena of at most `limit` bytes, or in the smallest that was found.
    fn plan_within(&self, graph: &mut Graph, request: &Request, limit: usize) -> Result<Plan> {
        let scratch = |graph: &Graph| self.scratch(graph);
        plan::keep_statistics(graph, request)?;
        let whole = scratch(graph);
        let dropped = plan::drop_within(graph, request, limit, &whole)?;
        let cut = if dropped.arena <= limit { None } else { pieces::cut(graph, request, &scratch)? };
        if let Some(mut cut) = cut {
            let apart = scratch(&cut);
            let tighter = plan::drop_within(&cut, request, limit, &apart)?;
            if tighter.arena < dropped.arena {
                let more = plan::all_work(&cut, request)? / plan::all_work(graph, request)?.max(1.0);
                let mut plan = plan::plan_dropping(&mut cut, request, limit, &apart, tighter)?;
                plan.again.work = ((1.0 + plan.again.work) * more - 1.0).max(0.0);
                plan.again.chains = pieces::count(&plan);
                *graph = cut;
                return Ok(plan);
            }
        }
        plan::plan_dropping(graph, request, limit, &whole, dropped)
    }

    /// Folds normalisations into weights once where neither changes.
    fn fold_frozen(&mut self, graph: &mut Graph) -> Result<()> {
        for i in 0..graph.nodes.len() {
            let node = &graph.nodes[i];
            let Some(fold) = node.op.as_a::<FoldNorm>() else { continue };
            // Weights and constants of the file are the same values in every graph of the session.
            let mut sources = node.inputs.iter().flatten().map(|v| (v, &graph.value(*v).source));
            let of_the_file = |v: &ValueId| {
                let source = self.model.graph.values.get(v.index()).map(|v| &v.source);
                matches!(source, Some(Source::Weight(_) | Source::Constant(_)))
            };
            let stays = |s: &Source| matches!(s, Source::Weight(_) | Source::Constant(_));
            if !sources.all(|(v, s)| stays(s) && of_the_file(v)) {
                continue;
            }
            let key = (node.inputs.clone(), fold.epsilon.to_bits());
            if self.options.dry && !self.folded.contains_key(&key) {
                // Only their sizes count.
                let sizes = node.outputs.iter().flatten().filter_map(|v| graph.value(*v).meta.as_ref());
                let zeros = sizes.map(|m| Arc::new(Tensor::zeros(m.dtype, &m.dims))).collect();
                self.folded.insert(key.clone(), zeros);
            }
            if !self.folded.contains_key(&key) {
                let load = |v: &Option<ValueId>| match v.map(|v| &graph.value(v).source) {
                    Some(Source::Constant(t)) => Ok(Some(t.as_ref().clone())),
                    Some(Source::Weight(w)) => self.model.load_weight(*w).map(Some),
                    _ => Ok(None),
                };
                let inputs = node.inputs.iter().map(load).collect::<Result<Vec<_>>>()?;
                let inputs: Vec<Option<&Tensor>> = inputs.iter().map(Option::as_ref).collect();
                let folded = eval(fold, &inputs)
                    .map_err(|source| Error::Op { node: graph.describe(NodeId(i as u32)), source })?;
                self.folded.insert(key.clone(), folded.into_iter().map(Arc::new).collect());
            }
            let outputs = node.outputs.clone();
            for (v, t) in outputs.into_iter().zip(&self.folded[&key]) {
                if let Some(v) = v {
                    graph.value_mut(v).source = Source::Constant(t.clone());
                }
            }
        }
        Ok(())
    }

    /// Gives back memory that holds nothing between runs, and what only updates need.
    pub fn release(&mut self) {
        self.arena = Buffer::default();
        self.store.release(Purpose::Optimizer);
        self.store.release(Purpose::Gradient);
    }

    /// Runs a program. Every input that the plan reads must be fed, in its planned shape and type.
    pub fn run(&mut self, program: &Program, feeds: &[(ValueId, View)], seed: u64) -> Result<()> {
        if self.options.dry {
            return Err(Error::Config("this session only plans".into()));
        }
        if self.arena.len() < program.plan.arena_bytes {
            // What it holds need not outlive a run: never two of them at a time.
            self.arena = Buffer::default();
            self.arena = Buffer::try_zeroed(self.arena_bytes, "what one run computes")?;
        }
        for (v, meta, range) in &program.plan.inputs {
            let name = &program.graph.value(*v).name;
            let Some((_, view)) = feeds.iter().find(|f| f.0 == *v) else {
                return Err(Error::value(name, "this input is not fed"));
            };
            if view.dtype != meta.dtype || view.dims != meta.dims.as_slice() {
                return Err(Error::value(
                    name,
                    format!(
                        "fed with {} {:?}, planned for {} {:?}",
                        view.dtype,
                        view.dims,
                        meta.dtype,
                        meta.dims.as_slice()
                    ),
                ));
            }
            self.arena.bytes_mut()[range.clone()].copy_from_slice(view.bytes);
        }
        let profile = self.profile.then(|| self.profiles.entry(program.id).or_default());
        let mut memory = Memory {
            arena: &mut self.arena.bytes_mut()[..program.plan.arena_bytes],
            store: &mut self.store,
            constants: &program.constants,
            seed: self.options.seed ^ seed,
        };
        self.pool.install(|| awake(|| run::run(&program.plan, &program.graph, &mut memory, profile)))
    }

    /// A value that the program was asked for, after its run and before the next one.
    pub fn output<'a>(&'a self, program: &'a Program, v: ValueId) -> Result<View<'a>> {
        let Some((meta, location)) = program.plan.outputs.get(&v) else {
            return Err(Error::value(&program.graph.value(v).name, "was not asked for"));
        };
        let bytes =
            match location {
                Location::Arena(range) => self.arena.bytes().get(range.clone()).ok_or_else(|| {
                    Error::value(&program.graph.value(v).name, "is read before the first run")
                })?,
                Location::State(s) => self.store.view(*s).bytes,
                Location::Constant(c) => program.constants[*c].bytes(),
            };
        Ok(View { dtype: meta.dtype, dims: &meta.dims, bytes })
    }

    /// A floating-point scalar of the last run.
    pub fn scalar(&self, program: &Program, v: ValueId) -> Result<f64> {
        let view = self.output(program, v)?;
        view.to_tensor()
            .to_f64()
            .first()
            .copied()
            .ok_or_else(|| Error::value(&program.graph.value(v).name, "is empty"))
    }

    /// Measures the time of every kernel call from now on.
    pub fn set_profiling(&mut self, on: bool) {
        self.profile = on;
        self.profiles.clear();
    }

    /// Time per kernel call of a program, summed over its runs.
    pub fn profile(&self, program: &Program) -> Option<&Profile> {
        self.profiles.get(&program.id)
    }

    pub fn usage(&self) -> Usage {
        Usage {
            weights: self.store.bytes_for(Purpose::Parameter),
            statistics: self.store.bytes_for(Purpose::Statistic),
            optimizer: self.store.bytes_for(Purpose::Optimizer),
            gradients: self.store.bytes_for(Purpose::Gradient),
            step: self.store.bytes_for(Purpose::Step),
            samples: self.store.bytes_for(Purpose::Sample),
            arena: self.arena_bytes.next_multiple_of(ALIGN),
            frozen: self
                .frozen
                .values()
                .map(|f| match f {
                    Frozen::Owned(t) => t.bytes().len(),
                    Frozen::Mapped(_) => 0,
                })
                .chain(self.folded.values().flatten().map(|t| t.bytes().len()))
                .sum(),
        }
    }
}
