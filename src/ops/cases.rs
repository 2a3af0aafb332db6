//! One case table an operator family drives the gradient check, the f32-against-f64 check and, through
//! [`coverage`], the promise that no row of the operator table goes untested.
//!
//! Gradient reference: the f64 instance of the operator, a vector-Jacobian product along a random
//! direction against central differences.

mod bad;
mod last;
mod readme;

use std::collections::HashMap;
use std::sync::Arc;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::error::OpError;
use crate::exec::reference::interpret;
use crate::graph::{GradBuilder, Graph, ValueId, grad};
use crate::ops::{Attr, Attrs, Cx, Grads, Mode, Op, Spec, create, need, out, table};
use crate::tensor::{DType, Dims, Meta, Tensor, View, ViewMut};

/// One operand of a case.
#[derive(Debug, Clone)]
pub enum Operand {
    Absent,
    /// Random, uniform in the range; differentiated.
    Random {
        dims: Vec<usize>,
        low: f64,
        high: f64,
    },
    /// Given floats; differentiated.
    Given {
        dims: Vec<usize>,
        data: Vec<f64>,
    },
    /// Not differentiated, known at plan time (shapes, axes, labels).
    Fixed(Tensor),
}

/// An operator with attributes and operands.
#[derive(Debug, Clone)]
pub struct Case {
    pub op_type: String,
    pub name: String,
    domain: &'static str,
    op: Option<Arc<dyn Op>>,
    opset: i64,
    attrs: Attrs,
    operands: Vec<Operand>,
    outputs: usize,
    mode: Option<Mode>,
    forward_only: bool,
    tolerance: f64,
}

impl Case {
    /// An operator of the table.
    pub fn new(op_type: &str, opset: i64) -> Self {
        Case {
            op_type: op_type.into(),
            name: op_type.into(),
            domain: "",
            op: None,
            opset,
            attrs: Attrs::default(),
            operands: Vec::new(),
            outputs: 1,
            mode: None,
            forward_only: false,
            tolerance: 1e-6,
        }
    }

    /// An operator of onnxruntime's domain.
    pub fn contrib(op_type: &str) -> Self {
        Case { domain: "com.microsoft", ..Case::new(op_type, 1) }
    }

    /// An operator that no file can name (losses, for instance).
    pub fn of(op: impl Op + 'static) -> Self {
        let mut case = Case::new(op.name(), 0);
        case.op = Some(Arc::new(op));
        case
    }

    /// Tells cases of one operator apart in messages.
    pub fn named(mut self, name: &str) -> Self {
        self.name = format!("{} {name}", self.op_type);
        self
    }

    /// Adds to what tells it apart.
    pub fn also(mut self, name: &str) -> Self {
        self.name = format!("{}, {name}", self.name);
        self
    }

    pub fn attr(mut self, name: &str, value: Attr) -> Self {
        self.attrs.0.insert(name.into(), value);
        self
    }

    pub fn int(self, name: &str, value: i64) -> Self {
        self.attr(name, Attr::Int(value))
    }

    pub fn ints(self, name: &str, value: &[i64]) -> Self {
        self.attr(name, Attr::Ints(value.to_vec()))
    }

    pub fn float(self, name: &str, value: f32) -> Self {
        self.attr(name, Attr::Float(value))
    }

    pub fn string(self, name: &str, value: &str) -> Self {
        self.attr(name, Attr::Str(value.into()))
    }

    /// A random operand in -1..1.
    pub fn input(self, dims: &[usize]) -> Self {
        self.within(dims, -1.0, 1.0)
    }

    pub fn within(mut self, dims: &[usize], low: f64, high: f64) -> Self {
        self.operands.push(Operand::Random { dims: dims.to_vec(), low, high });
        self
    }

    pub fn given(mut self, dims: &[usize], data: &[f64]) -> Self {
        self.operands.push(Operand::Given { dims: dims.to_vec(), data: data.to_vec() });
        self
    }

    pub fn fixed(mut self, t: Tensor) -> Self {
        self.operands.push(Operand::Fixed(t));
        self
    }

