//! Matching a dataset's arrays with a model's inputs.

use crate::error::{Error, Result};
use crate::tensor::DType;

use super::{Dataset, InputSpec, Storage, convert};

impl Dataset {
    /// The same data under the model's input names, in their order and types. An array named `x` feeds a model of
    /// one input, whatever that is called. Float arrays are converted to the model's float type, integers to its
    /// integer or float type (without scaling); arrays that no input asks for are dropped and noted.
    ///
    /// Fails when an input has no array, or one whose type or shape does not fit.
    pub fn bind(mut self, inputs: &[InputSpec]) -> Result<Dataset> {
        let names: Vec<&str> = self.input_names().collect();
        let picked = pick(&names, inputs)?;
        let mut old: Vec<_> = self.columns.into_iter().map(Some).collect();
        let mut columns = Vec::with_capacity(inputs.len());
        for (spec, i) in inputs.iter().zip(picked) {
            // An array feeds one input only: names are unique within a model and within a dataset.
            let Some(mut c) = old.get_mut(i).and_then(Option::take) else {
                return Err(Error::Data(format!("two inputs called '{}'", spec.name)));
            };
            if !c.whole {
                check_dims(&c.name, &c.dims, spec)?;
            }
            match c.storage {
                Storage::Pixels { .. } if c.dtype != spec.dtype => {
                    return Err(Error::Data(format!(
                        "images were prepared as {}, input '{}' wants {}",
                        c.dtype, spec.name, spec.dtype
                    )));
                }
                Storage::Pixels { .. } => {}
                Storage::Array(ref mut t) if t.dtype() != spec.dtype => {
                    if let Some(why) = convert::refusal(t.dtype(), spec.dtype) {
                        return Err(Error::Data(format!(
                            "array '{}' is {}, input '{}' wants {}: {why}",
                            c.name,
                            t.dtype(),
                            spec.name,
                            spec.dtype
                        )));
                    }
                    if t.dtype() == DType::U8 && spec.dtype.is_float() {
                        self.notes.push(format!(
                            "array '{}' is uint8 and fed as the numbers 0 to 255: arrays are not scaled",
                            c.name
                        ));
                    }
                    // Whatever takes less memory is kept.
                    if spec.dtype.size() <= t.dtype().size() || !c.augmentation.is_none() {
                        *t = convert::array(&c.name, t, spec.dtype)?;
                    } else {
                        convert::check(&c.name, t, spec.dtype)?;
                    }
                    c.dtype = spec.dtype;
                }
                Storage::Array(_) => {}
            }
            c.name = spec.name.clone();
            columns.push(c);
        }
        let unused: Vec<_> = old.iter().flatten().map(|c| c.name.as_str()).collect();
        if !unused.is_empty() {
            self.notes.push(format!("not used: {}", convert::listed(unused.into_iter(), 12)));
        }
        self.columns = columns;
        Ok(self)
    }
}

/// For each input the index of the array that feeds it.
pub(super) fn pick(arrays: &[&str], inputs: &[InputSpec]) -> Result<Vec<usize>> {
    let find = |name: &str| arrays.iter().position(|a| *a == name);
    let mut picked = Vec::with_capacity(inputs.len());
    let mut missing = Vec::new();
    for spec in inputs {
        match find(&spec.name).or_else(|| if inputs.len() == 1 { find("x") } else { None }) {
            Some(i) => picked.push(i),
            None => missing.push(spec.name.as_str()),
        }
    }
    if missing.is_empty() {
        return Ok(picked);
    }
    let there = if arrays.is_empty() { "none".into() } else { convert::listed(arrays.iter().copied(), 20) };
    let alias = if inputs.len() == 1 { " (or 'x')" } else { "" };
    Err(Error::Data(format!(
        "no array for the model's input {}{alias}; arrays there are: {there}",
        missing.iter().map(|m| format!("'{m}'")).collect::<Vec<_>>().join(", ")
    )))
}

fn check_dims(array: &str, sample: &[usize], spec: &InputSpec) -> Result<()> {
    let Some((_, declared)) = spec.dims.split_first() else { return Ok(()) };
    let fits = declared.len() == sample.len()
        && declared.iter().zip(sample).all(|(want, &has)| want.is_none_or(|w| w == has));
    if fits {
        return Ok(());
    }
    let has: Vec<String> = std::iter::once("N".into()).chain(sample.iter().map(usize::to_string)).collect();
    let want: Vec<String> = std::iter::once("N".into())
        .chain(declared.iter().map(|d| d.map_or("?".into(), |d| d.to_string())))
        .collect();
    Err(Error::Data(format!(
        "array '{array}' is [{}], input '{}' wants [{}]",
        has.join(", "),
        spec.name,
        want.join(", ")
    )))
}
