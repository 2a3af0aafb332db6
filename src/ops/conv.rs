//! Convolution and its gradients.

use std::sync::Arc;

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::conv::{self as kernel, Epilogue, Geometry, Residual};
use crate::kernels::elementwise::Clamp;
use crate::kernels::layout::Layout;
use crate::kernels::norm::Channels;
use crate::ops::batch_norm::ChannelSum;
use crate::ops::clip::passed;
use crate::ops::window::Window;
use crate::ops::{ChannelsLast, Cx, Grads, Op, Row, Spec, get, need, out};
use crate::tensor::{DType, Dims, Float, Meta, View, ViewMut};

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
        let (b, input, w) = (get(x, 2), need(x, 0)?, need(x, 1)?);
        let (g, _) = self.geometry(input.dims, w.dims)?;
        float_dispatch!(input.dtype, T => {
            let epilogue = Epilogue {
                bias: b.map(|b| b.get::<T>()).transpose()?,
                residual: residual(x, 3)?,
                clamp: self.clamp.to(),
            };
            let y = out(y, 0)?.get::<T>()?;
            let (x, w) = (input.get::<T>()?, w.get::<T>()?);
            kernel::forward(&g, x, w, epilogue, y, floats(cx.scratch)?);
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
            grads[1] = Some(g.emit(ConvWeightGrad { conv: self.clone(), w }, &[dy, x])?);
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
#[derive(Debug)]
pub struct ConvWeightGrad {
    pub conv: Conv,
    pub w: Dims,
}

impl Op for ConvWeightGrad {
    fn name(&self) -> &'static str {
        "ConvWeightGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (dy, x) = (need(inputs, 0)?, need(inputs, 1)?);
        same_type(dy, x)?;
        let (_, y) = self.conv.geometry(&x.dims, &self.w)?;
        expect(&dy.dims, &y)?;
        Ok(vec![Meta::new(dy.dtype, &self.w)])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (dy, x) = (need(x, 0)?, need(x, 1)?);
        let (g, _) = self.conv.geometry(x.dims, &self.w)?;
        float_dispatch!(dy.dtype, T => {
            let dw = out(y, 0)?.get::<T>()?;
            let (dy, x) = (dy.get::<T>()?, x.get::<T>()?);
            kernel::weight_grad(&g, dy, x, dw, floats(cx.scratch)?);
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let Some(x) = get(inputs, 1) else { return 0 };
        let g = self.conv.geometry(&x.dims, &self.w);
        g.map_or(0, |(g, _)| {
            room(&g, x.dtype, [kernel::weight_grad_scratch::<f32>, kernel::weight_grad_scratch::<f64>])
        })
    }

    fn channels_last(&self, _: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        let op = ConvWeightGrad { conv: self.conv.last(), w: self.w.clone() };
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::eval;
    use crate::tensor::Tensor;

    #[test]
    fn conv_cases() {
        cases().iter().for_each(crate::ops::cases::check);
    }

    fn wave(dims: &[usize], step: f64) -> Tensor {
        let data: Vec<f64> = (0..dims.iter().product()).map(|i| (i as f64 * step).sin()).collect();
        Tensor::from_slice(dims, &data).unwrap()
    }

    /// Forward against the defining sum; the gradients follow by the cases' finite differences.
    #[test]
    fn conv_is_its_definition() {
        for case in cases() {
            let (attrs, dims) = case.attributes_and_dims();
            let conv = Conv {
                window: Window::of(attrs).unwrap(),
                groups: attrs.int_or("group", 1).unwrap() as usize,
                clamp: Clamp::NONE,
                layout: Layout::First,
            };
            let (x, w) = (wave(&dims[0], 0.7), wave(&dims[1], 1.3));
            let y = eval(&conv, &[Some(&x), Some(&w)]).unwrap().remove(0);
            let (g, _) = conv.geometry(x.dims(), w.dims()).unwrap();
            let (xs, ws, ys) = (x.to_f64(), w.to_f64(), y.to_f64());
            let (cg, og) = (g.c / g.groups, g.oc / g.groups);
            let size = |d: [usize; 3]| d.iter().product::<usize>();
            let split = |i: usize, d: [usize; 3]| [i / (d[1] * d[2]), i / d[2] % d[1], i % d[2]];
            for (at, got) in ys.iter().enumerate() {
                let (n, o, p) = (at / size(g.y) / g.oc, at / size(g.y) % g.oc, at % size(g.y));
                let pos = split(p, g.y);
                let mut want = 0.0;
                for (c, t) in (0..cg).flat_map(|c| (0..size(g.k)).map(move |t| (c, t))) {
                    let tap = split(t, g.k);
                    let i: [usize; 3] = std::array::from_fn(|d| {
                        (pos[d] * g.stride[d] + tap[d] * g.dilation[d]).wrapping_sub(g.pad[d])
                    });
                    if (0..3).all(|d| i[d] < g.x[d]) {
                        let from = (n * g.c + o / og * cg + c) * size(g.x);
                        want += xs[from + (i[0] * g.x[1] + i[1]) * g.x[2] + i[2]]
                            * ws[(o * cg + c) * size(g.k) + t];
                    }
                }
                assert!((want - got).abs() < 1e-10, "{}: {want} {got}", case.name);
            }
        }
    }

    /// Layers of many weights and few positions have kernels of their own; too large for finite differences.
    #[test]
    fn many_weights_few_positions() {
        let (x, w) = (wave(&[1, 370, 8, 7], 0.7), wave(&[360, 370, 3, 3], 1.3));
        let pads = crate::ops::window::AutoPad::SameUpper;
        let window = Window { auto_pad: pads, ..Window::of(&crate::ops::Attrs::default()).unwrap() };
        let conv = Conv { window, groups: 1, clamp: Clamp::NONE, layout: Layout::First };
        // The same convolution in parts that are small enough for the others.
        let y = eval(&conv, &[Some(&x), Some(&w)]).unwrap().remove(0);
        let part = Tensor::from_slice(&[2, 370, 3, 3], &w.to_f64()[358 * 3330..]).unwrap();
        let last = eval(&conv, &[Some(&x), Some(&part)]).unwrap().remove(0);
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{a} {b}");
        for (a, b) in y.to_f64()[358 * 56..].iter().zip(last.to_f64()) {
            close(*a, b);
        }
        // Both gradients are the forward pass's transposes.
        let dy = wave(&[1, 360, 8, 7], 0.9);
        let dot = |a: &Tensor, b: &Tensor| a.to_f64().iter().zip(b.to_f64()).map(|(a, b)| a * b).sum::<f64>();
        let input = ConvInputGrad { conv: conv.clone(), x: Dims::from_slice(x.dims()) };
        let weight = ConvWeightGrad { conv: conv.clone(), w: Dims::from_slice(w.dims()) };
        let (x2, w2) = (wave(x.dims(), 1.7), wave(w.dims(), 0.3));
        let dx = eval(&input, &[Some(&dy), Some(&w)]).unwrap().remove(0);
        let y2 = eval(&conv, &[Some(&x2), Some(&w)]).unwrap().remove(0);
        assert!((dot(&dx, &x2) / dot(&dy, &y2) - 1.0).abs() < 1e-9);
        let dw = eval(&weight, &[Some(&dy), Some(&x)]).unwrap().remove(0);
        let y2 = eval(&conv, &[Some(&x), Some(&w2)]).unwrap().remove(0);
        assert!((dot(&dw, &w2) / dot(&dy, &y2) - 1.0).abs() < 1e-9);
    }

    #[test]
    fn bits_do_not_depend_on_threads() {
        let pools: Vec<_> =
            (1..5).map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap()).collect();
        for (x, w, groups, stride) in [
            ([3, 16, 32, 32], [16, 16, 3, 3], 1, 1),
            ([1, 3, 40, 41], [16, 3, 3, 3], 1, 2),
            ([9, 32, 16, 16], [64, 32, 3, 3], 1, 2),
            ([5, 24, 14, 14], [24, 1, 3, 3], 24, 1),
            ([2, 64, 7, 7], [80, 64, 1, 1], 1, 1),
            ([3, 64, 8, 8], [70, 64, 3, 3], 1, 1),
            ([2, 370, 8, 8], [360, 370, 3, 3], 1, 1),
        ] {
            let window = Window {
                auto_pad: crate::ops::window::AutoPad::SameUpper,
                kernel: vec![],
                strides: vec![stride; 2],
                dilations: vec![],
                pads: vec![],
                ceil: false,
            };
            let conv = Conv { window, groups, clamp: Clamp::NONE, layout: Layout::First };
            let (tx, tw) = (wave(&x, 0.7).cast(DType::F32), wave(&w, 1.3).cast(DType::F32));
            let (_, y) = conv.geometry(&x, &w).unwrap();
            let dy = wave(&y, 0.9).cast(DType::F32);
            let run = || {
                let input = ConvInputGrad { conv: conv.clone(), x: Dims::from_slice(&x) };
                let weight = ConvWeightGrad { conv: conv.clone(), w: Dims::from_slice(&w) };
                [
                    eval(&conv, &[Some(&tx), Some(&tw)]).unwrap().remove(0),
                    eval(&input, &[Some(&dy), Some(&tw)]).unwrap().remove(0),
                    eval(&weight, &[Some(&dy), Some(&tx)]).unwrap().remove(0),
                ]
            };
            let first = run();
            for pool in &pools {
                let again = pool.install(run);
                assert!(first.iter().zip(&again).all(|(a, b)| a.bytes() == b.bytes()), "{x:?} {w:?}");
            }
        }
    }
}
