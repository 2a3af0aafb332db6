//! Optimizer updates as operators whose outputs are the next values of persistent state.
//!
//! Inputs: parameter, gradient, `hyper` (float64 [2]: learning rate, 1-based step), `scale` (optional float64
//! scalar multiplied into the gradient; not finite: nothing changes), then the states. Outputs: the next
//! parameter, then the next states. The gradient of a table may be the sums of [`RowSums`](crate::ops::gather::RowSums), whose
//! second output is then the last input. A parameter of f32 may be stored in half precision, a state too, or in eight-bit codes
//! (uint8, see `kernels::update::packed`): they are widened, updated, and rounded. The perturbers of ICP are these same operators applied to the network's input.

mod scale;

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::half::Half;
use crate::kernels::update::{Cells, Gradient, Map, packed, sweep};
use crate::ops::half::half_bits_mut;
use crate::ops::{Cx, Grads, Op, get, need};
use crate::tensor::{DType, Float, Meta, View, ViewMut};

pub use scale::{Checked, ClipScale, GOOD_STEPS, NextLossScale, ScaleLoss, SumSquares};

/// Index of the first state among the inputs.
pub const FIRST_STATE: usize = 4;

const UPDATES: [(usize, usize); 4] = [(0, 0), (FIRST_STATE, 1), (FIRST_STATE + 1, 2), (FIRST_STATE + 2, 3)];

/// Stochastic gradient descent (PyTorch's `SGD`). State: the velocity, if `momentum` is not 0.
#[derive(Debug, Clone, PartialEq)]
pub struct Sgd {
    pub momentum: f64,
    pub nesterov: bool,
    pub weight_decay: f64,
    /// Tells random numbers of different parameters apart, where results are rounded at random.
    pub salt: u64,
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
    /// Tells random numbers of different parameters apart, where results are rounded at random.
    pub salt: u64,
}

