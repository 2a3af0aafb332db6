//! Reductions over axes, their gradients, and the transpose of broadcasting.

mod products;

use std::sync::Arc;

pub use self::products::SumProduct;
use crate::error::OpError;
use crate::graph::GradBuilder;
use crate::kernels::elementwise::{Walk, apply1, apply3};
use crate::kernels::integer::Integer;
use crate::kernels::layout::{axis_at, last};
use crate::kernels::math::Math;
use crate::kernels::reduce::{Fold, LogSumExp, Plan, SumOf, larger, of, reduce, smaller};
use crate::ops::binary::Div;
use crate::ops::layout::{extended, free, moved_axis, rank_of, seen_as};
use crate::ops::{ChannelsLast, Cx, Grads, Op, Row, Spec, get, need, out};
use crate::tensor::{DType, Dims, Elem, Meta, View, ViewMut, axis};
use crate::{float_dispatch, int_dispatch};

/// What a reduction computes of its elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Sum,
    Mean,
    Max,
    Min,
    Prod,
    L1,
    L2,
    SumSquare,
    LogSum,
    LogSumExp,
}

/// ONNX `ReduceSum`, `ReduceMean`, … (opset 1 to 25; axes as attribute, later as input 1).
#[derive(Debug, Clone)]
pub struct Reduce {
    pub kind: Kind,
    /// From the attribute; `None`: from input 1, or all.
    pub axes: Option<Vec<i64>>,
    pub keepdims: bool,
    /// Without axes nothing is reduced (rather than everything).
    pub noop: bool,
}

impl Reduce {
    /// Which axes are reduced, given the operand that names them.
    fn mask(&self, rank: usize, named: Option<&[i64]>) -> Result<u64, OpError> {
        if rank > 64 {
            return Err(OpError::Unsupported(format!("a tensor of rank {rank}")));
        }
        let axes = named.or(self.axes.as_deref()).unwrap_or(&[]);
        if axes.is_empty() && !self.noop {
            return Ok(u64::MAX);
        }
        axes.iter().try_fold(0, |mask, &a| Ok(mask | 1 << axis(a, rank)?))
    }

    fn mask_of(&self, x: &Meta, axes: Option<&Meta>) -> Result<u64, OpError> {
        let named = axes.map(|m| m.ints(1)).transpose()?;
        self.mask(x.rank(), named.as_deref())
    }

    fn floats<T: Math>(&self, x: &[T], y: &mut [T], plan: &Plan) {
        let n = plan.count() as f64;
        let same = |x: T| x;
        let square = |x: T| x * x;
        match self.kind {
            Kind::Sum => reduce(y, x, plan, &SumOf { f: same, finish: |s| s }),
            Kind::Mean => reduce(y, x, plan, &SumOf { f: same, finish: move |s| s / n }),
            Kind::L1 => reduce(y, x, plan, &SumOf { f: |x: T| x.abs(), finish: |s| s }),
            Kind::L2 => reduce(y, x, plan, &SumOf { f: square, finish: f64::sqrt }),
            Kind::SumSquare => reduce(y, x, plan, &SumOf { f: square, finish: |s| s }),
            Kind::LogSum => reduce(y, x, plan, &SumOf { f: same, finish: f64::m_ln }),
            Kind::LogSumExp => reduce(y, x, plan, &LogSumExp),
            Kind::Max => reduce(y, x, plan, &Fold { f: larger::<T>, start: f64::NEG_INFINITY }),
            Kind::Min => reduce(y, x, plan, &Fold { f: smaller::<T>, start: f64::INFINITY }),
            Kind::Prod => reduce(y, x, plan, &Fold { f: |a: T, b: T| a * b, start: 1.0 }),
        }
    }

    fn integers<T: Integer>(&self, x: &[T], y: &mut [T], plan: &Plan, extremes: (T, T)) {
        let (kind, zero) = (self.kind, T::default());
        let start = match kind {
            Kind::Max => extremes.0,
            Kind::Min => extremes.1,
            Kind::Prod => T::narrow(1),
            _ => zero,
        };
        y.fill(start);
        let f: fn(T, T) -> T = match kind {
            Kind::Max => Ord::max,
            Kind::Min => Ord::min,
            Kind::Prod => T::mul,
            Kind::L1 => |a, x| a.add(T::narrow(x.wide().abs())),
            Kind::L2 | Kind::SumSquare => |a, x| a.add(x.mul(x)),
            Kind::LogSumExp => |a, x| a.add(T::narrow((x.wide() as f64).exp() as i128)),
            _ => T::add,
        };
        for (r, y) in y.iter_mut().enumerate() {
            of(plan, r, |e| *y = f(*y, x[e]));
        }
        let n = plan.count().max(1) as i128;
        for y in y.iter_mut() {
            *y = match kind {
                Kind::Mean => T::narrow(y.wide() / n),
                Kind::L2 => T::narrow((y.wide() as f64).sqrt() as i128),
                Kind::LogSum | Kind::LogSumExp => T::narrow((y.wide() as f64).ln() as i128),
                _ => *y,
            };
        }
    }
}

