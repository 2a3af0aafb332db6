//! Dense and grouped convolution and its input gradient, channels last, without patches in memory.
//!
//! Both are the same loop nest. Output positions that sum over the same kernel taps form a [`Grid`] (one grid for
//! the forward pass, one for each residue of the stride for the gradient). A register tile holds several positions
//! by a few vectors of output channels; its rows of A are read where they lie in the input, or, where the kernel
//! reaches beyond the edge, in a zero-padded copy of the few rows that a task needs. Taps that are neighbours in
//! memory form one run of the summed dimension. In pairs of bfloat16, the input is always copied, rounded.
#![allow(unsafe_code, clippy::needless_range_loop)]

use std::ops::Range;

use smallvec::SmallVec;

use crate::kernels::ahead::{Ahead, Steps};
use crate::kernels::conv::grids::{Grid, Plan, TILE};
use crate::kernels::conv::load::{Load, Operand};
use crate::kernels::conv::panels::Unpacked;
use crate::kernels::conv::results::{Results, SharedResults, To, put_tile};
use crate::kernels::conv::way::{Packed, Packs, Way, line};
use crate::kernels::conv::{Done, Epilogue, Geometry, Residual, folded, pointwise, split, strides, volume};
use crate::kernels::elementwise::Clamp;
use crate::kernels::half::{Elements, ElementsMut};
use crate::kernels::par::{Shared, in_prepared_slots};
use crate::kernels::simd::{Level, Simd, Vectors};
use crate::kernels::tile::{Pieces, TermKernel, Terms, along_rows, slide};
use crate::tile_sizes;

/// Elements of packed weights that stay near while all of them are used for each tile.
const NEAR: usize = 1 << 14;
/// Elements of a panel of them that stay in the second-level cache while all positions pass by.
const PASS: usize = 1 << 17;

fn scaled(a: [usize; 3], b: [usize; 3]) -> [usize; 3] {
    [a[0] * b[0], a[1] * b[1], a[2] * b[2]]
}

/// What a task computes: some panels of the outputs of some images and rows.
pub(super) struct Task<'a, E, T> {
    pub(super) plan: &'a Plan,
    /// A at the first image and row of the task, extents of one image of it.
    pub(super) a: *const E,
    window: [usize; 3],
    /// Packed, from the first panel on; those of the task's panels are there.
    pub(super) weights: *const E,
    pub(super) panels: Range<usize>,
    images: Range<usize>,
    rows: Range<usize>,
    pub(super) epilogue: Epilogue<'a, T>,
    pub(super) y: To<T>,
    /// What is fetched meanwhile.
    pub(super) ahead: Ahead,
    /// Results go to memory that is far, in short runs unless a panel has all channels.
    far: bool,
}

/// Walks over the positions of a grid in order.
pub(super) struct Walk {
    /// Of the task's rows.
    pub(super) extents: [usize; 3],
    at: [usize; 3],
    pub(super) a_step: [usize; 3],
    pub(super) y_step: [usize; 3],
    a_image: usize,
    y_image: usize,
    image: usize,
    /// Where the position begins in A and in the results.
    pub(super) a: usize,
    pub(super) y: usize,
}

impl Walk {
    #[inline(always)]
    pub(super) fn next(&mut self) {
        self.at[2] += 1;
        self.a += self.a_step[2];
        self.y += self.y_step[2];
        if self.at[2] == self.extents[2] {
            self.next_line();
        }
    }

