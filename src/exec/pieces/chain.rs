//! Which kernel calls are chained: those that make large values, and all that read these.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use super::{Onto, Output, Pieces};
use crate::error::{Error, OpError, Result};
use crate::exec::session::Frozen;
use crate::graph::{Graph, Node, NodeId, Source, StateId, ValueId};
use crate::ops::piece::{self, Piece};
use crate::ops::update::Accumulate;
use crate::ops::{self, Op};
use crate::plan::{self, Constant, Request};
use crate::tensor::{Meta, Tensor};

/// Pieces that a batch is cut into, at most.
const MOST: usize = 8;
/// Values are never whole that are larger than this share of the largest one that need not be.
const LARGE: usize = 4;

/// The graph with its largest values made and read in pieces. `None`: there are none that can be.
///
/// `scratch`: see [`plan::scratch`].
pub fn cut(
    graph: &Graph,
    request: &Request,
    scratch: &dyn Fn(&Graph) -> Vec<usize>,
) -> Result<Option<Graph>> {
    // As nodes are numbered, for a chain takes the place, among them, of one of its own.
    let mut order = plan::order(graph, request)?;
    order.sort();
    let Some(finder) = Finder::new(graph, request, &order) else { return Ok(None) };
    let chains = finder.chains();
    let mut new = graph.clone();
    for chain in &chains {
        finder.replace(&mut new, chain, scratch)?;
    }
    // (A weight might be read after its update.)
    let fits = !chains.is_empty() && plan::order(&new, request).is_ok();
    Ok(fits.then_some(new))
}

/// What is computed from the same large values: nodes by their places in the order.
struct Chain {
    /// Nodes that make the large values.
    inner: BTreeSet<usize>,
    /// Nodes that read them and make others. All run where the first of them did.
    last: BTreeSet<usize>,
}

impl Chain {
    fn at(&self) -> usize {
        self.last.first().copied().unwrap_or_default()
    }

    fn nodes(&self) -> impl Iterator<Item = usize> {
        self.inner.union(&self.last).copied()
    }
}

struct Finder<'a> {
    graph: &'a Graph,
    order: &'a [NodeId],
    count: usize,
    /// Per place in the order: the node's operator for a piece.
    pieces: Vec<Option<Piece>>,
    /// Per value: where it is made.
    made: Vec<Option<usize>>,
    /// Per value: it is not to be whole.
    large: Vec<bool>,
}

impl<'a> Finder<'a> {
    fn new(graph: &'a Graph, request: &Request, order: &'a [NodeId]) -> Option<Self> {
        let after = request.outputs.iter().chain(&request.effects).chain(request.pins.keys());
        let mut made = vec![None; graph.values.len()];
        let mut promised = vec![false; graph.values.len()];
        after.for_each(|v| promised[v.index()] = true);
        for (at, id) in order.iter().enumerate() {
            graph.node(*id).outputs.iter().flatten().for_each(|v| made[v.index()] = Some(at));
        }
        let bytes = |v: usize| graph.values[v].meta.as_ref().map_or(0, Meta::bytes);
        // Of any number of pieces; how many there are depends on the largest value.
        for count in (2..=MOST).rev() {
            let pieces: Vec<Option<Piece>> = order.iter().map(|id| in_pieces(graph, *id, count)).collect();
            let mut large: Vec<bool> = (0..graph.values.len())
                .map(|v| {
                    let maker = made[v].and_then(|at| pieces[at].as_ref());
                    !promised[v] && maker.is_some_and(|p| p.made == ops::Made::Cut)
                })
                .collect();
            let mut read = vec![false; graph.values.len()];
            for (id, piece) in order.iter().zip(&pieces) {
                for (slot, v) in graph.node(*id).inputs.iter().enumerate() {
                    let Some(v) = v else { continue };
                    read[v.index()] = true;
                    large[v.index()] &= piece.as_ref().is_some_and(|p| p.cuts(slot));
                }
            }
            let largest = (0..large.len()).filter(|v| large[*v] && read[*v]).map(bytes).max().unwrap_or(0);
            if largest == 0 {
                continue;
            }
            for (v, l) in large.iter_mut().enumerate() {
                *l &= read[v] && bytes(v) * LARGE > largest;
            }
            return Some(Finder { graph, order, count, pieces, made, large });
        }
        None
    }

