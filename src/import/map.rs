//! Files as byte slices, without reading them.
//!
//! The one place outside the kernels with `unsafe` code: a memory map.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::path::Path;

use bytes::Bytes;
use memmap2::Mmap;

use crate::error::{Error, Result};

/// Maps a regular file read-only. Slices of the result alias the map and keep it alive.
///
/// Folders, pipes and devices are refused; an empty file is an empty slice.
pub fn map(path: &Path) -> Result<Bytes> {
    // Asked before opening: opening a pipe would wait for a writer.
    let meta = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
    if !meta.is_file() {
        return Err(Error::file(path, "is not a regular file"));
    }
    if meta.len() == 0 {
        return Ok(Bytes::new());
    }
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    map_file(&file).map_err(|e| Error::io(path, e))
}

/// A mapped file without a name, of what `fill` writes.
pub fn unnamed(fill: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<Bytes> {
    let mut file = tempfile::tempfile()?;
    fill(&mut file)?;
    map_file(&file)
}

fn map_file(file: &File) -> io::Result<Bytes> {
    // SAFETY: the map is read-only and nothing in this crate writes to or truncates a file that may
    // be mapped: exports write a new file and rename it over the old name, which leaves the mapped
    // inode as it was, and nobody else knows an unnamed file. Another process that changes the file
    // in place while it is mapped is outside what a library can exclude; it is the documented
    // condition of mapping.
    Ok(Bytes::from_owner(unsafe { Mmap::map(file) }?))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn maps_a_file_and_refuses_what_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, b"abc").unwrap();
        let bytes = map(&path).unwrap();
        assert_eq!(&bytes[..], b"abc");
        // The map outlives a rename over its name.
        std::fs::write(dir.path().join("b"), b"xyz").unwrap();
        std::fs::rename(dir.path().join("b"), &path).unwrap();
        assert_eq!(&bytes[..], b"abc");
        std::fs::write(dir.path().join("empty"), b"").unwrap();
        assert!(map(&dir.path().join("empty")).unwrap().is_empty());
        assert!(map(dir.path()).is_err());
        assert!(map(&dir.path().join("absent")).is_err());
    }

    #[test]
    fn an_unnamed_file_holds_what_was_written() {
        let bytes = unnamed(|f| f.write_all(b"abc").and_then(|()| f.write_all(b"def"))).unwrap();
        assert_eq!(&bytes[..], b"abcdef");
        assert!(unnamed(|_| Err(io::Error::other("full"))).is_err());
    }
}
