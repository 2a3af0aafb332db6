//! The forward pass and, with the kernel turned round, the input gradient.
#![allow(unsafe_code, clippy::needless_range_loop)]

use std::ops::Range;

use rayon::prelude::*;

use super::moments::{Moments, Parts};
use super::source::{Source, room, transform};
use super::transform::{IN, Inputs, OUT, PRODUCTS, output_tile, put_across, put_both, weight_tile};
use super::{TAPS, Tiles, Transformed, few};
use crate::kernels::conv::grids::Plan;
use crate::kernels::conv::panels::Unpacked;
use crate::kernels::conv::results::{SharedResults, To};
use crate::kernels::conv::way::Packed;
use crate::kernels::conv::{Epilogue, Residual, slots};
use crate::kernels::half::{Elements, ElementsMut};
use crate::kernels::par::in_prepared_slots;
use crate::kernels::simd::{Simd, Vectors, load_up_to, store_up_to};
use crate::kernels::tile::{Form, Pieces, TermKernel, Terms, multiply, round_up_to};
use crate::tile_sizes;

/// Elements of a task's transformed tiles, and the tiles it should at least have where weights are many.
const CHUNK: usize = 1 << 16;
const TILES: usize = 16;
/// Tasks that keep the threads of a small machine equally busy.
const TASKS: usize = 16;
/// Input channels whose taps are transformed at a time.
const NEAR: usize = 16;

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
        let each = each.clamp(least, 2 * TILES).min((tiles.total / 2).max(8));
        let chunks = Pieces::of(tiles.total, each / 8 * 8);
        let panels = plan.panels(panel);
        let groups = TASKS.div_ceil(chunks.count).min(panels);
        Division { tiles, chunks, panels: panels.div_ceil(groups) }
    }

    /// Transformed inputs, in terms of `each` channels, and products of one task.
    fn layouts(&self, plan: &Plan, each: usize, panel: usize) -> [Transformed; 2] {
        let most = self.chunks.len(0);
        let terms = plan.ci.div_ceil(each);
        [Transformed::new(most, terms, panel / 2), Transformed::new(most, panel, panel / 2)]
    }

    /// Elements of scratch of one task: those, and a position of zeros, in whole vectors, and rows of half precision, widened.
    fn slot(&self, plan: &Plan, each: usize, panel: usize, half: bool) -> usize {
        let [x, m] = self.layouts(plan, each, panel);
        let near = room(plan.source, plan.ci, half);
        (x.size() + m.size() + plan.ci + near).next_multiple_of(panel)
    }

    fn tasks(&self, plan: &Plan, panel: usize) -> [usize; 2] {
        [self.chunks.count, plan.panels(panel).div_ceil(self.panels)]
    }
}

/// A panel's transformed weights of some input channels: for each product a row of the panel for each term, and after all of them
/// the taps that are being transformed.
#[derive(Clone, Copy)]
pub(super) struct Weights {
    channels: usize,
    panel: usize,
    /// Elements from a product to the next. (Rows that are written together would share the same few lines of the cache if they were
    /// a power of two apart.)
    pub(super) product: usize,
}

impl Weights {
    /// In terms of `each` channels.
    pub(super) fn new(channels: usize, each: usize, panel: usize) -> Weights {
        Weights { channels, panel, product: channels.div_ceil(each) * panel + panel / 2 }
    }

    pub(super) fn size(&self) -> usize {
        PRODUCTS * self.product + TAPS * self.channels.min(NEAR) * self.panel
    }
}

/// Puts some input channels' weights of panel `p` in order and transforms them.
pub(super) struct Transform<'a, T> {
    pub(super) plan: &'a Plan,
    pub(super) forward: bool,
    pub(super) p: usize,
    pub(super) inputs: Range<usize>,
    pub(super) w: &'a [T],
    /// As many elements as [`Weights`] have.
    pub(super) out: &'a mut [T],
}

