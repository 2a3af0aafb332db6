//! The operators: one file a family, with forward, shape inference and gradient side by side,
//! and the table that says which ONNX operators (and opsets) they are.
//!
//! Gradient kernels, losses and optimizer updates are operators like the others; they have no row
//! in the table because no file can name them.

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::error::OpError;
use crate::graph::{GradBuilder, Lowering, Node, ValueId};
use crate::tensor::{DType, Elem, Meta, Tensor, View, ViewMut};

pub mod attention;
pub mod batch_norm;
pub mod binary;
pub mod bits;
mod bytes;
#[cfg(test)]
pub mod cases;
pub mod cast;
pub mod clip;
pub mod composite;
pub mod contrib;
pub mod control;
pub mod conv;
pub mod det;
pub mod distill;
pub mod dropout;
pub mod einsum;
pub mod expand;
pub mod fill;
pub mod fold;
mod foreign;
pub mod gather;
pub mod half;
pub mod join;
pub mod known;
pub mod layout;
pub mod load;
pub mod logic;
pub mod loss;
pub mod mask;
pub mod matmul;
pub mod norm;
pub mod pad;
pub mod part;
pub mod piece;
pub mod pool;
pub mod quant;
pub mod random;
pub mod reduce;
pub mod resize;
pub mod rnn;
pub mod sample;
pub mod scale;
pub mod scan;
pub mod scatter;
pub mod select;
pub mod sequence;
pub mod signal;
pub mod slice;
pub mod softmax;
pub mod state;
mod table;
pub mod tfidf;
pub mod topk;
#[cfg(feature = "tract")]
pub(crate) mod tract;
pub mod transpose;
pub mod unary;
pub mod update;
pub mod variadic;
pub mod view;
pub mod window;

pub use foreign::{Foreign, stand_in};
pub use layout::ChannelsLast;
pub use piece::{Made, Piece};
pub use table::{Row, create, table};

/// Gradients with respect to a node's inputs, in input order; `None` where there is none.
pub type Grads = SmallVec<[Option<ValueId>; 4]>;

/// An operator and its inputs, see [`Op::again`].
pub type Rerun = (Arc<dyn Op>, Vec<Option<ValueId>>);

/// What a kernel call is given beside its operands.
pub struct Cx<'a> {
    /// At least `scratch(…)` bytes, 64-byte aligned, with arbitrary content.
    pub scratch: &'a mut [u8],
    /// Differs from run to run and from pass to pass; the only source of randomness.
    pub seed: u64,
}

impl Cx<'_> {
    /// The first `n` elements of the scratch memory.
    pub fn room<T: Elem>(&mut self, n: usize) -> Result<&mut [T], OpError> {
        let bytes = self.scratch.get_mut(..n * size_of::<T>());
        bytes
            .and_then(|b| bytemuck::try_cast_slice_mut(b).ok())
            .ok_or_else(|| OpError::Internal(format!("no scratch memory for {n} elements")))
    }
}

/// Whether normalisation and dropout behave as in training or as in evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Mode {
    pub training: bool,
    /// In training: normalise by the batch's statistics and update the running ones
    /// (`false`: by the running ones, left as they are).
    pub batch_statistics: bool,
    /// Update the running variance with the unbiased estimate (PyTorch) rather than the population's (ONNX).
    pub unbiased_variance: bool,
    /// The running statistics become the batch's own, whatever they were before.
    pub fresh_statistics: bool,
}

impl Mode {
    pub const EVAL: Mode =
        Mode { training: false, batch_statistics: false, unbiased_variance: true, fresh_statistics: false };
    pub const TRAIN: Mode = Mode { training: true, batch_statistics: true, ..Mode::EVAL };
}

/// An operator with its attributes.
pub trait Op: Any + Debug + Send + Sync {
    /// ONNX's `op_type`, or a name of ours for gradients, losses and updates.
    fn name(&self) -> &'static str;

    /// Element types and shapes of all outputs the operator can have, those that only a gradient reads
    /// included (they follow ONNX's own). A known `value` may be given where it follows from shapes alone.
    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError>;

