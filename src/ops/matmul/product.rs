//! What the products of matrices have in common.

use crate::error::OpError;
use crate::float_dispatch;
use crate::kernels::gemm::{Plus, Product, gemm_halves, gemm_pairs, many, room, room_halves, room_pairs};
use crate::kernels::half::{Elements, Half};
use crate::kernels::simd::Vectors;
use crate::ops::half::elements;
use crate::ops::{Cx, get, need};
use crate::tensor::{DType, Dims, Float, Meta, View, ViewMut, broadcast};

use super::ints::{Ints, int_dispatch};

/// Operands of a stacked product after vectors have become matrices.
#[derive(Debug)]
pub(super) struct Stacked {
    /// Stack dimensions, then rows and columns.
    pub a: Dims,
    pub b: Dims,
    pub stack: Dims,
    trans: [bool; 2],
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// By pairs of bfloat16, where that is possible: see [`Op::by_pairs`](crate::ops::Op::by_pairs).
    pairs: bool,
}

impl Stacked {
    pub fn of(a: &[usize], b: &[usize], trans: [bool; 2], pairs: bool) -> Result<Self, OpError> {
        if a.is_empty() || b.is_empty() {
            return Err(OpError::Shape("MatMul of a scalar".into()));
        }
        let (mut pa, mut pb) = (Dims::from_slice(a), Dims::from_slice(b));
        if pa.len() == 1 {
            pa.insert(0, 1);
        }
        if pb.len() == 1 {
            pb.push(1);
        }
        let rows_cols = |d: &[usize], t: bool| match t {
            false => (d[d.len() - 2], d[d.len() - 1]),
            true => (d[d.len() - 1], d[d.len() - 2]),
        };
        let ((m, ka), (kb, n)) = (rows_cols(&pa, trans[0]), rows_cols(&pb, trans[1]));
        if ka != kb {
            return Err(OpError::Shape(format!("MatMul of {a:?} by {b:?}: {ka} columns, {kb} rows")));
        }
        let stack = broadcast(&pa[..pa.len() - 2], &pb[..pb.len() - 2])?;
        Ok(Stacked { a: pa, b: pb, stack, trans, m, n, k: ka, pairs })
    }

    /// B is one matrix for the whole stack, and A is not repeated: the stack can be taken as more rows of A.
    pub fn one_b(&self) -> bool {
        let (a, b) = (self.a.len() - 2, self.b.len() - 2);
        let stack: usize = self.stack.iter().product();
        self.b[..b].iter().all(|&d| d == 1) && self.a[..a].iter().product::<usize>() == stack
    }

    /// The product of one pair of matrices, and how many there are.
    fn product<T: Float>(&self) -> (Product<T>, usize) {
        let [trans_a, trans_b] = self.trans;
        match !trans_a && self.one_b() {
            true => (Product::dense(false, trans_b, self.rows(), self.n, self.k), 1),
            false => (Product::dense(trans_a, trans_b, self.m, self.n, self.k), self.stack.iter().product()),
        }
    }

    pub fn scratch(&self, a: &Meta, b: &Meta) -> usize {
        let (p, batch) = self.product::<f32>();
        bytes([a, b], &p, batch, self.pairs)
    }

    /// Of one product over all rows that is a gradient of B, is computed by pairs, or widens them as it packs, both operands may
    /// come in half precision.
    pub fn reads_half(&self, input: usize) -> bool {
        let (p, batch) = self.product::<f32>();
        let gradient = self.trans == [true, false];
        self.rounds(input) || input < 2 && batch == 1 && (gradient || p.widens([true; 2]))
    }

    /// Is this operand rounded to bfloat16?
    pub fn rounds(&self, input: usize) -> bool {
        let (p, batch) = self.product::<f32>();
        input < 2 && self.pairs && batch == 1 && p.suits_pairs()
    }

    pub fn rows(&self) -> usize {
        self.stack.iter().product::<usize>() * self.m
    }

