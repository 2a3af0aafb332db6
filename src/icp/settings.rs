//! The method's options, and what follows from them by arithmetic alone.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use crate::icp::place::Place;
use crate::icp::taps::Taps;
use crate::ops::distill::Ball;
use crate::train::method::At;
use crate::train::optimizer::Optimizer;

/// The weight α of the task loss; the feature loss has 1 − α.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Alpha {
    /// `cos(π·(e−W) / (2·(E−W)))` at epoch e of E after W warm-up epochs.
    Schedule,
    /// The same over steps instead of epochs.
    PerStep,
    Fixed(f64),
}

/// How layers weigh in the feature loss, from the first tap to the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Weights {
    Uniform,
    /// `cos(i/(L−1)·π/4)`: 1 at the first tap, √½ at the last.
    Cosine,
    /// The same in inverse order.
    InverseCosine,
}

impl Weights {
    /// The weights of `n` taps.
    pub fn of(self, n: usize) -> Vec<f64> {
        let cosine = |i: usize| if n < 2 { 1.0 } else { (i as f64 / (n - 1) as f64 * PI / 4.0).cos() };
        match self {
            Weights::Uniform => vec![1.0; n],
            Weights::Cosine => (0..n).map(cosine).collect(),
            Weights::InverseCosine => (0..n).rev().map(cosine).collect(),
        }
    }
}

/// Where the teacher's input comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// Down the task loss: ICP.
    Constructive,
    /// Up the task loss, as an attack would.
    Adversarial,
    /// Random, each sample by as much (L2) as the constructive perturbation moves it: the control.
    Noise,
    /// The teacher sees what the student sees.
    None,
}

/// What ε counts in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unit {
    /// The input's own units, as in the paper.
    Input,
    /// Each sample's gradient is first divided by its root mean square.
    Gradient,
    /// The standard deviation of the batch's clean elements.
    Std,
}

/// Which samples a perturbation step moves; the others stay as they are.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Which {
    All,
    /// Those that are misclassified when the step is taken.
    Wrong,
    /// Those whose largest probability is below this then.
    Uncertain(f64),
}

/// What a batch's perturbation begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reuse {
    /// Nothing: K gradients a batch, from the clean input on.
    Fresh,
    /// The sample's perturbation of the epoch before, from which the K steps go on.
    Warm,
    /// The gradient that the student's own backward pass gave when the sample was seen last: the K steps follow it and
    /// no gradient is computed for the perturbation. What a sample has not been seen yet is not perturbed.
    Free,
}

/// How the teacher's features are compared with the student's; all are means over the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Features {
    /// Mean squared error over all elements: the paper's.
    Mse,
    /// The same with each channel in units of the teacher's standard deviation in it.
    Channel,
    /// 1 − the cosine between the two, a sample's features taken as one vector.
    Cosine,
    /// Not at all: the task loss under the α schedule, and nothing is perturbed.
    None,
}

/// The method's options.
#[derive(Debug, Clone)]
pub struct Settings {
    pub perturber: Optimizer,
    /// The perturber is given the gradient's sign (FGSM's step, with plain SGD).
    pub sign: bool,
    pub direction: Direction,
    /// K: perturbation steps.
    pub steps: usize,
    /// ε: step size of the perturber, in `unit`s.
    pub epsilon: f64,
    pub unit: Unit,
    pub ball: Option<Ball>,
    /// Least and largest value that data can have.
    pub range: Option<(f64, f64)>,
    pub which: Which,
    pub reuse: Reuse,
    /// What is perturbed.
    pub place: Place,
    /// Share of the epochs that train plainly first.
    pub warmup: f64,
    pub alpha: Alpha,
    /// α is `floor + (1 − floor)·schedule`.
    pub floor: f64,
    pub features: Features,
    pub weights: Weights,
    pub taps: Taps,
    /// The teacher's weights are an exponential moving average with this decay; `None`: the network's own.
    pub ema: Option<f64>,
    /// Some samples have no label (−100): their perturbation follows the network's own prediction.
    pub unlabelled: bool,
}

