//! Pointwise convolutions (1×1 of stride 1): every position by itself, whatever image and row it lies in.
#![allow(unsafe_code)]

use std::ops::Range;

use super::both::{Both, Plain};
use super::grids::Plan;
use super::near::Near;
use super::panels::Unpacked;
use super::{Epilogue, Geometry, dense, slots, volume, weight};
use crate::kernels::ahead::Ahead;
use crate::kernels::matrix::by_blocks;
use crate::kernels::par::{LINE, Shared, in_prepared_slots};
use crate::kernels::simd::Vectors;
use crate::kernels::tile::Pieces;

/// Elements of dW up to which both gradients are computed together: each slab of positions has a sum.
const SMALL: usize = 1 << 14;
const SLABS: usize = 16;
/// Elements of X, dX and dY that a chunk of positions has, to stay in the second-level cache with weights and sums.
const CHUNK: usize = 1 << 15;
/// Positions between which the weights' gradient fetches what is needed next: twice as many of tiles half as large.
const ROW: usize = 8;
/// Positions below which a chunk is not worth its while.
const FEW: usize = 64;

/// Is it one?
pub fn applies(g: &Geometry) -> bool {
    g.groups == 1 && volume(g.k) == 1 && g.stride == [1; 3] && g.pad == [0; 3] && g.x == g.y
}

/// The same with `positions` in a row.
pub fn of(g: &Geometry, positions: usize) -> Geometry {
    Geometry { n: 1, axis: 2, x: [1, 1, positions], y: [1, 1, positions], ..g.clone() }
}

/// The same in rows, where they fill them: see [`ROW`].
fn in_rows<T: Vectors>(g: &Geometry, positions: usize) -> Geometry {
    let row = if T::level().is_roomy() { ROW } else { 2 * ROW };
    match positions.is_multiple_of(row) {
        true => {
            let extents = [1, positions / row, row];
            Geometry { n: 1, axis: 1, x: extents, y: extents, ..g.clone() }
        }
        false => of(g, positions),
    }
}

/// All of its positions.
fn positions(g: &Geometry) -> usize {
    g.n * volume(g.x)
}

/// Worth computing both gradients together?
pub fn fuses(g: &Geometry) -> bool {
    applies(g) && g.c * g.oc <= SMALL && positions(g) >= 4 * FEW
}

/// Positions of a chunk.
fn chunk(g: &Geometry) -> usize {
    (CHUNK / (2 * g.c + g.oc)).max(FEW).next_multiple_of(8)
}

fn chunks(g: &Geometry) -> Pieces {
    Pieces::by(positions(g), chunk(g))
}

pub fn grads_slabs(g: &Geometry) -> usize {
    chunks(g).count.min(SLABS)
}

/// Are the gradients' products of pairs? Blocks of them want more channels than there are.
fn by_pairs<T: Vectors>(g: &Geometry) -> bool {
    g.pairs && g.c.is_multiple_of(2) && g.oc.is_multiple_of(2) && !by_blocks::<T>()
}

/// Of elements, for the weights' gradient.
fn of_elements(g: &Geometry) -> Geometry {
    Geometry { pairs: false, ..g.clone() }
}

/// Elements of a task's slot: of packed weights and scratch to pack them, and of what is near of dY and of X.
fn slot<E: Near<T>, T: Vectors>(g: &Geometry, back: &Plan, [dy, x]: Plain) -> [usize; 4] {
    let panel = back.panel::<T>();
    let near = |channels: usize, plain: bool| E::near_room(chunk(g), channels, plain);
    let pack = E::pack_scratch(back, panel)[1];
    [back.packed(panel), pack, near(g.oc, dy), near(g.c, x)].map(|elements| elements.next_multiple_of(LINE))
}

/// The input gradient of a chunk, of terms of type `E`.
fn back<E: Near<T>, T: Vectors>(g: &Geometry) -> Plan {
    Plan::input_grad(&Geometry { pairs: E::EACH > 1, ..of(g, chunk(g)) })
}

/// Elements of scratch that [`grads`] needs.
pub fn grads_scratch<T: Vectors>(g: &Geometry, plain: Plain) -> usize {
    fn each<E: Near<T>, T: Vectors>(g: &Geometry, plain: Plain) -> usize {
        slot::<E, T>(g, &back::<E, T>(g), plain).iter().sum()
    }
    let slot = if by_pairs::<T>(g) { each::<u32, T>(g, plain) } else { each::<T, T>(g, plain) };
    let slabs = grads_slabs(g);
    slabs * weight::sum_size::<T>(&of_elements(g)) + slots(slabs, slot)
}

/// dX (N, spatial…, C) and dW (M, C, 1…).
pub fn grads<T: Vectors>(g: &Geometry, b: Both<T>, dx: &mut [T], dw: &mut [T], scratch: &mut [T]) {
    match by_pairs::<T>(g) {
        true => grads_of::<u32, T>(g, b, dx, dw, scratch),
        false => grads_of::<T, T>(g, b, dx, dw, scratch),
    }
}

