//! The protobuf wire format, as far as editing a file in place needs it.
//!
//! A model is never re-encoded: that would drop unknown fields and reorder the rest. Instead an
//! [`Edit`] replaces a range of bytes, and the lengths of the messages around it are corrected;
//! everything else is copied verbatim.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::ops::Range;

/// Bytes that are not a well-formed protobuf message, or an edit that does not fit them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("malformed protobuf at byte {at}: {what}")]
pub struct WireError {
    pub at: usize,
    pub what: &'static str,
}

fn bad<T>(at: usize, what: &'static str) -> Result<T, WireError> {
    Err(WireError { at, what })
}

/// The wire type of length-delimited fields: messages, strings, bytes, packed numbers.
pub const LEN: u8 = 2;
/// Depth to which the groups of ancient writers may nest before they are refused.
const MAX_GROUPS: usize = 64;
/// The largest file protobuf's own readers accept.
const MAX_MESSAGE: usize = i32::MAX as usize;

/// One field as it lies in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Field {
    pub number: u32,
    pub wire: u8,
    /// Key, length and payload.
    pub whole: Range<usize>,
    /// The length, for wire type 2; else empty.
    pub length: Range<usize>,
    /// What follows the key, or the length.
    pub payload: Range<usize>,
}

/// A varint at `at`, which must end before `end`: its value and the position after it.
pub fn varint(bytes: &[u8], at: usize, end: usize) -> Result<(u64, usize), WireError> {
    let mut value = 0u64;
    for i in 0..10 {
        let pos = at + i;
        let Some(&b) = bytes.get(pos).filter(|_| pos < end) else { return bad(at, "a number is cut off") };
        // The tenth byte carries one bit.
        if i == 9 && b > 1 {
            return bad(at, "a number is longer than 64 bits");
        }
        value |= u64::from(b & 0x7f) << (7 * i);
        if b & 0x80 == 0 {
            return Ok((value, pos + 1));
        }
    }
    bad(at, "a number is longer than 64 bits")
}

/// Appends `value` as a varint.
pub fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Appends a length-delimited field.
pub fn put_field(out: &mut Vec<u8>, number: u32, payload: &[u8]) {
    put_varint(out, u64::from(number) << 3 | u64::from(LEN));
    put_varint(out, payload.len() as u64);
    out.extend_from_slice(payload);
}

/// Appends a varint field.
pub fn put_int(out: &mut Vec<u8>, number: u32, value: i64) {
    put_varint(out, u64::from(number) << 3);
    put_varint(out, value as u64);
}

/// The field that starts at `at` in a message that ends at `end`.
fn field(bytes: &[u8], at: usize, end: usize) -> Result<Field, WireError> {
    let (key, after) = varint(bytes, at, end)?;
    let (number, wire) = (key >> 3, (key & 7) as u8);
    if number == 0 || number > 0x1fff_ffff {
        return bad(at, "field number out of range");
    }
    let number = number as u32;
    let fixed = |n: usize| match after.checked_add(n) {
        Some(stop) if stop <= end => Ok(after..stop),
        _ => bad(at, "a field is cut off"),
    };
    let mut length = after..after;
    let payload = match wire {
        0 => after..varint(bytes, after, end)?.1,
        1 => fixed(8)?,
        5 => fixed(4)?,
        LEN => {
            let (n, start) = varint(bytes, after, end)?;
            length = after..start;
            match usize::try_from(n).ok().and_then(|n| start.checked_add(n)) {
                Some(stop) if stop <= end => start..stop,
                _ => return bad(at, "a field is longer than the message around it"),
            }
        }
        3 => {
            let stop = skip_group(bytes, after, end, number)?;
            return Ok(Field { number, wire, whole: at..stop, length, payload: after..stop });
        }
        _ => return bad(at, "unknown wire type"),
    };
    Ok(Field { number, wire, whole: at..payload.end, length, payload })
}

/// The position after the end-group key of the group that was opened as `number`.
fn skip_group(bytes: &[u8], mut at: usize, end: usize, number: u32) -> Result<usize, WireError> {
    let mut open = vec![number];
    loop {
        let (key, after) = varint(bytes, at, end)?;
        let n = key >> 3;
        match key & 7 {
            3 => {
                if open.len() >= MAX_GROUPS {
                    return bad(at, "groups nest too deeply");
                }
                open.push(n.min(u64::from(u32::MAX)) as u32);
                at = after;
            }
            4 => {
                if open.pop().map(u64::from) != Some(n) {
                    return bad(at, "a group ends that was not open");
                }
                at = after;
                if open.is_empty() {
                    return Ok(at);
                }
            }
            _ => at = field(bytes, at, end)?.whole.end,
        }
    }
}

