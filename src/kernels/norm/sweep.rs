//! Batch normalisation: sweeps whose coefficients are per channel.
//!
//! Elements are read once, in the order in which they lie. Where channels lie side by side and are few, their coefficients stay in
//! registers; those of half precision are widened, and rounded, there as well.
#![allow(unsafe_code, clippy::needless_range_loop)]

use super::strips::{Channels, WIDTH};
use crate::kernels::elementwise::Clamp;
use crate::kernels::half::{Elements, Half};
use crate::kernels::pairs::{PairKernel, Pairs};
use crate::kernels::par::{self, GRAIN, Shared};
use crate::kernels::simd::{Kernel, Simd, Vectors, load_up_to, store_up_to, widen_up_to};
use crate::kernels::tile::{Terms, round_up_to};
use crate::tensor::Float;

/// What is added to a normalised value.
#[derive(Clone, Copy)]
pub enum Residual<'a, T> {
    None,
    Given(&'a [T]),
    /// It lies in the result's buffer.
    InResult,
}

/// Where a sweep's results go.
#[derive(Debug)]
pub enum Results<'a, T> {
    Whole(&'a mut [T]),
    /// Rounded, where `s` is 1.
    Half(Half, &'a mut [u16]),
    Both(&'a mut [T], Half, &'a mut [u16]),
}

/// What a sweep makes of an element and another, given its channel's `K` coefficients.
trait Formula<T: Float, const K: usize>: Copy + Send + Sync {
    /// Is there another?
    fn pairs(&self) -> bool {
        true
    }

    /// # Safety
    /// The processor must have `S`'s instructions.
    unsafe fn of<S: Simd<Elem = T>>(&self, x: S::V, other: S::V, c: [S::V; K]) -> S::V;
}

/// `clamp((x − mean)·factor + shift + residual)`
#[derive(Clone, Copy)]
struct Affine<T> {
    clamp: Clamp<T>,
    adds: bool,
}

impl<T: Float> Formula<T, 3> for Affine<T> {
    fn pairs(&self) -> bool {
        self.adds
    }

    #[inline(always)]
    unsafe fn of<S: Simd<Elem = T>>(&self, x: S::V, residual: S::V, [m, a, b]: [S::V; 3]) -> S::V {
        // SAFETY: the caller's promise. (Rounded after each step, as the gradient computes it again.)
        unsafe {
            let mut y = S::add(S::mul(S::sub(x, m), a), b);
            if self.adds {
                y = S::add(y, residual);
            }
            S::min(S::splat(self.clamp.high), S::max(S::splat(self.clamp.low), y))
        }
    }
}

/// `factor·(dy − k1 − (x − mean)·k2)`
#[derive(Clone, Copy)]
struct Gradient;

impl<T: Float> Formula<T, 4> for Gradient {
    #[inline(always)]
    unsafe fn of<S: Simd<Elem = T>>(&self, x: S::V, dy: S::V, [m, a, k1, k2]: [S::V; 4]) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::mul(a, S::sub(S::sub(dy, k1), S::mul(S::sub(x, m), k2))) }
    }
}

/// The same of what passes where the result `(x − mean)·factor + shift` is inside.
#[derive(Clone, Copy)]
struct PassedGradient<T>(Clamp<T>);

impl<T: Float> Formula<T, 5> for PassedGradient<T> {
    #[inline(always)]
    unsafe fn of<S: Simd<Elem = T>>(&self, x: S::V, dy: S::V, [m, a, b, k1, k2]: [S::V; 5]) -> S::V {
        // SAFETY: the caller's promise.
        unsafe {
            let x = S::sub(x, m);
            let (low, high) = (S::splat(self.0.low), S::splat(self.0.high));
            let dz = S::pass(S::add(S::mul(x, a), b), low, high, dy);
            S::mul(a, S::sub(S::sub(dz, k1), S::mul(x, k2)))
        }
    }
}

/// `factor·dy − k1 − (x − mean)·k2`
#[derive(Clone, Copy)]
struct Spread;

impl<T: Float> Formula<T, 4> for Spread {
    #[inline(always)]
    unsafe fn of<S: Simd<Elem = T>>(&self, x: S::V, dy: S::V, [m, a, k1, k2]: [S::V; 4]) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::sub(S::sub(S::mul(a, dy), k1), S::mul(S::sub(x, m), k2)) }
    }
}

