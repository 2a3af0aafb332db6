//! Data for training and evaluation: named input arrays and a target, sample-major, in memory, with random access.
//!
//! ```text
//! open(path) ─┐
//! from_arrays ┴→ Dataset ─bind→ names, types and shapes the model wants ─batch(indices)→ tensors of one step
//! ```
//!
//! What a step reads is a pure function of the sample indices and of ([`Augment`]) seed and epoch: never of the
//! batch's composition, of threads, or of where a run was resumed. [`split`] decides which samples those are.

mod bind;
mod convert;
pub mod degrade;
mod folds;
mod labels;
mod memory;
pub mod split;
pub mod transform;

#[cfg(feature = "cli")]
mod frame;
#[cfg(feature = "cli")]
mod idx;
#[cfg(feature = "cli")]
mod images;
#[cfg(feature = "cli")]
pub mod npz;
#[cfg(feature = "cli")]
mod open;

pub use degrade::{SHIFTS, Worn, degrade};
pub use folds::folds;
pub use labels::UNLABELLED;
pub use memory::{Memory, Samples};
#[cfg(feature = "cli")]
pub use npz::{npy_bytes, read_npy, read_npz, write_npz};
#[cfg(feature = "cli")]
pub use open::open;
pub use split::{Split, epoch_order, split};
pub use transform::{Augmentation, Channels, ImageOptions, Layout};

use crate::error::{Error, OpError, Result};
use crate::tensor::{DType, Dims, Tensor};
use transform::Planes;

/// What a model declares of one of its inputs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputSpec {
    pub name: String,
    pub dtype: DType,
    /// Declared dimensions, samples first, `None` where symbolic; empty when the model declares no shape.
    /// The first one is not compared: batches of any size are cut.
    pub dims: Vec<Option<usize>>,
}

impl InputSpec {
    pub fn new(name: impl Into<String>, dtype: DType, dims: &[Option<usize>]) -> Self {
        InputSpec { name: name.into(), dtype, dims: dims.to_vec() }
    }
}

/// Seeds of random augmentation: with the sample's index they decide what happens to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Augment {
    pub seed: u64,
    pub epoch: u64,
}

/// What one step reads.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// One `[N, …]` tensor per model input, in the order the model declares them.
    pub inputs: Vec<(String, Tensor)>,
    /// int64 class labels (`[N]`, or `[N, …]` for dense labels) or float32 `[N, …]`; `None` for unlabelled data.
    pub target: Option<Tensor>,
    /// Which samples of the data these are.
    samples: Vec<usize>,
    len: usize,
}

