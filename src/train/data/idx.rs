//! IDX files, as MNIST and Fashion-MNIST come: `…-images-idx3-ubyte` and the labels beside it, gzipped or not.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::bufread::MultiGzDecoder;

use crate::error::{Error, Result};

use super::frame::Frame;
use super::{Dataset, ImageOptions, InputSpec, images};

/// The file itself, or the gzipped one in its place.
pub(super) fn existing(path: &Path) -> Option<PathBuf> {
    if path.is_file() {
        return Some(path.to_path_buf());
    }
    let gz = PathBuf::from(format!("{}.gz", path.display()));
    gz.is_file().then_some(gz)
}

/// Whether the file starts like an IDX file (of any type and rank), unpacked if need be.
pub(super) fn looks_like(path: &Path) -> bool {
    let mut magic = [0u8; 4];
    let read = reader(path).is_ok_and(|(mut r, _)| r.read_exact(&mut magic).is_ok());
    read && magic[0] == 0 && magic[1] == 0 && matches!(magic[2], 8..=14) && (1..=8).contains(&magic[3])
}

/// Images and, when there is such a file, the labels beside them.
pub(super) fn open(path: &Path, options: &ImageOptions, input: &InputSpec) -> Result<Dataset> {
    let (dims, bytes) = read::<3>(path)?;
    let [n, h, w] = dims;
    if n == 0 {
        return Err(Error::file(path, "no images"));
    }
    let at = |e: Error| Error::file(path, e.to_string());
    let frame = Frame::resolve(options, input, (h, w)).map_err(at)?;
    let table = options.table(frame.c, input.dtype).map_err(at)?;
    let pixels = if (frame.c, frame.h, frame.w) == (1, h, w) {
        bytes
    } else {
        let mut out = images::reserve(n, &frame).map_err(at)?;
        for (src, dst) in bytes.chunks_exact(h * w).zip(out.chunks_exact_mut(frame.len())) {
            let grey = image::GrayImage::from_raw(w as u32, h as u32, src.to_vec())
                .ok_or_else(|| Error::file(path, format!("an image of {h}×{w} pixels")))?;
            images::place(grey.into(), &frame, dst);
        }
        out
    };
    let (labels, note) = match labels_of(path) {
        Ok(file) => {
            let ([m], labels) = read::<1>(&file)?;
            if m != n {
                return Err(Error::file(&file, format!("{m} labels for {n} images in {}", path.display())));
            }
            (Some(labels.into_iter().map(i64::from).collect()), None)
        }
        Err(note) => (None, Some(note)),
    };
    let mut data = Dataset::from_pixels(input, &frame, pixels, table, options, labels)?;
    data.notes.extend(note);
    Ok(data)
}

/// The labels' file for an images' file, or what was looked for.
fn labels_of(images: &Path) -> std::result::Result<PathBuf, String> {
    let name = images.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let other = name.replace("images", "labels").replace("idx3", "idx1");
    if other == name {
        return Err(format!("no labels: '{name}' is not named like …-images-idx3-ubyte"));
    }
    let plain = other.strip_suffix(".gz").unwrap_or(&other);
    let found =
        [images.with_file_name(&other), images.with_file_name(plain)].iter().find_map(|p| existing(p));
    found.ok_or_else(|| format!("no labels: {other} is not beside {name}"))
}

/// Unpacked contents, and the most bytes they can be.
fn reader(path: &Path) -> Result<(Box<dyn Read>, u64)> {
    let io = |e| Error::io(path, e);
    let file = File::open(path).map_err(io)?;
    let bytes = file.metadata().map_err(io)?.len();
    let mut file = BufReader::with_capacity(1 << 16, file);
    let start = std::io::BufRead::fill_buf(&mut file).map_err(io)?;
    if start.starts_with(&[0x1f, 0x8b]) {
        return Ok((Box::new(MultiGzDecoder::new(file)), bytes.saturating_mul(1032)));
    }
    Ok((Box::new(file), bytes))
}

