//! Memory that will be read soon, fetched a little at a time by loops that compute meanwhile.
#![allow(unsafe_code)]

use crate::kernels::simd::Simd;

/// Bytes of a cache line.
pub const LINE: usize = 64;

/// Parts of at most two tensors.
#[derive(Debug, Clone, Copy)]
pub struct Ahead([(*const u8, usize); 2]);

impl Ahead {
    pub const NOTHING: Ahead = Ahead([(std::ptr::null(), 0); 2]);

    /// Each part begins at an address and has so many bytes.
    pub fn new(parts: [(*const u8, usize); 2]) -> Ahead {
        Ahead(parts)
    }

    /// Divided among so many steps.
    #[inline(always)]
    pub fn in_steps(self, steps: usize) -> Steps {
        let each = |(_, bytes): (*const u8, usize)| bytes.div_ceil(steps.max(1));
        let bytes = [each(self.0[0]), each(self.0[1])];
        Steps { at: [self.0[0].0, self.0[1].0], bytes, next: [0; 2], end: [0; 2] }
    }
}

/// Bytes that are fetched at each step, in order.
#[derive(Debug, Clone, Copy)]
pub struct Steps {
    at: [*const u8; 2],
    bytes: [usize; 2],
    /// The next line's first byte, and the end of the steps so far.
    next: [usize; 2],
    end: [usize; 2],
}

impl Steps {
    pub const NOTHING: Steps = Steps { at: [std::ptr::null(); 2], bytes: [0; 2], next: [0; 2], end: [0; 2] };

    /// Those that follow so many.
    #[inline(always)]
    pub fn after(mut self, steps: usize) -> Steps {
        for k in 0..2 {
            self.end[k] += steps * self.bytes[k];
            self.next[k] = self.end[k].next_multiple_of(LINE);
        }
        self
    }

    /// Fetches the lines that begin within the next step, to the second-level cache.
    ///
    /// # Safety
    /// The processor must have `S`'s instructions. (Fetching is allowed anywhere.)
    #[inline(always)]
    pub unsafe fn fetch<S: Simd>(&mut self) {
        for k in 0..2 {
            self.end[k] += self.bytes[k];
            while self.next[k] < self.end[k] {
                // SAFETY: the caller's promise.
                unsafe { S::prefetch(self.at[k].wrapping_add(self.next[k]).cast()) }
                self.next[k] += LINE;
            }
        }
    }
}
