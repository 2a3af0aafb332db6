//! Matrix registers: squares of 16 rows of 64 bytes, which one instruction (`tdpbf16ps` of Intel's AMX) multiplies.
//!
//! It takes up to 16 rows of up to 16 pairs of bfloat16 ([`pairs`](crate::kernels::pairs)) of A, as many rows of 16 columns' pairs of
//! B, and adds the products to 16 by 16 sums in `f32`: as much as 256 of the instructions that multiply vectors of pairs. Operands lie
//! in memory as vectors read them: A in rows of pairs, at any distance, B with a row of pairs a step. A block is of up to four squares,
//! two by two of them or all in a row or a column: one product's sums are there after about 52 cycles, while the next may begin
//! after 16, so that four keep the unit busy. They are written to the result, or left in memory for the vectors of whoever asked for
//! them.
//!
//! Elsewhere than on such processors the same sums are computed in plain arithmetic, which only tests ask for.
#![allow(unsafe_code, clippy::needless_range_loop)]

#[cfg(target_arch = "x86_64")]
mod instructions;

use std::marker::PhantomData;

use smallvec::SmallVec;

use crate::kernels::isa::multiplies_blocks;
use crate::kernels::simd::Vectors;

/// Rows and columns of a square, and the pairs of a row.
pub const SIDE: usize = 16;
/// Squares of a block.
pub const SQUARES: usize = 4;
/// Rows and columns of a block of two by two.
pub const BLOCK: usize = 2 * SIDE;

/// May this process use the processor's matrix registers, if it has them? (Linux wants to be asked: they make a thread's state
/// larger by 8 KiB.)
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(super) fn permitted() -> bool {
    use std::arch::x86_64::__cpuid_count;

    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    /// AMX-TILE and AMX-BF16.
    const FEATURES: u32 = 1 << 24 | 1 << 22;
    // (Leaf 7 is there where AVX-512 is, which the caller has asked for.)
    let features = __cpuid_count(7, 0).edx;
    // SAFETY: the call reads no memory of ours, and fails on systems that do not know it.
    features & FEATURES == FEATURES
        && unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) } == 0
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
pub(super) fn permitted() -> bool {
    false
}

/// Are sums of pairs of this type added up in blocks? Their squares are as wide as the vectors that read them.
pub fn by_blocks<T: Vectors>() -> bool {
    multiplies_blocks() && T::level().lanes == SIDE
}

/// Runs of steps of the summed dimension.
#[derive(Debug, Clone)]
pub struct Runs {
    /// What an instruction multiplies of a row: pairs, a divisor of each run.
    steps: usize,
    /// The last one is empty.
    runs: SmallVec<[Run; 32]>,
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Run {
    /// Where it begins in each row of A, in bytes.
    a: isize,
    /// Instructions.
    count: usize,
    /// Bytes of B between the run before and this one.
    b_skip: usize,
}

impl Run {
    const NONE: Run = Run { a: 0, count: 0, b_skip: 0 };
}

impl Runs {
    /// Runs `(offset, pairs)` of A, B's rows of which follow one another.
    pub fn of(runs: &[(isize, usize)]) -> Runs {
        let divides = |steps: &usize| runs.iter().all(|run| run.1.is_multiple_of(*steps));
        let steps = (1..=SIDE).rev().find(divides).unwrap_or(1);
        let filled = runs.iter().filter(|run| run.1 > 0);
        let each = filled.map(|&(offset, n)| Run { a: 4 * offset, count: n / steps, b_skip: 0 });
        Runs { steps, runs: each.chain([Run::NONE]).collect() }
    }

