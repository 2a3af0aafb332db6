//! Fused graphs against unfused ones, on the committed networks.

use std::collections::HashMap;
use std::sync::Arc;

use crate::exec::reference::interpret;
use crate::exec::{Options, Session};
use crate::graph::{Graph, ValueId, WeightId, grad};
use crate::ops::binary::Binary;
use crate::ops::cases::{Case, close};
use crate::ops::reduce::{Kind, Reduce};
use crate::ops::{Mode, Op};
use crate::plan::Request;
use crate::tensor::{DType, Meta, Tensor};
use crate::train::loss::Loss;
use crate::train::step::{Network, Shapes, param_values};

/// What is done to a network before its loss is attached.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Fused {
    No,
    WeightsLearn,
    WeightsStay,
}

pub(super) fn count(graph: &Graph, op: &str) -> usize {
    graph.nodes.iter().filter(|n| n.op.name() == op).count()
}

/// Loss, outputs, a value within the network, next statistics, and gradients of input and weights; and the graph before its loss is
/// attached.
fn step(network: &str, mode: Mode, tap: &str, fused: Fused) -> (Graph, Vec<Tensor>) {
    let options = Options { threads: 1, ..Options::default() };
    let (forward, _, values) = step_of(network, mode, tap, fused, options, |_| {});
    (forward, values)
}

/// The same of an edited network, and the graph that is run.
pub(super) fn step_of(
    network: &str,
    mode: Mode,
    tap: &str,
    fused: Fused,
    options: Options,
    edit: impl Fn(&mut Graph),
) -> (Graph, Graph, Vec<Tensor>) {
    let path = format!("{}/models/{network}.onnx", env!("CARGO_MANIFEST_DIR"));
    let model = Arc::new(crate::import::load(path).unwrap());
    let mut session = Session::new(model.clone(), options).unwrap();
    let weights = model.weights.iter().enumerate().filter(|(_, w)| w.trainable);
    let params: Vec<WeightId> = weights.map(|(i, _)| WeightId(i as u32)).collect();
    session.make_mutable(&params).unwrap();
    let spec = crate::finetune::input_specs(&model).remove(0);
    let mut dims: Vec<usize> = spec.dims.iter().map(|d| d.unwrap_or(32)).collect();
    dims[0] = 3;
    let x: Vec<f32> = (0..dims.iter().product()).map(|i| (i as f32 * 0.37).sin() * 0.5).collect();
    let x = Tensor::from_slice(&dims, &x).unwrap();
    let labels = Tensor::ints(&[1, 7, 2]);
    let shapes = Shapes { inputs: vec![(spec.name, x.meta())], target: Meta::new(DType::I64, &[3]) };
    let mut net = Network::new(&session, mode, &shapes, &HashMap::new()).unwrap();
    edit(&mut net.graph);
    let tap = net.graph.find(tap).unwrap_or(net.graph.outputs[0]);
    if fused != Fused::No {
        net.fuse(&[tap], fused == Fused::WeightsLearn).unwrap();
    }
    let forward = net.graph.clone();
    let loss = Loss::CrossEntropy { label_smoothing: 0.0 };
    let attached = loss.attach(&mut net.graph, shapes.target.clone()).unwrap();
    let mut wrt: Vec<ValueId> = net.inputs.clone();
    if fused != Fused::WeightsStay {
        wrt.extend(param_values(&session, &params));
    }
    let grads = grad(&mut net.graph, attached.loss, &wrt).unwrap();
    let mut outputs = vec![attached.loss, attached.logits, tap];
    outputs.extend(&net.statistics);
    outputs.extend(wrt.iter().map(|v| grads[v]));
    let request = Request { outputs: outputs.clone(), ..Request::default() };
    let program = session.compile(net.graph, request).unwrap();
    session.run(&program, &[(net.inputs[0], x.view()), (attached.target, labels.view())], 0).unwrap();
    let read = |v: &ValueId| session.output(&program, *v).unwrap().to_tensor();
    let values = outputs.iter().map(read).collect();
    (forward, program.graph, values)
}

