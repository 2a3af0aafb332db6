//! Along one or two axes: CumSum, CumProd, Trilu, OneHot.

use std::ops::{Add, Mul};
use std::sync::Arc;

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::index::{Running, running, running_product_grad};
use crate::kernels::par::{GRAIN, rows};
use crate::ops::bytes::{by_size, ints, numeric, second_derivative, sized, units, units_mut};
use crate::ops::{Cx, Grads, Op, Row, Spec, get, need, out};
use crate::tensor::{DType, Meta, View, ViewMut, axis};

/// ONNX `CumSum` (opset 11) and `CumProd` (opset 26): running sums or products of X along an axis (input 1).
#[derive(Debug)]
pub struct Cumulative {
    product: bool,
    /// Where it is not an input: in the gradient.
    axis: Option<usize>,
    exclusive: bool,
    reverse: bool,
}

impl Op for Cumulative {
    fn name(&self) -> &'static str {
        if self.product { "CumProd" } else { "CumSum" }
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        if self.axis.is_none() && need(inputs, 1)?.len() != 1 {
            return Err(OpError::Shape(format!("the axis of {} is not one number", self.name())));
        }
        Ok(vec![Meta::new(x.dtype, &x.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (data, y) = (need(x, 0)?, out(y, 0)?);
        let a = match self.axis {
            Some(a) => a,
            None => axis(ints(&need(x, 1)?)?[0], data.dims.len())?,
        };
        let run = self.run(data.dims, a);
        numeric!(data.dtype, T => {
            match self.product {
                #[allow(clippy::unnecessary_cast, reason = "`T` is also i64")]
                true => running::<T>(data.get()?, run, y.get()?, 1 as T, Product::product),
                #[allow(clippy::unnecessary_cast, reason = "`T` is also i64")]
                false => running::<T>(data.get()?, run, y.get()?, 0 as T, Product::sum),
            }
            Ok(())
        })
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // dX[j] = Σ dY[i] over the i whose sums hold X[j]: the same from the other end. Of products see the kernel.
        let dy = g.dy0()?;
        let a = match self.axis {
            Some(a) => a,
            None => {
                let given = g.meta(g.x(1)?)?.ints(1)?;
                axis(given[0], g.meta(dy)?.rank())?
            }
        };
        if self.product {
            let x = g.x(0)?;
            let op = CumProdGrad(Cumulative { axis: Some(a), ..*self });
            return Ok(Grads::from_slice(&[Some(g.emit(op, &[x, dy])?), None]));
        }
        let op = Cumulative { axis: Some(a), reverse: !self.reverse, ..*self };
        let dx = g.emit(op, &[dy])?;
        Ok(Grads::from_slice(&[Some(dx)]))
    }
}

impl Cumulative {
    fn run(&self, dims: &[usize], a: usize) -> Running {
        let block = dims[a + 1..].iter().product();
        Running { n: dims[a], block, exclusive: self.exclusive, reverse: self.reverse }
    }

    fn make(spec: &Spec, product: bool) -> Result<Arc<dyn Op>, OpError> {
        let (exclusive, reverse) = (spec.attrs.flag("exclusive")?, spec.attrs.flag("reverse")?);
        Ok(Arc::new(Cumulative { product, axis: None, exclusive, reverse }))
    }
}

/// Sum and product of numbers that wrap around where they are integers.
trait Product: Sized {
    fn sum(self, b: Self) -> Self;
    fn product(self, b: Self) -> Self;
}

macro_rules! products {
    ($($t:ty: $sum:ident $product:ident),*) => { $(
        impl Product for $t {
            fn sum(self, b: Self) -> Self {
                self.$sum(b)
            }
            fn product(self, b: Self) -> Self {
                self.$product(b)
            }
        }
    )* };
}
products!(f32: add mul, f64: add mul, i8: wrapping_add wrapping_mul, i16: wrapping_add wrapping_mul,
    i32: wrapping_add wrapping_mul, i64: wrapping_add wrapping_mul, u8: wrapping_add wrapping_mul,
    u16: wrapping_add wrapping_mul, u32: wrapping_add wrapping_mul, u64: wrapping_add wrapping_mul);

/// The gradient of `CumProd` with a given axis: (X, dY) to dX.
#[derive(Debug)]
struct CumProdGrad(Cumulative);

impl Op for CumProdGrad {
    fn name(&self) -> &'static str {
        "CumProdGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        Ok(vec![Meta::new(x.dtype, &x.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (x, dy, dx) = (need(x, 0)?, need(x, 1)?, out(y, 0)?);
        let a = self.0.axis.ok_or_else(|| OpError::Internal("CumProdGrad without an axis".into()))?;
        let run = self.0.run(x.dims, a);
        float_dispatch!(x.dtype, T => {
            running_product_grad::<T>(x.get()?, dy.get()?, run, dx.get()?);
            Ok(())
        })
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        second_derivative()
    }
}

/// ONNX `Trilu` (opset 14): the upper or lower triangle of matrices, from diagonal k (input 1), zeros elsewhere.
#[derive(Debug)]
pub struct Trilu {
    upper: bool,
    /// Where it is not an input: in the gradient.
    k: Option<i64>,
}

impl Op for Trilu {
    fn name(&self) -> &'static str {
        "Trilu"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        if x.rank() < 2 {
            return Err(OpError::Shape(format!("rank {} where at least 2 is needed", x.rank())));
        }
        if let Some(k) = get(inputs, 1).filter(|k| k.len() != 1) {
            return Err(OpError::Shape(format!("k of Trilu has {} elements", k.len())));
        }
        Ok(vec![Meta::new(x.dtype, &x.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let y = out(y, 0)?;
        let k = match (self.k, get(x, 1)) {
            (Some(k), _) => k,
            (None, Some(v)) => ints(&v)?[0],
            (None, None) => 0,
        };
        let data = get(x, 0);
        let (h, w) = (y.dims[y.dims.len() - 2], y.dims[y.dims.len() - 1]);
        by_size!(y.dtype, T => {
            let data = data.map(|d| units::<T>(d.bytes)).transpose()?;
            rows(units_mut::<T>(y.bytes)?, w, GRAIN, |first, piece| {
                for (r, y) in piece.chunks_exact_mut(w.max(1)).enumerate() {
                    let row = ((first + r) % h) as i64;
                    // The first column on or above the diagonal, or above it for the lower triangle.
                    let edge = row.saturating_add(k).saturating_add(!self.upper as i64);
                    let edge = edge.clamp(0, w as i64) as usize;
                    if let Some(x) = data {
                        y.copy_from_slice(&x[(first + r) * w..][..w]);
                    }
                    let (left, right) = y.split_at_mut(edge);
                    if self.upper { left.fill(0) } else { right.fill(0) }
                }
            });
            Ok(())
        })
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // dX = the same triangle of dY.
        let dy = g.dy0()?;
        let k = match (self.k, g.x_opt(1)) {
            (Some(k), _) => k,
            (None, Some(v)) => g.meta(v)?.ints(1)?[0],
            (None, None) => 0,
        };
        let dx = g.emit(Trilu { upper: self.upper, k: Some(k) }, &[dy])?;
        Ok(Grads::from_slice(&[Some(dx)]))
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(0, 0)]
    }

    fn cheap(&self) -> bool {
        true
    }
}

/// ONNX `OneHot` (opset 9): indices, depth and (off, on) values; a new axis where one element is `on`.
#[derive(Debug)]
pub struct OneHot {
    axis: i64,
}

impl Op for OneHot {
    fn name(&self) -> &'static str {
        "OneHot"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (index, depth, values) = (need(inputs, 0)?, need(inputs, 1)?, need(inputs, 2)?);
        if index.dtype == DType::Bool || matches!(index.dtype, DType::F16 | DType::BF16) {
            return Err(OpError::Type(format!("indices of type {}", index.dtype)));
        }
        if values.len() != 2 {
            return Err(OpError::Shape(format!("{} values where (off, on) is needed", values.len())));
        }
        let depth = depth.value.as_ref().ok_or(OpError::NeedsValue(1))?.to_f64();
        let depth = match depth.as_slice() {
            [d] if *d >= 0.0 && *d <= (1u64 << 40) as f64 => *d as usize,
            other => return Err(OpError::Shape(format!("depth {other:?} of OneHot"))),
        };
        let a = axis(self.axis, index.rank() + 1)?;
        let mut dims = index.dims.clone();
        dims.insert(a, depth);
        Ok(vec![sized(values.dtype, &dims)?])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (index, values, y) = (need(x, 0)?, need(x, 2)?, out(y, 0)?);
        let a = axis(self.axis, y.dims.len())?;
        let depth = y.dims[a];
        let inner: usize = y.dims[a + 1..].iter().product();
        by_size!(y.dtype, T => {
            let (y, values) = (units_mut::<T>(y.bytes)?, units::<T>(values.bytes)?);
            y.fill(values[0]);
            if inner == 0 || depth == 0 {
                return Ok(());
            }
            numeric!(index.dtype, I => {
                for (p, &k) in index.get::<I>()?.iter().enumerate() {
                    // Floats truncate; what lies outside -depth..depth marks nothing.
                    #[allow(clippy::unnecessary_cast, reason = "`I` is also i64")]
                    let k = k as i64;
                    let k = if k < 0 { k.saturating_add(depth as i64) } else { k };
                    if (0..depth as i64).contains(&k) {
                        y[(p / inner * depth + k as usize) * inner + p % inner] = values[1];
                    }
                }
                Ok(())
            })
        })
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("the on and off values of OneHot".into()))
    }
}

