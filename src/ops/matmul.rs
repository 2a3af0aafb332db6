//! Matrix products: `Gemm`, `MatMul`.

mod gemm;
mod ints;
mod product;

use std::sync::Arc;

pub use self::gemm::Gemm;
use self::product::{Stacked, same_type};
use crate::error::OpError;
use crate::graph::GradBuilder;
use crate::kernels::norm::Channels;
use crate::ops::batch_norm::ChannelSum;
use crate::ops::half::widened;
use crate::ops::{Cx, Grads, Made, Op, Piece, Row, get, need, out, piece};
use crate::tensor::{Dims, Meta, View, ViewMut};

/// ONNX `MatMul` (opset 1): matrices, stacks of matrices with broadcast stack dimensions, and vectors.
///
/// Fused with what follows, the product is scaled by `alpha`, and there are two operands more, both optional: a bias of
/// (N), and something of the result's shape.
#[derive(Debug, Clone, Copy)]
pub struct MatMul {
    pub alpha: f32,
    /// B is one matrix, given as its transpose (N, K).
    pub trans_b: bool,
    /// See [`Op::by_pairs`].
    pub pairs: bool,
}

impl Default for MatMul {
    fn default() -> Self {
        MatMul::scaled(1.0)
    }
}

impl MatMul {
    pub fn scaled(alpha: f32) -> Self {
        MatMul { alpha, trans_b: false, pairs: false }
    }

    fn stacked(&self, a: &[usize], b: &[usize]) -> Result<Stacked, OpError> {
        if self.trans_b && b.len() != 2 {
            return Err(OpError::Shape(format!("the transpose of a stack {b:?}")));
        }
        Stacked::of(a, b, [false, self.trans_b], self.pairs)
    }

    /// The same of such inputs, if they fit.
    fn of(&self, inputs: &[Option<&Meta>]) -> Option<Stacked> {
        self.stacked(&get(inputs, 0)?.dims, &get(inputs, 1)?.dims).ok()
    }
}

impl Op for MatMul {
    fn name(&self) -> &'static str {
        "MatMul"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let [a, b] = [&widened(need(inputs, 0)?), &widened(need(inputs, 1)?)];
        same_type(a, b)?;
        let s = self.stacked(&a.dims, &b.dims)?;
        let mut dims = s.stack;
        if a.dims.len() > 1 {
            dims.push(s.m);
        }
        if b.dims.len() > 1 {
            dims.push(s.n);
        }
        for (x, want) in [(get(inputs, 2), &[s.n][..]), (get(inputs, 3), &dims)] {
            let Some(x) = x else { continue };
            same_type(a, x)?;
            if x.dims.as_slice() != want {
                return Err(OpError::Shape(format!(
                    "{:?} added to a product of {want:?}",
                    x.dims.as_slice()
                )));
            }
        }
        Ok(vec![Meta::new(a.dtype, &dims)])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let s = self.stacked(need(x, 0)?.dims, need(x, 1)?.dims)?;
        s.multiply(cx, self.alpha, x, [2, 3], out(y, 0)?)
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(3, 0)]
    }

    fn reads_half(&self, inputs: &[Option<&Meta>], input: usize) -> bool {
        self.of(inputs).is_some_and(|s| s.reads_half(input))
    }

    fn by_pairs(&self) -> Option<Arc<dyn Op>> {
        Some(Arc::new(MatMul { pairs: true, ..*self }))
    }

    fn rounds(&self, inputs: &[Option<&Meta>], input: usize) -> bool {
        self.of(inputs).is_some_and(|s| s.rounds(input))
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let (Some(a), Some(b)) = (get(inputs, 0), get(inputs, 1)) else { return 0 };
        self.of(inputs).map_or(0, |s| s.scratch(a, b))
    }

    fn multiply_adds(&self, inputs: &[Option<&Meta>]) -> usize {
        self.of(inputs).map_or(0, |s| s.rows() * s.n * s.k)
    }

    fn in_pieces(&self, inputs: &[Option<&Meta>], count: usize) -> Option<Piece> {
        // Rows of A, if the result has their axes.
        let (a, s) = (get(inputs, 0)?, self.of(inputs)?);
        (s.one_b() && s.stack.len() + 2 == a.rank()).then_some(())?;
        piece::cut(&a.dims, count)?;
        Piece::made(*self, &[true, false, false, true], Made::Cut)
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        let (a, b, dy) = (g.x(0)?, g.x(1)?, g.dy0()?);
        let (da, db) = (g.meta(a)?.dims.clone(), g.meta(b)?.dims.clone());
        let s = self.stacked(&da, &db)?;
        let (k, rows) = (s.a[s.a.len() - 1], s.rows());
        let (alpha, pairs) = (self.alpha, self.pairs);
        let with = |last: &[usize]| s.stack.iter().chain(last).copied().collect::<Dims>();
        let (py, flat) = (with(&[s.m, s.n]), Dims::from_slice(&[rows, s.n]));
        // What was added: dY; the bias (N): dY summed over all rows
        let mut grads = Grads::from_elem(Some(dy), g.inputs());
        if g.wants(2) {
            grads[2] = Some(g.emit(ChannelSum { channels: Channels { n: rows, c: s.n, s: 1 } }, &[dy])?);
        }
        if self.trans_b {
            // Of Bᵀ (N, K): dA = α dY·Bᵀ   (…, M, K),  dBᵀ = α dYᵀ·A   (N, K)
            let of = |a, b, trans_a, y| MatMulAs { a, b, trans_a, trans_b: false, alpha, y, pairs };
            if g.wants(0) {
                grads[0] = Some(g.emit(of(flat.clone(), db.clone(), false, da), &[dy, b])?);
            }
            if g.wants(1) {
                grads[1] = Some(g.emit(of(flat, Dims::from_slice(&[rows, k]), true, db), &[dy, a])?);
            }
            return Ok(grads);
        }
        if g.wants(0) {
            // dA = α dY·Bᵀ   (…, M, K), summed over A's broadcast stack dimensions by the driver
            let op = match s.one_b() {
                true => {
                    let b = Dims::from_slice(&[k, s.n]);
                    MatMulAs { a: flat.clone(), b, trans_a: false, trans_b: true, alpha, y: da, pairs }
                }
                false => {
                    let y = if da.len() == 1 { with(&[k]) } else { with(&[s.m, k]) };
                    MatMulAs { a: py.clone(), b: s.b.clone(), trans_a: false, trans_b: true, alpha, y, pairs }
                }
            };
            grads[0] = Some(g.emit(op, &[dy, b])?);
        }
        if g.wants(1) {
            // dB = α Aᵀ·dY   (…, K, N); of one B for the whole stack: one product over all rows
            let op = match s.one_b() {
                true => {
                    let a = Dims::from_slice(&[rows, k]);
                    MatMulAs { a, b: flat, trans_a: true, trans_b: false, alpha, y: db, pairs }
                }
                false => {
                    let y = if db.len() == 1 { with(&[k]) } else { with(&[k, s.n]) };
                    MatMulAs { a: s.a.clone(), b: py, trans_a: true, trans_b: false, alpha, y, pairs }
                }
            };
            grads[1] = Some(g.emit(op, &[a, dy])?);
        }
        Ok(grads)
    }
}

