//! A folder with a subfolder of images per class, or of images alone.

use std::path::{Path, PathBuf};

use image::imageops::FilterType;
use image::{DynamicImage, ImageDecoder, ImageReader};
use rayon::prelude::*;

use crate::error::{Error, Result};

use super::frame::Frame;
use super::{Dataset, ImageOptions, InputSpec, Layout, convert};

/// Files that are read, by the end of their names; what they hold is told from their contents.
const EXTENSIONS: [&str; 3] = ["png", "jpg", "jpeg"];

/// Every image of every subfolder, brought to the model's size; the classes are the subfolders in order of name.
/// Hidden files are passed over in silence, other files with a note.
pub(super) fn open(folder: &Path, options: &ImageOptions, input: &InputSpec) -> Result<Dataset> {
    let Listing { classes, files, skipped, labelled } = list(folder)?;
    let (first, _) = files.first().ok_or_else(|| {
        let which = if classes.is_empty() {
            "no subfolders (one per class, holding PNG or JPEG images)"
        } else {
            "no PNG or JPEG image in its subfolders"
        };
        Error::file(folder, which)
    })?;
    let at = |e: Error| Error::file(folder, e.to_string());
    let image = decode(first).map_err(|e| Error::file(first, e))?;
    let native = (image.height() as usize, image.width() as usize);
    drop(image);
    let frame = Frame::resolve(options, input, native).map_err(at)?;
    let table = options.table(frame.c, input.dtype).map_err(at)?;
    let mut pixels = reserve(files.len(), &frame).map_err(at)?;
    let bad: Vec<String> = pixels
        .par_chunks_exact_mut(frame.len())
        .zip(&files)
        .filter_map(|(dst, (path, _))| {
            let wrong = |e: String| Some(format!("{}: {e}", path.strip_prefix(folder).unwrap_or(path).display()));
            match decode(path) {
                Err(e) => wrong(e),
                Ok(i) if frame.native && (i.height() as usize, i.width() as usize) != native => wrong(format!(
                    "{}×{} pixels where the first image has {}×{}; the model does not say which it wants: set resize",
                    i.height(),
                    i.width(),
                    native.0,
                    native.1
                )),
                Ok(i) => {
                    place(i, &frame, dst);
                    None
                }
            }
        })
        .collect();
    if !bad.is_empty() {
        let shown: String = bad.iter().take(10).map(|b| format!("\n  {b}")).collect();
        let more = bad.len().saturating_sub(10);
        let more = if more > 0 { format!("\n  and {more} more") } else { String::new() };
        return Err(Error::file(folder, format!("{} image(s) cannot be used:{shown}{more}", bad.len())));
    }
    let labels = labelled.then(|| files.iter().map(|(_, class)| *class as i64).collect());
    let mut data = Dataset::from_pixels(input, &frame, pixels, table, options, labels)?;
    data.class_names = classes;
    if !labelled {
        data.notes.push(format!("no labels: the images of {} lie in the folder itself", folder.display()));
    }
    if !skipped.is_empty() {
        let names = convert::listed(skipped.iter().map(String::as_str), 5);
        data.notes.push(format!("{} file(s) passed over, not PNG or JPEG: {names}", skipped.len()));
    }
    Ok(data)
}

struct Listing {
    classes: Vec<String>,
    /// Path and class index.
    files: Vec<(PathBuf, usize)>,
    skipped: Vec<String>,
    /// Images lie in a folder a class.
    labelled: bool,
}

fn is_image(path: &Path) -> bool {
    let extension = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
    path.is_file() && EXTENSIONS.contains(&extension.as_str())
}

