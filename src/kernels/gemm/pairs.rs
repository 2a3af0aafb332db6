//! Products of bfloat16 pairs: `C = alpha · op(A) · op(B) + beta · C` of operands rounded to bfloat16, summed in `f32`, by the
//! instruction that multiplies two pairs a lane and adds both products (AVX512-BF16's `vdpbf16ps`, Arm's `bfdot`).
//!
//! Two consecutive steps of the summed dimension are a pair, of 32 bits. op(B) is packed in panels of a row of pairs a step; A in
//! rows of pairs, or, where it is read across its rows, in strips; register tiles as of `gemm` do the rest. Where the processor
//! has no such instruction the same sums are computed in plain arithmetic, which nothing but tests asks for.

use std::ops::Range;

use rayon::prelude::*;

use super::tile::Target;
use super::{Plus, Product, tasks};
use crate::kernels::half::{Elements, Half};
use crate::kernels::isa::has_pair_products;
use crate::kernels::par::Shared;
use crate::kernels::simd::{Kernel, Level, Simd, Vectors};
use crate::kernels::tile::{Acc, Pieces};
use crate::tile_sizes;

/// Multiply-adds that pay for packing.
const LEAST: usize = 1 << 18;
/// Pairs that are added up in registers before they are added to C.
const STEPS: usize = 256;
/// Rows of A that are packed by a task.
const ROWS: usize = 64;

impl Product<f32> {
    /// Is the product large enough for [`gemm_pairs`]?
    pub fn suits_pairs(&self) -> bool {
        !self.is_vector() && self.work() >= LEAST && self.k > 1
    }

    /// Pairs of the summed dimension.
    fn steps(&self) -> usize {
        self.k.div_ceil(2)
    }

    /// Numbers of 32 bits that A and B are packed in.
    fn pairs(&self) -> [usize; 2] {
        let a = match self.trans_a {
            true => self.strips().count * self.tile().1 * self.steps(),
            false => self.m * self.steps(),
        };
        [a, self.in_panels(self.panels(), self.steps())]
    }
}

/// Elements of scratch that [`gemm_pairs`] needs.
pub fn room_pairs(p: &Product<f32>) -> usize {
    p.pairs().iter().sum()
}

/// As [`gemm`](super::gemm), of operands rounded to bfloat16, with something added.
pub fn gemm_pairs(
    p: &Product<f32>,
    a: Elements<f32>,
    b: Elements<f32>,
    plus: Plus<f32>,
    c: &mut [f32],
    scratch: &mut [f32],
) {
    p.check([a.len(), b.len(), c.len()], &plus);
    if p.m * p.n == 0 {
        return;
    }
    let [in_a, in_b] = p.pairs();
    let scratch: &mut [u32] = bytemuck::cast_slice_mut(&mut scratch[..in_a + in_b]);
    let (a_pairs, b_pairs) = scratch.split_at_mut(in_a);
    pack_b(p, b, b_pairs);
    pack_a(p, a, a_pairs);
    let (a, b, c) = (&*a_pairs, &*b_pairs, Shared::new(c));
    let (rows, cols) = Product { trans_a: false, ..*p }.pieces();
    let share = |i: usize, of: usize, total: usize| total * i / of..total * (i + 1) / of;
    tasks::<f32>(rows * cols, 0, &mut [], |task, _| {
        let strips = share(task / cols, rows, p.strips().count);
        let panels = share(task % cols, cols, p.panels());
        let part = Part { p, a, b, plus, c: c.ptr(), strips, panels };
        // SAFETY: the extents were checked above; no two tasks share elements of C.
        unsafe { part.dispatch() }
    });
}

/// A panel of op(B) is, for each step, its columns' pairs.
fn pack_b(p: &Product<f32>, b: Elements<f32>, out: &mut [u32]) {
    let panel = p.tile().0;
    let size = p.in_panels(1, p.steps());
    out.par_chunks_exact_mut(size).enumerate().for_each(|(q, out)| {
        let first = q * panel;
        let cols = panel.min(p.n - first);
        match p.trans_b {
            false => interleave(b, p.ldb, p.k, first, cols, panel, out),
            true => {
                if cols < panel {
                    out.fill(0);
                }
                let mut few = [0; RUN / 2];
                for (run, out) in out.chunks_mut(RUN / 2 * panel).enumerate() {
                    let (steps, done) = (out.len() / panel, run * RUN);
                    for j in 0..cols {
                        adjacent(b, (first + j) * p.ldb + done, p.k - done, &mut few[..steps]);
                        for (to, pair) in out[j..].iter_mut().step_by(panel).zip(&few) {
                            *to = *pair;
                        }
                    }
                }
            }
        }
    });
}

