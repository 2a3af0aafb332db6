use std::sync::Arc;

use crate::exec::{Options, Session};
use crate::import::Model;
use crate::import::make::{attr, floats, import, ints, model, node, ramp, with};
use crate::import::proto::AttributeProto;
use crate::plan::Plan;
use crate::tensor::{DType, Meta, Tensor};
use crate::train::optimizer::Optimizer;
use crate::train::step::by_squares;

/// The weights after some steps that learn the waves they are given, within so much memory, and the plan.
fn trained(
    m: &Arc<Model>,
    meta: &Meta,
    optimizer: Optimizer,
    arena: Option<usize>,
    rate: f64,
    steps: usize,
) -> (Vec<Vec<u8>>, Plan) {
    let options = Options { threads: 1, arena, ..Options::default() };
    let mut session = Session::new(m.clone(), options).unwrap();
    let step = by_squares::planned(&mut session, optimizer, meta);
    let x: Vec<f32> = (0..meta.len()).map(|i| (i as f32 * 0.37).sin()).collect();
    let x = Tensor::from_slice(&meta.dims, &x).unwrap();
    by_squares::run(&mut session, &step, [&x, &x], rate, steps);
    let bytes = session.changes().unwrap().iter().map(|c| c.1.bytes().to_vec()).collect();
    (bytes, step.program.plan)
}

/// Layers with dropout and what else draws random numbers: the same ones the second time.
#[test]
fn what_is_computed_again_draws_the_same_numbers() {
    let (mut nodes, mut weights, mut x) = (Vec::new(), Vec::new(), "x".to_string());
    for i in 0..5 {
        let [w, h, d, n, a, y] = ["w", "h", "d", "n", "a", "y"].map(|s| format!("{s}{i}"));
        let y = if i == 4 { "y".to_string() } else { y };
        let values: Vec<f32> = (0..64 * 64).map(|k| ((k * (i + 3)) as f32 * 0.7).sin() * 0.2).collect();
        weights.push(floats(&w, &[64, 64], &values));
        nodes.push(node("MatMul", &[&x, &w], &[&h]));
        nodes.push(node("Dropout", &[&h], &[&d]));
        nodes.push(node("RandomNormalLike", &[&d], &[&n]));
        nodes.push(node("Mul", &[&d, &n], &[&a]));
        nodes.push(node("Tanh", &[&a], &[&y]));
        x = y;
    }
    let m = Arc::new(import(&model(nodes, weights, "y")).unwrap());
    let meta = Meta::new(DType::F32, &[32, 64]);
    let run = |arena| trained(&m, &meta, Optimizer::adam(0.0, true), arena, 1e-2, 3);
    let (usual, plan) = run(None);
    let (small, within) = run(Some(0));
    assert!(within.arena_bytes < plan.arena_bytes, "{} and {}", within.arena_bytes, plan.arena_bytes);
    let again = |name: &str| within.steps.iter().any(|s| s.op.name() == name && s.draws_as != s.node);
    assert!(within.again.kernels > 0 && again("Dropout"), "{:?}", within.again);
    assert!(usual == small);
    assert!(usual.iter().flatten().any(|b| *b != 0));
}

