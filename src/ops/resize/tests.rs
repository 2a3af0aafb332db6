//! Cases of resizing.

use crate::ops::cases::Case;
use crate::tensor::{DType, Tensor};

fn floats(values: &[f32]) -> Tensor {
    Tensor::from_slice(&[values.len()], values).unwrap()
}

pub(in crate::ops) fn cases() -> Vec<Case> {
    let by_scales = |name: &str, x: &[usize], scales: &[f32]| {
        Case::new("Resize", 18).named(name).input(x).absent().fixed(floats(scales))
    };
    let by_sizes = |name: &str, x: &[usize], sizes: &[i64]| {
        Case::new("Resize", 19).named(name).input(x).absent().absent().fixed(Tensor::ints(sizes))
    };
    let mut all = Vec::new();
    for mode in ["nearest", "linear", "cubic"] {
        for coordinates in
            ["half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric"]
        {
            let name = format!("{mode}, {coordinates}");
            let with =
                |case: Case| case.string("mode", mode).string("coordinate_transformation_mode", coordinates);
            all.push(with(by_scales(&name, &[2, 3, 4, 5], &[1.0, 1.0, 1.7, 2.3])));
            all.push(with(by_sizes(&name, &[1, 2, 7, 6], &[1, 2, 3, 1])));
            all.push(with(by_scales(&name, &[1, 2, 8, 5], &[1.0, 1.0, 0.4, 1.5]).int("antialias", 1)));
        }
        all.push(
            by_scales("excluding", &[1, 2, 4, 5], &[1.0, 1.0, 1.6, 0.7])
                .string("mode", mode)
                .int("exclude_outside", 1),
        );
        all.push(
            Case::new("Resize", 13)
                .named("crop")
                .string("mode", mode)
                .string("coordinate_transformation_mode", "tf_crop_and_resize")
                .float("extrapolation_value", 2.5)
                .input(&[1, 2, 5, 6])
                .fixed(floats(&[0.0, 0.0, 0.4, 0.6, 1.0, 1.0, 1.2, 1.7]))
                .absent()
                .fixed(Tensor::ints(&[1, 2, 4, 3])),
        );
        all.push(by_sizes("axes", &[2, 5, 3, 4], &[7, 2]).string("mode", mode).ints("axes", &[-1, 1]));
        all.push(by_scales("1-D", &[2, 3, 7], &[1.0, 1.0, 1.5]).string("mode", mode));
    }
    for policy in ["not_larger", "not_smaller"] {
        all.push(
            by_sizes(policy, &[1, 1, 5, 8], &[7, 4])
                .ints("axes", &[2, 3])
                .string("mode", "linear")
                .string("keep_aspect_ratio_policy", policy),
        );
    }
    for rounding in ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"] {
        all.push(by_scales(rounding, &[1, 2, 4, 6], &[1.0, 1.0, 2.5, 0.5]).string("nearest_mode", rounding));
    }
    all.extend([
        by_scales("cubic, other coefficient", &[1, 1, 4, 4], &[1.0, 1.0, 2.0, 2.0])
            .string("mode", "cubic")
            .float("cubic_coeff_a", -0.5),
        by_scales("3-D", &[1, 2, 3, 4, 2], &[1.0, 1.0, 2.0, 0.5, 1.5]).string("mode", "linear"),
        by_scales("as it is", &[2, 3, 4], &[1.0, 1.0, 1.0]).string("mode", "linear"),
        by_scales("nothing left", &[2, 3, 4], &[1.0, 1.0, 0.2]).string("mode", "linear"),
        Case::new("Resize", 18)
            .named("integers")
            .fixed(Tensor::from_slice(&[2, 3], &[1i32, 2, 3, 4, 5, 6]).unwrap())
            .absent()
            .fixed(floats(&[2.0, 1.5]))
            .forward_only(),
        Case::new("Resize", 11)
            .named("tf_half_pixel_for_nn")
            .string("coordinate_transformation_mode", "tf_half_pixel_for_nn")
            .input(&[1, 2, 3, 4])
            .fixed(Tensor::zeros(DType::F32, &[0]))
            .fixed(Tensor::zeros(DType::F32, &[0]))
            .fixed(Tensor::ints(&[1, 2, 5, 3])),
        Case::new("Resize", 10)
            .named("opset 10")
            .string("mode", "linear")
            .input(&[1, 2, 3, 4])
            .fixed(floats(&[1.0, 1.0, 2.0, 1.5])),
        Case::new("Upsample", 9).named("opset 9").input(&[1, 2, 3, 4]).fixed(floats(&[1.0, 1.0, 2.0, 3.0])),
        Case::new("Upsample", 7)
            .named("opset 7")
            .string("mode", "linear")
            .attr("scales", crate::ops::Attr::Floats(vec![1.0, 1.0, 2.0, 1.5]))
            .input(&[1, 2, 3, 4]),
    ]);
    all
}

/// Four pixels made eight: the weights of a doubling are quarters.
#[test]
fn doubling_by_half_pixels() {
    let case = Case::new("Resize", 13).string("mode", "linear");
    let x = Tensor::from_slice(&[1, 1, 4], &[0.0f32, 4.0, 8.0, 12.0]).unwrap();
    let scales = floats(&[1.0, 1.0, 2.0]);
    let y = crate::ops::eval(case.make().as_ref(), &[Some(&x), None, Some(&scales)]).unwrap();
    assert_eq!(y[0].to_f64(), [0.0, 1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 12.0]);
}

#[test]
fn unusable_sizes_are_errors() {
    let case = Case::new("Resize", 13);
    let x = Tensor::zeros(DType::F32, &[1, 0, 4]);
    for (scales, sizes) in [
        (Some(floats(&[1.0, 2.0])), None),
        (Some(floats(&[1.0, 1.0, -1.0])), None),
        (Some(floats(&[1.0, 1.0, f32::NAN])), None),
        (None, Some(Tensor::ints(&[1, 3, 4]))),
        (None, Some(Tensor::ints(&[1, 0, -4]))),
        (None, None),
        (Some(floats(&[1.0; 3])), Some(Tensor::ints(&[1, 0, 4]))),
    ] {
        let operands = [Some(&x), None, scales.as_ref(), sizes.as_ref()];
        assert!(crate::ops::eval(case.make().as_ref(), &operands).is_err(), "{scales:?} {sizes:?}");
    }
}
