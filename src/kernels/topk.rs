//! The largest or smallest elements along an axis.

use std::cmp::Ordering;

use rayon::prelude::*;

/// The geometry of a selection: X is (outer, n, inner), results are (outer, k, inner).
#[derive(Debug, Clone, Copy)]
pub struct TopK {
    pub n: usize,
    pub inner: usize,
    pub k: usize,
    pub largest: bool,
}

impl TopK {
    /// The `k` first elements of each row in order, and where they were; equal ones in the order of their positions, and
    /// NaN above every number. `room` holds as many numbers as X has elements.
    pub fn select<T: PartialOrd + Copy + Send + Sync>(
        &self,
        x: &[T],
        values: &mut [T],
        positions: &mut [i64],
        room: &mut [u32],
    ) {
        let (block, out) = (self.n * self.inner, self.k * self.inner);
        if block == 0 || out == 0 {
            return;
        }
        let parts = values.par_chunks_mut(out).zip(positions.par_chunks_mut(out));
        let parts = parts.zip(room.par_chunks_mut(block)).zip(x.par_chunks(block));
        parts.for_each(|(((values, positions), room), x)| {
            for i in 0..self.inner {
                self.row(x, i, values, positions, &mut room[..self.n]);
            }
        });
    }

    fn row<T: PartialOrd + Copy>(
        &self,
        x: &[T],
        i: usize,
        values: &mut [T],
        positions: &mut [i64],
        order: &mut [u32],
    ) {
        let at = |p: u32| x[p as usize * self.inner + i];
        let before = |p: &u32, q: &u32| {
            let (a, b) = if self.largest { (at(*q), at(*p)) } else { (at(*p), at(*q)) };
            let nan = |v: T| v.partial_cmp(&v).is_none();
            a.partial_cmp(&b).unwrap_or_else(|| nan(a).cmp(&nan(b))).then(p.cmp(q))
        };
        order.iter_mut().enumerate().for_each(|(p, o)| *o = p as u32);
        if self.k < self.n {
            order.select_nth_unstable_by(self.k, before);
        }
        let first = &mut order[..self.k];
        first.sort_unstable_by(|p, q| -> Ordering { before(p, q) });
        for (r, &p) in first.iter().enumerate() {
            values[r * self.inner + i] = at(p);
            positions[r * self.inner + i] = p as i64;
        }
    }
}
