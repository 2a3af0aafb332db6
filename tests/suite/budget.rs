//! `--memory-budget`: the same weights within less memory.

use std::path::Path;
use std::sync::Arc;

use retune::exec::{Options, Session};
use retune::graph::WeightId;
use retune::plan::Again;
use retune::tensor::{DType, Meta, Tensor, View};
use retune::train::loss::Loss;
use retune::train::optimizer::Optimizer;
use retune::train::step::{self, Norm, Recipe, Shapes, Supervised};

use crate::common::shipped;

/// A step's arena, its loss, all states after three steps, and what is computed again, in an arena of at most `arena` bytes.
fn steps(
    model: &Path,
    (name, image): (&str, &Meta),
    arena: Option<usize>,
    optimizer: Optimizer,
) -> (usize, f64, Vec<Vec<u8>>, Again) {
    let model = Arc::new(retune::import::load(model).unwrap());
    let options = Options { threads: 2, arena, ..Options::default() };
    let mut session = Session::new(model.clone(), options).unwrap();
    let loss = Loss::CrossEntropy { label_smoothing: 0.0 };
    let image = image.clone();
    let target = Meta::new(DType::I64, &image.dims[..1]);
    let shapes = Shapes { inputs: vec![(name.into(), image.clone())], target: target.clone() };
    let reached = step::reached(&session, &loss, &shapes).unwrap();
    let ids = (0..model.weights.len() as u32).map(WeightId);
    let params = ids.filter(|w| model.weight(*w).trainable && reached[w.index()]).collect();
    let recipe = Recipe { loss, optimizer, clip: None, params, norm: Norm::Batch, accumulate: 1 };
    recipe.prepare(&mut session).unwrap();
    let step = Supervised::new(&mut session, &recipe, &shapes).unwrap();
    let x: Vec<f64> = (0..image.len()).map(|i| ((i as f64) * 0.37).sin() * 2.0 + 2.0).collect();
    let x = Tensor::from_slice(&image.dims, &x).unwrap().cast(image.dtype);
    let labels: Vec<i64> = (0..target.len() as i64).map(|i| i % 3).collect();
    let y = Tensor::from_slice(&target.dims, &labels).unwrap();
    let fed: [(_, View); 2] = [(step.inputs[0], x.view()), (step.attached.target, y.view())];
    let mut last = 0.0;
    for t in 0..3 {
        step::set_step(&mut session, 1e-3, t + 1);
        session.run(&step.program, &fed, t as u64).unwrap();
        last = session.scalar(&step.program, step.attached.loss).unwrap();
    }
    let store = session.store();
    let states = store.ids().map(|s| store.tensor(s).bytes().to_vec()).collect();
    (step.program.plan.arena_bytes, last, states, step.program.plan.again)
}

#[test]
fn less_memory_gives_the_same_bytes() {
    let image = |dims: &[usize]| Meta::new(DType::F32, dims);
    // The share of the usual arena that is enough: of some networks a few kernels alone take much.
    for (model, name, input, enough) in [
        ("models/resnet20.onnx", "image", image(&[8, 1, 28, 28]), 0.5),
        ("models/dsnet.onnx", "image", image(&[8, 1, 28, 28]), 0.7),
        ("tests/fixtures/mobilenetv2.onnx", "image", image(&[4, 3, 32, 32]), 0.7),
    ] {
        let model = shipped(model);
        let adam = Optimizer::adam(0.0, true);
        let whole = steps(&model, (name, &input), None, adam);
        let smallest = steps(&model, (name, &input), Some(0), adam);
        assert!(whole.2 == smallest.2 && whole.1 == smallest.1, "{}", model.display());
        println!(
            "{}: {} bytes of arena, at least {}: {:.0}% more work",
            model.display(),
            whole.0,
            smallest.0,
            smallest.3.work * 100.0
        );
        assert!((smallest.0 as f64) < enough * whole.0 as f64, "{} of {}", smallest.0, whole.0);
        for share in [0.8, 0.5] {
            let limit = (whole.0 as f64 * share) as usize;
            let some = steps(&model, (name, &input), Some(limit), adam);
            println!("  {share}: {} kernels again, {:.1}% more work", some.3.kernels, some.3.work * 100.0);
            if limit as f64 >= 1.1 * smallest.0 as f64 {
                assert!(some.0 <= limit, "{} of {limit}", some.0);
            }
            assert!(whole.2 == some.2, "{} in {share}", model.display());
        }
    }
}
