//! Same seed, same bytes: whatever the number of threads, and however often a run was killed.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::common::{retune, run, shipped, text};

/// A small ICP run on shipped images.
fn args<'a>(model: &'a Path, data: &'a Path, output: &'a Path) -> Vec<&'a str> {
    let mut args = vec!["finetune", text(model), "--data", text(data), "--output", text(output)];
    args.extend([
        "--holdout",
        "0.9",
        "--no-guard",
        "--epochs",
        "2",
        "--batch",
        "32",
        "--icp-steps",
        "2",
        "--seed",
        "5",
    ]);
    args
}

fn files() -> (std::path::PathBuf, std::path::PathBuf) {
    (shipped("models/dsnet.onnx"), shipped("models/fashion-images-idx3-ubyte.gz"))
}

#[test]
fn one_two_and_four_threads_give_the_same_bytes() {
    same_on_any_threads(&[]);
}

/// Rounded at random, which must not depend on who does it either.
const NARROW: &[&str] = &["--precision", "bf16", "--master-free", "--optimizer-state", "8bit", "--clip", "0"];

#[test]
fn half_precision_gives_the_same_bytes_on_any_threads() {
    same_on_any_threads(NARROW);
    same_on_any_threads(&["--precision", "f16", "--optimizer-state", "bf16"]);
}

fn same_on_any_threads(more: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = files();
    let mut before: Option<Vec<u8>> = None;
    for threads in ["1", "2", "4"] {
        let output = dir.path().join(format!("{threads}.onnx"));
        let mut a = args(&model, &data, &output);
        a.extend(["--threads", threads]);
        a.extend(more);
        run(&a, 0);
        let bytes = std::fs::read(&output).unwrap();
        assert!(bytes != std::fs::read(&model).unwrap());
        if let Some(before) = &before {
            assert!(*before == bytes, "{threads} threads change the result");
        }
        before = Some(bytes);
    }
}

#[test]
fn killed_and_resumed_runs_give_the_same_bytes() {
    same_when_resumed(&[]);
}

#[test]
fn half_precision_gives_the_same_bytes_when_resumed() {
    same_when_resumed(NARROW);
}

fn same_when_resumed(more: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = files();
    let whole = dir.path().join("whole.onnx");
    let start = Instant::now();
    run(&[&args(&model, &data, &whole)[..], more].concat(), 0);
    let seconds = start.elapsed().as_secs_f64();

    let (output, folder) = (dir.path().join("resumed.onnx"), dir.path().join("checkpoints"));
    let mut a = args(&model, &data, &output);
    a.extend(["--checkpoint", text(&folder), "--checkpoint-every", "1", "--resume"]);
    a.extend(more);
    let mut kills = 0;
    // Killed at several points of the run: start-up, first and later steps, the end.
    for part in [0.05, 0.35, 0.5, 0.6, 0.7] {
        let mut child = retune().args(&a).stderr(std::process::Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_secs_f64(seconds * part));
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            kills += 1;
        }
        child.wait().unwrap();
    }
    assert!(kills > 0, "no run was caught alive");
    run(&a, 0);
    assert!(std::fs::read(&whole).unwrap() == std::fs::read(&output).unwrap(), "a resumed run differs");
    // A finished one writes the same output again.
    std::fs::remove_file(&output).unwrap();
    run(&a, 0);
    assert!(std::fs::read(&whole).unwrap() == std::fs::read(&output).unwrap());
    // And a run with other options is refused.
    let mut other = a.clone();
    other.extend(["--lr", "0.5"]);
    let refused = run(&other, 1);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("other options"));
}

#[test]
fn memory_of_its_own_for_every_value_gives_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = files();
    let (shared, separate) = (dir.path().join("shared.onnx"), dir.path().join("separate.onnx"));
    run(&args(&model, &data, &shared), 0);
    let out =
        retune().args(args(&model, &data, &separate)).env("RETUNE_MEMORY", "separate").output().unwrap();
    assert!(out.status.success());
    assert!(std::fs::read(&shared).unwrap() == std::fs::read(&separate).unwrap());
}

/// Lower instruction set levels round differently and learn the same.
#[test]
fn every_instruction_set_level_learns_alike() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = files();
    let mut losses = Vec::new();
    for isa in ["portable", "avx2", "avx512"] {
        let output = dir.path().join(format!("{isa}.onnx"));
        let mut a = args(&model, &data, &output);
        a.push("--json");
        let out = retune().args(&a).env("RETUNE_ISA", isa).output().unwrap();
        let summary: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        losses.push(summary["epochs"][0]["loss"].as_f64().unwrap());
    }
    println!("losses of the first epoch: {losses:?}");
    for l in &losses {
        assert!((l - losses[0]).abs() <= 0.02 * losses[0], "{losses:?}");
    }
}
