use super::*;
use crate::kernels::elementwise::Clamp;
use crate::kernels::layout::Layout;
use crate::kernels::matrix::by_blocks;
use crate::kernels::norm::{Channels, GroupNorm, RowNorm, Stat};
use crate::ops::attention::{FusedAttention, FusedAttentionGrad};
use crate::ops::batch_norm::{BatchNormInputGrad, BatchNormParamGrad, ChannelParamGrad};
use crate::ops::conv::{Conv, ConvGrads, ConvInputGrad, ConvStatistics, ConvWeightGrad};
use crate::ops::matmul::{Gemm, MatMul, MatMulAs};
use crate::ops::norm::{GroupNormInputGrad, GroupNormSums, RowNormInputGrad};
use crate::ops::unary::{Gelu, Unary, UnaryGrad};
use crate::ops::window::Window;
use crate::ops::{Attrs, eval};
use crate::tensor::Tensor;

#[test]
fn there_and_back() {
    let x: Vec<f32> = (0..70_000).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
    let x = Tensor::from_slice(&[70, 1000], &x).unwrap();
    for to in [DType::BF16, DType::F16] {
        let narrow = eval(&Narrow { to }, &[Some(&x)]).unwrap().remove(0);
        assert_eq!((narrow.dtype(), narrow.bytes().len()), (to, 2 * x.len()));
        assert_eq!(narrow.bytes(), x.cast(to).bytes());
        let dims = Dims::from_slice(&[1000, 70]);
        let wide = eval(&Widen { dims }, &[Some(&narrow)]).unwrap().remove(0);
        assert_eq!(wide.dims(), [1000, 70]);
        assert_eq!(wide.bytes(), x.cast(to).cast(DType::F32).bytes());
        assert!(eval(&Narrow { to }, &[Some(&narrow)]).is_err());
        assert!(eval(&Widen { dims: Dims::new() }, &[Some(&narrow)]).is_err());
    }
    assert!(eval(&Narrow { to: DType::F32 }, &[Some(&x)]).is_err());
    assert!(eval(&Widen { dims: Dims::from_slice(&[70, 1000]) }, &[Some(&x)]).is_err());
}

fn wave(dims: &[usize], step: f32) -> Tensor {
    let data: Vec<f32> = (0..dims.iter().product()).map(|i| (i as f32 * step).sin()).collect();
    Tensor::from_slice(dims, &data).unwrap()
}

/// What an operator that widens as it reads makes of half precision is what it makes of widened copies, bit by bit.
fn reads(what: &str, op: &dyn Op, operands: &[Option<&Tensor>]) {
    [DType::BF16, DType::F16].iter().for_each(|to| reads_type(what, op, operands, *to));
}

fn reads_type(what: &str, op: &dyn Op, operands: &[Option<&Tensor>], to: DType) {
    let metas: Vec<Option<Meta>> = operands.iter().map(|t| t.map(Tensor::meta)).collect();
    let metas: Vec<Option<&Meta>> = metas.iter().map(Option::as_ref).collect();
    let rounded = |i: usize| to == DType::BF16 && (op.rounds(&metas, i) || op.takes_rounded(&metas, i));
    let halves: Vec<Option<Tensor>> = operands
        .iter()
        .enumerate()
        .map(|(i, t)| t.filter(|_| op.reads_half(&metas, i) || rounded(i)).map(|t| t.cast(to)))
        .collect();
    if to == DType::F16 && halves.iter().all(Option::is_none) {
        return;
    }
    assert!(halves.iter().any(Option::is_some), "{what} reads no half precision");
    let wide: Vec<Option<Tensor>> = halves.iter().map(|t| t.as_ref().map(|t| t.cast(DType::F32))).collect();
    let run = |read: &[Option<Tensor>]| {
        let all: Vec<Option<&Tensor>> = read.iter().zip(operands).map(|(r, o)| r.as_ref().or(*o)).collect();
        eval(op, &all).unwrap()
    };
    let (got, want) = (run(&halves), run(&wide));
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        assert!(got.dtype() == want.dtype() && got.bytes() == want.bytes(), "{what}, output {i}, {to}");
    }
}

