//! Reverse-mode differentiation, graph to graph: appends the nodes of the gradient and prunes by
//! reachability what nobody asked for.

use std::collections::HashMap;
use std::sync::Arc;

use crate::error::{Blocker, Error, OpError, Result};
use crate::graph::{Graph, NodeId, ValueId, op_type};
use crate::ops::binary::Add;
use crate::ops::distill::Detach;
use crate::ops::reduce::{ExpandTo, SumTo};
use crate::ops::view::ReshapeTo;
use crate::ops::{Grads, Op};
use crate::tensor::{DType, Dims, Meta, Tensor};

/// The gradient value of each value that was asked for and that the loss depends on.
pub type Gradients = HashMap<ValueId, ValueId>;

/// What an operator's `vjp` sees: its node, the gradients of its outputs, and the graph to append to.
pub struct GradBuilder<'g> {
    graph: &'g mut Graph,
    node: NodeId,
    dy: Vec<Option<ValueId>>,
    wants: Vec<bool>,
}

impl GradBuilder<'_> {
    /// Input `i`; an error when it is absent.
    pub fn x(&self, i: usize) -> std::result::Result<ValueId, OpError> {
        self.x_opt(i).ok_or_else(|| OpError::Shape(format!("input {i} is missing")))
    }

    /// Input `i` if it is there.
    pub fn x_opt(&self, i: usize) -> Option<ValueId> {
        self.graph.node(self.node).inputs.get(i).copied().flatten()
    }

    /// How many inputs the node has.
    pub fn inputs(&self) -> usize {
        self.graph.node(self.node).inputs.len()
    }

    /// Output `i` of the forward node, made for the gradient's sake if the file does not name it.
    pub fn y(&mut self, i: usize) -> std::result::Result<ValueId, OpError> {
        self.graph.output_of(self.node, i)
    }

    /// The gradient of output `i`; `None` means zero.
    pub fn dy(&self, i: usize) -> Option<ValueId> {
        self.dy.get(i).copied().flatten()
    }

    /// The gradient of output 0; an error when only other outputs carry one.
    pub fn dy0(&self) -> std::result::Result<ValueId, OpError> {
        self.dy(0).ok_or_else(|| {
            OpError::NotDifferentiable("gradient through an output other than the first".into())
        })
    }

    /// Does anybody need the gradient of input `i`?
    pub fn wants(&self, i: usize) -> bool {
        self.wants.get(i).copied().unwrap_or(false)
    }

    /// Shape and type (and the value, where known at plan time).
    pub fn meta(&self, v: ValueId) -> std::result::Result<&Meta, OpError> {
        let value = self.graph.value(v);
        value
            .meta
            .as_ref()
            .ok_or_else(|| OpError::Internal(format!("the shape of '{}' is not known", value.name)))
    }

    /// The same of every input.
    pub fn metas(&self) -> std::result::Result<Vec<Option<Meta>>, OpError> {
        (0..self.inputs()).map(|i| self.x_opt(i).map(|v| self.meta(v).cloned()).transpose()).collect()
    }

    /// Appends a node and returns its output 0.
    pub fn emit(
        &mut self,
        op: impl Op + 'static,
        inputs: &[ValueId],
    ) -> std::result::Result<ValueId, OpError> {
        self.append_one(Arc::new(op), inputs)
    }

    /// Appends a node with optional inputs and returns its first `outputs` outputs.
    pub fn emit_all(
        &mut self,
        op: impl Op + 'static,
        inputs: &[Option<ValueId>],
        outputs: usize,
    ) -> std::result::Result<Vec<ValueId>, OpError> {
        self.append(Arc::new(op), inputs, outputs)
    }

    // Compiled once, not once an operator.
    fn append_one(&mut self, op: Arc<dyn Op>, inputs: &[ValueId]) -> std::result::Result<ValueId, OpError> {
        let inputs: Vec<_> = inputs.iter().map(|v| Some(*v)).collect();
        Ok(self.append(op, &inputs, 1)?[0])
    }

    fn append(
        &mut self,
        op: Arc<dyn Op>,
        inputs: &[Option<ValueId>],
        outputs: usize,
    ) -> std::result::Result<Vec<ValueId>, OpError> {
        let hint = self.hint();
        self.graph.emit(&hint, op, inputs, outputs)
    }

    /// A scalar constant of the given element type.
    pub fn scalar(&mut self, x: f64, dtype: DType) -> ValueId {
        self.graph.add_constant("", Tensor::scalar(x).cast(dtype))
    }

    /// Zeros of the type and shape of `v`: the gradient of an input of which only those are read.
    pub fn zeros_like(&mut self, v: ValueId) -> std::result::Result<ValueId, OpError> {
        let meta = self.meta(v)?.clone();
        let zero = self.scalar(0.0, meta.dtype);
        let from = Dims::from_elem(1, meta.rank());
        self.emit(ExpandTo { from, to: meta.dims, scale: 1.0 }, &[zero])
    }

    pub fn constant(&mut self, t: Tensor) -> ValueId {
        self.graph.add_constant("", t)
    }

    fn hint(&self) -> String {
        let node = self.graph.node(self.node);
        let first = node.outputs.iter().flatten().next();
        format!("grad/{}", first.map(|v| self.graph.value(*v).name.as_str()).unwrap_or(""))
    }
}

