//! The guard's decision by cross-validation, where samples are too few to hold a slice of them out.

use std::sync::Arc;

use crate::error::Result;
use crate::exec::{Options, Session};
use crate::import::Model;
use crate::train::data::{Dataset, folds};
use crate::train::fit::{CheckpointOptions, Evaluated, Progress, Run, evaluate, fit};
use crate::train::loss::Loss;
use crate::train::step::Recipe;

use super::{Config, EVAL_BATCH, method};

/// What every fold's run has in common with the final one.
pub(super) struct Job<'a> {
    pub model: &'a Arc<Model>,
    pub options: &'a Options,
    pub data: &'a Dataset,
    pub recipe: &'a Recipe,
    pub run: &'a Run,
    /// By which results are compared.
    pub loss: &'a Loss,
    pub config: &'a Config,
}

/// Trains once a fold on the other folds, and gathers what the network before and the trained one say of every sample
/// while it is held out.
pub(super) fn cross_validate(
    job: &Job,
    observe: &mut dyn FnMut(&Progress),
) -> Result<(Evaluated, Evaluated)> {
    let (mut before, mut after) = (Evaluated::default(), Evaluated::default());
    let splits = folds(job.data.len(), job.config.folds, job.config.seed, job.data.labels())?;
    for (k, split) in splits.iter().enumerate() {
        let mut session = Session::new(job.model.clone(), job.options.clone())?;
        before.pool(&evaluate(&mut session, job.loss, job.data, &split.held, EVAL_BATCH)?);
        job.recipe.prepare(&mut session)?;
        // Each fold continues from checkpoints of its own.
        let checkpoint = job
            .run
            .checkpoint
            .as_ref()
            .map(|c| CheckpointOptions { folder: c.folder.join(format!("fold-{}", k + 1)), ..c.clone() });
        let run = Run { checkpoint, ..job.run.clone() };
        let mut method = method(job.config)?;
        fit(&mut session, job.recipe, method.as_mut(), job.data, &split.train, &run, observe)?;
        after.pool(&evaluate(&mut session, job.loss, job.data, &split.held, EVAL_BATCH)?);
    }
    Ok((before, after))
}
