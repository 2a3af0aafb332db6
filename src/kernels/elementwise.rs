//! Elementwise loops with broadcasting: contiguous runs that the compiler vectorises, split by size alone.

use std::ops::Range;

use smallvec::SmallVec;

use crate::kernels::isa::Wide;
use crate::kernels::par;
use crate::tensor::{Elem, Float};

/// `min(max(x, low), high)`: a rectifier, or no activation at all. NaN stays NaN.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Clamp<T> {
    pub low: T,
    pub high: T,
}

impl Clamp<f64> {
    pub const NONE: Self = Clamp { low: f64::NEG_INFINITY, high: f64::INFINITY };

    pub fn to<T: Float>(self) -> Clamp<T> {
        Clamp { low: T::of(self.low), high: T::of(self.high) }
    }
}

impl<T: Float> Clamp<T> {
    pub fn is_none(self) -> bool {
        self.low == T::neg_infinity() && self.high == T::infinity()
    }

    #[inline(always)]
    pub fn of(self, x: T) -> T {
        let x = if x < self.low { self.low } else { x };
        if x > self.high { self.high } else { x }
    }

    /// Is the derivative 1 here? `y` may be the result or what was clamped. On a bound itself, where it does not
    /// exist, it is 0, as in PyTorch.
    #[inline(always)]
    pub fn inside(self, y: T) -> bool {
        (y > self.low) & (y < self.high)
    }

    /// `dy` where `y` is inside, else 0; without a branch, so that loops are vectorised.
    #[inline(always)]
    pub fn pass(self, y: T, dy: T) -> T {
        std::hint::select_unpredictable(self.inside(y), dy, T::zero())
    }
}

/// How `N` operands are read along a result of given dimensions: adjacent axes along which every operand
/// either advances or stays are merged, so most shapes come down to one, two or three axes.
#[derive(Debug, Clone)]
pub struct Walk<const N: usize> {
    axes: SmallVec<[usize; 6]>,
    /// Elements each operand advances by along each axis; 0 where it is broadcast.
    strides: SmallVec<[[usize; N]; 6]>,
}

impl<const N: usize> Walk<N> {
    /// `operands` broadcast to `dims` (their axes align at the end).
    pub fn new(dims: &[usize], operands: [&[usize]; N]) -> Self {
        let mut walk = Walk { axes: SmallVec::new(), strides: SmallVec::new() };
        let mut size = [1usize; N];
        let mut before = [false; N];
        // From the last axis outwards; reversed at the end.
        for back in 1..=dims.len() {
            let n = dims[dims.len() - back];
            if n == 1 {
                continue;
            }
            let moves: [bool; N] = std::array::from_fn(|k| {
                let d = operands[k];
                d.len() >= back && d[d.len() - back] != 1
            });
            match walk.axes.last_mut() {
                Some(last) if moves == before => *last *= n,
                _ => {
                    walk.axes.push(n);
                    walk.strides.push(std::array::from_fn(|k| if moves[k] { size[k] } else { 0 }));
                }
            }
            for k in 0..N {
                size[k] *= if moves[k] { n } else { 1 };
            }
            before = moves;
        }
        if walk.axes.is_empty() {
            walk.axes.push(1);
            walk.strides.push([0; N]);
        }
        walk.axes.reverse();
        walk.strides.reverse();
        walk
    }

    /// What each operand advances by along the innermost axis: 0 or 1.
    #[inline(always)]
    fn inner(&self) -> [usize; N] {
        self.strides[self.strides.len() - 1]
    }

    /// Calls `f(range, offsets)` for the runs along the innermost axis that make up the result's elements
    /// `start..start + len`: the run's place counted from `start`, and where it begins in each operand.
    /// Compiled once, not once a type.
    fn runs(&self, start: usize, len: usize, f: &mut dyn FnMut(Range<usize>, [usize; N])) {
        let last = self.axes.len() - 1;
        let row = self.axes[last];
        let inner = self.strides[last];
        let mut index: SmallVec<[usize; 6]> = SmallVec::from_elem(0, last);
        let mut base = [0usize; N];
        let mut outer = start / row;
        for d in (0..last).rev() {
            index[d] = outer % self.axes[d];
            outer /= self.axes[d];
            advance(&mut base, &self.strides[d], index[d]);
        }
        let mut within = start % row;
        let mut at = 0;
        while at < len {
            let n = (row - within).min(len - at);
            f(at..at + n, std::array::from_fn(|k| base[k] + within * inner[k]));
            at += n;
            within = 0;
            for d in (0..last).rev() {
                index[d] += 1;
                advance(&mut base, &self.strides[d], 1);
                if index[d] < self.axes[d] {
                    break;
                }
                for (b, s) in base.iter_mut().zip(&self.strides[d]) {
                    *b -= s * self.axes[d];
                }
                index[d] = 0;
            }
        }
    }
}

