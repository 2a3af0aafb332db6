//! The sweeps of elementwise gradients.

use super::Kind;
use crate::kernels::elementwise::{apply2, same};
use crate::kernels::half::Elements;
use crate::kernels::isa::Wide;
use crate::kernels::math::Math;
use crate::kernels::par;
use crate::tensor::Elem;

/// Elements that are widened at a time.
const NEAR: usize = 2048;

/// One of `v` and `dy` may be absent, and lie in `y`.
pub(super) fn of<K: Kind, T: Math + Elem + Wide>(k: K, v: Option<&[T]>, dy: Option<&[T]>, y: &mut [T]) {
    let walk = same(y.len());
    apply2(
        y,
        v,
        dy,
        &walk,
        #[inline(always)]
        |v: T, dy: T| k.vjp(v, dy),
    );
}

/// The same with `v` of half precision.
pub(super) fn of_halves<K: Kind>(k: K, v: Elements<f32>, dy: Option<&[f32]>, y: &mut [f32]) {
    par::pieces(y, |start, y| {
        let mut near = [0.0; NEAR];
        for (i, y) in y.chunks_mut(NEAR).enumerate() {
            let (at, n) = (start + i * NEAR, y.len());
            of(k, Some(v.near(at, n, &mut near)), dy.map(|dy| &dy[at..at + n]), y);
        }
    });
}
