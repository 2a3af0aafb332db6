//! Matrix products on row-major slices.
//!
//! B is packed in panels of a few vectors' columns (unless rows of it can be read as they lie), and a large A that would
//! be read across its rows in strips; register tiles of a few rows by one panel do the rest (`tile`). Work is divided by the extents alone and every element of C is summed in one
//! order, so the bits of a result do not depend on the number of threads.

#![allow(unsafe_code, clippy::needless_range_loop)]

mod blocks;
mod halves;
mod near;
mod pack;
mod pairs;
#[cfg(test)]
mod tests;
mod tile;
mod vector;

use std::ops::Range;

use crate::kernels::half::Elements;
use crate::kernels::par::{self, Shared};
use crate::kernels::simd::{Kernel, Level, Simd, Vectors};
use crate::kernels::tile::Pieces;
use crate::tensor::Float;
use crate::tile_sizes;

pub use self::halves::{gemm_halves, room_halves};
pub use self::near::Near;
pub use self::pairs::{gemm_pairs, room_pairs};
use self::tile::{Target, Tiles, tiles_run};

/// Multiply-adds worth a task of their own.
const WORK: usize = 1 << 19;
/// Multiply-adds of a product that is divided itself where there are several.
const LARGE: usize = 1 << 23;
/// Tasks that keep the threads of a small machine equally busy.
const TASKS: usize = 16;
/// Elements of A that stay in the second-level cache while B passes by.
const BLOCK: usize = 1 << 16;
/// The same of an A of half precision, which is widened for it.
const BLOCK_WIDENED: usize = 1 << 15;
/// Rows of A that are few, beside a B of more elements than several tasks had better share; and elements of B that a task then packs
/// at a time: what stays in the second-level cache.
const FEW: usize = 512;
const SHARED: usize = 1 << 18;
const AT_ONCE: usize = 1 << 16;
/// Steps of the summed dimension that are added up in registers before they are added to C: of few, sums are more
/// accurate and B's panel stays in the cache. Fewer when A is read across its rows as they lie.
const STEPS: usize = 512;
const STEPS_ACROSS: usize = 128;
/// Steps of a B that several strips pass by, and elements of it that stay near.
const STEPS_NEAR: Range<usize> = 128..256;
/// Elements between strips: strips that are written together would otherwise be a power of two apart and share the
/// same few lines of the cache.
const GAP: usize = 16;
/// Rows or columns of C that are at least a task's own where it packs their operand.
const NARROW: usize = 32;
/// Strips of A that pass by a B that is near, of so many elements at most: so that C is written in long runs.
const FEW_STRIPS: usize = 4;
const NEAR_ELEMENTS: usize = 1 << 17;
/// Tasks that pack something of their own.
const SLOTS: usize = 8;

/// `C = alpha · op(A) · op(B) + beta · C` with `op(A)` of M×K, `op(B)` of K×N, row-major; `ld*` is the distance
/// of rows as stored. With `beta` 0, `C` is not read.
#[derive(Debug, Clone, Copy)]
pub struct Product<T> {
    pub trans_a: bool,
    pub trans_b: bool,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub alpha: T,
    pub lda: usize,
    pub ldb: usize,
    pub beta: T,
    pub ldc: usize,
    /// By the calling thread alone, which is one of several that have products to compute.
    pub alone: bool,
}

impl<T: Float> Product<T> {
    /// `C = op(A) · op(B)` of dense matrices.
    pub fn dense(trans_a: bool, trans_b: bool, m: usize, n: usize, k: usize) -> Self {
        let (lda, ldb) = (if trans_a { m } else { k }, if trans_b { k } else { n });
        Product {
            trans_a,
            trans_b,
            m,
            n,
            k,
            alpha: T::one(),
            lda,
            ldb,
            beta: T::zero(),
            ldc: n,
            alone: false,
        }
    }

    /// Elements that A, B and C must at least have.
    fn extents(&self) -> [usize; 3] {
        let extent = |rows: usize, cols: usize, ld: usize| match rows * cols {
            0 => 0,
            _ => (rows - 1) * ld + cols,
        };
        let (m, n, k) = (self.m, self.n, self.k);
        let a = if self.trans_a { extent(k, m, self.lda) } else { extent(m, k, self.lda) };
        let b = if self.trans_b { extent(n, k, self.ldb) } else { extent(k, n, self.ldb) };
        [a, b, extent(m, n, self.ldc)]
    }

