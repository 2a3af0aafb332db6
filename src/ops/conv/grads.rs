//! Both gradients of a convolution in one pass, with the normalisations around it.

use std::sync::Arc;

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::conv::{self as kernel, Both, Geometry, Load, NormGrad, Operand, Residual, Sums};
use crate::kernels::elementwise::Clamp;
use crate::kernels::half::{Elements, Half};
use crate::kernels::norm::ChannelGrad;
use crate::ops::conv::{Conv, expect, floats, normalised, per_channel, residual, same_type, short};
use crate::ops::half::{computed, elements, widened};
use crate::ops::{Cx, Grads, Op, get, need};
use crate::tensor::{DType, Dims, Meta, View, ViewMut};

/// dX (N, spatial…, C) and dW (M, C/groups, k…), of dimensions `w`, of a convolution whose channels are last.
///
/// Inputs dY, W, X and an addend of dX, absent unless `adds`; then
/// - where the convolution normalises X: mean, inverse deviation, scale and shift of that (C);
/// - with `back`, dY being the gradient of a batch normalisation's result: what that read (N, spatial…, M), its scale,
///   mean, inverse deviation, dscale and dshift (M), and its shift (M) where an activation's clamp is given.
///
/// With `sums`, outputs 2 and 3 are dscale and dshift (C) of the normalisation of X.
#[derive(Debug, Clone)]
pub struct ConvGrads {
    pub conv: Conv,
    pub w: Dims,
    pub adds: bool,
    pub back: Option<Back>,
    pub sums: bool,
}

/// The activation after a batch normalisation whose gradient is computed as it is read, if there is one.
pub type Back = Option<Clamp<f64>>;

/// The inputs that every such node has.
const FIRST: usize = 4;

impl ConvGrads {
    /// Is there such a kernel for this convolution?
    pub fn can(conv: &Conv, x: &Meta, w: &[usize]) -> bool {
        conv.geometry(&x.dims, w).is_ok_and(|(g, _)| kernel::fuses(&g))
    }

    /// Operands of these types: pairs are of what lies whole or in bfloat16.
    fn geometry(&self, x: &[usize], types: [Option<DType>; 2]) -> Result<Geometry, OpError> {
        let (g, _) = self.conv.geometry(x, &self.w)?;
        Ok(Geometry { pairs: g.pairs && !types.contains(&Some(DType::F16)), ..g })
    }

    /// The input with which `back` begins.
    fn behind(&self) -> usize {
        FIRST + if self.conv.normalises.is_some() { 4 } else { 0 }
    }
}

