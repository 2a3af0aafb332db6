//! Half precision: half the activations, gradients within its rounding, and the same accuracy.

use std::path::Path;
use std::sync::Arc;

use retune::exec::{OptimizerState, Options, Precision};
use retune::finetune::{Config, MethodName, finetune, input_specs};
use retune::tensor::Tensor;
use retune::train::data::{Worn, degrade, open, write_npz};
use retune::train::optimizer::Optimizer;
use retune::train::step::set_step;

use crate::common::{Arrays, fetched, json, retune, root, run, shipped, text};
use crate::gradients::{check_model, names};
use crate::layout::step_by;
use crate::real_models::python;

/// Arena of a step, and the part that is activations at its peak.
fn planned(model: &Path, x: &[usize], precision: Precision) -> (f64, f64) {
    let (_, step) =
        step_by(model, x, Optimizer::sgd(), Options { threads: 1, precision, ..Options::default() });
    let peak = step.program.plan.peak;
    (peak.arena as f64, peak.activations as f64)
}

#[test]
fn saved_activations_take_half() {
    for (model, image, most) in [
        ("models/resnet20.onnx", [32, 1, 28, 28], 0.55),
        ("models/resnet20.onnx", [128, 1, 28, 28], 0.55),
        // Masks of clamps are bytes already.
        ("tests/fixtures/mobilenetv2.onnx", [32, 3, 32, 32], 0.65),
        // A few layers: what is widened at a time is a good part of all.
        ("models/dsnet.onnx", [64, 1, 28, 28], 0.65),
    ] {
        let [single, half] = [Precision::F32, Precision::Bf16].map(|p| planned(&shipped(model), &image, p));
        let (arena, activations) = (half.0 / single.0, half.1 / single.1);
        println!(
            "{model} {image:?}: arena {:.1} MB -> {:.1} MB ({arena:.2}), activations {:.1} -> {:.1} ({activations:.2})",
            single.0 / 1e6,
            half.0 / 1e6,
            single.1 / 1e6,
            half.1 / 1e6,
        );
        assert!(activations <= most, "{model}: activations at the peak only fall to {activations:.2}");
        assert!(arena <= most + 0.05, "{model}: the arena only falls to {arena:.2}");
        // (Pairs need other scratch memory, so that the peak may be at another operator.)
        let f16 = planned(&shipped(model), &image, Precision::F16).1;
        assert!((f16 - half.1).abs() <= 0.05 * half.1, "{model}: float16 takes {f16}, bfloat16 {}", half.1);
    }
}

/// Three steps' losses and the parameters after them, and the arena.
fn stepped(model: &Path, image: &[usize], options: Options) -> (Vec<u64>, Vec<Tensor>, usize) {
    let (mut session, step) = step_by(model, image, Optimizer::adam(0.0, true), options);
    let x: Vec<f32> = (0..image.iter().product()).map(|i| (i as f32 * 0.37).sin()).collect();
    let (x, y) = (Tensor::from_slice(image, &x).unwrap(), (0..image[0] as i64).map(|i| i % 10));
    let y = Tensor::from_slice(&image[..1], &y.collect::<Vec<_>>()).unwrap();
    let losses = (0..3).map(|t| {
        set_step(&mut session, 1e-3, t + 1);
        let fed = [(step.inputs[0], x.view()), (step.attached.target, y.view())];
        session.run(&step.program, &fed, t as u64).unwrap();
        session.scalar(&step.program, step.attached.loss).unwrap().to_bits()
    });
    let losses = losses.collect();
    let weights = session.changes().unwrap().into_iter().map(|(_, t)| t.clone()).collect();
    (losses, weights, step.program.plan.peak.arena)
}

