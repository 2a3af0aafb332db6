//! What was found for a budget: what things are kept in, in which parts, in how much memory.

use serde::Serialize;

use crate::exec::{OptimizerState, Options, Precision, Usage};
use crate::import::Model;
use crate::plan::Again;
use crate::size::human;

/// What a run keeps things in: of a session's [`Options`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Kept {
    pub precision: Precision,
    pub master_free: bool,
    pub optimizer_state: OptimizerState,
}

impl Kept {
    pub(super) fn of(options: &Options) -> Kept {
        let Options { precision, master_free, optimizer_state, .. } = *options;
        Kept { precision, master_free, optimizer_state }
    }

    /// Options that are otherwise these.
    pub(super) fn options(self, of: &Options) -> Options {
        let Kept { precision, master_free, optimizer_state } = self;
        Options { precision, master_free, optimizer_state, ..of.clone() }
    }

    /// This and what takes less, in the order in which it is tried.
    pub(super) fn and_less(self) -> Vec<Kept> {
        let half = match self.precision {
            Precision::F32 => Precision::Bf16,
            half => half,
        };
        let eight = OptimizerState::EightBit;
        let mut all = vec![self];
        for less in [
            Kept { precision: half, ..self },
            Kept { optimizer_state: eight, ..self },
            Kept { precision: half, optimizer_state: eight, ..self },
            Kept { precision: half, optimizer_state: eight, master_free: true },
        ] {
            if !all.contains(&less) {
                all.push(less);
            }
        }
        all
    }

    /// What is other than in `asked`, for people.
    fn instead_of(self, asked: Kept) -> Vec<&'static str> {
        let all = [
            (self.precision != asked.precision, "what gradients need is kept in bf16"),
            (self.optimizer_state != asked.optimizer_state, "the optimizer's moments in 8 bits"),
            (self.master_free != asked.master_free, "trained weights in half precision, rounded at random"),
        ];
        all.into_iter().filter(|a| a.0).map(|a| a.1).collect()
    }
}

/// How a run keeps to its budget.
#[derive(Debug, Clone, Serialize)]
pub struct Fitted {
    pub budget: usize,
    pub kept: Kept,
    /// As it was asked for.
    #[serde(skip)]
    pub(super) asked: Kept,
    /// What the run will hold at most.
    pub bytes: usize,
    /// What it would hold without a budget.
    pub unconstrained: usize,
    /// The arena's bound; absent: the usual plan fits.
    pub arena: Option<usize>,
    /// Samples of one part of a batch, and how many parts one has.
    pub micro: usize,
    pub parts: usize,
    /// Parts are normalised by statistics of their own.
    pub ghost_norm: bool,
    pub again: Again,
    /// The smallest budget that would do.
    pub smallest: usize,
    /// Samples of an evaluation batch.
    pub evaluated: usize,
}

impl Fitted {
    /// Options of a session that keeps to it.
    pub fn options(&self, of: &Options) -> Options {
        Options { arena: self.arena, ..self.kept.options(of) }
    }

    /// About what it takes to run the model in tract, which unpacks the file several times over, beside what is held meanwhile.
    pub fn to_verify(&self, model: &Model, held: &Usage) -> usize {
        let file: usize = model.files.iter().map(|f| f.bytes.len()).sum();
        (24 << 20) + 6 * file + held.weights + held.statistics + held.step + held.frozen
    }

    /// What was chosen, for people.
    pub fn describe(&self) -> Vec<String> {
        let mut notes = vec![match self.arena {
            None => format!(
                "memory budget {}: the usual plan takes {}, nothing had to be done; at least {} would do",
                human(self.budget),
                human(self.bytes),
                human(self.smallest)
            ),
            Some(_) => format!(
                "memory budget {}: takes {} where {} would be usual; {:.0}% more work, by {} kernel calls that compute again \
                 what is not kept; at least {} would do",
                human(self.budget),
                human(self.bytes),
                human(self.unconstrained),
                self.again.work * 100.0,
                self.again.kernels,
                human(self.smallest)
            ),
        }];
        if self.again.chains > 0 {
            notes.push(format!(
                "{} chains of kernel calls run for pieces of the batch, so that the largest values are never whole: the same but \
                 for rounding",
                self.again.chains
            ));
        }
        let instead = self.kept.instead_of(self.asked);
        if !instead.is_empty() {
            notes.push(format!("as --allow-half allows, {}", instead.join(", ")));
        }
        if self.parts > 1 {
            notes.push(format!(
                "batches are learned from in {} parts of {} samples, whose gradients add up{}",
                self.parts,
                self.micro,
                match self.ghost_norm {
                    true =>
                        ": each part is normalised by statistics of its own (ghost batch normalisation), which is not what \
                         the whole batch would be",
                    false => ", the same but for rounding",
                }
            ));
        }
        notes
    }
}
