//! Dense and grouped convolution and its input gradient, channels last, without patches in memory.
//!
//! Both are the same loop nest. Output positions that sum over the same kernel taps form a [`Grid`] (one grid for
//! the forward pass, one for each residue of the stride for the gradient). A register tile holds several positions
//! by two vectors of output channels; its rows of A are read where they lie in the input, or, where the kernel
//! reaches beyond the edge, in a zero-padded copy of the few rows that a task needs. Taps that are neighbours in
//! memory form one run of the summed dimension.
#![allow(unsafe_code, clippy::needless_range_loop)]

use smallvec::SmallVec;

use crate::kernels::conv::{Epilogue, Geometry, Residual, SLOTS, in_slots, volume};
use crate::kernels::gemm::Shared;
use crate::kernels::simd::{Kernel, Simd, Vectors};
use crate::kernels::tile::{Pieces, along_rows};
use crate::tile_sizes;

/// Elements of input and output that a task should keep in the second-level cache.
const CHUNK: usize = 1 << 16;
/// Tasks that are enough to keep the threads of a small machine equally busy.
const TASKS: usize = 16;
/// Elements of the buffer that weights pass through while they are packed.
const BUFFER: usize = 1 << 12;
/// Elements of packed weights that stay near while all of them are used for each tile.
const NEAR: usize = 1 << 14;
/// Multiply-adds worth a task of their own.
const WORK: usize = 1 << 19;

/// Output positions `q` that sum over the same taps: at `origin + Σ q·out_step`, from `Σ q·in_step` + each run.
#[derive(Debug, Clone)]
struct Grid {
    extents: [usize; 3],
    origin: usize,
    out_step: [usize; 3],
    /// Where its taps begin in the order of the packed weights.
    first: usize,
    /// Offsets and lengths of the runs of A.
    runs: SmallVec<[(isize, usize); 32]>,
}

/// A convolution as this file computes it, forward or gradient.
#[derive(Debug)]
struct Plan {
    n: usize,
    groups: usize,
    /// Input and output channels of a group.
    ci: usize,
    co: usize,
    axis: usize,
    /// Input extents, those with zeros around, and the zeros before the input.
    source: [usize; 3],
    padded: [usize; 3],
    low: [usize; 3],
    /// Positions the input advances by at each position of a grid, and the furthest tap.
    in_step: [usize; 3],
    reach: [usize; 3],
    target: [usize; 3],
    /// Taps of the kernel, and those that are used in the order of the packed weights.
    taps: usize,
    order: SmallVec<[u32; 64]>,
    grids: SmallVec<[Grid; 4]>,
}

fn split(t: usize, k: [usize; 3]) -> [usize; 3] {
    [t / (k[1] * k[2]), t / k[2] % k[1], t % k[2]]
}

impl Plan {
    fn forward(g: &Geometry) -> Plan {
        let reach: [usize; 3] = std::array::from_fn(|d| (g.k[d] - 1) * g.dilation[d]);
        let padded = std::array::from_fn(|d| {
            let last = (g.y[d] - 1) * g.stride[d] + reach[d] + 1;
            match g.pad[d] == 0 && last <= g.x[d] {
                true => g.x[d],
                false => last.max(g.x[d] + g.pad[d]),
            }
        });
        let mut plan = Plan {
            n: g.n,
            groups: g.groups,
            ci: g.cg(),
            co: g.og(),
            axis: g.axis,
            source: g.x,
            padded,
            low: g.pad,
            in_step: g.stride,
            reach,
            target: g.y,
            taps: g.taps(),
            order: (0..g.taps() as u32).collect(),
            grids: SmallVec::new(),
        };
        let taps: SmallVec<[(u32, [usize; 3]); 64]> = (0..g.taps())
            .map(|t| {
                let k = split(t, g.k);
                (t as u32, std::array::from_fn(|d| k[d] * g.dilation[d]))
            })
            .collect();
        plan.grid(g.y, [0; 3], [1; 3], 0, &taps);
        plan
    }

