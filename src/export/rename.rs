//! New names for external data files, wherever a model names them.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::import::wire::{Edit, Field, LEN, WireError, fields};

/// Nesting that protobuf's own readers accept.
const DEPTH: usize = 100;

/// The edits that replace each `location` that is a key of `names` by its value, in subgraphs and
/// functions too.
pub(super) fn edits(model: &[u8], names: &BTreeMap<String, String>) -> Result<Vec<Edit>, WireError> {
    let mut walk = Walk { bytes: model, names, path: Vec::new(), edits: Vec::new() };
    walk.message(0..model.len(), Kind::Model)?;
    Ok(walk.edits)
}

#[derive(Clone, Copy)]
enum Kind {
    Model,
    Function,
    Graph,
    Node,
    Attribute,
    Sparse,
    Tensor,
    Entry,
}

struct Walk<'a> {
    bytes: &'a [u8],
    names: &'a BTreeMap<String, String>,
    path: Vec<u32>,
    edits: Vec<Edit>,
}

impl Walk<'_> {
    fn message(&mut self, range: Range<usize>, kind: Kind) -> Result<(), WireError> {
        if self.path.len() > DEPTH {
            return Err(WireError { at: range.start, what: "messages nest too deeply" });
        }
        if matches!(kind, Kind::Entry) {
            return self.entry(range);
        }
        for f in fields(self.bytes, range) {
            let f = f?;
            let child = match (kind, f.number) {
                (Kind::Model, 7) | (Kind::Attribute, 6 | 11) => Kind::Graph,
                (Kind::Model, 25) => Kind::Function,
                (Kind::Function, 7) | (Kind::Graph, 1) => Kind::Node,
                (Kind::Function, 11) | (Kind::Node, 5) => Kind::Attribute,
                (Kind::Graph, 5) | (Kind::Attribute, 5 | 10) | (Kind::Sparse, 1 | 2) => Kind::Tensor,
                (Kind::Graph, 15) | (Kind::Attribute, 22 | 23) => Kind::Sparse,
                (Kind::Tensor, 13) => Kind::Entry,
                _ => continue,
            };
            if f.wire == LEN {
                self.path.push(f.number);
                self.message(f.payload, child)?;
                self.path.pop();
            }
        }
        Ok(())
    }

    fn entry(&mut self, range: Range<usize>) -> Result<(), WireError> {
        let mut key: &[u8] = b"";
        let mut value: Option<Field> = None;
        for f in fields(self.bytes, range) {
            let f = f?;
            match f.number {
                1 => key = self.bytes.get(f.payload).unwrap_or_default(),
                2 if f.wire == LEN => value = Some(f),
                _ => {}
            }
        }
        let Some(value) = value.filter(|_| key == b"location") else { return Ok(()) };
        let old = self.bytes.get(value.payload.clone()).unwrap_or_default();
        if let Some(new) = std::str::from_utf8(old).ok().and_then(|o| self.names.get(o)) {
            let mut path = self.path.clone();
            path.push(2);
            self.edits.push(Edit { path, range: value.payload, bytes: new.clone().into_bytes() });
        }
        Ok(())
    }
}