impl Op for Reduce {
    fn name(&self) -> &'static str {
        match self.kind {
            Kind::Sum => "ReduceSum",
            Kind::Mean => "ReduceMean",
            Kind::Max => "ReduceMax",
            Kind::Min => "ReduceMin",
            Kind::Prod => "ReduceProd",
            Kind::L1 => "ReduceL1",
            Kind::L2 => "ReduceL2",
            Kind::SumSquare => "ReduceSumSquare",
            Kind::LogSum => "ReduceLogSum",
            Kind::LogSumExp => "ReduceLogSumExp",
        }
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        let mask = self.mask_of(x, get(inputs, 1))?;
        if x.dtype == DType::Bool && !matches!(self.kind, Kind::Max | Kind::Min) {
            return Err(OpError::Type(format!("{} of bool", self.name())));
        }
        Ok(vec![Meta::new(x.dtype, &reduced_dims(&x.dims, mask, self.keepdims))])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (x, axes, y) = (need(x, 0)?, get(x, 1), out(y, 0)?);
        let mask = match axes {
            Some(v) if v.dtype == DType::I32 => {
                let wide: Dims = v.get::<i32>()?.iter().map(|&a| a as usize).collect();
                // Negative axes wrap to the same 64 bits they would have as i64.
                let axes: &[i64] = bytemuck::cast_slice(&wide);
                self.mask(x.dims.len(), Some(axes))?
            }
            Some(v) => self.mask(x.dims.len(), Some(v.get::<i64>()?))?,
            None => self.mask(x.dims.len(), None)?,
        };
        let plan = Plan::new(x.dims, |d| mask >> d & 1 == 1);
        match x.dtype {
            d if d.is_float() => float_dispatch!(d, T => {
                self.floats::<T>(x.get::<T>()?, y.get::<T>()?, &plan);
                Ok(())
            }),
            DType::Bool => {
                self.integers::<u8>(x.get()?, y.get()?, &plan, (0, 1));
                Ok(())
            }
            d => int_dispatch!(d, T => {
                self.integers::<T>(x.get::<T>()?, y.get::<T>()?, &plan, (T::MIN, T::MAX));
                Ok(())
            }),
        }
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        let rank = rank_of(inputs, 0)?;
        let mask = self.mask_of(need(inputs, 0).ok()?, get(inputs, 1)).ok()?;
        let axes = (0..rank).filter(|i| mask >> axis_at(*i, rank) & 1 == 1).map(|i| i as i64).collect();
        let op = Reduce { axes: Some(axes), noop: true, ..self.clone() };
        let output = result_is_last(rank, mask, self.keepdims)?;
        Some(ChannelsLast::by(op, &[true], &[output]).taking(1))
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        let (x, dy) = (g.x(0)?, g.dy0()?);
        let axes = g.x_opt(1).map(|v| g.meta(v).cloned()).transpose()?;
        let meta = g.meta(x)?.clone();
        let mask = self.mask_of(&meta, axes.as_ref())?;
        let kept = reduced_dims(&meta.dims, mask, true);
        let n = meta.len() / kept.iter().product::<usize>().max(1);
        let kind = self.kind;
        // (written for one result y of elements x; dy is spread over them)
        let dx = match kind {
            // dX = dY; dX = dY/n
            Kind::Sum | Kind::Mean => {
                let scale = if kind == Kind::Mean { 1.0 / n as f64 } else { 1.0 };
                g.emit(ExpandTo { from: kept, to: meta.dims, scale }, &[dy])?
            }
            // dX = dY where X = Y, shared evenly among ties
            Kind::Max | Kind::Min => {
                let y = g.y(0)?;
                let ties = g.emit(ReduceGrad { kind, count: true, kept: kept.clone() }, &[x, y])?;
                let axes = (0..meta.rank()).filter(|d| mask >> d & 1 == 1).map(|d| d as i64).collect();
                let sum = Reduce { kind: Kind::Sum, axes: Some(axes), keepdims: self.keepdims, noop: true };
                let count = g.emit(sum, &[ties])?;
                let share = g.emit(Div, &[dy, count])?;
                g.emit(ReduceGrad { kind, count: false, kept }, &[x, y, share])?
            }
            // L1: dY·sign X. SumSquare: 2·dY·X. L2: dY·X/Y. LogSum: dY·e^(−Y). LogSumExp: dY·e^(X−Y).
            // Prod: dY·Y/X, or the product of the others where X = 0
            _ => {
                let y = g.y(0)?;
                g.emit(ReduceGrad { kind, count: false, kept }, &[x, y, dy])?
            }
        };
        Ok(Grads::from_slice(&[Some(dx), None]))
    }
}

