//! Where the file keeps its float constants, and how their values are read and put back.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use bytes::Bytes;
use half::{bf16, f16};

use crate::error::{Error, OpError, Result};
use crate::graph::{NodeId, ValueId, WeightId};
use crate::import::SourceFile;
use crate::import::proto::TensorProto;
use crate::ops::eval;
use crate::ops::quant::{DequantizeLinear, Layout, QuantizeLinear};
use crate::tensor::{ALIGN, DType, Dims, Tensor, View};

/// What a float constant is to the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Of a convolution, a matrix product, a recurrent layer, a PRelu slope.
    Weight,
    Bias,
    /// A lookup table, or vectors that are data to the network: of positions, a class token, a learned first state.
    Embedding,
    /// The multiplier of a normalisation, or of a channel.
    Scale,
    /// What a normalisation adds.
    Shift,
    RunningMean,
    RunningVar,
    /// Anything else: never trained unless asked for by name.
    Constant,
}

impl Role {
    /// Whether the gradient trains it.
    pub fn is_trainable(self) -> bool {
        !matches!(self, Role::RunningMean | Role::RunningVar | Role::Constant)
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Role::Weight => "weight",
            Role::Bias => "bias",
            Role::Embedding => "embedding",
            Role::Scale => "scale",
            Role::Shift => "shift",
            Role::RunningMean => "running-mean",
            Role::RunningVar => "running-var",
            Role::Constant => "constant",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One place that a constant is used in: an operand slot, seen through Transpose, Reshape and the like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Use {
    pub node: NodeId,
    pub slot: usize,
    pub role: Role,
}

/// A float constant of the file: an initializer, or the value of a `Constant` node.
#[derive(Debug, Clone)]
pub struct Weight {
    /// The initializer's name, or the `Constant` node's output.
    pub name: String,
    /// As stored; values are computed with in `working()`.
    pub dtype: DType,
    pub dims: Dims,
    pub location: Location,
    pub role: Role,
    /// Whether it trains by default.
    pub trainable: bool,
    /// The rule that gave the role, for people.
    pub why: String,
    /// Its value in the graph.
    pub value: ValueId,
    /// Every use, each as the role it would give alone.
    pub uses: Vec<Use>,
    /// Set where the exporter merged equal tensors of several layers into one, and this one is for a
    /// layer of its own again: the values are the source's until one of the two changes.
    pub split: Option<Split>,
    /// A per-channel parameter of several layers that could not be split.
    pub merged: bool,
    /// Set where the file has integers, of type `dtype`, that `DequantizeLinear` makes the weight of.
    pub quantised: Option<Quantised>,
}

/// How a file's integers stand for a weight's values.
#[derive(Debug, Clone)]
pub struct Quantised {
    pub layout: Layout,
    pub scale: Tensor,
    pub zero: Option<Tensor>,
}

impl Quantised {
    fn with<'a>(&'a self, x: &'a Tensor) -> [Option<&'a Tensor>; 3] {
        [Some(x), Some(&self.scale), self.zero.as_ref()]
    }
}

/// A weight that shares its bytes with another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Split {
    pub source: WeightId,
    pub reader: Reader,
}

/// Where in the file a split weight is read, by positions among the graph's nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reader {
    /// By an `Identity` node that only this layer reads; an initializer can take its place.
    Identity(usize),
    /// By these operands (node, slot), which have to be given the new name.
    Operands(Vec<(usize, usize)>),
}

/// Where a constant's bytes lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// Index into `Model::files`; 0 is the model itself.
    pub file: usize,
    /// Of the first byte of the values.
    pub offset: usize,
    /// Bytes from the first to the last of the values.
    pub len: usize,
    pub encoding: Encoding,
}