    /// Computes the outputs that are `Some`; all operands have the shapes that `infer` was given and gave.
    ///
    /// An input is `None` when it is absent, and also when it lies in an output's buffer: see `in_place`
    /// and `updates`.
    fn forward(&self, cx: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError>;

    /// Emits the nodes of the vector-Jacobian product and returns the gradients of those inputs that
    /// `g.wants` asks for.
    fn vjp(&self, g: &mut GradBuilder) -> Result<Grads, OpError>;

    /// Pairs (input, output) of equal size: the planner may give the output the input's buffer. The input
    /// then arrives as `None` and the output's buffer holds its elements. At most one pair is used per call.
    fn in_place(&self) -> &[(usize, usize)] {
        &[]
    }

    /// Pairs (input, output): where the input is persistent state, the output *is* that state's next value,
    /// and the input arrives as `None` in the output's buffer.
    fn updates(&self) -> &[(usize, usize)] {
        &[]
    }

    /// Output 0 is input 0's bytes under another shape: no kernel runs, no memory is taken.
    fn is_view(&self) -> bool {
        false
    }

    /// May this input, of such inputs, come in half precision where `infer` is given f32? It is widened, exactly, as it is read, a small
    /// piece at a time.
    fn reads_half(&self, _inputs: &[Option<&Meta>], _input: usize) -> bool {
        false
    }

    /// Is this operand, of such inputs, rounded to bfloat16 before it is multiplied, as it is or as Winograd's method transforms it?
    /// Then it may come in that type, and little or nothing changes.
    fn rounds(&self, _inputs: &[Option<&Meta>], _input: usize) -> bool {
        false
    }

    /// May this operand, the gradient of what products read or made, come in bfloat16? What the products round is more than what is
    /// lost of the sums here.
    fn takes_rounded(&self, _inputs: &[Option<&Meta>], _input: usize) -> bool {
        false
    }

    /// Does it ask which elements of its operands are equal? Then none of them is rounded.
    fn compares(&self) -> bool {
        false
    }

    /// Is output 0, where it is kept in half precision, read so by everyone, those near by as well? Memory is what its maker and its
    /// readers wait for.
    fn is_kept_rounded(&self) -> bool {
        false
    }

    /// The same operator with this output in this type of half precision. `None` where it cannot.
    fn halved(&self, _output: usize, _to: DType) -> Option<Arc<dyn Op>> {
        None
    }

    /// The same operator with one output more, the last one: output 0 in this type of half precision, rounded while it
    /// is near. `None` where it cannot.
    fn rounding(&self, _to: DType) -> Option<Arc<dyn Op>> {
        None
    }

    /// The same operator with its operands rounded to bfloat16 and multiplied in pairs, which are summed in `f32`: by
    /// instructions that some processors have ([`multiplies_pairs`](crate::kernels::isa::multiplies_pairs)). `None` where there is
    /// no such form.
    fn by_pairs(&self) -> Option<Arc<dyn Op>> {
        None
    }

    /// Bytes of scratch memory that `forward` needs.
    fn scratch(&self, _inputs: &[Option<&Meta>]) -> usize {
        0
    }

    /// May this operand lie at any address, as tensors of a file do?
    fn reads_anywhere(&self, _input: usize) -> bool {
        false
    }

    /// Multiply-adds of matrix products and convolutions; nothing for other operators.
    fn multiply_adds(&self, _inputs: &[Option<&Meta>]) -> usize {
        0
    }

    /// Recomputing the output costs little beside keeping it.
    fn cheap(&self) -> bool {
        false
    }

    /// How output 0 of a node of this operator is computed once more in the same run, where it cannot be by the node as
    /// it is: an operator and its operands, perhaps results of the first time.
    fn again(&self, _: &Node) -> Option<Rerun> {
        None
    }

    /// The same operator for one of `count` equal pieces of its operands, cut along the first axes of some of them: for
    /// operators with one output. `None` where its result is not made of, or the sum of, those of pieces.
    fn in_pieces(&self, _inputs: &[Option<&Meta>], _count: usize) -> Option<Piece> {
        None
    }

    /// The same operator in another mode; `None` where the mode makes no difference.
    fn in_mode(&self, _mode: Mode) -> Option<Arc<dyn Op>> {
        None
    }

    /// The form that works on operands whose channel axis (1) lies last, given their ordinary dimensions;
    /// `None` where there is none. It computes the same elements.
    fn channels_last(&self, _inputs: &[Option<&Meta>], _outputs: &[Option<&Meta>]) -> Option<ChannelsLast> {
        None
    }

    /// The same operator with float64 wherever its attributes say float32, for checks in float64; `None` where they say
    /// nothing.
    fn in_float64(&self) -> Option<Arc<dyn Op>> {
        None
    }

    /// Is it defined by other operators, see `lower`? Then no kernel runs and no gradient is asked for.
    fn is_composite(&self) -> bool {
        false
    }

    /// Emits what the operator is made of, and returns its outputs.
    fn lower(&self, _: &mut Lowering) -> composite::Made {
        Err(OpError::Internal(format!("{} is not made of other operators", self.name())))
    }

    /// What a person should know about how the file's operator was taken.
    fn remark(&self) -> Option<String> {
        None
    }

    /// The `op_type` of the file where it is not `name()`: of an operator without a kernel here.
    fn foreign_type(&self) -> Option<String> {
        None
    }

    /// The output depends on the inputs alone (not on `Cx::seed`), so it may be computed once at plan time.
    fn is_pure(&self) -> bool {
        true
    }
}

impl dyn Op {
    /// The operator as one of type `T`, if it is: for passes that rewrite graphs.
    pub fn as_a<T: Op>(&self) -> Option<&T> {
        (self as &dyn Any).downcast_ref()
    }
}

/// The value of an attribute.
#[derive(Debug, Clone)]
pub enum Attr {
    Int(i64),
    Float(f32),
    Str(String),
    Ints(Vec<i64>),
    Floats(Vec<f32>),
    Strs(Vec<String>),
    Tensor(Arc<Tensor>),
    /// Of a kind that no operator of ours reads (subgraphs, sparse tensors, types); says which.
    Other(&'static str),
}

/// A node's attributes by name.
#[derive(Debug, Clone, Default)]
pub struct Attrs(pub BTreeMap<String, Attr>);

macro_rules! getter {
    ($name:ident, $variant:ident, $t:ty, $what:literal) => {
        /// `None` when absent; an error when it is of another kind.
        pub fn $name(&self, name: &str) -> Result<Option<$t>, OpError> {
            match self.0.get(name) {
                None => Ok(None),
                Some(Attr::$variant(v)) => Ok(Some(v.clone())),
                Some(other) => Err(OpError::Attribute(format!("'{name}' is {other:?}, not {}", $what))),
            }
        }
    };
}

impl Attrs {
    getter!(int, Int, i64, "an integer");
    getter!(float, Float, f32, "a float");
    getter!(string, Str, String, "a string");
    getter!(ints, Ints, Vec<i64>, "a list of integers");
    getter!(floats, Floats, Vec<f32>, "a list of floats");
    getter!(strings, Strs, Vec<String>, "a list of strings");
    getter!(tensor, Tensor, Arc<Tensor>, "a tensor");

