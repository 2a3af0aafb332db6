//! Calls of the model's own functions, and `If`s whose condition is constant, replaced by what they stand for.
//!
//! The expansion works on decoded messages, whose byte fields go on aliasing the file: a weight inside a function or a
//! branch keeps its place there. Every name inside is made unique; constants of the subgraphs that stay (bodies of
//! loops, branches) move out to the main graph, where they are weights like the others.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::rc::Rc;

use super::attrs::kind;
use super::proto::{AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto};

/// Nodes that an expansion may go through before it is refused, those of all bodies: calls of calls can double with every
/// level.
const MOST_NODES: usize = 1 << 20;
/// Depth to which functions and subgraphs may nest.
const DEPTH: usize = 64;

/// Version by domain.
pub(super) type Opsets = BTreeMap<String, i64>;

/// Where a node of the expanded graph comes from.
#[derive(Debug, Clone)]
pub(super) struct Origin {
    /// Its position among the nodes of the file's main graph, if that is where it is.
    pub position: Option<usize>,
    /// Those of its function, or of the model.
    pub opsets: Rc<Opsets>,
}

pub(super) struct Flat {
    pub graph: GraphProto,
    /// Of each node.
    pub origins: Vec<Origin>,
}

/// The main graph of a model with everything expanded.
pub(super) fn flatten(model: &ModelProto, mut graph: GraphProto, opsets: &Opsets) -> Result<Flat, String> {
    let functions = model.functions.iter().map(|f| (key(&f.domain, &f.name, &f.overload), f)).collect();
    let mut taken: HashSet<String> = HashSet::new();
    taken.extend(graph.input.iter().map(|i| i.name.clone()));
    taken.extend(graph.initializer.iter().map(|t| t.name.clone()));
    taken.extend(graph.node.iter().flat_map(|n| &n.output).cloned());
    let mut flat = Flattener {
        functions,
        taken,
        nodes: Vec::new(),
        origins: Vec::new(),
        constants: Vec::new(),
        sparse: Vec::new(),
        shared: HashMap::new(),
        conditions: HashMap::new(),
        numbers: HashMap::new(),
        visited: 0,
    };
    flat.conditions.extend(graph.initializer.iter().filter_map(|t| Some((t.name.clone(), truth(t)?))));
    let mut scope = Scope {
        rename: HashMap::new(),
        prefix: None,
        attrs: None,
        in_function: false,
        opsets: Rc::new(opsets.clone()),
        depth: 0,
    };
    flat.expand(&graph.node, &mut scope, true)?;
    graph.node = flat.nodes;
    graph.initializer.extend(flat.constants);
    graph.sparse_initializer.extend(flat.sparse);
    Ok(Flat { graph, origins: flat.origins })
}

type Key = (String, String, String);

fn key(domain: &str, name: &str, overload: &str) -> Key {
    let domain = if domain == "ai.onnx" { "" } else { domain };
    (domain.to_string(), name.to_string(), overload.to_string())
}

/// A single boolean.
fn truth(t: &TensorProto) -> Option<bool> {
    if t.data_type != 9 || t.dims.iter().any(|d| *d != 1) {
        return None;
    }
    match &t.raw_data {
        Some(raw) => raw.first().map(|b| *b != 0),
        None => t.int32_data.varints().ok()?.first().map(|v| *v != 0),
    }
}

/// Where a tensor's values lie in memory: two tensors of equal place are one.
fn place(t: &TensorProto) -> Option<String> {
    let get = |key: &str| t.external_data.iter().find(|e| e.key == key).map_or("", |e| e.value.as_str());
    if !t.external_data.is_empty() {
        return Some(format!("{}@{}", get("location"), get("offset")));
    }
    let chunks = [&t.float_data, &t.double_data, &t.int32_data, &t.int64_data, &t.uint64_data];
    let first = t.raw_data.as_ref().or_else(|| chunks.iter().find_map(|c| c.0.first()))?;
    (!first.is_empty()).then(|| format!("{:p}", first.as_ptr()))
}

/// The names of one body, and what its attributes refer to.
struct Scope {
    /// Names inside by names outside; `None` as prefix: the main graph, whose names stay.
    rename: HashMap<String, String>,
    prefix: Option<String>,
    /// The attributes of the call, by name.
    attrs: Option<Rc<HashMap<String, AttributeProto>>>,
    /// A body that may be expanded several times: its constants are shared between the copies.
    in_function: bool,
    opsets: Rc<Opsets>,
    depth: usize,
}

