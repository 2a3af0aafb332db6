//! Products and convolutions of quantised operands. They are computed by floating-point kernels in a type that holds
//! every sum exactly, so the results are the integers' own.

use std::sync::Arc;

use crate::error::OpError;
use crate::graph::{Lowering, ValueId};
use crate::ops::binary::{Div, Max, Min, Sub};
use crate::ops::cast::CastTo;
use crate::ops::clip::Clip;
use crate::ops::composite::{Made, defined};
use crate::ops::logic::{Logic, Where};
use crate::ops::matmul::MatMul;
use crate::ops::quant::{Layout, QuantizeLinear, range};
use crate::ops::reduce::{Kind, Reduce};
use crate::ops::unary::{Round, Unary};
use crate::ops::{Attrs, Op, Spec};
use crate::tensor::DType;

type Value = Result<ValueId, OpError>;

/// The floating-point type in which sums of `terms` products of 8-bit differences are exact.
fn exact(terms: usize) -> DType {
    // Differences of 8-bit numbers are at most 255.
    match terms.checked_mul(255 * 255) {
        Some(most) if most < 1 << 24 => DType::F32,
        _ => DType::F64,
    }
}

/// Operand `slot` less its zero point, seen under `shape` where it is not one number.
fn centred(
    l: &mut Lowering,
    slot: usize,
    zero: usize,
    to: DType,
    shape: impl Fn(usize) -> Vec<usize>,
) -> Value {
    let x = l.x(slot)?;
    if !matches!(l.dtype(x)?, DType::U8 | DType::I8) {
        return Err(OpError::Type(format!("quantised operands of {}", l.dtype(x)?)));
    }
    let wide = l.emit(CastTo::new(to), &[x])?;
    let Some(zero) = l.x_opt(zero) else { return Ok(wide) };
    let mut zero = l.emit(CastTo::new(to), &[zero])?;
    let n = l.meta(zero)?.len();
    if l.meta(zero)?.rank() == 1 {
        zero = l.reshape(zero, &if n == 1 { vec![] } else { shape(n) })?;
    }
    l.emit(Sub, &[wide, zero])
}

/// The product of operands `a` and `b` (slots) less their zero points, in an exact type.
fn product(l: &mut Lowering, [a, zero_a]: [usize; 2], [b, zero_b]: [usize; 2]) -> Value {
    let terms = l.dims(l.x(a)?)?.last().copied().unwrap_or(1);
    let to = exact(terms);
    // Of A each row has a zero point, of B each column.
    let x = centred(l, a, zero_a, to, |n| vec![n, 1])?;
    let y = centred(l, b, zero_b, to, |n| vec![n])?;
    l.emit(MatMul::default(), &[x, y])
}

/// The convolution of operands 0 and `w` less their zero points, in an exact type.
fn convolution(a: &Attrs, l: &mut Lowering, zero_x: usize, [w, zero_w]: [usize; 2]) -> Value {
    let dims = l.dims(l.x(w)?)?;
    let to = exact(dims.iter().skip(1).product());
    let x = centred(l, 0, zero_x, to, |n| vec![n])?;
    let rank = dims.len();
    let each = |n: usize| std::iter::once(n).chain((1..rank).map(|_| 1)).collect();
    let weights = centred(l, w, zero_w, to, each)?;
    l.standard("Conv", 11, a, &[Some(x), Some(weights)])
}

/// `sum · factor` as levels of the type of the zero point in `slot`.
fn requantized(l: &mut Lowering, sum: ValueId, factor: ValueId, slot: usize) -> Made {
    let zero = l.x(slot)?;
    let levels = l.dtype(zero)?;
    let (low, high) = range(levels)?;
    let wide = CastTo::new(DType::F64);
    let (factor, zero) = (l.emit(wide, &[factor])?, l.emit(wide, &[zero])?);
    let scaled = l.mul(sum, factor)?;
    let rounded = l.emit(Unary(Round {}), &[scaled])?;
    let moved = l.add(rounded, zero)?;
    let kept = l.emit(Clip { low: Some(low as f32), high: Some(high as f32) }, &[moved])?;
    Ok(vec![Some(l.emit(CastTo::new(levels), &[kept])?)])
}

