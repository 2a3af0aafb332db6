//! Reductions over any set of axes. Axes are merged into alternating kept and reduced ones; whichever is
//! innermost is the vectorised loop. Each result is computed by one thread in an order that depends on the
//! shape alone; sums of `f32` end in `f64`.

use smallvec::SmallVec;

use crate::kernels::math::Math;
use crate::kernels::par;

type Axes = SmallVec<[(usize, usize); 4]>;

/// Which elements make up each result.
#[derive(Debug, Clone)]
pub struct Plan {
    /// (size, stride) of kept and reduced axes but for the innermost, outermost first.
    kept: Axes,
    reduced: Axes,
    /// The innermost axis: contiguous elements.
    inner: usize,
    inner_reduced: bool,
}

impl Plan {
    /// `reduced(axis)` says which axes of `dims` are reduced.
    pub fn new(dims: &[usize], reduced: impl Fn(usize) -> bool) -> Self {
        let mut merged: SmallVec<[(usize, bool); 6]> = SmallVec::new();
        for (d, &n) in dims.iter().enumerate().filter(|(_, n)| **n != 1) {
            match merged.last_mut() {
                Some((size, r)) if *r == reduced(d) => *size *= n,
                _ => merged.push((n, reduced(d))),
            }
        }
        let (inner, inner_reduced) = merged.pop().unwrap_or((1, false));
        let mut plan = Plan { kept: Axes::new(), reduced: Axes::new(), inner, inner_reduced };
        let mut stride = inner;
        for &(n, r) in merged.iter().rev() {
            if r {
                plan.reduced.push((n, stride))
            } else {
                plan.kept.push((n, stride))
            }
            stride *= n;
        }
        plan.kept.reverse();
        plan.reduced.reverse();
        plan
    }

    /// How many elements make up one result.
    pub fn count(&self) -> usize {
        let outer: usize = self.reduced.iter().map(|a| a.0).product();
        outer * if self.inner_reduced { self.inner } else { 1 }
    }

    /// Where the elements of result `o` begin: `o` counts kept axes but for the innermost.
    #[inline(always)]
    fn base(&self, o: usize) -> usize {
        offset(&self.kept, o)
    }

    /// Offsets of the reduced positions, the innermost axis left out.
    #[inline(always)]
    fn offsets(&self) -> impl Iterator<Item = usize> + Clone + '_ {
        let n = self.reduced.iter().map(|a| a.0).product();
        (0..n).map(|i| offset(&self.reduced, i))
    }
}

#[inline(always)]
fn offset(axes: &[(usize, usize)], mut i: usize) -> usize {
    if let [(_, stride)] = axes {
        return i * stride;
    }
    let mut at = 0;
    for &(n, stride) in axes.iter().rev() {
        at += i % n * stride;
        i /= n;
    }
    at
}

/// How elements become one result.
pub trait Reducer<T>: Sync {
    /// From contiguous runs of elements.
    fn one<'a>(&self, runs: impl Iterator<Item = &'a [T]> + Clone) -> T
    where
        T: 'a;

    /// Results side by side, at most [`TILE`]: each row holds one element of every result.
    fn tile<'a>(&self, rows: impl Iterator<Item = &'a [T]> + Clone, y: &mut [T])
    where
        T: 'a;
}

/// Results computed side by side where the innermost axis is kept.
pub const TILE: usize = 128;
/// Tasks that are enough: what fewer results side by side are made from lies in shorter runs, which are read more slowly.
const TASKS: usize = 16;

/// Reduces `x` to `y` (kept axes in order).
pub fn reduce<T: Math>(y: &mut [T], x: &[T], plan: &Plan, r: &impl Reducer<T>) {
    let grain = (par::GRAIN / plan.count().max(1)).max(1);
    if plan.inner_reduced {
        let n = plan.inner;
        par::rows(y, 1, grain, |first, y| {
            T::wide(
                #[inline(always)]
                || {
                    for (i, y) in y.iter_mut().enumerate() {
                        let base = plan.base(first + i);
                        *y = r.one(plan.offsets().map(|o| &x[base + o..base + o + n]));
                    }
                },
            )
        });
    } else {
        // Whole tiles, about equally wide, where there are enough results.
        let even = plan.inner.div_ceil(plan.inner.div_ceil(TILE).max(1)).max(1);
        let share = grain.max(y.len() / TASKS);
        let (tile, grain) = match share >= even {
            true => (even, share.next_multiple_of(even)),
            false => (TILE, share.next_multiple_of(16)),
        };
        par::rows(y, 1, grain, |first, y| {
            T::wide(
                #[inline(always)]
                || {
                    let mut at = 0;
                    while at < y.len() {
                        let (o, k) = ((first + at) / plan.inner, (first + at) % plan.inner);
                        let n = (tile - k % tile).min(plan.inner - k).min(y.len() - at);
                        let base = plan.base(o) + k;
                        r.tile(plan.offsets().map(|o| &x[base + o..base + o + n]), &mut y[at..at + n]);
                        at += n;
                    }
                },
            )
        });
    }
}

/// `finish(Σ f(x))`
pub struct SumOf<F, G> {
    pub f: F,
    pub finish: G,
}

