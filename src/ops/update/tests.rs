use super::*;
use crate::ops::eval;
use crate::ops::gather::{GatherGrad, RowSums};
use crate::tensor::{Dims, Tensor};

fn step(op: &dyn Update, state: &mut [Tensor], grad: &Tensor, (lr, t): (f64, f64), scale: Option<f64>) {
    let hyper = Tensor::from_slice(&[2], &[lr, t]).unwrap();
    let scale = scale.map(Tensor::scalar);
    let mut x = vec![Some(&state[0]), Some(grad), Some(&hyper), scale.as_ref()];
    x.extend(state[1..].iter().map(Some));
    let next = eval(op, &x).unwrap();
    state.clone_from_slice(&next);
}

fn all() -> Vec<Box<dyn Update>> {
    vec![
        Box::new(Sgd { momentum: 0.0, nesterov: false, weight_decay: 0.1, salt: 0 }),
        Box::new(Sgd { momentum: 0.9, nesterov: true, weight_decay: 0.0, salt: 0 }),
        Box::new(Adam::default()),
        Box::new(Adam { amsgrad: true, decoupled: true, weight_decay: 0.1, ..Adam::default() }),
        Box::new(AdEMAMix { weight_decay: 0.1, ..AdEMAMix::default() }),
    ]
}

fn start(op: &dyn Update, param: &[f32]) -> Vec<Tensor> {
    let t = Tensor::from_slice(&[param.len()], param).unwrap();
    let mut all = vec![t.clone()];
    all.extend((0..op.states()).map(|_| Tensor::zeros(DType::F32, t.dims())));
    all
}

#[test]
fn first_steps_by_hand() {
    let grad = Tensor::from_slice(&[1], &[2.0f32]).unwrap();
    let sgd = Sgd { momentum: 0.5, nesterov: false, weight_decay: 0.0, salt: 0 };
    let mut state = start(&sgd, &[1.0]);
    step(&sgd, &mut state, &grad, (0.1, 1.0), None);
    assert_eq!(state[0].to_f64(), [f64::from(0.8f32)]);
    step(&sgd, &mut state, &grad, (0.1, 2.0), None);
    assert!((state[0].to_f64()[0] - 0.5).abs() < 1e-6);
    // Adam's first step is lr·sign(g), whatever the gradient's size.
    let adam = Adam::default();
    let mut state = start(&adam, &[1.0]);
    step(&adam, &mut state, &grad, (0.01, 1.0), None);
    assert!((state[0].to_f64()[0] - 0.99).abs() < 1e-6);
    // AdEMAMix adds α(1 − β₃) of it.
    let mix = AdEMAMix::default();
    let mut state = start(&mix, &[1.0]);
    step(&mix, &mut state, &grad, (0.01, 1.0), None);
    assert!((state[0].to_f64()[0] - (1.0 - 0.01 * 1.0005)).abs() < 1e-6);
}

#[test]
fn the_scale_multiplies_and_what_is_not_finite_changes_nothing() {
    let (grad, half) = ([2.0f32, -4.0, 1e-3], [1.0f32, -2.0, 5e-4]);
    let grads = [grad, half].map(|g| Tensor::from_slice(&[3], &g).unwrap());
    for op in all() {
        let mut a = start(op.as_ref(), &[1.0, 2.0, 3.0]);
        let mut b = a.clone();
        step(op.as_ref(), &mut a, &grads[0], (0.1, 1.0), Some(0.5));
        step(op.as_ref(), &mut b, &grads[1], (0.1, 1.0), None);
        let before: Vec<_> = a.iter().map(Tensor::to_f64).collect();
        assert_eq!(before, b.iter().map(Tensor::to_f64).collect::<Vec<_>>(), "{op:?}");
        for scale in [f64::NAN, f64::INFINITY] {
            step(op.as_ref(), &mut a, &grads[0], (0.1, 2.0), Some(scale));
            assert_eq!(before, a.iter().map(Tensor::to_f64).collect::<Vec<_>>(), "{op:?}");
        }
    }
}

