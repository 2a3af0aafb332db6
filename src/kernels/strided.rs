//! Data movement between a dense tensor and a strided or padded one. Nothing here looks at values, so the
//! kernels are generic over the *size* of an element: `u8`, `u16`, `u32` or `u64` stand for every type.

use bytemuck::Pod;
use smallvec::SmallVec;

use crate::kernels::layout::axis_at;
use crate::kernels::par::{GRAIN, pieces, rows};

/// One (signed) step per axis, in elements.
pub type Strides = SmallVec<[isize; 8]>;
/// One extent per axis.
pub type Extents = SmallVec<[usize; 8]>;

/// What is moved: plain data of a power-of-two size.
pub trait Unit: Pod + Send + Sync + Default {}
impl Unit for u8 {}
impl Unit for u16 {}
impl Unit for u32 {}
impl Unit for u64 {}

/// The strides of a dense row-major tensor.
pub fn dense(dims: &[usize]) -> Strides {
    let mut strides = Strides::from_elem(1, dims.len());
    for i in (1..dims.len()).rev() {
        strides[i - 1] = strides[i] * dims[i] as isize;
    }
    strides
}

/// Drops axes of extent 1 and joins neighbours that are walked as one.
fn coalesce(dims: &[usize], strides: &[isize]) -> (Extents, Strides) {
    let (mut d, mut s) = (Extents::new(), Strides::new());
    for (&n, &step) in dims.iter().zip(strides) {
        if n == 1 {
            continue;
        }
        match (d.last_mut(), s.last_mut()) {
            (Some(last), Some(outer)) if *outer == step * n as isize => {
                *last *= n;
                *outer = step;
            }
            _ => {
                d.push(n);
                s.push(step);
            }
        }
    }
    (d, s)
}

/// Walks the coordinates of `dims` in row-major order while keeping their offset.
struct Odometer<'a> {
    dims: &'a [usize],
    strides: &'a [isize],
    at: Extents,
    offset: isize,
}

impl<'a> Odometer<'a> {
    /// Starts at the row-major position `index`.
    fn new(dims: &'a [usize], strides: &'a [isize], mut index: usize, base: isize) -> Self {
        let mut at = Extents::from_elem(0, dims.len());
        let mut offset = base;
        for i in (0..dims.len()).rev() {
            at[i] = index % dims[i];
            index /= dims[i];
            offset += at[i] as isize * strides[i];
        }
        Odometer { dims, strides, at, offset }
    }

    fn step(&mut self) {
        for i in (0..self.dims.len()).rev() {
            self.at[i] += 1;
            self.offset += self.strides[i];
            if self.at[i] < self.dims[i] {
                return;
            }
            self.offset -= self.strides[i] * self.dims[i] as isize;
            self.at[i] = 0;
        }
    }
}

/// `y[k] = x[base + k·stride]`.
#[inline]
fn line<T: Unit>(x: &[T], base: isize, stride: isize, y: &mut [T]) {
    match stride {
        1 => y.copy_from_slice(&x[base as usize..][..y.len()]),
        0 => y.fill(x[base as usize]),
        _ => {
            let mut at = base;
            for v in y {
                *v = x[at as usize];
                at += stride;
            }
        }
    }
}

/// `y[i] = x[base + i·strides]` for every coordinate `i` of `dims`; `y` is dense.
pub fn read<T: Unit>(x: &[T], base: usize, dims: &[usize], strides: &[isize], y: &mut [T]) {
    if y.is_empty() {
        return;
    }
    let base = base as isize;
    let (dims, strides) = coalesce(dims, strides);
    let rank = dims.len();
    match rank {
        0 => y.copy_from_slice(&x[base as usize..][..1]),
        1 => pieces(y, |start, piece| line(x, base + start as isize * strides[0], strides[0], piece)),
        _ => {
            let fast = strides[..rank - 1].iter().position(|&s| s == 1);
            match fast {
                Some(k) if !matches!(strides[rank - 1], 0 | 1) && dims[k] >= TILE / 4 => {
                    tiled(x, base, &dims, &strides, k, y)
                }
                _ => {
                    let inner = dims[rank - 1];
                    rows(y, inner, GRAIN, |row, piece| {
                        let mut walk = Odometer::new(&dims[..rank - 1], &strides[..rank - 1], row, base);
                        for y in piece.chunks_exact_mut(inner) {
                            line(x, walk.offset, strides[rank - 1], y);
                            walk.step();
                        }
                    });
                }
            }
        }
    }
}

