//! `AffineGrid`: sampling positions from affine matrices.

use crate::error::OpError;
use crate::graph::Lowering;
use crate::ops::bytes::{sized, to_dims};
use crate::ops::composite::{Made, defined, one};
use crate::ops::matmul::MatMul;
use crate::ops::{Attrs, Row};
use crate::tensor::{DType, Tensor};

/// ONNX `AffineGrid` (opset 20): matrices (N, 2, 3) or (N, 3, 4) and the size (N, C, H, W) or (N, C, D, H, W) of what is
/// sampled, known at plan time, to positions (N, H, W, 2) or (N, D, H, W, 3) in −1 … 1.
fn affine_grid(a: &Attrs, l: &mut Lowering) -> Made {
    let theta = l.x(0)?;
    let size = to_dims(&l.ints(1)?)?;
    let dims = l.dims(theta)?;
    let (&[n, k, columns], [samples, _, extents @ ..]) = (&*dims, &*size) else {
        return Err(OpError::Shape(format!("matrices {:?} with size {:?}", &dims[..], &size[..])));
    };
    if k != extents.len() || columns != k + 1 || n != *samples || !(2..=3).contains(&k) {
        return Err(OpError::Shape(format!("matrices {:?} with size {:?}", &dims[..], &size[..])));
    }
    let count = sized(DType::F64, &[extents, &[columns]].concat())?.len() / columns;
    let aligned = a.flag("align_corners")?;
    let position = |i: usize, n: usize| match (aligned, n) {
        (true, 1) => -1.0,
        (true, n) => 2.0 * i as f64 / (n - 1) as f64 - 1.0,
        (false, n) => (2 * i + 1) as f64 / n as f64 - 1.0,
    };
    // Rows (x, y, 1) or (x, y, z, 1): the last extent first.
    let mut base = Vec::with_capacity(count * columns);
    for p in 0..count {
        let mut rest = p;
        for n in extents.iter().rev() {
            base.push(position(rest % n, *n));
            rest /= n;
        }
        base.push(1.0);
    }
    let base = Tensor::from_slice(&[count, columns], &base)?.cast(l.dtype(theta)?);
    let base = l.constant(base);
    let turned = l.transpose(theta, &[0, 2, 1])?;
    let grid = l.emit(MatMul::default(), &[base, turned])?;
    let shape = [&[n], extents, &[k]].concat();
    one(l.reshape(grid, &shape))
}

pub(super) const ROWS: &[Row] = &[Row::new("AffineGrid", 20, |s| defined(s, "AffineGrid", 1, affine_grid))];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    let case = |name: &str| Case::new("AffineGrid", 20).named(name);
    vec![
        case("2-D").input(&[2, 2, 3]).fixed(Tensor::ints(&[2, 1, 3, 4])),
        case("3-D, aligned").int("align_corners", 1).input(&[1, 3, 4]).fixed(Tensor::ints(&[1, 2, 2, 3, 1])),
    ]
}
