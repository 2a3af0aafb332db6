//! Training: data, losses, optimizers, schedules, the loop and the guard.

pub mod checkpoint;
pub mod data;
pub mod entropy;
pub mod fit;
pub mod gradients;
pub mod guard;
pub mod loss;
pub mod loss_scale;
pub mod method;
pub mod metrics;
pub mod optimizer;
pub mod preset;
pub mod schedule;
pub mod select;
pub mod step;
