//! `GridSample` and its gradients.

use std::sync::Arc;

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::sample::grid::{self as kernel, Geometry, Interpolation, Outside, Sampling};
use crate::ops::sample::second;
use crate::ops::{Cx, Grads, Op, Spec, need, out};
use crate::tensor::{Dims, Meta, View, ViewMut};

/// ONNX `GridSample` (opset 16; of volumes since 20): X (N, C, extents…), grid (N, points…, rank) of one to three spatial
/// dimensions, whose coordinates name the last one first.
#[derive(Debug, Clone)]
pub struct GridSample {
    pub sampling: Sampling,
}

fn geometry(x: &[usize], grid: &[usize]) -> Result<Geometry, OpError> {
    let rank = x.len().saturating_sub(2);
    if !(1..=3).contains(&rank) {
        return Err(OpError::Unsupported(format!(
            "GridSample of {x:?} (one to three spatial dimensions are supported)"
        )));
    }
    if grid.len() != x.len() || grid[0] != x[0] || grid[rank + 1] != rank || x[2..].contains(&0) {
        return Err(OpError::Shape(format!("GridSample of {x:?} at a grid of {grid:?}")));
    }
    let mut extents = [1; 3];
    extents[..rank].copy_from_slice(&x[2..]);
    Ok(Geometry { n: x[0], c: x[1], rank, extents, points: grid[1..=rank].iter().product() })
}

impl GridSample {
    pub(super) fn make(s: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let unknown = |name: &str, value: &str| OpError::Attribute(format!("'{name}' is {value}"));
        let interpolation = match s.attrs.string("mode")?.as_deref() {
            None | Some("linear" | "bilinear") => Interpolation::Linear,
            Some("nearest") => Interpolation::Nearest,
            Some("cubic" | "bicubic") => Interpolation::Cubic,
            Some(other) => return Err(unknown("mode", other)),
        };
        let outside = match s.attrs.string("padding_mode")?.as_deref() {
            None | Some("zeros") => Outside::Zeros,
            Some("border") => Outside::Border,
            Some("reflection") => Outside::Reflection,
            Some(other) => return Err(unknown("padding_mode", other)),
        };
        let align_corners = s.attrs.flag("align_corners")?;
        Ok(Arc::new(GridSample { sampling: Sampling { interpolation, outside, align_corners } }))
    }
}

impl Op for GridSample {
    fn name(&self) -> &'static str {
        "GridSample"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (x, grid) = (need(inputs, 0)?, need(inputs, 1)?);
        geometry(&x.dims, &grid.dims)?;
        if x.dtype != grid.dtype {
            return Err(OpError::Type(format!("GridSample of {} at a grid of {}", x.dtype, grid.dtype)));
        }
        let mut dims = Dims::from_slice(&x.dims[..2]);
        dims.extend_from_slice(&grid.dims[1..x.rank() - 1]);
        Ok(vec![Meta::new(x.dtype, &dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (x, grid) = (need(x, 0)?, need(x, 1)?);
        let g = geometry(x.dims, grid.dims)?;
        float_dispatch!(x.dtype, T => {
            kernel::sample(&g, &self.sampling, x.get::<T>()?, grid.get()?, out(y, 0)?.get()?);
            Ok(())
        })
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        let (x, grid, dy) = (g.x(0)?, g.x(1)?, g.dy0()?);
        let mut grads = Grads::from_elem(None, 2);
        if g.wants(0) {
            // dX[element] += weight · dY[point]   (N, C, extents…)
            let op = GridSampleInputGrad { sampling: self.sampling, x: g.meta(x)?.dims.clone() };
            grads[0] = Some(g.emit(op, &[dy, grid])?);
        }
        if g.wants(1) {
            // dG[point] = Σ_c dY[c, point] · Σ weight' · X[c, element]   (N, points…, rank)
            grads[1] = Some(g.emit(GridSampleGridGrad { sampling: self.sampling }, &[dy, x, grid])?);
        }
        Ok(grads)
    }
}

/// The gradient of `GridSample` with respect to X, of dimensions `x`: from dY and the grid.
#[derive(Debug)]
pub struct GridSampleInputGrad {
    pub sampling: Sampling,
    pub x: Dims,
}

impl Op for GridSampleInputGrad {
    fn name(&self) -> &'static str {
        "GridSampleInputGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        Ok(vec![Meta::new(need(inputs, 0)?.dtype, &self.x)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (dy, grid) = (need(x, 0)?, need(x, 1)?);
        let g = geometry(&self.x, grid.dims)?;
        float_dispatch!(dy.dtype, T => {
            kernel::input_grad(&g, &self.sampling, dy.get::<T>()?, grid.get()?, out(y, 0)?.get()?);
            Ok(())
        })
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(second("GridSample"))
    }
}

/// The gradient of `GridSample` with respect to the grid: from dY, X and the grid.
#[derive(Debug)]
pub struct GridSampleGridGrad {
    pub sampling: Sampling,
}

impl Op for GridSampleGridGrad {
    fn name(&self) -> &'static str {
        "GridSampleGridGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let grid = need(inputs, 2)?;
        Ok(vec![Meta::new(grid.dtype, &grid.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (dy, x, grid) = (need(x, 0)?, need(x, 1)?, need(x, 2)?);
        let g = geometry(x.dims, grid.dims)?;
        float_dispatch!(dy.dtype, T => {
            let (dy, x, grid) = (dy.get::<T>()?, x.get()?, grid.get()?);
            kernel::grid_grad(&g, &self.sampling, dy, x, grid, out(y, 0)?.get()?);
            Ok(())
        })
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(second("GridSample"))
    }
}
