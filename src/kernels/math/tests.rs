//! Errors against `f64`.

use super::double::erf64;
use super::*;

/// Largest error in ulp of the f32 result over a dense sample of all floats (every 10 007th).
fn worst(f: impl Fn(f32) -> f32, exact: impl Fn(f64) -> f64) -> (f64, f32) {
    let mut worst = (0.0f64, 0.0f32);
    let mut bits = 0u32;
    loop {
        let x = f32::from_bits(bits);
        let (got, want) = (f(x), exact(x as f64));
        let e = error(got, want);
        if e > worst.0 {
            worst = (e, x);
        }
        match bits.checked_add(10_007) {
            Some(b) => bits = b,
            None => return worst,
        }
    }
}

fn error(got: f32, want: f64) -> f64 {
    let rounded = want as f32;
    if want.is_nan() || got.is_nan() {
        return if want.is_nan() && got.is_nan() { 0.0 } else { f64::INFINITY };
    }
    if !rounded.is_finite() || !got.is_finite() {
        // One ulp around the largest float is as good as infinite.
        return if rounded == got || rounded.abs().min(got.abs()) > 3.4028e38 { 0.0 } else { f64::INFINITY };
    }
    // The distance of floats where the exact value lies.
    let exponent = (rounded.abs().to_bits() >> 23).max(1) as i32 - 127;
    let ulp = 2f64.powi(exponent - 23);
    (got as f64 - want).abs() / ulp
}

#[test]
fn f32_functions_are_accurate_over_all_floats() {
    type Case = (&'static str, fn(f32) -> f32, fn(f64) -> f64, f64);
    let cases: [Case; 10] = [
        ("exp", f32::m_exp, f64::exp, 1.5),
        ("expm1", f32::m_expm1, f64::exp_m1, 2.0),
        ("ln", f32::m_ln, f64::ln, 1.5),
        ("ln1p", f32::m_ln1p, f64::ln_1p, 2.0),
        ("tanh", f32::m_tanh, f64::tanh, 2.0),
        ("erf", f32::m_erf, erf64, 2.0),
        ("sigmoid", f32::m_sigmoid, f64::m_sigmoid, 2.0),
        ("sin", f32::m_sin, f64::sin, 1.0),
        ("cos", f32::m_cos, f64::cos, 1.0),
        ("sqrt", f32::m_sqrt, f64::sqrt, 0.5001),
    ];
    for (name, f, exact, limit) in cases {
        let (e, x) = worst(f, exact);
        println!("{name}: {e:.3} ulp at {x:e}");
        assert!(e <= limit, "{name}: {e} ulp at {x:e}");
    }
}

#[test]
fn pow_is_accurate_and_has_the_special_cases_of_c() {
    let special = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        0.5,
        -0.5,
        2.0,
        -2.0,
        3.0,
        -3.0,
        1e-40,
        -1e-40,
        1e30,
        -1e30,
        16777216.0,
        16777217.0,
        1e10,
        0.001,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        f32::MAX,
        f32::MIN_POSITIVE,
    ];
    for x in special {
        for y in special {
            let (got, want) = (x.m_pow(y), (x as f64).powf(y as f64));
            let e = error(got, want);
            let sign = got.is_nan() || got.is_sign_negative() == want.is_sign_negative();
            assert!(e <= 1.0 && sign, "{x:e} ^ {y:e}: {got:e}, not {want:e}");
        }
    }
    for i in 0..200_000u32 {
        let x = (i.wrapping_mul(2_654_435_761) as f32 / 4.3e9) * 8.0 + 1e-3;
        let y = (i.wrapping_mul(40_503) % 10_007) as f32 / 250.0 - 20.0;
        let e = error(x.m_pow(y), (x as f64).powf(y as f64));
        assert!(e <= 1.0, "{x} ^ {y}: {e} ulp");
    }
}

#[test]
fn f64_erf_is_exact_to_1e_15() {
    // Made with 50 digits.
    let known = [
        (0.001, 0.0011283787909692365),
        (0.1, 0.1124629160182849),
        (0.5, 0.5204998778130465),
        (1.0, 0.8427007929497149),
        (1.5, 0.9661051464753108),
        (2.0, 0.9953222650189527),
        (2.4, 0.999311486103355),
        (2.5, 0.999593047982555),
        (3.0, 0.9999779095030014),
        (4.0, 0.9999999845827421),
        (5.0, 0.9999999999984626),
    ];
    for (x, y) in known {
        assert!((erf64(x) - y).abs() <= 4e-16 * y, "erf({x}) = {:e}, not {y:e}", erf64(x));
    }
}

#[test]
fn signed_zeros_stay() {
    for f in [f32::m_tanh, f32::m_erf, f32::m_expm1, f32::m_ln1p, f32::m_sin] {
        assert!(f(-0.0).is_sign_negative() && f(0.0).is_sign_positive());
    }
}