    /// `count` runs that follow one another in A, each of as many instructions of `steps` pairs, whose rows of B begin so many pairs
    /// after the first, in ascending order; `b_row`: pairs from one of its rows to the next.
    pub fn apart(
        count: usize,
        [instructions, steps]: [usize; 2],
        b_row: usize,
        b: impl Fn(usize) -> usize,
    ) -> Runs {
        assert!((1..=SIDE).contains(&steps), "steps of an instruction");
        let n = instructions * steps;
        let each = (0..if n == 0 { 0 } else { count }).map(|i| {
            let before = if i == 0 { 0 } else { b(i - 1) + n * b_row };
            Run { a: (4 * i * n) as isize, count: instructions, b_skip: 4 * (b(i) - before) }
        });
        Runs { steps, runs: each.chain([Run::NONE]).collect() }
    }
}

/// Memory for a block's sums, row by row.
#[repr(C, align(64))]
pub struct Sums(pub [f32; SQUARES * SIDE * SIDE]);

impl Default for Sums {
    fn default() -> Sums {
        Sums([0.0; SQUARES * SIDE * SIDE])
    }
}

impl Sums {
    /// For a block of so many squares of columns: the rows of one square after the other's.
    pub fn place(&mut self, columns: usize) -> Place {
        let (to, row) = (self.0.as_mut_ptr(), columns * SIDE);
        Place { to: std::array::from_fn(|i| to.wrapping_add(i * SIDE * row)), row, add: false }
    }
}

/// Where a block's sums go: memory of the sums' own, or the result itself.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// The first row of each square of rows, and elements from a row to the next.
    pub to: [*mut f32; SQUARES],
    pub row: usize,
    /// They are added to what is there.
    pub add: bool,
}

/// A block's operands, and where its sums go.
#[derive(Debug, Clone, Copy)]
pub struct Block {
    /// The first row of each square of rows of A, and pairs from a row to the next.
    pub a: [*const u32; SQUARES],
    pub a_row: usize,
    /// Columns' pairs of the first step, and from a step to the next.
    pub b: *const u32,
    pub b_row: usize,
    /// Squares of rows and of columns: two by two at most, or [`SQUARES`] by one, or one by as many.
    pub rows: usize,
    pub columns: usize,
    pub place: Place,
    pub ahead: Ahead,
}

/// Rows that are fetched while a block is multiplied, two lines of each, or one where the block has one square of columns: those
/// that the next one will write. Registers that are written to memory do not look like a stream to the processor.
#[derive(Debug, Clone, Copy)]
#[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "plain arithmetic fetches nothing"))]
pub struct Ahead {
    /// (Fetching is allowed anywhere.)
    from: *const f32,
    /// Bytes from a row to the next.
    row: usize,
}

impl Ahead {
    pub fn rows(from: *const f32, row: usize) -> Ahead {
        Ahead { from, row: size_of::<f32>() * row }
    }

    /// Nothing that is not near.
    pub fn nothing(b: *const u32) -> Ahead {
        Ahead { from: b.cast(), row: 0 }
    }
}

/// The registers, set up for squares of A of some rows and steps, as long as this lives.
pub struct Registers<'a> {
    rows: usize,
    runs: &'a Runs,
    /// They are the thread's.
    here: PhantomData<*const ()>,
}

/// What the registers are told of their shapes.
#[cfg(target_arch = "x86_64")]
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start: u8,
    zeros: [u8; 14],
    bytes: [u16; 16],
    rows: [u8; 16],
}

impl<'a> Registers<'a> {
    /// For squares of `rows` rows.
    pub fn new(rows: usize, runs: &'a Runs) -> Self {
        assert!((1..=SIDE).contains(&rows), "rows of a square");
        #[cfg(target_arch = "x86_64")]
        if super::isa::has_matrix_products() {
            let mut shapes = Shapes { palette: 1, start: 0, zeros: [0; 14], bytes: [0; 16], rows: [0; 16] };
            for i in 0..8 {
                let (height, pairs) = match i {
                    0..4 => (rows, SIDE),
                    4..6 => (rows, runs.steps),
                    _ => (runs.steps, SIDE),
                };
                (shapes.rows[i], shapes.bytes[i]) = (height as u8, 4 * pairs as u16);
            }
            // SAFETY: the processor has the registers; the shapes are within a square.
            unsafe { std::arch::asm!("ldtilecfg [{}]", in(reg) &shapes, options(nostack, readonly)) }
        }
        Registers { rows, runs, here: PhantomData }
    }

    /// The sums of a block over all runs.
    ///
    /// # Safety
    /// Of each square of A the rows must be valid at all runs' pairs, and `b` for as many rows of the block's columns as there are
    /// steps in all runs. Of each square of rows the place must have the rows, each of the block's whole squares of columns.
    #[inline]
    pub unsafe fn multiply(&self, block: &Block) {
        #[cfg(target_arch = "x86_64")]
        if super::isa::has_matrix_products() {
            // SAFETY: the caller's promise; the registers are set up.
            return unsafe { instructions::multiply(self.runs, block) };
        }
        // SAFETY: the caller's promise.
        unsafe { plainly(self.rows, self.runs, block) }
    }
}

