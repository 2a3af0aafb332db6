//! Determinants.

use std::sync::Arc;

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::ops::bytes::second_derivative;
use crate::ops::{Cx, Grads, Op, Row, get, need, out};
use crate::tensor::{Float, Meta, View, ViewMut};

/// ONNX `Det` (opset 11): the determinants of square matrices (…, n, n) to (…).
#[derive(Debug)]
pub struct Det;

/// n of matrices (…, n, n).
fn order(dims: &[usize]) -> Result<usize, OpError> {
    match dims {
        [.., a, b] if a == b => Ok(*a),
        _ => Err(OpError::Shape(format!("{dims:?} where square matrices are needed"))),
    }
}

/// The determinant of the n by n matrix in `a`, by elimination with row pivots; `a` is overwritten.
fn determinant(a: &mut [f64], n: usize) -> f64 {
    let mut det = 1.0;
    for c in 0..n {
        let mut pivot = c;
        for r in c + 1..n {
            if a[r * n + c].abs() > a[pivot * n + c].abs() {
                pivot = r;
            }
        }
        if a[pivot * n + c] == 0.0 {
            return 0.0;
        }
        if pivot != c {
            (0..n).for_each(|k| a.swap(pivot * n + k, c * n + k));
            det = -det;
        }
        det *= a[c * n + c];
        for r in c + 1..n {
            let f = a[r * n + c] / a[c * n + c];
            (c..n).for_each(|k| a[r * n + k] -= f * a[c * n + k]);
        }
    }
    det
}

impl Op for Det {
    fn name(&self) -> &'static str {
        "Det"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        order(&x.dims)?;
        Ok(vec![Meta::new(x.dtype, &x.dims[..x.rank() - 2])])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (x, y) = (need(x, 0)?, out(y, 0)?);
        let n = order(x.dims)?;
        let room = cx.room::<f64>(n * n)?;
        float_dispatch!(x.dtype, T => {
            if n == 0 {
                y.get::<T>()?.fill(1.0);
                return Ok(());
            }
            for (x, y) in x.get::<T>()?.chunks_exact(n * n).zip(y.get::<T>()?) {
                room.iter_mut().zip(x).for_each(|(r, x)| *r = x.to64());
                *y = T::of(determinant(room, n));
            }
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        get(inputs, 0).and_then(|x| order(&x.dims).ok()).map_or(0, |n| n * n * size_of::<f64>())
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // dX = dY · cofactors of X
        let (x, dy) = (g.x(0)?, g.dy0()?);
        Ok(Grads::from_slice(&[Some(g.emit(DetGrad, &[x, dy])?)]))
    }
}

/// The gradient of `Det`: (X, dY) to dY times the cofactors of X, which singular matrices have too. Work grows with
/// the fifth power of the order: meant for the small matrices of geometry and flows.
#[derive(Debug)]
struct DetGrad;

impl Op for DetGrad {
    fn name(&self) -> &'static str {
        "DetGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        Ok(vec![Meta::new(x.dtype, &x.dims)])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (x, dy, dx) = (need(x, 0)?, need(x, 1)?, out(y, 0)?);
        let n = order(x.dims)?;
        let room = cx.room::<f64>(n * n)?;
        float_dispatch!(x.dtype, T => {
            if n == 0 {
                return Ok(());
            }
            let matrices = x.get::<T>()?.chunks_exact(n * n).zip(dx.get::<T>()?.chunks_exact_mut(n * n));
            for ((x, dx), dy) in matrices.zip(dy.get::<T>()?) {
                for (at, dx) in dx.iter_mut().enumerate() {
                    let (row, column) = (at / n, at % n);
                    let others = (0..n * n).filter(|e| e / n != row && e % n != column);
                    room.iter_mut().zip(others).for_each(|(r, e)| *r = x[e].to64());
                    let sign = if (row + column) % 2 == 0 { 1.0 } else { -1.0 };
                    *dx = T::of(sign * determinant(room, n - 1) * dy.to64());
                }
            }
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        Det.scratch(inputs)
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        second_derivative()
    }
}

pub(super) const ROWS: &[Row] = &[Row::new("Det", 11, |_| Ok(Arc::new(Det)))];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    vec![
        Case::new("Det", 11).input(&[3, 3]),
        Case::new("Det", 22).named("stack").input(&[2, 2, 4, 4]),
        Case::new("Det", 22).named("singular").given(&[2, 2], &[1.0, 2.0, 2.0, 4.0]),
        Case::new("Det", 22).named("of order 1").input(&[3, 1, 1]),
        Case::new("Det", 22).named("of order 0").input(&[2, 0, 0]),
    ]
}
