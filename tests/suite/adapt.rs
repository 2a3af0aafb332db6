//! `retune adapt`: without labels, under a guard, from a set, a folder and a pipe.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use retune::adapt::weigh;
use retune::exec::{Options, Session};
use retune::graph::WeightId;
use retune::import::Role;
use retune::tensor::{DType, Tensor};
use retune::train::data::{Dataset, Worn, degrade, npy_bytes, open, write_npz};
use retune::train::loss::Loss;
use retune::train::method::{At, Method, Plain};
use retune::train::optimizer::Optimizer;
use retune::train::step::{Norm, Recipe, set_step};

use crate::common::{Arrays, json, retune, run, shipped, text};
use crate::gradients::{check_model, error, names};

/// The first step of `loss` against PyTorch's (`tests/reference/tent.py`): loss, gradient, movement.
fn one_step(kind: &str, loss: Loss) {
    let f = Arrays::read(&shipped("tests/fixtures/tent.npz"));
    let path = shipped("models/resnet20.onnx");
    check_model(&f, &path);
    let model = Arc::new(retune::import::load(&path).unwrap());
    let mut session = Session::new(model.clone(), Options::default()).unwrap();
    let norms = |w: &WeightId| matches!(model.weight(*w).role, Role::Scale | Role::Shift);
    let params: Vec<WeightId> = (0..model.weights.len() as u32).map(WeightId).filter(norms).collect();
    let recipe = Recipe {
        loss: loss.clone(),
        optimizer: Optimizer::sgd(),
        clip: None,
        params: params.clone(),
        norm: Norm::Batch,
        accumulate: 1,
    };
    recipe.prepare(&mut session).unwrap();
    let before: Vec<Tensor> = params.iter().map(|w| session.weight(*w).unwrap()).collect();
    let data = Dataset::from_arrays(vec![("x".into(), f.get("x").clone())], None).unwrap();
    let data = data.bind(&retune::finetune::input_specs(&model)).unwrap();
    let n = data.len();
    let mut batch = data.new_batch(n);
    data.batch(&(0..n).collect::<Vec<_>>(), None, &mut batch).unwrap();
    match loss.wants_labels() {
        true => batch.target = Some(f.get("labels").clone()),
        false => weigh(&mut batch, DType::F32, |_| 1.0 / n as f64).unwrap(),
    }
    // A step of plain descent at rate 1 moves the weights by the gradient.
    set_step(&mut session, 1.0, 1);
    let at = At { epoch: 0, epochs: 1, step: 0, steps: 1, seed: 0 };
    let learned = Plain::default().learn(&mut session, &recipe, &batch, &at).unwrap();
    let truth = f.get(&format!("{kind}.loss")).to_f64()[0];
    assert!(
        (learned.loss - truth).abs() <= 1e-4 * truth.abs(),
        "{kind}: loss {}, PyTorch {truth}",
        learned.loss
    );
    let part = Arrays(f.with_prefix(&format!("{kind}.")).map(|(n, t)| (n.to_string(), t.clone())).collect());
    assert_eq!(names(&part, "grad").len(), params.len());
    let mut worst = 0.0f64;
    for (w, before) in params.iter().zip(&before) {
        let weight = model.weight(*w);
        let after = session.weight(*w).unwrap().to_f64();
        let moved: Vec<f64> = before.to_f64().iter().zip(&after).map(|(b, a)| b - a).collect();
        let moved = Tensor::from_slice(before.dims(), &moved).unwrap();
        let e = error(&part, "grad", &weight.name, &moved);
        assert!(e <= 1e-4, "{kind}: {}: {e:.1e}", weight.name);
        worst = worst.max(e);
    }
    println!("{kind}: largest error {worst:.1e}");
}

#[test]
fn a_step_of_tent_is_pytorchs() {
    one_step("tent", Loss::Entropy { diversity: 0.0 });
}

