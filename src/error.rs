//! What went wrong, and the node, value or file it went wrong at.

use std::path::{Path, PathBuf};

use crate::size::human;

pub type Result<T> = std::result::Result<T, Error>;

/// Any failure of the library.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    /// A file that is damaged, refused, or not of the kind it should be.
    #[error("{}: {what}", file.display())]
    File { file: PathBuf, what: String },
    /// An operator that failed at one node. `node` reads like `Conv 'layer1/conv' (output 'x3')`.
    #[error("node {node}: {source}")]
    Op { node: String, source: OpError },
    /// A named value that does not fit.
    #[error("value '{value}': {what}")]
    Value { value: String, what: String },
    /// Everything that stands between the loss and a parameter that was asked for, all at once.
    #[error("cannot train through {} node(s):{}", .0.len(), list(.0))]
    Blocked(Vec<Blocker>),
    /// Data that does not fit the model or the task.
    #[error("{0}")]
    Data(String),
    /// More memory than the system gives.
    #[error("{what}: the system does not give so much memory, {}", human(*bytes))]
    Memory { what: String, bytes: usize },
    /// An option or a combination of options that makes no sense.
    #[error("{0}")]
    Config(String),
}

/// A node that blocks training or running, and why.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Blocker {
    pub node: String,
    pub op_type: String,
    pub why: String,
}

fn list(blockers: &[Blocker]) -> String {
    blockers.iter().map(|b| format!("\n  {}: {}", b.node, b.why)).collect()
}

/// A failure inside one operator; the graph adds the node.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpError {
    #[error("{0}")]
    Shape(String),
    #[error("{0}")]
    Type(String),
    #[error("attribute {0}")]
    Attribute(String),
    /// Shape inference needs the value (not only the shape) of this input.
    #[error("the value of input {0} must be known before the run")]
    NeedsValue(usize),
    #[error("not differentiable: {0}")]
    NotDifferentiable(String),
    #[error("not supported: {0}")]
    Unsupported(String),
    /// A kernel was handed operands that the plan should never have produced.
    #[error("internal: {0}")]
    Internal(String),
}

impl Error {
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Error::Io { path: path.as_ref().to_path_buf(), source }
    }

    pub fn file(path: impl AsRef<Path>, what: impl Into<String>) -> Self {
        Error::File { file: path.as_ref().to_path_buf(), what: what.into() }
    }

    pub fn value(name: impl Into<String>, what: impl Into<String>) -> Self {
        Error::Value { value: name.into(), what: what.into() }
    }
}
