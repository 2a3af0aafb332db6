//! The weight gradient: `dW = Gᵀ·[Σ_tiles (Bᵀ·X·B) ⊙ (A·dY·Aᵀ)]·G`, the transpose of the forward pass.
//!
//! Each of the 36 sums is a matrix product of transformed inputs and gradients over the tiles. Where sums are small,
//! the tiles are divided into slabs with sums of their own, by the sizes alone, which are added in order. Where they
//! are large, all tiles are transformed first; then each task sums up a block of input channels of a panel, which it
//! transforms to taps and puts in order while they are near.
#![allow(unsafe_code, clippy::needless_range_loop)]

use std::ops::Range;

use rayon::prelude::*;

use super::few::{each, each_tasks};
use super::source::{Source, room, transform};
use super::transform::{Gradients, IN, Inputs, OUT, PRODUCTS, weight_grad_tile};
use super::{TAPS, Tiles, Transformed};
use crate::kernels::ahead::Steps;
use crate::kernels::conv::weight::{Outputs, in_order};
use crate::kernels::conv::{Geometry, in_slots, slots};
use crate::kernels::half::Elements;
use crate::kernels::par::Shared;
use crate::kernels::simd::{Kernel, Simd, Vectors};
use crate::kernels::tile::{Form, Pieces, Positions, TermKernel, Terms, along_columns, put};
use crate::tile_sizes;

/// Elements of a task's transformed tiles, and terms of a sum that it adds up at least.
const CHUNK: usize = 1 << 16;
const LEAST: usize = 24;
/// Elements of all slabs' sums together. (Beside products of pairs, to transform inputs for each of several panels' tasks takes
/// longer than to add up more slabs.)
const SUMS: usize = 3 << 17;
const SUMS_OF_PAIRS: usize = 9 << 17;
const TASKS: usize = 8;
/// Output channels of a task for the sake of which its inputs are transformed once.
const TOGETHER: usize = 128;
/// Elements of all tiles, transformed, that stay in the last-level cache, and input channels (of whole vectors) whose sums do in
/// the second.
const NEAR: usize = 3 << 20;
const BLOCK: usize = 32;
/// Sums that are many.
const MANY: usize = 1 << 17;

struct Division {
    tiles: Tiles,
    slabs: Pieces,
    /// Tiles that are transformed at a time.
    chunk: usize,
    /// Panels of output channels of all, and of each task.
    all: usize,
    panels: usize,
}

impl Division {
    fn new(g: &Geometry, each: usize, panel: usize) -> Division {
        let tiles = Tiles::of(g.n, g.y);
        let all = g.oc.div_ceil(panel);
        let size = PRODUCTS * g.c * all * panel;
        let most = if each > 1 { SUMS_OF_PAIRS } else { SUMS };
        let slabs = (most / size).clamp(1, TASKS.min(tiles.total.div_ceil(8)));
        let slabs = Pieces::of(tiles.total, tiles.total.div_ceil(slabs));
        let groups = (TASKS / slabs.count).clamp(1, all);
        // (By the sizes alone: sums are added up chunk by chunk.)
        let chunk = each * CHUNK / (PRODUCTS * (g.c + all.div_ceil(groups) * panel));
        let chunk = chunk.clamp(LEAST * each, 128).min(slabs.len(0));
        // Each group of panels transforms the inputs anew: no more groups than give every thread a task.
        let threads = rayon::current_num_threads().div_ceil(slabs.count);
        let panels = all.div_ceil(groups.min(threads.max((all * panel).div_ceil(TOGETHER))));
        Division { tiles, slabs, chunk, all, panels }
    }

    fn groups(&self) -> usize {
        self.all.div_ceil(self.panels)
    }

    /// Transformed inputs and gradients of a chunk, in terms of `each` tiles.
    fn layouts(&self, g: &Geometry, each: usize, panel: usize) -> [Transformed; 2] {
        let (terms, lanes) = (self.chunk.div_ceil(each), panel / 2);
        [
            Transformed::new(terms, g.c, lanes),
            Transformed::new(terms, (self.panels * panel).min(g.oc.next_multiple_of(panel)), lanes),
        ]
    }

    fn slot(&self, g: &Geometry, each: usize, panel: usize, half: [bool; 2]) -> usize {
        let [x, dy] = self.layouts(g, each, panel);
        x.size() + dy.size() + g.c.max(g.oc) + near(g, half).iter().sum::<usize>()
    }

