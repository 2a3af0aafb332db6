//! Concat and Split along one axis.

use std::sync::Arc;

use crate::error::OpError;
use crate::graph::GradBuilder;
use crate::kernels::layout::{last, position};
use crate::kernels::par::{GRAIN, pieces, rows};
use crate::kernels::strided::{Extents, read};
use crate::ops::bytes::{same_type, sized};
use crate::ops::layout::{moved_axis, rank_of};
use crate::ops::slice::{Crop, Cut};
use crate::ops::{ChannelsLast, Cx, Grads, Op, Row, Spec, get, need, out};
use crate::tensor::{Dims, Meta, View, ViewMut, axis};

/// ONNX `Concat` (opset 4 on): one or more tensors that differ along `axis` only.
#[derive(Debug)]
pub struct Concat {
    pub axis: i64,
}

impl Op for Concat {
    fn name(&self) -> &'static str {
        "Concat"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let first = need(inputs, 0)?;
        let a = axis(self.axis, first.rank())?;
        let mut dims = first.dims.clone();
        dims[a] = 0;
        for i in 0..inputs.len() {
            let x = need(inputs, i)?;
            same_type(first.dtype, x.dtype)?;
            let fits =
                x.rank() == first.rank() && (0..x.rank()).all(|i| i == a || x.dims[i] == first.dims[i]);
            if !fits {
                return Err(OpError::Shape(format!(
                    "{:?} and {:?} do not concatenate along axis {a}",
                    first.dims.as_slice(),
                    x.dims.as_slice()
                )));
            }
            dims[a] += x.dims[a];
        }
        Ok(vec![sized(first.dtype, &dims)?])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let y = out(y, 0)?;
        let a = axis(self.axis, y.dims.len())?;
        let inner = y.dims[a + 1..].iter().product::<usize>() * y.dtype.size();
        if y.is_empty() {
            return Ok(());
        }
        if y.dims[..a].iter().all(|&d| d == 1) {
            let mut rest = &mut *y.bytes;
            for x in x.iter().flatten() {
                let (part, tail) = rest.split_at_mut(x.bytes.len());
                pieces(part, |start, part| part.copy_from_slice(&x.bytes[start..start + part.len()]));
                rest = tail;
            }
            return Ok(());
        }
        let row = y.dims[a] * inner;
        rows(y.bytes, row, GRAIN * 4, |first, piece| {
            for (r, mut rest) in piece.chunks_exact_mut(row).enumerate() {
                for x in x.iter().flatten() {
                    let n = x.dims[a] * inner;
                    let (part, tail) = rest.split_at_mut(n);
                    part.copy_from_slice(&x.bytes[(first + r) * n..][..n]);
                    rest = tail;
                }
            }
        });
        Ok(())
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        let op = Concat { axis: moved_axis(self.axis, rank_of(inputs, 0)?)? };
        Some(ChannelsLast::by(op, &vec![true; inputs.len()], &[true]))
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // dXᵢ is the part of dY where Xᵢ went.
        let dy = g.dy0()?;
        let whole = g.meta(dy)?.dims.clone();
        let a = axis(self.axis, whole.len())?;
        let mut grads = Grads::new();
        let mut at = 0;
        for i in 0..g.inputs() {
            let dims = g.meta(g.x(i)?)?.dims.clone();
            let n = dims[a];
            let dx = match (g.wants(i), dims == whole) {
                (false, _) => None,
                (true, true) => Some(dy),
                (true, false) => {
                    let mut start = Extents::from_elem(0, dims.len());
                    start[a] = at;
                    Some(g.emit(Crop { cut: Cut::dense(start, dims) }, &[dy])?)
                }
            };
            grads.push(dx);
            at += n;
        }
        Ok(grads)
    }
}

/// ONNX `Split` (opset 2 on): sizes as an attribute before opset 13, an input after, or equal parts
/// (`num_outputs`, opset 18 on: the last one may be smaller).
#[derive(Debug)]
pub struct Split {
    axis: i64,
    sizes: Option<Vec<i64>>,
    outputs: usize,
    sizes_from_input: bool,
    uneven: bool,
}

