//! From an ONNX file to a [`Graph`] that knows where every one of its weights lies in the file.
//!
//! The file is mapped, not read; [`load`] makes one graph node of each ONNX node and leaves the float
//! constants where they are, as [`Weight`]s with a byte range and a role. What cannot be executed does
//! not fail the import: it is listed in [`Model::blockers`], all at once.

mod attrs;
mod bodies;
mod build;
mod external;
mod flat;
mod head;
mod integers;
pub(crate) mod map;
mod order;
pub mod proto;
mod roles;
mod sequences;
pub(crate) mod splice;
pub(crate) mod tree;
pub mod weights;
pub mod wire;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use prost::Message;

use crate::error::{Blocker, Error, Result};
use crate::graph::{Dim, Graph, ValueId, WeightId};
use crate::tensor::Tensor;

pub use external::SourceFile;
pub(crate) use external::normal;
pub use head::{NewHead, replace as replace_head};
pub use weights::{Encoding, Location, Reader, Role, Split, Use, Weight};

use external::Files;
use proto::ModelProto;

/// An imported model: the graph, its weights and the mapped files they lie in.
#[derive(Debug, Clone)]
pub struct Model {
    pub path: PathBuf,
    pub graph: Graph,
    /// Every float constant, by `WeightId`.
    pub weights: Vec<Weight>,
    /// The model itself, then its external data files.
    pub files: Vec<SourceFile>,
    pub ir_version: i64,
    /// Version by domain; `""` is ONNX's own.
    pub opsets: BTreeMap<String, i64>,
    /// Name and version of what wrote the file.
    pub producer: (String, String),
    pub domain: String,
    pub model_version: i64,
    pub graph_name: String,
    pub metadata: Vec<(String, String)>,
    /// How often each `op_type` is in the file (with its domain where that is not ONNX's own).
    pub ops: BTreeMap<String, usize>,
    /// What cannot be executed, node by node.
    pub blockers: Vec<Blocker>,
}

/// Imports the ONNX file at `path`.
///
/// Fails when the file is damaged, when an external data file is missing or lies outside the model's
/// folder, and when the nodes do not form a graph. Operators without a kernel do not fail it.
pub fn load(path: impl AsRef<Path>) -> Result<Model> {
    let path = path.as_ref();
    let bytes = map::map(path)?;
    let file = SourceFile { path: path.to_path_buf(), location: String::new(), bytes };
    from_source(file, Some(folder(path).to_path_buf()))
}

/// Bytes below which an edited file is held in memory.
const HELD: usize = 1 << 20;

/// Imports a model from memory; `name` is what messages call it. It can have no external data.
pub fn from_bytes(name: &str, bytes: impl Into<Bytes>) -> Result<Model> {
    from_source(SourceFile::in_memory(name, bytes), None)
}

/// `model` with edits of its main file, which keeps its path and its external data.
///
/// A large one is written to an unnamed file in the system's folder for temporary files, and mapped from there.
pub(crate) fn edited(model: &Model, edits: Vec<wire::Edit>) -> Result<Model> {
    let original = &model.files[0].bytes;
    let segments = wire::segments(original, edits).map_err(|e| Error::file(&model.path, e.to_string()))?;
    let mapped = match original.len() < HELD {
        true => None,
        // Where there is no place for such a file, it is held in memory.
        false => map::unnamed(|file| wire::write(original, &segments, file)).ok(),
    };
    let file = SourceFile::in_memory(
        &model.path,
        mapped.unwrap_or_else(|| wire::concat(original, &segments).into()),
    );
    let folder = (model.files.len() > 1).then(|| folder(&model.path).to_path_buf());
    let mut new = from_source(file, folder)?;
    for (v, value) in &model.graph.fixed {
        new.fix_input(&model.graph.value(*v).name, value)?;
    }
    Ok(new)
}

/// The folder that a model's external data lie in.
fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if p.as_os_str().is_empty() => Path::new("."),
        Some(p) => p,
        None => Path::new("/"),
    }
}

fn from_source(file: SourceFile, folder: Option<PathBuf>) -> Result<Model> {
    let path = file.path.clone();
    let mut proto = ModelProto::decode(file.bytes.clone())
        .map_err(|e| Error::file(&path, format!("is damaged, or not an ONNX model: {e}")))?;
    let Some(graph) = proto.graph.take() else {
        return Err(Error::file(&path, "has no graph: is it an ONNX model?"));
    };
    let graph_name = graph.name.clone();
    let mut files = Files::new(file, folder);
    files.open_all(&proto, &graph)?;
    let mut opsets = BTreeMap::new();
    for o in &proto.opset_import {
        let domain = if o.domain == "ai.onnx" { "" } else { o.domain.as_str() };
        opsets.insert(domain.to_string(), o.version);
    }
    if proto.opset_import.is_empty() {
        opsets.insert(String::new(), 1);
    }
    let built = build::build(&proto, graph, &opsets, &mut files)?;
    Ok(Model {
        path,
        graph: built.graph,
        weights: built.weights,
        files: files.files,
        ir_version: proto.ir_version,
        opsets,
        producer: (proto.producer_name.clone(), proto.producer_version.clone()),
        domain: proto.domain.clone(),
        model_version: proto.model_version,
        graph_name,
        metadata: proto.metadata_props.iter().map(|e| (e.key.clone(), e.value.clone())).collect(),
        ops: built.ops,
        blockers: built.blockers,
    })
}

