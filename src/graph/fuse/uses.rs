//! Who reads which value of a graph that is rewritten node by node.

use smallvec::SmallVec;

use crate::graph::{Graph, Node, NodeId, Source, ValueId};
use crate::plan::Request;

/// Who reads each value, as node numbers, and which values must be there.
pub(super) struct Uses {
    pub(super) readers: Vec<SmallVec<[usize; 4]>>,
    pub(super) kept: Vec<bool>,
}

impl Uses {
    pub(super) fn of(graph: &Graph, request: &Request) -> Uses {
        let mut uses = Uses {
            readers: vec![SmallVec::new(); graph.values.len()],
            kept: vec![false; graph.values.len()],
        };
        for (i, node) in graph.nodes.iter().enumerate() {
            node.inputs.iter().flatten().for_each(|v| uses.readers[v.index()].push(i));
        }
        for v in request.outputs.iter().chain(&request.effects).chain(request.pins.keys()) {
            uses.kept[v.index()] = true;
        }
        uses
    }

    /// Whether this node alone reads `v`, and once.
    pub(super) fn only_in(&self, v: ValueId, at: usize) -> bool {
        !self.kept[v.index()] && self.readers[v.index()].as_slice() == [at]
    }

    /// The nodes that read `v`, one at least, where it need not be there for others.
    pub(super) fn all_of(&self, v: ValueId) -> Option<&[usize]> {
        let readers = self.readers[v.index()].as_slice();
        (!self.kept[v.index()] && !readers.is_empty()).then_some(readers)
    }

    /// Puts a node in the place of another: its inputs' readers are known, its outputs come from it.
    pub(super) fn put(&mut self, graph: &mut Graph, at: usize, node: Node) {
        self.remove(graph, at);
        node.inputs.iter().flatten().for_each(|v| self.readers[v.index()].push(at));
        for (o, v) in node.outputs.iter().enumerate() {
            if let Some(v) = v {
                graph.value_mut(*v).source = Source::Node(NodeId(at as u32), o);
            }
        }
        graph.nodes[at] = node;
    }

    /// Nobody needs it any more.
    pub(super) fn remove(&mut self, graph: &mut Graph, at: usize) {
        let node = &mut graph.nodes[at];
        for v in node.inputs.drain(..).flatten() {
            self.readers[v.index()].retain(|r| *r != at);
        }
        node.outputs.clear();
    }
}
