//! Dense 3×3 convolutions of stride 1 and both gradients with a quarter of the multiplications, by Winograd's
//! F(4×4, 3×3): tiles of 6×6 inputs are transformed, each of the 36 products is a matrix product over the channels of
//! all tiles, and its result is transformed back to 4×4 outputs.
//!
//! A task takes some tiles and some panels of output channels through all three steps, so that transformed tiles stay
//! in the cache ([`mod@forward`]). Where weights are many and tiles few it is the weights that stay there ([`few`]).
#![allow(unsafe_code, clippy::needless_range_loop)]

mod few;
mod forward;
mod moments;
mod source;
mod transform;
pub(super) mod weight;

use std::ops::Range;

use crate::kernels::conv::grids::Plan;
use crate::kernels::conv::{Epilogue, Geometry};
use crate::kernels::half::{Elements, ElementsMut};
use crate::kernels::isa::multiplies_blocks;
use crate::kernels::norm::block_room;
use crate::kernels::par::Shared;
use crate::kernels::simd::Vectors;
use moments::Parts;
use transform::{OUT, PRODUCTS};

const TAPS: usize = 9;

/// What transforms cost, in multiply-adds of vectors: of a tile's inputs, of its results, of a step's weights.
const INPUT: usize = 220;
const OUTPUT: usize = 200;
const WEIGHT: usize = 150;
/// Channels of a vector, for the purpose of that comparison.
const VECTOR: usize = 16;
/// Multiplications of an image, for one tap: see [`sums_pairs`].
const MANY: usize = 1 << 20;

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
    // Pairs in blocks are multiplied faster than they are transformed.
    let fits = fits && !(g.pairs && multiplies_blocks());
    let direct = g.n * extents[1] * extents[2] * TAPS * terms * vectors;
    let products = PRODUCTS * terms * vectors + INPUT * ci.div_ceil(VECTOR) + OUTPUT * vectors;
    fits && 8 * direct > 9 * (tiles * products + WEIGHT * ci * vectors)
}

/// See [`applies`], of the forward pass.
pub(super) fn applies_forward(g: &Geometry) -> bool {
    let terms = if sums_pairs(g) { g.terms(g.c) } else { g.c };
    applies(g, [g.c, terms], g.oc, g.y)
}

/// Are the forward pass's products, should it be one of these, of pairs? Transforms magnify what rounding to them does (to 1.0% of
/// the results' rms at 128 channels, from 0.24%), and all that comes after sees it, where gradients are used once. So it is done
/// only where an image takes many multiplications.
fn sums_pairs(g: &Geometry) -> bool {
    g.pairs && g.c * g.oc * g.y.iter().product::<usize>() >= MANY
}

/// Is the forward pass one of these, and gathers it moments of its results? (Of whole elements, it leaves sums as they always were.)
pub(super) fn gathers(g: &Geometry) -> bool {
    g.pairs && applies_forward(g)
}

/// Multiplications of all images, of one input by one output channel.
pub(super) fn multiplications(g: &Geometry) -> usize {
    Tiles::of(g.n, g.y).total * PRODUCTS
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

    /// Image, first row and column of the results of each of some tiles.
    #[inline(always)]
    fn walk(&self, tiles: Range<usize>) -> Walk {
        let (line, column) = (tiles.start / self.columns, tiles.start % self.columns);
        let next = [line / self.rows, line % self.rows * OUT, column * OUT];
        Walk { extents: [self.rows * OUT, self.columns * OUT], next, left: tiles.len() }
    }
}

/// Without a division for each.
struct Walk {
    extents: [usize; 2],
    next: [usize; 3],
    left: usize,
}

impl Iterator for Walk {
    type Item = [usize; 3];

    #[inline(always)]
    fn next(&mut self) -> Option<[usize; 3]> {
        self.left = self.left.checked_sub(1)?;
        let at = self.next;
        self.next[2] += OUT;
        if self.next[2] == self.extents[1] {
            self.next = [at[0], at[1] + OUT, 0];
            if self.next[1] == self.extents[0] {
                self.next = [at[0] + 1, 0, 0];
            }
        }
        Some(at)
    }
}

/// Transformed tiles in memory: for each product the tiles, of each the channels, or some of them, `width` terms.
#[derive(Debug, Clone, Copy)]
struct Transformed {
    width: usize,
    /// Terms from a tile to the next, and from a product to the next. (Not a power of two: such rows would
    /// compete for the same cache lines.)
    tile: usize,
    product: usize,
}

impl Transformed {
    fn new(tiles: usize, channels: usize, lanes: usize) -> Transformed {
        let width = channels.next_multiple_of(lanes);
        let tile = if width.is_multiple_of(64) { width + lanes } else { width };
        Transformed { width, tile, product: tiles * tile + lanes }
    }

    fn size(&self) -> usize {
        PRODUCTS * self.product
    }
}

/// The convolution of whole elements: tiles are transformed before they are rounded to pairs.
fn whole(g: &Geometry) -> Geometry {
    Geometry { pairs: false, ..g.clone() }
}

/// Elements of scratch that [`forward`] needs; `half`: is X of half precision?
pub(super) fn forward_scratch<T: Vectors>(g: &Geometry, half: bool) -> usize {
    let plan = Plan::forward(&whole(g));
    if sums_pairs(g) {
        forward::scratch::<u32, T>(&plan, half)
    } else {
        forward::scratch::<T, T>(&plan, half)
    }
}

/// Blocks of results of whose moments [`forward`] tells.
pub(super) fn forward_blocks<T: Vectors>(g: &Geometry) -> usize {
    forward::blocks::<T>(&Plan::forward(&whole(g)))
}

/// `y = clamp(conv(x, w) + bias + residual)` with x (N, spatial…, C) and y (N, spatial…, M), w (M, C, 3, 3). `moments`: room for
/// those of the results, of each block what [`block_moments`](crate::kernels::norm::block_moments) says of one.
pub(super) fn forward<T: Vectors>(
    g: &Geometry,
    x: Elements<T>,
    w: &[T],
    epilogue: Epilogue<T>,
    y: ElementsMut<T>,
    moments: Option<&mut [f64]>,
    scratch: &mut [T],
) {
    g.check_sizes(x.len(), y.len());
    let plan = Plan::forward(&whole(g));
    let moments = moments.map(|room| {
        assert!(room.len() == forward_blocks::<T>(g) * block_room(g.oc), "room for moments");
        Parts { room: Shared::new(room), channels: g.oc }
    });
    let moments = moments.as_ref();
    match sums_pairs(g) {
        false => forward::run::<T, T>(&plan, true, x, w, epilogue, y, moments, scratch),
        true => forward::run::<u32, T>(&plan, true, x, w, epilogue, y, moments, scratch),
    }
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
        false => forward::run::<T, T>(&plan, false, dy, w, epilogue, dx, None, scratch),
        true => forward::run::<u32, T>(&plan, false, dy, w, epilogue, dx, None, scratch),
    }
}