/// What an operator puts out rounded, if it does, is what it puts out otherwise, rounded.
pub(in crate::ops) fn puts_out_rounded(what: &str, op: &dyn Op, operands: &[Option<&Tensor>]) -> bool {
    let whole = eval(op, operands).unwrap();
    let mut any = false;
    for to in [DType::BF16, DType::F16] {
        if let Some(rounding) = op.halved(0, to) {
            let got = eval(rounding.as_ref(), operands).unwrap();
            assert!(rounding.in_place().is_empty() && got[0].dtype() == to, "{what}, {to}");
            assert!(got[0].bytes() == whole[0].cast(to).bytes(), "{what}, {to}");
            any = true;
        }
    }
    any
}

/// A convolution with its channels last.
fn last(strides: &[usize], pads: &[usize], groups: usize) -> Conv {
    let mut window = Window::of(&Attrs::default()).unwrap();
    (window.strides, window.pads) = (strides.to_vec(), pads.to_vec());
    Conv { window, groups, normalises: None, clamp: Clamp::NONE, layout: Layout::Last, pairs: false }
}

/// X and W in ONNX's order; groups, stride, pads.
type Shape = (&'static [usize], &'static [usize], usize, usize, usize);
const SHAPES: &[Shape] = &[
    (&[3, 16, 32, 32], &[16, 16, 3, 3], 1, 1, 1),
    (&[3, 16, 10, 10], &[16, 16, 3, 3], 1, 1, 0),
    (&[2, 9, 6, 6], &[12, 9, 3, 3], 1, 1, 2),
    (&[1, 3, 40, 41], &[16, 3, 3, 3], 1, 2, 1),
    (&[3, 3, 30, 31], &[64, 3, 7, 7], 1, 2, 3),
    (&[3, 3, 31, 30], &[64, 3, 7, 7], 1, 2, 3),
    (&[2, 1, 12, 26], &[10, 1, 5, 5], 1, 2, 2),
    (&[2, 5, 20, 18], &[16, 5, 3, 2], 1, 4, 0),
    (&[2, 3, 300], &[8, 3, 4], 1, 2, 1),
    (&[9, 32, 16, 16], &[64, 32, 3, 3], 1, 2, 1),
    (&[40, 17, 9, 8], &[18, 17, 3, 3], 1, 2, 1),
    (&[2, 18, 60, 70], &[20, 18, 5, 3], 1, 1, 2),
    (&[2, 128, 14, 14], &[256, 128, 3, 3], 1, 2, 1),
    (&[2, 100, 9, 9], &[96, 100, 1, 1], 1, 2, 0),
    (&[2, 36, 5, 5], &[34, 18, 3, 3], 2, 1, 1),
    (&[2, 256, 7, 7], &[256, 256, 1, 1], 1, 1, 0),
    (&[2, 370, 8, 8], &[360, 370, 3, 3], 1, 1, 1),
    (&[3, 64, 9, 10], &[70, 64, 3, 3], 1, 1, 0),
    (&[2, 18, 600], &[16, 18, 3], 1, 1, 1),
    (&[1, 17, 4, 5, 6], &[16, 17, 3, 2, 3], 1, 1, 1),
    (&[2, 20, 9, 9, 9], &[16, 20, 3, 3, 3], 1, 2, 1),
    (&[5, 24, 14, 14], &[24, 1, 3, 3], 24, 1, 1),
    (&[2, 19, 9, 11], &[19, 1, 5, 5], 19, 2, 2),
    (&[2, 24, 30, 31], &[80, 24, 1, 1], 1, 1, 0),
    (&[3, 18, 15, 15], &[34, 18, 1, 1], 1, 1, 0),
    (&[3, 40, 23, 23], &[7, 40, 1, 1], 1, 1, 0),
    (&[1, 600, 20, 20], &[8, 600, 1, 1], 1, 1, 0),
    (&[1, 600, 9, 9], &[600, 1, 3, 3], 600, 1, 1),
];

/// The convolution of a shape, its input and its weights.
fn convolution((x, w, groups, stride, pad): Shape) -> (Conv, Tensor, Tensor) {
    let spatial = x.len() - 2;
    let conv = last(&vec![stride; spatial], &vec![pad; 2 * spatial], groups);
    (conv, wave(&Layout::Last.of(x), 0.7), wave(w, 1.3))
}

