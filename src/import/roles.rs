//! What each float constant is to the network, from the operand slots that consume it.
//!
//! Names are never looked at. A constant is followed through operators that only move its elements;
//! each place where it arrives gives a role, and the strongest decides.

mod body;
mod learned;
mod moves;

use std::collections::HashSet;

use crate::graph::{Graph, NodeId, Source, ValueId, WeightId, op_type};
use crate::import::external::SourceFile;
use crate::import::weights::{Role, Use, Weight};
use crate::ops::Attrs;
use crate::ops::control::Control;
use crate::tensor::Dims;

use moves::{Way, moves_only};

/// How far the origin of a value is followed.
const DEPTH: usize = 16;
/// How many nodes are looked at on the way back to the nearest matrices.
const MOST: usize = 256;

/// Slot, other constants, nearest matrices.
type Layer = (usize, Vec<Option<WeightId>>, Vec<WeightId>);

/// A layer that shares a constant with others by the exporter's doing, and should have its own.
pub(super) struct Shared {
    pub weight: WeightId,
    /// The operand slots through which the constant reaches this layer and no other.
    pub edges: Vec<(NodeId, usize)>,
}

/// A use, and the operand slot by which the constant leaves for it.
struct Found {
    one: Use,
    via: (NodeId, usize),
    /// Only a part of the constant arrives, or copies of it.
    partly: bool,
    /// The role holds only for values that look learned.
    doubtful: bool,
}

/// Gives every weight its role, the uses it follows from, and the reason; returns what should be split.
pub(super) fn assign(
    graph: &Graph,
    attrs: &[Attrs],
    weights: &mut [Weight],
    files: &[SourceFile],
) -> Vec<Shared> {
    let ops = graph.nodes.iter().map(|n| op_type(n.op.as_ref())).collect();
    let r = Roles { graph, attrs, ops, consumers: graph.consumers(), dims: dims(weights) };
    let mut shared = Vec::new();
    for (i, w) in weights.iter_mut().enumerate() {
        let mut found = r.uses(w.value, &w.dims);
        if found.iter().any(|f| f.doubtful) && !learned::looks_learned(w, files) {
            found.iter_mut().filter(|f| f.doubtful).for_each(|f| f.one.role = Role::Constant);
        }
        let strongest = found.iter().min_by_key(|f| strength(f.one.role));
        w.role = strongest.map_or(Role::Constant, |f| f.one.role);
        w.trainable = w.role.is_trainable();
        w.why = match strongest {
            None if graph.outputs.contains(&w.value) => "an output of the model".into(),
            None => "not used".into(),
            Some(f) => r.why(f),
        };
        let mut others = found.iter().filter(|f| f.one.role != w.role);
        if let Some(f) = others.next() {
            w.why += &format!("; also {} in {} other place(s): {}", f.one.role, 1 + others.count(), r.why(f));
        }
        match r.layers(&found) {
            Some(layers) if layers.len() > 1 => {
                let weight = WeightId(i as u32);
                shared.extend(layers.into_iter().skip(1).map(|edges| Shared { weight, edges }));
            }
            Some(_) => {}
            None => {
                w.merged = true;
                w.why += "; shared by several layers";
            }
        }
        w.uses = found.into_iter().map(|f| f.one).collect();
    }
    shared
}

fn dims(weights: &[Weight]) -> Vec<Dims> {
    weights.iter().map(|w| w.dims.clone()).collect()
}

/// The lower the stronger.
fn strength(role: Role) -> usize {
    match role {
        Role::Weight => 0,
        Role::Embedding => 1,
        Role::Bias => 2,
        Role::Scale => 3,
        Role::Shift => 4,
        Role::RunningMean => 5,
        Role::RunningVar => 6,
        Role::Constant => 7,
    }
}

