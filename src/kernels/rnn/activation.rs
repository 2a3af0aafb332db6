//! The activation functions of recurrent cells.

use crate::kernels::math::Math;

/// A function of ONNX's list, with its parameters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activation {
    /// `αx + β`
    Affine {
        alpha: f32,
        beta: f32,
    },
    Relu,
    /// `x` where it is positive, else `αx`.
    LeakyRelu {
        alpha: f32,
    },
    /// `x` where it is above `α`, else 0.
    ThresholdedRelu {
        alpha: f32,
    },
    Tanh,
    /// `α·tanh(βx)`
    ScaledTanh {
        alpha: f32,
        beta: f32,
    },
    Sigmoid,
    /// `αx + β`, within 0 and 1.
    HardSigmoid {
        alpha: f32,
        beta: f32,
    },
    /// `x` where it is positive, else `α(eˣ − 1)`.
    Elu {
        alpha: f32,
    },
    /// `x / (1 + |x|)`
    Softsign,
    /// `ln(1 + eˣ)`
    Softplus,
}

impl Activation {
    /// Does the derivative follow from the value alone?
    pub fn is_invertible(self) -> bool {
        match self {
            Activation::LeakyRelu { alpha } | Activation::Elu { alpha } => alpha >= 0.0,
            Activation::ScaledTanh { alpha, .. } => alpha != 0.0,
            _ => true,
        }
    }

    /// `z = f(clip(z))`, where the clip bounds the argument on both sides.
    #[inline(always)]
    pub(super) fn apply<T: Math>(self, clip: Option<T>, z: &mut [T]) {
        if let Some(c) = clip {
            z.iter_mut().for_each(|z| *z = z.min(c).max(-c));
        }
        let (zero, one) = (T::zero(), T::one());
        let of = |x: f32| T::of(f64::from(x));
        match self {
            Activation::Sigmoid => z.iter_mut().for_each(|z| *z = z.m_sigmoid()),
            Activation::Tanh => z.iter_mut().for_each(|z| *z = z.m_tanh()),
            Activation::Relu => z.iter_mut().for_each(|z| *z = z.max(zero)),
            Activation::Affine { alpha, beta } => {
                z.iter_mut().for_each(|z| *z = of(alpha) * *z + of(beta));
            }
            Activation::LeakyRelu { alpha } => {
                z.iter_mut().for_each(|z| *z = if *z > zero { *z } else { of(alpha) * *z });
            }
            Activation::ThresholdedRelu { alpha } => {
                z.iter_mut().for_each(|z| *z = if *z > of(alpha) { *z } else { zero });
            }
            Activation::ScaledTanh { alpha, beta } => {
                z.iter_mut().for_each(|z| *z = of(alpha) * (of(beta) * *z).m_tanh());
            }
            Activation::HardSigmoid { alpha, beta } => {
                z.iter_mut().for_each(|z| *z = (of(alpha) * *z + of(beta)).max(zero).min(one));
            }
            Activation::Elu { alpha } => {
                z.iter_mut().for_each(|z| *z = if *z > zero { *z } else { of(alpha) * z.m_expm1() });
            }
            Activation::Softsign => z.iter_mut().for_each(|z| *z /= one + z.abs()),
            Activation::Softplus => {
                // (Of `for_each`, so much code would become a function of the baseline.)
                for z in z {
                    *z = z.max(zero) + (-z.abs()).m_exp().m_ln1p();
                }
            }
        }
    }

    /// `d *= f'(x)`, `y` being `f(clip(x))`: 0 where the clip bounded the argument.
    #[inline(always)]
    pub(super) fn back<T: Math>(self, clip: Option<T>, y: &[T], d: &mut [T]) {
        let (zero, one) = (T::zero(), T::one());
        let of = |x: f32| T::of(f64::from(x));
        let each = d.iter_mut().zip(y);
        match self {
            Activation::Sigmoid => each.for_each(|(d, y)| *d *= *y * (one - *y)),
            Activation::Tanh => each.for_each(|(d, y)| *d *= one - *y * *y),
            Activation::Relu => each.for_each(|(d, y)| *d = if *y > zero { *d } else { zero }),
            Activation::Affine { alpha, .. } => each.for_each(|(d, _)| *d *= of(alpha)),
            Activation::LeakyRelu { alpha } => {
                each.for_each(|(d, y)| *d = if *y > zero { *d } else { *d * of(alpha) });
            }
            Activation::ThresholdedRelu { .. } => {
                each.for_each(|(d, y)| *d = if *y != zero { *d } else { zero });
            }
            // αβ(1 − (y/α)²)
            Activation::ScaledTanh { alpha, beta } => {
                each.for_each(|(d, y)| *d *= of(beta) * (of(alpha) - *y * *y / of(alpha)));
            }
            Activation::HardSigmoid { alpha, .. } => {
                each.for_each(|(d, y)| {
                    *d = if (*y > zero) & (*y < one) { *d * of(alpha) } else { zero };
                });
            }
            Activation::Elu { alpha } => {
                each.for_each(|(d, y)| *d = if *y > zero { *d } else { *d * (*y + of(alpha)) });
            }
            Activation::Softsign => each.for_each(|(d, y)| *d *= (one - y.abs()) * (one - y.abs())),
            Activation::Softplus => each.for_each(|(d, y)| *d *= -(-*y).m_expm1()),
        }
        if let Some(c) = clip {
            let mut ends = [-c, c];
            self.apply(None, &mut ends);
            let (low, high) = (ends[0].min(ends[1]), ends[0].max(ends[1]));
            let each = d.iter_mut().zip(y);
            each.for_each(|(d, y)| *d = if (*y > low) & (*y < high) { *d } else { zero });
        }
    }
}
