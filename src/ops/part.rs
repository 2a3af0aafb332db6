//! Weights of which only a part learns, put together: a low-rank addition, or a slice.

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::gemm::{Product, gemm, room};
use crate::kernels::par;
use crate::kernels::strided::Extents;
use crate::ops::matmul::MatMulAs;
use crate::ops::slice::{Crop, Cut};
use crate::ops::{Cx, Grads, Op, need, out};
use crate::tensor::{DType, Dims, Float, Meta, View, ViewMut};

/// `W' = W + scale · L·R` (Hu et al. 2021, arXiv 2106.09685, equation 3): W, of any shape, is seen as (rows, columns),
/// L as (rows, rank) and R as (rank, columns).
#[derive(Debug, Clone, PartialEq)]
pub struct LowRank {
    pub rows: usize,
    pub columns: usize,
    pub rank: usize,
    pub scale: f32,
}

impl LowRank {
    fn product<T: Float>(&self) -> Product<T> {
        let p = Product::dense(false, false, self.rows, self.columns, self.rank);
        Product { alpha: T::of(self.scale as f64), beta: T::one(), ..p }
    }
}

fn dims(of: &[usize]) -> Dims {
    Dims::from_slice(of)
}

impl Op for LowRank {
    fn name(&self) -> &'static str {
        "LowRank"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let w = need(inputs, 0)?;
        let (rows, columns, rank) = (self.rows, self.columns, self.rank);
        for (i, len) in [rows * columns, rows * rank, rank * columns].into_iter().enumerate() {
            let m = need(inputs, i)?;
            if m.len() != len || m.dtype != w.dtype {
                let what =
                    format!("input {i} is {} {:?} for {rows}×{columns} of rank {rank}", m.dtype, m.dims);
                return Err(OpError::Shape(what));
            }
        }
        Ok(vec![Meta::new(w.dtype, &w.dims)])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let y = out(y, 0)?;
        float_dispatch!(y.dtype, T => {
            let of = |i: usize| need(x, i)?.get::<T>();
            let (w, left, right, y) = (of(0)?, of(1)?, of(2)?, y.get::<T>()?);
            par::pieces(y, |at, y| y.copy_from_slice(&w[at..at + y.len()]));
            let p = self.product::<T>();
            gemm(&p, left, right, y, cx.room(room(&p, 1))?);
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        match inputs.first().copied().flatten().map(|w| w.dtype) {
            Some(DType::F64) => room(&self.product::<f64>(), 1) * size_of::<f64>(),
            _ => room(&self.product::<f32>(), 1) * size_of::<f32>(),
        }
    }

    fn multiply_adds(&self, _: &[Option<&Meta>]) -> usize {
        self.rows * self.columns * self.rank
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        let (left, right, dw) = (g.x(1)?, g.x(2)?, g.dy0()?);
        let (whole, alpha) = (dims(&[self.rows, self.columns]), self.scale);
        // W itself: dW'
        let mut grads = Grads::from_elem(Some(dw), 3);
        if g.wants(1) {
            // dL = scale · dW'·Rᵀ   (rows, rank)
            let (b, y) = (dims(&[self.rank, self.columns]), g.meta(left)?.dims.clone());
            let op = MatMulAs { a: whole.clone(), b, trans_a: false, trans_b: true, alpha, y, pairs: false };
            grads[1] = Some(g.emit(op, &[dw, right])?);
        }
        if g.wants(2) {
            // dR = scale · Lᵀ·dW'   (rank, columns)
            let (a, y) = (dims(&[self.rows, self.rank]), g.meta(right)?.dims.clone());
            let op = MatMulAs { a, b: whole, trans_a: true, trans_b: false, alpha, y, pairs: false };
            grads[2] = Some(g.emit(op, &[left, dw])?);
        }
        Ok(grads)
    }
}

/// W with the entries `from..from + count` along `axis` taken from P, which has the shape of that slice.
#[derive(Debug, Clone, PartialEq)]
pub struct Inset {
    pub axis: usize,
    pub from: usize,
    pub count: usize,
}

impl Inset {
    /// The slice of a tensor of dimensions `of`.
    pub fn cut(&self, of: &[usize]) -> Cut {
        let mut start = Extents::from_elem(0, of.len());
        let mut count = dims(of);
        if let (Some(start), Some(count)) = (start.get_mut(self.axis), count.get_mut(self.axis)) {
            (*start, *count) = (self.from, self.count);
        }
        Cut::dense(start, count)
    }

