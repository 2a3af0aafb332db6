//! Products of pairs by matrix registers ([`matrix`](crate::kernels::matrix)): two squares of rows of A, as it lies or packed,
//! by two of columns of a packed panel of B.
#![allow(unsafe_code, clippy::needless_range_loop)]

use super::Plus;
use super::pairs::Part;
use super::tile::Target;
use crate::kernels::matrix::{Ahead, BLOCK, Block, Place, Registers, Runs, SIDE, Sums, square};
use crate::kernels::pairs::{PairKernel, Pairs};
use crate::kernels::simd::{Simd, Vectors};
use crate::tile_sizes;

/// Pairs that are added up in registers before they are added to C.
const STEPS: usize = 384;
/// Strips of A that stay in the second-level cache while panels of B pass by.
const NEAR: usize = 8;

/// Rows that are written at a time: every level has tiles of as many.
const ROWS: usize = 4;

/// Some strips and panels of a product, in blocks.
pub(super) struct Blocks<'a, T>(pub Part<'a, T>);

impl<T: Vectors> PairKernel<T> for Blocks<'_, T> {
    #[inline(always)]
    unsafe fn run<D: Pairs<S: Simd<Elem = T>>>(self) {
        let Part { p, order, a, b, plus, c, strips, panels } = self.0;
        let pieces = order.strips(p);
        let mut sums = Sums::default();
        for k in (0..order.packed).step_by(STEPS) {
            let count = STEPS.min(order.packed - k);
            let (beta, plus) = if k == 0 { (p.beta, plus) } else { (T::one(), Plus::NOTHING) };
            let plain = p.alpha == T::one() && plus.is_nothing();
            let runs = Runs::of(&[(0, count)]);
            let registers = Registers::new(p.m.min(SIDE), &runs);
            let groups =
                strips.clone().step_by(NEAR).flat_map(|group| panels.clone().map(move |q| (group, q)));
            for (group, q) in groups {
                let (first, width) = (q * order.panel, order.row(p, q));
                let cols = width.min(p.n - first);
                let b = b.as_ptr().wrapping_add(q * order.packed * order.panel + k * width);
                for i in group..strips.end.min(group + NEAR) {
                    let (row, height) = (pieces.start(i), pieces.len(i));
                    let squares = [square(row / SIDE, p.m), square(row / SIDE + 1, p.m)];
                    let high = height.div_ceil(SIDE);
                    let squares = &squares[..high];
                    let last = high - 1;
                    // Rows that two squares share may be another task's.
                    let alone = squares.iter().all(|square| square.1 == 0);
                    let own = plain && cols == width && alone && (k > 0 || beta == T::zero());
                    let columns = width / SIDE;
                    let to = |i: usize| c.wrapping_add(squares[i.min(last)].0 * p.ldc + first).cast();
                    let result = Place { to: std::array::from_fn(to), row: p.ldc, add: k > 0 };
                    // The next strip's rows, or the next panel's of the first one.
                    let next = match i + 1 < strips.end.min(group + NEAR) {
                        true => (row + BLOCK) * p.ldc + first,
                        false => pieces.start(group) * p.ldc + first + order.panel,
                    };
                    let a_start = |i: usize| a.a.wrapping_add(squares[i.min(last)].0 * a.lda + k);
                    let block = Block {
                        a: std::array::from_fn(a_start),
                        a_row: a.lda,
                        b,
                        b_row: width,
                        rows: high,
                        columns,
                        place: if own { result } else { sums.place(columns) },
                        ahead: Ahead::rows(c.wrapping_add(next).cast(), p.ldc),
                    };
                    // SAFETY: the part lies inside the product; its operands are packed, or as if they were.
                    unsafe {
                        registers.multiply(&block);
                        for (r, &(start, skip)) in squares.iter().enumerate().filter(|_| !own) {
                            let end = SIDE.min(p.m - start);
                            for i in (skip..end).step_by(ROWS) {
                                let from = sums.0.as_ptr().add((r * SIDE + i) * width).cast::<T>();
                                let to = Target::of(p, plus, c, start + i, first, width, beta);
                                tile_sizes!(ROWS.min(end - i), columns, D, put_run(&to, from, width));
                            }
                        }
                    }
                }
            }
        }
    }
}

/// `M` rows of `N` vectors of a block's sums.
///
/// # Safety
/// `from` must be valid for as many vectors at as many rows, `row` elements apart, and the target for `M` rows.
#[inline(always)]
unsafe fn put_run<D: Pairs, const M: usize, const N: usize>(
    to: &Target<<D::S as Simd>::Elem>,
    from: *const <D::S as Simd>::Elem,
    row: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut acc = [[D::S::load(from); N]; M];
        for i in 0..M {
            for j in 0..N {
                acc[i][j] = D::S::load(from.add(i * row + j * D::S::LANES));
            }
        }
        to.write::<D::S, M, N>(&acc);
    }
}
