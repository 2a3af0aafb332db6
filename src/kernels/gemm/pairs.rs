//! Products of bfloat16 pairs ([`pairs`](crate::kernels::pairs)): `C = alpha · op(A) · op(B) + beta · C` of operands rounded to
//! bfloat16, summed in `f32`.
//!
//! Two consecutive steps of the summed dimension are a pair. op(B) is packed in panels of a row of pairs a step; A in rows of
//! pairs, or, where it is read across its rows, in strips; register tiles as of `gemm` do the rest.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use rayon::prelude::*;

use super::blocks::Blocks;
use super::tile::{Target, Tiles, tiles_run};
use super::{GAP, Plus, Product, TASKS, WORK};
use crate::kernels::half::{Elements, Half};
use crate::kernels::matrix::{BLOCK, SIDE, by_blocks};
use crate::kernels::pairs::{PairKernel, Pairs, across, both, in_strips, neighbours};
use crate::kernels::par::Shared;
use crate::kernels::simd::{Simd, Vectors, WIDEST};
use crate::kernels::tile::Pieces;
use crate::tile_sizes;

/// Multiply-adds that pay for packing.
const LEAST: usize = 1 << 18;
/// Pairs that are added up in registers before they are added to C.
const STEPS: usize = 512;
/// Rows of A that are packed by a task.
const ROWS: usize = 64;
/// Steps that are packed by a task: some squares of them.
const STEPS_AT_ONCE: usize = 32;
/// Rows of A that are few, and elements of B that are then packed at a time: what takes little memory besides, and stays in the
/// cache.
const FEW: usize = 256;
const AT_ONCE: usize = 1 << 17;
/// Multiply-adds worth a task of its own where blocks are multiplied.
const BLOCKS_WORK: usize = 1 << 22;
/// Elements that rows which are turned are fetched ahead: there are too many of them for the processor to see streams.
const AHEAD: usize = 64;

impl<T: Vectors> Product<T> {
    /// Is the product large enough for [`gemm_pairs`]?
    pub fn suits_pairs(&self) -> bool {
        !self.is_vector() && self.work() >= LEAST && self.k > 1
    }
}

/// In which order a product's operands are multiplied, and of what size its tiles are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Order {
    /// By matrix registers ([`blocks`](super::blocks)): A is in rows then, whichever way it lies.
    pub blocks: bool,
    /// Columns of a panel, whose packed rows are of whole vectors, and rows of a strip.
    pub panel: usize,
    pub lanes: usize,
    pub height: usize,
    /// Pairs of the summed dimension, and those of a packed row of A or column of B: zeros fill them.
    pub steps: usize,
    pub packed: usize,
    /// Pairs from a packed row of A to the next.
    pub a_row: usize,
}

impl Order {
    pub fn of<T: Vectors>(p: &Product<T>) -> Order {
        let steps = p.k.div_ceil(2);
        if by_blocks::<T>() {
            let packed = steps.next_multiple_of(SIDE);
            let (panel, lanes, height) = (BLOCK.min(p.n.next_multiple_of(SIDE)), SIDE, BLOCK);
            // (Rows that are a power of two apart would share the same few lines of the cache.)
            let a_row = if packed.is_multiple_of(8 * SIDE) { packed + SIDE } else { packed };
            return Order { blocks: true, panel, lanes, height, steps, packed, a_row };
        }
        let (panel, height) = p.tile();
        let lanes = T::level().lanes;
        Order { blocks: false, panel, lanes, height, steps, packed: steps, a_row: steps }
    }

    /// Pairs of a packed row of panel `q`.
    #[inline(always)]
    pub fn row<T>(&self, p: &Product<T>, q: usize) -> usize {
        self.panel.min(p.n - q * self.panel).next_multiple_of(self.lanes)
    }

    fn panels<T>(&self, p: &Product<T>) -> usize {
        p.n.div_ceil(self.panel)
    }

    pub fn strips<T>(&self, p: &Product<T>) -> Pieces {
        if self.blocks { Pieces::by(p.m, self.height) } else { Pieces::of(p.m, self.height) }
    }

    /// Is A packed in strips?
    fn in_strips<T>(&self, p: &Product<T>) -> bool {
        p.trans_a && !self.blocks
    }

    /// From one strip of A to the next.
    fn strip(&self) -> usize {
        self.height * self.steps + GAP
    }

