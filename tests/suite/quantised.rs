//! Quantised networks, trained in the form in which they are deployed.

use std::path::Path;
use std::process::Command;

use crate::common::{Arrays, all, fetched, json, relative, root, run, shipped, text};
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

    only_integers_of_weights_differ(&model, &new);
}

/// Nothing else has changed: names, scales, zero points, structure.
fn only_integers_of_weights_differ(model: &Path, new: &Path) {
    let loaded = retune::import::load(model).unwrap();
    let (old, new) = (std::fs::read(model).unwrap(), std::fs::read(new).unwrap());
    assert_eq!(old.len(), new.len());
    let mut allowed = vec![false; old.len()];
    for w in loaded.weights.iter().filter(|w| w.trainable && w.quantised.is_some()) {
        allowed[w.location.offset..][..w.location.len].fill(true);
    }
    assert!((0..old.len()).all(|i| old[i] == new[i] || allowed[i]));
}

/// Quantised with ranges that are too tight for the camera, a network loses points; finetuned as it is deployed, it gets
/// most of them back, on images that no step has seen.
#[test]
fn what_quantisation_lost_is_recovered() {
    if !all() {
        println!("skipped: a long test (RETUNE_TEST_ALL=1)");
        return;
    }
    let files = ["train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"]
        .map(|name| fetched(&format!("fashion/{name}-ubyte.gz")));
    let (Some(python), [Some(images), Some(labels), Some(test_images), Some(test_labels)]) =
        (python(), files)
    else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let script = |args: &[&str]| {
        let out = Command::new(&python).arg(root().join("tests/quantise.py")).args(args).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    };
    let (train, test) = (at("train.npz"), at("test.npz"));
    script(&["--worn", text(&images), text(&labels), "0", "2000", text(&train)]);
    script(&["--worn", text(&test_images), text(&test_labels), "0", "4000", text(&test)]);
    let (float, quantised, new) = (at("float.onnx"), at("qdq.onnx"), at("new.onnx"));
    let finetune = |model: &Path, new: &Path, epochs: &str, lr: &str| {
        let base = ["finetune", text(model), "--data", text(&train), "--output", text(new), "--json"];
        let options =
            ["--method", "supervised", "--holdout", "0", "--no-guard", "--epochs", epochs, "--lr", lr];
        assert_eq!(json(&[&base[..], &options].concat(), 0)["verified"], "agrees");
    };
    finetune(&shipped("models/resnet20.onnx"), &float, "4", "2e-3");
    script(&["--tight", text(&float), text(&images), text(&quantised)]);
    finetune(&quantised, &new, "3", "1e-3");
    ort(&python, &["--check", text(&new)]);
    only_integers_of_weights_differ(&quantised, &new);

    let here = [&float, &quantised, &new].map(|model| accuracy(model, &test));
    let there = [&float, &quantised, &new].map(|model| accuracy_there(&python, model, &test));
    println!("float, quantised, finetuned: {here:.4?}, in onnxruntime {there:.4?}");
    for [float, lossy, recovered] in [here, there] {
        assert!(float - lossy >= 0.03, "quantisation loses {:.4}", float - lossy);
        assert!(recovered - lossy >= (float - lossy) / 2.0, "{float} -> {lossy} -> {recovered}");
    }
    assert!(here.iter().zip(&there).all(|(a, b)| (a - b).abs() < 0.01));
}

/// Recurrent layers that onnxruntime's quantiser made integers of: they run, and are refused for training with all that
/// is the reason.
#[test]
fn an_int8_recurrent_network_runs_and_is_refused() {
    let folder = shipped("tests/fixtures/quantised/recurrent");
    let model = folder.join("model.onnx");
    let report = json(&["test", text(&folder), "--json"], 0);
    assert_eq!(
        (&report["summary"]["passed"], &report["summary"]["failed"]),
        (&1.into(), &0.into()),
        "{report:#}"
    );
    // Nearer than that: a rounding that went another way would show.
    let loaded = retune::import::load(&model).unwrap();
    let names = |of: &[retune::graph::ValueId]| -> Vec<String> {
        of.iter().map(|v| loaded.graph.value(*v).name.clone()).collect()
    };
    let (inputs, outputs) = (names(&loaded.graph.inputs), names(&loaded.graph.outputs));
    let dir = tempfile::tempdir().unwrap();
    let (feeds, out) = (dir.path().join("in.npz"), dir.path().join("out.npz"));
    for set in 0..3 {
        let read = |kind: &str, i: usize| {
            let path = folder.join(format!("test_data_set_{set}/{kind}_{i}.pb"));
            retune::backend_test::read_tensor(&path).unwrap()
        };
        let fed: Vec<_> = (0..inputs.len()).map(|i| read("input", i)).collect();
        let named: Vec<_> = inputs.iter().map(String::as_str).zip(&fed).collect();
        retune::train::data::write_npz(&feeds, &named).unwrap();
        run(&["run", text(&model), "--inputs", text(&feeds), "--output", text(&out)], 0);
        let ours = Arrays::read(&out);
        for (i, name) in outputs.iter().enumerate() {
            let truth = read("output", i);
            assert_eq!(ours.get(name).dims(), truth.dims());
            let e = relative(&truth.to_f64(), &ours.get(name).to_f64());
            println!("DynamicQuantizeLSTM, set {set}: {name}: {e:.1e}");
            assert!(e <= 1e-4, "set {set}: {name}: {e:.1e}");
        }
    }

    let layers = ["'dense_in_quant'", "'first_quant'", "'second_quant'", "'dense_out_quant'"];
    let report = json(&["inspect", text(&model), "--json"], 0);
    let blockers = report["blockers"].as_array().unwrap();
    for layer in layers {
        assert!(
            blockers.iter().any(|b| b["node"].as_str().unwrap().contains(layer)),
            "{layer}: {blockers:#?}"
        );
    }
    assert_eq!(blockers.len(), layers.len(), "{blockers:#?}");
    let new = dir.path().join("new.onnx");
    let base = ["finetune", text(&model), "--data", text(&feeds), "--output", text(&new)];
    let said = String::from_utf8(run(&base, 1).stderr).unwrap();
    assert!(layers.iter().all(|layer| said.contains(layer)) && !new.exists(), "{said}");
}
