//! Rotary position embedding.

use std::sync::Arc;

use crate::error::OpError;
use crate::graph::{Lowering, ValueId};
use crate::ops::binary::Sub;
use crate::ops::composite::{Made, Recipe, composite};
use crate::ops::gather::Gather;
use crate::ops::{Op, Spec};
use crate::tensor::Tensor;

/// ONNX `RotaryEmbedding` (opset 23): pairs of X's features turned by angles given as cosines and sines.
///
/// X is (B, H, S, D), or (B, S, H·D); cosines and sines are (positions, R/2) with positions (B, S) as input 3, or
/// (B, S, R/2) without. The first R of a head's D features are turned: halves against each other, or neighbours.
/// com.microsoft's has the positions as input 1, (B, S) or the first position alone.
#[derive(Debug, Clone)]
pub struct Rotary {
    interleaved: bool,
    heads: usize,
    rotated: usize,
    /// Inputs that are cosines, sines and positions.
    slots: [usize; 3],
}

impl Rotary {
    fn make(spec: &Spec, slots: [usize; 3]) -> Result<Arc<dyn Op>, OpError> {
        let count = |name: &str| {
            let n = spec.attrs.int_or(name, 0)?;
            usize::try_from(n).map_err(|_| OpError::Attribute(format!("'{name}' is {n}")))
        };
        if spec.attrs.flag("is_packed_batching")? || spec.attrs.float_or("scale", 1.0)? != 1.0 {
            return Err(OpError::Unsupported("packed batches or a scale of RotaryEmbedding".into()));
        }
        composite(Rotary {
            interleaved: spec.attrs.flag("interleaved")?,
            heads: count("num_heads")?,
            rotated: count("rotary_embedding_dim")?,
            slots,
        })
    }

    pub(super) fn standard(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
        Rotary::make(spec, [1, 2, 3])
    }

    pub(super) fn contrib(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
        Rotary::make(spec, [2, 3, 1])
    }

    /// Cosines or sines as (B, S, R/2).
    fn angles(
        &self,
        l: &mut Lowering,
        slot: usize,
        batch: usize,
        sequence: usize,
    ) -> Result<ValueId, OpError> {
        let cache = l.x(slot)?;
        let Some(mut positions) = l.x_opt(self.slots[2]) else { return Ok(cache) };
        if l.meta(positions)?.rank() < 2 {
            // The first position alone.
            let steps: Vec<i64> = (0..batch).flat_map(|_| 0..sequence as i64).collect();
            let steps = l.constant(Tensor::from_slice(&[batch, sequence], &steps)?);
            positions = l.add(positions, steps)?;
        }
        l.emit(Gather { axis: 0 }, &[cache, positions])
    }
}

impl Recipe for Rotary {
    fn name(&self) -> &'static str {
        "RotaryEmbedding"
    }

    fn lower(&self, l: &mut Lowering) -> Made {
        let x = l.x(0)?;
        let dims = l.dims(x)?;
        // x as (B, outer, inner, D): heads before positions, or after.
        let (b, s, heads_first, shape) = match *dims {
            [b, h, s, d] => (b, s, true, [b, h, s, d]),
            [b, s, width] => {
                let heads = match self.heads {
                    0 => {
                        let half = l.dims(l.x(self.slots[0])?)?.last().copied().unwrap_or(0);
                        let d = if self.rotated > 0 { 0 } else { 2 * half };
                        width.checked_div(d).unwrap_or(0)
                    }
                    h => h,
                };
                if heads == 0 || width % heads != 0 {
                    return Err(OpError::Attribute(format!("'num_heads' is {heads} for a width of {width}")));
                }
                (b, s, false, [b, s, heads, width / heads])
            }
            _ => {
                return Err(OpError::Shape(format!(
                    "x of shape {:?}: rank 3 or 4 is needed",
                    dims.as_slice()
                )));
            }
        };
        let d = shape[3];
        let r = if self.rotated == 0 { d } else { self.rotated };
        if r > d || r % 2 != 0 {
            return Err(OpError::Attribute(format!("'rotary_embedding_dim' is {r} for heads of {d}")));
        }
        let half = r / 2;
        let mut angles = [x; 2];
        for (i, v) in angles.iter_mut().enumerate() {
            let found = self.angles(l, self.slots[i], b, s)?;
            if l.dims(found)?.as_slice() != [b, s, half] {
                let have = l.dims(found)?;
                return Err(OpError::Shape(format!(
                    "angles of shape {:?}, not {:?}",
                    &have[..],
                    [b, s, half]
                )));
            }
            *v = match heads_first {
                true => l.reshape(found, &[b, 1, s, half])?,
                false => l.reshape(found, &[b, s, 1, half])?,
            };
        }
        let [cos, sin] = angles;
        let whole = l.reshape(x, &shape)?;
        let turned = l.crop(whole, 3, 0, r)?;
        let [n, outer, inner, _] = shape;
        let part = [n, outer, inner, half];
        let (x1, x2) = if self.interleaved {
            let pairs = l.reshape(turned, &[n, outer, inner, half, 2])?;
            let (a, b) = (l.crop(pairs, 4, 0, 1)?, l.crop(pairs, 4, 1, 1)?);
            (l.reshape(a, &part)?, l.reshape(b, &part)?)
        } else {
            (l.crop(turned, 3, 0, half)?, l.crop(turned, 3, half, half)?)
        };
        let (a, c) = (l.mul(cos, x1)?, l.mul(sin, x2)?);
        let real = l.emit(Sub, &[a, c])?;
        let (a, c) = (l.mul(sin, x1)?, l.mul(cos, x2)?);
        let imaginary = l.add(a, c)?;
        let turned = if self.interleaved {
            let one = [n, outer, inner, half, 1];
            let (a, b) = (l.reshape(real, &one)?, l.reshape(imaginary, &one)?);
            let pairs = l.concat(&[a, b], 4)?;
            l.reshape(pairs, &[n, outer, inner, r])?
        } else {
            l.concat(&[real, imaginary], 3)?
        };
        let y = match r == d {
            true => turned,
            false => {
                let rest = l.crop(whole, 3, r, d - r)?;
                l.concat(&[turned, rest], 3)?
            }
        };
        Ok(vec![Some(l.reshape(y, &dims)?)])
    }
}

#[cfg(test)]
pub(super) fn cases() -> Vec<crate::ops::cases::Case> {
    use crate::ops::cases::Case;
    let case = |name: &str| Case::new("RotaryEmbedding", 23).named(name);
    let positions = || Tensor::from_slice(&[2, 3], &[0i64, 1, 2, 4, 3, 1]).unwrap();
    vec![
        case("4-D").input(&[2, 4, 3, 6]).input(&[5, 3]).input(&[5, 3]).fixed(positions()),
        case("interleaved, in part")
            .int("interleaved", 1)
            .int("rotary_embedding_dim", 4)
            .input(&[2, 4, 3, 6])
            .input(&[2, 3, 2])
            .input(&[2, 3, 2]),
        case("3-D").int("num_heads", 2).input(&[2, 3, 8]).input(&[5, 2]).input(&[5, 2]).fixed(positions()),
        Case::contrib("RotaryEmbedding")
            .named("first position")
            .input(&[2, 2, 3, 4])
            .fixed(Tensor::ints(&[1]))
            .input(&[6, 2])
            .input(&[6, 2]),
    ]
}