#[test]
fn a_step_of_infomax_is_pytorchs() {
    one_step("infomax", Loss::Entropy { diversity: 1.0 });
}

#[test]
fn a_step_on_some_labels_and_what_the_rest_lack_is_pytorchs() {
    let labelled = Box::new(Loss::CrossEntropy { label_smoothing: 0.0 });
    one_step("beside", Loss::Informed { labelled, weight: 0.5 });
}

/// Shipped images as a worn camera sees them, `n` of those of the given classes.
fn worn(folder: &Path, worn: &Worn, n: usize, classes: std::ops::Range<i64>) -> PathBuf {
    let specs = retune::finetune::input_specs(&retune::import::load(shipped("models/dsnet.onnx")).unwrap());
    let data = open(shipped("models/fashion-images-idx3-ubyte.gz"), &Default::default(), &specs).unwrap();
    let data = degrade(&data, worn).unwrap();
    let labels = data.labels().unwrap().to_vec();
    let picks: Vec<usize> = (0..data.len()).filter(|i| classes.contains(&labels[*i])).take(n).collect();
    let mut batch = data.new_batch(0);
    data.batch(&picks, None, &mut batch).unwrap();
    let path = folder.join(format!("worn-{n}-{}-{}.npz", classes.start, classes.end));
    write_npz(&path, &[("x", &batch.inputs[0].1), ("y", batch.target.as_ref().unwrap())]).unwrap();
    path
}

/// A camera that dims and gets noisy: statistics re-estimated bring most of it back.
fn noisy() -> Worn {
    Worn { blurs: 0, gain: 0.5, offset: 0.0, noise: 0.05, seed: 0 }
}

fn accuracy(summary: &serde_json::Value, when: &str) -> f64 {
    summary[when]["accuracy"].as_f64().unwrap_or_else(|| panic!("{summary}"))
}

#[test]
fn statistics_alone_repair_and_only_their_bytes_change() {
    let dir = tempfile::tempdir().unwrap();
    let (model, output) = (shipped("models/dsnet.onnx"), dir.path().join("new.onnx"));
    let data = worn(dir.path(), &noisy(), 400, 0..10);
    let args = ["adapt", text(&model), "--data", text(&data), "--output", text(&output), "--json"];
    let summary = json(&[&args[..], &["--method", "stats"]].concat(), 0);
    assert_eq!((&summary["ended"], &summary["verified"]), (&"statistics".into(), &"agrees".into()));
    let (before, after) = (accuracy(&summary, "before"), accuracy(&summary, "after"));
    println!("stats: {before:.3} -> {after:.3}");
    assert!(after > before + 0.02, "{before} -> {after}");
    let loaded = retune::import::load(&model).unwrap();
    let (old, new) = (std::fs::read(&model).unwrap(), std::fs::read(&output).unwrap());
    let statistic = |i: usize| {
        let of = |w: &retune::import::Weight| {
            let l = &w.location;
            w.role.as_str().starts_with("running") && (l.offset..l.offset + l.len).contains(&i)
        };
        loaded.weights.iter().any(of)
    };
    let differing: Vec<usize> = (0..old.len()).filter(|i| old[*i] != new[*i]).collect();
    assert!(!differing.is_empty() && old.len() == new.len());
    assert!(differing.into_iter().step_by(97).all(statistic), "other bytes than statistics changed");
}