impl<E: Form<T>, T: Vectors> TermKernel<E, T> for Transform<'_, T> {
    #[inline(always)]
    unsafe fn run<D: Terms<Term = E, S: Simd<Elem = T>>>(self) {
        let Transform { plan, forward, p, inputs, w, out } = self;
        let panel = 2 * D::S::LANES;
        let layout = Weights::new(inputs.len(), E::EACH, panel);
        assert!(out.len() >= layout.size(), "room for weights");
        let (out, taps) = out.split_at_mut(PRODUCTS * layout.product);
        let out = out.as_mut_ptr().cast::<E>();
        // SAFETY: the caller's promise.
        let mut held = [[unsafe { D::S::splat(T::zero()) }; IN]; IN];
        for first in inputs.clone().step_by(NEAR) {
            let some = first..inputs.end.min(first + NEAR);
            Unpacked { plan, forward, panel, w }.pack_inputs(p, some.clone(), panel, taps);
            let step = some.len() * panel;
            for first in (0..some.len()).step_by(E::EACH) {
                let (of_term, term) = (E::EACH.min(some.len() - first), some.start - inputs.start + first);
                for at in [0, D::S::LANES] {
                    // SAFETY: the taps of so many channels are there, and room for all products of all terms.
                    unsafe {
                        let taps = taps.as_ptr().add(first * panel + at);
                        let (to, product) = (out.add(term / E::EACH * panel + at), layout.product);
                        if of_term == 1 {
                            weight_tile::<D::S>(
                                taps,
                                step,
                                #[inline(always)]
                                |i, row| put_across::<D>(0, i, &row, to, product),
                            );
                            continue;
                        }
                        weight_tile::<D::S>(
                            taps,
                            step,
                            #[inline(always)]
                            |i, row| held[i] = row,
                        );
                        weight_tile::<D::S>(
                            taps.add(panel),
                            step,
                            #[inline(always)]
                            |i, row| put_both::<D>(i, [&held[i], &row], to, product),
                        );
                    }
                }
            }
        }
    }
}

/// All products of some tiles with one panel.
#[derive(Clone, Copy)]
pub(super) struct Multiply<E, T> {
    pub(super) tiles: usize,
    /// Transformed inputs, of which `terms` are summed over.
    pub(super) x: *const E,
    pub(super) x_layout: Transformed,
    pub(super) terms: usize,
    /// Transformed weights, and how far apart those of its products are.
    pub(super) weights: *const E,
    pub(super) weights_product: usize,
    pub(super) to: *mut T,
    pub(super) to_layout: Transformed,
    /// Vectors of the panel that are needed.
    pub(super) vectors: usize,
    /// Are the products added to what is there?
    pub(super) add: bool,
}

