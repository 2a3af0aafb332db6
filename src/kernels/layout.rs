//! Where a tensor of three dimensions or more has its channel axis.

use crate::tensor::Dims;

/// (N, C, spatial…), ONNX's order, or (N, spatial…, C).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Layout {
    #[default]
    First,
    Last,
}

/// (N, C, spatial…) as (N, spatial…, C).
pub fn last(dims: &[usize]) -> Dims {
    (0..dims.len()).map(|i| dims[axis_at(i, dims.len())]).collect()
}

/// (N, spatial…, C) as (N, C, spatial…).
pub fn first(dims: &[usize]) -> Dims {
    (0..dims.len()).map(|a| dims[position(a, dims.len())]).collect()
}

/// Where axis `a` of (N, C, spatial…) lies in (N, spatial…, C).
pub fn position(a: usize, rank: usize) -> usize {
    match a {
        0 => 0,
        1 => rank - 1,
        _ => a - 1,
    }
}

/// Which axis of (N, C, spatial…) lies at place `i` of (N, spatial…, C).
pub fn axis_at(i: usize, rank: usize) -> usize {
    match i {
        0 => 0,
        _ if i + 1 == rank => 1,
        _ => i + 1,
    }
}

impl Layout {
    /// The dimensions, channels first, of a tensor that has `dims` in this layout.
    pub fn ordinary(self, dims: &[usize]) -> Dims {
        match self {
            Layout::First => Dims::from_slice(dims),
            Layout::Last => first(dims),
        }
    }

    /// The dimensions in this layout of a tensor that has `dims` with channels first.
    pub fn of(self, dims: &[usize]) -> Dims {
        match self {
            Layout::First => Dims::from_slice(dims),
            Layout::Last => last(dims),
        }
    }
}
