//! Tensors that follow from shapes and a few numbers: Shape, Size, ConstantOfShape, Range, EyeLike.

use std::sync::Arc;

use num_traits::One;

use crate::dtype_dispatch;
use crate::error::OpError;
use crate::graph::GradBuilder;
use crate::ops::bytes::{by_size, numeric, same_type, sized, to_dims, units_mut};
use crate::ops::{Cx, Grads, Op, Row, Spec, need, out};
use crate::tensor::{DType, Meta, Tensor, View, ViewMut};

fn no_gradient() -> Result<Grads, OpError> {
    Err(OpError::NotDifferentiable("its output is not a smooth function of its inputs".into()))
}

/// ONNX `Shape`: the dimensions of X as int64; `start` and `end` from opset 15.
#[derive(Debug)]
pub struct Shape {
    start: i64,
    end: i64,
}

impl Shape {
    fn make(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let a = spec.attrs;
        Ok(Arc::new(Shape { start: a.int_or("start", 0)?, end: a.int_or("end", i64::MAX)? }))
    }

    fn part<'a>(&self, dims: &'a [usize]) -> &'a [usize] {
        let rank = dims.len() as i64;
        let at = |x: i64| (if x < 0 { x.saturating_add(rank) } else { x }).clamp(0, rank) as usize;
        dims.get(at(self.start)..at(self.end)).unwrap_or(&[])
    }
}

impl Op for Shape {
    fn name(&self) -> &'static str {
        "Shape"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let dims: Vec<i64> = self.part(&need(inputs, 0)?.dims).iter().map(|&d| d as i64).collect();
        let value = Tensor::ints(&dims);
        Ok(vec![Meta { value: Some(Arc::new(value.clone())), ..value.meta() }])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let dims = self.part(need(x, 0)?.dims);
        out(y, 0)?.get::<i64>()?.iter_mut().zip(dims).for_each(|(y, &d)| *y = d as i64);
        Ok(())
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        no_gradient()
    }
}

/// ONNX `Size`: the number of elements of X as an int64 scalar.
#[derive(Debug)]
pub struct Size;

impl Op for Size {
    fn name(&self) -> &'static str {
        "Size"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let value = Tensor::scalar(need(inputs, 0)?.len() as i64);
        Ok(vec![Meta { value: Some(Arc::new(value.clone())), ..value.meta() }])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        out(y, 0)?.get::<i64>()?.fill(need(x, 0)?.len() as i64);
        Ok(())
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        no_gradient()
    }
}

/// ONNX `ConstantOfShape` (opset 9 on): a shape to a tensor filled with `value` (float32 zero if absent).
#[derive(Debug)]
pub struct ConstantOfShape {
    value: Arc<Tensor>,
}

impl ConstantOfShape {
    fn make(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let value = spec.attrs.tensor("value")?.unwrap_or_else(|| Arc::new(Tensor::scalar(0f32)));
        if value.len() != 1 {
            return Err(OpError::Attribute(format!("'value' has {} elements, not one", value.len())));
        }
        Ok(Arc::new(ConstantOfShape { value }))
    }
}

impl Op for ConstantOfShape {
    fn name(&self) -> &'static str {
        "ConstantOfShape"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        Ok(vec![sized(self.value.dtype(), &to_dims(&need(inputs, 0)?.ints(0)?)?)?])
    }

    fn forward(&self, _: &mut Cx, _: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let y = out(y, 0)?;
        by_size!(y.dtype, T => {
            units_mut::<T>(y.bytes)?.fill(bytemuck::pod_read_unaligned(self.value.bytes()));
            Ok(())
        })
    }

    fn in_float64(&self) -> Option<Arc<dyn Op>> {
        let narrow = self.value.dtype() == DType::F32;
        narrow.then(|| Arc::new(ConstantOfShape { value: Arc::new(self.value.cast(DType::F64)) }) as _)
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        no_gradient()
    }

    fn cheap(&self) -> bool {
        true
    }
}

/// ONNX `Range` (opset 11): start, limit and delta (scalars, known at plan time) to start, start + delta, …
#[derive(Debug)]
pub struct Range;

impl Op for Range {
    fn name(&self) -> &'static str {
        "Range"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let dtype = need(inputs, 0)?.dtype;
        let mut values = [(0, 0.0); 3];
        for (i, value) in values.iter_mut().enumerate() {
            let m = need(inputs, i)?;
            same_type(dtype, m.dtype)?;
            let t = m.value.as_ref().ok_or(OpError::NeedsValue(i))?;
            let one = t.to_f64().first().copied();
            let float = one.ok_or_else(|| OpError::Shape(format!("input {i} of Range is empty")))?;
            let int = if dtype.is_float() { 0 } else { t.to_ints()?[0] };
            *value = (int, float);
        }
        let [start, limit, delta] = values;
        if delta.1 == 0.0 {
            return Err(OpError::Shape("the step of Range is 0".into()));
        }
        let n = match dtype.is_float() {
            true => ((limit.1 - start.1) / delta.1).ceil().max(0.0),
            false => {
                let (span, step) = (limit.0 as i128 - start.0 as i128, delta.0 as i128);
                let whole = span / step;
                (whole + (span % step != 0 && (span < 0) == (step < 0)) as i128).max(0) as f64
            }
        };
        if !n.is_finite() || n > (1u64 << 40) as f64 {
            return Err(OpError::Shape(format!("{n} elements of Range")));
        }
        Ok(vec![sized(dtype, &[n as usize])?])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (start, delta, y) = (need(x, 0)?, need(x, 2)?, out(y, 0)?);
        match y.dtype {
            DType::F32 => {
                let (s, d) = (start.get::<f32>()?[0] as f64, delta.get::<f32>()?[0] as f64);
                y.get::<f32>()?.iter_mut().enumerate().for_each(|(i, y)| *y = (s + i as f64 * d) as f32);
                Ok(())
            }
            DType::F64 => {
                let (s, d) = (start.get::<f64>()?[0], delta.get::<f64>()?[0]);
                y.get::<f64>()?.iter_mut().enumerate().for_each(|(i, y)| *y = s + i as f64 * d);
                Ok(())
            }
            dtype => numeric!(dtype, T => {
                let (mut at, step) = (start.get::<T>()?[0], delta.get::<T>()?[0]);
                for y in y.get::<T>()? {
                    *y = at;
                    at = num_traits::NumCast::from(at as i128 + step as i128).unwrap_or(at);
                }
                Ok(())
            }),
        }
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        no_gradient()
    }
}