/// What passes where `x` is inside.
#[derive(Clone, Copy)]
struct Pass<T>(Clamp<T>);

impl<T: Float> Formula<T, 0> for Pass<T> {
    #[inline(always)]
    unsafe fn of<S: Simd<Elem = T>>(&self, x: S::V, dy: S::V, []: [S::V; 0]) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::pass(x, S::splat(self.0.low), S::splat(self.0.high), dy) }
    }
}

/// Where an operand's elements begin: whole ones, or of bfloat16.
#[derive(Clone, Copy)]
enum At<T> {
    Whole(*const T),
    Half(*const u16),
}

impl<T: Float> At<T> {
    fn of(x: Elements<T>, start: usize) -> Self {
        match x {
            Elements::Whole(x) => At::Whole(x[start..].as_ptr()),
            Elements::Half(_, x) => At::Half(x[start..].as_ptr()),
        }
    }

    /// `n` elements from the `i`th on.
    ///
    /// # Safety
    /// They must be there, and the processor have `S`'s instructions.
    #[inline(always)]
    unsafe fn load<S: Simd<Elem = T>>(self, i: usize, n: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                At::Whole(x) => load_up_to::<S>(x.add(i), n),
                At::Half(x) => widen_up_to::<S>(x.add(i), n),
            }
        }
    }
}

/// Some neighbours of a sweep.
struct Piece<'a, T, F, const K: usize> {
    formula: F,
    x: At<T>,
    other: At<T>,
    y: Option<*mut T>,
    /// In bfloat16.
    rounded: Option<*mut u16>,
    n: usize,
    coefficients: Coefficients<'a, T, K>,
}

#[derive(Clone, Copy)]
enum Coefficients<'a, T, const K: usize> {
    /// Of one channel.
    One([T; K]),
    /// Of channels side by side, over and over again.
    Each([&'a [T]; K]),
}

impl<T: Vectors, F: Formula<T, K>, const K: usize> Piece<'_, T, F, K> {
    /// Elements `i` to `i + n` of the piece, at most a vector.
    #[inline(always)]
    unsafe fn vector<D: Terms<S: Simd<Elem = T>>>(&self, i: usize, n: usize, c: [<D::S as Simd>::V; K]) {
        // SAFETY: the caller's promise.
        unsafe {
            let x = self.x.load::<D::S>(i, n);
            let other = if self.formula.pairs() { self.other.load::<D::S>(i, n) } else { x };
            let y = self.formula.of::<D::S>(x, other, c);
            if let Some(to) = self.y {
                store_up_to::<D::S>(to.add(i), y, n);
            }
            if let Some(to) = self.rounded {
                round_up_to::<D>(to.add(i), y, n);
            }
        }
    }

    /// All of the piece, its coefficients being those of `V` vectors over and over again.
    #[inline(always)]
    unsafe fn repeated<D: Terms<S: Simd<Elem = T>>, const V: usize>(&self, c: [[<D::S as Simd>::V; K]; V]) {
        let lanes = D::S::LANES;
        let (whole, mut i) = (self.n / (V * lanes) * V * lanes, 0);
        // SAFETY: the caller's promise.
        unsafe {
            while i < whole {
                for v in 0..V {
                    self.vector::<D>(i + v * lanes, lanes, c[v]);
                }
                i += V * lanes;
            }
            for v in 0..V {
                if i < self.n {
                    let n = lanes.min(self.n - i);
                    self.vector::<D>(i, n, c[v]);
                    i += n;
                }
            }
        }
    }

    /// The coefficients of `V` vectors.
    #[inline(always)]
    unsafe fn first<S: Simd<Elem = T>, const V: usize>(of: &[&[T]; K]) -> [[S::V; K]; V] {
        // SAFETY: the caller's promise; there are as many.
        unsafe {
            let mut c = [[S::splat(T::zero()); K]; V];
            for v in 0..V {
                for k in 0..K {
                    c[v][k] = S::load(of[k][v * S::LANES..][..S::LANES].as_ptr());
                }
            }
            c
        }
    }
}

impl<T: Vectors, F: Formula<T, K>, const K: usize> Kernel<T> for Piece<'_, T, F, K> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(self) {
        // SAFETY: the caller's promise.
        unsafe { self.all::<S>() }
    }
}

