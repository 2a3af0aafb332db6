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

    /// What the file will hold of one of the weights; `None`: it stays as it is. Asked for again, it is the same.
    fn stored(&self, model: &Model, id: WeightId) -> Result<Option<Stored<'_>>>;
}

/// The bytes that a file will hold of a weight.
#[derive(Debug)]
pub enum Stored<'a> {
    Bytes(Cow<'a, [u8]>),
    /// What is held in half precision, as float32: piece by piece, since where that is, there is little room.
    Widened(View<'a>),
}

impl<'a> Stored<'a> {
    pub fn len(&self) -> usize {
        match self {
            Stored::Bytes(bytes) => bytes.len(),
            Stored::Widened(half) => half.bytes.len() / half.dtype.size() * DType::F32.size(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Hands over the bytes in order.
    pub fn each(&self, mut put: impl FnMut(&[u8])) -> Result<()> {
        match self {
            Stored::Bytes(bytes) => put(bytes),
            Stored::Widened(half) => cast_pieces(half.dtype, half.bytes, DType::F32, put)
                .map_err(|e| Error::Config(e.to_string()))?,
        }
        Ok(())
    }

    /// Are these the bytes?
    pub fn equals(&self, bytes: &[u8]) -> Result<bool> {
        let (mut rest, mut equal) = (bytes, self.len() == bytes.len());
        self.each(|piece| {
            if equal {
                let (same, later) = rest.split_at(piece.len());
                (rest, equal) = (later, same == piece);
            }
        })?;
        Ok(equal)
    }

    pub fn bytes(self) -> Result<Cow<'a, [u8]>> {
        if let Stored::Bytes(bytes) = self {
            return Ok(bytes);
        }
        let mut all = Vec::with_capacity(self.len());
        self.each(|piece| all.extend_from_slice(piece))?;
        Ok(Cow::Owned(all))
    }
}

/// Values in the working type, of weights in the order in which they are given.
pub struct Given<'a>(pub &'a [(WeightId, &'a Tensor)]);

impl Source for Given<'_> {
    fn weights(&self) -> Vec<WeightId> {
        self.0.iter().map(|c| c.0).collect()
    }

    fn stored(&self, model: &Model, id: WeightId) -> Result<Option<Stored<'_>>> {
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

    fn stored(&self, model: &Model, id: WeightId) -> Result<Option<Stored<'_>>> {
        let (weight, held) = (super::patch::get(model, id)?, |state| self.0.store().view(state));
        let new = match (self.0.held_as_stored(id), self.0.widened(id)) {
            (Some(state), _) => Stored::Bytes(Cow::Borrowed(held(state).bytes)),
            (None, Some(state)) => Stored::Widened(held(state)),
            (None, None) => return restored(model, id, &self.0.weight(id)?),
        };
        Ok((!new.equals(&weight.stored(&model.files)?)?).then_some(new))
    }
}

/// Bytes as the file stores them.
impl Source for BTreeMap<WeightId, Vec<u8>> {
    fn weights(&self) -> Vec<WeightId> {
        self.keys().copied().collect()
    }

    fn stored(&self, _: &Model, id: WeightId) -> Result<Option<Stored<'_>>> {
        Ok(self.get(&id).map(|bytes| Stored::Bytes(Cow::Borrowed(bytes.as_slice()))))
    }
}

/// The bytes that the file will hold for a value in the working type; `None`: those that it holds.
pub(crate) fn restored<'a>(model: &Model, id: WeightId, new: &Tensor) -> Result<Option<Stored<'a>>> {
    let weight = super::patch::get(model, id)?;
    let old = weight.stored(&model.files)?;
    Ok(weight.restore(&old, new)?.map(|bytes| Stored::Bytes(Cow::Owned(bytes))))
}