#[test]
fn convolutions_multiply_pairs() {
    for shape in SHAPES.iter().filter(|s| s.2 == 1) {
        let (conv, input, weights) = convolution(*shape);
        let (x, w) = (Dims::from_slice(input.dims()), Dims::from_slice(weights.dims()));
        let dy = wave(eval(&conv, &[Some(&input), Some(&weights)]).unwrap()[0].dims(), 0.9);
        // The same sums of operands that rounding does not change, in double precision; and pairs of them, added up in it. By
        // transformed tiles, what is rounded is those: of gradients, and of large forward passes.
        let (_, kernel, _, stride, _) = *shape;
        let large = kernel[0] * kernel[1] * dy.dims()[1..3].iter().product::<usize>() >= 1 << 20;
        let transforms =
            |op: &dyn Op| kernel[2..] == [3, 3] && stride == 1 && (large || op.name() != conv.name());
        let check = |op: &dyn Op, operands: [&Tensor; 2]| {
            let pairs = op.by_pairs().unwrap();
            let [rounded, exact] =
                [DType::F32, DType::F64].map(|to| operands.map(|t| t.cast(DType::BF16).cast(to)));
            let of = |op: &dyn Op, [a, b]: [&Tensor; 2]| eval(op, &[Some(a), Some(b)]).unwrap()[0].to_f64();
            let want = of(op, [&exact[0], &exact[1]]);
            let most = want.iter().fold(1e-3, |m: f64, x| m.max(x.abs()));
            // What the sums would be of terms that have nothing to do with each other.
            let squares = exact.each_ref().map(|t| {
                let squares: Vec<f64> = t.to_f64().iter().map(|x| x * x).collect();
                Tensor::from_slice(t.dims(), &squares).unwrap()
            });
            let scale = of(op, [&squares[0], &squares[1]]).iter().sum::<f64>().sqrt();
            for (got, tolerance) in [
                (of(pairs.as_ref(), [&rounded[0], &rounded[1]]), 1e-4 * most),
                (of(pairs.as_ref(), [&exact[0], &exact[1]]), 1e-10 * most),
            ] {
                let off: Vec<f64> = got.iter().zip(&want).map(|(got, want)| got - want).collect();
                let direct = off.iter().all(|off| off.abs() <= tolerance);
                let share = off.iter().map(|off| off * off).sum::<f64>().sqrt() / scale;
                assert!(
                    direct || transforms(op) && share < 0.04,
                    "{} of {shape:?}: off by {share}",
                    op.name()
                );
            }
        };
        check(&conv, [&input, &weights]);
        let back = ConvInputGrad::of(conv.clone(), x);
        check(&back, [&dy, &weights]);
        let weight = ConvWeightGrad { conv: conv.clone(), w };
        check(&weight, [&dy, &input]);
        // Operands that are rounded already are taken as they are.
        let what = format!("pairs of {shape:?}");
        reads(&what, weight.by_pairs().unwrap().as_ref(), &[Some(&dy), Some(&input)]);
        reads(&what, conv.by_pairs().unwrap().as_ref(), &[Some(&input), Some(&weights)]);
        let statistics = ConvStatistics::of(conv.clone());
        let statistics = statistics.by_pairs().unwrap();
        reads(&what, statistics.as_ref(), &[Some(&input), Some(&weights)]);
        assert!(puts_out_rounded(&what, statistics.as_ref(), &[Some(&input), Some(&weights)]), "{what}");
        check_moments(&what, &eval(statistics.as_ref(), &[Some(&input), Some(&weights)]).unwrap());
        let addend = wave(input.dims(), 0.1);
        let operands = [&dy, &weights, &addend].map(Some);
        for operands in [&operands[..2], &operands] {
            let back = back.by_pairs().unwrap();
            let puts_out = puts_out_rounded(&what, back.as_ref(), operands);
            assert!(puts_out == (shape.0[1] > 4), "{what}");
            if puts_out {
                reads(&what, back.as_ref(), operands);
            }
        }
    }
}

