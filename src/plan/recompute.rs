//! What is kept for later and what is computed again, so that a plan fits into a smaller arena.
//!
//! A value that is read early and again much later may be dropped in between: the nodes that computed it then run once
//! more, just before the later reader, with the same results to the last bit. What to drop is chosen by a search over
//! real lifetimes: at the moment when the most memory is in use, of all that only waits there, what frees most for the
//! least additional work; until everything fits, or nothing helps any more. What is computed again may be dropped
//! again, so that long chains are recomputed from ever fewer values. Where several values are computed of the same, which
//! nobody else waits for, they may be dropped together and that be kept.
//!
//! Recomputing forward passes from chosen values is of Chen et al., *Training Deep Nets with Sublinear Memory Cost*,
//! 2016; the measure by which candidates are sorted, size and time to the next reader against the cost, of Kirisame et
//! al., *Dynamic Tensor Rematerialization*, 2021, here of a schedule that is known in advance.

mod candidates;
mod schedule;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashSet};

use super::repeats::Wiring;
use crate::error::{Error, Result};
use crate::graph::{Graph, Node, NodeId, Source, ValueId};
use crate::ops::batch_norm::BatchNormalization;
use crate::plan::arena::assign;
use crate::plan::order::{check_updates, order};
use crate::plan::{Home, Kind, Plan, Planner, Request, aligned, time};
use crate::tensor::Meta;
use candidates::Candidate;
use schedule::Built;

/// Multiply-adds that take about as long as it takes to read or write one byte.
const WORK_OF_BYTE: f64 = 4.0;
/// Candidates of which the effect is computed rather than guessed.
const TRIED: usize = 6;
/// A plan never takes more than this much longer, as a share of the work.
const MOST: f64 = 3.0;
/// What the search for the smallest arena aims at next, of what it has reached.
const NEXT: f64 = 0.92;
/// Attempts to make up for gaps in the arena, of which each gives up at least this share of the limit.
const ATTEMPTS: usize = 8;
const STEP: usize = 200;
/// Arenas with gaps that pruning lays out in vain before it stops: each takes many rounds.
const IN_VAIN: usize = 24;

/// What a plan computes more than once.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize)]
pub struct Again {
    /// Kernel calls that do again what another did.
    pub kernels: usize,
    /// Their work as a share of that of all others: of multiply-adds, and of bytes that are read and written.
    pub work: f64,
    /// Chains of kernel calls that run for pieces of the batch, one after the other, so that the largest values are never
    /// whole: sums over the batch, as gradients of weights, are rounded in another order.
    pub chains: usize,
}

/// What a plan computes again rather than keeps, and the arena that it so needs.
pub struct Dropped {
    /// `None`: nothing that can be planned.
    schedule: Option<Built>,
    work: f64,
    pub arena: usize,
}

/// What [`plan_dropping`] may drop so that its arena takes at most `limit` bytes, or, if that cannot be, the least that was found
/// (so with a limit of 0).
///
/// What follows from frozen weights alone is computed anew wherever it is read.
///
/// `scratch`: bytes for each node, see [`super::scratch`].
pub fn drop_within(graph: &Graph, request: &Request, limit: usize, scratch: &[usize]) -> Result<Dropped> {
    let search = Search::new(graph, request, scratch)?;
    let Least { cuts, arena } = search.run(limit)?;
    Ok(Dropped { schedule: search.build(&cuts), work: search.work, arena })
}

/// As [`super::plan`], where some values are computed again: what was found for the same arguments.
pub fn plan_dropping(
    graph: &mut Graph,
    request: &Request,
    limit: usize,
    scratch: &[usize],
    dropped: Dropped,
) -> Result<Plan> {
    let Dropped { schedule, work, .. } = dropped;
    let Built { repeats, order, copies, extra, .. } =
        schedule.ok_or_else(|| Error::Config("a plan within the memory asked for cannot be made".into()))?;
    let again = Again { kernels: copies, work: extra / work.max(1.0), chains: 0 };
    repeats.write(graph);
    check_updates(graph, &order)?;
    let planner = Planner::new(Wiring::of(graph), request, &order, scratch)?;
    Ok(Plan { again, ..planner.finish(Some(limit))? })
}

