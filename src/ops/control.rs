//! Control flow: `If`, `Loop` and `Scan`.
//!
//! Where shape inference knows the condition or the number of rounds, the bodies become ordinary nodes before anything
//! is planned (`graph::control`), and are trained through like them. What is left is run here, forward only, one
//! operator at a time.

use std::collections::HashMap;
use std::sync::Arc;

use crate::error::OpError;
use crate::graph::{Bindings, GradBuilder, Graph, Inferred, Source, ValueId};
use crate::ops::{Cx, Grads, Op, Spec, eval, get, need};
use crate::tensor::{Dims, Meta, Tensor, View, ViewMut};

/// Rounds after which a loop that does not end is an error.
const MOST_ROUNDS: usize = 1 << 20;

/// A subgraph as a graph of its own.
#[derive(Debug, Clone)]
pub struct Body {
    /// Its first `formal` inputs are the subgraph's own; the others stand for values around it.
    pub graph: Graph,
    pub formal: usize,
    /// Operands of the node that the other inputs are bound to.
    pub captured: Vec<usize>,
}

/// Which of the three, with its attributes.
#[derive(Debug, Clone)]
pub enum Kind {
    /// Bodies: `then_branch`, `else_branch`.
    If,
    Loop,
    Scan(Scan),
}

/// ONNX `Scan`.
#[derive(Debug, Clone)]
pub struct Scan {
    /// Of opset 8: `sequence_lens` is the first operand, and the first axis of all others and of the outputs is a batch.
    pub batched: bool,
    /// Number of scanned inputs; the operands before them are state.
    pub inputs: usize,
    pub input_axes: Vec<i64>,
    pub input_reversed: Vec<bool>,
    pub output_axes: Vec<i64>,
    pub output_reversed: Vec<bool>,
}

/// A node with bodies. Its operands are the node's own, then what the bodies read from around it.
#[derive(Debug, Clone)]
pub struct Control {
    pub kind: Kind,
    pub bodies: Vec<Arc<Body>>,
    /// Operands of its own.
    pub own: usize,
}

impl Scan {
    /// From the attributes of a node with `spec.inputs` operands and a body of `formal` inputs and `results` outputs.
    pub fn new(spec: &Spec, formal: usize, results: usize) -> Result<Scan, OpError> {
        let batched = spec.opset < 9;
        let own = spec.inputs - usize::from(batched && spec.inputs > 0);
        let count = spec.attrs.int_or("num_scan_inputs", 0)?;
        let inputs = usize::try_from(count).ok().filter(|n| (1..=own).contains(n));
        let Some(inputs) = inputs.filter(|_| formal == own) else {
            return Err(OpError::Attribute(format!("num_scan_inputs is {count} of {own} operands")));
        };
        let state = own - inputs;
        let outputs = results.checked_sub(state);
        let outputs = outputs.ok_or_else(|| OpError::Shape("Scan's body has too few outputs".into()))?;
        let list = |name: &str, n: usize| -> Result<Vec<i64>, OpError> {
            let list = spec.attrs.ints(name)?.unwrap_or_else(|| vec![0; n]);
            match list.len() == n {
                true => Ok(list),
                false => Err(OpError::Attribute(format!("{name} has {} entries, not {n}", list.len()))),
            }
        };
        let reversed = |v: Vec<i64>| v.into_iter().map(|d| d == 1).collect();
        let directions = if batched { "directions" } else { "scan_input_directions" };
        Ok(Scan {
            batched,
            inputs,
            input_axes: list("scan_input_axes", inputs)?,
            input_reversed: reversed(list(directions, inputs)?),
            output_axes: list("scan_output_axes", outputs)?,
            output_reversed: reversed(list("scan_output_directions", outputs)?),
        })
    }

    /// How many rounds there are for these operands, the scanned ones last.
    pub fn rounds(&self, scanned: &[Option<&Meta>]) -> Result<usize, OpError> {
        let mut rounds = None;
        for (m, &a) in scanned.iter().zip(&self.input_axes) {
            let m = m.ok_or_else(|| OpError::Shape("a scanned input is missing".into()))?;
            let n = m.dims[crate::tensor::axis(a, m.dims.len())?];
            if *rounds.get_or_insert(n) != n {
                return Err(OpError::Shape("scanned inputs are of different lengths".into()));
            }
        }
        rounds.ok_or_else(|| OpError::Shape("Scan without scanned inputs".into()))
    }
}

