//! Both gradients of a convolution in one pass over its tensors, and with them those of the normalisation in front.
//!
//! Where channels are few, gradients of depthwise and pointwise (1×1) convolutions wait for memory. What one of them
//! reads serves the other while it is near; what a normalisation passes on is computed as it is read.
#![allow(unsafe_code)]

use super::load::{Norm, Operand};
use super::{Geometry, Residual, depthwise, pointwise};
use crate::kernels::half::Elements;
use crate::kernels::layout::Layout;
use crate::kernels::norm;
use crate::kernels::par::Shared;
use crate::kernels::simd::Vectors;

/// What [`grads`] reads.
pub struct Both<'a, T> {
    /// (N, spatial…, M)
    pub dy: Operand<'a, T>,
    /// (N, spatial…, C)
    pub x: Operand<'a, T>,
    /// (M, C/groups, k…)
    pub w: &'a [T],
    /// Is added to dX.
    pub addend: Residual<'a, T>,
    pub sums: Option<Sums<'a, T>>,
}

/// The gradients of the normalisation that made X: `dscale = inv·Σ dz·(x − mean)` and `dshift = Σ dz`, where `dz` is
/// dX where the clamp let X pass, else 0.
pub struct Sums<'a, T> {
    x: Elements<'a, T>,
    norm: Norm<'a, T>,
    inv: &'a [T],
    dscale: &'a mut [T],
    dshift: &'a mut [T],
    parts: Shared<'a, f64>,
    slabs: usize,
}

impl<'a, T: Vectors> Sums<'a, T> {
    /// `x` is what the normalisation read. `room`: [`sums_room`] elements.
    pub fn new(
        x: Elements<'a, T>,
        norm: Norm<'a, T>,
        inv: &'a [T],
        [dscale, dshift]: [&'a mut [T]; 2],
        room: &'a mut [f64],
    ) -> Self {
        let c = inv.len();
        assert!(dscale.len() == c && dshift.len() == c && norm.mean.len() == c, "sums of a normalisation");
        room.fill(0.0);
        let slabs = room.len() / (2 * c).max(1);
        Sums { x, norm, inv, dscale, dshift, parts: Shared::new(room), slabs }
    }

    /// What a slab adds to.
    ///
    /// # Safety
    /// Each slab is asked for once.
    pub(super) unsafe fn part(&self, slab: usize) -> &'a mut [f64] {
        assert!(slab < self.slabs);
        let size = 2 * self.inv.len();
        // SAFETY: inside the room; the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.parts.ptr().add(slab * size), size) }
    }

    /// Adds what `dx`, whole positions from element `start` on, contributes.
    pub(super) fn add(&self, start: usize, dx: &[T], part: &mut [f64]) {
        let n = &self.norm;
        let x = self.x.part(start..start + dx.len());
        norm::add_param_grad(x, dx, n.mean, (n.factor, n.shift, n.clamp), part);
    }

    pub(super) fn finish(self) {
        let size = 2 * self.inv.len();
        // SAFETY: the room, to which nobody adds any more.
        let parts = unsafe { std::slice::from_raw_parts(self.parts.ptr(), self.slabs * size) };
        norm::merge_param_grad(parts, self.inv, self.dscale, self.dshift);
    }
}

/// Is there such a pass for this convolution, worth its while?
pub fn fuses(g: &Geometry) -> bool {
    !g.is_empty() && g.layout == Layout::Last && if g.depthwise() { g.axis > 0 } else { pointwise::fuses(g) }
}

/// Elements of `f64` that [`Sums`] need.
pub fn sums_room(g: &Geometry) -> usize {
    let slabs = if g.depthwise() { depthwise::grads_slabs(g) } else { pointwise::grads_slabs(g) };
    slabs * 2 * g.c
}

/// Are dY and X read where they lie?
pub type Plain = [bool; 2];

impl<T: Vectors> Both<'_, T> {
    pub(super) fn plain(&self) -> Plain {
        [self.dy.is_plain(), self.x.is_plain()]
    }
}

/// Elements of scratch that [`grads`] needs.
pub fn grads_scratch<T: Vectors>(g: &Geometry, plain: Plain) -> usize {
    match g.depthwise() {
        true => depthwise::grads_scratch(g, plain),
        false => pointwise::grads_scratch::<T>(g, plain),
    }
}

/// dX and dW of a convolution that [`fuses`].
pub fn grads<T: Vectors>(g: &Geometry, both: Both<T>, dx: &mut [T], dw: &mut [T], scratch: &mut [T]) {
    g.check_sizes(dx.len(), both.dy.data.len());
    g.check_sizes(both.x.data.len(), both.dy.data.len());
    assert!(both.sums.as_ref().is_none_or(|s| s.x.len() == dx.len()), "sums of a normalisation");
    assert!(fuses(g), "gradients in one pass");
    both.dy.check();
    both.x.check();
    match g.depthwise() {
        true => depthwise::grads(g, both, dx, dw, scratch),
        false => pointwise::grads(g, both, dx, dw, scratch),
    }
}
