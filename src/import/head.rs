//! A new head: the last dense layer of a file gets another number of fresh outputs, or a named value gets a dense
//! layer of its own.
//!
//! The file's bytes are edited and imported again, so that everything after it (selection, checkpoints, export) sees
//! an ordinary model. Only what the head consists of, and shapes that the file declares and that change with it, are
//! edited; the rest stays byte for byte.

mod values;

use std::collections::{BTreeSet, HashMap, HashSet};

use prost::Message;

use super::order::captured;
use super::proto::{AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto};
use super::proto::{DimensionProto, TensorShapeProto, TensorTypeProto, TypeProto, ValueInfoProto};
use super::splice::{self, Constant};
use super::wire::{self, Edit, Field};
use super::{Model, Role, edited};
use crate::error::{Error, Result};
use crate::graph::{Bindings, Dim, Graph, Inferred, NodeId, Source, ValueId, WeightId};
use crate::tensor::{DType, Dims, Meta, Tensor};

/// What is asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct NewHead {
    /// How many fresh outputs (classes) the head has.
    pub outputs: usize,
    /// The outputs that the layer has already stay as they are, and the fresh ones come after them.
    pub add: bool,
    /// The value that gets a dense layer; `None`: the last dense layer of the first output is replaced.
    pub at: Option<String>,
    /// Of the initial weights.
    pub seed: u64,
}

/// `model` with a new head, and what was done, for people.
///
/// `inputs` are shapes that the model can be fed with. Weights are drawn uniformly from ±1/√fan-in by the seed,
/// biases are zero.
///
/// Fails when there is no layer to replace, when its outputs are not the model's, and when what follows it cannot take
/// another number of them.
pub fn replace(model: &Model, head: &NewHead, inputs: &[(String, Meta)]) -> Result<(Model, String)> {
    if head.outputs == 0 {
        return Err(Error::Config("--head needs at least one output".into()));
    }
    if head.add && head.at.is_some() {
        let what = "--head +N adds to the last dense layer, --at makes a new one: one of the two";
        return Err(Error::Config(what.into()));
    }
    let bytes = &model.files[0].bytes;
    let proto = ModelProto::decode(bytes.clone())
        .map_err(|e| Error::file(&model.path, format!("is damaged: {e}")))?;
    let Some(graph) = &proto.graph else { return Err(Error::file(&model.path, "has no graph")) };
    let before = inferred(model, inputs)?;
    let mut surgery = Surgery {
        model,
        head,
        outputs: head.outputs,
        proto: graph,
        old: &before,
        edits: Vec::new(),
        taken: names(model, graph),
    };
    let what = match &head.at {
        Some(at) => surgery.attach(at)?,
        None => surgery.renew()?,
    };
    let (edits, outputs) = (surgery.edits, surgery.outputs);
    let draft = edited(model, edits.clone())?;
    let after = inferred(&draft, inputs).map_err(|e| {
        Error::Config(format!("--head: what follows {what} cannot take {outputs} outputs: {e}"))
    })?;
    check(&before, &after, head.at.is_some(), outputs, &what)?;
    let more =
        declared(bytes, graph, &before, &after).map_err(|e| Error::file(&model.path, e.to_string()))?;
    if more.is_empty() {
        return Ok((draft, what));
    }
    drop(draft);
    Ok((edited(model, edits.into_iter().chain(more).collect())?, what))
}

/// The graph with all shapes for these inputs.
fn inferred(model: &Model, inputs: &[(String, Meta)]) -> Result<Graph> {
    let mut graph = model.graph.clone();
    let bindings: Bindings = inputs
        .iter()
        .filter_map(|(name, meta)| {
            Some((graph.inputs.iter().copied().find(|v| graph.value(*v).name == *name)?, meta.clone()))
        })
        .collect();
    match graph.infer(&bindings)? {
        Inferred::Complete => Ok(graph),
        Inferred::NeedsValues(v) => {
            let name = v.first().map_or("", |v| graph.value(*v).name.as_str()).to_string();
            Err(Error::value(name, "shapes depend on its values: no head can be fitted"))
        }
    }
}

