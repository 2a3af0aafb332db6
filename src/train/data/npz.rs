//! NumPy's `.npz`: reading any numeric array, and writing.
//!
//! Headers are parsed by `ndarray-npy`; elements go straight from the archive into a [`Tensor`], never by way of a
//! second copy, and never into memory that the file's own size does not warrant.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, Write};
use std::path::{Path, PathBuf};

use ndarray_npy::npy::header::{Header, Layout};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

use crate::atomic;
use crate::dtype_dispatch;
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

/// Every array of an `.npz` file, in the file's order. Arrays in Fortran order come out in C order; `float16`,
/// `bool` and all integers keep their type.
///
/// Fails on a damaged file, and on arrays that are big-endian, complex, strings, objects or records.
pub fn read_npz(path: impl AsRef<Path>) -> Result<Vec<(String, Tensor)>> {
    let mut npz = Npz::open(path)?;
    let names = npz.names().to_vec();
    names.into_iter().map(|n| npz.read(&n).map(|t| (n, t))).collect()
}

/// Writes arrays to an `.npz` file, uncompressed, as `numpy.load(path)[name]` reads them: in a temporary file in the
/// same folder, synced, then renamed. The same arrays make the same bytes. `bfloat16`, which NumPy does not have,
/// is written as float32.
///
/// Fails when the file cannot be written, or when two arrays have the same name.
pub fn write_npz(path: impl AsRef<Path>, arrays: &[(&str, &Tensor)]) -> Result<()> {
    let path = path.as_ref();
    let bad = |name: &str, e: &dyn std::fmt::Display| Error::file(path, format!("array '{name}': {e}"));
    atomic::write(path, |file| {
        let mut zip = ZipWriter::new(file);
        for (name, t) in arrays {
            let wide;
            let t = if t.dtype() == DType::BF16 || t.dtype().is_narrow() {
                wide = t.cast(DType::F32);
                &wide
            } else {
                t
            };
            let options = SimpleFileOptions::default()
                .compression_method(CompressionMethod::Stored)
                .large_file(t.bytes().len() as u64 > u32::MAX as u64 / 2);
            zip.start_file(format!("{name}.npy"), options).map_err(|e| bad(name, &e))?;
            zip.write_all(&header(t))
                .and_then(|()| zip.write_all(t.bytes()))
                .map_err(|e| Error::io(path, e))?;
        }
        zip.finish().map_err(|e| Error::file(path, e.to_string()))?;
        Ok(())
    })
}

fn header(t: &Tensor) -> Vec<u8> {
    let descr = match t.dtype() {
        DType::F64 => "<f8",
        DType::F16 => "<f2",
        DType::I8 => "|i1",
        DType::I16 => "<i2",
        DType::I32 => "<i4",
        DType::I64 => "<i8",
        DType::U8 => "|u1",
        DType::U16 => "<u2",
        DType::U32 => "<u4",
        DType::U64 => "<u8",
        DType::Bool => "|b1",
        // What numpy has no type for is written as float32.
        _ => "<f4",
    };
    let dims: Vec<String> = t.dims().iter().map(usize::to_string).collect();
    let comma = if dims.len() == 1 { "," } else { "" };
    let dict =
        format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({}{comma}), }}", dims.join(", "));
    // Version 1.0: magic, version, length of the rest, which pads the whole to a multiple of 64.
    let total = (10 + dict.len() + 1).next_multiple_of(64);
    let mut out = b"\x93NUMPY\x01\x00".to_vec();
    out.extend_from_slice(&((total - 10) as u16).to_le_bytes());
    out.extend_from_slice(dict.as_bytes());
    out.resize(total - 1, b' ');
    out.push(b'\n');
    out
}

/// An array as a whole `.npy` file.
pub fn npy_bytes(t: &Tensor) -> Vec<u8> {
    [&header(t)[..], t.bytes()].concat()
}

