//! From a graph to a list of kernel calls on one arena: every offset fixed before the first step.

mod arena;
mod order;
mod recompute;
mod repeats;
mod report;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::error::{Error, OpError, Result};
use crate::graph::{Graph, Node, NodeId, Source, StateId, ValueId, WeightId};
use crate::ops::Op;
use crate::tensor::{ALIGN, DType, Dims, Meta};

pub use arena::{Block, assign};
pub(crate) use order::order;
pub use recompute::{Again, all_work, drop_within, keep_statistics, plan_dropping, work};
pub use report::{Kind, Peak};

use repeats::Wiring;

/// What a plan must compute.
#[derive(Debug, Default, Clone)]
pub struct Request {
    /// Values that can be read after the run.
    pub outputs: Vec<ValueId>,
    /// Values that are the next content of a state (see `Op::updates`): computed for that effect alone.
    pub effects: Vec<ValueId>,
    /// Values that are stored in a state's memory instead of the arena, for other programs of the session: in
    /// what order of axes is the session's affair.
    pub pins: HashMap<ValueId, StateId>,
    /// What the memory of these values is reported as (gradients; the rest are activations).
    pub kinds: HashMap<ValueId, Kind>,
    /// `true`: every value keeps a block of its own and nothing runs in place (a memory mode for tests).
    pub no_reuse: bool,
}

/// Where an operand lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// Index into the step's cuts of the arena.
    Arena(usize),
    /// Index into the step's cuts of the store.
    Store(usize),
    /// Index into `Plan::constants`.
    Constant(usize),
    /// Absent, or handed over in an output's buffer.
    None,
}

/// One operand of a kernel call.
#[derive(Debug, Clone)]
pub struct Operand {
    pub dtype: DType,
    pub dims: Dims,
    pub place: Place,
}

/// A run of bytes that one kernel call reads or writes; a step's cuts are sorted and do not overlap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    pub range: Range<usize>,
    pub write: bool,
}

/// A cut of persistent memory; the session knows where the state lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateCut {
    pub state: StateId,
    pub write: bool,
}

/// One kernel call.
#[derive(Debug, Clone)]
pub struct Step {
    pub op: Arc<dyn Op>,
    pub node: NodeId,
    pub x: SmallVec<[Operand; 4]>,
    pub y: SmallVec<[Operand; 2]>,
    pub arena: SmallVec<[Cut; 6]>,
    pub store: SmallVec<[StateCut; 4]>,
    /// Index into `arena` of the scratch memory, if any.
    pub scratch: Option<usize>,
    /// The node whose random numbers it draws: its own, or the one that it computes again.
    pub draws_as: NodeId,
}

/// What a constant operand is taken from.
#[derive(Debug, Clone)]
pub enum Constant {
    Tensor(Arc<crate::tensor::Tensor>),
    Weight(WeightId),
}

/// Where a value that is fed or read by the caller lies.
#[derive(Debug, Clone)]
pub enum Location {
    Arena(Range<usize>),
    State(StateId),
    Constant(usize),
}

/// An ordered list of kernel calls with all memory assigned.
#[derive(Debug, Clone)]
pub struct Plan {
    pub steps: Vec<Step>,
    pub constants: Vec<Constant>,
    pub arena_bytes: usize,
    /// Fed values and where they are copied to.
    pub inputs: Vec<(ValueId, Meta, Range<usize>)>,
    pub outputs: HashMap<ValueId, (Meta, Location)>,
    /// Arena memory at its peak, by kind.
    pub peak: Peak,
    /// Every arena block with its lifetime in steps, for pictures and reports.
    pub blocks: Vec<Block>,
    /// What is computed more than once.
    pub again: Again,
}

/// Storage that values share: of their own kind outside the arena, or a block of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Home {
    Block(usize),
    State(StateId),
    Constant(usize),
}

/// Orders the nodes, decides what shares memory, and assigns the arena; within a limit, in as small an arena as that asks for, or
/// as is found.
///
/// `scratch`: bytes for each node, see [`scratch`].
pub fn plan(graph: &Graph, request: &Request, scratch: &[usize], limit: Option<usize>) -> Result<Plan> {
    let order = order::order(graph, request)?;
    Planner::new(Wiring::of(graph), request, &order, scratch)?.finish(limit)
}

