//! `--memory-budget`: the same weights within less memory.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use retune::exec::{Options, Session};
use retune::graph::WeightId;
use retune::plan::Again;
use retune::tensor::{DType, Meta, Tensor, View};
use retune::train::loss::Loss;
use retune::train::optimizer::Optimizer;
use retune::train::step::{self, Norm, Recipe, Shapes, Supervised};

use crate::common::{all, json, root, run, shipped, text};
use crate::memory::{peak, start};

/// A step's arena, its loss, all states after three steps, and what is computed again, in an arena of at most `arena` bytes.
fn steps(
    model: &Path,
    (name, image): (&str, &Meta),
    arena: Option<usize>,
    optimizer: Optimizer,
) -> (usize, f64, Vec<Vec<u8>>, Again) {
    let model = Arc::new(retune::import::load(model).unwrap());
    let options = Options { threads: 2, arena, ..Options::default() };
    let mut session = Session::new(model.clone(), options).unwrap();
    let loss = Loss::CrossEntropy { label_smoothing: 0.0 };
    let image = image.clone();
    let target = Meta::new(DType::I64, &image.dims[..1]);
    let shapes = Shapes { inputs: vec![(name.into(), image.clone())], target: target.clone() };
    let reached = step::reached(&session, &loss, &shapes).unwrap();
    let ids = (0..model.weights.len() as u32).map(WeightId);
    let params = ids.filter(|w| model.weight(*w).trainable && reached[w.index()]).collect();
    let recipe = Recipe { loss, optimizer, clip: None, params, norm: Norm::Batch, accumulate: 1 };
    recipe.prepare(&mut session).unwrap();
    let step = Supervised::new(&mut session, &recipe, &shapes).unwrap();
    let x: Vec<f64> = (0..image.len()).map(|i| ((i as f64) * 0.37).sin() * 2.0 + 2.0).collect();
    let x = Tensor::from_slice(&image.dims, &x).unwrap().cast(image.dtype);
    let labels: Vec<i64> = (0..target.len() as i64).map(|i| i % 3).collect();
    let y = Tensor::from_slice(&target.dims, &labels).unwrap();
    let fed: [(_, View); 2] = [(step.inputs[0], x.view()), (step.attached.target, y.view())];
    let mut last = 0.0;
    for t in 0..3 {
        step::set_step(&mut session, 1e-3, t + 1);
        session.run(&step.program, &fed, t as u64).unwrap();
        last = session.scalar(&step.program, step.attached.loss).unwrap();
    }
    let store = session.store();
    let states = store.ids().map(|s| store.tensor(s).bytes().to_vec()).collect();
    (step.program.plan.arena_bytes, last, states, step.program.plan.again)
}

#[test]
fn less_memory_gives_the_same_bytes() {
    let image = |dims: &[usize]| Meta::new(DType::F32, dims);
    // The share of the usual arena that is enough: of some networks a few kernels alone take much.
    for (model, name, input, enough) in [
        ("models/resnet20.onnx", "image", image(&[8, 1, 28, 28]), 0.5),
        ("models/dsnet.onnx", "image", image(&[8, 1, 28, 28]), 0.7),
        ("tests/fixtures/mobilenetv2.onnx", "image", image(&[4, 3, 32, 32]), 0.7),
    ] {
        let model = shipped(model);
        let adam = Optimizer::adam(0.0, true);
        let whole = steps(&model, (name, &input), None, adam);
        let smallest = steps(&model, (name, &input), Some(0), adam);
        assert!(whole.2 == smallest.2 && whole.1 == smallest.1, "{}", model.display());
        println!(
            "{}: {} bytes of arena, at least {}: {:.0}% more work",
            model.display(),
            whole.0,
            smallest.0,
            smallest.3.work * 100.0
        );
        assert!((smallest.0 as f64) < enough * whole.0 as f64, "{} of {}", smallest.0, whole.0);
        for share in [0.8, 0.5] {
            let limit = (whole.0 as f64 * share) as usize;
            let some = steps(&model, (name, &input), Some(limit), adam);
            println!("  {share}: {} kernels again, {:.1}% more work", some.3.kernels, some.3.work * 100.0);
            if limit as f64 >= 1.1 * smallest.0 as f64 {
                assert!(some.0 <= limit, "{} of {limit}", some.0);
            }
            assert!(whole.2 == some.2, "{} in {share}", model.display());
        }
    }
}

