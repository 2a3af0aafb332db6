//! Pad in its four modes.

use std::sync::Arc;

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::layout::last;
use crate::kernels::pad::{Border, fold, mirror};
use crate::kernels::strided::{Extents, Placement, Strides};
use crate::ops::bytes::{Ints, by_size, ints, same_type, second_derivative, sized, units, units_mut};
use crate::ops::layout::{rank_of, reordered};
use crate::ops::slice::SliceGrad;
use crate::ops::{ChannelsLast, Cx, Grads, Op, Row, Spec, get, need, out};
use crate::tensor::{DType, Dims, Meta, View, ViewMut, axis};

/// ONNX `Pad`: pads (begins, then ends; negative ones crop) and the constant as attributes before opset 11, as
/// inputs after, with `axes` from opset 18. Modes constant, reflect, edge, and wrap (opset 19).
#[derive(Debug)]
pub struct Pad {
    border: Option<Border>,
    fixed: Option<(Ints, f32)>,
}

impl Pad {
    fn make(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let border = match spec.attrs.string("mode")?.as_deref() {
            None | Some("constant") => None,
            Some("reflect") => Some(Border::Reflect),
            Some("edge") => Some(Border::Edge),
            Some("wrap") => Some(Border::Wrap),
            Some(other) => return Err(OpError::Attribute(format!("'mode' is '{other}'"))),
        };
        let fixed = match spec.opset {
            ..=10 => {
                let pads = spec.attrs.ints("pads")?;
                let pads = pads.ok_or_else(|| OpError::Attribute("'pads' of Pad is missing".into()))?;
                Some((Ints::from_slice(&pads), spec.attrs.float_or("value", 0.0)?))
            }
            _ => None,
        };
        Ok(Arc::new(Pad { border, fixed }))
    }

    fn before(&self, inputs: &[Option<&Meta>]) -> Result<Ints, OpError> {
        let rank = need(inputs, 0)?.rank();
        match &self.fixed {
            Some((pads, _)) => begins(rank, pads, None),
            None => {
                let axes = get(inputs, 3).map(|m| m.ints(3)).transpose()?;
                begins(rank, &need(inputs, 1)?.ints(1)?, axes.as_deref())
            }
        }
    }
}

/// Pads before and after every axis, (begins, ends), in the order of the axes.
fn begins(rank: usize, pads: &[i64], axes: Option<&[i64]>) -> Result<Ints, OpError> {
    let count = axes.map_or(rank, <[i64]>::len);
    if pads.len() != 2 * count {
        return Err(OpError::Shape(format!("{} pads for {count} axes", pads.len())));
    }
    if let Some(p) = pads.iter().find(|p| p.unsigned_abs() > 1 << 40) {
        return Err(OpError::Shape(format!("a pad of {p}")));
    }
    let mut full = Ints::from_elem(0, 2 * rank);
    for i in 0..count {
        let a = axis(axes.map_or(i as i64, |a| a[i]), rank)?;
        full[a] = pads[i];
        full[rank + a] = pads[count + i];
    }
    Ok(full)
}

/// The constant mode as a placement of X in Y.
fn placement(x: &[usize], pads: &[i64], y: &[usize]) -> Placement {
    let rank = x.len();
    let side = |a: usize, sign: i64| (sign * pads[a]).max(0) as usize;
    let from: Extents = (0..rank).map(|a| side(a, -1).min(x[a])).collect();
    let to: Extents = (0..rank).map(|a| side(a, 1).min(y[a])).collect();
    let count = (0..rank).map(|a| (x[a] - from[a]).min(y[a] - to[a])).collect();
    let step = Strides::from_elem(1, rank);
    Placement { source: Extents::from_slice(x), target: Extents::from_slice(y), from, to, step, count }
}

