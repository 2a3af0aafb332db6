//! Runs ONNX backend test cases: folders with a `model.onnx` and `test_data_set_*/{input,output}_*.pb`.
//!
//! Outputs must have the expected element type and shape, integers and booleans be equal, and floats lie
//! within `atol + rtol·|expected|` of what is expected: rtol 1e-3 and atol 1e-7 as in ONNX's own runner (atol at least
//! a unit in the last place of the largest element), a few such units more for half types, which are computed in
//! float32 and rounded at the end.

mod gradients;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use prost::Message;
use serde::Serialize;
use serde::ser::{SerializeStruct, Serializer};

use crate::error::{Error, OpError, Result};
use crate::exec::{Options, Session};
use crate::import::proto::TensorProto;
use crate::import::weights::plain;
use crate::import::{Model, load};
use crate::tensor::{DType, Tensor};

pub use gradients::Checked;

/// What became of a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    Passed,
    Failed,
    /// It needs an operator or an element type that is not there; the reason names it.
    Unsupported,
}

/// One case and its outcome.
#[derive(Debug, Clone, Serialize)]
pub struct CaseResult {
    /// The folder's name.
    pub name: String,
    pub path: PathBuf,
    pub outcome: Outcome,
    /// Why it did not pass.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Of an unsupported case: the operators and element types that it lacks.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub lacks: Vec<String>,
    /// Where gradients were checked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gradient: Option<Checked>,
}

/// All cases, in the order of their paths; serialised as `{"summary": {"passed", "failed", "unsupported"}, "cases"}`.
#[derive(Debug, Clone, Default)]
pub struct Report {
    pub passed: usize,
    pub failed: usize,
    pub unsupported: usize,
    pub cases: Vec<CaseResult>,
    /// Where gradients were checked.
    pub gradients: Option<Gradients>,
}

/// How many cases have which outcome of the gradient check.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Gradients {
    /// Equal to central differences.
    pub checked: usize,
    /// An operator without a gradient, or nothing to differentiate.
    pub none: usize,
    /// No float64 form, or kinks everywhere.
    pub unchecked: usize,
    pub wrong: usize,
}

impl Report {
    /// Operators and element types that unsupported cases lack, and how many cases lack each; most first.
    pub fn lacking(&self) -> Vec<(String, usize)> {
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        self.cases.iter().flat_map(|c| &c.lacks).for_each(|l| *counts.entry(l).or_insert(0) += 1);
        let mut sorted: Vec<_> = counts.into_iter().map(|(l, n)| (l.to_string(), n)).collect();
        sorted.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
        sorted
    }
}

impl Serialize for Report {
    fn serialize<S: Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Summary {
            passed: usize,
            failed: usize,
            unsupported: usize,
        }
        let (passed, failed, unsupported) = (self.passed, self.failed, self.unsupported);
        let mut report = s.serialize_struct("Report", 4)?;
        report.serialize_field("summary", &Summary { passed, failed, unsupported })?;
        let lacking: BTreeMap<String, usize> = self.lacking().into_iter().collect();
        report.serialize_field("lacking", &lacking)?;
        if let Some(gradients) = &self.gradients {
            report.serialize_field("gradients", gradients)?;
        }
        report.serialize_field("cases", &self.cases)?;
        report.end()
    }
}

/// Why a case did not pass.
enum Miss {
    Failed(String),
    Unsupported(Lack),
}

/// What an unsupported case lacks: why, and the operators and element types.
struct Lack {
    why: String,
    names: Vec<String>,
}

fn lack(name: impl Into<String>, why: impl Into<String>) -> Miss {
    Miss::Unsupported(Lack { why: why.into(), names: vec![name.into()] })
}

type Verdict = std::result::Result<(), Miss>;

