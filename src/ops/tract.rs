//! Operators without a kernel here, run forward by tract: each a model of one node.
//!
//! tract fixes shapes when it compiles, so a node is compiled once for each set of operand shapes (and of operands that
//! are known before the run, which become constants of it).

use std::collections::HashSet;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use prost::Message;
use tract_onnx::prelude as tract;
use tract_onnx::prelude::{DatumType, Framework, InferenceModelExt, IntoRunnable, TractResult};

use crate::error::OpError;
use crate::graph::GradBuilder;
use crate::import::proto::{
    DimensionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, TensorShapeProto,
    TensorTypeProto, TypeProto, ValueInfoProto,
};
use crate::ops::{Cx, Grads, Op, get};
use crate::tensor::{DType, Dims, Meta, Tensor, View, ViewMut};

/// Domains whose operators tract means by their names.
const DOMAINS: &[&str] = &["", "ai.onnx.ml", "com.microsoft"];
/// Operators that tract registers under a name which means something else in Microsoft's domain.
const AMBIGUOUS: &[&str] = &["Attention", "RotaryEmbedding"];
/// Compiled forms kept of a node.
const KEPT: usize = 16;

type Run = dyn Fn(tract::TVec<tract::TValue>) -> TractResult<tract::TVec<tract::TValue>> + Send + Sync;

/// An operand as a node was compiled for it.
#[derive(PartialEq)]
enum Operand {
    Absent,
    Fed(DType, Dims),
    Constant(DType, Dims, Vec<u8>),
}

struct Compiled {
    operands: Vec<Operand>,
    outputs: Vec<Meta>,
    run: Box<Run>,
}

/// A node that tract runs.
pub struct Tract {
    node: NodeProto,
    opset: i64,
    compiled: Mutex<Vec<Arc<Compiled>>>,
}

impl fmt::Debug for Tract {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tract({})", self.node.op_type)
    }
}

/// The names of the operators that tract has.
fn registered() -> &'static HashSet<String> {
    static NAMES: OnceLock<HashSet<String>> = OnceLock::new();
    NAMES.get_or_init(|| tract_onnx::onnx().op_register.0.keys().cloned().collect())
}

impl Tract {
    /// The operator of a node of the file, if tract has it. Nodes with subgraphs are not taken.
    pub fn new(node: &NodeProto, opset: i64) -> Option<Tract> {
        let domain = if node.domain == "ai.onnx" { "" } else { node.domain.as_str() };
        let ambiguous = domain == "com.microsoft" && AMBIGUOUS.contains(&node.op_type.as_str());
        let subgraphs = node.attribute.iter().any(|a| a.g.is_some() || !a.graphs.is_empty());
        if !DOMAINS.contains(&domain) || ambiguous || subgraphs || !registered().contains(&node.op_type) {
            return None;
        }
        let named = |prefix: &str, names: &[String]| -> Vec<String> {
            let name =
                |(i, n): (usize, &String)| if n.is_empty() { String::new() } else { format!("{prefix}{i}") };
            names.iter().enumerate().map(name).collect()
        };
        let node = NodeProto {
            name: "node".into(),
            input: named("x", &node.input),
            output: named("y", &node.output),
            domain: domain.into(),
            ..node.clone()
        };
        Some(Tract { node, opset, compiled: Mutex::default() })
    }

    fn fail(&self, what: impl fmt::Display) -> OpError {
        OpError::Unsupported(format!("operator {}, through tract: {what}", self.node.op_type))
    }

    fn guarded<R>(&self, f: impl FnOnce() -> TractResult<R>) -> Result<R, OpError> {
        match catch_unwind(AssertUnwindSafe(f)) {
            Ok(Ok(r)) => Ok(r),
            Ok(Err(e)) => Err(self.fail(format!("{e:#}"))),
            Err(_) => Err(self.fail("it panicked")),
        }
    }

    fn find(&self, fits: impl Fn(&[Operand]) -> bool) -> Option<Arc<Compiled>> {
        let all = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().find(|c| fits(&c.operands)).cloned()
    }

