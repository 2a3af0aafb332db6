//! Constants that join the data: tables of positions, class tokens, first states of recurrent layers.
//!
//! Only values tell them from masks, grids of coordinates and fixed tables of sines, which must not train.

use std::collections::HashSet;

use super::moves::{Way, moves_only};
use super::{DEPTH, Roles, single_axis};
use crate::graph::{NodeId, Source, ValueId};
use crate::import::external::SourceFile;
use crate::import::weights::Weight;

/// Elements looked at.
const SAMPLE: usize = 4096;

impl Roles<'_> {
    /// Whether operand `slot` of `n`, a constant of `dims` that came by `way`, stands beside what is computed from the data as if
    /// it were data itself.
    pub(super) fn joins_data(&self, n: NodeId, slot: usize, dims: &[usize], way: &Way) -> bool {
        let vectors = dims.last().is_some_and(|d| *d > 1);
        let data = |v: ValueId| {
            let fixed = matches!(self.graph.value(v).source, Source::Constant(_));
            !fixed && !self.parametric(v, DEPTH)
        };
        let beside_data = || {
            let others = self.graph.node(n).inputs.iter().enumerate().filter(|(i, _)| *i != slot);
            others.filter_map(|(_, v)| *v).any(data)
        };
        match (self.op(n), slot) {
            // Vectors over one axis are taken for biases where a layer stands before them, and for nothing else.
            ("Add", _) => {
                vectors
                    && (way.spread || single_axis(dims).is_none())
                    && beside_data()
                    && !self.scores_attention(n)
            }
            ("Concat", _) => {
                let last = dims.len() as i64 - 1;
                let axis = self.attrs.get(n.index()).and_then(|a| a.int_or("axis", 0).ok());
                vectors && last > 0 && axis.is_some_and(|a| a != -1 && a != last) && beside_data()
            }
            ("LSTM" | "GRU" | "RNN", 5) | ("LSTM", 6) => vectors,
            ("MatMul" | "LayerNormalization", 0) => way.spread && vectors,
            _ => false,
        }
    }

    /// Does a Softmax read what `n` puts out?
    fn scores_attention(&self, n: NodeId) -> bool {
        let (mut level, mut seen) = (vec![n], HashSet::from([n]));
        for _ in 0..DEPTH {
            let outputs = level.iter().flat_map(|&n| self.graph.node(n).outputs.iter().flatten());
            let readers: Vec<NodeId> =
                outputs.filter_map(|v| self.consumers.get(v.index())).flatten().copied().collect();
            if readers.iter().any(|&r| matches!(self.op(r), "Softmax" | "LogSoftmax")) {
                return true;
            }
            let passes =
                |op: &str| moves_only(op) || matches!(op, "Add" | "Mul" | "Div" | "Where" | "Clip" | "Max");
            level = readers.into_iter().filter(|&r| passes(self.op(r)) && seen.insert(r)).collect();
            if level.is_empty() {
                break;
            }
        }
        false
    }
}

/// Whether a constant's values look learned: irregular, unlike masks, grids, zeros and tables of sines.
pub(super) fn looks_learned(w: &Weight, files: &[SourceFile]) -> bool {
    let Ok(t) = w.load(files) else { return false };
    let values = t.to_f64();
    irregular(&values[..values.len().min(SAMPLE)], t.dims().last().copied().unwrap_or(0))
}

/// `row`: elements of the last axis.
fn irregular(values: &[f64], row: usize) -> bool {
    if values.len() < 2 || values.iter().any(|x| !x.is_finite()) {
        return false;
    }
    // Grids count in steps of a half; tables of sines begin with sines of 0 and cosines of 0.
    let steps = values.iter().all(|x| (x * 2.0).fract() == 0.0);
    let sines = values.iter().take(row).all(|x| *x == 0.0 || *x == 1.0);
    let distinct = values.iter().map(|x| x.to_bits()).collect::<HashSet<_>>().len();
    !steps && !sines && distinct > values.len() / 4 + 1
}

#[cfg(test)]
mod tests {
    use super::irregular;
    use crate::import::make::{attr, floats, import, ints, model, node, ramp, with};
    use crate::import::proto::{AttributeProto, TensorProto};
    use crate::import::{Model, Role};

    /// Irregular elements.
    fn learned(name: &str, dims: &[i64]) -> TensorProto {
        let n = dims.iter().product::<i64>();
        floats(name, dims, &(0..n).map(|i| (i * i) as f32 * 0.37).map(|x| x.sin() * 0.1).collect::<Vec<_>>())
    }