pub(super) fn agree(a: &[Tensor], b: &[Tensor], what: &str) {
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        assert_eq!(a.dims(), b.dims(), "{what}, {i}");
        close(what, &format!("value {i}"), &a.to_f64(), &b.to_f64(), 2e-3);
    }
}

#[test]
fn fused_networks_compute_the_same() {
    for network in ["resnet20", "dsnet"] {
        for mode in [Mode::TRAIN, Mode::EVAL] {
            let what = format!("{network} {mode:?}");
            let (plain, expected) = step(network, mode, "", Fused::No);
            let (fused, learned) = step(network, mode, "", Fused::WeightsLearn);
            assert!(fused.nodes.len() < plain.nodes.len(), "{what}");
            for op in ["Relu", "Clip", "Add"] {
                assert_eq!(count(&fused, op), 0, "{what}: {op}\n{fused}");
            }
            assert_eq!(count(&fused, "BatchNormalization"), count(&plain, "BatchNormalization"));
            agree(&expected, &learned, &what);
            let (folded, stayed) = step(network, mode, "", Fused::WeightsStay);
            let left = if mode == Mode::EVAL { 0 } else { count(&plain, "BatchNormalization") };
            assert_eq!(count(&folded, "BatchNormalization"), left, "{what}\n{folded}");
            agree(&stayed, &expected, &what);
        }
    }
}

/// Where nobody else needs what a pointwise convolution puts out, the depthwise one behind computes it.
#[test]
fn expansions_are_computed_where_they_are_read() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/models/dsnet.onnx");
    let model = Arc::new(crate::import::load(path).unwrap());
    let run = |channels_first: bool, kept: bool| {
        let options = Options { threads: 1, channels_first, ..Options::default() };
        let mut session = Session::new(model.clone(), options).unwrap();
        let spec = crate::finetune::input_specs(&model).remove(0);
        let mut dims: Vec<usize> = spec.dims.iter().map(|d| d.unwrap_or(32)).collect();
        dims[0] = 2;
        let x: Vec<f32> = (0..dims.iter().product()).map(|i| (i as f32 * 0.37).sin() * 0.5).collect();
        let x = Tensor::from_slice(&dims, &x).unwrap();
        let shapes = Shapes { inputs: vec![(spec.name, x.meta())], target: Meta::new(DType::I64, &[2]) };
        let mut net = Network::new(&session, Mode::EVAL, &shapes, &HashMap::new()).unwrap();
        let mut outputs = net.graph.outputs.clone();
        net.fuse(&[], false).unwrap();
        if kept {
            let convs = net.graph.nodes.iter().filter(|n| n.op.name() == "Conv");
            outputs.extend(convs.filter_map(|n| n.outputs[0]));
        }
        let request = Request { outputs: outputs.clone(), ..Request::default() };
        let program = session.compile(net.graph, request).unwrap();
        session.run(&program, &[(net.inputs[0], x.view())], 0).unwrap();
        (count(&program.graph, "ConvExpanded"), session.output(&program, outputs[0]).unwrap().to_tensor())
    };
    let (none, expected) = run(true, false);
    let (several, joined) = run(false, false);
    assert!(none == 0 && several > 1, "{none}, {several}");
    agree(&[joined], std::slice::from_ref(&expected), "dsnet");
    let (none, all) = run(false, true);
    assert_eq!(none, 0);
    agree(&[all], &[expected], "dsnet, all kept");
}

#[test]
fn what_is_kept_is_computed() {
    let (plain, _) = step("resnet20", Mode::EVAL, "", Fused::No);
    let inner = plain.nodes.iter().filter(|n| ["BatchNormalization", "Add"].contains(&n.op.name()));
    for v in inner.map(|n| n.outputs[0].unwrap()).step_by(5) {
        let name = &plain.value(v).name;
        let (_, expected) = step("resnet20", Mode::EVAL, name, Fused::No);
        let (_, fused) = step("resnet20", Mode::EVAL, name, Fused::WeightsStay);
        agree(&fused, &expected, name);
    }
}

