use super::*;
use crate::import::from_bytes;
use crate::import::make::*;
use crate::import::proto::TensorProto;

/// The model with another head, fed with two samples of three features.
fn headed(m: &ModelProto, outputs: usize, at: Option<&str>) -> Result<(Model, ModelProto)> {
    let model = from_bytes("test.onnx", m.encode_to_vec())?;
    headed_by(&model, &NewHead { outputs, add: false, at: at.map(String::from), seed: 7 })
}

fn headed_by(model: &Model, head: &NewHead) -> Result<(Model, ModelProto)> {
    let inputs = [("x".to_string(), Meta::new(DType::F32, &[2, 3]))];
    let (new, _) = replace(model, head, &inputs)?;
    let proto = ModelProto::decode(new.files[0].bytes.clone()).unwrap();
    Ok((new, proto))
}

fn dims(m: &ModelProto, name: &str) -> Option<Vec<i64>> {
    m.graph.as_ref()?.initializer.iter().find(|t| t.name == name).map(|t| t.dims.clone())
}

fn inputs(m: &ModelProto, node: usize) -> &[String] {
    &m.graph.as_ref().unwrap().node[node].input
}

fn declared_dims(m: &ModelProto, output: usize) -> Vec<Option<i64>> {
    let info = &m.graph.as_ref().unwrap().output[output];
    let shape = info.r#type.as_ref().unwrap().tensor_type.as_ref().unwrap().shape.as_ref().unwrap();
    shape.dim.iter().map(|d| d.dim_value).collect()
}

fn gemm(inputs: &[&str], out: &str) -> NodeProto {
    with(node("Gemm", inputs, &[out]), AttributeProto { i: 1, ..attr("transB", 2) })
}

/// A model whose output is declared `[batch, classes]`.
fn classifier(nodes: Vec<NodeProto>, init: Vec<TensorProto>, classes: i64) -> ModelProto {
    let mut m = model(nodes, init, "y");
    m.graph.as_mut().unwrap().output = vec![value("y", &[-1, classes])];
    m
}

#[test]
fn a_gemm_gets_new_initializers_in_the_place_of_the_old() {
    let nodes =
        vec![gemm(&["x", "w1", "b1"], "h"), gemm(&["h", "w2", "b2"], "l"), node("Softmax", &["l"], &["y"])];
    let init = vec![ramp("w1", &[5, 3]), ramp("b1", &[5]), ramp("w2", &[10, 5]), ramp("b2", &[10])];
    let m = classifier(nodes, init, 10);
    let (new, proto) = headed(&m, 4, None).unwrap();
    assert_eq!((dims(&proto, "w2"), dims(&proto, "b2")), (Some(vec![4, 5]), Some(vec![4])));
    assert_eq!(dims(&proto, "w1"), Some(vec![5, 3]));
    assert_eq!(declared_dims(&proto, 0), [None, Some(4)]);
    let w = new.load_weight(new.find_weight("w2").unwrap()).unwrap();
    assert!(w.to_f64().iter().all(|x| x.abs() <= 1.0 / 5f64.sqrt()) && w.to_f64().iter().any(|x| *x != 0.0));
    // The seed decides.
    let (again, _) = headed(&m, 4, None).unwrap();
    assert_eq!(new.files[0].bytes, again.files[0].bytes);
    // Nothing else is touched: with what was replaced cut out, the files are equal.
    let strip = |m: &ModelProto| {
        let mut m = m.clone();
        let g = m.graph.as_mut().unwrap();
        g.initializer.retain(|t| !t.name.ends_with('2'));
        g.output.clear();
        m.encode_to_vec()
    };
    assert_eq!(strip(&m), strip(&proto));
}

