//! Convolution and its gradients.

mod statistics;
#[cfg(test)]
mod tests;
mod transpose;

use std::sync::Arc;

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::conv::{self as kernel, Epilogue, Geometry, Load, Residual};
use crate::kernels::elementwise::Clamp;
use crate::kernels::layout::Layout;
use crate::kernels::norm::Channels;
use crate::ops::batch_norm::ChannelSum;
use crate::ops::clip::passed;
use crate::ops::window::Window;
use crate::ops::{ChannelsLast, Cx, Grads, Op, Row, Spec, get, need, out};
use crate::tensor::{DType, Dims, Float, Meta, View, ViewMut};

pub use statistics::ConvStatistics;
pub(super) use transpose::ROWS as TRANSPOSED_ROWS;
#[cfg(test)]
pub(super) use transpose::cases as transposed_cases;
pub use transpose::{ConvTranspose, ConvTransposeInputGrad, ConvTransposeWeightGrad};

/// ONNX `Conv` (opset 1): X (N, C, spatial…), W (M, C/group, kernel…), B (M), over one to three dimensions.
///
/// Fused: Y = clamp(W * X + B + R), the residual R (N, M, spatial…) being input 3.
#[derive(Debug, Clone)]
pub struct Conv {
    pub window: Window,
    pub groups: usize,
    /// What is done to the result last.
    pub clamp: Clamp<f64>,
    /// Of X and Y, and of their gradients; the weights lie as in the file.
    pub layout: Layout,
}

impl Conv {
    fn make(s: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let groups = s.attrs.int_or("group", 1)?;
        if groups < 1 {
            return Err(OpError::Attribute(format!("'group' is {groups}")));
        }
        // The fourth is ours.
        if s.inputs > 3 {
            return Err(OpError::Shape(format!("Conv with {} inputs", s.inputs)));
        }
        Ok(Arc::new(Conv {
            window: Window::of(s.attrs)?,
            groups: groups as usize,
            clamp: Clamp::NONE,
            layout: Layout::First,
        }))
    }

    /// This convolution with the channels of X and Y last.
    fn last(&self) -> Conv {
        Conv { layout: Layout::Last, ..self.clone() }
    }

    fn epilogue<'a, T: Float>(&self, x: &[Option<View<'a>>]) -> Result<Epilogue<'a, T>, OpError> {
        Ok(Epilogue {
            bias: get(x, 2).map(|b| b.get::<T>()).transpose()?,
            residual: residual(x, 3)?,
            clamp: self.clamp.to(),
        })
    }

    /// The sizes, and the output's dimensions.
    fn geometry(&self, x: &[usize], w: &[usize]) -> Result<(Geometry, Dims), OpError> {
        let x = &self.layout.ordinary(x);
        let bad = || OpError::Shape(format!("Conv of {x:?} with weights of {w:?} in {} groups", self.groups));
        if x.len() < 3
            || w.len() != x.len()
            || w[1] * self.groups != x[1]
            || !w[0].is_multiple_of(self.groups)
        {
            return Err(bad());
        }
        let r = self.window.resolve(&x[2..], &w[2..])?;
        let g = Geometry {
            layout: self.layout,
            n: x[0],
            c: x[1],
            oc: w[0],
            groups: self.groups,
            axis: r.axis,
            x: r.x,
            y: r.y,
            k: r.k,
            stride: r.stride,
            dilation: r.dilation,
            pad: r.pad,
        };
        let y = self.layout.of(&r.output([x[0], w[0]]));
        Ok((g, y))
    }
}

/// Bytes of scratch that a kernel needs, by its function for either element type.
fn room(g: &Geometry, dtype: DType, [single, double]: [fn(&Geometry) -> usize; 2]) -> usize {
    match dtype {
        DType::F64 => double(g) * size_of::<f64>(),
        _ => single(g) * size_of::<f32>(),
    }
}

fn floats<T: Float>(scratch: &mut [u8]) -> Result<&mut [T], OpError> {
    let whole = scratch.len() / size_of::<T>() * size_of::<T>();
    bytemuck::try_cast_slice_mut(&mut scratch[..whole])
        .map_err(|e| OpError::Internal(format!("scratch: {e}")))
}

