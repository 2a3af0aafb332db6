#![deny(unsafe_code)]

pub mod backend_test;
pub mod error;
pub mod exec;
pub mod export;
pub mod graph;
pub mod import;
pub mod kernels;
pub mod ops;
pub mod plan;
pub mod tensor;
pub mod train;