    /// Are rows of an A of this type rows of pairs as they lie?
    fn lies_in_pairs<T>(&self, p: &Product<T>, a: Option<Half>) -> bool {
        let even = p.k.is_multiple_of(2) && p.lda.is_multiple_of(2) && self.packed == self.steps;
        !p.trans_a && even && a == Some(Half::Bf16) && cfg!(target_endian = "little")
    }

    /// Numbers of 32 bits that A is packed in.
    fn a_pairs<T>(&self, p: &Product<T>, a: Option<Half>) -> usize {
        match () {
            _ if self.lies_in_pairs(p, a) => 0,
            _ if self.in_strips(p) => self.strips(p).count * self.strip(),
            _ => p.m * self.a_row,
        }
    }

    fn b_pairs<T>(&self, p: &Product<T>) -> usize {
        self.panels(p) * self.panel * self.packed
    }

    /// Columns of B that are packed at a time: all, unless few rows of A would wait for that much.
    fn columns<T>(&self, p: &Product<T>) -> usize {
        let panels = AT_ONCE / (2 * self.panel * self.packed).max(1);
        if p.m > FEW { p.n } else { p.n.min(panels.max(1) * self.panel) }
    }
}

/// Elements of B, packed by [`pack_pairs`].
pub(super) fn packed_pairs<T: Vectors>(p: &Product<T>) -> usize {
    Order::of(p).b_pairs(p)
}

/// Elements of scratch that [`gemm_pairs`] needs; `a`: which type of half precision A is of.
pub fn room_pairs<T: Vectors>(p: &Product<T>, a: Option<Half>) -> usize {
    let order = Order::of(p);
    order.a_pairs(p, a) + order.b_pairs(&Product { n: order.columns(p), ..*p })
}

/// Elements of scratch that [`multiply_pairs`] needs.
pub(super) fn room_by_packed_pairs<T: Vectors>(p: &Product<T>) -> usize {
    Order::of(p).a_pairs(p, None)
}

/// As [`gemm`](super::gemm), of operands rounded to bfloat16, with something added.
pub fn gemm_pairs<T: Vectors>(
    p: &Product<T>,
    a: Elements<T>,
    b: Elements<T>,
    plus: Plus<T>,
    c: &mut [T],
    scratch: &mut [T],
) {
    p.check([a.len(), b.len(), c.len()], &plus);
    if p.m * p.n == 0 {
        return;
    }
    divided_pairs(p, a, b, plus, &Shared::new(c), scratch);
}

/// The same; the callers have checked the extents.
pub(super) fn divided_pairs<T: Vectors>(
    p: &Product<T>,
    a: Elements<T>,
    b: Elements<T>,
    plus: Plus<T>,
    c: &Shared<T>,
    scratch: &mut [T],
) {
    let order = &Order::of(p);
    let columns = order.columns(p);
    let (packed, rest) = scratch.split_at_mut(order.b_pairs(&Product { n: columns, ..*p }));
    let packed: &mut [u32] = bytemuck::cast_slice_mut(packed);
    let a = rows(p, order, a, rest);
    for first in (0..p.n).step_by(columns) {
        let p = &Product { n: columns.min(p.n - first), ..*p };
        pack_panels(p, order, b.from(if p.trans_b { first * p.ldb } else { first }), packed);
        // SAFETY: C has the columns, and nobody else uses them.
        let c = unsafe { Shared::at(c.ptr().add(first)) };
        multiply_packed(p, order, &a, packed, plus.from(first), &c);
    }
}

/// By a packed B; the callers have checked the other extents.
pub(super) fn multiply_pairs<T: Vectors>(
    p: &Product<T>,
    a: Elements<T>,
    b: &[u32],
    plus: Plus<T>,
    c: &Shared<T>,
    scratch: &mut [T],
) {
    let order = &Order::of(p);
    let a = rows(p, order, a, scratch);
    multiply_packed(p, order, &a, b, plus, c);
}

/// A as rows of pairs or in strips: as it lies, or packed into `scratch`.
fn rows<T: Vectors>(p: &Product<T>, order: &Order, a: Elements<T>, scratch: &mut [T]) -> Rows {
    match order.lies_in_pairs(p, a.half()) {
        true => Rows { a: a.address(0).cast::<u32>(), lda: p.lda / 2 },
        false => {
            let scratch: &mut [u32] = bytemuck::cast_slice_mut(scratch);
            let out = &mut scratch[..order.a_pairs(p, None)];
            pack_a(p, order, a, out);
            Rows { a: out.as_ptr(), lda: order.a_row }
        }
    }
}

