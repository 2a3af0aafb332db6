use super::*;
use crate::ops::eval;
use crate::tensor::Tensor;

#[test]
fn a_label_out_of_range_is_named_with_its_place() {
    let x = Tensor::zeros(DType::F32, &[2, 3, 2]);
    let t = Tensor::from_slice(&[2, 2], &[0i64, 1, 3, 2]).unwrap();
    let error = eval(&CrossEntropy { label_smoothing: 0.0 }, &[Some(&x), Some(&t)]).unwrap_err();
    assert_eq!(error.to_string(), "label 3 at position [1, 0] is none of the 3 classes");
}

#[test]
fn large_logits_stay_finite() {
    let x = Tensor::from_slice(&[1, 3], &[1e4f32, -1e4, 0.0]).unwrap();
    let t = Tensor::from_slice(&[1], &[1i64]).unwrap();
    let y = eval(&CrossEntropy { label_smoothing: 0.0 }, &[Some(&x), Some(&t)]).unwrap();
    assert_eq!(y[0].to_f64(), [2e4]);
    let t = Tensor::from_slice(&[1, 3], &[0.0f32, 1.0, 1.0]).unwrap();
    let y = eval(&BceWithLogits, &[Some(&x), Some(&t)]).unwrap();
    assert!((y[0].to_f64()[0] - (2e4 + 2f64.ln()) / 3.0).abs() < 1e-2);
}
