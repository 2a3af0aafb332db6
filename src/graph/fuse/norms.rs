//! Batch normalisation and the convolutions around it: statistics by the convolution in front; activations that are
//! normalised, and gradients that pass a normalisation, as a convolution reads them; both gradients of a convolution
//! in one pass, and with them those of the normalisation in front.

use std::sync::Arc;

use super::uses::Uses;
use crate::graph::{Graph, Node, Source, ValueId};
use crate::kernels::elementwise::Clamp;
use crate::ops::Op;
use crate::ops::batch_norm::{BatchNormInputGrad, BatchNormParamGrad, BatchNormalization};
use crate::ops::conv::{Conv, ConvGrads, ConvInputGrad, ConvStatistics, ConvWeightGrad};
use crate::plan::Request;

/// Lets convolutions gather the statistics that a normalisation after them needs, while their results are near.
pub fn gather_statistics(graph: &mut Graph) {
    for i in 0..graph.nodes.len() {
        let norm = &graph.nodes[i];
        let Some(op) = norm.op.as_a::<BatchNormalization>().and_then(BatchNormalization::given) else {
            continue;
        };
        let Some(&Some(x)) = norm.inputs.first() else { continue };
        let Source::Node(id, 0) = graph.value(x).source else { continue };
        let Some(conv) = graph.node(id).op.as_a::<Conv>() else { continue };
        let conv: Arc<dyn Op> = Arc::new(ConvStatistics::of(conv.clone()));
        let metas = graph.metas(&graph.node(id).inputs);
        let Ok(metas) = conv.infer(&metas) else { continue };
        let made: Vec<Option<ValueId>> = metas
            .into_iter()
            .enumerate()
            .skip(1)
            .map(|(output, meta)| {
                let name = format!("{}/statistics.{output}", graph.value(x).name);
                let v = graph.add_value(name, Source::Node(id, output));
                graph.value_mut(v).meta = Some(meta);
                Some(v)
            })
            .collect();
        graph.nodes[i].op = Arc::new(op);
        graph.nodes[i].inputs.splice(5..5, made.clone());
        let node = &mut graph.nodes[id.index()];
        node.op = conv;
        node.outputs.extend(made);
    }
}

/// Joins batch normalisations and gradients of a differentiated graph with the convolutions that read them, where these
/// convolutions have their channels last and such a kernel.
pub fn join_normalisations(graph: &mut Graph, request: &Request) {
    let mut uses = Uses::of(graph, request);
    for i in 0..graph.nodes.len() {
        uses.normalise_when_read(graph, i);
    }
    for i in 0..graph.nodes.len() {
        if let Some(at) = uses.both_gradients(graph, i) {
            uses.pass_back_when_read(graph, at);
            uses.sums(graph, at);
        }
    }
}

impl Uses {
    /// If node `i` is a normalisation whose result only convolutions read that can normalise by themselves, they do.
    fn normalise_when_read(&mut self, graph: &mut Graph, i: usize) -> Option<()> {
        let from = &graph.nodes[i];
        let norm = from.op.as_a::<BatchNormalization>().filter(|n| n.training())?;
        norm.channel_epsilon()?;
        let clamp = norm.clamp();
        let (&[Some(x), Some(scale), Some(shift), ..], true) =
            (&from.inputs[..], norm.is_plain(from.inputs.len()))
        else {
            return None;
        };
        let &[Some(y), _, _, Some(mean), Some(inv)] = &from.outputs[..] else { return None };
        let made: Option<Vec<(usize, Arc<dyn Op>)>> =
            self.all_of(y)?.iter().map(|r| Some((*r, normalising(graph, *r, y, clamp)?))).collect();
        for (reader, op) in made? {
            let mut node = Node { op, ..graph.nodes[reader].clone() };
            node.inputs.splice(2..2, [mean, inv, scale, shift].map(Some));
            for v in node.inputs.iter_mut().filter(|v| **v == Some(y)) {
                *v = Some(x);
            }
            self.put(graph, reader, node);
        }
        graph.nodes[i].outputs[0] = None;
        Some(())
    }