/// ONNX `EyeLike` (opset 9): ones on diagonal `k` of zeros of X's shape (rank 2).
#[derive(Debug)]
pub struct EyeLike {
    dtype: Option<DType>,
    k: i64,
}

impl EyeLike {
    fn make(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let dtype = match spec.attrs.int("dtype")? {
            None => None,
            Some(code) => Some(
                i32::try_from(code)
                    .ok()
                    .and_then(DType::from_onnx)
                    .ok_or_else(|| OpError::Unsupported(format!("EyeLike of element type {code}")))?,
            ),
        };
        Ok(Arc::new(EyeLike { dtype, k: spec.attrs.int_or("k", 0)? }))
    }
}

impl Op for EyeLike {
    fn name(&self) -> &'static str {
        "EyeLike"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        if x.rank() != 2 {
            return Err(OpError::Shape(format!("rank {} where 2 is needed", x.rank())));
        }
        // A half type is computed as float32; the file's type is the session's affair.
        Ok(vec![sized(self.dtype.unwrap_or(x.dtype).working(), &x.dims)?])
    }

    fn in_float64(&self) -> Option<Arc<dyn Op>> {
        let narrow = self.dtype.is_some_and(|d| d.working() == DType::F32);
        narrow.then(|| Arc::new(EyeLike { dtype: Some(DType::F64), k: self.k }) as _)
    }

    fn forward(&self, _: &mut Cx, _: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let y = out(y, 0)?;
        let columns = y.dims[1];
        y.bytes.fill(0);
        dtype_dispatch!(y.dtype, T => {
            for (i, row) in y.get::<T>()?.chunks_exact_mut(columns.max(1)).enumerate() {
                let at = (i as i64).checked_add(self.k).and_then(|j| usize::try_from(j).ok());
                if let Some(v) = at.and_then(|j| row.get_mut(j)) {
                    *v = T::one();
                }
            }
            Ok(())
        })
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        no_gradient()
    }
}

pub(super) const ROWS: &[Row] = &[
    Row::new("Shape", 1, Shape::make),
    Row::new("Size", 1, |_| Ok(Arc::new(Size))),
    Row::new("ConstantOfShape", 9, ConstantOfShape::make),
    Row::new("Range", 11, |_| Ok(Arc::new(Range))),
    Row::new("EyeLike", 9, EyeLike::make),
];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    use crate::ops::Attr;
    let two = Arc::new(Tensor::from_slice(&[1], &[2i64]).unwrap());
    let range = |name: &str, v: [f32; 3]| {
        v.iter().fold(Case::new("Range", 11).named(name), |c, &x| c.fixed(Tensor::scalar(x))).forward_only()
    };
    vec![
        Case::new("Shape", 13).input(&[2, 3]).forward_only(),
        Case::new("Shape", 15).named("part").int("start", -2).int("end", 2).input(&[2, 3, 4]).forward_only(),
        Case::new("Size", 13).input(&[2, 3]).forward_only(),
        Case::new("ConstantOfShape", 9).fixed(Tensor::ints(&[2, 0, 3])).forward_only(),
        Case::new("ConstantOfShape", 21)
            .named("value")
            .attr("value", Attr::Tensor(two))
            .fixed(Tensor::ints(&[]))
            .forward_only(),
        range("up", [1.0, 5.5, 1.5]),
        range("down", [3.0, 0.0, -1.0]),
        range("none", [3.0, 0.0, 1.0]),
        Case::new("EyeLike", 9).int("k", 1).input(&[2, 4]).forward_only(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::eval;

    #[test]
    fn integer_ranges() {
        let run = |a: i64, b: i64, c: i64| {
            let t = [a, b, c].map(Tensor::scalar);
            eval(&Range, &[Some(&t[0]), Some(&t[1]), Some(&t[2])]).map(|y| y[0].to_ints().unwrap())
        };
        assert_eq!(run(0, 5, 2).unwrap(), [0, 2, 4]);
        assert_eq!(run(5, 0, -2).unwrap(), [5, 3, 1]);
        assert!(run(5, 0, 2).unwrap().is_empty());
        assert!(run(0, i64::MAX, 1).is_err() && run(0, 1, 0).is_err());
    }
}
