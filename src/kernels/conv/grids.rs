//! Which positions of a dense convolution sum over which taps, how that is divided into tasks, and the layouts that
//! its tiles read: padded rows of the input.

use std::ops::Range;

use smallvec::SmallVec;

use crate::kernels::conv::{Geometry, regions, split, strides, volume};
use crate::kernels::simd::Vectors;
use crate::kernels::tile::WINDOW;

/// Elements of input and output that a task should keep in the second-level cache.
const CHUNK: usize = 1 << 16;
/// Tasks that are enough to keep the threads of a small machine equally busy.
const TASKS: usize = 16;
/// Positions of a register tile.
pub(super) const TILE: usize = 8;
/// Multiply-adds worth a task of their own.
const WORK: usize = 1 << 19;

/// Output positions `q` that sum over the same taps: at `origin + Σ q·out_step`, from `Σ q·in_step` + each run.
#[derive(Debug, Clone)]
pub(super) struct Grid {
    pub(super) extents: [usize; 3],
    pub(super) origin: usize,
    pub(super) out_step: [usize; 3],
    /// Where its taps begin in the order of the packed weights.
    pub(super) first: usize,
    /// Offsets and lengths of the runs of A.
    pub(super) runs: SmallVec<[(isize, usize); 32]>,
    /// Of several grids of the same positions, the first writes its sums, the others add to them, and the last finishes.
    pub(super) begins: bool,
    pub(super) ends: bool,
}

/// A convolution as this file computes it, forward or gradient.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) n: usize,
    pub(super) groups: usize,
    /// Input channels of a group, or pairs of them, and output channels.
    pub(super) ci: usize,
    pub(super) co: usize,
    /// Input channels of a group, and whether they are taken in pairs.
    pub(super) inputs: usize,
    pub(super) pairs: bool,
    pub(super) axis: usize,
    /// Input extents, those with zeros around, and the zeros before the input.
    pub(super) source: [usize; 3],
    pub(super) padded: [usize; 3],
    pub(super) low: [usize; 3],
    /// Positions the input advances by at each position of a grid, and the furthest tap.
    pub(super) in_step: [usize; 3],
    pub(super) reach: [usize; 3],
    pub(super) target: [usize; 3],
    /// Taps of the kernel, and those that are used in the order of the packed weights.
    pub(super) taps: usize,
    pub(super) order: SmallVec<[u32; 64]>,
    pub(super) grids: SmallVec<[Grid; 4]>,
}

impl Plan {
    pub(super) fn forward(g: &Geometry) -> Plan {
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
            ci: g.terms(g.cg()),
            co: g.og(),
            inputs: g.cg(),
            pairs: g.pairs,
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
        if regions::applies(g) {
            return plan.by_regions(g);
        }
        let taps: SmallVec<[[usize; 3]; 64]> = (0..g.taps())
            .map(|t| {
                let k = split(t, g.k);
                std::array::from_fn(|d| k[d] * g.dilation[d])
            })
            .collect();
        plan.grid(g.y, [0; 3], [1; 3], 0, &taps);
        plan
    }

    /// `dx[q·s + r] = Σ_t W[t]ᵀ · dy[q + (r + pad − d·t) / s]` over the taps for which that is a whole number.
    pub(super) fn input_grad(g: &Geometry) -> Plan {
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
            ci: g.terms(g.og()),
            co: g.cg(),
            inputs: g.og(),
            pairs: g.pairs,
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
        if regions::applies(g) {
            return plan.by_regions_back(g);
        }
        let residues: [usize; 3] = std::array::from_fn(|d| g.stride[d].min(g.x[d]));
        for i in 0..volume(residues) {
            let r = split(i, residues);
            let mut taps: SmallVec<[[usize; 3]; 64]> = SmallVec::new();
            let first = plan.order.len();
            // Last taps first: so they ascend in the input.
            for t in (0..g.taps()).rev() {
                let k = split(t, g.k);
                let o: [Option<isize>; 3] = std::array::from_fn(|d| at(d, r[d], k[d]));
                if let [Some(a), Some(b), Some(c)] = o {
                    let o = [a, b, c];
                    plan.order.push(t as u32);
                    taps.push(std::array::from_fn(|d| (o[d] + low[d] as isize) as usize));
                }
            }
            let extents = std::array::from_fn(|d| (g.x[d] - r[d]).div_ceil(g.stride[d]));
            plan.grid(extents, r, g.stride, first, &taps);
        }
        plan
    }