    fn node(&self, at: usize) -> &'a Node {
        self.graph.node(self.order[at])
    }

    fn is_large(&self, v: ValueId) -> bool {
        self.large[v.index()]
    }

    /// The nodes that make what a node reads of large values.
    fn inner(&self, at: usize) -> BTreeSet<usize> {
        let (mut inner, mut stack) = (BTreeSet::new(), vec![at]);
        while let Some(at) = stack.pop() {
            let read = self.node(at).inputs.iter().flatten().filter(|v| self.is_large(**v));
            stack.extend(read.filter_map(|v| self.made[v.index()]).filter(|at| inner.insert(*at)));
        }
        inner
    }

    /// Is all that these nodes read, other than large values, there before a place?
    fn there(&self, mut nodes: impl Iterator<Item = usize>, before: usize) -> bool {
        nodes.all(|at| {
            let mut others = self.node(at).inputs.iter().flatten().filter(|v| !self.is_large(**v));
            others.all(|v| self.made[v.index()].is_none_or(|at| at < before))
        })
    }

    fn chains(&self) -> Vec<Chain> {
        let mut chains: Vec<Chain> = Vec::new();
        for at in 0..self.order.len() {
            let node = self.node(at);
            let reads = node.inputs.iter().flatten().any(|v| self.is_large(*v));
            if !reads || node.outputs.iter().flatten().any(|v| self.is_large(*v)) {
                continue;
            }
            let inner = self.inner(at);
            let of_same = chains.iter_mut().find(|c| {
                let nodes = inner.iter().copied().chain([at]);
                !c.inner.is_disjoint(&inner) && self.there(nodes, c.at())
            });
            match of_same {
                Some(c) => {
                    c.inner.extend(inner);
                    c.last.insert(at);
                }
                None => chains.push(Chain { inner, last: BTreeSet::from([at]) }),
            }
        }
        chains
    }

    /// Puts a node in the place of a chain's last ones.
    fn replace(
        &self,
        graph: &mut Graph,
        chain: &Chain,
        scratch: &dyn Fn(&Graph) -> Vec<usize>,
    ) -> Result<()> {
        let at = self.order[chain.at()];
        let made = self.build(chain, scratch);
        let (op, inputs, outputs) =
            made.map_err(|source| Error::Op { node: self.graph.describe(at), source })?;
        for id in chain.last.iter().map(|at| self.order[*at]) {
            graph.nodes[id.index()].outputs.fill(None);
        }
        for (o, v) in outputs.iter().enumerate() {
            graph.value_mut(*v).source = Source::Node(at, o);
        }
        let outputs = outputs.into_iter().map(Some).collect();
        graph.nodes[at.index()] = Node { name: String::new(), op: Arc::new(op), inputs, outputs };
        Ok(())
    }

    /// The chain's operator, its inputs and its outputs.
    #[allow(clippy::type_complexity)]
    fn build(
        &self,
        chain: &Chain,
        scratch: &dyn Fn(&Graph) -> Vec<usize>,
    ) -> std::result::Result<(Pieces, Vec<Option<ValueId>>, Vec<ValueId>), OpError> {
        // What it reads, cut or whole.
        let mut read: Vec<(ValueId, bool)> = Vec::new();
        for at in chain.nodes() {
            let piece = self.of_piece(at)?;
            for (slot, v) in self.node(at).inputs.iter().enumerate() {
                let Some(v) = v.filter(|v| !self.is_large(*v)) else { continue };
                if !read.contains(&(v, piece.cuts(slot))) {
                    read.push((v, piece.cuts(slot)));
                }
            }
        }
        let outputs: Vec<ValueId> =
            chain.last.iter().flat_map(|at| self.node(*at).outputs.iter().flatten()).copied().collect();
        let in_place = self.in_place(chain, &read, &outputs)?;
        let mut nested = Nested { graph: Graph::default(), request: Request::default(), count: self.count };
        let mut held: HashMap<(ValueId, bool), ValueId> = HashMap::new();
        for (i, key) in read.iter().enumerate() {
            let becomes = in_place.iter().find(|p| p.0 == i).map(|p| read.len() + p.1);
            let meta = self.meta(key.0)?;
            held.insert(*key, nested.state(becomes.unwrap_or(i), meta, key.1)?);
        }
        let (mut made, mut multiply_adds) = (Vec::new(), 0);
        for at in chain.nodes() {
            let (node, piece) = (self.node(at), self.of_piece(at)?);
            let mut x = Vec::with_capacity(node.inputs.len());
            for (slot, v) in node.inputs.iter().enumerate() {
                let key = v.map(|v| (v, self.is_large(v) || piece.cuts(slot)));
                x.push(key.and_then(|key| held.get(&key)).copied());
            }
            multiply_adds += piece.op.multiply_adds(&nested.graph.metas(&x)) * self.count;
            let Some(y) = node.output() else { continue };
            if !chain.last.contains(&at) {
                let meta = nested.piece(&self.meta(y)?)?;
                held.insert((y, true), nested.node(piece.op.clone(), x, meta));
                continue;
            }
            let (o, meta) = (made.len(), self.meta(y)?);
            let target = StateId((read.len() + o) as u32);
            let becomes = in_place.iter().find(|p| p.1 == o).map(|p| read[p.0].0);
            let becomes = becomes.and_then(|v| node.inputs.iter().position(|i| *i == Some(v)));
            let cut = piece.made == ops::Made::Cut;
            nested.last(piece, x, becomes, target, &meta)?;
            made.push(Output { meta, cut });
        }
        let scratch = scratch(&nested.graph);
        let plan = plan::plan(&nested.graph, &nested.request, &scratch, Some(0))
            .map_err(|e| OpError::Internal(e.to_string()))?;
        let constants = plan.constants.iter().filter_map(|c| match c {
            Constant::Tensor(t) => Some(Frozen::Owned(t.clone())),
            Constant::Weight(_) => None,
        });
        let constants = constants.collect();
        let cut = read.iter().map(|r| r.1).collect();
        let inputs = read.into_iter().map(|r| Some(r.0)).collect();
        let op = Pieces { count: self.count, plan, constants, cut, made, in_place, multiply_adds };
        Ok((op, inputs, outputs))
    }

    /// The node's operator for a piece.
    fn of_piece(&self, at: usize) -> std::result::Result<&Piece, OpError> {
        let piece = self.pieces[at].as_ref();
        piece.ok_or_else(|| OpError::Internal("an operator that cannot be cut, in a chain".into()))
    }

    /// Which of what a chain reads is changed where it lies, and into which of its outputs.
    fn in_place(
        &self,
        chain: &Chain,
        read: &[(ValueId, bool)],
        outputs: &[ValueId],
    ) -> std::result::Result<Vec<(usize, usize)>, OpError> {
        let mut found: Vec<(usize, usize)> = Vec::new();
        let reads =
            |at: usize, v: ValueId| self.node(at).inputs.iter().flatten().filter(|u| **u == v).count();
        for (o, at) in chain.last.iter().enumerate() {
            let (node, piece) = (self.node(*at), self.of_piece(*at)?);
            if piece.made != ops::Made::Cut {
                continue;
            }
            for &(i, _) in piece.op.in_place() {
                let Some(&Some(v)) = node.inputs.get(i) else { continue };
                let last = chain.nodes().filter(|at| reads(*at, v) > 0).last();
                let alone = reads(*at, v) == 1 && last == Some(*at) && !read.contains(&(v, false));
                let place = read.iter().position(|r| *r == (v, true));
                let same = self.meta(v)?.bytes() == self.meta(outputs[o])?.bytes();
                if let (true, true, Some(place)) = (alone, same, place) {
                    found.push((place, o));
                    break;
                }
            }
        }
        Ok(found)
    }

    fn meta(&self, v: ValueId) -> std::result::Result<Meta, OpError> {
        let meta = self.graph.meta(v).map_err(|e| OpError::Internal(e.to_string()))?;
        Ok(Meta::new(meta.dtype, &meta.dims))
    }
}

