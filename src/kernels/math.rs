//! Elementary functions. For `f32` they are branch-free polynomials in plain arithmetic: loops over them are
//! vectorised by the compiler, and their results are the same bits on every processor, which the C library's
//! are not. `f64` is the reference instance and goes through `std`.
//!
//! The polynomials are minimax fits (Lawson's algorithm over Chebyshev nodes) made for this file.
// (A function that is handed over as it is would not be inlined, and so be compiled without the instruction set.)
#![allow(clippy::redundant_closure)]

mod double;
mod staged;

use crate::kernels::isa::Wide;
use crate::tensor::Float;

/// Elementary functions of the two computing types. Errors of the `f32` forms are at most 2 ulp
/// (`m_pow`: 1 ulp); infinities, NaN, signed zeros, denormal arguments and results are those of IEEE 754 / C99.
pub trait Math: Float + Wide {
    fn m_exp(self) -> Self;
    /// `eˣ − 1`, accurate near 0.
    fn m_expm1(self) -> Self;
    fn m_ln(self) -> Self;
    /// `ln(1 + x)`, accurate near 0.
    fn m_ln1p(self) -> Self;
    fn m_tanh(self) -> Self;
    fn m_erf(self) -> Self;
    /// The standard normal distribution's `Φ(x)`, to 2e-7 of the smaller of Φ(x) and ½ up to |x| = 2.5 (`f32`), and
    /// `e^(−x²/2)`.
    fn m_gauss(self) -> (Self, Self);
    /// `1 / (1 + e⁻ˣ)`
    fn m_sigmoid(self) -> Self;
    /// `eˣ` of x ≤ 0, and 0 where that is below 2⁻¹⁰³ (`f32`), next to the 1 of the largest. Of a score that is masked by −100, it
    /// would be a subnormal number, and so would gradients of larger ones be: what makes or multiplies those takes a hundred times as
    /// long.
    fn m_weight(self) -> Self;
    /// `(x − less).m_exp()` of each.
    #[inline(always)]
    fn m_exps(x: &mut [Self], less: Self) {
        x.iter_mut().for_each(|x| *x = (*x - less).m_exp());
    }
    /// `(x − less).m_weight()` of each.
    #[inline(always)]
    fn m_weights(x: &mut [Self], less: Self) {
        x.iter_mut().for_each(|x| *x = (*x - less).m_weight());
    }
    /// `y = f(x, v, x.m_gauss())` of each.
    #[inline(always)]
    fn m_gausses(y: &mut [Self], [x, v]: [&[Self]; 2], f: impl Fn(Self, Self, (Self, Self)) -> Self) {
        for ((y, x), v) in y.iter_mut().zip(x).zip(v) {
            *y = f(*x, *v, x.m_gauss());
        }
    }
    /// `y = f(x, v, z(x).m_sigmoid())` of each.
    #[inline(always)]
    fn m_sigmoids(
        y: &mut [Self],
        [x, v]: [&[Self]; 2],
        z: impl Fn(Self) -> Self,
        f: impl Fn(Self, Self, Self) -> Self,
    ) {
        for ((y, x), v) in y.iter_mut().zip(x).zip(v) {
            *y = f(*x, *v, z(*x).m_sigmoid());
        }
    }
    /// `y = f(x, v, z(x).m_tanh())` of each.
    #[inline(always)]
    fn m_tanhs(
        y: &mut [Self],
        [x, v]: [&[Self]; 2],
        z: impl Fn(Self) -> Self,
        f: impl Fn(Self, Self, Self) -> Self,
    ) {
        for ((y, x), v) in y.iter_mut().zip(x).zip(v) {
            *y = f(*x, *v, z(*x).m_tanh());
        }
    }
    fn m_pow(self, y: Self) -> Self;
    /// Correctly rounded.
    fn m_sqrt(self) -> Self;
    /// To the nearest integer, halves to even.
    fn m_round(self) -> Self;
    fn m_sin(self) -> Self;
    fn m_cos(self) -> Self;
    fn m_tan(self) -> Self;
    fn m_asin(self) -> Self;
    fn m_acos(self) -> Self;
    fn m_atan(self) -> Self;
    fn m_sinh(self) -> Self;
    fn m_cosh(self) -> Self;
    fn m_asinh(self) -> Self;
    fn m_acosh(self) -> Self;
    fn m_atanh(self) -> Self;
}