/// The fields of the message that fills `range`, in order.
pub fn fields(bytes: &[u8], range: Range<usize>) -> impl Iterator<Item = Result<Field, WireError>> + '_ {
    let end = range.end.min(bytes.len());
    let mut at = range.start;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let f = field(bytes, at, end);
        // After an error there is no next field.
        at = f.as_ref().map_or(end, |f| f.whole.end);
        Some(f)
    })
}

/// Every field reached by descending through the field numbers of `path`, in the order a reader
/// that merges repeated messages meets them: `[7, 1]` in a ModelProto is every node.
pub fn find_all(bytes: &[u8], path: &[u32]) -> Result<Vec<Field>, WireError> {
    descend(bytes, 0..bytes.len(), path)
}

/// As [`find_all`], from the message that fills `range`.
pub fn descend(bytes: &[u8], range: Range<usize>, path: &[u32]) -> Result<Vec<Field>, WireError> {
    let mut parents = vec![range];
    let mut found = Vec::new();
    for (depth, &number) in path.iter().enumerate() {
        found.clear();
        for p in parents.drain(..) {
            for f in fields(bytes, p) {
                let f = f?;
                if f.number == number {
                    if depth + 1 < path.len() && f.wire != LEN {
                        return bad(f.whole.start, "a number where a message is expected");
                    }
                    found.push(f);
                }
            }
        }
        parents.extend(found.iter().map(|f: &Field| f.payload.clone()));
    }
    Ok(found)
}

/// The chain of fields along `path` whose payloads contain position `at`, outermost first.
pub fn enclosing(bytes: &[u8], path: &[u32], at: usize) -> Result<Vec<Field>, WireError> {
    let mut range = 0..bytes.len();
    let mut chain = Vec::with_capacity(path.len());
    for &number in path {
        let mut hit = None;
        for f in fields(bytes, range.clone()) {
            let f = f?;
            if f.number == number && f.payload.start <= at && at <= f.payload.end {
                hit = Some(f);
                break;
            }
            if f.whole.start > at {
                break;
            }
        }
        let Some(f) = hit else { return bad(at, "the field to be edited is not where it was") };
        range = f.payload.clone();
        chain.push(f);
    }
    Ok(chain)
}

/// A replacement of `range` by `bytes`. An empty range inserts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Edit {
    /// Field numbers of the messages around the range, outermost first. Their lengths are
    /// corrected; not looked at when the replacement is as long as the range.
    pub path: Vec<u32>,
    pub range: Range<usize>,
    pub bytes: Vec<u8>,
}

/// A part of the edited file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Segment {
    /// Bytes of the original.
    Copy(Range<usize>),
    New(Vec<u8>),
}

impl Segment {
    pub fn bytes<'a>(&'a self, original: &'a [u8]) -> &'a [u8] {
        match self {
            Segment::New(bytes) => bytes,
            Segment::Copy(range) => original.get(range.clone()).unwrap_or_default(),
        }
    }
}

struct Enclosing {
    depth: usize,
    length: Range<usize>,
    payload_len: usize,
    parent: Option<usize>,
    delta: i128,
}

