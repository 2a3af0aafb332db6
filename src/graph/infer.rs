//! Shapes and element types of every value, and the values of what can be computed before the run.

use std::collections::HashMap;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::error::{Error, OpError, Result};
use crate::graph::control::Expansion;
use crate::graph::{Dim, Graph, NodeId, Source, ValueId};
use crate::ops::eval;
use crate::ops::quant::FakeQuantize;
use crate::tensor::{Dims, Meta, Tensor};

/// Outputs of at most this many elements are computed at plan time when their inputs are known.
const FOLD_LIMIT: usize = 1 << 16;

/// What the graph's inputs are bound to: shape and type, and for shape-like ones the value.
pub type Bindings = HashMap<ValueId, Meta>;

/// What inference still lacks.
#[derive(Debug, PartialEq, Eq)]
pub enum Inferred {
    Complete,
    /// Shapes depend on the values of these graph inputs: bind them with values.
    NeedsValues(Vec<ValueId>),
}

impl Graph {
    /// Infers all shapes for the given inputs, folds what is constant and replaces composite operators.
    ///
    /// Weights and states must have their `meta`. A batch dimension that the file fixes, and that the
    /// binding changes, is changed in constant `Reshape` and `Expand` shapes too, and in what a constant has as many equal rows
    /// of: the initial states of recurrent layers.
    pub fn infer(&mut self, bindings: &Bindings) -> Result<Inferred> {
        for &input in &self.inputs.clone() {
            let meta = bindings
                .get(&input)
                .or(self.value(input).meta.as_ref())
                .cloned()
                .ok_or_else(|| Error::value(&self.value(input).name, "this input is not fed"))?;
            meta.check_size().map_err(|e| Error::value(&self.value(input).name, e.to_string()))?;
            if let Some(value) = &meta.value {
                self.value_mut(input).source = Source::Constant(value.clone());
            }
            self.value_mut(input).meta = Some(meta);
        }
        for (v, value) in self.fixed_values()? {
            self.value_mut(v).meta = Some(Meta { value: Some(value.clone()), ..value.meta() });
            self.value_mut(v).source = Source::Constant(value);
        }
        let rebatch = self.rebound_batch();
        let mut i = 0;
        while i < self.nodes.len() {
            let id = NodeId(i as u32);
            if let Some((old, new)) = rebatch {
                self.rebind_shape_operand(id, old, new);
                self.rebind_rows(id, old, new);
            }
            let done = match self.expand(id) {
                // What stands here now is looked at next.
                Ok(Expansion::Done) => continue,
                Ok(Expansion::Needs(inputs)) => return Ok(Inferred::NeedsValues(inputs)),
                Ok(Expansion::Unknown) => self.infer_node(id),
                Err(e) => Err(e),
            };
            match done {
                Ok(()) => i += 1,
                Err(OpError::NeedsValue(index)) => {
                    let needed = self.nodes[i].inputs.get(index).copied().flatten();
                    let roots = needed.map(|v| self.input_ancestors(v)).unwrap_or_default();
                    if roots.is_empty() {
                        return Err(Error::Op {
                            node: self.describe(id),
                            source: OpError::NeedsValue(index),
                        });
                    }
                    return Ok(Inferred::NeedsValues(roots));
                }
                Err(source) => return Err(Error::Op { node: self.describe(id), source }),
            }
        }
        FakeQuantize::join(self);
        self.lower()?;
        Ok(Inferred::Complete)
    }

