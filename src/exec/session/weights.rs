//! The weights of a session: which can change, in whole or in part, and what they are now.

use std::sync::Arc;

use super::{Frozen, SMALL_PARAMETER, Session};
use crate::error::{Error, Result};
use crate::exec::frozen::anywhere;
use crate::exec::parts::{self, Held, Part};
use crate::exec::store::Purpose;
use crate::graph::{StateId, ValueId, WeightId};
use crate::import::Role;
use crate::kernels::half::Half;
use crate::tensor::{DType, Meta, Tensor, ViewMut, cast_pieces};

impl Session {
    /// Makes weights states, initialised from the file, so that updates can change them.
    ///
    /// Fails, before any is one, when only a part of one of them learns; and when one cannot be read.
    pub fn make_mutable(&mut self, ids: &[WeightId]) -> Result<()> {
        if let Some(id) = ids.iter().find(|id| self.part(**id).is_some()) {
            return Err(Error::value(&self.model.weight(*id).name, "only a part of it learns"));
        }
        let mut new = Vec::new();
        for id in ids {
            // (One that is named twice is a state once.)
            if self.states[id.index()].is_none() {
                new.push((*id, self.add_state(*id)));
            }
        }
        if self.options.dry {
            return Ok(());
        }
        // Memory of all of them is there before that of any is written: see [`Buffer`](crate::tensor::Buffer).
        let model = self.model.clone();
        for (i, (id, s)) in new.iter().enumerate() {
            let (weight, dtype) = (model.weight(*id), self.store.meta(*s).dtype);
            let as_stored = weight.bytes_stored(&model.files).filter(|_| weight.dtype == dtype);
            if let Some(bytes) = as_stored {
                self.store.set(*s, bytes);
                continue;
            }
            let whole = weight.bytes_stored(&model.files).filter(|_| !weight.dtype.is_narrow());
            let put = match whole {
                Some(bytes) => {
                    let cast = |state: &mut ViewMut| {
                        let mut at = 0;
                        cast_pieces(weight.dtype, bytes, dtype, |piece| {
                            state.bytes[at..at + piece.len()].copy_from_slice(piece);
                            at += piece.len();
                        })
                    };
                    self.store.edit(*s, cast).map_err(|e| Error::value(&weight.name, e.to_string()))
                }
                None => model.load_weight(*id).map(|t| self.store.set(*s, t.cast(dtype).bytes())),
            };
            if put.is_err() {
                new[i..].iter().for_each(|(id, _)| self.states[id.index()] = None);
            }
            put?;
        }
        Ok(())
    }

    fn add_state(&mut self, id: WeightId) -> StateId {
        let weight = self.model.weight(id);
        let meta = Meta::new(weight.working(), &weight.dims);
        let purpose = match weight.role {
            Role::RunningMean | Role::RunningVar => Purpose::Statistic,
            _ => Purpose::Parameter,
        };
        let large =
            purpose == Purpose::Parameter && meta.dtype == DType::F32 && meta.len() >= SMALL_PARAMETER;
        let meta = match self.options.precision.half() {
            Some(half) if large && self.options.master_free => Meta { dtype: half, ..meta },
            _ => meta,
        };
        let s = self.store.add(weight.name.clone(), meta, purpose);
        self.states[id.index()] = Some(s);
        // What was made of the value that it had.
        let value = Some(weight.value);
        self.folded.retain(|(inputs, _), _| !inputs.contains(&value));
        self.frozen.remove(&id);
        s
    }

    /// The state a weight lives in, if it can change.
    pub fn state_of(&self, id: WeightId) -> Option<StateId> {
        self.states[id.index()]
    }

    /// Lets a part of a weight learn, the rest being frozen; `seed` is of what begins at random.
    ///
    /// Fails when the weight can change already, and when it has no such part.
    pub fn make_part(&mut self, id: WeightId, part: &Part, seed: u64) -> Result<()> {
        if self.states[id.index()].is_some() || self.part(id).is_some() {
            return Err(Error::value(&self.model.weight(id).name, "learns already"));
        }
        let held = Held::new(&self.model, &mut self.store, id, part, seed)?;
        self.parts.push(held);
        Ok(())
    }

    fn part(&self, id: WeightId) -> Option<&Held> {
        self.parts.iter().find(|p| p.weight == id)
    }

