//! The network as a graph of values and nodes: one node per ONNX node, and, appended by
//! [`grad`], the nodes of its gradient.

mod beside;
mod control;
mod early;
mod fixed;
mod fuse;
mod grad;
mod head;
mod infer;
mod layout;
mod lower;
mod masks;
mod narrow;
mod passes;
mod precision;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use crate::error::{Error, OpError};
use crate::ops::Op;
use crate::tensor::{DType, Meta, Tensor};

pub use control::MOST_UNROLLED;
pub use early::update_early;
pub use fuse::{
    fuse, fuse_sums, gather_statistics, join_expansions, join_gated_norms, join_normalisations, join_products,
};
pub use grad::{GradBuilder, Gradients, grad};
pub use head::{Ending, ending};
pub use infer::{Bindings, Inferred};
pub use layout::{PinnedLayouts, layout};
pub use lower::{Lowering, eval_lowered, infer_lowered};
pub use masks::keep_masks;
pub use narrow::narrow;
pub use passes::{inline, logits, set_mode};
pub use precision::{Conversions, halve, multiply_pairs};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub u32);
        impl $name {
            pub fn index(self) -> usize {
                self.0 as usize
            }
        }
    };
}
id!(
    /// A value of one graph.
    ValueId
);
id!(
    /// A node of one graph.
    NodeId
);
id!(
    /// A float constant of the file: an index into `Model::weights`.
    WeightId
);
id!(
    /// Persistent memory of a session: parameters, running statistics, optimizer state.
    StateId
);

/// Where a value's elements come from.
#[derive(Debug, Clone)]
pub enum Source {
    /// Fed at each run.
    Input,
    /// Known: part of the file or computed at plan time.
    Constant(Arc<Tensor>),
    /// A float constant of the file, loaded (and perhaps trained) by the session.
    Weight(WeightId),
    /// Persistent memory of the session.
    State(StateId),
    /// Output `.1` of node `.0`.
    Node(NodeId, usize),
}

/// One dimension as the file declares it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Dim {
    Fixed(usize),
    Symbol(String),
    Unknown,
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Dim::Fixed(n) => write!(f, "{n}"),
            Dim::Symbol(s) => f.write_str(s),
            Dim::Unknown => f.write_str("?"),
        }
    }
}

/// Element type and shape as the file declares them (`dims: None` when it gives no rank).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Declared {
    pub dtype: DType,
    pub dims: Option<Vec<Dim>>,
}

/// A tensor that flows through the graph.
#[derive(Debug, Clone)]
pub struct Value {
    /// The ONNX tensor name; of ours, a derived one.
    pub name: String,
    pub source: Source,
    pub declared: Option<Declared>,
    /// Known after shape inference.
    pub meta: Option<Meta>,
}

/// One operator call.
#[derive(Debug, Clone)]
pub struct Node {
    /// The ONNX node name; may be empty.
    pub name: String,
    pub op: Arc<dyn Op>,
    pub inputs: Vec<Option<ValueId>>,
    pub outputs: Vec<Option<ValueId>>,
}

impl Node {
    /// The first output, if it has a name.
    pub fn output(&self) -> Option<ValueId> {
        self.outputs.first().copied().flatten()
    }

    /// Of a node that only gives another shape ([`Op::is_view`]): its operand, and the output that is the same memory.
    pub fn view(&self) -> Option<(ValueId, ValueId)> {
        let x = self.inputs.first().copied().flatten().filter(|_| self.op.is_view())?;
        Some((x, self.output()?))
    }
}

/// Values and nodes, the nodes in an order in which they can run.
#[derive(Debug, Clone, Default)]
pub struct Graph {
    pub values: Vec<Value>,
    pub nodes: Vec<Node>,
    /// What a run is fed with (constants that are also listed as inputs in the file are not here).
    pub inputs: Vec<ValueId>,
    pub outputs: Vec<ValueId>,
    /// Inputs of the file with a value of their own ([`Graph::fix`]).
    pub fixed: Vec<(ValueId, Arc<Tensor>)>,
    /// The first node of the file that [`Graph::without_selections`] left out, for people.
    pub left_out: Option<String>,
    /// Nodes that compute once more what another did: they draw the same random numbers.
    pub again: HashMap<NodeId, NodeId>,
}

