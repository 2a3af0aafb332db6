//! Joins chains of operators into one, before a graph is differentiated and planned.

mod attention;
mod expand;
mod gated;
mod gated_norms;
mod gelu;
mod group_norm;
mod norms;
mod products;
mod row_norm;
#[cfg(test)]
mod tests;
mod transposed;
mod unbind;
mod uses;

use std::sync::Arc;

use ndarray::ArrayD;
use smallvec::SmallVec;

use crate::error::{Error, Result};
use crate::graph::beside::beside;
use crate::graph::{Graph, Node, NodeId, Source, ValueId};
use crate::kernels::elementwise::Clamp;
use crate::ops::Op;
use crate::ops::batch_norm::BatchNormalization;
use crate::ops::binary::Binary;
use crate::ops::clip::Clip;
use crate::ops::conv::{Conv, ConvInputGrad};
use crate::ops::fold::FoldNorm;
use crate::ops::matmul::{MatMul, MatMulAs};
use crate::ops::unary::{Relu, Unary};
use crate::plan::Request;
use crate::tensor::{DType, Tensor};

pub use expand::join_expansions;
pub use gated_norms::join_gated_norms;
pub use norms::{gather_statistics, join_normalisations};
pub use products::join_products;

/// Fuses a forward graph whose shapes are inferred: normalisations and convolutions with the sum and the activation
/// that follow; and where no `weights_learn`, convolutions with a normalisation by given statistics. Products take the
/// factor, the bias and the sum that follow, and read matrices that are transposed as they lie. The Gaussian error linear unit,
/// units that weigh a value by a function of it, normalisations of rows and of groups of channels, attention, and parts that are gathered one by one become one operator where
/// they are spelled out.
///
/// The values in `keep` and the graph's outputs are computed as before. Others may vanish.
pub fn fuse(graph: &mut Graph, keep: &[ValueId], weights_learn: bool) -> Result<()> {
    transposed::read_as_they_lie(graph);
    unbind::split_gathers(graph)?;
    if weights_learn {
        beside(graph)?;
    }
    let outputs = graph.outputs.clone();
    let mut chains = Chains::new(graph, outputs.iter().chain(keep));
    for i in 0..graph.nodes.len() {
        let head = NodeId(i as u32);
        let op = graph.node(head).op.clone();
        if chains.dead[i] || graph.node(head).output().is_none() {
            continue;
        }
        chains.fuse_gelu(graph, head);
        chains.fuse_gated(graph, head);
        chains.fuse_row_norm(graph, head);
        chains.fuse_group_norm(graph, head);
        if let Some(conv) = op.as_a::<Conv>() {
            let norm = if weights_learn { None } else { chains.folded(graph, head) };
            let tail = chains.tail(graph, norm.as_ref().map_or(head, |n| n.0));
            if norm.is_some() || tail.is_longer() {
                let norm = norm.map(|(id, epsilon)| (graph.node(id).inputs.clone(), epsilon));
                chains.conv(graph, head, conv, norm, tail)?;
            }
        } else if let Some(norm) = op.as_a::<BatchNormalization>() {
            let tail = chains.tail(graph, head);
            if tail.is_longer() {
                let mut node = graph.node(head).clone();
                node.op = Arc::new(norm.then(tail.clamp));
                node.inputs.truncate(5);
                node.inputs.extend(tail.residual.map(Some));
                chains.replace(graph, &tail, SmallVec::from_iter([node]));
            }
        } else if op.as_a::<MatMul>().is_some() {
            chains.product(graph, head);
        }
    }
    chains.finish(graph);
    // Of products that have taken their factors.
    let mut chains = Chains::new(graph, outputs.iter().chain(keep));
    for i in 0..graph.nodes.len() {
        let id = NodeId(i as u32);
        if chains.fuse_attention(graph, id).is_none() {
            chains.weigh(graph, id);
        }
    }
    chains.finish(graph);
    Ok(())
}

