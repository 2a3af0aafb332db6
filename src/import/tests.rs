use prost::Message;

use super::make::*;
use super::proto::*;
use super::*;
use crate::graph::{Dim, Source};
use crate::tensor::DType;

fn role(m: &Model, name: &str) -> Role {
    let w = &m.weights[m.find_weight(name).unwrap_or_else(|| panic!("no weight {name}")).index()];
    assert_eq!(w.trainable, w.role.is_trainable());
    w.role
}

fn values(m: &Model, name: &str) -> Vec<f32> {
    m.load_weight(m.find_weight(name).unwrap()).unwrap().get::<f32>().unwrap().to_vec()
}

#[test]
fn unsorted_nodes_are_sorted_and_the_declarations_read() {
    let m = import(&model(
        vec![node("Relu", &["h"], &["y"]), node("Add", &["x", "b"], &["h"])],
        vec![ramp("b", &[3])],
        "y",
    ))
    .unwrap();
    assert_eq!(m.graph.nodes.len(), 2);
    assert!(m.graph.describe(crate::graph::NodeId(0)).starts_with("Add"));
    let x = m.graph.value(m.graph.inputs[0]);
    let dims = x.declared.as_ref().unwrap().dims.clone().unwrap();
    assert_eq!(dims, [Dim::Symbol("batch".into()), Dim::Fixed(3)]);
    assert_eq!(m.output_names().collect::<Vec<_>>(), ["y"]);
    assert_eq!((m.opset(), m.ir_version, m.producer.0.as_str()), (17, 8, "test"));
    assert_eq!(m.ops["Add"], 1);
}

#[test]
fn what_is_no_graph_is_refused_by_name() {
    let refused = |nodes: Vec<NodeProto>, init: Vec<TensorProto>| {
        import(&model(nodes, init, "y")).map(|_| ()).unwrap_err().to_string()
    };
    let cycle = refused(
        vec![node("Add", &["x", "b"], &["a"]), node("Relu", &["a"], &["b"]), node("Relu", &["a"], &["y"])],
        vec![],
    );
    assert!(cycle.contains("cycle"), "{cycle}");
    assert!(refused(vec![node("Relu", &["nowhere"], &["y"])], vec![]).contains("'nowhere'"));
    assert!(refused(vec![node("Relu", &["x"], &["z"])], vec![]).contains("output 'y'"));
    assert!(refused(vec![node("Relu", &["x"], &["y"]), node("Abs", &["x"], &["y"])], vec![]).contains("'y'"));
    assert!(refused(vec![node("Relu", &["x"], &["y"])], vec![floats("b", &[3], &[1.0])]).contains("'b'"));
    assert!(
        refused(vec![node("Relu", &["x"], &["y"])], vec![zeros("b", &[1]), zeros("b", &[1])])
            .contains("twice")
    );
    assert!(from_bytes("a.txt", &b"hello, I am text"[..]).is_err());
    assert!(from_bytes("a.onnx", &b""[..]).unwrap_err().to_string().contains("a.onnx"));
}

#[test]
fn what_cannot_be_executed_is_listed_all_at_once() {
    let mut cond = node("If", &["c"], &["i"]);
    let body = GraphProto {
        node: vec![node("Identity", &["h"], &["inner"])],
        output: vec![value("inner", &[])],
        ..Default::default()
    };
    cond.attribute.push(AttributeProto { g: Some(Box::new(body)), ..attr("then_branch", 5) });
    let mut contrib = node("Odd", &["i"], &["y"]);
    contrib.domain = "com.microsoft".into();
    let strings =
        TensorProto { name: "s".into(), data_type: 8, dims: vec![1], strings: 1, ..Default::default() };
    // `h` is computed after its capturing node in the file.
    let m = import(&model(
        vec![cond, contrib, node("Less", &["x", "x"], &["c"]), node("Relu", &["x"], &["h"])],
        vec![strings],
        "y",
    ))
    .unwrap();
    let types: Vec<&str> = m.blockers.iter().map(|b| b.op_type.as_str()).collect();
    assert!(
        types.contains(&"If") && types.contains(&"com.microsoft.Odd") && types.contains(&"Initializer"),
        "{types:?}"
    );
    let relu = m.graph.nodes.iter().position(|n| m.graph.value(n.outputs[0].unwrap()).name == "h").unwrap();
    let cond = m.graph.nodes.iter().position(|n| m.graph.value(n.outputs[0].unwrap()).name == "i").unwrap();
    assert!(relu < cond);
    assert!(m.graph.nodes[cond].inputs.contains(&m.graph.find("h")));
}

