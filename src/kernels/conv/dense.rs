//! Dense and grouped convolution and its input gradient, channels last, without patches in memory.
//!
//! Both are the same loop nest. Output positions that sum over the same kernel taps form a [`Grid`] (one grid for
//! the forward pass, one for each residue of the stride for the gradient). A register tile holds several positions
//! by a few vectors of output channels; its rows of A are read where they lie in the input, or, where the kernel
//! reaches beyond the edge, in a zero-padded copy of the few rows that a task needs. Taps that are neighbours in
//! memory form one run of the summed dimension.
#![allow(unsafe_code, clippy::needless_range_loop)]

use crate::kernels::conv::grids::{Division, Plan, pack, pad};
use crate::kernels::conv::load::Operand;
use crate::kernels::conv::{
    Done, Epilogue, Geometry, Residual, in_slots, pointwise, slots, split, strides, volume,
};
use crate::kernels::par::Shared;
use crate::kernels::simd::{Kernel, Level, Simd, Vectors, load_up_to, store_up_to};
use crate::kernels::tile::{Pieces, ROUND, along_rows};
use crate::tile_sizes;

/// Elements of packed weights that stay near while all of them are used for each tile.
const NEAR: usize = 1 << 14;
fn scaled(a: [usize; 3], b: [usize; 3]) -> [usize; 3] {
    [a[0] * b[0], a[1] * b[1], a[2] * b[2]]
}

/// What a task computes: some panels of the outputs of some images and rows.
struct Task<'a, T> {
    plan: &'a Plan,
    /// A at the first image and row of the task, extents of one image of it.
    a: *const T,
    window: [usize; 3],
    weights: &'a [T],
    panels: std::ops::Range<usize>,
    images: std::ops::Range<usize>,
    rows: std::ops::Range<usize>,
    epilogue: Epilogue<'a, T>,
    y: *mut T,
}

/// Walks over the positions of a grid in order.
struct Walk {
    extents: [usize; 3],
    at: [usize; 3],
    a_step: [usize; 3],
    y_step: [usize; 3],
    a_image: usize,
    y_image: usize,
    image: usize,
    a: usize,
    y: usize,
}

impl Walk {
    #[inline(always)]
    fn next(&mut self) {
        self.at[2] += 1;
        self.a += self.a_step[2];
        self.y += self.y_step[2];
        if self.at[2] == self.extents[2] {
            self.carry();
        }
    }

    fn carry(&mut self) {
        self.at[2] = 0;
        self.at[1] += 1;
        if self.at[1] == self.extents[1] {
            self.at[1] = 0;
            self.at[0] += 1;
            if self.at[0] == self.extents[0] {
                self.at[0] = 0;
                self.image += 1;
            }
        }
        let sum = |step: [usize; 3]| self.at[0] * step[0] + self.at[1] * step[1];
        self.a = self.image * self.a_image + sum(self.a_step);
        self.y = self.image * self.y_image + sum(self.y_step);
    }
}

impl<T: Vectors> Task<'_, T> {
    /// Where a tile of `m` positions begins in A and in the result.
    #[inline(always)]
    fn rows_of(&self, walk: &mut Walk, y0: usize, m: usize) -> ([*const T; 8], [usize; 8]) {
        let (mut a, mut y) = ([self.a; 8], [0usize; 8]);
        for i in 0..m {
            a[i] = self.a.wrapping_add(walk.a);
            y[i] = y0 + walk.y;
            walk.next();
        }
        (a, y)
    }
}

