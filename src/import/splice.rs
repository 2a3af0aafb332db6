//! Fields that are spliced into a model: constants, operand names.

use prost::Message;

use super::proto::{AttributeProto, NodeProto, TensorProto};
use super::wire::{self, Edit, Field, WireError};
use crate::tensor::DType;

/// IR version from which an initializer need not be an input of the graph as well.
pub const FREE_INITIALIZERS: i64 = 4;
/// `AttributeProto.AttributeType.TENSOR`.
const TENSOR: i32 = 4;

/// A constant tensor for the main graph.
#[derive(Debug, Clone)]
pub struct Constant {
    pub name: String,
    pub dtype: DType,
    pub dims: Vec<i64>,
    /// Little-endian.
    pub values: Vec<u8>,
    pub ir_version: i64,
}

impl Constant {
    /// A field of the graph that holds it: an initializer, or in a file so old that every initializer is also an
    /// input, a `Constant` node called `node`.
    pub fn field(self, node: String) -> Vec<u8> {
        let mut out = Vec::new();
        if self.ir_version >= FREE_INITIALIZERS {
            wire::put_field(&mut out, 5, &self.tensor().encode_to_vec());
        } else {
            wire::put_field(&mut out, 1, &self.node(node).encode_to_vec());
        }
        out
    }

    fn tensor(self) -> TensorProto {
        TensorProto {
            name: self.name,
            dims: self.dims,
            data_type: self.dtype.to_onnx(),
            raw_data: Some(self.values.into()),
            ..Default::default()
        }
    }

    fn node(self, name: String) -> NodeProto {
        let output = vec![self.name.clone()];
        let t = Some(Box::new(self.tensor()));
        let value = AttributeProto { name: "value".into(), r#type: TENSOR, t, ..Default::default() };
        NodeProto { op_type: "Constant".into(), name, output, attribute: vec![value], ..Default::default() }
    }
}

/// The edit that gives operand `slot` of a node of the main graph another name; `None` when it has no such operand.
pub fn operand(bytes: &[u8], node: &Field, slot: usize, name: &str) -> Result<Option<Edit>, WireError> {
    let mut inputs =
        wire::fields(bytes, node.payload.clone()).filter(|f| !matches!(f, Ok(f) if f.number != 1));
    let Some(input) = inputs.nth(slot).transpose()? else { return Ok(None) };
    Ok(Some(Edit { path: vec![7, 1, 1], range: input.payload, bytes: name.as_bytes().to_vec() }))
}

/// `base`, or `base.2`, `base.3`, …: the first name that is not taken.
pub fn fresh(base: &str, taken: impl Fn(&str) -> bool) -> String {
    let mut name = base.to_string();
    let mut n = 2usize;
    while taken(&name) {
        name = format!("{base}.{n}");
        n += 1;
    }
    name
}