impl Body {
    /// The metas of its outputs for operands of the node: `formal` are the body's own.
    fn infer(&self, formal: &[Meta], operands: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let mut graph = self.graph.clone();
        let mut bindings = Bindings::new();
        for (k, &v) in self.graph.inputs.iter().enumerate() {
            let meta = match k.checked_sub(self.formal) {
                None => formal.get(k).cloned(),
                Some(c) => need(operands, self.captured[c]).ok().cloned(),
            };
            bindings
                .insert(v, meta.ok_or_else(|| OpError::Shape(format!("operand {k} of a body is missing")))?);
        }
        match graph.infer(&bindings) {
            Ok(Inferred::Complete) => {}
            Ok(Inferred::NeedsValues(_)) => {
                return Err(OpError::Unsupported("shapes in a body that depend on computed values".into()));
            }
            Err(e) => return Err(OpError::Unsupported(format!("in the body: {e}"))),
        }
        let meta = |v: &ValueId| graph.meta(*v).cloned().map_err(|e| OpError::Internal(e.to_string()));
        graph.outputs.iter().map(meta).collect()
    }

    /// Runs the body once.
    fn run(
        &self,
        formal: &[Arc<Tensor>],
        operands: &[Option<Arc<Tensor>>],
    ) -> Result<Vec<Arc<Tensor>>, OpError> {
        let mut values: HashMap<ValueId, Arc<Tensor>> = HashMap::new();
        for (k, &v) in self.graph.inputs.iter().enumerate() {
            let t = match k.checked_sub(self.formal) {
                None => formal.get(k).cloned(),
                Some(c) => operands.get(self.captured[c]).cloned().flatten(),
            };
            values.insert(v, t.ok_or_else(|| OpError::Shape(format!("operand {k} of a body is missing")))?);
        }
        let get = |values: &HashMap<ValueId, Arc<Tensor>>, v: ValueId| {
            let known = match &self.graph.value(v).source {
                Source::Constant(t) => Some(t.clone()),
                _ => None,
            };
            let missing = || OpError::Internal(format!("'{}' is not computed", self.graph.value(v).name));
            values.get(&v).cloned().or(known).ok_or_else(missing)
        };
        for node in &self.graph.nodes {
            let inputs: Vec<Option<Arc<Tensor>>> = node
                .inputs
                .iter()
                .map(|v| v.map(|v| get(&values, v)).transpose())
                .collect::<Result<_, _>>()?;
            let refs: Vec<Option<&Tensor>> = inputs.iter().map(|t| t.as_deref()).collect();
            let made = eval(node.op.as_ref(), &refs)
                .map_err(|e| OpError::Unsupported(format!("in the body, {}: {e}", node.op.name())))?;
            for (v, t) in node.outputs.iter().zip(made) {
                if let Some(v) = v {
                    values.insert(*v, Arc::new(t));
                }
            }
        }
        self.graph.outputs.iter().map(|v| get(&values, *v)).collect()
    }
}

fn unknown(m: &Meta) -> Meta {
    Meta { value: None, ..m.clone() }
}

fn with_axis(m: &Meta, axis: i64, n: usize) -> Result<Meta, OpError> {
    let mut dims = m.dims.clone();
    dims.insert(crate::tensor::axis(axis, dims.len() + 1)?, n);
    Ok(Meta::new(m.dtype, &dims))
}

impl Control {
    fn body(&self, i: usize) -> Result<&Body, OpError> {
        self.bodies.get(i).map(Arc::as_ref).ok_or_else(|| OpError::Internal("a body is missing".into()))
    }

