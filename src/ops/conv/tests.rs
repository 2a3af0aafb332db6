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
            normalises: None,
            clamp: Clamp::NONE,
            layout: Layout::First,
            pairs: false,
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
    let conv =
        Conv { window, groups: 1, normalises: None, clamp: Clamp::NONE, layout: Layout::First, pairs: false };
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
    let input = ConvInputGrad::of(conv.clone(), Dims::from_slice(x.dims()));
    let weight = ConvWeightGrad { conv: conv.clone(), w: Dims::from_slice(w.dims()) };
    let (x2, w2) = (wave(x.dims(), 1.7), wave(w.dims(), 0.3));
    let dx = eval(&input, &[Some(&dy), Some(&w)]).unwrap().remove(0);
    let y2 = eval(&conv, &[Some(&x2), Some(&w)]).unwrap().remove(0);
    assert!((dot(&dx, &x2) / dot(&dy, &y2) - 1.0).abs() < 1e-9);
    let dw = eval(&weight, &[Some(&dy), Some(&x)]).unwrap().remove(0);
    let y2 = eval(&conv, &[Some(&x), Some(&w2)]).unwrap().remove(0);
    assert!((dot(&dw, &w2) / dot(&dy, &y2) - 1.0).abs() < 1e-9);
}

/// Sums of many terms go over the positions several times.
#[test]
fn sums_of_many_terms() {
    let (x, w) = (wave(&[1, 7, 8, 3000], 0.7), wave(&[5, 3000, 3, 3], 1.3));
    let (bias, addend) = (wave(&[5], 0.4), wave(&[1, 4, 4, 5], 0.6));
    let conv = Conv { clamp: Clamp { low: -2.0, high: 3.0 }, ..last(3, 2, 1) };
    let y = eval(&conv, &[Some(&x), Some(&w), Some(&bias), Some(&addend)]).unwrap().remove(0);
    // Parts of the channels, one after the other.
    let plain = last(3, 2, 1);
    let mut want = each(&addend, |_, c, y| y + bias.to_f64()[c]).to_f64();
    let xs = x.to_f64();
    for part in 0..20 {
        let some: Vec<f64> = xs.chunks_exact(3000).flat_map(|x| &x[part * 150..][..150]).copied().collect();
        let of = |o: usize| (o * 3000 + part * 150) * 9..(o * 3000 + part * 150 + 150) * 9;
        let v: Vec<f64> = (0..5).flat_map(|o| w.to_f64()[of(o)].to_vec()).collect();
        let x = Tensor::from_slice(&[1, 7, 8, 150], &some).unwrap();
        let v = Tensor::from_slice(&[5, 150, 3, 3], &v).unwrap();
        let y = eval(&plain, &[Some(&x), Some(&v)]).unwrap().remove(0).to_f64();
        want.iter_mut().zip(y).for_each(|(want, y)| *want += y);
    }
    want.iter_mut().for_each(|y| *y = y.clamp(-2.0, 3.0));
    close("Y", &y, &want);
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
        ([5, 24, 14, 14], [24, 4, 3, 3], 6, 2),
        ([3, 40, 20, 20], [40, 8, 3, 3], 5, 1),
        ([2, 64, 7, 7], [80, 64, 1, 1], 1, 1),
        ([3, 24, 30, 31], [80, 24, 1, 1], 1, 1),
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
            output: vec![],
        };
        let conv = Conv {
            window,
            groups,
            normalises: None,
            clamp: Clamp::NONE,
            layout: Layout::First,
            pairs: false,
        };
        let (tx, tw) = (wave(&x, 0.7).cast(DType::F32), wave(&w, 1.3).cast(DType::F32));
        let (_, y) = conv.geometry(&x, &w).unwrap();
        let dy = wave(&y, 0.9).cast(DType::F32);
        let statistics = ConvStatistics::of(conv.last());
        let lx = wave(&Layout::Last.of(&x), 0.7).cast(DType::F32);
        let ldy = wave(&Layout::Last.of(&y), 0.9).cast(DType::F32);
        let (kept, w_dims) = (conv.last(), Dims::from_slice(&w));
        let both = ConvGrads { conv: kept, w: w_dims, adds: false, back: None, sums: false };
        let joins = ConvGrads::can(&both.conv, &Meta::new(DType::F32, lx.dims()), &w);
        let run = || {
            let input = ConvInputGrad::of(conv.clone(), Dims::from_slice(&x));
            let weight = ConvWeightGrad { conv: conv.clone(), w: Dims::from_slice(&w) };
            let both = match joins {
                true => eval(&both, &[Some(&ldy), Some(&tw), Some(&lx), None]).unwrap(),
                false => vec![],
            };
            let apart = [
                eval(&conv, &[Some(&tx), Some(&tw)]).unwrap().remove(0),
                eval(&input, &[Some(&dy), Some(&tw)]).unwrap().remove(0),
                eval(&weight, &[Some(&dy), Some(&tx)]).unwrap().remove(0),
                eval(&statistics, &[Some(&lx), Some(&tw)]).unwrap().remove(2),
            ];
            apart.into_iter().chain(both).collect::<Vec<_>>()
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
        ([5, 24, 34, 30], [24, 4, 3, 3], 6, 1),
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
            let clamp = Clamp { low: -0.5, high: 9.0 };
            let conv = Conv { window, groups, normalises: None, clamp, layout, pairs: false };
            let bias = Tensor::from_slice(&[w[0]], &vec![7.0; w[0]]).unwrap().cast(DType::F32);
            let (x, w) = (wave(&layout.of(&x), 0.7).cast(DType::F32), wave(&w, 1.3).cast(DType::F32));
            let inputs = [&x, &w, &bias].map(Some);
            let y = eval(&conv, &inputs).unwrap().remove(0);
            let got = eval(&ConvStatistics::of(conv), &inputs).unwrap();
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

/// A convolution with its channels last, pads of half the kernel.
fn last(kernel: usize, stride: usize, groups: usize) -> Conv {
    let mut window = Window::of(&crate::ops::Attrs::default()).unwrap();
    (window.strides, window.pads) = (vec![stride; 2], vec![kernel / 2; 4]);
    Conv { window, groups, normalises: None, clamp: Clamp::NONE, layout: Layout::Last, pairs: false }
}

/// `f(element, channel)` of a tensor whose channels are last.
fn each(x: &Tensor, f: impl Fn(usize, usize, f64) -> f64) -> Tensor {
    let c = *x.dims().last().unwrap();
    let data: Vec<f64> = x.to_f64().iter().enumerate().map(|(i, x)| f(i, i % c, *x)).collect();
    Tensor::from_slice(x.dims(), &data).unwrap()
}

fn close(what: &str, got: &Tensor, want: &[f64]) {
    let got = got.to_f64();
    let scale = want.iter().fold(1e-3f64, |m, x| m.max(x.abs()));
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (a, b)) in got.iter().zip(want).enumerate() {
        assert!((a - b).abs() <= 1e-11 * scale, "{what}, element {i}: {a} {b}");
    }
}

