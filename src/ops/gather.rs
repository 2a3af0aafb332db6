//! Reading by index: Gather, GatherElements, GatherND, with gradients that add in a fixed order.

use std::sync::Arc;

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::{GradBuilder, Graph, NodeId, Source, ValueId};
use crate::kernels::half::Half;
use crate::kernels::index::{AlongAxis, Indices, Tuples, each, gather, gather_half, row_sums, scatter_add};
use crate::ops::bytes::{by_size, second_derivative, sized, units, units_mut};
use crate::ops::{Cx, Grads, Op, Row, Spec, need, out};
use crate::tensor::{DType, Dims, Meta, View, ViewMut, axis};

/// An index operand; int32 or int64.
pub(super) fn indices<'a>(v: &View<'a>) -> Result<Indices<'a>, OpError> {
    match v.dtype {
        DType::I32 => Ok(Indices::I32(v.get()?)),
        DType::I64 => Ok(Indices::I64(v.get()?)),
        other => Err(OpError::Type(format!("indices of type {other}"))),
    }
}

pub(super) fn index_type(m: &Meta) -> Result<(), OpError> {
    match m.dtype {
        DType::I32 | DType::I64 => Ok(()),
        other => Err(OpError::Type(format!("indices of type {other}"))),
    }
}

pub(super) fn in_range(index: &Indices, n: usize) -> Result<(), OpError> {
    match index.outside(n) {
        Some(k) => Err(OpError::Shape(format!("index {k} for an axis of {n}"))),
        None => Ok(()),
    }
}

/// ONNX `Gather`: (…, n, …) and indices of shape I along `axis` to (…, I, …).
#[derive(Debug)]
pub struct Gather {
    pub axis: i64,
}

impl Op for Gather {
    fn name(&self) -> &'static str {
        "Gather"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (x, index) = (need(inputs, 0)?, need(inputs, 1)?);
        index_type(index)?;
        let a = axis(self.axis, x.rank())?;
        let mut dims = Dims::from_slice(&x.dims[..a]);
        dims.extend_from_slice(&index.dims);
        dims.extend_from_slice(&x.dims[a + 1..]);
        Ok(vec![sized(x.dtype, &dims)?])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (x, index, y) = (need(x, 0)?, indices(&need(x, 1)?)?, out(y, 0)?);
        let a = axis(self.axis, x.dims.len())?;
        let n = x.dims[a];
        in_range(&index, n)?;
        let block: usize = x.dims[a + 1..].iter().product();
        if let (Some(half), DType::F32) = (Half::of(x.dtype), y.dtype) {
            gather_half(half, x.bytes, n, block, index, y.get()?);
            return Ok(());
        }
        if !(x.bytes.as_ptr() as usize).is_multiple_of(x.dtype.size()) {
            // A table where it lies in the file.
            gather::<u8>(x.bytes, n, block * x.dtype.size(), index, y.bytes);
            return Ok(());
        }
        by_size!(x.dtype, T => {
            gather::<T>(units(x.bytes)?, n, block, index, units_mut(y.bytes)?);
            Ok(())
        })
    }

    fn reads_anywhere(&self, input: usize) -> bool {
        input == 0
    }

    fn reads_half(&self, _: &[Option<&Meta>], input: usize) -> bool {
        input == 0
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // dX[…, index[m], …] = Σ over m of dY[…, m, …].
        let (dy, x, index) = (g.dy0()?, g.x(0)?, g.x(1)?);
        let dims = g.meta(x)?.dims.clone();
        let axis = axis(self.axis, dims.len())?;
        let dx = g.emit(GatherGrad { axis, dims }, &[dy, index])?;
        Ok(Grads::from_slice(&[Some(dx), None]))
    }
}

/// The gradient of `Gather` (an embedding's, with axis 0): (dY, indices) to zeros of `dims` plus dY's rows,
/// those of one index added in the order of the indices.
#[derive(Debug)]
pub struct GatherGrad {
    pub axis: usize,
    pub dims: Dims,
}

impl Op for GatherGrad {
    fn name(&self) -> &'static str {
        "GatherGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        Ok(vec![Meta::new(need(inputs, 0)?.dtype, &self.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (dy, index, y) = (need(x, 0)?, indices(&need(x, 1)?)?, out(y, 0)?);
        let n = self.dims[self.axis];
        in_range(&index, n)?;
        let block = self.dims[self.axis + 1..].iter().product();
        float_dispatch!(dy.dtype, T => {
            scatter_add::<T>(dy.get()?, n, block, index, y.get()?);
            Ok(())
        })
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        second_derivative()
    }
}

