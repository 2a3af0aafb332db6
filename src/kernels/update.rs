//! Sweeps over a parameter, its gradient and its optimizer state.

mod map;

use std::ops::Range;

use crate::kernels::half::Half;
use crate::kernels::isa::vectorize;
use crate::kernels::par::{GRAIN, reduce};
use crate::tensor::Float;

pub use map::{BLOCK, Map, packed};

/// Elements that are updated together: few, so that they fit into registers, and what is read next from each tensor is on its
/// way already.
const RUN: usize = 64;

/// A parameter, or a tensor of optimizer state, as it is stored.
pub enum Cells<'a, T> {
    Wide(&'a mut [T]),
    /// In half precision, rounded at random by numbers that follow from the seed.
    Half(Half, &'a mut [u16], u64),
    /// In blocks of eight-bit codes.
    Codes(&'static Map, &'a mut [u8]),
}

impl<'a, T: Float> From<&'a mut [T]> for Cells<'a, T> {
    fn from(all: &'a mut [T]) -> Self {
        Cells::Wide(all)
    }
}

impl<'a, T: Float> Cells<'a, T> {
    /// The first `at` elements, whole blocks, and the rest.
    fn split_at(self, at: usize) -> (Self, Self) {
        match self {
            Cells::Wide(all) => {
                let (a, b) = all.split_at_mut(at);
                (Cells::Wide(a), Cells::Wide(b))
            }
            Cells::Half(half, all, seed) => {
                let (a, b) = all.split_at_mut(at);
                (Cells::Half(half, a, seed), Cells::Half(half, b, seed))
            }
            Cells::Codes(map, all) => {
                let (a, b) = all.split_at_mut(map::offset(at));
                (Cells::Codes(map, a), Cells::Codes(map, b))
            }
        }
    }

    fn is_wide(&self) -> bool {
        matches!(self, Cells::Wide(_))
    }

    /// The elements, if they lie as they are.
    fn wide(self) -> &'a mut [T] {
        match self {
            Cells::Wide(all) => all,
            _ => unreachable!("elements of another type"),
        }
    }
}

/// The gradient of a parameter.
#[derive(Clone, Copy)]
pub enum Gradient<'a, T> {
    Whole(&'a [T]),
    /// Of some rows of `len` elements: `sums[at[row]]`, and zero where that is negative.
    Rows {
        sums: &'a [T],
        at: &'a [i32],
        len: usize,
    },
}

impl<T: Float> Gradient<'_, T> {
    fn len(&self) -> usize {
        match self {
            Gradient::Whole(all) => all.len(),
            Gradient::Rows { at, len, .. } => at.len() * len,
        }
    }

    /// Elements from `start` on, into zeros.
    #[inline(always)]
    fn load(&self, start: usize, out: &mut [T]) {
        match self {
            Gradient::Whole(all) => out.copy_from_slice(&all[start..][..out.len()]),
            Gradient::Rows { sums, at, len } => {
                let (mut row, mut from, mut done) = (start / len, start % len, 0);
                while done < out.len() {
                    let n = (len - from).min(out.len() - done);
                    if let Ok(k) = usize::try_from(at[row]) {
                        out[done..done + n].copy_from_slice(&sums[k * len + from..][..n]);
                    }
                    (row, from, done) = (row + 1, 0, done + n);
                }
            }
        }
    }
}

/// What [`sweep`] reads and writes.
trait Access<T> {
    /// Elements from `start` on, at most `RUN`.
    fn load<const RUN: usize>(&self, start: usize, out: &mut [T]);

    /// Puts elements from `start` on, the first of which is number `nth` of the whole tensor.
    fn store<const RUN: usize>(&mut self, start: usize, nth: usize, x: &[T]);
}

impl<T: Float> Access<T> for &mut [T] {
    #[inline(always)]
    fn load<const RUN: usize>(&self, start: usize, out: &mut [T]) {
        out.copy_from_slice(&self[start..][..out.len()]);
    }

    #[inline(always)]
    fn store<const RUN: usize>(&mut self, start: usize, _: usize, x: &[T]) {
        self[start..][..x.len()].copy_from_slice(x);
    }
}