impl<T: Vectors> Kernel<T> for Task<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(self) {
        let plan = self.plan;
        let (ci, co, panel) = (plan.ci, plan.co, Level::of::<S>().panel(plan.co));
        let per_group = plan.panels(panel);
        let (c, oc) = (plan.groups * ci, plan.groups * co);
        let a_strides = strides(self.window, c);
        let size = plan.steps() * panel;
        // Few weights stay in the near cache: all panels for a tile of positions, so that results are written in
        // order. Many: a panel at a time for all positions.
        let together = if self.panels.len() * size <= NEAR { self.panels.len() } else { 1 };
        for first in self.panels.clone().step_by(together.max(1)) {
            for grid in &plan.grids {
                let mut extents = grid.extents;
                let rows = self.rows.start.min(extents[plan.axis])..self.rows.end.min(extents[plan.axis]);
                extents[plan.axis] = rows.len();
                let total = self.images.len() * volume(extents);
                let mut walk = Walk {
                    extents,
                    at: [0; 3],
                    a_step: scaled(plan.in_step, a_strides),
                    y_step: grid.out_step,
                    a_image: volume(self.window) * c,
                    y_image: volume(plan.target) * oc,
                    image: 0,
                    a: 0,
                    y: 0,
                };
                let y0 =
                    self.images.start * walk.y_image + grid.origin + rows.start * grid.out_step[plan.axis];
                let mut tile = Tile {
                    runs: &grid.runs,
                    b: self.weights.as_ptr(),
                    bias: None,
                    residual: match self.epilogue.residual {
                        Residual::None => None,
                        Residual::Of(r) => Some(r.as_ptr()),
                        Residual::InOutput => Some(self.y.cast_const()),
                    },
                    low: self.epilogue.clamp.low,
                    high: self.epilogue.clamp.high,
                    plain: self.epilogue.is_none(),
                    y: self.y,
                    input: 0,
                    channel: 0,
                    lanes: 0,
                };
                let pieces = Pieces::of(total, Level::of::<S>().rows(panel));
                let mut next = self.rows_of(&mut walk, y0, pieces.len(0));
                for i in 0..pieces.count {
                    let m = pieces.len(i);
                    let (a, y) = next;
                    let after = if i + 1 < pieces.count { pieces.len(i + 1) } else { 0 };
                    next = self.rows_of(&mut walk, y0, after);
                    for p in first..(first + together).min(self.panels.end) {
                        let (group, first) = (p / per_group, p % per_group * panel);
                        tile.lanes = panel.min(co - first);
                        let row = plan.row(panel, p, S::LANES);
                        tile.input = group * ci;
                        tile.channel = group * co + first;
                        tile.b = self.weights.as_ptr().wrapping_add(p * size + grid.first * ci * row);
                        tile.bias = self.epilogue.bias.map(|b| b.as_ptr().wrapping_add(tile.channel));
                        // What the next tile will write is fetched meanwhile: it lies in short runs, far apart.
                        for i in 0..if oc > panel { after } else { 0 } {
                            for at in (0..tile.lanes).step_by(S::LANES) {
                                let y = self.y.wrapping_add(next.1[i] + tile.channel + at);
                                // SAFETY: fetching is allowed anywhere.
                                unsafe { S::prefetch_write(y) }
                            }
                        }
                        let n = tile.lanes.div_ceil(S::LANES);
                        // SAFETY: the walk stays inside the task's rows, whose windows `a` holds; see `tile_run`.
                        unsafe { tile_sizes!(m, n, S, tile_run(&tile, &a, &y)) }
                    }
                }
            }
        }
    }
}

struct Tile<'a, T> {
    runs: &'a [(isize, usize)],
    b: *const T,
    bias: Option<*const T>,
    residual: Option<*const T>,
    low: T,
    high: T,
    /// Results are written as they are.
    plain: bool,
    y: *mut T,
    /// The group's first input channel, and the panel's first output channel and their number.
    input: usize,
    channel: usize,
    lanes: usize,
}

