//! Labels: what they must be, and samples without one beside labelled ones.

use crate::error::{Error, Result};
use crate::ops::loss::IGNORED;
use crate::tensor::{DType, Dims, Tensor};

use super::{Dataset, Storage, convert, internal};

/// The label of a sample that has none, in data.
pub const UNLABELLED: i64 = -1;

impl Dataset {
    /// Fails at the first sample whose label is not one of `0..classes` (nor [`IGNORED`], where a sample has several, or some have none), or when a named class has no output.
    pub fn check_labels(&self, classes: usize) -> Result<()> {
        if self.class_names.len() > classes {
            return Err(Error::Data(format!(
                "{} classes in the data ({}), but the model has {classes} outputs",
                self.class_names.len(),
                convert::listed(self.class_names.iter().map(String::as_str), 12),
            )));
        }
        let Some(labels) = self.target.as_ref().and_then(|t| t.get::<i64>().ok()) else { return Ok(()) };
        // In sequences and images, what is labelled so does not count.
        let ignored = |l: i64| (labels.len() > self.len || self.partly_labelled) && l == IGNORED;
        match labels.iter().position(|&l| !ignored(l) && usize::try_from(l).map_or(true, |l| l >= classes)) {
            None => Ok(()),
            Some(i) => Err(Error::Data(format!(
                "sample {}: label {} where the model has {classes} outputs (labels are 0 to {})",
                i / (labels.len() / self.len).max(1),
                labels[i],
                classes.saturating_sub(1)
            ))),
        }
    }

    /// Fails when the target holds probabilities [N, C] that are none: of another number of classes, below 0, or with a
    /// sum other than 1 (within 1e-3). Other targets pass.
    pub fn check_probabilities(&self, classes: usize) -> Result<()> {
        let Some(t) = self.target.as_ref().filter(|t| t.dtype().is_float()) else { return Ok(()) };
        if t.dims().len() != 2 {
            return Ok(());
        }
        if t.dims()[1] != classes {
            return Err(Error::Data(format!(
                "the target has rows of {} probabilities, the model {classes} outputs",
                t.dims()[1]
            )));
        }
        let rows = t.get::<f32>().map_err(internal)?.chunks_exact(classes.max(1));
        for (i, row) in rows.enumerate() {
            let sum: f64 = row.iter().map(|p| f64::from(*p)).sum();
            if row.iter().any(|p| *p < 0.0) || (sum - 1.0).abs() > 1e-3 {
                return Err(Error::Data(format!(
                    "sample {i}: its target is no distribution over classes (sum {sum}); cross-entropy takes class \
                     indices or probabilities"
                )));
            }
        }
        Ok(())
    }

    /// The same inputs with other labels, one a sample.
    ///
    /// Fails when there are not as many labels as samples.
    pub fn with_labels(mut self, labels: &[i64]) -> Result<Dataset> {
        if labels.len() != self.len {
            return Err(Error::Data(format!("{} labels for {} samples", labels.len(), self.len)));
        }
        self.target = Some(Tensor::from_slice(&[self.len], labels).map_err(internal)?);
        Ok(self)
    }

    /// The same data with its only input as the target, as float32.
    ///
    /// Fails when there are several inputs.
    pub fn with_input_as_target(mut self) -> Result<Dataset> {
        let mut batch = self.new_batch(self.len);
        self.batch(&(0..self.len).collect::<Vec<_>>(), None, &mut batch)?;
        match &batch.inputs[..] {
            [(_, x)] => self.target = Some(x.cast(DType::F32)),
            _ => return Err(Error::Data("an autoencoder has one input".into())),
        }
        self.class_names.clear();
        Ok(self)
    }

