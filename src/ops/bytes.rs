//! What the operators that only move data share: element sizes instead of element types, shape-like
//! operands, and dimensions checked against overflow.

use bytemuck::Pod;
use smallvec::SmallVec;

use crate::error::OpError;
use crate::tensor::{DType, Dims, Meta, View};

/// Integers of a shape-like operand; on the stack for any usual rank.
pub(super) type Ints = SmallVec<[i64; 8]>;

pub(super) use crate::tensor::by_size;

/// Runs `$body` with `$t` bound to a type with arithmetic, or fails with a type error (halves, bool).
macro_rules! numeric {
    ($dtype:expr, $t:ident => $body:expr) => {
        $crate::dispatch!(
            $dtype, $t => $body,
            [F32: f32, F64: f64, I8: i8, I16: i16, I32: i32, I64: i64, U8: u8, U16: u16, U32: u32, U64: u64],
            other => Err($crate::error::OpError::Type(format!("arithmetic on {other}")))
        )
    };
}
pub(super) use numeric;

pub(super) fn units<T: Pod>(bytes: &[u8]) -> Result<&[T], OpError> {
    bytemuck::try_cast_slice(bytes).map_err(|e| OpError::Internal(format!("view by element size: {e}")))
}

pub(super) fn units_mut<T: Pod>(bytes: &mut [u8]) -> Result<&mut [T], OpError> {
    bytemuck::try_cast_slice_mut(bytes).map_err(|e| OpError::Internal(format!("view by element size: {e}")))
}

/// The integers of an int32 or int64 operand.
pub(super) fn ints(v: &View) -> Result<Ints, OpError> {
    match v.dtype {
        DType::I64 => Ok(Ints::from_slice(v.get::<i64>()?)),
        DType::I32 => Ok(v.get::<i32>()?.iter().map(|&x| x as i64).collect()),
        other => Err(OpError::Type(format!("{other} where int32 or int64 is needed"))),
    }
}

/// Element type and shape of an output whose size depends on values in the file: refused where no machine
/// could hold it.
pub(super) fn sized(dtype: DType, dims: &[usize]) -> Result<Meta, OpError> {
    let meta = Meta::new(dtype, dims);
    meta.check_size().map(|()| meta)
}

/// Elements of a tensor that is computed with the plan, of a size that the file chooses.
pub(super) fn foreseen(dims: &[usize]) -> Result<usize, OpError> {
    let n = dims.iter().try_fold(1usize, |n, d| n.checked_mul(*d)).filter(|n| *n <= 1 << 27);
    n.ok_or_else(|| OpError::Shape(format!("a constant tensor of shape {dims:?} is too large")))
}

/// Dimensions given as integers of the file.
pub(super) fn to_dims(ints: &[i64]) -> Result<Dims, OpError> {
    ints.iter()
        .map(|&d| usize::try_from(d).map_err(|_| OpError::Shape(format!("negative dimension in {ints:?}"))))
        .collect()
}

/// Two operands must be of one type.
pub(super) fn same_type(a: DType, b: DType) -> Result<(), OpError> {
    if a == b { Ok(()) } else { Err(OpError::Type(format!("operands of types {a} and {b}"))) }
}

pub(super) fn second_derivative<T>() -> Result<T, OpError> {
    Err(OpError::NotDifferentiable("second derivatives are not supported".into()))
}