#[test]
fn every_method_learns_without_labels_and_keeps_what_statistics_gave() {
    let dir = tempfile::tempdir().unwrap();
    let (model, output) = (shipped("models/dsnet.onnx"), dir.path().join("new.onnx"));
    let data = worn(dir.path(), &noisy(), 192, 0..10);
    let args = ["adapt", text(&model), "--data", text(&data), "--output", text(&output), "--json"];
    let base = json(&[&args[..], &["--method", "stats"]].concat(), 0);
    for method in ["tent", "eata", "sar", "infomax", "pseudo", "icp", "icp-pseudo"] {
        let options = ["--method", method, "--epochs", "1", "--lr", "1e-4", "--icp-steps", "2"];
        let summary = json(&[&args[..], &options].concat(), 0);
        assert_eq!((&summary["kept"], &summary["verified"]), (&true.into(), &"agrees".into()), "{method}");
        assert!(summary["steps"].as_u64().unwrap() >= 3, "{method}: {summary}");
        assert!(summary["looks"].as_array().is_some_and(|l| !l.is_empty()), "{method}");
        let (stats, after) = (accuracy(&base, "after"), accuracy(&summary, "after"));
        println!("{method}: {after:.3}, statistics alone {stats:.3}");
        assert!(after >= stats - 0.03, "{method}: {after}, statistics alone {stats}");
        for key in ["before", "resets", "skipped_steps", "passed_over", "seconds", "peak_bytes", "notes"] {
            assert!(summary.get(key).is_some(), "{method}: no key {key}");
        }
    }
}

#[test]
fn a_naive_run_that_collapses_ends_with_statistics_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (model, output) = (shipped("models/dsnet.onnx"), dir.path().join("new.onnx"));
    let data = worn(dir.path(), &noisy(), 256, 0..10);
    let args = ["adapt", text(&model), "--data", text(&data), "--output", text(&output), "--json"];
    let base = json(&[&args[..], &["--method", "stats"]].concat(), 0);
    let alone = std::fs::read(&output).unwrap();
    let naive = ["--method", "tent", "--train", "all", "--lr", "1", "--schedule", "constant"];
    let naive = [&naive[..], &["--epochs", "3", "--check-every", "2"]].concat();
    let summary = json(&[&args[..], &naive].concat(), 0);
    assert!(summary["resets"].as_u64().unwrap() > 0, "{summary}");
    assert_eq!(summary["ended"], "statistics");
    assert_eq!(accuracy(&summary, "after"), accuracy(&base, "after"));
    assert!(std::fs::read(&output).unwrap() == alone);
    // Without the guard it is as bad as it looks.
    let unguarded = json(&[&args[..], &naive, &["--no-guard"]].concat(), 0);
    assert!(accuracy(&unguarded, "after") < accuracy(&base, "after") - 0.2, "{unguarded}");
}

#[test]
fn a_stream_of_one_class_ends_with_the_original() {
    let dir = tempfile::tempdir().unwrap();
    let (model, output) = (shipped("models/dsnet.onnx"), dir.path().join("new.onnx"));
    let data = worn(dir.path(), &noisy(), 160, 5..6);
    let junit = dir.path().join("junit.xml");
    let args =
        ["adapt", text(&model), "--data", text(&data), "--output", text(&output), "--stream", "--json"];
    let options = ["--batch", "16", "--check-every", "4", "--junit", text(&junit)];
    let summary = json(&[&args[..], &options].concat(), 3);
    assert_eq!((&summary["kept"], &summary["ended"]), (&false.into(), &"original".into()));
    assert!(std::fs::read(&output).unwrap() == std::fs::read(&model).unwrap());
    let xml = std::fs::read_to_string(&junit).unwrap();
    assert!(xml.contains("failures=\"1\"") && xml.contains("guard: no collapse"), "{xml}");
}

