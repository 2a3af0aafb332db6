//! Weights that the file has as integers, which a `DequantizeLinear` makes floats of.

use std::collections::HashMap;

use super::{Builder, captured, is_standard};
use crate::error::{Error, Result};
use crate::import::attrs::{self, attrs};
use crate::import::proto::{EXTERNAL, GraphProto, TensorProto};
use crate::import::weights::{Encoding, Location, Quantised, byte_size, dims_of};
use crate::ops::quant::Layout;
use crate::tensor::{DType, Meta};

/// Integer initializers that one `DequantizeLinear` reads and nothing else, and that can be overwritten in place.
pub(super) fn weights(proto: &GraphProto) -> HashMap<&str, usize> {
    let mut readers: HashMap<&str, usize> = HashMap::new();
    let outputs = proto.output.iter().map(|o| o.name.as_str());
    let read = proto.node.iter().flat_map(|n| n.input.iter().map(String::as_str).chain(captured(n)));
    read.chain(outputs).for_each(|name| *readers.entry(name).or_insert(0) += 1);
    let stored: HashMap<&str, &TensorProto> =
        proto.initializer.iter().map(|t| (t.name.as_str(), t)).collect();
    let in_place = |t: &TensorProto| {
        let levels = [DType::I8, DType::U8, DType::I16, DType::U16, DType::I32].map(DType::to_onnx);
        levels.contains(&t.data_type) && (t.raw_data.is_some() || t.data_location == EXTERNAL)
    };
    let mut found = HashMap::new();
    for (i, n) in proto.node.iter().enumerate() {
        let [x, params @ ..] = &n.input[..] else { continue };
        let alone = readers.get(x.as_str()) == Some(&1);
        let known = params.iter().all(|p| p.is_empty() || stored.contains_key(p.as_str()));
        let standard = is_standard(&n.domain) && n.op_type == "DequantizeLinear";
        if standard && alone && known && stored.get(x.as_str()).is_some_and(|t| in_place(t)) {
            found.insert(x.as_str(), i);
        }
    }
    found
}

impl<'a> Builder<'a> {
    /// How `DequantizeLinear` node `index` reads the integers of a weight; `None` where that is not to be understood.
    pub(super) fn levels(&mut self, index: usize) -> Option<Quantised> {
        let n = &self.proto.node[index];
        let layout = Layout::of(&attrs(self.files, n).ok()?).ok()?;
        let mut operand = |slot: usize| {
            let name = n.input.get(slot).filter(|name| !name.is_empty())?;
            let t = self.proto.initializer.iter().find(|t| t.name == *name)?;
            attrs::tensor(self.files, t, DType::from_onnx(t.data_type)?).ok()
        };
        let (levels, scale, zero) = (operand(0)?, operand(1)?, operand(2));
        let given = n.input.get(2).is_some_and(|name| !name.is_empty());
        let zero_fits =
            zero.as_ref().map_or(!given, |z| z.dtype() == levels.dtype() && z.len() == scale.len());
        let fits = scale.dtype() == DType::F32
            && zero_fits
            && layout.spread(levels.dims(), scale.dims()).is_ok()
            && scale.to_f64().iter().all(|s| s.is_finite() && *s != 0.0);
        fits.then_some(Quantised { layout, scale, zero })
    }

    /// A weight that the file has as integers.
    pub(super) fn quantised_weight(&mut self, t: &'a TensorProto, levels: Quantised) -> Result<()> {
        let fail = |e: String| Error::value(&t.name, e);
        let dtype = DType::from_onnx(t.data_type).ok_or_else(|| fail("an unknown element type".into()))?;
        let dims = dims_of(&t.dims).map_err(fail)?;
        let location = if t.data_location == EXTERNAL {
            let at = self.files.external(t)?;
            let size = byte_size(dtype, &dims).map_err(fail)?;
            let len = at.len.unwrap_or(size);
            Location { file: at.file, offset: at.offset, len, encoding: Encoding::Raw }
        } else {
            let raw = t.raw_data.as_slice();
            Location::of_chunks(self.files.model(), raw, Encoding::Raw).map_err(fail)?
        };
        let id = self.weight(&t.name, dtype, dims, location)?;
        let weight = &mut self.weights[id.index()];
        let meta = Meta::new(levels.scale.dtype(), &weight.dims);
        weight.quantised = Some(levels);
        self.graph.value_mut(weight.value).meta = Some(meta);
        Ok(())
    }
}