    /// `dx[q·s + r] = Σ_t W[t]ᵀ · dy[q + (r + pad − d·t) / s]` over the taps for which that is a whole number.
    fn input_grad(g: &Geometry) -> Plan {
        let at = |d: usize, r: usize, t: usize| {
            let o = (r + g.pad[d]) as isize - (t * g.dilation[d]) as isize;
            let s = g.stride[d] as isize;
            (o.rem_euclid(s) == 0).then_some(o.div_euclid(s))
        };
        let each = |d: usize| {
            (0..g.stride[d].min(g.x[d])).flat_map(move |r| (0..g.k[d]).filter_map(move |t| at(d, r, t)))
        };
        let low: [usize; 3] = std::array::from_fn(|d| -each(d).min().unwrap_or(0).min(0) as usize);
        let reach: [usize; 3] =
            std::array::from_fn(|d| (each(d).max().unwrap_or(0) + low[d] as isize).max(0) as usize);
        let padded = std::array::from_fn(|d| {
            let last = (g.x[d] - 1) / g.stride[d] + reach[d] + 1;
            if low[d] == 0 && last <= g.y[d] { g.y[d] } else { last.max(g.y[d] + low[d]) }
        });
        let mut plan = Plan {
            n: g.n,
            groups: g.groups,
            ci: g.og(),
            co: g.cg(),
            axis: g.axis,
            source: g.y,
            padded,
            low,
            in_step: [1; 3],
            reach,
            target: g.x,
            taps: g.taps(),
            order: SmallVec::new(),
            grids: SmallVec::new(),
        };
        let residues: [usize; 3] = std::array::from_fn(|d| g.stride[d].min(g.x[d]));
        for i in 0..volume(residues) {
            let r = split(i, residues);
            let mut taps: SmallVec<[(u32, [usize; 3]); 64]> = SmallVec::new();
            // Last taps first: so they ascend in the input.
            for t in (0..g.taps()).rev() {
                let k = split(t, g.k);
                let o: [Option<isize>; 3] = std::array::from_fn(|d| at(d, r[d], k[d]));
                if let [Some(a), Some(b), Some(c)] = o {
                    let o = [a, b, c];
                    taps.push((t as u32, std::array::from_fn(|d| (o[d] + low[d] as isize) as usize)));
                }
            }
            let first = plan.order.len();
            plan.order.extend(taps.iter().map(|t| t.0));
            let extents = std::array::from_fn(|d| (g.x[d] - r[d]).div_ceil(g.stride[d]));
            plan.grid(extents, r, g.stride, first, &taps);
        }
        plan
    }

    /// Adds the grid of positions `origin + q·step`, whose taps read the input at the given padded positions.
    fn grid(
        &mut self,
        extents: [usize; 3],
        origin: [usize; 3],
        step: [usize; 3],
        first: usize,
        taps: &[(u32, [usize; 3])],
    ) {
        let c = self.groups * self.ci;
        let mut runs: SmallVec<[(isize, usize); 32]> = SmallVec::new();
        for (_, at) in taps {
            let o = (flat(*at, self.padded) * c) as isize;
            match runs.last_mut() {
                Some(run) if self.groups == 1 && run.0 + run.1 as isize == o => run.1 += self.ci,
                _ => runs.push((o, self.ci)),
            }
        }
        let oc = self.groups * self.co;
        let strides = strides(self.target, oc);
        self.grids.push(Grid {
            extents,
            origin: (0..3).map(|d| origin[d] * strides[d]).sum(),
            out_step: std::array::from_fn(|d| step[d] * strides[d]),
            first,
            runs,
        });
    }

    /// Does the kernel reach beyond the input?
    fn copies(&self) -> bool {
        self.padded != self.source
    }

    /// Rows of a grid along the axis.
    fn rows(&self) -> usize {
        self.grids.iter().map(|g| g.extents[self.axis]).max().unwrap_or(0)
    }

    /// Extents of A that `rows` rows of a grid are read from: of the copy, or of the whole input.
    fn window(&self, rows: usize) -> [usize; 3] {
        let mut w = self.padded;
        if self.copies() {
            w[self.axis] =
                ((rows - 1) * self.in_step[self.axis] + self.reach[self.axis] + 1).min(w[self.axis]);
        }
        w
    }

    fn steps(&self) -> usize {
        self.order.len() * self.ci
    }

