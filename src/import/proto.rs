//! The part of ONNX's protobuf schema that retune reads (`onnx.proto3`).
//!
//! Byte fields are `Bytes` and alias the file they were decoded from, so that the position of a
//! tensor's values in the file is known. Numeric data fields are kept as the raw [`Chunks`] that
//! lie in the file, however the writer chose to encode them: declared as numbers they would be
//! copied, declared as `bytes` a chunked or unpacked field would lose all but its last part.

use bytes::{Buf, BufMut, Bytes};
use prost::DecodeError;
use prost::Message;
use prost::encoding::{self, DecodeContext, WireType};

/// The occurrences of a repeated number field, as they lie in the file.
///
/// A packed occurrence is one chunk; an unpacked element is a chunk of its own. Concatenated, the
/// chunks are the packed encoding of the field.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Chunks(pub Vec<Bytes>);

impl Chunks {
    /// Total size in bytes.
    pub fn len(&self) -> usize {
        self.0.iter().map(Bytes::len).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn merge(&mut self, wire: WireType, buf: &mut impl Buf, ctx: DecodeContext) -> Result<(), DecodeError> {
        let n = match wire {
            WireType::LengthDelimited => {
                let mut chunk = Bytes::new();
                encoding::bytes::merge(wire, &mut chunk, buf, ctx)?;
                if !chunk.is_empty() {
                    self.0.push(chunk);
                }
                return Ok(());
            }
            WireType::ThirtyTwoBit => 4,
            WireType::SixtyFourBit => 8,
            WireType::Varint => match buf.chunk().iter().take(10).position(|b| b & 0x80 == 0) {
                Some(last) => last + 1,
                None => return Err(malformed()),
            },
            _ => return Err(malformed()),
        };
        if buf.remaining() < n {
            return Err(malformed());
        }
        self.0.push(buf.copy_to_bytes(n));
        Ok(())
    }

    fn encode(&self, tag: u32, buf: &mut impl BufMut) {
        for chunk in &self.0 {
            encoding::bytes::encode(tag, chunk, buf);
        }
    }

    fn encoded_len(&self, tag: u32) -> usize {
        self.0.iter().map(|c| encoding::bytes::encoded_len(tag, c)).sum()
    }

    /// The integers of a varint field.
    pub fn varints(&self) -> Result<Vec<i64>, super::wire::WireError> {
        let mut out = Vec::new();
        for chunk in &self.0 {
            let mut at = 0;
            while at < chunk.len() {
                let (v, next) = super::wire::varint(chunk, at, chunk.len())?;
                out.push(v as i64);
                at = next;
            }
        }
        Ok(out)
    }
}

impl From<Vec<u8>> for Chunks {
    fn from(bytes: Vec<u8>) -> Self {
        Chunks(vec![bytes.into()])
    }
}

// Deprecated in favour of derived messages; these two are written by hand.
#[allow(deprecated)]
fn malformed() -> DecodeError {
    DecodeError::new("a numeric field is cut off or of the wrong wire type")
}

#[derive(Clone, PartialEq, Message)]
pub struct ModelProto {
    #[prost(int64, tag = "1")]
    pub ir_version: i64,
    #[prost(string, tag = "2")]
    pub producer_name: String,
    #[prost(string, tag = "3")]
    pub producer_version: String,
    #[prost(string, tag = "4")]
    pub domain: String,
    #[prost(int64, tag = "5")]
    pub model_version: i64,
    #[prost(message, optional, tag = "7")]
    pub graph: Option<GraphProto>,
    #[prost(message, repeated, tag = "8")]
    pub opset_import: Vec<OperatorSetIdProto>,
    #[prost(message, repeated, tag = "14")]
    pub metadata_props: Vec<StringStringEntryProto>,
    #[prost(message, repeated, tag = "25")]
    pub functions: Vec<FunctionProto>,
}

#[derive(Clone, PartialEq, Message)]
pub struct GraphProto {
    #[prost(message, repeated, tag = "1")]
    pub node: Vec<NodeProto>,
    #[prost(string, tag = "2")]
    pub name: String,
    #[prost(message, repeated, tag = "5")]
    pub initializer: Vec<TensorProto>,
    #[prost(message, repeated, tag = "11")]
    pub input: Vec<ValueInfoProto>,
    #[prost(message, repeated, tag = "12")]
    pub output: Vec<ValueInfoProto>,
    #[prost(message, repeated, tag = "13")]
    pub value_info: Vec<ValueInfoProto>,
    #[prost(message, repeated, tag = "15")]
    pub sparse_initializer: Vec<SparseTensorProto>,
}

#[derive(Clone, PartialEq, Message)]
pub struct NodeProto {
    #[prost(string, repeated, tag = "1")]
    pub input: Vec<String>,
    #[prost(string, repeated, tag = "2")]
    pub output: Vec<String>,
    #[prost(string, tag = "3")]
    pub name: String,
    #[prost(string, tag = "4")]
    pub op_type: String,
    #[prost(message, repeated, tag = "5")]
    pub attribute: Vec<AttributeProto>,
    #[prost(string, tag = "7")]
    pub domain: String,
    #[prost(string, tag = "8")]
    pub overload: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct SparseTensorProto {
    #[prost(message, optional, tag = "1")]
    pub values: Option<TensorProto>,
    #[prost(message, optional, tag = "2")]
    pub indices: Option<TensorProto>,
    #[prost(int64, repeated, tag = "3")]
    pub dims: Vec<i64>,
}

#[derive(Clone, PartialEq, Message)]
pub struct OperatorSetIdProto {
    #[prost(string, tag = "1")]
    pub domain: String,
    #[prost(int64, tag = "2")]
    pub version: i64,
}

#[derive(Clone, PartialEq, Message)]
pub struct StringStringEntryProto {
    #[prost(string, tag = "1")]
    pub key: String,
    #[prost(string, tag = "2")]
    pub value: String,
}

/// A model-local function.
#[derive(Clone, PartialEq, Message)]
pub struct FunctionProto {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(string, repeated, tag = "4")]
    pub input: Vec<String>,
    #[prost(string, repeated, tag = "5")]
    pub output: Vec<String>,
    #[prost(string, repeated, tag = "6")]
    pub attribute: Vec<String>,
    #[prost(message, repeated, tag = "7")]
    pub node: Vec<NodeProto>,
    #[prost(message, repeated, tag = "9")]
    pub opset_import: Vec<OperatorSetIdProto>,
    #[prost(string, tag = "10")]
    pub domain: String,
    #[prost(message, repeated, tag = "11")]
    pub attribute_proto: Vec<AttributeProto>,
    #[prost(string, tag = "13")]
    pub overload: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct ValueInfoProto {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(message, optional, tag = "2")]
    pub r#type: Option<TypeProto>,
}

/// The type of a value; sequences, maps and optionals are only told apart from tensors.
#[derive(Clone, PartialEq, Message)]
pub struct TypeProto {
    #[prost(message, optional, tag = "1")]
    pub tensor_type: Option<TensorTypeProto>,
    #[prost(bytes = "bytes", optional, tag = "4")]
    pub sequence_type: Option<Bytes>,
    #[prost(bytes = "bytes", optional, tag = "5")]
    pub map_type: Option<Bytes>,
    #[prost(bytes = "bytes", optional, tag = "9")]
    pub optional_type: Option<Bytes>,
}

impl TypeProto {
    /// What it is, for people: `sequence`, `map`, `optional`, or the element type of a tensor.
    pub fn kind(&self) -> String {
        let kind = match self {
            TypeProto { tensor_type: Some(t), .. } => match t.elem_type {
                8 => "string",
                14 => "complex64",
                15 => "complex128",
                other => return format!("element type {other}"),
            },
            TypeProto { sequence_type: Some(_), .. } => "sequence",
            TypeProto { map_type: Some(_), .. } => "map",
            TypeProto { optional_type: Some(_), .. } => "optional",
            _ => "unknown",
        };
        kind.into()
    }
}

#[derive(Clone, PartialEq, Message)]
pub struct TensorTypeProto {
    #[prost(int32, tag = "1")]
    pub elem_type: i32,
    #[prost(message, optional, tag = "2")]
    pub shape: Option<TensorShapeProto>,
}

#[derive(Clone, PartialEq, Message)]
pub struct TensorShapeProto {
    #[prost(message, repeated, tag = "1")]
    pub dim: Vec<DimensionProto>,
}

#[derive(Clone, PartialEq, Message)]
pub struct DimensionProto {
    #[prost(int64, optional, tag = "1")]
    pub dim_value: Option<i64>,
    #[prost(string, optional, tag = "2")]
    pub dim_param: Option<String>,
}

/// `TensorProto.DataLocation.EXTERNAL`.
pub const EXTERNAL: i32 = 1;

/// A tensor with its values still encoded.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TensorProto {
    pub dims: Vec<i64>,
    pub data_type: i32,
    pub float_data: Chunks,
    pub int32_data: Chunks,
    /// Counted only: string tensors are not computed with.
    pub strings: usize,
    pub int64_data: Chunks,
    pub name: String,
    pub raw_data: Option<Bytes>,
    pub double_data: Chunks,
    pub uint64_data: Chunks,
    pub external_data: Vec<StringStringEntryProto>,
    pub data_location: i32,
}