    /// Elements of one slab's sums: (panels, products, C, panel).
    fn size(&self, g: &Geometry, panel: usize) -> usize {
        self.all * PRODUCTS * g.c * panel
    }
}

struct Task<'a, E, T> {
    g: &'a Geometry,
    of: Tiles,
    tiles: Range<usize>,
    chunk: usize,
    panels: Range<usize>,
    x: Source<'a, T>,
    dy: Source<'a, T>,
    layouts: [Transformed; 2],
    x_transformed: *mut E,
    dy_transformed: *mut E,
    sums: *mut T,
}

impl<E: Form<T>, T: Vectors> TermKernel<E, T> for Task<'_, E, T> {
    #[inline(always)]
    unsafe fn run<D: Terms<Term = E, S: Simd<Elem = T>>>(mut self) {
        let panel = 2 * D::S::LANES;
        let [x, dy] = self.layouts;
        let (c, oc) = (self.g.c, self.g.oc);
        let first = self.panels.start * panel;
        let last = oc.min(self.panels.end * panel);
        let mut start = self.tiles.start;
        while start < self.tiles.end {
            let tiles = start..self.tiles.end.min(start + self.chunk);
            // SAFETY: the buffers have the layouts' sizes; the sums' elements are this task's.
            unsafe {
                let (of, of_dy, some) = (&self.of, first..last, tiles.clone());
                let (to_x, to_dy) = (self.x_transformed, self.dy_transformed);
                transform::<D, Inputs, IN, false>(of, some.clone(), &mut self.x, 0..c, &x, to_x);
                transform::<D, Gradients, OUT, false>(of, some, &mut self.dy, of_dy, &dy, to_dy);
                for p in self.panels.clone() {
                    let sum = Sum {
                        terms: tiles.len().div_ceil(E::EACH),
                        x: to_x.cast_const(),
                        x_layout: x,
                        channels: c,
                        dy: to_dy.add(p * panel - first).cast_const(),
                        dy_layout: dy,
                        vectors: if oc - p * panel > D::S::LANES { 2 } else { 1 },
                        to: self.sums.add(p * PRODUCTS * c * panel),
                        add: start > self.tiles.start,
                    };
                    sum.run::<D>();
                }
            }
            start = tiles.end;
        }
    }
}

/// All products of some tiles' inputs with one panel of their gradients, summed over the tiles.
struct Sum<E, T> {
    /// Of tiles.
    terms: usize,
    x: *const E,
    x_layout: Transformed,
    channels: usize,
    dy: *const E,
    dy_layout: Transformed,
    /// Vectors of the panel that are needed.
    vectors: usize,
    /// (products, channels, panel)
    to: *mut T,
    /// Are they added to what is there?
    add: bool,
}

impl<E: Copy, T: Vectors> Sum<E, T> {
    /// # Safety
    /// The pointers must be valid for what the layouts say, and `D`'s instructions be there.
    #[inline(always)]
    unsafe fn run<D: Terms<Term = E, S: Simd<Elem = T>>>(&self) {
        let (x, dy) = (self.x_layout, self.dy_layout);
        let positions = Positions {
            blocks: 1,
            rows: 1,
            steps: self.terms,
            a_block: 0,
            a_row: 0,
            a_step: x.tile,
            b_block: 0,
            b_row: 0,
            b_step: dy.tile,
            ahead: Steps::NOTHING,
        };
        let pieces = Pieces::of(self.channels, D::ROWS[1]);
        for product in 0..PRODUCTS {
            // SAFETY: the caller's promise.
            unsafe {
                let b = self.dy.add(product * dy.product);
                let mut i = 0;
                while i < pieces.count {
                    let (row, m, some) = (pieces.start(i), pieces.len(i), pieces.alike(i));
                    let a = self.x.add(product * x.product + row);
                    let to = self.to.add((product * self.channels + row) * 2 * D::S::LANES);
                    tile_sizes!(m, self.vectors, D, multiply(some, &positions, a, b, to, self.add));
                    i += some;
                }
            }
        }
    }
}