#[inline(always)]
fn advance<const N: usize>(base: &mut [usize; N], strides: &[usize; N], steps: usize) {
    for (b, s) in base.iter_mut().zip(strides) {
        *b += s * steps;
    }
}

/// Elements an operand is buffered by where it is broadcast or lies in the result.
const BLOCK: usize = 1024;

/// `n` elements of an operand as a slice: its own, or copied to `buffer` when it is broadcast along this axis
/// (`stride` 0) or absent because it lies in `y`.
fn operand<'a, A: Elem, Y: Elem>(
    source: Option<&'a [A]>,
    at: usize,
    stride: usize,
    y: &[Y],
    buffer: &'a mut [A; BLOCK],
) -> &'a [A] {
    let n = y.len();
    match source {
        Some(s) if stride != 0 => &s[at..at + n],
        Some(s) => {
            buffer[..n].fill(s[at]);
            &buffer[..n]
        }
        None => {
            // Of one type whenever an operator declares the pair.
            if let Ok(same) = bytemuck::try_cast_slice::<Y, A>(y)
                && same.len() == n
            {
                buffer[..n].copy_from_slice(same);
            }
            &buffer[..n]
        }
    }
}

// One loop is compiled for each function; where operands lie and how they broadcast is settled outside it.
type Loop1<'a, A, Y> = &'a (dyn Fn(&mut [Y], &[A]) + Sync);
type Loop2<'a, A, B, Y> = &'a (dyn Fn(&mut [Y], &[A], &[B]) + Sync);
/// Three operands; one may be absent and lie in the result.
pub type Operands<'a, A, B, C> = (Option<&'a [A]>, Option<&'a [B]>, Option<&'a [C]>);
type Loop3<'a, A, B, C, Y> = &'a (dyn Fn(&mut [Y], &[A], &[B], &[C]) + Sync);

/// `y = f(a)`, `a` broadcast; absent, it lies in `y`.
pub fn apply1<A: Elem, Y: Elem + Wide>(
    y: &mut [Y],
    a: Option<&[A]>,
    walk: &Walk<1>,
    f: impl Fn(A) -> Y + Sync + Copy,
) {
    apply1_all(
        y,
        a,
        walk,
        #[inline(always)]
        |y, a| {
            // A copy that no result can lie over: what it captured stays in registers.
            let own = f;
            for (y, a) in y.iter_mut().zip(a) {
                *y = own(*a);
            }
        },
    );
}

/// The same of an `f` of many elements, whose slices do not overlap.
pub fn apply1_all<A: Elem, Y: Elem + Wide>(
    y: &mut [Y],
    a: Option<&[A]>,
    walk: &Walk<1>,
    f: impl Fn(&mut [Y], &[A]) + Sync,
) {
    drive1(y, a, walk, &|y, a| {
        Y::wide(
            #[inline(always)]
            || f(y, a),
        )
    });
}

fn drive1<A: Elem, Y: Elem>(y: &mut [Y], a: Option<&[A]>, walk: &Walk<1>, each: Loop1<A, Y>) {
    let [sa] = walk.inner();
    par::pieces(y, |start, y| {
        let mut buffer = [A::default(); BLOCK];
        walk.runs(start, y.len(), &mut |at, [i]| {
            for (k, y) in y[at].chunks_mut(BLOCK).enumerate() {
                let a = operand(a, i + k * BLOCK * sa, sa, y, &mut buffer);
                each(y, a);
            }
        });
    });
}