/// One register tile: `M` positions by `N` vectors.
///
/// # Safety
/// `a` must be readable at all runs, `y` writable (and the residual readable) at each offset for `lanes` elements.
#[inline(always)]
unsafe fn tile_run<S: Simd, const M: usize, const N: usize>(
    t: &Tile<S::Elem>,
    a: &[*const S::Elem; 8],
    y: &[usize; 8],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut rows = [a[0]; M];
        for i in 0..M {
            rows[i] = a[i].wrapping_add(t.input);
        }
        let mut acc = along_rows::<S, M, N, ROUND>(t.runs, rows, t.b, N * S::LANES);
        if t.plain {
            for i in 0..M {
                for j in 0..N {
                    let at = j * S::LANES;
                    let part = (t.lanes - at).min(S::LANES);
                    store_up_to::<S>(t.y.add(y[i] + t.channel + at), acc[i][j], part);
                }
            }
            return;
        }
        let (low, high) = (S::splat(t.low), S::splat(t.high));
        for j in 0..N {
            let at = j * S::LANES;
            let part = (t.lanes - at).min(S::LANES);
            if let Some(bias) = t.bias {
                let v = load_up_to::<S>(bias.add(at), part);
                for i in 0..M {
                    acc[i][j] = S::add(acc[i][j], v);
                }
            }
            for i in 0..M {
                let mut v = acc[i][j];
                if let Some(r) = t.residual {
                    v = S::add(v, load_up_to::<S>(r.add(y[i] + t.channel + at), part));
                }
                v = S::min(high, S::max(low, v));
                store_up_to::<S>(t.y.add(y[i] + t.channel + at), v, part);
            }
        }
    }
}

/// `result = clamp(W·a + bias + residual)` of some positions of a pointwise plan, its weights packed.
pub(super) fn positions<T: Vectors>(plan: &Plan, a: &[T], weights: &[T], epilogue: Epilogue<T>, y: &mut [T]) {
    let rows = a.len() / plan.ci.max(1);
    let window = [1, 1, rows];
    assert!(plan.n == 1 && plan.groups == 1 && plan.source == plan.target && rows <= volume(plan.source));
    let panel = plan.panel::<T>();
    assert!(y.len() == rows * plan.co && weights.len() == plan.packed(panel), "positions");
    let panels = 0..plan.panels(panel);
    let task = Task {
        plan,
        a: a.as_ptr(),
        window,
        weights,
        panels,
        images: 0..1,
        rows: 0..rows,
        epilogue,
        y: y.as_mut_ptr(),
    };
    // SAFETY: each of these positions has its elements in `a` and `y`.
    unsafe { T::dispatch(task) }
}

#[allow(clippy::too_many_arguments)]
fn run<T: Vectors>(
    plan: &Plan,
    forward: bool,
    x: Operand<T>,
    w: &[T],
    epilogue: Epilogue<T>,
    y: &mut [T],
    scratch: &mut [T],
    done: Option<&Done<T>>,
) {
    let panel = plan.panel::<T>();
    let (weights, slots) = scratch.split_at_mut(plan.packed(panel));
    pack(plan, forward, panel, w, weights);
    let weights: &[T] = weights;
    let d = plan.division(panel);
    let (rows, panels) = (plan.rows(), plan.groups * plan.panels(panel));
    let blocks = plan.blocks(&d, panel);
    let c = plan.groups * plan.ci;
    // Results of a row.
    let line = volume(plan.target) / plan.target[plan.axis] * plan.groups * plan.co;
    let y = Shared::new(y);
    in_slots(volume(blocks), slot(plan, &d, x.is_plain()), slots, |task, slot| {
        let [i, r, p] = split(task, blocks);
        let images = i * d.images..plan.n.min((i + 1) * d.images);
        let rows = r * d.rows..rows.min((r + 1) * d.rows);
        let panels = p * d.panels..panels.min((p + 1) * d.panels);
        let row = rows.start * plan.in_step[plan.axis];
        // Rows of one image, or whole images.
        let first = (images.start * plan.rows() + rows.start) * line;
        let count = images.len() * rows.len() * line;
        let (a, window) = match (plan.copies(), x.is_plain()) {
            (true, _) => {
                let window = plan.window(d.rows);
                pad(plan, x.data.whole(), images.clone(), row, window, slot);
                (slot.as_ptr(), window)
            }
            (false, true) => {
                let start = images.start * volume(plan.source) + row * strides(plan.source, 1)[plan.axis];
                (x.data.whole()[start * c..].as_ptr(), plan.source)
            }
            // Pointwise: one image, whose positions are rows.
            (false, false) => (x.near(row, rows.len(), slot).as_ptr(), [1, 1, rows.len()]),
        };
        // SAFETY: the slices have the plan's extents (checked by the callers), so all windows of the task's
        // positions lie in `a`; no two tasks write the same elements of `y`.
        unsafe {
            T::dispatch(Task { plan, a, window, weights, panels, images, rows, epilogue, y: y.ptr() });
        }
        if let Some(done) = done {
            // SAFETY: with all panels in one task, this one has written all of these results, and it alone.
            done(i * blocks[1] + r, first, unsafe { std::slice::from_raw_parts(y.ptr().add(first), count) });
        }
    });
}

