//! The second opinion: the exported file, run by tract.

use std::path::Path;

use crate::tensor::Tensor;

/// Outputs may differ by this much of the largest element before an export is refused.
pub const TOLERANCE: f64 = 1e-3;

/// Outputs whose largest element is below this are compared as if it were this large: engines approximate sigmoids and
/// exponentials to about 1e-6, which is much of a probability map in which nothing is found.
const SMALL: f64 = 1e-3;

/// What tract says of a file.
#[derive(Debug, Clone, PartialEq)]
pub enum Verification {
    /// The largest difference of any output, relative to that output's largest element.
    Agrees { max_relative: f64 },
    /// The output that differs most, and by how much.
    Disagrees { output: String, max_relative: f64 },
    /// No opinion, and why.
    Unavailable(String),
}

/// Runs the model at `path` in tract and compares its outputs with `expected`.
pub fn verify(path: &Path, feeds: &[(String, Tensor)], expected: &[(String, Tensor)]) -> Verification {
    match attempt(path, feeds) {
        Err(why) => Verification::Unavailable(why),
        Ok(got) => compare(&got, expected),
    }
}

/// Compares outputs by name.
pub fn compare(got: &[(String, Tensor)], expected: &[(String, Tensor)]) -> Verification {
    let mut worst = (String::new(), 0.0f64);
    for (name, want) in expected {
        let Some((_, got)) = got.iter().find(|(n, _)| n == name) else {
            return Verification::Unavailable(format!("tract gives no output '{name}'"));
        };
        let difference = match got.dims() == want.dims() {
            true => relative(&got.to_f64(), &want.to_f64()),
            false => f64::INFINITY,
        };
        if difference > worst.1 {
            worst = (name.clone(), difference);
        }
    }
    match worst {
        (_, max_relative) if max_relative <= TOLERANCE => Verification::Agrees { max_relative },
        (output, max_relative) => Verification::Disagrees { output, max_relative },
    }
}

/// The largest difference relative to the largest finite element of `want`; not-a-number and infinities
/// have to be the same ones.
fn relative(got: &[f64], want: &[f64]) -> f64 {
    let largest = want.iter().filter(|x| x.is_finite()).fold(0.0f64, |m, x| m.max(x.abs()));
    let mut worst = 0.0f64;
    for (g, w) in got.iter().zip(want) {
        if g == w || (g.is_nan() && w.is_nan()) {
            continue;
        }
        let d = (g - w).abs() / largest.max(SMALL);
        worst = worst.max(if d.is_nan() { f64::INFINITY } else { d });
    }
    worst
}

/// Runs the model at `path` in tract. Feeds and outputs are by name, in the types the file declares
/// (half floats as float32).
///
/// Fails when tract cannot load or run it, and when the crate is built without the feature `tract`.
pub fn run(path: &Path, feeds: &[(String, Tensor)]) -> crate::error::Result<Vec<(String, Tensor)>> {
    attempt(path, feeds).map_err(|why| crate::error::Error::file(path, why))
}

#[cfg(not(feature = "tract"))]
fn attempt(_: &Path, _: &[(String, Tensor)]) -> Result<Vec<(String, Tensor)>, String> {
    Err("built without tract".into())
}

#[cfg(feature = "tract")]
use with_tract::attempt;

#[cfg(feature = "tract")]
mod with_tract {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::path::Path;

    use tract_onnx::prelude as tract;
    use tract_onnx::prelude::{Framework, InferenceModelExt, IntoRunnable, TractResult};
    use tract_onnx::tract_hir::infer::Factoid;

    use crate::ops::tract::{from_tract, to_tract};
    use crate::tensor::Tensor;

    /// What tract computes, or why it does not.
    pub fn attempt(path: &Path, feeds: &[(String, Tensor)]) -> Result<Vec<(String, Tensor)>, String> {
        let fail = |what: String| Err(format!("tract: {what}"));
        match catch_unwind(AssertUnwindSafe(|| try_run(path, feeds))) {
            Ok(Ok(outputs)) => Ok(outputs),
            Ok(Err(e)) => fail(format!("{e:#}")),
            Err(panic) => {
                let what = panic
                    .downcast_ref::<String>()
                    .map(String::as_str)
                    .or_else(|| panic.downcast_ref::<&str>().copied())
                    .unwrap_or("unknown reason");
                fail(format!("panicked: {what}"))
            }
        }
    }

    fn try_run(path: &Path, feeds: &[(String, Tensor)]) -> TractResult<Vec<(String, Tensor)>> {
        // What the file declares of shapes inside and of outputs may have another batch size baked in.
        let onnx = tract_onnx::onnx().with_ignore_output_shapes(true).with_ignore_value_info(true);
        let mut model = onnx.model_for_path(path)?;
        let inputs: Vec<tract::OutletId> = model.input_outlets()?.to_vec();
        let mut values = tract::TVec::new();
        for (i, outlet) in inputs.iter().enumerate() {
            let name = model.node(outlet.node).name.clone();
            let Some((_, feed)) = feeds.iter().find(|(n, _)| *n == name) else {
                return Err(tract::TractError::msg(format!("input '{name}' is not fed")));
            };
            let mut tensor = to_tract(feed.view())?;
            // A half-typed input is fed with the float32 that we compute in.
            if let Some(declared) = model.input_fact(i)?.datum_type.concretize() {
                tensor = tensor.cast_to_dt(declared)?.into_owned();
            }
            let fact = tract::InferenceFact::dt_shape(tensor.datum_type(), tensor.shape());
            model.set_input_fact(i, fact)?;
            values.push(tract::IntoTValue::into_tvalue(tensor));
        }
        let outputs: Vec<tract::OutletId> = model.output_outlets()?.to_vec();
        let names: Vec<String> = outputs
            .iter()
            .map(|o| model.outlet_label(*o).map_or_else(|| model.node(o.node).name.clone(), str::to_string))
            .collect();
        let runnable = model.into_optimized()?.into_runnable()?;
        let results = runnable.run(values)?;
        names.into_iter().zip(results.iter()).map(|(name, t)| Ok((name, from_tract(t)?))).collect()
    }
}
