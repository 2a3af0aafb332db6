//! The gradient of a loss with respect to every parameter and input: what `retune grad` prints.

use std::collections::HashMap;

use crate::error::Result;
use crate::exec::Session;
use crate::graph::{self, ValueId, WeightId};
use crate::ops::Mode;
use crate::plan::Request;
use crate::tensor::Tensor;
use crate::train::data::Batch;
use crate::train::loss::Loss;
use crate::train::loss_scale;
use crate::train::step::{Network, Shapes, feeds, param_values};

/// Loss, outputs and gradients of one batch, by ONNX tensor name.
#[derive(Debug, Clone)]
pub struct Gradients {
    pub loss: Tensor,
    pub outputs: Vec<(String, Tensor)>,
    /// Zeros for what the loss does not depend on.
    pub gradients: Vec<(String, Tensor)>,
    pub left_out: Option<String>,
}

/// Differentiates `loss` on one batch with the network in `mode`, with respect to `params` and every
/// floating-point input. Running statistics are left as they are.
pub fn gradients(
    session: &mut Session,
    loss: &Loss,
    mode: Mode,
    params: &[WeightId],
    batch: &Batch,
) -> Result<Gradients> {
    session.make_mutable(params)?;
    let shapes = Shapes::of(batch)?;
    let mut net = Network::new(session, mode, &shapes, &HashMap::new())?;
    net.fuse(&[], true)?;
    let attached = loss.attach(&mut net.graph, shapes.target.clone())?;
    let mut wrt: Vec<ValueId> = param_values(session, params);
    for (v, (_, meta)) in net.inputs.iter().zip(&shapes.inputs) {
        if meta.dtype.is_float() {
            wrt.push(*v);
        }
    }
    let scaled = loss_scale::scaled(session, &mut net.graph, attached.loss)?;
    let grads = graph::grad(&mut net.graph, scaled, &wrt)?;
    let named: Vec<ValueId> = net.graph.outputs.iter().copied().filter(|v| *v != attached.loss).collect();
    let mut outputs = vec![attached.loss];
    outputs.extend(&named);
    outputs.extend(grads.values());
    let request = Request { outputs, ..Request::default() };
    let program = session.compile(net.graph, request)?;
    session.run(&program, &feeds(&net.inputs, attached.target, batch)?, 0)?;
    let read = |v: ValueId| Ok::<_, crate::error::Error>(session.output(&program, v)?.to_tensor());
    let name = |v: ValueId| program.graph.value(v).name.clone();
    let mut gradients = Vec::new();
    for v in wrt {
        let g = match grads.get(&v) {
            Some(g) => unscaled(read(*g)?, loss_scale::present(session)),
            None => {
                let meta = program.graph.meta(v)?;
                Tensor::zeros(meta.dtype, &meta.dims)
            }
        };
        gradients.push((name(v), g));
    }
    let outputs = named.iter().map(|v| Ok((name(*v), read(*v)?))).collect::<Result<_>>()?;
    Ok(Gradients { loss: read(attached.loss)?, outputs, gradients, left_out: attached.left_out })
}

/// A gradient without the scale of its loss, a power of two.
fn unscaled(g: Tensor, scale: Option<f64>) -> Tensor {
    match scale {
        None => g,
        Some(scale) => {
            let values: Vec<f64> = g.to_f64().iter().map(|x| x / scale).collect();
            Tensor::from_slice(g.dims(), &values).map_or(g.clone(), |t| t.cast(g.dtype()))
        }
    }
}
