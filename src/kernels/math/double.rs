//! The reference instance: `f64`, by `std`, and by series where that has none.

use super::Math;

/// erf to the last bits of f64: a series of positive terms near 0, the continued fraction of erfc beyond.
pub(super) fn erf64(x: f64) -> f64 {
    let a = x.abs();
    if x.is_nan() || a > 6.0 {
        return if x.is_nan() { x } else { 1f64.copysign(x) };
    }
    let z = a * a;
    let gauss = (-z).exp();
    let y = if a < 2.5 {
        // 2/√π e^(−x²) Σ 2ⁿ x²ⁿ⁺¹ / (2n+1)!!
        let (mut term, mut sum, mut n) = (a, a, 0.0);
        while term > sum * 1e-18 {
            n += 1.0;
            term *= 2.0 * z / (2.0 * n + 1.0);
            sum += term;
        }
        std::f64::consts::FRAC_2_SQRT_PI * gauss * sum
    } else {
        // erfc x = e^(−x²)/√π · 1/(x + (1/2)/(x + (2/2)/(x + (3/2)/(x + …))))
        let tail = (1..80).rev().fold(a, |f, k| a + 0.5 * k as f64 / f);
        1.0 - 0.5 * std::f64::consts::FRAC_2_SQRT_PI * gauss / tail
    };
    y.copysign(x)
}

impl Math for f64 {
    fn m_exp(self) -> f64 {
        self.exp()
    }
    fn m_expm1(self) -> f64 {
        self.exp_m1()
    }
    fn m_ln(self) -> f64 {
        self.ln()
    }
    fn m_ln1p(self) -> f64 {
        self.ln_1p()
    }
    fn m_tanh(self) -> f64 {
        self.tanh()
    }
    fn m_erf(self) -> f64 {
        erf64(self)
    }
    fn m_gauss(self) -> (f64, f64) {
        (0.5 * (1.0 + erf64(self * std::f64::consts::FRAC_1_SQRT_2)), (-0.5 * self * self).exp())
    }
    fn m_sigmoid(self) -> f64 {
        let e = (-self.abs()).exp();
        (if self < 0.0 { e } else { 1.0 }) / (1.0 + e)
    }
    fn m_weight(self) -> f64 {
        let e = self.exp();
        if e < f64::MIN_POSITIVE / f64::EPSILON { 0.0 } else { e }
    }
    fn m_pow(self, y: f64) -> f64 {
        self.powf(y)
    }
    fn m_sqrt(self) -> f64 {
        self.sqrt()
    }
    fn m_round(self) -> f64 {
        self.round_ties_even()
    }
    fn m_sin(self) -> f64 {
        self.sin()
    }
    fn m_cos(self) -> f64 {
        self.cos()
    }
    fn m_tan(self) -> f64 {
        self.tan()
    }
    fn m_asin(self) -> f64 {
        self.asin()
    }
    fn m_acos(self) -> f64 {
        self.acos()
    }
    fn m_atan(self) -> f64 {
        self.atan()
    }
    fn m_sinh(self) -> f64 {
        self.sinh()
    }
    fn m_cosh(self) -> f64 {
        self.cosh()
    }
    fn m_asinh(self) -> f64 {
        self.asinh()
    }
    fn m_acosh(self) -> f64 {
        self.acosh()
    }
    fn m_atanh(self) -> f64 {
        self.atanh()
    }
}