/// `alpha` times a stacked product of operands seen as `a` and `b`, transposed or not, into a tensor seen as `y`; a third
/// operand of its shape is added.
#[derive(Debug, Clone)]
pub struct MatMulAs {
    pub a: Dims,
    pub b: Dims,
    pub trans_a: bool,
    pub trans_b: bool,
    pub alpha: f32,
    pub y: Dims,
    /// See [`Op::by_pairs`].
    pub pairs: bool,
}

impl MatMulAs {
    fn stacked(&self) -> Result<Stacked, OpError> {
        Stacked::of(&self.a, &self.b, [self.trans_a, self.trans_b], self.pairs)
    }
}

impl Op for MatMulAs {
    fn name(&self) -> &'static str {
        "MatMulAs"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let [a, b] = [&widened(need(inputs, 0)?), &widened(need(inputs, 1)?)];
        same_type(a, b)?;
        let s = self.stacked()?;
        let len = |d: &Dims| d.iter().product::<usize>();
        if a.len() != len(&self.a) || b.len() != len(&self.b) || len(&self.y) != s.rows() * s.n {
            return Err(OpError::Shape(format!("{self:?} of {:?} and {:?}", a.dims, b.dims)));
        }
        if let Some(x) = get(inputs, 2)
            && (x.dtype != a.dtype || x.dims != self.y)
        {
            return Err(OpError::Shape(format!("{:?} added to {self:?}", x.dims)));
        }
        Ok(vec![Meta::new(a.dtype, &self.y)])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let s = self.stacked()?;
        s.multiply(cx, self.alpha, x, [x.len(), 2], out(y, 0)?)
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(2, 0)]
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let s = self.stacked();
        let (Some(a), Some(b), Ok(s)) = (get(inputs, 0), get(inputs, 1), s) else { return 0 };
        s.scratch(a, b)
    }

    fn reads_half(&self, _: &[Option<&Meta>], input: usize) -> bool {
        let s = self.stacked();
        s.is_ok_and(|s| s.reads_half(input))
    }

    fn by_pairs(&self) -> Option<Arc<dyn Op>> {
        Some(Arc::new(MatMulAs { pairs: true, ..self.clone() }))
    }

    fn rounds(&self, _: &[Option<&Meta>], input: usize) -> bool {
        self.stacked().is_ok_and(|s| s.rounds(input))
    }

    fn multiply_adds(&self, _: &[Option<&Meta>]) -> usize {
        self.stacked().map_or(0, |s| s.rows() * s.n * s.k)
    }

    fn in_pieces(&self, inputs: &[Option<&Meta>], count: usize) -> Option<Piece> {
        let s = self.stacked().ok()?;
        let [x0, x1] = [get(inputs, 0)?, get(inputs, 1)?].map(|x| piece::cut(&x.dims, count).is_some());
        match (self.trans_a, self.trans_b) {
            // Rows of A.
            (false, _) if x0 && s.one_b() => {
                let (a, y) = (piece::cut(&self.a, count)?, piece::cut(&self.y, count)?);
                Piece::made(MatMulAs { a, y, ..self.clone() }, &[true, false, true], Made::Cut)
            }
            // Sums over rows of both.
            (true, false) if x0 && x1 && s.stack.is_empty() && get(inputs, 2).is_none() => {
                let (a, b) = (piece::cut(&self.a, count)?, piece::cut(&self.b, count)?);
                let sum = Made::Sum { onto: Some(2) };
                Piece::made(MatMulAs { a, b, ..self.clone() }, &[true, true], sum)
            }
            _ => None,
        }
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("second derivatives of MatMul".into()))
    }
}