/// Convolutions of narrow groups, against those of one group whose weights between groups are zero.
#[test]
fn groups_are_independent() {
    for width in [2, 3, 4, 8, 16] {
        for (groups, kernel, stride, dilation, [rows, positions]) in [
            (2, 3, 1, 1, [7, 7]),
            (5, 3, 1, 1, [9, 26]),
            (3, 3, 2, 1, [15, 12]),
            (7, 3, 2, 1, [6, 11]),
            (3, 5, 1, 1, [8, 9]),
            (3, 1, 1, 1, [4, 5]),
            (3, 2, 3, 1, [9, 10]),
            (3, 3, 1, 2, [9, 14]),
            (2, 3, 1, 9, [5, 6]),
        ] {
            let c = groups * width;
            let mut conv = last(kernel, stride, groups);
            conv.window.pads = vec![kernel / 2 * dilation; 4];
            conv.window.dilations = vec![dilation; 2];
            let one = Conv { groups: 1, ..conv.clone() };
            let x = wave(&[3, rows, positions, c], 0.71);
            let w = wave(&[c, width, kernel, kernel], 1.3);
            let mut all = vec![0.0; c * c * kernel * kernel];
            let own = |o: usize| (o * c + o / width * width) * kernel * kernel;
            let each = width * kernel * kernel;
            for (o, w) in w.to_f64().chunks_exact(each).enumerate() {
                all[own(o)..][..each].copy_from_slice(w);
            }
            let whole = Tensor::from_slice(&[c, c, kernel, kernel], &all).unwrap();
            let y = eval(&one, &[Some(&x), Some(&whole)]).unwrap().remove(0);
            let dy = wave(y.dims(), 0.9);
            let gradients = |conv: &Conv, w: &Tensor, dtype: DType| {
                let input = ConvInputGrad::of(conv.clone(), Dims::from_slice(x.dims()));
                let weight = ConvWeightGrad { conv: conv.clone(), w: Dims::from_slice(w.dims()) };
                let [x, w, dy] = [&x, w, &dy].map(|t| t.cast(dtype));
                let dx = eval(&input, &[Some(&dy), Some(&w)]).unwrap().remove(0);
                [dx, eval(&weight, &[Some(&dy), Some(&x)]).unwrap().remove(0)]
            };
            let [dx, dw] = gradients(&one, &whole, DType::F64).map(|t| t.to_f64());
            let dw: Vec<f64> = (0..c).flat_map(|o| dw[own(o)..][..each].to_vec()).collect();
            for (dtype, tolerance) in [(DType::F64, 1e-11), (DType::F32, 1e-5)] {
                let inputs = [&x, &w].map(|t| t.cast(dtype));
                let got = eval(&conv, &inputs.each_ref().map(Some)).unwrap().remove(0);
                let [got_dx, got_dw] = gradients(&conv, &w, dtype);
                for (what, got, want) in [("Y", got, &y.to_f64()), ("dX", got_dx, &dx), ("dW", got_dw, &dw)] {
                    let scale = want.iter().fold(1e-3f64, |m, x| m.max(x.abs()));
                    let far = got.to_f64().iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                    let case = (groups, width, kernel, stride, dilation);
                    assert!(
                        got.to_f64().len() == want.len() && far <= tolerance * scale,
                        "{what} {case:?}: {far}"
                    );
                }
            }
        }
    }
}

