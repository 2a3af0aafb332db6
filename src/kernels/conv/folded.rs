//! Pairs of an odd number of channels: a row's elements by twos, whichever positions they belong to.
//!
//! Three channels are two pairs with a zero, a quarter of the products for nothing, and a run of the sum ends with each tap. A row of
//! W positions of C channels is as well one of W·C/2 positions of two; the taps of a kernel's row, perhaps with a zero before and one
//! after them, are so many taps of two channels. A stride of an even number of elements keeps the positions' taps equal.

use super::Geometry;
use crate::kernels::simd::Vectors;

/// Channels below which it pays.
const FEW: usize = 8;

/// The same convolution, of two channels, if it is worth its while.
pub(super) fn of(g: &Geometry) -> Option<Geometry> {
    let [even_stride, even_row] = [g.stride[2], g.x[2]].map(|n| (n * g.c).is_multiple_of(2));
    let few = g.groups == 1 && g.c < FEW && g.c % 2 == 1 && g.k[2] > 1;
    (g.pairs && few && g.dilation[2] == 1 && even_stride && even_row).then(|| {
        let mut folded = Geometry { c: 2, ..g.clone() };
        folded.x[2] = g.x[2] * g.c / 2;
        folded.stride[2] = g.stride[2] * g.c / 2;
        folded.pad[2] = (g.pad[2] * g.c).div_ceil(2);
        folded.k[2] = (before(g) + g.k[2] * g.c).div_ceil(2);
        folded
    })
}

/// Zeros before the taps of a kernel's row, to begin with a pair.
fn before(g: &Geometry) -> usize {
    g.pad[2] * g.c % 2
}

/// Elements of its weights.
pub(super) fn weights_room(folded: &Geometry) -> usize {
    folded.oc * folded.c * folded.taps()
}

/// Its weights (M, 2, k…) of those of `g`, (M, C, k…).
pub(super) fn weights<T: Vectors>(g: &Geometry, folded: &Geometry, w: &[T], out: &mut [T]) {
    let (lines, k, pairs) = (g.k[0] * g.k[1], g.k[2], folded.k[2]);
    out.fill(T::zero());
    for (w, out) in w.chunks_exact(g.c * lines * k).zip(out.chunks_exact_mut(2 * lines * pairs)) {
        for (i, w) in w.iter().enumerate() {
            let [channel, line, tap] = super::split(i, [g.c, lines, k]);
            let at = before(g) + tap * g.c + channel;
            out[(at % 2 * lines + line) * pairs + at / 2] = *w;
        }
    }
}
