//! Sweeps over a parameter, its gradient and its optimizer state.

use crate::kernels::isa::vectorize;
use crate::kernels::par::{GRAIN, reduce};
use crate::tensor::Float;

/// Elements that are updated together.
const RUN: usize = 256;

/// `(param, states) = f(param, states, grad)`, element by element, in fixed pieces. Where gradients and states are all
/// zero, as in the rows of an embedding that were never used, nothing is written if `f` would not change it.
pub fn sweep<T: Float, const N: usize>(
    param: &mut [T],
    states: [&mut [T]; N],
    grad: &[T],
    f: &(impl Fn(T, [T; N], T) -> (T, [T; N]) + Sync),
) {
    let zeros = [T::zero(); N];
    let rests = f(T::one(), zeros, T::zero()) == (T::one(), zeros);
    part(param, states, grad, rests, f);
}

/// A part of [`sweep`]; `rests`: does `f` leave a parameter as it is where the gradient and the states are zero?
fn part<T: Float, const N: usize>(
    param: &mut [T],
    states: [&mut [T]; N],
    grad: &[T],
    rests: bool,
    f: &(impl Fn(T, [T; N], T) -> (T, [T; N]) + Sync),
) {
    let len = param.len();
    if len <= GRAIN {
        vectorize(
            #[inline(always)]
            || {
                let mut states = states.map(|s| &mut s[..len]);
                let grad = &grad[..len];
                // Through buffers of one fixed length, which cannot overlap: only so is the loop vectorised.
                let [mut p, mut g] = [[T::zero(); RUN]; 2];
                let mut s = [[T::zero(); RUN]; N];
                for start in (0..len).step_by(RUN) {
                    let n = RUN.min(len - start);
                    g[..n].copy_from_slice(&grad[start..start + n]);
                    let mut zero = rests && is_zero(&g[..n]);
                    for (s, state) in s.iter_mut().zip(&states) {
                        s[..n].copy_from_slice(&state[start..start + n]);
                        zero = zero && is_zero(&s[..n]);
                    }
                    if zero {
                        continue;
                    }
                    p[..n].copy_from_slice(&param[start..start + n]);
                    for i in 0..RUN {
                        let (next, state) = f(p[i], std::array::from_fn(|k| s[k][i]), g[i]);
                        p[i] = next;
                        for k in 0..N {
                            s[k][i] = state[k];
                        }
                    }
                    param[start..start + n].copy_from_slice(&p[..n]);
                    for (s, state) in s.iter().zip(&mut states) {
                        state[start..start + n].copy_from_slice(&s[..n]);
                    }
                }
            },
        );
        return;
    }
    let mid = (len / 2).next_multiple_of(GRAIN);
    let (param, param_right) = param.split_at_mut(mid);
    let (grad, grad_right) = grad.split_at(mid);
    let mut right: [&mut [T]; N] = std::array::from_fn(|_| &mut [][..]);
    let mut k = 0;
    let left = states.map(|s| {
        let (a, b) = s.split_at_mut(mid);
        right[k] = b;
        k += 1;
        a
    });
    rayon::join(|| part(param, left, grad, rests, f), || part(param_right, right, grad_right, rests, f));
}

#[inline(always)]
fn is_zero<T: Float>(x: &[T]) -> bool {
    // Without a way out early: so it is a few instructions.
    let mut zero = true;
    for x in x {
        zero &= *x == T::zero();
    }
    zero
}

/// `Σ x²`.
pub fn sum_squares<T: Float>(x: &[T]) -> f64 {
    reduce(0..x.len(), GRAIN, &|r| squares(&x[r]), &|a, b| a + b)
}

fn squares<T: Float>(x: &[T]) -> f64 {
    vectorize(
        #[inline(always)]
        || {
            let mut acc = [0.0f64; 32];
            let (head, tail) = x.as_chunks::<32>();
            for chunk in head {
                for (a, x) in acc.iter_mut().zip(chunk) {
                    *a += x.to64() * x.to64();
                }
            }
            for (a, x) in acc.iter_mut().zip(tail) {
                *a += x.to64() * x.to64();
            }
            acc.iter().sum()
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Momentum with weight decay, over runs that rest and runs that do not.
    #[test]
    fn only_what_changes_is_written() {
        let n = 3 * GRAIN + 100;
        for decay in [0.0f32, 0.1] {
            let f = |p: f32, [v]: [f32; 1], g: f32| {
                let v = 0.9 * v + g;
                (p - 0.1 * (v + decay * p), [v])
            };
            let mut param: Vec<f32> = (0..n).map(|i| i as f32 - 100.0).collect();
            let sparse = |i: usize, at: usize| if i / 300 % 3 == at { 0.5 } else { 0.0 };
            let mut velocity: Vec<f32> = (0..n).map(|i| sparse(i, 0)).collect();
            let grad: Vec<f32> = (0..n).map(|i| sparse(i, 1)).collect();
            let expected: Vec<_> = (0..n).map(|i| f(param[i], [velocity[i]], grad[i])).collect();
            sweep(&mut param, [&mut velocity], &grad, &f);
            for (i, (p, [v])) in expected.into_iter().enumerate() {
                assert_eq!((param[i], velocity[i]), (p, v), "element {i}");
            }
        }
    }
}