    /// The node for operands of these types and shapes.
    fn compile(&self, inputs: &[Option<&Meta>]) -> Result<Arc<Compiled>, OpError> {
        let operands: Vec<Operand> = (0..self.node.input.len())
            .map(|i| match get(inputs, i) {
                None => Operand::Absent,
                Some(m) => match &m.value {
                    Some(t) => Operand::Constant(m.dtype, m.dims.clone(), t.bytes().to_vec()),
                    None => Operand::Fed(m.dtype, m.dims.clone()),
                },
            })
            .collect();
        if let Some(known) = self.find(|o| *o == operands[..]) {
            return Ok(known);
        }
        let model = self.model(&operands).encode_to_vec();
        let (outputs, run) = self.guarded(|| {
            let onnx = tract_onnx::onnx().with_ignore_output_shapes(true);
            let model = onnx.model_for_read(&mut model.as_slice())?.into_optimized()?;
            let mut outputs = Vec::new();
            for i in 0..model.output_outlets()?.len() {
                let fact = model.output_fact(i)?;
                let dims = fact.shape.as_concrete();
                let dims =
                    dims.ok_or_else(|| tract::TractError::msg("an output's shape is known only in the run"))?;
                outputs.push(Meta::new(element(fact.datum_type).working(), dims));
            }
            let runnable = model.into_runnable()?;
            let run: Box<Run> = Box::new(move |x| runnable.run(x));
            Ok((outputs, run))
        })?;
        let compiled = Arc::new(Compiled { operands, outputs, run });
        let mut all = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= KEPT {
            all.remove(0);
        }
        all.push(compiled.clone());
        Ok(compiled)
    }

    fn model(&self, operands: &[Operand]) -> ModelProto {
        let mut graph =
            GraphProto { name: "one".into(), node: vec![self.node.clone()], ..Default::default() };
        for (name, o) in self.node.input.iter().zip(operands) {
            match o {
                Operand::Absent => {}
                Operand::Fed(dtype, dims) => graph.input.push(info(name, Some((*dtype, dims)))),
                Operand::Constant(dtype, dims, bytes) => graph.initializer.push(TensorProto {
                    name: name.clone(),
                    dims: dims.iter().map(|d| *d as i64).collect(),
                    data_type: dtype.to_onnx(),
                    raw_data: Some(bytes.clone().into()),
                    ..Default::default()
                }),
            }
        }
        graph.output = self.node.output.iter().filter(|o| !o.is_empty()).map(|o| info(o, None)).collect();
        let domain = |domain: &str, version| OperatorSetIdProto { domain: domain.into(), version };
        let own = (!self.node.domain.is_empty()).then(|| domain(&self.node.domain, self.opset));
        let standard = if own.is_some() { 17 } else { self.opset };
        ModelProto {
            ir_version: 8,
            opset_import: std::iter::once(domain("", standard)).chain(own).collect(),
            graph: Some(graph),
            ..Default::default()
        }
    }

    /// The compiled form for operands that are there now.
    fn compiled_for(&self, x: &[Option<View>]) -> Result<Arc<Compiled>, OpError> {
        let fits = |operands: &[Operand]| {
            operands.iter().enumerate().all(|(i, o)| match (o, get(x, i)) {
                (Operand::Absent, None) => true,
                (Operand::Fed(dtype, dims), Some(v)) => *dtype == v.dtype && dims.as_slice() == v.dims,
                (Operand::Constant(dtype, dims, bytes), Some(v)) => {
                    *dtype == v.dtype && dims.as_slice() == v.dims && bytes == v.bytes
                }
                _ => false,
            })
        };
        if let Some(known) = self.find(fits) {
            return Ok(known);
        }
        let metas: Vec<Option<Meta>> = x.iter().map(|v| v.map(|v| Meta::new(v.dtype, v.dims))).collect();
        self.compile(&metas.iter().map(Option::as_ref).collect::<Vec<_>>())
    }
}

fn info(name: &str, of: Option<(DType, &Dims)>) -> ValueInfoProto {
    let tensor = of.map(|(dtype, dims)| TensorTypeProto {
        elem_type: dtype.to_onnx(),
        shape: Some(TensorShapeProto {
            dim: dims
                .iter()
                .map(|d| DimensionProto { dim_value: Some(*d as i64), ..Default::default() })
                .collect(),
        }),
    });
    ValueInfoProto {
        name: name.into(),
        r#type: tensor.map(|t| TypeProto { tensor_type: Some(t), ..Default::default() }),
    }
}

