//! `retune delta` and `retune apply`: what changed in a model, from one machine to another.

use std::path::PathBuf;

use serde::Serialize;

use crate::delta::{Delta, DeltaType, Described, apply};
use crate::export::Options;
use crate::import::load;

use crate::size::human;

#[derive(clap::Args)]
pub struct Args {
    base: PathBuf,
    /// The same model with other weights
    new: PathBuf,
    /// The delta to write
    #[arg(short, long, value_name = "OUT.safetensors")]
    output: PathBuf,
    /// full or sparse (exact), f16 or bf16 (differences, to 2⁻¹¹ or 2⁻⁸ of themselves)
    #[arg(long, default_value = "full")]
    delta_type: DeltaType,
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
pub struct ApplyArgs {
    /// The file that the delta was made for
    model: PathBuf,
    delta: PathBuf,
    /// The ONNX file to write
    #[arg(short, long, value_name = "NEW.onnx")]
    output: PathBuf,
    /// Give external data files new names where they would overwrite the source's
    #[arg(long)]
    rename_data: bool,
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Applied {
    files: Vec<PathBuf>,
    /// Tensors that changed.
    tensors: usize,
    max_error: f64,
}

pub fn main(args: &Args) -> anyhow::Result<u8> {
    let delta = Delta::between(&load(&args.base)?, &load(&args.new)?, args.delta_type)?;
    let written = delta.write(&args.output)?;
    report(&written);
    if args.json {
        super::print_json(&written)?;
    }
    Ok(0)
}

pub fn main_apply(args: &ApplyArgs) -> anyhow::Result<u8> {
    let model = load(&args.model)?;
    let delta = Delta::read(&args.delta)?;
    let written = apply(&model, &delta, &args.output, Options { rename_data: args.rename_data })?;
    eprintln!("wrote {}: {} tensors changed", args.output.display(), written.changed.len());
    if args.json {
        let (tensors, max_error) = (written.changed.len(), delta.max_error);
        super::print_json(&Applied { files: written.files, tensors, max_error })?;
    }
    Ok(0)
}

/// For people, on stderr.
pub fn report(d: &Described) {
    let share = 100.0 * d.bytes as f64 / (d.base_bytes as f64).max(1.0);
    let exact = if d.max_error == 0.0 {
        "exact".into()
    } else {
        format!("values off by at most {:.1e}", d.max_error)
    };
    eprintln!(
        "wrote {}: {} tensors in {}, {share:.1}% of the model, {exact}",
        d.path.display(),
        d.tensors,
        human(d.bytes as usize)
    );
}
