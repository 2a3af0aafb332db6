//! Optimizer updates as operators whose outputs are the next values of persistent state.
//!
//! Inputs: parameter, gradient, `hyper` (float64 [2]: learning rate, 1-based step), `scale` (optional float64
//! scalar multiplied into the gradient; not finite: nothing changes), then the states. Outputs: the next
//! parameter, then the next states. The perturbers of ICP are these same operators applied to the network's input.

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::update::{sum_squares, sweep};
use crate::ops::{Cx, Grads, Op, get, need, out};
use crate::tensor::{DType, Float, Meta, View, ViewMut};

/// Index of the first state among the inputs.
pub const FIRST_STATE: usize = 4;

const UPDATES: [(usize, usize); 4] = [(0, 0), (FIRST_STATE, 1), (FIRST_STATE + 1, 2), (FIRST_STATE + 2, 3)];

/// Stochastic gradient descent (PyTorch's `SGD`). State: the velocity, if `momentum` is not 0.
#[derive(Debug, Clone, PartialEq)]
pub struct Sgd {
    pub momentum: f64,
    pub nesterov: bool,
    pub weight_decay: f64,
}

/// Adam (Kingma and Ba 2015; PyTorch's `Adam` and, `decoupled`, `AdamW`). States: m, v and, with `amsgrad`, the
/// largest v so far.
#[derive(Debug, Clone, PartialEq)]
pub struct Adam {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    /// The weights shrink by themselves (AdamW) rather than through the gradient.
    pub decoupled: bool,
    pub amsgrad: bool,
}

impl Default for Adam {
    fn default() -> Self {
        Adam { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, decoupled: false, amsgrad: false }
    }
}

/// AdEMAMix (Pagliardini, Ablin and Grangier, arXiv 2409.03137) without its schedules; weight decay is
/// decoupled. States: the fast average m₁, v, the slow average m₂.
#[derive(Debug, Clone, PartialEq)]
pub struct AdEMAMix {
    pub beta1: f64,
    pub beta2: f64,
    pub beta3: f64,
    pub alpha: f64,
    pub eps: f64,
    pub weight_decay: f64,
}

impl Default for AdEMAMix {
    fn default() -> Self {
        AdEMAMix { beta1: 0.9, beta2: 0.999, beta3: 0.9999, alpha: 5.0, eps: 1e-8, weight_decay: 0.0 }
    }
}

/// One optimizer step on one parameter; all states have the parameter's shape and start at zero.
pub trait Update: Op {
    fn states(&self) -> usize;
}

/// `base^t` by repeated squaring: the same bits everywhere.
fn power(base: f64, t: f64) -> f64 {
    let (mut n, mut square, mut result) = (t.max(0.0) as u64, base, 1.0);
    while n > 0 {
        if n & 1 == 1 {
            result *= square;
        }
        square *= square;
        n >>= 1;
    }
    result
}

/// Learning rate, step and gradient factor; `None` when the step is to be skipped.
fn hyper(x: &[Option<View>]) -> Result<Option<(f64, f64, f64)>, OpError> {
    let [lr, t] = need(x, 2)?.get::<f64>()? else {
        return Err(OpError::Internal("two hyperparameters are needed".into()));
    };
    let scale = match get(x, 3) {
        Some(s) => s.get::<f64>()?.first().copied().unwrap_or(1.0),
        None => 1.0,
    };
    Ok(scale.is_finite().then_some((*lr, *t, scale)))
}

/// Parameter and states in their output buffers, holding the old values.
#[allow(clippy::type_complexity)]
fn buffers<'a, T: Float, const N: usize>(
    x: &[Option<View>],
    y: &'a mut [Option<ViewMut>],
) -> Result<(&'a mut [T], [&'a mut [T]; N]), OpError> {
    let mut slots: [&mut [T]; N] = std::array::from_fn(|_| &mut [][..]);
    let mut param: &mut [T] = &mut [];
    if y.len() <= N {
        return Err(OpError::Internal(format!("{} outputs for {N} states", y.len())));
    }
    for (i, (y, (input, _))) in y.iter_mut().zip(UPDATES).take(N + 1).enumerate() {
        let y = y.as_mut().ok_or_else(|| OpError::Internal(format!("output {i} has no buffer")))?;
        let y = y.get::<T>()?;
        if let Some(old) = get(x, input) {
            y.copy_from_slice(old.get::<T>()?);
        }
        match i {
            0 => param = y,
            _ => slots[i - 1] = y,
        }
    }
    Ok((param, slots))
}

