//! Are samples of all classes among those that statistics were re-estimated on?

use super::scores::Opinion;

/// Statistics of few samples are rough, and cost a little surety of their own.
const TOLERANCE: f64 = 1.1;

/// Why re-estimated statistics are not to be trusted, if they are not, from the predictions on the same samples with the
/// file's statistics and with the new ones.
///
/// Where only the look of the samples has changed, normalising by their own statistics makes the network surer. Of samples
/// of one class, or of few, it takes away what they have in common, which is what they are told by: the network becomes
/// less sure. Measured in docs/adapt.md.
pub fn labels(original: &Opinion, new: &Opinion) -> Option<String> {
    let (was, is) = (original.health().entropy, new.health().entropy);
    (!new.is_finite() || is > was * TOLERANCE).then(|| {
        format!(
            "with statistics of these samples the network is less sure of them (mean entropy {was:.3}, then {is:.3}), as when \
             they are of few classes"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapt::scores::Scores;
    use crate::tensor::Tensor;

    #[test]
    fn less_sure_is_not_trusted() {
        let of = |logit: f64| {
            let mut o = Opinion::default();
            o.add(&Scores::of(&Tensor::from_slice(&[1, 2], &[logit, 0.0]).unwrap()));
            o
        };
        assert_eq!(labels(&of(1.0), &of(3.0)), None);
        assert!(labels(&of(3.0), &of(1.0)).unwrap().contains("few classes"));
        assert!(labels(&of(3.0), &of(f64::NAN)).is_some());
    }
}
