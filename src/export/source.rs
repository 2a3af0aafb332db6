//! Where the new values of weights come from: one after the other, so that a file is written without a second copy of all.

use std::borrow::Cow;
use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::exec::Session;
use crate::graph::WeightId;
use crate::import::Model;
use crate::tensor::{DType, Tensor, View, cast_pieces};

/// Weights that may change, and what the file will hold of them.
pub trait Source {
    fn weights(&self) -> Vec<WeightId>;

    /// The bytes that the file will hold of one of the weights; `None`: it stays as it is. Asked for again, they are the same.
    fn stored(&self, model: &Model, id: WeightId) -> Result<Option<Cow<'_, [u8]>>>;
}

/// Values in the working type, of weights in the order in which they are given.
pub struct Given<'a>(pub &'a [(WeightId, &'a Tensor)]);

impl Source for Given<'_> {
    fn weights(&self) -> Vec<WeightId> {
        self.0.iter().map(|c| c.0).collect()
    }

    fn stored(&self, model: &Model, id: WeightId) -> Result<Option<Cow<'_, [u8]>>> {
        match self.0.iter().find(|c| c.0 == id) {
            Some((_, tensor)) => restored(model, id, tensor),
            None => Ok(None),
        }
    }
}

/// What a session has learned.
pub struct Learned<'a>(pub &'a Session);

impl Source for Learned<'_> {
    fn weights(&self) -> Vec<WeightId> {
        self.0.changing()
    }

    fn stored(&self, model: &Model, id: WeightId) -> Result<Option<Cow<'_, [u8]>>> {
        let (weight, held) = (super::patch::get(model, id)?, |state| self.0.store().view(state));
        let new = match (self.0.held_as_stored(id), self.0.widened(id)) {
            (Some(state), _) => Cow::Borrowed(held(state).bytes),
            // One copy rather than several: where half precision is held, there is little room.
            (None, Some(state)) => Cow::Owned(widened(held(state))?),
            (None, None) => return restored(model, id, &self.0.weight(id)?),
        };
        Ok((*weight.stored(&model.files)? != *new).then_some(new))
    }
}

/// As float32.
fn widened(half: View) -> Result<Vec<u8>> {
    let mut all = Vec::with_capacity(2 * half.bytes.len());
    cast_pieces(half.dtype, half.bytes, DType::F32, |piece| all.extend_from_slice(piece))
        .map_err(|e| Error::Config(e.to_string()))?;
    Ok(all)
}

/// Bytes as the file stores them.
impl Source for BTreeMap<WeightId, Vec<u8>> {
    fn weights(&self) -> Vec<WeightId> {
        self.keys().copied().collect()
    }

    fn stored(&self, _: &Model, id: WeightId) -> Result<Option<Cow<'_, [u8]>>> {
        Ok(self.get(&id).map(|bytes| Cow::Borrowed(bytes.as_slice())))
    }
}

/// The bytes that the file will hold for a value in the working type; `None`: those that it holds.
pub(crate) fn restored<'a>(model: &Model, id: WeightId, new: &Tensor) -> Result<Option<Cow<'a, [u8]>>> {
    let weight = super::patch::get(model, id)?;
    let old = weight.stored(&model.files)?;
    Ok(weight.restore(&old, new)?.map(Cow::Owned))
}
