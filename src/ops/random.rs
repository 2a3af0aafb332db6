//! Random tensors: RandomNormal, RandomUniform, their Like forms, Bernoulli, Multinomial. Every number follows from the
//! session's seed, the pass and the node's `seed`.

use std::f64::consts::PI;
use std::sync::Arc;

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::random::Stream;
use crate::ops::bytes::{sized, to_dims};
use crate::ops::{Cx, Grads, Op, Row, Spec, get, need, out};
use crate::tensor::{DType, Dims, Elem, Float, Meta, View, ViewMut};

#[derive(Debug, Clone, Copy)]
enum Kind {
    Normal { mean: f64, scale: f64 },
    Uniform { low: f64, high: f64 },
}

/// ONNX `RandomNormal` and `RandomUniform` (opset 1): tensors of `shape`; `RandomNormalLike`, `RandomUniformLike`
/// (opset 1): of X's shape.
#[derive(Debug)]
pub struct Random {
    kind: Kind,
    /// `None`: X's.
    shape: Option<Dims>,
    dtype: Option<DType>,
    seed: u64,
}

fn dtype(spec: &Spec) -> Result<Option<DType>, OpError> {
    let Some(code) = spec.attrs.int("dtype")? else { return Ok(None) };
    let found = i32::try_from(code).ok().and_then(DType::from_onnx);
    match found {
        Some(d) => Ok(Some(d.working())),
        None => Err(OpError::Unsupported(format!("random numbers of ONNX element type {code}"))),
    }
}

fn seed(spec: &Spec) -> Result<u64, OpError> {
    Ok(spec.attrs.float("seed")?.map_or(0, |s| (s.to_bits() as u64).rotate_left(32)))
}

impl Random {
    fn make(spec: &Spec, normal: bool, like: bool) -> Result<Arc<dyn Op>, OpError> {
        let a = spec.attrs;
        let number = |name: &str, default: f32| a.float_or(name, default).map(f64::from);
        let kind = match normal {
            true => Kind::Normal { mean: number("mean", 0.0)?, scale: number("scale", 1.0)? },
            false => Kind::Uniform { low: number("low", 0.0)?, high: number("high", 1.0)? },
        };
        let shape = match (like, a.ints("shape")?) {
            (true, _) => None,
            (false, Some(shape)) => Some(to_dims(&shape)?),
            (false, None) => return Err(OpError::Attribute("'shape' is missing".into())),
        };
        let dtype = dtype(spec)?.or(if like { None } else { Some(DType::F32) });
        if let Some(d) = dtype.filter(|d| !d.is_float()) {
            return Err(OpError::Attribute(format!("'dtype' is {d}")));
        }
        Ok(Arc::new(Random { kind, shape, dtype, seed: seed(spec)? }))
    }
}

/// The draws of one call: their seed, and another stream beside it.
fn streams(cx: &Cx, seed: u64) -> [Stream; 2] {
    [Stream::new(cx.seed ^ seed), Stream::new(cx.seed ^ seed ^ 0x5851_f42d_4c95_7f2d)]
}

