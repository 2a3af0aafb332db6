//! `Gemm`: one product of matrices, with something added.

use std::sync::Arc;

use super::ints::{GemmInts, int_dispatch};
use super::product::{by_pairs, bytes, same_type};
use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::gemm::{Plus, Product, gemm_halves, room_halves};
use crate::kernels::par;
use crate::ops::half::{elements, widened};
use crate::ops::{Cx, Grads, Op, Spec, get, need, out};
use crate::tensor::{Elem, Float, Meta, View, ViewMut, broadcast};

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
    pub(super) fn make(s: &Spec) -> Result<Arc<dyn Op>, OpError> {
        Ok(Arc::new(Gemm {
            alpha: s.attrs.float_or("alpha", 1.0)?,
            beta: s.attrs.float_or("beta", 1.0)?,
            trans_a: s.attrs.flag("transA")?,
            trans_b: s.attrs.flag("transB")?,
            pairs: false,
        }))
    }

    /// The product of such A and B, if they fit.
    fn product(&self, inputs: &[Option<&Meta>]) -> Option<Product<f32>> {
        let [m, n, k] = self.extents(&get(inputs, 0)?.dims, &get(inputs, 1)?.dims).ok()?;
        Some(Product::dense(self.trans_a, self.trans_b, m, n, k))
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
        self.product(inputs).map_or(0, |p| bytes([a, b], &p, 1, self.pairs))
    }

    fn reads_half(&self, inputs: &[Option<&Meta>], input: usize) -> bool {
        let able = |p: Product<f32>| self.pairs || self.trans_a && !self.trans_b || p.widens([true; 2]);
        input < 2 && self.product(inputs).is_some_and(able)
    }

    fn rounds(&self, inputs: &[Option<&Meta>], input: usize) -> bool {
        input < 2 && self.pairs && self.product(inputs).is_some_and(|p| p.suits_pairs())
    }

    fn by_pairs(&self) -> Option<Arc<dyn Op>> {
        Some(Arc::new(Gemm { pairs: true, ..self.clone() }))
    }

    fn multiply_adds(&self, inputs: &[Option<&Meta>]) -> usize {
        self.product(inputs).map_or(0, |p| p.m * p.n * p.k)
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
pub(super) fn spread<T: Elem>(dims: &[usize], c: &[T], n: usize, y: &mut [T]) {
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

#[cfg(test)]
pub(super) fn cases() -> Vec<crate::ops::cases::Case> {
    use crate::ops::cases::Case;
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
    ];
    for (name, ta, tb) in [("A transposed", 1, 0), ("B transposed", 0, 1), ("both transposed", 1, 1)] {
        let (a, b) = (if ta == 1 { [4, 3] } else { [3, 4] }, if tb == 1 { [5, 4] } else { [4, 5] });
        let case = Case::new("Gemm", 13).named(name).int("transA", ta).int("transB", tb);
        cases.push(case.float("alpha", 0.5).float("beta", -2.0).input(&a).input(&b).input(&[3, 5]));
    }
    cases
}

#[cfg(test)]
#[test]
fn gemm_cases() {
    cases().iter().for_each(crate::ops::cases::check);
}
