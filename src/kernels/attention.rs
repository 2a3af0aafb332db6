//! Attention and its gradients, a block of queries at a time: no matrix of all scores is kept.
//!
//! `Y = softmax(scale·Q·Kᵀ + mask)·V` for each sample and head (Vaswani et al. 2017); the gradients compute the
//! probabilities again, from the scores and the logarithm of each row's sum that the forward pass leaves (Dao et al.
//! 2022). A sample's head is one task, whose sums have one order.
#![allow(unsafe_code)]

use crate::kernels::gemm::{Product, gemm, gemm_prepared, prepare, prepared, room};
use crate::kernels::half::Elements;
use crate::kernels::isa::vectorize;
use crate::kernels::math::Math;
use crate::kernels::norm::{sum, sum2};
use crate::kernels::par::{Shared, in_slots, slots};
use crate::kernels::simd::Vectors;
use crate::kernels::softmax::largest;

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

/// A task's own product.
fn near<T: Vectors>(trans_a: bool, trans_b: bool, m: usize, n: usize, k: usize) -> Product<T> {
    Product { alone: true, ..Product::dense(trans_a, trans_b, m, n, k) }
}

impl Attention {
    /// Queries of a block.
    fn block(&self) -> usize {
        (BLOCK / self.keys.max(1)).next_multiple_of(ROWS).clamp(1, self.queries.max(1))
    }

    fn tasks(&self) -> usize {
        self.batch * self.heads
    }

    /// Q·Kᵀ of so many queries.
    fn scores<T: Vectors>(&self, rows: usize, scale: T) -> Product<T> {
        let p = near(false, true, rows, self.keys, self.depth);
        Product { alpha: scale, lda: self.q.position, ldb: self.k.position, ..p }
    }

    /// P·V
    fn sums<T: Vectors>(&self, rows: usize) -> Product<T> {
        Product { ldb: self.v.position, ..near(false, false, rows, self.values, self.keys) }
    }

    /// dP = dY·Vᵀ
    fn score_grads<T: Vectors>(&self, rows: usize) -> Product<T> {
        let p = near(false, true, rows, self.keys, self.values);
        Product { lda: self.y.position, ldb: self.v.position, ..p }
    }

    /// dQ = scale·dS·K
    fn query_grads<T: Vectors>(&self, rows: usize, scale: T) -> Product<T> {
        let p = near(false, false, rows, self.depth, self.keys);
        Product { alpha: scale, ldb: self.k.position, ..p }
    }

    /// dK += scale·dSᵀ·Q
    fn key_grads<T: Vectors>(&self, rows: usize, scale: T) -> Product<T> {
        let p = near(true, false, self.keys, self.depth, rows);
        Product { alpha: scale, beta: T::one(), ldb: self.q.position, ..p }
    }

