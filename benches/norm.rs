//! Batch normalisation with an activation, channels last (`rows`) and first (`planes`): bytes that a sweep must move.
//!
//! `cargo bench --bench norm`; `RAYON_NUM_THREADS` sets the threads.

use divan::Bencher;
use divan::counter::BytesCount;
use retune::kernels::elementwise::Clamp;
use retune::kernels::half::Elements;
use retune::kernels::norm::{
    ChannelGrad, Channels, Mask, Residual, Results, Stat, channel_affine, channel_input_grad, channel_stats,
    masked_param_grad, param_grad,
};

fn main() {
    divan::main();
}

/// Images, pixels, channels.
const SHAPES: [[usize; 3]; 4] = [[32, 1024, 16], [8, 12544, 96], [8, 3136, 64], [8, 49, 1280]];

#[derive(Clone, Copy)]
struct Shape {
    d: Channels,
    name: &'static str,
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}·{}·{}", self.name, self.d.n, self.d.c, self.d.s)
    }
}

fn shapes() -> impl Iterator<Item = Shape> {
    SHAPES.into_iter().flat_map(|[n, s, c]| {
        [
            Shape { name: "rows", d: Channels { n: n * s, c, s: 1 } },
            Shape { name: "planes", d: Channels { n, c, s } },
        ]
    })
}

const RELU: Clamp<f32> = Clamp { low: 0.0, high: f32::INFINITY };

fn wave(n: usize, k: f32) -> Vec<f32> {
    (0..n).map(|i| (i as f32 * k).sin()).collect()
}

/// Runs `f(x, y, dy, channels…)` with `sweeps` tensors moved a call.
fn measure(bencher: Bencher, shape: Shape, sweeps: usize, mut f: impl FnMut(&mut Buffers)) {
    let d = shape.d;
    let n = d.n * d.c * d.s;
    let mut b = Buffers {
        x: wave(n, 0.7),
        y: wave(n, 0.3),
        dy: wave(n, 0.1),
        mean: wave(d.c, 0.2),
        inv: wave(d.c, 0.4),
        sums: [vec![0.0; d.c], vec![0.0; d.c]],
        partials: vec![0.0; d.partials()],
        room: vec![0.0; 3 * d.c],
    };
    bencher.counter(BytesCount::new(n * 4 * sweeps)).bench_local(|| f(&mut b));
}

struct Buffers {
    x: Vec<f32>,
    y: Vec<f32>,
    dy: Vec<f32>,
    mean: Vec<f32>,
    inv: Vec<f32>,
    sums: [Vec<f32>; 2],
    partials: Vec<f64>,
    room: Vec<f32>,
}

#[divan::bench(args = shapes())]
fn statistics(bencher: Bencher, shape: Shape) {
    measure(bencher, shape, 1, |b| {
        let [mean, variance] = &mut b.sums;
        channel_stats(&b.x, shape.d, mean, variance, &mut b.partials);
    });
}

#[divan::bench(args = shapes())]
fn normalise(bencher: Bencher, shape: Shape) {
    measure(bencher, shape, 2, |b| {
        let (m, a) = (&b.mean, &b.inv);
        channel_affine(
            Some(Elements::Whole(&b.x)),
            Results::Whole(&mut b.y),
            shape.d,
            m,
            a,
            m,
            Residual::None,
            RELU,
        );
    });
}

#[divan::bench(args = shapes())]
fn normalise_residual(bencher: Bencher, shape: Shape) {
    measure(bencher, shape, 3, |b| {
        let (m, a) = (&b.mean, &b.inv);
        channel_affine(
            Some(Elements::Whole(&b.x)),
            Results::Whole(&mut b.y),
            shape.d,
            m,
            a,
            m,
            Residual::Given(&b.dy),
            RELU,
        );
    });
}

#[divan::bench(args = shapes())]
fn gradient_sums(bencher: Bencher, shape: Shape) {
    measure(bencher, shape, 2, |b| {
        let [scale, shift] = &mut b.sums;
        let mask = Mask::Inside { factor: &b.inv, shift: &b.mean, clamp: RELU };
        let stats = (Some(&b.mean[..]), &b.inv[..]);
        param_grad(
            Elements::Whole(&b.x),
            Elements::Whole(&b.dy),
            shape.d,
            Stat::Channel,
            stats,
            mask,
            (scale, shift),
            &mut b.partials,
        );
    });
}

#[divan::bench(args = shapes())]
fn gradient_sums_residual(bencher: Bencher, shape: Shape) {
    measure(bencher, shape, 4, |b| {
        let [scale, shift] = &mut b.sums;
        let (stats, sums) = ((&b.mean[..], &b.inv[..]), (&mut scale[..], &mut shift[..]));
        let (x, y) = (Elements::Whole(&b.x[..]), Elements::Whole(&b.y[..]));
        masked_param_grad(x, y, None, &mut b.dy, RELU, shape.d, stats, sums, &mut b.partials);
    });
}

#[divan::bench(args = shapes())]
fn input_gradient(bencher: Bencher, shape: Shape) {
    measure(bencher, shape, 3, |b| {
        let g = ChannelGrad {
            scale: &b.inv,
            mean: &b.mean,
            inv: &b.inv,
            dscale: &b.mean,
            dshift: &b.mean,
            passed: Some((&b.mean, RELU)),
        };
        channel_input_grad(
            Some(Elements::Whole(&b.x)),
            None,
            Results::Whole(&mut b.dy),
            shape.d,
            g,
            &mut b.room,
        );
    });
}
