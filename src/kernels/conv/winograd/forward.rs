//! The forward pass and, with the kernel turned round, the input gradient.
#![allow(unsafe_code, clippy::needless_range_loop)]

use std::ops::Range;

use rayon::prelude::*;

use super::transform::{OUT, PRODUCTS, output_tile, weight_tile};
use super::{Source, TAPS, Tiles, Transformed, few, transform_inputs};
use crate::kernels::conv::grids::{Plan, pack_panel};
use crate::kernels::conv::{Epilogue, Residual, in_slots, slots};
use crate::kernels::par::Shared;
use crate::kernels::simd::{Kernel, Simd, Vectors, load_up_to, store_up_to};
use crate::kernels::tile::{Pieces, multiply};
use crate::tile_sizes;

/// Elements of a task's transformed tiles, and the tiles it should at least have where weights are many.
const CHUNK: usize = 1 << 16;
const TILES: usize = 16;
/// Tasks that keep the threads of a small machine equally busy.
const TASKS: usize = 16;

/// How the work is divided.
struct Division {
    tiles: Tiles,
    /// Of each task.
    chunks: Pieces,
    panels: usize,
}

impl Division {
    fn new(plan: &Plan, panel: usize) -> Division {
        let tiles = Tiles::of(plan.n, plan.target);
        let each = CHUNK / (PRODUCTS * (plan.ci + panel));
        let least = if plan.ci < 2 * TILES { 8 } else { TILES };
        let chunks = Pieces::of(tiles.total, each.clamp(least, 2 * TILES) / 8 * 8);
        let panels = plan.panels(panel);
        let groups = TASKS.div_ceil(chunks.count).min(panels);
        Division { tiles, chunks, panels: panels.div_ceil(groups) }
    }

    /// Transformed inputs and products of one task.
    fn layouts(&self, plan: &Plan, panel: usize) -> [Transformed; 2] {
        let most = self.chunks.len(0);
        [Transformed::new(most, plan.ci, panel / 2), Transformed::new(most, panel, panel / 2)]
    }

    /// Elements of scratch of one task: those, and a position of zeros.
    fn slot(&self, plan: &Plan, panel: usize) -> usize {
        let [x, m] = self.layouts(plan, panel);
        x.size() + m.size() + plan.ci
    }

    fn tasks(&self, plan: &Plan, panel: usize) -> [usize; 2] {
        [self.chunks.count, plan.panels(panel).div_ceil(self.panels)]
    }
}

/// Transforms the nine taps of each step of a panel, which are in place of the last nine products.
///
/// # Safety
/// `panel` must be writable for `step` elements a product.
#[inline(always)]
pub(super) unsafe fn transform_weights<S: Simd>(panel: *mut S::Elem, step: usize) {
    let mut at = 0;
    while at < step {
        // SAFETY: a step is made of whole vectors; each vector's taps are read before its products are written.
        unsafe { weight_tile::<S>(panel.add((PRODUCTS - TAPS) * step + at), panel.add(at), step) }
        at += S::LANES;
    }
}

struct TransformWeights<'a, T> {
    panel: &'a mut [T],
}

impl<T: Vectors> Kernel<T> for TransformWeights<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(self) {
        // SAFETY: the panel has all products.
        unsafe { transform_weights::<S>(self.panel.as_mut_ptr(), self.panel.len() / PRODUCTS) }
    }
}

/// All products of some tiles with one panel.
#[derive(Clone, Copy)]
pub(super) struct Multiply<T> {
    pub(super) tiles: usize,
    /// Transformed inputs, of which `channels` are summed over.
    pub(super) x: *const T,
    pub(super) x_layout: Transformed,
    pub(super) channels: usize,
    /// Transformed weights, each product's `channels` rows of a panel.
    pub(super) weights: *const T,
    pub(super) to: *mut T,
    pub(super) to_layout: Transformed,
    /// Vectors of the panel that are needed.
    pub(super) vectors: usize,
    /// Are the products added to what is there?
    pub(super) add: bool,
}

