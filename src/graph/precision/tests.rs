use std::collections::HashMap;

use super::*;
use crate::exec::reference::interpret;
use crate::exec::{Options, Precision, Session};
use crate::graph::{StateId, grad};
use crate::import::make::{import, model, node};
use crate::import::proto::TensorProto;
use crate::ops::binary::Binary;
use crate::ops::loss::Mse;
use crate::ops::reduce::{Kind as ReduceKind, Reduce};
use crate::ops::unary::{Sin, Unary};
use crate::ops::update::Sgd;
use crate::ops::{Attrs, Spec, create};
use crate::tensor::Tensor;

fn emit(graph: &mut Graph, op: impl Op + 'static, inputs: &[ValueId]) -> ValueId {
    let inputs: Vec<_> = inputs.iter().map(|v| Some(*v)).collect();
    graph.emit("t", Arc::new(op), &inputs, 1).unwrap()[0]
}

fn count(graph: &Graph, op: &str) -> usize {
    graph.nodes.iter().filter(|n| n.op.name() == op).count()
}

/// `h = sin(x)` is read by the next node, and much later as it is and under another shape.
fn late(graph: &mut Graph, x: ValueId) -> ValueId {
    let h = emit(graph, Unary(Sin {}), &[x]);
    let mut v = h;
    for _ in 0..10 {
        v = emit(graph, Unary(Sin {}), &[v]);
    }
    let dims = Dims::from_slice(&[4096]);
    let flat = emit(graph, ReshapeTo { dims: dims.clone() }, &[h]);
    let last = emit(graph, ReshapeTo { dims }, &[v]);
    let sum = emit(graph, Binary::Add, &[flat, last]);
    let square = emit(graph, ReshapeTo { dims: Dims::from_slice(&[64, 64]) }, &[sum]);
    emit(graph, Binary::Mul, &[square, h])
}

#[test]
fn what_is_read_late_is_rounded_once_and_widened_for_neighbours_together() {
    let x: Vec<f32> = (0..4096).map(|i| i as f32 * 0.013).collect();
    let x = Tensor::from_slice(&[64, 64], &x).unwrap();
    let mut graph = Graph::default();
    let input = graph.add_input("x", x.meta());
    let out = late(&mut graph, input);
    let request = Request { outputs: vec![out], ..Request::default() };
    let exact = interpret(&graph, &HashMap::from([(input, x.clone())]), &[out]).unwrap().remove(0);
    // A value that is left of a node that is gone.
    let gone = graph.add_value("gone", Source::Node(NodeId(1000), 0));
    graph.value_mut(gone).meta = Some(x.meta());
    halve(&mut graph, &request, Some(DType::BF16), Conversions::Kernels, &|_| None).unwrap();
    assert_eq!((count(&graph, "Narrow"), count(&graph, "Widen")), (1, 1), "{graph}");
    let rounded = interpret(&graph, &HashMap::from([(input, x.clone())]), &[out]).unwrap().remove(0);
    // The chain reads what was not rounded, the end what was.
    let sin: Vec<f32> = eval_sin(&x, 1);
    let chain = eval_sin(&x, 11);
    let h = Tensor::from_slice(&[64, 64], &sin).unwrap().cast(DType::BF16).to_f64();
    for (i, y) in rounded.to_f64().iter().enumerate() {
        let want = ((h[i] as f32 + chain[i]) * h[i] as f32) as f64;
        assert!((y - want).abs() <= 1e-6, "{y}, not {want}");
    }
    assert_ne!(exact.bytes(), rounded.bytes());
    // The plan is smaller, and nothing that must be there after the run is rounded.
    let plan = crate::plan::plan(&graph, &request, &crate::plan::scratch(&graph), None).unwrap();
    assert!(plan.outputs[&out].0.dtype == DType::F32);
}

/// A number made of a value runs before the next large one that is, though it is numbered after it: the copy that both read
/// is numbered before either.
#[test]
fn a_copy_is_numbered_before_all_that_read_it() {
    let mut graph = Graph::default();
    let input = graph.add_input("x", Meta::new(DType::F32, &[64, 64]));
    let h = emit(&mut graph, Unary(Sin {}), &[input]);
    let mut v = emit(&mut graph, Binary::Mul, &[h, input]);
    let error = emit(&mut graph, Mse, &[h, input]);
    for _ in 0..10 {
        v = emit(&mut graph, Unary(Sin {}), &[v]);
    }
    let out = emit(&mut graph, Binary::Mul, &[v, h]);
    let request = Request { outputs: vec![out, error], ..Request::default() };
    halve(&mut graph, &request, Some(DType::BF16), Conversions::Reads, &|_| None).unwrap();
    assert_eq!(count(&graph, "Narrow"), 1, "{graph}");
    for (i, node) in graph.nodes.iter().enumerate() {
        for v in node.inputs.iter().flatten() {
            let before = !matches!(graph.value(*v).source, Source::Node(n, _) if n.index() >= i);
            assert!(before, "{} is read before it is computed: {graph}", graph.value(*v).name);
        }
    }
    crate::plan::plan(&graph, &request, &crate::plan::scratch(&graph), None).unwrap();
}