impl Message for TensorProto {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        encoding::int64::encode_packed(1, &self.dims, buf);
        encoding::int32::encode(2, &self.data_type, buf);
        self.float_data.encode(4, buf);
        self.int32_data.encode(5, buf);
        self.int64_data.encode(7, buf);
        if !self.name.is_empty() {
            encoding::string::encode(8, &self.name, buf);
        }
        if let Some(raw) = &self.raw_data {
            encoding::bytes::encode(9, raw, buf);
        }
        self.double_data.encode(10, buf);
        self.uint64_data.encode(11, buf);
        encoding::message::encode_repeated(13, &self.external_data, buf);
        if self.data_location != 0 {
            encoding::int32::encode(14, &self.data_location, buf);
        }
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire: WireType,
        buf: &mut impl Buf,
        ctx: DecodeContext,
    ) -> Result<(), DecodeError> {
        match tag {
            1 => encoding::int64::merge_repeated(wire, &mut self.dims, buf, ctx),
            2 => encoding::int32::merge(wire, &mut self.data_type, buf, ctx),
            4 => self.float_data.merge(wire, buf, ctx),
            5 => self.int32_data.merge(wire, buf, ctx),
            6 => {
                self.strings += 1;
                encoding::skip_field(wire, tag, buf, ctx)
            }
            7 => self.int64_data.merge(wire, buf, ctx),
            8 => encoding::string::merge(wire, &mut self.name, buf, ctx),
            9 => encoding::bytes::merge(wire, self.raw_data.get_or_insert_default(), buf, ctx),
            10 => self.double_data.merge(wire, buf, ctx),
            11 => self.uint64_data.merge(wire, buf, ctx),
            13 => encoding::message::merge_repeated(wire, &mut self.external_data, buf, ctx),
            14 => encoding::int32::merge(wire, &mut self.data_location, buf, ctx),
            _ => encoding::skip_field(wire, tag, buf, ctx),
        }
    }

    fn encoded_len(&self) -> usize {
        encoding::int64::encoded_len_packed(1, &self.dims)
            + encoding::int32::encoded_len(2, &self.data_type)
            + self.float_data.encoded_len(4)
            + self.int32_data.encoded_len(5)
            + self.int64_data.encoded_len(7)
            + if self.name.is_empty() { 0 } else { encoding::string::encoded_len(8, &self.name) }
            + self.raw_data.as_ref().map_or(0, |raw| encoding::bytes::encoded_len(9, raw))
            + self.double_data.encoded_len(10)
            + self.uint64_data.encoded_len(11)
            + encoding::message::encoded_len_repeated(13, &self.external_data)
            + if self.data_location == 0 { 0 } else { encoding::int32::encoded_len(14, &self.data_location) }
    }

    fn clear(&mut self) {
        *self = Self::default();
    }
}

