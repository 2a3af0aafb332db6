//! Depthwise convolution of what a pointwise one puts out, a panel of channels at a time: a few rows of them are computed as
//! they are read, and the whole never lies in memory.
#![allow(unsafe_code)]

use super::inputs::Own;
use super::{Direction, Sweep, Task, in_tap_order};
use crate::kernels::conv::grids::Plan;
use crate::kernels::conv::load::Rows;
use crate::kernels::conv::panels::Unpacked;
use crate::kernels::conv::pointwise::{self, Panel};
use crate::kernels::conv::way::Packed;
use crate::kernels::conv::{Epilogue, Geometry, slots};
use crate::kernels::layout::Layout;
use crate::kernels::par::{LINE, Shared, in_prepared_slots};
use crate::kernels::simd::Vectors;
use crate::kernels::tile::Pieces;

/// Positions that fill register tiles well.
const POSITIONS: usize = 48;
/// Elements of a ring of rows that stays near.
const NEAR: usize = 1 << 16;
/// Tasks that are enough, and rows of the source that are worth a task, which computes those at its edges once more.
const TASKS: usize = 8;
const ROWS: usize = 16;

/// A pointwise convolution, with its own epilogue, of x (N, spatial…, `c`): weights (C, `c`), C being the channels that are
/// convolved.
#[derive(Debug, Clone, Copy)]
pub struct Expansion<'a, T> {
    pub x: &'a [T],
    pub c: usize,
    pub w: &'a [T],
    pub epilogue: Epilogue<'a, T>,
}

/// Channels that are computed together, and tasks that each of several threads should have nevertheless.
const TOGETHER: usize = 192;
const EACH: usize = 4;

/// How the work is divided.
struct Division<'a> {
    way: Direction<'a>,
    /// The pointwise convolution.
    g: Geometry,
    plan: Plan,
    panel: usize,
    /// Panels that are computed together.
    together: usize,
    /// Rows of the source that are computed together, and bands of them that a window spans.
    band: usize,
    bands: usize,
    /// Parts of an image's rows of results.
    parts: Pieces,
}

impl<'a> Division<'a> {
    fn new<T: Vectors>(g: &'a Geometry, c: usize) -> Self {
        let way = Direction::forward(g);
        let before = Geometry {
            c,
            groups: 1,
            y: g.x,
            k: [1; 3],
            stride: [1; 3],
            dilation: [1; 3],
            pad: [0; 3],
            ..g.clone()
        };
        let plan = Plan::forward(&pointwise::of(&before, g.n * g.x[1] * g.x[2]));
        let panel = plan.panel::<T>();
        let band = POSITIONS.div_ceil(g.x[2]).min(g.x[1]);
        let bands = ((way.window()[1] - 1).div_ceil(band) + 1).min(g.x[1].div_ceil(band));
        let parts = Pieces::of(g.y[1], g.y[1]);
        let mut division = Division { way, g: before, plan, panel, together: 1, band, bands, parts };
        division.together = division.most_together::<T>();
        let parts = (g.x[1] / ROWS).min(TASKS.div_ceil(g.n * division.groups()));
        division.parts = Pieces::of(g.y[1], g.y[1].div_ceil(parts.max(1)));
        division
    }

    /// Panels to be computed together. Narrow ones make short rows, each of which reads all of what they are computed from.
    fn most_together<T: Vectors>(&self) -> usize {
        let (panel, panels) = (self.panel, self.plan.panels(self.panel));
        // (Panels of more vectors are wide enough.)
        if T::level().is_roomy() {
            return 1;
        }
        let tasks = self.g.n * (self.g.x[1] / ROWS).max(1) * panels;
        let wanted = match rayon::current_num_threads() {
            1 => 1,
            threads => EACH * threads,
        };
        let most = (TOGETHER / panel).min(NEAR / self.ring()).min(tasks / wanted);
        let together = panels.div_ceil(panels.div_ceil(most.max(1)));
        // By themselves, they must be divided alike.
        let last = self.g.oc - (panels.div_ceil(together) - 1) * together * panel;
        let alike = |channels: &usize| *channels <= panel || T::level().panel(*channels) == panel;
        if [together * panel, last].iter().all(alike) { together } else { 1 }
    }

    /// Channels of a task, and tasks that share the positions among them.
    fn channels(&self) -> usize {
        self.together * self.panel
    }

    fn groups(&self) -> usize {
        self.plan.panels(self.panel).div_ceil(self.together)
    }

    /// Elements from a row of the ring to the next, and of the whole ring, for so many channels.
    fn step(&self, channels: usize) -> usize {
        (self.way.around().iter().sum::<usize>() + self.g.x[2]) * channels
    }

