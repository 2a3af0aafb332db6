//! Register tiles: the inner loops of every matrix product and dense convolution.
//!
//! A tile of up to `S::ROWS` rows by a few vectors is accumulated in registers over the whole summed dimension:
//! each step loads the vectors of B and multiplies them by one broadcast element of A a row.
//!
//! Loops here and in the kernels around are written with indices and without closures: what an iterator hides in a
//! function of its own would be compiled without the instruction set.
#![allow(unsafe_code, clippy::needless_range_loop)]

use crate::kernels::ahead::Steps;
use crate::kernels::simd::{Kernel, Simd, Vectors};

/// Steps of a round of the loops where B's rows are a known distance apart. A processor that two threads share can begin so
/// few instructions for each that the loop's own cost a tenth of the time; more steps take longer to decode.
pub const ROUND: usize = 4;

/// A tile's accumulators.
pub type Acc<S, const M: usize, const N: usize> = [[<S as Simd>::V; N]; M];

/// What tiles multiply: elements of the vectors' own type, or pairs of bfloat16 ([`pairs`](crate::kernels::pairs)).
///
/// # Safety
/// As of [`Simd`].
#[allow(clippy::missing_safety_doc)] // The trait's own section holds for every method.
pub unsafe trait Terms: Copy + Send + Sync + 'static {
    /// The vectors in which sums are added up.
    type S: Simd;
    /// Of A and B.
    type Term: Copy;
    /// As many terms as a vector has lanes.
    type Row: Copy;
    /// See [`Simd::ROWS`].
    const ROWS: &'static [usize];

    unsafe fn row(p: *const Self::Term) -> Self::Row;
    /// The first `n` terms, zeros after them.
    unsafe fn row_part(p: *const Self::Term, n: usize) -> Self::Row;
    /// One term in all lanes; a pair may lie at any address.
    unsafe fn broadcast(p: *const Self::Term) -> Self::Row;
    /// `x·row + sum`
    unsafe fn multiply(x: Self::Row, row: Self::Row, sum: <Self::S as Simd>::V) -> <Self::S as Simd>::V;

    /// Writes a vector in bfloat16; numbers below the least normal one may become zeros.
    #[inline(always)]
    unsafe fn put_rounded(p: *mut u16, v: <Self::S as Simd>::V) {
        // SAFETY: the caller's promise.
        unsafe { Self::S::round(p, v) }
    }

    /// Writes a vector as terms of neighbours.
    unsafe fn put_beside(v: <Self::S as Simd>::V, to: *mut Self::Term);
    /// Writes a vector as the elements number `nth` of `LANES` terms, whose first ones are to be written first: they have zeros
    /// for those that follow.
    unsafe fn put_across(nth: usize, v: <Self::S as Simd>::V, to: *mut Self::Term);

    /// The same of both vectors of pairs at once.
    #[inline(always)]
    unsafe fn put_both([first, second]: [<Self::S as Simd>::V; 2], to: *mut Self::Term) {
        // SAFETY: the caller's promise.
        unsafe {
            Self::put_across(0, first, to);
            Self::put_across(1, second, to);
        }
    }
}

/// Loops over terms of type `E`, whose sums are vectors of `T`. Write `run` as `#[inline(always)]`.
pub trait TermKernel<E, T> {
    /// # Safety
    /// The processor must have `D`'s instructions, and the kernel's own promises must hold.
    unsafe fn run<D: Terms<Term = E, S: Simd<Elem = T>>>(self);
}

/// Types of terms whose sums are of type `T`: `T` itself, or pairs.
pub trait Form<T>: Copy + Send + Sync {
    /// Elements of a term: consecutive ones of a sum.
    const EACH: usize;

    /// Room for as many terms as there are elements, at least.
    fn room(scratch: &mut [T]) -> &mut [Self];

    /// # Safety
    /// The kernel's own promises.
    unsafe fn dispatch_terms<K: TermKernel<Self, T>>(kernel: K);
}

impl<T: Vectors> Form<T> for T {
    const EACH: usize = 1;

    fn room(scratch: &mut [T]) -> &mut [T] {
        scratch
    }

    unsafe fn dispatch_terms<K: TermKernel<T, T>>(kernel: K) {
        // SAFETY: the caller's promise.
        unsafe { T::dispatch(OfElements(kernel)) }
    }
}

struct OfElements<K>(K);

impl<T: Vectors, K: TermKernel<T, T>> Kernel<T> for OfElements<K> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(self) {
        // SAFETY: the caller's promise.
        unsafe { self.0.run::<S>() }
    }
}

