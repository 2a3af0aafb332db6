//! `QuantizeLinear` with the `DequantizeLinear` that follows, as one operator that gradients pass straight through.

use std::sync::Arc;

use super::{Layout, level_dispatch, sum_to_scales};
use crate::error::OpError;
use crate::float_dispatch;
use crate::graph::{GradBuilder, Graph, NodeId, Source, ValueId};
use crate::kernels::quant::{Levels, Spread};
use crate::ops::bytes::second_derivative;
use crate::ops::quant::{DequantizeLinear, QuantizeLinear, range};
use crate::ops::{Cx, Grads, Op, get, need, out};
use crate::tensor::{DType, Meta, View, ViewMut, axis};

/// X rounded to levels and back: X, scale, zero point (of the levels' type) to X's type and shape.
///
/// Its derivative is taken as 1 where X is within the range of the levels and 0 outside; the scale's follows from that
/// (learned step size quantisation; Esser et al., arXiv 1902.08153).
#[derive(Debug, Clone, Copy)]
pub struct FakeQuantize {
    layout: Layout,
    levels: DType,
}

/// What the gradient is with respect to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    Input,
    /// One term an element.
    Scale,
}

/// (X, scale, zero point, dY) to dX, or to the terms of the scale's gradient.
#[derive(Debug, Clone, Copy)]
struct FakeQuantizeGrad {
    of: FakeQuantize,
    by: By,
}

impl FakeQuantize {
    /// A weight of the file whose integers, of type `levels`, are trained as floats that are rounded to them.
    pub fn of_weight(layout: Layout, levels: DType) -> Self {
        FakeQuantize { layout, levels }
    }

    /// Joins every pair of the graph, whose shapes are known: a DequantizeLinear of a QuantizeLinear's levels by the
    /// same scale and zero point.
    pub fn join(graph: &mut Graph) {
        for i in 0..graph.nodes.len() {
            let node = graph.node(NodeId(i as u32));
            let Some(back) = node.op.as_a::<DequantizeLinear>() else { continue };
            let Some(Some(levels)) = node.inputs.first() else { continue };
            let Source::Node(n, 0) = graph.value(*levels).source else { continue };
            let there = graph.node(n);
            let Some(quantize) = there.op.as_a::<QuantizeLinear>() else { continue };
            let same = |slot: usize| {
                let id = |inputs: &[Option<ValueId>]| inputs.get(slot).copied().flatten();
                match (id(&node.inputs), id(&there.inputs)) {
                    (Some(a), Some(b)) => a == b || equal(graph, a, b),
                    (None, None) => true,
                    _ => false,
                }
            };
            let Some(meta) = &graph.value(*levels).meta else { continue };
            if range(meta.dtype).is_err() {
                continue;
            }
            let layouts =
                back.layout == quantize.layout || single(graph, there.inputs.get(1).copied().flatten());
            if !layouts || !same(1) || !same(2) {
                continue;
            }
            let op = FakeQuantize { layout: quantize.layout, levels: meta.dtype };
            let inputs = there.inputs.clone();
            let node = &mut graph.nodes[i];
            (node.op, node.inputs) = (Arc::new(op), inputs);
        }
    }
}

fn single(graph: &Graph, v: Option<ValueId>) -> bool {
    v.and_then(|v| graph.value(v).meta.as_ref()).is_some_and(|m| m.rank() <= 1 && m.len() == 1)
}

fn equal(graph: &Graph, a: ValueId, b: ValueId) -> bool {
    match (&graph.value(a).source, &graph.value(b).source) {
        (Source::Constant(a), Source::Constant(b)) => {
            a.dtype() == b.dtype() && a.dims() == b.dims() && a.bytes() == b.bytes()
        }
        _ => false,
    }
}

