//! Operators that are made of others: replaced by their nodes once all shapes are known.

use std::sync::Arc;

use crate::error::{Error, OpError, Result};
use crate::graph::{Graph, Node, NodeId, Source, ValueId};
use crate::kernels::strided::Extents;
use crate::ops::binary::{Add, Mul};
use crate::ops::join::Concat;
use crate::ops::slice::{Crop, Cut};
use crate::ops::transpose::Transpose;
use crate::ops::view::ReshapeTo;
use crate::ops::{Attrs, Op, Spec, create};
use crate::tensor::{DType, Dims, Meta, Tensor};

type OpResult<T> = std::result::Result<T, OpError>;

/// What a composite operator sees when it is replaced: its operands, and the graph to append to.
pub struct Lowering<'g> {
    graph: &'g mut Graph,
    inputs: Vec<Option<ValueId>>,
    /// Which outputs somebody reads.
    wanted: Vec<bool>,
    hint: String,
}

impl Lowering<'_> {
    /// Operand `i`; an error when it is absent.
    pub fn x(&self, i: usize) -> OpResult<ValueId> {
        self.x_opt(i).ok_or_else(|| OpError::Shape(format!("input {i} is missing")))
    }

    pub fn x_opt(&self, i: usize) -> Option<ValueId> {
        self.inputs.get(i).copied().flatten()
    }

    pub fn inputs(&self) -> usize {
        self.inputs.len()
    }

    /// Does anybody read output `i`?
    pub fn wants(&self, i: usize) -> bool {
        self.wanted.get(i).copied().unwrap_or(false)
    }

    /// Shape and type (and the value, where known at plan time).
    pub fn meta(&self, v: ValueId) -> OpResult<&Meta> {
        let value = self.graph.value(v);
        value
            .meta
            .as_ref()
            .ok_or_else(|| OpError::Internal(format!("the shape of '{}' is not known", value.name)))
    }

    pub fn dims(&self, v: ValueId) -> OpResult<Dims> {
        Ok(self.meta(v)?.dims.clone())
    }

    pub fn dtype(&self, v: ValueId) -> OpResult<DType> {
        Ok(self.meta(v)?.dtype)
    }

    /// The integers of operand `i`, which must be known at plan time.
    pub fn ints(&self, i: usize) -> OpResult<Vec<i64>> {
        self.meta(self.x(i)?)?.ints(i)
    }

    /// Appends a node and returns its output 0.
    pub fn emit(&mut self, op: impl Op + 'static, inputs: &[ValueId]) -> OpResult<ValueId> {
        let inputs: Vec<_> = inputs.iter().map(|v| Some(*v)).collect();
        Ok(self.emit_all(Arc::new(op), &inputs, 1)?[0])
    }

    /// Appends a node with optional operands and returns its first `outputs` outputs.
    pub fn emit_all(
        &mut self,
        op: Arc<dyn Op>,
        inputs: &[Option<ValueId>],
        outputs: usize,
    ) -> OpResult<Vec<ValueId>> {
        if !op.is_composite() {
            return self.graph.emit(&self.hint, op, inputs, outputs);
        }
        let wanted = vec![true; outputs];
        let hint = format!("{}/{}", self.hint, op.name());
        let mut inner = Lowering { graph: self.graph, inputs: inputs.to_vec(), wanted, hint };
        let made = op.lower(&mut inner)?;
        let made: Vec<ValueId> = made.into_iter().flatten().take(outputs).collect();
        match made.len() == outputs {
            true => Ok(made),
            false => Err(OpError::Internal(format!("{} has not {outputs} outputs", op.name()))),
        }
    }

    pub fn constant(&mut self, t: Tensor) -> ValueId {
        self.graph.add_constant("", t)
    }

    /// A scalar constant of the given element type.
    pub fn scalar(&mut self, x: f64, dtype: DType) -> ValueId {
        self.constant(Tensor::scalar(x).cast(dtype))
    }

    /// `v` under other dimensions; `v` itself where they are its own.
    pub fn reshape(&mut self, v: ValueId, dims: &[usize]) -> OpResult<ValueId> {
        if self.meta(v)?.dims.as_slice() == dims {
            return Ok(v);
        }
        self.emit(ReshapeTo { dims: Dims::from_slice(dims) }, &[v])
    }

    /// The result's axis `i` is `v`'s axis `perm[i]`.
    pub fn transpose(&mut self, v: ValueId, perm: &[usize]) -> OpResult<ValueId> {
        if perm.iter().enumerate().all(|(i, p)| i == *p) {
            return Ok(v);
        }
        self.emit(Transpose { perm: Some(Dims::from_slice(perm)) }, &[v])
    }

    pub fn add(&mut self, a: ValueId, b: ValueId) -> OpResult<ValueId> {
        self.emit(Add, &[a, b])
    }

    pub fn mul(&mut self, a: ValueId, b: ValueId) -> OpResult<ValueId> {
        self.emit(Mul, &[a, b])
    }

    /// `len` positions of `v` from `start` on, along `axis`.
    pub fn crop(&mut self, v: ValueId, axis: usize, start: usize, len: usize) -> OpResult<ValueId> {
        let mut count = self.dims(v)?;
        if start == 0 && count[axis] == len {
            return Ok(v);
        }
        let mut from = Extents::from_elem(0, count.len());
        (from[axis], count[axis]) = (start, len);
        self.emit(Crop { cut: Cut::dense(from, count) }, &[v])
    }

    pub fn concat(&mut self, parts: &[ValueId], axis: usize) -> OpResult<ValueId> {
        match parts {
            [one] => Ok(*one),
            _ => self.emit(Concat { axis: axis as i64 }, parts),
        }
    }

    /// A standard operator of opset `opset` with the given attributes, and its output 0.
    pub fn standard(
        &mut self,
        op_type: &str,
        opset: i64,
        attrs: &Attrs,
        inputs: &[Option<ValueId>],
    ) -> OpResult<ValueId> {
        let spec = Spec { domain: "", op_type, opset, attrs, inputs: inputs.len(), outputs: 1 };
        Ok(self.emit_all(create(&spec)?, inputs, 1)?[0])
    }

    /// `v` times a number.
    pub fn times(&mut self, v: ValueId, by: f64) -> OpResult<ValueId> {
        let by = self.scalar(by, self.dtype(v)?);
        self.emit(Mul, &[v, by])
    }
}

