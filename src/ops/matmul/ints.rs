//! Products of integers, which wrap around.

use num_traits::{WrappingAdd, WrappingMul};

use super::gemm::{Gemm, spread};
use crate::error::OpError;
use crate::kernels::gemm::Product;
use crate::tensor::{DType, Elem, View, ViewMut};

/// A computation over any of the integer types that ONNX multiplies matrices of.
pub(super) trait OverInts {
    fn run<T: Elem + WrappingAdd + WrappingMul>(&mut self) -> Result<(), OpError>;
}

pub(super) fn int_dispatch(dtype: DType, f: &mut impl OverInts) -> Result<(), OpError> {
    match dtype {
        DType::I32 => f.run::<i32>(),
        DType::I64 => f.run::<i64>(),
        DType::U32 => f.run::<u32>(),
        DType::U64 => f.run::<u64>(),
        other => Err(OpError::Type(format!("a matrix product of {other}"))),
    }
}

pub(super) struct Ints<'a, 'b> {
    pub p: Product<f64>,
    pub count: usize,
    pub at: &'a dyn Fn(usize) -> [usize; 2],
    pub a: View<'a>,
    pub b: View<'a>,
    pub y: &'a mut ViewMut<'b>,
}

impl OverInts for Ints<'_, '_> {
    fn run<T: Elem + WrappingAdd + WrappingMul>(&mut self) -> Result<(), OpError> {
        let (a, b, y) = (self.a.get::<T>()?, self.b.get::<T>()?, self.y.get::<T>()?);
        y.fill(T::default());
        for i in 0..self.count {
            let [from_a, from_b] = (self.at)(i);
            let size = self.p.m * self.p.n;
            multiply_ints(&self.p, &a[from_a..], &b[from_b..], &mut y[i * size..(i + 1) * size]);
        }
        Ok(())
    }
}

pub(super) struct GemmInts<'a, 'b> {
    pub op: &'a Gemm,
    pub a: View<'a>,
    pub b: View<'a>,
    pub c: Option<View<'a>>,
    pub y: &'a mut ViewMut<'b>,
    pub mnk: [usize; 3],
}

impl OverInts for GemmInts<'_, '_> {
    fn run<T: Elem + WrappingAdd + WrappingMul>(&mut self) -> Result<(), OpError> {
        let [m, n, k] = self.mnk;
        let y = self.y.get::<T>()?;
        match self.c {
            Some(c) => spread(c.dims, c.get::<T>()?, n, y),
            None => y.fill(T::default()),
        }
        let p = Product::dense(self.op.trans_a, self.op.trans_b, m, n, k);
        multiply_ints(&p, self.a.get::<T>()?, self.b.get::<T>()?, y);
        Ok(())
    }
}

/// `y += op(A)·op(B)`, wrapping.
fn multiply_ints<T: Elem + WrappingAdd + WrappingMul>(p: &Product<f64>, a: &[T], b: &[T], y: &mut [T]) {
    for (i, row) in y.chunks_exact_mut(p.n.max(1)).enumerate() {
        for k in 0..p.k {
            let x = if p.trans_a { a[k * p.lda + i] } else { a[i * p.lda + k] };
            for (j, y) in row.iter_mut().enumerate() {
                let w = if p.trans_b { b[j * p.ldb + k] } else { b[k * p.ldb + j] };
                *y = y.wrapping_add(&x.wrapping_mul(&w));
            }
        }
    }
}