/// A depthwise convolution that computes what it reads, against both convolutions by themselves, on any number of threads.
#[test]
fn expanded_as_it_is_read() {
    let pools: Vec<_> =
        (1..4).map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap()).collect();
    // (images, channels, middle channels, rows, positions, kernel, stride)
    let shapes = [
        (3, 5, 18, 9, 9, 3, 1),
        (2, 16, 96, 33, 30, 3, 2),
        (1, 24, 144, 40, 12, 3, 1),
        (1, 9, 20, 50, 7, 5, 2),
        (2, 7, 130, 7, 7, 3, 1),
        (1, 3, 64, 5, 60, 7, 1),
        (4, 8, 16, 1, 14, 3, 1),
        (1, 8, 33, 14, 1, 3, 2),
        (2, 4, 404, 6, 7, 3, 1),
    ];
    for (n, c, middle, rows, positions, kernel, stride) in shapes {
        let before = Conv { clamp: Clamp { low: 0.0, high: 0.7 }, ..last(1, 1, 1) };
        let conv = Conv { clamp: Clamp { low: -0.4, high: 0.5 }, ..last(kernel, stride, middle) };
        let x = wave(&[n, rows, positions, c], 0.71);
        let (w, bias) = (wave(&[middle, c, 1, 1], 1.3), wave(&[middle], 0.3));
        let v = wave(&[middle, 1, kernel, kernel], 0.9);
        let metas = [&x, &w, &bias].map(|t| Some(t.meta()));
        let metas = metas.each_ref().map(Option::as_ref);
        let name = format!("{c} to {middle}, {rows}×{positions}, {kernel}/{stride}");
        for (a, b) in [(Some(&bias), None), (None, Some(&bias))] {
            let e = eval(&before, &[Some(&x), Some(&w), a]).unwrap().remove(0);
            let y = eval(&conv, &[Some(&e), Some(&v), b]).unwrap().remove(0);
            let joined = ConvExpanded::of((&before, &metas), (&conv, &[None, Some(&v.meta())])).unwrap();
            let run = || eval(&joined, &[Some(&x), Some(&w), a, Some(&v), b]).unwrap().remove(0);
            let got = run();
            close(&name, &got, &y.to_f64());
            for pool in &pools {
                assert_eq!(pool.install(run).bytes(), got.bytes(), "{name}");
            }
        }
        // A residual, or a kernel of several positions in front, is not taken.
        let four = [metas[0], metas[1], None, metas[0]];
        assert!(ConvExpanded::of((&before, &four), (&conv, &[None, Some(&v.meta())])).is_none());
        let wide = wave(&[middle, c, 1, 3], 1.0).meta();
        let wide = [metas[0], Some(&wide)];
        assert!(ConvExpanded::of((&before, &wide), (&conv, &[None, Some(&v.meta())])).is_none());
    }
}

