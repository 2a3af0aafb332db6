//! Convolutions that are computed as simpler ones.
//!
//! A tap that lies outside the input for every position, as of a kernel dilated by more than the image, is left out. Positions a
//! dilation apart read no others' inputs: those of each residue are an image of their own, which is convolved without dilation
//! (Chen et al., *DeepLab*, 2016, section 3.1, after Holschneider's à trous algorithm). As images between zeros that reach far are
//! copied for each few rows of them, copying each position once costs less.
#![allow(clippy::needless_range_loop)]

use super::{
    CHANNELS, Epilogue, Geometry, Load, Operand, Residual, regions, split, strides, volume, winograd,
};
use crate::kernels::half::{Elements, ElementsMut};
use crate::kernels::layout::Layout;
use crate::kernels::par;
use crate::kernels::simd::Vectors;

/// Channels of images, and their extents whole and apart.
type Images = (usize, [[usize; 3]; 2]);

/// A simpler convolution.
pub(super) struct Simpler<'a> {
    of: &'a Geometry,
    g: Geometry,
    /// The first tap that is left in each dimension.
    first: [usize; 3],
    /// Residues in each dimension, whose positions are images of their own.
    apart: [usize; 3],
}

/// The first and the last tap of dimension `d` that reach the input from any position.
fn reaching(g: &Geometry, d: usize) -> Option<[usize; 2]> {
    let reaches = |t: &usize| {
        let (at, pad, s) = (t * g.dilation[d], g.pad[d], g.stride[d]);
        let o = pad.saturating_sub(at).div_ceil(s);
        o < g.y[d] && o * s + at < pad + g.x[d]
    };
    let first = (0..g.k[d]).find(reaches)?;
    // (There are no fewer zeros than none.)
    Some([first.min(g.pad[d] / g.dilation[d]), (0..g.k[d]).rfind(reaches)?])
}

/// The simpler form, if there is one.
pub(super) fn of(g: &Geometry) -> Option<Simpler<'_>> {
    if g.pairs || g.depthwise() || g.is_empty() {
        return None;
    }
    let mut simpler = Geometry { layout: Layout::Last, ..g.clone() };
    let mut first = [0; 3];
    for d in 0..3 {
        let [from, to] = reaching(g, d)?;
        first[d] = from;
        simpler.k[d] = to + 1 - from;
        simpler.pad[d] = g.pad[d] - from * g.dilation[d];
        if simpler.k[d] == 1 {
            simpler.dilation[d] = 1;
        }
    }
    let (apart, parts) = apart(&simpler);
    // Fewest multiplications.
    let all = match winograd::applies_forward(&parts) {
        true => winograd::multiplications(&parts),
        false => parts.n * volume(parts.y) * parts.taps(),
    };
    let by_regions = regions::applies(&simpler) && g.n * regions::multiplications(&simpler) <= all;
    let (apart, simpler) = if by_regions { ([1; 3], simpler) } else { (apart, parts) };
    (simpler.k != g.k || apart != [1; 3]).then_some(Simpler { of: g, g: simpler, first, apart })
}

/// Residues in each dimension, and the convolution of their images.
fn apart(g: &Geometry) -> ([usize; 3], Geometry) {
    let (mut apart, mut parts) = ([1; 3], g.clone());
    let copies = g.axis < 2 && g.pad.iter().any(|p| *p > 0) && g.c.min(g.oc) >= CHANNELS;
    for d in 0..3 {
        let by = g.dilation[d];
        // Residues of fewer positions than others are filled up with zeros.
        let filled = 2 * g.x[d].next_multiple_of(by) <= 3 * g.x[d];
        if copies && filled && by > 1 && g.stride[d] == 1 && g.pad[d].is_multiple_of(by) {
            apart[d] = by;
            parts.dilation[d] = 1;
            parts.pad[d] /= by;
            (parts.x[d], parts.y[d]) = (g.x[d].div_ceil(by), g.y[d].div_ceil(by));
        }
    }
    parts.n *= volume(apart);
    (apart, parts)
}

