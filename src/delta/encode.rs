//! A weight's new values in the ways a delta stores them.

use half::{bf16, f16};

use crate::delta::DeltaType;
use crate::error::{Error, Result};
use crate::import::Weight;
use crate::tensor::{DType, Tensor, to_bf16, to_f16};

/// What becomes of one weight.
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    /// The stored bytes of all elements.
    Full(Vec<u8>),
    /// Differences of the values, in two bytes an element.
    Difference { dtype: DType, bytes: Vec<u8> },
    /// Places, from the smallest, and the stored bytes of the elements there.
    Elements { places: Vec<u64>, bytes: Vec<u8> },
}

/// Bytes of a place, among `len` elements.
pub(super) fn place_size(len: usize) -> usize {
    if u32::try_from(len).is_ok() { 4 } else { 8 }
}

fn fail<T>(weight: &Weight, what: impl Into<String>) -> Result<T> {
    Err(Error::value(&weight.name, what))
}

/// The values for new stored bytes, and the largest error when they are decoded.
pub(super) fn encode(weight: &Weight, old: &[u8], new: &[u8], kind: DeltaType) -> Result<(Values, f64)> {
    let full = || (Values::Full(new.to_vec()), 0.0);
    match kind {
        DeltaType::Full => Ok(full()),
        DeltaType::Sparse => {
            let size = weight.dtype.size();
            let pairs = || old.chunks_exact(size).zip(new.chunks_exact(size)).enumerate();
            let changed = pairs().filter(|(_, (a, b))| a != b).count();
            if changed * (place_size(weight.len()) + size) >= new.len() {
                return Ok(full());
            }
            let (mut places, mut bytes) = (Vec::with_capacity(changed), Vec::with_capacity(changed * size));
            for (i, (a, b)) in pairs() {
                if a != b {
                    places.push(i as u64);
                    bytes.extend_from_slice(b);
                }
            }
            Ok((Values::Elements { places, bytes }, 0.0))
        }
        DeltaType::F16 | DeltaType::Bf16 => {
            if !matches!(weight.dtype, DType::F32 | DType::F64) {
                return Ok(full());
            }
            let dtype = if kind == DeltaType::F16 { DType::F16 } else { DType::BF16 };
            let (before, after) = (floats(weight, old)?, floats(weight, new)?);
            let mut bytes = Vec::with_capacity(2 * before.len());
            for (i, (a, b)) in before.iter().zip(&after).enumerate() {
                let d = b - a;
                let (bits, finite) = match dtype {
                    DType::F16 => (to_f16(d).to_bits(), to_f16(d).is_finite()),
                    _ => (to_bf16(d).to_bits(), to_bf16(d).is_finite()),
                };
                if !finite {
                    let what = format!(
                        "changes by {d} at element {i}, which does not fit {dtype}: use --delta-type full"
                    );
                    return fail(weight, what);
                }
                bytes.extend_from_slice(&bits.to_le_bytes());
            }
            let values = Values::Difference { dtype, bytes };
            let decoded = match decode(weight, old, &values)? {
                Some(bytes) => floats(weight, &bytes)?,
                None => before,
            };
            let error = decoded.iter().zip(&after).fold(0.0, |m: f64, (a, b)| m.max((a - b).abs()));
            Ok((values, error))
        }
    }
}

fn floats(weight: &Weight, stored: &[u8]) -> Result<Vec<f64>> {
    let t = Tensor::from_bytes(weight.dtype, &weight.dims, stored);
    Ok(t.map_err(|e| Error::value(&weight.name, e.to_string()))?.to_f64())
}

/// The stored bytes that the values make of the old ones; `None`: they stay.
pub(super) fn decode(weight: &Weight, old: &[u8], values: &Values) -> Result<Option<Vec<u8>>> {
    let size = weight.dtype.size();
    let new = match values {
        Values::Full(bytes) => bytes.clone(),
        Values::Elements { places, bytes } => {
            let mut new = old.to_vec();
            if places.len() * size != bytes.len() {
                return fail(weight, "has another number of places than of values in the delta");
            }
            for (place, value) in places.iter().zip(bytes.chunks_exact(size)) {
                let at = usize::try_from(*place).ok().and_then(|p| p.checked_mul(size));
                let at = at.filter(|at| *at < new.len());
                let Some(at) = at else { return fail(weight, format!("has no element {place}")) };
                new[at..at + size].copy_from_slice(value);
            }
            new
        }
        Values::Difference { dtype, bytes } => {
            let before = floats(weight, old)?;
            if bytes.len() != 2 * before.len() || !matches!(weight.dtype, DType::F32 | DType::F64) {
                return fail(weight, "has another type or shape in the delta");
            }
            let mut new = Vec::with_capacity(old.len());
            for ((a, d), stored) in before.iter().zip(bytes.chunks_exact(2)).zip(old.chunks_exact(size)) {
                let bits = u16::from_le_bytes([d[0], d[1]]);
                let d = if *dtype == DType::F16 {
                    f16::from_bits(bits).to_f64()
                } else {
                    bf16::from_bits(bits).to_f64()
                };
                match weight.dtype {
                    // Also where it is no number.
                    _ if d == 0.0 => new.extend_from_slice(stored),
                    DType::F32 => new.extend_from_slice(&((a + d) as f32).to_le_bytes()),
                    _ => new.extend_from_slice(&(a + d).to_le_bytes()),
                }
            }
            new
        }
    };
    if new.len() != old.len() {
        return fail(weight, "has another type or shape in the delta");
    }
    Ok((new != old).then_some(new))
}
