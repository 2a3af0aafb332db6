//! What stands behind a network's scores, and is left out of a loss: activations, and selections whose shapes depend on
//! values.

use crate::error::{Error, Result};
use crate::graph::{Graph, NodeId, Source, ValueId};

/// Operators whose outputs' shapes depend on the values of these operands.
const SELECTIONS: &[(&str, &[usize])] =
    &[("NonMaxSuppression", &[0, 1]), ("NonZero", &[0]), ("Unique", &[0]), ("Compress", &[1])];

/// An activation at the end of a network.
#[derive(Debug, Clone)]
pub struct Ending {
    pub node: NodeId,
    /// What it is of.
    pub input: ValueId,
    /// Nodes behind it, which only arrange elements, the last first.
    movers: Vec<NodeId>,
}

/// The activation, one of `activations`, that `output` is; looks through Identity and `movers`.
pub fn ending(graph: &Graph, output: ValueId, activations: &[&str], movers: &[&str]) -> Option<Ending> {
    let (mut v, mut passed) = (output, Vec::new());
    while let Source::Node(id, 0) = graph.value(v).source {
        let node = graph.node(id);
        let input = node.inputs.first().copied().flatten()?;
        match node.op.name() {
            name if activations.contains(&name) => return Some(Ending { node: id, input, movers: passed }),
            "Identity" => {}
            name if movers.contains(&name) => passed.push(id),
            _ => return None,
        }
        v = input;
    }
    None
}

impl Ending {
    /// What the output would be without the activation.
    pub fn without(&self, graph: &mut Graph) -> Result<ValueId> {
        let mut v = self.input;
        for &id in self.movers.iter().rev() {
            let (op, mut inputs) = (graph.node(id).op.clone(), graph.node(id).inputs.clone());
            inputs[0] = Some(v);
            let made = graph.emit("logits", op, &inputs, 1);
            v = made.map_err(|source| Error::Op { node: graph.describe(id), source })?[0];
        }
        Ok(v)
    }
}

/// What of a graph comes from nodes whose shapes depend on computed values.
struct Selected {
    /// By node: such a node, or behind one.
    cut: Vec<bool>,
    /// By value: computed by one of those.
    behind: Vec<bool>,
    /// By value: follows from an input's values, not from its shape alone.
    fed: Vec<bool>,
    first: NodeId,
}

impl Graph {
    fn selected(&self) -> Option<Selected> {
        let mut fed = vec![false; self.values.len()];
        self.inputs.iter().for_each(|v| fed[v.index()] = true);
        let mut behind = vec![false; self.values.len()];
        let (mut cut, mut first) = (vec![false; self.nodes.len()], None);
        for (i, n) in self.nodes.iter().enumerate() {
            let reads = |of: &[bool]| n.inputs.iter().flatten().any(|v| of[v.index()]);
            let chosen = SELECTIONS.iter().find(|s| s.0 == n.op.name()).is_some_and(|(_, slots)| {
                slots.iter().any(|s| n.inputs.get(*s).copied().flatten().is_some_and(|v| fed[v.index()]))
            });
            if chosen && first.is_none() {
                first = Some(NodeId(i as u32));
            }
            cut[i] = chosen || reads(&behind);
            let follows = reads(&fed) && !matches!(n.op.name(), "Shape" | "Size");
            for v in n.outputs.iter().flatten() {
                behind[v.index()] = cut[i];
                fed[v.index()] = follows;
            }
        }
        Some(Selected { cut, behind, fed, first: first? })
    }

    /// The graph with those nodes that `keep` says, in their order; what others compute becomes an input.
    fn keeping(&self, keep: impl Fn(usize) -> bool) -> Graph {
        let mut graph = self.clone();
        let mut ids = vec![None; self.nodes.len()];
        graph.nodes = Vec::new();
        for (i, n) in self.nodes.iter().enumerate().filter(|(i, _)| keep(*i)) {
            ids[i] = Some(NodeId(graph.nodes.len() as u32));
            graph.nodes.push(n.clone());
        }
        for v in &mut graph.values {
            if let Source::Node(id, _) = &mut v.source {
                match ids[id.index()] {
                    Some(new) => *id = new,
                    None => v.source = Source::Input,
                }
            }
        }
        graph
    }

    /// The graph without the nodes whose shapes depend on computed values (a detector's NonMaxSuppression and what
    /// follows it): where outputs come from there, what those nodes read takes their place, scores before boxes.
    /// `None` where there are none.
    pub fn without_selections(&self) -> Option<Graph> {
        let Selected { cut, behind, fed, first } = self.selected()?;
        let mut ends = self.outputs.clone();
        if ends.first().is_some_and(|v| behind[v.index()]) {
            let nms = |i: &usize| cut[*i] && self.nodes[*i].op.name() == "NonMaxSuppression";
            let slots = (0..self.nodes.len()).find(nms).map(|i| &self.nodes[i].inputs);
            let operand = |slot: usize| slots.and_then(|s| s.get(slot).copied().flatten());
            ends.splice(0..0, [operand(1), operand(0)].into_iter().flatten());
        }
        let mut graph = self.keeping(|i| !cut[i]);
        graph.left_out = Some(self.describe(first));
        graph.outputs.clear();
        let mut seen = vec![false; self.values.len()];
        for end in ends {
            self.frontier(end, &behind, &fed, &mut seen, &mut graph.outputs);
        }
        (!graph.outputs.is_empty()).then_some(graph)
    }

    /// The graph in front of those nodes, whose outputs are all that they read and the outputs that do not come from
    /// them, and the graph of those nodes. Values keep their ids.
    pub fn split_at_selections(&self) -> Option<(Graph, Graph)> {
        let Selected { cut, behind, .. } = self.selected()?;
        let (mut front, back) = (self.keeping(|i| !cut[i]), self.keeping(|i| cut[i]));
        let read = back.nodes.iter().flat_map(|n| n.inputs.iter().flatten()).chain(&self.outputs);
        let mut wanted: Vec<ValueId> = read
            .copied()
            .filter(|v| !behind[v.index()] && matches!(self.value(*v).source, Source::Node(..)))
            .collect();
        wanted.sort();
        wanted.dedup();
        front.outputs = wanted;
        Some((front, back))
    }

    /// Appends what `v` is computed from in front of the nodes that are cut; `v` itself where it stays.
    fn frontier(
        &self,
        v: ValueId,
        behind: &[bool],
        fed: &[bool],
        seen: &mut [bool],
        found: &mut Vec<ValueId>,
    ) {
        let mut stack = vec![v];
        while let Some(v) = stack.pop() {
            if std::mem::replace(&mut seen[v.index()], true) {
                continue;
            }
            match self.value(v).source {
                Source::Node(id, _) if behind[v.index()] => {
                    // The first operand is looked at first.
                    stack.extend(self.node(id).inputs.iter().rev().flatten());
                }
                Source::Node(..) if fed[v.index()] => found.push(v),
                _ => {}
            }
        }
    }
}