    /// dV += Pᵀ·dY
    fn value_grads<T: Vectors>(&self, rows: usize) -> Product<T> {
        let p = near(true, false, self.keys, self.values, rows);
        Product { beta: T::one(), ldb: self.y.position, ..p }
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

/// The room of a task of the forward pass: scores, results of a block, K and V as products read them.
fn forward_room<T: Vectors>(a: &Attention) -> [usize; 4] {
    let rows = a.block();
    [rows * a.keys, rows * a.values, prepared(&a.scores(rows, T::one())), prepared(&a.sums::<T>(rows))]
}

/// Elements of scratch that [`forward`] needs.
pub fn forward_scratch<T: Vectors>(a: &Attention) -> usize {
    slots(a.tasks(), forward_room::<T>(a).iter().sum())
}

/// Y, and in `logs` (batch, heads, queries) the logarithm of `Σ exp` of each row of scores.
#[allow(clippy::too_many_arguments)]
pub fn forward<T: Vectors + Math>(
    a: &Attention,
    q: &[T],
    k: &[T],
    v: &[T],
    scores: Scores<T>,
    y: &mut [T],
    logs: &mut [T],
    scratch: &mut [T],
) {
    a.check([q.len(), k.len(), v.len(), y.len()], scores.mask);
    assert!(logs.len() == a.tasks() * a.queries, "operands of attention");
    if a.tasks() * a.queries * a.keys == 0 {
        return y.fill(T::zero());
    }
    let room = forward_room::<T>(a);
    let rows = a.block();
    let (y, logs) = (Shared::new(y), Shared::new(logs));
    in_slots(a.tasks(), room.iter().sum(), scratch, |task, slot| {
        let at @ [sample, head] = [task / a.heads, task % a.heads];
        let (q, k, v) = (&q[a.q.at(sample, head)..], &k[a.k.at(sample, head)..], &v[a.v.at(sample, head)..]);
        let [s, out, packed_k, packed_v] = split(slot, room);
        prepare(&a.scores(rows, scores.scale), k, packed_k);
        prepare(&a.sums(rows), v, packed_v);
        for first in (0..a.queries).step_by(rows) {
            let n = rows.min(a.queries - first);
            let s = &mut s[..n * a.keys];
            gemm_prepared(&a.scores(n, scores.scale), &q[first * a.q.position..], k, packed_k, s);
            // SAFETY: the rows' logarithms are this task's.
            let logs = unsafe { std::slice::from_raw_parts_mut(logs.ptr().add(task * a.queries + first), n) };
            vectorize(
                #[inline(always)]
                || {
                    if let Some(mask) = scores.mask {
                        a.add_mask(mask, at, first, s);
                    }
                    for (s, log) in s.chunks_exact_mut(a.keys).zip(logs) {
                        let most = largest(s);
                        s.iter_mut().for_each(|x| *x = (*x - most).m_exp());
                        let total = sum(s, |x| x);
                        *log = most + T::of(total.m_ln());
                        let factor = T::of(1.0 / total);
                        s.iter_mut().for_each(|x| *x *= factor);
                    }
                },
            );
            let out = &mut out[..n * a.values];
            gemm_prepared(&a.sums(n), s, v, packed_v, out);
            // SAFETY: `check` has seen to the extents; the rows are this task's.
            unsafe { put(&y, a.y, at, first, a.values, out) };
        }
    });
}

/// Writes rows of `len` elements to positions `first..` of a tensor.
///
/// # Safety
/// The tensor must have them, and nobody else may use them.
unsafe fn put<T: Copy>(to: &Shared<T>, rows: Rows, at: [usize; 2], first: usize, len: usize, from: &[T]) {
    let start = rows.at(at[0], at[1]);
    for (i, row) in from.chunks_exact(len.max(1)).enumerate() {
        // SAFETY: the caller's promise.
        unsafe {
            let to = to.ptr().add(start + (first + i) * rows.position);
            std::ptr::copy_nonoverlapping(row.as_ptr(), to, len);
        }
    }
}

/// A slot's parts.
fn split<T, const N: usize>(slot: &mut [T], sizes: [usize; N]) -> [&mut [T]; N] {
    let mut rest = slot;
    sizes.map(|size| rest.split_off_mut(..size).unwrap_or_default())
}

/// What is written; a gradient that nobody wants may be absent.
pub struct Out<'a, T> {
    pub q: Option<&'a mut [T]>,
    pub k: Option<&'a mut [T]>,
    pub v: Option<&'a mut [T]>,
    /// Of what is added to the scores: (batch, heads, queries, keys).
    pub mask: Option<&'a mut [T]>,
}

/// The room of a task of the backward pass: probabilities and the gradient of scores, dQ of a block, dK, dV, then K twice and
/// V as products read them, what the products of transposed blocks need, and the rows of Q, K and V that are widened,
/// where those are of half precision.
fn grad_room<T: Vectors>(a: &Attention, halves: [bool; 3]) -> [usize; 12] {
    let (rows, one) = (a.block(), T::one());
    let widened = |i: usize, size: usize| if halves[i] { size } else { 0 };
    [
        rows * a.keys,
        rows * a.keys,
        rows * a.depth,
        a.keys * a.depth,
        a.keys * a.values,
        prepared(&a.scores(rows, one)),
        prepared(&a.query_grads(rows, one)),
        prepared(&a.score_grads::<T>(rows)),
        [rows, a.queries % rows]
            .map(|rows| room(&a.key_grads(rows, one), 1).max(room(&a.value_grads::<T>(rows), 1)))
            .into_iter()
            .fold(0, usize::max),
        widened(0, a.queries * a.depth),
        widened(1, a.keys * a.depth),
        widened(2, a.keys * a.values),
    ]
}

/// The rows of a task from the first on: where they lie, or, of half precision, widened next to one another.
fn rows_near<'b, T: Vectors>(
    x: Elements<'b, T>,
    rows: &mut Rows,
    [sample, head]: [usize; 2],
    len: usize,
    near: &'b mut [T],
) -> &'b [T] {
    let (start, step) = (rows.at(sample, head), rows.position);
    if let Elements::Whole(x) = x {
        return &x[start..];
    }
    rows.position = len;
    let each = near.chunks_exact_mut(len.max(1)).enumerate();
    each.for_each(|(i, near)| x.copy(start + i * step, near));
    near
}