    /// The dimensions of P.
    pub fn part(&self, of: &[usize]) -> Dims {
        self.cut(of).count
    }
}

impl Op for Inset {
    fn name(&self) -> &'static str {
        "Inset"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (w, p) = (need(inputs, 0)?, need(inputs, 1)?);
        let fits = w.dims.get(self.axis).is_some_and(|d| self.from + self.count <= *d);
        if !fits || p.dtype != w.dtype || p.dims != self.part(&w.dims) {
            let what = format!("{self:?} of {} {:?} into {} {:?}", p.dtype, p.dims, w.dtype, w.dims);
            return Err(OpError::Shape(what));
        }
        Ok(vec![Meta::new(w.dtype, &w.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let y = out(y, 0)?;
        float_dispatch!(y.dtype, T => {
            let (w, p) = (need(x, 0)?, need(x, 1)?.get::<T>()?);
            let inner: usize = w.dims[self.axis + 1..].iter().product();
            let (row, part) = (w.dims[self.axis] * inner, self.count * inner);
            let (w, start) = (w.get::<T>()?, self.from * inner);
            par::rows(y.get::<T>()?, row, par::GRAIN, |first, piece| {
                piece.copy_from_slice(&w[first * row..first * row + piece.len()]);
                for (k, y) in piece.chunks_exact_mut(row.max(1)).enumerate() {
                    y[start..start + part].copy_from_slice(&p[(first + k) * part..][..part]);
                }
            });
            Ok(())
        })
    }

    fn cheap(&self) -> bool {
        true
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        if g.wants(0) {
            return Err(OpError::NotDifferentiable("the frozen part of a weight".into()));
        }
        // dP = the slice of dW'
        let dw = g.dy0()?;
        let cut = self.cut(&g.meta(dw)?.dims);
        Ok(Grads::from_slice(&[None, Some(g.emit(Crop { cut }, &[dw])?)]))
    }
}

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    use crate::tensor::Tensor;
    let low = |rows, columns, rank, scale| Case::of(LowRank { rows, columns, rank, scale });
    let inset = |axis, from, count| {
        let frozen = Tensor::from_slice(&[3, 4, 2], &(0..24).map(f64::from).collect::<Vec<_>>()).unwrap();
        Case::of(Inset { axis, from, count }).fixed(frozen)
    };
    vec![
        low(4, 5, 2, 0.5).input(&[4, 5]).input(&[4, 2]).input(&[2, 5]),
        low(70, 65, 3, 2.0)
            .named("of a pointwise convolution")
            .input(&[70, 65, 1, 1])
            .input(&[70, 3, 1, 1])
            .input(&[3, 65, 1, 1]),
        inset(0, 1, 2).named("rows").input(&[2, 4, 2]),
        inset(1, 0, 3).named("first columns").input(&[3, 3, 2]),
        inset(2, 1, 1).named("last axis").input(&[3, 4, 1]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::eval;
    use crate::tensor::Tensor;

    #[test]
    fn parts_by_hand() {
        let f = |dims: &[usize], x: &[f32]| Tensor::from_slice(dims, x).unwrap();
        let (w, l, r) =
            (f(&[2, 2], &[1.0, 2.0, 3.0, 4.0]), f(&[2, 1], &[1.0, 2.0]), f(&[1, 2], &[10.0, 20.0]));
        let op = LowRank { rows: 2, columns: 2, rank: 1, scale: 0.5 };
        assert_eq!(eval(&op, &[Some(&w), Some(&l), Some(&r)]).unwrap()[0].to_f64(), [6.0, 12.0, 13.0, 24.0]);
        let op = Inset { axis: 1, from: 1, count: 1 };
        let y = eval(&op, &[Some(&w), Some(&f(&[2, 1], &[7.0, 8.0]))]).unwrap();
        assert_eq!(y[0].to_f64(), [1.0, 7.0, 3.0, 8.0]);
    }
}