    /// The product of `x[0]` and `x[1]`, of floats times `alpha`; `row` and `all` say which operands are added to it.
    pub fn multiply(
        &self,
        cx: &mut Cx,
        alpha: f32,
        x: &[Option<View>],
        [row, all]: [usize; 2],
        y: &mut ViewMut,
    ) -> Result<(), OpError> {
        let (a, b, rank, k) = (need(x, 0)?, need(x, 1)?, self.stack.len(), self.k);
        // The offsets of the `i`th matrices, in elements.
        let at = |mut i: usize| {
            let (mut offset, mut step) = ([0, 0], [self.m * k, k * self.n]);
            for d in (0..rank).rev() {
                let j = i % self.stack[d];
                i /= self.stack[d];
                for (o, (step, dims)) in offset.iter_mut().zip(step.iter_mut().zip([&self.a, &self.b])) {
                    let missing = rank + 2 - dims.len();
                    let extent = if d < missing { 1 } else { dims[d - missing] };
                    *o += if extent == 1 { 0 } else { j * *step };
                    *step *= extent;
                }
            }
            offset
        };
        if !y.dtype.is_float() {
            let p = Product::dense(self.trans[0], self.trans[1], self.m, self.n, k);
            let count = self.stack.iter().product();
            return int_dispatch(a.dtype, &mut Ints { p, count, at: &at, a, b, y });
        }
        float_dispatch!(y.dtype, T => {
            let (a, b, y) = (elements::<T>(a)?, elements::<T>(b)?, y.get::<T>()?);
            let (mut p, batch) = self.product::<T>();
            p.alpha = T::of(alpha as f64);
            let row = get(x, row).map(|v| v.get::<T>()).transpose()?;
            let plus = Plus { row, all: get(x, all).map(|v| v.get::<T>()).transpose()? };
            if x.len() > all && plus.all.is_none() {
                // It lies in the result.
                p.beta = T::of(1.0);
            }
            if self.pairs && batch == 1 && by_pairs(cx, &p, [a, b], plus, y)? {
                return Ok(());
            }
            let (Elements::Whole(a), Elements::Whole(b)) = (a, b) else {
                if batch != 1 {
                    return Err(OpError::Internal("half precision in a stack of products".into()));
                }
                let scratch = cx.room(room_halves(&p, [!a.is_whole(), !b.is_whole()]))?;
                gemm_halves(&p, a, b, plus, y, scratch);
                return Ok(());
            };
            let scratch = cx.room(room(&p, batch))?;
            let at = |i: usize| if batch == 1 { [0, 0] } else { at(i) };
            many(&p, batch, at, a, b, plus, y, p.m * p.n, scratch);
            Ok(())
        })
    }
}

/// The product by pairs, if it is large enough; else `false`, and nothing has been done.
pub(super) fn by_pairs<T: Vectors>(
    cx: &mut Cx,
    p: &Product<T>,
    [a, b]: [Elements<T>; 2],
    plus: Plus<T>,
    y: &mut [T],
) -> Result<bool, OpError> {
    if !p.suits_pairs() {
        return Ok(false);
    }
    gemm_pairs(p, a, b, plus, y, cx.room(room_pairs(p, a.half()))?);
    Ok(true)
}

/// Bytes of scratch for `batch` products like `p`.
pub(super) fn bytes(operands: [&Meta; 2], p: &Product<f32>, batch: usize, pairs: bool) -> usize {
    let halves = operands.map(|x| Half::of(x.dtype).is_some());
    match operands[0].dtype {
        DType::BF16 | DType::F16 | DType::F32 if pairs && batch == 1 && p.suits_pairs() => {
            room_pairs(p, Half::of(operands[0].dtype)) * size_of::<f32>()
        }
        _ if halves.contains(&true) => room_halves(p, halves) * size_of::<f32>(),
        DType::F64 => {
            room(&Product::<f64>::dense(p.trans_a, p.trans_b, p.m, p.n, p.k), batch) * size_of::<f64>()
        }
        DType::F32 => room(p, batch) * size_of::<f32>(),
        _ => 0,
    }
}

pub(super) fn same_type(a: &Meta, b: &Meta) -> Result<(), OpError> {
    match a.dtype == b.dtype {
        true => Ok(()),
        false => Err(OpError::Type(format!("a product of {} and {}", a.dtype, b.dtype))),
    }
}