/// A model that `benches/peers/models.py` makes, or `None` with a printed line.
fn peer(name: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("RETUNE_PEERS").map_or_else(|| root().join("target/peers"), PathBuf::from);
    let path = folder.join(format!("{name}.onnx"));
    if !path.exists() {
        println!(
            "skipped: {} is not there (benches/peers/models.py, or RETUNE_PEERS=FOLDER)",
            path.display()
        );
        return None;
    }
    Some(path)
}

/// Runs training steps within shares of what the usual plan takes: what the process takes above its start stays below the
/// budget. Prints what was chosen; a share that is refused must say what would do.
fn keeps(model: &Path, batch: &str, options: &[&str], shares: &[f64], must: f64) {
    let base = ["bench", text(model), "--batch", batch, "--threads", "2", "--runs", "2"];
    let base = [&base[..], options].concat();
    let usual = json(&[&base[..], &["--memory-budget", "64GiB", "--json"]].concat(), 0)["peak_bytes"]
        .as_u64()
        .unwrap() as f64;
    let start = start();
    for share in shares {
        let budget = ((usual * share) as usize).to_string();
        let args = [&base[..], &["--memory-budget", &budget]].concat();
        let out = crate::common::retune().args(&args).arg("--json").output().unwrap();
        let notes = String::from_utf8_lossy(&out.stderr);
        if out.status.code() == Some(1) {
            println!("{share}: {notes}");
            assert!(notes.contains("at least") && *share < must, "{share}: {notes}");
            continue;
        }
        assert!(out.status.success(), "{notes}");
        let report: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        let above = peak(&args).saturating_sub(start);
        println!(
            "{} batch {batch} at {share}: {above} of {budget} bytes ({} planned), {:.1} ms, {}",
            model.display(),
            report["budget"]["bytes"],
            report["median_ms"],
            notes.trim()
        );
        assert!(above <= (usual * share) as usize, "{share}: {above} of {budget}");
    }
}

#[test]
fn a_process_stays_within_its_budget() {
    if !Path::new("/proc/self/status").exists() {
        println!("skipped: no /proc here");
        return;
    }
    keeps(&shipped("models/resnet20.onnx"), "32", &[], &[1.0, 0.6, 0.4], 0.4);
    keeps(&shipped("models/dsnet.onnx"), "32", &["--mode", "icp", "--icp-steps", "1"], &[0.7], 0.7);
}

#[test]
fn larger_networks_stay_within_their_budgets() {
    if !all() {
        println!("skipped: long (./test.sh --all)");
        return;
    }
    let shares = [1.0, 0.6, 0.4, 0.25];
    for (name, batch, must) in [("resnet20", "128", 0.25), ("mobilenetv2", "8", 0.4), ("encoder", "8", 1.0)] {
        if let Some(model) = peer(name) {
            keeps(&model, batch, &[], &shares, must);
        }
    }
    // (In f32 the encoder's weights and their moments alone are 61% of what there is; in the fewest bits still 21%.)
    for name in ["mobilenetv2", "encoder"] {
        if let Some(model) = peer(name) {
            keeps(&model, "8", &["--allow-half"], &shares[1..], 0.25);
        }
    }
    // All but the table of words, which alone is a third of what there is with its moments.
    if let Some(model) = peer("encoder") {
        keeps(&model, "8", &["--train", "!words.weight"], &shares, 0.6);
    }
    let Some(mobilenet) = peer("mobilenetv2") else { return };
    // With ICP, what the teacher's features take of all 17 blocks is too much: the last four are followed.
    for (preset, mode) in [
        ("bias", &["--mode", "train"][..]),
        ("bias", &["--mode", "icp", "--icp-taps", "last:4"]),
        ("sparse:8MiB", &["--mode", "train"]),
        // (What ICP's gradient of the input takes counts as well.)
        ("sparse:12MiB", &["--mode", "icp", "--icp-taps", "last:4"]),
    ] {
        let args = ["bench", text(&mobilenet), "--batch", "1", "--train", preset, "--runs", "2"];
        let args = [&args[..], mode, &["--memory-budget", "32MiB"]].concat();
        run(&args, 0);
        let above = peak(&args).saturating_sub(start());
        println!("mobilenetv2 batch 1, {preset}, {}: {above} bytes", mode.join(" "));
        assert!(above <= 32 << 20, "{mode:?}: {above}");
    }
}

