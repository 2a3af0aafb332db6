//! `retune run`: a model on an .npz of inputs.

use std::path::PathBuf;

use anyhow::Context;
use clap::ValueEnum;

use crate::exec::Session;
use crate::tensor::Tensor;
use crate::train::data::{read_npz, write_npz};

#[derive(clap::Args)]
pub struct Args {
    model: PathBuf,
    #[command(flatten)]
    fixed: super::data::SetArgs,
    /// .npz with one array per model input, by name
    #[arg(long, value_name = "IN.npz")]
    inputs: PathBuf,
    /// .npz to write, with one array per model output
    #[arg(long, value_name = "OUT.npz")]
    output: PathBuf,
    #[arg(long, value_enum, default_value = "native")]
    engine: Engine,
    #[command(flatten)]
    compute: super::data::ComputeArgs,
}

#[derive(Clone, Copy, ValueEnum)]
enum Engine {
    /// retune's own kernels
    Native,
    /// tract, as a second opinion
    Tract,
}

pub fn main(args: &Args) -> anyhow::Result<u8> {
    let feeds = read_npz(&args.inputs)?;
    let outputs = match args.engine {
        Engine::Native => {
            let model = super::data::load(&args.model, &args.fixed.set)?;
            let mut session = Session::new(model, args.compute.options())?;
            session.forward(&feeds).with_context(|| args.model.display().to_string())?
        }
        Engine::Tract if args.fixed.set.is_empty() => crate::export::verify::run(&args.model, &feeds)?,
        Engine::Tract => {
            let model = super::data::load(&args.model, &args.fixed.set)?;
            crate::export::verify::run(&args.model, &model.with_fixed(&feeds)?)?
        }
    };
    let arrays: Vec<(&str, &Tensor)> = outputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
    write_npz(&args.output, &arrays)?;
    for (name, t) in &outputs {
        eprintln!("{name}: {} {:?}", t.dtype(), t.dims());
    }
    Ok(0)
}