    fn ring(&self) -> usize {
        self.bands * self.band * self.step(self.channels())
    }

    fn tasks(&self) -> usize {
        self.g.n * self.parts.count * self.groups()
    }

    /// Who packs the weights of the pointwise convolution.
    fn packs(&self) -> Packed {
        Packed::of(self.g.n * self.parts.count, self.plan.packed(self.panel))
    }

    /// Elements of weights for all slots.
    fn shared(&self) -> usize {
        if self.packs() == Packed::Once { self.plan.packed(self.panel) } else { 0 }
    }

    /// Elements of a slot: of weights of the pointwise and of the depthwise convolution, and of the ring.
    fn slot(&self) -> [usize; 3] {
        let weights = match self.packs() {
            Packed::Once => 0,
            Packed::InSlots => self.plan.packed(self.panel),
            Packed::InTasks => self.plan.steps() * self.channels(),
        };
        let g = self.way.g;
        [weights, g.taps() * g.c, self.ring()].map(|elements| elements.next_multiple_of(LINE))
    }
}

/// Can a depthwise convolution expand what it reads from `c` channels?
pub fn expands<T: Vectors>(g: &Geometry, c: usize) -> bool {
    let fits = g.depthwise() && g.layout == Layout::Last && g.axis >= 1 && !g.is_empty() && c > 0;
    fits && Division::new::<T>(g, c).ring() <= NEAR
}

/// Elements of scratch that [`forward_expanded`] needs.
pub fn forward_expanded_scratch<T: Vectors>(g: &Geometry, c: usize) -> usize {
    let d = Division::new::<T>(g, c);
    d.shared() + slots(d.tasks(), d.slot().iter().sum())
}

/// `y = clamp(conv(expansion, w) + bias)`, y (N, spatial…, C).
pub fn forward_expanded<T: Vectors>(
    g: &Geometry,
    from: Expansion<T>,
    w: &[T],
    epilogue: Epilogue<T>,
    y: &mut [T],
    scratch: &mut [T],
) {
    assert!(expands::<T>(g, from.c), "a convolution of an expansion");
    let d = Division::new::<T>(g, from.c);
    assert!(
        from.x.len() == g.inputs() / g.c * from.c && from.w.len() == g.c * from.c && y.len() == g.outputs()
    );
    let (packed, slots) = scratch.split_at_mut(d.shared());
    let packs = d.packs();
    let of = Unpacked { plan: &d.plan, forward: true, panel: d.panel, w: from.w };
    if packs == Packed::Once {
        of.pack(packed);
    }
    let packed: &[T] = packed;
    let size = d.plan.steps() * d.panel;
    let [own, by_tap, ring] = d.slot();
    let pack = |first: usize, out: &mut [T]| {
        let panels = out.chunks_exact_mut(size).zip(first..d.plan.panels(d.panel));
        panels.for_each(|(out, p)| of.pack_panel(p, out));
    };
    let prepare = |slot: &mut [T]| {
        let (own, rest) = slot.split_at_mut(own);
        in_tap_order(&d.way, w, rest);
        if packs == Packed::InSlots {
            pack(0, own);
        }
    };
    let y = Shared::new(y);
    in_prepared_slots(d.tasks(), own + by_tap + ring, slots, prepare, |task, slot| {
        let (own, rest) = slot.split_at_mut(own);
        let (by_tap, ring) = rest.split_at_mut(by_tap);
        let (group, part) = (task % d.groups(), task / d.groups());
        let (image, part) = (part / d.parts.count, part % d.parts.count);
        let first = group * d.together;
        let packed = match packs {
            Packed::Once => &packed[first * size..],
            Packed::InSlots => &own[first * size..],
            Packed::InTasks => {
                pack(first, own);
                &*own
            }
        };
        let channels = group * d.channels()..g.c.min((group + 1) * d.channels());
        let (first, count) = (channels.start, channels.len());
        let layout = [d.band, d.step(count)];
        let panel = Panel::new(&d.g, from.x, packed, from.epilogue, channels, layout);
        let ring = &mut ring[..d.bands * d.band * d.step(count)];
        let source = Rows::of_panel(&panel, d.way.source, d.bands, d.way.around(), ring);
        let epilogue = Epilogue { bias: epilogue.bias.map(|bias| &bias[first..first + count]), ..epilogue };
        let sweep =
            Sweep { way: d.way, inputs: Own, w: &by_tap[first..], epilogue, y: y.ptr().wrapping_add(first) };
        let start = image * g.y[1] + d.parts.start(part);
        let rows = start..start + d.parts.len(part);
        // SAFETY: tasks write different channels or rows of `y`; the extents were checked.
        unsafe { T::dispatch(Task { sweep, source, rows }) }
    });
}