#[test]
fn a_weight_behind_a_transpose_and_an_added_bias_are_replaced() {
    let transpose =
        with(node("Transpose", &["wt"], &["w"]), AttributeProto { ints: vec![1, 0], ..attr("perm", 7) });
    let nodes = vec![transpose, node("MatMul", &["x", "w"], &["h"]), node("Add", &["h", "b"], &["y"])];
    let m = classifier(nodes, vec![ramp("wt", &[5, 3]), ramp("b", &[5])], 5);
    let (new, proto) = headed(&m, 2, None).unwrap();
    // The transpose has nothing left to do.
    assert_eq!(proto.graph.as_ref().unwrap().node.len(), 2);
    assert_eq!(dims(&proto, "wt"), None);
    assert_eq!((dims(&proto, "wt.head"), dims(&proto, "b")), (Some(vec![3, 2]), Some(vec![2])));
    assert_eq!(inputs(&proto, 0), ["x", "wt.head"]);
    assert!(new.weights.iter().all(|w| w.trainable));
}

#[test]
fn tied_weights_stay_where_they_are_and_shapes_follow() {
    let reshape = |shape: &str| node("Reshape", &["l", shape], &["y"]);
    let nodes =
        vec![node("MatMul", &["x", "w"], &["h"]), node("MatMul", &["h", "w"], &["l"]), reshape("shape")];
    let m = classifier(nodes, vec![ramp("w", &[3, 3]), ints("shape", &[-1, 3])], 3);
    let (_, proto) = headed(&m, 7, None).unwrap();
    assert_eq!((dims(&proto, "w"), dims(&proto, "w.head")), (Some(vec![3, 3]), Some(vec![3, 7])));
    let nodes = &proto.graph.as_ref().unwrap().node;
    assert_eq!(nodes[1].input, ["h", "w.head"]);
    assert_eq!(nodes[2].input[1], "shape.head");
    assert_eq!(declared_dims(&proto, 0), [None, Some(7)]);
}

#[test]
fn weights_in_nodes_and_in_old_files() {
    // Constant nodes, and an IR version in which initializers are inputs as well.
    let constant = with(
        node("Constant", &[], &["w"]),
        AttributeProto { t: Some(Box::new(ramp("", &[3, 5]))), ..attr("value", 4) },
    );
    let nodes = vec![constant, node("MatMul", &["x", "w"], &["h"]), node("Add", &["h", "b"], &["y"])];
    let mut m = classifier(nodes, vec![ramp("b", &[5])], 5);
    let (_, proto) = headed(&m, 2, None).unwrap();
    assert_eq!((dims(&proto, "w"), dims(&proto, "b")), (Some(vec![3, 2]), Some(vec![2])));
    assert_eq!(proto.graph.as_ref().unwrap().node.len(), 2);
    m.ir_version = 3;
    m.graph.as_mut().unwrap().input.push(value("b", &[5]));
    let (new, proto) = headed(&m, 2, None).unwrap();
    let g = proto.graph.as_ref().unwrap();
    assert_eq!((g.initializer.len(), g.input.len(), g.node.len()), (0, 1, 4));
    assert_eq!(new.weights.len(), 2);
    // Half floats stay half floats.
    let half = TensorProto {
        name: "w".into(),
        dims: vec![3, 5],
        data_type: 10,
        raw_data: Some(vec![0u8; 30].into()),
        ..Default::default()
    };
    let m = classifier(vec![node("MatMul", &["x", "w"], &["y"])], vec![half], 5);
    let (new, _) = headed(&m, 2, None).unwrap();
    assert_eq!((new.weights[0].dtype, new.weights[0].dims.as_slice()), (DType::F16, &[3, 2][..]));
}