fn grads_of<E: Near<T>, T: Vectors>(g: &Geometry, b: Both<T>, dx: &mut [T], dw: &mut [T], scratch: &mut [T]) {
    let (chunks, slabs, whole) = (chunks(g), grads_slabs(g), of_elements(g));
    let (back, size) = (back::<E, T>(g), weight::sum_size::<T>(&whole));
    let [packed, near, dy_room, x_room] = slot::<E, T>(g, &back, b.plain());
    let panel = back.panel::<T>();
    let weights = back.packed(panel);
    let of = Unpacked { plan: &back, forward: false, panel, w: b.w };
    // Few weights: by each core for itself.
    let prepare = |slot: &mut [T]| {
        let (to, slot) = slot.split_at_mut(packed);
        E::pack(&of, &mut E::room(to)[..weights], &mut slot[..near]);
    };
    let (sums, slot) = scratch.split_at_mut(slabs * size);
    let epilogue = Epilogue { residual: b.addend, ..Epilogue::none() };
    let (shared, to) = (Shared::new(sums), Shared::new(dx));
    in_prepared_slots(slabs, packed + near + dy_room + x_room, slot, prepare, |slab, slot| {
        let (own, rest) = slot.split_at_mut(packed);
        let (dy_room, x_room) = rest[near..].split_at_mut(dy_room);
        let own = &E::room(own)[..weights];
        // SAFETY: the slab's own sums.
        let sum = unsafe { std::slice::from_raw_parts_mut(shared.ptr().add(slab * size), size) };
        // SAFETY: asked for here alone.
        let mut part = b.sums.as_ref().map(|sums| (sums, unsafe { sums.part(slab) }));
        let first = chunks.count * slab / slabs;
        let last = chunks.count * (slab + 1) / slabs;
        for i in first..last {
            let (start, n) = (chunks.start(i), chunks.len(i));
            let [a, dy] = E::both_ways(&b.dy, start, n, dy_room);
            // SAFETY: the positions' elements of dX are this chunk's alone.
            let dx = unsafe { std::slice::from_raw_parts_mut(to.ptr().add(start * g.c), n * g.c) };
            let ahead = b.x.ahead(start..start + n);
            dense::positions(&back, a, own, epilogue.from(start * g.c, n * g.c), (dx, true), ahead);
            if let Some((sums, part)) = &mut part {
                sums.add(start * g.c, dx, part);
            }
            let x = E::across(&b.x, start, n, x_room);
            let ahead = match i + 1 < last {
                true => b.dy.ahead(start + n..start + n + chunks.len(i + 1)),
                false => Ahead::NOTHING,
            };
            weight::add_positions(&in_rows::<T>(&whole, n.div_ceil(E::EACH)), x, dy, i > first, sum, ahead);
        }
    });
    weight::finish(&whole, sums, dw);
    if let Some(sums) = b.sums {
        sums.finish();
    }
}

/// A panel of the outputs of a pointwise convolution, computed some rows at a time for a kernel that reads them.
#[derive(Debug)]
pub(super) struct Panel<'a, T> {
    plan: Plan,
    x: &'a [T],
    weights: &'a [T],
    epilogue: Epilogue<'a, T>,
}

impl<'a, T: Vectors> Panel<'a, T> {
    /// Outputs `channels` of the convolution: their packed `weights`, and the `epilogue` of all outputs. It computes `band`
    /// rows at a time, which it writes `step` elements apart.
    pub(super) fn new(
        g: &Geometry,
        x: &'a [T],
        weights: &'a [T],
        epilogue: Epilogue<'a, T>,
        channels: Range<usize>,
        [band, step]: [usize; 2],
    ) -> Self {
        let extents = [1, band, g.x[2]];
        let part = Geometry { n: 1, oc: channels.len(), axis: 1, x: extents, y: extents, ..g.clone() };
        let mut plan = Plan::forward(&part);
        plan.grids[0].out_step[1] = step;
        let weights = &weights[..plan.packed(plan.panel::<T>())];
        let epilogue = Epilogue { bias: epilogue.bias.map(|bias| &bias[channels]), ..epilogue };
        Panel { plan, x, weights, epilogue }
    }

    pub(super) fn channels(&self) -> usize {
        self.plan.co
    }

    pub(super) fn band(&self) -> usize {
        self.plan.source[1]
    }

    /// Some rows, at most a band of them, from position `first` on.
    pub(super) fn write(&self, first: usize, rows: usize, out: &mut [T]) {
        let band = rows * self.plan.source[2] * self.plan.ci;
        let (x, rest) = self.x[first * self.plan.ci..].split_at(band);
        let next = (rest.as_ptr().cast(), size_of_val(&rest[..band.min(rest.len())]));
        let ahead = Ahead::new([next, (std::ptr::null(), 0)]);
        dense::positions(&self.plan, x, self.weights, self.epilogue, (out, false), ahead);
    }
}