fn multiply_packed<T: Vectors>(
    p: &Product<T>,
    order: &Order,
    a: &Rows,
    b: &[u32],
    plus: Plus<T>,
    c: &Shared<T>,
) {
    assert!(b.len() >= order.b_pairs(p), "operands of a product");
    let (strips, panels) = (order.strips(p).count, order.panels(p));
    let worth = if order.blocks { BLOCKS_WORK } else { WORK };
    let tasks = if p.alone { 1 } else { (p.work() / worth).clamp(1, TASKS) };
    let (rows, cols) = p.in_squares(tasks, strips, panels);
    let share = |i: usize, of: usize, total: usize| total * i / of..total * (i + 1) / of;
    super::tasks::<T>(rows * cols, false, 0, &mut [], |task, _| {
        let (strips, panels) = (share(task / cols, rows, strips), share(task % cols, cols, panels));
        let part = Part { p, order, a, b, plus, c: c.ptr(), strips, panels };
        // SAFETY: the extents were checked; no two tasks share elements of C.
        unsafe {
            match order.blocks {
                true => T::dispatch_pairs(Blocks(part)),
                false => T::dispatch_pairs(part),
            }
        }
    });
}

/// Tasks that pack, by several threads or by this one.
fn each<T>(p: &Product<T>, count: usize, run: impl Fn(usize) + Send + Sync) {
    match p.alone {
        true => (0..count).for_each(run),
        false => (0..count).into_par_iter().for_each(run),
    }
}

/// Packs B: a panel of op(B) is, for each step, its columns' pairs in whole vectors. In pieces such that B is read in
/// order.
pub(super) fn pack_pairs<T: Vectors>(p: &Product<T>, b: Elements<T>, out: &mut [u32]) {
    pack_panels(p, &Order::of(p), b, out);
}

fn pack_panels<T: Vectors>(p: &Product<T>, order: &Order, b: Elements<T>, out: &mut [u32]) {
    assert!(b.len() >= p.extents()[1] && out.len() >= order.b_pairs(p), "operands of a product");
    let (out, count) = (Shared::new(out), order.panels(p));
    let blocks = if p.trans_b { count } else { order.packed.div_ceil(STEPS_AT_ONCE) };
    each(p, blocks, |i| {
        let (panels, steps) = match p.trans_b {
            true => (i..i + 1, 0..order.packed),
            false => (0..count, i * STEPS_AT_ONCE..order.packed.min((i + 1) * STEPS_AT_ONCE)),
        };
        // SAFETY: lengths were checked; each task writes its own panels or steps.
        unsafe { T::dispatch_pairs(Panels { p, order, b, panels, steps, out: out.ptr() }) }
    });
}

/// A's rows as rows of pairs; of an A that is read across its rows, strips as B's panels, unless blocks are multiplied.
fn pack_a<T: Vectors>(p: &Product<T>, order: &Order, a: Elements<T>, out: &mut [u32]) {
    assert!(a.len() >= p.extents()[0], "operands of a product");
    let shared = Shared::new(out);
    if p.trans_a {
        return each(p, order.packed.div_ceil(STEPS_AT_ONCE), |block| {
            let steps = block * STEPS_AT_ONCE..order.packed.min((block + 1) * STEPS_AT_ONCE);
            let out = shared.ptr();
            // SAFETY: A's length was checked; each task writes its own steps.
            unsafe {
                match order.blocks {
                    true => T::dispatch_pairs(Turned { p, order, a, steps, out }),
                    false => T::dispatch_pairs(Strips { p, order, a, steps, out }),
                }
            }
        });
    }
    each(p, p.m.div_ceil(ROWS), |block| {
        let rows = block * ROWS..p.m.min((block + 1) * ROWS);
        // SAFETY: A's length was checked; each task writes its own rows.
        unsafe { T::dispatch_pairs(PackRows { p, order, a, rows, out: shared.ptr() }) }
    });
}

struct Panels<'a, T> {
    p: &'a Product<T>,
    order: &'a Order,
    b: Elements<'a, T>,
    panels: Range<usize>,
    steps: Range<usize>,
    /// Of all panels, with all steps.
    out: *mut u32,
}

