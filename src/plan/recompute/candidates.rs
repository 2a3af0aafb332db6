//! What may be dropped at the fullest moment, and what it is computed again of.

use std::collections::{HashMap, HashSet};

use super::schedule::Built;
use super::{Cut, Cuts, Profile, Search};
use crate::graph::{Node, Source, ValueId};
use crate::plan::{Home, aligned};
use crate::tensor::Meta;

/// Values below this many bytes are never dropped.
const LEAST: usize = 1 << 12;

/// Blocks that may be dropped over the moment of the peak.
pub(super) struct Candidate {
    /// What they hold, of the original values.
    values: Vec<ValueId>,
    pub(super) cuts: Vec<Cut>,
    /// Bytes times how long they wait, less those that are kept for it, against the cost.
    pub(super) score: f64,
}

/// What it takes to drop some values.
struct Dropping {
    cuts: Vec<Cut>,
    cost: f64,
    /// Values that are then kept for it, sorted.
    kept: Vec<ValueId>,
}

/// A block that is computed of what nobody else waits for, were that kept.
struct Apart {
    values: Vec<ValueId>,
    dropping: Dropping,
    bytes: usize,
    waits: f64,
}

/// Can output `o` of the node be computed once more, without an effect on states?
fn repeatable(node: &Node, o: usize) -> bool {
    match node.op.again(node) {
        Some(_) => o == 0,
        None => node.op.updates().is_empty(),
    }
}

