//! `retune inspect`: what a model is and what of it can be trained.

use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Args {
    model: PathBuf,
    #[command(flatten)]
    fixed: super::data::SetArgs,
    #[arg(long)]
    json: bool,
    /// For pasting into a ticket
    #[arg(long, conflicts_with = "json")]
    markdown: bool,
}

pub fn main(args: &Args) -> anyhow::Result<u8> {
    let model = super::data::load(&args.model, &args.fixed.set)?;
    let report = crate::inspect::inspect(&model);
    let title = args.model.display().to_string();
    match (args.json, args.markdown) {
        (true, _) => super::print_json(&report)?,
        (_, true) => out!("{}", report.markdown(&title)),
        _ => out!("{}", report.text(&title)),
    }
    Ok(0)
}