    /// The same data with samples labelled [`UNLABELLED`] out of every loss, and which those are.
    pub fn withheld(mut self) -> Result<(Dataset, Vec<usize>)> {
        let Some(labels) = self.labels() else { return Ok((self, Vec::new())) };
        let which: Vec<usize> = (0..labels.len()).filter(|i| labels[*i] == UNLABELLED).collect();
        if which.len() == labels.len() {
            return Err(Error::Data("no sample has a label".into()));
        }
        if !which.is_empty() {
            let labels: Vec<i64> =
                labels.iter().map(|l| if *l == UNLABELLED { IGNORED } else { *l }).collect();
            self = self.with_labels(&labels)?;
            self.partly_labelled = true;
        }
        Ok((self, which))
    }

    /// This data followed by the inputs of `other`, without their labels. Both must be bound to the same model.
    pub fn with_unlabelled(mut self, other: &Dataset) -> Result<Dataset> {
        let Some(labels) = self.labels() else {
            return Err(Error::Data("unlabelled samples go beside data with one label a sample".into()));
        };
        let labels: Vec<i64> =
            labels.iter().copied().chain(std::iter::repeat_n(UNLABELLED, other.len)).collect();
        let all = |d: &Dataset| -> Result<Vec<(String, Tensor)>> {
            let mut batch = d.new_batch(d.len);
            d.batch(&(0..d.len).collect::<Vec<_>>(), None, &mut batch)?;
            Ok(batch.inputs)
        };
        let (own, more) = (all(&self)?, all(other)?);
        for (c, (name, a)) in self.columns.iter_mut().zip(own).filter(|(c, _)| !c.whole) {
            let b = more.iter().find(|m| m.0 == name).map(|m| &m.1);
            let fits = |b: &&Tensor| b.dtype() == a.dtype() && b.dims()[1..] == a.dims()[1..];
            let Some(b) = b.filter(fits) else {
                return Err(Error::Data(format!(
                    "the unlabelled data do not have '{name}' as the labelled have it"
                )));
            };
            let mut dims = Dims::from_slice(a.dims());
            dims[0] = a.dims()[0] + b.dims()[0];
            let mut joined = Tensor::zeros(a.dtype(), &dims);
            let (first, second) = joined.bytes_mut().split_at_mut(a.bytes().len());
            first.copy_from_slice(a.bytes());
            second.copy_from_slice(b.bytes());
            c.storage = Storage::Array(joined);
        }
        self.len += other.len;
        self.target = Some(Tensor::from_slice(&[self.len], &labels).map_err(internal)?);
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(from: f32, labels: Option<&[i64]>) -> Dataset {
        let x = Tensor::from_slice(&[2, 2], &[from, from + 1.0, from + 2.0, from + 3.0]).unwrap();
        let y = labels.map(|l| Tensor::from_slice(&[l.len()], l).unwrap());
        Dataset::from_arrays(vec![("x".into(), x)], y).unwrap()
    }

    #[test]
    fn unlabelled_samples_follow_and_do_not_count() {
        let joined = data(0.0, Some(&[1, 0])).with_unlabelled(&data(10.0, Some(&[1, 1]))).unwrap();
        assert_eq!((joined.len(), joined.labels().unwrap()), (4, &[1, 0, -1, -1][..]));
        let mut batch = joined.new_batch(2);
        joined.batch(&[3, 0], None, &mut batch).unwrap();
        assert_eq!(batch.inputs[0].1.to_f64(), [12.0, 13.0, 0.0, 1.0]);
        assert_eq!(batch.samples(), [3, 0]);
        assert!(joined.check_labels(2).is_err());
        let (withheld, which) = joined.withheld().unwrap();
        assert_eq!((which, withheld.labels().unwrap()[2]), (vec![2, 3], IGNORED));
        withheld.check_labels(2).unwrap();
        assert!(data(0.0, None).with_unlabelled(&data(0.0, None)).is_err());
        assert!(data(0.0, Some(&[-1, -1])).withheld().is_err());
        let (same, none) = data(0.0, Some(&[0, 1])).withheld().unwrap();
        assert!(none.is_empty() && same.labels() == Some(&[0, 1]));
    }
}