    pub fn int_or(&self, name: &str, default: i64) -> Result<i64, OpError> {
        Ok(self.int(name)?.unwrap_or(default))
    }

    pub fn float_or(&self, name: &str, default: f32) -> Result<f32, OpError> {
        Ok(self.float(name)?.unwrap_or(default))
    }

    /// Neither 0 nor 1 is an error: engines do not agree on what it would mean.
    pub fn flag_or(&self, name: &str, default: bool) -> Result<bool, OpError> {
        match self.int(name)? {
            None => Ok(default),
            Some(0) => Ok(false),
            Some(1) => Ok(true),
            Some(other) => Err(OpError::Attribute(format!("'{name}' is {other}, neither 0 nor 1"))),
        }
    }

    pub fn flag(&self, name: &str) -> Result<bool, OpError> {
        self.flag_or(name, false)
    }
}

/// What an operator is constructed from: a node of the file.
#[derive(Debug, Clone)]
pub struct Spec<'a> {
    /// `""` for ONNX's own.
    pub domain: &'a str,
    pub op_type: &'a str,
    /// The version of the operator's domain that the model imports.
    pub opset: i64,
    pub attrs: &'a Attrs,
    /// Declared operands, trailing absent ones included.
    pub inputs: usize,
    pub outputs: usize,
}

/// The operand at `index`, or an error that says it is missing.
pub fn need<T: Copy>(operands: &[Option<T>], index: usize) -> Result<T, OpError> {
    operands.get(index).copied().flatten().ok_or_else(|| OpError::Shape(format!("input {index} is missing")))
}

/// The operand at `index` if there is one.
pub fn get<T: Copy>(operands: &[Option<T>], index: usize) -> Option<T> {
    operands.get(index).copied().flatten()
}

/// The output to write at `index`, or an error.
pub fn out<'a, 'b>(y: &'a mut [Option<ViewMut<'b>>], index: usize) -> Result<&'a mut ViewMut<'b>, OpError> {
    y.get_mut(index)
        .and_then(Option::as_mut)
        .ok_or_else(|| OpError::Internal(format!("output {index} has no buffer")))
}

/// Runs an operator on owned tensors, outside any plan: every output it can have.
pub fn eval(op: &dyn Op, inputs: &[Option<&Tensor>]) -> Result<Vec<Tensor>, OpError> {
    if let Some(control) = op.as_a::<control::Control>() {
        return control.eval(inputs);
    }
    let metas: Vec<Option<Meta>> =
        inputs.iter().map(|t| t.map(|t| Meta { value: Some(Arc::new(t.clone())), ..t.meta() })).collect();
    let refs: Vec<Option<&Meta>> = metas.iter().map(Option::as_ref).collect();
    let outs = op.infer(&refs)?;
    outs.iter().try_for_each(Meta::check_size)?;
    let mut tensors: Vec<Tensor> = outs.iter().map(|m| Tensor::zeros(m.dtype, &m.dims)).collect();
    let mut scratch = crate::tensor::Buffer::zeroed(op.scratch(&refs));
    let x: Vec<Option<View>> = inputs.iter().map(|t| t.map(Tensor::view)).collect();
    if op.is_view() {
        let source = need(&x, 0)?;
        tensors[0].bytes_mut().copy_from_slice(source.bytes);
        return Ok(tensors);
    }
    let mut y: Vec<Option<ViewMut>> = tensors.iter_mut().map(|t| Some(t.view_mut())).collect();
    op.forward(&mut Cx { scratch: scratch.bytes_mut(), seed: 0 }, &x, &mut y)?;
    drop(y);
    Ok(tensors)
}
