//! Control flow whose course is known before the run, as ordinary nodes: the branch that an `If` takes, every round of
//! a `Loop` or `Scan`.

use std::collections::HashMap;
use std::sync::Arc;

use crate::error::OpError;
use crate::graph::{Graph, Node, NodeId, Source, ValueId};
use crate::ops::control::{Body, Control, Kind, Scan};
use crate::ops::{Attr, Attrs, Op, Spec, create};
use crate::tensor::{DType, Meta, Tensor};

/// Rounds up to which a loop is unrolled.
pub const MOST_UNROLLED: usize = 512;
/// Nodes up to which a loop is unrolled.
const MOST_NODES: usize = 1 << 16;

/// What became of a control-flow node.
pub(super) enum Expansion {
    /// The nodes that it comes to stand in its place.
    Done,
    /// Its course is not known.
    Unknown,
    /// The course is known, and shapes on it depend on the values of these inputs of the graph.
    Needs(Vec<ValueId>),
}

impl Graph {
    /// Replaces the control-flow node `id`, whose operands' shapes are inferred, by the nodes that it comes to.
    /// Where that is not known, or cannot be done yet, the graph is as it was.
    ///
    /// The nodes behind it get other ids.
    pub(super) fn expand(&mut self, id: NodeId) -> Result<Expansion, OpError> {
        let node = self.node(id).clone();
        let Some(control) = node.op.as_a::<Control>() else { return Ok(Expansion::Unknown) };
        let values = self.values.len();
        let tail = self.nodes.split_off(id.index() + 1);
        self.nodes.pop();
        let results = match self.course(control, &node) {
            Ok(Some(results)) => results,
            other => {
                let needs = match (&control.kind, &other) {
                    (Kind::If, Err(OpError::NeedsValue(operand))) => self.unmet(id.index(), *operand),
                    _ => Vec::new(),
                };
                self.nodes.truncate(id.index());
                self.values.truncate(values);
                self.nodes.push(node);
                self.nodes.extend(tail);
                return match other {
                    Err(OpError::NeedsValue(_)) if !needs.is_empty() => Ok(Expansion::Needs(needs)),
                    // Of an operand inside a body: the operator itself says what it lacks.
                    Err(OpError::NeedsValue(_)) => Ok(Expansion::Unknown),
                    other => other.map(|_| Expansion::Unknown),
                };
            }
        };
        // An Identity for each output; what came after the node keeps its order.
        let outputs: Vec<(usize, ValueId)> =
            node.outputs.iter().enumerate().filter_map(|(k, o)| o.map(|o| (k, o))).collect();
        let by = self.nodes.len() + outputs.len() - id.index() - 1;
        // Nothing refers to nodes behind one of a body that is being copied.
        let moved = if tail.is_empty() { 0 } else { values };
        for v in &mut self.values[..moved] {
            if let Source::Node(n, _) = &mut v.source
                && *n > id
            {
                *n = NodeId(n.0 + by as u32);
            }
        }
        for (k, output) in outputs {
            let Some(&result) = results.get(k) else {
                return Err(OpError::Shape(format!("{} has no output {k}", control.name())));
            };
            let at = NodeId(self.nodes.len() as u32);
            let name = format!("{}/{}", node.name, self.value(output).name);
            self.nodes.push(Node {
                name,
                op: operator("Identity", 1, &[])?,
                inputs: vec![Some(result)],
                outputs: vec![Some(output)],
            });
            self.value_mut(output).source = Source::Node(at, 0);
        }
        self.nodes.extend(tail);
        Ok(Expansion::Done)
    }

    /// The graph's inputs that operand `operand` of the first node from `from` on without shapes follows from.
    fn unmet(&self, from: usize, operand: usize) -> Vec<ValueId> {
        let open = |n: &&Node| n.outputs.iter().flatten().any(|v| self.value(*v).meta.is_none());
        let node = self.nodes[from..].iter().find(open);
        let operand = node.and_then(|n| n.inputs.get(operand).copied().flatten());
        operand.map(|v| self.input_ancestors(v)).unwrap_or_default()
    }