#[test]
fn weights_that_never_change_are_folded_once() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/models/dsnet.onnx");
    let model = Arc::new(crate::import::load(path).unwrap());
    let mut session = Session::new(model.clone(), Options { threads: 1, ..Options::default() }).unwrap();
    let spec = crate::finetune::input_specs(&model).remove(0);
    let mut frozen = Vec::new();
    for batch in [1, 2] {
        let mut dims: Vec<usize> = spec.dims.iter().map(|d| d.unwrap_or(32)).collect();
        dims[0] = batch;
        let inputs = vec![(spec.name.clone(), Meta::new(DType::F32, &dims))];
        let shapes = Shapes { inputs, target: Meta::new(DType::I64, &[batch]) };
        let loss = Loss::CrossEntropy { label_smoothing: 0.0 };
        let plan = crate::train::step::Evaluation::new(&mut session, &loss, &shapes).unwrap();
        assert_eq!(count(&plan.program.graph, "BatchNormalization"), 0);
        assert!(plan.program.plan.steps.iter().all(|s| s.op.name() != "FoldNorm"));
        frozen.push(session.usage().frozen);
    }
    assert!(frozen[0] > 0 && frozen[0] == frozen[1], "{frozen:?}");
}

/// A graph of an input, another of its shape, and what is made of them.
pub(super) struct Spelled {
    graph: Graph,
    pub x: ValueId,
    pub other: ValueId,
}

impl Spelled {
    pub fn emit(&mut self, op: impl Op + 'static, inputs: &[ValueId]) -> ValueId {
        let inputs: Vec<_> = inputs.iter().copied().map(Some).collect();
        self.graph.emit("", Arc::new(op), &inputs, 1).unwrap()[0]
    }

    pub fn number(&mut self, number: f64) -> ValueId {
        self.graph.add_constant("", Tensor::scalar(number))
    }

    pub fn by(&mut self, op: Binary, v: ValueId, number: f64) -> ValueId {
        let number = self.number(number);
        self.emit(op, &[v, number])
    }

    /// What is spelled becomes this operator, or stays as it is; either way it computes the same.
    pub fn check(what: &str, becomes: Option<&str>, spell: impl Fn(&mut Spelled) -> ValueId) {
        let line = Tensor::from_slice(&[2, 4], &[-5.0, -2.0, -0.5, 0.0, 0.3, 1.0, 2.5, 4.0f64]).unwrap();
        let mut graph = Graph::default();
        let [x, other] = ["x", "other"].map(|name| graph.add_input(name, line.meta()));
        let mut spelled = Spelled { graph, x, other };
        let out = spell(&mut spelled);
        let mut graph = spelled.graph;
        graph.outputs = vec![out];
        let feeds = HashMap::from([(x, line.clone()), (other, line)]);
        let (expected, nodes) = (interpret(&graph, &feeds, &[out]).unwrap(), graph.nodes.len());
        super::fuse(&mut graph, &[], true).unwrap();
        let names: Vec<&str> = graph.nodes.iter().map(|n| n.op.name()).collect();
        match becomes {
            Some(op) => assert_eq!(names, [op], "{what}"),
            None => assert_eq!(names.len(), nodes, "{what}: {graph}"),
        }
        let got = interpret(&graph, &feeds, &[out]).unwrap();
        close(what, "fused", &expected[0].to_f64(), &got[0].to_f64(), 1e-6);
    }
}

