//! Gradients of elementwise operators.

use std::sync::Arc;

use super::Kind;
use super::halved::HalvedGrad;
use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::GradBuilder;
use crate::kernels::elementwise::{apply2_all, same};
use crate::kernels::half::{Elements, Half};
use crate::kernels::isa::Wide;
use crate::kernels::math::Math;
use crate::kernels::par;
use crate::ops::binary::slice;
use crate::ops::half::elements;
use crate::ops::{ChannelsLast, Cx, Grads, Op, Piece, get, need, out};
use crate::tensor::{DType, Elem, Meta, View, ViewMut};

/// Elements that are widened at a time.
pub(super) const NEAR: usize = 2048;

/// dX of an elementwise operator, from (v, dY), v being X or Y as its `reads` says.
#[derive(Debug, Clone, Copy)]
pub struct UnaryGrad<K>(pub K);

impl<K: Kind> Op for UnaryGrad<K> {
    fn name(&self) -> &'static str {
        K::GRAD
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let (v, dy) = (need(inputs, 0)?, need(inputs, 1)?);
        if !v.same_shape(dy) {
            return Err(OpError::Internal(format!("{:?} and its gradient {:?}", v.dims, dy.dims)));
        }
        Ok(vec![Meta::new(dy.dtype, &dy.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (v, dy, y, k) = (get(x, 0), get(x, 1), out(y, 0)?, self.0);
        if v.is_none() && dy.is_none() {
            return Err(OpError::Shape("both operands are missing".into()));
        }
        if let Some(v) = v.filter(|v| Half::of(v.dtype).is_some()) {
            of_halves(k, elements(v)?, slice(dy)?, y.get()?);
            return Ok(());
        }
        float_dispatch!(y.dtype, T => {
            of(k, slice::<T>(v)?, slice::<T>(dy)?, y.get::<T>()?);
            Ok(())
        })
    }

    fn channels_last(&self, inputs: &[Option<&Meta>], outputs: &[Option<&Meta>]) -> Option<ChannelsLast> {
        ChannelsLast::elementwise(inputs, outputs)
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable(format!("second derivatives ({})", K::NAME)))
    }

    fn reads_half(&self, _: &[Option<&Meta>], input: usize) -> bool {
        input == 0
    }

    fn in_pieces(&self, _: &[Option<&Meta>], _: usize) -> Option<Piece> {
        Piece::elementwise(*self)
    }

    fn halved(&self, _: usize, to: DType) -> Option<Arc<dyn Op>> {
        Some(Arc::new(HalvedGrad { of: self.0, to: Half::of(to)? }))
    }

    fn in_place(&self) -> &[(usize, usize)] {
        &[(1, 0), (0, 0)]
    }
}

/// One of `v` and `dy` may be absent, and lie in `y`.
pub(super) fn of<K: Kind, T: Math + Elem + Wide>(k: K, v: Option<&[T]>, dy: Option<&[T]>, y: &mut [T]) {
    let walk = same(y.len());
    apply2_all(
        y,
        v,
        dy,
        &walk,
        #[inline(always)]
        |dx, v, dy| k.vjp_all(dx, v, dy),
    );
}

/// The same with `v` of half precision.
fn of_halves<K: Kind>(k: K, v: Elements<f32>, dy: Option<&[f32]>, y: &mut [f32]) {
    par::pieces(y, |start, y| {
        let mut near = [0.0; NEAR];
        for (i, y) in y.chunks_mut(NEAR).enumerate() {
            let (at, n) = (start + i * NEAR, y.len());
            of(k, Some(v.near(at, n, &mut near)), dy.map(|dy| &dy[at..at + n]), y);
        }
    });
}
