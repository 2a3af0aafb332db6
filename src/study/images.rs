//! How close images that a network gives are to those it was given: by structure, and as a distribution.

use crate::error::{Error, Result};
use crate::exec::{Options, Session};
use crate::graph::{self, Source};
use crate::import::Model;
use crate::ops::Mode;
use crate::plan::Request;
use crate::tensor::{Meta, Tensor};
use crate::train::step::{Network, Shapes};
use std::collections::HashMap;
use std::sync::Arc;

/// Images that a classifier looks at together.
const TOGETHER: usize = 100;
/// Of the structural similarity: the window's side, and its Gaussian's standard deviation.
const WINDOW: usize = 11;
const SIGMA: f64 = 1.5;

/// The mean structural similarity of planes of `h` by `w` values in 0..1 (Wang et al. 2004: Gaussian windows of 11 by 11,
/// those that lie within the image).
pub fn ssim(a: &[f64], b: &[f64], h: usize, w: usize) -> f64 {
    let (c1, c2) = (0.01f64.powi(2), 0.03f64.powi(2));
    if h < WINDOW || w < WINDOW || a.len() != b.len() || a.is_empty() {
        return f64::NAN;
    }
    let middle = (WINDOW / 2) as f64;
    let mut kernel: Vec<f64> =
        (0..WINDOW).map(|i| (-(i as f64 - middle).powi(2) / (2.0 * SIGMA * SIGMA)).exp()).collect();
    let total: f64 = kernel.iter().sum();
    kernel.iter_mut().for_each(|k| *k /= total);
    let smooth = |x: &[f64]| -> Vec<f64> {
        let (oh, ow) = (h - WINDOW + 1, w - WINDOW + 1);
        let rows: Vec<f64> =
            (0..h * ow).map(|i| (0..WINDOW).map(|k| kernel[k] * x[i / ow * w + i % ow + k]).sum()).collect();
        (0..oh * ow).map(|i| (0..WINDOW).map(|k| kernel[k] * rows[i + k * ow]).sum()).collect()
    };
    let (mut sum, mut places) = (0.0, 0usize);
    for (a, b) in a.chunks_exact(h * w).zip(b.chunks_exact(h * w)) {
        let of = |f: &dyn Fn(f64, f64) -> f64| -> Vec<f64> {
            smooth(&a.iter().zip(b).map(|(a, b)| f(*a, *b)).collect::<Vec<f64>>())
        };
        let (ma, mb) = (of(&|a, _| a), of(&|_, b| b));
        let (aa, bb, ab) = (of(&|a, _| a * a), of(&|_, b| b * b), of(&|a, b| a * b));
        for i in 0..ma.len() {
            let (va, vb, cov) = (aa[i] - ma[i] * ma[i], bb[i] - mb[i] * mb[i], ab[i] - ma[i] * mb[i]);
            let luminance = (2.0 * ma[i] * mb[i] + c1) / (ma[i] * ma[i] + mb[i] * mb[i] + c1);
            sum += luminance * (2.0 * cov + c2) / (va + vb + c2);
        }
        places += ma.len();
    }
    sum / places as f64
}

/// The Fréchet distance of Gaussians fitted to rows of `d` features (Heusel et al. 2017):
/// `‖μ₁ − μ₂‖² + Tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½)`.
pub fn frechet(a: &[f64], b: &[f64], d: usize) -> f64 {
    let ((ma, ca), (mb, cb)) = (fitted(a, d), fitted(b, d));
    let means: f64 = ma.iter().zip(&mb).map(|(a, b)| (a - b).powi(2)).sum();
    let trace = |m: &[f64]| (0..d).map(|i| m[i * d + i]).sum::<f64>();
    // Tr (Σ₁Σ₂)^½ = Tr (Σ₁^½ Σ₂ Σ₁^½)^½, of a symmetric matrix.
    let (values, vectors) = eigen(ca.clone(), d);
    let root: Vec<f64> = (0..d * d)
        .map(|i| {
            (0..d).map(|k| vectors[i / d * d + k] * values[k].max(0.0).sqrt() * vectors[i % d * d + k]).sum()
        })
        .collect();
    let inner = product(&product(&root, &cb, d), &root, d);
    let (values, _) = eigen(inner, d);
    means + trace(&ca) + trace(&cb) - 2.0 * values.iter().map(|v| v.max(0.0).sqrt()).sum::<f64>()
}

