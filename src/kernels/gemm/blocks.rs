//! Products of pairs by matrix registers ([`matrix`](crate::kernels::matrix)): two squares of rows of A, as it lies or packed,
//! by two of columns of a packed panel of B.
#![allow(unsafe_code, clippy::needless_range_loop)]

use super::pairs::{BLOCKS_WORK, Left, Order, Part, pack};
use super::tile::Target;
use super::{Plus, Product};
use crate::kernels::matrix::{Ahead, BLOCK, Block, Place, Registers, Runs, SIDE, Sums, square};
use crate::kernels::pairs::{PairKernel, Pairs};
use crate::kernels::simd::{Simd, Vectors};
use crate::tile_sizes;

/// Pairs that are added up in registers before they are added to C.
const STEPS: usize = 768;
/// Strips of A that stay in the second-level cache while panels of B pass by.
const NEAR: usize = 8;
/// Strips that are at least a task's own where it packs A, and how many tasks there are then: too few strips for as many as keep a
/// small machine's threads busy are packed several times, for some columns each.
const STRIPS: usize = 3;
const TASKS: usize = 8;
const BUSY: usize = 4;
const COLUMNS: usize = 512;

/// Rows that are written at a time: every level has tiles of as many.
const ROWS: usize = 4;

/// Pieces of strips and of panels for tasks that pack what they read of A: few of the latter, for each packs its own.
pub(super) fn pieces<T: Vectors>(order: &Order, p: &Product<T>) -> [usize; 2] {
    let most = if p.alone { 1 } else { (p.work() / BLOCKS_WORK).clamp(1, TASKS) };
    let rows = (order.strips(p).count / STRIPS).clamp(1, most);
    [rows, (most.min(BUSY) / rows).min(p.n.div_ceil(COLUMNS)).max(1)]
}

/// Pairs of a row that a task packs at a time.
fn near_row(order: &Order) -> usize {
    let steps = order.packed.min(STEPS);
    // (Rows that are a power of two apart would share the same few lines of the cache.)
    if steps.is_multiple_of(8 * SIDE) { steps + SIDE } else { steps }
}

/// Pairs that a task packs at a time: strips, and rows before them that the last square shares with the one before it.
pub(super) fn near<T: Vectors>(order: &Order, p: &Product<T>) -> usize {
    let strips = order.strips(p).count.div_ceil(pieces(order, p)[0]).min(NEAR);
    (strips * BLOCK + SIDE).min(p.m) * near_row(order)
}

/// Some strips and panels of a product, in blocks.
pub(super) struct Blocks<'a, T>(pub Part<'a, T>);

impl<T: Vectors> PairKernel<T> for Blocks<'_, T> {
    #[inline(always)]
    unsafe fn run<D: Pairs<S: Simd<Elem = T>>>(self) {
        let Part { p, order, a, near, b, plus, c, strips, panels } = self.0;
        let pieces = order.strips(p);
        let mut sums = Sums::default();
        for k in (0..order.packed).step_by(STEPS) {
            let count = STEPS.min(order.packed - k);
            let (beta, plus) = if k == 0 { (p.beta, plus) } else { (T::one(), Plus::NOTHING) };
            let plain = p.alpha == T::one() && plus.is_nothing();
            let runs = Runs::of(&[(0, count)]);
            let registers = Registers::new(p.m.min(SIDE), &runs);
            for group in strips.clone().step_by(NEAR) {
                let end = strips.end.min(group + NEAR);
                // Rows of pairs from one on.
                let (first_row, left, a_row) = match *a {
                    Left::Pairs(a, row) => (0, a.wrapping_add(k), row),
                    Left::Elements(x) => {
                        let first = square(pieces.start(group) / SIDE, p.m).0;
                        let rows = first..pieces.start(end - 1) + pieces.len(end - 1);
                        let (steps, row) = (k..k + count, near_row(order));
                        assert!(near.len() >= rows.len() * row, "room for rows of a product");
                        // SAFETY: the caller's promise; there is room.
                        unsafe { pack::rows::<D>(p, order, x, rows, steps, (near.as_mut_ptr(), row)) }
                        (first, near.as_ptr(), row)
                    }
                };
                for (q, i) in panels.clone().flat_map(|q| (group..end).map(move |i| (q, i))) {
                    let (first, width) = (q * order.panel, order.row(p, q));
                    let cols = width.min(p.n - first);
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
                    let next = match i + 1 < end {
                        true => (row + BLOCK) * p.ldc + first,
                        false => pieces.start(group) * p.ldc + first + order.panel,
                    };
                    let a_start = |i: usize| left.wrapping_add((squares[i.min(last)].0 - first_row) * a_row);
                    let block = Block {
                        a: std::array::from_fn(a_start),
                        a_row,
                        b: b.as_ptr().wrapping_add(q * order.packed * order.panel + k * width),
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