impl<T: Vectors> Multiply<T> {
    /// # Safety
    /// The pointers must be valid for what the layouts say.
    #[inline(always)]
    pub(super) unsafe fn run<S: Simd<Elem = T>>(&self) {
        let (x, to) = (self.x_layout, self.to_layout);
        let runs = [(0isize, self.channels)];
        let pieces = Pieces::of(self.tiles, S::ROWS[1]);
        for product in 0..PRODUCTS {
            // SAFETY: the caller's promise.
            unsafe {
                let b = self.weights.add(product * self.channels * 2 * S::LANES);
                for i in 0..pieces.count {
                    let (start, rows) = (pieces.start(i), pieces.len(i));
                    let a = self.x.add(product * x.product + start * x.tile);
                    let c = self.to.add(product * to.product + start * to.tile);
                    tile_sizes!(rows, self.vectors, S, multiply(&runs, a, x.tile, b, c, to.tile, self.add));
                }
            }
        }
    }
}

/// Where results go.
pub(super) struct Target<'a, T> {
    pub(super) plan: &'a Plan,
    pub(super) tiles: Tiles,
    pub(super) epilogue: Epilogue<'a, T>,
    pub(super) y: *mut T,
}

struct Task<'a, T> {
    tiles: Range<usize>,
    source: Source<'a, T>,
    layouts: [Transformed; 2],
    weights: &'a [T],
    panels: Range<usize>,
    transformed: *mut T,
    products: *mut T,
    target: Target<'a, T>,
}

impl<T: Vectors> Kernel<T> for Task<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(self) {
        let [x, m] = self.layouts;
        let plan = self.target.plan;
        // SAFETY: the buffers have the layouts' sizes, the weights all panels.
        unsafe {
            transform_inputs::<S>(
                &self.target.tiles,
                self.tiles.clone(),
                &self.source,
                None,
                &x,
                self.transformed,
            );
            for p in self.panels.clone() {
                let multiply = Multiply {
                    tiles: self.tiles.len(),
                    x: self.transformed,
                    x_layout: x,
                    channels: plan.ci,
                    weights: self.weights.as_ptr().add(p * PRODUCTS * plan.ci * 2 * S::LANES),
                    to: self.products,
                    to_layout: m,
                    vectors: self.target.vectors::<S>(p),
                    add: false,
                };
                multiply.run::<S>();
                self.target.write::<S>(self.tiles.clone(), p, self.products, &m);
            }
        }
    }
}

impl<T: Vectors> Target<'_, T> {
    /// Vectors of a panel's channels.
    #[inline(always)]
    pub(super) fn vectors<S: Simd>(&self, panel: usize) -> usize {
        if self.plan.co - panel * 2 * S::LANES > S::LANES { 2 } else { 1 }
    }

    /// Transforms the products of some tiles and a panel, and writes the results.
    ///
    /// # Safety
    /// `products` must have the layout's size; `y`, and the epilogue's residual, the plan's extents.
    #[inline(always)]
    pub(super) unsafe fn write<S: Simd<Elem = T>>(
        &self,
        tiles: Range<usize>,
        panel: usize,
        products: *const T,
        layout: &Transformed,
    ) {
        for t in 0..tiles.len() {
            let at = self.tiles.at(tiles.start + t);
            for j in 0..self.vectors::<S>(panel) {
                let channel = (2 * panel + j) * S::LANES;
                // SAFETY: the caller's promise.
                unsafe {
                    let products = products.add(t * layout.tile + j * S::LANES);
                    let tile = output_tile::<S>(products, layout.product);
                    self.write_tile::<S>(&tile, at, channel, (self.plan.co - channel).min(S::LANES));
                }
            }
        }
    }

    /// Writes `n` channels of a tile's results, as many as lie inside.
    ///
    /// # Safety
    /// As of `write`.
    #[inline(always)]
    unsafe fn write_tile<S: Simd<Elem = T>>(
        &self,
        tile: &[[S::V; OUT]; OUT],
        [image, row, column]: [usize; 3],
        channel: usize,
        n: usize,
    ) {
        let [_, rows, columns] = self.plan.target;
        // SAFETY: the caller's promise.
        unsafe {
            let (low, high) = (S::splat(self.epilogue.clamp.low), S::splat(self.epilogue.clamp.high));
            let bias = match self.epilogue.bias {
                Some(bias) => load_up_to::<S>(bias.as_ptr().add(channel), n),
                None => S::splat(T::zero()),
            };
            let residual = match self.epilogue.residual {
                Residual::None => None,
                Residual::Of(r) => Some(r.as_ptr()),
                Residual::InOutput => Some(self.y.cast_const()),
            };
            for i in 0..OUT {
                for j in 0..OUT {
                    if row + i < rows && column + j < columns {
                        let at = ((image * rows + row + i) * columns + column + j) * self.plan.co + channel;
                        let mut v = S::add(tile[i][j], bias);
                        if let Some(r) = residual {
                            v = S::add(v, load_up_to::<S>(r.add(at), n));
                        }
                        store_up_to::<S>(self.y.add(at), S::min(high, S::max(low, v)), n);
                    }
                }
            }
        }
    }
}

