//! What is perturbed: the network's inputs, or a value within it.

use crate::error::{Error, Result};
use crate::exec::Session;
use crate::graph::{Graph, Source, StateId, ValueId};
use crate::icp::taps::Path;
use crate::tensor::Meta;
use crate::train::step::{Network, Recipe, Shapes, param_values};

/// Why a network can find nothing to perturb.
pub const NO_FLOATS: &str = "ICP perturbs floating-point values: the model has no such input and no embedding; name a \
                             value with --icp-at NAME, or finetune with --method supervised";

/// The choice of what is perturbed.
#[derive(Debug, Clone, PartialEq)]
pub enum Place {
    /// Every floating-point input; of a network without one, what its largest embedding gives.
    Auto,
    /// The input of the first layer that trains: what lies below is computed once a batch. Where the layers below
    /// train too, as `Auto`.
    First,
    /// ONNX names of inputs or of values that nodes compute.
    Names(Vec<String>),
}

/// A value that is perturbed.
#[derive(Debug, Clone)]
pub(super) struct Spot {
    pub name: String,
    pub value: ValueId,
    pub meta: Meta,
    /// Which of the batch's inputs it is; `None`: computed by the layers below.
    pub input: Option<usize>,
}

/// The values to perturb in `net`, the network in evaluation mode; `logits` is where the loss is computed.
pub(super) fn find(
    session: &Session,
    recipe: &Recipe,
    shapes: &Shapes,
    net: &Network,
    logits: ValueId,
    place: &Place,
) -> Result<Vec<Spot>> {
    let graph = &net.graph;
    let floats: Vec<ValueId> = net
        .inputs
        .iter()
        .zip(&shapes.inputs)
        .filter(|(_, (_, meta))| meta.dtype.is_float())
        .map(|(v, _)| *v)
        .collect();
    let auto = || match floats.is_empty() {
        false => Ok(floats.clone()),
        true => Ok(vec![embedding(graph, logits)?.ok_or_else(|| Error::Config(NO_FLOATS.into()))?]),
    };
    let values = match place {
        Place::Auto => auto()?,
        Place::First => match below_trained(session, recipe, graph, logits)? {
            Some(v) => vec![v],
            None => auto()?,
        },
        Place::Names(names) => names
            .iter()
            .map(|name| {
                let v = graph
                    .find(name)
                    .ok_or_else(|| Error::value(name, "no such value in the model to perturb"))?;
                let float = graph.meta(v)?.dtype.is_float();
                match graph.value(v).source {
                    Source::Node(..) | Source::Input if float => Ok(v),
                    _ => Err(Error::value(
                        name,
                        "what is perturbed must be a floating-point input, or a value that a node computes",
                    )),
                }
            })
            .collect::<Result<_>>()?,
    };
    values
        .into_iter()
        .map(|value| {
            let meta = Meta { value: None, ..graph.meta(value)?.clone() };
            let input = net.inputs.iter().position(|v| *v == value);
            Ok(Spot { name: graph.value(value).name.clone(), value, meta, input })
        })
        .collect()
}

/// What the embedding with the most rows gives, of those that the loss depends on.
fn embedding(graph: &Graph, logits: ValueId) -> Result<Option<ValueId>> {
    let path = Path::new(graph, logits)?;
    let rows = |v: &ValueId| {
        let Source::Node(n, 0) = graph.value(*v).source else { return None };
        let node = graph.node(n);
        let table = node.inputs.first().copied().flatten()?;
        let stored = matches!(graph.value(table).source, Source::Weight(_) | Source::State(_));
        let meta = graph.value(table).meta.as_ref().filter(|m| stored && m.dtype.is_float())?;
        (node.op.name() == "Gather" && meta.rank() == 2).then(|| meta.dims[0])
    };
    let mut best: Option<(usize, ValueId)> = None;
    for v in &path.values {
        if let Some(rows) = rows(v)
            && best.is_none_or(|b| rows > b.0)
        {
            best = Some((rows, *v));
        }
    }
    Ok(best.map(|b| b.1))
}

/// The last value, through which everything flows to the loss, that no trained parameter has a part in.
fn below_trained(
    session: &Session,
    recipe: &Recipe,
    graph: &Graph,
    logits: ValueId,
) -> Result<Option<ValueId>> {
    let mut trained = vec![false; graph.values.len()];
    for v in param_values(session, &recipe.params) {
        trained[v.index()] = true;
    }
    for node in &graph.nodes {
        if node.inputs.iter().flatten().any(|v| trained[v.index()]) {
            node.outputs.iter().flatten().for_each(|v| trained[v.index()] = true);
        }
    }
    let path = Path::new(graph, logits)?;
    let float = |v: ValueId| graph.value(v).meta.as_ref().is_some_and(|m| m.dtype.is_float());
    let last_below = |path: &Path| {
        let first = path.values.iter().position(|v| trained[v.index()]).unwrap_or(0);
        let mut below = path.values[..first].iter().zip(&path.cut).rev();
        below.find(|(v, cut)| **cut && float(**v)).map(|(v, _)| *v)
    };
    Ok(last_below(&path).or_else(|| last_below(&path.features())))
}

/// Has `v` be read from `state` instead of being computed.
pub(super) fn read_from(graph: &mut Graph, v: ValueId, state: StateId) {
    if let Source::Node(n, slot) = graph.value(v).source {
        let name = format!("{}#computed", graph.value(v).name);
        let meta = graph.value(v).meta.clone();
        let spare = graph.add_value(name, Source::Node(n, slot));
        graph.value_mut(spare).meta = meta;
        graph.nodes[n.index()].outputs[slot] = Some(spare);
    }
    graph.inputs.retain(|i| *i != v);
    graph.value_mut(v).source = Source::State(state);
}

/// Per value of the graph: does it depend on one of `from`?
pub(super) fn above(graph: &Graph, from: &[ValueId]) -> Vec<bool> {
    let mut depends = vec![false; graph.values.len()];
    from.iter().for_each(|v| depends[v.index()] = true);
    for node in &graph.nodes {
        if node.inputs.iter().flatten().any(|v| depends[v.index()]) {
            node.outputs.iter().flatten().for_each(|v| depends[v.index()] = true);
        }
    }
    depends
}