    pub fn absent(mut self) -> Self {
        self.operands.push(Operand::Absent);
        self
    }

    /// How many outputs enter the loss (1 unless told).
    pub fn outputs(mut self, n: usize) -> Self {
        self.outputs = n;
        self
    }

    pub fn mode(mut self, mode: Mode) -> Self {
        self.mode = Some(mode);
        self
    }

    /// Has no gradient: only runs.
    pub fn forward_only(mut self) -> Self {
        self.forward_only = true;
        self
    }

    /// Relative tolerance of the f64 gradient (1e-6 unless told).
    pub fn tolerance(mut self, t: f64) -> Self {
        self.tolerance = t;
        self
    }

    /// What a family's own tests need: the attributes, and the dimensions of the random operands.
    pub fn attributes_and_dims(&self) -> (&Attrs, Vec<Vec<usize>>) {
        let dims = self.operands.iter().filter_map(|o| match o {
            Operand::Random { dims, .. } => Some(dims.clone()),
            _ => None,
        });
        (&self.attrs, dims.collect())
    }

    /// The operator, in the case's mode.
    pub fn make(&self) -> Arc<dyn Op> {
        let op = match &self.op {
            Some(op) => op.clone(),
            None => {
                let spec = Spec {
                    domain: self.domain,
                    op_type: &self.op_type,
                    opset: self.opset,
                    attrs: &self.attrs,
                    inputs: self.operands.len(),
                    outputs: self.outputs,
                };
                create(&spec).unwrap_or_else(|e| panic!("{}: {e}", self.name))
            }
        };
        self.mode.and_then(|m| op.in_mode(m)).unwrap_or(op)
    }

    /// The operands' values in f64.
    fn values(&self, rng: &mut ChaCha8Rng) -> Vec<Option<Tensor>> {
        self.operands
            .iter()
            .map(|o| match o {
                Operand::Absent => None,
                Operand::Fixed(t) => Some(t.clone()),
                Operand::Given { dims, data } => Some(Tensor::from_slice(dims, data).unwrap()),
                Operand::Random { dims, low, high } => {
                    let data: Vec<f64> =
                        (0..dims.iter().product()).map(|_| rng.random_range(*low..*high)).collect();
                    Some(Tensor::from_slice(dims, &data).unwrap())
                }
            })
            .collect()
    }

    fn differentiated(&self, i: usize) -> bool {
        matches!(self.operands[i], Operand::Random { .. } | Operand::Given { .. })
    }
}

/// `Σ w·y` with fixed weights: turns any outputs into a loss.
#[derive(Debug)]
struct Dot(Tensor);

impl Op for Dot {
    fn name(&self) -> &'static str {
        "Dot"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        Ok(vec![Meta::new(need(inputs, 0)?.dtype, &[])])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let x = need(x, 0)?;
        let sum: f64 = x.to_tensor().to_f64().iter().zip(self.0.to_f64()).map(|(a, b)| a * b).sum();
        let y = out(y, 0)?;
        match y.dtype {
            DType::F32 => y.get::<f32>()?[0] = sum as f32,
            _ => y.get::<f64>()?[0] = sum,
        }
        Ok(())
    }

    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError> {
        let x = g.x(0)?;
        let dtype = g.meta(x)?.dtype;
        let w = g.constant(self.0.cast(dtype));
        Ok(Grads::from_slice(&[Some(w)]))
    }
}

/// The case as a graph of one operator: operand values, and one loss per floating-point output.
struct Built {
    graph: Graph,
    operands: Vec<Option<ValueId>>,
    outputs: Vec<ValueId>,
    losses: Vec<ValueId>,
}