/// A product takes a factor, a bias and a sum; one by a vector, whose last axis is not the product's, takes none.
#[test]
fn products_take_what_is_added_to_them() {
    use crate::ops::binary::Binary::{Add, Div};
    use crate::ops::matmul::MatMul;
    use crate::ops::transpose::Transpose;

    let of = |dims: &[usize]| {
        let x: Vec<f64> = (0..dims.iter().product()).map(|i| (i as f64 * 0.7).sin()).collect();
        Tensor::from_slice(dims, &x).unwrap()
    };
    // Operands, what is added first and then, and how many nodes are left.
    type Sums = (&'static [usize], &'static [usize], &'static [usize], &'static [usize], usize);
    let sums: [Sums; 5] = [
        (&[2, 3, 4], &[4, 5], &[5], &[2, 3, 5], 1),
        (&[2, 3, 4], &[4, 5], &[2, 3, 5], &[5], 2),
        (&[2, 3, 4], &[4, 5], &[3, 5], &[2, 3, 5], 3),
        (&[2, 3, 4], &[4, 5], &[5], &[1, 2, 3, 5], 2),
        (&[2, 3, 4], &[4], &[3], &[2, 3], 4),
    ];
    for ((a, b, first, second, left), turned) in
        sums.into_iter().flat_map(|case| [(case, false), (case, true)])
    {
        let mut g = Graph::default();
        let mut lies = b.to_vec();
        if turned {
            lies.reverse();
        }
        let tensors = [a, &lies, first, second].map(of);
        let x: Vec<ValueId> = tensors.iter().map(|t| g.add_input("x", t.meta())).collect();
        let matrix = if turned { emit(&mut g, Transpose { perm: None }, &x[1..2]) } else { x[1] };
        let y = emit(&mut g, MatMul::default(), &[x[0], matrix]);
        let eight = g.add_constant("", Tensor::scalar(8.0f64));
        let y = emit(&mut g, Div, &[y, eight]);
        let y = emit(&mut g, Add, &[y, x[2]]);
        let y = emit(&mut g, Add, &[x[3], y]);
        g.outputs = vec![y];
        let expected = and_gradients(g.clone(), y, &x, &tensors);
        super::fuse(&mut g, &[], true).unwrap();
        let needed = crate::plan::order(&g, &Request { outputs: vec![y], ..Request::default() }).unwrap();
        // The transpose of a vector is left.
        let left = left + usize::from(turned && b.len() == 1);
        assert_eq!(needed.len(), left, "{a:?} {b:?} {first:?} {second:?} {turned}: {g}");
        for (i, (a, b)) in expected.iter().zip(and_gradients(g, y, &x, &tensors)).enumerate() {
            close("product", &format!("{first:?}, result {i}"), &a.to_f64(), &b.to_f64(), 1e-12);
        }
    }
}

fn emit(g: &mut Graph, op: impl Op, x: &[ValueId]) -> ValueId {
    let x: Vec<_> = x.iter().map(|v| Some(*v)).collect();
    g.emit("", Arc::new(op), &x, 1).unwrap()[0]
}

/// A value of a graph that is fed with these tensors, and the gradients, of some of the inputs, of its sum weighted by a wave.
fn and_gradients(mut g: Graph, y: ValueId, wrt: &[ValueId], tensors: &[Tensor]) -> Vec<Tensor> {
    let meta = g.meta(y).unwrap().clone();
    let wave: Vec<f64> = (0..meta.len()).map(|i| (i as f64 * 0.9).sin()).collect();
    let wave = g.add_constant("", Tensor::from_slice(&meta.dims, &wave).unwrap());
    let product = emit(&mut g, Binary::Mul, &[y, wave]);
    let sum = Reduce { kind: Kind::Sum, axes: None, keepdims: false, noop: false };
    let loss = emit(&mut g, sum, &[product]);
    let grads = grad(&mut g, loss, wrt).unwrap();
    let wanted: Vec<ValueId> = [y].into_iter().chain(wrt.iter().map(|v| grads[v])).collect();
    let feeds: HashMap<ValueId, Tensor> = g.inputs.iter().copied().zip(tensors.iter().cloned()).collect();
    interpret(&g, &feeds, &wanted).unwrap()
}