    /// Elements of a packed row of panel `q`: its columns in whole vectors.
    #[inline(always)]
    fn row(&self, panel: usize, q: usize, lanes: usize) -> usize {
        panel.min(self.n - q * panel).next_multiple_of(lanes)
    }

    /// Are the operands, of so many elements, as large as the product says? Kernels rely on it.
    fn check(&self, [a, b, c]: [usize; 3], plus: &Plus<T>) {
        let need = self.extents();
        assert!(a >= need[0] && b >= need[1] && c >= need[2], "operands of a product");
        assert!(self.m <= 1 || self.ldc >= self.n, "rows of a product overlap");
        assert!(plus.row.is_none_or(|r| r.len() >= self.n), "operands of a product");
        assert!(plus.all.is_none_or(|x| x.len() >= need[2]), "operands of a product");
    }
}

impl<T: Vectors> Product<T> {
    fn work(&self) -> usize {
        self.m * self.n * self.k
    }

    fn is_vector(&self) -> bool {
        self.m == 1 || self.n == 1
    }

    /// Columns of a panel, and rows of a strip.
    fn tile(&self) -> (usize, usize) {
        let panel = T::level().near_panel(self.n);
        (panel, T::level().rows(panel))
    }

    /// Rows of C in tiles' strips.
    fn strips(&self) -> Pieces {
        Pieces::of(self.m, self.tile().1)
    }

    fn panels(&self) -> usize {
        self.n.div_ceil(self.tile().0)
    }

    /// Elements of one strip of A, for as many steps of the summed dimension.
    fn in_strip(&self, steps: usize) -> usize {
        self.tile().1 * steps + GAP
    }

    /// Elements of B in panels.
    fn in_panels(&self, panels: usize, steps: usize) -> usize {
        panels * self.tile().0 * steps
    }

    /// How the operands are read, by several tasks.
    fn divided_packs(&self) -> Packs {
        match self.packs() {
            Packs::B if self.m <= FEW && self.n * self.k > SHARED => Packs::EachB,
            packs => packs,
        }
    }

    /// The same by one task, or where B is packed beforehand.
    fn packs(&self) -> Packs {
        match () {
            _ if !self.trans_a => Packs::B,
            _ if self.work() < LARGE => {
                if self.trans_b {
                    Packs::B
                } else {
                    Packs::Nothing
                }
            }
            _ if self.m >= self.n => Packs::BThenA,
            _ => Packs::AThenB,
        }
    }

    /// Elements of what is packed for all tasks.
    fn packed(&self, packs: Packs) -> usize {
        match packs {
            Packs::Nothing | Packs::EachB => 0,
            Packs::B | Packs::BThenA => self.in_panels(self.panels(), self.k),
            Packs::AThenB => self.strips().count * self.in_strip(self.k),
        }
    }

    /// Strips of an A read as it lies that pass by a panel of B at a time.
    fn block(&self, elements: usize) -> usize {
        (elements / self.k.clamp(1, STEPS)).div_ceil(self.tile().1)
    }

    /// Elements of what a task packs for itself, or widens.
    fn near(&self, packs: Packs, a_is_whole: bool) -> usize {
        let (rows, cols) = self.pieces(packs);
        let (strips, panels) = (self.strips().count.div_ceil(rows), self.panels().div_ceil(cols));
        let widened = || strips.min(self.block(BLOCK_WIDENED)) * self.tile().1 * (self.k.min(STEPS) + GAP);
        let widened = if !self.trans_a && !a_is_whole { widened() } else { 0 };
        self.packed_by_task(packs, strips, panels) + widened
    }

    /// Elements of what a task of so many strips and panels packs.
    fn packed_by_task(&self, packs: Packs, strips: usize, panels: usize) -> usize {
        let steps = self.k.min(STEPS);
        match packs {
            Packs::Nothing | Packs::B => 0,
            Packs::BThenA => strips * self.in_strip(steps),
            Packs::AThenB | Packs::EachB => self.in_panels(panels, steps),
        }
    }

    /// Elements of scratch for as many of so many tasks as run at a time, `own` each.
    fn slots(&self, tasks: usize, own: usize) -> usize {
        if self.alone { own } else { par::slots(tasks, own) }
    }

