use super::*;
use crate::ops::eval;
use crate::tensor::Tensor;

#[test]
fn conv_cases() {
    cases().iter().for_each(crate::ops::cases::check);
}

fn wave(dims: &[usize], step: f64) -> Tensor {
    let data: Vec<f64> = (0..dims.iter().product()).map(|i| (i as f64 * step).sin()).collect();
    Tensor::from_slice(dims, &data).unwrap()
}

/// Forward against the defining sum; the gradients follow by the cases' finite differences.
#[test]
fn conv_is_its_definition() {
    for case in cases() {
        let (attrs, dims) = case.attributes_and_dims();
        let conv = Conv {
            window: Window::of(attrs).unwrap(),
            groups: attrs.int_or("group", 1).unwrap() as usize,
            clamp: Clamp::NONE,
            layout: Layout::First,
        };
        let (x, w) = (wave(&dims[0], 0.7), wave(&dims[1], 1.3));
        let y = eval(&conv, &[Some(&x), Some(&w)]).unwrap().remove(0);
        let (g, _) = conv.geometry(x.dims(), w.dims()).unwrap();
        let (xs, ws, ys) = (x.to_f64(), w.to_f64(), y.to_f64());
        let (cg, og) = (g.c / g.groups, g.oc / g.groups);
        let size = |d: [usize; 3]| d.iter().product::<usize>();
        let split = |i: usize, d: [usize; 3]| [i / (d[1] * d[2]), i / d[2] % d[1], i % d[2]];
        for (at, got) in ys.iter().enumerate() {
            let (n, o, p) = (at / size(g.y) / g.oc, at / size(g.y) % g.oc, at % size(g.y));
            let pos = split(p, g.y);
            let mut want = 0.0;
            for (c, t) in (0..cg).flat_map(|c| (0..size(g.k)).map(move |t| (c, t))) {
                let tap = split(t, g.k);
                let i: [usize; 3] = std::array::from_fn(|d| {
                    (pos[d] * g.stride[d] + tap[d] * g.dilation[d]).wrapping_sub(g.pad[d])
                });
                if (0..3).all(|d| i[d] < g.x[d]) {
                    let from = (n * g.c + o / og * cg + c) * size(g.x);
                    want +=
                        xs[from + (i[0] * g.x[1] + i[1]) * g.x[2] + i[2]] * ws[(o * cg + c) * size(g.k) + t];
                }
            }
            assert!((want - got).abs() < 1e-10, "{}: {want} {got}", case.name);
        }
    }
}

/// Layers of many weights and few positions have kernels of their own; too large for finite differences.
#[test]
fn many_weights_few_positions() {
    let (x, w) = (wave(&[1, 370, 8, 7], 0.7), wave(&[360, 370, 3, 3], 1.3));
    let pads = crate::ops::window::AutoPad::SameUpper;
    let window = Window { auto_pad: pads, ..Window::of(&crate::ops::Attrs::default()).unwrap() };
    let conv = Conv { window, groups: 1, clamp: Clamp::NONE, layout: Layout::First };
    // The same convolution in parts that are small enough for the others.
    let y = eval(&conv, &[Some(&x), Some(&w)]).unwrap().remove(0);
    let part = Tensor::from_slice(&[2, 370, 3, 3], &w.to_f64()[358 * 3330..]).unwrap();
    let last = eval(&conv, &[Some(&x), Some(&part)]).unwrap().remove(0);
    let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{a} {b}");
    for (a, b) in y.to_f64()[358 * 56..].iter().zip(last.to_f64()) {
        close(*a, b);
    }
    // Both gradients are the forward pass's transposes.
    let dy = wave(&[1, 360, 8, 7], 0.9);
    let dot = |a: &Tensor, b: &Tensor| a.to_f64().iter().zip(b.to_f64()).map(|(a, b)| a * b).sum::<f64>();
    let input = ConvInputGrad { conv: conv.clone(), x: Dims::from_slice(x.dims()) };
    let weight = ConvWeightGrad { conv: conv.clone(), w: Dims::from_slice(w.dims()), norm: None };
    let (x2, w2) = (wave(x.dims(), 1.7), wave(w.dims(), 0.3));
    let dx = eval(&input, &[Some(&dy), Some(&w)]).unwrap().remove(0);
    let y2 = eval(&conv, &[Some(&x2), Some(&w)]).unwrap().remove(0);
    assert!((dot(&dx, &x2) / dot(&dy, &y2) - 1.0).abs() < 1e-9);
    let dw = eval(&weight, &[Some(&dy), Some(&x)]).unwrap().remove(0);
    let y2 = eval(&conv, &[Some(&x), Some(&w2)]).unwrap().remove(0);
    assert!((dot(&dw, &w2) / dot(&dy, &y2) - 1.0).abs() < 1e-9);
}

