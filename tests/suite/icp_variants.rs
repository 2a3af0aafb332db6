//! The variants of ICP and its rivals against PyTorch (`tests/reference/icp_variants.py`): two steps of each, so that what
//! one carries over to the next is seen; and their results under any number of threads and over kills.

use std::sync::Arc;

use retune::exec::{Options, Session};
use retune::graph::WeightId;
use retune::icp::{
    Alpha, Ball, Byot, ByotSettings, Direction, Features, Icp, Place, Reuse, Settings, Taps, Unit, Weights,
    Which,
};
use retune::import::Model;
use retune::tensor::Tensor;
use retune::train::data::{Batch, Dataset};
use retune::train::loss::Loss;
use retune::train::method::{At, Learned, Method};
use retune::train::optimizer::Optimizer;
use retune::train::step::{Norm, Recipe, Shapes, set_step};

use crate::common::{Arrays, fetched, retune, run, shipped, text};
use crate::gradients::check_model;

/// As the script has it.
fn settings(name: &str) -> Settings {
    let adam = Settings { steps: 3, alpha: Alpha::Fixed(0.5), ..Settings::paper() };
    let sgd = |epsilon| Settings { perturber: Optimizer::sgd(), epsilon, ..adam.clone() };
    match name {
        "adversarial" => Settings { sign: true, direction: Direction::Adversarial, ..sgd(0.01) },
        "gradient" => Settings {
            unit: Unit::Gradient,
            ball: Some(Ball::Linf(0.08)),
            range: Some((0.0, 1.0)),
            ..sgd(0.05)
        },
        "std" => {
            Settings { unit: Unit::Std, ball: Some(Ball::L2(0.2)), weights: Weights::Uniform, ..sgd(0.5) }
        }
        "wrong" => Settings { which: Which::Wrong, ..adam },
        "uncertain" => Settings { which: Which::Uncertain(0.6), ..adam },
        "channel" => Settings { features: Features::Channel, ..adam },
        "cosine" => Settings { features: Features::Cosine, ..adam },
        "alone" => Settings { features: Features::None, ..adam },
        "ema" => Settings { ema: Some(0.75), ..adam },
        "warm" => Settings { reuse: Reuse::Warm, steps: 2, ..sgd(0.1) },
        "free" => Settings { reuse: Reuse::Free, ..sgd(0.5) },
        "first" => Settings { place: Place::First, taps: Taps::Last(1), ..sgd(10.0) },
        "deep" => Settings { taps: Taps::Last(1), ..adam },
        other => panic!("no variant {other}"),
    }
}

struct Setting {
    fixture: Arrays,
    model: Arc<Model>,
    batch: Batch,
}

impl Setting {
    fn new() -> Setting {
        let fixture = Arrays::read(&shipped("tests/fixtures/icp_variants.npz"));
        let path = shipped("models/resnet20.onnx");
        check_model(&fixture, &path);
        let model = Arc::new(retune::import::load(&path).unwrap());
        let images = Arrays::read(&shipped("tests/fixtures/icp_images.npz"));
        let (x, y) = (images.get("x").clone(), images.get("y").clone());
        let data = Dataset::from_arrays(vec![("x".into(), x)], Some(y)).unwrap();
        let data = data.bind(&retune::finetune::input_specs(&model)).unwrap();
        let mut batch = data.new_batch(data.len());
        data.batch(&(0..data.len()).collect::<Vec<_>>(), None, &mut batch).unwrap();
        Setting { fixture, model, batch }
    }

    fn session(&self, trained: impl Fn(&str) -> bool, norm: Norm) -> (Session, Recipe) {
        let mut session = Session::new(self.model.clone(), Options::default()).unwrap();
        let weights = (0..self.model.weights.len() as u32).map(WeightId);
        let recipe = Recipe {
            loss: Loss::CrossEntropy { label_smoothing: 0.0 },
            optimizer: Optimizer::sgd(),
            clip: None,
            params: weights
                .filter(|w| self.model.weight(*w).trainable && trained(&self.model.weight(*w).name))
                .collect(),
            norm,
            accumulate: 1,
        };
        recipe.prepare(&mut session).unwrap();
        (session, recipe)
    }

