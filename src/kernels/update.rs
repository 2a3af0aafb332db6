//! Sweeps over a parameter, its gradient and its optimizer state.

use crate::kernels::isa::vectorize;
use crate::kernels::par::{GRAIN, reduce};
use crate::tensor::Float;

/// Elements that are updated together.
const RUN: usize = 256;

/// `(param, states) = f(param, states, grad)`, element by element, in fixed pieces.
pub fn sweep<T: Float, const N: usize>(
    param: &mut [T],
    states: [&mut [T]; N],
    grad: &[T],
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
                    p[..n].copy_from_slice(&param[start..start + n]);
                    g[..n].copy_from_slice(&grad[start..start + n]);
                    for (s, state) in s.iter_mut().zip(&states) {
                        s[..n].copy_from_slice(&state[start..start + n]);
                    }
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
    rayon::join(|| sweep(param, left, grad, f), || sweep(param_right, right, grad_right, f));
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
