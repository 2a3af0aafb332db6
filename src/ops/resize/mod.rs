//! Resizing: `Resize`, `Upsample`, and their gradient.

#[cfg(test)]
mod tests;

use std::sync::Arc;

use smallvec::SmallVec;

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::layout::{Layout, position};
use crate::kernels::resize::{
    Axis, Coordinates, Filter, Pass, Rounding, Sampling, fill_outside, pick, resample, resample_grad,
};
use crate::ops::bytes::{by_size, units, units_mut};
use crate::ops::layout::rank_of;
use crate::ops::{ChannelsLast, Cx, Grads, Op, Row, Spec, get, need, out};
use crate::tensor::{DType, Dims, Elem, Meta, View, ViewMut, axis};

/// One entry an axis of the tensor.
type Axes = SmallVec<[Axis; 6]>;
type Numbers = SmallVec<[f64; 12]>;

/// How extents follow from `sizes` (ONNX's `keep_aspect_ratio_policy`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Policy {
    Stretch,
    NotLarger,
    NotSmaller,
}

/// Where the scales come from.
#[derive(Debug, Clone)]
enum Scales {
    Attribute(Vec<f32>),
    Input(usize),
}

/// ONNX `Resize` (opset 10; 11 with coordinate modes, 18 with axes and antialiasing) and `Upsample` (opset 7, 9).
///
/// Scales, sizes and the region of a crop must be known before the run.
#[derive(Debug, Clone)]
pub struct Resize {
    op_type: &'static str,
    sampling: Sampling,
    axes: Option<Vec<i64>>,
    policy: Policy,
    extrapolation: f32,
    scales: Scales,
    sizes: Option<usize>,
    roi: Option<usize>,
    /// Of X and Y.
    layout: Layout,
}

/// The numbers of a small operand.
fn numbers(v: View) -> Result<Numbers, OpError> {
    Ok(match v.dtype {
        DType::F32 => v.get::<f32>()?.iter().map(|x| f64::from(*x)).collect(),
        DType::F64 => v.get::<f64>()?.iter().copied().collect(),
        DType::I64 => v.get::<i64>()?.iter().map(|x| *x as f64).collect(),
        DType::I32 => v.get::<i32>()?.iter().map(|x| f64::from(*x)).collect(),
        other => return Err(OpError::Type(format!("{other} where sizes or scales are needed"))),
    })
}

impl Resize {
    fn make(s: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let a = s.attrs;
        let mode = a.string("mode")?.unwrap_or_else(|| "nearest".into());
        let text = |name: &str, default: &str| -> Result<String, OpError> {
            Ok(a.string(name)?.unwrap_or_else(|| default.into()))
        };
        let unknown = |name: &str, value: &str| OpError::Attribute(format!("'{name}' is {value}"));
        let modern = s.opset >= 11;
        let coordinates = match text("coordinate_transformation_mode", "half_pixel")?.as_str() {
            _ if !modern => Coordinates::Asymmetric,
            "half_pixel" => Coordinates::HalfPixel,
            "half_pixel_symmetric" => Coordinates::HalfPixelSymmetric,
            "pytorch_half_pixel" => Coordinates::PytorchHalfPixel,
            "align_corners" => Coordinates::AlignCorners,
            "asymmetric" => Coordinates::Asymmetric,
            "tf_half_pixel_for_nn" => Coordinates::TfHalfPixelForNn,
            "tf_crop_and_resize" => Coordinates::TfCropAndResize,
            other => return Err(unknown("coordinate_transformation_mode", other)),
        };
        let rounding = match text("nearest_mode", "round_prefer_floor")?.as_str() {
            _ if !modern => Rounding::Simple,
            "round_prefer_floor" => Rounding::PreferFloor,
            "round_prefer_ceil" => Rounding::PreferCeil,
            "floor" => Rounding::Floor,
            "ceil" => Rounding::Ceil,
            other => return Err(unknown("nearest_mode", other)),
        };
        let filter = match mode.as_str() {
            "nearest" => Filter::Nearest(rounding),
            "linear" | "bilinear" | "trilinear" => Filter::Linear,
            "cubic" | "bicubic" => Filter::Cubic(f64::from(a.float_or("cubic_coeff_a", -0.75)?)),
            other => return Err(unknown("mode", other)),
        };
        let policy = match text("keep_aspect_ratio_policy", "stretch")?.as_str() {
            "stretch" => Policy::Stretch,
            "not_larger" => Policy::NotLarger,
            "not_smaller" => Policy::NotSmaller,
            other => return Err(unknown("keep_aspect_ratio_policy", other)),
        };
        let sampling = Sampling {
            coordinates,
            filter,
            exclude_outside: a.flag("exclude_outside")?,
            antialias: a.flag("antialias")?,
        };
        let upsample = s.op_type == "Upsample";
        let scales = match a.floats("scales")? {
            Some(scales) if upsample && s.opset < 9 => Scales::Attribute(scales),
            None if upsample && s.opset < 9 => {
                return Err(OpError::Attribute("'scales' is missing".into()));
            }
            _ => Scales::Input(if modern && !upsample { 2 } else { 1 }),
        };
        let crops = coordinates == Coordinates::TfCropAndResize;
        Ok(Arc::new(Resize {
            op_type: if upsample { "Upsample" } else { "Resize" },
            sampling,
            axes: a.ints("axes")?,
            policy,
            extrapolation: a.float_or("extrapolation_value", 0.0)?,
            scales,
            sizes: (modern && !upsample).then_some(3),
            roi: crops.then_some(1),
            layout: Layout::First,
        }))
    }