impl<T: Vectors> PairKernel<T> for Panels<'_, T> {
    #[inline(always)]
    unsafe fn run<D: Pairs<S: Simd<Elem = T>>>(self) {
        let Panels { p, order, b, panels, steps, out } = self;
        let panel = order.panel;
        let of = |q: usize| {
            let cols = panel.min(p.n - q * panel);
            (q * panel, cols, order.row(p, q), out.wrapping_add(q * order.packed * panel))
        };
        // SAFETY: rows and columns of op(B), all of which B has; a panel has as many rows as there are steps.
        unsafe {
            if p.trans_b {
                for q in panels {
                    let (first, cols, row, out) = of(q);
                    transposed::<D>(p, order, b, first, cols, row, out);
                }
                return;
            }
            for step in steps {
                for q in panels.clone() {
                    let (first, cols, row, out) = of(q);
                    let (to, cols) = (out.add(step * row), if step < order.steps { cols } else { 0 });
                    if cols > 0 {
                        across::<D>(b, both(step, p.k, first, p.ldb), cols, to);
                    }
                    std::slice::from_raw_parts_mut(to.add(cols), row - cols).fill(0);
                }
            }
        }
    }
}

/// A panel of a transposed B, from column `first` on: squares of pairs are transposed in registers.
///
/// # Safety
/// B must have the columns, `out` room for a row of `row` pairs a step, and `D`'s instructions be there.
#[inline(always)]
unsafe fn transposed<D: Pairs<S: Simd<Elem: Vectors>>>(
    p: &Product<<D::S as Simd>::Elem>,
    order: &Order,
    b: Elements<<D::S as Simd>::Elem>,
    first: usize,
    cols: usize,
    row: usize,
    out: *mut u32,
) {
    let lanes = D::S::LANES;
    let mut square = [0u32; WIDEST * WIDEST];
    // SAFETY: the caller's promise.
    unsafe {
        if cols < row {
            std::slice::from_raw_parts_mut(out, order.packed * row).fill(0);
        }
        let (filled, rest) = (order.steps * row, (order.packed - order.steps) * row);
        std::slice::from_raw_parts_mut(out.add(filled), rest).fill(0);
        for step in (0..order.steps).step_by(lanes) {
            let steps = lanes.min(order.steps - step);
            let elements = (2 * steps).min(p.k - 2 * step);
            for col in (0..cols).step_by(lanes) {
                let count = lanes.min(cols - col);
                for i in 0..count {
                    let at = (first + col + i) * p.ldb + 2 * step;
                    neighbours::<D>(b, at, elements, square.as_mut_ptr().add(i * lanes));
                }
                let to = out.add(step * row + col);
                if steps == lanes && count == lanes {
                    D::S::transpose(square.as_ptr().cast(), lanes, to.cast(), row);
                    continue;
                }
                for k in 0..steps {
                    for i in 0..count {
                        *to.add(k * row + i) = square[i * lanes + k];
                    }
                }
            }
        }
    }
}

struct PackRows<'a, T> {
    p: &'a Product<T>,
    order: &'a Order,
    a: Elements<'a, T>,
    rows: Range<usize>,
    /// Of all rows.
    out: *mut u32,
}

impl<T: Vectors> PairKernel<T> for PackRows<'_, T> {
    #[inline(always)]
    unsafe fn run<D: Pairs<S: Simd<Elem = T>>>(self) {
        let PackRows { p, order, a, rows, out } = self;
        for i in rows {
            // SAFETY: a row's elements, which A has, and its pairs.
            unsafe {
                let to = out.add(i * order.a_row);
                neighbours::<D>(a, i * p.lda, p.k, to);
                std::slice::from_raw_parts_mut(to.add(order.steps), order.packed - order.steps).fill(0);
            }
        }
    }
}

struct Strips<'a, T> {
    p: &'a Product<T>,
    order: &'a Order,
    a: Elements<'a, T>,
    steps: Range<usize>,
    /// Of all strips, with all steps.
    out: *mut u32,
}

impl<T: Vectors> PairKernel<T> for Strips<'_, T> {
    #[inline(always)]
    unsafe fn run<D: Pairs<S: Simd<Elem = T>>>(self) {
        let Strips { p, order, a, steps, out } = self;
        let strips = order.strips(p);
        for step in steps.clone() {
            let exact = step + 1 == steps.end;
            // SAFETY: the step's rows of A, which A has, and the strips' place for them.
            unsafe {
                let to = out.add(step * order.height);
                let rows = both(step, p.k, 0, p.lda);
                in_strips::<D>(a, rows, &strips, 0..strips.count, order.strip(), [1, 0], exact, to);
            }
        }
    }
}

