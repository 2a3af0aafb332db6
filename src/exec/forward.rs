//! The model run once, on inputs by name.

use std::collections::HashMap;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::exec::Session;
use crate::exec::reference::interpret;
use crate::graph::{self, Bindings, Graph, Inferred, Source, ValueId};
use crate::plan::Request;
use crate::tensor::{DType, Meta, Tensor, View};

impl Session {
    /// Runs the model once, forward, on inputs by name, and returns its outputs in order, in the types
    /// that the file declares.
    pub fn forward(&mut self, feeds: &[(String, Tensor)]) -> Result<Vec<(String, Tensor)>> {
        let graph = self.graph()?;
        let bound = bind(&graph, feeds)?;
        let outputs = graph.outputs.clone();
        let values = match infer(graph.clone(), &metas_of(&bound), &bound) {
            Ok(inferred) => self.compute(inferred, &outputs, &bound)?,
            // Shapes that follow from what is computed on the way: up to there by plan, from there node by node.
            Err(e) => match graph.split_at_selections() {
                Some((front, back)) => self.compute_in_two(front, &back, bound)?,
                None => return Err(e),
            },
        };
        let named = |(v, t): (&ValueId, Tensor)| {
            let value = graph.value(*v);
            match value.declared.as_ref().map(|d| d.dtype) {
                Some(half @ (DType::F16 | DType::BF16)) => (value.name.clone(), t.cast(half)),
                _ => (value.name.clone(), t),
            }
        };
        Ok(outputs.iter().zip(values).map(named).collect())
    }

    /// The values `wanted` of a graph whose shapes are inferred, which are its outputs.
    fn compute(
        &mut self,
        mut graph: Graph,
        wanted: &[ValueId],
        bound: &[(ValueId, Tensor)],
    ) -> Result<Vec<Tensor>> {
        graph::fuse(&mut graph, &[], false)?;
        let request = Request { outputs: graph.outputs.clone(), ..Request::default() };
        let program = self.compile(graph, request)?;
        let views: Vec<(ValueId, View)> = bound.iter().map(|(v, t)| (*v, t.view())).collect();
        self.run(&program, &views, 0)?;
        debug_assert_eq!(program.graph.outputs.len(), wanted.len());
        program.graph.outputs.iter().map(|&v| Ok(self.output(&program, v)?.to_tensor())).collect()
    }

    /// The outputs of `back`, which reads what `front` puts out; see [`Graph::split_at_selections`].
    fn compute_in_two(
        &mut self,
        front: Graph,
        back: &Graph,
        bound: Vec<(ValueId, Tensor)>,
    ) -> Result<Vec<Tensor>> {
        let wanted = front.outputs.clone();
        let mut known: HashMap<ValueId, Tensor> = HashMap::new();
        if !wanted.is_empty() {
            let inferred = infer(front, &metas_of(&bound), &bound)?;
            known.extend(wanted.iter().copied().zip(self.compute(inferred, &wanted, &bound)?));
        }
        known.extend(bound);
        for v in back.nodes.iter().flat_map(|n| n.inputs.iter().flatten()).chain(&back.outputs) {
            let t = match &back.value(*v).source {
                Source::Weight(w) => self.model().load_weight(*w)?,
                Source::State(s) => {
                    let t = self.store().tensor(*s);
                    t.cast(t.dtype().working())
                }
                _ => continue,
            };
            known.insert(*v, t);
        }
        self.install(|| interpret(back, &known, &back.outputs))
    }
}

fn metas_of(bound: &[(ValueId, Tensor)]) -> Vec<(ValueId, Meta)> {
    bound.iter().map(|(v, t)| (*v, t.meta())).collect()
}

/// Pairs the graph's inputs with tensors by name; element types are converted to the working ones.
///
/// Fails when an input is not fed, when a name is no input, and when a shape contradicts the file
/// (the first dimension may differ: it is rebound).
pub fn bind(graph: &Graph, feeds: &[(String, Tensor)]) -> Result<Vec<(ValueId, Tensor)>> {
    let names = || graph.inputs.iter().map(|v| graph.value(*v).name.clone()).collect::<Vec<_>>().join(", ");
    for (name, _) in feeds {
        if !graph.inputs.iter().any(|v| graph.value(*v).name == *name) {
            return Err(Error::value(name, format!("the model has no such input; it has: {}", names())));
        }
    }
    graph
        .inputs
        .iter()
        .map(|&v| {
            let value = graph.value(v);
            let Some((_, t)) = feeds.iter().find(|f| f.0 == value.name) else {
                return Err(Error::value(
                    &value.name,
                    format!("this input is not fed (inputs: {})", names()),
                ));
            };
            Ok((v, fit(value, t)?))
        })
        .collect()
}

/// Checks a tensor against an input's declaration and converts it to the type it is computed in.
fn fit(value: &crate::graph::Value, t: &Tensor) -> Result<Tensor> {
    let Some(declared) = &value.declared else { return Ok(t.cast(t.dtype().working())) };
    if let Some(dims) = &declared.dims {
        let fits = dims.len() == t.dims().len()
            && dims.iter().zip(t.dims()).enumerate().all(|(i, (d, n))| match d {
                crate::graph::Dim::Fixed(want) => want == n || i == 0,
                _ => true,
            });
        if !fits {
            let want = dims.iter().map(|d| d.to_string()).collect::<Vec<_>>().join(", ");
            return Err(Error::value(
                &value.name,
                format!("fed with shape {:?}, the model takes [{want}]", t.dims()),
            ));
        }
    }
    if declared.dtype.is_float() != t.dtype().is_float()
        && !(declared.dtype.is_float() && t.dtype() == DType::U8)
    {
        return Err(Error::value(
            &value.name,
            format!("fed with {}, the model takes {}", t.dtype(), declared.dtype),
        ));
    }
    Ok(t.cast(declared.dtype).cast(declared.dtype.working()))
}

/// Infers all shapes for inputs of the given shapes; those whose values decide about shapes are bound
/// with `values`.
pub fn infer(graph: Graph, metas: &[(ValueId, Meta)], values: &[(ValueId, Tensor)]) -> Result<Graph> {
    let mut bindings: Bindings = metas.iter().cloned().collect();
    loop {
        let mut attempt = graph.clone();
        let needed = match attempt.infer(&bindings)? {
            Inferred::Complete => return Ok(attempt),
            Inferred::NeedsValues(needed) => needed,
        };
        for v in needed {
            let known = bindings.get(&v).is_some_and(|m| m.value.is_some());
            let (Some((_, t)), false) = (values.iter().find(|f| f.0 == v), known) else {
                let name = &graph.value(v).name;
                return Err(Error::value(
                    name,
                    "shapes depend on its values, which are not known before the run",
                ));
            };
            bindings.insert(v, Meta { value: Some(Arc::new(t.clone())), ..t.meta() });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exec::Options;
    use crate::import::make::{floats, import, model, node};

    #[test]
    fn no_samples_give_no_results() {
        // A product's scratch memory begins where a result of no bytes lies.
        let nodes = vec![node("MatMul", &["x", "w"], &["h"]), node("Relu", &["h"], &["y"])];
        let weights = vec![floats("w", &[3, 6], &[0.5; 18])];
        let mut session =
            Session::new(Arc::new(import(&model(nodes, weights, "y")).unwrap()), Options::default()).unwrap();
        for samples in [0, 3, 0] {
            let x = Tensor::zeros(DType::F32, &[samples, 3]);
            let outputs = session.forward(&[("x".into(), x)]).unwrap();
            assert_eq!(outputs[0].1.dims(), [samples, 6]);
        }
    }
}