    /// To the beginning of the next line.
    pub(super) fn next_line(&mut self) {
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

impl<E: Copy, T: Vectors> Task<'_, E, T> {
    /// The grids whose results are not there already.
    pub(super) fn grids(&self) -> impl Iterator<Item = &Grid> {
        let leaves = self.epilogue.leaves();
        self.plan.grids.iter().filter(move |grid| !leaves || !grid.runs.is_empty())
    }

    /// A walk over the task's positions of a grid, and where the first result is.
    pub(super) fn walk(&self, grid: &Grid) -> (Walk, usize) {
        let (plan, c) = (self.plan, self.plan.groups * self.plan.ci);
        let mut extents = grid.extents;
        let rows = self.rows.start.min(extents[plan.axis])..self.rows.end.min(extents[plan.axis]);
        extents[plan.axis] = rows.len();
        let walk = Walk {
            extents,
            at: [0; 3],
            a_step: scaled(plan.in_step, strides(self.window, c)),
            y_step: grid.out_step,
            a_image: volume(self.window) * c,
            y_image: volume(plan.target) * plan.groups * plan.co,
            image: 0,
            a: 0,
            y: 0,
        };
        let y0 = self.images.start * walk.y_image + grid.origin + rows.start * grid.out_step[plan.axis];
        (walk, y0)
    }

    /// Panels that are used together. Few weights stay in the near cache: all panels for a tile of positions, so that results are
    /// written in order. Many: a panel at a time for all positions.
    pub(super) fn together(&self, panel: usize) -> usize {
        let few = self.panels.len() * self.plan.steps() * panel <= NEAR;
        if few { self.panels.len().max(1) } else { 1 }
    }

    pub(super) fn images(&self) -> usize {
        self.images.len()
    }

    /// The next tiles of `m` positions, at most so many: those of one line, or one that goes over its end.
    #[inline(always)]
    fn places(&self, walk: &mut Walk, y0: usize, m: usize, most: usize) -> Places<E> {
        let step = [m * walk.a_step[2], m * walk.y_step[2]];
        let mut places = Places { a: [self.a; 8], y: [0; 8], tiles: 1, step };
        let left = walk.extents[2] - walk.at[2];
        if m <= left {
            places.tiles = if left < 2 * m { 1 } else { most.min(left / m) };
            for i in 0..8 {
                places.a[i] = self.a.wrapping_add(walk.a + i * walk.a_step[2]);
                places.y[i] = y0 + walk.y + i * walk.y_step[2];
            }
            walk.at[2] += places.tiles * m;
            walk.a += places.tiles * step[0];
            walk.y += places.tiles * step[1];
            if walk.at[2] == walk.extents[2] {
                walk.next_line();
            }
            return places;
        }
        for i in 0..m {
            places.a[i] = self.a.wrapping_add(walk.a);
            places.y[i] = y0 + walk.y;
            walk.next();
        }
        places
    }
}

/// Where the positions of tiles begin in A and in the results: those of the first one, and how far it is to the next.
struct Places<E> {
    a: [*const E; 8],
    y: [usize; 8],
    tiles: usize,
    step: [usize; 2],
}

impl<E: Copy, T: Vectors> TermKernel<E, T> for Task<'_, E, T> {
    /// # Safety
    /// The task's positions and weights must lie inside the plan's, and the processor have `D`'s instructions.
    #[inline(always)]
    unsafe fn run<D: Terms<Term = E, S: Simd<Elem = T>>>(self) {
        let panel = Level::of::<D::S>().panel(self.plan.co);
        let together = self.together(panel);
        let times = self.panels.len().div_ceil(together);
        for (time, first) in self.panels.clone().step_by(together).enumerate() {
            let panels = first..(first + together).min(self.panels.end);
            // What is fetched meanwhile is so once.
            let mut share = Some((time, times));
            for grid in self.grids() {
                let steps: usize = grid.runs.iter().map(|run| run.1).sum();
                // (Rounded results cannot be added to.)
                let passes = match self.y {
                    To::Whole(_) if !self.plan.slides(grid, D::S::LANES) => {
                        (steps * panel).div_ceil(PASS).max(1)
                    }
                    _ => 1,
                };
                for i in 0..passes {
                    let some_steps = steps * i / passes..steps * (i + 1) / passes;
                    let mut epilogue = self.epilogue;
                    if i > 0 || !grid.begins {
                        (epilogue.bias, epilogue.residual) = (None, Residual::InOutput);
                    }
                    if i + 1 < passes || !grid.ends {
                        epilogue.clamp = Clamp::NONE.to();
                    }
                    let some;
                    let runs = match passes {
                        1 => &grid.runs[..],
                        _ => {
                            some = part(&grid.runs, some_steps.clone());
                            &some[..]
                        }
                    };
                    let part = Part {
                        grid,
                        runs,
                        before: some_steps.start,
                        panels: panels.clone(),
                        share: share.take(),
                    };
                    // SAFETY: the caller's promise.
                    unsafe { self.pass::<D>(part, &epilogue) }
                }
            }
        }
    }
}

