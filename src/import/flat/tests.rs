use super::super::make::*;
use super::super::proto::*;
use super::super::{Model, Role};

fn role(m: &Model, name: &str) -> Role {
    m.weight(m.find_weight(name).unwrap_or_else(|| panic!("no weight {name}"))).role
}

fn values(m: &Model, name: &str) -> Vec<f64> {
    m.load_weight(m.find_weight(name).unwrap()).unwrap().to_f64()
}

fn body(nodes: Vec<NodeProto>, init: Vec<TensorProto>, inputs: &[&str], outputs: &[&str]) -> GraphProto {
    GraphProto {
        node: nodes,
        initializer: init,
        input: inputs.iter().map(|i| value(i, &[])).collect(),
        output: outputs.iter().map(|o| value(o, &[])).collect(),
        ..Default::default()
    }
}

fn graph_attr(name: &str, g: GraphProto) -> AttributeProto {
    AttributeProto { g: Some(Box::new(g)), ..attr(name, 5) }
}

#[test]
fn functions_are_inlined_with_names_attributes_and_shared_constants() {
    let constant = with(
        node("Constant", &[], &["w"]),
        AttributeProto { t: Some(Box::new(ramp("", &[3, 3]))), ..attr("value", 4) },
    );
    let leaky = with(
        node("LeakyRelu", &["h"], &["y"]),
        AttributeProto { ref_attr_name: "slope".into(), ..attr("alpha", 1) },
    );
    let inner = FunctionProto {
        name: "dense".into(),
        domain: "my".into(),
        input: vec!["x".into()],
        output: vec!["y".into()],
        node: vec![constant, node("MatMul", &["x", "w"], &["y"])],
        opset_import: vec![OperatorSetIdProto { domain: String::new(), version: 13 }],
        ..Default::default()
    };
    let mut call = node("dense", &["x"], &["h"]);
    call.domain = "my".into();
    let outer = FunctionProto {
        name: "block".into(),
        input: vec!["x".into()],
        output: vec!["y".into()],
        attribute: vec!["slope".into()],
        node: vec![call, leaky],
        ..inner.clone()
    };
    let block = |x: &str, y: &str, slope: f32| {
        let mut n = node("block", &[x], &[y]);
        n.domain = "my".into();
        with(n, AttributeProto { f: Some(slope.to_le_bytes().to_vec().into()), ..attr("slope", 1) })
    };
    let mut m = model(vec![block("x", "h", 0.25), block("h", "y", 0.5)], vec![], "y");
    m.functions = vec![outer, inner];
    m.opset_import.push(OperatorSetIdProto { domain: "my".into(), version: 1 });
    let m = import(&m).unwrap();
    assert!(m.blockers.is_empty(), "{:?}", m.blockers);
    // One tensor in the file, one weight, two uses.
    assert_eq!((m.weights.len(), m.weights[0].uses.len(), role(&m, "h/dense/w")), (1, 2, Role::Weight));
    assert_eq!(values(&m, "h/dense/w")[8], 8.5);
    let slopes: Vec<String> =
        m.graph.nodes.iter().map(|n| format!("{:?}", n.op)).filter(|o| o.contains("Leaky")).collect();
    assert!(slopes[0].contains("0.25") && slopes[1].contains("0.5"), "{slopes:?}");
    // A function that calls itself has no end.
    let mut own = node("f", &["x"], &["y"]);
    own.domain = "my".into();
    let f = FunctionProto {
        name: "f".into(),
        domain: "my".into(),
        input: vec!["x".into()],
        output: vec!["y".into()],
        node: vec![own.clone()],
        ..Default::default()
    };
    let mut m = model(vec![own], vec![], "y");
    m.functions.push(f);
    assert!(import(&m).unwrap_err().to_string().contains("too deeply"));
}

#[test]
fn a_constant_if_is_inlined_and_others_become_operators() {
    let branches = |n: NodeProto| {
        let then = body(vec![node("MatMul", &["x", "w"], &["r"])], vec![ramp("w", &[3, 3])], &[], &["r"]);
        // The same names again, for something else.
        let other = body(vec![node("Mul", &["x", "w"], &["r"])], vec![ramp("w", &[3])], &[], &["r"]);
        with(with(n, graph_attr("then_branch", then)), graph_attr("else_branch", other))
    };
    let bools = TensorProto {
        name: "c".into(),
        data_type: 9,
        raw_data: Some(vec![1u8].into()),
        ..Default::default()
    };
    let m = import(&model(vec![branches(node("If", &["c"], &["y"]))], vec![bools], "y")).unwrap();
    assert_eq!(m.ops.keys().collect::<Vec<_>>(), ["Identity", "MatMul"]);
    assert_eq!((m.weights.len(), role(&m, "y/w")), (1, Role::Weight));

    let nodes = vec![
        node("ReduceMax", &["x"], &["m"]),
        node("Less", &["m", "m"], &["c"]),
        branches(node("If", &["c"], &["y"])),
    ];
    let m = import(&model(nodes, vec![], "y")).unwrap();
    assert!(m.blockers.is_empty() && m.ops["If"] == 1);
    // The constants of the branches are the graph's, and operands of the node.
    assert_eq!(role(&m, "y/then_branch/w"), Role::Weight);
    let cond = m.graph.nodes.last().unwrap();
    assert_eq!(cond.inputs.len(), 4);
    // What a body needs and cannot run is told.
    let odd = body(vec![node("Odd", &["x"], &["r"])], vec![], &[], &["r"]);
    let n = with(node("If", &["c"], &["y"]), graph_attr("then_branch", odd.clone()));
    let nodes = vec![node("Less", &["x", "x"], &["c"]), with(n, graph_attr("else_branch", odd))];
    let m = import(&model(nodes, vec![], "y")).unwrap();
    assert_eq!(m.blockers.len(), 2);
    assert!(m.blockers[0].node.contains("in a body of If"), "{:?}", m.blockers);
}

/// Calls that double with every level, and come to nothing or lie in bodies: no node of the main graph.
#[test]
fn calls_that_double_with_every_level_are_refused() {
    let called = |name: String| NodeProto { domain: "my".into(), ..node(&name, &["x"], &["y"]) };
    let bodied = |name: String| {
        let inside = |part: &str| graph_attr(part, body(vec![called(name.clone())], vec![], &[], &["y"]));
        with(with(node("If", &["x"], &["y"]), inside("then_branch")), inside("else_branch"))
    };
    for (in_bodies, levels) in [(false, 40), (true, 20)] {
        let functions = (0..levels).map(|level| {
            let next = format!("f{}", level + 1);
            let calls = match in_bodies {
                _ if level + 1 == levels => vec![],
                false => vec![called(next.clone()), called(next)],
                true => vec![bodied(next)],
            };
            FunctionProto {
                name: format!("f{level}"),
                domain: "my".into(),
                input: vec!["x".into()],
                output: vec!["y".into()],
                node: calls,
                ..Default::default()
            }
        });
        let mut m = model(vec![called("f0".into())], vec![], "y");
        m.functions = functions.collect();
        let refused = import(&m).unwrap_err().to_string();
        assert!(refused.contains("more than"), "{refused}");
    }
}
