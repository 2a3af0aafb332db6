//! Recurrent layers: LSTM, GRU and the plain one, forward and backward through time.
//!
//! The input's part of all gates is one product for all steps. Then, step by step, a product with the recurrent weights
//! and a sweep over the rows of the batch. In the buffer `z` of (rows, directions, gates · hidden), a row for each step
//! of each sequence in the order in which X has them, arguments become the gates' values, from which the gradient is
//! computed. A sequence that is shorter than the others keeps its state in the steps that it lacks, and puts out zeros.

mod activation;
pub mod gru;
pub mod lstm;
pub mod simple;

use rayon::prelude::*;

use crate::kernels::gemm::{Plus, Product, gemm, gemm_prepared, many, prepare, prepared, room};
use crate::kernels::math::Math;
use crate::kernels::simd::Vectors;

pub use activation::Activation;

/// Elements of gates from which on a step's sweep is worth a second thread.
const GRAIN: usize = 1 << 13;
/// Rows whose gates are computed at a time where nobody keeps them.
const BLOCK: usize = 256;

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
struct Rows {
    start: usize,
    stride: usize,
}

impl Rows {
    fn of<'a, T>(&self, x: &'a [T], n: usize, width: usize) -> &'a [T] {
        &x[self.start + n * self.stride..][..width]
    }

    fn of_mut<'a, T>(&self, x: &'a mut [T], n: usize, width: usize) -> &'a mut [T] {
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
    fn state(&self) -> usize {
        self.batch * self.hidden
    }

    pub fn is_empty(&self) -> bool {
        self.rows() == 0
    }

    /// Of a tensor of (rows, D, width).
    fn at(&self, t: usize, d: usize, width: usize) -> Rows {
        let (first, apart) = if self.batch_first { (t, self.steps) } else { (t * self.batch, 1) };
        Rows { start: (first * self.directions + d) * width, stride: apart * self.directions * width }
    }

    /// Of Y.
    fn y(&self, t: usize, d: usize) -> Rows {
        let place = t * self.directions + d;
        match self.batch_first {
            true => Rows { start: place * self.hidden, stride: self.steps * self.directions * self.hidden },
            false => Rows { start: place * self.state(), stride: self.hidden },
        }
    }

    /// Of initial and last states.
    fn states(&self, d: usize) -> Rows {
        match self.batch_first {
            true => Rows { start: d * self.hidden, stride: self.directions * self.hidden },
            false => Rows { start: d * self.state(), stride: self.hidden },
        }
    }

    /// Row `n` of an initial state, which may be one row for the whole batch.
    fn initial<'a, T>(&self, state: &'a [T], d: usize, n: usize) -> &'a [T] {
        match state.len() == self.directions * self.hidden {
            true => &state[d * self.hidden..][..self.hidden],
            false => self.states(d).of(state, n, self.hidden),
        }
    }

    /// The `i`th step of direction `d`.
    fn step(&self, d: usize, i: usize) -> usize {
        if self.reverse[d] { self.steps - 1 - i } else { i }
    }

    /// The step before `t`.
    fn before(&self, d: usize, t: usize) -> Option<usize> {
        match self.reverse[d] {
            true => Some(t + 1).filter(|t| *t < self.steps),
            false => t.checked_sub(1),
        }
    }

    /// Rows of the batch in a task.
    fn grain(&self) -> usize {
        (GRAIN / self.width().max(1)).max(1)
    }

    /// `z += h·Rᵀ` for the gates `from..from + count`, whose weights are packed.
    fn recur<T: Vectors>(&self, z: &mut [T], stride: usize, h: &[T], r: &[T], of: [usize; 2], packed: &[T]) {
        let [from, count] = of;
        let r = &r[from * self.hidden * self.hidden..];
        gemm_prepared(&self.recurrence(count, stride), h, r, packed, &mut z[from * self.hidden..]);
    }

    fn recurrence<T: Vectors>(&self, gates: usize, stride: usize) -> Product<T> {
        let p = Product::dense(false, true, self.batch, gates * self.hidden, self.hidden);
        Product { beta: T::one(), ldc: stride, ..p }
    }

    /// `dh = beta·dh + dz·R` for the gates `from..from + count`, whose weights are packed, `dz` beginning with the first.
    #[allow(clippy::too_many_arguments)]
    fn recur_back<T: Vectors>(
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
        gemm_prepared(&p, dz, &r[from * self.hidden * self.hidden..], packed, dh);
    }

    /// Packs the recurrent weights of one direction for steps backwards: of the first `split` gates, and of the others.
    fn pack_back<'a, T: Vectors>(&self, split: usize, r: &[T], room: &'a mut [T]) -> [&'a [T]; 2] {
        let parts = [self.back(split, self.width()), self.back(self.gates - split, self.width())];
        self.pack(parts, split, r, room)
    }

    /// The same for steps forwards.
    fn pack_forward<'a, T: Vectors>(&self, split: usize, r: &[T], room: &'a mut [T]) -> [&'a [T]; 2] {
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
        let (a, rest) = room.split_at_mut(prepared(&first));
        prepare(&first, r, a);
        if split == self.gates {
            return [a, &[]];
        }
        let b = &mut rest[..prepared(&second)];
        prepare(&second, &r[split * self.hidden * self.hidden..], b);
        [a, b]
    }

    fn back<T: Vectors>(&self, gates: usize, stride: usize) -> Product<T> {
        let p = Product::dense(false, false, self.batch, self.hidden, gates * self.hidden);
        Product { beta: T::one(), lda: stride, ..p }
    }

    /// The input's part of some rows' gates, for all directions or one.
    fn projection<T: Vectors>(&self, rows: usize, directions: usize) -> Product<T> {
        Product::dense(false, true, rows, directions * self.width(), self.input)
    }

    /// Steps whose gates are computed at a time where nobody keeps them.
    fn block(&self) -> usize {
        match self.batch_first {
            true => self.steps,
            false => BLOCK.div_ceil(self.batch.max(1)).min(self.steps),
        }
    }
}

