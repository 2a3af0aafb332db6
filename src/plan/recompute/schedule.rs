//! A schedule in which some values are computed again.

use std::sync::Arc;

use super::{Cuts, Search};
use crate::graph::{Graph, Node, NodeId, Source, StateId, ValueId};
use crate::ops::Op;
use crate::plan::repeats::{Repeats, Wiring};

/// A schedule.
pub(super) struct Built {
    pub repeats: Repeats,
    pub order: Vec<NodeId>,
    /// Per place in the order.
    pub events: Vec<u32>,
    /// The events that compute or read each original value, sorted.
    touched: Vec<(ValueId, u32)>,
    pub copies: usize,
    /// Work of the copies.
    pub extra: f64,
}

impl Built {
    pub(super) fn wiring<'a>(&'a self, graph: &'a Graph) -> Wiring<'a> {
        Wiring { graph, repeats: Some(&self.repeats) }
    }

    /// The last event up to this one that computes or reads an original value.
    pub(super) fn last_touch(&self, v: ValueId, event: u32) -> Option<u32> {
        let after = self.touched.partition_point(|t| *t <= (v, event));
        self.touched[..after].last().filter(|t| t.0 == v).map(|t| t.1)
    }

    /// The first one after this one.
    pub(super) fn next_touch(&self, v: ValueId, event: u32) -> Option<u32> {
        let after = self.touched.partition_point(|t| *t <= (v, event));
        self.touched[after..].first().filter(|t| t.0 == v).map(|t| t.1)
    }
}

impl Search<'_> {
    /// The schedule for some cuts; `None`: a state would be read after its update.
    pub(super) fn build(&self, cuts: &Cuts) -> Option<Built> {
        let values = self.graph.values.len();
        let mut w = Writer {
            search: self,
            built: Built {
                repeats: Repeats::new(self.graph),
                order: Vec::with_capacity(self.order.len()),
                events: Vec::with_capacity(self.order.len()),
                touched: Vec::with_capacity(3 * self.order.len()),
                copies: 0,
                extra: 0.0,
            },
            present: (0..values as u32).map(|v| Some(ValueId(v))).collect(),
            last: vec![NEVER; values],
            updated: Vec::new(),
            event: 0,
        };
        for (v, _) in self.fixed.iter().enumerate().filter(|f| *f.1) {
            w.present[v] = None;
        }
        for (event, id) in self.order.iter().enumerate() {
            w.event = event as u32;
            let before = w.built.touched.len();
            w.run(*id)?;
            for &(v, event) in &w.built.touched[before..] {
                if self.fixed[v.index()] || cuts.contains(&(v, event)) {
                    w.present[v.index()] = None;
                }
            }
        }
        w.built.touched.sort_unstable();
        Some(w.built)
    }
}

/// No event.
const NEVER: u32 = u32::MAX;

/// Writes a schedule down, event by event.
struct Writer<'a, 'b> {
    search: &'a Search<'b>,
    built: Built,
    /// Per original value: what holds it now; `None`: it was dropped.
    present: Vec<Option<ValueId>>,
    /// Per original value: the last event that computed or read it.
    last: Vec<u32>,
    updated: Vec<StateId>,
    event: u32,
}

impl Writer<'_, '_> {
    fn computed(&self, v: ValueId) -> bool {
        matches!(self.search.graph.value(v).source, Source::Node(..))
    }

    fn touch(&mut self, v: ValueId) {
        if std::mem::replace(&mut self.last[v.index()], self.event) != self.event {
            self.built.touched.push((v, self.event));
        }
    }

    /// Runs an original node.
    fn run(&mut self, id: NodeId) -> Option<()> {
        let graph = self.search.graph;
        let node = graph.node(id);
        for (slot, v) in node.inputs.iter().enumerate() {
            let Some(v) = v.filter(|v| self.computed(*v)) else { continue };
            let held = self.hold(v)?;
            if held != v {
                self.built.repeats.rewire(graph, id, slot, held);
            }
        }
        for v in node.outputs.iter().flatten() {
            self.touch(*v);
        }
        for &(input, output) in node.op.updates() {
            let state = node.inputs.get(input).copied().flatten().map(|v| &graph.value(v).source);
            if let (Some(Source::State(s)), Some(Some(_))) = (state, node.outputs.get(output)) {
                self.updated.push(*s);
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
        let again = self.built.repeats.next(search.graph);
        let own = node.op.again(node).is_some();
        let mut outputs = Vec::with_capacity(node.outputs.len());
        for (o, old) in node.outputs.iter().enumerate() {
            let Some(old) = old.filter(|_| o == 0 || !own) else { continue };
            let new = self.built.repeats.add_value(search.graph, old, o);
            outputs.resize(o, None);
            outputs.push(Some(new));
            if self.present[old.index()].is_none() {
                self.present[old.index()] = Some(new);
                self.touch(old);
            }
        }
        self.built.repeats.add_node(Node { name: String::new(), op, inputs: mine, outputs }, id);
        if !node.op.is_view() && !search.fixed[v.index()] {
            self.built.copies += 1;
            self.built.extra += search.cost[id.index()];
        }
        self.push(again);
        Some(())
    }
}
