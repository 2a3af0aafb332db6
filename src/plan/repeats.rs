//! Nodes of a graph that run once more than they are written down, beside it: a search tries thousands of such lists, and a graph is
//! large.

use crate::error::Result;
use crate::graph::{Graph, Node, NodeId, Source, Value, ValueId};
use crate::tensor::Meta;

/// Marks a node that reads what it is written to read.
const AS_WRITTEN: u32 = u32::MAX;

/// Copies of nodes, numbered from the graph's last node on, and of their results; and who reads those.
#[derive(Debug, Default)]
pub(super) struct Repeats {
    /// Per node of the graph, its place in `readers`.
    reads: Vec<u32>,
    readers: Vec<(NodeId, Node)>,
    /// Without names, and what each is a copy of.
    nodes: Vec<(Node, NodeId)>,
    values: Vec<(Source, ValueId)>,
}

impl Repeats {
    pub(super) fn new(graph: &Graph) -> Self {
        Repeats { reads: vec![AS_WRITTEN; graph.nodes.len()], ..Repeats::default() }
    }

    /// Has a node of the graph read another value.
    pub(super) fn rewire(&mut self, graph: &Graph, id: NodeId, slot: usize, v: ValueId) {
        let place = &mut self.reads[id.index()];
        if *place == AS_WRITTEN {
            *place = self.readers.len() as u32;
            self.readers.push((id, Node { name: String::new(), ..graph.node(id).clone() }));
        }
        self.readers[*place as usize].1.inputs[slot] = Some(v);
    }

    /// The number of the next copy of a node.
    pub(super) fn next(&self, graph: &Graph) -> NodeId {
        NodeId((graph.nodes.len() + self.nodes.len()) as u32)
    }

    /// Adds a copy of a value, output `o` of the next node.
    pub(super) fn add_value(&mut self, graph: &Graph, of: ValueId, o: usize) -> ValueId {
        self.values.push((Source::Node(self.next(graph), o), of));
        ValueId((graph.values.len() + self.values.len() - 1) as u32)
    }

    /// Adds the next copy of a node.
    pub(super) fn add_node(&mut self, node: Node, of: NodeId) {
        self.nodes.push((node, of));
    }

    /// Writes all into the graph.
    pub(super) fn write(self, graph: &mut Graph) {
        for (id, node) in self.readers {
            graph.nodes[id.index()].inputs = node.inputs;
        }
        graph.values.reserve_exact(self.values.len());
        graph.nodes.reserve_exact(self.nodes.len());
        for (source, of) in self.values {
            let Value { name, meta, .. } = graph.value(of);
            graph.values.push(Value { name: name.clone(), source, declared: None, meta: meta.clone() });
        }
        for (node, of) in self.nodes {
            graph.again.insert(NodeId(graph.nodes.len() as u32), of);
            let name = graph.node(of).name.clone();
            graph.nodes.push(Node { name, ..node });
        }
    }
}

/// A graph with repeats or without any.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wiring<'a> {
    pub(super) graph: &'a Graph,
    pub(super) repeats: Option<&'a Repeats>,
}

impl<'a> Wiring<'a> {
    /// A graph as it is written down.
    pub(super) fn of(graph: &'a Graph) -> Self {
        Wiring { graph, repeats: None }
    }

    fn copy<T>(&self, index: usize, written: usize, of: impl Fn(&'a Repeats) -> &'a [T]) -> Option<&'a T> {
        of(self.repeats?).get(index.checked_sub(written)?)
    }

    fn node_copy(&self, id: NodeId) -> Option<&'a (Node, NodeId)> {
        self.copy(id.index(), self.graph.nodes.len(), |repeats| &repeats.nodes)
    }

    fn value_copy(&self, v: ValueId) -> Option<&'a (Source, ValueId)> {
        self.copy(v.index(), self.graph.values.len(), |repeats| &repeats.values)
    }

    pub(super) fn values(&self) -> usize {
        self.graph.values.len() + self.repeats.map_or(0, |repeats| repeats.values.len())
    }

    pub(super) fn node(&self, id: NodeId) -> &'a Node {
        if let Some((node, _)) = self.node_copy(id) {
            return node;
        }
        let reader = self.repeats.and_then(|r| r.readers.get(*r.reads.get(id.index())? as usize));
        reader.map_or_else(|| self.graph.node(id), |(_, node)| node)
    }

    /// What a value is a copy of, or itself.
    pub(super) fn origin(&self, v: ValueId) -> ValueId {
        self.value_copy(v).map_or(v, |(_, of)| *of)
    }

    pub(super) fn source(&self, v: ValueId) -> &'a Source {
        self.value_copy(v).map_or_else(|| &self.graph.value(v).source, |(source, _)| source)
    }

    pub(super) fn name(&self, v: ValueId) -> &'a str {
        &self.graph.value(self.origin(v)).name
    }

    pub(super) fn meta(&self, v: ValueId) -> Result<&'a Meta> {
        self.graph.meta(self.origin(v))
    }

    /// The node that draws the random numbers which a node draws: itself, or the one that it computes again.
    pub(super) fn first(&self, id: NodeId) -> NodeId {
        match self.node_copy(id) {
            Some((_, of)) => *of,
            None => self.graph.again.get(&id).copied().unwrap_or(id),
        }
    }

    pub(super) fn describe(&self, id: NodeId) -> String {
        self.graph.describe(self.node_copy(id).map_or(id, |(_, of)| *of))
    }
}