/// Is step `t` beyond the end of sequence `n`?
fn beyond(lengths: Option<&[i32]>, t: usize, n: usize) -> bool {
    lengths.is_some_and(|l| t >= usize::try_from(l[n]).unwrap_or(0))
}

/// Operands of a forward pass.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a, T> {
    pub x: &'a [T],
    /// (D, gates · hidden, input) and (D, gates · hidden, hidden).
    pub w: &'a [T],
    pub r: &'a [T],
    /// (D, 2 · gates · hidden): the input's, then the recurrent ones.
    pub b: Option<&'a [T]>,
    /// Of each sequence, at most the number of steps.
    pub lengths: Option<&'a [i32]>,
    pub h0: Option<&'a [T]>,
    pub c0: Option<&'a [T]>,
}

/// Results of a forward pass, those that are wanted.
#[derive(Debug)]
pub struct Outputs<'a, T> {
    pub y: Option<&'a mut [T]>,
    pub h: Option<&'a mut [T]>,
    pub c: Option<&'a mut [T]>,
    /// (rows, D, gates · hidden): the gates' values.
    pub z: Option<&'a mut [T]>,
    /// (rows, D, hidden): what else the cell keeps of each step.
    pub kept: Option<&'a mut [T]>,
}

/// A step of one direction.
struct Step<'a, T> {
    t: usize,
    d: usize,
    lengths: Option<&'a [i32]>,
    /// The state is not all zeros.
    started: bool,
    /// From the first row of the step, each `stride` from the one before.
    z: &'a mut [T],
    stride: usize,
    /// The state (N, hidden), and the cell's other one.
    h: &'a mut [T],
    c: &'a mut [T],
    /// The recurrent weights, packed: of the gates up to the split, and of the others.
    packed: [&'a [T]; 2],
}

trait Cell<T> {
    /// Gates whose recurrent products are one.
    fn split(&self) -> usize;
    /// Gates that the recurrent bias is added to with the input's one.
    fn joint_biases(&self) -> usize;
    /// Turns arguments into gates, and the state into the next one.
    fn step(&self, s: &Sequence, step: Step<T>);
}

/// Elements of scratch of a forward pass.
pub fn forward_scratch<T: Vectors>(s: &Sequence) -> usize {
    if s.is_empty() {
        return 0;
    }
    let rows = s.block() * s.batch;
    let products =
        [room(&s.projection::<T>(s.rows(), s.directions), 1), room(&s.projection::<T>(rows, 1), 1)];
    let own = 2 * s.state() + s.directions * s.width() + rows * s.width();
    own + packed_weights::<T>(s) + products.into_iter().max().unwrap_or(0)
}

