//! One graph node per ONNX node, in an order in which they can run; constants become values.

mod quantised;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use crate::error::{Blocker, Error, Result};
use crate::graph::{Declared, Dim, Graph, NodeId, Source, ValueId, WeightId};
use crate::import::attrs::{self, attrs};
use crate::import::bodies;
use crate::import::external::Files;
use crate::import::flat::{Flat, Opsets, Origin, flatten};
use crate::import::order::{captured, describe, order};
use crate::import::proto::{EXTERNAL, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto};
use crate::import::roles;
use crate::import::sequences;
use crate::import::weights::{Encoding, Location, Reader, Role, Split, Weight, byte_size, dims_of};
use crate::ops::quant::FakeQuantize;
use crate::ops::sequence;
use crate::ops::{Attr, Attrs, Foreign, Op, Spec, create, stand_in};
use crate::tensor::{DType, Dims, Meta, Tensor};

/// A constant tensor computed by `ConstantOfShape` may be a weight up to this many elements.
const FILLED_LIMIT: usize = 1 << 29;
/// Plain constants of at most this many elements are read at once, for shape inference to see.
const EAGER_LIMIT: usize = 4096;

pub(super) struct Built {
    pub graph: Graph,
    pub weights: Vec<Weight>,
    pub ops: BTreeMap<String, usize>,
    pub blockers: Vec<Blocker>,
}

pub(super) fn build(
    model: &ModelProto,
    graph: GraphProto,
    opsets: &Opsets,
    files: &mut Files,
) -> Result<Built> {
    let mut flat = flatten(model, graph, opsets).map_err(|e| damaged(files, e))?;
    sequences::resolve(&mut flat);
    let Flat { graph: flat, origins } = flat;
    let proto = &flat;
    let order = order(&proto.node).map_err(|e| damaged(files, e))?;
    let mut found = Findings::default();
    let quantised = quantised::weights(proto);
    loop {
        let mut b = Builder {
            proto,
            origins: &origins,
            files,
            found: &found,
            quantised: &quantised,
            graph: Graph::default(),
            names: HashMap::new(),
            weights: Vec::new(),
            attrs: Vec::new(),
            positions: Vec::new(),
            ops: BTreeMap::new(),
            filled: Vec::new(),
            inputs: Vec::new(),
        };
        b.constants()?;
        b.inputs()?;
        for &i in &order {
            b.node(i)?;
        }
        b.outputs()?;
        let shared = roles::assign(&b.graph, &b.attrs, &mut b.weights, &b.files.files);
        let next = b.findings(shared);
        let built = b.finish()?;
        match next {
            None => return Ok(built),
            Some(next) => found = next,
        }
    }
}

/// What is seen only when a graph is there already; each round of building finds more, or is the last.
#[derive(Clone, Default)]
struct Findings {
    /// A `ConstantOfShape` is taken for a weight first; these turned out not to be one, and stay nodes.
    kept: HashSet<usize>,
    /// Weights that layers share by the exporter's doing: the name of the source and of the new one.
    splits: Vec<(String, String, Reader)>,
}

fn damaged(files: &Files, what: impl Into<String>) -> Error {
    Error::file(&files.files[0].path, what)
}

fn is_standard(domain: &str) -> bool {
    matches!(domain, "" | "ai.onnx")
}

struct Builder<'a> {
    proto: &'a GraphProto,
    /// Of the nodes of `proto`.
    origins: &'a [Origin],
    files: &'a mut Files,
    found: &'a Findings,
    /// Of integer initializers that stand for weights, the `DequantizeLinear` that reads them.
    quantised: &'a HashMap<&'a str, usize>,
    graph: Graph,
    names: HashMap<&'a str, ValueId>,
    weights: Vec<Weight>,
    /// Of each graph node, for the roles.
    attrs: Vec<Attrs>,
    /// Of each graph node, its position in the file.
    positions: Vec<Option<usize>>,
    ops: BTreeMap<String, usize>,
    filled: Vec<(usize, WeightId)>,
    /// Blockers among the graph's inputs.
    inputs: Vec<Blocker>,
}

impl<'a> Builder<'a> {
    fn define(&mut self, name: &'a str, value: ValueId) -> Result<()> {
        match self.names.insert(name, value) {
            None => Ok(()),
            Some(_) => Err(damaged(self.files, format!("'{name}' is defined twice"))),
        }
    }

