//! Attention and its gradients, a block of queries at a time: no matrix of all scores is kept.
//!
//! `Y = softmax(scale·Q·Kᵀ + mask)·V` for each sample and head (Vaswani et al. 2017); the gradients compute the
//! probabilities again, from the scores and the logarithm of each row's sum that the forward pass leaves (Dao et al.
//! 2022). A sample's head is one task, whose sums have one order.
#![allow(unsafe_code)]

use std::ops::Range;

use crate::kernels::gemm::{Near, Product};
use crate::kernels::half::{Elements, Half};
use crate::kernels::isa::vectorize;
use crate::kernels::math::Math;
use crate::kernels::norm::{sum, sum2};
use crate::kernels::par::{Shared, in_slots, slots};
use crate::kernels::simd::Vectors;
use crate::kernels::softmax::largest;
use crate::tensor::Float;

/// Scores that are computed at a time: they stay in the second-level cache.
const BLOCK: usize = 1 << 14;
/// Queries that are computed together at least, as far as there are so many.
const ROWS: usize = 16;

/// Sizes, and where Q, K, V, Y and the mask lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attention {
    pub batch: usize,
    pub heads: usize,
    pub queries: usize,
    pub keys: usize,
    /// Elements of a query and a key, and of a value.
    pub depth: usize,
    pub values: usize,
    pub q: Rows,
    pub k: Rows,
    pub v: Rows,
    pub y: Rows,
    /// Of an element of the mask to the next sample's, head's, query's and key's: 0 where it is the same.
    pub mask: [usize; 4],
    /// Multiply pairs of bfloat16, where products are large enough?
    pub pairs: bool,
}

/// Elements from a row to that of the next sample, of the next head and of the next position; a row's elements are
/// neighbours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rows {
    pub sample: usize,
    pub head: usize,
    pub position: usize,
}

impl Rows {
    fn at(&self, sample: usize, head: usize) -> usize {
        sample * self.sample + head * self.head
    }

    /// Elements that a tensor with such rows has at least.
    fn extent(&self, [batch, heads, positions]: [usize; 3], len: usize) -> usize {
        match batch * heads * positions * len {
            0 => 0,
            _ => (batch - 1) * self.sample + (heads - 1) * self.head + (positions - 1) * self.position + len,
        }
    }
}

/// What is read beside Q, K and V.
#[derive(Debug, Clone, Copy)]
pub struct Scores<'a, T> {
    pub scale: T,
    pub mask: Option<&'a [T]>,
}

impl Attention {
    /// Queries of a block.
    fn block(&self) -> usize {
        (BLOCK / self.keys.max(1)).next_multiple_of(ROWS).clamp(1, self.queries.max(1))
    }

    fn tasks(&self) -> usize {
        self.batch * self.heads
    }

    /// Are products by pairs of bfloat16?
    pub fn by_pairs<T: Vectors>(&self) -> bool {
        let least = Product::<T>::dense(false, true, self.block(), self.keys, self.depth.min(self.values));
        self.pairs && least.suits_pairs()
    }

    fn near<T: Vectors>(&self, product: Product<T>) -> Near<T> {
        Near::alone(product, self.by_pairs::<T>())
    }

    /// Q·Kᵀ of so many queries.
    fn scores<T: Vectors>(&self, rows: usize, scale: T) -> Near<T> {
        let p = Product::dense(false, true, rows, self.keys, self.depth);
        self.near(Product { alpha: scale, lda: self.q.position, ldb: self.k.position, ..p })
    }

    /// P·V
    fn sums<T: Vectors>(&self, rows: usize) -> Near<T> {
        let p = Product::dense(false, false, rows, self.values, self.keys);
        self.near(Product { ldb: self.v.position, ldc: self.y.position, ..p })
    }

    /// dP = dY·Vᵀ
    fn score_grads<T: Vectors>(&self, rows: usize) -> Near<T> {
        let p = Product::dense(false, true, rows, self.keys, self.values);
        self.near(Product { lda: self.y.position, ldb: self.v.position, ..p })
    }

    /// dQ = scale·dS·K
    fn query_grads<T: Vectors>(&self, to: usize, rows: usize, scale: T) -> Near<T> {
        let p = Product::dense(false, false, rows, self.depth, self.keys);
        self.near(Product { alpha: scale, ldb: self.k.position, ldc: to, ..p })
    }

