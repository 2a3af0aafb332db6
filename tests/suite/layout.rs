//! Channels last inside, ONNX's order outside: same numbers, and hardly a conversion.

use std::path::Path;
use std::sync::Arc;

use retune::exec::{Options, Session};
use retune::graph::WeightId;
use retune::tensor::{DType, Meta, Tensor};
use retune::train::data::write_npz;
use retune::train::loss::Loss;
use retune::train::optimizer::Optimizer;
use retune::train::step::{Norm, Recipe, Shapes, Supervised};

use crate::common::{Arrays, fetched, json, relative, retune, shipped, text};
use crate::real_models::{ort, python, wave};

/// `retune grad` in both layouts: every output and gradient.
fn same_in_both(model: &Path, input: &str, x: &Tensor, classes: usize, mode: &str) {
    let dir = tempfile::tempdir().unwrap();
    let feeds = dir.path().join("in.npz");
    let labels: Vec<i64> = (0..x.dims()[0]).map(|i| (i * 7 % classes) as i64).collect();
    let target = Tensor::from_slice(&[labels.len()], &labels).unwrap();
    write_npz(&feeds, &[(input, x), ("target", &target)]).unwrap();
    let run = |layout: &str| {
        let out = dir.path().join(format!("{layout}.npz"));
        let done = retune()
            .args(["grad", text(model), "--inputs", text(&feeds), "--loss", "cross-entropy"])
            .args(["--mode", mode, "--output", text(&out)])
            .env("RETUNE_LAYOUT", layout)
            .output()
            .unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        Arrays::read(&out)
    };
    let (first, last) = (run("first"), run("last"));
    let largest = |t: &Tensor| t.to_f64().iter().fold(0.0f64, |m, x| m.max(x.abs()));
    let scale = first.with_prefix("grad.").map(|(_, t)| largest(t)).fold(0.0, f64::max);
    for (name, truth) in &first.0 {
        let ours = last.get(name);
        assert_eq!(ours.dims(), truth.dims(), "{name}");
        // A gradient that is zero but for rounding is compared with the largest one.
        let (mut a, mut b) = (truth.to_f64(), ours.to_f64());
        a.push(scale * 1e-4);
        b.push(scale * 1e-4);
        let e = relative(&a, &b);
        assert!(e <= 2e-3, "{} ({mode}): {name}: {e:.1e}", model.display());
    }
}

#[test]
fn gradients_do_not_depend_on_the_layout() {
    // A batch on which no activation lies on its kink: a flip would change whole gradients.
    let fixture = Arrays::read(&shipped("tests/fixtures/grad_mobilenetv2_train.npz"));
    for mode in ["train", "eval"] {
        for name in ["resnet20", "dsnet"] {
            let model = shipped(&format!("models/{name}.onnx"));
            same_in_both(&model, "image", &wave(&[4, 1, 28, 28]), 10, mode);
        }
        let mobilenet = shipped("tests/fixtures/mobilenetv2.onnx");
        same_in_both(&mobilenet, "image", fixture.get("in.image"), 10, mode);
    }
    let (Some(folder), Some(python)) = (fetched("light"), python()) else { return };
    for name in ["inception_v1", "shufflenet"] {
        let model = folder.join(format!("light_{name}.onnx"));
        let dir = tempfile::tempdir().unwrap();
        let random = dir.path().join(format!("{name}.onnx"));
        ort(&python, &["--randomise", text(&model), text(&random)]);
        let report = json(&["inspect", text(&random), "--json"], 0);
        let input = report["inputs"][0]["name"].as_str().unwrap();
        same_in_both(&random, input, &wave(&[1, 3, 224, 224]), 1000, "eval");
    }
}

/// A training step of every parameter on `x` images, and its session.
pub fn step(model: &Path, x: &[usize], threads: usize) -> (Session, Supervised) {
    step_by(model, x, Optimizer::sgd(), Options { threads, ..Options::default() })
}

/// The same by another optimizer, in a session of its own.
pub fn step_by(model: &Path, x: &[usize], optimizer: Optimizer, options: Options) -> (Session, Supervised) {
    let model = Arc::new(retune::import::load(model).unwrap());
    let mut session = Session::new(model.clone(), options).unwrap();
    let params = (0..model.weights.len() as u32).map(WeightId).filter(|w| model.weight(*w).trainable);
    let recipe = Recipe {
        loss: Loss::CrossEntropy { label_smoothing: 0.0 },
        optimizer,
        clip: None,
        params: params.collect(),
        norm: Norm::Batch,
        accumulate: 1,
    };
    recipe.prepare(&mut session).unwrap();
    let image = Meta::new(DType::F32, x);
    let shapes = Shapes { inputs: vec![("image".into(), image)], target: Meta::new(DType::I64, &x[..1]) };
    let step = Supervised::new(&mut session, &recipe, &shapes).unwrap();
    (session, step)
}

/// Kernel calls of a training step that permute more than a few elements, by their operand's dimensions.
fn transposes(model: &Path, x: &[usize]) -> Vec<Vec<usize>> {
    let (_, step) = step(model, x, 1);
    let calls = step.program.plan.steps.iter().filter(|s| s.op.name() == "Transpose");
    calls.map(|s| s.x[0].dims.to_vec()).filter(|d| d.iter().product::<usize>() > 4096).collect()
}

#[test]
fn only_the_input_is_converted() {
    let none: Vec<Vec<usize>> = Vec::new();
    // One channel: nothing to permute.
    assert_eq!(transposes(&shipped("models/resnet20.onnx"), &[8, 1, 28, 28]), none);
    let mobilenet = shipped("tests/fixtures/mobilenetv2.onnx");
    assert_eq!(transposes(&mobilenet, &[8, 3, 32, 32]), [[8, 3, 32, 32]]);
}

/// Teacher's features pass to the student as they lie.
#[test]
fn features_are_not_converted() {
    let model = shipped("models/resnet20.onnx");
    let args = ["bench", text(&model), "--batch", "4", "--threads", "1", "--runs", "1", "--mode", "icp"];
    let report = json(&[&args[..], &["--profile", "--json"]].concat(), 0);
    let calls = report["profile"].as_array().unwrap();
    assert!(calls.iter().any(|c| c["op"] == "Mse"));
    let transposes: Vec<_> = calls.iter().filter(|c| c["op"] == "Transpose").collect();
    assert!(transposes.is_empty(), "{transposes:?}");
}
