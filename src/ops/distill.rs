//! Operators of self-distillation. All but [`Detach`] have a state as input 0, and their output is its next content.

use serde::{Deserialize, Serialize};

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::distill;
use crate::kernels::half::Half;
use crate::kernels::random::Stream;
use crate::kernels::update::{Cells, Gradient, sweep};
use crate::ops::half::half_bits_mut;
use crate::ops::update::seed;
use crate::ops::{ChannelsLast, Cx, Grads, Op, get, need, out};
use crate::tensor::{DType, Float, Meta, View, ViewMut};

const UPDATES: [(usize, usize); 1] = [(0, 0)];

/// How far a perturbed sample may lie from the clean one.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ball {
    /// Every element by at most this.
    Linf(f64),
    /// Every sample by at most this Euclidean distance.
    L2(f64),
}

/// The output's buffer with the state's elements in it.
fn held<'a, 'b>(
    x: &[Option<View>],
    y: &'a mut [Option<ViewMut<'b>>],
) -> Result<&'a mut ViewMut<'b>, OpError> {
    let y = out(y, 0)?;
    if let Some(old) = get(x, 0) {
        y.bytes.copy_from_slice(old.bytes);
    }
    Ok(y)
}

/// One output, of input 0's shape; input 1, where it is there, must have that shape too.
fn infer(inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
    let x = need(inputs, 0)?;
    match get(inputs, 1) {
        Some(other) if !other.same_shape(x) => Err(OpError::Shape(format!(
            "{} {:?} and {} {:?}",
            x.dtype,
            x.dims.as_slice(),
            other.dtype,
            other.dims.as_slice()
        ))),
        _ => Ok(vec![Meta::new(x.dtype, &x.dims)]),
    }
}

/// Elements of one sample: dimension 0 counts samples.
fn row(dims: &[usize]) -> usize {
    dims.iter().skip(1).product::<usize>().max(1)
}

fn no_gradient<T>() -> Result<T, OpError> {
    Err(OpError::NotDifferentiable("a state's next content".into()))
}

/// `x' = clamp(clean + bound(x − clean), range)` for samples `x` (N, …). Inputs: x (a state) and, with a ball, clean.
#[derive(Debug, Clone, PartialEq)]
pub struct Project {
    pub ball: Option<Ball>,
    /// Least and largest value.
    pub range: Option<(f64, f64)>,
}

impl Op for Project {
    fn name(&self) -> &'static str {
        "Project"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        if self.ball.is_some() {
            need(inputs, 1)?;
        }
        infer(inputs)
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let y = held(x, y)?;
        let row = row(y.dims);
        float_dispatch!(y.dtype, T => {
            let y = y.get::<T>()?;
            match self.ball {
                Some(Ball::Linf(r)) => distill::to_box(y, need(x, 1)?.get::<T>()?, r),
                Some(Ball::L2(r)) => distill::to_ball(y, need(x, 1)?.get::<T>()?, row, r),
                None => {}
            }
            if let Some((low, high)) = self.range {
                distill::clamp(y, low, high);
            }
            Ok(())
        })
    }

    fn updates(&self) -> &[(usize, usize)] {
        &UPDATES
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        no_gradient()
    }
}

/// `x' = clean + z·‖x − clean‖/‖z‖` with Gaussian z, for each sample of `x` (N, …). Inputs: x (a state), clean.
#[derive(Debug, Clone, PartialEq)]
pub struct NoiseAlike;

