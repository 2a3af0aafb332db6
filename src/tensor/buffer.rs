//! Zeroed, aligned memory.

use bytemuck::{Pod, Zeroable};
use memmap2::MmapMut;

use crate::error::{Error, Result};

/// The unit of aligned storage.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Alignment of every tensor in bytes.
pub const ALIGN: usize = 64;
/// Bytes from which on memory is mapped, and so given back when it is no longer used: an allocator may keep it, and what a
/// process takes is then more than what it holds.
const MAPPED: usize = 1 << 19;

/// A zero-initialised, 64-byte-aligned run of bytes.
pub struct Buffer(Memory);

enum Memory {
    Lines(Vec<Line>),
    Pages(MmapMut),
}

impl Buffer {
    /// At least `bytes` bytes, all zero.
    pub fn zeroed(bytes: usize) -> Self {
        // (As the allocator ends the process, where it has none.)
        Self::new(bytes).unwrap_or_else(|| std::alloc::handle_alloc_error(std::alloc::Layout::new::<Line>()))
    }

    /// The same for `what` may be larger than all memory.
    pub fn try_zeroed(bytes: usize, what: &str) -> Result<Self> {
        Self::new(bytes).ok_or_else(|| Error::Memory { what: what.into(), bytes })
    }

    fn new(bytes: usize) -> Option<Self> {
        if let Some(map) = pages(bytes) {
            return Some(Buffer(Memory::Pages(map)));
        }
        let (count, mut lines) = (bytes.div_ceil(ALIGN), Vec::new());
        lines.try_reserve_exact(count).ok()?;
        lines.resize(count, Line::zeroed());
        Some(Buffer(Memory::Lines(lines)))
    }

    /// Extends to at least `bytes` bytes; what is new is zero.
    pub fn grow(&mut self, bytes: usize) {
        if bytes > self.len() {
            let mut larger = Buffer::zeroed(bytes);
            larger.bytes_mut()[..self.len()].copy_from_slice(self.bytes());
            *self = larger;
        }
    }

    pub fn bytes(&self) -> &[u8] {
        match &self.0 {
            Memory::Lines(lines) => bytemuck::cast_slice(lines),
            Memory::Pages(map) => map,
        }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.0 {
            Memory::Lines(lines) => bytemuck::cast_slice_mut(lines),
            Memory::Pages(map) => map,
        }
    }

    pub fn len(&self) -> usize {
        self.bytes().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Pages of its own, where it is large.
fn pages(bytes: usize) -> Option<MmapMut> {
    let bytes = bytes.next_multiple_of(ALIGN);
    let map = (bytes >= MAPPED).then(|| MmapMut::map_anon(bytes).ok()).flatten()?;
    // In huge pages: a step that streams through hundreds of megabytes otherwise waits for page tables more than for memory.
    // Neighbouring maps are one to the system, so that a page may hold several tensors, if they were made before they are
    // written. A system without such pages gives small ones.
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    Some(map)
}

impl Default for Buffer {
    fn default() -> Self {
        Buffer(Memory::Lines(Vec::new()))
    }
}

impl AsMut<[u8]> for Buffer {
    fn as_mut(&mut self) -> &mut [u8] {
        self.bytes_mut()
    }
}

impl Clone for Buffer {
    fn clone(&self) -> Self {
        let mut copy = Buffer::zeroed(self.len());
        copy.bytes_mut().copy_from_slice(self.bytes());
        copy
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_there_is_is_an_error() {
        let refused = Buffer::try_zeroed(1 << 62, "this").err().map(|e| e.to_string());
        assert!(refused.is_some_and(|e| e.starts_with("this: ") && e.contains("GiB")));
        for bytes in [0, 1, MAPPED - 1, MAPPED, MAPPED + 1] {
            let buffer = Buffer::try_zeroed(bytes, "that").unwrap();
            assert!(buffer.len() >= bytes && buffer.len().is_multiple_of(ALIGN));
            assert!(buffer.bytes().iter().all(|b| *b == 0));
            assert_eq!(buffer.len(), Buffer::zeroed(bytes).len());
        }
    }
}
