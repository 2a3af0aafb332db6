//! Dense 3×3 convolutions of stride 1 and both gradients with a quarter of the multiplications, by Winograd's
//! F(4×4, 3×3): tiles of 6×6 inputs are transformed, each of the 36 products is a matrix product over the channels of
//! all tiles, and its result is transformed back to 4×4 outputs.
//!
//! A task takes some tiles and some panels of output channels through all three steps, so that transformed tiles stay
//! in the cache ([`mod@forward`]). Where weights are many and tiles few it is the weights that stay there ([`few`]).
#![allow(unsafe_code, clippy::needless_range_loop)]

mod few;
mod forward;
mod transform;
pub(super) mod weight;

use crate::kernels::conv::grids::Plan;
use crate::kernels::conv::{Epilogue, Geometry};
use crate::kernels::half::{Elements, ElementsMut};
use crate::kernels::isa::multiplies_blocks;
use crate::kernels::simd::Vectors;
use transform::{IN, OUT, PRODUCTS};

const TAPS: usize = 9;

/// What transforms cost, in multiply-adds of vectors: of a tile's inputs, of its results, of a step's weights.
const INPUT: usize = 220;
const OUTPUT: usize = 200;
const WEIGHT: usize = 150;
/// Channels of a vector, for the purpose of that comparison.
const VECTOR: usize = 16;

/// Is the sum over `ci` channels, in as many terms, for `co` channels of images of the given extents one of these, and worth it?
fn applies(g: &Geometry, [ci, terms]: [usize; 2], co: usize, extents: [usize; 3]) -> bool {
    let fits = g.groups == 1
        && g.axis == 1
        && g.k == [1, 3, 3]
        && g.stride == [1; 3]
        && g.dilation == [1; 3]
        && g.pad[1..].iter().all(|p| *p <= 2);
    let tiles = Tiles::of(g.n, extents).total;
    let vectors = co.div_ceil(VECTOR);
    // Pairs of few channels, or in blocks, are multiplied faster than they are transformed.
    let fits = fits && !(g.pairs && (vectors == 1 || multiplies_blocks()));
    let direct = g.n * extents[1] * extents[2] * TAPS * terms * vectors;
    let products = PRODUCTS * terms * vectors + INPUT * ci.div_ceil(VECTOR) + OUTPUT * vectors;
    fits && 8 * direct > 9 * (tiles * products + WEIGHT * ci * vectors)
}

/// See [`applies`], of the forward pass: its products are of whole elements always. Transforms magnify what rounding to pairs does
/// (to 1.0% of the results' rms at 128 channels, from 0.24%), and all that comes after sees it.
pub(super) fn applies_forward(g: &Geometry) -> bool {
    applies(g, [g.c; 2], g.oc, g.y)
}

/// See [`applies`], of the input gradient.
pub(super) fn applies_back(g: &Geometry) -> bool {
    applies(g, [g.oc, g.terms(g.oc)], g.c, g.x)
}

/// See [`applies`], of the weight gradient.
pub(super) fn applies_weight(g: &Geometry) -> bool {
    applies(g, [g.c, g.terms(g.c)], g.oc, g.y)
}

/// Tiles in the order of images, rows, columns.
#[derive(Debug, Clone, Copy)]
struct Tiles {
    rows: usize,
    columns: usize,
    total: usize,
}

impl Tiles {
    /// Of `n` images of the given extents.
    fn of(n: usize, extents: [usize; 3]) -> Tiles {
        let (rows, columns) = (extents[1].div_ceil(OUT), extents[2].div_ceil(OUT));
        Tiles { rows, columns, total: n * rows * columns }
    }

    /// Image, first row and column of a tile's results.
    #[inline(always)]
    fn at(&self, tile: usize) -> [usize; 3] {
        let (line, column) = (tile / self.columns, tile % self.columns);
        [line / self.rows, line % self.rows * OUT, column * OUT]
    }
}

/// Transformed tiles in memory: for each product the tiles, of each the channels.
#[derive(Debug, Clone, Copy)]
struct Transformed {
    /// Terms from a tile to the next, and from a product to the next. (Not a power of two: such rows would
    /// compete for the same cache lines.)
    tile: usize,
    product: usize,
}

