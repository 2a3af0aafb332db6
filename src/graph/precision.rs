//! What is stored in half precision: values that are read again long after they were made (what a gradient needs of
//! the forward pass above all), and weights that lie in memory, or in the file, that way.
//!
//! It is the last pass before the plan. Kernels compute in `f32` before and after: a value is rounded by the kernel that
//! makes it, where that can, else once the kernels that follow it closely have read it; those that read it late widen it
//! piece by piece as they read, where they can, else it is widened just before them. In between its half form alone is
//! alive. Sums, statistics, losses and updates are thus computed in `f32` from `f32`, but for the sums over a gradient that
//! only products read besides, which round it, or that a product by pairs passes on to a normalisation: it is rounded where it is made. What a convolution with statistics makes
//! is read rounded by the normalisation near by as well, as by its gradient ([`Op::is_kept_rounded`]): it is never in memory in `f32`.

use std::collections::HashSet;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::error::{Error, Result};
use crate::graph::{Graph, Node, NodeId, Source, ValueId, WeightId, op_type};
use crate::kernels::half::Half;
use crate::ops::Op;
use crate::ops::half::{Narrow, Widen};
use crate::ops::view::ReshapeTo;
use crate::plan::{self, Kind, Request};
use crate::tensor::{DType, Dims, Meta};

/// Values of fewer bytes stay as they are.
const SMALL: usize = 4096;
/// A reader at most so many kernel calls after the one before reads what that one has read. Calls that make little are not counted.
const NEAR: usize = 6;
/// Late readers at most so many calls apart share a widened copy.
const TOGETHER: usize = 3;

/// Who converts between `f32` and half precision. Results are the same bits whether kernels do or operators of their own, but for
/// numbers below the least normal one: instructions that round to bfloat16 take them for zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Conversions {
    /// Kernels that read or make a value, where they can.
    Kernels,
    /// Kernels that read it alone: what is computed again should be of one operator each. What is kept rounded is read so by
    /// those near by too: else what is computed again of their results would begin with the network's input.
    Reads,
    /// Operators of their own.
    Apart,
}

/// Stores in type `to` what is read late, and reads states and weights of the file that are kept in half precision:
/// `stored` tells their type. Returns the weights that are read as the file has them.
pub fn halve(
    graph: &mut Graph,
    request: &Request,
    to: Option<DType>,
    conversions: Conversions,
    stored: &dyn Fn(&Source) -> Option<DType>,
) -> Result<HashSet<WeightId>> {
    let kept: Vec<(ValueId, DType)> = (0..graph.values.len() as u32)
        .map(ValueId)
        .filter_map(|v| {
            let value = graph.value(v);
            let wide = value.meta.as_ref().is_some_and(|m| m.dtype == DType::F32);
            let dtype = stored(&value.source).filter(|d| wide && Half::of(*d).is_some())?;
            Some((v, dtype))
        })
        .collect();
    if to.is_none() && kept.is_empty() {
        return Ok(HashSet::new());
    }
    let mut pass = Pass::new(graph, request, conversions)?;
    let mut weights = HashSet::new();
    for (v, dtype) in kept {
        let source = pass.graph.value(v).source.clone();
        match source {
            // Whoever reads it after the run reads f32.
            Source::Weight(_) if pass.promised[v.index()] => {}
            Source::Weight(w) => {
                if pass.is_read(v) {
                    weights.insert(w);
                }
                pass.kept_in_half(v, dtype)?;
            }
            _ if pass.promised[v.index()] => {
                let what = "is an output and cannot be kept in half precision: leave it out of --train";
                return Err(Error::value(&pass.graph.value(v).name, what));
            }
            _ => pass.kept_in_half(v, dtype)?,
        }
    }
    if let Some(to) = to {
        for v in (0..pass.root.len() as u32).map(ValueId) {
            pass.save(v, to)?;
        }
        for v in (0..pass.root.len() as u32).map(ValueId) {
            pass.round_for_products(v, to)?;
        }
    }
    pass.finish();
    Ok(weights)
}

