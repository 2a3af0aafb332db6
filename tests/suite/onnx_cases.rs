//! ONNX's own backend test cases: Debian's libonnx-testdata, and those that the onnx package generates (both fetched).

use std::collections::BTreeMap;

use serde_json::Value;

use crate::common::{fetched, json, shipped, text};

/// What cases of other kinds than floating-point, integer and boolean tensors lack; they are listed, not counted.
const OTHER_KINDS: &[&str] = &[
    // Operators on sequences, optionals, strings and encoded images.
    "ConcatFromSequence",
    "ImageDecoder",
    "Optional",
    "OptionalGetElement",
    "OptionalHasElement",
    "RegexFullMatch",
    "SequenceAt",
    "SequenceConstruct",
    "SequenceEmpty",
    "SequenceErase",
    "SequenceInsert",
    "SequenceLength",
    "SequenceMap",
    "SplitToSequence",
    "StringConcat",
    "StringNormalizer",
    "StringSplit",
    // Inputs that are no tensors, and element types.
    "complex128",
    "complex64",
    "map",
    "optional",
    "sequence",
    "string",
    // Expected values that another random generator drew.
    "random numbers",
];

/// Shares of the cases of our kind that pass at least; what is missing is printed.
const NODE: f64 = 0.99;
const GENERATED: f64 = 0.99;
const PYTORCH: f64 = 1.0;

fn is_other_kind(lacks: &str) -> bool {
    OTHER_KINDS.contains(&lacks) || lacks.starts_with("ai.onnx.ml.") || lacks.starts_with("ai.onnx.preview.")
}

/// Runs a folder of cases: none may fail, and of those of our kind at least `least` (a share) must pass.
fn share(folder: &str, least: f64) {
    let Some(folder) = fetched(folder) else { return };
    let report = json(&["test", text(&folder), "--json"], 0);
    let cases = report["cases"].as_array().unwrap();
    let mut lacking: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    let (mut passed, mut counted, mut others) = (0, 0, Vec::new());
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let lacks: Vec<&str> =
            case["lacks"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        match case["outcome"].as_str().unwrap() {
            "passed" => passed += 1,
            _ if lacks.iter().any(|l| is_other_kind(l)) => {
                others.push(name);
                continue;
            }
            outcome => {
                assert_eq!(outcome, "unsupported", "{case}");
                lacking.entry(lacks.join(", ")).or_default().push(name);
            }
        }
        counted += 1;
    }
    let reached = passed as f64 / counted as f64;
    println!("{}: {passed} of {counted} pass ({:.2}%)", folder.display(), 100.0 * reached);
    lacking.iter().for_each(|(what, names)| println!("  lack {what}: {}", names.join(", ")));
    println!("  {} of other kinds: {}", others.len(), others.join(", "));
    assert!(reached >= least, "{reached} of the cases in {} pass, not {least}", folder.display());
}

#[test]
fn node_cases() {
    share("onnx-testdata/node", NODE);
}

#[test]
fn generated_node_cases() {
    share("onnx-node-cases", GENERATED);
}

#[test]
fn pytorch_cases() {
    share("onnx-testdata/simple", 1.0);
    share("onnx-testdata/pytorch-operator", PYTORCH);
    share("onnx-testdata/pytorch-converted", PYTORCH);
}

/// onnxruntime's own operators, against what it computed (tests/fixtures/contrib.py), and their gradients.
#[test]
fn contrib_cases() {
    let report = json(&["test", text(&shipped("tests/fixtures/contrib")), "--grad", "--json"], 0);
    let cases = report["cases"].as_array().unwrap();
    assert!(
        cases.iter().all(|c| c["outcome"] == "passed" && c["gradient"]["outcome"] == "equal"),
        "{report:#}"
    );
    assert_eq!(cases.len(), 15);
}

/// Gradients of the same cases, against differences: none is wrong, and nearly all that have one can be checked.
#[test]
fn gradients() {
    for (folder, least) in [
        ("onnx-node-cases", 1080),
        ("onnx-testdata/node", 555),
        ("onnx-testdata/simple", 6),
        ("onnx-testdata/pytorch-operator", 32),
        ("onnx-testdata/pytorch-converted", 77),
    ] {
        let Some(folder) = fetched(folder) else { continue };
        let report = json(&["test", text(&folder), "--grad", "--json"], 0);
        let counts = &report["gradients"];
        println!("{}: gradients {counts}", folder.display());
        assert_eq!(counts["wrong"], 0);
        let count = |name: &str| counts[name].as_u64().unwrap();
        assert!(count("checked") >= least && count("unchecked") * 50 <= count("checked") + 100, "{counts}");
        for case in report["cases"].as_array().unwrap() {
            if case["gradient"]["outcome"] == "unchecked" {
                println!("  not checked: {}: {}", case["name"], case["gradient"]["reason"]);
            }
        }
    }
}
