//! Permutations of axes: Transpose, DepthToSpace, SpaceToDepth.

use std::sync::Arc;

use crate::error::OpError;
use crate::graph::GradBuilder;
use crate::kernels::layout::{axis_at, last, position};
use crate::kernels::strided::{Strides, dense, read};
use crate::ops::bytes::{by_size, units, units_mut};
use crate::ops::layout::rank_of;
use crate::ops::view::ReshapeTo;
use crate::ops::{ChannelsLast, Cx, Grads, Op, Row, Spec, get, need, out};
use crate::tensor::{Dims, Meta, View, ViewMut, axis};

/// ONNX `Transpose`: Y's axis `i` is X's axis `perm[i]`; without `perm` the axes are reversed.
#[derive(Debug)]
pub struct Transpose {
    pub perm: Option<Dims>,
}

impl Transpose {
    fn make(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let Some(perm) = spec.attrs.ints("perm")? else { return Ok(Arc::new(Transpose { perm: None })) };
        let mut seen = vec![false; perm.len()];
        let mut checked = Dims::new();
        for &p in &perm {
            let a = axis(p, perm.len()).map_err(|_| not_a_permutation(&perm))?;
            if std::mem::replace(&mut seen[a], true) {
                return Err(not_a_permutation(&perm));
            }
            checked.push(a);
        }
        Ok(Arc::new(Transpose { perm: Some(checked) }))
    }

    fn source(&self, i: usize, rank: usize) -> usize {
        self.perm.as_ref().map_or(rank - 1 - i, |p| p[i])
    }
}

fn not_a_permutation(perm: &[i64]) -> OpError {
    OpError::Attribute(format!("'perm' {perm:?} is not a permutation"))
}

