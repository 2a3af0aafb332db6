//! Cases of recurrent layers.

use super::*;
use crate::ops::cases::Case;
use crate::ops::{Attr, Attrs, create};
use crate::tensor::Tensor;

/// A layer of 3 inputs and 4 units over 5 steps of 2 sequences, with W, R and B.
fn layer(op: &str, name: &str, gates: usize, directions: usize) -> Case {
    let width = gates * 4;
    Case::new(op, 14)
        .named(name)
        .int("hidden_size", 4)
        .input(&[5, 2, 3])
        .input(&[directions, width, 3])
        .input(&[directions, width, 4])
        .input(&[directions, 2 * width])
}

fn lengths_of(values: &[i32]) -> Tensor {
    Tensor::from_slice(&[values.len()], values).unwrap()
}

fn names(list: &[&str]) -> Attr {
    Attr::Strs(list.iter().map(|s| s.to_string()).collect())
}

/// An LSTM of integer weights, 3 inputs and 4 units over 5 steps of 2 sequences, with scales of the given shape.
fn quantised(scales: &[usize]) -> Case {
    let floats = |dims: &[usize], from: f32| {
        let n: usize = dims.iter().product();
        let x: Vec<f32> = (0..n).map(|i| from + (i as f32 * 0.7).sin() * 0.4).collect();
        Tensor::from_slice(dims, &x).unwrap()
    };
    let levels = |dims: &[usize]| {
        let n: usize = dims.iter().product();
        let x: Vec<i8> = (0..n).map(|i| (i * 37 % 251) as u8 as i8).collect();
        Tensor::from_slice(dims, &x).unwrap()
    };
    let scale = || {
        let x: Vec<f32> = floats(scales, 0.5).to_f64().iter().map(|s| (s * 0.01) as f32).collect();
        Tensor::from_slice(scales, &x).unwrap()
    };
    let zero = || Tensor::zeros(DType::I8, scales);
    Case::contrib("DynamicQuantizeLSTM")
        .named(&format!("scales {scales:?}"))
        .int("hidden_size", 4)
        .string("direction", "bidirectional")
        .fixed(floats(&[5, 2, 3], 0.0))
        .fixed(levels(&[2, 3, 16]))
        .fixed(levels(&[2, 4, 16]))
        .fixed(floats(&[2, 32], 0.0))
        .fixed(lengths_of(&[3, 5]))
        .absent()
        .fixed(floats(&[2, 2, 4], 0.1))
        .absent()
        .fixed(scale())
        .fixed(zero())
        .fixed(scale())
        .fixed(zero())
        .outputs(3)
        .forward_only()
}

/// The layouts, directions and lengths that all layers share.
fn shared(op: &str, gates: usize, states: usize) -> Vec<Case> {
    let with_states = |mut case: Case, dims: [usize; 3]| {
        for _ in 0..states {
            case = case.input(&dims);
        }
        case
    };
    let outputs = 1 + states;
    let width = gates * 4;
    vec![
        layer(op, "forward", gates, 1),
        layer(op, "reverse, all outputs", gates, 1).string("direction", "reverse").outputs(outputs),
        with_states(
            layer(op, "bidirectional, states", gates, 2).string("direction", "bidirectional").absent(),
            [2, 2, 4],
        )
        .outputs(outputs),
        with_states(
            layer(op, "bidirectional, lengths", gates, 2)
                .string("direction", "bidirectional")
                .fixed(lengths_of(&[3, 5])),
            [2, 2, 4],
        )
        .outputs(outputs),
        with_states(layer(op, "one state for all", gates, 1).absent(), [1, 1, 4]),
        layer(op, "a sequence without steps", gates, 1).fixed(lengths_of(&[0, 4])).outputs(outputs),
        with_states(
            Case::new(op, 14)
                .named("batch first")
                .int("layout", 1)
                .string("direction", "bidirectional")
                .input(&[3, 4, 2])
                .input(&[2, width, 2])
                .input(&[2, width, 4])
                .absent()
                .fixed(lengths_of(&[4, 1, 2])),
            [3, 2, 4],
        )
        .outputs(outputs),
        Case::new(op, 7)
            .named("one sequence, no bias")
            .input(&[3, 1, 2])
            .input(&[1, width, 2])
            .input(&[1, width, 4]),
        // Gates of more than one block, and several tasks a step.
        Case::new(op, 22)
            .named("many rows")
            .string("direction", "bidirectional")
            .input(&[5, 70, 3])
            .input(&[2, 33 * gates, 3])
            .input(&[2, 33 * gates, 33])
            .tolerance(1e-5),
        layer(op, "clipped", gates, 1).float("clip", 0.4),
        Case::new(op, 14)
            .named("no sequences")
            .string("direction", "bidirectional")
            .input(&[3, 0, 2])
            .input(&[2, width, 2])
            .input(&[2, width, 4])
            .outputs(outputs),
        Case::new(op, 14).named("no steps").input(&[0, 2, 3]).input(&[1, width, 3]).input(&[1, width, 4]),
    ]
}

