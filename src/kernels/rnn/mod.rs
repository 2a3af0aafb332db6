//! Recurrent layers: LSTM, GRU and the plain one, forward and backward through time.
//!
//! The input's part of all gates is one product for all steps. Then, step by step, a product with the recurrent weights
//! and a sweep over the rows of the batch. In the buffer `z` of (rows, directions, gates · hidden), a row for each step
//! of each sequence in the order in which X has them, arguments become the gates' values, from which the gradient is
//! computed. A sequence that is shorter than the others keeps its state in the steps that it lacks, and puts out zeros.

mod activation;
mod gru;
mod lstm;
mod plain;
mod sequence;

use crate::kernels::gemm::{Near, Plus, Product, gemm, many, room};
use crate::kernels::math::Math;
use crate::kernels::par;
use crate::kernels::simd::Vectors;

pub use activation::Activation;
pub use lstm::peephole_grad;
pub use sequence::Sequence;
use sequence::{GRAIN, Rows};

/// Is step `t` beyond the end of sequence `n`?
fn beyond(lengths: Option<&[i32]>, t: usize, n: usize) -> bool {
    lengths.is_some_and(|l| t >= usize::try_from(l[n]).unwrap_or(0))
}

/// Operands of a forward pass.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a, T> {
    pub x: &'a [T],
    /// (D, gates · hidden, input)
    pub w: &'a [T],
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

/// The kinds of cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `h' = f(z + h·Rᵀ)`.
    Plain,
    /// `reset_after`: the reset gate multiplies the product of the state, not the state; that product is kept of each step.
    Gru { reset_after: bool },
    /// `coupled`: the forget gate is what the input gate leaves. The cell states are kept of each step.
    Lstm { coupled: bool },
}

impl Kind {
    pub fn gates(self) -> usize {
        match self {
            Kind::Plain => 1,
            Kind::Gru { .. } => 3,
            Kind::Lstm { .. } => 4,
        }
    }

    /// States that go from step to step.
    pub fn states(self) -> usize {
        if matches!(self, Kind::Lstm { .. }) { 2 } else { 1 }
    }

    /// Are the gradients of the gates' arguments others for the recurrent part than for the input's?
    pub fn splits_gradient(self) -> bool {
        self == Kind::Gru { reset_after: true }
    }

    /// Gates whose recurrent products are one, forwards.
    fn split(self) -> usize {
        if matches!(self, Kind::Gru { .. }) { 2 } else { self.gates() }
    }

    /// The same backwards.
    fn split_back(self) -> usize {
        if self == (Kind::Gru { reset_after: false }) { 2 } else { self.gates() }
    }

    /// Gates that the recurrent bias is added to with the input's one.
    fn joint_biases(self) -> usize {
        if self.splits_gradient() { 2 } else { self.gates() }
    }

    /// Buffers of a state's size for a gradient.
    fn buffers(self) -> usize {
        match self {
            Kind::Plain => 1,
            Kind::Gru { .. } => 2,
            Kind::Lstm { .. } => 3,
        }
    }
}

/// What a layer's cells compute with.
#[derive(Debug, Clone, Copy)]
pub struct Cell<'a, T> {
    pub kind: Kind,
    /// Of each direction; a kind has the first ones.
    pub activations: &'a [[Activation; 3]; 2],
    pub clip: Option<T>,
    /// (D, gates · hidden, hidden)
    pub r: &'a [T],
    /// (D, 2 · gates · hidden): the input's, then the recurrent ones.
    pub b: Option<&'a [T]>,
    /// Of an LSTM's i, o, f: (D, 3 · hidden).
    pub peepholes: Option<&'a [T]>,
}

impl<'a, T: Vectors + Math> Cell<'a, T> {
    /// The recurrent weights of direction `d`.
    fn weights(&self, s: &Sequence, d: usize) -> &'a [T] {
        &self.r[d * s.width() * s.hidden..]
    }

    /// Turns arguments into gates, and the state into the next one.
    fn step(&self, s: &Sequence, step: Step<T>) {
        match self.kind {
            Kind::Plain => plain::step(self, s, step),
            Kind::Gru { reset_after } => gru::step(self, reset_after, s, step),
            Kind::Lstm { coupled } => lstm::step(self, coupled, s, step),
        }
    }

    /// Gradients of the gates' arguments from those of the state, and of the state before.
    fn back(&self, s: &Sequence, saved: &Saved<T>, step: StepBack<T>) {
        match self.kind {
            Kind::Plain => plain::back(self, s, saved, step),
            Kind::Gru { .. } => gru::back(self, s, saved, step),
            Kind::Lstm { coupled } => lstm::back(self, coupled, s, saved, step),
        }
    }
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
        Near::shared(forward).packed().max(Near::shared(back).packed())
    };
    (1..s.gates).map(|split| of(split) + of(s.gates - split)).max().unwrap_or(0).max(of(s.gates))
}