/// Lets normalisations by the batch's statistics keep these (C), so that only the normalising need be done again.
pub fn keep_statistics(graph: &mut Graph, request: &Request) -> Result<()> {
    for id in order(graph, request)? {
        let node = graph.node(id);
        let Some(norm) = node.op.as_a::<BatchNormalization>() else { continue };
        if norm.training() && node.output().is_some() {
            for output in [3, 4] {
                let made = graph.output_of(id, output);
                made.map_err(|source| Error::Op { node: graph.describe(id), source })?;
            }
        }
    }
    Ok(())
}

/// Which values follow from frozen weights and constants alone.
fn fixed(graph: &Graph, request: &Request, order: &[NodeId]) -> Vec<bool> {
    let mut fixed = vec![false; graph.values.len()];
    let wanted: HashSet<ValueId> =
        request.outputs.iter().chain(&request.effects).chain(request.pins.keys()).copied().collect();
    loop {
        let mut changed = false;
        for id in order {
            let node = graph.node(*id);
            let given = |v: &ValueId| {
                fixed[v.index()] || matches!(graph.value(*v).source, Source::Constant(_) | Source::Weight(_))
            };
            let mut made = node.outputs.iter().flatten().peekable();
            let new = made.peek().is_some_and(|v| !fixed[v.index()])
                && made.all(|v| !wanted.contains(v) && matches!(graph.value(*v).source, Source::Node(..)));
            if new
                && node.op.is_pure()
                && node.op.updates().is_empty()
                && node.inputs.iter().flatten().all(given)
            {
                node.outputs.iter().flatten().for_each(|v| fixed[v.index()] = true);
                changed = true;
            }
        }
        // Once, but for nodes that stand behind their readers.
        if !changed {
            return fixed;
        }
    }
}

/// Multiply-adds of a node, and bytes that it reads and writes.
pub fn work(graph: &Graph, node: &Node) -> (f64, f64) {
    if node.op.is_view() {
        return (0.0, 0.0);
    }
    let meta = |v: &ValueId| graph.value(*v).meta.as_ref();
    let metas: Vec<Option<&Meta>> = node.inputs.iter().map(|v| v.as_ref().and_then(meta)).collect();
    let bytes: usize =
        node.inputs.iter().chain(&node.outputs).flatten().filter_map(meta).map(Meta::bytes).sum();
    (node.op.multiply_adds(&metas) as f64, bytes as f64)
}

fn cost(graph: &Graph, node: &Node) -> f64 {
    let (work, bytes) = work(graph, node);
    work + WORK_OF_BYTE * bytes
}

/// Of all that runs: multiply-adds, and bytes in multiply-adds that take as long.
pub fn all_work(graph: &Graph, request: &Request) -> Result<f64> {
    Ok(order(graph, request)?.iter().map(|id| cost(graph, graph.node(*id))).sum())
}

/// A value is dropped after an event, the running of one node of the original order and of what is computed again for
/// it.
type Cut = (ValueId, u32);
type Cuts = BTreeSet<Cut>;

struct Search<'a> {
    graph: &'a Graph,
    request: &'a Request,
    /// Without nodes whose values are `fixed`.
    order: Vec<NodeId>,
    /// Per node.
    cost: Vec<f64>,
    /// Per value: it follows from frozen weights alone.
    fixed: Vec<bool>,
    /// Of the whole order.
    work: f64,
    scratch: &'a [usize],
}

/// The arena over time.
struct Profile {
    live: Vec<usize>,
    blocks: Vec<super::Block>,
    homes: Vec<Option<Home>>,
}

impl Profile {
    fn peak(&self) -> (usize, usize) {
        let at = (0..self.live.len()).max_by_key(|&t| (self.live[t], std::cmp::Reverse(t)));
        at.map_or((0, 0), |t| (t, self.live[t]))
    }

    /// How much does not fit, summed over time.
    fn excess(&self, target: usize) -> f64 {
        self.live.iter().map(|l| l.saturating_sub(target) as f64).sum()
    }