    pub(super) fn infer_node(&mut self, id: NodeId) -> std::result::Result<(), OpError> {
        let node = self.node(id).clone();
        let mut metas = Vec::with_capacity(node.inputs.len());
        for v in &node.inputs {
            metas.push(match v {
                Some(v) => Some(self.value(*v).meta.as_ref().ok_or_else(|| {
                    OpError::Internal(format!("the shape of '{}' is not known", self.value(*v).name))
                })?),
                None => None,
            });
        }
        let outs = node.op.infer(&metas)?;
        outs.iter().try_for_each(Meta::check_size)?;
        let known = metas.iter().flatten().all(|m| m.value.is_some());
        let small = outs.iter().map(Meta::len).sum::<usize>() <= FOLD_LIMIT;
        let fold = known && small && node.op.is_pure() && outs.iter().any(|m| m.value.is_none());
        let outs = if fold {
            let values: Vec<Option<&Tensor>> =
                metas.iter().map(|m| m.and_then(|m| m.value.as_deref())).collect();
            let tensors = eval(node.op.as_ref(), &values)?;
            tensors.into_iter().map(|t| Meta { value: Some(Arc::new(t.clone())), ..t.meta() }).collect()
        } else {
            outs
        };
        for (i, v) in node.outputs.iter().enumerate() {
            let Some(v) = v else { continue };
            let meta = outs.get(i).cloned().ok_or_else(|| {
                OpError::Unsupported(format!("output {i} (this operator computes {} outputs)", outs.len()))
            })?;
            if let Some(value) = &meta.value {
                self.value_mut(*v).source = Source::Constant(value.clone());
            }
            self.value_mut(*v).meta = Some(meta);
        }
        Ok(())
    }

    /// The graph inputs that `v` is computed from.
    pub(super) fn input_ancestors(&self, v: ValueId) -> Vec<ValueId> {
        let mut seen = vec![false; self.values.len()];
        let mut stack = vec![v];
        let mut roots = Vec::new();
        while let Some(v) = stack.pop() {
            if std::mem::replace(&mut seen[v.index()], true) {
                continue;
            }
            match self.value(v).source {
                Source::Input => roots.push(v),
                Source::Node(n, _) => stack.extend(self.node(n).inputs.iter().flatten()),
                _ => {}
            }
        }
        roots.sort();
        roots
    }

    /// (declared, bound) batch size where the file fixes it and the binding differs.
    fn rebound_batch(&self) -> Option<(usize, usize)> {
        self.inputs.iter().find_map(|&v| {
            let value = self.value(v);
            let declared = value.declared.as_ref()?.dims.as_ref()?;
            let bound = value.meta.as_ref()?;
            match (declared.first()?, bound.dims.first()?) {
                (Dim::Fixed(old), &new) if *old != new => Some((*old, new)),
                _ => None,
            }
        })
    }

    /// Changes the batch baked into a constant shape operand: where the data's first dimension is the new
    /// batch and the constant's first entry is the old one.
    fn rebind_shape_operand(&mut self, id: NodeId, old: usize, new: usize) {
        let node = self.node(id);
        if !matches!(node.op.name(), "Reshape" | "Expand") {
            return;
        }
        let (Some(Some(data)), Some(Some(shape))) = (node.inputs.first(), node.inputs.get(1)) else { return };
        let Source::Constant(constant) = &self.value(*shape).source else { return };
        let first = self.value(*data).meta.as_ref().and_then(|m| m.dims.first().copied());
        let Ok(mut ints) = constant.to_ints() else { return };
        if first != Some(new) || ints.first() != Some(&(old as i64)) {
            return;
        }
        ints[0] = new as i64;
        let name = format!("{}#batch", self.value(*shape).name);
        let rebound = self.add_constant(name, Tensor::ints(&ints));
        self.nodes[id.index()].inputs[1] = Some(rebound);
    }

    /// Takes one row of constants that are the same for each sample of the old batch: `Expand` repeats it, and recurrent layers
    /// take it for every sample's.
    fn rebind_rows(&mut self, id: NodeId, old: usize, new: usize) {
        let operands: SmallVec<[(usize, usize); 2]> = match self.node(id).op.name() {
            "Expand" => self.repeated(id, old, new).map(|axis| (0, axis)).into_iter().collect(),
            "RNN" | "GRU" => SmallVec::from_slice(&[(5, 1)]),
            "LSTM" => SmallVec::from_slice(&[(5, 1), (6, 1)]),
            _ => return,
        };
        for (slot, axis) in operands {
            let Some(v) = self.node(id).inputs.get(slot).copied().flatten() else { continue };
            let Source::Constant(rows) = &self.value(v).source else { continue };
            let Some(one) = one_of(rows, axis).filter(|_| rows.dims()[axis] == old) else { continue };
            let name = format!("{}#batch", self.value(v).name);
            self.nodes[id.index()].inputs[slot] = Some(self.add_constant(name, one));
        }
    }

