//! The size, channels and layout that a model, the options and the images together imply.

use crate::error::{Error, Result};
use crate::tensor::Dims;

use super::transform::Planes;
use super::{Channels, ImageOptions, InputSpec, Layout};

/// Size and layout that images are brought to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Frame {
    pub c: usize,
    pub h: usize,
    pub w: usize,
    /// `Nchw` or `Nhwc`.
    pub layout: Layout,
    /// Dimensions of one sample as the model has them.
    pub dims: Dims,
    /// The size was taken from the first image, so all must have it.
    pub native: bool,
}

impl Frame {
    /// From what the model declares, then the options, then the size of the first image (`native`, height first).
    /// Takes inputs of rank 4 (either layout), 3 (`[N, H, W]`, grey) and 2 (flattened).
    pub fn resolve(options: &ImageOptions, input: &InputSpec, native: (usize, usize)) -> Result<Frame> {
        let open = [None; 4];
        let d: &[Option<usize>] = if input.dims.is_empty() { &open } else { &input.dims };
        let image = |x: Option<usize>| matches!(x, Some(1 | 3));
        let (layout, c, h, w) = match *d {
            [_, a, b, c] => match options.layout {
                Layout::Auto if !image(a) && image(c) => (Layout::Nhwc, c, a, b),
                Layout::Nhwc => (Layout::Nhwc, c, a, b),
                _ => (Layout::Nchw, a, b, c),
            },
            [_, h, w] => (Layout::Nchw, Some(1), h, w),
            [_, _] if options.layout == Layout::Nhwc => (Layout::Nhwc, None, None, None),
            [_, _] => (Layout::Nchw, None, None, None),
            _ => {
                return Err(Error::Data(format!(
                    "input '{}' has {} dimensions; images feed inputs like [N, C, H, W]",
                    input.name,
                    d.len()
                )));
            }
        };
        if let (Some((rh, rw)), Some((mh, mw))) = (options.resize, h.zip(w))
            && (rh, rw) != (mh, mw)
        {
            return Err(Error::Config(format!(
                "resize: {rh}×{rw}, but input '{}' wants {mh}×{mw}",
                input.name
            )));
        }
        let from_options = options.resize.unwrap_or(native);
        let (h, w, is_native) = match (h, w) {
            (Some(h), Some(w)) => (h, w, false),
            (h, w) => (h.unwrap_or(from_options.0), w.unwrap_or(from_options.1), options.resize.is_none()),
        };
        if h == 0 || w == 0 {
            return Err(Error::Data(format!("images of {h}×{w} pixels")));
        }
        let flat = if let [_, k] = *d { Some(k) } else { None };
        let asked = match options.channels {
            Channels::Auto => None,
            Channels::Grey => Some(1),
            Channels::Rgb => Some(3),
        };
        let c = match (c, asked, flat) {
            (Some(c), Some(a), _) if c != a => {
                return Err(Error::Config(format!("channels: {a}, but input '{}' has {c}", input.name)));
            }
            (Some(c @ (1 | 3)), ..) => c,
            (Some(c), ..) => {
                return Err(Error::Data(format!(
                    "input '{}' has {c} channels; images have 1 or 3",
                    input.name
                )));
            }
            (None, Some(a), _) => a,
            (None, None, Some(Some(k))) if h.checked_mul(w).and_then(|a| a.checked_mul(3)) == Some(k) => 3,
            (None, None, Some(_)) => 1,
            (None, None, None) => {
                return Err(Error::Config(format!(
                    "channels: input '{}' does not say how many it has; choose grey or rgb",
                    input.name
                )));
            }
        };
        let len = h
            .checked_mul(w)
            .and_then(|a| a.checked_mul(c))
            .filter(|&l| l < 1 << 32)
            .ok_or_else(|| Error::Data(format!("images of {c}×{h}×{w}: too large")))?;
        let dims = match d.len() {
            2 => match d[1] {
                Some(k) if k != len => {
                    return Err(Error::Data(format!(
                        "images of {c}×{h}×{w} make {len} numbers, input '{}' wants {k}; set resize or channels",
                        input.name
                    )));
                }
                _ => Dims::from_slice(&[len]),
            },
            3 => Dims::from_slice(&[h, w]),
            _ if layout == Layout::Nhwc => Dims::from_slice(&[h, w, c]),
            _ => Dims::from_slice(&[c, h, w]),
        };
        Ok(Frame { c, h, w, layout, dims, native: is_native })
    }

    /// Elements of one sample.
    pub fn len(&self) -> usize {
        self.c * self.h * self.w
    }

    pub fn planes(&self) -> Planes {
        let (outer, inner) = if self.layout == Layout::Nhwc { (1, self.c) } else { (self.c, 1) };
        Planes { outer, h: self.h, w: self.w, inner }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::DType;

    fn spec(dims: &[Option<usize>]) -> InputSpec {
        InputSpec::new("input", DType::F32, dims)
    }

    #[test]
    fn frames() {
        let o = ImageOptions::default();
        let f = Frame::resolve(&o, &spec(&[None, Some(3), Some(32), Some(48)]), (9, 9)).unwrap();
        assert_eq!((f.c, f.h, f.w, f.layout, f.native), (3, 32, 48, Layout::Nchw, false));
        let f = Frame::resolve(&o, &spec(&[Some(1), None, None, Some(1)]), (9, 7)).unwrap();
        assert_eq!((f.c, f.h, f.w, f.layout, f.native), (1, 9, 7, Layout::Nhwc, true));
        assert_eq!(f.dims.as_slice(), [9, 7, 1]);
        let f = Frame::resolve(&o, &spec(&[None, Some(784)]), (28, 28)).unwrap();
        assert_eq!((f.c, f.dims.as_slice()), (1, [784].as_slice()));
        let f = Frame::resolve(&o, &spec(&[None, Some(3072)]), (32, 32)).unwrap();
        assert_eq!(f.c, 3);
        let f = Frame::resolve(&o, &spec(&[None, Some(20), Some(30)]), (28, 28)).unwrap();
        assert_eq!((f.c, f.dims.as_slice()), (1, [20, 30].as_slice()));
        let grey = ImageOptions { channels: Channels::Grey, resize: Some((4, 5)), ..o.clone() };
        let f = Frame::resolve(&grey, &spec(&[]), (28, 28)).unwrap();
        assert_eq!(f.dims.as_slice(), [1, 4, 5]);

        let fails = |o: &ImageOptions, d: &[Option<usize>], part: &str| {
            let e = Frame::resolve(o, &spec(d), (28, 28)).unwrap_err().to_string();
            assert!(e.contains(part), "{e}");
        };
        fails(&o, &[None, Some(4), Some(32), Some(32)], "4 channels");
        fails(&o, &[None, None, Some(32), Some(32)], "choose grey or rgb");
        fails(&o, &[None, Some(100)], "make 784 numbers");
        fails(&o, &[None], "1 dimensions");
        fails(&grey, &[None, Some(3), Some(4), Some(5)], "channels: 1");
        fails(&grey, &[None, Some(1), Some(32), Some(32)], "resize: 4×5");
        let huge = ImageOptions { resize: Some((usize::MAX, 2)), ..grey };
        fails(&huge, &[], "too large");
    }
}
