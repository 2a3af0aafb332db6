//! Both gradients of a depthwise convolution in one pass over its tensors.
//!
//! A position of X takes part in dW with the positions of dY that its own gradient is summed from: these are loaded once for
//! both. X is normalised in registers, and what the normalisation's own gradients sum up is added while dX is there as well.
#![allow(unsafe_code, clippy::needless_range_loop)]

use std::ops::Range;

use smallvec::SmallVec;

use super::line::Tap;
use super::weight::finish;
use super::{Direction, in_tap_order};
use crate::kernels::conv::both::{Both, Plain};
use crate::kernels::conv::load::{Load, Norm, Operand, Rows};
use crate::kernels::conv::{Geometry, Residual, slots, split};
use crate::kernels::half::Half;
use crate::kernels::par::{LINE, Shared, in_prepared_slots};
use crate::kernels::simd::{Bf16, Kernel, Level, Simd, Stored, Vectors, Whole, load_lanes, store_lanes};
use crate::kernels::tile::Pieces;

/// Sums of dW, each over a share of the rows of X.
const SLABS: usize = 16;
/// Neighbouring taps whose weights and sums are in registers.
const TAPS: usize = 3;

/// Positions computed at a time, at most: twice as many vectors are in registers besides those.
#[inline(always)]
fn most<S: Simd>() -> usize {
    if Level::of::<S>().is_roomy() { 8 } else { 4 }
}

/// Some rows of X, all images' counted.
struct Task<'a, T> {
    /// From dY to dX.
    way: Direction<'a>,
    /// (k…, C), as their gradient.
    w: &'a [T],
    dw: &'a mut [T],
    dy: Rows<'a, T>,
    x: Operand<'a, T>,
    /// A row of X that is stored in float16.
    near: &'a mut [T],
    addend: Residual<'a, T>,
    dx: *mut T,
    sums: Option<Sums<'a, T>>,
    rows: Range<usize>,
}

/// Of the normalisation's gradients: sums over a row, and over all of them, of the scale, then of the shift.
struct Sums<'a, T> {
    row: &'a mut [T],
    all: &'a mut [f64],
}

/// Neighbouring taps of a row of dY, in its order.
struct Group<T> {
    /// What the first position of X in its class reads for the first of them.
    dy: *const T,
    /// Elements to their weights, and how many they are.
    w: [usize; TAPS],
    len: usize,
}

type Groups<T> = SmallVec<[Group<T>; 6]>;

/// Positions a stride apart.
struct Class<T> {
    taps: SmallVec<[Tap<T>; 64]>,
    groups: Groups<T>,
    count: usize,
}

impl<T: Vectors> Kernel<T> for Task<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(self) {
        // SAFETY: the caller's promise; the forms are those of X, or of what float16 is widened to.
        unsafe {
            match self.x.data.half() {
                Some(Half::Bf16) => self.all::<S, Bf16>(),
                _ => self.all::<S, Whole>(),
            }
        }
    }
}

