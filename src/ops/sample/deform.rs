//! `DeformConv` and its gradients.

use std::sync::Arc;

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::norm::Channels;
use crate::kernels::sample::deform::{self as kernel, Geometry, Operands};
use crate::ops::batch_norm::ChannelSum;
use crate::ops::sample::{expect, second};
use crate::ops::window::{AutoPad, Window};
use crate::ops::{Cx, Grads, Op, Spec, get, need, out};
use crate::tensor::{DType, Dims, Meta, View, ViewMut};

/// ONNX `DeformConv` (opset 19): X (N, C, H, W), W (M, C/group, kernel), offset (N, offset groups · taps · 2, y…), B (M),
/// mask (N, offset groups · taps, y…). Two spatial dimensions.
#[derive(Debug, Clone)]
pub struct DeformConv {
    window: Window,
    groups: usize,
    parts: usize,
}

impl DeformConv {
    pub(super) fn make(s: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let count = |name: &str| match s.attrs.int_or(name, 1)? {
            v if (1..=i64::from(i32::MAX)).contains(&v) => Ok(v as usize),
            v => Err(OpError::Attribute(format!("'{name}' is {v}"))),
        };
        let window = Window { auto_pad: AutoPad::Explicit, ceil: false, ..Window::of(s.attrs)? };
        Ok(Arc::new(DeformConv { window, groups: count("group")?, parts: count("offset_group")? }))
    }

    fn geometry(&self, x: &[usize], w: &[usize]) -> Result<Geometry, OpError> {
        let bad = || OpError::Shape(format!("{self:?} of {x:?} with weights of {w:?}"));
        if x.len() >= 3 && x.len() != 4 {
            return Err(OpError::Unsupported(format!("DeformConv of {x:?} (of images only)")));
        }
        let (&[n, c, height, width], &[oc, each, ..]) = (x, w) else { return Err(bad()) };
        if w.len() != 4
            || each * self.groups != c
            || !oc.is_multiple_of(self.groups)
            || !c.is_multiple_of(self.parts)
            || c == 0
        {
            return Err(bad());
        }
        let r = self.window.resolve(&x[2..], &w[2..])?;
        let two = |v: [usize; 3]| [v[1], v[2]];
        Ok(Geometry {
            n,
            c,
            oc,
            groups: self.groups,
            parts: self.parts,
            image: [height, width],
            k: two(r.k),
            y: two(r.y),
            stride: two(r.stride),
            dilation: two(r.dilation),
            pad: two(r.pad),
        })
    }

    /// Checks X, W, offset and mask.
    fn check(&self, x: &Meta, w: &Meta, offset: &Meta, mask: Option<&Meta>) -> Result<Geometry, OpError> {
        let g = self.geometry(&x.dims, &w.dims)?;
        let rows = self.parts * g.k[0] * g.k[1];
        expect("weights", w, x, &w.dims)?;
        expect("offsets", offset, x, &[g.n, 2 * rows, g.y[0], g.y[1]])?;
        match mask {
            Some(mask) => expect("a mask", mask, x, &[g.n, rows, g.y[0], g.y[1]]).map(|()| g),
            None => Ok(g),
        }
    }
}

fn bytes(g: &Geometry, dtype: DType) -> usize {
    match dtype {
        DType::F64 => kernel::scratch::<f64>(g) * size_of::<f64>(),
        _ => kernel::scratch::<f32>(g) * size_of::<f32>(),
    }
}

