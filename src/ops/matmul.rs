//! Matrix products: `Gemm`, `MatMul`.

mod ints;

use std::sync::Arc;

use self::ints::{GemmInts, Ints, int_dispatch};
use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::gemm::{Plus, Product, gemm_halves, gemm_pairs, many, room, room_halves, room_pairs};
use crate::kernels::half::{Elements, Half};
use crate::kernels::norm::Channels;
use crate::kernels::par;
use crate::ops::batch_norm::ChannelSum;
use crate::ops::half::{elements, widened};
use crate::ops::{Cx, Grads, Op, Row, Spec, get, need, out};
use crate::tensor::{DType, Dims, Elem, Float, Meta, View, ViewMut, broadcast};

/// ONNX `Gemm` (opset 6): `Y = alpha · A'·B' + beta · C`, A' of (M, K), B' of (K, N), C broadcast to (M, N).
#[derive(Debug, Clone)]
pub struct Gemm {
    pub alpha: f32,
    pub beta: f32,
    pub trans_a: bool,
    pub trans_b: bool,
    /// See [`Op::by_pairs`].
    pub pairs: bool,
}

impl Gemm {
    fn make(s: &Spec) -> Result<Arc<dyn Op>, OpError> {
        Ok(Arc::new(Gemm {
            alpha: s.attrs.float_or("alpha", 1.0)?,
            beta: s.attrs.float_or("beta", 1.0)?,
            trans_a: s.attrs.flag("transA")?,
            trans_b: s.attrs.flag("transB")?,
            pairs: false,
        }))
    }

    /// M, N, K.
    fn extents(&self, a: &[usize], b: &[usize]) -> Result<[usize; 3], OpError> {
        let (&[a0, a1], &[b0, b1]) = (a, b) else {
            return Err(OpError::Shape(format!("Gemm multiplies matrices, not {a:?} by {b:?}")));
        };
        let (m, ka) = if self.trans_a { (a1, a0) } else { (a0, a1) };
        let (kb, n) = if self.trans_b { (b1, b0) } else { (b0, b1) };
        if ka != kb {
            return Err(OpError::Shape(format!("Gemm of {a:?} by {b:?}: {ka} columns, {kb} rows")));
        }
        Ok([m, n, ka])
    }
}

