//! Low-rank additions (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685).

use crate::error::{Error, Result};
use crate::exec::{Part, Session};
use crate::graph::{NodeId, ValueId, WeightId, op_type};
use crate::import::{Model, Role, Use};
use crate::ops::conv::Conv;
use crate::ops::matmul::Gemm;
use crate::train::preset::{Ask, Chosen};

/// How many operators between a constant and its layer are looked through.
const DEPTH: usize = 16;

/// A weight that can have a low-rank addition.
pub(super) struct Layer {
    pub weight: WeightId,
    /// Its first axis is the one that the layer's input is summed over.
    pub input_first: bool,
    /// Weight, node and output, by which people may name it.
    names: [String; 3],
}

/// The dense layers and 1×1 convolutions (of one group) with a trainable weight, in the file's order.
pub(super) fn layers(model: &Model) -> Vec<Layer> {
    (0..model.weights.len() as u32).filter_map(|i| layer(model, WeightId(i))).collect()
}

fn layer(model: &Model, id: WeightId) -> Option<Layer> {
    let w = model.weight(id);
    let matrix = w.dims.len() >= 2 && w.dims[2..].iter().all(|d| *d == 1);
    if !w.trainable || w.role != Role::Weight || !matrix || w.is_empty() {
        return None;
    }
    let (used, input_first) = w.uses.iter().find_map(|u| Some((u, input_first(model, w.value, u)?)))?;
    let node = model.graph.node(used.node);
    let output = node.outputs.iter().flatten().next().map(|v| model.graph.value(*v).name.clone());
    let names = [w.name.clone(), node.name.clone(), output.unwrap_or_default()];
    Some(Layer { weight: id, input_first, names })
}

/// Whether the weight's first axis is the one that is summed over where it is used; `None`: not in a layer of this kind.
fn input_first(model: &Model, weight: ValueId, used: &Use) -> Option<bool> {
    let node = model.graph.node(used.node);
    let first = match (op_type(node.op.as_ref()).as_str(), used.slot) {
        ("MatMul" | "FusedMatMul", 1) => true,
        ("MatMul" | "FusedMatMul", 0) => false,
        ("Gemm", 1) => !node.op.as_a::<Gemm>()?.trans_b,
        ("Gemm", 0) => node.op.as_a::<Gemm>()?.trans_a,
        ("Conv", 1) if node.op.as_a::<Conv>()?.groups == 1 => return Some(false),
        _ => return None,
    };
    // Exporters put a Transpose between.
    let (mut v, mut turned) = (node.inputs.get(used.slot).copied().flatten()?, false);
    for _ in 0..DEPTH {
        if v == weight {
            break;
        }
        let crate::graph::Source::Node(n, _) = model.graph.value(v).source else { break };
        turned ^= turns(model, n);
        v = model.graph.node(n).inputs.first().copied().flatten()?;
    }
    Some(first ^ turned)
}

fn turns(model: &Model, n: NodeId) -> bool {
    model.graph.node(n).op.name() == "Transpose"
}

/// Lets the layers learn by additions of `rank` that match one of `globs` (all, where there are none), but for weights
/// that are trained as a whole.
pub(super) fn add(
    session: &mut Session,
    rank: usize,
    globs: &[glob::Pattern],
    ask: &Ask,
    reached: &[bool],
    chosen: &mut Chosen,
) -> Result<()> {
    let model = session.model().clone();
    let all = layers(&model);
    if all.is_empty() {
        let what = "the model has no dense layer and no 1×1 convolution of one group with a trainable weight";
        return Err(Error::Config(format!("--train lora:{rank}: {what}")));
    }
    let matches = |p: &glob::Pattern, l: &Layer| l.names.iter().any(|n| p.matches(n));
    if let Some(p) = globs.iter().find(|p| !all.iter().any(|l| matches(p, l))) {
        let what = "is the name of no dense layer or 1×1 convolution (nor of its weight or output)";
        return Err(Error::Config(format!("--train lora:{rank}@{p}: '{p}' {what}")));
    }
    let (mut layers, mut learn, mut whole, mut clamped) = (0, 0, 0, Vec::new());
    for l in all.iter().filter(|l| globs.is_empty() || globs.iter().any(|p| matches(p, l))) {
        let weight = model.weight(l.weight);
        if chosen.params.contains(&l.weight) || session.is_in_parts(l.weight) {
            continue;
        }
        if !reached[l.weight.index()] {
            chosen.notes.push(format!("not trained: the loss does not depend on {}", weight.name));
            continue;
        }
        let own = rank.min(weight.dims[0]).min(weight.dims[1]);
        if own < rank {
            clamped.push(weight.name.as_str());
        }
        let alpha = ask.lora_alpha.unwrap_or(own as f64);
        let part = Part::LowRank { rank: own, alpha, input_first: l.input_first };
        session.make_part(l.weight, &part, ask.seed)?;
        chosen.params.push(l.weight);
        layers += 1;
        learn += session.trained_len(l.weight);
        whole += weight.len();
    }
    if layers == 0 {
        let what =
            "every layer that it names is trained as a whole already, or the loss does not depend on it";
        return Err(Error::Config(format!("--train lora:{rank}: {what}")));
    }
    chosen.notes.push(format!("low-rank additions to {layers} layers: {learn} numbers learn for {whole}"));
    if !clamped.is_empty() {
        let what = format!("the rank {rank} is clamped to the smaller side of {}", clamped.join(", "));
        chosen.notes.push(what);
    }
    Ok(())
}
