//! The sizes of a recurrent layer, where a step's rows lie in its tensors, and a step's products.

use crate::kernels::gemm::{Near, Product};
use crate::kernels::half::Elements;
use crate::kernels::simd::Vectors;

/// Elements of gates from which on a step's sweep is worth a second thread.
pub(super) const GRAIN: usize = 1 << 13;
/// Rows whose gates are computed at a time where nobody keeps them.
const BLOCK: usize = 256;

/// C of a product by a packed B.
fn times<T: Vectors>(p: Product<T>, a: &[T], b: &[T], packed: &[T], c: &mut [T]) {
    Near::shared(p).multiply_packed(Elements::Whole(a), Elements::Whole(b), packed, c, &mut []);
}

/// Sizes of a recurrent layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sequence {
    pub steps: usize,
    pub batch: usize,
    pub input: usize,
    pub hidden: usize,
    /// Gates of the cell.
    pub gates: usize,
    pub directions: usize,
    /// Which directions go from the last step to the first.
    pub reverse: [bool; 2],
    /// X (N, T, …), Y (N, T, D, H), states (N, D, H); else X (T, N, …), Y (T, D, N, H), states (D, N, H).
    pub batch_first: bool,
}

/// Where the batch's rows of one step and direction lie in a tensor.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows {
    pub start: usize,
    pub stride: usize,
}

impl Rows {
    pub(super) fn of<'a, T>(&self, x: &'a [T], n: usize, width: usize) -> &'a [T] {
        &x[self.start + n * self.stride..][..width]
    }

    pub(super) fn of_mut<'a, T>(&self, x: &'a mut [T], n: usize, width: usize) -> &'a mut [T] {
        &mut x[self.start + n * self.stride..][..width]
    }
}

impl Sequence {
    /// Steps of all sequences.
    pub fn rows(&self) -> usize {
        self.steps * self.batch
    }

    /// Elements of the gates of one row and direction.
    pub fn width(&self) -> usize {
        self.gates * self.hidden
    }

    /// Elements of one direction's state.
    pub(super) fn state(&self) -> usize {
        self.batch * self.hidden
    }

    pub fn is_empty(&self) -> bool {
        self.rows() == 0
    }

    /// Of a tensor of (rows, D, width).
    pub(super) fn at(&self, t: usize, d: usize, width: usize) -> Rows {
        let (first, apart) = if self.batch_first { (t, self.steps) } else { (t * self.batch, 1) };
        Rows { start: (first * self.directions + d) * width, stride: apart * self.directions * width }
    }

    /// Of Y.
    pub(super) fn y(&self, t: usize, d: usize) -> Rows {
        let place = t * self.directions + d;
        match self.batch_first {
            true => Rows { start: place * self.hidden, stride: self.steps * self.directions * self.hidden },
            false => Rows { start: place * self.state(), stride: self.hidden },
        }
    }

    /// Of initial and last states.
    pub(super) fn states(&self, d: usize) -> Rows {
        match self.batch_first {
            true => Rows { start: d * self.hidden, stride: self.directions * self.hidden },
            false => Rows { start: d * self.state(), stride: self.hidden },
        }
    }

    /// Row `n` of an initial state, which may be one row for the whole batch.
    pub(super) fn initial<'a, T>(&self, state: &'a [T], d: usize, n: usize) -> &'a [T] {
        match state.len() == self.directions * self.hidden {
            true => &state[d * self.hidden..][..self.hidden],
            false => self.states(d).of(state, n, self.hidden),
        }
    }

    /// The `i`th step of direction `d`.
    pub(super) fn step(&self, d: usize, i: usize) -> usize {
        if self.reverse[d] { self.steps - 1 - i } else { i }
    }

    /// The step before `t`.
    pub(super) fn before(&self, d: usize, t: usize) -> Option<usize> {
        match self.reverse[d] {
            true => Some(t + 1).filter(|t| *t < self.steps),
            false => t.checked_sub(1),
        }
    }

    /// Rows of the batch in a task.
    pub(super) fn grain(&self) -> usize {
        (GRAIN / self.width().max(1)).max(1)
    }

    /// `z += h·Rᵀ` for the gates `from..from + count`, whose weights are packed.
    pub(super) fn recur<T: Vectors>(
        &self,
        z: &mut [T],
        stride: usize,
        h: &[T],
        r: &[T],
        of: [usize; 2],
        packed: &[T],
    ) {
        let [from, count] = of;
        let r = &r[from * self.hidden * self.hidden..];
        times(self.recurrence(count, stride), h, r, packed, &mut z[from * self.hidden..]);
    }

    pub(super) fn recurrence<T: Vectors>(&self, gates: usize, stride: usize) -> Product<T> {
        let p = Product::dense(false, true, self.batch, gates * self.hidden, self.hidden);
        Product { beta: T::one(), ldc: stride, ..p }
    }

    /// `dh = beta·dh + dz·R` for the gates `from..from + count`, whose weights are packed, `dz` beginning with the first.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn recur_back<T: Vectors>(
        &self,
        dz: &[T],
        stride: usize,
        r: &[T],
        [from, count]: [usize; 2],
        beta: T,
        dh: &mut [T],
        packed: &[T],
    ) {
        let p = Product { beta, ..self.back(count, stride) };
        times(p, dz, &r[from * self.hidden * self.hidden..], packed, dh);
    }

    /// Packs the recurrent weights of one direction for steps backwards: of the first `split` gates, and of the others.
    pub(super) fn pack_back<'a, T: Vectors>(&self, split: usize, r: &[T], room: &'a mut [T]) -> [&'a [T]; 2] {
        let parts = [self.back(split, self.width()), self.back(self.gates - split, self.width())];
        self.pack(parts, split, r, room)
    }

    /// The same for steps forwards.
    pub(super) fn pack_forward<'a, T: Vectors>(
        &self,
        split: usize,
        r: &[T],
        room: &'a mut [T],
    ) -> [&'a [T]; 2] {
        let part = |gates: usize| self.recurrence(gates, gates * self.hidden);
        self.pack([part(split), part(self.gates - split)], split, r, room)
    }

    fn pack<'a, T: Vectors>(
        &self,
        [first, second]: [Product<T>; 2],
        split: usize,
        r: &[T],
        room: &'a mut [T],
    ) -> [&'a [T]; 2] {
        let (first, second) = (Near::shared(first), Near::shared(second));
        let (a, rest) = room.split_at_mut(first.packed());
        first.pack(Elements::Whole(r), a);
        if split == self.gates {
            return [a, &[]];
        }
        let b = &mut rest[..second.packed()];
        second.pack(Elements::Whole(&r[split * self.hidden * self.hidden..]), b);
        [a, b]
    }

    pub(super) fn back<T: Vectors>(&self, gates: usize, stride: usize) -> Product<T> {
        let p = Product::dense(false, false, self.batch, self.hidden, gates * self.hidden);
        Product { beta: T::one(), lda: stride, ..p }
    }

    /// The input's part of some rows' gates, for all directions or one.
    pub(super) fn projection<T: Vectors>(&self, rows: usize, directions: usize) -> Product<T> {
        Product::dense(false, true, rows, directions * self.width(), self.input)
    }

    /// Steps whose gates are computed at a time where nobody keeps them.
    pub(super) fn block(&self) -> usize {
        match self.batch_first {
            true => self.steps,
            false => BLOCK.div_ceil(self.batch.max(1)).min(self.steps),
        }
    }
}
