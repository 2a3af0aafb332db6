//! Losses: scalars of the scores' type, computed in `f64`, equal to PyTorch's of the same name.

use std::sync::Arc;

use smallvec::SmallVec;

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::loss::{self, Classes, Hard, Labels};
use crate::kernels::math::Math;
use crate::kernels::softmax::{Form, softmax};
use crate::ops::layout::rank_of;
use crate::ops::{ChannelsLast, Cx, Grads, Op, Row, Spec, get, need, out};
use crate::tensor::{DType, Dims, Elem, Float, Meta, View, ViewMut};

/// What becomes of the items' losses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reduction {
    None,
    Sum,
    /// Divided by the sum of the items' weights.
    Mean,
}

/// What a loss over classes does, beside its operands.
#[derive(Debug, Clone, Copy)]
struct Rule {
    smoothing: f64,
    ignore: Option<i64>,
    reduction: Reduction,
    /// The scores are log-probabilities already.
    logged: bool,
}

/// The label of items that do not count, such as the padding of sequences: PyTorch's default.
pub const IGNORED: i64 = -100;

/// Softmax cross-entropy, averaged over items. Inputs: logits (N, C, …) and either class indices (N, …), int32 or
/// int64, or probabilities of the logits' shape; with class indices optionally class weights (C), by whose sum over the
/// items is divided. Items labelled [`IGNORED`] do not count; any other label outside 0..C is an error that says where it
/// stands.
#[derive(Debug, Clone)]
pub struct CrossEntropy {
    /// In 0..1: this part of each target is spread over all classes.
    pub label_smoothing: f64,
}

fn classes(dims: &[usize]) -> Result<Classes, OpError> {
    match dims {
        [n, c, rest @ ..] => Ok(Classes { n: *n, c: *c, s: rest.iter().product() }),
        _ => Err(OpError::Shape(format!("scores of shape {dims:?}: (N, C, …) is needed"))),
    }
}

/// Checks that `labels` are class indices for scores of shape `dims`.
fn check_labels(scores: &Meta, labels: &Meta) -> Result<(), OpError> {
    classes(&scores.dims)?;
    let expected: Dims = scores.dims.iter().enumerate().filter(|(i, _)| *i != 1).map(|(_, d)| *d).collect();
    if !matches!(labels.dtype, DType::I64 | DType::I32) {
        return Err(OpError::Type(format!("labels of type {}", labels.dtype)));
    }
    if labels.dims != expected {
        return Err(OpError::Shape(format!(
            "labels of shape {:?} for scores of shape {:?}: {:?} is needed",
            labels.dims.as_slice(),
            scores.dims.as_slice(),
            expected.as_slice()
        )));
    }
    Ok(())
}

fn labels<'a>(t: View<'a>) -> Result<Labels<'a>, OpError> {
    match t.dtype {
        DType::I32 => Ok(Labels::I32(t.get()?)),
        _ => Ok(Labels::I64(t.get()?)),
    }
}

fn scalar(dtype: DType) -> Vec<Meta> {
    vec![Meta::new(dtype, &[])]
}

fn set<T: Float>(y: &mut [Option<ViewMut>], value: f64) -> Result<(), OpError> {
    out(y, 0)?.get::<T>()?[0] = T::of(value);
    Ok(())
}

impl Rule {
    fn hard<'a, T: Math>(
        self,
        labels: View<'a>,
        weights: Option<&'a [T]>,
        c: usize,
    ) -> Result<Hard<'a, T>, OpError> {
        let dims = labels.dims;
        let hard = Hard {
            labels: self::labels(labels)?,
            weights,
            ignore: self.ignore,
            smoothing: self.smoothing,
            logged: self.logged,
        };
        if let Some(i) = hard.bad(c) {
            let mut position: SmallVec<[usize; 6]> = SmallVec::new();
            let mut rest = i;
            for d in dims.iter().rev() {
                position.insert(0, rest % d);
                rest /= d;
            }
            return Err(OpError::Shape(format!(
                "label {} at position {:?} is none of the {c} classes",
                hard.labels.at(i),
                position.as_slice()
            )));
        }
        Ok(hard)
    }

    fn forward<T: Math>(
        self,
        x: View,
        hard: Hard<T>,
        d: Classes,
        y: &mut [Option<ViewMut>],
    ) -> Result<(), OpError> {
        let x = x.get::<T>()?;
        match self.reduction {
            Reduction::None => {
                hard.losses(x, d, out(y, 0)?.get::<T>()?);
                Ok(())
            }
            Reduction::Sum => set::<T>(y, hard.loss(x, d)),
            Reduction::Mean => set::<T>(y, hard.loss(x, d) / hard.total_weight()),
        }
    }
}