/// A node's attribute. `f` and `floats` are little-endian and alias the file.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AttributeProto {
    pub name: String,
    pub f: Option<Bytes>,
    pub i: i64,
    pub s: Bytes,
    // (Few attributes have one: most of what a file decodes to would be room for it.)
    pub t: Option<Box<TensorProto>>,
    pub g: Option<Box<GraphProto>>,
    pub floats: Chunks,
    pub ints: Vec<i64>,
    pub strings: Vec<Bytes>,
    pub tensors: Vec<TensorProto>,
    pub graphs: Vec<GraphProto>,
    /// `AttributeProto.AttributeType`; 0 in files from before it existed.
    pub r#type: i32,
    pub ref_attr_name: String,
    /// Whether one of the sparse fields is there.
    pub sparse: bool,
}

impl Message for AttributeProto {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        encoding::string::encode(1, &self.name, buf);
        if let Some(f) = &self.f {
            encoding::encode_key(2, WireType::ThirtyTwoBit, buf);
            buf.put_slice(f);
        }
        if self.i != 0 {
            encoding::int64::encode(3, &self.i, buf);
        }
        if !self.s.is_empty() {
            encoding::bytes::encode(4, &self.s, buf);
        }
        if let Some(t) = &self.t {
            encoding::message::encode(5, t.as_ref(), buf);
        }
        if let Some(g) = &self.g {
            encoding::message::encode(6, g.as_ref(), buf);
        }
        self.floats.encode(7, buf);
        encoding::int64::encode_packed(8, &self.ints, buf);
        encoding::bytes::encode_repeated(9, &self.strings, buf);
        encoding::message::encode_repeated(10, &self.tensors, buf);
        encoding::message::encode_repeated(11, &self.graphs, buf);
        encoding::int32::encode(20, &self.r#type, buf);
        if !self.ref_attr_name.is_empty() {
            encoding::string::encode(21, &self.ref_attr_name, buf);
        }
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire: WireType,
        buf: &mut impl Buf,
        ctx: DecodeContext,
    ) -> Result<(), DecodeError> {
        match tag {
            1 => encoding::string::merge(wire, &mut self.name, buf, ctx),
            2 => {
                let mut last = Chunks::default();
                if wire != WireType::ThirtyTwoBit {
                    return Err(malformed());
                }
                last.merge(wire, buf, ctx)?;
                self.f = last.0.pop();
                Ok(())
            }
            3 => encoding::int64::merge(wire, &mut self.i, buf, ctx),
            4 => encoding::bytes::merge(wire, &mut self.s, buf, ctx),
            5 => encoding::message::merge(wire, self.t.get_or_insert_default().as_mut(), buf, ctx),
            6 => encoding::message::merge(wire, self.g.get_or_insert_default().as_mut(), buf, ctx),
            7 => self.floats.merge(wire, buf, ctx),
            8 => encoding::int64::merge_repeated(wire, &mut self.ints, buf, ctx),
            9 => encoding::bytes::merge_repeated(wire, &mut self.strings, buf, ctx),
            10 => encoding::message::merge_repeated(wire, &mut self.tensors, buf, ctx),
            11 => encoding::message::merge_repeated(wire, &mut self.graphs, buf, ctx),
            20 => encoding::int32::merge(wire, &mut self.r#type, buf, ctx),
            21 => encoding::string::merge(wire, &mut self.ref_attr_name, buf, ctx),
            22 | 23 => {
                self.sparse = true;
                encoding::skip_field(wire, tag, buf, ctx)
            }
            _ => encoding::skip_field(wire, tag, buf, ctx),
        }
    }

    fn encoded_len(&self) -> usize {
        let opt = |there: bool, n: usize| if there { n } else { 0 };
        encoding::string::encoded_len(1, &self.name)
            + opt(self.f.is_some(), 5)
            + opt(self.i != 0, encoding::int64::encoded_len(3, &self.i))
            + opt(!self.s.is_empty(), encoding::bytes::encoded_len(4, &self.s))
            + self.t.as_ref().map_or(0, |t| encoding::message::encoded_len(5, t))
            + self.g.as_ref().map_or(0, |g| encoding::message::encoded_len(6, g.as_ref()))
            + self.floats.encoded_len(7)
            + encoding::int64::encoded_len_packed(8, &self.ints)
            + encoding::bytes::encoded_len_repeated(9, &self.strings)
            + encoding::message::encoded_len_repeated(10, &self.tensors)
            + encoding::message::encoded_len_repeated(11, &self.graphs)
            + encoding::int32::encoded_len(20, &self.r#type)
            + opt(!self.ref_attr_name.is_empty(), encoding::string::encoded_len(21, &self.ref_attr_name))
    }

    fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunked_and_unpacked_floats_are_all_read() {
        let mut bytes = Vec::new();
        bytes.extend([0x22, 8]); // float_data, packed: 1, 2
        bytes.extend(1f32.to_le_bytes());
        bytes.extend(2f32.to_le_bytes());
        bytes.push(0x25); // float_data, unpacked: 3
        bytes.extend(3f32.to_le_bytes());
        bytes.extend([0x28, 0x96, 0x01]); // int32_data, unpacked: 150
        bytes.extend([0x2a, 3, 0x01, 0x96, 0x01]); // int32_data, packed: 1, 150
        bytes.extend([0x98, 0x06, 0x01]); // unknown
        let file = Bytes::from(bytes);
        let t = TensorProto::decode(file.clone()).unwrap();
        assert_eq!(t.float_data.0.len(), 2);
        assert_eq!(t.float_data.len(), 12);
        assert_eq!(t.int32_data.varints().unwrap(), [150, 1, 150]);
        // The chunks alias the file.
        assert_eq!(t.float_data.0[1].as_ptr() as usize - file.as_ptr() as usize, 11);
        let again = TensorProto::decode(Bytes::from(t.encode_to_vec())).unwrap();
        assert_eq!(again.float_data.len(), 12);
        assert_eq!(again.int32_data.varints().unwrap(), [150, 1, 150]);
    }

    #[test]
    fn truncated_messages_are_errors() {
        for bytes in
            [&[0x25u8, 0, 0][..], &[0x28, 0x80], &[0x22, 9, 0], &[0x4a, 0xff, 0xff, 0xff, 0xff, 0x0f]]
        {
            assert!(TensorProto::decode(bytes).is_err(), "{bytes:?}");
        }
        assert!(AttributeProto::decode(&[0x12u8, 1, 0][..]).is_err());
    }
}
