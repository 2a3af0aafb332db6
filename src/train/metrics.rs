//! What a run is judged by.

use serde::{Deserialize, Serialize};

use crate::tensor::Tensor;

/// Loss and metrics over a data set.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    pub loss: f64,
    /// Share of samples whose largest logit is at the label; absent without labels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
    /// Unweighted means over classes that occur.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub precision: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recall: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub f1: Option<f64>,
    pub samples: usize,
}

/// Counts per (label, prediction).
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Confusion {
    pub classes: usize,
    /// Row: label, column: prediction.
    pub counts: Vec<u64>,
}

/// The class of `classes` whose logit, as `at` gives it, is the largest; the first of equals.
pub fn predicted(classes: usize, at: impl Fn(usize) -> f64) -> usize {
    (1..classes).fold(0, |best, c| if at(c) > at(best) { c } else { best })
}

/// The labels of a batch: class indices, or the most probable class of each row of probabilities.
pub fn labels_of(target: &Tensor) -> Option<Vec<i64>> {
    if let Ok(labels) = target.get::<i64>() {
        return Some(labels.to_vec());
    }
    let ([_, classes], Ok(rows)) = (target.dims(), target.get::<f32>()) else { return None };
    let best = |row: &[f32]| predicted(row.len(), |c| f64::from(row[c])) as i64;
    Some(rows.chunks_exact((*classes).max(1)).map(best).collect())
}

/// Gathers metrics batch by batch.
#[derive(Debug, Clone, Default)]
pub struct Meter {
    loss: f64,
    /// Of `loss`: samples, each by the share of its labels that count.
    weight: f64,
    samples: usize,
    confusion: Confusion,
    labelled: bool,
}

impl Meter {
    /// Adds a batch: its mean loss, and logits `[N, C, …]` with labels `[N, …]` where there are any.
    pub fn add(&mut self, loss: f64, samples: usize, logits: Option<(&[f64], &[usize], &[i64])>) {
        let counted = logits.map_or(1.0, |(_, _, labels)| {
            let counted = labels.iter().filter(|l| **l >= 0).count();
            if labels.is_empty() { 1.0 } else { counted as f64 / labels.len() as f64 }
        });
        let weight = samples as f64 * counted;
        self.loss += loss * weight;
        self.weight += weight;
        self.samples += samples;
        let Some((logits, dims, labels)) = logits else { return };
        let Some(&classes) = dims.get(1) else { return };
        self.labelled = true;
        if self.confusion.classes < classes {
            self.confusion = Confusion { classes, counts: vec![0; classes * classes] };
        }
        let inner: usize = dims[2..].iter().product();
        for (i, &label) in labels.iter().enumerate() {
            let (n, p) = (i / inner.max(1), i % inner.max(1));
            let at = |c: usize| logits[(n * classes + c) * inner + p];
            let best = predicted(classes, at);
            if let Ok(label) = usize::try_from(label)
                && label < classes
            {
                self.confusion.counts[label * classes + best] += 1;
            }
        }
    }

    pub fn confusion(&self) -> &Confusion {
        &self.confusion
    }

    pub fn metrics(&self) -> Metrics {
        let loss = if self.weight > 0.0 { self.loss / self.weight } else { 0.0 };
        Metrics::of(loss, self.samples, self.labelled.then_some(&self.confusion))
    }
}

impl Confusion {
    /// Adds the counts of other samples.
    pub fn add(&mut self, other: &Confusion) {
        if self.classes == 0 {
            *self = other.clone();
        } else if self.classes == other.classes {
            self.counts.iter_mut().zip(&other.counts).for_each(|(a, b)| *a += b);
        }
    }
}

impl Metrics {
    /// Of a mean loss over so many samples and, with labels, their confusion.
    pub fn of(loss: f64, samples: usize, confusion: Option<&Confusion>) -> Metrics {
        let mut m = Metrics { loss, samples, ..Metrics::default() };
        let Some(confusion) = confusion else { return m };
        let k = confusion.classes;
        let count = |r: usize, c: usize| confusion.counts[r * k + c] as f64;
        let total: f64 = confusion.counts.iter().map(|&c| c as f64).sum();
        let hits: f64 = (0..k).map(|c| count(c, c)).sum();
        let (mut precision, mut recall, mut f1, mut seen) = (0.0, 0.0, 0.0, 0.0);
        for c in 0..k {
            let labelled: f64 = (0..k).map(|p| count(c, p)).sum();
            let predicted: f64 = (0..k).map(|l| count(l, c)).sum();
            if labelled + predicted == 0.0 {
                continue;
            }
            seen += 1.0;
            let p = if predicted > 0.0 { count(c, c) / predicted } else { 0.0 };
            let r = if labelled > 0.0 { count(c, c) / labelled } else { 0.0 };
            precision += p;
            recall += r;
            f1 += if p + r > 0.0 { 2.0 * p * r / (p + r) } else { 0.0 };
        }
        let seen = f64::max(seen, 1.0);
        m.accuracy = Some(hits / total.max(1.0));
        m.precision = Some(precision / seen);
        m.recall = Some(recall / seen);
        m.f1 = Some(f1 / seen);
        m
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn macro_averages_of_a_small_confusion() {
        let mut m = Meter::default();
        // Labels 0 0 1, predictions 0 1 1.
        let logits = [1.0, 0.0, 0.0, 1.0, 0.0, 1.0];
        m.add(0.5, 3, Some((&logits, &[3, 2], &[0, 0, 1])));
        let r = m.metrics();
        assert_eq!(r.samples, 3);
        assert!((r.accuracy.unwrap() - 2.0 / 3.0).abs() < 1e-12);
        assert!((r.precision.unwrap() - 0.75).abs() < 1e-12);
        assert!((r.recall.unwrap() - 0.75).abs() < 1e-12);
        assert!((r.f1.unwrap() - 2.0 / 3.0).abs() < 1e-12);
        assert!((r.loss - 0.5).abs() < 1e-12);
    }

    #[test]
    fn labels_that_do_not_count_weigh_nothing() {
        let mut m = Meter::default();
        // [2, 2, 2]: classes on axis 1; one label of four is padding.
        let logits = [0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 0.0, 0.0];
        m.add(4.0, 2, Some((&logits, &[2, 2, 2], &[1, 0, 0, -100])));
        m.add(8.0, 2, Some((&logits, &[2, 2, 2], &[1, 1, 0, 0])));
        let r = m.metrics();
        assert_eq!((r.samples, r.accuracy), (4, Some(6.0 / 7.0)));
        assert!((r.loss - (4.0 * 1.5 + 8.0 * 2.0) / 3.5).abs() < 1e-12);
    }
}