/// Mean and covariance of rows of `d` numbers.
fn fitted(x: &[f64], d: usize) -> (Vec<f64>, Vec<f64>) {
    let n = (x.len() / d.max(1)) as f64;
    let mut mean = vec![0.0; d];
    for row in x.chunks_exact(d) {
        mean.iter_mut().zip(row).for_each(|(m, x)| *m += x / n);
    }
    let mut cov = vec![0.0; d * d];
    for row in x.chunks_exact(d) {
        for i in 0..d {
            for j in 0..d {
                cov[i * d + j] += (row[i] - mean[i]) * (row[j] - mean[j]) / (n - 1.0).max(1.0);
            }
        }
    }
    (mean, cov)
}

fn product(a: &[f64], b: &[f64], d: usize) -> Vec<f64> {
    (0..d * d).map(|i| (0..d).map(|k| a[i / d * d + k] * b[k * d + i % d]).sum()).collect()
}

/// Eigenvalues of a symmetric matrix, and its eigenvectors as columns, by Jacobi's rotations.
fn eigen(mut m: Vec<f64>, d: usize) -> (Vec<f64>, Vec<f64>) {
    const MOST_SWEEPS: usize = 60;
    let mut v: Vec<f64> = (0..d * d).map(|i| f64::from(u8::from(i / d == i % d))).collect();
    let size: f64 = m.iter().map(|x| x * x).sum();
    for _ in 0..MOST_SWEEPS {
        let off: f64 = (0..d * d).filter(|i| i / d != i % d).map(|i| m[i] * m[i]).sum();
        if off <= 1e-24 * size {
            break;
        }
        for p in 0..d {
            for q in p + 1..d {
                let apq = m[p * d + q];
                if apq == 0.0 {
                    continue;
                }
                let theta = (m[q * d + q] - m[p * d + p]) / (2.0 * apq);
                let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
                let t = if theta == 0.0 { 1.0 } else { t };
                let c = 1.0 / (t * t + 1.0).sqrt();
                let s = t * c;
                for k in 0..d {
                    let (a, b) = (m[k * d + p], m[k * d + q]);
                    (m[k * d + p], m[k * d + q]) = (c * a - s * b, s * a + c * b);
                }
                for k in 0..d {
                    let (a, b) = (m[p * d + k], m[q * d + k]);
                    (m[p * d + k], m[q * d + k]) = (c * a - s * b, s * a + c * b);
                }
                for k in 0..d {
                    let (a, b) = (v[k * d + p], v[k * d + q]);
                    (v[k * d + p], v[k * d + q]) = (c * a - s * b, s * a + c * b);
                }
            }
        }
    }
    ((0..d).map(|i| m[i * d + i]).collect(), v)
}

