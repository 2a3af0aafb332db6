//! `retune perturb`: what ICP does to inputs, as a picture and as arrays.

use std::path::PathBuf;

use anyhow::Context;
use image::{ExtendedColorType, ImageEncoder as _};

use crate::atomic;
use crate::exec::{Options, Session};
use crate::finetune::{Config, Finished, MethodName, check_target};
use crate::icp::{Trace, trace};
use crate::tensor::Tensor;
use crate::train::data::{Dataset, write_npz};
use crate::train::select::Select;
use crate::train::step::{Recipe, Shapes, reached};

use super::config::{Overrides, Switches, resolve};

#[derive(clap::Args)]
pub struct Args {
    model: PathBuf,
    /// .npz, folder of class folders, or IDX images file
    #[arg(long)]
    data: PathBuf,
    /// Folder for strip.png and perturbation.npz
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// How many of the data's first samples
    #[arg(long, default_value_t = 8)]
    samples: usize,
    #[command(flatten)]
    overrides: Overrides,
    #[command(flatten)]
    switches: Switches,
    #[command(flatten)]
    images: super::data::ImageArgs,
    #[arg(long)]
    json: bool,
}

/// Points of the path that a strip shows at most: beyond, they are thinned.
const MOST_SHOWN: usize = 21;
/// Strips are made larger until an image has about so many pixels a side.
const SIDE: usize = 84;

#[derive(serde::Serialize)]
struct Report {
    /// K.
    steps: usize,
    perturbed: Vec<String>,
    /// The task loss at the clean batch and after each step.
    losses: Vec<f64>,
    samples: Vec<Sample>,
    arrays: PathBuf,
    /// Absent where what is perturbed are no images.
    strip: Option<PathBuf>,
    /// What the strip's last column multiplies the difference by.
    amplified: Option<f64>,
}

#[derive(serde::Serialize)]
struct Sample {
    #[serde(skip_serializing_if = "Option::is_none")]
    label: Option<i64>,
    /// Clean, and after each step; empty without labels.
    losses: Vec<f64>,
    /// Of the label.
    probabilities: Vec<f64>,
    /// How far the last step's result lies from the clean sample: Euclidean, and the largest element.
    l2: f64,
    linf: f64,
}

pub fn main(args: &Args) -> anyhow::Result<u8> {
    let mut config = resolve(&args.overrides, &args.switches)?;
    config.method = MethodName::Icp;
    config.check()?;
    config.images = args.images.over(config.images.clone());
    let model = super::data::load(&args.model, &config.set)?;
    let data = super::data::bound(&model, &args.data, &config.images)?;
    let options = Options { threads: config.threads, seed: config.seed, ..Options::default() };
    let mut session = Session::new(model.clone(), options)?;
    let loss = config.loss()?;
    let data = check_target(&session, &loss, data)?;
    anyhow::ensure!(args.samples > 0, "--samples must be at least 1");
    let picks: Vec<usize> = (0..args.samples.min(data.len())).collect();
    let mut batch = data.new_batch(picks.len());
    data.batch(&picks, None, &mut batch)?;
    let select: Select = config.train.parse().map_err(|e| anyhow::anyhow!("--train {e}"))?;
    let of_loss = reached(&session, &loss, &Shapes::of(&batch)?)?;
    let params = select.resolve(&model)?.into_iter().filter(|w| of_loss[w.index()]).collect();
    let recipe =
        Recipe { loss, optimizer: config.optimizer(), clip: None, params, norm: config.norm, accumulate: 1 };
    let trace = trace(&mut session, &recipe, &mut config.icp()?, &batch)?;

    std::fs::create_dir_all(&args.output).with_context(|| args.output.display().to_string())?;
    let labels = batch.target.as_ref().filter(|t| t.dims().len() == 1).and_then(|t| t.to_ints().ok());
    let arrays = args.output.join("perturbation.npz");
    let all = stacked(&trace, batch.target.as_ref())?;
    write_npz(&arrays, &all.iter().map(|(name, t)| (name.as_str(), t)).collect::<Vec<_>>())?;
    let range = config.icp_settings()?.range;
    let strip = strip(&trace, range)?;
    let path = args.output.join("strip.png");
    if let Some(s) = &strip {
        atomic::write_bytes(&path, &s.png()?)?;
    }
    let report = Report {
        steps: trace.path.len() - 1,
        perturbed: trace.path[0].iter().map(|p| p.0.clone()).collect(),
        losses: trace.losses.clone(),
        samples: samples(&trace, picks.len(), labels.as_deref()),
        arrays,
        amplified: strip.as_ref().map(|s| s.amplified),
        strip: strip.map(|_| path),
    };
    if args.json {
        super::print_json(&report)?;
    } else {
        print(&report);
    }
    Ok(0)
}