fn infer(inputs: &[Option<&Meta>], states: usize) -> Result<Vec<Meta>, OpError> {
    let param = need(inputs, 0)?;
    for i in [1].into_iter().chain(FIRST_STATE..FIRST_STATE + states) {
        let m = need(inputs, i)?;
        if !m.same_shape(param) {
            return Err(OpError::Shape(format!(
                "input {i} is {} {:?}, the parameter {} {:?}",
                m.dtype,
                m.dims.as_slice(),
                param.dtype,
                param.dims.as_slice()
            )));
        }
    }
    let hyper = need(inputs, 2)?;
    if hyper.dtype != DType::F64 || hyper.len() != 2 {
        return Err(OpError::Shape("the hyperparameters must be two float64".into()));
    }
    Ok(vec![Meta::new(param.dtype, &param.dims); states + 1])
}

fn no_gradient<T>() -> Result<T, OpError> {
    Err(OpError::NotDifferentiable("an optimizer's step".into()))
}

macro_rules! update_op {
    ($t:ident, $name:literal, $states:expr) => {
        impl Update for $t {
            fn states(&self) -> usize {
                let states: fn(&$t) -> usize = $states;
                states(self)
            }
        }

        impl Op for $t {
            fn name(&self) -> &'static str {
                $name
            }

            fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
                infer(inputs, self.states())
            }

            fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
                float_dispatch!(need(x, 1)?.dtype, T => self.run::<T>(x, y))
            }

            fn updates(&self) -> &[(usize, usize)] {
                &UPDATES[..=self.states()]
            }

            fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
                no_gradient()
            }
        }
    };
}

update_op!(Sgd, "Sgd", |s| (s.momentum != 0.0) as usize);
update_op!(Adam, "Adam", |s| 2 + s.amsgrad as usize);
update_op!(AdEMAMix, "AdEMAMix", |_| 3);

impl Sgd {
    fn run<T: Float>(&self, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let grad = need(x, 1)?.get::<T>()?;
        let step = hyper(x)?;
        // Skipping comes after `buffers`, which carries old values over to separate outputs.
        if self.momentum == 0.0 {
            let (param, []) = buffers::<T, 0>(x, y)?;
            let Some((lr, _, scale)) = step else { return Ok(()) };
            let (lr, scale, decay) = (T::of(lr), T::of(scale), T::of(self.weight_decay));
            sweep(param, [], grad, &|p, [], g| (p - lr * (g * scale + decay * p), []));
            return Ok(());
        }
        let (param, velocity) = buffers::<T, 1>(x, y)?;
        let Some((lr, _, scale)) = step else { return Ok(()) };
        let (lr, scale, decay) = (T::of(lr), T::of(scale), T::of(self.weight_decay));
        let mu = T::of(self.momentum);
        let ahead = if self.nesterov { T::one() } else { T::zero() };
        // Nesterov steps along g + μv, plain momentum along v.
        let (of_g, of_v) = (ahead, if self.nesterov { mu } else { T::one() });
        sweep(param, velocity, grad, &|p, [v], g| {
            let g = g * scale + decay * p;
            let v = mu * v + g;
            (p - lr * (of_g * g + of_v * v), [v])
        });
        Ok(())
    }
}

impl Adam {
    fn run<T: Float>(&self, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let grad = need(x, 1)?.get::<T>()?;
        let step = hyper(x)?;
        let (lr, t, scale) = step.unwrap_or((0.0, 1.0, 1.0));
        let root = (1.0 - power(self.beta2, t)).sqrt();
        let rate = T::of(lr / (1.0 - power(self.beta1, t)));
        let (shrink, decay) = match self.decoupled {
            true => (T::of(1.0 - lr * self.weight_decay), T::zero()),
            false => (T::one(), T::of(self.weight_decay)),
        };
        let (scale, root, eps) = (T::of(scale), T::of(root), T::of(self.eps));
        let (fresh1, keep2, fresh2) = (T::of(1.0 - self.beta1), T::of(self.beta2), T::of(1.0 - self.beta2));
        let moments = move |p: T, m: T, v: T, g: T| {
            let g = g * scale + decay * p;
            (m + fresh1 * (g - m), keep2 * v + fresh2 * g * g)
        };
        if self.amsgrad {
            let (param, states) = buffers::<T, 3>(x, y)?;
            if step.is_none() {
                return Ok(());
            }
            sweep(param, states, grad, &|p, [m, v, top], g| {
                let (m, v) = moments(p, m, v, g);
                let top = if v > top { v } else { top };
                (p * shrink - rate * (m / (top.sqrt() / root + eps)), [m, v, top])
            });
        } else {
            let (param, states) = buffers::<T, 2>(x, y)?;
            if step.is_none() {
                return Ok(());
            }
            sweep(param, states, grad, &|p, [m, v], g| {
                let (m, v) = moments(p, m, v, g);
                (p * shrink - rate * (m / (v.sqrt() / root + eps)), [m, v])
            });
        }
        Ok(())
    }
}