/// A node's operator for a piece, if it is one that can be chained.
fn in_pieces(graph: &Graph, id: NodeId, count: usize) -> Option<Piece> {
    let node = graph.node(id);
    let [Some(y)] = node.outputs[..] else { return None };
    let known = matches!(graph.value(y).source, Source::Constant(_));
    if known || !node.op.is_pure() || !node.op.updates().is_empty() || graph.again.contains_key(&id) {
        return None;
    }
    let metas = graph.metas(&node.inputs);
    let piece = node.op.in_pieces(&metas, count)?;
    let can = |whole: &Meta| piece::cut(&whole.dims, count).is_some();
    // (An operand may have the same elements in another shape.)
    let read = metas.iter().enumerate().all(|(slot, x)| x.is_none_or(|x| !piece.cuts(slot) || can(x)));
    (read && (piece.made != ops::Made::Cut || can(graph.value(y).meta.as_ref()?))).then_some(piece)
}

/// The graph of one piece.
struct Nested {
    graph: Graph,
    request: Request,
    count: usize,
}

impl Nested {
    fn state(&mut self, id: usize, whole: Meta, cut: bool) -> std::result::Result<ValueId, OpError> {
        let meta = if cut { self.piece(&whole)? } else { whole };
        let v = self.graph.add_value("", Source::State(StateId(id as u32)));
        self.graph.value_mut(v).meta = Some(meta);
        Ok(v)
    }