    /// dK = scale·dSᵀ·Q, added to what the blocks before gave.
    fn key_grads<T: Vectors>(&self, to: usize, rows: usize, scale: T, beta: T) -> Near<T> {
        let p = Product::dense(true, false, self.keys, self.depth, rows);
        self.near(Product { alpha: scale, beta, ldb: self.q.position, ldc: to, ..p })
    }

    /// dV = Pᵀ·dY, added to what the blocks before gave.
    fn value_grads<T: Vectors>(&self, to: usize, rows: usize, beta: T) -> Near<T> {
        let p = Product::dense(true, false, self.keys, self.values, rows);
        self.near(Product { beta, ldb: self.y.position, ldc: to, ..p })
    }

    fn check<T>(&self, [q, k, v, y]: [usize; 4], mask: Option<&[T]>) {
        let of = |positions| [self.batch, self.heads, positions];
        let last = [self.batch, self.heads, self.queries, self.keys];
        let reach: usize = last.iter().zip(&self.mask).map(|(n, step)| n.saturating_sub(1) * step).sum();
        assert!(
            q >= self.q.extent(of(self.queries), self.depth)
                && k >= self.k.extent(of(self.keys), self.depth)
                && v >= self.v.extent(of(self.keys), self.values)
                && y >= self.y.extent(of(self.queries), self.values)
                && mask.is_none_or(|m| m.len() > reach)
                && self.mask[3] <= 1,
            "operands of attention"
        );
    }

    /// Adds the mask of queries `first..` to their scores.
    #[inline(always)]
    fn add_mask<T: Math>(&self, mask: &[T], [sample, head]: [usize; 2], first: usize, scores: &mut [T]) {
        let [s, h, row, col] = self.mask;
        for (i, scores) in scores.chunks_exact_mut(self.keys).enumerate() {
            let at = sample * s + head * h + (first + i) * row;
            match col {
                0 => scores.iter_mut().for_each(|x| *x += mask[at]),
                _ => scores.iter_mut().zip(&mask[at..at + self.keys]).for_each(|(x, m)| *x += *m),
            }
        }
    }
}

/// The room of a task of the forward pass: scores, K and V as products read them, those products' own, and the rows of Q, K
/// and V that are widened, where those are of half precision and products are not by pairs.
fn forward_room<T: Vectors>(a: &Attention, halves: [bool; 3]) -> [usize; 7] {
    let rows = a.block();
    let (scores, sums) = (a.scores(rows, T::one()), a.sums::<T>(rows));
    let rest = scores.room_packed().max(sums.room_packed());
    let [q, k, v] = a.widened::<T>(halves);
    [rows * a.keys, scores.packed(), sums.packed(), rest, q, k, v]
}

/// Elements of scratch that [`forward`] needs; `halves`: which of Q, K and V are of half precision?
pub fn forward_scratch<T: Vectors>(a: &Attention, halves: [bool; 3]) -> usize {
    slots(a.tasks(), forward_room::<T>(a, halves).iter().sum())
}

/// Y, and in `logs` (batch, heads, queries) the logarithm of `Σ exp` of each row of scores.
pub fn forward<T: Vectors + Math>(
    a: &Attention,
    [q, k, v]: [Elements<T>; 3],
    scores: Scores<T>,
    y: &mut [T],
    logs: Option<&mut [T]>,
    scratch: &mut [T],
) {
    a.check([q.len(), k.len(), v.len(), y.len()], scores.mask);
    assert!(logs.as_ref().is_none_or(|l| l.len() == a.tasks() * a.queries), "operands of attention");
    if a.tasks() * a.queries * a.keys == 0 {
        return y.fill(T::zero());
    }
    let room = forward_room::<T>(a, [q, k, v].map(|x| !x.is_whole()));
    let rows = a.block();
    let (y, logs) = (Shared::new(y), logs.map(Shared::new));
    in_slots(a.tasks(), room.iter().sum(), scratch, |task, slot| {
        let at @ [sample, head] = [task / a.heads, task % a.heads];
        let [s, k_across, v_along, rest, near @ ..] = split(slot, room);
        let (a, [q, k, v]) = a.near_rows([q, k, v], at, near);
        a.scores(rows, scores.scale).pack(k, k_across);
        a.sums(rows).pack(v, v_along);
        for first in (0..a.queries).step_by(rows) {
            let n = rows.min(a.queries - first);
            let s = &mut s[..n * a.keys];
            a.scores(n, scores.scale).multiply_packed(q.from(first * a.q.position), k, k_across, s, rest);
            let logs = logs.as_ref().map(|logs| {
                // SAFETY: the rows' logarithms are this task's.
                unsafe { std::slice::from_raw_parts_mut(logs.ptr().add(task * a.queries + first), n) }
            });
            vectorize(
                #[inline(always)]
                || {
                    if let Some(mask) = scores.mask {
                        a.add_mask(mask, at, first, s);
                    }
                    probabilities(s, a.keys, logs);
                },
            );
            // SAFETY: `check` has seen to the extents; the rows are this task's.
            unsafe {
                let y = y.ptr().add(a.y.at(sample, head) + first * a.y.position);
                a.sums(n).multiply_packed_at(Elements::Whole(s), v, v_along, y, rest);
            }
        }
    });
}