fn build(case: &Case, values: &[Option<Tensor>], weights: &mut Vec<Tensor>, rng: &mut ChaCha8Rng) -> Built {
    let op = case.make();
    let mut graph = Graph::default();
    let operands: Vec<Option<ValueId>> = values
        .iter()
        .enumerate()
        .map(|(i, t)| {
            t.as_ref().map(|t| match case.differentiated(i) {
                true => graph.add_input(format!("x{i}"), t.meta()),
                false => graph.add_constant(format!("x{i}"), t.clone()),
            })
        })
        .collect();
    let outputs =
        graph.emit("y", op, &operands, case.outputs).unwrap_or_else(|e| panic!("{}: {e}", case.name));
    graph.lower().unwrap_or_else(|e| panic!("{}: {e}", case.name));
    let mut losses = Vec::new();
    for (i, y) in outputs.iter().enumerate() {
        let meta = graph.meta(*y).unwrap().clone();
        if !meta.dtype.is_float() {
            continue;
        }
        while weights.len() < i {
            weights.push(Tensor::scalar(0.0)); // of an output of integers
        }
        if weights.len() <= i {
            let data: Vec<f64> = (0..meta.len()).map(|_| rng.random_range(-1.0..1.0)).collect();
            weights.push(Tensor::from_slice(&meta.dims, &data).unwrap());
        }
        let dot = Arc::new(Dot(weights[i].clone()));
        losses.push(graph.emit("loss", dot, &[Some(*y)], 1).unwrap()[0]);
    }
    Built { graph, operands, outputs, losses }
}

fn feeds(case: &Case, built: &Built, values: &[Option<Tensor>]) -> HashMap<ValueId, Tensor> {
    (0..values.len())
        .filter(|&i| case.differentiated(i))
        .map(|i| (built.operands[i].unwrap(), values[i].clone().unwrap()))
        .collect()
}

fn cast_floats(values: &[Option<Tensor>], to: DType) -> Vec<Option<Tensor>> {
    let cast = |t: &Tensor| if t.dtype().is_float() { t.cast(to) } else { t.clone() };
    values.iter().map(|t| t.as_ref().map(cast)).collect()
}

/// Gradients of the summed losses with respect to each differentiated operand.
fn gradients(
    case: &Case,
    values: &[Option<Tensor>],
    weights: &mut Vec<Tensor>,
    rng: &mut ChaCha8Rng,
) -> Vec<Tensor> {
    let mut built = build(case, values, weights, rng);
    let wrt: Vec<ValueId> =
        (0..values.len()).filter(|&i| case.differentiated(i)).map(|i| built.operands[i].unwrap()).collect();
    let mut total: Vec<Vec<f64>> = Vec::new();
    for loss in built.losses.clone() {
        let grads = grad(&mut built.graph, loss, &wrt).unwrap_or_else(|e| panic!("{}: {e}", case.name));
        // An output that does not depend on an operand adds nothing to its gradient.
        let wanted: Vec<Option<ValueId>> = wrt.iter().map(|v| grads.get(v).copied()).collect();
        let fed = feeds(case, &built, values);
        let there: Vec<ValueId> = wanted.iter().flatten().copied().collect();
        let made =
            interpret(&built.graph, &fed, &there).unwrap_or_else(|e| panic!("{}: gradient: {e}", case.name));
        let mut made = made.into_iter();
        let zeros = |v: &ValueId| Tensor::zeros(DType::F64, &built.graph.meta(*v).unwrap().dims);
        let out: Vec<Tensor> = wrt
            .iter()
            .zip(&wanted)
            .map(|(v, g)| if g.is_some() { made.next().unwrap() } else { zeros(v) })
            .collect();
        last::check(&case.name, &built.graph, &fed);
        if total.is_empty() {
            total = out.iter().map(|t| vec![0.0; t.len()]).collect();
        }
        for (sum, t) in total.iter_mut().zip(&out) {
            sum.iter_mut().zip(t.to_f64()).for_each(|(s, x)| *s += x);
        }
    }
    wrt.iter()
        .zip(total)
        .map(|(v, g)| Tensor::from_slice(&built.graph.meta(*v).unwrap().dims, &g).unwrap())
        .collect()
}

