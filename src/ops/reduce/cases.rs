//! The cases of reductions, and what they do not show.

use super::*;
use crate::ops::cases::Case;
use crate::ops::eval;
use crate::tensor::Tensor;

pub fn cases() -> Vec<super::cases::Case> {
    let mut cases = Vec::new();
    let kinds = ["L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"];
    for kind in kinds {
        let op = &format!("Reduce{kind}");
        let case = |name: &str, opset: i64, dims: &[usize]| {
            Case::new(op, opset).named(name).within(dims, 0.2, 1.8).tolerance(1e-5)
        };
        for axes in [&[0][..], &[1], &[2], &[-1], &[0, 2], &[1, 2], &[0, 1, 2, 3], &[1, 3]] {
            cases.push(case(&format!("axes {axes:?}"), 11, &[2, 3, 2, 3]).ints("axes", axes));
            let t = Tensor::ints(axes);
            cases.push(case(&format!("axes {axes:?} input"), 18, &[2, 3, 2, 3]).fixed(t).int("keepdims", 0));
        }
        cases.push(case("all", 11, &[3, 4]));
        cases.push(case("all, flat", 18, &[3, 4]).int("keepdims", 0));
        cases.push(case("no axes", 18, &[3, 4]).absent().int("noop_with_empty_axes", 1));
        cases.push(case("scalar", 13, &[]));
        cases.push(case("long", 13, &[3, 700]).ints("axes", &[1]));
        cases.push(case("columns", 13, &[70, 3]).ints("axes", &[0]));
        if kind != "Prod" {
            cases.push(case("wide", 13, &[5, 20_000]).ints("axes", &[0]));
        }
        let ints = Tensor::from_slice(&[2, 2], &[3i32, -4, 5, 6]).unwrap();
        if !kind.starts_with("Log") {
            cases.push(Case::new(op, 13).named("int32").fixed(ints).ints("axes", &[0]).forward_only());
        }
    }
    let signs = [-0.5, 0.7, 0.3, -0.2, 0.9, -1.2];
    cases.push(Case::new("ReduceL1", 13).named("signs").given(&[2, 3], &signs));
    let zeros = [-0.5, 0.0, 0.3, 0.0, 0.9, 0.0];
    cases.push(Case::new("ReduceProd", 13).named("zeros").given(&[2, 3], &zeros).ints("axes", &[1]));
    for op in ["ArgMax", "ArgMin"] {
        for axis in [0, 1, -1] {
            cases.push(Case::new(op, 13).input(&[3, 4, 5]).int("axis", axis).forward_only());
            cases.push(Case::new(op, 13).input(&[3, 4]).int("axis", axis).int("keepdims", 0).forward_only());
        }
    }
    cases.push(Case::of(SumTo { dims: Dims::from_slice(&[3, 1, 1]) }).input(&[2, 3, 4, 5]));
    cases.push(Case::of(SumTo { dims: Dims::from_slice(&[7]) }).input(&[5, 7]));
    cases
}

/// Every set of axes of every small shape, against a plain sum.
#[test]
fn sums_over_any_axes() {
    let shapes: [&[usize]; 6] = [&[2, 3, 4, 2], &[1, 3, 1, 2], &[5], &[], &[2, 0, 3], &[3, 1, 130]];
    for dims in shapes {
        let n: usize = dims.iter().product();
        let x: Vec<f32> = (0..n).map(|i| (i * 7 % 11) as f32).collect();
        let t = Tensor::from_slice(dims, &x).unwrap();
        for mask in 0..1u64 << dims.len() {
            let kept = reduced_dims(dims, mask, true);
            let mut want = vec![0.0; kept.iter().product()];
            for (i, v) in x.iter().enumerate() {
                let (mut rest, mut at, mut stride) = (i, 0, 1);
                for d in (0..dims.len()).rev() {
                    at += if kept[d] == 1 { 0 } else { rest % dims[d] * stride };
                    stride *= kept[d];
                    rest /= dims[d];
                }
                want[at] += *v as f64;
            }
            let axes = (0..dims.len() as i64).filter(|d| mask >> d & 1 == 1).collect();
            let op = Reduce { kind: Kind::Sum, axes: Some(axes), keepdims: true, noop: true };
            assert_eq!(eval(&op, &[Some(&t)]).unwrap()[0].to_f64(), want, "{dims:?} {mask:b}");
        }
    }
}

#[test]
fn long_sums_are_accurate_and_ties_share() {
    let n = 3_000_000;
    let x = Tensor::from_slice(&[n], &vec![0.1f32; n]).unwrap();
    let sum = eval(&SumTo { dims: Dims::new() }, &[Some(&x)]).unwrap()[0].to_f64()[0];
    assert!((sum / (n as f64 * 0.1f32 as f64) - 1.0).abs() < 2e-7, "{sum}");
    let columns = x.reshaped(&[n / 3, 3]).unwrap();
    let sums = eval(&SumTo { dims: Dims::from_slice(&[3]) }, &[Some(&columns)]).unwrap()[0].to_f64();
    assert!((sums[1] / (n as f64 / 3.0 * 0.1f32 as f64) - 1.0).abs() < 2e-7, "{sums:?}");
}

#[test]
fn arg_of_ties_and_nan() {
    let x = Tensor::from_slice(&[2, 4], &[1.0f32, 3.0, 3.0, 2.0, 5.0, f32::NAN, 9.0, f32::NAN]).unwrap();
    let op = |last| Arg { max: true, axis: 1, keepdims: false, last };
    assert_eq!(eval(&op(false), &[Some(&x)]).unwrap()[0].to_ints().unwrap(), [1, 1]);
    assert_eq!(eval(&op(true), &[Some(&x)]).unwrap()[0].to_ints().unwrap()[0], 2);
}
