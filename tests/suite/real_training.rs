//! Deployed networks as they are found: run at several sizes, a training step, and the identical file where nothing is
//! learned.

use std::path::Path;

use retune::tensor::{DType, Tensor};
use retune::train::data::write_npz;

use crate::common::{LIGHT, all, fetched, input_dims, json, text};
use crate::real_models::{equals_onnxruntime_on, ort, python, wave};

/// Pages of dark strokes on light ground in lines and words, normalised as PP-OCR does: a detector finds text in them.
fn pages(n: usize, h: usize, w: usize) -> Tensor {
    let mut x = Vec::with_capacity(n * 3 * h * w);
    for i in 0..n {
        for _ in 0..3 {
            for (row, column) in (0..h).flat_map(|r| (0..w).map(move |c| (r, c))) {
                let line = (8..24).contains(&(row % 32));
                let word = column % 80 < 64 && column >= 8;
                let stroke = (column * 7 + row / 4 * (3 + i)) % 11 < 4;
                x.push(if line && word && stroke { -2.0f32 } else { 2.2 });
            }
        }
    }
    Tensor::from_slice(&[n, 3, h, w], &x).unwrap()
}

/// Zeros and ones that differ from place to place.
fn bits(dims: &[usize]) -> Tensor {
    let n: usize = dims.iter().product();
    let x: Vec<f32> = (0..n).map(|i| ((i * 7919 % 13) < 6) as u8 as f32).collect();
    Tensor::from_slice(dims, &x).unwrap()
}

fn labels(dims: &[usize], classes: i64) -> Tensor {
    let n: usize = dims.iter().product();
    let y: Vec<i64> = (0..n as i64).map(|i| i * 31 % classes).collect();
    Tensor::ints(&y).reshaped(dims).unwrap()
}

/// A run at learning rate 0 gives back the identical file, one at 1e-4 takes its steps, all finite, and changes it;
/// tract agrees. Gives the summary, and the new file for a closer look.
fn trains(model: &Path, arrays: &[(&str, &Tensor)], more: &[&str]) -> (serde_json::Value, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let (data, new) = (dir.path().join("data.npz"), dir.path().join("new.onnx"));
    write_npz(&data, arrays).unwrap();
    let base =
        ["finetune", text(model), "--data", text(&data), "--output", text(&new), "--method", "supervised"];
    let options = ["--epochs", "1", "--batch", "2", "--holdout", "0", "--norm", "frozen", "--json"];
    let before = std::fs::read(model).unwrap();
    json(&[&base[..], &options, &["--lr", "0"], more].concat(), 0);
    assert!(before == std::fs::read(&new).unwrap(), "{}: another file at lr 0", model.display());

    let s = json(&[&base[..], &options, &["--lr", "1e-4"], more].concat(), 0);
    assert!(s["steps"].as_u64() >= Some(1) && s["skipped_steps"] == 0, "{s}");
    assert!(s["epochs"][0]["loss"].as_f64().is_some_and(f64::is_finite), "{s}");
    assert_eq!(s["verified"], "agrees", "{}", model.display());
    assert!(before != std::fs::read(&new).unwrap(), "{}: nothing was learned", model.display());
    println!("{}: {} steps, loss {}", model.display(), s["steps"], s["epochs"][0]["loss"]);
    (s, dir)
}

#[test]
fn ppocr_detector() {
    let Some(model) = fetched("ppocr/det.onnx") else { return };
    if let Some(python) = python() {
        for [n, h, w] in [[1, 64, 64], [2, 96, 160], [1, 320, 224], [1, 32, 32]] {
            equals_onnxruntime_on(&python, &model, &[("x", &pages(n, h, w))]);
        }
    }
    let (x, y) = (pages(4, 96, 160), bits(&[4, 1, 96, 160]));
    for loss in ["bce", "mse"] {
        let (s, _) = trains(&model, &[("x", &x), ("y", &y)], &["--loss", loss]);
        // A map of zeros and ones is far from what it says: the loss is of the order of one a pixel, not of many.
        assert!(loss != "mse" || s["epochs"][0]["loss"].as_f64().unwrap() < 1.0, "{s}");
    }
}