impl<E: Copy, T: Vectors> Multiply<E, T> {
    /// # Safety
    /// The pointers must be valid for what the layouts say, and `D`'s instructions be there.
    #[inline(always)]
    pub(super) unsafe fn run<D: Terms<Term = E, S: Simd<Elem = T>>>(&self) {
        let (x, to) = (self.x_layout, self.to_layout);
        let runs = [(0isize, self.terms)];
        let pieces = Pieces::of(self.tiles, D::ROWS[1]);
        for product in 0..PRODUCTS {
            // SAFETY: the caller's promise.
            unsafe {
                let b = self.weights.add(product * self.weights_product);
                let mut i = 0;
                while i < pieces.count {
                    let (start, rows, some) = (pieces.start(i), pieces.len(i), pieces.alike(i));
                    let a = self.x.add(product * x.product + start * x.tile);
                    let c = self.to.add(product * to.product + start * to.tile);
                    tile_sizes!(
                        rows,
                        self.vectors,
                        D,
                        multiply(some, &runs, a, x.tile, b, c, to.tile, self.add)
                    );
                    i += some;
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
    pub(super) y: To<T>,
    pub(super) moments: Option<&'a Parts<'a>>,
}

struct Task<'a, E, T> {
    chunk: usize,
    tiles: Range<usize>,
    source: Source<'a, T>,
    layouts: [Transformed; 2],
    /// All panels' weights.
    weights: &'a [T],
    layout: Weights,
    panels: Range<usize>,
    transformed: *mut E,
    products: *mut T,
    target: Target<'a, T>,
}

impl<E: Form<T>, T: Vectors> TermKernel<E, T> for Task<'_, E, T> {
    #[inline(always)]
    unsafe fn run<D: Terms<Term = E, S: Simd<Elem = T>>>(mut self) {
        let [x, m] = self.layouts;
        let (of, tiles) = (&self.target.tiles, self.tiles.clone());
        // SAFETY: the buffers have the layouts' sizes, the weights all panels.
        unsafe {
            let all = 0..self.source.channels;
            transform::<D, Inputs, IN, true>(of, tiles, &mut self.source, all, &x, self.transformed);
            for p in self.panels.clone() {
                let multiply = Multiply {
                    tiles: self.tiles.len(),
                    x: self.transformed.cast_const(),
                    x_layout: x,
                    terms: self.target.plan.ci.div_ceil(E::EACH),
                    weights: self.weights[p * self.layout.size()..].as_ptr().cast(),
                    weights_product: self.layout.product,
                    to: self.products,
                    to_layout: m,
                    vectors: self.target.vectors::<D::S>(p),
                    add: false,
                };
                multiply.run::<D>();
                self.target.write::<D>(self.chunk, self.tiles.clone(), p, self.products, &m);
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

    /// Transforms the products of some tiles, the block of that number, and a panel, and writes the results.
    ///
    /// # Safety
    /// `products` must have the layout's size; `y`, and the epilogue's residual, the plan's extents. No other task writes these
    /// channels of the block.
    #[inline(always)]
    pub(super) unsafe fn write<D: Terms<S: Simd<Elem = T>>>(
        &self,
        block: usize,
        tiles: Range<usize>,
        panel: usize,
        products: *const T,
        layout: &Transformed,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.moments {
                None => _ = self.write_tiles::<D, false>(tiles, panel, products, layout),
                Some(parts) => {
                    let moments = self.write_tiles::<D, true>(tiles, panel, products, layout);
                    for j in 0..self.vectors::<D::S>(panel) {
                        let channel = (2 * panel + j) * D::S::LANES;
                        let n = (self.plan.co - channel).min(D::S::LANES);
                        parts.put(block, channel, n, &moments[j]);
                    }
                }
            }
        }
    }

    /// The moments of the results of each of the panel's vectors, where they are wanted.
    ///
    /// # Safety
    /// As of `write`.
    #[inline(always)]
    unsafe fn write_tiles<D: Terms<S: Simd<Elem = T>>, const MOMENTS: bool>(
        &self,
        tiles: Range<usize>,
        panel: usize,
        products: *const T,
        layout: &Transformed,
    ) -> [Moments<D::S>; 2] {
        let [_, rows, columns] = self.plan.target;
        // SAFETY: the caller's promise.
        unsafe {
            let mut moments = [Moments::none(); 2];
            let mut ahead = self.tiles.walk(tiles.clone()).skip(1);
            for (t, at) in self.tiles.walk(tiles).enumerate() {
                if let Some(next) = ahead.next() {
                    self.fetch_tile::<D>(next, panel);
                }
                let inside = [OUT.min(rows - at[1]), OUT.min(columns - at[2])];
                for j in 0..self.vectors::<D::S>(panel) {
                    let channel = (2 * panel + j) * D::S::LANES;
                    let products = products.add(t * layout.tile + j * D::S::LANES);
                    let mut tile = output_tile::<D::S>(products, layout.product);
                    let n = (self.plan.co - channel).min(D::S::LANES);
                    if inside == [OUT; 2] && n == D::S::LANES {
                        self.write_tile::<D, true>(&mut tile, at, [channel, n], inside);
                    } else {
                        self.write_tile::<D, false>(&mut tile, at, [channel, n], inside);
                    }
                    if MOMENTS {
                        moments[j].add(&tile, inside);
                    }
                }
            }
            moments
        }
    }

    /// Has what writing a tile's results of a panel reads or writes fetched, the edges' missing positions with it.
    #[inline(always)]
    fn fetch_tile<D: Terms<S: Simd<Elem = T>>>(&self, [image, row, column]: [usize; 3], panel: usize) {
        let ([_, rows, columns], co) = (self.plan.target, self.plan.co);
        let first = ((image * rows + row) * columns + column) * co + 2 * panel * D::S::LANES;
        let vectors = self.vectors::<D::S>(panel);
        let fetch = |p: *const T| {
            // SAFETY: fetching is allowed anywhere.
            unsafe { D::S::prefetch(p) }
        };
        for i in 0..OUT {
            for j in 0..OUT {
                let at = first + (i * columns + j) * co;
                if let Residual::Of(r) = self.epilogue.residual {
                    (0..vectors).for_each(|k| fetch(r.as_ptr().wrapping_add(at + k * D::S::LANES)));
                }
                match self.y {
                    To::Whole(y) => (0..vectors).for_each(|k| fetch(y.wrapping_add(at + k * D::S::LANES))),
                    To::Bf16(y) => fetch(y.wrapping_add(at).cast()),
                }
            }
        }
    }

    /// Writes `n` channels of a tile's results, the rows and columns that lie inside, and leaves them there. `WHOLE`: are those all,
    /// and the channels a vector?
    ///
    /// # Safety
    /// As of `write`.
    #[inline(always)]
    unsafe fn write_tile<D: Terms<S: Simd<Elem = T>>, const WHOLE: bool>(
        &self,
        tile: &mut [[<D::S as Simd>::V; OUT]; OUT],
        [image, row, column]: [usize; 3],
        [channel, n]: [usize; 2],
        inside: [usize; 2],
    ) {
        let ([_, rows, columns], co) = (self.plan.target, self.plan.co);
        let (inside, n) = if WHOLE { ([OUT; 2], D::S::LANES) } else { (inside, n) };
        let first = ((image * rows + row) * columns + column) * co + channel;
        let residual = self.epilogue.residual.address(|| self.y.whole());
        // SAFETY: the caller's promise.
        unsafe {
            if let Some(bias) = self.epilogue.bias {
                let bias = load_up_to::<D::S>(bias.as_ptr().add(channel), n);
                for i in 0..OUT {
                    for j in 0..OUT {
                        tile[i][j] = D::S::add(tile[i][j], bias);
                    }
                }
            }
            if let Some(r) = residual {
                for i in 0..inside[0] {
                    for j in 0..inside[1] {
                        let r = load_up_to::<D::S>(r.add(first + (i * columns + j) * co), n);
                        tile[i][j] = D::S::add(tile[i][j], r);
                    }
                }
            }
            let clamp = self.epilogue.clamp;
            if !clamp.is_none() {
                let (low, high) = (D::S::splat(clamp.low), D::S::splat(clamp.high));
                for i in 0..OUT {
                    for j in 0..OUT {
                        tile[i][j] = D::S::min(high, D::S::max(low, tile[i][j]));
                    }
                }
            }
            match self.y {
                To::Whole(y) => {
                    for i in 0..inside[0] {
                        for j in 0..inside[1] {
                            store_up_to::<D::S>(y.add(first + (i * columns + j) * co), tile[i][j], n);
                        }
                    }
                }
                To::Bf16(y) => {
                    for i in 0..inside[0] {
                        for j in 0..inside[1] {
                            round_up_to::<D>(y.add(first + (i * columns + j) * co), tile[i][j], n);
                        }
                    }
                }
            }
        }
    }
}

/// Blocks of tiles whose moments [`run`] gathers: those of a task.
pub(super) fn blocks<T: Vectors>(plan: &Plan) -> usize {
    if few::applies(plan) { 1 } else { Division::new(plan, T::level().pair()).chunks.count }
}

/// `y = clamp(conv(x, w) + bias + residual)`, or of the kernel turned round.
#[allow(clippy::too_many_arguments)]
pub(super) fn run<E: Form<T>, T: Vectors>(
    plan: &Plan,
    forward: bool,
    x: Elements<T>,
    w: &[T],
    epilogue: Epilogue<T>,
    y: ElementsMut<T>,
    moments: Option<&Parts>,
    scratch: &mut [T],
) {
    let panel = T::level().pair();
    if few::applies(plan) {
        return few::run::<E, T>(plan, forward, x, w, epilogue, y, moments, scratch);
    }
    let layout = Weights::new(plan.ci, E::EACH, panel);
    let (size, [shared, own]) = (layout.size(), weights(plan, layout));
    let (weights, slots) = scratch.split_at_mut(shared);
    let transform = |(p, out): (usize, &mut [T])| {
        // SAFETY: the kernel has no promise of its own.
        unsafe { E::dispatch_terms(Transform { plan, forward, p, inputs: 0..plan.ci, w, out }) }
    };
    weights.par_chunks_exact_mut(size).enumerate().for_each(transform);
    let weights: &[T] = weights;
    let prepare = |slot: &mut [T]| slot[..own].chunks_exact_mut(size).enumerate().for_each(transform);
    let d = Division::new(plan, panel);
    let layouts = d.layouts(plan, E::EACH, panel);
    let [chunks, groups] = d.tasks(plan, panel);
    let (y, room) = (SharedResults::new(y), own + d.slot(plan, E::EACH, panel, !x.is_whole()));
    in_prepared_slots(chunks * groups, room, slots, prepare, |task, slot| {
        // Neighbouring tasks, which a core computes one after the other, read the same weights.
        let (group, chunk) = (task / chunks, task % chunks);
        let start = d.chunks.start(chunk);
        let (own, slot) = slot.split_at_mut(own);
        let (transformed, rest) = slot.split_at_mut(layouts[0].size());
        let (products, rest) = rest.split_at_mut(layouts[1].size());
        let (zeros, near) = rest.split_at_mut(plan.ci);
        zeros.fill(T::zero());
        // SAFETY: the slices have the plan's extents (checked by the callers); no two tasks write the same elements
        // of `y`.
        unsafe {
            E::dispatch_terms(Task {
                chunk,
                tiles: start..start + d.chunks.len(chunk),
                source: Source::of(plan, x, zeros, near),
                layouts,
                weights: if own.is_empty() { weights } else { own },
                layout,
                panels: group * d.panels..plan.panels(panel).min((group + 1) * d.panels),
                transformed: E::room(transformed).as_mut_ptr(),
                products: products.as_mut_ptr(),
                target: Target { plan, tiles: d.tiles, epilogue, y: y.to(), moments },
            });
        }
    });
}

/// Elements of transformed weights of all panels: for all tasks, and, where they are few, for those of each slot, since a core
/// makes them faster than it fetches them from another.
fn weights(plan: &Plan, layout: Weights) -> [usize; 2] {
    let all = plan.panels(layout.panel) * layout.size();
    if Packed::of(usize::MAX, all) == Packed::InSlots { [0, all] } else { [all, 0] }
}

/// Elements of scratch that [`run`] needs; `half`: is what it reads of half precision?
pub(super) fn scratch<E: Form<T>, T: Vectors>(plan: &Plan, half: bool) -> usize {
    let panel = T::level().pair();
    if few::applies(plan) {
        return few::scratch(plan, E::EACH, panel, half);
    }
    let d = Division::new(plan, panel);
    let [chunks, groups] = d.tasks(plan, panel);
    let [shared, own] = weights(plan, Weights::new(plan.ci, E::EACH, panel));
    shared + slots(chunks * groups, own + d.slot(plan, E::EACH, panel, half))
}
