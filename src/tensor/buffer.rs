//! Zeroed, aligned memory.

use bytemuck::{Pod, Zeroable};
use memmap2::MmapMut;

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
        let lines = bytes.div_ceil(ALIGN);
        Buffer(match pages(lines * ALIGN) {
            Some(map) => Memory::Pages(map),
            None => Memory::Lines(vec![Line::zeroed(); lines]),
        })
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