    /// The arena's size, within a limit.
    fn arena(&self, limit: usize) -> usize {
        assign(&mut self.blocks.clone(), Some(limit))
    }
}

/// What to drop for the smallest arena that was found.
struct Least {
    cuts: Cuts,
    arena: usize,
}

impl Least {
    /// Less memory than was found so far.
    fn keep(&mut self, arena: usize, cuts: &Cuts) {
        if arena < self.arena {
            *self = Least { arena, cuts: cuts.clone() };
        }
    }
}

impl<'a> Search<'a> {
    fn new(graph: &'a Graph, request: &'a Request, scratch: &'a [usize]) -> Result<Self> {
        let order = order(graph, request)?;
        let fixed = fixed(graph, request, &order);
        let made = |id: &NodeId| {
            let mut made = graph.node(*id).outputs.iter().flatten();
            made.next().is_some_and(|v| fixed[v.index()])
        };
        let cost: Vec<f64> = graph.nodes.iter().map(|n| cost(graph, n)).collect();
        let work = order.iter().map(|id| cost[id.index()]).sum();
        let order: Vec<NodeId> = order.into_iter().filter(|id| !made(id)).collect();
        Ok(Search { graph, request, order, cost, fixed, work, scratch })
    }

    /// What to drop so that the plan fits `limit`, or so that it is as small as was found.
    fn run(&self, limit: usize) -> Result<Least> {
        let mut cuts = Cuts::new();
        let mut best = Least { arena: usize::MAX, cuts: cuts.clone() };
        let Some(mut built) = self.build(&cuts) else { return Ok(best) };
        let mut profile = self.profile(&built)?;
        best.arena = profile.arena(limit);
        let least = self.one_kernel(&built, &profile);
        if self.request.no_reuse || limit > 0 && least > limit {
            return Ok(best);
        }
        let mut target = limit.max(least);
        if limit == 0 {
            // Straight there, then step by step.
            self.improve(&mut cuts, &mut built, &mut profile, target)?;
            best.keep(profile.arena(limit), &cuts);
        }
        let mut attempts = 0;
        while best.arena > limit {
            let peak = profile.peak().1;
            if limit == 0 {
                target = (peak as f64 * NEXT) as usize;
            } else if peak <= target {
                let arena = profile.arena(limit);
                best.keep(arena, &cuts);
                if arena <= limit || attempts == ATTEMPTS {
                    break;
                }
                attempts += 1;
                // Gaps that the layout cannot fill: a little less than fits, and not much less, as that may cost far more.
                target = target.saturating_sub(((arena - limit) / 2).max(limit / STEP));
            }
            let improved = self.improve(&mut cuts, &mut built, &mut profile, target)?;
            if limit == 0 || !improved {
                best.keep(profile.arena(limit), &cuts);
            }
            if !improved {
                break;
            }
        }
        if best.arena <= limit {
            self.prune(&mut best.cuts, limit)?;
        }
        Ok(best)
    }

    /// What the kernel call that takes the most takes: no plan needs less.
    fn one_kernel(&self, built: &Built, profile: &Profile) -> usize {
        let mut scratch = vec![0; built.order.len() + 1];
        for b in profile.blocks.iter().filter(|b| b.kind == Kind::Scratch) {
            scratch[b.born] += aligned(b.bytes);
        }
        let graph = built.wiring(self.graph);
        let taken = built.order.iter().enumerate().map(|(position, id)| {
            let node = graph.node(*id);
            let mut blocks: Vec<usize> = Vec::new();
            // A result that may come to lie where an operand does takes nothing of its own.
            let apart = |o: &usize| node.op.in_place().iter().all(|p| p.1 != *o);
            let results = node.outputs.iter().enumerate().filter(|(o, _)| apart(o)).map(|(_, v)| v);
            for v in node.inputs.iter().chain(results).flatten() {
                if let Some(Home::Block(b)) = profile.homes[v.index()] {
                    blocks.push(b);
                }
            }
            blocks.sort();
            blocks.dedup();
            let operands: usize = blocks.into_iter().map(|b| aligned(profile.blocks[b].bytes)).sum();
            operands + scratch[time(position)]
        });
        taken.max().unwrap_or(0)
    }

