//! Products of operands that may be of half precision.

use super::{Packs, Plus, Product, divided, many, room, room_divided};
use crate::kernels::half::Elements;
use crate::kernels::par::{self, Shared};
use crate::kernels::simd::Vectors;

impl<T: Vectors> Product<T> {
    /// Are operands of half precision, where they are so, widened as they are packed?
    pub fn widens(&self, halves: [bool; 2]) -> bool {
        match self.packs() {
            _ if self.is_vector() => false,
            Packs::Nothing => false,
            Packs::B => !halves[0] || !self.trans_a,
            _ => true,
        }
    }
}

/// Elements of scratch that [`gemm_halves`] needs; `halves`: which of A and B are of half precision?
pub fn room_halves<T: Vectors>(p: &Product<T>, halves: [bool; 2]) -> usize {
    if p.widens(halves) {
        return room_divided(p, !halves[0]);
    }
    let [a, b, _] = p.extents();
    let copies: usize = [a, b].into_iter().zip(halves).map(|(n, half)| if half { n } else { 0 }).sum();
    copies + room(p, 1)
}

/// As [`gemm`](super::gemm), with something added, of operands that may be of half precision: they are widened as they are packed, or
/// a few rows at a time; beforehand where a small product reads both as they lie.
pub fn gemm_halves<T: Vectors>(
    p: &Product<T>,
    a: Elements<T>,
    b: Elements<T>,
    plus: Plus<T>,
    c: &mut [T],
    scratch: &mut [T],
) {
    p.check([a.len(), b.len(), c.len()], &plus);
    if p.m * p.n == 0 {
        return;
    }
    if p.widens([!a.is_whole(), !b.is_whole()]) {
        return divided(p, a, b, plus, &Shared::new(c), scratch);
    }
    let need = p.extents();
    let (a_near, rest) = scratch.split_at_mut(if a.is_whole() { 0 } else { need[0] });
    let (b_near, rest) = rest.split_at_mut(if b.is_whole() { 0 } else { need[1] });
    let widened = |x: Elements<T>, near: &mut [T]| par::pieces(near, |start, near| x.copy(start, near));
    widened(a, a_near);
    widened(b, b_near);
    let a = if let Elements::Whole(a) = a { a } else { a_near };
    let b = if let Elements::Whole(b) = b { b } else { b_near };
    many(p, 1, |_| [0, 0], a, b, plus, c, 0, rest);
}
