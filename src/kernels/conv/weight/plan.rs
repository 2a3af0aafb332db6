//! The sum of a weight gradient: which positions it is over, and how it is divided into tasks, by the sizes alone.

use std::ops::Range;

use crate::kernels::conv::{Geometry, grids, volume};
use crate::kernels::simd::Vectors;
use crate::kernels::tile::Pieces;

/// Elements of X and dY that a task should sweep over at a time, for the second-level cache; more of them where the
/// sums, which are swept over each time, are large themselves.
const CHUNK: usize = 1 << 16;
const LARGE_CHUNK: usize = 1 << 18;
/// Elements of all slabs' sums together, beyond which the outputs are divided instead of the positions.
pub(super) const SUMS: usize = 1 << 19;
pub(super) const TASKS: usize = 8;
/// Elements of dW from which on its operands are packed, or it is one product.
pub(super) const LARGE: usize = 1 << 16;
/// Positions worth a sum of their own, where that is large.
const POSITIONS: usize = 128;
/// Multiply-adds worth a task of their own.
const WORK: usize = 1 << 19;
/// Input channels below which taps are merged.
const FEW: usize = 8;

/// The sum as it is computed: X perhaps padded, a kernel row's taps perhaps merged.
pub(super) struct Plan {
    /// Images, or pairs of them.
    pub(super) n: usize,
    pub(super) pairs: bool,
    pub(super) groups: usize,
    /// Rows and columns of dW a group and tap.
    pub(super) m: usize,
    pub(super) og: usize,
    pub(super) k: [usize; 3],
    pub(super) dilation: [usize; 3],
    pub(super) stride: [usize; 3],
    pub(super) pad: [usize; 3],
    /// Extents of X, elements a position, and between positions that follow each other in the sum.
    pub(super) x: [usize; 3],
    pub(super) c: usize,
    pub(super) y: [usize; 3],
    pub(super) axis: usize,
    pub(super) merged: bool,
}

/// How the work is divided: slabs of positions, chunks within them, pieces of the outputs.
pub(super) struct Division {
    pub(super) slabs: usize,
    /// Images a chunk, or rows along the axis of one image.
    pub(super) images: usize,
    pub(super) rows: usize,
    /// Pieces of the rows of dW and of its panels of columns.
    pub(super) pieces: usize,
    pub(super) panels: usize,
}

impl Plan {
    pub(super) fn new(g: &Geometry) -> Plan {
        let merged = g.groups == 1 && g.c < FEW && g.dilation[2] == 1 && g.k[2] > 1;
        let mut p = Plan {
            n: g.terms(g.n),
            pairs: g.pairs,
            groups: g.groups,
            m: g.cg(),
            og: g.og(),
            k: g.k,
            dilation: g.dilation,
            stride: g.stride,
            pad: g.pad,
            x: g.x,
            c: g.c,
            y: g.y,
            axis: g.axis,
            merged,
        };
        if merged {
            p.m = g.k[2] * g.c;
            p.k[2] = 1;
            p.x = std::array::from_fn(|d| {
                let last = (g.y[d] - 1) * g.stride[d] + (g.k[d] - 1) * g.dilation[d] + 1;
                last.max(g.x[d] + g.pad[d])
            });
            p.pad = [0; 3];
        }
        p
    }

    pub(super) fn taps(&self) -> usize {
        volume(self.k)
    }

    /// Output channels of a panel.
    pub(super) fn panel<T: Vectors>(&self) -> usize {
        T::level().panel(self.og)
    }

    /// Panels of output channels.
    pub(super) fn panels(&self, panel: usize) -> usize {
        self.groups * self.og.div_ceil(panel)
    }

    /// Elements of one sum: (panels, taps, rows, panel).
    pub(super) fn size(&self, panel: usize) -> usize {
        self.panels(panel) * panel * self.taps() * self.m
    }

