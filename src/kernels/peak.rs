//! What the processor can do at most, measured: the yardstick of `retune bench`.
#![allow(unsafe_code, clippy::needless_range_loop)]

use std::hint::black_box;
use std::time::Instant;

use rayon::prelude::*;

use crate::kernels::simd::{Kernel, Simd, Vectors};

/// Multiply-add steps of one measurement.
const STEPS: usize = 1 << 15;
/// Bytes of the two buffers that the bandwidth is measured on: beyond any cache.
const BYTES: usize = 1 << 26;
const ATTEMPTS: usize = 8;

/// Independent multiply-adds on registers alone.
struct Registers<'a>(&'a mut [f32; 16]);

impl Kernel<f32> for Registers<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = f32>>(self) {
        // SAFETY: registers only, but for the last store into the array's 16 elements.
        unsafe {
            let (a, b) = (S::splat(black_box(0.999)), S::splat(black_box(1e-3)));
            let mut acc = [S::splat(1.0); 12];
            for _ in 0..STEPS {
                for i in 0..12 {
                    acc[i] = S::fma(acc[i], a, b);
                }
            }
            for i in 1..12 {
                acc[0] = S::add(acc[0], acc[i]);
            }
            S::store(self.0.as_mut_ptr(), acc[0]);
        }
    }
}

fn registers() -> f64 {
    let start = Instant::now();
    let mut out = [0.0; 16];
    // SAFETY: the kernel's own memory.
    unsafe { f32::dispatch(Registers(&mut out)) }
    black_box(out);
    start.elapsed().as_secs_f64()
}

/// Billions of float32 operations a second that the current pool's threads reach together on registers.
pub fn gflops() -> f64 {
    let threads = rayon::current_num_threads();
    let flop = (2 * 12 * STEPS * f32::level().lanes * threads) as f64;
    let best = |_| {
        let times: Vec<f64> = rayon::broadcast(|_| registers());
        times.into_iter().fold(0.0, f64::max)
    };
    flop / (0..ATTEMPTS).map(best).fold(f64::INFINITY, f64::min) * 1e-9
}

/// Billions of bytes a second that the current pool's threads read and write together: `y = a·x + y` on arrays
/// beyond the caches.
pub fn gigabytes() -> f64 {
    let x = vec![1.0f32; BYTES / 4];
    let mut y = vec![1.0f32; BYTES / 4];
    let piece = y.len() / rayon::current_num_threads();
    let mut attempt = || {
        let start = Instant::now();
        y.par_chunks_mut(piece).zip(x.par_chunks(piece)).for_each(|(y, x)| {
            y.iter_mut().zip(x).for_each(|(y, x)| *y += 0.5 * x);
        });
        start.elapsed().as_secs_f64()
    };
    let best = (0..ATTEMPTS).map(|_| attempt()).fold(f64::INFINITY, f64::min);
    3.0 * BYTES as f64 / best * 1e-9
}
