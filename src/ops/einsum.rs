//! `Einsum` as transposes, matrix products and sums.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::error::OpError;
use crate::graph::{Lowering, ValueId};
use crate::ops::binary::Mul;
use crate::ops::composite::{Made, Recipe, composite};
use crate::ops::gather::Gather;
use crate::ops::matmul::MatMul;
use crate::ops::reduce::{Kind, Reduce};
use crate::ops::{Op, Row, Spec};
use crate::tensor::Tensor;

/// ONNX `Einsum` (opset 12): sums of products over named axes, `...` included, the operands taken from the left.
#[derive(Debug)]
pub struct Einsum {
    terms: Vec<String>,
    /// `None`: the labels that occur once, in alphabetical order.
    result: Option<String>,
}

/// The axes that `...` stands for, counted from the last: private-use characters.
const ELLIPSIS: u32 = 0xE000;
const DOTS: &str = "\u{F8FF}";

fn bad(what: impl Into<String>) -> OpError {
    OpError::Attribute(format!("'equation': {}", what.into()))
}

/// A tensor and the label of each of its axes.
struct Labelled {
    v: ValueId,
    labels: Vec<char>,
}

impl Einsum {
    fn make(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let equation = spec.attrs.string("equation")?.ok_or_else(|| bad("is missing"))?;
        let equation: String = equation.chars().filter(|c| !c.is_whitespace()).collect();
        let (terms, result) = match equation.split_once("->") {
            Some((terms, result)) => (terms, Some(result)),
            None => (equation.as_str(), None),
        };
        let term = |t: &str| {
            let t = t.replacen("...", DOTS, 1);
            let fits = t.chars().all(|c| c.is_ascii_alphabetic() || DOTS.starts_with(c));
            if fits { Ok(t) } else { Err(bad(format!("{equation:?} is not understood"))) }
        };
        let terms = terms.split(',').map(term).collect::<Result<Vec<_>, _>>()?;
        composite(Einsum { terms, result: result.map(term).transpose()? })
    }

    /// A term's labels for a tensor of `rank` axes.
    fn labels(term: &str, rank: usize) -> Result<Vec<char>, OpError> {
        let named = term.chars().filter(|c| !DOTS.starts_with(*c)).count();
        let dots = term.contains(DOTS);
        if named > rank || (named < rank && !dots) {
            return Err(bad(format!("{named} labels for a tensor of rank {rank}")));
        }
        let open = rank - named;
        let mut labels = Vec::with_capacity(rank);
        for c in term.chars() {
            match DOTS.starts_with(c) {
                true => labels.extend((0..open as u32).rev().filter_map(|i| char::from_u32(ELLIPSIS + i))),
                false => labels.push(c),
            }
        }
        Ok(labels)
    }

    /// The labels of the result.
    fn result(&self, operands: &[Labelled]) -> Result<Vec<char>, OpError> {
        let mut dots: Vec<char> =
            operands.iter().flat_map(|o| &o.labels).copied().filter(|c| !c.is_ascii()).collect();
        dots.sort_unstable_by(|a, b| b.cmp(a));
        dots.dedup();
        let Some(result) = &self.result else {
            let all = || operands.iter().flat_map(|o| &o.labels);
            let mut once: Vec<char> =
                all().copied().filter(|c| c.is_ascii() && all().filter(|d| *d == c).count() == 1).collect();
            once.sort_unstable();
            return Ok(dots.into_iter().chain(once).collect());
        };
        let mut labels = Vec::new();
        for c in result.chars() {
            if DOTS.starts_with(c) {
                labels.append(&mut dots);
            } else if labels.contains(&c) || !operands.iter().any(|o| o.labels.contains(&c)) {
                return Err(bad(format!("label '{c}' of the result")));
            } else {
                labels.push(c);
            }
        }
        Ok(labels)
    }
}

fn sum_out(l: &mut Lowering, x: &mut Labelled, keep: impl Fn(char) -> bool) -> Result<(), OpError> {
    let axes: Vec<i64> = (0..x.labels.len()).filter(|&i| !keep(x.labels[i])).map(|i| i as i64).collect();
    if !axes.is_empty() {
        x.v = l.emit(Reduce { kind: Kind::Sum, axes: Some(axes), keepdims: false, noop: true }, &[x.v])?;
        x.labels.retain(|c| keep(*c));
    }
    Ok(())
}

