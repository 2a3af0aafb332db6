//! How images become a model's input: options, and the per-sample work of a batch.

use num_traits::ToPrimitive;
use serde::{Deserialize, Serialize};

use crate::dtype_dispatch;
use crate::error::{Error, OpError, Result};
use crate::tensor::{DType, Elem, Tensor, by_size};

use super::Augment;
use super::split::{Purpose, below, rng};

/// Channels that images are read with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Channels {
    /// As many as the model's input declares.
    #[default]
    Auto,
    /// One: luma, by Rec. 709 weights.
    Grey,
    /// Three.
    Rgb,
}

/// Order of an image batch's dimensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// Whichever places a dimension of 1 or 3 where the channels are, `Nchw` if both do.
    #[default]
    Auto,
    /// `[N, C, H, W]`
    Nchw,
    /// `[N, H, W, C]`
    Nhwc,
}

/// How images (class folders, IDX files) are fed. A byte `p` of channel `c` becomes `(p·scale − mean[c]) / std[c]`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct ImageOptions {
    /// Factor on the byte values; 1/255 when not given.
    pub scale: Option<f32>,
    /// Subtracted after scaling: nothing, one number, or one per channel.
    pub mean: Vec<f32>,
    /// Divided by after that: nothing, one number, or one per channel.
    pub std: Vec<f32>,
    /// Height and width, where the model's input leaves them open.
    pub resize: Option<(usize, usize)>,
    pub channels: Channels,
    pub layout: Layout,
    /// Training images are shifted by up to ± this many pixels down and right, at random, edges repeated.
    pub shift: usize,
    /// Half of the training images, at random, are mirrored left to right.
    pub flip: bool,
    /// Training images are turned by up to ± this many degrees, edges repeated.
    pub rotate: f32,
    /// A window of this share of the sides at least, placed at random, is scaled up to the whole; 0: off.
    pub crop: f32,
}

/// What happens to training images at random.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Augmentation {
    pub shift: usize,
    pub flip: bool,
    pub rotate: f32,
    pub crop: f32,
}

impl Augmentation {
    pub fn is_none(&self) -> bool {
        *self == Augmentation::default()
    }

    /// Fails on angles and windows that make no sense.
    pub fn check(&self) -> Result<()> {
        if !(0.0..=180.0).contains(&self.rotate) {
            return Err(Error::Config(format!("rotate = {}: is in degrees, 0 to 180", self.rotate)));
        }
        if !(0.0..=1.0).contains(&self.crop) {
            return Err(Error::Config(format!("crop = {}: is a share of the sides, 0 to 1", self.crop)));
        }
        Ok(())
    }

    /// What becomes of one sample in one epoch.
    pub(super) fn draw(&self, augment: Augment, sample: usize, p: Planes) -> Placement {
        // Beyond any image: keeps the arithmetic in range.
        let max = self.shift.min(1 << 20) as i64;
        let mut rng = rng(Purpose::Shift, augment.seed, augment.epoch, sample as u64);
        let mut shift = || (below(&mut rng, 2 * max as u64 + 1) as i64 - max) as isize;
        let down = shift();
        let shift = (down, shift());
        let flip = self.flip && below(&mut rng, 2) == 1;
        let mut unit = || below(&mut rng, 1 << 24) as f64 / f64::from((1 << 24) - 1);
        let angle = (2.0 * unit() - 1.0) * f64::from(self.rotate).to_radians();
        let least = if self.crop > 0.0 { f64::from(self.crop) } else { 1.0 };
        let scale = least + (1.0 - least) * unit();
        let mut offset = |n: usize| (2.0 * unit() - 1.0) * (1.0 - scale) / 2.0 * n.saturating_sub(1) as f64;
        let offset = (offset(p.h), offset(p.w));
        let warp = (angle != 0.0 || scale != 1.0).then(|| Warp {
            cos: angle.cos() * scale,
            sin: angle.sin() * scale,
            offset,
        });
        Placement { shift, flip, warp }
    }
}