impl AdEMAMix {
    fn run<T: Float>(&self, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let grad = need(x, 1)?.get::<T>()?;
        let step = hyper(x)?;
        let (param, states) = buffers::<T, 3>(x, y)?;
        let Some((lr, t, scale)) = step else { return Ok(()) };
        let unbias = T::of(1.0 / (1.0 - power(self.beta1, t)));
        let root = T::of((1.0 - power(self.beta2, t)).sqrt());
        let shrink = T::of(1.0 - lr * self.weight_decay);
        let (lr, scale, alpha, eps) = (T::of(lr), T::of(scale), T::of(self.alpha), T::of(self.eps));
        let (fresh1, fresh3) = (T::of(1.0 - self.beta1), T::of(1.0 - self.beta3));
        let (keep2, fresh2) = (T::of(self.beta2), T::of(1.0 - self.beta2));
        sweep(param, states, grad, &|p, [m1, v, m2], g| {
            let g = g * scale;
            let m1 = m1 + fresh1 * (g - m1);
            let m2 = m2 + fresh3 * (g - m2);
            let v = keep2 * v + fresh2 * g * g;
            (p * shrink - lr * ((m1 * unbias + alpha * m2) / (v.sqrt() / root + eps)), [m1, v, m2])
        });
        Ok(())
    }
}

/// `acc + Σ grad²` as a float64 scalar. Inputs: the gradient and, optionally, `acc`.
#[derive(Debug, Clone)]
pub struct SumSquares;

impl Op for SumSquares {
    fn name(&self) -> &'static str {
        "SumSquares"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        need(inputs, 0)?;
        if get(inputs, 1).is_some_and(|acc| acc.dtype != DType::F64 || acc.len() != 1) {
            return Err(OpError::Type("the sum of squares so far must be a float64 scalar".into()));
        }
        Ok(vec![Meta::new(DType::F64, &[])])
    }

    // Not in place: an absent sum could not be told from one in the output's buffer.
    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let grad = need(x, 0)?;
        let sum = float_dispatch!(grad.dtype, T => Ok(sum_squares(grad.get::<T>()?)))?;
        let before = match get(x, 1) {
            Some(acc) => acc.get::<f64>()?[0],
            None => 0.0,
        };
        out(y, 0)?.get::<f64>()?[0] = before + sum;
        Ok(())
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        no_gradient()
    }
}

/// [`SumSquares`] that also says whether this gradient may be followed at once, without waiting for the others. Inputs: the
/// gradient, `acc` or none, the loss (a scalar). Outputs, float64 scalars: `acc + Σ grad²`, and the factor on the gradient:
/// 1, or NaN where the loss or that sum is not finite.
#[derive(Debug, Clone)]
pub struct Checked;

impl Op for Checked {
    fn name(&self) -> &'static str {
        "CheckedSquares"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        if need(inputs, 2)?.len() != 1 {
            return Err(OpError::Shape("the loss must be a scalar".into()));
        }
        let sum = SumSquares.infer(inputs)?.remove(0);
        Ok(vec![sum.clone(), sum])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        SumSquares.forward(cx, &x[..2], y)?;
        let loss = need(x, 2)?;
        let loss = float_dispatch!(loss.dtype, T => Ok(loss.get::<T>()?[0].to64()))?;
        let sum = out(y, 0)?.get::<f64>()?[0];
        out(y, 1)?.get::<f64>()?[0] = if loss.is_finite() && sum.is_finite() { 1.0 } else { f64::NAN };
        Ok(())
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        no_gradient()
    }
}

