//! Convolution and its two gradients, over one to three spatial dimensions, with the channels last.
//!
//! Dense convolutions multiply register tiles without patches in memory ([`dense`], [`weight`]); depthwise ones
//! stream ([`depthwise`]). Tensors with their channels first are transposed in scratch memory. Work is divided into
//! tasks by the problem alone; tasks that need scratch share a fixed number of slots.

mod blocks;
mod both;
mod dense;
mod depthwise;
mod folded;
mod grids;
mod load;
mod narrow;
mod near;
mod paired;
mod panels;
mod pointwise;
mod regions;
mod results;
mod simpler;
mod statistics;
mod way;
mod weight;
mod winograd;

use crate::kernels::elementwise::Clamp;
use crate::kernels::half::{Elements, ElementsMut};
use crate::kernels::layout::Layout;
use crate::kernels::par::{in_slots, slots};
use crate::kernels::simd::Vectors;
use crate::kernels::strided;
use crate::tensor::Float;

use statistics::Done;

pub use both::{Both, Plain, Sums, fuses, grads, grads_scratch, sums_room};
pub use depthwise::{Expansion, expands, forward_expanded, forward_expanded_scratch};
pub use load::{Load, Norm, NormGrad, Operand};
pub use statistics::{Statistics, forward_statistics, statistics_room, statistics_scratch};

/// Channels from which on it pays to look for simpler convolutions.
const CHANNELS: usize = 16;

/// Sizes of a convolution. Fewer than three spatial dimensions are preceded by ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Geometry {
    pub layout: Layout,
    /// Images.
    pub n: usize,
    /// Input and output channels, all groups together.
    pub c: usize,
    pub oc: usize,
    pub groups: usize,
    /// The first spatial dimension that is used (0 for three).
    pub axis: usize,
    /// Input, output and kernel extents.
    pub x: [usize; 3],
    pub y: [usize; 3],
    pub k: [usize; 3],
    pub stride: [usize; 3],
    pub dilation: [usize; 3],
    /// Zeros before the input.
    pub pad: [usize; 3],
    /// Dense convolutions of one group may round their operands to bfloat16 and multiply them in pairs, where that is faster: see
    /// [`pairs`](crate::kernels::pairs).
    pub pairs: bool,
}

/// What is added to a result while it is in registers.
#[derive(Debug, Clone, Copy)]
pub enum Residual<'a, T> {
    None,
    /// A tensor of the result's size.
    Of(&'a [T]),
    /// What the result's buffer holds.
    InOutput,
}

impl<T> Residual<'_, T> {
    /// Where it lies, given where the results do.
    fn address(&self, y: impl FnOnce() -> *mut T) -> Option<*const T> {
        match self {
            Residual::None => None,
            Residual::Of(r) => Some(r.as_ptr()),
            Residual::InOutput => Some(y().cast_const()),
        }
    }
}

/// What happens to the results before they are written: `clamp(result + bias + residual)`.
#[derive(Debug, Clone, Copy)]
pub struct Epilogue<'a, T> {
    /// One a channel.
    pub bias: Option<&'a [T]>,
    pub residual: Residual<'a, T>,
    pub clamp: Clamp<T>,
}

impl<T: Float> Epilogue<'_, T> {
    /// Results as they are.
    pub fn none() -> Self {
        Epilogue { bias: None, residual: Residual::None, clamp: Clamp::NONE.to() }
    }

    fn is_none(&self) -> bool {
        self.bias.is_none() && matches!(self.residual, Residual::None) && self.clamp.is_none()
    }

    /// Does a result of no terms stay what its buffer holds?
    fn leaves(&self) -> bool {
        self.bias.is_none() && matches!(self.residual, Residual::InOutput) && self.clamp.is_none()
    }

    /// For so many results from element `start` on.
    fn from(&self, start: usize, len: usize) -> Self {
        let residual = match self.residual {
            Residual::Of(r) => Residual::Of(&r[start..start + len]),
            other => other,
        };
        Epilogue { residual, ..*self }
    }

    /// Of results that are all zero.
    fn of_nothing(&self, channels: usize, y: &mut [T]) {
        for (i, y) in y.iter_mut().enumerate() {
            let residual = match self.residual {
                Residual::None => T::zero(),
                Residual::Of(r) => r[i],
                Residual::InOutput => *y,
            };
            let v = residual + self.bias.map_or(T::zero(), |b| b[i % channels]);
            *y = self.clamp.of(v);
        }
    }
}

fn volume(d: [usize; 3]) -> usize {
    d.iter().product()
}

/// An index into extents as coordinates.
fn split(t: usize, k: [usize; 3]) -> [usize; 3] {
    [t / (k[1] * k[2]), t / k[2] % k[1], t % k[2]]
}