    fn number(&self, key: &str) -> f64 {
        self.fixture.get(key).to_f64()[0]
    }

    fn learn(&self, session: &mut Session, recipe: &Recipe, method: &mut dyn Method, step: usize) -> Learned {
        set_step(session, self.number("lr"), step + 1);
        let at = At { epoch: step, epochs: 2, step, steps: 2, seed: 0 };
        method.learn(session, recipe, &self.batch, &at).unwrap()
    }
}

/// `max|a − b|` over the largest magnitude of `b`, 1e-4 at least.
fn off(ours: &[f64], truth: &[f64]) -> f64 {
    assert_eq!(ours.len(), truth.len());
    let scale = truth.iter().fold(1e-4, |m: f64, x| m.max(x.abs()));
    ours.iter().zip(truth).fold(0.0, |m: f64, (a, b)| m.max((a - b).abs())) / scale
}

#[test]
fn two_steps_of_each_variant_equal_pytorchs() {
    let s = Setting::new();
    let names: Vec<String> = serde_json::from_slice(s.fixture.get("names").bytes()).unwrap();
    assert_eq!(names.len(), 13);
    for name in &names {
        let settings = settings(name);
        let above = |n: &str| n.starts_with("layer3") || n.starts_with("fc");
        let (mut session, recipe) = match name.as_str() {
            "first" => s.session(above, Norm::Frozen),
            _ => s.session(|_| true, Norm::Batch),
        };
        let mut icp = Icp::new(settings.clone());
        icp.begin(s.batch.len());
        if settings.perturbs() && settings.reuse != Reuse::Free {
            let p = icp.perturbed(&mut session, &recipe, &s.batch).unwrap();
            let truth = s.fixture.get(&format!("{name}.1.losses")).to_f64();
            let e = off(&p.losses, &truth);
            assert!(e <= 2e-3, "{name}: losses {:?}, PyTorch {truth:?}", p.losses);
            assert_eq!(p.path.len(), settings.steps + 1);
            let (clean, moved) = (p.path[0][0].1.to_f64(), p.inputs[0].1.to_f64());
            let row = clean.len() / s.batch.len();
            let moved: Vec<f64> = (0..s.batch.len())
                .map(|i| (i * row..(i + 1) * row).map(|k| (moved[k] - clean[k]).powi(2)).sum::<f64>().sqrt())
                .collect();
            let truth = s.fixture.get(&format!("{name}.1.moved")).to_f64();
            // A pixel whose gradient is within rounding of zero goes either way.
            assert!(off(&moved, &truth) <= 5e-3, "{name}: moved by {moved:?}, PyTorch {truth:?}");
        }
        for step in 0..2 {
            let l = s.learn(&mut session, &recipe, &mut icp, step);
            let ours = [l.task, l.features.unwrap_or(0.0), l.loss, l.norm.unwrap()];
            let truth = s.fixture.get(&format!("{name}.{}.values", step + 1)).to_f64();
            for (what, (a, b)) in
                ["task loss", "feature loss", "loss", "norm"].iter().zip(ours.iter().zip(&truth))
            {
                assert!(
                    (a - b).abs() <= 5e-3 * b.abs().max(1e-3),
                    "{name}, step {}: {what} {a}, PyTorch {b}",
                    step + 1
                );
            }
        }
    }
}

