//! How a dense convolution is computed: of elements or of pairs of them, and who packs the weights.
#![allow(unsafe_code)]

use std::ops::Range;

use crate::kernels::conv::blocks::Blocks;
use crate::kernels::conv::dense::Task;
use crate::kernels::conv::grids::{Division, Plan, pad};
use crate::kernels::conv::load::{Load, Operand};
use crate::kernels::conv::near::pair_channels;
use crate::kernels::conv::panels::Unpacked;
use crate::kernels::conv::{paired, slots, strides, volume};
use crate::kernels::matrix::by_blocks;
use crate::kernels::par::LINE;
use crate::kernels::simd::Vectors;
use crate::kernels::tile::Form;

/// What A and the packed weights are made of: elements, or pairs of bfloat16 of neighbouring channels.
pub(super) trait Packs<T: Vectors>: Form<T> {
    /// Elements of scratch for the packing of weights: of all of them, of one panel.
    fn pack_scratch(plan: &Plan, panel: usize) -> [usize; 2];

    /// Packs the weights.
    fn pack(of: &Unpacked<T>, out: &mut [Self], scratch: &mut [T]);

    /// Packs those of panel `p`.
    fn pack_panel(of: &Unpacked<T>, p: usize, out: &mut [Self], scratch: &mut [T]);

    /// # Safety
    /// The task's positions and weights must lie inside the plan's.
    unsafe fn compute(task: Task<Self, T>) {
        // SAFETY: the caller's promise.
        unsafe { Self::dispatch_terms(task) }
    }

    /// A for some images and rows of positions, and the extents of one image of it; `slot`: what [`Way`] has for it.
    fn source(
        plan: &Plan,
        d: &Division,
        x: &Operand<T>,
        images: Range<usize>,
        rows: Range<usize>,
        slot: &mut [T],
    ) -> (*const Self, [usize; 3]);
}

impl<T: Vectors> Packs<T> for T {
    fn pack_scratch(_: &Plan, _: usize) -> [usize; 2] {
        [0; 2]
    }

    fn pack(of: &Unpacked<T>, out: &mut [T], _: &mut [T]) {
        of.pack(out);
    }

    fn pack_panel(of: &Unpacked<T>, p: usize, out: &mut [T], _: &mut [T]) {
        of.pack_panel(p, out);
    }

    fn source(
        plan: &Plan,
        d: &Division,
        x: &Operand<T>,
        images: Range<usize>,
        rows: Range<usize>,
        slot: &mut [T],
    ) -> (*const T, [usize; 3]) {
        let row = rows.start * plan.in_step[plan.axis];
        match (plan.copies(), x.is_plain()) {
            (true, _) => {
                let window = plan.window(d.rows);
                pad(plan, x.data.whole(), images, row, window, slot);
                (slot.as_ptr(), window)
            }
            (false, true) => {
                // (Of rows beyond the input, nothing is read.)
                let row = row.min(plan.source[plan.axis]);
                let start = images.start * volume(plan.source) + row * strides(plan.source, 1)[plan.axis];
                (x.data.whole()[start * plan.groups * plan.ci..].as_ptr(), plan.source)
            }
            // Pointwise: one image, whose positions are rows.
            (false, false) => (x.near(row, rows.len(), slot).as_ptr(), [1, 1, rows.len()]),
        }
    }
}

impl<T: Vectors> Packs<T> for u32 {
    fn pack_scratch(plan: &Plan, panel: usize) -> [usize; 2] {
        [paired::pack_scratch(plan, panel), paired::near(plan, panel)]
    }

    fn pack(of: &Unpacked<T>, out: &mut [u32], scratch: &mut [T]) {
        paired::pack(of, out, scratch);
    }

    fn pack_panel(of: &Unpacked<T>, p: usize, out: &mut [u32], scratch: &mut [T]) {
        paired::pack_panel(of, p, out, scratch);
    }

    unsafe fn compute(task: Task<u32, T>) {
        // SAFETY: the caller's promise.
        unsafe {
            match by_blocks::<T>() {
                true => T::dispatch_pairs(Blocks(task)),
                false => Self::dispatch_terms(task),
            }
        }
    }

    fn source(
        plan: &Plan,
        d: &Division,
        x: &Operand<T>,
        images: Range<usize>,
        rows: Range<usize>,
        slot: &mut [T],
    ) -> (*const u32, [usize; 3]) {
        let row = rows.start * plan.in_step[plan.axis];
        let all = <u32 as Form<T>>::room(&mut *slot);
        let a = all.as_ptr();
        let plain = matches!(x.load, Load::Plain);
        // Pointwise, as above.
        if !plain && pair_channels(x, row, rows.len(), all) {
            return (a, [1, 1, rows.len()]);
        }
        let (out, near) = slot.split_at_mut(plan.slot(d));
        let out = u32::room(out);
        if plain {
            let window = plan.window(d.rows);
            // SAFETY: the kernel has no promise of its own.
            unsafe { T::dispatch_pairs(paired::Pad { plan, x: x.data, images, row, window, out }) }
            return (a, window);
        }
        let (x, out) = (x.near(row, rows.len(), near), &mut out[..rows.len() * plan.ci]);
        // SAFETY: as above.
        unsafe { T::dispatch_pairs(paired::Positions { plan, x, out }) }
        (a, [1, 1, rows.len()])
    }
}