    /// The axes of a tensor of dimensions `x`, channels first; `operand(i)` is a small operand, if it is there.
    fn resolve(
        &self,
        x: &[usize],
        operand: impl Fn(usize) -> Result<Option<Numbers>, OpError>,
    ) -> Result<Axes, OpError> {
        let rank = x.len();
        let bad = |what: String| OpError::Shape(format!("{} of {x:?}: {what}", self.op_type));
        let which: SmallVec<[usize; 6]> = match &self.axes {
            None => (0..rank).collect(),
            Some(axes) => axes.iter().map(|a| axis(*a, rank)).collect::<Result<_, _>>()?,
        };
        if (1..which.len()).any(|i| which[..i].contains(&which[i])) {
            return Err(bad(format!("the axes {:?} repeat one", self.axes)));
        }
        let mut all: Axes =
            x.iter().map(|&n| Axis { input: n, output: n, scale: 1.0, roi: [0.0, 1.0] }).collect();
        let given = |numbers: Option<Numbers>| numbers.filter(|n| !n.is_empty());
        let scales = match &self.scales {
            Scales::Attribute(scales) => Some(scales.iter().map(|s| f64::from(*s)).collect()),
            Scales::Input(i) => given(operand(*i)?),
        };
        let sizes = match self.sizes {
            Some(i) => given(operand(i)?),
            None => None,
        };
        let count = |n: &Numbers, want: usize, what: &str| match n.len() == want {
            true => Ok(()),
            false => Err(bad(format!("{} {what} for {} axes", n.len(), which.len()))),
        };
        match (scales, sizes) {
            (Some(scales), None) => {
                count(&scales, which.len(), "scales")?;
                for (&a, &scale) in which.iter().zip(&scales) {
                    // As a product of single precision: 1.4 times 5 is 7.
                    let output = (scale as f32 * x[a] as f32).floor();
                    if !(scale > 0.0 && output <= i32::MAX as f32) {
                        return Err(bad(format!("a scale of {scale}")));
                    }
                    (all[a].scale, all[a].output) = (scale, output as usize);
                }
            }
            (None, Some(sizes)) => {
                count(&sizes, which.len(), "sizes")?;
                let fits = |s: &f64| (0.0..=f64::from(i32::MAX)).contains(s);
                if !sizes.iter().all(fits) {
                    return Err(bad(format!("sizes of {sizes:?}")));
                }
                let ratios = which.iter().zip(&sizes).map(|(&a, size)| size / x[a] as f64);
                let one = match self.policy {
                    Policy::Stretch => None,
                    Policy::NotLarger => ratios.clone().reduce(f64::min),
                    Policy::NotSmaller => ratios.clone().reduce(f64::max),
                };
                for ((&a, &size), ratio) in which.iter().zip(&sizes).zip(ratios) {
                    let scale = one.unwrap_or(ratio);
                    let output = one.map_or(size, |s| (s * x[a] as f64 + 0.5).floor());
                    if x[a] == 0 && output == 0.0 {
                        continue;
                    }
                    if !(scale.is_finite() && output <= f64::from(i32::MAX)) {
                        return Err(bad(format!("a size of {size}")));
                    }
                    (all[a].scale, all[a].output) = (scale, output as usize);
                }
            }
            (Some(_), Some(_)) => return Err(bad("both scales and sizes".into())),
            (None, None) => return Err(bad("neither scales nor sizes".into())),
        }
        if let Some(i) = self.roi {
            let roi = given(operand(i)?).ok_or_else(|| bad("a crop without a region".into()))?;
            count(&roi, 2 * which.len(), "numbers of a region")?;
            for (i, &a) in which.iter().enumerate() {
                all[a].roi = [roi[i], roi[which.len() + i]];
            }
            // Axes that are not named are not cropped.
        }
        Ok(all)
    }