/// Operand `i`, which is added to the result: one that is there but not given lies in the result.
fn residual<'a, T: Float>(x: &[Option<View<'a>>], i: usize) -> Result<Residual<'a, T>, OpError> {
    Ok(match x.get(i) {
        Some(Some(x)) => Residual::Of(x.get::<T>()?),
        Some(None) => Residual::InOutput,
        None => Residual::None,
    })
}

fn same_type(a: &Meta, b: &Meta) -> Result<(), OpError> {
    match a.dtype == b.dtype {
        true => Ok(()),
        false => Err(OpError::Type(format!("a convolution of {} with {}", a.dtype, b.dtype))),
    }
}

impl Op for Conv {
    fn name(&self) -> &'static str {
        "Conv"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (x, w) = (need(inputs, 0)?, need(inputs, 1)?);
        same_type(x, w)?;
        let (g, y) = self.geometry(&x.dims, &w.dims)?;
        if let Some(b) = get(inputs, 2) {
            same_type(x, b)?;
            if b.dims.as_slice() != [g.oc] {
                return Err(OpError::Shape(format!(
                    "a bias of {:?} for {} channels",
                    b.dims.as_slice(),
                    g.oc
                )));
            }
        }
        if let Some(r) = get(inputs, 3) {
            same_type(x, r)?;
            expect(&r.dims, &y)?;
        }
        Ok(vec![Meta::new(x.dtype, &y)])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (input, w) = (need(x, 0)?, need(x, 1)?);
        let (g, _) = self.geometry(input.dims, w.dims)?;
        float_dispatch!(input.dtype, T => {
            let (epilogue, y) = (self.epilogue(x)?, out(y, 0)?.get::<T>()?);
            kernel::forward(&g, input.get::<T>()?, w.get::<T>()?, epilogue, y, floats(cx.scratch)?);
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let (Some(x), Some(w)) = (get(inputs, 0), get(inputs, 1)) else { return 0 };
        self.geometry(&x.dims, &w.dims).map_or(0, |(g, _)| {
            room(&g, x.dtype, [kernel::forward_scratch::<f32>, kernel::forward_scratch::<f64>])
        })
    }

    fn channels_last(&self, _: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        Some(ChannelsLast::by(self.last(), &[true, false, false, true], &[true]).wanted())
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(3, 0)]
    }

    fn multiply_adds(&self, inputs: &[Option<&Meta>]) -> usize {
        let (Some(x), Some(w)) = (get(inputs, 0), get(inputs, 1)) else { return 0 };
        self.geometry(&x.dims, &w.dims).map_or(0, |(g, _)| g.multiply_adds())
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // dY passes where the clamp let Y pass; it is dR then.
        let (x, w, dy) = (g.x(0)?, g.x(1)?, passed(g, self.clamp)?);
        let mut grads = Grads::from_elem(None, g.inputs());
        if g.wants(3) {
            grads[3] = Some(dy);
        }
        if g.wants(0) {
            // dX[i] = Σ_t W[t]ᵀ · dY[(i + pad − dilation·t) / stride]   (N, C, spatial…)
            let x = g.meta(x)?.dims.clone();
            grads[0] = Some(g.emit(ConvInputGrad { conv: self.clone(), x }, &[dy, w])?);
        }
        if g.wants(1) {
            // dW[t] = Σ_{n,i} dY[i] · X[stride·i + dilation·t − pad]ᵀ   (M, C/group, kernel…)
            let w = g.meta(w)?.dims.clone();
            grads[1] = Some(g.emit(ConvWeightGrad { conv: self.clone(), w, norm: None }, &[dy, x])?);
        }
        if g.wants(2) {
            // db = Σ_{n,i} dY[n, :, i]   (M)
            let (geometry, _) = self.geometry(&g.meta(x)?.dims, &g.meta(w)?.dims)?;
            let channels = Channels { n: geometry.n, c: geometry.oc, s: geometry.y.iter().product() };
            grads[2] = Some(g.emit(ChannelSum { channels }, &[dy])?);
        }
        Ok(grads)
    }
}

/// The gradient of `Conv` with respect to its input, of dimensions `x`: from dY and W; an addend, input 2, is added.
#[derive(Debug)]
pub struct ConvInputGrad {
    pub conv: Conv,
    pub x: Dims,
}

