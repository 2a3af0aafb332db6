//! The GRU cell: gates z (update), r (reset), n (new) in this order.
//!
//! `z, r = σ(… + h·Rᵀ)`, `n = γ(xₙ + r⊙(h·Rₙᵀ + bₙ))` with the reset after the product, else `γ(xₙ + (r⊙h)·Rₙᵀ + bₙ)`;
//! `h' = (1 − z)⊙n + z⊙h`.

use crate::kernels::math::Math;
use crate::kernels::rnn::{
    Activation, Cell, Inputs, Outputs, Saved, Sequence, Step, beyond, each_row, finish,
};
use crate::kernels::simd::Vectors;

/// What a direction's cell computes with.
#[derive(Debug, Clone, Copy)]
pub struct Gru<'a, T> {
    /// σ, γ of each direction.
    pub activations: &'a [[Activation; 2]; 2],
    pub clip: Option<T>,
    /// The reset comes after the product (`linear_before_reset`); `h·Rₙᵀ + bₙ` is kept of each step.
    pub reset_after: bool,
    /// (D, 3 · hidden, hidden)
    pub r: &'a [T],
    /// (D, 6 · hidden)
    pub b: Option<&'a [T]>,
}

impl<T: Vectors + Math> Cell<T> for Gru<'_, T> {
    fn joint_biases(&self) -> usize {
        if self.reset_after { 2 } else { 3 }
    }

    fn split(&self) -> usize {
        2
    }

    fn step(&self, s: &Sequence, step: Step<T>) {
        let Step { t, d, lengths, started, z, stride, h, c, packed } = step;
        let hidden = s.hidden;
        let [sigma, gamma] = self.activations[d];
        let r = &self.r[d * 3 * hidden * hidden..];
        if started {
            s.recur(z, stride, h, r, [0, 2], packed[0]);
        }
        if self.reset_after {
            for c in c.chunks_exact_mut(hidden) {
                match self.b {
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
                    sigma.apply(self.clip, gates);
                    let (update, reset) = gates.split_at(hidden);
                    if self.reset_after {
                        for ((new, r), c) in new.iter_mut().zip(reset).zip(&*c) {
                            *new += *r * *c;
                        }
                        gamma.apply(self.clip, new);
                        mix(h, update, new);
                    } else {
                        for ((c, r), h) in c.iter_mut().zip(reset).zip(&*h) {
                            *c = *r * *h;
                        }
                    }
                },
            );
        });
        if self.reset_after {
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
                    gamma.apply(self.clip, new);
                    mix(h, &gates[..hidden], new);
                },
            );
        });
    }
}

/// `h = (1 − z)⊙n + z⊙h`
#[inline(always)]
fn mix<T: Math>(h: &mut [T], update: &[T], new: &[T]) {
    for ((h, z), n) in h.iter_mut().zip(update).zip(new) {
        *h = (T::one() - *z) * *n + *z * *h;
    }
}

/// The forward pass; with the reset after the product, something is kept of each step.
pub fn forward<T: Vectors + Math>(
    s: &Sequence,
    cell: &Gru<T>,
    inputs: &Inputs<T>,
    outputs: Outputs<T>,
    scratch: &mut [T],
) {
    super::forward(s, cell, inputs, outputs, scratch);
}

/// Elements of scratch that [`backward`] needs.
pub fn backward_scratch<T: Vectors>(s: &Sequence) -> usize {
    super::backward_scratch::<T>(s, 2)
}

/// Gradients of the gates' arguments (rows, D, 3 · hidden), `dz`, and of the initial state. With the reset after the
/// product, what belongs to the recurrent part is another tensor, `dr`.
pub fn backward<T: Vectors + Math>(
    s: &Sequence,
    cell: &Gru<T>,
    saved: &Saved<T>,
    dz: &mut [T],
    mut dr: Option<&mut [T]>,
    mut dh0: Option<&mut [T]>,
    scratch: &mut [T],
) {
    let hidden = s.hidden;
    let (dh, rest) = scratch.split_at_mut(s.state());
    let (through, room) = rest.split_at_mut(s.state());
    let Some(z) = saved.z else { return };
    if s.batch == 0 {
        return;
    }
    for d in 0..s.directions {
        saved.start(s, d, saved.dh, dh);
        let [sigma, gamma] = cell.activations[d];
        let r = &cell.r[d * 3 * hidden * hidden..];
        let packed = s.pack_back(if dr.is_some() { 3 } else { 2 }, r, room);
        for at in (0..s.steps).rev() {
            let t = s.step(d, at);
            saved.add_dy(s, d, t, dh);
            let rows = s.at(t, d, 3 * hidden);
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
            if let (Some(dr), Some(kept)) = (&mut dr, saved.kept) {
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
                s.recur_back(&dr[rows.start..], rows.stride, r, [0, 3], T::one(), dh, packed[0]);
                continue;
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
        finish(s, d, dh, &mut dh0);
    }
}
