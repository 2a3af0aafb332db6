//! Sums over the columns of a matrix, in registers: a few vectors of columns go down several rows at a time.
#![allow(unsafe_code)]

use super::strips::{Strip, WIDTH};
use crate::kernels::elementwise::Clamp;
use crate::kernels::half::{Elements, Half};
use crate::kernels::simd::{Kernel, Simd, Vectors, load_up_to, store_up_to, widen_up_to};
use crate::tensor::Float;

/// Rows that one tile goes down. The next as many are fetched meanwhile, since a tile's short runs, a row apart, do
/// not look like a stream to the processor.
const ROWS: usize = 4;
/// Elements that are widened at a time, where they are of half precision.
pub(super) const NEAR: usize = ROWS * WIDTH;

/// What is summed: `dz` of an element, given its `x − at`.
///
/// # Safety
/// Where `holds(i + n)` and `j + n ≤ WIDTH`, `prepare` was told of the rows, and `WHOLE` only if `is_whole`, `of` touches
/// nothing but memory that is the term's own.
pub(super) unsafe trait Term<T: Float> {
    /// Are there so many elements?
    fn holds(&self, elements: usize) -> bool;

    /// Columns are those of this strip from now on.
    fn turn_to(&mut self, _: Strip) {}

    /// These rows are next.
    fn prepare(&mut self, _: Rows) {}

    /// Are all of its matrices whole?
    fn is_whole(&self) -> bool;

    /// Of element `i` in column `j`, the `k`th of those that were prepared, and the `n − 1` after it; `WHOLE`: as
    /// [`is_whole`](Self::is_whole) says.
    unsafe fn of<S: Simd<Elem = T>, const WHOLE: bool>(&mut self, at: [usize; 3], n: usize, x: S::V) -> S::V;

    /// Fetches what lies at element `i`, if there is such an element; `WHOLE`: as [`is_whole`](Self::is_whole) says.
    unsafe fn fetch<S: Simd<Elem = T>, const WHOLE: bool>(&self, i: usize);
}

/// `x − at` itself.
pub(super) struct Centred;

// SAFETY: touches nothing.
unsafe impl<T: Float> Term<T> for Centred {
    fn holds(&self, _: usize) -> bool {
        true
    }
    fn is_whole(&self) -> bool {
        true
    }
    #[inline(always)]
    unsafe fn of<S: Simd<Elem = T>, const WHOLE: bool>(&mut self, _: [usize; 3], _: usize, x: S::V) -> S::V {
        x
    }
    #[inline(always)]
    unsafe fn fetch<S: Simd<Elem = T>, const WHOLE: bool>(&self, _: usize) {}
}

/// The elements of a matrix like `x`.
pub(super) struct Given<'a, T> {
    pub dy: Elements<'a, T>,
    /// Room for [`NEAR`] elements of a `dy` of half precision, widened.
    pub near: &'a mut [T],
}

impl<'a, T: Float> Given<'a, T> {
    /// Of whole elements or of bfloat16, which take no room.
    pub fn near(dy: Elements<'a, T>) -> Self {
        assert!(dy.half() != Some(Half::F16), "room for float16");
        Given { dy, near: &mut [] }
    }
}

// SAFETY: reads elements that there are.
unsafe impl<T: Float> Term<T> for Given<'_, T> {
    fn holds(&self, elements: usize) -> bool {
        elements <= self.dy.len()
    }
    fn is_whole(&self) -> bool {
        self.dy.is_whole()
    }
    fn prepare(&mut self, rows: Rows) {
        rows.widen(self.dy, self.near);
    }
    #[inline(always)]
    unsafe fn of<S: Simd<Elem = T>, const WHOLE: bool>(
        &mut self,
        [i, _, k]: [usize; 3],
        n: usize,
        _: S::V,
    ) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { vector::<S, WHOLE>(self.dy, i, self.near.as_ptr(), k, n) }
    }
    #[inline(always)]
    unsafe fn fetch<S: Simd<Elem = T>, const WHOLE: bool>(&self, i: usize) {
        // SAFETY: fetching is allowed anywhere; the caller's promise about the form.
        unsafe { S::prefetch(address::<_, WHOLE>(self.dy, i)) }
    }
}