/// Checks one case: finite differences in f64, then f32 outputs and gradients against f64's.
pub fn check(case: &Case) {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let values = case.values(&mut rng);
    let mut weights = Vec::new();
    let built = build(case, &values, &mut weights, &mut rng);
    let run = |values: &[Option<Tensor>], weights: &mut Vec<Tensor>| {
        let built = build(case, values, weights, &mut ChaCha8Rng::seed_from_u64(0));
        interpret(&built.graph, &feeds(case, &built, values), &built.outputs)
            .unwrap_or_else(|e| panic!("{}: {e}", case.name))
    };
    let outputs = run(&values, &mut weights);
    if built.losses.is_empty() || values.iter().flatten().any(|t| t.dtype().is_float()) {
        let narrow = run(&cast_floats(&values, DType::F32), &mut weights);
        for (a, b) in outputs.iter().zip(&narrow) {
            close(&case.name, "f32 output", &a.to_f64(), &b.to_f64(), 1e-4);
        }
    }
    if case.forward_only {
        last::check(&case.name, &built.graph, &feeds(case, &built, &values));
        return;
    }
    let loss = |values: &[Option<Tensor>], weights: &mut Vec<Tensor>| -> f64 {
        let built = build(case, values, weights, &mut ChaCha8Rng::seed_from_u64(0));
        let out = interpret(&built.graph, &feeds(case, &built, values), &built.losses).unwrap();
        out.iter().map(|t| t.to_f64()[0]).sum()
    };
    let grads = gradients(case, &values, &mut weights, &mut rng);
    let h = 1e-6;
    let differentiated: Vec<usize> = (0..values.len()).filter(|&i| case.differentiated(i)).collect();
    for (k, &i) in differentiated.iter().enumerate() {
        let x = values[i].as_ref().unwrap();
        let direction: Vec<f64> = (0..x.len()).map(|_| rng.random_range(-1.0..1.0)).collect();
        let mut moved = |sign: f64| {
            let data: Vec<f64> = x.to_f64().iter().zip(&direction).map(|(x, d)| x + sign * h * d).collect();
            let mut v = values.clone();
            v[i] = Some(Tensor::from_slice(x.dims(), &data).unwrap());
            loss(&v, &mut weights)
        };
        let numeric = (moved(1.0) - moved(-1.0)) / (2.0 * h);
        let analytic: f64 = grads[k].to_f64().iter().zip(&direction).map(|(g, d)| g * d).sum();
        let scale: f64 = grads[k].to_f64().iter().map(|g| g.abs()).sum::<f64>().max(1e-2);
        assert!(
            (numeric - analytic).abs() <= case.tolerance * scale.max(1.0),
            "{}: gradient of input {i}: {analytic} by vjp, {numeric} by central differences",
            case.name
        );
    }
    let narrow = gradients(case, &cast_floats(&values, DType::F32), &mut weights, &mut rng);
    for (a, b) in grads.iter().zip(&narrow) {
        close(&case.name, "f32 gradient", &a.to_f64(), &b.to_f64(), 1e-4);
    }
}

/// Equal within `tolerance` of the largest element; equal infinities and NaNs are equal.
pub fn close(name: &str, what: &str, a: &[f64], b: &[f64], tolerance: f64) {
    assert_eq!(a.len(), b.len(), "{name}: {what}: lengths");
    let scale = a.iter().filter(|x| x.is_finite()).fold(1e-3f64, |m, x| m.max(x.abs()));
    for (i, (x, y)) in a.iter().zip(b).enumerate() {
        let same = (x - y).abs() <= tolerance * scale || x == y || (x.is_nan() && y.is_nan());
        assert!(same, "{name}: {what}: element {i}: {x} and {y}");
    }
}