impl<T: Vectors, F: Formula<T, K>, const K: usize> PairKernel<T> for Piece<'_, T, F, K> {
    #[inline(always)]
    unsafe fn run<D: Pairs<S: Simd<Elem = T>>>(self) {
        // SAFETY: the caller's promise.
        unsafe { self.all::<D>() }
    }
}

impl<T: Vectors, F: Formula<T, K>, const K: usize> Piece<'_, T, F, K> {
    #[inline(always)]
    unsafe fn all<D: Terms<S: Simd<Elem = T>>>(self) {
        let lanes = D::S::LANES;
        // SAFETY: the elements are there; the processor has the instructions.
        unsafe {
            let of = match self.coefficients {
                Coefficients::One(c) => {
                    let mut of = [D::S::splat(T::zero()); K];
                    for k in 0..K {
                        of[k] = D::S::splat(c[k]);
                    }
                    return self.repeated::<D, 1>([of]);
                }
                Coefficients::Each(_) if K == 0 => {
                    return self.repeated::<D, 1>([[D::S::splat(T::zero()); K]]);
                }
                Coefficients::Each(of) => of,
            };
            let width = of[0].len();
            match if width.is_multiple_of(lanes) { width / lanes } else { 0 } {
                1 => self.repeated::<D, 1>(Self::first::<D::S, 1>(&of)),
                2 => self.repeated::<D, 2>(Self::first::<D::S, 2>(&of)),
                3 => self.repeated::<D, 3>(Self::first::<D::S, 3>(&of)),
                4 => self.repeated::<D, 4>(Self::first::<D::S, 4>(&of)),
                _ => {
                    for start in (0..self.n).step_by(width) {
                        let end = self.n.min(start + width);
                        for i in (start..end).step_by(lanes) {
                            let n = lanes.min(end - i);
                            let mut c = [D::S::splat(T::zero()); K];
                            for k in 0..K {
                                c[k] = load_up_to::<D::S>(of[k].as_ptr().add(i - start), n);
                            }
                            self.vector::<D>(i, n, c);
                        }
                    }
                }
            }
        }
    }
}

/// Vectors of coefficients that stay in registers.
const NEAR: usize = 4;

/// Elements after which coefficients are the same again: few vectors if they can be, else many short rows together.
fn period(c: usize, lanes: usize) -> usize {
    let few = (1..=NEAR).map(|v| v * lanes).find(|n| n.is_multiple_of(c));
    few.unwrap_or(if 2 * c <= WIDTH { WIDTH / c * c } else { c })
}

struct Sweep<'a, T, F> {
    formula: F,
    /// Elements of each operand, and results.
    n: usize,
    /// `None`: they lie in the results.
    x: Option<Elements<'a, T>>,
    other: Option<Elements<'a, T>>,
    y: Option<Shared<'a, T>>,
    rounded: Option<(Half, Shared<'a, u16>)>,
}

impl<'a, T: Vectors, F> Sweep<'a, T, F> {
    fn new(
        formula: F,
        x: Option<Elements<'a, T>>,
        other: Option<Elements<'a, T>>,
        y: Results<'a, T>,
    ) -> Self {
        let (y, rounded) = match y {
            Results::Whole(y) => (Some(y), None),
            Results::Half(half, rounded) => (None, Some((half, rounded))),
            Results::Both(y, half, rounded) => (Some(y), Some((half, rounded))),
        };
        let to = [y.as_ref().map(|y| y.len()), rounded.as_ref().map(|r| r.1.len())];
        let lengths = [x.map(|x| x.len()), other.map(|x| x.len()), to[0], to[1]];
        let n = to[0].or(to[1]).unwrap_or(0);
        assert!(lengths.iter().flatten().all(|len| *len == n), "operands of a normalisation");
        let rounded = rounded.map(|(half, to)| (half, Shared::new(to)));
        Sweep { formula, n, x, other, y: y.map(Shared::new), rounded }
    }

