//! The GRU cell: gates z (update), r (reset), n (new) in this order.
//!
//! `z, r = σ(… + h·Rᵀ)`, `n = γ(xₙ + r⊙(h·Rₙᵀ + bₙ))` with the reset after the product, else `γ(xₙ + (r⊙h)·Rₙᵀ + bₙ)`;
//! `h' = (1 − z)⊙n + z⊙h`.

use crate::kernels::math::Math;
use crate::kernels::rnn::{Cell, Saved, Sequence, Step, StepBack, beyond, each_row};
use crate::kernels::simd::Vectors;

pub(super) fn step<T: Vectors + Math>(cell: &Cell<T>, reset_after: bool, s: &Sequence, step: Step<T>) {
    let Step { t, d, lengths, started, z, stride, h, c, packed } = step;
    let hidden = s.hidden;
    let [sigma, gamma, _] = cell.activations[d];
    let r = cell.weights(s, d);
    if started {
        s.recur(z, stride, h, r, [0, 2], packed[0]);
    }
    if reset_after {
        for c in c.chunks_exact_mut(hidden) {
            match cell.b {
                Some(b) => c.copy_from_slice(&b[(d * 6 + 5) * hidden..][..hidden]),
                None => c.fill(T::zero()),
            }
        }
        if started {
            s.recur(c, hidden, h, &r[2 * hidden * hidden..], [0, 1], packed[1]);
        }
    }
    let gates = [(&mut *z, stride, 3 * hidden), (&mut *h, hidden, hidden), (&mut *c, hidden, hidden)];
    each_row(s, gates, |n, [z, h, c]| {
        if beyond(lengths, t, n) {
            return;
        }
        T::wide(
            #[inline(always)]
            || {
                let (gates, new) = z.split_at_mut(2 * hidden);
                sigma.apply(cell.clip, gates);
                let (update, reset) = gates.split_at(hidden);
                if reset_after {
                    for ((new, r), c) in new.iter_mut().zip(reset).zip(&*c) {
                        *new += *r * *c;
                    }
                    gamma.apply(cell.clip, new);
                    mix(h, update, new);
                } else {
                    for ((c, r), h) in c.iter_mut().zip(reset).zip(&*h) {
                        *c = *r * *h;
                    }
                }
            },
        );
    });
    if reset_after {
        return;
    }
    if started {
        s.recur(z, stride, c, r, [2, 1], packed[1]);
    }
    each_row(s, [(z, stride, 3 * hidden), (h, hidden, hidden)], |n, [z, h]| {
        if beyond(lengths, t, n) {
            return;
        }
        T::wide(
            #[inline(always)]
            || {
                let (gates, new) = z.split_at_mut(2 * hidden);
                gamma.apply(cell.clip, new);
                mix(h, &gates[..hidden], new);
            },
        );
    });
}

/// `h = (1 − z)⊙n + z⊙h`
#[inline(always)]
fn mix<T: Math>(h: &mut [T], update: &[T], new: &[T]) {
    for ((h, z), n) in h.iter_mut().zip(update).zip(new) {
        *h = (T::one() - *z) * *n + *z * *h;
    }
}

pub(super) fn back<T: Vectors + Math>(cell: &Cell<T>, s: &Sequence, saved: &Saved<T>, step: StepBack<T>) {
    let StepBack { t, d, rows, dz, dr, dh, dc: through, packed, .. } = step;
    let hidden = s.hidden;
    let Some(z) = saved.z else { return };
    let [sigma, gamma, _] = cell.activations[d];
    let r = cell.weights(s, d);
    // dn, dz, and the way past the gates.
    let buffers = [(&mut dz[rows.start..], rows.stride, 3 * hidden), (&mut *dh, hidden, hidden)];
    each_row(s, buffers, |n, [dz, dh]| {
        if beyond(saved.lengths, t, n) {
            return dz.fill(T::zero());
        }
        let z = rows.of(z, n, 3 * hidden);
        let (update, new) = (&z[..hidden], &z[2 * hidden..]);
        let before = saved.h_before(s, d, t, n);
        T::wide(
            #[inline(always)]
            || {
                let (gates, dn) = dz.split_at_mut(2 * hidden);
                let du = &mut gates[..hidden];
                for ((d, dh), z) in dn.iter_mut().zip(&*dh).zip(update) {
                    *d = *dh * (T::one() - *z);
                }
                gamma.back(cell.clip, new, dn);
                for ((d, dh), n) in du.iter_mut().zip(&*dh).zip(new) {
                    *d = -*dh * *n;
                }
                if let Some(before) = before {
                    for ((d, dh), h) in du.iter_mut().zip(&*dh).zip(before) {
                        *d += *dh * *h;
                    }
                }
                sigma.back(cell.clip, update, du);
                dh.iter_mut().zip(update).for_each(|(d, z)| *d *= *z);
            },
        );
    });
    if let (Some(dr), Some(kept)) = (dr, saved.kept) {
        let buffers = [
            (&mut dz[rows.start..], rows.stride, 3 * hidden),
            (&mut dr[rows.start..], rows.stride, 3 * hidden),
        ];
        each_row(s, buffers, |n, [dz, recurrent]| {
            if beyond(saved.lengths, t, n) {
                return recurrent.fill(T::zero());
            }
            let reset = &rows.of(z, n, 3 * hidden)[hidden..2 * hidden];
            let kept = s.at(t, d, hidden).of(kept, n, hidden);
            T::wide(
                #[inline(always)]
                || {
                    let (gates, dn) = dz.split_at_mut(2 * hidden);
                    let d_reset = &mut gates[hidden..];
                    for ((d, dn), q) in d_reset.iter_mut().zip(&*dn).zip(kept) {
                        *d = *dn * *q;
                    }
                    sigma.back(cell.clip, reset, d_reset);
                    let (same, last) = recurrent.split_at_mut(2 * hidden);
                    same.copy_from_slice(gates);
                    for ((d, dn), r) in last.iter_mut().zip(&*dn).zip(reset) {
                        *d = *dn * *r;
                    }
                },
            );
        });
        return s.recur_back(&dr[rows.start..], rows.stride, r, [0, 3], T::one(), dh, packed[0]);
    }
    let new = &dz[rows.start + 2 * hidden..];
    s.recur_back(new, rows.stride, r, [2, 1], T::zero(), through, packed[1]);
    let buffers = [
        (&mut dz[rows.start..], rows.stride, 3 * hidden),
        (&mut *dh, hidden, hidden),
        (&mut *through, hidden, hidden),
    ];
    each_row(s, buffers, |n, [dz, dh, through]| {
        if beyond(saved.lengths, t, n) {
            return;
        }
        let reset = &rows.of(z, n, 3 * hidden)[hidden..2 * hidden];
        let before = saved.h_before(s, d, t, n);
        T::wide(
            #[inline(always)]
            || {
                for ((dh, d), r) in dh.iter_mut().zip(&*through).zip(reset) {
                    *dh += *d * *r;
                }
                let d_reset = &mut dz[hidden..2 * hidden];
                match before {
                    Some(before) => {
                        for ((d, t), h) in d_reset.iter_mut().zip(&*through).zip(before) {
                            *d = *t * *h;
                        }
                        sigma.back(cell.clip, reset, d_reset);
                    }
                    None => d_reset.fill(T::zero()),
                }
            },
        );
    });
    s.recur_back(&dz[rows.start..], rows.stride, r, [0, 2], T::one(), dh, packed[0]);
}