/// Where the pixels of one sample are taken from: mirrored, then shifted, then turned and scaled about the middle.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Placement {
    /// Down and right.
    pub shift: (isize, isize),
    pub flip: bool,
    pub warp: Option<Warp>,
}

/// A rotation times a scale, and a way.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Warp {
    cos: f64,
    sin: f64,
    offset: (f64, f64),
}

impl ImageOptions {
    pub fn augmentation(&self) -> Augmentation {
        Augmentation { shift: self.shift, flip: self.flip, rotate: self.rotate, crop: self.crop }
    }

    /// Fails when an option is set that has no meaning for arrays, which are fed as they are.
    pub fn check_for_arrays(&self) -> Result<()> {
        let set = [
            ("scale", self.scale.is_some()),
            ("mean", !self.mean.is_empty()),
            ("std", !self.std.is_empty()),
            ("resize", self.resize.is_some()),
            ("channels", self.channels != Channels::Auto),
        ];
        match set.iter().find(|(_, set)| *set) {
            None => Ok(()),
            Some((name, _)) => Err(Error::Config(format!(
                "{name}: applies to images; the arrays of an .npz file are fed as they are"
            ))),
        }
    }

    /// What each byte value is fed as, `[channels, 256]` in `dtype`. An integer input gets the bytes themselves.
    ///
    /// Fails on options that do not fit the channels, or on values that are not finite.
    pub fn table(&self, channels: usize, dtype: DType) -> Result<Tensor> {
        if !dtype.is_float() {
            if dtype == DType::Bool || dtype == DType::I8 {
                return Err(Error::Data(format!("images cannot feed an input of type {dtype}")));
            }
            if self.scale.is_some() || !self.mean.is_empty() || !self.std.is_empty() {
                return Err(Error::Config(format!(
                    "scale, mean, std: the input is {dtype} and takes bytes as they are"
                )));
            }
            let bytes: Vec<i64> = (0..channels).flat_map(|_| 0..256).collect();
            return Tensor::ints(&bytes).cast(dtype).reshaped(&[channels, 256]).map_err(super::internal);
        }
        let per_channel = |name: &str, values: &[f32], default: f32| match values.len() {
            0 => Ok(vec![default; channels]),
            1 => Ok(vec![values[0]; channels]),
            n if n == channels => Ok(values.to_vec()),
            n => Err(Error::Config(format!("{name}: {n} values for images of {channels} channel(s)"))),
        };
        let (mean, std) = (per_channel("mean", &self.mean, 0.0)?, per_channel("std", &self.std, 1.0)?);
        let mut values = Vec::with_capacity(channels * 256);
        for (m, s) in mean.iter().zip(&std) {
            for p in 0..256 {
                // The default divides: p/255 is exact to the last bit, p·(1/255) is not.
                let x = self.scale.map_or(p as f32 / 255.0, |f| p as f32 * f);
                values.push((x - m) / s);
            }
        }
        let table = Tensor::from_slice(&[channels, 256], &values).map_err(super::internal)?.cast(dtype);
        if table.to_f64().iter().any(|x| !x.is_finite()) {
            return Err(Error::Config("scale, mean, std: they make pixels that are not finite".into()));
        }
        Ok(table)
    }
}

/// One sample as `outer` planes of `h`×`w` pixels of `inner` elements: channels are `outer` in NCHW, `inner` in NHWC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Planes {
    pub outer: usize,
    pub h: usize,
    pub w: usize,
    pub inner: usize,
}

impl Planes {
    /// A row of elements that is no image.
    pub fn flat(len: usize) -> Planes {
        Planes { outer: 1, h: 1, w: len, inner: 1 }
    }

