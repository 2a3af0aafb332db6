//! Attributes of a file's node as the operators read them.

use std::sync::Arc;

use crate::import::external::Files;
use crate::import::proto::{AttributeProto, EXTERNAL, NodeProto, TensorProto};
use crate::import::weights::{dims_of, from_stored, plain};
use crate::ops::{Attr, Attrs};
use crate::tensor::{DType, Tensor};

/// The attributes of a node. Half floats become the type they are computed in, also where an
/// attribute names a type (`Cast`'s `to`).
pub(super) fn attrs(files: &mut Files, node: &NodeProto) -> Result<Attrs, String> {
    let mut out = Attrs::default();
    for a in &node.attribute {
        let mut value = attr(files, a).map_err(|e| format!("attribute '{}': {e}", a.name))?;
        if matches!(a.name.as_str(), "to" | "dtype" | "stash_type")
            && let Attr::Int(code) = &mut value
            && let Some(dtype) = i32::try_from(*code).ok().and_then(DType::from_onnx)
        {
            *code = i64::from(dtype.working().to_onnx());
        }
        out.0.insert(a.name.clone(), value);
    }
    Ok(out)
}

/// `AttributeProto.type`, or what follows from the fields in files that do not say it.
pub(super) fn kind(a: &AttributeProto) -> i32 {
    if a.r#type != 0 {
        return a.r#type;
    }
    match () {
        _ if a.t.is_some() => 4,
        _ if a.g.is_some() => 5,
        _ if !a.floats.is_empty() => 6,
        _ if !a.ints.is_empty() => 7,
        _ if !a.strings.is_empty() => 8,
        _ if a.f.is_some() => 1,
        _ if !a.s.is_empty() => 3,
        _ => 2,
    }
}

fn attr(files: &mut Files, a: &AttributeProto) -> Result<Attr, String> {
    let text = |s: &[u8]| String::from_utf8_lossy(s).into_owned();
    Ok(match kind(a) {
        // A writer may leave out a zero.
        1 => Attr::Float(a.f.as_deref().and_then(|f| f.try_into().ok()).map_or(0.0, f32::from_le_bytes)),
        2 => Attr::Int(a.i),
        3 => Attr::Str(text(&a.s)),
        4 => match &a.t {
            None => return Err("a tensor is missing".into()),
            Some(t) => match DType::from_onnx(t.data_type) {
                Some(dtype) => Attr::Tensor(Arc::new(tensor(files, t, dtype)?)),
                None => Attr::Other("a tensor of an element type that is not supported"),
            },
        },
        5 => Attr::Other("a subgraph"),
        6 => Attr::Floats(floats(a)?),
        7 => Attr::Ints(a.ints.clone()),
        8 => Attr::Strs(a.strings.iter().map(|s| text(s)).collect()),
        9 => Attr::Other("a list of tensors"),
        10 => Attr::Other("a list of subgraphs"),
        11 | 12 => Attr::Other("a sparse tensor"),
        _ => Attr::Other("a type"),
    })
}

fn floats(a: &AttributeProto) -> Result<Vec<f32>, String> {
    let bytes = a.floats.0.concat();
    if !bytes.len().is_multiple_of(4) {
        return Err("a list of floats is cut off".into());
    }
    Ok(bytes.chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect())
}

/// The values of a tensor, wherever they lie, in their working type.
pub(super) fn tensor(files: &mut Files, t: &TensorProto, dtype: DType) -> Result<Tensor, String> {
    let stored = if t.data_location == EXTERNAL {
        let dims = dims_of(&t.dims)?;
        let want = super::weights::byte_size(dtype, &dims)?.div_ceil(8 / dtype.bits().min(8));
        let at = files.external(t).map_err(|e| e.to_string())?;
        let end = at.offset.saturating_add(at.len.unwrap_or(want));
        let bytes =
            files.files[at.file].bytes.get(at.offset..end).ok_or("its values lie beyond their file")?;
        from_stored(dtype, &dims, bytes)?
    } else if matches!(dtype, DType::F16 | DType::BF16) && t.raw_data.is_none() {
        // Their bits in int32_data.
        let bits = plain(&TensorProto { data_type: DType::U16.to_onnx(), ..t.clone() }, DType::U16)?;
        from_stored(dtype, bits.dims(), bits.bytes())?
    } else {
        plain(t, dtype)?
    };
    Ok(if dtype == dtype.working() { stored } else { stored.cast(dtype.working()) })
}