#[test]
fn who_converts_changes_no_bit_and_takes_no_memory() {
    for (model, image) in [
        ("models/resnet20.onnx", [8, 1, 28, 28]),
        ("models/dsnet.onnx", [8, 1, 28, 28]),
        ("tests/fixtures/mobilenetv2.onnx", [8, 3, 32, 32]),
    ] {
        for precision in [Precision::Bf16, Precision::F16] {
            let options = |conversions_apart, threads| Options {
                threads,
                precision,
                conversions_apart,
                ..Options::default()
            };
            let apart = stepped(&shipped(model), &image, options(true, 1));
            for threads in [1, 3] {
                let (losses, weights, arena) = stepped(&shipped(model), &image, options(false, threads));
                assert_eq!(losses, apart.0, "{model} {precision:?}");
                let same = weights.iter().zip(&apart.1).all(|(a, b)| a.bytes() == b.bytes());
                assert!(same && weights.len() == apart.1.len(), "{model} {precision:?}");
                if threads == 1 {
                    println!("{model} {precision:?}: arena {} apart, {arena} by kernels", apart.2);
                    // (Rows that a kernel widens are near it: a few kilobytes.)
                    let most = apart.2 + apart.2 / 100;
                    assert!(arena <= most, "{model} {precision:?}: {arena}, apart {}", apart.2);
                }
            }
        }
    }
    for name in ["vit", "bert", "unet"] {
        let model = shipped(&format!("tests/fixtures/zoo_{name}.onnx"));
        let fixture = Arrays::read(&shipped(&format!("tests/fixtures/zoo_{name}.npz")));
        let dir = tempfile::tempdir().unwrap();
        let input = dir.path().join("in.npz");
        let mut fed: Vec<(&str, &Tensor)> = fixture.with_prefix("in.").collect();
        fed.push(("target", fixture.get("target")));
        write_npz(&input, &fed).unwrap();
        let run = |half: &str| {
            let output = dir.path().join(format!("{half}.npz"));
            let done = retune()
                .args(["grad", text(&model), "--inputs", text(&input), "--output", text(&output)])
                .args(["--mode", "train", "--precision", "bf16"])
                .env("RETUNE_HALF", half)
                .output()
                .unwrap();
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
            Arrays::read(&output)
        };
        let (apart, kernels) = (run("apart"), run("kernels"));
        for (key, truth) in &apart.0 {
            assert!(kernels.get(key).bytes() == truth.bytes(), "{name}: {key}");
        }
    }
}

/// Norm of the difference of two tensors, and of the first.
fn apart(a: &Tensor, b: &Tensor) -> (f64, f64) {
    let (a, b) = (a.to_f64(), b.to_f64());
    let square = |x: f64| x * x;
    let off = a.iter().zip(&b).map(|(a, b)| square(a - b)).sum::<f64>();
    (off.sqrt(), a.iter().map(|a| square(*a)).sum::<f64>().sqrt())
}

/// `retune grad` in training mode on a fixture's batch.
fn grad(model: &Path, fixture: &Arrays, precision: &str) -> Arrays {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in.npz"), dir.path().join("out.npz"));
    write_npz(&input, &[("image", fixture.get("in.image")), ("target", fixture.get("target"))]).unwrap();
    let base = ["grad", text(model), "--inputs", text(&input), "--mode", "train", "--output", text(&output)];
    run(&[&base[..], &["--precision", precision]].concat(), 0);
    Arrays::read(&output)
}

#[test]
fn gradients_are_off_by_no_more_than_autocasts() {
    let model = shipped("models/resnet20.onnx");
    let autocast = Arrays::read(&shipped("tests/fixtures/autocast_resnet20.npz"));
    check_model(&autocast, &model);
    let batch = Arrays::read(&shipped("tests/fixtures/grad_resnet20_train.npz"));
    let single = grad(&model, &batch, "f32");
    let theirs = autocast.get("error").to_f64()[0];
    for (precision, most) in [("bf16", theirs), ("f16", theirs / 4.0)] {
        let half = grad(&model, &batch, precision);
        let (mut off, mut all) = (0.0, 0.0);
        for name in names(&autocast, "error") {
            let key = format!("grad.{name}");
            let (o, a) = apart(single.get(&key), half.get(&key));
            off += o * o;
            all += a * a;
            let theirs = autocast.get(&format!("error.{name}")).to_f64()[0];
            assert!(
                o <= 2.0 * theirs.max(0.05) * a,
                "{precision}: {name} is off by {:.3}, autocast's by {theirs:.3}",
                o / a
            );
        }
        let error = (off / all).sqrt();
        println!("{precision}: gradients off by {error:.4}, PyTorch's autocast to bfloat16 by {theirs:.4}");
        assert!(error > 0.0 && error <= most, "{precision}: {error}");
        let (a, b) = (single.get("loss").to_f64()[0], half.get("loss").to_f64()[0]);
        assert!((a - b).abs() <= 0.01 * a, "{precision}: loss {b}, in f32 {a}");
    }
}

