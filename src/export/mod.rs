//! New weights into the same file.
//!
//! The file is copied and exactly the bytes of changed tensors are overwritten; what cannot be
//! overwritten at equal length is spliced. Names, opset, metadata, unknown fields and all other tensors
//! stay as they are, byte for byte. The result is first complete and synced in a folder of its own
//! beside the destination, then renamed: on any failure nothing is left behind and nothing is damaged.

mod atomic;
mod patch;
mod rename;
mod source;
pub mod verify;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::graph::WeightId;
use crate::import::wire::{self, Edit, Segment};
use crate::import::{Model, SourceFile};
use crate::tensor::Tensor;

pub(crate) use source::restored;
pub use source::{Given, Learned, Source, Stored};
pub use verify::{Verification, verify};

/// Choices of an export.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Where a changed external data file would overwrite the source's own, write it under a new name
    /// and make the model refer to it (otherwise that is an error).
    pub rename_data: bool,
}

/// What an export wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// The model, then its external data files (those that were written).
    pub files: Vec<PathBuf>,
    /// The weights whose stored bytes changed.
    pub changed: Vec<WeightId>,
}

/// A finished export that is not in place yet. Dropped, it leaves nothing behind.
pub struct Staged {
    stage: atomic::Stage,
    changed: Vec<WeightId>,
}

/// Prepares `model` with `changes` to become `output`.
///
/// Values are given in the working type and put back in the stored one; a tensor that is equal to what
/// the file holds leaves its bytes alone. Fails when a change does not fit its weight, or when an
/// external data file of the source would be overwritten.
pub fn stage(
    model: &Model,
    changes: &[(WeightId, &Tensor)],
    output: &Path,
    options: Options,
) -> Result<Staged> {
    stage_from(model, &Given(changes), output, options)
}

/// As [`stage`], with weights that are taken from their source one by one as they are written.
pub fn stage_from(model: &Model, source: &dyn Source, output: &Path, options: Options) -> Result<Staged> {
    let mut edits = patch::edits(model, source)?;
    let (folder, name) = split(output)?;
    let mut stage = atomic::Stage::new(folder)?;

    // Data files first: renaming one changes the model.
    let sources: Vec<PathBuf> = model.files.iter().filter_map(|f| f.path.canonicalize().ok()).collect();
    let is_source = |p: &Path| p.canonicalize().is_ok_and(|p| sources.contains(&p));
    let mut entries = rename::Changes::default();
    for id in &edits.changed {
        let l = &model.weight(*id).location;
        if let Some(file) = model.files.get(l.file).filter(|_| l.file > 0) {
            entries.changed.insert((file.location.clone(), l.offset));
        }
    }
    for (i, file) in model.files.iter().enumerate().skip(1) {
        let (own, later) = edits.take(i);
        let target = folder.join(&file.location);
        let mut location = file.location.clone();
        if target == output || location == *name.to_string_lossy() {
            return Err(Error::file(
                output,
                format!("is the name of the model's external data file '{location}'"),
            ));
        }
        if is_source(&target) {
            if own.is_empty() && later.is_empty() {
                stage.refer(&location, &file.path)?;
                continue;
            }
            if !options.rename_data {
                return Err(Error::file(
                    &target,
                    "would be overwritten, and the source model needs it: write to another folder, or give new \
                     names to the data files (--rename-data)",
                ));
            }
            location = fresh_name(folder, name, &is_source, &entries.names);
            entries.names.insert(file.location.clone(), location.clone());
        }
        let segments = segments(&file.path, &file.bytes, own)?;
        stage.write(Path::new(&location), &file.bytes, &segments, placed(model, source, later, &segments))?;
    }
    let file = &model.files[0];
    let (mut own, later) = edits.take(0);
    own.extend(rename::edits(&file.bytes, &entries).map_err(|e| Error::file(&file.path, e.to_string()))?);
    let segments = segments(&file.path, &file.bytes, own)?;
    stage.write(Path::new(name), &file.bytes, &segments, placed(model, source, later, &segments))?;
    Ok(Staged { stage, changed: edits.changed })
}

/// Writes `model` with `changes` to `output`, which may be the model's own path.
pub fn write(
    model: &Model,
    changes: &[(WeightId, &Tensor)],
    output: &Path,
    options: Options,
) -> Result<Written> {
    stage(model, changes, output, options)?.commit()
}