/// Elements of a task's copy of its input.
fn slot(plan: &Plan, d: &Division, plain: bool) -> usize {
    if plain { plan.slot(d) } else { d.rows * plan.ci }
}

/// The forward pass; of a pointwise convolution all images' positions in a row.
fn forward_plan(g: &Geometry) -> Plan {
    match pointwise::applies(g) {
        true => Plan::forward(&pointwise::of(g, g.n * volume(g.x))),
        false => Plan::forward(g),
    }
}

/// Elements of scratch that [`forward`] needs; `plain`: is X?
pub fn forward_scratch<T: Vectors>(g: &Geometry, plain: bool) -> usize {
    scratch::<T>(&forward_plan(g), plain)
}

fn scratch<T: Vectors>(plan: &Plan, plain: bool) -> usize {
    let panel = plan.panel::<T>();
    let d = plan.division(panel);
    plan.packed(panel) + slots(volume(plan.blocks(&d, panel)), slot(plan, &d, plain))
}

/// Blocks of whole positions in which [`forward`] computes, if it does so.
pub fn forward_blocks<T: Vectors>(g: &Geometry) -> Option<usize> {
    let plan = forward_plan(g);
    let panel = plan.panel::<T>();
    let [images, rows, panels] = plan.blocks(&plan.division(panel), panel);
    (panels == 1).then_some(images * rows)
}

/// `y = clamp(conv(x, w) + bias + residual)` with x (N, spatial…, C) and y (N, spatial…, M), w (M, C/groups, k…).
pub fn forward<T: Vectors>(
    g: &Geometry,
    x: Operand<T>,
    w: &[T],
    epilogue: Epilogue<T>,
    y: &mut [T],
    scratch: &mut [T],
    done: Option<&Done<T>>,
) {
    g.check_sizes(x.data.len(), y.len());
    assert!(x.is_plain() || pointwise::applies(g), "an input that is computed as it is read");
    let done = done.filter(|_| forward_blocks::<T>(g).is_some());
    run(&forward_plan(g), true, x, w, epilogue, y, scratch, done);
}

/// Elements of scratch that [`input_grad`] needs.
pub fn input_grad_scratch<T: Vectors>(g: &Geometry) -> usize {
    scratch::<T>(&input_grad_plan(g), true)
}

fn input_grad_plan(g: &Geometry) -> Plan {
    match pointwise::applies(g) {
        true => Plan::input_grad(&pointwise::of(g, g.n * volume(g.x))),
        false => Plan::input_grad(g),
    }
}

/// Elements of its packed weights.
pub(super) fn packed_back<T: Vectors>(g: &Geometry) -> usize {
    let plan = input_grad_plan(g);
    plan.packed(plan.panel::<T>())
}

/// `dx = addend + Σ_t W[t]ᵀ·dy[…]`; without a residual in the epilogue, nothing is added.
pub fn input_grad<T: Vectors>(
    g: &Geometry,
    dy: &[T],
    w: &[T],
    epilogue: Epilogue<T>,
    dx: &mut [T],
    scratch: &mut [T],
) {
    g.check(dx, dy);
    run(&input_grad_plan(g), false, Operand::plain(dy, g.oc), w, epilogue, dx, scratch, None);
}