/// Channels come first where there is no convolution: a normalisation then leaves rounding to others.
#[test]
fn what_a_normalisation_of_channels_first_makes_is_rounded() {
    let values: Vec<f32> = (0..8 * 2 * 32 * 33).map(|i| (i as f32 * 0.37).sin()).collect();
    let x = Tensor::from_slice(&[8, 2, 32, 33], &values).unwrap();
    let mut graph = Graph::default();
    let input = graph.add_input("x", x.meta());
    let mut read = vec![Some(input)];
    for w in [1.2f32, 0.1, 0.05, 0.5] {
        read.push(Some(graph.add_constant("", Tensor::from_slice(&[2], &[w, w + 0.1]).unwrap())));
    }
    let attrs = Attrs::default();
    let op_type = "BatchNormalization";
    let op = create(&Spec { domain: "", op_type, opset: 15, attrs: &attrs, inputs: 5, outputs: 1 }).unwrap();
    let b = graph.emit("b", op, &read, 1).unwrap()[0];
    let mut v = b;
    for _ in 0..10 {
        v = emit(&mut graph, Unary(Sin {}), &[v]);
    }
    let out = emit(&mut graph, Binary::Mul, &[v, b]);
    let run = |graph: &Graph| {
        interpret(graph, &HashMap::from([(input, x.clone())]), &[out]).unwrap().remove(0).to_f64()
    };
    let exact = run(&graph);
    let request = Request { outputs: vec![out], ..Request::default() };
    for to in [DType::BF16, DType::F16] {
        let mut graph = graph.clone();
        halve(&mut graph, &request, Some(to), Conversions::Kernels, &|_| None).unwrap();
        assert_eq!(count(&graph, "Narrow"), 1, "{graph}");
        let rounded = run(&graph);
        assert!(exact.iter().zip(&rounded).all(|(a, b)| (a - b).abs() <= 4e-3 * a.abs()) && exact != rounded);
    }
}

/// The gradient of a maximum goes where the maximum is, which what is rounded no longer says.
#[test]
fn what_is_compared_is_not_rounded() {
    let values: Vec<f32> = (0..64 * 64).map(|i| (i as f32 * 0.613).sin()).collect();
    let x = Tensor::from_slice(&[64, 64], &values).unwrap();
    let mut graph = Graph::default();
    let input = graph.add_input("x", x.meta());
    let h = emit(&mut graph, Unary(Sin {}), &[input]);
    let over_rows = |kind| Reduce { kind, axes: Some(vec![-1]), keepdims: true, noop: false };
    let most = emit(&mut graph, over_rows(ReduceKind::Max), &[h]);
    let mut v = emit(&mut graph, Binary::Sub, &[most, h]);
    for _ in 0..10 {
        v = emit(&mut graph, Unary(Sin {}), &[v]);
    }
    let all = Reduce { kind: ReduceKind::Sum, axes: None, keepdims: false, noop: false };
    let loss = emit(&mut graph, all, &[v]);
    let dx = grad(&mut graph, loss, &[input]).unwrap()[&input];
    let run = |graph: &Graph| {
        interpret(graph, &HashMap::from([(input, x.clone())]), &[dx]).unwrap().remove(0).to_f64()
    };
    let exact = run(&graph);
    let request = Request { outputs: vec![dx], ..Request::default() };
    halve(&mut graph, &request, Some(DType::BF16), Conversions::Apart, &|_| None).unwrap();
    let rounded = run(&graph);
    let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    let off: Vec<f64> = exact.iter().zip(&rounded).map(|(a, b)| a - b).collect();
    assert!(exact != rounded && norm(&off) <= 0.01 * norm(&exact), "{} of {}", norm(&off), norm(&exact));
}

fn eval_sin(x: &Tensor, times: usize) -> Vec<f32> {
    let mut t = x.clone();
    for _ in 0..times {
        t = crate::ops::eval(&Unary(Sin {}), &[Some(&t)]).unwrap().remove(0);
    }
    t.get::<f32>().unwrap().to_vec()
}