/// Dimensions and elements of a file of `R`-dimensional bytes.
fn read<const R: usize>(path: &Path) -> Result<([usize; R], Vec<u8>)> {
    let (mut r, most) = reader(path)?;
    let mut word = || {
        let mut b = [0u8; 4];
        r.read_exact(&mut b).map(|()| b).map_err(|e| Error::file(path, format!("no IDX header: {e}")))
    };
    let magic = word()?;
    if magic != [0, 0, 8, R as u8] {
        let hint =
            if magic == [0, 0, 8, 1] && R == 3 { "; these are labels: give the images' file" } else { "" };
        return Err(Error::file(
            path,
            format!("IDX magic {:#010x} where 0x0000080{R} is expected{hint}", u32::from_be_bytes(magic)),
        ));
    }
    let mut dims = [0usize; R];
    for d in &mut dims {
        *d = u32::from_be_bytes(word()?) as usize;
    }
    let need = dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    let need = need.filter(|&n| n as u64 <= most).ok_or_else(|| {
        Error::file(path, format!("truncated: its header says {dims:?}, more than a file of this size holds"))
    })?;
    // Grown as it is read: what the header says is believed only as far as the bytes are there.
    let mut bytes = Vec::new();
    r.by_ref()
        .take(need as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| Error::file(path, format!("damaged after {} of {need} elements: {e}", bytes.len())))?;
    match bytes.len() {
        n if n == need => Ok((dims, bytes)),
        n if n < need => Err(Error::file(path, format!("truncated: {n} of the {need} elements of {dims:?}"))),
        _ => Err(Error::file(path, format!("more bytes than the {need} elements of {dims:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::tensor::DType;

    fn idx(dims: &[u32], data: &[u8]) -> Vec<u8> {
        let mut out = vec![0, 0, 8, dims.len() as u8];
        dims.iter().for_each(|d| out.extend(d.to_be_bytes()));
        out.extend(data);
        out
    }

    fn gz(data: &[u8]) -> Vec<u8> {
        let mut e = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        e.write_all(data).unwrap();
        e.finish().unwrap()
    }

    fn spec(dims: &[Option<usize>]) -> InputSpec {
        InputSpec::new("input", DType::F32, dims)
    }

    const ANY: [Option<usize>; 4] = [None, Some(1), None, None];

    fn all(d: &Dataset) -> Vec<f32> {
        let mut b = d.new_batch(0);
        d.batch(&(0..d.len()).collect::<Vec<_>>(), None, &mut b).unwrap();
        b.inputs[0].1.get::<f32>().unwrap().to_vec()
    }

    #[test]
    fn pairs_plain_and_gzipped() {
        let dir = tempfile::tempdir().unwrap();
        let pixels: Vec<u8> = (0..24).map(|i| i * 10).collect();
        let images = dir.path().join("t-images-idx3-ubyte");
        std::fs::write(dir.path().join("t-images-idx3-ubyte.gz"), gz(&idx(&[2, 3, 4], &pixels))).unwrap();
        // No labels yet: a note says what was looked for.
        let d = super::super::open(&images, &ImageOptions::default(), &[spec(&ANY)]).unwrap();
        let e = d.require_target().unwrap_err().to_string();
        assert!(e.contains("t-labels-idx1-ubyte.gz"), "{e}");
        std::fs::write(dir.path().join("t-labels-idx1-ubyte"), idx(&[2], &[7, 1])).unwrap();
        let d = super::super::open(&images, &ImageOptions::default(), &[spec(&ANY)]).unwrap();
        assert_eq!((d.labels().unwrap(), d.target_classes()), ([7, 1].as_slice(), Some(8)));
        assert_eq!(d.sample_dims("input").unwrap(), [1, 3, 4]);
        assert_eq!(all(&d), pixels.iter().map(|&p| p as f32 / 255.0).collect::<Vec<_>>());
        // Flattened, and as colour of another size.
        let d = super::super::open(&images, &ImageOptions::default(), &[spec(&[None, Some(12)])]).unwrap();
        assert_eq!(d.sample_dims("input").unwrap(), [12]);
        let d = super::super::open(
            &images,
            &ImageOptions::default(),
            &[spec(&[None, Some(6), Some(8), Some(3)])],
        )
        .unwrap();
        let x = all(&d);
        assert_eq!(x.len(), 2 * 6 * 8 * 3);
        assert!(x.chunks(3).all(|c| c[0] == c[1] && c[1] == c[2]));
        // Labels given instead of images.
        let labels = dir.path().join("t-labels-idx1-ubyte");
        let e = super::super::open(&labels, &ImageOptions::default(), &[spec(&ANY)]).unwrap_err().to_string();
        assert!(e.contains("give the images"), "{e}");
    }

    #[test]
    fn damage_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a-images-idx3-ubyte");
        let fails = |bytes: &[u8], part: &str| {
            std::fs::write(&path, bytes).unwrap();
            let e = read::<3>(&path).unwrap_err().to_string();
            assert!(e.contains(part), "{e}");
        };
        let good = idx(&[2, 2, 2], &[0; 8]);
        fails(&good[..good.len() - 1], "truncated: 7 of the 8");
        fails(&idx(&[2, 20, 20], &[0; 8]), "truncated: its header says [2, 20, 20]");
        fails(&[good.as_slice(), &[1]].concat(), "more bytes than");
        fails(&good[..9], "no IDX header");
        fails(&[], "no IDX header");
        fails(&idx(&[u32::MAX, u32::MAX, u32::MAX], &[0; 8]), "more than");
        fails(&idx(&[u32::MAX, 2, 1], &[0; 8]), "more than");
        fails(&gz(&good[..good.len() - 1]), "truncated: 7 of the 8");
        let packed = gz(&good);
        fails(&packed[..packed.len() - 9], "damaged");
        fails(&[0, 0, 13, 3, 0, 0, 0, 0], "0x00000d03");
        fails(&idx(&[8], &[0; 8]), "labels");
        std::fs::write(&path, idx(&[2, 2, 2], &[0; 8])).unwrap();
        std::fs::write(dir.path().join("a-labels-idx1-ubyte"), idx(&[3], &[0; 3])).unwrap();
        let e = open(&path, &ImageOptions::default(), &spec(&ANY)).unwrap_err().to_string();
        assert!(e.contains("3 labels for 2 images"), "{e}");
    }
}