/// Where a label occurs twice, the diagonal.
fn diagonals(l: &mut Lowering, x: &mut Labelled) -> Result<(), OpError> {
    while let Some((i, j)) = (0..x.labels.len()).find_map(|j| {
        let i = x.labels[..j].iter().position(|c| *c == x.labels[j])?;
        Some((i, j))
    }) {
        let dims = l.dims(x.v)?;
        let n = dims[i];
        if dims[j] != n {
            return Err(OpError::Shape(format!("label '{}' is {n} and {}", x.labels[i], dims[j])));
        }
        // The two axes first, seen as one; every (n + 1)th of its elements.
        let rest: Vec<usize> = (0..dims.len()).filter(|a| *a != i && *a != j).collect();
        let perm: Vec<usize> = [i, j].iter().chain(&rest).copied().collect();
        let moved = l.transpose(x.v, &perm)?;
        let flat: Vec<usize> = std::iter::once(n * n).chain(rest.iter().map(|a| dims[*a])).collect();
        let flat = l.reshape(moved, &flat)?;
        let index: Vec<i64> = (0..n as i64).map(|k| k * (n as i64 + 1)).collect();
        let index = l.constant(Tensor::ints(&index));
        let label = x.labels[i];
        x.v = l.emit(Gather { axis: 0 }, &[flat, index])?;
        x.labels = std::iter::once(label).chain(rest.iter().map(|a| x.labels[*a])).collect();
    }
    Ok(())
}

/// `x` with its axes in the order of `labels`, and their extents.
fn arrange(l: &mut Lowering, x: &Labelled, labels: &[char]) -> Result<(ValueId, Vec<usize>), OpError> {
    let at = |c: &char| {
        x.labels.iter().position(|d| d == c).ok_or_else(|| OpError::Internal(format!("no label '{c}'")))
    };
    let perm = labels.iter().map(at).collect::<Result<Vec<_>, _>>()?;
    let v = l.transpose(x.v, &perm)?;
    let dims = l.dims(v)?.to_vec();
    Ok((v, dims))
}

/// The product of two tensors, summed over the labels that are not kept.
fn product(
    l: &mut Lowering,
    a: &Labelled,
    b: &Labelled,
    keep: impl Fn(char) -> bool,
) -> Result<Labelled, OpError> {
    let both = |c: &&char| b.labels.contains(c);
    let stack: Vec<char> = a.labels.iter().filter(both).filter(|c| keep(**c)).copied().collect();
    let summed: Vec<char> = a.labels.iter().filter(both).filter(|c| !keep(**c)).copied().collect();
    let rows: Vec<char> = a.labels.iter().filter(|c| !b.labels.contains(c)).copied().collect();
    let columns: Vec<char> = b.labels.iter().filter(|c| !a.labels.contains(c)).copied().collect();
    let join = |parts: &[&[char]]| parts.concat();
    let (s, r) = (stack.len(), rows.len());
    let (va, da) = arrange(l, a, &join(&[&stack, &rows, &summed]))?;
    let (vb, db) = arrange(l, b, &join(&[&stack, &summed, &columns]))?;
    let labels = join(&[&stack, &rows, &columns]);
    let k = s + summed.len();
    let shape: Vec<usize> = [&da[..s + r], &db[k..]].concat();
    if summed.is_empty() {
        let ones = |n: usize| vec![1; n];
        let va = l.reshape(va, &[&da[..], &ones(columns.len())].concat())?;
        let vb = l.reshape(vb, &[&db[..s], &ones(r), &db[s..]].concat())?;
        return Ok(Labelled { v: l.emit(Mul, &[va, vb])?, labels });
    }
    let size = |d: &[usize]| d.iter().product::<usize>();
    let (batch, inner) = (size(&da[..s]), size(&da[s + r..]));
    let va = l.reshape(va, &[batch, size(&da[s..s + r]), inner])?;
    let vb = l.reshape(vb, &[batch, inner, size(&db[k..])])?;
    let y = l.emit(MatMul::default(), &[va, vb])?;
    Ok(Labelled { v: l.reshape(y, &shape)?, labels })
}