impl Split {
    fn make(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let a = spec.attrs;
        let count = a.int("num_outputs")?.filter(|_| spec.opset >= 18);
        let outputs = match count {
            None => spec.outputs,
            Some(n) => usize::try_from(n)
                .ok()
                .filter(|n| (1..=1 << 20).contains(n))
                .ok_or_else(|| OpError::Attribute(format!("'num_outputs' is {n}")))?,
        };
        Ok(Arc::new(Split {
            axis: a.int_or("axis", 0)?,
            sizes: if spec.opset < 13 { a.ints("split")? } else { None },
            outputs,
            sizes_from_input: spec.opset >= 13,
            uneven: count.is_some(),
        }))
    }

    /// Into its `n` places along an axis of as many.
    pub fn apart(axis: usize, n: usize) -> Self {
        Split { axis: axis as i64, sizes: None, outputs: n, sizes_from_input: false, uneven: false }
    }

    /// The axis and the parts' sizes along it.
    fn parts(&self, inputs: &[Option<&Meta>]) -> Result<(usize, Extents), OpError> {
        let x = need(inputs, 0)?;
        let a = axis(self.axis, x.rank())?;
        let n = x.dims[a];
        let given = match get(inputs, 1).filter(|_| self.sizes_from_input) {
            Some(m) => Some(m.ints(1)?),
            None => self.sizes.clone(),
        };
        let sizes: Extents = match given {
            Some(sizes) => sizes
                .iter()
                .map(|&s| usize::try_from(s).map_err(|_| OpError::Shape(format!("sizes {sizes:?} in Split"))))
                .collect::<Result<_, _>>()?,
            None => {
                let k = self.outputs.max(1);
                if n % k != 0 && !self.uneven {
                    return Err(OpError::Shape(format!("{n} does not split into {k} equal parts")));
                }
                let part = n.div_ceil(k);
                (0..k).map(|i| part.min(n.saturating_sub(i * part))).collect()
            }
        };
        if sizes.iter().try_fold(0usize, |n, &s| n.checked_add(s)) != Some(n) || sizes.len() < self.outputs {
            return Err(OpError::Shape(format!("{n} does not split into {:?}", sizes.as_slice())));
        }
        Ok((a, sizes))
    }
}

impl Op for Split {
    fn name(&self) -> &'static str {
        "Split"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (a, sizes) = self.parts(inputs)?;
        let x = need(inputs, 0)?;
        let part = |&n: &usize| {
            let mut dims = x.dims.clone();
            dims[a] = n;
            Meta::new(x.dtype, &dims)
        };
        Ok(sizes.iter().map(part).collect())
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let sizes: Option<crate::ops::bytes::Ints> = match get(x, 1).filter(|_| self.sizes_from_input) {
            Some(v) => Some(crate::ops::bytes::ints(&v)?),
            None => self.sizes.as_deref().map(crate::ops::bytes::Ints::from_slice),
        };
        let x = need(x, 0)?;
        let a = axis(self.axis, x.dims.len())?;
        let outer: usize = x.dims[..a].iter().product();
        let inner = x.dims[a + 1..].iter().product::<usize>() * x.dtype.size();
        let equal = x.dims[a].div_ceil(self.outputs.max(1));
        let mut at = 0;
        for (i, y) in y.iter_mut().enumerate() {
            // Where this part begins follows from the sizes alone: earlier parts may be absent.
            let start = match &sizes {
                Some(_) => at,
                None => (i * equal).min(x.dims[a]),
            };
            if let Some(s) = &sizes {
                at += s.get(i).map_or(0, |&s| s as usize);
            }
            let Some(y) = y else { continue };
            let n = y.dims[a] * inner;
            read(x.bytes, start * inner, &[outer, n], &[(x.dims[a] * inner) as isize, 1], y.bytes);
        }
        Ok(())
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], outputs: &[Option<&Meta>]) -> Option<ChannelsLast> {
        let rank = rank_of(inputs, 0)?;
        let (a, sizes) = self.parts(inputs).ok()?;
        let op = Split {
            axis: position(a, rank) as i64,
            sizes: Some(sizes.iter().map(|&s| s as i64).collect()),
            sizes_from_input: false,
            ..*self
        };
        Some(ChannelsLast::by(op, &[true], &vec![true; outputs.len()]).taking(1))
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // dX = the parts' gradients side by side, zero where a part has none.
        let x = g.meta(g.x(0)?)?.clone();
        let shape = g.x_opt(1).map(|v| g.meta(v).cloned()).transpose()?;
        let (a, sizes) = self.parts(&[Some(&x), shape.as_ref()])?;
        let parts: Vec<_> = (0..sizes.len()).map(|i| g.dy(i)).collect();
        let dx = if parts.iter().all(Option::is_some) {
            g.emit_all(Concat { axis: a as i64 }, &parts, 1)?
        } else {
            g.emit_all(SplitGrad { axis: a, sizes, dims: x.dims }, &parts, 1)?
        };
        Ok(Grads::from_slice(&[Some(dx[0])]))
    }
}

