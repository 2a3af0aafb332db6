//! Sequences of tensors whose members are known: `import` has put the tensors themselves in the place of the sequence.

use std::sync::Arc;

use crate::error::OpError;
use crate::graph::Lowering;
use crate::ops::composite::{Made, defined, one};
use crate::ops::{Attrs, Op, Spec};
use crate::tensor::{Tensor, axis};

/// The operators that `import` made of nodes on sequences; `None` for any other node.
///
/// - `SequenceAt` of `SplitToSequence` (both opset 11): X, the split (or nothing), the position; attributes of `SplitToSequence`.
/// - `SequenceLength` (opset 11) of the same: X, the split (or nothing).
/// - `ConcatFromSequence` (opset 11) along a new axis: the members; one that is missing does not count.
pub fn resolved(spec: &Spec) -> Option<Result<Arc<dyn Op>, OpError>> {
    match (spec.domain, spec.op_type, spec.inputs) {
        ("", "SequenceAt", 3) => Some(defined(spec, "SequenceAt", 1, part)),
        ("", "SequenceLength", 2) => Some(defined(spec, "SequenceLength", 1, count)),
        ("", "ConcatFromSequence", 2..) => Some(defined(spec, "ConcatFromSequence", 1, stack)),
        _ => None,
    }
}

/// The pieces of an axis of `extent`. `split`: absent (pieces of one), one number (pieces of that length, the last perhaps
/// shorter), or all lengths.
fn lengths(extent: usize, split: Option<(Vec<i64>, bool)>) -> Result<Vec<usize>, OpError> {
    let bad = |what: String| Err(OpError::Shape(what));
    match split {
        None => Ok(vec![1; extent]),
        Some((lengths, false)) => {
            let known: Option<Vec<usize>> = lengths.iter().map(|l| usize::try_from(*l).ok()).collect();
            match known {
                Some(l) if l.iter().try_fold(0usize, |n, l| n.checked_add(*l)) == Some(extent) => Ok(l),
                _ => bad(format!("split {lengths:?} of an axis of {extent}")),
            }
        }
        Some((lengths, true)) => {
            let length = lengths.first().and_then(|l| usize::try_from(*l).ok()).filter(|l| *l > 0);
            let Some(length) = length else { return bad(format!("pieces of length {lengths:?}")) };
            Ok((0..extent).step_by(length).map(|at| length.min(extent - at)).collect())
        }
    }
}

/// Where piece `position` begins, and its length.
fn piece(lengths: &[usize], position: i64) -> Result<(usize, usize), OpError> {
    let n = lengths.len() as i64;
    let at = if position < 0 { position.saturating_add(n) } else { position };
    match usize::try_from(at).ok().filter(|at| *at < lengths.len()) {
        Some(at) => Ok((lengths[..at].iter().sum(), lengths[at])),
        None => Err(OpError::Shape(format!("position {position} of a sequence of {n}"))),
    }
}

/// The axis of X that was split, and the lengths of its pieces.
fn pieces(a: &Attrs, l: &Lowering) -> Result<(usize, Vec<usize>), OpError> {
    let dims = l.dims(l.x(0)?)?;
    let at = axis(a.int_or("axis", 0)?, dims.len())?;
    let split = match l.x_opt(1) {
        Some(v) => Some((l.ints(1)?, l.dims(v)?.is_empty())),
        None => None,
    };
    Ok((at, lengths(dims[at], split)?))
}

fn count(a: &Attrs, l: &mut Lowering) -> Made {
    let (_, lengths) = pieces(a, l)?;
    Ok(vec![Some(l.constant(Tensor::scalar(lengths.len() as i64)))])
}

fn part(a: &Attrs, l: &mut Lowering) -> Made {
    let x = l.x(0)?;
    let (at, lengths) = pieces(a, l)?;
    let position = l.ints(2)?.first().copied().unwrap_or(0);
    let (start, len) = piece(&lengths, position)?;
    let y = l.crop(x, at, start, len)?;
    if l.x_opt(1).is_some() || a.flag_or("keepdims", true)? {
        return one(Ok(y));
    }
    let mut dims = l.dims(y)?;
    dims.remove(at);
    one(l.reshape(y, &dims))
}

fn stack(a: &Attrs, l: &mut Lowering) -> Made {
    let members: Vec<_> = (0..l.inputs()).filter_map(|i| l.x_opt(i)).collect();
    let Some(&first) = members.first() else { return Err(OpError::Shape("a sequence of nothing".into())) };
    let dims = l.dims(first)?;
    let at = axis(a.int_or("axis", 0)?, dims.len() + 1)?;
    let mut wide = dims.clone();
    wide.insert(at, 1);
    let mut parts = Vec::with_capacity(members.len());
    for v in members {
        if l.dims(v)? != dims {
            return Err(OpError::Shape("members of different shapes along a new axis".into()));
        }
        parts.push(l.reshape(v, &wide)?);
    }
    one(l.concat(&parts, at))
}

#[cfg(test)]
mod tests {
    use super::{lengths, piece};

    #[test]
    fn pieces_of_an_axis() {
        let at = |extent, split, position| piece(&lengths(extent, split)?, position);
        assert_eq!(at(5, None, -1).unwrap(), (4, 1));
        assert_eq!(at(5, Some((vec![2], true)), 2).unwrap(), (4, 1));
        assert_eq!(at(6, Some((vec![2], true)), -2).unwrap(), (2, 2));
        assert_eq!(at(5, Some((vec![1, 4], false)), 1).unwrap(), (1, 4));
        for (split, position) in [
            (None, 5),
            (Some((vec![2], true)), 3),
            (Some((vec![0], true)), 0),
            (Some((vec![2, 2], false)), 0),
        ] {
            assert!(at(5, split, position).is_err());
        }
    }
}