    /// The results of a control-flow node, as values that nodes appended here compute; `None` where its course is not
    /// known.
    fn course(&mut self, control: &Control, node: &Node) -> Result<Option<Vec<ValueId>>, OpError> {
        match &control.kind {
            Kind::If => {
                let condition = node.inputs.first().copied().flatten();
                let Some(condition) = condition.and_then(|c| self.truth(c)) else { return Ok(None) };
                let body = control.bodies.get(usize::from(!condition));
                body.map(|b| self.copy(b, &[], node, "branch")).transpose().map(Option::flatten)
            }
            Kind::Loop => self.unroll(control, node),
            Kind::Scan(scan) if scan.batched => self.unroll_batch(control, scan, node),
            Kind::Scan(scan) => {
                let own: Option<Vec<ValueId>> =
                    (0..control.own).map(|i| node.inputs.get(i).copied().flatten()).collect();
                let Some(own) = own else {
                    return Err(OpError::Shape("an operand of Scan is missing".into()));
                };
                self.unroll_scan(control, scan, node, &own, "")
            }
        }
    }

    fn known(&self, v: ValueId) -> Option<&Tensor> {
        self.value(v).meta.as_ref()?.value.as_deref()
    }

    fn truth(&self, v: ValueId) -> Option<bool> {
        self.known(v)?.to_ints().ok()?.first().map(|b| *b != 0)
    }

    fn unroll(&mut self, control: &Control, node: &Node) -> Result<Option<Vec<ValueId>>, OpError> {
        let Some(body) = control.bodies.first() else { return Ok(None) };
        let input = |i: usize| node.inputs.get(i).copied().flatten();
        let most = match input(0) {
            None => None,
            Some(v) => match self.known(v).and_then(|t| t.to_ints().ok()?.first().copied()) {
                Some(n) => Some(usize::try_from(n.max(0)).unwrap_or(usize::MAX)),
                None => return Ok(None),
            },
        };
        let mut go = match input(1) {
            None => Some(true),
            Some(v) => self.truth(v),
        };
        let mut carried: Vec<ValueId> = match (2..control.own).map(input).collect::<Option<_>>() {
            Some(all) => all,
            None => return Err(OpError::Shape("a carried value of Loop is missing".into())),
        };
        let results = body.graph.outputs.len().saturating_sub(1);
        let mut scanned: Vec<Vec<ValueId>> = vec![Vec::new(); results.saturating_sub(carried.len())];
        let mut round = 0usize;
        loop {
            match go {
                None => return Ok(None),
                Some(false) => break,
                Some(true) if most.is_some_and(|m| round >= m) => break,
                Some(true) if round >= MOST_UNROLLED => return Ok(None),
                Some(true) => {}
            }
            let counter = self.add_constant("", Tensor::scalar(round as i64));
            let yes = self.add_constant("", Tensor::from_bytes(DType::Bool, &[], &[1])?);
            let mut formal = vec![counter, yes];
            formal.extend(&carried);
            let Some(outs) = self.copy(body, &formal, node, &round.to_string())? else { return Ok(None) };
            go = outs.first().and_then(|v| self.truth(*v));
            carried = outs.iter().skip(1).take(carried.len()).copied().collect();
            let rest = outs.iter().skip(1 + carried.len());
            rest.zip(&mut scanned).for_each(|(v, all)| all.push(*v));
            round += 1;
        }
        for all in scanned {
            if all.is_empty() {
                return Ok(None);
            }
            carried.push(self.stack(&all, 0, node)?);
        }
        Ok(Some(carried))
    }

