//! `TfIdfVectorizer`: how often known n-grams of integers occur.

use std::collections::HashMap;
use std::sync::Arc;

use crate::error::OpError;
use crate::graph::GradBuilder;
use crate::ops::{Cx, Grads, Op, Row, Spec, need, out};
use crate::tensor::{DType, Dims, Meta, View, ViewMut};

/// ONNX `TfIdfVectorizer` (opset 9) of integers: X (C) or (N, C), int32 or int64, to float32 (places) or (N, places), for
/// each known n-gram its count, its weight where it occurs, or both multiplied. The members of an n-gram lie next to each
/// other, or up to `max_skip_count` elements apart.
#[derive(Debug)]
struct TfIdf {
    /// Lengths of the n-grams that count, and their largest gaps.
    grams: (usize, usize),
    skips: usize,
    /// The place and the weight of each n-gram.
    pool: HashMap<Vec<i64>, (usize, f32)>,
    places: usize,
    mode: Mode,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Tf,
    Idf,
    TfIdf,
}

impl TfIdf {
    fn make(s: &Spec) -> Result<Arc<dyn Op>, OpError> {
        let bad = OpError::Attribute;
        if s.attrs.strings("pool_strings")?.is_some_and(|p| !p.is_empty()) {
            return Err(OpError::Unsupported("TfIdfVectorizer of strings".into()));
        }
        let count = |name: &str| -> Result<usize, OpError> {
            let n = s.attrs.int_or(name, 0)?;
            usize::try_from(n).map_err(|_| bad(format!("'{name}' is {n}")))
        };
        let indices = |name: &str| -> Result<Vec<usize>, OpError> {
            let all = s.attrs.ints(name)?.unwrap_or_default();
            let found: Result<Vec<usize>, _> = all.iter().map(|i| usize::try_from(*i)).collect();
            found.map_err(|_| bad(format!("'{name}' has negative entries")))
        };
        let (least, most) = (count("min_gram_length")?, count("max_gram_length")?);
        if least == 0 || most < least {
            return Err(bad(format!("n-grams of {least} to {most} elements")));
        }
        let mode = match s.attrs.string("mode")?.as_deref() {
            Some("TF") => Mode::Tf,
            Some("IDF") => Mode::Idf,
            Some("TFIDF") => Mode::TfIdf,
            other => return Err(bad(format!("'mode' is {}", other.unwrap_or("missing")))),
        };
        let (starts, places) = (indices("ngram_counts")?, indices("ngram_indexes")?);
        let flat = s.attrs.ints("pool_int64s")?.unwrap_or_default();
        let weights = s.attrs.floats("weights")?.filter(|w| !w.is_empty());
        if weights.as_ref().is_some_and(|w| w.len() != places.len()) {
            return Err(bad("'weights' are not one for each of 'ngram_indexes'".into()));
        }
        let mut pool = HashMap::new();
        for (k, &from) in starts.iter().enumerate() {
            let to = starts.get(k + 1).copied().unwrap_or(flat.len());
            let part = flat.get(from..to).filter(|p| p.len() % (k + 1) == 0);
            let part =
                part.ok_or_else(|| bad(format!("'ngram_counts' are {starts:?} of {} elements", flat.len())))?;
            for gram in part.chunks_exact(k + 1) {
                let id = pool.len();
                let place = places.get(id).copied();
                let place = place.ok_or_else(|| bad("'ngram_indexes' are fewer than the n-grams".into()))?;
                let weight = weights.as_ref().map_or(1.0, |w| w[id]);
                if pool.insert(gram.to_vec(), (place, weight)).is_some() {
                    return Err(bad(format!("the n-gram {gram:?} is in the pool twice")));
                }
            }
        }
        let width = places.iter().max().map_or(0, |m| m + 1);
        Ok(Arc::new(TfIdf {
            grams: (least, most),
            skips: count("max_skip_count")?,
            pool,
            places: width,
            mode,
        }))
    }