    /// Of a sample of three dimensions, whose layout is told from them when it is `Auto`.
    pub fn of(dims: &[usize], layout: Layout) -> Planes {
        let &[a, b, c] = dims else { return Planes::flat(dims.iter().product()) };
        let channels = |n| n == 1 || n == 3;
        match layout {
            Layout::Nhwc => Planes { outer: 1, h: a, w: b, inner: c },
            Layout::Auto if !channels(a) && channels(c) => Planes { outer: 1, h: a, w: b, inner: c },
            _ => Planes { outer: a, h: b, w: c, inner: 1 },
        }
    }
}

/// `dst[c, y, x] = f(c, src[c, y − down, x − right])`, x counted from the right where it is mirrored, coordinates
/// clamped to the image.
fn gather<S: Copy, D>(src: &[S], dst: &mut [D], p: Planes, place: Placement, f: impl Fn(usize, S) -> D) {
    let from = |at: usize, by: isize, n: usize| (at as isize - by).clamp(0, n as isize - 1) as usize;
    let row = p.w * p.inner;
    for o in 0..p.outer {
        for y in 0..p.h {
            let src = &src[(o * p.h + from(y, place.shift.0, p.h)) * row..][..row];
            let dst = &mut dst[(o * p.h + y) * row..][..row];
            for x in 0..p.w {
                let mirrored = if place.flip { p.w - 1 - x } else { x };
                let s = from(mirrored, place.shift.1, p.w) * p.inner;
                for i in 0..p.inner {
                    dst[x * p.inner + i] = f(o * p.inner + i, src[s + i]);
                }
            }
        }
    }
}

/// As [`gather`], from between the pixels: the four nearest, weighted by their nearness.
fn between<S: Copy, D: Elem + num_traits::NumCast>(
    src: &[S],
    dst: &mut [D],
    p: Planes,
    (place, warp): (Placement, Warp),
    f: impl Fn(usize, S) -> f64,
) {
    let middle = |n: usize| n.saturating_sub(1) as f64 / 2.0;
    let (my, mx) = (middle(p.h), middle(p.w));
    let split = |at: f64, n: usize| {
        let at = at.clamp(0.0, n.saturating_sub(1) as f64);
        let low = at.floor() as usize;
        (low, (low + 1).min(n - 1), at - at.floor())
    };
    for y in 0..p.h {
        for x in 0..p.w {
            let mirrored = if place.flip { p.w - 1 - x } else { x };
            let (dy, dx) =
                (y as f64 - place.shift.0 as f64 - my, mirrored as f64 - place.shift.1 as f64 - mx);
            let (y0, y1, fy) = split(warp.cos * dy + warp.sin * dx + my + warp.offset.0, p.h);
            let (x0, x1, fx) = split(warp.cos * dx - warp.sin * dy + mx + warp.offset.1, p.w);
            for o in 0..p.outer {
                for i in 0..p.inner {
                    let c = o * p.inner + i;
                    let at = |y: usize, x: usize| f(c, src[((o * p.h + y) * p.w + x) * p.inner + i]);
                    let top = at(y0, x0) + (at(y0, x1) - at(y0, x0)) * fx;
                    let low = at(y1, x0) + (at(y1, x1) - at(y1, x0)) * fx;
                    let value = top + (low - top) * fy;
                    let value = if D::DTYPE.is_float() { value } else { value.round() };
                    dst[((o * p.h + y) * p.w + x) * p.inner + i] =
                        <D as num_traits::NumCast>::from(value).unwrap_or_default();
                }
            }
        }
    }
}

fn elements<T: bytemuck::Pod>(bytes: &[u8]) -> Result<&[T]> {
    bytemuck::try_cast_slice(bytes).map_err(|e| super::internal(OpError::Internal(e.to_string())))
}

fn elements_mut<T: bytemuck::Pod>(bytes: &mut [u8]) -> Result<&mut [T]> {
    bytemuck::try_cast_slice_mut(bytes).map_err(|e| super::internal(OpError::Internal(e.to_string())))
}

