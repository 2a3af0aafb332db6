use super::*;
use crate::kernels::half::Half;
use crate::ops::cases::Case;
use crate::ops::half::tests::puts_out_rounded;
use crate::ops::{Attr, Attrs, eval};
use crate::tensor::Tensor;

pub(in crate::ops) fn cases() -> Vec<Case> {
    let running = |case: Case, c: usize| {
        let mean: Vec<f64> = (0..c).map(|i| 0.3 * i as f64 - 0.2).collect();
        let var: Vec<f64> = (0..c).map(|i| 0.5 + 0.25 * i as f64).collect();
        case.fixed(Tensor::from_slice(&[c], &mean).unwrap()).fixed(Tensor::from_slice(&[c], &var).unwrap())
    };
    let case = |opset: i64, dims: &[usize], c: usize| {
        running(Case::new("BatchNormalization", opset).input(dims).within(&[c], 0.5, 1.5).input(&[c]), c)
    };
    let fused = |name: &str, (low, high): (f64, f64), dims: &[usize], c: usize| {
        let op = BatchNormalization {
            layout: Layout::First,
            epsilon: 1e-5,
            momentum: 0.9,
            spatial: true,
            training: false,
            unbiased: false,
            follow: false,
            given: false,
            puts_out: PutOut::Whole,
            clamp: Clamp { low, high },
        };
        running(Case::of(op).named(name).input(dims).within(&[c], 0.5, 1.5).input(&[c]), c)
    };
    let (relu, relu6) = ((0.0, f64::INFINITY), (-0.4, 0.6));
    vec![
        fused("relu", relu, &[3, 2, 4, 5], 2),
        fused("relu, residual", relu, &[3, 2, 4, 5], 2).input(&[3, 2, 4, 5]),
        fused("training, relu", relu, &[3, 2, 4, 5], 2).mode(Mode::TRAIN),
        fused("training, clamp", relu6, &[3, 2, 23, 29], 2).mode(Mode::TRAIN),
        fused("training, relu, residual", relu, &[3, 2, 4, 5], 2).input(&[3, 2, 4, 5]).mode(Mode::TRAIN),
        fused("training, residual", (f64::NEG_INFINITY, f64::INFINITY), &[3, 2, 20], 2)
            .input(&[3, 2, 20])
            .mode(Mode::TRAIN),
        fused("training, clamp, rows", relu6, &[300, 20], 20).mode(Mode::TRAIN).tolerance(1e-5),
        fused("training, clamp, residual, rows", relu6, &[301, 20], 20)
            .input(&[301, 20])
            .mode(Mode::TRAIN)
            .tolerance(1e-5),
        fused("training, clamp, long rows", relu6, &[7, 600], 600).mode(Mode::TRAIN),
        fused("training, clamp, residual, long rows", relu6, &[130, 700], 700)
            .input(&[130, 700])
            .mode(Mode::TRAIN)
            .tolerance(1e-5),
        case(9, &[1000, 140], 140).named("training, many rows").mode(Mode::TRAIN).tolerance(1e-5),
        case(15, &[2, 3, 5, 4], 3),
        case(15, &[3, 2, 23, 29], 2).named("long channels"),
        case(7, &[4, 3], 3).named("dense").float("epsilon", 1e-3),
        case(9, &[5], 1).named("rank 1"),
        case(7, &[3, 2, 2], 4).named("not spatial").int("spatial", 0),
        // Parameters as ONNX has them then: in the shape of a sample.
        Case::new("BatchNormalization", 7)
            .named("not spatial, of a sample's shape")
            .input(&[3, 2, 2])
            .within(&[2, 2], 0.5, 1.5)
            .input(&[2, 2])
            .fixed(Tensor::from_slice(&[2, 2], &[0.1, -0.2, 0.3, 0.0]).unwrap())
            .fixed(Tensor::from_slice(&[2, 2], &[0.5, 0.7, 1.5, 1.0]).unwrap())
            .int("spatial", 0),
        case(15, &[3, 2, 4, 5], 2).named("training").mode(Mode::TRAIN),
        case(15, &[3, 2, 23, 29], 2).named("training, long channels").mode(Mode::TRAIN),
        case(9, &[6, 70], 70).named("training, dense").mode(Mode::TRAIN),
        case(7, &[4, 2, 2], 4).named("training, not spatial").int("spatial", 0).mode(Mode::TRAIN),
        case(14, &[3, 2, 4], 2).named("training form evaluated").int("training_mode", 1).mode(Mode::EVAL),
        case(14, &[3, 2, 4], 2).named("of the file").int("training_mode", 1).outputs(3).forward_only(),
        case(7, &[3, 2, 4], 2).named("five outputs").outputs(5).forward_only(),
        case(15, &[0, 2, 4], 2).named("empty").forward_only(),
        case(15, &[0, 2, 4], 2).named("empty, training").mode(Mode::TRAIN).forward_only(),
    ]
}