/// The gradient of a table of `rows`, of those rows alone that were read: (dY, indices) to sums of the shape of dY, at a
/// row's first index, zero at its others; and int32 [rows]: which index that is, or -1. What
/// [`Update`](crate::ops::update::Update) takes in place of a gradient of the table's size.
#[derive(Debug)]
pub struct RowSums {
    pub rows: usize,
}

impl RowSums {
    /// Computes the gradient `g` in this form, if it is one of a table's: the sums, and what tells where they are.
    pub fn instead(graph: &mut Graph, g: ValueId) -> Result<Option<(ValueId, ValueId)>, OpError> {
        let Source::Node(NodeId(n), 0) = graph.value(g).source else { return Ok(None) };
        let node = &graph.nodes[n as usize];
        let &[Some(dy), Some(index)] = &node.inputs[..] else { return Ok(None) };
        let Some(GatherGrad { axis: 0, dims }) = node.op.as_a() else { return Ok(None) };
        let rows = dims[0];
        // Indices are told apart by 31 bits.
        let read = graph.value(index).meta.as_ref().map_or(usize::MAX, Meta::len);
        if read >= rows.min(i32::MAX as usize) {
            return Ok(None);
        }
        let made = graph.emit("grad", Arc::new(RowSums { rows }), &[Some(dy), Some(index)], 2)?;
        Ok(Some((made[0], made[1])))
    }
}

impl Op for RowSums {
    fn name(&self) -> &'static str {
        "RowSums"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let dy = need(inputs, 0)?;
        Ok(vec![Meta::new(dy.dtype, &dy.dims), Meta::new(DType::I32, &[self.rows])])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (dy, index) = (need(x, 0)?, indices(&need(x, 1)?)?);
        in_range(&index, self.rows)?;
        let block = dy.dims.iter().product::<usize>() / index.len().max(1);
        let [Some(sums), Some(at)] = y else {
            return Err(OpError::Internal("sums of rows need two buffers".into()));
        };
        float_dispatch!(dy.dtype, T => {
            row_sums::<T>(dy.get()?, self.rows, block, index, sums.get()?, at.get()?);
            Ok(())
        })
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        second_derivative()
    }
}

/// ONNX `GatherElements` (opset 11): Y[p] = X[p with its coordinate on `axis` replaced by index[p]].
#[derive(Debug)]
pub struct GatherElements {
    pub axis: i64,
}

/// Checks the operands of an axis-wise read or write and returns the axis.
pub(super) fn along(x: &Meta, index: &Meta, a: i64) -> Result<usize, OpError> {
    index_type(index)?;
    let a = axis(a, x.rank())?;
    let fits = index.rank() == x.rank() && (0..x.rank()).all(|i| i == a || index.dims[i] <= x.dims[i]);
    if !fits {
        return Err(OpError::Shape(format!(
            "indices {:?} for data {:?} along axis {a}",
            index.dims.as_slice(),
            x.dims.as_slice()
        )));
    }
    Ok(a)
}

