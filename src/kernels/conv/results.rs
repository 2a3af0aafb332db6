//! Where the sums of dense convolutions go, and what happens to them before: the epilogue, a column of vectors at a time.
#![allow(unsafe_code, clippy::needless_range_loop)]

use crate::kernels::conv::{Epilogue, Residual};
use crate::kernels::simd::{Simd, Vectors, load_lanes, store_lanes};

/// Where sums go, and what happens to them before.
pub(super) struct Results<T> {
    bias: Option<*const T>,
    residual: Option<*const T>,
    low: T,
    high: T,
    /// Results are written as they are.
    plain: bool,
    y: *mut T,
    /// The first output channel, and their number.
    pub(super) channel: usize,
    pub(super) lanes: usize,
}

impl<T: Vectors> Results<T> {
    pub(super) fn new(epilogue: &Epilogue<T>, y: *mut T) -> Self {
        Results {
            bias: None,
            residual: match epilogue.residual {
                Residual::None => None,
                Residual::Of(r) => Some(r.as_ptr()),
                Residual::InOutput => Some(y.cast_const()),
            },
            low: epilogue.clamp.low,
            high: epilogue.clamp.high,
            plain: epilogue.is_none(),
            y,
            channel: 0,
            lanes: 0,
        }
    }

    /// Are results written as they are?
    pub(super) fn is_plain(&self) -> bool {
        self.plain
    }

    /// For so many channels from one on.
    #[inline(always)]
    pub(super) fn set(&mut self, epilogue: &Epilogue<T>, channel: usize, lanes: usize) {
        self.bias = epilogue.bias.map(|b| b.as_ptr().wrapping_add(channel));
        (self.channel, self.lanes) = (channel, lanes);
    }
}

/// The epilogue of a tile's column of vectors, which begins `at` so many channels after the first, and its results.
///
/// # Safety
/// The results at each offset in `y` must be writable (and the residual readable) for `to.lanes` elements.
#[inline(always)]
pub(super) unsafe fn put_column<S: Simd, const M: usize>(
    to: &Results<S::Elem>,
    column: [S::V; M],
    y: &[usize; 8],
    at: usize,
) {
    let part = (to.lanes - at).min(S::LANES);
    // SAFETY: the caller's promise.
    unsafe {
        let (low, high) = (S::splat(to.low), S::splat(to.high));
        // Decided once for a column, not for each vector: sums of few terms take no longer than that.
        match part == S::LANES {
            true => put::<S, M, true>(to, column, y, at, S::LANES, low, high),
            false => put::<S, M, false>(to, column, y, at, part, low, high),
        }
    }
}

/// Of whole vectors, or of their first `part` lanes.
///
/// # Safety
/// As of [`put_column`].
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn put<S: Simd, const M: usize, const WHOLE: bool>(
    t: &Results<S::Elem>,
    mut column: [S::V; M],
    y: &[usize; 8],
    at: usize,
    part: usize,
    low: S::V,
    high: S::V,
) {
    let to = t.channel + at;
    // SAFETY: the caller's promise.
    unsafe {
        if !t.plain {
            if let Some(bias) = t.bias {
                let v = load_lanes::<S, WHOLE>(bias.add(at), part);
                for i in 0..M {
                    column[i] = S::add(column[i], v);
                }
            }
            if let Some(r) = t.residual {
                for i in 0..M {
                    column[i] = S::add(column[i], load_lanes::<S, WHOLE>(r.add(y[i] + to), part));
                }
            }
            for i in 0..M {
                column[i] = S::min(high, S::max(low, column[i]));
            }
        }
        for i in 0..M {
            let y = t.y.add(y[i] + to);
            store_lanes::<S, WHOLE>(y, column[i], part);
        }
    }
}