/// Has products that can multiply pairs of bfloat16 do so; before [`halve`], since they read half precision as it is.
pub fn multiply_pairs(graph: &mut Graph) {
    let (nodes, values) = (&mut graph.nodes, &graph.values);
    for node in nodes {
        let made = node.outputs.iter().flatten().next().and_then(|v| values[v.index()].meta.as_ref());
        if made.is_some_and(|m| m.dtype == DType::F32)
            && let Some(op) = node.op.by_pairs()
        {
            node.op = op;
        }
    }
}

/// A node that reads a value, or one that views it.
#[derive(Debug, Clone, Copy)]
struct Use {
    /// The time of the call: those that make something large before it.
    at: usize,
    node: NodeId,
    input: usize,
    value: ValueId,
}

struct Pass<'g> {
    graph: &'g mut Graph,
    conversions: Conversions,
    /// Per value: what it views, at the end of all views.
    root: Vec<ValueId>,
    /// Per root: when it is made, and by which node; `None`: fed, or not made here.
    made: Vec<Option<(usize, NodeId)>>,
    /// Per root: who reads it, in order.
    uses: Vec<Vec<Use>>,
    /// Per root: it must be there after the run, or is a gradient that an update reads.
    promised: Vec<bool>,
    /// Nodes to run first, and before and after each node of the graph.
    first: Vec<Node>,
    before: Vec<SmallVec<[Node; 1]>>,
    after: Vec<SmallVec<[Node; 1]>>,
}

impl<'g> Pass<'g> {
    fn new(graph: &'g mut Graph, request: &Request, conversions: Conversions) -> Result<Self> {
        let (values, nodes) = (graph.values.len(), graph.nodes.len());
        let mut root: Vec<ValueId> = (0..values as u32).map(ValueId).collect();
        let mut made = vec![None; values];
        let mut uses = vec![Vec::new(); values];
        let mut promised = vec![false; values];
        let order = plan::order(graph, request)?;
        let mut at = 0;
        for &id in &order {
            let node = graph.node(id);
            let known = |v: &ValueId| matches!(graph.value(*v).source, Source::Constant(_));
            if node.outputs.iter().flatten().all(known) {
                continue;
            }
            if let Some((x, y)) = node.view().filter(|(_, y)| !request.pins.contains_key(y)) {
                root[y.index()] = root[x.index()];
                continue;
            }
            let bytes = |v: &ValueId| graph.value(*v).meta.as_ref().map_or(0, |m| m.bytes());
            at += usize::from(node.outputs.iter().flatten().map(bytes).sum::<usize>() >= SMALL);
            for (input, v) in node.inputs.iter().enumerate() {
                if let Some(value) = *v {
                    let of = root[value.index()].index();
                    uses[of].push(Use { at, node: id, input, value });
                    promised[of] |= node.op.compares();
                }
            }
            for v in node.outputs.iter().flatten() {
                made[v.index()] = Some((at, id));
            }
        }
        let gradients = request.kinds.iter().filter(|(_, k)| **k == Kind::Gradient).map(|(v, _)| v);
        let after = request.outputs.iter().chain(&request.effects).chain(request.pins.keys());
        for v in after.chain(gradients) {
            promised[root[v.index()].index()] = true;
        }
        let none = || vec![SmallVec::new(); nodes];
        Ok(Pass {
            graph,
            conversions,
            root,
            made,
            uses,
            promised,
            first: Vec::new(),
            before: none(),
            after: none(),
        })
    }

    fn is_read(&self, v: ValueId) -> bool {
        !self.uses[v.index()].is_empty()
    }

    fn dims(&self, v: ValueId) -> Dims {
        self.graph.value(v).meta.as_ref().map(|m| m.dims.clone()).unwrap_or_default()
    }

    fn value(&mut self, of: ValueId, what: &str, source: Source, meta: Meta) -> ValueId {
        let name = format!("{}#{what}", self.graph.value(of).name);
        let v = self.graph.add_value(name, source);
        self.graph.value_mut(v).meta = Some(meta);
        v
    }