    fn type_name(&self) -> &'static str {
        match self.kind {
            Kind::If => "If",
            Kind::Loop => "Loop",
            Kind::Scan(_) => "Scan",
        }
    }

    /// `Loop`: carried values must keep their shapes; scan outputs need a number of rounds that is known.
    fn infer_loop(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let body = self.body(0)?;
        let carried: Vec<Meta> =
            (2..self.own).map(|i| need(inputs, i).map(unknown)).collect::<Result<_, _>>()?;
        let mut formal =
            vec![Meta::new(crate::tensor::DType::I64, &[]), Meta::new(crate::tensor::DType::Bool, &[])];
        formal.extend(carried.iter().cloned());
        let outs = body.infer(&formal, inputs)?;
        let (after, scanned) =
            outs.get(1..).unwrap_or_default().split_at(carried.len().min(outs.len().max(1) - 1));
        for (a, b) in carried.iter().zip(after) {
            if !a.same_shape(b) {
                return Err(OpError::NeedsValue(0));
            }
        }
        if !scanned.is_empty() && outs.first().and_then(|m| m.value.as_ref()).is_none() && !self.goes_on() {
            return Err(OpError::NeedsValue(1));
        }
        let mut metas: Vec<Meta> = after.iter().map(unknown).collect();
        if !scanned.is_empty() {
            let rounds = inputs.first().copied().flatten().map(|m| m.ints(0)).transpose()?;
            let rounds = rounds.and_then(|m| m.first().copied()).ok_or(OpError::NeedsValue(0))?;
            let rounds = usize::try_from(rounds.max(0)).unwrap_or(0);
            for m in scanned {
                metas.push(with_axis(m, 0, rounds)?);
            }
        }
        Ok(metas)
    }

    /// Whether a `Loop`'s body hands its own condition on unchanged.
    fn goes_on(&self) -> bool {
        let Some(body) = self.bodies.first() else { return false };
        let (Some(&first), Some(&condition)) = (body.graph.outputs.first(), body.graph.inputs.get(1)) else {
            return false;
        };
        let mut v = first;
        while let Source::Node(n, 0) = body.graph.value(v).source {
            let node = body.graph.node(n);
            match (node.op.name(), node.inputs.first()) {
                ("Identity", Some(Some(x))) => v = *x,
                _ => return false,
            }
        }
        v == condition
    }

    fn infer_scan(&self, scan: &Scan, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let state = self.own - scan.inputs;
        let rounds = scan.rounds(inputs.get(state..self.own).unwrap_or_default())?;
        let mut formal: Vec<Meta> =
            (0..state).map(|i| need(inputs, i).map(unknown)).collect::<Result<_, _>>()?;
        for (k, &a) in scan.input_axes.iter().enumerate() {
            let m = need(inputs, state + k)?;
            let mut dims = m.dims.clone();
            dims.remove(crate::tensor::axis(a, m.dims.len())?);
            formal.push(Meta::new(m.dtype, &dims));
        }
        let outs = self.body(0)?.infer(&formal, inputs)?;
        let mut metas = Vec::with_capacity(outs.len());
        for (i, m) in outs.iter().enumerate() {
            match i.checked_sub(state) {
                None if m.same_shape(&formal[i]) => metas.push(unknown(m)),
                None => return Err(OpError::Unsupported("a state of Scan that changes its shape".into())),
                Some(k) => {
                    let axis = scan.output_axes.get(k).copied().unwrap_or(0);
                    metas.push(with_axis(m, axis, rounds)?);
                }
            }
        }
        Ok(metas)
    }

    /// The results for operands that are there: nothing has to be known beforehand.
    pub fn eval(&self, operands: &[Option<&Tensor>]) -> Result<Vec<Tensor>, OpError> {
        let owned: Vec<Option<Arc<Tensor>>> =
            operands.iter().map(|t| t.map(|t| Arc::new(t.clone()))).collect();
        let results = self.results(&owned)?;
        let mut made: Vec<Tensor> = results.into_iter().map(|t| t.as_ref().clone()).collect();
        if let Kind::Scan(scan) = &self.kind
            && made.len() < self.own - scan.inputs + scan.output_axes.len()
        {
            // Of no rounds: only the shapes tell what the empty outputs are.
            let metas: Vec<Option<Meta>> = operands.iter().map(|t| t.map(Tensor::meta)).collect();
            let metas: Vec<Option<&Meta>> = metas.iter().map(Option::as_ref).collect();
            let empty = self.infer_scan(scan, &metas)?;
            made.extend(empty.iter().skip(made.len()).map(|m| Tensor::zeros(m.dtype, &m.dims)));
        }
        Ok(made)
    }

    fn results(&self, operands: &[Option<Arc<Tensor>>]) -> Result<Vec<Arc<Tensor>>, OpError> {
        let flag = |t: &Tensor| t.to_ints().ok().and_then(|v| v.first().map(|b| *b != 0)).unwrap_or(false);
        let at = |i: usize| operands.get(i).cloned().flatten();
        let have = |i: usize| at(i).ok_or_else(|| OpError::Shape(format!("input {i} is missing")));
        match &self.kind {
            Kind::If => self.body(usize::from(!flag(have(0)?.as_ref())))?.run(&[], operands),
            Kind::Loop => {
                let most = at(0).and_then(|t| t.to_ints().ok()?.first().copied()).unwrap_or(i64::MAX);
                let mut go = at(1).is_none_or(|t| flag(&t));
                let mut carried: Vec<Arc<Tensor>> = (2..self.own).map(have).collect::<Result<_, _>>()?;
                let mut scanned: Vec<Vec<Arc<Tensor>>> = Vec::new();
                let mut round = 0i64;
                while go && round < most {
                    if round as usize >= MOST_ROUNDS {
                        return Err(OpError::Unsupported(format!(
                            "a loop of more than {MOST_ROUNDS} rounds"
                        )));
                    }
                    let go_in = Tensor::from_bytes(crate::tensor::DType::Bool, &[], &[1])?;
                    let mut formal = vec![Arc::new(Tensor::scalar(round)), Arc::new(go_in)];
                    formal.append(&mut carried);
                    let mut outs = self.body(0)?.run(&formal, operands)?.into_iter();
                    go = outs.next().is_some_and(|t| flag(&t));
                    carried = outs.by_ref().take(self.own.saturating_sub(2)).collect();
                    scanned.resize(scanned.len().max(outs.len()), Vec::new());
                    outs.zip(&mut scanned).for_each(|(t, all)| all.push(t));
                    round += 1;
                }
                for all in scanned {
                    carried.push(Arc::new(stack(&all, 0, false)?));
                }
                Ok(carried)
            }
            Kind::Scan(scan) if scan.batched => {
                Err(OpError::Unsupported("Scan of opset 8 in a body that is run".into()))
            }
            Kind::Scan(scan) => {
                let state = self.own - scan.inputs;
                let inputs: Vec<Arc<Tensor>> = (state..self.own).map(have).collect::<Result<_, _>>()?;
                let metas: Vec<Meta> = inputs.iter().map(|t| t.meta()).collect();
                let rounds = scan.rounds(&metas.iter().map(Some).collect::<Vec<_>>())?;
                let mut carried: Vec<Arc<Tensor>> = (0..state).map(have).collect::<Result<_, _>>()?;
                let mut scanned: Vec<Vec<Arc<Tensor>>> = vec![Vec::new(); scan.output_axes.len()];
                for round in 0..rounds {
                    let mut formal = std::mem::take(&mut carried);
                    for (k, t) in inputs.iter().enumerate() {
                        let i = if scan.input_reversed[k] { rounds - 1 - round } else { round };
                        formal.push(Arc::new(slice(t, scan.input_axes[k], i)?));
                    }
                    let mut outs = self.body(0)?.run(&formal, operands)?.into_iter();
                    carried = outs.by_ref().take(state).collect();
                    outs.zip(&mut scanned).for_each(|(t, all)| all.push(t));
                }
                for (k, all) in scanned.iter().enumerate().filter(|(_, all)| !all.is_empty()) {
                    carried.push(Arc::new(stack(all, scan.output_axes[k], scan.output_reversed[k])?));
                }
                Ok(carried)
            }
        }
    }
}