impl Op for CrossEntropy {
    fn name(&self) -> &'static str {
        "CrossEntropy"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (x, t) = (need(inputs, 0)?, need(inputs, 1)?);
        if t.dtype.is_float() {
            classes(&x.dims)?;
            same(x, t)?;
        } else {
            check_labels(x, t)?;
        }
        if let Some(w) = get(inputs, 2) {
            if t.dtype.is_float() {
                return Err(OpError::Unsupported("class weights with probabilities as targets".into()));
            }
            same(w, &Meta::new(x.dtype, &x.dims[1..2]))?;
        }
        Ok(scalar(x.dtype))
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (x, t, weights) = (need(x, 0)?, need(x, 1)?, get(x, 2));
        let d = classes(x.dims)?;
        float_dispatch!(x.dtype, T => {
            if t.dtype.is_float() {
                let loss = loss::soft_loss(x.get::<T>()?, t.get::<T>()?, d, self.label_smoothing);
                return set::<T>(y, loss / (d.n * d.s) as f64);
            }
            let rule = self.rule();
            let weights = weights.map(|w| w.get::<T>()).transpose()?;
            let hard = rule.hard::<T>(t, weights, d.c)?;
            match hard.total_weight() {
                // Nothing counts: no loss, rather than none that is a number.
                0.0 => set::<T>(y, 0.0),
                _ => rule.forward(x, hard, d, y),
            }
        })
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // dx = w·(softmax(x) − q)/Σw · dloss, q the (smoothed) target, w the items' weights (1 without)  (N, C, …)
        if g.wants(1) || g.wants(2) {
            return Err(OpError::NotDifferentiable("the target and the class weights of a loss".into()));
        }
        let (x, t, dy) = (g.x(0)?, g.x(1)?, g.dy0()?);
        let dims = g.meta(x)?.dims.clone();
        let inputs = [Some(x), Some(t), Some(dy), g.x_opt(2)];
        let inputs = if inputs[3].is_some() { &inputs[..] } else { &inputs[..3] };
        Ok(Grads::from_slice(&[Some(g.emit_all(ClassLossGrad { rule: self.rule(), dims }, inputs, 1)?[0])]))
    }
}

impl CrossEntropy {
    fn rule(&self) -> Rule {
        let ignore = Some(IGNORED);
        Rule { smoothing: self.label_smoothing, ignore, reduction: Reduction::Mean, logged: false }
    }
}

/// Gradient of the losses over classes. Inputs: scores (absent where they are log-probabilities), target, dloss,
/// optionally class weights.
#[derive(Debug)]
struct ClassLossGrad {
    rule: Rule,
    dims: Dims,
}

impl Op for ClassLossGrad {
    fn name(&self) -> &'static str {
        "ClassLossGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        Ok(vec![Meta::new(need(inputs, 2)?.dtype, &self.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (t, dloss) = (need(x, 1)?, need(x, 2)?);
        let d = classes(&self.dims)?;
        let dx = out(y, 0)?;
        float_dispatch!(dx.dtype, T => {
            let scores = get(x, 0).map(|x| x.get::<T>()).transpose()?;
            let dloss = dloss.get::<T>()?;
            let first = dloss.first().map_or(0.0, |d| d.to64());
            let dx = dx.get::<T>()?;
            if t.dtype.is_float() {
                let factor = first / (d.n * d.s) as f64;
                loss::soft_grad(scores, t.get::<T>()?, d, self.rule.smoothing, dx, factor);
                return Ok(());
            }
            let weights = get(x, 3).map(|w| w.get::<T>()).transpose()?;
            let hard = self.rule.hard::<T>(t, weights, d.c)?;
            match self.rule.reduction {
                Reduction::None => hard.grad(scores, d, dx, |i| dloss[i].to64()),
                Reduction::Sum => hard.grad(scores, d, dx, |_| first),
                Reduction::Mean => {
                    let factor = first / hard.total_weight();
                    hard.grad(scores, d, dx, |_| factor);
                }
            }
            Ok(())
        })
    }

    fn in_place(&self) -> &[(usize, usize)] {
        if self.rule.logged { &[] } else { &[(0, 0)] }
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        second()
    }
}

fn second<T>() -> Result<T, OpError> {
    Err(OpError::NotDifferentiable("second derivatives are not supported".into()))
}