/// Softmax of each row of scores, and the logarithms of its sums.
#[inline(always)]
fn probabilities<T: Math>(s: &mut [T], keys: usize, mut logs: Option<&mut [T]>) {
    for (i, s) in s.chunks_exact_mut(keys).enumerate() {
        let most = largest(s);
        T::m_weights(s, most);
        let total = sum(s, |x| x);
        if let Some(logs) = &mut logs {
            logs[i] = most + T::of(total.m_ln());
        }
        let factor = T::of(1.0 / total);
        s.iter_mut().for_each(|x| *x *= factor);
    }
}

/// A slot's parts.
fn split<T, const N: usize>(slot: &mut [T], sizes: [usize; N]) -> [&mut [T]; N] {
    let mut rest = slot;
    sizes.map(|size| rest.split_off_mut(..size).unwrap_or_default())
}

/// What is written; a gradient that nobody wants may be absent.
pub struct Out<'a, T> {
    pub q: Option<Gradient<'a, T>>,
    pub k: Option<Gradient<'a, T>>,
    pub v: Option<Gradient<'a, T>>,
    /// Of what is added to the scores: (batch, heads, queries, keys).
    pub mask: Option<&'a mut [T]>,
}

/// A gradient's place, whole or rounded.
pub enum Gradient<'a, T> {
    Whole(&'a mut [T]),
    Half(Half, &'a mut [u16]),
}

impl<'a, T: Float> Gradient<'a, T> {
    fn len(&self) -> usize {
        match self {
            Gradient::Whole(x) => x.len(),
            Gradient::Half(_, x) => x.len(),
        }
    }

    fn zero(&mut self) {
        match self {
            Gradient::Whole(x) => x.fill(T::zero()),
            Gradient::Half(_, x) => x.fill(0),
        }
    }

    fn shared(self) -> Place<'a, T> {
        match self {
            Gradient::Whole(x) => Place::Whole(Shared::new(x)),
            Gradient::Half(half, x) => Place::Half(half, Shared::new(x)),
        }
    }
}

enum Place<'a, T> {
    Whole(Shared<'a, T>),
    Half(Half, Shared<'a, u16>),
}

impl<T: Float> Place<'_, T> {
    /// Has `multiply` put rows where they belong, `step` apart from element `at` on; or, where they are rounded, near and
    /// dense, until the `last` time. It is given their step and place.
    ///
    /// # Safety
    /// As many rows of `len` elements as `near` has must lie there, and be this task's.
    unsafe fn fill(
        &self,
        (at, step): (usize, usize),
        len: usize,
        near: &mut [T],
        last: bool,
        multiply: impl FnOnce(usize, *mut T),
    ) {
        match self {
            Place::Whole(x) => multiply(step, x.ptr().wrapping_add(at)),
            Place::Half(half, x) => {
                multiply(len, near.as_mut_ptr());
                for (i, near) in near.chunks_exact(len.max(1)).enumerate().filter(|_| last) {
                    // SAFETY: the caller's promise.
                    let to = unsafe { std::slice::from_raw_parts_mut(x.ptr().add(at + i * step), len) };
                    half.round_near(near, to);
                }
            }
        }
    }
}

/// The room of a task of the backward pass: probabilities and the gradient of scores, a block's rows of dY or, later, dQ, those
/// of dK and dV where they are rounded, K twice and V as products read them, what products need besides, and the rows that are
/// widened.
fn grad_room<T: Vectors>(a: &Attention, halves: [bool; 3], made: [bool; 3]) -> [usize; 11] {
    let (rows, one) = (a.block(), T::one());
    let by_packed = [a.scores(rows, one), a.query_grads(a.q.position, rows, one), a.score_grads(rows)];
    let others = [rows, a.queries % rows].into_iter().filter(|rows| *rows > 0).flat_map(|rows| {
        let of = [a.key_grads(a.k.position, rows, one, one), a.value_grads(a.v.position, rows, one)];
        of.map(|p| p.room())
    });
    let rest = by_packed.iter().map(Near::room_packed).chain(others).fold(0, usize::max);
    let [k_across, k_along, v_across] = by_packed.map(|p| p.packed());
    let [q, k, v] = a.widened::<T>(halves);
    let block = rows * if made[0] { a.values.max(a.depth) } else { a.values };
    let [dk, dv] = a.sums_near(made);
    let sums = dk.end.max(dv.end);
    [rows * a.keys, rows * a.keys, block, sums, k_across, k_along, v_across, rest, q, k, v]
}