/// Runs every case found under `paths`, each searched recursively.
///
/// With `gradients`, those of the models are checked too. Fails when a path cannot be read or holds no case; a case that
/// fails is part of the report.
pub fn run(paths: &[PathBuf], gradients: bool) -> Result<Report> {
    let mut report = Report { gradients: gradients.then(Gradients::default), ..Report::default() };
    for path in paths {
        let mut folders = Vec::new();
        find(path, &mut folders)?;
        if folders.is_empty() {
            return Err(Error::file(
                path,
                "holds no test case (a folder with model.onnx and test_data_set_*)",
            ));
        }
        for folder in folders {
            let case = run_case(&folder, gradients);
            match case.outcome {
                Outcome::Passed => report.passed += 1,
                Outcome::Failed => report.failed += 1,
                Outcome::Unsupported => report.unsupported += 1,
            }
            if let Some((counts, checked)) = report.gradients.as_mut().zip(case.gradient.as_ref()) {
                match checked {
                    Checked::Equal => counts.checked += 1,
                    Checked::None(_) => counts.none += 1,
                    Checked::Unchecked(_) => counts.unchecked += 1,
                    Checked::Wrong(_) => counts.wrong += 1,
                }
            }
            report.cases.push(case);
        }
    }
    Ok(report)
}

/// Runs the case in one folder, and with `gradients` checks those. A panic counts as a failure.
pub fn run_case(folder: &Path, gradients: bool) -> CaseResult {
    let verdict = caught(|| case(folder)).unwrap_or_else(|what| Err(Miss::Failed(what)));
    let gradient =
        (gradients && verdict.is_ok()).then(|| caught(|| gradient(folder)).unwrap_or_else(Checked::Wrong));
    let (outcome, reason, lacks) = match verdict {
        Ok(()) => (Outcome::Passed, None, Vec::new()),
        Err(Miss::Failed(why)) => (Outcome::Failed, Some(why), Vec::new()),
        Err(Miss::Unsupported(lack)) => (Outcome::Unsupported, Some(lack.why), lack.names),
    };
    let name = folder.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    CaseResult { name, path: folder.to_path_buf(), outcome, reason, lacks, gradient }
}

/// Runs `f`; what it panicked with is the error.
fn caught<T>(f: impl FnOnce() -> T) -> std::result::Result<T, String> {
    catch_unwind(AssertUnwindSafe(f)).map_err(|panic| {
        let what = panic.downcast_ref::<String>().map(String::as_str);
        format!("panicked: {}", what.or(panic.downcast_ref::<&str>().copied()).unwrap_or(""))
    })
}

/// The entries of a folder, sorted.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let read = std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))?;
    let mut paths = Vec::new();
    for entry in read {
        paths.push(entry.map_err(|e| Error::io(folder, e))?.path());
    }
    paths.sort();
    Ok(paths)
}

fn file_name(path: &Path) -> &str {
    path.file_name().and_then(|n| n.to_str()).unwrap_or("")
}

fn is_data_set(path: &Path) -> bool {
    file_name(path).starts_with("test_data_set_") && path.is_dir()
}

/// Folders below `path` (or `path` itself) that are test cases. Links are not followed below `path`.
fn find(path: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    let entries = entries(path)?;
    if path.join("model.onnx").is_file() && entries.iter().any(|e| is_data_set(e)) {
        found.push(path.to_path_buf());
        return Ok(());
    }
    for e in entries {
        if !e.is_symlink() && e.is_dir() {
            find(&e, found)?;
        }
    }
    Ok(())
}

fn failed(what: impl ToString) -> Miss {
    Miss::Failed(what.to_string())
}

/// An error of the library as a verdict: an operator's refusal is "unsupported", all else is a failure.
fn miss(e: Error) -> Miss {
    let why = e.to_string();
    let op = |node: &str| node.split_whitespace().next().unwrap_or("").to_string();
    match &e {
        Error::Op { source: OpError::Unsupported(_) | OpError::Type(_), node } => lack(op(node), why),
        Error::Op { source: OpError::NeedsValue(_), node } => {
            lack(op(node), format!("a shape that depends on computed values: {why}"))
        }
        Error::Blocked(list) => {
            Miss::Unsupported(Lack { why, names: list.iter().map(|b| b.op_type.clone()).collect() })
        }
        _ => Miss::Failed(why),
    }
}