pub(super) const ROWS: &[Row] = &[
    Row::new("CumSum", 11, |s| Cumulative::make(s, false)),
    Row::new("CumProd", 26, |s| Cumulative::make(s, true)),
    Row::new("Trilu", 14, |s| Ok(Arc::new(Trilu { upper: s.attrs.flag_or("upper", true)?, k: None }))),
    Row::new("OneHot", 9, |s| Ok(Arc::new(OneHot { axis: s.attrs.int_or("axis", -1)? }))),
];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    use crate::tensor::Tensor;
    let scalar = Tensor::scalar::<i64>;
    vec![
        Case::new("CumSum", 11).input(&[2, 4]).fixed(scalar(-1)),
        Case::new("CumSum", 14)
            .named("exclusive, axis 0")
            .int("exclusive", 1)
            .input(&[3, 2])
            .fixed(Tensor::scalar(0i32)),
        Case::new("CumSum", 14).named("reverse").int("reverse", 1).input(&[2, 3, 2]).fixed(scalar(1)),
        Case::new("CumSum", 14)
            .named("both")
            .int("reverse", 1)
            .int("exclusive", 1)
            .input(&[5])
            .fixed(scalar(0)),
        Case::new("CumProd", 26).input(&[2, 4]).fixed(scalar(-1)),
        Case::new("CumProd", 26)
            .named("with zeros, exclusive, axis 0")
            .int("exclusive", 1)
            .given(&[3, 2], &[0.5, 0.0, 0.0, 2.0, -1.0, 0.0])
            .fixed(Tensor::scalar(0i32)),
        Case::new("CumProd", 26)
            .named("both")
            .int("reverse", 1)
            .int("exclusive", 1)
            .input(&[2, 3, 2])
            .fixed(scalar(1)),
        Case::new("CumProd", 26).named("reverse").int("reverse", 1).input(&[5]).fixed(scalar(0)),
        Case::new("CumProd", 26)
            .named("int64")
            .fixed(Tensor::ints(&[2, 3, 4]))
            .fixed(scalar(0))
            .forward_only(),
        Case::new("Trilu", 14).input(&[3, 4]),
        Case::new("Trilu", 14).named("lower").int("upper", 0).input(&[2, 4, 3]).fixed(scalar(-1)),
        Case::new("Trilu", 14).named("beyond").input(&[3, 3]).fixed(scalar(7)),
        Case::new("OneHot", 9)
            .int("axis", 1)
            .fixed(Tensor::from_slice(&[2, 2], &[0i64, -1, 5, 1]).unwrap())
            .fixed(scalar(3))
            .fixed(Tensor::from_slice(&[2], &[2f32, 5.0]).unwrap())
            .forward_only(),
    ]
}