/// Weights that are read in another shape: nothing that reads them is computed again once they have followed their gradients.
#[test]
fn what_is_computed_again_reads_the_same_weights() {
    let (mut nodes, mut weights, mut x) = (Vec::new(), vec![ints("shape", &[1, 64])], "x".to_string());
    for i in 0..6 {
        let [w, s, h, u, a, y] = ["w", "s", "h", "u", "a", "y"].map(|s| format!("{s}{i}"));
        let y = if i == 5 { "y".to_string() } else { y };
        let wave = |n: usize, f: f32| (0..n).map(|k| (k as f32 * f).sin() * 0.3).collect::<Vec<f32>>();
        weights.push(floats(&w, &[64, 64], &wave(64 * 64, 0.7)));
        weights.push(floats(&s, &[64], &wave(64, 0.3)));
        nodes.push(node("MatMul", &[&x, &w], &[&h]));
        nodes.push(node("Reshape", &[&s, "shape"], &[&u]));
        nodes.push(node("Mul", &[&h, &u], &[&a]));
        nodes.push(node("Tanh", &[&a], &[&y]));
        x = y;
    }
    let m = Arc::new(import(&model(nodes, weights, "y")).unwrap());
    let meta = Meta::new(DType::F32, &[32, 64]);
    let run = |arena| trained(&m, &meta, Optimizer::sgd(), arena, 1.0, 2);
    let (usual, plan) = run(None);
    for arena in [0, plan.arena_bytes / 2, plan.arena_bytes * 2 / 3, plan.arena_bytes * 4 / 5] {
        let (within, again) = run(Some(arena));
        assert!(again.again.kernels > 0 || again.arena_bytes > arena, "{arena}: {:?}", again.again);
        assert!(usual == within, "{arena} bytes, {:?}", again.again);
    }
}

/// Layers that read all layers before them, as a DenseNet's do: their results are kept, and joined again for each gradient.
#[test]
fn what_several_are_computed_of_is_kept() {
    let (mut nodes, mut weights) = (Vec::new(), Vec::new());
    let mut made = vec!["x".to_string()];
    for i in 0..8 {
        let [w, c] = ["w", "c"].map(|s| format!("{s}{i}"));
        let y = if i == 7 { "y".to_string() } else { format!("y{i}") };
        let rows = 64 * made.len();
        let values: Vec<f32> = (0..rows * 64).map(|k| ((k * (i + 3)) as f32 * 0.7).sin() * 0.2).collect();
        weights.push(floats(&w, &[rows as i64, 64], &values));
        let all: Vec<&str> = made.iter().map(String::as_str).collect();
        let axis = AttributeProto { i: 1, ..attr("axis", 2) };
        nodes.push(with(node("Concat", &all, &[&c]), axis));
        nodes.push(node("MatMul", &[&c, &w], &[&y]));
        made.push(y);
    }
    let m = Arc::new(import(&model(nodes, weights, "y")).unwrap());
    let meta = Meta::new(DType::F32, &[512, 64]);
    let run = |arena| trained(&m, &meta, Optimizer::sgd(), arena, 1e-2, 2);
    let (usual, plan) = run(None);
    let limit = plan.arena_bytes * 3 / 4;
    let (small, within) = run(Some(limit));
    assert!(within.arena_bytes <= limit, "{} of {limit}", within.arena_bytes);
    let again: Vec<&str> =
        within.steps.iter().filter(|s| s.draws_as != s.node).map(|s| s.op.name()).collect();
    assert!(again.len() > 2 && again.iter().all(|name| *name == "Concat"), "{again:?}");
    assert!(usual == small);
}

/// Gradients are followed one by one, not all at the end.
#[test]
fn gradients_die_early() {
    let gradients = |arena: Option<usize>| {
        let (mut nodes, mut weights, mut x) = (Vec::new(), Vec::new(), "x".to_string());
        for i in 0..6 {
            let [w, y] = ["w", "y"].map(|s| format!("{s}{i}"));
            let y = if i == 5 { "y".to_string() } else { y };
            weights.push(ramp(&w, &[128, 128]));
            nodes.push(node("MatMul", &[&x, &w], &[&y]));
            x = y;
        }
        let m = Arc::new(import(&model(nodes, weights, "y")).unwrap());
        let meta = Meta::new(DType::F32, &[2, 128]);
        let options = Options { threads: 1, arena, dry: true, ..Options::default() };
        let mut session = Session::new(m.clone(), options).unwrap();
        let step = by_squares::planned(&mut session, Optimizer::adam(0.0, true), &meta);
        step.program.plan.arena_bytes / (128 * 128 * 4)
    };
    assert!(gradients(None) >= 6);
    assert!(gradients(Some(usize::MAX)) <= 3);
}
