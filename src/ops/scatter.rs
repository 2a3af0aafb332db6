//! Writing by index: ScatterElements (and its old name Scatter), ScatterND.

use std::sync::Arc;

use crate::error::OpError;
use crate::graph::{GradBuilder, ValueId};
use crate::kernels::index::{AlongAxis, each};
use crate::ops::binary::{Div, Mul};
use crate::ops::bytes::{by_size, numeric, same_type, second_derivative, units, units_mut};
use crate::ops::cast::CastTo;
use crate::ops::gather::{GatherElements, GatherND, along, in_range, index_type, indices, tuples};
use crate::ops::logic::{Logic, Where};
use crate::ops::reduce::ExpandTo;
use crate::ops::{Cx, Grads, Op, Row, Spec, get, need, out};
use crate::tensor::{Dims, Meta, View, ViewMut, axis};

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
                    self.write::<T>(&index, units(u.bytes)?, y.dims, units_mut(y.bytes)?, <[T]>::copy_from_slice)
                })
            }
            Reduction::Clear => by_size!(y.dtype, T => self.clear::<T>(&index, y)),
            reduction => {
                let u = need(x, 2)?;
                let dims = y.dims;
                numeric!(y.dtype, T => {
                    let (u, y) = (u.get::<T>()?, y.get::<T>()?);
                    let write: fn(&mut [T], &[T]) = match reduction {
                        Reduction::Add => |y, u| each(y, u, |y, u| y + u),
                        Reduction::Mul => |y, u| each(y, u, |y, u| y * u),
                        Reduction::Min => |y, u| each(y, u, |y, u| if u < y { u } else { y }),
                        _ => |y, u| each(y, u, |y, u| if u > y { u } else { y }),
                    };
                    self.write(&index, u, dims, y, write)
                })
            }
        }
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // Replace: dX = dY with 0 where it was written, dU = dY read at the indices (which must not repeat,
        // as the standard has it). Add: dX = dY, dU = dY read at the indices. Others: see below.
        let (dy, index) = (g.dy0()?, g.x(1)?);
        let mut grads = Grads::from_elem(None, 3);
        match self.reduction {
            Reduction::Clear => return second_derivative(),
            Reduction::Min | Reduction::Max => return self.extreme_grad(g, dy, index),
            Reduction::Mul => return self.product_grad(g, dy, index),
            _ => {}
        }
        if g.wants(0) {
            grads[0] = Some(match self.reduction {
                Reduction::Add => dy,
                _ => {
                    let clear = Scatter { name: "ScatterClear", to: self.to, reduction: Reduction::Clear };
                    g.emit(clear, &[dy, index])?
                }
            });
        }
        if g.wants(2) {
            grads[2] = Some(self.read(g, dy, index)?);
        }
        Ok(grads)
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(0, 0)]
    }
}

impl Scatter {
    /// `v` at the positions that the updates are written to.
    fn read(&self, g: &mut GradBuilder, v: ValueId, index: ValueId) -> Result<ValueId, OpError> {
        match self.to {
            Addressing::Elements { axis } => g.emit(GatherElements { axis }, &[v, index]),
            Addressing::Blocks => g.emit(GatherND { batch_dims: 0 }, &[v, index]),
        }
    }

    /// `data` with `updates` written in another way.
    fn emit(
        &self,
        g: &mut GradBuilder,
        reduction: Reduction,
        [data, index, updates]: [ValueId; 3],
    ) -> Result<ValueId, OpError> {
        g.emit(Scatter { name: self.name, to: self.to, reduction }, &[data, index, updates])
    }

