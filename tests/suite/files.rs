//! Files as exporters leave them (`tests/fixtures/files/make.py`): each trains, and its export differs in nothing but
//! what was trained.

use std::path::{Path, PathBuf};

use retune::tensor::{DType, Tensor};
use retune::train::data::write_npz;
use tempfile::TempDir;

use crate::common::{json, run, shipped, text};

struct Trained {
    folder: TempDir,
    summary: serde_json::Value,
}

impl Trained {
    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.at(name)).unwrap()
    }
}

fn fixture(name: &str) -> PathBuf {
    shipped(&format!("tests/fixtures/files/{name}"))
}

/// Sixteen samples of a shape, with `classes` labels that follow from the first element.
fn samples(path: &Path, dims: &[usize], classes: i64, dtype: DType) {
    let n: usize = 16 * dims.iter().product::<usize>();
    let x: Vec<f64> = (0..n).map(|i| ((i * 7919 % 101) as f64 / 17.0).floor()).collect();
    let x = Tensor::from_slice(&[&[16][..], dims].concat(), &x).unwrap().cast(dtype);
    let y = Tensor::ints(&(0..16).map(|i| i % classes).collect::<Vec<_>>());
    write_npz(path, &[("x", &x), ("y", &y)]).unwrap();
}

fn train(model: &Path, dims: &[usize], classes: i64, dtype: DType, more: &[&str]) -> Trained {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data.npz");
    samples(&data, dims, classes, dtype);
    let new = folder.path().join("new.onnx");
    let base =
        ["finetune", text(model), "--data", text(&data), "--output", text(&new), "--method", "supervised"];
    let options = ["--epochs", "2", "--batch", "4", "--no-guard", "--holdout", "0.25", "--json"];
    let lr: &[&str] = if more.contains(&"--lr") { &[] } else { &["--lr", "0.01"] };
    let summary = json(&[&base[..], &options, lr, more].concat(), 0);
    Trained { folder, summary }
}

/// The file with the values of its weights blotted out, to be compared with another's.
fn blotted(path: &Path) -> Vec<u8> {
    let model = retune::import::load(path).unwrap();
    let mut bytes = std::fs::read(path).unwrap();
    for w in model.weights.iter().filter(|w| w.trainable && w.location.file == 0) {
        bytes[w.location.offset..w.location.offset + w.location.len].fill(0);
    }
    bytes
}

#[test]
fn newer_versions_and_unknown_fields_survive() {
    let model = fixture("newer.onnx");
    let t = train(&model, &[3], 4, DType::F32, &[]);
    let (before, after) = (std::fs::read(&model).unwrap(), t.bytes("new.onnx"));
    assert_ne!(before, after);
    assert_eq!(blotted(&model), blotted(&t.at("new.onnx")));
    let unknown = |b: &[u8]| b.windows(10).filter(|w| *w == b"unknown!!!").count();
    assert_eq!((unknown(&before), unknown(&after)), (12, 12));
    let m = retune::import::load(t.at("new.onnx")).unwrap();
    assert_eq!((m.ir_version, m.opset()), (14, 25));
}

#[test]
fn every_float_type_is_written_back_as_it_was() {
    let model = fixture("types.onnx");
    let t = train(&model, &[3], 4, DType::F32, &[]);
    assert_eq!(blotted(&model), blotted(&t.at("new.onnx")));
    let (a, b) = (retune::import::load(&model).unwrap(), retune::import::load(t.at("new.onnx")).unwrap());
    let types: Vec<DType> = b.weights.iter().map(|w| w.dtype).collect();
    assert_eq!(types, [DType::F16, DType::BF16, DType::F64]);
    for (v, w) in a.weights.iter().zip(&b.weights) {
        assert_ne!(v.stored(&a.files).unwrap(), w.stored(&b.files).unwrap(), "{} did not train", w.name);
    }
    // A network that computes in float64 throughout.
    // tract has no Gemm in float64, so that nobody but this compares.
    let model = fixture("double.onnx");
    let t = train(&model, &[3], 4, DType::F64, &[]);
    assert_eq!(blotted(&model), blotted(&t.at("new.onnx")));
    assert_ne!(std::fs::read(&model).unwrap(), t.bytes("new.onnx"));
}

#[test]
fn several_external_files_are_written_together() {
    let model = fixture("external/model.onnx");
    let t = train(&model, &[3], 4, DType::F32, &["--train", "w2"]);
    let source = |name: &str| std::fs::read(fixture(&format!("external/{name}"))).unwrap();
    assert_eq!(t.bytes("new.onnx"), source("model.onnx"));
    assert_eq!(t.bytes("first.data"), source("first.data"));
    let (before, after) = (source("second.data"), t.bytes("second.data"));
    assert_eq!((before.len(), &before[..64]), (after.len(), &after[..64]));
    assert_ne!(before, after);
}