    /// Calls the kernel for `n` elements from `start` on.
    ///
    /// # Safety
    /// They must be there, and nobody else may use those of the results.
    unsafe fn part<const K: usize>(&self, start: usize, n: usize, coefficients: Coefficients<T, K>)
    where
        F: Formula<T, K>,
    {
        let y = self.y.as_ref().map(|y| y.ptr().wrapping_add(start));
        let in_y = || y.expect("operands that lie in the results").cast_const();
        let x = self.x.map_or_else(|| At::Whole(in_y()), |x| At::of(x, start));
        let other = match (self.other, self.formula.pairs()) {
            (Some(other), _) => At::of(other, start),
            (None, true) => At::Whole(in_y()),
            (None, false) => x,
        };
        let rounded = self.rounded.as_ref().map(|(_, to)| to.ptr().wrapping_add(start));
        let piece = Piece { formula: self.formula, x, other, y, rounded, n, coefficients };
        // SAFETY: the caller's promise.
        unsafe {
            match rounded.is_some() && T::has_pairs() {
                // By the instruction that rounds, which is among those.
                true => T::dispatch_pairs(piece),
                false => T::dispatch(piece),
            }
        }
    }

    /// As `part`, where elements are, or become, some of another type than bfloat16: through memory that is near.
    ///
    /// # Safety
    /// As of `part`.
    unsafe fn part_near<const K: usize>(&self, start: usize, n: usize, of: [&[T]; K])
    where
        F: Formula<T, K>,
    {
        let [mut near, mut made] = [[T::zero(); WIDTH]; 2];
        let width = of[0].len();
        for row in (0..n).step_by(width) {
            let end = n.min(row + width);
            for i in (row..end).step_by(WIDTH) {
                let (at, n) = (start + i, WIDTH.min(end - i));
                let x = self.x.map(|x| Elements::Whole(x.near(at, n, &mut near)));
                let other = self.other.map(|other| other.part(at..at + n));
                // SAFETY: the caller's promise.
                let y = match &self.y {
                    Some(y) => unsafe { std::slice::from_raw_parts_mut(y.ptr().add(at), n) },
                    None => &mut made[..n],
                };
                let some = Sweep::new(self.formula, x, other, Results::Whole(&mut *y));
                let coefficients = Coefficients::Each(of.map(|c| &c[i - row..][..n]));
                // SAFETY: all of it.
                unsafe { some.part(0, n, coefficients) }
                if let Some((half, to)) = &self.rounded {
                    // SAFETY: the caller's promise.
                    half.round_near(y, unsafe { std::slice::from_raw_parts_mut(to.ptr().add(at), n) });
                }
            }
        }
    }

    /// Of all elements, of which those of a channel have these coefficients.
    fn run<const K: usize>(&self, d: Channels, coefficients: [&[T]; K])
    where
        F: Formula<T, K>,
    {
        let of_half = [self.x, self.other].iter().flatten().any(|x| !x.is_whole()) || self.rounded.is_some();
        assert!(d.s == 1 || !of_half, "half precision with channels first");
        let fits = self.n == d.n * d.c * d.s && coefficients.iter().all(|c| c.len() == d.c);
        assert!(fits, "operands and coefficients of a normalisation");
        assert!(self.other.is_none_or(|x| x.half() != Some(Half::F16)), "another operand in float16");
        if self.n == 0 {
            return;
        }
        let halves = [self.x.and_then(|x| x.half()), self.rounded.as_ref().map(|r| r.0)];
        let by_registers = halves.iter().flatten().all(|half| *half == Half::Bf16);
        let mut spread = [[T::zero(); WIDTH]; K];
        let width = period(d.c, T::level().lanes);
        let each = if width > d.c {
            for (lanes, of) in spread.iter_mut().zip(coefficients) {
                lanes[..width].chunks_exact_mut(d.c).for_each(|lanes| lanes.copy_from_slice(of));
            }
            spread.each_ref().map(|lanes| &lanes[..width])
        } else {
            coefficients
        };
        let (rows, row) = if d.s == 1 { (d.n, d.c) } else { (d.n * d.c, d.s) };
        par::ranges(rows, (GRAIN / row).max(1), |rows| {
            let (start, n) = (rows.start * row, rows.len() * row);
            // SAFETY: rows that there are (the operands were checked); no two ranges share one.
            unsafe {
                match d.s {
                    1 if by_registers => self.part(start, n, Coefficients::Each(each)),
                    1 => self.part_near(start, n, each),
                    _ => rows.for_each(|row| {
                        let one = coefficients.map(|of| of[row % d.c]);
                        self.part(row * d.s, d.s, Coefficients::One(one));
                    }),
                }
            }
        });
    }
}