impl Search<'_> {
    /// What waits at the fullest moment and could be computed again.
    pub(super) fn candidates(&self, built: &Built, profile: &Profile, cuts: &Cuts) -> Vec<Candidate> {
        let (peak, _) = profile.peak();
        let Some(here) = peak.checked_sub(1).filter(|p| *p < built.order.len()) else { return Vec::new() };
        let event = built.events[here];
        let graph = built.wiring(self.graph);
        let home = |v: &ValueId| match profile.homes[v.index()] {
            Some(Home::Block(b)) => Some(b),
            _ => None,
        };
        let node = graph.node(built.order[here]);
        let busy: HashSet<usize> =
            node.inputs.iter().chain(&node.outputs).flatten().filter_map(home).collect();
        let mut made_at = vec![usize::MAX; graph.values()];
        let mut next = vec![usize::MAX; graph.values()];
        for (position, id) in built.order.iter().enumerate().rev() {
            let node = graph.node(*id);
            node.outputs.iter().flatten().for_each(|v| made_at[v.index()] = position);
            if position > here {
                node.inputs.iter().flatten().for_each(|v| next[v.index()] = position);
            }
        }
        let mut waiting: HashMap<usize, Vec<ValueId>> = HashMap::new();
        let mut barred = busy;
        for v in &self.request.outputs {
            barred.extend(home(v));
        }
        for i in 0..graph.values() {
            let v = ValueId(i as u32);
            let Some(b) = home(&v) else { continue };
            if !matches!(graph.source(v), Source::Node(..)) {
                barred.insert(b);
            } else if made_at[i] <= here && next[i] != usize::MAX {
                waiting.entry(b).or_default().push(v);
            }
        }
        // What is there anyway when it is wanted again.
        let at_hand: HashSet<ValueId> = waiting.values().flatten().map(|v| graph.origin(*v)).collect();
        let (mut found, mut apart) = (Vec::new(), Vec::new());
        for (b, values) in &waiting {
            let block = &profile.blocks[*b];
            if barred.contains(b) || block.bytes < LEAST || block.dies < peak {
                continue;
            }
            let soonest = values.iter().map(|v| next[v.index()]).min().unwrap_or(here);
            let seen = values.iter().map(|v| made_at[v.index()]).max().unwrap_or(here);
            let waits = (soonest - seen.min(here)) as f64;
            let values: Vec<ValueId> = values.iter().map(|v| graph.origin(*v)).collect();
            let of = |keeping| self.dropping(values.clone(), &at_hand, built, event, keeping);
            if let Some(Dropping { cuts, cost, .. }) = of(false) {
                let score = block.bytes as f64 * waits / cost.max(1.0);
                found.push(Candidate { values: values.clone(), cuts, score });
            }
            if let Some(dropping) = of(true).filter(|d| !d.kept.is_empty()) {
                apart.push(Apart { values, dropping, bytes: block.bytes, waits });
            }
        }
        found.extend(self.computed_of_the_same(apart));
        found.retain(|c| !c.cuts.iter().all(|c| cuts.contains(c)));
        // In an order that does not depend on the map's.
        found.sort_by(|a, b| a.cuts.cmp(&b.cuts));
        found
    }

    /// The cuts that drop original values at an event, and with them what they are computed of and nobody else waits for: it
    /// is computed again too rather than kept for their sake, unless they are dropped `keeping` that. `None`: it cannot be.
    fn dropping(
        &self,
        mut values: Vec<ValueId>,
        at_hand: &HashSet<ValueId>,
        built: &Built,
        event: u32,
        keeping: bool,
    ) -> Option<Dropping> {
        let mut found = Dropping { cuts: Vec::new(), cost: 0.0, kept: Vec::new() };
        let (mut done, wanted) = (HashSet::new(), values.clone());
        while let Some(v) = values.pop() {
            if !done.insert(v) {
                continue;
            }
            let is_wanted = wanted.contains(&v);
            let last = built.last_touch(v, event);
            let source = match self.graph.value(v).source {
                Source::Node(n, o) if repeatable(self.graph.node(n), o) => Some(n),
                _ => None,
            };
            let view = source.is_some_and(|n| self.graph.node(n).op.is_view());
            let (Some(last), Some(n), true) = (last, source, is_wanted || view || !keeping) else {
                // What it is computed of has to wait then.
                if is_wanted {
                    return None;
                }
                found.kept.push(v);
                continue;
            };
            found.cuts.push((v, last));
            let node = self.graph.node(n);
            found.cost += if view { 0.0 } else { self.cost[n.index()] };
            let inputs = node.op.again(node).map_or_else(|| node.inputs.clone(), |again| again.1);
            values.extend(inputs.into_iter().flatten().filter(|u| {
                let computed = matches!(self.graph.value(*u).source, Source::Node(..));
                self.is_large(*u) && computed && !self.fixed[u.index()] && !at_hand.contains(u)
            }));
        }
        found.cuts.sort();
        found.kept.sort();
        Some(found)
    }

    /// Blocks that are dropped together, and what all of them are computed of is kept instead: inputs that one of them alone
    /// would not be worth keeping for. (So the growing concatenations of a DenseNet, for the layers' results.)
    fn computed_of_the_same(&self, mut apart: Vec<Apart>) -> Vec<Candidate> {
        apart.sort_by(|a, b| {
            let by_kept = a.dropping.kept.cmp(&b.dropping.kept);
            by_kept.then_with(|| a.dropping.cuts.cmp(&b.dropping.cuts))
        });
        let mut found = Vec::new();
        for (i, first) in apart.iter().enumerate() {
            let kept = &first.dropping.kept;
            if i > 0 && apart[i - 1].dropping.kept == *kept {
                continue;
            }
            let within = |a: &&Apart| a.dropping.kept.iter().all(|v| kept.binary_search(v).is_ok());
            let (mut values, mut cuts) = (Vec::new(), Vec::new());
            let (mut area, mut cost, mut longest) = (0.0, 0.0, 0.0f64);
            for a in apart.iter().filter(within) {
                values.extend(&a.values);
                cuts.extend(&a.dropping.cuts);
                area += a.bytes as f64 * a.waits;
                cost += a.dropping.cost;
                longest = longest.max(a.waits);
            }
            let instead: usize = kept.iter().map(|v| self.meta(*v).map_or(0, |m| aligned(m.bytes()))).sum();
            let score = (area - instead as f64 * longest) / cost.max(1.0);
            if score > 0.0 {
                cuts.sort();
                cuts.dedup();
                found.push(Candidate { values, cuts, score });
            }
        }
        found
    }

    fn meta(&self, v: ValueId) -> Option<&Meta> {
        self.graph.value(v).meta.as_ref()
    }

    fn is_large(&self, v: ValueId) -> bool {
        self.meta(v).is_some_and(|m| m.bytes() >= LEAST)
    }

    /// The cuts that drop, once a dropped value is there again, what was only computed again to compute that.
    pub(super) fn on_the_way(&self, built: &Built, dropped: &Candidate) -> Vec<Cut> {
        let of_it = dropped.cuts.iter().filter(|c| dropped.values.contains(&c.0));
        let again: HashSet<u32> = of_it.filter_map(|(v, last)| built.next_touch(*v, *last)).collect();
        let graph = built.wiring(self.graph);
        let mut cuts = Vec::new();
        for (id, event) in built.order.iter().zip(&built.events) {
            if id.index() < self.graph.nodes.len() || !again.contains(event) {
                continue;
            }
            let reader = self.graph.node(self.order[*event as usize]);
            for v in graph.node(*id).outputs.iter().flatten() {
                let origin = graph.origin(*v);
                let wanted = reader.inputs.contains(&Some(origin)) || dropped.values.contains(&origin);
                if self.is_large(origin) && !wanted {
                    cuts.push((origin, *event));
                }
            }
        }
        cuts
    }
}