/// Every name that a value of the file has.
fn names(model: &Model, proto: &GraphProto) -> HashSet<String> {
    let mut names: HashSet<String> = model.graph.values.iter().map(|v| v.name.clone()).collect();
    names.extend(proto.node.iter().flat_map(|n| n.output.iter().chain(&n.input)).cloned());
    names
}

/// The first output must have changed from the old number of classes to the new one, and in nothing else.
fn check(before: &Graph, after: &Graph, own: bool, outputs: usize, what: &str) -> Result<()> {
    let (Some(&old), Some(&new)) = (before.outputs.first(), after.outputs.first()) else {
        return Err(Error::Config("the model has no output".into()));
    };
    let dims = &after.meta(new)?.dims;
    let fits = match own {
        true => dims.len() == 2 && dims[1] == outputs,
        false => {
            let old = &before.meta(old)?.dims;
            let differ = old.iter().zip(dims).filter(|(a, b)| a != b).count();
            old.len() == dims.len() && differ <= 1 && dims.iter().skip(1).any(|d| *d == outputs)
        }
    };
    match fits {
        true => Ok(()),
        false => Err(Error::Config(format!(
            "--head: with {what} changed, output '{}' has shape {:?}: its classes do not come from that layer alone; \
             name a value to put a head on with --at VALUE",
            after.value(new).name,
            dims.as_slice()
        ))),
    }
}

/// A constant operand of the layer that is renewed.
struct Part {
    /// Position of the node in the file, and the operand.
    node: usize,
    slot: usize,
    weight: WeightId,
    dims: Dims,
    /// The axis that runs over the outputs.
    axis: usize,
    /// Bound of the initial values; 0 for a bias.
    bound: f32,
}

struct Surgery<'a> {
    model: &'a Model,
    head: &'a NewHead,
    /// Of the head, those that stay included.
    outputs: usize,
    proto: &'a GraphProto,
    /// With shapes.
    old: &'a Graph,
    edits: Vec<Edit>,
    taken: HashSet<String>,
}

