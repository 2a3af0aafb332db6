//! Entropy minimisation over every sample: TENT (Wang et al., ICLR 2021), and with the diversity term information
//! maximisation (Liang et al., ICML 2020). The recipe's loss says which of them.

use crate::error::Result;
use crate::exec::Session;
use crate::train::data::Batch;
use crate::train::method::{At, Learned, Method, Plain};
use crate::train::step::{Recipe, Shapes};

use super::Adaptation;

/// Every sample weighs the same.
#[derive(Default)]
pub struct Every {
    step: Plain,
}

impl Adaptation for Every {
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