/// The next of several `.npy` files, one after the other: what a program writes with `numpy.save` to a pipe. `None` at the
/// end.
///
/// Fails where the stream ends within an array, and on what [`read_npz`] refuses.
pub fn read_npy(r: &mut impl Read) -> std::result::Result<Option<Tensor>, String> {
    let mut first = [0u8; 1];
    match r.read(&mut first) {
        Ok(0) => return Ok(None),
        Ok(_) => {}
        Err(e) => return Err(e.to_string()),
    }
    let header = read_header(&mut (&first[..]).chain(&mut *r))?;
    let dtype = dtype_of(&header)?;
    let need = header.shape.iter().try_fold(dtype.size(), |n, &d| n.checked_mul(d));
    // No file's size bounds what a pipe may claim: memory is taken as the elements come.
    let need = need.filter(|n| *n <= isize::MAX as usize);
    let need = need.ok_or_else(|| format!("shape {:?} overflows", header.shape))?;
    let mut bytes = Vec::new();
    r.take(need as u64).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
    finish(&mut bytes.as_slice(), &header, dtype, need).map(Some)
}

/// An open `.npz` file, read array by array.
pub struct Npz<R: Read + Seek = BufReader<File>> {
    path: PathBuf,
    zip: ZipArchive<R>,
    names: Vec<String>,
    bytes: u64,
}

impl Npz {
    pub fn open(path: impl AsRef<Path>) -> Result<Npz> {
        let path = path.as_ref();
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        let bytes = file.metadata().map_err(|e| Error::io(path, e))?.len();
        Npz::new(path, BufReader::with_capacity(1 << 16, file), bytes)
    }
}

impl<R: Read + Seek> Npz<R> {
    fn new(path: &Path, reader: R, bytes: u64) -> Result<Npz<R>> {
        let zip = ZipArchive::new(reader).map_err(|e| Error::file(path, format!("not an .npz file: {e}")))?;
        let names = zip.file_names().filter_map(|n| n.strip_suffix(".npy")).map(str::to_string).collect();
        Ok(Npz { path: path.to_path_buf(), zip, names, bytes })
    }

    /// Names of the arrays, without the `.npy` that the archive gives them.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// One array.
    pub fn read(&mut self, name: &str) -> Result<Tensor> {
        let path = self.path.clone();
        self.entry(name).map_err(|what| Error::file(path, format!("array '{name}': {what}")))
    }

    fn entry(&mut self, name: &str) -> std::result::Result<Tensor, String> {
        let entry_name = format!("{name}.npy");
        let (header, size) = {
            let mut entry = self.zip.by_name(&entry_name).map_err(|e| e.to_string())?;
            let header = read_header(&mut entry)?;
            // What the archive says must itself be possible: nothing is larger than the file, and deflate makes at
            // most 1032 bytes of one.
            let packed = entry.compressed_size().min(self.bytes);
            let most = match entry.compression() {
                CompressionMethod::Stored => packed,
                _ => packed.saturating_mul(1032),
            };
            let dtype = dtype_of(&header)?;
            let need = header
                .shape
                .iter()
                .try_fold(dtype.size(), |n, &d| n.checked_mul(d))
                .filter(|&n| n <= isize::MAX as usize)
                .ok_or_else(|| format!("shape {:?} overflows", header.shape))?;
            if need as u64 > most.min(entry.size()) {
                return Err(format!(
                    "{dtype} of shape {:?} takes {need} bytes, but the file holds {}",
                    header.shape,
                    most.min(entry.size())
                ));
            }
            if need <= TRUSTED {
                return finish(&mut entry, &header, dtype, need);
            }
            (header, need)
        };
        // A small file can still claim gigabytes: count what is really there before taking memory for it.
        let dtype = dtype_of(&header)?;
        let mut entry = self.zip.by_name(&entry_name).map_err(|e| e.to_string())?;
        if entry.compression() != CompressionMethod::Stored {
            read_header(&mut entry)?;
            let real = io::copy(&mut entry, &mut io::sink()).map_err(|e| e.to_string())?;
            if real != size as u64 {
                return Err(format!("{real} bytes of elements where shape {:?} takes {size}", header.shape));
            }
            drop(entry);
            entry = self.zip.by_name(&entry_name).map_err(|e| e.to_string())?;
        }
        read_header(&mut entry)?;
        finish(&mut entry, &header, dtype, size)
    }
}

/// Largest array whose claimed size is taken at its word, in bytes.
const TRUSTED: usize = 256 << 20;
/// Largest header read, in bytes: the format's own limit for version 1.
const HEADER: usize = 1 << 16;
/// Deepest nesting of brackets: dict, list of fields, field, its shape.
const NESTING: usize = 4;

