//! Element types, shapes, owned tensors and the views that kernels read and write.
//!
//! Every tensor is dense, in ONNX's row-major order, in 64-byte-aligned storage.

mod buffer;
mod dtype;
mod narrow;
mod rounding;

use std::fmt;
use std::sync::Arc;

use half::{bf16, f16};
use ndarray::{ArrayD, ArrayViewD, ArrayViewMutD, IxDyn};
use smallvec::SmallVec;

use crate::error::{self, OpError};

pub use buffer::{ALIGN, Buffer};
pub(crate) use dtype::by_size;
pub use dtype::{DType, Elem, Float};
pub use narrow::{Conversion, Round};
pub use rounding::{to_bf16, to_f16};

/// Dimensions of a tensor, outermost first; empty for a scalar.
pub type Dims = SmallVec<[usize; 6]>;

/// What is known of a value before the run: element type, shape and, for what can be computed
/// at plan time (shape arithmetic, constants), the value itself.
#[derive(Debug, Clone)]
pub struct Meta {
    pub dtype: DType,
    pub dims: Dims,
    pub value: Option<Arc<Tensor>>,
}

impl Meta {
    pub fn new(dtype: DType, dims: &[usize]) -> Self {
        Meta { dtype, dims: Dims::from_slice(dims), value: None }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.dims.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.len() * self.dtype.size()
    }

    pub fn rank(&self) -> usize {
        self.dims.len()
    }

    /// Refuses what no machine could hold: products of extents, of some or all, do not overflow after this.
    pub fn check_size(&self) -> Result<(), OpError> {
        let bytes = self.dims.iter().try_fold(self.dtype.size(), |n, &d| n.checked_mul(d.max(1)));
        match bytes {
            Some(n) if n <= 1 << 40 => Ok(()),
            _ => Err(OpError::Shape(format!("a tensor of shape {:?} is too large", self.dims.as_slice()))),
        }
    }

    /// The known value as integers, for shape-like operands.
    /// Fails with `NeedsValue(index)` when it is not known yet.
    pub fn ints(&self, index: usize) -> Result<Vec<i64>, OpError> {
        self.value.as_ref().ok_or(OpError::NeedsValue(index))?.to_ints()
    }

    pub fn same_shape(&self, other: &Meta) -> bool {
        self.dtype == other.dtype && self.dims == other.dims
    }
}

/// An owned dense tensor.
#[derive(Clone)]
pub struct Tensor {
    dtype: DType,
    dims: Dims,
    data: Buffer,
}

impl Tensor {
    pub fn zeros(dtype: DType, dims: &[usize]) -> Self {
        let bytes = dims.iter().product::<usize>() * dtype.size();
        Tensor { dtype, dims: Dims::from_slice(dims), data: Buffer::zeroed(bytes) }
    }

    /// The same for `what` may be larger than all memory: then an [`error::Error::Memory`].
    pub fn try_zeros(dtype: DType, dims: &[usize], what: &str) -> error::Result<Self> {
        let bytes = dims.iter().product::<usize>() * dtype.size();
        Ok(Tensor { dtype, dims: Dims::from_slice(dims), data: Buffer::try_zeroed(bytes, what)? })
    }

    /// Fails when `data` does not hold exactly `dims` elements.
    pub fn from_slice<T: Elem>(dims: &[usize], data: &[T]) -> Result<Self, OpError> {
        let mut t = Tensor::zeros(T::DTYPE, dims);
        if t.len() != data.len() {
            return Err(OpError::Shape(format!("{} elements for shape {dims:?}", data.len())));
        }
        t.bytes_mut().copy_from_slice(bytemuck::cast_slice(data));
        Ok(t)
    }

    /// From little-endian bytes of exactly the right length.
    pub fn from_bytes(dtype: DType, dims: &[usize], bytes: &[u8]) -> Result<Self, OpError> {
        let mut t = Tensor::zeros(dtype, dims);
        if t.bytes().len() != bytes.len() {
            return Err(OpError::Shape(format!(
                "{} bytes for {dtype} of shape {dims:?}, which takes {}",
                bytes.len(),
                t.bytes().len()
            )));
        }
        t.bytes_mut().copy_from_slice(bytes);
        Ok(t)
    }

    pub fn scalar<T: Elem>(x: T) -> Self {
        let mut t = Tensor::zeros(T::DTYPE, &[]);
        t.bytes_mut().copy_from_slice(bytemuck::bytes_of(&x));
        t
    }

    /// A one-dimensional int64 tensor.
    pub fn ints(values: &[i64]) -> Self {
        let mut t = Tensor::zeros(DType::I64, &[values.len()]);
        t.bytes_mut().copy_from_slice(bytemuck::cast_slice(values));
        t
    }