impl Recipe for Einsum {
    fn name(&self) -> &'static str {
        "Einsum"
    }

    fn lower(&self, l: &mut Lowering) -> Made {
        if self.terms.len() != l.inputs() {
            return Err(bad(format!("{} terms for {} operands", self.terms.len(), l.inputs())));
        }
        let mut operands = Vec::new();
        let mut sizes: BTreeMap<char, usize> = BTreeMap::new();
        for (i, term) in self.terms.iter().enumerate() {
            let v = l.x(i)?;
            let dims = l.dims(v)?;
            let labels = Einsum::labels(term, dims.len())?;
            for (c, &d) in labels.iter().zip(&dims) {
                let size = sizes.entry(*c).or_insert(d);
                match (*size, d) {
                    (a, b) if a == b => {}
                    (1, _) => *size = d,
                    (_, 1) => {}
                    (a, b) => return Err(OpError::Shape(format!("label '{c}' is {a} and {b}"))),
                }
            }
            operands.push(Labelled { v, labels });
        }
        let result = self.result(&operands)?;
        for x in &mut operands {
            // An axis of 1 that others are longer on multiplies all of them alike.
            let dims = l.dims(x.v)?;
            let stays: Vec<bool> = x.labels.iter().zip(&dims).map(|(c, d)| *d == sizes[c]).collect();
            if stays.contains(&false) {
                let kept = |i: &usize| stays[*i];
                let shape: Vec<usize> = (0..dims.len()).filter(kept).map(|i| dims[i]).collect();
                x.v = l.reshape(x.v, &shape)?;
                x.labels = (0..dims.len()).filter(kept).map(|i| x.labels[i]).collect();
            }
            diagonals(l, x)?;
        }
        for i in 0..operands.len() {
            let others: Vec<char> =
                (0..operands.len()).filter(|j| *j != i).flat_map(|j| operands[j].labels.clone()).collect();
            sum_out(l, &mut operands[i], |c| result.contains(&c) || others.contains(&c))?;
        }
        let mut rest = operands.into_iter();
        let mut all = rest.next().ok_or_else(|| bad("has no operands"))?;
        let rest: Vec<Labelled> = rest.collect();
        for (i, b) in rest.iter().enumerate() {
            let later = |c: char| result.contains(&c) || rest[i + 1..].iter().any(|o| o.labels.contains(&c));
            all = product(l, &all, b, later)?;
        }
        Ok(vec![Some(arrange(l, &all, &result)?.0)])
    }
}

pub(super) const ROWS: &[Row] = &[Row::new("Einsum", 12, Einsum::make)];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    let case = |equation: &str, operands: &[&[usize]]| {
        let case = Case::new("Einsum", 12).named(equation).string("equation", equation);
        operands.iter().fold(case, |case, dims| case.input(dims))
    };
    vec![
        case("ij,jk", &[&[2, 3], &[3, 4]]),
        case("bij,bjk->bki", &[&[2, 3, 4], &[2, 4, 5]]),
        case("bhqd,bhkd->bhqk", &[&[2, 3, 4, 5], &[2, 3, 6, 5]]),
        case("...ij,...jk->...ik", &[&[2, 1, 3, 4], &[5, 4, 2]]),
        case("ij->", &[&[3, 4]]),
        case("ij->ji", &[&[3, 4]]),
        case("...ii->...i", &[&[2, 3, 3]]),
        case("ii", &[&[3, 3]]),
        case("i,j->ji", &[&[3], &[4]]),
        case("ij,ij->ij", &[&[3, 4], &[3, 4]]),
        case("ij,jk,kl->il", &[&[2, 3], &[3, 4], &[4, 2]]),
        case("i,ij,k->j", &[&[2], &[2, 3], &[4]]),
        case("ij,jk->ik", &[&[2, 1], &[3, 4]]),
        case(" a b , b -> a ", &[&[2, 3], &[3]]),
    ]
}
