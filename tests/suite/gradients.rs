//! `retune grad` against PyTorch (`tests/reference/`), and every optimizer against PyTorch's.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use retune::ops::update::{AdEMAMix, Adam, Sgd};
use retune::ops::{Op, eval};
use retune::tensor::Tensor;
use retune::train::data::write_npz;
use sha2::{Digest, Sha256};

use crate::common::{Arrays, run, shipped, text};

/// Relative to the largest element of each tensor (to the model's largest where PyTorch's is zero).
const TOLERANCE: f64 = 1e-3;

/// The largest error of `ours` against what a fixture stores of tensor `name` under `kind`.
pub fn error(fixture: &Arrays, kind: &str, name: &str, ours: &Tensor) -> f64 {
    let ours = ours.to_f64();
    let scale = fixture.get(&format!("scale.{name}")).to_f64()[0];
    let (at, truth): (Vec<usize>, Vec<f64>) = match fixture.find(&format!("{kind}.{name}")) {
        Some(whole) => ((0..ours.len()).collect(), whole.to_f64()),
        None => {
            // Each as its distance from the one before.
            let steps = fixture.get(&format!("index.{name}")).to_ints().unwrap();
            let index = steps.iter().scan(0, |at, step| {
                *at += *step as usize;
                Some(*at)
            });
            let norm = fixture.get(&format!("norm.{name}")).to_f64()[0];
            let own = ours.iter().map(|x| x * x).sum::<f64>().sqrt();
            assert!((own - norm).abs() <= 1e-3 * norm.max(scale), "{name}: norm {own}, not {norm}");
            (index.collect(), fixture.get(&format!("value.{name}")).to_f64())
        }
    };
    let worst = at.iter().zip(&truth).fold(0.0, |m: f64, (i, t)| m.max((ours[*i] - t).abs()));
    worst / scale
}

/// Fails when a fixture was made from another model file.
pub fn check_model(fixture: &Arrays, model: &Path) {
    let stored = fixture.get("model_sha256");
    let text: String = stored.bytes().iter().map(|b| *b as char).collect();
    let hash: Vec<u8> = Sha256::digest(std::fs::read(model).unwrap()).to_vec();
    let hex: String = hash.iter().map(|b| format!("{b:02x}")).collect();
    assert!(
        text == hex || stored.bytes() == hash.as_slice(),
        "{} is not the file that the fixture was made from: run tests/reference/make.sh",
        model.display()
    );
}

/// Names of the tensors that a fixture stores under `kind`, whole or sampled.
pub fn names<'a>(fixture: &'a Arrays, kind: &str) -> Vec<&'a str> {
    let prefix = format!("{kind}.");
    let whole = fixture.0.iter().filter_map(|(n, _)| n.strip_prefix(&prefix));
    let sampled = fixture.0.iter().filter_map(|(n, _)| n.strip_prefix("index."));
    whole.chain(sampled).collect()
}

fn equals_pytorch(model: PathBuf, mode: &str) {
    let name = model.file_stem().unwrap().to_string_lossy();
    let of = |mode: &str| Arrays::read(&shipped(&format!("tests/fixtures/grad_{name}_{mode}.npz")));
    let (fixture, images) = (of(mode), of("train"));
    check_model(&fixture, &model);
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in.npz"), dir.path().join("out.npz"));
    write_npz(&input, &[("image", images.get("in.image")), ("target", fixture.get("target"))]).unwrap();
    run(
        &[
            "grad",
            text(&model),
            "--inputs",
            text(&input),
            "--loss",
            "cross-entropy",
            "--mode",
            mode,
            "--output",
            text(&output),
        ],
        0,
    );
    let ours = Arrays::read(&output);
    let loss = fixture.get("loss").to_f64()[0];
    assert!((ours.get("loss").to_f64()[0] - loss).abs() <= 1e-4 * loss.abs());
    let names = names(&fixture, "grad");
    assert!(names.len() > 60, "{} tensors", names.len());
    assert_eq!(names.len(), ours.with_prefix("grad.").count(), "gradients of other tensors than PyTorch's");
    let mut worst = (0.0, "");
    for name in names {
        let e = error(&fixture, "grad", name, ours.get(&format!("grad.{name}")));
        assert!(e <= TOLERANCE, "{} {mode}: {name}: {e:.1e}", model.display());
        if e > worst.0 {
            worst = (e, name);
        }
    }
    println!("{} {mode}: largest error {:.1e} at {}", model.display(), worst.0, worst.1);
}

#[test]
fn resnet20_in_evaluation_mode() {
    equals_pytorch(shipped("models/resnet20.onnx"), "eval");
}

#[test]
fn resnet20_in_training_mode() {
    equals_pytorch(shipped("models/resnet20.onnx"), "train");
}

#[test]
fn mobilenetv2_in_evaluation_mode() {
    equals_pytorch(shipped("tests/fixtures/mobilenetv2.onnx"), "eval");
}

#[test]
fn mobilenetv2_in_training_mode() {
    equals_pytorch(shipped("tests/fixtures/mobilenetv2.onnx"), "train");
}