/// What runs have of steps of their sum.
fn part(runs: &[(isize, usize)], steps: Range<usize>) -> SmallVec<[(isize, usize); 32]> {
    let (mut found, mut at) = (SmallVec::new(), 0);
    for &(offset, count) in runs {
        let (from, to) = (steps.start.max(at), steps.end.min(at + count));
        if from < to {
            found.push((offset + (from - at) as isize, to - from));
        }
        at += count;
    }
    found
}

/// Some runs of a grid's positions, from step `before` of their sum on, by some panels.
struct Part<'a> {
    grid: &'a Grid,
    runs: &'a [(isize, usize)],
    before: usize,
    panels: Range<usize>,
    /// Which of how many shares of what is fetched meanwhile, if any.
    share: Option<(usize, usize)>,
}

impl<E: Copy, T: Vectors> Task<'_, E, T> {
    /// # Safety
    /// As of [`run`](TermKernel::run).
    #[inline(always)]
    unsafe fn pass<D: Terms<Term = E, S: Simd<Elem = T>>>(&self, part: Part, epilogue: &Epilogue<T>) {
        let (plan, lanes, grid) = (self.plan, D::S::LANES, part.grid);
        let (co, panel) = (plan.co, Level::of::<D::S>().panel(plan.co));
        let (size, per_group, wide) = (plan.steps() * panel, plan.panels(panel), co / panel);
        let (mut walk, y0) = self.walk(grid);
        let total = self.images.len() * volume(walk.extents);
        let pieces = Pieces::of(total, Level::of::<D::S>().rows(panel));
        let ahead = match part.share {
            Some((nth, of)) => self.ahead.in_steps(pieces.count * of).after(nth * pieces.count),
            None => Steps::NOTHING,
        };
        // The first panel's group, and its place in that: without a division for each tile.
        let start = (part.panels.start / per_group, part.panels.start % per_group);
        // Of so many panels, those of one group that are equally wide: all but perhaps its last one.
        let stretch =
            |in_group: usize, left: usize| if in_group < wide { left.min(wide - in_group) } else { 1 };
        let alike = stretch(start.1, part.panels.len()) == part.panels.len();
        let (slides, mut to) = (plan.slides(grid, lanes).then_some(plan.ci), Results::new(epilogue, self.y));
        let mut i = 0;
        while i < pieces.count {
            let m = pieces.len(i);
            // All panels for a tile before the next one.
            let places = self.places(&mut walk, y0, m, if alike { pieces.alike(i) } else { 1 });
            let (mut p, (mut group, mut in_group)) = (part.panels.start, start);
            while p < part.panels.end {
                let panels = stretch(in_group, part.panels.end - p);
                let channel = in_group * panel;
                let wide = panel.min(co - channel);
                let row = wide.next_multiple_of(lanes);
                to.set(epilogue, group * co + channel, wide);
                let tiles = Tiles {
                    places: &places,
                    runs: part.runs,
                    slides,
                    b: self.weights.wrapping_add(p * size + (grid.first * plan.ci + part.before) * row),
                    b_panel: size,
                    panels,
                    input: group * plan.ci,
                    to,
                    next: (self.far && plan.groups * co > panel).then(|| self.y.bytes(places.step[1])),
                    ahead: if p == part.panels.start { ahead.after(i) } else { Steps::NOTHING },
                };
                // SAFETY: the walk stays inside the task's rows, whose windows A holds; see `tiles_run`.
                unsafe { tile_sizes!(m, row / lanes, D, tiles_run(&tiles)) }
                (p, in_group) = (p + panels, in_group + panels);
                if in_group == per_group {
                    (group, in_group) = (group + 1, 0);
                }
            }
            i += places.tiles;
        }
    }
}