/// The edited file as a list of segments, so that a large file is never held twice.
///
/// Fails when edits overlap, leave the file, or `path` does not lead to the range.
pub fn segments(original: &[u8], edits: Vec<Edit>) -> Result<Vec<Segment>, WireError> {
    // Every message around an edit, by where its payload starts.
    let mut messages: BTreeMap<usize, Enclosing> = BTreeMap::new();
    for e in &edits {
        if e.range.start > e.range.end || e.range.end > original.len() {
            return bad(e.range.start, "an edit lies outside the file");
        }
        if e.bytes.len() == e.range.len() {
            continue;
        }
        let mut parent = None;
        for (depth, f) in enclosing(original, &e.path, e.range.start)?.into_iter().enumerate() {
            if f.wire != LEN || e.range.end > f.payload.end {
                return bad(e.range.start, "an edit crosses the end of a message");
            }
            let key = f.payload.start;
            messages.entry(key).or_insert(Enclosing {
                depth,
                length: f.length,
                payload_len: f.payload.len(),
                parent,
                delta: 0,
            });
            parent = Some(key);
        }
        if let Some(m) = parent.and_then(|p| messages.get_mut(&p)) {
            m.delta += e.bytes.len() as i128 - e.range.len() as i128;
        }
    }

    let mut all: Vec<(Range<usize>, Vec<u8>)> = edits.into_iter().map(|e| (e.range, e.bytes)).collect();
    // Innermost first: a longer length makes the message around it longer too.
    let mut order: Vec<(usize, usize)> = messages.iter().map(|(&k, m)| (m.depth, k)).collect();
    order.sort_unstable_by(|a, b| b.cmp(a));
    for (_, key) in order {
        let Some(m) = messages.get(&key) else { continue };
        let (mut delta, parent) = (m.delta, m.parent);
        if delta != 0 {
            let length = m.payload_len as i128 + delta;
            let Some(length) = u64::try_from(length).ok().filter(|&n| n <= MAX_MESSAGE as u64) else {
                return bad(key, "a message would grow past 2 GiB, protobuf's limit");
            };
            let mut bytes = Vec::new();
            put_varint(&mut bytes, length);
            delta += bytes.len() as i128 - m.length.len() as i128;
            all.push((m.length.clone(), bytes));
        }
        if let Some(p) = parent.and_then(|p| messages.get_mut(&p)) {
            p.delta += delta;
        }
    }

    // Stable, so that several insertions at one place keep their order.
    all.sort_by_key(|(r, _)| (r.start, r.end));
    let mut out = Vec::with_capacity(2 * all.len() + 1);
    let mut at = 0;
    for (range, bytes) in all {
        if range.start < at {
            return bad(range.start, "two edits overlap");
        }
        if range.start > at {
            out.push(Segment::Copy(at..range.start));
        }
        if !bytes.is_empty() {
            out.push(Segment::New(bytes));
        }
        at = range.end;
    }
    if at < original.len() {
        out.push(Segment::Copy(at..original.len()));
    }
    Ok(out)
}

/// Where the segments put a range of the original; `None` where they do not copy all of it.
pub fn moved(segments: &[Segment], range: &Range<usize>) -> Option<usize> {
    let mut at = 0;
    for s in segments {
        match s {
            Segment::Copy(r) if r.start <= range.start && range.end <= r.end => {
                return Some(at + range.start - r.start);
            }
            Segment::Copy(r) => at += r.len(),
            Segment::New(bytes) => at += bytes.len(),
        }
    }
    None
}

/// Is `other` what the segments make of `original`, but for some places of it?
pub fn equal(original: &[u8], segments: &[Segment], places: &[Range<usize>], other: &[u8]) -> bool {
    let mut places = places.to_vec();
    places.sort_by_key(|p| p.start);
    let (mut places, mut at) = (places.into_iter().peekable(), 0);
    for s in segments {
        let part = s.bytes(original);
        let (end, mut from) = (at + part.len(), at);
        while from < end {
            let place = places.next_if(|p| p.start < end);
            let to = place.as_ref().map_or(end, |p| p.start);
            if to > from && other.get(from..to) != Some(&part[from - at..to - at]) {
                return false;
            }
            from = place.map_or(end, |p| p.end);
        }
        at = end;
    }
    at == other.len()
}

/// Writes what `segments` of `original` stand for.
pub fn write(original: &[u8], segments: &[Segment], to: &mut impl Write) -> io::Result<()> {
    segments.iter().try_for_each(|s| to.write_all(s.bytes(original)))
}