/// Memory saved by computing again, in place and at once: the file that a finetune writes is the same to the last byte.
#[test]
fn larger_networks_learn_the_same_bytes() {
    if !all() {
        println!("skipped: long (./test.sh --all)");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (name, dims, batch, shares) in [
        ("resnet20", &[3, 32, 32][..], 128, [0.6, 0.4]),
        ("mobilenetv2", &[3, 224, 224], 8, [0.6, 0.4]),
        ("encoder", &[128], 8, [0.9, 0.8]),
    ] {
        let Some(model) = peer(name) else { continue };
        let (data, batches) = (dir.path().join("data.npz"), 2);
        let dims = [&[batch * batches], dims].concat();
        let element = |i: usize| ((i as f64) * 0.37).sin() * 2.0 + 2.0;
        let x: Vec<f64> = (0..dims.iter().product()).map(element).collect();
        let x = Tensor::from_slice(&dims, &x).unwrap();
        let x = x.cast(if name == "encoder" { DType::I64 } else { DType::F32 });
        let y: Vec<i64> = (0..(batch * batches) as i64).map(|i| i % 3).collect();
        retune::train::data::write_npz(&data, &[("x", &x), ("y", &Tensor::ints(&y))]).unwrap();
        let batch = batch.to_string();
        let tuned = |more: &[&str]| {
            let new = dir.path().join("new.onnx");
            let base = ["finetune", text(&model), "--data", text(&data), "--output", text(&new)];
            let length = ["--method", "supervised", "--epochs", "1", "--holdout", "0", "--no-guard"];
            // A bound on the gradient's norm would keep all gradients until it is known.
            let rest = ["--clip", "0", "--json", "--batch", &batch];
            let summary = json(&[&base[..], &length, &rest, more].concat(), 0);
            (std::fs::read(&new).unwrap(), summary)
        };
        let (whole, _) = tuned(&[]);
        let (_, summary) = tuned(&["--memory-budget", "64GiB"]);
        let usual = summary["budget"]["unconstrained"].as_f64().unwrap();
        let mut exact = 0;
        for share in shares {
            let (file, summary) = tuned(&["--memory-budget", &((usual * share) as usize).to_string()]);
            let budget = &summary["budget"];
            println!("{name} at {share} of {usual}: {budget}");
            // Sums over parts of a batch are rounded in another order.
            if budget["parts"] == 1 {
                assert!(file == whole, "{name} at {share}: another file");
                exact += 1;
            }
        }
        assert!(exact > 0, "{name}: always in parts");
        // In the fewest bits, as the file is written too.
        let new = dir.path().join("few.onnx");
        let bytes = (usual * 0.4) as usize;
        let budget = bytes.to_string();
        let args =
            ["finetune", text(&model), "--data", text(&data), "--output", text(&new), "--batch", &batch];
        let length = ["--method", "supervised", "--epochs", "1", "--holdout", "0", "--no-guard"];
        let rest = [
            "--clip",
            "0",
            "--memory-budget",
            &budget,
            "--allow-half",
            "--precision",
            "bf16",
            "--master-free",
        ];
        let above = peak(&[&args[..], &length, &rest].concat()).saturating_sub(start());
        println!("{name}, of few bits at 0.4: {above} of {bytes}");
        assert!(new.exists() && above <= bytes, "{name}: {above} of {bytes}");
    }
}

#[test]
fn finetuning_within_a_budget() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = (shipped("models/resnet20.onnx"), shipped("models/fashion-images-idx3-ubyte.gz"));
    let finetune = |name: &str, more: &[&str], code: i32| {
        let output = dir.path().join(name);
        let base = ["finetune", text(&model), "--data", text(&data), "--output", text(&output), "--json"];
        let length =
            ["--method", "supervised", "--no-guard", "--epochs", "1", "--batch", "64", "--holdout", "0.95"];
        let out = run(&[&base[..], &length, more].concat(), code);
        (out, output)
    };
    let (_, whole) = finetune("whole.onnx", &[], 0);
    let (out, tight) = finetune("tight.onnx", &["--memory-budget", "64MiB"], 0);
    let summary: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let budget = &summary["budget"];
    assert_eq!(
        (budget["parts"].as_u64(), budget["ghost_norm"].as_bool()),
        (Some(1), Some(false)),
        "{budget}"
    );
    assert!(budget["again"]["kernels"].as_u64().unwrap() > 0, "{budget}");
    assert!(
        budget["bytes"].as_u64().unwrap() <= 64 << 20 && budget["unconstrained"].as_u64().unwrap() > 64 << 20
    );
    assert!(std::fs::read(whole).unwrap() == std::fs::read(tight).unwrap());

    // What may be kept in half precision is so before batches are cut.
    let (out, _) = finetune("half.onnx", &["--precision", "bf16"], 0);
    let half: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let (out, file) = finetune("allowed.onnx", &["--memory-budget", "33MiB", "--allow-half"], 0);
    let allowed: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let budget = &allowed["budget"];
    assert_eq!((budget["parts"].as_u64(), budget["kept"]["precision"].as_str()), (Some(1), Some("bf16")));
    assert!(String::from_utf8_lossy(&out.stderr).contains("what gradients need is kept in bf16"));
    let loss = |summary: &serde_json::Value| summary["after"]["loss"].as_f64().unwrap();
    assert!((loss(&half) / loss(&allowed) - 1.0).abs() < 0.02, "{half} {allowed}");
    let (_, looser) = finetune("looser.onnx", &["--precision", "bf16", "--memory-budget", "44MiB"], 0);
    assert!(std::fs::read(file).unwrap() == std::fs::read(looser).unwrap());

    let (out, tighter) = finetune("parts.onnx", &["--memory-budget", "24MiB"], 0);
    let summary: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(summary["budget"]["ghost_norm"], true, "{}", summary["budget"]);
    assert!(String::from_utf8_lossy(&out.stderr).contains("ghost batch normalisation"));
    assert!(tighter.exists());

    let (out, refused) = finetune("refused.onnx", &["--memory-budget", "2MiB"], 1);
    assert!(!refused.exists());
    let (least, _) = would_do(&out);
    let (_, least) = finetune("least.onnx", &["--memory-budget", &least], 0);
    assert!(least.exists());
}

