//! Which parameters train, and how.

use crate::error::{Error, Result};
use crate::graph::{NodeId, WeightId};
use crate::import::{Model, Role};
use crate::train::preset::Budget;

/// A choice of parameters: `all`, `head`, `last:N`, `bias`, `norm`, `lora:R` (with `@` and globs: of these layers),
/// `sparse:BUDGET`, or globs over names, several joined by commas. Choices joined by `+` add up.
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
    /// Low-rank additions to dense layers and 1×1 convolutions: to all, or to those of which the weight's, the node's or
    /// the output's name matches one of the patterns.
    Lora { rank: usize, layers: Vec<glob::Pattern> },
    /// Biases of the last layers and weights of some channels, by what they contribute within a budget.
    Sparse(Budget),
    /// Any of several name patterns (`*`, `?`, `[…]`), but for those of patterns after a `!`; only such: all others.
    Globs(Vec<glob::Pattern>),
    /// All of these.
    Several(Vec<Select>),
}

fn patterns(s: &str) -> std::result::Result<Vec<glob::Pattern>, String> {
    s.split(',').map(|p| glob::Pattern::new(p.trim()).map_err(|e| format!("'{p}': {e}"))).collect()
}

impl std::str::FromStr for Select {
    type Err = String;

    fn from_str(s: &str) -> std::result::Result<Self, String> {
        if s.contains('+') {
            return Ok(Select::Several(
                s.split('+').map(|s| s.trim().parse()).collect::<std::result::Result<_, _>>()?,
            ));
        }
        Ok(match s {
            "all" => Select::All,
            "head" => Select::Head,
            "bias" => Select::Bias,
            "norm" => Select::Norm,
            _ => match s.split_once(':') {
                Some(("last", n)) => match n.parse() {
                    Ok(n) if n > 0 => Select::Last(n),
                    _ => return Err(format!("'{s}': last:N takes a number of layers from 1")),
                },
                Some(("lora", rest)) => {
                    let (rank, layers) = match rest.split_once('@') {
                        Some((rank, globs)) => (rank, patterns(globs)?),
                        None => (rest, Vec::new()),
                    };
                    match rank.parse() {
                        Ok(rank) if rank > 0 => Select::Lora { rank, layers },
                        _ => {
                            return Err(format!(
                                "'{s}': lora:R takes a rank from 1, then perhaps @ and globs of layers"
                            ));
                        }
                    }
                }
                Some(("sparse", budget)) => Select::Sparse(budget.parse()?),
                _ => Select::Globs(patterns(s)?),
            },
        })
    }
}

impl Select {
    /// The parameters chosen that train as a whole, in the file's order; of `lora:R` and
    /// `sparse:BUDGET`, which depend on more than the model, there are none. Fails when there are
    /// none of the kind asked for, and when a pattern matches none.
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
            Select::Lora { .. } | Select::Sparse(_) => return Ok(Vec::new()),
            Select::Several(all) => {
                let chosen = all.iter().map(|s| s.resolve(model)).collect::<Result<Vec<_>>>()?.concat();
                return Ok(ids().filter(|w| chosen.contains(w)).collect());
            }
            Select::Globs(patterns) => {
                let out = |p: &&glob::Pattern| p.as_str().starts_with('!');
                let (out, patterns): (Vec<_>, Vec<_>) = patterns.iter().partition(out);
                let out: Vec<glob::Pattern> =
                    out.iter().filter_map(|p| glob::Pattern::new(&p.as_str()[1..]).ok()).collect();
                for p in patterns.iter().copied().chain(&out) {
                    if !ids().any(|w| p.matches(&model.weight(w).name)) {
                        return Err(Error::Config(format!(
                            "no parameter's name matches '{p}'; `retune inspect` lists them"
                        )));
                    }
                }
                let statistics: Vec<WeightId> = model.running_statistics().collect();
                let chosen = |w: &WeightId| match patterns.is_empty() {
                    true => model.weight(*w).trainable,
                    false => {
                        patterns.iter().any(|p| p.matches(&model.weight(*w).name)) && !statistics.contains(w)
                    }
                };
                let left_out = |w: &WeightId| out.iter().any(|p| p.matches(&model.weight(*w).name));
                ids().filter(|w| chosen(w) && !left_out(w)).collect()
            }
        };
        if chosen.is_empty() {
            return Err(Error::Config(
                "the model has no parameter of the kind asked for; `retune inspect` lists what it has".into(),
            ));
        }
        Ok(chosen)
    }

    /// What it is made of.
    pub fn terms(&self) -> &[Select] {
        match self {
            Select::Several(all) => all,
            one => std::slice::from_ref(one),
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(select: &str) -> Result<Vec<String>> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/models/resnet20.onnx");
        let model = crate::import::load(path)?;
        let select: Select = select.parse().map_err(Error::Config)?;
        Ok(select.resolve(&model)?.iter().map(|w| model.weight(*w).name.clone()).collect())
    }

    #[test]
    fn presets_choose_what_they_say() {
        assert_eq!(chosen("all").unwrap().len(), 65);
        assert_eq!(chosen("head").unwrap(), ["fc.weight", "fc.bias"]);
        let last = chosen("last:2").unwrap();
        assert!(last.contains(&"layer3.2.conv2.weight".to_string()), "{last:?}");
        assert!(last.contains(&"layer3.2.bn2.weight".to_string()), "{last:?}");
        assert!(!last.contains(&"layer3.2.conv1.weight".to_string()), "{last:?}");
        assert!(chosen("norm").unwrap().iter().all(|n| n.contains("bn") || n.contains("downsample.1")));
        assert_eq!(chosen("norm").unwrap().len(), 42);
        assert_eq!(chosen("bias").unwrap().len(), 22);
    }

    #[test]
    fn patterns_choose_by_name_and_must_match() {
        assert_eq!(chosen("fc.*").unwrap().len(), 2);
        assert_eq!(chosen("conv1.weight, fc.bias").unwrap(), ["conv1.weight", "fc.bias"]);
        // Statistics are not parameters.
        assert!(chosen("bn1.*").unwrap().iter().all(|n| !n.contains("running")));
        let rest = chosen("!fc.weight,!conv1.*").unwrap();
        assert!(rest.len() == 63 && !rest.contains(&"fc.weight".to_string()), "{rest:?}");
        assert_eq!(chosen("fc.*,!*.bias").unwrap(), ["fc.weight"]);
        assert!(chosen("!nothing").unwrap_err().to_string().contains("nothing"));
        assert!(chosen("nothing*").unwrap_err().to_string().contains("nothing*"));
        assert!(chosen("last:0").is_err());
        assert!(chosen("[").is_err());
    }

    #[test]
    fn choices_add_up() {
        let both = chosen("bias+last:2").unwrap();
        assert!(both.len() > chosen("bias").unwrap().len() && both.contains(&"fc.weight".to_string()));
        assert_eq!(chosen("head + norm").unwrap().len(), 44);
        assert_eq!(chosen("lora:4+head").unwrap(), ["fc.weight", "fc.bias"]);
        let lora: Select = "lora:8@*attn*,fc?".parse().unwrap();
        assert!(matches!(&lora, Select::Lora { rank: 8, layers } if layers.len() == 2), "{lora:?}");
        for bad in ["lora:0", "lora:x", "lora:", "lora:4@[", "sparse:", "sparse:x", "bias+last:0"] {
            assert!(bad.parse::<Select>().is_err(), "{bad}");
        }
        assert!(chosen("bias+nothing*").is_err());
    }
}