    fn panels(&self, panel: usize) -> usize {
        self.co.div_ceil(panel)
    }

    /// Elements of all packed weights.
    fn packed(&self, panel: usize) -> usize {
        self.groups * self.panels(panel) * panel * self.steps()
    }

    fn division(&self, panel: usize) -> Division {
        let rows = self.rows();
        let per_row = (volume(self.padded) / self.padded[self.axis].max(1))
            * self.groups
            * self.ci
            * self.in_step[self.axis].min(self.padded[self.axis])
            + volume(self.target) / rows.max(1) * self.groups * self.co;
        let work = volume(self.target) * self.steps() * self.groups * self.co / self.grids.len().max(1);
        let tasks = (self.n * work / WORK).clamp(1, TASKS);
        // Many weights are read from afar for each task: they had better serve many positions.
        let chunk = (self.packed(panel) / 8).clamp(CHUNK, 4 * CHUNK);
        let (images, rows_each) = if per_row * rows <= chunk || rows == 1 {
            let most = self.n.div_ceil(if chunk > CHUNK { 2 } else { tasks });
            let images = (chunk / (per_row * rows).max(1)).clamp(1, most.max(1));
            let images = self.n.div_ceil(self.n.div_ceil(images));
            let split = tasks.div_ceil(self.n.div_ceil(images)).min(rows);
            (images, if images == 1 { rows.div_ceil(split) } else { rows })
        } else {
            let split = tasks.div_ceil(self.n).min(rows);
            (1, (chunk / per_row.max(1)).clamp(1, rows.div_ceil(split)))
        };
        let units = self.n.div_ceil(images) * rows.div_ceil(rows_each);
        let panels = self.groups * self.panels(panel);
        let groups = tasks.div_ceil(units).clamp(1, panels);
        Division { images, rows: rows_each, panels: panels.div_ceil(groups) }
    }

    /// Elements of the padded copy of one task.
    fn slot(&self, d: &Division) -> usize {
        if self.copies() { d.images * volume(self.window(d.rows)) * self.groups * self.ci } else { 0 }
    }

    fn scratch(&self, panel: usize) -> usize {
        self.packed(panel) + SLOTS * self.slot(&self.division(panel))
    }
}

/// How the work is divided into tasks.
#[derive(Debug, Clone, Copy)]
struct Division {
    images: usize,
    /// Rows of a grid, along the axis.
    rows: usize,
    panels: usize,
}

fn scaled(a: [usize; 3], b: [usize; 3]) -> [usize; 3] {
    [a[0] * b[0], a[1] * b[1], a[2] * b[2]]
}

fn flat(at: [usize; 3], extents: [usize; 3]) -> usize {
    (at[0] * extents[1] + at[1]) * extents[2] + at[2]
}

fn strides(extents: [usize; 3], c: usize) -> [usize; 3] {
    [extents[1] * extents[2] * c, extents[2] * c, c]
}

/// Weights of (M, C/groups, taps) in panels: for each group and panel of output channels, the steps of the summed
/// dimension in the order of the plan's taps, one row of `panel` channels each, zeros beyond the last channel.
fn pack<T: Vectors>(plan: &Plan, forward: bool, panel: usize, w: &[T], out: &mut [T]) {
    use rayon::prelude::*;
    let (ci, co) = (plan.ci, plan.co);
    // Elements between the outputs of a group, and between its inputs.
    let total = plan.taps;
    let (o_step, i_step) = if forward { (ci * total, total) } else { (total, co * total) };
    let one = |p: usize, out: &mut [T]| {
        let (group, first) = (p / plan.panels(panel), p % plan.panels(panel) * panel);
        let lanes = panel.min(co - first);
        let w = &w[group * ci * co * total + first * o_step..];
        if lanes < panel {
            out.fill(T::zero());
        }
        // The rows of `w` that make up a panel may be far apart: a run of each is brought near first.
        let width = (BUFFER / (lanes * total)).min(ci);
        let mut near = [T::zero(); BUFFER];
        for i0 in (0..ci).step_by(width.max(1)) {
            let count = width.clamp(1, ci - i0);
            let (w, o_step) = match forward && width > 1 {
                true => {
                    for lane in 0..lanes {
                        let from = &w[lane * o_step + i0 * i_step..][..count * total];
                        near[lane * count * total..][..count * total].copy_from_slice(from);
                    }
                    (&near[..], count * total)
                }
                false => (&w[i0 * i_step..], o_step),
            };
            for i in 0..count {
                for (t, tap) in plan.order.iter().enumerate() {
                    let w = &w[i * i_step + *tap as usize..];
                    let row = &mut out[(t * ci + i0 + i) * panel..][..lanes];
                    // By index: stepping iterators compile to much slower loops.
                    let w = &w[..(lanes - 1) * o_step + 1];
                    for lane in 0..lanes {
                        row[lane] = w[lane * o_step];
                    }
                }
            }
        }
    };
    let size = plan.steps() * panel;
    if out.len() < CHUNK / 4 {
        out.chunks_mut(size.max(1)).enumerate().for_each(|(p, out)| one(p, out));
    } else {
        out.par_chunks_mut(size.max(1)).enumerate().for_each(|(p, out)| one(p, out));
    }
}