impl<T: Vectors> Task<'_, T> {
    #[inline(always)]
    unsafe fn all<S: Simd<Elem = T>, D: Stored<T>>(mut self) {
        self.dw.fill(T::zero());
        for row in self.rows.clone() {
            // SAFETY: rows that there are, of which dX's is this task's.
            unsafe { self.row::<S, D>(row) }
            if let Some(sums) = &mut self.sums {
                sums.all.iter_mut().zip(&*sums.row).for_each(|(all, row)| *all += row.to64());
                sums.row.fill(T::zero());
            }
        }
    }

    #[inline(always)]
    unsafe fn row<S: Simd<Elem = T>, D: Stored<T>>(&mut self, row: usize) {
        let (way, g) = (self.way, self.way.g);
        let [image, _, i1] = split(row, [g.n, 1, g.x[1]]);
        // SAFETY: the caller's promise.
        let rows = unsafe { way.read(&mut self.dy, [image, 0, i1]) };
        let line = g.x[2] * g.c;
        let x = match self.x.data.half() {
            Some(Half::F16) => {
                self.x.data.copy(row * line, &mut self.near[..line]);
                self.near.as_ptr().cast()
            }
            _ => self.x.data.address(row * line).cast(),
        };
        let start = row * line;
        let at = Line::<T, D> {
            c: g.c,
            // (In neighbouring classes positions are neighbours.)
            step: way.residues(2) * g.c,
            x,
            norm: match &self.x.load {
                Load::Norm(norm) => Some(*norm),
                _ => None,
            },
            w: self.w.as_ptr(),
            dw: self.dw.as_mut_ptr(),
            dx: self.dx.wrapping_add(start),
            addend: self.addend.address(|| self.dx).map(|addend| addend.wrapping_add(start)),
            sums: self.sums.as_mut().map(|sums| sums.row.as_mut_ptr()),
        };
        // Positions, counted within their class, of which in no class a tap falls outside.
        let around = self.dy.around();
        let mut inside = 0..usize::MAX;
        let mut classes: SmallVec<[Class<T>; 2]> = SmallVec::new();
        for r in 0..way.residues(2).min(g.x[2]) {
            let count = (g.x[2] - r).div_ceil(way.residues(2));
            let taps = way.taps(&rows, r);
            let of_class = way.within(&taps, around, count);
            inside = inside.start.max(of_class.start)..inside.end.min(of_class.end);
            classes.push(Class { groups: groups(&taps, g.c), taps, count });
        }
        inside.end = inside.end.max(inside.start);
        let extent = g.y[2] as isize;
        // SAFETY: taps lie inside, or are left out.
        unsafe {
            at.tiles::<S>(inside.clone(), &classes);
            for (r, class) in classes.iter().enumerate() {
                let (first, last) = (inside.start.min(class.count), inside.end.min(class.count));
                for q in (0..first).chain(last..class.count) {
                    let mut taps = class.taps.clone();
                    taps.retain(|tap| (0..extent).contains(&(q as isize + tap.offset)));
                    at.tile_of::<S, 1>(q, r, &groups(&taps, g.c));
                }
            }
        }
    }
}

/// Taps of which three can be neighbours, in the order of dY, whose positions have `c` channels.
fn groups<T>(taps: &[Tap<T>], c: usize) -> Groups<T> {
    let mut groups = Groups::<T>::new();
    let mut next = None;
    for tap in taps {
        match groups.last_mut() {
            Some(group) if next == Some((tap.x, tap.offset)) && group.len < TAPS => {
                group.w[group.len] = tap.w;
                group.len += 1;
            }
            _ => {
                let dy = tap.x.wrapping_offset(tap.offset * c as isize);
                groups.push(Group { dy, w: [tap.w; TAPS], len: 1 });
            }
        }
        next = Some((tap.x, tap.offset + 1));
    }
    groups
}

/// A row of X and dX.
struct Line<'a, T, D: Stored<T>> {
    c: usize,
    /// Elements from a position to the next of its class.
    step: usize,
    x: *const D::Bits,
    norm: Option<Norm<'a, T>>,
    w: *const T,
    dw: *mut T,
    dx: *mut T,
    addend: Option<*const T>,
    sums: Option<*mut T>,
}