/// Normalising the input while it is read gives what a normalised input gives, to the bit.
#[test]
fn inputs_are_normalised_while_they_are_read() {
    for (x, k, stride, dilation, layout) in [
        ([2, 20, 9, 8], [3, 3], 1, 1, Layout::First),
        ([3, 20, 9, 8], [3, 3], 2, 1, Layout::Last),
        ([40, 5, 12, 30], [3, 2], 1, 2, Layout::Last),
    ] {
        let window = Window {
            auto_pad: crate::ops::window::AutoPad::SameUpper,
            kernel: vec![],
            strides: vec![stride; 2],
            dilations: vec![dilation; 2],
            pads: vec![],
            ceil: false,
        };
        let c = x[1];
        let x = layout.of(&x);
        let conv = Conv { window, groups: c, clamp: Clamp::NONE, layout };
        let w = Dims::from_slice(&[c, 1, k[0], k[1]]);
        let (_, y) = conv.geometry(&x, &w).unwrap();
        let single = |dims: &[usize], step: f64| wave(dims, step).cast(DType::F32);
        let (x, dy) = (single(&x, 0.7), single(&y, 0.9));
        let [mean, inv, scale, shift] = [0.3, 0.5, 0.11, 0.2].map(|step| single(&[c], step));
        let clamp = Clamp { low: -0.1, high: 0.3 };
        let of = |t: &Tensor| t.to_f64().iter().map(|x| *x as f32).collect::<Vec<f32>>();
        let (m, i, s, b) = (of(&mean), of(&inv), of(&scale), of(&shift));
        let inner = if layout == Layout::Last { 1 } else { x.dims()[2] * x.dims()[3] };
        let normal = |(at, x): (usize, f32)| {
            let j = at / inner % c;
            clamp.to::<f32>().of((x - m[j]) * ((s[j] as f64 * i[j] as f64) as f32) + b[j])
        };
        let normal: Vec<f32> = of(&x).into_iter().enumerate().map(normal).collect();
        let normal = Tensor::from_slice(x.dims(), &normal).unwrap();
        let op = |norm| ConvWeightGrad { conv: conv.clone(), w: w.clone(), norm };
        let want = eval(&op(None), &[Some(&dy), Some(&normal)]).unwrap().remove(0);
        let inputs = [&dy, &x, &mean, &inv, &scale, &shift].map(Some);
        let got = eval(&op(Some(clamp)), &inputs).unwrap().remove(0);
        assert_eq!(want.bytes(), got.bytes());
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    let pools: Vec<_> =
        (1..5).map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap()).collect();
    for (x, w, groups, stride) in [
        ([3, 16, 32, 32], [16, 16, 3, 3], 1, 1),
        ([1, 3, 40, 41], [16, 3, 3, 3], 1, 2),
        ([9, 32, 16, 16], [64, 32, 3, 3], 1, 2),
        ([5, 24, 14, 14], [24, 1, 3, 3], 24, 1),
        ([2, 64, 7, 7], [80, 64, 1, 1], 1, 1),
        ([3, 64, 8, 8], [70, 64, 3, 3], 1, 1),
        ([2, 370, 8, 8], [360, 370, 3, 3], 1, 1),
    ] {
        let window = Window {
            auto_pad: crate::ops::window::AutoPad::SameUpper,
            kernel: vec![],
            strides: vec![stride; 2],
            dilations: vec![],
            pads: vec![],
            ceil: false,
        };
        let conv = Conv { window, groups, clamp: Clamp::NONE, layout: Layout::First };
        let (tx, tw) = (wave(&x, 0.7).cast(DType::F32), wave(&w, 1.3).cast(DType::F32));
        let (_, y) = conv.geometry(&x, &w).unwrap();
        let dy = wave(&y, 0.9).cast(DType::F32);
        let statistics = ConvStatistics { conv: conv.last() };
        let lx = wave(&Layout::Last.of(&x), 0.7).cast(DType::F32);
        let run = || {
            let input = ConvInputGrad { conv: conv.clone(), x: Dims::from_slice(&x) };
            let weight = ConvWeightGrad { conv: conv.clone(), w: Dims::from_slice(&w), norm: None };
            [
                eval(&conv, &[Some(&tx), Some(&tw)]).unwrap().remove(0),
                eval(&input, &[Some(&dy), Some(&tw)]).unwrap().remove(0),
                eval(&weight, &[Some(&dy), Some(&tx)]).unwrap().remove(0),
                eval(&statistics, &[Some(&lx), Some(&tw)]).unwrap().remove(2),
            ]
        };
        let first = run();
        for pool in &pools {
            let again = pool.install(run);
            assert!(first.iter().zip(&again).all(|(a, b)| a.bytes() == b.bytes()), "{x:?} {w:?}");
        }
    }
}