/// Layer normalisation and division by the root mean square as exporters spell them: the same results and gradients.
#[test]
fn normalisations_of_rows_are_one_operator() {
    use crate::ops::binary::Binary::{Add, Div, Mul, Pow, Sub};
    use crate::ops::unary::{Reciprocal, Sqrt, Unary};

    let of = |dims: &[usize], by: f64| {
        let x: Vec<f64> = (0..dims.iter().product()).map(|i| (i as f64 * by).sin() + 0.3).collect();
        Tensor::from_slice(dims, &x).unwrap()
    };
    // The axes, the shape of scale and shift, how the square and the quotient are spelled, and what there is of these.
    type Case = (&'static [i64], &'static [usize], usize, usize, [bool; 3], usize);
    let cases: [Case; 8] = [
        (&[-1], &[6], 0, 0, [true, true, true], 1),
        (&[-1], &[6], 1, 1, [true, true, false], 1),
        (&[-1], &[6], 0, 2, [true, false, false], 1),
        (&[1, 2], &[5, 6], 0, 0, [true, true, true], 1),
        (&[1, 2], &[6], 1, 2, [true, true, true], 1),
        (&[-1], &[6], 0, 1, [false, true, false], 1),
        (&[-1], &[6], 1, 2, [false, false, false], 1),
        // Not over the last axes.
        (&[1], &[6], 0, 0, [true, true, true], 0),
    ];
    for (number, (axes, dims, squared, divided, [centred, scaled, shifted], fused)) in
        cases.into_iter().enumerate()
    {
        let mut g = Graph::default();
        let tensors = [of(&[3, 5, 6], 0.7), of(dims, 1.3), of(dims, 2.1)];
        let inputs: Vec<ValueId> = tensors.iter().map(|t| g.add_input("x", t.meta())).collect();
        let known = |g: &mut Graph, x: f64| g.add_constant("", Tensor::scalar(x));
        let mean = |g: &mut Graph, v: ValueId| {
            emit(g, Reduce { kind: Kind::Mean, axes: Some(axes.to_vec()), keepdims: true, noop: false }, &[v])
        };
        let mut x = inputs[0];
        if centred {
            let m = mean(&mut g, x);
            x = emit(&mut g, Sub, &[x, m]);
        }
        let two = known(&mut g, 2.0);
        let square = if squared == 0 { emit(&mut g, Pow, &[x, two]) } else { emit(&mut g, Mul, &[x, x]) };
        let variance = mean(&mut g, square);
        let epsilon = known(&mut g, f64::from(1e-3f32));
        let sum = emit(&mut g, Add, &[variance, epsilon]);
        let root = emit(&mut g, Unary(Sqrt {}), &[sum]);
        let mut y = match divided {
            0 => emit(&mut g, Div, &[x, root]),
            1 => {
                let one = known(&mut g, 1.0);
                let inverse = emit(&mut g, Div, &[one, root]);
                emit(&mut g, Mul, &[x, inverse])
            }
            _ => {
                let inverse = emit(&mut g, Unary(Reciprocal {}), &[root]);
                emit(&mut g, Mul, &[inverse, x])
            }
        };
        if scaled {
            y = emit(&mut g, Mul, &[inputs[1], y]);
        }
        if shifted {
            y = emit(&mut g, Add, &[y, inputs[2]]);
        }
        g.outputs = vec![y];
        let used = 1 + usize::from(scaled) + usize::from(shifted);
        let step = |g: Graph| and_gradients(g, y, &inputs[..used], &tensors);
        let expected = step(g.clone());
        super::fuse(&mut g, &[], true).unwrap();
        let norms = count(&g, "LayerNormalization") + count(&g, "RMSNormalization");
        assert_eq!((norms, count(&g, "Sqrt")), (fused, 1 - fused), "case {number}: {g}");
        if fused == 1 {
            assert_eq!(
                (g.nodes.len(), count(&g, "LayerNormalization") == 1),
                (1, centred),
                "case {number}: {g}"
            );
        }
        for (i, (a, b)) in expected.iter().zip(step(g)).enumerate() {
            close("normalisation", &format!("case {number}, result {i}"), &a.to_f64(), &b.to_f64(), 1e-11);
        }
    }
}