#[test]
fn auxiliary_heads_equal_pytorchs_and_are_not_exported() {
    let s = Setting::new();
    let (mut session, recipe) = s.session(|_| true, Norm::Batch);
    let mut byot = Byot::new(ByotSettings::default());
    let shapes = Shapes::of(&s.batch).unwrap();
    byot.prepare(&mut session, &recipe, &shapes, 1).unwrap();
    let taps = byot.tap_names(&session, &shapes).unwrap();
    assert_eq!(taps.len(), 2, "{taps:?}");
    for (i, tap) in taps.iter().enumerate() {
        for what in ["weight", "bias"] {
            let state = session.store().find(&format!("byot.{tap}.{what}")).unwrap();
            assert!(session.store().view(state).get::<f32>().unwrap().iter().any(|w| *w != 0.0));
            session.store_mut().set(state, s.fixture.get(&format!("byot.head{i}.{what}")).bytes());
        }
    }
    for step in 0..2 {
        let l = s.learn(&mut session, &recipe, &mut byot, step);
        let truth = s.fixture.get(&format!("byot.{}.values", step + 1)).to_f64();
        for (a, b) in [l.task, l.loss, l.norm.unwrap()].iter().zip(&truth) {
            assert!((a - b).abs() <= 5e-3 * b.abs(), "step {}: {a}, PyTorch {b}", step + 1);
        }
    }
    assert!(session.changes().unwrap().iter().all(|(w, _)| !s.model.weight(*w).name.starts_with("byot")));
}

/// What a run's result may not depend on.
#[test]
fn variants_give_the_same_bytes_on_any_threads_and_over_kills() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = (shipped("models/dsnet.onnx"), shipped("models/fashion-images-idx3-ubyte.gz"));
    let variants: [&[&str]; 5] = [
        &[
            "--icp-reuse=warm",
            "--icp-ema=0.9",
            "--icp-features=channel",
            "--icp-ball=l2:0.1",
            "--icp-range=0:1",
            "--icp-direction=noise",
        ],
        &[
            "--icp-reuse=free",
            "--icp-which=wrong",
            "--icp-features=cosine",
            "--icp-unit=gradient",
            "--icp-perturber=sgd",
            "--icp-epsilon=0.05",
        ],
        &[
            "--icp-at=first",
            "--train=last:3",
            "--icp-taps=last:1",
            "--icp-alpha=per-step",
            "--icp-alpha-floor=0.2",
        ],
        &[
            "--icp-direction=adversarial",
            "--icp-perturber=sign",
            "--icp-unit=std",
            "--icp-which=uncertain:0.9",
        ],
        &["--method=byot"],
    ];
    for (i, variant) in variants.iter().enumerate() {
        let output = |name: &str| dir.path().join(format!("{i}-{name}.onnx"));
        let args = |output: &std::path::Path, more: &[&str]| -> Vec<String> {
            let all = ["finetune", text(&model), "--data", text(&data), "--output", text(output)];
            let common = ["--holdout=0.95", "--no-guard", "--epochs=2", "--icp-steps=2", "--seed=5"];
            all.iter().chain(&common).chain(*variant).chain(more).map(|a| a.to_string()).collect()
        };
        let run = |args: &[String]| {
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            run(&args, 0);
        };
        let mut whole: Option<Vec<u8>> = None;
        for threads in ["1", "2", "4"] {
            let out = output(threads);
            run(&args(&out, &["--threads", threads]));
            let bytes = std::fs::read(&out).unwrap();
            assert!(whole.get_or_insert_with(|| bytes.clone()) == &bytes, "{variant:?}: {threads} threads");
        }
        // Killed at its first checkpoint that is there, and resumed.
        let (out, folder) = (output("resumed"), dir.path().join(format!("checkpoint-{i}")));
        let resumed = args(&out, &["--checkpoint", text(&folder), "--checkpoint-every=1", "--resume"]);
        let mut child = retune().args(&resumed).stderr(std::process::Stdio::null()).spawn().unwrap();
        while !folder.join("state.json").exists() && child.try_wait().unwrap().is_none() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        child.kill().ok();
        child.wait().unwrap();
        run(&resumed);
        assert!(whole.as_ref() == Some(&std::fs::read(&out).unwrap()), "{variant:?}: resumed");
    }
}

