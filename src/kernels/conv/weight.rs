//! `dW = dY * X`: sums over images and positions, in a fixed number of chunks added up in order.

use rayon::prelude::*;

use super::{Geometry, depthwise, in_slots, slots, volume, window_rows};
use crate::kernels::gemm::{Product, Shared};
use crate::kernels::isa::vectorize;
use crate::tensor::Float;

/// Elements of partial sums at most, unless one chunk already takes more.
const PARTIAL: usize = 1 << 20;
const CHUNKS: usize = 8;

/// How the sum is cut: (group, block of input channels, chunk of row blocks) is a task.
struct Plan {
    channels: usize,
    blocks: usize,
    rows: usize,
    row_blocks: usize,
    chunks: usize,
    /// Rows of the product are positions of the padded window, read in place; otherwise patches are gathered.
    in_place: bool,
    /// The output gradient lies as the product needs it.
    dense: bool,
    slot: [usize; 2],
}

impl Plan {
    fn of(g: &Geometry) -> Self {
        let (cg, og, taps) = (g.cg(), g.og(), g.taps());
        let channels = cg.min(96usize.div_ceil(g.k[2]).next_multiple_of(16));
        let blocks = cg.div_ceil(channels);
        // A kernel row times channels lies contiguous in the window with channels last.
        let in_place = g.unit_stride() && (g.dilation[2] == 1 || g.k[2] == 1) && g.k[2] * channels >= 24;
        let w = g.window(1);
        let row: usize = w[g.axis + 1..].iter().product();
        let per_row = if in_place { (channels + og) * row } else { channels * (row + taps * g.row()) };
        let rows = g.block_rows(per_row, row);
        let row_blocks = g.y[g.axis].div_ceil(rows);
        let dense = g.window(rows)[1..] == g.y[1..] && g.k[0] == 1;
        let weights = g.oc * cg * taps;
        let chunks = CHUNKS.min(g.n * row_blocks).min((PARTIAL / weights).max(1));
        let window = volume(g.window(rows)) * channels;
        let second = match (in_place, dense) {
            (true, true) => 0,
            (true, false) => og * g.grid(rows).1,
            (false, _) => rows * g.row() * taps * channels,
        };
        Plan { channels, blocks, rows, row_blocks, chunks, in_place, dense, slot: [window, second] }
    }

    fn tasks(&self, g: &Geometry) -> usize {
        g.groups * self.blocks * self.chunks
    }

    /// Where a channel block's partial sums begin within those of a chunk, and the block's channels.
    fn block(&self, g: &Geometry, group: usize, block: usize) -> (usize, usize) {
        let first = block * self.channels;
        let at = g.og() * g.taps() * (group * g.cg() + first);
        (at, self.channels.min(g.cg() - first))
    }
}

/// Elements of scratch that [`weight_grad`] needs.
pub fn weight_grad_scratch(g: &Geometry) -> usize {
    if g.is_empty() {
        0
    } else if g.depthwise() {
        depthwise::weight_grad_scratch(g)
    } else {
        let p = Plan::of(g);
        p.chunks * g.oc * g.cg() * g.taps() + slots(p.tasks(g), p.slot[0] + p.slot[1])
    }
}

/// `dy` (N, OC, Y…), `x` (N, C, X…), `dw` (OC, C/groups, K…).
pub fn weight_grad<T: Float>(g: &Geometry, dy: &[T], x: &[T], dw: &mut [T], scratch: &mut [T]) {
    if g.is_empty() {
        return dw.fill(T::zero());
    }
    if g.depthwise() {
        return depthwise::weight_grad(g, dy, x, dw, scratch);
    }
    let plan = Plan::of(g);
    let (cg, og, taps) = (g.cg(), g.og(), g.taps());
    let weights = g.oc * cg * taps;
    let (partial, scratch) = scratch.split_at_mut(plan.chunks * weights);
    {
        let partial = Shared::new(partial);
        in_slots(plan.tasks(g), plan.slot[0] + plan.slot[1], scratch, |task, slot| {
            let (chunk, rest) = (task % plan.chunks, task / plan.chunks);
            let (group, block) = (rest / plan.blocks, rest % plan.blocks);
            let (at, channels) = plan.block(g, group, block);
            // SAFETY: tasks differ in chunk, group or channels.
            #[allow(unsafe_code)]
            let sums = unsafe { partial.part(chunk * weights + at, og * taps * channels) };
            let units = g.n * plan.row_blocks;
            let (from, to) = (chunk * units / plan.chunks, (chunk + 1) * units / plan.chunks);
            for unit in from..to {
                let beta = if unit == from { T::zero() } else { T::one() };
                one_block(g, &plan, unit, group, block, beta, [dy, x], slot, sums);
            }
        });
    }
    // From the layout of the products, (kernel row, OG, kernel column, channel) or (OG, tap, channel), to ONNX's.
    let (k2, partial) = (g.k[2], &*partial);
    dw.par_chunks_mut(cg * taps).enumerate().for_each(|(o, dw)| {
        let (group, o) = (o / og, o % og);
        for block in 0..plan.blocks {
            let (at, channels) = plan.block(g, group, block);
            for t in 0..taps {
                let from = at
                    + match plan.in_place {
                        true => ((t / k2 * og + o) * k2 + t % k2) * channels,
                        false => (o * taps + t) * channels,
                    };
                for c in 0..channels {
                    let sum = (0..plan.chunks).map(|i| partial[i * weights + from + c]).sum();
                    dw[(block * plan.channels + c) * taps + t] = sum;
                }
            }
        }
    });
}

