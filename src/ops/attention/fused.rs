//! Attention as one operator, without the matrix of scores, and its gradient.

use std::sync::Arc;

use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::attention::{self as kernel, Attention, Gradient, Out, Rows, Scores};
use crate::kernels::half::Half;
use crate::kernels::simd::Vectors;
use crate::ops::half::{computed, elements, half_bits_mut};
use crate::ops::{Cx, Grads, Op, get, need, out};
use crate::tensor::{DType, Dims, Float, Meta, View, ViewMut, broadcast};

/// `Y = softmax(scale·Q·Kᵀ + mask)·V` with Q (…, T, D), K (…, S, D), V (…, S, Dv) and Y (…, T, Dv), of rank 3 or 4, and
/// a mask that broadcasts to the scores, which may be absent.
///
/// Output 1, which only the gradient reads: the logarithm of the sum of each row's exponentials (samples, heads, T).
#[derive(Debug, Clone)]
pub struct FusedAttention {
    pub scale: f32,
    /// Where the axes of Q, K, V and Y lie in memory: axis `i` of what is said above is the tensor's axis `axes[_][i]`. The
    /// last one is the last.
    pub axes: [Dims; 4],
    /// See [`Op::by_pairs`].
    pub pairs: bool,
}

impl FusedAttention {
    /// Sizes and places, and Y's dimensions.
    fn geometry(
        &self,
        q: &[usize],
        k: &[usize],
        v: &[usize],
        mask: Option<&[usize]>,
    ) -> Result<(Attention, Dims), OpError> {
        let of = |dims: &[usize], axes: &Dims| -> Option<Dims> {
            let rank = dims.len();
            let fits = (3..=4).contains(&rank) && axes.len() == rank && axes.last() == Some(&(rank - 1));
            fits.then(|| axes.iter().map(|&a| dims[a]).collect())
        };
        let bad = || OpError::Shape(format!("attention of {q:?}, {k:?} and {v:?} in {:?}", self.axes));
        let [lq, lk, lv] = [(q, 0), (k, 1), (v, 2)].map(|(dims, i)| of(dims, &self.axes[i]));
        let (lq, lk, lv) = (lq.ok_or_else(bad)?, lk.ok_or_else(bad)?, lv.ok_or_else(bad)?);
        let rank = lq.len();
        let (stack, [queries, depth]) = (&lq[..rank - 2], [lq[rank - 2], lq[rank - 1]]);
        let (keys, values) = (lk[rank - 2], lv[lv.len() - 1]);
        let agree = lk.len() == rank
            && lv.len() == rank
            && lk[..rank - 2] == *stack
            && lv[..rank - 2] == *stack
            && lk[rank - 1] == depth
            && lv[rank - 2] == keys;
        if !agree || self.axes[3].len() != rank {
            return Err(bad());
        }
        let mut y = Dims::from_elem(0, rank);
        for (i, &d) in stack.iter().chain(&[queries, values]).enumerate() {
            *y.get_mut(self.axes[3][i]).ok_or_else(bad)? = d;
        }
        let mut steps = [0; 4];
        if let Some(mask) = mask {
            let scores: Dims = stack.iter().chain(&[queries, keys]).copied().collect();
            if broadcast(mask, &scores)? != scores {
                return Err(OpError::Shape(format!("a mask of {mask:?} for scores of {scores:?}")));
            }
            let mut step = 1;
            for (i, &d) in mask.iter().enumerate().rev() {
                // Axes from the last on; of rank 3, the first is the samples'.
                let from_last = mask.len() - 1 - i;
                let at = if rank == 3 && from_last == 2 { 0 } else { 3 - from_last };
                steps[at] = if d == 1 { 0 } else { step };
                step *= d;
            }
        }
        let rows = |dims: &[usize], axes: &Dims| {
            let step = |axis: usize| dims[axis + 1..].iter().product::<usize>();
            match rank {
                3 => Rows { sample: step(axes[0]), head: 0, position: step(axes[1]) },
                _ => Rows { sample: step(axes[0]), head: step(axes[1]), position: step(axes[2]) },
            }
        };
        let a = Attention {
            batch: stack[0],
            heads: stack.get(1).copied().unwrap_or(1),
            queries,
            keys,
            depth,
            values,
            q: rows(q, &self.axes[0]),
            k: rows(k, &self.axes[1]),
            v: rows(v, &self.axes[2]),
            y: rows(&y, &self.axes[3]),
            mask: steps,
            pairs: self.pairs,
        };
        Ok((a, y))
    }

