//! Runs cells: data and models are loaded once and shared.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::exec::Session;
use crate::finetune::{Config, NumberOr, finetune, input_specs, set_inputs};
use crate::import::Model;
use crate::kernels::isa::isa;
use crate::tensor::{DType, Tensor};
use crate::train::data::split::{chosen, relabelled};
use crate::train::data::{Dataset, degrade, open, split};
use crate::train::fit::Progress;
use crate::train::metrics::Metrics;

use super::config::{Cell, Study, Task};
use super::images;
use super::record::Record;

/// Versions of what a record's numbers mean: one more makes every cell run again.
const VERSION: u32 = 1;

/// Runs the cells of a study.
pub struct Runner {
    folder: PathBuf,
    threads: usize,
    models: HashMap<String, Arc<Model>>,
    data: HashMap<String, Arc<Dataset>>,
    hashes: HashMap<PathBuf, String>,
    scratch: tempfile::TempDir,
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

impl Runner {
    /// `threads` to compute with; 0: one per core. Results do not depend on it.
    pub fn new(study: &Study, threads: usize) -> Result<Runner> {
        let scratch = tempfile::tempdir().map_err(|e| Error::io(std::env::temp_dir(), e))?;
        Ok(Runner {
            folder: study.folder.clone(),
            threads,
            models: HashMap::new(),
            data: HashMap::new(),
            hashes: HashMap::new(),
            scratch,
        })
    }

    fn path(&self, path: &Path) -> PathBuf {
        self.folder.join(path)
    }

    /// The hash of a file, or of all files under a folder and of their names.
    fn hash(&mut self, path: &Path) -> Result<String> {
        let path = self.path(path);
        if let Some(known) = self.hashes.get(&path) {
            return Ok(known.clone());
        }
        let mut hash = Sha256::new();
        let mut open = vec![path.clone()];
        while let Some(p) = open.pop() {
            if p.is_dir() {
                let entries = std::fs::read_dir(&p).map_err(|e| Error::io(&p, e))?;
                let mut entries: Vec<PathBuf> = entries
                    .map(|e| e.map(|e| e.path()))
                    .collect::<std::io::Result<_>>()
                    .map_err(|e| Error::io(&p, e))?;
                entries.sort();
                open.extend(entries.into_iter().rev());
                continue;
            }
            let name = p.strip_prefix(&path).unwrap_or(&p).to_string_lossy().into_owned();
            hash.update(name.as_bytes());
            hash.update(std::fs::read(&p).map_err(|e| Error::io(&p, e))?);
        }
        let hash = hex(hash);
        self.hashes.insert(path, hash.clone());
        Ok(hash)
    }

    /// A hash of everything that decides a cell's result.
    pub fn fingerprint(&mut self, cell: &Cell) -> Result<String> {
        let mut hash = Sha256::new();
        hash.update(VERSION.to_le_bytes());
        let decisive = Config { threads: 0, ..cell.config.clone() };
        let told = |e: serde_json::Error| Error::Config(e.to_string());
        hash.update(serde_json::to_string(&decisive).map_err(told)?);
        hash.update(serde_json::to_string(&cell.task).map_err(told)?);
        let mut files = vec![cell.task.model.clone(), cell.task.data.clone()];
        if let NumberOr::Word(path) = &cell.task.test {
            files.push(path.into());
        }
        files.extend(cell.task.features.clone());
        if cell.config.loss.ends_with(".onnx") {
            files.push(cell.config.loss.clone().into());
        }
        for file in files {
            let of_file = self.hash(&file)?;
            hash.update(of_file);
        }
        Ok(hex(hash)[..16].to_string())
    }

    fn model(&mut self, cell: &Cell) -> Result<Arc<Model>> {
        let path = self.path(&cell.task.model);
        let key = format!("{} {:?}", path.display(), cell.config.set);
        if let Some(known) = self.models.get(&key) {
            return Ok(known.clone());
        }
        let mut model = crate::import::load(&path)?;
        set_inputs(&mut model, &cell.config.set)?;
        let model = Arc::new(model);
        self.models.insert(key, model.clone());
        Ok(model)
    }

    fn data(&mut self, cell: &Cell, model: &Model, path: &Path) -> Result<Arc<Dataset>> {
        let path = self.path(path);
        let specs = input_specs(model);
        let options = &cell.config.images;
        let key = format!("{} {specs:?} {options:?} {}", path.display(), cell.task.worn);
        if let Some(known) = self.data.get(&key) {
            return Ok(known.clone());
        }
        let mut data = open(&path, options, &specs)?.bind(&specs)?;
        if let Some(camera) = cell.task.camera() {
            data = degrade(&data, &camera)?;
        }
        let data = Arc::new(data);
        self.data.insert(key, data.clone());
        Ok(data)
    }

