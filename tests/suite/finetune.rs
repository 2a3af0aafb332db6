//! The main job on real networks: better, verified, and only the trained bytes differ.

use std::path::Path;
use std::process::Command;

use crate::common::{Arrays, fetched, json, relative, root, run, shipped, text};
use crate::real_models::{ort, python};

/// Text lines for PP-OCR's direction classifier: `train.npz`, `test.npz` (blurred), `test_clean.npz`.
pub fn text_lines(folder: &Path, clean_fraction: &str) -> bool {
    let Some(python) = python() else { return false };
    if fetched("fortunes").is_none() || fetched("fonts").is_none() {
        return false;
    }
    let out = Command::new(python)
        .arg(root().join("tests/text_lines.py"))
        .arg(folder)
        .args([
            "--train",
            "500",
            "--test",
            "300",
            "--blur",
            "4",
            "--seed",
            "0",
            "--clean-fraction",
            clean_fraction,
        ])
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    true
}

pub fn accuracy(model: &Path, data: &Path) -> f64 {
    json(&["eval", text(model), "--data", text(data), "--json"], 0)["accuracy"].as_f64().unwrap()
}

/// Positions at which two files of equal length differ.
fn differing(a: &[u8], b: &[u8]) -> Vec<usize> {
    assert_eq!(a.len(), b.len(), "the export has another length");
    (0..a.len()).filter(|&i| a[i] != b[i]).collect()
}

fn adapt_ppocr(method: &str, clean_fraction: &str, blurred: f64, clean: f64) {
    let Some(model) = fetched("ppocr/cls.onnx") else { return };
    let dir = tempfile::tempdir().unwrap();
    if !text_lines(dir.path(), clean_fraction) {
        return;
    }
    let at = |name: &str| dir.path().join(name);
    let (new, train, test) = (at("new.onnx"), at("train.npz"), at("test.npz"));
    let before = accuracy(&model, &test);
    assert!(before < 0.65, "{before}");
    let base = ["finetune", text(&model), "--data", text(&train), "--output", text(&new), "--method", method];
    let options = ["--epochs", "15", "--lr", "1e-3", "--holdout", "0", "--no-guard", "--json"];
    let summary = json(&[&base[..], &options].concat(), 0);
    assert_eq!(summary["verified"], "agrees");
    let after = accuracy(&new, &test);
    let on_clean = accuracy(&new, &at("test_clean.npz"));
    println!(
        "{method}, clean fraction {clean_fraction}: blurred {before:.3} -> {after:.3}, clean {on_clean:.3}"
    );
    assert!(after >= blurred, "blurred: {after}");
    assert!(on_clean >= clean, "clean: {on_clean}");
    only_trained_bytes_differ(&model, &new);
    same_in_onnxruntime(&new, &test);
}

/// Every byte that differs lies in a trained tensor or in running statistics.
fn only_trained_bytes_differ(model: &Path, new: &Path) {
    let loaded = retune::import::load(model).unwrap();
    let (old, new) = (std::fs::read(model).unwrap(), std::fs::read(new).unwrap());
    let differing = differing(&old, &new);
    assert!(!differing.is_empty());
    let mut allowed = vec![false; old.len()];
    for w in &loaded.weights {
        let statistic = w.role.as_str().starts_with("running");
        if w.trainable || statistic {
            let l = &w.location;
            assert_eq!(l.file, 0);
            allowed[l.offset..l.offset + l.len].fill(true);
        }
    }
    let outside = differing.iter().filter(|&&i| !allowed[i]).count();
    assert_eq!(outside, 0, "{outside} bytes outside trained tensors differ");
}

fn same_in_onnxruntime(model: &Path, data: &Path) {
    let Some(python) = python() else { return };
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let x = Arrays::read(data).get("x").clone();
    let (feeds, ours, theirs) = (at("in.npz"), at("ours.npz"), at("theirs.npz"));
    retune::train::data::write_npz(&feeds, &[("x", &x)]).unwrap();
    run(&["run", text(model), "--inputs", text(&feeds), "--output", text(&ours)], 0);
    ort(&python, &[text(model), text(&feeds), text(&theirs)]);
    let (ours, theirs) = (Arrays::read(&ours), Arrays::read(&theirs));
    for (name, truth) in &theirs.0 {
        let e = relative(&truth.to_f64(), &ours.get(name).to_f64());
        assert!(e <= 1e-4, "{name}: {e:.1e}");
    }
}

#[test]
fn ppocr_learns_blurred_lines_supervised() {
    adapt_ppocr("supervised", "0", 0.94, 0.0);
}