impl Model {
    /// The version of ONNX's own operators.
    pub fn opset(&self) -> i64 {
        self.opsets.get("").copied().unwrap_or(1)
    }

    pub fn weight(&self, id: WeightId) -> &Weight {
        &self.weights[id.index()]
    }

    /// The weight called `name`.
    pub fn find_weight(&self, name: &str) -> Option<WeightId> {
        self.weights.iter().position(|w| w.name == name).map(|i| WeightId(i as u32))
    }

    /// The running means and variances.
    pub fn running_statistics(&self) -> impl Iterator<Item = WeightId> {
        let running = |w: &Weight| matches!(w.role, Role::RunningMean | Role::RunningVar);
        let all = self.weights.iter().enumerate();
        all.filter(move |(_, w)| running(w)).map(|(i, _)| WeightId(i as u32))
    }

    /// The values of a weight as the file has them, in their working type.
    pub fn load_weight(&self, id: WeightId) -> Result<Tensor> {
        self.weight(id).load(&self.files)
    }

    /// Gives an input a value of its own: it is fed no longer, and the same at every run. One number fills an input of higher
    /// rank (see [`Graph::fix`]).
    ///
    /// Fails when there is no such input, and when the value does not fit its type or shape.
    pub fn fix_input(&mut self, name: &str, value: &Tensor) -> Result<()> {
        let named = |v: &&ValueId| self.graph.value(**v).name == name;
        let Some(&v) = self.graph.inputs.iter().find(named) else {
            return Err(Error::value(name, "the model has no such input"));
        };
        let fail = |what: String| Err(Error::value(name, what));
        let declared = self.graph.value(v).declared.clone();
        let dtype = declared.as_ref().map_or(value.dtype(), |d| d.dtype);
        if !dtype.is_float() && value.dtype().is_float() && value.to_f64().iter().any(|x| x.fract() != 0.0) {
            return fail(format!("is {dtype} and set to a fraction"));
        }
        let mut value = value.cast(dtype).cast(dtype.working());
        if let Some(dims) = declared.and_then(|d| d.dims) {
            let fixed: Option<Vec<usize>> =
                dims.iter().map(|d| if let Dim::Fixed(n) = d { Some(*n) } else { None }).collect();
            let fits = |has: &[usize]| {
                has.len() == dims.len()
                    && dims.iter().zip(has).all(|(d, n)| !matches!(d, Dim::Fixed(want) if want != n))
            };
            let whole =
                fixed.filter(|f| value.dims().len() == 1 && f.iter().product::<usize>() == value.len());
            let to: Option<Vec<usize>> = match (value.len(), whole) {
                _ if fits(value.dims()) => Some(value.dims().to_vec()),
                (1, _) => Some(Vec::new()),
                (_, whole) => whole,
            };
            let Some(to) = to else {
                let want = dims.iter().map(|d| d.to_string()).collect::<Vec<_>>().join(", ");
                return fail(format!("set to an array of {:?}, the model takes [{want}]", value.dims()));
            };
            value = value.reshaped(&to).map_err(|e| Error::value(name, e.to_string()))?;
        }
        self.graph.fix(v, value);
        Ok(())
    }

    /// What the file itself takes for these feeds: with the inputs that have a value of their own.
    pub fn with_fixed(&self, feeds: &[(String, Tensor)]) -> Result<Vec<(String, Tensor)>> {
        let mut graph = self.graph.clone();
        for (name, t) in feeds {
            if let Some(v) = graph.inputs.iter().copied().find(|v| graph.value(*v).name == *name) {
                graph.value_mut(v).meta = Some(t.meta());
            }
        }
        let name = |v| self.graph.value(v).name.clone();
        let fixed = graph.fixed_values()?.into_iter().map(|(v, t)| (name(v), t.as_ref().clone()));
        Ok(feeds.iter().cloned().chain(fixed).collect())
    }

    /// Names of the graph's outputs, in order.
    pub fn output_names(&self) -> impl Iterator<Item = &str> {
        let name = |v: &ValueId| self.graph.value(*v).name.as_str();
        self.graph.outputs.iter().map(name)
    }
}

#[cfg(test)]
pub(crate) mod make;
#[cfg(test)]
mod tests;
