//! What `--train` chooses: low-rank additions and sparse updates, against PyTorch and against full training.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use retune::exec::{Options, Part, Session};
use retune::graph::grad;
use retune::ops::Mode;
use retune::ops::part::Inset;
use retune::plan::Request;
use retune::tensor::Tensor;
use retune::train::data::write_npz;
use retune::train::loss::Loss;
use retune::train::step::{Network, Shapes, feeds, param_values};

use crate::common::{Arrays, json, relative, run, shipped, text};
use crate::real_models::{equals_onnxruntime_on, python, wave};

/// The factors' gradients of a network with every kind of layer that has additions, merged and beside the layer.
#[test]
fn low_rank_gradients_equal_pytorch() {
    let model = Arc::new(retune::import::load(shipped("tests/fixtures/presets/lora.onnx")).unwrap());
    let truth = Arrays::read(&shipped("tests/fixtures/presets/lora.npz"));
    let mut session = Session::new(model.clone(), Options { threads: 1, ..Options::default() }).unwrap();
    let rank = truth.get("rank").to_ints().unwrap()[0] as usize;
    let alpha = truth.get("alpha").to_f64()[0];
    let mut params = Vec::new();
    for (name, input_first) in [("conv", false), ("mat", true), ("turned", false), ("gemm", false)] {
        let id = model.find_weight(name).unwrap();
        session.make_part(id, &Part::LowRank { rank, alpha, input_first }, 0).unwrap();
        params.push(id);
        for what in ["lora_a", "lora_b"] {
            let name = format!("{name}.{what}");
            let state = session.store().find(&name).unwrap();
            let t = truth.get(&name);
            assert_eq!(session.store().meta(state).dims.as_slice(), t.dims(), "{name}");
            session.store_mut().set(state, t.bytes());
        }
    }
    let data = retune::train::data::Dataset::from_arrays(
        vec![("x".into(), truth.get("x").clone())],
        Some(truth.get("y").clone()),
    )
    .unwrap();
    let mut batch = data.new_batch(4);
    data.batch(&[0, 1, 2, 3], None, &mut batch).unwrap();
    let shapes = Shapes::of(&batch).unwrap();
    let wrt = param_values(&session, &params);
    for learn in [false, true] {
        let mut net = Network::new(&session, Mode::TRAIN, &shapes, &HashMap::new()).unwrap();
        net.fuse(&[], learn).unwrap();
        let loss = Loss::CrossEntropy { label_smoothing: 0.0 };
        let attached = loss.attach(&mut net.graph, shapes.target.clone()).unwrap();
        let grads = grad(&mut net.graph, attached.loss, &wrt).unwrap();
        let mut outputs: Vec<_> = wrt.iter().map(|v| grads[v]).collect();
        outputs.extend([attached.loss, attached.logits]);
        let program = session.compile(net.graph, Request { outputs, ..Request::default() }).unwrap();
        // Where the weights learn, none is merged, not even the one behind a Transpose.
        let merged = program.plan.steps.iter().filter(|s| s.op.name() == "LowRank").count();
        assert_eq!(merged, if learn { 0 } else { 4 });
        session.run(&program, &feeds(&net.inputs, attached.target, &batch).unwrap(), 0).unwrap();
        let close = |name: &str, v| {
            let ours = session.output(&program, v).unwrap().to_tensor();
            let e = relative(&truth.get(name).to_f64(), &ours.to_f64());
            assert!(e <= 2e-5, "{name}, weights learn: {learn}: {e:.1e}");
        };
        close("loss", attached.loss);
        close("scores", attached.logits);
        for v in &wrt {
            close(&format!("grad.{}", program.graph.value(*v).name), grads[v]);
        }
    }
    // And what an export would write computes the same.
    let whole = session.forward(&[("x".into(), truth.get("x").clone())]).unwrap();
    assert!(relative(&truth.get("scores").to_f64(), &whole[0].1.to_f64()) <= 2e-5);
}

/// The names of the weights in which two model files differ; nothing else may.
fn differing(a: &Path, b: &Path) -> Vec<String> {
    let (a, b) = (retune::import::load(a).unwrap(), retune::import::load(b).unwrap());
    assert_eq!(a.graph.to_string(), b.graph.to_string());
    let other = |w: &&retune::import::Weight| {
        let v = b.weight(b.find_weight(&w.name).unwrap());
        assert_eq!((v.dtype, &v.dims), (w.dtype, &w.dims));
        v.stored(&b.files).unwrap() != w.stored(&a.files).unwrap()
    };
    a.weights.iter().filter(other).map(|w| w.name.clone()).collect()
}

