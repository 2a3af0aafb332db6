//! Each operator's form for channels last against its ordinary one, on the operands that the cases give it.

use std::collections::{BTreeSet, HashMap};

use super::*;
use crate::kernels::layout::axis_at;
use crate::ops::ChannelsLast;
use crate::ops::eval;
use crate::ops::layout::extended;
use crate::ops::transpose::Transpose;

fn metas(graph: &Graph, values: &[Option<ValueId>]) -> Vec<Option<Meta>> {
    values.iter().map(|v| v.map(|v| graph.meta(v).unwrap().clone())).collect()
}

/// The forms that the nodes of a graph offer.
fn offers(graph: &Graph) -> Vec<Option<ChannelsLast>> {
    let offer = |node: &crate::graph::Node| {
        let (x, y) = (metas(graph, &node.inputs), metas(graph, &node.outputs));
        let x: Vec<Option<&Meta>> = x.iter().map(Option::as_ref).collect();
        let y: Vec<Option<&Meta>> = y.iter().map(Option::as_ref).collect();
        node.op.channels_last(&x, &y).filter(|_| node.op.is_pure())
    };
    graph.nodes.iter().map(offer).collect()
}

/// Extended to `rank` dimensions, with axis 1 last.
fn moved(t: &Tensor, rank: usize) -> Tensor {
    let t = t.clone().reshaped(&extended(t.dims(), rank)).unwrap();
    let op = Transpose { perm: Some((0..rank).map(|i| axis_at(i, rank)).collect()) };
    eval(&op, &[Some(&t)]).unwrap().swap_remove(0)
}

/// Runs the graph, and again every node that has a form for channels last, in that form.
pub fn check(name: &str, graph: &Graph, feeds: &HashMap<ValueId, Tensor>) {
    let offers = offers(graph);
    if offers.iter().all(Option::is_none) {
        return;
    }
    let all: Vec<ValueId> = graph.nodes.iter().flat_map(|n| n.outputs.iter().flatten().copied()).collect();
    let mut values: HashMap<ValueId, Tensor> = feeds.clone();
    values.extend(all.iter().copied().zip(interpret(graph, feeds, &all).unwrap()));
    for (i, v) in graph.values.iter().enumerate() {
        if let crate::graph::Source::Constant(t) = &v.source {
            values.insert(ValueId(i as u32), t.as_ref().clone());
        }
    }
    for (node, form) in graph.nodes.iter().zip(offers) {
        let Some(form) = form else { continue };
        let what = format!("{name}: {:?} with channels last", node.op);
        let flagged = |i: usize, flags: &[bool]| flags.get(i) == Some(&true);
        let operands = node.inputs.iter().zip(&form.inputs).chain(node.outputs.iter().zip(&form.outputs));
        let rank = operands.filter(|(_, f)| **f).filter_map(|(v, _)| *v).map(|v| values[&v].dims().len());
        let rank = rank.max().unwrap_or_else(|| panic!("{what}: nothing is permuted"));
        let inputs: Vec<Option<Tensor>> = node
            .inputs
            .iter()
            .take(form.takes)
            .enumerate()
            .map(|(i, v)| {
                let t = &values[&(*v)?];
                Some(if flagged(i, &form.inputs) { moved(t, rank) } else { t.clone() })
            })
            .collect();
        let inputs: Vec<Option<&Tensor>> = inputs.iter().map(Option::as_ref).collect();
        let op = form.op.unwrap_or(node.op.clone());
        let outputs = eval(op.as_ref(), &inputs).unwrap_or_else(|e| panic!("{what}: {e}"));
        for (o, v) in node.outputs.iter().enumerate() {
            let Some(v) = v else { continue };
            let t = &values[v];
            let made = outputs[o].dims().len();
            let want = if flagged(o, &form.outputs) { moved(t, made) } else { t.clone() };
            assert_eq!(want.dims(), outputs[o].dims(), "{what}: output {o}");
            let tolerance = if want.dtype() == DType::F32 { 1e-5 } else { 1e-12 };
            close(&what, "output", &want.to_f64(), &outputs[o].to_f64(), tolerance);
        }
    }
}

/// Operators whose form for channels last the cases reach.
const FORMS: &[&str] = &[
    "Conv",
    "ConvInputGrad",
    "ConvWeightGrad",
    "ChannelSum",
    "BatchNormalization",
    "NormParamGrad",
    "BatchNormInputGrad",
    "BatchNormParamGrad",
    "BatchNormEvalInputGrad",
    "MaxPool",
    "MaxPoolGrad",
    "GlobalMaxPool",
    "AveragePool",
    "AveragePoolGrad",
    "GlobalAveragePool",
    "SpreadMean",
    "InstanceNormalization",
    "GroupNormalization",
    "GroupNormSums",
    "GroupNormInputGrad",
    "LRN",
    "LrnGrad",
    "Add",
    "Mul",
    "DivGrad",
    "PRelu",
    "PReluGrad",
    "Relu",
    "ReluGrad",
    "Clip",
    "ClipGrad",
    "Sum",
    "Where",
    "Greater",
    "Cast",
    "Identity",
    "ReduceMean",
    "ReduceMax",
    "Ties",
    "ReduceGrad",
    "ExpandTo",
    "SumTo",
    "ArgMax",
    "Expand",
    "Concat",
    "Split",
    "SplitGrad",
    "Slice",
    "SliceGrad",
    "Crop",
    "Pad",
    "PadGrad",
    "Softmax",
    "SoftmaxGrad",
    "Transpose",
    "Mse",
    "MseGrad",
];

#[test]
fn forms_are_reached() {
    let mut reached = BTreeSet::new();
    for case in all() {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let values = case.values(&mut rng);
        let mut built = build(&case, &values, &mut Vec::new(), &mut rng);
        if !case.forward_only {
            let wrt: Vec<ValueId> = (0..values.len())
                .filter(|&i| case.differentiated(i))
                .map(|i| built.operands[i].unwrap())
                .collect();
            for loss in built.losses.clone() {
                grad(&mut built.graph, loss, &wrt).unwrap();
            }
        }
        let offers = offers(&built.graph);
        let nodes = built.graph.nodes.iter().zip(offers).filter(|(_, o)| o.is_some());
        reached.extend(nodes.map(|(n, _)| n.op.name()));
    }
    let missing: Vec<&&str> = FORMS.iter().filter(|f| !reached.contains(**f)).collect();
    assert!(
        missing.is_empty(),
        "forms for channels last that no case reaches: {missing:?}; reached: {reached:?}"
    );
}