/// Some tiles of `M` neighbouring channels each.
///
/// # Safety
/// `a` and `b` must be valid at all positions, `sum` for `M` rows of two vectors a tile.
#[inline(always)]
unsafe fn multiply<D: Terms, const M: usize, const N: usize>(
    tiles: usize,
    positions: &Positions,
    a: *const D::Term,
    b: *const D::Term,
    sum: *mut <D::S as Simd>::Elem,
    add: bool,
) {
    let row = 2 * D::S::LANES;
    for i in 0..tiles {
        // SAFETY: the caller's promise.
        unsafe {
            let acc = along_columns::<D, M, N, 1>(positions, a.add(i * M), b, D::S::LANES);
            put::<D::S, M, N>(&acc, sum.add(i * M * row), [row as isize, D::S::LANES as isize], add);
        }
    }
}

/// Adds all slabs' sums of one panel and transforms them to its taps.
struct Back<'a, T> {
    sums: &'a [T],
    slabs: usize,
    /// Elements of a slab, where the panel's begin, and those of one product.
    slab: usize,
    first: usize,
    row: usize,
    taps: &'a mut [T],
}

impl<T: Vectors> Kernel<T> for Back<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(self) {
        let to = self.taps.as_mut_ptr();
        let mut at = 0;
        while at < self.row {
            let m = self.sums[self.first + at..].as_ptr();
            // SAFETY: a row is made of whole vectors; each slab has one a product, the taps nine.
            unsafe { weight_grad_tile::<S>(m, [self.slabs, self.slab, self.row], to.add(at), self.row) }
            at += S::LANES;
        }
    }
}

/// Many sums of few tiles: how that is divided.
struct Few {
    tiles: Tiles,
    /// Panels of output channels and blocks of input channels.
    panels: usize,
    blocks: usize,
    /// Of a block and of a panel, in terms of tiles: what a task reads lies together, as a stream for the processor.
    layouts: [Transformed; 2],
}

impl Few {
    /// Where it pays: one slab's sums would be many, the transformed tiles are not.
    fn new(g: &Geometry, each: usize, panel: usize) -> Option<Few> {
        let tiles = Tiles::of(g.n, g.y);
        let (panels, lanes) = (g.oc.div_ceil(panel), panel / 2);
        let of = |channels: usize| Transformed::new(tiles.total.div_ceil(each), channels, lanes);
        let near = of(g.c).size() + of(panels * panel).size() <= NEAR;
        let few = near && PRODUCTS * g.c * panels * panel >= MANY;
        let layouts = [of(BLOCK.min(g.c)), of(panel)];
        few.then_some(Few { tiles, panels, blocks: g.c.div_ceil(BLOCK), layouts })
    }

    /// Elements of the transformed inputs and gradients.
    fn transformed(&self) -> [usize; 2] {
        [self.blocks * self.layouts[0].size(), self.panels * self.layouts[1].size()]
    }

    fn tasks(&self) -> usize {
        self.panels * self.blocks
    }

    /// Elements of a block's sums and taps.
    fn slot(&self, panel: usize) -> usize {
        (PRODUCTS + TAPS) * self.layouts[0].width * panel
    }

    fn scratch(&self, g: &Geometry, panel: usize, half: [bool; 2]) -> usize {
        let transformed: usize = self.transformed().iter().sum();
        let widened = slots(each_tasks(self.tiles), near(g, half).iter().sum());
        g.c.max(g.oc) + transformed + slots(self.tasks(), self.slot(panel)).max(widened)
    }