    /// Runs a cell from its beginning.
    pub fn run(&mut self, cell: &Cell, observe: &mut dyn FnMut(&Progress)) -> Result<Record> {
        let fingerprint = self.fingerprint(cell)?;
        let model = self.model(cell)?;
        let all = self.data(cell, &model, &cell.task.data.clone())?;
        let (pool, test) = match &cell.task.test {
            NumberOr::Word(path) => {
                let test = self.data(cell, &model, path.as_ref())?;
                ((0..all.len()).collect(), test.as_ref().clone())
            }
            NumberOr::Number(n) => {
                if *n >= all.len() as f64 {
                    let what = format!("{}: test {n} of data that holds {}", cell.name, all.len());
                    return Err(Error::Data(what));
                }
                // The same samples in every cell of every study.
                let parts = split(all.len(), n / all.len() as f64, 0, all.labels())?;
                (parts.train, all.subset(&parts.held)?)
            }
        };
        let mut train = training_data(&all, pool, &cell.task, cell.seed)?;
        let mut test = test;
        if cell.task.autoencoder {
            (train, test) = (train.with_input_as_target()?, test.with_input_as_target()?);
        }
        let given = cell.task.features.is_some().then(|| test.clone());
        let mut config = Config { guard: false, threads: self.threads, ..cell.config.clone() };
        if config.loss.ends_with(".onnx") {
            config.loss = self.path(config.loss.as_ref()).to_string_lossy().into_owned();
        }
        let output = self.scratch.path().join("cell.onnx");
        let started = Instant::now();
        let (mut last, mut steps) = (None, Vec::new());
        let done = finetune(model, train, Some(test), &config, &output, &mut |p| {
            steps.extend(last.replace(Instant::now()).map(|before: Instant| before.elapsed()));
            observe(p);
        })?;
        let mut done = done;
        let measures = match (&given, cell.task.features.clone()) {
            (Some(given), Some(path)) => self.compared(&mut done.session, given, &path)?,
            _ => BTreeMap::new(),
        };
        let s = done.summary;
        let (Some(before), Some(after)) = (s.before, s.after) else {
            return Err(Error::Config(format!("{}: nothing to measure on", cell.name)));
        };
        Ok(Record {
            cell: cell.name.clone(),
            fingerprint,
            point: cell.point.clone(),
            arm: cell.arm.clone(),
            seed: cell.seed,
            // Records are committed: what no table tells of the network before stays out.
            before: Metrics { precision: None, recall: None, f1: None, ..before },
            after,
            measures,
            steps: s.steps,
            skipped_steps: s.skipped_steps,
            seconds: thousandths(started.elapsed().as_secs_f64()),
            step_ms: thousandths(median(steps).as_secs_f64() * 1e3),
            threads: done.session.threads(),
            isa: format!("{:?}", isa()).to_lowercase(),
        })
    }
}

/// Images that an autoencoder gives back together.
const TOGETHER: usize = 100;

impl Runner {
    /// How close the first output, images, is to the input.
    fn compared(
        &mut self,
        session: &mut Session,
        given: &Dataset,
        classifier: &Path,
    ) -> Result<BTreeMap<String, f64>> {
        let classifier = Arc::new(crate::import::load(self.path(classifier))?);
        let (mut x, mut y): (Vec<f32>, Vec<f32>) = (Vec::new(), Vec::new());
        let mut sample = Vec::new();
        let all: Vec<usize> = (0..given.len()).collect();
        let typed = |t: &Tensor| {
            Ok(t.cast(DType::F32).get::<f32>().map_err(|e| Error::Data(e.to_string()))?.to_vec())
        };
        for picks in all.chunks(TOGETHER) {
            let mut batch = given.new_batch(picks.len());
            given.batch(picks, None, &mut batch)?;
            let outputs = session.forward(&batch.inputs)?;
            let (Some((_, a)), Some((_, b))) = (batch.inputs.first(), outputs.first()) else {
                return Err(Error::Config("an autoencoder has an input and an output".into()));
            };
            if a.len() != b.len() {
                let what = format!("the first output {:?} is no image of the input {:?}", b.dims(), a.dims());
                return Err(Error::Config(what));
            }
            sample = a.dims()[1..].to_vec();
            let (a, b): (Vec<f32>, Vec<f32>) = (typed(a)?, typed(b)?);
            x.extend(a);
            y.extend(b);
        }
        let [.., h, w] = sample[..] else {
            return Err(Error::Config("features: the input is no image".into()));
        };
        let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
        let similarity = images::ssim(&wide(&x), &wide(&y), h, w);
        let dims = [&[given.len()], &sample[..]].concat();
        let tensor = |x: &[f32]| Tensor::from_slice(&dims, x).map_err(|e| Error::Data(e.to_string()));
        let (a, d) = images::features(&classifier, &tensor(&x)?, self.threads)?;
        let (b, _) = images::features(&classifier, &tensor(&y)?, self.threads)?;
        Ok(BTreeMap::from([
            ("SSIM".to_string(), similarity),
            ("Fréchet".to_string(), images::frechet(&a, &b, d)),
        ]))
    }
}

fn thousandths(x: f64) -> f64 {
    (x * 1e3).round() / 1e3
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

/// What a cell trains on: some samples of `pool`, noisy labels, others without a label.
fn training_data(all: &Dataset, pool: Vec<usize>, task: &Task, seed: u64) -> Result<Dataset> {
    let labels = all.labels();
    let wanted = task.samples.unwrap_or(pool.len() - task.unlabelled.min(pool.len()));
    if wanted + task.unlabelled > pool.len() {
        let what = format!("{} samples to train on are wanted of {}", wanted + task.unlabelled, pool.len());
        return Err(Error::Data(what));
    }
    let of = |from: &[usize]| labels.map(|l| from.iter().map(|i| l[*i]).collect::<Vec<i64>>());
    let (mut picked, rest) = chosen(&pool, wanted, seed, of(&pool).as_deref())?;
    if task.label_noise == 0.0 && task.unlabelled == 0 {
        return all.subset(&picked);
    }
    let Some(mut own) = of(&picked) else {
        return Err(Error::Data("label-noise and unlabelled need data with one label a sample".into()));
    };
    if task.label_noise > 0.0 {
        relabelled(&mut own, task.label_noise, all.target_classes().unwrap_or(0), seed);
    }
    if task.unlabelled > 0 {
        let (more, _) = chosen(&rest, task.unlabelled, seed, of(&rest).as_deref())?;
        own.extend(std::iter::repeat_n(-1, more.len()));
        picked.extend(more);
    }
    all.subset(&picked)?.with_labels(&own)
}
