//! A node whose operator has no kernel here: it can be listed, not run.

use std::sync::Arc;

use crate::error::OpError;
use crate::graph::GradBuilder;
use crate::import::proto::NodeProto;
use crate::ops::{Cx, Grads, Op};
use crate::tensor::{Meta, View, ViewMut};

/// Stands for a node of the file that cannot be executed, and says why.
#[derive(Debug)]
pub struct Foreign {
    pub domain: String,
    pub op_type: String,
    pub why: String,
}

/// What stands for a node of the file without an operator here: tract, where it has one and none of ours is of that
/// name, else a [`Foreign`] with the reason `why`.
pub fn stand_in(node: &NodeProto, opset: Option<i64>, why: String) -> Arc<dyn Op> {
    #[cfg(feature = "tract")]
    {
        let domain = if node.domain == "ai.onnx" { "" } else { node.domain.as_str() };
        let ours = super::table().any(|r| r.domain == domain && r.op_type == node.op_type);
        if let Some(op) = opset.filter(|_| !ours).and_then(|v| super::tract::Tract::new(node, v)) {
            return Arc::new(op);
        }
    }
    #[cfg(not(feature = "tract"))]
    let _ = opset;
    Arc::new(Foreign { domain: node.domain.clone(), op_type: node.op_type.clone(), why })
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