/// Labelled waves.
fn data(path: &Path, n: usize, dims: &[usize], classes: i64) {
    let x = wave(&[&[n], dims].concat());
    let y = Tensor::ints(&(0..n as i64).map(|i| i * 7 % classes).collect::<Vec<_>>());
    write_npz(path, &[("x", &x), ("y", &y)]).unwrap();
}

fn finetune(model: &Path, data: &Path, output: &Path, more: &[&str]) -> serde_json::Value {
    let base =
        ["finetune", text(model), "--data", text(data), "--output", text(output), "--json", "--no-guard"];
    json(
        &[&base[..], &["--epochs", "2", "--batch", "8", "--lr", "1e-2", "--holdout", "0.25"], more].concat(),
        0,
    )
}

/// Merged on export: the file keeps its structure, and onnxruntime computes what the session did.
#[test]
fn low_rank_additions_are_merged_on_export() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let model = shipped("tests/fixtures/presets/lora.onnx");
    data(&at("data.npz"), 32, &[16, 5, 5], 16);
    for method in ["supervised", "icp"] {
        let s =
            finetune(&model, &at("data.npz"), &at("new.onnx"), &["--train", "lora:2", "--method", method]);
        assert_eq!(s["verified"], "agrees");
        assert_eq!(s["trained_parameters"], 2 * (24 + 16 + 24 + 20 + 20 + 20 + 16 + 20));
        assert!(s["notes"].to_string().contains("4 layers"), "{}", s["notes"]);
        assert_eq!(differing(&model, &at("new.onnx")), ["conv", "turned", "gemm", "mat"]);
        if let Some(python) = python() {
            equals_onnxruntime_on(&python, &at("new.onnx"), &[("x", &wave(&[3, 16, 5, 5]))]);
        }
    }
    // Layers by name, of weight, node or output; others as a whole; a rank beyond the sides.
    let more = ["--train", "lora:99@mat,n + conv_b", "--lora-alpha", "16", "--method", "supervised"];
    let s = finetune(&model, &at("data.npz"), &at("new.onnx"), &more);
    assert_eq!(differing(&model, &at("new.onnx")), ["turned", "conv_b", "mat"]);
    assert!(s["notes"].to_string().contains("clamped to the smaller side of turned, mat"), "{}", s["notes"]);
    let (samples, no) = (at("data.npz"), at("no.onnx"));
    let base = ["finetune", text(&model), "--data", text(&samples), "--output", text(&no)];
    for (train, what) in
        [("lora:2@nothing*", "nothing*"), ("lora:0", "lora:0"), ("lora:2@conv+conv", "as a whole")]
    {
        let out = run(&[&base[..], &["--train", train, "--method", "supervised"]].concat(), 1);
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(said.contains(what), "{train}: {said}");
    }
    assert!(!no.exists());
}

/// Stored types survive, also of weights in parts.
#[test]
fn low_rank_additions_to_half_floats() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let model = shipped("tests/fixtures/files/types.onnx");
    data(&at("data.npz"), 32, &[3], 4);
    let s =
        finetune(&model, &at("data.npz"), &at("new.onnx"), &["--train", "lora:2", "--method", "supervised"]);
    assert_eq!(s["steps"], 6);
    assert_eq!(differing(&model, &at("new.onnx")).len(), 3);
}

/// Same seed, same bytes, for parts of weights too: on any number of threads, in any memory mode, and resumed.
#[test]
fn parts_of_weights_are_reproducible() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let model = shipped("models/dsnet.onnx");
    let images = shipped("models/fashion-images-idx3-ubyte.gz");
    for (preset, method) in [("lora:4+norm", "icp"), ("lora:4", "supervised")] {
        let run = |name: &str, more: &[&str]| {
            let base = ["finetune", text(&model), "--data", text(&images), "--output"];
            let out = at(name);
            let options =
                ["--holdout", "0.9", "--no-guard", "--epochs", "2", "--icp-steps", "2", "--seed", "5"];
            let own = ["--train", preset, "--method", method];
            run(&[&base[..], &[text(&out)], &options, &own, more].concat(), 0);
            std::fs::read(out).unwrap()
        };
        let one = run("one.onnx", &["--threads", "1"]);
        assert!(one != std::fs::read(&model).unwrap());
        assert!(one == run("two.onnx", &["--threads", "2"]), "{preset}: threads change the result");
        let folder = at(&format!("{method}.checkpoints"));
        let kept = ["--checkpoint", text(&folder), "--checkpoint-every", "3", "--resume"];
        assert!(one == run("kept.onnx", &kept), "{preset}: checkpoints change the result");
        // From the last checkpoint, which is the end.
        assert!(one == run("again.onnx", &kept), "{preset}: a resumed run differs");
        if method == "supervised" {
            let summed = run("summed.onnx", &["--accumulate", "2"]);
            assert!(summed != one);
        }
    }
}

