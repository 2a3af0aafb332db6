//! New heads on deployed networks: the export is a valid model, and nothing but the head differs.

use std::path::Path;
use std::process::Command;

use retune::tensor::Tensor;
use retune::train::data::write_npz;

use crate::common::{Arrays, all, fetched, json, relative, root, run, shipped, text};
use crate::real_models::{ort, python};

/// Images whose brightness tells the class.
fn images(path: &Path, dims: &[usize], classes: usize) {
    let n = 8 * classes;
    let len: usize = dims.iter().product();
    let x: Vec<f32> = (0..n * len)
        .map(|i| (i as f32 * 0.37).sin() * 0.3 + (i / len % classes) as f32 / classes as f32)
        .collect();
    let x = Tensor::from_slice(&[&[n][..], dims].concat(), &x).unwrap();
    let y = Tensor::ints(&(0..n).map(|i| (i % classes) as i64).collect::<Vec<_>>());
    write_npz(path, &[("x", &x), ("y", &y)]).unwrap();
}

/// onnx.checker, and the same outputs in onnxruntime.
fn checked(model: &Path, input: &str, dims: &[usize]) {
    let Some(python) = python() else { return };
    ort(&python, &["--check", text(model)]);
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (feeds, ours, theirs) = (at("in.npz"), at("ours.npz"), at("theirs.npz"));
    write_npz(&feeds, &[(input, &crate::real_models::wave(dims))]).unwrap();
    run(&["run", text(model), "--inputs", text(&feeds), "--output", text(&ours)], 0);
    ort(&python, &[text(model), text(&feeds), text(&theirs)]);
    let (ours, theirs) = (Arrays::read(&ours), Arrays::read(&theirs));
    for (name, truth) in &theirs.0 {
        assert_eq!(ours.get(name).dims(), truth.dims());
        assert!(relative(&truth.to_f64(), &ours.get(name).to_f64()) <= 1e-4, "{name}");
    }
}

fn finetune(model: &Path, data: &Path, new: &Path, more: &[&str]) -> serde_json::Value {
    let base =
        ["finetune", text(model), "--data", text(data), "--output", text(new), "--method", "supervised"];
    json(&[&base[..], &["--epochs", "3", "--lr", "1e-3", "--json"], more].concat(), 0)
}

#[test]
fn a_renewed_head_is_all_that_differs() {
    let (model, dir) = (shipped("models/resnet20.onnx"), tempfile::tempdir().unwrap());
    let (data, new) = (dir.path().join("data.npz"), dir.path().join("new.onnx"));
    images(&data, &[1, 28, 28], 5);
    let summary =
        finetune(&model, &data, &new, &["--head", "5", "--train", "head", "--norm", "frozen", "--no-guard"]);
    assert_eq!(
        (&summary["verified"], &summary["trained_parameters"]),
        (&"agrees".into(), &(64 * 5 + 5).into())
    );
    assert!(summary["notes"].to_string().contains("new head"), "{}", summary["notes"]);
    assert!(summary["before"]["loss"].as_f64().unwrap() > 0.0);
    let (a, b) = (retune::import::load(&model).unwrap(), retune::import::load(&new).unwrap());
    assert_eq!(a.graph.nodes.len(), b.graph.nodes.len());
    for w in &a.weights {
        let other = b.weight(b.find_weight(&w.name).unwrap());
        match w.name.as_str() {
            "fc.weight" => assert_eq!(other.dims.as_slice(), [5, 64]),
            "fc.bias" => assert_eq!(other.dims.as_slice(), [5]),
            _ => assert_eq!(w.stored(&a.files).unwrap(), other.stored(&b.files).unwrap(), "{}", w.name),
        }
    }
    checked(&new, "image", &[3, 1, 28, 28]);
}