/// Elements of scratch that [`grads`] needs; `halves`: which of Q, K and V are of half precision?
pub fn grads_scratch<T: Vectors>(a: &Attention, halves: [bool; 3]) -> usize {
    slots(a.tasks(), grad_room::<T>(a, halves).iter().sum())
}

/// dQ, dK and dV, each laid out as what it is the gradient of, from dY, laid out as Y, and the `logs` of [`forward`].
#[allow(clippy::too_many_arguments)]
pub fn grads<T: Vectors + Math>(
    a: &Attention,
    [q, k, v]: [Elements<T>; 3],
    scores: Scores<T>,
    dy: &[T],
    logs: &[T],
    out: Out<T>,
    scratch: &mut [T],
) {
    let len = |x: &Option<&mut [T]>| x.as_ref().map(|x| x.len());
    a.check([q.len(), k.len(), v.len(), dy.len()], scores.mask);
    assert!(
        len(&out.q).is_none_or(|n| n == q.len())
            && len(&out.k).is_none_or(|n| n == k.len())
            && len(&out.v).is_none_or(|n| n == v.len())
            && len(&out.mask).is_none_or(|n| n == a.tasks() * a.queries * a.keys)
            && logs.len() == a.tasks() * a.queries,
        "operands of attention"
    );
    if a.tasks() * a.queries * a.keys == 0 {
        return [out.q, out.k, out.v, out.mask].into_iter().flatten().for_each(|x| x.fill(T::zero()));
    }
    let room = grad_room::<T>(a, [q, k, v].map(|x| !x.is_whole()));
    let (rows, scale) = (a.block(), scores.scale);
    let [dq, dk, dv, dmask] = [out.q, out.k, out.v, out.mask].map(|x| x.map(Shared::new));
    in_slots(a.tasks(), room.iter().sum(), scratch, |task, slot| {
        let at @ [sample, head] = [task / a.heads, task % a.heads];
        let [p, ds, block, k_sum, v_sum, k_across, k_along, v_across, rest, q_near, k_near, v_near] =
            split(slot, room);
        // Q, K and V lie as `a` says from here on; their gradients as `to` says.
        let (to, mut a) = (a, *a);
        let q = rows_near(q, &mut a.q, at, a.depth, q_near);
        let k = rows_near(k, &mut a.k, at, a.depth, k_near);
        let v = rows_near(v, &mut a.v, at, a.values, v_near);
        let dy = &dy[a.y.at(sample, head)..];
        prepare(&a.scores(rows, scale), k, k_across);
        prepare(&a.query_grads(rows, scale), k, k_along);
        prepare(&a.score_grads(rows), v, v_across);
        k_sum.fill(T::zero());
        v_sum.fill(T::zero());
        for first in (0..a.queries).step_by(rows) {
            let n = rows.min(a.queries - first);
            let (p, ds) = (&mut p[..n * a.keys], &mut ds[..n * a.keys]);
            let (q, dy) = (&q[first * a.q.position..], &dy[first * a.y.position..]);
            gemm_prepared(&a.scores(n, scale), q, k, k_across, p);
            gemm_prepared(&a.score_grads(n), dy, v, v_across, ds);
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
                        p.iter_mut().for_each(|x| *x = (*x - *log).m_exp());
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
            if let Some(dq) = &dq {
                let block = &mut block[..n * a.depth];
                gemm_prepared(&a.query_grads(n, scale), ds, k, k_along, block);
                // SAFETY: dQ has the extents of Q; the rows are this task's.
                unsafe { put(dq, to.q, at, first, a.depth, block) };
            }
            if dk.is_some() {
                gemm(&a.key_grads(n, scale), ds, q, k_sum, rest);
            }
            if dv.is_some() {
                gemm(&a.value_grads(n), p, dy, v_sum, rest);
            }
        }
        // SAFETY: dK and dV have the extents of K and V; their rows are this task's.
        unsafe {
            if let Some(dk) = &dk {
                put(dk, to.k, at, 0, a.depth, k_sum);
            }
            if let Some(dv) = &dv {
                put(dv, to.v, at, 0, a.values, v_sum);
            }
        }
    });
}