impl<T: Vectors, D: Stored<T>> Line<'_, T, D> {
    /// Positions of all classes that have no tap outside, in tiles of about equal size.
    #[inline(always)]
    unsafe fn tiles<S: Simd<Elem = T>>(&self, inside: Range<usize>, classes: &[Class<T>]) {
        let most = most::<S>();
        let tiles = Pieces::of(inside.len(), most);
        let mut q = inside.start;
        for tile in 0..tiles.count {
            let size = tiles.len(tile);
            for (r, class) in classes.iter().enumerate() {
                let groups = &class.groups;
                // SAFETY: the caller's promise.
                unsafe {
                    match size {
                        8 if most == 8 => self.tile_of::<S, 8>(q, r, groups),
                        7 if most == 8 => self.tile_of::<S, 7>(q, r, groups),
                        6 if most == 8 => self.tile_of::<S, 6>(q, r, groups),
                        5 if most == 8 => self.tile_of::<S, 5>(q, r, groups),
                        4 => self.tile_of::<S, 4>(q, r, groups),
                        3 => self.tile_of::<S, 3>(q, r, groups),
                        2 => self.tile_of::<S, 2>(q, r, groups),
                        _ => self.tile_of::<S, 1>(q, r, groups),
                    }
                }
            }
            q += size;
        }
    }

    /// `P` positions from the one of number `q` of class `r` on.
    #[inline(always)]
    unsafe fn tile_of<S: Simd<Elem = T>, const P: usize>(&self, q: usize, r: usize, groups: &[Group<T>]) {
        let (first, mut channel) = (q * self.step + r * self.c, 0);
        // SAFETY: the caller's promise; vectors end at the last channel.
        unsafe {
            while channel + S::LANES <= self.c {
                self.tile::<S, P, true>(first, q, groups, channel, S::LANES);
                channel += S::LANES;
            }
            if channel < self.c {
                self.tile::<S, P, false>(first, q, groups, channel, self.c - channel);
            }
        }
    }

    /// Those from element `first` of the row on.
    #[inline(always)]
    unsafe fn tile<S: Simd<Elem = T>, const P: usize, const WHOLE: bool>(
        &self,
        first: usize,
        q: usize,
        groups: &[Group<T>],
        channel: usize,
        lanes: usize,
    ) {
        let (step, first) = (self.step, first + channel);
        // SAFETY: the caller's promise.
        unsafe {
            let from = self.x.add(first);
            if S::begins_line(channel) {
                let ahead = first + most::<S>() * step;
                let (mut x, mut dx) = (self.x.wrapping_add(ahead), self.dx.wrapping_add(ahead));
                for _ in 0..P {
                    S::prefetch(x.cast());
                    S::prefetch(dx);
                    (x, dx) = (x.wrapping_add(step), dx.wrapping_add(step));
                }
            }
            let mut x = [S::splat(T::zero()); P];
            for i in 0..P {
                x[i] = D::load::<S>(from.add(i * step), lanes);
            }
            if let Some(norm) = &self.norm {
                let norm = norm.lanes::<S>(channel, lanes);
                for i in 0..P {
                    x[i] = norm.of(x[i]);
                }
            }
            let mut dx = [S::splat(T::zero()); P];
            for group in groups {
                let dy = group.dy.wrapping_add(q * self.c + channel);
                match group.len {
                    3 => self.add::<S, 3, P, WHOLE>(dy, &group.w, channel, lanes, &x, &mut dx),
                    2 => self.add::<S, 2, P, WHOLE>(dy, &group.w, channel, lanes, &x, &mut dx),
                    _ => self.add::<S, 1, P, WHOLE>(dy, &group.w, channel, lanes, &x, &mut dx),
                }
            }
            if let Some(addend) = self.addend {
                for i in 0..P {
                    dx[i] = S::add(dx[i], load_lanes::<S, WHOLE>(addend.add(first + i * step), lanes));
                }
            }
            for i in 0..P {
                store_lanes::<S, WHOLE>(self.dx.add(first + i * step), dx[i], lanes);
            }
            if let (Some(sums), Some(norm)) = (self.sums, &self.norm) {
                let norm = norm.lanes::<S>(channel, lanes);
                let (scale, shift) = (sums.add(channel), sums.add(self.c + channel));
                let mut sum = [load_lanes::<S, WHOLE>(scale, lanes), load_lanes::<S, WHOLE>(shift, lanes)];
                for i in 0..P {
                    // What the clamp changed lies on its ends.
                    let dz = S::pass(x[i], norm.low, norm.high, dx[i]);
                    let less = S::sub(D::load::<S>(from.add(i * step), lanes), norm.mean);
                    sum = [S::fma(dz, less, sum[0]), S::add(sum[1], dz)];
                }
                store_lanes::<S, WHOLE>(scale, sum[0], lanes);
                store_lanes::<S, WHOLE>(shift, sum[1], lanes);
            }
        }
    }

    /// Adds `K` neighbouring taps, the first of which reads `dy` for the first position.
    #[inline(always)]
    unsafe fn add<S: Simd<Elem = T>, const K: usize, const P: usize, const WHOLE: bool>(
        &self,
        mut dy: *const T,
        at: &[usize; TAPS],
        channel: usize,
        lanes: usize,
        x: &[S::V; P],
        dx: &mut [S::V; P],
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let zero = S::splat(T::zero());
            let (mut w, mut dw) = ([zero; K], [zero; K]);
            for k in 0..K {
                w[k] = load_lanes::<S, WHOLE>(self.w.add(at[k] + channel), lanes);
                dw[k] = load_lanes::<S, WHOLE>(self.dw.add(at[k] + channel), lanes);
            }
            // Neighbouring positions share what is loaded. (By names: an array whose elements move lies in memory.)
            let (mut first, mut second) = (zero, zero);
            if K > 2 {
                first = load_lanes::<S, WHOLE>(dy, lanes);
                dy = dy.wrapping_add(self.c);
            }
            if K > 1 {
                second = load_lanes::<S, WHOLE>(dy, lanes);
                dy = dy.wrapping_add(self.c);
            }
            for i in 0..P {
                let third = load_lanes::<S, WHOLE>(dy, lanes);
                dy = dy.wrapping_add(self.c);
                let near = [first, second, third];
                for k in 0..K {
                    dx[i] = S::fma(near[TAPS - K + k], w[k], dx[i]);
                    dw[k] = S::fma(near[TAPS - K + k], x[i], dw[k]);
                }
                (first, second) = (second, third);
            }
            for k in 0..K {
                store_lanes::<S, WHOLE>(self.dw.add(at[k] + channel), dw[k], lanes);
            }
        }
    }
}