#[test]
fn ppocr_recogniser() {
    let Some(model) = fetched("ppocr/rec.onnx") else { return };
    if let Some(python) = python() {
        for [n, w] in [[1, 320], [2, 160], [3, 64], [1, 100], [1, 33]] {
            equals_onnxruntime_on(&python, &model, &[("x", &pages(n, 48, w))]);
        }
    }
    // A character at each of the places that 160 columns make.
    let (x, y) = (pages(4, 48, 160), labels(&[4, 20], 6625));
    let (s, dir) = trains(&model, &[("x", &x), ("y", &y)], &[]);
    // Of wrong characters, near certain: a mean over places, not a sum.
    let loss = s["epochs"][0]["loss"].as_f64().unwrap();
    assert!((1.0..40.0).contains(&loss), "{loss}");
    // Held-out data, with a loss for each line. Nobody learns to read from random characters: the guard keeps the
    // original.
    let (data, new) = (dir.path().join("data.npz"), dir.path().join("held.onnx"));
    let base = ["finetune", text(&model), "--data", text(&data), "--output", text(&new), "--json"];
    let options = ["--method", "supervised", "--holdout", text(&data), "--epochs", "3", "--batch", "2"];
    let s = json(&[&base[..], &options, &["--norm", "frozen", "--lr", "1e-3"]].concat(), 3);
    assert!(s["kept"] == false && s["after"]["loss"].as_f64() < s["before"]["loss"].as_f64(), "{s}");
}

#[test]
fn ppocr_classifier_trains() {
    let Some(model) = fetched("ppocr/cls.onnx") else { return };
    trains(&model, &[("x", &wave(&[6, 3, 48, 192])), ("y", &labels(&[6], 2))], &[]);
}

/// A recurrent network whose batch is a sequence of frames, and whose states are the same for every batch.
#[test]
fn silero_sequence() {
    let Some(model) = fetched("silero/silero_vad_16k_sequence.onnx") else { return };
    let state = |k: f32| {
        let x: Vec<f32> = (0..128).map(|i| ((i as f32 + k) * 0.7).sin() * 0.2).collect();
        Tensor::from_slice(&[1, 1, 128], &x).unwrap()
    };
    let (h, c) = (state(0.0), state(5.0));
    if let Some(python) = python() {
        for frames in [1, 2, 7, 50] {
            let x = wave(&[frames, 576]);
            equals_onnxruntime_on(&python, &model, &[("input", &x), ("h", &h), ("c", &c)]);
        }
    }
    let (x, y) = (wave(&[8, 576]), bits(&[8]));
    let data = [("input", &x), ("h", &h), ("c", &c), ("y", &y)];
    let (s, _) = trains(&model, &data, &["--loss", "bce", "--no-shuffle"]);
    // The loss is on what the Sigmoid is of, and not of the Sigmoid once more (which would be at least ln 2 for zeros).
    assert!(s["epochs"][0]["loss"].as_f64().unwrap() > 0.7, "{s}");
    trains(&model, &data, &["--loss", "mse", "--no-shuffle"]);
}

/// The model for both sampling rates: which of its two networks runs follows from an input's value.
#[test]
fn silero_by_sampling_rate() {
    let (Some(model), Some(python)) = (fetched("silero/silero_vad.onnx"), python()) else { return };
    for (rate, n, window) in [(16000i64, 1, 576), (16000, 3, 576), (8000, 1, 288), (8000, 2, 288)] {
        let (x, state) = (wave(&[n, window]), Tensor::zeros(DType::F32, &[2, n, 128]));
        let rate = Tensor::scalar(rate);
        equals_onnxruntime_on(&python, &model, &[("input", &x), ("state", &state), ("sr", &rate)]);
    }
}

/// Weights that are ConstantOfShape become initializers when they are trained.
#[test]
fn light_networks_train() {
    let Some(folder) = fetched("light") else { return };
    let names: &[&str] = match all() {
        true => LIGHT,
        false => &["shufflenet", "squeezenet"],
    };
    for name in names {
        let model = folder.join(format!("light_{name}.onnx"));
        let report = json(&["inspect", text(&model), "--json"], 0);
        let dims = input_dims(&report);
        let x = wave(&[&[2], &dims[1..]].concat());
        let (_, dir) = trains(&model, &[("x", &x), ("y", &labels(&[2], 10))], &[]);
        let new = dir.path().join("new.onnx");
        assert!(std::fs::metadata(&new).unwrap().len() > std::fs::metadata(&model).unwrap().len());
        if let Some(python) = python().filter(|_| *name == "squeezenet") {
            ort(&python, &["--check", text(&new)]);
            let input = report["inputs"][0]["name"].as_str().unwrap();
            equals_onnxruntime_on(&python, &new, &[(input, &wave(&dims))]);
        }
    }
}
