//! Self-distillation by iterative constructive perturbation: the network moves its own inputs down the loss
//! and learns from the features that those inputs give.
//!
//! Dave et al., *Self Distillation via Iterative Constructive Perturbations*, arXiv 2505.14751 (2025).
//! One step is three plans over one graph: `perturb` (the gradient of the input only, evaluation mode, run K
//! times), `teacher` (forward up to the taps), `student` (loss, gradients, updates).

mod distill;
mod taps;

pub use distill::{Alpha, Icp, NO_FLOATS, Perturbed, Settings, Weights};
pub use taps::{Taps, find};