impl Op for Gemm {
    fn name(&self) -> &'static str {
        "Gemm"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let [a, b] = [&widened(need(inputs, 0)?), &widened(need(inputs, 1)?)];
        same_type(a, b)?;
        let [m, n, _] = self.extents(&a.dims, &b.dims)?;
        if let Some(c) = get(inputs, 2) {
            same_type(a, c)?;
            if c.dims.len() > 2 || broadcast(&c.dims, &[m, n])?.as_slice() != [m, n] {
                return Err(OpError::Shape(format!("C of {:?} for a product of {m}×{n}", c.dims.as_slice())));
            }
        }
        Ok(vec![Meta::new(a.dtype, &[m, n])])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (a, b, c) = (need(x, 0)?, need(x, 1)?, get(x, 2));
        let [m, n, k] = self.extents(a.dims, b.dims)?;
        let y = out(y, 0)?;
        if !a.dtype.is_float() {
            if self.alpha != 1.0 || (self.beta != 1.0 && c.is_some()) {
                return Err(OpError::Unsupported("Gemm of integers with alpha or beta other than 1".into()));
            }
            return int_dispatch(a.dtype, &mut GemmInts { op: self, a, b, c, y, mnk: [m, n, k] });
        }
        float_dispatch!(y.dtype, T => {
            let (a, b, y) = (elements::<T>(a)?, elements::<T>(b)?, y.get::<T>()?);
            let c = c.filter(|_| self.beta != 0.0);
            let beta = T::of(if c.is_some() { self.beta as f64 } else { 0.0 });
            if let Some(c) = c {
                spread(c.dims, c.get::<T>()?, n, y);
            }
            let p = Product { alpha: T::of(self.alpha as f64), beta, ..Product::dense(self.trans_a, self.trans_b, m, n, k) };
            if self.pairs && by_pairs(cx, &p, [a, b], Plus::NOTHING, y)? {
                return Ok(());
            }
            let scratch = cx.room(room_halves(&p, [!a.is_whole(), !b.is_whole()]))?;
            gemm_halves(&p, a, b, Plus::NOTHING, y, scratch);
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let (Some(a), Some(b)) = (get(inputs, 0), get(inputs, 1)) else { return 0 };
        self.extents(&a.dims, &b.dims)
            .map_or(0, |mnk| bytes([a, b], [self.trans_a, self.trans_b], mnk, 1, self.pairs))
    }

    fn reads_half(&self, input: usize) -> bool {
        input < 2 && (self.pairs || self.trans_a && !self.trans_b)
    }

    fn by_pairs(&self) -> Option<Arc<dyn Op>> {
        Some(Arc::new(Gemm { pairs: true, ..self.clone() }))
    }

    fn multiply_adds(&self, inputs: &[Option<&Meta>]) -> usize {
        let (Some(a), Some(b)) = (get(inputs, 0), get(inputs, 1)) else { return 0 };
        self.extents(&a.dims, &b.dims).map_or(0, |mnk| mnk.iter().product())
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        let (a, b, dy) = (g.x(0)?, g.x(1)?, g.dy0()?);
        let (ta, tb) = (self.trans_a, self.trans_b);
        let product =
            |trans_a, trans_b| Gemm { alpha: self.alpha, beta: 0.0, trans_a, trans_b, pairs: self.pairs };
        let mut grads = Grads::from_elem(None, g.inputs());
        if g.wants(0) {
            // dA' = α dY·B'ᵀ   (M, K)
            grads[0] = Some(match ta {
                false => g.emit(product(false, !tb), &[dy, b])?,
                true => g.emit(product(tb, true), &[b, dy])?,
            });
        }
        if g.wants(1) {
            // dB' = α A'ᵀ·dY   (K, N)
            grads[1] = Some(match tb {
                false => g.emit(product(!ta, false), &[a, dy])?,
                true => g.emit(product(true, ta), &[dy, a])?,
            });
        }
        if g.wants(2) {
            // dC = β dY, summed over what was broadcast
            grads[2] = Some(if self.beta == 1.0 { dy } else { g.emit(Scale { by: self.beta }, &[dy])? });
        }
        Ok(grads)
    }
}

/// `C` of at most two dimensions, broadcast over the rows of `n` elements of `y`.
fn spread<T: Elem>(dims: &[usize], c: &[T], n: usize, y: &mut [T]) {
    let (rows, cols) = match *dims {
        [rows, cols] => (rows, cols),
        [cols] => (1, cols),
        _ => (1, 1),
    };
    par::rows(y, n, par::GRAIN, |first, piece| {
        for (i, row) in piece.chunks_exact_mut(n.max(1)).enumerate() {
            let at = if rows == 1 { 0 } else { (first + i) * cols };
            match cols == n {
                true => row.copy_from_slice(&c[at..at + n]),
                false => row.fill(c[at]),
            }
        }
    });
}

/// `y = by · x`.
#[derive(Debug)]
struct Scale {
    by: f32,
}

impl Op for Scale {
    fn name(&self) -> &'static str {
        "Scale"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        Ok(vec![Meta::new(x.dtype, &x.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let y = out(y, 0)?;
        float_dispatch!(y.dtype, T => {
            let by = T::of(self.by as f64);
            let y = y.get::<T>()?;
            match get(x, 0) {
                Some(x) => {
                    let x = x.get::<T>()?;
                    par::pieces(y, |at, y| y.iter_mut().zip(&x[at..]).for_each(|(y, x)| *y = by * *x));
                }
                None => par::pieces(y, |_, y| y.iter_mut().for_each(|y| *y *= by)),
            }
            Ok(())
        })
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("second derivatives of Gemm".into()))
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(0, 0)]
    }
}

/// ONNX `MatMul` (opset 1): matrices, stacks of matrices with broadcast stack dimensions, and vectors.
///
/// Fused with what follows, the product is scaled by `alpha`, and there are two operands more, both optional: a bias of
/// (N), and something of the result's shape.
#[derive(Debug)]
pub struct MatMul {
    pub alpha: f32,
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
        MatMul { alpha, pairs: false }
    }
}

/// Operands of a stacked product after vectors have become matrices.
#[derive(Debug)]
struct Stacked {
    /// Stack dimensions, then rows and columns.
    a: Dims,
    b: Dims,
    stack: Dims,
    trans: [bool; 2],
    m: usize,
    n: usize,
    k: usize,
}

