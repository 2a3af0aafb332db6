//! Channels-last images of which tiles are read and transformed.
#![allow(unsafe_code, clippy::needless_range_loop)]

use std::ops::Range;

use super::transform::{IN, OUT, Tile, put_across, put_beside};
use super::{Tiles, Transformed};
use crate::kernels::ahead::LINE;
use crate::kernels::conv::grids::Plan;
use crate::kernels::half::{Elements, Half};
use crate::kernels::simd::{Bf16, Simd, Stored, Vectors, Whole};
use crate::kernels::tile::{Form, Terms};

/// Images; beyond their edges are zeros.
pub(super) struct Source<'a, T> {
    pub(super) images: Elements<'a, T>,
    pub(super) zeros: &'a [T],
    pub(super) extents: [usize; 2],
    pub(super) channels: usize,
    /// Zeros before the images.
    pub(super) low: [usize; 2],
    /// Where they are of half precision: room for the rows that a row of tiles reads, widened.
    pub(super) near: &'a mut [T],
    /// Image and first row of the tiles whose rows are near.
    pub(super) held: Option<[usize; 2]>,
}

/// Where the rows of tiles lie in a form: bfloat16 becomes whole in registers, other half precision a few rows at a time.
pub(super) trait Lies<T: Vectors>: Stored<T> {
    /// The rows of the tiles whose first results are in this row, and which element is the first that is there.
    fn rows<const N: usize>(source: &mut Source<T>, image: usize, row: usize) -> (*const Self::Bits, usize);
}

impl<T: Vectors> Lies<T> for Whole {
    #[inline(always)]
    fn rows<const N: usize>(source: &mut Source<T>, image: usize, row: usize) -> (*const T, usize) {
        match source.images {
            Elements::Whole(x) => (x.as_ptr(), 0),
            Elements::Half(..) => source.widened::<N>(image, row),
        }
    }
}

impl<T: Vectors> Lies<T> for Bf16 {
    #[inline(always)]
    fn rows<const N: usize>(source: &mut Source<T>, _: usize, _: usize) -> (*const u16, usize) {
        match source.images {
            Elements::Half(Half::Bf16, x) => (x.as_ptr(), 0),
            _ => panic!("images of another type"),
        }
    }
}

impl<'a, T: Vectors> Source<'a, T> {
    /// The input of a convolution; `near`: [`room`] elements.
    pub(super) fn of(plan: &Plan, x: Elements<'a, T>, zeros: &'a [T], near: &'a mut [T]) -> Self {
        let (extents, low) = ([plan.source[1], plan.source[2]], [plan.low[1], plan.low[2]]);
        Source { images: x, zeros, extents, channels: plan.ci, low, near, held: None }
    }

    pub(super) fn is_bf16(&self) -> bool {
        self.images.half() == Some(Half::Bf16)
    }

    /// Where the positions of a tile are of which the first results are at `row` and `column`.
    #[inline(always)]
    pub(super) fn tile<B: Lies<T>, const N: usize>(
        &mut self,
        [image, row, column]: [usize; 3],
    ) -> [[*const B::Bits; N]; N] {
        // (Zeros are zeros in half precision, too, where as many take half the room.)
        let mut all = [[self.zeros.as_ptr().cast(); N]; N];
        let [rows, columns] = self.extents;
        let (data, first) = B::rows::<N>(self, image, row);
        for i in 0..N {
            let y = (row + i).wrapping_sub(self.low[0]);
            for j in 0..N {
                let x = (column + j).wrapping_sub(self.low[1]);
                if y < rows && x < columns {
                    let at = ((image * rows + y) * columns + x) * self.channels;
                    all[i][j] = data.wrapping_add(at - first);
                }
            }
        }
        all
    }

    /// The rows of the tiles whose first results are in this row, and which element is the first of them.
    fn widened<const N: usize>(&mut self, image: usize, row: usize) -> (*const T, usize) {
        let [rows, columns] = self.extents;
        let after = (row + N).saturating_sub(self.low[0]).min(rows);
        let above = row.saturating_sub(self.low[0]).min(after);
        let first = (image * rows + above) * columns * self.channels;
        if self.held != Some([image, row]) {
            self.held = Some([image, row]);
            let n = (after - above) * columns * self.channels;
            self.images.copy(first, &mut self.near[..n]);
        }
        (self.near.as_ptr(), first)
    }
}

