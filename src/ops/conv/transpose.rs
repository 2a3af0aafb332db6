//! Transposed convolution: the input gradient of a convolution from Y to X, whose own forward pass and weight gradient
//! are the gradients.

use std::sync::Arc;

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::conv::{self as kernel, Epilogue, Geometry};
use crate::kernels::elementwise::Clamp;
use crate::kernels::half::{Elements, ElementsMut};
use crate::kernels::layout::Layout;
use crate::kernels::norm::Channels;
use crate::ops::batch_norm::ChannelSum;
use crate::ops::conv::input_grad::input_grad_room;
use crate::ops::conv::{Conv, ConvWeightGrad, expect, floats, same_type};
use crate::ops::window::{AutoPad, Window};
use crate::ops::{ChannelsLast, Cx, Grads, Op, Row, Spec, get, need, out};
use crate::tensor::{Dims, Meta, View, ViewMut};

/// ONNX `ConvTranspose` (opset 1): X (N, C, spatial…), W (C, M/group, kernel…), B (M), over one to three dimensions.
#[derive(Debug, Clone)]
pub struct ConvTranspose {
    /// Pads take away from the result.
    pub window: Window,
    pub groups: usize,
    /// Elements added after each dimension; empty: none.
    pub output_padding: Vec<usize>,
    /// Spatial extents of the result, from which the pads follow.
    pub output_shape: Vec<usize>,
    /// Of X and Y, and of their gradients; the weights lie as in the file.
    pub layout: Layout,
}

impl ConvTranspose {
    fn make(s: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let groups = s.attrs.int_or("group", 1)?;
        if groups < 1 {
            return Err(OpError::Attribute(format!("'group' is {groups}")));
        }
        let list = |name: &str| -> Result<Vec<usize>, OpError> {
            let values = s.attrs.ints(name)?.unwrap_or_default();
            let fits = |v: &i64| (0..=i64::from(i32::MAX)).contains(v);
            match values.iter().all(fits) {
                true => Ok(values.iter().map(|v| *v as usize).collect()),
                false => Err(OpError::Attribute(format!("'{name}' is {values:?}"))),
            }
        };
        Ok(Arc::new(ConvTranspose {
            window: Window::of(s.attrs)?,
            groups: groups as usize,
            output_padding: list("output_padding")?,
            output_shape: list("output_shape")?,
            layout: Layout::First,
        }))
    }

    /// This operator with the channels of X and Y last.
    fn last(&self) -> ConvTranspose {
        ConvTranspose { layout: Layout::Last, ..self.clone() }
    }

    /// The sizes of the convolution from Y to X whose input gradient this is, and Y's dimensions.
    fn geometry(&self, x: &[usize], w: &[usize]) -> Result<(Geometry, Dims), OpError> {
        let x = &self.layout.ordinary(x);
        let Window { auto_pad, kernel, strides, dilations, pads, .. } = &self.window;
        let rank = x.len().saturating_sub(2);
        let bad = || OpError::Shape(format!("{self:?} of {x:?} with weights of {w:?}"));
        let fits = |v: &[usize], n: usize| v.is_empty() || v.len() == n;
        if rank == 0
            || w.len() != x.len()
            || w[0] != x[1]
            || !w[0].is_multiple_of(self.groups)
            || !(kernel.is_empty() || kernel == &w[2..])
            || !fits(strides, rank)
            || !fits(dilations, rank)
            || !fits(pads, 2 * rank)
            || !fits(&self.output_padding, rank)
            // Old files give all of the result's dimensions.
            || !(fits(&self.output_shape, rank) || self.output_shape.len() == rank + 2)
        {
            return Err(bad());
        }
        if rank > 3 {
            return Err(OpError::Unsupported(format!("{rank} spatial dimensions (1 to 3 are supported)")));
        }
        let axis = 3 - rank;
        let mut g = Geometry {
            layout: self.layout,
            n: x[0],
            c: w[1] * self.groups,
            oc: x[1],
            groups: self.groups,
            axis,
            x: [1; 3],
            y: [1; 3],
            k: [1; 3],
            stride: [1; 3],
            dilation: [1; 3],
            pad: [0; 3],
            pairs: false,
        };
        let shape = &self.output_shape[self.output_shape.len().saturating_sub(rank)..];
        let at = |v: &[usize], i: usize, default: usize| v.get(i).copied().unwrap_or(default);
        for i in 0..rank {
            let d = axis + i;
            let (extent, k) = (x[2 + i], w[2 + i]);
            let (stride, dilation) = (at(strides, i, 1), at(dilations, i, 1));
            if extent == 0 || k == 0 {
                return Err(bad());
            }
            let whole = stride * (extent - 1) + at(&self.output_padding, i, 0) + (k - 1) * dilation + 1;
            let wanted = match auto_pad {
                _ if !shape.is_empty() => Some(shape[i]),
                AutoPad::SameUpper | AutoPad::SameLower => Some(extent * stride),
                AutoPad::Explicit | AutoPad::Valid => None,
            };
            let (pad, extent_out) = match wanted {
                Some(wanted) => {
                    let total = whole.saturating_sub(wanted);
                    let small = total / 2;
                    (if *auto_pad == AutoPad::SameUpper { small } else { total - small }, wanted)
                }
                None if *auto_pad == AutoPad::Valid => (0, whole),
                None => {
                    let pad = at(pads, i, 0);
                    (pad, whole.checked_sub(pad + at(pads, rank + i, 0)).ok_or_else(bad)?)
                }
            };
            (g.x[d], g.y[d], g.k[d]) = (extent_out, extent, k);
            (g.stride[d], g.dilation[d], g.pad[d]) = (stride, dilation, pad);
        }
        let mut y = Dims::from_slice(&[g.n, g.c]);
        y.extend_from_slice(&g.x[axis..]);
        Ok((g, self.layout.of(&y)))
    }

