//! Element types: ONNX's, and the Rust types that stand for them.

use std::fmt;

use bytemuck::Pod;
use half::{bf16, f16};

/// Element type, by ONNX's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DType {
    F32,
    F64,
    F16,
    BF16,
    I8,
    I16,
    I32,
    I64,
    U8,
    U16,
    U32,
    U64,
    Bool,
    /// Stored and converted, not computed with (see `narrow`); a byte an element in memory.
    F8E4M3Fn,
    F8E4M3Fnuz,
    F8E5M2,
    F8E5M2Fnuz,
    F8E8M0,
    F4E2M1,
    U4,
    I4,
    U2,
    I2,
}

impl DType {
    /// Size of one element in bytes.
    pub fn size(self) -> usize {
        match self {
            DType::I8 | DType::U8 | DType::Bool => 1,
            DType::F8E4M3Fn
            | DType::F8E4M3Fnuz
            | DType::F8E5M2
            | DType::F8E5M2Fnuz
            | DType::F8E8M0
            | DType::F4E2M1
            | DType::U4
            | DType::I4
            | DType::U2
            | DType::I2 => 1,
            DType::F16 | DType::BF16 | DType::I16 | DType::U16 => 2,
            DType::F32 | DType::I32 | DType::U32 => 4,
            DType::F64 | DType::I64 | DType::U64 => 8,
        }
    }

    /// All but the narrow ones.
    #[cfg(test)]
    pub(crate) const WIDE: [DType; 13] = {
        use DType::*;
        [F32, F64, F16, BF16, I8, I16, I32, I64, U8, U16, U32, U64, Bool]
    };

    pub fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::F64 | DType::F16 | DType::BF16)
    }

    /// Do a tensor's bytes read as elements of `elem`?
    pub fn reads_as(self, elem: DType) -> bool {
        self == elem
            || match elem {
                DType::U8 => {
                    self == DType::Bool || self.is_narrow() && !matches!(self, DType::I4 | DType::I2)
                }
                DType::I8 => matches!(self, DType::I4 | DType::I2),
                _ => false,
            }
    }

    /// The type values of this type are computed in: half types are widened to `F32`.
    pub fn working(self) -> DType {
        match self {
            DType::F16 | DType::BF16 => DType::F32,
            other => other,
        }
    }

    /// From `TensorProto.DataType`; `None` for strings and complex numbers.
    pub fn from_onnx(code: i32) -> Option<DType> {
        Some(match code {
            1 => DType::F32,
            2 => DType::U8,
            3 => DType::I8,
            4 => DType::U16,
            5 => DType::I16,
            6 => DType::I32,
            7 => DType::I64,
            9 => DType::Bool,
            10 => DType::F16,
            11 => DType::F64,
            12 => DType::U32,
            13 => DType::U64,
            16 => DType::BF16,
            17 => DType::F8E4M3Fn,
            18 => DType::F8E4M3Fnuz,
            19 => DType::F8E5M2,
            20 => DType::F8E5M2Fnuz,
            24 => DType::F8E8M0,
            23 => DType::F4E2M1,
            21 => DType::U4,
            22 => DType::I4,
            25 => DType::U2,
            26 => DType::I2,
            _ => return None,
        })
    }

    /// The `TensorProto.DataType` code.
    pub fn to_onnx(self) -> i32 {
        match self {
            DType::F32 => 1,
            DType::U8 => 2,
            DType::I8 => 3,
            DType::U16 => 4,
            DType::I16 => 5,
            DType::I32 => 6,
            DType::I64 => 7,
            DType::Bool => 9,
            DType::F16 => 10,
            DType::F64 => 11,
            DType::U32 => 12,
            DType::U64 => 13,
            DType::BF16 => 16,
            DType::F8E4M3Fn => 17,
            DType::F8E4M3Fnuz => 18,
            DType::F8E5M2 => 19,
            DType::F8E5M2Fnuz => 20,
            DType::F8E8M0 => 24,
            DType::F4E2M1 => 23,
            DType::U4 => 21,
            DType::I4 => 22,
            DType::U2 => 25,
            DType::I2 => 26,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "float32",
            DType::F64 => "float64",
            DType::F16 => "float16",
            DType::BF16 => "bfloat16",
            DType::I8 => "int8",
            DType::I16 => "int16",
            DType::I32 => "int32",
            DType::I64 => "int64",
            DType::U8 => "uint8",
            DType::U16 => "uint16",
            DType::U32 => "uint32",
            DType::U64 => "uint64",
            DType::Bool => "bool",
            DType::F8E4M3Fn => "float8e4m3fn",
            DType::F8E4M3Fnuz => "float8e4m3fnuz",
            DType::F8E5M2 => "float8e5m2",
            DType::F8E5M2Fnuz => "float8e5m2fnuz",
            DType::F8E8M0 => "float8e8m0",
            DType::F4E2M1 => "float4e2m1",
            DType::U4 => "uint4",
            DType::I4 => "int4",
            DType::U2 => "uint2",
            DType::I2 => "int2",
        })
    }
}

