//! Which tensors lie with their channels last: convolutions want it, their neighbours follow.
//!
//! The values that operators with such a form read or make fall into classes, connected by these operators; a
//! class that holds an operand of a convolution lies with its channels last throughout. Conversions are thus left
//! to the borders of classes, where an operator has no such form, and to what the caller is promised.

use std::collections::HashMap;
use std::sync::Arc;

use crate::error::{Error, OpError};
use crate::graph::{Graph, Node, NodeId, Source, StateId, ValueId, op_type};
use crate::kernels::layout::{Layout, axis_at, last, position};
use crate::ops::layout::{ChannelsLast, extended, free};
use crate::ops::transpose::Transpose;
use crate::ops::view::ReshapeTo;
use crate::ops::{Op, eval};
use crate::plan::Request;
use crate::tensor::{Dims, Meta};

/// How states that values are pinned in lie: as the first program that wrote them found it best.
pub type PinnedLayouts = HashMap<StateId, Layout>;

/// Puts convolutional parts of a graph whose shapes are inferred into channels-last layout. Outputs and effects of
/// the request keep their dimensions; others may come to have theirs permuted.
pub fn layout(graph: &mut Graph, request: &mut Request, pinned: &mut PinnedLayouts) -> Result<(), Error> {
    let forms = choose(graph);
    let mut promised = vec![false; graph.values.len()];
    let first = |s: &StateId| pinned.get(s) == Some(&Layout::First);
    let in_order = request.pins.iter().filter(|(_, s)| first(s)).map(|(v, _)| v);
    for v in request.outputs.iter().chain(&request.effects).chain(in_order) {
        promised[v.index()] = true;
    }
    let old = std::mem::take(&mut graph.nodes);
    let moved = vec![false; graph.values.len()];
    let mut pass = Pass { graph, promised, moved, twins: HashMap::new(), ordinary: HashMap::new() };
    pass.states(pinned);
    for (node, form) in old.into_iter().zip(forms) {
        let op = node.op.clone();
        let done = match form {
            None => pass.as_it_is(node),
            Some(form) => pass.permuted(node, form),
        };
        done.map_err(|source| Error::Op { node: format!("layout of {}", op_type(op.as_ref())), source })?;
    }
    pass.pin(request, pinned).map_err(|source| Error::Op { node: "layout of pinned values".into(), source })
}

/// Values connected by operators that have a form for channels last.
struct Classes(Vec<u32>);

impl Classes {
    fn of(&mut self, v: ValueId) -> u32 {
        let mut at = v.0;
        while self.0[at as usize] != at {
            self.0[at as usize] = self.0[self.0[at as usize] as usize];
            at = self.0[at as usize];
        }
        at
    }

    fn join(&mut self, a: ValueId, b: ValueId) {
        let (a, b) = (self.of(a), self.of(b));
        self.0[b as usize] = a;
    }
}

/// The operands that are to lie with their channels last.
fn flagged<'a>(node: &'a Node, form: &'a ChannelsLast) -> impl Iterator<Item = ValueId> + 'a {
    let inputs = node.inputs.iter().zip(&form.inputs);
    inputs.chain(node.outputs.iter().zip(&form.outputs)).filter(|(_, flag)| **flag).filter_map(|(v, _)| *v)
}

/// The number of dimensions that operands of fewer are extended to.
fn rank(graph: &Graph, node: &Node, form: &ChannelsLast) -> usize {
    flagged(node, form).map(|v| graph.value(v).meta.as_ref().map_or(0, Meta::rank)).max().unwrap_or(0)
}

/// Those of them that it costs something to convert, at every run.
fn members(graph: &Graph, node: &Node, form: &ChannelsLast) -> Vec<ValueId> {
    let rank = rank(graph, node, form);
    flagged(node, form)
        .filter(|v| {
            let value = graph.value(*v);
            let whole = value.meta.as_ref().is_some_and(|m| m.rank() == rank && !free(&m.dims));
            whole && !matches!(value.source, Source::Constant(_))
        })
        .collect()
}

