//! Vectors of each instruction set behind one trait, and the choice between them: a kernel is written once,
//! generic over [`Simd`], and compiled for each level.
#![allow(unsafe_code)]

use crate::kernels::ahead;
use crate::kernels::isa::{Isa, has_pair_products, isa};
use crate::kernels::pairs::{self, PairKernel};
use crate::tensor::Float;

/// Elements of the longest vector of any instruction set.
pub const WIDEST: usize = 16;

/// The vectors of one instruction set. All methods are inlined into kernels that were compiled for that set.
///
/// # Safety
/// Methods may be called only where the processor has the instruction set, which is so inside a kernel that
/// [`Vectors::dispatch`] runs. Pointers must be valid for the elements that are read or written: `LANES`, or `n`.
#[allow(clippy::missing_safety_doc)] // The trait's own section holds for every method.
pub unsafe trait Simd: Copy + Send + Sync + 'static {
    type Elem: Float;
    type V: Copy;
    const LANES: usize;
    /// Elements of a cache line: what is fetched ahead is fetched once for each.
    const LINE: usize = ahead::LINE / size_of::<Self::Elem>();
    /// Rows of a register tile of one, two … vectors a row: all accumulators, the vectors of B and a broadcast of A
    /// stay in registers. The nearer to a square, the fewer elements are loaded for each multiplication.
    const ROWS: &'static [usize];

    unsafe fn splat(x: Self::Elem) -> Self::V;
    unsafe fn load(p: *const Self::Elem) -> Self::V;
    unsafe fn store(p: *mut Self::Elem, v: Self::V);
    /// The first `n < LANES` elements, zeros after them.
    unsafe fn load_part(p: *const Self::Elem, n: usize) -> Self::V;
    unsafe fn store_part(p: *mut Self::Elem, v: Self::V, n: usize);
    /// `a·b + c`
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// Where one of them is no number: `b` (so `max(bound, x)` keeps an x that is none).
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// As `max`.
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// `x` where `low < y < high`, else 0.
    unsafe fn pass(y: Self::V, low: Self::V, high: Self::V, x: Self::V) -> Self::V;
    /// One bit a lane, the first lane's the lowest: `low < y < high`.
    unsafe fn inside(y: Self::V, low: Self::V, high: Self::V) -> u32;
    /// `x` where the lane's bit is set, else 0.
    unsafe fn keep(bits: u32, x: Self::V) -> Self::V;
    /// `LANES` elements of bfloat16, exactly.
    unsafe fn widen(p: *const u16) -> Self::V;
    /// Writes the elements as bfloat16, rounded to nearest, ties to even.
    unsafe fn round(p: *mut u16, v: Self::V);
    /// Brings the cache line at `p`, any address, to the second-level cache: the first holds what is computed with.
    unsafe fn prefetch(p: *const Self::Elem);
    /// Does a vector so many elements after a line's first begin a line?
    #[inline(always)]
    fn begins_line(at: usize) -> bool {
        Self::LANES >= Self::LINE || at.is_multiple_of(Self::LINE)
    }
    /// Where each lane finds an element among the `NEAR` neighbouring ones that it is of.
    type Places: Copy;
    const NEAR: usize;
    /// Those of `LANES` numbers of lanes, or of these within their neighbours.
    unsafe fn places(from: *const i32) -> Self::Places;
    /// The elements of those places.
    unsafe fn pick(v: Self::V, places: Self::Places) -> Self::V;
    /// Writes the transpose of `LANES` vectors, `ld` elements apart, as `LANES` vectors `ld_to` apart.
    #[inline(always)]
    unsafe fn transpose(p: *const Self::Elem, ld: usize, to: *mut Self::Elem, ld_to: usize) {
        for i in 0..Self::LANES {
            for j in 0..Self::LANES {
                // SAFETY: the caller's promise.
                unsafe { *to.add(i * ld_to + j) = *p.add(j * ld + i) }
            }
        }
    }
}

