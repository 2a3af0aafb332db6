use super::*;
use crate::ops::eval;
use crate::tensor::{DType, Tensor};

#[test]
fn in_place_gives_the_same_bits() {
    let x: Vec<f32> = (0..40_000).map(|i| (i % 701) as f32 / 100.0 - 3.0).collect();
    let (x, dy) = (Tensor::from_slice(&[40_000], &x).unwrap(), Tensor::from_slice(&[40_000], &x).unwrap());
    let cx = &mut Cx { scratch: &mut [], seed: 0 };
    let op = Unary(Gelu {});
    let want = eval(&op, &[Some(&x)]).unwrap();
    let mut got = x.clone();
    op.forward(cx, &[None], &mut [Some(got.view_mut())]).unwrap();
    assert!(got.bytes() == want[0].bytes());
    let op = UnaryGrad(Gelu {});
    let want = eval(&op, &[Some(&x), Some(&dy)]).unwrap();
    for pair in 0..2 {
        let mut got = x.clone();
        let mut inputs = [Some(x.view()), Some(dy.view())];
        inputs[pair] = None;
        op.forward(cx, &inputs, &mut [Some(got.view_mut())]).unwrap();
        assert!(got.bytes() == want[0].bytes());
    }
}

#[test]
fn a_gradient_reads_half_precision() {
    let x: Vec<f32> = (0..40_000).map(|i| (i % 701) as f32 / 100.0 - 3.0).collect();
    let x = Tensor::from_slice(&[40_000], &x).unwrap();
    fn check(op: impl Op, x: &Tensor, half: &Tensor) {
        let metas = [Some(&x.meta()), Some(&x.meta())];
        assert!(op.reads_half(&metas, 0) && !op.reads_half(&metas, 1));
        let want = eval(&op, &[Some(&half.cast(DType::F32)), Some(x)]).unwrap();
        let mut got = Tensor::zeros(DType::F32, x.dims());
        let cx = &mut Cx { scratch: &mut [], seed: 0 };
        op.forward(cx, &[Some(half.view()), Some(x.view())], &mut [Some(got.view_mut())]).unwrap();
        assert!(got.bytes() == want[0].bytes(), "{op:?}");
        // dY may lie in the result.
        let mut got = x.clone();
        op.forward(cx, &[Some(half.view()), None], &mut [Some(got.view_mut())]).unwrap();
        assert!(got.bytes() == want[0].bytes(), "{op:?}");
    }
    for half in [x.cast(DType::BF16), x.cast(DType::F16)] {
        check(UnaryGrad(Gelu {}), &x, &half);
        check(UnaryGrad(Relu {}), &x, &half);
        check(UnaryGrad(Sigmoid {}), &x, &half);
    }
}

#[test]
fn extremes() {
    let x = [f32::NEG_INFINITY, -200.0, -1e-40, 0.0, 1e-40, 200.0, f32::INFINITY];
    let run = |op: &dyn Op| {
        let x = Tensor::from_slice(&[x.len()], &x).unwrap();
        eval(op, &[Some(&x)]).unwrap()[0].to_f64()
    };
    assert_eq!(run(&Unary(Sigmoid {}))[5..], [1.0, 1.0]);
    assert_eq!(run(&Unary(Softplus {}))[5..], [200.0, f64::INFINITY]);
    assert_eq!(run(&Unary(Mish {}))[5..], [200.0, f64::INFINITY]);
    assert_eq!(run(&Unary(Round {}))[2..5], [0.0; 3]);
    let halves = Tensor::from_slice(&[6], &[0.5f32, 1.5, 2.5, -0.5, -2.5, 1e9]).unwrap();
    let rounded = eval(&Unary(Round {}), &[Some(&halves)]).unwrap()[0].to_f64();
    assert_eq!(rounded, [0.0, 2.0, 2.0, -0.0, -2.0, 1e9]);
    assert!(eval(&Unary(Neg {}), &[Some(&Tensor::zeros(DType::Bool, &[1]))]).is_err());
}