impl Op for Transpose {
    fn name(&self) -> &'static str {
        "Transpose"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        if let Some(p) = self.perm.as_ref().filter(|p| p.len() != x.rank()) {
            return Err(OpError::Shape(format!(
                "'perm' {:?} for a tensor of rank {}",
                p.as_slice(),
                x.rank()
            )));
        }
        let dims: Dims = (0..x.rank()).map(|i| x.dims[self.source(i, x.rank())]).collect();
        Ok(vec![Meta::new(x.dtype, &dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (x, y) = (need(x, 0)?, out(y, 0)?);
        let strides = dense(x.dims);
        let rank = strides.len();
        let strides: Strides = (0..rank).map(|i| strides[self.source(i, rank)]).collect();
        by_size!(x.dtype, T => {
            read::<T>(units(x.bytes)?, 0, y.dims, &strides, units_mut(y.bytes)?);
            Ok(())
        })
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], outputs: &[Option<&Meta>]) -> Option<ChannelsLast> {
        let rank = rank_of(inputs, 0)?;
        let (x, y) = (get(inputs, 0)?, get(outputs, 0)?);
        // From and to channels last, Y's place i holds X's place:
        let place = |i: usize, from: bool, to: bool| {
            let axis = self.source(if to { axis_at(i, rank) } else { i }, rank);
            if from { position(axis, rank) } else { axis }
        };
        let perm = |from, to| (0..rank).map(|i| place(i, from, to)).collect::<Dims>();
        let view = |p: &Dims| p.iter().filter(|&&a| x.dims[axis_at(a, rank)] != 1).is_sorted();
        // Where one of both lies that way only, the permutation may come down to a view.
        if view(&perm(true, false)) {
            return Some(ChannelsLast::by(ReshapeTo { dims: y.dims.clone() }, &[true], &[false]));
        }
        let plain = |p: &Dims| p.iter().filter(|&&a| x.dims[a] != 1).is_sorted();
        if plain(&perm(false, true)) {
            return Some(ChannelsLast::by(ReshapeTo { dims: last(&y.dims) }, &[false], &[true]));
        }
        let both = self.source(0, rank) == 0 && self.source(1, rank) == 1;
        both.then(|| ChannelsLast::by(Transpose { perm: Some(perm(true, true)) }, &[true], &[true]))
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // dX = dY with the inverse permutation.
        let inverse = self.perm.as_ref().map(|p| {
            let mut inverse = p.clone();
            p.iter().enumerate().for_each(|(i, &a)| inverse[a] = i);
            inverse
        });
        let dy = g.dy0()?;
        let dx = g.emit(Transpose { perm: inverse }, &[dy])?;
        Ok(Grads::from_slice(&[Some(dx)]))
    }
}

/// ONNX `DepthToSpace`: (N, C·b², H, W) to (N, C, H·b, W·b), and its inverse `SpaceToDepth` (`mode` from opset 28).
#[derive(Debug)]
pub struct Blocks {
    block: usize,
    /// The order of the depth axis: (column, row, channel), or with `crd` (channel, row, column).
    crd: bool,
    to_space: bool,
}

impl Blocks {
    fn make(spec: &Spec, to_space: bool) -> Result<Arc<dyn Op>, OpError> {
        let block = spec.attrs.int("blocksize")?.unwrap_or(0);
        if !(1..=1 << 16).contains(&block) {
            return Err(OpError::Attribute(format!("'blocksize' is {block}")));
        }
        let mode = spec.attrs.string("mode")?.filter(|_| to_space || spec.opset >= 28);
        let crd = match mode.as_deref() {
            None | Some("DCR") => false,
            Some("CRD") => true,
            Some(other) => return Err(OpError::Attribute(format!("'mode' is '{other}'"))),
        };
        Ok(Arc::new(Blocks { block: block as usize, crd, to_space }))
    }
}

impl Op for Blocks {
    fn name(&self) -> &'static str {
        if self.to_space { "DepthToSpace" } else { "SpaceToDepth" }
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        let b = self.block;
        let &[n, c, h, w] = x.dims.as_slice() else {
            return Err(OpError::Shape(format!("rank {} where 4 is needed", x.rank())));
        };
        let fits = if self.to_space { c % (b * b) == 0 } else { h % b == 0 && w % b == 0 };
        if !fits {
            return Err(OpError::Shape(format!("blocks of {b} do not divide {:?}", x.dims.as_slice())));
        }
        let dims = match self.to_space {
            true => [n, c / (b * b), h * b, w * b],
            false => [n, c * b * b, h / b, w / b],
        };
        Ok(vec![Meta::new(x.dtype, &dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (x, y) = (need(x, 0)?, out(y, 0)?);
        let b = self.block;
        let small = if self.to_space { x.dims } else { y.dims };
        let &[n, depth, h, w] = small else {
            return Err(OpError::Internal("Blocks of another rank".into()));
        };
        let c = depth / (b * b);
        // The six axes (n, c, h, row, w, column) as they lie in the deep tensor and in the wide one.
        let deep = dense(&if self.crd { [n, c, b, b, h, w] } else { [n, b, b, c, h, w] });
        let deep = match self.crd {
            true => [deep[0], deep[1], deep[4], deep[2], deep[5], deep[3]],
            false => [deep[0], deep[3], deep[4], deep[1], deep[5], deep[2]],
        };
        let wide = dense(&[n, c, h, b, w, b]);
        by_size!(x.dtype, T => {
            let (x, y) = (units::<T>(x.bytes)?, units_mut::<T>(y.bytes)?);
            if self.to_space {
                read(x, 0, &[n, c, h, b, w, b], &deep, y);
            } else if self.crd {
                let s = [wide[0], wide[1], wide[3], wide[5], wide[2], wide[4]];
                read(x, 0, &[n, c, b, b, h, w], &s, y);
            } else {
                let s = [wide[0], wide[3], wide[5], wide[1], wide[2], wide[4]];
                read(x, 0, &[n, b, b, c, h, w], &s, y);
            }
            Ok(())
        })
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // A permutation of elements: dX is dY moved back by the inverse.
        let dy = g.dy0()?;
        let inverse = Blocks { block: self.block, crd: self.crd, to_space: !self.to_space };
        let dx = g.emit(inverse, &[dy])?;
        Ok(Grads::from_slice(&[Some(dx)]))
    }
}

pub(super) const ROWS: &[Row] = &[
    Row::new("Transpose", 1, Transpose::make),
    Row::new("DepthToSpace", 1, |s| Blocks::make(s, true)),
    Row::new("SpaceToDepth", 1, |s| Blocks::make(s, false)),
];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    vec![
        Case::new("Transpose", 13).input(&[3, 17]),
        Case::new("Transpose", 1).named("perm").ints("perm", &[2, 0, 3, 1]).input(&[2, 9, 4, 10]),
        Case::new("Transpose", 13).named("to channels last").ints("perm", &[0, 2, 3, 1]).input(&[2, 3, 4, 5]),
        Case::new("Transpose", 13).named("rows and columns").ints("perm", &[0, 1, 3, 2]).input(&[2, 3, 4, 5]),
        Case::new("Transpose", 13).named("scalar").input(&[]),
        Case::new("Transpose", 13).named("empty").input(&[2, 0, 3]),
        Case::new("DepthToSpace", 11).int("blocksize", 2).input(&[2, 12, 2, 3]),
        Case::new("SpaceToDepth", 28)
            .named("CRD")
            .int("blocksize", 2)
            .string("mode", "CRD")
            .input(&[2, 3, 4, 6]),
        Case::new("DepthToSpace", 13)
            .named("CRD")
            .int("blocksize", 2)
            .string("mode", "CRD")
            .input(&[1, 8, 2, 3]),
        Case::new("SpaceToDepth", 13).int("blocksize", 2).input(&[2, 3, 4, 6]),
    ]
}