impl<T: Float> Access<T> for Cells<'_, T> {
    #[inline(always)]
    fn load<const RUN: usize>(&self, start: usize, out: &mut [T]) {
        let n = out.len();
        if let Cells::Wide(all) = self {
            return out.copy_from_slice(&all[start..start + n]);
        }
        let mut wide = [0.0f32; RUN];
        match self {
            Cells::Wide(_) => {}
            Cells::Half(half, all, _) => half.widen(&all[start..start + n], &mut wide[..n]),
            Cells::Codes(map, all) => map.decode(&all[map::offset(start)..][..packed(n)], &mut wide[..n]),
        }
        out.iter_mut().zip(&wide).for_each(|(o, w)| *o = T::of(f64::from(*w)));
    }

    #[inline(always)]
    fn store<const RUN: usize>(&mut self, start: usize, nth: usize, x: &[T]) {
        let n = x.len();
        if let Cells::Wide(all) = self {
            return all[start..start + n].copy_from_slice(x);
        }
        let mut wide = [0.0f32; RUN];
        wide.iter_mut().zip(x).for_each(|(w, x)| *w = x.to64() as f32);
        match self {
            Cells::Wide(_) => {}
            Cells::Half(half, all, seed) => {
                half.round_at_random(&wide[..n], &mut all[start..start + n], *seed, nth);
            }
            Cells::Codes(map, all) => map.encode(&wide[..n], &mut all[map::offset(start)..][..packed(n)]),
        }
    }
}

/// `(param, states) = f(param, states, grad)`, element by element, in fixed pieces. Where gradients and states are all
/// zero, as in the rows of an embedding that were never used, nothing is written if `f` would not change it.
pub fn sweep<'a, T: Float, const N: usize>(
    param: impl Into<Cells<'a, T>>,
    states: [Cells<'a, T>; N],
    grad: Gradient<T>,
    f: &(impl Fn(T, [T; N], T) -> (T, [T; N]) + Sync),
) {
    let zeros = [T::zero(); N];
    let rests = f(T::one(), zeros, T::zero()) == (T::one(), zeros);
    part(param.into(), states, grad, 0..grad.len(), rests, f);
}

/// A part of [`sweep`], elements `at` of the tensor; `rests`: does `f` leave a parameter as it is where the
/// gradient and the states are zero?
fn part<T: Float, const N: usize>(
    param: Cells<T>,
    states: [Cells<T>; N],
    grad: Gradient<T>,
    at: Range<usize>,
    rests: bool,
    f: &(impl Fn(T, [T; N], T) -> (T, [T; N]) + Sync),
) {
    let len = at.len();
    if len <= GRAIN {
        let wide = [&param].into_iter().chain(&states).all(Cells::is_wide);
        return match wide {
            true => in_runs::<T, _, N, RUN>(param.wide(), states.map(Cells::wide), grad, at, rests, f),
            false => in_runs::<T, _, N, BLOCK>(param, states, grad, at, rests, f),
        };
    }
    let mid = (len / 2).next_multiple_of(GRAIN);
    let (param, param_right) = param.split_at(mid);
    let middle = at.start + mid;
    let mut right: [Cells<T>; N] = std::array::from_fn(|_| Cells::Wide(&mut [][..]));
    let mut k = 0;
    let left = states.map(|s| {
        let (a, b) = s.split_at(mid);
        right[k] = b;
        k += 1;
        a
    });
    rayon::join(
        || part(param, left, grad, at.start..middle, rests, f),
        || part(param_right, right, grad, middle..at.end, rests, f),
    );
}

/// The same, `RUN` elements at a time.
fn in_runs<T: Float, A: Access<T>, const N: usize, const RUN: usize>(
    mut param: A,
    mut states: [A; N],
    grad: Gradient<T>,
    at: Range<usize>,
    rests: bool,
    f: &impl Fn(T, [T; N], T) -> (T, [T; N]),
) {
    let (nth, len) = (at.start, at.len());
    let whole = len / RUN * RUN;
    vectorize(
        #[inline(always)]
        || {
            for start in (0..whole).step_by(RUN) {
                run::<T, A, N, RUN>(&mut param, &mut states, &grad, (start, RUN), nth, rests, f);
            }
            // (By itself, so that the runs before are copied without a call.)
            if whole < len {
                run::<T, A, N, RUN>(&mut param, &mut states, &grad, (whole, len - whole), nth, rests, f);
            }
        },
    );
}