#[test]
fn a_preset_is_planned_for_less() {
    let model = shipped("models/dsnet.onnx");
    let peak = |preset: &str| {
        let plan = json(&["plan", text(&model), "--batch", "8", "--train", preset, "--json"], 0);
        let modes = plan["modes"].as_array().unwrap();
        let mode = modes.iter().find(|m| m["mode"] == "supervised").unwrap();
        (mode["memory"]["optimizer"].as_u64().unwrap(), mode["peak_bytes"].as_u64().unwrap())
    };
    let (full, lora) = (peak("all"), peak("lora:2"));
    println!("dsnet, batch 8: optimizer and peak {full:?} in full, {lora:?} with lora:2");
    assert!(lora.0 < full.0 / 2 && lora.1 < full.1);
}

/// Labelled images of the shipped set, and their shapes, for dsnet: depthwise, pointwise and strided convolutions, a dense
/// layer.
fn images(n: usize) -> (Arc<retune::import::Model>, retune::train::data::Batch, Shapes) {
    let model = Arc::new(retune::import::load(shipped("models/dsnet.onnx")).unwrap());
    let specs = retune::finetune::input_specs(&model);
    let path = shipped("models/fashion-images-idx3-ubyte.gz");
    let data = retune::train::data::open(&path, &Default::default(), &specs).unwrap();
    let data = data.bind(&specs).unwrap();
    let mut batch = data.new_batch(n);
    data.batch(&(0..n).collect::<Vec<_>>(), None, &mut batch).unwrap();
    let shapes = Shapes::of(&batch).unwrap();
    (model, batch, shapes)
}

/// Gradients of slices, from slices of activations, are the slices of gradients.
#[test]
fn gradients_of_slices_are_computed_alone() {
    let (model, batch, shapes) = images(4);
    let ids: Vec<retune::graph::WeightId> =
        (0..model.weights.len() as u32).map(retune::graph::WeightId).collect();
    let weights: Vec<_> = ids
        .into_iter()
        .filter(|w| model.weight(*w).trainable && model.weight(*w).role == retune::import::Role::Weight)
        .collect();
    let inset = |w: retune::graph::WeightId| {
        let dims = &model.weight(w).dims;
        // Depthwise ones have one channel each; the dense layer is stored transposed.
        let axis = usize::from(dims[1] > 1);
        let from = usize::from(dims[axis] > 2);
        Inset { axis, from, count: (dims[axis] / 2).max(1) }
    };
    let gradients = |parts: bool| {
        let mut session = Session::new(model.clone(), Options { threads: 2, ..Options::default() }).unwrap();
        for w in &weights {
            match parts {
                true => session.make_part(*w, &Part::Slice(inset(*w)), 0).unwrap(),
                false => session.make_mutable(&[*w]).unwrap(),
            }
        }
        let wrt = param_values(&session, &weights);
        let mut net = Network::new(&session, Mode::TRAIN, &shapes, &HashMap::new()).unwrap();
        net.fuse(&[], true).unwrap();
        let loss = Loss::CrossEntropy { label_smoothing: 0.0 };
        let attached = loss.attach(&mut net.graph, shapes.target.clone()).unwrap();
        let forward = net.graph.nodes.len();
        let grads = grad(&mut net.graph, attached.loss, &wrt).unwrap();
        retune::graph::narrow(&mut net.graph, forward).unwrap();
        let outputs: Vec<_> = wrt.iter().map(|v| grads[v]).collect();
        let program = session.compile(net.graph, Request { outputs, ..Request::default() }).unwrap();
        session.run(&program, &feeds(&net.inputs, attached.target, &batch).unwrap(), 0).unwrap();
        let all: Vec<Tensor> =
            wrt.iter().map(|v| session.output(&program, grads[v]).unwrap().to_tensor()).collect();
        // Elements of weight gradients that are computed: no more than are wanted.
        let made = program
            .plan
            .steps
            .iter()
            .filter(|s| ["ConvWeightGrad", "ConvGrads", "Gemm"].contains(&s.op.name()));
        let largest = made.map(|s| s.y.last().unwrap().dims.iter().product::<usize>()).max().unwrap();
        (all, largest)
    };
    let ((whole, most), (parts, least)) = (gradients(false), gradients(true));
    assert!(least < most, "{least} of {most}");
    for (w, (whole, part)) in weights.iter().zip(whole.iter().zip(&parts)) {
        let crop = retune::ops::slice::Crop { cut: inset(*w).cut(whole.dims()) };
        let expected = retune::ops::eval(&crop, &[Some(whole)]).unwrap().remove(0);
        assert_eq!(expected.dims(), part.dims());
        let e = relative(&expected.to_f64(), &part.to_f64());
        assert!(e <= 2e-3, "{}: {e:.1e}", model.weight(*w).name);
    }
}