#[test]
fn constants_of_every_spelling() {
    let le = |v: &[f32]| Chunks::from(v.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>());
    let constant = |a: AttributeProto, out: &str| with(node("Constant", &[], &[out]), a);
    let nodes = vec![
        constant(AttributeProto { t: Some(Box::new(ramp("", &[2]))), ..attr("value", 4) }, "tensor"),
        constant(AttributeProto { floats: le(&[1.0, 2.0, 3.0]), ..attr("value_floats", 6) }, "floats"),
        constant(
            AttributeProto { f: Some(2.5f32.to_le_bytes().to_vec().into()), ..attr("value_float", 1) },
            "float",
        ),
        constant(attr("value_float", 1), "zero"),
        constant(AttributeProto { ints: vec![4, 5], ..attr("value_ints", 7) }, "ints"),
        constant(AttributeProto { i: 6, ..attr("value_int", 2) }, "int"),
        // Before the type was written, it followed from the field.
        constant(AttributeProto { floats: le(&[9.0]), ..attr("value_floats", 0) }, "untyped"),
        node("Identity", &["x"], &["y"]),
    ];
    let m = import(&model(nodes, vec![], "y")).unwrap();
    assert_eq!(values(&m, "tensor"), [0.5, 1.5]);
    assert_eq!(values(&m, "floats"), [1.0, 2.0, 3.0]);
    assert_eq!(values(&m, "float"), [2.5]);
    assert_eq!(values(&m, "zero"), [0.0]);
    assert_eq!(values(&m, "untyped"), [9.0]);
    let known = |name: &str| match &m.graph.value(m.graph.find(name).unwrap()).source {
        Source::Constant(t) => t.to_ints().unwrap(),
        other => panic!("{other:?}"),
    };
    assert_eq!(known("ints"), [4, 5]);
    assert_eq!(known("int"), [6]);
    // Their values are there for shape inference.
    let v = m.graph.value(m.graph.find("float").unwrap());
    assert_eq!(v.meta.as_ref().unwrap().value.as_ref().unwrap().to_f64(), [2.5]);
    let w = |name: &str| &m.weights[m.find_weight(name).unwrap().index()];
    assert_eq!(w("floats").location.encoding, Encoding::AttributeFloats);
    assert_eq!(w("float").location.encoding, Encoding::AttributeFloat);
}

#[test]
fn every_encoding_of_floats_is_read_from_its_place() {
    let le = |v: &[f32]| bytes::Bytes::from(v.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>());
    let empty = |name: &str, n: i64, data_type: i32| TensorProto {
        name: name.into(),
        dims: vec![n],
        data_type,
        ..Default::default()
    };
    let mut bits = Vec::new();
    [0x3c00u64, 0xc000, 0x0001].iter().for_each(|&b| wire::put_varint(&mut bits, b));
    let tensors = vec![
        TensorProto { float_data: Chunks(vec![le(&[1.0, 2.0])]), ..empty("packed", 2, 1) },
        TensorProto { float_data: Chunks(vec![le(&[1.0]), le(&[2.0, 3.0])]), ..empty("chunked", 3, 1) },
        TensorProto { double_data: Chunks::from(4f64.to_le_bytes().to_vec()), ..empty("double", 1, 11) },
        TensorProto { int32_data: Chunks::from(bits), ..empty("half", 3, 10) },
        TensorProto { raw_data: Some(vec![0x80, 0x3f].into()), ..empty("bf16", 1, 16) },
    ];
    let m = import(&model(vec![node("Identity", &["x"], &["y"])], tensors, "y")).unwrap();
    assert_eq!(values(&m, "packed"), [1.0, 2.0]);
    assert_eq!(values(&m, "chunked"), [1.0, 2.0, 3.0]);
    assert_eq!(values(&m, "half"), [1.0, -2.0, 2f32.powi(-24)]);
    assert_eq!(values(&m, "bf16"), [1.0]);
    let double = m.load_weight(m.find_weight("double").unwrap()).unwrap();
    assert_eq!((double.dtype(), double.to_f64()), (DType::F64, vec![4.0]));
    let w = |name: &str| &m.weights[m.find_weight(name).unwrap().index()];
    assert_eq!(w("packed").location.encoding, Encoding::PackedFloat);
    assert_eq!(w("double").location.encoding, Encoding::PackedDouble);
    assert!(matches!(w("chunked").location.encoding, Encoding::Scattered(ref c) if c.len() == 2));
    assert!(matches!(w("half").location.encoding, Encoding::Varints { .. }));
    let l = &w("packed").location;
    assert_eq!(m.files[0].bytes[l.offset..l.offset + l.len], le(&[1.0, 2.0])[..]);
}

