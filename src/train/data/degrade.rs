//! What a worn camera does to images: blur, dimming, noise. The shift that `retune demo` adapts to.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;

use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

use super::split::{Purpose, rng};
use super::{Dataset, Storage};

/// How worn the camera is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Worn {
    /// How often a 5×5 binomial blur is applied (edges repeated).
    pub blurs: usize,
    /// Contrast: pixels become `x·gain + offset`.
    pub gain: f32,
    pub offset: f32,
    /// Standard deviation of the Gaussian noise added then, before clipping to 0..1.
    pub noise: f32,
    pub seed: u64,
}

impl Default for Worn {
    fn default() -> Self {
        Worn { blurs: 2, gain: 0.7, offset: 0.05, noise: 0.15, seed: 0 }
    }
}

/// Cameras by name, from the mildest shift to the whole of it: what adaptation is measured on.
pub const SHIFTS: [(&str, Worn); 5] = [
    ("dim", Worn { blurs: 0, gain: 0.5, offset: 0.0, noise: 0.0, seed: 0 }),
    ("dim+noise", Worn { blurs: 0, gain: 0.5, offset: 0.0, noise: 0.05, seed: 0 }),
    ("noise", Worn { blurs: 0, gain: 1.0, offset: 0.0, noise: 0.15, seed: 0 }),
    ("blur", Worn { blurs: 2, gain: 1.0, offset: 0.0, noise: 0.0, seed: 0 }),
    ("worn", Worn { blurs: 2, gain: 0.7, offset: 0.05, noise: 0.15, seed: 0 }),
];

impl Worn {
    /// One of [`SHIFTS`].
    pub fn named(name: &str, seed: u64) -> Option<Worn> {
        SHIFTS.iter().find(|s| s.0 == name).map(|s| Worn { seed, ..s.1 })
    }
}

/// The same data as a worn camera would have seen it. Takes one float32 input `[N, C, H, W]` (or `[N, H, W, C]`,
/// `[N, H, W]`) of values in 0..1; keeps target, class names and random shift. The noise of a sample depends only
/// on the seed and its index.
///
/// Fails on any other input.
pub fn degrade(data: &Dataset, worn: &Worn) -> Result<Dataset> {
    let [column] = data.columns.as_slice() else {
        return Err(Error::Data("degrade: the data has several inputs".into()));
    };
    if column.dtype != DType::F32 || !(2..=3).contains(&column.dims.len()) {
        return Err(Error::Data(format!(
            "degrade: input '{}' is {} with samples of shape {:?}; float32 images are wanted",
            column.name,
            column.dtype,
            column.dims.as_slice()
        )));
    }
    let planes = match (&column.storage, column.dims.as_slice()) {
        (Storage::Pixels { .. }, _) => column.planes,
        (_, &[h, w]) => super::Planes { outer: 1, h, w, inner: 1 },
        (_, dims) => super::Planes::of(dims, super::Layout::Auto),
    };
    // One batch of everything, without augmentation, is the data as it is fed.
    let all: Vec<usize> = (0..data.len()).collect();
    let mut batch = data.new_batch(data.len());
    data.batch(&all, None, &mut batch)?;
    let Some((name, mut images)) = batch.inputs.pop() else {
        return Err(Error::Data("degrade: no input".into()));
    };
    let n = column.sample_len().max(1);
    let pixels: &mut [f32] = images.get_mut().map_err(super::internal)?;
    let mut scratch = vec![0f32; n];
    for (i, image) in pixels.chunks_exact_mut(n).enumerate() {
        if let Some(x) = image.iter().find(|x| !(0.0..=1.0).contains(*x)) {
            return Err(Error::Data(format!("degrade: sample {i} holds {x}; images in 0..1 are wanted")));
        }
        for _ in 0..worn.blurs {
            blur(image, &mut scratch, planes.outer, planes.h, planes.w * planes.inner);
            blur(image, &mut scratch, planes.outer * planes.h, planes.w, planes.inner);
        }
        let mut normal = Normal::new(rng(Purpose::Noise, worn.seed, i as u64, 0));
        for x in image.iter_mut() {
            let noise = worn.noise * normal.draw() as f32;
            *x = (*x * worn.gain + worn.offset + noise).clamp(0.0, 1.0);
        }
    }
    let images: Tensor = images;
    let mut out = Dataset::from_arrays(vec![(name, images)], data.target.clone())?;
    out.class_names = data.class_names.clone();
    out.notes = data.notes.clone();
    out.columns[0].planes = planes;
    out.columns[0].augmentation = column.augmentation;
    Ok(out)
}

