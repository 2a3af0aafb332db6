//! A tensor as channels, and how reductions over it are cut up: into tasks, and each of these into strips of columns.

use std::ops::Range;

use rayon::prelude::*;

use super::fold::{Fold, Sums, Term};
use crate::kernels::half::Elements;
use crate::kernels::isa::vectorize_sweep;
use crate::kernels::par::{self, GRAIN};
use crate::kernels::simd::Vectors;
use crate::tensor::Float;

/// Elements that are summed side by side.
pub(super) const WIDTH: usize = 512;
/// Elements that are added up in the element type before the sum is carried in `f64`.
pub(super) const DEPTH: usize = 64;
/// Elements a task of a reduction has at least, and tasks at most.
const TASK: usize = 1 << 16;
const TASKS: usize = 32;

/// A tensor as `n` × `c` channels × `s` contiguous elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Channels {
    pub n: usize,
    pub c: usize,
    pub s: usize,
}

impl Channels {
    /// The same channels where they lie last: a channel's elements are one `c` apart.
    pub fn last(self) -> Channels {
        Channels { n: self.n * self.s, c: self.c, s: 1 }
    }

    /// Elements of one channel.
    pub fn count(self) -> usize {
        self.n * self.s
    }

    pub(super) fn start(self, n: usize, channel: usize) -> usize {
        (n * self.c + channel) * self.s
    }

    /// Channels that one piece of work covers.
    pub(super) fn per_piece(self) -> usize {
        (GRAIN / self.count().max(1)).max(1)
    }

    /// Rows of `c` that one task of a reduction covers, where `s` is 1.
    pub(super) fn per_task(self) -> usize {
        let tasks = (self.n * self.c).div_ceil(TASK).clamp(1, TASKS);
        self.n.div_ceil(tasks).max(1)
    }

    /// Elements of `f64` scratch that reductions need.
    pub fn partials(self) -> usize {
        if self.s == 1 { self.n.div_ceil(self.per_task()) * 2 * self.c } else { 0 }
    }

    /// Calls `f(first row, partial sums)` for each task of a reduction, where `s` is 1, with `2·c` zeros to add to.
    pub(super) fn tasks(self, partials: &mut [f64], f: impl Fn(usize, &mut [f64], &mut [f64]) + Sync) {
        let partials = &mut partials[..self.partials()];
        par::chunks(partials, (2 * self.c).max(1), |i, part| {
            part.fill(0.0);
            let (a, b) = part.split_at_mut(self.c);
            vectorize_sweep(
                #[inline(always)]
                || f(i * self.per_task(), a, b),
            );
        });
    }

    /// The same, each task writing its rows of `out`: `f(their elements, rows of out, partial sums)`.
    pub(super) fn tasks_with<T: Send>(
        self,
        partials: &mut [f64],
        out: &mut [T],
        f: impl Fn(Range<usize>, &mut [T], &mut [f64], &mut [f64]) + Sync,
    ) {
        let per = self.per_task() * self.c;
        let parts = partials[..self.partials()].par_chunks_mut((2 * self.c).max(1));
        parts.zip(out.par_chunks_mut(per.max(1))).enumerate().for_each(|(i, (part, out))| {
            part.fill(0.0);
            let (a, b) = part.split_at_mut(self.c);
            vectorize_sweep(
                #[inline(always)]
                || f(i * per..i * per + out.len(), out, a, b),
            );
        });
    }

    /// The elements of the rows from `first` on that a task covers.
    pub(super) fn rows_of(self, first: usize) -> Range<usize> {
        first * self.c..(first + self.per_task()).min(self.n) * self.c
    }
}

/// Some columns of consecutive rows of `c`. Where they are few, whole rows side by side.
#[derive(Clone, Copy)]
pub(super) struct Strip {
    /// First column, and how many.
    pub(super) first: usize,
    pub(super) columns: usize,
    /// Elements swept side by side, a multiple of `columns`, and from one such group to the next.
    pub(super) width: usize,
    pub(super) step: usize,
}

impl Strip {
    pub(super) fn all(c: usize) -> impl Iterator<Item = Strip> {
        let few = 2 * c <= WIDTH;
        (0..c).step_by(if few { c.max(1) } else { WIDTH }).map(move |first| {
            let columns = (c - first).min(WIDTH);
            match few {
                true => Strip { first, columns, width: WIDTH / c * c, step: WIDTH / c * c },
                false => Strip { first, columns, width: columns, step: c },
            }
        })
    }

    /// The strip's values of each column, repeated over the width.
    pub(super) fn spread<T: Copy>(self, values: &[T], lanes: &mut [T; WIDTH]) {
        let lanes = &mut lanes[..self.width];
        lanes[..self.columns].copy_from_slice(&values[self.first..][..self.columns]);
        // Twice as many each time: of few columns there are many copies.
        let mut done = self.columns;
        while done < lanes.len() {
            let more = done.min(lanes.len() - done);
            lanes.copy_within(..more, done);
            done += more;
        }
    }

    /// Adds up what was swept side by side.
    #[inline(always)]
    pub(super) fn gather<T: Float>(self, lanes: &[T; WIDTH], sums: &mut [f64]) {
        for lanes in lanes[..self.width].chunks_exact(self.columns) {
            for (s, x) in sums.iter_mut().zip(lanes) {
                *s += x.to64();
            }
        }
    }

    /// Elements after which sums are carried over to `f64`.
    pub(super) fn block(self) -> usize {
        DEPTH * self.step
    }

    /// `plain = Σ dz` and, with `PRODUCTS`, `products = Σ dz·(x − at)` of the strip's columns, `less` being `−at`,
    /// over whole rows: some elements of `x` and of the term's matrices.
    pub(super) fn fold<T: Vectors, F: Term<T>, const PRODUCTS: bool>(
        self,
        elements: Range<usize>,
        x: Elements<T>,
        less: &[T; WIDTH],
        term: &mut F,
        sums: &mut Sums<T>,
    ) {
        let (columns, step, start) = (self.width, self.step, elements.start + self.first);
        sums.products[..columns].fill(T::zero());
        sums.plain[..columns].fill(T::zero());
        let len = elements.end.saturating_sub(start);
        let rows = if len < columns { 0 } else { (len - columns) / step + 1 };
        Fold::<_, _, PRODUCTS> { start, rows, columns, step, x, less, term, sums }.sum();
        // Rows that make no whole group.
        let (start, columns) = (start + rows * step, len.saturating_sub(rows * step));
        Fold::<_, _, PRODUCTS> { start, rows: 1, columns, step, x, less, term, sums }.sum();
    }
}

/// Consecutive pieces of so many elements that make up `len`.
pub(super) fn blocks(len: usize, block: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(block.max(1)).map(move |i| i..len.min(i + block))
}
