//! The loss, attached to a network's outputs.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::exec::infer;
use crate::graph::{self, Graph, Source, ValueId};
use crate::import::Model;
use crate::ops::loss::{BceWithLogits, CrossEntropy, Mse};
use crate::ops::softmax::Softmax;
use crate::ops::transpose::Transpose;
use crate::ops::view::ReshapeTo;
use crate::tensor::{DType, Dims, Meta, Tensor};
use crate::train::entropy;

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
    /// Entropy of a classifier's predictions, for data without labels: the target is one weight a sample [N], of the
    /// scores' type. `diversity` is the share of the entropy of the mean prediction that is taken off: see
    /// [`crate::train::entropy`].
    Entropy { diversity: f64 },
    /// `labelled`, of class labels one a sample, and `weight` times what information maximisation minimises over the
    /// samples that have none ([`IGNORED`](crate::ops::loss::IGNORED)): their mean entropy less that of their mean
    /// prediction.
    Informed { labelled: Box<Loss>, weight: f64 },
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
        match self {
            Loss::Informed { labelled, .. } => labelled.wants_labels(),
            _ => matches!(self, Loss::CrossEntropy { .. } | Loss::ClassWeighted { .. }),
        }
    }

    /// Whether it is computed of a classifier's scores.
    pub fn wants_classes(&self) -> bool {
        self.wants_labels() || matches!(self, Loss::Entropy { .. })
    }

    /// The loss by which results are compared: without class weights, of labelled samples.
    pub fn unweighted(&self) -> Loss {
        match self {
            Loss::ClassWeighted { label_smoothing, .. } => {
                Loss::CrossEntropy { label_smoothing: *label_smoothing }
            }
            Loss::Informed { labelled, .. } => labelled.unweighted(),
            other => other.clone(),
        }
    }

    /// Appends the loss for a target of the given shape and type. Shapes must have been inferred.
    pub fn attach(&self, graph: &mut Graph, target: Meta) -> Result<Attached> {
        if let Loss::Informed { labelled, weight } = self {
            let of_labelled = labelled.attach(graph, target)?;
            let (loss, labels) = (of_labelled.loss, of_labelled.target);
            let loss = entropy::beside(graph, loss, of_labelled.logits, labels, *weight)?;
            return Ok(Attached { loss, ..of_labelled });
        }
        let Some(&output) = graph.outputs.first() else {
            return Err(Error::Config("the model has no output to compute a loss on".into()));
        };
        let (logits, activation) = match self {
            _ if self.wants_classes() => scores(graph, output)?,
            Loss::Bce => without(graph, output, &["Sigmoid"], ARRANGING)?,
            _ => (output, None),
        };
        let left_out = graph.left_out.clone().or(activation.map(|n| graph.describe(n)));
        let logits = match self.wants_classes() {
            true => flat(graph, logits, target.dims.len())?,
            false => logits,
        };
        let axis = match self {
            Loss::Entropy { .. } => class_axis(graph, logits, None)?,
            _ if self.wants_labels() => class_axis(graph, logits, Some(&target))?,
            _ => 1,
        };
        let soft = target.dtype.is_float();
        let input = graph.add_input("target", target);
        // The loss takes classes on axis 1; what is read of the model, metrics and all, follows it.
        let (logits, target) = match axis {
            1 => (logits, input),
            last => {
                let turned = classes_first(graph, logits, last)?;
                (turned, if soft && self.wants_labels() { classes_first(graph, input, last)? } else { input })
            }
        };
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
            Loss::Entropy { diversity } => entropy::emit(graph, logits, target, *diversity)?,
            Loss::Informed { .. } => return Err(Error::Config("a loss of labels within another".into())),
        };
        Ok(Attached { loss, target: input, logits, left_out })
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

/// The axis of the classes in scores of more than two dimensions: 1, as a convolution puts them out, or the last, as a dense layer
/// does that labels each step of a sequence. The labels' shape tells where it fits one of the two only; otherwise a
/// Softmax at the output, or the layer.
pub fn class_axis(graph: &Graph, scores: ValueId, target: Option<&Meta>) -> Result<usize> {
    let dims = &graph.meta(scores)?.dims;
    let last = dims.len().saturating_sub(1);
    if last < 2 {
        return Ok(1);
    }
    let labels = target.filter(|t| !t.dtype.is_float());
    // The batch is left out: shapes may be known for one sample.
    let fits = |axis: usize| {
        let rest = dims.iter().enumerate().filter(|(i, _)| *i != axis && *i != 0).map(|(_, d)| d);
        labels.is_none_or(|t| !t.dims.is_empty() && rest.eq(t.dims[1..].iter()))
    };
    Ok(match (fits(1), fits(last)) {
        (true, false) => 1,
        (false, true) => last,
        _ => match softmax_axis(graph, dims.len()) {
            Some(axis) if axis == 1 || axis == last => axis,
            _ if dense(graph, scores) => last,
            _ => 1,
        },
    })
}