/// ONNX `SoftmaxCrossEntropyLoss` (outputs: loss, log-probabilities) and `NegativeLogLikelihoodLoss`. Inputs: scores
/// (N, C, …), labels (N, …), optionally class weights (C).
#[derive(Debug)]
pub struct ClassLoss {
    rule: Rule,
}

impl ClassLoss {
    fn parse(spec: &Spec, logged: bool) -> Result<Arc<dyn Op>, OpError> {
        let reduction = match spec.attrs.string("reduction")?.as_deref() {
            None | Some("mean") => Reduction::Mean,
            Some("sum") => Reduction::Sum,
            Some("none") => Reduction::None,
            Some(other) => return Err(OpError::Attribute(format!("'reduction' is {other:?}"))),
        };
        let ignore = spec.attrs.int("ignore_index")?;
        Ok(Arc::new(ClassLoss { rule: Rule { smoothing: 0.0, ignore, reduction, logged } }))
    }
}

impl Op for ClassLoss {
    fn name(&self) -> &'static str {
        if self.rule.logged { "NegativeLogLikelihoodLoss" } else { "SoftmaxCrossEntropyLoss" }
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (x, t) = (need(inputs, 0)?, need(inputs, 1)?);
        check_labels(x, t)?;
        if let Some(w) = get(inputs, 2)
            && (w.dtype != x.dtype || w.dims.as_slice() != [x.dims[1]])
        {
            return Err(OpError::Shape(format!(
                "weights {} {:?} for {} classes of {}",
                w.dtype,
                w.dims.as_slice(),
                x.dims[1],
                x.dtype
            )));
        }
        let mut outs = match self.rule.reduction {
            Reduction::None => vec![Meta::new(x.dtype, &t.dims)],
            _ => scalar(x.dtype),
        };
        if !self.rule.logged {
            outs.push(Meta::new(x.dtype, &x.dims));
        }
        Ok(outs)
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (scores, t) = (need(x, 0)?, need(x, 1)?);
        let d = classes(scores.dims)?;
        float_dispatch!(scores.dtype, T => {
            let weights = get(x, 2).map(|w| w.get::<T>()).transpose()?;
            if let (false, Some(Some(logs))) = (self.rule.logged, y.get_mut(1)) {
                softmax(Some(scores.get::<T>()?), logs.get::<T>()?, d.c, d.s, Form::Log);
            }
            if y.first().is_some_and(Option::is_none) {
                return Ok(());
            }
            self.rule.forward(scores, self.rule.hard::<T>(t, weights, d.c)?, d, y)
        })
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // dx = w·(softmax(x) − onehot)·dloss, for log-probabilities −w·onehot·dloss; divided by Σ w for the mean
        if g.dy(1).is_some() {
            return Err(OpError::NotDifferentiable("gradient through the log-probabilities".into()));
        }
        if g.wants(1) || g.wants(2) {
            return Err(OpError::NotDifferentiable("labels and class weights of a loss".into()));
        }
        let (x, t, dy) = (g.x(0)?, g.x(1)?, g.dy0()?);
        let dims = g.meta(x)?.dims.clone();
        let inputs = [(!self.rule.logged).then_some(x), Some(t), Some(dy), g.x_opt(2)];
        let dx = g.emit_all(ClassLossGrad { rule: self.rule, dims }, &inputs, 1)?[0];
        Ok(Grads::from_slice(&[Some(dx)]))
    }
}

fn same(a: &Meta, b: &Meta) -> Result<(), OpError> {
    match a.same_shape(b) {
        true => Ok(()),
        false => Err(OpError::Shape(format!(
            "{} {:?} against {} {:?}",
            a.dtype,
            a.dims.as_slice(),
            b.dtype,
            b.dims.as_slice()
        ))),
    }
}

/// Equal but for dimensions of 1 and, with `any_type`, the element type.
fn alike(a: &Meta, b: &Meta, any_type: bool) -> Result<(), OpError> {
    let real = |m: &Meta| m.dims.iter().copied().filter(|&d| d != 1).collect::<Dims>();
    match real(a) == real(b) && (any_type || a.dtype == b.dtype) {
        true => Ok(()),
        false => same(a, b).and(Err(OpError::Shape("operands differ".into()))),
    }
}

/// Sigmoid cross-entropy averaged over all elements. Inputs: logits, and a target of the same shape but for
/// dimensions of 1: probabilities of the logits' type, or 0/1 as int64, int32 or bool.
#[derive(Debug, Clone)]
pub struct BceWithLogits;