/// Fuses the sums of a differentiated graph into the gradients, of convolutions and products, that they add to
/// something.
pub fn fuse_sums(graph: &mut Graph, request: &Request) {
    let keep = request.outputs.iter().chain(&request.effects).chain(request.pins.keys());
    let mut chains = Chains::new(graph, keep);
    for i in 0..graph.nodes.len() {
        let sum = graph.node(NodeId(i as u32));
        let (Some(Binary::Add), [Some(a), Some(b)]) = (sum.op.as_a(), &sum.inputs[..]) else { continue };
        let out = sum.outputs[0];
        // The later of the two, that the other is there.
        let mut both = [(*a, *b), (*b, *a)];
        both.sort_by_key(|(v, _)| std::cmp::Reverse(source(graph, *v)));
        let fits = |(v, other): &(ValueId, ValueId)| {
            let id = source(graph, *v)?;
            let node = graph.node(id);
            let able = node.op.as_a::<ConvInputGrad>().is_some() || node.op.as_a::<MatMulAs>().is_some();
            let plain = able && node.inputs.len() == 2;
            let same = same_shape(graph, *v, *other) && out.is_some_and(|out| same_shape(graph, *v, out));
            (plain && same && chains.passing(*v)).then_some((id, *v, *other))
        };
        let Some((id, inner, addend)) = both.iter().find_map(fits) else { continue };
        let Some(out) = out.filter(|out| source(graph, *out).is_some()) else { continue };
        let mut node = graph.node(id).clone();
        node.inputs.push(Some(addend));
        let tail = Tail {
            absorbed: SmallVec::from_iter([id, NodeId(i as u32)]),
            inner: SmallVec::from_iter([inner]),
            out,
            residual: Some(addend),
            clamp: Clamp::NONE,
        };
        chains.replace(graph, &tail, SmallVec::from_iter([node]));
    }
    chains.finish(graph);
}

/// The node that computes a value, unless it is known beforehand.
fn source(graph: &Graph, v: ValueId) -> Option<NodeId> {
    match graph.value(v).source {
        Source::Node(n, _) => Some(n),
        _ => None,
    }
}

/// A known scalar.
fn scalar(graph: &Graph, v: ValueId) -> Option<f64> {
    let value = graph.value(v).meta.as_ref()?.value.as_ref()?;
    (value.len() == 1).then(|| value.to_f64()[0])
}

/// The operands of a node, if it is of this kind.
fn operands(graph: &Graph, id: NodeId, kind: Binary) -> Option<(ValueId, ValueId)> {
    let node = graph.node(id);
    match (node.op.as_a::<Binary>(), &node.inputs[..]) {
        (Some(op), [Some(a), Some(b)]) if *op == kind => Some((*a, *b)),
        _ => None,
    }
}

/// The other operand of a node of this kind, whichever side `v` is on.
fn other(graph: &Graph, id: NodeId, kind: Binary, v: ValueId) -> Option<ValueId> {
    let (a, b) = operands(graph, id, kind)?;
    match () {
        _ if a == v => Some(b),
        _ if b == v => Some(a),
        _ => None,
    }
}

fn same_shape(graph: &Graph, a: ValueId, b: ValueId) -> bool {
    match (&graph.value(a).meta, &graph.value(b).meta) {
        (Some(a), Some(b)) => a.same_shape(b),
        _ => false,
    }
}

fn is_about(x: Option<f64>, y: f64) -> bool {
    x.is_some_and(|x| (x - y).abs() < 1e-6)
}

/// The value that a node multiplies or divides by a known number, and what that multiplies by.
fn multiplied(graph: &Graph, id: NodeId) -> Option<(ValueId, f64)> {
    let node = graph.node(id);
    let (op, &[Some(a), Some(b)]) = (node.op.as_a::<Binary>()?, &node.inputs[..]) else { return None };
    let (of, alpha) = match (op, scalar(graph, b)) {
        (Binary::Mul, Some(by)) => (a, by),
        (Binary::Mul, None) => (b, scalar(graph, a)?),
        (Binary::Div, by) => (a, 1.0 / by?),
        _ => return None,
    };
    let float = graph.value(of).meta.as_ref().is_some_and(|m| m.dtype.is_float());
    let out = node.output()?;
    (float && (alpha as f32).is_normal() && same_shape(graph, of, out)).then_some((of, alpha))
}

/// What lies around a node and can be done by one.
#[derive(Clone)]
struct Tail {
    /// The nodes that become one; it runs in the place of the last.
    absorbed: SmallVec<[NodeId; 4]>,
    /// The values that vanish.
    inner: SmallVec<[ValueId; 4]>,
    out: ValueId,
    residual: Option<ValueId>,
    clamp: Clamp<f64>,
}

impl Tail {
    fn of(head: NodeId, out: ValueId) -> Self {
        Tail {
            absorbed: SmallVec::from_iter([head]),
            inner: SmallVec::new(),
            out,
            residual: None,
            clamp: Clamp::NONE,
        }
    }

    fn is_longer(&self) -> bool {
        self.absorbed.len() > 1
    }
}

