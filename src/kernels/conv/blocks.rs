//! Dense convolutions of pairs by matrix registers ([`matrix`](crate::kernels::matrix)): a square's rows are neighbouring positions of
//! a line of results, its steps the pairs of channels of neighbouring taps.
#![allow(unsafe_code, clippy::needless_range_loop)]

use super::dense::{Results, Task, Walk, put_column};
use super::volume;
use crate::kernels::matrix::{BLOCK, Block, Registers, Runs, SIDE, Sums};
use crate::kernels::pairs::{PairKernel, Pairs};
use crate::kernels::simd::{Level, Simd, Vectors};
use crate::kernels::tile::Pieces;
use crate::tile_sizes;

/// Rows whose results are written at a time.
const ROWS: usize = 8;

/// A task in blocks.
pub(super) struct Blocks<'a, T>(pub Task<'a, u32, T>);

/// Lines of positions in squares of equally many rows, of which neighbours may share some.
struct Squares {
    walk: Walk,
    line: usize,
    pieces: Pieces,
    rows: usize,
    piece: usize,
}

/// Positions of a square, where the first of them begins in A and in the results, and how many belong to the square before.
#[derive(Clone, Copy)]
struct Square {
    a: usize,
    y: usize,
    before: usize,
}

impl Squares {
    fn of(walk: Walk) -> Squares {
        let line = walk.extents[2];
        let pieces = Pieces::of(line, SIDE);
        Squares { walk, line, rows: pieces.len(0), pieces, piece: 0 }
    }

    #[inline(always)]
    fn next(&mut self) -> Square {
        let start = self.pieces.start(self.piece);
        let first = start.min(self.line - self.rows);
        let walk = &self.walk;
        let (a, y) = (walk.a + first * walk.a_step[2], walk.y + first * walk.y_step[2]);
        self.piece += 1;
        if self.piece == self.pieces.count {
            self.piece = 0;
            self.walk.next_line();
        }
        Square { a, y, before: start - first }
    }
}

impl<T: Vectors> PairKernel<T> for Blocks<'_, T> {
    /// # Safety
    /// The task's positions and weights must lie inside the plan's; there is one group.
    #[inline(always)]
    unsafe fn run<D: Pairs<S: Simd<Elem = T>>>(self) {
        let task = self.0;
        let plan = task.plan;
        let panel = Level::of::<D::S>().panel(plan.co);
        let (size, together) = (plan.steps() * panel, task.together(panel));
        let mut sums = Sums::new();
        for first in task.panels.clone().step_by(together) {
            for grid in &plan.grids {
                let (walk, y0) = task.walk(grid);
                if volume(walk.extents) == 0 {
                    continue;
                }
                let lines = task.images() * walk.extents[0] * walk.extents[1];
                let y_step = walk.y_step[2];
                let mut squares = Squares::of(walk);
                let (rows, total) = (squares.rows, lines * squares.pieces.count);
                let runs = Runs::of(&grid.runs);
                let registers = Registers::new(rows, &runs);
                let mut to = Results::new(&task.epilogue, task.y);
                for i in (0..total).step_by(2) {
                    let count = 2.min(total - i);
                    let one = squares.next();
                    let both = [one, if count == 2 { squares.next() } else { one }];
                    for p in first..(first + together).min(task.panels.end) {
                        let channel = p * panel;
                        let row = plan.row(panel, p, D::S::LANES);
                        let b = task.weights.as_ptr().wrapping_add(p * size + grid.first * plan.ci * row);
                        to.set(&task.epilogue, channel, panel.min(plan.co - channel));
                        for column in (0..row).step_by(BLOCK) {
                            let block = Block {
                                a: both.map(|square| task.a.wrapping_add(square.a)),
                                a_row: squares.walk.a_step[2],
                                b: b.wrapping_add(column),
                                b_row: row,
                                rows: count,
                                columns: (row - column).div_ceil(SIDE).min(2),
                            };
                            // SAFETY: the squares lie inside the task's rows, whose windows A holds; the panel has the columns.
                            unsafe {
                                registers.multiply(&block, &mut sums);
                                for (s, square) in both.iter().enumerate().take(count) {
                                    for i in (square.before..rows).step_by(ROWS) {
                                        let y = std::array::from_fn(|j| y0 + square.y + (i + j) * y_step);
                                        let m = ROWS.min(rows - i);
                                        for j in 0..block.columns {
                                            let from = sums.0.as_ptr().add((s * SIDE + i) * BLOCK + j * SIDE);
                                            let at = column + j * SIDE;
                                            tile_sizes!(m, 1, D, put_run(&to, from.cast::<T>(), &y, at));
                                        }
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// A column of `M` vectors of a block's sums.
///
/// # Safety
/// `from` must be valid for a vector at as many of a block's rows; else as of [`put_column`].
#[inline(always)]
unsafe fn put_run<D: Pairs, const M: usize, const N: usize>(
    to: &Results<<D::S as Simd>::Elem>,
    from: *const <D::S as Simd>::Elem,
    y: &[usize; ROWS],
    at: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut column = [D::S::load(from); M];
        for i in 1..M {
            column[i] = D::S::load(from.add(i * BLOCK));
        }
        put_column::<D::S, M>(to, column, y, at);
    }
}
