//! Other shapes over the same bytes: Reshape, Flatten, Squeeze, Unsqueeze. No kernel runs.

use std::sync::Arc;

use crate::error::OpError;
use crate::graph::GradBuilder;
use crate::ops::bytes::sized;
use crate::ops::{Cx, Grads, Made, Op, Piece, Row, Spec, get, need, piece};
use crate::tensor::{Dims, Meta, View, ViewMut, axis};

/// A view under fixed dimensions; every view's gradient is one.
#[derive(Debug)]
pub struct ReshapeTo {
    pub dims: Dims,
}

/// ONNX `Reshape` (opset 5 on): X and a shape of int64, where 0 copies X's dimension (unless `allowzero`,
/// opset 14 on) and one -1 takes what is left.
#[derive(Debug)]
pub struct Reshape {
    allow_zero: bool,
}

/// ONNX `Flatten`: (d₀ … dₙ) to (d₀·…·d₍ₐₓᵢₛ₋₁₎, the rest).
#[derive(Debug)]
pub struct Flatten {
    axis: i64,
}

/// ONNX `Squeeze`: axes as an attribute before opset 13, an input after; without them every 1 goes.
#[derive(Debug)]
pub struct Squeeze {
    axes: Axes,
}

/// ONNX `Unsqueeze`: axes (of the output) as an attribute before opset 13, an input after.
#[derive(Debug)]
pub struct Unsqueeze {
    axes: Axes,
}

#[derive(Debug)]
enum Axes {
    Attribute(Option<Vec<i64>>),
    Input,
}

impl Axes {
    fn new(spec: &Spec) -> Result<Axes, OpError> {
        if spec.opset < 13 { Ok(Axes::Attribute(spec.attrs.ints("axes")?)) } else { Ok(Axes::Input) }
    }

    fn get(&self, inputs: &[Option<&Meta>]) -> Result<Option<Vec<i64>>, OpError> {
        match self {
            Axes::Attribute(axes) => Ok(axes.clone()),
            Axes::Input => get(inputs, 1).map(|m| m.ints(1)).transpose(),
        }
    }
}

/// The gradient of any view: dX = dY under X's dimensions.
fn view_grad(g: &mut GradBuilder) -> Result<Grads, OpError> {
    let dy = g.dy0()?;
    let dims = g.meta(g.x(0)?)?.dims.clone();
    let mut grads = Grads::new();
    grads.push(Some(reshape(g, dy, dims)?));
    Ok(grads)
}

/// `v` under other dimensions; `v` itself where they are its own.
pub(crate) fn reshape(
    g: &mut GradBuilder,
    v: crate::graph::ValueId,
    dims: Dims,
) -> Result<crate::graph::ValueId, OpError> {
    if g.meta(v)?.dims == dims {
        return Ok(v);
    }
    g.emit(ReshapeTo { dims }, &[v])
}

macro_rules! view_op {
    ($t:ident) => {
        impl Op for $t {
            fn name(&self) -> &'static str {
                stringify!($t)
            }

            fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
                let x = need(inputs, 0)?;
                let dims = self.dims(x, inputs)?;
                let y = sized(x.dtype, &dims)?;
                if y.len() != x.len() {
                    return Err(OpError::Shape(format!(
                        "{:?} cannot be viewed as {:?}",
                        x.dims.as_slice(),
                        dims.as_slice()
                    )));
                }
                Ok(vec![y])
            }

            fn forward(
                &self,
                _: &mut Cx,
                x: &[Option<View>],
                y: &mut [Option<ViewMut>],
            ) -> Result<(), OpError> {
                crate::ops::out(y, 0)?.bytes.copy_from_slice(need(x, 0)?.bytes);
                Ok(())
            }

            fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
                view_grad(g)
            }

            fn in_pieces(&self, inputs: &[Option<&Meta>], count: usize) -> Option<Piece> {
                let x = get(inputs, 0)?;
                piece::cut(&x.dims, count)?;
                let dims = piece::cut(&self.dims(x, inputs).ok()?, count)?;
                Piece::made(ReshapeTo { dims }, &[true], Made::Cut)
            }

            fn is_view(&self) -> bool {
                true
            }
        }
    };
}
view_op!(ReshapeTo);
view_op!(Reshape);
view_op!(Flatten);
view_op!(Squeeze);
view_op!(Unsqueeze);

impl ReshapeTo {
    fn dims(&self, _: &Meta, _: &[Option<&Meta>]) -> Result<Dims, OpError> {
        Ok(self.dims.clone())
    }
}