/// Means and variances are those of the results beside them.
fn check_moments(what: &str, outputs: &[Tensor]) {
    let [y, mean, variance] = [0, 1, 2].map(|i| outputs[i].to_f64());
    let (channels, rows) = (mean.len(), (y.len() / mean.len()) as f64);
    for c in 0..channels {
        let of = || y.iter().skip(c).step_by(channels);
        let m = of().sum::<f64>() / rows;
        let v = of().map(|y| (y - m) * (y - m)).sum::<f64>() / rows;
        let near = |a: f64, b: f64, scale: f64| (a - b).abs() <= 2e-6 * scale;
        assert!(near(mean[c], m, m.abs() + v.sqrt()), "{what}: mean {} of channel {c} is {m}", mean[c]);
        assert!(near(variance[c], v, v + m * m), "{what}: variance {} of channel {c} is {v}", variance[c]);
    }
}

#[test]
fn convolutions_read_it() {
    for shape in SHAPES {
        let (what, (x, w, ..)) = (format!("{shape:?}"), *shape);
        let (conv, input, weights) = convolution(*shape);
        let y = eval(&conv, &[Some(&input), Some(&weights)]).unwrap().remove(0);
        let (c, oc) = (x[1], w[0]);
        let dy = wave(y.dims(), 0.9);
        let dims = Dims::from_slice(w);
        let weight = ConvWeightGrad { conv: conv.clone(), w: dims.clone() };
        reads(&what, &weight, &[Some(&dy), Some(&input)]);
        let normal = [0.3, 0.5, 0.7, 0.9].map(|step| wave(&[c], step));
        let clamp = Clamp { low: 0.0, high: 0.8 };
        if conv.can_normalise(input.dims(), w) {
            let mut operands = vec![Some(&dy), Some(&input)];
            operands.extend(normal.iter().map(Some));
            let weight = ConvWeightGrad { conv: conv.normalising(clamp), w: dims.clone() };
            reads(&what, &weight, &operands);
            operands[..2].clone_from_slice(&[Some(&input), Some(&weights)]);
            let forward = ConvStatistics::of(conv.normalising(clamp));
            reads(&what, &forward.conv, &operands);
            reads(&what, &forward, &operands);
        }
        if !ConvGrads::can(&conv, &input.meta(), w) {
            continue;
        }
        let (read, behind) = (wave(y.dims(), 0.53), [0.2, 0.4, 0.6, 0.8, 1.0, 1.2].map(|s| wave(&[oc], s)));
        for (normalises, back) in
            [(false, None), (true, None), (false, Some(None)), (true, Some(Some(clamp)))]
        {
            let conv = if normalises { conv.normalising(clamp) } else { conv.clone() };
            let mut operands = vec![Some(&dy), Some(&weights), Some(&input), None];
            if normalises {
                operands.extend(normal.iter().map(Some));
            }
            if let Some(clamp) = back {
                operands.push(Some(&read));
                operands.extend(behind[..if clamp.is_some() { 6 } else { 5 }].iter().map(Some));
            }
            let both = ConvGrads { conv, w: dims.clone(), adds: false, back, sums: normalises };
            reads(&format!("both of {what}"), &both, &operands);
            let Some(pairs) = both.by_pairs() else { continue };
            reads_type(&format!("both by pairs of {what}"), pairs.as_ref(), &operands, DType::BF16);
            let even = c.is_multiple_of(2) && oc.is_multiple_of(2);
            let apart = [(y.dims(), 0.9), (w, 1.3)].map(|(dims, step)| scattered(dims, step));
            operands[..2].clone_from_slice(&[Some(&apart[0]), Some(&apart[1])]);
            rounds_operands(&format!("both of {what}"), &both, &operands, even && !by_blocks::<f32>());
        }
    }
}

/// Numbers that have little in common: of gradients that cancel out nothing could be said.
fn scattered(dims: &[usize], step: f64) -> Tensor {
    let data = (0..dims.iter().product()).map(|i: usize| ((i * i) as f64 * step).sin() as f32);
    Tensor::from_slice(dims, &data.collect::<Vec<f32>>()).unwrap()
}