/// Ten steps on one batch; the parameters, and what the session holds.
fn trained(optimizer: Optimizer, options: Options) -> (Vec<f64>, f64, retune::exec::Usage) {
    let fixture = Arrays::read(&shipped("tests/fixtures/grad_resnet20_train.npz"));
    let (mut session, step) = step_by(&shipped("models/resnet20.onnx"), &[8, 1, 28, 28], optimizer, options);
    let fed = [
        (step.inputs[0], fixture.get("in.image").view()),
        (step.attached.target, fixture.get("target").view()),
    ];
    let mut loss = 0.0;
    for t in 0..10 {
        set_step(&mut session, 2e-4, t + 1);
        session.run(&step.program, &fed, t as u64).unwrap();
        loss = session.scalar(&step.program, step.attached.loss).unwrap();
    }
    let weights = session.changes().unwrap().iter().flat_map(|(_, t)| t.to_f64()).collect();
    (weights, loss, session.usage())
}

#[test]
fn narrow_optimizer_states_learn_alike() {
    let momentum = Optimizer::Sgd { momentum: 0.9, nesterov: false, weight_decay: 0.0 };
    for optimizer in [Optimizer::adam(0.0, true), momentum, Optimizer::ademamix(0.0)] {
        let of = |optimizer_state| {
            trained(optimizer, Options { threads: 1, optimizer_state, ..Options::default() })
        };
        let (start, ..) = trained(optimizer, Options { threads: 1, ..Options::default() });
        assert!(!start.is_empty());
        let (single, loss, usage) = of(OptimizerState::F32);
        for (state, share) in [(OptimizerState::Bf16, 0.51), (OptimizerState::EightBit, 0.42)] {
            let (weights, other, narrow) = of(state);
            let share_held = narrow.optimizer as f64 / usage.optimizer as f64;
            let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
            let off: Vec<f64> = single.iter().zip(&weights).map(|(a, b)| a - b).collect();
            let e = norm(&off) / norm(&single);
            println!(
                "{optimizer:?} {state:?}: weights off by {e:.1e}, loss {other:.4} ({loss:.4}), {share_held:.2} of the bytes"
            );
            assert!(e > 0.0 && e <= 5e-3, "{optimizer:?} {state:?}: {e}");
            assert!((loss - other).abs() <= 0.1 * loss, "{optimizer:?} {state:?}: {loss} and {other}");
            assert!(share_held <= share, "{share_held}");
        }
    }
}

#[test]
fn without_a_master_weights_take_half_and_still_learn() {
    let optimizer = Optimizer::adam(0.0, true);
    let half =
        |master_free| Options { threads: 1, precision: Precision::Bf16, master_free, ..Options::default() };
    let (_, loss, usage) = trained(optimizer, half(false));
    let (weights, other, free) = trained(optimizer, half(true));
    let share = free.weights as f64 / usage.weights as f64;
    println!("loss {other:.4}, with a master {loss:.4}; {share:.2} of the bytes");
    assert!(share <= 0.52, "{share}");
    assert!((loss - other).abs() <= 0.25 * loss, "{other}, with a master {loss}");
    // The same numbers again, and others for another seed.
    assert!(weights == trained(optimizer, half(true)).0);
    assert!(weights != trained(optimizer, Options { seed: 1, ..half(true) }).0);
}

#[test]
fn a_scaled_loss_is_halved_after_an_overflow_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = (shipped("models/dsnet.onnx"), shipped("models/fashion-images-idx3-ubyte.gz"));
    let (new, checkpoint) = (dir.path().join("new.onnx"), dir.path().join("checkpoint"));
    let base =
        ["finetune", text(&model), "--data", text(&data), "--output", text(&new), "--no-guard", "--json"];
    let options = ["--precision", "f16", "--epochs", "1", "--holdout", "0.8", "--icp-steps", "2"];
    let summary = json(&[&base[..], &options, &["--checkpoint", text(&checkpoint)]].concat(), 0);
    let skipped = summary["skipped_steps"].as_u64().unwrap();
    assert!(skipped <= 8, "{skipped} steps skipped");
    let saved = std::fs::read_dir(&checkpoint).unwrap().flatten().map(|f| f.path());
    let saved = saved.into_iter().find(|p| p.extension().is_some_and(|e| e == "safetensors")).unwrap();
    let bytes = std::fs::read(saved).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let scale = tensors.tensor("step.loss-scale").unwrap().data()[..8].try_into().unwrap();
    assert_eq!(f64::from_le_bytes(scale), 65536.0 / 2f64.powi(skipped as i32));
    let bf16 = json(&[&base[..], &["--precision", "bf16"], &options[2..]].concat(), 0);
    let loss = |s: &serde_json::Value| s["epochs"][0]["loss"].as_f64().unwrap();
    assert!((loss(&summary) - loss(&bf16)).abs() <= 0.05 * loss(&bf16));
}

