//! Convolutions of ResNet-20, ResNet-18 and MobileNetV2: forward, input gradient, weight gradient.
//!
//! `cargo bench --bench conv -- resnet20`; `RAYON_NUM_THREADS` sets the threads. Items are multiply-adds times two.

use divan::Bencher;
use divan::counter::ItemsCount;
use retune::kernels::elementwise::Clamp;
use retune::kernels::layout::Layout;
use retune::ops::conv::{Conv, ConvInputGrad, ConvWeightGrad};
use retune::ops::window::{AutoPad, Window};
use retune::ops::{Cx, Op};
use retune::tensor::{Buffer, DType, Dims, Meta, Tensor, View, ViewMut};

/// One convolution with pads of half the kernel.
struct Shape {
    name: &'static str,
    batch: usize,
    channels: [usize; 2],
    size: usize,
    kernel: usize,
    stride: usize,
    groups: usize,
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

const fn shape(
    name: &'static str,
    batch: usize,
    channels: [usize; 2],
    size: usize,
    kernel: usize,
    stride: usize,
    groups: usize,
) -> Shape {
    Shape { name, batch, channels, size, kernel, stride, groups }
}

const SHAPES: [Shape; 17] = [
    shape("resnet20 3→16 32²", 32, [3, 16], 32, 3, 1, 1),
    shape("resnet20 16→16 32²", 32, [16, 16], 32, 3, 1, 1),
    shape("resnet20 16→32 32² /2", 32, [16, 32], 32, 3, 2, 1),
    shape("resnet20 32→32 16²", 32, [32, 32], 16, 3, 1, 1),
    shape("resnet20 64→64 8²", 32, [64, 64], 8, 3, 1, 1),
    shape("resnet20 16→16 32² one image", 1, [16, 16], 32, 3, 1, 1),
    shape("resnet18 3→64 224² 7×7 /2", 8, [3, 64], 224, 7, 2, 1),
    shape("resnet18 64→64 56²", 8, [64, 64], 56, 3, 1, 1),
    shape("resnet18 128→128 28²", 8, [128, 128], 28, 3, 1, 1),
    shape("resnet18 256→256 14²", 8, [256, 256], 14, 3, 1, 1),
    shape("resnet18 512→512 7²", 8, [512, 512], 7, 3, 1, 1),
    shape("resnet18 64→64 56² one image", 1, [64, 64], 56, 3, 1, 1),
    shape("mobilenet 16→96 112² 1×1", 8, [16, 96], 112, 1, 1, 1),
    shape("mobilenet 144→24 56² 1×1", 8, [144, 24], 56, 1, 1, 1),
    shape("mobilenet 960→160 7² 1×1", 8, [960, 160], 7, 1, 1, 1),
    shape("mobilenet 144 56² depthwise", 8, [144, 144], 56, 3, 1, 144),
    shape("mobilenet 96 112² depthwise /2", 8, [96, 96], 112, 3, 2, 96),
];

struct Setup {
    conv: Conv,
    x: Tensor,
    w: Tensor,
    dy: Tensor,
    flops: usize,
}

fn setup(s: &Shape) -> Setup {
    let window = Window {
        auto_pad: AutoPad::Explicit,
        kernel: vec![],
        strides: vec![s.stride; 2],
        dilations: vec![],
        pads: vec![s.kernel / 2; 4],
        ceil: false,
        output: vec![],
    };
    let conv = Conv {
        window,
        groups: s.groups,
        normalises: None,
        clamp: Clamp::NONE,
        layout: Layout::First,
        pairs: false,
    };
    let wave = |dims: &[usize]| {
        let data: Vec<f32> = (0..dims.iter().product()).map(|i| (i as f32 * 0.37).sin()).collect();
        Tensor::from_slice(dims, &data).expect("as many elements as the shape has")
    };
    let x = wave(&[s.batch, s.channels[0], s.size, s.size]);
    let w = wave(&[s.channels[1], s.channels[0] / s.groups, s.kernel, s.kernel]);
    let y = conv.infer(&[Some(&x.meta()), Some(&w.meta())]).expect("sizes that fit").remove(0);
    let flops = 2 * y.len() * w.dims()[1..].iter().product::<usize>();
    Setup { conv, dy: wave(&y.dims), x, w, flops }
}

fn run(bencher: Bencher, flops: usize, op: &dyn Op, inputs: [&Tensor; 2], dims: &[usize]) {
    let metas = inputs.map(Tensor::meta);
    let refs: Vec<Option<&Meta>> = metas.iter().map(Some).collect();
    let mut scratch = Buffer::zeroed(op.scratch(&refs));
    let mut y = Tensor::zeros(DType::F32, dims);
    let x: Vec<Option<View>> = inputs.iter().map(|t| Some(t.view())).collect();
    bencher.counter(ItemsCount::new(flops)).bench_local(|| {
        let mut out: [Option<ViewMut>; 1] = [Some(y.view_mut())];
        op.forward(&mut Cx { scratch: scratch.bytes_mut(), seed: 0 }, &x, &mut out).expect("forward");
    });
}

#[divan::bench(args = SHAPES)]
fn forward(bencher: Bencher, shape: &Shape) {
    let s = setup(shape);
    run(bencher, s.flops, &s.conv, [&s.x, &s.w], s.dy.dims());
}

#[divan::bench(args = SHAPES)]
fn input_grad(bencher: Bencher, shape: &Shape) {
    let s = setup(shape);
    let op = ConvInputGrad::of(s.conv.clone(), Dims::from_slice(s.x.dims()));
    run(bencher, s.flops, &op, [&s.dy, &s.w], s.x.dims());
}

#[divan::bench(args = SHAPES)]
fn weight_grad(bencher: Bencher, shape: &Shape) {
    let s = setup(shape);
    let op = ConvWeightGrad { conv: s.conv.clone(), w: Dims::from_slice(s.w.dims()) };
    run(bencher, s.flops, &op, [&s.dy, &s.x], s.w.dims());
}

fn main() {
    divan::main();
}