/// Position, counted from the last axis, of the only axis that is longer than one.
fn single_axis(dims: &[usize]) -> Option<usize> {
    let mut long = dims.iter().rev().enumerate().filter(|(_, d)| **d != 1);
    match (long.next(), long.next()) {
        (Some((i, _)), None) => Some(i),
        _ => None,
    }
}

/// The features that a linear layer puts out.
struct Features {
    /// Counted from the last axis.
    axis: usize,
    count: Option<usize>,
}

struct Roles<'a> {
    graph: &'a Graph,
    attrs: &'a [Attrs],
    ops: Vec<String>,
    consumers: Vec<Vec<NodeId>>,
    /// Of each weight.
    dims: Vec<Dims>,
}

impl Roles<'_> {
    fn op(&self, n: NodeId) -> &str {
        self.ops.get(n.index()).map_or("", String::as_str)
    }

    fn input(&self, n: NodeId, slot: usize) -> Option<ValueId> {
        self.graph.node(n).inputs.get(slot).copied().flatten()
    }

    fn producer(&self, v: ValueId) -> Option<NodeId> {
        match self.graph.value(v).source {
            Source::Node(n, 0) => Some(n),
            _ => None,
        }
    }

    fn known_ints(&self, n: NodeId, slot: usize) -> Option<Vec<i64>> {
        match &self.graph.value(self.input(n, slot)?).source {
            Source::Constant(t) => t.to_ints().ok(),
            _ => None,
        }
    }

    /// Every slot in which a constant arrives.
    fn uses(&self, value: ValueId, dims: &Dims) -> Vec<Found> {
        let len = dims.iter().product();
        let mut out = Vec::new();
        let mut seen = HashSet::from([value]);
        let mut todo = vec![(value, Way { dims: Some(dims.clone()), via: None, cut: false, spread: false })];
        while let Some((v, way)) = todo.pop() {
            for &n in self.consumers.get(v.index()).into_iter().flatten() {
                let slots = self.graph.node(n).inputs.iter().enumerate().filter(|(_, i)| **i == Some(v));
                for (slot, _) in slots {
                    let via = way.via.unwrap_or((n, slot));
                    if let Some(next) = self.onward(n, slot, &way) {
                        for v in self.graph.node(n).outputs.iter().flatten() {
                            if seen.insert(*v) {
                                todo.push((*v, Way { via: Some(via), ..next.clone() }));
                            }
                        }
                        continue;
                    }
                    let role = match way.spread {
                        true => Role::Constant,
                        false => self.rule(n, slot, way.dims.as_deref(), len),
                    };
                    let joins = role == Role::Constant && self.joins_data(n, slot, dims, &way);
                    let role = if joins { Role::Embedding } else { role };
                    let partly = way.cut || way.spread;
                    let found = Found { one: Use { node: n, slot, role }, via, partly, doubtful: joins };
                    if !out.iter().any(|f: &Found| f.one == found.one) {
                        out.push(found);
                    }
                }
            }
        }
        out.sort_by_key(|f| (f.one.node, f.one.slot));
        out
    }

    fn why(&self, f: &Found) -> String {
        let u = &f.one;
        let through = if f.via.0 != u.node { ", through operators that only move it" } else { "" };
        format!("operand {} of {}{through}", u.slot, self.graph.describe(u.node))
    }

    /// The role of a constant of `len` elements in operand `slot` of `n`; `dims` where they are known.
    fn rule(&self, n: NodeId, slot: usize, dims: Option<&[usize]>, len: usize) -> Role {
        use Role::*;
        let rank = dims.map(<[usize]>::len);
        if let Some(control) = self.graph.node(n).op.as_a::<Control>() {
            return body::inside(control, slot, dims, len);
        }
        match (self.op(n), slot) {
            ("InstanceNormalization", 1 | 2) if self.normalises_groups(n) => Constant,
            ("Conv" | "ConvTranspose" | "DeformConv", 1) => Weight,
            ("Conv" | "ConvTranspose", 2) | ("DeformConv", 3) => Bias,
            ("BatchNormalization", 1) => Scale,
            ("BatchNormalization", 2) => Shift,
            ("BatchNormalization", 3) => RunningMean,
            ("BatchNormalization", 4) => RunningVar,
            (
                "InstanceNormalization"
                | "LayerNormalization"
                | "GroupNormalization"
                | "RMSNormalization"
                | "SimplifiedLayerNormalization",
                1,
            )
            | ("SkipLayerNormalization" | "SkipSimplifiedLayerNormalization", 2) => Scale,
            ("InstanceNormalization" | "LayerNormalization" | "GroupNormalization", 2)
            | ("SkipLayerNormalization", 3) => Shift,
            ("SkipLayerNormalization", 4) | ("SkipSimplifiedLayerNormalization", 3) => Bias,
            ("BiasGelu" | "FastGelu", 1) | ("CausalConvWithState", 2) => Bias,
            ("CausalConvWithState", 1) => Weight,
            ("Gemm", 0 | 1) => Weight,
            ("Gemm", 2) => Bias,
            // A vector that depends on one axis only, such as rotary frequencies, is no matrix.
            ("MatMul" | "FusedMatMul", _) if rank.is_none_or(|r| r == 2) => Weight,
            ("MatMul" | "FusedMatMul", _)
                if rank.is_some_and(|r| r > 2) && dims.is_some_and(|d| single_axis(d).is_none()) =>
            {
                if len > 1 { Weight } else { Constant }
            }
            ("Einsum", _) if rank.is_none_or(|r| r >= 2) && len > 1 => Weight,
            ("Gather", 0) if rank == Some(2) => Embedding,
            ("PRelu", 1) => Weight,
            ("LSTM" | "GRU" | "RNN", 1 | 2) | ("LSTM", 7) => Weight,
            ("LSTM" | "GRU" | "RNN", 3) => Bias,
            ("Add", _) => self.added(n, 1 - slot.min(1), dims, len),
            ("Mul", _) => self.multiplied(n, 1 - slot.min(1), dims, len),
            // beta − mean·(gamma/√(var + ε)), as TensorFlow writes a normalisation out.
            ("Sub", 0) if len > 1 => match self.input(n, 1).and_then(|v| self.behind(v)) {
                Some(m) if self.op(m) == "Mul" && self.operands(m).any(|v| self.is_gain(v)) => Shift,
                _ => Constant,
            },
            _ => Constant,
        }
    }

    /// A constant that is added to operand `other` of `n`.
    fn added(&self, n: NodeId, other: usize, dims: Option<&[usize]>, len: usize) -> Role {
        let Some(p) = self.input(n, other).and_then(|v| self.behind(v)) else { return Role::Constant };
        if let Some(f) = self.linear(p) {
            // Parts of a matrix and of a bias.
            let parts = dims.is_none() && f.count.is_none() && len > 1;
            return if parts || fits(&f, dims, len) { Role::Bias } else { Role::Constant };
        }
        // A convolution over one axis, done over two, is cropped and squeezed before its bias is added.
        if let Some(f) = self.behind_moved(p).and_then(|q| self.linear(q)) {
            let one_axis = dims.is_none_or(|d| single_axis(d).is_some());
            return if len > 1 && f.count == Some(len) && one_axis { Role::Bias } else { Role::Constant };
        }
        // After the scale of a normalisation.
        let scaled = |m: NodeId| {
            self.op(m) == "Mul"
                && (0..2).any(|slot| {
                    self.input(m, slot).and_then(|v| self.constant(v)).is_some_and(|(w, direct)| {
                        let d = self.dims.get(w.index());
                        let len = d.map_or(0, |d| d.iter().product());
                        let dims = d.filter(|_| direct).map(|d| d.as_slice());
                        self.multiplied(m, 1 - slot, dims, len) == Role::Scale
                    }) || self.input(m, slot).is_some_and(|v| self.is_gain(v))
                })
        };
        if len > 1 && scaled(p) { Role::Shift } else { Role::Constant }
    }

    /// A constant that multiplies operand `other` of `n`.
    fn multiplied(&self, n: NodeId, other: usize, dims: Option<&[usize]>, len: usize) -> Role {
        if len <= 1 {
            return Role::Constant;
        }
        let Some(v) = self.input(n, other) else { return Role::Constant };
        if self.is_normed(v) || self.is_inverse_root(v) {
            return Role::Scale;
        }
        let Some(mut p) = self.behind(v) else { return Role::Constant };
        if self.op(p) == "Add" {
            // A layer's bias lies between.
            let layer = self.operands(p).filter_map(|v| self.behind(v)).find(|&q| self.linear(q).is_some());
            match layer {
                Some(q) if self.operands(p).any(|v| self.constant(v).is_some()) => p = q,
                _ => return Role::Constant,
            }
        }
        match self.linear(p) {
            Some(f) if fits(&f, dims, len) => Role::Scale,
            _ => Role::Constant,
        }
    }

    fn operands(&self, n: NodeId) -> impl Iterator<Item = ValueId> {
        self.graph.node(n).inputs.iter().flatten().copied()
    }

    /// The node that computes `v`, seen through Identity and Cast.
    fn behind(&self, v: ValueId) -> Option<NodeId> {
        let mut n = self.producer(v)?;
        for _ in 0..DEPTH {
            if !matches!(self.op(n), "Identity" | "Cast") {
                return Some(n);
            }
            n = self.producer(self.input(n, 0)?)?;
        }
        None
    }

    /// The node whose elements `n` only moves, or drops.
    fn behind_moved(&self, mut n: NodeId) -> Option<NodeId> {
        for _ in 0..DEPTH {
            if !moves_only(self.op(n)) && self.op(n) != "Slice" {
                return Some(n);
            }
            n = self.producer(self.input(n, 0)?)?;
        }
        None
    }

    /// The constant that `v` is, seen through what only moves it; and whether its shape is its own.
    fn constant(&self, mut v: ValueId) -> Option<(WeightId, bool)> {
        let mut direct = true;
        for _ in 0..DEPTH {
            match self.graph.value(v).source {
                Source::Weight(w) => return Some((w, direct)),
                Source::Node(n, _)
                    if moves_only(self.op(n)) || matches!(self.op(n), "Slice" | "Split" | "SequenceAt") =>
                {
                    direct &= matches!(self.op(n), "Identity" | "Cast" | "FakeQuantize");
                    v = self.input(n, 0)?;
                }
                _ => return None,
            }
        }
        None
    }

    /// What `n` puts out, if it is a convolution or a product with a constant matrix.
    fn linear(&self, n: NodeId) -> Option<Features> {
        let matrix = |slot| self.input(n, slot).and_then(|v| self.constant(v));
        let dims = |(w, direct): (WeightId, bool)| self.dims.get(w.index()).filter(|_| direct);
        match self.op(n) {
            "Conv" => {
                let d = dims(matrix(1)?);
                Some(Features {
                    axis: self.dims.get(matrix(1)?.0.index())?.len().checked_sub(2)?,
                    count: d.and_then(|d| d.first()).copied(),
                })
            }
            "ConvTranspose" => {
                let d = dims(matrix(1)?);
                let group = self.attrs.get(n.index())?.int_or("group", 1).ok()?;
                let count = d.and_then(|d| d.get(1)?.checked_mul(usize::try_from(group).ok()?));
                Some(Features { axis: self.dims.get(matrix(1)?.0.index())?.len().checked_sub(2)?, count })
            }
            "MatMul" => match (matrix(1), matrix(0)) {
                (Some(w), _) => Some(Features { axis: 0, count: dims(w).and_then(|d| d.last()).copied() }),
                (None, Some(w)) => {
                    let count = dims(w).and_then(|d| d.get(d.len().checked_sub(2)?)).copied();
                    Some(Features { axis: 1, count })
                }
                _ => None,
            },
            "Gemm" => {
                let d = dims(matrix(1)?);
                let transposed = self.attrs.get(n.index())?.flag("transB").ok()?;
                Some(Features { axis: 0, count: d.and_then(|d| d.get(usize::from(!transposed))).copied() })
            }
            _ => None,
        }
    }

    /// 1/√…, however it is written.
    fn is_inverse_root(&self, v: ValueId) -> bool {
        let Some(n) = self.behind(v) else { return false };
        match self.op(n) {
            "Reciprocal" => self.input(n, 0).is_some_and(|v| self.is_root(v, DEPTH)),
            "Div" => {
                self.input(n, 0).is_some_and(|v| self.constant(v).is_some())
                    && self.input(n, 1).is_some_and(|v| self.is_root(v, DEPTH))
            }
            "Pow" => self.exponent(n).is_some_and(|e| e < 0.0),
            "SimplifiedRsqrt" | "Rsqrt" => true,
            _ => false,
        }
    }

    fn exponent(&self, n: NodeId) -> Option<f64> {
        let v = self.graph.value(self.input(n, 1)?);
        v.meta.as_ref()?.value.as_ref()?.to_f64().first().copied()
    }

    /// √…, perhaps with an ε added or bounded from below afterwards.
    fn is_root(&self, v: ValueId, depth: usize) -> bool {
        let Some(n) = self.behind(v) else { return false };
        match self.op(n) {
            "Sqrt" | "ReduceL2" => true,
            "Add" | "Max" | "Clip" | "Expand" | "Unsqueeze" | "Reshape" if depth > 0 => {
                self.operands(n).any(|v| self.is_root(v, depth - 1))
            }
            _ => false,
        }
    }

    /// Whether `v` has been divided by its deviation.
    fn is_normed(&self, v: ValueId) -> bool {
        let Some(n) = self.behind(v) else { return false };
        match self.op(n) {
            "Div" => {
                self.input(n, 1).is_some_and(|v| self.is_root(v, DEPTH))
                    && self.input(n, 0).is_some_and(|v| self.constant(v).is_none())
            }
            "Mul" => self.operands(n).any(|v| self.is_inverse_root(v)),
            // The scale of a GroupNormalization.
            "Reshape" => self.behind_moved(n).is_some_and(|n| self.op(n) == "InstanceNormalization"),
            // Normalisations whose own scale is all ones or absent.
            "BatchNormalization"
            | "InstanceNormalization"
            | "LayerNormalization"
            | "MeanVarianceNormalization"
            | "LpNormalization" => true,
            _ => false,
        }
    }

    /// Is `n`, an InstanceNormalization, the inner part of a GroupNormalization: over groups for channels, with the scale of the
    /// channels behind a Reshape?
    fn normalises_groups(&self, n: NodeId) -> bool {
        let only = |n: NodeId| {
            let y = self.graph.node(n).output()?;
            match self.consumers.get(y.index())?.as_slice() {
                [reader] => Some(*reader),
                _ => None,
            }
        };
        let scaled =
            only(n).filter(|&r| self.op(r) == "Reshape").and_then(only).filter(|&m| self.op(m) == "Mul");
        scaled.is_some_and(|m| self.operands(m).any(|v| self.constant(v).is_some()))
    }

    /// gamma/√(var + ε), or the inverse root alone.
    fn is_gain(&self, v: ValueId) -> bool {
        self.is_inverse_root(v)
            || self
                .behind(v)
                .is_some_and(|n| self.op(n) == "Mul" && self.operands(n).any(|v| self.is_inverse_root(v)))
    }

    /// The layers that use a constant as a per-channel parameter, told apart by their other constants:
    /// for each, the slots by which the constant leaves for it alone. `None` where they cannot be had.
    ///
    /// Two layers with different weights and one bias are the work of an exporter that merged equal
    /// tensors. Layers that have all their constants in common are one layer used twice.
    fn layers(&self, found: &[Found]) -> Option<Vec<Vec<(NodeId, usize)>>> {
        let per_channel = |r: Role| {
            matches!(r, Role::Bias | Role::Scale | Role::Shift | Role::RunningMean | Role::RunningVar)
        };
        if found.len() < 2 {
            return Some(Vec::new());
        }
        let mut layers: Vec<(Layer, Vec<(NodeId, usize)>)> = Vec::new();
        for f in found.iter().filter(|f| per_channel(f.one.role) && !f.partly) {
            let key = self.layer(&f.one);
            match layers.iter_mut().find(|(k, _)| *k == key) {
                Some((_, edges)) if edges.contains(&f.via) => {}
                Some((_, edges)) => edges.push(f.via),
                None => layers.push((key, vec![f.via])),
            }
        }
        let mut seen = HashSet::new();
        if layers.len() > 1 {
            let elsewhere = found.iter().filter(|f| !per_channel(f.one.role) || f.partly).map(|f| f.via);
            seen.extend(elsewhere);
            if !layers.iter().flat_map(|(_, edges)| edges).all(|e| seen.insert(*e)) {
                return None;
            }
        }
        Some(layers.into_iter().map(|(_, edges)| edges).collect())
    }

    /// What a layer is recognised by: the slot, its other constants and, since all of those may have been
    /// merged too in a network that was never trained, the matrices nearest before it.
    fn layer(&self, u: &Use) -> Layer {
        let vectors = matches!(self.op(u.node), "Add" | "Mul");
        let inputs = self.graph.node(u.node).inputs.iter().enumerate().filter(|(i, _)| *i != u.slot);
        let others = inputs.map(|(_, v)| v.and_then(|v| self.constant(v)).map(|(w, _)| w)).collect();
        // Of an addition it does not matter which operand the vector is.
        (if vectors { 0 } else { u.slot }, others, self.matrices(u.node))
    }

    /// The constant matrices of `n`, or of the nearest nodes before it that have any.
    fn matrices(&self, n: NodeId) -> Vec<WeightId> {
        let mut seen = HashSet::from([n]);
        let mut level = vec![n];
        for _ in 0..DEPTH {
            let mut found: Vec<WeightId> = level
                .iter()
                .flat_map(|&n| {
                    self.graph.node(n).inputs.iter().enumerate().map(move |(slot, v)| (n, slot, v))
                })
                .filter(|&(n, slot, _)| {
                    matches!(
                        (self.op(n), slot),
                        ("Conv" | "ConvTranspose" | "Gemm" | "LSTM" | "GRU" | "RNN", 1)
                            | ("Gemm" | "Gather", 0)
                            | ("MatMul" | "Einsum", _)
                    )
                })
                .filter_map(|(_, _, v)| self.constant((*v)?).map(|(w, _)| w))
                .collect();
            if !found.is_empty() {
                found.sort();
                found.dedup();
                return found;
            }
            let before = level.iter().flat_map(|&n| self.operands(n)).filter_map(|v| {
                match self.graph.value(v).source {
                    Source::Node(n, _) => Some(n),
                    _ => None,
                }
            });
            level = before.filter(|&n| seen.insert(n)).collect();
            if level.is_empty() || seen.len() > MOST {
                break;
            }
        }
        Vec::new()
    }
}

/// Whether a constant is a vector over the features of a layer.
fn fits(f: &Features, dims: Option<&[usize]>, len: usize) -> bool {
    if f.count.is_some_and(|c| c != len) {
        return false;
    }
    match dims {
        Some(d) if len > 1 => single_axis(d) == Some(f.axis),
        // One feature: only a layer known to have one.
        _ => f.count == Some(len) && len > 0,
    }
}