/// Normalisation of groups as exporters spell it: the same results and gradients.
#[test]
fn normalisations_of_groups_are_one_operator() {
    use crate::ops::binary::Binary::{Add, Mul};

    // x, as which groups it is normalised, the scale of these, scale and shift that follow, and how many nodes are left.
    type Spelled = (&'static [usize], &'static [i64], f64, &'static [&'static [usize]], usize);
    let cases: [Spelled; 9] = [
        (&[2, 6, 3, 5], &[2, 3, -1], 1.0, &[&[6, 1, 1], &[6, 1, 1]], 1),
        (&[2, 6, 3, 5], &[2, 3, -1], 1.0, &[&[1, 6, 1, 1], &[1, 6, 1, 1]], 1),
        (&[2, 6, 5], &[2, 2, -1], 1.0, &[&[6, 1]], 1),
        (&[3, 4, 5], &[3, 1, -1], 1.0, &[], 1),
        (&[3, 4], &[3, 2, -1], 1.0, &[&[4], &[4]], 1),
        // Scaled along another axis, or shifted alone.
        (&[2, 6, 3, 5], &[2, 3, -1], 1.0, &[&[5]], 2),
        (&[2, 6, 3, 5], &[2, 3, -1], 1.0, &[&[6, 1, 1], &[5]], 2),
        // Normalised with a scale, or over groups of something else.
        (&[2, 6, 3, 5], &[2, 3, -1], 0.5, &[&[6, 1, 1], &[6, 1, 1]], 5),
        (&[2, 6, 3, 5], &[1, 6, -1], 1.0, &[&[6, 1, 1], &[6, 1, 1]], 5),
    ];
    for (number, (x, groups, scale, follow, left)) in cases.into_iter().enumerate() {
        let of = |dims: &[usize], by: f64| {
            let x: Vec<f64> = (0..dims.iter().product()).map(|i| (i as f64 * by).sin() + 0.3).collect();
            Tensor::from_slice(dims, &x).unwrap()
        };
        let mut g = Graph::default();
        let mut tensors = vec![of(x, 0.7)];
        tensors.extend(follow.iter().zip([1.3, 2.1]).map(|(dims, by)| of(dims, by)));
        let inputs: Vec<ValueId> = tensors.iter().map(|t| g.add_input("x", t.meta())).collect();
        let reshaped = |g: &mut Graph, v: ValueId, to: &[i64]| {
            let to = g.add_constant("", Tensor::ints(to));
            let node = g.emit("", Case::new("Reshape", 13).make(), &[Some(v), Some(to)], 1);
            node.unwrap()[0]
        };
        let inside = reshaped(&mut g, inputs[0], groups);
        let [scale, shift] = [scale, 0.0].map(|x| {
            let each = vec![x; groups[1] as usize];
            g.add_constant("", Tensor::from_slice(&[each.len()], &each).unwrap())
        });
        let operands = [inside, scale, shift].map(Some);
        let normed = g.emit("", Case::new("InstanceNormalization", 13).make(), &operands, 1).unwrap()[0];
        let dims: Vec<i64> = x.iter().map(|d| *d as i64).collect();
        let mut y = reshaped(&mut g, normed, &dims);
        for (v, kind) in inputs[1..].iter().zip([Mul, Add]) {
            y = emit(&mut g, kind, &[*v, y]);
        }
        g.outputs = vec![y];
        let step = |g: Graph| and_gradients(g, y, &inputs, &tensors);
        let expected = step(g.clone());
        super::fuse(&mut g, &[], true).unwrap();
        assert_eq!((g.nodes.len(), count(&g, "GroupNormalization")), (left, usize::from(left < 5)), "{g}");
        for (i, (a, b)) in expected.iter().zip(step(g)).enumerate() {
            close("normalisation", &format!("case {number}, result {i}"), &a.to_f64(), &b.to_f64(), 1e-11);
        }
    }
}

