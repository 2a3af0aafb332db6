//! Operators that only move a constant's elements, cut it in parts, or copy it.

use std::collections::HashSet;

use super::{DEPTH, Roles};
use crate::graph::{NodeId, Source, ValueId};
use crate::ops::Attrs;
use crate::tensor::Dims;

/// How a constant reached a value.
#[derive(Clone)]
pub(super) struct Way {
    /// Its dimensions there, where they are known.
    pub dims: Option<Dims>,
    pub via: Option<(NodeId, usize)>,
    /// In parts, or as a part: through Slice, Split or Concat.
    pub cut: bool,
    /// Through Expand or Tile.
    pub spread: bool,
}

/// The dimensions after an operator that only moves elements, where they follow from its attributes.
fn moved(op: &str, attrs: &Attrs, dims: &Dims, shape: Option<Vec<i64>>) -> Option<Dims> {
    match op {
        "Identity" | "Cast" | "CastLike" | "FakeQuantize" => Some(dims.clone()),
        "Transpose" => match attrs.ints("perm").ok()? {
            None => Some(dims.iter().rev().copied().collect()),
            Some(p) => p.iter().map(|&a| dims.get(usize::try_from(a).ok()?).copied()).collect(),
        },
        "Unsqueeze" => {
            let axes = attrs.ints("axes").ok()?.or(shape)?;
            let rank = dims.len().checked_add(axes.len()).filter(|&r| r <= 64)?;
            let axes: Option<HashSet<usize>> =
                axes.iter().map(|&a| crate::tensor::axis(a, rank).ok()).collect();
            let axes = axes?;
            let mut rest = dims.iter().copied();
            (0..rank).map(|i| if axes.contains(&i) { Some(1) } else { rest.next() }).collect()
        }
        "Squeeze" => {
            let axes = attrs.ints("axes").ok()?.or(shape);
            let axes: Option<HashSet<usize>> =
                axes.map(|a| a.iter().filter_map(|&a| crate::tensor::axis(a, dims.len()).ok()).collect());
            let stays = |i: usize, d: usize| match &axes {
                Some(axes) => !axes.contains(&i),
                None => d != 1,
            };
            Some(dims.iter().enumerate().filter(|&(i, &d)| stays(i, d)).map(|(_, &d)| d).collect())
        }
        "Reshape" => {
            let shape = shape.or(attrs.ints("shape").ok()?)?;
            let total: usize = dims.iter().product();
            let mut out: Dims = Dims::new();
            for (i, &s) in shape.iter().enumerate() {
                out.push(match s {
                    0 => *dims.get(i)?,
                    -1 => 0,
                    s => usize::try_from(s).ok()?,
                });
            }
            if let Some(hole) = shape.iter().position(|&s| s == -1) {
                let rest = out.iter().enumerate().filter(|&(i, _)| i != hole);
                let known = rest.map(|(_, &d)| d).try_fold(1usize, usize::checked_mul)?;
                out[hole] = total.checked_div(known)?;
            }
            Some(out)
        }
        _ => None,
    }
}

pub(super) fn moves_only(op: &str) -> bool {
    matches!(
        op,
        "Transpose"
            | "Reshape"
            | "Unsqueeze"
            | "Squeeze"
            | "Cast"
            | "CastLike"
            | "Identity"
            | "Flatten"
            | "FakeQuantize"
    )
}

impl Roles<'_> {
    /// The way on behind `n`, where it puts out the elements of operand `slot` and no others.
    pub(super) fn onward(&self, n: NodeId, slot: usize, way: &Way) -> Option<Way> {
        let op = self.op(n);
        if op == "Concat" {
            // Of constants only, as gates of recurrent layers are put together.
            let all = self.operands(n).all(|v| self.parametric(v, DEPTH));
            return all.then(|| Way { dims: None, cut: true, ..way.clone() });
        }
        if slot != 0 {
            return None;
        }
        let dims = match op {
            "Slice" | "Split" | "SequenceAt" | "Expand" | "Tile" => None,
            _ if moves_only(op) => {
                let attrs = self.attrs.get(n.index());
                let both = way.dims.as_ref().zip(attrs);
                both.and_then(|(d, a)| moved(op, a, d, self.known_ints(n, 1)))
            }
            _ => return None,
        };
        let (cut, spread) = (matches!(op, "Slice" | "Split" | "SequenceAt"), matches!(op, "Expand" | "Tile"));
        Some(Way { dims, via: way.via, cut: way.cut || cut, spread: way.spread || spread })
    }

    /// Is `v` a constant, or parts of constants?
    pub(super) fn parametric(&self, v: ValueId, depth: usize) -> bool {
        match self.graph.value(v).source {
            Source::Weight(_) | Source::Constant(_) => true,
            Source::Node(n, _) if depth > 0 => match self.op(n) {
                "Concat" => self.operands(n).all(|v| self.parametric(v, depth - 1)),
                op if moves_only(op) || matches!(op, "Slice" | "Split" | "SequenceAt") => {
                    self.input(n, 0).is_some_and(|v| self.parametric(v, depth - 1))
                }
                _ => false,
            },
            _ => false,
        }
    }
}