    /// A value that is there but cannot be computed with.
    fn foreign(&mut self, name: &'a str, op_type: &str, why: String) -> Result<()> {
        let op = Arc::new(Foreign { domain: String::new(), op_type: op_type.into(), why });
        let made = self.graph.add_node(name, op, Vec::new(), &[Some(name)]);
        self.attrs.push(Attrs::default());
        self.positions.push(None);
        for v in made.into_iter().flatten() {
            self.define(name, v)?;
        }
        Ok(())
    }

    fn constants(&mut self) -> Result<()> {
        for t in &self.proto.initializer {
            let levels = match self.quantised.get(t.name.as_str()) {
                Some(node) => self.levels(*node),
                None => None,
            };
            match levels {
                Some(levels) => self.quantised_weight(t, levels)?,
                None => self.tensor(&t.name, t, "Initializer")?,
            }
        }
        for s in &self.proto.sparse_initializer {
            if let Some(t) = &s.values {
                self.foreign(&t.name, "Initializer", "a sparse tensor".into())?;
            }
        }
        Ok(())
    }

    /// A constant given as a TensorProto.
    fn tensor(&mut self, name: &'a str, t: &TensorProto, op_type: &str) -> Result<()> {
        let Some(dtype) = DType::from_onnx(t.data_type) else {
            return self.foreign(name, op_type, format!("element type {} is not supported", t.data_type));
        };
        let fail = |e: String| Error::value(name, e);
        if !dtype.is_float() {
            let tensor = attrs::tensor(self.files, t, dtype).map_err(fail)?;
            let v = self.graph.add_constant(name, tensor);
            return self.define(name, v);
        }
        let dims = dims_of(&t.dims).map_err(fail)?;
        let size = byte_size(dtype, &dims).map_err(fail)?;
        let location = if t.data_location == EXTERNAL {
            let at = self.files.external(t)?;
            Location {
                file: at.file,
                offset: at.offset,
                len: at.len.unwrap_or(size),
                encoding: Encoding::Raw,
            }
        } else {
            Location::in_tensor(self.files.model(), t, dtype).map_err(fail)?
        };
        self.weight(name, dtype, dims, location).map(|_| ())
    }

    fn weight(&mut self, name: &'a str, dtype: DType, dims: Dims, location: Location) -> Result<WeightId> {
        let id = WeightId(self.weights.len() as u32);
        let value = self.graph.add_value(name, Source::Weight(id));
        self.graph.value_mut(value).meta = Some(Meta::new(dtype.working(), &dims));
        self.define(name, value)?;
        let w = Weight {
            name: name.to_string(),
            dtype,
            dims,
            location,
            role: Role::Constant,
            trainable: false,
            why: String::new(),
            value,
            uses: Vec::new(),
            split: None,
            merged: false,
            quantised: None,
        };
        // What is damaged is found now; nothing is decoded for it but half floats in varints.
        if !matches!(w.location.encoding, Encoding::Filled { .. }) {
            w.stored(&self.files.files)?;
        }
        self.weights.push(w);
        Ok(id)
    }

    fn inputs(&mut self) -> Result<()> {
        for i in &self.proto.input {
            if self.names.contains_key(i.name.as_str()) {
                continue; // an initializer, listed as older IR versions demand
            }
            let v = self.graph.add_value(&i.name, Source::Input);
            self.graph.inputs.push(v);
            self.define(&i.name, v)?;
            let declared = declared(i);
            if declared.is_none() {
                self.inputs.push(Blocker {
                    node: format!("input '{}'", i.name),
                    op_type: "Input".into(),
                    why: format!(
                        "of type {}: not a tensor of a supported element type",
                        i.r#type.as_ref().map_or("unknown".into(), |t| t.kind())
                    ),
                });
            }
            self.graph.value_mut(v).declared = declared;
        }
        Ok(())
    }

    /// The place of a node in the file's main graph; `None` inside functions and branches.
    fn position(&self, index: usize) -> Option<usize> {
        self.origins.get(index).and_then(|o| o.position)
    }