/// For each group of `width` lanes, which is a power of two: the places of its lane of one number.
///
/// # Safety
/// As of the methods.
#[inline(always)]
pub unsafe fn neighbours<S: Simd>(width: usize, number: usize) -> S::Places {
    const SIZES: usize = WIDEST.trailing_zeros() as usize + 1;
    const PLACES: [[[i32; WIDEST]; WIDEST]; SIZES] = {
        let mut places = [[[0; WIDEST]; WIDEST]; SIZES];
        let mut i = 0;
        while i < SIZES * WIDEST * WIDEST {
            let (size, number, lane) = (i / (WIDEST * WIDEST), i / WIDEST % WIDEST, i % WIDEST);
            places[size][number][lane] = ((lane >> size << size) + number % (1 << size)) as i32;
            i += 1;
        }
        places
    };
    static OF: [[[i32; WIDEST]; WIDEST]; SIZES] = PLACES;
    let size = (width.trailing_zeros() as usize).min(SIZES - 1);
    // SAFETY: the caller's promise; there is a place for each lane.
    unsafe { S::places(OF[size][number % WIDEST].as_ptr()) }
}

/// A vector, or its first `n` lanes.
///
/// # Safety
/// As of the methods; `n` is at most `LANES`.
#[inline(always)]
pub unsafe fn load_up_to<S: Simd>(p: *const S::Elem, n: usize) -> S::V {
    // SAFETY: the caller's promise.
    unsafe { if n == S::LANES { S::load(p) } else { S::load_part(p, n) } }
}

/// Writes a vector, or its first `n` lanes.
///
/// # Safety
/// As of the methods; `n` is at most `LANES`.
#[inline(always)]
pub unsafe fn store_up_to<S: Simd>(p: *mut S::Elem, v: S::V, n: usize) {
    // SAFETY: the caller's promise.
    unsafe { if n == S::LANES { S::store(p, v) } else { S::store_part(p, v, n) } }
}

/// Elements of bfloat16, exactly: a vector, or its first `n` lanes.
///
/// # Safety
/// As of the methods; `n` is at most `LANES`.
#[inline(always)]
pub unsafe fn widen_up_to<S: Simd>(p: *const u16, n: usize) -> S::V {
    // SAFETY: the caller's promise; vectors have up to 16 lanes.
    unsafe {
        if n == S::LANES {
            return S::widen(p);
        }
        let mut part = [0; 16];
        std::ptr::copy_nonoverlapping(p, part.as_mut_ptr(), n);
        S::widen(part.as_ptr())
    }
}

/// In which form elements lie that registers hold whole: so, or of bfloat16.
pub trait Stored<T> {
    type Bits;
    /// A vector, or its first `n` lanes.
    ///
    /// # Safety
    /// As of [`load_up_to`].
    unsafe fn load<S: Simd<Elem = T>>(p: *const Self::Bits, n: usize) -> S::V;
}

pub struct Whole;
pub struct Bf16;

impl<T> Stored<T> for Whole {
    type Bits = T;

    #[inline(always)]
    unsafe fn load<S: Simd<Elem = T>>(p: *const T, n: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { load_up_to::<S>(p, n) }
    }
}

impl<T> Stored<T> for Bf16 {
    type Bits = u16;

    #[inline(always)]
    unsafe fn load<S: Simd<Elem = T>>(p: *const u16, n: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { widen_up_to::<S>(p, n) }
    }
}

/// As [`load_up_to`], where it is known beforehand whether a whole vector is read.
///
/// # Safety
/// As of the methods; `n` is at most `LANES`.
#[inline(always)]
pub unsafe fn load_lanes<S: Simd, const WHOLE: bool>(p: *const S::Elem, n: usize) -> S::V {
    // SAFETY: the caller's promise.
    unsafe { if WHOLE { S::load(p) } else { S::load_part(p, n) } }
}

/// As [`store_up_to`], where it is known beforehand whether a whole vector is written.
///
/// # Safety
/// As of the methods; `n` is at most `LANES`.
#[inline(always)]
pub unsafe fn store_lanes<S: Simd, const WHOLE: bool>(p: *mut S::Elem, v: S::V, n: usize) {
    // SAFETY: the caller's promise.
    unsafe { if WHOLE { S::store(p, v) } else { S::store_part(p, v, n) } }
}