// SAFETY: as of the vectors.
unsafe impl<V: Simd> Terms for V {
    type S = V;
    type Term = V::Elem;
    type Row = V::V;
    const ROWS: &'static [usize] = <V as Simd>::ROWS;

    #[inline(always)]
    unsafe fn row(p: *const V::Elem) -> V::V {
        // SAFETY: the caller's promise, here and below.
        unsafe { V::load(p) }
    }

    #[inline(always)]
    unsafe fn row_part(p: *const V::Elem, n: usize) -> V::V {
        unsafe { V::load_part(p, n) }
    }

    #[inline(always)]
    unsafe fn broadcast(p: *const V::Elem) -> V::V {
        unsafe { V::splat(*p) }
    }

    #[inline(always)]
    unsafe fn multiply(x: V::V, row: V::V, sum: V::V) -> V::V {
        unsafe { V::fma(x, row, sum) }
    }

    #[inline(always)]
    unsafe fn put_beside(v: V::V, to: *mut V::Elem) {
        unsafe { V::store(to, v) }
    }

    #[inline(always)]
    unsafe fn put_across(_: usize, v: V::V, to: *mut V::Elem) {
        unsafe { V::store(to, v) }
    }
}

/// `Σ` over the runs `(offset, steps)` of A's terms `a[i][offset..offset + steps]` times `N` vectors of B, which
/// advances by `b_step` terms.
///
/// # Safety
/// `a[i]` must be valid at the runs' terms, `b` for `N` vectors at each step, and `D`'s instructions be there.
#[inline(always)]
pub unsafe fn along_rows<D: Terms, const M: usize, const N: usize>(
    runs: &[(isize, usize)],
    a: [*const D::Term; M],
    mut b: *const D::Term,
    b_step: usize,
) -> Acc<D::S, M, N> {
    // SAFETY: the caller's promise.
    unsafe {
        let mut acc = [[D::S::splat(num_traits::zero()); N]; M];
        for &(offset, steps) in runs {
            let (mut o, end) = (offset, offset + steps as isize);
            while o + ROUND as isize <= end {
                for u in 0..ROUND {
                    step_along::<D, M, N>(&mut acc, &a, o + u as isize, b.add(u * b_step));
                }
                b = b.wrapping_add(ROUND * b_step);
                o += ROUND as isize;
            }
            while o < end {
                step_along::<D, M, N>(&mut acc, &a, o, b);
                b = b.wrapping_add(b_step);
                o += 1;
            }
        }
        acc
    }
}

/// # Safety
/// As of [`along_rows`], of one step.
#[inline(always)]
unsafe fn step_along<D: Terms, const M: usize, const N: usize>(
    acc: &mut Acc<D::S, M, N>,
    a: &[*const D::Term; M],
    o: isize,
    b: *const D::Term,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut row = [D::row(b); N];
        for j in 1..N {
            row[j] = D::row(b.add(j * D::S::LANES));
        }
        for i in 0..M {
            let x = D::broadcast(a[i].offset(o));
            for j in 0..N {
                acc[i][j] = D::multiply(x, row[j], acc[i][j]);
            }
        }
    }
}

/// Neighbouring positions that a sum of [`slide`] is over.
pub const WINDOW: usize = 3;

/// As [`along_rows`] with one vector of B, where row `i` of A begins `i·step` terms after the first and each run is of `WINDOW·step`
/// terms: those of as many neighbours, which most rows share. Each is loaded once for all of them.
///
/// # Safety
/// As of [`along_rows`].
#[inline(always)]
pub unsafe fn slide<D: Terms, const M: usize>(
    runs: &[(isize, usize)],
    a: *const D::Term,
    step: usize,
    mut b: *const D::Term,
) -> [<D::S as Simd>::V; M] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut acc = [D::S::splat(num_traits::zero()); M];
        for &(offset, _) in runs {
            let a = a.offset(offset);
            for c in 0..step {
                let mut row = [D::row(b.add(c * D::S::LANES)); WINDOW];
                for w in 1..WINDOW {
                    row[w] = D::row(b.add((w * step + c) * D::S::LANES));
                }
                for j in 0..M + WINDOW - 1 {
                    let x = D::broadcast(a.add(j * step + c));
                    for w in 0..WINDOW {
                        if j >= w && j - w < M {
                            acc[j - w] = D::multiply(x, row[w], acc[j - w]);
                        }
                    }
                }
            }
            b = b.add(WINDOW * step * D::S::LANES);
        }
        acc
    }
}