/// A's rows as rows of pairs; of an A that is read across its rows, strips as B's panels.
fn pack_a(p: &Product<f32>, a: Elements<f32>, out: &mut [u32]) {
    if !p.trans_a {
        let rows = out.par_chunks_mut(ROWS * p.steps()).enumerate();
        return rows.for_each(|(i, out)| {
            for (r, row) in out.chunks_exact_mut(p.steps()).enumerate() {
                adjacent(a, (i * ROWS + r) * p.lda, p.k, row);
            }
        });
    }
    let (height, strips) = (p.tile().1, p.strips());
    out.par_chunks_exact_mut(height * p.steps()).enumerate().for_each(|(i, out)| {
        interleave(a, p.lda, p.k, strips.start(i), strips.len(i), height, out);
    });
}

/// Neighbouring elements from `start` on, `k` of them at most, in pairs; an odd one is beside a zero.
fn adjacent(x: Elements<f32>, start: usize, k: usize, out: &mut [u32]) {
    let mut bits = [0; RUN];
    for (run, out) in out.chunks_mut(RUN / 2).enumerate() {
        let done = run * RUN;
        let n = (2 * out.len()).min(k - done);
        bits[n..2 * out.len()].fill(0);
        rounded(x, start + done, &mut bits[..n]);
        for (pair, b) in out.iter_mut().zip(bits.chunks_exact(2)) {
            *pair = u32::from(b[0]) | u32::from(b[1]) << 16;
        }
    }
}

/// Of `k` rows, `ld` apart, `cols` columns from `first` on: each two rows become one of pairs, `width` wide, zeros after the last
/// column.
fn interleave(
    x: Elements<f32>,
    ld: usize,
    k: usize,
    first: usize,
    cols: usize,
    width: usize,
    out: &mut [u32],
) {
    let mut bits = [[0; RUN]; 2];
    for (step, out) in out.chunks_exact_mut(width).enumerate() {
        for (half, bits) in bits.iter_mut().enumerate() {
            match 2 * step + half < k {
                true => rounded(x, (2 * step + half) * ld + first, &mut bits[..cols]),
                false => bits.fill(0),
            }
        }
        for (j, pair) in out.iter_mut().enumerate() {
            *pair = match j < cols {
                true => u32::from(bits[0][j]) | u32::from(bits[1][j]) << 16,
                false => 0,
            };
        }
    }
}

/// Elements that are rounded at a time; no panel is wider.
const RUN: usize = 256;

/// Some elements as bits of bfloat16.
fn rounded(x: Elements<f32>, start: usize, out: &mut [u16]) {
    match x {
        Elements::Whole(x) => Half::Bf16.round_near(&x[start..start + out.len()], out),
        Elements::Half(Half::Bf16, x) => out.copy_from_slice(&x[start..start + out.len()]),
        half => {
            let mut wide = [0.0; RUN];
            half.copy(start, &mut wide[..out.len()]);
            Half::Bf16.round_near(&wide[..out.len()], out);
        }
    }
}

/// Vectors that multiply pairs.
///
/// # Safety
/// As of [`Simd`].
unsafe trait Pairs {
    type S: Simd<Elem = f32>;
    const ROWS: &'static [usize] = Self::S::ROWS;

    /// `c + a₀·b₀ + a₁·b₁` a lane, of the pair `a` and a vector of pairs.
    unsafe fn dot(a: u32, b: *const u32, c: <Self::S as Simd>::V) -> <Self::S as Simd>::V;
}

/// In plain arithmetic, on any vectors.
struct Plainly<S>(std::marker::PhantomData<S>);

// SAFETY: vectors are written to arrays of as many elements, and read from them.
unsafe impl<S: Simd<Elem = f32>> Pairs for Plainly<S> {
    type S = S;

    #[inline(always)]
    unsafe fn dot(a: u32, b: *const u32, c: S::V) -> S::V {
        let (low, high) = (f32::from_bits(a << 16), f32::from_bits(a & 0xFFFF_0000));
        let mut sum = [0.0; 16];
        // SAFETY: the caller's promise; no vector has more than 16 lanes.
        unsafe {
            S::store(sum.as_mut_ptr(), c);
            for (i, sum) in sum.iter_mut().enumerate().take(S::LANES) {
                let b = *b.add(i);
                *sum += low * f32::from_bits(b << 16) + high * f32::from_bits(b & 0xFFFF_0000);
            }
            S::load(sum.as_ptr())
        }
    }
}

