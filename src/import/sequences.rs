//! Sequences whose members are known from the graph: what is taken from them becomes operators on the tensors themselves.
//!
//! Exporters write `chunk`, `split` and `stack` with them. A sequence stays as it is, and is refused, where anything else reads it.

use std::collections::{HashMap, HashSet};

use super::flat::{Flat, Origin};
use super::order::captured;
use super::proto::{AttributeProto, NodeProto, TensorProto};
use super::weights::plain;
use crate::tensor::DType;

/// How a sequence was made.
#[derive(Clone)]
enum Sequence {
    /// `SplitToSequence`: X, the split (or nothing), the attributes.
    Split(String, String, Vec<AttributeProto>),
    /// `SequenceConstruct`, `SequenceEmpty`, and what `SequenceInsert` and `SequenceErase` make of them at constant places.
    List(Vec<String>),
}

fn op(n: &NodeProto) -> &str {
    if matches!(n.domain.as_str(), "" | "ai.onnx") { n.op_type.as_str() } else { "" }
}

fn input(n: &NodeProto, slot: usize) -> &str {
    n.input.get(slot).map_or("", String::as_str)
}

fn int(n: &NodeProto, name: &str) -> i64 {
    n.attribute.iter().find(|a| a.name == name).map_or(0, |a| a.i)
}

/// Does the node put out a sequence?
fn makes(n: &NodeProto) -> bool {
    let all = ["SplitToSequence", "SequenceConstruct", "SequenceEmpty", "SequenceInsert", "SequenceErase"];
    all.contains(&op(n))
}

/// Replaces operators on sequences where it can.
pub(super) fn resolve(flat: &mut Flat) {
    if !flat.graph.node.iter().any(makes) {
        return;
    }
    let positions = positions(flat);
    let made = sequences(&flat.graph.node, &positions);
    let mut kept: HashSet<String> = flat.graph.output.iter().map(|o| o.name.clone()).collect();
    for n in &flat.graph.node {
        let readable = |slot: usize, name: &str| match (op(n), slot, &made[name]) {
            ("SequenceAt", 0, Sequence::Split(..)) => true,
            ("SequenceAt", 0, Sequence::List(all)) => member(all, positions.get(input(n, 1))).is_some(),
            ("ConcatFromSequence", 0, Sequence::List(all)) => !all.is_empty(),
            ("SequenceLength", 0, _) => true,
            ("SequenceInsert" | "SequenceErase", 0, _) => {
                n.output.first().is_some_and(|o| made.contains_key(o))
            }
            _ => false,
        };
        let read = n.input.iter().enumerate().filter(|(_, name)| made.contains_key(name.as_str()));
        kept.extend(read.filter(|(slot, name)| !readable(*slot, name)).map(|(_, name)| name.clone()));
        kept.extend(captured(n).into_iter().filter(|name| made.contains_key(*name)).map(str::to_string));
    }
    // What a sequence that stays was made from stays too.
    loop {
        let before = kept.len();
        for n in flat.graph.node.iter().filter(|n| makes(n)) {
            if n.output.first().is_some_and(|o| kept.contains(o)) {
                kept.insert(input(n, 0).to_string());
            }
        }
        if kept.len() == before {
            break;
        }
    }
    let resolved = |name: &str| made.get(name).filter(|_| !kept.contains(name));
    for n in &mut flat.graph.node {
        let Some(sequence) = resolved(input(n, 0)) else { continue };
        match (op(n), sequence) {
            ("SequenceAt", Sequence::Split(x, split, attributes)) => {
                n.input = vec![x.clone(), split.clone(), input(n, 1).to_string()];
                n.attribute.clone_from(attributes);
            }
            ("SequenceAt", Sequence::List(all)) => {
                let Some(one) = member(all, positions.get(input(n, 1))) else { continue };
                n.input = vec![one.to_string()];
                n.op_type = "Identity".into();
            }
            ("ConcatFromSequence", Sequence::List(all)) => {
                n.input.clone_from(all);
                match int(n, "new_axis") {
                    0 => n.op_type = "Concat".into(),
                    // Never one operand, which would be a sequence.
                    _ => n.input.push(String::new()),
                }
            }
            ("SequenceLength", Sequence::Split(x, split, attributes)) => {
                // Always two operands: one would be a sequence.
                n.input = vec![x.clone(), split.clone()];
                n.attribute.clone_from(attributes);
            }
            ("SequenceLength", Sequence::List(all)) => {
                let length = AttributeProto {
                    name: "value_int".into(),
                    r#type: 2,
                    i: all.len() as i64,
                    ..AttributeProto::default()
                };
                (n.input, n.attribute) = (Vec::new(), vec![length]);
                n.op_type = "Constant".into();
            }
            _ => {}
        }
    }
    let gone = |n: &NodeProto| makes(n) && n.output.first().is_some_and(|o| resolved(o).is_some());
    let gone: Vec<bool> = flat.graph.node.iter().map(gone).collect();
    let (mut nodes, mut origins) = (gone.iter(), gone.iter());
    flat.graph.node.retain(|_| !nodes.next().copied().unwrap_or(false));
    flat.origins.retain(|_: &Origin| !origins.next().copied().unwrap_or(false));
}