    /// If node `i` is a weight gradient beside which the input gradient is computed, both become one node, whose place
    /// is given.
    fn both_gradients(&mut self, graph: &mut Graph, i: usize) -> Option<usize> {
        let to_w = graph.nodes[i].op.as_a::<ConvWeightGrad>()?;
        let (&[Some(dy), Some(x), ..], &[Some(dw)]) =
            (&graph.nodes[i].inputs[..], &graph.nodes[i].outputs[..])
        else {
            return None;
        };
        let meta = graph.value(x).meta.clone().filter(|x| ConvGrads::can(&to_w.conv, x, &to_w.w))?;
        let fits = |j: &usize| {
            let node = &graph.nodes[*j];
            let Some(to_x) = node.op.as_a::<ConvInputGrad>() else { return false };
            let w = node.inputs[1].and_then(|w| graph.value(w).meta.as_ref());
            let alike = to_x.conv.window == to_w.conv.window && to_x.conv.groups == to_w.conv.groups;
            node.inputs[0] == Some(dy)
                && alike
                && to_x.x == meta.dims
                && w.is_some_and(|w| w.dims == to_w.w)
                && node.outputs.len() == 1
        };
        let j = *self.readers[dy.index()].iter().find(|j| fits(j))?;
        let other = &graph.nodes[j];
        let (w, dx) = (other.inputs[1], other.outputs[0]?);
        // The later place, where all operands are there; before it nobody may read either.
        let at = i.max(j);
        let early = |v: ValueId| self.readers[v.index()].iter().any(|r| *r <= at);
        if early(dx) || early(dw) {
            return None;
        }
        let addend = other.inputs.get(2).copied().flatten();
        let op = ConvGrads {
            conv: to_w.conv.clone(),
            w: to_w.w.clone(),
            adds: addend.is_some(),
            back: None,
            sums: false,
        };
        let mut inputs = vec![Some(dy), w, Some(x), addend];
        inputs.extend_from_slice(&graph.nodes[i].inputs[2..]);
        let node =
            Node { op: Arc::new(op), inputs, outputs: vec![Some(dx), Some(dw)], ..graph.nodes[at].clone() };
        self.remove(graph, i.min(j));
        self.put(graph, at, node);
        Some(at)
    }

    /// If the gradient that node `at` reads is what a normalisation passes on, and nobody else reads it, the node
    /// computes it.
    fn pass_back_when_read(&mut self, graph: &mut Graph, at: usize) -> Option<()> {
        let node = &graph.nodes[at];
        let op = node.op.as_a::<ConvGrads>()?;
        let dy = node.inputs[0]?;
        let Source::Node(id, 0) = graph.value(dy).source else { return None };
        let from = graph.node(id);
        let back = from.op.as_a::<BatchNormInputGrad>().filter(|b| b.channels.s == 1)?;
        let (&[Some(x), scale, mean, inv, Some(dz), dscale, dshift, ref shift @ ..], true) =
            (&from.inputs[..], self.only_in(dy, at))
        else {
            return None;
        };
        let passed = (!shift.is_empty()).then_some(back.clamp);
        let op = ConvGrads { back: Some(passed), ..op.clone() };
        let mut made = Node { op: Arc::new(op), ..node.clone() };
        made.inputs[0] = Some(dz);
        made.inputs.extend([Some(x), scale, mean, inv, dscale, dshift]);
        made.inputs.extend(shift);
        self.remove(graph, id.index());
        self.put(graph, at, made);
        Some(())
    }

    /// If node `at` normalises X and the gradients of that normalisation's scale and shift are wanted, it computes them.
    fn sums(&mut self, graph: &mut Graph, at: usize) -> Option<()> {
        let node = &graph.nodes[at];
        let op = node.op.as_a::<ConvGrads>()?;
        let clamp = op.conv.normalises?;
        let dx = node.outputs[0]?;
        let &[mean, inv, scale, shift] = &node.inputs[4..8] else { return None };
        let of = [node.inputs[2], Some(dx), mean, inv, scale, shift];
        let gradient = |r: &usize| {
            let node = &graph.nodes[*r];
            let same =
                node.op.as_a::<BatchNormParamGrad>().is_some_and(|p| p.clamp == clamp && p.channels.s == 1);
            same && node.inputs[..] == of && node.outputs.len() == 2
        };
        let found = *self.readers[dx.index()].iter().find(|r| gradient(r))?;
        let mut made = Node { op: Arc::new(ConvGrads { sums: true, ..op.clone() }), ..node.clone() };
        made.outputs.extend(graph.nodes[found].outputs.clone());
        if made.outputs.iter().any(Option::is_none) {
            return None;
        }
        self.remove(graph, found);
        self.put(graph, at, made);
        Some(())
    }
}

/// Node `r` as one that normalises its operand `y`, if it can.
fn normalising(graph: &Graph, r: usize, y: ValueId, clamp: Clamp<f64>) -> Option<Arc<dyn Op>> {
    let node = &graph.nodes[r];
    let dims = |i: usize| node.inputs[i].and_then(|v| graph.value(v).meta.as_ref()).map(|m| &m.dims[..]);
    let once = |i: usize| node.inputs.iter().enumerate().all(|(k, v)| (*v == Some(y)) == (k == i));
    let able =
        |conv: &Conv, x: usize, w: &[usize]| once(x) && dims(x).is_some_and(|x| conv.can_normalise(x, w));
    let op = node.op.as_ref();
    if let Some(conv) = op.as_a::<Conv>() {
        return able(conv, 0, dims(1)?).then(|| Arc::new(conv.normalising(clamp)) as Arc<dyn Op>);
    }
    if let Some(op) = op.as_a::<ConvStatistics>() {
        let conv = op.conv.normalising(clamp);
        return able(&op.conv, 0, dims(1)?).then(|| Arc::new(ConvStatistics { conv, ..*op }) as Arc<dyn Op>);
    }
    let op = op.as_a::<ConvWeightGrad>()?;
    let conv = op.conv.normalising(clamp);
    able(&op.conv, 1, &op.w).then(|| Arc::new(ConvWeightGrad { conv, w: op.w.clone() }) as Arc<dyn Op>)
}
