//! Weights of which only a part learns: what a session keeps of them, and how its graphs put them together.

use std::sync::Arc;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::error::{Error, Result};
use crate::exec::store::{Purpose, Store};
use crate::graph::{Graph, Node, NodeId, Source, StateId, ValueId, WeightId};
use crate::import::Model;
use crate::ops::part::{Inset, LowRank};
use crate::ops::{Op, eval};
use crate::tensor::{Dims, Meta, Tensor};

/// What of a weight learns, where that is not the whole of it.
#[derive(Debug, Clone, PartialEq)]
pub enum Part {
    /// A low-rank addition: `W + (alpha/rank)·L·R`, W being a matrix (or one with trailing dimensions of 1). The factor
    /// that the layer's input meets first, A in Hu et al. 2021, begins at random, the other at zero; `input_first`: W's
    /// first axis is the one of the input.
    LowRank { rank: usize, alpha: f64, input_first: bool },
    /// Some neighbouring entries along one axis.
    Slice(Inset),
}

/// A weight in parts: the operator that makes the whole of the frozen values and the states.
pub(super) struct Held {
    pub weight: WeightId,
    pub part: Part,
    pub seed: u64,
    op: Arc<dyn Op>,
    states: Vec<StateId>,
}

/// Uniform in ±1/√`fan_in` (He et al. 2015 with a slope of √5, as PyTorch begins a dense layer); seed and weight decide.
fn kaiming(dims: &[usize], fan_in: usize, seed: u64, weight: WeightId) -> Vec<f32> {
    let mut key = [0u8; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(b"low rank");
    key[16..20].copy_from_slice(&weight.0.to_le_bytes());
    let mut rng = ChaCha8Rng::from_seed(key);
    let bound = 1.0 / (fan_in.max(1) as f32).sqrt();
    let value = |_| {
        // 24 bits: every float32 in 0..1 of equal spacing.
        let unit = (rng.next_u32() >> 8) as f32 / (1u32 << 24) as f32;
        (2.0 * unit - 1.0) * bound
    };
    (0..dims.iter().product()).map(value).collect()
}

impl Held {
    /// Makes the states of a part; the weight as a whole is then what the file has.
    pub fn new(model: &Model, store: &mut Store, id: WeightId, part: &Part, seed: u64) -> Result<Held> {
        let weight = model.weight(id);
        let fail = |what: String| Error::value(&weight.name, what);
        let mut add = |what: &str, t: &Tensor| {
            let state = store.add(format!("{}.{what}", weight.name), t.meta(), Purpose::Parameter);
            store.set(state, t.bytes());
            state
        };
        match part {
            Part::LowRank { rank, alpha, input_first } => {
                let &[rows, columns, ref rest @ ..] = weight.dims.as_slice() else {
                    return Err(fail("is no matrix: it has no low-rank addition".into()));
                };
                if rest.iter().any(|d| *d != 1) || *rank == 0 || weight.is_empty() {
                    return Err(fail(format!("of {:?} has no addition of rank {rank}", weight.dims)));
                }
                let of = |a: usize, b: usize| [a, b].iter().chain(rest).copied().collect::<Dims>();
                let (left, right) = (of(rows, *rank), of(*rank, columns));
                let (a, fan_in) = if *input_first { (&left, rows) } else { (&right, columns) };
                let a = Tensor::from_slice(a, &kaiming(a, fan_in, seed, id))
                    .map_err(|e| fail(e.to_string()))?
                    .cast(weight.working());
                let b = Tensor::zeros(weight.working(), if *input_first { &right } else { &left });
                let states = match input_first {
                    true => vec![add("lora_a", &a), add("lora_b", &b)],
                    false => {
                        let [a, b] = [add("lora_a", &a), add("lora_b", &b)];
                        vec![b, a]
                    }
                };
                let scale = (alpha / *rank as f64) as f32;
                let op = Arc::new(LowRank { rows, columns, rank: *rank, scale });
                Ok(Held { weight: id, part: part.clone(), seed, op, states })
            }
            Part::Slice(inset) => {
                let d = weight.dims.get(inset.axis).copied().unwrap_or(0);
                if inset.count == 0 || inset.from.checked_add(inset.count).is_none_or(|end| end > d) {
                    return Err(fail(format!("of {:?} has no {inset:?}", weight.dims)));
                }
                let whole = model.load_weight(id)?;
                let slice = eval(&crate::ops::slice::Crop { cut: inset.cut(&weight.dims) }, &[Some(&whole)]);
                let slice = slice.map_err(|e| fail(e.to_string()))?;
                let states = slice.iter().map(|t| add("slice", t)).collect();
                Ok(Held { weight: id, part: part.clone(), seed, op: Arc::new(inset.clone()), states })
            }
        }
    }

    /// Number of elements that learn.
    pub fn len(&self, store: &Store) -> usize {
        self.states.iter().map(|s| store.meta(*s).len()).sum()
    }

    /// The weight as a whole.
    pub fn whole(&self, model: &Model, store: &Store) -> Result<Tensor> {
        let frozen = model.load_weight(self.weight)?;
        let states: Vec<Tensor> = self.states.iter().map(|s| store.tensor(*s)).collect();
        let inputs: Vec<Option<&Tensor>> = std::iter::once(&frozen).chain(&states).map(Some).collect();
        let mut made = eval(self.op.as_ref(), &inputs)
            .map_err(|source| Error::Op { node: model.weight(self.weight).name.clone(), source })?;
        Ok(made.swap_remove(0))
    }
}

/// The values that learn of weight `id`, in every graph of the session: those of the parts follow the model's own.
pub(super) fn values(model: &Model, parts: &[Held], id: WeightId) -> Vec<ValueId> {
    let mut next = model.graph.values.len() as u32;
    for p in parts {
        let states = next + 1..next + 1 + p.states.len() as u32;
        if p.weight == id {
            return states.map(ValueId).collect();
        }
        next = states.end;
    }
    vec![model.weight(id).value]
}

/// Makes each weight in parts the output of a node that stands before the first that reads it. `graph` is the model's,
/// with weights bound.
pub(super) fn put_together(graph: &mut Graph, model: &Model, parts: &[Held], store: &Store) {
    if parts.is_empty() {
        return;
    }
    let mut before: Vec<Vec<Node>> = vec![Vec::new(); graph.nodes.len() + 1];
    for p in parts {
        let weight = model.weight(p.weight);
        let frozen = graph.add_value(format!("{}#frozen", weight.name), Source::Weight(p.weight));
        let meta = Meta::new(weight.working(), &weight.dims);
        graph.value_mut(frozen).meta = Some(meta.clone());
        let mut inputs = vec![Some(frozen)];
        for s in &p.states {
            inputs.push(Some(graph.add_state(store.name(*s), *s, store.meta(*s).clone())));
        }
        let reads = |n: &Node| n.inputs.contains(&Some(weight.value));
        let at = graph.nodes.iter().position(reads).unwrap_or(graph.nodes.len());
        graph.value_mut(weight.value).meta = Some(meta);
        graph.value_mut(weight.value).source = Source::Node(NodeId(0), 0);
        let outputs = vec![Some(weight.value)];
        before[at].push(Node { name: String::new(), op: p.op.clone(), inputs, outputs });
    }
    let mut nodes = std::mem::take(&mut graph.nodes).into_iter();
    for made in before {
        graph.nodes.extend(made);
        graph.nodes.extend(nodes.next());
    }
    graph.renumber();
}