/// The same results, and their mean and variance, whether these are gathered from blocks or afterwards.
#[test]
fn statistics_are_of_the_results() {
    for (x, w, groups, stride) in [
        ([3, 16, 32, 32], [16, 16, 1, 1], 1, 1),
        ([2, 3, 60, 61], [40, 3, 3, 3], 1, 2),
        ([9, 32, 16, 16], [64, 32, 3, 3], 1, 1),
        ([5, 24, 34, 30], [24, 1, 3, 3], 24, 1),
        ([2, 64, 7, 7], [800, 64, 1, 1], 1, 1),
        ([0, 4, 7, 7], [8, 4, 1, 1], 1, 1),
    ] {
        for layout in [Layout::First, Layout::Last] {
            let pads = crate::ops::window::AutoPad::SameUpper;
            let window = Window {
                auto_pad: pads,
                strides: vec![stride; 2],
                ..Window::of(&crate::ops::Attrs::default()).unwrap()
            };
            let conv = Conv { window, groups, clamp: Clamp { low: -0.5, high: 9.0 }, layout };
            let bias = Tensor::from_slice(&[w[0]], &vec![7.0; w[0]]).unwrap().cast(DType::F32);
            let (x, w) = (wave(&layout.of(&x), 0.7).cast(DType::F32), wave(&w, 1.3).cast(DType::F32));
            let inputs = [&x, &w, &bias].map(Some);
            let y = eval(&conv, &inputs).unwrap().remove(0);
            let got = eval(&ConvStatistics { conv }, &inputs).unwrap();
            assert_eq!(y.bytes(), got[0].bytes());
            let c = w.dims()[0];
            let inner = if layout == Layout::Last { 1 } else { y.dims()[2] * y.dims()[3] };
            let (mut sums, mut squares) = (vec![0.0; c], vec![0.0; c]);
            let count = (y.to_f64().len() / c) as f64;
            for (i, y) in y.to_f64().iter().enumerate() {
                sums[i / inner % c] += y;
                squares[i / inner % c] += y * y;
            }
            for (c, (mean, variance)) in got[1].to_f64().iter().zip(got[2].to_f64()).enumerate() {
                let want = if count > 0.0 { sums[c] / count } else { 0.0 };
                assert!((mean - want).abs() < 1e-5, "{mean} {want}");
                let want = if count > 0.0 { squares[c] / count - want * want } else { 0.0 };
                assert!((variance - want).abs() < 1e-5 * (1.0 + want), "{variance} {want}");
            }
        }
    }
}
