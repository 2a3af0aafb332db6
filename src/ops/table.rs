//! The operator table: one row an ONNX operator, kept beside its implementation in each family's `ROWS`.

use std::sync::Arc;

use crate::error::OpError;
use crate::ops::{Op, Spec};

/// Makes an operator from a node of the file.
pub type Constructor = fn(&Spec) -> Result<Arc<dyn Op>, OpError>;

/// One operator of the ONNX standard (or of a contrib domain).
pub struct Row {
    pub domain: &'static str,
    pub op_type: &'static str,
    /// Opsets whose definition is implemented, inclusive.
    pub opsets: (i64, i64),
    pub make: Constructor,
}

/// The newest opset whose changes have been looked at.
pub const NEWEST: i64 = 28;

impl Row {
    /// A standard operator, from opset `first` to the newest.
    pub const fn new(op_type: &'static str, first: i64, make: Constructor) -> Row {
        Row { domain: "", op_type, opsets: (first, NEWEST), make }
    }

    /// An operator of onnxruntime's own domain.
    pub const fn contrib(op_type: &'static str, make: Constructor) -> Row {
        Row { domain: "com.microsoft", op_type, opsets: (1, 1), make }
    }
}

/// The rows of every family.
static FAMILIES: &[&[Row]] = &[
    super::attention::ROWS,
    super::batch_norm::ROWS,
    super::binary::ROWS,
    super::bits::ROWS,
    super::cast::ROWS,
    super::clip::ROWS,
    super::contrib::ROWS,
    super::conv::ROWS,
    super::conv::TRANSPOSED_ROWS,
    super::det::ROWS,
    super::dropout::ROWS,
    super::einsum::ROWS,
    super::expand::ROWS,
    super::fill::ROWS,
    super::gather::ROWS,
    super::join::ROWS,
    super::known::ROWS,
    super::logic::ROWS,
    super::loss::ROWS,
    super::matmul::ROWS,
    super::norm::ROWS,
    super::pad::ROWS,
    super::pool::ROWS,
    super::quant::ROWS,
    super::random::ROWS,
    super::reduce::ROWS,
    super::resize::ROWS,
    super::rnn::ROWS,
    super::sample::ROWS,
    super::scale::ROWS,
    super::scan::ROWS,
    super::scatter::ROWS,
    super::select::ROWS,
    super::signal::ROWS,
    super::slice::ROWS,
    super::softmax::ROWS,
    super::state::ROWS,
    super::tfidf::ROWS,
    super::topk::ROWS,
    super::transpose::ROWS,
    super::unary::ROWS,
    super::variadic::ROWS,
    super::view::ROWS,
];

/// Every operator that has a kernel here.
pub fn table() -> impl Iterator<Item = &'static Row> {
    FAMILIES.iter().copied().flatten()
}

/// The operator of a node, or why there is none.
pub fn create(spec: &Spec) -> Result<Arc<dyn Op>, OpError> {
    let domain = if spec.domain == "ai.onnx" { "" } else { spec.domain };
    let Some(row) = table().find(|r| r.domain == domain && r.op_type == spec.op_type) else {
        let full =
            if domain.is_empty() { spec.op_type.to_string() } else { format!("{domain}.{}", spec.op_type) };
        return Err(OpError::Unsupported(format!("operator {full}")));
    };
    let (first, last) = row.opsets;
    if domain.is_empty() && !(first..=last).contains(&spec.opset) {
        return Err(OpError::Unsupported(format!(
            "operator {} of opset {} (supported: {first} to {last})",
            spec.op_type, spec.opset
        )));
    }
    (row.make)(spec)
}
