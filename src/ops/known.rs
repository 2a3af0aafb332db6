//! Operators whose outputs are computed when their shapes are, because the values of the operands decide about them:
//! `NonZero`, `Unique`, `NonMaxSuppression`. Their operands must be known at plan time: constants, or what follows
//! from inputs whose values the plan is bound to.

use std::cmp::Ordering;
use std::fmt::Debug;
use std::sync::Arc;

use crate::dtype_dispatch;
use crate::error::OpError;
use crate::graph::GradBuilder;
use crate::ops::{Cx, Grads, Op, Row, Spec, get, need};
use crate::tensor::{DType, Dims, Meta, Tensor, View, ViewMut, axis};

/// A function of whole tensors.
pub trait Known: Debug + Send + Sync + 'static {
    fn name(&self) -> &'static str;
    fn compute(&self, x: &[Option<&Tensor>]) -> Result<Vec<Tensor>, OpError>;
}

/// The operator that a [`Known`] function is.
#[derive(Debug)]
pub struct AtPlanTime<K>(pub K);

impl<K: Known> Op for AtPlanTime<K> {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let mut values = Vec::with_capacity(inputs.len());
        for (i, m) in inputs.iter().enumerate() {
            let value = m.map(|m| m.value.as_deref().ok_or(OpError::NeedsValue(i)));
            values.push(value.transpose()?);
        }
        let made = self.0.compute(&values)?;
        Ok(made.into_iter().map(|t| Meta { value: Some(Arc::new(t.clone())), ..t.meta() }).collect())
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let x: Vec<_> = x.iter().map(|v| v.map(|v| v.to_tensor())).collect();
        let x: Vec<_> = x.iter().map(Option::as_ref).collect();
        for (y, t) in y.iter_mut().zip(self.0.compute(&x)?) {
            if let Some(y) = y {
                y.bytes.copy_from_slice(t.bytes());
            }
        }
        Ok(())
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("its output's shape depends on values".into()))
    }
}

/// ONNX `NonZero` (opset 9): the coordinates of X's elements that are not 0, as int64 (rank of X, count).
#[derive(Debug)]
struct NonZero;

impl Known for NonZero {
    fn name(&self) -> &'static str {
        "NonZero"
    }

    fn compute(&self, x: &[Option<&Tensor>]) -> Result<Vec<Tensor>, OpError> {
        let x = need(x, 0)?;
        let nonzero: Vec<usize> = dtype_dispatch!(x.dtype(), T => {
            let zero = T::default();
            x.get::<T>()?.iter().enumerate().filter(|(_, v)| **v != zero).map(|(i, _)| i).collect()
        });
        // A scalar counts as a vector of one.
        let dims = if x.dims().is_empty() { &[1] } else { x.dims() };
        let mut rows = Vec::with_capacity(dims.len() * nonzero.len());
        for (a, d) in dims.iter().enumerate() {
            let below: usize = dims[a + 1..].iter().product();
            rows.extend(nonzero.iter().map(|i| (i / below % d) as i64));
        }
        Ok(vec![Tensor::from_slice(&[dims.len(), nonzero.len()], &rows)?])
    }
}

/// ONNX `Unique` (opset 11, 28): X's distinct elements (without `axis`) or slices along `axis`, sorted or in the order
/// of their first occurrence; where each occurs first, which one each of X's is, and how often each occurs.
#[derive(Debug)]
struct Unique {
    axis: Option<i64>,
    sorted: bool,
}

impl Unique {
    fn make(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let sorted = spec.attrs.flag_or("sorted", true)?;
        Ok(Arc::new(AtPlanTime(Unique { axis: spec.attrs.int("axis")?, sorted })))
    }
}