/// Adds one block of output rows of one image to the sums of one block of channels.
#[allow(clippy::too_many_arguments)]
fn one_block<T: Float>(
    g: &Geometry,
    plan: &Plan,
    unit: usize,
    group: usize,
    block: usize,
    beta: T,
    [dy, x]: [&[T]; 2],
    slot: &mut [T],
    sums: &mut [T],
) {
    let (image, first) = (unit / plan.row_blocks, unit % plan.row_blocks * plan.rows);
    let (cg, og, taps, px, py) = (g.cg(), g.og(), g.taps(), volume(g.x), volume(g.y));
    let channels = plan.channels.min(cg - block * plan.channels);
    let rows = plan.rows.min(g.y[g.axis] - first);
    let n = rows * g.row();
    let window = g.window(rows);
    let (last, second) = slot.split_at_mut(plan.slot[0]);
    let x = &x[(image * g.c + group * cg + block * plan.channels) * px..][..channels * px];
    let dy = &dy[(image * g.oc + group * og) * py + first * g.row()..];
    vectorize(
        #[inline(always)]
        || channels_last(x, px, channels, g.x, g.origin(first), window, last),
    );
    let [_, _, k2] = g.k;
    if !plan.in_place {
        let patches = &mut second[..n * taps * channels];
        gather_patches(g, last, channels, rows, window, patches);
        let p = Product { lda: py, beta, ..Product::dense(false, false, og, taps * channels, n) };
        return p.serial(dy, patches, sums);
    }
    let (y_dims, positions) = g.grid(rows);
    let (dy, lda) = match plan.dense {
        true => (dy, py),
        false => {
            vectorize(
                #[inline(always)]
                || {
                    for (o, out) in second.chunks_exact_mut(positions).take(og).enumerate() {
                        spread_rows(&dy[o * py..][..n], y_dims, window, out);
                    }
                },
            );
            (&*second, positions)
        }
    };
    for r in 0..taps / k2 {
        let from = g.tap(r * k2, window) * channels;
        let p = Product {
            lda,
            ldb: channels,
            beta,
            ..Product::dense(false, false, og, k2 * channels, positions)
        };
        p.serial(dy, &last[from..], &mut sums[r * og * k2 * channels..]);
    }
}

/// Rows of an output at the positions they have in its window, zeros between.
#[inline(always)]
fn spread_rows<T: Float>(rows: &[T], y: [usize; 3], window: [usize; 3], out: &mut [T]) {
    let mut end = 0;
    for (i, row) in rows.chunks_exact(y[2]).enumerate() {
        let at = (i / y[1] * window[1] + i % y[1]) * window[2];
        out[end..at].fill(T::zero());
        end = at + y[2];
        super::copy(row, &mut out[at..end]);
    }
}

/// A window of several planes, channels last, zeros where it lies outside.
#[inline(always)]
fn channels_last<T: Float>(
    x: &[T],
    px: usize,
    channels: usize,
    dims: [usize; 3],
    origin: [isize; 3],
    window: [usize; 3],
    out: &mut [T],
) {
    window_rows(dims, origin, window, |row, from, to, at| {
        let out = &mut out[row * window[2] * channels..][..window[2] * channels];
        out[..from * channels].fill(T::zero());
        out[to * channels..].fill(T::zero());
        if from == to {
            return;
        }
        let out = &mut out[from * channels..to * channels];
        let mut c = 0;
        while c + 16 <= channels {
            transpose::<T, 16>(x, px, at, c, channels, out);
            c += 16;
        }
        for c in c..channels {
            for (o, x) in out[c..].iter_mut().step_by(channels).zip(&x[c * px + at..]) {
                *o = *x;
            }
        }
    });
}

/// `N` channels from `c` on of a row.
#[inline(always)]
fn transpose<T: Float, const N: usize>(
    x: &[T],
    px: usize,
    at: usize,
    c: usize,
    channels: usize,
    out: &mut [T],
) {
    let len = out.len() / channels;
    let rows: [&[T]; N] = std::array::from_fn(|i| &x[(c + i) * px + at..][..len]);
    for (i, out) in out.chunks_exact_mut(channels).enumerate() {
        let out = &mut out[c..c + N];
        for j in 0..N {
            out[j] = rows[j][i];
        }
    }
}

/// One row an output position: all taps of all channels.
fn gather_patches<T: Float>(
    g: &Geometry,
    last: &[T],
    channels: usize,
    rows: usize,
    window: [usize; 3],
    out: &mut [T],
) {
    let mut y = g.y;
    y[g.axis] = rows;
    let [k0, k1, k2] = g.k;
    // A kernel row is one run where its taps are neighbours.
    let (runs, run) = if g.dilation[2] == 1 { (1, k2 * channels) } else { (k2, channels) };
    vectorize(
        #[inline(always)]
        || {
            let mut out = out.chunks_exact_mut(run);
            for p in 0..volume(y) {
                let [a, b, c] = [p / (y[1] * y[2]), p / y[2] % y[1], p % y[2]];
                for (i, j) in (0..k0).flat_map(|i| (0..k1).map(move |j| (i, j))) {
                    let (a, b) = (a * g.stride[0] + i * g.dilation[0], b * g.stride[1] + j * g.dilation[1]);
                    for l in 0..runs {
                        let c = c * g.stride[2] + l * g.dilation[2];
                        let at = ((a * window[1] + b) * window[2] + c) * channels;
                        if let Some(out) = out.next() {
                            super::copy(&last[at..at + run], out);
                        }
                    }
                }
            }
        },
    );
}
