//! Results that are too large to be found in a cache by whoever reads them next are written past the caches.
//!
//! A store to a line that is not in a cache first reads it: a core then writes at the pace of its reads (Ice Lake: 9 GB/s
//! instead of 27). So such results are computed near by, a block at a time, and copied from there.
#![allow(unsafe_code)]

use crate::kernels::simd::{Kernel, Simd, Vectors};

/// Elements from which on a tensor is far when it is read again.
const FAR: usize = 1 << 21;

/// Is a result of so many elements better written past the caches?
pub fn pays(elements: usize) -> bool {
    elements >= FAR
}

struct Copy<'a, T> {
    from: &'a [T],
    to: *mut T,
}

impl<T: Vectors> Kernel<T> for Copy<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd<Elem = T>>(self) {
        let (from, to, n) = (self.from.as_ptr(), self.to, self.from.len());
        let size = S::LANES * size_of::<T>();
        let ahead = (to as usize).next_multiple_of(size) - to as usize;
        let head = (ahead / size_of::<T>()).min(n);
        let whole = head + (n - head) / S::LANES * S::LANES;
        // SAFETY: the caller's promise: `n` elements on either side; vectors begin at multiples of their size.
        unsafe {
            std::ptr::copy_nonoverlapping(from, to, head);
            for i in (head..whole).step_by(S::LANES) {
                S::stream(to.add(i), S::load(from.add(i)));
            }
            std::ptr::copy_nonoverlapping(from.add(whole), to.add(whole), n - whole);
            S::fence();
        }
    }
}

/// Copies past the caches.
///
/// # Safety
/// `to` must be writable for as many elements, by this caller alone.
pub unsafe fn copy<T: Vectors>(from: &[T], to: *mut T) {
    // SAFETY: the caller's promise.
    unsafe { T::dispatch(Copy { from, to }) }
}

#[cfg(test)]
mod tests {
    #[test]
    fn any_alignment() {
        let from: Vec<f32> = (0..1000).map(|i| i as f32).collect();
        for (start, n) in [(0, 1000), (1, 999), (3, 5), (15, 64), (16, 0), (7, 333)] {
            let mut to = vec![-1.0f32; 1100];
            // SAFETY: inside both.
            unsafe { super::copy(&from[start..start + n], to.as_mut_ptr().add(start)) }
            let copied = |i: usize| (start..start + n).contains(&i);
            assert!((0..1100).all(|i| to[i] == if copied(i) { i as f32 } else { -1.0 }), "{start} {n}");
        }
    }
}