    /// A value that a node yet to be placed makes of another.
    fn converted(
        &mut self,
        of: ValueId,
        what: &str,
        from: ValueId,
        op: impl Op + 'static,
    ) -> Result<(ValueId, Node)> {
        let meta = op.infer(&[self.graph.value(from).meta.as_ref()]);
        let meta = meta.map_err(|source| Error::Op {
            node: format!("{what} of '{}'", self.graph.value(of).name),
            source,
        })?;
        let made = Source::Node(NodeId(0), 0);
        let v =
            self.value(of, what, made, meta.into_iter().next().unwrap_or_else(|| Meta::new(DType::F32, &[])));
        let node =
            Node { name: String::new(), op: Arc::new(op), inputs: vec![Some(from)], outputs: vec![Some(v)] };
        Ok((v, node))
    }

    /// Rounds a value that is read late, and has its late readers read that.
    fn save(&mut self, v: ValueId, to: DType) -> Result<()> {
        let value = self.graph.value(v);
        let large = value.meta.as_ref().is_some_and(|m| m.dtype == DType::F32 && m.bytes() >= SMALL);
        let made = match value.source {
            Source::Node(..) => self.made[v.index()],
            Source::Input => None,
            _ => return Ok(()),
        };
        if !large || self.promised[v.index()] {
            return Ok(());
        }
        let uses = &self.uses[v.index()];
        let mut last = made.map_or(0, |m| m.0);
        let near = uses.iter().take_while(|u| u.at - std::mem::replace(&mut last, u.at) <= NEAR).count();
        if near == uses.len() {
            return Ok(());
        }
        let uses = std::mem::take(&mut self.uses[v.index()]);
        // (Whoever converts: results are the same bits.)
        // Where values are computed again, it is of what was kept: all that read it meanwhile read the same.
        let by_all = self.conversions == Conversions::Reads
            || made.is_some_and(|(_, id)| self.graph.node(id).op.is_kept_rounded());
        let near = if by_all { 0 } else { near };
        // Near readers that would round it themselves read what is rounded.
        let (rounding, near_ones): (Vec<Use>, Vec<Use>) =
            uses[..near].iter().partition(|u| to == DType::BF16 && self.rounds(u));
        let of_half = [&rounding[..], &uses[near..]].concat();
        if let Some((_, id)) = made
            && let Some(half) = match near_ones.is_empty() {
                true => self.halved(v, id, to),
                false => self.rounded(v, id, to),
            }
        {
            return self.widen(half, &of_half);
        }
        let (half, node) = self.converted(v, "half", v, Narrow { to })?;
        match near_ones.last() {
            // One that works in place overwrites the value: it is rounded before.
            Some(u) if rounding.is_empty() && self.overwrites(u) => self.before[u.node.index()].push(node),
            Some(u) if rounding.is_empty() => self.after[u.node.index()].push(node),
            _ => match made {
                Some((_, id)) => self.after[id.index()].push(node),
                None => self.first.push(node),
            },
        }
        self.widen(half, &of_half)
    }

    /// Does the reader round the value before it computes with it?
    fn rounds(&self, u: &Use) -> bool {
        let node = self.graph.node(u.node);
        node.op.rounds(&self.graph.metas(&node.inputs), u.input)
    }

    /// Has the node that makes a value put out its half form instead, or as well, if its operator can.
    fn halved(&mut self, v: ValueId, id: NodeId, to: DType) -> Option<ValueId> {
        let instead = match self.conversions {
            Conversions::Kernels => self.instead(v, id, to),
            _ => None,
        };
        instead.or_else(|| self.rounded(v, id, to))
    }

    /// Has the node that makes a value put out its half form instead, if its operator can.
    fn instead(&mut self, v: ValueId, id: NodeId, to: DType) -> Option<ValueId> {
        let node = self.graph.node(id);
        let output = node.outputs.iter().position(|y| *y == Some(v))?;
        let op = node.op.halved(output, to)?;
        let made = op.infer(&self.graph.metas(&node.inputs)).ok()?;
        let half = self.value(v, "half", Source::Node(id, output), made.into_iter().nth(output)?);
        let node = &mut self.graph.nodes[id.index()];
        (node.op, node.outputs[output]) = (op, Some(half));
        Some(half)
    }