/// Tiles, each by some panels of a group that are equally wide.
struct Tiles<'a, E, T> {
    places: &'a Places<E>,
    runs: &'a [(isize, usize)],
    /// See [`Plan::slides`]: elements from a position to the next.
    slides: Option<usize>,
    /// The first panel, from one to the next, and their number.
    b: *const E,
    b_panel: usize,
    panels: usize,
    /// The group's first input channel.
    input: usize,
    /// Of the first panel.
    to: Results<T>,
    /// If results go to memory that is far, in short runs: where those of the tiles that follow lie, and their size's logarithm.
    next: Option<(*const u8, u32)>,
    /// What is fetched at each tile.
    ahead: Steps,
}

/// Tiles of `M` positions by `N` vectors. (What is decided for all of them would take a quarter of a short sum's time if it were for
/// each.)
///
/// # Safety
/// A must be readable at all runs, Y writable (and the residual readable) at each position for the panels' channels.
#[inline(always)]
unsafe fn tiles_run<D: Terms, const M: usize, const N: usize>(t: &Tiles<D::Term, <D::S as Simd>::Elem>) {
    let (places, mut ahead) = (t.places, t.ahead);
    let (mut rows, mut y) = ([places.a[0]; M], [0; M]);
    for i in 0..M {
        (rows[i], y[i]) = (places.a[i].wrapping_add(t.input), places.y[i]);
    }
    for _ in 0..places.tiles {
        let (mut to, mut b) = (t.to, t.b);
        // SAFETY: the caller's promise.
        unsafe {
            ahead.fetch::<D::S>();
            for _ in 0..t.panels {
                // What the next tile will write is fetched meanwhile: it lies in short runs, far apart.
                if let Some((first, shift)) = t.next {
                    for i in 0..M {
                        for at in (0..N * D::S::LANES).step_by(D::S::LINE) {
                            let at = y[i] + to.channel + at;
                            D::S::prefetch(first.wrapping_add(at << shift).cast());
                        }
                    }
                }
                let acc = match t.slides {
                    Some(step) if M == TILE && N == 1 => {
                        let mut acc = [[D::S::splat(num_traits::zero()); N]; M];
                        let sums = slide::<D, M>(t.runs, rows[0], step, b);
                        for i in 0..M {
                            acc[i][0] = sums[i];
                        }
                        acc
                    }
                    _ => along_rows::<D, M, N>(t.runs, rows, b, N * D::S::LANES),
                };
                put_tile::<D, M, N>(&to, acc, &y);
                to.advance();
                b = b.wrapping_add(t.b_panel);
            }
        }
        for i in 0..M {
            rows[i] = rows[i].wrapping_add(places.step[0]);
            y[i] += places.step[1];
        }
    }
}

/// `result = clamp(W·a + bias + residual)` of some rows of a pointwise plan of one image, its weights packed; `ahead` is fetched
/// meanwhile, and the results' places, if they are `far`.
pub(super) fn positions<E: Packs<T>, T: Vectors>(
    plan: &Plan,
    a: &[E],
    weights: &[E],
    epilogue: Epilogue<T>,
    (y, far): (&mut [T], bool),
    ahead: Ahead,
) {
    let per_row = volume(plan.source) / plan.source[plan.axis].max(1);
    let rows = a.len() / (per_row * plan.ci).max(1);
    let mut window = plan.source;
    window[plan.axis] = rows;
    let [grid] = &plan.grids[..] else { unreachable!("a pointwise plan has one grid") };
    assert!(plan.n == 1 && plan.groups == 1 && plan.taps == 1 && plan.source == grid.extents);
    assert!(rows <= plan.source[plan.axis]);
    let panel = plan.panel::<T>();
    let last = rows.saturating_sub(1) * grid.out_step[plan.axis] + per_row * plan.co;
    assert!((rows == 0 || y.len() >= last) && weights.len() == plan.packed(panel), "positions");
    let panels = 0..plan.panels(panel);
    let task = Task {
        plan,
        a: a.as_ptr(),
        window,
        weights: weights.as_ptr(),
        panels,
        images: 0..1,
        rows: 0..rows,
        epilogue,
        y: To::Whole(y.as_mut_ptr()),
        ahead,
        far,
    };
    // SAFETY: each of these positions has its elements in `a` and `y`.
    unsafe { E::compute(task) }
}