fn op(momentum: f32, mode: Option<Mode>) -> Arc<dyn Op> {
    let mut attrs = Attrs::default();
    attrs.0.insert("momentum".into(), Attr::Float(momentum));
    attrs.0.insert("training_mode".into(), Attr::Int(1));
    let spec =
        Spec { domain: "", op_type: "BatchNormalization", opset: 15, attrs: &attrs, inputs: 5, outputs: 3 };
    let op = BatchNormalization::parse(&spec).unwrap();
    mode.and_then(|m| op.in_mode(m)).unwrap_or(op)
}

fn inputs() -> Vec<Tensor> {
    let t = |dims: &[usize], x: &[f32]| Tensor::from_slice(dims, x).unwrap();
    vec![t(&[4, 1], &[1., 2., 3., 6.]), t(&[1], &[1.]), t(&[1], &[0.]), t(&[1], &[1.]), t(&[1], &[2.])]
}

#[test]
fn running_statistics_follow_the_batch() {
    let x = inputs();
    let refs: Vec<Option<&Tensor>> = x.iter().map(Some).collect();
    // Batch mean 3, population variance 3.5, unbiased 14/3.
    let y = eval(op(0.75, None).as_ref(), &refs).unwrap();
    assert_eq!((y[1].to_f64()[0], y[2].to_f64()[0]), (1.5, 2.375));
    let y = eval(op(0.75, Some(Mode::TRAIN)).as_ref(), &refs).unwrap();
    assert!((y[2].to_f64()[0] - (1.5 + 14.0 / 12.0)).abs() < 1e-6);
    let y = eval(op(0.75, Some(Mode::EVAL)).as_ref(), &refs).unwrap();
    assert_eq!((y[1].to_f64()[0], y[2].to_f64()[0]), (1.0, 2.0));
    let odd = op(1.0, Some(Mode::TRAIN));
    let y = eval(odd.as_ref(), &refs).unwrap();
    assert!((y[1].to_f64()[0] - 1.2).abs() < 1e-6 && odd.remark().is_some());
}

#[test]
fn state_is_updated_in_its_buffer_and_kept_when_not_finite() {
    let mut x = inputs();
    let op = op(0.75, Some(Mode::TRAIN));
    for (first, expected) in [(1.0f32, (1.5, 1.5 + 14.0 / 12.0)), (f32::NAN, (1.0, 2.0))] {
        x[0].get_mut::<f32>().unwrap()[0] = first;
        let (mut y, mut mean, mut var) = (x[0].clone(), x[3].clone(), x[4].clone());
        let mut scratch = crate::tensor::Buffer::zeroed(64);
        let views = [None, Some(x[1].view()), Some(x[2].view()), None, None];
        let mut outs = [Some(y.view_mut()), Some(mean.view_mut()), Some(var.view_mut())];
        op.forward(&mut Cx { scratch: scratch.bytes_mut(), seed: 0 }, &views, &mut outs).unwrap();
        assert!((mean.to_f64()[0] - expected.0).abs() < 1e-6, "{first}");
        assert!((var.to_f64()[0] - expected.1).abs() < 1e-6, "{first}");
    }
}

#[test]
fn a_large_mean_costs_no_digits() {
    let data: Vec<f32> = (0..4096).map(|i| 10_000.0 + (i % 2) as f32).collect();
    let d = Channels { n: 2, c: 2, s: 1024 };
    let (mut mean, mut var) = ([0f32; 2], [0f32; 2]);
    norm::channel_stats(&data, d, &mut mean, &mut var, &mut []);
    assert_eq!((mean, var), ([10_000.5; 2], [0.25; 2]));
}