/// What a classifier's last dense layer reads of images `[N, …]`: rows of features, and how many a row has.
pub fn features(classifier: &Arc<Model>, images: &Tensor, threads: usize) -> Result<(Vec<f64>, usize)> {
    let mut session = Session::new(classifier.clone(), Options { threads, ..Options::default() })?;
    let Some(input) = classifier.graph.inputs.first().filter(|_| classifier.graph.inputs.len() == 1) else {
        return Err(Error::Config(format!("{} is no classifier of images", classifier.path.display())));
    };
    let name = classifier.graph.value(*input).name.clone();
    let row = images.bytes().len() / images.dims()[0].max(1);
    let (mut all, mut d) = (Vec::new(), 0);
    for part in images.bytes().chunks(row.max(1) * TOGETHER) {
        let mut dims = images.dims().to_vec();
        dims[0] = part.len() / row.max(1);
        let mut x = Tensor::zeros(images.dtype(), &dims);
        x.bytes_mut().copy_from_slice(part);
        let shapes = Shapes { inputs: vec![(name.clone(), x.meta())], target: Meta::new(x.dtype(), &[1]) };
        let mut net = Network::new(&session, Mode::EVAL, &shapes, &HashMap::new())?;
        let output = net.graph.outputs.first().copied();
        let output = output.ok_or_else(|| Error::Config("the classifier has no output".into()))?;
        let mut v = graph::logits(&net.graph, output).0;
        let read = loop {
            let Source::Node(n, _) = net.graph.value(v).source else {
                return Err(Error::Config("the classifier has no dense layer to take features from".into()));
            };
            let node = net.graph.node(n);
            let Some(Some(x)) = node.inputs.first().copied() else {
                return Err(Error::Config("the classifier has no dense layer to take features from".into()));
            };
            v = x;
            if matches!(node.op.name(), "Gemm" | "MatMul") {
                break x;
            }
        };
        net.graph.outputs = vec![read];
        net.fuse(&[read], false)?;
        let request = Request { outputs: vec![read], ..Request::default() };
        let program = session.compile(net.graph, request)?;
        session.run(&program, &[(net.inputs[0], x.view())], 0)?;
        let rows = session.output(&program, read)?.to_tensor();
        d = rows.dims().iter().skip(1).product();
        all.extend(rows.to_f64());
    }
    Ok((all, d))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of a hash, in 0..1.
    fn hashed(n: usize, seed: u64) -> Vec<f64> {
        let mix = |i: usize| (seed + i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        (0..n).map(|i| mix(i) as f64 / (1u64 << 24) as f64).collect()
    }

    #[test]
    fn similarity_of_images() {
        let a = hashed(2 * 16 * 20, 1);
        assert!((ssim(&a, &a, 16, 20) - 1.0).abs() < 1e-12);
        // Of two planes of one value each nothing but the luminance is left.
        let (x, y) = (vec![0.25; 400], vec![0.75; 400]);
        let want = (2.0 * 0.25 * 0.75 + 1e-4) / (0.0625 + 0.5625 + 1e-4);
        assert!((ssim(&x, &y, 20, 20) - want).abs() < 1e-9);
        let half: Vec<f64> = a.iter().map(|x| 0.5 * x).collect();
        let s = ssim(&a, &half, 16, 20);
        assert!(s > 0.5 && s < 0.9, "{s}");
        assert!(ssim(&a[..50], &a[..50], 5, 10).is_nan());
    }

    #[test]
    fn distance_of_gaussians() {
        let d = 3;
        let a: Vec<f64> = hashed(600 * d, 7);
        assert!(frechet(&a, &a, d).abs() < 1e-9);
        // The same spread elsewhere: the squared distance of the means.
        let moved: Vec<f64> = a.iter().enumerate().map(|(i, x)| x + (i % d) as f64).collect();
        assert!((frechet(&a, &moved, d) - 5.0).abs() < 1e-9);
        // Scaled by s about its mean: (1 − s)²·Tr Σ.
        let (mean, cov) = fitted(&a, d);
        let wide: Vec<f64> =
            a.iter().enumerate().map(|(i, x)| mean[i % d] + 3.0 * (x - mean[i % d])).collect();
        let trace = cov[0] + cov[4] + cov[8];
        assert!((frechet(&a, &wide, d) - 4.0 * trace).abs() < 1e-9);
        let (values, vectors) = eigen(vec![2.0, 1.0, 1.0, 2.0], 2);
        let mut sorted = values.clone();
        sorted.sort_by(f64::total_cmp);
        assert!((sorted[0] - 1.0).abs() < 1e-12 && (sorted[1] - 3.0).abs() < 1e-12);
        assert!((vectors[0].abs() - 0.5f64.sqrt()).abs() < 1e-12);
    }
}
