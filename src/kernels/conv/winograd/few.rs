//! Many weights for few tiles (the last layers of a network, or one image of others): transformed, the weights of a layer would
//! be four times as many and go through the memory, or from one core to the others. So all tiles are transformed first; then
//! each task transforms the weights of one panel, a block of input channels at a time, and multiplies while they are near.
#![allow(unsafe_code)]

use std::ops::Range;

use super::forward::{Multiply, Target, Transform, Weights};
use super::moments::Parts;
use super::source::{Source, room, transform};
use super::transform::{IN, Inputs};
use super::{Tiles, Transformed};
use crate::kernels::conv::grids::Plan;
use crate::kernels::conv::results::SharedResults;
use crate::kernels::conv::{Epilogue, in_slots, slots};
use crate::kernels::half::{Elements, ElementsMut};
use crate::kernels::par::Shared;
use crate::kernels::simd::{Simd, Vectors};
use crate::kernels::tile::{Form, TermKernel, Terms};

/// Weights from which on, and tiles up to which, it pays; for fewer weights, output channels for each tile.
const WEIGHTS: usize = 1 << 17;
const TILES: usize = 64;
const CHANNELS: usize = 4;
/// Input channels whose weights are transformed at a time.
const BLOCK: usize = 64;
/// Tiles that a task transforms.
const EACH: usize = 4;

pub(super) fn applies(plan: &Plan) -> bool {
    let tiles = Tiles::of(plan.n, plan.target).total;
    tiles <= TILES && (plan.ci * plan.co >= WEIGHTS || plan.co >= CHANNELS * tiles)
}

/// Transformed inputs, in terms of `each` channels, and the products with one panel.
fn layouts(plan: &Plan, each: usize, panel: usize) -> [Transformed; 2] {
    let tiles = Tiles::of(plan.n, plan.target).total;
    let terms = plan.ci.div_ceil(each);
    [Transformed::new(tiles, terms, panel / 2), Transformed::new(tiles, panel, panel / 2)]
}

fn weights(plan: &Plan, each: usize, panel: usize) -> usize {
    Weights::new(BLOCK.min(plan.ci), each, panel).size()
}

pub(super) fn scratch(plan: &Plan, each: usize, panel: usize, half: bool) -> usize {
    let [x, m] = layouts(plan, each, panel);
    let widened = slots(each_tasks(Tiles::of(plan.n, plan.target)), room(plan.source, plan.ci, half));
    plan.ci + x.size() + slots(plan.panels(panel), weights(plan, each, panel) + m.size()).max(widened)
}

/// The tiles of a source.
struct TransformInputs<'a, E, T> {
    of: Tiles,
    tiles: Range<usize>,
    source: Source<'a, T>,
    layout: Transformed,
    to: *mut E,
}

impl<E: Form<T>, T: Vectors> TermKernel<E, T> for TransformInputs<'_, E, T> {
    #[inline(always)]
    unsafe fn run<D: Terms<Term = E, S: Simd<Elem = T>>>(mut self) {
        // SAFETY: the promise of whoever made it.
        unsafe {
            let all = 0..self.source.channels;
            transform::<D, Inputs, IN, true>(
                &self.of,
                self.tiles,
                &mut self.source,
                all,
                &self.layout,
                self.to,
            )
        }
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
struct Panel<'a, E, T> {
    panel: usize,
    forward: bool,
    w: &'a [T],
    x: *const E,
    layouts: [Transformed; 2],
    weights: &'a mut [T],
    products: *mut T,
    target: Target<'a, T>,
}

impl<E: Form<T>, T: Vectors> TermKernel<E, T> for Panel<'_, E, T> {
    #[inline(always)]
    unsafe fn run<D: Terms<Term = E, S: Simd<Elem = T>>>(self) {
        let (plan, panel) = (self.target.plan, 2 * D::S::LANES);
        let tiles = self.target.tiles.total;
        let mut first = 0;
        while first < plan.ci {
            let inputs = first..plan.ci.min(first + BLOCK);
            let layout = Weights::new(inputs.len(), E::EACH, panel);
            let (p, w, forward) = (self.panel, self.w, self.forward);
            let transform = Transform { plan, forward, p, inputs: inputs.clone(), w, out: self.weights };
            // SAFETY: the buffers have the layouts' sizes.
            unsafe {
                TermKernel::<E, T>::run::<D>(transform);
                let multiply = Multiply {
                    tiles,
                    x: self.x.add(first / E::EACH),
                    x_layout: self.layouts[0],
                    terms: inputs.len().div_ceil(E::EACH),
                    weights: self.weights.as_ptr().cast(),
                    weights_product: layout.product,
                    to: self.products,
                    to_layout: self.layouts[1],
                    vectors: self.target.vectors::<D::S>(self.panel),
                    add: first > 0,
                };
                multiply.run::<D>();
            }
            first = inputs.end;
        }
        // SAFETY: as above.
        unsafe { self.target.write::<D>(0, 0..tiles, self.panel, self.products, &self.layouts[1]) }
    }
}

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
    let of = Tiles::of(plan.n, plan.target);
    let layouts = layouts(plan, E::EACH, panel);
    let (zeros, rest) = scratch.split_at_mut(plan.ci);
    zeros.fill(T::zero());
    let zeros: &[T] = zeros;
    let (transformed, slots) = rest.split_at_mut(layouts[0].size());
    let shared = Shared::new(E::room(transformed));
    each(of, room(plan.source, plan.ci, !x.is_whole()), slots, |tiles, near| {
        let to = shared.ptr().wrapping_add(tiles.start * layouts[0].tile);
        let source = Source::of(plan, x, zeros, near);
        // SAFETY: the input has the plan's extents; no two tasks write the same tiles.
        unsafe { E::dispatch_terms(TransformInputs { of, tiles, source, layout: layouts[0], to }) }
    });
    let y = SharedResults::new(y);
    let size = weights(plan, E::EACH, panel);
    in_slots(plan.panels(panel), size + layouts[1].size(), slots, |p, slot| {
        let (weights, products) = slot.split_at_mut(size);
        // SAFETY: `y` and the residual have the plan's extents; no two tasks write the same channels.
        unsafe {
            E::dispatch_terms(Panel {
                panel: p,
                forward,
                w,
                x: shared.ptr().cast_const(),
                layouts,
                weights,
                products: products.as_mut_ptr(),
                target: Target { plan, tiles: of, epilogue, y: y.to(), moments },
            });
        }
    });
}