/// Operands that an operator rounds anyway may be rounded already: not a bit changes.
fn takes_rounded(what: &str, op: &dyn Op, x: &[Option<&Tensor>], expected: usize) {
    let metas: Vec<Option<Meta>> = x.iter().map(|t| t.map(Tensor::meta)).collect();
    let metas: Vec<Option<&Meta>> = metas.iter().map(Option::as_ref).collect();
    let want = eval(op, x).unwrap();
    let rounds: Vec<usize> = (0..x.len()).filter(|i| op.rounds(&metas, *i)).collect();
    assert!(rounds.len() == expected, "{what}: {rounds:?} are rounded");
    for i in rounds {
        let rounded = x[i].map(|t| t.cast(DType::BF16));
        let mut x = x.to_vec();
        x[i] = rounded.as_ref();
        let got = eval(op, &x).unwrap();
        assert!(got.iter().zip(&want).all(|(a, b)| a.bytes() == b.bytes()), "{what}: operand {i} rounded");
    }
}

/// The results of an operator by pairs are those of the plain one, but for what rounding its operands changes.
fn rounds_operands(what: &str, op: &dyn Op, x: &[Option<&Tensor>], rounded: bool) {
    let plain = eval(op, x).unwrap();
    let pairs = eval(op.by_pairs().unwrap().as_ref(), x).unwrap();
    for (n, (plain, pairs)) in plain.iter().zip(&pairs).enumerate() {
        let (plain, pairs) = (plain.to_f64(), pairs.to_f64());
        let most = plain.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
        let off = plain.iter().zip(&pairs).fold(0.0, |m: f64, (a, b)| m.max((a - b).abs()));
        assert!(off < most / 64.0, "{what}, result {n}: off by {off} of {most}");
        assert!((off > 0.0) == rounded, "{what}, result {n}: is anything rounded?");
    }
}

#[test]
fn normalisations_read_it() {
    for (n, c) in [(9000, 16), (700, 300), (333, 1280), (7, 3)] {
        let what = format!("{n} rows of {c}");
        let (channels, clamp) = (Channels { n, c, s: 1 }, Clamp { low: 0.0, high: 0.9 });
        let [x, dy, y] = [0.7, 0.3, 0.4].map(|step| wave(&[n, c], step));
        let [mean, inv, scale, shift] = [0.2, 0.1, 0.6, 0.8].map(|step| wave(&[c], step));
        let param = BatchNormParamGrad { channels, clamp };
        let operands = [&x, &dy, &mean, &inv, &scale, &shift, &y].map(Some);
        reads(&what, &param, &operands[..6]);
        reads(&what, &param, &operands);
        let plain = ChannelParamGrad { channels, stat: Stat::Channel, epsilon: None };
        reads(&what, &plain, &operands[..4]);
        let of_rows = [0.2, 0.1].map(|step| wave(&[n], step));
        let rows = ChannelParamGrad { channels, stat: Stat::Row(c), epsilon: None };
        reads(&what, &rows, &[Some(&x), Some(&dy), Some(&of_rows[0]), Some(&of_rows[1])]);
        for (period, span) in [(c, 1), (1, c)] {
            let rows = RowNorm { len: c, period, span, center: true, epsilon: 1e-5 };
            let operands = [&x, &dy, &scale, &of_rows[0], &of_rows[1]].map(Some);
            reads(&what, &RowNormInputGrad { rows }, &operands);
        }
        let samples = if n.is_multiple_of(3) { 3 } else { 1 };
        let (groups, s) = (if c.is_multiple_of(4) { 4 } else { 3 }, n / samples);
        let kernel = GroupNorm { n: samples, c, s, groups, scales: c, epsilon: 1e-5, layout: Layout::Last };
        let of_groups = [0.2, 0.1].map(|step| wave(&[samples, groups], step));
        let sums = [0.4, 0.5].map(|step| wave(&[samples, c], step));
        let of = [&of_groups[0], &of_groups[1]];
        reads(&what, &GroupNormSums { kernel }, &[&x, &dy, of[0], of[1]].map(Some));
        let operands = [&x, &dy, &scale, of[0], of[1], &sums[0], &sums[1]].map(Some);
        reads(&what, &GroupNormInputGrad { kernel }, &operands);
        let input = BatchNormInputGrad::of(channels, clamp);
        let operands = [&x, &scale, &mean, &inv, &dy, &scale, &shift, &shift].map(Some);
        reads(&what, &input, &operands[..7]);
        reads(&what, &input, &operands);
        assert!(
            puts_out_rounded(&what, &input, &operands[..7]) && puts_out_rounded(&what, &input, &operands)
        );
        let half = [DType::BF16, DType::F16].map(|to| x.cast(to));
        for x in &half {
            let mut operands = operands;
            operands[0] = Some(x);
            assert!(puts_out_rounded(&what, &input, &operands));
        }
        // dY in the result's buffer.
        let half = x.cast(DType::F16);
        let mut views: Vec<Option<View>> = operands.iter().map(|t| t.map(Tensor::view)).collect();
        (views[0], views[4]) = (Some(half.view()), None);
        let mut scratch = crate::tensor::Buffer::zeroed(64 * c);
        let cx = &mut Cx { scratch: scratch.bytes_mut(), seed: 0 };
        let mut dx = dy.clone();
        input.forward(cx, &views, &mut [Some(dx.view_mut())]).unwrap();
        let wide = half.cast(DType::F32);
        let mut operands = operands;
        operands[0] = Some(&wide);
        assert!(eval(&input, &operands).unwrap()[0].bytes() == dx.bytes(), "{what}, in place");
    }
}

