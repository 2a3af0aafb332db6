//! Writing by index: ScatterElements (and its old name Scatter), ScatterND.

use std::sync::Arc;

use crate::error::OpError;
use crate::graph::GradBuilder;
use crate::kernels::index::AlongAxis;
use crate::ops::bytes::{by_size, numeric, same_type, second_derivative, units, units_mut};
use crate::ops::gather::{GatherElements, GatherND, along, in_range, index_type, indices, tuples};
use crate::ops::{Cx, Grads, Op, Row, Spec, get, need, out};
use crate::tensor::{Meta, View, ViewMut, axis};

/// What becomes of an element that an update is written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reduction {
    Replace,
    Add,
    Mul,
    Min,
    Max,
    /// The gradient's: the element becomes 0 (there are no updates).
    Clear,
}

impl Reduction {
    fn new(spec: &Spec) -> Result<Reduction, OpError> {
        match spec.attrs.string("reduction")?.as_deref() {
            None | Some("none") => Ok(Reduction::Replace),
            Some("add") => Ok(Reduction::Add),
            Some("mul") => Ok(Reduction::Mul),
            Some("min") => Ok(Reduction::Min),
            Some("max") => Ok(Reduction::Max),
            Some(other) => Err(OpError::Attribute(format!("'reduction' is '{other}'"))),
        }
    }
}

/// How the indices address the data.
#[derive(Debug, Clone, Copy)]
enum Addressing {
    /// Of one axis, position by position.
    Elements { axis: i64 },
    /// Of the leading axes, tuple by tuple.
    Blocks,
}

/// ONNX `ScatterElements` (opset 11; `Scatter` in 9 and 10) and `ScatterND` (opset 11): data, indices, updates
/// to the data with the updates written where the indices say, in their order. `reduction` from opset 16.
#[derive(Debug)]
pub struct Scatter {
    name: &'static str,
    to: Addressing,
    reduction: Reduction,
}

impl Op for Scatter {
    fn name(&self) -> &'static str {
        self.name
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (x, index) = (need(inputs, 0)?, need(inputs, 1)?);
        index_type(index)?;
        let misfit = |what: &str, dims: &[usize]| {
            OpError::Shape(format!("{what} {dims:?} for data {:?}", x.dims.as_slice()))
        };
        let want = match self.to {
            Addressing::Elements { axis } => {
                along(x, index, axis)?;
                index.dims.clone()
            }
            Addressing::Blocks => {
                let (&depth, outer) =
                    index.dims.split_last().ok_or_else(|| misfit("indices", &index.dims))?;
                let inner = x.dims.get(depth..).ok_or_else(|| misfit("indices", &index.dims))?;
                outer.iter().chain(inner).copied().collect()
            }
        };
        if self.reduction != Reduction::Clear {
            let updates = need(inputs, 2)?;
            same_type(x.dtype, updates.dtype)?;
            if updates.dims != want {
                return Err(misfit("updates", &updates.dims));
            }
        }
        Ok(vec![Meta::new(x.dtype, &x.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let y = out(y, 0)?;
        if let Some(x) = get(x, 0) {
            y.bytes.copy_from_slice(x.bytes);
        }
        let index = need(x, 1)?;
        match self.reduction {
            Reduction::Replace => {
                let u = need(x, 2)?;
                by_size!(y.dtype, T => {
                    self.write::<T>(&index, units(u.bytes)?, y.dims, units_mut(y.bytes)?, |_, u| u)
                })
            }
            Reduction::Clear => by_size!(y.dtype, T => self.clear::<T>(&index, y)),
            reduction => {
                let u = need(x, 2)?;
                let dims = y.dims;
                numeric!(y.dtype, T => {
                    let (u, y) = (u.get::<T>()?, y.get::<T>()?);
                    match reduction {
                        Reduction::Add => self.write(&index, u, dims, y, |y, u| y + u),
                        Reduction::Mul => self.write(&index, u, dims, y, |y, u| y * u),
                        Reduction::Min => self.write(&index, u, dims, y, |y, u| if u < y { u } else { y }),
                        _ => self.write(&index, u, dims, y, |y, u| if u > y { u } else { y }),
                    }
                })
            }
        }
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // Replace: dX = dY with 0 where it was written, dU = dY read at the indices (which must not repeat,
        // as the standard has it). Add: dX = dY, dU = dY read at the indices.
        let (dy, index) = (g.dy0()?, g.x(1)?);
        let dx = match self.reduction {
            _ if !g.wants(0) => None,
            Reduction::Add => Some(dy),
            Reduction::Replace => {
                let clear = Scatter { name: "ScatterClear", to: self.to, reduction: Reduction::Clear };
                Some(g.emit(clear, &[dy, index])?)
            }
            Reduction::Clear => return second_derivative(),
            other => return Err(OpError::NotDifferentiable(format!("reduction {other:?}"))),
        };
        let du = match self.to {
            _ if !g.wants(2) => None,
            _ if !matches!(self.reduction, Reduction::Add | Reduction::Replace) => {
                return Err(OpError::NotDifferentiable(format!("reduction {:?}", self.reduction)));
            }
            Addressing::Elements { axis } => Some(g.emit(GatherElements { axis }, &[dy, index])?),
            Addressing::Blocks => Some(g.emit(GatherND { batch_dims: 0 }, &[dy, index])?),
        };
        Ok(Grads::from_slice(&[dx, None, du]))
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(0, 0)]
    }
}

impl Scatter {
    fn write<T: Copy>(
        &self,
        index: &View,
        updates: &[T],
        dims: &[usize],
        y: &mut [T],
        f: impl Fn(T, T) -> T,
    ) -> Result<(), OpError> {
        match self.to {
            Addressing::Elements { axis: a } => {
                let axis = axis(a, dims.len())?;
                let walk = AlongAxis { data: dims, dims: index.dims, axis, index: indices(index)? };
                in_range(&walk.index, dims[axis])?;
                walk.scatter(updates, y, f);
            }
            Addressing::Blocks => tuples(dims, index, 0)?.scatter(updates, y, f),
        }
        Ok(())
    }

