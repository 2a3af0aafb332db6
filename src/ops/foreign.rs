//! A node whose operator has no kernel here: it can be listed, not run.

use crate::error::OpError;
use crate::graph::GradBuilder;
use crate::ops::{Cx, Grads, Op};
use crate::tensor::{Meta, View, ViewMut};

/// Stands for a node of the file that cannot be executed, and says why.
#[derive(Debug)]
pub struct Foreign {
    pub domain: String,
    pub op_type: String,
    pub why: String,
}

impl Op for Foreign {
    fn name(&self) -> &'static str {
        "Foreign"
    }

    fn foreign_type(&self) -> Option<String> {
        Some(match self.domain.as_str() {
            "" | "ai.onnx" => self.op_type.clone(),
            domain => format!("{domain}.{}", self.op_type),
        })
    }

    fn infer(&self, _: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        Err(OpError::Unsupported(self.why.clone()))
    }

    fn forward(&self, _: &mut Cx, _: &[Option<View>], _: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        Err(OpError::Unsupported(self.why.clone()))
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable(self.why.clone()))
    }
}
