//! Where the sums of dense convolutions go, and what happens to them before: the epilogue, a tile at a time.
#![allow(unsafe_code, clippy::needless_range_loop)]

use crate::kernels::conv::Epilogue;
use crate::kernels::half::ElementsMut;
use crate::kernels::par::Shared;
use crate::kernels::simd::{Simd, load_nth, store_nth};
use crate::kernels::tile::{Acc, Terms, round_up_to};
use crate::tensor::Float;

/// Where results begin.
#[derive(Clone, Copy)]
pub(super) enum To<T> {
    Whole(*mut T),
    Bf16(*mut u16),
}

impl<T> To<T> {
    /// Where a result, perhaps none of these, lies: for fetching.
    #[inline(always)]
    pub(super) fn address(self, i: usize) -> *const T {
        match self {
            To::Whole(y) => y.wrapping_add(i),
            To::Bf16(y) => y.wrapping_add(i).cast(),
        }
    }

    /// The same, and the logarithm of a result's size.
    #[inline(always)]
    pub(super) fn bytes(self, i: usize) -> (*const u8, u32) {
        let size = if let To::Whole(_) = self { size_of::<T>() } else { size_of::<u16>() };
        (self.address(i).cast(), size.ilog2())
    }

    /// Those that a residual lies in.
    pub(super) fn whole(self) -> *mut T {
        match self {
            To::Whole(y) => y,
            To::Bf16(_) => panic!("a residual among rounded results"),
        }
    }
}

/// Results that several tasks write, each its own.
pub(super) enum SharedResults<'a, T> {
    Whole(Shared<'a, T>),
    Bf16(Shared<'a, u16>),
}

impl<'a, T> SharedResults<'a, T> {
    pub(super) fn new(y: ElementsMut<'a, T>) -> Self {
        match y {
            ElementsMut::Whole(y) => SharedResults::Whole(Shared::new(y)),
            ElementsMut::Bf16(y) => SharedResults::Bf16(Shared::new(y)),
        }
    }

    pub(super) fn to(&self) -> To<T> {
        match self {
            SharedResults::Whole(y) => To::Whole(y.ptr()),
            SharedResults::Bf16(y) => To::Bf16(y.ptr()),
        }
    }
}

/// Where sums go, and what happens to them before.
#[derive(Clone, Copy)]
pub(super) struct Results<T> {
    bias: Option<*const T>,
    residual: Option<*const T>,
    low: T,
    high: T,
    /// Results are written as they are.
    plain: bool,
    y: To<T>,
    /// The first output channel, and their number.
    pub(super) channel: usize,
    pub(super) lanes: usize,
}

impl<T: Float> Results<T> {
    pub(super) fn new(epilogue: &Epilogue<T>, y: To<T>) -> Self {
        Results {
            bias: None,
            residual: epilogue.residual.address(|| y.whole()),
            low: epilogue.clamp.low,
            high: epilogue.clamp.high,
            plain: epilogue.is_none(),
            y,
            channel: 0,
            lanes: 0,
        }
    }

    /// Where results begin, if they are written as they are.
    pub(super) fn plain(&self) -> Option<*mut T> {
        match self.y {
            To::Whole(y) if self.plain => Some(y),
            _ => None,
        }
    }

    /// For so many channels from one on.
    #[inline(always)]
    pub(super) fn set(&mut self, epilogue: &Epilogue<T>, channel: usize, lanes: usize) {
        self.bias = epilogue.bias.map(|b| b.as_ptr().wrapping_add(channel));
        (self.channel, self.lanes) = (channel, lanes);
    }

    /// To the channels that follow.
    #[inline(always)]
    pub(super) fn advance(&mut self) {
        self.bias = self.bias.map(|b| b.wrapping_add(self.lanes));
        self.channel += self.lanes;
    }
}

/// The epilogue of a tile of `M` positions by `N` vectors, and its results.
///
/// # Safety
/// The results at each offset in `y` must be writable (and the residual readable) for `to.lanes` elements.
#[inline(always)]
pub(super) unsafe fn put_tile<D: Terms, const M: usize, const N: usize>(
    to: &Results<<D::S as Simd>::Elem>,
    acc: Acc<D::S, M, N>,
    y: &[usize; M],
) {
    let whole = to.lanes == N * D::S::LANES;
    // SAFETY: the caller's promise.
    unsafe { if whole { put::<D, M, N, true>(to, acc, y) } else { put::<D, M, N, false>(to, acc, y) } }
}

/// The same of a column of vectors of a wider tile, which begins `at` so many channels after the first.
///
/// # Safety
/// As of [`put_tile`].
#[inline(always)]
pub(super) unsafe fn put_column<D: Terms, const M: usize>(
    to: &Results<<D::S as Simd>::Elem>,
    column: Acc<D::S, M, 1>,
    y: &[usize; M],
    at: usize,
) {
    let to = Results {
        bias: to.bias.map(|b| b.wrapping_add(at)),
        channel: to.channel + at,
        lanes: (to.lanes - at).min(D::S::LANES),
        ..*to
    };
    // SAFETY: the caller's promise.
    unsafe { put_tile::<D, M, 1>(&to, column, y) }
}

/// Short loops, which are unrolled, so that sums stay in registers.
///
/// # Safety
/// As of [`put_tile`]; are all vectors `WHOLE`?
#[inline(always)]
unsafe fn put<D: Terms, const M: usize, const N: usize, const WHOLE: bool>(
    to: &Results<<D::S as Simd>::Elem>,
    mut acc: Acc<D::S, M, N>,
    y: &[usize; M],
) {
    let (lanes, tail) = (D::S::LANES, to.lanes - (N - 1) * D::S::LANES);
    // SAFETY: the caller's promise.
    unsafe {
        if !to.plain {
            if let Some(bias) = to.bias {
                for j in 0..N {
                    let v = load_nth::<D::S, N, WHOLE>(bias.add(j * lanes), j, tail);
                    for i in 0..M {
                        acc[i][j] = D::S::add(acc[i][j], v);
                    }
                }
            }
            if let Some(r) = to.residual {
                for i in 0..M {
                    for j in 0..N {
                        let r = r.add(y[i] + to.channel + j * lanes);
                        acc[i][j] = D::S::add(acc[i][j], load_nth::<D::S, N, WHOLE>(r, j, tail));
                    }
                }
            }
            let (low, high) = (D::S::splat(to.low), D::S::splat(to.high));
            for i in 0..M {
                for j in 0..N {
                    acc[i][j] = D::S::min(high, D::S::max(low, acc[i][j]));
                }
            }
        }
        match to.y {
            To::Whole(results) => {
                for i in 0..M {
                    for j in 0..N {
                        let results = results.add(y[i] + to.channel + j * lanes);
                        store_nth::<D::S, N, WHOLE>(results, j, acc[i][j], tail);
                    }
                }
            }
            To::Bf16(results) => {
                for i in 0..M {
                    for j in 0..N {
                        let n = if WHOLE || j + 1 < N { lanes } else { tail };
                        round_up_to::<D>(results.add(y[i] + to.channel + j * lanes), acc[i][j], n);
                    }
                }
            }
        }
    }
}