/// `y = f(a, b)`, both broadcast; one may be absent and lie in `y`.
pub fn apply2<A: Elem, B: Elem, Y: Elem + Wide>(
    y: &mut [Y],
    a: Option<&[A]>,
    b: Option<&[B]>,
    walk: &Walk<2>,
    f: impl Fn(A, B) -> Y + Sync + Copy,
) {
    apply2_all(
        y,
        a,
        b,
        walk,
        #[inline(always)]
        |y, a, b| {
            let own = f;
            for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
                *y = own(*a, *b);
            }
        },
    );
}

/// The same of an `f` of many elements, whose slices do not overlap.
pub fn apply2_all<A: Elem, B: Elem, Y: Elem + Wide>(
    y: &mut [Y],
    a: Option<&[A]>,
    b: Option<&[B]>,
    walk: &Walk<2>,
    f: impl Fn(&mut [Y], &[A], &[B]) + Sync,
) {
    drive2(y, a, b, walk, &|y, a, b| {
        Y::wide(
            #[inline(always)]
            || f(y, a, b),
        )
    });
}

fn drive2<A: Elem, B: Elem, Y: Elem>(
    y: &mut [Y],
    a: Option<&[A]>,
    b: Option<&[B]>,
    walk: &Walk<2>,
    each: Loop2<A, B, Y>,
) {
    let [sa, sb] = walk.inner();
    par::pieces(y, |start, y| {
        let (mut first, mut second) = ([A::default(); BLOCK], [B::default(); BLOCK]);
        walk.runs(start, y.len(), &mut |at, [i, j]| {
            for (k, y) in y[at].chunks_mut(BLOCK).enumerate() {
                let k = k * BLOCK;
                let a = operand(a, i + k * sa, sa, y, &mut first);
                let b = operand(b, j + k * sb, sb, y, &mut second);
                each(y, a, b);
            }
        });
    });
}

/// `y = f(i, j)` of the operands' positions: for rare pairs of types, whose elements `f` reads one by one.
pub fn apply_at<Y: Elem>(y: &mut [Y], walk: &Walk<2>, f: &(dyn Fn(usize, usize) -> Y + Sync)) {
    let [sa, sb] = walk.inner();
    par::pieces(y, |start, y| {
        walk.runs(start, y.len(), &mut |at, [i, j]| {
            y[at].iter_mut().enumerate().for_each(|(k, y)| *y = f(i + k * sa, j + k * sb));
        });
    });
}

/// `y = f(a, b, c)`, all broadcast; one may be absent and lie in `y`.
pub fn apply3<A: Elem, B: Elem, C: Elem, Y: Elem + Wide>(
    y: &mut [Y],
    x: Operands<A, B, C>,
    walk: &Walk<3>,
    f: impl Fn(A, B, C) -> Y + Sync + Copy,
) {
    drive3(y, x, walk, &|y, a, b, c| {
        Y::wide(
            #[inline(always)]
            || {
                let own = f;
                for (((y, a), b), c) in y.iter_mut().zip(a).zip(b).zip(c) {
                    *y = own(*a, *b, *c);
                }
            },
        )
    });
}

fn drive3<A: Elem, B: Elem, C: Elem, Y: Elem>(
    y: &mut [Y],
    (a, b, c): Operands<A, B, C>,
    walk: &Walk<3>,
    each: Loop3<A, B, C, Y>,
) {
    let [sa, sb, sc] = walk.inner();
    par::pieces(y, |start, y| {
        let mut buffers = ([A::default(); BLOCK], [B::default(); BLOCK], [C::default(); BLOCK]);
        walk.runs(start, y.len(), &mut |at, [i, j, l]| {
            for (k, y) in y[at].chunks_mut(BLOCK).enumerate() {
                let k = k * BLOCK;
                let a = operand(a, i + k * sa, sa, y, &mut buffers.0);
                let b = operand(b, j + k * sb, sb, y, &mut buffers.1);
                let c = operand(c, l + k * sc, sc, y, &mut buffers.2);
                each(y, a, b, c);
            }
        });
    });
}

/// Operands of the result's shape.
pub fn same<const N: usize>(n: usize) -> Walk<N> {
    let mut walk = Walk { axes: SmallVec::new(), strides: SmallVec::new() };
    walk.axes.push(n.max(1));
    walk.strides.push([1; N]);
    walk
}