impl Surgery<'_> {
    fn bytes(&self) -> &[u8] {
        &self.model.files[0].bytes
    }

    fn fields(&self, number: u32) -> Result<Vec<Field>> {
        wire::find_all(self.bytes(), &[7, number]).map_err(|e| Error::file(&self.model.path, e.to_string()))
    }

    fn fresh(&mut self, base: &str) -> String {
        let name = splice::fresh(base, |n| self.taken.contains(n));
        self.taken.insert(name.clone());
        name
    }

    /// Position in the file of the node that computes a graph node's first output.
    fn position(&self, id: NodeId) -> Result<usize> {
        let out = self.old.node(id).outputs.iter().flatten().next();
        let name = out.map_or("", |v| self.old.value(*v).name.as_str());
        self.proto.node.iter().position(|n| n.output.first().is_some_and(|o| o == name)).ok_or_else(|| {
            Error::Config(format!(
                "--head: the last dense layer, {}, lies inside a function: name a value to put a head on with --at VALUE",
                self.old.describe(id)
            ))
        })
    }

    /// The last dense layer before the first output, and its weight.
    fn last_layer(&self) -> Result<(NodeId, WeightId)> {
        let mut seen = vec![false; self.old.values.len()];
        let mut stack: Vec<ValueId> = self.old.outputs.first().copied().into_iter().collect();
        let mut nodes: BTreeSet<NodeId> = BTreeSet::new();
        while let Some(v) = stack.pop() {
            if !std::mem::replace(&mut seen[v.index()], true)
                && let Source::Node(n, _) = self.model.graph.value(v).source
            {
                nodes.insert(n);
                stack.extend(self.model.graph.node(n).inputs.iter().flatten());
            }
        }
        let dense = |n: NodeId| {
            matches!(self.old.node(n).op.name(), "Gemm" | "MatMul" | "Conv")
                .then(|| self.used_by(n, 1, Role::Weight))
                .flatten()
        };
        nodes.iter().rev().find_map(|&n| Some((n, dense(n)?))).ok_or_else(|| {
            Error::Config(
                "--head: no dense layer with a constant weight leads to the first output: name a value to put a head on \
                 with --at VALUE"
                    .into(),
            )
        })
    }

    /// The weight in an operand slot of a node.
    fn used_by(&self, node: NodeId, slot: usize, role: Role) -> Option<WeightId> {
        let uses = |w: &super::Weight| w.uses.iter().any(|u| (u.node, u.slot, u.role) == (node, slot, role));
        self.model.weights.iter().position(uses).map(|i| WeightId(i as u32))
    }

    fn dims(&self, node: NodeId, slot: usize) -> Result<Dims> {
        match self.old.node(node).inputs.get(slot).copied().flatten() {
            Some(v) => Ok(self.old.meta(v)?.dims.clone()),
            None => Err(Error::Config(format!("{} has no operand {slot}", self.old.describe(node)))),
        }
    }

    /// Replaces the last dense layer.
    fn renew(&mut self) -> Result<String> {
        let (layer, weight) = self.last_layer()?;
        let what = self.old.describe(layer);
        let refuse = |why: &str| Err(Error::Config(format!("--head: {what} cannot be renewed: {why}")));
        let node = self.position(layer)?;
        let attr = |name: &str| self.proto.node[node].attribute.iter().find(|a| a.name == name).map(|a| a.i);
        let dims = self.dims(layer, 1)?;
        let axis = match self.old.node(layer).op.name() {
            "Conv" if attr("group").unwrap_or(1) != 1 => return refuse("a grouped convolution"),
            "Conv" => 0,
            _ if dims.len() != 2 => return refuse("its weight is no matrix"),
            "Gemm" => usize::from(attr("transB").unwrap_or(0) == 0),
            _ => 1,
        };
        let old = dims[axis];
        if self.head.add {
            self.outputs += old;
        }
        let fan_in = dims.iter().product::<usize>() / old.max(1);
        let bound = 1.0 / (fan_in.max(1) as f32).sqrt();
        let mut parts = vec![Part { node, slot: 1, weight, dims, axis, bound }];
        // The bias: an operand, or added afterwards.
        let mut bias = |at: NodeId, slot: usize, weight: Option<WeightId>| -> Result<()> {
            if let Some(weight) = weight {
                let dims = self.dims(at, slot)?;
                if let Some(axis) = dims.iter().rposition(|d| *d == old && old > 1 || dims.len() == 1) {
                    parts.push(Part { node: self.position(at)?, slot, weight, dims, axis, bound: 0.0 });
                }
            }
            Ok(())
        };
        bias(layer, 2, self.used_by(layer, 2, Role::Bias))?;
        let output = self.old.node(layer).output();
        for (i, n) in self.old.nodes.iter().enumerate() {
            let at = NodeId(i as u32);
            if n.op.name() == "Add" && n.inputs.iter().any(|v| *v == output && v.is_some()) {
                for slot in 0..2 {
                    bias(at, slot, self.used_by(at, slot, Role::Bias))?;
                }
            }
        }
        let mut replaced = HashMap::new();
        for part in parts {
            self.renew_constant(part, &mut replaced)?;
        }
        self.reshapes(layer, old)?;
        Ok(what)
    }

    /// Gives an operand a fresh constant; the old one goes when nothing else reads it.
    fn renew_constant(
        &mut self,
        mut part: Part,
        replaced: &mut HashMap<(usize, usize), String>,
    ) -> Result<()> {
        let model = self.model;
        let weight = model.weight(part.weight);
        let operand = self.proto.node[part.node].input[part.slot].clone();
        let values = self.values(&mut part, &operand)?;
        replaced.insert((part.node, part.slot), String::new());
        let dead = self.dead(&operand, replaced);
        let nodes = self.fields(1)?;
        // A name that nobody needs any more is used again.
        let again = dead.contains(&operand) && operand == weight.name;
        let name = if again { operand.clone() } else { self.fresh(&format!("{}.head", weight.name)) };
        let constant = Constant {
            values,
            dtype: weight.dtype,
            dims: part.dims.iter().map(|d| *d as i64).collect(),
            name: name.clone(),
            ir_version: model.ir_version,
        };
        let field = constant.field(String::new());
        let mut placed = false;
        for (fields, number) in [(self.fields(5)?, 5), (self.fields(11)?, 11), (nodes.clone(), 1)] {
            for f in &fields {
                if !self.declares(f, number, &dead) {
                    continue;
                }
                // An initializer takes the place of the one before it.
                let here =
                    number == 5 && again && self.model.ir_version >= splice::FREE_INITIALIZERS && !placed;
                placed |= here;
                let bytes = if here { field.clone() } else { Vec::new() };
                self.edits.push(Edit { path: vec![7], range: f.whole.clone(), bytes });
            }
        }
        if !placed {
            let at = nodes[part.node].whole.start;
            self.edits.push(Edit { path: vec![7], range: at..at, bytes: field });
        }
        if name != operand {
            self.rename_operand(&nodes[part.node], part.slot, &name)?;
        }
        replaced.insert((part.node, part.slot), name);
        Ok(())
    }

    /// The stored values of a part, and its dimensions as they will be: fresh ones, after those that stay.
    fn values(&self, part: &mut Part, operand: &str) -> Result<Vec<u8>> {
        let weight = self.model.weight(part.weight);
        let old = part.dims.clone();
        part.dims[part.axis] = self.head.outputs;
        let fresh = values::fresh(&part.dims, part.bound, self.head.seed, weight.dtype);
        if !self.head.add {
            return Ok(fresh);
        }
        if operand != weight.name || old != weight.dims {
            let what = "is moved or reshaped before the layer reads it: --head +N cannot add to it";
            return Err(Error::value(&weight.name, what));
        }
        let stays = weight.stored(&self.model.files)?;
        let outer: usize = old[..part.axis].iter().product();
        part.dims[part.axis] = self.outputs;
        if outer == 0 {
            return Ok(Vec::new());
        }
        let (a, b) = (stays.len() / outer, fresh.len() / outer);
        let row = |i: usize| [&stays[i * a..(i + 1) * a], &fresh[i * b..(i + 1) * b]].concat();
        Ok((0..outer).flat_map(row).collect())
    }

    fn rename_operand(&mut self, node: &Field, slot: usize, name: &str) -> Result<()> {
        let edit = splice::operand(self.bytes(), node, slot, name)
            .map_err(|e| Error::file(&self.model.path, e.to_string()))?
            .ok_or_else(|| Error::file(&self.model.path, "an operand is not where it was"))?;
        self.edits.push(edit);
        Ok(())
    }

    /// What only `name` leads to when the operands in `replaced` no longer read what they did: names of constants and
    /// of nodes that move them.
    fn dead(&self, name: &str, replaced: &HashMap<(usize, usize), String>) -> HashSet<String> {
        let mut dead = HashSet::new();
        let mut removed: HashSet<usize> = HashSet::new();
        let mut todo = vec![name.to_string()];
        while let Some(name) = todo.pop() {
            let read = self.proto.output.iter().any(|o| o.name == name)
                || self.proto.node.iter().enumerate().any(|(i, n)| {
                    !removed.contains(&i)
                        && (n
                            .input
                            .iter()
                            .enumerate()
                            .any(|(s, x)| *x == name && !replaced.contains_key(&(i, s)))
                            || captured(n).contains(&name.as_str()))
                });
            if read {
                continue;
            }
            let maker = self.proto.node.iter().position(|n| n.output.contains(&name));
            if let Some(i) = maker {
                if self.proto.node[i].output.len() != 1 {
                    continue;
                }
                removed.insert(i);
                todo.extend(self.proto.node[i].input.iter().filter(|x| !x.is_empty()).cloned());
            } else if !self.proto.initializer.iter().any(|t| t.name == name) {
                continue; // an input of the model
            }
            dead.insert(name);
        }
        dead
    }

    /// Whether a field of the graph (node, initializer or input) is one of the dead names.
    fn declares(&self, f: &Field, number: u32, dead: &HashSet<String>) -> bool {
        let Some(payload) = self.bytes().get(f.payload.clone()) else { return false };
        match number {
            1 => NodeProto::decode(payload).is_ok_and(|n| n.output.len() == 1 && dead.contains(&n.output[0])),
            5 => TensorProto::decode(payload).is_ok_and(|t| dead.contains(&t.name)),
            _ => ValueInfoProto::decode(payload).is_ok_and(|v| dead.contains(&v.name)),
        }
    }

    /// Constant shapes after the layer in which the old number of outputs is written out.
    fn reshapes(&mut self, layer: NodeId, old: usize) -> Result<()> {
        let mut after = vec![false; self.old.values.len()];
        let nodes = self.fields(1)?;
        for i in layer.index()..self.old.nodes.len() {
            let n = &self.old.nodes[i];
            let reached = i == layer.index() || n.inputs.iter().flatten().any(|v| after[v.index()]);
            if !reached {
                continue;
            }
            n.outputs.iter().flatten().for_each(|v| after[v.index()] = true);
            let shape = n.inputs.get(1).copied().flatten().filter(|_| n.op.name() == "Reshape");
            let Some(shape) =
                shape.filter(|v| matches!(self.model.graph.value(*v).source, Source::Constant(_)))
            else {
                continue;
            };
            let Source::Constant(t) = &self.model.graph.value(shape).source else { continue };
            let Ok(mut ints) = t.to_ints() else { continue };
            let at: Vec<usize> = (0..ints.len()).filter(|k| ints[*k] == old as i64).collect();
            let [k] = at.as_slice() else { continue };
            ints[*k] = self.outputs as i64;
            let position = self.position(NodeId(i as u32))?;
            let name = self.fresh(&format!("{}.head", self.old.value(shape).name));
            let constant = Constant {
                name: name.clone(),
                dtype: DType::I64,
                dims: vec![ints.len() as i64],
                values: Tensor::ints(&ints).bytes().to_vec(),
                ir_version: self.model.ir_version,
            };
            let start = nodes[position].whole.start;
            self.edits.push(Edit {
                path: vec![7],
                range: start..start,
                bytes: constant.field(String::new()),
            });
            self.rename_operand(&nodes[position], 1, &name)?;
        }
        Ok(())
    }

    /// Puts a dense layer on a named value; its output becomes the first of the model.
    fn attach(&mut self, at: &str) -> Result<String> {
        let known = |v: &ValueId| self.old.value(*v).name == at;
        let value = (0..self.model.graph.values.len() as u32).map(ValueId).find(known);
        let own = self.proto.node.iter().any(|n| n.output.iter().any(|o| o == at))
            || self.proto.input.iter().any(|i| i.name == at);
        let Some(value) = value.filter(|_| own) else {
            return Err(Error::Config(format!(
                "--at {at}: the model has no such value; `retune inspect` shows some"
            )));
        };
        let meta = self.old.meta(value)?.clone();
        if !meta.dtype.is_float() {
            return Err(Error::Config(format!("--at {at}: is {}, a head needs floats", meta.dtype)));
        }
        let pooled = match meta.dims.len() {
            2 => false,
            4 | 5 => true,
            _ => {
                return Err(Error::Config(format!(
                    "--at {at}: has shape {:?}; a head goes on a value [N, features] or a feature map [N, C, H, W]",
                    meta.dims.as_slice()
                )));
            }
        };
        let (width, dtype) = (meta.dims[1], self.stored_type(value));
        let (weight, bias) = (self.fresh("head.weight"), self.fresh("head.bias"));
        let (logits, n) = (self.fresh("logits"), self.head.outputs);
        let mut fields = Vec::new();
        let constant = |name: &str, dims: &[usize], bound: f32| {
            let constant = Constant {
                name: name.into(),
                dtype,
                dims: dims.iter().map(|d| *d as i64).collect(),
                values: values::fresh(dims, bound, self.head.seed, dtype),
                ir_version: self.model.ir_version,
            };
            constant.field(String::new())
        };
        fields.extend(constant(&weight, &[n, width], 1.0 / (width.max(1) as f32).sqrt()));
        fields.extend(constant(&bias, &[n], 0.0));
        let int =
            |name: &str, i: i64| AttributeProto { name: name.into(), r#type: 2, i, ..Default::default() };
        let mut node =
            |op: &str, name: &str, input: &[&str], output: &str, attribute: Vec<AttributeProto>| {
                let input = input.iter().map(|s| s.to_string()).collect();
                let node = NodeProto {
                    op_type: op.into(),
                    name: name.into(),
                    input,
                    output: vec![output.into()],
                    attribute,
                    ..Default::default()
                };
                wire::put_field(&mut fields, 1, &node.encode_to_vec());
            };
        let mut features = at.to_string();
        if pooled {
            let (mean, flat) = (self.fresh("head.pooled"), self.fresh("head.features"));
            node("GlobalAveragePool", "head/pool", &[&features], &mean, Vec::new());
            node("Flatten", "head/flatten", &[&mean], &flat, vec![int("axis", 1)]);
            features = flat;
        }
        node("Gemm", "head", &[&features, &weight, &bias], &logits, vec![int("transB", 1)]);
        let end = self.fields(1)?.last().map(|f| f.whole.end);
        let Some(end) = end else { return Err(Error::file(&self.model.path, "has no node")) };
        self.edits.push(Edit { path: vec![7], range: end..end, bytes: fields });

        let output = self.output(&logits, value, dtype);
        let mut bytes = Vec::new();
        wire::put_field(&mut bytes, 12, &output.encode_to_vec());
        let first = self.fields(12)?.first().map_or(end, |f| f.whole.start);
        self.edits.push(Edit { path: vec![7], range: first..first, bytes });
        Ok(format!("Gemm 'head' (output '{logits}') on '{at}'"))
    }

    /// The type that the file computes a value in: half floats are widened here, not there.
    fn stored_type(&self, value: ValueId) -> DType {
        let declared = self.model.graph.value(value).declared.as_ref().map(|d| d.dtype);
        let mut weights = self.model.weights.iter().filter(|w| w.trainable).map(|w| w.dtype);
        let first = weights.next().unwrap_or(DType::F32);
        declared.unwrap_or(if weights.all(|d| d == first) { first } else { DType::F32 })
    }

    /// The declaration of the new output; its batch is that of the value, or of the first input.
    fn output(&self, name: &str, value: ValueId, dtype: DType) -> ValueInfoProto {
        let batch = |v: ValueId| match self.model.graph.value(v).declared.as_ref()?.dims.as_ref()?.first()? {
            Dim::Unknown => None,
            d => Some(d.clone()),
        };
        let inputs = self.model.graph.inputs.first().copied();
        let batch = inputs.and_then(batch).or_else(|| batch(value));
        let batch = match batch {
            Some(Dim::Fixed(n)) => DimensionProto { dim_value: Some(n as i64), ..Default::default() },
            Some(Dim::Symbol(s)) => DimensionProto { dim_param: Some(s), ..Default::default() },
            _ => DimensionProto { dim_param: Some("batch".into()), ..Default::default() },
        };
        let classes = DimensionProto { dim_value: Some(self.head.outputs as i64), ..Default::default() };
        let tensor = TensorTypeProto {
            elem_type: dtype.to_onnx(),
            shape: Some(TensorShapeProto { dim: vec![batch, classes] }),
        };
        ValueInfoProto {
            name: name.into(),
            r#type: Some(TypeProto { tensor_type: Some(tensor), ..Default::default() }),
        }
    }
}