impl Scope {
    fn name<'a>(&'a self, name: &'a str) -> &'a str {
        self.rename.get(name).map_or(name, String::as_str)
    }

    /// The scope of something inside this one.
    fn inner(&self, prefix: String) -> Scope {
        Scope {
            rename: self.rename.clone(),
            prefix: Some(prefix),
            attrs: self.attrs.clone(),
            in_function: self.in_function,
            opsets: self.opsets.clone(),
            depth: self.depth + 1,
        }
    }
}

struct Flattener<'a> {
    functions: HashMap<Key, &'a FunctionProto>,
    taken: HashSet<String>,
    nodes: Vec<NodeProto>,
    origins: Vec<Origin>,
    /// Moved out of bodies.
    constants: Vec<TensorProto>,
    sparse: Vec<super::proto::SparseTensorProto>,
    /// Names of the constants of functions, by where their values lie.
    shared: HashMap<String, String>,
    /// Constant booleans by name.
    conditions: HashMap<String, bool>,
    /// The last number that was put behind a name.
    numbers: HashMap<String, usize>,
    /// Nodes gone through.
    visited: usize,
}

impl<'a> Flattener<'a> {
    fn fresh(&mut self, base: String) -> String {
        if self.taken.insert(base.clone()) {
            return base;
        }
        // From where the last one left off: very many may be asked for.
        let number = self.numbers.entry(base.clone()).or_insert(1);
        loop {
            *number += 1;
            let name = format!("{base}.{number}");
            if self.taken.insert(name.clone()) {
                return name;
            }
        }
    }

    /// Appends `nodes` with their names as `scope` says.
    fn expand(&mut self, nodes: &[NodeProto], scope: &mut Scope, main: bool) -> Result<(), String> {
        if scope.depth > DEPTH {
            return Err("functions or subgraphs nest too deeply".into());
        }
        self.name_outputs(nodes, scope);
        // Constants first: a condition may be written after what it decides.
        for n in nodes {
            self.condition(n, scope);
        }
        for (i, n) in nodes.iter().enumerate() {
            self.visited += 1;
            if self.visited > MOST_NODES {
                return Err(format!(
                    "with its functions expanded the model has more than {MOST_NODES} nodes"
                ));
            }
            self.node(n, main.then_some(i), scope)?;
        }
        Ok(())
    }

    /// Gives everything that nodes of a body compute a name of its own.
    fn name_outputs(&mut self, nodes: &[NodeProto], scope: &mut Scope) {
        let Some(prefix) = scope.prefix.clone() else { return };
        for o in nodes.iter().flat_map(|n| &n.output).filter(|o| !o.is_empty()) {
            if !scope.rename.contains_key(o) {
                let name = self.fresh(format!("{prefix}/{o}"));
                scope.rename.insert(o.clone(), name);
            }
        }
    }

    fn condition(&mut self, n: &NodeProto, scope: &Scope) {
        if n.op_type == "Constant"
            && let Some(o) = n.output.first()
            && let Some(t) = n.attribute.iter().find(|a| a.name == "value").and_then(|a| a.t.as_ref())
            && let Some(truth) = truth(t)
        {
            self.conditions.insert(scope.name(o).to_string(), truth);
        }
    }

    fn node(&mut self, n: &NodeProto, position: Option<usize>, scope: &Scope) -> Result<(), String> {
        let mut new = NodeProto { attribute: Vec::new(), ..n.clone() };
        new.input.iter_mut().filter(|x| !x.is_empty()).for_each(|x| *x = scope.name(x).to_string());
        new.output.iter_mut().filter(|x| !x.is_empty()).for_each(|x| *x = scope.name(x).to_string());
        if let Some(prefix) = &scope.prefix {
            new.name = format!("{prefix}/{}", if n.name.is_empty() { &n.op_type } else { &n.name });
        }
        let attributes: Vec<Cow<AttributeProto>> =
            n.attribute.iter().filter_map(|a| referred(a, scope.attrs.as_deref())).collect();
        if let Some(function) = self.functions.get(&key(&n.domain, &n.op_type, &n.overload)).copied() {
            return self.call(function, &new, attributes, scope);
        }
        let standard = matches!(n.domain.as_str(), "" | "ai.onnx");
        if standard && n.op_type == "If" && self.branch(&new, &attributes, scope)? {
            return Ok(());
        }
        if scope.in_function && standard && n.op_type == "Constant" && self.seen(&new, &attributes, scope) {
            return Ok(());
        }
        new.attribute.reserve_exact(attributes.len());
        for a in attributes {
            let mut a = a.into_owned();
            let single = kind(&a) == 5;
            let graphs = a.g.take().map(|g| *g).into_iter().chain(std::mem::take(&mut a.graphs));
            for g in graphs.collect::<Vec<_>>() {
                let prefix = prefix_of(&new, scope);
                let g = self.subgraph(&g, &scope.inner(format!("{prefix}/{}", a.name)))?;
                match single {
                    true => a.g = Some(Box::new(g)),
                    false => a.graphs.push(g),
                }
            }
            new.attribute.push(a);
        }
        self.push(new, position, scope);
        Ok(())
    }