/// `first · second / third`, of scales in the given slots.
fn factor(l: &mut Lowering, [a, b, c]: [usize; 3], shape: impl Fn(usize) -> Vec<usize>) -> Value {
    let mut second = l.x(b)?;
    let n = l.meta(second)?.len();
    if n > 1 && l.meta(second)?.rank() == 1 {
        second = l.reshape(second, &shape(n))?;
    }
    let both = l.mul(l.x(a)?, second)?;
    l.emit(Div, &[both, l.x(c)?])
}

/// ONNX `MatMulInteger` (opset 10): A, B of 8 bits and their zero points to int32.
pub(super) fn matmul(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
    defined(spec, "MatMulInteger", 1, |_, l| {
        let sum = product(l, [0, 2], [1, 3])?;
        Ok(vec![Some(l.emit(CastTo::new(DType::I32), &[sum])?)])
    })
}

/// ONNX `QLinearMatMul` (opset 10): A, B and the result with a scale and zero point each.
pub(super) fn qlinear_matmul(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
    defined(spec, "QLinearMatMul", 1, |_, l| {
        let sum = product(l, [0, 2], [3, 5])?;
        let sum = l.emit(CastTo::new(DType::F64), &[sum])?;
        let scale_a = l.x(1)?;
        if l.meta(scale_a)?.len() > 1 {
            return Err(OpError::Unsupported("a scale for each row of A".into()));
        }
        let factor = factor(l, [1, 4, 6], |n| vec![n])?;
        requantized(l, sum, factor, 7)
    })
}

/// ONNX `ConvInteger` (opset 10): X, W of 8 bits and their zero points to int32.
pub(super) fn conv(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
    defined(spec, "ConvInteger", 1, |a, l| {
        let sum = convolution(a, l, 2, [1, 3])?;
        Ok(vec![Some(l.emit(CastTo::new(DType::I32), &[sum])?)])
    })
}

/// ONNX `QLinearConv` (opset 10): X, W and the result with a scale and zero point each, and a bias of int32.
pub(super) fn qlinear_conv(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
    defined(spec, "QLinearConv", 1, |a, l| {
        let sum = convolution(a, l, 2, [3, 5])?;
        let mut sum = l.emit(CastTo::new(DType::F64), &[sum])?;
        let spatial = l.meta(sum)?.rank().saturating_sub(2);
        let channels = |n: usize| std::iter::once(n).chain((0..spatial).map(|_| 1)).collect::<Vec<_>>();
        if let Some(bias) = l.x_opt(8) {
            let bias = l.emit(CastTo::new(DType::F64), &[bias])?;
            let n = l.meta(bias)?.len();
            let bias = l.reshape(bias, &channels(n))?;
            sum = l.add(sum, bias)?;
        }
        let factor = factor(l, [1, 4, 6], channels)?;
        requantized(l, sum, factor, 7)
    })
}

/// ONNX `DynamicQuantizeLinear` (opset 11): X to levels of uint8, with the scale and zero point that its range gives.
pub(super) fn dynamic(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
    defined(spec, "DynamicQuantizeLinear", 3, |_, l| {
        let x = l.x(0)?;
        let dtype = l.dtype(x)?;
        let (zero, one, most) = (l.scalar(0.0, dtype), l.scalar(1.0, dtype), l.scalar(255.0, dtype));
        let mut end = |kind: Kind| -> Value {
            let all = l.emit(Reduce { kind, axes: None, keepdims: false, noop: false }, &[x])?;
            l.emit(if kind == Kind::Max { Max } else { Min }, &[all, zero])
        };
        let (high, low) = (end(Kind::Max)?, end(Kind::Min)?);
        let span = l.emit(Sub, &[high, low])?;
        let flat = l.emit(Logic::Equal, &[span, zero])?;
        let span = l.emit(Where, &[flat, one, span])?;
        let scale = l.emit(Div, &[span, most])?;
        let below = l.emit(Sub, &[zero, low])?;
        let offset = l.emit(Div, &[below, scale])?;
        let kept = l.emit(Clip { low: Some(0.0), high: Some(255.0) }, &[offset])?;
        let rounded = l.emit(Unary(Round {}), &[kept])?;
        let point = l.emit(CastTo::new(DType::U8), &[rounded])?;
        let op = QuantizeLinear { layout: Layout { axis: 1, block: 0 }, dtype: DType::U8, saturate: true };
        let y = l.emit(op, &[x, scale, point])?;
        Ok(vec![Some(y), Some(scale), Some(point)])
    })
}