/// Those of `dy` where `(x − at)·factor + shift` of the column is inside the clamp, else 0.
pub(super) struct Passed<'a, T> {
    /// Whole, or of bfloat16.
    dy: Elements<'a, T>,
    /// Factor and shift of all columns, and those of the strip's.
    coefficients: [&'a [T]; 2],
    spread: [[T; WIDTH]; 2],
    clamp: Clamp<T>,
}

impl<'a, T: Float> Passed<'a, T> {
    pub fn new(dy: Elements<'a, T>, factor: &'a [T], shift: &'a [T], clamp: Clamp<T>) -> Self {
        assert!(dy.half() != Some(Half::F16), "gradients in float16");
        Passed { dy, coefficients: [factor, shift], spread: [[T::zero(); WIDTH]; 2], clamp }
    }
}

// SAFETY: reads elements and coefficients that there are.
unsafe impl<T: Float> Term<T> for Passed<'_, T> {
    fn holds(&self, elements: usize) -> bool {
        elements <= self.dy.len()
    }
    fn is_whole(&self) -> bool {
        self.dy.is_whole()
    }
    fn turn_to(&mut self, strip: Strip) {
        for (values, spread) in self.coefficients.iter().zip(&mut self.spread) {
            strip.spread(values, spread);
        }
    }
    #[inline(always)]
    unsafe fn of<S: Simd<Elem = T>, const WHOLE: bool>(
        &mut self,
        [i, j, _]: [usize; 3],
        n: usize,
        x: S::V,
    ) -> S::V {
        // SAFETY: the caller's promise.
        unsafe {
            let [factor, shift] = [self.spread[0].as_ptr().add(j), self.spread[1].as_ptr().add(j)];
            // Rounded twice, as the forward sweep rounds.
            let y = S::add(S::mul(x, load_up_to::<S>(factor, n)), load_up_to::<S>(shift, n));
            let dy = vector::<S, WHOLE>(self.dy, i, std::ptr::null(), 0, n);
            S::pass(y, S::splat(self.clamp.low), S::splat(self.clamp.high), dy)
        }
    }
    #[inline(always)]
    unsafe fn fetch<S: Simd<Elem = T>, const WHOLE: bool>(&self, i: usize) {
        // SAFETY: fetching is allowed anywhere; the caller's promise about the form.
        unsafe { S::prefetch(address::<_, WHOLE>(self.dy, i)) }
    }
}

/// Those of `dy` where `y` is inside the clamp, else 0; written to `dz`, which holds `dy` where that is `None`.
pub(super) struct Written<'a, T> {
    pub y: Elements<'a, T>,
    pub dy: Option<&'a [T]>,
    pub dz: &'a mut [T],
    pub clamp: Clamp<T>,
    /// Room for [`NEAR`] elements of a `y` of half precision, widened.
    pub near: &'a mut [T],
}

// SAFETY: reads and writes elements that there are.
unsafe impl<T: Float> Term<T> for Written<'_, T> {
    fn holds(&self, elements: usize) -> bool {
        elements <= self.y.len() && elements <= self.dz.len() && self.dy.is_none_or(|dy| elements <= dy.len())
    }
    fn is_whole(&self) -> bool {
        self.y.is_whole()
    }
    fn prepare(&mut self, rows: Rows) {
        rows.widen(self.y, self.near);
    }
    #[inline(always)]
    unsafe fn of<S: Simd<Elem = T>, const WHOLE: bool>(
        &mut self,
        [i, _, k]: [usize; 3],
        n: usize,
        _: S::V,
    ) -> S::V {
        // SAFETY: the caller's promise.
        unsafe {
            let dz = self.dz.as_mut_ptr();
            let dy = load_up_to::<S>(self.dy.map_or(dz.cast_const(), |dy| dy.as_ptr()).add(i), n);
            let y = vector::<S, WHOLE>(self.y, i, self.near.as_ptr(), k, n);
            let passed = S::pass(y, S::splat(self.clamp.low), S::splat(self.clamp.high), dy);
            store_up_to::<S>(dz.add(i), passed, n);
            passed
        }
    }
    #[inline(always)]
    unsafe fn fetch<S: Simd<Elem = T>, const WHOLE: bool>(&self, i: usize) {
        // SAFETY: fetching is allowed anywhere; the caller's promise about the form.
        unsafe {
            S::prefetch(address::<_, WHOLE>(self.y, i));
            S::prefetch(self.dz.as_ptr().wrapping_add(i));
            if let Some(dy) = self.dy {
                S::prefetch(dy.as_ptr().wrapping_add(i));
            }
        }
    }
}

