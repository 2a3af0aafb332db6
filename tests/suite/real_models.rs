//! Deployed networks as they are found, against onnxruntime.

use std::path::{Path, PathBuf};
use std::process::Command;

use retune::tensor::Tensor;
use retune::train::data::write_npz;

use crate::common::{Arrays, LIGHT, all, fetched, input_dims, json, relative, root, run, shipped, text};

/// The Python that has onnxruntime, or `None` with a printed line.
pub fn python() -> Option<PathBuf> {
    fetched("venv/bin/python")
}

/// Runs `tests/ort.py`.
pub fn ort(python: &Path, args: &[&str]) {
    let out = Command::new(python).arg(root().join("tests/ort.py")).args(args).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

/// Smooth values in -1..1 that differ from place to place.
pub fn wave(dims: &[usize]) -> Tensor {
    let n: usize = dims.iter().product();
    let x: Vec<f32> = (0..n).map(|i| ((i as f32) * 0.37).sin() * ((i as f32) * 0.011).cos()).collect();
    Tensor::from_slice(dims, &x).unwrap()
}

/// Every output within 1e-4 of its largest element of what onnxruntime computes, without its optimisations.
pub fn equals_onnxruntime_on(python: &Path, model: &Path, fed: &[(&str, &Tensor)]) {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (feeds, ours, theirs) = (at("in.npz"), at("ours.npz"), at("theirs.npz"));
    write_npz(&feeds, fed).unwrap();
    run(&["run", text(model), "--inputs", text(&feeds), "--output", text(&ours)], 0);
    ort(python, &[text(model), text(&feeds), text(&theirs)]);
    let (ours, theirs) = (Arrays::read(&ours), Arrays::read(&theirs));
    assert_eq!(ours.0.len(), theirs.0.len());
    for (name, truth) in &theirs.0 {
        assert_eq!(ours.get(name).dims(), truth.dims());
        let e = relative(&truth.to_f64(), &ours.get(name).to_f64());
        println!("{}: {name} {:?}: {e:.1e}", model.display(), truth.dims());
        assert!(e <= 1e-4, "{}: {name}: {e:.1e}", model.display());
    }
}

fn equals_onnxruntime(python: &Path, model: &Path, input: &str, x: &Tensor) {
    equals_onnxruntime_on(python, model, &[(input, x)]);
}

#[test]
fn shipped_networks_equal_onnxruntime() {
    let Some(python) = python() else { return };
    for name in ["resnet20", "dsnet"] {
        equals_onnxruntime(
            &python,
            &shipped(&format!("models/{name}.onnx")),
            "image",
            &wave(&[5, 1, 28, 28]),
        );
    }
    let mobilenet = shipped("tests/fixtures/mobilenetv2.onnx");
    equals_onnxruntime(&python, &mobilenet, "image", &wave(&[3, 3, 32, 32]));
}

#[test]
fn ppocr_classifier_equals_onnxruntime() {
    let (Some(model), Some(python)) = (fetched("ppocr/cls.onnx"), python()) else { return };
    equals_onnxruntime(&python, &model, "x", &wave(&[4, 3, 48, 192]));
}

#[test]
fn ppocr_classifier_parameters_have_their_roles() {
    let Some(model) = fetched("ppocr/cls.onnx") else { return };
    let report = json(&["inspect", text(&model), "--json"], 0);
    let parameters = report["parameters"].as_array().unwrap();
    let count = |role: &str| parameters.iter().filter(|p| p["role"] == role).count();
    assert_eq!(
        (count("scale"), count("shift"), count("running-mean"), count("running-var")),
        (35, 35, 35, 35)
    );
    let convolutions = report["ops"]["Conv"].as_u64().unwrap();
    let dense = report["ops"]["MatMul"].as_u64().unwrap_or(0) + report["ops"]["Gemm"].as_u64().unwrap_or(0);
    assert_eq!(count("weight") as u64, convolutions + dense);
    let elements = |p: &serde_json::Value| -> u64 {
        p["shape"].as_array().unwrap().iter().map(|d| d.as_u64().unwrap()).product()
    };
    for p in parameters.iter().filter(|p| p["trainable"] == true) {
        assert!(elements(p) > 1, "a scalar trains: {p}");
    }
    assert_eq!(report["blockers"].as_array().unwrap().len(), 0);
}

/// The nine networks of ONNX's `light` folder, with the outputs that it ships.
#[test]
fn light_networks_give_their_outputs() {
    let Some(folder) = fetched("light") else { return };
    for name in LIGHT {
        let model = folder.join(format!("light_{name}.onnx"));
        let expected = folder.join(format!("light_{name}_output_0.pb"));
        let report = json(&["inspect", text(&model), "--json"], 0);
        let (input, dims) = (&report["inputs"][0], input_dims(&report));
        let n: usize = dims.iter().product();
        // How the outputs were made: the input counts up from 0 to 1.
        let x: Vec<f32> = (0..n).map(|i| i as f32 / n as f32).collect();
        let x = Tensor::from_slice(&dims, &x).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (feeds, ours) = (dir.path().join("in.npz"), dir.path().join("out.npz"));
        write_npz(&feeds, &[(input["name"].as_str().unwrap(), &x)]).unwrap();
        run(&["run", text(&model), "--inputs", text(&feeds), "--output", text(&ours)], 0);
        let truth = retune::backend_test::read_tensor(&expected).unwrap();
        let e = relative(&truth.to_f64(), &Arrays::read(&ours).0[0].1.to_f64());
        println!("{}: {e:.1e}", model.display());
        assert!(e <= 1e-4, "{}: {e:.1e}", model.display());
    }
}

/// Their shipped weights are all alike; random ones tell kernels apart.
#[test]
fn light_networks_with_random_weights_equal_onnxruntime() {
    let (Some(folder), Some(python)) = (fetched("light"), python()) else { return };
    let names: &[&str] = match all() {
        true => LIGHT,
        false => &["densenet121", "inception_v1", "resnet50", "shufflenet", "squeezenet"],
    };
    for name in names {
        let model = folder.join(format!("light_{name}.onnx"));
        let dir = tempfile::tempdir().unwrap();
        let random = dir.path().join(format!("{name}.onnx"));
        ort(&python, &["--randomise", text(&model), text(&random)]);
        let report = json(&["inspect", text(&random), "--json"], 0);
        let (input, dims) = (&report["inputs"][0], input_dims(&report));
        equals_onnxruntime(&python, &random, input["name"].as_str().unwrap(), &wave(&dims));
    }
}