#[test]
fn halves_are_refused_where_they_make_no_sense() {
    let model = shipped("models/dsnet.onnx");
    let refused = |args: &[&str], code: i32| {
        let out = run(&[&["bench", text(&model), "--runs", "1", "--batch", "2"][..], args].concat(), code);
        String::from_utf8_lossy(&out.stderr).to_string()
    };
    assert!(refused(&["--precision", "f8"], 2).contains("bf16"));
    assert!(refused(&["--master-free"], 1).contains("--precision"));
    let json = json(&["bench", text(&model), "--runs", "1", "--precision", "bf16", "--json"], 0);
    assert_eq!(json["precision"], "bf16");
}

/// Mean accuracies in both precisions, for each method, after finetunes of three seeds.
fn compare(what: &str, run: impl Fn(MethodName, Precision, u64) -> f64) {
    for method in [MethodName::Supervised, MethodName::Icp] {
        let of = |precision| [0, 1, 2].map(|seed| run(method, precision, seed));
        let (single, half) = (of(Precision::F32), of(Precision::Bf16));
        let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
        let (a, b) = (mean(&single), mean(&half));
        println!("{what}, {method:?}: f32 {a:.4} {single:.4?}, bf16 {b:.4} {half:.4?}");
        assert!((a - b).abs() <= 0.005, "{what}, {method:?}: f32 {a:.4}, bf16 {b:.4}");
    }
}

#[test]
fn a_worn_camera_is_repaired_as_well_as_in_f32() {
    if !crate::common::all() {
        println!("skipped: long (./test.sh --all)");
        return;
    }
    let Some(many) = fetched("fashion/t10k-images-idx3-ubyte.gz") else { return };
    let model = Arc::new(retune::import::load(shipped("models/resnet20.onnx")).unwrap());
    let specs = input_specs(&model);
    let images = |path: &Path, seed| {
        let clean = open(path, &Default::default(), &specs).unwrap().bind(&specs).unwrap();
        degrade(&clean, &Worn { seed, ..Worn::default() }).unwrap()
    };
    let shown = images(&shipped("models/fashion-images-idx3-ubyte.gz"), 0);
    let test = images(&many, 1).subset(&(5000..10_000).collect::<Vec<_>>()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    compare("worn camera", |method, precision, seed| {
        let picks: Vec<usize> = (0..500).map(|i| i * 4 + seed as usize).collect();
        let config =
            Config { method, precision, seed, epochs: 8, lr: 1e-3, guard: false, ..Config::default() };
        let (train, output) = (shown.subset(&picks).unwrap(), dir.path().join("new.onnx"));
        let done = finetune(model.clone(), train, Some(test.clone()), &config, &output, &mut |_| {}).unwrap();
        assert_eq!(done.summary.skipped_steps, 0);
        done.after.unwrap().metrics.accuracy.unwrap()
    });
}

#[test]
fn blurred_lines_are_read_as_well_as_in_f32() {
    if !crate::common::all() {
        println!("skipped: long (./test.sh --all)");
        return;
    }
    let (Some(path), Some(python)) = (fetched("ppocr/cls.onnx"), python()) else { return };
    if fetched("fortunes").is_none() || fetched("fonts").is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let lines = std::process::Command::new(python)
        .arg(root().join("tests/text_lines.py"))
        .arg(dir.path())
        .args(["--train", "500", "--test", "1000", "--blur", "4", "--seed", "0", "--clean-fraction", "0"])
        .output()
        .unwrap();
    assert!(lines.status.success(), "{}", String::from_utf8_lossy(&lines.stderr));
    let model = Arc::new(retune::import::load(path).unwrap());
    let specs = input_specs(&model);
    let data =
        |name: &str| open(dir.path().join(name), &Default::default(), &specs).unwrap().bind(&specs).unwrap();
    let (train, test) = (data("train.npz"), data("test.npz"));
    compare("blurred lines", |method, precision, seed| {
        let config =
            Config { method, precision, seed, epochs: 15, lr: 1e-3, guard: false, ..Config::default() };
        let output = dir.path().join("new.onnx");
        let held = Some(test.clone());
        let done = finetune(model.clone(), train.clone(), held, &config, &output, &mut |_| {}).unwrap();
        assert_eq!(done.summary.skipped_steps, 0);
        done.after.unwrap().metrics.accuracy.unwrap()
    });
}