/// What a sparse update was planned for is what it takes, and only what it chose changes.
#[test]
fn sparse_updates_keep_their_budget() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (model, samples) = (shipped("models/dsnet.onnx"), at("data.npz"));
    let batch = images(64).1;
    write_npz(&samples, &[("x", &batch.inputs[0].1), ("y", batch.target.as_ref().unwrap())]).unwrap();
    let base = ["finetune", text(&model), "--data", text(&samples), "--norm", "frozen", "--json", "--output"];
    // Nothing is held out: evaluations have larger batches than the plan's forward pass.
    let options = ["--holdout", "0", "--epochs", "1", "--batch", "16", "--method", "supervised", "--train"];
    let tuned = |name: &str, train: &str, more: &[&str]| {
        let out = at(name);
        let threads: &[&str] = if more.is_empty() { &["--threads", "1"] } else { more };
        let s = json(&[&base[..], &[text(&out)], &options, &[train], threads].concat(), 0);
        (s, differing(&model, &out))
    };
    let plan = json(&["plan", text(&model), "--batch", "16", "--norm", "frozen", "--json"], 0);
    let forward =
        plan["modes"].as_array().unwrap().iter().find(|m| m["mode"] == "forward").unwrap()["peak_bytes"]
            .clone();
    let forward = forward.as_u64().unwrap();
    let (full, _) = tuned("full.onnx", "all", &[]);
    let mut before = 0;
    for (train, share) in
        [("sparse:15%", 0.15), ("sparse:50%", 0.5), ("sparse:50%/70%", 0.5), ("sparse:50%+head", 0.5)]
    {
        let (s, changed) = tuned("new.onnx", train, &[]);
        let extra = s["peak_bytes"].as_u64().unwrap().saturating_sub(forward);
        let whole = full["peak_bytes"].as_u64().unwrap() - forward;
        println!(
            "{train}: {} numbers, {extra} bytes beyond a forward pass, of {whole}: {}",
            s["trained_parameters"], s["notes"]
        );
        assert!(extra as f64 <= share * whole as f64, "{train}: {extra} of {whole}");
        assert!(!changed.is_empty());
        if train.ends_with("%") && !train.contains('/') {
            let learn = s["trained_parameters"].as_u64().unwrap();
            assert!(learn > before && learn < full["trained_parameters"].as_u64().unwrap());
            before = learn;
        }
        if train.contains("head") {
            assert!(changed.iter().any(|n| n.contains("weight")) && changed.len() > 2, "{changed:?}");
        }
    }
    // The same on any number of threads.
    let bytes = |name: &str, threads: &str| {
        tuned(name, "sparse:30%", &["--threads", threads]);
        std::fs::read(at(name)).unwrap()
    };
    assert!(bytes("one.onnx", "1") == bytes("two.onnx", "2"));
    // ICP's perturbation alone takes more.
    let icp = ["--holdout", "0", "--batch", "16", "--method", "icp", "--train", "sparse:1B"];
    let out = run(&[&base[..], &[text(&at("no.onnx"))], &icp].concat(), 1);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(said.contains("biases of the last layer alone take"), "{said}");
}