    /// Adds the grid of positions `origin + q·step`, whose taps read the input at the given padded positions.
    pub(super) fn grid(
        &mut self,
        extents: [usize; 3],
        origin: [usize; 3],
        step: [usize; 3],
        first: usize,
        taps: &[[usize; 3]],
    ) {
        let c = self.groups * self.ci;
        let mut runs: SmallVec<[(isize, usize); 32]> = SmallVec::new();
        for at in taps {
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
            begins: true,
            ends: true,
        });
    }

    /// Is A a copy of the input: does the kernel reach beyond it, or is it taken in pairs?
    pub(super) fn copies(&self) -> bool {
        self.pairs || self.padded != self.source
    }

    /// Rows of a grid along the axis.
    pub(super) fn rows(&self) -> usize {
        self.grids.iter().map(|g| g.extents[self.axis]).max().unwrap_or(0)
    }

    /// Extents of A that `rows` rows of a grid are read from: of the copy, or of the whole input.
    pub(super) fn window(&self, rows: usize) -> [usize; 3] {
        let mut w = self.padded;
        if self.copies() {
            w[self.axis] =
                ((rows - 1) * self.in_step[self.axis] + self.reach[self.axis] + 1).min(w[self.axis]);
        }
        w
    }

    /// Positions of the input that some rows of images are computed from, those between them counted.
    pub(super) fn reads(&self, images: Range<usize>, rows: Range<usize>) -> Range<usize> {
        let d = self.axis;
        reads(self.source, d, [self.low[d], self.in_step[d], self.reach[d]], images, rows)
    }

    /// Do tiles of a grid's positions slide over the input, each element of which is loaded once for all of its neighbours? In pairs,
    /// with one vector of outputs, loads take longer than multiplications.
    #[inline(always)]
    pub(super) fn slides(&self, grid: &Grid, lanes: usize) -> bool {
        self.pairs
            && self.co <= lanes
            && self.in_step[2] == 1
            && grid.extents[2].is_multiple_of(TILE)
            && grid.runs.iter().all(|run| run.1 == WINDOW * self.ci)
    }

    pub(super) fn steps(&self) -> usize {
        self.order.len() * self.ci
    }

    /// Output channels of a panel.
    pub(super) fn panel<T: Vectors>(&self) -> usize {
        T::level().panel(self.co)
    }

    pub(super) fn panels(&self, panel: usize) -> usize {
        self.co.div_ceil(panel)
    }

    /// Elements of a packed row of a panel, all groups' counted: whole vectors.
    pub(super) fn row(&self, panel: usize, p: usize, lanes: usize) -> usize {
        panel.min(self.co - p % self.panels(panel) * panel).next_multiple_of(lanes)
    }

    /// Elements of all packed weights.
    pub(super) fn packed(&self, panel: usize) -> usize {
        self.groups * self.panels(panel) * panel * self.steps()
    }

    /// At least `each` rows of a grid; those of one-dimensional convolutions are positions, and fill whole tiles.
    fn whole(&self, each: usize) -> usize {
        if self.axis == 2 { each.next_multiple_of(TILE).min(self.rows()) } else { each }
    }

    pub(super) fn division(&self, panel: usize) -> Division {
        let rows = self.rows();
        let per_row = (volume(self.padded) / self.padded[self.axis].max(1))
            * self.groups
            * self.ci
            * self.in_step[self.axis].min(self.padded[self.axis])
            + volume(self.target) / rows.max(1) * self.groups * self.co;
        let steps = |grid: &Grid| grid.runs.iter().map(|run| run.1).sum::<usize>();
        let sums = self.grids.iter().map(|grid| volume(grid.extents) * steps(grid)).sum::<usize>();
        let work = sums * self.groups * self.co;
        let tasks = (self.n * work / WORK).clamp(1, TASKS);
        let panels = self.groups * self.panels(panel);
        if tasks > 1 && panels > 1 && self.n * rows * per_row < self.packed(panel) {
            return Division { images: self.n, rows, panels: panels.div_ceil(tasks) };
        }
        // Many weights are read from afar for each task: they had better serve many positions.
        let chunk = (self.packed(panel) / 8).clamp(CHUNK, 4 * CHUNK);
        let (images, rows_each) = if per_row * rows <= chunk || rows == 1 {
            let most = self.n.div_ceil(if chunk > CHUNK { 2 } else { tasks });
            let images = (chunk / (per_row * rows).max(1)).clamp(1, most.max(1));
            let images = self.n.div_ceil(self.n.div_ceil(images));
            let split = tasks.div_ceil(self.n.div_ceil(images)).min(rows);
            (images, if images == 1 { self.whole(rows.div_ceil(split)) } else { rows })
        } else {
            let split = tasks.div_ceil(self.n).min(rows);
            (1, self.whole((chunk / per_row.max(1)).clamp(1, rows.div_ceil(split))))
        };
        let units = self.n.div_ceil(images) * rows.div_ceil(rows_each);
        let groups = tasks.div_ceil(units).clamp(1, panels);
        Division { images, rows: rows_each, panels: panels.div_ceil(groups) }
    }

    /// Tasks along the images, the rows and the panels.
    pub(super) fn blocks(&self, d: &Division, panel: usize) -> [usize; 3] {
        let panels = self.groups * self.panels(panel);
        [self.n.div_ceil(d.images), self.rows().div_ceil(d.rows), panels.div_ceil(d.panels)]
    }

    /// Elements of the padded copy of one task.
    pub(super) fn slot(&self, d: &Division) -> usize {
        if self.copies() { d.images * volume(self.window(d.rows)) * self.groups * self.ci } else { 0 }
    }
}

