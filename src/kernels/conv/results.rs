//! Where the sums of dense convolutions go, and what happens to them before: the epilogue, a column of vectors at a time.
#![allow(unsafe_code, clippy::needless_range_loop)]

use crate::kernels::conv::{Epilogue, Residual};
use crate::kernels::half::ElementsMut;
use crate::kernels::par::Shared;
use crate::kernels::simd::{Simd, load_lanes, store_lanes};
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
            residual: match epilogue.residual {
                Residual::None => None,
                Residual::Of(r) => Some(r.as_ptr()),
                Residual::InOutput => Some(y.whole().cast_const()),
            },
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
/// As of [`put_column`].
#[inline(always)]
pub(super) unsafe fn put_tile<D: Terms, const M: usize, const N: usize>(
    to: &Results<<D::S as Simd>::Elem>,
    mut acc: Acc<D::S, M, N>,
    y: &[usize; M],
) {
    let lanes = D::S::LANES;
    // SAFETY: the caller's promise.
    unsafe {
        let (To::Whole(results), true) = (to.y, to.lanes == N * lanes) else {
            for j in 0..N {
                let mut column = [acc[0][j]; M];
                for i in 0..M {
                    column[i] = acc[i][j];
                }
                put_column::<D, M>(to, column, y, j * lanes);
            }
            return;
        };
        // Nearly always: short loops, which are unrolled, so that sums stay in registers.
        if !to.plain {
            if let Some(bias) = to.bias {
                for j in 0..N {
                    let v = D::S::load(bias.add(j * lanes));
                    for i in 0..M {
                        acc[i][j] = D::S::add(acc[i][j], v);
                    }
                }
            }
            if let Some(r) = to.residual {
                for i in 0..M {
                    for j in 0..N {
                        let v = D::S::load(r.add(y[i] + to.channel + j * lanes));
                        acc[i][j] = D::S::add(acc[i][j], v);
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
        for i in 0..M {
            for j in 0..N {
                D::S::store(results.add(y[i] + to.channel + j * lanes), acc[i][j]);
            }
        }
    }
}

/// The epilogue of a tile's column of vectors, which begins `at` so many channels after the first, and its results.
///
/// # Safety
/// The results at each offset in `y` must be writable (and the residual readable) for `to.lanes` elements.
#[inline(always)]
pub(super) unsafe fn put_column<D: Terms, const M: usize>(
    to: &Results<<D::S as Simd>::Elem>,
    column: [<D::S as Simd>::V; M],
    y: &[usize; M],
    at: usize,
) {
    let part = (to.lanes - at).min(D::S::LANES);
    // SAFETY: the caller's promise.
    unsafe {
        let (low, high) = (D::S::splat(to.low), D::S::splat(to.high));
        // Decided once for a column, not for each vector: sums of few terms take no longer than that.
        match part == D::S::LANES {
            true => put::<D, M, true>(to, column, y, at, part, low, high),
            false => put::<D, M, false>(to, column, y, at, part, low, high),
        }
    }
}

/// Of whole vectors, or of their first `part` lanes.
///
/// # Safety
/// As of [`put_column`].
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn put<D: Terms, const M: usize, const WHOLE: bool>(
    t: &Results<<D::S as Simd>::Elem>,
    mut column: [<D::S as Simd>::V; M],
    y: &[usize; M],
    at: usize,
    part: usize,
    low: <D::S as Simd>::V,
    high: <D::S as Simd>::V,
) {
    let to = t.channel + at;
    // SAFETY: the caller's promise.
    unsafe {
        if !t.plain {
            if let Some(bias) = t.bias {
                let v = load_lanes::<D::S, WHOLE>(bias.add(at), part);
                for i in 0..M {
                    column[i] = D::S::add(column[i], v);
                }
            }
            if let Some(r) = t.residual {
                for i in 0..M {
                    column[i] = D::S::add(column[i], load_lanes::<D::S, WHOLE>(r.add(y[i] + to), part));
                }
            }
            for i in 0..M {
                column[i] = D::S::min(high, D::S::max(low, column[i]));
            }
        }
        match t.y {
            To::Whole(results) => {
                for i in 0..M {
                    store_lanes::<D::S, WHOLE>(results.add(y[i] + to), column[i], part);
                }
            }
            To::Bf16(results) => {
                for i in 0..M {
                    round_up_to::<D>(
                        results.add(y[i] + to),
                        column[i],
                        if WHOLE { D::S::LANES } else { part },
                    );
                }
            }
        }
    }
}
