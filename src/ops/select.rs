//! Parts chosen by a mask or turned around by length: Compress, ReverseSequence.

use std::sync::Arc;

use crate::error::OpError;
use crate::graph::GradBuilder;
use crate::kernels::par::{GRAIN, rows};
use crate::ops::bytes::{by_size, second_derivative, units, units_mut};
use crate::ops::gather::{index_type, indices};
use crate::ops::{Cx, Grads, Op, Row, Spec, need, out};
use crate::tensor::{DType, Dims, Meta, View, ViewMut, axis};

/// ONNX `Compress` (opset 9): the slices of X along `axis` where the condition (bool, known at plan time) holds;
/// without `axis` the elements of X as one row.
#[derive(Debug)]
pub struct Compress {
    axis: Option<i64>,
}

/// (outer, n, block) of X as Compress sees it.
fn geometry(dims: &[usize], a: Option<i64>) -> Result<(usize, usize, usize), OpError> {
    let Some(a) = a else { return Ok((1, dims.iter().product(), 1)) };
    let a = axis(a, dims.len())?;
    Ok((dims[..a].iter().product(), dims[a], dims[a + 1..].iter().product()))
}

/// The chosen positions, in order.
fn chosen(mask: &[u8], n: usize) -> impl Iterator<Item = usize> + '_ {
    mask.iter().take(n).enumerate().filter(|(_, m)| **m != 0).map(|(i, _)| i)
}