/// Some register tiles of C below each other: `M` rows each, evenly spaced in A and in C, by `N` vectors of a packed panel of
/// two. With `add` they are added to what C holds.
///
/// # Safety
/// `a` must be readable for the runs' terms at each row, `b` for two vectors at each step, `c` writable for `N`
/// vectors at each row, and `D`'s instructions be there.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub unsafe fn multiply<D: Terms, const M: usize, const N: usize>(
    tiles: usize,
    runs: &[(isize, usize)],
    mut a: *const D::Term,
    a_row: usize,
    b: *const D::Term,
    mut c: *mut <D::S as Simd>::Elem,
    c_row: usize,
    add: bool,
) {
    for _ in 0..tiles {
        // SAFETY: the caller's promise.
        unsafe {
            let mut rows = [a; M];
            for i in 0..M {
                rows[i] = a.add(i * a_row);
            }
            let acc = along_rows::<D, M, N>(runs, rows, b, 2 * D::S::LANES);
            put::<D::S, M, N>(&acc, c, [c_row as isize, D::S::LANES as isize], add);
        }
        (a, c) = (a.wrapping_add(M * a_row), c.wrapping_add(M * c_row));
    }
}

/// Writes a vector, or its first `n` lanes, in bfloat16.
///
/// # Safety
/// As of [`Terms::put_rounded`], of so many elements.
#[inline(always)]
pub unsafe fn round_up_to<D: Terms>(p: *mut u16, v: <D::S as Simd>::V, n: usize) {
    // SAFETY: the caller's promise; vectors have up to 16 lanes.
    unsafe {
        if n == D::S::LANES {
            return D::put_rounded(p, v);
        }
        let mut part = [0; 16];
        D::put_rounded(part.as_mut_ptr(), v);
        std::ptr::copy_nonoverlapping(part.as_ptr(), p, n);
    }
}

/// Writes a tile's sums, so many elements from row to row and from vector to vector, or, with `add`, adds them to what is there.
///
/// # Safety
/// `c` must be valid for each of the vectors, and `S`'s instructions be there.
#[inline(always)]
pub unsafe fn put<S: Simd, const M: usize, const N: usize>(
    acc: &Acc<S, M, N>,
    c: *mut S::Elem,
    [row, vector]: [isize; 2],
    add: bool,
) {
    for i in 0..M {
        for j in 0..N {
            // SAFETY: the caller's promise.
            unsafe {
                let (c, v) = (c.offset(i as isize * row + j as isize * vector), acc[i][j]);
                S::store(c, if add { S::add(S::load(c), v) } else { v });
            }
        }
    }
}

/// The positions that [`along_columns`] sums over: `blocks` of `rows` of `steps`, how far A and B advance, and what is fetched at
/// each row meanwhile.
#[derive(Debug, Clone, Copy)]
pub struct Positions {
    pub blocks: usize,
    pub rows: usize,
    pub steps: usize,
    pub a_block: usize,
    pub a_row: usize,
    pub a_step: usize,
    pub b_block: usize,
    pub b_row: usize,
    pub b_step: usize,
    pub ahead: Steps,
}

/// `Σ` over positions of `M` adjacent terms of A times `N` vectors of B, the last of which has `tail` lanes
/// (`LANES`: a whole one). A round of the loop takes `ROUND` steps.
///
/// # Safety
/// `a` and `b` must be valid at all positions, and `D`'s instructions be there.
#[inline(always)]
pub unsafe fn along_columns<D: Terms, const M: usize, const N: usize, const ROUND: usize>(
    p: &Positions,
    a: *const D::Term,
    b: *const D::Term,
    tail: usize,
) -> Acc<D::S, M, N> {
    // SAFETY: the caller's promise. (Two loops rather than a test in one: the masked one is slower.)
    unsafe {
        match tail == D::S::LANES {
            true => columns::<D, M, N, ROUND, true>(p, a, b, tail),
            false => columns::<D, M, N, ROUND, false>(p, a, b, tail),
        }
    }
}

#[inline(always)]
unsafe fn columns<D: Terms, const M: usize, const N: usize, const ROUND: usize, const WHOLE: bool>(
    p: &Positions,
    a: *const D::Term,
    b: *const D::Term,
    tail: usize,
) -> Acc<D::S, M, N> {
    // SAFETY: the caller's promise.
    unsafe {
        let mut acc = [[D::S::splat(num_traits::zero()); N]; M];
        let mut ahead = p.ahead;
        for block in 0..p.blocks {
            for row in 0..p.rows {
                let mut a = a.add(block * p.a_block + row * p.a_row);
                let mut b = b.add(block * p.b_block + row * p.b_row);
                ahead.fetch::<D::S>();
                for _ in 0..p.steps / ROUND {
                    for u in 0..ROUND {
                        let (a, b) = (a.add(u * p.a_step), b.add(u * p.b_step));
                        step_across::<D, M, N, WHOLE>(&mut acc, a, b, tail);
                    }
                    a = a.wrapping_add(ROUND * p.a_step);
                    b = b.wrapping_add(ROUND * p.b_step);
                }
                for _ in 0..p.steps % ROUND {
                    step_across::<D, M, N, WHOLE>(&mut acc, a, b, tail);
                    a = a.wrapping_add(p.a_step);
                    b = b.wrapping_add(p.b_step);
                }
            }
        }
        acc
    }
}