struct Planner<'a> {
    graph: Wiring<'a>,
    request: &'a Request,
    order: &'a [NodeId],
    homes: Vec<Option<Home>>,
    blocks: Vec<Block>,
    constants: Vec<Constant>,
    constant_of: HashMap<ValueId, usize>,
    /// Per value: the last step that reads it (`usize::MAX`: readable after the run).
    last_use: Vec<usize>,
    /// Per step: the input handed over in an output's buffer.
    hidden: Vec<SmallVec<[usize; 2]>>,
    /// Per node, bytes of scratch memory: those of what is computed again are the first time's.
    scratch: &'a [usize],
}

/// Bytes of scratch memory of each node.
pub fn scratch(graph: &Graph) -> Vec<usize> {
    let of = |n: &Node| if n.op.is_view() { 0 } else { n.op.scratch(&graph.metas(&n.inputs)) };
    graph.nodes.iter().map(of).collect()
}

/// Step 0 is the feeding of inputs; node `i` of the order runs at `i + 1`.
fn time(position: usize) -> usize {
    position + 1
}

impl<'a> Planner<'a> {
    fn new(
        graph: Wiring<'a>,
        request: &'a Request,
        order: &'a [NodeId],
        scratch: &'a [usize],
    ) -> Result<Self> {
        let mut planner = Planner {
            graph,
            request,
            order,
            homes: vec![None; graph.values()],
            blocks: Vec::new(),
            constants: Vec::new(),
            constant_of: HashMap::new(),
            last_use: vec![0; graph.values()],
            hidden: vec![SmallVec::new(); order.len()],
            scratch,
        };
        planner.find_last_uses();
        for v in &graph.graph.inputs {
            let used = planner.last_use[v.index()] > 0;
            if used && matches!(graph.source(*v), Source::Input) {
                let block = planner.new_block(*v, 0)?;
                planner.homes[v.index()] = Some(Home::Block(block));
            }
        }
        for position in 0..order.len() {
            planner.place_outputs(position)?;
        }
        Ok(planner)
    }

    /// A view is used as long as what it views: last uses flow from views back to their sources.
    fn find_last_uses(&mut self) {
        for (position, id) in self.order.iter().enumerate() {
            for v in self.graph.node(*id).inputs.iter().flatten() {
                self.last_use[v.index()] = time(position);
            }
        }
        for v in &self.request.outputs {
            self.last_use[v.index()] = usize::MAX;
        }
        for id in self.order.iter().rev() {
            let node = self.graph.node(*id);
            if let Some((x, y)) = node.view().filter(|(_, y)| !self.request.pins.contains_key(y)) {
                self.last_use[x.index()] = self.last_use[x.index()].max(self.last_use[y.index()]);
            }
        }
    }