/// How a constant is stored. All but [`Varints`](Encoding::Varints) and [`Filled`](Encoding::Filled)
/// are overwritten in place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Encoding {
    /// `raw_data`, or external data.
    Raw,
    /// `float_data`, packed.
    PackedFloat,
    /// `double_data`, packed.
    PackedDouble,
    /// `AttributeProto.floats` of a `Constant` node, packed.
    AttributeFloats,
    /// `AttributeProto.f` of a `Constant` node.
    AttributeFloat,
    /// One of the packed kinds, in several chunks or unpacked: the ranges of whole elements.
    Scattered(Vec<Range<usize>>),
    /// Half floats in `int32_data`: of variable length, so a change splices the field.
    Varints { chunks: Vec<Range<usize>> },
    /// A node that computes the constant (`ConstantOfShape`, or a `Constant` whose zero is not written
    /// out), by its position in the file: replaced at the first change.
    Filled { node: usize, element: Vec<u8> },
}

/// The size of a tensor in bytes, or why it cannot be one.
pub fn byte_size(dtype: DType, dims: &[usize]) -> std::result::Result<usize, String> {
    dims.iter()
        .try_fold(dtype.size(), |n, &d| n.checked_mul(d))
        // Room for rounding up to the alignment.
        .filter(|&n| n <= isize::MAX as usize - ALIGN)
        .ok_or_else(|| format!("a tensor of shape {dims:?} does not fit in memory"))
}

/// The dimensions of a stored tensor.
pub fn dims_of(dims: &[i64]) -> std::result::Result<Dims, String> {
    dims.iter().map(|&d| usize::try_from(d).map_err(|_| format!("dimension {d} is negative"))).collect()
}

/// The position of `slice` in `file`, which it aliases.
pub fn position(file: &Bytes, slice: &Bytes) -> Option<Range<usize>> {
    let at = (slice.as_ptr() as usize).checked_sub(file.as_ptr() as usize)?;
    let end = at.checked_add(slice.len())?;
    (end <= file.len()).then_some(at..end)
}

impl Location {
    /// Of the values of a tensor that lie in the model file itself.
    pub fn in_tensor(model: &Bytes, t: &TensorProto, dtype: DType) -> std::result::Result<Location, String> {
        let (chunks, packed) = if let Some(raw) = &t.raw_data {
            (std::slice::from_ref(raw), Encoding::Raw)
        } else {
            match dtype {
                DType::F32 => (t.float_data.0.as_slice(), Encoding::PackedFloat),
                DType::F64 => (t.double_data.0.as_slice(), Encoding::PackedDouble),
                DType::F16 | DType::BF16 => {
                    (t.int32_data.0.as_slice(), Encoding::Varints { chunks: Vec::new() })
                }
                _ => return Err(format!("{dtype} is not a float type")),
            }
        };
        Location::of_chunks(model, chunks, packed)
    }

    /// Of values that lie in `chunks` of the model file; `packed` is what they are if there is one chunk.
    pub fn of_chunks(
        model: &Bytes,
        chunks: &[Bytes],
        packed: Encoding,
    ) -> std::result::Result<Location, String> {
        let ranges: Option<Vec<Range<usize>>> =
            chunks.iter().filter(|c| !c.is_empty()).map(|c| position(model, c)).collect();
        let ranges = ranges.ok_or("its values do not lie in the file")?;
        let offset = ranges.first().map_or(0, |r| r.start);
        // Chunks of one field are met in file order.
        let len = ranges.last().map_or(0, |r| r.end.saturating_sub(offset));
        let encoding = match packed {
            Encoding::Varints { .. } => Encoding::Varints { chunks: ranges },
            _ if ranges.len() > 1 => Encoding::Scattered(ranges),
            packed => packed,
        };
        Ok(Location { file: 0, offset, len, encoding })
    }
}

impl Weight {
    fn fail(&self, what: impl Into<String>) -> Error {
        Error::value(&self.name, what)
    }