#[test]
fn ppocr_learns_blurred_lines_by_icp() {
    if !crate::common::all() {
        println!("skipped: long (./test.sh --all)");
        return;
    }
    adapt_ppocr("icp", "0", 0.94, 0.0);
}

#[test]
fn ppocr_keeps_clean_lines_when_a_third_is_clean() {
    if !crate::common::all() {
        println!("skipped: long (./test.sh --all)");
        return;
    }
    for method in ["supervised", "icp"] {
        adapt_ppocr(method, "0.333", 0.94, 0.97);
    }
}

#[test]
fn a_loss_given_as_a_graph_trains() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("new.onnx");
    let (model, data) = (shipped("models/dsnet.onnx"), shipped("models/fashion-images-idx3-ubyte.gz"));
    let loss = shipped("models/losses/label_smoothing.onnx");
    let base = ["finetune", text(&model), "--data", text(&data), "--output", text(&output), "--no-guard"];
    let options = ["--method", "supervised", "--epochs", "1", "--holdout", "0.8", "--json", "--loss"];
    let graph = json(&[&base[..], &options, &[text(&loss)]].concat(), 0);
    let own = [&base[..], &options, &["cross-entropy", "--label-smoothing", "0.1"]].concat();
    let own = json(&own, 0);
    // The same loss, once as a graph of elementary operators and once as a kernel of ours.
    let (a, b) = (graph["epochs"][0]["loss"].as_f64().unwrap(), own["epochs"][0]["loss"].as_f64().unwrap());
    assert!((a - b).abs() <= 1e-4 * b.abs(), "{a} and {b}");
}

#[test]
fn accumulated_batches_are_one_large_batch() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = (shipped("models/dsnet.onnx"), shipped("models/fashion-images-idx3-ubyte.gz"));
    let mut results = Vec::new();
    for (batch, accumulate) in [("64", "1"), ("16", "4")] {
        let output = dir.path().join(format!("{batch}.onnx"));
        let base = ["finetune", text(&model), "--data", text(&data), "--output", text(&output), "--no-guard"];
        // Without batch statistics, four batches of 16 have the gradient of one of 64.
        let options = [
            "--method",
            "supervised",
            "--norm",
            "frozen",
            "--optimizer",
            "sgd",
            "--lr",
            "0.05",
            "--clip",
            "1",
        ];
        let length =
            ["--epochs", "1", "--holdout", "0.9", "--batch", batch, "--accumulate", accumulate, "--json"];
        let summary = json(&[&base[..], &options, &length].concat(), 0);
        assert_eq!(summary["steps"], 4);
        let loaded = retune::import::load(&output).unwrap();
        let weights = loaded.weights.iter().filter(|w| w.trainable);
        results.push(weights.flat_map(|w| w.load(&loaded.files).unwrap().to_f64()).collect::<Vec<f64>>());
    }
    let e = relative(&results[0], &results[1]);
    assert!(e <= 1e-5, "{e:.1e}");
}

#[test]
fn folders_of_images_train() {
    let dir = tempfile::tempdir().unwrap();
    let specs = retune::finetune::input_specs(&retune::import::load(shipped("models/dsnet.onnx")).unwrap());
    let data = shipped("models/fashion-images-idx3-ubyte.gz");
    let data = retune::train::data::open(&data, &Default::default(), &specs).unwrap();
    let labels = data.labels().unwrap().to_vec();
    let mut batch = data.new_batch(1);
    for (i, label) in labels.iter().enumerate().take(60) {
        data.batch(&[i], None, &mut batch).unwrap();
        let pixels =
            batch.inputs[0].1.get::<f32>().unwrap().iter().map(|p| (p * 255.0).round() as u8).collect();
        let folder = dir.path().join("images").join(format!("class{label}"));
        std::fs::create_dir_all(&folder).unwrap();
        image::GrayImage::from_raw(28, 28, pixels).unwrap().save(folder.join(format!("{i}.png"))).unwrap();
    }
    let (model, output) = (shipped("models/dsnet.onnx"), dir.path().join("new.onnx"));
    let images = dir.path().join("images");
    let before = json(&["eval", text(&model), "--data", text(&images), "--json"], 0);
    assert!(before["accuracy"].as_f64().unwrap() > 0.8, "{before}");
    let base = ["finetune", text(&model), "--data", text(&images), "--output", text(&output), "--no-guard"];
    let page = dir.path().join("page.html");
    let options = ["--epochs", "1", "--holdout", "0.3", "--report", text(&page), "--json"];
    let summary = json(&[&base[..], &options].concat(), 0);
    assert_eq!(
        summary["training_samples"].as_u64().unwrap() + summary["heldout_samples"].as_u64().unwrap(),
        60
    );
    assert!(std::fs::read_to_string(&page).unwrap().contains("class3"));
}