    pub fn from_array<T: Elem>(a: &ArrayD<T>) -> Self {
        let mut t = Tensor::zeros(T::DTYPE, a.shape());
        let out: &mut [T] = bytemuck::cast_slice_mut(t.bytes_mut());
        for (o, x) in out.iter_mut().zip(a.iter()) {
            *o = *x;
        }
        t
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub fn dims(&self) -> &[usize] {
        &self.dims
    }

    pub fn len(&self) -> usize {
        self.dims.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn meta(&self) -> Meta {
        Meta { dtype: self.dtype, dims: self.dims.clone(), value: None }
    }

    pub fn bytes(&self) -> &[u8] {
        &self.data.bytes()[..self.len() * self.dtype.size()]
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let n = self.len() * self.dtype.size();
        &mut self.data.bytes_mut()[..n]
    }

    pub fn view(&self) -> View<'_> {
        View { dtype: self.dtype, dims: &self.dims, bytes: self.bytes() }
    }

    pub fn view_mut(&mut self) -> ViewMut<'_> {
        let n = self.len() * self.dtype.size();
        ViewMut { dtype: self.dtype, dims: &self.dims, bytes: &mut self.data.bytes_mut()[..n] }
    }

    pub fn get<T: Elem>(&self) -> Result<&[T], OpError> {
        cast(self.dtype, self.bytes())
    }

    pub fn get_mut<T: Elem>(&mut self) -> Result<&mut [T], OpError> {
        let dtype = self.dtype;
        cast_mut(dtype, self.bytes_mut())
    }

    /// The same elements under other dimensions of equal product.
    pub fn reshaped(mut self, dims: &[usize]) -> Result<Self, OpError> {
        if dims.iter().product::<usize>() != self.len() {
            return Err(OpError::Shape(format!("{:?} cannot be viewed as {dims:?}", self.dims)));
        }
        self.dims = Dims::from_slice(dims);
        Ok(self)
    }

    /// Elements as integers (any integer type or bool; of narrow floats their bits).
    pub fn to_ints(&self) -> Result<Vec<i64>, OpError> {
        if self.dtype.is_float() {
            return Err(OpError::Type(format!("{} where integers are needed", self.dtype)));
        }
        Ok(match self.dtype {
            DType::I64 => self.get::<i64>()?.to_vec(),
            DType::I32 => self.get::<i32>()?.iter().map(|&x| x as i64).collect(),
            DType::I16 => self.get::<i16>()?.iter().map(|&x| x as i64).collect(),
            DType::I8 | DType::I4 | DType::I2 => self.get::<i8>()?.iter().map(|&x| x as i64).collect(),
            DType::U64 => self.get::<u64>()?.iter().map(|&x| x as i64).collect(),
            DType::U32 => self.get::<u32>()?.iter().map(|&x| x as i64).collect(),
            DType::U16 => self.get::<u16>()?.iter().map(|&x| x as i64).collect(),
            _ => self.get::<u8>()?.iter().map(|&x| x as i64).collect(),
        })
    }

    /// Elements as f64, of any type.
    pub fn to_f64(&self) -> Vec<f64> {
        let b = self.bytes();
        match self.dtype {
            DType::F32 => bytemuck::cast_slice::<u8, f32>(b).iter().map(|&x| x as f64).collect(),
            DType::F64 => bytemuck::cast_slice::<u8, f64>(b).to_vec(),
            DType::F16 => bytemuck::cast_slice::<u8, f16>(b).iter().map(|x| x.to_f64()).collect(),
            DType::BF16 => bytemuck::cast_slice::<u8, bf16>(b).iter().map(|x| x.to_f64()).collect(),
            d if d.is_narrow() => b.iter().map(|&x| d.decode(x)).collect(),
            _ => self.to_ints().unwrap_or_default().into_iter().map(|x| x as f64).collect(),
        }
    }

    /// The same elements in another type, rounding to nearest where it is narrower
    /// (floats to integers truncate towards zero and saturate).
    pub fn cast(&self, to: DType) -> Tensor {
        if to == self.dtype {
            return self.clone();
        }
        let mut out = Tensor::zeros(to, &self.dims);
        // Integers that f64 cannot hold exactly keep all their bits on the integer path.
        let whole = |d: DType| !d.is_float() && !d.is_narrow();
        if whole(self.dtype) && whole(to) {
            let src = self.to_ints().unwrap_or_default();
            write_ints(&mut out, &src);
        } else {
            write_f64(&mut out, &self.to_f64());
        }
        out
    }
}

/// Bytes that are cast together.
const PIECE: usize = 1 << 14;

/// As [`Tensor::cast`], of elements one after the other, piece by piece: without room for all of them at once.
pub fn cast_pieces(
    from: DType,
    bytes: &[u8],
    to: DType,
    mut put: impl FnMut(&[u8]),
) -> Result<(), crate::error::OpError> {
    for piece in bytes.chunks(PIECE) {
        put(Tensor::from_bytes(from, &[piece.len() / from.size()], piece)?.cast(to).bytes());
    }
    Ok(())
}

fn fill<S: Copy, T: Elem>(out: &mut Tensor, src: &[S], f: impl Fn(S) -> T) {
    let dst: &mut [T] = bytemuck::cast_slice_mut(out.bytes_mut());
    for (d, &s) in dst.iter_mut().zip(src) {
        *d = f(s);
    }
}