impl Op for ConvGrads {
    fn name(&self) -> &'static str {
        "ConvGrads"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (dy, w, x) = (need(inputs, 0)?, need(inputs, 1)?, need(inputs, 2)?);
        same_type(dy, w)?;
        same_type(dy, &widened(x))?;
        expect(&w.dims, &self.w)?;
        let (g, y) = self.conv.geometry(&x.dims, &self.w)?;
        expect(&dy.dims, &y)?;
        if let Some(a) = get(inputs, 3) {
            same_type(dy, a)?;
            expect(&a.dims, &x.dims)?;
        }
        if self.conv.normalises.is_some() {
            per_channel(inputs.get(FIRST..FIRST + 4).unwrap_or(&[None]), dy, g.c)?;
        }
        if let Some(passed) = self.back {
            let at = self.behind();
            same_type(dy, &widened(need(inputs, at)?))?;
            expect(&need(inputs, at)?.dims, &y)?;
            let count = if passed.is_some() { 6 } else { 5 };
            per_channel(inputs.get(at + 1..at + 1 + count).unwrap_or(&[None]), dy, g.oc)?;
        }
        let mut made = vec![Meta::new(dy.dtype, &x.dims), Meta::new(dy.dtype, &self.w)];
        if self.sums {
            let channel = Meta::new(dy.dtype, &[g.c]);
            made.extend([channel.clone(), channel]);
        }
        Ok(made)
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (dy, w, input) = (need(x, 0)?, need(x, 1)?, need(x, 2)?);
        let g = self.geometry(
            input.dims,
            [Some(input.dtype), x.get(self.behind()).copied().flatten().map(|x| x.dtype)],
        )?;
        let [Some(dx), Some(dw), more @ ..] = y else {
            return Err(OpError::Internal("two outputs are needed".into()));
        };
        float_dispatch!(dy.dtype, T => {
            let input = elements::<T>(input)?;
            let room = if self.sums { kernel::sums_room(&g) } else { 0 };
            let (room, scratch) = cx.scratch.split_at_mut_checked(room * size_of::<f64>()).ok_or_else(short)?;
            let (coefficients, scratch) = floats::<T>(scratch)?.split_at_mut_checked(g.c + 3 * g.oc).ok_or_else(short)?;
            let (factor, coefficients) = coefficients.split_at_mut(g.c);
            let norm = match self.conv.normalises {
                Some(clamp) => Some(normalised(&x[FIRST..], clamp, factor)?),
                None => None,
            };
            let load = match self.back {
                None => Load::Plain,
                Some(passed) => {
                    let of = |i: usize| need(x, self.behind() + i)?.get::<T>();
                    let (factor, k) = coefficients.split_at_mut(g.oc);
                    let (k1, k2) = k.split_at_mut(g.oc);
                    let grad = ChannelGrad {
                        scale: of(1)?,
                        mean: of(2)?,
                        inv: of(3)?,
                        dscale: of(4)?,
                        dshift: of(5)?,
                        passed: None,
                    };
                    grad.coefficients(need(x, 0)?.len() / g.oc.max(1), factor, k1, k2);
                    let passed = match passed {
                        Some(clamp) => Some((of(6)?, clamp.to())),
                        None => None,
                    };
                    Load::NormGrad(NormGrad { x: elements(need(x, self.behind())?)?, mean: grad.mean, factor, k1, k2, passed })
                }
            };
            let sums = match (self.sums, norm, more) {
                (false, ..) => None,
                (true, Some(norm), [Some(dscale), Some(dshift)]) => {
                    let inv = need(x, FIRST + 1)?.get::<T>()?;
                    let results = [dscale.get::<T>()?, dshift.get::<T>()?];
                    Some(Sums::new(input, norm, inv, results, floats(room)?))
                }
                _ => return Err(OpError::Internal("sums of no normalisation".into())),
            };
            let both = Both {
                dy: Operand { data: Elements::Whole(dy.get::<T>()?), channels: g.oc, load },
                x: Operand { data: input, channels: g.c, load: norm.map_or(Load::Plain, Load::Norm) },
                w: w.get::<T>()?,
                addend: if self.adds { residual(x, 3)? } else { Residual::None },
                sums,
            };
            kernel::grads(&g, both, dx.get::<T>()?, dw.get::<T>()?, scratch);
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let Some(x) = get(inputs, 2) else { return 0 };
        let (half, dtype) = (Half::of(x.dtype).is_some(), computed(x));
        let plain = [self.back.is_none(), self.conv.normalises.is_none() && !half];
        let types = [Some(x.dtype), get(inputs, self.behind()).map(|x| x.dtype)];
        self.geometry(&x.dims, types).map_or(0, |g| {
            let elements = match dtype {
                DType::F64 => kernel::grads_scratch::<f64>(&g, plain),
                _ => kernel::grads_scratch::<f32>(&g, plain),
            };
            let room = if self.sums { kernel::sums_room(&g) } else { 0 };
            room * size_of::<f64>() + (elements + g.c + 3 * g.oc) * dtype.size()
        })
    }

    fn by_pairs(&self) -> Option<Arc<dyn Op>> {
        Some(Arc::new(ConvGrads { conv: self.conv.paired()?, ..self.clone() }))
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(3, 0)]
    }

    fn reads_half(&self, _: &[Option<&Meta>], input: usize) -> bool {
        input == 2 || self.back.is_some() && input == self.behind()
    }

    fn multiply_adds(&self, inputs: &[Option<&Meta>]) -> usize {
        let Some(x) = get(inputs, 2) else { return 0 };
        self.conv.geometry(&x.dims, &self.w).map_or(0, |(g, _)| 2 * g.multiply_adds())
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("second derivatives of Conv".into()))
    }
}