/// Deltas from the command line: beside the export, instead of it, and from two files.
#[test]
fn deltas_of_a_run() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let model = shipped("tests/fixtures/presets/lora.onnx");
    data(&at("data.npz"), 32, &[16, 5, 5], 16);
    let delta = at("d.safetensors");
    let lora = ["--train", "lora:2@conv,gemm", "--method", "supervised", "--delta", text(&delta)];
    let s = finetune(
        &model,
        &at("data.npz"),
        &at("new.onnx"),
        &[&lora[..], &["--delta-type", "sparse"]].concat(),
    );
    assert_eq!((&s["delta"]["tensors"], &s["delta"]["max_error"]), (&2.into(), &0.0.into()));
    let bytes = |name: &str| std::fs::read(at(name)).unwrap();
    let applied = |base: &Path, delta: &Path, code: i32| {
        let _ = std::fs::remove_file(at("applied.onnx"));
        run(&["apply", text(base), text(delta), "--output", text(&at("applied.onnx"))], code)
    };
    applied(&model, &delta, 0);
    assert!(bytes("applied.onnx") == bytes("new.onnx"));
    // Another base, a cut file: refused, nothing written.
    let wrong = applied(&at("new.onnx"), &delta, 1);
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("SHA-256"));
    let whole = std::fs::read(&delta).unwrap();
    std::fs::write(at("cut.safetensors"), &whole[..whole.len() - 1]).unwrap();
    applied(&model, &at("cut.safetensors"), 1);
    assert!(!at("applied.onnx").exists());
    // From the files alone.
    let between = at("between.safetensors");
    let new = at("new.onnx");
    let base = ["delta", text(&model), text(&new), "--output", text(&between), "--json"];
    assert_eq!(json(&[&base[..], &["--delta-type", "sparse"]].concat(), 0)["tensors"], 2);
    assert!(std::fs::read(&between).unwrap() == whole);
    let half = json(&[&base[..], &["--delta-type", "f16"]].concat(), 0);
    assert!(
        half["bytes"].as_u64().unwrap() < whole.len() as u64 && half["max_error"].as_f64().unwrap() > 0.0,
        "{half}"
    );
    applied(&model, &between, 0);
    assert_eq!(differing(&at("new.onnx"), &at("applied.onnx")).len(), 2);
    // The delta alone; and none where the guard keeps the original.
    let alone = at("alone.safetensors");
    let samples = at("data.npz");
    let args = [
        "finetune",
        text(&model),
        "--data",
        text(&samples),
        "--delta",
        text(&alone),
        "--method",
        "supervised",
    ];
    let short = ["--epochs", "1", "--batch", "8", "--json"];
    let s = json(&[&args[..], &short, &["--no-guard", "--lr", "1e-2"]].concat(), 0);
    assert_eq!(
        (&s["kept"], &s["output"], &s["verified"]),
        (&true.into(), &text(&alone).into(), &"agrees".into())
    );
    applied(&model, &alone, 0);
    std::fs::remove_file(&alone).unwrap();
    let s = json(&[&args[..], &short, &["--lr", "0"]].concat(), 3);
    assert_eq!((&s["kept"], &s["delta"]), (&false.into(), &serde_json::Value::Null));
    assert!(!alone.exists());
    run(&["finetune", text(&model), "--data", text(&at("data.npz"))], 2);
    let out = run(&[&args[..], &["--head", "3"]].concat(), 1);
    assert!(String::from_utf8_lossy(&out.stderr).contains("--delta cannot hold a new head"));
}

/// Where nothing but the gradient of an activation still needs its result, one bit an element is kept.
#[test]
fn activations_are_kept_as_masks() {
    let (model, batch, shapes) = images(8);
    let mut session = Session::new(model, Options { threads: 1, ..Options::default() }).unwrap();
    let mut gradient = |fuse: bool| {
        let mut net = Network::new(&session, Mode::EVAL, &shapes, &HashMap::new()).unwrap();
        if fuse {
            net.fuse(&[], false).unwrap();
        }
        let loss = Loss::CrossEntropy { label_smoothing: 0.0 };
        let attached = loss.attach(&mut net.graph, shapes.target.clone()).unwrap();
        let x = net.inputs[0];
        let dx = grad(&mut net.graph, attached.loss, &[x]).unwrap()[&x];
        let program =
            session.compile(net.graph, Request { outputs: vec![dx], ..Request::default() }).unwrap();
        session.run(&program, &feeds(&net.inputs, attached.target, &batch).unwrap(), 0).unwrap();
        let masks = program.plan.steps.iter().filter(|s| s.op.name() == "MaskGrad").count();
        (session.output(&program, dx).unwrap().to_tensor().to_f64(), masks, program.plan.arena_bytes)
    };
    let ((plain, none, whole), (masked, masks, least)) = (gradient(false), gradient(true));
    println!("dsnet, input gradient: {masks} masks, {least} bytes for {whole}");
    assert!(none == 0 && masks > 3 && least < whole, "{none}, {masks} masks, {least} bytes for {whole}");
    assert!(relative(&plain, &masked) <= 2e-3);
}