/// The axis that a softmax at the end of the first output goes along, in scores of so many axes.
fn softmax_axis(graph: &Graph, rank: usize) -> Option<usize> {
    let output = *graph.outputs.first()?;
    let end = graph::ending(graph, output, &["Softmax", "LogSoftmax"], &[])?;
    graph.node(end.node).op.as_a::<Softmax>()?.over_axis(rank)
}

/// Does a dense layer put out `v`? Its features are on the last axis.
fn dense(graph: &Graph, mut v: ValueId) -> bool {
    while let Source::Node(id, 0) = graph.value(v).source {
        let node = graph.node(id);
        let known = |v: &ValueId| !matches!(graph.value(*v).source, Source::Node(..) | Source::Input);
        let mut computed = node.inputs.iter().flatten().filter(|v| !known(v));
        match node.op.name() {
            "MatMul" | "Gemm" => return true,
            "Identity" | "Cast" | "Add" | "Sub" | "Mul" | "Div" | "Dropout" => {
                match (computed.next(), computed.next()) {
                    (Some(x), None) => v = *x,
                    _ => return false,
                }
            }
            // Steps taken apart and put together again.
            "Reshape" => {
                let Some(Some(x)) = node.inputs.first() else { return false };
                let last = |v: ValueId| graph.value(v).meta.as_ref().and_then(|m| m.dims.last().copied());
                if last(*x) != last(v) {
                    return false;
                }
                v = *x;
            }
            _ => return false,
        }
    }
    false
}

fn classes_first(graph: &mut Graph, v: ValueId, axis: usize) -> Result<ValueId> {
    let rank = graph.meta(v)?.dims.len();
    let perm = [0, axis].into_iter().chain((1..rank).filter(|i| *i != axis)).collect();
    let made = graph.emit("classes", Arc::new(Transpose { perm: Some(perm) }), &[Some(v)], 1);
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

/// Binds the loss graph's inputs to outputs of the model by name (by position where it has one input
/// beside `target`) and copies it in.
fn loss_graph(graph: &mut Graph, model: &Model, target: ValueId) -> Result<ValueId> {
    let mut other = model.graph.clone();
    for w in &model.weights {
        let t = Arc::new(w.load(&model.files)?);
        let value = other.value_mut(w.value);
        value.meta = Some(Meta { value: Some(t.clone()), ..t.meta() });
        value.source = Source::Constant(t);
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
    let metas = bound.iter().map(|(theirs, ours)| Ok((*theirs, graph.meta(*ours)?.clone())));
    let metas = metas.collect::<Result<Vec<_>>>()?;
    // Functions, branches and operators that are made of others become what they are made of.
    let other = infer(other, &metas, &[])?;
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
    let none = || Error::Config("the model has no output to compute a loss on".into());
    let output = *graph.outputs.first().ok_or_else(none)?;
    let meta = graph.meta(output)?;
    if let Loss::Entropy { .. } = loss {
        return Ok(Meta::new(meta.dtype, meta.dims.get(..1).unwrap_or(&[])));
    }
    if !loss.wants_labels() {
        return Ok(Meta::new(meta.dtype, &meta.dims));
    }
    let (scores, _) = graph::logits(graph, output);
    let mut dims = graph.meta(scores)?.dims.clone();
    if dims.len() > 1 {
        dims.remove(class_axis(graph, scores, None)?);
    }
    Ok(Meta::new(DType::I64, &dims))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{Attrs, Spec, create};

    /// The axis of the classes in `x` (2, 4, 3) · `w` (3, `classes`), the result turned or not, with labels of shape `labels`.
    fn axis(classes: usize, turned: bool, labels: Option<&[usize]>) -> usize {
        let mut g = Graph::default();
        let x = g.add_input("x", Meta::new(DType::F32, &[2, 4, 3]));
        let w = g.add_constant("w", Tensor::zeros(DType::F32, &[3, classes]));
        let attrs = Attrs::default();
        let spec = Spec { domain: "", op_type: "MatMul", opset: 17, attrs: &attrs, inputs: 2, outputs: 1 };
        let mut y = g.emit("y", create(&spec).unwrap(), &[Some(x), Some(w)], 1).unwrap()[0];
        if turned {
            y = classes_first(&mut g, y, 2).unwrap();
        }
        class_axis(&g, y, labels.map(|l| Meta::new(DType::I64, l)).as_ref()).unwrap()
    }

    #[test]
    fn classes_lie_where_the_labels_or_the_layer_say() {
        assert_eq!(axis(5, false, Some(&[2, 4])), 2);
        assert_eq!(axis(5, true, Some(&[2, 4])), 1);
        assert_eq!(axis(5, false, Some(&[2, 5])), 1);
        // As many words as classes: the layer says it.
        assert_eq!(axis(4, false, Some(&[2, 4])), 2);
        assert_eq!(axis(4, true, Some(&[2, 4])), 1);
        assert_eq!(axis(5, false, None), 2);
    }
}