impl Op for Random {
    fn name(&self) -> &'static str {
        match (self.kind, &self.shape) {
            (Kind::Normal { .. }, Some(_)) => "RandomNormal",
            (Kind::Normal { .. }, None) => "RandomNormalLike",
            (Kind::Uniform { .. }, Some(_)) => "RandomUniform",
            (Kind::Uniform { .. }, None) => "RandomUniformLike",
        }
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (dims, like) = match &self.shape {
            Some(shape) => (shape.clone(), None),
            None => {
                let x = need(inputs, 0)?;
                (x.dims.clone(), Some(x.dtype))
            }
        };
        let dtype = self.dtype.or(like).unwrap_or(DType::F32);
        if !dtype.is_float() {
            return Err(OpError::Type(format!("random numbers of {dtype}")));
        }
        Ok(vec![sized(dtype, &dims)?])
    }

    fn forward(&self, cx: &mut Cx, _: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let y = out(y, 0)?;
        let [first, second] = streams(cx, self.seed);
        let len = y.len();
        float_dispatch!(y.dtype, T => {
            let y = y.get::<T>()?;
            first.uniform(y);
            match self.kind {
                Kind::Uniform { low, high } => y.iter_mut().for_each(|y| *y = T::of(low + (high - low) * y.to64())),
                Kind::Normal { mean, scale } => {
                    // Box and Muller's transform; 1 − u is in (0, 1].
                    let angles = cx.room::<T>(len)?;
                    second.uniform(angles);
                    for (y, a) in y.iter_mut().zip(angles) {
                        let radius = (-2.0 * (1.0 - y.to64()).ln()).sqrt();
                        *y = T::of(mean + scale * radius * (2.0 * PI * a.to64()).cos());
                    }
                }
            }
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        match self.kind {
            Kind::Normal { .. } => self.infer(inputs).map_or(0, |m| m[0].bytes()),
            Kind::Uniform { .. } => 0,
        }
    }

    fn in_float64(&self) -> Option<Arc<dyn Op>> {
        let narrow = self.dtype == Some(DType::F32);
        let op = Random { dtype: Some(DType::F64), shape: self.shape.clone(), ..*self };
        narrow.then(|| Arc::new(op) as _)
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // Only the shape of X is read: dX = 0
        let x = g.x(0)?;
        Ok(Grads::from_slice(&[Some(g.zeros_like(x)?)]))
    }

    fn is_pure(&self) -> bool {
        false
    }
}

/// ONNX `Bernoulli` (opset 15): 1 with the probability that X holds, else 0.
#[derive(Debug)]
pub struct Bernoulli {
    dtype: Option<DType>,
    seed: u64,
}

/// Writes small whole numbers in any type.
fn write<I: Iterator<Item = usize>>(y: &mut ViewMut, values: I) -> Result<(), OpError> {
    fn fill<T: Elem>(
        y: &mut ViewMut,
        values: impl Iterator<Item = usize>,
        f: impl Fn(usize) -> T,
    ) -> Result<(), OpError> {
        y.get::<T>()?.iter_mut().zip(values).for_each(|(y, v)| *y = f(v));
        Ok(())
    }
    match y.dtype {
        DType::F32 => fill(y, values, |v| v as f32),
        DType::F64 => fill(y, values, |v| v as f64),
        DType::I64 => fill(y, values, |v| v as i64),
        DType::I32 => fill(y, values, |v| v as i32),
        DType::U64 => fill(y, values, |v| v as u64),
        DType::U32 => fill(y, values, |v| v as u32),
        DType::I16 => fill(y, values, |v| v as i16),
        DType::U16 => fill(y, values, |v| v as u16),
        DType::I8 => fill(y, values, |v| v as i8),
        DType::U8 | DType::Bool => fill(y, values, |v| v as u8),
        other => Err(OpError::Type(format!("draws of type {other}"))),
    }
}

impl Op for Bernoulli {
    fn name(&self) -> &'static str {
        "Bernoulli"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        if !x.dtype.is_float() {
            return Err(OpError::Type(format!("probabilities of {}", x.dtype)));
        }
        Ok(vec![Meta::new(self.dtype.unwrap_or(x.dtype), &x.dims)])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (x, y) = (need(x, 0)?, out(y, 0)?);
        let [stream, _] = streams(cx, self.seed);
        float_dispatch!(x.dtype, T => {
            let draws = cx.room::<T>(x.len())?;
            stream.uniform(draws);
            write(y, draws.iter().zip(x.get::<T>()?).map(|(u, p)| (u < p) as usize))
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        get(inputs, 0).map_or(0, Meta::bytes)
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("a draw from a discrete distribution".into()))
    }

    fn is_pure(&self) -> bool {
        false
    }
}

/// ONNX `Multinomial` (opset 7): `sample_size` classes drawn for each row of X (N, classes), which holds the logarithms
/// of weights; int32 or int64 (N, samples).
#[derive(Debug)]
pub struct Multinomial {
    samples: usize,
    dtype: DType,
    seed: u64,
}

impl Multinomial {
    fn make(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let n = spec.attrs.int_or("sample_size", 1)?;
        let samples = usize::try_from(n).map_err(|_| OpError::Attribute(format!("'sample_size' is {n}")))?;
        let dtype = dtype(spec)?.unwrap_or(DType::I32);
        if !matches!(dtype, DType::I32 | DType::I64) {
            return Err(OpError::Attribute(format!("'dtype' is {dtype}")));
        }
        Ok(Arc::new(Multinomial { samples, dtype, seed: seed(spec)? }))
    }
}

impl Op for Multinomial {
    fn name(&self) -> &'static str {
        "Multinomial"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        match *x.dims {
            [n, classes] if classes > 0 && x.dtype.is_float() => {
                Ok(vec![sized(self.dtype, &[n, self.samples])?])
            }
            _ => Err(OpError::Shape(format!(
                "{} {:?}: (N, classes) of floats is needed",
                x.dtype,
                &x.dims[..]
            ))),
        }
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (x, y) = (need(x, 0)?, out(y, 0)?);
        let (classes, samples) = (x.dims[1], self.samples);
        let [stream, _] = streams(cx, self.seed);
        float_dispatch!(x.dtype, T => {
            let draws = cx.room::<T>(y.len())?;
            stream.uniform(draws);
            let x = x.get::<T>()?;
            let choose = |(i, u): (usize, &T)| {
                let row = &x[i / samples * classes..][..classes];
                let most = row.iter().fold(f64::NEG_INFINITY, |m, v| m.max(v.to64()));
                let weight = |v: &T| (v.to64() - most).exp();
                let mut left = u.to64() * row.iter().map(weight).sum::<f64>();
                let found = row.iter().position(|v| {
                    left -= weight(v);
                    left < 0.0
                });
                found.unwrap_or(classes - 1)
            };
            write(y, draws.iter().enumerate().map(choose))
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        get(inputs, 0).map_or(0, |x| x.dims.first().map_or(0, |n| n * self.samples) * x.dtype.size())
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("a draw from a discrete distribution".into()))
    }

    fn is_pure(&self) -> bool {
        false
    }
}

pub(super) const ROWS: &[Row] = &[
    Row::new("Bernoulli", 15, |s| Ok(Arc::new(Bernoulli { dtype: dtype(s)?, seed: seed(s)? }))),
    Row::new("Multinomial", 7, Multinomial::make),
    Row::new("RandomNormal", 1, |s| Random::make(s, true, false)),
    Row::new("RandomNormalLike", 1, |s| Random::make(s, true, true)),
    Row::new("RandomUniform", 1, |s| Random::make(s, false, false)),
    Row::new("RandomUniformLike", 1, |s| Random::make(s, false, true)),
];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    use crate::tensor::Tensor;
    let f64s = DType::F64.to_onnx() as i64;
    vec![
        Case::new("Bernoulli", 15).int("dtype", 7).within(&[4, 5], 0.0, 1.0).forward_only(),
        Case::new("Multinomial", 22)
            .int("sample_size", 7)
            .fixed(Tensor::scalar(0.5f32).reshaped(&[1, 1]).unwrap())
            .forward_only(),
        Case::new("RandomNormal", 22).ints("shape", &[3, 4]).int("dtype", f64s).forward_only(),
        Case::new("RandomUniform", 22).ints("shape", &[3, 4]).int("dtype", f64s).forward_only(),
        Case::new("RandomNormalLike", 22).input(&[3, 4]).tolerance(1e-6),
        Case::new("RandomUniformLike", 1).input(&[3, 4]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{Attr, Attrs, create};
    use crate::tensor::Tensor;

    fn draw(op_type: &str, attrs: &[(&str, Attr)], inputs: &[&Tensor], seed: u64) -> Vec<f64> {
        let attrs = Attrs(attrs.iter().map(|(k, v)| (k.to_string(), v.clone())).collect());
        let spec = Spec { domain: "", op_type, opset: 22, attrs: &attrs, inputs: inputs.len(), outputs: 1 };
        let op = create(&spec).unwrap();
        let metas: Vec<Meta> = inputs.iter().map(|t| t.meta()).collect();
        let refs: Vec<Option<&Meta>> = metas.iter().map(Some).collect();
        let meta = &op.infer(&refs).unwrap()[0];
        let mut y = Tensor::zeros(meta.dtype, &meta.dims);
        let mut scratch = crate::tensor::Buffer::zeroed(op.scratch(&refs));
        let x: Vec<Option<View>> = inputs.iter().map(|t| Some(t.view())).collect();
        op.forward(&mut Cx { scratch: scratch.bytes_mut(), seed }, &x, &mut [Some(y.view_mut())]).unwrap();
        y.to_f64()
    }

    #[test]
    fn distributions_are_what_they_say() {
        let n = 40_000;
        let moments = |x: &[f64]| {
            let mean = x.iter().sum::<f64>() / x.len() as f64;
            (mean, (x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / x.len() as f64).sqrt())
        };
        let shape = ("shape", Attr::Ints(vec![n]));
        let x = draw(
            "RandomNormal",
            &[shape.clone(), ("mean", Attr::Float(2.0)), ("scale", Attr::Float(3.0))],
            &[],
            1,
        );
        let (mean, deviation) = moments(&x);
        assert!((mean - 2.0).abs() < 0.06 && (deviation - 3.0).abs() < 0.05, "{mean} {deviation}");
        let x =
            draw("RandomUniform", &[shape, ("low", Attr::Float(-1.0)), ("high", Attr::Float(3.0))], &[], 1);
        let (mean, deviation) = moments(&x);
        assert!(
            (mean - 1.0).abs() < 0.03 && (deviation - 4.0 / 12f64.sqrt()).abs() < 0.02,
            "{mean} {deviation}"
        );
        let p = Tensor::from_slice(&[n as usize], &vec![0.3f32; n as usize]).unwrap();
        assert!((moments(&draw("Bernoulli", &[], &[&p], 5)).0 - 0.3).abs() < 0.01);
        assert_ne!(draw("Bernoulli", &[], &[&p], 5), draw("Bernoulli", &[], &[&p], 6));
        let logits = Tensor::from_slice(&[1, 3], &[0.0f32, 3f32.ln(), 0.0]).unwrap();
        let x = draw("Multinomial", &[("sample_size", Attr::Int(n))], &[&logits], 2);
        let share = |c: f64| x.iter().filter(|v| **v == c).count() as f64 / n as f64;
        assert!(
            (share(0.0) - 0.2).abs() < 0.01 && (share(1.0) - 0.6).abs() < 0.01,
            "{} {}",
            share(0.0),
            share(1.0)
        );
    }
}
