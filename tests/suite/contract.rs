//! The command line's promises: names, keys, exit codes, refusals.

use std::path::Path;

use retune::tensor::Tensor;
use retune::train::data::write_npz;

use crate::common::{Arrays, json, run, shipped, text};

/// Eight images of noise, labels 0 and 1.
fn noise(path: &Path) {
    let x: Vec<f32> =
        (0..8 * 784u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 16_777_216.0).collect();
    let x = Tensor::from_slice(&[8, 1, 28, 28], &x).unwrap();
    let y = Tensor::from_slice(&[8], &[0i64, 1, 0, 1, 0, 1, 0, 1]).unwrap();
    write_npz(path, &[("x", &x), ("y", &y)]).unwrap();
}

const QUICK: &[&str] =
    &["--epochs", "1", "--batch", "8", "--holdout", "0", "--no-guard", "--optimizer", "sgd"];

#[test]
fn a_learning_rate_of_zero_gives_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (data, output) = (dir.path().join("data.npz"), dir.path().join("out.onnx"));
    noise(&data);
    for name in ["models/resnet20.onnx", "models/dsnet.onnx"] {
        let model = shipped(name);
        let mut args = vec!["finetune", text(&model), "--data", text(&data), "--output", text(&output)];
        args.extend(QUICK);
        args.extend(["--lr", "0", "--norm", "frozen"]);
        run(&args, 0);
        assert!(std::fs::read(&model).unwrap() == std::fs::read(&output).unwrap(), "{name}");
    }
}

#[test]
fn finetune_prints_its_summary_and_keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    let (data, output) = (dir.path().join("data.npz"), dir.path().join("out.onnx"));
    noise(&data);
    let model = shipped("models/dsnet.onnx");
    for method in ["supervised", "icp"] {
        let mut args = vec!["finetune", text(&model), "--data", text(&data), "--output", text(&output)];
        args.extend(QUICK);
        args.extend(["--lr", "0.01", "--method", method, "--json"]);
        let summary = json(&args, 0);
        for key in [
            "before",
            "after",
            "kept",
            "output",
            "steps",
            "skipped_steps",
            "seconds",
            "peak_bytes",
            "verified",
        ] {
            assert!(summary.get(key).is_some(), "{method}: no key {key}");
        }
        assert!(summary["before"].is_null() && summary["after"].is_null());
        assert_eq!(summary["kept"], true);
        assert_eq!(summary["verified"], "agrees");
    }
}

#[test]
fn a_guard_that_is_not_met_keeps_the_original_and_exits_with_3() {
    let dir = tempfile::tempdir().unwrap();
    let (data, output) = (dir.path().join("data.npz"), dir.path().join("out.onnx"));
    noise(&data);
    let model = shipped("models/dsnet.onnx");
    let base = ["finetune", text(&model), "--data", text(&data), "--output", text(&output), "--json"];
    // A learning rate of zero changes nothing, so nothing is better.
    let guard = ["--epochs", "1", "--lr", "0", "--norm", "frozen", "--holdout", "0.5"];
    let summary = json(&[&base[..], &guard].concat(), 3);
    assert_eq!(summary["kept"], false);
    assert!(std::fs::read(&model).unwrap() == std::fs::read(&output).unwrap());
    let require = ["--epochs", "1", "--holdout", "0.5", "--no-guard", "--require", "accuracy>=1.5"];
    let summary = json(&[&base[..], &require].concat(), 3);
    assert_eq!(summary["kept"], false);
    assert!(std::fs::read(&model).unwrap() == std::fs::read(&output).unwrap());
}

#[test]
fn options_come_from_a_file_and_flags_go_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let (data, output, config) =
        (dir.path().join("data.npz"), dir.path().join("out.onnx"), dir.path().join("c.toml"));
    noise(&data);
    std::fs::write(&config, "epochs = 3\nbatch = 4\nholdout = 0\nguard = false\nmethod = \"supervised\"\n")
        .unwrap();
    let model = shipped("models/dsnet.onnx");
    let base = [
        "finetune",
        text(&model),
        "--data",
        text(&data),
        "--output",
        text(&output),
        "--config",
        text(&config),
        "--json",
    ];
    assert_eq!(json(&base, 0)["steps"], 6);
    assert_eq!(json(&[&base[..], &["--epochs", "1"]].concat(), 0)["steps"], 2);
    std::fs::write(&config, "epoch = 3\n").unwrap();
    let refused = run(&base, 1);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("epoch"));
}

/// Where --shape says so, not --batch.
#[test]
fn a_bench_counts_the_samples_that_it_runs() {
    let model = shipped("models/dsnet.onnx");
    for mode in ["forward", "train"] {
        let args = ["--shape", "image=3x1x28x28", "--mode", mode, "--loss", "mse", "--runs", "1", "--json"];
        let report = json(&[&["bench", text(&model)][..], &args].concat(), 0);
        assert_eq!(report["batch"], 3);
        let each = report["median_ms"].as_f64().unwrap() * report["samples_per_second"].as_f64().unwrap();
        assert!((each - 3e3).abs() < 1e-3, "{report}");
    }
}