/// A network of token indices has its embedding's output perturbed.
#[test]
fn token_networks_are_perturbed_behind_their_embedding() {
    let dir = tempfile::tempdir().unwrap();
    let model = shipped("tests/fixtures/zoo_gru_tagger.onnx");
    let fixture = Arrays::read(&shipped("tests/fixtures/zoo_gru_tagger.npz"));
    let data = dir.path().join("data.npz");
    // The fixture's batch a few times over.
    let inputs: Vec<(String, Tensor)> =
        fixture.with_prefix("in.").map(|(n, t)| (n.to_string(), t.clone())).collect();
    let target = fixture.get("target").clone();
    let mut arrays: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
    arrays.push(("y", &target));
    retune::train::data::write_npz(&data, &arrays).unwrap();
    let output = dir.path().join("new.onnx");
    let common = ["finetune", text(&model), "--data", text(&data), "--output", text(&output)];
    let more =
        ["--holdout=0", "--epochs=3", "--batch=2", "--lr=1e-3", "--icp-perturber=sgd", "--icp-epsilon=1"];
    let s = crate::common::json(&[&common[..], &more, &["--json"]].concat(), 0);
    let epochs = s["epochs"].as_array().unwrap();
    assert!(epochs.iter().all(|e| e["features"].as_f64().is_some_and(|f| f > 0.0)), "{epochs:?}");
    assert!(std::fs::read(&output).unwrap() != std::fs::read(&model).unwrap());
    let folder = dir.path().join("perturbed");
    let see = ["perturb", text(&model), "--data", text(&data), "--output", text(&folder), "--json"];
    let p = crate::common::json(
        &[&see[..], &["--icp-perturber=sgd", "--icp-epsilon=1", "--icp-steps=5"]].concat(),
        0,
    );
    let losses: Vec<f64> = p["losses"].as_array().unwrap().iter().map(|l| l.as_f64().unwrap()).collect();
    assert!(losses.len() == 5 && losses[4] < losses[0], "{losses:?}");
    assert!(p["strip"].is_null());
}

/// A sentence encoder whose every block reads the attention mask: its blocks are tapped all the same, and those behind
/// what is perturbed where that lies within it.
#[test]
fn a_masked_encoder_is_tapped_at_its_blocks() {
    let Some(model) = fetched("minilm/model.onnx") else { return };
    let dir = tempfile::tempdir().unwrap();
    let (data, output) = (dir.path().join("data.npz"), dir.path().join("new.onnx"));
    let ids: Vec<i64> = (0..64).map(|i| 1000 + 37 * i).collect();
    let ids = Tensor::from_slice(&[8, 8], &ids).unwrap();
    let mask = Tensor::from_slice(&[8, 8], &[1i64; 64]).unwrap();
    let y = Tensor::from_slice(&[8], &[0i64, 1, 2, 3, 4, 5, 6, 7]).unwrap();
    retune::train::data::write_npz(&data, &[("input_ids", &ids), ("attention_mask", &mask), ("y", &y)])
        .unwrap();
    for (at, taps) in [("auto", 3), ("first", 1)] {
        let base = ["finetune", text(&model), "--data", text(&data), "--output", text(&output), "--json"];
        let head = ["--head=8", "--at=461", "--train=last:7", "--method=icp", "--epochs=1", "--holdout=0"];
        let s = crate::common::json(&[&base[..], &head, &["--batch=4", "--icp-at", at]].concat(), 0);
        let found = s["taps"].as_array().unwrap();
        assert!(
            found.len() == taps && found.iter().all(|t| t.as_str().unwrap().ends_with("output/Add_output_0")),
            "{found:?}"
        );
    }
}

