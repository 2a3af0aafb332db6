//! What numbers are kept in between their computations, which are in `f32`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::tensor::DType;

/// What activations that a gradient needs, and copies of weights, are kept in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    #[default]
    F32,
    /// Eight bits of mantissa, the range of `f32`.
    Bf16,
    /// Eleven bits, up to 65504: gradients need a scaled loss.
    F16,
}

impl Precision {
    /// The half type, if it is one.
    pub fn half(self) -> Option<DType> {
        match self {
            Precision::F32 => None,
            Precision::Bf16 => Some(DType::BF16),
            Precision::F16 => Some(DType::F16),
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
            Precision::F16 => "f16",
        })
    }
}

impl FromStr for Precision {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        [Precision::F32, Precision::Bf16, Precision::F16]
            .into_iter()
            .find(|p| p.to_string() == s)
            .ok_or_else(|| Error::Config(format!("--precision {s}: takes f32, bf16 or f16")))
    }
}

/// What the optimizer's moments are kept in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum OptimizerState {
    #[default]
    #[serde(rename = "f32")]
    F32,
    /// bfloat16, rounded at random: a moment may move by less than one unit of it a step.
    #[serde(rename = "bf16")]
    Bf16,
    /// Eight bits an element and a largest magnitude a block of 256 (Dettmers, Lewis, Shleifer and Zettlemoyer,
    /// *8-bit Optimizers via Block-wise Quantization*, 2022), by a dynamic map; small tensors stay `f32`.
    #[serde(rename = "8bit")]
    EightBit,
}

impl FromStr for OptimizerState {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s {
            "f32" => Ok(OptimizerState::F32),
            "bf16" => Ok(OptimizerState::Bf16),
            "8bit" => Ok(OptimizerState::EightBit),
            other => Err(Error::Config(format!("--optimizer-state {other}: takes f32, bf16 or 8bit"))),
        }
    }
}