/// The gradient of `Split` where some parts have none: the others side by side, zeros between.
#[derive(Debug)]
pub struct SplitGrad {
    pub axis: usize,
    pub sizes: Extents,
    pub dims: Dims,
}

impl Op for SplitGrad {
    fn name(&self) -> &'static str {
        "SplitGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let any = inputs.iter().flatten().next();
        let dtype = any.ok_or_else(|| OpError::Internal("SplitGrad without inputs".into()))?.dtype;
        Ok(vec![Meta::new(dtype, &self.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let y = out(y, 0)?;
        let inner = y.dims[self.axis + 1..].iter().product::<usize>() * y.dtype.size();
        let row = y.dims[self.axis] * inner;
        rows(y.bytes, row, GRAIN * 4, |first, piece| {
            for (r, mut rest) in piece.chunks_exact_mut(row.max(1)).enumerate() {
                for (i, &n) in self.sizes.iter().enumerate() {
                    let n = n * inner;
                    let (part, tail) = rest.split_at_mut(n);
                    match get(x, i) {
                        Some(x) => part.copy_from_slice(&x.bytes[(first + r) * n..][..n]),
                        None => part.fill(0),
                    }
                    rest = tail;
                }
            }
        });
        Ok(())
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], outputs: &[Option<&Meta>]) -> Option<ChannelsLast> {
        let axis = position(self.axis, rank_of(outputs, 0)?);
        let op = SplitGrad { axis, sizes: self.sizes.clone(), dims: last(&self.dims) };
        Some(ChannelsLast::by(op, &vec![true; inputs.len()], &[true]))
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        crate::ops::bytes::second_derivative()
    }
}

pub(super) const ROWS: &[Row] = &[
    Row::new("Concat", 4, |s| {
        let axis = s.attrs.int("axis")?;
        let axis = axis.ok_or_else(|| OpError::Attribute("'axis' of Concat is missing".into()))?;
        Ok(Arc::new(Concat { axis }))
    }),
    Row::new("Split", 2, Split::make),
];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    use crate::tensor::Tensor;
    vec![
        Case::new("Concat", 13).int("axis", 1).input(&[2, 3]).input(&[2, 1]).input(&[2, 0]),
        Case::new("Concat", 4).named("axis 0").int("axis", 0).input(&[2, 3]).input(&[1, 3]),
        Case::new("Concat", 13).named("negative").int("axis", -2).input(&[2, 3, 2]).input(&[2, 1, 2]),
        Case::new("Concat", 13)
            .named("images")
            .int("axis", 1)
            .input(&[2, 3, 2, 3])
            .input(&[2, 2, 2, 3])
            .input(&[2, 1, 2, 3]),
        Case::new("Split", 13)
            .named("images")
            .outputs(2)
            .int("axis", 1)
            .input(&[2, 5, 2, 3])
            .fixed(Tensor::ints(&[2, 3])),
        Case::new("Concat", 13).named("one").int("axis", 0).input(&[2, 3]),
        Case::new("Split", 11).outputs(3).int("axis", 1).input(&[2, 6, 2]),
        Case::new("Split", 2).named("sizes").outputs(2).ints("split", &[1, 3]).input(&[4, 2]),
        Case::new("Split", 13)
            .named("sizes input")
            .outputs(2)
            .int("axis", -1)
            .input(&[2, 5])
            .fixed(Tensor::ints(&[2, 3])),
        Case::new("Split", 18).named("uneven").outputs(3).int("num_outputs", 3).input(&[7, 2]),
        // One output differentiated at a time is what the harness does; the parts without a gradient are zeros.
        Case::new("Split", 18).named("first only").int("num_outputs", 2).input(&[5, 2]),
    ]
}