    fn meta(&self, v: ValueId) -> Result<&'a Meta> {
        self.graph.meta(v)
    }

    fn new_block(&mut self, v: ValueId, born: usize) -> Result<usize> {
        let meta = self.meta(v)?;
        let last = if self.request.no_reuse { usize::MAX } else { self.last_use[v.index()].max(born) };
        let kind = self.request.kinds.get(&v).copied().unwrap_or(Kind::Activation);
        self.blocks.push(Block { bytes: meta.bytes(), born, dies: last, offset: 0, kind, name: v });
        Ok(self.blocks.len() - 1)
    }

    /// Where an operand's elements are.
    fn home(&mut self, v: ValueId) -> Result<Home> {
        if let Some(home) = self.homes[v.index()] {
            return Ok(home);
        }
        let home = match self.graph.source(v) {
            Source::State(s) => Home::State(*s),
            Source::Constant(t) => Home::Constant(self.constant(v, Constant::Tensor(t.clone()))),
            Source::Weight(w) => Home::Constant(self.constant(v, Constant::Weight(*w))),
            Source::Input | Source::Node(..) => {
                return Err(Error::value(self.graph.name(v), "read before it is computed"));
            }
        };
        self.homes[v.index()] = Some(home);
        Ok(home)
    }

    fn constant(&mut self, v: ValueId, constant: Constant) -> usize {
        let next = self.constants.len();
        *self.constant_of.entry(v).or_insert_with(|| {
            self.constants.push(constant);
            next
        })
    }

    fn place_outputs(&mut self, position: usize) -> Result<()> {
        let id = self.order[position];
        let node = self.graph.node(id);
        let mut inputs: SmallVec<[Option<Home>; 8]> = SmallVec::new();
        for v in &node.inputs {
            inputs.push(match v {
                Some(v) => Some(self.home(*v)?),
                None => None,
            });
        }
        for (o, y) in node.outputs.iter().enumerate() {
            let Some(y) = y else { continue };
            if matches!(self.graph.source(*y), Source::Constant(_)) {
                continue;
            }
            let home = self.output_home(position, o, *y, &inputs)?;
            self.homes[y.index()] = Some(home);
            if let Home::Block(b) = home {
                let last = self.last_use[y.index()].max(time(position));
                let block = &mut self.blocks[b];
                block.dies = block.dies.max(last);
            }
        }
        Ok(())
    }

    fn output_home(
        &mut self,
        position: usize,
        o: usize,
        y: ValueId,
        inputs: &[Option<Home>],
    ) -> Result<Home> {
        let id = self.order[position];
        let node = self.graph.node(id);
        let updated = node.op.updates().iter().find(|u| u.1 == o).map(|u| u.0);
        if let Some(i) = updated
            && let Some(Some(Home::State(s))) = inputs.get(i)
        {
            self.hidden[position].push(i);
            return Ok(Home::State(*s));
        }
        if let Some(state) = self.request.pins.get(&y) {
            return Ok(Home::State(*state));
        }
        if o == 0
            && node.op.is_view()
            && let Some(Some(home)) = inputs.first()
        {
            return Ok(*home);
        }
        if updated.is_none() && !self.request.no_reuse && self.hidden[position].is_empty() {
            for &(i, _) in node.op.in_place().iter().filter(|p| p.1 == o) {
                let Some(Some(Home::Block(b))) = inputs.get(i) else { continue };
                let alone = inputs.iter().filter(|h| **h == Some(Home::Block(*b))).count() == 1;
                let block = &self.blocks[*b];
                if alone && block.dies == time(position) && block.bytes == self.meta(y)?.bytes() {
                    self.hidden[position].push(i);
                    return Ok(Home::Block(*b));
                }
            }
        }
        Ok(Home::Block(self.new_block(y, time(position))?))
    }

    /// Gives every step its scratch memory, by index of the block, and ends all lifetimes with the plan.
    fn close(&mut self) -> Vec<Option<usize>> {
        let end = time(self.order.len());
        let mut scratch = vec![None; self.order.len()];
        for (position, id) in self.order.iter().enumerate() {
            let node = self.graph.node(*id);
            let bytes = self.scratch[self.graph.first(*id).index()];
            if bytes > 0 {
                let name = node.outputs.iter().flatten().next().copied().unwrap_or(ValueId(0));
                let at = time(position);
                self.blocks.push(Block { bytes, born: at, dies: at, offset: 0, kind: Kind::Scratch, name });
                scratch[position] = Some(self.blocks.len() - 1);
            }
        }
        for b in &mut self.blocks {
            b.dies = b.dies.min(end);
        }
        scratch
    }

    /// The plan; within a limit, in as small an arena as that asks for, or as was found.
    fn finish(mut self, limit: Option<usize>) -> Result<Plan> {
        let end = time(self.order.len());
        let scratch = self.close();
        let arena_bytes = assign(&mut self.blocks, limit);
        let mut steps = Vec::with_capacity(self.order.len());
        for (position, scratch) in scratch.into_iter().enumerate() {
            if let Some(step) = self.step(position, scratch)? {
                steps.push(step);
            }
        }
        let mut inputs = Vec::new();
        for v in &self.graph.graph.inputs {
            if let Some(Home::Block(b)) = self.homes[v.index()] {
                inputs.push((*v, self.meta(*v)?.clone(), self.range(b, self.meta(*v)?.bytes())));
            }
        }
        let mut outputs = HashMap::new();
        for v in &self.request.outputs {
            let meta = self.meta(*v)?.clone();
            let location = match self.home(*v)? {
                Home::Block(b) => Location::Arena(self.range(b, meta.bytes())),
                Home::State(s) => Location::State(s),
                Home::Constant(c) => Location::Constant(c),
            };
            outputs.insert(*v, (meta, location));
        }
        let peak = Peak::of(&self.blocks, arena_bytes, end);
        Ok(Plan {
            steps,
            constants: self.constants,
            arena_bytes,
            inputs,
            outputs,
            peak,
            blocks: self.blocks,
            again: Again::default(),
        })
    }

    fn range(&self, block: usize, bytes: usize) -> Range<usize> {
        let offset = self.blocks[block].offset;
        offset..offset + bytes
    }

    /// The kernel call of one node; `None` for views that are already where they should be.
    fn step(&mut self, position: usize, scratch: Option<usize>) -> Result<Option<Step>> {
        let id = self.order[position];
        let node = self.graph.node(id);
        if node.outputs.iter().flatten().all(|v| matches!(self.graph.source(*v), Source::Constant(_))) {
            return Ok(None);
        }
        let mut operands: Vec<(bool, usize, Meta, Home)> = Vec::new();
        for (i, v) in node.inputs.iter().enumerate() {
            if let Some(v) = v {
                operands.push((false, i, self.meta(*v)?.clone(), self.home(*v)?));
            }
        }
        for (o, v) in node.outputs.iter().enumerate() {
            let Some(v) = v else { continue };
            match self.homes[v.index()] {
                Some(home) => operands.push((true, o, self.meta(*v)?.clone(), home)),
                None => return Err(self.internal(id, format!("output {o} has no place"))),
            }
        }
        let is_view = node.op.is_view();
        if is_view && operands.len() >= 2 && operands.first().map(|o| o.3) == operands.last().map(|o| o.3) {
            return Ok(None);
        }
        let mut arena: SmallVec<[Cut; 6]> = SmallVec::new();
        let mut store: SmallVec<[StateCut; 4]> = SmallVec::new();
        for (write, i, meta, home) in &operands {
            let hidden = !write && self.hidden[position].contains(i);
            match home {
                Home::Block(b) if !hidden => merge_cut(&mut arena, self.range(*b, meta.bytes()), *write)
                    .map_err(|what| self.internal(id, what))?,
                Home::State(s) if !hidden => match store.iter_mut().find(|c| c.state == *s) {
                    Some(cut) if cut.write || *write => {
                        return Err(self.internal(id, "a state is read and written by one kernel".into()));
                    }
                    Some(_) => {}
                    None => store.push(StateCut { state: *s, write: *write }),
                },
                _ => {}
            }
        }
        if let Some(b) = scratch {
            let bytes = self.blocks[b].bytes;
            merge_cut(&mut arena, self.range(b, bytes), true).map_err(|what| self.internal(id, what))?;
        }
        arena.sort_by_key(|c| (c.range.start, c.range.end));
        store.sort_by_key(|c| c.state);
        // Where nothing lies, something else may begin.
        let cut_of = |block: usize, bytes: usize| {
            let start = self.blocks[block].offset;
            arena.iter().position(|c| c.range.start == start && c.range.is_empty() == (bytes == 0))
        };
        let absent = || Operand { dtype: DType::F32, dims: Dims::new(), place: Place::None };
        let mut x: SmallVec<[Operand; 4]> = (0..node.inputs.len()).map(|_| absent()).collect();
        let mut y: SmallVec<[Operand; 2]> = (0..node.outputs.len()).map(|_| absent()).collect();
        for (write, i, meta, home) in operands {
            let hidden = !write && self.hidden[position].contains(&i);
            let place = match home {
                _ if hidden => Place::None,
                Home::Constant(c) => Place::Constant(c),
                Home::State(s) => Place::Store(store.iter().position(|c| c.state == s).unwrap_or(0)),
                Home::Block(b) => match cut_of(b, meta.bytes()) {
                    Some(cut) => Place::Arena(cut),
                    None => return Err(self.internal(id, "an operand has no cut".into())),
                },
            };
            let operand = Operand { dtype: meta.dtype, dims: meta.dims, place };
            match write {
                true => y[i] = operand,
                false => x[i] = operand,
            }
        }
        let scratch = scratch.and_then(|b| cut_of(b, self.blocks[b].bytes));
        let draws_as = self.graph.first(id);
        Ok(Some(Step { op: node.op.clone(), node: id, x, y, arena, store, scratch, draws_as }))
    }

    fn internal(&self, id: NodeId, what: String) -> Error {
        Error::Op { node: self.graph.describe(id), source: OpError::Internal(what) }
    }
}

/// Adds a range to the cuts of a step: equal ranges that are only read are one cut.
fn merge_cut(
    cuts: &mut SmallVec<[Cut; 6]>,
    range: Range<usize>,
    write: bool,
) -> std::result::Result<(), String> {
    for c in cuts.iter_mut() {
        if c.range == range && (range.is_empty() || (!c.write && !write)) {
            return Ok(());
        }
        let both = !c.range.is_empty() && !range.is_empty();
        if both && c.range.start < range.end && range.start < c.range.end {
            return Err(format!("memory {range:?} and {:?} overlap in one kernel", c.range));
        }
    }
    cuts.push(Cut { range, write });
    Ok(())
}

/// Rounds up to the alignment of tensors.
pub(crate) fn aligned(bytes: usize) -> usize {
    bytes.div_ceil(ALIGN) * ALIGN
}