#[test]
fn optimizers_move_as_pytorchs() {
    let f = Arrays::read(&shipped("tests/fixtures/optimizers.npz"));
    let cases: HashMap<String, String> = serde_json::from_slice(f.get("cases").bytes()).unwrap();
    assert!(cases.len() >= 8);
    for (case, kind) in cases {
        let number = |key: &str| f.find(&format!("{case}.{key}")).map(|t| t.to_f64());
        let one = |key: &str| number(key).map_or(0.0, |v| v[0]);
        let betas = number("betas").unwrap_or_default();
        let weight_decay = one("weight_decay");
        let (op, states): (Box<dyn Op>, usize) = match kind.as_str() {
            "sgd" => {
                let momentum = one("momentum");
                let op = Sgd { momentum, nesterov: one("nesterov") != 0.0, weight_decay, salt: 0 };
                (Box::new(op), usize::from(momentum != 0.0))
            }
            "adam" | "adamw" => {
                let amsgrad = one("amsgrad") != 0.0;
                let op = Adam {
                    beta1: betas[0],
                    beta2: betas[1],
                    eps: one("eps"),
                    weight_decay,
                    decoupled: kind == "adamw",
                    amsgrad,
                    salt: 0,
                };
                (Box::new(op), if amsgrad { 3 } else { 2 })
            }
            "ademamix" => {
                let op = AdEMAMix {
                    beta1: betas[0],
                    beta2: betas[1],
                    beta3: betas[2],
                    alpha: one("alpha"),
                    eps: one("eps"),
                    weight_decay,
                    salt: 0,
                };
                (Box::new(op), 3)
            }
            other => panic!("{case}: optimizer {other}"),
        };
        let p0 = f.get(&format!("{case}.p0"));
        let n = p0.len();
        let (grads, path) = (f.get(&format!("{case}.grads")).to_f64(), f.get(&format!("{case}.p")).to_f64());
        let mut state = vec![p0.clone()];
        state.extend((0..states).map(|_| Tensor::zeros(p0.dtype(), p0.dims())));
        for (t, (g, want)) in grads.chunks(n).zip(path.chunks(n)).enumerate() {
            let g: Vec<f32> = g.iter().map(|x| *x as f32).collect();
            let g = Tensor::from_slice(&[n], &g).unwrap();
            let hyper = Tensor::from_slice(&[2], &[one("lr"), (t + 1) as f64]).unwrap();
            let mut inputs = vec![Some(&state[0]), Some(&g), Some(&hyper), None];
            inputs.extend(state[1..].iter().map(Some));
            state = eval(op.as_ref(), &inputs).unwrap();
            let largest = want.iter().zip(p0.to_f64()).fold(1e-12, |m: f64, (a, b)| m.max((a - b).abs()));
            for (i, (a, b)) in state[0].to_f64().iter().zip(want).enumerate() {
                let slack = 1e-4 * largest + 1e-6 * b.abs();
                assert!((a - b).abs() <= slack, "{case}: step {t}, element {i}: {a}, PyTorch {b}");
            }
        }
    }
}

#[test]
fn schedules_are_pytorchs() {
    use retune::icp::{Icp, Settings};
    use retune::train::method::At;
    use retune::train::schedule::{Schedule, Shape};

    let text = std::fs::read(shipped("tests/fixtures/schedules.json")).unwrap();
    let all: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let number = |v: &serde_json::Value, key: &str| v[key].as_f64().unwrap_or(0.0);
    let cases = all["learning_rate"].as_array().unwrap();
    assert!(cases.len() >= 6);
    for c in cases {
        let shape = match c["kind"].as_str().unwrap() {
            "constant" => Shape::Constant,
            "cosine" => Shape::Cosine,
            "step" => Shape::Step { every: number(c, "step_size") as usize, gamma: number(c, "gamma") },
            other => panic!("schedule {other}"),
        };
        let schedule = Schedule { shape, warmup: number(c, "warmup") as usize };
        let total = number(c, "total") as usize;
        for (step, want) in c["rates"].as_array().unwrap().iter().enumerate() {
            let (want, ours) = (want.as_f64().unwrap(), number(c, "lr") * schedule.factor(step, total));
            assert!((want - ours).abs() <= 1e-9, "{} step {step}: {ours}, PyTorch {want}", c["kind"]);
        }
    }
    for c in all["icp_alpha"].as_array().unwrap() {
        let icp = Icp::new(Settings { warmup: number(c, "warmup_fraction"), ..Settings::default() });
        let epochs = number(c, "epochs") as usize;
        for (epoch, want) in c["alphas"].as_array().unwrap().iter().enumerate() {
            let at = At { epoch, epochs, step: epoch, steps: epochs, seed: 0 };
            match (icp.alpha_at(&at), want.as_f64()) {
                (None, None) => {}
                (Some(a), Some(b)) => assert!((a - b).abs() < 1e-9, "epoch {epoch} of {epochs}: {a}, {b}"),
                (a, b) => panic!("epoch {epoch} of {epochs}: {a:?}, {b:?}"),
            }
        }
    }
}
