//! A delta as a safetensors file, with one metadata entry: a JSON document and its digest.

use std::collections::{BTreeMap, HashMap};

use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::delta::encode::place_size;
use crate::delta::{BaseFile, Delta, DeltaType, Values};
use crate::tensor::{DType, View};
use crate::train::checkpoint::Stored;

/// The key of the metadata entry.
const KEY: &str = "retune.delta";
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Head {
    version: u32,
    /// What wrote it.
    retune: String,
    #[serde(rename = "type")]
    kind: DeltaType,
    base: Vec<BaseFile>,
    tensors: Vec<Entry>,
    /// In decimal, so that reading and writing it again changes nothing.
    max_error: String,
    /// SHA-256 over this document without the digest, and each tensor's name and bytes.
    digest: String,
}

#[derive(Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Encoding {
    Full,
    F16,
    Bf16,
    Sparse,
}

#[derive(Serialize, Deserialize)]
struct Entry {
    name: String,
    encoding: Encoding,
}

/// A tensor of the file: as bytes, since the base file knows type and shape.
struct Part<'a> {
    name: String,
    dtype: DType,
    dims: [usize; 1],
    bytes: &'a [u8],
}

fn places_of(name: &str) -> String {
    format!("{name}#places")
}

/// Of places: their bytes.
fn packed(places: &[u64]) -> Vec<u8> {
    let widest = places.last().map_or(0, |p| *p as usize);
    match place_size(widest) {
        4 => places.iter().flat_map(|p| (*p as u32).to_le_bytes()).collect(),
        _ => places.iter().flat_map(|p| p.to_le_bytes()).collect(),
    }
}

fn digest(head: &Head, parts: &BTreeMap<&str, &[u8]>) -> Result<String, String> {
    let plain = Head {
        retune: head.retune.clone(),
        base: head.base.clone(),
        max_error: head.max_error.clone(),
        tensors: head.tensors.iter().map(|e| Entry { name: e.name.clone(), ..*e }).collect(),
        digest: String::new(),
        ..*head
    };
    let mut sha = Sha256::new();
    sha.update(serde_json::to_vec(&plain).map_err(|e| e.to_string())?);
    for (name, bytes) in parts {
        sha.update((name.len() as u64).to_le_bytes());
        sha.update(name.as_bytes());
        sha.update((bytes.len() as u64).to_le_bytes());
        sha.update(bytes);
    }
    Ok(sha.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

pub(super) fn to_bytes(delta: &Delta) -> Result<Vec<u8>, String> {
    let places: Vec<Option<Vec<u8>>> = delta
        .tensors
        .iter()
        .map(|(_, values)| match values {
            Values::Elements { places, .. } => Some(packed(places)),
            _ => None,
        })
        .collect();
    let (mut parts, mut tensors) = (Vec::new(), Vec::new());
    for ((name, values), places) in delta.tensors.iter().zip(&places) {
        let (encoding, dtype, bytes) = match values {
            Values::Full(bytes) => (Encoding::Full, DType::U8, bytes),
            Values::Difference { dtype: DType::F16, bytes } => (Encoding::F16, DType::F16, bytes),
            Values::Difference { bytes, .. } => (Encoding::Bf16, DType::BF16, bytes),
            Values::Elements { bytes, .. } => (Encoding::Sparse, DType::U8, bytes),
        };
        tensors.push(Entry { name: name.clone(), encoding });
        parts.push(Part { name: name.clone(), dtype, dims: [bytes.len() / dtype.size()], bytes });
        if let (Some(bytes), Values::Elements { places, .. }) = (places, values) {
            let dtype = if bytes.len() == 4 * places.len() { DType::U32 } else { DType::U64 };
            parts.push(Part { name: places_of(name), dtype, dims: [places.len()], bytes });
        }
    }
    let by_name: BTreeMap<&str, &[u8]> = parts.iter().map(|p| (p.name.as_str(), p.bytes)).collect();
    if by_name.len() != parts.len() {
        return Err("two tensors would have one name".into());
    }
    let mut head = Head {
        version: VERSION,
        retune: env!("CARGO_PKG_VERSION").into(),
        kind: delta.kind,
        base: delta.base.clone(),
        tensors,
        max_error: delta.max_error.to_string(),
        digest: String::new(),
    };
    head.digest = digest(&head, &by_name)?;
    let head = serde_json::to_string(&head).map_err(|e| e.to_string())?;
    let tensors = parts
        .iter()
        .map(|p| (p.name.as_str(), Stored(View { dtype: p.dtype, dims: &p.dims, bytes: p.bytes })));
    safetensors::serialize(tensors, Some(HashMap::from([(KEY.to_string(), head)]))).map_err(|e| e.to_string())
}

pub(super) fn from_bytes(bytes: &[u8]) -> Result<Delta, String> {
    let damaged = |e: safetensors::SafeTensorError| format!("is damaged, or no delta: {e}");
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(damaged)?;
    let Some(head) = metadata.metadata().as_ref().and_then(|m| m.get(KEY)) else {
        return Err("is no delta of retune's: it lacks the metadata entry 'retune.delta'".into());
    };
    let version: Version = serde_json::from_str(head).map_err(|e| format!("is damaged: {e}"))?;
    if version.version != VERSION {
        return Err(format!("is written in form {}, and this retune reads {VERSION}", version.version));
    }
    let head: Head = serde_json::from_str(head).map_err(|e| format!("is damaged: {e}"))?;
    let file = SafeTensors::deserialize(bytes).map_err(damaged)?;
    let all: BTreeMap<&str, &[u8]> = file.iter().map(|(name, t)| (name, t.data())).collect();
    if digest(&head, &all)? != head.digest {
        return Err("is damaged: its digest is another".into());
    }
    let mut tensors = Vec::with_capacity(head.tensors.len());
    for Entry { name, encoding } in head.tensors {
        let find = |name: &str| {
            all.get(name).map(|b| b.to_vec()).ok_or_else(|| format!("is damaged: it lacks '{name}'"))
        };
        let bytes = find(&name)?;
        let values = match encoding {
            Encoding::Full => Values::Full(bytes),
            Encoding::F16 => Values::Difference { dtype: DType::F16, bytes },
            Encoding::Bf16 => Values::Difference { dtype: DType::BF16, bytes },
            Encoding::Sparse => {
                let key = places_of(&name);
                let places = find(&key)?;
                let wide = file.tensor(&key).is_ok_and(|t| t.dtype() == safetensors::Dtype::U64);
                Values::Elements { places: unpacked(&places, wide), bytes }
            }
        };
        tensors.push((name, values));
    }
    let max_error = head.max_error.parse().map_err(|_| "is damaged: an error bound is no number")?;
    Ok(Delta { kind: head.kind, base: head.base, tensors, max_error })
}

fn unpacked(bytes: &[u8], wide: bool) -> Vec<u64> {
    let (narrow, wide_) = (bytes.as_chunks::<4>().0, bytes.as_chunks::<8>().0);
    match wide {
        false => narrow.iter().map(|b| u64::from(u32::from_le_bytes(*b))).collect(),
        true => wide_.iter().map(|b| u64::from_le_bytes(*b)).collect(),
    }
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}
