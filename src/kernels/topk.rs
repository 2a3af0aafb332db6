//! The largest or smallest elements along an axis.

use crate::kernels::par;

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
    /// NaN above every number; what is wanted of both. `room` holds as many numbers as X has elements.
    pub fn select<T: PartialOrd + Copy + Send + Sync>(
        &self,
        x: &[T],
        values: Option<&mut [T]>,
        positions: Option<&mut [i64]>,
        room: &mut [u32],
    ) {
        let (block, out) = (self.n * self.inner, self.k * self.inner);
        if block == 0 || out == 0 {
            return;
        }
        par::chunks(room, block, |o, room| {
            for (i, order) in room.chunks_exact_mut(self.n).enumerate() {
                self.order(&x[o * block..][..block], i, order);
            }
        });
        // Where the element of a result was in X.
        let source = |at: usize| room[at / out * block + at % self.inner * self.n + at % out / self.inner];
        par::pieces(values.unwrap_or_default(), |start, values| {
            for (at, v) in (start..).zip(values) {
                *v = x[at / out * block + source(at) as usize * self.inner + at % self.inner];
            }
        });
        par::pieces(positions.unwrap_or_default(), |start, positions| {
            (start..).zip(positions).for_each(|(at, p)| *p = i64::from(source(at)));
        });
    }

    /// The positions of row `i`, of which the first `k` are in order.
    fn order<T: PartialOrd + Copy>(&self, x: &[T], i: usize, order: &mut [u32]) {
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
        order[..self.k].sort_unstable_by(before);
    }
}
