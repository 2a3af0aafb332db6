//! Convolution with the statistics of its results, gathered from each block of them while it is near.
#![allow(unsafe_code)]

use super::{
    Epilogue, Geometry, Operand, dense, depthwise, forward_blocks, forward_scratch, loads, reads_half,
    simpler, winograd,
};
use crate::kernels::half::{ElementsMut, Half};
use crate::kernels::layout::Layout;
use crate::kernels::norm::{self, Channels};
use crate::kernels::par::Shared;
use crate::kernels::simd::Vectors;

/// Is told of blocks of results, whole positions with all of their channels, each once by the task that computed it.
/// It is told the block's number and first element. Results without a place of their own are memory of the task's.
pub(super) type Done<'a, T> = dyn Fn(usize, usize, &[T]) + Sync + 'a;

/// Of each output channel; `room`: [`statistics_room`] elements.
pub struct Statistics<'a, T> {
    pub mean: &'a mut [T],
    /// Of the whole population.
    pub variance: &'a mut [T],
    pub room: &'a mut [f64],
    /// All results rounded. They may be nowhere else.
    pub rounded: Option<(Half, &'a mut [u16])>,
}

/// How many blocks of results a convolution makes known, if it does so at all.
fn blocks<T: Vectors>(g: &Geometry) -> Option<usize> {
    match () {
        _ if g.is_empty() || g.layout != Layout::Last => None,
        _ if simpler::of(g).is_some() => None,
        _ if depthwise::applies::<T>(g) => Some(depthwise::forward_blocks(g)),
        _ if winograd::gathers(g) => Some(winograd::forward_blocks::<T>(g)),
        _ if winograd::applies_forward(g) => None,
        _ => dense::forward_blocks::<T>(g),
    }
}

fn channels(g: &Geometry) -> Channels {
    let d = Channels { n: g.n, c: g.oc, s: g.y.iter().product() };
    if g.layout == Layout::Last { d.last() } else { d }
}

/// Elements of `f64` that [`forward_statistics`] needs.
pub fn statistics_room<T: Vectors>(g: &Geometry) -> usize {
    match blocks::<T>(g) {
        Some(blocks) => blocks * norm::block_room(g.oc),
        None => channels(g).partials(),
    }
}

/// Elements of scratch that [`forward_statistics`] needs; `plain`: is X? `kept`: are results not only rounded?
pub fn statistics_scratch<T: Vectors>(g: &Geometry, plain: bool, kept: bool) -> usize {
    match blocks::<T>(g) {
        Some(_) if !kept && depthwise::applies::<T>(g) => depthwise::forward_scratch(g, plain, kept),
        Some(_) if !kept && winograd::gathers(g) => winograd::forward_scratch::<T>(g, !plain),
        Some(_) if !kept => dense::forward_scratch::<T>(g, plain, kept),
        _ => forward_scratch::<T>(g, plain) + if kept { 0 } else { g.outputs() },
    }
}

/// As [`forward`](super::forward), with the statistics of the results.
pub fn forward_statistics<T: Vectors>(
    g: &Geometry,
    x: Operand<T>,
    w: &[T],
    epilogue: Epilogue<T>,
    y: Option<&mut [T]>,
    statistics: Statistics<T>,
    scratch: &mut [T],
) {
    let Statistics { mean, variance, room, rounded } = statistics;
    x.check();
    let read = x.is_plain() || loads(g) || reads_half(g) || y.is_some();
    assert!(read, "an input that is computed as it is read");
    assert!(rounded.as_ref().is_none_or(|r| r.1.len() == g.outputs()), "rounded results");
    assert!(rounded.is_some() || y.is_some(), "results without a place");
    if let (Some(blocks), true) = (blocks::<T>(g), winograd::gathers(g)) {
        let room = &mut room[..blocks * norm::block_room(g.oc)];
        match (y, rounded) {
            (Some(y), rounded) => {
                winograd::forward(g, x.data, w, epilogue, ElementsMut::Whole(y), Some(room), scratch);
                if let Some((half, to)) = rounded {
                    half.round_all(y, to);
                }
            }
            (None, Some((Half::Bf16, to))) => {
                winograd::forward(g, x.data, w, epilogue, ElementsMut::Bf16(to), Some(room), scratch);
            }
            (None, _) => panic!("results by pairs are rounded to bfloat16"),
        }
        return norm::merge_blocks(room, mean, variance);
    }
    let rounded = rounded.map(|(half, to)| (half, Shared::new(to)));
    // Of results that are near, from element `first` on.
    let round = |first: usize, y: &[T]| {
        if let Some((half, to)) = &rounded {
            // SAFETY: as many as there are results, and those of no two blocks are the same.
            half.round_near(y, unsafe { std::slice::from_raw_parts_mut(to.ptr().add(first), y.len()) });
        }
    };
    let Some(blocks) = blocks::<T>(g) else {
        let (y, scratch) = match y {
            Some(y) => (y, scratch),
            None => scratch.split_at_mut(g.outputs()),
        };
        forward_blocks(g, x, w, epilogue, y, scratch, None);
        return norm::channel_stats_and(y, channels(g), mean, variance, room, &round);
    };
    let each = norm::block_room(g.oc);
    let room = &mut room[..blocks * each];
    let parts = Shared::new(room);
    let done = |block: usize, first: usize, y: &[T]| {
        assert!(block < blocks);
        // SAFETY: the block's part of the room, which no other block touches.
        let part = unsafe { std::slice::from_raw_parts_mut(parts.ptr().add(block * each), each) };
        norm::block_moments(y, g.oc, part);
        round(first, y);
    };
    match y {
        Some(y) => forward_blocks(g, x, w, epilogue, y, scratch, Some(&done)),
        None if depthwise::applies::<T>(g) => {
            depthwise::forward(g, x, w, epilogue, None, scratch, Some(&done))
        }
        None => dense::forward(g, x, w, epilogue, None, scratch, Some(&done)),
    }
    norm::merge_blocks(room, mean, variance);
}