/// `[1, 4, 6, 4, 1] / 16` along the middle axis of `[outer, n, inner]`, edges repeated.
fn blur(x: &mut [f32], scratch: &mut [f32], outer: usize, n: usize, inner: usize) {
    scratch.copy_from_slice(x);
    for o in 0..outer {
        for a in 0..n {
            let row = |d: isize| {
                let at = (a as isize + d).clamp(0, n as isize - 1) as usize;
                &scratch[(o * n + at) * inner..][..inner]
            };
            let (m2, m1, c, p1, p2) = (row(-2), row(-1), row(0), row(1), row(2));
            for (i, y) in x[(o * n + a) * inner..][..inner].iter_mut().enumerate() {
                *y = (m2[i] + p2[i] + 4.0 * (m1[i] + p1[i]) + 6.0 * c[i]) / 16.0;
            }
        }
    }
}

/// Standard normal numbers by the polar method (Marsaglia and Bray 1964).
struct Normal {
    rng: ChaCha8Rng,
    spare: Option<f64>,
}

impl Normal {
    fn new(rng: ChaCha8Rng) -> Self {
        Normal { rng, spare: None }
    }

    fn draw(&mut self) -> f64 {
        if let Some(z) = self.spare.take() {
            return z;
        }
        let mut unit = || (self.rng.next_u64() >> 11) as f64 * (2.0 / (1u64 << 53) as f64) - 1.0;
        loop {
            let (u, v) = (unit(), unit());
            let s = u * u + v * v;
            if s > 0.0 && s < 1.0 {
                let f = (-2.0 * ln(s) / s).sqrt();
                self.spare = Some(v * f);
                return u * f;
            }
        }
    }
}