impl Default for Settings {
    /// What did best of the forms in `docs/icp.md`: the paper's with K = 1, ε = 0.01 and a teacher of averaged weights.
    fn default() -> Self {
        Settings {
            perturber: Optimizer::adam(0.0, false),
            sign: false,
            direction: Direction::Constructive,
            steps: 1,
            epsilon: 0.01,
            unit: Unit::Input,
            ball: None,
            range: None,
            which: Which::All,
            reuse: Reuse::Fresh,
            place: Place::Auto,
            warmup: 0.0,
            alpha: Alpha::Schedule,
            floor: 0.0,
            features: Features::Mse,
            weights: Weights::Cosine,
            taps: Taps::Auto,
            ema: Some(0.95),
            unlabelled: false,
        }
    }
}

impl Settings {
    /// The paper's form: Adam, K = 5, ε = 0.002, no warm-up, α by epochs, MSE, cosine weights, the network's stages.
    pub fn paper() -> Self {
        Settings { steps: 5, epsilon: 0.002, ema: None, ..Settings::default() }
    }

    /// Warm-up epochs W of `epochs`.
    pub fn warmup_epochs(&self, epochs: usize) -> usize {
        (self.warmup * epochs as f64).floor() as usize
    }

    /// α at a point of the run; `None` while warming up.
    pub fn alpha_at(&self, at: &At) -> Option<f64> {
        let warm = self.warmup_epochs(at.epochs);
        if at.epoch < warm {
            return None;
        }
        let curve =
            |done: f64, of: f64| self.floor + (1.0 - self.floor) * (PI * done / (2.0 * of.max(1.0))).cos();
        Some(match self.alpha {
            Alpha::Fixed(a) => a,
            Alpha::Schedule => curve((at.epoch - warm) as f64, (at.epochs - warm) as f64),
            Alpha::PerStep => {
                let first = at.steps * warm / at.epochs.max(1);
                curve((at.step - first) as f64, (at.steps - first) as f64)
            }
        })
    }

    /// Is there a teacher, whose features the student's are compared with?
    pub fn teaches(&self) -> bool {
        self.features != Features::None
    }

    /// Do perturbations follow the loss (rather than not being there)?
    pub fn perturbs(&self) -> bool {
        self.teaches() && self.direction != Direction::None
    }

    /// Step size and its sign: negative climbs.
    pub(super) fn rate(&self) -> f64 {
        match self.direction {
            Direction::Adversarial => -self.epsilon,
            _ => self.epsilon,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(epoch: usize, epochs: usize) -> At {
        At { epoch, epochs, step: epoch * 10, steps: epochs * 10, seed: 0 }
    }

    #[test]
    fn alpha_falls_from_one_after_the_warm_up() {
        let s = Settings { warmup: 0.25, ..Settings::default() };
        assert_eq!(s.alpha_at(&at(0, 8)), None);
        assert_eq!(s.alpha_at(&at(1, 8)), None);
        assert_eq!(s.alpha_at(&at(2, 8)), Some(1.0));
        let half = s.alpha_at(&at(5, 8)).unwrap();
        assert!((half - (PI / 4.0).cos()).abs() < 1e-12);
        let kept = Settings { floor: 0.5, ..s.clone() }.alpha_at(&at(5, 8)).unwrap();
        assert!((kept - 0.5 * (1.0 + (PI / 4.0).cos())).abs() < 1e-12);
        let fixed = Settings { alpha: Alpha::Fixed(0.3), ..Settings::default() };
        assert_eq!(fixed.alpha_at(&at(0, 8)), Some(0.3));
    }

    #[test]
    fn cosine_weights_fall_to_root_half() {
        let w = Weights::Cosine.of(4);
        assert_eq!(w[0], 1.0);
        assert!((w[3] - 0.5f64.sqrt()).abs() < 1e-12);
        assert_eq!(Weights::Cosine.of(1), [1.0]);
        assert_eq!(Weights::InverseCosine.of(2)[1], 1.0);
    }
}