/// Who packs weights. They are read from a core's own cache if it was that core which packed them, and packing them
/// takes less time than fetching them from another's.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Packed {
    /// All tasks together, beforehand.
    Once,
    /// Each slot all of them, for the tasks that run in it: there are few.
    InSlots,
    /// Each task those of its panels, which no other has.
    InTasks,
}

/// Elements of packed weights that each slot has for itself.
const FEW: usize = 1 << 16;

impl Packed {
    /// Of so many elements, where so many tasks read the same.
    pub(super) fn of(readers: usize, weights: usize) -> Packed {
        match () {
            _ if readers == 1 => Packed::InTasks,
            _ if weights <= FEW => Packed::InSlots,
            _ => Packed::Once,
        }
    }
}

/// How a plan is computed.
pub(super) struct Way {
    pub(super) d: Division,
    pub(super) blocks: [usize; 3],
    pub(super) packed: Packed,
    /// Elements of weights for all slots.
    pub(super) shared: usize,
    /// Of a slot: of weights, of scratch to pack them, of results without a place, of the copy of the input.
    pub(super) slot: [usize; 4],
    /// Of scratch to pack all weights at once.
    pack: usize,
}

impl Way {
    /// `plain`: is the input? `kept`: have results a place?
    pub(super) fn new<E: Packs<T>, T: Vectors>(plan: &Plan, plain: bool, kept: bool) -> Way {
        let panel = plan.panel::<T>();
        let d = plan.division(panel);
        let (blocks, weights) = (plan.blocks(&d, panel), plan.packed(panel));
        let packed = Packed::of(blocks[0] * blocks[1], weights);
        let [pack, pack_panel] = E::pack_scratch(plan, panel);
        let (shared, own, pack, near) = match packed {
            Packed::Once => (weights, 0, pack, 0),
            Packed::InSlots => (0, weights, 0, pack_panel),
            Packed::InTasks => (weights, 0, 0, pack_panel),
        };
        let copy = plan.slot(&d) + if plain { 0 } else { d.rows * plan.inputs };
        let whole = |elements: usize| elements.next_multiple_of(LINE);
        let results = if kept { 0 } else { d.images * d.rows * line(plan) };
        Way { d, blocks, packed, shared, slot: [own, near, results, copy].map(whole), pack }
    }

    pub(super) fn room(&self) -> usize {
        self.slot.iter().sum()
    }

    pub(super) fn scratch(&self) -> usize {
        self.shared + slots(volume(self.blocks), self.room()).max(self.pack)
    }
}

/// Results of a row.
pub(super) fn line(plan: &Plan) -> usize {
    volume(plan.target) / plan.target[plan.axis] * plan.groups * plan.co
}

#[cfg(test)]
mod tests {
    use crate::kernels::conv::*;

    /// Whoever packs the weights (of one image each task, of several a slot or all together): the bits are the same.
    #[test]
    fn results_do_not_depend_on_who_packs() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        for (c, oc, size, k, stride, pairs) in [
            (320, 160, 7, 1, 1, false),
            (320, 160, 7, 1, 1, true),
            (96, 160, 14, 3, 2, false),
            (96, 160, 14, 3, 2, true),
            (16, 16, 32, 3, 1, false),
            (24, 24, 8, 3, 1, false),
        ] {
            let of = |n: usize| Geometry {
                layout: Layout::Last,
                n,
                c,
                oc,
                groups: 1,
                axis: 1,
                x: [1, size, size],
                y: [1, size / stride, size / stride],
                k: [1, k, k],
                stride: [1, stride, stride],
                dilation: [1; 3],
                pad: [0, k / 2, k / 2],
                pairs,
            };
            let some = |n: usize, step: f32| (0..n).map(|i| (i as f32 * step).sin()).collect::<Vec<f32>>();
            let w = some(oc * c * k * k, 0.3);
            let results = |n: usize| {
                let g = of(n);
                let (x, dy) = (some(g.inputs(), 0.7), some(g.outputs(), 0.9));
                let (mut y, mut dx) = (vec![f32::NAN; dy.len()], vec![f32::NAN; x.len()]);
                let mut scratch = vec![f32::NAN; forward_scratch::<f32>(&g, true)];
                forward(&g, Operand::plain(&x, c), &w, Epilogue::none(), &mut y, &mut scratch);
                let mut scratch = vec![f32::NAN; input_grad_scratch::<f32>(&g, false)];
                input_grad(
                    &g,
                    Elements::Whole(&dy),
                    &w,
                    Residual::None,
                    ElementsMut::Whole(&mut dx),
                    &mut scratch,
                );
                (y, dx)
            };
            let (y, dx) = pool.install(|| results(1));
            let (all_y, all_dx) = pool.install(|| results(16));
            assert!(y == all_y[..y.len()] && dx == all_dx[..dx.len()], "{:?}", of(1));
            assert!(results(1) == (y, dx), "{:?}", of(1));
        }
    }
}