/// Every family's cases.
fn all() -> Vec<Case> {
    [
        super::attention::cases(),
        super::batch_norm::cases(),
        super::binary::cases(),
        super::bits::cases(),
        super::cast::cases(),
        super::clip::cases(),
        super::contrib::cases(),
        super::conv::cases(),
        super::conv::transposed_cases(),
        super::det::cases(),
        super::dropout::cases(),
        super::einsum::cases(),
        super::expand::cases(),
        super::fill::cases(),
        super::gather::cases(),
        super::join::cases(),
        super::known::cases(),
        super::logic::cases(),
        super::loss::cases(),
        super::matmul::cases(),
        super::norm::cases(),
        super::pad::cases(),
        super::part::cases(),
        super::pool::cases(),
        super::quant::cases(),
        super::random::cases(),
        super::reduce::cases(),
        super::resize::cases(),
        super::rnn::cases(),
        super::sample::cases(),
        super::scale::cases(),
        super::scan::cases(),
        super::scatter::cases(),
        super::select::cases(),
        super::signal::cases(),
        super::slice::cases(),
        super::softmax::cases(),
        super::state::cases(),
        super::tfidf::cases(),
        super::topk::cases(),
        super::transpose::cases(),
        super::unary::cases(),
        super::variadic::cases(),
        super::view::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

#[test]
fn every_case() {
    // RETUNE_CASES=Slice,Pad checks those operators alone.
    let only = std::env::var("RETUNE_CASES").unwrap_or_default();
    let mut failed = Vec::new();
    for case in all() {
        if only.is_empty() || only.split(',').any(|o| o == case.op_type) {
            // All failures at once: building this test takes minutes.
            let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| check(&case)));
            if checked.is_err() {
                failed.push(case.name);
            }
        }
    }
    assert!(failed.is_empty(), "cases that failed, each with its message above: {failed:?}");
}

/// Operators of convolutional and dense networks: each has a case whose gradient is checked.
const DIFFERENTIABLE: &[&str] = &[
    "Conv",
    "ConvTranspose",
    "Resize",
    "Upsample",
    "LSTM",
    "GRU",
    "RNN",
    "GridSample",
    "AffineGrid",
    "RoiAlign",
    "MaxRoiPool",
    "MaxUnpool",
    "CenterCropPad",
    "Col2Im",
    "DeformConv",
    "BatchNormalization",
    "InstanceNormalization",
    "LRN",
    "Gemm",
    "MatMul",
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Pow",
    "Min",
    "Max",
    "Sum",
    "Mean",
    "Relu",
    "LeakyRelu",
    "PRelu",
    "Elu",
    "Gelu",
    "Sigmoid",
    "Tanh",
    "HardSigmoid",
    "HardSwish",
    "Clip",
    "Erf",
    "Exp",
    "Log",
    "Sqrt",
    "Abs",
    "Neg",
    "Softmax",
    "LogSoftmax",
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "ReduceMean",
    "ReduceSum",
    "ReduceMax",
    "ReduceMin",
    "Reshape",
    "Flatten",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Concat",
    "Split",
    "Slice",
    "Pad",
    "Gather",
    "Cast",
    "Identity",
    "Dropout",
    "Where",
    "Expand",
];

#[test]
fn gradients_are_checked_where_they_are_promised() {
    let cases = all();
    let checked = |t: &str| {
        cases.iter().any(|c| {
            let differentiated = (0..c.operands.len()).any(|i| c.differentiated(i));
            c.op_type == t && !c.forward_only && differentiated
        })
    };
    let missing: Vec<&&str> = DIFFERENTIABLE.iter().filter(|t| !checked(t)).collect();
    assert!(missing.is_empty(), "operators whose gradient no case checks: {missing:?}");
}

#[test]
fn coverage() {
    let cases = all();
    let missing: Vec<&str> = table()
        .filter(|r| !cases.iter().any(|c| c.op_type == r.op_type && c.domain == r.domain))
        .map(|r| r.op_type)
        .collect();
    assert!(missing.is_empty(), "operators without a case: {missing:?}");
}

#[test]
fn sum_to_is_the_transpose_of_broadcasting() {
    let op = crate::ops::reduce::SumTo { dims: Dims::from_slice(&[3, 1]) };
    let x: Vec<f64> = (0..24).map(|i| i as f64).collect();
    let x = Tensor::from_slice(&[2, 3, 4], &x).unwrap();
    let y = crate::ops::eval(&op, &[Some(&x)]).unwrap();
    assert_eq!(y[0].to_f64(), [60.0, 92.0, 124.0]);
}