/// Of `N` vectors the one with the number `j`, at `p`: whole, but for the last one unless all are `WHOLE`, which has `tail` lanes.
///
/// # Safety
/// As of the methods.
#[inline(always)]
pub unsafe fn load_nth<S: Simd, const N: usize, const WHOLE: bool>(
    p: *const S::Elem,
    j: usize,
    tail: usize,
) -> S::V {
    // SAFETY: the caller's promise.
    unsafe { if WHOLE || j + 1 < N { S::load(p) } else { S::load_part(p, tail) } }
}

/// As [`load_nth`], of one that is written.
///
/// # Safety
/// As of the methods.
#[inline(always)]
pub unsafe fn store_nth<S: Simd, const N: usize, const WHOLE: bool>(
    p: *mut S::Elem,
    j: usize,
    v: S::V,
    tail: usize,
) {
    // SAFETY: the caller's promise.
    unsafe { if WHOLE || j + 1 < N { S::store(p, v) } else { S::store_part(p, v, tail) } }
}

/// A loop nest to be compiled for each instruction set. Write `run` as `#[inline(always)]`.
pub trait Kernel<T> {
    /// # Safety
    /// The processor must have `S`'s instruction set, and the kernel's own promises must hold.
    unsafe fn run<S: Simd<Elem = T>>(self);
}

/// Element types with vectors.
pub trait Vectors: Float {
    /// Runs a kernel with the widest vectors of the level in use.
    ///
    /// # Safety
    /// The kernel's own promises.
    unsafe fn dispatch<K: Kernel<Self>>(kernel: K);

    /// Has the processor vectors of pairs that are summed in this type? (None has, of `f64`.)
    fn has_pairs() -> bool;

    /// Runs a kernel with vectors of pairs, see [`pairs`]: of `f32` (and in tests of `f64`) alone.
    ///
    /// # Safety
    /// The kernel's own promises.
    unsafe fn dispatch_pairs<K: PairKernel<Self>>(kernel: K);

    /// The vectors that `dispatch` will choose.
    fn level() -> Level;
}

/// The constants of [`Simd`], and what follows from them.
#[derive(Debug, Clone, Copy)]
pub struct Level {
    pub lanes: usize,
    /// See [`Simd::NEAR`].
    pub near: usize,
    rows: &'static [usize],
}

impl Level {
    #[inline(always)]
    pub fn of<S: Simd>() -> Level {
        Level { lanes: S::LANES, near: S::NEAR, rows: S::ROWS }
    }

    /// Width of the panels that so many columns are divided into: whole vectors, at most as many as a tile has, and
    /// as equal as they can be.
    #[inline(always)]
    pub fn panel(&self, columns: usize) -> usize {
        let vectors = columns.div_ceil(self.lanes).max(1);
        vectors.div_ceil(vectors.div_ceil(self.rows.len())) * self.lanes
    }

    /// As [`panel`](Self::panel), of a matrix product: of two tiles of as many sums the narrower one reads less of B a step.
    #[inline(always)]
    pub fn near_panel(&self, columns: usize) -> usize {
        let wide = self.panel(columns);
        let narrow = wide - self.lanes;
        let divides = narrow > 0 && columns.is_multiple_of(narrow);
        if divides && self.rows(narrow) * narrow == self.rows(wide) * wide { narrow } else { wide }
    }

    /// Has it registers for tiles of more than two vectors: 32 of them?
    #[inline(always)]
    pub fn is_roomy(&self) -> bool {
        self.rows.len() > 2
    }

    /// Width of panels of two vectors.
    pub fn pair(&self) -> usize {
        2 * self.lanes
    }

    /// Has a register tile of that width as many rows?
    pub fn has_rows(&self, panel: usize, rows: usize) -> bool {
        self.rows.get(panel / self.lanes - 1).is_some_and(|most| *most >= rows)
    }

