//! Signal processing: DFT and STFT as products with constant matrices, windows, mel filters.

use std::f64::consts::PI;
use std::sync::Arc;

use crate::error::OpError;
use crate::graph::{Lowering, ValueId};
use crate::ops::bytes::foreseen;
use crate::ops::composite::{Made, defined, one};
use crate::ops::gather::Gather;
use crate::ops::known::{AtPlanTime, Known};
use crate::ops::matmul::MatMul;
use crate::ops::{Attrs, Op, Row, Spec, need};
use crate::tensor::{DType, Tensor, axis};

/// Elements that the matrix of a transform may have.
const LARGEST: usize = 1 << 26;

/// A transform of `length` points, of which `points` are given, real (1) or complex (2).
struct Transform {
    length: usize,
    points: usize,
    parts: usize,
    inverse: bool,
    onesided: bool,
}

impl Transform {
    /// Frequencies (or points) that come out, and their parts.
    fn result(&self) -> (usize, usize) {
        match (self.inverse, self.onesided) {
            (true, true) => (self.length, 1),
            (false, true) => (self.length / 2 + 1, 2),
            (_, false) => (self.length, 2),
        }
    }

    /// The matrix (points · parts, frequencies · 2) that X, its parts innermost, is multiplied with.
    fn matrix(&self, l: &mut Lowering, dtype: DType) -> Result<ValueId, OpError> {
        let (bins, out) = self.result();
        let size = [self.parts, bins, out].iter().try_fold(self.points, |n, d| n.checked_mul(*d));
        let Some(size) = size.filter(|s| *s <= LARGEST) else {
            return Err(OpError::Unsupported(format!("a transform of {} points", self.length)));
        };
        let n = self.length;
        let half = self.inverse && self.onesided;
        let mut m: Vec<f64> = Vec::with_capacity(size);
        for t in 0..self.points {
            for part in 0..self.parts {
                for k in 0..bins {
                    let angle = 2.0 * PI * (t * k % n.max(1)) as f64 / n as f64;
                    let sign = if self.inverse { 1.0 } else { -1.0 };
                    // The frequencies that are left out are the conjugates of these.
                    let twice = if half && t != 0 && 2 * t != n { 2.0 } else { 1.0 };
                    let scale = if self.inverse { twice / n as f64 } else { 1.0 };
                    let (cos, sin) = (scale * angle.cos(), scale * sign * angle.sin());
                    // (re + i·im)·(cos + i·sin)
                    let pair = if part == 0 { [cos, sin] } else { [-sin, cos] };
                    m.extend(&pair[..out]);
                }
            }
        }
        let m = Tensor::from_slice(&[self.points * self.parts, bins * out], &m)?;
        Ok(l.constant(m.cast(dtype)))
    }
}

/// ONNX `DFT` (opset 17: the axis an attribute; 20: input 2): X (…, n, …, 1 or 2) with real and imaginary parts last.
fn dft(a: &Attrs, l: &mut Lowering) -> Made {
    let x = l.x(0)?;
    let dims = l.dims(x)?;
    let Some((&parts @ 1..=2, _)) = dims.split_last().filter(|(_, rest)| !rest.is_empty()) else {
        return Err(OpError::Shape(format!("x of shape {:?}: (…, 1 or 2) is needed", dims.as_slice())));
    };
    let given = match l.x_opt(2) {
        Some(_) => l.ints(2)?.first().copied(),
        None => a.int("axis")?,
    };
    let at = axis(given.unwrap_or(-2), dims.len())?;
    if at + 1 == dims.len() {
        return Err(OpError::Shape("the axis of DFT holds real and imaginary parts".into()));
    }
    let (inverse, onesided) = (a.flag("inverse")?, a.flag("onesided")?);
    let length = match l.x_opt(1) {
        Some(_) => l.ints(1)?.first().and_then(|&n| usize::try_from(n).ok()).filter(|&n| n > 0),
        None if inverse && onesided => (2 * dims[at]).checked_sub(2),
        None => Some(dims[at]),
    };
    let length = length.ok_or_else(|| OpError::Shape("the length of DFT".into()))?;
    // What is missing is zeros; what is too much is cut off.
    let most = if inverse && onesided { length / 2 + 1 } else { length };
    let t = Transform { length, points: dims[at].min(most), parts, inverse, onesided };
    let x = l.crop(x, at, 0, t.points)?;
    let rank = dims.len();
    let mut perm: Vec<usize> = (0..rank - 1).filter(|i| *i != at).collect();
    perm.extend([at, rank - 1]);
    let moved = l.transpose(x, &perm)?;
    let rows: usize = perm[..rank - 2].iter().map(|i| dims[*i]).product();
    let flat = l.reshape(moved, &[rows, t.points * parts])?;
    let matrix = t.matrix(l, l.dtype(x)?)?;
    let y = l.emit(MatMul::default(), &[flat, matrix])?;
    let (bins, out) = t.result();
    let mut shape: Vec<usize> = perm[..rank - 2].iter().map(|i| dims[*i]).collect();
    shape.extend([bins, out]);
    let y = l.reshape(y, &shape)?;
    let mut back = vec![0; rank];
    perm.iter().enumerate().for_each(|(i, p)| back[*p] = i);
    one(l.transpose(y, &back))
}

