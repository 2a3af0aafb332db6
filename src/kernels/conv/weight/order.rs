//! From the order in which weight gradients are summed up to that of the weights.
#![allow(unsafe_code)]

use crate::kernels::conv::Geometry;
use crate::kernels::par;
use crate::kernels::simd::{Kernel, Simd, Vectors, WIDEST, load_up_to, store_up_to};

/// Elements that a task should at least put in order.
const GRAIN: usize = 1 << 14;

/// A sum (panels, taps, C/groups, panel) in the order of the weights, (M, C/groups, taps). Taps that were merged with the input
/// channels are as the others.
pub(in crate::kernels::conv) fn in_order<T: Vectors>(g: &Geometry, panel: usize, sum: &[T], dw: &mut [T]) {
    let (cg, og, taps, lanes) = (g.cg(), g.og(), g.taps(), T::level().lanes);
    let columns = cg * taps;
    // Where the sums of an output begin, `panel` elements apart.
    let start = |o: usize| {
        let (group, o) = (o / og, o % og);
        (group * og.div_ceil(panel) + o / panel) * columns * panel + o % panel
    };
    par::rows(dw, lanes * columns, GRAIN, |block, dw| {
        for (j, dw) in dw.chunks_mut(lanes * columns).enumerate() {
            let (first, outputs) = ((block + j) * lanes, dw.len() / columns);
            let o = first % og;
            if o.is_multiple_of(lanes) && o + outputs <= og {
                let sum = &sum[start(first)..];
                assert!(sum.len() >= (columns - 1) * panel + lanes, "sums of weights");
                let (sum, to) = (sum.as_ptr(), dw.as_mut_ptr());
                let steps = [cg * panel, panel];
                // SAFETY: there is a vector for each of the columns, and the outputs are those of `dw`.
                unsafe { T::dispatch(Outputs { sum, steps, channels: cg, taps, to, row: columns, outputs }) }
                continue;
            }
            // Of several groups.
            for (k, dw) in dw.chunks_exact_mut(columns).enumerate() {
                let sum = &sum[start(first + k)..];
                for (i, dw) in dw.iter_mut().enumerate() {
                    *dw = sum[(i % taps * cg + i / taps) * panel];
                }
            }
        }
    });
}

/// The weights of as many outputs as a vector has lanes, or fewer, by squares that are transposed in registers.
pub(in crate::kernels::conv) struct Outputs<T> {
    /// A vector for each tap and channel, and the elements from a tap to the next and from a channel to the next.
    pub(in crate::kernels::conv) sum: *const T,
    pub(in crate::kernels::conv) steps: [usize; 2],
    pub(in crate::kernels::conv) channels: usize,
    pub(in crate::kernels::conv) taps: usize,
    /// (outputs, channels, taps), so many elements from an output to the next.
    pub(in crate::kernels::conv) to: *mut T,
    pub(in crate::kernels::conv) row: usize,
    pub(in crate::kernels::conv) outputs: usize,
}

impl<T: Vectors> Kernel<T> for Outputs<T> {
    /// # Safety
    /// The vectors must be readable, the outputs' weights writable.
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(self) {
        let Outputs { sum, steps, channels, taps, to, row, outputs } = self;
        let columns = channels * taps;
        let [mut rows, mut square] = [[T::zero(); WIDEST * WIDEST]; 2];
        let (mut channel, mut tap) = (0, 0);
        for first in (0..columns).step_by(S::LANES) {
            let n = S::LANES.min(columns - first);
            // SAFETY: the caller's promise; both buffers hold a square.
            unsafe {
                for i in 0..n {
                    let v = S::load(sum.add(tap * steps[0] + channel * steps[1]));
                    S::store(rows.as_mut_ptr().add(i * S::LANES), v);
                    tap += 1;
                    if tap == taps {
                        (channel, tap) = (channel + 1, 0);
                    }
                }
                if n == S::LANES && outputs == S::LANES {
                    S::transpose(rows.as_ptr(), S::LANES, to.add(first), row);
                    continue;
                }
                S::transpose(rows.as_ptr(), S::LANES, square.as_mut_ptr(), S::LANES);
                for i in 0..outputs {
                    let from = square.as_ptr().add(i * S::LANES);
                    std::ptr::copy_nonoverlapping(from, to.add(i * row + first), n);
                }
            }
        }
    }
}

/// One output's weights from the order (taps, channels), in which blocks sum them up, to (channels, taps).
///
/// # Safety
/// Both must be valid for all of them, and `S`'s instructions be there.
#[inline(always)]
pub(super) unsafe fn taps_last<S: Simd<Elem: Vectors>>(
    [taps, channels]: [usize; 2],
    sum: *const S::Elem,
    to: *mut S::Elem,
) {
    let [mut rows, mut square] = [[num_traits::zero::<S::Elem>(); WIDEST * WIDEST]; 2];
    for tap in (0..taps).step_by(S::LANES) {
        let n = S::LANES.min(taps - tap);
        for channel in (0..channels).step_by(S::LANES) {
            let m = S::LANES.min(channels - channel);
            // SAFETY: the caller's promise; both buffers hold a square.
            unsafe {
                for i in 0..n {
                    let v = load_up_to::<S>(sum.add((tap + i) * channels + channel), m);
                    S::store(rows.as_mut_ptr().add(i * S::LANES), v);
                }
                S::transpose(rows.as_ptr(), S::LANES, square.as_mut_ptr(), S::LANES);
                for i in 0..m {
                    let v = S::load(square.as_ptr().add(i * S::LANES));
                    store_up_to::<S>(to.add((channel + i) * taps + tap), v, n);
                }
            }
        }
    }
}
