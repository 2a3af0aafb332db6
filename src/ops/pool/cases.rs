//! The cases of pooling, and what they do not show.

use super::*;
use crate::ops::cases::Case;
use crate::ops::{Attr, Attrs, eval};
use crate::tensor::Tensor;

pub fn cases() -> Vec<super::cases::Case> {
    /// Name, input, kernel, then attributes.
    type Shape<'a> = (&'a str, &'a [usize], &'a [i64], &'a [(&'a str, &'a [i64])]);
    let shapes: [Shape; 10] = [
        ("2-D", &[2, 3, 5, 6], &[2, 3], &[]),
        ("stride 2", &[2, 3, 6, 6], &[2, 2], &[("strides", &[2, 2])]),
        ("3×3 stride 2", &[2, 2, 7, 40], &[3, 3], &[("strides", &[2, 2]), ("pads", &[1, 1, 1, 1])]),
        ("asymmetric pads", &[1, 2, 5, 6], &[3, 3], &[("pads", &[0, 2, 1, 0])]),
        ("stride 3", &[1, 2, 8, 9], &[2, 2], &[("strides", &[3, 3])]),
        ("dilation", &[1, 2, 8, 9], &[2, 3], &[("dilations", &[2, 3]), ("pads", &[1, 2, 1, 2])]),
        ("1-D", &[2, 3, 9], &[3], &[("strides", &[2]), ("pads", &[1, 1])]),
        ("3-D", &[1, 2, 4, 5, 6], &[2, 2, 3], &[("strides", &[1, 2, 2]), ("pads", &[1, 0, 1, 0, 1, 1])]),
        ("no images", &[0, 2, 4, 4], &[2, 2], &[]),
        ("larger", &[3, 9, 20, 20], &[3, 3], &[("pads", &[1, 1, 1, 1])]),
    ];
    let mut cases = Vec::new();
    for op in ["MaxPool", "AveragePool", "LpPool"] {
        for (name, x, kernel, attrs) in &shapes {
            for variant in ["", " ceil", " SAME_UPPER", " SAME_LOWER", " counting pads"] {
                let mut case =
                    Case::new(op, 19).named(&format!("{name}{variant}")).ints("kernel_shape", kernel);
                for (key, value) in *attrs {
                    if !(*key == "pads" && variant.starts_with(" SAME")) {
                        case = case.ints(key, value);
                    }
                }
                case = match variant {
                    " ceil" => case.int("ceil_mode", 1),
                    " counting pads" if op == "AveragePool" => {
                        case.int("ceil_mode", 1).int("count_include_pad", 1)
                    }
                    " SAME_UPPER" | " SAME_LOWER" => case.string("auto_pad", variant.trim()),
                    "" => case,
                    _ => continue,
                };
                // Away from the kinks at zero.
                cases.push(if op == "LpPool" { case.within(x, 0.2, 1.0) } else { case.input(x) });
            }
        }
    }
    for op in ["GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"] {
        for x in
            [&[2, 3, 4, 5][..], &[2, 3, 7], &[1, 2, 3, 4, 5], &[2, 3, 1, 1], &[0, 3, 2, 2], &[2, 40, 30, 30]]
        {
            cases.push(Case::new(op, 13).named(&format!("{x:?}")).within(x, 0.2, 1.0));
        }
    }
    for p in [1, 3, 4] {
        let case =
            Case::new("LpPool", 11).named(&format!("p = {p}")).int("p", p).ints("kernel_shape", &[2, 2]);
        cases.push(case.within(&[1, 2, 5, 5], 0.2, 1.0));
    }
    cases.push(
        Case::new("MaxPool", 12)
            .named("integers")
            .ints("kernel_shape", &[2, 2])
            .fixed(Tensor::from_slice(&[1, 1, 2, 2], &[1u8, 7, 3, 2]).unwrap())
            .forward_only(),
    );
    cases.push(
        Case::new("MaxPool", 12)
            .named("with Indices")
            .outputs(2)
            .ints("kernel_shape", &[2, 2])
            .input(&[1, 2, 4, 5]),
    );
    cases
}

#[test]
fn pool_cases() {
    cases().iter().for_each(crate::ops::cases::check);
}

fn window(attrs: &[(&str, &[i64])]) -> Window {
    let mut a = Attrs::default();
    for (name, value) in attrs {
        a.0.insert(name.to_string(), Attr::Ints(value.to_vec()));
    }
    Window::of(&a).unwrap()
}

#[test]
fn the_first_of_equal_maxima_and_column_major_indices() {
    let x = Tensor::from_slice(&[1, 2, 2, 3], &[1f32, 4., 4., 4., 0., 0., 2., 2., 3., 3., 9., 1.]).unwrap();
    let mut op =
        MaxPool { window: window(&[("kernel_shape", &[2, 2])]), column_major: false, layout: Layout::First };
    let out = eval(&op, &[Some(&x)]).unwrap();
    assert_eq!(out[0].to_f64(), [4., 4., 9., 9.]);
    assert_eq!(out[1].to_ints().unwrap(), [1, 1, 10, 10]);
    assert_eq!(out[2].to_ints().unwrap(), [1, 1, 4, 4]);
    op.column_major = true;
    let out = eval(&op, &[Some(&x)]).unwrap();
    assert_eq!(out[1].to_ints().unwrap(), [2, 2, 9, 9]);
}

#[test]
fn nan_wins_and_padding_never_does() {
    let x = Tensor::from_slice(&[1, 1, 3], &[-1f32, f32::NAN, -3.]).unwrap();
    let op = MaxPool {
        window: window(&[("kernel_shape", &[2]), ("pads", &[1, 1])]),
        column_major: false,
        layout: Layout::First,
    };
    let y = eval(&op, &[Some(&x)]).unwrap()[0].to_f64();
    assert!(y[0] == -1.0 && y[1].is_nan() && y[2].is_nan() && y[3] == -3.0, "{y:?}");
}

#[test]
fn ceil_mode_leaves_out_windows_that_begin_in_the_end_padding() {
    // PyTorch: max_pool1d of 3 elements, kernel 1, stride 2, padding 0, ceil: 2 outputs; of 4 elements, kernel
    // 2, stride 3, padding 1, ceil: 2.
    let mut w = window(&[("kernel_shape", &[1]), ("strides", &[2])]);
    w.ceil = true;
    assert_eq!(w.resolve(&[3], &[]).unwrap().y, [1, 1, 2]);
    let mut w = window(&[("kernel_shape", &[2]), ("strides", &[3]), ("pads", &[1, 1])]);
    w.ceil = true;
    assert_eq!(w.resolve(&[4], &[]).unwrap().y, [1, 1, 2]);
    assert_eq!(w.resolve(&[2], &[]).unwrap().y, [1, 1, 1]);
}