fn print(r: &Report) {
    for (k, loss) in r.losses.iter().enumerate() {
        let of = |f: &dyn Fn(&Sample) -> Option<&f64>| -> Vec<f64> {
            r.samples.iter().filter_map(f).copied().collect()
        };
        let p = of(&|s| s.probabilities.get(k));
        let p = match p.is_empty() {
            true => String::new(),
            false => format!("  probability of the label {:.4}", p.iter().sum::<f64>() / p.len() as f64),
        };
        outln!("step {k:2}  loss {loss:.4}{p}");
    }
    for (i, s) in r.samples.iter().enumerate() {
        let label = s.label.map(|l| format!(", label {l}")).unwrap_or_default();
        let p = match (s.probabilities.first(), s.probabilities.last()) {
            (Some(a), Some(b)) => format!(": probability {a:.4} to {b:.4}"),
            _ => String::new(),
        };
        outln!("sample {i}{label}{p}, moved by {:.4} (at most {:.4} an element)", s.l2, s.linf);
    }
    if r.strip.is_none() {
        outln!("no strip: what is perturbed are no images");
    }
    outln!("arrays {}", r.arrays.display());
    if let (Some(path), Some(times)) = (&r.strip, r.amplified) {
        outln!("strip  {}: clean, after each step, difference ×{times:.0}", path.display());
    }
}

fn samples(trace: &Trace, n: usize, labels: Option<&[i64]>) -> Vec<Sample> {
    let (first, last) = (&trace.path[0], &trace.path[trace.path.len() - 1]);
    (0..n)
        .map(|i| {
            let (mut squares, mut linf) = (0.0, 0.0f64);
            for ((_, a), (_, b)) in first.iter().zip(last) {
                let (a, b) = (a.to_f64(), b.to_f64());
                let row = a.len() / n;
                for (a, b) in a[i * row..(i + 1) * row].iter().zip(&b[i * row..(i + 1) * row]) {
                    squares += (b - a) * (b - a);
                    linf = linf.max((b - a).abs());
                }
            }
            Sample {
                label: labels.and_then(|l| l.get(i).copied()),
                losses: trace.samples.iter().map(|s| s[i].0).collect(),
                probabilities: trace.samples.iter().map(|s| s[i].1).collect(),
                l2: squares.sqrt(),
                linf,
            }
        })
        .collect()
}

/// Per perturbed value its path [K + 1, N, …], and losses and probabilities.
fn stacked(trace: &Trace, target: Option<&Tensor>) -> anyhow::Result<Vec<(String, Tensor)>> {
    let mut arrays = Vec::new();
    for (i, (name, first)) in trace.path[0].iter().enumerate() {
        let dims = [&[trace.path.len()], first.dims()].concat();
        let mut all = Tensor::zeros(first.dtype(), &dims);
        for (to, point) in all.bytes_mut().chunks_exact_mut(first.bytes().len().max(1)).zip(&trace.path) {
            to.copy_from_slice(point[i].1.bytes());
        }
        arrays.push((name.clone(), all));
    }
    arrays.push(("loss".into(), Tensor::from_slice(&[trace.losses.len()], &trace.losses)?));
    if let Some(first) = trace.samples.first() {
        let dims = [trace.samples.len(), first.len()];
        let of = |f: fn(&(f64, f64)) -> f64| trace.samples.iter().flatten().map(f).collect::<Vec<f64>>();
        arrays.push(("sample_loss".into(), Tensor::from_slice(&dims, &of(|s| s.0))?));
        arrays.push(("probability".into(), Tensor::from_slice(&dims, &of(|s| s.1))?));
    }
    arrays.extend(target.map(|t| ("target".to_string(), t.clone())));
    Ok(arrays)
}

/// A picture: a row a sample; clean, after steps, and the difference.
struct Strip {
    width: usize,
    height: usize,
    /// 1 or 3 a pixel.
    channels: usize,
    pixels: Vec<u8>,
    amplified: f64,
}

