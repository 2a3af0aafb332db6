//! Optimizers: which update operator moves a tensor, and the state it keeps.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::OpError;
use crate::exec::{Purpose, Store};
use crate::graph::{Graph, StateId, ValueId};
use crate::ops::Op;
use crate::ops::update::{AdEMAMix, Adam, Sgd};
use crate::tensor::{DType, Meta};

/// The rule that moves weights along a gradient, and in ICP the inputs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "kind")]
pub enum Optimizer {
    /// Sutskever et al. 2013, in PyTorch's form.
    Sgd { momentum: f64, nesterov: bool, weight_decay: f64 },
    /// Kingma and Ba 2015; `decoupled`: AdamW (Loshchilov and Hutter 2019).
    Adam { beta1: f64, beta2: f64, eps: f64, weight_decay: f64, decoupled: bool, amsgrad: bool },
    /// Pagliardini et al. 2024.
    Ademamix { beta1: f64, beta2: f64, beta3: f64, alpha: f64, eps: f64, weight_decay: f64 },
}

impl Optimizer {
    pub fn sgd() -> Self {
        Optimizer::Sgd { momentum: 0.0, nesterov: false, weight_decay: 0.0 }
    }

    pub fn adam(weight_decay: f64, decoupled: bool) -> Self {
        Optimizer::Adam { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay, decoupled, amsgrad: false }
    }

    pub fn ademamix(weight_decay: f64) -> Self {
        Optimizer::Ademamix { beta1: 0.9, beta2: 0.999, beta3: 0.9999, alpha: 5.0, eps: 1e-8, weight_decay }
    }

    /// Names of the tensors kept per parameter.
    pub fn states(&self) -> &'static [&'static str] {
        match self {
            Optimizer::Sgd { momentum, .. } if *momentum == 0.0 => &[],
            Optimizer::Sgd { .. } => &["velocity"],
            Optimizer::Adam { amsgrad: false, .. } => &["m", "v"],
            Optimizer::Adam { .. } => &["m", "v", "v_max"],
            Optimizer::Ademamix { .. } => &["m1", "v", "m2"],
        }
    }

    fn op(&self) -> Arc<dyn Op> {
        match *self {
            Optimizer::Sgd { momentum, nesterov, weight_decay } => {
                Arc::new(Sgd { momentum, nesterov, weight_decay })
            }
            Optimizer::Adam { beta1, beta2, eps, weight_decay, decoupled, amsgrad } => {
                Arc::new(Adam { beta1, beta2, eps, weight_decay, decoupled, amsgrad })
            }
            Optimizer::Ademamix { beta1, beta2, beta3, alpha, eps, weight_decay } => {
                Arc::new(AdEMAMix { beta1, beta2, beta3, alpha, eps, weight_decay })
            }
        }
    }

    /// The optimizer's states for a tensor in the store, made at the first call, by name.
    pub fn states_for(&self, store: &mut Store, name: &str, meta: &Meta, purpose: Purpose) -> Vec<StateId> {
        self.states()
            .iter()
            .map(|s| {
                let full = format!("{name}.{s}");
                store.find(&full).unwrap_or_else(|| store.add(full, meta.clone(), purpose))
            })
            .collect()
    }

    /// Appends the update of `param`, a state: returns the value that is its next content.
    pub fn emit(
        &self,
        graph: &mut Graph,
        param: ValueId,
        grad: ValueId,
        step: Step,
        states: &[StateId],
    ) -> std::result::Result<ValueId, OpError> {
        let value = graph.value(param);
        let (name, meta) = (value.name.clone(), value.meta.clone());
        let meta = meta.ok_or_else(|| OpError::Internal(format!("the shape of '{name}' is not known")))?;
        let mut inputs = vec![Some(param), Some(grad), Some(step.hyper), step.scale];
        for (s, what) in states.iter().zip(self.states()) {
            inputs.push(Some(graph.add_state(format!("{name}.{what}"), *s, meta.clone())));
        }
        Ok(graph.emit(&format!("update/{name}"), self.op(), &inputs, 1 + states.len())?[0])
    }
}

/// Operands that all updates of one step share.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// float64 [2]: learning rate, and the step's number from 1.
    pub hyper: ValueId,
    /// float64 scalar multiplied into gradients; not finite: nothing moves.
    pub scale: Option<ValueId>,
}

/// The shape of `Step::hyper`.
pub fn hyper_meta() -> Meta {
    Meta::new(DType::F64, &[2])
}
