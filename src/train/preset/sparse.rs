//! Sparse updates within a budget (Lin et al. 2022, "On-Device Training Under 256KB Memory", arXiv 2206.15472): biases of
//! the last layers, and of some of these layers the weights of some input channels.
//!
//! Which ones is chosen as there by what they contribute, but contributions are measured here and now: by the gradients
//! of some batches of the data, as the fall of the loss that the optimizer's first steps should bring. For each depth of
//! the backward pass a knapsack is packed with layers and shares of their channels; what it says is then planned for
//! real, and grown or shrunk until the plan keeps the budget.

use std::collections::{BTreeMap, HashMap};

use crate::error::{Error, OpError, Result};
use crate::exec::{Options, Part, Session};
use crate::float_dispatch;
use crate::graph::{Graph, Node, Source, ValueId, WeightId, grad};
use crate::import::{Model, Role};
use crate::ops::conv::Conv;
use crate::ops::matmul::Gemm;
use crate::ops::part::Inset;
use crate::plan::Request;
use crate::tensor::{Float, View};
use crate::train::optimizer::Optimizer;
use crate::train::preset::knapsack::{self, pack};
use crate::train::preset::{Amount, Ask, Budget, Chosen};
use crate::train::step::{Evaluation, Network, Recipe, feeds, param_values};

/// Shares of a layer's input channels that are tried, as divisors.
const SHARES: [usize; 4] = [8, 4, 2, 1];
/// Depths of the backward pass that a knapsack is packed for, and those of them that are planned.
const DEPTHS: usize = 10;
const PLANNED: usize = 3;
/// Plans on the way from what a knapsack says to what fits.
const TRIES: usize = 6;
/// Bytes of gradients that are measured at a time, at least.
const MEASURED: usize = 4 << 20;

/// A layer with its weight, in the order of the forward pass.
struct Layer {
    weight: WeightId,
    at: usize,
    /// The weight's axis that goes with the channels of the layer's input, where gradients of a slice of them can be
    /// computed by themselves.
    axis: Option<usize>,
    /// Bytes of the layer's input, and multiply-adds of the weight's gradient.
    input: usize,
    /// Biases and shifts that follow, until the next layer.
    vectors: Vec<WeightId>,
}

/// What is to learn.
#[derive(Debug, Clone, Default)]
struct Pick {
    whole: Vec<WeightId>,
    slices: Vec<(WeightId, Inset)>,
    value: f64,
}

/// What a choice takes.
#[derive(Debug, Clone, Copy)]
struct Taken {
    bytes: usize,
    work: usize,
}

struct Search<'a> {
    ask: &'a Ask<'a>,
    session: &'a Session,
    /// What other terms choose, in a session.
    others: &'a dyn Fn(&mut Session) -> Result<Chosen>,
    layers: Vec<Layer>,
    /// Contributions per channel (or of the whole, in one number) of each weight.
    values: HashMap<WeightId, Vec<f64>>,
    limit: Taken,
}

/// The axis of a weight in operand 1 of `node` that goes with the channels of operand 0.
fn axis(graph: &Graph, node: &Node, weight: &[usize]) -> Option<usize> {
    let x = graph.value(node.inputs[0]?).meta.as_ref()?;
    if let Some(conv) = node.op.as_a::<Conv>() {
        let depthwise = conv.groups == x.dims[1] && weight[0] == conv.groups;
        return if conv.groups == 1 { Some(1) } else { depthwise.then_some(0) };
    }
    if let Some(gemm) = node.op.as_a::<Gemm>() {
        return (!gemm.trans_a).then_some(usize::from(gemm.trans_b));
    }
    (node.op.name() == "MatMul" && weight.len() == 2 && x.rank() >= 2).then_some(0)
}

