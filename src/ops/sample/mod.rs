//! Reading and writing at places that other tensors or fixed patterns name: grids, regions, unpooling, patches.

mod affine;
mod col2im;
mod crop_pad;
mod deform;
mod grid;
mod roi;
#[cfg(test)]
mod tests;
mod unpool;

use crate::error::OpError;
use crate::ops::Row;
use crate::tensor::Meta;

pub use affine::{AffineGrid, AffineGridGrad};
pub use col2im::{Col2Im, Im2Col};
pub use crop_pad::CenterCropPad;
pub use deform::{DeformConv, DeformConvGrad};
pub use grid::{GridSample, GridSampleGridGrad, GridSampleInputGrad};
pub use roi::{MaxRoiPool, MaxRoiPoolGrad, RoiAlign, RoiAlignGrad};
pub use unpool::{MaxUnpool, MaxUnpoolGrad};

fn second(of: &str) -> OpError {
    OpError::NotDifferentiable(format!("second derivatives of {of}"))
}

/// An error unless an operand is what it should be.
fn expect(what: &str, operand: &Meta, like: &Meta, dims: &[usize]) -> Result<(), OpError> {
    match operand.dims.as_slice() == dims && operand.dtype == like.dtype {
        true => Ok(()),
        false => Err(OpError::Shape(format!(
            "{what} of {} {:?} where {} {dims:?} is needed",
            operand.dtype,
            operand.dims.as_slice(),
            like.dtype
        ))),
    }
}

pub(super) const ROWS: &[Row] = &[
    Row::new("GridSample", 16, GridSample::make),
    Row::new("AffineGrid", 20, AffineGrid::make),
    Row::new("RoiAlign", 10, RoiAlign::make),
    Row::new("MaxRoiPool", 1, MaxRoiPool::make),
    Row::new("MaxUnpool", 9, MaxUnpool::make),
    Row::new("CenterCropPad", 18, CenterCropPad::make),
    Row::new("Col2Im", 18, Col2Im::make),
    Row::new("DeformConv", 19, DeformConv::make),
];

#[cfg(test)]
pub(super) use tests::cases;