    fn row(&self, x: &[i64], y: &mut [f32]) {
        y.fill(0.0);
        let most = self.grams.1.min(x.len());
        let mut gram = Vec::with_capacity(most);
        for n in self.grams.0..=most {
            // One element has no gaps; wider ones do not fit.
            let gaps = if n == 1 { 0 } else { self.skips.min(x.len() / (n - 1)) };
            for apart in 1..=gaps + 1 {
                for start in 0..x.len().saturating_sub((n - 1).saturating_mul(apart)) {
                    gram.clear();
                    gram.extend((0..n).map(|k| x[start + k * apart]));
                    if let Some(&(place, weight)) = self.pool.get(&gram) {
                        match self.mode {
                            Mode::Tf => y[place] += 1.0,
                            Mode::Idf => y[place] = weight,
                            Mode::TfIdf => y[place] += weight,
                        }
                    }
                }
            }
        }
    }
}

impl Op for TfIdf {
    fn name(&self) -> &'static str {
        "TfIdfVectorizer"
    }

    fn infer(&self, inputs: &[Option<&Meta>]) -> Result<Vec<Meta>, OpError> {
        let x = need(inputs, 0)?;
        if !matches!(x.dtype, DType::I32 | DType::I64) {
            return Err(OpError::Type(format!("TfIdfVectorizer of {}", x.dtype)));
        }
        let Some((_, rows)) = x.dims.split_last().filter(|(_, rows)| rows.len() <= 1) else {
            return Err(OpError::Shape(format!("TfIdfVectorizer of {:?}: (C) or (N, C) is needed", x.dims)));
        };
        let mut dims = Dims::from_slice(rows);
        dims.push(self.places);
        Ok(vec![Meta::new(DType::F32, &dims)])
    }

    fn forward(&self, _: &mut Cx, x: &[Option<View>], y: &mut [Option<ViewMut>]) -> Result<(), OpError> {
        let (x, y) = (need(x, 0)?, out(y, 0)?);
        let width = x.dims.last().copied().unwrap_or(1);
        let all = x.to_tensor().to_ints()?;
        let rows = y.get::<f32>()?.chunks_exact_mut(self.places.max(1));
        for (i, y) in rows.enumerate() {
            self.row(&all[i * width..(i + 1) * width], y);
        }
        Ok(())
    }

    fn vjp(&self, _: &mut GradBuilder) -> Result<Grads, OpError> {
        Err(OpError::NotDifferentiable("it counts integers".into()))
    }
}

pub(super) const ROWS: &[Row] = &[Row::new("TfIdfVectorizer", 9, TfIdf::make)];

#[cfg(test)]
pub(super) fn cases() -> Vec<super::cases::Case> {
    use super::cases::Case;
    use crate::ops::Attr;
    use crate::tensor::Tensor;
    let x = Tensor::ints(&[1, 5, 2, 2, 5, 7, 1, 5]).reshaped(&[2, 4]).unwrap();
    let case = |mode: &str, skips: i64| {
        Case::new("TfIdfVectorizer", 9)
            .named(mode)
            .string("mode", mode)
            .int("min_gram_length", 1)
            .int("max_gram_length", 2)
            .int("max_skip_count", skips)
            .ints("ngram_counts", &[0, 2])
            .ints("ngram_indexes", &[3, 0, 1, 2])
            .ints("pool_int64s", &[5, 2, 1, 5, 2, 2])
            .attr("weights", Attr::Floats(vec![0.5, 2.0, 0.25, 3.0]))
            .fixed(x.clone())
            .forward_only()
    };
    vec![case("TF", 0), case("IDF", 1), case("TFIDF", 2)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::eval;
    use crate::tensor::Tensor;

    #[test]
    fn unigrams_and_bigrams_are_counted() {
        let x = Tensor::ints(&[1, 5, 2, 2, 5, 7, 1, 5]).reshaped(&[2, 4]).unwrap();
        let counted: Vec<Vec<f64>> =
            cases().iter().map(|c| eval(c.make().as_ref(), &[Some(&x)]).unwrap()[0].to_f64()).collect();
        // Places: 2, (1 5), (2 2), 5. Elements 5 and 2 once and twice, then 5 twice.
        assert_eq!(counted[0], [2.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 2.0]);
        assert_eq!(counted[1], [2.0, 0.25, 3.0, 0.5, 0.0, 0.25, 0.0, 0.5]);
        // With gaps no further pair is known: 1 _ 2, 5 _ 2, 5 _ 1, 7 _ 5, 1 _ _ 2, 5 _ _ 5.
        assert_eq!(counted[2], [4.0, 0.25, 3.0, 0.5, 0.0, 0.25, 0.0, 1.0]);
    }
}
