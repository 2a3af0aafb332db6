//! Dense convolutions of pairs by matrix registers ([`matrix`](crate::kernels::matrix)): a square's rows are neighbouring positions of
//! a line of results, its steps the pairs of channels of neighbouring taps.
#![allow(unsafe_code, clippy::needless_range_loop)]

use super::dense::{Task, Walk};
use super::results::{Results, put_column};
use super::volume;
use crate::kernels::matrix::{Ahead, BLOCK, Block, Place, Registers, Runs, SIDE, SQUARES, Sums};
use crate::kernels::pairs::{PairKernel, Pairs};
use crate::kernels::simd::{Level, Simd, Vectors};
use crate::kernels::tile::Pieces;
use crate::tile_sizes;

/// Rows whose results are written at a time.
const ROWS: usize = 8;

/// A task in blocks.
pub(super) struct Blocks<'a, T>(pub Task<'a, u32, T>);

/// Lines of positions in squares of equally many rows, of which neighbours may share some.
///
/// Where all positions of an image are equally far apart in A, its lines can be one: then what lies between them is computed, too,
/// and left out of the results.
struct Squares {
    walk: Walk,
    /// Positions of a line, of how many lines it consists, and from one of those to the next.
    length: usize,
    lines: usize,
    pitch: usize,
    pieces: Pieces,
    rows: usize,
    piece: usize,
}

/// Rows of a square, with results.
#[derive(Clone, Copy)]
struct Square {
    /// Where the first one begins in A.
    a: usize,
    /// The rows that have results of their own.
    stretches: [Stretch; SIDE],
    count: usize,
}

/// Neighbouring rows of a square, of one line of positions.
#[derive(Clone, Copy)]
struct Stretch {
    row: usize,
    rows: usize,
    /// Where the first one's results begin.
    y: usize,
}

impl Square {
    const NONE: Square = Square { a: 0, stretches: [Stretch { row: 0, rows: 0, y: 0 }; SIDE], count: 0 };

    /// Are all of its rows, so many, results that are equally far apart?
    fn is_whole(&self, rows: usize) -> bool {
        self.count == 1 && self.stretches[0].rows == rows
    }
}

impl Squares {
    /// `one_line`: are an image's positions equally far apart?
    fn of(walk: Walk, one_line: bool) -> Squares {
        let [_, lines, width] = walk.extents;
        let pitch = walk.a_step[1] / walk.a_step[2].max(1);
        let length = (lines - 1) * pitch + width;
        let joins = one_line && length.div_ceil(SIDE) < lines * width.div_ceil(SIDE);
        let (length, lines, pitch) = if joins { (length, lines, pitch) } else { (width, 1, width) };
        let pieces = Pieces::of(length, SIDE);
        Squares { walk, length, lines, pitch, rows: pieces.len(0), pieces, piece: 0 }
    }

    /// Squares of so many images.
    fn total(&self, images: usize) -> usize {
        images * self.walk.extents[0] * (self.walk.extents[1] / self.lines) * self.pieces.count
    }