/// Appends to `graph` the gradient of the scalar `loss` with respect to each value of `wrt`.
///
/// Shapes must have been inferred. A value of `wrt` that the loss does not depend on (or only through what is
/// detached) has no entry in the result. Every node that would have to be differentiated and cannot is reported in one error.
pub fn grad(graph: &mut Graph, loss: ValueId, wrt: &[ValueId]) -> Result<Gradients> {
    let meta = graph.meta(loss)?.clone();
    if meta.len() != 1 || !meta.dtype.is_float() {
        let what = format!(
            "a loss must be one floating-point number, not {} {:?}",
            meta.dtype,
            meta.dims.as_slice()
        );
        return Err(Error::value(&graph.value(loss).name, what));
    }
    let nodes = graph.nodes.len();
    let mut depends = vec![false; graph.values.len()];
    for v in wrt {
        depends[v.index()] = true;
    }
    for node in graph.nodes.iter().filter(|n| n.op.as_a::<Detach>().is_none()) {
        if node.inputs.iter().flatten().any(|v| depends[v.index()]) {
            for v in node.outputs.iter().flatten() {
                depends[v.index()] = true;
            }
        }
    }

    let one = graph.add_constant(
        "grad/loss",
        Tensor::scalar(1.0f64)
            .cast(meta.dtype)
            .reshaped(&meta.dims)
            .map_err(|source| Error::Op { node: "loss".into(), source })?,
    );
    let mut grads: HashMap<ValueId, ValueId> = HashMap::from([(loss, one)]);
    let mut blockers = Vec::new();
    for i in (0..nodes).rev() {
        let id = NodeId(i as u32);
        let node = graph.node(id).clone();
        let dy: Vec<_> = node.outputs.iter().map(|v| v.and_then(|v| grads.get(&v).copied())).collect();
        if dy.iter().all(Option::is_none) {
            continue;
        }
        let wants: Vec<bool> = node
            .inputs
            .iter()
            .map(|v| {
                v.is_some_and(|v| {
                    let float = graph.value(v).meta.as_ref().is_some_and(|m| m.dtype.is_float());
                    float && depends.get(v.index()).copied().unwrap_or(false)
                })
            })
            .collect();
        if !wants.contains(&true) {
            continue;
        }
        let mut builder = GradBuilder { graph, node: id, dy, wants: wants.clone() };
        let produced = match node.op.vjp(&mut builder) {
            Ok(g) => g,
            Err(OpError::NotDifferentiable(why)) | Err(OpError::Unsupported(why)) => {
                blockers.push(Blocker { node: graph.describe(id), op_type: op_type(node.op.as_ref()), why });
                continue;
            }
            Err(source) => return Err(Error::Op { node: graph.describe(id), source }),
        };
        add_up(graph, &mut grads, &node.inputs, &wants, produced)
            .map_err(|source| Error::Op { node: format!("gradient of {}", graph.describe(id)), source })?;
    }
    if !blockers.is_empty() {
        blockers.reverse();
        return Err(Error::Blocked(blockers));
    }
    Ok(wrt.iter().filter_map(|v| grads.get(v).map(|g| (*v, *g))).collect())
}

/// Adds a node's input gradients to those gathered so far, summed over broadcast dimensions first.
fn add_up(
    graph: &mut Graph,
    grads: &mut HashMap<ValueId, ValueId>,
    inputs: &[Option<ValueId>],
    wants: &[bool],
    produced: Grads,
) -> std::result::Result<(), OpError> {
    for (i, g) in produced.iter().enumerate() {
        let (Some(mut g), Some(Some(v)), Some(true)) = (*g, inputs.get(i), wants.get(i)) else { continue };
        let hint = format!("grad/{}", graph.value(*v).name);
        let dims = |graph: &Graph, v: ValueId| {
            graph.value(v).meta.as_ref().map(|m| m.dims.clone()).unwrap_or_default()
        };
        let (want, have) = (dims(graph, *v), dims(graph, g));
        if want != have {
            // Of a parameter for each channel that the file has in another shape, or the sum over what it was repeated along.
            let op: Arc<dyn Op> = match have.len() < want.len() {
                true => Arc::new(ReshapeTo { dims: want }),
                false => Arc::new(SumTo { dims: want }),
            };
            g = graph.emit(&hint, op, &[Some(g)], 1)?[0];
        }
        let sum = match grads.get(v) {
            Some(&before) => graph.emit(&hint, Arc::new(Add), &[Some(before), Some(g)], 1)?[0],
            None => g,
        };
        grads.insert(*v, sum);
    }
    if let Some(i) = (0..wants.len()).find(|&i| wants[i] && produced.get(i).copied().flatten().is_none()) {
        return Err(OpError::NotDifferentiable(format!("there is no gradient with respect to input {i}")));
    }
    Ok(())
}
