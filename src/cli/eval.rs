//! `retune eval`: loss and metrics on data.

use std::path::PathBuf;

use crate::finetune::{EVAL_BATCH, parse_loss};
use crate::train::data::ImageOptions;
use crate::train::fit::evaluate;

#[derive(clap::Args)]
pub struct Args {
    model: PathBuf,
    #[command(flatten)]
    fixed: super::data::SetArgs,
    /// .npz, folder of class folders, or IDX images file
    #[arg(long)]
    data: PathBuf,
    /// cross-entropy, bce, mse, or an ONNX graph
    #[arg(long, default_value = "cross-entropy")]
    loss: String,
    #[arg(long, default_value_t = EVAL_BATCH)]
    batch: usize,
    #[command(flatten)]
    compute: super::data::ComputeArgs,
    #[command(flatten)]
    images: super::data::ImageArgs,
    #[arg(long)]
    json: bool,
}

pub fn main(args: &Args) -> anyhow::Result<u8> {
    let model = super::data::load(&args.model, &args.fixed.set)?;
    let data = super::data::bound(&model, &args.data, &args.images.over(ImageOptions::default()))?;
    for note in data.notes() {
        eprintln!("note: {note}");
    }
    let loss = parse_loss(&args.loss, 0.0)?;
    let (mut session, data) = super::data::with_target(&model, data, &loss, args.compute.options())?;
    let all: Vec<usize> = (0..data.len()).collect();
    let result = evaluate(&mut session, &loss, &data, &all, args.batch)?;
    if let Some(left_out) = &result.left_out {
        eprintln!("note: {left_out} is left out of the loss, which works on its input");
    }
    if args.json {
        super::print_json(&result.metrics)?;
    } else {
        outln!("{}", describe(&result.metrics));
    }
    Ok(0)
}

/// Metrics on one line.
pub fn describe(m: &crate::train::metrics::Metrics) -> String {
    let mut text = format!("loss {:.4}", m.loss);
    for (name, value) in [("accuracy", m.accuracy), ("f1", m.f1)] {
        if let Some(v) = value {
            text += &format!(", {name} {v:.4}");
        }
    }
    text + &format!(" ({} samples)", m.samples)
}