pub(super) const ROWS: &[Row] =
    &[Row::new("Gemm", 6, Gemm::make), Row::new("MatMul", 1, |_| Ok(Arc::new(MatMul::default())))];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    use crate::tensor::Tensor;
    let mut cases = gemm::cases();
    cases.push(
        Case::new("MatMul", 13)
            .named("integers")
            .fixed(Tensor::from_slice(&[2, 1, 3], &[1i64, 2, 3, 4, 5, 6]).unwrap())
            .fixed(Tensor::from_slice(&[3], &[1i64, 0, -1]).unwrap())
            .forward_only(),
    );
    for (name, a, b) in [
        ("matrices", &[3, 4][..], &[4, 5][..]),
        ("vectors", &[4], &[4]),
        ("vector by matrix", &[4], &[4, 5]),
        ("matrix by vector", &[3, 4], &[4]),
        ("stack by vector", &[2, 3, 4], &[4]),
        ("vector by stack", &[4], &[2, 4, 5]),
        ("stack by matrix", &[2, 3, 4], &[4, 5]),
        ("matrix by stack", &[3, 4], &[2, 4, 5]),
        ("stacks", &[2, 3, 4], &[2, 4, 5]),
        ("broadcast stacks", &[2, 1, 3, 4], &[3, 4, 2]),
        ("broadcast both ways", &[2, 1, 3, 4], &[1, 3, 4, 2]),
        ("one matrix in a stack", &[2, 2, 3, 4], &[1, 1, 4, 2]),
        ("empty stack", &[0, 3, 4], &[4, 5]),
        ("larger", &[2, 33, 65], &[65, 70]),
    ] {
        cases.push(Case::new("MatMul", 13).named(name).input(a).input(b));
    }
    let transposed = MatMul { trans_b: true, ..MatMul::scaled(0.7) };
    let plus = |name: &str, a: &[usize], b: &[usize]| Case::new("MatMul", 13).named(name).input(a).input(b);
    cases.extend([
        plus("and a bias", &[2, 3, 4], &[4, 5]).input(&[5]),
        plus("and both", &[2, 3, 4], &[2, 4, 5]).input(&[5]).input(&[2, 3, 5]),
        plus("and one of its shape", &[2, 3, 4], &[4, 5]).absent().input(&[2, 3, 5]),
        plus("and both, of a vector", &[4], &[4, 5]).input(&[5]).input(&[5]),
        Case::of(MatMul::scaled(0.3)).named("scaled").input(&[2, 3, 4]).input(&[4, 5]).input(&[5]),
        Case::of(MatMul::scaled(0.3)).named("scaled stacks").input(&[2, 3, 4]).input(&[2, 4, 5]),
        Case::of(transposed).named("transposed").input(&[3, 4]).input(&[5, 4]),
        Case::of(transposed).named("vector by transposed").input(&[4]).input(&[5, 4]).input(&[5]),
        Case::of(transposed).named("stack by transposed").input(&[2, 33, 65]).input(&[70, 65]).input(&[70]),
        Case::of(transposed).named("and both").input(&[2, 3, 4]).input(&[5, 4]).input(&[5]).input(&[2, 3, 5]),
    ]);
    cases
}

#[cfg(test)]
#[test]
fn matmul_cases() {
    cases().iter().for_each(super::cases::check);
}