#[test]
fn bad_input_is_refused_with_a_message() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (junk, absent, out) = (at("junk.onnx"), at("absent.onnx"), at("out.npz"));
    std::fs::write(&junk, b"\x08\x07junk").unwrap();
    let model = shipped("models/dsnet.onnx");
    let message = |args: &[&str], code: i32, says: &str| {
        let out = run(args, code);
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(text.contains(says), "{args:?} says {text}");
    };
    message(&["inspect", text(&junk)], 1, "junk.onnx");
    message(&["run", text(&absent), "--inputs", text(&absent), "--output", text(&out)], 1, "absent");
    message(&["finetune"], 2, "--data");
    message(&["bench", text(&model), "--batch", "1000000000000"], 1, "'image'");
    message(&["bench", text(&model), "--shape", "picture=2x1x28x28"], 1, "image");
    message(&["finetune", text(&model), "--data", text(&absent), "--output", text(&out)], 1, "absent.onnx");

    let wrong = at("wrong.npz");
    let x = Tensor::from_slice(&[2, 3], &[0f32; 6]).unwrap();
    write_npz(&wrong, &[("image", &x)]).unwrap();
    message(&["run", text(&model), "--inputs", text(&wrong), "--output", text(&out)], 1, "'image'");
    write_npz(&wrong, &[("picture", &x)]).unwrap();
    message(&["run", text(&model), "--inputs", text(&wrong), "--output", text(&out)], 1, "picture");
    assert!(!out.exists());

    let data = at("labels.npz");
    let x = Tensor::zeros(retune::tensor::DType::F32, &[2, 1, 28, 28]);
    let y = Tensor::from_slice(&[2], &[0i64, 10]).unwrap();
    write_npz(&data, &[("x", &x), ("y", &y)]).unwrap();
    message(&["eval", text(&model), "--data", text(&data)], 1, "10");
    noise(&data);
    let output = at("new.onnx");
    let base = ["finetune", text(&model), "--data", text(&data), "--output", text(&output)];
    message(&[&base[..], &["--train", "nothing*"]].concat(), 1, "nothing");
    message(&[&base[..], &["--lr=-1"]].concat(), 1, "--lr");
    message(&[&base[..], &["--precision", "f8"]].concat(), 2, "--precision");
    message(&[&base[..], &["--optimizer-state", "f16"]].concat(), 2, "--optimizer-state");
    message(&[&base[..], &["--master-free"]].concat(), 1, "--master-free");
    assert!(!output.exists());
}

#[test]
fn run_and_tract_agree_and_name_every_output() {
    let dir = tempfile::tempdir().unwrap();
    let (data, input, a, b) = (
        dir.path().join("data.npz"),
        dir.path().join("in.npz"),
        dir.path().join("a.npz"),
        dir.path().join("b.npz"),
    );
    noise(&data);
    write_npz(&input, &[("image", Arrays::read(&data).get("x"))]).unwrap();
    for name in ["models/resnet20.onnx", "models/dsnet.onnx"] {
        let model = shipped(name);
        run(&["run", text(&model), "--inputs", text(&input), "--output", text(&a)], 0);
        run(&["run", text(&model), "--inputs", text(&input), "--output", text(&b), "--engine", "tract"], 0);
        let (a, b) = (Arrays::read(&a), Arrays::read(&b));
        assert_eq!(a.0.len(), 1);
        let e = crate::common::relative(&b.get("logits").to_f64(), &a.get("logits").to_f64());
        assert!(e < 1e-4, "{name}: {e:.1e}");
    }
}

#[test]
fn inspect_lists_roles() {
    let report = json(&["inspect", text(&shipped("models/resnet20.onnx")), "--json"], 0);
    let parameters = report["parameters"].as_array().unwrap();
    let count = |role: &str| parameters.iter().filter(|p| p["role"] == role).count();
    assert_eq!(
        (
            count("weight"),
            count("bias"),
            count("scale"),
            count("shift"),
            count("running-mean"),
            count("running-var")
        ),
        (22, 1, 21, 21, 21, 21)
    );
    let trains = |p: &&serde_json::Value| p["trainable"] == true;
    assert_eq!(parameters.iter().filter(trains).count(), 22 + 1 + 42);
    assert_eq!(report["blockers"].as_array().unwrap().len(), 0);
    assert_eq!(report["taps"].as_array().unwrap().len(), 3);
    assert_eq!(report["logits"], "logits");

    let report = json(&["inspect", text(&shipped("models/dsnet.onnx")), "--json"], 0);
    // The bounds of ReLU6 are constants, not parameters that train.
    for p in report["parameters"].as_array().unwrap().iter().filter(trains) {
        assert!(p["name"].as_str().unwrap().contains(['.']), "{p}");
    }
}