/// What a refusal says would do, does, for the network's own targets too: values are computed again, and batches cut.
#[test]
fn distillation_in_the_least_memory() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = (shipped("models/resnet20.onnx"), shipped("models/fashion-images-idx3-ubyte.gz"));
    for (method, precision) in [("icp", "f32"), ("icp", "bf16"), ("byot", "f32")] {
        let output = dir.path().join(format!("{method}-{precision}"));
        let base = ["finetune", text(&model), "--data", text(&data), "--output", text(&output)];
        let length = ["--method", method, "--no-guard", "--epochs", "1", "--batch", "8", "--holdout", "0.98"];
        let base = [&base[..], &length, &["--precision", precision, "--memory-budget"]].concat();
        let refused = run(&[&base[..], &["1MiB"]].concat(), 1);
        let (least, size) = would_do(&refused);
        let above = peak(&[&base[..], &[&least]].concat()).saturating_sub(start());
        println!("{method} in {precision}: {least} asked for, {above} bytes taken");
        assert!(output.exists() && above <= size, "{above} of {size}");
    }
}

/// The least memory that a refusal names, and its bytes.
fn would_do(refused: &std::process::Output) -> (String, usize) {
    let why = String::from_utf8_lossy(&refused.stderr);
    assert!(why.contains("at least"), "{why}");
    let least = why.split("at least ").nth(1).unwrap().split(';').next().unwrap().replace(' ', "");
    let bytes = least.trim_end_matches("MiB").parse::<f64>().unwrap() * 1048576.0;
    (least, bytes as usize)
}

