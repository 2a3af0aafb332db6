//! Optimizers: which update operator moves a tensor, and the state it keeps.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::OpError;
use crate::exec::{OptimizerState, Purpose, Store};
use crate::graph::{Graph, StateId, ValueId};
use crate::kernels::update::packed;
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

    fn op(&self, salt: u64) -> Arc<dyn Op> {
        match *self {
            Optimizer::Sgd { momentum, nesterov, weight_decay } => {
                Arc::new(Sgd { momentum, nesterov, weight_decay, salt })
            }
            Optimizer::Adam { beta1, beta2, eps, weight_decay, decoupled, amsgrad } => {
                Arc::new(Adam { beta1, beta2, eps, weight_decay, decoupled, amsgrad, salt })
            }
            Optimizer::Ademamix { beta1, beta2, beta3, alpha, eps, weight_decay } => {
                Arc::new(AdEMAMix { beta1, beta2, beta3, alpha, eps, weight_decay, salt })
            }
        }
    }

    /// The optimizer's states for a tensor in the store, made at the first call, by name.
    pub fn states_for(&self, store: &mut Store, name: &str, meta: &Meta, purpose: Purpose) -> Vec<StateId> {
        self.states_as(store, name, meta, purpose, OptimizerState::F32)
    }

    /// As [`states_for`](Self::states_for), kept in another type.
    pub fn states_as(
        &self,
        store: &mut Store,
        name: &str,
        meta: &Meta,
        purpose: Purpose,
        kept: OptimizerState,
    ) -> Vec<StateId> {
        self.states()
            .iter()
            .map(|s| {
                let full = format!("{name}.{s}");
                store.find(&full).unwrap_or_else(|| store.add(full, kept_meta(meta, s, kept), purpose))
            })
            .collect()
    }

    /// Appends the update of `param`, a state, by states kept in f32: returns the value that is its next content.
    pub fn emit(
        &self,
        graph: &mut Graph,
        param: ValueId,
        grad: ValueId,
        step: Step,
        states: &[StateId],
    ) -> std::result::Result<ValueId, OpError> {
        self.emit_as(graph, param, (grad, None), step, states, OptimizerState::F32, 0)
    }

    /// As [`emit`](Self::emit), of states as [`states_as`](Self::states_as) makes them, by a gradient that may be of rows
    /// ([`RowSums`](crate::ops::gather::RowSums)). What is rounded at random is so
    /// by numbers that follow from `seed`, the parameter's name, the step and the element.
    #[allow(clippy::too_many_arguments)]
    pub fn emit_as(
        &self,
        graph: &mut Graph,
        param: ValueId,
        (grad, rows): (ValueId, Option<ValueId>),
        step: Step,
        states: &[StateId],
        kept: OptimizerState,
        seed: u64,
    ) -> std::result::Result<ValueId, OpError> {
        let value = graph.value(param);
        let (name, meta) = (value.name.clone(), value.meta.clone());
        let meta = meta.ok_or_else(|| OpError::Internal(format!("the shape of '{name}' is not known")))?;
        let mut inputs = vec![Some(param), Some(grad), Some(step.hyper), step.scale];
        for (s, what) in states.iter().zip(self.states()) {
            let meta = kept_meta(&meta, what, kept);
            inputs.push(Some(graph.add_state(format!("{name}.{what}"), *s, meta)));
        }
        inputs.extend(rows.map(Some));
        let op = self.op(salt(&name, seed));
        Ok(graph.emit(&format!("update/{name}"), op, &inputs, 1 + states.len())?[0])
    }
}

/// Elements below which states are not worth their loss of digits in eight bits.
const SMALL_STATE: usize = 4096;

/// The shape of a parameter's state of this name.
fn kept_meta(param: &Meta, state: &str, kept: OptimizerState) -> Meta {
    let small = param.len() < SMALL_STATE;
    match (kept, param.dtype) {
        // The slow average moves by less a step than eight bits can tell, and would stand still.
        (OptimizerState::EightBit, DType::F32) if state == "m2" && !small => {
            Meta::new(DType::BF16, &param.dims)
        }
        (OptimizerState::EightBit, DType::F32) if !small => Meta::new(DType::U8, &[packed(param.len())]),
        (OptimizerState::Bf16, DType::F32) => Meta::new(DType::BF16, &param.dims),
        _ => Meta::new(param.dtype, &param.dims),
    }
}

/// Tells parameters apart (FNV-1a).
fn salt(name: &str, seed: u64) -> u64 {
    name.bytes().fold(seed ^ 0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
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
