//! Cross-validation: every sample is held out once.

use std::collections::BTreeMap;

use crate::error::{Error, Result};

use super::split::{Purpose, Split, rng, shuffle};

/// `k` splits of `n` samples, chosen by `seed`; each sample is held out in exactly one of them. With one label a sample,
/// each class is spread over them evenly.
///
/// Fails when there are fewer than two folds, or fewer samples than folds.
pub fn folds(n: usize, k: usize, seed: u64, labels: Option<&[i64]>) -> Result<Vec<Split>> {
    if k < 2 || k > n {
        return Err(Error::Config(format!("--folds {k}: from 2 to the number of samples ({n})")));
    }
    let mut order: Vec<usize> = (0..n).collect();
    shuffle(&mut rng(Purpose::Folds, seed, 0, 0), &mut order);
    if let Some(labels) = labels.filter(|l| l.len() == n) {
        let mut classes: BTreeMap<i64, Vec<usize>> = BTreeMap::new();
        order.iter().for_each(|i| classes.entry(labels[*i]).or_default().push(*i));
        order = classes.into_values().flatten().collect();
    }
    let mut fold_of = vec![0; n];
    order.iter().enumerate().for_each(|(place, i)| fold_of[*i] = place % k);
    let part = |f: usize, held: bool| (0..n).filter(|i| (fold_of[*i] == f) == held).collect();
    Ok((0..k).map(|f| Split { train: part(f, false), held: part(f, true) }).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sample_is_held_out_once_and_classes_are_spread() {
        let labels: Vec<i64> = (0..31).map(|i| i64::from(i >= 20)).collect();
        let all = folds(31, 5, 3, Some(&labels)).unwrap();
        let mut held: Vec<usize> = all.iter().flat_map(|s| s.held.clone()).collect();
        held.sort_unstable();
        assert_eq!(held, (0..31).collect::<Vec<_>>());
        for s in &all {
            let mut both = [s.train.clone(), s.held.clone()].concat();
            both.sort_unstable();
            assert_eq!(both, (0..31).collect::<Vec<_>>());
            let zeros = s.held.iter().filter(|i| labels[**i] == 0).count();
            assert_eq!(zeros, 4);
        }
        assert_eq!(all, folds(31, 5, 3, Some(&labels)).unwrap());
        assert_ne!(all, folds(31, 5, 4, Some(&labels)).unwrap());
        assert!(folds(4, 5, 0, None).is_err() && folds(4, 1, 0, None).is_err());
        assert_eq!(folds(4, 4, 0, None).unwrap().len(), 4);
    }
}