    fn node(&mut self, index: usize) -> Result<()> {
        let n = &self.proto.node[index];
        let position = self.position(index);
        let standard = is_standard(&n.domain);
        let op_type = if standard { n.op_type.clone() } else { format!("{}.{}", n.domain, n.op_type) };
        *self.ops.entry(op_type).or_insert(0) += 1;
        if standard && n.op_type == "Constant" && self.constant(index)? {
            return Ok(());
        }
        let found = self.found;
        if let Some((source, name, reader)) =
            found.splits.iter().find(|(_, _, r)| position.is_some_and(|p| *r == Reader::Identity(p)))
        {
            return self.split(source, name, reader);
        }
        let attrs = attrs(self.files, n);
        if let Ok(a) = &attrs
            && standard
            && n.op_type == "ConstantOfShape"
            && self.constant_of_shape(index, a)?
        {
            return Ok(());
        }
        let mut inputs = Vec::with_capacity(n.input.len());
        for (slot, name) in n.input.iter().enumerate() {
            let own = found
                .splits
                .iter()
                .find(|(_, _, r)| matches!((r, position), (Reader::Operands(at), Some(p)) if at.contains(&(p, slot))));
            if let Some((source, name, reader)) = own
                && !self.names.contains_key(name.as_str())
            {
                self.split(source, name, reader)?;
            }
            inputs.push(match own.map_or(name, |(_, own, _)| own).as_str() {
                "" => None,
                name => Some(*self.names.get(name).ok_or_else(|| {
                    damaged(
                        self.files,
                        format!("node {} reads '{name}', which nothing produces", describe(n)),
                    )
                })?),
            });
        }
        let weight = inputs.first().copied().flatten().and_then(|v| match self.graph.value(v).source {
            Source::Weight(w) => self.weights.get(w.index()),
            _ => None,
        });
        let levels =
            weight.and_then(|w| Some(FakeQuantize::of_weight(w.quantised.as_ref()?.layout, w.dtype)));
        let mut outside: Vec<String> = Vec::new();
        let made = attrs.and_then(|a| match levels {
            Some(op) if n.op_type == "DequantizeLinear" => Ok((Arc::new(op) as Arc<dyn Op>, a)),
            _ if bodies::is_control(n) => {
                let (op, captured) = bodies::control(self.files, n, &a, &self.origins[index].opsets)?;
                outside = captured;
                Ok((Arc::new(op) as Arc<dyn Op>, a))
            }
            _ => self.operator(n, index, &a).map(|op| (op, a)),
        });
        let (op, attrs) = made.unwrap_or_else(|why| {
            // What a subgraph takes from outside is an input like the others: the gradient may not
            // pass by, nor may what computes it be pruned.
            inputs.extend(captured(n).into_iter().filter_map(|c| self.names.get(c).copied()).map(Some));
            let domain = if is_standard(&n.domain) { "" } else { n.domain.as_str() };
            (stand_in(n, self.origins[index].opsets.get(domain).copied(), why), Attrs::default())
        });
        for name in &outside {
            inputs.push(Some(*self.names.get(name.as_str()).ok_or_else(|| {
                let what = format!("a body of {} reads '{name}', which nothing produces", describe(n));
                damaged(self.files, what)
            })?));
        }
        let names: Vec<Option<&str>> =
            n.output.iter().map(|o| (!o.is_empty()).then_some(o.as_str())).collect();
        let made = self.graph.add_node(&n.name, op, inputs, &names);
        self.attrs.push(attrs);
        self.positions.push(Some(index));
        for (v, name) in made.into_iter().zip(&n.output) {
            if let Some(v) = v {
                self.define(name, v)?;
            }
        }
        Ok(())
    }

    /// A weight of its own for a layer that shares its bytes with others.
    fn split(&mut self, source: &str, name: &'a str, reader: &Reader) -> Result<()> {
        let Some(at) = self.weights.iter().position(|w| w.name == source) else {
            return Err(damaged(self.files, format!("'{source}' is not read before '{name}'")));
        };
        let w = &self.weights[at];
        let id = self.weight(name, w.dtype, w.dims.clone(), w.location.clone())?;
        self.weights[id.index()].split = Some(Split { source: WeightId(at as u32), reader: reader.clone() });
        Ok(())
    }