    fn clear<T: bytemuck::Pod>(&self, index: &View, y: &mut ViewMut) -> Result<(), OpError> {
        let dims = y.dims;
        let y = units_mut::<T>(y.bytes)?;
        match self.to {
            Addressing::Elements { axis: a } => {
                let axis = axis(a, dims.len())?;
                let walk = AlongAxis { data: dims, dims: index.dims, axis, index: indices(index)? };
                in_range(&walk.index, dims[axis])?;
                walk.visit_all(|offset| y[offset] = T::zeroed());
            }
            Addressing::Blocks => {
                let tuples = tuples(dims, index, 0)?;
                (0..tuples.count).for_each(|t| y[tuples.range(t)].fill(T::zeroed()));
            }
        }
        Ok(())
    }
}

fn elements(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
    let to = Addressing::Elements { axis: spec.attrs.int_or("axis", 0)? };
    Ok(Arc::new(Scatter { name: "ScatterElements", to, reduction: Reduction::new(spec)? }))
}

fn blocks(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
    let reduction = Reduction::new(spec)?;
    Ok(Arc::new(Scatter { name: "ScatterND", to: Addressing::Blocks, reduction }))
}

pub(super) const ROWS: &[Row] = &[
    Row { domain: "", op_type: "Scatter", opsets: (9, 10), make: elements },
    Row::new("ScatterElements", 11, elements),
    Row::new("ScatterND", 11, blocks),
];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    use crate::tensor::Tensor;
    let index = |dims: &[usize], v: &[i64]| Tensor::from_slice(dims, v).unwrap();
    let elements = |reduction: &str| {
        Case::new("ScatterElements", 18).named(reduction).string("reduction", reduction).int("axis", 1)
    };
    let nd = |reduction: &str| Case::new("ScatterND", 18).named(reduction).string("reduction", reduction);
    vec![
        Case::new("Scatter", 9).input(&[3, 3]).fixed(index(&[2, 2], &[1, 0, 2, -1])).input(&[2, 2]),
        elements("none").input(&[2, 4]).fixed(index(&[2, 2], &[0, 2, 3, -3])).input(&[2, 2]),
        elements("add").input(&[2, 4]).fixed(index(&[2, 2], &[0, 0, 3, 1])).input(&[2, 2]),
        elements("mul").input(&[1, 4]).fixed(index(&[1, 2], &[0, 0])).input(&[1, 2]).forward_only(),
        nd("none").input(&[4, 2]).fixed(index(&[2, 1], &[3, 1])).input(&[2, 2]),
        nd("add").input(&[4, 2]).fixed(index(&[3, 1], &[3, 1, 3])).input(&[3, 2]),
        nd("max").input(&[4]).fixed(index(&[3, 1], &[3, 1, 3])).input(&[3]).forward_only(),
        Case::new("ScatterND", 11).input(&[2, 3]).fixed(index(&[1, 2, 2], &[0, 1, -1, 2])).input(&[1, 2]),
    ]
}
