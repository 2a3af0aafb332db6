//! What is kept of every training sample from epoch to epoch: its perturbation, or its gradient.

use crate::error::{Error, OpError, Result};
use crate::exec::{Purpose, Session};
use crate::float_dispatch;
use crate::graph::StateId;
use crate::tensor::{Float, Meta, Tensor, ViewMut};

/// The rows of one perturbed value: a state of one row a sample of the training data, part of checkpoints.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kept {
    rows: StateId,
}

fn at_rows<T>(r: std::result::Result<T, OpError>) -> Result<T> {
    r.map_err(|source| Error::Op { node: "ICP, what is kept of a sample".into(), source })
}

impl Kept {
    /// Rows for `samples` samples of a value with the batch's shape `meta`, found again by name.
    pub fn new(session: &mut Session, name: &str, meta: &Meta, samples: usize) -> Result<Kept> {
        let mut dims = meta.dims.clone();
        match dims.first_mut() {
            Some(first) if samples > 0 => *first = samples,
            _ => {
                return Err(Error::Config(format!(
                    "--icp-reuse keeps a row a training sample, and '{name}' has no dimension of samples"
                )));
            }
        }
        let store = session.store_mut();
        let full = format!("icp.kept.{name}");
        let meta = Meta::new(meta.dtype, &dims);
        meta.check_size().map_err(|source| Error::Op { node: full.clone(), source })?;
        let rows = store.find(&full).unwrap_or_else(|| store.add(full, meta, Purpose::Sample));
        Ok(Kept { rows })
    }

    fn row_bytes(&self, session: &Session, samples: &[usize], batch: StateId) -> Result<usize> {
        let (all, some) = (session.store().meta(self.rows), session.store().meta(batch));
        let n = all.dims.first().copied().unwrap_or(0);
        if some.dims.first() != Some(&samples.len()) || samples.iter().any(|s| *s >= n) {
            return Err(Error::Config(format!(
                "--icp-reuse: a batch of {} samples of {n} does not fit what is perturbed, {:?}",
                samples.len(),
                some.dims.as_slice()
            )));
        }
        Ok(all.bytes() / n.max(1))
    }

    /// The samples' rows into a state of the batch's shape.
    pub fn load(&self, session: &mut Session, samples: &[usize], into: StateId) -> Result<()> {
        let size = self.row_bytes(session, samples, into)?;
        let store = session.store_mut();
        for (k, s) in samples.iter().enumerate() {
            store.copy_bytes(self.rows, s * size..(s + 1) * size, into, k * size);
        }
        Ok(())
    }

    /// A state of the batch's shape into the samples' rows.
    pub fn save(&self, session: &mut Session, samples: &[usize], from: StateId) -> Result<()> {
        let size = self.row_bytes(session, samples, from)?;
        let store = session.store_mut();
        for (k, s) in samples.iter().enumerate() {
            store.copy_bytes(from, k * size..(k + 1) * size, self.rows, s * size);
        }
        Ok(())
    }

    /// Adds the samples' rows to a state of the batch's shape.
    pub fn add(&self, session: &mut Session, samples: &[usize], to: StateId) -> Result<()> {
        let clean = session.store().tensor(to);
        self.load(session, samples, to)?;
        let add = |x: &mut ViewMut| float_dispatch!(x.dtype, T => sum::<T>(x, &clean));
        at_rows(session.store_mut().edit(to, add))
    }

    /// Saves what `x` differs from `clean` by, both of the batch's shape.
    pub fn save_difference(
        &self,
        session: &mut Session,
        samples: &[usize],
        x: StateId,
        clean: StateId,
    ) -> Result<()> {
        let size = self.row_bytes(session, samples, x)?;
        let (moved, clean) = (session.store().tensor(x), session.store().tensor(clean));
        let differ = |rows: &mut ViewMut| float_dispatch!(rows.dtype, T => difference::<T>(rows, &moved, &clean, samples, size));
        at_rows(session.store_mut().edit(self.rows, differ))
    }
}

/// `x += y`.
fn sum<T: Float>(x: &mut ViewMut, y: &Tensor) -> std::result::Result<(), OpError> {
    x.get::<T>()?.iter_mut().zip(y.get::<T>()?).for_each(|(x, y)| *x += *y);
    Ok(())
}

/// The samples' rows, of `size` bytes each, become `moved − clean`.
fn difference<T: Float>(
    rows: &mut ViewMut,
    moved: &Tensor,
    clean: &Tensor,
    samples: &[usize],
    size: usize,
) -> std::result::Result<(), OpError> {
    let row = size / size_of::<T>();
    let (rows, moved, clean) = (rows.get::<T>()?, moved.get::<T>()?, clean.get::<T>()?);
    for (k, s) in samples.iter().enumerate() {
        let of_batch = moved[k * row..].iter().zip(&clean[k * row..]);
        rows[s * row..(s + 1) * row].iter_mut().zip(of_batch).for_each(|(d, (x, c))| *d = *x - *c);
    }
    Ok(())
}