    /// `Scan` of opset 8: one of later opsets for each element of the batch.
    fn unroll_batch(
        &mut self,
        control: &Control,
        scan: &Scan,
        node: &Node,
    ) -> Result<Option<Vec<ValueId>>, OpError> {
        let input = |i: usize| node.inputs.get(i).copied().flatten();
        if input(0).is_some() {
            return Err(OpError::Unsupported("Scan of opset 8 with sequence_lens".into()));
        }
        let own: Option<Vec<ValueId>> = (1..control.own).map(input).collect();
        let Some(own) = own else { return Err(OpError::Shape("an operand of Scan is missing".into())) };
        let batch = |v: &ValueId| self.value(*v).meta.as_ref().and_then(|m| m.dims.first().copied());
        let sizes: Vec<Option<usize>> = own.iter().map(batch).collect();
        let n = match sizes.first() {
            Some(Some(n)) if sizes.iter().all(|s| *s == Some(*n)) && *n > 0 => *n,
            _ => return Err(OpError::Shape(format!("Scan of opset 8 over batches of {sizes:?}"))),
        };
        let rows: Vec<Vec<ValueId>> =
            own.iter().map(|v| self.pieces(*v, 0, n, node)).collect::<Result<_, _>>()?;
        let mut results: Vec<Vec<ValueId>> = Vec::new();
        for k in 0..n {
            let own: Vec<ValueId> = rows.iter().map(|row| row[k]).collect();
            let Some(made) = self.unroll_scan(control, scan, node, &own, &format!("{k}."))? else {
                return Ok(None);
            };
            results.resize(made.len(), Vec::new());
            results.iter_mut().zip(made).for_each(|(all, v)| all.push(v));
        }
        results.into_iter().map(|all| self.stack(&all, 0, node)).collect::<Result<_, _>>().map(Some)
    }

    /// The rounds of a `Scan` over the values `own`: its state, then what is scanned.
    fn unroll_scan(
        &mut self,
        control: &Control,
        scan: &Scan,
        node: &Node,
        own: &[ValueId],
        part: &str,
    ) -> Result<Option<Vec<ValueId>>, OpError> {
        let Some(body) = control.bodies.first() else { return Ok(None) };
        let (state, inputs) = own.split_at(own.len() - scan.inputs);
        let metas: Vec<Option<&Meta>> = inputs.iter().map(|v| self.value(*v).meta.as_ref()).collect();
        let rounds = scan.rounds(&metas)?;
        if rounds == 0 || rounds > MOST_UNROLLED {
            return Ok(None);
        }
        let mut parts = Vec::new();
        for (v, &axis) in inputs.iter().zip(&scan.input_axes) {
            parts.push(self.pieces(*v, axis, rounds, node)?);
        }
        let mut carried = state.to_vec();
        let mut scanned: Vec<Vec<ValueId>> = vec![Vec::new(); scan.output_axes.len()];
        for round in 0..rounds {
            let mut formal = carried.clone();
            for (pieces, reversed) in parts.iter().zip(&scan.input_reversed) {
                formal.push(pieces[if *reversed { rounds - 1 - round } else { round }]);
            }
            let Some(outs) = self.copy(body, &formal, node, &format!("{part}{round}"))? else {
                return Ok(None);
            };
            carried = outs.iter().take(state.len()).copied().collect();
            let rest = outs.iter().skip(state.len());
            rest.zip(&mut scanned).for_each(|(v, all)| all.push(*v));
        }
        for (k, mut all) in scanned.into_iter().enumerate() {
            if scan.output_reversed[k] {
                all.reverse();
            }
            carried.push(self.stack(&all, scan.output_axes[k], node)?);
        }
        Ok(Some(carried))
    }

    /// Appends the nodes of a body for these values of its own inputs, with shapes; `None` where that makes too many.
    fn copy(
        &mut self,
        body: &Body,
        formal: &[ValueId],
        node: &Node,
        part: &str,
    ) -> Result<Option<Vec<ValueId>>, OpError> {
        if self.nodes.len() > MOST_NODES {
            return Ok(None);
        }
        let mut map: HashMap<ValueId, ValueId> = HashMap::new();
        for (k, &v) in body.graph.inputs.iter().enumerate() {
            let ours = match k.checked_sub(body.formal) {
                None => formal.get(k).copied(),
                Some(c) => node.inputs.get(body.captured[c]).copied().flatten(),
            };
            map.insert(v, ours.ok_or_else(|| OpError::Shape(format!("operand {k} of a body is missing")))?);
        }
        for (i, v) in body.graph.values.iter().enumerate() {
            if let Source::Constant(t) = &v.source {
                let copy = self.add_value(v.name.clone(), Source::Constant(t.clone()));
                map.insert(ValueId(i as u32), copy);
            }
        }
        for n in &body.graph.nodes {
            let inputs: Vec<Option<ValueId>> =
                n.inputs.iter().map(|v| v.and_then(|v| map.get(&v).copied())).collect();
            let names: Vec<Option<String>> =
                n.outputs.iter().map(|o| o.map(|o| format!("{}#{part}", body.graph.value(o).name))).collect();
            let names: Vec<Option<&str>> = names.iter().map(Option::as_deref).collect();
            let id = NodeId(self.nodes.len() as u32);
            let made = self.add_node(format!("{}#{part}", n.name), n.op.clone(), inputs, &names);
            for (theirs, ours) in n.outputs.iter().zip(made) {
                if let (Some(theirs), Some(ours)) = (theirs, ours) {
                    map.insert(*theirs, ours);
                }
            }
            self.settle(id)?;
        }
        let missing = || OpError::Internal("a body's output is not computed".into());
        body.graph
            .outputs
            .iter()
            .map(|v| map.get(v).copied().ok_or_else(missing))
            .collect::<Result<_, _>>()
            .map(Some)
    }

