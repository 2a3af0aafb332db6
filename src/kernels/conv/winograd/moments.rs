//! Moments of results, gathered from tiles while they are in registers.
#![allow(unsafe_code, clippy::needless_range_loop)]

use super::transform::{OUT, constant};
use crate::kernels::norm::block_room;
use crate::kernels::par::Shared;
use crate::kernels::simd::Simd;
use crate::tensor::Float;

/// Of some positions: a vector of channels' means, and summed squared distances from them.
#[derive(Clone, Copy)]
pub(super) struct Moments<S: Simd> {
    positions: usize,
    mean: S::V,
    squares: S::V,
}

impl<S: Simd> Moments<S> {
    /// Of none.
    ///
    /// # Safety
    /// `S`'s instructions must be there, here and below.
    #[inline(always)]
    pub(super) unsafe fn none() -> Self {
        // SAFETY: the caller's promise.
        let zero = unsafe { constant::<S>(0.0) };
        Moments { positions: 0, mean: zero, squares: zero }
    }

    /// Adds the first rows and columns of a tile. Tiles are merged by their own means (Chan, Golub and LeVeque, 1979): nothing is
    /// squared that is larger than it need be.
    ///
    /// # Safety
    /// As of [`none`](Self::none).
    #[inline(always)]
    pub(super) unsafe fn add(&mut self, tile: &[[S::V; OUT]; OUT], [rows, columns]: [usize; 2]) {
        // SAFETY: the caller's promise.
        unsafe {
            let new = rows * columns;
            let all = self.positions + new;
            let mut sum = constant::<S>(0.0);
            let mut squares = self.squares;
            for i in 0..OUT {
                for j in 0..OUT {
                    if i < rows && j < columns {
                        sum = S::add(sum, tile[i][j]);
                    }
                }
            }
            let less = S::mul(sum, constant::<S>(-1.0 / new as f64));
            for i in 0..OUT {
                for j in 0..OUT {
                    if i < rows && j < columns {
                        let distance = S::add(tile[i][j], less);
                        squares = S::fma(distance, distance, squares);
                    }
                }
            }
            let apart = S::mul(S::add(less, self.mean), constant::<S>(-1.0));
            let share = new as f64 / all as f64;
            self.mean = S::fma(apart, constant::<S>(share), self.mean);
            let weight = constant::<S>(share * self.positions as f64);
            self.squares = S::fma(S::mul(apart, apart), weight, squares);
            self.positions = all;
        }
    }
}

/// Where blocks' moments go: of each their number of positions, all channels' means and squared distances.
pub(super) struct Parts<'a> {
    pub(super) room: Shared<'a, f64>,
    pub(super) channels: usize,
}

impl Parts<'_> {
    /// Writes those of `n` channels; the number of positions with the first.
    ///
    /// # Safety
    /// There must be room for the block, and no other task write these channels of it.
    #[inline(always)]
    pub(super) unsafe fn put<S: Simd>(&self, block: usize, channel: usize, n: usize, of: &Moments<S>) {
        let [mut mean, mut squares] = [[S::Elem::of(0.0); 16]; 2];
        // SAFETY: vectors have up to 16 lanes; the caller's promise.
        unsafe {
            S::store(mean.as_mut_ptr(), of.mean);
            S::store(squares.as_mut_ptr(), of.squares);
            let part = self.room.ptr().add(block * block_room(self.channels));
            if channel == 0 {
                *part = of.positions as f64;
            }
            for i in 0..n {
                *part.add(1 + channel + i) = mean[i].to64();
                *part.add(1 + self.channels + channel + i) = squares[i].to64();
            }
        }
    }
}