impl Drop for Registers<'_> {
    fn drop(&mut self) {
        #[cfg(target_arch = "x86_64")]
        if super::isa::has_matrix_products() {
            // SAFETY: the processor has the registers, and nobody reads them any more.
            unsafe { std::arch::asm!("tilerelease", options(nostack, nomem)) }
        }
    }
}

/// The same bits but for numbers below the normal ones, which the registers take for zeros.
///
/// # Safety
/// As of [`Registers::multiply`].
unsafe fn plainly(rows: usize, runs: &Runs, block: &Block) {
    let half = |pair: u32, nth: u32| f32::from_bits(if nth == 0 { pair << 16 } else { pair & 0xFFFF_0000 });
    for (i, j) in (0..block.rows * rows).flat_map(|i| (0..block.columns * SIDE).map(move |j| (i, j))) {
        let (square, row) = (i / rows, i % rows);
        let to = block.place.to[square].wrapping_add(row * block.place.row + j);
        // SAFETY: the caller's promise.
        let (mut b, mut sum) = (block.b.wrapping_add(j), if block.place.add { unsafe { *to } } else { 0.0 });
        for run in &runs.runs {
            let a = block.a[square].wrapping_add(row * block.a_row).wrapping_byte_offset(run.a);
            b = b.wrapping_byte_add(run.b_skip);
            for first in (0..run.count).map(|i| i * runs.steps) {
                let mut terms = [0.0; 2];
                for k in first..first + runs.steps {
                    // SAFETY: the caller's promise.
                    let (a, pair) = unsafe { (a.add(k).read_unaligned(), b.read_unaligned()) };
                    for (nth, term) in (0..).zip(&mut terms) {
                        *term += half(a, nth) * half(pair, nth);
                    }
                    b = b.wrapping_add(block.b_row);
                }
                sum += terms[0] + terms[1];
            }
        }
        // SAFETY: the caller's promise.
        unsafe { *to = sum }
    }
}

/// Squares of `total` rows: where one begins, and how many of its rows belong to the one before it. Where there are fewer rows
/// than a square has, all squares have as many.
pub fn square(i: usize, total: usize) -> (usize, usize) {
    let start = (i * SIDE).min(total.saturating_sub(SIDE));
    (start, i * SIDE - start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::isa::has_matrix_products;
    use crate::kernels::pairs::pair;

    /// Both ways give the same bits, whatever the block's size, rows and steps.
    #[test]
    fn blocks_are_sums_of_products() {
        if !has_matrix_products() {
            println!("skipped: this processor has no matrix registers");
            return;
        }
        let value = |i: usize| (i as f32 * 0.71).sin();
        let some = |n: usize, from: usize| -> Vec<u32> {
            (0..n).map(|i| pair([value(2 * i + from), value(2 * i + from + 1)])).collect()
        };
        let (a, b) = (some(7000, 0), some(7000, 77));
        for rows in [1, 7, 16] {
            let near = [&[(0, 16)][..], &[(0, 24), (60, 12), (5, 36)], &[(3, 7)], &[(0, 32), (9, 32)], &[]];
            let apart = Runs::apart(3, [2, 7], 67, |i| 5 + i * 1100);
            for runs in near.into_iter().map(Runs::of).chain([apart]) {
                for (r, c) in [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (3, 1), (4, 1), (2, 2)] {
                    let (a, b) = (a.as_ptr(), b.as_ptr());
                    let a = std::array::from_fn(|i| a.wrapping_add(i * rows * 100 + i));
                    let (mut fast, mut plain) = (Sums::default(), Sums::default());
                    let place = fast.place(c);
                    let ahead = Ahead::nothing(b);
                    let block = Block { a, a_row: 100, b, b_row: 67, rows: r, columns: c, place, ahead };
                    let registers = Registers::new(rows, &runs);
                    for add in [false, true] {
                        // SAFETY: the operands are long enough.
                        unsafe {
                            registers.multiply(&Block { place: Place { add, ..block.place }, ..block });
                            let place = Place { add, ..plain.place(c) };
                            plainly(rows, &runs, &Block { place, ..block });
                        }
                        assert_eq!(fast.0, plain.0, "{rows} rows, {r} by {c} squares of {runs:?}");
                    }
                }
            }
        }
    }
}