    /// The type its values are computed in: half floats are widened, integers that stand for floats are those.
    pub fn working(&self) -> DType {
        self.quantised.as_ref().map_or(self.dtype.working(), |q| q.scale.dtype())
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.dims.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn file<'a>(&self, files: &'a [SourceFile]) -> Result<&'a Bytes> {
        files.get(self.location.file).map(|f| &f.bytes).ok_or_else(|| self.fail("its file is not open"))
    }

    /// The values in the stored type, little-endian, exactly as they lie in the file; contiguous
    /// storage is not copied.
    pub fn stored<'a>(&self, files: &'a [SourceFile]) -> Result<Cow<'a, [u8]>> {
        let want = byte_size(self.dtype, &self.dims).map_err(|e| self.fail(e))?;
        let file = self.file(files)?;
        let outside = || self.fail("its values lie outside the file");
        let l = &self.location;
        let stored = match &l.encoding {
            Encoding::Scattered(chunks) => {
                let mut out = Vec::with_capacity(want.min(file.len()));
                for r in chunks {
                    out.extend_from_slice(file.get(r.clone()).ok_or_else(outside)?);
                }
                Cow::Owned(out)
            }
            Encoding::Varints { chunks } => {
                let mut out = Vec::with_capacity(want.min(2 * file.len()));
                for r in chunks {
                    let chunk = file.get(r.clone()).ok_or_else(outside)?;
                    let mut at = 0;
                    while at < chunk.len() {
                        let (v, next) = crate::import::wire::varint(chunk, at, chunk.len())
                            .map_err(|e| self.fail(e.to_string()))?;
                        let v = v as i64;
                        // Some writers store the bits as a signed 16-bit number.
                        if !(-0x8000..=0xffff).contains(&v) {
                            return Err(self.fail(format!("{v} is not the bits of a {}", self.dtype)));
                        }
                        out.extend_from_slice(&(v as u16).to_le_bytes());
                        at = next;
                    }
                }
                Cow::Owned(out)
            }
            Encoding::Filled { element, .. } => Cow::Owned(element.repeat(self.len())),
            _ => {
                let end = l.offset.checked_add(l.len).ok_or_else(outside)?;
                Cow::Borrowed(file.get(l.offset..end).ok_or_else(outside)?)
            }
        };
        if stored.len() != want {
            return Err(self.fail(format!(
                "{} bytes of values for {} of shape {:?}, which takes {want}",
                stored.len(),
                self.dtype,
                self.dims.as_slice()
            )));
        }
        Ok(stored)
    }

    /// The values in the type they are computed in, `working()`.
    pub fn load(&self, files: &[SourceFile]) -> Result<Tensor> {
        let stored = self.stored(files)?;
        let t = Tensor::from_bytes(self.dtype, &self.dims, &stored).map_err(|e| self.fail(e.to_string()))?;
        if let Some(q) = &self.quantised {
            let op = DequantizeLinear { layout: q.layout };
            let made = eval(&op, &q.with(&t)).map_err(|e| self.fail(e.to_string()))?;
            return made.into_iter().next().ok_or_else(|| self.fail("has no values"));
        }
        Ok(if self.dtype == self.working() { t } else { t.cast(self.working()) })
    }

    /// The values where they lie, when they are contiguous, aligned and in their working type.
    pub fn view<'a>(&'a self, files: &'a [SourceFile]) -> Option<View<'a>> {
        self.view_stored(files).filter(|view| view.dtype == self.working())
    }

    /// The values where they lie, in the type that they are stored in, when they are contiguous and aligned.
    pub fn view_stored<'a>(&'a self, files: &'a [SourceFile]) -> Option<View<'a>> {
        let bytes = self.bytes_stored(files)?;
        let aligned = (bytes.as_ptr() as usize).is_multiple_of(self.dtype.size());
        aligned.then_some(View { dtype: self.dtype, dims: &self.dims, bytes })
    }

    /// The bytes of the values where they lie, at any address, in the type that they are stored in, when they are contiguous.
    pub fn bytes_stored<'a>(&'a self, files: &'a [SourceFile]) -> Option<&'a [u8]> {
        match self.stored(files).ok()? {
            Cow::Borrowed(bytes) if self.quantised.is_none() => Some(bytes),
            _ => None,
        }
    }

    /// The stored bytes after the weight has become `new`, given those of before; `None` when nothing
    /// changes. An element that keeps its value keeps its bytes; others are rounded to nearest, ties to even.
    ///
    /// Fails when type or shape differ, and when a finite value overflows the stored type.
    pub fn restore(&self, old: &[u8], new: &Tensor) -> Result<Option<Vec<u8>>> {
        if new.dims() != self.dims.as_slice() || new.dtype() != self.working() {
            return Err(self.fail(format!(
                "a new value of {} {:?} for {} {:?}",
                new.dtype(),
                new.dims(),
                self.working(),
                self.dims.as_slice()
            )));
        }
        if let Some(q) = &self.quantised {
            if let Some(i) = new.to_f64().iter().position(|x| !x.is_finite()) {
                return Err(self.fail(format!("element {i} is not finite")));
            }
            let fail = |e: OpError| self.fail(e.to_string());
            let before = Tensor::from_bytes(self.dtype, &self.dims, old).map_err(fail)?;
            let op = DequantizeLinear { layout: q.layout };
            let was = eval(&op, &q.with(&before)).map_err(fail)?.remove(0);
            let op = QuantizeLinear { layout: q.layout, dtype: self.dtype, saturate: true };
            let levels = eval(&op, &q.with(new)).map_err(fail)?.remove(0);
            // Large levels have more bits than their floats: those that were not trained stay what they are.
            let mut out = old.to_vec();
            let (size, width) = (self.dtype.size(), new.dtype().size());
            let floats = new.bytes().chunks_exact(width).zip(was.bytes().chunks_exact(width));
            let levels = out.chunks_exact_mut(size).zip(levels.bytes().chunks_exact(size));
            for ((to, level), (new, was)) in levels.zip(floats) {
                if new != was {
                    to.copy_from_slice(level);
                }
            }
            return Ok((out != old).then_some(out));
        }
        if self.dtype == new.dtype() {
            return Ok((new.bytes() != old).then(|| new.bytes().to_vec()));
        }
        let values = new.get::<f32>().map_err(|e| self.fail(e.to_string()))?;
        let mut out = old.to_vec();
        for (i, (o, &v)) in out.chunks_exact_mut(2).zip(values).enumerate() {
            let bits = u16::from_le_bytes([o[0], o[1]]);
            let (was, now, finite) = match self.dtype {
                DType::F16 => {
                    let now = f16::from_f32(v);
                    (f16::from_bits(bits).to_f32(), now.to_bits(), now.is_finite())
                }
                _ => {
                    let now = bf16::from_f32(v);
                    (bf16::from_bits(bits).to_f32(), now.to_bits(), now.is_finite())
                }
            };
            if was.to_bits() == v.to_bits() {
                continue;
            }
            if v.is_finite() && !finite {
                return Err(self.fail(format!("{v} at element {i} does not fit {}", self.dtype)));
            }
            o.copy_from_slice(&now.to_le_bytes());
        }
        Ok((out != old).then_some(out))
    }
}

