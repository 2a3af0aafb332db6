//! Conditions on a finetune's result: `accuracy>=0.9`, `gain>0`, several joined by commas.

use crate::error::{Error, Result};
use crate::train::metrics::Metrics;

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

const METRICS: &[&str] = &["loss", "accuracy", "precision", "recall", "f1", "gain"];

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
            if !METRICS.contains(&metric.as_str()) || !bound.is_finite() {
                return Err(bad(part));
            }
            Ok(Condition { text: part.trim().to_string(), metric, compare, bound })
        };
        text.split(',').map(condition).collect::<Result<_>>().map(Require)
    }

    /// The conditions that do not hold, with the value that was measured.
    pub fn unmet(&self, before: &Metrics, after: &Metrics) -> Result<Vec<String>> {
        let mut unmet = Vec::new();
        for c in &self.0 {
            let value = match c.metric.as_str() {
                "loss" => Some(after.loss),
                "accuracy" => after.accuracy,
                "precision" => after.precision,
                "recall" => after.recall,
                "f1" => after.f1,
                _ => match (before.accuracy, after.accuracy) {
                    (Some(b), Some(a)) => Some(a - b),
                    _ => Some(before.loss - after.loss),
                },
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
            if !holds {
                unmet.push(format!("{} (measured {value:.4})", c.text));
            }
        }
        Ok(unmet)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_are_parsed_and_judged() {
        let r = Require::parse("accuracy>=0.9, gain>0").unwrap();
        let m = |a: f64| Metrics { accuracy: Some(a), ..Metrics::default() };
        assert!(r.unmet(&m(0.5), &m(0.95)).unwrap().is_empty());
        let unmet = r.unmet(&m(0.9), &m(0.85)).unwrap();
        assert_eq!(unmet.len(), 2);
        assert!(unmet[0].contains("0.85"));
        assert!(Require::parse("beauty>1").is_err());
        assert!(Require::parse("accuracy").is_err());
        assert!(Require::parse("accuracy>=x").is_err());
    }
}
