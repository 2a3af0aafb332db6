//! `retune study`: resumed after a kill, cells that come out as they were.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::common::{json, retune, run, shipped, text};

/// A study of two arms on the shipped network and images, small.
fn config(dir: &Path) -> std::path::PathBuf {
    let toml = format!(
        r#"
        title = "Two arms"
        baseline = "plain"
        seeds = 2
        [base]
        model = {:?}
        data = {:?}
        worn = true
        test = 200
        samples = 64
        epochs = 2
        batch = 32
        lr = 1e-3
        icp-steps = 1
        [[axis]]
        name = "label noise"
        key = "label-noise"
        values = [0.0, 0.4]
        [[arm]]
        name = "plain"
        method = "supervised"
        [[arm]]
        name = "icp"
        [quick]
        seeds = 1
        "#,
        shipped("models/dsnet.onnx"),
        shipped("models/fashion-images-idx3-ubyte.gz")
    );
    let path = dir.join("two.toml");
    std::fs::write(&path, toml).unwrap();
    path
}

/// Names and accuracies of the recorded cells, in the order they were recorded.
fn recorded(folder: &Path) -> Vec<(String, f64)> {
    let text = std::fs::read_to_string(folder.join("results.jsonl")).unwrap_or_default();
    let whole = text.lines().filter_map(|l| serde_json::from_str::<serde_json::Value>(l).ok());
    whole
        .map(|r| (r["cell"].as_str().unwrap().to_string(), r["after"]["accuracy"].as_f64().unwrap()))
        .collect()
}

#[test]
fn a_killed_study_goes_on_and_its_cells_come_out_as_they_were() {
    let dir = tempfile::tempdir().unwrap();
    let path = config(dir.path());
    let folder = dir.path().join("out");
    let args = ["study", text(&path), "--output", text(&folder), "--threads", "2", "--json"];
    // Killed as soon as something is recorded.
    let mut child = retune().args(args).stdout(std::process::Stdio::null()).spawn().unwrap();
    let start = Instant::now();
    while recorded(&folder).is_empty() && child.try_wait().unwrap().is_none() {
        assert!(start.elapsed() < Duration::from_secs(300), "nothing is recorded");
        std::thread::sleep(Duration::from_millis(20));
    }
    child.kill().ok();
    child.wait().unwrap();
    let before = recorded(&folder);
    let table = json(&args, 0);
    let after = recorded(&folder);
    assert_eq!(after[..before.len()], before, "what was recorded stays");
    let names: std::collections::BTreeSet<&str> = after.iter().map(|r| r.0.as_str()).collect();
    assert_eq!((names.len(), after.len()), (8, 8), "every cell once: {after:?}");
    assert_eq!((&table["cells"], &table["recorded"]), (&8.into(), &8.into()));
    let block = &table["blocks"][0];
    let of = |arm: usize, seed: u64| {
        let name = format!("label noise=0.0/{}/seed={seed}", ["plain", "icp"][arm]);
        after.iter().find(|r| r.0 == name).unwrap().1
    };
    let mean = (of(1, 0) + of(1, 1)) / 2.0;
    assert!((block["rows"][1]["accuracy"]["mean"].as_f64().unwrap() - mean).abs() < 1e-12);
    let difference = mean - (of(0, 0) + of(0, 1)) / 2.0;
    assert!((block["rows"][1]["difference"]["mean"].as_f64().unwrap() - difference).abs() < 1e-12);
    // Noisy labels teach something else.
    assert_ne!(table["blocks"][0]["rows"], table["blocks"][1]["rows"]);
    for page in ["table.md", "index.html"] {
        assert!(std::fs::read_to_string(folder.join(page)).unwrap().contains("icp"), "{page}");
    }

    // One cell again, on another number of threads: every number as recorded, and nothing new is.
    let cell = "label noise=0.4/icp/seed=1";
    let one = ["study", text(&path), "--output", text(&folder), "--threads", "1", "--cell", cell, "--json"];
    assert_eq!(json(&one, 0)["reproduced"], true);
    assert_eq!(recorded(&folder), after);
    // A record that says something else is contradicted.
    let results = folder.join("results.jsonl");
    let lines = std::fs::read_to_string(&results).unwrap();
    let (line, _) = lines.lines().map(|l| (l, ())).find(|l| l.0.contains(cell)).unwrap();
    let mut wrong: serde_json::Value = serde_json::from_str(line).unwrap();
    wrong["after"]["accuracy"] = 0.123.into();
    std::fs::write(&results, format!("{lines}{wrong}\n")).unwrap();
    assert_eq!(json(&one, 1)["reproduced"], false);
}

#[test]
fn a_quick_study_is_smaller_and_mistakes_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = config(dir.path());
    let list = |args: &[&str]| String::from_utf8(run(args, 0).stdout).unwrap().lines().count();
    assert_eq!(list(&["study", text(&path), "--list"]), 8);
    assert_eq!(list(&["study", text(&path), "--list", "--quick"]), 4);
    let out = run(&["study", text(&path), "--cell", "none"], 1);
    assert!(String::from_utf8_lossy(&out.stderr).contains("no cell is called 'none'"));
    std::fs::write(&path, std::fs::read_to_string(&path).unwrap().replace("lr = 1e-3", "lr = -1.0")).unwrap();
    let out = run(&["study", text(&path)], 1);
    assert!(String::from_utf8_lossy(&out.stderr).contains("--lr"));
}

/// The committed studies can be read, and every cell of theirs is sound.
#[test]
fn the_committed_studies_are_sound() {
    let mut seen = 0;
    for entry in std::fs::read_dir(shipped("studies")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "toml") {
            let whole = retune::study::Study::read(&path, false).unwrap();
            let quick = retune::study::Study::read(&path, true).unwrap();
            assert!(quick.cells.len() < whole.cells.len(), "{}", path.display());
            for cell in &whole.cells {
                // One is as large as the network it is like, and made by a script.
                let made = cell.task.model.ends_with("resnet20-untrained.onnx");
                let there = whole.folder.join(&cell.task.model).exists();
                assert!(there || made, "{}: no model", cell.name);
            }
            seen += 1;
        }
    }
    assert!(seen > 0);
}
