//! Persistent memory of a session: parameters, running statistics, optimizer state, and what passes from
//! one plan to the next.

use serde::Serialize;

use crate::graph::StateId;
use crate::tensor::{ALIGN, Buffer, Meta, Tensor, View, ViewMut};

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
    /// Kept of every training sample from one epoch to the next.
    Sample,
    /// Lives for one step: perturbed inputs and their moments, teacher's features, step hyperparameters.
    Step,
}

struct Entry {
    name: String,
    meta: Meta,
    purpose: Purpose,
    data: Buffer,
}

/// Named tensors, each in aligned memory of its own.
#[derive(Default)]
pub struct Store {
    entries: Vec<Entry>,
    /// States take no memory and have no content.
    dry: bool,
}

impl Store {
    /// Of states that are only counted.
    pub(super) fn dry() -> Self {
        Store { dry: true, ..Store::default() }
    }

    /// Adds a zeroed state.
    pub fn add(&mut self, name: impl Into<String>, meta: Meta, purpose: Purpose) -> StateId {
        let data = Buffer::zeroed(if self.dry { 0 } else { meta.bytes() });
        self.entries.push(Entry { name: name.into(), meta, purpose, data });
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
        let of = self.entries.iter().filter(|e| e.purpose == purpose);
        of.map(|e| e.meta.bytes().next_multiple_of(ALIGN)).sum()
    }

    /// Gives back the memory of all states of one purpose: their content is lost, and no program may run that uses them.
    pub(super) fn release(&mut self, purpose: Purpose) {
        self.entries.iter_mut().filter(|e| e.purpose == purpose).for_each(|e| e.data = Buffer::default());
    }

    pub fn view(&self, id: StateId) -> View<'_> {
        let e = &self.entries[id.index()];
        View { dtype: e.meta.dtype, dims: &e.meta.dims, bytes: &e.data.bytes()[..e.meta.bytes()] }
    }

    /// Changes a state in place, unless the store only plans.
    pub fn edit<E>(
        &mut self,
        id: StateId,
        change: impl FnOnce(&mut ViewMut) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        if self.dry { Ok(()) } else { change(&mut self.view_mut(id)) }
    }

    fn view_mut(&mut self, id: StateId) -> ViewMut<'_> {
        let e = &mut self.entries[id.index()];
        let bytes = &mut e.data.bytes_mut()[..e.meta.bytes()];
        ViewMut { dtype: e.meta.dtype, dims: &e.meta.dims, bytes }
    }

    pub fn tensor(&self, id: StateId) -> Tensor {
        self.view(id).to_tensor()
    }

    /// Copies `bytes` into a state; they must be exactly as long.
    pub fn set(&mut self, id: StateId, bytes: &[u8]) {
        if !self.dry {
            self.view_mut(id).bytes.copy_from_slice(bytes);
        }
    }

    /// Copies `range` of one state's bytes to where another's begin at `at`.
    pub fn copy_bytes(&mut self, from: StateId, range: std::ops::Range<usize>, to: StateId, at: usize) {
        if self.dry {
            return;
        }
        let source = self.take(from);
        self.view_mut(to).bytes[at..at + range.len()].copy_from_slice(&source.bytes()[range]);
        self.put(from, source);
    }

    /// Copies a state into another of the same shape.
    pub fn copy(&mut self, from: StateId, to: StateId) {
        self.copy_bytes(from, 0..self.meta(from).bytes(), to, 0);
    }

    pub fn zero(&mut self, id: StateId) {
        if !self.dry {
            self.view_mut(id).bytes.fill(0);
        }
    }

    /// Takes a state's memory out, to be written while others are read; [`Store::put`] brings it back.
    pub(super) fn take(&mut self, id: StateId) -> Buffer {
        std::mem::take(&mut self.entries[id.index()].data)
    }

    pub(super) fn put(&mut self, id: StateId, data: Buffer) {
        self.entries[id.index()].data = data;
    }
}