#[test]
fn roles_follow_from_slots() {
    let transpose =
        with(node("Transpose", &["wt"], &["wt_t"]), AttributeProto { ints: vec![1, 0], ..attr("perm", 7) });
    let nodes = vec![
        node("Conv", &["x", "cw"], &["c"]),
        node("Add", &["c", "cb"], &["c1"]), // [1, 4, 1, 1]: a convolution's bias, squeezed out
        node("Div", &["c1", "six"], &["c2"]),
        node("BatchNormalization", &["c2", "g", "b", "mean", "var"], &["n"]),
        node("Flatten", &["n"], &["f"]),
        transpose,
        node("MatMul", &["f", "wt_t"], &["m"]),
        node("Add", &["mb", "m"], &["m1"]),
        node("Mul", &["m1", "layer_scale"], &["m2"]),
        node("MatMul", &["m2", "m2"], &["scores"]),
        node("Add", &["scores", "mask"], &["masked"]),
        node("Add", &["masked", "position"], &["p"]),
        node("Gather", &["table", "ids"], &["e"]),
        node("Mul", &["x", "input_std"], &["xs"]),
        node("PRelu", &["xs", "slope"], &["y"]),
    ];
    let m = import(&model(
        nodes,
        vec![
            ramp("cw", &[4, 3, 1, 1]),
            ramp("cb", &[1, 4, 1, 1]),
            floats("six", &[], &[6.0]),
            ramp("g", &[4]),
            ramp("b", &[4]),
            ramp("mean", &[4]),
            ramp("var", &[4]),
            ramp("wt", &[5, 4]),
            ramp("mb", &[5]),
            ramp("layer_scale", &[5]),
            ramp("mask", &[5]),
            ramp("position", &[4, 5]),
            ramp("table", &[7, 2]),
            ints("ids", &[0]),
            ramp("input_std", &[3, 1, 1]),
            ramp("slope", &[4, 1, 1]),
            ramp("unused", &[9, 9]),
        ],
        "y",
    ))
    .unwrap();
    let want = [
        ("cw", Role::Weight),
        ("cb", Role::Bias),
        ("six", Role::Constant),
        ("g", Role::Scale),
        ("b", Role::Shift),
        ("mean", Role::RunningMean),
        ("var", Role::RunningVar),
        ("wt", Role::Weight),
        ("mb", Role::Bias),
        ("layer_scale", Role::Scale),
        ("mask", Role::Constant),
        ("position", Role::Constant),
        ("table", Role::Embedding),
        ("input_std", Role::Constant),
        ("slope", Role::Weight),
        ("unused", Role::Constant),
    ];
    for (name, r) in want {
        assert_eq!(role(&m, name), r, "{name}: {}", m.weights[m.find_weight(name).unwrap().index()].why);
    }
    assert!(m.weights[m.find_weight("wt").unwrap().index()].why.contains("through"));
}

