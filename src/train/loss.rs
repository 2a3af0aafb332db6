//! The loss, attached to a network's outputs.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::graph::{self, Graph, Source, ValueId};
use crate::import::Model;
use crate::ops::loss::{BceWithLogits, CrossEntropy, Mse};
use crate::ops::softmax::Softmax;
use crate::ops::transpose::Transpose;
use crate::ops::view::ReshapeTo;
use crate::tensor::{DType, Dims, Meta, Tensor};

/// What is minimised, on the model's first output.
#[derive(Debug, Clone)]
pub enum Loss {
    /// Softmax cross-entropy with integer labels; a final Softmax of the model is left out.
    CrossEntropy { label_smoothing: f64 },
    /// As `CrossEntropy`, each sample weighted by its class, the mean taken over the weights. With smoothing a sample's
    /// whole loss has the weight of its label.
    ClassWeighted { label_smoothing: f64, weights: Arc<Vec<f64>> },
    /// Sigmoid cross-entropy; a final Sigmoid of the model is left out.
    Bce,
    /// Mean squared error over all elements.
    Mse,
    /// An ONNX graph from the model's outputs (by name) and `target` to a scalar.
    Graph(Arc<Model>),
}

/// A loss in a graph.
#[derive(Debug, Clone)]
pub struct Attached {
    /// Scalar: the mean over the batch.
    pub loss: ValueId,
    /// The graph's new input.
    pub target: ValueId,
    /// What the loss reads in the place of output 0: the logits where an activation was left out.
    pub logits: ValueId,
    /// The activation that was left out, as people find it in the file.
    pub left_out: Option<String>,
}

impl Loss {
    /// Whether targets are class indices.
    pub fn wants_labels(&self) -> bool {
        matches!(self, Loss::CrossEntropy { .. } | Loss::ClassWeighted { .. })
    }

    /// The loss by which results are compared: without class weights.
    pub fn unweighted(&self) -> Loss {
        match self {
            Loss::ClassWeighted { label_smoothing, .. } => {
                Loss::CrossEntropy { label_smoothing: *label_smoothing }
            }
            other => other.clone(),
        }
    }

    /// Appends the loss for a target of the given shape and type. Shapes must have been inferred.
    pub fn attach(&self, graph: &mut Graph, target: Meta) -> Result<Attached> {
        let Some(&output) = graph.outputs.first() else {
            return Err(Error::Config("the model has no output to compute a loss on".into()));
        };
        let (logits, activation) = match self {
            Loss::CrossEntropy { .. } | Loss::ClassWeighted { .. } => scores(graph, output)?,
            Loss::Bce => without(graph, output, &["Sigmoid"], ARRANGING)?,
            _ => (output, None),
        };
        let left_out = graph.left_out.clone().or(activation.map(|n| graph.describe(n)));
        let logits = match self {
            Loss::CrossEntropy { .. } | Loss::ClassWeighted { .. } => {
                let axis = class_axis(graph, output, &graph.meta(logits)?.dims, &target);
                let logits = classes_first(graph, logits, axis)?;
                flat(graph, logits, target.dims.len())?
            }
            _ => logits,
        };
        let target = graph.add_input("target", target);
        let emit = |graph: &mut Graph, op: Arc<dyn crate::ops::Op>| {
            graph.emit("loss", op, &[Some(logits), Some(target)], 1).map(|v| v[0]).map_err(|source| {
                Error::Op { node: format!("loss on '{}'", graph.value(logits).name), source }
            })
        };
        let loss = match self {
            Loss::CrossEntropy { label_smoothing } => {
                emit(graph, Arc::new(CrossEntropy { label_smoothing: *label_smoothing }))?
            }
            Loss::ClassWeighted { label_smoothing, weights } => {
                let dtype = graph.meta(logits)?.dtype;
                let t = Tensor::from_slice(&[weights.len()], weights).map(|t| t.cast(dtype));
                let at = |source| Error::Op { node: "the loss".into(), source };
                let weights = graph.add_constant("class-weights", t.map_err(at)?);
                let op = Arc::new(CrossEntropy { label_smoothing: *label_smoothing });
                graph.emit("loss", op, &[Some(logits), Some(target), Some(weights)], 1).map_err(at)?[0]
            }
            Loss::Bce => emit(graph, Arc::new(BceWithLogits))?,
            Loss::Mse => emit(graph, Arc::new(Mse))?,
            Loss::Graph(model) => loss_graph(graph, model, target)?,
        };
        Ok(Attached { loss, target, logits, left_out })
    }
}

/// Scores [N, C, 1, …] of a classifier whose head is a convolution, as [N, C] where there is one label a sample.
fn flat(graph: &mut Graph, logits: ValueId, labels: usize) -> Result<ValueId> {
    let dims = graph.meta(logits)?.dims.clone();
    if labels != 1 || dims.len() <= 2 || dims[2..].iter().any(|d| *d != 1) {
        return Ok(logits);
    }
    let to = ReshapeTo { dims: Dims::from_slice(&dims[..2]) };
    let made = graph.emit("logits", Arc::new(to), &[Some(logits)], 1);
    made.map(|v| v[0]).map_err(|source| Error::Op { node: "the logits".into(), source })
}