/// The rewriting of a graph.
struct Chains {
    /// Per value: how often it is read, by the world outside too, and by which node last.
    reads: Vec<(usize, Option<NodeId>)>,
    /// Per node: what runs in its place.
    replaced: Vec<Option<SmallVec<[Node; 2]>>>,
    dead: Vec<bool>,
}

impl Chains {
    fn new<'a>(graph: &Graph, keep: impl Iterator<Item = &'a ValueId>) -> Self {
        let mut reads = vec![(0, None); graph.values.len()];
        for (i, node) in graph.nodes.iter().enumerate() {
            for v in node.inputs.iter().flatten() {
                let read = &mut reads[v.index()];
                *read = (read.0 + 1, Some(NodeId(i as u32)));
            }
        }
        for v in keep {
            reads[v.index()].0 += 2;
        }
        Chains { reads, replaced: vec![None; graph.nodes.len()], dead: vec![false; graph.nodes.len()] }
    }

    /// Takes note of a value that a rewriting adds, for one node to read.
    fn note(&mut self, v: ValueId) {
        self.reads.resize(v.index() + 1, (1, None));
    }

    /// A constant of ones.
    fn ones(&mut self, graph: &mut Graph, dtype: DType, dims: &[usize]) -> ValueId {
        let ones = Tensor::from_array(&ArrayD::<f64>::ones(dims));
        let v = graph.add_constant("ones", ones.cast(dtype));
        self.note(v);
        v
    }

    /// Nobody but one node reads the value.
    fn passing(&self, v: ValueId) -> bool {
        self.reads.get(v.index()).is_some_and(|r| r.0 == 1)
    }

    /// The only reader of a node's first output.
    fn next(&self, graph: &Graph, v: ValueId) -> Option<NodeId> {
        source(graph, v)?;
        let (count, reader) = self.reads[v.index()];
        reader.filter(|id| count == 1 && !self.dead[id.index()])
    }

    /// The normalisation by given statistics that alone reads a convolution's output, and its ε.
    fn folded(&self, graph: &Graph, conv: NodeId) -> Option<(NodeId, f64)> {
        let y = graph.node(conv).output()?;
        let id = self.next(graph, y)?;
        let node = graph.node(id);
        let norm = node.op.as_a::<BatchNormalization>().filter(|n| !n.training())?;
        let unread = node.outputs.iter().skip(1).flatten().all(|v| self.reads[v.index()].0 == 0);
        (unread && node.inputs.first() == Some(&Some(y))).then_some(())?;
        Some((id, norm.channel_epsilon()?))
    }

    /// From a node on: perhaps a sum with something of the same shape, then perhaps an activation that clamps.
    fn tail(&self, graph: &Graph, head: NodeId) -> Tail {
        let out = graph.node(head).output().unwrap_or(ValueId(0));
        let mut tail = Tail::of(head, out);
        if let Some((id, residual)) = self.sum(graph, tail.out)
            && self.extend(graph, &mut tail, id)
        {
            tail.residual = Some(residual);
        }
        if let Some(id) = self.next(graph, tail.out)
            && let Some(clamp) = activation(graph, id)
            && self.extend(graph, &mut tail, id)
        {
            tail.clamp = clamp;
        }
        tail
    }

    /// A product with the numbers that its operands and it are multiplied by, and then a bias and something of its shape that
    /// are added to it.
    fn product(&mut self, graph: &mut Graph, head: NodeId) {
        let mut node = graph.node(head).clone();
        // Something of its shape may be added already.
        let ([Some(y)], &([Some(_), Some(b)] | [Some(_), Some(b), None, Some(_)])) =
            (&node.outputs[..], &node.inputs[..])
        else {
            return;
        };
        let (y, plain) = (*y, node.inputs.len() == 2);
        if graph.value(b).meta.as_ref().is_none_or(|m| m.dims.len() < 2) {
            // By a vector: the result's last axis is not the product's.
            return;
        }
        let mut tail = Tail::of(head, y);
        node.inputs.resize(node.inputs.len().max(3), None);
        let Some(op) = node.op.as_a::<MatMul>().copied() else { return };
        let mut alpha = f64::from(op.alpha);
        if plain {
            // (As exporters spell attention: by the root of the scale each.)
            for operand in node.inputs.iter_mut().flatten() {
                if let Some((of, by)) = source(graph, *operand).and_then(|id| multiplied(graph, id))
                    && self.take(graph, &mut tail, *operand, 1).is_some()
                {
                    alpha *= by;
                    *operand = of;
                }
            }
            if let Some((id, by)) = self.factor(graph, y)
                && self.extend(graph, &mut tail, id)
            {
                alpha *= by;
            }
            if tail.is_longer() {
                node.op = Arc::new(MatMul { alpha: alpha as f32, ..op });
            }
        }
        if let Some((id, bias)) = self.bias(graph, tail.out)
            && self.extend(graph, &mut tail, id)
        {
            node.inputs[2] = Some(bias);
        }
        if plain
            && let Some((id, other)) = self.sum(graph, tail.out)
            && self.extend(graph, &mut tail, id)
        {
            node.inputs.push(Some(other));
        }
        if tail.is_longer() {
            self.replace(graph, &tail, SmallVec::from_iter([node]));
        }
    }

    /// The product or quotient of `v`, which alone reads it, with a known number, and what that multiplies by.
    fn factor(&self, graph: &Graph, v: ValueId) -> Option<(NodeId, f64)> {
        let id = self.next(graph, v)?;
        let (of, alpha) = multiplied(graph, id)?;
        (of == v).then_some((id, alpha))
    }

    /// The sum that alone reads `v`, and a vector along its last axis that is added.
    fn bias(&self, graph: &Graph, v: ValueId) -> Option<(NodeId, ValueId)> {
        let id = self.next(graph, v)?;
        let node = graph.node(id);
        let (Some(Binary::Add), [Some(a), Some(b)]) = (node.op.as_a(), &node.inputs[..]) else { return None };
        let other = if *a == v { *b } else { *a };
        let dims =
            |v: ValueId| graph.value(v).meta.as_ref().filter(|m| m.dtype.is_float()).map(|m| &m.dims[..]);
        let (&[n], Some(last)) = (dims(other)?, dims(v)?.last()) else { return None };
        let out = node.output()?;
        (n == *last && same_shape(graph, v, out)).then_some((id, other))
    }

    /// The sum that alone reads `v`, and what is added.
    fn sum(&self, graph: &Graph, v: ValueId) -> Option<(NodeId, ValueId)> {
        let id = self.next(graph, v)?;
        let node = graph.node(id);
        let (Some(Binary::Add), [Some(a), Some(b)]) = (node.op.as_a(), &node.inputs[..]) else { return None };
        let other = if *a == v { *b } else { *a };
        let out = node.output()?;
        let float = graph.value(v).meta.as_ref().is_some_and(|m| m.dtype.is_float());
        (float && same_shape(graph, v, other) && same_shape(graph, v, out)).then_some(())?;
        // Of two that could take the sum, the later does.
        let able = |id: NodeId| {
            let op = &graph.node(id).op;
            op.as_a::<Conv>().is_some() || op.as_a::<BatchNormalization>().is_some()
        };
        let later = source(graph, other).filter(|id| self.passing(other) && able(*id));
        later.is_none_or(|id| Some(id) < source(graph, v)).then_some((id, other))
    }

    /// Takes the node that makes a value, which is read so often by what the tail has, into it.
    fn take(&self, graph: &Graph, tail: &mut Tail, v: ValueId, reads: usize) -> Option<NodeId> {
        let id = source(graph, v).filter(|id| !self.dead[id.index()] && self.reads[v.index()].0 == reads)?;
        tail.absorbed.insert(0, id);
        tail.inner.push(v);
        Some(id)
    }

    /// Takes the node of this kind that alone reads the tail's result into the tail, and gives its other operand.
    fn follow(&self, graph: &Graph, tail: &mut Tail, kind: Binary) -> Option<ValueId> {
        let id = self.next(graph, tail.out)?;
        let v = other(graph, id, kind, tail.out)?;
        self.extend(graph, tail, id).then_some(v)
    }

    /// Takes a scale and then a shift of such dimensions that alone read the tail's result into the tail, or only the scale.
    fn scale_and_shift(
        &self,
        graph: &Graph,
        tail: &mut Tail,
        shifts: bool,
        fits: impl Fn(&[usize]) -> bool,
    ) -> Option<(ValueId, Option<ValueId>)> {
        let mut longer = tail.clone();
        let dims = |v: ValueId| graph.value(v).meta.as_ref().map(|m| &m.dims[..]);
        let scale = self.follow(graph, &mut longer, Binary::Mul)?;
        let like = dims(scale).filter(|d| fits(d))?;
        *tail = longer.clone();
        let shift = self.follow(graph, &mut longer, Binary::Add).filter(|v| shifts && dims(*v) == Some(like));
        if shift.is_some() {
            *tail = longer;
        }
        Some((scale, shift))
    }

    /// Takes a node with one output that alone reads the tail's result into the tail.
    fn extend(&self, graph: &Graph, tail: &mut Tail, id: NodeId) -> bool {
        let [Some(out)] = graph.node(id).outputs[..] else { return false };
        if source(graph, out).is_none() {
            return false;
        }
        tail.inner.push(tail.out);
        tail.absorbed.push(id);
        tail.out = out;
        true
    }

    /// A convolution with what follows, a folded normalisation (its inputs and ε) among it.
    fn conv(
        &mut self,
        graph: &mut Graph,
        head: NodeId,
        conv: &Conv,
        norm: Option<(Vec<Option<ValueId>>, f64)>,
        mut tail: Tail,
    ) -> Result<()> {
        let mut nodes = SmallVec::new();
        let mut node = graph.node(head).clone();
        node.op = Arc::new(Conv { clamp: tail.clamp, ..conv.clone() });
        node.inputs.resize(3, None);
        if let Some((norm, epsilon)) = norm {
            let inner = node.output();
            tail.inner.extend(inner);
            tail.absorbed.insert(0, head);
            let inputs: Vec<Option<ValueId>> = node.inputs[1..].iter().chain(&norm[1..5]).copied().collect();
            let fold = self.fold(graph, head, FoldNorm { epsilon }, inputs)?;
            (node.inputs[1], node.inputs[2]) = (fold.outputs[0], fold.outputs[1]);
            nodes.push(fold);
        }
        node.inputs.extend(tail.residual.map(Some));
        nodes.push(node);
        self.replace(graph, &tail, nodes);
        Ok(())
    }

    fn fold(
        &mut self,
        graph: &mut Graph,
        conv: NodeId,
        op: FoldNorm,
        inputs: Vec<Option<ValueId>>,
    ) -> Result<Node> {
        let metas = graph.metas(&inputs);
        let metas = op.infer(&metas).map_err(|source| Error::Op { node: graph.describe(conv), source })?;
        let mut outputs = Vec::new();
        for (meta, what) in metas.into_iter().zip(["weights", "bias"]) {
            // The source is set at the end.
            let name = inputs[0].map_or("", |w| &graph.value(w).name);
            let v = graph.add_value(format!("{name}/folded {what}"), Source::Node(conv, 0));
            graph.value_mut(v).meta = Some(meta);
            outputs.push(Some(v));
            self.note(v);
        }
        Ok(Node { name: String::new(), op: Arc::new(op), inputs, outputs })
    }

    /// Puts `nodes`, the last of which computes the tail's result, in the place of what the tail absorbed.
    fn replace(&mut self, graph: &mut Graph, tail: &Tail, mut nodes: SmallVec<[Node; 2]>) {
        if let Some(last) = nodes.last_mut() {
            last.outputs[0] = Some(tail.out);
        }
        for id in &tail.absorbed {
            self.dead[id.index()] = true;
        }
        for v in &tail.inner {
            // Nobody reads it any more; whoever would is told that it is not computed.
            graph.value_mut(*v).source = Source::Input;
        }
        if let Some(last) = tail.absorbed.last() {
            self.replaced[last.index()] = Some(nodes);
        }
    }

    /// Puts one operator of these operands, named as the last, in the place of all that the tail absorbed.
    fn replace_by(
        &mut self,
        graph: &mut Graph,
        tail: Tail,
        op: impl Op + 'static,
        inputs: Vec<Option<ValueId>>,
    ) {
        let name = tail.absorbed.last().map_or(String::new(), |id| graph.node(*id).name.clone());
        let node = Node { name, op: Arc::new(op), inputs, outputs: vec![None] };
        self.replace(graph, &tail, SmallVec::from_iter([node]));
    }

    /// Renumbers the nodes.
    fn finish(self, graph: &mut Graph) {
        let nodes = std::mem::take(&mut graph.nodes);
        for ((node, replaced), dead) in nodes.into_iter().zip(self.replaced).zip(self.dead) {
            match replaced {
                Some(new) => graph.nodes.extend(new),
                None if dead => {}
                None => graph.nodes.push(node),
            }
        }
        graph.renumber();
    }
}

/// The bounds, where a node is an activation that does nothing else than to keep within them.
fn activation(graph: &Graph, id: NodeId) -> Option<Clamp<f64>> {
    let node = graph.node(id);
    let metas = graph.metas(&node.inputs);
    if node.op.as_a::<Unary<Relu>>().is_some() {
        return Some(Clamp { low: 0.0, high: f64::INFINITY });
    }
    node.op.as_a::<Clip>()?.clamp(&metas)
}