    /// What the next round has to do differently; `None` when this one was the last.
    fn findings(&self, shared: Vec<roles::Shared>) -> Option<Findings> {
        let mut next = self.found.clone();
        for (node, weight) in &self.filled {
            if self.weights.get(weight.index()).is_none_or(|w| w.role == Role::Constant) {
                next.kept.insert(*node);
            }
        }
        for s in shared {
            let Some(source) = self.weights.get(s.weight.index()).map(|w| w.name.clone()) else { continue };
            let at: Option<Vec<(usize, usize)>> = s
                .edges
                .iter()
                .map(|(n, slot)| Some((self.positions.get(n.index()).copied().flatten()?, *slot)))
                .collect();
            let Some(at) = at else { continue };
            let identity = match at.as_slice() {
                [(n, _)] => {
                    self.proto.node.get(*n).filter(|n| n.op_type == "Identity" && is_standard(&n.domain))
                }
                _ => None,
            };
            // Inside a function or a branch nothing can be given a new name: the layers stay tied.
            let at: Option<Vec<(usize, usize)>> =
                at.into_iter().map(|(index, slot)| Some((self.position(index)?, slot))).collect();
            let Some(at) = at else { continue };
            let (name, reader) = match (identity, at.first()) {
                (Some(n), Some((i, _))) => {
                    (n.output.first().cloned().unwrap_or_default(), Reader::Identity(*i))
                }
                _ => (self.fresh(&source, &next), Reader::Operands(at)),
            };
            next.splits.push((source, name, reader));
        }
        let more = next.kept.len() > self.found.kept.len() || next.splits.len() > self.found.splits.len();
        more.then_some(next)
    }

    /// A tensor name that nothing in the file has.
    fn fresh(&self, base: &str, next: &Findings) -> String {
        let mut n = 2usize;
        loop {
            let name = format!("{base}.{n}");
            if !self.names.contains_key(name.as_str()) && !next.splits.iter().any(|(_, s, _)| *s == name) {
                return name;
            }
            n += 1;
        }
    }

    fn operator(
        &self,
        n: &NodeProto,
        index: usize,
        attrs: &Attrs,
    ) -> std::result::Result<Arc<dyn crate::ops::Op>, String> {
        let domain = if is_standard(&n.domain) { "" } else { n.domain.as_str() };
        let Some(&opset) = self.origins[index].opsets.get(domain) else {
            return Err(format!("operator {}: the model imports no opset of domain '{domain}'", n.op_type));
        };
        let spec = Spec {
            domain,
            op_type: &n.op_type,
            opset,
            attrs,
            inputs: n.input.len(),
            outputs: n.output.len(),
        };
        sequence::resolved(&spec).unwrap_or_else(|| create(&spec)).map_err(|e| match e {
            crate::error::OpError::Unsupported(what) => what,
            e => e.to_string(),
        })
    }

    /// A `Constant` node as a value; `false` where it is none that can be computed with.
    fn constant(&mut self, index: usize) -> Result<bool> {
        let n = &self.proto.node[index];
        let (Some(name), Some(a)) = (
            n.output.first().filter(|o| !o.is_empty()),
            n.attribute.iter().find(|a| a.name == "value" || a.name.starts_with("value_")),
        ) else {
            return Ok(false);
        };
        let fail = |e: &str| Error::value(name, e);
        let of = |index| Encoding::Filled { node: index, element: vec![0; 4] };
        match (a.name.as_str(), attrs::kind(a)) {
            ("value", 4) => {
                let t = a.t.as_ref().ok_or_else(|| fail("a constant without a value"))?;
                self.tensor(name, t, "Constant")?;
            }
            ("value_float", 1) => {
                let location = match &a.f {
                    Some(f) => Location::of_chunks(
                        self.files.model(),
                        std::slice::from_ref(f),
                        Encoding::AttributeFloat,
                    )
                    .map_err(|e| fail(&e))?,
                    // Zero, left out by the writer: there are no bytes to overwrite.
                    None => match self.position(index) {
                        Some(node) => Location { file: 0, offset: 0, len: 0, encoding: of(node) },
                        None => {
                            let v = self.graph.add_constant(name, Tensor::scalar(0f32));
                            return self.define(name, v).map(|()| true);
                        }
                    },
                };
                self.weight(name, DType::F32, Dims::new(), location)?;
            }
            ("value_floats", 6) => {
                let dims = Dims::from_slice(&[a.floats.len() / 4]);
                let location =
                    Location::of_chunks(self.files.model(), &a.floats.0, Encoding::AttributeFloats)
                        .map_err(|e| fail(&e))?;
                self.weight(name, DType::F32, dims, location)?;
            }
            ("value_int", 2) => {
                let v = self.graph.add_constant(name, Tensor::scalar(a.i));
                self.define(name, v)?;
            }
            ("value_ints", 7) => {
                let v = self.graph.add_constant(name, Tensor::ints(&a.ints));
                self.define(name, v)?;
            }
            _ => {
                self.foreign(name, "Constant", format!("a constant given as '{}' is not supported", a.name))?;
            }
        }
        Ok(true)
    }