/// Places that are gathered one by one: one Split, if they are all that there are; the same results and gradients.
#[test]
fn parts_that_are_gathered_are_one_split() {
    use crate::ops::binary::Binary::Mul;
    use crate::ops::gather::Gather;
    use crate::ops::unary::{Tanh, Unary};

    let x: Vec<f64> = (0..60).map(|i| (i as f64 * 0.7).sin()).collect();
    let x = Tensor::from_slice(&[4, 3, 5], &x).unwrap();
    for (axis, indices, split) in [
        (1i64, &[0i64, 2, 1][..], true),
        (-2, &[-1, 0, 1], true),
        (0, &[3, 2, 1, 0], true),
        // One twice, one not at all.
        (1, &[0, 1, 1], false),
        (1, &[0, 1, 2, 2], false),
        (1, &[0, 2], false),
    ] {
        let mut g = Graph::default();
        let input = g.add_input("x", x.meta());
        let made = emit(&mut g, Unary(Tanh {}), &[input]);
        let mut y = None;
        for (k, i) in indices.iter().enumerate() {
            // Of a scalar, the axis vanishes.
            let index = if axis == 0 { Tensor::ints(&[*i]) } else { Tensor::scalar(*i) };
            let index = g.add_constant("", index);
            let part = emit(&mut g, Gather { axis }, &[made, index]);
            let factor = g.add_constant("", Tensor::scalar(1.0 + k as f64));
            let part = emit(&mut g, Mul, &[part, factor]);
            y = Some(y.map_or(part, |y| emit(&mut g, Mul, &[y, part])));
        }
        let y = y.unwrap();
        g.outputs = vec![y];
        let tensors = [x.clone()];
        let expected = and_gradients(g.clone(), y, &[input], &tensors);
        super::fuse(&mut g, &[], true).unwrap();
        let counts = (count(&g, "Split"), count(&g, "Gather"));
        assert_eq!(counts, if split { (1, 0) } else { (0, indices.len()) }, "{axis} {indices:?}: {g}");
        for (a, b) in expected.iter().zip(and_gradients(g, y, &[input], &tensors)) {
            close("parts", &format!("{axis} {indices:?}"), &a.to_f64(), &b.to_f64(), 1e-12);
        }
    }
}

