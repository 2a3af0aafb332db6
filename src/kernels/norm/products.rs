//! Sums of products over rows of channels.

use super::channel::column_products;
use super::fold::Given;
use super::strips::Channels;
use crate::kernels::half::Elements;
use crate::kernels::isa::vectorize_sweep;
use crate::kernels::par;
use crate::kernels::simd::Vectors;

/// `out = Σ a·b` over the rows of each of some groups, which have the channels `d`: (groups, rows, C) to (groups, C). `partials`:
/// [`Channels::partials`] elements for each group.
pub fn channel_products<T: Vectors>(a: &[T], b: &[T], d: Channels, out: &mut [T], partials: &mut [f64]) {
    let each = d.n * d.c;
    let groups = out.len() / d.c.max(1);
    assert!(d.s == 1 && a.len() == groups * each && b.len() == a.len(), "groups of rows");
    let (size, of_group) = ((2 * d.c).max(1), d.partials());
    let partials = &mut partials[..groups * of_group];
    par::chunks(partials, size, |task, part| {
        part.fill(0.0);
        let (products, sums) = part.split_at_mut(d.c);
        let (group, first) = (task * size / of_group, task * size % of_group / size * d.per_task());
        let rows = d.rows_of(first);
        let at = group * each + rows.start..group * each + rows.end;
        let (a, b) = (Elements::Whole(&a[at.clone()]), Given::near(Elements::Whole(&b[at])));
        vectorize_sweep(
            #[inline(always)]
            || column_products(a, d.c, None, b, products, sums),
        );
    });
    for (group, out) in out.chunks_mut(d.c.max(1)).enumerate() {
        let parts = &partials[group * of_group..][..of_group];
        for (c, out) in out.iter_mut().enumerate() {
            *out = T::of(parts.chunks_exact(size).map(|part| part[c]).sum());
        }
    }
}