    fn piece(&self, whole: &Meta) -> std::result::Result<Meta, OpError> {
        let misfit = || OpError::Internal(format!("{:?} in {} pieces", whole.dims, self.count));
        Ok(Meta::new(whole.dtype, &piece::cut(&whole.dims, self.count).ok_or_else(misfit)?))
    }

    /// Adds a node of one output. (What it reads may be in half precision, of which inference knows nothing.)
    fn node(&mut self, op: Arc<dyn Op>, x: Vec<Option<ValueId>>, meta: Meta) -> ValueId {
        let y = self.graph.add_value("", Source::Node(NodeId(self.graph.nodes.len() as u32), 0));
        self.graph.value_mut(y).meta = Some(meta);
        self.graph.nodes.push(Node { name: String::new(), op, inputs: x, outputs: vec![Some(y)] });
        y
    }

    /// Emits a node that makes an output, or a part of one: into input `becomes`, which is that, or where `target` is.
    fn last(
        &mut self,
        piece: &Piece,
        mut x: Vec<Option<ValueId>>,
        becomes: Option<usize>,
        target: StateId,
        whole: &Meta,
    ) -> std::result::Result<(), OpError> {
        let onto = |i: usize| Arc::new(Onto { op: piece.op.clone(), updates: [(i, 0)] });
        let y = match (piece.made, becomes) {
            (ops::Made::Cut, None) => {
                let meta = self.piece(whole)?;
                let y = self.node(piece.op.clone(), x, meta);
                self.request.pins.insert(y, target);
                return Ok(());
            }
            (ops::Made::Cut, Some(i)) => {
                let meta = self.piece(whole)?;
                self.node(onto(i), x, meta)
            }
            (ops::Made::Sum { onto: Some(i) }, _) => {
                x.resize(x.len().max(i + 1), None);
                x[i] = Some(self.state(target.index(), whole.clone(), false)?);
                self.node(onto(i), x, whole.clone())
            }
            (ops::Made::Sum { onto: None }, _) => {
                let part = self.node(piece.op.clone(), x, whole.clone());
                let sum = self.state(target.index(), whole.clone(), false)?;
                let weight = Arc::new(Tensor::from_slice(&[2], &[1.0f64, 0.0])?);
                let weight = self.graph.add_value("", Source::Constant(weight));
                self.node(Arc::new(Accumulate), vec![Some(sum), Some(part), Some(weight)], whole.clone())
            }
        };
        self.request.effects.push(y);
        Ok(())
    }
}