#[test]
fn heads_go_with_checkpoints_feature_maps_and_the_guard() {
    let (model, dir) = (shipped("models/resnet20.onnx"), tempfile::tempdir().unwrap());
    let at = |name: &str| dir.path().join(name);
    let data = at("data.npz");
    images(&data, &[1, 28, 28], 3);
    let folder = at("checkpoints");
    let value = "/layer3/layer3.2/relu_1/Relu_output_0";
    let options = [
        "--head",
        "3",
        "--at",
        value,
        "--train",
        "last:2",
        "--no-guard",
        "--checkpoint",
        text(&folder),
        "--resume",
    ];
    for name in ["one.onnx", "two.onnx"] {
        finetune(&model, &data, &at(name), &options);
    }
    assert_eq!(std::fs::read(at("one.onnx")).unwrap(), std::fs::read(at("two.onnx")).unwrap());
    checked(&at("one.onnx"), "image", &[3, 1, 28, 28]);
    let report = json(&["inspect", text(&at("one.onnx")), "--json"], 0);
    assert_eq!(report["outputs"].as_array().unwrap().len(), 2);
    // Another head is another run.
    let x = at("x.onnx");
    let other =
        ["finetune", text(&model), "--data", text(&data), "--output", text(&x), "--method", "supervised"];
    let more = [
        "--epochs",
        "3",
        "--lr",
        "1e-3",
        "--head",
        "4",
        "--at",
        value,
        "--checkpoint",
        text(&folder),
        "--resume",
    ];
    run(&[&other[..], &more, &["--train", "last:2", "--no-guard"]].concat(), 1);
    // Not better than the untrained head: the original, with its own classes.
    let (kept, same) =
        (at("kept.onnx"), ["--head", "3", "--lr", "0", "--norm", "frozen", "--epochs", "1", "--json"]);
    let base =
        ["finetune", text(&model), "--data", text(&data), "--output", text(&kept), "--method", "supervised"];
    assert_eq!(json(&[&base[..], &same].concat(), 3)["kept"], false);
    assert_eq!(std::fs::read(&kept).unwrap(), std::fs::read(&model).unwrap());
}

#[test]
fn a_head_whose_weights_are_constant_nodes() {
    let Some(model) = fetched("ppocr/cls.onnx") else { return };
    let dir = tempfile::tempdir().unwrap();
    let (data, new) = (dir.path().join("data.npz"), dir.path().join("new.onnx"));
    images(&data, &[3, 48, 192], 4);
    finetune(&model, &data, &new, &["--head", "4", "--train", "head", "--no-guard"]);
    checked(&new, "x", &[2, 3, 48, 192]);
}

/// The sentence encoder of REAL_DATA on eight topics of fortunes: last block and head beat a linear head on the frozen
/// encoder by five points.
#[test]
fn a_sentence_encoder_learns_topics() {
    let (true, Some(model), Some(python)) = (all(), fetched("minilm/model.onnx"), python()) else { return };
    let dir = tempfile::tempdir().unwrap();
    let script = |more: &[&str]| {
        let mut command = Command::new(&python);
        let tokenizer = fetched("minilm/tokenizer.json").unwrap();
        let fortunes = fetched("fortunes").unwrap();
        command
            .arg(root().join("tests/fortune_topics.py"))
            .arg(dir.path())
            .args(["--tokenizer", text(&tokenizer)]);
        let out = command.args(["--fortunes", text(&fortunes)]).args(more).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    };
    let accuracy = |said: String| said.trim().rsplit(' ').next().unwrap().parse::<f64>().unwrap();
    script(&[]);
    let frozen = accuracy(script(&["--frozen", text(&model)]));
    let (train, test, new) =
        (dir.path().join("train.npz"), dir.path().join("test.npz"), dir.path().join("new.onnx"));
    let base =
        ["finetune", text(&model), "--data", text(&train), "--holdout", text(&test), "--output", text(&new)];
    let more = [
        "--head",
        "8",
        "--at",
        "461",
        "--train",
        "last:7",
        "--method",
        "supervised",
        "--epochs",
        "4",
        "--lr",
        "2e-4",
    ];
    let summary = json(&[&base[..], &more, &["--json"]].concat(), 0);
    let tuned = accuracy(script(&["--measure", text(&new)]));
    println!("frozen {frozen:.4}, finetuned {tuned:.4} (onnxruntime), {}", summary["after"]["accuracy"]);
    assert!((tuned - summary["after"]["accuracy"].as_f64().unwrap()).abs() < 0.005);
    assert!(tuned >= frozen + 0.05, "{frozen} to {tuned}");
    ort(&python, &["--check", text(&new)]);
}
