//! The arena's layout: a pure function from sizes and lifetimes to offsets.

use crate::graph::ValueId;
use crate::plan::{Kind, aligned};

/// A run of bytes that is needed from step `born` to step `dies`, both inclusive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    pub bytes: usize,
    pub born: usize,
    pub dies: usize,
    /// Set by [`assign`].
    pub offset: usize,
    pub kind: Kind,
    /// The value it was made for.
    pub name: ValueId,
}

impl Block {
    /// Steps that it lives for.
    fn life(&self) -> usize {
        (self.dies - self.born).saturating_add(1)
    }
}

/// Gives every block an offset such that blocks alive at the same time do not overlap, and returns the
/// size of the arena.
///
/// Largest first, each at the lowest offset where it fits (Pisarchyk and Lee, *Efficient Memory Management
/// for Deep Neural Net Inference*, 2020, greedy by size); or, where that is smaller, those first that take the most over
/// time, or that live longest.
pub fn assign(blocks: &mut [Block]) -> usize {
    type Key = fn(&Block) -> (usize, usize);
    let keys: [Key; 3] =
        [|b| (b.bytes, 0), |b| (b.bytes.saturating_mul(b.life()), 0), |b| (b.life(), b.bytes)];
    let mut best: Option<(usize, Vec<usize>)> = None;
    for key in keys {
        let (total, offsets) = place(blocks, key);
        if best.as_ref().is_none_or(|b| total < b.0) {
            best = Some((total, offsets));
        }
    }
    let (total, offsets) = best.unwrap_or_default();
    blocks.iter_mut().zip(offsets).for_each(|(b, offset)| b.offset = offset);
    total
}

/// The arena's size and the offsets, blocks being placed by falling `key`.
fn place(blocks: &[Block], key: impl Fn(&Block) -> (usize, usize)) -> (usize, Vec<usize>) {
    let mut order: Vec<usize> = (0..blocks.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(key(&blocks[i])), blocks[i].born, i));
    let mut offsets = vec![0; blocks.len()];
    // Kept sorted by offset.
    let mut placed: Vec<usize> = Vec::with_capacity(blocks.len());
    let mut total = 0;
    for i in order {
        let size = aligned(blocks[i].bytes);
        let mut offset = 0;
        for &j in &placed {
            let other = &blocks[j];
            if other.born > blocks[i].dies || other.dies < blocks[i].born {
                continue;
            }
            if offset + size <= offsets[j] {
                break;
            }
            offset = offset.max(offsets[j] + aligned(other.bytes));
        }
        offsets[i] = offset;
        total = total.max(offset + size);
        let at = placed.partition_point(|&j| offsets[j] <= offset);
        placed.insert(at, i);
    }
    (total, offsets)
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};

    use super::*;

    fn block(bytes: usize, born: usize, dies: usize) -> Block {
        Block { bytes, born, dies, offset: 0, kind: Kind::Activation, name: ValueId(0) }
    }

    #[test]
    fn no_two_live_blocks_overlap_and_the_bound_holds() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        for _ in 0..50 {
            let mut blocks: Vec<Block> = (0..60)
                .map(|_| {
                    let born = rng.random_range(0..40);
                    block(rng.random_range(0..5000), born, born + rng.random_range(0..12))
                })
                .collect();
            let total = assign(&mut blocks);
            let mut live_peak = 0;
            for t in 0..60 {
                let live: Vec<&Block> = blocks.iter().filter(|b| b.born <= t && t <= b.dies).collect();
                live_peak = live_peak.max(live.iter().map(|b| aligned(b.bytes)).sum());
                for (i, a) in live.iter().enumerate() {
                    assert!(a.offset + aligned(a.bytes) <= total);
                    for b in &live[i + 1..] {
                        let apart = a.offset + aligned(a.bytes) <= b.offset
                            || b.offset + aligned(b.bytes) <= a.offset;
                        assert!(apart || a.bytes == 0 || b.bytes == 0);
                    }
                }
            }
            assert!(
                total >= live_peak && total <= live_peak * 3 / 2,
                "{total} for a live peak of {live_peak}"
            );
        }
    }

    #[test]
    fn disjoint_lifetimes_share() {
        let mut blocks = [block(100, 0, 1), block(100, 2, 3), block(100, 4, 5)];
        assert_eq!(assign(&mut blocks), 128);
    }
}