fn case(folder: &Path) -> Verdict {
    let model = Arc::new(load(folder.join("model.onnx")).map_err(miss)?);
    if !model.blockers.is_empty() {
        let tell = |b: &crate::error::Blocker| {
            let what = b.why.strip_prefix("not supported: ").unwrap_or(&b.why);
            if what.contains(&b.op_type) { what.to_string() } else { format!("{}: {what}", b.op_type) }
        };
        let unique = |mut v: Vec<String>| {
            v.sort();
            v.dedup();
            v
        };
        let why = unique(model.blockers.iter().map(tell).collect()).join("; ");
        let name = |b: &crate::error::Blocker| match b.why.strip_prefix("of type ") {
            Some(kind) => kind.split(':').next().unwrap_or(kind).to_string(),
            None if b.why.ends_with("to string") => "string".into(),
            None => b.op_type.clone(),
        };
        let names = unique(model.blockers.iter().map(name).collect());
        return Err(Miss::Unsupported(Lack { why, names }));
    }
    for set in data_sets(folder)? {
        let tell = |what: String| format!("{}: {what}", file_name(&set));
        data_set(&model, &set).map_err(|m| match m {
            Miss::Failed(what) => Miss::Failed(tell(what)),
            Miss::Unsupported(lack) => Miss::Unsupported(Lack { why: tell(lack.why), ..lack }),
        })?;
    }
    Ok(())
}

fn data_sets(folder: &Path) -> std::result::Result<Vec<PathBuf>, Miss> {
    Ok(entries(folder).map_err(failed)?.into_iter().filter(|e| is_data_set(e)).collect())
}

/// Checks the gradients of a case on its first data set.
fn gradient(folder: &Path) -> Checked {
    let fed = || {
        let model = Arc::new(load(folder.join("model.onnx")).map_err(miss)?);
        let sets = data_sets(folder)?;
        let set = sets.first().ok_or_else(|| failed("no data"))?;
        let (model, feeds) = feeds(&model, tensors(set, "input_")?);
        let fed: Result<Vec<_>> = crate::exec::bind(&model.graph, &feeds);
        Ok((model, fed.map_err(miss)?))
    };
    match fed() {
        Ok((model, fed)) => gradients::check(&model, &fed),
        Err(Miss::Failed(why) | Miss::Unsupported(Lack { why, .. })) => Checked::Unchecked(why),
    }
}

/// `prefix_0.pb`, `prefix_1.pb`, … in numeric order.
fn tensors(set: &Path, prefix: &str) -> std::result::Result<Vec<Tensor>, Miss> {
    let mut files: Vec<(usize, PathBuf)> = entries(set)
        .map_err(failed)?
        .into_iter()
        .filter_map(|p| {
            let number = file_name(&p).strip_prefix(prefix)?.strip_suffix(".pb")?.parse().ok()?;
            Some((number, p))
        })
        .collect();
    files.sort();
    files.iter().map(|(_, path)| tensor(path)).collect()
}

/// Reads a tensor from a file that holds one `TensorProto`, as the test cases do.
pub fn read_tensor(path: &Path) -> Result<Tensor> {
    tensor(path).map_err(|miss| match miss {
        Miss::Failed(why) | Miss::Unsupported(Lack { why, .. }) => Error::file(path, why),
    })
}

fn tensor(path: &Path) -> std::result::Result<Tensor, Miss> {
    let bytes = std::fs::read(path).map_err(|e| failed(Error::io(path, e)))?;
    let damaged = |e: &dyn std::fmt::Display| failed(format!("{}: {e}", file_name(path)));
    let proto = TensorProto::decode(Bytes::from(bytes)).map_err(|e| damaged(&e))?;
    let dtype = DType::from_onnx(proto.data_type).ok_or_else(|| {
        let name = type_name(proto.data_type);
        lack(name.clone(), format!("element type {name}"))
    })?;
    plain(&proto, dtype).map_err(|e| damaged(&e))
}

/// The names of the element types that are not computed with.
fn type_name(code: i32) -> String {
    let name = match code {
        8 => "string",
        14 => "complex64",
        15 => "complex128",
        _ => return code.to_string(),
    };
    name.to_string()
}

