//! Sweeps over a parameter, its gradient and its optimizer state.

use crate::kernels::isa::vectorize;
use crate::kernels::par::{GRAIN, reduce};
use crate::tensor::Float;

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
                let (states, grad) = (states.map(|s| &mut s[..len]), &grad[..len]);
                for i in 0..len {
                    let (p, s) = f(param[i], std::array::from_fn(|k| states[k][i]), grad[i]);
                    param[i] = p;
                    for k in 0..N {
                        states[k][i] = s[k];
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
