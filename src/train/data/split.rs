//! Held-out split and epoch order: pure functions of the seed, so that a resumed run needs no generator state.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::error::{Error, Result};

/// Indices of the samples to train on and of those held out, each ascending.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Split {
    pub train: Vec<usize>,
    pub held: Vec<usize>,
}

/// What a generator is for: two purposes never share a stream.
#[derive(Clone, Copy)]
pub(super) enum Purpose {
    Split = 1,
    Order = 2,
    Shift = 3,
    Noise = 4,
    Memory = 5,
    Folds = 6,
    Labels = 7,
}

/// The generator for one purpose under `seed`, at `(a, b)` (epoch, sample).
pub(super) fn rng(purpose: Purpose, seed: u64, a: u64, b: u64) -> ChaCha8Rng {
    let mut key = [0u8; 32];
    for (dst, word) in key.chunks_exact_mut(8).zip([purpose as u64, seed, a, b]) {
        dst.copy_from_slice(&word.to_le_bytes());
    }
    ChaCha8Rng::from_seed(key)
}

/// Uniform in `0..n` (0 for `n` = 0), by rejection.
// Written out, like the shuffle: the same seed must give the same order whatever version of `rand` is built in.
pub(super) fn below(rng: &mut ChaCha8Rng, n: u64) -> u64 {
    if n < 2 {
        return 0;
    }
    let zone = u64::MAX - u64::MAX % n;
    loop {
        let x = rng.next_u64();
        if x < zone {
            return x % n;
        }
    }
}

pub(super) fn shuffle<T>(rng: &mut ChaCha8Rng, items: &mut [T]) {
    for i in (1..items.len()).rev() {
        items.swap(i, below(rng, i as u64 + 1) as usize);
    }
}

/// Holds out `fraction` of `n` samples, rounded, chosen by `seed`; within each class alike when one label per
/// sample is given. At least one sample is held out (for a fraction above 0) and one is left to train on.
///
/// Fails when the fraction is not in `0..1`, when a single sample would have to be shared, or when there are not
/// `n` labels.
pub fn split(n: usize, fraction: f64, seed: u64, labels: Option<&[i64]>) -> Result<Split> {
    if !(0.0..1.0).contains(&fraction) {
        return Err(Error::Config(format!(
            "a held-out fraction of {fraction}: it must be at least 0 and below 1"
        )));
    }
    if let Some(l) = labels
        && l.len() != n
    {
        return Err(Error::Data(format!("{} labels for {n} samples", l.len())));
    }
    if fraction == 0.0 {
        return Ok(Split { train: (0..n).collect(), held: Vec::new() });
    }
    if n < 2 {
        return Err(Error::Data(format!("{n} sample(s): too few to hold some out and train on the others")));
    }
    let hold = ((n as f64 * fraction).round() as usize).clamp(1, n - 1);
    let mut rng = rng(Purpose::Split, seed, 0, 0);
    let mut order: Vec<usize> = (0..n).collect();
    shuffle(&mut rng, &mut order);
    let mut held = match labels {
        None => order[..hold].to_vec(),
        Some(labels) => stratified(&order, hold, labels),
    };
    held.sort_unstable();
    let mut is_held = vec![false; n];
    for &i in &held {
        is_held[i] = true;
    }
    let train = (0..n).filter(|&i| !is_held[i]).collect();
    Ok(Split { train, held })
}

/// `hold` of the samples in `order`, as many of each class as its share (largest remainder; of classes with the
/// same remainder, the one that comes first in `order`).
fn stratified(order: &[usize], hold: usize, labels: &[i64]) -> Vec<usize> {
    let mut classes: std::collections::BTreeMap<i64, Vec<usize>> = Default::default();
    for &i in order {
        classes.entry(labels[i]).or_default().push(i);
    }
    let mut place = vec![0; order.len()];
    for (p, &i) in order.iter().enumerate() {
        place[i] = p;
    }
    let n = order.len() as u128;
    // (quota, remainder in n-ths, members) per class
    let mut shares: Vec<(usize, u128, &Vec<usize>)> = classes
        .values()
        .map(|m| {
            let exact = m.len() as u128 * hold as u128;
            ((exact / n) as usize, exact % n, m)
        })
        .collect();
    let given: usize = shares.iter().map(|s| s.0).sum();
    shares.sort_by_key(|(_, rest, m)| (std::cmp::Reverse(*rest), place[m[0]]));
    for s in shares.iter_mut().take(hold - given) {
        s.0 += 1;
    }
    shares.iter().flat_map(|(quota, _, m)| m[..*quota].iter().copied()).collect()
}

/// The order in which epoch `epoch` visits `n` samples: a permutation of `0..n`, or `0..n` itself without
/// shuffling. Steps take it in runs of the batch size, the last one being shorter.
pub fn epoch_order(n: usize, seed: u64, epoch: u64, shuffled: bool) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    if shuffled {
        shuffle(&mut rng(Purpose::Order, seed, epoch, 0), &mut order);
    }
    order
}

/// `n` of the samples in `pool`, chosen by `seed`, of each class as many as its share of the pool when `labels` (of the
/// pool's samples) are given; and the others. Both in the pool's order.
///
/// Fails when the pool has fewer than `n`.
pub fn chosen(
    pool: &[usize],
    n: usize,
    seed: u64,
    labels: Option<&[i64]>,
) -> Result<(Vec<usize>, Vec<usize>)> {
    match n {
        n if n > pool.len() => Err(Error::Data(format!("{n} samples are wanted of {}", pool.len()))),
        0 => Ok((Vec::new(), pool.to_vec())),
        n if n == pool.len() => Ok((pool.to_vec(), Vec::new())),
        n => {
            let parts = split(pool.len(), n as f64 / pool.len() as f64, seed, labels)?;
            let of = |places: &[usize]| places.iter().map(|p| pool[*p]).collect();
            Ok((of(&parts.held), of(&parts.train)))
        }
    }
}