/// The factor that clips a gradient to `max_norm` (PyTorch's `clip_grad_norm_`), and the gradient's norm.
/// Inputs: loss (a scalar), sum of squares (float64 scalar). Outputs, float64 scalars: the factor, NaN when the
/// loss or the norm is not finite, and the norm.
#[derive(Debug, Clone)]
pub struct ClipScale {
    pub max_norm: Option<f64>,
}

impl Op for ClipScale {
    fn name(&self) -> &'static str {
        "ClipScale"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        if need(inputs, 0)?.len() != 1 || need(inputs, 1)?.len() != 1 {
            return Err(OpError::Shape("loss and sum of squares must be scalars".into()));
        }
        Ok(vec![Meta::new(DType::F64, &[]), Meta::new(DType::F64, &[])])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let loss = need(x, 0)?;
        let loss = float_dispatch!(loss.dtype, T => Ok(loss.get::<T>()?[0].to64()))?;
        let norm = need(x, 1)?.get::<f64>()?[0].sqrt();
        let scale = match self.max_norm {
            _ if !loss.is_finite() || !norm.is_finite() => f64::NAN,
            None => 1.0,
            Some(max) => (max / (norm + 1e-6)).min(1.0),
        };
        for (i, value) in [scale, norm].into_iter().enumerate() {
            if let Some(Some(y)) = y.get_mut(i) {
                y.get::<f64>()?[0] = value;
            }
        }
        Ok(())
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        no_gradient()
    }
}

/// `acc' = (first ? 0 : acc) + weight·grad`: gradients gathered over micro-batches. Inputs: acc (state), the
/// gradient, `hyper` (float64 [2]: weight, first ≠ 0).
#[derive(Debug, Clone)]
pub struct Accumulate;