/// # Safety
/// As of [`along_columns`], of one step.
#[inline(always)]
unsafe fn step_across<D: Terms, const M: usize, const N: usize, const WHOLE: bool>(
    acc: &mut Acc<D::S, M, N>,
    a: *const D::Term,
    b: *const D::Term,
    tail: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut row = [match WHOLE || N > 1 {
            true => D::row(b),
            false => D::row_part(b, tail),
        }; N];
        for j in 1..N {
            row[j] = match WHOLE || j + 1 < N {
                true => D::row(b.add(j * D::S::LANES)),
                false => D::row_part(b.add(j * D::S::LANES), tail),
            };
        }
        for i in 0..M {
            let x = D::broadcast(a.add(i));
            for j in 0..N {
                acc[i][j] = D::multiply(x, row[j], acc[i][j]);
            }
        }
    }
}

/// Calls `$f::<S, M, N>(…)` for a number of rows and of vectors that [`Simd::ROWS`] allows; sizes that a level does not have
/// are not compiled for it.
#[macro_export]
macro_rules! tile_sizes {
    ($m:expr, $n:expr, $s:ident, $f:ident($($arg:expr),* $(,)?)) => {
        match $n {
            1 => $crate::tile_sizes!(rows $m, 1, $s, $f($($arg),*)),
            2 => $crate::tile_sizes!(rows $m, 2, $s, $f($($arg),*)),
            3 if $s::ROWS.len() > 2 => $crate::tile_sizes!(rows $m, 3, $s, $f($($arg),*)),
            4 if $s::ROWS.len() > 3 => $crate::tile_sizes!(rows $m, 4, $s, $f($($arg),*)),
            _ => unreachable!("vectors of a tile"),
        }
    };
    (rows $m:expr, $n:literal, $s:ident, $f:ident($($arg:expr),*)) => {
        match $m {
            1 => $f::<$s, 1, $n>($($arg),*),
            2 => $f::<$s, 2, $n>($($arg),*),
            3 => $f::<$s, 3, $n>($($arg),*),
            4 => $f::<$s, 4, $n>($($arg),*),
            5 if $s::ROWS[$n - 1] > 4 => $f::<$s, 5, $n>($($arg),*),
            6 if $s::ROWS[$n - 1] > 4 => $f::<$s, 6, $n>($($arg),*),
            7 if $s::ROWS[$n - 1] > 6 => $f::<$s, 7, $n>($($arg),*),
            8 if $s::ROWS[$n - 1] > 6 => $f::<$s, 8, $n>($($arg),*),
            _ => unreachable!("rows of a tile"),
        }
    };
}

/// `0..total` in pieces of at most some length that differ by one at most, longer ones first.
#[derive(Debug, Clone, Copy)]
pub struct Pieces {
    pub count: usize,
    short: usize,
    longer: usize,
    total: usize,
}

impl Pieces {
    #[inline(always)]
    pub fn of(total: usize, most: usize) -> Pieces {
        let count = total.div_ceil(most);
        let short = total / count.max(1);
        Pieces { count, short, longer: total - count * short, total }
    }

    /// Pieces of exactly `size`, but for the last.
    pub fn by(total: usize, size: usize) -> Pieces {
        Pieces { count: total.div_ceil(size), short: size, longer: 0, total }
    }

    /// Of the `i`th.
    #[inline(always)]
    pub fn len(&self, i: usize) -> usize {
        (self.short + usize::from(i < self.longer)).min(self.total - self.start(i))
    }

    /// Pieces from the `i`th on that are as long.
    #[inline(always)]
    pub fn alike(&self, i: usize) -> usize {
        match i < self.longer {
            true => self.longer - i,
            false if i + 1 < self.count && self.len(self.count - 1) < self.short => self.count - 1 - i,
            false => self.count - i,
        }
    }

    #[inline(always)]
    pub fn start(&self, i: usize) -> usize {
        i * self.short + i.min(self.longer)
    }
}
