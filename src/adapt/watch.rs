//! The guard of an adaptation: without labels, is the network still one to trust, or has it collapsed?

use serde::Serialize;

use crate::exec::{Purpose, Session};
use crate::graph::StateId;

use super::config::Config;
use super::scores::{Health, Opinion};

/// Weights and running statistics at one time.
#[derive(Debug, Clone)]
pub struct Snapshot(Vec<(StateId, Vec<u8>)>);

impl Snapshot {
    pub fn take(session: &Session) -> Snapshot {
        let store = session.store();
        let kept = |id: &StateId| matches!(store.purpose(*id), Purpose::Parameter | Purpose::Statistic);
        Snapshot(store.ids().filter(kept).map(|id| (id, store.view(id).bytes.to_vec())).collect())
    }

    /// Whether weights differ from those of another time, and whether statistics do.
    pub fn changed(&self, other: &Snapshot, session: &Session) -> (bool, bool) {
        let differs = |purpose: Purpose| {
            let of = |s: &Snapshot| -> Vec<(StateId, Vec<u8>)> {
                s.0.iter().filter(|(id, _)| session.store().purpose(*id) == purpose).cloned().collect()
            };
            of(self) != of(other)
        };
        (differs(Purpose::Parameter), differs(Purpose::Statistic))
    }

    /// Puts everything back.
    pub fn restore_values(&self, session: &mut Session) {
        let store = session.store_mut();
        self.0.iter().for_each(|(id, bytes)| store.set(*id, bytes));
    }

    /// Puts everything back, and what the optimizer remembers to zero.
    pub fn restore(&self, session: &mut Session) {
        self.restore_values(session);
        let store = session.store_mut();
        let ids: Vec<StateId> = store.ids().filter(|id| store.purpose(*id) == Purpose::Optimizer).collect();
        ids.into_iter().for_each(|id| store.zero(id));
    }
}

/// One look at the network, as the summary has it.
#[derive(Debug, Clone, Serialize)]
pub struct Look {
    pub step: usize,
    #[serde(flatten)]
    pub health: Health,
    /// Share of predictions that are those with re-estimated statistics alone.
    pub agreement: f64,
    /// What predictions that differ from those cost, by those's own probabilities.
    pub lost: f64,
    /// The same on the reference set, with the source's statistics, beside the original's.
    pub reference: Option<f64>,
    /// What is wrong, if anything is.
    pub collapsed: Option<String>,
}

/// Why predictions on the same samples look collapsed, beside those of the network that nothing but statistics were
/// re-estimated of.
///
/// Predictions may change, where the network was unsure: what they lose of the probability that they had is bounded by what
/// the network expects of itself. 1 − mean confidence of its predictions should be wrong; where that is little, few should
/// change and each of them lose little: the bound is its square, times `drift` and
/// `trust` (1, less after a collapse). `reference`: what predictions on the
/// reference set lost, and the confidence there before.
pub fn collapsed(
    config: &Config,
    trust: f64,
    base: &Opinion,
    now: &Opinion,
    reference: Option<(f64, f64)>,
) -> Option<String> {
    if !now.is_finite() {
        return Some("predictions are not finite".into());
    }
    let (was, is) = (base.health(), now.health());
    if is.classes < was.classes * (1.0 - config.balance) {
        return Some(format!(
            "predictions spread over {:.1} classes where it were {:.1} (--balance)",
            is.classes, was.classes
        ));
    }
    if is.entropy < was.entropy * config.entropy_floor {
        return Some(format!(
            "mean entropy fell from {:.3} to {:.4} (--entropy-floor)",
            was.entropy, is.entropy
        ));
    }
    if is.entropy > was.entropy * config.entropy_ceiling + 0.05 {
        return Some(format!(
            "mean entropy rose from {:.3} to {:.3} (--entropy-ceiling)",
            was.entropy, is.entropy
        ));
    }
    let most = |confidence: f64| (trust * config.drift * (1.0 - confidence).powi(2)).max(LEAST_LOST);
    let too_much = |lost: f64, most: f64, on: &str| {
        let (lost, most) = (100.0 * lost, 100.0 * most);
        format!(
            "predictions{on} that changed cost {lost:.1}% of accuracy by what was expected before, {most:.1}% may be (--drift)"
        )
    };
    let (lost, may) = (base.lost_by(now), most(was.confidence));
    if lost > may {
        return Some(too_much(lost, may, ""));
    }
    match reference {
        Some((lost, confidence)) if lost > most(confidence) => {
            Some(too_much(lost, most(confidence), " on the reference set"))
        }
        _ => None,
    }
}

/// So much may be lost however sure the network is.
const LEAST_LOST: f64 = 0.002;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapt::scores::Scores;
    use crate::tensor::Tensor;

    /// An opinion on one sample for each class given, predicted with the given logit.
    fn opinion(classes: &[usize], logit: f64) -> Opinion {
        let mut flat = vec![0.0; classes.len() * 4];
        classes.iter().enumerate().for_each(|(i, c)| flat[i * 4 + c] = logit);
        let mut o = Opinion::default();
        o.add(&Scores::of(&Tensor::from_slice(&[classes.len(), 4], &flat).unwrap()));
        o
    }

    #[test]
    fn each_kind_of_collapse_is_named() {
        let config = Config::default();
        let base = opinion(&[0, 1, 2, 3, 0, 1, 2, 3], 4.0);
        let look = |now: &Opinion, r: Option<(f64, f64)>| collapsed(&config, 1.0, &base, now, r);
        assert_eq!(look(&base, None), None);
        assert_eq!(look(&base, Some((0.001, 1.0))), None);
        assert!(look(&opinion(&[0; 8], 4.0), None).unwrap().contains("--balance"));
        assert!(look(&opinion(&[0, 1, 2, 3, 0, 1, 2, 3], 40.0), None).unwrap().contains("--entropy-floor"));
        assert!(look(&opinion(&[0, 1, 2, 3, 0, 1, 2, 3], 0.1), None).unwrap().contains("--entropy-ceiling"));
        assert!(look(&opinion(&[1, 2, 3, 0, 1, 2, 3, 0], 4.0), None).unwrap().contains("--drift"));
        assert!(look(&base, Some((0.1, 0.99))).unwrap().contains("reference"));
        assert!(look(&opinion(&[0; 8], f64::NAN), None).unwrap().contains("finite"));
    }
}
