//! Which parameters train.

use crate::error::{Error, Result};
use crate::graph::{NodeId, WeightId};
use crate::import::{Model, Role};

/// A choice of parameters: `all`, `head`, `last:N`, `bias`, `norm`, or globs over names, several joined by
/// commas.
#[derive(Debug, Clone, PartialEq)]
pub enum Select {
    /// Every parameter that trains by default.
    All,
    /// The last layer with a weight.
    Head,
    /// The last N layers with a weight, each with its bias and the normalisation that follows.
    Last(usize),
    /// Biases and normalisation shifts.
    Bias,
    /// Scales and shifts of normalisations.
    Norm,
    /// Any of several name patterns (`*`, `?`, `[…]`).
    Globs(Vec<glob::Pattern>),
}

impl std::str::FromStr for Select {
    type Err = String;

    fn from_str(s: &str) -> std::result::Result<Self, String> {
        Ok(match s {
            "all" => Select::All,
            "head" => Select::Head,
            "bias" => Select::Bias,
            "norm" => Select::Norm,
            _ => match s.strip_prefix("last:") {
                Some(n) => match n.parse() {
                    Ok(n) if n > 0 => Select::Last(n),
                    _ => return Err(format!("'{s}': last:N takes a number of layers from 1")),
                },
                None => {
                    let pattern = |p: &str| glob::Pattern::new(p.trim()).map_err(|e| format!("'{p}': {e}"));
                    Select::Globs(s.split(',').map(pattern).collect::<std::result::Result<_, _>>()?)
                }
            },
        })
    }
}

impl Select {
    /// The parameters chosen, in the file's order. Fails when there are none, and when a pattern matches none.
    pub fn resolve(&self, model: &Model) -> Result<Vec<WeightId>> {
        let ids = || (0..model.weights.len() as u32).map(WeightId);
        let trainable = || ids().filter(|w| model.weight(*w).trainable);
        let role = |roles: &[Role]| trainable().filter(|w| roles.contains(&model.weight(*w).role)).collect();
        let chosen: Vec<WeightId> = match self {
            Select::All => trainable().collect(),
            Select::Head => last_layers(model, 1),
            Select::Last(n) => last_layers(model, *n),
            Select::Bias => role(&[Role::Bias, Role::Shift]),
            Select::Norm => role(&[Role::Scale, Role::Shift]),
            Select::Globs(patterns) => {
                for p in patterns {
                    if !ids().any(|w| p.matches(&model.weight(w).name)) {
                        return Err(Error::Config(format!(
                            "no parameter's name matches '{p}'; `retune inspect` lists them"
                        )));
                    }
                }
                let statistic =
                    |w: &WeightId| matches!(model.weight(*w).role, Role::RunningMean | Role::RunningVar);
                ids()
                    .filter(|w| patterns.iter().any(|p| p.matches(&model.weight(*w).name)) && !statistic(w))
                    .collect()
            }
        };
        if chosen.is_empty() {
            return Err(Error::Config(
                "the model has no parameter of the kind asked for; `retune inspect` lists what it has".into(),
            ));
        }
        Ok(chosen)
    }
}

/// Parameters of the last `n` layers. A layer begins at a node that uses a weight (or an embedding); biases,
/// scales and shifts belong to the layer before them.
fn last_layers(model: &Model, n: usize) -> Vec<WeightId> {
    let first_use = |w: WeightId| model.weight(w).uses.iter().map(|u| u.node).min();
    let mut heads: Vec<NodeId> = (0..model.weights.len() as u32)
        .map(WeightId)
        .filter(|w| {
            let w = model.weight(*w);
            w.trainable && matches!(w.role, Role::Weight | Role::Embedding) && w.dims.len() > 1
        })
        .filter_map(first_use)
        .collect();
    heads.sort();
    heads.dedup();
    let Some(from) = heads.len().checked_sub(n).map(|i| heads[i]).or(heads.first().copied()) else {
        return Vec::new();
    };
    (0..model.weights.len() as u32)
        .map(WeightId)
        .filter(|w| model.weight(*w).trainable && first_use(*w).is_some_and(|node| node >= from))
        .collect()
}