impl Op for ConvInputGrad {
    fn name(&self) -> &'static str {
        "ConvInputGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (dy, w) = (need(inputs, 0)?, need(inputs, 1)?);
        same_type(dy, w)?;
        let (_, y) = self.conv.geometry(&self.x, &w.dims)?;
        expect(&dy.dims, &y)?;
        if let Some(a) = get(inputs, 2) {
            same_type(dy, a)?;
            expect(&a.dims, &self.x)?;
        }
        Ok(vec![Meta::new(dy.dtype, &self.x)])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (dy, w) = (need(x, 0)?, need(x, 1)?);
        let (g, _) = self.conv.geometry(&self.x, w.dims)?;
        float_dispatch!(dy.dtype, T => {
            let dx = out(y, 0)?.get::<T>()?;
            kernel::input_grad(&g, dy.get::<T>()?, w.get::<T>()?, residual(x, 2)?, dx, floats(cx.scratch)?);
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let Some(w) = get(inputs, 1) else { return 0 };
        let g = self.conv.geometry(&self.x, &w.dims);
        g.map_or(0, |(g, _)| {
            room(&g, w.dtype, [kernel::input_grad_scratch::<f32>, kernel::input_grad_scratch::<f64>])
        })
    }

    fn channels_last(&self, _: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        let op = ConvInputGrad { conv: self.conv.last(), x: Layout::Last.of(&self.x) };
        Some(ChannelsLast::by(op, &[true, false, true], &[true]).wanted())
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(2, 0)]
    }

    fn multiply_adds(&self, inputs: &[Option<&Meta>]) -> usize {
        let Some(w) = get(inputs, 1) else { return 0 };
        self.conv.geometry(&self.x, &w.dims).map_or(0, |(g, _)| g.multiply_adds())
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("second derivatives of Conv".into()))
    }
}

/// The gradient of `Conv` with respect to its weights, of dimensions `w`: from dY and X.
///
/// Where a depthwise convolution read the result of a batch normalisation, X may be what that read: it is then
/// normalised once more, and clamped, by inputs 2 to 5: mean, inverse deviation, scale and shift.
#[derive(Debug)]
pub struct ConvWeightGrad {
    pub conv: Conv,
    pub w: Dims,
    pub norm: Option<Clamp<f64>>,
}

impl ConvWeightGrad {
    /// Could the input be normalised while it is read?
    pub fn can_normalise(&self, x: &[usize]) -> bool {
        self.conv.geometry(x, &self.w).is_ok_and(|(g, _)| g.depthwise())
    }
}

impl Op for ConvWeightGrad {
    fn name(&self) -> &'static str {
        "ConvWeightGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (dy, x) = (need(inputs, 0)?, need(inputs, 1)?);
        same_type(dy, x)?;
        let (g, y) = self.conv.geometry(&x.dims, &self.w)?;
        expect(&dy.dims, &y)?;
        if self.norm.is_some() {
            if !g.depthwise() {
                return Err(OpError::Shape("only depthwise convolutions normalise what they read".into()));
            }
            for i in 2..6 {
                same_type(dy, need(inputs, i)?)?;
                expect(&need(inputs, i)?.dims, &[g.c])?;
            }
        }
        Ok(vec![Meta::new(dy.dtype, &self.w)])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (g, _) = self.conv.geometry(need(x, 1)?.dims, &self.w)?;
        float_dispatch!(need(x, 0)?.dtype, T => {
            let of = |i: usize| need(x, i)?.get::<T>();
            let dw = out(y, 0)?.get::<T>()?;
            let coefficients = if self.norm.is_some() { g.c } else { 0 };
            let (factor, scratch) = floats(cx.scratch)?
                .split_at_mut_checked(coefficients)
                .ok_or_else(|| OpError::Internal("too little scratch memory".into()))?;
            let load = match self.norm {
                None => None,
                Some(clamp) => {
                    for ((f, scale), inv) in factor.iter_mut().zip(of(4)?).zip(of(3)?) {
                        // As the forward pass computed it.
                        *f = T::of(scale.to64() * inv.to64());
                    }
                    Some(Load { mean: of(2)?, factor, shift: of(5)?, clamp: clamp.to() })
                }
            };
            kernel::weight_grad(&g, of(0)?, of(1)?, load, dw, scratch);
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let Some(x) = get(inputs, 1) else { return 0 };
        let g = self.conv.geometry(&x.dims, &self.w);
        g.map_or(0, |(g, _)| {
            let norm = if self.norm.is_some() { g.c + kernel::load_scratch(&g) } else { 0 };
            room(&g, x.dtype, [kernel::weight_grad_scratch::<f32>, kernel::weight_grad_scratch::<f64>])
                + norm * x.dtype.size()
        })
    }

    fn channels_last(&self, _: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        let op = ConvWeightGrad { conv: self.conv.last(), w: self.w.clone(), norm: self.norm };
        Some(ChannelsLast::by(op, &[true, true], &[]).wanted())
    }

    fn multiply_adds(&self, inputs: &[Option<&Meta>]) -> usize {
        let Some(x) = get(inputs, 1) else { return 0 };
        self.conv.geometry(&x.dims, &self.w).map_or(0, |(g, _)| g.multiply_adds())
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("second derivatives of Conv".into()))
    }
}