/// For each node the form it is to take; `None`: as it is.
fn choose(graph: &Graph) -> Vec<Option<ChannelsLast>> {
    let mut classes = Classes((0..graph.values.len() as u32).collect());
    let mut seeds = Vec::new();
    let offers: Vec<Option<(ChannelsLast, Vec<ValueId>)>> = graph
        .nodes
        .iter()
        .map(|node| {
            let (x, y) = (graph.metas(&node.inputs), graph.metas(&node.outputs));
            // A graph of which only a part is meant to run (the updates, say) has no shapes elsewhere.
            let inferred = |v: &ValueId| graph.value(*v).meta.is_some();
            if !node.inputs.iter().chain(&node.outputs).flatten().all(inferred) {
                return None;
            }
            // What is known before the run does not run.
            if y.iter().flatten().any(|y| y.value.is_some()) {
                return None;
            }
            let form = node.op.channels_last(&x, &y)?;
            let members = members(graph, node, &form);
            members.windows(2).for_each(|w| classes.join(w[0], w[1]));
            if form.wanted {
                seeds.extend(members.first());
            }
            Some((form, members))
        })
        .collect();
    let mut last = vec![false; graph.values.len()];
    for v in seeds {
        last[classes.of(v) as usize] = true;
    }
    let mut taken = |(form, members): (ChannelsLast, Vec<ValueId>)| {
        let follows = members.first().is_some_and(|v| last[classes.of(*v) as usize]);
        (form.wanted || follows).then_some(form)
    };
    offers.into_iter().map(|o| o.and_then(&mut taken)).collect()
}

struct Pass<'g> {
    graph: &'g mut Graph,
    /// Must keep their dimensions.
    promised: Vec<bool>,
    /// Now have their channels last, under their own name.
    moved: Vec<bool>,
    /// The same elements with channels last, of values (extended to so many dimensions) that keep theirs.
    twins: HashMap<(ValueId, usize), ValueId>,
    /// The same elements in ordinary order, of values that are `moved`.
    ordinary: HashMap<ValueId, ValueId>,
}

