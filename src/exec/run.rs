//! The step loop: runs a plan's kernel calls in order on one arena.

use std::time::{Duration, Instant};

use smallvec::SmallVec;

use crate::error::{Error, OpError, Result};
use crate::exec::carve::carve;
use crate::exec::session::Frozen;
use crate::exec::store::Store;
use crate::graph::{Graph, StateId};
use crate::ops::{Cx, need, out};
use crate::plan::{Place, Plan, Step};
use crate::tensor::{Buffer, View, ViewMut};

/// Times of each kernel call of a plan, in call order, one a run.
#[derive(Debug, Default, Clone)]
pub struct Profile {
    steps: Vec<Vec<Duration>>,
}

impl Profile {
    /// The median over the runs of each call's time: now and then a machine stops for longer than many of them take.
    pub fn medians(&self) -> impl Iterator<Item = Duration> {
        self.steps.iter().map(|times| {
            let mut times = times.clone();
            times.sort();
            times.get(times.len() / 2).copied().unwrap_or_default()
        })
    }
}

/// What lies outside of the arena: a session's states, or what a chain of pieces is given.
pub(super) trait States {
    /// A state's memory while it is written.
    type Taken: AsMut<[u8]>;

    fn read(&self, id: StateId) -> &[u8];

    /// Takes a state's memory out, to be written while others are read.
    fn take(&mut self, id: StateId) -> Self::Taken;

    fn put(&mut self, id: StateId, taken: Self::Taken);
}

impl States for Store {
    type Taken = Buffer;

    fn read(&self, id: StateId) -> &[u8] {
        self.view(id).bytes
    }

    fn take(&mut self, id: StateId) -> Buffer {
        Store::take(self, id)
    }

    fn put(&mut self, id: StateId, taken: Buffer) {
        Store::put(self, id, taken);
    }
}

/// What a run needs beside its plan.
pub(super) struct Memory<'a, S> {
    pub arena: &'a mut [u8],
    pub store: &'a mut S,
    /// By `Plan::constants` index.
    pub constants: &'a [Frozen],
    pub seed: u64,
}

pub(super) fn run(
    plan: &Plan,
    graph: &Graph,
    memory: &mut Memory<Store>,
    mut profile: Option<&mut Profile>,
) -> Result<()> {
    if let Some(p) = profile.as_deref_mut() {
        p.steps.resize(plan.steps.len(), Vec::new());
    }
    for (i, step) in plan.steps.iter().enumerate() {
        let start = profile.is_some().then(Instant::now);
        call(step, memory).map_err(|source| Error::Op { node: graph.describe(step.node), source })?;
        if let (Some(p), Some(start)) = (profile.as_deref_mut(), start) {
            p.steps[i].push(start.elapsed());
        }
    }
    Ok(())
}

pub(super) fn call<S: States>(step: &Step, memory: &mut Memory<S>) -> std::result::Result<(), OpError> {
    // States that are written leave the store for the call, so that others can be read meanwhile.
    let mut taken: SmallVec<[Option<S::Taken>; 8]> =
        step.store.iter().map(|c| c.write.then(|| memory.store.take(c.state))).collect();
    let done = with_states(step, memory, &mut taken);
    for (cut, data) in step.store.iter().zip(taken) {
        if let Some(data) = data {
            memory.store.put(cut.state, data);
        }
    }
    done
}

fn with_states<S: States>(
    step: &Step,
    memory: &mut Memory<S>,
    taken: &mut [Option<S::Taken>],
) -> std::result::Result<(), OpError> {
    let store = &*memory.store;
    let mut written: SmallVec<[Option<&mut [u8]>; 8]> =
        taken.iter_mut().map(|b| b.as_mut().map(|b| b.as_mut())).collect();
    let cuts = step.arena.iter().map(|c| (c.range.start, c.range.end, c.write));
    let mut arena = carve(memory.arena, cuts);
    let constants = memory.constants;
    // As many as a convolution's gradients with the normalisations around it.
    let mut x: SmallVec<[Option<View>; 16]> = SmallVec::new();
    for o in &step.x {
        let bytes = match o.place {
            Place::Arena(i) => arena[i].read(),
            Place::Store(i) => store.read(step.store[i].state),
            Place::Constant(i) => constants[i].bytes(),
            Place::None => {
                x.push(None);
                continue;
            }
        };
        let bytes = if bytes.is_empty() { empty() } else { bytes };
        x.push(Some(View { dtype: o.dtype, dims: &o.dims, bytes }));
    }
    let mut y: SmallVec<[Option<ViewMut>; 8]> = SmallVec::new();
    for o in &step.y {
        let len = o.dims.iter().product::<usize>() * o.dtype.size();
        let bytes = match o.place {
            // Nothing may lie where something else is read.
            Place::Arena(_) if len == 0 => Some(empty()),
            Place::Arena(i) => arena[i].write(),
            Place::Store(i) => written[i].take().map(|b| &mut b[..len]),
            Place::Constant(_) | Place::None => None,
        };
        y.push(bytes.map(|bytes| ViewMut { dtype: o.dtype, dims: &o.dims, bytes }));
    }
    if step.op.is_view() {
        out(&mut y, 0)?.bytes.copy_from_slice(need(&x, 0)?.bytes);
        return Ok(());
    }
    // An empty slice that is aligned, unlike `&mut []`: kernels cast their scratch memory.
    let mut nothing = Buffer::default();
    let scratch = step.scratch.and_then(|i| arena[i].write()).unwrap_or(nothing.bytes_mut());
    step.op.forward(&mut Cx { scratch, seed: memory.seed ^ mix(step.draws_as.0 as u64) }, &x, &mut y)
}

/// No bytes, aligned for any element type.
fn empty<'a>() -> &'a mut [u8] {
    bytemuck::cast_slice_mut::<u64, u8>(&mut [])
}

/// Spreads small integers over all bits (splitmix64's finaliser).
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
