//! Normalisations that an exporter folded into convolutions: put back for the training, folded again in the export.
//!
//! A normalisation with the statistics of sample data, scale σ and shift μ is the identity; what training makes of it
//! goes back into the weight and bias that the file has: `w·γ/√(var + ε)` and `(b − mean)·γ/√(var + ε) + β`.

use std::collections::HashMap;
use std::sync::Arc;

use prost::Message;

use crate::error::{Error, Result};
use crate::exec::Session;
use crate::export::{self, Source};
use crate::finetune::shapes_of;
use crate::graph::{NodeId, WeightId};
use crate::import::proto::{AttributeProto, NodeProto};
use crate::import::splice::Constant;
use crate::import::wire::{self, Edit};
use crate::import::{Model, Role, edited};
use crate::ops::Mode;
use crate::plan::Request;
use crate::tensor::{DType, Tensor};
use crate::train::data::Dataset;
use crate::train::step::Network;

/// Samples that the statistics are taken over.
const SAMPLES: usize = 256;
const BATCH: usize = 16;
const EPSILON: f32 = 1e-5;

/// A convolution that gets its normalisation back.
struct Layer {
    weight: WeightId,
    bias: WeightId,
    /// What the convolution computes in the file.
    output: String,
}

/// A model with normalisations that its file does not have.
pub(super) struct Reinserted {
    /// The model of the file.
    pub base: Arc<Model>,
    pub model: Arc<Model>,
    layers: Vec<Layer>,
}

/// Names of the constants of a normalisation.
fn names(output: &str) -> [String; 4] {
    ["scale", "shift", "mean", "var"].map(|part| format!("{output}/norm.{part}"))
}

fn layers(model: &Model) -> Vec<Layer> {
    let folded = crate::inspect::folded(model);
    let own = |id: NodeId, slot: usize, role: Role| {
        let used = |w: &crate::import::Weight| {
            w.uses.len() == 1
                && (w.uses[0].node, w.uses[0].slot, w.uses[0].role) == (id, slot, role)
                && w.split.is_none()
                && w.dtype == DType::F32
        };
        let at = model.weights.iter().position(used)?;
        let shared = model.weights.iter().any(|w| w.split.as_ref().is_some_and(|s| s.source.index() == at));
        (!shared).then_some(WeightId(at as u32))
    };
    let layer = |i: usize| {
        let id = NodeId(i as u32);
        let node = model.graph.node(id);
        let output = node.output()?;
        Some(Layer {
            weight: own(id, 1, Role::Weight)?,
            bias: own(id, 2, Role::Bias)?,
            output: model.graph.value(output).name.clone(),
        })
    };
    let is_folded = |i: &usize| folded.iter().any(|f| f.node == model.graph.describe(NodeId(*i as u32)));
    (0..model.graph.nodes.len()).filter(is_folded).filter_map(layer).collect()
}

