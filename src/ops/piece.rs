//! Operators for pieces of their operands: what a large value is made of and read by, without the whole of it.

use std::sync::Arc;

use smallvec::SmallVec;

use crate::ops::Op;
use crate::tensor::Dims;

/// An operator for one of several equal pieces of its operands, see [`Op::in_pieces`].
#[derive(Debug)]
pub struct Piece {
    pub op: Arc<dyn Op>,
    /// Per input: it is cut, along its first axis, rather than read whole for every piece.
    pub cut: SmallVec<[bool; 4]>,
    pub made: Made,
}

/// What the pieces' results are of output 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Made {
    /// Pieces of it, along its first axis.
    Cut,
    /// It is their sum; `onto`: an operand, absent so far, that is added to the result and may lie in it.
    Sum { onto: Option<usize> },
}

impl Piece {
    /// Of an operator that is the same for any piece of any of its operands.
    pub fn elementwise(op: impl Op + 'static) -> Option<Piece> {
        Piece::made(op, &[true; 4], Made::Cut)
    }

    pub fn made(op: impl Op + 'static, cut: &[bool], made: Made) -> Option<Piece> {
        Some(Piece { op: Arc::new(op), cut: SmallVec::from_slice(cut), made })
    }

    /// Is input `i` cut?
    pub fn cuts(&self, i: usize) -> bool {
        self.cut.get(i) == Some(&true)
    }
}

/// The dimensions of one of `count` pieces, if the first axis can be cut so.
pub fn cut(dims: &[usize], count: usize) -> Option<Dims> {
    let mut cut = Dims::from_slice(dims);
    let first = cut.first_mut().filter(|n| n.is_multiple_of(count))?;
    *first /= count;
    Some(cut)
}