/// The product by pairs, if it is one of `f32` and large enough; else `false`, and nothing has been done.
fn by_pairs<T: Float>(
    cx: &mut Cx,
    p: &Product<T>,
    [a, b]: [Elements<T>; 2],
    plus: Plus<T>,
    y: &mut [T],
) -> Result<bool, OpError> {
    let single = Product::<f32>::dense(p.trans_a, p.trans_b, p.m, p.n, p.k);
    if size_of::<T>() != size_of::<f32>() || !single.suits_pairs() {
        return Ok(false);
    }
    fn narrow<T: Float>(x: Elements<'_, T>) -> Elements<'_, f32> {
        match x {
            Elements::Whole(x) => Elements::Whole(bytemuck::cast_slice(x)),
            Elements::Half(half, x) => Elements::Half(half, x),
        }
    }
    let plus = Plus { row: plus.row.map(bytemuck::cast_slice), all: plus.all.map(bytemuck::cast_slice) };
    let p = Product { alpha: p.alpha.to64() as f32, beta: p.beta.to64() as f32, ..single };
    let scratch = cx.room(room_pairs(&p))?;
    gemm_pairs(&p, narrow(a), narrow(b), plus, bytemuck::cast_slice_mut(y), scratch);
    Ok(true)
}

/// Bytes of scratch for `batch` products of [m, n, k].
fn bytes(
    operands: [&Meta; 2],
    [trans_a, trans_b]: [bool; 2],
    [m, n, k]: [usize; 3],
    batch: usize,
    pairs: bool,
) -> usize {
    let halves = operands.map(|x| Half::of(x.dtype).is_some());
    let single = Product::<f32>::dense(trans_a, trans_b, m, n, k);
    match operands[0].dtype {
        DType::BF16 | DType::F16 | DType::F32 if pairs && batch == 1 && single.suits_pairs() => {
            room_pairs(&single) * size_of::<f32>()
        }
        _ if halves.contains(&true) => room_halves(&single, halves) * size_of::<f32>(),
        DType::F64 => room(&Product::<f64>::dense(trans_a, trans_b, m, n, k), batch) * size_of::<f64>(),
        DType::F32 => room(&single, batch) * size_of::<f32>(),
        _ => 0,
    }
}

impl Stacked {
    fn of(a: &[usize], b: &[usize], trans_a: bool, trans_b: bool) -> Result<Self, OpError> {
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
        let ((m, ka), (kb, n)) = (rows_cols(&pa, trans_a), rows_cols(&pb, trans_b));
        if ka != kb {
            return Err(OpError::Shape(format!("MatMul of {a:?} by {b:?}: {ka} columns, {kb} rows")));
        }
        let stack = broadcast(&pa[..pa.len() - 2], &pb[..pb.len() - 2])?;
        Ok(Stacked { a: pa, b: pb, stack, trans: [trans_a, trans_b], m, n, k: ka })
    }

    /// B is one matrix for the whole stack, and A is not repeated: the stack can be taken as more rows of A.
    fn one_b(&self) -> bool {
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

    fn scratch(&self, a: &Meta, b: &Meta, pairs: bool) -> usize {
        let (p, batch) = self.product::<f32>();
        bytes([a, b], self.trans, [p.m, p.n, p.k], batch, pairs)
    }

    /// Of one product over all rows that is a gradient of B, or is computed by pairs, both operands may come in half precision.
    fn reads_half(&self, input: usize, pairs: bool) -> bool {
        let (p, batch) = self.product::<f32>();
        let gradient = self.trans == [true, false];
        input < 2 && batch == 1 && (gradient || pairs && p.suits_pairs())
    }

    fn rows(&self) -> usize {
        self.stack.iter().product::<usize>() * self.m
    }
}

impl Op for MatMul {
    fn name(&self) -> &'static str {
        "MatMul"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (a, b) = (need(inputs, 0)?, need(inputs, 1)?);
        same_type(a, b)?;
        let s = Stacked::of(&a.dims, &b.dims, false, false)?;
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
        let s = Stacked::of(need(x, 0)?.dims, need(x, 1)?.dims, false, false)?;
        stacked(cx, &s, (self.alpha, self.pairs), x, [2, 3], out(y, 0)?)
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(3, 0)]
    }

    fn by_pairs(&self) -> Option<Arc<dyn Op>> {
        Some(Arc::new(MatMul { pairs: true, ..*self }))
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let (Some(a), Some(b)) = (get(inputs, 0), get(inputs, 1)) else { return 0 };
        Stacked::of(&a.dims, &b.dims, false, false).map_or(0, |s| s.scratch(a, b, self.pairs))
    }

    fn multiply_adds(&self, inputs: &[Option<&Meta>]) -> usize {
        let (Some(a), Some(b)) = (get(inputs, 0), get(inputs, 1)) else { return 0 };
        Stacked::of(&a.dims, &b.dims, false, false).map_or(0, |s| s.rows() * s.n * s.k)
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        let (a, b, dy) = (g.x(0)?, g.x(1)?, g.dy0()?);
        let (da, db) = (g.meta(a)?.dims.clone(), g.meta(b)?.dims.clone());
        let s = Stacked::of(&da, &db, false, false)?;
        let (k, rows) = (s.a[s.a.len() - 1], s.rows());
        let (alpha, pairs) = (self.alpha, self.pairs);
        let with = |last: &[usize]| s.stack.iter().chain(last).copied().collect::<Dims>();
        let (py, flat) = (with(&[s.m, s.n]), Dims::from_slice(&[rows, s.n]));
        // What was added: dY; the bias (N): dY summed over all rows
        let mut grads = Grads::from_elem(Some(dy), g.inputs());
        if g.wants(2) {
            grads[2] = Some(g.emit(ChannelSum { channels: Channels { n: rows, c: s.n, s: 1 } }, &[dy])?);
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

impl Op for MatMulAs {
    fn name(&self) -> &'static str {
        "MatMulAs"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let [a, b] = [&widened(need(inputs, 0)?), &widened(need(inputs, 1)?)];
        same_type(a, b)?;
        let s = Stacked::of(&self.a, &self.b, self.trans_a, self.trans_b)?;
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
        let s = Stacked::of(&self.a, &self.b, self.trans_a, self.trans_b)?;
        stacked(cx, &s, (self.alpha, self.pairs), x, [x.len(), 2], out(y, 0)?)
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(2, 0)]
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let s = Stacked::of(&self.a, &self.b, self.trans_a, self.trans_b);
        let (Some(a), Some(b), Ok(s)) = (get(inputs, 0), get(inputs, 1), s) else { return 0 };
        s.scratch(a, b, self.pairs)
    }

    fn reads_half(&self, input: usize) -> bool {
        let s = Stacked::of(&self.a, &self.b, self.trans_a, self.trans_b);
        s.is_ok_and(|s| s.reads_half(input, self.pairs))
    }

    fn by_pairs(&self) -> Option<Arc<dyn Op>> {
        Some(Arc::new(MatMulAs { pairs: true, ..self.clone() }))
    }

    fn multiply_adds(&self, _: &[Option<&Meta>]) -> usize {
        Stacked::of(&self.a, &self.b, self.trans_a, self.trans_b).map_or(0, |s| s.rows() * s.n * s.k)
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("second derivatives of MatMul".into()))
    }
}