impl Op for FakeQuantize {
    fn name(&self) -> &'static str {
        "FakeQuantize"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        QuantizeLinear { layout: self.layout, dtype: self.levels, saturate: true }.infer(inputs)?;
        Ok(vec![Meta::new(x.dtype, &x.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (data, scale, zero, y) = (need(x, 0)?, need(x, 1)?, get(x, 2), out(y, 0)?);
        let spread = self.layout.spread(data.dims, scale.dims)?;
        let range = range(self.levels)?;
        float_dispatch!(data.dtype, T => level_dispatch!(self.levels, Q => {
            let zero = zero.map(|z| z.get::<Q>()).transpose()?;
            let levels = Levels::<T, Q> { spread, scale: scale.get()?, zero, range };
            levels.round(data.get()?, y.get()?);
            Ok(())
        }))
    }

    fn remark(&self) -> Option<String> {
        Some(format!("computed in floating point, rounded to the levels of {}", self.levels))
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        // dX = dY within the range, else 0; dscale as the operator's documentation says
        let (x, scale, dy) = (g.x(0)?, g.x(1)?, g.dy0()?);
        let inputs = [Some(x), Some(scale), g.x_opt(2), Some(dy)];
        let mut grads = Grads::from_elem(None, 3);
        if g.wants(0) {
            grads[0] = Some(g.emit_all(FakeQuantizeGrad { of: *self, by: By::Input }, &inputs, 1)?[0]);
        }
        if g.wants(1) {
            let (dims, scales) = (g.meta(x)?.dims.clone(), g.meta(scale)?.dims.clone());
            let spread = self.layout.spread(&dims, &scales)?;
            if matches!(spread, Spread::Blocks { .. }) {
                return Err(OpError::NotDifferentiable("scales of blocks".into()));
            }
            let a = if spread == Spread::Tensor { 0 } else { axis(self.layout.axis, dims.len())? };
            let terms = g.emit_all(FakeQuantizeGrad { of: *self, by: By::Scale }, &inputs, 1)?[0];
            grads[1] = Some(sum_to_scales(g, terms, a, spread, scales)?);
        }
        Ok(grads)
    }
}

impl Op for FakeQuantizeGrad {
    fn name(&self) -> &'static str {
        "FakeQuantizeGrad"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        Ok(vec![Meta::new(x.dtype, &x.dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (data, scale, zero, dy, y) = (need(x, 0)?, need(x, 1)?, get(x, 2), need(x, 3)?, out(y, 0)?);
        let spread = self.of.layout.spread(data.dims, scale.dims)?;
        let range = range(self.of.levels)?;
        float_dispatch!(data.dtype, T => level_dispatch!(self.of.levels, Q => {
            let zero = zero.map(|z| z.get::<Q>()).transpose()?;
            let levels = Levels::<T, Q> { spread, scale: scale.get()?, zero, range };
            let (x, dy, y) = (data.get()?, dy.get()?, y.get()?);
            match self.by {
                By::Input => levels.pass(x, dy, y),
                By::Scale => levels.scale_terms(x, dy, y),
            }
            Ok(())
        }))
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        second_derivative()
    }
}

#[cfg(test)]
pub(super) fn cases() -> Vec<crate::ops::cases::Case> {
    use crate::ops::cases::Case;
    use crate::tensor::Tensor;
    let op = FakeQuantize { layout: Layout { axis: 1, block: 0 }, levels: DType::I8 };
    let scales = Tensor::from_slice(&[3], &[0.01, 0.02, 0.5]).unwrap();
    vec![Case::of(op).input(&[2, 3, 4]).fixed(scales).forward_only()]
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::exec::reference::interpret;
    use crate::graph::grad;
    use crate::ops::reduce::{Kind, Reduce};
    use crate::tensor::Tensor;

    /// x → QuantizeLinear → DequantizeLinear → sum, with levels of int8.
    #[test]
    fn a_pair_is_joined_and_passed_straight_through() {
        let x = Tensor::from_slice(&[4], &[0.26f32, -0.1, 20.0, -30.0]).unwrap();
        let layout = Layout { axis: 0, block: 0 };
        let mut g = Graph::default();
        let v = g.add_input("x", x.meta());
        let scale = g.add_input("scale", Meta::new(DType::F32, &[]));
        let zero = g.add_constant("zero", Tensor::scalar(2i8));
        let params = [Some(scale), Some(zero)];
        let there = Arc::new(QuantizeLinear { layout, dtype: DType::I8, saturate: true });
        let q = g.emit("q", there, &[Some(v), params[0], params[1]], 1).unwrap()[0];
        let back = Arc::new(DequantizeLinear { layout });
        let y = g.emit("y", back, &[Some(q), params[0], params[1]], 1).unwrap()[0];
        let sum = Reduce { kind: Kind::Sum, axes: None, keepdims: false, noop: false };
        let loss = g.emit("loss", Arc::new(sum), &[Some(y)], 1).unwrap()[0];
        let feeds = HashMap::from([(v, x), (scale, Tensor::scalar(0.1f32))]);
        let apart = interpret(&g, &feeds, &[y]).unwrap();
        FakeQuantize::join(&mut g);
        assert_eq!(g.nodes[1].op.name(), "FakeQuantize");
        let grads = grad(&mut g, loss, &[v, scale]).unwrap();
        let out = interpret(&g, &feeds, &[y, grads[&v], grads[&scale]]).unwrap();
        assert_eq!(apart[0].bytes(), out[0].bytes());
        let want = [0.3, -0.1, 12.5, -13.0];
        assert!(out[0].to_f64().iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-5), "{:?}", out[0].to_f64());
        // 20 and −30 lie outside −13 … 12.5.
        assert_eq!(out[1].to_f64(), [1.0, 1.0, 0.0, 0.0]);
        // (3 − 2.6) + (−1 + 1) + 125 − 130
        assert!((out[2].to_f64()[0] + 4.6).abs() < 1e-4, "{:?}", out[2].to_f64());
    }
}
