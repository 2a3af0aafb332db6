//! Learning from every sample alike. What is learned the recipe's loss and the method say: TENT minimises the entropy
//! (Wang et al., ICLR 2021), with the diversity term it is information maximisation (Liang et al., ICML 2020), and ICP
//! moves the inputs to where the network is surer and learns the features they have there.

use crate::error::Result;
use crate::exec::Session;
use crate::train::data::Batch;
use crate::train::method::{At, Learned, Method};
use crate::train::step::{Recipe, Shapes};

use super::Adaptation;

/// Every sample weighs the same.
#[derive(Default)]
pub struct Every<M> {
    step: M,
}

impl<M: Method> Every<M> {
    pub fn new(step: M) -> Self {
        Every { step }
    }
}

impl<M: Method> Adaptation for Every<M> {
    fn prepare(&mut self, session: &mut Session, recipe: &Recipe, shapes: &Shapes) -> Result<()> {
        self.step.prepare(session, recipe, shapes, 1)
    }

    fn learn(
        &mut self,
        session: &mut Session,
        recipe: &Recipe,
        batch: &mut Batch,
        at: &At,
    ) -> Result<Option<Learned>> {
        self.step.learn(session, recipe, batch, at).map(Some)
    }
}
