//! Whole steps of the shipped networks: forward, training step, ICP step.
//!
//! `cargo bench --bench step -- resnet20`; `RAYON_NUM_THREADS` is not read: every measurement says its threads.

use std::sync::Arc;

use divan::Bencher;
use retune::exec::{Options, Session};
use retune::graph::WeightId;
use retune::icp::{Icp, Settings};
use retune::tensor::{DType, Tensor};
use retune::train::data::{Batch, Dataset};
use retune::train::loss::Loss;
use retune::train::method::{At, Method, Plain};
use retune::train::optimizer::Optimizer;
use retune::train::step::{Evaluation, Norm, Recipe, Shapes, feeds, set_step};

fn main() {
    divan::main();
}

const BATCH: usize = 32;
const NETWORKS: [&str; 2] = ["resnet20", "dsnet"];
const THREADS: [usize; 2] = [1, 2];

fn session(network: &str, threads: usize) -> Session {
    let path = format!("{}/models/{network}.onnx", env!("CARGO_MANIFEST_DIR"));
    let model = Arc::new(retune::import::load(path).expect("a shipped model"));
    Session::new(model, Options { threads, ..Options::default() }).expect("threads")
}

fn batch(session: &Session) -> Batch {
    let x: Vec<f32> = (0..BATCH * 784).map(|i| (i as f32 * 0.37).sin() * 0.5 + 0.5).collect();
    let labels: Vec<i64> = (0..BATCH as i64).map(|i| i % 10).collect();
    let x = Tensor::from_slice(&[BATCH, 1, 28, 28], &x).expect("pixels");
    let y = Tensor::from_slice(&[BATCH], &labels).expect("labels");
    let specs = retune::finetune::input_specs(session.model());
    let data =
        Dataset::from_arrays(vec![("x".into(), x)], Some(y)).and_then(|d| d.bind(&specs)).expect("data");
    let mut batch = data.new_batch(BATCH);
    data.batch(&(0..BATCH).collect::<Vec<_>>(), None, &mut batch).expect("a batch");
    assert_eq!(batch.inputs[0].1.dtype(), DType::F32);
    batch
}

const LOSS: Loss = Loss::CrossEntropy { label_smoothing: 0.0 };

#[divan::bench(args = NETWORKS, consts = THREADS)]
fn forward<const N: usize>(bencher: Bencher, network: &str) {
    let mut session = session(network, N);
    let batch = batch(&session);
    let plan = Evaluation::new(&mut session, &LOSS, &Shapes::of(&batch).expect("shapes")).expect("a plan");
    let fed = feeds(&plan.inputs, plan.attached.target, &batch).expect("feeds");
    bencher.bench_local(|| session.run(&plan.program, &fed, 0).expect("a run"));
}

fn learn(bencher: Bencher, network: &str, threads: usize, mut method: impl Method) {
    let mut session = session(network, threads);
    let batch = batch(&session);
    let weights = session.model().weights.iter().enumerate();
    let params = weights.filter(|(_, w)| w.trainable).map(|(i, _)| WeightId(i as u32)).collect();
    let optimizer = Optimizer::adam(0.0, true);
    let recipe = Recipe { loss: LOSS, optimizer, clip: None, params, norm: Norm::Batch, accumulate: 1 };
    recipe.prepare(&mut session).expect("states");
    set_step(&mut session, 1e-9, 1);
    let at = At { epoch: 0, epochs: 1, step: 0, steps: 1, seed: 0 };
    bencher.bench_local(|| method.learn(&mut session, &recipe, &batch, &at).expect("a step"));
}

#[divan::bench(args = NETWORKS, consts = THREADS)]
fn train<const N: usize>(bencher: Bencher, network: &str) {
    learn(bencher, network, N, Plain::default());
}

#[divan::bench(args = NETWORKS, consts = THREADS)]
fn icp<const N: usize>(bencher: Bencher, network: &str) {
    learn(bencher, network, N, Icp::new(Settings::default()));
}
