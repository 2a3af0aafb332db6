//! Changed weights as edits of the files they lie in.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use prost::Message;

use super::Source;
use crate::error::{Error, Result};
use crate::graph::WeightId;
use crate::import::proto::NodeProto;
use crate::import::splice::{self, Constant};
use crate::import::tree;
use crate::import::wire::{self, Edit};
use crate::import::{Encoding, Model, Reader, Weight};

pub(super) struct Edits {
    by_file: BTreeMap<usize, Vec<Edit>>,
    later: BTreeMap<usize, Vec<Later>>,
    /// In order.
    pub changed: Vec<WeightId>,
}

/// A weight whose bytes are overwritten where they lie, when all else of the file is written: nearly all are.
pub(super) struct Later {
    pub weight: WeightId,
    pub range: Range<usize>,
}

impl Edits {
    /// Those of a file.
    pub fn take(&mut self, file: usize) -> (Vec<Edit>, Vec<Later>) {
        (self.by_file.remove(&file).unwrap_or_default(), self.later.remove(&file).unwrap_or_default())
    }
}

pub(super) fn edits(model: &Model, source: &dyn Source) -> Result<Edits> {
    let mut p = Patch { model, nodes: None, by_file: BTreeMap::new() };
    let (mut new, mut later) = (BTreeMap::new(), BTreeMap::<usize, Vec<Later>>::new());
    let (mut seen, bound) = (BTreeSet::new(), bound(model));
    let mut changed = Vec::new();
    for id in source.weights() {
        let weight = get(model, id)?;
        if !seen.insert(id) {
            return Err(Error::value(&weight.name, "is changed twice"));
        }
        let Some(stored) = source.stored(model, id)? else { continue };
        changed.push(id);
        match in_place(weight, stored.len()).filter(|_| !bound.contains(&id)) {
            Some(range) => later.entry(weight.location.file).or_default().push(Later { weight: id, range }),
            None => {
                new.insert(id, stored.bytes()?.into_owned());
            }
        }
    }
    changed.sort();
    p.splits(&mut new)?;
    p.aliases(&mut new)?;
    for (id, bytes) in new {
        p.overwrite(get(model, id)?, bytes)?;
    }
    Ok(Edits { by_file: p.by_file, later, changed })
}

/// Weights whose bytes must be compared with others' before they are written.
fn bound(model: &Model) -> BTreeSet<WeightId> {
    let splits = model.weights.iter().enumerate();
    let splits = splits.filter_map(|(i, w)| Some([WeightId(i as u32), w.split.as_ref()?.source]));
    splits.chain(overlaps(model)).flatten().collect()
}

/// Neighbours among external tensors that lie over each other.
fn overlaps(model: &Model) -> Vec<[WeightId; 2]> {
    let outside = model.weights.iter().enumerate().filter(|(_, w)| w.location.file > 0 && w.split.is_none());
    let mut ordered: Vec<(usize, &Weight)> = outside.filter(|(_, w)| !w.is_empty()).collect();
    ordered.sort_by_key(|(i, w)| (w.location.file, w.location.offset, w.location.len, *i));
    let over = |pair: &&[(usize, &Weight)]| {
        let [a, b] = [pair[0].1, pair[1].1];
        a.location.file == b.location.file && range(a).end > range(b).start
    };
    let pairs = ordered.windows(2).filter(over);
    pairs.map(|p| [p[0].0, p[1].0].map(|i| WeightId(i as u32))).collect()
}

fn range(w: &Weight) -> Range<usize> {
    w.location.offset..w.location.offset.saturating_add(w.location.len)
}

/// Where the file's bytes of a weight are its elements, one after the other.
fn in_place(weight: &Weight, bytes: usize) -> Option<Range<usize>> {
    match weight.location.encoding {
        Encoding::Scattered(_) | Encoding::Varints { .. } | Encoding::Filled { .. } => None,
        _ => Some(weight.location.offset..weight.location.offset + bytes),
    }
}

pub(super) fn get(model: &Model, id: WeightId) -> Result<&Weight> {
    let weight = model.weights.get(id.index());
    weight.ok_or_else(|| Error::Config(format!("the model has no weight {}", id.index())))
}

struct Patch<'a> {
    model: &'a Model,
    /// Found when the first node is to be edited.
    nodes: Option<Vec<wire::Field>>,
    by_file: BTreeMap<usize, Vec<Edit>>,
}

impl<'a> Patch<'a> {
    fn malformed(&self, e: wire::WireError) -> Error {
        Error::file(&self.model.path, e.to_string())
    }

    /// The field that holds node `index`.
    fn node(&mut self, index: usize, weight: &Weight) -> Result<wire::Field> {
        let nodes = match self.nodes.take() {
            Some(n) => n,
            None => wire::find_all(&self.model.files[0].bytes, &[7, 1]).map_err(|e| self.malformed(e))?,
        };
        let field = nodes.get(index).cloned();
        self.nodes = Some(nodes);
        field.ok_or_else(|| Error::value(&weight.name, format!("node {index} is not in the file")))
    }

    fn push(&mut self, file: usize, edit: Edit) {
        self.by_file.entry(file).or_default().push(edit);
    }