#[test]
fn products_read_it() {
    // Small, of more rows, of more columns, a vector.
    for (k, m, n) in [(9, 5, 7), (700, 150, 131), (700, 131, 150), (300, 8, 400), (40, 1, 30)] {
        for (trans_a, trans_b) in [(true, false), (false, false), (false, true), (true, true)] {
            let (da, db) = (if trans_a { [k, m] } else { [m, k] }, if trans_b { [n, k] } else { [k, n] });
            let (a, b) = (wave(&da, 0.7), wave(&db, 0.3));
            let [x, more] = [wave(&[m, n], 0.2), wave(&[n], 0.9)];
            let packed = m > 1 && n > 1 && (!trans_a || k * m * n >= 1 << 23);
            let each = |op: &dyn Op, added: &[Option<&Tensor>]| {
                let what = format!("{}, {m}×{n}×{k}, {trans_a}, {trans_b}", op.name());
                let operands = [&[Some(&a), Some(&b)], added].concat();
                let metas = [a.meta(), b.meta()];
                let able = op.reads_half(&[Some(&metas[0]), Some(&metas[1])], 1);
                assert_eq!(able, packed || trans_a && !trans_b, "{what}");
                if able {
                    reads(&what, op, &operands);
                }
            };
            each(&Gemm { alpha: 0.5, beta: 1.0, trans_a, trans_b, pairs: false }, &[Some(&more)]);
            let [da, db, y] = [da, db, [m, n]].map(|d| Dims::from_slice(&d));
            each(&MatMulAs { a: da, b: db, trans_a, trans_b, alpha: 0.5, y, pairs: false }, &[Some(&x)]);
            if !trans_a && !trans_b {
                each(&MatMul::scaled(0.5), &[Some(&more), Some(&x)]);
            }
        }
    }
}

