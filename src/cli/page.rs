//! Reports as pages: what a finetune or the demo did, in one file without scripts or external parts.

use std::path::Path;

use crate::atomic;
use crate::error::Result;
use crate::finetune::{Finished, Summary};
use crate::tensor::Tensor;
use crate::train::fit::{Epoch, Evaluated};
use crate::train::metrics::Metrics;

use super::html::{self, Page, Section, Series};

/// A row of small images `[N, 1, H, W]` in 0..1.
pub struct Strip {
    pub caption: String,
    pub images: Tensor,
}

/// Writes the report of `retune finetune --report`; `falls`: the loss along ICP's steps, with the new weights.
pub fn finetuned(path: &Path, model: &Path, done: &Finished, falls: Option<&[f64]>) -> Result<()> {
    let s = &done.summary;
    let lead = match (s.kept, &s.before, &s.after) {
        (true, Some(b), Some(a)) => format!(
            "{} was finetuned on {} samples; on {} held-out samples the loss went from {:.4} to {:.4}. \
             The new network was written.",
            model.display(),
            s.training_samples,
            s.heldout_samples,
            b.loss,
            a.loss
        ),
        (false, ..) => format!("{} was finetuned and is not better: the original was kept.", model.display()),
        _ => format!(
            "{} was finetuned on {} samples; nothing was held out.",
            model.display(),
            s.training_samples
        ),
    };
    let rows = [("before", &done.before), ("after", &done.after)];
    let mut sections = vec![bars(&rows), metrics(&rows)];
    sections.extend(curves(&s.curve.epochs));
    sections.extend(falls.map(perturbation));
    sections.push(confusions(&[("before", &done.before), ("after", &done.after)], &done.class_names));
    write(path, &Page { title: "retune: finetune report".into(), lead, facts: facts(s), sections })
}

/// Writes the demo's page.
pub fn demo(
    path: &Path,
    model: &Path,
    clean: &Evaluated,
    done: &Finished,
    classes: &[&str],
    strips: &[Strip],
) -> Result<()> {
    let s = &done.summary;
    let percent = |e: Option<&Evaluated>| match e.and_then(|e| e.metrics.accuracy) {
        Some(a) => format!("{:.1}%", 100.0 * a),
        None => "an unknown accuracy".into(),
    };
    let lead = format!(
        "{} classifies clean images at {}. Behind a worn camera, which dims, blurs and adds noise, it falls to \
         {}. Finetuned on {} labelled images of that camera, it is back at {}. What this page claims is the \
         recovery, not that ICP does better than plain finetuning: run the demo with --method supervised to compare.",
        model.file_name().unwrap_or_default().to_string_lossy(),
        percent(Some(clean)),
        percent(done.before.as_ref()),
        s.training_samples,
        percent(done.after.as_ref())
    );
    let clean = Some(clean.clone());
    let rows = [
        ("clean camera", &clean),
        ("worn camera, deployed network", &done.before),
        ("worn camera, finetuned network", &done.after),
    ];
    let mut sections = vec![bars(&rows), metrics(&rows)];
    sections.extend(curves(&s.curve.epochs));
    let names: Vec<String> = classes.iter().map(|c| c.to_string()).collect();
    let matrices = [("worn camera, deployed", &done.before), ("worn camera, finetuned", &done.after)];
    sections.push(confusions(&matrices, &names));
    sections.push(Section::Strips {
        title: "What ICP does to images".into(),
        strips: strips.iter().filter_map(strip).collect(),
    });
    write(path, &Page { title: "retune demo: a worn camera".into(), lead, facts: facts(s), sections })
}

fn write(path: &Path, page: &Page) -> Result<()> {
    atomic::write_bytes(path, html::render(page).as_bytes())
}

fn facts(s: &Summary) -> Vec<(String, String)> {
    let fact = |k: &str, v: String| (k.to_string(), v);
    let mut facts = vec![
        fact("output", s.output.display().to_string()),
        fact("checked by tract", s.verified.clone()),
        fact("parameters trained", s.trained_parameters.to_string()),
        fact("training samples", s.training_samples.to_string()),
        fact("held-out samples", s.heldout_samples.to_string()),
        fact("steps", format!("{} ({} skipped)", s.steps, s.skipped_steps)),
        fact("time", format!("{:.1} s", s.seconds)),
        fact("peak memory", crate::size::human(s.peak_bytes)),
    ];
    if !s.taps.is_empty() {
        facts.push(fact("features compared at", s.taps.join(", ")));
    }
    facts
}