#[test]
fn arrays_on_standard_input_are_the_same_stream_as_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let model = shipped("models/dsnet.onnx");
    let data = worn(dir.path(), &noisy(), 96, 0..10);
    let at = |name: &str| dir.path().join(name);
    let options = ["--method", "tent", "--batch", "32", "--check-every", "2", "--threads", "1"];
    let file = at("file.onnx");
    let args = ["adapt", text(&model), "--data", text(&data), "--output", text(&file), "--stream"];
    run(&[&args[..], &options].concat(), 0);
    let x = Arrays::read(&data).get("x").clone();
    let rows = x.get::<f32>().unwrap();
    let part =
        |i: usize| Tensor::from_slice(&[32, 1, 28, 28], &rows[i * 32 * 784..(i + 1) * 32 * 784]).unwrap();
    let arrays: Vec<u8> = (0..3).flat_map(|i| npy_bytes(&part(i))).collect();
    for (name, bytes, shape) in
        [("npy.onnx", arrays, None), ("raw.onnx", x.bytes().to_vec(), Some("1,28,28"))]
    {
        let output = at(name);
        let args = ["adapt", text(&model), "--data", "-", "--output", text(&output)];
        let mut args = [&args[..], &options].concat();
        args.extend(shape.into_iter().flat_map(|s| ["--shape", s]));
        let mut child = retune().args(&args).stdin(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(&bytes).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(0), "{name}");
        assert!(std::fs::read(&output).unwrap() == std::fs::read(&file).unwrap(), "{name}");
    }
}

#[test]
fn threads_do_not_change_an_adaptation() {
    let dir = tempfile::tempdir().unwrap();
    let model = shipped("models/dsnet.onnx");
    let data = worn(dir.path(), &noisy(), 96, 0..10);
    let mut before: Option<Vec<u8>> = None;
    for threads in ["1", "2", "4"] {
        let output = dir.path().join(format!("{threads}.onnx"));
        let args = ["adapt", text(&model), "--data", text(&data), "--output", text(&output), "--epochs", "1"];
        run(&[&args[..], &["--method", "eata", "--batch", "32", "--threads", threads]].concat(), 0);
        let bytes = std::fs::read(&output).unwrap();
        assert!(bytes != std::fs::read(&model).unwrap());
        assert!(before.as_ref().is_none_or(|b| *b == bytes), "{threads} threads change the result");
        before = Some(bytes);
    }
}

#[test]
fn networks_without_running_statistics_have_none_to_estimate_but_learn() {
    let dir = tempfile::tempdir().unwrap();
    let (model, output) = (shipped("tests/fixtures/zoo_vit.onnx"), dir.path().join("new.onnx"));
    let f = Arrays::read(&shipped("tests/fixtures/zoo_vit.npz"));
    let (name, x) = f.with_prefix("in.").next().unwrap();
    let data = dir.path().join("data.npz");
    write_npz(&data, &[(name, x)]).unwrap();
    let args = ["adapt", text(&model), "--data", text(&data), "--output", text(&output), "--batch", "4"];
    let out = run(&[&args[..], &["--method", "stats"]].concat(), 1);
    let error = String::from_utf8_lossy(&out.stderr);
    assert!(error.contains("no running statistics to re-estimate"), "{error}");
    let summary =
        json(&[&args[..], &["--method", "tent", "--epochs", "1", "--lr", "1e-4", "--json"]].concat(), 0);
    assert_eq!((&summary["ended"], &summary["before"]), (&"adapted".into(), &serde_json::Value::Null));
    let notes = summary["notes"].to_string();
    assert!(notes.contains("no running statistics"), "{notes}");
}

#[test]
fn options_that_make_no_sense_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (model, output) = (shipped("models/dsnet.onnx"), dir.path().join("new.onnx"));
    let data = worn(dir.path(), &noisy(), 16, 0..10);
    let args = ["adapt", text(&model), "--data", text(&data), "--output", text(&output)];
    for (options, part) in [
        (vec!["--balance", "2"], "--balance"),
        (vec!["--statistics", "moving"], "--stream"),
        (vec!["--shape", "1,2"], "--data -"),
        (vec!["--stream", "--schedule", "cosine"], "--schedule"),
        (vec!["--method", "magic"], "magic"),
        (vec!["--require", "beauty>1"], "beauty"),
    ] {
        let out = run(&[&args[..], &options].concat(), 1);
        let error = String::from_utf8_lossy(&out.stderr);
        assert!(error.contains(part), "{options:?}: {error}");
        assert!(!output.exists());
    }
}