pub fn grads_slabs(g: &Geometry) -> usize {
    (g.n * g.x[1]).min(SLABS)
}

/// Elements of a task's room: of the weights, of the ring of dY, of a row of X, and of sums over a row.
fn room(g: &Geometry, [dy, x]: Plain) -> [usize; 4] {
    let near = if x { 0 } else { g.x[2] * g.c };
    [g.taps() * g.c, Direction::back(g).ring(dy), near, 2 * g.c]
        .map(|elements| elements.next_multiple_of(LINE))
}

/// Elements of scratch that [`grads`] needs.
pub fn grads_scratch(g: &Geometry, plain: Plain) -> usize {
    let slabs = grads_slabs(g);
    slabs * g.taps() * g.c + slots(slabs, room(g, plain).iter().sum())
}

/// dX (N, spatial…, C) and dW (C, 1, k…), over at most two dimensions.
pub fn grads<T: Vectors>(g: &Geometry, b: Both<T>, dx: &mut [T], dw: &mut [T], scratch: &mut [T]) {
    let (size, slabs, total) = (g.taps() * g.c, grads_slabs(g), g.n * g.x[1]);
    let (sums, slots) = scratch.split_at_mut(slabs * size);
    let [weights, ring, near, of_row] = room(g, b.plain());
    let way = Direction::back(g);
    let (shared, dx) = (Shared::new(sums), Shared::new(dx));
    let prepare = |slot: &mut [T]| in_tap_order(&way, b.w, slot);
    in_prepared_slots(slabs, weights + ring + near + of_row, slots, prepare, |slab, slot| {
        let (w, rest) = slot.split_at_mut(weights);
        let (dy, rest) = rest.split_at_mut(ring);
        let (near, row) = rest.split_at_mut(near);
        let row = &mut row[..2 * g.c];
        row.fill(T::zero());
        let task = Task {
            way,
            w,
            // SAFETY: the slab's own sum.
            dw: unsafe { std::slice::from_raw_parts_mut(shared.ptr().add(slab * size), size) },
            dy: way.rows(b.dy, dy),
            x: b.x,
            near,
            addend: b.addend,
            dx: dx.ptr(),
            // SAFETY: asked for here alone.
            sums: b.sums.as_ref().map(|sums| Sums { row, all: unsafe { sums.part(slab) } }),
            rows: total * slab / slabs..total * (slab + 1) / slabs,
        };
        // SAFETY: the extents were checked; rows of dX are a task's own.
        unsafe { T::dispatch(task) }
    });
    finish(g, sums, dw);
    if let Some(sums) = b.sums {
        sums.finish();
    }
}