impl Batch {
    /// The samples' places in the data that they were taken from.
    pub fn samples(&self) -> &[usize] {
        &self.samples
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// Where an input's elements are kept.
#[derive(Debug, Clone)]
enum Storage {
    /// `[N, …]`; converted per batch when the model's type is wider than the stored one.
    Array(Tensor),
    /// Bytes in the model's layout, and what each stands for: `table` is `[C, 256]` in the model's type.
    Pixels { bytes: Vec<u8>, table: Tensor },
}

#[derive(Debug, Clone)]
struct Column {
    name: String,
    storage: Storage,
    /// Type of the batch's tensor.
    dtype: DType,
    /// Dimensions of one sample.
    dims: Dims,
    /// How one sample divides into image planes: needed by the table and the augmentation.
    planes: Planes,
    augmentation: Augmentation,
    /// Not one row a sample: fed as it is with every batch, `dims` being all of its dimensions.
    whole: bool,
}

impl Column {
    fn sample_len(&self) -> usize {
        self.dims.iter().product()
    }
}

/// Named inputs and a target, all of the same number of samples.
#[derive(Debug, Clone)]
pub struct Dataset {
    columns: Vec<Column>,
    target: Option<Tensor>,
    class_names: Vec<String>,
    notes: Vec<String>,
    /// Samples may be labelled `IGNORED`: see [`Dataset::withheld`].
    partly_labelled: bool,
    len: usize,
}

impl Dataset {
    /// A dataset of `[N, …]` arrays in memory. Integer and boolean targets become int64 labels (`[N, 1]` becomes
    /// `[N]`), floating-point ones float32. Follow with [`Dataset::bind`].
    ///
    /// Fails when there is no sample, when the arrays disagree on N, or at the first sample that is not finite.
    pub fn from_arrays(inputs: Vec<(String, Tensor)>, target: Option<Tensor>) -> Result<Dataset> {
        let mut len = None;
        for (name, t) in
            inputs.iter().map(|(n, t)| (n.as_str(), t)).chain(target.iter().map(|t| ("target", t)))
        {
            let Some(&n) = t.dims().first() else {
                return Err(Error::Data(format!("array '{name}' is a scalar: data has one row per sample")));
            };
            match len {
                None => len = Some((name, n)),
                Some((first, m)) if m != n => {
                    return Err(Error::Data(format!(
                        "arrays disagree on the number of samples: '{first}' has {m}, '{name}' has {n}"
                    )));
                }
                _ => {}
            }
            convert::check_finite(name, t)?;
        }
        let len = match len {
            None => return Err(Error::Data("no input array".into())),
            Some((name, 0)) => return Err(Error::Data(format!("array '{name}' holds no samples"))),
            Some((_, n)) => n,
        };
        let columns = inputs
            .into_iter()
            .map(|(name, t)| {
                let dims = Dims::from_slice(&t.dims()[1..]);
                let planes = Planes::flat(dims.iter().product());
                let augmentation = Augmentation::default();
                let (dtype, storage) = (t.dtype(), Storage::Array(t));
                Column { name, dtype, dims, planes, augmentation, storage, whole: false }
            })
            .collect();
        let target = target.map(normal_target).transpose()?;
        Ok(Dataset {
            columns,
            target,
            class_names: Vec::new(),
            notes: Vec::new(),
            partly_labelled: false,
            len,
        })
    }

    /// As [`Dataset::from_arrays`] for a model with these inputs: an array of exactly the shape that its input declares,
    /// all of it fixed, and of another first dimension than N, holds no samples but what every batch is fed with, such
    /// as a recurrent layer's initial state. So does a scalar.
    ///
    /// N is the target's first dimension, without one the first array's that an input leaves open.
    pub fn for_inputs(
        arrays: Vec<(String, Tensor)>,
        target: Option<Tensor>,
        inputs: &[InputSpec],
    ) -> Result<Dataset> {
        let whole = |name: &str, t: &Tensor| {
            let declared = inputs.iter().find(|i| i.name == name).map(|i| i.dims.as_slice());
            declared.is_some_and(|d| {
                d.len() == t.dims().len() && d.iter().zip(t.dims()).all(|(d, n)| *d == Some(*n))
            })
        };
        let first = |t: &Tensor| t.dims().first().copied();
        let open = arrays.iter().find(|(name, t)| !whole(name, t)).or(arrays.first()).map(|(_, t)| t);
        let samples = target.as_ref().or(open).and_then(first);
        let (whole, rows): (Vec<_>, Vec<_>) =
            arrays.into_iter().partition(|(name, t)| first(t) != samples && whole(name, t));
        if rows.is_empty() {
            return Dataset::from_arrays(whole, target);
        }
        let mut data = Dataset::from_arrays(rows, target)?;
        for (name, t) in whole {
            convert::check_finite(&name, &t)?;
            data.columns.push(Column {
                name,
                dtype: t.dtype(),
                dims: Dims::from_slice(t.dims()),
                planes: Planes::flat(t.len()),
                augmentation: Augmentation::default(),
                storage: Storage::Array(t),
                whole: true,
            });
        }
        Ok(data)
    }

    /// Images as bytes, `[N, …]` in the frame's layout, with what is fed for each byte value.
    #[cfg(feature = "cli")]
    fn from_pixels(
        spec: &InputSpec,
        frame: &frame::Frame,
        bytes: Vec<u8>,
        table: Tensor,
        options: &ImageOptions,
        labels: Option<Vec<i64>>,
    ) -> Result<Dataset> {
        let len = bytes.len() / frame.len().max(1);
        if len == 0 {
            return Err(Error::Data("no image".into()));
        }
        if let Some(l) = &labels
            && l.len() != len
        {
            return Err(Error::Data(format!("{len} images but {} labels", l.len())));
        }
        let column = Column {
            name: spec.name.clone(),
            dtype: table.dtype(),
            dims: frame.dims.clone(),
            planes: frame.planes(),
            augmentation: options.augmentation(),
            storage: Storage::Pixels { bytes, table },
            whole: false,
        };
        let target = labels.map(|l| Tensor::ints(&l));
        Ok(Dataset {
            columns: vec![column],
            target,
            class_names: Vec::new(),
            notes: Vec::new(),
            partly_labelled: false,
            len,
        })
    }

    /// Number of samples, at least 1.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn input_names(&self) -> impl Iterator<Item = &str> {
        self.columns.iter().map(|c| c.name.as_str())
    }

    /// Dimensions of one sample of an input.
    pub fn sample_dims(&self, input: &str) -> Option<&[usize]> {
        self.columns.iter().find(|c| c.name == input).map(|c| c.dims.as_slice())
    }

    /// Bytes this data takes in memory.
    pub fn bytes(&self) -> usize {
        let inputs: usize = self
            .columns
            .iter()
            .map(|c| match &c.storage {
                Storage::Array(t) => t.bytes().len(),
                Storage::Pixels { bytes, table } => bytes.len() + table.bytes().len(),
            })
            .sum();
        inputs + self.target.as_ref().map_or(0, |t| t.bytes().len())
    }

    /// What a person should know of how the data was read: skipped files, unused arrays, labels not found.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Names of the classes, in label order, where the data has names (a folder per class); otherwise empty.
    pub fn class_names(&self) -> &[String] {
        &self.class_names
    }

    /// The whole target, `[N, …]`.
    pub fn target(&self) -> Option<&Tensor> {
        self.target.as_ref()
    }

    /// The whole target, or an error that says what is missing.
    pub fn require_target(&self) -> Result<&Tensor> {
        self.target.as_ref().ok_or_else(|| {
            let mut why = "the data has no target".to_string();
            for n in &self.notes {
                why.push_str("; ");
                why.push_str(n);
            }
            Error::Data(why)
        })
    }

    /// Class labels, when there is one per sample.
    pub fn labels(&self) -> Option<&[i64]> {
        self.target.as_ref().filter(|t| t.dims().len() == 1).and_then(|t| t.get::<i64>().ok())
    }

    /// Number of classes: of named ones, or the largest label plus one. `None` without integer labels.
    pub fn target_classes(&self) -> Option<usize> {
        let labels = self.target.as_ref()?.get::<i64>().ok()?;
        let largest = labels.iter().copied().max()?;
        Some(self.class_names.len().max(usize::try_from(largest).map_or(0, |l| l + 1)))
    }

    /// The same data with its target as float32, one row of `dims` per sample: for losses that compare numbers
    /// (BCE, MSE) with a model whose output is `[N, dims…]`.
    ///
    /// Fails when a row holds another number of elements.
    pub fn float_target(mut self, dims: &[usize]) -> Result<Dataset> {
        let target = self.require_target()?.cast(DType::F32);
        let mut want = Dims::from_slice(&[self.len]);
        want.extend_from_slice(dims);
        let had = target.dims()[1..].to_vec();
        let reshaped = target.reshaped(&want).map_err(|_| {
            Error::Data(format!("the target has rows of shape {had:?}, the model's output has {dims:?}"))
        })?;
        self.target = Some(reshaped);
        Ok(self)
    }

    /// The same data with random shifts by up to ± `max` pixels in both directions, edge-filled, drawn anew each
    /// epoch when a batch is taken with [`Augment`].
    ///
    /// Fails when no input holds images (`[N, C, H, W]` or `[N, H, W, C]`, floating point).
    pub fn with_shift(self, max: usize, layout: Layout) -> Result<Dataset> {
        self.with_augmentation(Augmentation { shift: max, ..Augmentation::default() }, layout)
    }

    /// The same data, its images changed at random when a batch is taken with [`Augment`].
    ///
    /// Fails when no input holds images (`[N, C, H, W]` or `[N, H, W, C]`, floating point).
    pub fn with_augmentation(mut self, augmentation: Augmentation, layout: Layout) -> Result<Dataset> {
        augmentation.check()?;
        let mut images = 0;
        for c in &mut self.columns {
            match &mut c.storage {
                Storage::Pixels { .. } => {}
                Storage::Array(t) if c.dims.len() == 3 && c.dtype.is_float() && !c.whole => {
                    if t.dtype() != c.dtype {
                        *t = convert::array(&c.name, t, c.dtype)?;
                    }
                    c.planes = Planes::of(&c.dims, layout);
                }
                Storage::Array(_) => continue,
            }
            c.augmentation = augmentation;
            images += 1;
        }
        if images == 0 && !augmentation.is_none() {
            return Err(Error::Config(
                "shift, flip, rotate, crop: no input of the data is a batch of images".into(),
            ));
        }
        Ok(self)
    }

    /// The samples at `indices`, in that order, as a dataset of their own.
    pub fn subset(&self, indices: &[usize]) -> Result<Dataset> {
        self.check_indices(indices)?;
        if indices.is_empty() {
            return Err(Error::Data("a subset of no samples".into()));
        }
        let mut columns = Vec::with_capacity(self.columns.len());
        for c in &self.columns {
            let storage = match &c.storage {
                Storage::Array(t) if c.whole => Storage::Array(t.clone()),
                Storage::Array(t) => Storage::Array(rows(t, indices)),
                Storage::Pixels { bytes, table } => {
                    let n = c.sample_len();
                    let bytes = indices.iter().flat_map(|i| &bytes[i * n..(i + 1) * n]).copied().collect();
                    Storage::Pixels { bytes, table: table.clone() }
                }
            };
            columns.push(Column { storage, ..c.clone_shape() });
        }
        Ok(Dataset {
            columns,
            target: self.target.as_ref().map(|t| rows(t, indices)),
            class_names: self.class_names.clone(),
            notes: self.notes.clone(),
            partly_labelled: self.partly_labelled,
            len: indices.len(),
        })
    }

    /// A batch of `n` samples to be filled by [`Dataset::batch`]; all zero.
    pub fn new_batch(&self, n: usize) -> Batch {
        let sized = |dtype, sample: &[usize]| {
            let mut dims = Dims::from_slice(&[n]);
            dims.extend_from_slice(sample);
            Tensor::zeros(dtype, &dims)
        };
        Batch {
            inputs: self
                .columns
                .iter()
                .map(|c| match c.whole {
                    true => (c.name.clone(), Tensor::zeros(c.dtype, &c.dims)),
                    false => (c.name.clone(), sized(c.dtype, &c.dims)),
                })
                .collect(),
            target: self.target.as_ref().map(|t| sized(t.dtype(), &t.dims()[1..])),
            samples: vec![0; n],
            len: n,
        }
    }

    /// Fills `out` with the samples at `indices`, in that order; shifted, mirrored, turned and cropped at random where the data asks for it and
    /// `augment` is given (training), as they are otherwise.
    ///
    /// Allocates only when `out` was made for another number of samples or another dataset: keep one batch for
    /// full steps and one for the last, partial one.
    pub fn batch(&self, indices: &[usize], augment: Option<Augment>, out: &mut Batch) -> Result<()> {
        self.check_indices(indices)?;
        if !self.fits(out, indices.len()) {
            *out = self.new_batch(indices.len());
        }
        out.samples.copy_from_slice(indices);
        for (c, (_, t)) in self.columns.iter().zip(&mut out.inputs) {
            let n = c.sample_len();
            if n == 0 {
                continue;
            }
            let size = c.dtype.size();
            if let (true, Storage::Array(a)) = (c.whole, &c.storage) {
                if a.dtype() == c.dtype {
                    t.bytes_mut().copy_from_slice(a.bytes());
                } else {
                    convert::bytes(a.dtype(), a.bytes(), c.dtype, t.bytes_mut());
                }
                continue;
            }
            for (&i, dst) in indices.iter().zip(t.bytes_mut().chunks_exact_mut(n * size)) {
                let place = match augment {
                    Some(a) if !c.augmentation.is_none() => c.augmentation.draw(a, i, c.planes),
                    _ => transform::Placement::default(),
                };
                match &c.storage {
                    Storage::Pixels { bytes, table } => {
                        transform::look_up(&bytes[i * n..(i + 1) * n], table, c.planes, place, dst)?;
                    }
                    Storage::Array(a) => {
                        let from = a.dtype();
                        let row = &a.bytes()[i * n * from.size()..(i + 1) * n * from.size()];
                        if from != c.dtype {
                            // Checked over the whole array by `bind`: nothing here fails to convert.
                            convert::bytes(from, row, c.dtype, dst);
                        } else if place == transform::Placement::default() {
                            dst.copy_from_slice(row);
                        } else {
                            transform::placed(row, c.dtype, c.planes, place, dst)?;
                        }
                    }
                }
            }
        }
        if let (Some(all), Some(t)) = (&self.target, &mut out.target) {
            copy_rows(all, indices, t);
        }
        Ok(())
    }

    fn fits(&self, b: &Batch, n: usize) -> bool {
        let same = |t: &Tensor, dtype: DType, sample: &[usize]| {
            t.dtype() == dtype && t.dims().split_first() == Some((&n, sample))
        };
        b.len == n
            && b.inputs.len() == self.columns.len()
            && self.columns.iter().zip(&b.inputs).all(|(c, (name, t))| {
                let fits = match c.whole {
                    true => t.dtype() == c.dtype && t.dims() == c.dims.as_slice(),
                    false => same(t, c.dtype, &c.dims),
                };
                *name == c.name && fits
            })
            && match (&self.target, &b.target) {
                (Some(a), Some(t)) => same(t, a.dtype(), &a.dims()[1..]),
                (None, None) => true,
                _ => false,
            }
    }

    fn check_indices(&self, indices: &[usize]) -> Result<()> {
        match indices.iter().find(|&&i| i >= self.len) {
            None => Ok(()),
            Some(i) => Err(Error::Data(format!("sample {i} of data that holds {}", self.len))),
        }
    }
}

impl Column {
    /// All but the elements.
    fn clone_shape(&self) -> Column {
        Column {
            name: self.name.clone(),
            storage: Storage::Pixels { bytes: Vec::new(), table: Tensor::zeros(DType::U8, &[0]) },
            dtype: self.dtype,
            dims: self.dims.clone(),
            planes: self.planes,
            augmentation: self.augmentation,
            whole: self.whole,
        }
    }
}

fn rows(t: &Tensor, indices: &[usize]) -> Tensor {
    let mut dims = Dims::from_slice(t.dims());
    dims[0] = indices.len();
    let mut out = Tensor::zeros(t.dtype(), &dims);
    copy_rows(t, indices, &mut out);
    out
}

/// Rows of `all` at `indices` (checked by the caller) into `out`.
fn copy_rows(all: &Tensor, indices: &[usize], out: &mut Tensor) {
    let row = all.bytes().len() / all.dims()[0].max(1);
    if row == 0 {
        return;
    }
    for (&i, dst) in indices.iter().zip(out.bytes_mut().chunks_exact_mut(row)) {
        dst.copy_from_slice(&all.bytes()[i * row..(i + 1) * row]);
    }
}

fn normal_target(t: Tensor) -> Result<Tensor> {
    if t.dtype().is_float() {
        return if t.dtype() == DType::F32 { Ok(t) } else { convert::array("target", &t, DType::F32) };
    }
    let t = if t.dtype() == DType::I64 { t } else { convert::array("target", &t, DType::I64)? };
    match *t.dims() {
        [n, 1] => t.reshaped(&[n]).map_err(internal),
        _ => Ok(t),
    }
}

fn internal(e: OpError) -> Error {
    Error::Data(e.to_string())
}

#[cfg(test)]
mod tests;