    fn of_metas(&self, x: &[Option<&Meta>]) -> Result<(Attention, Dims), OpError> {
        let (q, k, v) = (need(x, 0)?, need(x, 1)?, need(x, 2)?);
        let mask = get(x, 3);
        if [Some(k), Some(v), mask].into_iter().flatten().any(|m| computed(m) != computed(q)) {
            return Err(OpError::Type("operands of attention of different types".into()));
        }
        self.geometry(&q.dims, &k.dims, &v.dims, mask.map(|m| &m.dims[..]))
    }

    fn of_views(&self, x: &[Option<View>]) -> Result<Attention, OpError> {
        let (q, k, v) = (need(x, 0)?, need(x, 1)?, need(x, 2)?);
        Ok(self.geometry(q.dims, k.dims, v.dims, get(x, 3).map(|m| m.dims))?.0)
    }
}

/// Bytes of as many elements.
fn bytes(dtype: DType, count: impl Fn(bool) -> usize) -> usize {
    match dtype {
        DType::F64 => count(true) * size_of::<f64>(),
        _ => count(false) * size_of::<f32>(),
    }
}

/// A gradient's place.
fn gradient<'a, T: Float>(y: &'a mut ViewMut) -> Result<Gradient<'a, T>, OpError> {
    match Half::of(y.dtype) {
        Some(half) => Ok(Gradient::Half(half, half_bits_mut(y)?)),
        None => Ok(Gradient::Whole(y.get()?)),
    }
}

/// Which of Q, K and V are of half precision.
fn halves(inputs: &[Option<&Meta>]) -> [bool; 3] {
    [0, 1, 2].map(|i| get(inputs, i).is_some_and(|x| Half::of(x.dtype).is_some()))
}

impl Op for FusedAttention {
    fn name(&self) -> &'static str {
        "FusedAttention"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (a, y) = self.of_metas(inputs)?;
        let dtype = computed(need(inputs, 0)?);
        Ok(vec![Meta::new(dtype, &y), Meta::new(dtype, &[a.batch, a.heads, a.queries])])
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let a = self.of_views(x)?;
        let (first, rest) = y.split_at_mut(1);
        float_dispatch!(out(first, 0)?.dtype, T => {
            let operands = [elements::<T>(need(x, 0)?)?, elements(need(x, 1)?)?, elements(need(x, 2)?)?];
            let room = cx.room::<T>(kernel::forward_scratch::<T>(&a, operands.map(|x| !x.is_whole())))?;
            let logs = rest.first_mut().and_then(Option::as_mut).map(|logs| logs.get::<T>()).transpose()?;
            let scores = Scores { scale: T::of(self.scale as f64), mask: get(x, 3).map(|m| m.get()).transpose()? };
            kernel::forward(&a, operands, scores, out(first, 0)?.get()?, logs, room);
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let (Ok((a, _)), Some(q)) = (self.of_metas(inputs), get(inputs, 0)) else { return 0 };
        let halves = halves(inputs);
        bytes(computed(q), |double| match double {
            true => kernel::forward_scratch::<f64>(&a, halves),
            false => kernel::forward_scratch::<f32>(&a, halves),
        })
    }

    fn by_pairs(&self) -> Option<Arc<dyn Op>> {
        Some(Arc::new(FusedAttention { pairs: true, ..self.clone() }))
    }

    fn reads_half(&self, _: &[Option<&Meta>], input: usize) -> bool {
        input < 3
    }

    fn rounds(&self, inputs: &[Option<&Meta>], input: usize) -> bool {
        input < 3 && self.of_metas(inputs).is_ok_and(|(a, _)| a.by_pairs::<f32>())
    }

    fn multiply_adds(&self, inputs: &[Option<&Meta>]) -> usize {
        self.of_metas(inputs)
            .map_or(0, |(a, _)| a.batch * a.heads * a.queries * a.keys * (a.depth + a.values))
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        let (q, k, v, mask) = (g.x(0)?, g.x(1)?, g.x(2)?, g.x_opt(3));
        let (dy, logs) = (g.dy0()?, g.y(1)?);
        let inputs = [Some(q), Some(k), Some(v), mask, Some(dy), Some(logs)];
        let count = if g.wants(3) { 4 } else { 3 };
        let made = g.emit_all(FusedAttentionGrad::new(self.clone()), &inputs, count)?;
        Ok(made.into_iter().map(Some).collect())
    }
}

/// dQ, dK, dV, and the gradient of what is added to the scores (…, T, S), of [`FusedAttention`]. Inputs: Q, K, V, the mask
/// or nothing, dY, and the forward pass's output 1.
#[derive(Debug, Clone)]
pub(in crate::ops) struct FusedAttentionGrad {
    pub of: FusedAttention,
    /// In which half precision dQ, dK and dV are put out.
    pub made: [Option<Half>; 3],
}

impl FusedAttentionGrad {
    pub fn new(of: FusedAttention) -> Self {
        FusedAttentionGrad { of, made: [None; 3] }
    }