/// What is normalised as it is read, passed back as it is read, and computed in one pass, against one step at a time.
#[test]
fn joined_with_normalisations() {
    // (channels, outputs, extent, kernel, stride, depthwise)
    let shapes = [
        (18, 34, 15, 1, 1, false),
        (40, 7, 23, 1, 1, false),
        (19, 19, 9, 3, 1, true),
        (35, 35, 10, 3, 2, true),
        (17, 17, 11, 3, 2, true),
        (5, 5, 12, 5, 1, true),
        (16, 16, 7, 5, 3, true),
    ];
    for (c, oc, extent, kernel, stride, depthwise) in shapes {
        let conv = last(kernel, stride, if depthwise { c } else { 1 });
        let x = wave(&[3, extent, extent, c], 0.71);
        let w = wave(&[oc, if depthwise { 1 } else { c }, kernel, kernel], 1.3);
        let dims = Dims::from_slice(w.dims());
        let channel = |c: usize, step: f64, base: f64| {
            Tensor::from_slice(
                &[c],
                &wave(&[c], step).to_f64().iter().map(|x| base + x / 3.0).collect::<Vec<_>>(),
            )
            .unwrap()
        };
        let [mean, inv, scale, shift] =
            [(0.3, 0.0), (0.5, 1.4), (0.7, 0.9), (0.9, 0.2)].map(|(step, base)| channel(c, step, base));
        let [m, r, a, b] = [&mean, &inv, &scale, &shift].map(|t| t.to_f64());
        let clamp = Clamp { low: 0.0, high: 0.8 };
        let linear = each(&x, |_, c, x| (x - m[c]) * (a[c] * r[c]) + b[c]);
        let normal = each(&linear, |_, _, x| x.clamp(0.0, 0.8));

        let y = eval(&conv, &[Some(&normal), Some(&w)]).unwrap().remove(0);
        let norm = [&mean, &inv, &scale, &shift].map(Some);
        let mut operands = vec![Some(&x), Some(&w)];
        operands.extend(norm);
        let joined = conv.normalising(clamp);
        let name = format!("{c} to {oc}, {extent}², {kernel}/{stride}");
        close(&format!("Y of {name}"), &eval(&joined, &operands).unwrap()[0], &y.to_f64());
        let dy = wave(y.dims(), 0.37);
        operands[..2].copy_from_slice(&[Some(&dy), Some(&x)]);
        let weight = ConvWeightGrad { conv: joined.clone(), w: dims.clone() };
        let apart = ConvWeightGrad { conv: conv.clone(), w: dims.clone() };
        let dw = eval(&apart, &[Some(&dy), Some(&normal)]).unwrap().remove(0).to_f64();
        close(&format!("dW of {name}"), &eval(&weight, &operands).unwrap()[0], &dw);

        let addend = wave(x.dims(), 0.11);
        for (adds, normalises, back) in [
            (false, false, None),
            (true, false, None),
            (false, true, Some(None)),
            (true, true, Some(Some(Clamp { low: -0.2, high: 0.6 }))),
        ] {
            let own = |seed: f64, base: f64| channel(oc, seed, base);
            let read = wave(y.dims(), 0.53);
            let behind =
                [own(0.2, 1.1), own(0.4, 0.1), own(0.6, 1.3), own(0.8, 0.5), own(1.0, 0.4), own(1.2, 0.1)];
            let [s2, m2, r2, ds, dh, h2] = [0, 1, 2, 3, 4, 5].map(|i| behind[i].to_f64());
            let count = (y.len() / oc) as f64;
            let xs = read.to_f64();
            let passed = match back {
                None => dy.clone(),
                Some(clamp) => each(&dy, |i, c, dz| {
                    let x = xs[i] - m2[c];
                    let z = x * (s2[c] * r2[c]) + h2[c];
                    let dz = if clamp.is_none_or(|k: Clamp<f64>| k.low < z && z < k.high) { dz } else { 0.0 };
                    s2[c] * r2[c] * (dz - dh[c] / count - x * r2[c] * ds[c] / count)
                }),
            };
            let input = ConvInputGrad::of(conv.clone(), Dims::from_slice(x.dims()));
            let mut operands = vec![Some(&passed), Some(&w)];
            operands.extend(adds.then_some(Some(&addend)));
            let dx = eval(&input, &operands).unwrap().remove(0);
            let from = if normalises { &normal } else { &x };
            let dw = eval(&apart, &[Some(&passed), Some(from)]).unwrap().remove(0);

            let conv = if normalises { joined.clone() } else { conv.clone() };
            let both = ConvGrads { conv, w: dims.clone(), adds, back, sums: normalises };
            let mut operands = vec![Some(&dy), Some(&w), Some(&x), adds.then_some(&addend)];
            if normalises {
                operands.extend(norm);
            }
            if let Some(clamp) = back {
                operands.push(Some(&read));
                operands.extend(behind[..if clamp.is_some() { 6 } else { 5 }].iter().map(Some));
            }
            let name = format!("{name}, adds {adds}, normalises {normalises}, {back:?}");
            let made = eval(&both, &operands).unwrap();
            close(&format!("dX of {name}"), &made[0], &dx.to_f64());
            close(&format!("both dW of {name}"), &made[1], &dw.to_f64());
            if normalises {
                let (mut dscale, mut dshift) = (vec![0.0; c], vec![0.0; c]);
                for (i, ((dx, z), x)) in dx.to_f64().iter().zip(linear.to_f64()).zip(x.to_f64()).enumerate() {
                    if 0.0 < z && z < 0.8 {
                        dshift[i % c] += dx;
                        dscale[i % c] += dx * (x - m[i % c]) * r[i % c];
                    }
                }
                close(&format!("dscale of {name}"), &made[2], &dscale);
                close(&format!("dshift of {name}"), &made[3], &dshift);
            }
        }
    }
}