/// The sequences of a graph that are known, by name.
fn sequences(nodes: &[NodeProto], positions: &HashMap<String, i64>) -> HashMap<String, Sequence> {
    let mut made: HashMap<String, Sequence> = HashMap::new();
    loop {
        let before = made.len();
        for n in nodes {
            let Some(name) = n.output.first().filter(|o| !made.contains_key(*o)) else { continue };
            let sequence = match op(n) {
                "SplitToSequence" => {
                    Sequence::Split(input(n, 0).into(), input(n, 1).into(), n.attribute.clone())
                }
                "SequenceConstruct" => Sequence::List(n.input.clone()),
                "SequenceEmpty" => Sequence::List(Vec::new()),
                "SequenceInsert" | "SequenceErase" => {
                    let Some(Sequence::List(all)) = made.get(input(n, 0)) else { continue };
                    match changed(all, n, positions) {
                        Some(all) => Sequence::List(all),
                        None => continue,
                    }
                }
                _ => continue,
            };
            made.insert(name.clone(), sequence);
        }
        if made.len() == before {
            return made;
        }
    }
}

/// A list after the `SequenceInsert` or `SequenceErase` `n`, whose place is constant or left out.
fn changed(all: &[String], n: &NodeProto, positions: &HashMap<String, i64>) -> Option<Vec<String>> {
    let inserts = op(n) == "SequenceInsert";
    let (slot, last) = if inserts { (2, all.len() as i64) } else { (1, -1) };
    let at = match input(n, slot) {
        "" => last,
        name => *positions.get(name)?,
    };
    let at = if at < 0 { at.checked_add(all.len() as i64)? } else { at };
    let at = usize::try_from(at).ok().filter(|at| *at < all.len() + usize::from(inserts))?;
    let mut all = all.to_vec();
    match inserts {
        true => all.insert(at, input(n, 1).to_string()),
        false => drop(all.remove(at)),
    }
    Some(all)
}

fn member<'a>(all: &'a [String], position: Option<&i64>) -> Option<&'a str> {
    let at = position.copied()?;
    let at = if at < 0 { at.checked_add(all.len() as i64)? } else { at };
    all.get(usize::try_from(at).ok()?).map(String::as_str)
}

/// Single integers that are constant, by name.
fn positions(flat: &Flat) -> HashMap<String, i64> {
    let value = |t: &TensorProto| {
        let dtype = DType::from_onnx(t.data_type).filter(|d| matches!(d, DType::I32 | DType::I64))?;
        if !t.external_data.is_empty() || t.dims.iter().any(|d| *d != 1) {
            return None;
        }
        plain(t, dtype).ok()?.to_ints().ok()?.first().copied()
    };
    let mut found: HashMap<String, i64> = HashMap::new();
    found.extend(flat.graph.initializer.iter().filter_map(|t| Some((t.name.clone(), value(t)?))));
    for n in flat.graph.node.iter().filter(|n| op(n) == "Constant") {
        let constant = n.attribute.iter().find_map(|a| match a.name.as_str() {
            "value" => a.t.as_deref().and_then(value),
            "value_int" => Some(a.i),
            _ => None,
        });
        if let (Some(name), Some(v)) = (n.output.first(), constant) {
            found.insert(name.clone(), v);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use crate::exec::{Options, Session};
    use crate::import::make::{attr, import, ints, model, node, with};
    use crate::import::proto::{AttributeProto, NodeProto};
    use crate::tensor::Tensor;

    fn int(name: &str, i: i64) -> AttributeProto {
        AttributeProto { i, ..attr(name, 2) }
    }

    fn run(nodes: Vec<NodeProto>) -> Result<(Vec<usize>, Vec<f32>), String> {
        let constants = vec![ints("two", &[2]), ints("one", &[1]), ints("last", &[-1])];
        let m = import(&model(nodes, constants, "y")).map_err(|e| e.to_string())?;
        if !m.blockers.is_empty() {
            return Err(format!("{:?}", m.blockers));
        }
        let x = Tensor::from_slice(&[2, 3], &[0f32, 1.0, 2.0, 3.0, 4.0, 5.0]).unwrap();
        let mut session = Session::new(std::sync::Arc::new(m), Options::default()).unwrap();
        let y = session.forward(&[("x".into(), x)]).map_err(|e| e.to_string())?.remove(0).1;
        Ok((y.dims().to_vec(), y.get::<f32>().unwrap().to_vec()))
    }

    #[test]
    fn parts_of_a_split_and_members_of_a_list() {
        let split = |keep| {
            let split = with(node("SplitToSequence", &["x"], &["s"]), int("axis", 1));
            vec![with(split, int("keepdims", keep)), node("SequenceAt", &["s", "last"], &["y"])]
        };
        assert_eq!(run(split(0)).unwrap(), (vec![2], vec![2.0, 5.0]));
        assert_eq!(run(split(1)).unwrap(), (vec![2, 1], vec![2.0, 5.0]));
        let list = |new_axis| {
            let concat = with(node("ConcatFromSequence", &["t"], &["y"]), int("axis", 0));
            vec![
                node("SequenceConstruct", &["x"], &["s"]),
                node("SequenceAt", &["s", "last"], &["again"]),
                node("Neg", &["again"], &["n"]),
                node("SequenceInsert", &["s", "n"], &["t"]),
                with(concat, int("new_axis", new_axis)),
            ]
        };
        let both = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, -0.0, -1.0, -2.0, -3.0, -4.0, -5.0].to_vec();
        assert_eq!(run(list(0)).unwrap(), (vec![4, 3], both.clone()));
        assert_eq!(run(list(1)).unwrap(), (vec![2, 2, 3], both));
    }

    #[test]
    fn what_else_reads_a_sequence_keeps_it_refused() {
        let nodes = vec![
            node("SequenceConstruct", &["x", "x"], &["s"]),
            node("SequenceAt", &["s", "one"], &["z"]),
            node("Identity", &["s"], &["t"]),
            node("ConcatFromSequence", &["t"], &["y"]),
        ];
        let why = run(nodes).unwrap_err();
        assert!(why.contains("SequenceConstruct") && why.contains("ConcatFromSequence"), "{why}");
    }
}