    /// The same, as far as the operands' values are known.
    fn known(&self, inputs: &[Option<&Meta>]) -> Result<Axes, OpError> {
        let x = self.layout.ordinary(&need(inputs, 0)?.dims);
        self.resolve(&x, |i| match get(inputs, i) {
            None => Ok(None),
            Some(m) if m.is_empty() => Ok(None),
            Some(m) => {
                let value = m.value.as_ref().ok_or(OpError::NeedsValue(i))?;
                numbers(value.view()).map(Some)
            }
        })
    }
}

/// Passes over the axes that change, in order, with where each lies in memory.
struct Passes {
    /// Axis (as the tensor lies), and what happens to it.
    steps: SmallVec<[(usize, Axis); 6]>,
    dims: Dims,
}

impl Passes {
    /// Smaller first. `x`: dimensions as the tensor lies.
    fn of(sampling: &Sampling, axes: &[Axis], layout: Layout, x: &[usize]) -> Passes {
        let place = |a: usize| if layout == Layout::Last { position(a, axes.len()) } else { a };
        let moves = axes.iter().enumerate().filter(|(_, axis)| !sampling.keeps(axis));
        let mut steps: SmallVec<[(usize, Axis); 6]> = moves.map(|(a, axis)| (place(a), *axis)).collect();
        // Insertion: stable, and no allocation.
        for i in 1..steps.len() {
            let grows = |(_, a): &(usize, Axis), (_, b): &(usize, Axis)| {
                a.output as u128 * b.input as u128 > b.output as u128 * a.input as u128
            };
            let mut j = i;
            while j > 0 && grows(&steps[j - 1], &steps[j]) {
                steps.swap(j - 1, j);
                j -= 1;
            }
        }
        Passes { steps, dims: Dims::from_slice(x) }
    }

    /// Elements of the largest tensor between two passes.
    fn between(&self) -> usize {
        let mut dims = self.dims.clone();
        let mut most = 0;
        for (i, (place, axis)) in self.steps.iter().enumerate() {
            dims[*place] = axis.output;
            if i + 1 < self.steps.len() {
                most = most.max(dims.iter().product());
            }
        }
        most
    }

    /// Entries of the largest table.
    fn table(&self, sampling: &Sampling) -> usize {
        self.steps.iter().map(|(_, axis)| axis.output * sampling.taps(axis)).max().unwrap_or(0)
    }

    /// Bytes of scratch: indices, weights, two tensors between passes.
    fn scratch(&self, sampling: &Sampling, size: usize) -> usize {
        let [index, weight, between] = self.parts(sampling, size);
        index + weight + 2 * between
    }

    fn parts(&self, sampling: &Sampling, size: usize) -> [usize; 3] {
        let table = self.table(sampling);
        [table * size_of::<u32>(), table * size.max(4), self.between() * size].map(|n| n.next_multiple_of(64))
    }

    /// Calls `run(step, elements outside, inside, from, to)` for each pass, through buffers `a` and `b`.
    fn each<T: Elem>(
        &self,
        backwards: bool,
        x: &[T],
        y: &mut [T],
        [a, b]: [&mut [T]; 2],
        mut run: impl FnMut(&Axis, usize, usize, &[T], &mut [T]),
    ) {
        let count = self.steps.len();
        if count == 0 {
            return y.copy_from_slice(x);
        }
        let mut dims = self.dims.clone();
        if backwards {
            self.steps.iter().for_each(|(place, axis)| dims[*place] = axis.output);
        }
        let (mut from, mut to) = (a, b);
        for i in 0..count {
            let (place, axis) = &self.steps[if backwards { count - 1 - i } else { i }];
            let source: usize = dims.iter().product();
            dims[*place] = if backwards { axis.input } else { axis.output };
            let target: usize = dims.iter().product();
            let (outer, inner) = (dims[..*place].iter().product(), dims[place + 1..].iter().product());
            let source: &[T] = if i == 0 { x } else { &from[..source] };
            match i + 1 == count {
                true => run(axis, outer, inner, source, y),
                false => run(axis, outer, inner, source, &mut to[..target]),
            }
            std::mem::swap(&mut from, &mut to);
        }
    }
}