/// Adds, per channel along `axis`, how far a step of the optimizer should bring the loss down: a step goes along the gradient
/// (`squares`), or, as far as each element's size goes, along its sign.
fn add_falls(
    g: &View,
    axis: Option<usize>,
    squares: bool,
    sums: &mut [f64],
) -> std::result::Result<(), OpError> {
    let inner: usize = axis.map_or(1, |a| g.dims[a + 1..].iter().product()).max(1);
    let channels = sums.len();
    float_dispatch!(g.dtype, T => {
        for (i, x) in g.get::<T>()?.iter().enumerate() {
            let x = x.to64();
            let fall = if squares { x * x } else { x.abs() };
            if fall.is_finite() {
                sums[i / inner % channels] += fall;
            }
        }
        Ok(())
    })
}

/// The layers of an inferred graph whose weight can be trained.
fn layers(model: &Model, graph: &Graph, able: &dyn Fn(WeightId) -> bool) -> Vec<Layer> {
    let mut layers: Vec<Layer> = Vec::new();
    let mut vectors: Vec<(usize, WeightId)> = Vec::new();
    for (at, node) in graph.nodes.iter().enumerate() {
        for (slot, v) in node.inputs.iter().enumerate() {
            let Some(Source::Weight(id)) = v.map(|v| &graph.value(v).source) else { continue };
            let (id, weight) = (*id, model.weight(*id));
            if !able(id) {
                continue;
            }
            match weight.role {
                Role::Bias | Role::Shift if !vectors.iter().any(|(_, w)| *w == id) => vectors.push((at, id)),
                Role::Weight | Role::Embedding if weight.dims.len() > 1 => {
                    if let Some(known) = layers.iter_mut().find(|l| l.weight == id) {
                        // Used twice: its gradient is a sum.
                        known.axis = None;
                        continue;
                    }
                    let axis = if slot == 1 { axis(graph, node, &weight.dims) } else { None };
                    let input = node.inputs.first().copied().flatten();
                    let input = input.and_then(|x| graph.value(x).meta.as_ref()).map_or(0, |m| m.bytes());
                    layers.push(Layer { weight: id, at, axis, input, vectors: Vec::new() });
                }
                _ => {}
            }
        }
    }
    for (at, id) in vectors {
        if let Some(layer) = layers.iter_mut().rev().find(|l| l.at <= at) {
            layer.vectors.push(id);
        }
    }
    layers
}

/// Adds what a sparse update of this budget learns to what other terms have `chosen`.
pub(super) fn add(
    session: &mut Session,
    budget: &Budget,
    ask: &Ask,
    reached: &[bool],
    chosen: &mut Chosen,
    others: &dyn Fn(&mut Session) -> Result<Chosen>,
) -> Result<()> {
    let model = session.model().clone();
    let fail = |what: String| Error::Config(format!("--train sparse:{budget}: {what}"));
    let taken = chosen.params.clone();
    let able = |w: WeightId| model.weight(w).trainable && reached[w.index()] && !taken.contains(&w);
    let bare = Session::new(model.clone(), session.options().clone())?;
    let net = Network::new(&bare, ask.recipe.mode(), ask.shapes, &HashMap::new())?;
    let layers = layers(&model, &net.graph, &able);
    if layers.is_empty() {
        return Err(fail("the model has no layer that could learn (beside what is trained already)".into()));
    }
    let mut search = Search {
        ask,
        session,
        others,
        layers,
        values: HashMap::new(),
        limit: Taken { bytes: usize::MAX, work: usize::MAX },
    };
    let forward = search.forward()?;
    let all: Vec<WeightId> = (0..model.weights.len() as u32).map(WeightId).filter(|w| able(*w)).collect();
    let full = search.planned(&Pick { whole: all, ..Pick::default() })?;
    let extra = |t: Taken| t.bytes.saturating_sub(forward.bytes);
    let room = match budget.memory {
        Amount::Bytes(bytes) => bytes,
        Amount::Share(share) => (share * extra(full) as f64) as usize,
    };
    search.limit.bytes = forward.bytes.saturating_add(room);
    if let Some(share) = budget.time {
        search.limit.work = (share * full.work as f64) as usize;
    }
    let depth = search.depth(forward)?;
    if depth == 0 {
        let least = search.planned(&search.vectors(1))?;
        return Err(fail(format!(
            "biases of the last layer alone take {} bytes more than a forward pass, and {:.0}% of full training's \
             multiply-adds",
            extra(least),
            100.0 * least.work as f64 / full.work.max(1) as f64
        )));
    }
    search.measure(depth)?;
    let (pick, took) = search.choose(depth, forward)?;
    let count = |w: &WeightId| model.weight(*w).len();
    let slices = pick.slices.iter().map(|(w, s)| count(w) / model.weight(*w).dims[s.axis].max(1) * s.count);
    let learn: usize = pick.whole.iter().map(count).sum::<usize>() + slices.sum::<usize>();
    let weights = pick.whole.iter().filter(|w| search.layers.iter().any(|l| l.weight == **w)).count();
    let note = format!(
        "sparse update: {learn} numbers of {} learn: {weights} weights whole, {} in part, {} biases; {} bytes more than a \
         forward pass (all: {}), {:.0}% of full training's multiply-adds; contributions {}",
        model.weights.iter().filter(|w| w.trainable).map(|w| w.len()).sum::<usize>(),
        pick.slices.len(),
        pick.whole.len() - weights,
        extra(took),
        extra(full),
        100.0 * took.work as f64 / full.work.max(1) as f64,
        if ask.batches.is_empty() {
            "assumed alike".into()
        } else {
            format!("measured on {} batches", ask.batches.len())
        },
    );
    for (w, inset) in &pick.slices {
        session.make_part(*w, &Part::Slice(inset.clone()), ask.seed)?;
    }
    chosen.params.extend(pick.whole);
    chosen.params.extend(pick.slices.into_iter().map(|s| s.0));
    chosen.notes.push(note);
    Ok(())
}

