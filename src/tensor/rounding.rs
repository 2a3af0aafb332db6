//! Rounding to half precision from float64.

use half::{bf16, f16};

/// Rounded to nearest, ties to even; what overflows becomes infinite.
pub fn to_f16(x: f64) -> f16 {
    f16::from_f32(to_odd(x))
}

/// Rounded to nearest, ties to even; what overflows becomes infinite.
pub fn to_bf16(x: f64) -> bf16 {
    bf16::from_f32(to_odd(x))
}

/// `x` cut to float32, with the last bit set where anything was cut off: rounded on to fewer bits it comes out as `x`
/// itself would (rounding to odd; Boldo and Melquiond, *When double rounding is odd*, 2005). The `half` crate rounds
/// float64 without its last 32 bits, and takes for ties what is none.
fn to_odd(x: f64) -> f32 {
    let nearest = x as f32;
    if f64::from(nearest) == x || !nearest.is_finite() {
        return nearest;
    }
    let away = f64::from(nearest).abs() > x.abs();
    f32::from_bits((nearest.to_bits() - u32::from(away)) | 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_almost_a_tie_is_none() {
        // One above, and one below, the middle between neighbours.
        let tie = 1.0 + 1.0 / 256.0;
        for tiny in [2f64.powi(-23), 2f64.powi(-40), 2f64.powi(-52)] {
            assert_eq!(to_bf16(tie + tiny).to_f64(), 1.0 + 1.0 / 128.0);
            assert_eq!(to_bf16(tie - tiny).to_f64(), 1.0);
            assert_eq!(to_f16(1.0 + 1.0 / 2048.0 + tiny).to_f64(), 1.0 + 1.0 / 1024.0);
            assert_eq!(to_f16(-1.0 - 1.0 / 2048.0 + tiny).to_f64(), -1.0);
        }
        assert_eq!(to_bf16(tie).to_f64(), 1.0);
        assert_eq!(to_bf16(tie + 1.0 / 128.0).to_f64(), 1.0 + 2.0 / 128.0);
    }

    #[test]
    fn the_ends() {
        assert_eq!(to_bf16(-0.0).to_bits(), 0x8000);
        assert_eq!(to_f16(1e-300).to_bits(), 0);
        assert_eq!(to_f16(-1e-300).to_bits(), 0x8000);
        assert_eq!(to_bf16(1e300), bf16::INFINITY);
        assert_eq!(to_f16(65519.999), f16::MAX);
        assert_eq!(to_f16(65520.0), f16::INFINITY);
        assert!(to_f16(f64::NAN).is_nan() && to_bf16(f64::NAN).is_nan());
    }
}
