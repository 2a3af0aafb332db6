//! Parallel loops whose division of work depends on the problem alone, never on the number of threads:
//! results are the same bits on any number of threads.

#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;
use smallvec::SmallVec;

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

/// Calls `f` for consecutive ranges of `size` of `0..n`, the last one perhaps shorter.
pub fn ranges(n: usize, size: usize, f: impl Fn(Range<usize>) + Sync) {
    let range = |i: usize| i * size..n.min((i + 1) * size);
    match n.div_ceil(size) {
        0 => {}
        1 => f(0..n),
        count => (0..count).into_par_iter().for_each(|i| f(range(i))),
    }
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

/// Elements of a line of the cache, at least: slots are whole lines, so that no two share one and vectors lie in one.
pub const LINE: usize = 16;

/// Elements of scratch for as many of the tasks as run at a time, `size` each.
pub fn slots(tasks: usize, size: usize) -> usize {
    tasks.min(rayon::current_num_threads()) * size
}

/// Runs tasks `0..tasks`, each with a slot of `size` elements of `scratch`, as many at a time as there are slots.
/// A slot's own tasks are neighbours, so that one kernel's results are mostly read by the core that wrote them; when they are
/// done, it takes others'. What a task computes may not depend on its slot's content.
pub fn in_slots<T: Send>(tasks: usize, size: usize, scratch: &mut [T], f: impl Fn(usize, &mut [T]) + Sync) {
    in_prepared_slots(tasks, size, scratch, |_| {}, f);
}

/// As [`in_slots`]; `prepare` is given each slot before its first task. What all tasks read, and what is quickly made, had
/// better be made by each core for itself than be fetched from the one that made it.
pub fn in_prepared_slots<T: Send>(
    tasks: usize,
    size: usize,
    scratch: &mut [T],
    prepare: impl Fn(&mut [T]) + Sync,
    f: impl Fn(usize, &mut [T]) + Sync,
) {
    if size == 0 {
        return (0..tasks).into_par_iter().for_each(|task| f(task, &mut []));
    }
    let slots = tasks.min(scratch.len() / size);
    assert!(slots > 0 || tasks == 0, "scratch of tasks");
    if tasks == 0 {
        return;
    }
    if slots <= 1 {
        let slot = &mut scratch[..size];
        prepare(slot);
        return (0..tasks).for_each(|task| f(task, slot));
    }
    let begun: SmallVec<[AtomicUsize; 16]> = (0..slots).map(|_| AtomicUsize::new(0)).collect();
    let take = |(slot, room): (usize, &mut [T])| {
        let mut prepared = false;
        for whose in (slot..slots).chain(0..slot) {
            let own = tasks * whose / slots..tasks * (whose + 1) / slots;
            loop {
                let task = own.start + begun[whose].fetch_add(1, Ordering::Relaxed);
                if task >= own.end {
                    break;
                }
                if !prepared {
                    prepare(room);
                    prepared = true;
                }
                f(task, room);
            }
        }
    };
    scratch[..slots * size].par_chunks_exact_mut(size).enumerate().for_each(take);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every task runs once, in a slot that was prepared.
    #[test]
    fn slots_are_prepared_and_tasks_run_once() {
        for threads in [1, 2, 3, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            for tasks in [0, 1, 2, 3, 7, 64] {
                let runs: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.install(|| {
                    let mut scratch = vec![0; slots(tasks, 2)];
                    in_prepared_slots(
                        tasks,
                        2,
                        &mut scratch,
                        |slot| slot.fill(1),
                        |task, slot| {
                            assert_eq!(slot, [1, 1]);
                            runs[task].fetch_add(1, Ordering::Relaxed);
                        },
                    );
                });
                assert!(
                    runs.iter().all(|n| n.load(Ordering::Relaxed) == 1),
                    "{threads} threads, {tasks} tasks"
                );
            }
        }
    }
}