    /// How many pieces the strips and the panels of C are divided into.
    fn pieces(&self, packs: Packs) -> (usize, usize) {
        let tasks = if self.alone { 1 } else { (self.work() / WORK).clamp(1, TASKS) };
        let (rows, cols) = (self.strips().count.max(1), self.panels().max(1));
        match packs {
            Packs::BThenA => (tasks.min(SLOTS).min(self.m.div_ceil(NARROW)).min(rows), 1),
            Packs::AThenB => (1, tasks.min(SLOTS).min(self.n.div_ceil(NARROW)).min(cols)),
            Packs::Nothing => {
                // Either operand is read by a few tasks only.
                let m = tasks.isqrt().min(rows);
                (m, tasks.div_ceil(m).min(cols))
            }
            Packs::B => self.in_squares(tasks, rows, cols),
            Packs::EachB => {
                let at_once = (AT_ONCE / self.in_panels(1, self.k.clamp(1, STEPS))).max(1);
                let cols = cols.div_ceil(at_once).max(tasks.min(SLOTS).min(cols));
                ((SLOTS / 2).min(tasks).div_ceil(cols).min(self.m.div_ceil(NARROW)), cols)
            }
        }
    }

    /// Pieces of so many strips and panels: parts of C that are about square, for then all tasks together read least of A
    /// and B.
    fn in_squares(&self, tasks: usize, rows: usize, cols: usize) -> (usize, usize) {
        let m = (tasks * self.m / self.n.max(1)).isqrt().clamp(1, tasks.min(rows));
        (m, tasks.div_ceil(m).min(cols))
    }
}

/// Which operands are put into the order in which tiles read them.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Packs {
    /// Both are read as they lie, A across its rows.
    Nothing,
    /// B beforehand, for all tasks. Rows of A are read as they lie, or widened by each task.
    B,
    /// A, which would be read across its rows, as well: of the larger operand, each task packs its own part.
    BThenA,
    AThenB,
    /// B, by each task its own panels of it: of few rows of A, which are read as they lie or widened.
    EachB,
}

/// What is added to products besides.
#[derive(Debug, Clone, Copy)]
pub struct Plus<'a, T> {
    /// To each row: N elements.
    pub row: Option<&'a [T]>,
    /// Elements that lie as those of C.
    pub all: Option<&'a [T]>,
}

impl<T> Plus<'_, T> {
    pub const NOTHING: Self = Plus { row: None, all: None };

    /// What is added to the columns from one on.
    fn from(self, column: usize) -> Self {
        Plus { row: self.row.map(|x| &x[column..]), all: self.all.map(|x| &x[column..]) }
    }

    fn is_nothing(&self) -> bool {
        self.row.is_none() && self.all.is_none()
    }
}

/// `C = alpha · op(A) · op(B) + beta · C`; see [`Product`]. `scratch` has [`room`]`(p, 1)` elements.
pub fn gemm<T: Vectors>(p: &Product<T>, a: &[T], b: &[T], c: &mut [T], scratch: &mut [T]) {
    many(p, 1, |_| [0, 0], a, b, Plus::NOTHING, c, 0, scratch);
}

/// Elements of scratch that [`many`] needs for a batch of products.
pub fn room<T: Vectors>(p: &Product<T>, batch: usize) -> usize {
    match () {
        _ if p.is_vector() => 0,
        _ if batch == 1 || p.work() >= LARGE => room_divided(p, true),
        _ => p.slots(batch, p.packed(p.packs())),
    }
}

/// Elements of scratch that [`divided`] needs.
fn room_divided<T: Vectors>(p: &Product<T>, a_is_whole: bool) -> usize {
    let packs = p.divided_packs();
    let (rows, cols) = p.pieces(packs);
    p.packed(packs) + p.slots(rows * cols, p.near(packs, a_is_whole))
}

