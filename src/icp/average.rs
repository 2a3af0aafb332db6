//! A teacher whose weights are an exponential moving average of the student's (Tarvainen and Valpola 2017).

use crate::error::{Error, Result};
use crate::exec::{Program, Purpose, Session};
use crate::graph::{Graph, Source, StateId, ValueId, WeightId};
use crate::icp::features::emit;
use crate::ops::distill::Average;
use crate::ops::half::Widen;
use crate::plan::Request;
use crate::train::optimizer::hyper_meta;
use crate::train::step::{hyper_state, param_values, set_hyper};

const HYPER: &str = "icp.ema.hyper";

/// The averages of the trained parameters, and the program that moves them.
pub(super) struct Averages {
    /// Each value that learns, and its average.
    states: Vec<(ValueId, StateId)>,
    program: Program,
    decay: f64,
    /// The step before which they moved last.
    moved: Option<usize>,
}

impl Averages {
    /// Averages of `params`, or of the parts of them that learn, which begin as these are. `bound`: any graph of the session.
    pub fn new(session: &mut Session, params: &[WeightId], bound: &Graph, decay: f64) -> Result<Self> {
        let mut g = Graph::default();
        let hyper = hyper_state(session, HYPER);
        let hyper = g.add_state(HYPER, hyper, hyper_meta());
        let (mut states, mut effects) = (Vec::new(), Vec::new());
        for v in param_values(session, params) {
            let Source::State(weight) = bound.value(v).source else {
                return Err(Error::value(&bound.value(v).name, "does not learn: it has no average"));
            };
            let store = session.store_mut();
            let (name, meta) = (format!("{}.ema", store.name(weight)), store.meta(weight).clone());
            let state = store.find(&name).unwrap_or_else(|| {
                let state = store.add(&name, meta.clone(), Purpose::Optimizer);
                store.copy(weight, state);
                state
            });
            let a = g.add_state(&name, state, meta.clone());
            let mut x = g.add_state("weight", weight, meta.clone());
            if meta.dtype.working() != meta.dtype {
                let dims = meta.dims.clone();
                x = emit(&mut g, Widen { dims }, &[x])?;
            }
            let salt = states.len() as u64;
            effects.push(emit(&mut g, Average { salt }, &[a, x, hyper])?);
            states.push((v, state));
        }
        let program = session.compile(g, Request { effects, ..Request::default() })?;
        Ok(Averages { states, program, decay, moved: None })
    }

    /// Moves the averages towards the weights, once a step: before step `step` does anything else.
    pub fn follow(&mut self, session: &mut Session, step: usize) -> Result<()> {
        if self.moved.replace(step) == Some(step) {
            return Ok(());
        }
        let hyper = hyper_state(session, HYPER);
        set_hyper(session, hyper, 1.0 - self.decay, step);
        session.run(&self.program, &[], 0)
    }

    /// Has a graph compute with the averages instead of the weights.
    pub fn put_into(&self, graph: &mut Graph) {
        for (v, state) in &self.states {
            graph.value_mut(*v).source = Source::State(*state);
        }
    }

    pub fn program(&self) -> &Program {
        &self.program
    }
}
