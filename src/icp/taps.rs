//! Which values the teacher's and the student's features are compared at.

use crate::error::{Error, Result};
use crate::graph::{Graph, Source, ValueId};
use crate::import::Model;

/// The choice of taps.
#[derive(Debug, Clone, PartialEq)]
pub enum Taps {
    /// The outputs of the network's stages.
    Auto,
    /// The first (shallowest) so many of them, or the last (deepest).
    First(usize),
    Last(usize),
    /// ONNX value names, from shallow to deep.
    Names(Vec<String>),
}

/// The tapped values of a graph made of a model, whose shapes are inferred; `logits` is where the loss is computed. They are among
/// the values of the model: what operators were taken apart into has other values on another occasion.
///
/// Automatic: the last value of each spatial resolution before it shrinks; without spatial dimensions, the
/// output of each residual block of a transformer, else of each hidden layer. Only values through which
/// everything flows from the input to `logits` are taken, where the network has such values.
pub fn find(model: &Model, graph: &Graph, taps: &Taps, logits: ValueId) -> Result<Vec<ValueId>> {
    let of_the_file = |v: &ValueId| v.index() < model.graph.values.len();
    match taps {
        Taps::Names(names) => names
            .iter()
            .map(|name| {
                let v = graph
                    .find(name)
                    .filter(of_the_file)
                    .ok_or_else(|| Error::value(name, "no such value in the model to tap"))?;
                let float = graph.meta(v)?.dtype.is_float();
                match graph.value(v).source {
                    Source::Node(..) if float => Ok(v),
                    _ => Err(Error::value(name, "a tap must be a floating-point value that a node computes")),
                }
            })
            .collect(),
        Taps::First(n) => Ok(find(model, graph, &Taps::Auto, logits)?.into_iter().take(*n).collect()),
        Taps::Last(n) => {
            let all = find(model, graph, &Taps::Auto, logits)?;
            Ok(all[all.len().saturating_sub(*n)..].to_vec())
        }
        Taps::Auto => {
            let path = Path::new(graph, logits)?;
            // A mask that every block reads keeps a transformer from having any value that all flows through.
            let features = path.features();
            let in_order: [&dyn Fn() -> Vec<ValueId>; 6] = [
                &|| path.stages(true),
                &|| path.blocks(),
                &|| features.stages(true),
                &|| features.blocks(),
                &|| path.stages(false),
                &|| path.layers(),
            ];
            let found = in_order
                .iter()
                .map(|f| f().into_iter().filter(of_the_file).collect::<Vec<_>>())
                .find(|candidates| !candidates.is_empty());
            found.ok_or_else(|| {
                let what = "no stages found to compare features at: name values with --icp-taps NAME,…";
                Error::Config(what.into())
            })
        }
    }
}

/// The values between the inputs and the logits, in the order they are computed.
pub(super) struct Path<'a> {
    graph: &'a Graph,
    pub values: Vec<ValueId>,
    /// Whether everything flows through the value.
    pub cut: Vec<bool>,
    /// The node that computes each.
    nodes: Vec<usize>,
    /// Per value of the graph: does it depend on an input?
    depends: Vec<bool>,
    /// Per value of the graph: the last node that reads it.
    last_read: Vec<usize>,
}

impl<'a> Path<'a> {
    pub fn new(graph: &'a Graph, logits: ValueId) -> Result<Self> {
        let mut needed = vec![false; graph.values.len()];
        let mut stack = vec![logits];
        while let Some(v) = stack.pop() {
            if !std::mem::replace(&mut needed[v.index()], true)
                && let Source::Node(n, _) = graph.value(v).source
            {
                stack.extend(graph.node(n).inputs.iter().flatten());
            }
        }
        // Perturbed inputs are states here; parameters are too, but no declaration makes them inputs.
        let mut depends = vec![false; graph.values.len()];
        for (i, v) in graph.values.iter().enumerate() {
            let state_input = matches!(v.source, Source::State(_)) && v.declared.is_some();
            depends[i] = matches!(v.source, Source::Input) || state_input;
        }
        let (mut values, mut nodes) = (Vec::new(), Vec::new());
        let mut last_read = vec![0; graph.values.len()];
        for (i, node) in graph.nodes.iter().enumerate() {
            let on_path = node.outputs.iter().flatten().any(|v| needed[v.index()]);
            if !on_path || !node.inputs.iter().flatten().any(|v| depends[v.index()]) {
                continue;
            }
            for v in node.inputs.iter().flatten() {
                last_read[v.index()] = i;
            }
            for v in node.outputs.iter().flatten().filter(|v| needed[v.index()]) {
                depends[v.index()] = true;
                values.push(*v);
                nodes.push(i);
            }
        }
        last_read[logits.index()] = usize::MAX;
        let inputs: Vec<ValueId> = (0..graph.values.len() as u32)
            .map(ValueId)
            .filter(|v| depends[v.index()] && !matches!(graph.value(*v).source, Source::Node(..)))
            .collect();
        let mut path = Path { graph, values, cut: Vec::new(), nodes, depends, last_read };
        path.cut = path.cuts(inputs);
        Ok(path)
    }

    /// A value is a cut when, right after it is computed, nothing else computed before, nor of `open`, is still to be read.
    fn cuts(&self, mut open: Vec<ValueId>) -> Vec<bool> {
        let mut cut = Vec::new();
        for (v, at) in self.values.iter().zip(&self.nodes) {
            open.retain(|o| self.last_read[o.index()] > *at);
            cut.push(open.is_empty());
            open.push(*v);
        }
        cut
    }