    fn role(m: &Model, name: &str) -> Role {
        m.weight(m.find_weight(name).unwrap()).role
    }

    #[test]
    fn tables_and_tokens_train_and_what_looks_like_them_does_not() {
        let axis = AttributeProto { i: 0, ..attr("axis", 2) };
        let nodes = vec![
            node("Relu", &["x"], &["data"]),
            node("Slice", &["positions", "zero", "two"], &["first"]),
            node("Add", &["data", "first"], &["placed"]),
            node("Expand", &["token", "shape"], &["tokens"]),
            with(node("Concat", &["tokens", "placed"], &["all"]), axis),
            node("Add", &["all", "grid"], &["on_grid"]),
            node("Mul", &["on_grid", "gain"], &["g"]),
            node("Add", &["g", "relative"], &["scores"]),
            node("Softmax", &["scores"], &["y"]),
        ];
        let constants = vec![
            learned("positions", &[4, 3]),
            learned("token", &[1, 3]),
            floats("grid", &[2, 3], &[0.5, 1.5, 2.5, 0.5, 1.5, 2.5]),
            learned("gain", &[2, 3]),
            learned("relative", &[2, 3]),
            ints("zero", &[0]),
            ints("two", &[2]),
            ints("shape", &[1, 3]),
        ];
        let m = import(&model(nodes, constants, "y")).unwrap();
        let roles = ["positions", "token", "grid", "gain", "relative"].map(|n| role(&m, n));
        assert_eq!(roles, [Role::Embedding, Role::Embedding, Role::Constant, Role::Constant, Role::Constant]);
    }

    #[test]
    fn weights_that_are_cut_and_put_together_stay_weights() {
        let axis = || AttributeProto { i: 0, ..attr("axis", 2) };
        let nodes = vec![
            node("Slice", &["w", "zero", "one"], &["w0"]),
            node("Slice", &["w", "one", "two"], &["w1"]),
            with(node("Concat", &["w1", "w0"], &["turned"]), axis()),
            node("Unsqueeze", &["turned", "zero"], &["wx"]),
            node("Unsqueeze", &["r", "zero"], &["wr"]),
            with(node("Concat", &["b", "b2"], &["joined"]), axis()),
            node("Unsqueeze", &["joined", "zero"], &["bias"]),
            node("Unsqueeze", &["x", "zero"], &["steps"]),
            with(
                node("RNN", &["steps", "wx", "wr", "bias", "", "h"], &["y"]),
                AttributeProto { i: 2, ..attr("hidden_size", 2) },
            ),
        ];
        let constants = vec![
            ramp("w", &[2, 3]),
            ramp("r", &[2, 2]),
            ramp("b", &[2]),
            learned("b2", &[2]),
            learned("h", &[1, 1, 2]),
            ints("zero", &[0]),
            ints("one", &[1]),
            ints("two", &[2]),
        ];
        let m = import(&model(nodes, constants, "y")).unwrap();
        let roles = ["w", "r", "b", "b2", "h"].map(|n| role(&m, n));
        assert_eq!(roles, [Role::Weight, Role::Weight, Role::Bias, Role::Bias, Role::Embedding]);
        assert!(m.weights.iter().all(|w| w.split.is_none()), "no part becomes a weight of its own");
    }

    #[test]
    fn masks_grids_and_sines_are_not_learned() {
        let learned: Vec<f64> = (0..64).map(|i| ((i * i) as f64 * 0.37).sin() * 0.02).collect();
        assert!(irregular(&learned, 16) && irregular(&[0.013, -0.4], 2));
        let sines = |i: usize| match (i / 16, i % 16) {
            (t, c) if c % 2 == 0 => (t as f64 / 100f64.powi(c as i32 / 2)).sin(),
            (t, c) => (t as f64 / 100f64.powi(c as i32 / 2)).cos(),
        };
        let sines: Vec<f64> = (0..64).map(sines).collect();
        let mask: Vec<f64> = (0..64).map(|i| if i % 8 > i / 8 { -1e9 } else { 0.0 }).collect();
        let grid: Vec<f64> = (0..64).map(|i| (i % 8) as f64 + 0.5).collect();
        let unit: Vec<f64> = (0..64).map(|i| (i % 8) as f64 / 7.0).collect();
        for regular in [sines, mask, grid, unit, vec![0.0; 64], vec![0.3; 64], vec![f64::NEG_INFINITY; 4]] {
            assert!(!irregular(&regular, 16), "{regular:?}");
        }
    }
}