    fn room<T: Vectors>(&self, a: &Attention, read: [bool; 3]) -> usize {
        kernel::grads_scratch::<T>(a, read, self.made.map(|half| half.is_some()))
    }
}

impl Op for FusedAttentionGrad {
    fn name(&self) -> &'static str {
        "FusedAttentionGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (a, y) = self.of.of_metas(inputs)?;
        let (q, k, v, dy) = (need(inputs, 0)?, need(inputs, 1)?, need(inputs, 2)?, need(inputs, 4)?);
        if dy.dims != y {
            return Err(OpError::Shape(format!("dY of {:?} where Y is {y:?}", dy.dims)));
        }
        let dtype = computed(q);
        let of_type = |made: Option<Half>| made.map_or(dtype, Half::dtype);
        let gradients = [q, k, v].into_iter().zip(self.made);
        let mut made: Vec<Meta> = gradients.map(|(x, made)| Meta::new(of_type(made), &x.dims)).collect();
        let scores = [a.batch, a.heads, a.queries, a.keys];
        made.push(match q.rank() {
            3 => Meta::new(dtype, &[a.batch, a.queries, a.keys]),
            _ => Meta::new(dtype, &scores),
        });
        Ok(made)
    }

    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let a = self.of.of_views(x)?;
        float_dispatch!(need(x, 5)?.dtype, T => {
            let operands = [elements::<T>(need(x, 0)?)?, elements(need(x, 1)?)?, elements(need(x, 2)?)?];
            let room = cx.room::<T>(self.room::<T>(&a, operands.map(|x| !x.is_whole())))?;
            let scale = T::of(self.of.scale as f64);
            let scores = Scores { scale, mask: get(x, 3).map(|m| m.get()).transpose()? };
            let mut outs = y.iter_mut();
            let mut next = || outs.next().and_then(Option::as_mut).map(gradient::<T>).transpose();
            let [q, k, v] = [next()?, next()?, next()?];
            let mask = outs.next().and_then(Option::as_mut).map(|y| y.get::<T>()).transpose()?;
            let out = Out { q, k, v, mask };
            let dy = get(x, 4).map(|dy| dy.get()).transpose()?;
            kernel::grads(&a, operands, scores, dy, need(x, 5)?.get()?, out, room);
            Ok(())
        })
    }

    fn scratch(&self, inputs: &[Option<&Meta>]) -> usize {
        let (Ok((a, _)), Some(q)) = (self.of.of_metas(inputs), get(inputs, 0)) else { return 0 };
        let halves = halves(inputs);
        bytes(computed(q), |double| match double {
            true => self.room::<f64>(&a, halves),
            false => self.room::<f32>(&a, halves),
        })
    }

    fn reads_half(&self, _: &[Option<&Meta>], input: usize) -> bool {
        input < 3
    }

    /// Of each row of dY's, which is read first, dQ's may take the place, if those are alike.
    fn in_place(&self) -> &[(usize, usize)] {
        if self.of.axes[0] == self.of.axes[3] && self.made[0].is_none() { &[(4, 0)] } else { &[] }
    }

    fn by_pairs(&self) -> Option<Arc<dyn Op>> {
        Some(Arc::new(FusedAttentionGrad { of: FusedAttention { pairs: true, ..self.of.clone() }, ..*self }))
    }

    fn halved(&self, output: usize, to: DType) -> Option<Arc<dyn Op>> {
        let mut op = self.clone();
        *op.made.get_mut(output)? = Some(Half::of(to)?);
        Some(Arc::new(op))
    }

    fn multiply_adds(&self, inputs: &[Option<&Meta>]) -> usize {
        self.of
            .of_metas(inputs)
            .map_or(0, |(a, _)| a.batch * a.heads * a.queries * a.keys * (3 * a.depth + 2 * a.values))
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("second derivatives of attention".into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::eval;
    use crate::tensor::Tensor;

    #[test]
    fn in_place_gives_the_same_bits() {
        // Positions in front of heads; more than one block of queries.
        let axes = || Dims::from_slice(&[0, 2, 1, 3]);
        let of = FusedAttention { scale: 0.3, axes: [axes(), axes(), axes(), axes()], pairs: false };
        let wave = |positions: usize, step: f32| {
            let dims = [2, positions, 3, 16];
            let data: Vec<f32> = (0..dims.iter().product()).map(|i| (i as f32 * step).sin()).collect();
            Tensor::from_slice(&dims, &data).unwrap()
        };
        let (q, k, v, dy) = (wave(70, 0.7), wave(300, 0.9), wave(300, 0.2), wave(70, 0.5));
        let logs = eval(&of, &[Some(&q), Some(&k), Some(&v), None]).unwrap().remove(1);
        let metas = [&q, &k, &v, &dy, &logs].map(|t| Meta::new(t.dtype(), t.dims()));
        let [mq, mk, mv, mdy, mlogs] = &metas;
        let inputs = [Some(mq), Some(mk), Some(mv), None, Some(mdy), Some(mlogs)];
        for op in [Arc::new(FusedAttentionGrad::new(of.clone())) as Arc<dyn Op>, of_pairs(&of)] {
            assert_eq!(op.in_place(), [(4, 0)]);
            let operands = [Some(&q), Some(&k), Some(&v), None, Some(&dy), Some(&logs)];
            let want = eval(op.as_ref(), &operands).unwrap();
            let (mut dq, mut dk, mut dv) = (dy.clone(), k.clone(), v.clone());
            let mut scratch = crate::tensor::Buffer::zeroed(op.scratch(&inputs));
            let cx = &mut Cx { scratch: scratch.bytes_mut(), seed: 0 };
            let x = [Some(q.view()), Some(k.view()), Some(v.view()), None, None, Some(logs.view())];
            let mut y = [Some(dq.view_mut()), Some(dk.view_mut()), Some(dv.view_mut()), None];
            op.forward(cx, &x, &mut y).unwrap();
            for (got, want) in [dq, dk, dv].iter().zip(&want) {
                assert!(got.bytes() == want.bytes(), "{op:?}");
            }
        }
    }

    fn of_pairs(of: &FusedAttention) -> Arc<dyn Op> {
        FusedAttentionGrad::new(of.clone()).by_pairs().unwrap()
    }
}
