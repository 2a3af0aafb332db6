//! Gradients of the models of test cases: vector-Jacobian products against differences, in float64.
//!
//! The model is taken with every float32 of it (inputs, weights, constants, and what its operators make) as float64,
//! and its floating-point outputs are summed with random weights. Along a random direction the gradient of that sum
//! must equal its central difference. Where the differences to both sides disagree there is a kink, and another point
//! near by is tried; where the data are not finite themselves, finite ones. What a result has of infinities (as masked
//! scores do) does not count, and neither does the gradient of a plain constant where it is not finite (of an exponent, say).
//! Models that cannot be taken in float64 are not checked, and the reason says so.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use crate::error::{Error, OpError, Result};
use crate::exec::reference::interpret;
use crate::graph::{Bindings, Graph, Inferred, Source, ValueId, grad};
use crate::import::Model;
use crate::ops::binary::Mul;
use crate::ops::logic::Where;
use crate::ops::reduce::{Kind, Reduce};
use crate::tensor::{DType, Meta, Tensor};

/// What became of the gradients of a case.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "outcome", content = "reason")]
pub enum Checked {
    /// The gradient is the difference.
    Equal,
    /// There is nothing to differentiate, or an operator has no gradient.
    None(String),
    /// It could not be checked: no float64 form, or kinks wherever it was tried.
    Unchecked(String),
    Wrong(String),
}

/// Points that are tried before a case is given up as full of kinks.
const ATTEMPTS: usize = 12;
/// From this one on, numbers that are not finite are replaced.
const TAMED: usize = ATTEMPTS / 2;
/// Tensors of more elements in all are not differentiated: the plain executor holds every value at once.
const MOST: usize = 1 << 22;

/// The model's graph with everything of type float32 as float64; weights become inputs.
fn widened(model: &Model) -> Result<(Graph, Vec<(ValueId, Tensor)>)> {
    let mut graph = model.graph.clone();
    let mut weights = Vec::new();
    for w in &model.weights {
        let t = w.load(&model.files)?.cast(DType::F64);
        let value = graph.value_mut(w.value);
        value.source = Source::Input;
        value.meta = Some(t.meta());
        graph.inputs.push(w.value);
        weights.push((w.value, t));
    }
    graph.widen();
    Ok((graph, weights))
}

/// Infers shapes, binding the values that shapes depend on; those are not differentiated.
fn inferred(graph: &Graph, fed: &[(ValueId, Tensor)]) -> Result<(Graph, HashSet<ValueId>)> {
    let mut bound: HashSet<ValueId> =
        fed.iter().filter(|(_, t)| !t.dtype().is_float()).map(|(v, _)| *v).collect();
    loop {
        let meta = |(v, t): &(ValueId, Tensor)| {
            let value = bound.contains(v).then(|| Arc::new(t.clone()));
            (*v, Meta { value, ..t.meta() })
        };
        let bindings: Bindings = fed.iter().map(meta).collect();
        let mut attempt = graph.clone();
        match attempt.infer(&bindings)? {
            Inferred::Complete => return Ok((attempt, bound)),
            Inferred::NeedsValues(more) => {
                let before = bound.len();
                bound.extend(more);
                if bound.len() == before {
                    return Err(Error::Data("shapes depend on values that are not known".into()));
                }
            }
        }
    }
}

/// Adds up the floating-point outputs, weighted at random; where `finite` says so of an output's elements.
fn loss(
    graph: &mut Graph,
    finite: &HashMap<ValueId, Vec<bool>>,
    rng: &mut ChaCha8Rng,
) -> std::result::Result<Option<ValueId>, OpError> {
    let mut total = None;
    for v in graph.outputs.clone() {
        let Some(meta) = graph.value(v).meta.clone() else { continue };
        if meta.dtype != DType::F64 || meta.is_empty() {
            continue;
        }
        let weights: Vec<f64> = (0..meta.len()).map(|_| rng.random_range(-1.0..1.0)).collect();
        let weights = graph.add_constant("", Tensor::from_slice(&meta.dims, &weights)?);
        let mut y = v;
        if let Some(kept) = finite.get(&v).filter(|kept| kept.contains(&false)) {
            let kept: Vec<u8> = kept.iter().map(|k| u8::from(*k)).collect();
            let kept = graph.add_constant("", Tensor::from_bytes(DType::Bool, &meta.dims, &kept)?);
            let zero = graph.add_constant("", Tensor::scalar(0.0));
            y = graph.emit("check", Arc::new(Where), &[Some(kept), Some(v), Some(zero)], 1)?[0];
        }
        let terms = graph.emit("check", Arc::new(Mul), &[Some(y), Some(weights)], 1)?[0];
        let sum = Reduce { kind: Kind::Sum, axes: None, keepdims: false, noop: false };
        let sum = graph.emit("check", Arc::new(sum), &[Some(terms)], 1)?[0];
        total = Some(match total {
            Some(t) => graph.emit("check", Arc::new(crate::ops::binary::Add), &[Some(t), Some(sum)], 1)?[0],
            None => sum,
        });
    }
    Ok(total)
}

