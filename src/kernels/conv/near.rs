//! Operands of pointwise convolutions as products multiply them: elements, or pairs of bfloat16, which are made of elements as
//! these are computed.
#![allow(unsafe_code)]

use super::load::{Operand, of_forms};
use super::way::Packs;
use crate::kernels::half::Half;
use crate::kernels::pairs::{PairKernel, Pairs};
use crate::kernels::par::LINE;
use crate::kernels::simd::{Simd, Stored, Vectors};
use crate::kernels::tile::Form;

/// Some positions rounded to bfloat16, in pairs of channels and of positions, where they are asked for: the last position of an odd
/// number is beside zeros. The channels are of an even number, and nothing of float16.
struct Pair<'a, 'b, T> {
    operand: Operand<'a, T>,
    first: usize,
    positions: usize,
    channels: Option<&'b mut [u32]>,
    across: Option<&'b mut [u32]>,
}

impl<T: Vectors> PairKernel<T> for Pair<'_, '_, T> {
    #[inline(always)]
    unsafe fn run<D: Pairs<S: Simd<Elem = T>>>(self) {
        // SAFETY: the caller's promise; the forms are those of the operand.
        unsafe { of_forms!(self.operand, F, X => self.of::<D, F, X>()) }
    }
}

impl<T: Vectors> Pair<'_, '_, T> {
    /// Elements of scratch of the pairs of channels and of those of positions: as many, and what whole vectors write too much.
    fn room(positions: usize, channels: usize) -> [usize; 2] {
        [positions * channels / 2, positions.div_ceil(2) * channels]
            .map(|pairs| (pairs + LINE).next_multiple_of(LINE))
    }

    /// # Safety
    /// As of [`PairKernel::run`]; the operand must lie in the forms `F` and `X`.
    #[inline(always)]
    unsafe fn of<D: Pairs<S: Simd<Elem = T>>, F: Stored<T>, X: Stored<T>>(self) {
        let Pair { operand, first, positions, channels, across } = self;
        let (c, lanes) = (operand.channels, D::S::LANES);
        let room = Self::room(positions, c);
        let beside = channels.map(|out| out[..room[0]].as_mut_ptr());
        let across = across.map(|out| out[..room[1]].as_mut_ptr());
        assert!(c.is_multiple_of(2) && (first + positions) * c <= operand.data.len(), "positions");
        // What is left of the channels first: a whole vector is written of them, whose end the rest overwrites.
        let whole = c / lanes * lanes;
        for p in (0..positions).step_by(2) {
            let at = (first + p) * c;
            let from: *const F::Bits = operand.data.address(at).cast();
            let x: *const X::Bits = operand.behind().address(at).cast();
            let put = PutPair {
                operand: &operand,
                from: [from, from.wrapping_add(c)],
                x: [x, x.wrapping_add(c)],
                second: p + 1 < positions,
                beside: beside.map(|to| to.wrapping_add(p * c / 2)),
                across: across.map(|to| to.wrapping_add(p / 2 * c)),
            };
            // SAFETY: the positions lie inside, and there is room for their pairs, and for another vector.
            unsafe {
                if whole < c {
                    put.vector::<D, F, X>(whole, c - whole);
                }
                for channel in (0..whole).step_by(lanes) {
                    put.vector::<D, F, X>(channel, lanes);
                }
            }
        }
    }
}

/// Two positions, and where their pairs go.
struct PutPair<'a, T, F, X> {
    operand: &'a Operand<'a, T>,
    from: [*const F; 2],
    x: [*const X; 2],
    /// Is there a second one?
    second: bool,
    beside: Option<*mut u32>,
    across: Option<*mut u32>,
}

