//! Frozen weights that stay in the file.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use bytes::Bytes;

use crate::error::{Error, Result};
use crate::graph::{Graph, Source, ValueId, WeightId};
use crate::import::Model;
use crate::ops::load::Load;
use crate::tensor::DType;

/// Bytes up to which a weight that cannot be read where it lies is copied once and for all.
const COPIED: usize = 1 << 12;

/// The bytes of a weight in the file, where they are in one piece.
fn stored(model: &Model, id: WeightId) -> Option<(DType, Bytes)> {
    let weight = model.weight(id);
    let Cow::Borrowed(bytes) = weight.stored(&model.files).ok()? else { return None };
    let whole = weight.quantised.is_none() && !weight.is_empty();
    whole.then(|| (weight.dtype, model.files[weight.location.file].bytes.slice_ref(bytes)))
}

/// The same where they are of the type that is computed in, at whatever address.
pub(super) fn anywhere(model: &Model, id: WeightId) -> Option<Bytes> {
    let (dtype, bytes) = stored(model, id)?;
    (dtype == model.weight(id).working() && bytes.len() > COPIED).then_some(bytes)
}

/// Puts a node that loads them in front of frozen weights that cannot be read where they lie, for being of another type or
/// at an odd address. What only takes their bytes reads them there all the same.
/// Those in `mapped` are read in half precision, as they are.
pub(super) fn load_where_read(model: &Model, graph: &mut Graph, mapped: &HashSet<WeightId>) -> Result<()> {
    let mut loads: HashMap<WeightId, Option<ValueId>> = HashMap::new();
    for i in 0..graph.nodes.len() {
        let op = graph.nodes[i].op.clone();
        for slot in 0..graph.nodes[i].inputs.len() {
            let Some(v) = graph.nodes[i].inputs[slot] else { continue };
            let Source::Weight(id) = graph.value(v).source else { continue };
            if mapped.contains(&id) || (op.reads_anywhere(slot) && anywhere(model, id).is_some()) {
                continue;
            }
            let known = loads.get(&id).copied();
            let loaded = match known {
                Some(known) => known,
                None => load(model, graph, id)?,
            };
            loads.insert(id, loaded);
            if loaded.is_some() {
                graph.nodes[i].inputs[slot] = loaded;
            }
        }
    }
    Ok(())
}

fn load(model: &Model, graph: &mut Graph, id: WeightId) -> Result<Option<ValueId>> {
    let weight = model.weight(id);
    if weight.view(&model.files).is_some() {
        return Ok(None);
    }
    let Some((dtype, stored)) = stored(model, id) else { return Ok(None) };
    if stored.len() <= COPIED || !Load::can(dtype) || dtype.working() != weight.working() {
        return Ok(None);
    }
    let op = Arc::new(Load { stored, dtype, dims: weight.dims.clone() });
    let made = graph.emit(&weight.name, op, &[], 1);
    let made = made.map_err(|source| Error::Op { node: format!("load of {}", weight.name), source })?;
    Ok(made.first().copied())
}