impl Reshape {
    fn dims(&self, x: &Meta, inputs: &[Option<&Meta>]) -> Result<Dims, OpError> {
        let shape = need(inputs, 1)?.ints(1)?;
        let mismatch = || OpError::Shape(format!("{:?} cannot be reshaped to {shape:?}", x.dims.as_slice()));
        let mut dims = Dims::new();
        let mut open = None;
        for (i, &d) in shape.iter().enumerate() {
            dims.push(match d {
                0 if !self.allow_zero => *x.dims.get(i).ok_or_else(mismatch)?,
                -1 if open.is_none() => {
                    open = Some(i);
                    1
                }
                d => usize::try_from(d).map_err(|_| mismatch())?,
            });
        }
        if let Some(i) = open {
            let rest = dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).ok_or_else(mismatch)?;
            // With another dimension of 0 any number would do; -1 then stands for 0 only where X is empty.
            dims[i] = match rest {
                0 if x.is_empty() && !self.allow_zero => 0,
                0 => return Err(mismatch()),
                n if x.len().is_multiple_of(n) => x.len() / n,
                _ => return Err(mismatch()),
            };
        }
        Ok(dims)
    }
}

impl Flatten {
    fn dims(&self, x: &Meta, _: &[Option<&Meta>]) -> Result<Dims, OpError> {
        let rank = x.rank() as i64;
        let at = if self.axis < 0 { self.axis + rank } else { self.axis };
        if !(0..=rank).contains(&at) {
            return Err(OpError::Shape(format!("axis {} for a tensor of rank {rank}", self.axis)));
        }
        let (outer, inner) = x.dims.split_at(at as usize);
        Ok(Dims::from_slice(&[outer.iter().product(), inner.iter().product()]))
    }
}

impl Squeeze {
    fn dims(&self, x: &Meta, inputs: &[Option<&Meta>]) -> Result<Dims, OpError> {
        let Some(axes) = self.axes.get(inputs)? else {
            return Ok(x.dims.iter().copied().filter(|&d| d != 1).collect());
        };
        let mut gone = vec![false; x.rank()];
        for a in axes {
            let a = axis(a, x.rank())?;
            if x.dims[a] != 1 {
                return Err(OpError::Shape(format!("axis {a} of {:?} is not 1", x.dims.as_slice())));
            }
            gone[a] = true;
        }
        Ok(x.dims.iter().zip(gone).filter(|(_, gone)| !gone).map(|(&d, _)| d).collect())
    }
}

impl Unsqueeze {
    fn dims(&self, x: &Meta, inputs: &[Option<&Meta>]) -> Result<Dims, OpError> {
        let axes = self
            .axes
            .get(inputs)?
            .ok_or_else(|| OpError::Attribute("'axes' of Unsqueeze is missing".into()))?;
        let rank = x.rank() + axes.len();
        let mut new = vec![false; rank];
        for a in &axes {
            let a = axis(*a, rank)?;
            if std::mem::replace(&mut new[a], true) {
                return Err(OpError::Shape(format!("axes {axes:?} name one axis twice")));
            }
        }
        let mut old = x.dims.iter();
        Ok(new.iter().map(|&n| if n { 1 } else { old.next().copied().unwrap_or(1) }).collect())
    }
}

pub(super) const ROWS: &[Row] = &[
    Row::new("Reshape", 5, |s| Ok(Arc::new(Reshape { allow_zero: s.attrs.flag("allowzero")? }))),
    Row::new("Flatten", 1, |s| Ok(Arc::new(Flatten { axis: s.attrs.int_or("axis", 1)? }))),
    Row::new("Squeeze", 1, |s| Ok(Arc::new(Squeeze { axes: Axes::new(s)? }))),
    Row::new("Unsqueeze", 1, |s| Ok(Arc::new(Unsqueeze { axes: Axes::new(s)? }))),
];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    use crate::tensor::Tensor;
    let ints = Tensor::ints;
    vec![
        Case::new("Reshape", 13).input(&[2, 3, 4]).fixed(ints(&[0, -1])),
        Case::new("Reshape", 5).named("scalar").input(&[1, 1]).fixed(ints(&[])),
        Case::new("Reshape", 14).named("allowzero").int("allowzero", 1).input(&[0, 3]).fixed(ints(&[3, 0])),
        Case::new("Reshape", 25).named("empty").input(&[0, 3]).fixed(ints(&[0, -1])),
        Case::new("Flatten", 9).input(&[2, 3, 4]),
        Case::new("Flatten", 13).named("axis 0").int("axis", 0).input(&[2, 3]),
        Case::new("Flatten", 13).named("axis -1").int("axis", -1).input(&[2, 3, 4]),
        Case::new("Squeeze", 11).ints("axes", &[0, -1]).input(&[1, 3, 1]),
        Case::new("Squeeze", 13).named("all").input(&[1, 3, 1]),
        Case::new("Squeeze", 13).named("axes input").input(&[1, 3, 1]).fixed(ints(&[-1])),
        Case::new("Unsqueeze", 11).ints("axes", &[0, 3]).input(&[3, 4]),
        Case::new("Unsqueeze", 13).named("axes input").input(&[3]).fixed(ints(&[-1, 0])),
        Case::of(ReshapeTo { dims: Dims::from_slice(&[6]) }).input(&[2, 3]),
    ]
}