impl Op for Compress {
    fn name(&self) -> &'static str {
        "Compress"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (x, mask) = (need(inputs, 0)?, need(inputs, 1)?);
        if mask.dtype != DType::Bool || mask.rank() != 1 {
            return Err(OpError::Type(format!("a condition of {} {:?}", mask.dtype, mask.dims.as_slice())));
        }
        let (_, n, _) = geometry(&x.dims, self.axis)?;
        if mask.len() > n {
            return Err(OpError::Shape(format!("a condition of {} for {n} positions", mask.len())));
        }
        let mask = mask.value.as_ref().ok_or(OpError::NeedsValue(1))?;
        let count = chosen(mask.get::<u8>()?, n).count();
        let mut dims = x.dims.clone();
        match self.axis {
            Some(a) => dims[axis(a, x.rank())?] = count,
            None => dims = Dims::from_slice(&[count]),
        }
        Ok(vec![Meta::new(x.dtype, &dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (x, mask, y) = (need(x, 0)?, need(x, 1)?.get::<u8>()?, out(y, 0)?);
        let (outer, n, block) = geometry(x.dims, self.axis)?;
        let block = block * x.dtype.size();
        let targets = y.bytes.chunks_exact_mut(block.max(1));
        let sources = (0..outer).flat_map(|o| chosen(mask, n).map(move |i| (o * n + i) * block));
        for (to, from) in targets.zip(sources) {
            to.copy_from_slice(&x.bytes[from..from + block]);
        }
        Ok(())
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // dX = dY's slices where they came from, 0 elsewhere.
        let (dy, x, mask) = (g.dy0()?, g.x(0)?, g.x(1)?);
        let dims = g.meta(x)?.dims.clone();
        let dx = g.emit(CompressGrad { axis: self.axis, dims }, &[dy, mask])?;
        Ok(Grads::from_slice(&[Some(dx), None]))
    }
}

/// The gradient of `Compress`: (dY, condition) to `dims`.
#[derive(Debug)]
pub struct CompressGrad {
    axis: Option<i64>,
    dims: Dims,
}

impl Op for CompressGrad {
    fn name(&self) -> &'static str {
        "CompressGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        Ok(vec![Meta::new(need(inputs, 0)?.dtype, &self.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (dy, mask, dx) = (need(x, 0)?, need(x, 1)?.get::<u8>()?, out(y, 0)?);
        let (outer, n, block) = geometry(&self.dims, self.axis)?;
        let block = block * dy.dtype.size();
        dx.bytes.fill(0);
        let sources = dy.bytes.chunks_exact(block.max(1));
        let targets = (0..outer).flat_map(|o| chosen(mask, n).map(move |i| (o * n + i) * block));
        for (from, to) in sources.zip(targets) {
            dx.bytes[to..to + block].copy_from_slice(from);
        }
        Ok(())
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        second_derivative()
    }
}

/// ONNX `ReverseSequence` (opset 10): the first `sequence_lens[b]` steps of each sequence in reverse, the
/// others as they are. Time and batch are axes 0 and 1, in either order.
#[derive(Debug, Clone, Copy)]
pub struct ReverseSequence {
    time_first: bool,
}

impl ReverseSequence {
    fn make(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let (time, batch) = (spec.attrs.int_or("time_axis", 0)?, spec.attrs.int_or("batch_axis", 1)?);
        let time_first = match (time, batch) {
            (0, 1) => true,
            (1, 0) => false,
            _ => {
                return Err(OpError::Attribute(format!("'time_axis' {time} with 'batch_axis' {batch}")));
            }
        };
        Ok(Arc::new(ReverseSequence { time_first }))
    }
}

impl Op for ReverseSequence {
    fn name(&self) -> &'static str {
        "ReverseSequence"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (x, lens) = (need(inputs, 0)?, need(inputs, 1)?);
        index_type(lens)?;
        let batch = x.dims.get(self.time_first as usize).filter(|_| x.rank() >= 2);
        if lens.rank() != 1 || batch != lens.dims.first() {
            return Err(OpError::Shape(format!(
                "lengths {:?} for data {:?}",
                lens.dims.as_slice(),
                x.dims.as_slice()
            )));
        }
        Ok(vec![Meta::new(x.dtype, &x.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (x, lens, y) = (need(x, 0)?, indices(&need(x, 1)?)?, out(y, 0)?);
        let block: usize = x.dims[2..].iter().product();
        let (outer, inner) = (x.dims[0], x.dims[1]);
        let steps = if self.time_first { outer } else { inner };
        if let Some(len) = (0..lens.len()).map(|i| lens.get(i)).find(|l| !(0..=steps as i64).contains(l)) {
            return Err(OpError::Shape(format!("a length of {len} for {steps} steps")));
        }
        by_size!(x.dtype, T => {
            let source = units::<T>(x.bytes)?;
            rows(units_mut::<T>(y.bytes)?, block, GRAIN, |first, piece| {
                for (r, y) in piece.chunks_exact_mut(block.max(1)).enumerate() {
                    let (i, j) = ((first + r) / inner, (first + r) % inner);
                    let (t, b) = if self.time_first { (i, j) } else { (j, i) };
                    let len = lens.get(b) as usize;
                    let t = if t < len { len - 1 - t } else { t };
                    let (i, j) = if self.time_first { (t, b) } else { (b, t) };
                    y.copy_from_slice(&source[(i * inner + j) * block..][..block]);
                }
            });
            Ok(())
        })
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // Its own inverse, and a permutation of elements: dX = the same of dY.
        let (dy, lens) = (g.dy0()?, g.x(1)?);
        let dx = g.emit(*self, &[dy, lens])?;
        Ok(Grads::from_slice(&[Some(dx), None]))
    }
}

pub(super) const ROWS: &[Row] = &[
    Row::new("Compress", 9, |s| Ok(Arc::new(Compress { axis: s.attrs.int("axis")? }))),
    Row::new("ReverseSequence", 10, ReverseSequence::make),
];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    use crate::tensor::Tensor;
    let mask = |v: &[i64]| Tensor::ints(v).cast(DType::Bool);
    vec![
        Case::new("Compress", 9).int("axis", 1).input(&[2, 3, 2]).fixed(mask(&[1, 0, 1])),
        Case::new("Compress", 11).named("flat").input(&[2, 3]).fixed(mask(&[0, 1, 1, 0, 1])),
        Case::new("Compress", 11).named("none").int("axis", -1).input(&[2, 3]).fixed(mask(&[0])),
        Case::new("ReverseSequence", 10).input(&[4, 2, 3]).fixed(Tensor::ints(&[3, 4])),
        Case::new("ReverseSequence", 10)
            .named("batch first")
            .int("time_axis", 1)
            .int("batch_axis", 0)
            .input(&[3, 4])
            .fixed(Tensor::ints(&[0, 1, 2])),
    ]
}
