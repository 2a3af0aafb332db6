//! Self-distillation by iterative constructive perturbation: the network moves its own inputs down the loss
//! and learns from the features that those inputs give.
//!
//! Dave et al., *Self Distillation via Iterative Constructive Perturbations*, arXiv 2505.14751 (2025).
//! One step is three plans over one graph: `perturb` (the gradient of what is perturbed only, evaluation mode, run K
//! times), `teacher` (forward up to the taps), `student` (loss, gradients, updates).
//!
//! [`Settings::paper`] is the paper's form; the default takes one step and a teacher of averaged weights. Beside them: other
//! directions and none (the controls), other distances of features, bounds, cheaper ways to a perturbation ([`Reuse`],
//! [`Place`]).

mod average;
mod byot;
mod distill;
mod features;
mod kept;
mod perturb;
mod place;
mod settings;
mod taps;
mod trace;

pub use crate::ops::distill::Ball;
pub use byot::{Byot, ByotSettings};
pub use distill::{Icp, Perturbed};
pub use place::{NO_FLOATS, Place};
pub use settings::{Alpha, Direction, Features, Reuse, Settings, Unit, Weights, Which};
pub use taps::{Taps, find};
pub use trace::{Trace, trace};
