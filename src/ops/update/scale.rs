//! The factor on a step's gradient: clipping, loss scaling, and whether anything moves at all.

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::update::sum_squares;
use crate::ops::update::no_gradient;
use crate::ops::{Cx, Grads, Op, get, need, out};
use crate::tensor::{DType, Float, Meta, View, ViewMut};

/// `Σ grad²` as a float64 scalar.
#[derive(Debug, Clone)]
pub struct SumSquares;

impl Op for SumSquares {
    fn name(&self) -> &'static str {
        "SumSquares"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        need(inputs, 0)?;
        Ok(vec![Meta::new(DType::F64, &[])])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        out(y, 0)?.get::<f64>()?[0] = squares(x)?;
        Ok(())
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        no_gradient()
    }
}

/// Of the first input.
fn squares(x: &[Option<View>]) -> Result<f64, OpError> {
    let grad = need(x, 0)?;
    float_dispatch!(grad.dtype, T => Ok(sum_squares(grad.get::<T>()?)))
}

/// [`SumSquares`] that also says whether this gradient may be followed at once, without waiting for the others. Inputs: the
/// gradient, the sum so far (a float64 scalar) or none, the loss (a scalar). Outputs, float64 scalars: that sum and
/// `Σ grad²`, and the factor on the gradient: 1, or NaN where the loss or the sum is not finite.
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
        if get(inputs, 1).is_some_and(|sum| sum.dtype != DType::F64 || sum.len() != 1) {
            return Err(OpError::Type("the sum of squares so far must be a float64 scalar".into()));
        }
        need(inputs, 0)?;
        Ok(vec![Meta::new(DType::F64, &[]); 2])
    }

    // Not in place: an absent sum could not be told from one in the output's buffer.
    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let before = get(x, 1).map_or(Ok(0.0), |sum| sum.get::<f64>().map(|s| s[0]))?;
        let sum = before + squares(x)?;
        out(y, 0)?.get::<f64>()?[0] = sum;
        let loss = need(x, 2)?;
        let loss = float_dispatch!(loss.dtype, T => Ok(loss.get::<T>()?[0].to64()))?;
        out(y, 1)?.get::<f64>()?[0] = if loss.is_finite() && sum.is_finite() { 1.0 } else { f64::NAN };
        Ok(())
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        no_gradient()
    }
}

/// The factor that clips a gradient to `max_norm` (PyTorch's `clip_grad_norm_`), and the gradient's norm.
/// Inputs: loss (a scalar), sum of squares (float64 scalar), and, where the gradient is that of a scaled loss, the scale
/// (float64 [2], see [`NextLossScale`]). Outputs, float64 scalars: the factor, NaN when the loss or the norm is not
/// finite, and the norm; both without the scale.
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
        if get(inputs, 2).is_some_and(|s| s.dtype != DType::F64 || s.len() != 2) {
            return Err(OpError::Shape("a loss scale is two float64".into()));
        }
        Ok(vec![Meta::new(DType::F64, &[]), Meta::new(DType::F64, &[])])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let loss = need(x, 0)?;
        let loss = float_dispatch!(loss.dtype, T => Ok(loss.get::<T>()?[0].to64()))?;
        let by = get(x, 2).map_or(Ok(1.0), |s| s.get::<f64>().map(|s| s[0]))?;
        let norm = need(x, 1)?.get::<f64>()?[0].sqrt() / by;
        let scale = match self.max_norm {
            _ if !loss.is_finite() || !norm.is_finite() => f64::NAN,
            None => 1.0,
            Some(max) => (max / (norm + 1e-6)).min(1.0),
        } / by;
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

/// A loss (a scalar) times the loss scale (float64 [2], see [`NextLossScale`]), so that its gradient is scaled.
#[derive(Debug, Clone)]
pub struct ScaleLoss;

impl Op for ScaleLoss {
    fn name(&self) -> &'static str {
        "ScaleLoss"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (loss, scale) = (need(inputs, 0)?, need(inputs, 1)?);
        if loss.len() != 1 || scale.dtype != DType::F64 || scale.len() != 2 {
            return Err(OpError::Shape("a loss is one number, its scale two float64".into()));
        }
        Ok(vec![Meta::new(loss.dtype, &loss.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (loss, by) = (need(x, 0)?, need(x, 1)?.get::<f64>()?[0]);
        float_dispatch!(loss.dtype, T => {
            out(y, 0)?.get::<T>()?[0] = T::of(loss.get::<T>()?[0].to64() * by);
            Ok(())
        })
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // dX = scale·dY
        let (dy, scale) = (g.dy0()?, g.x(1)?);
        Ok(Grads::from_slice(&[Some(g.emit(ScaleLoss, &[dy, scale])?), None]))
    }
}

/// The next loss scale: half of it after a step whose factor is not finite, twice as much after [`GOOD_STEPS`] others in a
/// row (Micikevicius et al., *Mixed Precision Training*, 2018, in PyTorch's form). Inputs: the scale (state, float64 [2]:
/// the scale, and the steps since it changed) and [`ClipScale`]'s factor. Output: the scale's next content.
#[derive(Debug, Clone)]
pub struct NextLossScale;

/// Steps after which a loss scale grows.
pub const GOOD_STEPS: f64 = 2000.0;
/// What a loss scale is kept within.
const SCALES: (f64, f64) = (1.0, 16_777_216.0);

impl Op for NextLossScale {
    fn name(&self) -> &'static str {
        "NextLossScale"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (scale, factor) = (need(inputs, 0)?, need(inputs, 1)?);
        if scale.dtype != DType::F64 || factor.dtype != DType::F64 || scale.len() != 2 || factor.len() != 1 {
            return Err(OpError::Shape("a loss scale is two float64, the factor one".into()));
        }
        Ok(vec![Meta::new(DType::F64, &scale.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let finite = need(x, 1)?.get::<f64>()?[0].is_finite();
        let next = out(y, 0)?.get::<f64>()?;
        if let Some(before) = get(x, 0) {
            next.copy_from_slice(before.get()?);
        }
        let [scale, good] = next else {
            return Err(OpError::Internal("a loss scale is two numbers".into()));
        };
        *good += 1.0;
        if !finite {
            (*scale, *good) = (*scale * 0.5, 0.0);
        } else if *good >= GOOD_STEPS {
            (*scale, *good) = (*scale * 2.0, 0.0);
        }
        *scale = scale.clamp(SCALES.0, SCALES.1);
        Ok(())
    }

    fn updates(&self) -> &[(usize, usize)] {
        &[(0, 0)]
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        no_gradient()
    }
}
