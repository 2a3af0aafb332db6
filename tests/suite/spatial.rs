//! Recurrent layers, transposed convolution, resizing and grid sampling: output and gradients against PyTorch's.

use retune::train::data::write_npz;

use crate::common::{Arrays, json, relative, run, shipped, text};
use crate::gradients::check_model;

/// Relative to the largest element of each tensor.
const TOLERANCE: f64 = 1e-4;

fn equals_pytorch(name: &str) {
    let model = shipped(&format!("tests/fixtures/spatial_{name}.onnx"));
    let fixture = Arrays::read(&shipped(&format!("tests/fixtures/spatial_{name}.npz")));
    check_model(&fixture, &model);
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in.npz"), dir.path().join("out.npz"));
    let mut fed: Vec<(&str, &_)> = fixture.with_prefix("in.").collect();
    fed.push(("target", fixture.get("target")));
    write_npz(&input, &fed).unwrap();
    let args = ["grad", text(&model), "--inputs", text(&input), "--loss", "mse", "--output", text(&output)];
    run(&args, 0);
    let ours = Arrays::read(&output);
    let loss = fixture.get("loss").to_f64()[0];
    assert!((ours.get("loss").to_f64()[0] - loss).abs() <= 1e-5 * loss, "{name}: loss");
    let mut worst = (0.0, "output.y");
    let gradients = fixture.0.iter().filter(|(n, _)| n.starts_with("grad.") || n.starts_with("output."));
    for (tensor, truth) in gradients {
        let e = relative(&truth.to_f64(), &ours.get(tensor).to_f64());
        assert!(e <= TOLERANCE, "{name}: {tensor}: {e:.1e}");
        if e >= worst.0 {
            worst = (e, tensor);
        }
    }
    let of = |a: &Arrays| a.with_prefix("grad.").count();
    assert_eq!(of(&fixture), of(&ours), "{name}: gradients of other tensors than PyTorch's");
    println!("{name}: {} gradients, largest error {:.1e} at {}", of(&ours), worst.0, worst.1);
}

#[test]
fn recurrent_layers() {
    ["lstm", "gru"].into_iter().for_each(equals_pytorch);
}

#[test]
fn transposed_convolution() {
    equals_pytorch("conv_transpose");
}

#[test]
fn resizing() {
    ["bilinear", "bilinear_corners", "bicubic"].into_iter().for_each(equals_pytorch);
}

#[test]
fn grid_sampling() {
    ["grid_bilinear", "grid_reflection", "grid_bicubic", "grid_volume"].into_iter().for_each(equals_pytorch);
}

/// Weights, recurrent weights and biases train.
#[test]
fn recurrent_weights_are_trainable() {
    let model = shipped("tests/fixtures/spatial_lstm.onnx");
    let report = json(&["inspect", text(&model), "--json"], 0);
    let trainable = |p: &&serde_json::Value| p["trainable"] == true;
    let names: Vec<&str> = report["parameters"]
        .as_array()
        .unwrap()
        .iter()
        .filter(trainable)
        .map(|p| p["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["w0", "r0", "b0", "w1", "r1", "b1"]);
}
