//! The command line: each subcommand parses, calls the library, prints; no logic of its own.

#[macro_use]
mod out;

mod adapt;
mod bench;
mod config;
mod data;
mod delta;
mod demo;
mod eval;
mod finetune;
mod grad;
mod html;
mod icp_flags;
mod inspect;
mod junit;
mod page;
mod perturb;
mod plan;
mod progress;
mod run;
mod stdin;
mod study;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Finetunes deployed ONNX networks on the CPU and gives back the same file with better weights.
#[derive(Parser)]
#[command(name = "retune", version, about, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
#[allow(clippy::large_enum_variant, reason = "one value a process")]
enum Command {
    /// Inputs, outputs, operators, parameters and what blocks training
    Inspect(inspect::Args),
    /// Peak memory of training, by kind
    Plan(plan::Args),
    /// Run a model on an .npz of inputs
    Run(run::Args),
    /// Loss and gradients of one batch
    Grad(grad::Args),
    /// Loss and metrics on data
    Eval(eval::Args),
    /// Finetune a model on data and write it back
    Finetune(finetune::Args),
    /// What differs between two files of one model, as a small file
    Delta(delta::Args),
    /// Put a delta onto the file it was made for
    Apply(delta::ApplyArgs),
    /// Adapt a model to data without labels and write it back
    Adapt(adapt::Args),
    /// What ICP does to inputs: a picture, arrays, losses along the way
    Perturb(perturb::Args),
    /// A grid of finetunes from one file, with tables of paired differences
    Study(study::Args),
    /// Run ONNX backend test cases
    Test(test::Args),
    /// Time a forward pass or a training step
    Bench(bench::Args),
    /// The main job on what the repository ships: shift, finetune, export, verify, report
    Demo(demo::Args),
}

/// Refused or failed; a usage error is 2 (clap's own).
const FAILED: u8 = 1;
/// A guard or `--require` was not met.
const NOT_MET: u8 = 3;

/// Parses the arguments of the process and does what they say.
pub fn main() -> ExitCode {
    let start = std::time::Instant::now();
    let cli = Cli::parse();
    let done = match &cli.command {
        Command::Inspect(a) => inspect::main(a),
        Command::Plan(a) => plan::main(a),
        Command::Run(a) => run::main(a),
        Command::Grad(a) => grad::main(a),
        Command::Eval(a) => eval::main(a),
        Command::Finetune(a) => finetune::main(a),
        Command::Delta(a) => delta::main(a),
        Command::Apply(a) => delta::main_apply(a),
        Command::Adapt(a) => adapt::main(a),
        Command::Perturb(a) => perturb::main(a),
        Command::Study(a) => study::main(a),
        Command::Test(a) => test::main(a),
        Command::Bench(a) => bench::main(a, start),
        Command::Demo(a) => demo::main(a),
    };
    match done {
        Ok(code) => ExitCode::from(code),
        Err(e) => {
            eprintln!("error: {}", chain(&e));
            ExitCode::from(FAILED)
        }
    }
}

/// An error and its causes, those left out that the text before already tells.
fn chain(error: &anyhow::Error) -> String {
    error.chain().skip(1).map(|cause| cause.to_string()).fold(error.to_string(), |text, cause| {
        match text.contains(&cause) {
            true => text,
            false => format!("{text}: {cause}"),
        }
    })
}

/// Prints one JSON document on stdout.
fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, value)?;
    writeln!(out)?;
    Ok(())
}
