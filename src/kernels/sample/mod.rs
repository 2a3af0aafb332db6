//! Reading tensors between their elements, at places that other tensors name.

pub mod deform;
pub mod grid;
pub mod patches;
pub mod roi;

use crate::tensor::Float;

/// An element that is read, within its plane, with its weight.
type Tap<T> = (usize, T);

/// The four elements around a place of an image of `h`×`w`, which lies in it or at most one element outside; elements
/// outside are left out. Also, for each, the derivatives of its weight along y and x.
fn around<T: Float>(y: T, x: T, [h, w]: [usize; 2], mut tap: impl FnMut(usize, T, [T; 2])) {
    let (y0, x0) = (y.floor(), x.floor());
    let (fy, fx) = (y - y0, x - x0);
    let one = T::one();
    for (dy, wy, sy) in [(0, one - fy, -one), (1, fy, one)] {
        for (dx, wx, sx) in [(0, one - fx, -one), (1, fx, one)] {
            let (i, j) = (y0.to64() as i64 + dy, x0.to64() as i64 + dx);
            if (0..h as i64).contains(&i) && (0..w as i64).contains(&j) {
                tap(i as usize * w + j as usize, wy * wx, [sy * wx, wy * sx]);
            }
        }
    }
}
