//! Random numbers by counting: element `i` under `seed` is a hash of both, so results depend neither on the
//! order nor on the number of threads.

use crate::kernels::isa::vectorize;
use crate::kernels::par::{GRAIN, rows};
use crate::tensor::Float;

/// SplitMix64's finaliser (Steele, Lea and Flood 2014).
fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A 32-bit finaliser without visible bias ("lowbias32", found by Chris Wellons's hash prospector).
#[inline(always)]
fn hash(mut x: u32) -> u32 {
    x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

/// The stream of one seed; 32-bit arithmetic, so that loops over it vectorise.
#[derive(Debug, Clone, Copy)]
pub struct Stream {
    seed: u64,
}

impl Stream {
    pub fn new(seed: u64) -> Self {
        Stream { seed: mix(seed) }
    }

    /// Keys of the 2³² elements around `start`.
    fn keys(self, start: usize) -> (u32, u32) {
        let key = mix(self.seed ^ ((start as u64) >> 32));
        (key as u32, (key >> 32) as u32)
    }

    /// 24 random bits for each element of `y` from `start` on, handed to `f` as a number in 0..2²⁴.
    fn fill<T>(self, start: usize, y: &mut [T], f: impl Fn(u32) -> T) {
        vectorize(
            #[inline(always)]
            || {
                let (a, b) = self.keys(start);
                for (k, y) in y.iter_mut().enumerate() {
                    let i = (start as u32).wrapping_add(k as u32);
                    *y = f(hash(hash(i ^ a) ^ b) >> 8);
                }
            },
        )
    }

    /// Uniform in 0..1.
    pub fn uniform<T: Float>(self, y: &mut [T]) {
        rows(y, 1, GRAIN, |start, y| self.fill(start, y, |r| T::of(r as f64 / (1u32 << 24) as f64)));
    }

    /// 1 with probability `keep`, else 0.
    pub fn mask(self, keep: f64, mask: &mut [u8]) {
        let below = (keep.clamp(0.0, 1.0) * (1u32 << 24) as f64).round() as u32;
        rows(mask, 1, GRAIN, |start, mask| self.fill(start, mask, |r| (r < below) as u8));
    }
}

/// `y = x·factor` where the mask is not 0, else 0; `y` holds `x` where that is `None`.
pub fn apply_mask<T: Float>(x: Option<&[T]>, mask: &[u8], factor: f64, y: &mut [T]) {
    let factor = T::of(factor);
    rows(y, 1, GRAIN, |start, y| {
        vectorize(
            #[inline(always)]
            || {
                let mask = &mask[start..][..y.len()];
                if let Some(x) = x {
                    y.copy_from_slice(&x[start..][..y.len()]);
                }
                for (y, &m) in y.iter_mut().zip(mask) {
                    *y = if m != 0 { *y * factor } else { T::zero() };
                }
            },
        )
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uniform_and_independent_enough() {
        let n = 1 << 20;
        let (mut a, mut b) = (vec![0f64; n], vec![0f64; n]);
        Stream::new(1).uniform(&mut a);
        Stream::new(2).uniform(&mut b);
        let mean = |x: &[f64]| x.iter().sum::<f64>() / n as f64;
        let product = |x: &[f64], y: &[f64]| {
            x.iter().zip(y).map(|(x, y)| (x - 0.5) * (y - 0.5) * 12.0).sum::<f64>() / n as f64
        };
        let sigma = 1.0 / (n as f64).sqrt();
        assert!((mean(&a) - 0.5).abs() < 4.0 * sigma && (product(&a, &a) - 1.0).abs() < 4.0 * sigma);
        assert!(product(&a, &b).abs() < 4.0 * sigma, "two seeds");
        for lag in [1, 2, 3, 4, 16, 28, 784, 1024, 65536] {
            assert!(product(&a[lag..], &a[..n - lag]).abs() < 4.5 * sigma, "lag {lag}");
        }
        let mut cells = [0u32; 256];
        a.iter().for_each(|x| cells[(x * 256.0) as usize] += 1);
        let chi: f64 = cells.iter().map(|&c| (c as f64 - 4096.0).powi(2) / 4096.0).sum();
        assert!((150.0..380.0).contains(&chi), "{chi}");
    }

    #[test]
    fn an_element_does_not_depend_on_its_neighbours() {
        let (mut all, mut part) = (vec![0u8; 50_000], vec![0u8; 100]);
        Stream::new(7).mask(0.3, &mut all);
        Stream::new(7).mask(0.3, &mut part);
        assert_eq!(all[..100], part[..]);
        let kept = all.iter().map(|&m| m as usize).sum::<usize>();
        assert!((14_500..15_500).contains(&kept), "{kept}");
    }
}
