//! Execution of graphs.

pub mod reference;