fn list(folder: &Path) -> Result<Listing> {
    let mut out = Listing { classes: Vec::new(), files: Vec::new(), skipped: Vec::new(), labelled: true };
    let all = entries(folder)?;
    if !all.iter().any(|(_, path)| path.is_dir()) && all.iter().any(|(_, path)| is_image(path)) {
        out.labelled = false;
        for (name, path) in all {
            match is_image(&path) {
                true => out.files.push((path, 0)),
                false => out.skipped.push(name),
            }
        }
        return Ok(out);
    }
    for (name, path) in all {
        if !path.is_dir() {
            out.skipped.push(name);
            continue;
        }
        for (file, path) in entries(&path)? {
            if is_image(&path) {
                out.files.push((path, out.classes.len()));
            } else {
                out.skipped.push(format!("{name}/{file}"));
            }
        }
        out.classes.push(name);
    }
    Ok(out)
}

/// Names and paths in a folder, hidden ones left out, by name: what a folder lists first differs between machines.
fn entries(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    let io = |e| Error::io(folder, e);
    let mut out = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io)? {
        let entry = entry.map_err(io)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with('.') {
            out.push((name, entry.path()));
        }
    }
    out.sort();
    Ok(out)
}

/// An image the way up its camera says. Sizes beyond what `image` allows by default (512 MiB) are refused.
fn decode(path: &Path) -> std::result::Result<DynamicImage, String> {
    let reader =
        ImageReader::open(path).and_then(ImageReader::with_guessed_format).map_err(|e| e.to_string())?;
    let mut decoder = reader.into_decoder().map_err(|e| e.to_string())?;
    let orientation = decoder.orientation().unwrap_or(image::metadata::Orientation::NoTransforms);
    let mut image = DynamicImage::from_decoder(decoder).map_err(|e| e.to_string())?;
    image.apply_orientation(orientation);
    Ok(image)
}

/// Zeroed space for `n` samples.
pub(super) fn reserve(n: usize, frame: &Frame) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    let bytes = n.checked_mul(frame.len()).filter(|&b| out.try_reserve_exact(b).is_ok());
    let bytes = bytes.ok_or_else(|| {
        Error::Data(format!("{n} images of {}×{}×{}: not enough memory", frame.c, frame.h, frame.w))
    })?;
    out.resize(bytes, 0);
    Ok(out)
}

