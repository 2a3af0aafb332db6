//! Conversions of element type, and the identity.

use std::sync::Arc;

use half::{bf16, f16};
use num_traits::AsPrimitive;

use crate::error::OpError;
use crate::graph::GradBuilder;
use crate::kernels::integer::Integer;
use crate::kernels::par;
use crate::ops::layout::rank_of;
use crate::ops::{ChannelsLast, Cx, Grads, Op, Row, Spec, get, need, out};
use crate::tensor::{Conversion, DType, Elem, Meta, Round, View, ViewMut, to_bf16, to_f16};
use crate::{dtype_dispatch, int_dispatch};

/// ONNX `Cast` (opset 6 to 25) and `CastLike` (opset 15).
///
/// Floats become integers by truncation and saturate (NaN is 0), integers wrap, anything but 0 is true.
/// A half type's values are rounded to that type and held in its working type, `f32`.
#[derive(Debug, Clone, Copy)]
pub struct CastTo {
    /// `None`: the type of input 1.
    to: Option<DType>,
    /// To a narrow float.
    how: Conversion,
}

impl CastTo {
    pub fn new(to: DType) -> Self {
        CastTo { to: Some(to), how: Conversion::default() }
    }
}

impl Op for CastTo {
    fn name(&self) -> &'static str {
        if self.to.is_some() { "Cast" } else { "CastLike" }
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        let to = match self.to {
            Some(to) => to,
            None => need(inputs, 1)?.dtype,
        };
        Ok(vec![Meta::new(to.working(), &x.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (x, y) = (need(x, 0)?, out(y, 0)?);
        let half = self.to.filter(|to| matches!(to, DType::F16 | DType::BF16));
        // What networks do often is compiled for its pair of types, the rest goes by way of the widest ones.
        match (x.dtype, y.dtype) {
            (DType::F32, DType::F32) if half == Some(DType::F16) => {
                map(y.get()?, x.get()?, |v: f32| f16::from_f32(v).to_f32());
            }
            (DType::F32, DType::F32) if half.is_some() => {
                map(y.get()?, x.get()?, |v: f32| bf16::from_f32(v).to_f32());
            }
            (_, DType::F32) if half == Some(DType::F16) => {
                by_way_of(x, y.get()?, floats, |v| to_f16(v).to_f32());
            }
            (_, DType::F32) if half.is_some() => by_way_of(x, y.get()?, floats, |v| to_bf16(v).to_f32()),
            (from, to) if from == to => y.bytes.copy_from_slice(x.bytes),
            (DType::F32, DType::Bool) => map(y.get()?, x.get()?, |v: f32| u8::from(v != 0.0)),
            (_, DType::Bool) => by_way_of(x, y.get()?, floats, |v| u8::from(v != 0.0)),
            (_, to) if to.is_narrow() => by_way_of(x, &mut *y.bytes, floats, |v| to.encode(v, self.how)),
            (DType::F32, to) => {
                dtype_dispatch!(to, D => map(y.get::<D>()?, x.get::<f32>()?, AsPrimitive::as_))
            }
            (from, DType::F32) if !from.is_narrow() => {
                dtype_dispatch!(from, S => map(y.get::<f32>()?, x.get::<S>()?, AsPrimitive::as_));
            }
            (DType::I32, DType::I64) => map(y.get()?, x.get()?, |v: i32| i64::from(v)),
            (DType::I64, DType::I32) => map(y.get()?, x.get()?, |v: i64| v as i32),
            (from, to) if from.is_float() || from.is_narrow() || to.is_float() => {
                dtype_dispatch!(to, D => by_way_of(x, y.get::<D>()?, floats, AsPrimitive::as_));
            }
            (_, to) => {
                return int_dispatch!(to, D => {
                    by_way_of(x, y.get::<D>()?, integers, D::narrow);
                    Ok(())
                });
            }
        }
        Ok(())
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], _outputs: &[Option<&Meta>]) -> Option<ChannelsLast> {
        rank_of(inputs, 0).map(|_| ChannelsLast::same(&[true], &[true]))
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // dX = dY in X's type; rounding to a half type is passed straight through
        let (x, dy) = (g.x(0)?, g.dy0()?);
        let (from, to) = (g.meta(x)?.dtype, g.meta(dy)?.dtype);
        let dx = match (g.wants(0), from == to) {
            (false, _) => None,
            (true, true) => Some(dy),
            (true, false) => Some(g.emit(CastTo::new(from), &[dy])?),
        };
        // Of the other operand the type alone is read.
        let like = match g.wants(1) {
            true => Some(g.zeros_like(g.x(1)?)?),
            false => None,
        };
        Ok(Grads::from_slice(&[dx, like]))
    }

    fn in_float64(&self) -> Option<Arc<dyn Op>> {
        let narrow = matches!(self.to, Some(DType::F32 | DType::F16 | DType::BF16));
        narrow.then(|| Arc::new(CastTo::new(DType::F64)) as _)
    }

    fn cheap(&self) -> bool {
        true
    }
}

/// `y = f(x)`, compiled for the baseline: there are many pairs of types.
fn map<X: Elem, Y: Elem>(y: &mut [Y], x: &[X], f: impl Fn(X) -> Y + Sync) {
    par::pieces(y, |start, y| y.iter_mut().zip(&x[start..]).for_each(|(y, x)| *y = f(*x)));
}

/// Elements that are widened at a time.
const BLOCK: usize = 256;

/// `y = f(x)`, by way of blocks of a type `W` that holds every value of X's.
fn by_way_of<W: Copy + Default, Y: Elem>(
    x: View,
    y: &mut [Y],
    widen: fn(View, usize, &mut [W]),
    f: impl Fn(W) -> Y + Sync,
) {
    par::pieces(y, |start, y| {
        let mut wide = [W::default(); BLOCK];
        for (k, y) in y.chunks_mut(BLOCK).enumerate() {
            let wide = &mut wide[..y.len()];
            widen(x, start + k * BLOCK, wide);
            y.iter_mut().zip(wide).for_each(|(y, w)| *y = f(*w));
        }
    });
}

/// The elements from `start` on as float64; the nearest ones of large integers.
fn floats(x: View, start: usize, out: &mut [f64]) {
    if x.dtype.is_narrow() {
        return out.iter_mut().zip(&x.bytes[start..]).for_each(|(o, v)| *o = x.dtype.decode(*v));
    }
    dtype_dispatch!(x.dtype, S => {
        let x = x.get::<S>().unwrap_or_default();
        out.iter_mut().zip(&x[start..]).for_each(|(o, v)| *o = v.as_());
    });
}

/// The elements from `start` on, which are integers or bools.
fn integers(x: View, start: usize, out: &mut [i128]) {
    let dtype = if x.dtype == DType::Bool { DType::U8 } else { x.dtype };
    let done = int_dispatch!(dtype, S => {
        x.get::<S>().map(|x| out.iter_mut().zip(&x[start..]).for_each(|(o, v)| *o = v.wide()))
    });
    debug_assert!(done.is_ok(), "{done:?}");
}

/// ONNX `Identity` (opset 1 to 25): the same bytes.
#[derive(Debug, Clone, Copy)]
pub struct Identity;

impl Op for Identity {
    fn name(&self) -> &'static str {
        "Identity"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        Ok(vec![need(inputs, 0)?.clone()])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        if let Some(x) = get(x, 0) {
            out(y, 0)?.bytes.copy_from_slice(x.bytes);
        }
        Ok(())
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], outputs: &[Option<&Meta>]) -> Option<ChannelsLast> {
        ChannelsLast::elementwise(inputs, outputs)
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // dX = dY
        Ok(Grads::from_slice(&[Some(g.dy0()?)]))
    }

    fn is_view(&self) -> bool {
        true
    }

    fn cheap(&self) -> bool {
        true
    }
}