/// Puts normalisations back behind the convolutions of the session's model, with the statistics of samples `indices`.
pub(super) fn reinsert(session: &mut Session, data: &Dataset, indices: &[usize]) -> Result<Reinserted> {
    let base = session.model().clone();
    let layers = layers(&base);
    if layers.is_empty() {
        return Err(Error::Config(
            "--reinsert-norms: no convolution looks as if a normalisation had been folded into it (`retune inspect`)".into(),
        ));
    }
    let statistics = statistics(session, &layers, data, indices)?;
    let malformed = |e: wire::WireError| Error::file(&base.path, e.to_string());
    let bytes = &base.files[0].bytes;
    let mut edits = Vec::new();
    for field in wire::find_all(bytes, &[7, 1]).map_err(malformed)? {
        let node = NodeProto::decode(bytes.get(field.payload.clone()).unwrap_or_default())
            .map_err(|e| Error::file(&base.path, e.to_string()))?;
        let Some(k) = layers.iter().position(|l| node.output.first() == Some(&l.output)) else { continue };
        let (layer, (mean, var)) = (&layers[k], &statistics[k]);
        let raw = format!("{}/norm.input", layer.output);
        let outputs = wire::descend(bytes, field.payload.clone(), &[2]).map_err(malformed)?;
        let Some(first) = outputs.first() else { continue };
        edits.push(Edit {
            path: vec![7, 1, 2],
            range: first.payload.clone(),
            bytes: raw.clone().into_bytes(),
        });
        let scale: Vec<f32> = var.iter().map(|v| (v + EPSILON).sqrt()).collect();
        let parts = names(&layer.output);
        let mut new = Vec::new();
        for (name, values) in parts.iter().zip([&scale, mean, mean, var]) {
            let constant = Constant {
                name: name.clone(),
                dtype: DType::F32,
                dims: vec![values.len() as i64],
                values: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
                ir_version: base.ir_version,
            };
            new.extend(constant.field(String::new()));
        }
        let epsilon = Some(EPSILON.to_le_bytes().to_vec().into());
        let epsilon = AttributeProto { name: "epsilon".into(), r#type: 1, f: epsilon, ..Default::default() };
        let norm = NodeProto {
            op_type: "BatchNormalization".into(),
            name: format!("{}/norm", layer.output),
            input: std::iter::once(raw).chain(parts).collect(),
            output: vec![layer.output.clone()],
            attribute: vec![epsilon],
            ..Default::default()
        };
        wire::put_field(&mut new, 1, &norm.encode_to_vec());
        let end = field.whole.end;
        edits.push(Edit { path: vec![7], range: end..end, bytes: new });
    }
    let model = Arc::new(edited(&base, edits)?);
    Ok(Reinserted { base, model, layers })
}

/// Mean and variance of each channel of each layer's output.
fn statistics(
    session: &mut Session,
    layers: &[Layer],
    data: &Dataset,
    indices: &[usize],
) -> Result<Vec<(Vec<f32>, Vec<f32>)>> {
    // Number, sum and sum of squares by channel.
    let mut sums: Vec<(f64, Vec<f64>, Vec<f64>)> = vec![(0.0, Vec::new(), Vec::new()); layers.len()];
    let indices = &indices[..indices.len().min(SAMPLES)];
    for picks in indices.chunks(BATCH) {
        let mut batch = data.new_batch(picks.len());
        data.batch(picks, None, &mut batch)?;
        let net = Network::new(session, Mode::EVAL, &shapes_of(data, picks.len())?, &HashMap::new())?;
        let find = |l: &Layer| {
            net.graph.find(&l.output).ok_or_else(|| Error::value(&l.output, "is not in the graph"))
        };
        let outputs = layers.iter().map(find).collect::<Result<Vec<_>>>()?;
        let inputs = net.inputs.clone();
        let program =
            session.compile(net.graph, Request { outputs: outputs.clone(), ..Request::default() })?;
        let feeds: Vec<_> = inputs.iter().zip(&batch.inputs).map(|(v, (_, t))| (*v, t.view())).collect();
        session.run(&program, &feeds, 0)?;
        for (v, (n, sum, squares)) in outputs.iter().zip(&mut sums) {
            let t = session.output(&program, *v)?.to_tensor();
            let channels = t.dims().get(1).copied().unwrap_or(1).max(1);
            let inner: usize = t.dims().iter().skip(2).product();
            sum.resize(channels, 0.0);
            squares.resize(channels, 0.0);
            for (k, plane) in t.to_f64().chunks_exact(inner.max(1)).enumerate() {
                sum[k % channels] += plane.iter().sum::<f64>();
                squares[k % channels] += plane.iter().map(|x| x * x).sum::<f64>();
            }
            *n += (t.len() / channels) as f64;
        }
    }
    let of = |(n, sum, squares): (f64, Vec<f64>, Vec<f64>)| {
        let mean: Vec<f64> = sum.iter().map(|s| s / n.max(1.0)).collect();
        let var: Vec<f32> =
            squares.iter().zip(&mean).map(|(s, m)| (s / n.max(1.0) - m * m).max(0.0) as f32).collect();
        (mean.iter().map(|m| *m as f32).collect::<Vec<f32>>(), var)
    };
    Ok(sums.into_iter().map(of).collect())
}

impl Reinserted {
    /// How many normalisations there are.
    pub(super) fn len(&self) -> usize {
        self.layers.len()
    }
}

/// The weights of the file with what a session has learned of the model with normalisations.
pub(super) struct Folded<'a> {
    pub of: &'a Reinserted,
    pub session: &'a Session,
}

impl Folded<'_> {
    /// A weight of the model with normalisations.
    fn learned(&self, name: &str) -> Result<Tensor> {
        let id = self.of.model.find_weight(name);
        self.session.weight(id.ok_or_else(|| Error::value(name, "is not in the model"))?)
    }

    /// A weight of the file.
    fn value(&self, id: WeightId) -> Result<Tensor> {
        let mut new = self.learned(&self.of.base.weight(id).name)?;
        let Some(layer) = self.of.layers.iter().find(|l| l.weight == id || l.bias == id) else {
            return Ok(new);
        };
        let part = |name: &String| Ok::<_, Error>(self.learned(name)?.to_f64());
        let [scale, shift, mean, var] = &names(&layer.output);
        let gain: Vec<f64> =
            part(scale)?.iter().zip(&part(var)?).map(|(s, v)| s / (v + f64::from(EPSILON)).sqrt()).collect();
        let at = |source| Error::Op { node: layer.output.clone(), source };
        let per_channel = (new.len() / gain.len().max(1)).max(1);
        let values = new.get_mut::<f32>().map_err(at)?;
        if id == layer.weight {
            for (row, g) in values.chunks_exact_mut(per_channel).zip(&gain) {
                row.iter_mut().for_each(|x| *x = (f64::from(*x) * g) as f32);
            }
        } else {
            let (shift, mean) = (part(shift)?, part(mean)?);
            for (c, x) in values.iter_mut().enumerate() {
                *x = ((f64::from(*x) - mean[c]) * gain[c] + shift[c]) as f32;
            }
        }
        Ok(new)
    }
}

impl Source for Folded<'_> {
    fn weights(&self) -> Vec<WeightId> {
        let of_layers = self.of.layers.iter().flat_map(|l| [l.weight, l.bias]);
        let changing = self.session.changing().into_iter();
        let others = changing.filter_map(|id| self.of.base.find_weight(&self.of.model.weight(id).name));
        let mut all: Vec<WeightId> = of_layers.chain(others).collect();
        all.sort();
        all.dedup();
        all
    }

    fn stored(&self, model: &Model, id: WeightId) -> Result<Option<export::Stored<'_>>> {
        export::restored(model, id, &self.value(id)?)
    }
}