fn expect(got: &[usize], want: &[usize]) -> Result<(), OpError> {
    match got == want {
        true => Ok(()),
        false => Err(OpError::Shape(format!("an operand of {got:?} where {want:?} is needed"))),
    }
}

pub(super) const ROWS: &[Row] = &[Row::new("Conv", 1, Conv::make)];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    let conv = |name: &str, x: &[usize], w: &[usize]| Case::new("Conv", 11).named(name).input(x).input(w);
    let clamped = |name: &str, (low, high): (f64, f64)| {
        let window = Window::of(&crate::ops::Attrs::default()).unwrap();
        let op = Conv { window, groups: 1, clamp: Clamp { low, high }, layout: Layout::First };
        Case::of(op).named(name).input(&[2, 3, 5, 6]).input(&[4, 3, 3, 3])
    };
    vec![
        clamped("relu", (0.0, f64::INFINITY)).absent(),
        clamped("clamp, residual", (-0.5, 1.0)).input(&[4]).input(&[2, 4, 3, 4]),
        clamped("residual", (f64::NEG_INFINITY, f64::INFINITY)).absent().input(&[2, 4, 3, 4]),
        conv("2-D", &[2, 3, 5, 6], &[4, 3, 3, 3]),
        conv("bias and pads", &[2, 3, 5, 6], &[4, 3, 3, 3]).input(&[4]).ints("pads", &[1, 1, 1, 1]),
        conv("asymmetric pads", &[2, 3, 5, 6], &[4, 3, 2, 3]).ints("pads", &[1, 0, 0, 2]),
        conv("pads beyond the kernel", &[1, 2, 4, 4], &[17, 2, 2, 2]).ints("pads", &[3, 2, 2, 3]),
        conv("stride 2", &[2, 3, 7, 8], &[4, 3, 3, 3]).ints("pads", &[1, 1, 1, 1]).ints("strides", &[2, 2]),
        conv("stride 3, 2", &[2, 2, 9, 8], &[4, 2, 3, 2]).ints("strides", &[3, 2]).input(&[4]),
        conv("dilation", &[2, 2, 7, 9], &[3, 2, 3, 3]).ints("dilations", &[2, 3]).ints("pads", &[1, 2, 0, 3]),
        conv("groups", &[2, 4, 5, 5], &[6, 2, 3, 3]).int("group", 2).ints("pads", &[1; 4]).input(&[6]),
        conv("SAME_UPPER", &[1, 2, 6, 5], &[3, 2, 3, 4])
            .string("auto_pad", "SAME_UPPER")
            .ints("strides", &[2, 1]),
        conv("SAME_LOWER", &[1, 2, 6, 5], &[3, 2, 3, 4])
            .string("auto_pad", "SAME_LOWER")
            .ints("strides", &[2, 1]),
        conv("VALID", &[1, 2, 6, 5], &[3, 2, 3, 3]).string("auto_pad", "VALID").ints("kernel_shape", &[3, 3]),
        conv("1×1", &[2, 3, 4, 5], &[4, 3, 1, 1]).input(&[4]),
        conv("1×1 groups", &[2, 4, 4, 5], &[6, 2, 1, 1]).int("group", 2).input(&[6]),
        conv("1×1 stride 2", &[2, 18, 5, 4], &[17, 18, 1, 1]).ints("strides", &[2, 2]),
        conv("1×1 padded", &[2, 18, 3, 4], &[17, 18, 1, 1]).ints("pads", &[0, 1, 0, 0]),
        conv("wide", &[3, 18, 6, 7], &[17, 18, 3, 3]).ints("pads", &[1; 4]).input(&[17]),
        conv("wide, dilated", &[2, 18, 9, 8], &[17, 18, 3, 3])
            .ints("pads", &[2; 4])
            .ints("dilations", &[2, 2]),
        conv("wide, no pads", &[2, 18, 6, 7], &[17, 18, 2, 3]),
        conv("wide, stride 2", &[2, 18, 7, 6], &[17, 18, 3, 3])
            .ints("pads", &[1; 4])
            .ints("strides", &[2, 2]),
        conv("wide groups", &[2, 36, 5, 5], &[34, 18, 3, 3])
            .ints("pads", &[1; 4])
            .int("group", 2)
            .input(&[34]),
        conv("tiles of 4", &[2, 18, 8, 8], &[17, 18, 3, 3]).ints("pads", &[1; 4]).input(&[17]),
        conv("tiles of 4, no pads", &[1, 18, 9, 10], &[34, 18, 3, 3]),
        conv("tiles of 4, other pads", &[2, 18, 8, 9], &[35, 18, 3, 3]).ints("pads", &[2, 0, 1, 2]),
        conv("tiles of 4, many sums", &[2, 65, 7, 8], &[65, 65, 3, 3]).ints("pads", &[1; 4]),
        conv("several blocks", &[1, 17, 40, 30], &[16, 17, 3, 3]).ints("pads", &[1; 4]).input(&[16]),
        conv("several blocks, stride 2", &[1, 3, 60, 50], &[5, 3, 3, 3])
            .ints("strides", &[2, 2])
            .ints("pads", &[1; 4]),
        conv("depthwise", &[2, 3, 6, 7], &[3, 1, 3, 3]).int("group", 3).ints("pads", &[1; 4]).input(&[3]),
        conv("depthwise 5", &[1, 3, 6, 7], &[3, 1, 5, 5]).int("group", 3).ints("pads", &[2; 4]),
        conv("depthwise 7 on 4", &[1, 3, 4, 4], &[3, 1, 7, 7]).int("group", 3).ints("pads", &[3; 4]),
        conv("depthwise stride 2", &[2, 3, 6, 7], &[3, 1, 3, 3])
            .int("group", 3)
            .ints("pads", &[1; 4])
            .ints("strides", &[2, 2]),
        conv("depthwise, pads beyond", &[1, 2, 3, 3], &[2, 1, 2, 2])
            .int("group", 2)
            .ints("pads", &[3, 2, 2, 4]),
        conv("depthwise dilated", &[2, 3, 8, 9], &[6, 1, 3, 2])
            .int("group", 3)
            .ints("dilations", &[2, 3])
            .ints("strides", &[1, 2]),
        conv("depthwise multiplier", &[2, 3, 6, 70], &[6, 1, 3, 3])
            .int("group", 3)
            .ints("pads", &[1; 4])
            .input(&[6]),
        conv("1-D", &[2, 3, 9], &[4, 3, 3]).ints("pads", &[2, 1]).ints("strides", &[2]).input(&[4]),
        conv("1-D wide", &[2, 18, 600], &[16, 18, 3]).ints("pads", &[1, 1]),
        conv("1-D depthwise", &[2, 3, 9], &[3, 1, 3]).int("group", 3).ints("pads", &[2, 0]),
        conv("3-D", &[2, 2, 4, 5, 6], &[3, 2, 2, 3, 3]).ints("pads", &[1, 0, 1, 0, 1, 1]).input(&[3]),
        conv("3-D wide", &[1, 17, 4, 5, 6], &[16, 17, 3, 2, 3]).ints("pads", &[1, 0, 1, 0, 1, 1]),
        conv("3-D stride", &[1, 2, 5, 5, 6], &[3, 2, 2, 3, 3]).ints("strides", &[2, 1, 2]),
        conv("3-D depthwise", &[1, 2, 4, 5, 6], &[2, 1, 3, 3, 3]).int("group", 2).ints("pads", &[1; 6]),
        conv("no images", &[0, 3, 5, 6], &[4, 3, 3, 3]).input(&[4]),
        Case::new("Conv", 1).named("opset 1").input(&[1, 1, 3, 3]).input(&[1, 1, 2, 2]),
    ]
}