/// Copies images `images` of the input, padded rows `row..` of the window, with zeros where they lie outside.
fn pad<T: Vectors>(
    plan: &Plan,
    x: &[T],
    images: std::ops::Range<usize>,
    row: usize,
    window: [usize; 3],
    out: &mut [T],
) {
    let c = plan.groups * plan.ci;
    let mut first = [0; 3];
    first[plan.axis] = row;
    // Positions of the window's lines that lie inside, and where the first of them is in the input.
    let from = plan.low[2].saturating_sub(first[2]).min(window[2]);
    let to = (plan.low[2] + plan.source[2]).saturating_sub(first[2]).clamp(from, window[2]);
    let inside =
        |d: usize, at: usize| (first[d] + at).checked_sub(plan.low[d]).filter(|i| *i < plan.source[d]);
    let mut lines = out.chunks_exact_mut(window[2] * c);
    for image in images {
        let x = &x[image * volume(plan.source) * c..][..volume(plan.source) * c];
        for line in 0..window[0] * window[1] {
            let Some(out) = lines.next() else { return };
            match (inside(0, line / window[1]), inside(1, line % window[1])) {
                (Some(i), Some(j)) if from < to => {
                    let start = flat([i, j, from + first[2] - plan.low[2]], plan.source) * c;
                    out[..from * c].fill(T::zero());
                    out[from * c..to * c].copy_from_slice(&x[start..start + (to - from) * c]);
                    out[to * c..].fill(T::zero());
                }
                _ => out.fill(T::zero()),
            }
        }
    }
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

impl<T: Vectors> Kernel<T> for Task<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(self) {
        let plan = self.plan;
        let (ci, co, panel) = (plan.ci, plan.co, 2 * S::LANES);
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
                    y: self.y,
                    input: 0,
                    channel: 0,
                    lanes: 0,
                };
                let pieces = Pieces::of(total, S::ROWS);
                for i in 0..pieces.count {
                    let m = pieces.len(i);
                    let (mut a, mut y) = ([self.a; 8], [0usize; 8]);
                    for i in 0..m {
                        a[i] = self.a.wrapping_add(walk.a);
                        y[i] = y0 + walk.y;
                        walk.next();
                    }
                    for p in first..(first + together).min(self.panels.end) {
                        let (group, first) = (p / per_group, p % per_group * panel);
                        tile.lanes = panel.min(co - first);
                        tile.input = group * ci;
                        tile.channel = group * co + first;
                        tile.b = self.weights.as_ptr().wrapping_add(p * size + grid.first * ci * panel);
                        tile.bias = self.epilogue.bias.map(|b| b.as_ptr().wrapping_add(tile.channel));
                        let n = if tile.lanes > S::LANES { 2 } else { 1 };
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
    // SAFETY: the caller's promise. With one vector a row the packed rows still are two vectors wide.
    unsafe {
        let mut rows = [a[0]; M];
        for i in 0..M {
            rows[i] = a[i].wrapping_add(t.input);
        }
        let mut acc = along_rows::<S, M, N>(t.runs, rows, t.b, 2 * S::LANES);
        let (low, high) = (S::splat(t.low), S::splat(t.high));
        for j in 0..N {
            let at = j * S::LANES;
            let part = (t.lanes - at).min(S::LANES);
            if let Some(bias) = t.bias {
                let v = load::<S>(bias.add(at), part);
                for i in 0..M {
                    acc[i][j] = S::add(acc[i][j], v);
                }
            }
            for i in 0..M {
                let mut v = acc[i][j];
                if let Some(r) = t.residual {
                    v = S::add(v, load::<S>(r.add(y[i] + t.channel + at), part));
                }
                v = S::min(high, S::max(low, v));
                match part == S::LANES {
                    true => S::store(t.y.add(y[i] + t.channel + at), v),
                    false => S::store_part(t.y.add(y[i] + t.channel + at), v, part),
                }
            }
        }
    }
}

/// # Safety
/// `p` must be valid for `n` elements, at most a vector.
#[inline(always)]
unsafe fn load<S: Simd>(p: *const S::Elem, n: usize) -> S::V {
    // SAFETY: the caller's promise.
    unsafe { if n == S::LANES { S::load(p) } else { S::load_part(p, n) } }
}

fn run<T: Vectors>(
    plan: &Plan,
    forward: bool,
    x: &[T],
    w: &[T],
    epilogue: Epilogue<T>,
    y: &mut [T],
    scratch: &mut [T],
) {
    let panel = T::panel();
    let (weights, slots) = scratch.split_at_mut(plan.packed(panel));
    pack(plan, forward, panel, w, weights);
    let weights: &[T] = weights;
    let d = plan.division(panel);
    let (rows, panels) = (plan.rows(), plan.groups * plan.panels(panel));
    let blocks = [plan.n.div_ceil(d.images), rows.div_ceil(d.rows), panels.div_ceil(d.panels)];
    let c = plan.groups * plan.ci;
    let y = Shared::new(y);
    in_slots(volume(blocks), plan.slot(&d), slots, |task, slot| {
        let [i, r, p] = split(task, blocks);
        let images = i * d.images..plan.n.min((i + 1) * d.images);
        let rows = r * d.rows..rows.min((r + 1) * d.rows);
        let panels = p * d.panels..panels.min((p + 1) * d.panels);
        let row = rows.start * plan.in_step[plan.axis];
        let (a, window) = if plan.copies() {
            let window = plan.window(d.rows);
            pad(plan, x, images.clone(), row, window, slot);
            (slot.as_ptr(), window)
        } else {
            let start = images.start * volume(plan.source) + row * strides(plan.source, 1)[plan.axis];
            (x[start * c..].as_ptr(), plan.source)
        };
        // SAFETY: the slices have the plan's extents (checked by the callers), so all windows of the task's
        // positions lie in `a`; no two tasks write the same elements of `y`.
        unsafe {
            T::dispatch(Task { plan, a, window, weights, panels, images, rows, epilogue, y: y.ptr() });
        }
    });
}

/// Elements of scratch that [`forward`] needs.
pub fn forward_scratch<T: Vectors>(g: &Geometry) -> usize {
    Plan::forward(g).scratch(T::panel())
}

/// `y = clamp(conv(x, w) + bias + residual)` with x (N, spatial…, C) and y (N, spatial…, M), w (M, C/groups, k…).
pub fn forward<T: Vectors>(
    g: &Geometry,
    x: &[T],
    w: &[T],
    epilogue: Epilogue<T>,
    y: &mut [T],
    scratch: &mut [T],
) {
    assert!(
        x.len() == g.n * g.c * volume(g.x) && y.len() == g.n * g.oc * volume(g.y),
        "operands of a convolution"
    );
    run(&Plan::forward(g), true, x, w, epilogue, y, scratch);
}

/// Elements of scratch that [`input_grad`] needs.
pub fn input_grad_scratch<T: Vectors>(g: &Geometry) -> usize {
    Plan::input_grad(g).scratch(T::panel())
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
    assert!(
        dx.len() == g.n * g.c * volume(g.x) && dy.len() == g.n * g.oc * volume(g.y),
        "operands of a convolution"
    );
    run(&Plan::input_grad(g), false, dy, w, epilogue, dx, scratch);
}
