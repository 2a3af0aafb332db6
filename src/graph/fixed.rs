//! Inputs with a value of their own: nobody feeds them, and they are the same at every run.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::graph::{Dim, Graph, ValueId};
use crate::tensor::{Dims, Tensor};

/// Elements that one number may fill.
const MOST_FILLED: usize = 1 << 28;

impl Graph {
    /// Gives input `v` a value. A scalar for an input of higher rank fills its declared shape, whose open dimensions are those of
    /// the inputs that are fed: of one with the same symbol, else the batch.
    pub fn fix(&mut self, v: ValueId, value: Tensor) {
        self.inputs.retain(|i| *i != v);
        self.fixed.retain(|(f, _)| *f != v);
        self.fixed.push((v, Arc::new(value)));
    }

    /// The values of the fixed inputs, where the shapes of all others are known.
    pub fn fixed_values(&self) -> Result<Vec<(ValueId, Arc<Tensor>)>> {
        self.fixed.iter().map(|(v, t)| Ok((*v, self.filled(*v, t)?))).collect()
    }

    fn filled(&self, v: ValueId, value: &Arc<Tensor>) -> Result<Arc<Tensor>> {
        let declared = self.value(v).declared.as_ref().and_then(|d| d.dims.as_ref());
        let Some(declared) = declared.filter(|d| value.dims().is_empty() && !d.is_empty()) else {
            return Ok(value.clone());
        };
        let dims: Option<Dims> = declared.iter().map(|d| self.extent(d)).collect();
        let fail = |what: String| Error::value(&self.value(v).name, what);
        let dims = dims.ok_or_else(|| {
            fail(
                "has open dimensions that no other input tells: give it as an array of its whole shape"
                    .into(),
            )
        })?;
        let len = dims.iter().try_fold(1usize, |n, d| n.checked_mul(*d)).filter(|n| *n <= MOST_FILLED);
        let len = len.ok_or_else(|| {
            fail(format!("{:?} is too large to be filled with one number", dims.as_slice()))
        })?;
        let filled = Tensor::from_bytes(value.dtype(), &dims, &value.bytes().repeat(len));
        filled.map(Arc::new).map_err(|e| fail(e.to_string()))
    }

    fn extent(&self, d: &Dim) -> Option<usize> {
        if let Dim::Fixed(n) = d {
            return Some(*n);
        }
        let bound = |v: &ValueId| Some(&self.value(*v).meta.as_ref()?.dims);
        let same = self.inputs.iter().find_map(|v| {
            let dims = self.value(*v).declared.as_ref()?.dims.as_ref()?;
            let at = dims.iter().position(|other| other == d && matches!(d, Dim::Symbol(_)))?;
            bound(v)?.get(at).copied()
        });
        same.or_else(|| self.inputs.iter().find_map(|v| bound(v)?.first().copied()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::{Declared, Source};
    use crate::tensor::{DType, Meta};

    fn graph(state: Option<Vec<Dim>>) -> (Graph, ValueId) {
        let mut g = Graph::default();
        let x = g.add_input("x", Meta::new(DType::F32, &[4, 7]));
        let dims = Some(vec![Dim::Symbol("n".into()), Dim::Symbol("t".into())]);
        g.value_mut(x).declared = Some(Declared { dtype: DType::F32, dims });
        let s = g.add_value("state", Source::Input);
        g.value_mut(s).declared = Some(Declared { dtype: DType::F32, dims: state });
        g.inputs.push(s);
        (g, s)
    }

    #[test]
    fn one_number_fills_the_declared_shape() {
        let dims = |state: Vec<Dim>| {
            let (mut g, s) = graph(Some(state));
            g.fix(s, Tensor::scalar(1.5f32));
            assert_eq!(g.inputs.len(), 1);
            let t = g.fixed_values().unwrap().remove(0).1;
            assert!(t.get::<f32>().unwrap().iter().all(|x| *x == 1.5));
            t.dims().to_vec()
        };
        assert_eq!(dims(vec![]), [0usize; 0]);
        assert_eq!(dims(vec![Dim::Fixed(2), Dim::Unknown, Dim::Fixed(3)]), [2, 4, 3]);
        assert_eq!(dims(vec![Dim::Symbol("t".into()), Dim::Symbol("n".into())]), [7, 4]);
    }

    #[test]
    fn whole_arrays_are_taken_as_they_are_and_huge_shapes_refused() {
        let (mut g, s) = graph(None);
        g.fix(s, Tensor::zeros(DType::F32, &[2, 2]));
        assert_eq!(g.fixed_values().unwrap()[0].1.dims(), [2, 2]);
        let (mut g, s) = graph(Some(vec![Dim::Fixed(usize::MAX), Dim::Fixed(9)]));
        g.fix(s, Tensor::scalar(0f32));
        assert!(g.fixed_values().unwrap_err().to_string().contains("too large"));
    }
}
