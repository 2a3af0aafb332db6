//! Frozen weights that are read from the file where they are needed.

use bytes::Bytes;
use half::{bf16, f16};

use crate::error::OpError;
use crate::graph::GradBuilder;
use crate::kernels::par;
use crate::ops::{Cx, Grads, Op, out};
use crate::tensor::{DType, Dims, Elem, Meta, View, ViewMut};

/// A tensor of the file: `stored` is its elements, little-endian, at any address, of the type they are computed in, or of a
/// half type that is widened to float32.
#[derive(Debug)]
pub struct Load {
    pub stored: Bytes,
    pub dtype: DType,
    pub dims: Dims,
}

impl Load {
    /// Can elements of this type be loaded?
    pub fn can(dtype: DType) -> bool {
        matches!(dtype, DType::F32 | DType::F64 | DType::F16 | DType::BF16)
    }

    fn widen<T: Elem>(&self, y: &mut ViewMut, f: impl Fn(T) -> f32 + Send + Sync) -> Result<(), OpError> {
        let size = size_of::<T>();
        par::pieces(y.get::<f32>()?, |start, piece| {
            let bytes = &self.stored[start * size..];
            for (y, x) in piece.iter_mut().zip(bytes.chunks_exact(size)) {
                *y = f(bytemuck::pod_read_unaligned(x));
            }
        });
        Ok(())
    }
}

impl Op for Load {
    fn name(&self) -> &'static str {
        "Load"
    }

    fn infer(&self, _: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        Ok(vec![Meta::new(self.dtype.working(), &self.dims)])
    }

    fn forward(&self, _: &mut Cx, _: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let y = out(y, 0)?;
        if self.stored.len() != y.len() * self.dtype.size() {
            return Err(OpError::Internal(format!("{} bytes for {:?}", self.stored.len(), y.dims)));
        }
        match self.dtype {
            DType::F16 => self.widen(y, f16::to_f32),
            DType::BF16 => self.widen(y, bf16::to_f32),
            _ => {
                par::pieces(y.bytes, |start, piece| {
                    piece.copy_from_slice(&self.stored[start..start + piece.len()]);
                });
                Ok(())
            }
        }
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("a frozen weight".into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::eval;

    #[test]
    fn elements_at_odd_addresses() {
        let values: Vec<f32> = (0..40_000).map(|i| i as f32 * 0.37 - 5.0).collect();
        let load = |dtype: DType, bytes: Vec<u8>| {
            let mut odd = vec![0u8];
            odd.extend(bytes);
            let stored = Bytes::from(odd).slice(1..);
            let y = eval(&Load { stored, dtype, dims: Dims::from_slice(&[40_000]) }, &[]).unwrap();
            y[0].get::<f32>().unwrap().to_vec()
        };
        assert_eq!(load(DType::F32, bytemuck::cast_slice(&values).to_vec()), values);
        let halves: Vec<f16> = values.iter().map(|x| f16::from_f32(*x)).collect();
        let widened: Vec<f32> = halves.iter().map(|x| x.to_f32()).collect();
        assert_eq!(load(DType::F16, bytemuck::cast_slice(&halves).to_vec()), widened);
    }
}
