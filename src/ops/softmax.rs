//! `Softmax`, `LogSoftmax` and `Hardmax`.

use std::sync::Arc;

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::softmax::{self, Form};
use crate::ops::layout::{moved_axis, rank_of};
use crate::ops::{ChannelsLast, Cx, Grads, Op, Row, Spec, get, need, out};
use crate::tensor::{Meta, View, ViewMut, axis};

/// Over which elements an operator normalises.
#[derive(Debug, Clone, Copy)]
struct Over {
    axis: i64,
    /// Before opset 13: over all dimensions from `axis` on together.
    flatten: bool,
}

impl Over {
    fn new(spec: &Spec) -> Result<Over, OpError> {
        let flatten = spec.opset < 13;
        Ok(Over { axis: spec.attrs.int_or("axis", if flatten { 1 } else { -1 })?, flatten })
    }

    /// Elements normalised together, and their distance.
    fn extent(self, dims: &[usize]) -> Result<(usize, usize), OpError> {
        if self.flatten && self.axis == dims.len() as i64 {
            return Ok((1, 1));
        }
        let axis = axis(self.axis, dims.len())?;
        Ok(match self.flatten {
            true => (dims[axis..].iter().product(), 1),
            false => (dims[axis], dims[axis + 1..].iter().product()),
        })
    }

    fn infer(self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        self.extent(&x.dims)?;
        Ok(vec![Meta::new(x.dtype, &x.dims)])
    }
}

/// ONNX `Softmax` or `LogSoftmax`: y of x's shape.
#[derive(Debug)]
pub struct Softmax {
    over: Over,
    form: Form,
}

impl Softmax {
    /// Over one axis.
    pub fn along(axis: i64) -> Self {
        Softmax { over: Over { axis, flatten: false }, form: Form::Probabilities }
    }

    /// The same for results that only weigh the terms of a sum.
    pub fn weighing(&self) -> Option<Self> {
        (self.form == Form::Probabilities).then_some(Softmax { over: self.over, form: Form::Weights })
    }

    /// The one axis that it normalises over in a tensor of this rank, if it is one.
    pub fn over_axis(&self, rank: usize) -> Option<usize> {
        let axis = axis(self.over.axis, rank).ok()?;
        (!self.over.flatten || axis + 1 == rank).then_some(axis)
    }

    /// Does it normalise the rows of a tensor of this rank, and not their logarithms?
    pub fn over_rows(&self, rank: usize) -> bool {
        self.form != Form::Log && self.over_axis(rank).is_some_and(|axis| axis + 1 == rank)
    }
}

impl Op for Softmax {
    fn name(&self) -> &'static str {
        if self.form == Form::Log { "LogSoftmax" } else { "Softmax" }
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        self.over.infer(inputs)
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let y = out(y, 0)?;
        let (len, inner) = self.over.extent(y.dims)?;
        float_dispatch!(y.dtype, T => {
            let x = get(x, 0).map(|x| x.get::<T>()).transpose()?;
            softmax::softmax(x, y.get::<T>()?, len, inner, self.form);
            Ok(())
        })
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        let rank = rank_of(inputs, 0).filter(|_| !self.over.flatten)?;
        let over = Over { axis: moved_axis(self.over.axis, rank)?, flatten: false };
        Some(ChannelsLast::by(Softmax { over, form: self.form }, &[true], &[true]))
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // Softmax: dx = y·(dy − Σ dy·y);  LogSoftmax: dx = dy − exp(y)·Σ dy
        let (y, dy) = (g.y(0)?, g.dy0()?);
        let (len, inner) = self.over.extent(&g.meta(y)?.dims)?;
        let op = SoftmaxGrad { len, inner, log: self.form == Form::Log };
        Ok(Grads::from_slice(&[Some(g.emit(op, &[y, dy])?)]))
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(0, 0)]
    }
}

/// Gradient of softmax. Inputs: its output y, dy.
#[derive(Debug)]
pub struct SoftmaxGrad {
    len: usize,
    inner: usize,
    log: bool,
}