/// By one instruction.
struct Instruction;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Instruction, Pairs};
    use crate::kernels::simd::x86::Avx512;

    // SAFETY: one instruction of AVX512-BF16, which the caller has.
    unsafe impl Pairs for Instruction {
        type S = Avx512;

        #[inline(always)]
        unsafe fn dot(a: u32, b: *const u32, c: __m512) -> __m512 {
            // SAFETY: the caller's promise; all are 512 bits.
            unsafe {
                let a: __m512bh = std::mem::transmute(_mm512_set1_epi32(a.cast_signed()));
                let b: __m512bh = std::mem::transmute(_mm512_loadu_si512(b.cast()));
                _mm512_dpbf16_ps(c, a, b)
            }
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod arm {
    use std::arch::aarch64::*;
    use std::arch::asm;

    use super::{Instruction, Pairs};
    use crate::kernels::simd::arm::Neon;

    // SAFETY: one instruction of Arm's BF16 extension, which the caller has.
    unsafe impl Pairs for Instruction {
        type S = Neon;

        #[inline(always)]
        unsafe fn dot(a: u32, b: *const u32, c: float32x4_t) -> float32x4_t {
            let mut sum = c;
            // SAFETY: the caller's promise.
            unsafe {
                let (a, b) = (vdupq_n_u32(a), vld1q_u32(b));
                asm!(
                    ".arch_extension bf16",
                    "bfdot {sum:v}.4s, {b:v}.8h, {a:v}.8h",
                    sum = inout(vreg) sum,
                    a = in(vreg) a,
                    b = in(vreg) b,
                    options(pure, nomem, nostack, preserves_flags)
                );
            }
            sum
        }
    }
}

/// Some strips and panels of one product whose operands are packed.
struct Part<'a> {
    p: &'a Product<f32>,
    a: &'a [u32],
    b: &'a [u32],
    plus: Plus<'a, f32>,
    c: *mut f32,
    strips: Range<usize>,
    panels: Range<usize>,
}

impl Kernel<f32> for Part<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = f32>>(self) {
        // SAFETY: the caller's promise.
        unsafe { self.tiles::<Plainly<S>>() }
    }
}

impl Part<'_> {
    /// # Safety
    /// The part must lie inside the product, whose packed operands and C have its extents.
    unsafe fn dispatch(self) {
        #[cfg(target_arch = "x86_64")]
        if has_pair_products() {
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
            unsafe fn by_instruction(part: Part) {
                // SAFETY: the caller's promise.
                unsafe { part.tiles::<Instruction>() }
            }
            // SAFETY: the processor has the instruction; else the caller's promise.
            return unsafe { by_instruction(self) };
        }
        #[cfg(target_arch = "aarch64")]
        if has_pair_products() {
            // SAFETY: as above.
            return unsafe { self.tiles::<Instruction>() };
        }
        // SAFETY: the caller's promise.
        unsafe { f32::dispatch(self) }
    }

    /// # Safety
    /// As of [`dispatch`](Self::dispatch), and the processor must have `D`'s instructions.
    #[inline(always)]
    unsafe fn tiles<D: Pairs>(self) {
        let (p, steps) = (self.p, self.p.steps());
        let panel = Level::of::<D::S>().panel(p.n);
        let height = Level::of::<D::S>().rows(panel);
        let strips = Pieces::of(p.m, height);
        let mut k = 0;
        while k < steps {
            let count = STEPS.min(steps - k);
            let (beta, plus) = if k == 0 { (p.beta, self.plus) } else { (1.0, Plus::NOTHING) };
            for q in self.panels.clone() {
                let first = q * panel;
                let b = self.b.as_ptr().wrapping_add((q * steps + k) * panel);
                for i in self.strips.clone() {
                    let row = strips.start(i);
                    let (a, a_row, a_step) = match p.trans_a {
                        true => ((i * steps + k) * height, 1, height),
                        false => (row * steps + k, steps, 1),
                    };
                    let tile = Tile {
                        a: self.a.as_ptr().wrapping_add(a),
                        a_row,
                        a_step,
                        b,
                        b_step: panel,
                        steps: count,
                        to: Target::of(p, plus, self.c, row, first, panel, beta),
                    };
                    // SAFETY: the part lies inside the product; its operands are packed with whole panels.
                    unsafe {
                        tile_sizes!(strips.len(i), tile.to.lanes.div_ceil(D::S::LANES), D, run_tile(&tile))
                    }
                }
            }
            k += STEPS;
        }
    }
}

struct Tile<'a> {
    /// Pairs of one row are `a_step` apart, rows `a_row`.
    a: *const u32,
    a_row: usize,
    a_step: usize,
    b: *const u32,
    b_step: usize,
    steps: usize,
    to: Target<'a, f32>,
}

/// # Safety
/// `a` must be valid for `M` rows of `steps` pairs, `b` for as many rows of `N` vectors, the target for `M` rows.
#[inline(always)]
unsafe fn run_tile<D: Pairs, const M: usize, const N: usize>(t: &Tile) {
    // SAFETY: the caller's promise.
    unsafe {
        t.to.fetch::<D::S, M, N>();
        let mut acc: Acc<D::S, M, N> = [[D::S::splat(0.0); N]; M];
        let (mut a, mut b) = (t.a, t.b);
        for _ in 0..t.steps {
            for i in 0..M {
                let x = *a.add(i * t.a_row);
                for j in 0..N {
                    acc[i][j] = D::dot(x, b.add(j * D::S::LANES), acc[i][j]);
                }
            }
            a = a.wrapping_add(t.a_step);
            b = b.wrapping_add(t.b_step);
        }
        t.to.write::<D::S, M, N>(&acc);
    }
}