/// `batch` products of equal extents, plus something: the `i`th reads A and B from the offsets `at(i)` and writes C at
/// `i · c_stride`.
#[allow(clippy::too_many_arguments)]
pub fn many<T: Vectors>(
    p: &Product<T>,
    batch: usize,
    at: impl Fn(usize) -> [usize; 2] + Sync,
    a: &[T],
    b: &[T],
    plus: Plus<T>,
    c: &mut [T],
    c_stride: usize,
    scratch: &mut [T],
) {
    let need = p.extents();
    if batch == 0 || need[2] == 0 {
        return;
    }
    assert!(batch == 1 || c_stride >= need[2], "products overlap");
    let in_c = c.len();
    let added = |i: usize| Plus { all: plus.all.map(|x| &x[i * c_stride..]), ..plus };
    let operands = |i: usize| {
        let [from_a, from_b] = at(i);
        let (a, b) = (&a[from_a..], &b[from_b..]);
        p.check([a.len(), b.len(), in_c.saturating_sub(i * c_stride)], &added(i));
        (a, b)
    };
    let elements = |i: usize| {
        let (a, b) = operands(i);
        (Elements::Whole(a), Elements::Whole(b))
    };
    if p.is_vector() {
        for i in 0..batch {
            let (a, b) = operands(i);
            vector::vector(p, a, b, added(i), &mut c[i * c_stride..]);
        }
    } else if batch == 1 || p.work() >= LARGE {
        for i in 0..batch {
            let (a, b) = elements(i);
            divided(p, a, b, added(i), &Shared::new(&mut c[i * c_stride..]), scratch);
        }
    } else {
        let shared = Shared::new(c);
        let packs = p.packs();
        tasks(batch, p.alone, p.packed(packs), scratch, |i, packed| {
            let (a, b) = elements(i);
            pack_shared(&Product { alone: true, ..*p }, packs, a, b, packed);
            let c = shared.ptr().wrapping_add(i * c_stride);
            let (strips, panels) = (0..p.strips().count, 0..p.panels());
            let part = Part { p, packs, a, b, packed, near: &mut [], plus: added(i), c, strips, panels };
            // SAFETY: `operands` checked the extents; no two products share elements of C.
            unsafe { T::dispatch(part) }
        });
    }
}

/// One product, divided into tasks. The callers have checked the extents.
fn divided<T: Vectors>(
    p: &Product<T>,
    a: Elements<T>,
    b: Elements<T>,
    plus: Plus<T>,
    c: &Shared<T>,
    scratch: &mut [T],
) {
    let packs = p.divided_packs();
    let (packed, rest) = scratch.split_at_mut(p.packed(packs));
    pack_shared(p, packs, a, b, packed);
    shared_out(p, packs, a, b, plus, c, packed, rest);
}

/// Packs what all tasks read, by several tasks or by this one.
fn pack_shared<T: Vectors>(p: &Product<T>, packs: Packs, a: Elements<T>, b: Elements<T>, packed: &mut [T]) {
    match packs {
        Packs::Nothing | Packs::EachB => {}
        Packs::B | Packs::BThenA => pack::columns(p, b, packed),
        Packs::AThenB => pack::rows(p, a, packed),
    }
}

/// The tasks of a product whose operand for all of them is packed.
#[allow(clippy::too_many_arguments)]
fn shared_out<T: Vectors>(
    p: &Product<T>,
    packs: Packs,
    a: Elements<T>,
    b: Elements<T>,
    plus: Plus<T>,
    c: &Shared<T>,
    packed: &[T],
    rest: &mut [T],
) {
    let (rows, cols) = p.pieces(packs);
    let share = |i: usize, of: usize, total: usize| total * i / of..total * (i + 1) / of;
    tasks(rows * cols, p.alone, p.near(packs, a.is_whole()), rest, |task, near| {
        let strips = share(task / cols, rows, p.strips().count);
        let panels = share(task % cols, cols, p.panels());
        let part = Part { p, packs, a, b, packed, near, plus, c: c.ptr(), strips, panels };
        // SAFETY: the callers checked the extents; no two tasks share elements of C.
        unsafe { T::dispatch(part) }
    });
}

/// Calls `run(task, own)` for each task, with so many elements of scratch of its own; `alone`: on this thread.
fn tasks<T: Send>(
    count: usize,
    alone: bool,
    own: usize,
    scratch: &mut [T],
    run: impl Fn(usize, &mut [T]) + Sync,
) {
    match alone {
        true => (0..count).for_each(|task| run(task, &mut scratch[..own])),
        false => par::in_slots(count, own, scratch, run),
    }
}

/// Some strips and panels of one product.
struct Part<'a, T> {
    p: &'a Product<T>,
    packs: Packs,
    /// Whole, where they are read as they lie; but rows of A are widened for a packed B.
    a: Elements<'a, T>,
    b: Elements<'a, T>,
    /// What is packed already, and where the rest will be, as the product says.
    packed: &'a [T],
    near: &'a mut [T],
    plus: Plus<'a, T>,
    c: *mut T,
    strips: Range<usize>,
    panels: Range<usize>,
}

