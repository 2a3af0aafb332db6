//! Reading and writing by index.
//!
//! Indices are checked once, up front, and may count from the end. Sums over repeated indices run in the order
//! of the indices for each destination, whatever the number of threads.

use bytemuck::Pod;

use crate::kernels::half::Half;
use crate::kernels::par::{GRAIN, rows};
use crate::kernels::strided::{Extents, Unit, dense};
use crate::tensor::Float;

/// An index operand.
#[derive(Debug, Clone, Copy)]
pub enum Indices<'a> {
    I32(&'a [i32]),
    I64(&'a [i64]),
}

impl Indices<'_> {
    pub fn len(&self) -> usize {
        match self {
            Indices::I32(v) => v.len(),
            Indices::I64(v) => v.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    #[inline]
    pub fn get(&self, i: usize) -> i64 {
        match self {
            Indices::I32(v) => v[i] as i64,
            Indices::I64(v) => v[i],
        }
    }

    /// Index `i` counted from the front of an axis of `n`; the whole operand has been checked.
    #[inline]
    fn at(&self, i: usize, n: usize) -> usize {
        let k = self.get(i);
        if k < 0 { (k + n as i64) as usize } else { k as usize }
    }

    /// The first index outside `-n..n`.
    pub fn outside(&self, n: usize) -> Option<i64> {
        let n = n as i64;
        (0..self.len()).map(|i| self.get(i)).find(|k| !(-n..n).contains(k))
    }
}

/// `y[o, m, :] = x[o, index[m], :]`, x (outer, n, block), y (outer, indices, block).
pub fn gather<T: Unit>(x: &[T], n: usize, block: usize, index: Indices, y: &mut [T]) {
    let m = index.len();
    rows(y, block, GRAIN, |first, piece| {
        if block == 1 {
            for (r, y) in piece.iter_mut().enumerate() {
                let (o, k) = ((first + r) / m, (first + r) % m);
                *y = x[o * n + index.at(k, n)];
            }
            return;
        }
        for (r, y) in piece.chunks_exact_mut(block).enumerate() {
            let (o, k) = ((first + r) / m, (first + r) % m);
            let at = (o * n + index.at(k, n)) * block;
            y.copy_from_slice(&x[at..at + block]);
        }
    });
}

/// Elements that are moved before they are widened.
const NEAR: usize = 256;

/// As [`gather`], of a table in half precision, whose bytes may lie anywhere.
pub fn gather_half(half: Half, x: &[u8], n: usize, block: usize, index: Indices, y: &mut [f32]) {
    let (m, size) = (index.len(), half.dtype().size());
    rows(y, block, GRAIN, |first, piece| {
        let mut near = [0u16; NEAR];
        for (r, y) in piece.chunks_exact_mut(block).enumerate() {
            let (o, k) = ((first + r) / m, (first + r) % m);
            let at = (o * n + index.at(k, n)) * block * size;
            for (y, x) in y.chunks_mut(NEAR).zip(x[at..].chunks(NEAR * size)) {
                let near = &mut near[..y.len()];
                bytemuck::cast_slice_mut(near).copy_from_slice(&x[..y.len() * size]);
                half.widen(near, y);
            }
        }
    });
}

/// Rows of a destination that one task owns: large, since each task reads all indices.
const OWNED: usize = 1 << 17;

/// The transpose of [`gather`]: `dx[o, index[m], :] += dy[o, m, :]`, in the order of `m`.
pub fn scatter_add<T>(dy: &[T], n: usize, block: usize, index: Indices, dx: &mut [T])
where
    T: Pod + Send + Sync + std::ops::AddAssign,
{
    let m = index.len();
    rows(dx, block, OWNED, |first, piece| {
        piece.fill(T::zeroed());
        if block == 0 || n == 0 {
            return;
        }
        let count = piece.len() / block;
        // The piece may span several outer positions.
        for o in first / n..=(first + count - 1) / n {
            for k in 0..m {
                let row = o * n + index.at(k, n);
                if row < first || row >= first + count {
                    continue;
                }
                let to = &mut piece[(row - first) * block..][..block];
                let from = &dy[(o * m + k) * block..][..block];
                add(to, from);
            }
        }
    });
}

/// The same for one outer position, of the `n` rows only those that were read: `sums[k]` is the sum for the row that `index[k]`
/// is the first to read, or zero; `at[row]` is that k, or -1.
pub fn row_sums<T>(dy: &[T], n: usize, block: usize, index: Indices, sums: &mut [T], at: &mut [i32])
where
    T: Pod + std::ops::AddAssign,
{
    sums.fill(T::zeroed());
    at.fill(-1);
    for k in 0..index.len() {
        let first = &mut at[index.at(k, n)];
        if *first < 0 {
            *first = k as i32;
        }
        add(&mut sums[*first as usize * block..][..block], &dy[k * block..][..block]);
    }
}

fn add<T: Copy + std::ops::AddAssign>(to: &mut [T], from: &[T]) {
    to.iter_mut().zip(from).for_each(|(t, f)| *t += *f);
}

/// `y = f(y, updates)`, element by element.
#[inline]
pub fn each<T: Copy>(y: &mut [T], updates: &[T], f: impl Fn(T, T) -> T) {
    y.iter_mut().zip(updates).for_each(|(y, u)| *y = f(*y, *u));
}

/// How axis-wise indices walk a tensor: position `p` of the indices, of shape `dims`, is coordinate `p` of the
/// data but for `axis`, where the index stands instead.
pub struct AlongAxis<'a> {
    pub data: &'a [usize],
    pub dims: &'a [usize],
    pub axis: usize,
    pub index: Indices<'a>,
}

impl AlongAxis<'_> {
    /// The data's offsets of positions `start..start + count`, in order.
    fn visit(&self, start: usize, count: usize, mut f: impl FnMut(usize, usize)) {
        if count == 0 {
            return;
        }
        let mut strides: Extents = dense(self.data).iter().map(|&s| s as usize).collect();
        let along = std::mem::replace(&mut strides[self.axis], 0);
        let n = self.data[self.axis];
        let rank = self.dims.len();
        let (mut at, mut offset, mut rest) = (Extents::from_elem(0, rank), 0, start);
        for a in (0..rank).rev() {
            at[a] = rest % self.dims[a];
            rest /= self.dims[a];
            offset += at[a] * strides[a];
        }
        for p in start..start + count {
            f(p, offset + self.index.at(p, n) * along);
            for a in (0..rank).rev() {
                at[a] += 1;
                offset += strides[a];
                if at[a] < self.dims[a] {
                    break;
                }
                offset -= strides[a] * self.dims[a];
                at[a] = 0;
            }
        }
    }

    /// `y[p] = x[offset(p)]`.
    pub fn gather<T: Unit>(&self, x: &[T], y: &mut [T]) {
        rows(y, 1, GRAIN, |start, piece| {
            self.visit(start, piece.len(), |p, offset| piece[p - start] = x[offset]);
        });
    }

    /// Every offset, in order.
    pub fn visit_all(&self, mut f: impl FnMut(usize)) {
        self.visit(0, self.index.len(), |_, offset| f(offset));
    }

    /// `f(y[offset(p)], updates[p])`, each as a slice of one, in the order of `p`.
    pub fn scatter<T>(&self, updates: &[T], y: &mut [T], f: impl Fn(&mut [T], &[T])) {
        self.visit(0, updates.len(), |p, offset| f(&mut y[offset..=offset], &updates[p..=p]));
    }
}