/// A Rust type that can be a tensor's element. `u8` also reads and writes `Bool` (0 or 1), unsigned narrow integers and
/// the bits of narrow floats, `i8` signed narrow integers.
pub trait Elem: Pod + PartialOrd + fmt::Debug + Send + Sync + Default + 'static {
    const DTYPE: DType;
}

macro_rules! elem {
    ($($t:ty => $d:ident),*) => { $(impl Elem for $t { const DTYPE: DType = DType::$d; })* };
}
elem!(f32 => F32, f64 => F64, f16 => F16, bf16 => BF16, i8 => I8, i16 => I16, i32 => I32, i64 => I64,
      u8 => U8, u16 => U16, u32 => U32, u64 => U64);

/// The element types in which floating-point kernels compute: `f32`, and `f64` as the reference.
pub trait Float: Elem + num_traits::Float + num_traits::NumAssign + std::iter::Sum {
    fn of(x: f64) -> Self;
    fn to64(self) -> f64;
}
impl Float for f32 {
    #[inline(always)]
    fn of(x: f64) -> Self {
        x as f32
    }
    #[inline(always)]
    fn to64(self) -> f64 {
        self as f64
    }
}
impl Float for f64 {
    #[inline(always)]
    fn of(x: f64) -> Self {
        x
    }
    #[inline(always)]
    fn to64(self) -> f64 {
        self
    }
}

/// Runs `$body` with `$t` bound to the Rust type that stands for a dtype in the list.
#[doc(hidden)]
#[macro_export]
macro_rules! dispatch {
    ($dtype:expr, $t:ident => $body:expr, [$($($d:ident)|+ : $of:ty),*] $(, $other:ident => $else:expr)?) => {
        match $dtype {
            $($($crate::tensor::DType::$d)|+ => {
                type $t = $of;
                $body
            })*
            $($other => $else,)?
        }
    };
}

/// Runs `$body` with `$t` bound to `f32` or `f64`, or fails with a type error.
#[macro_export]
macro_rules! float_dispatch {
    ($dtype:expr, $t:ident => $body:expr) => {
        $crate::dispatch!(
            $dtype, $t => $body, [F32: f32, F64: f64],
            other => Err($crate::error::OpError::Type(format!("{other} where float32 or float64 is computed")))
        )
    };
}

/// Runs `$body` with `$t` bound to the element type of any dtype (see [`Elem`](crate::tensor::Elem)), halves included.
#[macro_export]
macro_rules! dtype_dispatch {
    ($dtype:expr, $t:ident => $body:expr) => {
        $crate::dispatch!(
            $dtype, $t => $body,
            [
                F32: f32, F64: f64, F16: half::f16, BF16: half::bf16,
                I8 | I4 | I2: i8, I16: i16, I32: i32, I64: i64,
                U8 | Bool | U4 | U2 | F8E4M3Fn | F8E4M3Fnuz | F8E5M2 | F8E5M2Fnuz | F8E8M0 | F4E2M1: u8,
                U16: u16, U32: u32, U64: u64
            ]
        )
    };
}

/// Runs `$body` with `$t` bound to the unsigned integer of the element's size: enough for moving elements.
macro_rules! by_size {
    ($dtype:expr, $t:ident => $body:expr) => {
        match $dtype.size() {
            1 => {
                type $t = u8;
                $body
            }
            2 => {
                type $t = u16;
                $body
            }
            4 => {
                type $t = u32;
                $body
            }
            _ => {
                type $t = u64;
                $body
            }
        }
    };
}
pub(crate) use by_size;