/// Which elements of the floating-point outputs are finite, for the data as they are with tame numbers in the place of
/// those that are not finite.
fn finite_outputs(
    graph: &Graph,
    fed: &[(ValueId, Tensor)],
    rng: &mut ChaCha8Rng,
) -> Result<HashMap<ValueId, Vec<bool>>> {
    let as_is: HashMap<ValueId, Tensor> = fed.iter().cloned().collect();
    let mut kept: HashMap<ValueId, Vec<bool>> = HashMap::new();
    let tame = fed.iter().map(|(v, t)| Ok((*v, tamed(t, rng)?))).collect::<Result<HashMap<_, _>>>()?;
    for feeds in [as_is, tame] {
        for (v, t) in graph.outputs.iter().zip(interpret(graph, &feeds, &graph.outputs)?) {
            if t.dtype().is_float() {
                let now: Vec<bool> = t.to_f64().iter().map(|x| x.is_finite()).collect();
                // One of the two points will do: attempts are made from both.
                kept.entry(*v)
                    .and_modify(|k| k.iter_mut().zip(&now).for_each(|(k, n)| *k |= n))
                    .or_insert(now);
            }
        }
    }
    Ok(kept)
}

/// The tensor with random numbers for what is not finite.
fn tamed(t: &Tensor, rng: &mut ChaCha8Rng) -> Result<Tensor> {
    if !t.dtype().is_float() || t.to_f64().iter().all(|x| x.is_finite()) {
        return Ok(t.clone());
    }
    let x: Vec<f64> =
        t.to_f64().iter().map(|x| if x.is_finite() { *x } else { rng.random_range(-1.0..1.0) }).collect();
    Tensor::from_slice(t.dims(), &x).map(|x| x.cast(t.dtype())).map_err(|e| Error::Data(e.to_string()))
}

/// A point and a direction in the space of everything that is differentiated.
struct Line<'a> {
    graph: &'a Graph,
    loss: ValueId,
    at: HashMap<ValueId, Tensor>,
    direction: Vec<(ValueId, Vec<f64>)>,
}

impl Line<'_> {
    /// The loss a step along the direction.
    fn loss(&self, step: f64) -> Result<f64> {
        let mut feeds = self.at.clone();
        for (v, d) in &self.direction {
            let x = self.at[v].to_f64();
            let moved: Vec<f64> = x.iter().zip(d).map(|(x, d)| x + step * d).collect();
            let t = Tensor::from_slice(self.at[v].dims(), &moved);
            feeds.insert(*v, t.map_err(|e| Error::Data(e.to_string()))?);
        }
        Ok(interpret(self.graph, &feeds, &[self.loss])?[0].to_f64()[0])
    }

    /// The derivative by central differences; `None` at a kink, or where it is not finite.
    fn slope(&self, scale: f64) -> Result<Option<f64>> {
        let here = self.loss(0.0)?;
        let mut slopes = Vec::new();
        for h in [1e-5, 3e-6] {
            let (after, before) = ((self.loss(h)? - here) / h, (here - self.loss(-h)?) / h);
            // The two sides of a smooth function differ by h times its curvature.
            let size = after.abs().max(before.abs()).max(scale).max(1e-3);
            if !(after - before).is_finite() || (after - before).abs() > 1e-3 * size {
                return Ok(None);
            }
            slopes.push((after + before) / 2.0);
        }
        let close = (slopes[0] - slopes[1]).abs() <= 1e-5 * slopes[0].abs().max(scale).max(1e-3);
        Ok(close.then_some(slopes[1]))
    }
}

fn unchecked(e: impl ToString) -> Checked {
    Checked::Unchecked(e.to_string())
}

/// Checks the gradients of a model on one data set.
pub(super) fn check(model: &Model, feeds: &[(ValueId, Tensor)]) -> Checked {
    compare(model, feeds).unwrap_or_else(|e| match e {
        Error::Blocked(list) => {
            let mut ops: Vec<&str> = list.iter().map(|b| b.op_type.as_str()).collect();
            ops.sort_unstable();
            ops.dedup();
            Checked::None(ops.join(", "))
        }
        other => unchecked(other),
    })
}

