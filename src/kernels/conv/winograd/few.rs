//! Many weights for few tiles (the last layers of a network): transformed, the weights of a layer would be four times
//! as many and go through the memory twice. So all tiles are transformed first; then each task transforms the weights
//! of one panel, a block of input channels at a time, and multiplies while they are near.
#![allow(unsafe_code)]

use std::ops::Range;

use super::forward::{Multiply, Target, transform_weights};
use super::transform::PRODUCTS;
use super::{Source, TAPS, Tiles, Transformed, transform_inputs};
use crate::kernels::conv::grids::{Plan, pack_panel};
use crate::kernels::conv::{Epilogue, in_slots, slots};
use crate::kernels::par::Shared;
use crate::kernels::simd::{Kernel, Simd, Vectors};

/// Weights from which on, and tiles up to which, it pays.
const WEIGHTS: usize = 1 << 17;
const TILES: usize = 64;
/// Input channels whose weights are transformed at a time.
const BLOCK: usize = 64;
/// Tiles that a task transforms.
const EACH: usize = 4;

pub(super) fn applies(plan: &Plan) -> bool {
    plan.ci * plan.co >= WEIGHTS && Tiles::of(plan.n, plan.target).total <= TILES
}

/// Transformed inputs, and the products with one panel.
fn layouts(plan: &Plan, panel: usize) -> [Transformed; 2] {
    let tiles = Tiles::of(plan.n, plan.target).total;
    [Transformed::new(tiles, plan.ci, panel / 2), Transformed::new(tiles, panel, panel / 2)]
}

fn weights(plan: &Plan, panel: usize) -> usize {
    PRODUCTS * BLOCK.min(plan.ci) * panel
}

pub(super) fn scratch(plan: &Plan, panel: usize) -> usize {
    let [x, m] = layouts(plan, panel);
    plan.ci + x.size() + slots(plan.panels(panel), weights(plan, panel) + m.size())
}

/// The tiles of a source.
pub(super) struct Transform<'a, T> {
    pub(super) of: Tiles,
    pub(super) tiles: Range<usize>,
    pub(super) source: Source<'a, T>,
    pub(super) layout: Transformed,
    pub(super) to: *mut T,
}

impl<T: Vectors> Kernel<T> for Transform<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(self) {
        // SAFETY: the promise of whoever made it.
        unsafe { transform_inputs::<S>(&self.of, self.tiles, &self.source, None, &self.layout, self.to) }
    }
}

/// Calls `f` for all tiles, a few at a time, with `own` elements of scratch.
pub(super) fn each<T: Send>(
    of: Tiles,
    own: usize,
    scratch: &mut [T],
    f: impl Fn(Range<usize>, &mut [T]) + Sync,
) {
    let tasks = each_tasks(of);
    in_slots(tasks, own, scratch, |i, own| f(i * EACH..of.total.min((i + 1) * EACH), own));
}

pub(super) fn each_tasks(of: Tiles) -> usize {
    of.total.div_ceil(EACH)
}

/// Everything of one panel.
struct Panel<'a, T> {
    panel: usize,
    forward: bool,
    w: &'a [T],
    x: *const T,
    layouts: [Transformed; 2],
    weights: &'a mut [T],
    products: *mut T,
    target: Target<'a, T>,
}

impl<T: Vectors> Kernel<T> for Panel<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(self) {
        let (plan, panel) = (self.target.plan, 2 * S::LANES);
        let tiles = self.target.tiles.total;
        let mut first = 0;
        while first < plan.ci {
            let inputs = first..plan.ci.min(first + BLOCK);
            let step = inputs.len() * panel;
            let taps = &mut self.weights[(PRODUCTS - TAPS) * step..PRODUCTS * step];
            pack_panel(plan, self.forward, [panel; 2], self.panel, inputs.clone(), self.w, taps);
            // SAFETY: the buffers have the layouts' sizes.
            unsafe {
                transform_weights::<S>(self.weights.as_mut_ptr(), step);
                let multiply = Multiply {
                    tiles,
                    x: self.x.add(first),
                    x_layout: self.layouts[0],
                    channels: inputs.len(),
                    weights: self.weights.as_ptr(),
                    to: self.products,
                    to_layout: self.layouts[1],
                    vectors: self.target.vectors::<S>(self.panel),
                    add: first > 0,
                };
                multiply.run::<S>();
            }
            first = inputs.end;
        }
        // SAFETY: as above.
        unsafe { self.target.write::<S>(0..tiles, self.panel, self.products, &self.layouts[1]) }
    }
}

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
    let tiles = Tiles::of(plan.n, plan.target);
    let layouts = layouts(plan, panel);
    let (zeros, rest) = scratch.split_at_mut(plan.ci);
    zeros.fill(T::zero());
    let zeros: &[T] = zeros;
    let (transformed, slots) = rest.split_at_mut(layouts[0].size());
    let shared = Shared::new(transformed);
    each(tiles, 0, &mut [], |some, _: &mut [T]| {
        let to = shared.ptr().wrapping_add(some.start * layouts[0].tile);
        let source = Source::of(plan, x, zeros);
        // SAFETY: the input has the plan's extents; no two tasks write the same tiles.
        unsafe { T::dispatch(Transform { of: tiles, tiles: some, source, layout: layouts[0], to }) }
    });
    let transformed: &[T] = transformed;
    let y = Shared::new(y);
    let size = weights(plan, panel);
    in_slots(plan.panels(panel), size + layouts[1].size(), slots, |p, slot| {
        let (weights, products) = slot.split_at_mut(size);
        // SAFETY: `y` and the residual have the plan's extents; no two tasks write the same channels.
        unsafe {
            T::dispatch(Panel {
                panel: p,
                forward,
                w,
                x: transformed.as_ptr(),
                layouts,
                weights,
                products: products.as_mut_ptr(),
                target: Target { plan, tiles, epilogue, y: y.ptr() },
            });
        }
    });
}