/// One sample's bytes through `table` (`[channels, 256]`) into `dst`, placed.
pub(super) fn look_up(src: &[u8], table: &Tensor, p: Planes, place: Placement, dst: &mut [u8]) -> Result<()> {
    if let Some(warp) = place.warp {
        return dtype_dispatch!(table.dtype(), T => {
            let table: &[T] = elements(table.bytes())?;
            let number = |c: usize, s: u8| ToPrimitive::to_f64(&table[c * 256 + s as usize]).unwrap_or(0.0);
            between(src, elements_mut::<T>(dst)?, p, (place, warp), number);
            Ok(())
        });
    }
    by_size!(table.dtype(), T => {
        let table: &[T] = elements(table.bytes())?;
        gather(src, elements_mut::<T>(dst)?, p, place, |c, s| table[c * 256 + s as usize]);
    });
    Ok(())
}

/// One sample of elements of type `dtype` into `dst`, placed.
pub(super) fn placed(src: &[u8], dtype: DType, p: Planes, place: Placement, dst: &mut [u8]) -> Result<()> {
    if let Some(warp) = place.warp {
        return dtype_dispatch!(dtype, T => {
            let src = elements::<T>(src)?;
            between(src, elements_mut::<T>(dst)?, p, (place, warp), |_, s: T| ToPrimitive::to_f64(&s).unwrap_or(0.0));
            Ok(())
        });
    }
    by_size!(dtype, T => gather(elements::<T>(src)?, elements_mut::<T>(dst)?, p, place, |_, s| s));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables() {
        let t = ImageOptions::default().table(1, DType::F32).unwrap();
        assert_eq!(t.get::<f32>().unwrap()[51], 51.0 / 255.0);
        let o = ImageOptions {
            scale: Some(1.0),
            mean: vec![1.0, 2.0, 3.0],
            std: vec![2.0],
            ..Default::default()
        };
        let t = o.table(3, DType::F16).unwrap().to_f64();
        assert_eq!((t[10], t[256 + 10], t[512 + 10]), (4.5, 4.0, 3.5));
        assert!(o.table(1, DType::F32).unwrap_err().to_string().contains("mean: 3 values"));
        assert!(o.table(3, DType::U8).is_err());
        assert_eq!(ImageOptions::default().table(3, DType::U8).unwrap().get::<u8>().unwrap()[300], 44);
        assert_eq!(ImageOptions::default().table(1, DType::I32).unwrap().get::<i32>().unwrap()[200], 200);
        let zero = ImageOptions { std: vec![0.0], ..Default::default() };
        assert!(zero.table(1, DType::F32).is_err());
    }

    #[cfg(feature = "cli")]
    #[test]
    fn options_are_toml_with_kebab_keys() {
        let o: ImageOptions =
            toml::from_str("mean = [0.5]\nresize = [28, 30]\nchannels = 'grey'\nlayout = 'nhwc'").unwrap();
        assert_eq!((o.mean.as_slice(), o.resize), ([0.5].as_slice(), Some((28, 30))));
        assert_eq!((o.channels, o.layout, o.shift), (Channels::Grey, Layout::Nhwc, 0));
        assert!(toml::from_str::<ImageOptions>("shifts = 2").is_err());
    }

    #[test]
    fn shift_repeats_edges_in_both_layouts() {
        // 2×3 pixels, 2 channels
        let nchw: Vec<u16> = vec![1, 2, 3, 4, 5, 6, 11, 12, 13, 14, 15, 16];
        let p = Planes { outer: 2, h: 2, w: 3, inner: 1 };
        let mut out = vec![0u16; 12];
        let by = |down, right| Placement { shift: (down, right), ..Default::default() };
        gather(&nchw, &mut out, p, by(1, -1), |_, s| s);
        assert_eq!(out, [2, 3, 3, 2, 3, 3, 12, 13, 13, 12, 13, 13]);
        let nhwc: Vec<u16> = vec![1, 11, 2, 12, 3, 13, 4, 14, 5, 15, 6, 16];
        gather(&nhwc, &mut out, Planes { outer: 1, h: 2, w: 3, inner: 2 }, by(1, -1), |c, s| {
            s + 100 * c as u16
        });
        assert_eq!(out, [2, 112, 3, 113, 3, 113, 2, 112, 3, 113, 3, 113]);
        gather(&nchw, &mut out, p, by(-9, 9), |_, s| s);
        assert_eq!(out, [4, 4, 4, 4, 4, 4, 14, 14, 14, 14, 14, 14]);
        gather(&nchw, &mut out, p, Placement { flip: true, ..by(0, 0) }, |_, s| s);
        assert_eq!(out, [3, 2, 1, 6, 5, 4, 13, 12, 11, 16, 15, 14]);
    }

    fn drawn(a: Augmentation, sample: usize) -> Placement {
        a.draw(Augment { seed: 1, epoch: 2 }, sample, Planes { outer: 1, h: 9, w: 9, inner: 1 })
    }

    #[test]
    fn shifts_and_mirrors_cover_their_range() {
        let a = Augmentation { shift: 1, ..Default::default() };
        let all: std::collections::BTreeSet<_> = (0..400).map(|i| drawn(a, i).shift).collect();
        assert_eq!(all.len(), 9);
        assert_eq!(drawn(a, 5), drawn(a, 5));
        drawn(Augmentation { shift: usize::MAX, ..a }, 5);
        let a = Augmentation { flip: true, ..Default::default() };
        let mirrored = (0..400).filter(|i| drawn(a, *i).flip).count();
        assert!((150..250).contains(&mirrored), "{mirrored}");
        assert!((0..400).all(|i| drawn(a, i).warp.is_none()));
    }

    #[test]
    fn turns_and_windows_sample_between_pixels() {
        // Half a turn about the middle is exact.
        let p = Planes { outer: 1, h: 3, w: 3, inner: 1 };
        let src: Vec<f32> = (0..9).map(|i| i as f32).collect();
        let half = Warp { cos: -1.0, sin: 0.0, offset: (0.0, 0.0) };
        let mut out = vec![0f32; 9];
        between(&src, &mut out, p, (Placement::default(), half), |_, s| f64::from(s));
        assert_eq!(out, [8., 7., 6., 5., 4., 3., 2., 1., 0.]);
        // A window of half the sides in the middle.
        let window = Warp { cos: 0.5, sin: 0.0, offset: (0.0, 0.0) };
        between(&src, &mut out, p, (Placement::default(), window), |_, s| f64::from(s));
        assert_eq!(out, [2., 2.5, 3., 3.5, 4., 4.5, 5., 5.5, 6.]);
        // Integers are rounded.
        let mut bytes = vec![0u8; 9];
        between(&[0u8, 1, 2, 3, 4, 5, 6, 7, 8], &mut bytes, p, (Placement::default(), window), |_, s: u8| {
            f64::from(s)
        });
        assert_eq!(bytes, [2, 3, 3, 4, 4, 5, 5, 6, 6]);
        for i in 0..200 {
            let w = drawn(Augmentation { rotate: 10.0, crop: 0.8, ..Default::default() }, i).warp.unwrap();
            let scale = w.cos.hypot(w.sin);
            assert!(
                (0.8..=1.0 + 1e-9).contains(&scale)
                    && (w.sin / w.cos).atan().abs() <= 10f64.to_radians() + 1e-9
            );
            // The window stays inside.
            assert!(w.offset.0.abs() <= (1.0 - scale) / 2.0 * 8.0 + 1e-9);
        }
        assert!(Augmentation { crop: 1.5, ..Default::default() }.check().is_err());
        assert!(Augmentation { rotate: -1.0, ..Default::default() }.check().is_err());
    }
}