    /// The path of values that weights have a part in: what is computed of inputs alone, such as a mask, flows beside it.
    pub fn features(&self) -> Path<'a> {
        let graph = self.graph;
        let weight = |v: &ValueId| {
            let several = || graph.value(*v).meta.as_ref().is_some_and(|m| m.len() > 1);
            matches!(graph.value(*v).source, Source::Weight(_)) && several()
        };
        let mut of_weights = vec![false; graph.values.len()];
        let (mut values, mut nodes) = (Vec::new(), Vec::new());
        for (v, at) in self.values.iter().zip(&self.nodes) {
            if graph.nodes[*at].inputs.iter().flatten().any(|x| of_weights[x.index()] || weight(x)) {
                of_weights[v.index()] = true;
                values.push(*v);
                nodes.push(*at);
            }
        }
        let (depends, last_read) = (of_weights, self.last_read.clone());
        let mut path = Path { graph, values, cut: Vec::new(), nodes, depends, last_read };
        path.cut = path.cuts(Vec::new());
        path
    }

    fn dims(&self, v: ValueId) -> &[usize] {
        self.graph.value(v).meta.as_ref().map_or(&[], |m| m.dims.as_slice())
    }

    /// The last value of each spatial size before it shrinks (to 1 included); sizes of 1 are no stage.
    fn stages(&self, cuts: bool) -> Vec<ValueId> {
        let mut stages: Vec<(usize, ValueId)> = Vec::new();
        for (k, &v) in self.values.iter().enumerate() {
            let dims = self.dims(v);
            if dims.len() < 3 || (cuts && !self.cut[k]) || (dims.len() == 3 && !self.convolutional(v)) {
                continue;
            }
            let size: usize = dims[2..].iter().product();
            if size <= 1 {
                continue;
            }
            match stages.last_mut() {
                Some(last) if last.0 == size => last.1 = v,
                Some(last) if last.0 < size => {}
                _ => stages.push((size, v)),
            }
        }
        stages.into_iter().map(|s| s.1).collect()
    }

    /// Is a rank-3 value's last dimension a length that a convolution or pooling runs over?
    pub fn convolutional(&self, v: ValueId) -> bool {
        let spatial = |op: &str| op.contains("Conv") || op.contains("Pool") || op == "BatchNormalization";
        let mut v = v;
        for _ in 0..4 {
            let Source::Node(n, _) = self.graph.value(v).source else { return false };
            let node = self.graph.node(n);
            if spatial(node.op.name()) {
                return true;
            }
            match node.inputs.first() {
                Some(Some(x)) => v = *x,
                _ => return false,
            }
        }
        false
    }

    /// Residual sums of a transformer, one a block: every second one where attention and feed-forward
    /// each have their own.
    fn blocks(&self) -> Vec<ValueId> {
        let sums: Vec<ValueId> = self
            .values
            .iter()
            .enumerate()
            .filter(|(k, v)| {
                let Source::Node(n, _) = self.graph.value(**v).source else { return false };
                let node = self.graph.node(n);
                let residual = node.inputs.iter().flatten().filter(|x| self.depends[x.index()]).count() == 2;
                self.cut[*k] && self.dims(**v).len() == 3 && node.op.name() == "Add" && residual
            })
            .map(|(_, v)| *v)
            .collect();
        match sums.len() {
            n if n >= 2 && n % 2 == 0 => sums.into_iter().skip(1).step_by(2).collect(),
            _ => sums,
        }
    }

    /// What each dense layer but the first reads.
    fn layers(&self) -> Vec<ValueId> {
        let mut layers = Vec::new();
        for &v in &self.values {
            let Source::Node(n, 0) = self.graph.value(v).source else { continue };
            let node = self.graph.node(n);
            if let ("Gemm" | "MatMul", Some(Some(x))) = (node.op.name(), node.inputs.first())
                && matches!(self.graph.value(*x).source, Source::Node(..))
                && !layers.contains(x)
            {
                layers.push(*x);
            }
        }
        layers
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::exec::{Options, Session, infer};
    use crate::import::make::{attr, floats, import, model, node, with};
    use crate::import::proto::AttributeProto;
    use crate::tensor::{DType, Meta};

    #[test]
    fn what_operators_are_taken_apart_into_is_not_tapped() {
        let equation = AttributeProto { s: b"ntc,cd->ntd".to_vec().into(), ..attr("equation", 3) };
        let nodes = vec![
            node("Tanh", &["x"], &["h"]),
            with(node("Einsum", &["h", "w"], &["e"]), equation),
            node("Relu", &["e"], &["r"]),
            node("MatMul", &["r", "v"], &["y"]),
        ];
        let weights = vec![floats("w", &[3, 6], &[0.5; 18]), floats("v", &[6, 4], &[0.5; 24])];
        let m = Arc::new(import(&model(nodes, weights, "y")).unwrap());
        let graph = Session::new(m.clone(), Options::default()).unwrap().graph().unwrap();
        let x = graph.inputs[0];
        let graph = infer(graph, &[(x, Meta::new(DType::F32, &[5, 2, 3]))], &[]).unwrap();
        let (known, logits) = (m.graph.values.len(), graph.outputs[0]);
        let taken_apart = (known..graph.values.len()).find(|&v| {
            matches!(graph.values[v].source, Source::Node(..)) && !graph.values[v].name.is_empty()
        });
        let inside = graph.values[taken_apart.unwrap()].name.clone();
        let names = |taps: &Taps| {
            let taps = find(&m, &graph, taps, logits)?;
            Ok::<Vec<String>, Error>(taps.iter().map(|v| graph.value(*v).name.clone()).collect())
        };
        assert_eq!(names(&Taps::Auto).unwrap(), ["r"]);
        assert_eq!(names(&Taps::Names(vec!["e".into()])).unwrap(), ["e"]);
        assert!(names(&Taps::Names(vec![inside.clone()])).unwrap_err().to_string().contains(&inside));
    }
}
