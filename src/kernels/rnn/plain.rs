//! The plain recurrent cell: `h' = f(z + h·Rᵀ)`.

use crate::kernels::math::Math;
use crate::kernels::rnn::{Cell, Saved, Sequence, Step, StepBack, beyond, each_row};
use crate::kernels::simd::Vectors;

pub(super) fn step<T: Vectors + Math>(cell: &Cell<T>, s: &Sequence, step: Step<T>) {
    let Step { t, d, lengths, started, z, stride, h, packed, .. } = step;
    let hidden = s.hidden;
    if started {
        s.recur(z, stride, h, cell.weights(s, d), [0, 1], packed[0]);
    }
    let [f, ..] = cell.activations[d];
    each_row(s, [(z, stride, hidden), (h, hidden, hidden)], |n, [z, h]| {
        if beyond(lengths, t, n) {
            return;
        }
        T::wide(
            #[inline(always)]
            || {
                f.apply(cell.clip, z);
                h.copy_from_slice(z);
            },
        );
    });
}

pub(super) fn back<T: Vectors + Math>(cell: &Cell<T>, s: &Sequence, saved: &Saved<T>, step: StepBack<T>) {
    let StepBack { t, d, goes_on, rows, dz, dh, packed, .. } = step;
    let hidden = s.hidden;
    let Some(y) = saved.y else { return };
    let [f, ..] = cell.activations[d];
    let buffers = [(&mut dz[rows.start..], rows.stride, hidden), (&mut *dh, hidden, hidden)];
    each_row(s, buffers, |n, [dz, dh]| {
        if beyond(saved.lengths, t, n) {
            return dz.fill(T::zero());
        }
        let y = s.y(t, d).of(y, n, hidden);
        T::wide(
            #[inline(always)]
            || {
                dz.copy_from_slice(dh);
                f.back(cell.clip, y, dz);
                dh.fill(T::zero());
            },
        );
    });
    if goes_on {
        let r = cell.weights(s, d);
        s.recur_back(&dz[rows.start..], rows.stride, r, [0, 1], T::one(), dh, packed[0]);
    }
}