/// A composite operator alone in a graph, with operands of the given types, shapes and (where known) values; and its
/// outputs.
fn alone(op: &dyn Op, inputs: &[Option<&Meta>], outputs: usize) -> OpResult<(Graph, Vec<Option<ValueId>>)> {
    let mut graph = Graph::default();
    let operand = |m: &Option<&Meta>| {
        m.map(|m| match &m.value {
            Some(value) => graph.add_value("", Source::Constant(value.clone())),
            None => graph.add_input("", m.clone()),
        })
    };
    let inputs = inputs.iter().map(operand).collect();
    let wanted = vec![true; outputs];
    let made = op.lower(&mut Lowering { graph: &mut graph, inputs, wanted, hint: String::new() })?;
    Ok((graph, made))
}

/// Element types and shapes of a composite operator's outputs.
pub fn infer_lowered(op: &dyn Op, inputs: &[Option<&Meta>], outputs: usize) -> OpResult<Vec<Meta>> {
    let (graph, made) = alone(op, inputs, outputs)?;
    let mut metas = Vec::with_capacity(made.len());
    for v in made.into_iter().map_while(|v| v) {
        let meta = graph.value(v).meta.as_ref();
        let meta =
            meta.ok_or_else(|| OpError::Internal(format!("the shape of {} is not known", op.name())))?;
        metas.push(Meta::new(meta.dtype, &meta.dims));
    }
    Ok(metas)
}

/// Runs a composite operator outside any plan.
pub fn eval_lowered(op: &dyn Op, inputs: &[Option<&Tensor>], outputs: usize) -> OpResult<Vec<Tensor>> {
    let metas: Vec<Option<Meta>> =
        inputs.iter().map(|t| t.map(|t| Meta { value: Some(Arc::new(t.clone())), ..t.meta() })).collect();
    let refs: Vec<Option<&Meta>> = metas.iter().map(Option::as_ref).collect();
    let (graph, made) = alone(op, &refs, outputs)?;
    let wanted: Vec<ValueId> = made.into_iter().map_while(|v| v).collect();
    crate::exec::reference::interpret(&graph, &Default::default(), &wanted).map_err(|e| match e {
        Error::Op { source, .. } => source,
        other => OpError::Internal(other.to_string()),
    })
}

impl Graph {
    /// Replaces every composite operator by its nodes. Values keep their ids and names; nodes are renumbered.
    pub fn lower(&mut self) -> Result<()> {
        if !self.nodes.iter().any(|n| n.op.is_composite()) {
            return Ok(());
        }
        for (i, node) in std::mem::take(&mut self.nodes).into_iter().enumerate() {
            let computed =
                |g: &Graph, v: ValueId| matches!(g.value(v).source, Source::Node(n, _) if n.index() == i);
            // What was folded at plan time is not computed by its node any more.
            let live: Vec<bool> = node.outputs.iter().map(|v| v.is_some_and(|v| computed(self, v))).collect();
            let at = self.nodes.len();
            if !node.op.is_composite() || !live.contains(&true) {
                for (v, live) in node.outputs.iter().zip(&live) {
                    if let (Some(v), true) = (v, live)
                        && let Source::Node(n, _) = &mut self.value_mut(*v).source
                    {
                        *n = NodeId(at as u32);
                    }
                }
                self.nodes.push(node);
                continue;
            }
            self.lower_node(&node, &live)?;
        }
        Ok(())
    }

