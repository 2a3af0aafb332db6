//! Vectors of each instruction set behind one trait, and the choice between them: a kernel is written once,
//! generic over [`Simd`], and compiled for each level.
#![allow(unsafe_code)]

use crate::kernels::isa::{Isa, isa};
use crate::kernels::pairs::{self, PairKernel};
use crate::tensor::Float;

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
    /// Brings the cache line at `p`, any address, to the second-level cache: the first holds what is computed with.
    unsafe fn prefetch(p: *const Self::Elem);
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

    /// Runs a kernel with vectors of pairs, see [`pairs`].
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
    rows: &'static [usize],
}

impl Level {
    #[inline(always)]
    pub fn of<S: Simd>() -> Level {
        Level { lanes: S::LANES, rows: S::ROWS }
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

    unsafe fn dispatch_pairs<K: PairKernel<f64>>(kernel: K) {
        // SAFETY: the caller's promise.
        unsafe { pairs::dispatch_double(kernel) }
    }

    fn level() -> Level {
        Level::of::<Plain<f64>>()
    }
}

/// Four elements in plain arithmetic, which compilers turn into the baseline's vectors.
#[derive(Clone, Copy)]
pub struct Plain<T>(std::marker::PhantomData<fn() -> T>);

#[inline(always)]
fn each<T: Copy>(f: impl Fn(usize) -> T) -> [T; 4] {
    [f(0), f(1), f(2), f(3)]
}

// SAFETY: no instruction beyond the baseline is used.
unsafe impl<T: Float> Simd for Plain<T> {
    type Elem = T;
    type V = [T; 4];
    const LANES: usize = 4;
    const ROWS: &'static [usize] = &[4, 4];