    /// Rounds where it is made a gradient of what products read or made: what only products read that would round it, and sums over
    /// it, and what a product by pairs passes on to a normalisation. Less memory, and less to read.
    fn round_for_products(&mut self, v: ValueId, to: DType) -> Result<()> {
        let value = self.graph.value(v);
        let large = value.meta.as_ref().is_some_and(|m| m.dtype == DType::F32 && m.bytes() >= SMALL);
        let (Some((_, id)), true) = (self.made[v.index()], large && to == DType::BF16) else {
            return Ok(());
        };
        let maker = self.graph.node(id);
        let Some(output) = maker.outputs.iter().position(|y| *y == Some(v)) else { return Ok(()) };
        let made_so = maker.op.rounds(&self.graph.metas(&maker.inputs), 0);
        let uses = &self.uses[v.index()];
        let read_so = !uses.is_empty() && uses.iter().all(|u| self.rounds(u) || self.takes_rounded(u));
        let can = maker.op.halved(output, to).is_some();
        if self.promised[v.index()] || !read_so || !can || !made_so && !uses.iter().any(|u| self.rounds(u)) {
            return Ok(());
        }
        let uses = std::mem::take(&mut self.uses[v.index()]);
        if self.conversions == Conversions::Apart {
            let (half, node) = self.converted(v, "half", v, Narrow { to })?;
            self.after[id.index()].push(node);
            return self.widen(half, &uses);
        }
        match self.instead(v, id, to) {
            Some(half) => self.widen(half, &uses),
            None => Ok(()),
        }
    }

    /// Has the node that makes a value put out its half form too, if its operator can.
    fn rounded(&mut self, v: ValueId, id: NodeId, to: DType) -> Option<ValueId> {
        let node = self.graph.node(id);
        if self.conversions != Conversions::Kernels || node.output() != Some(v) {
            return None;
        }
        let op = node.op.rounding(to)?;
        let inputs = self.graph.metas(&node.inputs);
        let made = op.infer(&inputs).ok()?;
        drop(inputs);
        let (place, meta) = made.into_iter().enumerate().next_back()?;
        let half = self.value(v, "half", Source::Node(id, place), meta);
        let node = &mut self.graph.nodes[id.index()];
        node.op = op;
        node.outputs.resize(place, None);
        node.outputs.push(Some(half));
        Some(half)
    }

    fn overwrites(&self, u: &Use) -> bool {
        let node = self.graph.node(u.node);
        let root = self.root[u.value.index()];
        let times = node.inputs.iter().flatten().filter(|v| self.root.get(v.index()) == Some(&root)).count();
        times == 1 && node.op.in_place().iter().any(|p| p.0 == u.input)
    }

    fn takes_rounded(&self, u: &Use) -> bool {
        let node = self.graph.node(u.node);
        node.op.takes_rounded(&self.graph.metas(&node.inputs), u.input)
    }

    /// Does the reader widen such elements by itself?
    fn reads_half(&self, u: &Use, half: Option<DType>) -> bool {
        let by_kernel = self.conversions != Conversions::Apart;
        let node = self.graph.node(u.node);
        let reads = node.op.reads_half(&self.graph.metas(&node.inputs), u.input);
        by_kernel && (reads || self.rounds(u) || half == Some(DType::BF16) && self.takes_rounded(u))
    }

