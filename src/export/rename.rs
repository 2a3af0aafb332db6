//! What a model says of its external data files, wherever it names them.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

use crate::import::normal;
use crate::import::tree::Message;
use crate::import::wire::{Edit, Field, LEN, WireError, fields};

/// Nesting that protobuf's own readers accept.
const DEPTH: usize = 100;

/// What changes in the entries that refer to external data, in subgraphs and functions too.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// New file names by old ones.
    pub names: BTreeMap<String, String>,
    /// Changed tensors, by file and offset: a checksum of theirs is no longer true, and removed.
    pub changed: HashSet<(String, usize)>,
}

pub(super) fn edits(model: &[u8], changes: &Changes) -> Result<Vec<Edit>, WireError> {
    let mut walk = Walk { bytes: model, changes, path: Vec::new(), edits: Vec::new() };
    if !changes.names.is_empty() || !changes.changed.is_empty() {
        walk.message(0..model.len(), Message::Model)?;
    }
    Ok(walk.edits)
}

struct Walk<'a> {
    bytes: &'a [u8],
    changes: &'a Changes,
    path: Vec<u32>,
    edits: Vec<Edit>,
}

impl Walk<'_> {
    fn message(&mut self, range: Range<usize>, message: Message) -> Result<(), WireError> {
        if self.path.len() > DEPTH {
            return Err(WireError { at: range.start, what: "messages nest too deeply" });
        }
        if message == Message::Tensor {
            return self.tensor(range);
        }
        for f in fields(self.bytes, range) {
            let f = f?;
            if let (Some(inner), LEN) = (message.field(f.number), f.wire) {
                self.path.push(f.number);
                self.message(f.payload, inner)?;
                self.path.pop();
            }
        }
        Ok(())
    }

    fn tensor(&mut self, range: Range<usize>) -> Result<(), WireError> {
        // Key, value, the whole entry and the range of its value.
        let mut entries: Vec<(&str, &str, Field, Range<usize>)> = Vec::new();
        for entry in fields(self.bytes, range) {
            let entry = entry?;
            if entry.number != 13 || entry.wire != LEN {
                continue;
            }
            let (mut key, mut value) = (0..0, 0..0);
            for f in fields(self.bytes, entry.payload.clone()) {
                match f? {
                    f if f.wire == LEN && f.number == 1 => key = f.payload,
                    f if f.wire == LEN && f.number == 2 => value = f.payload,
                    _ => {}
                }
            }
            let text =
                |r: Range<usize>| std::str::from_utf8(self.bytes.get(r).unwrap_or_default()).unwrap_or("");
            entries.push((text(key), text(value.clone()), entry, value));
        }
        let get = |key: &str| entries.iter().rev().find(|e| e.0 == key);
        let Some((_, location, _, place)) = get("location") else { return Ok(()) };
        let location = normal(location);
        let offset = get("offset").map_or(Some(0), |e| e.1.parse().ok());
        if let Some(new) = self.changes.names.get(&location) {
            let path = [self.path.as_slice(), &[13, 2]].concat();
            self.edits.push(Edit { path, range: place.clone(), bytes: new.clone().into_bytes() });
        }
        if let Some(offset) = offset
            && self.changes.changed.contains(&(location, offset))
        {
            for (_, _, entry, _) in entries.iter().filter(|e| e.0 == "checksum") {
                self.edits.push(Edit {
                    path: self.path.clone(),
                    range: entry.whole.clone(),
                    bytes: Vec::new(),
                });
            }
        }
        Ok(())
    }
}
