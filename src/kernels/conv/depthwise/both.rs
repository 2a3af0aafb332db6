//! Both gradients of a depthwise convolution in one pass over its tensors.
#![allow(unsafe_code)]

use super::weight::{add_row, finish};
use super::{Direction, Sweep, in_tap_order};
use crate::kernels::conv::both::{Both, Plain, Sums};
use crate::kernels::conv::load::Rows;
use crate::kernels::conv::{Epilogue, Geometry, slots, split};
use crate::kernels::par::{LINE, Shared, in_prepared_slots};
use crate::kernels::simd::{Kernel, Simd, Vectors};

/// Sums of dW, each over a share of the rows of dY.
const SLABS: usize = 16;

struct Task<'a, T> {
    back: Sweep<'a, T>,
    dy: Rows<'a, T>,
    x: Rows<'a, T>,
    /// Rows of dY, all images' counted.
    rows: std::ops::Range<usize>,
    dw: &'a mut [T],
    sums: Option<(&'a Sums<'a, T>, &'a mut [f64])>,
}

impl<T: Vectors> Kernel<T> for Task<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(mut self) {
        let g = self.back.way.g;
        self.dw.fill(T::zero());
        let line = g.x[2] * g.c;
        for row in self.rows.clone() {
            let [image, _, o1] = split(row, [g.n, 1, g.y[1]]);
            // The rows of X that belong to this one of dY, and the first of X and of dY that only the next will need.
            let last = if o1 + 1 == g.y[1] { g.x[1] } else { ((o1 + 1) * g.stride[1]).min(g.x[1]) };
            let own = (o1 * g.stride[1]).min(last)..last;
            let x_next = o1 * g.stride[1] + (g.k[1] - 1) * g.dilation[1] + 1;
            let dy_next = (own.end.saturating_sub(1) + g.pad[1]) / g.stride[1] + 1;
            // SAFETY: rows that there are; those of dX are this task's, and written when they are read.
            unsafe {
                let dy = self.dy.at(image, 0, o1);
                let soon = self.dy.raw(image, 0, dy_next).unwrap_or([std::ptr::null(); 2]);
                add_row::<S>(g, row, dy, soon, &mut self.x, self.dw);
                for i1 in own.clone() {
                    let start = (image * g.x[1] + i1) * line;
                    let soon = (x_next + i1 - own.start).saturating_sub(g.pad[1]);
                    let soon = self.x.raw(image, 0, soon).map(|x| x[0]);
                    self.back.row::<S>(&mut self.dy, image * g.x[1] + i1, soon);
                    let dx = std::slice::from_raw_parts(self.back.y.add(start), line);
                    if let Some((sums, part)) = &mut self.sums {
                        sums.add(start, dx, part);
                    }
                }
            }
        }
    }
}

pub fn grads_slabs(g: &Geometry) -> usize {
    (g.n * g.y[1]).min(SLABS)
}

/// Elements of a task's rings of dY and of X.
fn rings(g: &Geometry, [dy, x]: Plain) -> [usize; 2] {
    [Direction::back(g).ring(dy), Direction::forward(g).ring(x)]
}

/// Elements of room for the weights of a task, in whole lines.
fn weights(g: &Geometry) -> usize {
    (g.taps() * g.c).next_multiple_of(LINE)
}

/// Elements of scratch that [`grads`] needs.
pub fn grads_scratch(g: &Geometry, plain: Plain) -> usize {
    let slabs = grads_slabs(g);
    slabs * g.taps() * g.c + slots(slabs, weights(g) + rings(g, plain).iter().sum::<usize>())
}

/// dX (N, spatial…, C) and dW (C, 1, k…), over at most two dimensions.
pub fn grads<T: Vectors>(g: &Geometry, b: Both<T>, dx: &mut [T], dw: &mut [T], scratch: &mut [T]) {
    let (size, slabs, total) = (g.taps() * g.c, grads_slabs(g), g.n * g.y[1]);
    let (sums, slots) = scratch.split_at_mut(slabs * size);
    let [dy_ring, x_ring] = rings(g, b.plain());
    let way = Direction::back(g);
    let epilogue = Epilogue { residual: b.addend, ..Epilogue::none() };
    let (shared, dx) = (Shared::new(sums), Shared::new(dx));
    let weights = weights(g);
    let prepare = |slot: &mut [T]| in_tap_order(g, b.w, slot);
    in_prepared_slots(slabs, weights + dy_ring + x_ring, slots, prepare, |slab, slot| {
        let (w, rest) = slot.split_at_mut(weights);
        let (dy, x) = rest.split_at_mut(dy_ring);
        // SAFETY: the slab's own sum.
        let dw = unsafe { std::slice::from_raw_parts_mut(shared.ptr().add(slab * size), size) };
        let task = Task {
            back: Sweep { way, w, epilogue, y: dx.ptr() },
            dy: way.rows(b.dy, dy),
            x: Direction::forward(g).rows(b.x, x),
            rows: total * slab / slabs..total * (slab + 1) / slabs,
            dw,
            // SAFETY: asked for here alone.
            sums: b.sums.as_ref().map(|sums| (sums, unsafe { sums.part(slab) })),
        };
        // SAFETY: the extents were checked; a row of dX belongs to one row of dY.
        unsafe { T::dispatch(task) }
    });
    finish(g, sums, dw);
    if let Some(sums) = b.sums {
        sums.finish();
    }
}