    /// Does only a part of the weight learn?
    pub fn is_in_parts(&self, id: WeightId) -> bool {
        self.part(id).is_some()
    }

    /// The values that learn of a weight, in every graph of the session: itself, or its part's.
    pub fn trained_values(&self, id: WeightId) -> Vec<ValueId> {
        parts::values(&self.model, &self.parts, id)
    }

    /// How many numbers of a weight learn, if it is trained.
    pub fn trained_len(&self, id: WeightId) -> usize {
        self.part(id).map_or(self.model.weight(id).len(), |p| p.len(&self.store))
    }

    /// The present value of a weight.
    pub fn weight(&self, id: WeightId) -> Result<Tensor> {
        match (self.states[id.index()], self.part(id)) {
            (Some(s), _) => {
                let t = self.store.tensor(s);
                Ok(t.cast(t.dtype().working()))
            }
            (None, Some(part)) => self.install(|| part.whole(&self.model, &self.store)),
            (None, None) => self.model.load_weight(id),
        }
    }

    /// The weights that can change and their present values.
    pub fn changes(&self) -> Result<Vec<(WeightId, Tensor)>> {
        self.changing().into_iter().map(|w| Ok((w, self.weight(w)?))).collect()
    }

    /// The weights that can change.
    pub fn changing(&self) -> Vec<WeightId> {
        let ids = (0..self.states.len() as u32).map(WeightId);
        ids.filter(|w| self.states[w.index()].is_some() || self.is_in_parts(*w)).collect()
    }

    /// The state of a weight that is held as the file stores it.
    pub fn held_as_stored(&self, id: WeightId) -> Option<StateId> {
        let weight = self.model.weight(id);
        let same = |s: &StateId| weight.quantised.is_none() && self.store.meta(*s).dtype == weight.dtype;
        self.states[id.index()].filter(same)
    }

    /// The state of a weight that is held in half precision, where the file has float32.
    pub fn widened(&self, id: WeightId) -> Option<StateId> {
        let half = |s: &StateId| Half::of(self.store.meta(*s).dtype).is_some();
        self.states[id.index()].filter(|s| self.model.weight(id).dtype == DType::F32 && half(s))
    }

    /// A weight as a constant operand.
    pub(super) fn frozen(&mut self, id: WeightId) -> Result<Frozen> {
        if let Some(f) = self.frozen.get(&id) {
            return Ok(f.clone());
        }
        let weight = self.model.weight(id);
        let in_file = |bytes| Frozen::Mapped(self.model.files[weight.location.file].bytes.slice_ref(bytes));
        let frozen = match (weight.view(&self.model.files), anywhere(&self.model, id)) {
            (Some(view), _) => in_file(view.bytes),
            // All who read it there take it as it lies.
            (None, Some(bytes)) if self.options.arena.is_some() => Frozen::Mapped(bytes),
            _ if self.options.dry => Frozen::Owned(Arc::new(Tensor::zeros(weight.working(), &weight.dims))),
            _ => Frozen::Owned(Arc::new(weight.load(&self.model.files)?)),
        };
        self.frozen.insert(id, frozen.clone());
        Ok(frozen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exec::Options;

    /// One that is named twice is a state once, and one that learns in part leaves all of them as they were.
    #[test]
    fn all_or_none_are_made_mutable() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/models/dsnet.onnx");
        let model = Arc::new(crate::import::load(path).unwrap());
        let options = Options { threads: 1, ..Options::default() };
        let weights = model
            .weights
            .iter()
            .enumerate()
            .filter(|(_, w)| w.dims.len() == 4 && w.dims[1] > 1 && w.dims[3] == 1);
        let [a, b] = [0, 1].map(|i| WeightId(weights.clone().nth(i).unwrap().0 as u32));
        let bytes = |ids: &[WeightId]| {
            let mut session = Session::new(model.clone(), options.clone()).unwrap();
            session.make_mutable(ids).unwrap();
            session.usage().weights
        };
        assert_eq!(bytes(&[a, b, a]), bytes(&[a, b]));
        let mut session = Session::new(model.clone(), options.clone()).unwrap();
        let part = Part::LowRank { rank: 1, alpha: 1.0, input_first: false };
        session.make_part(b, &part, 0).unwrap();
        assert!(session.make_mutable(&[a, b]).is_err() && session.state_of(a).is_none());
    }
}