const TILE: usize = 16;
/// Rows of `y` that are written at a time where each has fewer elements than a tile.
const RUN: usize = 512;

/// [`read`] where axis `k` is contiguous in `x` and the last axis is contiguous in `y`: in square tiles of the
/// two, so that both sides move whole cache lines.
fn tiled<T: Unit>(x: &[T], base: isize, dims: &[usize], strides: &[isize], k: usize, y: &mut [T]) {
    let last = dims.len() - 1;
    let (n, step) = (dims[last], strides[last]);
    let row: usize = dims[k + 1..].iter().product();
    let middle: usize = dims[k + 1..last].iter().product();
    // Whole groups of `TILE` rows where the axis allows, so that tiles are seldom cut by a piece's end.
    let grain = GRAIN.max(TILE * row);
    rows(y, row, grain, |first, piece| {
        let mut first = first;
        let mut rest = piece;
        while !rest.is_empty() {
            // Rows that share all coordinates before `k`.
            let at = first % dims[k];
            let count = (dims[k] - at).min(rest.len() / row).min(if n < TILE { RUN } else { TILE });
            let (group, tail) = std::mem::take(&mut rest).split_at_mut(count * row);
            let origin = Odometer::new(&dims[..=k], &strides[..=k], first, base).offset;
            let mut walk = Odometer::new(&dims[k + 1..last], &strides[k + 1..last], 0, origin);
            for m in 0..middle {
                let mut j = 0;
                while j < n {
                    let width = (n - j).min(TILE);
                    let from = walk.offset + j as isize * step;
                    let to = m * n + j;
                    if count == TILE && width == TILE {
                        tile(x, from, step, &mut group[to..], row);
                    } else {
                        for c in 0..width {
                            let x = &x[(from + c as isize * step) as usize..][..count];
                            let y = group[to + c..].iter_mut().step_by(row);
                            y.zip(x).for_each(|(y, x)| *y = *x);
                        }
                    }
                    j += width;
                }
                walk.step();
            }
            first += count;
            rest = tail;
        }
    });
}

/// One whole tile: `y[i·row + c] = x[from + i + c·step]`.
#[inline]
fn tile<T: Unit>(x: &[T], from: isize, step: isize, y: &mut [T], row: usize) {
    let mut t = [[T::default(); TILE]; TILE];
    for (c, t) in t.iter_mut().enumerate() {
        t.copy_from_slice(&x[(from + c as isize * step) as usize..][..TILE]);
    }
    for i in 0..TILE {
        let y = &mut y[i * row..][..TILE];
        for c in 0..TILE {
            y[c] = t[c][i];
        }
    }
}

/// A region of a dense `source` laid, with steps, into a dense `target`: along each axis, element
/// `from + i` of the source goes to `to + i·step` of the target, for `i` in `0..count`.
#[derive(Debug, Clone, Default)]
pub struct Placement {
    pub source: Extents,
    pub target: Extents,
    pub from: Extents,
    pub to: Extents,
    pub step: Strides,
    pub count: Extents,
}

impl Placement {
    /// The same placement in a tensor whose channels lie last.
    pub fn last(&self) -> Placement {
        let rank = self.target.len();
        let axes = || (0..rank).map(|i| axis_at(i, rank));
        let of = |e: &Extents| axes().map(|a| e[a]).collect();
        Placement {
            source: of(&self.source),
            target: of(&self.target),
            from: of(&self.from),
            to: of(&self.to),
            step: axes().map(|a| self.step[a]).collect(),
            count: of(&self.count),
        }
    }

    fn whole(&self, axis: usize) -> bool {
        let n = self.target[axis];
        self.source[axis] == n && self.count[axis] == n && self.step[axis] == 1
    }