impl Op for Tract {
    fn name(&self) -> &'static str {
        "Tract"
    }

    fn foreign_type(&self) -> Option<String> {
        Some(match self.node.domain.as_str() {
            "" => self.node.op_type.clone(),
            domain => format!("{domain}.{}", self.node.op_type),
        })
    }

    fn remark(&self) -> Option<String> {
        Some("no kernel here: runs forward through tract, and no gradient passes".into())
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let made = self.compile(inputs)?;
        let mut outputs = made.outputs.iter().cloned();
        // Those that the file leaves out keep their places.
        let all = self.node.output.iter().map(|o| match o.is_empty() {
            true => Some(Meta::new(DType::F32, &[0])),
            false => outputs.next(),
        });
        all.collect::<Option<_>>().ok_or_else(|| self.fail("it gives too few outputs"))
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let compiled = self.compiled_for(x)?;
        let mut results = self.guarded(|| {
            let mut values = tract::TVec::new();
            for (i, o) in compiled.operands.iter().enumerate() {
                if let (Operand::Fed(..), Some(v)) = (o, get(x, i)) {
                    values.push(tract::IntoTValue::into_tvalue(to_tract(v)?));
                }
            }
            let results = (compiled.run)(values)?;
            results.iter().map(|t| from_tract(t)).collect::<TractResult<Vec<Tensor>>>()
        })?;
        results.reverse();
        for (i, name) in self.node.output.iter().enumerate().filter(|(_, n)| !n.is_empty()) {
            let Some(t) = results.pop() else {
                return Err(self.fail(format!("it gives no output '{name}'")));
            };
            let Some(Some(y)) = y.get_mut(i) else { continue };
            if t.dims() != y.dims || t.dtype() != y.dtype {
                return Err(self.fail(format!("output {i} is {} {:?}", t.dtype(), t.dims())));
            }
            y.bytes.copy_from_slice(t.bytes());
        }
        Ok(())
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("it has no kernel here and runs forward through tract".into()))
    }
}

/// The element type of a tract tensor; shapes are symbolic integers there.
fn element(dt: DatumType) -> DType {
    match dt {
        DatumType::F64 => DType::F64,
        DatumType::F16 | DatumType::F32 => DType::F32,
        DatumType::I8 => DType::I8,
        DatumType::I16 => DType::I16,
        DatumType::I32 => DType::I32,
        DatumType::U8 => DType::U8,
        DatumType::U16 => DType::U16,
        DatumType::U32 => DType::U32,
        DatumType::U64 => DType::U64,
        DatumType::Bool => DType::Bool,
        _ => DType::I64,
    }
}

/// A tensor of ours as one of tract's.
pub(crate) fn to_tract(t: View) -> TractResult<tract::Tensor> {
    let dt = match t.dtype {
        DType::F32 => DatumType::F32,
        DType::F64 => DatumType::F64,
        DType::F16 => DatumType::F16,
        DType::I8 => DatumType::I8,
        DType::I16 => DatumType::I16,
        DType::I32 => DatumType::I32,
        DType::I64 => DatumType::I64,
        DType::U8 => DatumType::U8,
        DType::U16 => DatumType::U16,
        DType::U32 => DatumType::U32,
        DType::U64 => DatumType::U64,
        DType::Bool => DatumType::Bool,
        other => return Err(tract::TractError::msg(format!("has no {other}"))),
    };
    let mut out = tract::Tensor::zero_dt(dt, t.dims)?;
    out.as_bytes_mut().copy_from_slice(t.bytes);
    Ok(out)
}

/// A tensor of tract's as one of ours; half floats are widened.
pub(crate) fn from_tract(t: &tract::Tensor) -> TractResult<Tensor> {
    let dtype = element(t.datum_type());
    let to = match dtype {
        DType::F32 => DatumType::F32,
        DType::I64 => DatumType::I64,
        _ => t.datum_type(),
    };
    let t = t.cast_to_dt(to)?;
    Tensor::from_bytes(dtype, t.shape(), t.as_bytes()).map_err(|e| tract::TractError::msg(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::import::make::{import, model, node};
    use crate::ops::eval;

    #[test]
    fn a_window_is_computed_by_tract_and_has_no_gradient() {
        let op = Tract::new(&node("HannWindow", &["n"], &["y"]), 17).unwrap();
        let n = Tensor::scalar(8i64);
        let y = eval(&op, &[Some(&n)]).unwrap();
        let want: Vec<f64> = (0..8).map(|i| (std::f64::consts::PI * i as f64 / 8.0).sin().powi(2)).collect();
        assert!(y[0].to_f64().iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-6), "{:?}", y[0].to_f64());
        assert!(Tract::new(&node("Nothing", &["x"], &["y"]), 17).is_none());
        let mut own = node("Relu", &["x"], &["y"]);
        own.domain = "mine".into();
        assert!(Tract::new(&own, 1).is_none());
    }

    #[test]
    fn a_file_with_such_a_node_imports_without_blockers() {
        let mut quick = node("BiasGelu", &["x", "x"], &["y"]);
        quick.domain = "com.microsoft".into();
        let mut m = model(vec![quick], vec![], "y");
        m.opset_import.push(OperatorSetIdProto { domain: "com.microsoft".into(), version: 1 });
        let m = import(&m).unwrap();
        assert!(m.blockers.is_empty(), "{:?}", m.blockers);
    }
}
