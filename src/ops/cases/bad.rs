//! Every case with one operand or attribute made wrong: an error or a result, but no panic.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::*;
use crate::ops::eval;

/// Larger cases are left to others.
const MOST_ELEMENTS: usize = 4096;
/// Results and scratch memory that are worth having: no more bytes than this.
const MOST_BYTES: usize = 1 << 24;

/// Other operands in the place of one.
fn operands(t: &Tensor) -> Vec<(String, Option<Tensor>)> {
    let dims = t.dims();
    let zeros = |dims: &[usize]| Some(Tensor::zeros(t.dtype(), dims));
    let mut wrong = vec![("absent".into(), None), ("a scalar".into(), zeros(&[]))];
    for (a, d) in dims.iter().enumerate() {
        for n in [0, d + 1] {
            let mut dims = dims.to_vec();
            dims[a] = n;
            wrong.push((format!("{dims:?}"), zeros(&dims)));
        }
    }
    wrong.push(("all extents 0".into(), zeros(&vec![0; dims.len()])));
    wrong.push(("a rank more".into(), zeros(&[&[1], dims].concat())));
    wrong.push(("a rank less".into(), zeros(dims.get(1..).unwrap_or_default())));
    wrong.push(("of many ranks".into(), zeros(&[&[1; 7], dims].concat())));
    for dtype in [DType::F32, DType::I64, DType::U8, DType::Bool, DType::I32] {
        wrong.push((dtype.to_string(), Some(t.cast(dtype))));
    }
    if !t.dtype().is_float() {
        for x in [i64::MIN, -9, -1, 0, 7, 1 << 31, i64::MAX] {
            let values = Tensor::from_slice(dims, &vec![x; t.len()]).unwrap();
            wrong.push((format!("all {x}"), Some(values.cast(t.dtype()))));
        }
    }
    wrong
}

/// Other values in the place of an attribute's.
fn attributes(a: &Attr) -> Vec<Attr> {
    const INTS: [i64; 8] = [i64::MIN, -9, -1, 0, 1, 9, 1 << 31, i64::MAX];
    const FLOATS: [f32; 5] = [f32::NAN, f32::NEG_INFINITY, -1.0, 0.0, f32::MAX];
    match a {
        Attr::Int(_) => INTS.map(Attr::Int).to_vec(),
        Attr::Ints(v) => {
            let mut wrong: Vec<Attr> = INTS.iter().map(|x| Attr::Ints(vec![*x; v.len()])).collect();
            wrong.extend([Attr::Ints(vec![]), Attr::Ints([&v[..], v].concat()), Attr::Int(0)]);
            wrong
        }
        Attr::Float(_) => FLOATS.map(Attr::Float).to_vec(),
        Attr::Floats(v) => FLOATS.iter().map(|x| Attr::Floats(vec![*x; v.len() + 1])).collect(),
        _ => vec![Attr::Int(0), Attr::Str("nonsense".into())],
    }
}

/// Infers, runs and differentiates, as far as that goes.
fn try_out(case: &Case, op: Arc<dyn Op>, values: &[Option<Tensor>]) {
    let metas: Vec<Option<Meta>> = values
        .iter()
        .map(|t| t.as_ref().map(|t| Meta { value: Some(Arc::new(t.clone())), ..t.meta() }))
        .collect();
    let refs: Vec<Option<&Meta>> = metas.iter().map(Option::as_ref).collect();
    let bytes = |m: &Meta| m.dims.iter().try_fold(m.dtype.size(), |n, d| n.checked_mul(*d));
    let fits = |m: &Meta| bytes(m).is_some_and(|n| n <= MOST_BYTES);
    let Ok(made) = op.infer(&refs) else { return };
    if !made.iter().all(fits) || op.scratch(&refs) > MOST_BYTES {
        return;
    }
    let refs: Vec<Option<&Tensor>> = values.iter().map(Option::as_ref).collect();
    let _ = eval(op.as_ref(), &refs);
    let mut graph = Graph::default();
    let mut wrt = Vec::new();
    let inputs: Vec<Option<ValueId>> = values
        .iter()
        .map(|t| {
            let t = t.as_ref()?;
            if !t.dtype().is_float() {
                return Some(graph.add_constant("", t.clone()));
            }
            wrt.push(graph.add_input("", t.meta()));
            wrt.last().copied()
        })
        .collect();
    let Ok(outputs) = graph.emit("y", op, &inputs, 1) else { return };
    let _ = graph.lower();
    let Ok(meta) = graph.meta(outputs[0]).cloned() else { return };
    if case.forward_only || !meta.dtype.is_float() {
        return;
    }
    let weights = Tensor::zeros(meta.dtype, &meta.dims);
    let Ok(loss) = graph.emit("loss", Arc::new(Dot(weights)), &[Some(outputs[0])], 1) else { return };
    let Ok(grads) = grad(&mut graph, loss[0], &wrt) else { return };
    let fed = wrt.iter().copied().zip(values.iter().flatten().filter(|t| t.dtype().is_float()).cloned());
    let wanted: Vec<ValueId> = grads.values().copied().collect();
    let _ = interpret(&graph, &fed.collect(), &wanted);
}

#[test]
fn wrong_operands_and_attributes_are_errors() {
    let mut panicked = Vec::new();
    let mut quietly = |what: String, f: &dyn Fn()| {
        if catch_unwind(AssertUnwindSafe(f)).is_err() {
            panicked.push(what);
        }
    };
    for case in all() {
        let values = case.values(&mut ChaCha8Rng::seed_from_u64(7));
        if values.iter().flatten().any(|t| t.len() > MOST_ELEMENTS) {
            continue;
        }
        for (i, t) in values.iter().enumerate() {
            let Some(t) = t else { continue };
            for (what, wrong) in operands(t) {
                let mut values = values.clone();
                values[i] = wrong;
                quietly(format!("{}: operand {i} {what}", case.name), &|| {
                    try_out(&case, case.make(), &values);
                });
            }
        }
        for (name, a) in &case.attrs.0 {
            for wrong in attributes(a) {
                quietly(format!("{}: {name} = {wrong:?}", case.name), &|| {
                    let attrs = case.clone().attr(name, wrong.clone()).attrs;
                    let spec = Spec {
                        domain: case.domain,
                        op_type: &case.op_type,
                        opset: case.opset,
                        attrs: &attrs,
                        inputs: values.len(),
                        outputs: case.outputs,
                    };
                    if let Ok(op) = create(&spec) {
                        try_out(&case, op, &values);
                    }
                });
            }
        }
    }
    assert!(panicked.is_empty(), "{} panics:\n{}", panicked.len(), panicked.join("\n"));
}
