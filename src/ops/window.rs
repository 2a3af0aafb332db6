//! The sliding window that convolution and pooling share: attributes of ONNX, resolved for given extents.

use crate::error::OpError;
use crate::ops::Attrs;
use crate::tensor::Dims;

/// ONNX's `auto_pad`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AutoPad {
    /// `NOTSET`: as `pads` says.
    Explicit,
    Valid,
    SameUpper,
    SameLower,
}

/// Attributes as the file gives them; empty lists are filled in when the rank is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    pub auto_pad: AutoPad,
    pub kernel: Vec<usize>,
    pub strides: Vec<usize>,
    pub dilations: Vec<usize>,
    /// All begins, then all ends.
    pub pads: Vec<usize>,
    pub ceil: bool,
    /// Extents of the output where they do not follow from those of the input; else empty.
    pub output: Vec<usize>,
}

/// A window over concrete extents; fewer than three spatial dimensions are preceded by ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resolved {
    pub axis: usize,
    pub x: [usize; 3],
    pub y: [usize; 3],
    pub k: [usize; 3],
    pub stride: [usize; 3],
    pub dilation: [usize; 3],
    pub pad: [usize; 3],
    pub pad_end: [usize; 3],
}

impl Window {
    pub fn of(attrs: &Attrs) -> Result<Self, OpError> {
        let list = |name: &str, least: i64| -> Result<Vec<usize>, OpError> {
            let values = attrs.ints(name)?.unwrap_or_default();
            values
                .iter()
                .map(|&v| match v >= least && v <= i32::MAX as i64 {
                    true => Ok(v as usize),
                    false => Err(OpError::Unsupported(format!("{name} of {values:?}"))),
                })
                .collect()
        };
        let auto_pad = match attrs.string("auto_pad")?.as_deref() {
            None | Some("NOTSET" | "") => AutoPad::Explicit,
            Some("VALID") => AutoPad::Valid,
            Some("SAME_UPPER") => AutoPad::SameUpper,
            Some("SAME_LOWER") => AutoPad::SameLower,
            Some(other) => return Err(OpError::Attribute(format!("'auto_pad' is {other}"))),
        };
        Ok(Window {
            auto_pad,
            kernel: list("kernel_shape", 1)?,
            strides: list("strides", 1)?,
            dilations: list("dilations", 1)?,
            pads: list("pads", 0)?,
            ceil: attrs.flag("ceil_mode")?,
            output: vec![],
        })
    }

    /// For spatial extents `x` and a kernel of `kernel` (the attribute's when empty).
    pub fn resolve(&self, x: &[usize], kernel: &[usize]) -> Result<Resolved, OpError> {
        let rank = x.len();
        let kernel = if kernel.is_empty() { &self.kernel } else { kernel };
        if !(1..=3).contains(&rank) {
            return Err(OpError::Unsupported(format!("{rank} spatial dimensions (1 to 3 are supported)")));
        }
        let fits = |v: &[usize], n: usize| v.is_empty() || v.len() == n;
        if kernel.len() != rank
            || !fits(&self.strides, rank)
            || !fits(&self.dilations, rank)
            || !fits(&self.pads, 2 * rank)
            || !fits(&self.output, rank)
            || !(self.kernel.is_empty() || self.kernel == kernel)
        {
            return Err(OpError::Shape(format!("{self:?} with a kernel of {kernel:?} over {x:?}")));
        }
        let axis = 3 - rank;
        let mut r = Resolved {
            axis,
            x: [1; 3],
            y: [1; 3],
            k: [1; 3],
            stride: [1; 3],
            dilation: [1; 3],
            pad: [0; 3],
            pad_end: [0; 3],
        };
        let at = |v: &[usize], i: usize, default: usize| v.get(i).copied().unwrap_or(default);
        for i in 0..rank {
            let d = axis + i;
            let (s, dilation) = (at(&self.strides, i, 1), at(&self.dilations, i, 1));
            (r.x[d], r.k[d], r.stride[d], r.dilation[d]) = (x[i], kernel[i], s, dilation);
            if kernel[i] == 0 {
                return Err(OpError::Shape(format!("a kernel of {kernel:?}")));
            }
            let reach = (kernel[i] - 1) * dilation + 1;
            if matches!(self.auto_pad, AutoPad::SameUpper | AutoPad::SameLower) {
                r.y[d] = x[i].div_ceil(s);
                let total = (r.y[d].saturating_sub(1) * s + reach).saturating_sub(x[i]);
                let (small, large) = (total / 2, total - total / 2);
                (r.pad[d], r.pad_end[d]) = match self.auto_pad {
                    AutoPad::SameUpper => (small, large),
                    _ => (large, small),
                };
                continue;
            }
            if self.auto_pad == AutoPad::Explicit {
                (r.pad[d], r.pad_end[d]) = (at(&self.pads, i, 0), at(&self.pads, rank + i, 0));
            }
            if let Some(y) = self.output.get(i) {
                r.y[d] = *y;
                continue;
            }
            let padded = x[i] + r.pad[d] + r.pad_end[d];
            let Some(room) = padded.checked_sub(reach) else {
                return Err(OpError::Shape(format!(
                    "a kernel that reaches over {reach} on {padded} elements, padding included"
                )));
            };
            r.y[d] = if self.ceil { room.div_ceil(s) } else { room / s } + 1;
            // A last window that would begin in the end padding is left out.
            if self.ceil && (r.y[d] - 1) * s >= x[i] + r.pad[d] {
                r.y[d] -= 1;
            }
        }
        Ok(r)
    }
}

impl Resolved {
    /// Dimensions of the output with the given leading ones.
    pub fn output(&self, lead: [usize; 2]) -> Dims {
        lead.iter().chain(&self.y[self.axis..]).copied().collect()
    }
}