#[test]
fn roles_in_a_normalisation_written_out() {
    let nodes = vec![
        node("Sub", &["x", "mu"], &["d"]),
        node("Pow", &["d", "two"], &["sq"]),
        node("ReduceMean", &["sq"], &["v"]),
        node("Add", &["v", "eps"], &["ve"]),
        node("Sqrt", &["ve"], &["s"]),
        node("Div", &["d", "s"], &["n"]),
        node("Mul", &["n", "gamma"], &["ng"]),
        node("Add", &["ng", "beta"], &["h"]),
        // TensorFlow's: x·(gamma·rsqrt) + (beta − mean·(gamma·rsqrt))
        node("Reciprocal", &["s"], &["r"]),
        node("Mul", &["r", "gamma2"], &["rg"]),
        node("Mul", &["h", "rg"], &["hx"]),
        node("Mul", &["v", "rg"], &["mg"]),
        node("Sub", &["beta2", "mg"], &["off"]),
        node("Add", &["hx", "off"], &["y"]),
    ];
    let init = vec![
        ramp("mu", &[3]),
        floats("two", &[], &[2.0]),
        floats("eps", &[1], &[1e-5]),
        ramp("gamma", &[3]),
        ramp("beta", &[3]),
        ramp("gamma2", &[3]),
        ramp("beta2", &[3]),
    ];
    let m = import(&model(nodes, init, "y")).unwrap();
    for (name, r) in [
        ("mu", Role::Constant),
        ("two", Role::Constant),
        ("eps", Role::Constant),
        ("gamma", Role::Scale),
        ("beta", Role::Shift),
        ("gamma2", Role::Scale),
        ("beta2", Role::Shift),
    ] {
        assert_eq!(role(&m, name), r, "{name}");
    }
}

/// As exporters write it before opset 18: over groups for channels, then the scale and shift of the channels.
#[test]
fn roles_in_a_normalisation_over_groups() {
    let nodes = vec![
        node("Reshape", &["x", "groups"], &["g"]),
        node("InstanceNormalization", &["g", "ones", "zeros"], &["n"]),
        node("Reshape", &["n", "channels"], &["c"]),
        node("Mul", &["c", "gamma"], &["s"]),
        node("Add", &["s", "beta"], &["y"]),
    ];
    let init = vec![
        floats("ones", &[2], &[1.0, 1.0]),
        zeros("zeros", &[2]),
        ramp("gamma", &[4, 1]),
        ramp("beta", &[4, 1]),
        ints("groups", &[0, 2, -1]),
        ints("channels", &[0, 4, -1]),
    ];
    let m = import(&model(nodes, init, "y")).unwrap();
    let roles = ["ones", "zeros", "gamma", "beta"].map(|n| role(&m, n));
    assert_eq!(roles, [Role::Constant, Role::Constant, Role::Scale, Role::Shift]);
}

#[test]
fn merged_tensors_are_told_from_shared_ones() {
    let nodes = vec![
        node("Gemm", &["x", "w1", "zero"], &["a"]),
        node("Gemm", &["a", "w2", "zero"], &["b"]),
        // The same layer twice.
        node("Gemm", &["b", "w3", "shared"], &["c"]),
        node("Gemm", &["c", "w3", "shared"], &["y"]),
    ];
    let init = vec![
        ramp("w1", &[3, 3]),
        ramp("w2", &[3, 3]),
        ramp("w3", &[3, 3]),
        zeros("zero", &[3]),
        zeros("shared", &[3]),
    ];
    let m = import(&model(nodes, init, "y")).unwrap();
    let w = |name: &str| &m.weights[m.find_weight(name).unwrap().index()];
    assert!(w("zero").split.is_none() && w("zero").uses.len() == 1);
    let split = w("zero.2").split.as_ref().unwrap();
    assert_eq!(
        (split.source, &split.reader),
        (m.find_weight("zero").unwrap(), &Reader::Operands(vec![(1, 2)]))
    );
    assert_eq!((role(&m, "zero"), role(&m, "zero.2")), (Role::Bias, Role::Bias));
    assert!(w("shared").uses.len() == 2 && m.find_weight("shared.2").is_none());
    assert_eq!(m.weights.len(), 6);
    let gemm = m.graph.nodes.iter().find(|n| n.inputs[1] == m.graph.find("w2")).unwrap();
    assert_eq!(gemm.inputs[2], m.graph.find("zero.2"));
}

