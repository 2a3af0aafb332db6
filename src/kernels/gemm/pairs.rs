//! Products of bfloat16 pairs ([`pairs`](crate::kernels::pairs)): `C = alpha · op(A) · op(B) + beta · C` of operands rounded to
//! bfloat16, summed in `f32`.
//!
//! Two consecutive steps of the summed dimension are a pair. op(B) is packed in panels of a row of pairs a step; A in rows of
//! pairs, or, where it is read across its rows, in strips; register tiles as of `gemm` do the rest.
#![allow(clippy::needless_range_loop)]

pub(super) mod pack;

use std::ops::Range;

use super::blocks::{self, Blocks};
use super::tile::{Target, Tile, tile_run};
use super::{GAP, Plus, Product, SLOTS, TASKS, WORK};
use crate::kernels::half::{Elements, Half};
use crate::kernels::matrix::{BLOCK, SIDE, by_blocks};
use crate::kernels::pairs::{PairKernel, Pairs};
use crate::kernels::par::Shared;
use crate::kernels::simd::{Simd, Vectors};
use crate::kernels::tile::Pieces;
use crate::tile_sizes;

/// Multiply-adds that pay for packing.
const LEAST: usize = 1 << 18;
/// Pairs that are added up in registers before they are added to C.
const STEPS: usize = 512;
/// Multiply-adds worth a task of its own where blocks are multiplied.
pub(super) const BLOCKS_WORK: usize = 1 << 22;

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
}

impl Order {
    pub fn of<T: Vectors>(p: &Product<T>) -> Order {
        let steps = p.k.div_ceil(2);
        if by_blocks::<T>() {
            let packed = steps.next_multiple_of(SIDE);
            let (panel, lanes, height) = (BLOCK.min(p.n.next_multiple_of(SIDE)), SIDE, BLOCK);
            return Order { blocks: true, panel, lanes, height, steps, packed };
        }
        let (panel, height) = p.tile();
        let lanes = T::level().lanes;
        Order { blocks: false, panel, lanes, height, steps, packed: steps }
    }

    /// Pairs of a packed row of panel `q`.
    #[inline(always)]
    pub fn row<T>(&self, p: &Product<T>, q: usize) -> usize {
        self.panel.min(p.n - q * self.panel).next_multiple_of(self.lanes)
    }

    pub fn panels<T>(&self, p: &Product<T>) -> usize {
        p.n.div_ceil(self.panel)
    }