fn reduced_dims(dims: &[usize], mask: u64, keepdims: bool) -> Dims {
    let keep = |d: usize| mask >> d & 1 == 0;
    dims.iter()
        .enumerate()
        .filter(|(d, _)| keepdims || keep(*d))
        .map(|(d, n)| if keep(d) { *n } else { 1 })
        .collect()
}

/// Does the result of reducing a tensor whose channels lie last have its own there? `None`: they lie elsewhere.
fn result_is_last(rank: usize, mask: u64, keepdims: bool) -> Option<bool> {
    let kept = |d: usize| keepdims || mask >> d & 1 == 0;
    match (kept(1), (2..rank).any(kept)) {
        (true, true) => kept(0).then_some(true),
        _ => Some(false),
    }
}

/// Gradient of a reduction that needs the elements: (X, Y, dY) → dX, or with `count` (X, Y) → 1 where X = Y.
/// Y and dY are read under the dimensions `kept` (reduced axes of size 1).
#[derive(Debug, Clone)]
struct ReduceGrad {
    kind: Kind,
    count: bool,
    kept: Dims,
}

impl Op for ReduceGrad {
    fn name(&self) -> &'static str {
        if self.count { "Ties" } else { "ReduceGrad" }
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        Ok(vec![Meta::new(x.dtype, &x.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let dx = out(y, 0)?;
        float_dispatch!(dx.dtype, T => self.floats::<T>(x, dx))
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        rank_of(inputs, 0)?;
        let (moved, kept) = seen_as(get(inputs, 1)?, &self.kept)?;
        if get(inputs, 2).is_some_and(|dy| seen_as(dy, &self.kept).is_none_or(|s| s.0 != moved)) {
            return None;
        }
        Some(ChannelsLast::by(ReduceGrad { kept, ..self.clone() }, &[true, moved, moved], &[true]))
    }

    fn compares(&self) -> bool {
        matches!(self.kind, Kind::Max | Kind::Min)
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable(format!("second derivatives ({})", self.name())))
    }
}

impl ReduceGrad {
    fn floats<T: Math>(&self, inputs: &[Option<View>], dx: &mut ViewMut) -> Result<(), OpError> {
        let (x, y) = (need(inputs, 0)?.get::<T>()?, need(inputs, 1)?.get::<T>()?);
        // Ties read no gradient: Y stands in for it.
        let dy = if self.count { y } else { need(inputs, 2)?.get::<T>()? };
        let dims = dx.dims;
        let walk = Walk::new(dims, [dims, &self.kept, &self.kept]);
        let (zero, one, two) = (T::zero(), T::one(), T::of(2.0));
        let out = dx.get::<T>()?;
        let all = (Some(x), Some(y), Some(dy));
        match self.kind {
            Kind::Max | Kind::Min if self.count => {
                apply3(out, all, &walk, |x: T, y: T, _: T| if x == y { one } else { zero })
            }
            Kind::Max | Kind::Min => {
                apply3(out, all, &walk, |x: T, y: T, d: T| if x == y { d } else { zero })
            }
            Kind::L1 => apply3(out, all, &walk, |x: T, _: T, d: T| {
                if x > zero {
                    d
                } else if x < zero {
                    -d
                } else {
                    zero
                }
            }),
            Kind::SumSquare => apply3(out, all, &walk, |x: T, _: T, d: T| two * x * d),
            // The norm of zeros has no derivative: 0.
            Kind::L2 => apply3(out, all, &walk, |x: T, y: T, d: T| if y == zero { zero } else { d * x / y }),
            Kind::LogSum => apply3(out, all, &walk, |_: T, y: T, d: T| d * (-y).m_exp()),
            Kind::LogSumExp => apply3(out, all, &walk, |x: T, y: T, d: T| d * (x - y).m_exp()),
            Kind::Prod => {
                apply3(out, all, &walk, |x: T, y: T, d: T| if x == zero { zero } else { d * y / x });
                self.at_zeros(x, dy, out, dims);
            }
            Kind::Sum | Kind::Mean => return Err(OpError::Internal("a sum's gradient reads nothing".into())),
        }
        Ok(())
    }