fn cast(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
    let code = spec.attrs.int("to")?.ok_or_else(|| OpError::Attribute("'to' is missing".into()))?;
    let to = i32::try_from(code).ok().and_then(DType::from_onnx);
    let to = to.ok_or_else(|| match code {
        8 => OpError::Unsupported("conversion to string".into()),
        code => OpError::Unsupported(format!("conversion to ONNX element type {code}")),
    })?;
    Ok(Arc::new(CastTo { to: Some(to), how: conversion(spec)? }))
}

fn conversion(spec: &Spec) -> Result<Conversion, OpError> {
    let round = match spec.attrs.string("round_mode")?.as_deref() {
        None | Some("up") => Round::Up,
        Some("down") => Round::Down,
        Some("nearest") => Round::Nearest,
        Some(other) => return Err(OpError::Attribute(format!("'round_mode' is '{other}'"))),
    };
    Ok(Conversion { saturate: spec.attrs.flag_or("saturate", true)?, round })
}

pub(super) const ROWS: &[Row] = &[
    Row::new("Cast", 6, cast),
    Row::new("CastLike", 15, |s| Ok(Arc::new(CastTo { to: None, how: conversion(s)? }))),
    Row::new("Identity", 1, |_| Ok(Arc::new(Identity))),
];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    use crate::tensor::Tensor;
    let to = |t: DType| t.to_onnx() as i64;
    vec![
        Case::new("Cast", 6).int("to", to(DType::F64)).input(&[2, 3]),
        Case::new("Cast", 13).named("int").int("to", to(DType::I32)).within(&[9], -9.0, 9.0).forward_only(),
        Case::new("Cast", 9).named("images").int("to", to(DType::F32)).input(&[2, 3, 4]).forward_only(),
        Case::new("CastLike", 15).input(&[2, 3]).fixed(Tensor::scalar(1.0)),
        Case::new("Identity", 13).input(&[2, 3]),
        Case::new("Identity", 13).named("images").input(&[2, 3, 4]),
        Case::new("Identity", 13).named("scalar").input(&[]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::eval;
    use crate::tensor::Tensor;

    #[test]
    fn every_pair_of_types() {
        for from in DType::WIDE {
            for to in DType::WIDE {
                let x = Tensor::from_slice(&[3], &[0.0, 1.0, 1.0]).unwrap().cast(from);
                let y = eval(&CastTo::new(to), &[Some(&x)]).unwrap();
                assert_eq!(y[0].dtype(), to.working(), "{from} to {to}");
                assert_eq!(y[0].to_f64(), [0.0, 1.0, 1.0], "{from} to {to}");
            }
        }
    }

    #[test]
    fn saturates_rounds_and_wraps() {
        let floats = [300.7f32, -1.5, f32::NAN, f32::INFINITY, -1e20, 1.000_244_2];
        let x = Tensor::from_slice(&[6], &floats).unwrap();
        let run = |x: &Tensor, to| eval(&CastTo::new(to), &[Some(x)]).unwrap()[0].to_f64();
        assert_eq!(run(&x, DType::U8), [255.0, 0.0, 0.0, 255.0, 0.0, 1.0]);
        assert_eq!(run(&x, DType::I32)[..3], [300.0, -1.0, 0.0]);
        assert_eq!(run(&x, DType::Bool), [1.0; 6]);
        // Halves: 1 + 2⁻¹² rounds to 1, 300.7 to the nearest quarter, 1e20 overflows.
        let half = run(&x, DType::F16);
        assert_eq!((half[0], half[4], half[5]), (300.75, f64::NEG_INFINITY, 1.0));
        assert_eq!(run(&Tensor::ints(&[257, -1]), DType::U8), [1.0, 255.0]);
    }
}