/// Elements from a position to the next in each dimension, `c` a position.
fn strides(extents: [usize; 3], c: usize) -> [usize; 3] {
    [extents[1] * extents[2] * c, extents[2] * c, c]
}

impl Geometry {
    /// The kernels rely on it: X (or dX) and Y (or dY) have this geometry's sizes.
    fn check<T>(&self, x: &[T], y: &[T]) {
        self.check_sizes(x.len(), y.len());
    }

    /// The same of their numbers of elements.
    fn check_sizes(&self, x: usize, y: usize) {
        assert!(x == self.inputs() && y == self.outputs(), "operands of a convolution");
    }

    /// Input and output channels of a group.
    fn cg(&self) -> usize {
        self.c / self.groups
    }

    fn og(&self) -> usize {
        self.oc / self.groups
    }

    fn taps(&self) -> usize {
        volume(self.k)
    }

    /// Terms of the sum over `channels` of a group: of pairs, half as many.
    fn terms(&self, channels: usize) -> usize {
        if self.pairs { channels.div_ceil(2) } else { channels }
    }

    /// Of the convolution and of each of its gradients; padding counts.
    pub fn multiply_adds(&self) -> usize {
        self.outputs() * self.cg() * self.taps()
    }

    fn inputs(&self) -> usize {
        self.n * self.c * volume(self.x)
    }

    fn outputs(&self) -> usize {
        self.n * self.oc * volume(self.y)
    }

    fn is_empty(&self) -> bool {
        self.outputs() == 0 || self.inputs() * self.taps() == 0
    }

    /// One input and one output channel a group, of several.
    pub fn depthwise(&self) -> bool {
        self.groups > 1 && self.groups == self.c && self.groups == self.oc
    }

    /// Every output position of one input position alone, all channels in one group.
    pub fn pointwise(&self) -> bool {
        pointwise::applies(self)
    }

    /// Scratch for copies of both tensors with the channels last.
    fn copies(&self) -> usize {
        match self.layout {
            Layout::First => self.inputs() + self.outputs(),
            Layout::Last => 0,
        }
    }
}

/// (N, C, positions) as (N, positions, C), or the other way round with the sizes exchanged.
fn transpose<T: Vectors>(n: usize, c: usize, positions: usize, x: &[T], y: &mut [T]) {
    let (c, p) = (c as isize, positions as isize);
    let (dims, strides) = ([n, p as usize, c as usize], [c * p, 1, p]);
    match size_of::<T>() {
        4 => strided::read::<u32>(bytemuck::cast_slice(x), 0, &dims, &strides, bytemuck::cast_slice_mut(y)),
        _ => strided::read::<u64>(bytemuck::cast_slice(x), 0, &dims, &strides, bytemuck::cast_slice_mut(y)),
    }
}

/// Can X be computed as it is read?
pub fn loads(g: &Geometry) -> bool {
    g.layout == Layout::Last && !g.is_empty() && (g.depthwise() || pointwise::applies(g))
}

/// Does a convolution by pairs, whose channels are last, read X in half precision, which it rounds, itself or transformed, anyway?
pub fn reads_half(g: &Geometry) -> bool {
    g.pairs && g.layout == Layout::Last
}

/// Does the input gradient read dY in half precision, which it rounds, perhaps transformed, anyway?
pub fn input_grad_rounds(g: &Geometry) -> bool {
    reads_half(g) && !narrow::applies(g)
}

/// Does it put out dX, of so many channels, in bfloat16?
pub fn input_grad_is_rounded(channels: usize) -> bool {
    channels > narrow::CHANNELS
}

/// Does the weight gradient?
pub fn weight_grad_rounds(g: &Geometry) -> bool {
    reads_half(&paired_images(g))
}

/// Elements of scratch that [`forward`] needs; `plain`: is X?
pub fn forward_scratch<T: Vectors>(g: &Geometry, plain: bool) -> usize {
    if g.is_empty() {
        return 0;
    }
    if let Some(simpler) = simpler::of(g) {
        return g.copies() + simpler.scratch(|g| forward_scratch::<T>(g, plain));
    }
    g.copies()
        + match () {
            _ if depthwise::applies::<T>(g) => depthwise::forward_scratch(g, plain, true),
            _ if winograd::applies_forward(g) => winograd::forward_scratch::<T>(g, !plain),
            _ => dense::forward_scratch::<T>(g, plain, true),
        }
}

