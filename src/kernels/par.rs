//! Parallel loops whose division of work depends on the problem alone, never on the number of threads:
//! results are the same bits on any number of threads.

#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

/// Elements below which a loop is not worth a second thread.
pub const GRAIN: usize = 1 << 14;

/// Calls `f(start, piece)` for consecutive pieces of `y`, of `GRAIN` elements each, `start` counting elements.
pub fn pieces<T: Send>(y: &mut [T], f: impl Fn(usize, &mut [T]) + Send + Sync) {
    rows(y, 1, GRAIN, f);
}

/// As [`pieces`], with pieces that are whole rows of `row` elements, each of at least about `grain` elements.
/// `f` is given the index of the piece's first *row*.
pub fn rows<T: Send>(y: &mut [T], row: usize, grain: usize, f: impl Fn(usize, &mut [T]) + Send + Sync) {
    let row = row.max(1);
    let per = (grain / row).max(1);
    split(y, per * row, per, &f);
}

/// Calls `f(i, chunk)` for consecutive chunks of `size` elements, the last one perhaps shorter.
pub fn chunks<T: Send>(y: &mut [T], size: usize, f: impl Fn(usize, &mut [T]) + Send + Sync) {
    split(y, size.max(1), 1, &f);
}

/// Chunk `i` is handed over as number `i * step`. Compiled once an element type rather than once a kernel: rayon's
/// machinery is large.
fn split<T: Send>(y: &mut [T], size: usize, step: usize, f: &(dyn Fn(usize, &mut [T]) + Send + Sync)) {
    if y.len() <= size {
        if !y.is_empty() {
            f(0, y);
        }
        return;
    }
    y.par_chunks_mut(size).enumerate().for_each(|(i, chunk)| f(i * step, chunk));
}

/// Folds `leaf` over pieces of at most `grain` indices with `merge`, in a binary tree that depends on the range alone.
pub fn reduce<A: Send>(
    range: Range<usize>,
    grain: usize,
    leaf: &(impl Fn(Range<usize>) -> A + Sync),
    merge: &(impl Fn(A, A) -> A + Sync),
) -> A {
    let grain = grain.max(1);
    if range.len() <= grain {
        return leaf(range);
    }
    let mid = range.start + (range.len() / 2).next_multiple_of(grain);
    let (a, b) = rayon::join(
        || reduce(range.start..mid, grain, leaf, merge),
        || reduce(mid..range.end, grain, leaf, merge),
    );
    merge(a, b)
}

/// A slice that several tasks write, each its own elements.
pub(crate) struct Shared<'a, T>(*mut T, PhantomData<&'a mut [T]>);

// SAFETY: access goes through `ptr`, whose users promise disjointness, and `T` may move between threads.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(crate) fn new(all: &'a mut [T]) -> Self {
        Shared(all.as_mut_ptr(), PhantomData)
    }

    /// Elements that lie there.
    ///
    /// # Safety
    /// Nobody else may use those that the tasks write.
    pub(crate) unsafe fn at(first: *mut T) -> Self {
        Shared(first, PhantomData)
    }

    pub(crate) fn ptr(&self) -> *mut T {
        self.0
    }
}

/// Elements of scratch for as many of the tasks as run at a time, `size` each.
pub fn slots(tasks: usize, size: usize) -> usize {
    tasks.min(rayon::current_num_threads()) * size
}

/// The task that a thread will probably run after `task` of those that [`in_slots`] runs.
pub fn next(task: usize, tasks: usize, size: usize) -> Option<usize> {
    let step = if size == 0 { 1 } else { tasks.min(rayon::current_num_threads()) };
    Some(task + step).filter(|next| *next < tasks)
}

/// Runs tasks `0..tasks`, each with a slot of `size` elements of `scratch`, as many at a time as there are slots.
/// Which slot a task gets is left to chance; what it computes may not depend on the slot's content.
pub fn in_slots<T: Send>(tasks: usize, size: usize, scratch: &mut [T], f: impl Fn(usize, &mut [T]) + Sync) {
    if tasks == 1 {
        return f(0, &mut scratch[..size]);
    }
    if size == 0 {
        return (0..tasks).into_par_iter().for_each(|task| f(task, &mut []));
    }
    let next = AtomicUsize::new(0);
    let take = |slot: &mut [T]| {
        loop {
            let task = next.fetch_add(1, Ordering::Relaxed);
            if task >= tasks {
                return;
            }
            f(task, slot);
        }
    };
    let slots = tasks.min(scratch.len() / size);
    assert!(slots > 0 || tasks == 0, "scratch of tasks");
    match slots {
        1 => take(&mut scratch[..size]),
        _ => scratch[..slots * size].par_chunks_exact_mut(size).for_each(take),
    }
}