/// Operators that arrange elements and compute nothing.
const ARRANGING: &[&str] = &["Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze"];

/// The value that an activation at the end is of, arranged as the output is, and its node; the output itself where
/// there is none.
fn without(
    graph: &mut Graph,
    output: ValueId,
    activations: &[&str],
    movers: &[&str],
) -> Result<(ValueId, Option<graph::NodeId>)> {
    match graph::ending(graph, output, activations, movers) {
        Some(end) => Ok((end.without(graph)?, Some(end.node))),
        None => Ok((output, None)),
    }
}

/// A classifier's logits, and the node that stands behind them.
fn scores(graph: &mut Graph, output: ValueId) -> Result<(ValueId, Option<graph::NodeId>)> {
    match graph::logits(graph, output) {
        (_, None) => without(graph, output, &["Softmax", "LogSoftmax"], &["Transpose"]),
        found => Ok(found),
    }
}

/// The axis of the classes in scores of shape `dims`: 1 as in ONNX's and PyTorch's losses, or, for a label at each
/// place of [N, …], the last one, where a final Softmax says so or where nothing else fits.
pub fn class_axis(graph: &Graph, output: ValueId, dims: &[usize], target: &Meta) -> usize {
    let last = dims.len().saturating_sub(1);
    let fits = |axis: usize| {
        let others = dims.iter().enumerate().filter(|(i, _)| *i != axis).map(|(_, d)| d);
        target.dims.len() == last && others.eq(target.dims.iter())
    };
    if last < 2 || target.dtype.is_float() || !fits(last) {
        return 1;
    }
    match softmax_axis(graph, output, dims.len()) {
        Some(axis) if fits(axis) => axis,
        _ if fits(1) => 1,
        _ => last,
    }
}

/// The axis that a final softmax over scores of so many axes goes along.
fn softmax_axis(graph: &Graph, output: ValueId, rank: usize) -> Option<usize> {
    let end = graph::ending(graph, output, &["Softmax", "LogSoftmax"], &[])?;
    graph.node(end.node).op.as_a::<Softmax>()?.over_axis(rank)
}

/// Scores with the classes of `axis` on axis 1.
fn classes_first(graph: &mut Graph, scores: ValueId, axis: usize) -> Result<ValueId> {
    if axis == 1 {
        return Ok(scores);
    }
    let mut perm: Dims = (0..graph.meta(scores)?.dims.len()).collect();
    perm.remove(axis);
    perm.insert(1, axis);
    let made = graph.emit("logits", Arc::new(Transpose { perm: Some(perm) }), &[Some(scores)], 1);
    made.map(|v| v[0]).map_err(|source| Error::Op { node: "the logits".into(), source })
}

/// Binds the loss graph's inputs to outputs of the model by name (by position where it has one input
/// beside `target`) and copies it in.
fn loss_graph(graph: &mut Graph, model: &Model, target: ValueId) -> Result<ValueId> {
    let mut other = model.graph.clone();
    for w in &model.weights {
        other.value_mut(w.value).source = Source::Constant(Arc::new(w.load(&model.files)?));
    }
    let inputs: Vec<ValueId> = other.inputs.clone();
    let free = inputs.iter().filter(|v| other.value(**v).name != "target").count();
    let mut bound = Vec::new();
    for v in inputs {
        let name = other.value(v).name.clone();
        let ours = match name.as_str() {
            "target" => Some(target),
            _ => graph.outputs.iter().copied().find(|o| graph.value(*o).name == name),
        };
        let ours = ours.or((free == 1).then(|| graph.outputs[0]));
        let Some(ours) = ours else {
            let names: Vec<&str> = graph.outputs.iter().map(|o| graph.value(*o).name.as_str()).collect();
            let what = format!(
                "this input of the loss {} is neither 'target' nor an output of the model ({})",
                model.path.display(),
                names.join(", ")
            );
            return Err(Error::value(name, what));
        };
        bound.push((v, ours));
    }
    let outputs = graph::inline(graph, &other, &bound)?;
    let loss = *outputs.first().ok_or_else(|| Error::file(&model.path, "the loss graph has no output"))?;
    let meta = graph.meta(loss)?;
    if meta.len() != 1 || !meta.dtype.is_float() {
        let what = format!("the loss must be one number, not {} {:?}", meta.dtype, meta.dims.as_slice());
        return Err(Error::file(&model.path, what));
    }
    Ok(loss)
}

/// The target's type and shape that a loss on the graph's first output needs, where the data do not say.
pub fn default_target(loss: &Loss, graph: &Graph) -> Result<Meta> {
    let output = *graph
        .outputs
        .first()
        .ok_or_else(|| Error::Config("the model has no output to compute a loss on".into()))?;
    let meta = graph.meta(output)?;
    let mut dims = meta.dims.clone();
    match loss {
        Loss::CrossEntropy { .. } | Loss::ClassWeighted { .. } => {
            let along = softmax_axis(graph, output, dims.len()).filter(|axis| *axis > 0);
            if dims.len() > 1 {
                dims.remove(along.unwrap_or(1));
            }
            Ok(Meta::new(DType::I64, &dims))
        }
        _ => Ok(Meta::new(meta.dtype, &dims)),
    }
}