/// Elements of the recurrent weights of one direction, packed for steps in either direction and any split.
fn packed_weights<T: Vectors>(s: &Sequence) -> usize {
    let of = |gates: usize| {
        let (forward, back) = (s.recurrence::<T>(gates, gates * s.hidden), s.back::<T>(gates, s.width()));
        prepared(&forward).max(prepared(&back))
    };
    (1..s.gates).map(|split| of(split) + of(s.gates - split)).max().unwrap_or(0).max(of(s.gates))
}

fn forward<T: Vectors>(
    s: &Sequence,
    cell: &impl Cell<T>,
    i: &Inputs<T>,
    mut o: Outputs<T>,
    scratch: &mut [T],
) {
    let (width, hidden) = (s.width(), s.hidden);
    if s.is_empty() {
        for (last, first) in [(o.h, i.h0), (o.c, i.c0)] {
            let Some(last) = last else { continue };
            match first {
                Some(first) if first.len() == last.len() => last.copy_from_slice(first),
                Some(first) => {
                    for (d, n) in (0..s.directions).flat_map(|d| (0..s.batch).map(move |n| (d, n))) {
                        s.states(d).of_mut(last, n, hidden).copy_from_slice(s.initial(first, d, n));
                    }
                }
                None => last.fill(T::zero()),
            }
        }
        return;
    }
    let (h, rest) = scratch.split_at_mut(s.state());
    let (c, rest) = rest.split_at_mut(s.state());
    let (bias, rest) = rest.split_at_mut(s.directions * width);
    let (own, rest) = rest.split_at_mut(s.block() * s.batch * width);
    let (weights, rest) = rest.split_at_mut(packed_weights::<T>(s));
    for (bias, b) in bias.chunks_exact_mut(width).zip(i.b.unwrap_or_default().chunks_exact(2 * width)) {
        let (input, recurrent) = b.split_at(width);
        bias.copy_from_slice(input);
        let joint = cell.joint_biases() * hidden;
        bias[..joint].iter_mut().zip(recurrent).for_each(|(b, r)| *b += *r);
    }
    if let Some(z) = &mut o.z {
        let plus = Plus { row: i.b.map(|_| &bias[..]), all: None };
        let p = s.projection(s.rows(), s.directions);
        many(&p, 1, |_| [0, 0], i.x, i.w, plus, z, 0, rest);
    }
    for d in 0..s.directions {
        let packed = s.pack_forward(cell.split(), &i.r[d * width * hidden..], weights);
        for (state, first) in [(&mut *h, i.h0), (&mut *c, i.c0)] {
            let Some(first) = first else {
                state.fill(T::zero());
                continue;
            };
            for (n, state) in state.chunks_exact_mut(hidden).enumerate() {
                state.copy_from_slice(s.initial(first, d, n));
            }
        }
        for at in 0..s.steps {
            let t = s.step(d, at);
            let (z, rows) = match &mut o.z {
                Some(z) => (&mut **z, s.at(t, d, width)),
                None => {
                    let block = s.block();
                    // The steps of a block, in the order of X.
                    let (first, count) = (at / block * block, block.min(s.steps - at / block * block));
                    let low = if s.reverse[d] { s.steps - first - count } else { first };
                    if at == first {
                        let x = if s.batch_first { i.x } else { &i.x[low * s.batch * s.input..] };
                        let w = &i.w[d * width * s.input..];
                        let plus = Plus { row: i.b.map(|_| &bias[d * width..][..width]), all: None };
                        let p = s.projection(count * s.batch, 1);
                        many(&p, 1, |_| [0, 0], x, w, plus, own, 0, rest);
                    }
                    let own = &mut own[..count * s.batch * width];
                    match s.batch_first {
                        true => (own, Rows { start: t * width, stride: s.steps * width }),
                        false => (own, Rows { start: (t - low) * s.batch * width, stride: width }),
                    }
                }
            };
            cell.step(
                s,
                Step {
                    t,
                    d,
                    lengths: i.lengths,
                    started: at > 0 || i.h0.is_some(),
                    z: &mut z[rows.start..],
                    stride: rows.stride,
                    h: &mut *h,
                    c: &mut *c,
                    packed,
                },
            );
            for n in 0..s.batch {
                if let Some(y) = &mut o.y {
                    let y = s.y(t, d).of_mut(y, n, hidden);
                    match beyond(i.lengths, t, n) {
                        true => y.fill(T::zero()),
                        false => y.copy_from_slice(&h[n * hidden..][..hidden]),
                    }
                }
                if let Some(kept) = &mut o.kept {
                    s.at(t, d, hidden).of_mut(kept, n, hidden).copy_from_slice(&c[n * hidden..][..hidden]);
                }
            }
        }
        for (last, state) in [(&mut o.h, &*h), (&mut o.c, &*c)] {
            let Some(last) = last else { continue };
            for (n, state) in state.chunks_exact(hidden).enumerate() {
                s.states(d).of_mut(last, n, hidden).copy_from_slice(state);
            }
        }
    }
}