    /// Pieces of strips and of panels for the tasks of a product whose operands are packed.
    fn pieces<T: Vectors>(&self, p: &Product<T>) -> [usize; 2] {
        let worth = if self.blocks { BLOCKS_WORK } else { WORK };
        let tasks = if p.alone { 1 } else { (p.work() / worth).clamp(1, TASKS) };
        p.in_squares(tasks, self.strips(p).count, self.panels(p)).into()
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

    /// Numbers of 32 bits that A is packed in for tiles.
    fn a_pairs<T>(&self, p: &Product<T>) -> usize {
        if self.in_strips(p) { self.strips(p).count * self.strip() } else { p.m * self.steps }
    }

    /// Numbers of 32 bits of scratch that an A of this type takes.
    fn scratch<T: Vectors>(&self, p: &Product<T>, a: Option<Half>) -> usize {
        match () {
            _ if self.lies_in_pairs(p, a) => 0,
            _ if self.blocks => blocks::near(self, p) * SLOTS.min(blocks::pieces(self, p).iter().product()),
            _ => self.a_pairs(p),
        }
    }

    fn b_pairs<T>(&self, p: &Product<T>) -> usize {
        self.panels(p) * self.panel * self.packed
    }
}

/// Elements of B, packed by [`pack_pairs`].
pub(super) fn packed_pairs<T: Vectors>(p: &Product<T>) -> usize {
    Order::of(p).b_pairs(p)
}

/// Elements of scratch that [`gemm_pairs`] needs; `a`: which type of half precision A is of.
pub fn room_pairs<T: Vectors>(p: &Product<T>, a: Option<Half>) -> usize {
    let order = Order::of(p);
    order.scratch(p, a) + order.b_pairs(p)
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
    if p.m * p.n > 0 {
        whole_pairs(p, a, b, plus, &Shared::new(c), scratch);
    }
}

/// The callers have checked the extents.
pub(super) fn whole_pairs<T: Vectors>(
    p: &Product<T>,
    a: Elements<T>,
    b: Elements<T>,
    plus: Plus<T>,
    c: &Shared<T>,
    scratch: &mut [T],
) {
    let (packed, rest) = scratch.split_at_mut(packed_pairs(p));
    pack_pairs(p, b, packed);
    multiply_pairs(p, a, bytemuck::cast_slice(packed), plus, c, rest);
}

/// Packs B for [`multiply_pairs`].
pub(super) fn pack_pairs<T: Vectors>(p: &Product<T>, b: Elements<T>, packed: &mut [T]) {
    pack::columns(p, &Order::of(p), b, bytemuck::cast_slice_mut(packed));
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
    assert!(a.len() >= p.extents()[0] && b.len() >= order.b_pairs(p), "operands of a product");
    let scratch: &mut [u32] = bytemuck::cast_slice_mut(scratch);
    let lies = order.lies_in_pairs(p, a.half());
    let left = match () {
        _ if lies => Left::Pairs(a.address(0).cast(), p.lda / 2),
        _ if order.blocks => Left::Elements(a),
        _ => {
            pack::rows_or_strips(p, order, a, scratch);
            Left::Pairs(scratch.as_ptr(), order.steps)
        }
    };
    let near = if lies || !order.blocks { 0 } else { blocks::near(order, p) };
    let (strips, panels) = (order.strips(p).count, order.panels(p));
    let [rows, cols] = if near > 0 { blocks::pieces(order, p) } else { order.pieces(p) };
    let share = |i: usize, of: usize, total: usize| total * i / of..total * (i + 1) / of;
    let scratch = if near > 0 { scratch } else { &mut [] };
    super::tasks(rows * cols, near, scratch, |task, near| {
        let (strips, panels) = (share(task / cols, rows, strips), share(task % cols, cols, panels));
        let part = Part { p, order, a: &left, near, b, plus, c: c.ptr(), strips, panels };
        // SAFETY: the extents were checked; no two tasks share elements of C.
        unsafe {
            match order.blocks {
                true => T::dispatch_pairs(Blocks(part)),
                false => T::dispatch_pairs(part),
            }
        }
    });
}

/// A, as tasks find it.
pub(super) enum Left<'a, T> {
    /// Rows of so many pairs, or strips.
    Pairs(*const u32, usize),
    /// Each task packs what it multiplies next.
    Elements(Elements<'a, T>),
}

// SAFETY: the pairs are only read.
unsafe impl<T: Sync> Send for Left<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Left<'_, T> {}

/// Some strips and panels of one product whose B is packed.
pub(super) struct Part<'a, T> {
    pub p: &'a Product<T>,
    pub order: &'a Order,
    pub a: &'a Left<'a, T>,
    /// For what is packed.
    pub near: &'a mut [u32],
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
        let Left::Pairs(rows, in_row) = *self.a else { unreachable!("A is packed for tiles") };
        let (strips, steps, panel) = (order.strips(p), order.steps, order.panel);
        let mut k = 0;
        while k < steps {
            let count = STEPS.min(steps - k);
            let (beta, plus) = if k == 0 { (p.beta, self.plus) } else { (T::one(), Plus::NOTHING) };
            for q in self.panels.clone() {
                let (first, width) = (q * panel, order.row(p, q));
                let b = self.b.as_ptr().wrapping_add(q * steps * panel + k * width);
                for i in self.strips.clone() {
                    let row = strips.start(i);
                    let (a, lda) = match p.trans_a {
                        true => (i * order.strip() + k * order.height, order.height),
                        false => (row * in_row + k, in_row),
                    };
                    let tile = Tile {
                        across: p.trans_a,
                        a: rows.wrapping_add(a),
                        lda,
                        b,
                        ldb: None,
                        steps: count,
                        to: Target::of(p, plus, self.c, row, first, panel, beta),
                    };
                    // SAFETY: the part lies inside the product; its operands are packed.
                    unsafe { tile_sizes!(strips.len(i), width / D::S::LANES, D, tile_run(&tile)) }
                }
            }
            k += STEPS;
        }
    }
}