    fn run<E: Form<T>, T: Vectors>(
        &self,
        g: &Geometry,
        dy: Elements<T>,
        x: Elements<T>,
        dw: &mut [T],
        scratch: &mut [T],
    ) {
        let panel = T::level().pair();
        let (zeros, rest) = scratch.split_at_mut(g.c.max(g.oc));
        let [of_x, of_dy] = self.transformed();
        let (tx, rest) = rest.split_at_mut(of_x);
        let (tdy, slots) = rest.split_at_mut(of_dy);
        zeros.fill(T::zero());
        let (zeros, room): (&[T], usize) = (zeros, near(g, halves(dy, x)).iter().sum());
        let (to_x, to_dy) = (Shared::new(E::room(tx)), Shared::new(E::room(tdy)));
        each(self.tiles, room, slots, |tiles, near| {
            let at = |i: usize| tiles.start / E::EACH * self.layouts[i].tile;
            let (to_x, to_dy) = (to_x.ptr().wrapping_add(at(0)), to_dy.ptr().wrapping_add(at(1)));
            let (of, layouts) = (self.tiles, self.layouts);
            let [x, dy] = sources(g, dy, x, zeros, near);
            // SAFETY: the sources have the geometry's extents; no two tasks write the same tiles.
            unsafe { E::dispatch_terms(TransformBoth { of, tiles, x, dy, layouts, to_x, to_dy }) }
        });
        let dw = Shared::new(dw);
        in_slots(self.tasks(), self.slot(panel), slots, |task, slot| {
            let (p, block) = (task / self.blocks, task % self.blocks);
            let first = block * BLOCK;
            let channels = BLOCK.min(g.c - first);
            let (sums, taps) = slot.split_at_mut(PRODUCTS * channels * panel);
            let outputs = panel.min(g.oc - p * panel);
            let sum = Sum {
                terms: self.tiles.total.div_ceil(E::EACH),
                x: to_x.ptr().wrapping_add(block * self.layouts[0].size()).cast_const(),
                x_layout: self.layouts[0],
                channels,
                dy: to_dy.ptr().wrapping_add(p * self.layouts[1].size()).cast_const(),
                dy_layout: self.layouts[1],
                vectors: if outputs > panel / 2 { 2 } else { 1 },
                to: sums.as_mut_ptr(),
                add: false,
            };
            let to = dw.ptr().wrapping_add((p * panel * g.c + first) * TAPS);
            let (taps, row) = (taps.as_mut_ptr(), g.c * TAPS);
            // SAFETY: the buffers have the layouts' sizes; no two tasks write the same weights.
            unsafe { E::dispatch_terms(SumTaps { sum, taps, to, row, outputs }) }
        });
    }
}

/// The tiles of both operands.
struct TransformBoth<'a, E, T> {
    of: Tiles,
    tiles: Range<usize>,
    x: Source<'a, T>,
    dy: Source<'a, T>,
    layouts: [Transformed; 2],
    to_x: *mut E,
    to_dy: *mut E,
}

impl<E: Form<T>, T: Vectors> TermKernel<E, T> for TransformBoth<'_, E, T> {
    #[inline(always)]
    unsafe fn run<D: Terms<Term = E, S: Simd<Elem = T>>>(mut self) {
        let [x, dy] = self.layouts;
        // SAFETY: the promise of whoever made it.
        unsafe {
            let (of_x, of_dy) = (0..self.x.channels, 0..self.dy.channels);
            let (of, tiles) = (&self.of, self.tiles);
            transform::<D, Inputs, IN, false>(of, tiles.clone(), &mut self.x, of_x, &x, self.to_x);
            transform::<D, Gradients, OUT, false>(of, tiles, &mut self.dy, of_dy, &dy, self.to_dy);
        }
    }
}

/// A sum, its taps, and where they go: those of so many outputs, `row` elements from one to the next.
struct SumTaps<E, T> {
    sum: Sum<E, T>,
    /// (taps, channels, panel)
    taps: *mut T,
    to: *mut T,
    row: usize,
    outputs: usize,
}

impl<E: Copy, T: Vectors> TermKernel<E, T> for SumTaps<E, T> {
    #[inline(always)]
    unsafe fn run<D: Terms<Term = E, S: Simd<Elem = T>>>(self) {
        let SumTaps { sum, taps, to, row, outputs } = self;
        let (lanes, panel) = (D::S::LANES, 2 * D::S::LANES);
        let step = sum.channels * panel;
        // SAFETY: the sum's promise; there is room for its taps, and the outputs have their weights.
        unsafe {
            sum.run::<D>();
            for at in (0..step).step_by(lanes) {
                weight_grad_tile::<D::S>(sum.to.add(at), [1, 0, step], taps.add(at), step);
            }
            for lane in (0..outputs).step_by(lanes) {
                let some = Outputs {
                    sum: taps.add(lane).cast_const(),
                    steps: [step, panel],
                    channels: sum.channels,
                    taps: TAPS,
                    to: to.add(lane * row),
                    row,
                    outputs: lanes.min(outputs - lane),
                };
                some.run::<D::S>();
            }
        }
    }
}

/// Elements of room for the rows of X and of dY that are near, where they are of half precision.
fn near(g: &Geometry, half: [bool; 2]) -> [usize; 2] {
    [room(g.x, g.c, half[0]), room(g.y, g.oc, half[1])]
}

/// Are X and dY of half precision?
fn halves<T: Vectors>(dy: Elements<T>, x: Elements<T>) -> [bool; 2] {
    [!x.is_whole(), !dy.is_whole()]
}