/// Rows of `columns` elements, `step` apart from element `start` on.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub start: usize,
    pub rows: usize,
    pub columns: usize,
    pub step: usize,
}

impl Rows {
    /// Widens those that no register does, one after the other.
    fn widen<T: Float>(self, x: Elements<T>, near: &mut [T]) {
        if x.half() != Some(Half::F16) {
            return;
        }
        let near = &mut near[..self.rows * self.columns];
        if self.columns == self.step {
            return x.copy(self.start, near);
        }
        let rows = near.chunks_exact_mut(self.columns).enumerate();
        rows.for_each(|(i, near)| x.copy(self.start + i * self.step, near));
    }
}

/// `n` elements from the `i`th on, or, where rows were widened, from the `k`th of those.
///
/// # Safety
/// They must be there, `WHOLE` only if they are, and the processor have `S`'s instructions.
#[inline(always)]
unsafe fn vector<S: Simd, const WHOLE: bool>(
    x: Elements<S::Elem>,
    i: usize,
    near: *const S::Elem,
    k: usize,
    n: usize,
) -> S::V {
    // SAFETY: the caller's promise.
    unsafe {
        if WHOLE {
            return load_up_to::<S>(address::<_, true>(x, i), n);
        }
        match x {
            Elements::Whole(x) => load_up_to::<S>(x.as_ptr().add(i), n),
            Elements::Half(Half::Bf16, x) => widen_up_to::<S>(x.as_ptr().add(i), n),
            Elements::Half(Half::F16, _) => load_up_to::<S>(near.add(k), n),
        }
    }
}

/// Where an element, perhaps none of these, lies: without a question about their form where it is known.
///
/// # Safety
/// `WHOLE` only if they are.
#[inline(always)]
unsafe fn address<T, const WHOLE: bool>(x: Elements<T>, i: usize) -> *const T {
    match x {
        Elements::Whole(x) => x.as_ptr().wrapping_add(i),
        // SAFETY: the caller's promise.
        Elements::Half(..) if WHOLE => unsafe { std::hint::unreachable_unchecked() },
        Elements::Half(_, x) => x.as_ptr().wrapping_add(i).cast(),
    }
}

/// Sums of `columns` columns.
pub(super) struct Sums<T> {
    /// `Σ dz·(x − at)`
    pub products: [T; WIDTH],
    /// `Σ dz`
    pub plain: [T; WIDTH],
}

impl<T: Float> Sums<T> {
    pub fn zero() -> Self {
        Sums { products: [T::zero(); WIDTH], plain: [T::zero(); WIDTH] }
    }
}

/// Adds to sums over `rows` rows of `columns`, which lie `step` apart from element `start` on; to those of products
/// only with `PRODUCTS`: `x` may be empty without.
pub(super) struct Fold<'a, T, F, const PRODUCTS: bool> {
    pub start: usize,
    pub rows: usize,
    pub columns: usize,
    pub step: usize,
    pub x: Elements<'a, T>,
    /// `−at`
    pub less: &'a [T; WIDTH],
    pub term: &'a mut F,
    pub sums: &'a mut Sums<T>,
}