    fn push(&mut self, node: NodeProto, position: Option<usize>, scope: &Scope) {
        self.nodes.push(node);
        self.origins.push(Origin { position, opsets: scope.opsets.clone() });
    }

    fn identity(&mut self, from: String, to: String, scope: &Scope) {
        let node = NodeProto {
            op_type: "Identity".into(),
            name: format!("{to}/Identity"),
            input: vec![from],
            output: vec![to],
            ..Default::default()
        };
        self.push(node, None, scope);
    }

    /// A constant of a function that an earlier copy has made already: its name stands for both.
    fn seen(&mut self, new: &NodeProto, attributes: &[Cow<AttributeProto>], scope: &Scope) -> bool {
        let (Some(out), Some(a)) = (new.output.first(), attributes.first()) else { return false };
        // A value that comes with the call differs from copy to copy, unless it lies at the same place.
        let place = match (&a.t, &a.f) {
            (Some(t), _) => place(t),
            (None, Some(f)) => Some(format!("{:p}", f.as_ptr())),
            (None, None) => a.floats.0.first().filter(|c| !c.is_empty()).map(|c| format!("{:p}", c.as_ptr())),
        };
        let Some(place) = place else { return false };
        match self.shared.get(&place) {
            Some(first) => {
                self.identity(first.clone(), out.clone(), scope);
                true
            }
            None => {
                self.shared.insert(place, out.clone());
                false
            }
        }
    }

    /// The body of a function in place of its call.
    fn call(
        &mut self,
        f: &'a FunctionProto,
        call: &NodeProto,
        attributes: Vec<Cow<AttributeProto>>,
        scope: &Scope,
    ) -> Result<(), String> {
        let prefix = prefix_of(call, scope);
        let mut opsets = Opsets::new();
        for o in &f.opset_import {
            let domain = if o.domain == "ai.onnx" { "" } else { o.domain.as_str() };
            opsets.insert(domain.to_string(), o.version);
        }
        let mut given: HashMap<String, AttributeProto> =
            f.attribute_proto.iter().map(|a| (a.name.clone(), a.clone())).collect();
        given.extend(attributes.into_iter().map(|a| (a.name.clone(), a.into_owned())));
        let mut inner = Scope {
            rename: HashMap::new(),
            prefix: Some(prefix),
            attrs: Some(Rc::new(given)),
            in_function: true,
            opsets: if opsets.is_empty() { scope.opsets.clone() } else { Rc::new(opsets) },
            depth: scope.depth + 1,
        };
        for (i, formal) in f.input.iter().enumerate() {
            inner.rename.insert(formal.clone(), call.input.get(i).cloned().unwrap_or_default());
        }
        let mut passed = Vec::new();
        for (formal, actual) in f.output.iter().zip(&call.output).filter(|(_, a)| !a.is_empty()) {
            match inner.rename.get(formal) {
                Some(from) => passed.push((from.clone(), actual.clone())),
                None => {
                    inner.rename.insert(formal.clone(), actual.clone());
                }
            }
        }
        self.expand(&f.node, &mut inner, false)?;
        for (from, to) in passed {
            self.identity(from, to, scope);
        }
        Ok(())
    }

