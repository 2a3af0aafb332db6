//! Integer arithmetic as ONNX and numpy have it: wrapping, and never a panic.

use crate::tensor::Elem;

/// An integer element type.
pub trait Integer: Elem + Ord {
    fn add(self, b: Self) -> Self;
    fn sub(self, b: Self) -> Self;
    fn mul(self, b: Self) -> Self;
    /// Towards zero; by zero it is 0.
    fn div(self, b: Self) -> Self;
    /// Remainder with the dividend's sign; by zero it is 0.
    fn rem(self, b: Self) -> Self;
    /// Remainder with the divisor's sign; by zero it is 0.
    fn modulo(self, b: Self) -> Self;
    /// Wrapping; of a negative exponent the truncated result (0, or ±1 for ±1).
    fn power(self, b: Self) -> Self;
    fn wide(self) -> i128;
    /// The low bits.
    fn narrow(x: i128) -> Self;
}

macro_rules! integers {
    ($($t:ty),*) => { $(
        impl Integer for $t {
            fn add(self, b: Self) -> Self {
                self.wrapping_add(b)
            }
            fn sub(self, b: Self) -> Self {
                self.wrapping_sub(b)
            }
            fn mul(self, b: Self) -> Self {
                self.wrapping_mul(b)
            }
            fn div(self, b: Self) -> Self {
                if b == 0 { 0 } else { self.wrapping_div(b) }
            }
            fn rem(self, b: Self) -> Self {
                if b == 0 { 0 } else { self.wrapping_rem(b) }
            }
            fn modulo(self, b: Self) -> Self {
                let r = self.rem(b);
                if r != 0 && (r as i128 ^ b as i128) < 0 { r.wrapping_add(b) } else { r }
            }
            fn power(self, b: Self) -> Self {
                let mut n = b.wide();
                if n < 0 {
                    return match self.wide() {
                        1 => 1,
                        -1 => if n % 2 == 0 { 1 } else { self },
                        _ => 0,
                    };
                }
                let (mut base, mut y): (Self, Self) = (self, 1);
                while n > 0 {
                    if n & 1 == 1 {
                        y = y.wrapping_mul(base);
                    }
                    base = base.wrapping_mul(base);
                    n >>= 1;
                }
                y
            }
            fn wide(self) -> i128 {
                self as i128
            }
            fn narrow(x: i128) -> Self {
                x as $t
            }
        }
    )* };
}
integers!(i8, i16, i32, i64, u8, u16, u32, u64);

/// Runs `$body` with `$t` bound to the integer type of a dtype (not bool), or fails with a type error.
#[macro_export]
macro_rules! int_dispatch {
    ($dtype:expr, $t:ident => $body:expr) => {
        $crate::dispatch!(
            $dtype, $t => $body,
            [I8: i8, I16: i16, I32: i32, I64: i64, U8: u8, U16: u16, U32: u32, U64: u64],
            other => Err($crate::error::OpError::Type(format!("{other} where numbers are computed")))
        )
    };
}
