//! A batch normalisation by the batch's statistics with an activation that does more than to clamp, where channels lie last: what the one
//! passes to the other is neither written nor kept.

use std::sync::Arc;

use super::{BatchNormalization, ChannelParamGrad, room, room_bytes};
use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::layout::Layout;
use crate::kernels::norm::{self, Channels, Stat};
use crate::ops::unary::{HardSwish, Kind, LeakyRelu, Mish, Swish, Unary, UnaryGrad};
use crate::ops::{Cx, Grads, Op, get, need, out};
use crate::tensor::{Float, Meta, View, ViewMut};

/// The operators in the place of an activation behind a normalisation and of its gradient.
pub struct Gated {
    pub channels: Channels,
}

/// `$made` of the activation, one of those that are joined, whose operator (`$op` of it) this is.
macro_rules! made_of {
    ($of:expr, $op:ident, $made:ident, $channels:expr) => {
        made_of!(@ $of, $op, $made, $channels, Swish, HardSwish, Mish, LeakyRelu)
    };
    (@ $of:expr, $op:ident, $made:ident, $channels:expr, $($kind:ty),+) => {
        None::<Arc<dyn Op>>$(.or_else(|| {
            let op = $of.as_a::<$op<$kind>>()?;
            Some(Arc::new($made { gate: op.0, channels: $channels }))
        }))+
    };
}

impl Gated {
    /// Behind this normalisation of x.
    pub fn behind(norm: &BatchNormalization, x: &Meta) -> Option<Gated> {
        let fits = norm.training && norm.spatial && norm.layout == Layout::Last && norm.clamp.is_none();
        fits.then(|| Gated { channels: norm.channels(&x.dims) })
    }

    /// Of the normalisation's x, scale, shift, mean and inverse deviation, in the place of an activation.
    pub fn forward(&self, activation: &dyn Op) -> Option<Arc<dyn Op>> {
        made_of!(activation, Unary, GatedNorm, self.channels)
    }

    /// Of these and dY, in the place of an activation's gradient; it sums up the gradients of scale and shift as well.
    pub fn backward(&self, gradient: &dyn Op) -> Option<Arc<dyn Op>> {
        made_of!(gradient, UnaryGrad, GatedNormGrad, self.channels)
    }

    /// Are these the gradients of scale and shift?
    pub fn has_sums(&self, sums: &ChannelParamGrad) -> bool {
        sums.channels == self.channels && sums.stat == Stat::Channel && sums.epsilon.is_none()
    }
}

/// `factor = scale·inv`, as the normalisation itself computes it.
fn set_factor<T: Float>(factor: &mut [T], scale: &[T], inv: &[T]) {
    for ((f, scale), inv) in factor.iter_mut().zip(scale).zip(inv) {
        *f = T::of(scale.to64() * inv.to64());
    }
}

/// `y = f((x − mean)·inv·scale + shift)` (N, …, C). Inputs x (N, …, C), scale, shift, mean and inverse deviation (C).
#[derive(Debug)]
struct GatedNorm<K> {
    gate: K,
    channels: Channels,
}

impl<K: Kind> Op for GatedNorm<K> {
    fn name(&self) -> &'static str {
        "GatedNorm"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        Ok(vec![Meta::new(x.dtype, &x.dims)])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (y, d, gate) = (out(y, 0)?, self.channels, self.gate);
        float_dispatch!(y.dtype, T => {
            let of = |i: usize| need(x, i)?.get::<T>();
            let input = get(x, 0).map(|x| x.get::<T>()).transpose()?;
            let (_, factor) = room::<T>(cx, 0, d.c)?;
            set_factor(factor, of(1)?, of(4)?);
            norm::gated(
                input,
                y.get::<T>()?,
                d,
                [of(3)?, factor, of(2)?],
                #[inline(always)]
                |y, z| gate.f_all(y, z),
            );
            Ok(())
        })
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(0, 0)]
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        get(inputs, 0).map_or(0, |x: &Meta| room_bytes(0, self.channels.c, x.dtype))
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("what is joined after the gradients".into()))
    }
}

/// Gradients of [`GatedNorm`]: dz (N, …, C), of what the activation is applied to, dscale and dshift (C). Inputs x, dY (N, …, C), scale,
/// shift, mean and inverse deviation (C).
#[derive(Debug)]
struct GatedNormGrad<K> {
    gate: K,
    channels: Channels,
}