/// The product of `x[0]` and `x[1]`, of floats times `alpha`; `row` and `all` say which operands are added to it.
fn stacked(
    cx: &mut Cx,
    s: &Stacked,
    (alpha, pairs): (f32, bool),
    x: &[Option<View>],
    [row, all]: [usize; 2],
    y: &mut ViewMut,
) -> Result<(), OpError> {
    let (a, b, rank, k) = (need(x, 0)?, need(x, 1)?, s.stack.len(), s.k);
    // The offsets of the `i`th matrices, in elements.
    let at = |mut i: usize| {
        let (mut offset, mut step) = ([0, 0], [s.m * k, k * s.n]);
        for d in (0..rank).rev() {
            let j = i % s.stack[d];
            i /= s.stack[d];
            for (o, (step, dims)) in offset.iter_mut().zip(step.iter_mut().zip([&s.a, &s.b])) {
                let missing = rank + 2 - dims.len();
                let extent = if d < missing { 1 } else { dims[d - missing] };
                *o += if extent == 1 { 0 } else { j * *step };
                *step *= extent;
            }
        }
        offset
    };
    if !y.dtype.is_float() {
        let p = Product::dense(s.trans[0], s.trans[1], s.m, s.n, k);
        let count = s.stack.iter().product();
        return int_dispatch(a.dtype, &mut Ints { p, count, at: &at, a, b, y });
    }
    float_dispatch!(y.dtype, T => {
        let (a, b, y) = (elements::<T>(a)?, elements::<T>(b)?, y.get::<T>()?);
        let (mut p, batch) = s.product::<T>();
        p.alpha = T::of(alpha as f64);
        let row = get(x, row).map(|v| v.get::<T>()).transpose()?;
        let plus = Plus { row, all: get(x, all).map(|v| v.get::<T>()).transpose()? };
        if x.len() > all && plus.all.is_none() {
            // It lies in the result.
            p.beta = T::of(1.0);
        }
        if pairs && batch == 1 && by_pairs(cx, &p, [a, b], plus, y)? {
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

fn same_type(a: &Meta, b: &Meta) -> Result<(), OpError> {
    match a.dtype == b.dtype {
        true => Ok(()),
        false => Err(OpError::Type(format!("a product of {} and {}", a.dtype, b.dtype))),
    }
}

pub(super) const ROWS: &[Row] =
    &[Row::new("Gemm", 6, Gemm::make), Row::new("MatMul", 1, |_| Ok(Arc::new(MatMul::default())))];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    use crate::tensor::Tensor;
    let mut cases = vec![
        Case::new("Gemm", 13).input(&[3, 4]).input(&[4, 5]),
        Case::new("Gemm", 7).named("no C of 0 rows").input(&[0, 4]).input(&[4, 5]),
        Case::new("Gemm", 9).named("K = 0").input(&[3, 0]).input(&[0, 5]).input(&[5]),
        Case::new("Gemm", 9).named("vector C").input(&[3, 4]).input(&[4, 5]).input(&[5]),
        Case::new("Gemm", 11).named("scalar C").input(&[3, 4]).input(&[4, 5]).input(&[]),
        Case::new("Gemm", 11).named("row C").input(&[3, 4]).input(&[4, 5]).input(&[1, 5]),
        Case::new("Gemm", 13).named("column C").input(&[3, 4]).input(&[4, 5]).input(&[3, 1]),
        Case::new("Gemm", 13)
            .named("integers")
            .fixed(Tensor::from_slice(&[2, 3], &[1i32, 2, 3, 4, 5, 6]).unwrap())
            .fixed(Tensor::from_slice(&[3, 1], &[1i32, 0, -1]).unwrap())
            .forward_only(),
        Case::new("MatMul", 13)
            .named("integers")
            .fixed(Tensor::from_slice(&[2, 1, 3], &[1i64, 2, 3, 4, 5, 6]).unwrap())
            .fixed(Tensor::from_slice(&[3], &[1i64, 0, -1]).unwrap())
            .forward_only(),
    ];
    for (name, ta, tb) in [("A transposed", 1, 0), ("B transposed", 0, 1), ("both transposed", 1, 1)] {
        let (a, b) = (if ta == 1 { [4, 3] } else { [3, 4] }, if tb == 1 { [5, 4] } else { [4, 5] });
        let case = Case::new("Gemm", 13).named(name).int("transA", ta).int("transB", tb);
        cases.push(case.float("alpha", 0.5).float("beta", -2.0).input(&a).input(&b).input(&[3, 5]));
    }
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
    let plus = |name: &str, a: &[usize], b: &[usize]| Case::new("MatMul", 13).named(name).input(a).input(b);
    cases.extend([
        plus("and a bias", &[2, 3, 4], &[4, 5]).input(&[5]),
        plus("and both", &[2, 3, 4], &[2, 4, 5]).input(&[5]).input(&[2, 3, 5]),
        plus("and one of its shape", &[2, 3, 4], &[4, 5]).absent().input(&[2, 3, 5]),
        plus("and both, of a vector", &[4], &[4, 5]).input(&[5]).input(&[5]),
        Case::of(MatMul::scaled(0.3)).named("scaled").input(&[2, 3, 4]).input(&[4, 5]).input(&[5]),
        Case::of(MatMul::scaled(0.3)).named("scaled stacks").input(&[2, 3, 4]).input(&[2, 4, 5]),
    ]);
    cases
}

#[cfg(test)]
#[test]
fn matmul_cases() {
    cases().iter().for_each(super::cases::check);
}
