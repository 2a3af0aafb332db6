//! The plain recurrent cell: `h' = f(z + h·Rᵀ)`.

use crate::kernels::math::Math;
use crate::kernels::rnn::{
    Activation, Cell, Inputs, Outputs, Saved, Sequence, Step, beyond, each_row, finish,
};
use crate::kernels::simd::Vectors;

/// What a direction's cell computes with.
#[derive(Debug, Clone, Copy)]
pub struct Simple<'a, T> {
    /// Of each direction.
    pub activations: &'a [[Activation; 1]; 2],
    pub clip: Option<T>,
    /// (D, hidden, hidden)
    pub r: &'a [T],
}

impl<T: Vectors + Math> Cell<T> for Simple<'_, T> {
    fn joint_biases(&self) -> usize {
        1
    }

    fn split(&self) -> usize {
        1
    }

    fn step(&self, s: &Sequence, step: Step<T>) {
        let Step { t, d, lengths, started, z, stride, h, packed, .. } = step;
        let hidden = s.hidden;
        if started {
            s.recur(z, stride, h, &self.r[d * hidden * hidden..], [0, 1], packed[0]);
        }
        let [f] = self.activations[d];
        each_row(s, [(z, stride, hidden), (h, hidden, hidden)], |n, [z, h]| {
            if beyond(lengths, t, n) {
                return;
            }
            T::wide(
                #[inline(always)]
                || {
                    f.apply(self.clip, z);
                    h.copy_from_slice(z);
                },
            );
        });
    }
}

/// The forward pass; nothing is kept but Y.
pub fn forward<T: Vectors + Math>(
    s: &Sequence,
    cell: &Simple<T>,
    inputs: &Inputs<T>,
    outputs: Outputs<T>,
    scratch: &mut [T],
) {
    super::forward(s, cell, inputs, outputs, scratch);
}

/// Elements of scratch that [`backward`] needs.
pub fn backward_scratch<T: Vectors>(s: &Sequence) -> usize {
    super::backward_scratch::<T>(s, 1)
}

/// Gradients of the activation's arguments (rows, D, hidden) and of the initial state.
pub fn backward<T: Vectors + Math>(
    s: &Sequence,
    cell: &Simple<T>,
    saved: &Saved<T>,
    dz: &mut [T],
    mut dh0: Option<&mut [T]>,
    scratch: &mut [T],
) {
    let hidden = s.hidden;
    let (dh, room) = scratch.split_at_mut(s.state());
    let Some(y) = saved.y else { return };
    if s.batch == 0 {
        return;
    }
    for d in 0..s.directions {
        saved.start(s, d, saved.dh, dh);
        let [f] = cell.activations[d];
        let r = &cell.r[d * hidden * hidden..];
        let packed = s.pack_back(1, r, room);
        for at in (0..s.steps).rev() {
            let t = s.step(d, at);
            saved.add_dy(s, d, t, dh);
            let rows = s.at(t, d, hidden);
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
            if at > 0 || dh0.is_some() {
                s.recur_back(&dz[rows.start..], rows.stride, r, [0, 1], T::one(), dh, packed[0]);
            }
        }
        finish(s, d, dh, &mut dh0);
    }
}
