//! The files a model consists of: itself, and the external data files it names.

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};

use bytes::Bytes;

use crate::error::{Error, Result};
use crate::import::map;
use crate::import::proto::{EXTERNAL, GraphProto, ModelProto, TensorProto};

/// A mapped file.
#[derive(Debug, Clone)]
pub struct SourceFile {
    pub path: PathBuf,
    /// As the model names it, relative to its folder and without `.`; empty for the model itself.
    pub location: String,
    pub bytes: Bytes,
}

impl SourceFile {
    /// A file that was never on disk; `path` is what messages call it.
    pub fn in_memory(path: impl Into<PathBuf>, bytes: impl Into<Bytes>) -> Self {
        SourceFile { path: path.into(), location: String::new(), bytes: bytes.into() }
    }
}

/// The files seen so far; external data files are mapped when first named.
pub(super) struct Files {
    pub files: Vec<SourceFile>,
    by_location: HashMap<String, usize>,
    /// `None`: the model is in memory and can have no files beside it.
    folder: Option<PathBuf>,
}

/// Where a tensor's bytes are in an external data file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct External {
    pub file: usize,
    pub offset: usize,
    /// `None`: not said; as many as the tensor takes.
    pub len: Option<usize>,
}

impl Files {
    pub fn new(model: SourceFile, folder: Option<PathBuf>) -> Self {
        Files { files: vec![model], by_location: HashMap::new(), folder }
    }

    pub fn model(&self) -> &Bytes {
        &self.files[0].bytes
    }

    /// Opens the data file of an external tensor and checks that its range lies in it.
    pub fn external(&mut self, t: &TensorProto) -> Result<External> {
        let fail = |what: String| Error::value(&t.name, what);
        let get = |key: &str| t.external_data.iter().rev().find(|e| e.key == key).map(|e| e.value.as_str());
        let number = |key: &str| match get(key) {
            None => Ok(None),
            Some(v) => v
                .parse::<usize>()
                .map(Some)
                .map_err(|_| fail(format!("external data {key} '{v}' is not a number"))),
        };
        let location = get("location").ok_or_else(|| fail("external data without a location".into()))?;
        let offset = number("offset")?.unwrap_or(0);
        let len = number("length")?;
        let file = self.open(location)?;
        let size = self.files[file].bytes.len();
        if offset.checked_add(len.unwrap_or(0)).is_none_or(|end| end > size) {
            return Err(Error::file(
                &self.files[file].path,
                format!(
                    "tensor '{}' lies at bytes {offset}..+{}, beyond the file's {size}",
                    t.name,
                    len.unwrap_or(0)
                ),
            ));
        }
        Ok(External { file, offset, len })
    }

    /// The index of the external data file called `location`.
    fn open(&mut self, location: &str) -> Result<usize> {
        let normal = normal(location);
        if let Some(&i) = self.by_location.get(&normal) {
            return Ok(i);
        }
        let model = self.files[0].path.clone();
        let Some(folder) = &self.folder else {
            return Err(Error::file(
                &model,
                format!("external data '{location}' of a model that is not in a folder"),
            ));
        };
        let path = resolve(folder, location).map_err(|what| Error::file(&model, what))?;
        let bytes = map::map(&path)?;
        self.files.push(SourceFile { path, location: normal.clone(), bytes });
        self.by_location.insert(normal, self.files.len() - 1);
        Ok(self.files.len() - 1)
    }

    /// Opens every external data file that a model with this main graph names, in subgraphs and functions too: an
    /// export has to write them all.
    pub fn open_all(&mut self, model: &ModelProto, graph: &GraphProto) -> Result<()> {
        let mut found = Vec::new();
        let mut graphs = vec![graph];
        let inside = model
            .functions
            .iter()
            .flat_map(|f| f.attribute_proto.iter().chain(f.node.iter().flat_map(|n| &n.attribute)));
        for a in inside {
            found.extend(a.t.as_deref().into_iter().chain(&a.tensors));
            graphs.extend(a.g.as_deref().into_iter().chain(&a.graphs));
        }
        found.extend(tensors(graphs));
        for t in found {
            if t.data_location == EXTERNAL {
                self.external(t)?;
            }
        }
        Ok(())
    }
}

/// One spelling for each relative path.
pub(crate) fn normal(location: &str) -> String {
    let parts = Path::new(location).components().filter(|c| !matches!(c, Component::CurDir));
    let parts: Vec<_> = parts.map(|c| c.as_os_str().to_string_lossy()).collect();
    parts.join("/")
}

/// Every tensor in `graphs`, subgraphs included.
fn tensors(mut graphs: Vec<&GraphProto>) -> Vec<&TensorProto> {
    let mut out = Vec::new();
    while let Some(g) = graphs.pop() {
        out.extend(&g.initializer);
        for s in &g.sparse_initializer {
            out.extend(s.values.iter().chain(&s.indices));
        }
        for a in g.node.iter().flat_map(|n| &n.attribute) {
            out.extend(a.t.as_deref().into_iter().chain(&a.tensors));
            graphs.extend(a.g.as_deref().into_iter().chain(&a.graphs));
        }
    }
    out
}

/// The path of an external data file, which has to stay in `folder`.
fn resolve(folder: &Path, location: &str) -> std::result::Result<PathBuf, String> {
    let refuse = |why: &str| Err(format!("external data '{location}' {why}: refused"));
    let relative = Path::new(location);
    // Backslashes separate on Windows, where the file may have been made.
    if location.is_empty() || location.split(['/', '\\']).any(|part| part == "..") {
        return refuse("leaves the model's folder");
    }
    if !relative.components().all(|c| matches!(c, Component::Normal(_) | Component::CurDir)) {
        return refuse("is not a relative path");
    }
    let path = folder.join(relative);
    let real =
        |p: &Path| p.canonicalize().map_err(|e| format!("external data '{location}': {}: {e}", p.display()));
    if !real(&path)?.starts_with(real(folder)?) {
        return refuse("is a link that leaves the model's folder");
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stay_in_the_folder() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("model");
        std::fs::create_dir_all(folder.join("sub")).unwrap();
        std::fs::write(dir.path().join("outside"), b"x").unwrap();
        std::fs::write(folder.join("sub/data"), b"x").unwrap();
        assert!(resolve(&folder, "sub/data").is_ok());
        assert!(resolve(&folder, "./sub/data").is_ok());
        assert_eq!(normal("./sub//./data"), "sub/data");
        let absolute = folder.join("sub/data").display().to_string();
        for bad in ["", "../outside", "sub/../../outside", "..\\outside", "missing", absolute.as_str()] {
            assert!(resolve(&folder, bad).is_err(), "{bad}");
        }
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink(dir.path().join("outside"), folder.join("link")).unwrap();
            std::os::unix::fs::symlink(folder.join("sub/data"), folder.join("inner")).unwrap();
            assert!(resolve(&folder, "link").unwrap_err().contains("leaves"));
            assert!(resolve(&folder, "inner").is_ok());
        }
    }
}