fn read_header(r: &mut impl Read) -> std::result::Result<Header, String> {
    let mut bytes = vec![0u8; 8];
    let cut = |e: io::Error| format!("no array header: {e}");
    r.read_exact(&mut bytes).map_err(cut)?;
    if &bytes[..6] != b"\x93NUMPY" {
        return Err("not an array (no NUMPY magic)".into());
    }
    let long = bytes[6] >= 2;
    let mut length = [0u8; 4];
    let field = &mut length[..if long { 4 } else { 2 }];
    r.read_exact(field).map_err(cut)?;
    bytes.extend_from_slice(field);
    let length = u32::from_le_bytes(length) as usize;
    if length > HEADER {
        return Err(format!("a header of {length} bytes"));
    }
    let start = bytes.len();
    bytes.resize(start + length, 0);
    r.read_exact(&mut bytes[start..]).map_err(cut)?;
    // The parser recurses, and tries alternatives at each level: what nests deeper than any dtype does not reach it.
    let mut depth = 0usize;
    for b in &bytes[start..] {
        match b {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > NESTING {
            return Err("its header nests too deep: records are not read".into());
        }
    }
    Header::from_reader(&mut bytes.as_slice()).map_err(|e| e.to_string())
}

fn dtype_of(header: &Header) -> std::result::Result<DType, String> {
    let Some(descr) = header.type_descriptor.as_string() else {
        return Err(format!("records are not read (dtype {})", header.type_descriptor));
    };
    let (order, kind) = match descr.as_bytes() {
        [o @ (b'<' | b'>' | b'|' | b'='), rest @ ..] => (*o, std::str::from_utf8(rest).unwrap_or("")),
        _ => (b'|', descr.as_str()),
    };
    let dtype = match kind {
        "f2" => DType::F16,
        "f4" => DType::F32,
        "f8" => DType::F64,
        "i1" => DType::I8,
        "i2" => DType::I16,
        "i4" => DType::I32,
        "i8" => DType::I64,
        "u1" => DType::U8,
        "u2" => DType::U16,
        "u4" => DType::U32,
        "u8" => DType::U64,
        "b1" => DType::Bool,
        _ => {
            let what = match kind.as_bytes().first() {
                Some(b'U' | b'S') => "strings are not read",
                Some(b'O') => "Python objects are not read",
                Some(b'c') => "complex numbers are not read",
                Some(b'M' | b'm') => "dates are not read",
                _ => "this type is not read",
            };
            return Err(format!("{what} (dtype '{descr}')"));
        }
    };
    if order == b'>' && dtype.size() > 1 {
        return Err(format!("big-endian (dtype '{descr}'): store it with .astype('<{kind}')"));
    }
    Ok(dtype)
}

/// The elements that follow a header, of exactly `need` bytes.
fn finish(
    r: &mut impl Read,
    header: &Header,
    dtype: DType,
    need: usize,
) -> std::result::Result<Tensor, String> {
    // Refused by the allocator is an error here; the tensor's own allocation would abort.
    Vec::<u8>::new().try_reserve_exact(need).map_err(|_| format!("{need} bytes: not enough memory"))?;
    let mut t = Tensor::zeros(dtype, &header.shape);
    r.read_exact(t.bytes_mut()).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => format!("truncated: shape {:?} takes {need} bytes", header.shape),
        _ => e.to_string(),
    })?;
    // The archive's checksum is compared at its end.
    let more = io::copy(&mut r.take(64), &mut io::sink()).map_err(|e| e.to_string())?;
    if more > 0 {
        return Err(format!("more bytes than shape {:?} takes", header.shape));
    }
    if dtype == DType::Bool {
        for b in t.bytes_mut() {
            *b = (*b != 0) as u8;
        }
    }
    if header.layout == Layout::Fortran && header.shape.iter().filter(|&&d| d > 1).count() > 1 {
        t = from_fortran(&t)?;
    }
    Ok(t)
}