#[test]
fn tensors_merged_through_identity_are_split_too() {
    // What PyTorch's exporter makes of two equal tensors; and a running mean merged with a shift.
    let bn = |i: &[&str], out: &str| node("BatchNormalization", i, &[out]);
    let nodes = vec![
        node("Identity", &["b1"], &["b2"]),
        bn(&["x", "g1", "b1", "zero", "var"], "p"),
        bn(&["x", "g2", "b2", "mean", "var2"], "q"),
        bn(&["x", "g3", "zero", "mean3", "var3"], "r"),
        node("Sum", &["p", "q", "r"], &["y"]),
    ];
    let names = ["g1", "g2", "g3", "b1", "var", "mean", "var2", "mean3", "var3"];
    let mut init: Vec<TensorProto> = names.iter().map(|n| ramp(n, &[3])).collect();
    init.push(zeros("zero", &[3]));
    let m = import(&model(nodes, init, "y")).unwrap();
    let w = |name: &str| &m.weights[m.find_weight(name).unwrap().index()];
    assert_eq!(w("b2").split.as_ref().unwrap().reader, Reader::Identity(0));
    assert_eq!((role(&m, "b1"), role(&m, "b2")), (Role::Shift, Role::Shift));
    assert_eq!((role(&m, "zero"), role(&m, "zero.2")), (Role::RunningMean, Role::Shift));
    assert!(m.graph.nodes.iter().all(|n| crate::graph::op_type(n.op.as_ref()) != "Identity"));
    assert_eq!(m.ops["Identity"], 1);
    assert_eq!(values(&m, "b2"), values(&m, "b1"));
}

#[test]
fn a_network_that_was_never_trained_has_all_its_norms_merged() {
    let norm = |x: &str, y: &str| node("BatchNormalization", &[x, "one", "zero", "zero", "one"], &[y]);
    let nodes = vec![
        node("Conv", &["x", "w1"], &["a"]),
        norm("a", "b"),
        node("Conv", &["b", "w2"], &["c"]),
        norm("c", "d"),
        // The second layer again: one layer, used twice.
        node("Conv", &["d", "w2"], &["e"]),
        norm("e", "y"),
    ];
    let init = vec![
        ramp("w1", &[3, 3, 1, 1]),
        ramp("w2", &[3, 3, 1, 1]),
        zeros("zero", &[3]),
        floats("one", &[3], &[1.0; 3]),
    ];
    let m = import(&model(nodes, init, "y")).unwrap();
    let count = |r: Role| m.weights.iter().filter(|w| w.role == r).count();
    let roles = [Role::Weight, Role::Scale, Role::Shift, Role::RunningMean, Role::RunningVar];
    assert_eq!(roles.map(count), [2; 5], "{:#?}", m.weights);
    assert!(
        m.weights
            .iter()
            .filter(|w| w.role != Role::Weight)
            .all(|w| !w.merged && (1..=2).contains(&w.uses.len()))
    );
}

#[test]
fn constant_of_shape_in_a_weight_slot_is_a_weight_and_elsewhere_a_node() {
    let fill = |input: &str, out: &str| {
        let t = floats("", &[1], &[0.5]);
        with(
            node("ConstantOfShape", &[input], &[out]),
            AttributeProto { t: Some(Box::new(t)), ..attr("value", 4) },
        )
    };
    let nodes = vec![
        fill("wshape", "w"),
        fill("mshape", "mask"),
        node("MatMul", &["x", "w"], &["h"]),
        node("Add", &["h", "mask"], &["y"]),
    ];
    let m = import(&model(nodes, vec![ints("wshape", &[3, 2]), ints("mshape", &[7, 2])], "y")).unwrap();
    assert_eq!(role(&m, "w"), Role::Weight);
    assert_eq!(values(&m, "w"), [0.5; 6]);
    assert!(matches!(m.weights[0].location.encoding, Encoding::Filled { node: 0, .. }));
    assert_eq!(m.find_weight("mask"), None);
    assert_eq!(m.graph.nodes.len(), 3);
}