    /// Rows of a register tile on panels of that width.
    #[inline(always)]
    pub fn rows(&self, panel: usize) -> usize {
        self.rows[panel / self.lanes - 1]
    }
}

impl Vectors for f32 {
    #[inline]
    unsafe fn dispatch<K: Kernel<f32>>(kernel: K) {
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            unsafe fn avx512<K: Kernel<f32>>(kernel: K) {
                // SAFETY: the caller's promise.
                unsafe { kernel.run::<x86::Avx512>() }
            }
            #[target_feature(enable = "avx2,fma")]
            unsafe fn avx2<K: Kernel<f32>>(kernel: K) {
                // SAFETY: the caller's promise.
                unsafe { kernel.run::<x86::Avx2>() }
            }
            match isa() {
                // SAFETY: `isa` reports a level only where the processor has its features; else the caller's promise.
                Isa::Avx512 => return unsafe { avx512(kernel) },
                // SAFETY: as above.
                Isa::Avx2 => return unsafe { avx2(kernel) },
                Isa::Portable | Isa::Neon => {}
            }
        }
        #[cfg(target_arch = "aarch64")]
        if isa() == Isa::Neon {
            // SAFETY: NEON is part of the target's baseline; else the caller's promise.
            return unsafe { kernel.run::<arm::Neon>() };
        }
        // SAFETY: plain arithmetic runs everywhere; else the caller's promise.
        unsafe { kernel.run::<Plain<f32>>() }
    }

    fn has_pairs() -> bool {
        has_pair_products()
    }

    unsafe fn dispatch_pairs<K: PairKernel<f32>>(kernel: K) {
        // SAFETY: the caller's promise.
        unsafe { pairs::dispatch(kernel) }
    }

    fn level() -> Level {
        match isa() {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Level::of::<x86::Avx512>(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Level::of::<x86::Avx2>(),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => Level::of::<arm::Neon>(),
            _ => Level::of::<Plain<f32>>(),
        }
    }
}

impl Vectors for f64 {
    #[inline]
    unsafe fn dispatch<K: Kernel<f64>>(kernel: K) {
        // SAFETY: plain arithmetic runs everywhere; else the caller's promise.
        unsafe { kernel.run::<Plain<f64>>() }
    }

    fn has_pairs() -> bool {
        false
    }

    #[cfg(test)]
    unsafe fn dispatch_pairs<K: PairKernel<f64>>(kernel: K) {
        // SAFETY: the caller's promise.
        unsafe { pairs::plain::dispatch_double(kernel) }
    }

    #[cfg(not(test))]
    unsafe fn dispatch_pairs<K: PairKernel<f64>>(_: K) {
        unreachable!("pairs of bfloat16 are summed in f32")
    }

    fn level() -> Level {
        Level::of::<Plain<f64>>()
    }
}