/// (outer, inner) sizes around an axis, in bytes.
fn around(t: &Tensor, axis: usize) -> (usize, usize) {
    let outer = t.dims()[..axis].iter().product();
    (outer, t.dims()[axis..].iter().product::<usize>() * t.dtype().size())
}

/// Element `i` along an axis, which goes.
fn slice(t: &Tensor, axis: i64, i: usize) -> Result<Tensor, OpError> {
    let a = crate::tensor::axis(axis, t.dims().len())?;
    let mut dims = Dims::from_slice(t.dims());
    let n = dims.remove(a);
    let (outer, span) = around(t, a);
    let size = span / n.max(1);
    let mut out = Tensor::zeros(t.dtype(), &dims);
    for o in 0..outer {
        let from = o * span + i * size;
        out.bytes_mut()[o * size..(o + 1) * size].copy_from_slice(&t.bytes()[from..from + size]);
    }
    Ok(out)
}

/// Tensors of equal shape along a new axis.
fn stack(all: &[Arc<Tensor>], axis: i64, reversed: bool) -> Result<Tensor, OpError> {
    let first = all.first().ok_or_else(|| OpError::Unsupported("a scan output of no rounds".into()))?;
    if all.iter().any(|t| t.dims() != first.dims() || t.dtype() != first.dtype()) {
        return Err(OpError::Unsupported("scan outputs whose shapes differ from round to round".into()));
    }
    let a = crate::tensor::axis(axis, first.dims().len() + 1)?;
    let mut dims = Dims::from_slice(first.dims());
    dims.insert(a, all.len());
    let outer: usize = dims[..a].iter().product();
    let size = first.bytes().len() / outer.max(1);
    let mut out = Tensor::zeros(first.dtype(), &dims);
    for o in 0..outer {
        for k in 0..all.len() {
            let t = &all[if reversed { all.len() - 1 - k } else { k }];
            let to = (o * all.len() + k) * size;
            out.bytes_mut()[to..to + size].copy_from_slice(&t.bytes()[o * size..(o + 1) * size]);
        }
    }
    Ok(out)
}