/// Replaces a share of the labels, rounded, chosen by `seed`, each by another of the `classes`, all of them equally likely.
pub fn relabelled(labels: &mut [i64], share: f64, classes: usize, seed: u64) {
    if classes < 2 {
        return;
    }
    let mut rng = rng(Purpose::Labels, seed, 0, 0);
    let mut order: Vec<usize> = (0..labels.len()).collect();
    shuffle(&mut rng, &mut order);
    for i in order.into_iter().take((labels.len() as f64 * share).round() as usize) {
        let other = below(&mut rng, classes as u64 - 1) as i64;
        labels[i] = if other >= labels[i] { other + 1 } else { other };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_permutations_and_pure() {
        for n in [0, 1, 2, 17, 1000] {
            let a = epoch_order(n, 3, 5, true);
            assert_eq!(a, epoch_order(n, 3, 5, true));
            let mut sorted = a.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, epoch_order(n, 9, 9, false));
        }
        assert_ne!(epoch_order(100, 3, 5, true), epoch_order(100, 3, 6, true));
        assert_ne!(epoch_order(100, 3, 5, true), epoch_order(100, 4, 5, true));
        // Frozen: a checkpoint of an older build must resume into the same order.
        assert_eq!(epoch_order(8, 0, 0, true), [6, 5, 7, 0, 2, 3, 4, 1]);
    }

    #[test]
    fn every_place_is_equally_likely() {
        let mut counts = [[0u32; 4]; 4];
        for epoch in 0..4000 {
            for (at, i) in epoch_order(4, 1, epoch, true).into_iter().enumerate() {
                counts[i][at] += 1;
            }
        }
        assert!(counts.iter().flatten().all(|c| (880..1120).contains(c)), "{counts:?}");
    }

    #[test]
    fn split_is_a_partition_and_stratified() {
        // 10 of class 0, 30 of class 1, 60 of class 2
        let labels: Vec<i64> = (0..100)
            .map(|i| {
                if i < 10 {
                    0
                } else if i < 40 {
                    1
                } else {
                    2
                }
            })
            .collect();
        let s = split(100, 0.2, 7, Some(&labels)).unwrap();
        let mut all = [s.train.clone(), s.held.clone()].concat();
        all.sort_unstable();
        assert_eq!(all, (0..100).collect::<Vec<_>>());
        let of = |c| s.held.iter().filter(|&&i| labels[i] == c).count();
        assert_eq!((of(0), of(1), of(2)), (2, 6, 12));
        assert_eq!(s, split(100, 0.2, 7, Some(&labels)).unwrap());
        assert_ne!(s, split(100, 0.2, 8, Some(&labels)).unwrap());
        // 50 classes of 2: 20 of them have one member held out, and not simply the first 20
        let labels: Vec<i64> = (0..100).map(|i| i / 2).collect();
        let s = split(100, 0.2, 7, Some(&labels)).unwrap();
        assert_eq!(s.held.len(), 20);
        assert!(s.held.windows(2).all(|w| labels[w[0]] != labels[w[1]]) && s.held.iter().any(|&i| i > 60));
    }

    #[test]
    fn samples_are_chosen_and_labels_replaced_by_seed() {
        let labels: Vec<i64> = (0..100).map(|i| i % 4).collect();
        let pool: Vec<usize> = (1000..1100).collect();
        let (some, others) = chosen(&pool, 20, 3, Some(&labels)).unwrap();
        let mut all = [some.clone(), others].concat();
        all.sort_unstable();
        assert_eq!(all, pool);
        assert!((0..4).all(|c| some.iter().filter(|i| **i % 4 == c).count() == 5));
        assert_ne!(chosen(&pool, 20, 4, Some(&labels)).unwrap().0, some);
        assert_eq!(chosen(&pool, 100, 0, None).unwrap().0, pool);
        assert!(chosen(&pool, 101, 0, None).is_err());
        let mut noisy = labels.clone();
        relabelled(&mut noisy, 0.3, 4, 5);
        let changed = noisy.iter().zip(&labels).filter(|(a, b)| a != b).count();
        assert!(changed == 30 && noisy.iter().all(|l| (0..4).contains(l)), "{changed}");
        let mut again = labels.clone();
        relabelled(&mut again, 0.3, 4, 5);
        assert_eq!(noisy, again);
    }

    #[test]
    fn split_edges() {
        assert_eq!(split(5, 0.0, 0, None).unwrap(), Split { train: vec![0, 1, 2, 3, 4], held: vec![] });
        assert_eq!(split(5, 0.01, 0, None).unwrap().held.len(), 1);
        assert_eq!(split(5, 0.99, 0, None).unwrap().train.len(), 1);
        for bad in [-0.1, 1.0, f64::NAN, f64::INFINITY] {
            assert!(matches!(split(5, bad, 0, None), Err(Error::Config(_))), "{bad}");
        }
        assert!(split(1, 0.5, 0, None).is_err() && split(0, 0.5, 0, None).is_err());
        assert!(split(3, 0.5, 0, Some(&[0, 1])).is_err());
    }
}