#[inline(always)]
fn run<T: Float, A: Access<T>, const N: usize, const RUN: usize>(
    param: &mut A,
    states: &mut [A; N],
    grad: &Gradient<T>,
    (start, n): (usize, usize),
    nth: usize,
    rests: bool,
    f: &impl Fn(T, [T; N], T) -> (T, [T; N]),
) {
    let [mut p, mut g] = [[T::zero(); RUN]; 2];
    let mut s = [[T::zero(); RUN]; N];
    grad.load(nth + start, &mut g[..n]);
    let mut zero = rests && is_zero(&g[..n]);
    for (s, state) in s.iter_mut().zip(&*states) {
        state.load::<RUN>(start, &mut s[..n]);
        zero = zero && is_zero(&s[..n]);
    }
    if zero {
        return;
    }
    param.load::<RUN>(start, &mut p[..n]);
    let (p, s) = advance(&p, &s, &g, f);
    param.store::<RUN>(start, nth + start, &p[..n]);
    for (s, state) in s.iter().zip(states) {
        state.store::<RUN>(start, nth + start, &s[..n]);
    }
}

/// `f(p, s, g)` of each element, from buffers of one fixed length into others, which cannot overlap: only so is the loop
/// vectorised, whatever the compiler knows of where they come from.
#[inline(always)]
fn advance<T: Float, const N: usize, const RUN: usize>(
    p: &[T; RUN],
    s: &[[T; RUN]; N],
    g: &[T; RUN],
    f: &impl Fn(T, [T; N], T) -> (T, [T; N]),
) -> ([T; RUN], [[T; RUN]; N]) {
    let (mut param, mut states) = ([T::zero(); RUN], [[T::zero(); RUN]; N]);
    for i in 0..RUN {
        let mut state = [T::zero(); N];
        for k in 0..N {
            state[k] = s[k][i];
        }
        (param[i], state) = f(p[i], state, g[i]);
        for k in 0..N {
            states[k][i] = state[k];
        }
    }
    (param, states)
}

#[inline(always)]
fn is_zero<T: Float>(x: &[T]) -> bool {
    // Without a way out early: so it is a few instructions.
    let mut zero = true;
    for x in x {
        zero &= *x == T::zero();
    }
    zero
}

/// `Σ x²`.
pub fn sum_squares<T: Float>(x: &[T]) -> f64 {
    reduce(0..x.len(), GRAIN, &|r| squares(&x[r]), &|a, b| a + b)
}

fn squares<T: Float>(x: &[T]) -> f64 {
    vectorize(
        #[inline(always)]
        || {
            let mut acc = [0.0f64; 32];
            let (head, tail) = x.as_chunks::<32>();
            for chunk in head {
                for (a, x) in acc.iter_mut().zip(chunk) {
                    *a += x.to64() * x.to64();
                }
            }
            for (a, x) in acc.iter_mut().zip(tail) {
                *a += x.to64() * x.to64();
            }
            acc.iter().sum()
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Momentum with weight decay, over runs that rest and runs that do not.
    #[test]
    fn only_what_changes_is_written() {
        let n = 3 * GRAIN + 100;
        for decay in [0.0f32, 0.1] {
            let f = |p: f32, [v]: [f32; 1], g: f32| {
                let v = 0.9 * v + g;
                (p - 0.1 * (v + decay * p), [v])
            };
            let mut param: Vec<f32> = (0..n).map(|i| i as f32 - 100.0).collect();
            let sparse = |i: usize, at: usize| if i / 300 % 3 == at { 0.5 } else { 0.0 };
            let mut velocity: Vec<f32> = (0..n).map(|i| sparse(i, 0)).collect();
            let grad: Vec<f32> = (0..n).map(|i| sparse(i, 1)).collect();
            let expected: Vec<_> = (0..n).map(|i| f(param[i], [velocity[i]], grad[i])).collect();
            sweep(&mut param[..], [Cells::Wide(&mut velocity)], Gradient::Whole(&grad), &f);
            for (i, (p, [v])) in expected.into_iter().enumerate() {
                assert_eq!((param[i], velocity[i]), (p, v), "element {i}");
            }
        }
    }
}
