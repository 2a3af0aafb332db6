//! What the records of a study say: means over seeds, differences from the baseline.

use serde::Serialize;

use crate::train::metrics::Metrics;

use super::config::Study;
use super::record::Record;
use super::stats::{Difference, Mean, mean, paired};

/// An arm at one combination of axis points.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    pub arm: String,
    pub accuracy: Option<Mean>,
    pub precision: Option<Mean>,
    pub recall: Option<Mean>,
    pub f1: Option<Mean>,
    pub loss: Mean,
    /// Other measures by name.
    pub measures: Vec<(String, Mean)>,
    /// Of accuracy (without labels, of the loss) from the baseline's, over the seeds that both have; none for the baseline.
    pub difference: Option<Difference>,
    /// The same from each control; none for the control itself.
    pub from_controls: Vec<Option<Difference>>,
    /// Median step in milliseconds, and as a multiple of the baseline's.
    pub step_ms: f64,
    pub step_cost: f64,
    pub seconds: f64,
}

/// The arms at one combination of axis points.
#[derive(Debug, Clone, Serialize)]
pub struct Block {
    pub point: Vec<(String, String)>,
    /// Of the network before the training, over the seeds.
    pub before: Option<f64>,
    pub rows: Vec<Row>,
}

/// All of a study that is recorded.
#[derive(Debug, Clone, Serialize)]
pub struct Table {
    pub title: String,
    pub baseline: String,
    pub controls: Vec<String>,
    pub cells: usize,
    pub recorded: usize,
    pub seconds: f64,
    pub blocks: Vec<Block>,
}

fn over(records: &[&Record], f: impl Fn(&Metrics) -> Option<f64>) -> Option<Mean> {
    let all: Option<Vec<f64>> = records.iter().map(|r| f(&r.after)).collect();
    all.filter(|x| !x.is_empty()).map(|x| mean(&x))
}

fn middle(mut x: Vec<f64>) -> f64 {
    x.sort_by(f64::total_cmp);
    x.get(x.len() / 2).copied().unwrap_or(f64::NAN)
}

/// What is compared: accuracy, or the loss where there is none.
fn score(m: &Metrics) -> f64 {
    m.accuracy.unwrap_or(m.loss)
}

impl Table {
    /// `records`: those of the study's cells, as far as there are any.
    pub fn new(study: &Study, records: &[&Record]) -> Table {
        let mut blocks = Vec::new();
        for point in study.points() {
            let of = |arm: &str| -> Vec<&Record> {
                records.iter().copied().filter(|r| r.arm == arm && r.point == point).collect()
            };
            let baseline = of(&study.baseline);
            let cost = |records: &[&Record]| middle(records.iter().map(|r| r.step_ms).collect());
            let rows = study.arms().into_iter().filter_map(|arm| {
                let own = of(arm);
                let loss = over(&own, |m| Some(m.loss))?;
                let from = |other: &str| {
                    let others = of(other);
                    let pairs = own.iter().filter_map(|r| {
                        let other = others.iter().find(|o| o.seed == r.seed)?;
                        Some(score(&r.after) - score(&other.after))
                    });
                    let pairs: Vec<f64> = pairs.collect();
                    (arm != other && !pairs.is_empty()).then(|| paired(&pairs))
                };
                let named =
                    own.first().map(|r| r.measures.keys().cloned().collect::<Vec<_>>()).unwrap_or_default();
                let measures = named.into_iter().map(|name| {
                    let all: Vec<f64> = own.iter().filter_map(|r| r.measures.get(&name).copied()).collect();
                    (name, mean(&all))
                });
                Some(Row {
                    measures: measures.collect(),
                    arm: arm.to_string(),
                    accuracy: over(&own, |m| m.accuracy),
                    precision: over(&own, |m| m.precision),
                    recall: over(&own, |m| m.recall),
                    f1: over(&own, |m| m.f1),
                    loss,
                    difference: from(&study.baseline),
                    from_controls: study.controls.iter().map(|c| from(c)).collect(),
                    step_ms: cost(&own),
                    step_cost: cost(&own) / cost(&baseline),
                    seconds: own.iter().map(|r| r.seconds).sum::<f64>() / own.len() as f64,
                })
            });
            let rows: Vec<Row> = rows.collect();
            let before: Vec<f64> =
                records.iter().filter(|r| r.point == point).map(|r| score(&r.before)).collect();
            let before = (!before.is_empty()).then(|| mean(&before).mean);
            blocks.push(Block { point: point.to_vec(), before, rows });
        }
        Table {
            title: study.title.clone(),
            baseline: study.baseline.clone(),
            controls: study.controls.clone(),
            cells: study.cells.len(),
            recorded: records.len(),
            seconds: records.iter().map(|r| r.seconds).sum(),
            blocks,
        }
    }