#[test]
fn a_head_on_a_value_is_the_first_output() {
    let nodes = vec![node("MatMul", &["x", "w"], &["h"]), node("Relu", &["h"], &["y"])];
    let m = classifier(nodes, vec![ramp("w", &[3, 5])], 5);
    let (new, proto) = headed(&m, 4, Some("y")).unwrap();
    assert_eq!(new.output_names().collect::<Vec<_>>(), ["logits", "y"]);
    assert_eq!(dims(&proto, "head.weight"), Some(vec![4, 5]));
    assert_eq!(
        (declared_dims(&proto, 0), declared_dims(&proto, 1)),
        (vec![None, Some(4)], vec![None, Some(5)])
    );
    assert!(new.weights.iter().all(|w| w.trainable));
    assert_eq!(crate::train::select::Select::Head.resolve(&new).unwrap().len(), 2);
    // A name that is taken is not taken again.
    let (twice, _) = {
        let head = NewHead { outputs: 2, add: false, at: Some("logits".into()), seed: 0 };
        replace(&new, &head, &[("x".to_string(), Meta::new(DType::F32, &[2, 3]))]).unwrap()
    };
    assert_eq!(twice.output_names().next(), Some("logits.2"));
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let m = classifier(vec![node("Relu", &["x"], &["y"])], vec![], 3);
    let says =
        |m: &ModelProto, n: usize, at: Option<&str>| headed(m, n, at).map(|_| ()).unwrap_err().to_string();
    assert!(says(&m, 4, None).contains("no dense layer"));
    assert!(says(&m, 0, None).contains("--head"));
    assert!(says(&m, 4, Some("z")).contains("--at z"));
    // What follows multiplies by a vector of the old length.
    let nodes = vec![node("MatMul", &["x", "w"], &["h"]), node("Mul", &["h", "s"], &["y"])];
    let m = classifier(nodes, vec![ramp("w", &[3, 5]), ramp("s", &[5])], 5);
    assert!(says(&m, 4, None).contains("cannot take"), "{}", says(&m, 4, None));
    // The layer is not what the output's classes come from.
    let concat = with(node("Concat", &["h", "x"], &["y"]), AttributeProto { i: 1, ..attr("axis", 2) });
    let nodes = vec![node("MatMul", &["x", "w"], &["h"]), concat];
    let m = classifier(nodes, vec![ramp("w", &[3, 5])], 8);
    assert!(says(&m, 4, None).contains("that layer alone"), "{}", says(&m, 4, None));
}

#[test]
fn added_outputs_come_after_those_that_stay() {
    for (dims, transposed) in [([3i64, 5], false), ([5, 3], true)] {
        let layer = match transposed {
            true => gemm(&["x", "w", "b"], "y"),
            false => node("Gemm", &["x", "w", "b"], &["y"]),
        };
        let m = classifier(vec![layer], vec![ramp("w", &dims), ramp("b", &[5])], 5);
        let model = from_bytes("test.onnx", m.encode_to_vec()).unwrap();
        let head = NewHead { outputs: 2, add: true, at: None, seed: 0 };
        let (new, _) = headed_by(&model, &head).unwrap();
        let values = |m: &Model, name: &str| m.load_weight(m.find_weight(name).unwrap()).unwrap().to_f64();
        assert_eq!(values(&new, "b"), [0.5, 1.5, 2.5, 3.5, 4.5, 0.0, 0.0]);
        let (old, w) = (values(&model, "w"), values(&new, "w"));
        assert_eq!(w.len(), 21);
        for input in 0..3 {
            for class in 0..5 {
                let at =
                    |classes: usize| if transposed { class * 3 + input } else { input * classes + class };
                assert_eq!(w[at(7)], old[at(5)]);
            }
        }
    }
    let nodes = vec![node("Transpose", &["w"], &["t"]), node("MatMul", &["x", "t"], &["y"])];
    let m = from_bytes("m", classifier(nodes, vec![ramp("w", &[5, 3])], 5).encode_to_vec()).unwrap();
    let head = NewHead { outputs: 2, add: true, at: None, seed: 0 };
    assert!(headed_by(&m, &head).unwrap_err().to_string().contains("cannot add"));
    assert!(headed_by(&m, &NewHead { at: Some("t".into()), ..head }).is_err());
}