impl Transformed {
    fn new(tiles: usize, channels: usize, lanes: usize) -> Transformed {
        let mut tile = channels.next_multiple_of(lanes);
        if tile.is_multiple_of(64) {
            tile += lanes;
        }
        Transformed { tile, product: tiles * tile + lanes }
    }

    fn size(&self) -> usize {
        PRODUCTS * self.product
    }
}

/// Channels-last images of which tiles are read; beyond their edges are zeros.
struct Source<'a, T> {
    images: Elements<'a, T>,
    zeros: &'a [T],
    extents: [usize; 2],
    channels: usize,
    /// Zeros before the images.
    low: [usize; 2],
    /// Where they are of half precision: room for the rows that a row of tiles reads, widened.
    near: &'a mut [T],
    /// Image and first row of the tiles whose rows are near.
    held: Option<[usize; 2]>,
}

impl<'a, T: Vectors> Source<'a, T> {
    /// The input of a convolution; `near`: [`room`] elements.
    fn of(plan: &Plan, x: Elements<'a, T>, zeros: &'a [T], near: &'a mut [T]) -> Self {
        let (extents, low) = ([plan.source[1], plan.source[2]], [plan.low[1], plan.low[2]]);
        Source { images: x, zeros, extents, channels: plan.ci, low, near, held: None }
    }

    /// Where the positions of a tile are of which the first results are at `row` and `column`.
    #[inline(always)]
    fn tile<const N: usize>(&mut self, [image, row, column]: [usize; 3]) -> [[*const T; N]; N] {
        let mut all = [[self.zeros.as_ptr(); N]; N];
        let [rows, columns] = self.extents;
        let (data, first) = match self.images {
            Elements::Whole(x) => (x.as_ptr(), 0),
            Elements::Half(..) => self.widened::<N>(image, row),
        };
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
fn room(extents: [usize; 3], channels: usize, half: bool) -> usize {
    if half { IN.min(extents[1]) * extents[2] * channels } else { 0 }
}

/// The convolution of whole elements: tiles are transformed before they are rounded to pairs.
fn whole(g: &Geometry) -> Geometry {
    Geometry { pairs: false, ..g.clone() }
}

/// Elements of scratch that [`forward`] needs; `half`: is X of half precision?
pub(super) fn forward_scratch<T: Vectors>(g: &Geometry, half: bool) -> usize {
    forward::scratch::<T, T>(&Plan::forward(&whole(g)), half)
}

/// `y = clamp(conv(x, w) + bias + residual)` with x (N, spatial…, C) and y (N, spatial…, M), w (M, C, 3, 3).
pub(super) fn forward<T: Vectors>(
    g: &Geometry,
    x: Elements<T>,
    w: &[T],
    epilogue: Epilogue<T>,
    y: &mut [T],
    scratch: &mut [T],
) {
    g.check_sizes(x.len(), y.len());
    forward::run::<T, T>(&Plan::forward(&whole(g)), true, x, w, epilogue, ElementsMut::Whole(y), scratch);
}

/// Elements of scratch that [`input_grad`] needs; `half`: is dY of half precision?
pub(super) fn input_grad_scratch<T: Vectors>(g: &Geometry, half: bool) -> usize {
    let plan = Plan::input_grad(&whole(g));
    if g.pairs { forward::scratch::<u32, T>(&plan, half) } else { forward::scratch::<T, T>(&plan, half) }
}

/// `dx = addend + Σ_t W[t]ᵀ·dy[…]`: the convolution with the kernel turned round.
pub(super) fn input_grad<T: Vectors>(
    g: &Geometry,
    dy: Elements<T>,
    w: &[T],
    epilogue: Epilogue<T>,
    dx: ElementsMut<T>,
    scratch: &mut [T],
) {
    g.check_sizes(dx.len(), dy.len());
    let plan = Plan::input_grad(&whole(g));
    match g.pairs {
        false => forward::run::<T, T>(&plan, false, dy, w, epilogue, dx, scratch),
        true => forward::run::<u32, T>(&plan, false, dy, w, epilogue, dx, scratch),
    }
}
