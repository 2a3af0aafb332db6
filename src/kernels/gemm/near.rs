//! Products inside of other kernels: of elements, or of pairs of bfloat16, by a B that may be packed once for several of
//! them, to where C lies among what other tasks write.

use super::pairs::{
    divided_pairs, multiply_pairs, pack_pairs, packed_pairs, room_by_packed_pairs, room_pairs,
};
use super::{Packs, Plus, Product, divided, pack, room_divided, shared_out, vector};
use crate::kernels::half::Elements;
use crate::kernels::par::Shared;
use crate::kernels::simd::Vectors;

/// A product, and how it is computed. Elements are whole; of pairs, A and B may be of half precision.
#[derive(Debug, Clone, Copy)]
pub struct Near<T> {
    product: Product<T>,
    pairs: bool,
}

impl<T: Vectors> Near<T> {
    /// By the calling thread alone.
    pub fn alone(product: Product<T>, pairs: bool) -> Self {
        Near { product: Product { alone: true, ..product }, pairs }
    }

    /// By as many tasks as the product is worth.
    pub fn shared(product: Product<T>) -> Self {
        Near { product, pairs: false }
    }

    /// By a loop of its own, that reads B as it lies? (It writes C as one piece.)
    fn by_vector(&self) -> bool {
        let p = &self.product;
        !self.pairs && (p.m == 1 || p.n == 1 && p.ldc == 1)
    }

    /// C, for tiles to write; `None` where there is nothing for them to do (any more).
    ///
    /// # Safety
    /// As of [`multiply_packed_at`](Self::multiply_packed_at).
    unsafe fn for_tiles<'c>(&self, a: Elements<T>, b: Elements<T>, c: *mut T) -> Option<Shared<'c, T>> {
        let p = &self.product;
        let need = p.extents();
        assert!(a.len() >= need[0] && b.len() >= need[1], "operands of a product");
        if p.m * p.n == 0 {
            return None;
        }
        if self.by_vector() {
            // SAFETY: a row, or a column whose elements are neighbours; the caller's promise.
            let c = unsafe { std::slice::from_raw_parts_mut(c, need[2]) };
            vector::vector(p, a.whole(), b.whole(), Plus::NOTHING, c);
            return None;
        }
        // SAFETY: the caller's promise.
        Some(unsafe { Shared::at(c) })
    }

    /// Elements of B, packed. A must not be transposed.
    pub fn packed(&self) -> usize {
        match self.pairs {
            _ if self.by_vector() => 0,
            true => packed_pairs(&self.product),
            false => self.product.packed(Packs::B),
        }
    }

    /// Packs B for products that differ in A, C and the number of rows alone.
    pub fn pack(&self, b: Elements<T>, packed: &mut [T]) {
        let p = &self.product;
        assert!(!p.trans_a && b.len() >= p.extents()[1], "operands of a product");
        match self.pairs {
            _ if self.by_vector() => {}
            true => pack_pairs(p, b, bytemuck::cast_slice_mut(packed)),
            false => pack::columns(p, b, packed),
        }
    }

    /// Elements of scratch of a product by a packed B.
    pub fn room_packed(&self) -> usize {
        if self.pairs { room_by_packed_pairs(&self.product) } else { 0 }
    }

    /// C, by a B that [`pack`](Self::pack) has packed.
    pub fn multiply_packed(
        &self,
        a: Elements<T>,
        b: Elements<T>,
        packed: &[T],
        c: &mut [T],
        scratch: &mut [T],
    ) {
        assert!(c.len() >= self.product.extents()[2], "operands of a product");
        // SAFETY: the extent was checked.
        unsafe { self.multiply_packed_at(a, b, packed, c.as_mut_ptr(), scratch) }
    }

    /// The same where C lies among what others write.
    ///
    /// # Safety
    /// `c` must be valid for the product's M rows of N elements, and nobody else may use those.
    pub unsafe fn multiply_packed_at(
        &self,
        a: Elements<T>,
        b: Elements<T>,
        packed: &[T],
        c: *mut T,
        scratch: &mut [T],
    ) {
        let p = &self.product;
        assert!(!p.trans_a, "operands of a product");
        // SAFETY: the caller's promise.
        let Some(c) = (unsafe { self.for_tiles(a, b, c) }) else { return };
        assert!(packed.len() >= self.packed(), "operands of a product");
        match self.pairs {
            true => multiply_pairs(p, a, bytemuck::cast_slice(packed), Plus::NOTHING, &c, scratch),
            false => shared_out(p, Packs::B, a, b, Plus::NOTHING, &c, packed, &mut []),
        }
    }

    /// Elements of scratch of [`multiply_at`](Self::multiply_at).
    pub fn room(&self) -> usize {
        let p = &self.product;
        match self.pairs {
            _ if self.by_vector() => 0,
            true => room_pairs(p, None),
            false => room_divided(p, true),
        }
    }

    /// C, with nothing packed beforehand, by the calling thread alone.
    ///
    /// # Safety
    /// As of [`multiply_packed_at`](Self::multiply_packed_at).
    pub unsafe fn multiply_at(&self, a: Elements<T>, b: Elements<T>, c: *mut T, scratch: &mut [T]) {
        let p = &self.product;
        assert!(p.alone, "operands of a product");
        // SAFETY: the caller's promise.
        let Some(c) = (unsafe { self.for_tiles(a, b, c) }) else { return };
        match self.pairs {
            true => divided_pairs(p, a, b, Plus::NOTHING, &c, scratch),
            false => divided(p, a, b, Plus::NOTHING, &c, scratch),
        }
    }
}
