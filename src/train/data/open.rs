//! Data from a path, of whatever kind it is.

use std::io::Read;
use std::path::Path;

use crate::error::{Error, Result};

use super::npz::Npz;
use super::{Dataset, ImageOptions, InputSpec, bind, idx, images};

const ACCEPTED: &str = "data is an .npz file with 'y' and 'x' (or arrays by input name), a folder with a subfolder of \
                        images per class (or with images alone, unlabelled), or an IDX file like train-images-idx3-ubyte[.gz] with its labels beside it";

/// Reads data for a model with these `inputs`, bound to their names, types and shapes.
///
/// - An `.npz` file: the target in `y` (or `target`), and `x` or arrays by input name, fed as they are.
/// - A folder with a subfolder of PNG or JPEG images per class, classes in order of name.
/// - An IDX images' file, gzipped or not (the `.gz` may be left out), with its labels' file beside it.
///
/// Data without labels is read too: see [`Dataset::require_target`]. Options on images are refused for arrays, except
/// `shift`.
pub fn open(path: impl AsRef<Path>, options: &ImageOptions, inputs: &[InputSpec]) -> Result<Dataset> {
    let path = path.as_ref();
    if path.is_dir() {
        return images::open(path, options, only(path, inputs)?);
    }
    let Some(path) = idx::existing(path) else {
        std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
        return Err(Error::file(path, format!("neither a file nor a folder; {ACCEPTED}")));
    };
    let path = path.as_path();
    let mut start = [0u8; 4];
    let zip = std::fs::File::open(path).map_err(|e| Error::io(path, e))?.read_exact(&mut start).is_ok()
        && matches!(start, [b'P', b'K', 3, 4] | [b'P', b'K', 5, 6]);
    if zip || path.extension().is_some_and(|e| e.eq_ignore_ascii_case("npz")) {
        return arrays(path, options, inputs);
    }
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    if name.contains("idx3") || name.contains("idx1") || idx::looks_like(path) {
        return idx::open(path, options, only(path, inputs)?);
    }
    Err(Error::file(path, format!("not recognised; {ACCEPTED}")))
}

fn only<'a>(path: &Path, inputs: &'a [InputSpec]) -> Result<&'a InputSpec> {
    match inputs {
        [one] => Ok(one),
        many => {
            Err(Error::file(path, format!("images feed a model of one input, this one has {}", many.len())))
        }
    }
}

fn arrays(path: &Path, options: &ImageOptions, inputs: &[InputSpec]) -> Result<Dataset> {
    options.check_for_arrays()?;
    let at = |e: Error| match e {
        Error::Data(what) => Error::file(path, what),
        other => other,
    };
    let mut npz = Npz::open(path)?;
    let names = npz.names().to_vec();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let has = |n: &str| names.contains(&n);
    // An input may itself be called 'y'; 'x' then says that 'y' is the target.
    let is_input = |n: &str| inputs.iter().any(|i| i.name == n) && !(inputs.len() == 1 && has("x"));
    let target = ["y", "target"].into_iter().find(|n| has(n) && !is_input(n));
    let arrays: Vec<&str> = names.iter().copied().filter(|n| Some(*n) != target).collect();
    let picked = bind::pick(&arrays, inputs).map_err(at)?;
    let mut columns = Vec::new();
    for i in &picked {
        columns.push((arrays[*i].to_string(), npz.read(arrays[*i])?));
    }
    let labels = target.map(|t| npz.read(t)).transpose()?;
    let mut data = Dataset::for_inputs(columns, labels, inputs).and_then(|d| d.bind(inputs)).map_err(at)?;
    let unused: Vec<&str> =
        arrays.iter().enumerate().filter(|(i, _)| !picked.contains(i)).map(|(_, n)| *n).collect();
    if !unused.is_empty() {
        data.notes.push(format!("not used: {}", super::convert::listed(unused.into_iter(), 12)));
    }
    if target.is_none() {
        data.notes.push(format!("no array 'y' in {}", path.display()));
    }
    if !options.augmentation().is_none() {
        data = data.with_augmentation(options.augmentation(), options.layout)?;
    }
    Ok(data)
}