/// The bytes of `model` with `changes`, for a model without external data.
pub fn to_bytes(model: &Model, changes: &[(WeightId, &Tensor)]) -> Result<Vec<u8>> {
    if model.files.len() > 1 {
        return Err(Error::file(&model.path, "has external data, which cannot go into one run of bytes"));
    }
    let source = Given(changes);
    let file = &model.files[0];
    let (own, later) = patch::edits(model, &source)?.take(0);
    let segments = segments(&file.path, &file.bytes, own)?;
    let mut out = wire::concat(&file.bytes, &segments);
    for part in placed(model, &source, later, &segments) {
        let (mut at, stored) = part?;
        stored.each(|piece| {
            out[at..at + piece.len()].copy_from_slice(piece);
            at += piece.len();
        })?;
    }
    Ok(out)
}

/// Are `others` the model's files with new weights, and nothing else?
pub(crate) fn equals(model: &Model, source: &dyn Source, others: &[SourceFile]) -> Result<bool> {
    let mut edits = patch::edits(model, source)?;
    for (index, (file, other)) in model.files.iter().zip(others).enumerate() {
        let (own, later) = edits.take(index);
        let segments = segments(&file.path, &file.bytes, own)?;
        let mut places = Vec::new();
        for part in placed(model, source, later, &segments) {
            let (at, stored) = part?;
            let place = at..at + stored.len();
            match other.bytes.get(place.clone()) {
                Some(bytes) if stored.equals(bytes)? => places.push(place),
                _ => return Ok(false),
            }
        }
        if !wire::equal(&file.bytes, &segments, &places, &other.bytes) {
            return Ok(false);
        }
    }
    Ok(others.len() == model.files.len())
}

/// What is written over the segments' bytes: where, and with what.
fn placed<'a>(
    model: &'a Model,
    source: &'a dyn Source,
    later: Vec<patch::Later>,
    segments: &'a [Segment],
) -> impl Iterator<Item = Result<(usize, Stored<'a>)>> {
    later.into_iter().map(move |l| {
        let name = || &model.weight(l.weight).name;
        let stored = source.stored(model, l.weight)?.filter(|s| s.len() == l.range.len());
        let stored = stored.ok_or_else(|| Error::value(name(), "has changed while it was written"))?;
        let at = wire::moved(segments, &l.range);
        Ok((at.ok_or_else(|| Error::value(name(), "lies in an edit of the file"))?, stored))
    })
}

impl Staged {
    /// The model as it will be, with its data files beside it: to be verified before it is in place.
    pub fn path(&self) -> PathBuf {
        self.stage.last().unwrap_or_default()
    }

    pub fn changed(&self) -> &[WeightId] {
        &self.changed
    }

    /// Puts everything in place: the data files, then the model.
    pub fn commit(self) -> Result<Written> {
        let mut files = self.stage.commit()?;
        files.reverse();
        Ok(Written { files, changed: self.changed })
    }
}

fn segments(path: &Path, bytes: &[u8], edits: Vec<Edit>) -> Result<Vec<Segment>> {
    crate::import::wire::segments(bytes, edits).map_err(|e| Error::file(path, e.to_string()))
}

fn split(output: &Path) -> Result<(&Path, &OsStr)> {
    let name = output.file_name().ok_or_else(|| Error::file(output, "is not the name of a file"))?;
    let folder = match output.parent() {
        Some(p) if p.as_os_str().is_empty() => Path::new("."),
        Some(p) => p,
        None => Path::new("/"),
    };
    Ok((folder, name))
}

/// A name for a data file of `output`: after the model, and not the source's.
fn fresh_name(
    folder: &Path,
    output: &OsStr,
    is_source: &dyn Fn(&Path) -> bool,
    taken: &BTreeMap<String, String>,
) -> String {
    let output = output.to_string_lossy();
    let mut n = 0usize;
    loop {
        let name = match n {
            0 => format!("{output}.data"),
            n => format!("{output}.{n}.data"),
        };
        if !is_source(&folder.join(&name)) && !taken.values().any(|t| *t == name) {
            return name;
        }
        n += 1;
    }
}

#[cfg(test)]
mod tests;
