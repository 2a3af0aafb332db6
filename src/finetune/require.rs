//! Conditions on a result: `accuracy>=0.9`, `gain.low>0`, `recall.boot>=0.8`, several joined by commas.

use serde::Serialize;

use crate::error::{Error, Result};
use crate::train::fit::Evaluated;
use crate::train::guard::Verdict;

/// Conditions that must all hold.
#[derive(Debug, Clone, PartialEq)]
pub struct Require(Vec<Condition>);

#[derive(Debug, Clone, PartialEq)]
struct Condition {
    text: String,
    metric: String,
    compare: Compare,
    bound: f64,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Compare {
    AtLeast,
    AtMost,
    Above,
    Below,
}

/// A condition and what was measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Judged {
    pub condition: String,
    pub measured: f64,
    pub holds: bool,
}

const METRICS: &[&str] =
    &["loss", "accuracy", "precision", "recall", "f1", "gain", "gain.low", "gain.high", "recall.CLASS"];

/// What stands before the class of a per-class condition.
const RECALL: &str = "recall.";

impl Require {
    pub fn parse(text: &str) -> Result<Self> {
        let bad = |part: &str| {
            Error::Config(format!(
                "--require '{part}': takes METRIC>=NUMBER (or >, <=, <) with METRIC one of {}",
                METRICS.join(", ")
            ))
        };
        let condition = |part: &str| {
            let operators = [
                (">=", Compare::AtLeast),
                ("<=", Compare::AtMost),
                (">", Compare::Above),
                ("<", Compare::Below),
            ];
            let (at, sign, compare) = operators
                .iter()
                .find_map(|(s, c)| part.find(s).map(|i| (i, *s, *c)))
                .ok_or_else(|| bad(part))?;
            let metric = part[..at].trim().to_string();
            let bound: f64 = part[at + sign.len()..].trim().parse().map_err(|_| bad(part))?;
            let known = METRICS.contains(&metric.as_str())
                || metric.strip_prefix(RECALL).is_some_and(|class| !class.is_empty());
            if !known || !bound.is_finite() {
                return Err(bad(part));
            }
            Ok(Condition { text: part.trim().to_string(), metric, compare, bound })
        };
        text.split(',').map(condition).collect::<Result<_>>().map(Require)
    }

    /// Each condition with the value that was measured. `classes` are the names of classes, where they have any.
    ///
    /// Fails on a metric that the data do not give.
    pub fn judge(
        &self,
        before: &Evaluated,
        after: &Evaluated,
        verdict: &Verdict,
        classes: &[String],
    ) -> Result<Vec<Judged>> {
        let metrics = &after.metrics;
        let one = |c: &Condition| {
            let value = match c.metric.as_str() {
                "loss" => Some(metrics.loss),
                "accuracy" => metrics.accuracy,
                "precision" => metrics.precision,
                "recall" => metrics.recall,
                "f1" => metrics.f1,
                "gain" => match (before.metrics.accuracy, metrics.accuracy) {
                    (Some(b), Some(a)) => Some(a - b),
                    _ => Some(before.metrics.loss - metrics.loss),
                },
                "gain.low" => Some(verdict.gain.low),
                "gain.high" => Some(verdict.gain.high),
                other => Some(recall(other.strip_prefix(RECALL).unwrap_or(other), after, classes, &c.text)?),
            };
            let Some(value) = value else {
                return Err(Error::Config(format!(
                    "--require {}: there is no such metric without labels",
                    c.text
                )));
            };
            let holds = match c.compare {
                Compare::AtLeast => value >= c.bound,
                Compare::AtMost => value <= c.bound,
                Compare::Above => value > c.bound,
                Compare::Below => value < c.bound,
            };
            Ok(Judged { condition: c.text.clone(), measured: value, holds })
        };
        self.0.iter().map(one).collect()
    }
}

/// Those that do not hold, for people.
pub fn unmet(judged: &[Judged]) -> Vec<String> {
    let not = judged.iter().filter(|j| !j.holds);
    not.map(|j| format!("{} (measured {:.4})", j.condition, j.measured)).collect()
}

/// The share of a class's samples that are found, the class given by name or number.
fn recall(class: &str, after: &Evaluated, names: &[String], text: &str) -> Result<f64> {
    let confusion = &after.confusion;
    let bad = |what: String| Error::Config(format!("--require {text}: {what}"));
    if confusion.classes == 0 {
        return Err(bad("there is no such metric without labels".into()));
    }
    let named = names.iter().position(|n| n == class).or_else(|| class.parse().ok());
    let Some(c) = named.filter(|c| *c < confusion.classes) else {
        let known = match names.is_empty() {
            true => format!("0 to {}", confusion.classes - 1),
            false => names.join(", "),
        };
        return Err(bad(format!("no such class (there are {known})")));
    };
    let row = &confusion.counts[c * confusion.classes..(c + 1) * confusion.classes];
    match row.iter().sum::<u64>() {
        0 => Err(bad("no held-out sample is of this class".into())),
        of => Ok(row[c] as f64 / of as f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::guard::compare;
    use crate::train::metrics::{Confusion, Metrics};

    fn evaluated(hits: &[f64]) -> Evaluated {
        let accuracy = hits.iter().sum::<f64>() / hits.len() as f64;
        Evaluated {
            metrics: Metrics { accuracy: Some(accuracy), ..Metrics::default() },
            confusion: Confusion { classes: 2, counts: vec![3, 1, 0, 0] },
            hits: hits.to_vec(),
            ..Evaluated::default()
        }
    }

    fn judge(text: &str, before: &Evaluated, after: &Evaluated) -> Result<Vec<Judged>> {
        let names = ["cat".to_string(), "dog".to_string()];
        Require::parse(text)?.judge(before, after, &compare(before, after), &names)
    }

    #[test]
    fn conditions_are_parsed_and_judged() {
        let (half, most) = (evaluated(&[1.0, 0.0]), evaluated(&[1.0; 20]));
        assert!(judge("accuracy>=0.9, gain>0", &half, &most).unwrap().iter().all(|j| j.holds));
        let judged = judge("accuracy>=0.9, gain>0", &most, &evaluated(&[1.0, 1.0, 1.0, 0.0])).unwrap();
        let unmet = unmet(&judged);
        assert_eq!(unmet.len(), 2);
        assert!(unmet[0].contains("0.75"));
        assert!(Require::parse("beauty>1").is_err());
        assert!(Require::parse("accuracy").is_err());
        assert!(Require::parse("accuracy>=x").is_err());
        assert!(Require::parse("recall.>=1").is_err());
    }

    #[test]
    fn intervals_and_classes() {
        let (none, all) = (evaluated(&[0.0; 30]), evaluated(&[1.0; 30]));
        let holds = |text: &str| judge(text, &none, &all).unwrap()[0].holds;
        assert!(holds("gain.low>0.5") && !holds("gain.low>0.99") && holds("gain.high<=1"));
        assert!(holds("recall.cat>=0.75") && holds("recall.0<0.76") && !holds("recall.cat>0.75"));
        let why = |text: &str| judge(text, &none, &all).unwrap_err().to_string();
        assert!(why("recall.cow>0").contains("cat, dog"));
        assert!(why("recall.dog>0").contains("no held-out sample"));
        // One lucky sample of two is no gain above noise.
        let judged = judge("gain.low>0", &evaluated(&[1.0, 0.0]), &evaluated(&[1.0, 1.0])).unwrap();
        assert!(!judged[0].holds, "{judged:?}");
    }
}