/// Natural logarithm of a positive normal number, to about 1e-15 relative.
// Not the C library's: that one picks an implementation by CPU, and the demo's data must be the same on all.
fn ln(x: f64) -> f64 {
    // x = m·2^e with m in [√½, √2): ln m = 2·atanh(t), t = (m − 1)/(m + 1), |t| ≤ 0.172
    let bits = x.to_bits();
    let mut e = ((bits >> 52) & 0x7ff) as i64 - 1023;
    let mut m = f64::from_bits((bits & ((1 << 52) - 1)) | (1023 << 52));
    if m > std::f64::consts::SQRT_2 {
        m *= 0.5;
        e += 1;
    }
    let t = (m - 1.0) / (m + 1.0);
    let t2 = t * t;
    let mut series = 0.0;
    for k in (0..11).rev() {
        series = series * t2 + 1.0 / (2 * k + 1) as f64;
    }
    2.0 * t * series + e as f64 * std::f64::consts::LN_2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logarithm() {
        for x in [1e-300, 3e-9, 0.1, 0.5, 0.707, 0.708, 0.999999, 1.0, 1.41, 1.42, 2.0, 12345.678] {
            let (a, b) = (ln(x), f64::ln(x));
            assert!((a - b).abs() <= 4e-15 * b.abs().max(1e-6), "{x}: {a} {b}");
        }
    }

    #[test]
    fn noise_is_standard_normal() {
        let mut z = Normal::new(rng(Purpose::Noise, 1, 2, 3));
        let n = 40_000;
        let draws: Vec<f64> = (0..n).map(|_| z.draw()).collect();
        let moment = |k| draws.iter().map(|x| x.powi(k)).sum::<f64>() / n as f64;
        assert!(moment(1).abs() < 0.02 && (moment(2) - 1.0).abs() < 0.03, "{} {}", moment(1), moment(2));
        assert!(moment(3).abs() < 0.06 && (moment(4) - 3.0).abs() < 0.2, "{} {}", moment(3), moment(4));
    }

    fn data(n: usize) -> Dataset {
        let x: Vec<f32> = (0..n * 30).map(|i| (i * 7 % 11) as f32 / 10.0).collect();
        let x = Tensor::from_slice(&[n, 1, 5, 6], &x).unwrap();
        Dataset::from_arrays(vec![("x".into(), x)], Some(Tensor::ints(&vec![1; n]))).unwrap()
    }

    fn pixels(d: &Dataset) -> Vec<f32> {
        let all: Vec<usize> = (0..d.len()).collect();
        let mut b = d.new_batch(0);
        d.batch(&all, None, &mut b).unwrap();
        b.inputs[0].1.get::<f32>().unwrap().to_vec()
    }

    #[test]
    fn blur_of_a_point_and_of_an_edge() {
        // One bright pixel in the middle of 5×5: one blur gives the outer product of [1 4 6 4 1]/16.
        let mut x = vec![0f32; 25];
        x[12] = 1.0;
        let x = Tensor::from_slice(&[1, 1, 5, 5], &x).unwrap();
        let d = Dataset::from_arrays(vec![("x".into(), x)], None).unwrap();
        let still = Worn { blurs: 1, gain: 1.0, offset: 0.0, noise: 0.0, seed: 0 };
        let k = [1.0, 4.0, 6.0, 4.0, 1.0f32].map(|k| k / 16.0);
        for (i, y) in pixels(&degrade(&d, &still).unwrap()).into_iter().enumerate() {
            assert!((y - k[i / 5] * k[i % 5]).abs() < 1e-7, "{i}: {y}");
        }
        // A constant image stays constant: edges are repeated, not filled with zero.
        let x = Tensor::from_slice(&[1, 1, 5, 5], &[0.5f32; 25]).unwrap();
        let d = Dataset::from_arrays(vec![("x".into(), x)], None).unwrap();
        let dim = Worn { noise: 0.0, ..Worn::default() };
        assert!(pixels(&degrade(&d, &dim).unwrap()).iter().all(|y| (y - 0.4).abs() < 1e-6));
    }

    #[test]
    fn noise_depends_on_the_sample_alone() {
        let (three, five) = (data(3), data(5));
        let (a, b) = (
            pixels(&degrade(&three, &Worn::default()).unwrap()),
            pixels(&degrade(&five, &Worn::default()).unwrap()),
        );
        assert_eq!(a, b[..90]);
        assert_ne!(a, pixels(&degrade(&three, &Worn { seed: 1, ..Worn::default() }).unwrap()));
        assert!(a.iter().all(|x| (0.0..=1.0).contains(x)));
        assert_eq!(degrade(&three, &Worn::default()).unwrap().labels().unwrap(), [1, 1, 1]);
    }

    #[test]
    fn shifts_by_name() {
        assert_eq!(Worn::named("worn", 7), Some(Worn { seed: 7, ..Worn::default() }));
        assert_eq!(Worn::named("rain", 0), None);
        let d = data(2);
        let dim = pixels(&degrade(&d, &Worn::named("dim", 0).unwrap()).unwrap());
        assert!(dim.iter().zip(pixels(&d)).all(|(a, b)| *a == b * 0.5));
        assert_eq!(dim, pixels(&degrade(&d, &Worn::named("dim", 1).unwrap()).unwrap()));
    }

    #[test]
    fn other_data_is_refused() {
        let x = Tensor::from_slice(&[1, 1, 2, 2], &[0.0, 1.0, 2.0, 0.5f32]).unwrap();
        let d = Dataset::from_arrays(vec![("x".into(), x)], None).unwrap();
        assert!(degrade(&d, &Worn::default()).unwrap_err().to_string().contains("holds 2"));
        let d = Dataset::from_arrays(vec![("x".into(), Tensor::ints(&[1]))], None).unwrap();
        assert!(degrade(&d, &Worn::default()).is_err());
    }
}