/// Attention as exporters spell it, with and without masks and transpositions: the same results and gradients, also of a
/// mask that learns.
#[test]
fn attention_is_one_operator() {
    use crate::ops::binary::Binary::{Add, Div, Mul};
    use crate::ops::matmul::MatMul;
    use crate::ops::softmax::Softmax;
    use crate::ops::transpose::Transpose;
    use crate::tensor::Dims;

    #[derive(Clone, Copy)]
    struct Case {
        q: &'static [usize],
        k: &'static [usize],
        v: &'static [usize],
        /// How Q, Kᵀ, V and Y are transposed.
        perms: [Option<&'static [usize]>; 4],
        mask: Option<&'static [usize]>,
        fused: bool,
    }
    let heads: Option<&'static [usize]> = Some(&[0, 2, 1, 3]);
    let exported = [heads, Some(&[0, 2, 3, 1]), heads, heads];
    let case = |q, k, v, perms, mask, fused| Case { q, k, v, perms, mask, fused };
    let cases = [
        case(&[2, 5, 3, 4], &[2, 7, 3, 4], &[2, 7, 3, 6], exported, None, true),
        case(&[2, 5, 3, 4], &[2, 7, 3, 4], &[2, 7, 3, 6], exported, Some(&[2, 1, 1, 7]), true),
        case(&[2, 5, 3, 4], &[2, 7, 3, 4], &[2, 7, 3, 6], exported, Some(&[3, 5, 7]), true),
        case(&[2, 5, 3, 4], &[2, 7, 3, 4], &[2, 7, 3, 6], exported, Some(&[2, 3, 5, 7]), true),
        // More queries than a block has.
        case(&[1, 70, 1, 8], &[1, 600, 1, 8], &[1, 600, 1, 3], exported, Some(&[70, 1]), true),
        // Samples and heads in one axis, positions first in memory.
        case(
            &[5, 6, 4],
            &[7, 6, 4],
            &[7, 6, 3],
            [Some(&[1, 0, 2]), Some(&[1, 2, 0]), Some(&[1, 0, 2]), Some(&[1, 0, 2])],
            Some(&[5, 7]),
            true,
        ),
        case(&[6, 1, 4], &[6, 1, 4], &[6, 1, 2], [None, Some(&[0, 2, 1]), None, None], None, true),
        // K as its transpose lies in memory.
        case(&[6, 5, 4], &[6, 4, 7], &[6, 7, 2], [None; 4], None, false),
        // One K for all heads.
        case(
            &[2, 3, 5, 4],
            &[2, 1, 7, 4],
            &[2, 3, 7, 2],
            [None, Some(&[0, 1, 3, 2]), None, None],
            None,
            false,
        ),
    ];
    // The scores are divided by a number, or Q and K are multiplied and divided by its root before.
    let spelled = cases.iter().flat_map(|case| [(case, false), (case, true)]);
    for (number, (&Case { q, k, v, perms, mask, fused }, before)) in spelled.enumerate() {
        let of = |dims: &[usize], by: f64| {
            let x: Vec<f64> = (0..dims.iter().product()).map(|i| (i as f64 * by).sin()).collect();
            Tensor::from_slice(dims, &x).unwrap()
        };
        let mut g = Graph::default();
        let mut tensors = vec![of(q, 0.7), of(k, 1.3), of(v, 0.3)];
        tensors.extend(mask.map(|m| of(m, 2.1)));
        let inputs: Vec<ValueId> = tensors.iter().map(|t| g.add_input("x", t.meta())).collect();
        let turned = |g: &mut Graph, v: ValueId, i: usize| match perms[i] {
            Some(perm) => emit(g, Transpose { perm: Some(Dims::from_slice(perm)) }, &[v]),
            None => v,
        };
        let [mut tq, mut tk, tv] = [0, 1, 2].map(|i| turned(&mut g, inputs[i], i));
        if before {
            let [by, root] = [0.5f64, 2.0].map(|x| Tensor::from_slice(&[1], &[x.sqrt()]).unwrap());
            let (by, root) = (g.add_constant("", by), g.add_constant("", root));
            (tq, tk) = (emit(&mut g, Mul, &[by, tq]), emit(&mut g, Div, &[tk, root]));
        }
        let mut s = emit(&mut g, MatMul::default(), &[tq, tk]);
        if !before {
            let two = g.add_constant("", Tensor::scalar(2.0f64));
            s = emit(&mut g, Div, &[s, two]);
        }
        if let Some(mask) = inputs.get(3) {
            s = emit(&mut g, Add, &[*mask, s]);
        }
        let p = emit(&mut g, Softmax::along(-1), &[s]);
        let y = emit(&mut g, MatMul::default(), &[p, tv]);
        let y = turned(&mut g, y, 3);
        g.outputs = vec![y];
        let step = |g: Graph| and_gradients(g, y, &inputs, &tensors);
        let expected = step(g.clone());
        super::fuse(&mut g, &[], true).unwrap();
        assert_eq!(count(&g, "FusedAttention"), usize::from(fused), "case {number}: {g}");
        for (i, (a, b)) in expected.iter().zip(step(g)).enumerate() {
            close("attention", &format!("case {number}, result {i}"), &a.to_f64(), &b.to_f64(), 1e-11);
        }
    }
}
