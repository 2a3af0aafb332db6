//! Gathers of single places that together are all of an axis become one Split, whose gradient is written in one piece: exporters
//! take queries, keys and values apart that way.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::graph::{Graph, Node, Source, ValueId};
use crate::ops::gather::Gather;
use crate::ops::join::Split;
use crate::ops::view::ReshapeTo;
use crate::tensor::axis;

/// What a node gathers of, along which axis and from which place, if that is one.
fn place(graph: &Graph, node: &Node) -> Option<(ValueId, usize, usize)> {
    let along = node.op.as_a::<Gather>()?.axis;
    let &[Some(x), Some(index)] = &node.inputs[..] else { return None };
    let meta = graph.value(x).meta.as_ref().filter(|m| m.dtype.is_float())?;
    let along = axis(along, meta.rank()).ok()?;
    let &[i] = &graph.value(index).meta.as_ref()?.value.as_ref()?.to_ints().ok()?[..] else { return None };
    let n = meta.dims[along];
    let i = usize::try_from(if i < 0 { i + n as i64 } else { i }).ok()?;
    let computed = matches!(graph.value(x).source, Source::Node(..)) && node.output().is_some();
    (computed && i < n).then_some((x, along, i))
}

/// What is gathered of a value along an axis: places, and the parts that a Split makes.
#[derive(Default)]
struct Taken {
    places: Vec<usize>,
    parts: Vec<ValueId>,
}

/// Rewrites a graph whose shapes are inferred.
pub(super) fn split_gathers(graph: &mut Graph) -> Result<()> {
    let places: Vec<_> = graph.nodes.iter().map(|node| place(graph, node)).collect();
    let mut taken: BTreeMap<(ValueId, usize), Taken> = BTreeMap::new();
    for &(x, along, i) in places.iter().flatten() {
        taken.entry((x, along)).or_default().places.push(i);
    }
    taken.retain(|(x, along), Taken { places, .. }| {
        places.sort_unstable();
        let n = graph.value(*x).meta.as_ref().map_or(0, |m| m.dims[*along]);
        n > 1 && places.iter().copied().eq(0..n)
    });
    if taken.is_empty() {
        return Ok(());
    }
    for (mut node, place) in std::mem::take(&mut graph.nodes).into_iter().zip(places) {
        if let Some((x, along, i)) = place
            && let Some(Taken { places, parts }) = taken.get_mut(&(x, along))
            && let Some(y) = node.output()
        {
            if parts.is_empty() {
                let (name, op) = (graph.value(x).name.clone(), Split::apart(along, places.len()));
                let made = graph.emit(&name, Arc::new(op), &[Some(x)], places.len());
                *parts = made.map_err(|source| Error::Op { node: format!("parts of '{name}'"), source })?;
            }
            node.op = Arc::new(ReshapeTo { dims: graph.meta(y)?.dims.clone() });
            node.inputs = vec![Some(parts[i])];
        }
        graph.nodes.push(node);
    }
    graph.renumber();
    Ok(())
}