#[test]
fn external_data_is_mapped_and_its_paths_are_checked() {
    let dir = tempfile::tempdir().unwrap();
    let external = |location: &str, offset: &str, length: &str| {
        let entry = |key: &str, value: &str| StringStringEntryProto { key: key.into(), value: value.into() };
        TensorProto {
            name: "w".into(),
            dims: vec![2],
            data_type: 1,
            data_location: EXTERNAL,
            external_data: vec![
                entry("location", location),
                entry("offset", offset),
                entry("length", length),
            ],
            ..Default::default()
        }
    };
    let path = dir.path().join("m.onnx");
    let load = |t: TensorProto| {
        let m = model(vec![node("Add", &["x", "w"], &["y"])], vec![t], "y");
        std::fs::write(&path, m.encode_to_vec()).unwrap();
        super::load(&path)
    };
    let data: Vec<u8> = [0f32, 1.0, 2.0, 3.0].iter().flat_map(|v| v.to_le_bytes()).collect();
    std::fs::write(dir.path().join("m.data"), &data).unwrap();
    let m = load(external("m.data", "8", "8")).unwrap();
    assert_eq!(values(&m, "w"), [2.0, 3.0]);
    assert_eq!((m.files.len(), m.weights[0].location.file, m.weights[0].location.offset), (2, 1, 8));
    for (bad, says) in [
        (external("m.data", "12", "8"), "beyond"),
        (external("m.data", "18446744073709551615", "8"), "beyond"),
        (external("m.data", "8", "4"), "4 bytes"),
        (external("m.data", "x", "8"), "offset"),
        (external("../m.data", "0", "8"), "leaves"),
        (external("/etc/passwd", "0", "8"), "relative"),
        (external("none.data", "0", "8"), "none.data"),
    ] {
        let e = load(bad).unwrap_err().to_string();
        assert!(e.contains(says), "{e}");
    }
    // In memory there is nothing beside the model.
    let m = model(vec![node("Add", &["x", "w"], &["y"])], vec![external("m.data", "8", "8")], "y");
    assert!(import(&m).is_err());
}

/// Every truncation and a few thousand deterministic corruptions: an error or a model, never a panic.
#[test]
fn damaged_files_are_errors() {
    let mut m = model(
        vec![
            with(
                node("Constant", &[], &["k"]),
                AttributeProto { t: Some(Box::new(ramp("", &[2]))), ..attr("value", 4) },
            ),
            with(node("ConstantOfShape", &["shape"], &["w2"]), attr("other", 2)),
            node("MatMul", &["x", "w"], &["h"]),
            node("MatMul", &["h", "w2"], &["h2"]),
            node("Add", &["h2", "k"], &["y"]),
        ],
        vec![ramp("w", &[3, 2]), ints("shape", &[2, 2])],
        "y",
    );
    m.metadata_props.push(StringStringEntryProto { key: "a".into(), value: "b".into() });
    let bytes = m.encode_to_vec();
    assert!(from_bytes("m", bytes.clone()).is_ok());
    let mut imported = 0;
    let mut attempt = |bytes: Vec<u8>| {
        let _ = wire::find_all(&bytes, &[7, 1, 5, 5]);
        if let Ok(m) = from_bytes("m", bytes) {
            imported += 1;
            for w in m.weights.iter().filter(|w| w.len() < 1 << 20) {
                let _ = w.load(&m.files);
            }
            let _ = m.graph.to_string();
        }
    };
    for end in 0..bytes.len() {
        attempt(bytes[..end].to_vec());
    }
    let mut state = 1u64;
    let mut random = |n: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % n
    };
    for _ in 0..4000 {
        let mut b = bytes.clone();
        for _ in 0..1 + random(3) {
            let at = random(b.len());
            b[at] = match random(3) {
                0 => b[at] ^ 1 << random(8),
                1 => 0xff,
                _ => random(256) as u8,
            };
        }
        attempt(b);
    }
    assert!(imported > 100, "{imported}");
}

