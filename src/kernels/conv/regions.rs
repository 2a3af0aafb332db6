//! Dilated convolutions most of whose taps lie outside of the input: positions whose taps reach it alike are summed by themselves,
//! over those taps alone. So no zero is multiplied, and no input copied to have zeros around it.

use std::ops::Range;

use smallvec::SmallVec;

use super::grids::{Plan, TILE};
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

/// Does that pay? Not for few positions at a time.
pub(super) fn applies(g: &Geometry) -> bool {
    let dilated = (0..3).any(|d| g.k[d] > 1 && g.dilation[d] > 1);
    let regions = || (0..3).map(|d| taps(g, d).alike().count()).product::<usize>();
    dilated
        && !g.pairs
        && g.stride == [1; 3]
        && g.cg().min(g.og()) >= CHANNELS
        && 4 * multiplications(g) <= 3 * volume(g.y) * g.taps()
        && TILE * regions() <= volume(g.y)
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
        type Places = SmallVec<[[usize; 3]; 64]>;
        let mut parts: SmallVec<[(usize, Places); 16]> = SmallVec::new();
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::conv::{split, strides};
    use crate::kernels::layout::Layout;

    /// Of each grid: target and source positions, and the tap; how often each target position begins and ends.
    fn sums(plan: &Plan) -> (Vec<[usize; 3]>, Vec<[usize; 2]>) {
        let (ci, co) = (plan.groups * plan.ci, plan.groups * plan.co);
        let (mut sums, mut written) = (Vec::new(), vec![[0; 2]; volume(plan.target)]);
        let along = |q: [usize; 3], step: [usize; 3]| (0..3).map(|d| q[d] * step[d]).sum::<usize>();
        for grid in &plan.grids {
            for q in 0..volume(grid.extents) {
                let q = split(q, grid.extents);
                let target = (grid.origin + along(q, grid.out_step)) / co;
                written[target][0] += usize::from(grid.begins);
                written[target][1] += usize::from(grid.ends);
                let source = along(q, strides(plan.source, ci));
                let mut tap = grid.first;
                for (offset, len) in &grid.runs {
                    for i in 0..len / plan.ci {
                        let at = source.checked_add_signed(*offset).unwrap() / ci + i;
                        sums.push([target, at, plan.order[tap] as usize]);
                        tap += 1;
                    }
                }
            }
        }
        sums.sort();
        (sums, written)
    }

    #[test]
    fn each_tap_that_reaches_the_input_is_summed_once() {
        for (x, k, dilation, pad, after, groups) in [
            ([1, 28, 28], [1, 3, 3], [1, 24, 24], [0, 24, 24], [0, 24, 24], 1),
            ([1, 12, 9], [1, 3, 2], [1, 7, 6], [0, 9, 2], [0, 4, 5], 2),
            ([5, 8, 6], [2, 3, 1], [3, 5, 1], [3, 7, 0], [1, 5, 0], 1),
        ] {
            let y = std::array::from_fn(|d| x[d] + pad[d] + after[d] - (k[d] - 1) * dilation[d]);
            let g = Geometry {
                layout: Layout::Last,
                n: 1,
                c: 16 * groups,
                oc: 17 * groups,
                groups,
                axis: if x[0] > 1 { 0 } else { 1 },
                x,
                y,
                k,
                stride: [1; 3],
                dilation,
                pad,
                pairs: false,
            };
            assert!(applies(&g), "{g:?}");
            let mut want: Vec<[usize; 3]> = Vec::new();
            for (o, t) in (0..volume(y)).flat_map(|o| (0..volume(k)).map(move |t| (o, t))) {
                let (at, tap) = (split(o, y), split(t, k));
                let i: [usize; 3] =
                    std::array::from_fn(|d| (at[d] + tap[d] * dilation[d]).wrapping_sub(pad[d]));
                if (0..3).all(|d| i[d] < x[d]) {
                    want.push([o, (i[0] * x[1] + i[1]) * x[2] + i[2], t]);
                }
            }
            assert_eq!(want.len(), multiplications(&g));
            let (found, written) = sums(&Plan::forward(&g));
            assert!(found == want && written.iter().all(|w| *w == [1, 1]), "{g:?}");
            want.iter_mut().for_each(|[o, i, _]| std::mem::swap(o, i));
            want.sort();
            let (found, written) = sums(&Plan::input_grad(&g));
            assert!(found == want && written.iter().all(|w| *w == [1, 1]), "{g:?}");
        }
    }
}