impl Simpler<'_> {
    fn trims(&self) -> bool {
        self.g.k != self.of.k
    }

    fn is_apart(&self) -> bool {
        self.apart != [1; 3]
    }

    fn weights(&self) -> usize {
        if self.trims() { self.g.oc * self.g.cg() * self.g.taps() } else { 0 }
    }

    /// Elements of scratch, `inner` being those that the simpler convolution needs.
    pub(super) fn scratch(&self, inner: impl Fn(&Geometry) -> usize) -> usize {
        let images = match self.is_apart() {
            true => self.room(self.inputs()) + self.room(self.outputs()),
            false => 0,
        };
        self.weights() + images + inner(&self.g)
    }

    /// Its weights, cut out of all.
    fn cut<'w, T: Vectors>(&self, w: &'w [T], room: &'w mut [T]) -> &'w [T] {
        if !self.trims() {
            return w;
        }
        for (w, cut) in w.chunks_exact(self.of.taps()).zip(room.chunks_exact_mut(self.g.taps())) {
            (0..cut.len()).for_each(|t| cut[t] = w[self.tap(t)]);
        }
        room
    }

    /// Which tap of all is the simpler kernel's tap `t`?
    fn tap(&self, t: usize) -> usize {
        let [a, b, c] = split(t, self.g.k);
        let (k, f) = (self.of.k, self.first);
        ((a + f[0]) * k[1] + b + f[1]) * k[2] + c + f[2]
    }

    /// Where position `at` of image `n` lies among images of `extents`, in positions.
    fn place(&self, n: usize, at: [usize; 3], extents: [usize; 3]) -> usize {
        let a = self.apart;
        let image = ((n * a[0] + at[0] % a[0]) * a[1] + at[1] % a[1]) * a[2] + at[2] % a[2];
        let inside = strides(extents, 1);
        image * volume(extents) + (0..3).map(|d| at[d] / a[d] * inside[d]).sum::<usize>()
    }

    /// Takes images (N, whole…, C) apart, with zeros where the residues have fewer positions than others.
    fn part<T: Vectors>(&self, x: Elements<T>, (c, [whole, extents]): Images, out: &mut [T]) {
        let (a, line) = (self.apart, extents[2] * c);
        par::rows(out, line.max(1), par::GRAIN, |start, out| {
            for (i, out) in out.chunks_exact_mut(line.max(1)).enumerate() {
                let row = start + i;
                let [image, q0, q1] = split(row, [0, extents[0], extents[1]]);
                let [n, r0, r1] = split(image / a[2], [0, a[0], a[1]]);
                let (i0, i1) = (q0 * a[0] + r0, q1 * a[1] + r1);
                for (q2, out) in out.chunks_exact_mut(c.max(1)).enumerate() {
                    let i2 = q2 * a[2] + image % a[2];
                    match i0 < whole[0] && i1 < whole[1] && i2 < whole[2] {
                        true => {
                            let at = ((n * whole[0] + i0) * whole[1] + i1) * whole[2] + i2;
                            x.copy(at * c, out);
                        }
                        false => out.fill(T::zero()),
                    }
                }
            }
        });
    }

    /// Puts images together again.
    fn join<T: Vectors>(&self, parts: &[T], (c, [whole, extents]): Images, y: &mut [T]) {
        par::rows(y, (whole[2] * c).max(1), par::GRAIN, |start, y| {
            for (i, y) in y.chunks_exact_mut(c.max(1)).enumerate() {
                let [row, at] = [start + i / whole[2], i % whole[2]];
                let [n, i0, i1] = split(row, [0, whole[0], whole[1]]);
                let from = self.place(n, [i0, i1, at], extents) * c;
                y.copy_from_slice(&parts[from..from + c]);
            }
        });
    }

    /// Elements of all images taken apart.
    fn room(&self, (c, [_, extents]): Images) -> usize {
        self.g.n * volume(extents) * c
    }

    /// Images as the simpler convolution takes them, and the scratch that is left.
    fn take<'x, T: Vectors>(
        &self,
        x: Elements<'x, T>,
        source: Images,
        scratch: &'x mut [T],
    ) -> (Elements<'x, T>, &'x mut [T]) {
        if !self.is_apart() {
            return (x, scratch);
        }
        let (own, rest) = scratch.split_at_mut(self.room(source));
        self.part(x, source, own);
        (Elements::Whole(own), rest)
    }

    /// Runs a convolution, or its transpose, from images of `source` to images of `target`.
    #[allow(clippy::too_many_arguments)]
    fn run<T: Vectors>(
        &self,
        x: Elements<T>,
        w: &[T],
        epilogue: Epilogue<T>,
        y: &mut [T],
        scratch: &mut [T],
        [source, target]: [Images; 2],
        kernel: impl FnOnce(Elements<T>, &[T], Epilogue<T>, &mut [T], &mut [T]),
    ) {
        let (room, rest) = scratch.split_at_mut(self.weights());
        let w = self.cut(w, room);
        let (x, rest) = self.take(x, source, rest);
        if !self.is_apart() {
            return kernel(x, w, epilogue, y, rest);
        }
        let (to, rest) = rest.split_at_mut(self.room(target));
        let mut own = Epilogue { residual: Residual::InOutput, ..epilogue };
        match epilogue.residual {
            Residual::None => own.residual = Residual::None,
            Residual::Of(r) => self.part(Elements::Whole(r), target, to),
            Residual::InOutput => self.part(Elements::Whole(&*y), target, to),
        }
        kernel(x, w, own, to, rest);
        self.join(to, target, y);
    }

    fn operand<'x, T>(&self, x: Elements<'x, T>) -> Operand<'x, T> {
        Operand { data: x, channels: self.g.c, load: Load::Plain }
    }

    fn inputs(&self) -> Images {
        (self.g.c, [self.of.x, self.g.x])
    }

    fn outputs(&self) -> Images {
        (self.g.oc, [self.of.y, self.g.y])
    }

    /// See [`forward`](super::forward).
    pub(super) fn forward<T: Vectors>(
        &self,
        x: Elements<T>,
        w: &[T],
        epilogue: Epilogue<T>,
        y: &mut [T],
        scratch: &mut [T],
    ) {
        self.run(
            x,
            w,
            epilogue,
            y,
            scratch,
            [self.inputs(), self.outputs()],
            |x, w, epilogue, y, scratch| {
                super::forward(&self.g, self.operand(x), w, epilogue, y, scratch);
            },
        );
    }

    /// See [`transposed`](super::transposed).
    pub(super) fn transposed<T: Vectors>(
        &self,
        dy: Elements<T>,
        w: &[T],
        epilogue: Epilogue<T>,
        dx: &mut [T],
        scratch: &mut [T],
    ) {
        self.run(
            dy,
            w,
            epilogue,
            dx,
            scratch,
            [self.outputs(), self.inputs()],
            |dy, w, epilogue, dx, scratch| {
                super::transposed(&self.g, dy, w, epilogue, ElementsMut::Whole(dx), scratch);
            },
        );
    }

    /// See [`weight_grad`](super::weight_grad).
    pub(super) fn weight_grad<T: Vectors>(
        &self,
        dy: Elements<T>,
        x: Elements<T>,
        dw: &mut [T],
        scratch: &mut [T],
    ) {
        let (cut, rest) = scratch.split_at_mut(self.weights());
        let own = if self.trims() { &mut *cut } else { &mut *dw };
        let (x, rest) = self.take(x, self.inputs(), rest);
        let (dy, rest) = self.take(dy, self.outputs(), rest);
        super::weight_grad(&self.g, dy, self.operand(x), own, rest);
        if self.trims() {
            dw.fill(T::zero());
            for (dw, cut) in dw.chunks_exact_mut(self.of.taps()).zip(cut.chunks_exact(self.g.taps())) {
                (0..cut.len()).for_each(|t| dw[self.tap(t)] = cut[t]);
            }
        }
    }
}
