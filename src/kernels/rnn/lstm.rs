//! The LSTM cell: gates i, o, f, g in this order.
//!
//! `i = σ(zᵢ + Pᵢ⊙c)`, `f = σ(z_f + P_f⊙c)` (or `1 − i`), `g = γ(z_g)`, `c' = f⊙c + i⊙g`, `o = σ(zₒ + Pₒ⊙c')`,
//! `h' = o⊙η(c')`.

use crate::kernels::math::Math;
use crate::kernels::rnn::{Cell, Saved, Sequence, Step, StepBack, beyond, each_row};
use crate::kernels::simd::Vectors;

/// Peepholes of i, o, f of direction `d`.
fn peepholes<'a, T>(cell: &Cell<'a, T>, d: usize, hidden: usize) -> Option<[&'a [T]; 3]> {
    cell.peepholes.map(|p| std::array::from_fn(|i| &p[(d * 3 + i) * hidden..][..hidden]))
}

#[inline(always)]
fn add_product<T: Math>(z: &mut [T], p: &[T], c: &[T]) {
    for ((z, p), c) in z.iter_mut().zip(p).zip(c) {
        *z += *p * *c;
    }
}

pub(super) fn step<T: Vectors + Math>(cell: &Cell<T>, coupled: bool, s: &Sequence, step: Step<T>) {
    let Step { t, d, lengths, started, z, stride, h, c, packed } = step;
    let hidden = s.hidden;
    if started {
        s.recur(z, stride, h, cell.weights(s, d), [0, 4], packed[0]);
    }
    let [sigma, gamma, eta] = cell.activations[d];
    let peepholes = peepholes(cell, d, hidden);
    let buffers = [(z, stride, 4 * hidden), (h, hidden, hidden), (c, hidden, hidden)];
    each_row(s, buffers, |n, [z, h, c]| {
        if beyond(lengths, t, n) {
            return;
        }
        T::wide(
            #[inline(always)]
            || {
                let (i, rest) = z.split_at_mut(hidden);
                let (o, rest) = rest.split_at_mut(hidden);
                let (f, g) = rest.split_at_mut(hidden);
                if let Some([pi, _, pf]) = peepholes {
                    add_product(i, pi, c);
                    add_product(f, pf, c);
                }
                sigma.apply(cell.clip, i);
                gamma.apply(cell.clip, g);
                match coupled {
                    true => f.iter_mut().zip(&*i).for_each(|(f, i)| *f = T::one() - *i),
                    false => sigma.apply(cell.clip, f),
                }
                for (((c, f), i), g) in c.iter_mut().zip(&*f).zip(&*i).zip(&*g) {
                    *c = *f * *c + *i * *g;
                }
                if let Some([_, po, _]) = peepholes {
                    add_product(o, po, c);
                }
                sigma.apply(cell.clip, o);
                h.copy_from_slice(c);
                eta.apply(None, h);
                h.iter_mut().zip(&*o).for_each(|(h, o)| *h *= *o);
            },
        );
    });
}

