//! Quantised networks, trained in the form in which they are deployed.

use std::path::Path;
use std::process::Command;

use crate::common::{Arrays, json, root, shipped, text};
use crate::real_models::{ort, python};

fn accuracy(model: &Path, data: &Path) -> f64 {
    json(&["eval", text(model), "--data", text(data), "--json"], 0)["accuracy"].as_f64().unwrap()
}

/// By onnxruntime.
fn accuracy_there(python: &Path, model: &Path, data: &Path) -> f64 {
    let dir = tempfile::tempdir().unwrap();
    let (feeds, out) = (dir.path().join("in.npz"), dir.path().join("out.npz"));
    let arrays = Arrays::read(data);
    let input = retune::import::load(model).unwrap();
    let input = input.graph.value(input.graph.inputs[0]).name.clone();
    retune::train::data::write_npz(&feeds, &[(&input, arrays.get("x"))]).unwrap();
    ort(python, &[text(model), text(&feeds), text(&out)]);
    let scores = Arrays::read(&out).0.remove(0).1;
    let labels = arrays.get("y").to_ints().unwrap();
    let classes = scores.dims()[1];
    let scores = scores.to_f64();
    let best = |row: &[f64]| (0..classes).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap() as i64;
    let right = scores.chunks(classes).zip(&labels).filter(|(row, y)| best(row) == **y).count();
    right as f64 / labels.len() as f64
}

/// A ResNet whose weights are int8, per channel, and whose activations are uint8 between QuantizeLinear and
/// DequantizeLinear: trained straight through both, and exported as integers.
#[test]
fn a_qdq_network_finetunes() {
    let Some(python) = python() else { return };
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let images = ["models/fashion-images-idx3-ubyte.gz", "models/fashion-labels-idx1-ubyte.gz"].map(shipped);
    let out = Command::new(&python)
        .arg(root().join("tests/quantise.py"))
        .arg(shipped("models/resnet20.onnx"))
        .args(&images)
        .arg(dir.path())
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let (model, new, train, test) = (at("qdq.onnx"), at("new.onnx"), at("train.npz"), at("test.npz"));
    let (before, there) = (accuracy(&model, &test), accuracy_there(&python, &model, &test));
    assert!((before - there).abs() < 0.01, "{before}, in onnxruntime {there}");

    let report = json(&["inspect", text(&model), "--json"], 0);
    let weights: Vec<&serde_json::Value> =
        report["parameters"].as_array().unwrap().iter().filter(|p| p["dtype"] == "int8").collect();
    assert!(weights.len() == 22 && weights.iter().all(|w| w["trainable"] == true), "{report:#}");

    // Nothing to learn: the same bytes.
    let base = ["finetune", text(&model), "--data", text(&train), "--output", text(&new), "--json"];
    let options = ["--method", "supervised", "--holdout", "0", "--no-guard", "--epochs"];
    json(&[&base[..], &options, &["1", "--lr", "0"]].concat(), 0);
    assert!(std::fs::read(&model).unwrap() == std::fs::read(&new).unwrap());

    json(&[&base[..], &options, &["4", "--lr", "1e-3"]].concat(), 0);
    let (after, there) = (accuracy(&new, &test), accuracy_there(&python, &new, &test));
    println!("int8 ResNet on worn images: {before:.3} -> {after:.3}, in onnxruntime {there:.3}");
    assert!(after > before + 0.15 && (after - there).abs() < 0.01, "{before} -> {after}, {there}");

    // Only integers of weights and biases have changed.
    let loaded = retune::import::load(&model).unwrap();
    let (old, new) = (std::fs::read(&model).unwrap(), std::fs::read(&new).unwrap());
    assert_eq!(old.len(), new.len());
    let mut allowed = vec![false; old.len()];
    for w in loaded.weights.iter().filter(|w| w.trainable && w.quantised.is_some()) {
        allowed[w.location.offset..][..w.location.len].fill(true);
    }
    assert!((0..old.len()).all(|i| old[i] == new[i] || allowed[i]));
}
