//! Persistent memory of a session: parameters, running statistics, optimizer state, and what passes from
//! one plan to the next.

use std::ops::Range;

use serde::Serialize;

use crate::graph::StateId;
use crate::plan::aligned;
use crate::tensor::{Buffer, Meta, Tensor, View, ViewMut};

/// What a state is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Purpose {
    /// A trained tensor.
    Parameter,
    /// A running mean or variance.
    Statistic,
    /// Moments and velocities.
    Optimizer,
    /// Gradients that outlive a run, to be accumulated.
    Gradient,
    /// Lives for one step: perturbed inputs and their moments, teacher's features, step hyperparameters.
    Step,
}

#[derive(Debug)]
struct Entry {
    name: String,
    meta: Meta,
    offset: usize,
    purpose: Purpose,
}

/// Named tensors in one aligned buffer.
#[derive(Default)]
pub struct Store {
    buffer: Buffer,
    entries: Vec<Entry>,
}

impl Store {
    /// Adds a zeroed state. Existing states keep their content.
    pub fn add(&mut self, name: impl Into<String>, meta: Meta, purpose: Purpose) -> StateId {
        let offset = self.entries.last().map_or(0, |e| aligned(e.offset + e.meta.bytes()));
        self.buffer.grow(offset + meta.bytes());
        self.entries.push(Entry { name: name.into(), meta, offset, purpose });
        StateId(self.entries.len() as u32 - 1)
    }

    pub fn ids(&self) -> impl Iterator<Item = StateId> + use<> {
        (0..self.entries.len() as u32).map(StateId)
    }

    pub fn name(&self, id: StateId) -> &str {
        &self.entries[id.index()].name
    }

    pub fn meta(&self, id: StateId) -> &Meta {
        &self.entries[id.index()].meta
    }

    pub fn purpose(&self, id: StateId) -> Purpose {
        self.entries[id.index()].purpose
    }

    pub fn find(&self, name: &str) -> Option<StateId> {
        self.entries.iter().position(|e| e.name == name).map(|i| StateId(i as u32))
    }

    /// Bytes held for one purpose.
    pub fn bytes_for(&self, purpose: Purpose) -> usize {
        self.entries.iter().filter(|e| e.purpose == purpose).map(|e| aligned(e.meta.bytes())).sum()
    }

    /// Bytes held in all.
    pub fn bytes(&self) -> usize {
        self.buffer.len()
    }

    pub fn range(&self, id: StateId) -> Range<usize> {
        let e = &self.entries[id.index()];
        e.offset..e.offset + e.meta.bytes()
    }

    pub fn view(&self, id: StateId) -> View<'_> {
        let e = &self.entries[id.index()];
        View { dtype: e.meta.dtype, dims: &e.meta.dims, bytes: &self.buffer.bytes()[self.range(id)] }
    }

    pub fn view_mut(&mut self, id: StateId) -> ViewMut<'_> {
        let range = self.range(id);
        let e = &self.entries[id.index()];
        ViewMut { dtype: e.meta.dtype, dims: &e.meta.dims, bytes: &mut self.buffer.bytes_mut()[range] }
    }

    pub fn tensor(&self, id: StateId) -> Tensor {
        self.view(id).to_tensor()
    }

    /// Copies `bytes` into a state; they must be exactly as long.
    pub fn set(&mut self, id: StateId, bytes: &[u8]) {
        self.view_mut(id).bytes.copy_from_slice(bytes);
    }

    pub fn zero(&mut self, id: StateId) {
        self.view_mut(id).bytes.fill(0);
    }

    pub(super) fn raw(&mut self) -> &mut [u8] {
        self.buffer.bytes_mut()
    }
}