    /// Writes all of `y`: the region from `x`, and `fill` elsewhere.
    pub fn place<T: Unit>(&self, x: &[T], fill: T, y: &mut [T]) {
        let rank = self.target.len();
        // Trailing axes that are copied whole move as one block.
        let axis = (0..rank).rev().find(|&a| !self.whole(a));
        let Some(axis) = axis else {
            read(x, 0, &[y.len()], &[1], y);
            return;
        };
        let block: usize = self.target[axis + 1..].iter().product();
        let row = self.target[axis] * block;
        let strides = dense(&self.source);
        let empty = self.count.contains(&0);
        rows(y, row, GRAIN, |first, piece| {
            for (r, y) in piece.chunks_exact_mut(row).enumerate() {
                let Some(base) = self.source_row(first + r, axis, &strides).filter(|_| !empty) else {
                    y.fill(fill);
                    continue;
                };
                let (n, from) = (self.count[axis], base + self.from[axis] * block);
                let (to, step) = (self.to[axis] as isize, self.step[axis]);
                if step == 1 {
                    let (start, end) = (to as usize * block, (to as usize + n) * block);
                    y[..start].fill(fill);
                    y[start..end].copy_from_slice(&x[from..from + n * block]);
                    y[end..].fill(fill);
                } else {
                    y.fill(fill);
                    for i in 0..n {
                        let at = (to + i as isize * step) as usize * block;
                        y[at..at + block].copy_from_slice(&x[from + i * block..][..block]);
                    }
                }
            }
        });
    }

    /// Where the source holds the target's row `row` (of the axes before `axis`), if it does.
    fn source_row(&self, mut row: usize, axis: usize, strides: &[isize]) -> Option<usize> {
        let mut offset = 0;
        for a in (0..axis).rev() {
            let at = (row % self.target[a]) as isize - self.to[a] as isize;
            row /= self.target[a];
            if at % self.step[a] != 0 {
                return None;
            }
            let i = at / self.step[a];
            if i < 0 || i >= self.count[a] as isize {
                return None;
            }
            offset += (self.from[a] + i as usize) * strides[a] as usize;
        }
        Some(offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn naive(x: &[u32], base: usize, dims: &[usize], strides: &[isize]) -> Vec<u32> {
        let n = dims.iter().product();
        let mut walk = Odometer::new(dims, strides, 0, base as isize);
        (0..n)
            .map(|_| {
                let v = x[walk.offset as usize];
                walk.step();
                v
            })
            .collect()
    }

    #[test]
    fn tiles_agree_with_single_elements() {
        let dims = [3usize, 21, 5, 37];
        let x: Vec<u32> = (0..dims.iter().product::<usize>() as u32).collect();
        let s = dense(&dims);
        for perm in [[0, 1, 3, 2], [3, 2, 1, 0], [0, 2, 3, 1], [1, 3, 0, 2], [3, 0, 1, 2], [2, 0, 3, 1]] {
            let d: Vec<usize> = perm.iter().map(|&p| dims[p]).collect();
            let st: Vec<isize> = perm.iter().map(|&p| s[p]).collect();
            let mut y = vec![0; x.len()];
            read(&x, 0, &d, &st, &mut y);
            assert_eq!(y, naive(&x, 0, &d, &st), "{perm:?}");
        }
        let x: Vec<u32> = (0..300 * 200).collect();
        let mut y = vec![0; x.len()];
        read(&x, 0, &[200, 300], &[1, 200], &mut y);
        assert_eq!(y, naive(&x, 0, &[200, 300], &[1, 200]));
    }

    #[test]
    fn negative_and_zero_strides() {
        let x: Vec<u32> = (0..12).collect();
        let mut y = vec![0; 8];
        read(&x, 11, &[2, 2, 2], &[-4, 0, -2], &mut y);
        assert_eq!(y, [11, 9, 11, 9, 7, 5, 7, 5]);
    }

    #[test]
    fn placement_with_steps_and_fill() {
        let p = Placement {
            source: Extents::from_slice(&[2, 3]),
            target: Extents::from_slice(&[3, 5]),
            from: Extents::from_slice(&[0, 1]),
            to: Extents::from_slice(&[2, 4]),
            step: Strides::from_slice(&[-2, -3]),
            count: Extents::from_slice(&[2, 2]),
        };
        let mut y = [1u8; 15];
        p.place(&[1, 2, 3, 4, 5, 6], 9, &mut y);
        assert_eq!(y, [9, 6, 9, 9, 5, 9, 9, 9, 9, 9, 9, 3, 9, 9, 2]);
    }
}