#[test]
fn normal_distribution_is_accurate_in_the_middle_and_in_both_tails() {
    for i in -140_000..=140_000 {
        let x = i as f32 * 1e-4;
        let u = x as f64 * std::f64::consts::FRAC_1_SQRT_2;
        // Where erf is too close to −1, the continued fraction of erfc.
        let tail = (1..200).rev().fold(u.abs(), |f, k| u.abs() + 0.5 * k as f64 / f);
        let tail = 0.25 * std::f64::consts::FRAC_2_SQRT_PI * (-u * u).exp() / tail;
        let want = if x < -2.5 { tail } else { 0.5 * (1.0 + erf64(u)) };
        let gauss = (-0.5 * x as f64 * x as f64).exp();
        let (cdf, density) = x.m_gauss();
        // The exponent is rounded too.
        let limit = 4e-7 + 1.2e-7 * (x * x) as f64;
        assert!((cdf as f64 - want).abs() <= limit * want + 2e-38, "Φ({x}) = {cdf:e}, not {want:e}");
        assert!((density as f64 - gauss).abs() <= limit * gauss + 2e-38, "{x}: {density:e}, not {gauss:e}");
    }
    assert_eq!([1e30f32, f32::INFINITY].map(|x| x.m_gauss()), [(1.0, 0.0); 2]);
    assert_eq!([-1e30f32, f32::NEG_INFINITY].map(|x| x.m_gauss()), [(0.0, 0.0); 2]);
    assert!(f32::NAN.m_gauss().0.is_nan() && f32::NAN.m_gauss().1.is_nan());
}

/// Whatever the stages, blocks and remainders are.
#[test]
fn functions_of_many_elements_are_those_of_one() {
    let special =
        [0.0, -0.0, 1.0, -71.3, -71.4, -87.0, -88.0, -103.9, -200.0, f32::NEG_INFINITY, f32::NAN, 1e-40];
    let of = |i: usize| special.get(i).copied().unwrap_or(-(i as f32) * 0.171);
    for (n, less) in [(1, 0.0), (12, 0.0), (255, 0.5), (256, 3.0), (700, -0.25)] {
        let x: Vec<f32> = (0..n).map(of).collect();
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        type Case = (fn(&mut [f32], f32), fn(f32) -> f32);
        let cases: [Case; 2] = [(f32::m_exps, f32::m_exp), (f32::m_weights, f32::m_weight)];
        for (all, one) in cases {
            let (mut y, want) = (x.clone(), x.iter().map(|x| one(x - less)).collect::<Vec<_>>());
            all(&mut y, less);
            assert_eq!(bits(&y), bits(&want), "{n} elements less {less}");
        }
    }
}

/// A weight is the exponential, or 0 of what is next to nothing.
#[test]
fn weights_are_exponentials() {
    for i in 0..100_000 {
        let x = -(i as f32) * 0.0011;
        let (e, w) = (x.m_exp(), x.m_weight());
        let least = f32::MIN_POSITIVE / f32::EPSILON;
        assert_eq!(w, if e < least { 0.0 } else { e }, "{x}");
        assert!(f64::from(x).m_weight() > 0.0);
    }
    assert_eq!([f32::NEG_INFINITY.m_weight(), f64::NEG_INFINITY.m_weight() as f32], [0.0; 2]);
    assert!(f32::NAN.m_weight().is_nan() && f64::NAN.m_weight().is_nan());
}

/// The same of functions that read a second operand.
#[test]
fn gates_of_many_elements_are_those_of_one() {
    let special = [0.0, -0.0, 1e-40, -1e-40, 200.0, -200.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
    let of = |i: usize| special.get(i).copied().unwrap_or((i as f32 - 350.0) * 0.041);
    for n in [0, 1, 12, 256, 257, 700] {
        let (x, v): (Vec<f32>, Vec<f32>) = (0..n).map(|i| (of(i), i as f32)).unzip();
        let alike = |y: &[f32], one: &dyn Fn(f32, f32) -> f32| {
            for ((y, x), v) in y.iter().zip(&x).zip(&v) {
                let want = one(*x, *v);
                assert!(y.to_bits() == want.to_bits() || y.is_nan() && want.is_nan(), "{x}: {y}, not {want}");
            }
        };
        let mut y = vec![0.5; n];
        f32::m_gausses(&mut y, [&x, &v], |x, v, (cdf, gauss)| v * cdf + x * gauss);
        alike(&y, &|x, v| v * x.m_gauss().0 + x * x.m_gauss().1);
        f32::m_sigmoids(&mut y, [&x, &v], |x| 1.5 * x, |x, v, s| v * s + x);
        alike(&y, &|x, v| v * (1.5 * x).m_sigmoid() + x);
        f32::m_tanhs(&mut y, [&x, &v], |x| 1.5 * x, |x, v, t| v * t + x);
        alike(&y, &|x, v| v * (1.5 * x).m_tanh() + x);
    }
}