/// Σ f(x) of a run, in f64 lanes.
#[inline(always)]
fn sum<T: Math>(run: &[T], f: impl Fn(T) -> T) -> f64 {
    const LANES: usize = 16;
    let mut lanes = [0.0; LANES];
    let mut chunks = run.chunks_exact(LANES);
    for c in &mut chunks {
        for (l, x) in lanes.iter_mut().zip(c) {
            *l += f(*x).to64();
        }
    }
    for (l, x) in lanes.iter_mut().zip(chunks.remainder()) {
        *l += f(*x).to64();
    }
    let mut n = LANES;
    while n > 1 {
        n /= 2;
        for i in 0..n {
            lanes[i] += lanes[i + n];
        }
    }
    lanes[0]
}

/// Σ f(x) of several runs. (By `map` and `sum`, a function would be made that is compiled for the baseline.)
#[inline(always)]
fn all<'a, T: Math>(runs: impl Iterator<Item = &'a [T]>, f: impl Fn(T) -> T) -> f64 {
    let mut total = 0.0;
    for run in runs {
        total += sum(run, &f);
    }
    total
}

impl<T: Math, F: Fn(T) -> T + Sync, G: Fn(f64) -> f64 + Sync> Reducer<T> for SumOf<F, G> {
    #[inline(always)]
    fn one<'a>(&self, runs: impl Iterator<Item = &'a [T]> + Clone) -> T {
        T::of((self.finish)(all(runs, &self.f)))
    }

    #[inline(always)]
    fn tile<'a>(&self, rows: impl Iterator<Item = &'a [T]> + Clone, y: &mut [T]) {
        let mut acc = [0.0f64; TILE];
        for row in rows {
            for (a, x) in acc.iter_mut().zip(row) {
                *a += (self.f)(*x).to64();
            }
        }
        for (y, a) in y.iter_mut().zip(acc) {
            *y = T::of((self.finish)(a));
        }
    }
}

/// A fold of `T` by an associative, commutative function (maximum, minimum, product).
pub struct Fold<F> {
    pub f: F,
    pub start: f64,
}

impl<T: Math, F: Fn(T, T) -> T + Sync> Reducer<T> for Fold<F> {
    #[inline(always)]
    fn one<'a>(&self, runs: impl Iterator<Item = &'a [T]> + Clone) -> T {
        const LANES: usize = 16;
        let mut lanes = [T::of(self.start); LANES];
        for run in runs {
            let mut chunks = run.chunks_exact(LANES);
            for c in &mut chunks {
                for (l, x) in lanes.iter_mut().zip(c) {
                    *l = (self.f)(*l, *x);
                }
            }
            for (l, x) in lanes.iter_mut().zip(chunks.remainder()) {
                *l = (self.f)(*l, *x);
            }
        }
        lanes.iter().fold(T::of(self.start), |a, b| (self.f)(a, *b))
    }

    #[inline(always)]
    fn tile<'a>(&self, rows: impl Iterator<Item = &'a [T]> + Clone, y: &mut [T]) {
        y.fill(T::of(self.start));
        for row in rows {
            for (y, x) in y.iter_mut().zip(row) {
                *y = (self.f)(*y, *x);
            }
        }
    }
}

/// The larger; NaN if either is.
#[inline(always)]
pub fn larger<T: Math>(a: T, b: T) -> T {
    if a > b || a.is_nan() { a } else { b }
}

/// The smaller; NaN if either is.
#[inline(always)]
pub fn smaller<T: Math>(a: T, b: T) -> T {
    if a < b || a.is_nan() { a } else { b }
}

/// `ln Σ eˣ`, about the largest element.
pub struct LogSumExp;

/// What exponents are taken from: the maximum unless it is infinite.
#[inline(always)]
fn shift<T: Math>(m: T) -> T {
    if m.is_finite() { m } else { T::zero() }
}

impl<T: Math> Reducer<T> for LogSumExp {
    #[inline(always)]
    fn one<'a>(&self, runs: impl Iterator<Item = &'a [T]> + Clone) -> T {
        let max = Fold { f: larger::<T>, start: f64::NEG_INFINITY };
        let m = shift(max.one(runs.clone()));
        let s = all(
            runs,
            #[inline(always)]
            |x| (x - m).m_exp(),
        );
        m + T::of(s.m_ln())
    }

    #[inline(always)]
    fn tile<'a>(&self, rows: impl Iterator<Item = &'a [T]> + Clone, y: &mut [T]) {
        let max = Fold { f: larger::<T>, start: f64::NEG_INFINITY };
        max.tile(rows.clone(), y);
        for y in y.iter_mut() {
            *y = shift(*y);
        }
        let mut acc = [0.0f64; TILE];
        for row in rows {
            for ((a, x), m) in acc.iter_mut().zip(row).zip(&*y) {
                *a += (*x - *m).m_exp().to64();
            }
        }
        for (y, a) in y.iter_mut().zip(acc) {
            *y += T::of(a.m_ln());
        }
    }
}

/// Calls `f(element)` for every element of one result: for types and reductions that are not hot.
pub fn of(plan: &Plan, result: usize, mut f: impl FnMut(usize)) {
    let (run, columns) = if plan.inner_reduced { (plan.inner, 1) } else { (1, plan.inner.max(1)) };
    let base = plan.base(result / columns) + result % columns;
    for at in plan.offsets() {
        for e in 0..run {
            f(base + at + e);
        }
    }
}
