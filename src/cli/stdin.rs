//! A stream of samples on standard input: `.npy` arrays one after the other, each a batch, or raw float32.

use std::io::{BufReader, Read, Stdin};

use crate::adapt::Stream;
use crate::error::{Error, Result};
use crate::finetune::input_specs;
use crate::import::Model;
use crate::tensor::{DType, Tensor};
use crate::train::data::{Dataset, InputSpec, read_npy};

/// Batches that are read as they come.
pub struct Arrays<R = BufReader<Stdin>> {
    from: R,
    specs: Vec<InputSpec>,
    /// Of raw samples; empty: `.npy` arrays.
    shape: Vec<usize>,
    batch: usize,
    read: usize,
}

impl Arrays {
    /// For a model of one input.
    pub fn new(model: &Model, shape: &[usize], batch: usize) -> Result<Self> {
        Arrays::of(BufReader::with_capacity(1 << 16, std::io::stdin()), input_specs(model), shape, batch)
    }
}

impl<R: Read> Arrays<R> {
    fn of(from: R, specs: Vec<InputSpec>, shape: &[usize], batch: usize) -> Result<Self> {
        if specs.len() != 1 {
            return Err(Error::Config(format!(
                "--data - feeds a model of one input, this one has {} (give the others values with --set)",
                specs.len()
            )));
        }
        if shape.contains(&0) {
            return Err(Error::Config(format!("--shape {shape:?}: a dimension is 0")));
        }
        Ok(Arrays { from, specs, shape: shape.to_vec(), batch, read: 0 })
    }

    /// `batch` raw samples, fewer at the end.
    fn raw(&mut self) -> Result<Option<Tensor>> {
        let fail = |what: String| Error::Data(format!("standard input: {what}"));
        let bytes = self.shape.iter().try_fold(DType::F32.size(), |n, d| n.checked_mul(*d));
        let bytes = bytes.filter(|b| b.checked_mul(self.batch).is_some_and(|n| n <= isize::MAX as usize));
        let bytes = bytes.ok_or_else(|| fail(format!("samples of shape {:?} are too large", self.shape)))?;
        let mut buffer = Vec::new();
        let most = (bytes * self.batch) as u64;
        self.from.by_ref().take(most).read_to_end(&mut buffer).map_err(|e| fail(e.to_string()))?;
        if buffer.is_empty() {
            return Ok(None);
        }
        if buffer.len() % bytes != 0 {
            return Err(fail(format!("ends within a sample ({} of {bytes} bytes)", buffer.len() % bytes)));
        }
        let dims = [&[buffer.len() / bytes], &self.shape[..]].concat();
        Tensor::from_bytes(DType::F32, &dims, &buffer).map(Some).map_err(|e| fail(e.to_string()))
    }
}

impl<R: Read> Stream for Arrays<R> {
    fn next(&mut self) -> Result<Option<Dataset>> {
        let array = match self.shape.is_empty() {
            true => read_npy(&mut self.from)
                .map_err(|e| Error::Data(format!("standard input, array {}: {e}", self.read)))?,
            false => self.raw()?,
        };
        self.read += 1;
        let Some(array) = array else { return Ok(None) };
        let name = self.specs[0].name.clone();
        Dataset::from_arrays(vec![(name, array)], None)?.bind(&self.specs).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::data::npy_bytes;

    fn specs() -> Vec<InputSpec> {
        vec![InputSpec::new("image", DType::F32, &[None, Some(2)])]
    }

    fn sizes(mut s: impl Stream) -> Result<Vec<usize>> {
        let mut all = Vec::new();
        while let Some(d) = s.next()? {
            all.push(d.len());
        }
        Ok(all)
    }

    #[test]
    fn arrays_one_after_the_other() {
        let t = |n: usize| Tensor::from_slice(&[n, 2], &vec![0.5f32; n * 2]).unwrap();
        let bytes = [npy_bytes(&t(3)), npy_bytes(&t(1))].concat();
        assert_eq!(sizes(Arrays::of(&bytes[..], specs(), &[], 9).unwrap()).unwrap(), [3, 1]);
        let cut = sizes(Arrays::of(&bytes[..bytes.len() - 1], specs(), &[], 9).unwrap());
        assert!(cut.unwrap_err().to_string().contains("array 1"));
        let other = sizes(Arrays::of(&b"garbage in"[..], specs(), &[], 9).unwrap());
        assert!(other.unwrap_err().to_string().contains("array 0"));
    }

    #[test]
    fn raw_samples_of_a_declared_shape() {
        let bytes = [0u8; 5 * 2 * 4];
        assert_eq!(sizes(Arrays::of(&bytes[..], specs(), &[2], 2).unwrap()).unwrap(), [2, 2, 1]);
        let cut = sizes(Arrays::of(&bytes[..7], specs(), &[2], 2).unwrap());
        assert!(cut.unwrap_err().to_string().contains("within a sample"));
        assert!(Arrays::of(&bytes[..], specs(), &[0], 2).is_err());
        assert!(Arrays::of(&bytes[..], specs(), &[usize::MAX, 2], 2).unwrap().next().is_err());
    }
}