#[allow(clippy::too_many_arguments)]
fn run<T: Vectors>(
    plan: &Plan,
    forward: bool,
    x: Operand<T>,
    w: &[T],
    epilogue: Epilogue<T>,
    y: Option<ElementsMut<T>>,
    scratch: &mut [T],
    done: Option<&Done<T>>,
) {
    match plan.pairs {
        false => run_form::<T, T>(plan, forward, x, w, epilogue, y, scratch, done),
        true => run_form::<u32, T>(plan, forward, x, w, epilogue, y, scratch, done),
    }
}

#[allow(clippy::too_many_arguments)]
fn run_form<E: Packs<T>, T: Vectors>(
    plan: &Plan,
    forward: bool,
    x: Operand<T>,
    w: &[T],
    epilogue: Epilogue<T>,
    y: Option<ElementsMut<T>>,
    scratch: &mut [T],
    done: Option<&Done<T>>,
) {
    let way = Way::new::<E, T>(plan, x.is_plain(), y.is_some());
    let (panel, d, blocks) = (plan.panel::<T>(), way.d, way.blocks);
    let of = Unpacked { plan, forward, panel, w };
    let (weights, slots) = scratch.split_at_mut(way.shared);
    let weights = E::room(weights);
    if way.packed == Packed::Once {
        E::pack(&of, weights, slots);
    }
    let weights = Shared::new(weights);
    let (rows, panels, size) = (plan.rows(), plan.groups * plan.panels(panel), plan.steps() * panel);
    let line = line(plan);
    let y = y.map(SharedResults::new);
    let tasks = volume(blocks);
    // Of a task: panels, images and rows. Neighbouring tasks, which a core computes one after the other, read the same weights.
    let at = |task: usize| split(task, [blocks[2], blocks[0], blocks[1]]);
    let part = |task: usize| {
        let [_, i, r] = at(task);
        (i * d.images..plan.n.min((i + 1) * d.images), r * d.rows..rows.min((r + 1) * d.rows))
    };
    // Weights of some panels.
    let pack = |panels: Range<usize>, weights: *mut E, near: &mut [T]| {
        for p in panels {
            // SAFETY: the panel's own, or the slot's.
            let out = unsafe { std::slice::from_raw_parts_mut(weights.add(p * size), size) };
            E::pack_panel(&of, p, out, near);
        }
    };
    let prepare = |slot: &mut [T]| {
        if way.packed == Packed::InSlots {
            let (own, slot) = slot.split_at_mut(way.slot[0]);
            pack(0..panels, E::room(own).as_mut_ptr(), &mut slot[..way.slot[1]]);
        }
    };
    in_prepared_slots(tasks, way.room(), slots, prepare, |task, slot| {
        let [p, i, r] = at(task);
        let (images, rows) = part(task);
        let ahead = match task + 1 < tasks {
            true => {
                let (images, rows) = part(task + 1);
                x.ahead(plan.reads(images, rows))
            }
            false => Ahead::NOTHING,
        };
        let panels = p * d.panels..panels.min((p + 1) * d.panels);
        // Rows of one image, or whole images.
        let first = (images.start * plan.rows() + rows.start) * line;
        let count = images.len() * rows.len() * line;
        let (own, slot) = slot.split_at_mut(way.slot[0]);
        let (near, slot) = slot.split_at_mut(way.slot[1]);
        let (results, slot) = slot.split_at_mut(way.slot[2]);
        let weights = match way.packed {
            Packed::InSlots => E::room(own).as_mut_ptr(),
            _ => weights.ptr(),
        };
        if way.packed == Packed::InTasks {
            pack(panels.clone(), weights, near);
        }
        let (a, window) = E::source(plan, &d, &x, images.clone(), rows.clone(), slot);
        let y = y.as_ref().map(SharedResults::to);
        let y = y.unwrap_or(To::Whole(results.as_mut_ptr().wrapping_sub(first)));
        // SAFETY: the slices have the plan's extents (checked by the callers), so all windows of the task's
        // positions lie in `a`; no two tasks write the same elements of `y`, unless it is memory of their own.
        unsafe {
            E::compute(Task { plan, a, window, weights, panels, images, rows, epilogue, y, ahead, far: true })
        }
        if let Some(done) = done {
            // SAFETY: with all panels in one task, this one has written all of these results, and it alone.
            done(i * blocks[1] + r, first, unsafe {
                std::slice::from_raw_parts(y.whole().wrapping_add(first), count)
            });
        }
    });
}