impl Search<'_> {
    /// A session to plan in: for one thread, so that what is chosen does not depend on their number.
    fn scratch(&self) -> Result<Session> {
        let options = Options { threads: 1, dry: true, ..self.session.options().clone() };
        Session::new(self.session.model().clone(), options)
    }

    fn forward(&self) -> Result<Taken> {
        let mut session = self.scratch()?;
        let program = Evaluation::new(&mut session, self.ask.loss, self.ask.shapes)?.program;
        Ok(Taken { bytes: session.usage().total(), work: program.multiply_adds() })
    }

    /// What a run of the method takes that trains this choice (and what other terms chose).
    fn planned(&self, pick: &Pick) -> Result<Taken> {
        let mut session = self.scratch()?;
        let mut params = (self.others)(&mut session)?.params;
        for (w, inset) in &pick.slices {
            session.make_part(*w, &Part::Slice(inset.clone()), self.ask.seed)?;
            params.push(*w);
        }
        params.extend(&pick.whole);
        if params.is_empty() {
            return self.forward();
        }
        let recipe = Recipe { params, ..self.ask.recipe.clone() };
        recipe.prepare(&mut session)?;
        let mut method = (self.ask.method)()?;
        method.prepare(&mut session, &recipe, self.ask.shapes, self.ask.epochs)?;
        let work = method.programs().iter().map(|(_, p)| p.multiply_adds()).sum();
        Ok(Taken { bytes: session.usage().total(), work })
    }

    fn fits(&self, taken: Taken) -> bool {
        taken.bytes <= self.limit.bytes && taken.work <= self.limit.work
    }

    fn last(&self, depth: usize) -> &[Layer] {
        &self.layers[self.layers.len() - depth.min(self.layers.len())..]
    }

    /// Biases and shifts of the last layers.
    fn vectors(&self, depth: usize) -> Pick {
        let whole: Vec<WeightId> = self.last(depth).iter().flat_map(|l| &l.vectors).copied().collect();
        let value = whole.iter().filter_map(|w| self.values.get(w)).flatten().sum();
        Pick { whole, slices: Vec::new(), value }
    }

    /// How many of the last layers the backward pass can go through within the limit.
    fn depth(&self, forward: Taken) -> Result<usize> {
        let (mut fits, mut fails) = (0, self.layers.len() + 1);
        while fails - fits > 1 {
            let middle = (fits + fails) / 2;
            let taken = self.path(middle, forward)?;
            if self.fits(taken) { fits = middle } else { fails = middle }
        }
        Ok(fits)
    }

    /// What the backward pass through the last layers takes, with their vectors.
    fn path(&self, depth: usize, forward: Taken) -> Result<Taken> {
        let pick = self.vectors(depth);
        if pick.whole.is_empty() { Ok(forward) } else { self.planned(&pick) }
    }

    /// Measures what weights and vectors of the last layers contribute.
    fn measure(&mut self, depth: usize) -> Result<()> {
        let mut wanted: Vec<(WeightId, Option<usize>)> = Vec::new();
        for l in self.last(depth) {
            wanted.push((l.weight, l.axis));
            wanted.extend(l.vectors.iter().map(|w| (*w, None)));
        }
        let model = self.session.model().clone();
        let mut values = HashMap::new();
        for (w, axis) in &wanted {
            let weight = model.weight(*w);
            let channels = axis.map_or(1, |a| weight.dims[a]).max(1);
            let alike = if self.ask.batches.is_empty() { weight.len() as f64 / channels as f64 } else { 0.0 };
            values.insert(*w, vec![alike; channels]);
        }
        let mut chunk: Vec<(WeightId, Option<usize>)> = Vec::new();
        let mut bytes = 0;
        if !self.ask.batches.is_empty() {
            for (i, one) in wanted.iter().enumerate() {
                chunk.push(*one);
                bytes += model.weight(one.0).len() * model.weight(one.0).working().size();
                if bytes >= MEASURED || i + 1 == wanted.len() {
                    self.gradients(&std::mem::take(&mut chunk), &mut values)?;
                    bytes = 0;
                }
            }
        }
        self.values = values;
        Ok(())
    }

    /// Adds the gradients of some weights, over all batches, to their values.
    fn gradients(
        &self,
        chunk: &[(WeightId, Option<usize>)],
        values: &mut HashMap<WeightId, Vec<f64>>,
    ) -> Result<()> {
        // Within a budget gradients are computed as the run will be: the rest of it is what they and the process take.
        let arena = self.ask.memory.map(|b| b / 2);
        let options = Options { arena, ..self.session.options().clone() };
        let mut session = Session::new(self.session.model().clone(), options)?;
        let params: Vec<WeightId> = chunk.iter().map(|c| c.0).collect();
        session.make_mutable(&params)?;
        let mut net = Network::new(&session, self.ask.recipe.mode(), self.ask.shapes, &HashMap::new())?;
        net.fuse(&[], true)?;
        let attached = self.ask.loss.attach(&mut net.graph, self.ask.shapes.target.clone())?;
        let wrt = param_values(&session, &params);
        let grads = grad(&mut net.graph, attached.loss, &wrt)?;
        let outputs: Vec<ValueId> = wrt.iter().filter_map(|v| grads.get(v)).copied().collect();
        let program = session.compile(net.graph, Request { outputs, ..Request::default() })?;
        let squares = matches!(self.ask.recipe.optimizer, Optimizer::Sgd { .. });
        for batch in &self.ask.batches {
            session.run(&program, &feeds(&net.inputs, attached.target, batch)?, self.ask.seed)?;
            for ((w, axis), v) in chunk.iter().zip(&wrt) {
                let (Some(g), Some(sums)) = (grads.get(v), values.get_mut(w)) else { continue };
                let g = session.output(&program, *g)?;
                add_falls(&g, *axis, squares, sums)
                    .map_err(|source| Error::Op { node: "a gradient that is measured".into(), source })?;
            }
        }
        Ok(())
    }

    /// What a layer's options cost and are worth: shares of its channels, the most valuable neighbours, up to all.
    fn options(&self, layer: &Layer) -> Vec<(knapsack::Choice, Option<Inset>)> {
        let weight = self.session.model().weight(layer.weight);
        let Some(values) = self.values.get(&layer.weight) else { return Vec::new() };
        let states = 2 + self.ask.recipe.optimizer.states().len();
        let (bytes, d) = (weight.len() * weight.working().size(), values.len());
        let mut options: Vec<(knapsack::Choice, Option<Inset>)> = Vec::new();
        for share in SHARES {
            let count = d.div_ceil(share);
            if (layer.axis.is_none() && share != 1)
                || options.iter().any(|o| o.1.as_ref().is_some_and(|i| i.count == count))
            {
                continue;
            }
            let windows = values.windows(count).map(|w| w.iter().sum::<f64>()).enumerate();
            let Some((from, value)) = windows.reduce(|a, b| if b.1 > a.1 { b } else { a }) else { continue };
            let inset = layer.axis.filter(|_| count < d).map(|axis| Inset { axis, from, count });
            // Values, gradient and the optimizer's; the input's channels; in part: the weight put together.
            let together = if inset.is_some() { bytes } else { 0 };
            let cost = (bytes * states + layer.input) / d * count + together;
            options.push((knapsack::Choice { cost, value }, inset));
        }
        options
    }

    /// The knapsack of the last layers, with `room` for their weights.
    fn packed(&self, depth: usize, room: usize) -> Pick {
        let layers = self.last(depth);
        let options: Vec<_> = layers.iter().map(|l| self.options(l)).collect();
        let costs: Vec<Vec<knapsack::Choice>> =
            options.iter().map(|o| o.iter().map(|c| c.0).collect()).collect();
        let mut pick = self.vectors(depth);
        for ((layer, options), taken) in layers.iter().zip(options).zip(pack(&costs, room)) {
            let Some((choice, inset)) = taken.and_then(|i| options.into_iter().nth(i)) else { continue };
            pick.value += choice.value;
            match inset {
                Some(inset) => pick.slices.push((layer.weight, inset)),
                None => pick.whole.push(layer.weight),
            }
        }
        pick
    }

    /// The most valuable choice of those that were planned and fit.
    fn choose(&self, depth: usize, forward: Taken) -> Result<(Pick, Taken)> {
        let depths: std::collections::BTreeSet<usize> =
            (1..=DEPTHS).map(|i| (depth * i).div_ceil(DEPTHS)).filter(|d| *d > 0).collect();
        let mut paths = BTreeMap::new();
        let mut promising = Vec::new();
        for d in depths {
            let path = self.path(d, forward)?;
            if self.fits(path) {
                promising.push((d, self.packed(d, self.limit.bytes - path.bytes).value));
                paths.insert(d, path);
            }
        }
        promising.sort_by(|a, b| b.1.total_cmp(&a.1));
        let mut best: Option<(Pick, Taken)> = None;
        for (d, _) in promising.into_iter().take(PLANNED) {
            let found = self.refined(d, paths[&d])?;
            if let Some((pick, taken)) = found
                && best.as_ref().is_none_or(|b| pick.value > b.0.value)
            {
                best = Some((pick, taken));
            }
        }
        best.ok_or_else(|| {
            let what =
                "no layer's weight or bias fits into the budget beside the backward pass that it needs";
            Error::Config(format!("--train sparse: {what}"))
        })
    }

    /// What fits at one depth: the knapsack's costs are estimates, so its room is grown or shrunk by what plans say.
    fn refined(&self, depth: usize, path: Taken) -> Result<Option<(Pick, Taken)>> {
        let vectors = self.vectors(depth);
        let mut best = if vectors.whole.is_empty() { None } else { Some((vectors, path)) };
        let room = self.limit.bytes - path.bytes;
        let (mut fits, mut fails, mut factor) = (0.0f64, f64::INFINITY, 1.0f64);
        for _ in 0..TRIES {
            let pick = self.packed(depth, (room as f64 * factor) as usize);
            let empty = pick.whole.is_empty() && pick.slices.is_empty();
            let taken = if empty { path } else { self.planned(&pick)? };
            if self.fits(taken) {
                fits = factor;
                match best.as_ref().is_none_or(|b| pick.value > b.0.value) {
                    true if !empty => best = Some((pick, taken)),
                    // More room would bring nothing more.
                    false if fails.is_infinite() && factor > 1.0 => break,
                    _ => {}
                }
            } else {
                fails = factor;
            }
            factor = if fails.is_finite() { (fits + fails) / 2.0 } else { factor * 2.0 };
        }
        Ok(best)
    }
}