    /// Infers the last node appended, expanded first where it is control flow itself.
    fn settle(&mut self, id: NodeId) -> Result<(), OpError> {
        match self.expand(id)? {
            Expansion::Unknown | Expansion::Needs(_) => self.infer_node(id),
            Expansion::Done => {
                (id.index()..self.nodes.len()).try_for_each(|i| self.infer_node(NodeId(i as u32)))
            }
        }
    }

    /// A value cut into single elements along an axis, which goes.
    fn pieces(&mut self, v: ValueId, axis: i64, rounds: usize, node: &Node) -> Result<Vec<ValueId>, OpError> {
        let split =
            operator("Split", 1, &[("axis", Attr::Int(axis)), ("split", Attr::Ints(vec![1; rounds]))])?;
        let names: Vec<String> = (0..rounds).map(|k| format!("{}#piece{k}", self.value(v).name)).collect();
        let names: Vec<Option<&str>> = names.iter().map(|n| Some(n.as_str())).collect();
        let id = NodeId(self.nodes.len() as u32);
        let made = self.add_node(format!("{}/Split", node.name), split, vec![Some(v)], &names);
        self.infer_node(id)?;
        made.into_iter().flatten().map(|p| self.reshaped("Squeeze", p, axis, node)).collect()
    }

    /// Values of equal shape along a new axis.
    fn stack(&mut self, all: &[ValueId], axis: i64, node: &Node) -> Result<ValueId, OpError> {
        let rows: Vec<Option<ValueId>> = all
            .iter()
            .map(|v| self.reshaped("Unsqueeze", *v, axis, node).map(Some))
            .collect::<Result<_, _>>()?;
        let concat = operator("Concat", rows.len(), &[("axis", Attr::Int(axis))])?;
        self.appended(concat, rows, node)
    }

    fn reshaped(&mut self, op: &str, v: ValueId, axis: i64, node: &Node) -> Result<ValueId, OpError> {
        let op = operator(op, 1, &[("axes", Attr::Ints(vec![axis]))])?;
        self.appended(op, vec![Some(v)], node)
    }

    fn appended(
        &mut self,
        op: Arc<dyn Op>,
        inputs: Vec<Option<ValueId>>,
        node: &Node,
    ) -> Result<ValueId, OpError> {
        let id = NodeId(self.nodes.len() as u32);
        let name = format!("{}/{}", node.name, op.name());
        let made = self.add_node(name.clone(), op, inputs, &[Some(name.as_str())]);
        self.infer_node(id)?;
        made[0].ok_or_else(|| OpError::Internal("an output is missing".into()))
    }
}

/// An operator of opset 11, in which axes are attributes.
fn operator(op_type: &str, inputs: usize, attrs: &[(&str, Attr)]) -> Result<Arc<dyn Op>, OpError> {
    let attrs = Attrs(attrs.iter().map(|(name, a)| (name.to_string(), a.clone())).collect());
    let outputs = match attrs.0.get("split") {
        Some(Attr::Ints(parts)) => parts.len(),
        _ => 1,
    };
    create(&Spec { domain: "", op_type, opset: 11, attrs: &attrs, inputs, outputs })
}