    /// The convolution of these sizes.
    fn convolution(&self, g: &Geometry) -> Conv {
        let of = |extents: &[usize; 3]| extents[g.axis..].to_vec();
        let mut pads = of(&g.pad);
        pads.resize(2 * pads.len(), 0);
        let window = Window {
            auto_pad: AutoPad::Explicit,
            kernel: of(&g.k),
            strides: of(&g.stride),
            dilations: of(&g.dilation),
            pads,
            ceil: false,
            output: of(&g.y),
        };
        Conv {
            window,
            groups: self.groups,
            normalises: None,
            clamp: Clamp::NONE,
            layout: self.layout,
            pairs: false,
        }
    }
}

impl Op for ConvTranspose {
    fn name(&self) -> &'static str {
        "ConvTranspose"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (x, w) = (need(inputs, 0)?, need(inputs, 1)?);
        same_type(x, w)?;
        let (g, y) = self.geometry(&x.dims, &w.dims)?;
        if let Some(b) = get(inputs, 2) {
            same_type(x, b)?;
            expect(&b.dims, &[g.c])?;
        }
        Ok(vec![Meta::new(x.dtype, &y)])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (input, w) = (need(x, 0)?, need(x, 1)?);
        let (g, _) = self.geometry(input.dims, w.dims)?;
        float_dispatch!(input.dtype, T => {
            let bias = get(x, 2).map(|b| b.get::<T>()).transpose()?;
            let (epilogue, y) = (Epilogue { bias, ..Epilogue::none() }, out(y, 0)?.get::<T>()?);
            let input = Elements::Whole(input.get::<T>()?);
            kernel::transposed(&g, input, w.get::<T>()?, epilogue, ElementsMut::Whole(y), floats(cx.scratch)?);
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let (Some(x), Some(w)) = (get(inputs, 0), get(inputs, 1)) else { return 0 };
        self.geometry(&x.dims, &w.dims).map_or(0, |(g, _)| input_grad_room(&g, x))
    }

    fn channels_last(&self, _: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        Some(ChannelsLast::by(self.last(), &[true], &[true]).wanted())
    }

    fn multiply_adds(&self, inputs: &[Option<&Meta>]) -> usize {
        let (Some(x), Some(w)) = (get(inputs, 0), get(inputs, 1)) else { return 0 };
        self.geometry(&x.dims, &w.dims).map_or(0, |(g, _)| g.multiply_adds())
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        let (x, w, dy) = (g.x(0)?, g.x(1)?, g.dy0()?);
        let w_dims = g.meta(w)?.dims.clone();
        let (geometry, _) = self.geometry(&g.meta(x)?.dims, &w_dims)?;
        let conv = self.convolution(&geometry);
        let mut grads = Grads::from_elem(None, g.inputs());
        if g.wants(0) {
            // dX[i] = Σ_t W[t]·dY[stride·i + dilation·t − pad]   (N, C, spatial…)
            grads[0] = Some(g.emit(conv.clone(), &[dy, w])?);
        }
        if g.wants(1) {
            // dW[t] = Σ_{n,i} X[i]·dY[stride·i + dilation·t − pad]ᵀ   (C, M/group, kernel…)
            grads[1] = Some(g.emit(ConvWeightGrad { conv, w: w_dims }, &[x, dy])?);
        }
        if g.wants(2) {
            // db = Σ_{n,i} dY[n, :, i]   (M)
            let channels = Channels { n: geometry.n, c: geometry.c, s: geometry.x.iter().product() };
            grads[2] = Some(g.emit(ChannelSum { channels }, &[dy])?);
        }
        Ok(grads)
    }
}

pub(in crate::ops) const ROWS: &[Row] = &[Row::new("ConvTranspose", 1, ConvTranspose::make)];

#[cfg(test)]
pub(in crate::ops) fn cases() -> Vec<crate::ops::cases::Case> {
    use crate::ops::cases::Case;
    let case =
        |name: &str, x: &[usize], w: &[usize]| Case::new("ConvTranspose", 11).named(name).input(x).input(w);
    vec![
        case("2-D", &[2, 3, 4, 5], &[3, 4, 3, 3]),
        case("bias, stride, pads", &[2, 3, 4, 5], &[3, 5, 3, 2])
            .input(&[5])
            .ints("strides", &[2, 3])
            .ints("pads", &[1, 0, 1, 1]),
        case("few channels", &[2, 6, 5, 4], &[6, 2, 3, 3]).input(&[2]).ints("pads", &[1; 4]),
        case("doubling", &[1, 18, 5, 4], &[18, 17, 2, 2]).input(&[17]).ints("strides", &[2, 2]),
        case("like a convolution", &[2, 18, 8, 8], &[18, 17, 3, 3]).input(&[17]).ints("pads", &[1; 4]),
        case("output padding", &[2, 4, 3, 4], &[4, 5, 3, 3])
            .input(&[5])
            .ints("strides", &[2, 3])
            .ints("output_padding", &[1, 2]),
        case("output padding beyond the stride", &[1, 2, 3, 4], &[2, 5, 2, 2])
            .ints("dilations", &[3, 2])
            .ints("output_padding", &[2, 1]),
        case("dilated", &[1, 5, 4, 4], &[5, 6, 3, 2]).ints("dilations", &[2, 3]).ints("strides", &[1, 2]),
        case("output shape", &[1, 2, 3, 3], &[2, 5, 3, 3])
            .ints("strides", &[3, 2])
            .ints("output_shape", &[10, 6]),
        case("larger output shape", &[1, 2, 3, 3], &[2, 5, 2, 2])
            .ints("strides", &[2, 2])
            .ints("output_shape", &[8, 6])
            .string("auto_pad", "SAME_UPPER"),
        case("SAME_UPPER", &[1, 3, 4, 5], &[3, 5, 3, 4])
            .string("auto_pad", "SAME_UPPER")
            .ints("strides", &[2, 3]),
        case("SAME_LOWER", &[1, 3, 4, 5], &[3, 5, 3, 4])
            .string("auto_pad", "SAME_LOWER")
            .ints("strides", &[2, 1]),
        case("VALID", &[1, 3, 4, 5], &[3, 5, 3, 3]).string("auto_pad", "VALID"),
        case("groups", &[2, 4, 4, 5], &[4, 3, 3, 3]).int("group", 2).input(&[6]).ints("strides", &[2, 2]),
        case("depthwise", &[2, 3, 4, 5], &[3, 1, 4, 4])
            .int("group", 3)
            .input(&[3])
            .ints("strides", &[2, 2])
            .ints("pads", &[1; 4]),
        case("1-D", &[2, 3, 6], &[3, 4, 4]).input(&[4]).ints("strides", &[2]).ints("pads", &[1, 1]),
        case("1-D to one channel", &[2, 3, 6], &[3, 1, 4]).input(&[1]).ints("strides", &[2]),
        case("3-D", &[1, 3, 2, 3, 4], &[3, 2, 2, 3, 2]).input(&[2]).ints("strides", &[2, 1, 2]),
        case("3-D groups", &[1, 4, 2, 3, 3], &[4, 2, 2, 2, 2])
            .int("group", 2)
            .ints("pads", &[0, 1, 0, 1, 0, 1]),
        case("no images", &[0, 3, 4, 5], &[3, 5, 3, 3]).input(&[5]),
    ]
}