#[test]
fn small_and_wanted_values_stay() {
    let mut graph = Graph::default();
    let input = graph.add_input("x", Meta::new(DType::F32, &[31, 31]));
    let h = emit(&mut graph, Unary(Sin {}), &[input]);
    let mut v = h;
    for _ in 0..10 {
        v = emit(&mut graph, Unary(Sin {}), &[v]);
    }
    let out = emit(&mut graph, Binary::Add, &[v, h]);
    let nodes = graph.nodes.len();
    let request = Request { outputs: vec![out], ..Request::default() };
    halve(&mut graph, &request, Some(DType::F16), Conversions::Kernels, &|_| None).unwrap();
    assert_eq!(graph.nodes.len(), nodes);
    let mut graph = Graph::default();
    let input = graph.add_input("x", Meta::new(DType::F32, &[64, 64]));
    let out = late(&mut graph, input);
    let h = graph.nodes[0].outputs[0].unwrap();
    let request = Request { outputs: vec![out, h], ..Request::default() };
    halve(&mut graph, &request, Some(DType::F16), Conversions::Kernels, &|_| None).unwrap();
    assert_eq!(count(&graph, "Narrow"), 0);
}

#[test]
fn a_parameter_in_half_is_widened_where_it_is_read_and_updated_as_it_is() {
    let mut graph = Graph::default();
    let meta = Meta::new(DType::F32, &[64, 64]);
    let x = graph.add_input("x", meta.clone());
    let w = graph.add_state("w", StateId(0), meta);
    let hyper = graph.add_state("hyper", StateId(1), Meta::new(DType::F64, &[2]));
    let y = emit(&mut graph, Binary::Mul, &[x, w]);
    let sgd = Sgd { momentum: 0.0, nesterov: false, weight_decay: 0.0, salt: 0 };
    let next = emit(&mut graph, sgd, &[w, y, hyper]);
    let request = Request { outputs: vec![], effects: vec![next], ..Request::default() };
    let stored = |s: &Source| match s {
        Source::State(StateId(0)) => Some(DType::BF16),
        _ => None,
    };
    halve(&mut graph, &request, None, Conversions::Kernels, &stored).unwrap();
    assert_eq!((count(&graph, "Narrow"), count(&graph, "Widen")), (0, 1), "{graph}");
    assert_eq!(graph.value(next).meta.as_ref().unwrap().dtype, DType::BF16);
    let update = graph.nodes.iter().find(|n| n.op.name() == "Sgd").unwrap();
    let param = update.inputs[0].unwrap();
    assert_eq!(graph.value(param).meta.as_ref().unwrap().dtype, DType::BF16);
    crate::plan::plan(&graph, &request, &crate::plan::scratch(&graph), None).unwrap();
}

#[test]
fn frozen_weights_of_the_files_half_type_are_read_where_they_lie() {
    let values = (0..3 * 2048).map(|i| half::f16::from_f32((i as f32 * 0.37).sin()));
    let raw: Vec<u8> = values.flat_map(|v| v.to_le_bytes()).collect();
    let mut mapped = 0;
    // Of names of one and two letters in front, one puts the values at an even place.
    for name in ["n", "nn"] {
        let w = TensorProto {
            name: "w".into(),
            dims: vec![3, 2048],
            data_type: DType::F16.to_onnx(),
            raw_data: Some(raw.clone().into()),
            ..Default::default()
        };
        let mut nodes = vec![node("MatMul", &["x", "w"], &["h"]), node("Relu", &["h"], &["y"])];
        nodes[0].name = name.into();
        let m = Arc::new(import(&model(nodes, vec![w], "y")).unwrap());
        let x = Tensor::from_slice(&[2, 3], &[0.3f32, -1.0, 0.7, 2.0, 0.1, -0.4]).unwrap();
        let run = |precision| {
            let options = Options { threads: 1, precision, ..Options::default() };
            let mut session = Session::new(m.clone(), options).unwrap();
            let y = session.forward(&[("x".into(), x.clone())]).unwrap().remove(0).1;
            (y, session.usage().frozen)
        };
        let (single, half) = (run(Precision::F32), run(Precision::F16));
        assert_eq!(single.0.bytes(), half.0.bytes());
        assert_eq!(single.1, 4 * 3 * 2048);
        if m.weights[0].view_stored(&m.files).is_some() {
            assert_eq!(half.1, 0);
            mapped += 1;
        }
        // Of another type it is of no use.
        assert_eq!(run(Precision::Bf16).1, single.1);
    }
    assert!(mapped > 0);
}