/// What a gradient through time is computed from.
#[derive(Debug, Clone, Copy)]
pub struct Saved<'a, T> {
    pub r: &'a [T],
    pub lengths: Option<&'a [i32]>,
    pub h0: Option<&'a [T]>,
    pub c0: Option<&'a [T]>,
    pub y: Option<&'a [T]>,
    pub z: Option<&'a [T]>,
    pub kept: Option<&'a [T]>,
    pub dy: Option<&'a [T]>,
    /// Of the last states.
    pub dh: Option<&'a [T]>,
    pub dc: Option<&'a [T]>,
}

impl<'a, T: Vectors> Saved<'a, T> {
    /// Recurrent weights alone.
    pub fn nothing(r: &'a [T]) -> Self {
        let (lengths, y, z, kept) = (None, None, None, None);
        Saved { r, lengths, h0: None, c0: None, y, z, kept, dy: None, dh: None, dc: None }
    }

    /// Row `n` of the state before step `t` of direction `d`; `None`: zeros.
    fn h_before(&self, s: &Sequence, d: usize, t: usize, n: usize) -> Option<&'a [T]> {
        let before = s.before(d, t).filter(|t| !beyond(self.lengths, *t, n));
        match before {
            Some(t) => self.y.map(|y| s.y(t, d).of(y, n, s.hidden)),
            None => self.h0.map(|h| s.initial(h, d, n)),
        }
    }

    /// The same of the cell state, which goes on beyond a sequence's end.
    fn c_before(&self, s: &Sequence, d: usize, t: usize, n: usize) -> Option<&'a [T]> {
        match s.before(d, t) {
            Some(t) => self.kept.map(|c| s.at(t, d, s.hidden).of(c, n, s.hidden)),
            None => self.c0.map(|c| s.initial(c, d, n)),
        }
    }

    /// Starts the gradients of direction `d`'s state with those of the last one.
    fn start(&self, s: &Sequence, d: usize, last: Option<&[T]>, state: &mut [T]) {
        for (n, state) in state.chunks_exact_mut(s.hidden).enumerate() {
            match last {
                Some(last) => state.copy_from_slice(s.states(d).of(last, n, s.hidden)),
                None => state.fill(T::zero()),
            }
        }
    }

    /// Adds a step's output gradient.
    fn add_dy(&self, s: &Sequence, d: usize, t: usize, dh: &mut [T]) {
        let Some(dy) = self.dy else { return };
        for (n, dh) in dh.chunks_exact_mut(s.hidden).enumerate() {
            if !beyond(self.lengths, t, n) {
                dh.iter_mut().zip(s.y(t, d).of(dy, n, s.hidden)).for_each(|(a, b)| *a += *b);
            }
        }
    }
}

/// Writes the gradient of an initial state.
fn finish<T: Vectors>(s: &Sequence, d: usize, state: &[T], out: &mut Option<&mut [T]>) {
    let Some(out) = out else { return };
    for (n, state) in state.chunks_exact(s.hidden).enumerate() {
        s.states(d).of_mut(out, n, s.hidden).copy_from_slice(state);
    }
}

/// Elements of scratch of a gradient through time, with `states` buffers of a state's size.
pub fn backward_scratch<T: Vectors>(s: &Sequence, states: usize) -> usize {
    states * s.state() + packed_weights::<T>(s)
}

