//! Cuts one buffer into the pieces that a kernel call reads and writes, safely.

use smallvec::SmallVec;

/// A piece of a buffer: shared among readers, or handed to its one writer.
pub enum Piece<'a> {
    Read(&'a [u8]),
    Write(Option<&'a mut [u8]>),
}

/// The pieces for `cuts` (start, end, written?), which are sorted and do not overlap.
pub fn carve<'a>(
    buffer: &'a mut [u8],
    cuts: impl Iterator<Item = (usize, usize, bool)>,
) -> SmallVec<[Piece<'a>; 16]> {
    let mut pieces = SmallVec::new();
    let (mut rest, mut base) = (buffer, 0);
    for (start, end, write) in cuts {
        let (_, tail) = rest.split_at_mut(start - base);
        let (piece, tail) = tail.split_at_mut(end - start);
        pieces.push(match write {
            true => Piece::Write(Some(piece)),
            false => Piece::Read(piece),
        });
        (rest, base) = (tail, end);
    }
    pieces
}

impl<'a> Piece<'a> {
    /// The bytes of a piece that nobody writes (empty for one that is written).
    pub fn read(&self) -> &'a [u8] {
        match self {
            Piece::Read(bytes) => bytes,
            Piece::Write(_) => &[],
        }
    }

    /// The bytes of a written piece, once.
    pub fn write(&mut self) -> Option<&'a mut [u8]> {
        match self {
            Piece::Read(_) => None,
            Piece::Write(bytes) => bytes.take(),
        }
    }
}