/// Their operands rounded, whatever they come in, and then what is said of any product.
#[test]
fn products_of_pairs_read_it() {
    // Large enough for pairs, and not.
    for (m, n, k) in [(70, 64, 131), (65, 200, 64), (5, 7, 9)] {
        let [x, more] = [wave(&[m, n], 0.2), wave(&[n], 0.9)];
        for (trans_a, trans_b) in [(false, false), (false, true), (true, false), (true, true)] {
            let (da, db) = (if trans_a { [k, m] } else { [m, k] }, if trans_b { [n, k] } else { [k, n] });
            let (a, b) = (wave(&da, 0.7), wave(&db, 0.3));
            let rounded = [&a, &b].map(|t| t.cast(DType::BF16).cast(DType::F32));
            let what = format!("{m}×{n}×{k}, {trans_a}, {trans_b}");
            let pairs_of = |plain: &dyn Op, added: &[Option<&Tensor>]| {
                let pairs = plain.by_pairs().unwrap();
                let whole = [&[Some(&a), Some(&b)], added].concat();
                if pairs.reads_half(&[Some(&a.meta()), Some(&b.meta())], 0) {
                    reads(&what, pairs.as_ref(), &whole);
                }
                let large = m * n * k >= 1 << 18;
                let read = if large { rounded.each_ref() } else { [&a, &b] };
                let want = eval(plain, &[&read.map(Some)[..], added].concat()).unwrap();
                takes_rounded(&what, pairs.as_ref(), &whole, if large { 2 } else { 0 });
                let got = eval(pairs.as_ref(), &whole).unwrap();
                let off =
                    got[0].to_f64().iter().zip(want[0].to_f64()).fold(0.0, |m, (a, b)| (a - b).abs().max(m));
                assert!(off < 2e-5, "{what}: off by {off}");
                let plainly = eval(plain, &whole).unwrap();
                assert!(!large || plainly[0].bytes() != got[0].bytes(), "{what}: nothing was rounded");
            };
            pairs_of(&Gemm { alpha: 0.5, beta: 2.0, trans_a, trans_b, pairs: false }, &[Some(&more)]);
            let [da, db, y] = [da, db, [m, n]].map(|d| Dims::from_slice(&d));
            pairs_of(&MatMulAs { a: da, b: db, trans_a, trans_b, alpha: 0.5, y, pairs: false }, &[Some(&x)]);
            if !trans_a && !trans_b {
                pairs_of(&MatMul::scaled(0.5), &[Some(&more), Some(&x)]);
            }
        }
    }
}

#[test]
fn attention_reads_it() {
    // Samples, heads, queries, keys, elements of a key and of a value; heads in front of positions or behind.
    for ([b, h, t, s, d, v], behind) in [([2, 3, 40, 37, 8, 5], false), ([1, 2, 70, 300, 16, 16], true)] {
        let dims = |n: usize, d: usize| if behind { [b, n, h, d] } else { [b, h, n, d] };
        let axes = || Dims::from_slice(if behind { &[0, 2, 1, 3] } else { &[0, 1, 2, 3] });
        let of = FusedAttention { scale: 0.3, axes: [axes(), axes(), axes(), axes()], pairs: false };
        let [q, k] = [(t, 0.7), (s, 0.9)].map(|(n, step)| wave(&dims(n, d), step));
        let [value, dy] = [(s, 0.2), (t, 0.5)].map(|(n, step)| wave(&dims(n, v), step));
        let logs = eval(&of, &[Some(&q), Some(&k), Some(&value), None]).unwrap().remove(1);
        let operands = [Some(&q), Some(&k), Some(&value), None, Some(&dy), Some(&logs)];
        let what = format!("{t} queries of {s} keys");
        reads(&what, &FusedAttentionGrad::new(of.clone()), &operands);
        puts_out(&what, &FusedAttentionGrad::new(of.clone()), &operands);
        let grad = FusedAttentionGrad::new(of.clone()).by_pairs().unwrap();
        reads(&format!("{what}, by pairs"), grad.as_ref(), &operands);
        puts_out(&format!("{what}, by pairs"), grad.as_ref(), &operands);
    }
}

/// What is put out in half precision is what is made otherwise, rounded: of one output, and of all.
fn puts_out(what: &str, op: &dyn Op, operands: &[Option<&Tensor>]) {
    let whole = eval(op, operands).unwrap();
    for to in [DType::BF16, DType::F16] {
        let one = op.halved(1, to).unwrap();
        let all = one.halved(0, to).unwrap().halved(2, to).unwrap();
        for (op, rounded) in [(one, &[1][..]), (all, &[0, 1, 2])] {
            for (i, (made, want)) in eval(op.as_ref(), operands).unwrap().iter().zip(&whole).enumerate() {
                let want = if rounded.contains(&i) { want.cast(to) } else { want.clone() };
                assert!(made.bytes() == want.bytes(), "{what}: output {i} in {to}");
            }
        }
    }
}

