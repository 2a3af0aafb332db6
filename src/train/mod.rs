//! Training: data, losses, optimizers, schedules, the loop and the guard.

pub mod data;