/// What `inspect` will say of the real models: printed with `--nocapture`, counted here.
#[test]
fn real_models() {
    let cases = [
        // file, weights and embeddings, biases, scales, shifts, running means
        ("models/resnet20.onnx", [22, 1, 21, 21, 21]),
        ("ppocr/cls.onnx", [54, 19, 35, 35, 35]),
        ("ppocr/rec.onnx", [0; 5]),
        ("ppocr/det.onnx", [0; 5]),
        ("magika/model.onnx", [3, 3, 2, 2, 0]),
        ("silero/silero_vad_16k_sequence.onnx", [0; 5]),
        ("light/light_resnet50.onnx", [54, 1, 53, 53, 53]),
        ("light/light_densenet121.onnx", [0; 5]),
        ("light/light_vgg19.onnx", [0; 5]),
    ];
    for (name, want) in cases {
        let Some(path) = model_file(name) else { continue };
        let m = load(&path).unwrap_or_else(|e| panic!("{e}"));
        let count = |roles: &[Role]| m.weights.iter().filter(|w| roles.contains(&w.role)).count();
        let got = [
            count(&[Role::Weight, Role::Embedding]),
            count(&[Role::Bias]),
            count(&[Role::Scale]),
            count(&[Role::Shift]),
            count(&[Role::RunningMean]),
        ];
        println!("{name}: {got:?} of {}, {} blockers, {:?}", m.weights.len(), m.blockers.len(), m.ops);
        for w in &m.weights {
            println!("  {:12} {:?} {} {}", w.role, w.dims.as_slice(), w.name, w.why);
        }
        if want != [0; 5] {
            assert_eq!(got, want, "{name}");
        }
        assert_eq!(count(&[Role::RunningMean]), count(&[Role::RunningVar]));
        for w in m.weights.iter().filter(|w| w.len() < 1 << 22) {
            w.load(&m.files).unwrap();
        }
    }
}

#[test]
fn integers_that_are_dequantised_are_a_weight() {
    let small = |name: &str, dims: &[i64], levels: &[i8]| TensorProto {
        name: name.into(),
        dims: dims.to_vec(),
        data_type: 3,
        raw_data: Some(levels.iter().map(|v| *v as u8).collect::<Vec<u8>>().into()),
        ..Default::default()
    };
    let nodes = vec![
        with(
            node("DequantizeLinear", &["w", "scale", "zero"], &["wide"]),
            AttributeProto { i: 1, ..attr("axis", 2) },
        ),
        node("MatMul", &["x", "wide"], &["h"]),
        node("DequantizeLinear", &["shared", "one", ""], &["a"]),
        node("Add", &["h", "a"], &["g"]),
        node("CastLike", &["g", "shared"], &["y"]),
    ];
    let tensors = vec![
        small("w", &[3, 2], &[1, -2, 3, 127, -128, 0]),
        floats("scale", &[2], &[0.5, 0.25]),
        small("zero", &[2], &[1, 0]),
        small("shared", &[], &[5]),
        floats("one", &[], &[1.0]),
    ];
    let m = import(&model(nodes, tensors, "y")).unwrap();
    assert_eq!((role(&m, "w"), m.weight(m.find_weight("w").unwrap()).dtype), (Role::Weight, DType::I8));
    assert_eq!(values(&m, "w"), [0.0, -0.5, 1.0, 31.75, -64.5, 0.0]);
    assert_eq!(m.graph.nodes[0].op.name(), "FakeQuantize");
    // Something else reads these integers, so they stay what they are.
    assert_eq!(m.find_weight("shared"), None);
    let w = m.weight(m.find_weight("w").unwrap());
    let old = w.stored(&m.files).unwrap();
    let mut new = w.load(&m.files).unwrap();
    assert_eq!(w.restore(&old, &new).unwrap(), None);
    new.get_mut::<f32>().unwrap()[..2].copy_from_slice(&[0.9, 1e9]);
    let levels: Vec<i8> = w.restore(&old, &new).unwrap().unwrap().iter().map(|b| *b as i8).collect();
    assert_eq!(levels, [3, 127, 3, 127, -128, 0]);
    new.get_mut::<f32>().unwrap()[3] = f32::NAN;
    assert!(w.restore(&old, &new).unwrap_err().to_string().contains("not finite"));
}
