//! Convolution and its gradients of tensors whose channels lie last, (N, spatial…, C), with weights as in the
//! file: for now by way of the other layout, in scratch.

use super::{Epilogue, Geometry, each, finish, volume};
use crate::kernels::strided::{Unit, read};
use crate::tensor::Float;

/// Elements of scratch: the operands with channels first beside what their kernel needs.
fn sizes(g: &Geometry) -> (usize, usize) {
    (g.n * g.c * volume(g.x), g.n * g.oc * volume(g.y))
}

/// (n, a, b) as (n, b, a).
fn swap<T: Float>(n: usize, a: usize, b: usize, from: &[T], to: &mut [T]) {
    fn of<U: Unit>(n: usize, a: usize, b: usize, from: &[u8], to: &mut [u8]) {
        let (from, to) = (bytemuck::cast_slice::<u8, U>(from), bytemuck::cast_slice_mut::<u8, U>(to));
        read(from, 0, &[n, b, a], &[(a * b) as isize, 1, b as isize], to);
    }
    let (from, to) = (bytemuck::cast_slice(from), bytemuck::cast_slice_mut(to));
    match size_of::<T>() {
        4 => of::<u32>(n, a, b, from, to),
        _ => of::<u64>(n, a, b, from, to),
    }
}

pub fn forward<T: Float>(
    g: &Geometry,
    x: &[T],
    w: &[T],
    epilogue: Epilogue<T>,
    y: &mut [T],
    scratch: &mut [T],
) {
    let (nx, ny) = sizes(g);
    let (px, rest) = scratch.split_at_mut(nx);
    let (py, rest) = rest.split_at_mut(ny);
    swap(g.n, volume(g.x), g.c, x, px);
    super::forward::forward(g, px, w, epilogue.bias, py, rest);
    swap(g.n, g.oc, volume(g.y), py, y);
    finish(epilogue, y);
}

/// Elements of scratch.
pub fn forward_scratch(g: &Geometry) -> usize {
    let (x, y) = sizes(g);
    x + y + super::forward_scratch(g)
}

pub fn input_grad<T: Float>(
    g: &Geometry,
    dy: &[T],
    w: &[T],
    addend: Option<&[T]>,
    dx: &mut [T],
    scratch: &mut [T],
) {
    let (nx, ny) = sizes(g);
    let (px, rest) = scratch.split_at_mut(nx);
    let (py, rest) = rest.split_at_mut(ny);
    swap(g.n, volume(g.y), g.oc, dy, py);
    super::input::input_grad(g, py, w, px, rest);
    swap(g.n, g.c, volume(g.x), px, dx);
    if let Some(addend) = addend {
        each(dx, addend, |dx, a| a + dx);
    }
}

/// Elements of scratch.
pub fn input_grad_scratch(g: &Geometry) -> usize {
    let (x, y) = sizes(g);
    x + y + super::input_grad_scratch(g)
}

pub fn weight_grad<T: Float>(g: &Geometry, dy: &[T], x: &[T], dw: &mut [T], scratch: &mut [T]) {
    let (nx, ny) = sizes(g);
    let (px, rest) = scratch.split_at_mut(nx);
    let (py, rest) = rest.split_at_mut(ny);
    swap(g.n, volume(g.y), g.oc, dy, py);
    swap(g.n, volume(g.x), g.c, x, px);
    super::weight_grad(g, py, px, dw, rest);
}

/// Elements of scratch.
pub fn weight_grad_scratch(g: &Geometry) -> usize {
    let (x, y) = sizes(g);
    x + y + super::weight_grad_scratch(g)
}
