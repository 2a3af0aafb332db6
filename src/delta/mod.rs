//! What changed in a model's weights, as a small file: to be sent over thin links and put onto the same base file.
//!
//! A delta is a safetensors file. Its metadata name the base file and its external data by their SHA-256, and every tensor
//! with the way it is stored; a digest over all of it tells damage. It says what the *stored* values of weights become, so
//! that [`apply`] writes byte for byte what the export of the run that made it did.

mod encode;
mod file;

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::export::{self, Given, Source};
use crate::graph::WeightId;
use crate::import::{Model, SourceFile};
use crate::tensor::Tensor;

pub use encode::Values;

/// How changed values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeltaType {
    /// New values of changed tensors, exactly.
    #[default]
    Full,
    /// Differences in float16: each is off by at most 2⁻¹¹ of itself (2⁻²⁵ below 6.1e-5). Tensors that the file stores in
    /// two bytes or as integers are stored exactly.
    F16,
    /// Differences in bfloat16: each is off by at most 2⁻⁸ of itself. Others as with `F16`.
    Bf16,
    /// Places and new values of the elements that changed, exactly; the whole tensor where that is smaller.
    Sparse,
}

impl std::str::FromStr for DeltaType {
    type Err = String;

    fn from_str(s: &str) -> std::result::Result<Self, String> {
        match s {
            "full" => Ok(DeltaType::Full),
            "f16" => Ok(DeltaType::F16),
            "bf16" => Ok(DeltaType::Bf16),
            "sparse" => Ok(DeltaType::Sparse),
            _ => Err(format!("'{s}': takes full, f16, bf16 or sparse")),
        }
    }
}

/// A file that the delta is for: the model (its location is empty), or external data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseFile {
    pub location: String,
    pub sha256: String,
    pub bytes: u64,
}

/// What the weights of one base file become.
#[derive(Debug, Clone, PartialEq)]
pub struct Delta {
    pub kind: DeltaType,
    pub base: Vec<BaseFile>,
    /// By name, in the file's order.
    pub tensors: Vec<(String, Values)>,
    /// The largest difference of a decoded value from the exact one; 0 where all are stored exactly.
    pub max_error: f64,
}

/// For people and machines: what was written.
#[derive(Debug, Clone, Serialize)]
pub struct Described {
    pub path: std::path::PathBuf,
    pub kind: DeltaType,
    pub tensors: usize,
    pub bytes: u64,
    /// Of the base file and its external data.
    pub base_bytes: u64,
    pub max_error: f64,
}

fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

fn base_of(files: &[SourceFile]) -> Vec<BaseFile> {
    let file = |f: &SourceFile| BaseFile {
        location: f.location.clone(),
        sha256: hash(&f.bytes),
        bytes: f.bytes.len() as u64,
    };
    files.iter().map(file).collect()
}

impl Delta {
    /// From weights' new values, in the working type, as an export takes them.
    ///
    /// Fails when a change does not fit its weight, and when a difference does not fit the type.
    pub fn of(model: &Model, changes: &[(WeightId, &Tensor)], kind: DeltaType) -> Result<Delta> {
        Delta::from_source(model, &Given(changes), kind)
    }

    /// The same of weights that are taken from their source one by one.
    pub fn from_source(model: &Model, source: &dyn Source, kind: DeltaType) -> Result<Delta> {
        let mut delta = Delta { kind, base: base_of(&model.files), tensors: Vec::new(), max_error: 0.0 };
        let mut weights = source.weights();
        weights.sort();
        for id in weights {
            let Some(new) = source.stored(model, id)? else { continue };
            let weight = model.weight(id);
            let old = weight.stored(&model.files)?;
            let (values, error) = encode::encode(weight, &old, &new.bytes()?, kind)?;
            delta.max_error = delta.max_error.max(error);
            delta.tensors.push((weight.name.clone(), values));
        }
        Ok(delta)
    }