    /// A `ConstantOfShape` as a weight, unless it was found to be none or its shape is computed.
    fn constant_of_shape(&mut self, index: usize, attrs: &Attrs) -> Result<bool> {
        let n = &self.proto.node[index];
        let shape = n.input.first().and_then(|s| self.names.get(s.as_str()));
        let (Some(name), Some(&shape)) = (n.output.first().filter(|o| !o.is_empty()), shape) else {
            return Ok(false);
        };
        let Source::Constant(shape) = &self.graph.value(shape).source else { return Ok(false) };
        let Some(dims) = shape.to_ints().ok().and_then(|d| dims_of(&d).ok()) else { return Ok(false) };
        // The attribute as the file has it: half floats stay what they are.
        let value = n.attribute.iter().find(|a| a.name == "value").and_then(|a| a.t.as_ref());
        let dtype = match value {
            None => DType::F32,
            Some(t) => DType::from_onnx(t.data_type).unwrap_or(DType::Bool),
        };
        let element = match attrs.0.get("value") {
            None => vec![0; 4],
            Some(Attr::Tensor(t)) if t.len() == 1 => t.cast(dtype).bytes().to_vec(),
            _ => return Ok(false),
        };
        let size = byte_size(dtype, &dims).unwrap_or(usize::MAX) / dtype.size();
        if !dtype.is_float() || size > FILLED_LIMIT || self.found.kept.contains(&index) {
            return Ok(false);
        }
        // Inside a function or a branch no initializer can take its place.
        let Some(node) = self.position(index) else { return Ok(false) };
        let encoding = Encoding::Filled { node, element };
        let id = self.weight(name, dtype, dims, Location { file: 0, offset: 0, len: 0, encoding })?;
        self.filled.push((index, id));
        Ok(true)
    }

    fn outputs(&mut self) -> Result<()> {
        for o in &self.proto.output {
            let Some(&v) = self.names.get(o.name.as_str()) else {
                return Err(damaged(self.files, format!("nothing produces the output '{}'", o.name)));
            };
            self.graph.outputs.push(v);
        }
        for i in self.proto.output.iter().chain(&self.proto.value_info) {
            if let Some(&v) = self.names.get(i.name.as_str())
                && self.graph.value(v).declared.is_none()
            {
                self.graph.value_mut(v).declared = declared(i);
            }
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Built> {
        for w in &self.weights {
            if w.role == Role::Constant && w.len() <= EAGER_LIMIT {
                let tensor = w.load(&self.files.files)?;
                if let Some(meta) = &mut self.graph.value_mut(w.value).meta {
                    meta.value = Some(Arc::new(tensor));
                }
            }
        }
        for i in 0..self.weights.len() {
            if let Some(split) = &self.weights[i].split {
                let source = self.weights.get(split.source.index()).map_or("", |w| w.name.as_str());
                let note = format!("; split from '{source}', which the exporter merged it with");
                self.weights[i].why += &note;
            }
        }
        let mut blockers = self.inputs;
        for (i, node) in self.graph.nodes.iter().enumerate() {
            if let Some(foreign) = node.op.as_a::<Foreign>() {
                let op_type = foreign.foreign_type().unwrap_or_default();
                let why = crate::error::OpError::Unsupported(foreign.why.clone()).to_string();
                blockers.push(Blocker { node: self.graph.describe(NodeId(i as u32)), op_type, why });
            }
            bodies::blockers(node.op.as_ref(), &self.graph.describe(NodeId(i as u32)), &mut blockers);
        }
        Ok(Built { graph: self.graph, weights: self.weights, ops: self.ops, blockers })
    }
}

fn declared(i: &ValueInfoProto) -> Option<Declared> {
    let t = i.r#type.as_ref()?.tensor_type.as_ref()?;
    let dtype = DType::from_onnx(t.elem_type)?;
    let dims = t.shape.as_ref().map(|s| {
        s.dim
            .iter()
            .map(|d| match (d.dim_value, &d.dim_param) {
                (Some(n), _) if n >= 0 => usize::try_from(n).map_or(Dim::Unknown, Dim::Fixed),
                (None, Some(p)) if !p.is_empty() => Dim::Symbol(p.clone()),
                _ => Dim::Unknown,
            })
            .collect()
    });
    Some(Declared { dtype, dims })
}