impl Pass<'_> {
    /// Marks the states that lie with their channels last.
    fn states(&mut self, pinned: &PinnedLayouts) {
        for (value, moved) in self.graph.values.iter_mut().zip(&mut self.moved) {
            if let (Source::State(s), Some(meta)) = (&value.source, &mut value.meta)
                && pinned.get(s) == Some(&Layout::Last)
            {
                meta.dims = last(&meta.dims);
                *moved = true;
            }
        }
    }

    /// Settles how pinned values lie, in the order of their states.
    fn pin(&mut self, request: &mut Request, pinned: &mut PinnedLayouts) -> Result<(), OpError> {
        let mut pins: Vec<(ValueId, StateId)> = request.pins.drain().collect();
        pins.sort_by_key(|p| p.1);
        for (v, state) in pins {
            let moved = self.moved[v.index()];
            let here = if moved { Layout::Last } else { Layout::First };
            let v = match *pinned.entry(state).or_insert(here) {
                Layout::Last if !moved => self.twin(v, self.dims(v).len())?,
                _ => v,
            };
            request.pins.insert(v, state);
        }
        Ok(())
    }

    fn as_it_is(&mut self, mut node: Node) -> Result<(), OpError> {
        let known = |v: &ValueId| matches!(self.graph.value(*v).source, Source::Constant(_));
        if !node.outputs.iter().flatten().all(known) {
            for v in node.inputs.iter_mut().flatten() {
                *v = self.ordinary(*v)?;
            }
        }
        self.push(node);
        Ok(())
    }

    fn permuted(&mut self, mut node: Node, form: ChannelsLast) -> Result<(), OpError> {
        let rank = rank(self.graph, &node, &form);
        node.inputs.truncate(form.takes);
        for (i, v) in node.inputs.iter_mut().enumerate() {
            let Some(v) = v else { continue };
            *v = match form.inputs.get(i) {
                Some(true) => self.twin(*v, rank)?,
                _ => self.ordinary(*v)?,
            };
        }
        let outputs = node.outputs.clone();
        node.op = form.op.unwrap_or(node.op);
        let made = node.op.infer(&self.graph.metas(&node.inputs))?;
        let mut back = Vec::new();
        for (o, v) in outputs.iter().enumerate() {
            let (Some(v), Some(true)) = (v, form.outputs.get(o)) else { continue };
            let own = self.dims(*v);
            let fits = |m: &&Meta| m.dims == last(&extended(&own, m.rank()));
            let meta = made.get(o).filter(fits).cloned().ok_or_else(|| {
                OpError::Internal(format!("output {o} of {:?} is not {own:?}, permuted: {made:?}", node.op))
            })?;
            if self.promised[v.index()] || own.len() < meta.rank() {
                let rank = meta.rank();
                let twin = self.value(*v, "last", meta);
                self.twins.insert((*v, rank), twin);
                node.outputs[o] = Some(twin);
                // One of more dimensions is permuted only where that moves nothing.
                let op = if rank == own.len() { to_first(&own) } else { Arc::new(ReshapeTo { dims: own }) };
                back.push(Node {
                    name: String::new(),
                    op,
                    inputs: vec![Some(twin)],
                    outputs: vec![Some(*v)],
                });
            } else {
                self.graph.value_mut(*v).meta = Some(meta);
                self.moved[v.index()] = true;
            }
        }
        self.push(node);
        back.into_iter().for_each(|node| self.push(node));
        Ok(())
    }

    fn dims(&self, v: ValueId) -> Dims {
        self.graph.value(v).meta.as_ref().map(|m| m.dims.clone()).unwrap_or_default()
    }

    /// Appends a node and makes it the source of its outputs.
    fn push(&mut self, node: Node) {
        let id = NodeId(self.graph.nodes.len() as u32);
        for (o, v) in node.outputs.iter().enumerate() {
            let Some(v) = v else { continue };
            let source = &mut self.graph.value_mut(*v).source;
            if !matches!(source, Source::Constant(_)) {
                *source = Source::Node(id, o);
            }
        }
        self.graph.nodes.push(node);
    }

    fn value(&mut self, of: ValueId, what: &str, meta: Meta) -> ValueId {
        let name = format!("{}#{what}", self.graph.value(of).name);
        let v = self.graph.add_value(name, Source::Input);
        self.graph.value_mut(v).meta = Some(meta);
        self.promised.push(false);
        self.moved.push(false);
        v
    }

    /// Appends the conversion `op` of `from`; the result is a form of `v`.
    fn convert(
        &mut self,
        v: ValueId,
        what: &str,
        from: ValueId,
        op: Arc<dyn Op>,
    ) -> Result<ValueId, OpError> {
        if let Source::Constant(t) = &self.graph.value(from).source {
            let mut made = eval(op.as_ref(), &[Some(t)])?;
            let name = format!("{}#{what}", self.graph.value(v).name);
            let id = self.graph.add_constant(name, made.swap_remove(0));
            self.promised.push(false);
            self.moved.push(false);
            return Ok(id);
        }
        let meta = op.infer(&self.graph.metas(&[Some(from)]))?.swap_remove(0);
        let to = self.value(v, what, meta);
        self.push(Node { name: String::new(), op, inputs: vec![Some(from)], outputs: vec![Some(to)] });
        Ok(to)
    }

    /// The value with the dimensions it had.
    fn ordinary(&mut self, v: ValueId) -> Result<ValueId, OpError> {
        if !self.moved[v.index()] {
            return Ok(v);
        }
        if let Some(known) = self.ordinary.get(&v) {
            return Ok(*known);
        }
        let op = to_first(&crate::kernels::layout::first(&self.dims(v)));
        let made = self.convert(v, "first", v, op)?;
        self.ordinary.insert(v, made);
        Ok(made)
    }

    /// The value, extended to `rank` dimensions, with its channels last.
    fn twin(&mut self, v: ValueId, rank: usize) -> Result<ValueId, OpError> {
        let dims = self.dims(v);
        if self.moved[v.index()] && dims.len() == rank {
            return Ok(v);
        }
        if let Some(known) = self.twins.get(&(v, rank)) {
            return Ok(*known);
        }
        let mut from = self.ordinary(v)?;
        let full = extended(&self.dims(from), rank);
        if full.len() != dims.len() && !free(&full) {
            from = self.convert(v, "extended", from, Arc::new(ReshapeTo { dims: full.clone() }))?;
        }
        let made = self.convert(v, "last", from, to_last(&full))?;
        self.twins.insert((v, rank), made);
        Ok(made)
    }
}

/// From `dims`, channels first (perhaps without leading ones), to channels last.
fn to_last(dims: &[usize]) -> Arc<dyn Op> {
    let rank = dims.len();
    match free(dims) {
        true => Arc::new(ReshapeTo { dims: last(dims) }),
        false => Arc::new(Transpose { perm: Some((0..rank).map(|i| axis_at(i, rank)).collect()) }),
    }
}

/// To `dims`, channels first, from channels last.
fn to_first(dims: &[usize]) -> Arc<dyn Op> {
    let rank = dims.len();
    match free(dims) {
        true => Arc::new(ReshapeTo { dims: Dims::from_slice(dims) }),
        false => Arc::new(Transpose { perm: Some((0..rank).map(|a| position(a, rank)).collect()) }),
    }
}