#[test]
fn in_the_states_buffers_as_in_separate_ones() {
    let n = 40_000;
    let param: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).sin()).collect();
    let grad: Vec<f32> = (0..n).map(|i| (i as f32 * 0.11).cos()).collect();
    let grad = Tensor::from_slice(&[n], &grad).unwrap();
    let hyper = Tensor::from_slice(&[2], &[0.01, 3.0]).unwrap();
    for op in all() {
        let mut separate = start(op.as_ref(), &param);
        let mut shared = separate.clone();
        step(op.as_ref(), &mut separate, &grad, (0.01, 3.0), None);
        let mut y: Vec<Option<ViewMut>> = shared.iter_mut().map(|t| Some(t.view_mut())).collect();
        let x = [None, Some(grad.view()), Some(hyper.view()), None, None, None, None];
        op.forward(&mut Cx { scratch: &mut [], seed: 0 }, &x, &mut y).unwrap();
        assert!(separate.iter().zip(&shared).all(|(a, b)| a.bytes() == b.bytes()), "{op:?}");
    }
}

/// A table of which some rows were read, by their gradients alone and by one of its whole size; in place too.
#[test]
fn rows_that_were_read_move_as_by_the_whole_gradient() {
    let (rows, block) = (150, 300);
    let dims = [rows, block];
    let wave = |n: usize, f: f32| (0..n).map(|i| (i as f32 * f).sin()).collect::<Vec<_>>();
    let table = Tensor::from_slice(&dims, &wave(rows * block, 0.37)).unwrap();
    for op in all() {
        for (of_param, of_states) in [(DType::F32, DType::F32), (DType::BF16, DType::U8)] {
            let mut whole = vec![table.cast(of_param)];
            let packed = packed(rows * block);
            whole.extend((0..op.states()).map(|_| match of_states {
                DType::U8 => Tensor::zeros(DType::U8, &[packed]),
                _ => Tensor::zeros(of_states, &dims),
            }));
            let mut few = whole.clone();
            for t in 1..=3i64 {
                let read: Vec<i64> = (0..40).map(|i| (i * i * t + 7 * t) % 150 - 30 * (i % 2)).collect();
                let index = Tensor::from_slice(&[5, 8], &read).unwrap();
                let dy = Tensor::from_slice(&[5, 8, block], &wave(40 * block, t as f32 * 0.11)).unwrap();
                let grad = GatherGrad { axis: 0, dims: Dims::from_slice(&dims) };
                let grad = eval(&grad, &[Some(&dy), Some(&index)]).unwrap();
                step(op.as_ref(), &mut whole, &grad[0], (0.01, t as f64), None);
                let sums = eval(&RowSums { rows }, &[Some(&dy), Some(&index)]).unwrap();
                let hyper = Tensor::from_slice(&[2], &[0.01, t as f64]).unwrap();
                let mut x = vec![Some(&few[0]), Some(&sums[0]), Some(&hyper), None];
                x.extend(few[1..].iter().chain([&sums[1]]).map(Some));
                let next = eval(op.as_ref(), &x).unwrap();
                let mut x = vec![None, Some(sums[0].view()), Some(hyper.view()), None];
                x.resize(FIRST_STATE + op.states(), None);
                x.push(Some(sums[1].view()));
                let mut y: Vec<Option<ViewMut>> = few.iter_mut().map(|t| Some(t.view_mut())).collect();
                op.forward(&mut Cx { scratch: &mut [], seed: 0 }, &x, &mut y).unwrap();
                for others in [&next, &few] {
                    assert!(whole.iter().zip(others).all(|(a, b)| a.bytes() == b.bytes()), "{op:?}, {t}");
                }
            }
        }
    }
}

/// A parameter and its states kept in few bits, against the same in f32, over some steps.
#[test]
fn what_is_kept_narrow_follows_what_is_wide() {
    let n = 40_000;
    let param: Vec<f32> = (0..n).map(|i| 1.0 + (i as f32 * 0.37).sin()).collect();
    let narrow = |t: &Tensor, to: DType| match to {
        DType::U8 => Tensor::zeros(DType::U8, &[packed(t.len())]),
        to => t.cast(to),
    };
    for op in all() {
        for (of_param, of_states, most) in [
            (DType::F32, DType::BF16, 0.03),
            (DType::F32, DType::U8, 0.15),
            (DType::BF16, DType::F32, 0.2),
            (DType::F16, DType::U8, 0.2),
        ] {
            let mut wide = start(op.as_ref(), &param);
            let mut kept = vec![narrow(&wide[0], of_param)];
            kept.extend(wide[1..].iter().map(|s| narrow(s, of_states)));
            let first = [wide[0].to_f64(), kept[0].to_f64()];
            for t in 1..=20 {
                let at = |i: usize| ((i % 97) as f32 * 0.3 + t as f32 * 0.2).cos() + 0.5;
                let grad = Tensor::from_slice(&[n], &(0..n).map(at).collect::<Vec<f32>>()).unwrap();
                step(op.as_ref(), &mut wide, &grad, (0.01, f64::from(t)), None);
                step(op.as_ref(), &mut kept, &grad, (0.01, f64::from(t)), None);
            }
            let last = [wide[0].to_f64(), kept[0].to_f64()];
            let (mut off, mut all) = (0.0, 0.0);
            for i in 0..n {
                let moved = [0, 1].map(|k| last[k][i] - first[k][i]);
                off += (moved[0] - moved[1]).powi(2);
                all += moved[0].powi(2);
            }
            let e = (off / all).sqrt();
            assert!(e <= most, "{op:?}, {of_param} and {of_states}: moved otherwise by {e:.3}");
        }
    }
}

