//! Threads that stay awake between the kernel calls of a run.
//!
//! A run is hundreds of parallel loops, a few microseconds apart. Left alone, a pool's threads fall asleep in the gaps.
//! Waking them takes longer than many of the loops, and systems tend to wake a thread on the processor of the one that
//! wakes it, where it waits until that one has done all the work by itself.

use std::sync::atomic::{AtomicBool, Ordering};

use rayon::Yield;

/// Looks for work in vain after which a thread offers its processor to others.
const PATIENCE: usize = 1 << 10;

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
    let done = AtomicBool::new(false);
    rayon::in_place_scope(|scope| {
        let _done = Done(&done);
        scope.spawn_broadcast(|_, context| {
            let mut idle = 0;
            // The caller itself gets here while it waits for others.
            while caller != Some(context.index()) && !done.load(Ordering::Acquire) {
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
        f()
    })
}