impl Op for SoftmaxGrad {
    fn name(&self) -> &'static str {
        "SoftmaxGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let y = need(inputs, 0)?;
        Ok(vec![Meta::new(y.dtype, &y.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let dx = out(y, 0)?;
        float_dispatch!(dx.dtype, T => {
            let (y, dy) = (need(x, 0)?.get::<T>()?, get(x, 1).map(|x| x.get::<T>()).transpose()?);
            softmax::softmax_grad(y, dy, dx.get::<T>()?, self.len, self.inner, self.log);
            Ok(())
        })
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(1, 0)]
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        // Over the channels.
        let dims = rank_of(inputs, 0).and_then(|_| get(inputs, 0)).map(|y| &y.dims)?;
        let inner = dims[2..].iter().product::<usize>();
        (self.len == dims[1] && self.inner == inner)
            .then(|| ChannelsLast::by(SoftmaxGrad { inner: 1, ..*self }, &[true, true], &[true]))
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("second derivatives are not supported".into()))
    }
}

/// ONNX `Hardmax`: 1 at the first largest element, 0 elsewhere.
#[derive(Debug)]
pub struct Hardmax {
    over: Over,
}

impl Op for Hardmax {
    fn name(&self) -> &'static str {
        "Hardmax"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        self.over.infer(inputs)
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let y = out(y, 0)?;
        let (len, inner) = self.over.extent(y.dims)?;
        float_dispatch!(y.dtype, T => {
            softmax::hardmax(need(x, 0)?.get::<T>()?, y.get::<T>()?, len, inner);
            Ok(())
        })
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("the choice of the largest element".into()))
    }
}

pub(super) const ROWS: &[Row] = &[
    Row::new("Softmax", 1, |s| Ok(Arc::new(Softmax { over: Over::new(s)?, form: Form::Probabilities }))),
    Row::new("LogSoftmax", 1, |s| Ok(Arc::new(Softmax { over: Over::new(s)?, form: Form::Log }))),
    Row::new("Hardmax", 1, |s| Ok(Arc::new(Hardmax { over: Over::new(s)? }))),
];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    let mut all = vec![Case::new("Hardmax", 13).given(&[2, 3], &[1., 3., 3., -1., -2., -1.]).forward_only()];
    for op in ["Softmax", "LogSoftmax"] {
        let case = |opset: i64| Case::new(op, opset);
        all.extend([
            case(13).named("rows").within(&[4, 37], -3.0, 3.0),
            case(13).named("axis 1").int("axis", 1).within(&[2, 5, 3, 13], -3.0, 3.0),
            case(13).named("axis 0").int("axis", 0).within(&[3, 4], -3.0, 3.0),
            case(11).named("flattened").within(&[3, 2, 5], -3.0, 3.0),
            case(7).named("flattened from 2").int("axis", 2).within(&[2, 3, 2, 2], -3.0, 3.0),
            case(13)
                .named("large")
                .given(&[2, 3], &[1e4, 1e4 - 1.0, 0.0, -1e4, -1e4, -1e4 + 2.0])
                .forward_only(),
            case(13).named("many").within(&[40, 700], -3.0, 3.0).tolerance(1e-5),
            case(13).named("empty").input(&[0, 4]).forward_only(),
        ]);
    }
    all
}

#[cfg(test)]
#[test]
fn weights_that_vanish_are_zero() {
    use crate::tensor::Tensor;
    let x = Tensor::from_slice(&[2, 5], &[0f32, -60., -80., -100., -3., -70., 20., -80., -65., 20.]).unwrap();
    let made = |op: &Softmax| crate::ops::eval(op, &[Some(&x)]).unwrap().remove(0).to_f64();
    let whole = Softmax::along(-1);
    for (i, (w, p)) in made(&whole.weighing().unwrap()).iter().zip(made(&whole)).enumerate() {
        assert!(p > 0.0 && if p < 1e-31 { *w == 0.0 } else { *w == p }, "{i}: {w} for {p}");
    }
    // Over an axis that is not the last.
    let turned = Tensor::from_slice(&[3, 2], &[0f32, 0.0, -80.0, -1.0, -100.0, -100.0]).unwrap();
    let columns = Softmax::along(0).weighing().unwrap();
    let y = crate::ops::eval(&columns, &[Some(&turned)]).unwrap().remove(0).to_f64();
    assert!(y[2] == 0.0 && y[3] > 0.2 && y[4..] == [0.0, 0.0], "{y:?}");
    assert!(columns.weighing().is_none());
}
