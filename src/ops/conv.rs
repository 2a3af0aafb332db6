//! Convolution and its gradients.

mod expanded;
mod grads;
mod input_grad;
mod statistics;
#[cfg(test)]
mod tests;
mod transpose;

use std::sync::Arc;

use smallvec::SmallVec;

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::conv::{self as kernel, Epilogue, Geometry, Load, Norm, Operand, Residual};
use crate::kernels::elementwise::Clamp;
use crate::kernels::half::Half;
use crate::kernels::layout::Layout;
use crate::kernels::norm::Channels;
use crate::ops::batch_norm::ChannelSum;
use crate::ops::clip::passed;
use crate::ops::half::{self, elements};
use crate::ops::window::{AutoPad, Window};
use crate::ops::{ChannelsLast, Cx, Grads, Op, Row, Spec, get, need, out};
use crate::tensor::{DType, Dims, Float, Meta, View, ViewMut};

pub use expanded::ConvExpanded;
pub use grads::ConvGrads;
pub use input_grad::ConvInputGrad;
pub use statistics::ConvStatistics;
pub use transpose::ConvTranspose;
pub(super) use transpose::ROWS as TRANSPOSED_ROWS;
#[cfg(test)]
pub(super) use transpose::cases as transposed_cases;

/// ONNX `Conv` (opset 1): X (N, C, spatial…), W (M, C/group, kernel…), B (M), over one to three dimensions.
///
/// Fused: Y = clamp(W * X + B + R), the residual R (N, M, spatial…) being input 3.
///
/// Where it `normalises`, X is what a batch normalisation read, which is done and clamped as X is read; inputs 2 to 5
/// are the normalisation's mean, inverse deviation, scale and shift (C), B and R the inputs after them.
#[derive(Debug, Clone)]
pub struct Conv {
    pub window: Window,
    pub groups: usize,
    pub normalises: Option<Clamp<f64>>,
    /// What is done to the result last.
    pub clamp: Clamp<f64>,
    /// Of X and Y, and of their gradients; the weights lie as in the file.
    pub layout: Layout,
    /// See [`Op::by_pairs`]; of one group.
    pub pairs: bool,
}

/// Elements of scratch that a kernel takes, where X is computed as it is read or not.
type Room<'a> = &'a dyn Fn(&Geometry, bool) -> usize;

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
            normalises: None,
            clamp: Clamp::NONE,
            layout: Layout::First,
            pairs: false,
        }))
    }

    /// This convolution with the channels of X and Y last.
    fn last(&self) -> Conv {
        Conv { layout: Layout::Last, ..self.clone() }
    }

    /// The same by pairs, where it is of one group: see [`Op::by_pairs`].
    fn paired(&self) -> Option<Conv> {
        (self.groups == 1).then(|| Conv { pairs: true, ..self.clone() })
    }

    /// Nothing is fused with it.
    pub fn is_plain(&self) -> bool {
        self.normalises.is_none() && self.clamp == Clamp::NONE
    }

    /// A dense convolution with a kernel of 1 of what this one puts out.
    pub fn pointwise(&self) -> Conv {
        let window = Window {
            auto_pad: AutoPad::Explicit,
            kernel: vec![],
            strides: vec![],
            dilations: vec![],
            pads: vec![],
            ceil: false,
            output: vec![],
        };
        Conv { window, groups: 1, ..self.clone() }
    }

    /// This convolution of what a normalisation read.
    pub fn normalising(&self, clamp: Clamp<f64>) -> Conv {
        Conv { normalises: Some(clamp), ..self.clone() }
    }

    /// Could X (of these dimensions) be normalised while it is read?
    pub fn can_normalise(&self, x: &[usize], w: &[usize]) -> bool {
        self.normalises.is_none() && self.geometry(x, w).is_ok_and(|(g, _)| kernel::loads(&g))
    }

    /// The input that is the bias; the residual follows.
    fn bias(&self) -> usize {
        if self.normalises.is_some() { 6 } else { 2 }
    }

    fn epilogue<'a, T: Float>(&self, x: &[Option<View<'a>>]) -> Result<Epilogue<'a, T>, OpError> {
        Ok(Epilogue {
            bias: get(x, self.bias()).map(|b| b.get::<T>()).transpose()?,
            residual: residual(x, self.bias() + 1)?,
            clamp: self.clamp.to(),
        })
    }

    /// X, and the scratch memory that is left.
    fn input<'a, T: Float>(
        &self,
        x: &[Option<View<'a>>],
        channels: usize,
        scratch: &'a mut [u8],
    ) -> Result<(Operand<'a, T>, &'a mut [T]), OpError> {
        let scratch = floats(scratch)?;
        let data = elements(need(x, 0)?)?;
        let Some(clamp) = self.normalises else {
            return Ok((Operand { data, channels, load: Load::Plain }, scratch));
        };
        let (factor, scratch) = scratch.split_at_mut_checked(channels).ok_or_else(short)?;
        let load = Load::Norm(normalised(&x[2..], clamp, factor)?);
        Ok((Operand { data, channels, load }, scratch))
    }

    /// Bytes of scratch: for the factors, and for a kernel, by its function for either element type, which is told
    /// whether X is computed as it is read.
    fn room(&self, x: &Meta, w: &[usize], kernel: [Room; 2]) -> usize {
        let (computed, dtype) = (self.normalises.is_some(), half::computed(x));
        self.geometry(&x.dims, w).map_or(0, |(g, _)| {
            let elements = kernel[usize::from(dtype == DType::F64)](&g, computed);
            (elements + if computed { g.c } else { 0 }) * dtype.size()
        })
    }

    /// Does that hold of the convolution of such inputs?
    fn is(&self, inputs: &[Option<&Meta>], holds: fn(&Geometry) -> bool) -> bool {
        let (Some(x), Some(w)) = (get(inputs, 0), get(inputs, 1)) else { return false };
        self.geometry(&x.dims, &w.dims).is_ok_and(|(g, _)| holds(&g))
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
            pairs: self.pairs,
        };
        let y = self.layout.of(&r.output([x[0], w[0]]));
        Ok((g, y))
    }
}

