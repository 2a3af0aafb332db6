//! What an operator tells the layout pass: its form for operands whose channel axis lies last.

use std::sync::Arc;

use smallvec::SmallVec;

use crate::kernels::layout::{axis_at, last, position};
use crate::ops::Op;
use crate::tensor::{Dims, Meta};

/// One flag an operand; those beyond the end are `false`.
pub type Flags = SmallVec<[bool; 6]>;

/// An operator's form for tensors whose axis 1 lies last.
#[derive(Debug, Clone)]
pub struct ChannelsLast {
    /// `None`: the operator itself.
    pub op: Option<Arc<dyn Op>>,
    /// It takes only so many inputs: it knows what the others say.
    pub takes: usize,
    /// The inputs to be given that way. One of fewer dimensions than the others is first extended by leading
    /// dimensions of 1: it broadcasts.
    pub inputs: Flags,
    /// The outputs that come that way, perhaps with additional leading dimensions of 1.
    pub outputs: Flags,
    /// This form is the faster one, so much that operands are rather converted.
    pub wanted: bool,
}

/// May a tensor of this many dimensions lie with its channels last?
pub fn movable(rank: usize) -> bool {
    (3..=5).contains(&rank)
}

impl ChannelsLast {
    /// Another operator computes it, of inputs and to outputs that have their channels last as told.
    pub fn by(op: impl Op + 'static, inputs: &[bool], outputs: &[bool]) -> Self {
        ChannelsLast { op: Some(Arc::new(op)), ..ChannelsLast::same(inputs, outputs) }
    }

    /// The operator itself computes it.
    pub fn same(inputs: &[bool], outputs: &[bool]) -> Self {
        let (inputs, outputs) = (Flags::from_slice(inputs), Flags::from_slice(outputs));
        ChannelsLast { op: None, takes: usize::MAX, inputs, outputs, wanted: false }
    }

    pub fn taking(self, takes: usize) -> Self {
        ChannelsLast { takes, ..self }
    }

    pub fn wanted(self) -> Self {
        ChannelsLast { wanted: true, ..self }
    }

    /// Of an operator that computes all outputs element by element, of operands that broadcast to them.
    pub fn elementwise(inputs: &[Option<&Meta>], outputs: &[Option<&Meta>]) -> Option<Self> {
        let rank = outputs.iter().flatten().next()?.rank();
        movable(rank).then(|| ChannelsLast {
            op: None,
            takes: usize::MAX,
            inputs: inputs.iter().map(|x| x.is_some_and(|x| x.len() != 1)).collect(),
            outputs: outputs.iter().map(Option::is_some).collect(),
            wanted: false,
        })
    }
}

/// The rank of input `i` if it may lie with its channels last.
pub fn rank_of(operands: &[Option<&Meta>], i: usize) -> Option<usize> {
    operands.get(i).copied().flatten().map(Meta::rank).filter(|&r| movable(r))
}

/// One entry an axis, in the order of axes whose channels lie last.
pub fn reordered<T: Copy, C: FromIterator<T>>(per_axis: &[T]) -> C {
    let rank = per_axis.len();
    (0..rank).map(|i| per_axis[axis_at(i, rank)]).collect()
}

/// Moving axis 1 of such a tensor to the end changes nothing in memory.
pub fn free(dims: &[usize]) -> bool {
    !movable(dims.len()) || dims[1] == 1 || dims[2..].iter().product::<usize>() == 1
}

/// With leading dimensions of 1, `rank` in all.
pub fn extended(dims: &[usize], rank: usize) -> Dims {
    let mut full = Dims::from_elem(1, rank.saturating_sub(dims.len()));
    full.extend_from_slice(dims);
    full
}

/// How an operand of dimensions `dims` is given that a kernel reads under those of `seen`, which have as many
/// elements: (with its channels last?, what `seen` becomes). `None`: neither way is right.
pub fn seen_as(operand: &Meta, seen: &[usize]) -> Option<(bool, Dims)> {
    let same = operand.dims.as_slice() == seen;
    (same || free(seen)).then(|| (same, last(seen)))
}

/// Where an axis (perhaps counted from the end) of a tensor of `rank` dimensions lies with channels last.
pub fn moved_axis(axis: i64, rank: usize) -> Option<i64> {
    crate::tensor::axis(axis, rank).ok().map(|a| position(a, rank) as i64)
}
