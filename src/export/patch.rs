//! Changed weights as edits of the files they lie in.

use std::collections::BTreeMap;
use std::ops::Range;

use prost::Message;

use crate::error::{Error, Result};
use crate::graph::WeightId;
use crate::import::proto::{AttributeProto, NodeProto, TensorProto};
use crate::import::wire::{self, Edit};
use crate::import::{Encoding, Model, Weight};
use crate::tensor::Tensor;

pub(super) struct Edits {
    pub by_file: BTreeMap<usize, Vec<Edit>>,
    pub changed: Vec<WeightId>,
}

/// IR version from which an initializer need not be an input of the graph as well.
const FREE_INITIALIZERS: i64 = 4;
/// `AttributeProto.AttributeType.TENSOR`.
const TENSOR: i32 = 4;

pub(super) fn edits(model: &Model, changes: &[(WeightId, &Tensor)]) -> Result<Edits> {
    let mut out = Edits { by_file: BTreeMap::new(), changed: Vec::new() };
    // Found once, when the first node is to be replaced.
    let mut nodes: Option<Vec<wire::Field>> = None;
    for &(id, new) in changes {
        let weight = model
            .weights
            .get(id.index())
            .ok_or_else(|| Error::Config(format!("the model has no weight {}", id.index())))?;
        if out.changed.contains(&id) {
            return Err(Error::value(&weight.name, "is changed twice"));
        }
        let old = weight.stored(&model.files)?;
        let Some(bytes) = weight.restore(&old, new)? else { continue };
        let file = weight.location.file;
        let list = out.by_file.entry(file).or_default();
        let malformed = |e: wire::WireError| Error::file(&model.path, e.to_string());
        match &weight.location.encoding {
            Encoding::Scattered(chunks) => scatter(list, chunks, &bytes),
            Encoding::Varints { chunks, path } => {
                let file = &model.files[file].bytes;
                varints(list, file, chunks, path, &bytes).map_err(malformed)?;
            }
            Encoding::Filled { node, .. } => {
                let file = &model.files[0].bytes;
                let nodes = match &mut nodes {
                    Some(n) => n,
                    none => none.insert(wire::find_all(file, &[7, 1]).map_err(malformed)?),
                };
                let field = nodes
                    .get(*node)
                    .ok_or_else(|| Error::value(&weight.name, "the node that computes it is not in the file"))?;
                let payload = file.get(field.payload.clone()).unwrap_or_default();
                let bytes = replacement(model.ir_version, payload, weight, bytes)?;
                list.push(Edit { path: vec![7], range: field.whole.clone(), bytes });
            }
            _ => {
                let start = weight.location.offset;
                list.push(Edit { path: Vec::new(), range: start..start + bytes.len(), bytes });
            }
        }
        out.changed.push(id);
    }
    Ok(out)
}

fn scatter(list: &mut Vec<Edit>, chunks: &[Range<usize>], mut bytes: &[u8]) {
    for range in chunks {
        let (now, rest) = bytes.split_at(range.len().min(bytes.len()));
        list.push(Edit { path: Vec::new(), range: range.clone(), bytes: now.to_vec() });
        bytes = rest;
    }
}

/// Half floats in `int32_data`: one packed field in place of the first occurrence, the others removed.
fn varints(
    list: &mut Vec<Edit>,
    file: &[u8],
    chunks: &[Range<usize>],
    path: &[u32],
    halves: &[u8],
) -> std::result::Result<(), wire::WireError> {
    let mut packed = Vec::with_capacity(halves.len() * 3 / 2);
    for h in halves.chunks_exact(2) {
        wire::put_varint(&mut packed, u64::from(u16::from_le_bytes([h[0], h[1]])));
    }
    let (&number, around) = path.split_last().ok_or(wire::WireError { at: 0, what: "an empty path" })?;
    for (i, range) in chunks.iter().enumerate() {
        let chain = wire::enclosing(file, path, range.start)?;
        let field = chain.last().ok_or(wire::WireError { at: range.start, what: "an empty path" })?;
        let mut bytes = Vec::new();
        if i == 0 {
            wire::put_field(&mut bytes, number, &packed);
        }
        list.push(Edit { path: around.to_vec(), range: field.whole.clone(), bytes });
    }
    Ok(())
}

/// The field of the graph that stands in place of a node that computed a constant: an initializer, or in
/// a file so old that every initializer is also an input, a `Constant` node.
fn replacement(ir_version: i64, node: &[u8], weight: &Weight, bytes: Vec<u8>) -> Result<Vec<u8>> {
    let node = NodeProto::decode(node).map_err(|e| Error::value(&weight.name, e.to_string()))?;
    let tensor = TensorProto {
        name: weight.name.clone(),
        dims: weight.dims.iter().map(|&d| d as i64).collect(),
        data_type: weight.dtype.to_onnx(),
        raw_data: Some(bytes.into()),
        ..Default::default()
    };
    let mut out = Vec::new();
    if ir_version >= FREE_INITIALIZERS {
        wire::put_field(&mut out, 5, &tensor.encode_to_vec());
        return Ok(out);
    }
    let value = AttributeProto { name: "value".into(), r#type: TENSOR, t: Some(tensor), ..Default::default() };
    let constant = NodeProto {
        op_type: "Constant".into(),
        name: node.name,
        output: vec![weight.name.clone()],
        attribute: vec![value],
        ..Default::default()
    };
    wire::put_field(&mut out, 1, &constant.encode_to_vec());
    Ok(out)
}
