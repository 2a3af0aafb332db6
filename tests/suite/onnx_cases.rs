//! ONNX's own backend test cases (Debian's libonnx-testdata, fetched).

use crate::common::{fetched, json, text};

/// Operators that retune promises to run.
const OPERATORS: &[&str] = &[
    "Conv",
    "BatchNormalization",
    "InstanceNormalization",
    "LRN",
    "Gemm",
    "MatMul",
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Pow",
    "Min",
    "Max",
    "Sum",
    "Mean",
    "Relu",
    "LeakyRelu",
    "PRelu",
    "Elu",
    "Gelu",
    "Sigmoid",
    "Tanh",
    "HardSigmoid",
    "HardSwish",
    "Clip",
    "Erf",
    "Exp",
    "Log",
    "Sqrt",
    "Abs",
    "Neg",
    "Softmax",
    "LogSoftmax",
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "ReduceMean",
    "ReduceSum",
    "ReduceMax",
    "ReduceMin",
    "Reshape",
    "Flatten",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Concat",
    "Split",
    "Slice",
    "Pad",
    "Gather",
    "Cast",
    "Identity",
    "Constant",
    "ConstantOfShape",
    "Shape",
    "Dropout",
    "Where",
    "Expand",
    "Equal",
    "Greater",
    "Less",
    "And",
    "Or",
    "Not",
];

#[test]
fn node_cases() {
    let Some(folder) = fetched("onnx-testdata/node") else { return };
    let report = json(&["test", text(&folder), "--json"], 0);
    let summary = &report["summary"];
    println!("node: {summary}");
    assert_eq!(summary["failed"], 0);
    assert!(summary["passed"].as_u64().unwrap() >= 550, "{summary}");
    // No operator of the list is without a kernel.
    for case in report["cases"].as_array().unwrap() {
        let reason = case["reason"].as_str().unwrap_or("");
        let operator =
            reason.rsplit("operator ").next().unwrap_or("").split_whitespace().next().unwrap_or("");
        assert!(!(reason.contains("operator ") && OPERATORS.contains(&operator)), "{case}");
    }
}

#[test]
fn pytorch_cases() {
    for part in ["pytorch-operator", "pytorch-converted", "simple"] {
        let Some(folder) = fetched(&format!("onnx-testdata/{part}")) else { return };
        let report = json(&["test", text(&folder), "--json"], 0);
        println!("{part}: {}", report["summary"]);
        assert_eq!(report["summary"]["failed"], 0);
    }
}
