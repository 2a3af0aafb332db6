//! Repetition: Expand (broadcast to a shape) and Tile.

use std::sync::Arc;

use crate::error::OpError;
use crate::graph::GradBuilder;
use crate::kernels::layout::last;
use crate::kernels::strided::{Extents, Strides, dense, read};
use crate::ops::bytes::{by_size, sized, to_dims, units, units_mut};
use crate::ops::layout::rank_of;
use crate::ops::reduce::SumTo;
use crate::ops::view::reshape;
use crate::ops::{ChannelsLast, Cx, Grads, Op, Row, get, need, out};
use crate::tensor::{Dims, Meta, View, ViewMut, broadcast};

/// ONNX `Expand` (opset 8 on): X broadcast with a shape, in both directions.
#[derive(Debug)]
pub struct Expand {
    /// The shape; `None`: input 1.
    pub to: Option<Dims>,
}

impl Op for Expand {
    fn name(&self) -> &'static str {
        "Expand"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        let shape = match &self.to {
            Some(to) => to.clone(),
            None => to_dims(&need(inputs, 1)?.ints(1)?)?,
        };
        Ok(vec![sized(x.dtype, &broadcast(&x.dims, &shape)?)?])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (x, y) = (need(x, 0)?, out(y, 0)?);
        let mut strides = Strides::from_elem(0, y.dims.len());
        let new = y.dims.len() - x.dims.len();
        for (i, s) in dense(x.dims).into_iter().enumerate() {
            if x.dims[i] == y.dims[new + i] {
                strides[new + i] = s;
            }
        }
        by_size!(x.dtype, T => {
            read::<T>(units(x.bytes)?, 0, y.dims, &strides, units_mut(y.bytes)?);
            Ok(())
        })
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], outputs: &[Option<&Meta>]) -> Option<ChannelsLast> {
        rank_of(outputs, 0)?;
        let op = Expand { to: Some(last(&get(outputs, 0)?.dims)) };
        Some(ChannelsLast::by(op, &[get(inputs, 0)?.len() != 1], &[true]).taking(1))
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // dX = dY summed over the broadcast dimensions (by the driver).
        let dy = g.dy0()?;
        Ok(Grads::from_slice(&[Some(dy)]))
    }

    fn cheap(&self) -> bool {
        true
    }
}

/// ONNX `Tile` (opset 6 on): X repeated `repeats[i]` times along axis `i`.
#[derive(Debug)]
pub struct Tile;

impl Op for Tile {
    fn name(&self) -> &'static str {
        "Tile"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        let repeats = to_dims(&need(inputs, 1)?.ints(1)?)?;
        if repeats.len() != x.rank() {
            return Err(OpError::Shape(format!(
                "{} repeats for a tensor of rank {}",
                repeats.len(),
                x.rank()
            )));
        }
        let dims: Option<Dims> = x.dims.iter().zip(&repeats).map(|(d, r)| d.checked_mul(*r)).collect();
        let dims = dims.ok_or_else(|| OpError::Shape(format!("repeats {repeats:?} are too large")))?;
        Ok(vec![sized(x.dtype, &dims)?])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (x, y) = (need(x, 0)?, out(y, 0)?);
        if y.is_empty() {
            return Ok(());
        }
        // Y's axis i is (repeat, X's axis i); the repeat stands still in X.
        let (mut dims, mut strides) = (Extents::new(), Strides::new());
        for (i, s) in dense(x.dims).into_iter().enumerate() {
            dims.extend([y.dims[i] / x.dims[i], x.dims[i]]);
            strides.extend([0, s]);
        }
        by_size!(x.dtype, T => {
            read::<T>(units(x.bytes)?, 0, &dims, &strides, units_mut(y.bytes)?);
            Ok(())
        })
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // dX = Σ over the repeats of dY seen as (r₀, d₀, r₁, d₁, …).
        let dy = g.dy0()?;
        let x = g.meta(g.x(0)?)?.dims.clone();
        let y = g.meta(dy)?.dims.clone();
        if x == y {
            return Ok(Grads::from_slice(&[Some(dy)]));
        }
        let (mut split, mut kept) = (Dims::new(), Dims::new());
        for (&d, &n) in x.iter().zip(&y) {
            if d != n && d != 0 {
                split.push(n / d);
                kept.push(1);
            }
            split.push(d);
            kept.push(d);
        }
        let parts = reshape(g, dy, split)?;
        let sum = g.emit(SumTo { dims: kept }, &[parts])?;
        Ok(Grads::from_slice(&[Some(reshape(g, sum, x)?)]))
    }

    fn cheap(&self) -> bool {
        true
    }
}

pub(super) const ROWS: &[Row] = &[
    Row::new("Expand", 8, |_| Ok(Arc::new(Expand { to: None }))),
    Row::new("Tile", 6, |_| Ok(Arc::new(Tile))),
];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    use crate::tensor::Tensor;
    let ints = Tensor::ints;
    vec![
        Case::new("Expand", 8).input(&[3, 1]).fixed(ints(&[2, 3, 4])),
        Case::new("Expand", 13).named("both ways").input(&[3, 1, 2]).fixed(ints(&[4, 1])),
        Case::new("Expand", 13).named("channels").input(&[3, 1, 1]).fixed(ints(&[2, 3, 2, 2])),
        Case::new("Expand", 13).named("scalar").input(&[]).fixed(ints(&[2, 2])),
        Case::new("Tile", 6).input(&[2, 3]).fixed(ints(&[2, 2])),
        Case::new("Tile", 13).named("one axis").input(&[2, 1, 3]).fixed(ints(&[1, 3, 1])),
    ]
}