    fn lower_node(&mut self, node: &Node, live: &[bool]) -> Result<()> {
        let first = node.outputs.iter().flatten().next();
        let hint = first.map(|v| self.value(*v).name.clone()).unwrap_or_default();
        let described = match node.name.is_empty() {
            true => format!("{} (output '{hint}')", node.op.name()),
            false => format!("{} '{}' (output '{hint}')", node.op.name(), node.name),
        };
        let fail = |source: OpError| Error::Op { node: described.clone(), source };
        let at = self.nodes.len();
        let (inputs, wanted) = (node.inputs.clone(), live.to_vec());
        let mut l = Lowering { graph: self, inputs, wanted, hint: hint.clone() };
        let mut made = node.op.lower(&mut l).map_err(fail)?;
        for (k, v) in node.outputs.iter().enumerate() {
            let (Some(v), true) = (*v, live[k]) else { continue };
            let new = made.get(k).copied().flatten();
            let mut new = new.ok_or_else(|| fail(OpError::Unsupported(format!("output {k}"))))?;
            // The node that computes it gets the output's own value; an operand passed through gets a node.
            let free = |g: &Graph, new: ValueId| match g.value(new).source {
                Source::Node(n, slot) if n.index() >= at => Some((n, slot)),
                _ => None,
            };
            if free(self, new).is_none() || node.outputs.contains(&Some(new)) {
                new =
                    self.emit(&hint, Arc::new(crate::ops::cast::Identity), &[Some(new)], 1).map_err(fail)?[0];
            }
            let Some((n, slot)) = free(self, new) else { continue };
            self.nodes[n.index()].outputs[slot] = Some(v);
            let meta = self.value(new).meta.clone();
            let value = self.value_mut(v);
            (value.source, value.meta) = (Source::Node(n, slot), meta);
            for later in &mut self.nodes[at..] {
                later.inputs.iter_mut().filter(|i| **i == Some(new)).for_each(|i| *i = Some(v));
            }
            made.iter_mut().filter(|m| **m == Some(new)).for_each(|m| *m = Some(v));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::exec::reference::interpret;
    use crate::graph::{Bindings, Inferred};
    use crate::ops::composite::{Composite, Made, Recipe};

    /// X itself, X + X, and X + X again.
    #[derive(Debug)]
    struct Doubled;

    impl Recipe for Doubled {
        fn name(&self) -> &'static str {
            "Doubled"
        }

        fn outputs(&self) -> usize {
            3
        }

        fn lower(&self, l: &mut Lowering) -> Made {
            let x = l.x(0)?;
            let sum = l.add(x, x)?;
            let more = l.add(sum, x)?;
            assert!(l.meta(more)?.same_shape(&Meta::new(DType::F32, &[2])));
            Ok(vec![Some(x), Some(sum), Some(sum)])
        }
    }

    #[test]
    fn values_keep_their_ids_and_names() {
        let mut g = Graph::default();
        let x = g.add_input("x", Meta::new(DType::F32, &[2]));
        let before = g.add_node("", Arc::new(Add), vec![Some(x), Some(x)], &[Some("h")])[0];
        let names = [Some("a"), Some("b"), Some("c")];
        let made = g.add_node("node", Arc::new(Composite(Doubled)), vec![before], &names);
        let y = g.add_node("", Arc::new(Mul), vec![made[1], made[2]], &[Some("y")])[0].unwrap();
        g.outputs.push(y);
        assert_eq!(g.infer(&Bindings::new()).unwrap(), Inferred::Complete);
        assert!(g.nodes.iter().all(|n| !n.op.is_composite()));
        let wanted: Vec<ValueId> = made.iter().flatten().copied().chain([y]).collect();
        for (v, name) in wanted.iter().zip(["a", "b", "c", "y"]) {
            assert_eq!(g.value(*v).name, name);
            let Source::Node(n, slot) = g.value(*v).source else { panic!("{name} is not computed") };
            assert_eq!(g.node(n).outputs[slot], Some(*v));
        }
        let feeds = HashMap::from([(x, Tensor::from_slice(&[2], &[1.0f32, 2.0]).unwrap())]);
        let out = interpret(&g, &feeds, &wanted).unwrap();
        let out: Vec<f64> = out.iter().map(|t| t.to_f64()[1]).collect();
        assert_eq!(out, [4.0, 8.0, 8.0, 64.0]);
    }

    #[test]
    fn known_operands_are_folded_and_wrong_ones_named() {
        let mut g = Graph::default();
        let x = g.add_constant("x", Tensor::from_slice(&[2], &[1.0f32, 2.0]).unwrap());
        let made = g.add_node("", Arc::new(Composite(Doubled)), vec![Some(x)], &[None, Some("b")]);
        g.infer(&Bindings::new()).unwrap();
        assert!(matches!(&g.value(made[1].unwrap()).source, Source::Constant(t) if t.to_f64() == [2.0, 4.0]));
        let mut g = Graph::default();
        g.add_node("", Arc::new(Composite(Doubled)), vec![None], &[Some("b")]);
        let refused = g.infer(&Bindings::new()).unwrap_err().to_string();
        assert!(refused.contains("Doubled") && refused.contains("input 0"), "{refused}");
    }
}