    /// The axis of an `Expand`'s data that has the old batch where its target has the new one.
    fn repeated(&self, id: NodeId, old: usize, new: usize) -> Option<usize> {
        let meta = |slot: usize| self.value(self.node(id).inputs.get(slot).copied().flatten()?).meta.as_ref();
        let (data, target) = (meta(0)?, meta(1)?.value.as_ref()?.to_ints().ok()?);
        // Aligned from the right.
        let missing = target.len().checked_sub(data.rank())?;
        (0..data.rank()).find(|&a| data.dims[a] == old && target[missing + a] == new as i64)
    }
}

/// What all slices along an axis are, if they are the same.
fn one_of(t: &Tensor, axis: usize) -> Option<Tensor> {
    let (count, mut dims) = (*t.dims().get(axis)?, Dims::from_slice(t.dims()));
    let slice = dims[axis + 1..].iter().product::<usize>() * t.dtype().size();
    if count * slice == 0 {
        return None;
    }
    let all = t.bytes().chunks_exact(count * slice);
    let same = all.clone().all(|block| block.chunks_exact(slice).all(|s| s == &block[..slice]));
    let first: Vec<u8> = all.flat_map(|block| &block[..slice]).copied().collect();
    dims[axis] = 1;
    same.then(|| Tensor::from_bytes(t.dtype(), &dims, &first).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::Declared;
    use crate::ops::{Attr, Attrs, Spec, create};
    use crate::tensor::DType;

    fn op(op_type: &str, inputs: usize) -> Arc<dyn crate::ops::Op> {
        create(&Spec { domain: "", op_type, opset: 17, attrs: &Attrs::default(), inputs, outputs: 1 })
            .unwrap()
    }

    /// Input `x`, and what reshapes it.
    fn reshaped(declared: usize, shape: &[i64]) -> (Graph, ValueId) {
        let mut g = Graph::default();
        let x = g.add_value("x", Source::Input);
        let dims = Some(vec![Dim::Fixed(declared), Dim::Fixed(2), Dim::Fixed(3)]);
        g.value_mut(x).declared = Some(Declared { dtype: DType::F32, dims });
        g.inputs.push(x);
        let shape = g.add_constant("shape", Tensor::ints(shape));
        let y = g.add_node("", op("Reshape", 2), vec![Some(x), Some(shape)], &[Some("y")])[0].unwrap();
        g.outputs.push(y);
        (g, y)
    }

    fn dims(declared: usize, fed: usize, shape: &[i64]) -> Result<Vec<usize>> {
        let (mut g, y) = reshaped(declared, shape);
        let x = g.inputs[0];
        g.infer(&Bindings::from([(x, Meta::new(DType::F32, &[fed, 2, 3]))]))?;
        Ok(g.meta(y)?.dims.to_vec())
    }

    #[test]
    fn a_batch_baked_into_a_shape_is_rebound() {
        assert_eq!(dims(1, 4, &[1, 6]).unwrap(), [4, 6]);
        assert_eq!(dims(1, 4, &[1, -1]).unwrap(), [4, 6]);
        assert_eq!(dims(1, 1, &[1, 6]).unwrap(), [1, 6]);
        assert_eq!(dims(1, 4, &[-1, 6]).unwrap(), [4, 6]);
        let refused = dims(1, 4, &[2, 3]).unwrap_err().to_string();
        assert!(refused.contains("Reshape"), "{refused}");
    }

    /// Zeros for a batch of three, as exporters bake them in: for each sample of another batch.
    #[test]
    fn a_batch_baked_into_initial_states_is_rebound() {
        let constant = |dims: &[usize], f: &dyn Fn(usize) -> f32| {
            let values: Vec<f32> = (0..dims.iter().product()).map(f).collect();
            Tensor::from_slice(dims, &values).unwrap()
        };
        let rows = |expanded: bool, fed: usize, state: &dyn Fn(usize) -> f32| {
            let mut g = Graph::default();
            let x = g.add_value("x", Source::Input);
            let dims = Some(vec![Dim::Fixed(3), Dim::Fixed(5), Dim::Fixed(2)]);
            g.value_mut(x).declared = Some(Declared { dtype: DType::F32, dims });
            g.inputs.push(x);
            let perm = Attrs(std::collections::BTreeMap::from([("perm".into(), Attr::Ints(vec![1, 0, 2]))]));
            let spec =
                Spec { attrs: &perm, op_type: "Transpose", domain: "", opset: 17, inputs: 1, outputs: 1 };
            let t = g.add_node("", create(&spec).unwrap(), vec![Some(x)], &[Some("t")])[0];
            let [w, r] =
                [[1, 12, 2], [1, 12, 4]].map(|dims| g.add_constant("", constant(&dims, &|i| i as f32)));
            let mut h = Some(g.add_constant("h", constant(&[1, 3, 4], state)));
            if expanded {
                let shape = g.add_constant("shape", Tensor::ints(&[1, fed as i64, 4]));
                h = g.add_node("", op("Expand", 2), vec![h, Some(shape)], &[Some("e")])[0];
            }
            let size = Attrs(std::collections::BTreeMap::from([("hidden_size".into(), Attr::Int(4))]));
            let spec = Spec { attrs: &size, op_type: "GRU", domain: "", opset: 14, inputs: 6, outputs: 1 };
            let inputs = vec![t, Some(w), Some(r), None, None, h];
            let y = g.add_node("", create(&spec).unwrap(), inputs, &[Some("y")])[0].unwrap();
            g.outputs.push(y);
            g.infer(&Bindings::from([(x, Meta::new(DType::F32, &[fed, 5, 2]))]))?;
            Ok::<_, Error>(g.meta(y)?.dims.to_vec())
        };
        for expanded in [false, true] {
            for fed in [1, 3, 7] {
                assert_eq!(rows(expanded, fed, &|i| (i % 4) as f32).unwrap(), [5, 1, fed, 4]);
            }
            let refused = rows(expanded, 7, &|i| i as f32).unwrap_err().to_string();
            assert!(refused.contains(if expanded { "Expand" } else { "initial state" }), "{refused}");
        }
    }

    #[test]
    fn shape_arithmetic_is_folded() {
        let mut g = Graph::default();
        let x = g.add_input("x", Meta::new(DType::F32, &[2, 3, 4]));
        let shape = g.add_node("", op("Shape", 1), vec![Some(x)], &[Some("shape")])[0];
        let y = g.add_node("", op("Reshape", 2), vec![Some(x), shape], &[Some("y")])[0].unwrap();
        assert_eq!(g.infer(&Bindings::new()).unwrap(), Inferred::Complete);
        assert_eq!(g.meta(y).unwrap().dims.as_slice(), [2, 3, 4]);
        assert!(matches!(g.value(shape.unwrap()).source, Source::Constant(_)));
    }

    #[test]
    fn inputs_whose_values_decide_are_named() {
        let mut g = Graph::default();
        let x = g.add_input("x", Meta::new(DType::F32, &[6]));
        let shape = g.add_input("shape", Meta::new(DType::I64, &[2]));
        let y = g.add_node("", op("Reshape", 2), vec![Some(x), Some(shape)], &[Some("y")])[0].unwrap();
        assert_eq!(g.clone().infer(&Bindings::new()).unwrap(), Inferred::NeedsValues(vec![shape]));
        let value = Some(Arc::new(Tensor::ints(&[2, 3])));
        let bound = Meta { value, ..Meta::new(DType::I64, &[2]) };
        assert_eq!(g.infer(&Bindings::from([(shape, bound)])).unwrap(), Inferred::Complete);
        assert_eq!(g.meta(y).unwrap().dims.as_slice(), [2, 3]);
    }

    #[test]
    fn tensors_that_no_machine_holds_are_refused() {
        let long = 1usize << 21;
        for dims in [[[1, long], [long, 1]], [[long, long], [1, 1]], [[0, usize::MAX], [1, 1]]] {
            let mut g = Graph::default();
            let [a, b] = dims.map(|d| Some(g.add_input("x", Meta::new(DType::F32, &d))));
            g.add_node("", op("Add", 2), vec![a, b], &[Some("y")]);
            let refused = g.infer(&Bindings::new()).unwrap_err().to_string();
            assert!(refused.contains("too large"), "{refused}");
        }
    }
}
