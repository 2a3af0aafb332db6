//! Threads that stay awake between the kernel calls of a run.
//!
//! A run is hundreds of parallel loops, a few microseconds apart. Left alone, a pool's threads fall asleep in the gaps.
//! Waking them takes longer than many of the loops, and systems tend to wake a thread on the processor of the one that
//! wakes it, where it waits until that one has done all the work by itself.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rayon::Yield;

/// Looks for work in vain after which a thread offers its processor to others.
const PATIENCE: usize = 1 << 10;

/// How long a run waits for the other threads to be awake.
const WAKING: Duration = Duration::from_micros(300);

/// Runs `f`, on a thread of a pool, while the pool's other threads look for work all the time.
pub(super) fn awake<R>(f: impl FnOnce() -> R) -> R {
    let caller = rayon::current_thread_index();
    if caller.is_none() || rayon::current_num_threads() == 1 {
        return f();
    }
    /// Also where `f` panics.
    struct Done<'a>(&'a AtomicBool);
    impl Drop for Done<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Release);
        }
    }
    let others = rayon::current_num_threads() - 1;
    let (awake, begun, done) = (AtomicUsize::new(0), AtomicBool::new(false), AtomicBool::new(false));
    rayon::in_place_scope(|scope| {
        let _done = Done(&done);
        scope.spawn_broadcast(|_, context| {
            // A thread that comes later may do so inside a loop of `f`, while it waits for the loop's other half: it
            // would wait here for the end of `f`, and `f` for it.
            if caller == Some(context.index()) || begun.load(Ordering::SeqCst) {
                return;
            }
            awake.fetch_add(1, Ordering::SeqCst);
            let mut idle = 0;
            while !done.load(Ordering::Acquire) {
                match rayon::yield_now() {
                    Some(Yield::Executed) => idle = 0,
                    _ if idle < PATIENCE => {
                        idle += 1;
                        std::hint::spin_loop();
                    }
                    _ => std::thread::yield_now(),
                }
            }
        });
        let start = Instant::now();
        while awake.load(Ordering::SeqCst) < others && start.elapsed() < WAKING {
            std::hint::spin_loop();
        }
        begun.store(true, Ordering::SeqCst);
        f()
    })
}

#[cfg(test)]
mod tests {
    use rayon::prelude::*;

    use super::*;

    /// Many short runs with loops inside loops: threads wake up in the middle of them.
    #[test]
    fn threads_that_wake_up_late_do_not_wait_for_ever() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(4).build().unwrap();
        for run in 0..2000 {
            let sum: usize = pool.install(|| {
                awake(|| (0..64usize).into_par_iter().map(|i| (0..i).into_par_iter().sum::<usize>()).sum())
            });
            assert_eq!(sum, (0..64).map(|i| (0..i).sum::<usize>()).sum::<usize>(), "run {run}");
            if run % 100 == 0 {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }
}
