use std::sync::Arc;

use crate::exec::{Options, Precision, Session};
use crate::import::make::{attr, floats, import, model, node, with};
use crate::import::proto::{AttributeProto, NodeProto, TensorProto};
use crate::plan::Again;
use crate::tensor::{DType, Meta, Tensor};
use crate::train::optimizer::Optimizer;
use crate::train::step::by_squares;

const WIDTH: usize = 32;
const HIDDEN: usize = 512;

/// Two feed-forward layers, with what lies between as `dims`: weights after some steps, the arena, and what was computed again.
fn learned(options: Options, dims: &[usize], steps: usize) -> (Vec<f32>, usize, Again) {
    learned_from(Vec::new(), Vec::new(), "x".into(), options, dims, steps)
}

/// The same of layers that read `x`, and what `nodes` make of the model's own.
fn learned_from(
    mut nodes: Vec<NodeProto>,
    mut weights: Vec<TensorProto>,
    mut x: String,
    options: Options,
    dims: &[usize],
    steps: usize,
) -> (Vec<f32>, usize, Again) {
    for i in 0..2 {
        let name = |s: &str| format!("{s}{i}");
        let values =
            |n: usize| -> Vec<f32> { (0..n).map(|k| ((k * (i + 3)) as f32 * 0.7).sin() * 0.2).collect() };
        weights.push(floats(&name("up"), &[WIDTH as i64, HIDDEN as i64], &values(WIDTH * HIDDEN)));
        weights.push(floats(&name("bias"), &[HIDDEN as i64], &values(HIDDEN)));
        weights.push(floats(&name("down"), &[HIDDEN as i64, WIDTH as i64], &values(HIDDEN * WIDTH)));
        let y = if i == 1 { "y".to_string() } else { name("y") };
        nodes.push(node("MatMul", &[&x, &name("up")], &[&name("h")]));
        nodes.push(node("Add", &[&name("h"), &name("bias")], &[&name("b")]));
        nodes.push(node("Tanh", &[&name("b")], &[&name("a")]));
        nodes.push(node("MatMul", &[&name("a"), &name("down")], &[&name("d")]));
        nodes.push(node("Add", &[&name("d"), &x], &[&y]));
        x = y;
    }
    let m = Arc::new(import(&model(nodes, weights, "y")).unwrap());
    let meta = Meta::new(DType::F32, dims);
    let mut session = Session::new(m.clone(), options).unwrap();
    let step = by_squares::planned(&mut session, Optimizer::sgd(), &meta);
    let x: Vec<f32> = (0..meta.len()).map(|i| (i as f32 * 0.37).sin()).collect();
    let x = Tensor::from_slice(&meta.dims, &x).unwrap();
    let y: Vec<f32> = (0..meta.len()).map(|i| (i as f32 * 0.11).cos()).collect();
    let y = Tensor::from_slice(&meta.dims, &y).unwrap();
    by_squares::run(&mut session, &step, [&x, &y], 1e-3, steps);
    let changes = session.changes().unwrap();
    let values = changes.iter().flat_map(|c| c.1.to_f64()).map(|x| x as f32).collect();
    let plan = &step.program.plan;
    (values, plan.arena_bytes, plan.again)
}

fn options(arena: Option<usize>, precision: Precision, threads: usize) -> Options {
    Options { threads, arena, precision, ..Options::default() }
}

#[test]
fn hidden_units_in_pieces_teach_the_same() {
    // (12 samples make six pieces.)
    for (dims, precision, tolerance) in [
        (&[8, 16, WIDTH][..], Precision::F32, 1e-4),
        (&[96, WIDTH], Precision::F32, 1e-4),
        (&[12, 8, WIDTH], Precision::F32, 1e-4),
        (&[8, 16, WIDTH], Precision::Bf16, 5e-2),
    ] {
        let (usual, whole, _) = learned(options(None, Precision::F32, 2), dims, 3);
        let (pieces, small, again) = learned(options(Some(0), precision, 2), dims, 3);
        // The gradient of the activation alone reads two.
        let hidden = 2 * dims.iter().product::<usize>() / WIDTH * HIDDEN * 4;
        assert!(again.chains > 0 && small < whole && small < hidden, "{again:?}: {small} of {whole}");
        let first = learned(options(Some(0), precision, 1), dims, 3).0;
        assert!(first == pieces && first == learned(options(Some(0), precision, 4), dims, 3).0, "threads");
        let moved = |a: &[f32], b: &[f32]| {
            let squares = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2));
            squares.sum::<f64>().sqrt()
        };
        let start = learned(options(None, Precision::F32, 2), dims, 0).0;
        let (apart, all) = (moved(&usual, &pieces), moved(&usual, &start));
        assert!(apart <= tolerance * all, "{dims:?} {precision:?}: {apart} of {all}");
    }
}

/// What the layers read, and add to what they make, was computed as one matrix, and lies in that shape.
#[test]
fn what_is_read_in_another_shape_stays_whole() {
    let learned = |arena: Option<usize>| {
        let equation = AttributeProto { s: b"ntc,cd->ntd".to_vec().into(), ..attr("equation", 3) };
        let mix: Vec<f32> = (0..WIDTH * WIDTH).map(|k| (k as f32 * 0.3).sin() * 0.2).collect();
        let nodes = vec![with(node("Einsum", &["x", "mix"], &["mixed"]), equation)];
        let weights = vec![floats("mix", &[WIDTH as i64, WIDTH as i64], &mix)];
        learned_from(nodes, weights, "mixed".into(), options(arena, Precision::F32, 2), &[8, 16, WIDTH], 2)
    };
    let (usual, whole, _) = learned(None);
    let (within, small, _) = learned(Some(0));
    assert!(small < whole && usual.len() == within.len());
    assert!(usual.iter().zip(&within).all(|(a, b)| (a - b).abs() <= 1e-6));
}

#[test]
fn a_batch_of_one_stays_whole() {
    assert_eq!(learned(options(Some(0), Precision::F32, 1), &[1, 64, WIDTH], 1).2.chains, 0);
}