#[test]
fn a_batch_baked_into_shapes_is_rebound() {
    let model = fixture("batch.onnx");
    let t = train(&model, &[2, 3], 4, DType::F32, &[]);
    assert_eq!((&t.summary["steps"], &t.summary["verified"]), (&6.into(), &"agrees".into()));
    assert_eq!(blotted(&model), blotted(&t.at("new.onnx")));
}

#[test]
fn scores_behind_an_argmax_are_found() {
    let model = fixture("argmax.onnx");
    let report = json(&["inspect", text(&model), "--json"], 0);
    assert_eq!(report["logits"], "scores");
    let t = train(&model, &[3], 4, DType::F32, &[]);
    assert!(t.summary["notes"].to_string().contains("left out of the loss"), "{}", t.summary["notes"]);
    assert!(t.summary["after"]["accuracy"].is_number());
    assert_eq!(blotted(&model), blotted(&t.at("new.onnx")));
}

#[test]
fn tied_tensors_stay_tied_and_merged_ones_come_apart() {
    let model = fixture("shared.onnx");
    let report = json(&["inspect", text(&model), "--json"], 0);
    let how = |name: &str| {
        let shared = report["shared"].as_array().unwrap();
        let entry = shared.iter().find(|s| s["name"] == name).unwrap_or_else(|| panic!("{name}: {shared:?}"));
        entry["how"].as_str().unwrap().to_string()
    };
    assert!(how("table").contains("tied") && how("zero.2").contains("trains apart"));
    let t = train(&model, &[5], 6, DType::I64, &[]);
    let m = retune::import::load(t.at("new.onnx")).unwrap();
    let values = |name: &str| m.load_weight(m.find_weight(name).unwrap()).unwrap().to_f64();
    assert_ne!(values("zero"), values("zero.2"));
    assert!(m.weights.iter().all(|w| w.split.is_none()), "the two are tensors of their own now");
    assert_eq!(m.weights.iter().filter(|w| w.name == "table").count(), 1);
}

#[test]
fn folded_normalisations_are_reported() {
    let model = fixture("folded.onnx");
    let report = json(&["inspect", text(&model), "--json"], 0);
    assert_eq!(report["folded_norms"].as_array().unwrap().len(), 3);
    let page = String::from_utf8(run(&["inspect", text(&model), "--markdown"], 0).stdout).unwrap();
    assert!(page.contains("### Folded normalisations") && page.contains("nothing blocks training"), "{page}");
    let t = train(&model, &[1, 8, 8], 3, DType::F32, &[]);
    assert_eq!(blotted(&model), blotted(&t.at("new.onnx")));
}

#[test]
fn folded_normalisations_come_back_for_training_only() {
    let model = fixture("folded.onnx");
    let t = train(&model, &[1, 8, 8], 3, DType::F32, &["--reinsert-norms"]);
    assert!(t.summary["notes"].to_string().contains("3 folded normalisations"), "{}", t.summary["notes"]);
    // tract ran the folded file against the network that was trained.
    assert_eq!(t.summary["verified"], "agrees");
    assert_eq!(blotted(&model), blotted(&t.at("new.onnx")));
    assert_ne!(std::fs::read(&model).unwrap(), t.bytes("new.onnx"));
    // Put back, folded again and not trained, it is what it was, but for rounding.
    let t = train(&model, &[1, 8, 8], 3, DType::F32, &["--reinsert-norms", "--lr", "0", "--norm", "frozen"]);
    let (a, b) = (retune::import::load(&model).unwrap(), retune::import::load(t.at("new.onnx")).unwrap());
    for (v, w) in a.weights.iter().zip(&b.weights) {
        let e =
            crate::common::relative(&v.load(&a.files).unwrap().to_f64(), &w.load(&b.files).unwrap().to_f64());
        assert!(e < 1e-4, "{}: {e:.1e}", v.name);
    }
    let plain = shipped("models/resnet20.onnx");
    let (data, new) = (t.at("data.npz"), t.at("x.onnx"));
    let base = ["finetune", text(&plain), "--data", text(&data), "--output", text(&new)];
    samples(&data, &[1, 28, 28], 3, DType::F32);
    let said = String::from_utf8(run(&[&base[..], &["--reinsert-norms"]].concat(), 1).stderr).unwrap();
    assert!(said.contains("--reinsert-norms"), "{said}");
}

