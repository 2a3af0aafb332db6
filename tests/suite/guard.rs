//! The guard of a finetune: folds, intervals, conditions, JUnit.

use retune::tensor::Tensor;
use retune::train::data::{open, write_npz};

use crate::common::{json, run, shipped, text};

/// The first `n` shipped images, as they are.
fn images(path: &std::path::Path, n: usize) {
    let specs = retune::finetune::input_specs(&retune::import::load(shipped("models/dsnet.onnx")).unwrap());
    let data = open(shipped("models/fashion-images-idx3-ubyte.gz"), &Default::default(), &specs).unwrap();
    let mut batch = data.new_batch(0);
    data.batch(&(0..n).collect::<Vec<_>>(), None, &mut batch).unwrap();
    let labels = Tensor::ints(&data.labels().unwrap()[..n]);
    write_npz(path, &[("x", &batch.inputs[0].1), ("y", &labels)]).unwrap();
}

#[test]
fn folds_judge_every_sample_and_conditions_become_test_cases() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (model, data, output, junit) =
        (shipped("models/dsnet.onnx"), at("data.npz"), at("new.onnx"), at("j.xml"));
    images(&data, 60);
    let args = ["finetune", text(&model), "--data", text(&data), "--output", text(&output), "--json"];
    let options = ["--method", "supervised", "--epochs", "1", "--batch", "20", "--folds", "3", "--no-guard"];
    let checks = ["--require", "gain.low>-1,recall.3<=1,accuracy>=2", "--junit", text(&junit)];
    let summary = json(&[&args[..], &options, &checks].concat(), 3);
    assert_eq!((&summary["heldout_samples"], &summary["training_samples"]), (&60.into(), &60.into()));
    assert_eq!(summary["before"]["samples"], 60);
    // The network is the file's in every fold: together they are its accuracy on all.
    let whole = json(&["eval", text(&model), "--data", text(&data), "--json"], 0);
    let accuracy = |v: &serde_json::Value| v["accuracy"].as_f64().unwrap();
    assert!((accuracy(&summary["before"]) - accuracy(&whole)).abs() < 1e-12);
    let gain = &summary["verdict"]["gain"];
    let (low, value, high) = (gain["low"].as_f64(), gain["value"].as_f64(), gain["high"].as_f64());
    assert!(low < value && value < high, "{gain}");
    let holds: Vec<bool> =
        summary["requirements"].as_array().unwrap().iter().map(|r| r["holds"].as_bool().unwrap()).collect();
    assert_eq!(holds, [true, true, false]);
    let xml = std::fs::read_to_string(&junit).unwrap();
    assert!(xml.contains("tests=\"5\" failures=\"1\" errors=\"0\" skipped=\"2\""), "{xml}");
    assert!(xml.contains("name=\"require: accuracy&gt;=2\""), "{xml}");
    assert!(std::fs::read(&output).unwrap() == std::fs::read(&model).unwrap());
}

#[test]
fn folds_and_held_out_data_exclude_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data.npz");
    images(&data, 8);
    let (model, output) = (shipped("models/dsnet.onnx"), dir.path().join("new.onnx"));
    let args = ["finetune", text(&model), "--data", text(&data), "--output", text(&output)];
    for (options, part) in [
        (vec!["--folds", "1"], "--folds 1"),
        (vec!["--folds", "9", "--epochs", "1"], "--folds 9"),
        (vec!["--folds", "2", "--holdout", text(&data)], "--holdout"),
        (vec!["--require", "recall.>0"], "recall"),
    ] {
        let out = run(&[&args[..], &options].concat(), 1);
        let error = String::from_utf8_lossy(&out.stderr);
        assert!(error.contains(part), "{options:?}: {error}");
    }
}
