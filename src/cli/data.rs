//! Opening a model's data.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context;

use crate::exec::{Options, Precision, Session};
use crate::finetune::{check_target, input_specs, set_inputs};
use crate::import::Model;
use crate::train::data::{Dataset, ImageOptions, open};
use crate::train::loss::Loss;

/// Options of a computation.
#[derive(clap::Args, Debug, Clone)]
pub struct ComputeArgs {
    /// Threads to compute with [default: one per core]
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    threads: usize,
    /// What is kept for later is in f32, bf16 or f16
    #[arg(long, default_value = "f32")]
    precision: Precision,
}

impl ComputeArgs {
    pub fn options(&self) -> Options {
        Options { threads: self.threads, precision: self.precision, ..Options::default() }
    }
}

/// Options of data that are images.
#[derive(clap::Args, Debug, Clone, Default)]
pub struct ImageArgs {
    /// Factor on the pixels' 0..255 [default: 1/255]
    #[arg(long, value_name = "FACTOR")]
    pub scale: Option<f32>,
    /// Subtracted from scaled pixels: one number, or one per channel
    #[arg(long, value_delimiter = ',', value_name = "M,…")]
    pub mean: Vec<f32>,
    /// Divides pixels after that: one number, or one per channel
    #[arg(long, value_delimiter = ',', value_name = "S,…")]
    pub std: Vec<f32>,
}

impl ImageArgs {
    /// Overrides what is given here.
    pub fn over(&self, mut options: ImageOptions) -> ImageOptions {
        options.scale = self.scale.or(options.scale);
        if !self.mean.is_empty() {
            options.mean.clone_from(&self.mean);
        }
        if !self.std.is_empty() {
            options.std.clone_from(&self.std);
        }
        options
    }
}

/// Inputs that are no data.
#[derive(clap::Args, Debug, Clone, Default)]
pub struct SetArgs {
    /// An input that is the same for every sample: a number, numbers joined by commas, or an .npz
    #[arg(long, value_name = "NAME=VALUE")]
    pub set: Vec<String>,
}

/// The model, with the inputs of `--set` bound.
pub fn load(path: &Path, set: &[String]) -> anyhow::Result<Arc<Model>> {
    let mut model = crate::import::load(path)?;
    set_inputs(&mut model, set)?;
    Ok(Arc::new(model))
}

/// Opens data and binds them to the model's inputs.
pub fn bound(model: &Model, path: &Path, options: &ImageOptions) -> anyhow::Result<Dataset> {
    let specs = input_specs(model);
    let data = open(path, options, &specs)?;
    data.bind(&specs).with_context(|| path.display().to_string())
}

/// A session with data whose target fits the loss.
pub fn with_target(
    model: &Arc<Model>,
    data: Dataset,
    loss: &Loss,
    options: Options,
) -> anyhow::Result<(Session, Dataset)> {
    let session = Session::new(model.clone(), options)?;
    let data = check_target(&session, loss, data)?;
    Ok((session, data))
}