impl Attention {
    /// Elements of Q, K and V of a task that are widened: of half precision, where products are not by pairs.
    fn widened<T: Vectors>(&self, halves: [bool; 3]) -> [usize; 3] {
        let sizes = [self.queries * self.depth, self.keys * self.depth, self.keys * self.values];
        let widens = !self.by_pairs::<T>();
        [0, 1, 2].map(|i| if halves[i] && widens { sizes[i] } else { 0 })
    }

    /// Where dK and dV of a task are added up before they are rounded: of one block of queries alone, one after the other.
    fn sums_near(&self, made: [bool; 3]) -> [Range<usize>; 2] {
        let of = |i: usize, len: usize| if made[i] { self.keys * len } else { 0 };
        let (dk, dv) = (of(1, self.depth), of(2, self.values));
        let start = if self.block() >= self.queries { 0 } else { dk };
        [0..dk, start..start + dv]
    }

    /// Q, K and V of a task from its first rows on, and where those lie from there: as before, or, widened, next to one
    /// another.
    fn near_rows<'b, T: Vectors>(
        &self,
        [q, k, v]: [Elements<'b, T>; 3],
        [sample, head]: [usize; 2],
        [q_near, k_near, v_near]: [&'b mut [T]; 3],
    ) -> (Attention, [Elements<'b, T>; 3]) {
        let mut a = *self;
        let read = |x: Elements<'b, T>, len: usize, rows: &mut Rows, near: &'b mut [T]| {
            let start = rows.at(sample, head);
            if near.is_empty() {
                return x.from(start);
            }
            let each = near.chunks_exact_mut(len.max(1)).enumerate();
            each.for_each(|(i, near)| x.copy(start + i * rows.position, near));
            rows.position = len;
            Elements::Whole(&*near)
        };
        let q = read(q, self.depth, &mut a.q, q_near);
        let k = read(k, self.depth, &mut a.k, k_near);
        let v = read(v, self.values, &mut a.v, v_near);
        (a, [q, k, v])
    }
}

/// Elements of scratch that [`grads`] needs; `halves` and `made`: which of Q, K and V, and of dQ, dK and dV, are of half
/// precision?
pub fn grads_scratch<T: Vectors>(a: &Attention, halves: [bool; 3], made: [bool; 3]) -> usize {
    slots(a.tasks(), grad_room::<T>(a, halves, made).iter().sum())
}

/// dQ, dK and dV, each laid out as what it is the gradient of, from dY, laid out as Y, and the `logs` of [`forward`].
///
/// Without `dy`, it lies where dQ is to be: Q and Y are laid out alike then.
#[allow(clippy::too_many_arguments)]
pub fn grads<T: Vectors + Math>(
    a: &Attention,
    [q, k, v]: [Elements<T>; 3],
    scores: Scores<T>,
    dy: Option<&[T]>,
    logs: &[T],
    out: Out<T>,
    scratch: &mut [T],
) {
    let len = |x: &Option<Gradient<T>>| x.as_ref().map(Gradient::len);
    let in_place = match &out.q {
        Some(Gradient::Whole(dq)) if a.q == a.y && a.depth == a.values => dq.len(),
        _ => 0,
    };
    let dy_len = dy.map_or(in_place, <[T]>::len);
    a.check([q.len(), k.len(), v.len(), dy_len], scores.mask);
    assert!(
        len(&out.q).is_none_or(|n| n == q.len())
            && len(&out.k).is_none_or(|n| n == k.len())
            && len(&out.v).is_none_or(|n| n == v.len())
            && out.mask.as_ref().is_none_or(|x| x.len() == a.tasks() * a.queries * a.keys)
            && logs.len() == a.tasks() * a.queries,
        "operands of attention"
    );
    if a.tasks() * a.queries * a.keys == 0 {
        [out.q, out.k, out.v].into_iter().flatten().for_each(|mut x| x.zero());
        return out.mask.into_iter().for_each(|x| x.fill(T::zero()));
    }
    let made = [&out.q, &out.k, &out.v].map(|x| matches!(x, Some(Gradient::Half(..))));
    let room = grad_room::<T>(a, [q, k, v].map(|x| !x.is_whole()), made);
    let (rows, scale, sums_near) = (a.block(), scores.scale, a.sums_near(made));
    let [dq, dk, dv] = [out.q, out.k, out.v].map(|x| x.map(Gradient::shared));
    let dmask = out.mask.map(Shared::new);
    in_slots(a.tasks(), room.iter().sum(), scratch, |task, slot| {
        let at @ [sample, head] = [task / a.heads, task % a.heads];
        let [p, ds, block, sums, k_across, k_along, v_across, rest, near @ ..] = split(slot, room);
        // Q, K and V lie as `a` says from here on; their gradients as `to` says.
        let (to, (mut a, [q, k, v])) = (a, a.near_rows([q, k, v], at, near));
        a.y.position = a.values;
        // The first element of a row, and from there to the next row's.
        let place = |rows: Rows, first: usize| (rows.at(sample, head) + first * rows.position, rows.position);
        a.scores(rows, scale).pack(k, k_across);
        a.query_grads(to.q.position, rows, scale).pack(k, k_along);
        a.score_grads(rows).pack(v, v_across);
        for first in (0..a.queries).step_by(rows) {
            let n = rows.min(a.queries - first);
            let (p, ds) = (&mut p[..n * a.keys], &mut ds[..n * a.keys]);
            for (i, near) in block.chunks_exact_mut(a.values.max(1)).take(n).enumerate() {
                let (start, _) = place(to.y, first + i);
                match (dy, &dq) {
                    (Some(dy), _) => near.copy_from_slice(&dy[start..start + a.values]),
                    // SAFETY: `check` has seen to the extents; the row is this task's, which makes dQ of it later.
                    (None, Some(Place::Whole(dq))) => unsafe {
                        std::ptr::copy_nonoverlapping(dq.ptr().add(start), near.as_mut_ptr(), a.values);
                    },
                    (None, _) => unreachable!("dY lies where nothing does"),
                }
            }
            let (q, dy) = (q.from(first * a.q.position), Elements::Whole(&block[..n * a.values]));
            a.scores(n, scale).multiply_packed(q, k, k_across, p, rest);
            a.score_grads(n).multiply_packed(dy, v, v_across, ds, rest);
            let logs = &logs[task * a.queries + first..][..n];
            vectorize(
                #[inline(always)]
                || {
                    if let Some(mask) = scores.mask {
                        a.add_mask(mask, at, first, p);
                    }
                    for ((p, ds), log) in
                        p.chunks_exact_mut(a.keys).zip(ds.chunks_exact_mut(a.keys)).zip(logs)
                    {
                        T::m_weights(p, *log);
                        let mean = T::of(sum2(p, ds, |p, d| p * d));
                        ds.iter_mut().zip(&*p).for_each(|(d, p)| *d = *p * (*d - mean));
                    }
                },
            );
            if let Some(dmask) = &dmask {
                let start = (task * a.queries + first) * a.keys;
                // SAFETY: the scores' elements are this task's.
                unsafe { std::ptr::copy_nonoverlapping(ds.as_ptr(), dmask.ptr().add(start), ds.len()) }
            }
            let beta = if first == 0 { T::zero() } else { T::one() };
            let (p, ds, last) = (Elements::Whole(&*p), Elements::Whole(&*ds), first + n == a.queries);
            let [dk_near, dv_near] = sums_near.clone();
            // SAFETY: `check` has seen to the extents; the rows of this sample's head are this task's.
            unsafe {
                if let Some(dv) = &dv {
                    dv.fill(place(to.v, 0), a.values, &mut sums[dv_near], last, |step, dv| {
                        a.value_grads(step, n, beta).multiply_at(p, dy, dv, rest);
                    });
                }
                if let Some(dk) = &dk {
                    dk.fill(place(to.k, 0), a.depth, &mut sums[dk_near], last, |step, dk| {
                        a.key_grads(step, n, scale, beta).multiply_at(ds, q, dk, rest);
                    });
                }
                if let Some(dq) = &dq {
                    let near = match dq {
                        Place::Whole(_) => &mut [],
                        Place::Half(..) => &mut block[..n * a.depth],
                    };
                    dq.fill(place(to.q, first), a.depth, near, true, |step, dq| {
                        a.query_grads(step, n, scale).multiply_packed_at(ds, k, k_along, dq, rest);
                    });
                }
            }
        }
    });
}