impl Op for DeformConv {
    fn name(&self) -> &'static str {
        "DeformConv"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (x, w) = (need(inputs, 0)?, need(inputs, 1)?);
        let g = self.check(x, w, need(inputs, 2)?, get(inputs, 4))?;
        if let Some(b) = get(inputs, 3) {
            expect("a bias", b, x, &[g.oc])?;
        }
        Ok(vec![Meta::new(x.dtype, &[g.n, g.oc, g.y[0], g.y[1]])])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (input, w) = (need(x, 0)?, need(x, 1)?);
        let g = self.geometry(input.dims, w.dims)?;
        float_dispatch!(input.dtype, T => {
            let (bias, mask) = (get(x, 3), get(x, 4));
            let bias = bias.map(|b| b.get::<T>()).transpose()?;
            let operands = Operands {
                x: input.get::<T>()?,
                w: w.get()?,
                offset: need(x, 2)?.get()?,
                mask: mask.map(|m| m.get()).transpose()?,
            };
            let scratch = cx.room(kernel::scratch::<T>(&g))?;
            kernel::forward(&g, &operands, bias, out(y, 0)?.get()?, scratch);
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let (Some(x), Some(w)) = (get(inputs, 0), get(inputs, 1)) else { return 0 };
        self.geometry(&x.dims, &w.dims).map_or(0, |g| bytes(&g, x.dtype))
    }

    fn multiply_adds(&self, inputs: &[Option<&Meta>]) -> usize {
        let (Some(x), Some(w)) = (get(inputs, 0), get(inputs, 1)) else { return 0 };
        self.geometry(&x.dims, &w.dims).map_or(0, |g| g.multiply_adds())
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        let dy = g.dy0()?;
        let inputs = [Some(dy), g.x_opt(0), g.x_opt(1), g.x_opt(2), g.x_opt(4)];
        let mut grads = Grads::from_elem(None, g.inputs());
        // With D = Wᵀ·dY the gradient of the columns:
        // dX[element] += weight · mask · D   (N, C, H, W)
        // dW = dY · columnsᵀ   (M, C/group, kernel)
        // doffset = Σ_c D · mask · Σ weight' · X, dmask = Σ_c D · Σ weight · X
        for (i, with_respect_to) in [(0, Wrt::Input), (1, Wrt::Weights), (2, Wrt::Offsets), (4, Wrt::Mask)] {
            if g.wants(i) {
                let op = DeformConvGrad { conv: self.clone(), with_respect_to };
                grads[i] = Some(g.emit_all(op, &inputs, 1)?[0]);
            }
        }
        if g.wants(3) {
            // db = Σ_{n,i} dY[n, :, i]   (M)
            let dims: &Dims = &g.meta(dy)?.dims;
            let channels = Channels { n: dims[0], c: dims[1], s: dims[2] * dims[3] };
            grads[3] = Some(g.emit(ChannelSum { channels }, &[dy])?);
        }
        Ok(grads)
    }
}

/// Which operand a gradient is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wrt {
    Input,
    Weights,
    Offsets,
    Mask,
}

/// A gradient of `DeformConv` from dY, X, W, offsets and, where there is one, the mask.
#[derive(Debug)]
pub struct DeformConvGrad {
    pub conv: DeformConv,
    pub with_respect_to: Wrt,
}

impl Op for DeformConvGrad {
    fn name(&self) -> &'static str {
        "DeformConvGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (x, w, offset, mask) = (need(inputs, 1)?, need(inputs, 2)?, need(inputs, 3)?, get(inputs, 4));
        self.conv.check(x, w, offset, mask)?;
        let like = match self.with_respect_to {
            Wrt::Input => x,
            Wrt::Weights => w,
            Wrt::Offsets => offset,
            Wrt::Mask => need(inputs, 4)?,
        };
        Ok(vec![Meta::new(like.dtype, &like.dims)])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (dy, input, w, mask) = (need(x, 0)?, need(x, 1)?, need(x, 2)?, get(x, 4));
        let g = self.conv.geometry(input.dims, w.dims)?;
        float_dispatch!(dy.dtype, T => {
            let operands = Operands {
                x: input.get::<T>()?,
                w: w.get()?,
                offset: need(x, 3)?.get()?,
                mask: mask.map(|m| m.get()).transpose()?,
            };
            let kernel = match self.with_respect_to {
                Wrt::Input => kernel::input_grad,
                Wrt::Weights => kernel::weight_grad,
                Wrt::Offsets => kernel::offset_grad,
                Wrt::Mask => kernel::mask_grad,
            };
            let scratch = cx.room(kernel::scratch::<T>(&g))?;
            kernel(&g, &operands, dy.get()?, out(y, 0)?.get()?, scratch);
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let (Some(x), Some(w)) = (get(inputs, 1), get(inputs, 2)) else { return 0 };
        self.conv.geometry(&x.dims, &w.dims).map_or(0, |g| bytes(&g, x.dtype))
    }

    fn multiply_adds(&self, inputs: &[Option<&Meta>]) -> usize {
        let (Some(x), Some(w)) = (get(inputs, 1), get(inputs, 2)) else { return 0 };
        self.conv.geometry(&x.dims, &w.dims).map_or(0, |g| g.multiply_adds())
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(second("DeformConv"))
    }
}