    #[inline(always)]
    fn next(&mut self) -> Square {
        let (walk, width) = (&self.walk, self.walk.extents[2]);
        let start = self.pieces.start(self.piece);
        let first = start.min(self.length - self.rows);
        let mut square = Square { a: walk.a + first * walk.a_step[2], ..Square::NONE };
        let (mut line, mut column) =
            if self.lines == 1 { (0, start) } else { (start / self.pitch, start % self.pitch) };
        let end = start - first + self.pieces.len(self.piece);
        let mut row = start - first;
        while row < end {
            if column < width {
                let rows = (width - column).min(end - row);
                let y = walk.y + line * walk.y_step[1] + column * walk.y_step[2];
                square.stretches[square.count] = Stretch { row, rows, y };
                square.count += 1;
            }
            row += self.pitch - column;
            (line, column) = (line + 1, 0);
        }
        self.piece += 1;
        if self.piece == self.pieces.count {
            self.piece = 0;
            for _ in 0..self.lines {
                self.walk.next_line();
            }
        }
        square
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
        let mut sums = Sums::default();
        for first in task.panels.clone().step_by(together) {
            for grid in task.grids() {
                let (walk, y0) = task.walk(grid);
                if volume(walk.extents) == 0 {
                    continue;
                }
                let one_line = plan.in_step[1..] == [1; 2];
                let mut squares = Squares::of(walk, one_line);
                let (rows, total) = (squares.rows, squares.total(task.images()));
                let (a_row, y_row) = (squares.walk.a_step[2], squares.walk.y_step[2]);
                let runs = Runs::of(&grid.runs);
                let registers = Registers::new(rows, &runs);
                let mut to = Results::new(&task.epilogue, task.y);
                // Where there are few channels, as many squares of rows keep the registers busy.
                let high = if plan.row(panel, first, D::S::LANES) == SIDE { SQUARES } else { 2 };
                let mut ahead = task.ahead.in_steps(total.div_ceil(high));
                let mut taken = [Square::NONE; SQUARES];
                for i in (0..total).step_by(high) {
                    let count = high.min(total - i);
                    taken[..count].fill_with(|| squares.next());
                    let taken = &taken[..count];
                    let whole = to.plain().filter(|_| taken.iter().all(|square| square.is_whole(rows)));
                    // SAFETY: `D`'s instructions are there.
                    unsafe { ahead.fetch::<D::S>() }
                    for p in first..(first + together).min(task.panels.end) {
                        let (channel, row) = (p * panel, plan.row(panel, p, D::S::LANES));
                        let b = task.weights.wrapping_add(p * size + grid.first * plan.ci * row);
                        to.set(&task.epilogue, channel, panel.min(plan.co - channel));
                        for column in (0..row).step_by(BLOCK) {
                            let columns = (row - column).div_ceil(SIDE).min(2);
                            let own = whole.filter(|_| column + columns * SIDE <= to.lanes);
                            let y = |i: usize| y0 + taken[i.min(count - 1)].stretches[0].y + channel + column;
                            let next = task.y.address(y(0) + count * SIDE * y_row);
                            let mut place = sums.place(columns);
                            if let Some(own) = own {
                                let at = |i: usize| own.wrapping_add(y(i)).cast();
                                place = Place { to: std::array::from_fn(at), row: y_row, add: false };
                            }
                            let a = |i: usize| task.a.wrapping_add(taken[i.min(count - 1)].a);
                            let block = Block {
                                a: std::array::from_fn(a),
                                a_row,
                                b: b.wrapping_add(column),
                                b_row: row,
                                rows: count,
                                columns,
                                place,
                                ahead: Ahead::rows(next.cast(), y_row),
                            };
                            // SAFETY: the squares lie inside the task's rows, whose windows A holds; the panel has the columns.
                            unsafe {
                                registers.multiply(&block);
                                for (i, square) in taken.iter().enumerate().filter(|_| own.is_none()) {
                                    let sums = &sums.0[i * SIDE * columns * SIDE..];
                                    put_square::<D>(&to, square, sums, [y0, y_row], [column, columns]);
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// The results of a square, each so far from the one before: from column `at` of the panel on, of so many columns' squares.
///
/// # Safety
/// As of [`put_column`] at each of the square's results, from `y0` on.
#[inline(always)]
unsafe fn put_square<D: Pairs>(
    to: &Results<<D::S as Simd>::Elem>,
    square: &Square,
    sums: &[f32],
    [y0, y_row]: [usize; 2],
    [at, columns]: [usize; 2],
) {
    for stretch in &square.stretches[..square.count] {
        for i in (0..stretch.rows).step_by(ROWS) {
            let (row, m) = (stretch.row + i, ROWS.min(stretch.rows - i));
            let from = &sums[row * columns * SIDE..(row + m) * columns * SIDE];
            let y = y0 + stretch.y + i * y_row;
            for j in 0..columns {
                // SAFETY: the rows of sums are there; the caller's promise.
                unsafe {
                    let from = from.as_ptr().add(j * SIDE).cast();
                    tile_sizes!(m, 1, D, put_run(to, from, columns * SIDE, [y, y_row], at + j * SIDE))
                }
            }
        }
    }
}

/// A column of `M` vectors, from rows of sums, to results each so far from the one before and to one column of the panel.
///
/// # Safety
/// `M` rows of sums must be there; else as of [`put_column`].
#[inline(always)]
unsafe fn put_run<D: Pairs, const M: usize, const N: usize>(
    to: &Results<<D::S as Simd>::Elem>,
    from: *const <D::S as Simd>::Elem,
    row: usize,
    [first, step]: [usize; 2],
    at: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let (mut sums, mut y) = ([[D::S::load(from)]; M], [first; M]);
        for i in 1..M {
            sums[i] = [D::S::load(from.add(i * row))];
            y[i] = first + i * step;
        }
        put_column::<D, M>(to, sums, &y, at);
    }
}

#[cfg(test)]
mod tests {
    use crate::kernels::conv::{Geometry, Residual, input_grad, input_grad_scratch};
    use crate::kernels::half::{Elements, ElementsMut};
    use crate::kernels::layout::Layout;

    /// What squares share is written once: adding to what is there gives the bits of adding something of its own.
    #[test]
    fn adds_once() {
        for (size, k) in [(28, 3), (17, 3), (7, 3), (33, 1), (29, 5)] {
            let extents = [1, size, size];
            let g = Geometry {
                layout: Layout::Last,
                n: 2,
                c: 20,
                oc: 24,
                groups: 1,
                axis: 1,
                x: extents,
                y: extents,
                k: [1, k, k],
                stride: [1; 3],
                dilation: [1; 3],
                pad: [0, k / 2, k / 2],
                pairs: true,
            };
            let some = |n: usize, step: f32| (0..n).map(|i| (i as f32 * step).sin()).collect::<Vec<f32>>();
            let (dy, w) = (some(g.outputs(), 0.7), some(g.oc * g.c * k * k, 0.3));
            let addend = some(g.inputs(), 0.9);
            let mut scratch = vec![f32::NAN; input_grad_scratch::<f32>(&g, false)];
            let (mut apart, mut there) = (vec![0.0; addend.len()], addend.clone());
            input_grad(
                &g,
                Elements::Whole(&dy),
                &w,
                Residual::Of(&addend),
                ElementsMut::Whole(&mut apart),
                &mut scratch,
            );
            input_grad(
                &g,
                Elements::Whole(&dy),
                &w,
                Residual::InOutput,
                ElementsMut::Whole(&mut there),
                &mut scratch,
            );
            assert_eq!(apart, there, "{g:?}");
        }
    }
}