impl Default for Adam {
    fn default() -> Self {
        Adam {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            decoupled: false,
            amsgrad: false,
            salt: 0,
        }
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
    /// Tells random numbers of different parameters apart, where results are rounded at random.
    pub salt: u64,
}

impl Default for AdEMAMix {
    fn default() -> Self {
        AdEMAMix {
            beta1: 0.9,
            beta2: 0.999,
            beta3: 0.9999,
            alpha: 5.0,
            eps: 1e-8,
            weight_decay: 0.0,
            salt: 0,
        }
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

/// The gradient of a parameter with so many states, whose next value `y` has the shape of (where it is updated in place, the
/// parameter is no input).
fn gradient<'a, T: Float>(
    x: &[Option<View<'a>>],
    y: &[Option<ViewMut>],
    states: usize,
) -> Result<Gradient<'a, T>, OpError> {
    let sums = need(x, 1)?.get()?;
    let (Some(at), Some(Some(y))) = (get(x, FIRST_STATE + states), y.first()) else {
        return Ok(Gradient::Whole(sums));
    };
    Ok(Gradient::Rows { sums, at: at.get()?, len: y.dims[1..].iter().product() })
}

/// Of random rounding in a step: follows from the parameter and the step's number.
pub(super) fn seed(salt: u64, t: f64) -> u64 {
    (salt ^ t as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Parameter and states in their output buffers, holding the old values. `signs`: which states have one, that takes a
/// bit of eight.
#[allow(clippy::type_complexity)]
fn buffers<'a, T: Float, const N: usize>(
    x: &[Option<View>],
    y: &'a mut [Option<ViewMut>],
    signs: [bool; N],
    seed: u64,
) -> Result<(Cells<'a, T>, [Cells<'a, T>; N]), OpError> {
    let nothing = || Cells::Wide(&mut [][..]);
    let mut slots: [Cells<T>; N] = std::array::from_fn(|_| nothing());
    let mut param = nothing();
    if y.len() <= N {
        return Err(OpError::Internal(format!("{} outputs for {N} states", y.len())));
    }
    for (i, (y, (input, _))) in y.iter_mut().zip(UPDATES).take(N + 1).enumerate() {
        let y = y.as_mut().ok_or_else(|| OpError::Internal(format!("output {i} has no buffer")))?;
        if let Some(old) = get(x, input) {
            y.bytes.copy_from_slice(old.bytes);
        }
        let cells = match (Half::of(y.dtype), i) {
            (Some(half), _) => {
                let own = (i as u64).wrapping_mul(0xd1b5_4a32_d192_ed03);
                Cells::Half(half, half_bits_mut(y)?, seed ^ own)
            }
            (None, 1..) if y.dtype == DType::U8 => Cells::Codes(Map::of(signs[i - 1]), &mut *y.bytes),
            _ => Cells::Wide(y.get::<T>()?),
        };
        match i {
            0 => param = cells,
            _ => slots[i - 1] = cells,
        }
    }
    Ok((param, slots))
}

fn infer(inputs: &[Option<&Meta>], states: usize) -> Result<Vec<Meta>, OpError> {
    let param = need(inputs, 0)?;
    let wide = Meta::new(param.dtype.working(), &param.dims);
    let mut made = vec![Meta::new(param.dtype, &param.dims)];
    // Whether sums are those of rows of the parameter.
    let rows = get(inputs, FIRST_STATE + states).is_some_and(|at| {
        let of_rows = at.dtype == DType::I32 && param.dims.first() == Some(&at.len());
        of_rows && inputs[1].is_some_and(|g| g.dtype == wide.dtype && g.dims.ends_with(&param.dims[1..]))
    });
    for i in [1].into_iter().chain(FIRST_STATE..FIRST_STATE + states) {
        let m = need(inputs, i)?;
        let rounded = Half::of(m.dtype).is_some() && m.dims == param.dims;
        let codes = m.dtype == DType::U8 && m.dims.as_slice() == [packed(param.len())];
        let narrow = i > 1 && wide.dtype == DType::F32 && (rounded || codes);
        if !(m.same_shape(&wide) || narrow || i == 1 && rows) {
            return Err(OpError::Shape(format!(
                "input {i} is {} {:?}, the parameter {} {:?}",
                m.dtype,
                m.dims.as_slice(),
                param.dtype,
                param.dims.as_slice()
            )));
        }
        if i > 1 {
            made.push(Meta::new(m.dtype, &m.dims));
        }
    }
    let hyper = need(inputs, 2)?;
    if hyper.dtype != DType::F64 || hyper.len() != 2 {
        return Err(OpError::Shape("the hyperparameters must be two float64".into()));
    }
    Ok(made)
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
        let grad = gradient::<T>(x, y, self.states())?;
        let step = hyper(x)?;
        let seed = seed(self.salt, step.map_or(0.0, |s| s.1));
        // Skipping comes after `buffers`, which carries old values over to separate outputs.
        if self.momentum == 0.0 {
            let (param, []) = buffers::<T, 0>(x, y, [], seed)?;
            let Some((lr, _, scale)) = step else { return Ok(()) };
            let (lr, scale, decay) = (T::of(lr), T::of(scale), T::of(self.weight_decay));
            sweep(param, [], grad, &|p, [], g| (p - lr * (g * scale + decay * p), []));
            return Ok(());
        }
        let (param, velocity) = buffers::<T, 1>(x, y, [true], seed)?;
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
        let grad = gradient::<T>(x, y, self.states())?;
        let step = hyper(x)?;
        let (lr, t, scale) = step.unwrap_or((0.0, 1.0, 1.0));
        let seed = seed(self.salt, t);
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
            let (param, states) = buffers::<T, 3>(x, y, [true, false, false], seed)?;
            if step.is_none() {
                return Ok(());
            }
            sweep(param, states, grad, &|p, [m, v, top], g| {
                let (m, v) = moments(p, m, v, g);
                let top = if v > top { v } else { top };
                (p * shrink - rate * (m / (top.sqrt() / root + eps)), [m, v, top])
            });
        } else {
            let (param, states) = buffers::<T, 2>(x, y, [true, false], seed)?;
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
        let grad = gradient::<T>(x, y, self.states())?;
        let step = hyper(x)?;
        let seed = seed(self.salt, step.map_or(0.0, |s| s.1));
        let (param, states) = buffers::<T, 3>(x, y, [true, false, true], seed)?;
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
            let (grad, weight) = (gradient::<T>(x, y, 0)?, T::of(*weight));
            let (acc, []) = buffers::<T, 0>(x, y, [], 0)?;
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
mod tests;
