//! Dilated convolutions most of whose taps lie outside of the input: positions whose taps reach it alike are summed by themselves,
//! over those taps alone. So no zero is multiplied, and no input copied to have zeros around it.

use std::ops::Range;

use smallvec::SmallVec;

use super::grids::Plan;
use super::{CHANNELS, Geometry, volume};

/// The taps of a kernel's dimension, ascending in the input: the first reaches `low` positions back.
#[derive(Clone, Copy)]
struct Taps {
    count: usize,
    dilation: usize,
    low: isize,
    source: usize,
    target: usize,
}

impl Taps {
    fn offset(&self, tap: usize) -> isize {
        (tap * self.dilation) as isize - self.low
    }

    /// The positions from which a tap reaches the input.
    fn inside(&self, tap: usize) -> Range<usize> {
        let [offset, target, source] = [self.offset(tap), self.target as isize, self.source as isize];
        let from = (-offset).clamp(0, target);
        from as usize..(source - offset).clamp(from, target) as usize
    }

    /// Positions from which the same taps do, and those taps.
    fn alike(self) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
        let ends = (0..self.count).map(|tap| self.inside(tap)).flat_map(|inside| [inside.start, inside.end]);
        let mut ends: SmallVec<[usize; 16]> = ends.chain([0, self.target]).collect();
        ends.sort_unstable();
        ends.dedup();
        (1..ends.len()).map(move |i| {
            let at = ends[i - 1]..ends[i];
            let reaches = |tap: &usize| self.inside(*tap).contains(&at.start);
            let first = (0..self.count).find(reaches).unwrap_or(0);
            let taps = first..first + (first..self.count).take_while(reaches).count();
            (at, taps)
        })
    }
}

fn taps(g: &Geometry, d: usize) -> Taps {
    let (count, dilation) = (g.k[d], g.dilation[d]);
    Taps { count, dilation, low: g.pad[d] as isize, source: g.x[d], target: g.y[d] }
}

/// The same of the input gradient: the last taps first.
fn taps_back(g: &Geometry, d: usize) -> Taps {
    let taps = taps(g, d);
    let low = ((g.k[d] - 1) * g.dilation[d]) as isize - taps.low;
    Taps { low, source: g.y[d], target: g.x[d], ..taps }
}

/// Multiplications of an image, of one input by one output channel, if none is of a zero around it; the stride is 1.
pub(super) fn multiplications(g: &Geometry) -> usize {
    let each = |d: usize| (0..g.k[d]).map(|tap| taps(g, d).inside(tap).len()).sum::<usize>();
    (0..3).map(each).product()
}

/// Does that pay?
pub(super) fn applies(g: &Geometry) -> bool {
    let dilated = (0..3).any(|d| g.k[d] > 1 && g.dilation[d] > 1);
    dilated
        && !g.pairs
        && g.stride == [1; 3]
        && g.cg().min(g.og()) >= CHANNELS
        && 4 * multiplications(g) <= 3 * volume(g.y) * g.taps()
}

impl Plan {
    pub(super) fn by_regions(self, g: &Geometry) -> Plan {
        self.regions([0, 1, 2].map(|d| taps(g, d)))
    }

    /// See [`by_regions`](Self::by_regions), of the input gradient.
    pub(super) fn by_regions_back(mut self, g: &Geometry) -> Plan {
        self.order = (0..g.taps() as u32).rev().collect();
        self.regions([0, 1, 2].map(|d| taps_back(g, d)))
    }

    fn regions(mut self, taps: [Taps; 3]) -> Plan {
        (self.padded, self.low, self.reach) = (self.source, [0; 3], [0; 3]);
        for (p0, t0) in taps[0].alike() {
            for (p1, t1) in taps[1].alike() {
                for (p2, t2) in taps[2].alike() {
                    let (p, t) = ([p0.clone(), p1.clone(), p2], [t0.clone(), t1.clone(), t2]);
                    self.region(taps, p, t);
                }
            }
        }
        self
    }

    /// One region's grids: of neighbours in the order of the packed weights each.
    fn region(&mut self, taps: [Taps; 3], at: [Range<usize>; 3], reach: [Range<usize>; 3]) {
        let [extents, origin] = [at.clone().map(|at| at.len()), at.map(|at| at.start)];
        let mut parts: SmallVec<[(usize, SmallVec<[[usize; 3]; 64]>); 16]> = SmallVec::new();
        let [t0, t1, t2] = reach;
        for (a, b) in t0.flat_map(|a| t1.clone().map(move |b| (a, b))) {
            let place = |c: usize| {
                let tap = [a, b, c];
                std::array::from_fn(|d| origin[d].wrapping_add_signed(taps[d].offset(tap[d])))
            };
            let first = (a * taps[1].count + b) * taps[2].count + t2.start;
            match parts.last_mut() {
                Some((start, places)) if *start + places.len() == first => {
                    places.extend(t2.clone().map(place));
                }
                _ if t2.is_empty() => {}
                _ => parts.push((first, t2.clone().map(place).collect())),
            }
        }
        if parts.is_empty() {
            parts.push((0, SmallVec::new()));
        }
        let last = parts.len() - 1;
        for (i, (first, places)) in parts.iter().enumerate() {
            self.grid(extents, origin, [1; 3], *first, places);
            if let Some(grid) = self.grids.last_mut() {
                (grid.begins, grid.ends) = (i == 0, i == last);
            }
        }
    }
}