/// Elements of room for the rows of images that are near, where they are of half precision.
pub(super) fn room(extents: [usize; 3], channels: usize, half: bool) -> usize {
    if half { IN.min(extents[1]) * extents[2] * channels } else { 0 }
}

/// Transforms some channels of `tiles`, which are read from `source`, to terms of neighbours: channels (`BESIDE`) or tiles. Channels
/// beyond the width of `layout` go to further ones like it, one behind the other.
///
/// # Safety
/// `source` must hold the tiles' images, `to` be writable for the size of `layout`, whose tiles are as many.
#[inline(always)]
pub(super) unsafe fn transform<
    D: Terms<S: Simd<Elem: Vectors>>,
    F: Tile<N>,
    const N: usize,
    const BESIDE: bool,
>(
    of: &Tiles,
    tiles: Range<usize>,
    source: &mut Source<'_, <D::S as Simd>::Elem>,
    channels: Range<usize>,
    layout: &Transformed,
    to: *mut D::Term,
) where
    D::Term: Form<<D::S as Simd>::Elem>,
{
    // SAFETY: the caller's promise.
    unsafe {
        match source.is_bf16() {
            false => transform_as::<D, Whole, F, N, BESIDE>(of, tiles, source, channels, layout, to),
            true => transform_as::<D, Bf16, F, N, BESIDE>(of, tiles, source, channels, layout, to),
        }
    }
}

/// # Safety
/// As of [`transform`].
#[inline(always)]
unsafe fn transform_as<
    D: Terms<S: Simd<Elem: Vectors>>,
    B: Lies<<D::S as Simd>::Elem>,
    F: Tile<N>,
    const N: usize,
    const BESIDE: bool,
>(
    of: &Tiles,
    tiles: Range<usize>,
    source: &mut Source<'_, <D::S as Simd>::Elem>,
    channels: Range<usize>,
    layout: &Transformed,
    to: *mut D::Term,
) where
    D::Term: Form<<D::S as Simd>::Elem>,
{
    let each = <D::Term as Form<_>>::EACH;
    let [tiles_each, channels_each] = if BESIDE { [1, each] } else { [each, 1] };
    for (tile, place) in of.walk(tiles).enumerate() {
        let d = source.tile::<B, N>(place);
        fetch_below::<D::S, B, N>(&d, source);
        let mut channel = channels.start;
        // The term of the channel in its layout, and where that is.
        let (mut term, mut panel) = (0, to);
        while channel < channels.end {
            let n = (channels.end - channel).min(D::S::LANES);
            if term == layout.width {
                (term, panel) = (0, panel.wrapping_add(layout.size()));
            }
            // SAFETY: the caller's promise.
            unsafe {
                let to = panel.add(tile / tiles_each * layout.tile + term);
                F::rows::<D::S, B>(
                    &d,
                    channel,
                    n,
                    #[inline(always)]
                    |i, row| match BESIDE {
                        true => put_beside::<D>(i, &row, to, layout.product),
                        false => put_across::<D>(tile % each, i, &row, to, layout.product),
                    },
                );
            }
            channel += D::S::LANES;
            term += D::S::LANES / channels_each;
        }
    }
}

/// Has the positions fetched that the tile below this one does not share with it: rows of images do not look like a stream.
#[inline(always)]
fn fetch_below<S: Simd<Elem: Vectors>, B: Lies<S::Elem>, const N: usize>(
    at: &[[*const B::Bits; N]; N],
    source: &Source<'_, S::Elem>,
) {
    let down = OUT * source.extents[1] * source.channels;
    for i in N - OUT..N {
        for j in N - OUT..N {
            for channel in (0..source.channels).step_by(LINE / size_of::<B::Bits>()) {
                // SAFETY: fetching is allowed anywhere.
                unsafe { S::prefetch(at[i][j].wrapping_add(down + channel).cast()) }
            }
        }
    }
}
