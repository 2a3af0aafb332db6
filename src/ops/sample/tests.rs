//! Cases of sampling.

use crate::ops::cases::Case;
use crate::ops::eval;
use crate::tensor::{DType, Tensor};

/// In the type in which gradients are checked.
fn regions(dims: &[usize], values: &[f64]) -> Tensor {
    Tensor::from_slice(dims, values).unwrap()
}

fn floats(dims: &[usize], values: &[f32]) -> Tensor {
    Tensor::from_slice(dims, values).unwrap()
}

pub(in crate::ops) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for mode in ["linear", "nearest", "cubic"] {
        for padding in ["zeros", "border", "reflection"] {
            for align in [0, 1] {
                let grid = |name: &str, x: &[usize], points: &[usize]| {
                    Case::new("GridSample", 20)
                        .named(&format!("{name}, {mode}, {padding}, {align}"))
                        .string("mode", mode)
                        .string("padding_mode", padding)
                        .int("align_corners", align)
                        .input(x)
                        .within(points, -1.4, 1.4)
                };
                all.push(grid("image", &[2, 3, 4, 5], &[2, 3, 2, 2]));
                all.push(grid("volume", &[1, 2, 3, 4, 2], &[1, 2, 3, 2, 3]));
            }
        }
    }
    all.push(
        Case::new("GridSample", 16)
            .named("bilinear")
            .string("mode", "bilinear")
            .input(&[1, 9, 3, 3])
            .input(&[1, 2, 2, 2]),
    );
    for align in [0, 1] {
        let grid = |theta: &[usize], size: &[i64]| {
            Case::new("AffineGrid", 20).int("align_corners", align).input(theta).fixed(Tensor::ints(size))
        };
        all.push(grid(&[2, 2, 3], &[2, 3, 4, 1]));
        all.push(grid(&[1, 3, 4], &[1, 3, 2, 3, 4]));
    }
    let boxes = || regions(&[3, 4], &[0.3, 0.7, 4.1, 3.2, -1.0, 1.3, 2.2, 6.0, 1.0, 1.0, 1.5, 1.2]);
    let images = || Tensor::ints(&[1, 0, 1]);
    for mode in ["avg", "max"] {
        let align = |name: &str| {
            Case::new("RoiAlign", 16)
                .named(&format!("{name}, {mode}"))
                .string("mode", mode)
                .int("output_height", 2)
                .int("output_width", 3)
                .input(&[2, 9, 5, 6])
                .fixed(boxes())
                .fixed(images())
        };
        all.push(align("half pixel"));
        all.push(align("two samples").int("sampling_ratio", 2).float("spatial_scale", 0.8));
        all.push(align("output half pixel").string("coordinate_transformation_mode", "output_half_pixel"));
    }
    let five = regions(&[2, 5], &[1.0, 0.0, 1.0, 3.0, 4.0, 0.0, 2.0, 0.4, 9.0, 2.6]);
    let places = Tensor::from_slice(&[1, 2, 2, 2], &[0i64, 3, 9, 14, 17, 22, 24, 31]).unwrap();
    let patches = |name: &str, x: &[usize], image: &[i64], block: &[i64]| {
        Case::new("Col2Im", 18).named(name).input(x).fixed(Tensor::ints(image)).fixed(Tensor::ints(block))
    };
    let crop_pad =
        |x: &[usize], shape: &[i64]| Case::new("CenterCropPad", 18).input(x).fixed(Tensor::ints(shape));
    let deform = |name: &str, x: &[usize], w: &[usize], offset: &[usize]| {
        Case::new("DeformConv", 19).named(name).input(x).input(w).input(offset)
    };
    all.extend([
        Case::new("MaxRoiPool", 1).ints("pooled_shape", &[2, 2]).input(&[2, 3, 5, 6]).fixed(five),
        Case::new("MaxUnpool", 11)
            .ints("kernel_shape", &[2, 2])
            .ints("strides", &[2, 2])
            .input(&[1, 2, 2, 2])
            .fixed(places.clone()),
        Case::new("MaxUnpool", 9)
            .named("to a larger shape")
            .ints("kernel_shape", &[2, 2])
            .ints("strides", &[2, 2])
            .input(&[1, 2, 2, 2])
            .fixed(places)
            .fixed(Tensor::ints(&[1, 2, 5, 6])),
        patches("2-D", &[2, 12, 6], &[3, 4], &[2, 2]),
        patches("strides, pads, dilations", &[1, 4, 9], &[6, 5], &[2, 2])
            .ints("strides", &[2, 2])
            .ints("dilations", &[2, 1])
            .ints("pads", &[1, 0, 1, 1]),
        patches("1-D", &[2, 6, 4], &[6], &[3]),
        patches("3-D", &[1, 8, 12], &[3, 4, 3], &[2, 2, 2]),
        crop_pad(&[5, 4, 3], &[2, 7, 3]).named("both"),
        crop_pad(&[5, 4, 3], &[6, 1]).named("axes").ints("axes", &[-1, 0]),
        deform("plain", &[2, 3, 5, 6], &[4, 3, 3, 3], &[2, 18, 3, 4]).absent().input(&[2, 9, 3, 4]),
        deform("groups, bias", &[1, 4, 5, 5], &[6, 2, 2, 2], &[1, 16, 3, 3])
            .input(&[6])
            .input(&[1, 8, 3, 3])
            .int("group", 2)
            .int("offset_group", 2)
            .ints("strides", &[2, 2])
            .ints("pads", &[1, 1, 0, 0]),
        deform("dilated", &[1, 2, 6, 6], &[3, 2, 2, 3], &[1, 12, 6, 3])
            .ints("dilations", &[2, 2])
            .ints("pads", &[1, 0, 1, 1]),
    ]);
    all
}

#[test]
fn places_outside_are_errors() {
    let case = Case::new("MaxUnpool", 11).ints("kernel_shape", &[2, 2]).ints("strides", &[2, 2]);
    let x = Tensor::zeros(DType::F32, &[1, 1, 1, 2]);
    for at in [8i64, -1] {
        let places = Tensor::from_slice(&[1, 1, 1, 2], &[0, at]).unwrap();
        assert!(eval(case.make().as_ref(), &[Some(&x), Some(&places)]).is_err());
    }
}

/// An identity transform samples the image itself.
#[test]
fn an_affine_grid_of_nothing_is_the_identity() {
    for align in [0, 1] {
        let theta = floats(&[1, 2, 3], &[1.0, 0.0, 0.0, 0.0, 1.0, 0.0]);
        let size = Tensor::ints(&[1, 1, 3, 4]);
        let grid = Case::new("AffineGrid", 20).int("align_corners", align).make();
        let grid = eval(grid.as_ref(), &[Some(&theta), Some(&size)]).unwrap().remove(0);
        let values: Vec<f32> = (0..12).map(|v| v as f32).collect();
        let x = floats(&[1, 1, 3, 4], &values);
        let sample = Case::new("GridSample", 20).int("align_corners", align).make();
        let y = eval(sample.as_ref(), &[Some(&x), Some(&grid)]).unwrap().remove(0);
        for (a, b) in y.to_f64().iter().zip(&values) {
            assert!((a - f64::from(*b)).abs() < 1e-5, "{a} {b}");
        }
    }
}