/// Edits of declared dimensions (outputs and inner values) that have changed.
fn declared(
    bytes: &[u8],
    proto: &GraphProto,
    before: &Graph,
    after: &Graph,
) -> std::result::Result<Vec<Edit>, wire::WireError> {
    let by_name = |g: &Graph| -> HashMap<String, Dims> {
        let meta = |v: &crate::graph::Value| Some((v.name.clone(), v.meta.as_ref()?.dims.clone()));
        g.values.iter().filter_map(meta).collect()
    };
    let (old, new) = (by_name(before), by_name(after));
    let mut edits = Vec::new();
    for (number, infos) in [(12, &proto.output), (13, &proto.value_info)] {
        for (f, info) in wire::find_all(bytes, &[7, number])?.iter().zip(infos) {
            let (Some(old), Some(new)) = (old.get(&info.name), new.get(&info.name)) else { continue };
            if old.len() != new.len() {
                continue;
            }
            let dims = wire::descend(bytes, f.payload.clone(), &[2, 1, 2, 1])?;
            for ((dim, &a), &b) in dims.iter().zip(old).zip(new) {
                for value in wire::descend(bytes, dim.payload.clone(), &[1])? {
                    if a != b && wire::varint(bytes, value.payload.start, value.payload.end)?.0 == a as u64 {
                        let mut n = Vec::new();
                        wire::put_varint(&mut n, b as u64);
                        edits.push(Edit {
                            path: vec![7, number, 2, 1, 2, 1],
                            range: value.payload,
                            bytes: n,
                        });
                    }
                }
            }
        }
    }
    Ok(edits)
}

#[cfg(test)]
mod tests;