impl Strip {
    fn png(&self) -> anyhow::Result<Vec<u8>> {
        let color = if self.channels == 3 { ExtendedColorType::Rgb8 } else { ExtendedColorType::L8 };
        let mut file = Vec::new();
        image::codecs::png::PngEncoder::new(&mut file).write_image(
            &self.pixels,
            u32::try_from(self.width)?,
            u32::try_from(self.height)?,
            color,
        )?;
        Ok(file)
    }
}

/// The first perturbed value as a picture, where it is images: (N, 1 or 3, H, W) or (N, H, W, 1 or 3). Values are shown
/// from the least to the largest of `range`, else of 0..1 where the clean ones lie there, else of the clean ones.
fn strip(trace: &Trace, range: Option<(f64, f64)>) -> anyhow::Result<Option<Strip>> {
    let clean = &trace.path[0][0].1;
    let (n, channels, h, w, last) = match *clean.dims() {
        [n, c @ (1 | 3), h, w] => (n, c, h, w, false),
        [n, h, w, c @ (1 | 3)] => (n, c, h, w, true),
        _ => return Ok(None),
    };
    let x = clean.to_f64();
    if x.is_empty() {
        return Ok(None);
    }
    let ends = x.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), x| (a.min(*x), b.max(*x)));
    let (low, high) = match range {
        Some(r) => r,
        None if ends.0 >= 0.0 && ends.1 <= 1.0 => (0.0, 1.0),
        None => ends,
    };
    let span = (high - low).max(f64::MIN_POSITIVE);
    let k = trace.path.len();
    let shown: Vec<usize> = match k {
        0..=MOST_SHOWN => (0..k).collect(),
        _ => (0..MOST_SHOWN).map(|i| i * (k - 1) / (MOST_SHOWN - 1)).collect(),
    };
    let moved = trace.path[k - 1][0].1.to_f64();
    let largest = x.iter().zip(&moved).fold(0.0f64, |m, (a, b)| m.max((b - a).abs())) / span;
    let amplified = if largest > 0.0 { 0.5 / largest } else { 1.0 };
    let mut columns: Vec<Vec<f64>> = shown
        .iter()
        .map(|k| trace.path[*k][0].1.to_f64().iter().map(|x| (x - low) / span).collect())
        .collect();
    columns.push(x.iter().zip(&moved).map(|(a, b)| 0.5 + amplified * (b - a) / span).collect());
    let times = (SIDE / h.max(w).max(1)).max(1);
    let (cell_w, cell_h) = (w * times + 2, h * times + 2);
    let (width, height) = (columns.len() * cell_w, n * cell_h);
    let mut pixels = vec![255u8; width * height * channels];
    for (column, values) in columns.iter().enumerate() {
        for i in 0..n {
            for y in 0..h * times {
                for x in 0..w * times {
                    let at = ((i * cell_h + 1 + y) * width + column * cell_w + 1 + x) * channels;
                    for c in 0..channels {
                        let (y, x) = (y / times, x / times);
                        let from = match last {
                            false => ((i * channels + c) * h + y) * w + x,
                            true => ((i * h + y) * w + x) * channels + c,
                        };
                        pixels[at + c] = (values[from].clamp(0.0, 1.0) * 255.0).round() as u8;
                    }
                }
            }
        }
    }
    Ok(Some(Strip { width, height, channels, pixels, amplified }))
}

/// For a report: how the loss falls along the K steps, over the first samples of `data` that have a label.
pub fn falls(done: &mut Finished, config: &Config, data: &Dataset) -> anyhow::Result<Option<Vec<f64>>> {
    let settings = config.icp_settings()?;
    if config.method != MethodName::Icp || !settings.perturbs() || settings.steps == 0 {
        return Ok(None);
    }
    let data = check_target(&done.session, &done.recipe.loss, data.clone())?;
    let mut batch = data.new_batch(data.len());
    data.batch(&(0..data.len()).collect::<Vec<_>>(), None, &mut batch)?;
    Ok(Some(trace(&mut done.session, &done.recipe, &mut config.icp()?, &batch)?.losses))
}

/// The first `n` samples that have a label.
pub fn first_labelled(data: &Dataset, n: usize) -> anyhow::Result<Dataset> {
    let labelled = |i: &usize| data.labels().is_none_or(|l| l[*i] >= 0);
    let picks: Vec<usize> = (0..data.len()).filter(labelled).take(n).collect();
    Ok(data.subset(&picks)?)
}