impl<T: Vectors> Kernel<T> for Part<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(self) {
        let (p, packs) = (self.p, self.packs);
        let panel = Level::of::<S>().near_panel(p.n);
        let height = Level::of::<S>().rows(panel);
        let strips = Pieces::of(p.m, height);
        // As they lie, few steps across A at a time, whatever the number of rows. Of a near B, one strip passes by all
        // panels.
        let widens = !p.trans_a && !self.a.is_whole();
        let (steps, block) = match packs {
            Packs::Nothing => (STEPS_ACROSS, self.strips.len()),
            Packs::B if p.trans_a => (STEPS_ACROSS, self.strips.len()),
            Packs::B | Packs::EachB => (STEPS, p.block(if widens { BLOCK_WIDENED } else { BLOCK })),
            Packs::BThenA => {
                (STEPS, if p.n * p.k.min(STEPS) <= NEAR_ELEMENTS { FEW_STRIPS } else { self.strips.len() })
            }
            Packs::AThenB => {
                let at_once = AT_ONCE / p.in_panels(p.panels().div_ceil(p.pieces(packs).1), 1);
                (at_once.clamp(STEPS_NEAR.start, STEPS_NEAR.end), FEW_STRIPS)
            }
        };
        let own = p.packed_by_task(packs, self.strips.len(), self.panels.len());
        let (near, widened) = self.near.split_at_mut(own);
        let near = near.as_mut_ptr();
        let mut k = 0;
        while k < p.k || k == 0 {
            let taken = steps.min(p.k - k);
            let (beta, plus) = if k == 0 { (p.beta, self.plus) } else { (T::one(), Plus::NOTHING) };
            // SAFETY: A and B have the product's extents; `near` is made for the part's strips or panels.
            unsafe {
                match packs {
                    Packs::BThenA => {
                        pack::strips::<S>(p, self.a, self.strips.clone(), k..k + taken, near, taken);
                    }
                    Packs::AThenB | Packs::EachB => {
                        let place = pack::Place { out: near, room: taken, before: 0 };
                        pack::panels::<S>(p, self.b, self.panels.clone(), k..k + taken, place);
                    }
                    _ => {}
                }
            }
            let mut from = self.strips.start;
            while from < self.strips.end {
                let to = (from + block.max(1)).min(self.strips.end);
                if widens && taken > 0 {
                    for row in strips.start(from)..strips.start(to - 1) + strips.len(to - 1) {
                        let at = (row - strips.start(from)) * (taken + GAP);
                        self.a.copy(row * p.lda + k, &mut widened[at..at + taken]);
                    }
                }
                for q in self.panels.clone() {
                    let first = q * panel;
                    let b = match packs {
                        Packs::Nothing => self.b.address(k * p.ldb + first),
                        Packs::B | Packs::BThenA => {
                            let row = p.row(panel, q, S::LANES);
                            self.packed.as_ptr().wrapping_add(q * p.k * panel + k * row)
                        }
                        Packs::AThenB | Packs::EachB => {
                            near.cast_const().wrapping_add((q - self.panels.start) * taken * panel)
                        }
                    };
                    let mut i = from;
                    while i < to {
                        let (row, m, count) = (strips.start(i), strips.len(i), strips.alike(i).min(to - i));
                        let (a, a_tile, lda) = match packs {
                            Packs::B | Packs::EachB if widens => {
                                let at = (row - strips.start(from)) * (taken + GAP);
                                (widened.as_ptr().wrapping_add(at), m * (taken + GAP), taken + GAP)
                            }
                            Packs::Nothing | Packs::B | Packs::EachB if p.trans_a => {
                                (self.a.address(k * p.lda + row), m, p.lda)
                            }
                            Packs::Nothing | Packs::B | Packs::EachB => {
                                (self.a.address(row * p.lda + k), m * p.lda, p.lda)
                            }
                            Packs::BThenA => {
                                let strip = p.in_strip(taken);
                                let at = (i - self.strips.start) * strip;
                                (near.cast_const().wrapping_add(at), strip, height)
                            }
                            Packs::AThenB => {
                                let strip = p.in_strip(p.k);
                                (self.packed.as_ptr().wrapping_add(i * strip + k * height), strip, height)
                            }
                        };
                        let tiles = Tiles {
                            count,
                            across: p.trans_a,
                            a,
                            a_tile,
                            lda,
                            b,
                            ldb: (packs == Packs::Nothing).then_some(p.ldb),
                            steps: taken,
                            to: Target::of(p, plus, self.c, row, first, panel, beta),
                        };
                        // SAFETY: the part lies inside the product, whose operands have its extents.
                        unsafe { tile_sizes!(m, tiles.to.lanes.div_ceil(S::LANES), S, tiles_run(&tiles)) }
                        i += count;
                    }
                }
                from = to;
            }
            k += steps;
        }
    }
}