/// Runs `$body` with `$t` a function from an element's index to its target.
macro_rules! with_target {
    ($view:expr, $ty:ident, $t:ident => $body:expr) => {
        match $view.dtype {
            DType::I64 => {
                let t = $view.get::<i64>()?;
                let $t = |i: usize| $ty::of(t[i] as f64);
                $body
            }
            DType::I32 => {
                let t = $view.get::<i32>()?;
                let $t = |i: usize| $ty::of(t[i] as f64);
                $body
            }
            DType::Bool | DType::U8 => {
                let t = $view.get::<u8>()?;
                let $t = |i: usize| $ty::of(t[i] as f64);
                $body
            }
            _ => {
                let t = $view.get::<$ty>()?;
                let $t = |i: usize| t[i];
                $body
            }
        }
    };
}

impl Op for BceWithLogits {
    fn name(&self) -> &'static str {
        "BceWithLogits"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (x, t) = (need(inputs, 0)?, need(inputs, 1)?);
        let integer = matches!(t.dtype, DType::I64 | DType::I32 | DType::Bool | DType::U8);
        alike(x, t, integer)?;
        Ok(scalar(x.dtype))
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (x, target) = (need(x, 0)?, need(x, 1)?);
        float_dispatch!(x.dtype, T => {
            let sum = with_target!(target, T, t => loss::bce(x.get::<T>()?, t));
            set::<T>(y, sum / x.len() as f64)
        })
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // dx = (sigmoid(x) − t)/elements · dloss
        if g.wants(1) {
            return Err(OpError::NotDifferentiable("the target of a loss".into()));
        }
        let (x, t, dy) = (g.x(0)?, g.x(1)?, g.dy0()?);
        Ok(Grads::from_slice(&[Some(g.emit(BceGrad, &[x, t, dy])?)]))
    }
}

/// Gradient of [`BceWithLogits`]. Inputs: logits, target, dloss.
#[derive(Debug)]
struct BceGrad;

impl Op for BceGrad {
    fn name(&self) -> &'static str {
        "BceGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        Ok(vec![Meta::new(x.dtype, &x.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (target, dx) = (need(x, 1)?, out(y, 0)?);
        float_dispatch!(dx.dtype, T => {
            let logits = get(x, 0).map(|x| x.get::<T>()).transpose()?;
            let factor = first::<T>(need(x, 2)?)? / dx.len() as f64;
            with_target!(target, T, t => loss::bce_grad(logits, t, factor, dx.get::<T>()?));
            Ok(())
        })
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(0, 0)]
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        second()
    }
}

fn first<T: Elem + Float>(x: View) -> Result<f64, OpError> {
    x.get::<T>()?.first().map(|x| x.to64()).ok_or_else(|| OpError::Internal("an empty scalar".into()))
}

/// Mean of `(a − b)²` over all elements, of two tensors equal in shape but for dimensions of 1. Either operand may be
/// differentiated.
#[derive(Debug, Clone)]
pub struct Mse;

impl Op for Mse {
    fn name(&self) -> &'static str {
        "Mse"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (a, b) = (need(inputs, 0)?, need(inputs, 1)?);
        alike(a, b, false)?;
        Ok(scalar(a.dtype))
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (a, b) = (need(x, 0)?, need(x, 1)?);
        float_dispatch!(a.dtype, T => {
            set::<T>(y, loss::squared_error(a.get::<T>()?, b.get::<T>()?) / a.len() as f64)
        })
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        let (a, b) = (get(inputs, 0)?, get(inputs, 1)?);
        rank_of(inputs, 0).filter(|_| a.dims == b.dims)?;
        Some(ChannelsLast::same(&[true, true], &[]))
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // da = 2(a − b)/elements · dloss,  db = −da
        let (a, b, dy) = (g.x(0)?, g.x(1)?, g.dy0()?);
        let mut grads = Grads::from_elem(None, 2);
        for (i, operands) in [[a, b, dy], [b, a, dy]].into_iter().enumerate() {
            if g.wants(i) {
                grads[i] = Some(g.emit(MseGrad, &operands)?);
            }
        }
        Ok(grads)
    }
}

/// Gradient of [`Mse`] with respect to a. Inputs: a, b, dloss.
#[derive(Debug)]
struct MseGrad;