/// Options of the loss and the data: probabilities as targets, class weights, the one-cycle schedule.
#[test]
fn soft_labels_and_class_weights_train() {
    let model = fixture("argmax.onnx");
    let folder = tempfile::tempdir().unwrap();
    let (data, new) = (folder.path().join("data.npz"), folder.path().join("new.onnx"));
    let x: Vec<f32> = (0..96).map(|i| (i as f32 * 0.9).sin()).collect();
    let x = Tensor::from_slice(&[32, 3], &x).unwrap();
    let soft: Vec<f32> = (0..128).map(|i| if i % 4 == i / 4 % 4 { 0.7 } else { 0.1 }).collect();
    let soft = Tensor::from_slice(&[32, 4], &soft).unwrap();
    let hard = Tensor::ints(&(0..32).map(|i| i % 4).collect::<Vec<_>>());
    let base =
        ["finetune", text(&model), "--data", text(&data), "--output", text(&new), "--method", "supervised"];
    let options =
        ["--epochs", "20", "--batch", "8", "--lr", "0.05", "--no-guard", "--schedule", "one-cycle", "--json"];
    write_npz(&data, &[("x", &x), ("y", &soft)]).unwrap();
    let s = json(&[&base[..], &options].concat(), 0);
    let loss = |s: &serde_json::Value, at: &str| s[at]["loss"].as_f64().unwrap();
    assert!(loss(&s, "after") < loss(&s, "before") && s["after"]["accuracy"].is_number(), "{s}");
    // Entropy of the targets: no loss is below it.
    assert!(loss(&s, "after") >= -(0.7f64 * 0.7f64.ln() + 0.3 * 0.1f64.ln()) - 1e-6);
    run(&[&base[..], &options, &["--class-weights", "balanced"]].concat(), 1);
    write_npz(&data, &[("x", &x), ("y", &hard)]).unwrap();
    for weights in ["balanced", "1,1,5,1"] {
        json(&[&base[..], &options, &["--class-weights", weights]].concat(), 0);
    }
    run(&[&base[..], &options, &["--class-weights", "1,2"]].concat(), 1);
    // Rows that are no distributions.
    write_npz(&data, &[("x", &x), ("y", &Tensor::from_slice(&[32, 4], &[0.5f32; 128]).unwrap())]).unwrap();
    let said = String::from_utf8(run(&[&base[..], &options].concat(), 1).stderr).unwrap();
    assert!(said.contains("no distribution"), "{said}");
}

/// A detector: what chooses among its boxes, by values, is left out of the loss and stays in the file.
#[test]
fn what_a_detector_chooses_from_is_trained() {
    let model = fixture("detector.onnx");
    let report = json(&["inspect", text(&model), "--json"], 0);
    assert_eq!(report["logits"], "class_logits");
    assert!(
        report["left_out"].as_str().unwrap().contains("NonMaxSuppression 'nms'"),
        "{}",
        report["left_out"]
    );
    assert_eq!(report["blockers"].as_array().unwrap().len(), 0);
    assert!(report["taps"].as_array().unwrap().iter().any(|t| t == "f1"), "{}", report["taps"]);

    let folder = tempfile::tempdir().unwrap();
    let (data, new) = (folder.path().join("data.npz"), folder.path().join("new.onnx"));
    // Where a place is bright there is something of the first class.
    let n = 24 * 3 * 16 * 16;
    let x: Vec<f32> =
        (0..n).map(|i| if i / 64 % 5 < 2 { 1.0 } else { -0.5 } + (i as f32 * 0.7).sin() * 0.2).collect();
    let y: Vec<f32> = (0..24 * 3 * 16).map(|i| f32::from(i / 16 % 3 == 0 && i * 4 / 64 % 5 < 2)).collect();
    let x = Tensor::from_slice(&[24, 3, 16, 16], &x).unwrap();
    let y = Tensor::from_slice(&[24, 3, 16], &y).unwrap();
    write_npz(&data, &[("x", &x), ("y", &y)]).unwrap();
    let base =
        ["finetune", text(&model), "--data", text(&data), "--output", text(&new), "--loss", "bce", "--json"];
    for method in ["supervised", "icp"] {
        let options =
            ["--method", method, "--epochs", "6", "--batch", "8", "--lr", "0.01", "--holdout", "0.25"];
        let s = json(&[&base[..], &options].concat(), 0);
        assert!(s["kept"] == true && s["after"]["loss"].as_f64() < s["before"]["loss"].as_f64(), "{s}");
        assert!(s["notes"].to_string().contains("NonMaxSuppression 'nms'"), "{}", s["notes"]);
        println!("detector, {method}: tract: {}", s["verified"]);
        // Nothing but weights of the backbone and of the class head differs; the boxes' head has no part in this loss.
        assert_eq!(blotted(&model), blotted(&new));
        let (a, b) = (retune::import::load(&model).unwrap(), retune::import::load(&new).unwrap());
        for w in &a.weights {
            let other = b.weight(b.find_weight(&w.name).unwrap());
            let same = w.stored(&a.files).unwrap() == other.stored(&b.files).unwrap();
            assert_eq!(same, !w.trainable || w.name.ends_with("_box"), "{}", w.name);
        }
    }
    // The whole file, the choice included: small, and too large for what is computed before the run.
    let Some(python) = crate::real_models::python() else { return };
    for [n, side] in [[2, 16], [1, 256]] {
        let x = crate::real_models::wave(&[n, 3, side, side]);
        for file in [&model, &new] {
            crate::real_models::equals_onnxruntime_on(&python, file, &[("image", &x)]);
        }
    }
}