pub(in crate::ops) fn cases() -> Vec<Case> {
    let mut all = shared("LSTM", 4, 2);
    all.extend(shared("GRU", 3, 1));
    all.extend(shared("RNN", 1, 1));
    let reset_after =
        shared("GRU", 3, 1).into_iter().map(|c| c.also("reset after").int("linear_before_reset", 1));
    all.extend(reset_after);
    all.extend([
        layer("LSTM", "peepholes", 4, 1).absent().absent().input(&[1, 2, 4]).input(&[1, 12]).outputs(3),
        layer("LSTM", "peepholes, lengths", 4, 2)
            .string("direction", "bidirectional")
            .fixed(lengths_of(&[5, 2]))
            .absent()
            .absent()
            .input(&[2, 12])
            .float("clip", 0.9),
        layer("LSTM", "coupled", 4, 1).int("input_forget", 1).absent().absent().absent().input(&[1, 12]),
        layer("LSTM", "other activations", 4, 2)
            .string("direction", "bidirectional")
            .attr(
                "activations",
                names(&["HardSigmoid", "Softsign", "Affine", "Sigmoid", "ScaledTanh", "Elu"]),
            )
            .attr("activation_alpha", Attr::Floats(vec![0.3, 0.7, 1.2, 0.9]))
            .attr("activation_beta", Attr::Floats(vec![0.4, 0.1, 0.8])),
        layer("GRU", "other activations", 3, 1).attr("activations", names(&["Softplus", "LeakyRelu"])),
        quantised(&[2]),
        quantised(&[2, 16]).also("a scale a column").int("input_forget", 1),
        layer("RNN", "relu", 1, 1).attr("activations", names(&["Relu"])),
        layer("RNN", "thresholded", 1, 1)
            .attr("activations", names(&["ThresholdedRelu"]))
            .attr("activation_alpha", Attr::Floats(vec![0.25])),
    ]);
    all
}

#[test]
fn what_is_not_known_is_an_error() {
    let make = |attrs: &[(&str, Attr)]| {
        let attrs = Attrs(attrs.iter().map(|(k, v)| (k.to_string(), v.clone())).collect());
        create(&Spec { domain: "", op_type: "LSTM", opset: 14, attrs: &attrs, inputs: 3, outputs: 1 })
    };
    let why = |attrs: &[(&str, Attr)]| make(attrs).unwrap_err().to_string();
    assert!(why(&[("activations", names(&["Sine", "Tanh", "Tanh"]))]).contains("Sine"));
    assert!(why(&[("activations", names(&["Tanh"]))]).contains("3 are needed"));
    assert!(why(&[("direction", Attr::Str("sideways".into()))]).contains("sideways"));
    assert!(why(&[("hidden_size", Attr::Int(-3))]).contains("-3"));
    let op = make(&[]).unwrap();
    let metas = [[5, 2, 3], [1, 16, 3], [1, 16, 5]].map(|d| Meta::new(DType::F32, &d));
    let refs: Vec<Option<&Meta>> = metas.iter().map(Some).collect();
    assert!(op.infer(&refs).is_err());
}

#[test]
fn lengths_beyond_the_steps_are_an_error() {
    let attrs = Attrs::default();
    let op = create(&Spec { domain: "", op_type: "RNN", opset: 14, attrs: &attrs, inputs: 5, outputs: 1 })
        .unwrap();
    let tensor = |dims: &[usize]| Tensor::zeros(DType::F32, dims);
    let (x, w, r) = (tensor(&[3, 2, 4]), tensor(&[1, 5, 4]), tensor(&[1, 5, 5]));
    for lengths in [[4, 1], [-1, 1]] {
        let lengths = lengths_of(&lengths);
        let why = crate::ops::eval(op.as_ref(), &[Some(&x), Some(&w), Some(&r), None, Some(&lengths)]);
        assert!(why.unwrap_err().to_string().contains("sequence length"));
    }
}

/// Whole numbers whose largest is 255 are their own levels: the layer of integers is then the float one.
#[test]
fn a_quantised_layer_is_the_float_one_where_nothing_is_rounded() {
    let tensor = |dims: &[usize], x: &[f32]| Tensor::from_slice(dims, x).unwrap();
    let x: Vec<f32> = (0..6).map(|i| (i * 51) as f32).collect();
    let x = tensor(&[1, 2, 3], &x);
    let levels: Vec<i8> = (0..24).map(|i| (i * 11 % 17) as i8 - 8).collect();
    let scale = 0.002f32;
    // (3, 8) and turned (8, 3)
    let turned: Vec<f32> =
        (0..8).flat_map(|g| (0..3).map(move |k| k * 8 + g)).map(|i| f32::from(levels[i]) * scale).collect();
    let (w, r) = (Tensor::from_slice(&[1, 3, 8], &levels).unwrap(), Tensor::zeros(DType::I8, &[1, 2, 8]));
    let (scales, zero) = (tensor(&[1], &[scale]), Tensor::zeros(DType::I8, &[1]));
    let make = |domain: &'static str, op_type: &'static str, inputs: usize| {
        let attrs = Attrs::default();
        create(&Spec {
            domain,
            op_type,
            opset: if domain.is_empty() { 14 } else { 1 },
            attrs: &attrs,
            inputs,
            outputs: 3,
        })
        .unwrap()
    };
    let float = make("", "LSTM", 3);
    let truth = crate::ops::eval(
        float.as_ref(),
        &[Some(&x), Some(&tensor(&[1, 8, 3], &turned)), Some(&Tensor::zeros(DType::F32, &[1, 8, 2]))],
    )
    .unwrap();
    let quantised = make("com.microsoft", "DynamicQuantizeLSTM", 12);
    let operands = [
        Some(&x),
        Some(&w),
        Some(&r),
        None,
        None,
        None,
        None,
        None,
        Some(&scales),
        Some(&zero),
        Some(&scales),
        Some(&zero),
    ];
    let made = crate::ops::eval(quantised.as_ref(), &operands).unwrap();
    for (a, b) in truth.iter().zip(&made) {
        crate::ops::cases::close("DynamicQuantizeLSTM", "as LSTM", &a.to_f64(), &b.to_f64(), 1e-5);
    }
    // Scales that belong to nothing.
    let mut wrong = operands;
    let three = tensor(&[3], &[1.0; 3]);
    wrong[8] = Some(&three);
    assert!(crate::ops::eval(quantised.as_ref(), &wrong).unwrap_err().to_string().contains("scales"));
}