/// The inputs of a data set by name, and the model with the shapes that they have.
fn feeds(model: &Arc<Model>, inputs: Vec<Tensor>) -> (Arc<Model>, Vec<(String, Tensor)>) {
    let graph = &model.graph;
    let mut shaped = model.clone();
    let mut feeds = Vec::new();
    for (&v, tensor) in graph.inputs.iter().zip(inputs) {
        let value = graph.value(v);
        let declared = value.declared.as_ref();
        // Some cases are fed with another shape than their model declares; the data count.
        let other = declared.and_then(|d| d.dims.as_ref()).is_some_and(|d| d.len() != tensor.dims().len());
        if other && let Some(d) = &mut Arc::make_mut(&mut shaped).graph.value_mut(v).declared {
            d.dims = None;
        }
        feeds.push((value.name.clone(), as_declared(tensor, declared.map(|d| d.dtype))));
    }
    (shaped, feeds)
}

fn data_set(model: &Arc<Model>, set: &Path) -> Verdict {
    let graph = &model.graph;
    let inputs = tensors(set, "input_")?;
    let expected = tensors(set, "output_")?;
    if inputs.len() > graph.inputs.len() || expected.len() > graph.outputs.len() {
        return Err(failed(format!(
            "{} inputs and {} outputs in the data, {} and {} in the model",
            inputs.len(),
            expected.len(),
            graph.inputs.len(),
            graph.outputs.len()
        )));
    }
    let (model, feeds) = feeds(model, inputs);
    let mut session = Session::new(model.clone(), Options::default()).map_err(miss)?;
    let outputs = session.forward(&feeds).map_err(miss)?;
    let random = graph.nodes.iter().find(|n| !n.op.is_pure());
    let elsewhere: Vec<String> = graph.nodes.iter().filter_map(|n| n.op.foreign_type()).collect();
    for ((name, got), want) in outputs.iter().zip(&expected) {
        let declared = graph.find(name).and_then(|v| graph.value(v).declared.as_ref());
        let want = as_declared(want.clone(), declared.map(|d| d.dtype));
        let Err(why) = compare(got, &want) else { continue };
        return Err(match random {
            Some(node) if got.dims() == want.dims() => {
                let op = node.op.name();
                lack(
                    "random numbers",
                    format!("{op}: the expected values come from another random generator"),
                )
            }
            _ if !elsewhere.is_empty() => failed(format!(
                "output '{name}': {why}; {} has no kernel here, and this is what tract gives",
                elsewhere.join(", ")
            )),
            _ => failed(format!("output '{name}': {why}")),
        });
    }
    Ok(())
}

/// bfloat16 values that older cases store as the uint16 of their bits.
fn as_declared(t: Tensor, declared: Option<DType>) -> Tensor {
    if t.dtype() != DType::U16 || declared != Some(DType::BF16) {
        return t;
    }
    Tensor::from_bytes(DType::BF16, t.dims(), t.bytes()).unwrap_or(t)
}

/// Tolerances (relative, absolute) by the expected element type.
fn tolerance(dtype: DType) -> (f64, f64) {
    match dtype {
        DType::F16 => (4e-3, 1e-5),
        DType::BF16 => (2e-2, 1e-5),
        _ => (1e-3, 1e-7),
    }
}

