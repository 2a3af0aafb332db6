//! Small models made on the spot, for tests here and in `export`.

use std::path::PathBuf;

use prost::Message;

use super::proto::*;
use super::{Model, from_bytes};
use crate::error::Result;

/// A fetched or shipped model; prints why a test does less when it is absent.
pub(crate) fn model_file(name: &str) -> Option<PathBuf> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let fetched = std::env::var_os("RETUNE_FETCHED").map_or(root.join("target/fetched"), PathBuf::from);
    let path = [root.join(name), fetched.join(name)].into_iter().find(|p| p.is_file());
    if path.is_none() {
        println!("skipped: {name} (run tests/fetch.sh)");
    }
    path
}

pub(crate) fn floats(name: &str, dims: &[i64], values: &[f32]) -> TensorProto {
    let raw: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    TensorProto {
        name: name.into(),
        dims: dims.to_vec(),
        data_type: 1,
        raw_data: Some(raw.into()),
        ..Default::default()
    }
}

pub(crate) fn zeros(name: &str, dims: &[i64]) -> TensorProto {
    floats(name, dims, &vec![0.0; dims.iter().product::<i64>() as usize])
}

/// Distinct elements, so that it is not taken for a merged tensor.
pub(crate) fn ramp(name: &str, dims: &[i64]) -> TensorProto {
    let n = dims.iter().product::<i64>();
    floats(name, dims, &(0..n).map(|i| i as f32 + 0.5).collect::<Vec<_>>())
}

pub(crate) fn ints(name: &str, values: &[i64]) -> TensorProto {
    let raw: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    TensorProto {
        name: name.into(),
        dims: vec![values.len() as i64],
        data_type: 7,
        raw_data: Some(raw.into()),
        ..Default::default()
    }
}

pub(crate) fn node(op: &str, inputs: &[&str], outputs: &[&str]) -> NodeProto {
    NodeProto {
        op_type: op.into(),
        input: inputs.iter().map(|s| s.to_string()).collect(),
        output: outputs.iter().map(|s| s.to_string()).collect(),
        ..Default::default()
    }
}

pub(crate) fn attr(name: &str, r#type: i32) -> AttributeProto {
    AttributeProto { name: name.into(), r#type, ..Default::default() }
}

pub(crate) fn with(mut n: NodeProto, a: AttributeProto) -> NodeProto {
    n.attribute.push(a);
    n
}

pub(crate) fn value(name: &str, dims: &[i64]) -> ValueInfoProto {
    let dim = dims.iter().map(|&d| match d {
        -1 => DimensionProto { dim_param: Some("batch".into()), ..Default::default() },
        d => DimensionProto { dim_value: Some(d), ..Default::default() },
    });
    ValueInfoProto {
        name: name.into(),
        r#type: Some(TypeProto {
            tensor_type: Some(TensorTypeProto {
                elem_type: 1,
                shape: Some(TensorShapeProto { dim: dim.collect() }),
            }),
            ..Default::default()
        }),
    }
}

pub(crate) fn model(node: Vec<NodeProto>, initializer: Vec<TensorProto>, output: &str) -> ModelProto {
    ModelProto {
        ir_version: 8,
        producer_name: "test".into(),
        opset_import: vec![OperatorSetIdProto { domain: String::new(), version: 17 }],
        graph: Some(GraphProto {
            name: "g".into(),
            node,
            initializer,
            input: vec![value("x", &[-1, 3])],
            output: vec![value(output, &[-1])],
            ..Default::default()
        }),
        ..Default::default()
    }
}

pub(crate) fn import(m: &ModelProto) -> Result<Model> {
    from_bytes("test.onnx", m.encode_to_vec())
}
