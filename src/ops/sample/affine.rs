//! `AffineGrid` and its gradient.

use std::sync::Arc;

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::par;
use crate::ops::sample::{expect, second};
use crate::ops::{Cx, Grads, Op, Spec, need, out};
use crate::tensor::{Dims, Float, Meta, View, ViewMut};

/// ONNX `AffineGrid` (opset 20): theta (N, rank, rank + 1) and the size (N, C, extents…), of two or three spatial
/// dimensions, to a grid (N, extents…, rank) for `GridSample`.
#[derive(Debug, Clone)]
pub struct AffineGrid {
    pub align_corners: bool,
}

/// The coordinate of place `i` of `n`: -1 to 1 over the dimension.
fn coordinate(align_corners: bool, i: usize, n: usize) -> f64 {
    match align_corners {
        true if n == 1 => 0.0,
        true => 2.0 * i as f64 / (n as f64 - 1.0) - 1.0,
        false => (2.0 * i as f64 + 1.0) / n as f64 - 1.0,
    }
}

/// The coordinates (x, y, …, 1) of a point, the last dimension first.
fn point<T: Float>(align_corners: bool, extents: &[usize], mut p: usize) -> [T; 4] {
    let rank = extents.len();
    let mut at = [T::one(); 4];
    for d in (0..rank).rev() {
        at[rank - 1 - d] = T::of(coordinate(align_corners, p % extents[d], extents[d]));
        p /= extents[d];
    }
    at
}

impl AffineGrid {
    pub(super) fn make(s: &Spec) -> Result<Arc<dyn Op>, OpError> {
        Ok(Arc::new(AffineGrid { align_corners: s.attrs.flag("align_corners")? }))
    }
}

impl Op for AffineGrid {
    fn name(&self) -> &'static str {
        "AffineGrid"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let theta = need(inputs, 0)?;
        let size = need(inputs, 1)?.ints(1)?;
        let bad = || OpError::Shape(format!("AffineGrid of {:?} to {size:?}", theta.dims));
        let fits = |v: &i64| (0..=i64::from(i32::MAX)).contains(v);
        if !(4..=5).contains(&size.len()) || !size.iter().all(fits) {
            return Err(bad());
        }
        let rank = size.len() - 2;
        expect("theta", theta, theta, &[size[0] as usize, rank, rank + 1])?;
        let mut dims = Dims::from_slice(&[size[0] as usize]);
        dims.extend(size[2..].iter().map(|v| *v as usize));
        dims.push(rank);
        Ok(vec![Meta::new(theta.dtype, &dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (theta, y) = (need(x, 0)?, out(y, 0)?);
        let dims = Dims::from_slice(y.dims);
        let extents = &dims[1..dims.len() - 1];
        let (rank, points) = (extents.len(), extents.iter().product::<usize>());
        float_dispatch!(theta.dtype, T => {
            let theta = theta.get::<T>()?;
            par::rows(y.get::<T>()?, rank, par::GRAIN / 8, |first, y| {
                for (i, y) in y.chunks_exact_mut(rank).enumerate() {
                    let (n, p) = ((first + i) / points, (first + i) % points);
                    let at = point::<T>(self.align_corners, extents, p);
                    let theta = &theta[n * rank * (rank + 1)..];
                    for (y, row) in y.iter_mut().zip(theta.chunks_exact(rank + 1)) {
                        *y = row.iter().zip(&at[..rank]).fold(row[rank], |sum, (t, a)| sum + *t * *a);
                    }
                }
            });
            Ok(())
        })
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        let dy = g.dy0()?;
        // dθ[n] = Σ_p dY[n, p] · (x, y, …, 1)ᵀ   (N, rank, rank + 1)
        let theta = g.meta(g.x(0)?)?.dims.clone();
        let op = AffineGridGrad { align_corners: self.align_corners, theta };
        Ok(Grads::from_slice(&[Some(g.emit(op, &[dy])?)]))
    }
}

/// The gradient of `AffineGrid` with respect to theta, of the given dimensions, from dY.
#[derive(Debug)]
pub struct AffineGridGrad {
    pub align_corners: bool,
    pub theta: Dims,
}

impl Op for AffineGridGrad {
    fn name(&self) -> &'static str {
        "AffineGridGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        Ok(vec![Meta::new(need(inputs, 0)?.dtype, &self.theta)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let dy = need(x, 0)?;
        let extents = &dy.dims[1..dy.dims.len() - 1];
        let (rank, points) = (extents.len(), extents.iter().product::<usize>());
        float_dispatch!(dy.dtype, T => {
            let dy = dy.get::<T>()?;
            par::rows(out(y, 0)?.get::<T>()?, rank * (rank + 1), 1, |first, y| {
                for (i, y) in y.chunks_exact_mut(rank * (rank + 1)).enumerate() {
                    let mut sums = [0f64; 12];
                    let dy = &dy[(first + i) * points * rank..][..points * rank];
                    for (p, dy) in dy.chunks_exact(rank).enumerate() {
                        let at = point::<f64>(self.align_corners, extents, p);
                        for (r, d) in dy.iter().enumerate() {
                            for (k, a) in at[..rank].iter().chain([&1.0]).enumerate() {
                                sums[r * (rank + 1) + k] += d.to64() * a;
                            }
                        }
                    }
                    y.iter_mut().zip(sums).for_each(|(y, s)| *y = T::of(s));
                }
            });
            Ok(())
        })
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(second("AffineGrid"))
    }
}