impl Op for NoiseAlike {
    fn name(&self) -> &'static str {
        "NoiseAlike"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        need(inputs, 1)?;
        infer(inputs)
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let y = held(x, y)?;
        let (row, len, n) = (row(y.dims), y.len(), y.dims.first().copied().unwrap_or(1));
        let streams = [Stream::new(cx.seed), Stream::new(cx.seed ^ 0x5851_f42d_4c95_7f2d)];
        float_dispatch!(y.dtype, T => {
            let (angles, norms) = cx.room::<T>(len + n)?.split_at_mut(len);
            distill::noise(y.get::<T>()?, need(x, 1)?.get::<T>()?, row, streams, angles, norms);
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let rows = |m: &Meta| m.dims.first().copied().unwrap_or(1);
        get(inputs, 1).map_or(0, |m| (m.len() + rows(m)) * m.dtype.size())
    }

    fn updates(&self) -> &[(usize, usize)] {
        &UPDATES
    }

    fn is_pure(&self) -> bool {
        false
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        no_gradient()
    }
}

/// `a' = a + weight·(x − a)`: an exponential moving average. Inputs: a (a state, perhaps in half precision, rounded at
/// random), x, `hyper` (float64 [2]: weight, step).
#[derive(Debug, Clone, PartialEq)]
pub struct Average {
    /// Tells random numbers of different averages apart.
    pub salt: u64,
}

impl Op for Average {
    fn name(&self) -> &'static str {
        "Average"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (a, x) = (need(inputs, 0)?, need(inputs, 1)?);
        let hyper = need(inputs, 2)?;
        if hyper.dtype != DType::F64 || hyper.len() != 2 {
            return Err(OpError::Shape("the hyperparameters must be two float64".into()));
        }
        infer(&[Some(&Meta::new(a.dtype.working(), &a.dims)), Some(x)])?;
        Ok(vec![Meta::new(a.dtype, &a.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let y = held(x, y)?;
        let &[weight, step] = need(x, 2)?.get::<f64>()? else {
            return Err(OpError::Internal("two hyperparameters are needed".into()));
        };
        let x = need(x, 1)?;
        float_dispatch!(x.dtype, T => {
            let weight = T::of(weight);
            let average = match Half::of(y.dtype) {
                Some(half) => Cells::Half(half, half_bits_mut(y)?, seed(self.salt, step)),
                None => Cells::Wide(y.get::<T>()?),
            };
            sweep(average, [], Gradient::Whole(x.get::<T>()?), &|a, [], v| (a + weight * (v - a), []));
            Ok(())
        })
    }

    fn updates(&self) -> &[(usize, usize)] {
        &UPDATES
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        no_gradient()
    }
}

/// The same elements; no gradient passes: see [`crate::graph::grad`].
#[derive(Debug, Clone, PartialEq)]
pub struct Detach;

impl Op for Detach {
    fn name(&self) -> &'static str {
        "Detach"
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

    fn is_view(&self) -> bool {
        true
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("what is detached has no gradient".into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::{Graph, grad};
    use crate::ops::binary::Mul;
    use crate::ops::eval;
    use crate::ops::loss::Mse;
    use crate::tensor::Tensor;
    use std::sync::Arc;

    fn t(dims: &[usize], x: &[f32]) -> Tensor {
        Tensor::from_slice(dims, x).unwrap()
    }

    fn run(op: impl Op + 'static, x: &[&Tensor]) -> Vec<f64> {
        let x: Vec<Option<&Tensor>> = x.iter().map(|x| Some(*x)).collect();
        eval(&op, &x).unwrap()[0].to_f64()
    }

    #[test]
    fn samples_stay_in_their_ball_and_in_the_range() {
        let (x, clean) = (t(&[2, 2], &[3.0, 4.0, 0.5, -0.25]), t(&[2, 2], &[0.0, 0.0, 0.25, 0.0]));
        let linf = Project { ball: Some(Ball::Linf(0.5)), range: None };
        assert_eq!(run(linf, &[&x, &clean]), [0.5, 0.5, 0.5, -0.25]);
        let l2 = Project { ball: Some(Ball::L2(1.0)), range: Some((-0.125, 0.75)) };
        let y = run(l2, &[&x, &clean]);
        assert!((y[0] - 0.6).abs() < 1e-6 && y[1..] == [0.75, 0.5, -0.125], "{y:?}");
        let range = Project { ball: None, range: Some((0.0, 1.0)) };
        assert_eq!(run(range, &[&x]), [1.0, 1.0, 0.5, 0.0]);
    }

    #[test]
    fn noise_has_the_norm_of_what_it_replaces() {
        let n = 5000;
        let clean: Vec<f32> = (0..3 * n).map(|i| i as f32 * 1e-4).collect();
        let x: Vec<f32> = (0..3 * n).map(|i| clean[i] + [0.0, 0.01, -0.02][i / n]).collect();
        let noisy = run(NoiseAlike, &[&t(&[3, n], &x), &t(&[3, n], &clean)]);
        for (i, size) in [0.0, 0.01, 0.02].into_iter().enumerate() {
            let z: Vec<f64> = (i * n..(i + 1) * n).map(|k| noisy[k] - f64::from(clean[k])).collect();
            let norm = z.iter().map(|z| z * z).sum::<f64>().sqrt();
            let want = size * (n as f64).sqrt();
            assert!((norm - want).abs() <= 1e-3 * want, "sample {i}: {norm}, not {want}");
            // Gaussian: as many within one deviation as there should be.
            let near = z.iter().filter(|z| z.abs() < size).count() as f64 / n as f64;
            assert!(i == 0 || (near - 0.683).abs() < 0.03, "sample {i}: {near}");
        }
    }

    #[test]
    fn an_average_moves_by_its_weight() {
        let hyper = Tensor::from_slice(&[2], &[0.25, 0.0]).unwrap();
        assert_eq!(
            run(Average { salt: 0 }, &[&t(&[2], &[1.0, 2.0]), &t(&[2], &[5.0, -2.0]), &hyper]),
            [2.0, 1.0]
        );
    }

    #[test]
    fn no_gradient_passes_what_is_detached() {
        let mut g = Graph::default();
        let x = g.add_input("x", Meta::new(DType::F32, &[3]));
        let d = g.emit("d", Arc::new(Detach), &[Some(x)], 1).unwrap()[0];
        let y = g.emit("y", Arc::new(Mul), &[Some(x), Some(d)], 1).unwrap()[0];
        let zero = g.add_constant("zero", Tensor::zeros(DType::F32, &[3]));
        let loss = g.emit("l", Arc::new(Mse), &[Some(y), Some(zero)], 1).unwrap()[0];
        let grads = grad(&mut g, loss, &[x]).unwrap();
        // One factor is taken as a constant, so there is one path and nothing is added up.
        assert!(grads.contains_key(&x));
        assert!(!g.nodes.iter().any(|n| n.op.name() == "Add"));
        let loss = g.emit("m", Arc::new(Mse), &[Some(d), Some(zero)], 1).unwrap()[0];
        assert!(grad(&mut g, loss, &[x]).unwrap().is_empty());
    }
}