    /// Takes the split weights out of `new`. One that is no longer equal to its source is written as an
    /// initializer of its own; the others go on sharing the source's bytes.
    fn splits(&mut self, new: &mut BTreeMap<WeightId, Vec<u8>>) -> Result<()> {
        let model = self.model;
        for (i, weight) in model.weights.iter().enumerate() {
            let Some(split) = &weight.split else { continue };
            let own = new.remove(&WeightId(i as u32));
            if own.is_none() && !new.contains_key(&split.source) {
                continue;
            }
            let own = match own {
                Some(bytes) => bytes,
                None => weight.stored(&model.files)?.into_owned(),
            };
            let equal = match new.get(&split.source) {
                Some(bytes) => *bytes == own,
                None => *get(model, split.source)?.stored(&model.files)? == own,
            };
            if equal {
                continue;
            }
            match &split.reader {
                Reader::Identity(node) => self.replace(*node, weight, own)?,
                Reader::Operands(operands) => self.give_own(operands, weight, own)?,
            }
        }
        Ok(())
    }

    /// External tensors may lie over each other, as tied weights do: they can only change together.
    fn aliases(&mut self, new: &mut BTreeMap<WeightId, Vec<u8>>) -> Result<()> {
        let model = self.model;
        for [i, j] in overlaps(model) {
            let (a, b) = (get(model, i)?, get(model, j)?);
            match (new.get(&i), new.get(&j)) {
                (None, None) => {}
                // The first of the two is enough; a third is compared with the second.
                (Some(x), Some(y)) if range(a) == range(b) && x == y => {
                    new.remove(&i);
                }
                _ => {
                    let what = format!(
                        "lies over '{}' in {}: both must change alike",
                        b.name, model.files[a.location.file].location
                    );
                    return Err(Error::value(&a.name, what));
                }
            }
        }
        Ok(())
    }

    /// A constant in place of the node that computed it.
    fn replace(&mut self, node: usize, weight: &Weight, bytes: Vec<u8>) -> Result<()> {
        let field = self.node(node, weight)?;
        let payload = self.model.files[0].bytes.get(field.payload.clone()).unwrap_or_default();
        let node = NodeProto::decode(payload).map_err(|e| Error::value(&weight.name, e.to_string()))?;
        let bytes = constant(self.model.ir_version, node.name, weight, bytes);
        self.push(0, Edit { path: vec![7], range: field.whole, bytes });
        Ok(())
    }

    /// A constant before the first of the nodes that read it, and its name in their operands.
    fn give_own(&mut self, operands: &[(usize, usize)], weight: &Weight, bytes: Vec<u8>) -> Result<()> {
        let missing = || Error::value(&weight.name, "an operand that reads it is not in the file");
        let file = &self.model.files[0].bytes;
        for &(node, slot) in operands {
            let field = self.node(node, weight)?;
            let edit = splice::operand(file, &field, slot, &weight.name).map_err(|e| self.malformed(e))?;
            self.push(0, edit.ok_or_else(missing)?);
        }
        let first = operands.iter().map(|(node, _)| *node).min().ok_or_else(missing)?;
        let at = self.node(first, weight)?.whole.start;
        let bytes = constant(self.model.ir_version, String::new(), weight, bytes);
        self.push(0, Edit { path: vec![7], range: at..at, bytes });
        Ok(())
    }

    /// New bytes where the old ones lie.
    fn overwrite(&mut self, weight: &Weight, bytes: Vec<u8>) -> Result<()> {
        let location = &weight.location;
        match &location.encoding {
            Encoding::Scattered(chunks) => {
                scatter(self.by_file.entry(location.file).or_default(), chunks, &bytes);
            }
            Encoding::Varints { chunks } => {
                let file = &self.model.files[location.file].bytes;
                let list = self.by_file.entry(location.file).or_default();
                let done = varints(list, file, chunks, &bytes);
                done.map_err(|e| self.malformed(e))?;
            }
            Encoding::Filled { node, .. } => self.replace(*node, weight, bytes)?,
            _ => {
                if let Some(range) = in_place(weight, bytes.len()) {
                    self.push(location.file, Edit { path: Vec::new(), range, bytes });
                }
            }
        }
        Ok(())
    }
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
    halves: &[u8],
) -> std::result::Result<(), wire::WireError> {
    let mut packed = Vec::with_capacity(halves.len() * 3 / 2);
    for h in halves.chunks_exact(2) {
        wire::put_varint(&mut packed, u64::from(u16::from_le_bytes([h[0], h[1]])));
    }
    let first = chunks.first().map_or(0, |c| c.start);
    let path = tree::path_to(file, first)?;
    let (&number, around) = path.split_last().ok_or(wire::WireError { at: 0, what: "an empty path" })?;
    for (i, range) in chunks.iter().enumerate() {
        let chain = wire::enclosing(file, &path, range.start)?;
        let field = chain.last().ok_or(wire::WireError { at: range.start, what: "an empty path" })?;
        let mut bytes = Vec::new();
        if i == 0 {
            wire::put_field(&mut bytes, number, &packed);
        }
        list.push(Edit { path: around.to_vec(), range: field.whole.clone(), bytes });
    }
    Ok(())
}

/// A field of the graph that holds a weight; `name` is the node's, where a node it must be.
fn constant(ir_version: i64, name: String, weight: &Weight, bytes: Vec<u8>) -> Vec<u8> {
    let constant = Constant {
        name: weight.name.clone(),
        dtype: weight.dtype,
        dims: weight.dims.iter().map(|&d| d as i64).collect(),
        values: bytes,
        ir_version,
    };
    constant.field(name)
}