/// The forward pass; of a pointwise convolution all images' positions in a row.
fn forward_plan(g: &Geometry) -> Plan {
    match (pointwise::applies(g), folded::of(g)) {
        (true, _) => Plan::forward(&pointwise::of(g, g.n * volume(g.x))),
        (_, Some(folded)) => Plan::forward(&folded),
        _ => Plan::forward(g),
    }
}

/// Elements of scratch that [`forward`] needs; `plain`: is X? `kept`: have results a place?
pub fn forward_scratch<T: Vectors>(g: &Geometry, plain: bool, kept: bool) -> usize {
    scratch::<T>(&forward_plan(g), plain, kept)
        + folded::of(g).map_or(0, |folded| folded::weights_room(&folded))
}

fn scratch<T: Vectors>(plan: &Plan, plain: bool, kept: bool) -> usize {
    match plan.pairs {
        false => Way::new::<T, T>(plan, plain, kept).scratch(),
        true => Way::new::<u32, T>(plan, plain, kept).scratch(),
    }
}

/// Blocks of whole positions in which [`forward`] computes, if it does so.
pub fn forward_blocks<T: Vectors>(g: &Geometry) -> Option<usize> {
    let plan = forward_plan(g);
    let panel = plan.panel::<T>();
    let [images, rows, panels] = plan.blocks(&plan.division(panel), panel);
    // (Rows of several grids are not neighbours.)
    (panels == 1 && plan.grids.len() == 1).then_some(images * rows)
}

/// `y = clamp(conv(x, w) + bias + residual)` with x (N, spatial…, C) and y (N, spatial…, M), w (M, C/groups, k…); see [`Done`] for
/// results without a place.
pub fn forward<T: Vectors>(
    g: &Geometry,
    x: Operand<T>,
    w: &[T],
    epilogue: Epilogue<T>,
    y: Option<&mut [T]>,
    scratch: &mut [T],
    done: Option<&Done<T>>,
) {
    g.check_sizes(x.data.len(), y.as_ref().map_or(g.outputs(), |y| y.len()));
    let rounded = g.pairs && matches!(x.load, Load::Plain);
    assert!(x.is_plain() || rounded || pointwise::applies(g), "an input that is computed as it is read");
    let (plan, done) = (forward_plan(g), done.filter(|_| forward_blocks::<T>(g).is_some()));
    assert!(y.is_some() || done.is_some(), "results without a place");
    let y = y.map(ElementsMut::Whole);
    let Some(folded) = folded::of(g) else {
        return run(&plan, true, x, w, epilogue, y, scratch, done);
    };
    let (weights, scratch) = scratch.split_at_mut(folded::weights_room(&folded));
    folded::weights(g, &folded, w, weights);
    run(&plan, true, Operand { channels: folded.c, ..x }, weights, epilogue, y, scratch, done);
}

/// Elements of scratch that [`input_grad`] needs; `half`: is dY of half precision?
pub fn input_grad_scratch<T: Vectors>(g: &Geometry, half: bool) -> usize {
    scratch::<T>(&input_grad_plan(g), !half, true)
}

fn input_grad_plan(g: &Geometry) -> Plan {
    match pointwise::applies(g) {
        true => Plan::input_grad(&pointwise::of(g, g.n * volume(g.x))),
        false => Plan::input_grad(g),
    }
}

/// `dx = addend + Σ_t W[t]ᵀ·dy[…]`; without a residual in the epilogue, nothing is added.
pub fn input_grad<T: Vectors>(
    g: &Geometry,
    dy: Elements<T>,
    w: &[T],
    epilogue: Epilogue<T>,
    dx: ElementsMut<T>,
    scratch: &mut [T],
) {
    g.check_sizes(dx.len(), dy.len());
    let dy = Operand { data: dy, channels: g.oc, load: Load::Plain };
    run(&input_grad_plan(g), false, dy, w, epilogue, Some(dx), scratch, None);
}