fn write_ints(out: &mut Tensor, src: &[i64]) {
    match out.dtype {
        DType::Bool => fill(out, src, |x| (x != 0) as u8),
        DType::U8 => fill(out, src, |x| x as u8),
        DType::I8 => fill(out, src, |x| x as i8),
        DType::U16 => fill(out, src, |x| x as u16),
        DType::I16 => fill(out, src, |x| x as i16),
        DType::U32 => fill(out, src, |x| x as u32),
        DType::I32 => fill(out, src, |x| x as i32),
        DType::U64 => fill(out, src, |x| x as u64),
        _ => fill(out, src, |x| x),
    }
}

fn write_f64(out: &mut Tensor, src: &[f64]) {
    match out.dtype {
        DType::F32 => fill(out, src, |x| x as f32),
        DType::F64 => fill(out, src, |x| x),
        DType::F16 => fill(out, src, to_f16),
        DType::BF16 => fill(out, src, to_bf16),
        DType::Bool => fill(out, src, |x| (x != 0.0) as u8),
        DType::U8 => fill(out, src, |x| x as u8),
        DType::I8 => fill(out, src, |x| x as i8),
        DType::U16 => fill(out, src, |x| x as u16),
        DType::I16 => fill(out, src, |x| x as i16),
        DType::U32 => fill(out, src, |x| x as u32),
        DType::I32 => fill(out, src, |x| x as i32),
        DType::U64 => fill(out, src, |x| x as u64),
        DType::I64 => fill(out, src, |x| x as i64),
        narrow => fill(out, src, |x| narrow.encode(x, Conversion::default())),
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({} {:?})", self.dtype, self.dims)
    }
}

/// A dense tensor that somebody else owns.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    pub dtype: DType,
    pub dims: &'a [usize],
    pub bytes: &'a [u8],
}

/// A dense tensor to be written.
#[derive(Debug)]
pub struct ViewMut<'a> {
    pub dtype: DType,
    pub dims: &'a [usize],
    pub bytes: &'a mut [u8],
}

impl<'a> View<'a> {
    /// The elements; fails when the element type is another.
    pub fn get<T: Elem>(&self) -> Result<&'a [T], OpError> {
        cast(self.dtype, self.bytes)
    }

    pub fn len(&self) -> usize {
        self.dims.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn array<T: Elem>(&self) -> Result<ArrayViewD<'a, T>, OpError> {
        ArrayViewD::from_shape(IxDyn(self.dims), self.get::<T>()?).map_err(|e| OpError::Shape(e.to_string()))
    }

    pub fn to_tensor(&self) -> Tensor {
        let mut t = Tensor::zeros(self.dtype, self.dims);
        t.bytes_mut().copy_from_slice(self.bytes);
        t
    }
}

impl ViewMut<'_> {
    pub fn get<T: Elem>(&mut self) -> Result<&mut [T], OpError> {
        cast_mut(self.dtype, self.bytes)
    }

    pub fn len(&self) -> usize {
        self.dims.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn array<T: Elem>(&mut self) -> Result<ArrayViewMutD<'_, T>, OpError> {
        let dims = IxDyn(self.dims);
        ArrayViewMutD::from_shape(dims, self.get::<T>()?).map_err(|e| OpError::Shape(e.to_string()))
    }
}

fn check<T: Elem>(dtype: DType) -> Result<(), OpError> {
    if dtype.reads_as(T::DTYPE) {
        Ok(())
    } else {
        Err(OpError::Type(format!("{dtype} where {} is needed", T::DTYPE)))
    }
}

fn cast<T: Elem>(dtype: DType, bytes: &[u8]) -> Result<&[T], OpError> {
    check::<T>(dtype)?;
    bytemuck::try_cast_slice(bytes).map_err(|e| OpError::Internal(format!("view of {dtype}: {e}")))
}

fn cast_mut<T: Elem>(dtype: DType, bytes: &mut [u8]) -> Result<&mut [T], OpError> {
    check::<T>(dtype)?;
    bytemuck::try_cast_slice_mut(bytes).map_err(|e| OpError::Internal(format!("view of {dtype}: {e}")))
}

/// The shape two operands broadcast to (ONNX multidirectional broadcasting), or an error.
pub fn broadcast(a: &[usize], b: &[usize]) -> Result<Dims, OpError> {
    let rank = a.len().max(b.len());
    let at = |d: &[usize], i: usize| if i + d.len() < rank { 1 } else { d[i + d.len() - rank] };
    (0..rank)
        .map(|i| match (at(a, i), at(b, i)) {
            (x, y) if x == y => Ok(x),
            (1, y) => Ok(y),
            (x, 1) => Ok(x),
            _ => Err(OpError::Shape(format!("shapes {a:?} and {b:?} do not broadcast"))),
        })
        .collect()
}

/// `axis` counted from the end when negative, checked against `rank`.
pub fn axis(axis: i64, rank: usize) -> Result<usize, OpError> {
    let a = if axis < 0 { axis + rank as i64 } else { axis };
    if (0..rank as i64).contains(&a) {
        Ok(a as usize)
    } else {
        Err(OpError::Shape(format!("axis {axis} for a tensor of rank {rank}")))
    }
}
