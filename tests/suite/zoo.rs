//! Networks as PyTorch's two exporters write them: output and gradients against PyTorch's, and the way through the command line.
//! `tests/parity.sh` does the same with many more, made afresh.

use std::path::{Path, PathBuf};

use retune::tensor::Tensor;
use retune::train::data::write_npz;

use crate::common::{Arrays, json, relative, run, shipped, text};
use crate::gradients::{check_model, error, names};

/// Relative to the largest element of each tensor.
const TOLERANCE: f64 = 1e-4;

fn model(name: &str) -> PathBuf {
    shipped(&format!("tests/fixtures/zoo_{name}.onnx"))
}

fn fixture(name: &str) -> Arrays {
    Arrays::read(&shipped(&format!("tests/fixtures/zoo_{name}.npz")))
}

fn loss(name: &str) -> String {
    match name {
        "vae" => text(&shipped("tests/fixtures/zoo_vae_loss.onnx")).into(),
        _ => "cross-entropy".into(),
    }
}

fn equals_pytorch(name: &str, tensors: usize) {
    let (model, fixture) = (model(name), fixture(name));
    check_model(&fixture, &model);
    let mode: String = serde_json::from_slice(fixture.get("mode").bytes()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in.npz"), dir.path().join("out.npz"));
    let mut fed: Vec<(&str, &Tensor)> = fixture.with_prefix("in.").collect();
    fed.push(("target", fixture.get("target")));
    write_npz(&input, &fed).unwrap();
    let loss = loss(name);
    let args = ["grad", text(&model), "--inputs", text(&input), "--output", text(&output)];
    run(&[&args[..], &["--mode", &mode, "--loss", &loss]].concat(), 0);
    let ours = Arrays::read(&output);
    let truth = fixture.get("loss").to_f64();
    assert!(relative(&truth, &ours.get("loss").to_f64()) < 1e-5, "{name}: loss");
    for (output, truth) in fixture.with_prefix("output.") {
        let e = relative(&truth.to_f64(), &ours.get(&format!("output.{output}")).to_f64());
        assert!(e < TOLERANCE, "{name}: {output}: {e:.1e}");
    }
    let names = names(&fixture, "grad");
    assert_eq!((names.len(), ours.with_prefix("grad.").count()), (tensors, tensors), "{name}: gradients");
    let mut worst = (0.0, "");
    for tensor in names {
        let e = error(&fixture, "grad", tensor, ours.get(&format!("grad.{tensor}")));
        assert!(e <= TOLERANCE, "{name}: {tensor}: {e:.1e}");
        if e >= worst.0 {
            worst = (e, tensor);
        }
    }
    println!("{name} {mode}: {tensors} gradients, largest error {:.1e} at {}", worst.0, worst.1);
}

#[test]
fn bert() {
    equals_pytorch("bert", 25);
}

/// Its class token and table of positions are constants that join the data.
#[test]
fn vision_transformer() {
    equals_pytorch("vit", 23);
}

#[test]
fn unet() {
    equals_pytorch("unet", 24);
}

#[test]
fn lstm_with_first_states_from_shapes() {
    equals_pytorch("bilstm", 9);
}

/// In training form its weights are cut in gates and put together again by nodes; its labels are one a word.
#[test]
fn gru_tagger() {
    equals_pytorch("gru_tagger", 12);
}

#[test]
fn variational_autoencoder_with_its_loss_as_a_graph() {
    equals_pytorch("vae", 14);
}

/// `copies` of the fixture's batch, `y` the target.
fn data(name: &str, copies: usize, dir: &Path) -> PathBuf {
    let fixture = fixture(name);
    let again = |t: &Tensor| {
        let mut dims = t.dims().to_vec();
        dims[0] *= copies;
        Tensor::from_bytes(t.dtype(), &dims, &t.bytes().repeat(copies)).unwrap()
    };
    let mut all: Vec<(&str, Tensor)> = fixture.with_prefix("in.").map(|(n, t)| (n, again(t))).collect();
    all.push(("y", again(fixture.get("target"))));
    let path = dir.join("data.npz");
    write_npz(&path, &all.iter().map(|(n, t)| (*n, t)).collect::<Vec<_>>()).unwrap();
    path
}

fn finetune(name: &str, lr: &str, dir: &Path) -> (serde_json::Value, PathBuf) {
    let (data, new, loss) = (data(name, 4, dir), dir.join("new.onnx"), loss(name));
    let model = model(name);
    let args = ["finetune", text(&model), "--data", text(&data), "--output", text(&new), "--loss", &loss];
    let more = ["--method", "supervised", "--epochs", "3", "--batch", "6", "--lr", lr, "--norm", "frozen"];
    let json = json(&[&args[..], &more, &["--holdout", text(&data), "--no-guard", "--json"]].concat(), 0);
    (json, new)
}

#[test]
fn a_learning_rate_of_nothing_gives_back_the_file() {
    for name in ["bert", "vit", "unet", "bilstm", "gru_tagger", "vae"] {
        let dir = tempfile::tempdir().unwrap();
        let (summary, new) = finetune(name, "0", dir.path());
        assert!(summary["steps"].as_u64().unwrap() >= 6, "{summary}");
        assert_eq!(std::fs::read(model(name)).unwrap(), std::fs::read(new).unwrap(), "{name}");
    }
}

#[test]
fn a_finetune_lowers_the_loss() {
    for name in ["bert", "vit", "unet", "bilstm", "gru_tagger", "vae"] {
        let dir = tempfile::tempdir().unwrap();
        let (summary, new) = finetune(name, "3e-3", dir.path());
        let loss = |key: &str| summary[key]["loss"].as_f64().unwrap();
        assert!(loss("after") < loss("before"), "{name}: {summary}");
        let verified = summary["verified"].as_str().unwrap();
        println!("{name}: loss {:.4} to {:.4}, tract: {verified}", loss("before"), loss("after"));
        assert_eq!(std::fs::read(model(name)).unwrap().len(), std::fs::read(new).unwrap().len(), "{name}");
    }
}

/// One label a word: accuracy counts words, the guard compares sentences, padding does not count.
#[test]
fn sequences_are_labelled_word_by_word() {
    let dir = tempfile::tempdir().unwrap();
    let (summary, _) = finetune("gru_tagger", "1e-2", dir.path());
    let accuracy = |key: &str| summary[key]["accuracy"].as_f64().unwrap();
    assert!(accuracy("after") > accuracy("before"), "{summary}");
    assert!(summary["verdict"]["loss_fall"].as_f64().unwrap() > 0.0, "{summary}");

    let fixture = fixture("gru_tagger");
    let mut target = fixture.get("target").clone();
    let width = target.dims()[1];
    target.get_mut::<i64>().unwrap().iter_mut().skip(width - 2).step_by(width).for_each(|l| *l = -100);
    let path = dir.path().join("padded.npz");
    let eval = |target: &Tensor| {
        write_npz(&path, &[("tokens", fixture.get("in.tokens")), ("y", target)]).unwrap();
        json(&["eval", text(&model("gru_tagger")), "--data", text(&path), "--json"], 0)
    };
    let loss = |v: &serde_json::Value| v["loss"].as_f64().unwrap();
    let (whole, padded) = (eval(fixture.get("target")), eval(&target));
    assert!(loss(&padded).is_finite() && loss(&padded) != loss(&whole), "{whole} {padded}");
    target.get_mut::<i64>().unwrap()[0] = 77;
    write_npz(&path, &[("tokens", fixture.get("in.tokens")), ("y", &target)]).unwrap();
    let said = run(&["eval", text(&model("gru_tagger")), "--data", text(&path)], 1).stderr;
    let said = String::from_utf8(said).unwrap();
    assert!(said.contains("label 77") && said.contains("6 outputs"), "{said}");
}

/// An input that is the same for every sample is set on the command line: the noise of a VAE to nothing.
#[test]
fn inputs_that_are_no_data_are_set() {
    let fixture = fixture("vae");
    let dir = tempfile::tempdir().unwrap();
    let (data, out) = (dir.path().join("in.npz"), dir.path().join("out.npz"));
    let (pixels, model, loss) = (fixture.get("in.pixels"), model("vae"), loss("vae"));
    let noise = Tensor::zeros(pixels.dtype(), fixture.get("in.noise").dims());
    let args = ["grad", text(&model), "--inputs", text(&data), "--output", text(&out), "--loss", &loss];
    write_npz(&data, &[("pixels", pixels), ("noise", &noise), ("target", pixels)]).unwrap();
    run(&args, 0);
    let fed = Arrays::read(&out);
    write_npz(&data, &[("pixels", pixels), ("target", pixels)]).unwrap();
    run(&[&args[..], &["--set", "noise=0"]].concat(), 0);
    let set = Arrays::read(&out);
    assert_eq!(set.0.len() + 1, fed.0.len());
    for (name, t) in &set.0 {
        assert_eq!(t.bytes(), fed.get(name).bytes(), "{name}");
    }
    let said = String::from_utf8(run(&args, 1).stderr).unwrap();
    assert!(said.contains("noise"), "{said}");
    let new = dir.path().join("new.onnx");
    write_npz(&data, &[("pixels", pixels), ("y", pixels)]).unwrap();
    let args = ["finetune", text(&model), "--data", text(&data), "--output", text(&new), "--loss", &loss];
    let more = [
        "--set",
        "noise=0",
        "--method",
        "supervised",
        "--epochs",
        "2",
        "--batch",
        "3",
        "--no-guard",
        "--json",
    ];
    let summary = json(&[&args[..], &more].concat(), 0);
    assert_eq!(summary["verified"], "agrees", "{summary}");
}