    /// The product of the others, for elements that are zero: not zero itself where there is only one.
    fn at_zeros<T: Math>(&self, x: &[T], dy: &[T], dx: &mut [T], dims: &[usize]) {
        let plan = Plan::new(dims, |d| self.kept[d] == 1);
        for (result, &dy) in dy.iter().enumerate() {
            let (mut product, mut zeros, mut at) = (1.0, 0, 0);
            of(&plan, result, |e| {
                if x[e] == T::zero() {
                    (zeros, at) = (zeros + 1, e);
                } else {
                    product *= x[e].to64();
                }
            });
            if zeros == 1 {
                dx[at] = dy * T::of(product);
            }
        }
    }
}

/// Spreads a tensor over the axes it was reduced by: its elements, seen as `from`, broadcast to `to` and
/// scaled. The gradient of sums and means; reads nothing but dY.
#[derive(Debug, Clone)]
pub struct ExpandTo {
    /// As many elements as the operand, broadcasting to `to`.
    pub from: Dims,
    pub to: Dims,
    pub scale: f64,
}

impl Op for ExpandTo {
    fn name(&self) -> &'static str {
        "ExpandTo"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        if x.len() != self.from.iter().product::<usize>()
            || crate::tensor::broadcast(&self.from, &self.to)? != self.to
        {
            let what = format!("{:?} as {:?} to {:?}", x.dims, self.from, self.to);
            return Err(OpError::Internal(what));
        }
        Ok(vec![Meta::new(x.dtype, &self.to)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (x, y) = (need(x, 0)?, out(y, 0)?);
        let walk = Walk::new(&self.to, [&self.from]);
        float_dispatch!(y.dtype, T => {
            let scale = self.scale as T;
            apply1(y.get::<T>()?, Some(x.get::<T>()?), &walk, |v: T| v * scale);
            Ok(())
        })
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], outputs: &[Option<&Meta>]) -> Option<ChannelsLast> {
        let rank = rank_of(outputs, 0)?;
        let (moved, from) = seen_as(get(inputs, 0)?, &extended(&self.from, rank))?;
        let op = ExpandTo { from, to: last(&self.to), scale: self.scale };
        Some(ChannelsLast::by(op, &[moved], &[true]))
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("second derivatives (ExpandTo)".into()))
    }

    fn cheap(&self) -> bool {
        true
    }
}

/// Sums a tensor down to `dims`, which broadcast to its shape: the gradient of broadcasting.
#[derive(Debug, Clone)]
pub struct SumTo {
    pub dims: Dims,
}