/// An A that lies across its rows, in rows: squares of pairs are transposed in registers.
struct Turned<'a, T> {
    p: &'a Product<T>,
    order: &'a Order,
    a: Elements<'a, T>,
    /// Whole vectors' lanes of them.
    steps: Range<usize>,
    /// Of all rows, with all steps.
    out: *mut u32,
}

impl<T: Vectors> PairKernel<T> for Turned<'_, T> {
    #[inline(always)]
    unsafe fn run<D: Pairs<S: Simd<Elem = T>>>(self) {
        let Turned { p, order, a, steps, out } = self;
        let lanes = D::S::LANES;
        let mut square = [0u32; WIDEST * WIDEST];
        for first in steps.step_by(lanes) {
            for row in (0..p.m).step_by(lanes) {
                let rows = lanes.min(p.m - row);
                // SAFETY: pairs of rows of A, which A has, and the rows' place for them.
                unsafe {
                    for k in 0..lanes {
                        let to = square.as_mut_ptr().add(k * lanes);
                        if first + k >= order.steps {
                            std::slice::from_raw_parts_mut(to, lanes).fill(0);
                            continue;
                        }
                        let starts = both(first + k, p.k, row, p.lda);
                        for start in starts.into_iter().flatten() {
                            D::S::prefetch(a.address(start + AHEAD));
                        }
                        across::<D>(a, starts, rows, to);
                    }
                    let to = out.add(row * order.a_row + first);
                    if rows == lanes {
                        D::S::transpose(square.as_ptr().cast(), lanes, to.cast(), order.a_row);
                        continue;
                    }
                    for i in 0..rows {
                        for k in 0..lanes {
                            *to.add(i * order.a_row + k) = square[k * lanes + i];
                        }
                    }
                }
            }
        }
    }
}

/// A's rows of pairs, at any address, or its strips.
pub(super) struct Rows {
    pub a: *const u32,
    pub lda: usize,
}

// SAFETY: the pairs are only read.
unsafe impl Send for Rows {}
// SAFETY: as above.
unsafe impl Sync for Rows {}

/// Some strips and panels of one product whose operands are packed.
pub(super) struct Part<'a, T> {
    pub p: &'a Product<T>,
    pub order: &'a Order,
    pub a: &'a Rows,
    pub b: &'a [u32],
    pub plus: Plus<'a, T>,
    pub c: *mut T,
    pub strips: Range<usize>,
    pub panels: Range<usize>,
}

impl<T: Vectors> PairKernel<T> for Part<'_, T> {
    #[inline(always)]
    unsafe fn run<D: Pairs<S: Simd<Elem = T>>>(self) {
        let (p, order) = (self.p, self.order);
        let (strips, steps, panel) = (order.strips(p), order.steps, order.panel);
        let mut k = 0;
        while k < steps {
            let taken = STEPS.min(steps - k);
            let (beta, plus) = if k == 0 { (p.beta, self.plus) } else { (T::one(), Plus::NOTHING) };
            for q in self.panels.clone() {
                let (first, width) = (q * panel, order.row(p, q));
                let b = self.b.as_ptr().wrapping_add(q * steps * panel + k * width);
                let mut i = self.strips.start;
                while i < self.strips.end {
                    let (row, m) = (strips.start(i), strips.len(i));
                    let count = strips.alike(i).min(self.strips.end - i);
                    let (a, a_tile, lda) = match p.trans_a {
                        true => (i * order.strip() + k * order.height, order.strip(), order.height),
                        false => (row * self.a.lda + k, m * self.a.lda, self.a.lda),
                    };
                    let tiles = Tiles {
                        count,
                        across: p.trans_a,
                        a: self.a.a.wrapping_add(a),
                        a_tile,
                        lda,
                        b,
                        ldb: None,
                        steps: taken,
                        to: Target::of(p, plus, self.c, row, first, panel, beta),
                    };
                    // SAFETY: the part lies inside the product; its operands are packed.
                    unsafe { tile_sizes!(m, width / D::S::LANES, D, tiles_run(&tiles)) }
                    i += count;
                }
            }
            k += STEPS;
        }
    }
}