/// A sentence encoder of 90 MB gets a head, and then learns by low-rank additions. The file with the head is edited and
/// mapped; the additions are merged, and each whole weight is written, one by one.
#[test]
fn a_large_file_is_edited_and_merged_within_its_budget() {
    let Some(model) = crate::common::fetched("minilm/model.onnx") else { return };
    let dir = tempfile::tempdir().unwrap();
    let (data, headed, new) =
        (dir.path().join("data.npz"), dir.path().join("headed.onnx"), dir.path().join("new.onnx"));
    let tokens = |f: &dyn Fn(i64) -> i64| {
        let all: Vec<i64> = (0..16 * 16).map(f).collect();
        Tensor::from_slice(&[16, 16], &all).unwrap()
    };
    let (words, ones, zeros) = (tokens(&|i| 1000 + 37 * i % 9000), tokens(&|_| 1), tokens(&|_| 0));
    let y = Tensor::ints(&(0..16).map(|i| i % 2).collect::<Vec<i64>>());
    let arrays = [("input_ids", &words), ("attention_mask", &ones), ("token_type_ids", &zeros), ("y", &y)];
    retune::train::data::write_npz(&data, &arrays).unwrap();
    // In the least that would do, of which a refusal tells: so many bytes.
    let finetune = |model: &Path, output: &Path, options: &[&str]| {
        let base = ["finetune", text(model), "--data", text(&data), "--output", text(output)];
        let length =
            ["--method", "supervised", "--epochs", "1", "--batch", "8", "--holdout", "0", "--no-guard"];
        let base = [&base[..], &length, options, &["--memory-budget"]].concat();
        let refused = run(&[&base[..], &["1MiB"]].concat(), 1);
        let (least, size) = would_do(&refused);
        let above = peak(&[&base[..], &[&least]].concat()).saturating_sub(start());
        println!("{options:?}: {least} asked for, {above} bytes taken");
        assert!(output.exists() && above <= size, "{above} of {size}");
        size
    };
    let file = std::fs::metadata(&model).unwrap().len() as usize;
    let size = finetune(&model, &headed, &["--head", "2", "--at", "461", "--train", "head"]);
    assert!(size < file / 4, "a copy of the file: {size}");
    let size = finetune(&headed, &new, &["--train", "lora:4"]);
    assert!(size < file * 2 / 3, "a copy of all that was merged: {size}");
}

/// Two gigabytes of weights in a data file of their own: only the last layers learn, and what the process takes beside the
/// mapping does not grow with the file.
#[test]
fn a_model_of_two_gigabytes_learns_in_a_fraction_of_it() {
    if !all() {
        println!("skipped: long (./test.sh --all)");
        return;
    }
    let Some(python) = crate::real_models::python() else { return };
    let dir = tempfile::tempdir().unwrap();
    let made = std::process::Command::new(python)
        .arg(root().join("tests/large_model.py"))
        .args([dir.path().as_os_str(), "2048".as_ref()])
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let at = |name: &str| dir.path().join(name);
    let (model, data, weights) = (at("large.onnx"), at("data.npz"), at("large.onnx.data"));
    let size = std::fs::metadata(&weights).unwrap().len() as usize;
    assert!(size >= 2 << 30, "{size}");
    std::fs::create_dir(at("out")).unwrap();
    let output = at("out").join("large.onnx");
    let budget = (size * 15 / 100).to_string();
    let args = ["finetune", text(&model), "--data", text(&data), "--output", text(&output), "--json"];
    let options =
        ["--method", "supervised", "--train", "last:3", "--epochs", "2", "--batch", "16", "--no-guard"];
    let args = [&args[..], &options, &["--lr", "1e-6", "--memory-budget", &budget]].concat();
    let above = peak(&args).saturating_sub(start());
    println!(
        "{size} bytes of weights: {above} bytes at the peak, {:.1}%",
        above as f64 / size as f64 * 100.0
    );
    assert!(output.exists() && above <= size * 15 / 100, "{above}");
    std::fs::remove_dir_all(at("out")).unwrap();
    std::fs::create_dir(at("out")).unwrap();
    // Under a limit on what a process may write to; a map of a file that is only read does not count.
    let limited = std::process::Command::new("sh")
        .args(["-c", "ulimit -d $1; shift; exec \"$@\"", "sh"])
        .arg((size / 4 / 1024).to_string())
        .arg(env!("CARGO_BIN_EXE_retune"))
        .args(&args)
        .output()
        .unwrap();
    assert!(limited.status.success(), "{}", String::from_utf8_lossy(&limited.stderr));
    let summary: serde_json::Value = serde_json::from_slice(&limited.stdout).unwrap();
    println!("loss {} -> {}", summary["before"]["loss"], summary["after"]["loss"]);
    assert!(summary["after"]["loss"].as_f64() < summary["before"]["loss"].as_f64());
    // Only the last layers' bytes differ.
    let same = |n: usize| {
        use std::io::Read;
        let read = |path: PathBuf| {
            let mut bytes = vec![0; n];
            std::fs::File::open(path).unwrap().read_exact(&mut bytes).unwrap();
            bytes
        };
        read(weights.clone()) == read(at("out").join("large.onnx.data"))
    };
    assert!(
        same(1 << 28) && std::fs::metadata(at("out").join("large.onnx.data")).unwrap().len() as usize == size
    );
}