    /// The positions of X that the taps of some rows along the axis read, or all of several images.
    pub(super) fn reach(&self, image: usize, images: usize, first: usize, rows: usize) -> Range<usize> {
        let d = self.axis;
        let rows = first..(first + rows).min(self.y[d]);
        let steps = [self.pad[d], self.stride[d], (self.k[d] - 1) * self.dilation[d]];
        grids::reads(self.x, d, steps, image..image + images, rows)
    }

    /// Elements of X that a chunk reads at most.
    pub(super) fn reach_room(&self, division: &Division) -> usize {
        let (d, all) = (self.axis, volume(self.x));
        let rows = (division.rows - 1) * self.stride[d] + (self.k[d] - 1) * self.dilation[d] + 1;
        self.c
            * match division.images {
                1 => rows.min(self.x[d]) * (all / self.x[d]),
                images => images * all,
            }
    }

    pub(super) fn tasks(&self, d: &Division, panel: usize) -> usize {
        d.slabs * self.panels(panel).div_ceil(d.panels) * d.pieces
    }

    /// Elements of the padded copy of X.
    pub(super) fn copy(&self) -> usize {
        if self.merged { self.n * volume(self.x) * self.c } else { 0 }
    }

    /// Are X and dY worth packing? Each strip of them is used for many others where dW is large, and positions far
    /// apart compete for the same cache lines. Merged taps of neighbouring positions overlap.
    pub(super) fn packs(&self, panel: usize) -> bool {
        let separate = self.groups == 1 && !self.merged && !self.pairs;
        separate && self.size(panel) >= LARGE && self.division(panel).slabs == 1
    }

    /// The strips of X and of dY, and the elements that they take packed.
    pub(super) fn strips<T: Vectors>(&self) -> [(Pieces, usize); 2] {
        let panel = self.panel::<T>();
        let height = T::level().rows(panel);
        let rows = Pieces::of(self.m, height);
        let columns = Pieces::by(self.og, panel);
        [
            (rows, rows.count * self.n * volume(self.x) * height),
            (columns, columns.count * self.n * volume(self.y) * panel),
        ]
    }

    pub(super) fn division(&self, panel: usize) -> Division {
        let rows = self.y[self.axis];
        let per_row = volume(self.x) * self.c / self.x[self.axis] * self.stride[self.axis]
            + volume(self.y) / rows * self.groups * self.og;
        let chunk = (self.size(panel) / 2).clamp(CHUNK, LARGE_CHUNK);
        let (images, chunk) = match per_row * rows {
            all if all <= chunk => ((chunk / all.max(1)).clamp(1, self.n), rows),
            _ => (1, (chunk / per_row.max(1)).clamp(1, rows)),
        };
        let chunks = self.n.div_ceil(images) * rows.div_ceil(chunk);
        let tasks = (self.n * volume(self.y) * self.size(panel) / WORK).clamp(1, TASKS);
        let positions = self.n * volume(self.y);
        let most = match self.taps() == 1 && self.size(panel) >= LARGE / 4 {
            true => positions.div_ceil(POSITIONS),
            false => positions,
        };
        let slabs = (SUMS / self.size(panel).max(1)).clamp(1, tasks.min(self.n * rows)).min(most);
        // Smaller chunks rather than fewer slabs.
        let (images, chunk) = match slabs <= chunks {
            true => (images, chunk),
            false if slabs <= self.n => (self.n / slabs, rows),
            false => (1, (rows / slabs.div_ceil(self.n)).max(1)),
        };
        let groups_panels = self.panels(panel);
        let panels = tasks.div_ceil(slabs).min(groups_panels);
        let pieces = tasks.div_ceil(slabs * panels).min(self.taps());
        Division { slabs, images, rows: chunk, pieces, panels: groups_panels.div_ceil(panels) }
    }

    /// First image, images and first row of a chunk.
    pub(super) fn chunk(&self, d: &Division, chunk: usize) -> [usize; 3] {
        let row_blocks = self.y[self.axis].div_ceil(d.rows);
        let image = chunk / row_blocks * d.images;
        [image, d.images.min(self.n - image), chunk % row_blocks * d.rows]
    }
}