/// Every metric, a column a network.
fn metrics(rows: &[(&str, &Option<Evaluated>)]) -> Section {
    let known: Vec<(&str, &Metrics)> =
        rows.iter().filter_map(|(name, e)| Some((*name, &e.as_ref()?.metrics))).collect();
    let mut header = vec![String::new()];
    header.extend(known.iter().map(|(name, _)| name.to_string()));
    let row = |name: &str, f: &dyn Fn(&Metrics) -> Option<f64>| -> Option<Vec<String>> {
        let cells: Option<Vec<String>> = known.iter().map(|(_, m)| f(m).map(|x| format!("{x:.4}"))).collect();
        Some([vec![name.to_string()], cells?].concat())
    };
    let rows = [
        row("loss", &|m| Some(m.loss)),
        row("accuracy", &|m| m.accuracy),
        row("precision", &|m| m.precision),
        row("recall", &|m| m.recall),
        row("F1", &|m| m.f1),
    ];
    Section::Table {
        title: "Metrics on held-out samples".into(),
        header,
        rows: rows.into_iter().flatten().collect(),
    }
}

fn bars(rows: &[(&str, &Option<Evaluated>)]) -> Section {
    let bars = rows
        .iter()
        .filter_map(|(name, e)| {
            let accuracy = e.as_ref()?.metrics.accuracy?;
            Some((name.to_string(), accuracy, format!("{:.1}%", 100.0 * accuracy)))
        })
        .collect();
    Section::Bars { title: "Accuracy on held-out samples".into(), bars, note: None }
}

fn curves(epochs: &[Epoch]) -> Vec<Section> {
    let series = |name: &str, f: &dyn Fn(&Epoch) -> Option<f64>| Series {
        name: name.into(),
        points: epochs.iter().enumerate().filter_map(|(i, e)| Some(((i + 1) as f64, f(e)?))).collect(),
    };
    let mut losses = vec![series("task loss", &|e| Some(e.loss))];
    let features = series("feature loss", &|e| e.features);
    if !features.points.is_empty() {
        losses.push(features);
    }
    let chart = |title: &str, y: &str, series: Vec<Series>| Section::Chart {
        title: title.into(),
        x_label: "epoch".into(),
        y_label: y.into(),
        series,
        note: None,
    };
    let mut sections = vec![chart("Loss while training", "loss", losses)];
    let accuracy = series("training batches", &|e| e.accuracy);
    if !accuracy.points.is_empty() {
        sections.push(chart("Accuracy while training", "accuracy", vec![accuracy]));
    }
    sections
}

/// How the loss falls while the input is perturbed.
fn perturbation(losses: &[f64]) -> Section {
    let points = losses.iter().enumerate().map(|(k, loss)| (k as f64, *loss)).collect();
    Section::Chart {
        title: "Loss along the perturbation".into(),
        x_label: "perturbation step".into(),
        y_label: "task loss".into(),
        series: vec![Series { name: "first training samples, new weights".into(), points }],
        note: None,
    }
}

/// Classes without a name are called by their number.
fn confusions(rows: &[(&str, &Option<Evaluated>)], names: &[String]) -> Section {
    let matrices: Vec<(String, usize, Vec<u64>)> = rows
        .iter()
        .filter_map(|(caption, e)| {
            let c = &e.as_ref()?.confusion;
            (c.classes > 0).then(|| (caption.to_string(), c.classes, c.counts.clone()))
        })
        .collect();
    let classes = matrices.first().map_or(0, |m| m.1);
    Section::Confusions {
        title: "Confusion on held-out samples".into(),
        class_names: (0..classes).map(|c| names.get(c).cloned().unwrap_or_else(|| c.to_string())).collect(),
        matrices,
    }
}

/// A strip of grey images; `None` for tensors that are none.
fn strip(s: &Strip) -> Option<html::Strip> {
    let [_, 1, height, width] = s.images.dims() else { return None };
    let pixels = s.images.get::<f32>().ok()?;
    let byte = |x: &f32| (x.clamp(0.0, 1.0) * 255.0).round() as u8;
    let images = pixels.chunks_exact((height * width).max(1)).map(|i| i.iter().map(byte).collect()).collect();
    Some(html::Strip { caption: s.caption.clone(), width: *width, height: *height, images })
}