/// How tuples of indices address blocks of a tensor: `index` is (batch, tuples, depth), the data
/// (batch, `data[0]`, …, `data[depth-1]`, block).
pub struct Tuples<'a> {
    pub data: &'a [usize],
    pub batch: usize,
    pub block: usize,
    pub index: Indices<'a>,
    /// Tuples in all batches together.
    pub count: usize,
}

impl Tuples<'_> {
    /// The first index outside its axis.
    pub fn outside(&self) -> Option<i64> {
        let depth = self.data.len();
        (0..self.index.len())
            .find(|&i| {
                let n = self.data[i % depth] as i64;
                !(-n..n).contains(&self.index.get(i))
            })
            .map(|i| self.index.get(i))
    }

    /// Which block tuple `t` (of all batches) addresses.
    fn target(&self, t: usize) -> usize {
        let depth = self.data.len();
        let per = (self.count / self.batch.max(1)).max(1);
        let mut at = t / per;
        for (d, &n) in self.data.iter().enumerate() {
            at = at * n + self.index.at(t * depth + d, n);
        }
        at
    }

    /// The elements of the block that tuple `t` addresses.
    pub fn range(&self, t: usize) -> std::ops::Range<usize> {
        let at = self.target(t) * self.block;
        at..at + self.block
    }

    pub fn gather<T: Unit>(&self, x: &[T], y: &mut [T]) {
        rows(y, self.block, GRAIN, |first, piece| {
            for (r, y) in piece.chunks_exact_mut(self.block.max(1)).enumerate() {
                y.copy_from_slice(&x[self.range(first + r)]);
            }
        });
    }

    /// Every block of `updates` written by `f` to the block its tuple addresses, in order.
    pub fn scatter<T>(&self, updates: &[T], y: &mut [T], f: impl Fn(&mut [T], &[T])) {
        for (t, from) in updates.chunks_exact(self.block.max(1)).enumerate() {
            f(&mut y[self.range(t)], from);
        }
    }
}

