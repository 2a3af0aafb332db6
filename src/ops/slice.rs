//! Slice, and the fixed crop that is the gradient of Concat and Pad.

use std::sync::Arc;

use crate::error::OpError;
use crate::graph::GradBuilder;
use crate::kernels::strided::{Extents, Placement, Strides, dense, read};
use crate::ops::bytes::{Ints, by_size, ints, second_derivative, units, units_mut};
use crate::ops::layout::{rank_of, reordered};
use crate::ops::{ChannelsLast, Cx, Grads, Op, Row, Spec, get, need, out};
use crate::tensor::{Dims, Meta, View, ViewMut, axis};

/// ONNX `Slice`: starts, ends and axes as attributes before opset 10; as inputs, with steps, after.
#[derive(Debug)]
pub struct Slice {
    /// Starts, ends and axes where they are attributes.
    fixed: Option<(Ints, Ints, Option<Ints>)>,
}

/// A slice with every axis resolved: element `i` of the result is `start + i·step` of X.
#[derive(Debug, Clone)]
pub struct Cut {
    pub start: Extents,
    pub step: Strides,
    pub count: Dims,
}

impl Cut {
    fn new(
        dims: &[usize],
        starts: &[i64],
        ends: &[i64],
        axes: Option<&[i64]>,
        steps: Option<&[i64]>,
    ) -> Result<Cut, OpError> {
        let n = starts.len();
        if ends.len() != n || axes.is_some_and(|a| a.len() != n) || steps.is_some_and(|s| s.len() != n) {
            return Err(OpError::Shape("starts, ends, axes and steps of Slice differ in length".into()));
        }
        let mut cut = Cut {
            start: Extents::from_elem(0, dims.len()),
            step: Strides::from_elem(1, dims.len()),
            count: Dims::from_slice(dims),
        };
        for i in 0..n {
            let a = axis(axes.map_or(i as i64, |a| a[i]), dims.len())?;
            let step = steps.map_or(1, |s| s[i]);
            let d = dims[a] as i64;
            let from_end = |x: i64| if x < 0 { x.saturating_add(d) } else { x };
            let (start, count) = match step {
                0 => return Err(OpError::Shape("a step of Slice is 0".into())),
                1.. => {
                    let (s, e) = (from_end(starts[i]).clamp(0, d), from_end(ends[i]).clamp(0, d));
                    (s, (e - s).max(0).div_euclid(step) + ((e - s).max(0) % step != 0) as i64)
                }
                _ => {
                    // The standard clamps a start before the first element *to* it; numpy would take nothing.
                    let s = from_end(starts[i]).clamp(0, (d - 1).max(0));
                    let e = from_end(ends[i]).clamp(-1, d - 1);
                    let e = if d == 0 { s } else { e };
                    let (len, step) = ((s - e).max(0) as u64, step.unsigned_abs());
                    (s, len.div_ceil(step) as i64)
                }
            };
            cut.start[a] = start.max(0) as usize;
            // With one element or none the step says nothing, and a huge one would overflow offsets.
            cut.step[a] = if count <= 1 { 1 } else { step as isize };
            cut.count[a] = count as usize;
        }
        Ok(cut)
    }

    /// `count` neighbouring elements from `start` along each axis.
    pub fn dense(start: Extents, count: Dims) -> Cut {
        Cut { step: Strides::from_elem(1, count.len()), start, count }
    }

    fn fits(&self, dims: &[usize]) -> bool {
        let ends = |i: usize| {
            let last = self.start[i] as isize + self.step[i] * (self.count[i] as isize - 1);
            self.count[i] == 0 || (self.start[i] < dims[i] && (0..dims[i] as isize).contains(&last))
        };
        dims.len() == self.count.len() && (0..dims.len()).all(ends)
    }

    /// Where the slice's elements go in a tensor of dimensions `dims`.
    fn placement(&self, dims: &[usize]) -> Placement {
        let count = Extents::from_slice(&self.count);
        Placement {
            source: count.clone(),
            target: Extents::from_slice(dims),
            from: Extents::from_elem(0, count.len()),
            to: self.start.clone(),
            step: self.step.clone(),
            count,
        }
    }

    /// The same slice of a tensor whose channels lie last.
    fn last(&self) -> Cut {
        Cut { start: reordered(&self.start), step: reordered(&self.step), count: reordered(&self.count) }
    }

    fn read(&self, x: &View, y: &mut ViewMut) -> Result<(), OpError> {
        let strides = dense(x.dims);
        let base = strides.iter().zip(&self.start).map(|(&s, &i)| s as usize * i).sum();
        let steps: Strides = strides.iter().zip(&self.step).map(|(s, t)| s * t).collect();
        by_size!(x.dtype, T => {
            read::<T>(units(x.bytes)?, base, &self.count, &steps, units_mut(y.bytes)?);
            Ok(())
        })
    }
}

impl Slice {
    fn make(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
        if spec.opset >= 10 {
            return Ok(Arc::new(Slice { fixed: None }));
        }
        let ints = |name: &str| Ok::<_, OpError>(spec.attrs.ints(name)?.map(|v| Ints::from_slice(&v)));
        let missing = |name: &str| OpError::Attribute(format!("'{name}' of Slice is missing"));
        let starts = ints("starts")?.ok_or_else(|| missing("starts"))?;
        let ends = ints("ends")?.ok_or_else(|| missing("ends"))?;
        Ok(Arc::new(Slice { fixed: Some((starts, ends, ints("axes")?)) }))
    }