    /// From two files that differ in nothing but values of weights.
    pub fn between(base: &Model, new: &Model, kind: DeltaType) -> Result<Delta> {
        let other = |what: String| {
            Error::file(&new.path, format!("is not {} with other weights: {what}", base.path.display()))
        };
        let mut stored = BTreeMap::new();
        for (i, w) in base.weights.iter().enumerate() {
            let Some(id) = new.find_weight(&w.name) else {
                return Err(other(format!("it has no tensor '{}'", w.name)));
            };
            let v = new.weight(id);
            if v.dtype != w.dtype || v.dims != w.dims {
                return Err(other(format!("'{}' has another type or shape", w.name)));
            }
            let values = v.stored(&new.files)?;
            if values != w.stored(&base.files)? {
                stored.insert(WeightId(i as u32), values.into_owned());
            }
        }
        if base.files.len() != new.files.len() {
            return Err(other("it has another number of files".into()));
        }
        let same_names = base.files.iter().zip(&new.files).all(|(a, b)| a.location == b.location);
        if !same_names || !export::equals(base, &stored, &new.files)? {
            return Err(other("more than values of weights differs".into()));
        }
        Delta::from_source(base, &stored, kind)
    }

    /// Writes the file, whole or not at all.
    pub fn write(&self, path: &Path) -> Result<Described> {
        let bytes = file::to_bytes(self).map_err(|e| Error::file(path, format!("cannot be written: {e}")))?;
        crate::atomic::write_bytes(path, &bytes)?;
        Ok(Described {
            path: path.to_path_buf(),
            kind: self.kind,
            tensors: self.tensors.len(),
            bytes: bytes.len() as u64,
            base_bytes: self.base.iter().map(|f| f.bytes).sum(),
            max_error: self.max_error,
        })
    }

    /// Reads a file. Fails when it is no delta, damaged, or of a later version.
    pub fn read(path: &Path) -> Result<Delta> {
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        file::from_bytes(&bytes).map_err(|what| Error::file(path, what))
    }

    /// Is it for these files? Says which one is another.
    fn check_base(&self, model: &Model) -> Result<()> {
        let have = base_of(&model.files);
        for (i, file) in model.files.iter().enumerate() {
            let wanted = self.base.get(i);
            if wanted != have.get(i) {
                let wanted =
                    wanted.map_or("none".into(), |f| format!("SHA-256 {}, {} bytes", f.sha256, f.bytes));
                let what = format!(
                    "is not the file that the delta was made for ({wanted}); it has SHA-256 {}, {} bytes",
                    have[i].sha256, have[i].bytes
                );
                return Err(Error::file(&file.path, what));
            }
        }
        match self.base.get(have.len()) {
            Some(f) => Err(Error::file(&model.path, format!("has no external data '{}'", f.location))),
            None => Ok(()),
        }
    }

    /// The stored bytes of the weights that change.
    fn stored(&self, model: &Model) -> Result<BTreeMap<WeightId, Vec<u8>>> {
        let mut new = BTreeMap::new();
        for (name, values) in &self.tensors {
            let id = model.find_weight(name).ok_or_else(|| Error::value(name, "is not in the base file"))?;
            let weight = model.weight(id);
            let bytes = encode::decode(weight, &weight.stored(&model.files)?, values)?;
            if let Some(bytes) = bytes
                && new.insert(id, bytes).is_some()
            {
                return Err(Error::value(name, "is twice in the delta"));
            }
        }
        Ok(new)
    }
}

/// Puts a delta onto the model it was made for, and writes the result.
///
/// Fails, with nothing written, when the model is another file, and as an export does.
pub fn apply(
    model: &Model,
    delta: &Delta,
    output: &Path,
    options: export::Options,
) -> Result<export::Written> {
    delta.check_base(model)?;
    export::stage_from(model, &delta.stored(model)?, output, options)?.commit()
}

#[cfg(test)]
mod tests;