impl<T: Vectors, F: Term<T>, const PRODUCTS: bool> Fold<'_, T, F, PRODUCTS> {
    pub fn sum(self) {
        if self.rows == 0 || self.columns == 0 {
            return;
        }
        let end = self.start + (self.rows - 1) * self.step + self.columns;
        assert!(self.columns <= WIDTH && self.term.holds(end) && (!PRODUCTS || end <= self.x.len()));
        // SAFETY: all elements and columns that are touched exist.
        unsafe { T::dispatch(self) }
    }

    /// `V` vectors of columns from `j` on, each of `n` lanes, down some rows; `near`: those of `x` that were widened.
    #[inline(always)]
    unsafe fn tile<S: Simd<Elem = T>, const V: usize, const WHOLE: bool>(
        &mut self,
        rows: Rows,
        near: *const T,
        j: usize,
        n: usize,
    ) {
        // SAFETY: rows and columns are inside, as `sum` checked; `WHOLE` is what `run` asked.
        unsafe {
            let zero = S::splat(T::zero());
            let (mut products, mut plain, mut less) = ([zero; V], [zero; V], [zero; V]);
            if PRODUCTS {
                for (v, less) in less.iter_mut().enumerate() {
                    *less = load_up_to::<S>(self.less.as_ptr().add(j + v * S::LANES), n);
                }
            }
            for row in 0..rows.rows {
                for v in 0..V {
                    let j = j + v * S::LANES;
                    let i = rows.start + row * self.step + j;
                    let at = [i, j, row * rows.columns + j];
                    let ahead = i + ROWS * self.step;
                    // (Each line once.)
                    let fetches = S::begins_line(v * S::LANES);
                    if fetches {
                        self.term.fetch::<S, WHOLE>(ahead);
                    }
                    if PRODUCTS {
                        if fetches {
                            S::prefetch(address::<_, WHOLE>(self.x, ahead));
                        }
                        let x = S::add(vector::<S, WHOLE>(self.x, i, near, at[2], n), less[v]);
                        let dz = self.term.of::<S, WHOLE>(at, n, x);
                        products[v] = S::fma(dz, x, products[v]);
                        plain[v] = S::add(plain[v], dz);
                    } else {
                        plain[v] = S::add(plain[v], self.term.of::<S, WHOLE>(at, n, zero));
                    }
                }
            }
            // Sums of a tile are added to those before rather than begun with them, for accuracy.
            for v in 0..V {
                let j = j + v * S::LANES;
                let sums = self.sums.plain.as_mut_ptr().add(j);
                store_up_to::<S>(sums, S::add(load_up_to::<S>(sums, n), plain[v]), n);
                if PRODUCTS {
                    let sums = self.sums.products.as_mut_ptr().add(j);
                    store_up_to::<S>(sums, S::add(load_up_to::<S>(sums, n), products[v]), n);
                }
            }
        }
    }
}

impl<T: Vectors, F: Term<T>, const PRODUCTS: bool> Kernel<T> for Fold<'_, T, F, PRODUCTS> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(self) {
        // SAFETY: as `sum` checked. (Decided here: in the loop it takes as long as the sums.)
        unsafe {
            match self.term.is_whole() && (!PRODUCTS || self.x.is_whole()) {
                true => self.all::<S, true>(),
                false => self.all::<S, false>(),
            }
        }
    }
}

impl<T: Vectors, F: Term<T>, const PRODUCTS: bool> Fold<'_, T, F, PRODUCTS> {
    #[inline(always)]
    unsafe fn all<S: Simd<Elem = T>, const WHOLE: bool>(mut self) {
        let (whole, part) = (self.columns / S::LANES, self.columns % S::LANES);
        let mut room;
        let near: &mut [T] = match PRODUCTS && self.x.half() == Some(Half::F16) {
            true => {
                room = [T::zero(); NEAR];
                &mut room
            }
            false => &mut [],
        };
        for first in (0..self.rows).step_by(ROWS) {
            let rows = Rows {
                start: self.start + first * self.step,
                rows: ROWS.min(self.rows - first),
                columns: self.columns,
                step: self.step,
            };
            self.term.prepare(rows);
            if PRODUCTS {
                rows.widen(self.x, near);
            }
            let (near, mut v) = (near.as_ptr(), 0);
            // SAFETY: the vectors are within the columns, the last one cut to what is left of them.
            unsafe {
                while v + 4 <= whole {
                    self.tile::<S, 4, WHOLE>(rows, near, v * S::LANES, S::LANES);
                    v += 4;
                }
                // Together, since a sum waits for its last addition.
                match whole - v {
                    3 => self.tile::<S, 3, WHOLE>(rows, near, v * S::LANES, S::LANES),
                    2 => self.tile::<S, 2, WHOLE>(rows, near, v * S::LANES, S::LANES),
                    1 => self.tile::<S, 1, WHOLE>(rows, near, v * S::LANES, S::LANES),
                    _ => {}
                }
                if part > 0 {
                    self.tile::<S, 1, WHOLE>(rows, near, whole * S::LANES, part);
                }
            }
        }
    }
}