const LN2_HI: f32 = 0.693_359_4; // 355/512: times any exponent it is exact
const LN2_LO: f32 = -2.121_944_4e-4;
/// Added to and subtracted from a float, rounds it to an integer that then stands in the low bits.
const ROUND32: f32 = 12_582_912.0; // 1.5 · 2²³
const ROUND64: f64 = 6_755_399_441_055_744.0; // 1.5 · 2⁵²

/// `Σ cᵢ xⁱ`
macro_rules! poly {
    ($x:expr, $c:expr) => {{
        let (x, c) = ($x, $c);
        let mut p = c[c.len() - 1];
        let mut i = c.len() - 1;
        while i > 0 {
            i -= 1;
            p = p * x + c[i];
        }
        p
    }};
}

/// 2ⁿ for −126 ≤ n ≤ 127.
#[inline(always)]
fn pow2(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// `x = n ln 2 + r`, |r| ≤ ln 2 / 2: n as rounding leaves it, and r.
#[inline(always)]
fn reduce(x: f32) -> (f32, f32) {
    let t = x * std::f32::consts::LOG2_E + ROUND32;
    let k = t - ROUND32;
    (t, (x - k * LN2_HI) - k * LN2_LO)
}

/// n.
#[inline(always)]
fn exponent(t: f32) -> i32 {
    (t.to_bits() as i32).wrapping_sub(ROUND32.to_bits() as i32)
}

/// eʳ − 1.
#[inline(always)]
fn expm1_near(r: f32) -> f32 {
    const Q: [f32; 6] = [0.5, 0.166_666_67, 0.041_666_355, 0.008_333_273, 0.001_394_103_6, 0.000_199_142_1];
    r * r * poly!(r, Q) + r
}

/// n and eʳ − 1.
#[inline(always)]
fn reduce_exp(x: f32) -> (i32, f32) {
    let (t, r) = reduce(x);
    (exponent(t), expm1_near(r))
}

/// `x` within `low..=high`; NaN stays NaN.
#[inline(always)]
fn clamp(x: f32, low: f32, high: f32) -> f32 {
    let x = if x < low { low } else { x };
    if x > high { high } else { x }
}

/// Beyond these the result is 0 or infinite.
#[inline(always)]
fn exp_range(x: f32) -> f32 {
    clamp(x, -105.0, 90.0)
}

/// `(1 + p)·2ⁿ`, the scale in two factors so that denormal results are rounded once and 2¹²⁸ is never needed.
#[inline(always)]
fn scaled(n: i32, p: f32) -> f32 {
    let half = n >> 1;
    (1.0 + p) * pow2(half) * pow2(n.wrapping_sub(half))
}

/// The same for n of whose scale there is one factor.
#[inline(always)]
fn whole_scaled(n: i32, p: f32) -> f32 {
    (1.0 + p) * pow2(n)
}

#[inline(always)]
fn exp32(x: f32) -> f32 {
    let (n, p) = reduce_exp(exp_range(x));
    scaled(n, p)
}

/// What is less makes no weight, nor a denormal number.
#[inline(always)]
fn weight_range(x: f32) -> f32 {
    if x < -72.0 { -72.0 } else { x }
}

#[inline(always)]
fn weight_of(n: i32, p: f32) -> f32 {
    let e = whole_scaled(n, p);
    if e < f32::MIN_POSITIVE / f32::EPSILON { 0.0 } else { e }
}

#[inline(always)]
fn expm1_32(x: f32) -> f32 {
    let (n, p) = reduce_exp(clamp(x, -40.0, 90.0));
    // eˣ − 1 = 2ⁿ (p + 1 − 2⁻ⁿ); beyond n = 64 the last term no longer counts.
    let back = pow2(if n > 64 { -64 } else { n.wrapping_neg() });
    let half = n >> 1;
    let y = (p + (1.0 - back)) * pow2(half) * pow2(n.wrapping_sub(half));
    if x == 0.0 { x } else { y }
}

#[inline(always)]
fn ln32(x: f32) -> f32 {
    const R: [f32; 9] = [
        0.333_333_1,
        -0.249_999_87,
        0.200_022_27,
        -0.166_692_5,
        0.142_186_55,
        -0.123_843_7,
        0.118_730_165,
        -0.117_896_96,
        0.069_151_47,
    ];
    let small = x < f32::MIN_POSITIVE;
    let scaled = if small { x * 8_388_608.0 } else { x };
    let bits = scaled.to_bits() as i32;
    // Exponent e and fraction m in √½..√2.
    let e = bits.wrapping_sub(std::f32::consts::FRAC_1_SQRT_2.to_bits() as i32) >> 23;
    let f = f32::from_bits(bits.wrapping_sub(e << 23) as u32) - 1.0;
    let e = e as f32 - if small { 23.0 } else { 0.0 };
    let f2 = f * f;
    let y = f2 * f * poly!(f, R) + e * LN2_LO;
    let y = ((y - 0.5 * f2) + f) + e * LN2_HI;
    let y = if x == f32::INFINITY { x } else { y };
    let y = if x == 0.0 { f32::NEG_INFINITY } else { y };
    if x < 0.0 || x.is_nan() { f32::NAN } else { y }
}

#[inline(always)]
fn ln1p_32(x: f32) -> f32 {
    let w = 1.0 + x;
    // What rounding 1 + x lost is put back to first order.
    let y = ln32(w) + (x - (w - 1.0)) / w;
    let y = if x == f32::INFINITY { x } else { y };
    let y = if x == -1.0 { f32::NEG_INFINITY } else { y };
    if x.abs() < 1e-8 { x } else { y }
}

/// 2|x|, as far as it counts for [`tanh_of`].
#[inline(always)]
fn tanh_power(x: f32) -> f32 {
    clamp(2.0 * x.abs(), 0.0, 20.0)
}

/// tanh x, given `e^(2|x|)`.
#[inline(always)]
fn tanh_of(x: f32, e: f32) -> f32 {
    // (tanh x − x) / x³ in powers of x², up to |x| = 0.63.
    const SMALL: [f32; 5] = [-0.333_332_75, 0.133_312_75, -0.053_725_127, 0.020_589_827, -0.005_648_316];
    let large = 1.0 - 2.0 / (1.0 + e);
    let z = x * x;
    let small = x + x * (z * poly!(z, SMALL));
    let y = if x.abs() < 0.62 { small } else { large };
    if x.is_nan() { x } else { y.copysign(x) }
}

#[inline(always)]
fn erf32(x: f32) -> f32 {
    // (erf x − x) / x in powers of x², up to |x| = 0.9.
    const SMALL: [f32; 6] =
        [0.128_379_15, -0.376_125_16, 0.112_820_63, -0.026_775_916, 0.005_007_304, -6.065_226e-4];
    // ln erfc(x) for 0.9 ≤ x ≤ 4.
    const LARGE: [f32; 7] = [
        -1.664_477_7e-4,
        -1.127_797_2,
        -0.636_976_06,
        -0.104_113_676,
        0.022_315_213,
        -0.003_065_490_2,
        1.982_196_6e-4,
    ];
    let a = clamp(x.abs(), 0.0, 4.0);
    let (n, p) = reduce_exp(poly!(a, LARGE));
    let large = (1.0 - whole_scaled(n, p)).copysign(x);
    let small = x + x * poly!(a * a, SMALL);
    let y = if a < 0.9 { small } else { large };
    if x.is_nan() { x } else { y }
}

/// −x²/2
#[inline(always)]
fn gauss_power(x: f32) -> f32 {
    // Beyond this the scale is 2⁻¹²⁷, which `pow2` makes 0.
    let s = 0.5 * x * x;
    -if s > 88.03 { 88.03 } else { s }
}

/// What [`gauss_cdf`] takes powers of.
#[inline(always)]
fn gauss_share(x: f32) -> f32 {
    const C: f32 = 0.29;
    1.0 / (1.0 + C * x.abs())
}

/// Φ(x), given `e^(−x²/2)` and the share: `Φ(−a) = e^(−a²/2) · R(a)` for a ≥ 0. There is no cancellation in either tail, and one
/// exponential for Φ and its density.
#[inline(always)]
fn gauss_cdf(x: f32, e: f32, share: f32) -> f32 {
    // R in powers of the share, from the first on.
    const R: [f32; 8] = [
        0.115_531_53,
        0.118_471_466,
        0.086_027_175,
        0.164_551_06,
        -0.121_508_636,
        0.281_059_27,
        -0.181_144_43,
        0.037_012_56,
    ];
    let tail = e * (share * poly!(share, R));
    if x < 0.0 { tail } else { 1.0 - tail }
}

/// Φ(x) and `e^(−x²/2)`.
#[inline(always)]
fn gauss32(x: f32) -> (f32, f32) {
    let (n, p) = reduce_exp(gauss_power(x));
    let e = whole_scaled(n, p);
    (gauss_cdf(x, e, gauss_share(x)), e)
}

/// `1 / (1 + e⁻ˣ)`, given `e^−|x|`.
#[inline(always)]
fn sigmoid_of(x: f32, e: f32) -> f32 {
    let y = (if x < 0.0 { e } else { 1.0 }) / (1.0 + e);
    // Of a small e the quotient's error counts less so.
    if x < -1.0 { e - e * y } else { y }
}

/// xʸ by f64 arithmetic, where logarithm and power are cheap to have more accurate than f32.
#[inline(always)]
fn pow32(x: f32, y: f32) -> f32 {
    const LN: [f64; 6] = [
        1.999_999_999_999_946_5,
        0.666_666_666_796_595_7,
        0.399_999_948_702_641_1,
        0.285_721_682_357_207_1,
        0.221_741_670_929_494_68,
        0.196_092_404_536_654_05,
    ];
    const EXP2: [f64; 8] = [
        0.999_999_999_961_681_8,
        0.693_147_180_728_448,
        0.240_226_511_981_575_07,
        0.055_504_103_534_441_93,
        0.009_618_027_253_682_34,
        0.001_333_392_256_671_777,
        1.546_929_113_798_424e-4,
        1.520_192_084_737_179_5e-5,
    ];
    const MANTISSA: u64 = (1 << 52) - 1;
    const ONE: u64 = 1.0f64.to_bits();
    let (ax, y64) = (x.abs() as f64, y as f64);
    let bits = ax.to_bits();
    let m = f64::from_bits((bits & MANTISSA) | ONE);
    // The biased exponent as a float, by placing it in the low bits of 2⁵².
    let e = f64::from_bits((bits >> 52) | (1075 << 52)) - (4_503_599_627_370_496.0 + 1023.0);
    let big = m > std::f64::consts::SQRT_2;
    let (m, e) = (if big { 0.5 * m } else { m }, if big { e + 1.0 } else { e });
    let s = (m - 1.0) / (m + 1.0);
    let log2 = e + s * poly!(s * s, LN) * std::f64::consts::LOG2_E;
    let log2 = if ax == 0.0 { f64::NEG_INFINITY } else { log2 };
    let log2 = if ax == f64::INFINITY { ax } else { log2 };
    let log2 = if x.is_nan() { f64::NAN } else { log2 };
    let p = y64 * log2;
    let p = if p < -200.0 { -200.0 } else { p };
    let p = if p > 200.0 { 200.0 } else { p };
    let t = p + ROUND64;
    let scale = f64::from_bits((t.to_bits() << 52).wrapping_add(ONE));
    let r = (poly!(p - (t - ROUND64), EXP2) * scale) as f32;
    let r = if p.is_nan() { f32::NAN } else { r };

    let u = y64 + ROUND64;
    let whole = u - ROUND64 == y64;
    let odd = whole && y.abs() < 16_777_216.0 && u.to_bits() & 1 == 1;
    let r = if x.is_sign_negative() && odd { -r } else { r };
    let r = if x < 0.0 && x > f32::NEG_INFINITY && !whole { f32::NAN } else { r };
    let unit = x == 1.0 || y == 0.0 || (x == -1.0 && y.is_infinite());
    if unit { 1.0 } else { r }
}

/// sin(x + quarter·π/2), by f64 arithmetic; arguments beyond a million by `std`.
#[inline(always)]
fn sin32(x: f32, quarter: u64) -> f32 {
    const SIN: [f64; 4] = [
        -0.166_666_666_407_972_04,
        0.008_333_329_304_856_7,
        -1.983_931_227_325_782_2e-4,
        2.718_121_658_595_426e-6,
    ];
    const COS: [f64; 4] = [
        0.041_666_666_619_488_92,
        -0.001_388_888_349_992_183_5,
        2.479_946_012_363_886_4e-5,
        -2.720_575_221_712_895e-7,
    ];
    if x.abs() > 1e6 {
        let x = x as f64;
        return if quarter == 0 { x.sin() as f32 } else { x.cos() as f32 };
    }
    let x64 = x as f64;
    let t = x64 * std::f64::consts::FRAC_2_PI + ROUND64;
    let k = t - ROUND64;
    // π/2 in two parts, the first short enough for exact products.
    let r = (x64 - k * 1.570_796_326_734_125_6) - k * 6.077_100_506_506_192e-11;
    let z = r * r;
    let sin = r + r * z * poly!(z, SIN);
    let cos = 1.0 - 0.5 * z + z * z * poly!(z, COS);
    let n = t.to_bits().wrapping_add(quarter);
    let y = if n & 1 == 0 { sin } else { cos };
    let y = (if n & 2 == 0 { y } else { -y }) as f32;
    if x == 0.0 && quarter == 0 { x } else { y }
}

impl Math for f32 {
    #[inline(always)]
    fn m_exp(self) -> f32 {
        exp32(self)
    }
    #[inline(always)]
    fn m_expm1(self) -> f32 {
        expm1_32(self)
    }
    #[inline(always)]
    fn m_ln(self) -> f32 {
        ln32(self)
    }
    #[inline(always)]
    fn m_ln1p(self) -> f32 {
        ln1p_32(self)
    }
    #[inline(always)]
    fn m_tanh(self) -> f32 {
        let (n, p) = reduce_exp(tanh_power(self));
        tanh_of(self, whole_scaled(n, p))
    }
    #[inline(always)]
    fn m_erf(self) -> f32 {
        erf32(self)
    }
    #[inline(always)]
    fn m_gauss(self) -> (f32, f32) {
        gauss32(self)
    }
    #[inline(always)]
    fn m_sigmoid(self) -> f32 {
        sigmoid_of(self, exp32(-self.abs()))
    }
    #[inline(always)]
    fn m_weight(self) -> f32 {
        let (n, p) = reduce_exp(weight_range(self));
        weight_of(n, p)
    }
    #[inline(always)]
    fn m_exps(x: &mut [f32], less: f32) {
        staged::exponentials(
            x,
            #[inline(always)]
            |x| exp_range(x - less),
            #[inline(always)]
            |n, p| scaled(n, p),
        );
    }
    #[inline(always)]
    fn m_weights(x: &mut [f32], less: f32) {
        staged::exponentials(
            x,
            #[inline(always)]
            |x| weight_range(x - less),
            #[inline(always)]
            |n, p| weight_of(n, p),
        );
    }
    #[inline(always)]
    fn m_gausses(y: &mut [f32], operands: [&[f32]; 2], f: impl Fn(f32, f32, (f32, f32)) -> f32) {
        staged::gausses(y, operands, f);
    }
    #[inline(always)]
    fn m_sigmoids(
        y: &mut [f32],
        operands: [&[f32]; 2],
        z: impl Fn(f32) -> f32,
        f: impl Fn(f32, f32, f32) -> f32,
    ) {
        staged::of_exponentials(
            y,
            operands,
            #[inline(always)]
            |x| exp_range(-z(x).abs()),
            #[inline(always)]
            |n, p| scaled(n, p),
            #[inline(always)]
            |x, v, e| f(x, v, sigmoid_of(z(x), e)),
        );
    }
    #[inline(always)]
    fn m_tanhs(
        y: &mut [f32],
        operands: [&[f32]; 2],
        z: impl Fn(f32) -> f32,
        f: impl Fn(f32, f32, f32) -> f32,
    ) {
        staged::of_exponentials(
            y,
            operands,
            #[inline(always)]
            |x| tanh_power(z(x)),
            #[inline(always)]
            |n, p| whole_scaled(n, p),
            #[inline(always)]
            |x, v, e| f(x, v, tanh_of(z(x), e)),
        );
    }
    #[inline(always)]
    fn m_pow(self, y: f32) -> f32 {
        pow32(self, y)
    }
    #[inline(always)]
    fn m_sqrt(self) -> f32 {
        self.sqrt()
    }
    #[inline(always)]
    fn m_round(self) -> f32 {
        self.round_ties_even()
    }
    #[inline(always)]
    fn m_sin(self) -> f32 {
        sin32(self, 0)
    }
    #[inline(always)]
    fn m_cos(self) -> f32 {
        sin32(self, 1)
    }
    // Rare in networks: computed in f64, an element at a time.
    fn m_tan(self) -> f32 {
        (self as f64).tan() as f32
    }
    fn m_asin(self) -> f32 {
        (self as f64).asin() as f32
    }
    fn m_acos(self) -> f32 {
        (self as f64).acos() as f32
    }
    fn m_atan(self) -> f32 {
        (self as f64).atan() as f32
    }
    fn m_sinh(self) -> f32 {
        (self as f64).sinh() as f32
    }
    fn m_cosh(self) -> f32 {
        (self as f64).cosh() as f32
    }
    fn m_asinh(self) -> f32 {
        (self as f64).asinh() as f32
    }
    fn m_acosh(self) -> f32 {
        (self as f64).acosh() as f32
    }
    fn m_atanh(self) -> f32 {
        (self as f64).atanh() as f32
    }
}

#[cfg(test)]
mod tests;