#[test]
fn a_loss_scale_falls_at_once_and_rises_slowly() {
    let next = |scale: &[f64; 2], factor: f64| -> [f64; 2] {
        let scale = Tensor::from_slice(&[2], scale).unwrap();
        let y = eval(&NextLossScale, &[Some(&scale), Some(&Tensor::scalar(factor))]).unwrap();
        y[0].get::<f64>().unwrap().try_into().unwrap()
    };
    assert_eq!(next(&[65536.0, 7.0], f64::NAN), [32768.0, 0.0]);
    assert_eq!(next(&[65536.0, 7.0], 1.0), [65536.0, 8.0]);
    assert_eq!(next(&[65536.0, GOOD_STEPS - 1.0], 0.5), [131_072.0, 0.0]);
    assert_eq!(next(&[1.0, 0.0], f64::INFINITY), [1.0, 0.0]);
    // Factor and norm are the gradient's own, whatever it was scaled by.
    let (loss, scale) = (Tensor::scalar(1.0f32), Tensor::from_slice(&[2], &[1024.0, 0.0]).unwrap());
    let sum = Tensor::scalar(25.0 * 1024.0 * 1024.0);
    let y = eval(&ClipScale { max_norm: None }, &[Some(&loss), Some(&sum), Some(&scale)]).unwrap();
    assert_eq!((y[0].to_f64()[0], y[1].to_f64()[0]), (1.0 / 1024.0, 5.0));
    let y = eval(&ClipScale { max_norm: Some(2.5) }, &[Some(&loss), Some(&sum), Some(&scale)]).unwrap();
    assert!((y[0].to_f64()[0] - 0.5 / 1024.0).abs() < 1e-9);
}

#[test]
fn clipping_and_accumulation() {
    let grad = Tensor::from_slice(&[2], &[3.0f32, 4.0]).unwrap();
    let sum = &eval(&SumSquares, &[Some(&grad)]).unwrap()[0];
    assert_eq!(sum.to_f64(), [25.0]);
    let loss = Tensor::scalar(1.0f32);
    let clip = |max_norm, loss: &Tensor, sum: f64| {
        let y = eval(&ClipScale { max_norm }, &[Some(loss), Some(&Tensor::scalar(sum))]).unwrap();
        (y[0].to_f64()[0], y[1].to_f64()[0])
    };
    assert_eq!(clip(None, &loss, 25.0), (1.0, 5.0));
    assert_eq!(clip(Some(6.0), &loss, 25.0), (1.0, 5.0));
    assert_eq!(clip(Some(1.0), &loss, 25.0), (1.0 / (5.0 + 1e-6), 5.0));
    assert!(clip(None, &loss, f64::NAN).0.is_nan());
    let checked = |acc: f64, loss: &Tensor| {
        let y = eval(&Checked, &[Some(&grad), Some(&Tensor::scalar(acc)), Some(loss)]).unwrap();
        (y[0].to_f64()[0], y[1].to_f64()[0])
    };
    assert_eq!(checked(25.0, &loss), (50.0, 1.0));
    assert!(checked(f64::INFINITY, &loss).1.is_nan());
    assert!(checked(0.0, &Tensor::scalar(f32::NAN)).1.is_nan());
    assert!(clip(None, &Tensor::scalar(f32::INFINITY), 1.0).0.is_nan());
    let acc = Tensor::from_slice(&[2], &[f32::NAN, 1.0]).unwrap();
    let add = |acc: &Tensor, first: f64| {
        let hyper = Tensor::from_slice(&[2], &[0.5, first]).unwrap();
        eval(&Accumulate, &[Some(acc), Some(&grad), Some(&hyper)]).unwrap().remove(0)
    };
    let acc = add(&acc, 1.0);
    assert_eq!(acc.to_f64(), [1.5, 2.0]);
    assert_eq!(add(&acc, 0.0).to_f64(), [3.0, 4.0]);
}
