//! The tables of docs/adapt.md: a deployed network, cameras that shift its images, and each way to adapt without labels.
//!
//! ```text
//! cargo run --release --example adapt_table -- [shifts=dim,blur] [seeds=0,1,2] [methods=stats,infomax] [stream=sorted]
//!                                              [samples=2000] [test=5000] [model=models/resnet20.onnx] [threads=1]
//! ```
//!
//! Images are Fashion-MNIST's test split (`tests/fetch.sh`): by seed, `samples` of them to adapt to and `test` others to
//! measure on. Methods are names of `retune adapt`, or `deployed`; after a colon, options of its TOML file joined by `;`
//! (`icp:lr=1e-3;guard=false`). One line a run.

use std::path::PathBuf;
use std::sync::Arc;

use retune::adapt::{Config, Input, adapt};
use retune::exec::{Options, Session};
use retune::finetune::{EVAL_BATCH, input_specs};
use retune::import::Model;
use retune::train::data::{Dataset, SHIFTS, Worn, degrade, open, split};
use retune::train::fit::evaluate;
use retune::train::loss::Loss;

type Failure = Box<dyn std::error::Error>;

struct Given {
    given: Vec<(String, String)>,
}

impl Given {
    fn text(&self, key: &str, default: &str) -> String {
        self.given.iter().find(|g| g.0 == key).map_or(default.to_string(), |g| g.1.clone())
    }

    fn list(&self, key: &str, default: &str) -> Vec<String> {
        self.text(key, default).split(',').map(str::to_string).collect()
    }
}

/// A method's options as the TOML file spells them.
fn config(method: &str, stream: bool, threads: usize, seed: u64) -> Result<Config, Failure> {
    let (name, options) = method.split_once(':').unwrap_or((method, ""));
    let mut text = format!("method = \"{name}\"\n");
    for o in options.split(';').filter(|o| !o.is_empty()) {
        let (key, value) = o.split_once('=').ok_or("options are KEY=VALUE")?;
        let bare = value.parse::<f64>().is_ok() || value == "true" || value == "false";
        text += &if bare { format!("{key} = {value}\n") } else { format!("{key} = \"{value}\"\n") };
    }
    let config: Config = toml::from_str(&text)?;
    Ok(Config { stream, threads, seed, ..config })
}

fn accuracy(model: &Arc<Model>, data: &Dataset, threads: usize) -> Result<f64, Failure> {
    let mut session = Session::new(model.clone(), Options { threads, ..Options::default() })?;
    let all: Vec<usize> = (0..data.len()).collect();
    let loss = Loss::CrossEntropy { label_smoothing: 0.0 };
    Ok(evaluate(&mut session, &loss, data, &all, EVAL_BATCH)?.metrics.accuracy.unwrap_or(0.0))
}

fn main() -> Result<(), Failure> {
    let given = std::env::args().skip(1);
    let given = given.map(|a| a.split_once('=').map(|(k, v)| (k.to_string(), v.to_string())));
    let options = Given { given: given.collect::<Option<_>>().ok_or("arguments are KEY=VALUE")? };
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let number = |key: &str, default: &str| options.text(key, default).parse::<usize>();
    let (samples, test, threads) =
        (number("samples", "2000")?, number("test", "5000")?, number("threads", "1")?);
    let model = Arc::new(retune::import::load(root.join(options.text("model", "models/resnet20.onnx")))?);
    let images = root.join("target/fetched/fashion/t10k-images-idx3-ubyte.gz");
    let clean =
        open(options.text("data", &images.to_string_lossy()), &Default::default(), &input_specs(&model))?;
    let all_shifts: Vec<&str> = SHIFTS.iter().map(|s| s.0).collect();
    let output = tempfile::tempdir()?;
    let output = output.path().join("adapted.onnx");
    for seed in options.list("seeds", "0") {
        let seed: u64 = seed.parse()?;
        let share = test as f64 / clean.len() as f64;
        let parts = split(clean.len(), share, seed, clean.labels())?;
        let (mut train, held) = (parts.train, parts.held);
        // Any `samples` of the others, then in the order that is asked for.
        train.sort_by_key(|i| (*i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15 ^ seed));
        train.truncate(samples);
        let stream = options.text("stream", "");
        if let (true, Some(labels)) = (stream.starts_with("sorted"), clean.labels()) {
            train.sort_by_key(|i| labels[*i]);
        }
        if let (Some(class), Some(labels)) = (stream.strip_prefix("class-"), clean.labels()) {
            let class: i64 = class.parse()?;
            train.retain(|i| labels[*i] == class);
        }
        for shift in options.list("shifts", &all_shifts.join(",")) {
            let worn = Worn::named(&shift, seed).ok_or_else(|| format!("no shift '{shift}'"))?;
            let data = degrade(&clean, &worn)?;
            let (train, held) = (data.subset(&train)?, data.subset(&held)?);
            for method in options.list("methods", "deployed,stats,infomax") {
                if method == "deployed" {
                    println!("{shift} seed {seed} deployed {:.4}", accuracy(&model, &held, threads)?);
                    continue;
                }
                let config = config(&method, !stream.is_empty(), threads, seed)?;
                let done = adapt(
                    model.clone(),
                    Input::Set(train.clone().without_target().0),
                    None,
                    &config,
                    &output,
                    &mut |_| {},
                )?;
                let adapted = Arc::new(retune::import::load(&output)?);
                println!(
                    "{shift} seed {seed} {method}{} {:.4} ended={} resets={} steps={} seconds={:.0}",
                    if stream.is_empty() { String::new() } else { format!(" stream={stream}") },
                    accuracy(&adapted, &held, threads)?,
                    done.ended,
                    done.resets,
                    done.steps,
                    done.seconds
                );
            }
        }
    }
    Ok(())
}