/// A tensor from its little-endian bytes, whose number is checked before anything is allocated.
pub fn from_stored(dtype: DType, dims: &[usize], bytes: &[u8]) -> std::result::Result<Tensor, String> {
    let mut count = byte_size(dtype, dims)?;
    if dtype.bits() < 8 {
        count = count.div_ceil(8 / dtype.bits());
    }
    if bytes.len() != count {
        return Err(format!("{} bytes of values for {dtype} of shape {dims:?}", bytes.len()));
    }
    if dtype.bits() < 8 {
        let unpacked = dtype.unpack(bytes, dims.iter().product());
        return Tensor::from_bytes(dtype, dims, &unpacked).map_err(|e| e.to_string());
    }
    let mut t = Tensor::from_bytes(dtype, dims, bytes).map_err(|e| e.to_string())?;
    if dtype == DType::Bool {
        t.bytes_mut().iter_mut().for_each(|b| *b = u8::from(*b != 0));
    }
    Ok(t)
}

/// A tensor whose values lie in the model file itself, in its stored type.
pub fn plain(t: &TensorProto, dtype: DType) -> std::result::Result<Tensor, String> {
    let dims = dims_of(&t.dims)?;
    let want = byte_size(dtype, &dims)?;
    let from = |bytes: &[u8]| from_stored(dtype, &dims, bytes);
    if let Some(raw) = &t.raw_data {
        return from(raw);
    }
    let chunks = match dtype {
        DType::F32 => return from(&t.float_data.0.concat()),
        DType::F64 => return from(&t.double_data.0.concat()),
        DType::I64 => &t.int64_data,
        DType::U64 | DType::U32 => &t.uint64_data,
        _ => &t.int32_data,
    };
    // Every varint takes at least a byte, so this bounds what is decoded.
    let packed = (8 / dtype.bits().min(8)).max(1);
    if chunks.len() < (want / dtype.size()).div_ceil(packed) {
        return Err(format!("too few values for {dtype} of shape {:?}", dims.as_slice()));
    }
    let values = chunks.varints().map_err(|e| e.to_string())?;
    let bytes: Vec<u8> = match dtype.size() {
        1 if dtype == DType::Bool => values.iter().map(|&v| u8::from(v != 0)).collect(),
        1 => values.iter().map(|&v| v as u8).collect(),
        2 => values.iter().flat_map(|&v| (v as u16).to_le_bytes()).collect(),
        4 => values.iter().flat_map(|&v| (v as u32).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|&v| v.to_le_bytes()).collect(),
    };
    from(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::import::proto::Chunks;

    fn weight(dtype: DType, dims: &[usize], location: Location) -> Weight {
        Weight {
            name: "w".into(),
            dtype,
            dims: Dims::from_slice(dims),
            location,
            role: Role::Constant,
            trainable: false,
            why: String::new(),
            value: ValueId(0),
            uses: Vec::new(),
            split: None,
            merged: false,
            quantised: None,
        }
    }

    #[test]
    fn halves_round_to_even_and_keep_what_does_not_change() {
        // A signalling NaN would come back quiet if it were converted again.
        let stored: Vec<u8> = [0x7c01u16, 0x3c00, 0x3c01].iter().flat_map(|b| b.to_le_bytes()).collect();
        let l = Location { file: 0, offset: 0, len: 6, encoding: Encoding::Raw };
        let w = weight(DType::F16, &[3], l);
        let files = vec![SourceFile::in_memory("m", stored.clone())];
        let mut t = w.load(&files).unwrap();
        assert!(w.restore(&stored, &t).unwrap().is_none());
        // Halfway between 1 and its successor: to even.
        t.get_mut::<f32>().unwrap()[2] = 1.0 + 1.0 / 2048.0;
        assert_eq!(w.restore(&stored, &t).unwrap().unwrap(), [0x01, 0x7c, 0x00, 0x3c, 0x00, 0x3c]);
        t.get_mut::<f32>().unwrap()[2] = 7e4;
        assert!(w.restore(&stored, &t).is_err());
        assert!(w.restore(&stored, &Tensor::zeros(DType::F32, &[2])).is_err());
    }

    #[test]
    fn every_way_to_store_integers() {
        let ints = |dtype: DType, t: TensorProto| plain(&t, dtype).map(|t| t.to_ints().unwrap());
        let varints = |v: &[i64]| {
            let mut out = Vec::new();
            v.iter().for_each(|&v| super::super::wire::put_varint(&mut out, v as u64));
            Chunks::from(out)
        };
        let of = |n: i64| TensorProto { dims: vec![n], ..Default::default() };
        assert_eq!(
            ints(DType::I64, TensorProto { int64_data: varints(&[-1, 7]), ..of(2) }).unwrap(),
            [-1, 7]
        );
        assert_eq!(ints(DType::I8, TensorProto { int32_data: varints(&[-1, 7]), ..of(2) }).unwrap(), [-1, 7]);
        assert_eq!(ints(DType::Bool, TensorProto { int32_data: varints(&[1, 0]), ..of(2) }).unwrap(), [1, 0]);
        assert_eq!(ints(DType::U32, TensorProto { uint64_data: varints(&[9]), ..of(1) }).unwrap(), [9]);
        assert_eq!(
            ints(DType::I16, TensorProto { raw_data: Some(vec![0xff, 0xff].into()), ..of(1) }).unwrap(),
            [-1]
        );
        assert!(ints(DType::I64, of(1 << 60)).is_err());
        assert!(ints(DType::I64, of(3)).is_err());
        assert!(ints(DType::I64, of(-3)).is_err());
        assert!(ints(DType::I64, of(0)).unwrap().is_empty());
    }
}