/// The forward pass.
pub fn forward<T: Vectors + Math>(
    s: &Sequence,
    cell: &Cell<T>,
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
    for (bias, b) in bias.chunks_exact_mut(width).zip(cell.b.unwrap_or_default().chunks_exact(2 * width)) {
        let (input, recurrent) = b.split_at(width);
        bias.copy_from_slice(input);
        let joint = cell.kind.joint_biases() * hidden;
        bias[..joint].iter_mut().zip(recurrent).for_each(|(b, r)| *b += *r);
    }
    if let Some(z) = &mut o.z {
        let plus = Plus { row: cell.b.map(|_| &bias[..]), all: None };
        let p = s.projection(s.rows(), s.directions);
        many(&p, 1, |_| [0, 0], i.x, i.w, plus, z, 0, rest);
    }
    for d in 0..s.directions {
        let packed = s.pack_forward(cell.kind.split(), cell.weights(s, d), weights);
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
                        let plus = Plus { row: cell.b.map(|_| &bias[d * width..][..width]), all: None };
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
#[derive(Debug, Clone, Copy, Default)]
pub struct Saved<'a, T> {
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

/// Gradients that are computed through time; `None`: not wanted.
#[derive(Debug)]
pub struct Gradients<'a, T> {
    /// Of the gates' arguments (rows, D, gates · hidden).
    pub dz: &'a mut [T],
    /// Of their recurrent part, for a kind that [`Kind::splits_gradient`].
    pub dr: Option<&'a mut [T]>,
    /// Of the initial states.
    pub dh0: Option<&'a mut [T]>,
    pub dc0: Option<&'a mut [T]>,
}

/// A step of one direction, backwards.
struct StepBack<'a, T> {
    t: usize,
    d: usize,
    /// The state before this step is asked for.
    goes_on: bool,
    /// The step's rows of `dz` and `dr`.
    rows: Rows,
    dz: &'a mut [T],
    dr: Option<&'a mut [T]>,
    /// The state's gradient (N, hidden), and room for as much, which an LSTM keeps the cell state's in.
    dh: &'a mut [T],
    dc: &'a mut [T],
    room: &'a mut [T],
    /// The recurrent weights, packed: of the gates up to the split, and of the others.
    packed: [&'a [T]; 2],
}

/// Elements of scratch that [`backward`] needs.
pub fn backward_scratch<T: Vectors>(s: &Sequence, kind: Kind) -> usize {
    kind.buffers() * s.state() + packed_weights::<T>(s)
}

/// The gradient through time.
pub fn backward<T: Vectors + Math>(
    s: &Sequence,
    cell: &Cell<T>,
    saved: &Saved<T>,
    mut out: Gradients<T>,
    scratch: &mut [T],
) {
    let (states, weights) = scratch.split_at_mut(cell.kind.buffers() * s.state());
    let (dh, rest) = states.split_at_mut(s.state());
    let (dc, room) = rest.split_at_mut(s.state().min(rest.len()));
    if s.batch == 0 {
        return;
    }
    for d in 0..s.directions {
        for (state, last) in [(&mut *dh, saved.dh), (&mut *dc, saved.dc)] {
            for (n, state) in state.chunks_exact_mut(s.hidden).enumerate() {
                match last {
                    Some(last) => state.copy_from_slice(s.states(d).of(last, n, s.hidden)),
                    None => state.fill(T::zero()),
                }
            }
        }
        let packed = s.pack_back(cell.kind.split_back(), cell.weights(s, d), weights);
        for at in (0..s.steps).rev() {
            let t = s.step(d, at);
            saved.add_dy(s, d, t, dh);
            let step = StepBack {
                t,
                d,
                goes_on: at > 0 || out.dh0.is_some(),
                rows: s.at(t, d, s.width()),
                dz: &mut *out.dz,
                dr: out.dr.as_deref_mut(),
                dh: &mut *dh,
                dc: &mut *dc,
                room: &mut *room,
                packed,
            };
            cell.back(s, saved, step);
        }
        for (state, first) in [(&*dh, &mut out.dh0), (&*dc, &mut out.dc0)] {
            let Some(first) = first else { continue };
            for (n, state) in state.chunks_exact(s.hidden).enumerate() {
                s.states(d).of_mut(first, n, s.hidden).copy_from_slice(state);
            }
        }
    }
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
        par::rows(before, hidden, GRAIN, |first, piece| {
            for (row, out) in (first..).zip(piece.chunks_exact_mut(hidden)) {
                let (t, n) = match s.batch_first {
                    true => (row % s.steps, row / s.steps),
                    false => (row / s.batch, row % s.batch),
                };
                match saved.h_before(s, d, t, n) {
                    Some(h) => out.copy_from_slice(h),
                    None => out.fill(T::zero()),
                }
            }
        });
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

/// Halves the rows until they are few. Compiled once an element type, not once a cell.
fn split_rows<T: Math, const N: usize>(
    first: usize,
    count: usize,
    grain: usize,
    buffers: [(&mut [T], usize, usize); N],
    f: &(dyn Fn(usize, [&mut [T]; N]) + Sync),
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