/// Depthwise gradients against the defining sums, for windows of every kind: alone, in one pass, and in one pass from a dY that is
/// computed as it is read, around which there are zeros then.
#[test]
fn depthwise_gradients_are_their_definition() {
    let (n, c, height) = (2, 9, 5);
    let windows = (0..3 * 4 * 2 * 3 * 2 * 3).map(|i: usize| {
        let pads = [[0, 0], [0, 1], [1, 0], [1, 1], [2, 2], [2, 1]][i / 24 % 6];
        (i % 3 + 1, [2, 3, 5, 7][i / 3 % 4], i / 12 % 2 + 1, pads, [4, 7, 18][i / 144])
    });
    for (stride, kernel, dilation, [before, after], width) in windows {
        let name = format!("{kernel} / {stride}, {dilation} apart, {before} and {after} around {width}");
        let mut conv = last(3, stride, c);
        conv.window.pads = vec![1, before, 1, after];
        conv.window.dilations = vec![1, dilation];
        let x = wave(&[n, height, width, c], 0.71);
        let w = wave(&[c, 1, 3, kernel], 1.3);
        let Ok((g, _)) = conv.geometry(x.dims(), w.dims()) else { continue };
        let dy = wave(&[n, g.y[1], g.y[2], c], 0.37);
        let (xs, ws, dys) = (x.to_f64(), w.to_f64(), dy.to_f64());
        let (mut dx, mut dw) = (vec![0.0; xs.len()], vec![0.0; ws.len()]);
        for (at, dy) in dys.iter().enumerate() {
            let (ch, o2, o1) = (at % c, at / c % g.y[2], at / c / g.y[2] % g.y[1]);
            for t in 0..3 * kernel {
                let i1 = (o1 * stride + t / kernel).wrapping_sub(1);
                let i2 = (o2 * stride + t % kernel * dilation).wrapping_sub(before);
                if i1 < height && i2 < width {
                    let from = ((at / c / g.y[2] / g.y[1] * height + i1) * width + i2) * c + ch;
                    dx[from] += dy * ws[ch * 3 * kernel + t];
                    dw[ch * 3 * kernel + t] += dy * xs[from];
                }
            }
        }
        let input = ConvInputGrad::of(conv.clone(), Dims::from_slice(x.dims()));
        close(&format!("dX of {name}"), &eval(&input, &[Some(&dy), Some(&w)]).unwrap()[0], &dx);
        let ones = Tensor::from_slice(&[c], &vec![1.0; c]).unwrap();
        let zeros = Tensor::from_slice(&[c], &vec![0.0; c]).unwrap();
        for back in [None, Some(None)] {
            let conv = conv.clone();
            let both = ConvGrads { conv, w: Dims::from_slice(w.dims()), adds: false, back, sums: false };
            let mut operands = vec![Some(&dy), Some(&w), Some(&x), None];
            if back.is_some() {
                operands.extend([&dy, &ones, &zeros, &ones, &zeros, &zeros].map(Some));
            }
            let made = eval(&both, &operands).unwrap();
            close(&format!("dX in one pass of {name}, {back:?}"), &made[0], &dx);
            close(&format!("dW in one pass of {name}, {back:?}"), &made[1], &dw);
        }
    }
}