impl Known for Unique {
    fn name(&self) -> &'static str {
        "Unique"
    }

    fn compute(&self, x: &[Option<&Tensor>]) -> Result<Vec<Tensor>, OpError> {
        let x = need(x, 0)?;
        let (outer, n, inner, a) = match self.axis {
            None => (1, x.len(), 1, None),
            Some(a) => {
                let a = axis(a, x.dims().len())?;
                let size = |d: &[usize]| d.iter().product::<usize>();
                (size(&x.dims()[..a]), x.dims()[a], size(&x.dims()[a + 1..]), Some(a))
            }
        };
        let position = |slice: usize, e: usize| (e / inner * n + slice) * inner + e % inner;
        let count = outer * inner;
        let order = order(x)?;
        let compare = |p: &usize, q: &usize| {
            let pairs = (0..count).map(|e| order(position(*p, e), position(*q, e)));
            pairs.into_iter().find(|o| *o != Ordering::Equal).unwrap_or(Ordering::Equal)
        };
        let mut slices: Vec<usize> = (0..n).collect();
        slices.sort_by(compare);
        // Equal slices are neighbours now, each group's first occurrence first.
        let mut groups: Vec<Vec<usize>> = Vec::new();
        for s in slices {
            match groups.last_mut().filter(|g| compare(&g[0], &s) == Ordering::Equal) {
                Some(group) => group.push(s),
                None => groups.push(vec![s]),
            }
        }
        if !self.sorted {
            groups.sort_by_key(|g| g[0]);
        }
        let mut dims = Dims::from_slice(x.dims());
        match a {
            Some(a) => dims[a] = groups.len(),
            None => dims = Dims::from_slice(&[groups.len()]),
        }
        let (mut y, size) = (Tensor::zeros(x.dtype(), &dims), x.dtype().size());
        let mut inverse = vec![0i64; n];
        for (k, group) in groups.iter().enumerate() {
            group.iter().for_each(|&s| inverse[s] = k as i64);
            for e in 0..count {
                let (from, to) = (position(group[0], e), (e / inner * groups.len() + k) * inner + e % inner);
                y.bytes_mut()[to * size..][..size].copy_from_slice(&x.bytes()[from * size..][..size]);
            }
        }
        let first: Vec<i64> = groups.iter().map(|g| g[0] as i64).collect();
        let counts: Vec<i64> = groups.iter().map(|g| g.len() as i64).collect();
        Ok(vec![y, Tensor::ints(&first), Tensor::ints(&inverse), Tensor::ints(&counts)])
    }
}

/// How the elements at two positions compare. NaN equals itself here, and comes last.
fn order(x: &Tensor) -> Result<Box<dyn Fn(usize, usize) -> Ordering + '_>, OpError> {
    dtype_dispatch!(x.dtype(), T => {
        let data = x.get::<T>()?;
        Ok(Box::new(move |p: usize, q: usize| {
            let nan = |v: T| v.partial_cmp(&v).is_none();
            data[p].partial_cmp(&data[q]).unwrap_or_else(|| nan(data[p]).cmp(&nan(data[q])))
        }))
    })
}

/// ONNX `NonMaxSuppression` (opset 10): boxes (N, boxes, 4) and scores (N, classes, boxes) to the chosen
/// (sample, class, box) as int64 (count, 3): those above the score threshold, best first, that overlap none chosen
/// before by more than the threshold.
#[derive(Debug)]
struct NonMaxSuppression {
    /// Boxes are (centre, extent) rather than two corners.
    centred: bool,
}

impl NonMaxSuppression {
    fn make(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
        Ok(Arc::new(AtPlanTime(NonMaxSuppression { centred: spec.attrs.flag("center_point_box")? })))
    }

    /// (y₁, x₁, y₂, x₂), ordered.
    fn corners(&self, b: &[f32]) -> [f32; 4] {
        match (self.centred, b) {
            (true, &[x, y, w, h]) => [y - h / 2.0, x - w / 2.0, y + h / 2.0, x + w / 2.0],
            (_, &[y1, x1, y2, x2]) => [y1.min(y2), x1.min(x2), y1.max(y2), x1.max(x2)],
            _ => [0.0; 4],
        }
    }
}

/// Intersection over union.
fn overlap(a: [f32; 4], b: [f32; 4]) -> f32 {
    let area = |c: [f32; 4]| (c[2] - c[0]) * (c[3] - c[1]);
    let side = |i: usize| (a[i + 2].min(b[i + 2]) - a[i].max(b[i])).max(0.0);
    let both = side(0) * side(1);
    let either = area(a) + area(b) - both;
    if either > 0.0 { both / either } else { 0.0 }
}

