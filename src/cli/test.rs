//! `retune test`: ONNX backend test cases.

use std::path::PathBuf;

use crate::backend_test;

#[derive(clap::Args)]
pub struct Args {
    /// Folders, searched for test cases (model.onnx beside test_data_set_*)
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
    #[arg(long)]
    json: bool,
}

pub fn main(args: &Args) -> anyhow::Result<u8> {
    let report = backend_test::run(&args.paths)?;
    if args.json {
        super::print_json(&report)?;
    } else {
        for c in report.cases.iter().filter(|c| c.outcome != backend_test::Outcome::Passed) {
            let outcome = format!("{:?}", c.outcome).to_lowercase();
            println!("{outcome:11} {}: {}", c.name, c.reason.as_deref().unwrap_or(""));
        }
        println!("{} passed, {} failed, {} unsupported", report.passed, report.failed, report.unsupported);
    }
    Ok(if report.failed > 0 { super::FAILED } else { 0 })
}