    /// The chosen branch of an `If` whose condition is constant; `false` where it is not.
    fn branch(
        &mut self,
        n: &NodeProto,
        attributes: &[Cow<AttributeProto>],
        scope: &Scope,
    ) -> Result<bool, String> {
        let known = n.input.first().and_then(|c| self.conditions.get(c)).copied();
        let Some(condition) = known else { return Ok(false) };
        let which = if condition { "then_branch" } else { "else_branch" };
        let Some(g) = attributes.iter().find(|a| a.name == which).and_then(|a| a.g.as_deref()) else {
            return Err(format!("If '{}' has no {which}", n.name));
        };
        let mut inner = scope.inner(prefix_of(n, scope));
        self.hoist(g, &mut inner);
        self.expand(&g.node, &mut inner, false)?;
        for (o, to) in g.output.iter().zip(&n.output).filter(|(_, to)| !to.is_empty()) {
            self.identity(inner.name(&o.name).to_string(), to.clone(), scope);
        }
        Ok(true)
    }

    /// A body that stays one, with names of its own; its constants move out.
    fn subgraph(&mut self, g: &GraphProto, scope: &Scope) -> Result<GraphProto, String> {
        let mut inner = scope.inner(scope.prefix.clone().unwrap_or_default());
        for i in &g.input {
            let name = self.fresh(format!("{}/{}", inner.prefix.as_deref().unwrap_or(""), i.name));
            inner.rename.insert(i.name.clone(), name);
        }
        self.hoist(g, &mut inner);
        let (nodes, origins) = (std::mem::take(&mut self.nodes), std::mem::take(&mut self.origins));
        let expanded = self.expand(&g.node, &mut inner, false);
        let body = std::mem::replace(&mut self.nodes, nodes);
        self.origins = origins;
        expanded?;
        // Constants of a body are those of every run of it.
        let (constants, body): (Vec<_>, Vec<_>) = body
            .into_iter()
            .partition(|n| n.op_type == "Constant" && matches!(n.domain.as_str(), "" | "ai.onnx"));
        for c in constants {
            self.push(c, None, &inner);
        }
        let rename = |infos: &[super::proto::ValueInfoProto]| {
            let named = |i: &super::proto::ValueInfoProto| super::proto::ValueInfoProto {
                name: inner.name(&i.name).to_string(),
                r#type: i.r#type.clone(),
            };
            infos.iter().map(named).collect::<Vec<_>>()
        };
        let (input, output) = (rename(&g.input), rename(&g.output));
        Ok(GraphProto { node: body, name: g.name.clone(), input, output, ..Default::default() })
    }

    /// Moves the initializers of a body to the main graph.
    fn hoist(&mut self, g: &GraphProto, scope: &mut Scope) {
        let prefix = scope.prefix.clone().unwrap_or_default();
        for t in &g.initializer {
            let place = if scope.in_function { place(t) } else { None };
            if let Some(first) = place.as_ref().and_then(|p| self.shared.get(p)) {
                scope.rename.insert(t.name.clone(), first.clone());
                continue;
            }
            let name = self.fresh(format!("{prefix}/{}", t.name));
            if let Some(place) = place {
                self.shared.insert(place, name.clone());
            }
            if let Some(truth) = truth(t) {
                self.conditions.insert(name.clone(), truth);
            }
            scope.rename.insert(t.name.clone(), name.clone());
            self.constants.push(TensorProto { name, ..t.clone() });
        }
        for s in &g.sparse_initializer {
            let Some(values) = &s.values else { continue };
            let name = self.fresh(format!("{prefix}/{}", values.name));
            scope.rename.insert(values.name.clone(), name.clone());
            self.sparse.push(super::proto::SparseTensorProto {
                values: Some(TensorProto { name, ..values.clone() }),
                ..s.clone()
            });
        }
    }
}

/// What the names inside a node begin with.
fn prefix_of(n: &NodeProto, scope: &Scope) -> String {
    match (n.name.is_empty(), n.output.iter().find(|o| !o.is_empty())) {
        (false, _) => n.name.clone(),
        (true, Some(o)) => o.clone(),
        _ => format!("{}/{}", scope.prefix.as_deref().unwrap_or(""), n.op_type),
    }
}

/// An attribute, or the call's that it refers to; `None` where the call has none.
fn referred<'b>(
    a: &'b AttributeProto,
    given: Option<&'b HashMap<String, AttributeProto>>,
) -> Option<Cow<'b, AttributeProto>> {
    if a.ref_attr_name.is_empty() {
        return Some(Cow::Borrowed(a));
    }
    let value = given?.get(&a.ref_attr_name)?;
    Some(Cow::Owned(AttributeProto { name: a.name.clone(), ref_attr_name: String::new(), ..value.clone() }))
}

#[cfg(test)]
mod tests;
