//! Running the binary, finding files, comparing arrays.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use retune::tensor::Tensor;

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The networks of ONNX's `light` folder: files `light_NAME.onnx`.
pub const LIGHT: &[&str] = &[
    "bvlc_alexnet",
    "densenet121",
    "inception_v1",
    "inception_v2",
    "resnet50",
    "shufflenet",
    "squeezenet",
    "vgg19",
    "zfnet512",
];

/// The shape of the first input, in the report of `inspect`.
pub fn input_dims(report: &serde_json::Value) -> Vec<usize> {
    let dims = report["inputs"][0]["shape"].as_array().unwrap();
    dims.iter().map(|d| d.as_str().unwrap().parse().unwrap()).collect()
}

/// A file that the repository ships.
pub fn shipped(path: &str) -> PathBuf {
    let path = root().join(path);
    assert!(path.exists(), "{} is missing from the repository", path.display());
    path
}

/// A fetched file, or `None` with a printed line.
pub fn fetched(path: &str) -> Option<PathBuf> {
    let folder =
        std::env::var_os("RETUNE_FETCHED").map_or_else(|| root().join("target/fetched"), PathBuf::from);
    let path = folder.join(path);
    if !path.exists() {
        println!("skipped: {} is not fetched (tests/fetch.sh)", path.display());
        return None;
    }
    Some(path)
}

/// Whether the long tests were asked for (`./test.sh --all`).
#[allow(dead_code)]
pub fn all() -> bool {
    std::env::var("RETUNE_TEST_ALL").is_ok_and(|v| v == "1")
}

pub fn retune() -> Command {
    Command::new(env!("CARGO_BIN_EXE_retune"))
}

/// Runs the binary and requires an exit code.
pub fn run(args: &[&str], code: i32) -> Output {
    let out = retune().args(args).output().unwrap();
    assert_eq!(
        out.status.code(),
        Some(code),
        "retune {}\n{}{}",
        args.join(" "),
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    out
}

/// As [`run`], and reads the JSON document on stdout.
pub fn json(args: &[&str], code: i32) -> serde_json::Value {
    let out = run(args, code);
    serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("retune {}: {e}", args.join(" ")))
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Arrays of an .npz by name.
pub struct Arrays(pub Vec<(String, Tensor)>);

impl Arrays {
    /// Numbers may be together in one array, their names in another: see `save` of `tests/reference/common.py`.
    pub fn read(path: &Path) -> Self {
        let mut arrays = Arrays(retune::train::data::read_npz(path).unwrap_or_else(|e| panic!("{e}")));
        if let (Some(numbers), Some(names)) = (arrays.find("numbers"), arrays.find("numbers.names")) {
            let (numbers, names) = (numbers.to_f64(), std::str::from_utf8(names.bytes()).unwrap());
            let apart = names.lines().zip(&numbers);
            let apart: Vec<_> =
                apart.map(|(name, x)| (name.into(), Tensor::from_slice(&[], &[*x]).unwrap())).collect();
            assert_eq!(apart.len(), numbers.len());
            arrays.0.extend(apart);
        }
        arrays
    }

    pub fn find(&self, name: &str) -> Option<&Tensor> {
        self.0.iter().find(|a| a.0 == name).map(|a| &a.1)
    }

    pub fn get(&self, name: &str) -> &Tensor {
        self.find(name).unwrap_or_else(|| panic!("no array '{name}'"))
    }

    /// Names with a prefix, which is cut off.
    pub fn with_prefix<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a Tensor)> {
        self.0.iter().filter_map(move |(n, t)| n.strip_prefix(prefix).map(|n| (n, t)))
    }
}

/// Largest difference over the largest magnitude of `truth`.
pub fn relative(truth: &[f64], other: &[f64]) -> f64 {
    assert_eq!(truth.len(), other.len());
    let scale = truth.iter().fold(f64::MIN_POSITIVE, |m, x| m.max(x.abs()));
    truth.iter().zip(other).fold(0.0, |m: f64, (a, b)| m.max((a - b).abs())) / scale
}