    #[inline(always)]
    unsafe fn splat(x: T) -> [T; 4] {
        [x; 4]
    }
    #[inline(always)]
    unsafe fn load(p: *const T) -> [T; 4] {
        // SAFETY: the caller's promise; arrays of elements have the elements' alignment.
        unsafe { p.cast::<[T; 4]>().read() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut T, v: [T; 4]) {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[T; 4]>().write(v) }
    }
    #[inline(always)]
    unsafe fn load_part(p: *const T, n: usize) -> [T; 4] {
        // SAFETY: only the first `n` elements are read.
        each(|i| if i < n { unsafe { *p.add(i) } } else { T::zero() })
    }
    #[inline(always)]
    unsafe fn store_part(p: *mut T, v: [T; 4], n: usize) {
        for (i, x) in v.iter().enumerate().take(n) {
            // SAFETY: only the first `n` elements are written.
            unsafe { *p.add(i) = *x }
        }
    }
    #[inline(always)]
    unsafe fn fma(a: [T; 4], b: [T; 4], c: [T; 4]) -> [T; 4] {
        each(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn add(a: [T; 4], b: [T; 4]) -> [T; 4] {
        each(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(a: [T; 4], b: [T; 4]) -> [T; 4] {
        each(|i| a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: [T; 4], b: [T; 4]) -> [T; 4] {
        each(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn max(a: [T; 4], b: [T; 4]) -> [T; 4] {
        each(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn min(a: [T; 4], b: [T; 4]) -> [T; 4] {
        each(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn pass(y: [T; 4], low: [T; 4], high: [T; 4], x: [T; 4]) -> [T; 4] {
        each(|i| std::hint::select_unpredictable((y[i] > low[i]) & (y[i] < high[i]), x[i], T::zero()))
    }
    #[inline(always)]
    unsafe fn inside(y: [T; 4], low: [T; 4], high: [T; 4]) -> u32 {
        (0..4).fold(0, |bits, i| bits | u32::from((y[i] > low[i]) & (y[i] < high[i])) << i)
    }
    #[inline(always)]
    unsafe fn keep(bits: u32, x: [T; 4]) -> [T; 4] {
        each(|i| std::hint::select_unpredictable(bits >> i & 1 == 1, x[i], T::zero()))
    }
    #[inline(always)]
    unsafe fn prefetch(_: *const T) {}
}

/// Implements [`Simd`] for `f32` by one intrinsic a method.
macro_rules! vectors {
    ($(#[$doc:meta])* $name:ident, $v:ty, $lanes:literal, $rows:expr,
     $splat:path, $load:path, $store:path, $add:path, $sub:path, $mul:path, $max:path, $min:path,
     fma: |$a:ident, $b:ident, $c:ident| $fma:expr,
     pass: |$py:ident, $low:ident, $high:ident, $px:ident| $pass:expr,
     inside: |$iy:ident, $il:ident, $ih:ident| $inside:expr,
     keep: |$bits:ident, $kx:ident| $keep:expr,
     prefetch: |$at:ident| $prefetch:expr,
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
            unsafe fn prefetch($at: *const f32) {
                // SAFETY: see `splat`.
                unsafe { $prefetch }
            }
            $(#[inline(always)]
            unsafe fn transpose(p: *const f32, ld: usize, to: *mut f32, ld_to: usize) {
                // SAFETY: see `splat`.
                unsafe { $transpose(p, ld, to, ld_to) }
            })?
        }
    };
}

#[cfg(target_arch = "x86_64")]
pub mod x86 {
    use std::arch::x86_64::*;

    use super::Simd;

    vectors!(
        /// AVX-512: 16 lanes, masked tails.
        Avx512, __m512, 16, [8, 8, 8, 6],
        _mm512_set1_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_add_ps, _mm512_sub_ps, _mm512_mul_ps, _mm512_max_ps, _mm512_min_ps,
        fma: |a, b, c| _mm512_fmadd_ps(a, b, c),
        pass: |y, low, high, x| {
            let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(y, low);
            _mm512_maskz_mov_ps(_mm512_mask_cmp_ps_mask::<_CMP_LT_OQ>(above, y, high), x)
        },
        inside: |y, low, high| {
            let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(y, low);
            u32::from(_mm512_mask_cmp_ps_mask::<_CMP_LT_OQ>(above, y, high))
        },
        keep: |bits, x| _mm512_maskz_mov_ps(bits as u16, x),
        prefetch: |p| _mm_prefetch::<_MM_HINT_T1>(p.cast()),
        load_part: |p, n| _mm512_maskz_loadu_ps((1u32 << n) as u16 - 1, p),
        store_part: |p, v, n| _mm512_mask_storeu_ps(p, (1u32 << n) as u16 - 1, v),
        transpose: transpose16
    );

    /// Four columns at a time: of rows 4i to 4i + 3, lane blocks of 4×4 are transposed, then blocks change places.
    #[inline(always)]
    unsafe fn transpose16(p: *const f32, ld: usize, to: *mut f32, ld_to: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            // `t[4g + c]`: in lane block b, column 4b + c of rows 4g to 4g + 3.
            let mut t = [_mm512_setzero_ps(); 16];
            for g in 0..4 {
                let at = p.add(4 * g * ld);
                let r0 = _mm512_loadu_ps(at);
                let r1 = _mm512_loadu_ps(at.add(ld));
                let r2 = _mm512_loadu_ps(at.add(2 * ld));
                let r3 = _mm512_loadu_ps(at.add(3 * ld));
                let (a, b) = (_mm512_unpacklo_ps(r0, r1), _mm512_unpackhi_ps(r0, r1));
                let (c, d) = (_mm512_unpacklo_ps(r2, r3), _mm512_unpackhi_ps(r2, r3));
                t[4 * g] = _mm512_shuffle_ps::<0x44>(a, c);
                t[4 * g + 1] = _mm512_shuffle_ps::<0xee>(a, c);
                t[4 * g + 2] = _mm512_shuffle_ps::<0x44>(b, d);
                t[4 * g + 3] = _mm512_shuffle_ps::<0xee>(b, d);
            }
            for c in 0..4 {
                let a = _mm512_shuffle_f32x4::<0x88>(t[c], t[4 + c]);
                let b = _mm512_shuffle_f32x4::<0xdd>(t[c], t[4 + c]);
                let d = _mm512_shuffle_f32x4::<0x88>(t[8 + c], t[12 + c]);
                let e = _mm512_shuffle_f32x4::<0xdd>(t[8 + c], t[12 + c]);
                _mm512_storeu_ps(to.add(c * ld_to), _mm512_shuffle_f32x4::<0x88>(a, d));
                _mm512_storeu_ps(to.add((4 + c) * ld_to), _mm512_shuffle_f32x4::<0x88>(b, e));
                _mm512_storeu_ps(to.add((8 + c) * ld_to), _mm512_shuffle_f32x4::<0xdd>(a, d));
                _mm512_storeu_ps(to.add((12 + c) * ld_to), _mm512_shuffle_f32x4::<0xdd>(b, e));
            }
        }
    }

    /// Lanes below `n` as AVX2's masks want them.
    #[inline(always)]
    unsafe fn below(n: usize) -> __m256i {
        // SAFETY: the caller's promise.
        unsafe { _mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)) }
    }

    vectors!(
        /// AVX2 with FMA: 8 lanes, masked tails.
        Avx2, __m256, 8, [6, 6],
        _mm256_set1_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_add_ps, _mm256_sub_ps, _mm256_mul_ps, _mm256_max_ps, _mm256_min_ps,
        fma: |a, b, c| _mm256_fmadd_ps(a, b, c),
        pass: |y, low, high, x| {
            let inside = _mm256_and_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(y, low), _mm256_cmp_ps::<_CMP_LT_OQ>(y, high));
            _mm256_and_ps(inside, x)
        },
        inside: |y, low, high| {
            let inside = _mm256_and_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(y, low), _mm256_cmp_ps::<_CMP_LT_OQ>(y, high));
            _mm256_movemask_ps(inside) as u32
        },
        keep: |bits, x| {
            let lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
            let set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits as i32), lanes), lanes);
            _mm256_and_ps(_mm256_castsi256_ps(set), x)
        },
        prefetch: |p| _mm_prefetch::<_MM_HINT_T1>(p.cast()),
        load_part: |p, n| _mm256_maskload_ps(p, below(n)),
        store_part: |p, v, n| _mm256_maskstore_ps(p, below(n), v),
        transpose: transpose8
    );

    /// As [`transpose16`], with two lane blocks.
    #[inline(always)]
    unsafe fn transpose8(p: *const f32, ld: usize, to: *mut f32, ld_to: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut t = [_mm256_setzero_ps(); 8];
            for g in 0..2 {
                let at = p.add(4 * g * ld);
                let r0 = _mm256_loadu_ps(at);
                let r1 = _mm256_loadu_ps(at.add(ld));
                let r2 = _mm256_loadu_ps(at.add(2 * ld));
                let r3 = _mm256_loadu_ps(at.add(3 * ld));
                let (a, b) = (_mm256_unpacklo_ps(r0, r1), _mm256_unpackhi_ps(r0, r1));
                let (c, d) = (_mm256_unpacklo_ps(r2, r3), _mm256_unpackhi_ps(r2, r3));
                t[4 * g] = _mm256_shuffle_ps::<0x44>(a, c);
                t[4 * g + 1] = _mm256_shuffle_ps::<0xee>(a, c);
                t[4 * g + 2] = _mm256_shuffle_ps::<0x44>(b, d);
                t[4 * g + 3] = _mm256_shuffle_ps::<0xee>(b, d);
            }
            for c in 0..4 {
                _mm256_storeu_ps(to.add(c * ld_to), _mm256_permute2f128_ps::<0x20>(t[c], t[4 + c]));
                _mm256_storeu_ps(to.add((4 + c) * ld_to), _mm256_permute2f128_ps::<0x31>(t[c], t[4 + c]));
            }
        }
    }
}

#[cfg(target_arch = "aarch64")]
pub mod arm {
    use std::arch::aarch64::*;

    use super::Simd;

    vectors!(
        /// NEON: 4 lanes.
        Neon, float32x4_t, 4, [8, 8, 8, 6],
        vdupq_n_f32, vld1q_f32, vst1q_f32, vaddq_f32, vsubq_f32, vmulq_f32, vmaxq_f32, vminq_f32,
        fma: |a, b, c| vfmaq_f32(c, a, b),
        pass: |y, low, high, x| {
            let inside = vandq_u32(vcgtq_f32(y, low), vcltq_f32(y, high));
            vreinterpretq_f32_u32(vandq_u32(inside, vreinterpretq_u32_f32(x)))
        },
        inside: |y, low, high| {
            let inside = vandq_u32(vcgtq_f32(y, low), vcltq_f32(y, high));
            vaddvq_u32(vandq_u32(inside, vld1q_u32([1, 2, 4, 8].as_ptr())))
        },
        keep: |bits, x| {
            let set = vtstq_u32(vdupq_n_u32(bits), vld1q_u32([1, 2, 4, 8].as_ptr()));
            vreinterpretq_f32_u32(vandq_u32(set, vreinterpretq_u32_f32(x)))
        },
        prefetch: |p| {
            std::arch::asm!("prfm pldl2keep, [{p}]", p = in(reg) p, options(nostack, preserves_flags, readonly))
        },
        load_part: |p, n| {
            let mut all = [0.0f32; 4];
            std::ptr::copy_nonoverlapping(p, all.as_mut_ptr(), n);
            vld1q_f32(all.as_ptr())
        },
        store_part: |p, v, n| {
            let mut all = [0.0f32; 4];
            vst1q_f32(all.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(all.as_ptr(), p, n);
        }
    );
}