/// Indices and weights of a table, and two tensors between passes.
type Parts<'a, T, W> = (&'a mut [u32], &'a mut [W], [&'a mut [T]; 2]);

/// Scratch memory in the parts that passes need.
fn parts<'a, T: Elem, W: Elem>(cx: &'a mut Cx, sizes: [usize; 3]) -> Result<Parts<'a, T, W>, OpError> {
    let short = || OpError::Internal("too little scratch memory".into());
    let [index, weight, between] = sizes;
    let (index, rest) = cx.scratch.split_at_mut_checked(index).ok_or_else(short)?;
    let (weight, rest) = rest.split_at_mut_checked(weight).ok_or_else(short)?;
    let (a, rest) = rest.split_at_mut_checked(between).ok_or_else(short)?;
    let b = rest.get_mut(..between).ok_or_else(short)?;
    let wrong = |e| OpError::Internal(format!("scratch: {e}"));
    Ok((
        bytemuck::try_cast_slice_mut(index).map_err(wrong)?,
        bytemuck::try_cast_slice_mut(weight).map_err(wrong)?,
        [bytemuck::try_cast_slice_mut(a).map_err(wrong)?, bytemuck::try_cast_slice_mut(b).map_err(wrong)?],
    ))
}

/// A pass with its table.
fn pass<'a, T>(
    sampling: &Sampling,
    axis: &Axis,
    [outer, inner]: [usize; 2],
    index: &'a [u32],
    weight: &'a [T],
) -> Pass<'a, T> {
    let taps = sampling.taps(axis);
    let table = axis.output * taps;
    Pass {
        outer,
        inner,
        input: axis.input,
        output: axis.output,
        taps,
        index: &index[..table],
        weight: &weight[..table],
    }
}

impl Op for Resize {
    fn name(&self) -> &'static str {
        self.op_type
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        let axes = self.known(inputs)?;
        let empty = |a: &Axis| a.input == 0 && a.output > 0;
        if axes.iter().any(|a| empty(a) || a.input >= u32::MAX as usize) {
            return Err(OpError::Shape(format!("{} of {:?}", self.op_type, x.dims)));
        }
        if !matches!(self.sampling.filter, Filter::Nearest(_)) && !x.dtype.is_float() {
            return Err(OpError::Unsupported(format!("interpolating {} (only nearest resizes it)", x.dtype)));
        }
        if !x.dtype.is_float() && self.extrapolation != 0.0 {
            return Err(OpError::Unsupported(format!("'extrapolation_value' other than 0 for {}", x.dtype)));
        }
        let y: Dims = axes.iter().map(|a| a.output).collect();
        Ok(vec![Meta::new(x.dtype, &self.layout.of(&y))])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (input, y) = (need(x, 0)?, out(y, 0)?);
        let axes = self.resolve(&self.layout.ordinary(input.dims), |i| match get(x, i) {
            Some(v) if !v.is_empty() => numbers(v).map(Some),
            _ => Ok(None),
        })?;
        if y.is_empty() {
            return Ok(());
        }
        let s = &self.sampling;
        let passes = Passes::of(s, &axes, self.layout, input.dims);
        let sizes = passes.parts(s, input.dtype.size());
        let y_dims = Dims::from_slice(y.dims);
        if let Filter::Nearest(_) = s.filter {
            by_size!(input.dtype, T => {
                let (index, weight, between) = parts::<T, f32>(cx, sizes)?;
                let (x, y) = (units::<T>(input.bytes)?, units_mut(y.bytes)?);
                passes.each(false, x, y, between, |axis, outer, inner, x, y| {
                    s.table(axis, index, weight);
                    pick(&pass(s, axis, [outer, inner], index, weight), x, y);
                });
            });
        } else {
            float_dispatch!(input.dtype, T => {
                let (index, weight, between) = parts::<T, T>(cx, sizes)?;
                let (x, y) = (input.get::<T>()?, y.get::<T>()?);
                passes.each(false, x, y, between, |axis, outer, inner, x, y| {
                    s.table(axis, index, weight);
                    resample(&pass(s, axis, [outer, inner], index, weight), x, y);
                });
                Ok(())
            })?;
        }
        if s.coordinates != Coordinates::TfCropAndResize {
            return Ok(());
        }
        for (place, axis) in &passes.steps {
            let (outer, inner) = (y_dims[..*place].iter().product(), y_dims[place + 1..].iter().product());
            match y.dtype {
                DType::F32 => fill_outside(outer, inner, axis, s, self.extrapolation, y.get::<f32>()?),
                DType::F64 => {
                    fill_outside(outer, inner, axis, s, f64::from(self.extrapolation), y.get::<f64>()?);
                }
                other => by_size!(other, T => {
                    fill_outside(outer, inner, axis, s, 0, units_mut::<T>(y.bytes)?);
                }),
            }
        }
        Ok(())
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let (Ok(axes), Some(x)) = (self.known(inputs), get(inputs, 0)) else { return 0 };
        Passes::of(&self.sampling, &axes, self.layout, &x.dims).scratch(&self.sampling, x.dtype.size())
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        rank_of(inputs, 0)?;
        let op = Resize { layout: Layout::Last, ..self.clone() };
        Some(ChannelsLast::by(op, &[true], &[true]))
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        let dy = g.dy0()?;
        let metas = g.metas()?;
        let refs: Vec<Option<&Meta>> = metas.iter().map(Option::as_ref).collect();
        let axes = self.known(&refs)?;
        if (1..g.inputs()).any(|i| g.wants(i)) {
            return Err(OpError::NotDifferentiable("the scales and regions of Resize".into()));
        }
        // dX[index] += weight · dY, axis by axis   (as X)
        let op = ResizeGrad { sampling: self.sampling, axes, layout: Layout::First };
        Ok(Grads::from_elem(Some(g.emit(op, &[dy])?), 1))
    }
}

