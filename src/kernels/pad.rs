//! Padding that repeats what is there.

use crate::kernels::par::{GRAIN, rows};
use crate::kernels::strided::{Unit, dense};
use crate::tensor::Float;

/// Which element of an axis stands at a place outside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Border {
    /// Mirrored about the first and the last element, which are not repeated.
    Reflect,
    /// The first or the last element.
    Edge,
    /// As if the axis were a circle.
    Wrap,
}

impl Border {
    /// The element of `0..n` at place `i`.
    fn index(self, i: i64, n: usize) -> usize {
        let n = n as i64;
        let at = match self {
            _ if (0..n).contains(&i) => i,
            Border::Edge => i.clamp(0, n - 1),
            Border::Wrap => i.rem_euclid(n),
            Border::Reflect if n == 1 => 0,
            Border::Reflect => {
                let period = 2 * (n - 1);
                let at = i.rem_euclid(period);
                at.min(period - at)
            }
        };
        at as usize
    }
}

/// Offset in X of the row of Y numbered `row` among the axes before the last.
fn origin(
    mut row: usize,
    x_dims: &[usize],
    strides: &[isize],
    pads: &[i64],
    border: Border,
    y_dims: &[usize],
) -> usize {
    let mut offset = 0;
    for a in (0..y_dims.len() - 1).rev() {
        let at = (row % y_dims[a]) as i64 - pads[a];
        row /= y_dims[a];
        offset += border.index(at, x_dims[a]) * strides[a] as usize;
    }
    offset
}

/// Y (`y_dims`) from X (`x_dims`), `pads[a]` elements before axis `a`.
pub fn mirror<T: Unit>(
    x: &[T],
    x_dims: &[usize],
    pads: &[i64],
    border: Border,
    y_dims: &[usize],
    y: &mut [T],
) {
    let Some((&inner, _)) = y_dims.split_last() else {
        y.copy_from_slice(x);
        return;
    };
    let strides = dense(x_dims);
    let (last, n) = (y_dims.len() - 1, x_dims[y_dims.len() - 1]);
    // The stretch of a row that is X's own.
    let start = pads[last].clamp(0, inner as i64) as usize;
    let end = (pads[last] + n as i64).clamp(start as i64, inner as i64) as usize;
    rows(y, inner, GRAIN, |first, piece| {
        for (r, y) in piece.chunks_exact_mut(inner.max(1)).enumerate() {
            let base = origin(first + r, x_dims, &strides, pads, border, y_dims);
            let x = &x[base..base + n];
            for (i, v) in y[..start].iter_mut().enumerate() {
                *v = x[border.index(i as i64 - pads[last], n)];
            }
            let own = (start as i64 - pads[last]).clamp(0, n as i64) as usize;
            y[start..end].copy_from_slice(&x[own..own + end - start]);
            for (i, v) in y[end..].iter_mut().enumerate() {
                *v = x[border.index((end + i) as i64 - pads[last], n)];
            }
        }
    });
}

/// The transpose of [`mirror`]: every element of dY added to where it came from in dX.
pub fn fold<T: Float>(
    dy: &[T],
    y_dims: &[usize],
    pads: &[i64],
    border: Border,
    x_dims: &[usize],
    dx: &mut [T],
) {
    let Some((&inner, _)) = y_dims.split_last() else {
        dx.copy_from_slice(dy);
        return;
    };
    let rank = x_dims.len();
    // Leading axes without padding are independent of each other.
    let free = (0..rank - 1).take_while(|&a| x_dims[a] == y_dims[a] && pads[a] == 0).count();
    let x_block: usize = x_dims[free..].iter().product();
    let y_block: usize = y_dims[free..].iter().product();
    let strides = dense(x_dims);
    let n = x_dims[rank - 1];
    rows(dx, x_block, GRAIN, |first, piece| {
        piece.fill(T::zero());
        if inner == 0 {
            return;
        }
        for (b, dx) in piece.chunks_exact_mut(x_block.max(1)).enumerate() {
            let dy = &dy[(first + b) * y_block..][..y_block];
            for (r, dy) in dy.chunks_exact(inner).enumerate() {
                let base =
                    origin(r, &x_dims[free..], &strides[free..], &pads[free..], border, &y_dims[free..]);
                for (i, &g) in dy.iter().enumerate() {
                    dx[base + border.index(i as i64 - pads[rank - 1], n)] += g;
                }
            }
        }
    });
}