/// Implements [`Simd`] for `f32` by one intrinsic a method.
macro_rules! vectors {
    ($(#[$doc:meta])* $name:ident, $v:ty, $lanes:literal, $rows:expr,
     $splat:path, $load:path, $store:path, $add:path, $sub:path, $mul:path, $max:path, $min:path,
     fma: |$a:ident, $b:ident, $c:ident| $fma:expr,
     pass: |$py:ident, $low:ident, $high:ident, $px:ident| $pass:expr,
     inside: |$iy:ident, $il:ident, $ih:ident| $inside:expr,
     keep: |$bits:ident, $kx:ident| $keep:expr,
     widen: |$wp:ident| $widen:expr,
     round: |$rp:ident, $rv:ident| $round:expr,
     prefetch: |$at:ident| $prefetch:expr,
     near: $near:literal, $places:ty, |$from:ident| $place:expr,
     pick: |$pv:ident, $pp:ident| $pick:expr,
     load_part: |$lp:ident, $ln:ident| $load_part:expr,
     store_part: |$sp:ident, $sv:ident, $sn:ident| $store_part:expr
     $(, transpose: $transpose:path)?) => {
        $(#[$doc])*
        #[derive(Clone, Copy)]
        pub struct $name;

        // SAFETY: every method is one instruction of the set (or a few), on as many elements as the trait says.
        unsafe impl Simd for $name {
            type Elem = f32;
            type V = $v;
            const LANES: usize = $lanes;
            const ROWS: &'static [usize] = &$rows;

            #[inline(always)]
            unsafe fn splat(x: f32) -> $v {
                // SAFETY: the caller's promise, as in all methods below.
                unsafe { $splat(x) }
            }
            #[inline(always)]
            unsafe fn load(p: *const f32) -> $v {
                // SAFETY: see `splat`.
                unsafe { $load(p) }
            }
            #[inline(always)]
            unsafe fn store(p: *mut f32, v: $v) {
                // SAFETY: see `splat`.
                unsafe { $store(p, v) }
            }
            #[inline(always)]
            unsafe fn load_part($lp: *const f32, $ln: usize) -> $v {
                // SAFETY: see `splat`.
                unsafe { $load_part }
            }
            #[inline(always)]
            unsafe fn store_part($sp: *mut f32, $sv: $v, $sn: usize) {
                // SAFETY: see `splat`.
                unsafe { $store_part }
            }
            #[inline(always)]
            unsafe fn fma($a: $v, $b: $v, $c: $v) -> $v {
                // SAFETY: see `splat`.
                unsafe { $fma }
            }
            #[inline(always)]
            unsafe fn add(a: $v, b: $v) -> $v {
                // SAFETY: see `splat`.
                unsafe { $add(a, b) }
            }
            #[inline(always)]
            unsafe fn sub(a: $v, b: $v) -> $v {
                // SAFETY: see `splat`.
                unsafe { $sub(a, b) }
            }
            #[inline(always)]
            unsafe fn mul(a: $v, b: $v) -> $v {
                // SAFETY: see `splat`.
                unsafe { $mul(a, b) }
            }
            #[inline(always)]
            unsafe fn max(a: $v, b: $v) -> $v {
                // SAFETY: see `splat`.
                unsafe { $max(a, b) }
            }
            #[inline(always)]
            unsafe fn min(a: $v, b: $v) -> $v {
                // SAFETY: see `splat`.
                unsafe { $min(a, b) }
            }
            #[inline(always)]
            unsafe fn pass($py: $v, $low: $v, $high: $v, $px: $v) -> $v {
                // SAFETY: see `splat`.
                unsafe { $pass }
            }
            #[inline(always)]
            unsafe fn inside($iy: $v, $il: $v, $ih: $v) -> u32 {
                // SAFETY: see `splat`.
                unsafe { $inside }
            }
            #[inline(always)]
            unsafe fn keep($bits: u32, $kx: $v) -> $v {
                // SAFETY: see `splat`.
                unsafe { $keep }
            }
            #[inline(always)]
            unsafe fn widen($wp: *const u16) -> $v {
                // SAFETY: see `splat`.
                unsafe { $widen }
            }
            #[inline(always)]
            unsafe fn round($rp: *mut u16, $rv: $v) {
                // SAFETY: see `splat`.
                unsafe { $round }
            }
            #[inline(always)]
            unsafe fn prefetch($at: *const f32) {
                // SAFETY: see `splat`.
                unsafe { $prefetch }
            }
            type Places = $places;
            const NEAR: usize = $near;
            #[inline(always)]
            unsafe fn places($from: *const i32) -> $places {
                // SAFETY: see `splat`.
                unsafe { $place }
            }
            #[inline(always)]
            unsafe fn pick($pv: $v, $pp: $places) -> $v {
                // SAFETY: see `splat`.
                unsafe { $pick }
            }
            $(#[inline(always)]
            unsafe fn transpose(p: *const f32, ld: usize, to: *mut f32, ld_to: usize) {
                // SAFETY: see `splat`.
                unsafe { $transpose(p, ld, to, ld_to) }
            })?
        }
    };
}

#[cfg(target_arch = "aarch64")]
pub mod arm;
mod plain;
#[cfg(target_arch = "x86_64")]
pub mod x86;

pub use plain::Plain;