/// Which terms a running sum or product takes, of x (outer, n, block): for position `i` those with `j ≤ i`, or `j ≥ i`
/// when `reverse`; without `i` itself when `exclusive`.
#[derive(Debug, Clone, Copy)]
pub struct Running {
    pub n: usize,
    pub block: usize,
    pub exclusive: bool,
    pub reverse: bool,
}

/// `y[o, i, b]` is `f` over the terms of position `i`, from `start` on.
pub fn running<T: Pod + Send + Sync>(x: &[T], run: Running, y: &mut [T], start: T, f: fn(T, T) -> T) {
    let Running { n, block, exclusive, reverse } = run;
    let row = n * block;
    rows(y, row, GRAIN, |first, piece| {
        for (o, y) in piece.chunks_exact_mut(row.max(1)).enumerate() {
            let x = &x[(first + o) * row..][..row];
            for i in 0..n {
                let (i, before) = match reverse {
                    false => (i, i.checked_sub(1)),
                    true => (n - 1 - i, (i > 0).then(|| n - i)),
                };
                for b in 0..block {
                    let so_far = match before {
                        None => start,
                        Some(j) => y[j * block + b],
                    };
                    let term = match (exclusive, before) {
                        (false, _) => x[i * block + b],
                        (true, Some(j)) => x[j * block + b],
                        (true, None) => start,
                    };
                    y[i * block + b] = f(so_far, term);
                }
            }
        }
    });
}

/// The gradient of running products: `dx[j] = Σ dy[i] · Π x[k]` over the positions whose products hold x[j], k ≠ j.
/// Right where elements are 0; work grows with n².
pub fn running_product_grad<T: Float>(x: &[T], dy: &[T], run: Running, dx: &mut [T]) {
    let Running { n, block, exclusive, reverse } = run;
    let row = n * block;
    rows(dx, row, GRAIN, |first, piece| {
        for (o, dx) in piece.chunks_exact_mut(row.max(1)).enumerate() {
            let at = (first + o) * row;
            let (x, dy) = (&x[at..][..row], &dy[at..][..row]);
            for b in 0..block {
                // In the order in which the products grow.
                let place = |i: usize| (if reverse { n - 1 - i } else { i }) * block + b;
                let mut before = T::one();
                for j in 0..n {
                    let (mut others, mut sum) = (before, T::zero());
                    if !exclusive {
                        sum += dy[place(j)] * others;
                    }
                    for i in j + 1..n {
                        if exclusive {
                            sum += dy[place(i)] * others;
                            others *= x[place(i)];
                        } else {
                            others *= x[place(i)];
                            sum += dy[place(i)] * others;
                        }
                    }
                    dx[place(j)] = sum;
                    before *= x[place(j)];
                }
            }
        }
    });
}