impl Op for GatherElements {
    fn name(&self) -> &'static str {
        "GatherElements"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (x, index) = (need(inputs, 0)?, need(inputs, 1)?);
        along(x, index, self.axis)?;
        Ok(vec![Meta::new(x.dtype, &index.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (x, i, y) = (need(x, 0)?, need(x, 1)?, out(y, 0)?);
        let index = indices(&i)?;
        let axis = axis(self.axis, x.dims.len())?;
        in_range(&index, x.dims[axis])?;
        let walk = AlongAxis { data: x.dims, dims: i.dims, axis, index };
        by_size!(x.dtype, T => {
            walk.gather::<T>(units(x.bytes)?, units_mut(y.bytes)?);
            Ok(())
        })
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // dX[where p was read] += dY[p].
        let (dy, x, index) = (g.dy0()?, g.x(0)?, g.x(1)?);
        let dims = g.meta(x)?.dims.clone();
        let axis = axis(self.axis, dims.len())?;
        let dx = g.emit(GatherElementsGrad { axis, dims }, &[dy, index])?;
        Ok(Grads::from_slice(&[Some(dx), None]))
    }
}

/// The gradient of `GatherElements`: (dY, indices) to `dims`.
#[derive(Debug)]
pub struct GatherElementsGrad {
    pub axis: usize,
    pub dims: Dims,
}

impl Op for GatherElementsGrad {
    fn name(&self) -> &'static str {
        "GatherElementsGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        Ok(vec![Meta::new(need(inputs, 0)?.dtype, &self.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (dy, i, y) = (need(x, 0)?, need(x, 1)?, out(y, 0)?);
        let index = indices(&i)?;
        in_range(&index, self.dims[self.axis])?;
        let walk = AlongAxis { data: &self.dims, dims: i.dims, axis: self.axis, index };
        y.bytes.fill(0);
        float_dispatch!(dy.dtype, T => {
            walk.scatter(dy.get::<T>()?, y.get()?, |y, u| each(y, u, |y, u| y + u));
            Ok(())
        })
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        second_derivative()
    }
}

/// ONNX `GatherND` (opset 11; `batch_dims` from 12): indices (…, k) address blocks of X by their first k axes
/// after the batch's.
#[derive(Debug)]
pub struct GatherND {
    pub batch_dims: usize,
}

/// The geometry of tuples of indices over X: batch, addressed axes and block.
pub(super) fn tuples<'a>(x: &'a [usize], i: &View<'a>, batch_dims: usize) -> Result<Tuples<'a>, OpError> {
    let depth = *i.dims.last().ok_or_else(|| OpError::Internal("indices without axes".into()))?;
    let tuples = Tuples {
        data: &x[batch_dims..batch_dims + depth],
        batch: x[..batch_dims].iter().product(),
        block: x[batch_dims + depth..].iter().product(),
        index: indices(i)?,
        count: i.dims[..i.dims.len() - 1].iter().product(),
    };
    match tuples.outside() {
        Some(k) => Err(OpError::Shape(format!("index {k} for axes {:?}", tuples.data))),
        None => Ok(tuples),
    }
}

impl GatherND {
    fn make(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let b = spec.attrs.int_or("batch_dims", 0)?;
        let batch_dims =
            usize::try_from(b).map_err(|_| OpError::Attribute(format!("'batch_dims' is {b}")))?;
        Ok(Arc::new(GatherND { batch_dims }))
    }
}

impl Op for GatherND {
    fn name(&self) -> &'static str {
        "GatherND"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (x, index) = (need(inputs, 0)?, need(inputs, 1)?);
        index_type(index)?;
        let b = self.batch_dims;
        let misfit = || {
            OpError::Shape(format!(
                "indices {:?} for data {:?} with {b} batch dimensions",
                index.dims.as_slice(),
                x.dims.as_slice()
            ))
        };
        let (&depth, outer) = index.dims.split_last().ok_or_else(misfit)?;
        if b > outer.len() || b + depth > x.rank() || x.dims[..b] != outer[..b] {
            return Err(misfit());
        }
        let mut dims = Dims::from_slice(outer);
        dims.extend_from_slice(&x.dims[b + depth..]);
        Ok(vec![sized(x.dtype, &dims)?])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (x, i, y) = (need(x, 0)?, need(x, 1)?, out(y, 0)?);
        let tuples = tuples(x.dims, &i, self.batch_dims)?;
        by_size!(x.dtype, T => {
            tuples.gather::<T>(units(x.bytes)?, units_mut(y.bytes)?);
            Ok(())
        })
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // dX[the block a tuple addresses] += the tuple's block of dY.
        let (dy, x, index) = (g.dy0()?, g.x(0)?, g.x(1)?);
        let dims = g.meta(x)?.dims.clone();
        let dx = g.emit(GatherNDGrad { batch_dims: self.batch_dims, dims }, &[dy, index])?;
        Ok(Grads::from_slice(&[Some(dx), None]))
    }
}

/// The gradient of `GatherND`: (dY, indices) to `dims`.
#[derive(Debug)]
pub struct GatherNDGrad {
    batch_dims: usize,
    dims: Dims,
}

impl Op for GatherNDGrad {
    fn name(&self) -> &'static str {
        "GatherNDGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        Ok(vec![Meta::new(need(inputs, 0)?.dtype, &self.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (dy, i, y) = (need(x, 0)?, need(x, 1)?, out(y, 0)?);
        let tuples = tuples(&self.dims, &i, self.batch_dims)?;
        y.bytes.fill(0);
        float_dispatch!(dy.dtype, T => {
            tuples.scatter(dy.get::<T>()?, y.get()?, |y, u| each(y, u, |y, u| y + u));
            Ok(())
        })
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        second_derivative()
    }
}