impl Op for Pad {
    fn name(&self) -> &'static str {
        "Pad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        let pads = self.before(inputs)?;
        let rank = x.rank();
        let mut dims = Dims::new();
        for a in 0..rank {
            let d = x.dims[a] as i64;
            let n = d.checked_add(pads[a]).and_then(|n| n.checked_add(pads[rank + a])).filter(|&n| n >= 0);
            let n = n.ok_or_else(|| {
                OpError::Shape(format!("pads {} and {} for a dimension of {d}", pads[a], pads[rank + a]))
            })?;
            if self.border.is_some() && d == 0 && n > 0 {
                return Err(OpError::Shape(format!("nothing to pad with along axis {a}, which is empty")));
            }
            dims.push(n as usize);
        }
        if let Some(c) = get(inputs, 2) {
            same_type(x.dtype, c.dtype)?;
        }
        Ok(vec![sized(x.dtype, &dims)?])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (data, y) = (need(x, 0)?, out(y, 0)?);
        let pads = match &self.fixed {
            Some((pads, _)) => begins(data.dims.len(), pads, None)?,
            None => {
                let axes = get(x, 3).map(|v| ints(&v)).transpose()?;
                begins(data.dims.len(), &ints(&need(x, 1)?)?, axes.as_deref())?
            }
        };
        if let Some(border) = self.border {
            return by_size!(data.dtype, T => {
                mirror::<T>(units(data.bytes)?, data.dims, &pads, border, y.dims, units_mut(y.bytes)?);
                Ok(())
            });
        }
        let place = placement(data.dims, &pads, y.dims);
        let constant = get(x, 2).filter(|c| self.fixed.is_none() && !c.is_empty());
        // The attribute of old opsets is a float whatever the data's type.
        let mut old = [0u8; 8];
        if let Some((_, value)) = &self.fixed {
            match data.dtype {
                DType::F32 => old[..4].copy_from_slice(&value.to_ne_bytes()),
                DType::F64 => old.copy_from_slice(&f64::from(*value).to_ne_bytes()),
                _ if *value == 0.0 => {}
                other => return Err(OpError::Unsupported(format!("Pad of {other} with value {value}"))),
            }
        }
        by_size!(data.dtype, T => {
            let size = size_of::<T>();
            let bytes = constant.map_or(&old[..size], |c| &c.bytes[..size]);
            let fill: T = bytemuck::pod_read_unaligned(bytes);
            place.place::<T>(units(data.bytes)?, fill, units_mut(y.bytes)?);
            Ok(())
        })
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        let rank = rank_of(inputs, 0)?;
        let pads = self.before(inputs).ok()?;
        // The constant becomes an attribute, which is a float.
        let value = match (&self.fixed, get(inputs, 2)) {
            (Some((_, value)), _) => *value,
            (None, None) => 0.0,
            (None, Some(c)) => {
                let value = c.value.as_ref()?.to_f64().first().copied().unwrap_or(0.0);
                Some(value as f32).filter(|f| f64::from(*f) == value)?
            }
        };
        let (before, after) = pads.split_at(rank);
        let pads = reordered::<_, Ints>(before).into_iter().chain(reordered::<_, Ints>(after)).collect();
        let op = Pad { border: self.border, fixed: Some((pads, value)) };
        Some(ChannelsLast::by(op, &[true], &[true]).taking(1))
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // Constant: dX = the part of dY where X went. Otherwise: dX[j] = Σ dY[i] over the i that show X[j].
        if g.wants(2) {
            return Err(OpError::NotDifferentiable("the constant of Pad".into()));
        }
        let dy = g.dy0()?;
        let metas = g.metas()?;
        let refs: Vec<Option<&Meta>> = metas.iter().map(Option::as_ref).collect();
        let pads = self.before(&refs)?;
        let x = need(&refs, 0)?.dims.clone();
        let dx = match self.border {
            None => {
                let back: Ints = pads.iter().map(|p| -p).collect();
                let y = g.meta(dy)?.dims.clone();
                g.emit(SliceGrad { placement: placement(&y, &back, &x) }, &[dy])?
            }
            Some(border) => g.emit(PadGrad { border, pads, dims: x }, &[dy])?,
        };
        Ok(Grads::from_slice(&[Some(dx)]))
    }
}

/// The gradient of `Pad` in the modes that repeat X: every copy's gradient is added to its origin.
#[derive(Debug)]
pub struct PadGrad {
    border: Border,
    pads: Ints,
    dims: Dims,
}

impl Op for PadGrad {
    fn name(&self) -> &'static str {
        "PadGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        Ok(vec![Meta::new(need(inputs, 0)?.dtype, &self.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (dy, dx) = (need(x, 0)?, out(y, 0)?);
        float_dispatch!(dy.dtype, T => {
            fold::<T>(dy.get()?, dy.dims, &self.pads, self.border, dx.dims, dx.get()?);
            Ok(())
        })
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        let rank = rank_of(inputs, 0)?;
        let (before, after) = self.pads.split_at(rank);
        let pads = reordered::<_, Ints>(before).into_iter().chain(reordered::<_, Ints>(after)).collect();
        let op = PadGrad { border: self.border, pads, dims: last(&self.dims) };
        Some(ChannelsLast::by(op, &[true], &[true]))
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        second_derivative()
    }
}

pub(super) const ROWS: &[Row] = &[Row::new("Pad", 2, Pad::make)];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    use crate::tensor::Tensor;
    let pads = Tensor::ints;
    let pad = |mode: &str, dims: &[usize], p: &[i64]| {
        Case::new("Pad", 19).named(mode).string("mode", mode).input(dims).fixed(pads(p))
    };
    vec![
        Case::new("Pad", 2).ints("pads", &[0, 1, 2, 0]).float("value", 1.5).input(&[2, 3]),
        pad("constant", &[2, 3, 2], &[1, -1, 0, 0, 2, 0]),
        pad("constant", &[1, 2, 3, 3], &[0, 0, 1, 1, 0, 0, 1, 1]),
        pad("reflect", &[2, 4, 3], &[0, 2, 1, 0, 3, 2]),
        pad("edge", &[2, 3, 3], &[0, 2, 1, 1, 1, 3]),
        pad("wrap", &[3, 3], &[2, 4, 1, 1]),
        pad("edge", &[4, 3], &[-1, 2, 0, -1]),
        Case::new("Pad", 18)
            .named("axes")
            .input(&[2, 3, 2])
            .fixed(pads(&[1, 2]))
            .absent()
            .fixed(Tensor::ints(&[-2])),
    ]
}
