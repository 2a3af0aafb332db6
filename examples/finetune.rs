//! The library in a few lines: adapts the last layer of a shipped network to a handful of samples in memory.
//!
//! `cargo run --release --example finetune -- models/dsnet.onnx better.onnx`

use std::sync::Arc;

use retune::finetune::{Config, MethodName, finetune, input_specs};
use retune::tensor::Tensor;
use retune::train::data::Dataset;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(model), Some(output)) = (args.next(), args.next()) else {
        return Err("usage: finetune MODEL.onnx NEW.onnx".into());
    };
    let model = Arc::new(retune::import::load(model)?);

    // Twenty images of noise, dark and bright: whatever an application has at hand.
    let x: Vec<f32> =
        (0..20 * 784).map(|i| (i as f32 * 0.7).sin().abs() * ((i / 784 % 2) as f32 + 0.2) / 1.2).collect();
    let y: Vec<i64> = (0..20).map(|i| i % 2).collect();
    let x = Tensor::from_slice(&[20, 1, 28, 28], &x)?;
    let y = Tensor::from_slice(&[20], &y)?;
    let data = Dataset::from_arrays(vec![("x".into(), x)], Some(y))?.bind(&input_specs(&model))?;

    let config =
        Config { method: MethodName::Supervised, train: "head".into(), lr: 1e-2, ..Config::default() };
    let done = finetune(model, data, None, &config, output.as_ref(), &mut |_| {})?;
    println!("{}: kept {}, {} steps", output, done.summary.kept, done.summary.steps);
    Ok(())
}