#[cfg(test)]
pub(super) fn cases() -> Vec<crate::ops::cases::Case> {
    use crate::ops::cases::Case;
    use crate::tensor::Tensor;
    let ints = |dims: &[usize], v: &[i64], t: DType| Tensor::from_slice(dims, v).unwrap().cast(t);
    let (u, s) = (DType::U8, DType::I8);
    let a = || ints(&[2, 3], &[11, 7, 3, 10, 6, 255], u);
    let b = || ints(&[3, 2], &[1, -4, 2, 5, 3, -6], s);
    let image = || ints(&[1, 1, 3, 3], &[2, 3, 4, 5, 6, 7, 8, 9, 10], u);
    let kernel = || ints(&[2, 1, 2, 2], &[1, 1, 1, 1, 3, 2, 1, 0], u);
    let f = |v: f32| Tensor::scalar(v);
    vec![
        Case::new("MatMulInteger", 10).fixed(a()).fixed(b()).fixed(Tensor::scalar(12u8)).forward_only(),
        Case::new("MatMulInteger", 10)
            .named("zero points of rows and columns")
            .fixed(a())
            .fixed(b())
            .fixed(ints(&[2], &[12, 3], u))
            .fixed(ints(&[2], &[-1, 3], s))
            .forward_only(),
        Case::new("QLinearMatMul", 21)
            .fixed(a())
            .fixed(f(0.5))
            .fixed(Tensor::scalar(12u8))
            .fixed(b())
            .fixed(Tensor::from_slice(&[2], &[0.25f32, 0.5]).unwrap())
            .fixed(ints(&[2], &[-1, 3], s))
            .fixed(f(0.7))
            .fixed(Tensor::scalar(100u8))
            .forward_only(),
        Case::new("ConvInteger", 10)
            .ints("pads", &[1, 1, 1, 1])
            .fixed(image())
            .fixed(kernel())
            .fixed(Tensor::scalar(1u8))
            .forward_only(),
        Case::new("QLinearConv", 10)
            .fixed(image())
            .fixed(f(0.5))
            .fixed(Tensor::scalar(1u8))
            .fixed(kernel())
            .fixed(Tensor::from_slice(&[2], &[0.25f32, 0.5]).unwrap())
            .fixed(Tensor::scalar(1u8))
            .fixed(f(0.1))
            .fixed(Tensor::scalar(9u8))
            .fixed(ints(&[2], &[5, -7], DType::I32))
            .forward_only(),
        Case::new("DynamicQuantizeLinear", 11).within(&[3, 4], -2.0, 6.0).outputs(3),
    ]
}

#[cfg(test)]
#[test]
fn integer_products_are_exact() {
    use crate::tensor::Tensor;
    let ints = |dims: &[usize], v: &[i64], t: DType| Tensor::from_slice(dims, v).unwrap().cast(t);
    let run = |op: Arc<dyn Op>, x: &[&Tensor]| {
        let x: Vec<Option<&Tensor>> = x.iter().map(|t| Some(*t)).collect();
        crate::ops::eval(op.as_ref(), &x).unwrap()
    };
    let spec = Spec { domain: "", op_type: "", opset: 10, attrs: &Attrs::default(), inputs: 3, outputs: 1 };
    // 1000 products of 255·255 need more bits than float32 has.
    let a = ints(&[1, 1001], &[255; 1001], DType::U8);
    let mut column = vec![-127; 1001];
    column[0] = 1;
    let b = ints(&[1001, 1], &column, DType::I8);
    let y = run(matmul(&spec).unwrap(), &[&a, &b]);
    assert_eq!((y[0].dtype(), y[0].to_ints().unwrap()), (DType::I32, vec![255 - 255 * 127 * 1000]));
    let x = Tensor::from_slice(&[6], &[0.0f32, 2.0, -3.0, -2.5, 1.34, 0.5]).unwrap();
    let y = run(dynamic(&spec).unwrap(), &[&x]);
    assert_eq!(y[0].to_ints().unwrap(), [153, 255, 0, 26, 221, 179]);
    assert_eq!(y[2].to_ints().unwrap(), [153]);
    // Zeros alone have a scale all the same.
    let y = run(dynamic(&spec).unwrap(), &[&Tensor::from_slice(&[2], &[0.0f32; 2]).unwrap()]);
    assert_eq!((y[0].to_ints().unwrap(), y[2].to_ints().unwrap()), (vec![0, 0], vec![0]));
}