/// `y = clamp(conv(x, w) + bias + residual)` with x (N, C, spatial…) and y (N, M, spatial…), or both with their
/// channels last, and w (M, C/groups, k…).
pub fn forward<T: Vectors>(
    g: &Geometry,
    x: Operand<T>,
    w: &[T],
    epilogue: Epilogue<T>,
    y: &mut [T],
    scratch: &mut [T],
) {
    forward_blocks(g, x, w, epilogue, y, scratch, None);
}

/// As [`forward`]; `done` is told of blocks of results where [`statistics::blocks`] says so.
fn forward_blocks<T: Vectors>(
    g: &Geometry,
    x: Operand<T>,
    w: &[T],
    epilogue: Epilogue<T>,
    y: &mut [T],
    scratch: &mut [T],
    done: Option<&Done<T>>,
) {
    if g.is_empty() {
        return epilogue.of_nothing(g.oc.max(1), y);
    }
    x.check();
    assert!(x.is_plain() || loads(g) || reads_half(g), "an input that is computed as it is read");
    let simpler = simpler::of(g);
    let kernel = |x: Operand<T>, epilogue: Epilogue<T>, y: &mut [T], scratch: &mut [T]| match &simpler {
        Some(simpler) => simpler.forward(x.data, w, epilogue, y, scratch),
        _ if depthwise::applies::<T>(g) => depthwise::forward(g, x, w, epilogue, Some(y), scratch, done),
        _ if winograd::applies_forward(g) => {
            winograd::forward(g, x.data, w, epilogue, ElementsMut::Whole(y), None, scratch)
        }
        _ => dense::forward(g, x, w, epilogue, Some(y), scratch, done),
    };
    if g.layout == Layout::Last {
        return kernel(x, epilogue, y, scratch);
    }
    let (xs, ys) = (volume(g.x), volume(g.y));
    let (x_last, rest) = scratch.split_at_mut(g.inputs());
    let (y_last, rest) = rest.split_at_mut(g.outputs());
    transpose(g.n, g.c, xs, x.data.whole(), x_last);
    let epilogue = before(g, g.oc, ys, epilogue, y, y_last);
    kernel(Operand::plain(x_last, g.c), epilogue, y_last, rest);
    transpose(g.n, ys, g.oc, y_last, y);
}

/// The epilogue for a result with its channels last: its residual is moved to the result's buffer.
fn before<'a, T: Vectors>(
    g: &Geometry,
    c: usize,
    positions: usize,
    epilogue: Epilogue<'a, T>,
    y: &[T],
    y_last: &mut [T],
) -> Epilogue<'a, T> {
    match epilogue.residual {
        Residual::None => return epilogue,
        Residual::Of(r) => transpose(g.n, c, positions, r, y_last),
        Residual::InOutput => transpose(g.n, c, positions, y, y_last),
    }
    Epilogue { residual: Residual::InOutput, ..epilogue }
}

/// Elements of scratch that [`input_grad`] needs; `half`: is dY of half precision?
pub fn input_grad_scratch<T: Vectors>(g: &Geometry, half: bool) -> usize {
    if g.is_empty() {
        return 0;
    }
    if let Some(simpler) = simpler::of(g) {
        return g.copies() + simpler.scratch(|g| input_grad_scratch::<T>(g, half));
    }
    g.copies()
        + match () {
            _ if depthwise::applies::<T>(g) => depthwise::input_grad_scratch(g),
            _ if narrow::applies(g) => narrow::scratch::<T>(g),
            _ if winograd::applies_back(g) => winograd::input_grad_scratch::<T>(g, half),
            _ => dense::input_grad_scratch::<T>(g, half),
        }
}

/// `dx[i] = addend + Σ_t W[t]ᵀ·dy[(i + pad − dilation·t) / stride]`, in the layout of x.
pub fn input_grad<T: Vectors>(
    g: &Geometry,
    dy: Elements<T>,
    w: &[T],
    addend: Residual<T>,
    dx: ElementsMut<T>,
    scratch: &mut [T],
) {
    transposed(g, dy, w, Epilogue { residual: addend, ..Epilogue::none() }, dx, scratch);
}