pub(super) const ROWS: &[Row] = &[
    Row::new("Gather", 1, |s| Ok(Arc::new(Gather { axis: s.attrs.int_or("axis", 0)? }))),
    Row::new("GatherElements", 11, |s| Ok(Arc::new(GatherElements { axis: s.attrs.int_or("axis", 0)? }))),
    Row::new("GatherND", 11, GatherND::make),
];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    use crate::tensor::Tensor;
    let index = |dims: &[usize], v: &[i64]| Tensor::from_slice(dims, v).unwrap();
    vec![
        Case::new("Gather", 13).input(&[5, 3]).fixed(index(&[2, 2], &[1, -1, 1, 0])),
        Case::new("Gather", 1)
            .named("axis 1, int32")
            .int("axis", 1)
            .input(&[2, 4, 3])
            .fixed(Tensor::from_slice(&[3], &[3i32, 0, -4]).unwrap()),
        Case::new("Gather", 13).named("scalar").int("axis", -1).input(&[2, 4]).fixed(Tensor::scalar(2i64)),
        Case::new("Gather", 13).named("none").input(&[2, 4]).fixed(index(&[0], &[])),
        Case::new("GatherElements", 11).int("axis", 1).input(&[2, 3]).fixed(index(&[2, 2], &[0, 0, 2, -3])),
        Case::new("GatherElements", 13).named("smaller").input(&[3, 3]).fixed(index(&[2, 2], &[2, 0, 2, -2])),
        Case::new("GatherND", 12).input(&[2, 3, 2]).fixed(index(&[3, 2], &[0, 1, 1, -1, 0, 1])),
        Case::new("GatherND", 13)
            .named("batch")
            .int("batch_dims", 1)
            .input(&[2, 3, 2])
            .fixed(index(&[2, 2, 1], &[0, 2, 1, 1])),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::eval;
    use crate::tensor::Tensor;

    #[test]
    fn an_index_out_of_range_is_an_error() {
        let x = Tensor::from_slice(&[2], &[1f32, 2.0]).unwrap();
        for k in [2, -3, i64::MIN, i64::MAX] {
            assert!(eval(&Gather { axis: 0 }, &[Some(&x), Some(&Tensor::ints(&[k]))]).is_err());
            assert!(eval(&GatherElements { axis: 0 }, &[Some(&x), Some(&Tensor::ints(&[k]))]).is_err());
            assert!(eval(&GatherND { batch_dims: 0 }, &[Some(&x), Some(&Tensor::ints(&[k]))]).is_err());
        }
    }

    #[test]
    fn half_precision_is_widened_as_it_is_read() {
        for (dims, axis) in [([7, 300], 0), ([3, 5], 1)] {
            let x: Vec<f32> = (0..dims[0] * dims[1]).map(|i| (i as f32 * 0.37).sin()).collect();
            let (op, index) = (Gather { axis }, Tensor::ints(&[2, 0, -1, 2]));
            for dtype in [DType::BF16, DType::F16] {
                let half = Tensor::from_slice(&dims, &x).unwrap().cast(dtype);
                let wide = half.cast(DType::F32);
                let expected = eval(&op, &[Some(&wide), Some(&index)]).unwrap().remove(0);
                let mut y = Tensor::zeros(DType::F32, expected.dims());
                let read = [Some(half.view()), Some(index.view())];
                let cx = &mut Cx { scratch: &mut [], seed: 0 };
                op.forward(cx, &read, &mut [Some(y.view_mut())]).unwrap();
                assert!(y.bytes() == expected.bytes());
            }
        }
    }

    #[test]
    fn embedding_gradients_do_not_depend_on_threads() {
        let (n, d, m) = (700, 300, 4000);
        let dy: Vec<f32> = (0..m * d).map(|i| ((i * 7919) % 1013) as f32 * 1e-3 - 0.4).collect();
        let dy = Tensor::from_slice(&[m, d], &dy).unwrap();
        let index: Vec<i64> = (0..m as i64).map(|i| (i * i * 31) % n as i64).collect();
        let index = Tensor::ints(&index);
        let op = GatherGrad { axis: 0, dims: Dims::from_slice(&[n, d]) };
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| eval(&op, &[Some(&dy), Some(&index)]).unwrap()[0].bytes().to_vec())
        };
        let one = run(1);
        assert!(one == run(2) && one == run(4));
    }
}