pub(super) fn back<T: Vectors + Math>(
    cell: &Cell<T>,
    coupled: bool,
    s: &Sequence,
    saved: &Saved<T>,
    step: StepBack<T>,
) {
    let StepBack { t, d, goes_on, rows, dz, dh, dc, room: value, packed, .. } = step;
    let hidden = s.hidden;
    let (Some(z), Some(kept)) = (saved.z, saved.kept) else { return };
    let [sigma, gamma, eta] = cell.activations[d];
    let peepholes = peepholes(cell, d, hidden);
    let buffers = [
        (&mut dz[rows.start..], rows.stride, 4 * hidden),
        (&mut *dh, hidden, hidden),
        (&mut *dc, hidden, hidden),
        (&mut *value, hidden, hidden),
    ];
    each_row(s, buffers, |n, [dz, dh, dc, value]| {
        if beyond(saved.lengths, t, n) {
            return dz.fill(T::zero());
        }
        let z = rows.of(z, n, 4 * hidden);
        let (i, o) = (&z[..hidden], &z[hidden..2 * hidden]);
        let (f, g) = (&z[2 * hidden..3 * hidden], &z[3 * hidden..]);
        let c = s.at(t, d, hidden).of(kept, n, hidden);
        let before = saved.c_before(s, d, t, n);
        T::wide(
            #[inline(always)]
            || {
                let (di, rest) = dz.split_at_mut(hidden);
                let (d_o, rest) = rest.split_at_mut(hidden);
                let (df, dg) = rest.split_at_mut(hidden);
                // h' = o⊙η(c')
                value.copy_from_slice(c);
                eta.apply(None, value);
                for ((d, dh), v) in d_o.iter_mut().zip(&*dh).zip(&*value) {
                    *d = *dh * *v;
                }
                sigma.back(cell.clip, o, d_o);
                dh.iter_mut().zip(o).for_each(|(d, o)| *d *= *o);
                eta.back(None, value, dh);
                dc.iter_mut().zip(&*dh).for_each(|(a, b)| *a += *b);
                if let Some([_, po, _]) = peepholes {
                    add_product(dc, po, d_o);
                }
                // c' = f⊙c + i⊙g
                for ((d, dc), g) in di.iter_mut().zip(&*dc).zip(g) {
                    *d = *dc * *g;
                }
                for ((d, dc), i) in dg.iter_mut().zip(&*dc).zip(i) {
                    *d = *dc * *i;
                }
                match before {
                    Some(before) => {
                        for ((d, dc), c) in df.iter_mut().zip(&*dc).zip(before) {
                            *d = *dc * *c;
                        }
                    }
                    None => df.fill(T::zero()),
                }
                dc.iter_mut().zip(f).for_each(|(d, f)| *d *= *f);
                if coupled {
                    di.iter_mut().zip(&*df).for_each(|(i, f)| *i -= *f);
                    df.fill(T::zero());
                } else {
                    sigma.back(cell.clip, f, df);
                }
                sigma.back(cell.clip, i, di);
                gamma.back(cell.clip, g, dg);
                if let Some([pi, _, pf]) = peepholes {
                    add_product(dc, pi, di);
                    add_product(dc, pf, df);
                }
                // What goes back through the recurrent weights comes next.
                dh.fill(T::zero());
            },
        );
    });
    if goes_on {
        let r = cell.weights(s, d);
        s.recur_back(&dz[rows.start..], rows.stride, r, [0, 4], T::one(), dh, packed[0]);
    }
}

/// `dP` (D, 3 · hidden): `Σ_t dzᵢ⊙c_{t−1}`, `Σ_t dzₒ⊙c_t`, `Σ_t dz_f⊙c_{t−1}`.
pub fn peephole_grad<T: Vectors>(s: &Sequence, saved: &Saved<T>, dz: &[T], dp: &mut [T]) {
    let hidden = s.hidden;
    dp.fill(T::zero());
    let Some(kept) = saved.kept else { return };
    for (d, dp) in dp.chunks_exact_mut(3 * hidden).enumerate() {
        for at in 0..s.steps {
            let t = s.step(d, at);
            for n in (0..s.batch).filter(|n| !beyond(saved.lengths, t, *n)) {
                let dz = s.at(t, d, 4 * hidden).of(dz, n, 4 * hidden);
                let now = s.at(t, d, hidden).of(kept, n, hidden);
                let before = saved.c_before(s, d, t, n);
                for (gate, c) in [before, Some(now), before].into_iter().enumerate() {
                    let Some(c) = c else { continue };
                    let (dp, dz) = (&mut dp[gate * hidden..][..hidden], &dz[gate * hidden..][..hidden]);
                    for ((p, z), c) in dp.iter_mut().zip(dz).zip(c) {
                        *p += *z * *c;
                    }
                }
            }
        }
    }
}