impl Graph {
    pub fn value(&self, id: ValueId) -> &Value {
        &self.values[id.index()]
    }

    /// Types and shapes of values, where they are known.
    pub fn metas(&self, values: &[Option<ValueId>]) -> Vec<Option<&Meta>> {
        values.iter().map(|v| v.and_then(|v| self.value(v).meta.as_ref())).collect()
    }

    pub fn value_mut(&mut self, id: ValueId) -> &mut Value {
        &mut self.values[id.index()]
    }

    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }

    /// Adds a value that no node computes.
    pub fn add_value(&mut self, name: impl Into<String>, source: Source) -> ValueId {
        let meta = match &source {
            Source::Constant(t) => Some(Meta { value: Some(t.clone()), ..t.meta() }),
            _ => None,
        };
        self.values.push(Value { name: name.into(), source, declared: None, meta });
        ValueId(self.values.len() as u32 - 1)
    }

    /// Adds a value fed at each run.
    pub fn add_input(&mut self, name: impl Into<String>, meta: Meta) -> ValueId {
        let id = self.add_value(name, Source::Input);
        self.value_mut(id).meta = Some(meta);
        self.inputs.push(id);
        id
    }

    pub fn add_constant(&mut self, name: impl Into<String>, tensor: Tensor) -> ValueId {
        self.add_value(name, Source::Constant(Arc::new(tensor)))
    }

    /// Adds persistent state of known shape.
    pub fn add_state(&mut self, name: impl Into<String>, state: StateId, meta: Meta) -> ValueId {
        let id = self.add_value(name, Source::State(state));
        self.value_mut(id).meta = Some(meta);
        id
    }

    /// Adds a node whose outputs are new values named `names` (`None`: output not made).
    /// Shapes are not inferred.
    pub fn add_node(
        &mut self,
        name: impl Into<String>,
        op: Arc<dyn Op>,
        inputs: Vec<Option<ValueId>>,
        names: &[Option<&str>],
    ) -> Vec<Option<ValueId>> {
        let node = NodeId(self.nodes.len() as u32);
        let outputs: Vec<Option<ValueId>> = names
            .iter()
            .enumerate()
            .map(|(i, n)| n.map(|n| self.add_value(n, Source::Node(node, i))))
            .collect();
        self.nodes.push(Node { name: name.into(), op, inputs, outputs: outputs.clone() });
        outputs
    }

    /// Appends a node with shape inference, with its first `outputs` outputs; `hint` names them.
    pub fn emit(
        &mut self,
        hint: &str,
        op: Arc<dyn Op>,
        inputs: &[Option<ValueId>],
        outputs: usize,
    ) -> Result<Vec<ValueId>, OpError> {
        let metas = self.metas(inputs);
        let inferred = op.infer(&metas)?;
        inferred.iter().try_for_each(Meta::check_size)?;
        if inferred.len() < outputs {
            return Err(OpError::Internal(format!(
                "{} has {} outputs, not {outputs}",
                op.name(),
                inferred.len()
            )));
        }
        let name = op.name();
        let names: Vec<String> = (0..outputs)
            .map(|i| if i == 0 { format!("{hint}/{name}") } else { format!("{hint}/{name}.{i}") })
            .collect();
        let names: Vec<Option<&str>> = names.iter().map(|n| Some(n.as_str())).collect();
        let made = self.add_node("", op, inputs.to_vec(), &names);
        let made: Vec<ValueId> = made.into_iter().flatten().collect();
        for (v, m) in made.iter().zip(inferred) {
            self.value_mut(*v).meta = Some(m);
        }
        Ok(made)
    }

    /// Tells every value that a node computes which node that is, after nodes were moved.
    pub(crate) fn renumber(&mut self) {
        for (i, node) in self.nodes.iter().enumerate() {
            for (o, v) in node.outputs.iter().enumerate() {
                let Some(v) = v else { continue };
                let source = &mut self.values[v.index()].source;
                if matches!(source, Source::Node(..)) {
                    *source = Source::Node(NodeId(i as u32), o);
                }
            }
        }
    }

    /// The output `index` of a node, made if nobody has asked for it before.
    pub fn output_of(&mut self, node: NodeId, index: usize) -> Result<ValueId, OpError> {
        if let Some(Some(v)) = self.nodes[node.index()].outputs.get(index) {
            return Ok(*v);
        }
        let n = &self.nodes[node.index()];
        let metas = self.metas(&n.inputs);
        let meta =
            n.op.infer(&metas)?
                .into_iter()
                .nth(index)
                .ok_or_else(|| OpError::Internal(format!("{} has no output {index}", n.op.name())))?;
        let base = n.outputs.iter().flatten().next().map(|v| self.value(*v).name.clone()).unwrap_or_default();
        let v = self.add_value(format!("{base}#{index}"), Source::Node(node, index));
        self.value_mut(v).meta = Some(meta);
        let outs = &mut self.nodes[node.index()].outputs;
        if outs.len() <= index {
            outs.resize(index + 1, None);
        }
        outs[index] = Some(v);
        Ok(v)
    }

    /// The shape and type of a value after inference.
    pub fn meta(&self, id: ValueId) -> Result<&Meta, Error> {
        let v = self.value(id);
        v.meta.as_ref().ok_or_else(|| Error::value(&v.name, "its shape is not known"))
    }

    /// The state in whose memory a value lies: it is the state's content, perhaps in another shape.
    pub fn state_of(&self, mut v: ValueId) -> Option<StateId> {
        loop {
            v = match self.value(v).source {
                Source::State(s) => return Some(s),
                Source::Node(n, _) => self.node(n).view()?.0,
                _ => return None,
            };
        }
    }

    /// How a person finds the node in the file: op type, name if it has one, first output.
    pub fn describe(&self, id: NodeId) -> String {
        let n = self.node(id);
        let out = n.outputs.iter().flatten().next().map(|v| self.value(*v).name.as_str()).unwrap_or("");
        let op = op_type(n.op.as_ref());
        match n.name.is_empty() {
            true => format!("{op} (output '{out}')"),
            false => format!("{op} '{}' (output '{out}')", n.name),
        }
    }

    pub fn find(&self, name: &str) -> Option<ValueId> {
        self.values.iter().position(|v| v.name == name).map(|i| ValueId(i as u32))
    }

    /// For each value, the nodes that read it.
    pub fn consumers(&self) -> Vec<Vec<NodeId>> {
        let mut out = vec![Vec::new(); self.values.len()];
        for (i, n) in self.nodes.iter().enumerate() {
            for v in n.inputs.iter().flatten() {
                out[v.index()].push(NodeId(i as u32));
            }
        }
        out
    }
}

/// The `op_type` a node has in its file.
pub fn op_type(op: &dyn Op) -> String {
    op.foreign_type().unwrap_or_else(|| op.name().to_string())
}

/// A stable text dump: one line a node, for people and tests.
impl fmt::Display for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let show = |v: ValueId| {
            let value = self.value(v);
            match &value.meta {
                Some(m) => format!("{}:{}{:?}", value.name, m.dtype, m.dims.as_slice()),
                None => value.name.clone(),
            }
        };
        let list = |vs: &[Option<ValueId>]| {
            vs.iter().map(|v| v.map_or("_".to_string(), show)).collect::<Vec<_>>().join(", ")
        };
        for v in &self.inputs {
            writeln!(f, "input  {}", show(*v))?;
        }
        for n in &self.nodes {
            writeln!(f, "{} = {:?}({})", list(&n.outputs), n.op, list(&n.inputs))?;
        }
        for v in &self.outputs {
            writeln!(f, "output {}", show(*v))?;
        }
        Ok(())
    }
}
