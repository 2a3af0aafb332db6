//! Which channels of the input a vector of output channels is summed over: of groups narrower than a vector, those of its groups.
#![allow(unsafe_code)]

use crate::kernels::conv::Geometry;
use crate::kernels::simd::{Simd, Vectors, load_lanes, neighbours};

/// How the input's elements for a vector of output channels are found.
pub(super) trait Inputs: Copy + Send + Sync + 'static {
    /// Is each channel convolved by itself?
    const ALONE: bool;

    /// The element that each lane multiplies.
    ///
    /// # Safety
    /// `x` must be the vector's channels of a position, all of whose channels can be read, and the processor have `S`'s instructions.
    unsafe fn of<S: Simd, const WHOLE: bool>(
        self,
        x: *const S::Elem,
        lanes: usize,
        member: &Member<S>,
    ) -> S::V;
}

/// Depthwise.
#[derive(Clone, Copy)]
pub(super) struct Own;

/// Groups of neighbouring lanes.
#[derive(Clone, Copy)]
pub(super) struct Within;

/// Each group's channel of one number.
#[derive(Clone, Copy)]
pub(super) struct Member<S: Simd>(S::Places);

impl<S: Simd> Member<S> {
    /// Of groups of `width` channels.
    ///
    /// # Safety
    /// The processor must have `S`'s instructions.
    #[inline(always)]
    pub(super) unsafe fn new(width: usize, number: usize) -> Self {
        // SAFETY: the caller's promise.
        Member(unsafe { neighbours::<S>(width, number) })
    }
}

impl Inputs for Own {
    const ALONE: bool = true;

    #[inline(always)]
    unsafe fn of<S: Simd, const WHOLE: bool>(self, x: *const S::Elem, lanes: usize, _: &Member<S>) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { load_lanes::<S, WHOLE>(x, lanes) }
    }
}

impl Inputs for Within {
    const ALONE: bool = false;

    #[inline(always)]
    unsafe fn of<S: Simd, const WHOLE: bool>(
        self,
        x: *const S::Elem,
        lanes: usize,
        member: &Member<S>,
    ) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::pick(load_lanes::<S, WHOLE>(x, lanes), member.0) }
    }
}

/// Is this a convolution of such groups, each of as many outputs as inputs? (A group of a vector or more is as well computed as dense.)
pub fn applies<T: Vectors>(g: &Geometry) -> bool {
    let (width, level) = (g.cg(), T::level());
    let near = width.is_power_of_two() && width <= level.near && width < level.lanes;
    g.groups > 1 && width == g.og() && (width == 1 || near && !g.pairs)
}

/// Calls a kernel with the way in which a convolution that [`applies`] finds its inputs.
macro_rules! with_inputs {
    ($g:expr, $inputs:ident => $run:expr) => {
        match $g.cg() {
            1 => {
                let $inputs = $crate::kernels::conv::depthwise::inputs::Own;
                $run
            }
            _ => {
                let $inputs = $crate::kernels::conv::depthwise::inputs::Within;
                $run
            }
        }
    };
}

pub(super) use with_inputs;
