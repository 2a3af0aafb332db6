//! A schedule in which some values are computed again.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::{Cuts, Search};
use crate::graph::{Graph, Node, NodeId, Source, StateId, ValueId};
use crate::ops::Op;

/// A schedule.
pub(super) struct Built {
    pub graph: Graph,
    pub order: Vec<NodeId>,
    /// Per place in the order.
    pub events: Vec<u32>,
    /// Per value: what it is a copy of, or itself.
    pub origins: Vec<ValueId>,
    /// Per original value: the events that compute or read it.
    pub touched: HashMap<ValueId, Vec<u32>>,
    pub copies: usize,
    /// Work of the copies.
    pub extra: f64,
}

impl Search<'_> {
    /// The schedule for some cuts; `None`: a state would be read after its update. `base` is the search's graph, or the
    /// one that it is of.
    pub(super) fn build(&self, base: &Graph, cuts: &Cuts) -> Option<Built> {
        let values = base.values.len();
        let mut w = Writer {
            search: self,
            built: Built {
                graph: base.clone(),
                order: Vec::with_capacity(self.order.len()),
                events: Vec::with_capacity(self.order.len()),
                origins: (0..values as u32).map(ValueId).collect(),
                touched: HashMap::new(),
                copies: 0,
                extra: 0.0,
            },
            present: (0..values as u32).map(|v| Some(ValueId(v))).collect(),
            updated: HashSet::new(),
            event: 0,
            recent: Vec::new(),
        };
        for (v, _) in self.fixed.iter().enumerate().filter(|f| *f.1) {
            w.present[v] = None;
        }
        for (event, id) in self.order.iter().enumerate() {
            w.event = event as u32;
            w.run(*id)?;
            for v in std::mem::take(&mut w.recent) {
                if self.fixed[v.index()] || cuts.contains(&(v, w.event)) {
                    w.present[v.index()] = None;
                }
            }
        }
        Some(w.built)
    }
}

/// Writes a schedule down, event by event.
struct Writer<'a, 'b> {
    search: &'a Search<'b>,
    built: Built,
    /// Per original value: what holds it now; `None`: it was dropped.
    present: Vec<Option<ValueId>>,
    updated: HashSet<StateId>,
    event: u32,
    /// The original values that the present event has computed or read.
    recent: Vec<ValueId>,
}

impl Writer<'_, '_> {
    fn computed(&self, v: ValueId) -> bool {
        matches!(self.search.graph.value(v).source, Source::Node(..))
    }

    fn touch(&mut self, v: ValueId) {
        let events = self.built.touched.entry(v).or_default();
        if events.last() != Some(&self.event) {
            events.push(self.event);
            self.recent.push(v);
        }
    }

    /// Runs an original node.
    fn run(&mut self, id: NodeId) -> Option<()> {
        let node = self.search.graph.node(id);
        for (slot, v) in node.inputs.iter().enumerate() {
            let Some(v) = v.filter(|v| self.computed(*v)) else { continue };
            let held = self.hold(v)?;
            self.built.graph.nodes[id.index()].inputs[slot] = Some(held);
        }
        for v in node.outputs.iter().flatten() {
            self.touch(*v);
        }
        for &(input, output) in node.op.updates() {
            let state = node.inputs.get(input).copied().flatten().map(|v| &self.search.graph.value(v).source);
            if let (Some(Source::State(s)), Some(Some(_))) = (state, node.outputs.get(output)) {
                self.updated.insert(*s);
            }
        }
        self.push(id);
        Some(())
    }

    fn push(&mut self, id: NodeId) {
        self.built.order.push(id);
        self.built.events.push(self.event);
    }

    /// What holds an original value, computed again if it was dropped.
    fn hold(&mut self, v: ValueId) -> Option<ValueId> {
        // Without recursion: chains are as long as networks are deep.
        let mut wanted = vec![v];
        while let Some(&v) = wanted.last() {
            if self.present[v.index()].is_some() {
                wanted.pop();
                continue;
            }
            let before = wanted.len();
            for u in self.of(v)?.1.into_iter().flatten() {
                if self.computed(u) && self.present[u.index()].is_none() {
                    wanted.push(u);
                }
            }
            if wanted.len() == before {
                self.repeat(v)?;
                self.present[v.index()]?;
            }
        }
        self.touch(v);
        self.present[v.index()]
    }

    /// How an original value is computed again: its node, and operator and operands for it.
    #[allow(clippy::type_complexity)]
    fn of(&self, v: ValueId) -> Option<(NodeId, Vec<Option<ValueId>>, Arc<dyn Op>)> {
        let Source::Node(id, _) = self.search.graph.value(v).source else { return None };
        let node = self.search.graph.node(id);
        let (op, inputs) = node.op.again(node).unwrap_or_else(|| (node.op.clone(), node.inputs.clone()));
        Some((id, inputs, op))
    }

    /// Computes a value again whose operands are present.
    fn repeat(&mut self, v: ValueId) -> Option<()> {
        let search = self.search;
        let (id, inputs, op) = self.of(v)?;
        let node = search.graph.node(id);
        let mut mine = Vec::with_capacity(inputs.len());
        for u in inputs {
            let Some(u) = u else {
                mine.push(None);
                continue;
            };
            if search.graph.state_of(u).is_some_and(|s| self.updated.contains(&s)) {
                return None;
            }
            if self.computed(u) {
                self.touch(u);
                mine.push(Some(self.present[u.index()]?));
                continue;
            }
            mine.push(Some(u));
        }
        let again = NodeId(self.built.graph.nodes.len() as u32);
        let own = node.op.again(node).is_some();
        let mut outputs = Vec::with_capacity(node.outputs.len());
        for (o, old) in node.outputs.iter().enumerate() {
            let Some(old) = old.filter(|_| o == 0 || !own) else { continue };
            let value = self.built.graph.value(old);
            let (name, meta) = (value.name.clone(), value.meta.clone());
            let new = self.built.graph.add_value(name, Source::Node(again, o));
            self.built.graph.value_mut(new).meta = meta;
            self.built.origins.push(old);
            outputs.resize(o, None);
            outputs.push(Some(new));
            if self.present[old.index()].is_none() {
                self.present[old.index()] = Some(new);
                self.touch(old);
            }
        }
        let name = self.built.graph.node(id).name.clone();
        self.built.graph.nodes.push(Node { name, op, inputs: mine, outputs });
        self.built.graph.again.insert(again, id);
        if !node.op.is_view() && !search.fixed[v.index()] {
            self.built.copies += 1;
            self.built.extra += search.cost[id.index()];
        }
        self.push(again);
        Some(())
    }
}