    /// The names of the columns: those that have anything in them.
    pub fn header(&self) -> Vec<String> {
        let rows = || self.blocks.iter().flat_map(|b| &b.rows);
        let mut names: Vec<String> = vec!["".into(), "seeds".into()];
        let classifies = rows().any(|r| r.accuracy.is_some());
        names.extend(classifies.then(|| "accuracy".into()));
        names.extend(["difference".into(), "p".into()]);
        names.extend(self.controls.iter().map(|c| format!("from {c}")));
        names.extend(["precision", "recall", "F1"].iter().filter(|_| classifies).map(|n| n.to_string()));
        names.push("loss".into());
        names.extend(rows().next().iter().flat_map(|r| r.measures.iter().map(|m| m.0.clone())));
        names.push("step".into());
        names
    }

    /// The tables as Markdown, one a combination of axis points.
    pub fn markdown(&self) -> String {
        let mut out = format!("# {}\n", self.title);
        out += &format!(
            "\n{} of {} cells. Mean ± half of its 95% interval over seeds; difference: percentage points of accuracy (without \
             labels, of the loss itself) from `{}`, paired by seed, with its interval and the p of a paired t-test; step: multiple of `{}`'s time.\n",
            self.recorded, self.cells, self.baseline, self.baseline
        );
        let header = self.header();
        for block in &self.blocks {
            out += &format!("\n## {}\n\n", block.title());
            if let Some(before) = block.before {
                out += &format!("Before training: {before:.4}\n\n");
            }
            let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
            out += &line(header.clone());
            out += &line(header.iter().map(|_| "--".to_string()).collect());
            for row in &block.rows {
                let mut cells = row.cells();
                cells[0] = format!("`{}`", cells[0]);
                out += &line(cells);
            }
        }
        out
    }
}

impl Block {
    /// `labels 100, noise 20%`.
    pub fn title(&self) -> String {
        let parts: Vec<String> = self.point.iter().map(|(axis, point)| format!("{axis} {point}")).collect();
        if parts.is_empty() { "All arms".into() } else { parts.join(", ") }
    }
}

/// `0.7312 ± 0.0040`.
fn shown(m: Option<&Mean>) -> String {
    match m {
        Some(Mean { mean, interval: Some(i), .. }) => format!("{mean:.4} ± {i:.4}"),
        Some(m) => format!("{:.4}", m.mean),
        None => "–".into(),
    }
}

impl Row {
    /// What stands under [`Table::header`].
    pub fn cells(&self) -> Vec<String> {
        // Points of accuracy; where there is none, the loss itself.
        let (factor, digits) = if self.accuracy.is_some() { (100.0, 2) } else { (1.0, 4) };
        let difference = |d: Option<&Difference>| match d.map(|d| (d.mean.mean * factor, d.mean.interval)) {
            Some((x, Some(i))) => format!("{x:+.digits$} ± {:.digits$}", i * factor),
            Some((x, None)) => format!("{x:+.digits$}"),
            None => "–".into(),
        };
        let d = self.difference.as_ref();
        let mut cells = vec![self.arm.clone(), self.loss.n.to_string()];
        cells.extend(self.accuracy.as_ref().map(|a| shown(Some(a))));
        cells.push(difference(d));
        cells.push(d.and_then(|d| d.p).map_or("–".into(), |p| format!("{p:.3}")));
        cells.extend(self.from_controls.iter().map(|d| difference(d.as_ref())));
        if self.accuracy.is_some() {
            cells.extend([&self.precision, &self.recall, &self.f1].map(|m| shown(m.as_ref())));
        }
        cells.push(shown(Some(&self.loss)));
        cells.extend(self.measures.iter().map(|m| shown(Some(&m.1))));
        cells.push(format!("{:.2}×", self.step_cost));
        cells
    }
}