/// ONNX `STFT` (opset 17): a signal (N, L, 1 or 2), the step, perhaps a window and the length of a frame to
/// (N, frames, frequencies, 2).
fn stft(a: &Attrs, l: &mut Lowering) -> Made {
    let mut x = l.x(0)?;
    let dims = l.dims(x)?;
    let (n, len, parts) = match *dims {
        [n, len] => (n, len, 1),
        [n, len, parts @ 1..=2] => (n, len, parts),
        _ => return Err(OpError::Shape(format!("a signal of shape {:?}", dims.as_slice()))),
    };
    let positive = |v: Vec<i64>| v.first().and_then(|&v| usize::try_from(v).ok()).filter(|&v| v > 0);
    let step = positive(l.ints(1)?).ok_or_else(|| OpError::Shape("the step of STFT".into()))?;
    let window = l.x_opt(2);
    let length = match (l.x_opt(3), window) {
        (Some(_), _) => positive(l.ints(3)?),
        (None, Some(w)) => Some(l.meta(w)?.len()).filter(|&n| n > 0),
        (None, None) => Some(len).filter(|&n| n > 0),
    };
    let length = length.ok_or_else(|| OpError::Shape("the length of a frame of STFT".into()))?;
    let Some(room) = len.checked_sub(length) else {
        return Err(OpError::Shape(format!("frames of {length} in a signal of {len}")));
    };
    let frames = room / step + 1;
    x = l.reshape(x, &[n, len, parts])?;
    let index: Vec<i64> = (0..frames).flat_map(|f| (0..length).map(move |t| (f * step + t) as i64)).collect();
    let index = l.constant(Tensor::from_slice(&[frames, length], &index)?);
    x = l.emit(Gather { axis: 1 }, &[x, index])?;
    if let Some(w) = window {
        let w = l.reshape(w, &[l.meta(w)?.len(), 1])?;
        x = l.mul(x, w)?;
    }
    let t =
        Transform { length, points: length, parts, inverse: false, onesided: a.flag_or("onesided", true)? };
    let matrix = t.matrix(l, l.dtype(x)?)?;
    let flat = l.reshape(x, &[n * frames, length * parts])?;
    let y = l.emit(MatMul::default(), &[flat, matrix])?;
    let (bins, out) = t.result();
    one(l.reshape(y, &[n, frames, bins, out]))
}

/// ONNX `HannWindow`, `HammingWindow`, `BlackmanWindow` (opset 17): `a₀ − a₁·cos(2πn/N) + a₂·cos(4πn/N)`.
#[derive(Debug)]
struct Window {
    name: &'static str,
    terms: [f64; 3],
    periodic: bool,
    dtype: DType,
}

fn output_type(spec: &Spec) -> Result<DType, OpError> {
    let code = spec.attrs.int_or("output_datatype", 1)?;
    let found = i32::try_from(code).ok().and_then(DType::from_onnx);
    found.ok_or_else(|| OpError::Unsupported(format!("an output of ONNX element type {code}")))
}

fn window(spec: &Spec, name: &'static str, terms: [f64; 3]) -> Result<Arc<dyn Op>, OpError> {
    let periodic = spec.attrs.flag_or("periodic", true)?;
    Ok(Arc::new(AtPlanTime(Window { name, terms, periodic, dtype: output_type(spec)? })))
}

impl Known for Window {
    fn name(&self) -> &'static str {
        self.name
    }

    fn compute(&self, x: &[Option<&Tensor>]) -> Result<Vec<Tensor>, OpError> {
        let size = need(x, 0)?.to_ints()?;
        let size = size.first().and_then(|&n| usize::try_from(n).ok());
        let size = size.ok_or_else(|| OpError::Shape(format!("the size of {}", self.name)))?;
        foreseen(&[size])?;
        let period = if self.periodic { size } else { size.saturating_sub(1) }.max(1) as f64;
        let [a, b, c] = self.terms;
        let at = |i: usize| {
            let angle = 2.0 * PI * i as f64 / period;
            a - b * angle.cos() + c * (2.0 * angle).cos()
        };
        let w: Vec<f64> = (0..size).map(at).collect();
        Ok(vec![Tensor::from_slice(&[size], &w)?.cast(self.dtype).cast(self.dtype.working())])
    }
}