impl<K: Kind> Op for GatedNormGrad<K> {
    fn name(&self) -> &'static str {
        "GatedNormGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        let channel = Meta::new(x.dtype, &[self.channels.c]);
        Ok(vec![Meta::new(x.dtype, &x.dims), channel.clone(), channel])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let [Some(dz), dscale, dshift] = y else {
            return Err(OpError::Internal("three outputs are needed".into()));
        };
        let (d, gate) = (self.channels, self.gate);
        float_dispatch!(dz.dtype, T => {
            let of = |i: usize| need(x, i)?.get::<T>();
            let dy = get(x, 1).map(|dy| dy.get::<T>()).transpose()?;
            let (partials, scratch) = room::<T>(cx, d.partials(), 3 * d.c)?;
            let (factor, spare) = scratch.split_at_mut(d.c);
            let (spare0, spare1) = spare.split_at_mut(d.c);
            let dscale = dscale.as_mut().map_or(Ok(spare0), |y| y.get::<T>())?;
            let dshift = dshift.as_mut().map_or(Ok(spare1), |y| y.get::<T>())?;
            set_factor(factor, of(2)?, of(5)?);
            norm::gated_grad(
                of(0)?,
                dy,
                dz.get::<T>()?,
                d,
                [of(4)?, factor, of(3)?],
                of(5)?,
                #[inline(always)]
                |dz, z, dy| gate.vjp_all(dz, z, dy),
                (dscale, dshift),
                partials,
            );
            Ok(())
        })
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(1, 0)]
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let d = self.channels;
        get(inputs, 0).map_or(0, |x: &Meta| room_bytes(d.partials(), 3 * d.c, x.dtype))
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("second derivatives are not supported".into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::eval;
    use crate::ops::unary::Gelu;
    use crate::tensor::{DType, Tensor};

    /// Results and gradients are those of the two operators one after the other, to the bit, however rows and strips of them lie.
    #[test]
    fn both_at_once_are_one_after_the_other() {
        for (n, c) in [(1, 1), (7, 3), (300, 24), (19, 257), (2100, 96), (5, 513), (130, 1100), (0, 4)] {
            let of = |dims: &[usize], low: f64, high: f64| {
                let x = (0..dims.iter().product()).map(|i: usize| ((i * 7919) % 1009) as f64 / 1009.0);
                let x: Vec<f64> = x.map(|x| low + (high - low) * x).collect();
                Tensor::from_slice(dims, &x).unwrap().cast(DType::F32)
            };
            let (x, dy) = (of(&[n, c], -3.0, 4.0), of(&[n, c], 1.0, -1.0));
            let (scale, shift, mean, inv) =
                (of(&[c], 0.5, 2.0), of(&[c], -1.0, 1.0), of(&[c], 0.0, 0.5), of(&[c], 0.3, 0.9));
            let channels = Channels { n, c, s: 1 };
            let norm = Arc::new(super::super::again::Normalise {
                of: BatchNormalization {
                    epsilon: 0.0,
                    momentum: 0.9,
                    spatial: true,
                    layout: Layout::Last,
                    training: true,
                    unbiased: false,
                    follow: false,
                    clamp: crate::kernels::elementwise::Clamp::NONE,
                    given: true,
                    puts_out: crate::ops::half::PutOut::Whole,
                },
            });
            let run = |op: &dyn Op, inputs: &[&Tensor]| {
                eval(op, &inputs.iter().map(|t| Some(*t)).collect::<Vec<_>>()).unwrap()
            };
            let z = &run(norm.as_ref(), &[&x, &scale, &shift, &mean, &inv])[0];
            let y = &run(&Unary(Gelu {}), &[z])[0];
            let got = run(&GatedNorm { gate: Gelu {}, channels }, &[&x, &scale, &shift, &mean, &inv]);
            assert!(got[0].bytes() == y.bytes(), "{n} x {c}");
            let dz = &run(&UnaryGrad(Gelu {}), &[z, &dy])[0];
            let sums = ChannelParamGrad { channels, stat: Stat::Channel, epsilon: None };
            let sums = run(&sums, &[&x, dz, &mean, &inv]);
            let op = GatedNormGrad { gate: Gelu {}, channels };
            let got = run(&op, &[&x, &dy, &scale, &shift, &mean, &inv]);
            for (got, want) in got.iter().zip([dz, &sums[0], &sums[1]]) {
                assert!(got.bytes() == want.bytes(), "{n} x {c}");
            }
            // dY may lie in dz, and x in y.
            let mut inputs = [&x, &dy, &scale, &shift, &mean, &inv].map(|t| Some(t.view()));
            inputs[1] = None;
            let mut made = [dy.clone(), sums[0].clone(), sums[1].clone()];
            let mut outputs = made.each_mut().map(|t| Some(t.view_mut()));
            let metas = [Some(&x.meta())];
            let mut scratch = crate::tensor::Buffer::zeroed(op.scratch(&metas));
            op.forward(&mut Cx { scratch: scratch.bytes_mut(), seed: 0 }, &inputs, &mut outputs).unwrap();
            assert!(made[0].bytes() == dz.bytes() && made[1].bytes() == sums[0].bytes(), "{n} x {c}");
            let mut made = x.clone();
            let inputs = [None, Some(scale.view()), Some(shift.view()), Some(mean.view()), Some(inv.view())];
            let op = GatedNorm { gate: Gelu {}, channels };
            op.forward(
                &mut Cx { scratch: scratch.bytes_mut(), seed: 0 },
                &inputs,
                &mut [Some(made.view_mut())],
            )
            .unwrap();
            assert!(made.bytes() == y.bytes(), "{n} x {c}");
        }
    }
}