fn compare(model: &Model, feeds: &[(ValueId, Tensor)]) -> Result<Checked> {
    let failed = |e: OpError| Error::Op { node: "the sum of the outputs".into(), source: e };
    let (graph, weights) = widened(model)?;
    let wide = |t: &Tensor| if t.dtype().is_float() { t.cast(DType::F64) } else { t.clone() };
    let mut fed: Vec<(ValueId, Tensor)> = feeds.iter().map(|(v, t)| (*v, wide(t))).collect();
    fed.extend(weights);
    if fed.iter().map(|(_, t)| t.len()).sum::<usize>() > MOST {
        return Ok(unchecked("too large for the plain executor"));
    }
    let (mut graph, bound) = inferred(&graph, &fed)?;
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    for (v, t) in &mut fed {
        if t.dtype() == DType::F64 && !bound.contains(v) {
            // Next to such numbers a step is nothing; some cases hold memory that was never written.
            let tame =
                |x: &f64| if x.is_finite() && x.abs() > 1e6 { rng.random_range(-1.0..1.0) } else { *x };
            let tamed: Vec<f64> = t.to_f64().iter().map(tame).collect();
            *t = Tensor::from_slice(t.dims(), &tamed).map_err(failed)?;
        }
    }
    let wrt: Vec<ValueId> = fed
        .iter()
        .filter(|(v, t)| t.dtype() == DType::F64 && !bound.contains(v) && !t.is_empty())
        .map(|(v, _)| *v)
        .collect();
    if wrt.is_empty() {
        return Ok(Checked::None("no floating-point input".into()));
    }
    if let Some(node) = graph.nodes.iter().find(|n| n.op.name() == "FakeQuantize") {
        return Ok(unchecked(format!("{}: its gradient is not its derivative", node.op.name())));
    }
    let finite = finite_outputs(&graph, &fed, &mut rng)?;
    if finite.values().any(|kept| !kept.is_empty()) && !finite.values().flatten().any(|kept| *kept) {
        return Ok(unchecked("no element of the outputs is finite"));
    }
    let Some(loss) = loss(&mut graph, &finite, &mut rng).map_err(failed)? else {
        return Ok(Checked::None("no floating-point output".into()));
    };
    let forward = graph.clone();
    let grads = grad(&mut graph, loss, &wrt)?;
    let wrt: Vec<ValueId> = wrt.into_iter().filter(|v| grads.contains_key(v)).collect();
    if wrt.is_empty() {
        return Ok(Checked::None("no output depends on a floating-point input".into()));
    }
    let wanted: Vec<ValueId> = wrt.iter().map(|v| grads[v]).collect();
    let plain = |w: &crate::import::Weight| w.role == crate::import::Role::Constant;
    let constants: HashSet<ValueId> = model.weights.iter().filter(|w| plain(w)).map(|w| w.value).collect();
    let mut why = String::new();
    for attempt in 0..ATTEMPTS {
        let mut at: HashMap<ValueId, Tensor> = fed.iter().cloned().collect();
        let mut directions = Vec::new();
        for v in &wrt {
            let x = match attempt < TAMED {
                true => at[v].to_f64(),
                false => tamed(&at[v], &mut rng)?.to_f64(),
            };
            // Away from the data's own ties and corners, further at each attempt but the first.
            let reach = 0.004 * attempt as f64;
            let moved: Vec<f64> =
                x.iter().map(|x| x + reach * rng.random_range(-1.0..1.0) * x.abs().max(0.1)).collect();
            let moved = Tensor::from_slice(at[v].dims(), &moved).map_err(failed)?;
            let direction: Vec<f64> =
                x.iter().map(|x| rng.random_range(-1.0..1.0) * x.abs().clamp(0.1, 1.0)).collect();
            directions.push((*v, direction));
            at.insert(*v, moved);
        }
        let gradients = interpret(&graph, &at, &wanted)?;
        let mut kept = Vec::new();
        for (g, d) in gradients.into_iter().zip(directions) {
            if !constants.contains(&d.0) || g.to_f64().iter().all(|x| x.is_finite()) {
                kept.push((g, d));
            }
        }
        let (gradients, direction): (Vec<Tensor>, Vec<_>) = kept.into_iter().unzip();
        if direction.is_empty() {
            return Ok(unchecked("no gradient that is finite"));
        }
        let line = Line { graph: &forward, loss, at, direction };
        let products = || {
            let pairs = gradients.iter().zip(&line.direction);
            pairs.flat_map(|(g, (_, d))| g.to_f64().into_iter().zip(d.clone()).map(|(g, d)| g * d))
        };
        let (slope, scale): (f64, f64) = (products().sum(), products().map(f64::abs).sum());
        if !slope.is_finite() {
            why = "a gradient that is not finite".into();
            continue;
        }
        match line.slope(scale)? {
            None => why = "a kink, or values beyond the domain, wherever it was tried".into(),
            Some(measured) => {
                let off = (measured - slope).abs();
                return Ok(match off <= 1e-4 * scale.max(measured.abs()).max(1e-3) {
                    true => Checked::Equal,
                    false => Checked::Wrong(format!("{slope} along a direction, {measured} by differences")),
                });
            }
        }
    }
    Ok(unchecked(why))
}