fn short() -> OpError {
    OpError::Internal("too little scratch memory".into())
}

/// A normalisation by operands mean, inverse deviation, scale and shift; `factor`: room for one a channel.
fn normalised<'a, T: Float>(
    operands: &[Option<View<'a>>],
    clamp: Clamp<f64>,
    factor: &'a mut [T],
) -> Result<Norm<'a, T>, OpError> {
    let of = |i: usize| need(operands, i)?.get::<T>();
    for ((f, scale), inv) in factor.iter_mut().zip(of(2)?).zip(of(1)?) {
        // As the normalisation itself computes it.
        *f = T::of(scale.to64() * inv.to64());
    }
    Ok(Norm { mean: of(0)?, factor, shift: of(3)?, clamp: clamp.to() })
}

/// That operands are one of this type a channel.
fn per_channel(operands: &[Option<&Meta>], dtype: &Meta, channels: usize) -> Result<(), OpError> {
    operands.iter().try_for_each(|m| {
        let m = m.ok_or_else(|| OpError::Shape("a normalisation lacks an operand".into()))?;
        same_type(dtype, m)?;
        expect(&m.dims, &[channels])
    })
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
        let (x, w) = (&half::widened(need(inputs, 0)?), need(inputs, 1)?);
        same_type(x, w)?;
        let (g, y) = self.geometry(&x.dims, &w.dims)?;
        if self.normalises.is_some() {
            if !kernel::loads(&g) {
                return Err(OpError::Shape("this convolution cannot normalise what it reads".into()));
            }
            per_channel(inputs.get(2..6).unwrap_or(&[None]), x, g.c)?;
        }
        if let Some(b) = get(inputs, self.bias()) {
            same_type(x, b)?;
            if b.dims.as_slice() != [g.oc] {
                return Err(OpError::Shape(format!(
                    "a bias of {:?} for {} channels",
                    b.dims.as_slice(),
                    g.oc
                )));
            }
        }
        if let Some(r) = get(inputs, self.bias() + 1) {
            same_type(x, r)?;
            expect(&r.dims, &y)?;
        }
        Ok(vec![Meta::new(x.dtype, &y)])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (input, w) = (need(x, 0)?, need(x, 1)?);
        let (g, _) = self.geometry(input.dims, w.dims)?;
        float_dispatch!(w.dtype, T => {
            let (epilogue, y) = (self.epilogue(x)?, out(y, 0)?.get::<T>()?);
            let (input, scratch) = self.input::<T>(x, g.c, cx.scratch)?;
            kernel::forward(&g, input, w.get::<T>()?, epilogue, y, scratch);
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let (Some(x), Some(w)) = (get(inputs, 0), get(inputs, 1)) else { return 0 };
        let half = Half::of(x.dtype).is_some();
        let single = |g: &Geometry, computed: bool| kernel::forward_scratch::<f32>(g, !computed && !half);
        let double = |g: &Geometry, computed: bool| kernel::forward_scratch::<f64>(g, !computed);
        self.room(x, &w.dims, [&single, &double])
    }

    fn channels_last(&self, _: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        if self.normalises.is_some() {
            return None;
        }
        Some(ChannelsLast::by(self.last(), &[true, false, false, true], &[true]).wanted())
    }

    fn by_pairs(&self) -> Option<Arc<dyn Op>> {
        Some(Arc::new(self.paired()?))
    }

    fn in_place(&self) -> &[(usize, usize)] {
        if self.normalises.is_some() { &[(7, 0)] } else { &[(3, 0)] }
    }

    fn reads_half(&self, _: &[Option<&Meta>], input: usize) -> bool {
        input == 0 && (self.normalises.is_some() || self.pairs && self.layout == Layout::Last)
    }

    fn rounds(&self, inputs: &[Option<&Meta>], input: usize) -> bool {
        input == 0 && self.normalises.is_none() && self.is(inputs, kernel::reads_half)
    }

    fn multiply_adds(&self, inputs: &[Option<&Meta>]) -> usize {
        let (Some(x), Some(w)) = (get(inputs, 0), get(inputs, 1)) else { return 0 };
        self.geometry(&x.dims, &w.dims).map_or(0, |(g, _)| g.multiply_adds())
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        if self.normalises.is_some() {
            return Err(OpError::NotDifferentiable("a convolution that normalises what it reads".into()));
        }
        // dY passes where the clamp let Y pass; it is dR then.
        let (x, w, dy) = (g.x(0)?, g.x(1)?, passed(g, self.clamp)?);
        let mut grads = Grads::from_elem(None, g.inputs());
        if g.wants(3) {
            grads[3] = Some(dy);
        }
        // (dX last: by then X need not be kept.)
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
        if g.wants(0) {
            // dX[i] = Σ_t W[t]ᵀ · dY[(i + pad − dilation·t) / stride]   (N, C, spatial…)
            let x = g.meta(x)?.dims.clone();
            grads[0] = Some(g.emit(ConvInputGrad::of(self.clone(), x), &[dy, w])?);
        }
        Ok(grads)
    }
}

/// The gradient of `Conv` with respect to its weights, of dimensions `w`: from dY and X.
///
/// Where the convolution normalises X, so does this; inputs 2 to 5 are mean, inverse deviation, scale and shift.
#[derive(Debug, Clone)]
pub struct ConvWeightGrad {
    pub conv: Conv,
    pub w: Dims,
}

impl Op for ConvWeightGrad {
    fn name(&self) -> &'static str {
        "ConvWeightGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (dy, x) = (&half::widened(need(inputs, 0)?), need(inputs, 1)?);
        same_type(dy, &half::widened(x))?;
        let (g, y) = self.conv.geometry(&x.dims, &self.w)?;
        expect(&dy.dims, &y)?;
        if self.conv.normalises.is_some() {
            per_channel(inputs.get(2..6).unwrap_or(&[None]), dy, g.c)?;
        }
        Ok(vec![Meta::new(dy.dtype, &self.w)])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (g, _) = self.conv.geometry(need(x, 1)?.dims, &self.w)?;
        let dw = out(y, 0)?;
        float_dispatch!(dw.dtype, T => {
            let dy = elements::<T>(need(x, 0)?)?;
            // As the convolution takes them.
            let mut operands: SmallVec<[Option<View>; 8]> = SmallVec::from_slice(x);
            operands.swap(0, 1);
            let (input, scratch) = self.conv.input::<T>(&operands, g.c, cx.scratch)?;
            kernel::weight_grad(&g, dy, input, dw.get::<T>()?, scratch);
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let (Some(dy), Some(x)) = (get(inputs, 0), get(inputs, 1)) else { return 0 };
        let half = [x, dy].map(|m| Half::of(m.dtype).is_some());
        let single = |g: &Geometry, computed: bool| kernel::weight_grad_scratch::<f32>(g, computed, half);
        let double = |g: &Geometry, computed: bool| kernel::weight_grad_scratch::<f64>(g, computed, half);
        self.conv.room(x, &self.w, [&single, &double])
    }

    fn channels_last(&self, _: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        if self.conv.normalises.is_some() {
            return None;
        }
        let op = ConvWeightGrad { conv: self.conv.last(), w: self.w.clone() };
        Some(ChannelsLast::by(op, &[true, true], &[]).wanted())
    }

    fn by_pairs(&self) -> Option<Arc<dyn Op>> {
        Some(Arc::new(ConvWeightGrad { conv: self.conv.paired()?, w: self.w.clone() }))
    }

    fn reads_half(&self, _: &[Option<&Meta>], input: usize) -> bool {
        input == 1 && self.conv.layout == Layout::Last
    }

    fn rounds(&self, inputs: &[Option<&Meta>], input: usize) -> bool {
        let Some(x) = get(inputs, 1) else { return false };
        let g = self.conv.geometry(&x.dims, &self.w);
        input == 0 && g.is_ok_and(|(g, _)| kernel::weight_grad_rounds(&g))
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
    let whole = Window::of(&crate::ops::Attrs::default()).unwrap();
    let by = |n: i64| Window { pads: vec![n as usize; 4], dilations: vec![n as usize; 2], ..whole.clone() };
    let fused = |name: &str, window: &Window, (low, high): (f64, f64)| {
        let (window, clamp) = (window.clone(), Clamp { low, high });
        let op = Conv { window, groups: 1, normalises: None, clamp, layout: Layout::First, pairs: false };
        Case::of(op).named(name)
    };
    let clamped =
        |name: &str, clamp: (f64, f64)| fused(name, &whole, clamp).input(&[2, 3, 5, 6]).input(&[4, 3, 3, 3]);
    let dilated = |name: &str, n: i64, [height, width]: [usize; 2]| {
        let [x, w] = [[1, 16, height, width], [16, 16, 3, 3]];
        fused(name, &by(n), (-0.5, 1.0)).input(&x).input(&w).input(&[16]).input(&x)
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
        conv("wide, dilated", &[2, 18, 12, 11], &[17, 18, 3, 3])
            .ints("pads", &[2; 4])
            .ints("dilations", &[2, 2]),
        dilated("dilated, residual", 2, [11, 12]),
        dilated("dilated by much of the image, residual", 6, [9, 10]),
        dilated("dilated rows that reach nothing, residual", 4, [3, 7]),
        conv("dilated rows", &[1, 17, 13, 6], &[16, 17, 3, 3])
            .ints("pads", &[3, 1, 3, 1])
            .ints("dilations", &[3, 1]),
        conv("dilated by more than the image", &[2, 16, 5, 4], &[17, 16, 3, 3])
            .ints("pads", &[6, 4, 6, 4])
            .ints("dilations", &[6, 4])
            .input(&[17]),
        conv("dilated by much of the image", &[2, 18, 10, 9], &[17, 18, 3, 3])
            .ints("pads", &[5, 4, 4, 5])
            .ints("dilations", &[5, 4])
            .input(&[17]),
        conv("padded by more than dilated", &[1, 16, 6, 8], &[16, 16, 2, 3])
            .ints("pads", &[5, 7, 5, 6])
            .ints("dilations", &[3, 4]),
        conv("groups dilated by much of the image", &[2, 32, 9, 10], &[34, 16, 3, 2])
            .ints("pads", &[4, 0, 4, 5])
            .ints("dilations", &[4, 5])
            .int("group", 2),
        conv("1-D dilated by much", &[2, 16, 40], &[17, 16, 4])
            .ints("pads", &[36, 18])
            .ints("dilations", &[18]),
        conv("3-D dilated by much", &[1, 16, 4, 8, 4], &[16, 16, 2, 3, 2])
            .ints("pads", &[3, 4, 1, 3, 4, 2])
            .ints("dilations", &[3, 4, 3]),
        conv("3-D dilated, most positions outside", &[1, 16, 3, 5, 4], &[16, 16, 2, 3, 2])
            .ints("pads", &[5; 6])
            .ints("dilations", &[2, 2, 1]),
        conv("dilated, stride 2, 1", &[1, 17, 9, 7], &[16, 17, 3, 3])
            .ints("pads", &[2; 4])
            .ints("dilations", &[2, 2])
            .ints("strides", &[2, 1]),
        conv("dilated groups", &[1, 32, 12, 11], &[34, 16, 3, 3])
            .ints("pads", &[2; 4])
            .ints("dilations", &[2, 2])
            .int("group", 2),
        conv("3-D dilated", &[1, 16, 3, 5, 4], &[16, 16, 2, 3, 2])
            .ints("pads", &[2, 2, 0, 2, 2, 0])
            .ints("dilations", &[2, 2, 1]),
        conv("taps outside", &[2, 3, 1, 2], &[4, 3, 3, 5]).ints("pads", &[1, 2, 1, 2]).input(&[4]),
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
