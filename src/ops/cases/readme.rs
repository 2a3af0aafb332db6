//! The README's table of operators, written from the operator table and the cases.

use std::collections::BTreeMap;
use std::fmt::Write;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::{Case, Operand, all, build};
use crate::graph::{ValueId, grad};
use crate::ops::table::{NEWEST, Row, table};

const START: &str = "<!-- operators: written by the test `readme`, RETUNE_README=write -->\n";
/// Computed when the plan is made.
const AT_PLAN_TIME: &[&str] = &[
    "BlackmanWindow",
    "HammingWindow",
    "HannWindow",
    "MelWeightMatrix",
    "NonMaxSuppression",
    "NonZero",
    "Unique",
];

const END: &str = "<!-- operators end -->";

impl Case {
    /// Is a gradient of it checked against differences?
    pub(super) fn checks_a_gradient(&self) -> bool {
        !self.forward_only && (0..self.operands.len()).any(|i| self.differentiated(i))
    }

    fn is_of(&self, row: &Row) -> bool {
        self.op_type == row.op_type && self.domain == row.domain
    }
}

/// Does it have a gradient although no case checks it? Floats that the case holds fixed count, one at a time: some have
/// to be known before the run.
fn has_a_gradient(case: &Case) -> bool {
    let fixed = |i: usize| match &case.operands[i] {
        Operand::Fixed(t) if t.dtype().is_float() => Some((t.dims().to_vec(), t.to_f64())),
        _ => None,
    };
    let freed = (0..case.operands.len()).filter_map(|i| {
        let (dims, data) = fixed(i)?;
        let mut freed = case.clone();
        freed.operands[i] = Operand::Given { dims, data };
        Some(freed)
    });
    std::iter::once(case.clone()).chain(freed).any(|case| {
        let differentiable = || {
            let mut rng = ChaCha8Rng::seed_from_u64(7);
            let values = case.values(&mut rng);
            let mut built = build(&case, &values, &mut Vec::new(), &mut rng);
            let wrt: Vec<ValueId> = (0..values.len())
                .filter(|&i| case.differentiated(i))
                .filter_map(|i| built.operands[i])
                .collect();
            let losses = built.losses.clone();
            losses.into_iter().any(|loss| grad(&mut built.graph, loss, &wrt).is_ok_and(|g| !g.is_empty()))
        };
        // What cannot be built with such an operand does not take it.
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(differentiable)).unwrap_or(false)
    })
}

#[test]
fn every_gradient_has_a_case() {
    let cases = all();
    let mut missing = Vec::new();
    for row in table() {
        let own = || cases.iter().filter(|c| c.is_of(row));
        if !own().any(Case::checks_a_gradient) && own().any(has_a_gradient) {
            missing.push(row.op_type);
        }
    }
    assert!(missing.is_empty(), "operators with a gradient that no case checks: {missing:?}");
    // Of about 190 rows: the test means something.
    let checked = table().filter(|r| cases.iter().any(|c| c.is_of(r) && c.checks_a_gradient())).count();
    assert!(checked >= 130, "{checked} operators have a checked gradient");
}

fn lines() -> String {
    let cases = all();
    let mut sorted = BTreeMap::new();
    for row in table() {
        let own = || cases.iter().filter(|c| c.is_of(row));
        let forward = match own().next().map(Case::make) {
            Some(op) if op.is_composite() => "made of others",
            _ if AT_PLAN_TIME.contains(&row.op_type) => "values known when planned",
            _ => "kernel",
        };
        let gradient = match row.op_type {
            "QuantizeLinear" => "straight through, before DequantizeLinear",
            "DequantizeLinear" => "straight through, after QuantizeLinear; of the scale",
            "DynamicQuantizeLinear" => "of the scale",
            _ if own().any(Case::checks_a_gradient) => "yes",
            _ => "–",
        };
        let (first, last) = row.opsets;
        let name = match row.domain {
            "" => row.op_type.to_string(),
            domain => format!("{domain}.{}", row.op_type),
        };
        let opsets = match last {
            NEWEST if row.domain.is_empty() => format!("{first} on"),
            _ if first == last => format!("{first}"),
            _ => format!("{first}–{last}"),
        };
        sorted.insert((row.domain, row.op_type), format!("| {name} | {opsets} | {forward} | {gradient} |"));
    }
    let mut text = String::from("| operator | opsets | forward | gradient |\n|--|--|--|--|\n");
    sorted.values().for_each(|line| writeln!(text, "{line}").unwrap());
    text
}

#[test]
fn readme() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(START).expect("README.md has the start of the operator table");
    let (table, after) = rest.split_once(END).expect("README.md has the end of the operator table");
    let wanted = lines();
    if table == wanted {
        return;
    }
    if std::env::var("RETUNE_README").is_ok_and(|v| v == "write") {
        std::fs::write(&path, format!("{before}{START}{wanted}{END}{after}")).unwrap();
        return;
    }
    let line = wanted.lines().find(|l| !table.contains(l)).unwrap_or("(a line too many)");
    panic!(
        "README.md's operator table is out of date, from '{line}' on. To write it anew: \
         RETUNE_README=write cargo test --release --lib readme"
    );
}