impl<T: Vectors, A, B> PutPair<'_, T, A, B> {
    /// # Safety
    /// As of [`Pair::of`], and [`Operand::vector`].
    #[inline(always)]
    unsafe fn vector<D: Pairs<S: Simd<Elem = T>>, F: Stored<T, Bits = A>, X: Stored<T, Bits = B>>(
        &self,
        channel: usize,
        n: usize,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let value = self.operand.vector::<D::S, F, X>(channel, n, self.from[0], self.x[0]);
            let second = match self.second {
                true => self.operand.vector::<D::S, F, X>(channel, n, self.from[1], self.x[1]),
                false => D::S::splat(T::zero()),
            };
            if let Some(to) = self.beside {
                let to = to.add(channel / 2);
                D::put_beside(value, to);
                if self.second {
                    D::put_beside(second, to.add(self.operand.channels / 2));
                }
            }
            if let Some(to) = self.across {
                D::put_both([value, second], to.add(channel));
            }
        }
    }
}

impl<T: Vectors> Pair<'_, '_, T> {
    fn write(self) {
        self.operand.check();
        // SAFETY: checked.
        unsafe { T::dispatch_pairs(self) }
    }
}

/// Writes some positions in pairs of channels, if an operand lies so that it can, and there is room.
pub(super) fn pair_channels<T: Vectors>(
    operand: &Operand<T>,
    first: usize,
    positions: usize,
    out: &mut [u32],
) -> bool {
    let float16 = [operand.data, operand.behind()].iter().any(|x| x.half() == Some(Half::F16));
    let [room, _] = Pair::<T>::room(positions, operand.channels);
    if float16 || !operand.channels.is_multiple_of(2) || out.len() < room {
        return false;
    }
    Pair { operand: *operand, first, positions, channels: Some(out), across: None }.write();
    true
}

/// Operands of a pointwise convolution's gradients, some positions at a time, in the form in which its products multiply them.
pub(super) trait Near<T: Vectors>: Packs<T> {
    /// Elements of scratch for some positions of `c` channels; `plain`: is the operand?
    fn near_room(positions: usize, c: usize, plain: bool) -> usize;

    /// Rows of channels, and of positions, [`EACH`](Form::EACH) in one.
    fn both_ways<'b>(
        operand: &Operand<'b, T>,
        first: usize,
        positions: usize,
        room: &'b mut [T],
    ) -> [&'b [Self]; 2];

    /// The latter alone.
    fn across<'b>(operand: &Operand<'b, T>, first: usize, positions: usize, room: &'b mut [T]) -> &'b [Self];
}

impl<T: Vectors> Near<T> for T {
    fn near_room(positions: usize, c: usize, plain: bool) -> usize {
        if plain { 0 } else { positions * c }
    }

    fn both_ways<'b>(
        operand: &Operand<'b, T>,
        first: usize,
        positions: usize,
        room: &'b mut [T],
    ) -> [&'b [T]; 2] {
        [operand.near(first, positions, room); 2]
    }

    fn across<'b>(operand: &Operand<'b, T>, first: usize, positions: usize, room: &'b mut [T]) -> &'b [T] {
        operand.near(first, positions, room)
    }
}

impl<T: Vectors> Near<T> for u32 {
    fn near_room(positions: usize, c: usize, _: bool) -> usize {
        Pair::<T>::room(positions, c).iter().sum()
    }

    fn both_ways<'b>(
        operand: &Operand<'b, T>,
        first: usize,
        positions: usize,
        room: &'b mut [T],
    ) -> [&'b [u32]; 2] {
        let c = operand.channels;
        let (beside, across) = <u32 as Form<T>>::room(room).split_at_mut(Pair::<T>::room(positions, c)[0]);
        let (channels, pairs) = (Some(&mut *beside), Some(&mut *across));
        Pair { operand: *operand, first, positions, channels, across: pairs }.write();
        [&beside[..positions * c / 2], &across[..positions.div_ceil(2) * c]]
    }

    fn across<'b>(operand: &Operand<'b, T>, first: usize, positions: usize, room: &'b mut [T]) -> &'b [u32] {
        let across = <u32 as Form<T>>::room(room);
        Pair { operand: *operand, first, positions, channels: None, across: Some(&mut *across) }.write();
        &across[..positions.div_ceil(2) * operand.channels]
    }
}
