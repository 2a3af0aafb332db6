//! What updating a part gains, and what it saves, beside full finetuning on real tasks (long: `./test.sh --all`).

use std::path::Path;
use std::process::Command;

use crate::common::{all, fetched, json, root, text};
use crate::finetune::{accuracy, text_lines};
use crate::real_models::python;

/// Full finetuning's share of the gain that a preset must reach.
const SHARE: f64 = 0.95;

/// One run: accuracy in onnxruntime's or our evaluation of the exported file, bytes at the peak, seconds, and what was said.
struct Tuned {
    accuracy: f64,
    peak: f64,
    seconds: f64,
    trained: u64,
}

impl Tuned {
    fn of(s: &serde_json::Value, accuracy: f64) -> Tuned {
        for note in s["notes"].as_array().unwrap() {
            println!("  {}", note.as_str().unwrap());
        }
        let number = |key: &str| s[key].as_f64().unwrap();
        let trained = s["trained_parameters"].as_u64().unwrap();
        Tuned { accuracy, peak: number("peak_bytes"), seconds: number("seconds"), trained }
    }
}

/// Prints what a preset gained and saved, and requires its share of the gain.
fn compare(task: &str, before: f64, full: &Tuned, preset: &str, tuned: &Tuned) {
    let share = (tuned.accuracy - before) / (full.accuracy - before);
    println!(
        "{task}, {preset}: {:.4} of {:.4} (from {before:.4}): {:.1}% of the gain; {} of {} numbers, peak {:.1} of {:.1} MiB ({:.0}% \
         saved), {:.1} of {:.1} s ({:.0}% saved)",
        tuned.accuracy,
        full.accuracy,
        100.0 * share,
        tuned.trained,
        full.trained,
        tuned.peak / 1048576.0,
        full.peak / 1048576.0,
        100.0 - 100.0 * tuned.peak / full.peak,
        tuned.seconds,
        full.seconds,
        100.0 - 100.0 * tuned.seconds / full.seconds,
    );
    assert!(share >= SHARE, "{task}, {preset}: {share:.3} of full finetuning's gain");
    assert!(tuned.peak < full.peak);
}

/// PP-OCR's direction classifier on lines blurred with sigma 4.
#[test]
fn presets_learn_blurred_lines() {
    let (true, Some(model)) = (all(), fetched("ppocr/cls.onnx")) else { return };
    let dir = tempfile::tempdir().unwrap();
    if !text_lines(dir.path(), "0") {
        return;
    }
    let at = |name: &str| dir.path().join(name);
    let (new, train, test) = (at("new.onnx"), at("train.npz"), at("test.npz"));
    let tuned = |preset: &str, lr: &str| {
        let base = [
            "finetune",
            text(&model),
            "--data",
            text(&train),
            "--output",
            text(&new),
            "--method",
            "supervised",
        ];
        let options =
            ["--epochs", "15", "--holdout", "0", "--no-guard", "--json", "--train", preset, "--lr", lr];
        let s = json(&[&base[..], &options].concat(), 0);
        Tuned::of(&s, accuracy(&new, &test))
    };
    let before = accuracy(&model, &test);
    let full = tuned("all", "1e-3");
    for (preset, lr) in [("lora:8", "5e-3"), ("sparse:50%", "2e-3")] {
        compare("PP-OCR, blur", before, &full, preset, &tuned(preset, lr));
    }
}

/// The sentence encoder with a new head on eight topics; full finetuning trains the last block and the head.
#[test]
fn presets_learn_topics() {
    let (true, Some(model), Some(python)) = (all(), fetched("minilm/model.onnx"), python()) else { return };
    let (Some(tokenizer), Some(fortunes)) = (fetched("minilm/tokenizer.json"), fetched("fortunes")) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let script = |more: &[&str]| {
        let mut command = Command::new(&python);
        command
            .arg(root().join("tests/fortune_topics.py"))
            .arg(dir.path())
            .args(["--tokenizer", text(&tokenizer)]);
        let out = command.args(["--fortunes", text(&fortunes)]).args(more).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let said = String::from_utf8(out.stdout).unwrap();
        said.trim().rsplit(' ').next().and_then(|x| x.parse::<f64>().ok())
    };
    script(&[]);
    let frozen = script(&["--frozen", text(&model)]).unwrap();
    let at = |name: &str| dir.path().join(name);
    let (train, test, new) = (at("train.npz"), at("test.npz"), at("new.onnx"));
    let tuned = |preset: &str, lr: &str| {
        let base = [
            "finetune",
            text(&model),
            "--data",
            text(&train),
            "--holdout",
            text(&test),
            "--output",
            text(&new),
        ];
        let options = ["--head", "8", "--at", "461", "--method", "supervised", "--epochs", "4", "--json"];
        let s = json(&[&base[..], &options, &["--train", preset, "--lr", lr]].concat(), 0);
        Tuned::of(&s, script(&["--measure", text(&new)]).unwrap())
    };
    let full = tuned("last:7", "2e-4");
    for (preset, lr) in [("lora:8@*layer.2*+head", "2e-3"), ("sparse:15%+head", "4e-4")] {
        compare("MiniLM, topics", frozen, &full, preset, &tuned(preset, lr));
    }
}

/// MobileNetV2 at 224², one image: what a sparse update is planned to take.
#[test]
fn mobilenet_fits_32_mebibytes() {
    let Some(model) = std::env::var_os("RETUNE_MOBILENET") else {
        println!("skipped: RETUNE_MOBILENET names no model (one is made by benches/peers/run.sh)");
        return;
    };
    let plan = |more: &[&str]| {
        let base = ["plan", text(Path::new(&model)), "--batch", "1", "--json"];
        json(&[&base[..], more].concat(), 0)
    };
    let peak = |plan: &serde_json::Value| {
        let modes = plan["modes"].as_array().unwrap();
        modes.iter().find(|m| m["mode"] == "supervised").unwrap()["peak_bytes"].as_u64().unwrap()
    };
    for norm in ["batch", "frozen"] {
        let full = peak(&plan(&["--norm", norm]));
        for preset in ["sparse:4MiB", "sparse:8MiB", "sparse:12MiB"] {
            let sparse = peak(&plan(&["--norm", norm, "--train", preset]));
            let [of, full] = [sparse, full].map(|b| b as f64 / 1048576.0);
            println!("MobileNetV2, batch 1, norm {norm}, {preset}: {of:.1} MiB of {full:.1}");
            assert!(sparse <= 32 << 20, "{sparse}");
        }
    }
}