/// Compares an output with what is expected; the message tells the first difference.
fn compare(got: &Tensor, want: &Tensor) -> std::result::Result<(), String> {
    if got.dims() != want.dims() {
        return Err(format!("shape {:?}, expected {:?}", got.dims(), want.dims()));
    }
    if got.dtype() != want.dtype() {
        return Err(format!("type {}, expected {}", got.dtype(), want.dtype()));
    }
    if !want.dtype().is_float() {
        if got.bytes() == want.bytes() {
            return Ok(());
        }
        let (a, b) = (got.to_ints().unwrap_or_default(), want.to_ints().unwrap_or_default());
        let different = a.iter().zip(&b).filter(|(a, b)| a != b).count();
        let first = a.iter().zip(&b).enumerate().find(|(_, (a, b))| a != b);
        return Err(match first {
            Some((i, (a, b))) => {
                format!("{different} of {} differ; element {i} is {a}, expected {b}", want.len())
            }
            None => "differs in representation".into(),
        });
    }
    let (rtol, mut atol) = tolerance(want.dtype());
    if want.dtype() == DType::F32 {
        // Where terms cancel, what is left of them is rounding, on both sides.
        let largest = want.to_f64().iter().filter(|x| x.is_finite()).fold(0.0f64, |m, x| m.max(x.abs()));
        atol = atol.max(largest * f32::EPSILON as f64);
    }
    let near = |a: f64, b: f64| {
        a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= atol + rtol * b.abs() && b.is_finite()
    };
    let (a, b) = (got.to_f64(), want.to_f64());
    let different = a.iter().zip(&b).filter(|(a, b)| !near(**a, **b)).count();
    match a.iter().zip(&b).enumerate().find(|(_, (a, b))| !near(**a, **b)) {
        None => Ok(()),
        Some((i, (a, b))) => {
            Err(format!("{different} of {} differ; element {i} is {a}, expected {b}", want.len()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comparison_is_strict_on_shape_type_and_special_values() {
        let f = |v: &[f32]| Tensor::from_slice(&[v.len()], v).unwrap();
        assert!(compare(&f(&[1.0, f32::NAN]), &f(&[1.0005, f32::NAN])).is_ok());
        assert!(compare(&f(&[1.0]), &f(&[1.01])).is_err());
        assert!(compare(&f(&[f32::INFINITY]), &f(&[f32::NEG_INFINITY])).is_err());
        assert!(compare(&f(&[1.0]), &f(&[f32::INFINITY])).is_err());
        assert!(compare(&f(&[1.0]), &f(&[1.0]).reshaped(&[1, 1]).unwrap()).is_err());
        assert!(compare(&f(&[1.0]), &Tensor::ints(&[1])).is_err());
        assert!(compare(&Tensor::ints(&[1]), &Tensor::ints(&[2])).unwrap_err().contains("expected 2"));
    }

    #[test]
    fn a_folder_without_cases_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        assert!(run(&[folder.path().to_path_buf()], false).is_err());
        assert!(run(&[folder.path().join("absent")], false).is_err());
    }

    #[test]
    fn the_report_has_the_form_of_the_contract() {
        let case = CaseResult {
            name: "a".into(),
            path: "x/a".into(),
            outcome: Outcome::Failed,
            reason: Some("why".into()),
            lacks: Vec::new(),
            gradient: None,
        };
        let report = Report { failed: 1, cases: vec![case], ..Report::default() };
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["summary"], serde_json::json!({"passed": 0, "failed": 1, "unsupported": 0}));
        assert_eq!(json["cases"][0]["outcome"], "failed");
    }

    /// The node cases of Debian's libonnx-testdata, where installed: prints what did not pass.
    /// `RETUNE_ONNX_CASES` names another folder, `RETUNE_ONNX_GRADIENTS` checks gradients too.
    #[test]
    fn node_cases_that_are_installed() {
        let folder = std::env::var("RETUNE_ONNX_CASES");
        let folder = folder.unwrap_or("/usr/share/libonnx-testdata/data/node".into());
        let gradients = std::env::var_os("RETUNE_ONNX_GRADIENTS").is_some();
        let Ok(report) = run(&[PathBuf::from(folder)], gradients) else { return };
        for c in report.cases.iter().filter(|c| c.outcome != Outcome::Passed) {
            println!("{:?}\t{}\t{}", c.outcome, c.name, c.reason.as_deref().unwrap_or("").replace('\n', " "));
        }
        for c in &report.cases {
            if let Some(g) = c.gradient.as_ref().filter(|g| **g != Checked::Equal) {
                println!("gradient\t{}\t{g:?}", c.name);
            }
        }
        println!("{} passed, {} failed, {} unsupported", report.passed, report.failed, report.unsupported);
        println!("{:?} {:?}", report.lacking(), report.gradients);
    }
}
