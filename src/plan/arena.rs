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

/// Rounds in which what stands out is placed earlier.
const ROUNDS: usize = 40;
/// Gaps that are left alone: this share of what the fullest moment takes.
const GAPS: usize = 256;

/// Gives every block an offset such that blocks alive at the same time do not overlap, and returns the
/// size of the arena. Within a `limit`, it is worth some time to keep to that.
///
/// Blocks are placed one after the other, each at the lowest offset where it fits: largest first (Pisarchyk and Lee,
/// *Efficient Memory Management for Deep Neural Net Inference*, 2020, greedy by size), or those first that take the most
/// over time, or that live longest. Where all of that leaves gaps and more than the limit, what stood out beyond the bytes of
/// the fullest moment is placed earlier in a next round (Joslin and Clements, *Squeaky Wheel Optimization*, 1999).
pub fn assign(blocks: &mut [Block], limit: Option<usize>) -> usize {
    type Key = fn(&Block) -> (usize, usize);
    // (The rounds begin with the last order.)
    let keys: [Key; 3] =
        [|b| (b.bytes, 0), |b| (b.bytes.saturating_mul(b.life()), 0), |b| (b.life(), b.bytes)];
    let fullest = fullest(blocks);
    let enough = limit.unwrap_or(0).max(fullest + fullest / GAPS);
    let rounds = keys.len() + if limit.is_some() { ROUNDS } else { 0 };
    let (mut total, mut best) = (usize::MAX, Vec::new());
    let (mut order, mut offsets): (Vec<usize>, Vec<usize>) = ((0..blocks.len()).collect(), Vec::new());
    for round in 0..rounds {
        match keys.get(round) {
            Some(key) => {
                order.sort_by_key(|&i| (std::cmp::Reverse(key(&blocks[i])), blocks[i].born, i));
            }
            None => order = outstanding_earlier(blocks, &order, &offsets, fullest),
        }
        let taken;
        (taken, offsets) = place(blocks, &order);
        if taken < total {
            (total, best) = (taken, offsets.clone());
        }
        if total <= enough {
            break;
        }
    }
    blocks.iter_mut().zip(best).for_each(|(b, offset)| b.offset = offset);
    total
}

/// The most bytes that are alive at a time: no arena is smaller.
fn fullest(blocks: &[Block]) -> usize {
    let (mut born, mut dies): (Vec<_>, Vec<_>) =
        blocks.iter().map(|b| ((b.born, aligned(b.bytes)), (b.dies, aligned(b.bytes)))).unzip();
    born.sort();
    dies.sort();
    let (mut live, mut most, mut dead) = (0, 0, dies.into_iter().peekable());
    for (time, bytes) in born {
        while let Some((_, bytes)) = dead.next_if(|d| d.0 < time) {
            live -= bytes;
        }
        live += bytes;
        most = most.max(live);
    }
    most
}

/// The order in which what came to lie beyond `limit` has half the rank that it had.
fn outstanding_earlier(blocks: &[Block], order: &[usize], offsets: &[usize], limit: usize) -> Vec<usize> {
    let rank = |(rank, i): (usize, &usize)| match offsets[*i] + aligned(blocks[*i].bytes) > limit {
        true => (rank / 2, false, *i),
        false => (rank, true, *i),
    };
    let mut ranked: Vec<(usize, bool, usize)> = order.iter().enumerate().map(rank).collect();
    ranked.sort_by_key(|r| (r.0, r.1));
    ranked.into_iter().map(|r| r.2).collect()
}

/// A bit for each of the placed blocks that are compared at once.
const BITS: [u32; 16] = {
    let mut bits = [1; 16];
    let mut i = 0;
    while i < bits.len() {
        bits[i] <<= i;
        i += 1;
    }
    bits
};

/// The arena's size and the offsets, blocks being placed in an order.
fn place(blocks: &[Block], order: &[usize]) -> (usize, Vec<usize>) {
    let moment = |t: usize| u32::try_from(t).unwrap_or(u32::MAX);
    let mut offsets = vec![0; blocks.len()];
    // Of those that are placed, sorted by offset: where they lie, and from when to when.
    let mut places: Vec<[usize; 2]> = Vec::with_capacity(blocks.len());
    let (mut births, mut deaths) = (Vec::with_capacity(blocks.len()), Vec::with_capacity(blocks.len()));
    let mut total = 0;
    for &i in order {
        let (born, dies) = (moment(blocks[i].born), moment(blocks[i].dies));
        let size = aligned(blocks[i].bytes);
        let mut offset = 0;
        'found: for first in (0..places.len()).step_by(BITS.len()) {
            let some = first..places.len().min(first + BITS.len());
            let times: (&[u32], &[u32]) = (&births[some.clone()], &deaths[some]);
            // Without a branch for each: few are alive at the same time.
            let mut meet = 0;
            for ((b, d), bit) in times.0.iter().zip(times.1).zip(&BITS) {
                meet |= bit & u32::from((*b <= dies) & (born <= *d)).wrapping_neg();
            }
            while meet != 0 {
                let [from, to] = places[first + meet.trailing_zeros() as usize];
                if offset + size <= from {
                    break 'found;
                }
                offset = offset.max(to);
                meet &= meet - 1;
            }
        }
        offsets[i] = offset;
        total = total.max(offset + size);
        let at = places.partition_point(|[from, _]| *from <= offset);
        places.insert(at, [offset, offset + size]);
        births.insert(at, born);
        deaths.insert(at, dies);
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
            let total = assign(&mut blocks, Some(0));
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
    fn gaps_are_filled_unless_there_is_room_enough() {
        // (By size, the third would come to lie above the first two.)
        let blocks = [block(640, 0, 1), block(640, 3, 4), block(576, 1, 3), block(64, 0, 1), block(64, 3, 4)];
        let sizes = [0, usize::MAX].map(|limit| {
            let mut blocks = blocks.clone();
            let total = assign(&mut blocks, Some(limit));
            for (i, a) in blocks.iter().enumerate() {
                for b in blocks[..i].iter().filter(|b| b.born <= a.dies && a.born <= b.dies) {
                    assert!(a.offset + a.bytes <= b.offset || b.offset + b.bytes <= a.offset);
                }
            }
            total
        });
        assert_eq!(sizes[0], fullest(&blocks));
        assert!(sizes[1] >= sizes[0]);
        assert_eq!(assign(&mut [], None), 0);
    }

    #[test]
    fn disjoint_lifetimes_share() {
        let mut blocks = [block(100, 0, 1), block(100, 2, 3), block(100, 4, 5)];
        assert_eq!(assign(&mut blocks, None), 128);
    }
}
