//! `retune finetune`: a model and data in, the same model with better weights out.

use std::path::PathBuf;

use crate::finetune::{NumberOr, Summary, finetune};

use super::config::{Overrides, Switches, resolve};
use super::eval::describe;
use super::junit;
use super::progress::Reporter;

#[derive(clap::Args)]
pub struct Args {
    model: PathBuf,
    /// .npz, folder of class folders, or IDX images file
    #[arg(long)]
    data: PathBuf,
    /// The ONNX file to write; may be left out with --delta
    #[arg(long, value_name = "NEW.onnx", required_unless_present_any = ["delta", "config"])]
    output: Option<PathBuf>,
    #[command(flatten)]
    overrides: Overrides,
    #[command(flatten)]
    switches: Switches,
    #[command(flatten)]
    images: super::data::ImageArgs,
    #[arg(long)]
    json: bool,
}

/// Samples whose perturbation the report follows.
const SHOWN: usize = 64;

pub fn main(args: &Args) -> anyhow::Result<u8> {
    let mut config = resolve(&args.overrides, &args.switches)?;
    config.images = args.images.over(config.images.clone());
    let model = super::data::load(&args.model, &config.set)?;
    if config.train == "all" && config.head.is_none() {
        // Before data are looked for that fit it.
        model.require_trainable()?;
    }
    let data = super::data::bound(&model, &args.data, &config.images)?;
    let data = match &config.unlabelled {
        Some(path) => data.with_unlabelled(&super::data::bound(&model, path, &config.images)?)?,
        None => data,
    };
    let held = match (config.holdout_fraction()?, &config.holdout) {
        (None, NumberOr::Word(path)) => Some(super::data::bound(&model, path.as_ref(), &config.images)?),
        _ => None,
    };
    let Some(output) = args.output.as_ref().or(config.delta.as_ref()) else {
        anyhow::bail!("--output or --delta says where the result goes");
    };
    let mut reporter = Reporter::new();
    let shown = config.report.is_some().then(|| super::perturb::first_labelled(&data, SHOWN)).transpose()?;
    let started = std::time::Instant::now();
    let done = finetune(model, data, held, &config, output, &mut |p| reporter.step(p));
    if let Some(path) = &config.junit {
        let cases = match &done {
            Ok(done) => cases(&done.summary, config.guard),
            Err(e) => vec![("finetune".to_string(), junit::Outcome::Broken(e.to_string()))],
        };
        junit::write(path, "retune finetune", started.elapsed().as_secs_f64(), &cases)?;
    }
    let mut done = done?;
    if let (Some(path), Some(shown)) = (&config.report, &shown) {
        let falls = super::perturb::falls(&mut done, &config, shown)?;
        super::page::finetuned(path, &args.model, &done, falls.as_deref())?;
        eprintln!("report: {}", path.display());
    }
    report(&done.summary);
    if args.json {
        super::print_json(&done.summary)?;
    }
    Ok(if done.summary.kept { 0 } else { super::NOT_MET })
}

fn cases(s: &Summary, guarded: bool) -> Vec<junit::Case> {
    let mut cases = vec![junit::guard(s.verdict.as_ref(), guarded)];
    cases.extend(junit::requirements(&s.requirements));
    cases.push(junit::verified(&s.verified));
    cases
}

/// The summary for people, on stderr.
pub fn report(s: &Summary) {
    for note in &s.notes {
        eprintln!("note: {note}");
    }
    if let (Some(before), Some(after)) = (&s.before, &s.after) {
        eprintln!("before: {}", describe(before));
        eprintln!("after:  {}", describe(after));
    }
    if let Some(v) = &s.verdict {
        let g = v.gain;
        eprintln!("gain:   {:+.4}, 95% interval {:+.4} to {:+.4}", g.value, g.low, g.high);
    }
    eprintln!(
        "{} steps in {:.1} s on {} samples, {} parameters trained, peak memory {}",
        s.steps,
        s.seconds,
        s.training_samples,
        s.trained_parameters,
        crate::size::human(s.peak_bytes)
    );
    for unmet in &s.unmet {
        eprintln!("not met: {unmet}");
    }
    match (s.kept, s.output.as_os_str().is_empty()) {
        (true, _) => eprintln!("wrote {} (tract: {})", s.output.display(), s.verified),
        (false, false) => eprintln!(
            "the new network is not better by more than noise, or a condition is not met: {} is the original",
            s.output.display()
        ),
        (false, true) => {
            eprintln!("the new network is not better by more than noise, or a condition is not met: no delta")
        }
    }
    if let Some(d) = &s.delta {
        super::delta::report(d);
    }
}
