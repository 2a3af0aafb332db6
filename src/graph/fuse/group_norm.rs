//! Normalisation of groups of channels, as exporters before opset 18 spell it: an `InstanceNormalization` of groups for channels,
//! between two changes of shape, and then the scale and the shift of the channels.

use super::{Chains, Tail, same_shape};
use crate::graph::{Graph, NodeId, Source, ValueId};
use crate::ops::norm::{GroupNorm, per_channel};

/// Is every element known to be this?
fn all(graph: &Graph, v: ValueId, x: f64) -> bool {
    let Source::Constant(t) = &graph.value(v).source else { return false };
    t.to_f64().iter().all(|y| *y == x)
}

impl Chains {
    /// Replaces the normalisation around one of instances, if there is one.
    pub(super) fn fuse_group_norm(&mut self, graph: &mut Graph, instance: NodeId) -> Option<()> {
        let node = graph.node(instance);
        let op = node.op.as_a::<GroupNorm>().filter(|n| n.is_of_channels())?;
        let (epsilon, &[Some(inside), Some(scale), Some(shift)]) = (op.epsilon, &node.inputs[..]) else {
            return None;
        };
        let mut tail = Tail::of(instance, node.output()?);
        if node.outputs.len() != 1 || !all(graph, scale, 1.0) || !all(graph, shift, 0.0) {
            return None;
        }
        let before = self.take(graph, &mut tail, inside, 1)?;
        let (x, _) = graph.node(before).view()?;
        let after = self.next(graph, tail.out).filter(|id| graph.node(*id).view().is_some())?;
        self.extend(graph, &mut tail, after).then_some(())?;
        let (meta, groups) =
            (graph.value(x).meta.clone()?, graph.value(inside).meta.as_ref()?.dims[..2].to_vec());
        let &[n, c, ..] = &meta.dims[..] else { return None };
        if n != groups[0] || groups[1] == 0 || !c.is_multiple_of(groups[1]) || !same_shape(graph, x, tail.out)
        {
            return None;
        }
        let of_channels = |d: &[usize]| per_channel(d, c, meta.rank());
        let found = self.scale_and_shift(graph, &mut tail, true, of_channels);
        let (scale, shift) = found.unwrap_or_else(|| (self.ones(graph, meta.dtype, &[c]), None));
        let inputs = [x, scale].into_iter().chain(shift).map(Some).collect();
        self.replace_by(graph, tail, GroupNorm::of(groups[1], epsilon), inputs);
        Some(())
    }
}