/// `y = clamp(conv(x, w) + bias + residual)`, or of the kernel turned round.
pub(super) fn run<T: Vectors>(
    plan: &Plan,
    forward: bool,
    x: &[T],
    w: &[T],
    epilogue: Epilogue<T>,
    y: &mut [T],
    scratch: &mut [T],
) {
    let panel = T::level().pair();
    if few::applies(plan) {
        return few::run(plan, forward, x, w, epilogue, y, scratch);
    }
    let size = PRODUCTS * plan.ci * panel;
    let (weights, slots) = scratch.split_at_mut(plan.panels(panel) * size);
    weights.par_chunks_exact_mut(size).enumerate().for_each(|(p, out)| {
        let taps = (PRODUCTS - TAPS) * plan.ci * panel;
        pack_panel(plan, forward, [panel; 2], p, 0..plan.ci, w, &mut out[taps..]);
        // SAFETY: the kernel has no promise of its own.
        unsafe { T::dispatch(TransformWeights { panel: out }) }
    });
    let weights: &[T] = weights;
    let d = Division::new(plan, panel);
    let layouts = d.layouts(plan, panel);
    let [chunks, groups] = d.tasks(plan, panel);
    let y = Shared::new(y);
    in_slots(chunks * groups, d.slot(plan, panel), slots, |task, slot| {
        let (chunk, group) = (task / groups, task % groups);
        let start = d.chunks.start(chunk);
        let (transformed, rest) = slot.split_at_mut(layouts[0].size());
        let (products, zeros) = rest.split_at_mut(layouts[1].size());
        zeros.fill(T::zero());
        // SAFETY: the slices have the plan's extents (checked by the callers); no two tasks write the same elements
        // of `y`.
        unsafe {
            T::dispatch(Task {
                tiles: start..start + d.chunks.len(chunk),
                source: Source::of(plan, x, zeros),
                layouts,
                weights,
                panels: group * d.panels..plan.panels(panel).min((group + 1) * d.panels),
                transformed: transformed.as_mut_ptr(),
                products: products.as_mut_ptr(),
                target: Target { plan, tiles: d.tiles, epilogue, y: y.ptr() },
            });
        }
    });
}

/// Elements of scratch that [`run`] needs.
pub(super) fn scratch<T: Vectors>(plan: &Plan) -> usize {
    let panel = T::level().pair();
    if few::applies(plan) {
        return few::scratch(plan, panel);
    }
    let d = Division::new(plan, panel);
    let [chunks, groups] = d.tasks(plan, panel);
    plan.panels(panel) * PRODUCTS * plan.ci * panel + slots(chunks * groups, d.slot(plan, panel))
}