/// As [`input_grad`], with a bias for each of its channels: `dx = clamp(… + bias + residual)`. Kernels of few channels
/// do not clamp.
pub fn transposed<T: Vectors>(
    g: &Geometry,
    dy: Elements<T>,
    w: &[T],
    epilogue: Epilogue<T>,
    dx: ElementsMut<T>,
    scratch: &mut [T],
) {
    if g.is_empty() {
        return epilogue.of_nothing(g.c.max(1), dx.whole());
    }
    let simpler = simpler::of(g);
    let kernel =
        |dy: Elements<T>, epilogue: Epilogue<T>, dx: ElementsMut<T>, scratch: &mut [T]| match &simpler {
            Some(simpler) => simpler.transposed(dy, w, epilogue, dx.whole(), scratch),
            _ if depthwise::applies::<T>(g) => {
                depthwise::input_grad(g, dy.whole(), w, epilogue, dx.whole(), scratch)
            }
            _ if narrow::applies(g) => narrow::input_grad(g, dy.whole(), w, epilogue, dx.whole(), scratch),
            _ if winograd::applies_back(g) => winograd::input_grad(g, dy, w, epilogue, dx, scratch),
            _ => dense::input_grad(g, dy, w, epilogue, dx, scratch),
        };
    if g.layout == Layout::Last {
        return kernel(dy, epilogue, dx, scratch);
    }
    let (xs, ys, dx) = (volume(g.x), volume(g.y), dx.whole());
    let (x_last, rest) = scratch.split_at_mut(g.inputs());
    let (y_last, rest) = rest.split_at_mut(g.outputs());
    transpose(g.n, g.oc, ys, dy.whole(), y_last);
    let epilogue = before(g, g.c, xs, epilogue, dx, x_last);
    kernel(Elements::Whole(y_last), epilogue, ElementsMut::Whole(&mut *x_last), rest);
    transpose(g.n, xs, g.c, x_last, dx);
}

/// The convolution of a weight gradient: of one image there are no pairs, but of the positions of a pointwise one.
fn paired_images(g: &Geometry) -> Geometry {
    Geometry { pairs: g.pairs && (g.n > 1 || pointwise::applies(g)), ..g.clone() }
}

/// Elements of scratch that [`weight_grad`] needs, X being computed as it is read; `half`: are X and dY of half precision?
pub fn weight_grad_scratch<T: Vectors>(g: &Geometry, computed: bool, half: [bool; 2]) -> usize {
    let g = &paired_images(g);
    if g.is_empty() {
        return 0;
    }
    if let Some(simpler) = simpler::of(g) {
        let copy = if computed { g.inputs() } else { 0 };
        return g.copies() + copy + simpler.scratch(|g| weight_grad_scratch::<T>(g, false, half));
    }
    g.copies()
        + match () {
            _ if depthwise::applies::<T>(g) => depthwise::weight_grad_scratch(g, !computed && !half[0]),
            _ if winograd::applies_weight(g) => winograd::weight::weight_grad_scratch::<T>(g, half),
            _ if computed => weight::weight_grad_scratch::<T>(g, false) + g.inputs(),
            _ => weight::weight_grad_scratch::<T>(g, half[0]),
        }
}

/// `dW[t] = Σ_{n,i} dY[i]·X[stride·i + dilation·t − pad]ᵀ` (M, C/groups, k…).
pub fn weight_grad<T: Vectors>(
    g: &Geometry,
    dy: Elements<T>,
    x: Operand<T>,
    dw: &mut [T],
    scratch: &mut [T],
) {
    let g = &paired_images(g);
    if g.is_empty() {
        return dw.fill(T::zero());
    }
    x.check();
    let computed = !matches!(x.load, Load::Plain);
    assert!(!computed || loads(g), "an input that is computed as it is read");
    if depthwise::applies::<T>(g) && g.layout == Layout::Last && simpler::of(g).is_none() {
        return depthwise::weight_grad(g, dy.whole(), x, dw, scratch);
    }
    if computed {
        let (copy, rest) = scratch.split_at_mut(g.inputs());
        x.write(copy);
        return weight_grad(g, dy, Operand::plain(copy, g.c), dw, rest);
    }
    let x = x.data;
    let simpler = simpler::of(g);
    let kernel = |dy: Elements<T>, x: Elements<T>, dw: &mut [T], scratch: &mut [T]| match &simpler {
        Some(simpler) => simpler.weight_grad(dy, x, dw, scratch),
        _ if depthwise::applies::<T>(g) => {
            let x = Operand { data: x, channels: g.c, load: Load::Plain };
            depthwise::weight_grad(g, dy.whole(), x, dw, scratch);
        }
        _ if winograd::applies_weight(g) => winograd::weight::weight_grad(g, dy, x, dw, scratch),
        _ => weight::weight_grad(g, dy, x, dw, scratch),
    };
    if g.layout == Layout::Last {
        return kernel(dy, x, dw, scratch);
    }
    let (x_last, rest) = scratch.split_at_mut(g.inputs());
    let (y_last, rest) = rest.split_at_mut(g.outputs());
    transpose(g.n, g.c, volume(g.x), x.whole(), x_last);
    transpose(g.n, g.oc, volume(g.y), dy.whole(), y_last);
    kernel(Elements::Whole(y_last), Elements::Whole(x_last), dw, rest);
}