/// Elements laid out with the first index fastest → with the last fastest.
fn from_fortran(t: &Tensor) -> std::result::Result<Tensor, String> {
    let mut out = Tensor::zeros(t.dtype(), t.dims());
    dtype_dispatch!(t.dtype(), T => {
        let src: &[T] = t.get().map_err(|e| e.to_string())?;
        let dims = t.dims();
        let mut strides = vec![1usize; dims.len()];
        for a in 1..dims.len() {
            strides[a] = strides[a - 1] * dims[a - 1];
        }
        let mut index = vec![0usize; dims.len()];
        let mut at = 0;
        for o in out.get_mut::<T>().map_err(|e| e.to_string())? {
            *o = src[at];
            for a in (0..dims.len()).rev() {
                index[a] += 1;
                at += strides[a];
                if index[a] < dims[a] {
                    break;
                }
                at -= strides[a] * dims[a];
                index[a] = 0;
            }
        }
    });
    Ok(out)
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/data").join(name)
    }

    fn from_bytes(bytes: &[u8]) -> Result<Vec<Tensor>> {
        let mut npz = Npz::new(Path::new("f.npz"), Cursor::new(bytes), bytes.len() as u64)?;
        let names = npz.names().to_vec();
        names.iter().map(|n| npz.read(n)).collect()
    }

    /// A stored archive of one entry.
    fn zipped(npy: &[u8]) -> Vec<u8> {
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        zip.start_file("a.npy", SimpleFileOptions::default()).unwrap();
        zip.write_all(npy).unwrap();
        zip.finish().unwrap().into_inner()
    }

    fn npy(dict: &str, data: &[u8]) -> Vec<u8> {
        let mut out = b"\x93NUMPY\x01\x00".to_vec();
        out.extend(((dict.len() + 1) as u16).to_le_bytes());
        [out.as_slice(), dict.as_bytes(), b"\n", data].concat()
    }

    fn fails(bytes: &[u8], part: &str) {
        let e = from_bytes(bytes).unwrap_err().to_string();
        assert!(e.contains(part), "{e}");
    }

    #[test]
    fn reads_what_numpy_writes() {
        for file in ["numpy.npz", "compressed.npz"] {
            let arrays = read_npz(fixture(file)).unwrap();
            assert_eq!(arrays.len(), 12 + 6 + 3);
            for (name, t) in &arrays {
                let want: Vec<f64> = match name.as_str() {
                    "scalar" => vec![2.5],
                    "empty" => vec![],
                    n if n.ends_with("bool") => (0..24).map(|i| (i % 2) as f64).collect(),
                    _ => (0..t.len()).map(|i| (i % 5) as f64).collect(),
                };
                assert_eq!(t.to_f64(), want, "{file}: {name}");
                if let Some((_, dtype)) = name.split_once('_') {
                    assert_eq!((t.dtype().to_string().as_str(), t.dims()), (dtype, [2, 3, 4].as_slice()));
                }
            }
            let dims = |n: &str| arrays.iter().find(|a| a.0 == n).unwrap().1.dims().to_vec();
            assert_eq!(
                (dims("scalar"), dims("empty"), dims("grad.layer1/conv:0")),
                (vec![], vec![0, 3], vec![3])
            );
        }
    }

    #[test]
    fn refuses_what_it_cannot_read_and_says_why() {
        let mut npz = Npz::open(fixture("refused.npz")).unwrap();
        let cases = [
            ("big", "big-endian"),
            ("text", "strings"),
            ("complex", "complex"),
            ("object", "objects"),
            ("records", "records"),
            ("date", "dates"),
            ("none", "not found"),
        ];
        for (name, part) in cases {
            let e = npz.read(name).unwrap_err().to_string();
            assert!(e.contains(part) && e.contains(&format!("'{name}'")) && e.contains("refused.npz"), "{e}");
        }
    }

    #[test]
    fn writes_what_it_reads_and_the_same_bytes_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.npz");
        let all = DType::WIDE.into_iter().filter(|d| *d != DType::BF16);
        let mut arrays: Vec<(String, Tensor)> = all
            .map(|d| {
                (format!("/a:0/{d}"), Tensor::ints(&[0, 1, 1, 0, 0, 1]).reshaped(&[2, 3]).unwrap().cast(d))
            })
            .collect();
        arrays.push(("s".into(), Tensor::scalar(1.5f32)));
        arrays.push(("none".into(), Tensor::zeros(DType::F32, &[3, 0])));
        let named: Vec<(&str, &Tensor)> = arrays.iter().map(|(n, t)| (n.as_str(), t)).collect();
        write_npz(&path, &named).unwrap();
        let back = read_npz(&path).unwrap();
        assert_eq!(back.len(), arrays.len());
        for ((n, t), (m, u)) in arrays.iter().zip(&back) {
            assert_eq!((n, t.dtype(), t.dims(), t.bytes()), (m, u.dtype(), u.dims(), u.bytes()));
        }
        let bytes = std::fs::read(&path).unwrap();
        write_npz(&path, &named).unwrap();
        assert_eq!(bytes, std::fs::read(&path).unwrap());
        // Halves that NumPy lacks are widened.
        write_npz(&path, &[("b", &Tensor::scalar(1.5f32).cast(DType::BF16))]).unwrap();
        assert_eq!(read_npz(&path).unwrap()[0].1.get::<f32>().unwrap(), [1.5]);
        // A write that fails leaves the old file and nothing else.
        let t = Tensor::scalar(1u8);
        assert!(write_npz(&path, &[("a", &t), ("a", &t)]).is_err());
        assert_eq!(read_npz(&path).unwrap()[0].0, "b");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(write_npz(dir.path().join("no/such.npz"), &[("a", &t)]).is_err());
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            std::fs::write(dir.path().join("plain"), b"").unwrap();
            let mode = |p: &Path| std::fs::metadata(p).unwrap().permissions().mode();
            assert_eq!(mode(&path), mode(&dir.path().join("plain")));
        }
    }

    #[test]
    fn claims_beyond_the_file_are_errors() {
        let f4 = |shape: &str| format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}");
        assert_eq!(from_bytes(&zipped(&npy(&f4("(2,)"), &[0; 8]))).unwrap()[0].dims(), [2]);
        fails(&zipped(&npy(&f4("(1000000000000,)"), &[0; 8])), "takes 4000000000000 bytes");
        fails(&zipped(&npy(&f4("(4294967296, 4294967296, 2)"), &[0; 8])), "overflows");
        fails(&zipped(&npy(&f4("(99999999999999999999999999,)"), &[0; 8])), "shape");
        fails(&zipped(&npy(&f4("(-1,)"), &[0; 8])), "shape");
        fails(&zipped(&npy(&f4("(3,)"), &[0; 8])), "truncated");
        fails(&zipped(&npy(&f4("(1,)"), &[0; 8])), "more bytes");
        fails(&zipped(&npy(&f4(&"(".repeat(60_000)), &[])), "nests too deep");
        fails(&zipped(b"\x93NUMPY\x02\x00\xff\xff\xff\xff"), "a header of 4294967295");
        fails(&zipped(b"\x93NUMPY\x01"), "no array header");
        fails(&zipped(b"12345678901234567890"), "magic");
        fails(b"", "not an .npz");
        fails(&[b'P'; 100], "not an .npz");
        // An archive whose own directory lies, within what deflate could make of it: counted before it is believed.
        let mut noise = vec![0u8; 500_000];
        let mut state = 1u32;
        noise.iter_mut().for_each(|b| {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            *b = (state >> 24) as u8;
        });
        let npy = npy(&f4("(100000000,)"), &noise);
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        let deflated = SimpleFileOptions::default().compression_method(CompressionMethod::Deflated);
        zip.start_file("a.npy", deflated).unwrap();
        zip.write_all(&npy).unwrap();
        let mut bytes = zip.finish().unwrap().into_inner();
        fails(&bytes, "takes 400000000 bytes, but");
        let (real, lie) = ((npy.len() as u32).to_le_bytes(), 500_000_000u32.to_le_bytes());
        let mut told = 0;
        for i in 0..bytes.len() - 4 {
            if bytes[i..i + 4] == real {
                bytes[i..i + 4].copy_from_slice(&lie);
                told += 1;
            }
        }
        assert_eq!(told, 2);
        fails(&bytes, "500000 bytes of elements");
    }

    #[test]
    fn damage_anywhere_is_an_error_or_harmless() {
        for file in ["numpy.npz", "compressed.npz"] {
            let good = std::fs::read(fixture(file)).unwrap();
            for i in 0..good.len() {
                let mut bad = good.clone();
                bad[i] ^= [0x01, 0x80][i % 2];
                let _ = from_bytes(&bad);
            }
            for end in (0..good.len()).step_by(7) {
                assert!(from_bytes(&good[..end]).is_err());
            }
        }
    }
}