#[test]
fn channels_in_rows_as_in_planes() {
    // (planes: n, c, s; rows: n·s, 1 row of c)
    for (n, c, s) in [(3, 5, 7), (2, 16, 500), (2, 96, 900), (3, 300, 60), (2, 513, 200)] {
        let value =
            |n: usize, c: usize, s: usize| ((n * 31 + c * 17 + s * 3) as f32 * 0.7).sin() + 20.0 * c as f32;
        let planes: Vec<f32> = (0..n * c * s).map(|i| value(i / (c * s), i / s % c, i % s)).collect();
        let rows: Vec<f32> = (0..n * c * s).map(|i| value(i / (c * s), i % c, i / c % s)).collect();
        let stats = |x: &[f32], d: Channels| {
            let (mut mean, mut var) = (vec![0f32; c], vec![0f32; c]);
            norm::channel_stats(x, d, &mut mean, &mut var, &mut vec![f64::NAN; d.partials()]);
            (mean, var)
        };
        let a = stats(&planes, Channels { n, c, s });
        let b = stats(&rows, Channels { n: n * s, c, s: 1 });
        for (a, b) in a.0.iter().zip(&b.0).chain(a.1.iter().zip(&b.1)) {
            assert!((a - b).abs() <= 1e-5 * a.abs().max(1.0), "{n} {c} {s}: {a} {b}");
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    let pools: Vec<_> =
        (1..5).map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap()).collect();
    for (n, c) in [(9000, 16), (700, 300), (333, 1280)] {
        let wave = |n: usize, k: f32| -> Vec<f32> { (0..n).map(|i| (i as f32 * k).sin()).collect() };
        let t = |dims: &[usize], k: f32| Tensor::from_slice(dims, &wave(dims.iter().product(), k)).unwrap();
        let d = Channels { n, c, s: 1 };
        let clamp = Clamp { low: 0.0, high: 0.9 };
        let (x, dy, mean, inv) = (t(&[n, c], 0.7), t(&[n, c], 0.3), t(&[c], 0.2), t(&[c], 0.1));
        let run = || {
            let forward = op(0.9, Some(Mode::TRAIN));
            let y = eval(forward.as_ref(), &[&x, &mean, &inv, &mean, &inv].map(Some)).unwrap();
            let op = BatchNormParamGrad { channels: d, clamp };
            let masked = eval(&op, &[&x, &dy, &mean, &inv, &mean, &inv].map(Some)).unwrap();
            let both = eval(&op, &[&x, &dy, &mean, &inv, &mean, &inv, &y[0]].map(Some)).unwrap();
            let sum = eval(&ChannelSum { channels: d }, &[Some(&dy)]).unwrap();
            [y, masked, both, sum].concat()
        };
        let first = run();
        for pool in &pools {
            let again = pool.install(run);
            assert!(first.iter().zip(&again).all(|(a, b)| a.bytes() == b.bytes()), "{n} {c}");
        }
    }
}

/// In either form, with an activation and a residual, and of what is rounded already.
#[test]
fn results_are_rounded() {
    let of = |given: bool| BatchNormalization {
        layout: Layout::Last,
        epsilon: 1e-5,
        momentum: 0.9,
        spatial: true,
        training: true,
        unbiased: false,
        follow: false,
        given,
        puts_out: PutOut::Whole,
        clamp: Clamp { low: 0.0, high: 0.9 },
    };
    let wave = |dims: &[usize], step: f64| {
        let data: Vec<f32> =
            (0..dims.iter().product()).map(|i: usize| (1.2 + (i as f64 * step).sin()) as f32).collect();
        Tensor::from_slice(dims, &data).unwrap()
    };
    for (n, c) in [(9000, 16), (901, 24), (700, 300), (333, 1280), (7, 3)] {
        let (x, residual) = (wave(&[n, 1, c], 0.7), wave(&[n, 1, c], 0.3));
        let one = [0.2, 0.4, 0.6, 0.8].map(|step| wave(&[c], step));
        let half = [DType::BF16, DType::F16].map(|to| x.cast(to));
        for x in [&x, &half[0], &half[1]] {
            for (given, residual) in [(true, None), (true, Some(&residual)), (false, None)] {
                if !given && Half::of(x.dtype()).is_some() {
                    continue;
                }
                let mut operands = vec![Some(x)];
                operands.extend(one.iter().map(Some));
                operands.extend(one[..if given { 2 } else { 0 }].iter().map(Some));
                operands.extend(residual.map(Some));
                let op = of(given);
                assert!(puts_out_rounded(&format!("{n} rows of {c}"), &op, &operands));
                let both = op.rounding(DType::BF16).unwrap();
                let got = eval(both.as_ref(), &operands).unwrap();
                assert!(got[5].bytes() == got[0].cast(DType::BF16).bytes());
            }
        }
    }
}