impl Known for NonMaxSuppression {
    fn name(&self) -> &'static str {
        "NonMaxSuppression"
    }

    fn compute(&self, x: &[Option<&Tensor>]) -> Result<Vec<Tensor>, OpError> {
        let (boxes, scores) = (need(x, 0)?, need(x, 1)?);
        let (&[n, count, 4], &[samples, classes, scored]) = (boxes.dims(), scores.dims()) else {
            return Err(OpError::Shape(format!("boxes {:?} with scores {:?}", boxes.dims(), scores.dims())));
        };
        if (n, count) != (samples, scored) {
            return Err(OpError::Shape(format!("boxes {:?} with scores {:?}", boxes.dims(), scores.dims())));
        }
        let number = |i: usize| get(x, i).and_then(|t| t.to_f64().first().copied());
        let most = number(2).unwrap_or(0.0).max(0.0) as usize;
        let limit = number(3).unwrap_or(0.0) as f32;
        let least = number(4).map(|v| v as f32);
        let (boxes, scores) = (boxes.cast(DType::F32), scores.cast(DType::F32));
        let (boxes, scores) = (boxes.get::<f32>()?, scores.get::<f32>()?);
        let mut chosen: Vec<i64> = Vec::new();
        for sample in 0..n {
            let corners = |b: usize| self.corners(&boxes[(sample * count + b) * 4..][..4]);
            for class in 0..classes {
                let scores = &scores[(sample * classes + class) * count..][..count];
                let mut order: Vec<usize> =
                    (0..count).filter(|&b| least.is_none_or(|least| scores[b] > least)).collect();
                order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
                let mut kept: Vec<[f32; 4]> = Vec::new();
                for b in order {
                    if kept.len() >= most {
                        break;
                    }
                    let here = corners(b);
                    if kept.iter().all(|k| overlap(*k, here) <= limit) {
                        kept.push(here);
                        chosen.extend([sample as i64, class as i64, b as i64]);
                    }
                }
            }
        }
        Ok(vec![Tensor::from_slice(&[chosen.len() / 3, 3], &chosen)?])
    }
}

pub(super) const ROWS: &[Row] = &[
    Row::new("NonMaxSuppression", 10, NonMaxSuppression::make),
    Row::new("NonZero", 9, |_| Ok(Arc::new(AtPlanTime(NonZero)))),
    Row::new("Unique", 11, Unique::make),
];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    let floats = |dims: &[usize], v: &[f32]| Tensor::from_slice(dims, v).unwrap();
    let corners = [0.0, 0.0, 1.0, 1.0, 0.0, 0.1, 1.0, 1.1, 0.0, 10.0, 1.0, 11.0];
    vec![
        Case::new("NonZero", 13).fixed(floats(&[2, 2], &[1.0, 0.0, 0.0, 2.0])).forward_only(),
        Case::new("Unique", 11).fixed(Tensor::ints(&[2, 1, 1, 3, 4, 3])).outputs(4).forward_only(),
        Case::new("NonMaxSuppression", 11)
            .fixed(floats(&[1, 3, 4], &corners))
            .fixed(floats(&[1, 1, 3], &[0.9, 0.75, 0.6]))
            .fixed(Tensor::ints(&[3]))
            .fixed(floats(&[1], &[0.5]))
            .forward_only(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(k: impl Known, x: &[Option<&Tensor>]) -> Vec<Vec<i64>> {
        k.compute(x).unwrap().iter().map(|t| t.to_f64().iter().map(|v| *v as i64).collect()).collect()
    }

    #[test]
    fn distinct_elements_and_slices() {
        let x = Tensor::ints(&[2, 1, 1, 3, 4, 3]);
        let sorted = run(Unique { axis: None, sorted: true }, &[Some(&x)]);
        assert_eq!(sorted, [vec![1, 2, 3, 4], vec![1, 0, 3, 4], vec![1, 0, 0, 2, 3, 2], vec![2, 1, 2, 1]]);
        let found = run(Unique { axis: None, sorted: false }, &[Some(&x)]);
        assert_eq!(found, [vec![2, 1, 3, 4], vec![0, 1, 3, 4], vec![0, 1, 1, 2, 3, 2], vec![1, 2, 2, 1]]);
        let rows = Tensor::from_slice(&[3, 2], &[1i64, 0, 1, 0, 0, 5]).unwrap();
        let rows = run(Unique { axis: Some(0), sorted: true }, &[Some(&rows)]);
        assert_eq!(rows, [vec![0, 5, 1, 0], vec![2, 0], vec![1, 1, 0], vec![1, 2]]);
    }

    #[test]
    fn boxes_that_overlap_are_dropped() {
        let boxes = [0.0f32, 0.0, 1.0, 1.0, 0.0, 0.1, 1.0, 1.1, 0.0, 10.0, 1.0, 11.0];
        let boxes = Tensor::from_slice(&[1, 3, 4], &boxes).unwrap();
        let scores = Tensor::from_slice(&[1, 1, 3], &[0.75f32, 0.9, 0.6]).unwrap();
        let (most, limit) = (Tensor::ints(&[3]), Tensor::from_slice(&[1], &[0.5f32]).unwrap());
        let x = [Some(&boxes), Some(&scores), Some(&most), Some(&limit)];
        assert_eq!(run(NonMaxSuppression { centred: false }, &x)[0], [0, 0, 1, 0, 0, 2]);
    }

    #[test]
    fn unknown_values_are_asked_for() {
        let x = Meta::new(DType::F32, &[3]);
        assert_eq!(AtPlanTime(NonZero).infer(&[Some(&x)]).unwrap_err(), OpError::NeedsValue(0));
    }
}
