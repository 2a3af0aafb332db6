//! Patches of an image in columns, and back.

use smallvec::SmallVec;

use crate::kernels::par;
use crate::tensor::Float;

/// One entry a dimension.
pub type Extents = SmallVec<[usize; 4]>;

/// Where patches of `block` elements lie in an image, in any number of dimensions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Patches {
    pub image: Extents,
    pub block: Extents,
    pub stride: Extents,
    pub dilation: Extents,
    /// Zeros before the image.
    pub pad: Extents,
    /// Patches along each dimension.
    pub count: Extents,
}

impl Patches {
    pub fn taps(&self) -> usize {
        self.block.iter().product()
    }

    pub fn columns(&self) -> usize {
        self.count.iter().product()
    }

    fn plane(&self) -> usize {
        self.image.iter().product()
    }

    /// Calls `f(element of the image, element of the columns)` for all that lie inside.
    fn each(&self, mut f: impl FnMut(usize, usize)) {
        let rank = self.image.len();
        let columns = self.columns();
        for tap in 0..self.taps() {
            for column in 0..columns {
                let (mut t, mut c) = (tap, column);
                let (mut at, mut step, mut inside) = (0, 1, true);
                for d in (0..rank).rev() {
                    let place = c % self.count[d] * self.stride[d] + t % self.block[d] * self.dilation[d];
                    (t, c) = (t / self.block[d], c / self.count[d]);
                    let place = place.wrapping_sub(self.pad[d]);
                    inside &= place < self.image[d];
                    at += place.wrapping_mul(step);
                    step *= self.image[d];
                }
                if inside {
                    f(at, tap * columns + column);
                }
            }
        }
    }
}

/// Adds up the columns (planes, taps, columns) where they lie in the images (planes, image).
pub fn gather<T: Float>(p: &Patches, columns: &[T], images: &mut [T]) {
    let (plane, size) = (p.plane(), p.taps() * p.columns());
    par::rows(images, plane, par::GRAIN, |first, images| {
        for (i, image) in images.chunks_exact_mut(plane.max(1)).enumerate() {
            image.fill(T::zero());
            let columns = &columns[(first + i) * size..][..size];
            p.each(|at, column| image[at] += columns[column]);
        }
    });
}

/// The reverse: columns of images, 0 where a patch reaches outside.
pub fn spread<T: Float>(p: &Patches, images: &[T], columns: &mut [T]) {
    let (plane, size) = (p.plane(), p.taps() * p.columns());
    par::rows(columns, size, par::GRAIN, |first, columns| {
        for (i, columns) in columns.chunks_exact_mut(size.max(1)).enumerate() {
            columns.fill(T::zero());
            let image = &images[(first + i) * plane..][..plane];
            p.each(|at, column| columns[column] = image[at]);
        }
    });
}
