//! From what `--train` says to what learns in a session.

mod budget;
mod knapsack;
mod lora;
mod sparse;

use crate::error::{Error, Result};
use crate::exec::Session;
use crate::graph::WeightId;
use crate::train::data::Batch;
use crate::train::loss::Loss;
use crate::train::method::Method;
use crate::train::select::Select;
use crate::train::step::{Recipe, Shapes, reached};

pub use budget::{Amount, Budget};

/// Batches of the training data that contributions to a sparse update are measured on.
pub const MEASURED_BATCHES: usize = 8;

/// What a choice depends on beside the model.
pub struct Ask<'a> {
    /// As `--train` takes it.
    pub select: &'a str,
    /// α of low-rank additions; the rank where none is given.
    pub lora_alpha: Option<f64>,
    /// Of what begins at random.
    pub seed: u64,
    pub loss: &'a Loss,
    pub shapes: &'a Shapes,
    /// How the run learns, its parameters left open.
    pub recipe: Recipe,
    pub method: Box<dyn Fn() -> Result<Box<dyn Method>> + 'a>,
    pub epochs: usize,
    /// Batches of `shapes` for a sparse update to measure contributions on; none: each number is taken to contribute as
    /// much as any other.
    pub batches: Vec<Batch>,
    /// Bytes that measuring must do with, if the run keeps to a budget.
    pub memory: Option<usize>,
}

/// What learns.
#[derive(Debug, Clone, Default)]
pub struct Chosen {
    /// For [`Recipe::params`](crate::train::step::Recipe): weights, those of which only a part learns included.
    pub params: Vec<WeightId>,
    /// For people.
    pub notes: Vec<String>,
}

/// Chooses what learns, of what the loss depends on, and lets parts of weights learn in the session.
///
/// Names given as globs that the loss does not depend on are an error, others a note.
pub fn choose(session: &mut Session, ask: &Ask) -> Result<Chosen> {
    let select: Select = ask.select.parse().map_err(|e| Error::Config(format!("--train {e}")))?;
    let reached = reached(session, ask.loss, ask.shapes)?;
    let others = |session: &mut Session| besides(session, &select, ask, &reached);
    let mut chosen = others(session)?;
    for term in select.terms() {
        if let Select::Sparse(budget) = term {
            sparse::add(session, budget, ask, &reached, &mut chosen, &others)?;
        }
    }
    chosen.params.sort();
    if chosen.params.is_empty() {
        return Err(Error::Config("the loss depends on none of the chosen parameters".into()));
    }
    Ok(chosen)
}

/// What is chosen beside sparse updates.
fn besides(session: &mut Session, select: &Select, ask: &Ask, reached: &[bool]) -> Result<Chosen> {
    let model = session.model().clone();
    let mut chosen = Chosen::default();
    for term in select.terms() {
        let (kept, lost): (Vec<_>, Vec<_>) =
            term.resolve(&model)?.into_iter().partition(|w| reached[w.index()]);
        if !lost.is_empty() {
            let names: Vec<&str> = lost.iter().map(|w| model.weight(*w).name.as_str()).collect();
            let what = format!("the loss does not depend on {}", names.join(", "));
            match term {
                Select::Globs(_) => return Err(Error::Config(format!("--train: {what}"))),
                _ => chosen.notes.push(format!("not trained: {what}")),
            }
        }
        chosen.params.extend(kept);
    }
    chosen.params.sort();
    chosen.params.dedup();
    for term in select.terms() {
        if let Select::Lora { rank, layers } = term {
            lora::add(session, *rank, layers, ask, reached, &mut chosen)?;
        }
    }
    Ok(chosen)
}
