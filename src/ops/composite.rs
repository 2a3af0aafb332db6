//! Operators that are defined by others, as the standard's own function bodies are: written once as a recipe of
//! nodes, from which shapes, results and gradients follow.

use std::fmt::Debug;
use std::sync::Arc;

use crate::error::OpError;
use crate::graph::{GradBuilder, Lowering, ValueId, eval_lowered, infer_lowered};
use crate::ops::{Attrs, Cx, Grads, Op, Spec};
use crate::tensor::{Meta, View, ViewMut};

/// What a recipe makes: its outputs, `None` for those that nobody wants.
pub type Made = Result<Vec<Option<ValueId>>, OpError>;

/// An operator as nodes of other operators.
pub trait Recipe: Debug + Send + Sync + 'static {
    fn name(&self) -> &'static str;

    /// How many outputs it can have.
    fn outputs(&self) -> usize {
        1
    }

    /// Emits the nodes; shapes of the operands are known.
    fn lower(&self, l: &mut Lowering) -> Made;
}

/// A recipe as an operator. [`crate::graph::Graph::lower`] replaces it before a graph is planned or differentiated.
#[derive(Debug)]
pub struct Composite<R>(pub R);

/// For constructors of the operator table.
pub(super) fn composite(recipe: impl Recipe) -> Result<Arc<dyn Op>, OpError> {
    Ok(Arc::new(Composite(recipe)))
}

/// A recipe that is one function of the node's attributes.
#[derive(Debug)]
struct Defined {
    name: &'static str,
    outputs: usize,
    attrs: Attrs,
    body: fn(&Attrs, &mut Lowering) -> Made,
}

impl Recipe for Defined {
    fn name(&self) -> &'static str {
        self.name
    }

    fn outputs(&self) -> usize {
        self.outputs
    }

    fn lower(&self, l: &mut Lowering) -> Made {
        (self.body)(&self.attrs, l)
    }
}

/// For constructors of the operator table: an operator of up to `outputs` outputs that `body` emits.
pub(super) fn defined(
    spec: &Spec,
    name: &'static str,
    outputs: usize,
    body: fn(&Attrs, &mut Lowering) -> Made,
) -> Result<Arc<dyn Op>, OpError> {
    composite(Defined { name, outputs, attrs: spec.attrs.clone(), body })
}

/// The one output of a recipe.
pub(super) fn one(v: Result<ValueId, OpError>) -> Made {
    Ok(vec![Some(v?)])
}

impl<R: Recipe> Op for Composite<R> {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        infer_lowered(self, inputs, self.0.outputs())
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        // Only outside plans: constants, and the reference executor.
        let inputs: Vec<_> = x.iter().map(|v| v.map(|v| v.to_tensor())).collect();
        let inputs: Vec<_> = inputs.iter().map(Option::as_ref).collect();
        let made = eval_lowered(self, &inputs, self.0.outputs())?;
        for (y, t) in y.iter_mut().zip(made) {
            if let Some(y) = y {
                y.bytes.copy_from_slice(t.bytes());
            }
        }
        Ok(())
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::Internal("a composite operator is replaced before it is differentiated".into()))
    }

    fn is_composite(&self) -> bool {
        true
    }

    fn lower(&self, l: &mut Lowering) -> Made {
        self.0.lower(l)
    }
}