impl Op for MseGrad {
    fn name(&self) -> &'static str {
        "MseGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let a = need(inputs, 0)?;
        Ok(vec![Meta::new(a.dtype, &a.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let da = out(y, 0)?;
        float_dispatch!(da.dtype, T => {
            let operand = |i: usize| get(x, i).map(|x| x.get::<T>()).transpose();
            let factor = 2.0 * first::<T>(need(x, 2)?)? / da.len() as f64;
            loss::squared_error_grad(operand(0)?, operand(1)?, factor, da.get::<T>()?);
            Ok(())
        })
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(0, 0), (1, 0)]
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        let (a, b) = (get(inputs, 0)?, get(inputs, 1)?);
        rank_of(inputs, 0).filter(|_| a.dims == b.dims)?;
        Some(ChannelsLast::same(&[true, true], &[true]))
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        second()
    }
}

pub(super) const ROWS: &[Row] = &[
    Row::new("SoftmaxCrossEntropyLoss", 12, |s| ClassLoss::parse(s, false)),
    Row::new("NegativeLogLikelihoodLoss", 12, |s| ClassLoss::parse(s, true)),
];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    use crate::tensor::Tensor;
    let ints = |dims: &[usize], x: &[i64]| Tensor::from_slice(dims, x).unwrap();
    let floats = |dims: &[usize], x: &[f64]| Tensor::from_slice(dims, x).unwrap();
    let ce = |label_smoothing| Case::of(CrossEntropy { label_smoothing });
    let soft = floats(&[2, 3], &[0.2, 0.5, 0.3, 1.0, 0.0, 0.0]);
    let soft_map: Vec<f64> = (0..12).map(|i| 0.1 + 0.05 * i as f64).collect();
    let map = ints(&[2, 2, 20], &(0..80).map(|i| i * 7 % 3).collect::<Vec<_>>());
    let mut all = vec![
        ce(0.0).input(&[4, 10]).fixed(ints(&[4], &[0, 9, 3, 3])),
        ce(0.1).named("smoothed").within(&[3, 20], -4.0, 4.0).fixed(ints(&[3], &[0, 19, 3])),
        ce(0.0).named("map").input(&[2, 3, 2, 20]).fixed(map.clone()),
        ce(0.2).named("smoothed map").input(&[2, 3, 2, 20]).fixed(map.clone()),
        ce(0.0).named("soft").input(&[2, 3]).fixed(soft.clone()),
        ce(0.3).named("smoothed soft").input(&[2, 3]).fixed(soft),
        ce(0.1)
            .named("weighted")
            .input(&[4, 3])
            .fixed(ints(&[4], &[0, 2, 1, 2]))
            .fixed(floats(&[3], &[0.5, 2.0, 1.25])),
        ce(0.3).named("soft map").input(&[2, 3, 2]).fixed(floats(&[2, 3, 2], &soft_map)),
        ce(0.0)
            .named("many")
            .input(&[3000, 7])
            .fixed(ints(&[3000], &(0..3000).map(|i| i % 7).collect::<Vec<_>>())),
        ce(0.0).named("int32").input(&[1, 2]).fixed(Tensor::from_slice(&[1], &[1i32]).unwrap()),
        Case::of(BceWithLogits).within(&[2, 3], -3.0, 3.0).fixed(floats(&[2, 3], &[0., 1., 0.5, 1., 1., 0.])),
        Case::of(BceWithLogits).named("labels").input(&[4, 1]).fixed(ints(&[4], &[0, 1, 1, 0])),
        Case::of(Mse).input(&[3, 4]).input(&[3, 4]),
        Case::of(Mse).named("images").input(&[2, 3, 2, 4]).input(&[2, 3, 2, 4]),
        Case::of(Mse).named("column").input(&[5, 1]).input(&[5]),
        Case::of(Mse).named("long").input(&[40_000]).fixed(Tensor::zeros(DType::F64, &[40_000])),
    ];
    for op in ["SoftmaxCrossEntropyLoss", "NegativeLogLikelihoodLoss"] {
        for reduction in ["mean", "sum", "none"] {
            let weights = floats(&[3], &[0.5, 2.0, 1.25]);
            let case =
                Case::new(op, 13).named(reduction).string("reduction", reduction).input(&[2, 3, 2, 20]);
            all.push(case.clone().fixed(map.clone()));
            all.push(case.clone().int("ignore_index", 1).fixed(map.clone()));
            all.push(case.int("ignore_index", 2).fixed(map.clone()).fixed(weights.clone()));
            let case = Case::new(op, 12).named(reduction).string("reduction", reduction).input(&[3, 3]);
            all.push(case.int("ignore_index", -7).fixed(ints(&[3], &[0, -7, 2])).fixed(weights));
        }
    }
    all
}

#[cfg(test)]
mod tests;