#[test]
fn attention_multiplies_pairs() {
    // As above; the last sizes are too small for pairs, the second ones leave a block of one query.
    let sizes =
        [([2, 2, 128, 128, 64, 32], true), ([1, 2, 65, 300, 16, 16], false), ([2, 1, 9, 8, 4, 4], false)];
    for (i, ([b, h, t, s, d, v], behind)) in sizes.into_iter().enumerate() {
        let dims = |n: usize, d: usize| if behind { [b, n, h, d] } else { [b, h, n, d] };
        let axes = || Dims::from_slice(if behind { &[0, 2, 1, 3] } else { &[0, 1, 2, 3] });
        let of = FusedAttention { scale: 0.3, axes: [axes(), axes(), axes(), axes()], pairs: false };
        let [q, k] = [(t, 0.7), (s, 0.9)].map(|(n, step)| scattered(&dims(n, d), step));
        let [value, dy] = [(s, 0.2), (t, 0.5)].map(|(n, step)| scattered(&dims(n, v), step));
        let mask = scattered(&[t, s], 0.4);
        let operands = [Some(&q), Some(&k), Some(&value), Some(&mask)];
        let logs = eval(&of, &operands).unwrap().remove(1);
        let more = [&operands[..], &[Some(&dy), Some(&logs)]].concat();
        let what = format!("{t} queries of {s} keys");
        rounds_operands(&what, &of, &operands, i < 2);
        takes_rounded(&what, of.by_pairs().unwrap().as_ref(), &operands, if i < 2 { 3 } else { 0 });
        rounds_operands(&what, &FusedAttentionGrad::new(of.clone()), &more, i < 2);
    }
}

#[test]
fn results_are_rounded_where_they_are_made() {
    // (More than are rounded at a time.)
    let (x, gelu) = (wave(&[3, 7001], 0.7), Unary(Gelu {}));
    let want = eval(&gelu, &[Some(&x)]).unwrap().remove(0);
    for to in [DType::BF16, DType::F16] {
        let made = eval(gelu.halved(0, to).unwrap().as_ref(), &[Some(&x)]).unwrap().remove(0);
        assert!(made.bytes() == want.cast(to).bytes(), "GELU in {to}");
        let (grad, dy) = (UnaryGrad(Gelu {}), wave(&[3, 7001], 0.3));
        for v in [x.clone(), x.cast(to)] {
            let want = eval(&grad, &[Some(&v.cast(DType::F32)), Some(&dy)]).unwrap().remove(0);
            let op = grad.halved(0, to).unwrap();
            let made = eval(op.as_ref(), &[Some(&v), Some(&dy)]).unwrap().remove(0);
            assert!(made.bytes() == want.cast(to).bytes(), "GELU's gradient in {to}");
        }
    }
    let dense = [([3, 16, 32, 32], [16, 16, 3, 3], 1), ([2, 8, 30, 31], [40, 8, 1, 1], 1)];
    let others = [([2, 24, 20, 20], [24, 1, 3, 3], 24), ([2, 64, 7, 7], [800, 64, 1, 1], 1)];
    for (x, w, groups) in dense.into_iter().chain([([5, 3, 40, 41], [16, 3, 3, 3], 1)]).chain(others) {
        for layout in [Layout::First, Layout::Last] {
            let pad = w[2] / 2;
            let conv = Conv { layout, ..last(&[1, 1], &[pad; 4], groups) };
            let (input, weights) = (wave(&layout.of(&x), 0.7), wave(&w, 1.3));
            let plain: &dyn Op = &ConvStatistics::of(conv);
            let want = eval(plain, &[Some(&input), Some(&weights)]).unwrap();
            for to in [DType::BF16, DType::F16] {
                let op = plain.rounding(to).unwrap();
                let made = eval(op.as_ref(), &[Some(&input), Some(&weights)]).unwrap();
                assert!(made[..3].iter().zip(&want).all(|(a, b)| a.bytes() == b.bytes()), "{x:?} {layout:?}");
                assert!(made[3].bytes() == want[0].cast(to).bytes(), "{x:?} {layout:?} {to}");
                let made =
                    eval(plain.halved(0, to).unwrap().as_ref(), &[Some(&input), Some(&weights)]).unwrap();
                assert!(made[0].bytes() == want[0].cast(to).bytes(), "{x:?} {layout:?} in {to}");
                assert!(
                    made.len() == 3 && made[1..].iter().zip(&want[1..]).all(|(a, b)| a.bytes() == b.bytes())
                );
            }
        }
    }
}