/// As [`write`], to memory.
pub fn concat(original: &[u8], segments: &[Segment]) -> Vec<u8> {
    let mut out = Vec::with_capacity(original.len());
    segments.iter().for_each(|s| out.extend_from_slice(s.bytes(original)));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn msg(number: u32, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        put_field(&mut out, number, payload);
        out
    }

    #[test]
    fn what_is_copied_is_found_again_after_a_splice() {
        let original = b"abcdefghij";
        let segments = [Segment::Copy(0..3), Segment::New(b"XYZW".to_vec()), Segment::Copy(5..10)];
        let out = concat(original, &segments);
        assert_eq!(out, b"abcXYZWfghij");
        for range in [0..3, 1..2, 5..10, 6..9] {
            let at = moved(&segments, &range).unwrap();
            assert_eq!(out[at..at + range.len()], original[range]);
        }
        for range in [2..4, 3..5, 4..6, 2..6] {
            assert_eq!(moved(&segments, &range), None);
        }
        assert!(equal(original, &segments, &[], &out));
        assert!(equal(original, &segments, &[8..10, 0..2], b"..cXYZWf..ij"));
        for other in
            [&b"..cXYZWf..ik"[..], b"..cXYZwf..ij", b"..dXYZWf..ij", b"..cXYZWf..i", b"..cXYZWf..ijk"]
        {
            assert!(!equal(original, &segments, &[8..10, 0..2], other));
        }
    }

    fn apply(original: &[u8], edits: Vec<Edit>) -> Result<Vec<u8>, WireError> {
        Ok(concat(original, &segments(original, edits)?))
    }

    #[test]
    fn a_splice_corrects_every_length_and_nothing_else() {
        // Length 120 grows past 127: the varint of each message around takes a byte more.
        let inner = msg(9, &[7; 110]);
        let mid = [msg(2, b"keep"), msg(5, &inner)].concat();
        let mut file = vec![0x98, 0x06, 0x01]; // unknown field 99
        file.extend(msg(7, &mid));
        file.extend(msg(7, b""));
        let f = find_all(&file, &[7, 5, 9]).unwrap();
        assert_eq!(f.len(), 1);
        let out = apply(
            &file,
            vec![Edit { path: vec![7, 5, 9], range: f[0].payload.clone(), bytes: vec![8; 300] }],
        )
        .unwrap();
        let want = [
            vec![0x98, 0x06, 0x01],
            msg(7, &[msg(2, b"keep"), msg(5, &msg(9, &[8; 300]))].concat()),
            msg(7, b""),
        ]
        .concat();
        assert_eq!(out, want);
        // Removing the whole field, and inserting two.
        let whole = f[0].whole.clone();
        let out = apply(
            &file,
            vec![
                Edit { path: vec![7, 5], range: whole.clone(), bytes: vec![] },
                Edit { path: vec![7, 5], range: whole.end..whole.end, bytes: msg(1, b"a") },
                Edit { path: vec![7, 5], range: whole.end..whole.end, bytes: msg(2, b"b") },
                Edit { path: vec![], range: 2..3, bytes: vec![0x02] },
            ],
        )
        .unwrap();
        let want = [
            vec![0x98, 0x06, 0x02],
            msg(7, &[msg(2, b"keep"), msg(5, &[msg(1, b"a"), msg(2, b"b")].concat())].concat()),
            msg(7, b""),
        ]
        .concat();
        assert_eq!(out, want);
    }

    #[test]
    fn wrong_edits_are_errors() {
        let file = msg(7, &msg(5, b"abcdef"));
        let edit = |path: &[u32], range: Range<usize>, n: usize| Edit {
            path: path.to_vec(),
            range,
            bytes: vec![0; n],
        };
        assert!(apply(&file, vec![edit(&[7, 4], 4..6, 9)]).is_err());
        assert!(apply(&file, vec![edit(&[7, 5], 4..99, 9)]).is_err());
        assert!(apply(&file, vec![edit(&[7, 5], 4..6, 2), edit(&[7, 5], 5..7, 2)]).is_err());
        assert!(apply(&file, vec![edit(&[7, 5], 4..6, 2)]).is_ok());
    }

    #[test]
    fn groups_are_skipped_and_hostile_bytes_refused() {
        let mut file = vec![0x0b, 0x10, 0x05, 0x0c]; // group 1 with field 2 = 5
        file.extend(msg(7, b"x"));
        assert_eq!(find_all(&file, &[7]).unwrap().len(), 1);
        let refused: [&[u8]; 7] = [
            &[0x0b; 100],
            &[0x0b, 0x14],
            &[0x3a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01],
            &[0x80; 11],
            &[0x00, 0x01],
            &[0x0c],
            &[0x3d, 1, 2, 3],
        ];
        for bytes in refused {
            assert!(find_all(bytes, &[7]).is_err(), "{bytes:?}");
        }
    }
}