/// Elements of scratch that [`recurrent_weights`] needs.
pub fn recurrent_weights_scratch<T: Vectors>(s: &Sequence) -> usize {
    let products = (1..=s.gates).map(|gates| room(&recurrent_product::<T>(s, gates), 1)).max();
    s.rows() * s.hidden + products.unwrap_or(0)
}

fn recurrent_product<T: Vectors>(s: &Sequence, gates: usize) -> Product<T> {
    let p = Product::dense(true, false, gates * s.hidden, s.hidden, s.rows());
    Product { lda: s.directions * s.width(), ..p }
}

/// `dR = Σ_t dZ_tᵀ·h_{t−1}` (D, gates · hidden, hidden). Where the last gate read `r ⊙ h` (`reset`), so does its gradient.
pub fn recurrent_weights<T: Vectors>(
    s: &Sequence,
    saved: &Saved<T>,
    dz: &[T],
    reset: bool,
    dr: &mut [T],
    scratch: &mut [T],
) {
    if s.is_empty() {
        return dr.fill(T::zero());
    }
    let (width, hidden) = (s.width(), s.hidden);
    let (before, room) = scratch.split_at_mut(s.rows() * hidden);
    for (d, dr) in dr.chunks_exact_mut(width * hidden).enumerate() {
        before.par_chunks_exact_mut(hidden).with_min_len((GRAIN / hidden).max(1)).enumerate().for_each(
            |(row, out)| {
                let (t, n) = match s.batch_first {
                    true => (row % s.steps, row / s.steps),
                    false => (row / s.batch, row % s.batch),
                };
                match saved.h_before(s, d, t, n) {
                    Some(h) => out.copy_from_slice(h),
                    None => out.fill(T::zero()),
                }
            },
        );
        let whole = if reset { s.gates - 1 } else { s.gates };
        gemm(&recurrent_product(s, whole), &dz[d * width..], before, dr, room);
        if let (true, Some(z)) = (reset, saved.z) {
            for (row, h) in before.chunks_exact_mut(hidden).enumerate() {
                let r = &z[(row * s.directions + d) * width + hidden..][..hidden];
                h.iter_mut().zip(r).for_each(|(h, r)| *h *= *r);
            }
            let dz = &dz[d * width + whole * hidden..];
            gemm(&recurrent_product(s, 1), dz, before, &mut dr[whole * hidden * hidden..], room);
        }
    }
}

/// Calls `f` for the rows of a batch: number, and the row of each of `N` buffers, `widths` long and `strides` apart.
fn each_row<T: Math, const N: usize>(
    s: &Sequence,
    buffers: [(&mut [T], usize, usize); N],
    f: impl Fn(usize, [&mut [T]; N]) + Sync,
) {
    let (batch, grain) = (s.batch, s.grain());
    split_rows(0, batch, grain, buffers, &f);
}

/// Halves the rows until they are few.
fn split_rows<T: Math, const N: usize>(
    first: usize,
    count: usize,
    grain: usize,
    buffers: [(&mut [T], usize, usize); N],
    f: &(impl Fn(usize, [&mut [T]; N]) + Sync),
) {
    if count > grain {
        let half = count / 2;
        let mut low: [(&mut [T], usize, usize); N] = std::array::from_fn(|_| (&mut [][..], 0, 0));
        let mut high: [(&mut [T], usize, usize); N] = std::array::from_fn(|_| (&mut [][..], 0, 0));
        for (i, (buffer, stride, width)) in buffers.into_iter().enumerate() {
            let (a, b) = buffer.split_at_mut(half * stride);
            (low[i], high[i]) = ((a, stride, width), (b, stride, width));
        }
        rayon::join(
            || split_rows(first, half, grain, low, f),
            || split_rows(first + half, count - half, grain, high, f),
        );
        return;
    }
    let mut buffers = buffers;
    for n in 0..count {
        let rows = buffers.each_mut().map(|(buffer, stride, width)| {
            let whole = std::mem::take(buffer);
            let at = (*stride).min(whole.len());
            let (row, rest) = whole.split_at_mut(at);
            *buffer = rest;
            &mut row[..*width]
        });
        f(first + n, rows);
    }
}
