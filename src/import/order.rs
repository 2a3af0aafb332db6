//! The order in which nodes can run.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};

use crate::import::proto::{GraphProto, NodeProto};

/// How a person finds a node of the file.
pub(super) fn describe(n: &NodeProto) -> String {
    let out = n.output.iter().find(|o| !o.is_empty()).map(String::as_str).unwrap_or("");
    match n.name.is_empty() {
        true => format!("{} (output '{out}')", n.op_type),
        false => format!("{} '{}' (output '{out}')", n.op_type, n.name),
    }
}

/// Names that the subgraphs of `n` take from around them.
pub(super) fn captured(n: &NodeProto) -> Vec<&str> {
    let mut free = Vec::new();
    let mut todo: Vec<&GraphProto> = Vec::new();
    for a in &n.attribute {
        todo.extend(a.g.as_deref().into_iter().chain(&a.graphs));
    }
    // A name defined in any of the nested graphs is not looked for outside: precise enough for an
    // order, since ONNX forbids to define a name again that is visible from outside.
    let mut defined: HashSet<&str> = HashSet::new();
    while let Some(g) = todo.pop() {
        defined.extend(g.initializer.iter().map(|t| t.name.as_str()));
        defined.extend(g.input.iter().map(|i| i.name.as_str()));
        for n in &g.node {
            defined.extend(n.output.iter().map(String::as_str));
            free.extend(n.input.iter().map(String::as_str));
            for a in &n.attribute {
                todo.extend(a.g.as_deref().into_iter().chain(&a.graphs));
            }
        }
        free.extend(g.output.iter().map(|o| o.name.as_str()));
    }
    let mut seen = HashSet::new();
    free.retain(|f| !f.is_empty() && !defined.contains(f) && seen.insert(*f));
    free
}

/// Node indices in an order in which they can run: the file's own where that is one.
pub(super) fn order(nodes: &[NodeProto]) -> std::result::Result<Vec<usize>, String> {
    let mut producer: HashMap<&str, usize> = HashMap::new();
    for (i, n) in nodes.iter().enumerate() {
        for o in n.output.iter().filter(|o| !o.is_empty()) {
            if producer.insert(o, i).is_some() {
                return Err(format!("two nodes produce '{o}'"));
            }
        }
    }
    let mut waiting = vec![0usize; nodes.len()];
    let mut readers: Vec<Vec<usize>> = vec![Vec::new(); nodes.len()];
    for (i, n) in nodes.iter().enumerate() {
        for name in n.input.iter().map(String::as_str).chain(captured(n)) {
            if let Some(&p) = producer.get(name) {
                readers[p].push(i);
                waiting[i] += 1;
            }
        }
    }
    let mut ready: BinaryHeap<Reverse<usize>> =
        waiting.iter().enumerate().filter(|(_, w)| **w == 0).map(|(i, _)| Reverse(i)).collect();
    let mut order = Vec::with_capacity(nodes.len());
    while let Some(Reverse(i)) = ready.pop() {
        order.push(i);
        for &r in &readers[i] {
            waiting[r] -= 1;
            if waiting[r] == 0 {
                ready.push(Reverse(r));
            }
        }
    }
    match waiting.iter().position(|&w| w > 0) {
        None => Ok(order),
        Some(i) => Err(format!("node {} is part of a cycle", describe(&nodes[i]))),
    }
}