/// An image in the frame's channels, size and layout into `dst`. Alpha is dropped, 16 bits become 8.
pub(super) fn place(image: DynamicImage, frame: &Frame, dst: &mut [u8]) {
    let image = if frame.c == 1 {
        DynamicImage::ImageLuma8(image.into_luma8())
    } else {
        DynamicImage::ImageRgb8(image.into_rgb8())
    };
    let (h, w) = (frame.h as u32, frame.w as u32);
    let image = if (image.height(), image.width()) == (h, w) {
        image
    } else {
        image.resize_exact(w, h, FilterType::Triangle)
    };
    let pixels = image.as_bytes();
    if frame.c == 1 || frame.layout == Layout::Nhwc {
        dst.copy_from_slice(pixels);
        return;
    }
    let plane = frame.h * frame.w;
    for (i, pixel) in pixels.chunks_exact(frame.c).enumerate() {
        for (c, p) in pixel.iter().enumerate() {
            dst[c * plane + i] = *p;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::DType;

    fn rgb(w: u32, h: u32, p: [u8; 3]) -> image::RgbImage {
        image::RgbImage::from_pixel(w, h, image::Rgb(p))
    }

    fn folder() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for class in ["cat", "ant", ".hidden"] {
            std::fs::create_dir(dir.path().join(class)).unwrap();
        }
        rgb(4, 2, [255, 0, 51]).save(dir.path().join("cat/b.png")).unwrap();
        rgb(8, 8, [0, 0, 0]).save(dir.path().join("cat/a.jpg")).unwrap();
        rgb(4, 2, [10, 20, 30]).save(dir.path().join("ant/z.PNG")).unwrap();
        std::fs::write(dir.path().join("ant/.DS_Store"), b"x").unwrap();
        std::fs::write(dir.path().join("ant/notes.txt"), b"x").unwrap();
        dir
    }

    fn spec(dims: [Option<usize>; 4]) -> InputSpec {
        InputSpec::new("image", DType::F32, &dims)
    }

    #[test]
    fn classes_sizes_and_layouts() {
        let dir = folder();
        let options = ImageOptions::default();
        let d = super::super::open(dir.path(), &options, &[spec([None, Some(3), Some(2), Some(4)])]).unwrap();
        assert_eq!(
            (d.class_names(), d.labels().unwrap()),
            (["ant", "cat"].map(String::from).as_slice(), [0, 1, 1].as_slice())
        );
        assert!(
            d.notes().iter().any(|n| n.contains("1 file(s)") && n.contains("ant/notes.txt")),
            "{:?}",
            d.notes()
        );
        let mut b = d.new_batch(1);
        d.batch(&[2], None, &mut b).unwrap();
        let x = b.inputs[0].1.get::<f32>().unwrap();
        assert_eq!((x[0], x[8], x[16]), (1.0, 0.0, 51.0 / 255.0));
        assert_eq!(b.target.as_ref().unwrap().get::<i64>().unwrap(), [1]);
        let d = super::super::open(dir.path(), &options, &[spec([None, Some(2), Some(4), Some(3)])]).unwrap();
        d.batch(&[2], None, &mut b).unwrap();
        assert_eq!(b.inputs[0].1.get::<f32>().unwrap()[..3], [1.0, 0.0, 51.0 / 255.0]);
        let d = super::super::open(dir.path(), &options, &[spec([None, Some(1), Some(2), Some(4)])]).unwrap();
        d.batch(&[0], None, &mut b).unwrap();
        let grey = b.inputs[0].1.get::<f32>().unwrap()[0] * 255.0;
        assert!((18.0..20.0).contains(&grey), "{grey}"); // .2126·10 + .7152·20 + .0722·30
        assert!(d.check_labels(1).unwrap_err().to_string().contains("ant, cat"));
    }

    #[test]
    fn what_cannot_be_used_is_listed() {
        let dir = folder();
        let any = spec([None, Some(3), None, None]);
        let e = open(dir.path(), &ImageOptions::default(), &any).unwrap_err().to_string();
        assert!(
            e.contains("1 image(s)") && e.contains("cat/a.jpg: 8×8 pixels") && e.contains("set resize"),
            "{e}"
        );
        let resize = ImageOptions { resize: Some((3, 3)), ..Default::default() };
        assert_eq!(open(dir.path(), &resize, &any).unwrap().sample_dims("image").unwrap(), [3, 3, 3]);
        let bytes = std::fs::read(dir.path().join("cat/b.png")).unwrap();
        std::fs::write(dir.path().join("cat/b.png"), &bytes[..bytes.len() / 2]).unwrap();
        std::fs::write(dir.path().join("cat/c.png"), b"no image").unwrap();
        let e = open(dir.path(), &resize, &any).unwrap_err().to_string();
        assert!(e.contains("2 image(s)") && e.contains("cat/b.png") && e.contains("cat/c.png"), "{e}");

        let empty = tempfile::tempdir().unwrap();
        let e = open(empty.path(), &resize, &any).unwrap_err().to_string();
        assert!(e.contains("no subfolders"), "{e}");
        std::fs::create_dir(empty.path().join("a")).unwrap();
        let e = open(empty.path(), &resize, &any).unwrap_err().to_string();
        assert!(e.contains("no PNG or JPEG"), "{e}");

        let loose = tempfile::tempdir().unwrap();
        rgb(4, 2, [1, 2, 3]).save(loose.path().join("b.png")).unwrap();
        rgb(4, 2, [9, 2, 3]).save(loose.path().join("a.png")).unwrap();
        let d = open(loose.path(), &resize, &any).unwrap();
        assert_eq!((d.len(), d.labels()), (2, None));
        assert!(d.require_target().unwrap_err().to_string().contains("no labels"));
    }
}