impl Op for Accumulate {
    fn name(&self) -> &'static str {
        "Accumulate"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        infer(inputs, 0)
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let [weight, first] = need(x, 2)?.get::<f64>()? else {
            return Err(OpError::Internal("two hyperparameters are needed".into()));
        };
        float_dispatch!(need(x, 1)?.dtype, T => {
            let (acc, []) = buffers::<T, 0>(x, y)?;
            let (grad, weight) = (need(x, 1)?.get::<T>()?, T::of(*weight));
            match *first != 0.0 {
                true => sweep(acc, [], grad, &|_, [], g| (weight * g, [])),
                false => sweep(acc, [], grad, &|a, [], g| (a + weight * g, [])),
            }
            Ok(())
        })
    }

    fn updates(&self) -> &[(usize, usize)] {
        &UPDATES[..1]
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        no_gradient()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::eval;
    use crate::tensor::Tensor;

    fn step(op: &dyn Update, state: &mut [Tensor], grad: &Tensor, (lr, t): (f64, f64), scale: Option<f64>) {
        let hyper = Tensor::from_slice(&[2], &[lr, t]).unwrap();
        let scale = scale.map(Tensor::scalar);
        let mut x = vec![Some(&state[0]), Some(grad), Some(&hyper), scale.as_ref()];
        x.extend(state[1..].iter().map(Some));
        let next = eval(op, &x).unwrap();
        state.clone_from_slice(&next);
    }

    fn all() -> Vec<Box<dyn Update>> {
        vec![
            Box::new(Sgd { momentum: 0.0, nesterov: false, weight_decay: 0.1 }),
            Box::new(Sgd { momentum: 0.9, nesterov: true, weight_decay: 0.0 }),
            Box::new(Adam::default()),
            Box::new(Adam { amsgrad: true, decoupled: true, weight_decay: 0.1, ..Adam::default() }),
            Box::new(AdEMAMix { weight_decay: 0.1, ..AdEMAMix::default() }),
        ]
    }

    fn start(op: &dyn Update, param: &[f32]) -> Vec<Tensor> {
        let t = Tensor::from_slice(&[param.len()], param).unwrap();
        let mut all = vec![t.clone()];
        all.extend((0..op.states()).map(|_| Tensor::zeros(DType::F32, t.dims())));
        all
    }

    #[test]
    fn first_steps_by_hand() {
        let grad = Tensor::from_slice(&[1], &[2.0f32]).unwrap();
        let sgd = Sgd { momentum: 0.5, nesterov: false, weight_decay: 0.0 };
        let mut state = start(&sgd, &[1.0]);
        step(&sgd, &mut state, &grad, (0.1, 1.0), None);
        assert_eq!(state[0].to_f64(), [f64::from(0.8f32)]);
        step(&sgd, &mut state, &grad, (0.1, 2.0), None);
        assert!((state[0].to_f64()[0] - 0.5).abs() < 1e-6);
        // Adam's first step is lr·sign(g), whatever the gradient's size.
        let adam = Adam::default();
        let mut state = start(&adam, &[1.0]);
        step(&adam, &mut state, &grad, (0.01, 1.0), None);
        assert!((state[0].to_f64()[0] - 0.99).abs() < 1e-6);
        // AdEMAMix adds α(1 − β₃) of it.
        let mix = AdEMAMix::default();
        let mut state = start(&mix, &[1.0]);
        step(&mix, &mut state, &grad, (0.01, 1.0), None);
        assert!((state[0].to_f64()[0] - (1.0 - 0.01 * 1.0005)).abs() < 1e-6);
    }

    #[test]
    fn the_scale_multiplies_and_what_is_not_finite_changes_nothing() {
        let (grad, half) = ([2.0f32, -4.0, 1e-3], [1.0f32, -2.0, 5e-4]);
        let grads = [grad, half].map(|g| Tensor::from_slice(&[3], &g).unwrap());
        for op in all() {
            let mut a = start(op.as_ref(), &[1.0, 2.0, 3.0]);
            let mut b = a.clone();
            step(op.as_ref(), &mut a, &grads[0], (0.1, 1.0), Some(0.5));
            step(op.as_ref(), &mut b, &grads[1], (0.1, 1.0), None);
            let before: Vec<_> = a.iter().map(Tensor::to_f64).collect();
            assert_eq!(before, b.iter().map(Tensor::to_f64).collect::<Vec<_>>(), "{op:?}");
            for scale in [f64::NAN, f64::INFINITY] {
                step(op.as_ref(), &mut a, &grads[0], (0.1, 2.0), Some(scale));
                assert_eq!(before, a.iter().map(Tensor::to_f64).collect::<Vec<_>>(), "{op:?}");
            }
        }
    }

    #[test]
    fn in_the_states_buffers_as_in_separate_ones() {
        let n = 40_000;
        let param: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).sin()).collect();
        let grad: Vec<f32> = (0..n).map(|i| (i as f32 * 0.11).cos()).collect();
        let grad = Tensor::from_slice(&[n], &grad).unwrap();
        let hyper = Tensor::from_slice(&[2], &[0.01, 3.0]).unwrap();
        for op in all() {
            let mut separate = start(op.as_ref(), &param);
            let mut shared = separate.clone();
            step(op.as_ref(), &mut separate, &grad, (0.01, 3.0), None);
            let mut y: Vec<Option<ViewMut>> = shared.iter_mut().map(|t| Some(t.view_mut())).collect();
            let x = [None, Some(grad.view()), Some(hyper.view()), None, None, None, None];
            op.forward(&mut Cx { scratch: &mut [], seed: 0 }, &x, &mut y).unwrap();
            assert!(separate.iter().zip(&shared).all(|(a, b)| a.bytes() == b.bytes()), "{op:?}");
        }
    }

    #[test]
    fn clipping_and_accumulation() {
        let grad = Tensor::from_slice(&[2], &[3.0f32, 4.0]).unwrap();
        let sum = &eval(&SumSquares, &[Some(&grad), None]).unwrap()[0];
        let sum = &eval(&SumSquares, &[Some(&grad), Some(sum)]).unwrap()[0];
        assert_eq!(sum.to_f64(), [50.0]);
        let loss = Tensor::scalar(1.0f32);
        let clip = |max_norm, loss: &Tensor, sum: f64| {
            let y = eval(&ClipScale { max_norm }, &[Some(loss), Some(&Tensor::scalar(sum))]).unwrap();
            (y[0].to_f64()[0], y[1].to_f64()[0])
        };
        assert_eq!(clip(None, &loss, 25.0), (1.0, 5.0));
        assert_eq!(clip(Some(6.0), &loss, 25.0), (1.0, 5.0));
        assert_eq!(clip(Some(1.0), &loss, 25.0), (1.0 / (5.0 + 1e-6), 5.0));
        assert!(clip(None, &loss, f64::NAN).0.is_nan());
        let checked = |acc: f64, loss: &Tensor| {
            let y = eval(&Checked, &[Some(&grad), Some(&Tensor::scalar(acc)), Some(loss)]).unwrap();
            (y[0].to_f64()[0], y[1].to_f64()[0])
        };
        assert_eq!(checked(25.0, &loss), (50.0, 1.0));
        assert!(checked(f64::INFINITY, &loss).1.is_nan());
        assert!(checked(0.0, &Tensor::scalar(f32::NAN)).1.is_nan());
        assert!(clip(None, &Tensor::scalar(f32::INFINITY), 1.0).0.is_nan());
        let acc = Tensor::from_slice(&[2], &[f32::NAN, 1.0]).unwrap();
        let add = |acc: &Tensor, first: f64| {
            let hyper = Tensor::from_slice(&[2], &[0.5, first]).unwrap();
            eval(&Accumulate, &[Some(acc), Some(&grad), Some(&hyper)]).unwrap().remove(0)
        };
        let acc = add(&acc, 1.0);
        assert_eq!(acc.to_f64(), [1.5, 2.0]);
        assert_eq!(add(&acc, 0.0).to_f64(), [3.0, 4.0]);
    }

    #[cfg(feature = "cli")]
    #[test]
    fn every_optimizer_equals_pytorch() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/optimizers.npz");
        let mut npz = ndarray_npy::NpzReader::new(std::fs::File::open(path).unwrap()).unwrap();
        let text: ndarray::Array1<u8> = npz.by_name("cases").unwrap();
        let kinds: std::collections::BTreeMap<String, String> =
            serde_json::from_slice(text.as_slice().unwrap()).unwrap();
        for (name, kind) in kinds {
            let mut number = |key: &str| -> f64 {
                let a: ndarray::Array0<f64> = npz.by_name(&format!("{name}.{key}")).unwrap();
                a.into_scalar()
            };
            let (lr, weight_decay) = (number("lr"), number("weight_decay"));
            let op: Box<dyn Update> = match kind.as_str() {
                "sgd" => {
                    let momentum = number("momentum");
                    let nesterov: ndarray::Array0<bool> = npz.by_name(&format!("{name}.nesterov")).unwrap();
                    Box::new(Sgd { momentum, nesterov: nesterov.into_scalar(), weight_decay })
                }
                _ => {
                    let eps = number("eps");
                    let alpha = if kind == "ademamix" { number("alpha") } else { 0.0 };
                    let betas: ndarray::Array1<f64> = npz.by_name(&format!("{name}.betas")).unwrap();
                    let (beta1, beta2) = (betas[0], betas[1]);
                    if kind == "ademamix" {
                        Box::new(AdEMAMix { beta1, beta2, beta3: betas[2], alpha, eps, weight_decay })
                    } else {
                        let amsgrad: ndarray::Array0<bool> = npz.by_name(&format!("{name}.amsgrad")).unwrap();
                        let (decoupled, amsgrad) = (kind == "adamw", amsgrad.into_scalar());
                        Box::new(Adam { beta1, beta2, eps, weight_decay, decoupled, amsgrad })
                    }
                }
            };
            let p0: ndarray::Array1<f32> = npz.by_name(&format!("{name}.p0")).unwrap();
            let grads: ndarray::Array2<f32> = npz.by_name(&format!("{name}.grads")).unwrap();
            let expected: ndarray::Array2<f64> = npz.by_name(&format!("{name}.p64")).unwrap();
            let mut state = start(op.as_ref(), p0.as_slice().unwrap());
            for (t, (g, want)) in grads.outer_iter().zip(expected.outer_iter()).enumerate() {
                let g = Tensor::from_slice(&[g.len()], &g.to_vec()).unwrap();
                step(op.as_ref(), &mut state, &g, (lr, t as f64 + 1.0), None);
                let moved = want.iter().zip(&p0).map(|(w, p)| (w - f64::from(*p)).abs()).fold(0.0, f64::max);
                for (a, b) in state[0].to_f64().iter().zip(want) {
                    assert!((a - b).abs() <= 1e-4 * moved, "{name}, step {}: {a} and {b}", t + 1);
                }
            }
        }
    }
}