/// `y = clamp((x − mean)·factor + shift + residual)` per channel; `y` holds `x` where that is `None`; `x` may be of half precision
/// where `s` is 1.
#[allow(clippy::too_many_arguments)]
pub fn channel_affine<T: Vectors>(
    x: Option<Elements<T>>,
    y: Results<T>,
    d: Channels,
    mean: &[T],
    factor: &[T],
    shift: &[T],
    residual: Residual<T>,
    clamp: Clamp<T>,
) {
    let (other, adds) = match residual {
        Residual::None => (None, false),
        Residual::Given(r) => (Some(Elements::Whole(r)), true),
        Residual::InResult => (None, true),
    };
    Sweep::new(Affine { clamp, adds }, x, other, y).run(d, [mean, factor, shift]);
}

/// What the gradient of batch normalisation reads of each channel.
#[derive(Clone, Copy)]
pub struct ChannelGrad<'a, T> {
    pub scale: &'a [T],
    pub mean: &'a [T],
    pub inv: &'a [T],
    pub dscale: &'a [T],
    pub dshift: &'a [T],
    /// The shift, and the activation that let `dy` pass where the result is inside.
    pub passed: Option<(&'a [T], Clamp<T>)>,
}

impl<T: Float> ChannelGrad<'_, T> {
    /// `scale·inv`, `dshift/M` and `inv·dscale/M` of each channel, M elements a channel.
    pub fn coefficients(&self, count: usize, factor: &mut [T], k1: &mut [T], k2: &mut [T]) {
        let count = count.max(1) as f64;
        for c in 0..factor.len() {
            let inv = self.inv[c].to64();
            factor[c] = T::of(self.scale[c].to64() * inv);
            k1[c] = T::of(self.dshift[c].to64() / count);
            k2[c] = T::of(inv * self.dscale[c].to64() / count);
        }
    }
}

/// `dx = scale·inv·(dz − dshift/M − x̂·dscale/M)` with `x̂ = (x − mean)·inv`, M elements a channel.
/// At most one of `x`, `dy` is `None`: it lies in `dx`; `x` may be of half precision, and `dy` of bfloat16, where `s` is 1.
/// `room`: `3·c` elements.
pub fn channel_input_grad<T: Vectors>(
    x: Option<Elements<T>>,
    dy: Option<Elements<T>>,
    dx: Results<T>,
    d: Channels,
    g: ChannelGrad<T>,
    room: &mut [T],
) {
    let (factor, rest) = room.split_at_mut(d.c);
    let (k1, k2) = rest.split_at_mut(d.c);
    g.coefficients(d.count(), factor, k1, &mut k2[..d.c]);
    let (m, a, k1, k2) = (g.mean, &*factor, &*k1, &k2[..d.c]);
    match g.passed {
        None => Sweep::new(Gradient, x, dy, dx).run(d, [m, a, k1, k2]),
        Some((shift, clamp)) => {
            Sweep::new(PassedGradient(clamp), x, dy, dx).run(d, [m, a, shift, k1, k2]);
        }
    }
}

/// `dx = factor·dy − k1 − (x − mean)·k2` by the channels' coefficients, in this order: mean, factor, k1, k2. At most one of `x`, `dy`
/// is `None`: it lies in `dx`; `x` may be of half precision where `s` is 1.
pub(super) fn channel_spread<T: Vectors>(
    x: Option<Elements<T>>,
    dy: Option<&[T]>,
    dx: &mut [T],
    d: Channels,
    coefficients: [&[T]; 4],
) {
    Sweep::new(Spread, x, dy.map(Elements::Whole), Results::Whole(dx)).run(d, coefficients);
}

/// `dz = dy` where `y` is inside the clamp, else 0; `dz` holds `dy` where that is `None`.
pub(super) fn pass<T: Vectors>(y: &[T], dy: Option<&[T]>, dz: &mut [T], clamp: Clamp<T>) {
    let d = Channels { n: dz.len(), c: 1, s: 1 };
    Sweep::new(Pass(clamp), Some(Elements::Whole(y)), dy.map(Elements::Whole), Results::Whole(dz)).run(d, []);
}
