//! One ICP step against PyTorch, written from the paper's equations (`tests/reference/icp.py`).

use std::sync::Arc;

use retune::exec::{Options, Session};
use retune::graph::WeightId;
use retune::icp::{Alpha, Icp, Settings, Taps, Weights};
use retune::import::Role;
use retune::tensor::Tensor;
use retune::train::data::Dataset;
use retune::train::loss::Loss;
use retune::train::method::{At, Method};
use retune::train::optimizer::Optimizer;
use retune::train::step::{Norm, Recipe, set_step};

use crate::common::{Arrays, shipped};
use crate::gradients::{check_model, error, names};

fn one_step(fixture: &str, perturber: Optimizer) {
    let f = Arrays::read(&shipped(fixture));
    let images = Arrays::read(&shipped("tests/fixtures/icp_images.npz"));
    let path = shipped("models/resnet20.onnx");
    check_model(&f, &path);
    let number = |key: &str| f.get(key).to_f64()[0];
    let model = Arc::new(retune::import::load(&path).unwrap());
    let mut session = Session::new(model.clone(), Options::default()).unwrap();
    let params: Vec<WeightId> =
        (0..model.weights.len() as u32).map(WeightId).filter(|w| model.weight(*w).trainable).collect();
    let recipe = Recipe {
        loss: Loss::CrossEntropy { label_smoothing: 0.0 },
        optimizer: Optimizer::sgd(),
        clip: None,
        params: params.clone(),
        norm: Norm::Batch,
        accumulate: 1,
    };
    recipe.prepare(&mut session).unwrap();
    let before: Vec<Tensor> = params.iter().map(|w| session.weight(*w).unwrap()).collect();
    let data =
        Dataset::from_arrays(vec![("x".into(), images.get("x").clone())], Some(images.get("y").clone()))
            .unwrap();
    let data = data.bind(&retune::finetune::input_specs(&model)).unwrap();
    let mut batch = data.new_batch(data.len());
    data.batch(&(0..data.len()).collect::<Vec<_>>(), None, &mut batch).unwrap();

    let taps: Vec<String> = serde_json::from_slice(f.get("taps").bytes()).unwrap();
    let mut icp = Icp::new(Settings {
        perturber,
        steps: number("steps") as usize,
        epsilon: number("epsilon"),
        alpha: Alpha::Fixed(number("alpha")),
        weights: Weights::Cosine,
        taps: Taps::Auto,
        warmup: 0.0,
        ..Settings::paper()
    });
    let shapes = retune::train::step::Shapes::of(&batch).unwrap();
    assert_eq!(icp.tap_names(&session, &shapes).unwrap(), taps, "automatic taps");

    let perturbed = icp.perturbed(&mut session, &recipe, &batch).unwrap();
    let want = f.get("perturb_losses").to_f64();
    for (k, (a, b)) in perturbed.losses.iter().zip(&want).enumerate() {
        assert!((a - b).abs() <= 2e-4 * b.abs().max(1e-3), "loss at perturbation step {k}: {a}, PyTorch {b}");
    }
    let (x, xk, stable) =
        (images.get("x").to_f64(), f.get("xk").to_f64(), f.get("stable").to_ints().unwrap());
    let largest = x.iter().zip(&xk).fold(0.0, |m: f64, (a, b)| m.max((a - b).abs()));
    let firm = stable.iter().filter(|s| **s != 0).count();
    assert!(firm * 100 >= stable.len() * 99, "{firm} of {} elements are well defined", stable.len());
    for (i, ours) in perturbed.inputs[0].1.to_f64().iter().enumerate().filter(|(i, _)| stable[*i] != 0) {
        assert!((ours - xk[i]).abs() <= 4e-4 * largest, "x^K at {i}: {ours}, PyTorch {}", xk[i]);
    }

    set_step(&mut session, number("lr"), 1);
    let at = At { epoch: 0, epochs: 1, step: 0, steps: 1, seed: 0 };
    let learned = icp.learn(&mut session, &recipe, &batch, &at).unwrap();
    for (what, ours, key) in [
        ("task loss", learned.task, "loss_task"),
        ("feature loss", learned.features.unwrap(), "loss_feat"),
        ("loss", learned.loss, "loss"),
        ("gradient norm", learned.norm.unwrap(), "grad_norm"),
    ] {
        let truth = number(key);
        assert!((ours - truth).abs() <= 1e-3 * truth.abs(), "{what}: {ours}, PyTorch {truth}");
    }
    let moved = names(&f, "delta");
    assert_eq!(moved.iter().filter(|n| !n.starts_with("clip.")).count(), params.len());
    for (w, before) in params.iter().zip(&before) {
        let weight = model.weight(*w);
        let after = session.weight(*w).unwrap().to_f64();
        let delta: Vec<f64> = after.iter().zip(before.to_f64()).map(|(a, b)| a - b).collect();
        let delta = Tensor::from_slice(before.dims(), &delta).unwrap();
        let e = error(&f, "delta", &weight.name, &delta);
        assert!(e <= 1e-3, "{}: movement is off by {e:.1e} of its largest", weight.name);
    }
    for (i, w) in model.weights.iter().enumerate() {
        if matches!(w.role, Role::RunningMean | Role::RunningVar) {
            let truth = f.get(&format!("running.{}", w.name)).to_f64();
            let ours = session.weight(WeightId(i as u32)).unwrap().to_f64();
            let e = crate::common::relative(&truth, &ours);
            assert!(e <= 1e-4, "{}: {e:.1e}", w.name);
        }
    }
}

#[test]
fn sgd_perturber() {
    one_step("tests/fixtures/icp_sgd.npz", Optimizer::sgd());
}

#[test]
fn adam_perturber() {
    one_step("tests/fixtures/icp_adam.npz", Optimizer::adam(0.0, false));
}

#[test]
fn ademamix_perturber() {
    one_step("tests/fixtures/icp_ademamix.npz", Optimizer::ademamix(0.0));
}