/// `retune perturb` on images: what it prints is what it writes, and the loss falls (or climbs).
#[test]
fn perturbations_to_look_at() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = (shipped("models/dsnet.onnx"), shipped("models/fashion-images-idx3-ubyte.gz"));
    let see = |name: &str, more: &[&str]| {
        let folder = dir.path().join(name);
        let args = [
            "perturb",
            text(&model),
            "--data",
            text(&data),
            "--output",
            text(&folder),
            "--samples=5",
            "--json",
        ];
        (
            crate::common::json(&[&args[..], more].concat(), 0),
            Arrays::read(&folder.join("perturbation.npz")),
            folder,
        )
    };
    let (down, arrays, folder) = see("down", &["--icp-steps=3", "--icp-epsilon=0.01", "--icp-range=0:1"]);
    let numbers =
        |v: &serde_json::Value| v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect::<Vec<_>>();
    let losses = numbers(&down["losses"]);
    assert!(losses.len() == 4 && losses[3] < losses[0], "{losses:?}");
    let (input, path) = arrays.0.iter().find(|a| a.1.dims().len() == 5).unwrap();
    assert_eq!(
        (path.dims(), down["perturbed"][0].as_str().unwrap()),
        (&[4, 5, 1, 28, 28][..], input.as_str())
    );
    assert!(path.to_f64().iter().all(|x| (0.0..=1.0).contains(x)));
    assert_eq!(arrays.get("loss").to_f64(), losses);
    let probabilities = arrays.get("probability").to_f64();
    for (i, sample) in down["samples"].as_array().unwrap().iter().enumerate() {
        let own = numbers(&sample["probabilities"]);
        assert_eq!(own, (0..4).map(|k| probabilities[k * 5 + i]).collect::<Vec<_>>());
        assert!(own[3] >= own[0] - 1e-6, "the label becomes likelier: {own:?}");
        // A step of Adam may be a little longer than ε.
        assert!(sample["linf"].as_f64().unwrap() <= 0.033);
    }
    // The mean of the samples' losses is the batch's.
    let of_samples = arrays.get("sample_loss").to_f64();
    let mean = of_samples[..5].iter().sum::<f64>() / 5.0;
    assert!((mean - losses[0]).abs() <= 1e-5 * mean.max(1e-2), "{mean} {losses:?}");
    let png = image::open(folder.join("strip.png")).unwrap();
    assert_eq!((png.width(), png.height()), (5 * (84 + 2), 5 * (84 + 2)));
    let (up, ..) = see(
        "up",
        &["--icp-direction=adversarial", "--icp-perturber=sign", "--icp-epsilon=0.05", "--icp-steps=1"],
    );
    let losses = numbers(&up["losses"]);
    assert!(losses[1] > losses[0], "{losses:?}");
    let out = crate::common::run(
        &[
            "perturb",
            text(&model),
            "--data",
            text(&data),
            "--output",
            text(dir.path()),
            "--icp-features=none",
        ],
        1,
    );
    assert!(String::from_utf8_lossy(&out.stderr).contains("nothing is perturbed"));
}

/// Unlabelled samples beside labelled ones: in a file of their own, or labelled −1.
#[test]
fn unlabelled_samples_take_part_in_the_feature_term() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = (shipped("models/dsnet.onnx"), shipped("models/fashion-images-idx3-ubyte.gz"));
    let output = dir.path().join("new.onnx");
    let common = ["finetune", text(&model), "--data", text(&data), "--output", text(&output)];
    let more = ["--holdout=0.97", "--no-guard", "--epochs=1", "--icp-steps=1", "--batch=16", "--json"];
    let without = crate::common::json(&[&common[..], &more].concat(), 0);
    let bytes = std::fs::read(&output).unwrap();
    let with = crate::common::json(&[&common[..], &more, &["--unlabelled", text(&data)]].concat(), 0);
    assert!(std::fs::read(&output).unwrap() != bytes);
    // As many steps on as many labelled samples.
    assert_eq!(
        (&with["steps"], &with["training_samples"]),
        (&without["steps"], &without["training_samples"])
    );
    let notes = with["notes"].to_string();
    assert!(notes.contains("2000 samples have no label"), "{notes}");
    let out = crate::common::run(
        &[&common[..], &more, &["--method=supervised", "--unlabelled", text(&data)]].concat(),
        1,
    );
    assert!(String::from_utf8_lossy(&out.stderr).contains("feature term"));
}