/// How the work is divided into tasks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Division {
    pub(super) images: usize,
    /// Rows of a grid, along the axis.
    pub(super) rows: usize,
    pub(super) panels: usize,
}

/// The positions, those between them counted, of all of several images, or of the rows along dimension `d` of one from which some
/// rows of results are computed: row `i` from those from `i·step − low` on, up to `reach` further.
pub(super) fn reads(
    source: [usize; 3],
    d: usize,
    [low, step, reach]: [usize; 3],
    images: Range<usize>,
    rows: Range<usize>,
) -> Range<usize> {
    let all = volume(source);
    if images.len() != 1 {
        return images.start * all..images.end * all;
    }
    let row = all / source[d].max(1);
    let inside = |i: usize| i.saturating_sub(low).min(source[d]);
    let last = inside((rows.end.max(1) - 1) * step + reach + 1);
    let first = inside(rows.start * step).min(last);
    images.start * all + first * row..images.start * all + last * row
}

fn flat(at: [usize; 3], extents: [usize; 3]) -> usize {
    (at[0] * extents[1] + at[1]) * extents[2] + at[2]
}

/// Images with zeros around, or the part of them from some padded position on: line by line.
pub(super) struct Lines {
    source: [usize; 3],
    /// Zeros before the input.
    low: [usize; 3],
    images: Range<usize>,
    /// The padded position that is the first, and the extents of the part.
    first: [usize; 3],
    window: [usize; 3],
    /// Positions of a line that lie inside.
    from: usize,
    to: usize,
}

impl Lines {
    #[inline(always)]
    pub(super) fn new(
        source: [usize; 3],
        low: [usize; 3],
        images: Range<usize>,
        first: [usize; 3],
        window: [usize; 3],
    ) -> Self {
        let from = low[2].saturating_sub(first[2]).min(window[2]);
        let to = (low[2] + source[2]).saturating_sub(first[2]).clamp(from, window[2]);
        Lines { source, low, images, first, window, from, to }
    }

    /// The copy that a task makes of the input, padded rows `row..`.
    #[inline(always)]
    pub(super) fn of(plan: &Plan, images: Range<usize>, row: usize, window: [usize; 3]) -> Self {
        let mut first = [0; 3];
        first[plan.axis] = row;
        Lines::new(plan.source, plan.low, images, first, window)
    }

    #[inline(always)]
    pub(super) fn count(&self) -> usize {
        self.images.len() * self.window[0] * self.window[1]
    }

    /// Of a line: the input's first position in it, its place in the line, and how many there are.
    #[inline(always)]
    pub(super) fn line(&self, nth: usize) -> [usize; 3] {
        let (low, source, window) = (self.low, self.source, self.window);
        let image = self.images.start + nth / (window[0] * window[1]);
        // (Beyond the input where it would be before it.)
        let i = (self.first[0] + nth / window[1] % window[0]).wrapping_sub(low[0]);
        let j = (self.first[1] + nth % window[1]).wrapping_sub(low[1]);
        if i >= source[0] || j >= source[1] || self.from == self.to {
            return [0; 3];
        }
        let at = [i, j, self.from + self.first[2] - low[2]];
        [image * volume(source) + flat(at, source), self.from, self.to - self.from]
    }
}

/// Copies images `images` of the input, padded rows `row..` of the window, with zeros where they lie outside.
pub(super) fn pad<T: Vectors>(
    plan: &Plan,
    x: &[T],
    images: Range<usize>,
    row: usize,
    window: [usize; 3],
    out: &mut [T],
) {
    let c = plan.groups * plan.ci;
    let lines = Lines::of(plan, images, row, window);
    let out = out.chunks_exact_mut((window[2] * c).max(1));
    for (nth, out) in out.take(lines.count()).enumerate() {
        let [position, at, n] = lines.line(nth);
        let (at, n) = (at * c, n * c);
        out[..at].fill(T::zero());
        out[at..at + n].copy_from_slice(&x[position * c..][..n]);
        out[at + n..].fill(T::zero());
    }
}