    fn cut(&self, inputs: &[Option<&Meta>]) -> Result<Cut, OpError> {
        let dims = &need(inputs, 0)?.dims;
        if let Some((starts, ends, axes)) = &self.fixed {
            return Cut::new(dims, starts, ends, axes.as_deref(), None);
        }
        let optional = |i: usize| get(inputs, i).map(|m| m.ints(i)).transpose();
        let (starts, ends) = (need(inputs, 1)?.ints(1)?, need(inputs, 2)?.ints(2)?);
        Cut::new(dims, &starts, &ends, optional(3)?.as_deref(), optional(4)?.as_deref())
    }
}

impl Op for Slice {
    fn name(&self) -> &'static str {
        "Slice"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let cut = self.cut(inputs)?;
        Ok(vec![Meta::new(need(inputs, 0)?.dtype, &cut.count)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let data = need(x, 0)?;
        let cut = match &self.fixed {
            Some((starts, ends, axes)) => Cut::new(data.dims, starts, ends, axes.as_deref(), None)?,
            None => {
                let optional = |i: usize| get(x, i).map(|v| ints(&v)).transpose();
                let (starts, ends) = (ints(&need(x, 1)?)?, ints(&need(x, 2)?)?);
                Cut::new(data.dims, &starts, &ends, optional(3)?.as_deref(), optional(4)?.as_deref())?
            }
        };
        cut.read(&data, out(y, 0)?)
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        rank_of(inputs, 0)?;
        let cut = self.cut(inputs).ok()?.last();
        Some(ChannelsLast::by(Crop { cut }, &[true], &[true]).taking(1))
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // dX[start + i·step] = dY[i], and 0 elsewhere.
        let dy = g.dy0()?;
        let metas = g.metas()?;
        let refs: Vec<Option<&Meta>> = metas.iter().map(Option::as_ref).collect();
        let placement = self.cut(&refs)?.placement(&need(&refs, 0)?.dims);
        let dx = g.emit(SliceGrad { placement }, &[dy])?;
        Ok(Grads::from_slice(&[Some(dx)]))
    }
}

/// The gradient of `Slice`: dY laid into zeros.
#[derive(Debug)]
pub struct SliceGrad {
    pub placement: Placement,
}

impl Op for SliceGrad {
    fn name(&self) -> &'static str {
        "SliceGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        Ok(vec![Meta::new(need(inputs, 0)?.dtype, &self.placement.target)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (x, y) = (need(x, 0)?, out(y, 0)?);
        by_size!(x.dtype, T => {
            self.placement.place::<T>(units(x.bytes)?, 0, units_mut(y.bytes)?);
            Ok(())
        })
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], outputs: &[Option<&Meta>]) -> Option<ChannelsLast> {
        rank_of(inputs, 0).filter(|_| rank_of(outputs, 0).is_some())?;
        Some(ChannelsLast::by(SliceGrad { placement: self.placement.last() }, &[true], &[true]))
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        second_derivative()
    }
}

/// A region of X: every axis resolved.
#[derive(Debug)]
pub struct Crop {
    pub cut: Cut,
}

impl Op for Crop {
    fn name(&self) -> &'static str {
        "Crop"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        if !self.cut.fits(&x.dims) {
            return Err(OpError::Internal(format!("{self:?} of {:?}", x.dims.as_slice())));
        }
        Ok(vec![Meta::new(x.dtype, &self.cut.count)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        self.cut.read(&need(x, 0)?, out(y, 0)?)
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        rank_of(inputs, 0)?;
        Some(ChannelsLast::by(Crop { cut: self.cut.last() }, &[true], &[true]))
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // dX is dY at `start` and 0 elsewhere.
        let dy = g.dy0()?;
        let placement = self.cut.placement(&g.meta(g.x(0)?)?.dims);
        let dx = g.emit(SliceGrad { placement }, &[dy])?;
        Ok(Grads::from_slice(&[Some(dx)]))
    }
}

pub(super) const ROWS: &[Row] = &[Row::new("Slice", 1, Slice::make)];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    use crate::tensor::Tensor;
    let ints = Tensor::ints;
    let slice = |name: &str, dims: &[usize]| Case::new("Slice", 13).named(name).input(dims);
    vec![
        Case::new("Slice", 9).ints("starts", &[1, -2]).ints("ends", &[3, 1000]).input(&[4, 5]),
        Case::new("Slice", 1)
            .named("attribute axes")
            .ints("starts", &[1])
            .ints("ends", &[i64::MAX])
            .ints("axes", &[-1])
            .input(&[2, 3, 4]),
        slice("axes and steps", &[3, 7, 2])
            .fixed(ints(&[1, 0]))
            .fixed(ints(&[7, 2]))
            .fixed(ints(&[1, 0]))
            .fixed(ints(&[2, 1])),
        slice("negative steps", &[5, 6])
            .fixed(ints(&[-1, 4]))
            .fixed(ints(&[i64::MIN, 0]))
            .fixed(ints(&[0, 1]))
            .fixed(ints(&[-2, -1])),
        slice("empty", &[4, 3]).fixed(ints(&[3])).fixed(ints(&[1])),
        slice("clamped", &[4]).fixed(ints(&[-100])).fixed(ints(&[100])).absent().fixed(ints(&[3])),
        Case::of(Crop { cut: Cut::dense(Extents::from_slice(&[1, 0]), Dims::from_slice(&[2, 3])) })
            .input(&[4, 3]),
    ]
}
