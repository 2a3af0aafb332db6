//! `retune grad`: loss and gradients of one batch.

use std::path::PathBuf;

use clap::ValueEnum;

use crate::finetune::{input_specs, parse_loss};
use crate::graph::WeightId;
use crate::ops::Mode;
use crate::tensor::Tensor;
use crate::train::data::{Dataset, read_npz, write_npz};
use crate::train::gradients::gradients;

#[derive(clap::Args)]
pub struct Args {
    model: PathBuf,
    #[command(flatten)]
    fixed: super::data::SetArgs,
    /// .npz with one array per model input, by name, and `target`
    #[arg(long, value_name = "IN.npz")]
    inputs: PathBuf,
    /// cross-entropy, bce, mse, or an ONNX graph
    #[arg(long, default_value = "cross-entropy")]
    loss: String,
    #[arg(long, value_enum, default_value = "eval")]
    mode: ModeName,
    /// .npz to write: `loss`, `output.<name>`, `grad.<name>`
    #[arg(long, value_name = "OUT.npz")]
    output: PathBuf,
    #[command(flatten)]
    compute: super::data::ComputeArgs,
}

#[derive(Clone, Copy, ValueEnum)]
enum ModeName {
    /// Batch statistics and dropout
    Train,
    /// Running statistics, no dropout
    Eval,
}

pub fn main(args: &Args) -> anyhow::Result<u8> {
    let model = super::data::load(&args.model, &args.fixed.set)?;
    let mut arrays = read_npz(&args.inputs)?;
    let Some(at) = arrays.iter().position(|a| a.0 == "target") else {
        anyhow::bail!("{}: has no array 'target'", args.inputs.display());
    };
    let (_, target) = arrays.remove(at);
    let loss = parse_loss(&args.loss, 0.0)?;
    let specs = input_specs(&model);
    let data = Dataset::for_inputs(arrays, Some(target), &specs)?.bind(&specs)?;
    let (mut session, data) = super::data::with_target(&model, data, &loss, args.compute.options())?;
    let mut batch = data.new_batch(data.len());
    data.batch(&(0..data.len()).collect::<Vec<_>>(), None, &mut batch)?;
    let params: Vec<WeightId> =
        (0..model.weights.len() as u32).map(WeightId).filter(|w| model.weight(*w).trainable).collect();
    let mode = match args.mode {
        ModeName::Train => Mode::TRAIN,
        ModeName::Eval => Mode::EVAL,
    };
    let g = gradients(&mut session, &loss, mode, &params, &batch)?;
    if let Some(left_out) = &g.left_out {
        eprintln!("{left_out} is left out of the loss, which works on its input");
    }
    let mut named: Vec<(String, &Tensor)> = vec![("loss".into(), &g.loss)];
    named.extend(g.outputs.iter().map(|(n, t)| (format!("output.{n}"), t)));
    named.extend(g.gradients.iter().map(|(n, t)| (format!("grad.{n}"), t)));
    let named: Vec<(&str, &Tensor)> = named.iter().map(|(n, t)| (n.as_str(), *t)).collect();
    write_npz(&args.output, &named)?;
    eprintln!("loss {:.6}, {} gradients", g.loss.to_f64()[0], g.gradients.len());
    Ok(0)
}