    /// Drops values until everything fits the target; `false`: nothing more helps.
    fn improve(
        &self,
        cuts: &mut Cuts,
        built: &mut Built,
        profile: &mut Profile,
        target: usize,
    ) -> Result<bool> {
        while profile.peak().1 > target {
            let excess = profile.excess(target);
            let mut candidates = self.candidates(built, profile, cuts);
            candidates.sort_by(|a, b| b.score.total_cmp(&a.score));
            let best = self.best(&candidates, cuts, built, excess, target)?;
            let Some((c, b, p)) = best else { return Ok(false) };
            (*cuts, *built, *profile) = (c, b, p);
        }
        Ok(true)
    }

    /// The candidate that frees most of what does not fit, for the least additional work, and what follows of it. Where one
    /// frees nothing, what is computed on the way to it is dropped with it: it would wait for its own later readers.
    fn best(
        &self,
        candidates: &[Candidate],
        cuts: &Cuts,
        built: &Built,
        excess: f64,
        target: usize,
    ) -> Result<Option<(Cuts, Built, Profile)>> {
        let mut best: Option<(f64, Cuts, Built, Profile)> = None;
        for (i, c) in candidates.iter().enumerate() {
            if i >= TRIED && best.is_some() {
                break;
            }
            let mut more = cuts.clone();
            more.extend(&c.cuts);
            let Some(mut next) = self.build(&more) else { continue };
            let mut after = self.profile(&next)?;
            if after.excess(target) >= excess {
                more.extend(self.on_the_way(&next, c));
                let Some(lean) = self.build(&more) else { continue };
                next = lean;
                after = self.profile(&next)?;
            }
            let gain = excess - after.excess(target);
            if gain <= 0.0 || next.extra > MOST * self.work {
                continue;
            }
            let ratio = gain / (next.extra - built.extra).max(1.0);
            if best.as_ref().is_none_or(|b| ratio > b.0) {
                best = Some((ratio, more, next, after));
            }
        }
        Ok(best.map(|b| (b.1, b.2, b.3)))
    }

    /// Takes back, the most costly first, what the plan fits without.
    fn prune(&self, cuts: &mut Cuts, limit: usize) -> Result<()> {
        let cost = |c: &Cut| match self.graph.value(c.0).source {
            Source::Node(n, _) => self.cost[n.index()],
            _ => 0.0,
        };
        let mut all: Vec<Cut> = cuts.iter().copied().collect();
        all.sort_by(|a, b| cost(b).total_cmp(&cost(a)).then(a.cmp(b)));
        let Some(mut extra) = self.build(cuts).map(|b| b.extra) else { return Ok(()) };
        let mut in_vain = 0;
        for c in all {
            if in_vain == IN_VAIN {
                break;
            }
            cuts.remove(&c);
            if let Some(b) = self.build(cuts).filter(|b| b.extra < extra) {
                let profile = self.profile(&b)?;
                if profile.peak().1 <= limit {
                    if profile.arena(limit) <= limit {
                        extra = b.extra;
                        continue;
                    }
                    in_vain += 1;
                }
            }
            cuts.insert(c);
        }
        Ok(())
    }

    fn profile(&self, built: &Built) -> Result<Profile> {
        let graph = built.wiring(self.graph);
        let mut planner = Planner::new(graph, self.request, &built.order, self.scratch)?;
        planner.close();
        let end = time(built.order.len());
        let mut change = vec![0isize; end + 2];
        for b in &planner.blocks {
            let bytes = aligned(b.bytes) as isize;
            change[b.born.min(end)] += bytes;
            change[b.dies.min(end) + 1] -= bytes;
        }
        let mut now = 0;
        let live = change[..=end].iter().map(|c| {
            now += c;
            now as usize
        });
        Ok(Profile { live: live.collect(), blocks: planner.blocks, homes: planner.homes })
    }
}