/// Inputs and gradients, where tiles are read from.
fn sources<'a, T: Vectors>(
    g: &Geometry,
    dy: Elements<'a, T>,
    x: Elements<'a, T>,
    zeros: &'a [T],
    room: &'a mut [T],
) -> [Source<'a, T>; 2] {
    let (inputs, outputs) = ([g.x[1], g.x[2]], [g.y[1], g.y[2]]);
    let (low, [of_x, of_y]) = ([g.pad[1], g.pad[2]], near(g, halves(dy, x)));
    let (x_near, y_near) = room[..of_x + of_y].split_at_mut(of_x);
    [
        Source { images: x, zeros, extents: inputs, channels: g.c, low, near: x_near, held: None },
        Source { images: dy, zeros, extents: outputs, channels: g.oc, low: [0; 2], near: y_near, held: None },
    ]
}

/// Elements of scratch that [`weight_grad`] needs; `half`: are X and dY of half precision?
pub fn weight_grad_scratch<T: Vectors>(g: &Geometry, half: [bool; 2]) -> usize {
    let each = if g.pairs { <u32 as Form<T>>::EACH } else { 1 };
    let panel = T::level().pair();
    if let Some(few) = Few::new(g, each, panel) {
        return few.scratch(g, panel, half);
    }
    let d = Division::new(g, each, panel);
    let taps = d.all * TAPS * g.c * panel;
    let slots = slots(d.slabs.count * d.groups(), d.slot(g, each, panel, half));
    d.slabs.count * d.size(g, panel) + slots.max(taps)
}

/// dW (M, C, 3, 3) from dY (N, spatial…, M) and X (N, spatial…, C).
pub fn weight_grad<T: Vectors>(
    g: &Geometry,
    dy: Elements<T>,
    x: Elements<T>,
    dw: &mut [T],
    scratch: &mut [T],
) {
    g.check_sizes(x.len(), dy.len());
    match g.pairs {
        false => of_terms::<T, T>(g, dy, x, dw, scratch),
        true => of_terms::<u32, T>(g, dy, x, dw, scratch),
    }
}

fn of_terms<E: Form<T>, T: Vectors>(
    g: &Geometry,
    dy: Elements<T>,
    x: Elements<T>,
    dw: &mut [T],
    scratch: &mut [T],
) {
    let panel = T::level().pair();
    if let Some(few) = Few::new(g, E::EACH, panel) {
        return few.run::<E, T>(g, dy, x, dw, scratch);
    }
    let d = Division::new(g, E::EACH, panel);
    let (size, layouts, groups) = (d.size(g, panel), d.layouts(g, E::EACH, panel), d.groups());
    let (sums, rest) = scratch.split_at_mut(d.slabs.count * size);
    let shared = Shared::new(sums);
    let half = halves(dy, x);
    in_slots(d.slabs.count * groups, d.slot(g, E::EACH, panel, half), rest, |task, slot| {
        let (slab, group) = (task / groups, task % groups);
        let start = d.slabs.start(slab);
        let (x_transformed, more) = slot.split_at_mut(layouts[0].size());
        let (dy_transformed, more) = more.split_at_mut(layouts[1].size());
        let (zeros, near) = more.split_at_mut(g.c.max(g.oc));
        zeros.fill(T::zero());
        let [x, dy] = sources(g, dy, x, zeros, near);
        // SAFETY: the slices have the geometry's extents; tasks write different elements of the sums.
        unsafe {
            E::dispatch_terms(Task {
                g,
                of: d.tiles,
                tiles: start..start + d.slabs.len(slab),
                chunk: d.chunk,
                panels: group * d.panels..d.all.min((group + 1) * d.panels),
                x,
                dy,
                layouts,
                x_transformed: E::room(x_transformed).as_mut_ptr(),
                dy_transformed: E::room(dy_transformed).as_mut_ptr(),
                sums: shared.ptr().add(slab * size),
            });
        }
    });
    let sums: &[T] = sums;
    let row = g.c * panel;
    let taps = &mut rest[..d.all * TAPS * row];
    taps.par_chunks_exact_mut(TAPS * row).enumerate().for_each(|(p, taps)| {
        let (slabs, slab, first) = (d.slabs.count, size, p * PRODUCTS * row);
        // SAFETY: the kernel has no promise of its own.
        unsafe { T::dispatch(Back { sums, slabs, slab, first, row, taps }) }
    });
    in_order(g, panel, taps, dw);
}
