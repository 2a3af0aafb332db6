//! The command line and the library on real models and data, against independent implementations.
//!
//! What needs fetched files (`tests/fetch.sh`) is skipped with a printed line when they are not there.

mod adapt;
mod allocations;
mod budget;
mod common;
mod contract;
mod control;
mod files;
mod finetune;
mod gains;
mod gradients;
mod guard;
mod head;
mod icp;
mod icp_variants;
mod layout;
mod memory;
mod onnx_cases;
mod precision;
mod presets;
mod quantised;
mod real_models;
mod real_training;
mod resume;
mod spatial;
mod study;
mod zoo;
