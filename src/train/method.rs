//! How a batch becomes an update: plain supervised training, or another method such as ICP.

use crate::error::Result;
use crate::exec::{Program, Session};
use crate::tensor::Tensor;
use crate::train::data::Batch;
use crate::train::step::{Recipe, Shapes, Supervised};

/// Where in the run a batch is learned from.
#[derive(Debug, Clone, Copy)]
pub struct At {
    pub epoch: usize,
    pub epochs: usize,
    pub step: usize,
    pub steps: usize,
    /// Of this batch's random numbers.
    pub seed: u64,
}

/// What came of one batch.
#[derive(Debug, Clone)]
pub struct Learned {
    /// What was minimised.
    pub loss: f64,
    pub task: f64,
    /// The feature loss, in ICP after its warm-up.
    pub features: Option<f64>,
    pub logits: Tensor,
    /// Factor on the gradient, not finite when the step was skipped; absent while accumulating.
    pub scale: Option<f64>,
    /// The gradient's norm before clipping; absent while accumulating.
    pub norm: Option<f64>,
}

/// A method's programs by what they do.
pub type Programs<'a> = Vec<(&'static str, &'a Program)>;

/// A way to learn from batches. Programs are compiled per batch shape and kept.
pub trait Method {
    /// Says how many samples the training data have, before anything is prepared.
    fn begin(&mut self, _samples: usize) {}

    /// Compiles everything that a run of `epochs` will need for batches of these shapes.
    fn prepare(
        &mut self,
        session: &mut Session,
        recipe: &Recipe,
        shapes: &Shapes,
        epochs: usize,
    ) -> Result<()>;

    /// Learns from one batch: updates the weights, or adds to the sums when accumulating.
    fn learn(&mut self, session: &mut Session, recipe: &Recipe, batch: &Batch, at: &At) -> Result<Learned>;

    fn programs(&self) -> Programs<'_>;

    /// Can the gradients of parts of a batch be summed?
    fn accumulates(&self) -> bool {
        true
    }

    /// Names of the values that the method looks at within the network.
    fn tap_names(&self, _session: &Session, _shapes: &Shapes) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
}

/// Training on the task loss alone.
#[derive(Default)]
pub struct Plain {
    plans: Vec<(Shapes, Supervised)>,
}

impl Method for Plain {
    fn prepare(&mut self, session: &mut Session, recipe: &Recipe, shapes: &Shapes, _: usize) -> Result<()> {
        Supervised::cached(&mut self.plans, session, recipe, shapes).map(|_| ())
    }

    fn learn(&mut self, session: &mut Session, recipe: &Recipe, batch: &Batch, at: &At) -> Result<Learned> {
        let shapes = Shapes::of(batch)?;
        let i = Supervised::cached(&mut self.plans, session, recipe, &shapes)?;
        self.plans[i].1.learn(session, batch, at)
    }

    fn programs(&self) -> Programs<'_> {
        self.plans.iter().map(|p| ("step", &p.1.program)).collect()
    }
}
