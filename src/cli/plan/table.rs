//! What batches, presets and methods take, side by side.

use std::sync::Arc;

use serde::Serialize;

use crate::exec::{Precision, Program};
use crate::finetune::budget::process;
use crate::finetune::{Config, MethodName};
use crate::import::Model;
use crate::kernels::peak;
use crate::plan::work;
use crate::size::human;

/// Share of what the processor can do that products and convolutions reach, about.
const REACHED: f64 = 0.5;
/// Batches that are compared unless told otherwise, beside the configured one.
const BATCHES: [usize; 3] = [1, 8, 32];
/// Presets, likewise.
const PRESETS: [&str; 6] = ["all", "last:4", "lora:8", "norm", "bias", "head"];
/// Precisions, likewise.
const PRECISIONS: [Precision; 2] = [Precision::F32, Precision::Bf16];

/// How fast the machine is, measured: it takes a fraction of a second.
#[derive(Debug, Clone, Copy)]
pub struct Speed {
    /// Multiply-adds a second.
    work: f64,
    /// Bytes read and written a second.
    bytes: f64,
}

impl Speed {
    /// Of `threads` threads; 0: one per core.
    pub fn measured(threads: usize) -> anyhow::Result<Speed> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
        let (gflops, gigabytes) = pool.install(|| (peak::gflops(), peak::gigabytes()));
        Ok(Speed { work: gflops * 0.5e9 * REACHED, bytes: gigabytes * 1e9 })
    }

    /// Milliseconds that a run of the program takes, about: of each kernel call what takes longer, its multiply-adds or
    /// its bytes.
    pub fn estimate(&self, p: &Program) -> f64 {
        let seconds = p.plan.steps.iter().map(|s| {
            let (work, bytes) = work(&p.graph, p.graph.node(s.node));
            (work / self.work).max(bytes / self.bytes)
        });
        seconds.sum::<f64>() * 1e3
    }
}

/// One way to train.
#[derive(Serialize)]
pub struct Row {
    pub batch: usize,
    pub precision: Precision,
    pub train: String,
    pub method: String,
    pub peak_bytes: usize,
    /// Estimated.
    pub step_ms: f64,
    /// With what the process takes beside it; absent where no memory was given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fits: Option<bool>,
}

/// The combinations to be compared.
pub struct Asked<'a> {
    pub batches: &'a [usize],
    pub presets: &'a [String],
    pub device: Option<usize>,
    pub shape: &'a [String],
}

/// Plans every combination. What cannot be trained that way is left out.
pub fn rows(model: &Arc<Model>, config: &Config, asked: &Asked, speed: &Speed) -> anyhow::Result<Vec<Row>> {
    let or = |given: &[usize]| match given {
        [] => BATCHES.iter().copied().chain([config.batch]).collect(),
        given => given.to_vec(),
    };
    let mut batches: Vec<usize> = or(asked.batches);
    batches.sort();
    batches.dedup();
    let mut presets = asked.presets.to_vec();
    if presets.is_empty() {
        presets = PRESETS.iter().map(|p| p.to_string()).collect();
        if !presets.contains(&config.train) {
            presets.insert(0, config.train.clone());
        }
    }
    let mut rows = Vec::new();
    let mut precisions = PRECISIONS.to_vec();
    if !precisions.contains(&config.precision) {
        precisions.push(config.precision);
    }
    for precision in precisions {
        for preset in &presets {
            for &batch in &batches {
                let inputs = super::input_shapes(model, batch, asked.shape)?;
                for (name, method) in [("supervised", MethodName::Supervised), ("icp", MethodName::Icp)] {
                    let train = preset.clone();
                    let own = Config { method, train, batch, precision, ..config.clone() };
                    let floats = inputs.iter().any(|(_, meta)| meta.dtype.is_float());
                    if method == MethodName::Icp && !floats {
                        continue;
                    }
                    let Ok(planned) = super::training(model, &inputs, name, &own, speed) else { continue };
                    let kernels = planned.report.programs.iter().map(|p| p.kernels).sum();
                    let held = planned.report.peak_bytes + process(model, kernels);
                    rows.push(Row {
                        batch,
                        precision,
                        train: preset.clone(),
                        method: name.into(),
                        peak_bytes: planned.report.peak_bytes,
                        step_ms: planned.report.step_ms,
                        fits: asked.device.map(|device| held <= device),
                    });
                }
            }
        }
    }
    Ok(rows)
}

pub fn print(rows: &[Row], device: Option<usize>) {
    if rows.is_empty() {
        return;
    }
    outln!();
    let head = device.map_or(String::new(), |d| format!("fits {}", human(d)));
    outln!(
        "{:18} {:>6} {:>9}  {:12} {:>10} {:>9}  {head}",
        "train",
        "batch",
        "precision",
        "method",
        "peak",
        "step, ms"
    );
    let mut before = "";
    for r in rows {
        // Once a group.
        let train = if r.train == before { "" } else { r.train.as_str() };
        before = &r.train;
        outln!(
            "{:18} {:>6} {:>9}  {:12} {:>10} {:>9.1}  {}",
            train,
            r.batch,
            r.precision,
            r.method,
            human(r.peak_bytes),
            r.step_ms,
            r.fits.map_or("", |f| if f { "yes" } else { "no" })
        );
    }
}