    /// Min and max: dY to whichever of the element and its updates the result is, shared evenly among equals.
    fn extreme_grad(&self, g: &mut GradBuilder, dy: ValueId, index: ValueId) -> Result<Grads, OpError> {
        let (x, u, y) = (g.x(0)?, g.x(2)?, g.y(0)?);
        let dtype = g.meta(dy)?.dtype;
        let chosen = |g: &mut GradBuilder, a, b| {
            let equal = g.emit(Logic::Equal, &[a, b])?;
            g.emit(CastTo::new(dtype), &[equal])
        };
        let own = chosen(g, x, y)?;
        let there = self.read(g, y, index)?;
        let theirs = chosen(g, u, there)?;
        let count = self.emit(g, Reduction::Add, [own, index, theirs])?;
        let share = g.emit(Div, &[dy, count])?;
        let dx = g.emit(Mul, &[share, own])?;
        let shared = self.read(g, share, index)?;
        let du = g.emit(Mul, &[shared, theirs])?;
        Ok(Grads::from_slice(&[Some(dx), None, Some(du)]))
    }

    /// Products: dY times the product of the others, which is not 0 where the element alone is.
    fn product_grad(&self, g: &mut GradBuilder, dy: ValueId, index: ValueId) -> Result<Grads, OpError> {
        let (x, u) = (g.x(0)?, g.x(2)?);
        let (dtype, dims) = (g.meta(dy)?.dtype, g.meta(x)?.dims.clone());
        let filled = |g: &mut GradBuilder, value: f64| {
            let from = Dims::from_elem(1, dims.len());
            let one = g.scalar(value, dtype);
            g.emit(ExpandTo { from, to: dims.clone(), scale: 1.0 }, &[one])
        };
        let (zero, one) = (g.scalar(0.0, dtype), g.scalar(1.0, dtype));
        let mut grads = Grads::from_elem(None, 3);
        if g.wants(0) {
            let ones = filled(g, 1.0)?;
            let others = self.emit(g, Reduction::Mul, [ones, index, u])?;
            grads[0] = Some(g.emit(Mul, &[dy, others])?);
        }
        if g.wants(2) {
            let none = g.emit(Logic::Equal, &[u, zero])?;
            let safe = g.emit(Where, &[none, one, u])?;
            let product = self.emit(g, Reduction::Mul, [x, index, safe])?;
            let zeros = g.emit(CastTo::new(dtype), &[none])?;
            let no_zeros = filled(g, 0.0)?;
            let counts = self.emit(g, Reduction::Add, [no_zeros, index, zeros])?;
            let (product, counts) = (self.read(g, product, index)?, self.read(g, counts, index)?);
            let alone = g.emit(Logic::Equal, &[counts, zeros])?;
            let others = g.emit(Div, &[product, safe])?;
            let there = self.read(g, dy, index)?;
            let all = g.emit(Mul, &[there, others])?;
            grads[2] = Some(g.emit(Where, &[alone, all, zero])?);
        }
        Ok(grads)
    }

    /// `f` writes updates to elements that lie together.
    fn write<T>(
        &self,
        index: &View,
        updates: &[T],
        dims: &[usize],
        y: &mut [T],
        f: fn(&mut [T], &[T]),
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
        elements("mul").input(&[1, 4]).fixed(index(&[1, 2], &[0, 0])).input(&[1, 2]),
        elements("mul, zeros")
            .string("reduction", "mul")
            .input(&[1, 3])
            .fixed(index(&[1, 5], &[0, 0, 1, 1, 1]))
            .given(&[1, 5], &[0.0, 0.5, 0.0, 0.0, 2.0]),
        elements("min").input(&[2, 3]).fixed(index(&[2, 4], &[0, 0, 1, 1, 2, 2, 2, 0])).input(&[2, 4]),
        nd("mul").input(&[4, 2]).fixed(index(&[3, 1], &[3, 1, 3])).input(&[3, 2]),
        nd("none").input(&[4, 2]).fixed(index(&[2, 1], &[3, 1])).input(&[2, 2]),
        nd("add").input(&[4, 2]).fixed(index(&[3, 1], &[3, 1, 3])).input(&[3, 2]),
        nd("max").input(&[4]).fixed(index(&[3, 1], &[3, 1, 3])).input(&[3]),
        Case::new("ScatterND", 11).input(&[2, 3]).fixed(index(&[1, 2, 2], &[0, 1, -1, 2])).input(&[1, 2]),
    ]
}