/// The gradient of `Resize` from dY.
#[derive(Debug)]
pub struct ResizeGrad {
    sampling: Sampling,
    /// Of the dimensions with channels first.
    axes: Axes,
    layout: Layout,
}

impl ResizeGrad {
    /// Dimensions of dX and dY.
    fn dims(&self) -> [Dims; 2] {
        let x: Dims = self.axes.iter().map(|a| a.input).collect();
        let y: Dims = self.axes.iter().map(|a| a.output).collect();
        [self.layout.of(&x), self.layout.of(&y)]
    }

    fn passes(&self) -> Passes {
        Passes::of(&self.sampling, &self.axes, self.layout, &self.dims()[0])
    }
}

impl Op for ResizeGrad {
    fn name(&self) -> &'static str {
        "ResizeGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (dy, [x, y]) = (need(inputs, 0)?, self.dims());
        match dy.dims == y {
            true => Ok(vec![Meta::new(dy.dtype, &x)]),
            false => Err(OpError::Shape(format!("a gradient of {:?} where {y:?} is needed", dy.dims))),
        }
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (dy, s, passes) = (need(x, 0)?, &self.sampling, self.passes());
        let sizes = passes.parts(s, dy.dtype.size());
        float_dispatch!(dy.dtype, T => {
            let dx = out(y, 0)?.get::<T>()?;
            if dy.is_empty() {
                dx.fill(0.0);
                return Ok(());
            }
            let (index, weight, between) = parts::<T, T>(cx, sizes)?;
            passes.each(true, dy.get::<T>()?, dx, between, |axis, outer, inner, dy, dx| {
                s.table(axis, index, weight);
                resample_grad(&pass(s, axis, [outer, inner], index, weight), dy, dx);
            });
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let size = get(inputs, 0).map_or(8, |m| m.dtype.size());
        self.passes().scratch(&self.sampling, size)
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        rank_of(inputs, 0)?;
        let op = ResizeGrad { sampling: self.sampling, axes: self.axes.clone(), layout: Layout::Last };
        Some(ChannelsLast::by(op, &[true], &[true]))
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("second derivatives of Resize".into()))
    }
}

pub(super) const ROWS: &[Row] =
    &[Row::new("Resize", 10, Resize::make), Row::new("Upsample", 7, Resize::make)];

#[cfg(test)]
pub(super) use tests::cases;
