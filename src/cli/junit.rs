//! `--junit FILE.xml`: what was decided, as test cases that CI systems show.

use std::fmt::Write;
use std::path::Path;

use crate::cli::html::escape;
use crate::error::Result;
use crate::finetune::Judged;
use crate::train::guard::Verdict;

/// How a case ended, with a line for people.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    Passed(String),
    Failed(String),
    Skipped(String),
    /// The run broke off.
    Broken(String),
}

/// A test case by its name.
pub type Case = (String, Outcome);

/// The guard's case on held-out samples.
pub fn guard(verdict: Option<&Verdict>, on: bool) -> Case {
    let text = |v: &Verdict| {
        let g = v.gain;
        format!(
            "gain {:+.4}, 95% interval {:+.4} to {:+.4}; loss falls by {:.4}",
            g.value, g.low, g.high, v.loss_fall
        )
    };
    let outcome = match verdict {
        None => Outcome::Skipped("nothing was held out".into()),
        Some(v) if !on => Outcome::Skipped(format!("the guard is off; {}", text(v))),
        Some(v) if v.better => Outcome::Passed(text(v)),
        Some(v) => Outcome::Failed(format!("not better by more than noise: {}", text(v))),
    };
    ("guard: better on held-out samples".into(), outcome)
}

/// A case for each condition of `--require`.
pub fn requirements(judged: &[Judged]) -> impl Iterator<Item = Case> + '_ {
    judged.iter().map(|j| {
        let text = format!("measured {:.4}", j.measured);
        let outcome = if j.holds { Outcome::Passed(text) } else { Outcome::Failed(text) };
        (format!("require: {}", j.condition), outcome)
    })
}

/// The case of the second opinion.
pub fn verified(verified: &str) -> Case {
    let outcome = match verified {
        "agrees" => Outcome::Passed("tract computes the same from the new file".into()),
        other => Outcome::Skipped(other.into()),
    };
    ("verified: tract agrees with the new file".into(), outcome)
}

/// Writes the cases of one command.
pub fn write(path: &Path, command: &str, seconds: f64, cases: &[Case]) -> Result<()> {
    crate::atomic::write_bytes(path, document(command, seconds, cases).as_bytes())
}

fn document(command: &str, seconds: f64, cases: &[Case]) -> String {
    let count = |f: fn(&Outcome) -> bool| cases.iter().filter(|c| f(&c.1)).count();
    let (failures, errors, skipped) = (
        count(|o| matches!(o, Outcome::Failed(_))),
        count(|o| matches!(o, Outcome::Broken(_))),
        count(|o| matches!(o, Outcome::Skipped(_))),
    );
    let totals = format!(
        "tests=\"{}\" failures=\"{failures}\" errors=\"{errors}\" skipped=\"{skipped}\" time=\"{seconds:.3}\"",
        cases.len()
    );
    let mut out = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    let command = escaped(command);
    // Writing to a string does not fail.
    let _ = writeln!(out, "<testsuites {totals}>");
    let _ = writeln!(out, "  <testsuite name=\"{command}\" {totals}>");
    for (name, outcome) in cases {
        let _ = writeln!(out, "    <testcase classname=\"{command}\" name=\"{}\" time=\"0\">", escaped(name));
        let _ = match outcome {
            Outcome::Passed(text) => writeln!(out, "      <system-out>{}</system-out>", escaped(text)),
            Outcome::Failed(text) => writeln!(out, "      <failure message=\"{}\"/>", escaped(text)),
            Outcome::Skipped(text) => writeln!(out, "      <skipped message=\"{}\"/>", escaped(text)),
            Outcome::Broken(text) => writeln!(out, "      <error message=\"{}\"/>", escaped(text)),
        };
        let _ = writeln!(out, "    </testcase>");
    }
    out + "  </testsuite>\n</testsuites>\n"
}

/// Text for an attribute or an element; an attribute's line breaks would be read as spaces.
fn escaped(text: &str) -> String {
    escape(text).replace('\n', "&#10;").replace('\t', "&#9;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_escapes() {
        let cases = vec![
            ("a<b & \"c\"".to_string(), Outcome::Failed("line 1\nline 2\u{1}".into())),
            ("d".into(), Outcome::Passed("x > 1".into())),
            ("e".into(), Outcome::Skipped("why".into())),
            ("f".into(), Outcome::Broken("it's".into())),
        ];
        let xml = document("finetune", 1.5, &cases);
        assert!(
            xml.contains("tests=\"4\" failures=\"1\" errors=\"1\" skipped=\"1\" time=\"1.500\""),
            "{xml}"
        );
        assert!(xml.contains("name=\"a&lt;b &amp; &quot;c&quot;\""), "{xml}");
        assert!(xml.contains("message=\"line 1&#10;line 2\u{fffd}\""), "{xml}");
        assert!(xml.contains("it&#39;s") && xml.contains("x &gt; 1"), "{xml}");
        assert_eq!(xml.matches("<testcase").count(), xml.matches("</testcase>").count());
    }
}
