//! Chains of kernel calls that run for a piece of the batch at a time, so that the large values between them are never
//! whole: a feed-forward layer's, whose hidden units are many.
//!
//! [`cut`] finds them in a graph that does not fit otherwise. A chain has a plan of its own, for one piece; what it makes
//! is put together of the pieces' results, or is their sum, as gradients of weights are (which is then rounded in another
//! order).

mod chain;

use std::sync::Arc;

use smallvec::SmallVec;

use crate::error::OpError;
use crate::exec::run::{Memory, States, call};
use crate::exec::session::Frozen;
use crate::graph::{GradBuilder, StateId};
use crate::ops::{Cx, Grads, Op};
use crate::plan::Plan;
use crate::tensor::{Meta, View, ViewMut};

pub(super) use chain::cut;

/// A chain of kernel calls, run for `count` pieces one after the other.
#[derive(Debug)]
struct Pieces {
    count: usize,
    /// Of one piece: operands are its states, first those that are read, in the order of the inputs, then the outputs.
    plan: Plan,
    constants: Vec<Frozen>,
    /// Per input and output: it is cut. An output that is not is the pieces' sum.
    cut: Vec<bool>,
    made: Vec<Output>,
    /// Inputs that are changed where they lie into an output.
    in_place: Vec<(usize, usize)>,
    multiply_adds: usize,
}

#[derive(Debug)]
struct Output {
    meta: Meta,
    cut: bool,
}

/// The operands of one piece.
struct Operands<'a> {
    read: SmallVec<[&'a [u8]; 16]>,
    written: SmallVec<[&'a mut [u8]; 8]>,
}

impl<'a> States for Operands<'a> {
    type Taken = &'a mut [u8];

    fn read(&self, id: StateId) -> &[u8] {
        match id.index().checked_sub(self.read.len()) {
            None => self.read[id.index()],
            Some(o) => self.written[o],
        }
    }

    fn take(&mut self, id: StateId) -> &'a mut [u8] {
        std::mem::take(&mut self.written[id.index() - self.read.len()])
    }

    fn put(&mut self, id: StateId, taken: &'a mut [u8]) {
        self.written[id.index() - self.read.len()] = taken;
    }
}

/// How many chains a plan has.
pub(super) fn count(plan: &Plan) -> usize {
    plan.steps.iter().filter(|s| s.op.as_a::<Pieces>().is_some()).count()
}

impl Pieces {
    /// The place of piece `i` in an operand of so many bytes.
    fn piece(&self, i: usize, bytes: usize) -> std::ops::Range<usize> {
        let one = bytes / self.count;
        i * one..(i + 1) * one
    }
}

impl Op for Pieces {
    fn name(&self) -> &'static str {
        "Pieces"
    }

    fn infer(&self, _: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        Ok(self.made.iter().map(|m| m.meta.clone()).collect())
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        for (o, (y, made)) in y.iter_mut().zip(&self.made).enumerate() {
            let y = y.as_mut().ok_or_else(|| OpError::Internal("a result of pieces has no place".into()))?;
            let input = self.in_place.iter().find(|p| p.1 == o).and_then(|p| x[p.0]);
            match input {
                // Where it lies elsewhere after all.
                Some(x) => y.bytes.copy_from_slice(x.bytes),
                None if !made.cut => y.bytes.fill(0),
                None => {}
            }
        }
        for i in 0..self.count {
            let read = x.iter().zip(&self.cut).map(|(x, cut)| match x {
                Some(x) if *cut => &x.bytes[self.piece(i, x.bytes.len())],
                Some(x) => x.bytes,
                None => &[],
            });
            let written = y.iter_mut().flatten().zip(&self.made).map(|(y, made)| match made.cut {
                true => &mut y.bytes[self.piece(i, made.meta.bytes())],
                false => &mut *y.bytes,
            });
            let mut operands = Operands { read: read.collect(), written: written.collect() };
            let mut memory = Memory {
                arena: &mut cx.scratch[..self.plan.arena_bytes],
                store: &mut operands,
                constants: &self.constants,
                seed: 0,
            };
            self.plan.steps.iter().try_for_each(|step| call(step, &mut memory))?;
        }
        Ok(())
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &self.in_place
    }

    fn scratch(&self, _: &[Option<&Meta>]) -> usize {
        self.plan.arena_bytes
    }

    fn multiply_adds(&self, _: &[Option<&Meta>]) -> usize {
        self.multiply_adds
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("chains that are run in pieces, after the gradients".into()))
    }
}

/// An operator that adds to what is there, or changes it, where the chain is given its place.
#[derive(Debug)]
struct Onto {
    op: Arc<dyn Op>,
    /// The operand that becomes the result.
    updates: [(usize, usize); 1],
}

impl Op for Onto {
    fn name(&self) -> &'static str {
        self.op.name()
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        self.op.infer(inputs)
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        self.op.forward(cx, x, y)
    }

    fn updates(&self) -> &[(usize, usize)] {
        &self.updates
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        self.op.scratch(inputs)
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        self.op.vjp(g)
    }
}

#[cfg(test)]
mod tests;
