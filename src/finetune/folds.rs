//! The guard's decision by cross-validation, where samples are too few to hold a slice of them out.

use crate::error::Result;
use crate::exec::Session;
use crate::train::data::{Dataset, folds};
use crate::train::fit::{CheckpointOptions, Evaluated, Progress, Run, fit};
use crate::train::loss::Loss;
use crate::train::step::Recipe;

use super::{Config, measured};

/// What every fold's run has in common with the final one.
pub(super) struct Job<'a> {
    /// What each fold's session is like.
    pub session: &'a Session,
    pub data: &'a Dataset,
    pub recipe: &'a Recipe,
    pub run: &'a Run,
    /// By which results are compared.
    pub loss: &'a Loss,
    pub config: &'a Config,
    /// Samples per evaluation batch.
    pub evaluated: usize,
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
        let mut session = job.session.another()?;
        before.pool(&measured(&mut session, job.loss, job.data, &split.held, job.evaluated)?);
        job.recipe.prepare(&mut session)?;
        // Each fold continues from checkpoints of its own.
        let checkpoint = job
            .run
            .checkpoint
            .as_ref()
            .map(|c| CheckpointOptions { folder: c.folder.join(format!("fold-{}", k + 1)), ..c.clone() });
        let run = Run { checkpoint, ..job.run.clone() };
        let mut method = job.config.training_method(false)?;
        fit(&mut session, job.recipe, method.as_mut(), job.data, &split.train, &run, observe)?;
        after.pool(&measured(&mut session, job.loss, job.data, &split.held, job.evaluated)?);
    }
    Ok((before, after))
}