impl Op for Control {
    fn name(&self) -> &'static str {
        self.type_name()
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        match &self.kind {
            Kind::If => {
                let branches = [self.body(0)?.infer(&[], inputs), self.body(1)?.infer(&[], inputs)];
                match branches {
                    [Ok(a), Ok(b)]
                        if a.len() == b.len() && a.iter().zip(&b).all(|(a, b)| a.same_shape(b)) =>
                    {
                        Ok(a.iter().map(unknown).collect())
                    }
                    // Which of the two is taken decides about shapes.
                    _ => Err(OpError::NeedsValue(0)),
                }
            }
            Kind::Loop => self.infer_loop(inputs).map_err(|e| {
                // Known rounds are unrolled, and then every shape follows.
                let open = (0..2).find(|i| get(inputs, *i).is_some_and(|m| m.value.is_none()));
                match (e, open) {
                    (OpError::Unsupported(_), Some(i)) => OpError::NeedsValue(i),
                    (e, _) => e,
                }
            }),
            Kind::Scan(scan) if scan.batched => Err(OpError::Unsupported(format!(
                "Scan of opset 8 of more than {} rounds, or with a body whose shapes follow from values",
                crate::graph::MOST_UNROLLED
            ))),
            Kind::Scan(scan) => self.infer_scan(scan, inputs),
        }
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let operands: Vec<Option<Arc<Tensor>>> =
            x.iter().map(|v| v.map(|v| Arc::new(v.to_tensor()))).collect();
        let results = self.results(&operands)?;
        for (i, y) in y.iter_mut().enumerate() {
            // Of no rounds, scan outputs have no elements, and none is computed.
            let Some(y) = y.as_mut().filter(|y| !y.bytes.is_empty()) else { continue };
            let t =
                results.get(i).ok_or_else(|| OpError::Shape(format!("the body computes no output {i}")))?;
            if t.dims() != y.dims || t.dtype() != y.dtype {
                return Err(OpError::Unsupported(format!(
                    "output {i} is {} {:?} in this run, planned for {} {:?}",
                    t.dtype(),
                    t.dims(),
                    y.dtype,
                    y.dims
                )));
            }
            y.bytes.copy_from_slice(t.bytes());
        }
        Ok(())
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable(match self.kind {
            Kind::If => "If whose condition is known only in the run".into(),
            _ => format!(
                "{} whose number of rounds is known only in the run, or is above {}",
                self.type_name(),
                crate::graph::MOST_UNROLLED
            ),
        }))
    }

    fn in_float64(&self) -> Option<Arc<dyn Op>> {
        let mut wide = self.clone();
        for body in &mut wide.bodies {
            Arc::make_mut(body).graph.widen();
        }
        Some(Arc::new(wide))
    }

    fn is_pure(&self) -> bool {
        self.bodies.iter().all(|b| b.graph.nodes.iter().all(|n| n.op.is_pure()))
    }

    fn remark(&self) -> Option<String> {
        Some("runs body by body where its course is not known before the run; no gradient passes then".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::binary::Add;
    use crate::tensor::DType;

    /// A running sum, of no rounds.
    #[test]
    fn a_scan_of_nothing_has_empty_outputs() {
        let mut graph = Graph::default();
        let [state, x] = ["state", "x"].map(|name| graph.add_value(name, Source::Input));
        graph.inputs = vec![state, x];
        let sum = graph.add_node("", Arc::new(Add), vec![Some(state), Some(x)], &[Some("sum")])[0].unwrap();
        graph.outputs = vec![sum, sum];
        let body = Arc::new(Body { graph, formal: 2, captured: vec![] });
        let scan = Scan {
            batched: false,
            inputs: 1,
            input_axes: vec![0],
            input_reversed: vec![false],
            output_axes: vec![0],
            output_reversed: vec![false],
        };
        let op = Control { kind: Kind::Scan(scan), bodies: vec![body], own: 2 };
        let state = Tensor::from_slice(&[2], &[1.0f32, 2.0]).unwrap();
        for rounds in [0, 3] {
            let x = Tensor::from_slice(&[rounds, 2], &vec![1.0f32; 2 * rounds]).unwrap();
            let made = eval(&op, &[Some(&state), Some(&x)]).unwrap();
            assert_eq!(made[0].to_f64(), [1.0, 2.0].map(|s| s + rounds as f64));
            assert_eq!((made[1].dtype(), made[1].dims()), (DType::F32, &[rounds, 2][..]));
        }
    }
}
