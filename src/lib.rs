//! retune: finetunes deployed ONNX networks on the CPU of the machine they run on.
//!
//! The way of a model: [`import`] (file → [`graph`]) → shapes and gradients → [`plan`] (order, one arena) →
//! [`exec`] (kernel calls) → [`train`], [`icp`] (steps, the loop, the guard) → [`export`] (bytes back into the
//! file). [`finetune`] is the whole of it in one call.

#![deny(unsafe_code)]

pub mod adapt;
mod atomic;
pub mod backend_test;
#[cfg(feature = "cli")]
pub mod cli;
pub mod delta;
pub mod error;
pub mod exec;
pub mod export;
pub mod finetune;
pub mod graph;
pub mod icp;
pub mod import;
pub mod inspect;
pub mod kernels;
pub mod ops;
pub mod plan;
mod size;
#[cfg(feature = "cli")]
pub mod study;
pub mod tensor;
pub mod train;

pub use error::{Error, Result};
