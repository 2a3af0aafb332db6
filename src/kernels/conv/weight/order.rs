//! From the order in which weight gradients are summed up to that of the weights.
#![allow(unsafe_code)]

use crate::kernels::conv::Geometry;
use crate::kernels::par;
use crate::kernels::simd::{Kernel, Simd, Vectors};

/// Elements that a task should at least put in order, and of a square of the widest vectors.
const GRAIN: usize = 1 << 14;
const SQUARE: usize = 16 * 16;

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
                // SAFETY: the kernel has no promise of its own.
                unsafe { T::dispatch(Outputs { sum, panel, taps, columns, dw }) }
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

/// As many outputs as a vector has lanes, or fewer, by squares that are transposed in registers.
struct Outputs<'a, T> {
    /// From the first output's first element on.
    sum: &'a [T],
    panel: usize,
    taps: usize,
    /// C/groups times taps.
    columns: usize,
    /// (outputs, C/groups, taps)
    dw: &'a mut [T],
}

impl<T: Vectors> Kernel<T> for Outputs<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(self) {
        let Outputs { sum, panel, taps, columns, dw } = self;
        let (cg, outputs) = (columns / taps, dw.len() / columns);
        assert!(sum.len() >= (columns - 1) * panel + S::LANES, "sums of weights");
        let [mut rows, mut square] = [[T::zero(); SQUARE]; 2];
        let (mut channel, mut tap) = (0, 0);
        for first in (0..columns).step_by(S::LANES) {
            let n = S::LANES.min(columns - first);
            for i in 0..n {
                // SAFETY: the sum has as many rows, of at least a vector.
                unsafe {
                    let v = S::load(sum.as_ptr().add((tap * cg + channel) * panel));
                    S::store(rows.as_mut_ptr().add(i * S::LANES), v);
                }
                tap += 1;
                if tap == taps {
                    (channel, tap) = (channel + 1, 0);
                }
            }
            let whole = n == S::LANES && outputs == S::LANES;
            let (to, step) = match whole {
                true => (dw[first..].as_mut_ptr(), columns),
                false => (square.as_mut_ptr(), S::LANES),
            };
            // SAFETY: of a whole square, each row lies in an output's weights.
            unsafe { S::transpose(rows.as_ptr(), S::LANES, to, step) }
            if !whole {
                for (dw, square) in dw.chunks_exact_mut(columns).zip(square.chunks_exact(S::LANES)) {
                    dw[first..first + n].copy_from_slice(&square[..n]);
                }
            }
        }
    }
}