/// ONNX `MelWeightMatrix` (opset 17): bins, length of the transform, sample rate and the edges in Hz to triangular
/// filters (frequencies, bins).
#[derive(Debug)]
struct MelWeightMatrix {
    dtype: DType,
}

impl Known for MelWeightMatrix {
    fn name(&self) -> &'static str {
        "MelWeightMatrix"
    }

    fn compute(&self, x: &[Option<&Tensor>]) -> Result<Vec<Tensor>, OpError> {
        let number = |i: usize| -> Result<f64, OpError> {
            let first = need(x, i)?.to_f64().first().copied();
            first.filter(|v| v.is_finite() && *v >= 0.0).ok_or_else(|| OpError::Shape(format!("input {i}")))
        };
        let (bins, length, rate) = (number(0)? as usize, number(1)? as usize, number(2)?);
        let (low, high) = (number(3)?, number(4)?);
        let rows = length / 2 + 1;
        foreseen(&[rows, bins])?;
        let mel = |hz: f64| 2595.0 * (1.0 + hz / 700.0).log10();
        let step = (mel(high) - mel(low)) / (bins + 2) as f64;
        let edge = |i: usize| {
            let hz = 700.0 * (10f64.powf((mel(low) + i as f64 * step) / 2595.0) - 1.0);
            ((length + 1) as f64 * hz / rate).floor()
        };
        let mut m = vec![0.0; rows * bins];
        for b in 0..bins {
            let [left, centre, right] = [edge(b), edge(b + 1), edge(b + 2)];
            for (r, row) in m.chunks_exact_mut(bins).enumerate() {
                let r = r as f64;
                let rise =
                    if centre == left { (r == centre) as u8 as f64 } else { (r - left) / (centre - left) };
                row[b] = match r {
                    r if r >= left && r < centre => rise,
                    r if r == centre && (centre == left || right > centre) => 1.0,
                    r if r == centre => rise,
                    r if r > centre && r < right => (right - r) / (right - centre),
                    _ => 0.0,
                };
            }
        }
        Ok(vec![Tensor::from_slice(&[rows, bins], &m)?.cast(self.dtype).cast(self.dtype.working())])
    }
}

fn make_dft(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
    let mut attrs = spec.attrs.clone();
    if spec.opset < 20 {
        attrs.0.entry("axis".into()).or_insert(crate::ops::Attr::Int(1));
    } else {
        attrs.0.remove("axis");
    }
    defined(&Spec { attrs: &attrs, ..spec.clone() }, "DFT", 1, dft)
}

pub(super) const ROWS: &[Row] = &[
    Row::new("BlackmanWindow", 17, |s| window(s, "BlackmanWindow", [0.42, 0.5, 0.08])),
    Row::new("DFT", 17, make_dft),
    Row::new("HammingWindow", 17, |s| window(s, "HammingWindow", [25.0 / 46.0, 21.0 / 46.0, 0.0])),
    Row::new("HannWindow", 17, |s| window(s, "HannWindow", [0.5, 0.5, 0.0])),
    Row::new("MelWeightMatrix", 17, |s| Ok(Arc::new(AtPlanTime(MelWeightMatrix { dtype: output_type(s)? })))),
    Row::new("STFT", 17, |s| defined(s, "STFT", 1, stft)),
];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    let int = Tensor::scalar::<i64>;
    let dft = |name: &str| Case::new("DFT", 20).named(name);
    let mut cases = vec![
        dft("real").input(&[2, 6, 1]),
        dft("onesided, longer").int("onesided", 1).input(&[2, 5, 1]).fixed(int(8)),
        dft("complex, axis 1").input(&[2, 6, 3, 2]).fixed(int(4)).fixed(int(1)),
        dft("inverse").int("inverse", 1).input(&[6, 2]).absent().fixed(int(0)),
        dft("inverse, onesided").int("inverse", 1).int("onesided", 1).input(&[2, 5, 2]),
        Case::new("DFT", 17).named("attribute").input(&[2, 6, 3, 1]),
        Case::new("STFT", 17).input(&[2, 20, 1]).fixed(int(4)).within(&[8], 0.2, 1.0),
        Case::new("STFT", 17)
            .named("both sides")
            .int("onesided", 0)
            .input(&[1, 12, 2])
            .fixed(int(3))
            .absent()
            .fixed(int(5)),
        Case::new("MelWeightMatrix", 17)
            .fixed(int(8))
            .fixed(int(16))
            .fixed(int(8192))
            .fixed(Tensor::scalar(0f32))
            .fixed(Tensor::scalar(4096f32))
            .forward_only(),
    ];
    for op in ["HannWindow", "HammingWindow", "BlackmanWindow"] {
        cases.push(Case::new(op, 17).fixed(int(10)).forward_only());
        cases.push(Case::new(op, 17).named("one").int("periodic", 0).fixed(int(1)).forward_only());
    }
    cases
}