    /// Has readers read `half`, or widened copies of it.
    fn widen(&mut self, half: ValueId, uses: &[Use]) -> Result<()> {
        let mut copies: SmallVec<[(Dims, ValueId); 2]> = SmallVec::new();
        let dtype = self.graph.value(half).meta.as_ref().map(|m| m.dtype);
        let mut last = 0;
        for u in uses {
            if u.at - last > TOGETHER {
                copies.clear();
            }
            last = u.at;
            let dims = self.dims(u.value);
            if self.reads_half(u, dtype) {
                let copy = match self.dims(half) == dims {
                    true => half,
                    false => {
                        let (view, node) = self.converted(u.value, "half", half, ReshapeTo { dims })?;
                        self.before[u.node.index()].push(node);
                        view
                    }
                };
                self.graph.nodes[u.node.index()].inputs[u.input] = Some(copy);
                continue;
            }
            let copy = match (copies.iter().find(|c| c.0 == dims), copies.first().cloned()) {
                (Some((_, copy)), _) => *copy,
                (None, first) => {
                    let (copy, node) = match first {
                        None => self.converted(u.value, "wide", half, Widen { dims: dims.clone() })?,
                        Some((_, first)) => {
                            self.converted(u.value, "wide", first, ReshapeTo { dims: dims.clone() })?
                        }
                    };
                    self.before[u.node.index()].push(node);
                    copies.push((dims, copy));
                    copy
                }
            };
            self.graph.nodes[u.node.index()].inputs[u.input] = Some(copy);
        }
        Ok(())
    }

    /// Has everyone read a state, or a weight of the file, in the type that it is kept in.
    fn kept_in_half(&mut self, v: ValueId, dtype: DType) -> Result<()> {
        let uses = std::mem::take(&mut self.uses[v.index()]);
        let meta = Meta::new(dtype, &self.dims(v));
        let source = self.graph.value(v).source.clone();
        let half = self.value(v, "half", source, meta);
        // An update rounds by itself.
        let (updates, reads): (Vec<Use>, Vec<Use>) = uses
            .into_iter()
            .partition(|u| self.graph.node(u.node).op.updates().iter().any(|p| p.0 == u.input));
        self.widen(half, &reads)?;
        for u in updates {
            let node = &mut self.graph.nodes[u.node.index()];
            node.inputs[u.input] = Some(half);
            let next = node.op.updates().iter().find(|p| p.0 == u.input).map(|p| p.1);
            let next = next.and_then(|o| node.outputs.get(o).copied().flatten());
            let Some(meta) = next.and_then(|v| self.graph.value_mut(v).meta.as_mut()) else {
                let node = self.graph.node(u.node);
                return Err(Error::value(
                    &self.graph.value(v).name,
                    format!("{} makes nothing", op_type(node.op.as_ref())),
                ));
            };
            meta.dtype = dtype;
        }
        Ok(())
    }

    /// Puts the new nodes in their places.
    fn finish(self) {
        let (graph, mut nodes) = (self.graph, self.first);
        let old = std::mem::take(&mut graph.nodes);
        for ((node, before), after) in old.into_iter().zip(self.before).zip(self.after) {
            nodes.extend(before);
            nodes.push(node);
            nodes.extend(after);
        }
        graph.nodes = makers_first(nodes, graph.values.len());
        for i in 0..graph.nodes.len() {
            for (o, v) in graph.nodes[i].outputs.iter().enumerate() {
                let Some(v) = v else { continue };
                let source = &mut graph.values[v.index()].source;
                if matches!(source, Source::Node(..)) {
                    *source = Source::Node(NodeId(i as u32), o);
                }
            }
        }
    }
}

/// The nodes as they are, but none before one that makes what it reads: a copy was put beside the first of its readers to run,
/// and one that makes little runs before others that are numbered before it.
fn makers_first(nodes: Vec<Node>, values: usize) -> Vec<Node> {
    let mut maker = vec![None; values];
    for (i, node) in nodes.iter().enumerate() {
        node.outputs.iter().flatten().for_each(|v| maker[v.index()] = Some(i));
    }
    let mut left: Vec<Option<Node>> = nodes.into_iter().map(Some).collect();
    let mut sorted = Vec::with_capacity(left.len());
    for i in 0..left.len() {
        let mut next = vec![i];
        while let Some(&i) = next.last() {
            let read = left[i].iter().flat_map(|node| node.inputs.iter().flatten());
            let missing = read.filter_map(|v| maker[v.index()]).find(|m| left[*m].is_some());
            match missing {
                Some(m) => next.push(m),
                None => {
                    sorted.extend(left[i].take());
                    next.pop();
                }
            }
        }
    }
    sorted
}

#[cfg(test)]
mod tests;