impl Op for SumTo {
    fn name(&self) -> &'static str {
        "SumTo"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        if crate::tensor::broadcast(&self.dims, &x.dims)? != x.dims {
            return Err(OpError::Internal(format!("{:?} summed to {:?}", x.dims, self.dims)));
        }
        Ok(vec![Meta::new(x.dtype, &self.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (x, y) = (need(x, 0)?, out(y, 0)?);
        let lead = x.dims.len() - self.dims.len();
        let plan = Plan::new(x.dims, |d| d < lead || (self.dims[d - lead] == 1 && x.dims[d] != 1));
        float_dispatch!(x.dtype, T => {
            let same = SumOf { f: |v: T| v, finish: |s| s };
            reduce(y.get::<T>()?, x.get::<T>()?, &plan, &same);
            Ok(())
        })
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        let rank = rank_of(inputs, 0)?;
        let dims = extended(&self.dims, rank);
        (self.dims.len() == rank || free(&dims))
            .then(|| ChannelsLast::by(SumTo { dims: last(&dims) }, &[true], &[true]))
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // dX = dY, broadcast
        let to = g.x(0).and_then(|x| Ok(g.meta(x)?.dims.clone()))?;
        let dy = g.dy0()?;
        Ok(Grads::from_slice(&[Some(g.emit(ExpandTo { from: self.dims.clone(), to, scale: 1.0 }, &[dy])?)]))
    }
}

/// ONNX `ArgMax` and `ArgMin` (opset 1 to 25): the position along one axis, int64.
#[derive(Debug, Clone, Copy)]
pub struct Arg {
    pub max: bool,
    pub axis: i64,
    pub keepdims: bool,
    /// Of equal elements the last rather than the first.
    pub last: bool,
}

impl Op for Arg {
    fn name(&self) -> &'static str {
        if self.max { "ArgMax" } else { "ArgMin" }
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        let a = axis(self.axis, x.rank())?;
        if x.dims[a] == 0 {
            return Err(OpError::Shape(format!("{} over an axis of no elements", self.name())));
        }
        let mask = if a < 64 { 1 << a } else { 0 };
        Ok(vec![Meta::new(DType::I64, &reduced_dims(&x.dims, mask, self.keepdims))])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (x, y) = (need(x, 0)?, out(y, 0)?);
        let a = axis(self.axis, x.dims.len())?;
        let inner: usize = x.dims[a + 1..].iter().product();
        crate::dtype_dispatch!(x.dtype, T => {
            arg::<T>(x.get::<T>()?, y.get::<i64>()?, x.dims[a], inner, *self);
            Ok(())
        })
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], _: &[Option<&Meta>]) -> Option<ChannelsLast> {
        let rank = rank_of(inputs, 0)?;
        let mask = 1 << axis(self.axis, rank).ok()?;
        let op = Arg { axis: moved_axis(self.axis, rank)?, ..*self };
        Some(ChannelsLast::by(op, &[true], &[result_is_last(rank, mask, self.keepdims)?]))
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("the result is a position, an integer".into()))
    }
}

fn arg<T: Elem>(x: &[T], y: &mut [i64], n: usize, inner: usize, op: Arg) {
    crate::kernels::par::rows(y, 1, (crate::kernels::par::GRAIN / n).max(1), |first, y| {
        for (i, y) in y.iter_mut().enumerate() {
            let (o, k) = ((first + i) / inner, (first + i) % inner);
            let at = |j: usize| x[(o * n + j) * inner + k];
            let mut best = 0;
            for j in 1..n {
                let (b, v) = (at(best), at(j));
                let better = if op.max { v > b } else { v < b };
                // The first NaN wins, as in numpy.
                let nan = v.partial_cmp(&v).is_none() && b.partial_cmp(&b).is_some();
                if better || nan || (op.last && v == b) {
                    best = j;
                }
            }
            *y = best as i64;
        }
    });
}

fn make(spec: &Spec, kind: Kind) -> Result<Arc<dyn Op>, OpError> {
    let keepdims = spec.attrs.flag_or("keepdims", true)?;
    let noop = spec.attrs.flag("noop_with_empty_axes")?;
    Ok(Arc::new(Reduce { kind, axes: spec.attrs.ints("axes")?, keepdims, noop }))
}

fn make_arg(spec: &Spec, max: bool) -> Result<Arc<dyn Op>, OpError> {
    Ok(Arc::new(Arg {
        max,
        axis: spec.attrs.int_or("axis", 0)?,
        keepdims: spec.attrs.flag_or("keepdims", true)?,
        last: spec.attrs.flag("select_last_index")?,
    }))
}

pub(super) const ROWS: &[Row] = &[
    Row::new("ArgMax", 1, |s| make_arg(s, true)),
    Row::new("ArgMin", 1, |s| make_arg(s, false)),
    Row::new("ReduceL1", 1, |s| make(s, Kind::L1)),
    Row::new("ReduceL2", 1, |s| make(s, Kind::L2)),
    Row::new("ReduceLogSum", 1, |s| make(s, Kind::LogSum)),
    Row::new("ReduceLogSumExp", 1, |s| make(s, Kind::LogSumExp)),
    Row::new("ReduceMax", 1, |s| make(s, Kind::Max)),
    Row::new("ReduceMean", 1, |s| make(s, Kind::Mean)),
    Row::new("ReduceMin", 1, |s| make(s, Kind::Min)),
    Row::new("ReduceProd", 1, |s| make(s, Kind::Prod)),
    Row::new("ReduceSum", 1, |s| make(s, Kind::Sum)),
    Row::new("ReduceSumSquare", 1, |s| make(s, Kind::SumSquare)),
];

#[cfg(test)]
mod cases;
#[cfg(test)]
pub(super) use cases::cases;
