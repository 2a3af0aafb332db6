//! For tests of plans: steps of a model from `x` to `y`, all of whose weights learn from mean squares.

use super::*;
use crate::tensor::Tensor;

/// The step, planned for inputs and targets of this shape.
pub(crate) fn planned(session: &mut Session, optimizer: Optimizer, meta: &Meta) -> Supervised {
    let recipe = Recipe {
        loss: Loss::Mse,
        optimizer,
        clip: None,
        params: (0..session.model().weights.len() as u32).map(WeightId).collect(),
        norm: Norm::Batch,
        accumulate: 1,
    };
    recipe.prepare(session).unwrap();
    let shapes = Shapes { inputs: vec![("x".into(), meta.clone())], target: meta.clone() };
    Supervised::new(session, &recipe, &shapes).unwrap()
}

/// Runs steps on one batch.
pub(crate) fn run(session: &mut Session, step: &Supervised, [x, y]: [&Tensor; 2], rate: f64, steps: usize) {
    for t in 0..steps {
        set_step(session, rate, t + 1);
        let fed = [(step.inputs[0], x.view()), (step.attached.target, y.view())];
        session.run(&step.program, &fed, t as u64).unwrap();
    }
}
