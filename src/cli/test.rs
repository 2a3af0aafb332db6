//! `retune test`: ONNX backend test cases.

use std::path::PathBuf;

use crate::backend_test::{self, Checked, Gradients};

#[derive(clap::Args)]
pub struct Args {
    /// Folders, searched for test cases (model.onnx beside test_data_set_*)
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
    /// Check the gradients of the models too, against differences in float64
    #[arg(long)]
    grad: bool,
    #[arg(long)]
    json: bool,
}

pub fn main(args: &Args) -> anyhow::Result<u8> {
    let report = backend_test::run(&args.paths, args.grad)?;
    if args.json {
        super::print_json(&report)?;
    } else {
        for c in report.cases.iter().filter(|c| c.outcome != backend_test::Outcome::Passed) {
            let outcome = format!("{:?}", c.outcome).to_lowercase();
            outln!("{outcome:11} {}: {}", c.name, c.reason.as_deref().unwrap_or(""));
        }
        for c in &report.cases {
            if let Some(Checked::Wrong(why)) = &c.gradient {
                outln!("{:11} {}: gradient: {why}", "wrong", c.name);
            }
        }
        let lacking = report.lacking();
        if !lacking.is_empty() {
            outln!("\nwhat unsupported cases lack, and how many of them:");
            lacking.iter().for_each(|(what, n)| outln!("{n:6} {what}"));
            outln!();
        }
        outln!("{} passed, {} failed, {} unsupported", report.passed, report.failed, report.unsupported);
        if let Some(g) = report.gradients {
            let Gradients { checked, none, unchecked, wrong } = g;
            outln!(
                "gradients: {checked} checked, {none} none, {unchecked} could not be checked, {wrong} wrong"
            );
        }
    }
    let wrong = report.gradients.is_some_and(|g| g.wrong > 0);
    Ok(if report.failed > 0 || wrong { super::FAILED } else { 0 })
}