/// Results of many tasks are those of each image by itself.
#[test]
fn large_results() {
    let images = 5;
    for (conv, c, oc, extent) in
        [(last(1, 1, 1), 8, 40, 110), (last(3, 1, 1), 3, 40, 110), (last(3, 1, 40), 40, 40, 110)]
    {
        let data = |dims: &[usize]| {
            let data: Vec<f32> = wave(dims, 0.7).to_f64().iter().map(|x| *x as f32).collect();
            Tensor::from_slice(dims, &data).unwrap()
        };
        let x = data(&[images, extent, extent, c]);
        let k = conv.window.pads[0] * 2 + 1;
        let w = data(&[oc, if conv.groups == 1 { c } else { 1 }, k, k]);
        let y = eval(&conv, &[Some(&x), Some(&w)]).unwrap().remove(0).to_f64();
        let back = ConvInputGrad::of(conv.clone(), Dims::from_slice(&[images, extent, extent, oc]));
        let turned = data(&[oc, if conv.groups == 1 { oc } else { 1 }, k, k]);
        let dy = data(&[images, extent, extent, oc]);
        let dx = eval(&back, &[Some(&dy), Some(&turned)]).unwrap().remove(0).to_f64();
        let both = ConvGrads {
            conv: conv.clone(),
            w: Dims::from_slice(turned.dims()),
            adds: false,
            back: None,
            sums: false,
        };
        let together = (k == 1 || conv.groups > 1)
            .then(|| eval(&both, &[Some(&dy), Some(&turned), Some(&dy), None]).unwrap().remove(0).to_f64());
        for image in 0..images {
            let cut = |t: &Tensor| {
                let dims = [&[1], &t.dims()[1..]].concat();
                let size: usize = dims.iter().product();
                let data: Vec<f32> = t.to_f64()[image * size..][..size].iter().map(|x| *x as f32).collect();
                Tensor::from_slice(&dims, &data).unwrap()
            };
            let one = eval(&conv, &[Some(&cut(&x)), Some(&w)]).unwrap().remove(0).to_f64();
            assert!(y[image * one.len()..][..one.len()] == one, "Y of image {image}");
            let back = ConvInputGrad::of(back.conv.clone(), Dims::from_slice(&[1, extent, extent, oc]));
            let one = eval(&back, &[Some(&cut(&dy)), Some(&turned)]).unwrap().remove(0).to_f64();
            assert!(dx[image * one.len()..][..one.len()] == one, "dX of image {image}");
            if let Some(together) = &together {
                assert!(together[image * one.len()..][..one.len()] == one, "both: dX of image {image}");
            }
        }
    }
}
